"""Base distributions: where the latent lives."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from cnfkit.bijections.base import as_shape, check_points, sum_event


class Base(nn.Module, ABC):
    """A distribution with a density that is known and samples that are easy.

    Args:
        event_shape: the shape of one point.
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
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator is a {type(generator).__name__}; wanted a torch.Generator")
        device = generator.device if generator else self.like.device
        return self._sample(as_batch(n), generator, dtype=self.like.dtype, device=device).to(self.like.device)

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

    >>> Uniform(3).log_prob(torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 1.5]]))
    tensor([0., -inf])
    """

    def _log_prob(self, z):
        inside = (z >= 0) & (z <= 1)  # NaN is not
        return sum_event(torch.zeros_like(z).masked_fill(~inside, -math.inf), self.event_shape)

    def _sample(self, batch, generator, **options):
        return torch.rand(batch + self.event_shape, generator=generator, **options)


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
