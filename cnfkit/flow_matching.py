"""Flow matching: a velocity field learned by regression, without solving its equation."""

from __future__ import annotations

from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from cnfkit.arguments import as_count, check_context, check_points, concrete
from cnfkit.bijections.base import Bijection, Chain, sum_event
from cnfkit.dequantise import Dequantised
from cnfkit.flow import Flow
from cnfkit.losses import require_model
from cnfkit.ode.cnf import CNF
from cnfkit.ode.moments import require_velocity
from cnfkit.ode.solve import Solve

PAIRINGS = ("independent", "optimal")


class FlowMatching(nn.Module):
    r"""The mean squared error of a CNF's field as the velocity of straight lines from data to base samples.

    .. math::

        L = \mathbb{E} \left\| v(t, z_t) - \frac{z_1 - z_0}{t_1 - t_0} \right\|^2,

        z_t = (1 - s) z_0 + s z_1, \quad t = t_0 + s (t_1 - t_0)

    Here :math:`z_0` is a data point as it enters the CNF, :math:`z_1` a sample of the base, and
    :math:`s \sim \mathrm U[0, 1)`, one for each point; the square is summed over the dimensions. The minimiser is the
    mean velocity of the lines through a point, :math:`\mathbb{E}[z_1 - z_0 \mid z_t = z] / (t_1 - t_0)`, whose flow
    carries the data to the base. The loss there is not 0, but the variance about that mean. Most papers count the time
    from the base to the data; here the data are at :math:`t_0`.

    In ``eval()`` mode, by which :func:`cnfkit.fit` chooses the best weights, the loss is the same (and ``fit`` gives
    each validation the same noise), or the negative log-likelihood in nats, if ``evaluation`` is given.

    Sources: Lipman et al., *Flow matching for generative modeling*, theorem 2; Liu, Gong and Liu, *Flow straight and
    fast*; Albergo and Vanden-Eijnden, *Building normalizing flows with stochastic interpolants*; for optimal pairing
    Tong et al., *Improving and generalizing flow-based generative models with minibatch optimal transport*.

    Args:
        model: a :class:`cnfkit.Flow` whose bijection is a CNF, or a chain that ends in its only CNF, or a
            :class:`cnfkit.Dequantised` of such a flow. Its field is called with one time per point, shape ``(n,)``.
            The field alone is trained, all other parameters must be frozen: what stands before the CNF could make the
            lines easy to tell by sending all data to one point.
        pairing: ``"independent"``; or ``"optimal"``, in groups of a batch, by :func:`optimal_pairing`: fewer lines
            cross, and the paths of the flow are straighter.
        pairing_batch: the size of a group; the time that its pairing takes grows like the cube.
        evaluation: how to solve the ODE in ``eval()`` mode, such as ``Solve()``; none is solved unless given.

    Raises:
        TypeError: if ``model`` or ``evaluation`` is of another kind; on a call, if the points or the generator are.
        ValueError: if the model is of another form or would train more than its field, or an option is
            out of range; on a call, if the points, the context or the field's velocities have not the right shape, or
            the points are not finite where they enter the CNF.

    >>> loss, terms = FlowMatching(Flow(Normal(2), CNF(MLPField(2))))(torch.zeros(1, 2))
    >>> bool(loss == terms["squared_distance"])  # the field starts at zero
    True
    """

    def __init__(
        self,
        model: Flow | Dequantised,
        pairing: str = "independent",
        pairing_batch: int = 64,
        evaluation: Solve | None = None,
    ) -> None:
        super().__init__()
        require_model(model)
        _, _, cnf = _parts(model)
        learnt = set(cnf.field.parameters())
        others = [name for name, value in model.named_parameters() if value.requires_grad and value not in learnt]
        if others:
            raise ValueError(
                f"model would learn {', '.join(others)}, outside the field of its CNF; "
                "wanted them frozen, by requires_grad_(False)"
            )
        if pairing not in PAIRINGS:
            raise ValueError(f"pairing is {pairing!r}; wanted one of {', '.join(PAIRINGS)}")
        if evaluation is not None and not isinstance(evaluation, Solve):
            raise TypeError(f"evaluation is a {type(evaluation).__name__}; wanted a Solve")
        self.model, self.pairing, self.evaluation = model, pairing, evaluation
        self.pairing_batch = as_count("pairing_batch", pairing_batch)

    def extra_repr(self) -> str:
        return f"pairing={self.pairing!r}, pairing_batch={self.pairing_batch}, evaluation={self.evaluation}"

    def forward(
        self, batch: Tensor, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar with gradients in the field's parameters, and its terms by name, without.

        Args:
            batch: points, shape ``(n, *event_shape)``.
            generator: where dequantisation, base samples and times come from, in that order.
            context: what the points are conditioned on, shape ``(n, features)``.

        Returns:
            The loss; ``flow_matching``, the loss again, and ``squared_distance``, the mean of that of the pairs. If the
            loss is a negative log-likelihood, ``nll``, and the number of ``evaluations`` of the field.
        """
        if not self.training and self.evaluation is not None:
            solve = replace(self.evaluation, generator=generator or self.evaluation.generator)
            log_prob, result = self.model.log_prob_and_result(batch, context, solve)
            loss = -log_prob.mean()
            return loss, {"nll": loss.detach(), "evaluations": torch.tensor(float(result.evaluations))}
        _, _, cnf = _parts(self.model)
        t0, t1 = cnf.interval
        with torch.no_grad():
            z0, z1, s = self._draw(batch, generator, context)
            line = z1 - z0
            z = z0 + s.view(-1, *[1] * (z0.dim() - 1)) * line
        given = (check_context("FlowMatching", context, z.shape[:1], z),) if cnf.takes_context else ()
        v = cnf.field(t0 + s * (t1 - t0), z, *given)
        require_velocity(cnf.field, v, z)
        loss, distance = (sum_event(d.square(), cnf.event_shape).mean() for d in (v - line / (t1 - t0), line))
        return loss, {"flow_matching": loss.detach(), "squared_distance": distance}

    def _draw(
        self, batch: Tensor, generator: torch.Generator | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ends of the lines, and where on them to compare."""
        flow, before, _ = _parts(self.model)
        if context is not None and not flow.bijection.takes_context:
            raise ValueError("FlowMatching: context was given, but the model takes none")
        if context is not None and self.pairing == "optimal":
            raise ValueError("pairing is 'optimal', which would exchange the contexts; wanted 'independent' with them")
        z0 = self.model.dequantiser(batch, generator)[0] if isinstance(self.model, Dequantised) else batch
        check_points("FlowMatching", "batch", z0, flow.event_shape, flow.base.like)
        if z0.dim() != 1 + len(flow.event_shape):
            raise ValueError(f"batch has shape {tuple(z0.shape)}; wanted (n, {', '.join(map(str, flow.event_shape))})")
        for member in before:
            z0 = member(z0, context if member.takes_context else None, Solve(trace="none")).value
        if concrete(z0) and not (finite := z0.isfinite().flatten(1).all(-1)).all():
            raise ValueError(
                f"batch: {int((~finite).sum())} of {len(z0)} points are not finite where they enter the CNF"
            )
        z1 = flow.base.sample(len(z0), generator)
        if self.pairing == "optimal":
            groups = zip(z0.split(self.pairing_batch), z1.split(self.pairing_batch), strict=True)
            z1 = torch.cat([samples[optimal_pairing(points, samples)] for points, samples in groups])
        device = generator.device if generator else z0.device
        return z0, z1, torch.rand(len(z0), generator=generator, dtype=z0.dtype, device=device).to(z0.device)


def optimal_pairing(x: Tensor, z: Tensor) -> Tensor:
    r"""The pairing of two sets of points with the least sum of squared distances.

    .. math:: \pi = \operatorname*{arg\,min}_\pi \sum_i \| x_i - z_{\pi(i)} \|^2

    It is exact, by the assignment solver of SciPy, on the CPU in float64, in a time that grows like :math:`n^3`.

    Args:
        x: points, shape ``(n, *event_shape)``.
        z: as many, of the same shape.

    Returns:
        The permutation :math:`\pi`, shape ``(n,)``; the partners of ``x`` are ``z[permutation]``.

    Raises:
        TypeError: if ``x`` or ``z`` is no tensor.
        ValueError: if their shapes differ or are not those of points, or an entry is not finite.

    >>> optimal_pairing(torch.tensor([[0.0], [3.0], [1.0]]), torch.tensor([[5.0], [1.5], [4.0]]))
    tensor([1, 0, 2])
    """
    for name, value in (("x", x), ("z", z)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; wanted a torch.Tensor")
        if value.dim() < 2 or value.shape != x.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; wanted (n, *event_shape), the same for x and z")
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite entries")
    points, partners = (value.detach().flatten(1).cpu().double() for value in (x, z))
    # the squared norms are in every pairing's sum: what differs is that of the inner products
    _, order = linear_sum_assignment((points @ partners.T).numpy(), maximize=True)
    return torch.from_numpy(order).to(x.device)


def _parts(model: Flow | Dequantised) -> tuple[Flow, list[Bijection], CNF]:
    """The flow of a model, the maps before its CNF, and that CNF; or an error that says what else it is made of."""
    flow = model.flow if isinstance(model, Dequantised) else model
    members = [flow.bijection]
    while isinstance(members[-1], Chain):
        members[-1:] = members[-1]
    *before, last = members
    if not isinstance(last, CNF) or any(isinstance(part, CNF) for member in before for part in member.modules()):
        came = ", ".join(type(member).__name__ for member in members)
        raise ValueError(f"model has the bijections {came}; wanted a CNF as the last, and no other")
    if last.interval[0] == last.interval[1]:
        raise ValueError(f"model has a CNF on the interval {last.interval}; wanted one of some length")
    return flow, before, last
