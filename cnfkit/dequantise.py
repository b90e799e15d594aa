"""Discrete data under a continuous flow: stochastic, so no bijection; what comes out is a bound."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from cnfkit.arguments import concrete
from cnfkit.bijections.base import Result
from cnfkit.flow import Flow
from cnfkit.noise import check_generator, draw, fork
from cnfkit.ode.solve import Solve, as_solve


class Dequantiser(nn.Module, ABC):
    r"""A distribution of points in the cell of the unit cube that a discrete point stands for.

    .. math::

        y = (k + u) / L, \quad u \sim q(u \mid k) \text{ on } (0, 1)^d,

        q(y \mid k) = L^d \, q(u \mid k)

    A new one writes ``_noise``.

    Args:
        levels: :math:`L`, the number of values that a coordinate takes, :math:`0, \dots, L - 1`.

    Raises:
        ValueError: if ``levels`` is less than 2; on a call, if an entry is no such value.
        TypeError: on a call, if the points are no tensor of whole numbers.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if not isinstance(levels, int) or levels < 2:
            raise ValueError(f"levels is {levels!r}; wanted a whole number of at least 2")
        self.levels = levels
        self.register_buffer("like", torch.zeros(()), persistent=False)

    @abstractmethod
    def _noise(self, k: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """The places :math:`u` in the cells, of the shape of ``k``, and :math:`\\log q(u \\mid k)`, shape ``(n,)``."""

    def forward(self, k: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Points :math:`y` of the shape of ``k``, and :math:`\\log q(y \\mid k)` of shape ``(n,)``.

        Args:
            k: whole numbers, shape ``(n, *event_shape)``.
            generator: where the noise comes from.
        """
        if not isinstance(k, Tensor):
            raise TypeError(f"k is a {type(k).__name__}; wanted a torch.Tensor")
        if k.is_floating_point() or k.dtype == torch.bool:
            raise TypeError(f"k has dtype {k.dtype}; wanted whole numbers, 0 to {self.levels - 1}")
        if k.dim() < 2:
            raise ValueError(f"k has shape {tuple(k.shape)}; wanted (n, *event_shape)")
        if not k.numel():
            raise ValueError(f"k has shape {tuple(k.shape)}, no values; wanted at least one point")
        if concrete(k):
            low, high = int(k.amin()), int(k.amax())  # numbers, because 256 compared with a uint8 tensor is 0
            if low < 0 or high >= self.levels:
                raise ValueError(f"k holds values {low} to {high}; wanted 0 to {self.levels - 1}")
        check_generator(generator)
        noise, log_q = self._noise(k, generator)
        # off the edges of the cell by what rounding could carry across
        edge = self.levels * torch.finfo(noise.dtype).eps
        y = (k + noise.clamp(edge, 1 - edge)) / self.levels
        return y, log_q + k[0].numel() * math.log(self.levels)

    def quantise(self, y: Tensor) -> Tensor:
        """The level whose cell ``y`` lies in; points outside the unit interval go to the nearest."""
        return (y * self.levels).floor().clamp(0, self.levels - 1).long()

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


class UniformDequantiser(Dequantiser):
    r"""Spread each level of a discrete variable evenly over its cell of the unit interval.

    .. math:: y = (k + u) / L, \quad u \sim \mathrm{U}[0, 1)^d, \qquad q(y \mid k) = L^d \text{ on the cell of } k

    Source: Theis, van den Oord and Bethge, *A note on the evaluation of generative models*, section 3.1.

    Args:
        levels: :math:`L`, the number of values that a coordinate takes, :math:`0, \dots, L - 1`.

    Raises:
        ValueError: if ``levels`` is less than 2; on a call, if an entry is no such value.

    >>> y, log_q = UniformDequantiser(4)(torch.tensor([[0, 3]]), torch.Generator().manual_seed(0))
    >>> (y * 4).floor(), log_q.exp()
    (tensor([[0., 3.]]), tensor([16.]))
    """

    def _noise(self, k, generator):
        noise = draw(torch.rand, k.shape, generator, dtype=self.like.dtype, device=k.device).to(k.device)
        return noise, noise.new_zeros(k.shape[:1])


class VariationalDequantiser(Dequantiser):
    r"""Place each point in its cell by a flow that knows which cell it is: the bound is tighter for it.

    .. math::

        u = f^{-1}(\varepsilon; k), \quad \varepsilon \sim p_\varepsilon,

        \log q(u \mid k) = \log p(u; k)

    Source: Ho et al., *Flow++: Improving flow-based generative models with variational dequantization*, section 3.1.

    Args:
        levels: :math:`L`, the number of values that a coordinate takes, :math:`0, \dots, L - 1`.
        flow: a flow on the open unit cube, of the points' event shape, that takes a context: the levels, as numbers
            from -1 to 1, flattened to as many features as a point has coordinates. A :class:`cnfkit.Logit`
            with alpha = 0 at the start of its bijection keeps it on the cube.

    Raises:
        ValueError: if ``levels`` is less than 2; on a call, if an entry is no such value, or the flow leaves the cube.
        TypeError: if ``flow`` is no flow that takes a context.
        FloatingPointError: on a call, if the flow gives NaN.

    >>> coupling = AffineCoupling(mask("even", 2), MLP(2, 4, context=2))
    >>> flow = Flow(Normal(2), Chain(Logit(2), coupling))
    >>> y, log_q = VariationalDequantiser(4, flow)(torch.tensor([[0, 3]]))
    >>> (y * 4).floor()
    tensor([[0., 3.]], grad_fn=<FloorBackward0>)
    """

    def __init__(self, levels: int, flow: Flow) -> None:
        super().__init__(levels)
        if not isinstance(flow, Flow) or not flow.bijection.takes_context:
            came = "Flow without a context" if isinstance(flow, Flow) else type(flow).__name__
            raise TypeError(f"flow is a {came}; wanted a Flow that takes the levels as its context")
        self.flow = flow

    def _noise(self, k, generator):
        like = self.flow.base.like  # a flow in float64 may have come into a dequantiser in float32
        if k.device != like.device:
            raise TypeError(f"k is on {k.device}, but the dequantiser is on {like.device}; move one to the other")
        levels = k.flatten(1).to(like) * (2 / (self.levels - 1)) - 1
        noise, log_q = self.flow.rsample_and_log_prob(context=levels, generator=generator)
        if noise.shape != k.shape:
            raise ValueError(f"flow gives points of shape {tuple(noise.shape)}; wanted that of k, {tuple(k.shape)}")
        if concrete(noise) and noise.isnan().any():
            raise FloatingPointError("flow gives NaN for noise: its weights have run away; try a smaller lr")
        if concrete(noise) and not ((noise >= 0) & (noise <= 1)).all():
            raise ValueError("flow gives points outside the unit cube; begin its bijection with cnfkit.Logit, alpha=0")
        return noise, log_q


class Dequantised(nn.Module):
    r"""The discrete distribution that a flow on the unit cube stands for.

    .. math:: \log P(k) \ge \mathbb{E}_{u_1 \dots u_m} \log \frac1m \sum_{j=1}^m \frac{p(y_j)}{q(y_j \mid k)}

    One draw gives the variational bound, more draws the importance-weighted one, which rises to :math:`\log P(k)`; but
    with an estimated trace see :meth:`log_weights`.
    Source: Ho et al., *Flow++*, equation 8; Burda, Grosse and Salakhutdinov, *Importance weighted autoencoders*.

    Args:
        flow: a density of points in the unit cube; mass that it has outside is given to no level by ``log_prob``.
        dequantiser: the distribution :math:`q(y \mid k)`.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: on a call, if the points have not the right shape or values, or ``draws`` is no count.
        FloatingPointError: on a call, if a dequantiser's flow gives NaN.

    >>> model = Dequantised(Flow(Uniform(3), Diagonal(3)), UniformDequantiser(2))
    >>> model.log_prob(torch.tensor([[0, 1, 1]])).exp()
    tensor([0.1250], grad_fn=<ExpBackward0>)
    """

    def __init__(self, flow: Flow, dequantiser: Dequantiser) -> None:
        super().__init__()
        for name, value, kind in (("flow", flow, Flow), ("dequantiser", dequantiser, Dequantiser)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} is a {type(value).__name__}; wanted a {kind.__name__}")
        self.flow = flow
        self.dequantiser = dequantiser

    @property
    def event_shape(self) -> torch.Size:
        return self.flow.event_shape

    def log_prob(
        self,
        k: Tensor,
        context: Tensor | None = None,
        solve: Solve | None = None,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A stochastic lower bound of the log-probability, in nats.

        Args:
            k: whole numbers, shape ``(n, *event_shape)``.
            context: as in :meth:`cnfkit.Flow.log_prob`.
            solve: as there.
            draws: :math:`m`, how many dequantised points each bound rests on.
            generator: where all noise of the call comes from; that of ``solve`` unless given.

        Returns:
            Shape ``(n,)``.
        """
        return self.log_prob_and_result(k, context, solve, draws=draws, generator=generator)[0]

    def log_prob_and_result(
        self,
        k: Tensor,
        context: Tensor | None = None,
        solve: Solve | None = None,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Result]:
        """The bound, and what the last of the passes to the latents gave beside it; see :meth:`log_prob`."""
        log_weights, result = self.log_weights(k, context, solve, draws=draws, generator=generator)
        return torch.logsumexp(log_weights, 0) - math.log(draws), result

    def log_weights(
        self,
        k: Tensor,
        context: Tensor | None = None,
        solve: Solve | None = None,
        *,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Result]:
        r"""What the bounds are made of, :math:`\log p(y_j) / q(y_j \mid k)`, and what the last pass gave beside it.

        Hutchinson's probes are the same for all draws of a point: an error of its own in each would not cancel in the
        mean of the weights, but raise it. Shared probes take most of that away and not all: what bounds is one draw, or
        the mean of several bounds, or the exact trace.

        Args:
            k: as in :meth:`log_prob`, and so are the others.
            context: as there.
            solve: as there.
            draws: as there.
            generator: as there.

        Returns:
            Shape ``(draws, n)``, and a :class:`cnfkit.Result`.
        """
        if not isinstance(draws, int) or draws < 1:
            raise ValueError(f"draws is {draws!r}; wanted a whole number of at least 1")
        if not isinstance(k, Tensor):
            raise TypeError(f"k is a {type(k).__name__}; wanted a torch.Tensor")
        if k.dim() != 1 + len(self.event_shape) or k.shape[1:] != self.event_shape:
            raise ValueError(f"k has shape {tuple(k.shape)}; wanted (n, {', '.join(map(str, self.event_shape))})")
        generator = as_solve(solve).generator if generator is None else generator
        solve = replace(as_solve(solve), generator=generator)
        probes = fork(generator) if draws > 1 and solve.trace == "hutchinson" else lambda: generator
        weights = []
        for _ in range(draws):
            y, log_q = self.dequantiser(k, generator)
            log_prob, result = self.flow.log_prob_and_result(y, context, replace(solve, generator=probes()))
            weights.append(log_prob - log_q)
        return torch.stack(weights), result

    @torch.no_grad()
    def sample(
        self,
        n: int | Sequence[int] = (),
        context: Tensor | None = None,
        solve: Solve | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Whole numbers, drawn as :meth:`cnfkit.Flow.sample` draws; points outside the cube go to the nearest level."""
        return self.dequantiser.quantise(self.flow.sample(n, context, solve, generator))
