"""How to solve an ODE: one frozen object, made by the caller and passed down to every map."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Generator, Tensor

from cnfkit.arguments import as_count
from cnfkit.noise import check_generator
from cnfkit.ode.tableaux import TABLEAUX

TRACES = ("exact", "hutchinson", "none")
NOISES = ("rademacher", "gaussian")
GRADIENTS = ("backprop", "checkpoint", "adjoint")
PRECISIONS = ("full", "bfloat16")
ENERGIES = ("kinetic_energy", "jacobian_energy", "total_derivative", "hamilton_jacobi")
TORCHDIFFEQ_FIXED = ("euler", "midpoint", "heun3", "rk4")  # those of Adams are wrong on unequal steps
TORCHDIFFEQ_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")


@dataclass(frozen=True)
class Solve:
    r"""The options of an ODE solve, chosen at the call.

    Of the finite flows :class:`cnfkit.Residual` reads how its log-determinant is found; the others ignore all.

    A solver either takes the steps of a fixed grid, ``times``, or chooses its own so that the error that it estimates
    for each of them, in the root mean square over all numbers of the batch, stays below
    :math:`\text{tolerance} \cdot (1 + |z|)`.

    Attributes:
        trace: how the divergence of the field is found: ``"exact"``; ``"hutchinson"``, an unbiased estimate; ``"none"``
            for points alone (the log-determinant is then NaN).
        probes: the number of Hutchinson probes, one unless given; they are drawn once a solve. With several, the spread
            of their estimates gives the standard error in a :class:`cnfkit.Result`. With the exact trace they estimate
            the Jacobian energy, which is exact otherwise.
        noise: their distribution, ``"rademacher"`` or ``"gaussian"``.
        generator: where the probes come from.
        method: ``"euler"``, ``"midpoint"``, ``"rk4"``, ``"rk4_38"`` (the 3/8 rule), ``"rk6"`` (Butcher's of order 6),
            ``"dopri5"``, or ``"torchdiffeq:NAME"`` for a solver of torchdiffeq.
        times: the step times of a fixed grid, as shares of the whole interval: increasing from 0 to 1.
        tolerance: the error tolerance of an adaptive solver; 1e-5 unless ``times`` or ``tolerance`` is given.
        control_logdet: whether the log-determinant counts among the numbers; unless given, it does when the trace is
            exact, and does not with Hutchinson, where the steps would depend on the noise.
        gradient: how the solve is differentiated: ``"backprop"``, which on a grid leaves its memory to the next solve
            of the same :class:`cnfkit.MLPField`; ``"checkpoint"``, the same with one state a step in
            memory, for a second evaluation of a field that must be deterministic; ``"adjoint"``, by a second solve
            backwards, our own or torchdiffeq's with its solvers. The last two differentiate once, with respect to the
            points, the context and the field's parameters, and nothing else that the field may hold.
        energies: which energies of the path to integrate, of ``"kinetic_energy"``, ``"jacobian_energy"``,
            ``"total_derivative"`` and ``"hamilton_jacobi"``, see :class:`cnfkit.CNF`.
        reduction: ``"sum"`` over the dimensions in the energies, or their ``"mean"``.
        precision: ``"full"``, that of the points; or ``"bfloat16"`` for the convolutions of a :class:`cnfkit.ConvField`
            on a grid, which halves what they move through memory; states, divergences and energies stay in full.
        max_steps: a bound on the number of steps.

    Raises:
        ValueError: if a value is outside its range, an unknown name is given, or two options contradict each other.
        TypeError: if ``generator`` is no ``torch.Generator``.

    >>> Solve(trace="hutchinson", probes=4).tolerance
    1e-05
    >>> Solve(method="rk4", times=[0, 0.5, 1]).times
    (0.0, 0.5, 1.0)
    """

    trace: str = "exact"
    probes: int | None = None
    noise: str = "rademacher"
    generator: Generator | None = field(default=None, repr=False)  # its repr is an address
    method: str = "dopri5"
    times: tuple[float, ...] | None = None
    tolerance: float | None = None
    control_logdet: bool | None = None
    gradient: str = "backprop"
    energies: tuple[str, ...] = ()
    reduction: str = "sum"
    precision: str = "full"
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        _require_known("trace", self.trace, TRACES)
        _require_known("noise", self.noise, NOISES)
        _require_known("gradient", self.gradient, GRADIENTS)
        _require_known("reduction", self.reduction, ("sum", "mean"))
        _require_known("precision", self.precision, PRECISIONS)
        object.__setattr__(self, "max_steps", as_count("max_steps", self.max_steps))
        if self.probes is not None:
            object.__setattr__(self, "probes", as_count("probes", self.probes))
        check_generator(self.generator)
        if isinstance(self.energies, str):
            raise ValueError(f"energies is {self.energies!r}; wanted a tuple of names, such as ({self.energies!r},)")
        if not isinstance(self.energies, Iterable):
            raise TypeError(f"energies is {self.energies!r}; wanted a tuple of names")
        object.__setattr__(self, "energies", tuple(self.energies))
        for name in self.energies:
            _require_known("energies", name, ENERGIES)
        if self.trace == "none" and "jacobian_energy" in self.energies:
            raise ValueError("trace is 'none', but jacobian_energy needs the field's derivatives; choose another trace")
        self._settle_steps()

    def within(self, tolerance: float) -> Solve:
        """The same options with steps that Dormand–Prince chooses, so that all numbers stay within a tolerance.

        For judging: the log-determinant is controlled with Hutchinson too.
        """
        steps = {"method": "dopri5", "times": None, "tolerance": tolerance, "max_steps": max(self.max_steps, 10_000)}
        return replace(self, **steps, control_logdet=True, gradient="backprop", precision="full")

    def on(self, times: Iterable[float], method: str = "rk4") -> Solve:
        """The same options on a fixed grid.

        >>> Solve(trace="hutchinson").on([0, 0.5, 1]).times
        (0.0, 0.5, 1.0)
        """
        return replace(self, method=method, times=times, tolerance=None)

    def _settle_steps(self) -> None:
        """The grid as plain numbers, the default tolerance in place, and both in keeping with the method."""
        known = [*TABLEAUX, *(f"torchdiffeq:{name}" for name in TORCHDIFFEQ_FIXED + TORCHDIFFEQ_ADAPTIVE)]
        _require_known("method", self.method, known)
        foreign = self.method.startswith("torchdiffeq:")
        if self.gradient == "checkpoint" and foreign:
            raise ValueError("gradient is 'checkpoint', which torchdiffeq does not have; wanted backprop or adjoint")
        adaptive = adapts(self.method)
        if self.times is not None:
            if self.tolerance is not None:
                raise ValueError("times and tolerance are both given; a grid is fixed, or chosen by a tolerance")
            if foreign and adaptive:
                raise ValueError(f"times are given, but {self.method} chooses its own steps; give a tolerance")
            try:
                times = tuple(float(t) for t in self.times)
            except (TypeError, ValueError):
                times = ()
            rising = all(a < b for a, b in pairwise(times))
            if len(times) < 2 or not rising or abs(times[0]) > 1e-6 or abs(times[-1] - 1) > 1e-6:
                came = tuple(self.times.tolist()) if isinstance(self.times, Tensor) else self.times
                raise ValueError(f"times is {came!r}; wanted increasing numbers from 0 to 1, or uniform_grid(steps)")
            if len(times) - 1 > self.max_steps:
                raise ValueError(f"times has {len(times) - 1} steps, max_steps is {self.max_steps}")
            object.__setattr__(self, "times", (0.0, *times[1:-1], 1.0))
        elif not adaptive:
            raise ValueError(f"method {self.method!r} takes fixed steps; give their times, such as uniform_grid(8)")
        elif self.precision != "full":
            raise ValueError(
                f"precision is {self.precision!r}, which adaptive steps would take for an error; give times"
            )
        elif self.tolerance is None:
            object.__setattr__(self, "tolerance", 1e-5)
        else:
            try:
                tolerance = math.nan if isinstance(self.tolerance, str) else float(self.tolerance)
            except (TypeError, ValueError):
                tolerance = math.nan
            if not 0 < tolerance < math.inf:
                raise ValueError(f"tolerance is {self.tolerance!r}; wanted a positive number")
            object.__setattr__(self, "tolerance", tolerance)


def as_solve(solve: Solve | None) -> Solve:
    """The options, or the usual ones if there are none."""
    if solve is not None and not isinstance(solve, Solve):
        raise TypeError(f"solve is a {type(solve).__name__}; wanted a cnfkit.Solve")
    return solve or Solve()


def adapts(method: str) -> bool:
    """Whether a method can choose its own steps."""
    if method.startswith("torchdiffeq:"):
        return method.removeprefix("torchdiffeq:") in TORCHDIFFEQ_ADAPTIVE
    return TABLEAUX[method].error is not None


def _require_known(name: str, value: str, known) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(known)}")
