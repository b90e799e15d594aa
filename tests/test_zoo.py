"""Published weights: loaded when they are the published ones, trained when asked for, refused otherwise."""

import hashlib

import pytest
import torch

import cnfkit as ck


def flow():
    return ck.Flow(ck.Normal(2), ck.Diagonal(2))


def run(path, monkeypatch, retrain):
    """`trained` on a fresh flow, and the calls of its training function."""
    monkeypatch.setenv("CNFKIT_RETRAIN", "1" if retrain else "0")
    model, calls = flow(), []

    def train():
        calls.append(1)
        torch.nn.init.constant_(model.bijection.shift, 3.0)
        return ck.History(steps=[1], train=[2.0])

    return ck.trained(path, model, train, seed=7), model, calls


def test_retraining_saves_weights_facts_and_sum(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    run(tmp_path / "b.safetensors", monkeypatch, retrain=True)
    facts, model, calls = run(path, monkeypatch, retrain=True)
    assert calls == [1]
    assert facts["seed"] == 7 and facts["history"]["train"] == [2.0]
    assert facts["device"] == "cpu" and facts["seconds"] == 0 and facts["torch"] == torch.__version__.split("+")[0]
    sums = dict(reversed(line.split()) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert sums[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(sums) == ["a.safetensors", "b.safetensors"]
    assert (model.bijection.shift == 3).all()


def test_loading_trains_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    run(path, monkeypatch, retrain=True)
    facts, model, calls = run(path, monkeypatch, retrain=False)
    assert calls == [] and facts["seed"] == 7
    assert (model.bijection.shift == 3).all()


def test_missing_names_the_switch(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="CNFKIT_RETRAIN=1"):
        run(tmp_path / "a.safetensors", monkeypatch, retrain=False)


@pytest.mark.parametrize("spoil", ["bytes", "sums"])
def test_other_bytes_are_refused(tmp_path, monkeypatch, spoil):
    path = tmp_path / "a.safetensors"
    run(path, monkeypatch, retrain=True)
    if spoil == "bytes":
        ck.save(path, flow())  # sound, but not what was published
    else:
        (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ck.CheckpointError, match="not the published file"):
        run(path, monkeypatch, retrain=False)
