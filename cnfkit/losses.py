"""Losses: what training minimises, and the units that it is reported in."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor, nn

from cnfkit.dequantise import Dequantised
from cnfkit.flow import Flow
from cnfkit.grids import Grid
from cnfkit.ode.cnf import CNF
from cnfkit.ode.solve import ENERGIES, Solve


class Loss(Protocol):
    """A module that owns the model and returns a batch's loss and the terms that it is made of."""

    def __call__(
        self, batch: Tensor, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


class NegativeLogLikelihood(nn.Module):
    r"""The mean negative log-likelihood of a batch, in nats or in bits per dimension, and weighted penalties.

    .. math::

        L = -\frac1n \sum_i \log p(x_i) + \sum_j \lambda_j \frac1n \sum_i R_j(x_i),

        L_\text{bits} = -\frac{1}{n d \log 2} \sum_i \log p(x_i) + \dots

    The penalties :math:`R_j` are the energies of the path of a CNF, see :class:`cnfkit.CNF`. With ``unit="bits"`` and
    ``Solve(reduction="mean")`` the weights are those of the RNODE paper; with nats and sums, a block of
    :math:`d_b` of the :math:`d` dimensions has :math:`\lambda = \lambda_\text{paper} \, d \log 2 / d_b`.
    Source: Finlay et al., *How to train your neural ODE*, section 3.

    Args:
        model: a :class:`cnfkit.Flow`, or a :class:`cnfkit.Dequantised` for discrete data (then the loss is a bound).
        unit: ``"nats"`` or ``"bits"`` (per dimension).
        solve: how to solve ODEs in training: a :class:`cnfkit.Solve`, or a grid that changes from batch to batch, such
            as :class:`cnfkit.FrozenGrid`. Its probes come from the generator of the batch.
        penalties: the weights :math:`\lambda_j` by name.
        evaluation: how to solve ODEs in ``eval()`` mode; unless given, with the trace of ``solve`` and steps within a
            tolerance of 1e-5, so that no grid can flatter the model. Energies are reduced as in training.

    Raises:
        TypeError: if the model or a solve is of another kind.
        ValueError: if the unit or a penalty is unknown, or a weight is negative.

    >>> loss, terms = NegativeLogLikelihood(Flow(Uniform(2), Diagonal(2, log_scale=-1.0)))(torch.full((4, 2), 0.5))
    >>> loss.item(), list(terms)
    (2.0, ['nll'])
    """

    def __init__(
        self,
        model: Flow | Dequantised,
        unit: str = "nats",
        solve: Solve | Grid | None = None,
        penalties: dict[str, float] | None = None,
        evaluation: Solve | None = None,
    ) -> None:
        super().__init__()
        require_model(model)
        if unit not in ("nats", "bits"):
            raise ValueError(f"unit is {unit!r}; wanted 'nats' or 'bits'")
        if solve is not None and not isinstance(solve, Solve | Grid):
            raise TypeError(f"solve is a {type(solve).__name__}; wanted a Solve or a grid")
        if evaluation is not None and not isinstance(evaluation, Solve):
            raise TypeError(f"evaluation is a {type(evaluation).__name__}; wanted a Solve")
        if penalties is not None and not isinstance(penalties, dict):
            raise TypeError(f"penalties is {penalties!r}; wanted weights by name, such as {{'kinetic_energy': 0.01}}")
        for name, weight in (penalties or {}).items():
            if name not in ENERGIES:
                raise ValueError(f"penalties has {name!r}; wanted {' or '.join(ENERGIES)}")
            if not isinstance(weight, Real) or not 0 <= weight < math.inf:
                raise ValueError(f"penalties has {name}: {weight!r}; wanted a weight of at least 0")
        self.model = model
        self.unit = unit
        self.solve = Solve() if solve is None else solve
        self.penalties = dict(penalties or {})
        training = self.solve.solve if isinstance(self.solve, Grid) else self.solve
        if training.energies:
            raise ValueError(f"solve has energies {training.energies}; name them in penalties, with weight 0 to watch")
        evaluation = evaluation or training.within(min(training.tolerance or 1e-5, 1e-5))
        self.evaluation = replace(
            evaluation, reduction=training.reduction
        )  # the penalties are the same, or no penalties

    def extra_repr(self) -> str:
        penalties = "".join(f", {name}={weight}" for name, weight in self.penalties.items())
        solve = f", {self.solve}" * isinstance(self.solve, Solve)
        return f"unit={self.unit!r}{penalties}{solve}, evaluation={self.evaluation}"

    def forward(
        self, batch: Tensor, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar with gradients, and its terms by name, without.

        Args:
            batch: points, shape ``(n, *event_shape)``.
            generator: where noise comes from, for models and solves that draw any.
            context: what the points are conditioned on, shape ``(n, features)``.

        Returns:
            The loss; ``nll`` in the unit, each penalty before its weight, and for CNFs the number of ``evaluations``.
        """
        if not self.training:
            solve = self.evaluation
        elif isinstance(self.solve, Grid):
            solve = self.solve(self.model, batch, generator, context)
        else:
            solve = self.solve
        solve = replace(solve, generator=generator or solve.generator, energies=tuple(self.penalties))
        log_prob, result = self.model.log_prob_and_result(batch, context, solve)
        loss = self._in_unit(log_prob).mean()
        terms = {"nll": loss.detach()}
        for name, weight in self.penalties.items():
            if name not in result.penalties:
                raise ValueError(f"penalties has {name!r}, but the model holds no CNF that has one")
            penalty = result.penalties[name].mean()
            loss, terms[name] = loss + weight * penalty, penalty.detach()
        if result.stats:
            terms["evaluations"] = torch.tensor(float(result.evaluations))
        return loss, terms

    @torch.no_grad()
    def solver_error(
        self, batch: Tensor, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> float | None:
        r"""How far the likelihoods that training sees are the solver's doing; None for a model without a CNF.

        .. math:: \frac1n \sum_i \bigl| L_\text{training}(x_i) - L_\text{evaluation}(x_i) \bigr|

        in the unit of the loss, with the same noise. For watching a training: :func:`cnfkit.solver_error` compares with
        a solve that is much tighter than that of the evaluation, in float64.

        Args:
            batch: points, shape ``(n, *event_shape)``.
            context: what they are conditioned on, shape ``(n, features)``.
            generator: where noise comes from.
        """
        if not any(isinstance(part, CNF) for part in self.model.modules()):
            return None
        training = self.solve.solve if isinstance(self.solve, Grid) else self.solve
        tight = self.evaluation
        if training.times is None:  # or the two might be one and the same
            flow = self.model.flow if isinstance(self.model, Dequantised) else self.model
            finest = 4 * torch.finfo(flow.base.like.dtype).eps  # that a solve accepts
            tight = tight.within(max(min(training.tolerance, tight.tolerance or math.inf) / 10, finest))
        state = (generator or torch.default_generator).get_state()

        def nll(solve: Solve) -> Tensor:
            noise = torch.Generator("cpu" if generator is None else generator.device)
            noise.set_state(state)
            solve = replace(solve, generator=noise, energies=())
            return self._in_unit(self.model.log_prob_and_result(batch, context, solve)[0])

        return (nll(training) - nll(tight)).abs().mean().item()

    def _in_unit(self, log_prob: Tensor) -> Tensor:
        return -log_prob if self.unit == "nats" else bits_per_dimension(log_prob, self.model.event_shape.numel())


def require_model(model: Flow | Dequantised) -> None:
    """Raise unless ``model`` is one that has a likelihood."""
    if not isinstance(model, Flow | Dequantised):
        raise TypeError(f"model is a {type(model).__name__}; wanted a Flow or a Dequantised")


def bits_per_dimension(log_prob: Tensor, dimensions: int) -> Tensor:
    r"""The code length per coordinate.

    .. math:: -\frac{\log P(k)}{d \log 2}

    Args:
        log_prob: log-probabilities of *discrete* points, in nats, any shape.
        dimensions: :math:`d`, coordinates per point.

    Returns:
        The same shape.

    Raises:
        ValueError: if ``dimensions`` is less than 1.

    >>> bits_per_dimension(torch.tensor(-64 * math.log(256.0)), 64)  # uniform noise of 256 levels
    tensor(8.)
    """
    if dimensions < 1:
        raise ValueError(f"dimensions is {dimensions}; wanted at least 1")
    return -log_prob / (dimensions * math.log(2))
