"""Toy densities: in two dimensions, they look like nothing in particular and are known exactly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from cnfkit.arguments import check_points
from cnfkit.noise import check_generator


class ToyDensity(ABC):
    """A density on the plane with exact log-density, to train on and to measure against."""

    def log_prob(self, x: Tensor) -> Tensor:
        """The exact log-density of points, shape ``(*batch, 2)`` to ``(*batch)``.

        Raises:
            TypeError, ValueError: if ``x`` is no floating-point tensor of that shape.
        """
        check_points(type(self).__name__, "x", x, torch.Size([2]), None)
        return self._log_prob(x)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent points, shape ``(n, 2)``.

        Raises:
            ValueError: if ``n`` is no number of points.
            TypeError: if ``generator`` is none.
        """
        if isinstance(n, bool) or not isinstance(n, Integral) or n < 0:
            raise ValueError(f"n is {n!r}; wanted a number of points")
        check_generator(generator)
        return self._sample(n, generator)

    @abstractmethod
    def entropy(self) -> float:
        r"""The entropy in nats, to about 1e-7: the NLL that no model can beat on average.

        .. math:: H = -\int p(x) \log p(x) \, dx
        """

    @abstractmethod
    def _log_prob(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor: ...


class GaussianRing(ToyDensity):
    r"""Equal normal distributions on a circle.

    .. math:: p(x) = \frac1K \sum_{k=1}^K \mathcal{N}(x;\, r\, (\cos\phi_k, \sin\phi_k),\, \sigma^2 I),
              \quad \phi_k = 2\pi k / K
    """

    def __init__(self, components: int = 8, radius: float = 8**0.5, sigma: float = 0.125**0.5) -> None:
        angle = 2 * math.pi * torch.arange(components) / components
        self.centres = radius * torch.stack([angle.cos(), angle.sin()], -1)
        self.sigma = sigma

    def entropy(self):
        return _entropy(self._log_prob, self.centres, 6 * self.sigma, self.sigma)

    def _log_prob(self, x):
        return _mixture_log_prob(x, self.centres, self.sigma)

    def _sample(self, n, generator):
        which = torch.randint(len(self.centres), (n,), generator=generator)
        return self.centres[which] + self.sigma * torch.randn(n, 2, generator=generator)


class TwoMoons(ToyDensity):
    r"""Two half circles that reach into each other, blurred.

    .. math:: p(x) = \frac12 \sum_{j=1}^2 \frac1\pi \int_0^\pi \mathcal{N}(x;\, c_j(\phi),\, \sigma^2 I) \, d\phi

    with :math:`c_1 = (\cos\phi - \tfrac12, \sin\phi - \tfrac14)` and :math:`c_2 = -c_1`. The integral is taken by
    Gauss and Legendre's rule with 128 nodes, exact to rounding at this :math:`\sigma`.
    """

    def __init__(self, sigma: float = 0.1) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(128)
        angle = torch.from_numpy((nodes + 1) * math.pi / 2)
        self.centres = torch.cat([self._arc(angle), -self._arc(angle)]).float()
        self.weights = torch.from_numpy(weights).repeat(2).float() / 4
        self.sigma = sigma

    @staticmethod
    def _arc(angle: Tensor) -> Tensor:
        return torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)

    def entropy(self):
        return _entropy(self._log_prob, self.centres, 6 * self.sigma, self.sigma)

    def _log_prob(self, x):
        return _mixture_log_prob(x, self.centres, self.sigma, self.weights)

    def _sample(self, n, generator):
        arc = self._arc(math.pi * torch.rand(n, generator=generator))
        side = torch.randint(2, (n, 1), generator=generator) * 2 - 1
        return side * arc + self.sigma * torch.randn(n, 2, generator=generator)


class Checkerboard(ToyDensity):
    r"""The dark squares of a board of 4 × 4 on :math:`[-2, 2]^2`.

    .. math:: p(x) = \tfrac18 \text{ if } \lfloor x_1 \rfloor + \lfloor x_2 \rfloor \text{ is even, else } 0
    """

    def entropy(self):
        return math.log(8)

    def _log_prob(self, x):
        dark = (x.floor().sum(-1) % 2 == 0) & (x >= -2).all(-1) & (x < 2).all(-1)
        return torch.full_like(x[..., 0], -math.log(8)).masked_fill(~dark, -math.inf)

    def _sample(self, n, generator):
        row = torch.randint(-2, 2, (n,), generator=generator)
        column = 2 * torch.randint(-1, 1, (n,), generator=generator) + row % 2
        return torch.stack([row, column], -1) + torch.rand(n, 2, generator=generator)


