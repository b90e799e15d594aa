"""Models that several test files build."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnfkit import (
    MLP,
    ActNorm,
    AffineCoupling,
    Bijection,
    Chain,
    ConvNet,
    Flow,
    Multiscale,
    Normal,
    Result,
    Squeeze,
    mask,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def redrawn(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """The module with noise on every parameter: nets start at zero, and a test of the identity tests little."""
    with torch.no_grad():
        generator = seeded(seed)
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def real_nvp(layers: int = 4, d: int = 2) -> Chain:
    """Affine couplings of alternating masks, with weights that do something."""
    even = mask("even", d)
    masks = [even if k % 2 else ~even for k in range(layers)]
    return redrawn(Chain(*[AffineCoupling(m, MLP(d, 2 * d, hidden=(16,))) for m in masks]), scale=0.3)


def two_moons_flow(layers: int = 4) -> Flow:
    return Flow(Normal(2), real_nvp(layers))


def net_for(kind: str, shape: tuple[int, int, int]) -> nn.Module:
    """A coupling layer's network for images: convolutions, or an MLP of all pixels at once."""
    channels, height, width = shape
    if kind == "conv":
        return ConvNet(channels, 2 * channels, hidden=6)
    size = channels * height * width
    return nn.Sequential(
        nn.Flatten(-3), MLP(size, 2 * size, hidden=(8,)), nn.Unflatten(-1, (2 * channels, height, width))
    )


def image_bijection(kind: str = "conv") -> Multiscale:
    """An image of 8 × 8 pixels through three stages: actnorm, checkerboard and channel couplings, squeezes."""

    def couplings(name, shape):
        m = mask(name, shape)
        return [ActNorm(shape), AffineCoupling(m, net_for(kind, shape)), AffineCoupling(~m, net_for(kind, shape))]

    stages = [
        Chain(*couplings("checkerboard", (1, 8, 8)), Squeeze((1, 8, 8)), *couplings("channels", (4, 4, 4))),
        Chain(Squeeze((2, 4, 4)), *couplings("channels", (8, 2, 2))),
        Chain(Squeeze((4, 2, 2)), *couplings("channels", (16, 1, 1))),
    ]
    return redrawn(Multiscale(*stages), scale=0.1)


class Conditional(Bijection):
    """A scale and shift that the context decides: no bijection of the library takes a context yet."""

    takes_context = True

    def __init__(self, event_shape, features: int = 3) -> None:
        super().__init__(event_shape)
        self.net = nn.Linear(features, 2 * self.event_shape.numel())

    def _scale_and_shift(self, context: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.net(context).chunk(2, -1)
        return scale.unflatten(-1, self.event_shape), shift.unflatten(-1, self.event_shape)

    def _forward(self, x, context, solve):
        scale, shift = self._scale_and_shift(context)
        return Result(x * scale.exp() + shift, scale.flatten(-len(self.event_shape)).sum(-1))

    def _inverse(self, z, context, solve):
        scale, shift = self._scale_and_shift(context)
        return Result((z - shift) * (-scale).exp(), -scale.flatten(-len(self.event_shape)).sum(-1))


class Field(nn.Module):
    """A velocity field from a function ``(t, z)``, without products of its own; it counts its calls."""

    def __init__(self, function, event_shape=1, parameters=()) -> None:
        super().__init__()
        self.function, self.event_shape, self.calls = function, event_shape, 0
        self.learnt = nn.ParameterList(parameters)

    def forward(self, t, z):
        self.calls += 1
        return self.function(t, z)


class Bare(nn.Module):
    """The same field, without products of its own: autograd differentiates it."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.event_shape = field, field.event_shape
        self.takes_context = getattr(field, "takes_context", False)

    def forward(self, t, z, *context):
        return self.field(t, z, *context)


class Counted(nn.Module):
    """A field with products whose calls are counted, of one kind and of the other."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.event_shape, self.plain, self.with_rows = field, field.event_shape, 0, 0

    def forward(self, t, z):
        self.plain += 1
        return self.field(t, z)

    def with_products(self, t, z, probes=None):
        self.with_rows += 1
        return self.field.with_products(t, z, probes)


class NoFloat64(TorchDispatchMode):
    """Fails where PyTorch makes a float64 tensor: Apple's MPS has none, and a GPU is slow with them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            assert not (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64), f"{function} made a float64"
        return result
