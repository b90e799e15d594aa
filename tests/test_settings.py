"""What the environment decides."""

import sys
import types
from pathlib import Path

import pytest
import torch

import cnfkit
from cnfkit import settings


def machine(monkeypatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("value", "cuda", "mps", "expected"),
    [
        ("auto", False, False, "cpu"),
        ("auto", True, False, "cuda"),
        ("auto", False, True, "mps"),
        ("auto", True, True, "cuda"),
        ("", False, False, "cpu"),
        (None, False, True, "mps"),
        ("cpu", True, True, "cpu"),
        ("cuda", True, False, "cuda"),
        ("mps", False, True, "mps"),
        (" CPU ", True, False, "cpu"),
    ],
)
def test_device(monkeypatch, value, cuda, mps, expected):
    machine(monkeypatch, cuda=cuda, mps=mps)
    if value is None:
        monkeypatch.delenv("CNFKIT_DEVICE", raising=False)
    else:
        monkeypatch.setenv("CNFKIT_DEVICE", value)
    assert cnfkit.device() == torch.device(expected)


@pytest.mark.parametrize("value", ["gpu", "cuda:1", "0", "tpu"])
def test_unknown_device(monkeypatch, value):
    monkeypatch.setenv("CNFKIT_DEVICE", value)
    with pytest.raises(ValueError, match=rf"CNFKIT_DEVICE is '{value}'; wanted one of auto, cpu, cuda, mps"):
        cnfkit.device()


@pytest.mark.parametrize("value", ["cuda", "mps"])
def test_absent_device(monkeypatch, value):
    machine(monkeypatch, cuda=False, mps=False)
    monkeypatch.setenv("CNFKIT_DEVICE", value)
    with pytest.raises(RuntimeError, match=rf"asks for {value}, which PyTorch .* does not find.*CNFKIT_DEVICE=cpu"):
        cnfkit.device()


@pytest.mark.parametrize(("value", "expected"), [("1", 2), ("0", 1000), ("", 1000), (None, 1000)])
def test_fast(monkeypatch, value, expected):
    monkeypatch.delenv("CNFKIT_FAST", raising=False)
    if value is not None:
        monkeypatch.setenv("CNFKIT_FAST", value)
    assert cnfkit.steps(1000) == expected
    assert cnfkit.steps(1000, smoke=7) == (7 if expected == 2 else 1000)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), (None, False)])
def test_retrain(monkeypatch, value, expected):
    monkeypatch.delenv("CNFKIT_RETRAIN", raising=False)
    if value is not None:
        monkeypatch.setenv("CNFKIT_RETRAIN", value)
    assert cnfkit.retrain() is expected


def test_switches_are_on_or_off(monkeypatch):
    monkeypatch.setenv("CNFKIT_FAST", "yes")
    with pytest.raises(ValueError, match="CNFKIT_FAST is 'yes'; wanted 1 or 0"):
        cnfkit.steps(10)


def test_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CNFKIT_DATA", str(tmp_path))
    assert settings.data_folder() == tmp_path
    monkeypatch.setenv("CNFKIT_DATA", "~/somewhere")
    assert settings.data_folder() == Path.home() / "somewhere"
    monkeypatch.delenv("CNFKIT_DATA")
    assert settings.data_folder() == Path.home() / ".cache" / "cnfkit"


def test_a_kernel_is_known_by_its_shell(monkeypatch):
    import IPython

    for shell, expected in ((None, False), (types.SimpleNamespace(), False), (types.SimpleNamespace(kernel=1), True)):
        monkeypatch.setattr(IPython, "get_ipython", lambda shell=shell: shell)
        assert settings.in_kernel() is expected
    monkeypatch.setitem(sys.modules, "IPython", None)  # as if it were not installed
    assert settings.in_kernel() is False


@pytest.mark.parametrize(
    ("kernel", "value", "expected"), [(True, None, True), (True, "1", True), (True, "0", False), (False, "1", False)]
)
def test_live_controls(monkeypatch, kernel, value, expected):
    monkeypatch.setattr(settings, "in_kernel", lambda: kernel)
    monkeypatch.delenv("CNFKIT_LIVE", raising=False)
    if value is not None:
        monkeypatch.setenv("CNFKIT_LIVE", value)
    assert settings.live() is expected
