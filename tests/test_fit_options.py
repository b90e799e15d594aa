"""fit(): schedules, clipping, averages, patience, contexts, steps that are not finite, and being killed."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from builders import seeded
from test_training import OPTIONS, STEPS, Noisy, data, same, weights
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import cnfkit as ck
from cnfkit import checkpoint as files


def cnf_loss(hidden=(8,), context: int = 0, **options) -> ck.NegativeLogLikelihood:
    torch.manual_seed(0)
    flow = ck.Flow(ck.Normal(2), ck.CNF(ck.MLPField(2, hidden, context=context)))
    return ck.NegativeLogLikelihood(flow, **options)


# Learning rates


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_learning_rates(schedule, warmup):
    rates = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        ck.fit(Noisy(), data(), schedule=schedule, warmup=warmup, **OPTIONS)
    finally:
        hook.remove()
    fall = [0.5 * (1 + math.cos(math.pi * k / STEPS)) if schedule == "cosine" else 1 for k in range(STEPS)]
    rise = [min(1, (k + 1) / warmup) if warmup else 1 for k in range(STEPS)]
    assert rates == pytest.approx([1e-2 * a * b for a, b in zip(fall, rise, strict=True)])


def test_long_gradients_are_shortened_and_short_ones_are_not():
    norms = {}

    def run(clip):
        found = norms[clip] = []

        def note(optimizer, *_):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
            found.append(torch.stack([g.norm() for g in grads]).norm().item())

        hook = register_optimizer_step_pre_hook(note)
        try:
            ck.fit(Noisy(), data(), clip=clip, **OPTIONS)
        finally:
            hook.remove()

    run(None)
    limit = norms[None][0] / 2  # the first gradient is too long by half, and the same in both runs
    run(limit)
    assert norms[limit][0] == pytest.approx(limit, rel=1e-4) and max(norms[limit]) <= limit * (1 + 1e-5)
    run(2 * max(norms[None]))
    assert norms[2 * max(norms[None])] == norms[None]


# Averages


def test_the_average_is_that_of_the_weights_after_each_step():
    loss, after = Noisy(), []
    before = weights(loss)
    hook = register_optimizer_step_post_hook(lambda *_: after.append(weights(loss)))
    try:
        ck.fit(loss, data(), ema=0.8, **OPTIONS | dict(validation=0))
    finally:
        hook.remove()
    average = before
    for k, values in enumerate(after):
        decay = min(0.8, (1 + k) / (10 + k))
        average = [decay * a + (1 - decay) * b for a, b in zip(average, values, strict=True)]
    names = [name for name, _ in loss.named_parameters()]
    state = dict(zip(loss.state_dict(), average, strict=True))
    for name in names:
        torch.testing.assert_close(loss.state_dict()[name], state[name], rtol=1e-4, atol=1e-6)
    assert not all(a.equal(b) for a, b in zip(after[-1], weights(loss), strict=True))


def test_the_average_is_what_is_validated_and_kept():
    points, held_out = data(200), data(50)
    loss = Noisy()
    history = ck.fit(loss, points, ema=0.9, **OPTIONS | dict(validation=held_out))
    again = ck.fit(Noisy(), points, **OPTIONS | dict(validation=held_out))
    assert history.train == again.train, "the average must not touch the training itself"
    assert history.validation != again.validation
    loss.eval()
    generator = torch.Generator().manual_seed(0)
    noisy = [loss(held_out, generator=generator)[0].item() for _ in range(50)]
    assert min(history.validation) == pytest.approx(sum(noisy) / 50, abs=0.1)


# Patience


def overfitted(**options):
    """The held-out points are those of the start, so that every step away from it is a step too far."""
    loss = ck.NegativeLogLikelihood(ck.Flow(ck.Normal(1), ck.Diagonal(1)))
    held_out = torch.randn(500, 1, generator=seeded())
    return ck.fit(loss, held_out + 4, **OPTIONS | dict(lr=0.1, validation=held_out) | options)


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_ends_the_run(patience):
    history = overfitted(patience=patience)
    assert history.steps == [4, 8, 12, 16, 20][: 1 + patience] and history.best_step == 4


def test_patience_is_not_tried_by_progress():
    history = ck.fit(Noisy(), data(2000), **OPTIONS | dict(steps=60, batch=200), patience=2)
    assert history.steps[-1] == 60


def test_a_run_that_lost_its_patience_stays_ended(tmp_path):
    path = tmp_path / "run.safetensors"
    history = overfitted(patience=2, checkpoint=path)
    content = path.read_bytes()
    assert overfitted(patience=2, checkpoint=path) == history and path.read_bytes() == content


# Going back


class Failing(Noisy):
    """Not finite at some of its training calls."""

    def __init__(self, at: tuple[int, ...], how: str = "nan", **options) -> None:
        super().__init__(**options)
        self.failing, self.how, self.count = at, how, 0

    def forward(self, batch, generator=None):
        loss, terms = super().forward(batch, generator)
        if not self.training:
            return loss, terms
        self.count += 1
        if self.count - 1 not in self.failing:
            return loss, terms
        if self.how == "raise":
            raise ck.SolveError("the step vanished", 0.5, 7, 1.0, "use more steps")
        return loss * {"nan": math.nan, "gradient": 1.0}[self.how] + self.poison(), terms

    def poison(self):
        if self.how != "gradient":
            return 0.0
        value = next(self.parameters()).flatten()[:1]
        return (value - value.detach()).abs().sqrt().sum()  # 0, with an infinite slope


@pytest.mark.parametrize("how", ["nan", "raise", "gradient"])
def test_a_step_that_is_not_finite_goes_back(how):
    loss = Failing((10,), how)
    with pytest.warns(RuntimeWarning, match="back to the weights of step 8, at half the learning rate"):
        history = ck.fit(loss, data(), **OPTIONS)
    assert history.recovered == ([11] if how == "gradient" else [10]), "a bad gradient shows in the next loss"
    assert history.steps == [4, 8, 12, 16, 20] and all(map(math.isfinite, history.validation))
    assert all(value.isfinite().all() for value in weights(loss))


def test_going_back_is_to_the_weights_of_the_record():
    """The steps after it are those of a run that begins there, at half the rate, with what the optimiser knew."""
    at_eight, after, rates = [], [], []

    class Watched(Failing):
        def forward(self, batch, generator=None):
            if self.training and self.count in (8, 11):  # before steps 8 and 11
                at_eight.append(weights(self))
            return super().forward(batch, generator)

    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: (
            rates.append(optimizer.param_groups[0]["lr"]),
            after.append(optimizer.state_dict()["state"][0]["step"].item()),
        )
    )
    try:
        with pytest.warns(RuntimeWarning):
            ck.fit(Watched((10,)), data(), **OPTIONS)
    finally:
        hook.remove()
    assert all(a.equal(b) for a, b in zip(*at_eight, strict=True))
    assert len(rates) == STEPS - 1
    cosine = [0.005 * (1 + math.cos(math.pi * k / STEPS)) for k in range(STEPS) if k != 10]
    assert rates == pytest.approx(cosine[:10] + [rate / 2 for rate in cosine[10:]])
    assert after == [*range(1, 11), *range(9, 18)], "Adam's own count went back to that of step 8"


def test_a_failure_before_the_first_record_goes_back_to_the_start():
    with pytest.warns(RuntimeWarning, match="step 2 of 20 .* back to the weights of step 0"):
        assert ck.fit(Failing((2,)), data(), **OPTIONS).recovered == [2]


def test_a_failure_in_the_last_part_of_a_run(tmp_path):
    with pytest.warns(RuntimeWarning):
        history = ck.fit(Failing((16, 17, 18)), data(), **OPTIONS)
    assert history.recovered == [16, 17, 18] and history.steps[-1] == STEPS


def test_a_part_of_a_run_that_was_undone_is_recorded_as_nan():
    with pytest.warns(RuntimeWarning):
        history = ck.fit(Failing((7,)), data(), **OPTIONS | dict(records=20))
    assert math.isnan(history.train[7]) and sum(map(math.isnan, history.train)) == 1
    assert history.validation[7] == history.validation[6]
    assert len(history.terms["nll"]) == len(history.steps) and math.isnan(history.terms["nll"][7])


@pytest.mark.parametrize("recoveries", [0, 1, 3])
def test_going_back_is_bounded(recoveries):
    loss = Failing(tuple(range(10, 1000)))
    reference = Noisy()
    ck.fit(reference, data(), **OPTIONS | dict(validation=0, steps=STEPS), stop=lambda: reference.calls == 8)
    with pytest.raises(FloatingPointError, match=f"step {10 + recoveries} of 20 .*: the loss is nan; try"):
        with pytest.warns(RuntimeWarning) if recoveries else nullcontext():
            ck.fit(loss, data(), recoveries=recoveries, **OPTIONS)
    assert loss.count == 11 + recoveries
    assert all(value.isfinite().all() for value in weights(loss))


def nullcontext():
    from contextlib import nullcontext

    return nullcontext()


def test_a_validation_that_cannot_be_solved_goes_back():
    class Blind(Noisy):
        def forward(self, batch, generator=None):
            if not self.training and len(seen) == 1:
                seen.append("failed")
                raise ck.SolveError("too many steps", 0.5, 7, 1.0, "use more steps")
            seen.extend([] if self.training else ["judged"])
            return super().forward(batch, generator)

    seen: list[str] = []
    with pytest.warns(RuntimeWarning, match="step 8 of 20 .*: too many steps .*; back to the weights of step 4"):
        history = ck.fit(Blind(), data(), **OPTIONS)
    assert history.recovered == [8] and history.validation[1] == history.validation[0]


def test_a_run_that_went_back_resumes_to_the_same_bits(tmp_path):
    """Also when it is stopped between the failure and the record."""
    with pytest.warns(RuntimeWarning):
        straight = Failing((9, 14))
        expected = ck.fit(straight, data(), ema=0.9, **OPTIONS)
    path = tmp_path / "run.safetensors"
    with pytest.warns(RuntimeWarning):
        first = Failing((9,))
        ck.fit(first, data(), ema=0.9, checkpoint=path, stop=lambda: first.count == 11, **OPTIONS)
    assert files.read(path)[1]["step"] == 11
    second = Failing((3,))  # its own count: step 14
    with pytest.warns(RuntimeWarning, match="back to the weights of step 12"):
        history = ck.fit(second, data(), ema=0.9, checkpoint=path, **OPTIONS)
    assert history == expected and same(second, straight)


def test_stopped_between_records_it_can_still_go_back(tmp_path):
    """The weights of the last record are in the file beside the present ones."""
    with pytest.warns(RuntimeWarning):
        straight = Failing((10,))
        expected = ck.fit(straight, data(), **OPTIONS)
    path = tmp_path / "run.safetensors"
    first = Failing(())
    ck.fit(first, data(), checkpoint=path, stop=lambda: first.count == 10, **OPTIONS)
    second = Failing((0,))
    with pytest.warns(RuntimeWarning, match="back to the weights of step 8"):
        history = ck.fit(second, data(), checkpoint=path, **OPTIONS)
    assert history == expected and same(second, straight)


# Being asked to stop


def test_stop_ends_the_run_and_leaves_it_to_be_resumed(tmp_path):
    path, straight = tmp_path / "run.safetensors", Noisy()
    expected = ck.fit(straight, data(), ema=0.9, clip=1.0, warmup=3, **OPTIONS)
    part = Noisy()
    history = ck.fit(
        part, data(), ema=0.9, clip=1.0, warmup=3, checkpoint=path, stop=lambda: part.calls == 7, **OPTIONS
    )
    assert part.calls == 7 and history.steps == [4] and files.read(path)[1]["step"] == 7
    rest = Noisy()
    assert ck.fit(rest, data(), ema=0.9, clip=1.0, warmup=3, checkpoint=path, **OPTIONS) == expected
    assert same(rest, straight)


def test_report_is_called_after_each_record():
    seen = []
    history = ck.fit(Noisy(), data(), report=lambda h: seen.append((h.steps[-1], len(h.validation))), **OPTIONS)
    assert seen == [(step, k + 1) for k, step in enumerate(history.steps)]


# Contexts


def conditional(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    c = torch.rand(n, 1, generator=seeded())
    return torch.cat([c, -c], 1) * 3 + 0.1 * torch.randn(n, 2, generator=seeded(1)), c


class Paired(nn.Module):
    """Checks that each point comes with its own context."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.zeros(())), {True: 0, False: 0}

    def forward(self, batch, generator=None, context=None):
        assert context[:, 0].equal(10 * batch[:, 0])
        self.rows[self.training] += len(batch)
        return self.weight * batch.mean(), {}


