"""Runge–Kutta methods as tables of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tableau:
    r"""An explicit Runge–Kutta method, by its Butcher tableau.

    .. math:: k_i = v\Bigl(t + c_i h,\; z + h \sum_{j<i} a_{ij} k_j\Bigr), \qquad z' = z + h \sum_i b_i k_i

    Attributes:
        a: the rows :math:`a_{i\cdot}` from the second stage on.
        b: the weights of the step.
        c: the times of the stages, from the second on.
        order: the order of convergence.
        error: the weights of the step minus those of an embedded method, if there is one. The last stage is then taken
            at the end of the step and has weight 0 in it: it is the first stage of the next.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    error: tuple[float, ...] | None = None


_R = math.sqrt(5)

TABLEAUX = {
    "euler": Tableau(a=(), b=(1.0,), c=(), order=1),
    "midpoint": Tableau(a=((1 / 2,),), b=(0.0, 1.0), c=(1 / 2,), order=2),
    # Kutta 1901: the classic rule, and the 3/8 rule (the "rk4" of torchdiffeq)
    "rk4": Tableau(
        a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(1 / 2, 1 / 2, 1.0),
        order=4,
    ),
    "rk4_38": Tableau(
        a=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
        c=(1 / 3, 2 / 3, 1.0),
        order=4,
    ),
    # Butcher, "On Runge-Kutta processes of high order", 1964: order 6 in seven stages, at the nodes of Lobatto's
    # quadrature. Three stages have no weight in the step: rates, such as a divergence, are needed at four alone.
    "rk6": Tableau(
        a=(
            ((5 - _R) / 10,),
            (-_R / 10, (5 + 2 * _R) / 10),
            ((-15 + 7 * _R) / 20, (-1 + _R) / 4, (15 - 7 * _R) / 10),
            ((5 - _R) / 60, 0.0, 1 / 6, (15 + 7 * _R) / 60),
            ((5 + _R) / 60, 0.0, (9 - 5 * _R) / 12, 1 / 6, (-5 + 3 * _R) / 10),
            (1 / 6, 0.0, (-55 + 25 * _R) / 12, (-25 - 7 * _R) / 12, 5 - 2 * _R, (5 + _R) / 2),
        ),
        b=(1 / 12, 0.0, 0.0, 0.0, 5 / 12, 5 / 12, 1 / 12),
        c=((5 - _R) / 10, (5 + _R) / 10, (5 - _R) / 10, (5 + _R) / 10, (5 - _R) / 10, 1.0),
        order=6,
    ),
    # Dormand and Prince, "A family of embedded Runge-Kutta formulae", 1980, table 2
    "dopri5": Tableau(
        a=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        c=(1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        order=5,
        error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    ),
}
