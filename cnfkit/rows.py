"""The rows of a run: which are trained on, which are held out, and in which order they come."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from cnfkit.noise import seeded


def split(data: tuple[Tensor, ...], validation, seed: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The rows that are trained on, and those that are held out, none perhaps."""
    n = len(data[0])
    if isinstance(validation, Tensor | tuple | list):
        held_out = require_rows(validation, ("validation", "validation's context"))
        if len(held_out) != len(data):
            came, wanted = ("points and a context" if len(rows) > 1 else "points alone" for rows in (held_out, data))
            raise ValueError(f"validation has {came}; wanted {wanted}, as the data are given")
        for name, came, wanted in zip(("points", "context"), held_out, data, strict=False):
            if came.shape[1:] != wanted.shape[1:]:
                raise ValueError(
                    f"validation has {name} of shape {tuple(came.shape[1:])}; data of {tuple(wanted.shape[1:])}"
                )
        return data, held_out
    if isinstance(validation, bool) or not isinstance(validation, int | float) or not 0 <= validation < 1:
        raise ValueError(f"validation is {validation!r}; wanted a fraction in [0, 1), or held-out points")
    size = int(n * validation)
    if validation and not size:
        raise ValueError(f"validation is {validation!r} of {n} points, none; wanted 0, or more of them")
    order = torch.randperm(n, generator=seeded(seed, "split", 0))
    train, held_out = ([part[rows.to(part.device)] for part in data] for rows in (order[size:], order[:size]))
    return train, held_out if size else ()


def fingerprint(rows: tuple[Tensor, ...]) -> str:
    """Shapes and checksums: a run must not go on with other data than it began with."""
    content = [zlib.crc32(part.detach().cpu().contiguous().view(torch.uint8).numpy()) for part in rows]
    return ", ".join(f"{tuple(part.shape)} {crc:08x}" for part, crc in zip(rows, content, strict=True))


def require_rows(rows: Tensor | tuple[Tensor, ...], names: tuple[str, str]) -> tuple[Tensor, ...]:
    """Points, and their contexts if there are any, or an error that says what is wrong with them."""
    rows = tuple(rows) if isinstance(rows, tuple | list) else (rows,)
    if not 1 <= len(rows) <= 2:
        raise ValueError(f"{names[0]} has {len(rows)} members; wanted points, or points and their context")
    for name, part in zip(names, rows, strict=False):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name} is a {type(part).__name__}; wanted a torch.Tensor of shape (n, *event_shape)")
        if part.dim() < 2 or not len(part):
            raise ValueError(f"{name} has shape {tuple(part.shape)}; wanted (n, *event_shape) with n at least 1")
        if len(part) != len(rows[0]):
            raise ValueError(f"{name} has {len(part)} rows; wanted {len(rows[0])}, one for each of the points")
        if part.is_floating_point() and not (finite := part.isfinite()).all():
            bad = (~finite).flatten(1).any(1)
            raise ValueError(f"{name}: {int(bad.sum())} of {len(part)} points hold NaN or infinite entries")
    return rows
