"""Several processes: they take the steps of one, agree on what fails, and start again where a worker died."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_training import OPTIONS, Noisy, data, same, weights

import cnfkit as ck
from cnfkit import distributed
from cnfkit.__main__ import main

HERE = Path(__file__).parent


def launch(folder: Path, script: str, processes: int = 2, restarts: int = 0, **environment) -> str:
    """Run a script by ``torchrun``; its output."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script))
    return run(folder, str(path), processes=processes, restarts=restarts, **environment)


def run(folder: Path, *arguments: str, processes: int = 2, restarts: int = 0, **environment) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               f"--max-restarts={restarts}", *arguments]  # fmt: skip
    settings = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# What each of two processes does in the tests below, in one launch, because each takes seconds to begin.
TOGETHER = """
import json, os, warnings
import torch
import cnfkit as ck
from cnfkit.distributed import joined, rank
from test_training import OPTIONS, Noisy, data
from test_distributed import diverging, guarded, image_model, stopping

torch.set_num_threads(1)
found = {}
with joined():
    loss = Noisy().double()
    history = ck.fit(loss, data().double(), **OPTIONS)
    ck.save("same.safetensors", loss.model)
    found["train"], found["validation"] = history.train, history.validation

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = ck.fit(diverging(on=1), data(), **OPTIONS)
    found["recovered"], found["said"] = history.recovered, [str(w.message) for w in said if "back to" in str(w.message)]

    found["stopped"] = stopping(on=1)

    loss, history = guarded()
    found["grid"] = loss.solve.solve.times
    ck.save(f"guarded{rank()}.safetensors", loss.model)

    result = ck.evaluate(*image_model(), draws=3, bin_centres=True, seed=0)
    found["bits"] = [result.nll, result.standard_error, result.importance_weighted, result.bin_centres]
    with open(f"found{rank()}.json", "w") as file:
        json.dump(found, file)
"""


def diverging(on: int) -> Noisy:
    """A loss that is not finite once, on one of the processes."""

    def spoil():
        if distributed.rank() == on:
            raise FloatingPointError("spoilt")

    return Noisy(at=13, do=spoil)


def stopping(on: int) -> int:
    """The step at which a run ends when one of the processes is told to."""
    asked = []

    def stop() -> bool:
        asked.append(True)
        return distributed.rank() == on and len(asked) == 7

    ck.fit(Noisy(), data(), stop=stop, **OPTIONS)
    return len(asked)


def guarded() -> tuple[ck.NegativeLogLikelihood, ck.History]:
    """A run on a grid that an adaptive solve chooses."""
    torch.manual_seed(0)
    flow = ck.Flow(ck.Normal(2), ck.CNF(ck.MLPField(2, (8,))))
    loss = ck.NegativeLogLikelihood(flow, solve=ck.FrozenGrid(every=3, rows=4))
    return loss, ck.fit(loss, data(), **OPTIONS)


def image_model() -> tuple[ck.Dequantised, torch.Tensor, None, ck.Solve]:
    """A flow of small images with a probe, on a given grid."""
    torch.manual_seed(0)
    model = ck.Dequantised(ck.ffjord((1, 4, 4), blocks=1, hidden=(4,)), ck.UniformDequantiser(17))
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    k = torch.randint(17, (7, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return model, k, None, ck.Solve(trace="hutchinson").on(ck.uniform_grid(2))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("together")
    launch(folder, TOGETHER)
    return folder, [json.loads((folder / f"found{k}.json").read_text()) for k in range(2)]


def test_two_processes_take_the_steps_of_one_that_takes_batches_in_two_parts(together):
    folder, found = together
    loss = Noisy().double()
    history = ck.fit(loss, data().double(), accumulate=2, **OPTIONS)
    both, alone = Noisy().double(), Noisy().double()
    ck.load(folder / "same.safetensors", both.model)
    assert not same(alone, both)
    for came, wanted in zip(weights(both), weights(loss), strict=True):
        torch.testing.assert_close(came, wanted, rtol=1e-9, atol=1e-9)
    for one in found:
        assert one["train"] == pytest.approx(history.train, rel=1e-9)
        assert one["validation"] == pytest.approx(history.validation, rel=1e-9)


def test_a_batch_in_parts_is_the_batch():
    """Parts of unequal sizes too: their losses are weighted."""
    runs = {}
    for parts in (1, 3, 16):
        torch.manual_seed(0)
        loss = ck.NegativeLogLikelihood(ck.realnvp(2, layers=2, hidden=(4,)).double())
        runs[parts] = ck.fit(loss, data().double(), accumulate=parts, **OPTIONS)
        assert list(runs[parts].terms) == ["nll"]
    for parts in (3, 16):
        assert runs[parts].train == pytest.approx(runs[1].train, rel=1e-9)
        assert runs[parts].validation == pytest.approx(runs[1].validation, rel=1e-9)


def test_more_parts_than_points_are_refused():
    with pytest.raises(ValueError, match="batch is 16; wanted at least 17, the parts it comes in"):
        ck.fit(Noisy(), data(), accumulate=17, **OPTIONS)
    with pytest.raises(ValueError, match="accumulate is 0; wanted a whole number of at least 1"):
        ck.fit(Noisy(), data(), accumulate=0, **OPTIONS)


def test_what_fails_on_one_goes_back_on_all_and_is_said_once(together):
    first, second = together[1]
    assert first["recovered"] == second["recovered"] == [13]
    assert len(first["said"]) == 1 and not second["said"]
    assert "another process found numbers that are not finite" in first["said"][0]


def test_a_stop_of_one_is_a_stop_of_all(together):
    assert [one["stopped"] for one in together[1]] == [7, 7]


def test_all_solve_on_the_grid_that_the_first_chose(together):
    folder, (first, second) = together
    assert first["grid"] == second["grid"] and len(first["grid"]) > 2
    loss, states = guarded()[0], []
    for k in range(2):
        ck.load(folder / f"guarded{k}.safetensors", loss.model)
        states.append(weights(loss.model))
    assert all(a.equal(b) for a, b in zip(*states, strict=True))


def test_a_shared_evaluation_is_that_of_one_process(together):
    result = ck.evaluate(*image_model(), draws=3, bin_centres=True, seed=0)
    alone = [result.nll, result.standard_error, result.importance_weighted, result.bin_centres]
    for one in together[1]:
        assert one["bits"] == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_evaluation_does_not_depend_on_its_batches(batch):
    model, k, *others = image_model()
    whole, parts = (ck.evaluate(model, k, *others, draws=2, seed=0, batch=size) for size in (7, batch))
    assert parts.nll == pytest.approx(whole.nll, abs=1e-6)
    assert ck.evaluate(model, k, *others, draws=2, seed=1).nll != pytest.approx(whole.nll, abs=1e-4)


# The command, with a worker that is killed

CONFIG = """
[data]
name = "two_moons"
points = 200

[model]
name = "ffjord"
hidden = [8]

[loss]
every = 5

[training]
steps = 12
batch = 16
records = 4
ema = 0.9

[evaluation]
method = "rk4"
steps = 4
"""
KILLED = """
import os, signal, sys
from cnfkit import run
from cnfkit.__main__ import main

update = run.Run.update

def dies_once(self):
    if self.step == 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    update(self)

run.Run.update = dies_once
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_goes_on_when_a_worker_was_killed(tmp_path, capsys):
    (tmp_path / "tiny.toml").write_text(CONFIG)
    (tmp_path / "killed.py").write_text(KILLED)
    said = run(tmp_path, "-m", "cnfkit", "train", "tiny.toml", "--output", "straight")
    assert said.count("parameters, on cpu") == 1 and said.count("step 12 of 12") == 1 and said.count("test: ") == 1
    again = run(tmp_path, "killed.py", "train", "tiny.toml", "--output", "killed", "--resume", restarts=1)
    assert again.count("parameters, on cpu") == 2, "it began twice"
    straight, killed = (ck.inspect(tmp_path / name / "model.safetensors").facts for name in ("straight", "killed"))
    assert straight["history"] == killed["history"] and straight["test"] == killed["test"]
    assert main(["evaluate", str(tmp_path / "killed")]) == 0
    assert capsys.readouterr().out.strip() == said.strip().splitlines()[-1]
