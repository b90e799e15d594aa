"""Checkpoints: whole or not at all, and refused with a reason."""

import copy
import errno
import json
import os

import pytest
import safetensors.torch
import torch
from builders import redrawn
from torch import nn

import cnfkit as ck
from cnfkit import CheckpointError, load, save

FACTS = {"seed": 0, "command": "python -m …", "nll": 1.25, "history": [1.5, 0.1 + 0.2]}


def model(seed: int = 0, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return redrawn(nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width)), seed)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def test_round_trip(path):
    saved, loaded = model(), model(seed=1)
    save(path, saved, **FACTS)
    assert not equal(state(saved), state(loaded))
    assert load(path, loaded) == FACTS
    assert equal(state(saved), state(loaded))


def test_float64_and_integers_keep_their_bits(path):
    saved, loaded = model().double(), model(seed=1).double()
    saved[1].num_batches_tracked += 2**40 + 1
    save(str(path), saved)
    assert load(str(path), loaded) == {} and equal(state(saved), state(loaded))


def test_other_programs_can_read_it(path):
    save(path, model(), seed=1)
    assert equal(safetensors.torch.load_file(path), state(model()))
    with safetensors.safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["cnfkit"]) == {"facts": {"seed": 1}, "model": []}


def test_same_weights_same_bytes(tmp_path):
    """So that a sha256 can stand beside a checkpoint."""
    for name in "ab":
        save(tmp_path / name, model(), **FACTS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    save(tmp_path / "new" / "folder" / "flow.safetensors", model())
    save(tmp_path / "new" / "folder" / "flow.safetensors", model(seed=1))
    assert os.listdir(tmp_path / "new" / "folder") == ["flow.safetensors"]


def test_shared_and_transposed_weights_are_saved(path):
    """safetensors itself refuses tensors that share memory."""
    saved = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    saved[1].weight = saved[0].weight
    saved[0].register_buffer("turned", torch.arange(6.0).view(2, 3).T)
    save(path, saved)
    loaded = copy.deepcopy(saved)
    with torch.no_grad():
        loaded[0].weight.zero_()
    load(path, loaded)
    assert equal(state(saved), state(loaded))


# What cannot be used


def refused(path, module: nn.Module, error: type[Exception], message: str) -> None:
    before = state(module)
    with pytest.raises(error, match=message):
        load(path, module)
    assert equal(state(module), before), "a module is filled wholly or not at all"


def test_missing(path):
    refused(path, model(), FileNotFoundError, "no checkpoint at .*flow.safetensors; train the model first")


def test_a_folder_in_its_place(path):
    path.mkdir()
    refused(path, model(), FileNotFoundError, "no checkpoint at")
    with pytest.raises(OSError):
        save(path, model())
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -100, -1])
def test_truncated(path, keep):
    save(path, model(), **FACTS)
    path.write_bytes(path.read_bytes()[:keep])
    refused(
        path, model(1), CheckpointError, "flow.safetensors is damaged or no safetensors file .*delete it to start anew"
    )


@pytest.mark.parametrize(
    "content",
    [b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04" + b"x" * 60, b'{"a": 1}' * 9, (8).to_bytes(8, "little") + b"not JSON"],
    ids=["zeros", "ones", "a zip archive", "JSON", "a header that is none"],
)
def test_garbage(path, content):
    path.write_bytes(content)
    refused(path, model(), CheckpointError, "damaged or no safetensors file")


def test_foreign(path):
    safetensors.torch.save_file(state(model()), path)
    refused(path, model(1), CheckpointError, "was not written by cnfkit")
    safetensors.torch.save_file(state(model()), path, metadata={"cnfkit": "{"})
    refused(path, model(1), CheckpointError, "damaged")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: model(width=4), r"0.weight is \(3, 2\) float32, wanted \(4, 2\) float32; .*; and 3 more"),
        (lambda: model()[:1], "1.bias is not of this model; .*; and 2 more"),
        (lambda: nn.Sequential(*model(), nn.Linear(3, 1)), "2.weight is missing; 2.bias is missing$"),
    ],
    ids=["another width", "fewer layers", "more layers"],
)
def test_made_by_another_model(path, other, message):
    save(path, model())
    refused(path, other(), CheckpointError, f"was made by another model: .*{message}")


# What must not happen while writing


def test_a_target_that_cannot_be_replaced_keeps_its_content(path, monkeypatch):
    """A read-only folder cannot be tried as root, so the system call that it would refuse is made to."""
    save(path, model(), seed=0)
    content = path.read_bytes()

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError):
        save(path, model(1), seed=1)
    assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_stops_half_way_keeps_the_old_file(path, monkeypatch, error):
    save(path, model(), seed=0)

    def stop(_):
        raise error

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(type(error)):
        save(path, model(1), seed=1)
    monkeypatch.undo()
    assert os.listdir(path.parent) == [path.name] and load(path, model(1)) == {"seed": 0}


def test_facts_that_json_cannot_hold_leave_the_old_file(path):
    save(path, model(), seed=0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(path, model(1), weights=torch.zeros(2))
    assert os.listdir(path.parent) == [path.name] and load(path, model(1)) == {"seed": 0}


def test_settings_that_no_shape_shows_are_compared(path):
    """The same weights under another bound are another density."""

    def coupling(bound):
        return ck.AffineCoupling(ck.mask("even", 2), ck.MLP(2, 4), bound=bound)

    save(path, coupling(2.0))
    with pytest.raises(CheckpointError, match=r"bound=2.0\) where this one has AffineCoupling\(\(2,\), bound=5.0\)"):
        load(path, coupling(5.0))


def test_float64_weights_are_not_rounded_in_silence(path):
    save(path, model().double())
    with pytest.raises(CheckpointError, match=r"float64, wanted .* float32"):
        load(path, model())


def test_a_training_run_says_what_it_is(path):
    flow = ck.Flow(ck.Normal(1), ck.Diagonal(1))
    ck.fit(ck.NegativeLogLikelihood(flow), torch.randn(20, 1), steps=2, checkpoint=path)
    with pytest.raises(CheckpointError, match="is a training run; resume it with fit"):
        load(path, flow)
