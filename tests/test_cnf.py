"""Continuous flows: the contract, closed forms, gradients, divergences, energies, and what they refuse."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from builders import Bare, Counted, Field, redrawn, seeded
from torch import nn
from torch.func import jacrev, vmap

from cnfkit import (
    CNF,
    ActNorm,
    Chain,
    CheckFailed,
    CheckpointError,
    Flow,
    Inverse,
    MLPField,
    NegativeLogLikelihood,
    Normal,
    Solve,
    SolveError,
    Standardize,
    bijection_contract,
    evaluate,
    fit,
    flow_contract,
    load,
    save,
    toy_density,
    uniform_grid,
)
from cnfkit.ode.divergence import divergence, draw_probes, squared_norm
from cnfkit.ode.fields import Concat, ConcatSquash, Hyper
from cnfkit.ode.moments import moments

D = torch.float64
TIMES, ACTIVATIONS = ("concat", "concatsquash", "hyper"), ("tanh", "softplus")
BOTH = ("kinetic_energy", "jacobian_energy")


def field_of(d: int = 2, time: str = "concatsquash", activation: str = "tanh", hidden=(8, 8)) -> MLPField:
    """A field that does something, and asks for no small steps."""
    return redrawn(MLPField(d, hidden, time, activation))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def products(field, t, z, probes):
    """The value and the products at one time."""
    (moment,) = moments(field, t[None])
    return moment.with_products(z, probes)


class Picture(nn.Module):
    """Convolutions of an image and of the time, a channel more."""

    def __init__(self, shape=(2, 4, 4)) -> None:
        super().__init__()
        self.event_shape = torch.Size(shape)
        self.net = nn.Sequential(nn.Conv2d(shape[0] + 1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, shape[0], 1))

    def forward(self, t, z):
        return self.net(torch.cat([z, t.expand(len(z), 1, *z.shape[2:])], 1))


class Linear(nn.Module):
    r"""v = a(t) (A z + b), the rate a being 1 + cos 3t or 1, with products of its own."""

    def __init__(self, matrix, shift=None, steady: bool = True) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.shift = nn.Parameter(torch.zeros_like(matrix[0]) if shift is None else shift)
        self.event_shape, self.steady = torch.Size([len(matrix)]), steady

    def pace(self, t):
        return 1.0 if self.steady else 1 + (3 * t).cos()

    def forward(self, t, z):
        return self.pace(t) * F.linear(z, self.matrix, self.shift)

    def with_products(self, t, z, probes=None):
        if probes is None:
            probes = torch.eye(z.shape[1]).to(z)[:, None].expand(-1, *z.shape)
        return self(t, z), self.pace(t) * F.linear(probes, self.matrix)


class Scaled(nn.Module):
    """v = a ⊙ z: a diagonal Jacobian, of which Rademacher probes see the trace exactly."""

    def __init__(self, scale) -> None:
        super().__init__()
        self.scale, self.event_shape = nn.Parameter(scale), scale.shape

    def forward(self, t, z):
        return self.scale * z


# The contract

TIGHT = Solve(tolerance=1e-8)
GRID = Solve(times=uniform_grid(4))
CONFIGURATIONS = {
    "d = 1, concat, tanh": (lambda: CNF(field_of(1, "concat")), TIGHT),
    "d = 2, concatsquash, tanh, one layer": (lambda: CNF(field_of(2, hidden=(8,))), TIGHT),
    "d = 3, hyper, tanh": (lambda: CNF(field_of(3, "hyper")), GRID),
    "d = 5, concat, softplus, three layers": (lambda: CNF(field_of(5, "concat", "softplus", (8, 8, 8))), GRID),
    "d = 2, concatsquash, softplus": (lambda: CNF(field_of(2, "concatsquash", "softplus")), GRID),
    "d = 2, hyper, softplus, one layer": (lambda: CNF(field_of(2, "hyper", "softplus", (8,))), GRID),
    "another interval": (lambda: CNF(field_of(2), interval=(-1.0, 0.5)), GRID),
    "autograd": (lambda: CNF(Bare(field_of(2))), GRID),
    "images": (lambda: redrawn(CNF(Picture((2, 2, 2))), scale=0.1), Solve(times=uniform_grid(2))),
    "rk4": (lambda: CNF(field_of(2)), Solve(method="rk4", times=uniform_grid(7))),
    "rk4_38": (lambda: CNF(field_of(2)), Solve(method="rk4_38", times=(0, 0.1, 0.3, 0.4, 0.6, 0.8, 1))),
    "torchdiffeq, chosen steps": (lambda: CNF(field_of(2)), Solve(method="torchdiffeq:dopri5", tolerance=1e-7)),
    "torchdiffeq, grid": (lambda: CNF(field_of(2)), Solve(method="torchdiffeq:rk4", times=uniform_grid(5))),
    "Hutchinson in one dimension": (lambda: CNF(field_of(1)), Solve(trace="hutchinson", times=uniform_grid(4))),
    "Hutchinson of a diagonal": (
        lambda: CNF(Scaled(torch.tensor([0.5, -1.0, 0.2]))),
        Solve(trace="hutchinson", times=uniform_grid(4)),
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_contract(name):
    make, solve = CONFIGURATIONS[name]
    flow = make()
    bijection_contract(flow, normal(2, *flow.event_shape, dtype=torch.float32), solve=solve, tolerance=1e-5)


@pytest.mark.parametrize("d", [1, 2])
def test_flow_contract(d):
    """The density of the samples, and its integral."""
    standard = Standardize(torch.full((d,), 3.0), torch.full((d,), 0.5))
    flow = Flow(Normal(d), Chain(standard, CNF(redrawn(MLPField(d, (8,), "concat"), scale=0.4))))
    assert flow.sample(5, generator=seeded()).std() > 0.1
    flow_contract(flow, 3 + normal(2, d, dtype=torch.float32), solve=TIGHT, tolerance=1e-5)


class Forgetful(Linear):
    """Products that are wrong by one part in a hundred."""

    def with_products(self, t, z, probes=None):
        v, rows = super().with_products(t, z, probes)
        return v, 1.01 * rows


class Crowd(Linear):
    """A field that centres its batch: each point sees the others."""

    def forward(self, t, z):
        return super().forward(t, z - z.mean(0))

    def with_products(self, t, z, probes=None):
        return super().with_products(t, z, probes)


@pytest.mark.parametrize(
    ("kind", "promise"), [(Forgetful, "log-determinant is that of autograd's"), (Crowd, "does not depend on its batch")]
)
def test_the_contract_fails_for_a_broken_field(kind, promise):
    flow = CNF(kind(torch.tensor([[0.5, 1.0], [-1.0, 0.2]])))
    with pytest.raises(CheckFailed, match=promise):
        bijection_contract(flow, normal(3, 2, dtype=torch.float32), solve=TIGHT, tolerance=1e-5)


# Closed forms


MATRIX = torch.tensor([[0.3, -1.2, 0.4], [0.8, -0.5, 0.1], [0.0, 0.6, 0.9]], dtype=D)
SHIFT = torch.tensor([0.5, -0.2, 1.0], dtype=D)
FIELDS = {"products": lambda field: field, "autograd": Bare}


def closed_form(matrix, shift, x, length: float):
    r"""The end, the log-determinant and both energies of ż = A z + b, as functions that can be differentiated.

    With y = (z, 1) and M = (A b; 0 0) it is ẏ = M y, and the kinetic energy is ½ ∫ |M y|² dt, which one matrix
    exponential gives. Source: Van Loan, *Computing integrals involving the matrix exponential*.
    """
    m = torch.cat([torch.cat([matrix, shift[:, None]], 1), torch.zeros(1, len(matrix) + 1, dtype=D)])
    y = torch.cat([x, torch.ones(len(x), 1, dtype=D)], 1)
    block = torch.cat([torch.cat([-m.T, 0.5 * m.T @ m], 1), torch.cat([torch.zeros_like(m), m], 1)])
    exponential = torch.matrix_exp(length * block)
    forward = exponential[len(m) :, len(m) :]
    gram = forward.T @ exponential[: len(m), len(m) :]
    energies = abs(length) * matrix.square().sum().expand(len(x)), torch.einsum("ni,ij,nj->n", y, gram, y).abs()
    return (y @ forward.T)[:, :-1], (length * matrix.trace()).expand(len(x)), energies[1], energies[0]


def test_the_closed_form_is_one():
    """The kinetic energy by the midpoint rule, and the end by the exponential of A alone."""
    x, (t, h) = normal(4, 3), ((torch.arange(4000, dtype=D) + 0.5) / 2000, 1 / 2000)
    end, _, kinetic, _ = closed_form(MATRIX, SHIFT, x, 2.0)
    paths = torch.stack([closed_form(MATRIX, SHIFT, x, s.item())[0] for s in t[::40]])
    speeds = (paths @ MATRIX.T + SHIFT).square().sum(-1) / 2
    torch.testing.assert_close(speeds.mean(0) * 2, kinetic, rtol=0.05, atol=0)
    assert h == 1 / 2000
    still = torch.linalg.solve(MATRIX, SHIFT)
    torch.testing.assert_close(end, (x + still) @ torch.matrix_exp(2 * MATRIX).T - still)


SOLVES = {
    "backprop": Solve(tolerance=1e-11),
    "grid": Solve(times=uniform_grid(25)),
    "checkpoint": Solve(times=uniform_grid(25), gradient="checkpoint"),
    "torchdiffeq": Solve(method="torchdiffeq:dopri5", tolerance=1e-11),
    "adjoint": Solve(method="torchdiffeq:dopri5", tolerance=1e-11, gradient="adjoint"),
}


@pytest.mark.parametrize(("kind", "how"), [*(("products", how) for how in SOLVES), ("autograd", "grid")])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_linear_field(kind, how, back):
    """The flow, its log-determinant and energies, and the gradients of all of them."""
    field, x = Linear(MATRIX.clone(), SHIFT.clone()), normal(4, 3).requires_grad_()
    flow = CNF(FIELDS[kind](field), interval=(0.5, 2.0))
    solve = Solve(**vars(SOLVES[how]) | {"energies": BOTH})
    result = (flow.inverse if back else flow)(x, solve=solve)
    measured = (result.value, result.logdet, *(result.penalties[name] for name in BOTH))
    exact = closed_form(field.matrix, field.shift, x, -1.5 if back else 1.5)
    assert (result.penalties["kinetic_energy"] > 0).all() and (result.penalties["jacobian_energy"] > 0).all()
    torch.testing.assert_close(measured, exact, rtol=1e-7, atol=1e-7)

    def gradients(value, logdet, kinetic, jacobian):
        total = (value * normal(4, 3, seed=1)).sum() + 2 * logdet.sum() + 0.3 * kinetic.sum() + 0.1 * jacobian.sum()
        return torch.autograd.grad(total, (field.matrix, field.shift, x), retain_graph=True)

    torch.testing.assert_close(gradients(*measured), gradients(*exact), rtol=1e-6, atol=1e-6)
    stats = result.stats[0]
    assert stats.backward_evaluations == {"checkpoint": 150}.get(how, stats.backward_evaluations)
    assert (stats.backward_evaluations > 0) == (how in ("checkpoint", "adjoint"))


@pytest.mark.parametrize("kind", FIELDS)
def test_linear_field_of_the_time(kind):
    """v = a(t) (A z + b): the flow of A and b for the time ∫ a; the Jacobian's energy is ∫ a² times its norm."""
    x, flow = normal(4, 3), CNF(FIELDS[kind](Linear(MATRIX, SHIFT, steady=False)), interval=(0.5, 2.0))

    def integral(t):  # of a, and of a²
        return t + math.sin(3 * t) / 3, 1.5 * t + 2 * math.sin(3 * t) / 3 + math.sin(6 * t) / 12

    length, squares = (b - a for a, b in zip(integral(0.5), integral(2.0), strict=True))
    for go, sign in ((flow, 1), (flow.inverse, -1)):
        result = go(x, solve=Solve(tolerance=1e-11, energies=("jacobian_energy",)))
        value, logdet, _, _ = closed_form(MATRIX, SHIFT, x, sign * length)
        torch.testing.assert_close((result.value, result.logdet), (value, logdet), rtol=1e-8, atol=1e-8)
        energy = torch.full_like(logdet, squares * MATRIX.square().sum())
        torch.testing.assert_close(result.penalties["jacobian_energy"], energy, rtol=1e-8, atol=0)


def test_energies_as_means_over_the_dimensions():
    flow, x = CNF(Linear(MATRIX, SHIFT)), normal(4, 3)
    total, mean = (flow(x, solve=Solve(energies=BOTH, reduction=by, tolerance=1e-9)) for by in ("sum", "mean"))
    for name in BOTH:
        torch.testing.assert_close(3 * mean.penalties[name], total.penalties[name], rtol=1e-8, atol=0)
    assert mean.logdet.equal(total.logdet)
    picture = redrawn(CNF(Picture())).double()
    total, mean = (picture(normal(2, 2, 4, 4), solve=Solve(energies=BOTH[:1], times=(0, 1), reduction=by))
                   for by in ("sum", "mean"))  # fmt: skip
    torch.testing.assert_close(32 * mean.penalties[BOTH[0]], total.penalties[BOTH[0]])


def test_energies_are_integrated_in_the_order_that_is_asked_for():
    flow, x = CNF(field_of().double()), normal(4, 2)
    plain = flow(x, solve=Solve(times=uniform_grid(3)))
    assert plain.penalties == {}
    one = flow(x, solve=Solve(times=uniform_grid(3), energies=BOTH)).penalties
    other = flow(x, solve=Solve(times=uniform_grid(3), energies=BOTH[::-1])).penalties
    assert list(one) == list(BOTH) and all(one[name].equal(other[name]) for name in BOTH)
    alone = flow(x, solve=Solve(times=uniform_grid(3), energies=BOTH[:1], trace="none"))
    torch.testing.assert_close(alone.penalties[BOTH[0]], one[BOTH[0]])
    torch.testing.assert_close(plain.value, alone.value)


