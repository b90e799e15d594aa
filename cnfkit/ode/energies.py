"""Energies: what is integrated along a path, beside the divergence, to know how hard the path is or to penalise it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cnfkit.ode.divergence import squared_norm
from cnfkit.ode.moments import Moment


@dataclass(frozen=True)
class Visit:
    """What is known where a path is at one time.

    Attributes:
        moment: the field at that time.
        z: the state, shape ``(n, *event)``.
        v: the velocity, shape ``(n, *event)``.
        products: of the Jacobian with probes, shape ``(k, n, *event)``, if they were computed.
        probes: those probes; None for the unit vectors.
    """

    moment: Moment
    z: Tensor
    v: Tensor
    products: Tensor | None
    probes: Tensor | None


def _square(v: Tensor) -> Tensor:
    return v.square().flatten(1).sum(-1)


def _hamilton_jacobi(at: Visit) -> Tensor:
    # with the potential's sign, v = −∇Φ, the equation of the optimal potential is ∂Φ/∂t = ½ |∇Φ|²
    return (at.moment.time_derivative_of_potential(at.z) - 0.5 * _square(at.v)).abs()


def _kinetic_pulled(at: Visit, g: Tensor, g_v: Tensor, g_products: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return torch.addcmul(g_v, g[:, None], at.v), g_products


def _jacobian_pulled(at: Visit, g: Tensor, g_v: Tensor, g_products: Tensor) -> tuple[Tensor, Tensor]:
    factor = 2 if at.probes is None else 2 / len(at.probes)
    return g_v, torch.addcmul(g_products, g[:, None], at.products, value=factor)


RATES: dict[str, Callable[[Visit], Tensor]] = {
    "kinetic_energy": lambda at: 0.5 * _square(at.v),
    "jacobian_energy": lambda at: squared_norm(at.products, at.probes),
    "total_derivative": lambda at: _square(at.moment.total_derivative(at.z, at.v)),
    "hamilton_jacobi": _hamilton_jacobi,
}

# With the gradient in an energy of RNODE, shape (n,): what comes to those in the velocity and the products.
PULLED: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "kinetic_energy": _kinetic_pulled,
    "jacobian_energy": _jacobian_pulled,
}
