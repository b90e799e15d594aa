"""What the environment decides: the device, the length of a run, where data lie, and what a notebook shows."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def device() -> torch.device:
    """The device that the course computes on, from ``CNFKIT_DEVICE``.

    ``auto`` (the default) takes CUDA, then Apple's MPS, then the CPU. Notebooks draw their data on the CPU with a
    seeded generator and move it here, so that every device sees the same numbers.

    Returns:
        A ``torch.device``.

    Raises:
        ValueError: if ``CNFKIT_DEVICE`` is not one of ``auto``, ``cpu``, ``cuda``, ``mps``.
        RuntimeError: if the device that it names is not there.

    >>> device().type in {"cpu", "cuda", "mps"}
    True
    """
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    name = os.environ.get("CNFKIT_DEVICE", "auto").strip().lower() or "auto"
    if name == "auto":
        name = next(kind for kind, available in there.items() if available())
    if name not in there:
        raise ValueError(f"CNFKIT_DEVICE is {name!r}; wanted one of auto, {', '.join(sorted(there))}")
    if not there[name]():
        raise RuntimeError(
            f"CNFKIT_DEVICE asks for {name}, which PyTorch {torch.__version__} does not find on this machine; "
            "set CNFKIT_DEVICE=cpu, or install the PyTorch build for your device"
        )
    return torch.device(name)


def steps(full: int, smoke: int = 2) -> int:
    """The number of training steps: fewer when ``CNFKIT_FAST=1`` asks for a dry run.

    Args:
        full: the steps of a real run.
        smoke: those of a dry run.

    Raises:
        ValueError: if ``CNFKIT_FAST`` is neither 1 nor 0.

    >>> steps(1000, smoke=2) in (1000, 2)
    True
    """
    return smoke if switch("CNFKIT_FAST") else full


def retrain() -> bool:
    """Whether ``CNFKIT_RETRAIN=1`` asks chapters to train what they would otherwise load.

    Raises:
        ValueError: if ``CNFKIT_RETRAIN`` is neither 1 nor 0.
    """
    return switch("CNFKIT_RETRAIN")


def data_folder() -> Path:
    """Where data sets are looked for: ``CNFKIT_DATA``, else ``~/.cache/cnfkit``."""
    return Path(os.environ.get("CNFKIT_DATA") or Path.home() / ".cache" / "cnfkit").expanduser()


def set_precision(deterministic: bool = False) -> None:
    """How CUDA computes from here on: in float32 and not TF32, whose rounding adaptive steps would take for an error.

    Args:
        deterministic: whether it gives the same bits each time, as the CPU does; else it looks for the fastest way.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def live() -> bool:
    """Whether figures may show live ipywidgets controls: in a notebook's kernel, unless ``CNFKIT_LIVE=0``."""
    return in_kernel() and switch("CNFKIT_LIVE", default=True)


def progress() -> bool:
    """Whether long work shows a bar: in a terminal or notebook, unless ``CNFKIT_PROGRESS=0``."""
    return switch("CNFKIT_PROGRESS", default=in_kernel() or sys.stderr.isatty())


def in_kernel() -> bool:
    """Whether this code runs in a Jupyter kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def switch(name: str, default: bool = False) -> bool:
    """An environment variable that is on (``1``) or off (``0`` or empty)."""
    value = os.environ.get(name, "1" if default else "0").strip()
    if value not in {"", "0", "1"}:
        raise ValueError(f"{name} is {value!r}; wanted 1 or 0")
    return value == "1"