@pytest.mark.parametrize("validation", ["fraction", "pair"])
def test_contexts_stay_with_their_points(validation):
    loss, x = Paired(), torch.arange(50.0)[:, None]
    held_out = 0.2 if validation == "fraction" else (x[:10], 10 * x[:10])
    ck.fit(loss, x, context=10 * x, validation=held_out, steps=10, batch=8, progress=False)
    assert loss.rows[True] == 80 and loss.rows[False] == 10 * 10


@pytest.mark.parametrize("grid", ["frozen", "jittered", "adaptive"])
def test_a_conditional_cnf_learns_its_context(grid):
    x, c = conditional()
    solve = {"frozen": ck.FrozenGrid(), "jittered": ck.JitteredGrid(2), "adaptive": ck.Solve(tolerance=1e-2)}[grid]
    loss = cnf_loss(context=1, solve=solve)
    history = ck.fit(loss, x, context=c, steps=60, batch=100, lr=2e-2, records=3, progress=False)
    right, wrong = (-loss.model.log_prob(x, context=given).mean().item() for given in (c, 1 - c))
    assert history.validation[-1] < history.validation[0] and right < wrong - 0.2


def test_flow_matching_learns_its_context():
    x, c = conditional()
    torch.manual_seed(0)
    flow = ck.Flow(ck.Normal(2), ck.CNF(ck.MLPField(2, (32,), context=1)))
    ck.fit(
        ck.FlowMatching(flow, evaluation=ck.Solve(tolerance=1e-2)),
        x,
        context=c,
        steps=300,
        batch=100,
        lr=2e-2,
        records=2,
        progress=False,
    )
    right, wrong = (-flow.log_prob(x, context=given).mean().item() for given in (c, 1 - c))
    assert right < wrong - 1