def test_energies_of_a_path_are_the_same_both_ways():
    flow, x, solve = CNF(field_of().double()), normal(4, 2), Solve(tolerance=1e-10, energies=BOTH)
    there = flow(x, solve=solve)
    back = flow.inverse(there.value, solve=solve)
    torch.testing.assert_close(back.penalties, there.penalties, rtol=1e-7, atol=1e-9)


def test_a_chain_adds_energies_and_keeps_an_account_of_each_solve():
    parts = [redrawn(CNF(MLPField(2, (4,)), interval=(0, k)), seed=k) for k in (1, 2)]
    x, solve = normal(3, 2, dtype=torch.float32), Solve(times=uniform_grid(2), energies=BOTH)
    first = parts[0](x, solve=solve)
    second = parts[1](first.value, solve=solve)
    whole = Chain(parts[0], ActNorm(2), parts[1])(x, solve=solve)
    for name in BOTH:
        torch.testing.assert_close(whole.penalties[name], first.penalties[name] + second.penalties[name])
    assert len(whole.stats) == 2 and whole.evaluations == 24


# Parts


def test_parts_make_the_whole():
    flow, x = CNF(field_of().double(), interval=(-1.0, 2.0)), normal(4, 2)
    first, second = flow.between(-1.0, 0.3), flow.between(0.3, 2.0)
    assert first.field is flow.field and second.interval == (0.3, 2.0)
    solve = Solve(tolerance=1e-10, energies=BOTH)
    whole, parts = flow(x, solve=solve), Chain(first, second)(x, solve=solve)
    torch.testing.assert_close(parts.value, whole.value, rtol=0, atol=1e-8)
    torch.testing.assert_close(parts.logdet, whole.logdet, rtol=0, atol=1e-8)
    torch.testing.assert_close(parts.penalties, whole.penalties, rtol=1e-7, atol=1e-8)


def test_the_inverse_of_a_continuous_flow():
    flow, x = CNF(field_of().double()), normal(4, 2)
    turned, plain = Inverse(flow)(x, solve=GRID), flow.inverse(x, solve=GRID)
    assert turned.value.equal(plain.value) and turned.logdet.equal(plain.logdet) and turned.stats[0].accepted == 4


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "none"])
def test_a_part_of_no_length_is_the_identity(trace):
    """So the density at the time of the base is the base's."""
    field, x = Counted(field_of()), normal(4, 2, dtype=torch.float32)
    last = CNF(field, interval=(-1.0, 1.0)).between(1, 1)
    energies = BOTH[:1] if trace == "none" else BOTH
    for go in (last, last.inverse):
        for steps in (dict(), dict(times=(0, 1)), dict(method="torchdiffeq:dopri5")):
            result = go(x, solve=Solve(trace=trace, energies=energies, **steps))
            assert result.value.equal(x) and list(result.penalties) == list(energies)
            assert result.logdet.isnan().all() if trace == "none" else not result.logdet.any()
            assert not any(energy.any() for energy in result.penalties.values())
    assert field.plain == field.with_rows == 0
    flow = Flow(Normal(2), last)
    assert flow.log_prob(x).equal(flow.base.log_prob(x))


# Gradients against finite differences

TRACES = {
    "exact": dict(),
    "rademacher": dict(trace="hutchinson", probes=2),
    "gaussian": dict(trace="hutchinson", noise="gaussian"),
}
STEPS = {
    "chosen": dict(tolerance=1e-9),
    "grid": dict(method="rk4_38", times=uniform_grid(3)),
    "checkpoint": dict(times=(0, 0.3, 1), gradient="checkpoint"),
}


