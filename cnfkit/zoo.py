"""Published weights: trained once, and kept with the course."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from cnfkit.atomic import alone, explained, put
from cnfkit.checkpoint import CheckpointError, as_path, load, require_facts, require_module, save
from cnfkit.settings import retrain, switch
from cnfkit.shards import parts
from cnfkit.training import History

LIMIT = 4_000_000  # bytes of a file that is published


def trained(path: str | Path, module: nn.Module, train: Callable[[], History], **facts) -> dict:
    """Load weights that were trained once, or train them if ``CNFKIT_RETRAIN=1`` asks for it.

    For chapters whose training takes longer than a reader waits. The file holds the facts and the log of the run; its
    sha256 stands in ``SHA256SUMS`` beside it, in the form that the command ``sha256sum -c`` reads. With
    ``CNFKIT_FAST=1``, what is trained is not written.

    Args:
        path: the checkpoint.
        module: the module to fill, or to train and save.
        train: trains ``module`` and returns its history.
        facts: what to save with the weights, such as the command and the seed.

    Returns:
        The facts that were saved with the weights, with the history, the device, PyTorch's version and the seconds.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if ``path`` or ``module`` is something else.
        CheckpointError: if its bytes are not the published ones, or do not fit the module.
        ValueError: if ``CNFKIT_RETRAIN`` is neither 1 nor 0, or the weights to train would take more than 4 MB.
    """
    path = as_path(path)
    require_module(module)
    listed = published(path.parent)
    if retrain():
        if reserved := {"device", "torch", "seconds", "history"} & set(facts):
            raise ValueError(f"facts has {min(reserved)!r}, which is added to them; wanted another name")
        require_facts(facts)  # rather now than after the training
        size = sum(tensor.nbytes for tensor in module.state_dict().values())
        if size > LIMIT:
            raise ValueError(f"module has weights of {size / 1e6:.1f} MB; wanted at most {LIMIT / 1e6:g}, to publish")
        start = time.monotonic()
        history = asdict(train())
        if switch("CNFKIT_FAST"):  # a dry run: not to be published
            return json.loads(json.dumps(facts | {"history": history}))
        where = {"device": next(module.parameters()).device.type, "torch": torch.__version__.split("+")[0]}
        save(path, module, **facts, **where, seconds=round(time.monotonic() - start), history=history)
        _publish(path)
    else:
        for file in parts(path):
            if _sha256(file) != listed.get(file.name):
                raise CheckpointError(
                    f"{file} is not the published file: its sha256 is not that of {_sums(path.parent)}"
                )
    return load(path, module)


def published(folder: Path) -> dict[str, str]:
    """The sha256 of each published file, by name."""
    sums = _sums(folder)
    lines = sums.read_text(encoding="utf-8").splitlines() if sums.is_file() else []
    found = [re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines]
    if None in found:
        raise CheckpointError(f"{sums} has the line {lines[found.index(None)]!r}; wanted a sha256 and a file's name")
    return {match[2]: match[1] for match in found}


def _publish(path: Path) -> None:
    """Put down a file's sha256, whatever other processes put down meanwhile."""
    sums = _sums(path.parent)
    with alone(path.parent):
        listed = published(path.parent) | {path.name: _sha256(path)}
        text = "".join(f"{listed[name]}  {name}\n" for name in sorted(listed)).encode()
        with explained(sums, len(text)):
            put(sums, text)


def _sums(folder: Path) -> Path:
    return folder / "SHA256SUMS"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