# The solver's error


def test_the_solvers_error_is_recorded():
    """Two steps on a field that turns fast: what training sees is not what is there."""
    loss = cnf_loss(solve=ck.Solve(method="euler", times=ck.uniform_grid(1)))
    for p in loss.model.parameters():
        nn.init.normal_(p, std=0.8)
    history = ck.fit(loss, data(), steps=4, records=2, lr=1e-6, progress=False)
    exact = ck.solver_error(loss.model, data()[:64], solve=loss.solve)
    assert len(history.solver_error) == 2 and history.solver_error[-1] == pytest.approx(exact, rel=0.5)
    assert history.solver_error[-1] > 0.01


def test_the_solvers_error_against_the_tight_one():
    loss = cnf_loss(solve=ck.Solve(method="rk4", times=ck.uniform_grid(2)))
    for p in loss.model.parameters():
        nn.init.normal_(p, std=0.6, generator=seeded())
    x = data(64)
    assert loss.solver_error(x) == pytest.approx(ck.solver_error(loss.model, x, solve=loss.solve), rel=1e-2)


@pytest.mark.parametrize("training", [ck.Solve(tolerance=1e-2), ck.Solve(), ck.FrozenGrid(), ck.JitteredGrid(3)])
def test_every_kind_of_solve_has_an_error(training):
    loss = cnf_loss(solve=training)
    for p in loss.model.parameters():
        nn.init.normal_(p, std=0.6, generator=seeded())
    assert 0 < loss.solver_error(data(64)) < 1