def derivative_error(module: nn.Module, function) -> float:
    """The gradient along one direction through all parameters, against a central difference."""
    parameters = list(module.parameters())
    along = [normal(*parameter.shape, seed=k) for k, parameter in enumerate(parameters)]
    gradient = torch.autograd.grad(function(), parameters, materialize_grads=True)
    predicted = sum((a * b).sum() for a, b in zip(gradient, along, strict=True)).item()
    h, values = 1e-5, []
    with torch.no_grad():
        for factor in (h, -2 * h):
            for parameter, direction in zip(parameters, along, strict=True):
                parameter += factor * direction
            values.append(function().item())
        for parameter, direction in zip(parameters, along, strict=True):
            parameter += h * direction
    assert abs(predicted) > 1e-3
    return abs(predicted - (values[0] - values[1]) / (2 * h)) / abs(predicted)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize(("kind", "steps"), [*(("products", steps) for steps in STEPS), ("autograd", "grid")])
def test_gradient_of_the_log_density(trace, steps, kind):
    flow, x = Flow(Normal(2), CNF(FIELDS[kind](field_of()))).double(), normal(3, 2).requires_grad_()

    def log_prob(points=x):
        return flow.log_prob(points, solve=Solve(**TRACES[trace], **STEPS[steps], generator=seeded())).sum()

    assert derivative_error(flow, log_prob) < 1e-6
    (gradient,), along = torch.autograd.grad(log_prob(), x), normal(3, 2, seed=5)
    with torch.no_grad():
        difference = (log_prob(x + 1e-5 * along) - log_prob(x - 1e-5 * along)).item() / 2e-5
    assert (gradient * along).sum().item() == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("kind", FIELDS)
def test_gradient_of_the_loss_with_penalties(trace, kind):
    model = Flow(Normal(2), CNF(FIELDS[kind](field_of()))).double()
    solve = Solve(**TRACES[trace], **STEPS["grid"], reduction="mean")
    loss = NegativeLogLikelihood(model, "bits", solve, dict(kinetic_energy=0.7, jacobian_energy=0.3))
    x = normal(5, 2)
    assert derivative_error(loss, lambda: loss(x, seeded())[0]) < 1e-6


def test_gradient_of_samples():
    """Through the inverse, and without the divergence."""
    flow = Flow(Normal(2), CNF(field_of())).double()
    solve = Solve(tolerance=1e-10)
    assert derivative_error(flow, lambda: flow.rsample(4, solve=solve, generator=seeded()).square().sum()) < 1e-6


# Hutchinson's estimate


NOISES = ("rademacher", "gaussian")


def probe_variance(matrix, noise: str) -> float:
    """The variance of ε·Aε."""
    both = matrix + matrix.T
    return (both.square().sum() - (both.diag().square().sum() if noise == "rademacher" else 0)).item() / 2


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("probes", [1, 4])
@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("matrix", [MATRIX, MATRIX + MATRIX.T], ids=["nonsymmetric", "symmetric"])
def test_hutchinson_is_unbiased(noise, probes, kind, matrix):
    """20 000 points, each with probes of its own, within 5 standard errors, which are a hundredth of the truth."""
    n, flow = 20_000, CNF(FIELDS[kind](Linear(matrix)), interval=(0, 2))
    solve = Solve(method="euler", times=(0, 1), trace="hutchinson", noise=noise, probes=probes,
                  energies=("jacobian_energy",), generator=seeded(3))  # fmt: skip
    for go, sign in ((flow, 1), (flow.inverse, -1)):
        result = go(torch.zeros(n, 3, dtype=D), solve=solve)
        truths = (sign * 2 * matrix.trace(), 2 * matrix.square().sum())
        for estimate, truth in zip((result.logdet, result.penalties["jacobian_energy"]), truths, strict=True):
            standard_error = estimate.std() / n**0.5
            assert (estimate.mean() - truth).abs() < 5 * standard_error < 0.15 * truth.abs()
        # the variance of a variance: that of a fourth moment, a few hundredths here
        wanted = 4 * probe_variance(matrix, noise) / probes
        assert result.logdet.var().item() == pytest.approx(wanted, rel=0.1)


def test_variances_by_hand():
    """Rademacher noise does not see the diagonal."""
    assert probe_variance(torch.tensor([[5.0, 1.0], [3.0, 7.0]]), "rademacher") == 16
    assert probe_variance(torch.eye(3), "gaussian") == 6


class Listener(Counted):
    """A field that notes the probes that it is asked about."""

    def __init__(self, field) -> None:
        super().__init__(field)
        self.seen = []

    def with_products(self, t, z, probes=None):
        self.seen.append(probes)
        return super().with_products(t, z, probes)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    "steps", [dict(tolerance=1e-6), dict(method="rk4", times=uniform_grid(5))], ids=["chosen", "grid"]
)
def test_probes_are_drawn_once_a_solve(noise, steps):
    """Probes that changed within a solve would make the field a random one, which has no solution."""
    flow, generator = CNF(Listener(field_of(3))), seeded()
    solve = Solve(trace="hutchinson", probes=4, noise=noise, generator=generator, **steps)
    result = flow(normal(5, 3, dtype=torch.float32), solve=solve)
    seen, fresh = flow.field.seen, seeded()
    # one stage of Dormand–Prince has no weight in the step, and needs no divergence
    assert len(seen) + flow.field.plain == result.evaluations > 10 and all(probes is seen[0] for probes in seen)
    if noise == "gaussian":
        expected = torch.randn(4, 5, 3, generator=fresh)
    else:
        expected = torch.randint(0, 2, (4, 5, 3), generator=fresh).float() * 2 - 1
        assert seen[0].abs().eq(1).all()
    assert seen[0].equal(expected) and generator.get_state().equal(fresh.get_state())
    flow(normal(5, 3, dtype=torch.float32), solve=solve)
    assert not flow.field.seen[-1].equal(seen[0]), "the next solve draws new ones"


def test_probes_are_a_function_of_the_generator():
    flow, x, state = CNF(field_of(3)), normal(5, 3, dtype=torch.float32), torch.get_rng_state()

    def logdet(seed, flow=flow, x=x):
        return flow(x, solve=Solve(trace="hutchinson", generator=seeded(seed))).logdet

    assert logdet(0).equal(logdet(0)) and not logdet(0).equal(logdet(1))
    assert torch.get_rng_state().equal(state), "a generator was given, so the global one is left alone"
    double = logdet(0, copy.deepcopy(flow).double(), x.double())
    torch.testing.assert_close(double.float(), logdet(0), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    first = flow(x, solve=Solve(trace="hutchinson")).logdet
    torch.manual_seed(0)
    assert flow(x, solve=Solve(trace="hutchinson")).logdet.equal(first)


@pytest.mark.parametrize("trace", ["exact", "none"])
def test_no_probes_where_none_are_needed(trace):
    generator = seeded()
    CNF(field_of())(normal(3, 2, dtype=torch.float32), solve=Solve(trace=trace, generator=generator))
    assert generator.get_state().equal(seeded().get_state())
    assert draw_probes(Solve(trace=trace), torch.zeros(3, 2)) is None


def test_the_generator_of_a_call_is_that_of_the_probes():
    """Unless the solve has its own."""
    flow, state = Flow(Normal(3), CNF(field_of(3))), torch.get_rng_state()
    solve = Solve(trace="hutchinson", times=uniform_grid(2))
    for draw in (flow.sample_and_log_prob, flow.rsample_and_log_prob):
        (x, first), (_, again) = (draw(5, solve=solve, generator=seeded()) for _ in range(2))
        own = Solve(trace="hutchinson", times=uniform_grid(2), generator=seeded(1))
        y, other = draw(5, solve=own, generator=seeded())
        assert first.equal(again) and y.equal(x) and not first.equal(other)
    assert torch.get_rng_state().equal(state)


def test_probes_are_averaged_over():
    field, z, t = field_of(3).double(), normal(5, 3), torch.tensor(0.3, dtype=D)
    probes = draw_probes(Solve(trace="hutchinson", probes=3, generator=seeded()), z)
    _, rows = field.with_products(t, z, probes)
    singly = [(divergence(rows[k : k + 1], probes[k : k + 1]), squared_norm(rows[k : k + 1], probes[k : k + 1]))
              for k in range(3)]  # fmt: skip
    together = divergence(rows, probes), squared_norm(rows, probes)
    for k in range(2):
        torch.testing.assert_close(
            together[k].view(-1, 5).mean(0), torch.cat([one[k].view(1, 5) for one in singly]).mean(0)
        )


def test_the_steps_do_not_depend_on_the_noise():
    flow, x = CNF(redrawn(MLPField(3, (8,)), scale=1.0)), normal(20, 3, dtype=torch.float32)
    results = [flow(x, solve=Solve(trace="hutchinson", generator=seeded(k), tolerance=1e-4)) for k in range(3)]
    assert len({result.stats[0].times for result in results}) == 1 and results[0].stats[0].accepted > 2
    assert all(result.value.equal(results[0].value) for result in results)
    exact = flow(x, solve=Solve(tolerance=1e-4)).stats[0]
    assert exact.times != results[0].stats[0].times, "the exact log-determinant counts"


def test_the_log_determinant_of_an_estimate_is_controlled_if_wanted():
    """Points that hardly move, and a divergence that goes up and down on the way."""
    flow, x = CNF(Field(lambda t, z: 1e-3 * torch.sin(300 * z + 60 * t))), normal(20, 1)
    truth, estimate = flow(x, solve=Solve(tolerance=1e-11)).logdet, Solve(trace="hutchinson")
    for solve, status, good in (
        (estimate.within(1e-5), "within tolerance", True),
        (Solve(trace="hutchinson", method="torchdiffeq:dopri5", control_logdet=True), "within tolerance", True),
        (estimate, "points within tolerance", False),
        (Solve(control_logdet=False), "points within tolerance", False),
    ):
        result = flow(x, solve=solve)
        assert result.stats[0].status == status
        assert (result.logdet - truth).abs().max() < 1e-4 if good else (result.logdet - truth).abs().max() > 1e-2
    assert estimate.within(1e-5).control_logdet and estimate.control_logdet is None
    assert [Solve(max_steps=n).within(1e-5).max_steps for n in (8, 20_000)] == [10_000, 20_000]
    for solve, status in ((Solve(trace="none"), "within tolerance"), (GRID, "on a grid")):
        assert flow(x, solve=solve).stats[0].status == status


@pytest.mark.parametrize("d", [1, 3])
def test_hutchinson_is_exact_where_it_should_be(d):
    field = Scaled(torch.tensor([0.5, -1.0, 2.0], dtype=D)) if d > 1 else field_of(1).double()
    x = normal(5, d)
    exact, estimate = (CNF(field)(x, solve=Solve(trace=trace, times=uniform_grid(4), energies=BOTH))
                       for trace in ("exact", "hutchinson"))  # fmt: skip
    torch.testing.assert_close(estimate.logdet, exact.logdet)
    torch.testing.assert_close(estimate.penalties, exact.penalties)


# Fields


def jacobian(field, t, z):
    return vmap(jacrev(lambda point: field(t, point[None])[0]))(z)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(5,), (6, 4, 5)])
def test_products_are_those_of_the_jacobian(time, activation, hidden):
    field, z, t = field_of(3, time, activation, hidden).double(), normal(7, 3), torch.tensor(0.7, dtype=D)
    true = jacobian(field, t, z)
    v, columns = field.with_products(t, z)
    torch.testing.assert_close(v, field(t, z))
    torch.testing.assert_close(columns, true.permute(2, 0, 1))
    torch.testing.assert_close(divergence(columns, None)[0], vmap(torch.trace)(true))
    torch.testing.assert_close(squared_norm(columns, None), true.square().sum((1, 2)))
    probes = normal(4, 7, 3, seed=2)
    _, rows = field.with_products(t, z, probes)
    torch.testing.assert_close(rows, torch.einsum("nij,knj->kni", true, probes))


@pytest.mark.parametrize("probed", [False, True], ids=["exact", "probes"])
@pytest.mark.parametrize("time", TIMES)
def test_autograd_gives_what_products_give(probed, time):
    """Divergence and squared norm, and the gradients of both in the parameters and the points."""
    field, z, t = field_of(3, time).double(), normal(7, 3).requires_grad_(), torch.tensor(0.7, dtype=D)
    # columns and rows have the same squares on average alone, unless the probes are the unit vectors
    probes = torch.eye(3, dtype=D)[:, None].expand(-1, 7, -1) if probed else None
    results = []
    for kind in (field, Bare(field)):
        v, rows = products(kind, t, z, probes)
        parts = (v, divergence(rows, probes), squared_norm(rows, probes))
        total = sum((k + 1) * part.square().sum() for k, part in enumerate(parts))
        gradients = torch.autograd.grad(total, (*field.parameters(), z), materialize_grads=True)
        results.append((*parts, *gradients))
    torch.testing.assert_close(*results)


def test_autograd_with_probes_multiplies_from_the_left():
    field, z, t = field_of(3).double(), normal(7, 3), torch.tensor(0.7, dtype=D)
    probes, true = normal(2, 7, 3, seed=2), jacobian(field, t, z)
    _, rows = products(Bare(field), t, z, probes)
    torch.testing.assert_close(rows, torch.einsum("kni,nij->knj", probes, true))


def test_a_picture_is_differentiated_pixel_by_pixel():
    field, z, t = redrawn(Picture()).double(), normal(3, 2, 4, 4), torch.tensor(0.7, dtype=D)
    true = jacobian(field, t, z).flatten(1, 3).flatten(2)
    v, rows = products(field, t, z, None)
    torch.testing.assert_close(rows.flatten(2), true.transpose(0, 1))
    torch.testing.assert_close(divergence(rows, None)[0], vmap(torch.trace)(true))
    torch.testing.assert_close(squared_norm(rows, None), true.square().sum((1, 2)))
    assert v.shape == z.shape


@pytest.mark.parametrize("training", [False, True])
def test_autograd_leaves_no_graph_where_none_is_wanted(training):
    with torch.set_grad_enabled(training):
        result = CNF(Bare(field_of()))(normal(3, 2, dtype=torch.float32), solve=GRID)
        v, rows = products(Bare(field_of()), torch.tensor(0.5), normal(3, 2, dtype=torch.float32), None)
    for part in (result.value, result.logdet, v, rows):
        assert part.requires_grad == training


def test_a_tensor_that_a_field_captures_gets_its_gradients():
    """v = w tanh(a z), a frozen: w is no parameter of the field, and as much of its formula."""
    frozen, w, x = nn.Parameter(torch.tensor(0.5, dtype=D), False), torch.tensor(1.5, dtype=D), normal(4, 2)

    def logdet(w):
        return CNF(Field(lambda t, z: w * (frozen * z).tanh(), 2, [frozen]))(x, solve=GRID).logdet.sum()

    assert not logdet(w).requires_grad, "a graph that nothing wants is not kept"
    (gradient,) = torch.autograd.grad(logdet(w.requires_grad_()), w)
    difference = (logdet(w.detach() + 1e-5) - logdet(w.detach() - 1e-5)).item() / 2e-5
    assert gradient.item() == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("steps", [dict(tolerance=1e-4), dict(times=uniform_grid(3))], ids=["chosen", "grid"])
def test_inference_mode_changes_no_number(trace, steps):
    """Nor may autograd's divergence become zero where autograd is off."""
    flow, x = Flow(Normal(2), CNF(Bare(field_of()))), normal(5, 2, dtype=torch.float32)

    def numbers():
        solve = Solve(trace=trace, generator=seeded(), energies=BOTH, **steps)
        drawn = flow.sample_and_log_prob(3, solve=solve, generator=seeded())
        log_prob, result = flow.log_prob_and_result(x, solve=solve)
        return *drawn, log_prob, result.logdet, *result.penalties.values(), evaluate(flow, x, solve=solve)

    expected = numbers()
    with torch.inference_mode():
        measured = numbers()
    assert expected[3].all() and measured[-1] == expected[-1]
    assert all(a.equal(b) for a, b in zip(measured[:-1], expected[:-1], strict=True))


def test_layers_are_their_formulas():
    h, t = normal(4, 3), torch.tensor(0.7, dtype=D)

    concat = redrawn(Concat(3, 2)).double()
    weight, drift = concat.weight[:, :3], concat.weight[:, 3]
    torch.testing.assert_close(F.linear(h, *concat.at(t)), h @ weight.T + concat.bias + t * drift)
    joined = torch.cat([h, t.expand(4, 1)], 1)
    torch.testing.assert_close(concat(t, h), F.linear(joined, concat.weight, concat.bias), msg="one more input")

    squash = redrawn(ConcatSquash(3, 2)).double()
    gate = 1 / (1 + (-(t * squash.gate.weight[:, 0] + squash.gate.bias)).exp())
    expected = gate * (h @ squash.weight.T + squash.bias) + t * squash.drift.weight[:, 0]
    torch.testing.assert_close(squash(t, h), expected)

    hyper = redrawn(Hyper(3, 2, hidden=5)).double()
    first, _, last = hyper.net
    out = last.weight @ torch.tanh(t * first.weight[:, 0] + first.bias) + last.bias
    torch.testing.assert_close(F.linear(h, *hyper.at(t)), h @ out[:6].view(2, 3).T + out[6:])


