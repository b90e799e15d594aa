"""Glow's layers: what it added to coupling flows."""

from __future__ import annotations

import torch
from torch import Tensor

from cnfkit.arguments import as_shape, draw_normal
from cnfkit.bijections.affine import Affine, AffineLU, Diagonal
from cnfkit.bijections.base import Bijection, Result


class ActNorm(Diagonal):
    r"""A scale and shift per channel, set from data once so that each channel has mean 0 and variance 1, then trained.

    .. math:: z_c = e^{s_c} x_c + b_c, \qquad \log|\det \partial z / \partial x| = h w \sum_c s_c

    Nothing happens behind the scenes: until :meth:`cnfkit.Bijection.initialize` is called, on it or on a flow
    around it, it is the identity.
    Source: Kingma and Dhariwal, *Glow: Generative flow with invertible 1×1 convolutions*, section 3.1.

    Args:
        event_shape: ``d`` for a vector (then each coordinate is a channel), ``(c, h, w)`` for an image.

    Raises:
        ValueError: if the shape is none; on initialisation, if points are too few or not finite, or a channel constant.

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


class Conv1x1(Bijection):
    r"""Mix the channels of an image, the same way in every pixel.

    .. math:: z_{ij} = W x_{ij} + b, \qquad \log|\det \partial z / \partial x| = h w \log|\det W|

    It starts as a random rotation. Source: Kingma and Dhariwal, *Glow: Generative flow with invertible 1×1
    convolutions*, section 3.2.

    Args:
        event_shape: ``(c, h, w)``.
        lu: whether :math:`W` is kept as its triangular factors, see :class:`cnfkit.AffineLU`.
        generator: where the rotation comes from.

    Raises:
        ValueError: if the shape is no image's.

    >>> Conv1x1((3, 8, 8))(torch.randn(5, 3, 8, 8)).logdet.abs().max() < 1e-3  # a rotation
    tensor(True)
    """

    def __init__(self, event_shape, lu: bool = True, generator: torch.Generator | None = None) -> None:
        super().__init__(event_shape)
        if len(self.event_shape) != 3:
            raise ValueError(f"event_shape is {tuple(self.event_shape)}; wanted (c, h, w)")
        self.linear = (AffineLU if lu else Affine)(rotation(self.event_shape[0], generator))

    def _forward(self, x, context, solve):
        return self._by_pixel(self.linear, x)

    def _inverse(self, z, context, solve):
        return self._by_pixel(self.linear.inverse, z)

    def _by_pixel(self, go, points: Tensor) -> Result:
        result = go(points.movedim(-3, -1))  # every pixel is a point of its own
        return Result(result.value.movedim(-1, -3), result.logdet.sum((-2, -1)))


def rotation(dimension: int, generator: torch.Generator | None = None) -> Tensor:
    """A random rotation of space, shape ``(d, d)``; each is as likely as any other."""
    q, r = torch.linalg.qr(draw_normal(dimension, dimension, generator=generator))
    q = q * r.diagonal().sign()  # without this the rotations would not be uniform
    return torch.cat([q[:1] * torch.linalg.slogdet(q).sign, q[1:]])
