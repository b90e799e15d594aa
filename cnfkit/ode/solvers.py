r"""Runge–Kutta solvers of :math:`\dot z = v(t, z)`, with integrals of rates along the path.

A *dynamics* is a function ``(t, z) -> (v, rates)``: the velocity, of the shape of ``z``, ``(n, *event)``, and the
numbers that are integrated along the path, shape ``(m, n)``. The rates never enter the stages of a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from cnfkit.arguments import concrete
from cnfkit.ode.solve import Solve
from cnfkit.ode.statistics import SolveError, Statistics
from cnfkit.ode.tableaux import TABLEAUX, Tableau

Dynamics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Evaluation = Callable[..., tuple[Tensor, Tensor | None]]
Path = list[tuple[float, float, Tensor]]


class Counting:
    """A dynamics whose evaluations are counted; what is evaluated after the solve belongs to the backward pass.

    Args:
        dynamics: the dynamics.
        stats: where they are counted.
        watched: whether the end of a grid is searched for numbers that are not finite: a device must be waited for.
    """

    def __init__(self, dynamics: Dynamics, stats: Statistics, watched: bool = True) -> None:
        self.dynamics, self.stats, self.watched, self.forward = dynamics, stats, watched, True

    def at(self, times: Sequence[float], z: Tensor) -> list[Evaluation]:
        """The dynamics at some times, as functions ``(z, rated) -> (v, rates)``; without rates where they are not used.

        A dynamics with a method of this name computes all that depends on the time alone at once, for all times.
        """
        # a tensor of times is filled in place of copied: it is on the device of z, and float64 only if z is
        moments = [z.new_full((), t) for t in times]
        if hasattr(self.dynamics, "at"):
            evaluations = self.dynamics.at(torch.stack(moments))
        else:
            evaluations = [partial(_rated, self.dynamics, t) for t in moments]
        return [partial(self._count, evaluation) for evaluation in evaluations]

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._count(partial(self.dynamics, t), z)

    def _count(self, evaluation: Evaluation, *args):
        if self.forward:
            self.stats.evaluations += 1
        else:
            self.stats.backward_evaluations += 1
        return evaluation(*args)


def _rated(dynamics: Dynamics, t: Tensor, z: Tensor, rated: bool = True) -> tuple[Tensor, Tensor]:
    return dynamics(t, z)


def stages(tableau: Tableau, t: float, h: float) -> list[float]:
    """The times of a step's stages."""
    return [t, *(t + c * h for c in tableau.c)]


def runge_kutta_step(
    evaluations: Sequence[Evaluation], tableau: Tableau, h: float, z: Tensor, first: tuple | None = None
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor | None]]]:
    """One step of an explicit Runge–Kutta method.

    Args:
        evaluations: the dynamics at the times of the stages.
        tableau: the method.
        h: the step, negative for a step back.
        z: the state.
        first: the first stage, if it is known.

    Returns:
        The state after the step, the integrals of the rates over it, and the stages.
    """
    used = tableau.b if tableau.error is None else [b or e for b, e in zip(tableau.b, tableau.error, strict=True)]
    found = [evaluations[0](z, bool(used[0])) if first is None else first]
    for row, weight, evaluate in zip(tableau.a, used[1:], evaluations[1:], strict=True):
        found.append(evaluate(_combine(z, h, row, (v for v, _ in found)), bool(weight)))
    velocities, rates = zip(*found, strict=True)
    return _combine(z, h, tableau.b, velocities), weighted(h, tableau.b, rates), found


def _combine(z: Tensor, h: float, weights: Iterable[float], terms: Iterable[Tensor]) -> Tensor:
    """z + h Σ w v."""
    for weight, term in zip(weights, terms, strict=True):
        z = torch.add(z, term, alpha=h * weight) if weight else z
    return z


def weighted(h: float, weights: Iterable[float], terms: Iterable[Tensor | None]) -> Tensor:
    """h Σ w r."""
    (weight, term), *rest = [pair for pair in zip(weights, terms, strict=True) if pair[0]]
    return _combine(h * weight * term, h, *zip(*rest, strict=True)) if rest else h * weight * term


