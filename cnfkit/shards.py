"""Tensors and facts in files: one in the safetensors format, or several, the shards, and an index of them.

Where a file has the name that was asked for, it counts; else the index of that name does, and the shards that it lists.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

HEADER = 100_000_000  # bytes: what safetensors allows


def encoded(path: Path, tensors: dict[str, Tensor], about: dict, limit: float) -> dict[str, bytes]:
    """The files by name, in the order in which to write them: one, or shards and their index.

    Shards have at most ``limit`` bytes, but for a tensor that is larger by itself.
    """
    from cnfkit import __version__

    tensors = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    about = {**about, "cnfkit": __version__, "torch": torch.__version__.split("+")[0]}
    about = json.loads(json.dumps(about))  # as it will be read
    stamp = _digest(tensors, about)
    text = json.dumps({**about, "sha256": stamp})
    sizes = {name: tensor.nbytes + len(name) + 256 for name, tensor in tensors.items()}  # and its line in the header
    if len(tensors) < 2 or sum(sizes.values()) + len(json.dumps(text)) <= limit:
        return {path.name: _safetensors(tensors, text)}
    shards, room = [], 0.0
    for name, tensor in tensors.items():
        if sizes[name] > room:
            shards.append({})
            room = limit - 256
        shards[-1][name] = tensor
        room -= sizes[name]
    files, weight_map = {}, {}
    belongs = json.dumps({"shard_of": path.name, "sha256": stamp})
    for k, shard in enumerate(shards, 1):
        file = _shard(path.stem, stamp[:8], f"{k:05}", f"{len(shards):05}", path.suffix)
        files[file] = _safetensors(shard, belongs)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total, "cnfkit": text}, "weight_map": weight_map}
    return files | {_index_of(path).name: json.dumps(index, indent=2).encode()}


def parts(path: Path) -> list[Path]:
    """The files that count: the one at ``path``, or the index and its shards, or none."""
    if path.is_file():
        return [path]
    index = _index_of(path)
    return [index, *map(index.with_name, _listed(index)[0])] if index.is_file() else []


def decoded(files: list[Path]) -> tuple[dict[str, Tensor], dict]:
    """The tensors and facts of these :func:`parts`, or a ``ValueError`` that says what is wrong with which file."""
    file, *shards = files
    tensors, about = ({}, _listed(file)[1]) if shards else _opened(file)
    if "shard_of" in about:
        raise ValueError(f"{file} is a part of a checkpoint; load {about['shard_of']}")
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{shard} is missing, which {file.name} lists; copy all files of the checkpoint")
        part, its = _opened(shard)
        if its.get("sha256") != about["sha256"]:
            raise ValueError(f"{shard} is not of the checkpoint that {file.name} lists; copy all files of one")
        tensors |= part
    tensors, stamp = dict(sorted(tensors.items())), about.pop("sha256", None)
    if (stamp or "cnfkit" in about) and stamp != _digest(tensors, about):  # there was a time before both
        raise _damaged(file, "its content is not what was saved")
    return tensors, about


def remove_unused(path: Path, names: Iterable[str]) -> None:
    """Remove those files that are no part of ``path``; what cannot be removed, or understood, stays."""
    with suppress(ValueError, OSError):
        used = {part.name for part in parts(path)}
        for name in sorted(set(names) - used):
            with suppress(OSError):
                path.with_name(name).unlink()


def remove_leftovers(path: Path) -> None:
    """Remove what writers of ``path`` left that are gone: drafts, shards, and an index that does not count."""
    stem, suffix, name, index = (re.escape(x) for x in (path.stem, path.suffix, path.name, _index_of(path).name))
    shard = _shard(stem, "[0-9a-f]{8}", r"\d{5}", r"\d{5}", suffix)
    pattern = re.compile(rf"{shard}|\.({name}|{index}|{shard})\.\d+")
    with suppress(OSError):
        remove_unused(path, filter(pattern.fullmatch, os.listdir(path.parent)))
    with suppress(ValueError, OSError):
        _listed(_index_of(path))  # if it is ours
        remove_unused(path, [_index_of(path).name])


def _index_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def _shard(stem: str, stamp: str, k: str, n: str, suffix: str) -> str:
    return f"{stem}-{stamp}-{k}-of-{n}{suffix}"


def _digest(tensors: dict[str, Tensor], about: dict) -> str:
    """The sha256 of everything: facts, and each tensor's name, type, shape and bytes."""
    total = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name!r} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _plain(name: str, tensor: Tensor) -> Tensor:
    """A copy on the CPU, dense and alone in its memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; wanted a tensor, to be saved")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or is_lazy(tensor):
        kind = "not initialised" if is_lazy(tensor) else f"{tensor.layout}, {tensor.dtype}, on {tensor.device}"
        raise TypeError(f"{name} is {kind}; wanted a dense tensor with values, to be saved")
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _safetensors(tensors: dict[str, Tensor], text: str) -> bytes:
    try:  # one entry: several would stand in any order, and the same weights give other bytes
        return safetensors.torch.save(tensors, metadata={"cnfkit": text})
    except KeyError as error:
        raise TypeError(f"a tensor is {error}; wanted a type that safetensors knows") from None


def _listed(index: Path) -> tuple[list[str], dict]:
    """The names of the shards, and the facts."""
    try:
        content = json.loads(index.read_bytes())
        text, names = content["metadata"].get("cnfkit"), sorted(set(content["weight_map"].values()))
        about = {} if text is None else json.loads(text)
        beside = names and all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(index, error) from None
    if text is None:
        raise _foreign(index)
    if not beside or "sha256" not in about:
        raise _damaged(index, "it lists no shards beside it")
    return names, about


def _opened(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of one file, and the facts that stand in it."""
    with open(path, "rb") as file:
        size, whole = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        if size > min(whole - 8, HEADER):  # before so much is read
            raise _damaged(path, f"a header of {size} bytes, in {whole}")
        try:
            header = json.loads(file.read(size))
            text = header.get("__metadata__", {}).get("cnfkit")
            about = None if text is None else json.loads(text)
            file.seek(0)
            tensors = {} if about is None else safetensors.torch.load(file.read())
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from None
    if not isinstance(about, dict):
        raise _foreign(path)
    return tensors, about


def _foreign(path: Path) -> ValueError:
    return ValueError(f"{path} was not written by cnfkit: it holds tensors, but no facts about them")


def _damaged(path: Path, why: Exception | str) -> ValueError:
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and any(start[3:])):
        return ValueError(
            f"{path} looks like a pickle, as torch.save writes them; cnfkit opens none, since that may run any code: "
            "load it where it comes from, and save it with cnfkit.save"
        )
    why = f"{type(why).__name__}: {why}" if isinstance(why, KeyError | TypeError) else why
    return ValueError(f"{path} is damaged or no safetensors file ({why}); delete it to start anew")
