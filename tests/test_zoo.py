"""Published weights: loaded when they are the published ones, trained when asked for, refused otherwise."""

import hashlib
import os
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import cnfkit as ck
from cnfkit import atomic, zoo

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "notebooks" / "checkpoints"
sys.path.insert(0, str(ROOT / "book"))

import make_card  # noqa: E402  (the script that writes its README.md)


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


def test_weights_that_are_too_large_to_publish_are_not_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("CNFKIT_RETRAIN", "1")
    with pytest.raises(ValueError, match=r"module has weights of 4.0 MB; wanted at most 4, to publish"):
        ck.trained(tmp_path / "a.safetensors", torch.nn.Linear(1000, 1000), pytest.fail)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("line", ["", "a.safetensors", "0" * 64 + " a", "0" * 63 + "  a", "0" * 64 + "  "])
def test_sums_that_cannot_be_read_are_not_written_over(tmp_path, monkeypatch, line):
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  b\n{line}\n{'1' * 64} *c\n")
    with pytest.raises(
        ck.CheckpointError, match=f"SHA256SUMS has the line '{line}'; wanted a sha256 and a file's name"
    ):
        run(tmp_path / "a.safetensors", monkeypatch, retrain=True)
    assert os.listdir(tmp_path) == ["SHA256SUMS"]


def test_sums_keep_names_with_spaces_and_binary_marks(tmp_path, monkeypatch):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  b c\n{'1' * 64} *d\n")
    run(tmp_path / "a.safetensors", monkeypatch, retrain=True)
    listed = zoo.published(tmp_path)
    assert list(listed) == ["a.safetensors", "b c", "d"] and listed["b c"] == "0" * 64 and listed["d"] == "1" * 64


def test_sums_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run(tmp_path / "a.safetensors", monkeypatch, retrain=True)
    content = (tmp_path / "SHA256SUMS").read_text()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zoo, "save", lambda path, *_, **__: path.write_bytes(b"new"))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match=r"this was not written, .*: '.*SHA256SUMS'"):
        run(tmp_path / "b.safetensors", monkeypatch, retrain=True)
    assert (tmp_path / "SHA256SUMS").read_text() == content
    assert sorted(os.listdir(tmp_path)) == ["SHA256SUMS", "a.safetensors", "b.safetensors"]


def test_processes_that_train_at_once_lose_no_sum(tmp_path, monkeypatch):
    def slowly(path, data):
        time.sleep(0.05)
        atomic.put(path, data)

    monkeypatch.setattr(zoo, "put", slowly)
    names, children = [f"{k}.safetensors" for k in range(4)], []
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 dislikes forks beside threads
            child = os.fork()
        if not child:
            try:
                run(tmp_path / name, monkeypatch, retrain=True)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert list(zoo.published(tmp_path)) == names
    for name in names:
        run(tmp_path / name, monkeypatch, retrain=False)


def test_shards_are_not_taken_for_the_published_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    run(path, monkeypatch, retrain=True)
    monkeypatch.setattr(ck.checkpoint, "SHARD", 500)
    ck.save(path, flow())
    assert not path.exists() and len(os.listdir(tmp_path)) == 4
    with pytest.raises(ck.CheckpointError, match=r"a.safetensors.index.json is not the published file"):
        run(path, monkeypatch, retrain=False)


# The weights of the course


def test_every_published_file_is_listed_small_and_says_how_it_was_made():
    listed = zoo.published(ZOO)
    assert sorted(path.name for path in ZOO.iterdir()) == sorted([*listed, "README.md", "SHA256SUMS"])
    assert len(listed) > 50
    for name, sum in listed.items():
        content = (ZOO / name).read_bytes()
        assert len(content) <= 4e6 and hashlib.sha256(content).hexdigest() == sum, name
        facts = ck.inspect(ZOO / name).facts
        assert {"command", "seed", "seconds", "device", "torch", "history"} <= facts.keys(), name
        assert facts["history"]["steps"] and len(facts["history"]["train"]) == len(facts["history"]["steps"]), name


def test_the_card_says_what_the_files_say():
    assert (ZOO / "README.md").read_text(encoding="utf-8") == make_card.card(ZOO), "run book/make_card.py"


def test_a_card(tmp_path, monkeypatch):
    """Of two chapters, one without a notebook; of three models, two of which are made alike."""
    monkeypatch.setenv("CNFKIT_RETRAIN", "1")
    (tmp_path / "02_first.md").write_text("---\n---\n# The first\n\n# no title\n")
    folder = tmp_path / "checkpoints"
    history = ck.History(steps=[1, 2], train=[2.0, 1.0], validation=[1.5, 1.23456], best_step=2)

    def made(name, module, history, **facts):
        ck.trained(folder / name, module, lambda: history, command="make it", **facts)

    couplings = [ck.AffineCoupling(ck.mask("even", 2), ck.MLP(2, 4, hidden=(3,)), bound=k) for k in (2.0, 3.0, 3.0)]
    made("02_b.safetensors", flow(), history, seed=1)
    made("02_a.safetensors", flow(), history, seed=0, nll=0.123456, note="not a number")
    made("02_c.safetensors", ck.Flow(ck.Normal(2), ck.Chain(*couplings[:2])), ck.History(steps=[7], train=[1.0]))
    made("03_a.safetensors", ck.Flow(ck.Normal(2), ck.Chain(*couplings[1:])), history, seed=2)
    made("03_b.safetensors", ck.Flow(ck.Normal(2), ck.Chain(*couplings[1:])), history, seed=3)
    version = torch.__version__.split("+")[0]

    def row(name, seed, steps, held_out):
        size = f"{(folder / f'{name}.safetensors').stat().st_size / 1000:.0f}"
        return f"| [{name}]({name}.safetensors) | {size} | {seed} | {steps} | {held_out} | 0 | cpu | {version} |"

    head, first, second = make_card.card(folder).split("\n## ")
    assert "SHA256SUMS" in head
    title, alike, coupled = first.split("\n\n`make it`\\\n")
    assert title == "[02 The first](../02_first.ipynb)"
    assert alike.splitlines()[0] == "Normal((2,)), Diagonal((2,)): 4 numbers"
    rows = [row("02_a", 0, 2, "validation 1.235, nll 0.1235"), row("02_b", 1, 2, "validation 1.235")]
    assert alike.splitlines()[-2:] == rows
    assert coupled.splitlines()[0] == "Normal((2,)), 2 × AffineCoupling, 2 × MLP: 54 numbers"
    assert coupled.splitlines()[-1] == row("02_c", "", 7, "")
    assert second.startswith(
        "03\n\n`make it`\\\nNormal((2,)), 2 × AffineCoupling((2,), bound=3.0), 2 × MLP: 54 numbers"
    )
    assert second.splitlines()[-2:] == [row(f"03_{k}", n, 2, "validation 1.235") for k, n in (("a", 2), ("b", 3))]


def test_a_dry_run_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setenv("CNFKIT_FAST", "1")
    facts, _, calls = run(tmp_path / "a.safetensors", monkeypatch, retrain=True)
    assert calls == [1] and facts["seed"] == 7 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("facts", "error"), [({"history": []}, ValueError), ({"note": object()}, TypeError)])
def test_facts_are_refused_before_the_training(tmp_path, monkeypatch, facts, error):
    monkeypatch.setenv("CNFKIT_RETRAIN", "1")
    with pytest.raises(error, match=next(iter(facts))):
        ck.trained(tmp_path / "a.safetensors", flow(), lambda: pytest.fail("it was trained"), **facts)