def without_error(method: str) -> Tableau:
    """A method's table for steps that are given: the last stage of an embedded pair serves the error estimate alone."""
    tableau = TABLEAUX[method]
    return tableau if tableau.error is None else Tableau(tableau.a[:-1], tableau.b[:-1], tableau.c[:-1], tableau.order)


def run(
    dynamics: Counting, z: Tensor, start: float, end: float, solve: Solve, controlled: int, keep: bool = False
) -> tuple[Tensor, Tensor, Path]:
    """Solve on a grid, or with steps that are chosen.

    Returns:
        The state at ``end``; the integrals, shape ``(m, n)``; and if ``keep`` is set the steps, each as its time, its
        length and the state that it began with.
    """
    if solve.times is not None:
        return _on_grid(dynamics, z, start, end, solve, keep)
    return _adaptively(dynamics, z, start, end, solve, controlled, keep)


def grid_steps(solve: Solve, start: float, end: float) -> list[tuple[float, float]]:
    """The time and the length of each step of a grid."""
    shares = solve.times if end > start else tuple(1 - share for share in reversed(solve.times))
    return [(start + (end - start) * a, (end - start) * (b - a)) for a, b in pairwise(shares)]


def _on_grid(
    dynamics: Counting, z: Tensor, start: float, end: float, solve: Solve, keep: bool
) -> tuple[Tensor, Tensor, Path]:
    tableau, steps = without_error(solve.method), grid_steps(solve, start, end)
    # what is made for all steps at once is made faster; where memory is to be spared, nothing is
    spare = solve.gradient != "backprop"
    parts = [[step] for step in steps] if spare else [steps]
    path, good, total, s = [], [], None, len(tableau.b)
    for part in parts:
        evaluations = dynamics.at([time for t, h in part for time in stages(tableau, t, h)], z)
        integrals = []
        for k, (t, h) in enumerate(part):
            path.append((t, h, _largest(z) if spare and not keep else z))
            z, integral, _ = runge_kutta_step(evaluations[k * s : (k + 1) * s], tableau, h, z)
            integrals.append(integral)
        integral = torch.stack(integrals).sum(0)
        total = integral if total is None else total + integral
        good += [_finite(z) & _finite(total)] if spare else []
    dynamics.stats.accepted, dynamics.stats.times = len(steps), solve.times
    if dynamics.watched and concrete(z) and not finite(z, total):
        # a look at every step would slow down all the solves that go well
        if not spare:
            after = [state for *_, state in path[1:]] + [z]
            good = (finite(after[k], torch.stack(integrals[: k + 1]).sum(0)) for k in range(len(steps)))
        bad = next(k for k, fine in enumerate(good) if not fine)
        raise not_finite(path[bad][0], bad, path[bad][2])
    return z, total, path


