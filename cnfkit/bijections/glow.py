"""The layers that Glow added to coupling flows."""

from __future__ import annotations

import torch
from torch import Tensor

from cnfkit.bijections.affine import Diagonal
from cnfkit.bijections.base import as_shape


class ActNorm(Diagonal):
    r"""A scale and shift per channel, set from data once so that each channel has mean 0 and variance 1, then trained.

    .. math:: z_c = e^{s_c} x_c + b_c, \qquad \log|\det \partial z / \partial x| = h w \sum_c s_c

    Nothing happens behind the scenes: until :meth:`initialize` is called, on it or on a flow around it,
    it is the identity.
    Source: Kingma and Dhariwal, *Glow: Generative flow with invertible 1×1 convolutions*, section 3.1.

    Args:
        event_shape: ``d`` for a vector (then each coordinate is a channel), ``(c, h, w)`` for an image.

    >>> layer = ActNorm(2)
    >>> x = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
    >>> layer.initialize(x)
    >>> layer(x).value.detach().round(decimals=4)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """

    def __init__(self, event_shape) -> None:
        channels, *space = as_shape("event_shape", event_shape)
        zeros = torch.zeros(channels, *[1] * len(space))
        super().__init__(event_shape, log_scale=zeros, shift=zeros)

    @torch.no_grad()
    def _start_from(self, x: Tensor) -> None:
        if x.dim() == len(self.event_shape) or not x.numel():
            raise ValueError(f"x has shape {tuple(x.shape)}; wanted (n, {', '.join(map(str, self.event_shape))})")
        if not x.isfinite().all():
            raise ValueError("x holds NaN or infinite entries; clean the data first")
        others = [k for k in range(x.dim()) if k != x.dim() - len(self.event_shape)]
        mean = x.mean(others).view_as(self.shift)
        std = x.var(others, correction=0).sqrt().view_as(self.log_scale)
        if not (std > 0).all():
            raise ValueError("x: a channel is constant, so no scale gives it variance 1")
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
