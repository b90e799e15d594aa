"""Small networks that coupling layers ask. Their last layer starts at zero, so that a flow starts near the identity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with SiLU between.

    Args:
        inputs: the number of numbers in.
        outputs: the number of numbers out.
        hidden: the widths between.

    Raises:
        ValueError: if a width is not a positive whole number; on a call, if the input has another width.

    >>> MLP(2, 4, hidden=(32, 32))(torch.randn(5, 2)).shape
    torch.Size([5, 4])
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64)) -> None:
        if not isinstance(hidden, Sequence):
            raise ValueError(f"hidden is {hidden!r}; wanted a sequence of widths, such as (64, 64)")
        widths = [inputs, *hidden, outputs]
        if not all(isinstance(width, int) and width > 0 for width in widths):
            raise ValueError(f"inputs, hidden, outputs are {widths}; wanted positive widths")
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        super().__init__(*start_at_zero(layers[:-1]))

    def forward(self, x: Tensor) -> Tensor:
        if not x.dim() or x.shape[-1] != self[0].in_features:
            raise ValueError(f"MLP: input has shape {tuple(x.shape)}; wanted (*batch, {self[0].in_features})")
        return super().forward(x)


class ConvNet(nn.Sequential):
    """3×3 convolution, 1×1 convolution, 3×3 convolution, with SiLU between, at the same height and width.

    Source: the network of Glow's coupling layers, Kingma and Dhariwal, *Glow*, section 3.3.

    Args:
        inputs: channels in.
        outputs: channels out.
        hidden: channels between.

    Raises:
        ValueError: if a number of channels is not a positive whole number; on a call, if the input has another one.

    >>> ConvNet(1, 2, hidden=8)(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 2, 8, 8])
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 32) -> None:
        if not all(isinstance(channels, int) and channels > 0 for channels in (inputs, outputs, hidden)):
            raise ValueError(f"inputs, hidden, outputs are {[inputs, hidden, outputs]}; wanted positive numbers")
        layers = [
            nn.Conv2d(inputs, hidden, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.SiLU(),
            nn.Conv2d(hidden, outputs, 3, padding=1),
        ]
        super().__init__(*start_at_zero(layers))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 3 or x.shape[-3] != self[0].in_channels:
            raise ValueError(f"ConvNet: input has shape {tuple(x.shape)}; wanted (*batch, {self[0].in_channels}, h, w)")
        # convolutions take one batch dimension, a bijection any number of them
        y = super().forward(x.reshape(-1, *x.shape[-3:]))
        return y.reshape(*x.shape[:-3], *y.shape[-3:])


def start_at_zero(layers: list[nn.Module]) -> list[nn.Module]:
    """Zero the weights and biases of the last layer."""
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers
