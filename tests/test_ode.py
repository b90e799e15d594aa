"""Solvers: orders, grids, tolerances, what they count, and how they fail."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from builders import Field, NoFloat64, redrawn, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cnfkit import CNF, MLPField, Solve, SolveError, uniform_grid
from cnfkit.ode.integrate import integrate
from cnfkit.ode.solve import TORCHDIFFEQ_ADAPTIVE, TORCHDIFFEQ_FIXED
from cnfkit.ode.solvers import Counting, runge_kutta_step, stages
from cnfkit.ode.statistics import Statistics
from cnfkit.ode.tableaux import TABLEAUX

FIXED = [*TABLEAUX, *(f"torchdiffeq:{name}" for name in TORCHDIFFEQ_FIXED)]
ADAPTIVE = ["dopri5", *(f"torchdiffeq:{name}" for name in TORCHDIFFEQ_ADAPTIVE)]
STAGES = {
    "euler": 1,
    "midpoint": 2,
    "rk4": 4,
    "rk4_38": 4,
    "rk6": 7,
    "dopri5": 6,
}  # without the one for the error alone


def on_grid(method: str, steps: int, **options) -> Solve:
    return Solve(method=method, times=uniform_grid(steps), **options)


class Logistic:
    r"""A non-linear problem that changes with the time, solved by hand.

    .. math:: \dot z = z (1 - z) \cos t, \quad \text{rate} = z \cos t

    As :math:`\log z/(1-z)` grows at the rate :math:`\cos t`, and :math:`-\log (1 - z)` at that of :math:`z \cos t`.
    """

    start = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, t, z):
        self.calls.append(t.item())
        rate = z * t.cos()
        return rate * (1 - z), rate.T

    @staticmethod
    def solution(z, t0: float, t1: float):
        end = torch.sigmoid(torch.logit(z) + math.sin(t1) - math.sin(t0))
        return end, (torch.log1p(-z) - torch.log1p(-end)).T


def errors(solve: Solve, t0: float = 0.3, t1: float = 2.0) -> tuple[float, float]:
    """The largest error of the state, and of the integral."""
    z = Logistic.start
    exact = Logistic.solution(z, t0, t1)
    measured = integrate(Logistic(), z, t0, t1, solve, rates=1, controlled=1)
    return tuple((a - b).abs().max().item() for a, b in zip(measured, exact, strict=False))


# Tableaux


def trees(order: int) -> list[tuple]:
    """Rooted trees with so many nodes, each as the sorted tuple of its subtrees."""

    def forests(nodes: int, largest: tuple) -> list[tuple]:
        if not nodes:
            return [()]
        some = [(tree, n) for n in range(1, nodes + 1) for tree in trees(n) if (n, tree) <= largest]
        return [(tree, *rest) for tree, n in some for rest in forests(nodes - n, (n, tree))]

    return forests(order - 1, (order,))


def nodes(tree: tuple) -> int:
    return 1 + sum(map(nodes, tree))


def density(tree: tuple) -> int:
    return nodes(tree) * math.prod(map(density, tree))


def defect(tableau, weights, tree: tuple) -> float:
    """How far a method is from the condition of one tree; Hairer, Nørsett and Wanner, section II.2, theorem 2.13."""
    rows = [(), *tableau.a]

    def weight(row, tree):
        return sum(a * math.prod(weight(rows[j], child) for child in tree) for j, a in enumerate(row))

    return weight(weights, tree) - 1 / density(tree)


def worst(tableau, weights, order: int) -> float:
    return max(abs(defect(tableau, weights, tree)) for tree in trees(order))


def test_there_are_as_many_trees_as_in_the_book():
    assert [len(trees(order)) for order in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_conditions(name):
    """All of them up to the order that is claimed, and not all of the next."""
    tableau = TABLEAUX[name]
    for row, c in zip(tableau.a, tableau.c, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-15)
    assert [len(row) for row in tableau.a] == list(range(1, len(tableau.b)))
    assert max(worst(tableau, tableau.b, order) for order in range(1, tableau.order + 1)) < 1e-14
    assert worst(tableau, tableau.b, tableau.order + 1) > 1e-4


def test_the_embedded_method():
    """The error weights are a difference of two methods: of order 5, and of order 4 alone; the last stage is reused."""
    tableau = TABLEAUX["dopri5"]
    embedded = [b - e for b, e in zip(tableau.b, tableau.error, strict=True)]
    assert abs(sum(tableau.error)) < 1e-16
    assert max(worst(tableau, embedded, order) for order in range(1, 5)) < 1e-14
    assert worst(tableau, embedded, 5) > 1e-4
    assert tableau.c[-1] == 1 and tableau.b[-1] == 0 and tableau.a[-1] == tableau.b[:-1]


@pytest.mark.parametrize("name", TABLEAUX)
def test_order_of_convergence(name):
    """The slope of the error over the step, for the state and for the integral along it."""
    coarse, _, fine = (torch.tensor(errors(on_grid(name, n), 0.0, 4.0)).log2() for n in (32, 64, 128))
    slopes = (coarse - fine) / 2
    assert slopes.tolist() == pytest.approx([TABLEAUX[name].order] * 2, abs=0.2)


# Grids


@pytest.mark.parametrize("method", STAGES)
def test_a_grid_is_gone_as_given(method):
    """Steps × stages evaluations, the first of each step at its beginning, both ways over the same times."""
    times = (0.0, 0.1, 0.6, 1.0)
    for start, end in ((0.5, 2.5), (2.5, 0.5)):
        problem = Logistic()
        _, _, stats = integrate(problem, problem.start, start, end, Solve(method=method, times=times), rates=1)
        stages = STAGES[method]
        assert stats.evaluations == len(problem.calls) == 3 * stages
        assert (stats.backward_evaluations, stats.accepted, stats.rejected) == (0, 3, 0)
        assert stats.times == times and stats.status == "on a grid"
        steps = times[:-1] if end > start else times[:0:-1]
        assert problem.calls[::stages] == pytest.approx([0.5 + 2 * share for share in steps], abs=1e-14)


def test_a_grid_there_and_back_is_a_function_and_nearly_its_inverse():
    solve = Solve(method="rk4", times=(0.0, 0.05, 0.3, 0.7, 1.0))
    z = Logistic.start
    there, integral, _ = integrate(Logistic(), z, -1.0, 1.0, solve, rates=1)
    back, minus, _ = integrate(Logistic(), there, 1.0, -1.0, solve, rates=1)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-3)
    torch.testing.assert_close(integral, -minus, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint"), ("rk4_38", "rk4")])
@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, 0.0)])
def test_torchdiffeq_takes_the_same_steps(ours, theirs, ends):
    times = (0.0, 0.1, 0.3, 0.55, 0.6, 1.0)
    a, b = (
        integrate(Logistic(), Logistic.start, *ends, Solve(method=method, times=times), rates=1)
        for method in (ours, f"torchdiffeq:{theirs}")
    )
    torch.testing.assert_close(a[:2], b[:2], rtol=1e-13, atol=1e-13)
    assert a[2] == b[2], "the same account"


@pytest.mark.parametrize("method", FIXED)
def test_every_fixed_method_comes_close(method):
    assert max(errors(on_grid(method, 300))) < (5e-3 if "euler" in method else 1e-5)


def test_a_solve_on_a_grid_keeps_its_options():
    solve = Solve(trace="hutchinson", probes=3, tolerance=1e-3, energies=["kinetic_energy"])
    options = dict(trace="hutchinson", probes=3, energies=("kinetic_energy",))
    assert solve.on([0, 0.5, 1]) == Solve(method="rk4", times=(0, 0.5, 1), **options)
    assert solve.on(torch.tensor([0, 1]), "euler").on(uniform_grid(3), "dopri5") == on_grid("dopri5", 3, **options)
    assert solve.on(uniform_grid(2)).within(1e-4).tolerance == 1e-4


def test_numbers_of_any_kind():
    """And what is given as a list is kept as a tuple, so that a solve can be compared and hashed."""
    solve = Solve(probes=np.int64(3), max_steps=np.int32(50), tolerance=np.float32(0.5), energies=["kinetic_energy"])
    assert solve == Solve(probes=3, max_steps=50, tolerance=0.5, energies=("kinetic_energy",))
    assert type(solve.probes) is int and type(solve.tolerance) is float and solve.energies == ("kinetic_energy",)
    assert Solve(tolerance=torch.tensor(0.5)).tolerance == 0.5
    assert uniform_grid(np.int64(4)) == uniform_grid(4)


# Steps that are chosen


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_error_follows_the_tolerance(method):
    # one step of order 8 is good to 1e-6 here, whatever is asked for
    tolerances = (1e-5, 1e-7, 1e-9) if method.endswith("dopri8") else (1e-2, 1e-4, 1e-6)
    measured = [max(errors(Solve(method=method, tolerance=tolerance))) for tolerance in tolerances]
    # the step's error as fehlberg2 estimates it is much too small
    most = 1 if method == "dopri5" else 200 if method.endswith("fehlberg2") else 2
    assert all(error < most * tolerance for error, tolerance in zip(measured, tolerances, strict=True)), measured
    assert measured[0] > 50 * measured[-1], measured


@pytest.mark.parametrize("method", ["dopri8", "bosh3", "dopri5"])
@pytest.mark.parametrize("ends", [(-1.0, 2.0), (2.0, -1.0)])
def test_torchdiffeq_ends_where_it_should(method, ends):
    """A last step beyond the end, and an interpolation back to it, would cost hundreds of tolerances."""
    assert max(errors(Solve(method=f"torchdiffeq:{method}", tolerance=1e-8), *ends)) < 5e-8


def test_the_error_follows_a_fine_tolerance():
    measured = [max(errors(Solve(tolerance=10.0**-k))) for k in range(6, 13, 2)]
    assert all(error < 10.0**-k for error, k in zip(measured, range(6, 13, 2), strict=True)), measured


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (-3.0, 2.0)])
def test_account_of_an_adaptive_solve(ends):
    """One evaluation at the start, one for the first step's length, six for each trial; a jolt costs rejections."""
    calls, (start, end) = [], ends
    middle = (start + end) / 2

    def jolt(t, z):
        calls.append(t.item())
        return (1 + 9 * torch.exp(-100 * (t - middle) ** 2)) * z.cos(), z.new_zeros(0, len(z))

    z = torch.ones(3, 2, dtype=torch.float64)
    _, _, stats = integrate(jolt, z, start, end, Solve(tolerance=1e-6))
    assert stats.rejected > 0 and stats.accepted > 5
    assert stats.evaluations == len(calls) == 2 + 6 * (stats.accepted + stats.rejected)
    assert stats.backward_evaluations == 0 and stats.status == "within tolerance"
    assert len(stats.times) == 1 + stats.accepted and (stats.times[0], stats.times[-1]) == (0.0, 1.0)
    assert all(a < b for a, b in pairwise(stats.times))
    at_jolt = next(b - a for a, b in pairwise(stats.times) if a <= 0.5 < b)
    assert at_jolt < 0.5 * max(b - a for a, b in pairwise(stats.times)), "shorter steps at the jolt"


def test_every_step_that_is_taken_is_within_the_tolerance():
    """The difference of the two methods, over the steps that were chosen, in the norm of the documentation."""

    def jolt(t, z):
        return (1 + 9 * torch.exp(-100 * (t - 0.5) ** 2)) * z.cos(), z.new_zeros(0, len(z))

    z, tolerance, tableau = torch.ones(3, 2, dtype=torch.float64), 1e-6, TABLEAUX["dopri5"]
    _, _, stats = integrate(jolt, z, 0.0, 1.0, Solve(tolerance=tolerance))
    ratios = []
    for t, after in pairwise(stats.times):
        evaluations = Counting(jolt, Statistics()).at(stages(tableau, t, after - t), z)
        new, _, found = runge_kutta_step(evaluations, tableau, after - t, z)
        error = (after - t) * sum(e * v for e, (v, _) in zip(tableau.error, found, strict=True))
        ratios.append((error / (tolerance * (1 + z.abs().maximum(new.abs())))).square().mean().sqrt().item())
        z = new
    assert stats.rejected > 0 and max(ratios) <= 1.001
    assert max(ratios) > 0.1, "nor are the steps much shorter than need be"


def test_the_steps_that_were_chosen_are_a_grid():
    """The times of an adaptive solve, given as a grid, give the same numbers."""
    for ends in ((0.0, 2.0), (2.0, 0.0)):
        chosen = integrate(Logistic(), Logistic.start, *ends, Solve(tolerance=1e-6), rates=1)
        again = integrate(Logistic(), Logistic.start, *ends, Solve(times=chosen[2].times), rates=1)
        torch.testing.assert_close(again[:2], chosen[:2], rtol=0, atol=1e-13)


def test_rates_are_controlled_if_wanted():
    """The state stands still: only the integral can ask for short steps."""

    def wave(t, z):
        return 0 * z, (30 * t).cos().expand(1, len(z))

    z, exact = torch.zeros(2, 1, dtype=torch.float64), math.sin(30) / 30
    seen, unseen = (integrate(wave, z, 0.0, 1.0, Solve(tolerance=1e-6), 1, controlled) for controlled in (1, 0))
    assert (seen[1] - exact).abs().max() < 1e-5 and seen[2].accepted > 10
    assert (unseen[1] - exact).abs().max() > 1e-3 and unseen[2].accepted < 10


@pytest.mark.parametrize("first", [0.0, 1e-12, 1e6])
def test_the_first_step_of_any_size(first):
    """Where nothing moves at the start, or all is large already."""
    z = torch.full((2, 1), first, dtype=torch.float64)
    end, _, stats = integrate(lambda t, z: (t**3 * z + t, z.new_zeros(0, 2)), z, 0.0, 1.0, Solve(tolerance=1e-8))
    # by quadrature of exp(−t⁴/4) t, 2000 midpoints
    t = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    exact = math.exp(0.25) * (first + (torch.exp(-(t**4) / 4) * t).mean())
    torch.testing.assert_close(end, torch.full_like(end, exact), rtol=1e-6, atol=1e-6)
    assert stats.accepted < 60


def test_nothing_moves():
    """A field of zeros is one large step, or a few."""
    z = torch.randn(3, 2, generator=seeded())
    end, _, stats = integrate(lambda t, z: (0 * z, z.new_zeros(0, 3)), z, 0.0, 1.0, Solve())
    assert end.equal(z) and stats.accepted < 10 and stats.rejected == 0


FIELDS = {
    "slow": lambda t, z: 1e-4 * z,
    "still": lambda t, z: 0 * z,
    "fast": lambda t, z: 1e6 * z.cos(),
    "huge": lambda t, z: 1e30 * (1 + 0 * z),
    "beyond squares": lambda t, z: 1e200 * (1 + 0 * z),
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (-2.0, 3.0), (1.0, 1.0 + 1e-9)])
def test_a_field_is_asked_within_the_interval_alone(name, ends):
    """From the first step on: elsewhere it may not be defined."""
    times = []

    def dynamics(t, z):
        times.append(t.item())
        return FIELDS[name](t, z), z.new_zeros(0, len(z))

    try:
        integrate(dynamics, torch.full((2, 1), 2.0, dtype=torch.float64), *ends, Solve(tolerance=1e-3, max_steps=30))
    except SolveError:
        assert name not in ("slow", "still")
    assert min(ends) <= min(times) and max(times) <= max(ends) + 1e-15 and len(times) > 1


def test_dopri5_and_torchdiffeqs_agree_within_the_tolerance():
    solves = [Solve(method=method, tolerance=1e-8) for method in ("dopri5", "torchdiffeq:dopri5")]
    a, b = (integrate(Logistic(), Logistic.start, 0.0, 2.0, solve, 1, 1) for solve in solves)
    torch.testing.assert_close(a[:2], b[:2], rtol=0, atol=1e-6)
    assert a[2].status == b[2].status == "within tolerance" and b[2].times == ()
    assert a[2].evaluations < 1.5 * b[2].evaluations


def test_max_steps_is_obeyed_exactly():
    _, _, stats = integrate(Logistic(), Logistic.start, 0.0, 2.0, Solve(tolerance=1e-8), rates=1)
    tried = stats.accepted + stats.rejected
    integrate(Logistic(), Logistic.start, 0.0, 2.0, Solve(tolerance=1e-8, max_steps=tried), rates=1)
    with pytest.raises(SolveError, match=f"max_steps = {tried - 1} were not enough") as stopped:
        integrate(Logistic(), Logistic.start, 0.0, 2.0, Solve(tolerance=1e-8, max_steps=tried - 1), rates=1)
    assert stopped.value.step <= tried - 1 and 0 < stopped.value.t < 2


# Gradients


class Learnt(nn.Module):
    """v = tanh(a z) + t, the rate −a z²."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.calls = 0

    def forward(self, t, z):
        self.calls += 1
        return torch.tanh(self.a * z) + t, -self.a * z.square().T


def gradients(solve: Solve, ends: tuple[float, float] = (0.0, 1.0)):
    dynamics, z = Learnt(), torch.tensor([[0.3], [-1.0]], dtype=torch.float64, requires_grad=True)
    end, integral, stats = integrate(dynamics, z, *ends, solve, 1, 1, (dynamics.a,))
    forward = dynamics.calls
    (end.sum() + integral.square().sum()).backward()
    assert (stats.evaluations, stats.backward_evaluations) == (forward, dynamics.calls - forward)
    return torch.cat([dynamics.a.grad[None], z.grad.flatten()]), stats


@pytest.mark.parametrize("method", STAGES)
def test_a_checkpointed_grid_has_the_same_gradients(method):
    plain, account = gradients(on_grid(method, 5))
    again, twice = gradients(on_grid(method, 5, gradient="checkpoint"))
    torch.testing.assert_close(again, plain, rtol=1e-13, atol=1e-13)
    assert account.backward_evaluations == 0
    assert twice.backward_evaluations == twice.evaluations == 5 * STAGES[method]


def test_checkpointed_steps_that_are_chosen():
    """The steps that were taken are taken again, those that were tried in vain are not."""
    plain, account = gradients(Solve(tolerance=1e-6))
    again, twice = gradients(Solve(tolerance=1e-6, gradient="checkpoint"))
    torch.testing.assert_close(again, plain, rtol=1e-13, atol=1e-13)
    assert account.backward_evaluations == 0 and twice.evaluations == account.evaluations
    assert twice.times == account.times and twice.backward_evaluations == 6 * twice.accepted


def test_a_checkpointed_solve_keeps_one_state_a_step():
    """What autograd holds on to between forward and backward, in numbers."""

    def held(**options) -> int:
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        field = MLPField(2, hidden=(32, 32))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = CNF(field)(torch.randn(64, 2), solve=Solve(**options))
        result.value.sum().backward()
        return sum(sizes.values())

    for options in ({"times": uniform_grid(8)}, {"tolerance": 1e-3}):
        assert held(gradient="checkpoint", **options) < 0.1 * held(**options)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_the_adjoint_has_the_same_gradients_within_its_tolerance(ends):
    plain, _ = gradients(Solve(tolerance=1e-11), ends)
    adjoint, stats = gradients(Solve(method="torchdiffeq:dopri5", tolerance=1e-11, gradient="adjoint"), ends)
    torch.testing.assert_close(adjoint, plain, rtol=0, atol=1e-8)
    assert stats.backward_evaluations > 0


def test_backprop_through_torchdiffeq_has_the_gradients_of_the_same_steps():
    plain, _ = gradients(on_grid("rk4_38", 6))
    theirs, stats = gradients(on_grid("torchdiffeq:rk4", 6))
    torch.testing.assert_close(theirs, plain, rtol=1e-12, atol=1e-12)
    assert stats.backward_evaluations == 0


# Dtypes and devices


OWN = [*(on_grid(method, 2) for method in STAGES), Solve(tolerance=1e-3)]


@pytest.mark.parametrize("solve", OWN, ids=lambda solve: f"{solve.method} {solve.tolerance or 'on a grid'}")
@pytest.mark.parametrize(
    ("gradient", "trace"),
    [("backprop", "exact"), ("checkpoint", "exact"), ("backprop", "hutchinson"), ("backprop", "none")],
)
def test_float32_stays_float32(solve, gradient, trace):
    flow, x = CNF(MLPField(2, hidden=(4,), time="hyper")), torch.randn(3, 2)
    energies = ("kinetic_energy",) if trace == "none" else ("kinetic_energy", "jacobian_energy")
    solve = Solve(**vars(solve) | dict(gradient=gradient, trace=trace, energies=energies, generator=seeded()))
    with NoFloat64():
        for go in (flow, flow.inverse):
            result = go(x, solve=solve)
            part = result.value.sum() + sum(energy.sum() for energy in result.penalties.values())
            (part if trace == "none" else part + result.logdet.sum()).backward()
    assert result.value.dtype == result.logdet.dtype == result.penalties["kinetic_energy"].dtype == torch.float32


class Looks(TorchDispatchMode):
    """Counts how often a number is fetched from the device, for which the program waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def looks(solve: Solve) -> int:
    flow, x = CNF(redrawn(MLPField(2, hidden=(4,)), scale=1.0)), torch.randn(3, 2)
    with Looks() as mode:
        for go in (flow, flow.inverse):
            go(x, solve=solve).logdet.sum().backward()
    return mode.count


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("method", STAGES)
def test_a_grid_is_gone_without_a_look_at_the_numbers(method, gradient):
    few, many = (looks(on_grid(method, steps, gradient=gradient)) for steps in (2, 7))
    assert few == many <= 2 * 4, "a look or two after the solve, none within"


def test_the_alarm_for_looks_rings():
    assert looks(Solve(tolerance=1e-2)) < looks(Solve(tolerance=1e-6))


# When it goes wrong


def failing(function, solve: Solve, z: float | list = 2.0, ends=(0.0, 1.0), dtype=torch.float64):
    """The error that a field ends in, and how often the field was asked before."""
    calls = []

    def dynamics(t, z):
        calls.append(t.item())
        return function(t, z), z.new_zeros(0, len(z))

    state = torch.tensor(z, dtype=dtype).view(-1, 1)
    with pytest.raises(SolveError) as failed:
        integrate(dynamics, state, *ends, solve)
    error = failed.value
    assert isinstance(error, FloatingPointError)
    assert f"at t = {error.t:.6g}, after {error.step} steps, where max|z| = {error.norm:.3g}; " in str(error)
    assert "try " in str(error)
    return error, len(calls)


SOLVES = {f"{name}, grid": on_grid(name, 8) for name in FIXED} | {
    f"{name}, adaptive": Solve(method=name, tolerance=1e-5) for name in ADAPTIVE
}


@pytest.fixture(params=SOLVES)
def any_solve(request) -> Solve:
    return SOLVES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_field_that_is_not_finite(any_solve, dtype, bad):
    error, calls = failing(lambda t, z: bad * z, any_solve, [2.0, -3.0], dtype=dtype)
    assert (error.t, error.step, error.norm) == (0, 0, 3) and calls < 500


def test_a_field_that_is_nan_at_some_points(any_solve):
    error, calls = failing(lambda t, z: torch.where(z > 1, math.nan, z), any_solve, [0.1, 2.0, -3.0])
    assert (error.t, error.step, error.norm) == (0, 0, 3) and calls < 500


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)])
def test_a_field_that_becomes_nan_half_way(any_solve, ends):
    """z = 2 eᵗ until three eighths of the way: where it stopped, after how many steps, and how large it was."""
    start, sign = ends[0], 1 if ends[1] > ends[0] else -1

    def field(t, z):
        return torch.where(sign * (t - start) >= 0.375, math.nan, sign * z)

    error, calls = failing(field, any_solve, ends=ends)
    passed = sign * (error.t - start)
    assert calls < 600
    if any_solve.times is not None:
        # the steps end at the eighths; a method with a stage at the end of the step fails in the one before
        assert error.step in (2, 3) and passed == pytest.approx(error.step / 8)
        if any_solve.method in STAGES:
            assert error.step == (3 if any_solve.method in ("euler", "midpoint") else 2)
    elif any_solve.method == "dopri5":
        assert 0.375 - 1e-6 < passed < 0.375 and error.step > 1
    else:
        assert (passed, error.step) == (0, 0) and "it had begun" in str(error), "torchdiffeq does not tell"
    assert error.norm == pytest.approx(2 * math.exp(passed), rel=0.15 if "euler" in any_solve.method else 0.01)


def test_a_nan_in_the_rates_alone(any_solve):
    def dynamics(t, z):
        return 0 * z, torch.where(t > 0.6, math.nan, z).T

    with pytest.raises(SolveError) as failed:
        integrate(dynamics, torch.ones(2, 1, dtype=torch.float64), 0.0, 1.0, any_solve, rates=1, controlled=0)
    if any_solve.times is not None and any_solve.method in STAGES:
        assert (
            failed.value.t == (0.625 if any_solve.method in ("euler", "midpoint") else 0.5) and failed.value.norm == 1
        )


def test_a_field_that_blows_up():
    """ż = z² from 2 is 2 / (1 − 2t): there is no state at t = ½, and steps that are chosen stop short of it."""
    error, calls = failing(lambda t, z: z.square(), Solve(tolerance=1e-6))
    assert error.t == pytest.approx(0.5, abs=1e-5) and error.norm > 1e5 and error.step > 10 and calls < 5000


@pytest.mark.parametrize("name", [name for name in SOLVES if name != "dopri5, adaptive"])
def test_a_field_that_blows_up_on_a_grid_and_elsewhere(name):
    solve = SOLVES[name]
    solve = Solve(method=solve.method, tolerance=1e-2) if solve.times is None else on_grid(solve.method, 64)
    error, calls = failing(lambda t, z: z.square(), solve)
    assert calls < 20_000
    if solve.times is not None:
        assert 0.4 < error.t < 0.8 and error.step == pytest.approx(64 * error.t) and error.norm > 10


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_stiff_field_uses_up_its_steps(method):
    """ż = −1000 (z − cos t) allows an explicit method steps of about 3/1000: 200 are too few, 2000 are enough."""

    def stiff(t, z):
        return -1000 * (z - t.cos())

    if method == "dopri5":
        error, calls = failing(stiff, Solve(tolerance=1e-4, max_steps=200), 0.0)
        assert "max_steps = 200 were not enough" in str(error) and calls <= 2 + 6 * 200
        assert 0.1 < error.t < 0.9 and 100 < error.step <= 200 and error.norm == pytest.approx(math.cos(error.t), 1e-2)
        z, enough = torch.zeros(1, 1, dtype=torch.float64), Solve(tolerance=1e-4, max_steps=2000)
        end, _, stats = integrate(lambda t, z: (stiff(t, z), z.new_zeros(0, 1)), z, 0.0, 1.0, enough)
        assert end.item() == pytest.approx(math.cos(1) + math.sin(1) / 1000, abs=1e-4) and stats.rejected > 10
    else:
        error, _ = failing(stiff, Solve(method=method, tolerance=1e-4, max_steps=50), 0.0)
        assert "max_num_steps exceeded" in str(error)


def test_a_step_that_vanishes_in_float32():
    error, _ = failing(lambda t, z: z.square(), Solve(tolerance=1e-5), dtype=torch.float32)
    assert "the step vanished (h = " in str(error) and error.t == pytest.approx(0.5, abs=1e-4)


def test_an_error_comes_through_a_pickle():
    """As from a worker process."""
    error, _ = failing(lambda t, z: z * math.nan, on_grid("rk4", 4))
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is SolveError and str(other) == str(error) and other.args == error.args
    assert (other.t, other.step, other.norm) == (error.t, error.step, error.norm) == (0, 0, 2)


def test_an_assertion_without_a_message_in_torchdiffeq():
    def field(t, z):
        raise AssertionError

    error, _ = failing(field, Solve(method="torchdiffeq:dopri5"))
    assert "torchdiffeq's dopri5 stopped (an assertion failed)" in str(error)
    assert isinstance(error.__cause__, AssertionError)


def test_a_field_that_does_not_repeat_itself():
    """Once NaN and then no more, as noise in a field may be: still an error, and where it was."""
    first = [True]

    def field(t, z):
        bad, first[0] = first[0], False
        return z * math.nan if bad else z

    error, _ = failing(field, on_grid("rk4", 4))
    assert (error.t, error.step) == (0, 0)


def test_finite_numbers_are_no_failure_at_the_border():
    """Large, but finite: no false alarm."""
    field = Field(lambda t, z: 0 * z)
    result = CNF(field)(torch.full((2, 1), 3e38), solve=on_grid("rk4", 2))
    assert result.value.isfinite().all()
