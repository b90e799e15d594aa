"""Evaluation: how good a model is, and how far its solver can be trusted; never the one without the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from cnfkit import distributed
from cnfkit.arguments import as_count
from cnfkit.bijections.base import as_double
from cnfkit.dequantise import Dequantised
from cnfkit.flow import Flow
from cnfkit.losses import bits_per_dimension, require_model
from cnfkit.noise import PointNoise, fork, seeded
from cnfkit.ode.solve import Solve, as_solve


@dataclass(frozen=True)
class Evaluation:
    """A likelihood with its uncertainties.

    Attributes:
        nll: the mean negative log-likelihood.
        standard_error: of that mean.
        solver_error: see :func:`solver_error`; 0 for flows without ODEs.
        evaluations: of the fields, in one solve of each; the mean over the batches.
        unit: of the likelihoods and of the solver's error.
        draws: of discrete data, how many draws of the noise a point the bound is the mean of.
        importance_weighted: of discrete data, the tighter bound that rests on all draws together.
        bin_centres: of discrete data, if it was asked for, what would be the likelihood if the density were constant in
            each cell: often reported, but a bound of nothing.

    >>> print(Evaluation(2.034, 0.018, 3e-6, 92, "nats"))
    2.034 ± 0.018 nats, solver error 3.0e-06, 92 evaluations
    >>> print(Evaluation(1.021, 0.002, 0.0, 0, "bits/dim", 8, 1.014, 0.989))
    1.021 ± 0.002 bits/dim, importance-weighted with 8 draws 1.014, at bin centres (no bound) 0.989
    """

    nll: float
    standard_error: float
    solver_error: float
    evaluations: float
    unit: str
    draws: int = 1
    importance_weighted: float | None = None
    bin_centres: float | None = None

    def __str__(self) -> str:
        text = f"{self.nll:.3f} ± {self.standard_error:.3f} {self.unit}"
        if self.draws > 1:
            text += f", importance-weighted with {self.draws} draws {self.importance_weighted:.3f}"
        if self.bin_centres is not None:
            text += f", at bin centres (no bound) {self.bin_centres:.3f}"
        if self.evaluations:
            text += f", solver error {self.solver_error:.1e}, {self.evaluations:.0f} evaluations"
        return text


@torch.no_grad()
def evaluate(
    model: Flow | Dequantised,
    x: Tensor,
    context: Tensor | None = None,
    solve: Solve | None = None,
    rows: int = 500,
    *,
    draws: int = 1,
    bin_centres: bool = False,
    seed: int | None = None,
    batch: int = 2000,
) -> Evaluation:
    r"""The likelihood of held-out points, with its standard error and the error of the solver.

    Of discrete data, under :math:`m` draws :math:`y_j \sim q(y \mid k)`, the bounds are

    .. math::

        -\log P(k) \le -\mathbb{E} \frac1m \sum_j \log \frac{p(y_j)}{q(y_j \mid k)},

        -\log P(k) \le -\mathbb{E} \log \frac1m \sum_j \frac{p(y_j)}{q(y_j \mid k)},

    the second never above the first, and with Hutchinson's trace a little too low to be one, see
    :meth:`cnfkit.Dequantised.log_weights`. Where several processes have joined, each measures its share of the points.

    Args:
        model: in nats for a flow, in bits per dimension for dequantised data.
        x: points, shape ``(n, *event_shape)``.
        context: what they are conditioned on, shape ``(n, features)``.
        solve: how to solve ODEs.
        rows: how many of the points the solver's error is measured on.
        draws: :math:`m`, of discrete data; the standard error is over the points.
        bin_centres: whether to take the density in the middle of the cells, too.
        seed: of all noise, which is then a function of the seed and of a point's place in ``x``: with a given grid no
            number depends on ``batch``, or on how many processes there are, but for rounding. Without one the noise
            comes from the generator of ``solve``.
        batch: how many points are taken at once.

    Raises:
        TypeError, ValueError: as :meth:`cnfkit.Flow.log_prob`.
        ValueError: if there are fewer points than 2 or than processes, a number is less than 1, or a flow is treated as
            one of discrete data.

    >>> print(evaluate(Flow(Normal(1), Diagonal(1)), torch.zeros(10, 1)))
    0.919 ± 0.000 nats
    """
    solve = as_solve(solve)
    require_model(model)
    if len(x) < max(2, distributed.processes()):
        raise ValueError(f"x has {len(x)} points; a standard error needs at least 2, and each process one")
    rows, draws, batch = as_count("rows", rows), as_count("draws", draws), as_count("batch", batch)
    if (draws > 1 or bin_centres) and not isinstance(model, Dequantised):
        raise ValueError("draws and bin_centres are for a Dequantised, but model is a Flow; leave them out")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f"seed is {seed!r}; wanted a whole number, or None")
    modes = {module: module.training for module in model.modules()}
    try:
        return _evaluate(model.eval(), x, context, solve, rows, draws, bin_centres, seed, batch)
    finally:
        for module, training in modes.items():
            module.training = training


def _evaluate(model, x: Tensor, context: Tensor | None, solve: Solve, rows: int, draws, bin_centres, seed, batch):
    discrete, n = isinstance(model, Dequantised), len(x)
    logs, evaluations = [], []
    for numbers in distributed.mine(torch.arange(n)).split(batch):
        points, given = x[numbers], None if context is None else context[numbers]

        def noisy(numbers: Tensor = numbers) -> Solve:
            return solve if seed is None else replace(solve, generator=PointNoise(seed, numbers.tolist()))

        if discrete:
            found, result = model.log_weights(points, given, noisy(), draws=draws)
        else:
            log_prob, result = model.log_prob_and_result(points, given, noisy())
            found = log_prob[None]
        if bin_centres:
            found = torch.cat([found, _at_centres(model, points, given, noisy())[None]])
        evaluations.append(result.evaluations)
        logs.append(found.T.double().cpu())
    logs = distributed.together(torch.cat(logs), n)
    measured, error = logs[:, :draws], 0.0
    if any(evaluations):
        some = solve if seed is None else replace(solve, generator=seeded(seed, "solver", 0))
        error = solver_error(model, x[:rows], None if context is None else context[:rows], some)
    found, unit, in_unit = {"nll": measured.mean(1)}, "nats", torch.neg
    if discrete:
        found["importance_weighted"] = measured.logsumexp(1) - math.log(draws)
        unit, in_unit = "bits/dim", partial(bits_per_dimension, dimensions=model.event_shape.numel())
        error = -in_unit(torch.tensor(error)).item()
    if bin_centres:
        found["bin_centres"] = logs[:, draws]
    error_of_mean = in_unit(found["nll"]).std() / n**0.5
    means = {name: in_unit(log_prob).mean().item() for name, log_prob in found.items()}
    return Evaluation(
        means.pop("nll"), error_of_mean.item(), error, sum(evaluations) / len(evaluations), unit, draws, **means
    )


def _at_centres(model: Dequantised, k: Tensor, context: Tensor | None, solve: Solve) -> Tensor:
    """The log-density in the middle of the cells, times their volume."""
    levels, like = model.dequantiser.levels, model.flow.base.like
    return model.flow.log_prob((k.to(like) + 0.5) / levels, context, solve) - k[0].numel() * math.log(levels)


@torch.no_grad()
def solver_error(
    model: Flow | Dequantised, x: Tensor, context: Tensor | None = None, solve: Solve | None = None
) -> float:
    r"""How much of a log-density is the solver's doing, in nats.

    .. math:: \frac1n \sum_i \bigl| \log p_\text{solve}(x_i) - \log p_\text{tight}(x_i) \bigr|

    The tight solve is Dormand–Prince within 1e-8, or a hundredth of the tolerance if that is less, of the
    log-determinant too; in float64 (on the CPU where the device has none), with the same probes and the same noise.

    Args:
        model: a flow, or dequantised data.
        x: points, shape ``(n, *event_shape)``.
        context: what they are conditioned on, shape ``(n, features)``.
        solve: the solve whose error is measured.

    Returns:
        The mean over the points.

    Raises:
        TypeError, ValueError: as :meth:`cnfkit.Flow.log_prob`.

    >>> flow = Flow(Normal(2), CNF(MLPField(2)))
    >>> solver_error(flow, torch.zeros(3, 2)) < 1e-4
    True
    """
    solve = as_solve(solve)
    require_model(model)
    if isinstance(model, Dequantised):
        model, x = model.flow, model.dequantiser(x, solve.generator)[0]
    noise = fork(solve.generator)

    def log_prob(model: Flow, solve: Solve, *points: Tensor | None) -> Tensor:
        return model.log_prob(*points, replace(solve, generator=noise()))

    tight = solve.within(max(1e-13, min(1e-8, (solve.tolerance or 1.0) / 100)))
    points = [None if part is None else as_double(part) for part in (x, context)]
    truth = log_prob(as_double(model), tight, *points)
    return (log_prob(model, solve, x, context).to(truth) - truth).abs().mean().item()
