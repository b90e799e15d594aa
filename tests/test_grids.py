"""Grids that change from batch to batch, what a loss makes of them, and how an evaluation judges the solver."""

import copy
import math

import numpy as np
import pytest
import torch
from builders import Counted, redrawn, seeded, two_moons_flow

from cnfkit import (
    CNF,
    Chain,
    CheckpointError,
    Dequantised,
    Flow,
    FrozenGrid,
    JitteredGrid,
    Logit,
    MLPField,
    NegativeLogLikelihood,
    Normal,
    Solve,
    Standardize,
    UniformDequantiser,
    evaluate,
    fit,
    solver_error,
    toy_density,
    uniform_grid,
)

BOTH = dict(kinetic_energy=0.7, jacobian_energy=0.3)


def model(scale: float = 0.4, hidden=(8,)) -> Flow:
    return Flow(Normal(2), CNF(redrawn(MLPField(2, hidden), scale=scale)))


def levels_model() -> Dequantised:
    flow = Chain(Logit(2, alpha=0.05), CNF(redrawn(MLPField(2, (8,)), scale=0.4)))
    return Dequantised(Flow(Normal(2), flow), UniformDequantiser(4))


X = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
LEVELS = torch.randint(4, (40, 2), generator=torch.Generator().manual_seed(1))


# Times


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_uniform_grid(steps):
    grid = uniform_grid(steps)
    assert grid == tuple(k / steps for k in range(steps + 1)) and grid[-1] == 1.0
    assert Solve(method="euler", times=grid).times == grid


@pytest.mark.parametrize("jitter", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 16])
def test_jittered_times_increase_about_equal_ones(steps, jitter):
    """Each stays within its half step, and all are equal ones on average, with the deviation of a uniform number."""
    grid, generator = JitteredGrid(steps, jitter), seeded()
    times = torch.tensor([grid(None, X, generator).times for _ in range(400)], dtype=torch.float64)
    assert (times[:, 1:] > times[:, :-1]).all() and not times[:, 0].any() and times[:, -1].eq(1).all()
    off = (times - torch.tensor(uniform_grid(steps), dtype=torch.float64))[:, 1:-1] * steps
    assert (off.abs() <= jitter / 2 + 1e-5).all()
    if steps > 1:
        deviation = jitter / 12**0.5
        assert (off.mean(0).abs() <= 5 * deviation / 20 + 1e-6).all()
        assert off.std(0).tolist() == pytest.approx([deviation] * (steps - 1), rel=0.15, abs=1e-6)
    if steps == 16 and jitter:
        assert abs(torch.corrcoef(off.T)[0, 1]) < 0.25, "each time moves by itself"


def test_jittered_times_are_a_function_of_the_generator():
    grid, state = (
        JitteredGrid(4, method="rk4", trace="hutchinson", probes=2, gradient="checkpoint"),
        torch.get_rng_state(),
    )
    first, again, other = (grid(None, X, seeded(k)) for k in (0, 0, 1))
    assert first == again and first.times != other.times
    assert torch.get_rng_state().equal(state)
    generator = seeded()
    assert grid(None, X, generator).times != grid(None, X, generator).times, "another batch, other times"
    assert (first.method, first.trace, first.probes, first.gradient) == ("rk4", "hutchinson", 2, "checkpoint")


