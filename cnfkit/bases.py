"""Base distributions: where the latent lives."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cnfkit.arguments import as_shape, check_broadcast, check_parameter, check_points, check_positive
from cnfkit.bijections.base import sum_event
from cnfkit.noise import check_generator, draw


class Base(nn.Module, ABC):
    """A distribution with a density that is known and samples that are easy.

    A new one writes ``_log_prob`` and ``_sample``.

    Args:
        event_shape: the shape of one point.

    Raises:
        ValueError: if the shape is none; on a call, if the points or the number of samples have not the right one.
        TypeError: on a call, if the points are no floating-point tensor, or not of the module's dtype or device.
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = as_shape("event_shape", event_shape)
        # knows the dtype and device that samples are drawn with; moves with .to(), is not saved
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density of points, shape ``(*batch, *event_shape)`` to ``(*batch)``."""
        check_points(type(self).__name__, "z", z, self.event_shape, self.like)
        return self._log_prob(z)

    def sample(self, n: int | Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Independent points, shape ``(*n, *event_shape)``.

        They are drawn on the generator's device and moved to the module's, so that a CPU generator gives the same
        points everywhere.

        Raises:
            TypeError: if ``generator`` is no ``torch.Generator``.
            ValueError: if ``n`` is no number of points and no shape.
        """
        check_generator(generator)
        batch, options = as_batch(n), {"dtype": self.like.dtype, "device": self.like.device}
        return draw(self._sample, batch, generator, **options).to(self.like.device)

    @abstractmethod
    def _log_prob(self, z: Tensor) -> Tensor: ...

    @abstractmethod
    def _sample(self, batch: torch.Size, generator: torch.Generator | None, **options) -> Tensor: ...

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}"


