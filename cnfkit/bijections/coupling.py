"""Coupling layers: one part of a point stays, and decides how the other part is changed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cnfkit.bijections.base import Bijection, Result, sum_event


class AffineCoupling(Bijection):
    r"""Scale and shift one part of the point by functions of the other part.

    .. math:: z = m \odot x + (1 - m) \odot \bigl( x \odot e^{s} + t \bigr), \quad (s, t) = \text{net}(m \odot x),
              \qquad \log|\det \partial z / \partial x| = \sum_{i : m_i = 0} s_i

    The log-scale is squashed, :math:`s = c \tanh(\tilde s / c)`, so that no step of training can blow it up.
    Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, equations 4, 5, 7 and 9.

    Args:
        mask: :math:`m`, a boolean tensor of shape ``event_shape`` (see :func:`cnfkit.mask`).
        net: any module that maps ``(*batch, *event_shape)`` to the same shape with the first event dimension doubled:
            :math:`\tilde s` and :math:`t`, one after the other.
        bound: :math:`c`, the largest :math:`|s|`.

    Raises:
        TypeError: if ``mask`` is not boolean.
        ValueError: if one part of the mask is empty; on a call, if the net's output has the wrong shape.

    >>> layer = AffineCoupling(mask("even", 2), MLP(2, 4))
    >>> x = torch.randn(5, 2)
    >>> torch.equal(layer(x).value[:, 0], x[:, 0])
    True
    """

    outputs = 2  # how many numbers per coordinate the net gives

    def __init__(self, mask: Tensor, net: nn.Module, bound: float = 2.0) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask is {getattr(mask, 'dtype', type(mask).__name__)}; wanted a boolean tensor")
        if mask.all() or not mask.any():
            raise ValueError("mask: one of its two parts is empty; a coupling layer needs both")
        if not 0 < bound < math.inf:
            raise ValueError(f"bound is {bound!r}; wanted a positive number")
        super().__init__(mask.shape)
        self.register_buffer("kept", mask.to(torch.get_default_dtype()))  # a product is cheaper than a choice
        self.net = net
        self.bound = bound

    @property
    def mask(self) -> Tensor:
        """:math:`m`, boolean, shape ``event_shape``."""
        return self.kept.bool()

    def scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The log-scale and shift that the kept part decides; both are zero on the kept part itself."""
        raw_scale, shift = self._ask_net(kept)
        changed = 1 - self.kept
        return self.bound * torch.tanh(raw_scale * (changed / self.bound)), shift * changed

    def _ask_net(self, kept: Tensor) -> tuple[Tensor, ...]:
        answer = self.net(kept).to(kept.dtype)  # under autocast the net answers in half precision
        channels, *rest = self.event_shape
        wanted = (*kept.shape[: -len(self.event_shape)], self.outputs * channels, *rest)
        if answer.shape != wanted:
            raise ValueError(f"{type(self).__name__}: net gave shape {tuple(answer.shape)}; wanted {wanted}")
        return answer.chunk(self.outputs, dim=-len(self.event_shape))

    def _forward(self, x, context, solve):
        scale, shift = self.scale_and_shift(x * self.kept)
        return Result(x * scale.exp() + shift, sum_event(scale, self.event_shape))

    def _inverse(self, z, context, solve):
        # the kept part of z is that of x, so the same scale and shift are at hand
        scale, shift = self.scale_and_shift(z * self.kept)
        return Result((z - shift) * (-scale).exp(), -sum_event(scale, self.event_shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bound={self.bound}"


class AdditiveCoupling(AffineCoupling):
    r"""Shift one part of the point by a function of the other part; volume is preserved.

    .. math:: z = m \odot x + (1 - m) \odot \bigl( x + t \bigr), \quad t = \text{net}(m \odot x),
              \qquad \log|\det \partial z / \partial x| = 0

    Source: Dinh, Krueger and Bengio, *NICE: Non-linear independent components estimation*, section 3.2.

    Args:
        mask: :math:`m`, a boolean tensor of shape ``event_shape``.
        net: any module that maps ``(*batch, *event_shape)`` to the same shape.

    Raises:
        TypeError, ValueError: as :class:`AffineCoupling`.

    >>> AdditiveCoupling(mask("even", 2), MLP(2, 2))(torch.randn(5, 2)).logdet
    tensor([0., 0., 0., 0., 0.])
    """

    outputs = 1

    def __init__(self, mask: Tensor, net: nn.Module) -> None:
        super().__init__(mask, net)

    def _forward(self, x, context, solve):
        (shift,) = self._ask_net(x * self.kept)
        return Result(x + shift * (1 - self.kept), x.new_zeros(x.shape[: -len(self.event_shape)]))

    def _inverse(self, z, context, solve):
        (shift,) = self._ask_net(z * self.kept)
        return Result(z - shift * (1 - self.kept), z.new_zeros(z.shape[: -len(self.event_shape)]))