def test_a_frozen_grid_is_that_of_an_adaptive_solve():
    """Of its first rows, at its tolerance, without gradients, at the batch at which it is due."""
    flow, grid = model(scale=1.5), FrozenGrid(1e-3, every=3, rows=10)
    seen, expected = [], []
    for k in range(7):
        batch = torch.randn(40, 2, generator=seeded(k)) * (1 + k)
        solve = grid(flow, batch, seeded())
        with torch.no_grad():
            _, result = flow.log_prob_and_result(batch[:10], solve=Solve(tolerance=1e-3))
        seen.append(solve.times)
        expected.append(result.stats[0].times)
        assert (solve.method, solve.tolerance) == ("rk6", None)
    assert seen == [expected[k // 3 * 3] for k in range(7)] and grid.served == 7
    assert len(set(seen)) == 3 and len(seen[-1]) > 2


def test_a_frozen_grid_is_fitted_exactly_when_it_is_due():
    """The field is asked by nobody else."""
    flow, calls = Flow(Normal(2), CNF(Counted(MLPField(2, (4,))))), []
    grid, field = FrozenGrid(1e-2, every=4), flow.bijection.field
    for _ in range(9):
        before = field.with_rows
        grid(flow, X)
        calls.append(field.with_rows > before)
    assert calls == [True, False, False, False] * 2 + [True] and field.plain < field.with_rows


def test_a_frozen_grid_follows_the_field():
    flow, grid = model(), FrozenGrid(1e-4, every=1)
    slow = len(grid(flow, X).times)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter *= 4
    assert len(grid(flow, X).times) > slow + 2


def test_a_frozen_grid_is_that_of_the_busiest_flow():
    slow, fast = (CNF(redrawn(MLPField(2, (8,)), scale=scale)) for scale in (0.1, 1.5))
    for bijection in (Chain(slow, fast), Chain(fast, slow)):
        grid, flow = FrozenGrid(1e-4), Flow(Normal(2), bijection)
        _, result = flow.log_prob_and_result(X, solve=Solve(tolerance=1e-4))
        steps = [stats.accepted for stats in result.stats]
        assert steps[0] != steps[1] and len(grid(flow, X).times) == 1 + max(steps)


def test_options_of_a_frozen_grid_are_those_of_the_solves_on_it():
    options = dict(gradient="adjoint", max_steps=300)
    grid, flow = FrozenGrid(1e-3, every=np.int64(2), method="torchdiffeq:rk4", **options), model()
    solve = grid(flow, X)
    assert solve == Solve(method="torchdiffeq:rk4", times=solve.times, **options) and len(solve.times) > 2
    assert (grid.adaptive.gradient, grid.adaptive.max_steps) == ("backprop", 255)
    assert NegativeLogLikelihood(flow, solve=grid)(X)[0].isfinite()


def test_a_frozen_grid_keeps_no_graph():
    flow = model()
    FrozenGrid()(flow, X)
    assert all(parameter.grad is None for parameter in flow.parameters())
    with pytest.raises(ValueError, match="FrozenGrid: the model holds no CNF"):
        FrozenGrid()(two_moons_flow(), X)


def test_state_of_a_frozen_grid():
    """Count and times, in a tensor of one size, so that a file's can be compared with the model's."""
    grid = FrozenGrid(1e-5, every=5)
    for _ in range(3):
        grid(model(scale=1.5), X)
    state = grid.state_dict()
    assert [tensor.shape for tensor in state.values()] == [FrozenGrid().state_dict()["_extra_state"].shape]
    other = FrozenGrid(1e-5, every=5)
    other.load_state_dict(state)
    assert other.served == 3 and other.solve == grid.solve and len(other.solve.times) > 4
    fresh = FrozenGrid()
    fresh.load_state_dict(FrozenGrid().state_dict())
    assert fresh.served == 0 and fresh.solve.times == (0.0, 1.0)


def test_a_frozen_grid_of_a_dequantised_model_is_a_function_of_the_generator():
    """Its noise, too, comes from the batch's generator: a resumed run must find the same grid."""
    dequantised, state = levels_model(), torch.get_rng_state()
    first, again, other = (FrozenGrid(1e-4, rows=4)(dequantised, LEVELS, seeded(k)).times for k in (0, 0, 1))
    assert first == again != other
    assert torch.get_rng_state().equal(state)


# The loss


@pytest.mark.parametrize("unit", ["nats", "bits"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_penalties_enter_with_their_weights(unit, reduction):
    flow, solve = model(), Solve(method="rk4", times=uniform_grid(4), reduction=reduction)
    loss, terms = NegativeLogLikelihood(flow, unit, solve, BOTH)(X)
    full = Solve(method="rk4", times=uniform_grid(4), energies=tuple(BOTH), reduction=reduction)
    log_prob, result = flow.log_prob_and_result(X, solve=full)
    nll = -log_prob.mean() / (2 * math.log(2) if unit == "bits" else 1)
    means = {name: energy.mean() for name, energy in result.penalties.items()}
    torch.testing.assert_close(loss, nll + 0.7 * means["kinetic_energy"] + 0.3 * means["jacobian_energy"])
    assert list(terms) == ["nll", *BOTH, "evaluations"] and not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(terms["nll"], nll.detach())
    for name in BOTH:
        torch.testing.assert_close(terms[name], means[name].detach())
    assert terms["evaluations"].item() == 16 == result.evaluations


def test_a_penalty_calms_the_field():
    """Trained with it, the path is shorter."""
    lengths = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        loss = NegativeLogLikelihood(
            model(), solve=Solve(method="midpoint", times=(0, 1)), penalties=dict(kinetic_energy=weight)
        )
        history = fit(loss, X * 3, steps=30, batch=40, lr=3e-2, validation=0, records=3, progress=False)
        lengths.append(history.terms["kinetic_energy"][-1])
    assert lengths[1] < 0.5 * lengths[0]
    assert list(history.terms) == ["nll", "kinetic_energy", "evaluations"]
    assert history.terms["evaluations"] == [2.0] * 3


GRIDS = {
    "a solve": lambda: Solve(method="euler", times=(0, 1)),
    "jittered": lambda: JitteredGrid(2, method="euler"),
    "frozen": lambda: FrozenGrid(0.5, method="euler"),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_evaluation_is_never_on_the_grid_of_training(kind):
    """In eval mode the loss is that of an adaptive solve, within 1e-5 unless another is given."""
    flow = model(scale=1.0)
    loss = NegativeLogLikelihood(flow, solve=GRIDS[kind]())
    coarse = loss(X, seeded())[0]
    loss.eval()
    value, terms = loss(X, seeded())
    exact = -flow.log_prob(X, solve=Solve(tolerance=1e-5)).mean()
    torch.testing.assert_close(value, exact, rtol=0, atol=0)
    assert abs(coarse - exact) > 1e-2 and terms["evaluations"] > 10
    if kind == "frozen":
        assert loss.solve.served == 1, "nor does an evaluation count as a batch"


def test_evaluation_is_no_coarser_than_training():
    fine = Solve(tolerance=1e-6)
    assert NegativeLogLikelihood(model(), solve=fine).evaluation == fine.within(1e-6)
    assert NegativeLogLikelihood(model(), solve=Solve(tolerance=1e-4)).evaluation == fine.within(1e-5)
    loss = NegativeLogLikelihood(model(), solve=GRIDS["frozen"](), evaluation=Solve(tolerance=1e-3))
    assert f"evaluation={loss.evaluation}" in repr(loss), "so that a run is not resumed with another"


def test_evaluation_of_ones_own():
    flow, own = model(), Solve(method="midpoint", times=uniform_grid(3))
    loss = NegativeLogLikelihood(flow, solve=JitteredGrid(2), evaluation=own).eval()
    value, terms = loss(X)
    assert value.equal(-flow.log_prob(X, solve=own).mean()) and terms["evaluations"] == 6
    assert loss.train()(X)[1]["evaluations"] == 8


@pytest.mark.parametrize("kind", GRIDS)
def test_evaluation_has_the_trace_of_training(kind):
    """An exact trace of an image is not to be had."""
    options = dict(trace="hutchinson", probes=3, noise="gaussian", reduction="mean")
    solve = {"a solve": lambda: Solve(times=(0, 1), gradient="checkpoint", **options),
             "jittered": lambda: JitteredGrid(2, **options),
             "frozen": lambda: FrozenGrid(**options)}[kind]()  # fmt: skip
    wanted = Solve(tolerance=1e-5, control_logdet=True, **options)
    assert NegativeLogLikelihood(model(), solve=solve).evaluation == wanted


def test_penalties_are_validated_as_they_are_trained():
    """Whatever the evaluation says, a mean over the dimensions is not compared with a sum."""
    training, judging = Solve(times=(0, 1), reduction="mean"), Solve(tolerance=1e-3, reduction="sum")
    loss = NegativeLogLikelihood(model(), solve=training, penalties=BOTH, evaluation=judging)
    assert loss.evaluation == Solve(tolerance=1e-3, reduction="mean")


def test_probes_and_times_come_from_the_generator_of_the_batch():
    for solve in (
        Solve(trace="hutchinson", times=(0, 1)),
        JitteredGrid(2, trace="hutchinson"),
        FrozenGrid(trace="hutchinson"),
    ):
        loss, state = NegativeLogLikelihood(model(), solve=solve), torch.get_rng_state()
        first, again, other = (copy.deepcopy(loss)(X, seeded(k))[0] for k in (0, 0, 1))
        assert first.equal(again) and not first.equal(other)
        assert torch.get_rng_state().equal(state)


def test_without_one_of_the_batch_the_generator_is_that_of_the_solve():
    flow, state = model(), torch.get_rng_state()

    def value(seed: int, *given):
        solve = Solve(trace="hutchinson", times=(0, 1), generator=seeded(seed))
        return NegativeLogLikelihood(flow, solve=solve)(X, *given)[0]

    assert value(0).equal(value(0)) and not value(0).equal(value(1))
    assert value(0, seeded(2)).equal(value(1, seeded(2))), "that of the batch goes first"
    assert torch.get_rng_state().equal(state)


def test_all_noise_of_a_bound_comes_from_one_generator():
    levels, state = levels_model(), torch.get_rng_state()
    own = Solve(trace="hutchinson", times=(0, 1), generator=seeded(1))
    for solve in (Solve(trace="hutchinson", times=(0, 1)), own):
        first, again = (levels.log_prob(LEVELS, solve=solve, draws=2, generator=seeded()) for _ in range(2))
        assert first.equal(again)
    assert torch.get_rng_state().equal(state) and own.generator.get_state().equal(seeded(1).get_state())


@pytest.mark.parametrize("unit", ["nats", "bits"])
def test_levels_in_the_loss(unit):
    """The noise and the probes come from one generator, in this order."""
    dequantised = levels_model()
    solve = Solve(method="rk4", times=uniform_grid(3), trace="hutchinson")
    loss, terms = NegativeLogLikelihood(dequantised, unit, solve, BOTH)(LEVELS, seeded())
    generator = seeded()
    full = Solve(method="rk4", times=uniform_grid(3), trace="hutchinson", generator=generator, energies=tuple(BOTH))
    y, log_q = dequantised.dequantiser(LEVELS, generator)
    log_prob, result = dequantised.flow.log_prob_and_result(y, solve=full)
    nll = -(log_prob - log_q).mean() / (2 * math.log(2) if unit == "bits" else 1)
    penalty = sum(weight * result.penalties[name].mean() for name, weight in BOTH.items())
    torch.testing.assert_close(loss, nll + penalty)
    loss.backward()
    assert terms["evaluations"] == 12


# Training


class Interrupted(NegativeLogLikelihood):
    """Stopped by hand at one training call, before it or after it; "after" is before the weights are changed."""

    def __init__(self, solve, at: int | None = None, when: str = "before", levels: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__(levels_model() if levels else model(), solve=solve)
        self.at, self.when, self.calls, self.times = at, when, 0, []

    def forward(self, batch, generator=None):
        if not self.training:
            return super().forward(batch, generator)
        due = self.calls == self.at
        self.calls += 1
        if due and self.when == "before":
            raise KeyboardInterrupt
        result = super().forward(batch, generator)
        if due:
            raise KeyboardInterrupt
        self.times.append(self.solve.solve.times)
        return result


OPTIONS = dict(steps=12, batch=16, lr=3e-2, records=4, progress=False)


def frozen() -> FrozenGrid:
    return FrozenGrid(1e-4, every=5, rows=8, trace="hutchinson")


@pytest.fixture(scope="module", params=[False, True], ids=["points", "levels"])
def uninterrupted(request):
    loss = Interrupted(frozen(), levels=request.param)
    return request.param, loss, fit(loss, LEVELS if request.param else X, **OPTIONS)


@pytest.mark.parametrize(("at", "when"), [(0, "before"), (4, "after"), (5, "after"), (6, "before"), (7, "after")])
def test_a_frozen_grid_resumes_to_the_same_bits(tmp_path, uninterrupted, at, when):
    """Wherever it is stopped, even when the grid has served the batch, and the weights have not."""
    levels, reference, expected = uninterrupted
    assert len(set(reference.times)) >= 2, "the grid changed on the way"
    path, data = tmp_path / "run.safetensors", LEVELS if levels else X
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(frozen(), at, when, levels), data, checkpoint=path, **OPTIONS)
    resumed = Interrupted(frozen(), levels=levels)
    assert fit(resumed, data, checkpoint=path, **OPTIONS) == expected
    assert resumed.times == reference.times[at:]
    pairs = zip(resumed.state_dict().values(), reference.state_dict().values(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_flow_is_fitted_on_any_grid(kind):
    data = toy_density("two_moons").sample(300, seeded())
    loss = NegativeLogLikelihood(
        Flow(Normal(2), Chain(Standardize.of(data), CNF(MLPField(2, (16,))))), solve=GRIDS[kind]()
    )
    history = fit(loss, data, steps=40, batch=100, lr=3e-2, records=4, progress=False)
    assert history.train[-1] < history.train[0] - 0.1
    if kind == "a solve":  # one step of Euler's: the field is fitted to the gap, and the evaluation sees it
        assert history.validation[-1] > history.train[-1] + 0.3
    else:
        assert history.validation[-1] < history.validation[0]


# Evaluation


def test_evaluation_by_hand():
    flow, solve = model(), Solve(tolerance=1e-4)
    result = evaluate(flow, X, solve=solve)
    log_prob, passed = flow.log_prob_and_result(X, solve=solve)
    assert result.nll == pytest.approx(-log_prob.mean().item())
    assert result.standard_error == pytest.approx((log_prob.std() / 40**0.5).item())
    assert result.evaluations == passed.evaluations and result.unit == "nats"
    assert result.solver_error == solver_error(flow, X, solve=solve) < 1e-3
    text = f"{result.nll:.3f} ± {result.standard_error:.3f} nats, solver error {result.solver_error:.1e}, "
    assert str(result) == text + f"{passed.evaluations} evaluations"


def test_evaluation_of_a_finite_flow_has_no_solver():
    flow = two_moons_flow()
    result = evaluate(flow, X)
    assert (result.solver_error, result.evaluations) == (0, 0) and str(result).endswith(" nats")
    assert evaluate(flow, X, solve=Solve(tolerance=1e-3)) == result


def test_evaluation_in_parts():
    """More points than go through at once: the mean is over all, the evaluations are those of one pass."""
    flow, x = model(hidden=(2,)), torch.randn(4500, 2, generator=seeded())
    solve = Solve(method="midpoint", times=uniform_grid(2))
    result = evaluate(flow, x, solve=solve, rows=10)
    assert result.nll == pytest.approx(-flow.log_prob(x, solve=solve).mean().item(), rel=1e-5)
    assert result.evaluations == 4
    assert result.solver_error == pytest.approx(solver_error(flow, x[:10], solve=solve))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_solver_error_is_the_solvers(trace):
    """Large on a coarse grid, small within a tolerance; the noise of the trace is no part of it."""
    flow = model(scale=1.0)
    errors = [
        solver_error(flow, X, solve=Solve(trace=trace, generator=seeded(), **steps))
        for steps in (
            dict(method="euler", times=(0, 1)),
            dict(method="rk4", times=uniform_grid(8)),
            dict(tolerance=1e-6),
        )
    ]
    assert errors[0] > 0.1 and errors[0] > 100 * errors[1] and errors[2] < 1e-4
    tight = Solve(tolerance=1e-8)
    truth = flow.double().log_prob(X.double(), solve=tight)
    if trace == "exact":
        euler = flow.log_prob(X.double(), solve=Solve(method="euler", times=(0, 1)))
        assert errors[0] == pytest.approx((euler - truth).abs().mean().item(), rel=1e-4)
    else:
        spread = flow.log_prob(X.double(), solve=Solve(trace=trace, tolerance=1e-8)) - truth
        assert spread.abs().mean() > 100 * errors[2], "the noise is there, but the same on both sides"


def test_the_solver_error_of_a_fine_solve():
    """Judged by a finer one, never by itself."""
    flow = model().double()
    fine, finer = (solver_error(flow, X.double(), solve=Solve(tolerance=tolerance)) for tolerance in (1e-8, 1e-10))
    assert 0 < finer < 1e-9 and finer < fine < 1e-7


def test_the_solver_error_of_a_solve_of_few_steps():
    """Their bound is not that of the solve that judges."""
    flow = model(scale=1.0)
    error, again = (
        solver_error(flow, X, solve=Solve(method="rk4", times=uniform_grid(8), max_steps=n)) for n in (8, 99)
    )
    assert error == again > 0


def test_the_solver_error_leaves_the_model_as_it_is():
    flow = model()
    before = [parameter.clone() for parameter in flow.parameters()]
    solver_error(flow, X)
    assert all(a.equal(b) for a, b in zip(before, flow.parameters(), strict=True))
    assert flow.double() is flow and solver_error(flow, X.double(), solve=Solve(tolerance=1e-8)) < 1e-8


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_evaluation_of_levels(trace):
    dequantised = levels_model()
    solve = Solve(trace=trace, generator=seeded(), tolerance=1e-6)
    result = evaluate(dequantised, LEVELS, solve=solve)
    again = Solve(trace=trace, generator=seeded(), tolerance=1e-6)
    bits = -dequantised.log_prob(LEVELS, solve=again, generator=again.generator) / (2 * math.log(2))
    assert result.unit == "bits/dim" and result.nll == pytest.approx(bits.mean().item())
    assert result.solver_error < 1e-3 and "bits/dim, solver error" in str(result)
    coarse = [Solve(trace=trace, generator=seeded(), method="euler", times=(0, 1)) for _ in range(2)]
    nats = solver_error(dequantised, LEVELS, solve=coarse[0])
    assert nats > 0.01
    assert evaluate(dequantised, LEVELS, solve=coarse[1]).solver_error == pytest.approx(
        nats / (2 * math.log(2)), rel=0.5
    )


def test_evaluation_has_no_gradients():
    flow = Flow(Normal(2), CNF(Counted(MLPField(2, (4,)))))
    seen = []
    flow.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    evaluate(flow, X)
    assert seen and not any(seen)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_eval_mode(training):
    """Without dropout; the mode of each part is as before, also after an error."""
    flow, seen = model().train(training), []
    flow.bijection.field.layers[0].eval()
    flow.register_forward_hook(lambda module, *_: seen.extend(part.training for part in module.modules()))
    before = [part.training for part in flow.modules()]
    evaluate(flow, X)
    assert seen and not any(seen) and [part.training for part in flow.modules()] == before
    with pytest.raises(ValueError, match="wanted"):
        evaluate(flow, torch.zeros(3, 5))
    assert [part.training for part in flow.modules()] == before


@pytest.mark.parametrize(
    "other",
    [
        lambda flow: NegativeLogLikelihood(flow, solve=FrozenGrid(tolerance=1e-4)),
        lambda flow: NegativeLogLikelihood(flow, solve=FrozenGrid(every=7)),
        lambda flow: NegativeLogLikelihood(flow, solve=JitteredGrid(4)),
        lambda flow: NegativeLogLikelihood(flow, solve=FrozenGrid(), penalties={"kinetic_energy": 0.1}),
    ],
    ids=["tolerance", "every", "kind", "penalty"],
)
def test_resume_refuses_another_loss(tmp_path, other):
    flow = Flow(Normal(2), CNF(MLPField(2, (4,))))
    data = torch.randn(64, 2, generator=seeded())
    options = {"steps": 2, "batch": 32, "validation": 0, "checkpoint": tmp_path / "run.safetensors", "progress": False}
    fit(NegativeLogLikelihood(flow, solve=FrozenGrid()), data, **options)
    with pytest.raises(CheckpointError, match="another model"):
        fit(other(flow), data, **options)