class Normal(Base):
    r"""The standard normal distribution.

    .. math:: \log p(z) = -\tfrac12 \|z\|^2 - \tfrac{d}{2} \log 2\pi

    Args:
        event_shape: the shape of one point.

    Raises:
        ValueError: if the shape is none.

    >>> Normal(2).log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    def _log_prob(self, z):
        return sum_event(-0.5 * (z.square() + math.log(2 * math.pi)), self.event_shape)

    def _sample(self, batch, generator, **options):
        return torch.randn(batch + self.event_shape, generator=generator, **options)


class Uniform(Base):
    r"""The uniform distribution on the unit cube.

    .. math:: p(z) = 1 \text{ on } [0, 1]^d, \text{ else } 0

    Args:
        event_shape: the shape of one point.

    Raises:
        ValueError: if the shape is none.

    >>> Uniform(3).log_prob(torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 1.5]]))
    tensor([0., -inf])
    """

    def _log_prob(self, z):
        inside = (z >= 0) & (z <= 1)  # NaN is not
        return sum_event(torch.zeros_like(z).masked_fill(~inside, -math.inf), self.event_shape)

    def _sample(self, batch, generator, **options):
        return torch.rand(batch + self.event_shape, generator=generator, **options)


class Beta(Base):
    r"""Independent Beta distributions on the unit cube.

    .. math:: p(z) = \prod_i \frac{z_i^{\alpha - 1} (1 - z_i)^{\beta - 1}}{B(\alpha, \beta)}

    Args:
        event_shape: the shape of one point.
        alpha: :math:`\alpha`, positive.
        beta: :math:`\beta`, positive.

    Raises:
        ValueError: if ``alpha`` or ``beta`` is not positive.

    >>> Beta(1, 5.0, 5.0).log_prob(torch.tensor([[0.5], [1.5]])).exp()
    tensor([2.4609, 0.0000])
    """

    def __init__(self, event_shape: int | Sequence[int], alpha: float, beta: float) -> None:
        super().__init__(event_shape)
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_positive(name, value)
        self.alpha, self.beta = float(alpha), float(beta)

    def _log_prob(self, z):
        a, b = self.alpha, self.beta
        log_normaliser = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
        inside, z = (z >= 0) & (z <= 1), z.clamp(0, 1)
        log_prob = torch.full_like(z, -log_normaliser)
        for exponent, log in ((a - 1, torch.log), (b - 1, lambda z: torch.log1p(-z))):
            if exponent:  # at the edges 0 · log 0 has a value, but no derivative
                log_prob = log_prob + exponent * log(z)
        return sum_event(log_prob.where(inside, -math.inf), self.event_shape)

    def _sample(self, batch, generator, **options):
        shape = batch + self.event_shape
        # x / (x + y) of two Gamma variates, from their logarithms: with small alpha they are less than numbers can be
        x, y = (
            torch._standard_gamma(torch.full(shape, value + 1, **options), generator=generator).log()
            + torch.rand(shape, generator=generator, **options).log() / value
            for value in (self.alpha, self.beta)
        )
        limits = torch.finfo(x.dtype)  # off the edges, where the density may be infinite
        return torch.sigmoid(x - y).clamp(limits.tiny, 1 - limits.eps / 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, beta={self.beta}"


class NormalMixture(Base):
    r"""A mixture of normal distributions with independent coordinates.

    .. math:: p(z) = \sum_{k=1}^K \pi_k \prod_i \mathcal{N}(z_i; \mu_{ki}, \sigma_{ki}^2)

    It is fixed: which component a sample comes from could not be differentiated in the weights.

    Args:
        means: :math:`\mu`, shape ``(K, *event_shape)``.
        stds: :math:`\sigma`, a positive number, or a tensor that broadcasts to the shape of ``means``.
        weights: :math:`\pi`, shape ``(K,)``, positive; divided by their sum. Equal unless given.

    Raises:
        TypeError: if a tensor is not of floating point.
        ValueError: if a shape is wrong, or a number is not positive or finite.

    >>> NormalMixture(torch.tensor([[-3.0], [3.0]])).log_prob(torch.zeros(1)).exp()
    tensor(0.0044)
    """

    def __init__(self, means: Tensor, stds: float | Tensor = 1.0, weights: Tensor | None = None) -> None:
        check_parameter("means", means)
        if means.dim() < 2 or not len(means):
            raise ValueError(f"means has shape {tuple(means.shape)}; wanted (K, *event_shape)")
        if not means.isfinite().all():
            raise ValueError("means holds NaN or infinite entries")
        super().__init__(means.shape[1:])
        stds = means.new_tensor(stds) if isinstance(stds, int | float) else stds
        weights = means.new_ones(len(means)) if weights is None else weights
        for name, value, shape in (("stds", stds, means.shape), ("weights", weights, means.shape[:1])):
            check_broadcast(name, value, shape)
            check_points("NormalMixture", name, value, value.shape, means)
            if not ((value > 0) & value.isfinite()).all():
                raise ValueError(f"{name} holds {value.min().item():g}; wanted positive numbers")
        weights = weights.expand(len(means))
        self.like = means.new_zeros(())
        self.register_buffer("means", means.detach().clone())
        self.register_buffer("stds", stds.detach().expand(means.shape).clone())
        self.register_buffer("log_weights", (weights / weights.sum()).log().detach())

    def _log_prob(self, z):
        u = (z.unsqueeze(-1 - len(self.event_shape)) - self.means) / self.stds
        log_prob = -0.5 * (u.square() + math.log(2 * math.pi)) - self.stds.log()
        return torch.logsumexp(self.log_weights + sum_event(log_prob, self.event_shape), -1)

    def _sample(self, batch, generator, **options):
        # the component by its share of the unit interval: the same on every device, unlike torch.multinomial
        uniform = torch.rand(batch, generator=generator, **options)
        shares = self.log_weights.to(**options).exp().cumsum(-1)
        k = (uniform.unsqueeze(-1) > shares[:-1]).sum(-1)
        noise = torch.randn(batch + self.event_shape, generator=generator, **options)
        return self.means.to(**options)[k] + self.stds.to(**options)[k] * noise

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, components={len(self.means)}"


def as_batch(n: int | Sequence[int]) -> torch.Size:
    """``n`` as a batch shape: a number of points, or a shape; or a ``ValueError``."""
    sizes = n if isinstance(n, Iterable) and not isinstance(n, (str, Tensor)) else (n,)
    try:
        batch = torch.Size(operator.index(size) for size in sizes)
    except TypeError:
        batch = (-1,)
    if isinstance(n, bool) or any(size < 0 for size in batch):
        raise ValueError(f"n is {n!r}; wanted a number of points, or a batch shape such as (3, 5)")
    return batch
