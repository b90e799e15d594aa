"""How to solve an ODE: one frozen object, made by the caller and passed down to every map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

TRACES = ("exact", "hutchinson")
GRADIENTS = ("backprop", "checkpoint", "adjoint")


@dataclass(frozen=True)
class Solve:
    """The options of an ODE solve, chosen at the call; finite flows ignore them.

    Attributes:
        trace: how the divergence of the field is found, ``"exact"`` or ``"hutchinson"``.
        probes: the number of Hutchinson probes.
        generator: where the probes come from; one draw a solve.
        method: the name of the solver.
        times: the step times of a fixed grid, increasing; then ``tolerance`` is not given.
        tolerance: the error tolerance of an adaptive solver; then ``times`` is not given.
        gradient: how the solve is differentiated, ``"backprop"``, ``"checkpoint"`` or ``"adjoint"``.
        max_steps: a bound on the number of steps.

    Raises:
        ValueError: if a value is outside its range, an unknown name is given, or both ``times`` and ``tolerance`` are.
        TypeError: if ``generator`` is no ``torch.Generator``.

    >>> Solve(trace="hutchinson", probes=4, tolerance=1e-5).probes
    4
    """

    trace: str = "exact"
    probes: int = 1
    generator: torch.Generator | None = None
    method: str = "dopri5"
    times: tuple[float, ...] | None = None
    tolerance: float | None = None
    gradient: str = "backprop"
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        for name, value, known in (("trace", self.trace, TRACES), ("gradient", self.gradient, GRADIENTS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(known)}")
        for name, value in (("probes", self.probes), ("max_steps", self.max_steps)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; wanted a whole number of at least 1")
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator is a {type(self.generator).__name__}; wanted a torch.Generator")
        if self.times is not None:
            if self.tolerance is not None:
                raise ValueError("times and tolerance are both given; a grid is fixed, or chosen by a tolerance")
            grid = self.times if isinstance(self.times, Sequence) else ()
            if len(grid) < 2 or not all(a < b < math.inf for a, b in pairwise(grid)):
                raise ValueError(f"times is {self.times!r}; wanted at least two increasing numbers")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance!r}; wanted a positive number")