@pytest.mark.parametrize("time", TIMES)
def test_every_layer_sees_the_time(time):
    field, z = field_of(2, time), normal(3, 2, dtype=torch.float32)
    for layer in field.layers:
        early, late = (layer.at(torch.tensor(t)) for t in (0.0, 1.0))
        assert not torch.equal(early[1], late[1]) and (time == "concat" or not torch.equal(early[0], late[0]))
    assert not torch.isclose(field(torch.tensor(0.0), z), field(torch.tensor(1.0), z)).any()


@pytest.mark.parametrize("time", TIMES)
def test_a_fresh_field_is_the_identity(time):
    """And not a dead one: the last layer has a gradient."""
    flow, x = CNF(MLPField(2, (8, 8), time)), normal(5, 2, dtype=torch.float32)
    for go in (flow, flow.inverse):
        result = go(x)
        assert result.value.equal(x) and not result.logdet.any()
    (flow(x).value * x).sum().backward()
    assert any(parameter.grad.any() for parameter in flow.field.layers[-1].parameters())


def test_a_field_that_does_not_see_the_point():
    """It moves all points alike, and changes no volume."""
    speed = nn.Parameter(torch.tensor([1.0, -2.0]))
    x = normal(4, 2, dtype=torch.float32)
    for field in (
        Field(lambda t, z: (3 * t**2 * speed).expand_as(z), 2, [speed]),
        Field(lambda t, z: torch.tensor([1.0, -2.0]).expand_as(z), 2),
    ):
        for trace in ("exact", "hutchinson"):
            result = CNF(field)(x, solve=Solve(trace=trace, energies=("jacobian_energy",)))
            torch.testing.assert_close(result.value, x + speed)
            assert not result.logdet.any() and not result.penalties["jacobian_energy"].any()
    moved = CNF(Field(lambda t, z: (3 * t**2 * speed).expand_as(z), 2, [speed]))(x)
    (gradient,) = torch.autograd.grad(moved.value.sum() + moved.logdet.sum(), speed)
    torch.testing.assert_close(gradient, torch.full((2,), 4.0))


