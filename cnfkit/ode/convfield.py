"""A velocity field of images: convolutions that see the time as one more channel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnfkit.arguments import as_shape, by_hand
from cnfkit.ode.moments import Moment


class ConvField(nn.Module):
    r"""A velocity field by convolutions of 3 × 3 pixels, each of which sees the time as one more channel.

    .. math::

        v(t, z) = K_L * (\zeta( \cdots \zeta(K_1 * (z, t) + b_1) \cdots ), t) + b_L,

        \zeta(a) = \log(1 + e^a)

    Its last layer starts at zero, and so the flow at the identity. Source: Grathwohl et al., *FFJORD*, appendix B;
    Finlay et al., *How to train your neural ODE*, section 4.

    Args:
        event_shape: channels, height and width.
        hidden: the numbers of channels between; at least one.

    Raises:
        ValueError: if a size is not a positive whole number, or the shape is not that of an image.

    >>> ConvField((1, 8, 8), hidden=(16,))(torch.tensor(0.5), torch.randn(7, 1, 8, 8)).shape
    torch.Size([7, 1, 8, 8])
    """

    def __init__(self, event_shape: Sequence[int], hidden: Sequence[int] = (64, 64, 64)) -> None:
        super().__init__()
        self.event_shape, self.hidden = as_shape("event_shape", event_shape), tuple(as_shape("hidden", hidden))
        if len(self.event_shape) != 3:
            raise ValueError(f"event_shape is {event_shape!r}; wanted channels, height and width, such as (1, 28, 28)")
        channels = (self.event_shape[0], *self.hidden, self.event_shape[0])
        self.layers = nn.ModuleList(nn.Conv2d(a + 1, b, 3, padding=1) for a, b in pairwise(channels))
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """The velocity, shape ``(n, c, h, w)``.

        Args:
            t: a scalar tensor, or a time for each image, shape ``(n,)``.
            z: images, shape ``(n, c, h, w)``.
        """
        clock = t.view(-1, 1, 1, 1).expand(len(z), 1, *z.shape[2:])
        for layer in self.layers[:-1]:
            z = F.softplus(layer(torch.cat([z, clock], 1)))
        return self.layers[-1](torch.cat([z, clock], 1))

    def moments(self, times: Tensor, context: Tensor | None = None) -> list:
        """The field at some times, with what the channel of the time adds to each layer computed once.

        Args:
            times: shape ``(T,)``.
            context: None; it takes none.
        """
        ones, each = times.new_ones(1, 1, *self.event_shape[1:]), []
        for layer in self.layers:
            # the time adds the same picture to all images: flat inside, and less at the border, where zeros are padded
            picture = F.conv2d(ones, layer.weight[:, -1:], padding=1)
            shift = layer.bias[:, None, None] + times.view(-1, 1, 1, 1) * picture
            weight, shift = (
                part.contiguous(memory_format=torch.channels_last) for part in (layer.weight[:, :-1], shift)
            )
            each.append([(weight, part) for part in shift.unbind()])
        return [ConvMoment(self, t, layers) for t, *layers in zip(times.unbind(), *each, strict=True)]

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, hidden={self.hidden}"


class ConvMoment(Moment):
    """A :class:`ConvField` at one time: common convolutions, with a bias for each pixel."""

    def __init__(self, field: ConvField, t: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(field, t)
        self.layers = layers

    def lowered(self) -> ConvMoment:
        return ConvMoment(self.field, self.t, [tuple(part.bfloat16() for part in layer) for layer in self.layers])

    def value(self, z: Tensor) -> Tensor:
        return self._pass(z[None])[0]

    def with_products(self, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        if probes is None:
            unit = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
            probes = unit.view(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
        out = self._pass(torch.cat([z[None], probes]))
        return out[0], out[1:]

    def _pass(self, both: Tensor) -> Tensor:
        """Images and tangents, shape ``(1 + k, n, c, h, w)``, through the layers as one batch.

        The channels of a pixel lie side by side in memory, in which convolutions take a tenth less time.
        """
        dtype, both = both.dtype, both.to(self.layers[0][0].dtype)
        both = both.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, both.shape[:2])
        for weight, shift in self.layers[:-1]:
            both = activate(_convolve(both, weight), shift)
        weight, shift = self.layers[-1]
        both = _convolve(both, weight).to(dtype)
        return torch.cat([both[:1] + shift, both[1:]]) if len(both) > 1 else both + shift


def _convolve(both: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(both.flatten(0, 1), weight, padding=1).unflatten(0, both.shape[:2])


def activate(sums: Tensor, shift: Tensor) -> Tensor:
    r"""Softplus of values, and the tangents times its slope.

    .. math:: a \mapsto \zeta(a + b), \qquad \tau \mapsto \zeta'(a + b) \odot \tau

    Args:
        sums: the values and the tangents, shape ``(1 + k, n, *features)``.
        shift: :math:`b`, shape ``(*features)``.
    """
    if len(sums) == 1:
        return F.softplus(sums + shift)
    return (_Activate.apply if by_hand(sums) else plain_activate)(sums, shift)


def plain_activate(sums: Tensor, shift: Tensor) -> Tensor:
    """The same, left to autograd: the twin that the other is tested against."""
    a = sums[0] + shift
    return torch.cat([F.softplus(a)[None], torch.sigmoid(a) * sums[1:]])


class _Activate(torch.autograd.Function):
    """A few passes over memory where autograd would take a dozen: they cost what convolutions do not."""

    @staticmethod
    def forward(ctx, sums, shift):
        a = sums[0] + shift
        slope, out = torch.sigmoid(a), torch.empty_like(sums)
        torch.mul(sums[1:], slope, out=out[1:])
        out[0] = F.softplus(a)
        ctx.save_for_backward(sums, shift, slope)
        return out

    @staticmethod
    def backward(ctx, g):
        sums, shift, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is to be differentiated once more
            return torch.func.vjp(plain_activate, sums, shift)[1](g)
        g_slope = g[1] * sums[1]
        for g_row, row in zip(g[2:], sums[2:], strict=True):
            g_slope.addcmul_(g_row, row)
        out = g * slope
        # the slope of the slope ζ' is ζ' (1 − ζ')
        out[0].addcmul_(g_slope, slope).addcmul_(g_slope.mul_(slope), slope, value=-1)
        return out, out[0].sum(0)