def test_the_same_noise_is_seen_by_both_solves():
    """With one probe the estimates differ by far more than the solvers do."""
    loss = cnf_loss(solve=ck.Solve(trace="hutchinson", method="rk6", times=ck.uniform_grid(8)))
    for p in loss.model.parameters():
        nn.init.normal_(p, std=0.6, generator=seeded())
    assert loss.solver_error(data(64), generator=seeded()) < 1e-3 < loss.model.log_prob(data(64)).std()


def test_flows_without_an_ode_have_none():
    assert ck.fit(Noisy(), data(), **OPTIONS).solver_error == []


def test_the_solvers_error_of_dequantised_data_is_in_the_unit_of_the_loss():
    torch.manual_seed(0)
    flow = ck.Flow(ck.Normal(3), ck.Chain(ck.Logit(3), ck.CNF(ck.MLPField(3, (8,)))))
    for p in flow.parameters():
        nn.init.normal_(p, std=0.6, generator=seeded())
    model, k = ck.Dequantised(flow, ck.UniformDequantiser(4)), torch.randint(4, (50, 3), generator=seeded())
    euler = ck.Solve(method="euler", times=ck.uniform_grid(2))
    bits, nats = (
        ck.NegativeLogLikelihood(model, unit=u, solve=euler).solver_error(k, generator=seeded())
        for u in ("bits", "nats")
    )
    assert bits == pytest.approx(nats / (3 * math.log(2)), rel=1e-5) and bits > 1e-3


