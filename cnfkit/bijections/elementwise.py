"""Elementwise maps: one increasing function, applied to each coordinate on its own."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from cnfkit.arguments import concrete
from cnfkit.bijections.base import Bijection, Result, sum_event


class Elementwise(Bijection):
    r"""A differentiable function :math:`g` with :math:`g' > 0`, applied to each coordinate.

    .. math:: z_i = g(x_i), \qquad \log|\det \partial z / \partial x| = \sum_i \log g'(x_i)

    A new one writes ``function``, ``inverse_function`` and ``log_derivative``.

    Args:
        event_shape: the shape of one point.

    Raises:
        ValueError: if the shape is none.
    """

    def __init__(self, event_shape) -> None:
        super().__init__(event_shape)

    @abstractmethod
    def function(self, x: Tensor) -> Tensor:
        """:math:`g(x)`."""

    @abstractmethod
    def inverse_function(self, z: Tensor) -> Tensor:
        """:math:`g^{-1}(z)`."""

    @abstractmethod
    def log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        """:math:`\\log g'(x)`, from whichever of ``x`` and ``z = g(x)`` is kinder to rounding."""

    def _forward(self, x, context, solve):
        z = self.function(x)
        return Result(z, sum_event(self.log_derivative(x, z), self.event_shape))

    def _inverse(self, z, context, solve):
        x = self.inverse_function(z)
        return Result(x, -sum_event(self.log_derivative(x, z), self.event_shape))


class Arcsinh(Elementwise):
    r"""The inverse hyperbolic sine: linear near zero, logarithmic far out, so it pulls in heavy tails.

    .. math:: z_i = \operatorname{arcsinh} x_i, \qquad g'(x) = (1 + x^2)^{-1/2}

    Args:
        event_shape: the shape of one point.

    Raises:
        ValueError: if the shape is none.

    >>> Arcsinh(1)(torch.tensor([[0.0]])).logdet
    tensor([0.])
    """

    function = staticmethod(torch.arcsinh)
    inverse_function = staticmethod(torch.sinh)

    def log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * torch.log1p(x.square())


class Logit(Elementwise):
    r"""The unit interval to the line, kept off its ends by :math:`\alpha`.

    .. math::

        z_i = \operatorname{logit} s_i, \quad s_i = \alpha + (1 - 2\alpha) x_i,

        \log g'(x) = \log(1 - 2\alpha) - \log s - \log(1 - s)

    Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, section 4.1, made symmetric as by
    Papamakarios, Pavlakou and Murray, *Masked autoregressive flow for density estimation*.

    Args:
        event_shape: the shape of one point.
        alpha: :math:`\alpha`, in ``[0, 0.5)``; 0 is the plain logit, for points strictly inside the interval. Where
            it is larger, the map reaches the whole line only from a little outside the interval, so that a sample may
            lie there too.

    Raises:
        ValueError: if ``alpha`` is out of range; on a call, if a point has :math:`s` outside :math:`(0, 1)`.

    >>> Logit(1, alpha=0.05)(torch.tensor([[0.5]])).value
    tensor([[0.]])
    """

    def __init__(self, event_shape, alpha: float = 0.0) -> None:
        super().__init__(event_shape)
        if not 0 <= alpha < 0.5:
            raise ValueError(f"alpha is {alpha!r}; wanted a number in [0, 0.5)")
        self.alpha = alpha

    def _forward(self, x, context, solve):
        s = self.alpha + (1 - 2 * self.alpha) * x
        inside = (s > 0) & (s < 1)
        if concrete(x) and not inside.all():
            margin = self.alpha / (1 - 2 * self.alpha)
            raise ValueError(
                f"Logit: {int((~inside).sum())} of {x.numel()} entries of x lie outside "
                f"({0 - margin:g}, {1 + margin:g}); scale the data first (images: cnfkit.Dequantised does)"
            )
        return super()._forward(x, context, solve)

    def function(self, x: Tensor) -> Tensor:
        return torch.logit(self.alpha + (1 - 2 * self.alpha) * x)

    def inverse_function(self, z: Tensor) -> Tensor:
        # far out the sigmoid rounds to 0 or 1, which no logit leads back from
        limits = torch.finfo(z.dtype)
        s = torch.sigmoid(z).clamp(limits.tiny, 1 - limits.eps / 2)
        return (s - self.alpha) / (1 - 2 * self.alpha)

    def log_derivative(self, x: Tensor, z: Tensor) -> Tensor:
        # −log s − log(1 − s) with s = sigmoid(z), without the cancellation in 1 − s
        return math.log(1 - 2 * self.alpha) + 2 * F.softplus(z) - z

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"
