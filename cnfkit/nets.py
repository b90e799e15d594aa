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
        ValueError: if a width is not positive.

    >>> MLP(2, 4, hidden=(32, 32))(torch.randn(5, 2)).shape
    torch.Size([5, 4])
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (64, 64)) -> None:
        widths = [inputs, *hidden, outputs]
        if min(widths) < 1:
            raise ValueError(f"inputs, hidden, outputs are {widths}; wanted positive widths")
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        super().__init__(*start_at_zero(layers[:-1]))


class ConvNet(nn.Sequential):
    """3×3 convolution, 1×1 convolution, 3×3 convolution, with SiLU between, at the same height and width.

    Source: the network of Glow's coupling layers, Kingma and Dhariwal, *Glow*, section 3.3.

    Args:
        inputs: channels in.
        outputs: channels out.
        hidden: channels between.

    Raises:
        ValueError: if a number of channels is not positive.

    >>> ConvNet(1, 2, hidden=8)(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 2, 8, 8])
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 32) -> None:
        if min(inputs, outputs, hidden) < 1:
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
        # convolutions take one batch dimension, a bijection any number of them
        y = super().forward(x.reshape(-1, *x.shape[-3:]))
        return y.reshape(*x.shape[:-3], *y.shape[-3:])


def start_at_zero(layers: list[nn.Module]) -> list[nn.Module]:
    """Zero the weights and biases of the last layer."""
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers
