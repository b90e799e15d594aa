"""Masks: partitions of a point's coordinates, for coupling layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cnfkit.arguments import as_shape

HALVES = {"top": (-2, False), "bottom": (-2, True), "left": (-1, False), "right": (-1, True), "channels": (-3, False)}


def mask(kind: str, event_shape: int | Sequence[int]) -> Tensor:
    r"""The part of a point that a coupling layer passes on unchanged.

    .. math:: m \in \{0, 1\}^{\text{event}}, \qquad m_i = 1 \text{ where } z_i = x_i

    The complement, for the next layer, is ``~mask``. Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation
    using Real NVP*, section 3.4, for the first three.

    Args:
        kind: ``"even"`` (every other coordinate of a vector), ``"checkerboard"`` (of the last two dimensions),
            ``"channels"`` (the first half of the channels), or the ``"top"``, ``"bottom"``, ``"left"`` or ``"right"``
            half of an image.
        event_shape: ``d`` for a vector, ``(channels, height, width)`` for an image.

    Returns:
        A boolean tensor of shape ``event_shape``.

    Raises:
        ValueError: if the kind is unknown, does not fit the shape, or would leave one of the two parts empty.

    >>> mask("checkerboard", (1, 2, 4)).int()
    tensor([[[1, 0, 1, 0],
             [0, 1, 0, 1]]], dtype=torch.int32)
    """
    shape = as_shape("event_shape", event_shape)
    kinds = ("even", "checkerboard", *HALVES)
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}; wanted one of {', '.join(kinds)}")
    if (kind == "even") != (len(shape) == 1) or len(shape) not in (1, 3):
        raise ValueError(f"{kind!r} does not fit event_shape {tuple(shape)}; vectors take 'even', images the rest")
    if kind == "even":
        chosen = torch.arange(shape[0]) % 2 == 0
    elif kind == "checkerboard":
        rows, columns = torch.arange(shape[-2]), torch.arange(shape[-1])
        chosen = ((rows[:, None] + columns) % 2 == 0).expand(shape)
    else:
        dimension, second = HALVES[kind]
        index = torch.arange(shape[dimension]) >= shape[dimension] // 2
        chosen = (index == second).view(-1, *[1] * (-dimension - 1)).expand(shape)
    if chosen.all() or not chosen.any():
        raise ValueError(f"a mask {kind!r} of event_shape {tuple(shape)} leaves one of its two parts empty")
    return chosen.clone()
