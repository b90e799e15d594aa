"""Weights in a file: safetensors, written whole or not at all, refused with a reason."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from torch import Tensor, nn

from cnfkit.atomic import alone, explained, put
from cnfkit.shards import decoded, encoded, parts, remove_leftovers, remove_unused

SHARD = 16_000_000  # bytes: weights that take more go to several files of at most so many


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: damaged, foreign, or made by another model.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "wide.safetensors", nn.Linear(3, 2))
    ...     try:
    ...         load(Path(folder) / "wide.safetensors", nn.Linear(2, 2))
    ...     except CheckpointError as error:
    ...         print(error)
    /...wide.safetensors was made by another model: weight is (2, 3) float32, wanted (2, 2) float32
    """


def save(path: str | Path, module: nn.Module, /, **facts) -> None:
    """Write a module's weights, and facts about them, to a safetensors file.

    The file appears whole or not at all: a crash while writing, a full disk or a read-only folder leave the one that
    was there. With the facts it holds the versions of cnfkit and PyTorch, and a digest of everything, which
    :func:`load` verifies.

    Where it would pass 16 MB, there are several: ``flow-d1ba78ad-00001-of-00003.safetensors`` and so on, named by
    the digest, and ``flow.safetensors.index.json``, which says where each tensor is, in the form that other programs
    read too. :func:`load` still takes the ``path``. A tensor is never divided.

    Args:
        path: the file; its folder is made if missing.
        module: whose ``state_dict`` is saved.
        facts: what JSON can hold, such as the command, the seed, or the held-out likelihood. By convention ``config``
            is a dictionary of all that it takes to build the module; see :func:`inspect`.

    Raises:
        TypeError: if ``path`` or ``module`` is something else, if the ``state_dict`` holds anything but dense tensors
            with values, or if JSON cannot hold a fact.
        IsADirectoryError: if ``path`` is a folder.
        OSError: if the file cannot be written; it says why, and what is left.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "flow.safetensors", nn.Linear(2, 2), seed=0)
    ...     load(Path(folder) / "flow.safetensors", nn.Linear(2, 2))
    {'seed': 0}
    """
    require_module(module)
    require_facts(facts)
    write(path, module.state_dict(), {"facts": facts, "model": describe(module)}, SHARD)


def load(path: str | Path, module: nn.Module) -> dict:
    """Read weights that :func:`save` wrote into a module of the same architecture.

    Args:
        path: the path that they were saved to.
        module: the module to fill; unchanged if anything is wrong.

    Returns:
        The facts that were saved with the weights.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if ``path`` or ``module`` is something else.
        CheckpointError: if the file is damaged or foreign, or its weights do not fit the module.

    >>> flow = Diagonal(2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "flow.safetensors", Diagonal(2, shift=5.0), nll=1.25)
    ...     load(Path(folder) / "flow.safetensors", flow)
    {'nll': 1.25}
    >>> flow.shift.tolist()
    [5.0, 5.0]
    """
    require_module(module)
    tensors, about = read(path)
    if "facts" not in about:
        raise CheckpointError(f"{path} is a training run; resume it with fit(..., checkpoint=...), then save the model")
    fill(module, tensors, about.get("model", []), path)
    return about["facts"]


@dataclass(frozen=True)
class Contents:
    """What a checkpoint says about itself.

    Attributes:
        facts: those that were saved with the weights; in a training run's file, what the run is resumed from.
        model: the parts of the module with their settings.
        tensors: the shape and the dtype of each, by name.
        versions: of cnfkit and PyTorch, which wrote the file; empty if they did before they said so.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "flow.safetensors", Diagonal(2))
    ...     contents = inspect(Path(folder) / "flow.safetensors")
    >>> contents.model, contents.tensors
    (['Diagonal((2,))'], {'log_scale': ((2,), 'float32'), 'shift': ((2,), 'float32')})
    >>> sorted(contents.versions)
    ['cnfkit', 'torch']
    """

    facts: dict
    model: list[str]
    tensors: dict[str, tuple[tuple[int, ...], str]]
    versions: dict[str, str]


def inspect(path: str | Path) -> Contents:
    """Look into a checkpoint without the module that it was made from, which may be built by what is found.

    Args:
        path: the path that it was saved to.

    Returns:
        The :class:`Contents`.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if ``path`` is something else.
        CheckpointError: if the file is damaged or foreign.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Path(folder) / "flow.safetensors", maf(2, layers=3), config={"event_shape": 2, "layers": 3})
    ...     config = inspect(Path(folder) / "flow.safetensors").facts["config"]
    ...     load(Path(folder) / "flow.safetensors", maf(**config))
    {'config': {'event_shape': 2, 'layers': 3}}
    """
    tensors, about = read(path)
    versions = {name: about.pop(name) for name in ("cnfkit", "torch") if name in about}
    model = about.pop("model", [])
    forms = {name: _form(tensor) for name, tensor in tensors.items()}
    return Contents(about.get("facts", about), model, forms, versions)


def describe(module: nn.Module) -> list[str]:
    """The module's parts with their settings, which no weight's shape shows; PyTorch's own parts left out."""
    parts = [part for part in module.modules() if not type(part).__module__.startswith("torch.")]
    return [f"{type(part).__name__}({part.extra_repr()})" for part in parts]


def fill(module: nn.Module, tensors: dict[str, Tensor], model: list[str], source: str | Path) -> None:
    """Copy tensors into a module, or raise a :class:`CheckpointError` that says what does not fit."""
    wanted = module.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is not of this model" for name in tensors if name not in wanted]
    for name in (name for name in wanted if name in tensors):
        came, want = _form(tensors[name]), _form(wanted[name])
        if came != want:
            problems.append(f"{name} is {came[0]} {came[1]}, wanted {want[0]} {want[1]}")
    parts = zip_longest(model, describe(module), fillvalue="nothing")
    problems += [f"it has {came} where this one has {want}" for came, want in parts if came != want]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source} was made by another model: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(tensors)


def as_path(path: str | Path) -> Path:
    """``path`` as one, or a ``TypeError``."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}; wanted a str or a pathlib.Path")
    return Path(path)


def require_module(module: nn.Module) -> None:
    """Raise unless it is one."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; wanted a torch.nn.Module")


def require_facts(facts: dict) -> None:
    """Raise unless JSON can hold them."""
    for name, fact in facts.items():
        try:
            json.dumps(fact)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} is {fact!r:.60}; wanted a fact that JSON can hold: {error}") from None


def _form(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


# What holds tensors and facts, whatever they are about


def write(path: str | Path, tensors: dict[str, Tensor], about: dict, limit: float = math.inf) -> None:
    """Write tensors and facts, whole or not at all: to one file, or to shards where that would pass the limit.

    The last step makes them count, and is one operation of the file system; until then those of before do. They are
    still there, as the names of shards hold the digest of everything.
    """
    path = as_path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder; wanted a file", str(path))
    files = encoded(path, tensors, about, limit)
    with explained(path, sum(map(len, files.values()))):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone(path.parent) as nobody_else:
            try:
                for name, data in files.items():
                    put(path.with_name(name), data)
                if path.name not in files:
                    path.unlink(missing_ok=True)  # where it is, an index does not count
            except BaseException:
                remove_unused(path, files)
                raise
            if nobody_else:
                remove_leftovers(path)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts that :func:`write` wrote to this path, with the versions of who did."""
    path = as_path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; wanted a file")
    try:
        with alone(path.parent):
            if not (files := parts(path)):
                raise FileNotFoundError(f"no checkpoint at {path}; train the model first (chapters: CNFKIT_RETRAIN=1)")
            return decoded(files)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