# Being killed

KILLED = """
    import os, random, signal, sys, time
    import torch, cnfkit as ck

    def run(path):
        torch.manual_seed(0)
        flow = ck.Flow(ck.Normal(2), ck.Chain(ck.ActNorm(2), ck.CNF(ck.MLPField(2, (8,)))))
        grid = ck.FrozenGrid(every=7, rows=16, trace="hutchinson")
        loss = ck.NegativeLogLikelihood(flow, solve=grid, penalties={"kinetic_energy": 0.01})
        points = ck.toy_density("two_moons").sample(200, torch.Generator().manual_seed(0))
        history = ck.fit(loss, points, steps=160, batch=32, lr=1e-2, ema=0.95, clip=1.0, warmup=10, patience=60,
                         records=80, checkpoint=path, progress=False)
        ck.save(path + ".done", loss, history=history.__dict__)

    def step(path):
        return ck.checkpoint.read(path)[1]["step"] if os.path.exists(path) else 0

    straight, killed = sys.argv[1:3]
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds
    def forked(*arguments):
        pid = os.fork()
        if pid == 0:
            try:
                run(*arguments)
            finally:
                os._exit(0)
        return pid
    os.waitpid(forked(straight), 0)
    moments, went = random.Random(0), [0]
    for kill in range(20):
        pid = forked(killed)
        while kill % 2 and step(killed) == went[-1]:  # every other time it may get to a record
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        went.append(step(killed))
    os.waitpid(forked(killed), 0)
    print(*went)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_twenty_times_and_resumed_ends_in_the_same_bits(tmp_path):
    """SIGKILL at random moments, which no handler sees; the grid, its count, the average and the noise go on."""
    paths = [tmp_path / "straight.safetensors", tmp_path / "killed.safetensors"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *map(str, paths)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    went = [int(step) for step in done.stdout.split()]
    assert len(went) == 21 and went == sorted(went) and 20 <= went[-1] < 160, done.stderr
    (first, about), (second, again) = (files.read(f"{path}.done") for path in paths)
    assert about == again and first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    ends = [files.read(path) for path in paths]
    assert ends[0][1] == ends[1][1] and all(ends[0][0][name].equal(ends[1][0][name]) for name in ends[0][0])


# What must not go unnoticed


def test_a_run_is_not_resumed_with_other_parameters_frozen(tmp_path):
    path = tmp_path / "run.safetensors"

    def run(frozen: bool, **options):
        flow = ck.Flow(ck.Normal(2), ck.Diagonal(2))
        flow.bijection.log_scale.requires_grad_(not frozen)
        return ck.fit(ck.NegativeLogLikelihood(flow), data(), checkpoint=path, **OPTIONS | options)

    run(False)
    with pytest.raises(
        ValueError, match=r"is of a run with parameters='2 that are trained, \w+', this one has '1 that"
    ):
        run(True)


def test_a_loss_in_eval_mode_is_put_into_training_mode():
    loss, modes = Noisy().eval(), []
    loss.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    ck.fit(loss, data(), **OPTIONS)
    assert modes.count(True) == STEPS and loss.model.training


def test_parts_that_are_held_in_eval_mode_stay_there():
    loss = Noisy()
    loss.model.base.eval()
    ck.fit(loss, data(), **OPTIONS)
    assert loss.training and loss.model.bijection.training and not loss.model.base.training


def test_a_tight_adaptive_training_is_watched_too():
    loss = cnf_loss(solve=ck.Solve(tolerance=1e-6))
    assert len(ck.fit(loss, data(64), steps=2, records=1, progress=False).solver_error) == 1


def test_what_is_only_watched_ends_no_run():
    class Blind(Noisy):
        def solver_error(self, batch, generator=None):
            raise ck.SolveError("the step vanished", 0.5, 7, 1.0, "use more steps")

    history = ck.fit(Blind(), data(), **OPTIONS)
    assert len(history.steps) == 5 and all(map(math.isnan, history.solver_error))


def test_a_bad_update_under_a_dequantiser_that_learns():
    """NaN weights are no points outside the cube, and a run goes back from them."""
    torch.manual_seed(0)
    coupling = ck.AffineCoupling(ck.mask("even", 2), ck.MLP(2, 4, (4,), 2))
    noise = ck.Flow(ck.Normal(2), ck.Chain(ck.Logit(2, 0.0), coupling))
    model = ck.Dequantised(ck.Flow(ck.Uniform(2), ck.Diagonal(2)), ck.VariationalDequantiser(4, noise))
    with torch.no_grad():
        next(model.dequantiser.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="flow gives NaN for noise: its weights have run away"):
        model.log_prob(torch.zeros(3, 2, dtype=torch.uint8))


def test_stopped_right_after_a_bad_update_it_goes_back():
    loss = Failing((9,), "gradient")
    ck.fit(loss, data(), stop=lambda: loss.count == 10, **OPTIONS | dict(validation=0))
    assert all(value.isfinite().all() for value in weights(loss))


@pytest.mark.parametrize(
    ("options", "ended"), [({}, "steps"), ({"stop": lambda: True}, "stop"), ({"patience": 1}, "patience")]
)
def test_a_run_says_why_it_ended(options, ended):
    if ended == "patience":
        assert overfitted(**options).ended == ended
    else:
        assert ck.fit(Noisy(), data(), **OPTIONS | options).ended == ended


def test_numbers_of_numpy_are_numbers(tmp_path):
    import numpy as np

    path = tmp_path / "run.safetensors"
    options = dict(seed=np.int64(0), warmup=np.int64(2), lr=np.float32(0.01), ema=np.float64(0.9))
    ck.fit(Noisy(), data(), checkpoint=path, **OPTIONS | options)
    assert files.read(path)[1]["settings"]["warmup"] == 2


def test_the_terms_keep_their_order(tmp_path):
    path = tmp_path / "run.safetensors"

    def run(**options):
        loss = cnf_loss(solve=ck.FrozenGrid(), penalties={"kinetic_energy": 0.1})
        return ck.fit(loss, data(), checkpoint=path, **OPTIONS | options)

    run(stop=lambda: True)
    assert list(run().terms) == ["nll", "kinetic_energy", "evaluations"]