def _adaptively(
    dynamics: Counting, z: Tensor, start: float, end: float, solve: Solve, controlled: int, keep: bool
) -> tuple[Tensor, Tensor, Path]:
    """Dormand–Prince with steps from its error estimate; Hairer, Nørsett and Wanner, section II.4."""
    tableau, tolerance, stats = TABLEAUX[solve.method], solve.tolerance, dynamics.stats
    sign, length = (1.0 if end > start else -1.0), abs(end - start)
    smallest = 8 * torch.finfo(z.dtype).eps * max(abs(start), abs(end))
    first = dynamics.at([start], z)[0](z)
    if not finite(*first):
        raise not_finite(start, 0, z)
    h = min(_first_step(dynamics, start, sign * length, z, first, tableau.order, tolerance, controlled), length)
    path, total, passed, shares, may_grow = [], torch.zeros_like(first[1]), 0.0, [0.0], True
    while passed < length:
        tried = stats.accepted + stats.rejected
        t = start + sign * passed
        if tried >= solve.max_steps:
            remedy = "try a larger tolerance or max_steps, or penalties on the path"
            raise SolveError(f"max_steps = {tried} were not enough: stopped", t, stats.accepted, largest(z), remedy)
        if h < smallest:
            remedy = "the field is stiff or blows up here; try penalties on the path, a larger tolerance, or float64"
            raise SolveError(f"the step vanished (h = {h:.1g}): stopped", t, stats.accepted, largest(z), remedy)
        last = passed + h >= length * (1 - 1e-12)
        if last:
            h = length - passed
        evaluations = dynamics.at(stages(tableau, t, sign * h), z)
        new, integral, found = runge_kutta_step(evaluations, tableau, sign * h, z, first)
        with torch.no_grad():
            errors = [weighted(h, tableau.error, part) for part in zip(*found, strict=True)]
            error = _error(errors, z, new, total, integral, tolerance, controlled)
        if error <= 1:  # a NaN is not
            path += [(t, sign * h, z)] if keep else []
            z, total, first = new, total + integral, found[-1]
            passed = length if last else passed + h
            stats.accepted += 1
            shares.append(passed / length)
        else:
            stats.rejected += 1
        factor = 0.9 * max(error, 1e-10) ** (-1 / tableau.order) if math.isfinite(error) else 0.0
        h *= min(max(factor, 0.2), 10.0 if may_grow else 1.0)
        may_grow = error <= 1  # not at once after a rejection
    stats.times = tuple(shares) if sign > 0 else tuple(1 - share for share in reversed(shares))
    if concrete(z) and not finite(z, total):
        raise not_finite(end, stats.accepted, z)
    return z, total, path


def finite(*tensors: Tensor) -> bool:
    """Whether all numbers of all tensors are."""
    return all(bool(_finite(tensor)) for tensor in tensors)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().all()


def not_finite(t: float, step: int, z: Tensor) -> SolveError:
    """The error of a solve that has met an infinity or a NaN."""
    remedy = "try more steps, standardised data, a smaller learning rate, or penalties on the path"
    return SolveError("the field or the state stopped being finite", t, step, largest(z), remedy)


def largest(z: Tensor) -> float:
    """The largest absolute number of a state."""
    return _largest(z).item()


def _largest(z: Tensor) -> Tensor:
    return z.detach().abs().amax()


def _scaled(parts: list[tuple[Tensor, Tensor]], tolerance: float) -> float:
    """The root mean square of numbers over ``tolerance * (1 + size)``."""
    ratios = [(part / (tolerance * (1 + size))).flatten() for part, size in parts if part.numel()]
    return torch.cat(ratios).square().mean().sqrt().item()


def _error(errors, z, new, total, integral, tolerance, controlled) -> float:
    velocity, rate = errors
    size = total[:controlled].abs().maximum((total + integral)[:controlled].abs())
    parts = [(velocity, z.abs().maximum(new.abs())), (rate[:controlled], size)]
    if rate.dim() == 1:  # the gradients that an adjoint gathers: in one mean they would drown the points
        return max(_scaled([part], tolerance) for part in parts if part[0].numel())
    return _scaled(parts, tolerance)


@torch.no_grad()
def _first_step(dynamics, start, way, z, first, order, tolerance, controlled) -> float:
    """A step that is safe to begin with; Hairer, Nørsett and Wanner, section II.4, algorithm 4.14."""
    v, rates = first[0], first[1][:controlled]
    zero = torch.zeros_like(rates)
    d0 = _scaled([(z, z.abs()), (zero, zero)], tolerance)
    d1 = _scaled([(v, z.abs()), (rates, zero)], tolerance)
    sign, length = math.copysign(1.0, way), abs(way)
    h0 = min(0.01 * d0 / d1 if d0 >= 1e-5 and 1e-5 <= d1 < math.inf else 1e-6, length)
    v1, rates1 = dynamics.at([start + sign * h0], z)[0](z + sign * h0 * v)
    d2 = _scaled([(v1 - v, z.abs()), (rates1[:controlled] - rates, zero)], tolerance) / h0
    largest_change = max(d1, d2)
    if not math.isfinite(largest_change):
        return h0
    h1 = max(1e-6, h0 * 1e-3) if largest_change <= 1e-15 else (0.01 / largest_change) ** (1 / order)
    return min(100 * h0, h1)
