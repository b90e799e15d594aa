"""The fields that are timed: cnfkit's, trained; the same weights in plain PyTorch, for the peers; and the floor."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnfkit as ck

WEIGHTS = Path(__file__).parent / "weights"


class TimeLinear(nn.Linear):
    """A linear layer with the time as its last input: ``W [h, t] + b``, in the cheaper form ``W' h + (b + t w)``.

    The time is an attribute, which is how torchdyn hands it to the layers of a network.
    """

    t: Tensor | float = 0.0

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight[:, :-1], self.bias + self.t * self.weight[:, -1])


class PlainField(nn.Module):
    """The twin of ``MLPField(d, hidden, time="concat")`` in plain PyTorch: what every peer is given.

    Args:
        field: cnfkit's, whose weights are copied.
    """

    def __init__(self, field: ck.MLPField) -> None:
        super().__init__()
        if field.time != "concat" or field.activation != "tanh":
            raise ValueError(f"field has time={field.time!r} and {field.activation!r}; wanted 'concat' and 'tanh'")
        widths = (*field.event_shape, *field.hidden, *field.event_shape)
        layers = [layer for a, b in pairwise(widths) for layer in (TimeLinear(a + 1, b), nn.Tanh())]
        self.net = nn.Sequential(*layers[:-1])
        self.event_shape = field.event_shape
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), field.parameters(), strict=True):
                mine.copy_(theirs)
        self.to(next(field.parameters()).device)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        for layer in self.net:
            if isinstance(layer, TimeLinear):
                layer.t = t
        return self.net(z)


class Bare(nn.Module):
    """A field that offers its ``forward`` alone: cnfkit then differentiates it by autograd."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.event_shape = field, field.event_shape

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(t, z)


def floor(field: ck.MLPField) -> nn.Sequential:
    """The bare field: ``[x, t]`` through layers of the same widths, of which the first alone sees the time."""
    d = field.event_shape[0]
    layers = [layer for a, b in pairwise((d + 1, *field.hidden, d)) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(next(field.parameters()).device)


def new_flow() -> ck.Flow:
    """An untrained flow of the field that everything in two dimensions is measured on."""
    return ck.Flow(ck.Normal(2), ck.CNF(ck.MLPField(2, hidden=(64, 64, 64), time="concat")))


def trained_flow(name: str, device: str = "cpu") -> ck.Flow:
    """A trained one: ``"plain"``, by likelihood alone, or ``"rnode"``, with RNODE's penalties; see weights.py."""
    flow = new_flow()
    ck.load(WEIGHTS / f"{name}.safetensors", flow)
    return flow.to(device)


def first_block(images: int, device: str = "cpu") -> tuple[ck.ConvField, Tensor]:
    """The field of MNIST's first block, and noise for its images."""
    shape = (1, 28, 28)
    field = ck.ConvField(shape, hidden=(64, 64, 64))
    generator = torch.Generator().manual_seed(0)
    for parameter in field.parameters():  # the last layer starts at zero, where gradients vanish and times may differ
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return field.to(device), noise(images, *shape, seed=9, device=device)


def noise(*shape: int, seed: int, device: str = "cpu") -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def points(n: int, seed: int, device: str = "cpu") -> Tensor:
    """Points of the pinwheel that no training has seen, unless its seed was 1."""
    return ck.toy_density("pinwheel").sample(n, torch.Generator().manual_seed(seed)).to(device)
