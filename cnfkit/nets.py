"""Small networks: couplings and autoregressive maps ask them. Their last layer starts at zero, and so a flow calm.

Each can take a context beside its input; its ``takes_context`` is then true, from which a bijection knows that it is to
pass one on. Any module that keeps to this can stand in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnfkit.arguments import as_order, as_shape, check_features


class MLP(nn.Sequential):
    """Linear layers with SiLU between.

    Args:
        inputs: the number of numbers in.
        outputs: the number of numbers out.
        hidden: the widths between.
        context: the number of features of a context that it takes besides; none unless given.

    Raises:
        ValueError: if a width is not a positive whole number; on a call, if the input or the context has another width.

    >>> MLP(2, 4, hidden=(32, 32))(torch.randn(5, 2)).shape
    torch.Size([5, 4])
    >>> MLP(2, 4, context=3)(torch.randn(5, 2), torch.randn(5, 3)).shape
    torch.Size([5, 4])
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), context: int = 0) -> None:
        _require_widths("inputs", inputs, outputs, hidden, context)
        layers: list[nn.Module] = []
        for a, b in pairwise([inputs + context, *hidden, outputs]):
            layers += [nn.Linear(a, b), nn.SiLU()]
        super().__init__(*start_at_zero(layers[:-1]))
        self.context = context

    @property
    def takes_context(self) -> bool:
        return self.context > 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        width = self[0].in_features - self.context
        if not x.dim() or x.shape[-1] != width:
            raise ValueError(f"MLP: input has shape {tuple(x.shape)}; wanted (*batch, {width})")
        if self.takes_context:
            x = torch.cat([x, check_features("MLP", context, x.shape[:-1], self.context)], -1)
        return super().forward(x)


class ConvNet(nn.Sequential):
    """3×3 convolution, 1×1 convolution, 3×3 convolution, with SiLU between, at the same height and width.

    Source: the network of Glow's coupling layers, Kingma and Dhariwal, *Glow*, section 5; its zero start, section 3.3.

    Args:
        inputs: channels in.
        outputs: channels out.
        hidden: channels between.
        context: what it takes besides: so many features, the same for every pixel; or, with a shape ``(c, h, w)``, an
            image of the input's height and width that comes flattened to c·h·w features. Nothing unless given.

    Raises:
        ValueError: if a number of channels is not a positive whole number; on a call, if the input or the context has
            another one.

    >>> ConvNet(1, 2, hidden=8)(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 2, 8, 8])
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 32, context: int | Sequence[int] = 0) -> None:
        if not all(isinstance(channels, Integral) and channels > 0 for channels in (inputs, outputs, hidden)):
            raise ValueError(f"inputs, hidden, outputs are {[inputs, hidden, outputs]}; wanted positive numbers")
        image = tuple(as_shape("context", context)) if context != 0 else (0,)
        if len(image) not in (1, 3):
            raise ValueError(f"context is {context!r}; wanted a number of features, or a shape (c, h, w)")
        layers = [
            nn.Conv2d(inputs + image[0], hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, outputs, 3, padding=1),
        ]
        super().__init__(*start_at_zero(layers))
        self.context = image

    @property
    def takes_context(self) -> bool:
        return self.context[0] > 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        channels, size = self[0].in_channels - self.context[0], self.context[1:]
        if x.dim() < 3 or x.shape[-3] != channels or (size and x.shape[-2:] != size):
            h, w = size or "hw"
            raise ValueError(f"ConvNet: input has shape {tuple(x.shape)}; wanted (*batch, {channels}, {h}, {w})")
        if self.takes_context:
            context = check_features("ConvNet", context, x.shape[:-3], torch.Size(self.context).numel())
            context = context.unflatten(-1, self.context if len(self.context) == 3 else (-1, 1, 1))
            x = torch.cat([x, context.expand(*context.shape[:-2], *x.shape[-2:])], -3)
        # convolutions take one batch dimension, a bijection any number of them
        y = super().forward(x.reshape(-1, *x.shape[-3:]))
        return y.reshape(*x.shape[:-3], *y.shape[-3:])


class MADE(nn.Module):
    r"""An MLP whose output for a coordinate sees the coordinates before it alone.

    .. math:: y_i = \text{net}(x_1, \dots, x_{i-1})_i

    Every unit has a degree, the number of coordinates that it may see; a weight leads only to a unit of at least the
    same degree, and to an output only from a smaller one. A context is seen by all.
    Source: Germain et al., *MADE: Masked autoencoder for distribution estimation*, equations 12 and 13.

    Args:
        dimension: :math:`d`.
        outputs: how many numbers it gives per coordinate.
        hidden: the widths between.
        order: the order of the coordinates, each index once; as they stand unless given.
        context: the number of features of a context that it takes besides; none unless given.

    Raises:
        ValueError: if a width is not a positive whole number, or ``order`` no order; on a call, if the input or the
            context has another width.

    >>> MADE(3, outputs=2, hidden=(32,))(torch.randn(5, 3)).shape
    torch.Size([5, 6])
    """

    def __init__(
        self,
        dimension: int,
        outputs: int = 2,
        hidden: Sequence[int] = (64, 64),
        order: Sequence[int] | None = None,
        context: int = 0,
    ) -> None:
        _require_widths("dimension", dimension, outputs, hidden, context)
        super().__init__()
        self.order = as_order(order, dimension)
        self.context = context
        rank = torch.tensor(self.order).argsort()
        # what sees no coordinate is of use only where there is a context to see
        least = 0 if context or dimension == 1 else 1
        seen = torch.cat([rank + 1, torch.zeros(context, dtype=torch.long)])
        layers = []
        for width in hidden:
            degrees = least + torch.arange(width) * (dimension - least) // width  # spread evenly
            layers += [MaskedLinear(seen, degrees), nn.SiLU()]
            seen = degrees
        # an output sees what has a smaller degree than its coordinate, which is the rank or less
        self.layers = nn.Sequential(*start_at_zero([*layers, MaskedLinear(seen, rank.repeat(outputs))]))

    @property
    def takes_context(self) -> bool:
        return self.context > 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if not x.dim() or x.shape[-1] != len(self.order):
            raise ValueError(f"MADE: input has shape {tuple(x.shape)}; wanted (*batch, {len(self.order)})")
        if self.takes_context:
            x = torch.cat([x, check_features("MADE", context, x.shape[:-1], self.context)], -1)
        return self.layers(x)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.order)

    def set_extra_state(self, state: Tensor) -> None:
        """Weights belong to the masks that they were trained with."""
        if state.tolist() != self.order:
            raise ValueError(f"the weights are of a MADE of order {state.tolist()}; this one's is {self.order}")

    def extra_repr(self) -> str:
        return f"order={self.order}"


class MaskedLinear(nn.Linear):
    """A linear layer without the weights that would lead from a unit of a higher degree to one of a lower."""

    def __init__(self, before: Tensor, after: Tensor) -> None:
        super().__init__(len(before), len(after))
        self.register_buffer("allowed", (before <= after[:, None]).to(self.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.allowed, self.bias)


def _require_widths(first: str, inputs: int, outputs: int, hidden: Sequence[int], context: int) -> None:
    if not isinstance(hidden, Sequence):
        raise ValueError(f"hidden is {hidden!r}; wanted a sequence of widths, such as (64, 64)")
    widths = [inputs, *hidden, outputs]
    if not all(isinstance(width, Integral) and width > 0 for width in widths):
        raise ValueError(f"{first}, hidden, outputs are {widths}; wanted positive widths")
    if not isinstance(context, int) or context < 0:
        raise ValueError(f"context is {context!r}; wanted a number of features, 0 for none")


def start_at_zero(layers: list[nn.Module]) -> list[nn.Module]:
    """Zero the weights and biases of the last layer."""
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers
