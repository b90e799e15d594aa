"""fit(): it finds known optima, resumes to the bit, keeps the best weights, and says what went wrong."""

import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from builders import seeded, two_moons_flow
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from cnfkit import (
    Affine,
    CheckpointError,
    Dequantised,
    Diagonal,
    Flow,
    History,
    NegativeLogLikelihood,
    Normal,
    UniformDequantiser,
    fit,
    save,
    toy_density,
)
from cnfkit import checkpoint as files

STEPS = 20
OPTIONS = dict(steps=STEPS, batch=16, lr=1e-2, records=5, progress=False)


def data(n: int = 200) -> torch.Tensor:
    return toy_density("two_moons").sample(n, seeded())


class Noisy(NegativeLogLikelihood):
    """A loss that draws noise, as dequantisation does, and can be told to do something at its k-th training call."""

    def __init__(self, at: int | None = None, do=None, validating: bool = False) -> None:
        torch.manual_seed(0)  # the same start for every run that is compared
        super().__init__(two_moons_flow(layers=2))
        self.at, self.do, self.validating, self.calls = at, do, validating, 0

    def forward(self, batch, generator=None):
        if self.training != self.validating:
            self.calls += 1
            if self.calls - 1 == self.at:
                self.do()
        return super().forward(batch + 0.1 * torch.randn(batch.shape, generator=generator))


def interrupt():
    raise KeyboardInterrupt


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(x.equal(y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[Noisy, History]:
    loss = Noisy()
    return loss, fit(loss, data(), **OPTIONS)


# Optima


def test_one_gaussian_is_found():
    """The best normal distribution has the data's mean and deviation; its NLL is log σ + ½ log 2πe."""
    points = 3 + 2 * torch.randn(500, 1, generator=seeded())
    flow = Flow(Normal(1), Diagonal(1))
    before = -flow.log_prob(points).mean().item()
    fit(NegativeLogLikelihood(flow), points, steps=300, batch=500, lr=0.1, validation=0, progress=False)
    optimum = points.std(correction=0).log().item() + 0.5 * math.log(2 * math.pi * math.e)
    after = -flow.log_prob(points).mean().item()
    assert before > optimum + 1
    assert -1e-5 < after - optimum < 1e-4
    assert -(flow.bijection.shift / flow.bijection.log_scale.exp()).item() == pytest.approx(
        points.mean().item(), abs=1e-2
    )


def test_a_correlated_gaussian_is_found():
    points = torch.randn(400, 2, generator=seeded()) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]]) + 1
    flow = Flow(Normal(2), Affine(torch.eye(2)))
    fit(NegativeLogLikelihood(flow), points, steps=400, batch=400, lr=0.05, validation=0, progress=False)
    optimum = 0.5 * torch.logdet(torch.cov(points.T, correction=0)).item() + math.log(2 * math.pi * math.e)
    assert -1e-5 < -flow.log_prob(points).mean().item() - optimum < 1e-3


def test_a_coupling_flow_learns_two_moons():
    history = fit(Noisy(), data(2000), **OPTIONS | dict(steps=150, batch=200, records=10))
    assert history.train[-1] < history.train[0] - 0.2 and history.validation[-1] < history.validation[0] - 0.1


def test_whole_numbers_are_trained_on():
    levels = torch.randint(4, (100, 3), generator=seeded(), dtype=torch.uint8)
    model = Dequantised(Flow(Normal(3), Diagonal(3)), UniformDequantiser(4))
    history = fit(NegativeLogLikelihood(model, unit="bits"), levels, **OPTIONS | dict(steps=60, lr=0.1))
    assert history.train[-1] < history.train[0]


# The record


def assert_resumes_to(uninterrupted, path) -> None:
    """A run taken up from a file ends in the same bits, and with the same history, as one that was never broken off."""
    reference, expected = uninterrupted
    resumed = Noisy()
    assert fit(resumed, data(), checkpoint=path, **OPTIONS) == expected and same(resumed, reference)


def test_history(uninterrupted):
    _, history = uninterrupted
    assert history.steps == [4, 8, 12, 16, 20]
    assert len(history.train) == len(history.validation) == 5
    assert history.best_step == history.steps[history.validation.index(min(history.validation))]


@pytest.mark.parametrize(("steps", "records", "expected"), [(7, 3, [3, 5, 7]), (3, 10, [1, 2, 3]), (1, 1, [1])])
def test_the_last_step_is_always_recorded(steps, records, expected):
    assert fit(Noisy(), data(), **OPTIONS | dict(steps=steps, records=records)).steps == expected


def test_training_losses_are_means_since_the_record_before():
    seen = []

    class Watched(Noisy):
        def forward(self, batch, generator=None):
            loss, terms = super().forward(batch, generator)
            seen.append(loss.item())
            return loss, terms

    history = fit(Watched(), data(), **OPTIONS | dict(validation=0))
    means = [sum(seen[k : k + 4]) / 4 for k in range(0, STEPS, 4)]
    assert history.train == pytest.approx(means, rel=1e-5) and history.validation == []
    assert history.best_step == STEPS


def test_without_a_validation_split_the_last_weights_stay():
    """What is kept is decided by held-out points alone."""
    loss, updates = Noisy(), []
    hook = register_optimizer_step_post_hook(lambda *_: updates.append(weights(loss)))
    try:
        fit(loss, data(), **OPTIONS | dict(validation=0))
    finally:
        hook.remove()
    assert len(updates) == STEPS and all(a.equal(b) for a, b in zip(updates[-1], weights(loss), strict=True))


def test_best_weights_are_kept():
    """The held-out points are those of the start, so that every step away from it is a step too far."""
    loss = NegativeLogLikelihood(Flow(Normal(1), Diagonal(1)))
    held_out = torch.randn(500, 1, generator=seeded())
    history = fit(loss, held_out + 4, **OPTIONS | dict(lr=0.1, validation=held_out))
    assert history.best_step == 4 == history.steps[0]
    assert history.validation == sorted(history.validation)
    assert loss(held_out)[0].item() == pytest.approx(history.validation[0], rel=1e-6)


def test_best_step_without_a_finite_validation_loss():
    """The weights are those of the last step, and the history says so."""
    history = fit(Noisy(), data(), **OPTIONS | dict(validation=torch.full((4, 2), 1e30)))
    assert not any(map(math.isfinite, history.validation)) and history.best_step == STEPS


def test_mode_and_learning_rate():
    """Layers that behave otherwise in training see its mode, and the rate falls along the cosine to nearly nothing."""
    modes, rates = [], []

    class Watched(Noisy):
        def forward(self, batch, generator=None):
            modes.append((self.training, torch.is_grad_enabled()))
            return super().forward(batch, generator)

    hook = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        fit(Watched(), data(), **OPTIONS)
    finally:
        hook.remove()
    assert set(modes) == {(True, True), (False, False)} and modes.count((True, True)) == STEPS
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * k / STEPS)) for k in range(STEPS)])


# Split and order


class Recorder(nn.Module):
    """Notes which points it is asked about; each point is its own number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: dict[bool, list[list[int]]] = {True: [], False: []}

    def forward(self, batch, generator=None):
        self.batches[self.training].append(batch[:, 0].int().tolist())
        return self.weight * batch.mean(), {}


def recorded(seed: int, **options) -> tuple[list[list[int]], set[int]]:
    loss = Recorder()
    fit(
        loss,
        torch.arange(50.0).unsqueeze(-1),
        **dict(steps=10, batch=8, validation=0.2, seed=seed, progress=False) | options,
    )
    return loss.batches[True], {k for batch in loss.batches[False] for k in batch}


def test_validation_split_is_disjoint_and_deterministic():
    batches, held_out = recorded(seed=0)
    trained = {k for batch in batches for k in batch}
    assert len(held_out) == 10 and trained == set(range(50)) - held_out
    assert recorded(seed=0) == (batches, held_out)
    assert recorded(seed=1)[1] != held_out


def test_an_epoch_asks_for_every_point_once():
    """40 points in 5 batches of 8: two epochs, each a permutation, in another order."""
    batches, _ = recorded(seed=0)
    first, second = ([k for batch in part for k in batch] for part in (batches[:5], batches[5:]))
    assert len(set(first)) == 40 and sorted(first) == sorted(second) and first != second


def test_incomplete_batches_are_left_out():
    batches, _ = recorded(seed=0, batch=15)
    assert {len(batch) for batch in batches} == {15}
    assert {len(batch) for batch in recorded(seed=0, batch=1000)[0]} == {40}


def test_points_of_ones_own_are_held_out():
    loss = Recorder()
    fit(loss, torch.arange(50.0)[:, None], steps=5, validation=torch.arange(100.0, 105.0)[:, None], progress=False)
    assert {k for batch in loss.batches[False] for k in batch} == set(range(100, 105))
    assert {k for batch in loss.batches[True] for k in batch} == set(range(50))


# Checkpoints and resumption


@pytest.mark.parametrize("step", [0, 1, 4, 7, 19])
def test_interrupted_and_resumed_ends_in_the_same_bits(tmp_path, uninterrupted, step):
    reference, expected = uninterrupted
    path = tmp_path / "new folder" / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(Noisy(at=step, do=interrupt), data(), checkpoint=path, **OPTIONS)
    assert files.read(path)[1]["step"] == step
    resumed = Noisy()
    history = fit(resumed, data(), checkpoint=path, **OPTIONS)
    assert resumed.calls == STEPS - step, "no step is taken twice"
    assert history == expected and same(resumed, reference)


def test_interrupted_again_and_again(tmp_path, uninterrupted):
    path = tmp_path / "run.safetensors"
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            fit(Noisy(at=3, do=interrupt), data(), checkpoint=path, **OPTIONS)
    assert_resumes_to(uninterrupted, path)


@pytest.mark.parametrize("record", [0, 2], ids=["first record", "third record"])
def test_interrupted_while_recording(tmp_path, uninterrupted, record):
    """Between the update and its record, nothing is of one step: the record before stands."""
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(Noisy(at=record, do=interrupt, validating=True), data(), checkpoint=path, **OPTIONS)
    assert path.exists() == (record > 0)
    assert_resumes_to(uninterrupted, path)


def test_interrupted_in_the_middle_of_an_update(tmp_path, uninterrupted):
    path, updates = tmp_path / "run.safetensors", []

    def hook(*_):
        updates.append(1)
        if len(updates) == 10:
            raise KeyboardInterrupt

    handle = register_optimizer_step_post_hook(hook)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(Noisy(), data(), checkpoint=path, **OPTIONS)
    finally:
        handle.remove()
    assert files.read(path)[1]["step"] == 8
    assert_resumes_to(uninterrupted, path)


def test_killed_and_resumed_ends_in_the_same_bits(tmp_path, uninterrupted):
    """A real SIGKILL, which no handler sees: the file of the last record is whole."""
    path = tmp_path / "run.safetensors"
    code = """
        import os, signal, sys
        import test_training as t
        kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
        t.fit(t.Noisy(at=14, do=kill), t.data(), checkpoint=sys.argv[1], **t.OPTIONS)
    """
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)],
        cwd=Path(__file__).parent,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert files.read(path)[1]["step"] == 12
    assert_resumes_to(uninterrupted, path)


def test_a_finished_checkpoint_returns_at_once(tmp_path, uninterrupted):
    reference, expected = uninterrupted
    path = tmp_path / "run.safetensors"
    fit(Noisy(), data(), checkpoint=path, **OPTIONS)
    content, again = path.read_bytes(), Noisy()
    assert fit(again, data(), checkpoint=path, **OPTIONS) == expected and same(again, reference)
    assert again.calls == 0 and path.read_bytes() == content


def test_checkpoints_leave_nothing_else_behind(tmp_path):
    fit(Noisy(), data(), checkpoint=tmp_path / "run.safetensors", **OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_checkpoint_does_not_change_the_run(tmp_path, uninterrupted):
    loss = Noisy()
    history = fit(loss, data(), checkpoint=str(tmp_path / "run.safetensors"), **OPTIONS)
    assert history == uninterrupted[1] and same(loss, uninterrupted[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(steps=40), "steps=20, this one has 40"),
        (dict(batch=8), "batch=16, this one has 8"),
        (dict(lr=0.5), "lr=0.01, this one has 0.5"),
        (dict(seed=1), "seed=0, this one has 1"),
        (dict(validation=0.5), r"data='\(180, 2\) \w+', this one has '\(100, 2\)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, changed, message):
    path = tmp_path / "run.safetensors"
    fit(Noisy(), data(), checkpoint=path, **OPTIONS)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(Noisy(), data(), checkpoint=path, **OPTIONS | changed)
    assert path.read_bytes() == content


def test_checkpoints_that_are_of_no_such_run(tmp_path):
    path = tmp_path / "run.safetensors"
    other = NegativeLogLikelihood(Flow(Normal(2), Affine(torch.eye(2))))
    fit(other, data(), checkpoint=path, **OPTIONS)
    with pytest.raises(CheckpointError, match="was made by another model"):
        fit(Noisy(), data(), checkpoint=path, **OPTIONS)
    save(path, Noisy())
    with pytest.raises(CheckpointError, match="holds weights, but no training run to resume"):
        fit(Noisy(), data(), checkpoint=path, **OPTIONS)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        fit(Noisy(), data(), checkpoint=path, **OPTIONS)
    assert path.read_bytes() == b"not a checkpoint"


# When it goes wrong


class Poisoned(Noisy):
    """The loss is not finite at one step."""

    def __init__(self, at: int, value: float) -> None:
        super().__init__(at, self.poison)
        self.value, self.poisoned = value, False

    def poison(self):
        self.poisoned = True

    def forward(self, batch, generator=None):
        loss, terms = super().forward(batch, generator)
        return (loss * self.value if self.poisoned else loss), terms


def test_a_term_of_the_name_of_the_loss_does_not_take_its_place():
    class Named(NegativeLogLikelihood):
        def forward(self, batch, generator=None):
            loss, terms = super().forward(batch, generator)
            return loss, {**terms, "loss": torch.tensor(-1e6)}

    assert min(fit(Named(two_moons_flow(layers=1)), data(), **OPTIONS).train) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tmp_path, value):
    path = tmp_path / "run.safetensors"
    with pytest.raises(FloatingPointError) as failed:
        fit(Poisoned(10, value), data(), checkpoint=path, recoveries=0, **OPTIONS)
    message = str(failed.value)
    assert "step 10 of 20" in message and "smaller lr" in message and f"step 8 are in {path}" in message
    assert files.read(path)[1]["step"] == 8
    assert all(tensor.isfinite().all() for tensor in files.read(path)[0].values())


def test_a_loss_that_is_not_finite_without_a_checkpoint():
    loss = Poisoned(10, math.nan)
    with pytest.raises(FloatingPointError, match=r"step 10 of 20 .*: the loss is nan; try a smaller lr") as failed:
        fit(loss, data(), recoveries=0, **OPTIONS)
    assert "has the weights of step 8, its best" in str(failed.value) and " are in " not in str(failed.value)
    assert all(value.isfinite().all() for value in weights(loss)), "no update was made with it"


class FirstValidationIsNan(Noisy):
    """As long as there is no checkpoint, the validation loss is NaN: at the first record, that is."""

    def __init__(self, path: Path, at: int | None = None) -> None:
        super().__init__(at, interrupt)
        self.path = path

    def forward(self, batch, generator=None):
        loss, terms = super().forward(batch, generator)
        return (loss if self.training or self.path.exists() else loss * math.nan), terms


def test_a_nan_validation_loss_hides_no_later_one(tmp_path):
    """Nor does it after a resume, which finds the NaN at the head of the list."""
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    straight = FirstValidationIsNan(once)
    expected = fit(straight, data(), checkpoint=once, **OPTIONS)
    assert math.isnan(expected.validation[0]) and expected.best_step > expected.steps[0]
    with pytest.raises(KeyboardInterrupt):
        fit(FirstValidationIsNan(twice, at=9), data(), checkpoint=twice, **OPTIONS)
    resumed = FirstValidationIsNan(twice)
    history = fit(resumed, data(), checkpoint=twice, **OPTIONS)
    assert history.validation[1:] == expected.validation[1:] and history.best_step == expected.best_step
    assert same(resumed, straight)


# The bar


def test_nothing_is_written_where_no_bar_is_wanted(monkeypatch, capfd):
    monkeypatch.setenv("CNFKIT_PROGRESS", "0")
    fit(Noisy(), data(), **OPTIONS | dict(progress=None))
    assert capfd.readouterr() == ("", "")


def test_no_bar_where_nobody_looks(monkeypatch, capfd):
    """Neither a terminal nor a notebook: a log file is not filled with bars."""
    monkeypatch.delenv("CNFKIT_PROGRESS", raising=False)
    fit(Noisy(), data(), **OPTIONS | dict(progress=None))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_bar_where_one_is_wanted(monkeypatch, capfd, by):
    monkeypatch.setenv("CNFKIT_PROGRESS", "1" if by == "environment" else "0")
    fit(Noisy(), data(), **OPTIONS | dict(progress=True if by == "argument" else None))
    out, err = capfd.readouterr()
    assert out == "" and f"0/{STEPS}" in err and "step/s" in err


@pytest.mark.parametrize("part", ["data", "validation"])
def test_other_data_of_the_same_shape_are_refused(tmp_path, part):
    given = {"data": torch.randn(64, 2), "validation": torch.randn(16, 2)}

    def run():
        loss = NegativeLogLikelihood(two_moons_flow())
        fit(loss, given["data"], validation=given["validation"], steps=4, checkpoint=tmp_path / "run.safetensors")

    run()
    given[part] = given[part] + 1
    with pytest.raises(ValueError, match=f"is of a run with {part}="):
        run()
