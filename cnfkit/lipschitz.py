"""Contractive networks: the bound on their Lipschitz constant holds whatever their weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnfkit.arguments import concrete
from cnfkit.nets import start_at_zero


class _LipschitzNet(nn.Module):
    """Layers with LipSwish between; each of them may stretch by the same share of the bound."""

    def __init__(self, layers: list[nn.Module], bound: float) -> None:
        if not isinstance(bound, int | float) or not 0 < bound < 1:
            raise ValueError(f"bound is {bound!r}; wanted a number between 0 and 1")
        super().__init__()
        self.layers = nn.ModuleList(start_at_zero(layers))
        self.raw_betas = nn.ParameterList(torch.tensor(0.5) for _ in layers[1:])
        self.bound = bound

    def contracted(self) -> Callable[[Tensor], Tensor]:
        """The network as it is now, as a function: weights are contracted here, and not at each of its calls."""
        first, image = self.layers[0].weight, self.layers[0].weight.dim() == 4
        apply = partial(F.conv2d, padding="same") if image else F.linear
        # x σ(βx) / 1.1 = silu(βx) / 1.1β: the factors go into the layers before and after, where they cost nothing
        betas, limit = [F.softplus(raw) + 1e-6 for raw in self.raw_betas], self.bound ** (1 / len(self.layers))
        after, before = [*betas, 1.0], [1.0, *(1 / (1.1 * beta) for beta in betas)]
        maps = [
            (contract(layer.weight, limit) * a * b, layer.bias * a)
            for layer, a, b in zip(self.layers, after, before, strict=True)
        ]

        def network(x: Tensor) -> Tensor:
            if x.dim() < first.dim() - 1 or x.shape[1 - first.dim()] != first.shape[1]:
                wanted = f"(*batch, {first.shape[1]}{', h, w' * image})"
                raise ValueError(f"{type(self).__name__}: input has shape {tuple(x.shape)}; wanted {wanted}")
            # convolutions take one batch dimension, a bijection any number of them
            y = apply(x.reshape(-1, *x.shape[-3:]) if image else x, *maps[0])
            for weight, bias in maps[1:]:
                y = apply(F.silu(y), weight, bias)
            return y.reshape(x.shape)

        return network

    def forward(self, x: Tensor) -> Tensor:
        return self.contracted()(x)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"


class LipschitzMLP(_LipschitzNet):
    r"""Linear layers with LipSwish between, whose weights are contracted when the network is called.

    .. math::

        g = W_L \circ a \circ \dots \circ a \circ W_1, \quad \|W_\ell\|_2 \le c^{1/L},

        a(h) = \frac{h \, \sigma(\beta h)}{1.1}, \quad |a'| < 1,

        \|g(x) - g(y)\| \le c \, \|x - y\|

    Each :math:`\beta > 0` is learned; the last layer starts at zero. Sources: Behrmann et al., *Invertible residual
    networks*, section 2.1; Chen et al., *Residual flows for invertible generative modeling*, section 3.3.

    Args:
        dimension: the number of numbers in and out.
        hidden: the widths between.
        bound: :math:`c`, between 0 and 1.

    Raises:
        ValueError: if an argument is out of range; on a call, if the input has another width.

    >>> net = LipschitzMLP(2, hidden=(32, 32))
    >>> x, y = torch.randn(2, 5, 2)
    >>> bool(((net(x) - net(y)).norm(dim=-1) <= 0.9 * (x - y).norm(dim=-1)).all())
    True
    """

    def __init__(self, dimension: int, hidden: Sequence[int] = (64, 64), bound: float = 0.9) -> None:
        if not isinstance(hidden, Sequence):
            raise ValueError(f"hidden is {hidden!r}; wanted a sequence of widths, such as (64, 64)")
        widths = [dimension, *hidden, dimension]
        if not all(isinstance(width, int) and width > 0 for width in widths):
            raise ValueError(f"dimension, hidden are {widths[:-1]}; wanted positive widths")
        super().__init__([nn.Linear(a, b) for a, b in pairwise(widths)], bound)


class LipschitzConvNet(_LipschitzNet):
    """3×3, 1×1 and 3×3 convolutions with LipSwish between, contracted as in :class:`LipschitzMLP`.

    Args:
        channels: channels in and out.
        hidden: channels between.
        bound: the largest Lipschitz constant, between 0 and 1.

    Raises:
        ValueError: if an argument is out of range; on a call, if the input has another number of channels.

    >>> LipschitzConvNet(1, hidden=8)(torch.randn(5, 1, 8, 8)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(self, channels: int, hidden: int = 32, bound: float = 0.9) -> None:
        if not all(isinstance(number, int) and number > 0 for number in (channels, hidden)):
            raise ValueError(f"channels, hidden are {[channels, hidden]}; wanted positive numbers")
        sizes = ((channels, hidden, 3), (hidden, hidden, 1), (hidden, channels, 3))
        super().__init__([nn.Conv2d(*size, padding="same") for size in sizes], bound)


def contract(weight: Tensor, limit: float) -> Tensor:
    r"""A layer's weight, scaled down if the layer could stretch a difference by more than a limit.

    .. math::

        W \min\Bigl(1, \frac{c}{\sigma}\Bigr), \qquad \sigma = \|W\|_2 \text{ for a matrix},

        \sigma = k \min \bigl( \|W_{o \times i k k}\|_2, \|W_{o k k \times i}\|_2 \bigr) \text{ for a
        convolution}

    The latter bounds a convolution of stride 1, since it sends each patch of the image through
    :math:`W_{o \times i k k}`, and a pixel is in at most :math:`k^2` patches: their squared norms add up to at most
    :math:`k^2 \|x\|^2`. Its adjoint, of the same norm, sends patches through :math:`W_{o k k \times i}^\top`.
    Source: Singla and Feizi, *Fantastic four: Differentiable bounds on singular values of convolution layers*.

    Args:
        weight: :math:`W`, shape ``(o, i)`` or ``(o, i, k, k)``.
        limit: :math:`c`.

    >>> contract(torch.diag(torch.tensor([4.0, 1.0])), 0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.1250]])
    """
    area = weight[0, 0].numel()
    squared = area * _squared_norm(weight.flatten(1))
    if area > 1:
        squared = torch.minimum(squared, area * _squared_norm(weight.transpose(0, 1).flatten(1)))
    # cut off before the root is taken: it has no derivative at W = 0, where the last layer starts
    return weight * limit * squared.clamp(min=limit**2).rsqrt()


def _squared_norm(matrix: Tensor) -> Tensor:
    """The largest singular value, squared: an eigenvalue of the smaller Gram matrix, which takes half an SVD's time."""
    gram = matrix @ matrix.mT if matrix.shape[0] < matrix.shape[1] else matrix.mT @ matrix
    if concrete(gram) and not gram.isfinite().all():  # LAPACK would raise, where a diverged run must show as NaN
        return gram.sum() * torch.nan
    return torch.linalg.eigvalsh(gram)[-1]
