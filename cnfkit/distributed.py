"""Several processes that train or measure one model together: who is who, and what they tell each other.

``torchrun`` starts them, and :func:`joined` lets them meet. In a single process, which is the rule, everything here
gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn


@contextmanager
def joined() -> Iterator[None]:
    """The processes that ``torchrun`` started meet, each with a device of its own, and part at the end."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not distributed.is_available():
        yield
        return
    cuda = torch.cuda.is_available() and os.environ.get("CNFKIT_DEVICE", "auto") in ("", "auto", "cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **_meeting_place())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _meeting_place() -> dict:
    """Where processes of one machine leave their addresses: not where those before a restart, now dead, left theirs.

    Of several machines each counts its own restarts, so that no count is theirs all, and PyTorch's own place remains.
    """
    around = os.environ
    if around["LOCAL_WORLD_SIZE"] != around["WORLD_SIZE"]:
        return {}
    store, own, many = next(distributed.rendezvous("env://"))
    place = distributed.PrefixStore(f"start_{around['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": place, "rank": own, "world_size": many}


def processes() -> int:
    """How many there are."""
    return distributed.get_world_size() if _several() else 1


def rank() -> int:
    """Which of them this one is; the first, 0, does what is to be done once, such as to write files."""
    return distributed.get_rank() if _several() else 0


def wait() -> None:
    """Wait until all have come to this point."""
    if _several():
        distributed.barrier()


def total(values: Tensor) -> Tensor:
    """The sum over the processes, the same bits on all of them."""
    if not _several():
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values


def any_of(flag: bool) -> bool:
    """Whether it is true on at least one of them."""
    return bool(total(torch.tensor(float(flag)))) if _several() else flag


@contextmanager
def agreed() -> Iterator[None]:
    """What is done here with a ``FloatingPointError`` on one of them ends with one on all of them."""
    try:
        yield
    except FloatingPointError:
        any_of(True)
        raise
    if any_of(False):
        raise FloatingPointError("another process found numbers that are not finite, and says which")


def from_first(values: Tensor) -> Tensor:
    """Those of the first process."""
    if _several():
        distributed.broadcast(values, 0)
    return values


def mine(rows: Tensor) -> Tensor:
    """This process's share of rows that all of them have: every so manieth."""
    return rows[rank() :: processes()]


def together(rows: Tensor, n: int) -> Tensor:
    """All ``n`` rows, from the share that each process has, in the order that :func:`mine` took them from."""
    every = rows.new_zeros(n, *rows.shape[1:])
    every[rank() :: processes()] = rows
    return total(every)


def parallel(loss: nn.Module) -> nn.Module:
    """The loss, whose gradients are from here on the means over the processes."""
    if not _several():
        return loss
    device = next(loss.parameters()).device
    return nn.parallel.DistributedDataParallel(loss, device_ids=[device] if device.type == "cuda" else None)


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