class Pinwheel(ToyDensity):
    r"""Arms of normal distributions, twisted by an angle that grows with the distance from the centre.

    .. math::

        x = R(\omega \|y\|)\, y,

        y \sim \frac1K \sum_k \mathcal{N}(r\, u_k,\, U_k \Sigma U_k^\top)

    The twist has determinant 1, so :math:`p(x)` is the mixture's density at :math:`y`, and the entropy the mixture's.
    """

    def __init__(
        self, arms: int = 5, radius: float = 2.0, along: float = 0.6, across: float = 0.15, twist: float = 0.6
    ):
        angle = 2 * math.pi * torch.arange(arms) / arms
        self.axes = _rotation(angle)  # the columns point along and across each arm
        self.scales = torch.tensor([along, across])
        self.radius, self.twist = radius, twist

    def _turn(self, x: Tensor, sign: int) -> Tensor:
        turned = _rotation(sign * self.twist * x.norm(dim=-1)) @ x.unsqueeze(-1)
        return turned.squeeze(-1)

    def entropy(self):
        centres = self.radius * self.axes[..., 0]
        return _entropy(self._untwisted_log_prob, centres, 6 * self.scales.max().item(), self.scales.min().item())

    def _log_prob(self, x):
        return self._untwisted_log_prob(self._turn(x, -1))

    def _untwisted_log_prob(self, y: Tensor) -> Tensor:
        local = torch.einsum("kij,...i->...kj", self.axes.to(y), y) - torch.tensor([self.radius, 0.0]).to(y)
        z = local / self.scales.to(y)
        each = -0.5 * z.square().sum(-1) - math.log(2 * math.pi) - self.scales.log().sum().to(y)
        return each.logsumexp(-1) - math.log(len(self.axes))

    def _sample(self, n, generator):
        which = torch.randint(len(self.axes), (n,), generator=generator)
        local = torch.tensor([self.radius, 0.0]) + self.scales * torch.randn(n, 2, generator=generator)
        return self._turn((self.axes[which] @ local.unsqueeze(-1)).squeeze(-1), +1)


DENSITIES = {
    "two_moons": TwoMoons,
    "eight_gaussians": GaussianRing,
    "pinwheel": Pinwheel,
    "checkerboard": Checkerboard,
}


def toy_density(name: str) -> ToyDensity:
    """A density on the plane by name.

    Args:
        name: ``"two_moons"``, ``"eight_gaussians"``, ``"pinwheel"`` or ``"checkerboard"``.

    Raises:
        ValueError: if the name is unknown.

    >>> moons = toy_density("two_moons")
    >>> x = moons.sample(5, torch.Generator().manual_seed(0))
    >>> x.shape, moons.log_prob(x).shape
    (torch.Size([5, 2]), torch.Size([5]))
    """
    if name not in DENSITIES:
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(DENSITIES)}")
    return DENSITIES[name]()


def _mixture_log_prob(x: Tensor, centres: Tensor, sigma: float, weights: Tensor | None = None) -> Tensor:
    squares = (x.unsqueeze(-2) - centres.to(x)).square().sum(-1)
    log_weights = -math.log(len(centres)) if weights is None else weights.to(x).log()
    return (log_weights - squares / (2 * sigma**2)).logsumexp(-1) - math.log(2 * math.pi * sigma**2)


def _entropy(log_prob: Callable[[Tensor], Tensor], centres: Tensor, margin: float, width: float) -> float:
    """That of normal distributions at the centres, by the trapezoidal rule.

    Its error falls exponentially in the narrowest width over the step; six standard deviations hold all but 1e-8.
    """
    step = width / 1.5
    low, high = (centres.amin(0) - margin).tolist(), (centres.amax(0) + margin).tolist()
    lines = [torch.arange(a, b + step, step, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    return torch.special.entr(log_prob(torch.cartesian_prod(*lines)).exp()).sum().item() * step**2


def _rotation(angle: Tensor) -> Tensor:
    """Matrices that turn the plane counterclockwise, shape ``(*batch)`` to ``(*batch, 2, 2)``."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
