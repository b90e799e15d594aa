r"""The divergence of a field, exact or estimated, from products with its Jacobian."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cnfkit.noise import draw
from cnfkit.ode.solve import Solve


def draw_probes(solve: Solve, z: Tensor) -> Tensor | None:
    r"""The probes of one solve, shape ``(k, n, *event)``: numbers of mean 0 and variance 1; None where
    nothing is estimated.

    They are drawn in float32 on the generator's device, so that a CPU generator gives the same everywhere, and a
    float64 copy of a model sees the same probes.
    """
    estimated = solve.trace == "hutchinson" or (solve.probes is not None and "jacobian_energy" in solve.energies)
    if solve.trace == "none" or not estimated:
        return None
    kind = torch.randn if solve.noise == "gaussian" else signs
    shape = (solve.probes or 1, *z.shape)
    return draw(kind, shape, solve.generator, points=1, dtype=torch.float32, device=z.device).to(z)


def signs(shape: tuple[int, ...], **options) -> Tensor:
    """Numbers 1 and -1, equally likely."""
    return torch.randint(0, 2, shape, **options).mul_(2).sub_(1)


def divergence(products: Tensor, probes: Tensor | None) -> Tensor:
    r"""The trace of the Jacobian from its products: shape ``(1, n)``, or an estimate by each probe, ``(k, n)``.

    .. math::

        \operatorname{tr} J = \sum_i e_i^\top J e_i = \mathbb{E}\, \varepsilon^\top J \varepsilon

    Source: Hutchinson, 1989; Grathwohl et al., *FFJORD*, equation 8.
    """
    if probes is None:
        return products.flatten(2).diagonal(dim1=0, dim2=2).sum(-1)[None]
    return (products * probes).flatten(2).sum(-1)


def divergence_pulled(g: Tensor, products: Tensor, probes: Tensor | None) -> Tensor:
    """The gradient in the products from that in the divergence, which is linear in them."""
    if probes is None:
        return torch.eye(len(products), dtype=g.dtype, device=g.device)[:, None] * g[0][:, None]
    return g[..., None] * probes


def average(estimates: Tensor, solve: Solve) -> tuple[Tensor, Tensor | None]:
    """The mean of what each probe estimates, ``(k, n)`` to ``(n,)``, and its standard error.

    That is NaN for one probe, whose error is not known, and None where nothing was estimated.
    """
    mean, k = estimates.mean(0), len(estimates)
    if solve.trace != "hutchinson":
        return mean, None
    if k == 1 or not mean.numel():
        return mean, torch.full_like(mean, math.nan, requires_grad=False)
    return mean, (estimates.detach().var(0) / k).sqrt()


def squared_norm(products: Tensor, probes: Tensor | None) -> Tensor:
    r"""The squared Frobenius norm of the Jacobian, shape ``(n,)``, from its products.

    .. math:: \|J\|_F^2 = \sum_i \|J e_i\|^2 = \mathbb{E} \|J \varepsilon\|^2

    Source: Finlay et al., *How to train your neural ODE*, section 3.2.
    """
    squares = products.square().flatten(2).sum(-1)
    return squares.sum(0) if probes is None else squares.mean(0)