# Shapes


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "none"])
@pytest.mark.parametrize(
    ("event", "solve"),
    [
        ((2,), GRID),
        ((1, 2, 2), GRID),
        ((1, 2, 2), Solve(tolerance=1e-7)),
        ((2,), Solve(method="torchdiffeq:dopri5", tolerance=1e-7)),
    ],
    ids=["vectors, grid", "images, grid", "images, chosen", "vectors, torchdiffeq"],
)
def test_batches_of_any_shape(trace, event, solve):
    """Twelve points as (3, 4) are those of (12,); a point alone; none at all."""
    flow = CNF(field_of()) if len(event) == 1 else redrawn(CNF(Picture(event)))
    flow, x = flow.double(), normal(12, *event)
    energies = ("kinetic_energy",) if trace == "none" else BOTH

    def go(points, direction):
        options = dict(trace=trace, energies=energies, generator=seeded())
        result = direction(points, solve=Solve(**vars(solve) | options))
        batch = points.shape[: points.dim() - len(event)]
        assert result.value.shape == points.shape and result.logdet.shape == batch
        assert list(result.penalties) == list(energies)
        assert all(energy.shape == batch for energy in result.penalties.values())
        assert result.logdet.isnan().all() if trace == "none" else result.logdet.isfinite().all()
        return result

    for direction in (flow, flow.inverse):
        row, grid = go(x, direction), go(x.view(3, 4, *event), direction)
        torch.testing.assert_close(grid.value.view_as(x), row.value)
        torch.testing.assert_close(grid.logdet.flatten(), row.logdet, equal_nan=True)
        torch.testing.assert_close(grid.penalties[BOTH[0]].flatten(), row.penalties[BOTH[0]])
        swapped = go(x.view(3, 4, *event).transpose(0, 1), direction)
        torch.testing.assert_close(swapped.value.transpose(0, 1), grid.value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(go(x[5], direction).value, row.value[5], rtol=1e-5, atol=1e-5)
        for none in ((0,), (3, 0)):
            assert go(x.new_zeros(*none, *event), direction).evaluations == 0


def test_no_points_have_no_density_and_no_samples():
    flow = Flow(Normal(2), CNF(field_of()))
    assert flow.log_prob(torch.zeros(0, 2)).shape == (0,) and flow.sample(0).shape == (0, 2)
    assert flow.log_prob(torch.zeros(2)).shape == () and flow.sample().shape == (2,)


def test_points_of_any_layout():
    flow, x = redrawn(CNF(Picture())), normal(3, 2, 4, 4, dtype=torch.float32)
    last = x.to(memory_format=torch.channels_last)
    solve = Solve(times=uniform_grid(2))
    torch.testing.assert_close(flow(last, solve=solve).value, flow(x, solve=solve).value)
    flow, turned = CNF(field_of()), x.view(3, -1)[:2].T
    torch.testing.assert_close(flow(turned, solve=solve).value, flow(turned.contiguous(), solve=solve).value)


# Points without density


def test_sampling_never_asks_for_the_divergence():
    flow = Flow(Normal(2), CNF(Counted(field_of())))
    counted = flow.bijection.field
    for draw in (flow.sample, flow.rsample):
        draw(5, solve=Solve(trace="hutchinson", energies=BOTH, tolerance=1e-4))
    assert counted.with_rows == 0 and counted.plain > 10
    flow.sample_and_log_prob(5, solve=Solve(tolerance=1e-4))
    assert counted.with_rows > 10


def test_samples_are_those_of_the_pass_with_density():
    flow = Flow(Normal(2), CNF(field_of())).double()
    for solve in (Solve(tolerance=1e-9), GRID):
        alone = flow.sample(20, solve=solve, generator=seeded())
        points, log_prob = flow.sample_and_log_prob(20, solve=solve, generator=seeded())
        torch.testing.assert_close(alone, points, rtol=0, atol=1e-7)
    torch.testing.assert_close(log_prob, flow.log_prob(points, solve=TIGHT).detach(), rtol=0, atol=1e-5)


def test_without_a_trace_there_is_no_log_determinant():
    """NaN, so that nobody trains on it by mistake."""
    result = CNF(field_of())(normal(3, 2, dtype=torch.float32), solve=Solve(trace="none"))
    assert result.logdet.isnan().all() and result.value.isfinite().all()
    flow = Flow(Normal(2), CNF(field_of()))
    with pytest.raises(ValueError, match="trace='none', which gives points but no density"):
        flow.log_prob(torch.zeros(3, 2), solve=Solve(trace="none"))


# When it goes wrong


class Breaking(MLPField):
    """A field that is NaN when it is told to be."""

    broken = False

    def with_products(self, t, z, probes=None):
        v, rows = super().with_products(t, z, probes)
        return (v * math.nan if self.broken else v), rows


def test_a_density_that_cannot_be_solved_for_says_so():
    flow = Flow(Normal(2), CNF(Breaking(2, (4,))))
    x = torch.tensor([[1.0, -3.0]])
    flow.bijection.field.broken = True
    for solve in (Solve(), GRID):
        with pytest.raises(SolveError, match=r"stopped being finite at t = 0, after 0 steps, where max\|z\| = 3;"):
            flow.log_prob(x, solve=solve)


@pytest.mark.parametrize("solve", [GRID, Solve(tolerance=1e-3)], ids=["grid", "chosen"])
def test_training_keeps_the_best_weights_when_a_field_turns_nan(solve):
    """A SolveError is a FloatingPointError, which fit() knows what to do with."""
    field, states = Breaking(2, (4,)), {}

    class Watched(NegativeLogLikelihood):
        calls = 0

        def forward(self, batch, generator=None):
            if self.training:
                states[self.calls] = [parameter.detach().clone() for parameter in self.parameters()]
                field.broken = self.calls == 10
                self.calls += 1
            return super().forward(batch, generator)

    loss = Watched(Flow(Normal(2), CNF(field)), solve=solve, evaluation=GRID)
    data = toy_density("two_moons").sample(100, seeded())
    with pytest.raises(FloatingPointError, match=r"step 10 of 20 .* at t = 0, after 0 steps") as failed:
        fit(loss, data, steps=20, batch=16, lr=1e-2, records=5, recoveries=0, progress=False)
    assert isinstance(failed.value.__cause__, SolveError)
    kept = list(loss.parameters())
    assert loss.calls == 11 and all(a.equal(b) for a, b in zip(kept, states[8], strict=True))
    assert not all(a.equal(b) for a, b in zip(kept, states[10], strict=True))


@pytest.mark.parametrize("d", [1, 3])
def test_a_field_may_return_no_other_shape(d):
    """Here one that would broadcast, and train in silence."""
    flow = CNF(Field(lambda t, z: z[:, :1].expand(-1, d + 1), d))
    for trace in ("none", "exact"):
        with pytest.raises(ValueError, match=rf"Field returned shape \(4, {d + 1}\) for points of shape \(4, {d}\)"):
            flow(torch.zeros(4, d), solve=Solve(trace=trace, times=(0, 1)))


def test_a_field_that_changes_both_of_its_answers_is_taken():
    """And one that changes the products alone, or has none."""
    flow, x = CNF(field_of()), normal(4, 2, dtype=torch.float32)
    assert not flow(x).value.equal(CNF(Crowd(torch.eye(2)))(x).value)
    for kind in (Forgetful, Bare, Listener):
        assert CNF(kind(torch.eye(2)) if kind is Forgetful else kind(flow.field))(x).logdet.isfinite().all()


# Files


@pytest.mark.parametrize("time", TIMES)
def test_saved_and_loaded_gives_the_same_numbers(tmp_path, time):
    flow = Flow(Normal(2), Chain(Standardize(torch.ones(2), torch.ones(2)), CNF(field_of(2, time), interval=(0, 2))))
    save(tmp_path / "flow.safetensors", flow)
    other = copy.deepcopy(flow)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    load(tmp_path / "flow.safetensors", other)
    x = normal(5, 2, dtype=torch.float32)
    assert other.log_prob(x).equal(flow.log_prob(x))
    assert other.sample(5, generator=seeded()).equal(flow.sample(5, generator=seeded()))


@pytest.mark.parametrize(
    "other",
    [
        lambda: CNF(MLPField(2, (8, 8), "concat")),
        lambda: CNF(MLPField(2, (8, 8), "hyper")),
        lambda: CNF(MLPField(2, (8, 8), activation="softplus")),
        lambda: CNF(MLPField(2, (8, 8)), interval=(0, 2)),
        lambda: CNF(MLPField(2, (8, 9))),
        lambda: CNF(Bare(MLPField(2, (8, 8)))),
    ],
    ids=["concat", "hyper", "softplus", "interval", "width", "wrapped"],
)
def test_a_file_of_another_flow_is_refused(tmp_path, other):
    path, flow = tmp_path / "flow.safetensors", CNF(MLPField(2, (8, 8)))
    save(path, flow)
    load(path, CNF(MLPField(2, (8, 8))))
    with pytest.raises(CheckpointError, match="was made by another model"):
        load(path, other())


def test_repr_shows_what_a_file_is_compared_by():
    flow = CNF(MLPField(2, (8,), "hyper", "softplus"), interval=(0, 2))
    assert "CNF(\n  (2,), interval=(0.0, 2.0)" in repr(flow)
    assert "2, hidden=(8,), time='hyper', activation='softplus'" in repr(flow)
    assert "interval" not in repr(CNF(MLPField(2)))
