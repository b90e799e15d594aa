"""What calls check of their arguments before anything else, each with an error that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real

import torch
from torch import Tensor

from cnfkit.noise import check_generator


def as_count(name: str, value: int) -> int:
    """``value`` as a number of at least 1, or a ``ValueError`` that names the argument."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} is {value!r}; wanted a whole number of at least 1")
    return count


def as_shape(name: str, shape: int | Sequence[int]) -> torch.Size:
    """``shape`` as a ``torch.Size`` of positive sizes, or a ``ValueError`` that names the argument."""
    sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not sizes or not all(isinstance(n, Integral) and n > 0 for n in sizes):
        raise ValueError(f"{name} is {shape!r}; wanted positive sizes, such as 2 or (1, 8, 8)")
    return torch.Size(sizes)


def as_order(order: Iterable[int] | None, size: int, reverse: bool = False) -> list[int]:
    """``order`` as a list of each of ``0 .. size - 1`` once, or a ``ValueError``; counting up, or down, if None."""
    if order is None:
        return list(reversed(range(size))) if reverse else list(range(size))
    found = order.tolist() if isinstance(order, Tensor) else list(order) if isinstance(order, Iterable) else order
    if not isinstance(found, list) or sorted(map(str, found)) != sorted(map(str, range(size))):
        raise ValueError(f"order is {found!r}; wanted each of 0 to {size - 1} once")
    return [int(k) for k in found]


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a positive number."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; wanted a positive number")


def check_parameter(name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} is a {came}; wanted a floating-point torch.Tensor")


def check_broadcast(name: str, value: Tensor, shape: torch.Size) -> None:
    """Raise unless ``value`` is a floating-point tensor that broadcasts to ``shape``."""
    check_parameter(name, value)
    try:
        value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; wanted one that broadcasts to {tuple(shape)}"
        ) from None


def check_points(owner: str, name: str, value: Tensor, shape: torch.Size, like: Tensor | None) -> None:
    """Raise unless ``value`` is a floating-point tensor ``(*batch, *shape)`` with the dtype and device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(value).__name__}; wanted a torch.Tensor")
    if value.shape[max(value.dim() - len(shape), 0) :] != shape:
        raise ValueError(
            f"{owner}: {name} has shape {tuple(value.shape)}; wanted (*batch, {', '.join(map(str, shape))})"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{owner}: {name} has dtype {value.dtype}; wanted floating point "
            "(a discrete variable is dequantised first, see cnfkit.Dequantised)"
        )
    if like is None:
        return
    if like.is_floating_point() and value.dtype != like.dtype:
        raise TypeError(
            f"{owner}: {name} has dtype {value.dtype}, but the parameters are {like.dtype}; "
            f"call .to({like.dtype}) on {name}, or convert the module"
        )
    if value.device != like.device:
        raise TypeError(
            f"{owner}: {name} is on {value.device}, but the parameters are on {like.device}; move one to the other"
        )


def check_context(owner: str, context: Tensor | None, batch: torch.Size, like: Tensor | None) -> Tensor:
    """The context, if it is there, ``(*batch, features)``, with the dtype and device of ``like``."""
    if context is None:
        raise ValueError(f"{owner}: context is missing; this map is conditioned on one")
    if not isinstance(context, Tensor):
        raise TypeError(f"{owner}: context is a {type(context).__name__}; wanted a torch.Tensor")
    if context.shape[:-1] != batch or not context.dim():
        raise ValueError(f"{owner}: context has shape {tuple(context.shape)}; wanted {(*batch, 'features')}")
    if not context.is_floating_point():
        raise TypeError(
            f"{owner}: context has dtype {context.dtype}; wanted floating point, such as one_hot(labels).float()"
        )
    check_points(owner, "context", context, context.shape[-1:], like)
    return context


def check_features(owner: str, context: Tensor | None, batch: torch.Size, features: int) -> Tensor:
    """The context, if it is there for every point of the batch, with so many features."""
    check_context(owner, context, batch, None)
    if context.shape[-1] != features:
        raise ValueError(f"{owner}: context has shape {tuple(context.shape)}; wanted {(*batch, features)}")
    return context


def draw_normal(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Normal numbers for the start of a parameter, drawn on the generator's device and moved to the CPU."""
    check_generator(generator)
    return torch.randn(shape, generator=generator, device=generator.device if generator else "cpu").cpu()


def full_precision(value: Tensor) -> AbstractContextManager:
    """Where autocast does not reach: for the map itself, whose inverse and log-determinant must match it."""
    return nullcontext() if value.is_meta else torch.autocast(value.device.type, enabled=False)


def concrete(value: Tensor) -> bool:
    """Whether a branch may look at the values: not while a graph is traced, mapped or captured, nor on meta tensors."""
    return not (
        value.device.type == "meta"
        or torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(value)
        or (value.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def by_hand(value: Tensor) -> bool:
    """Whether a backward pass written by hand may be taken: torch.func and torch.export cannot look into one."""
    return concrete(value) and not torch._C._are_functorch_transforms_active()
