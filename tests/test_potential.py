"""The potential field: its closed forms against autograd, and optimal transports, whose potentials are known."""

import copy
import math

import pytest
import torch
from builders import redrawn, seeded
from torch import nn

from cnfkit import (
    CNF,
    CheckpointError,
    Flow,
    MLPField,
    NegativeLogLikelihood,
    Normal,
    Solve,
    bijection_contract,
    fit,
    load,
    save,
    toy_density,
    uniform_grid,
)
from cnfkit.ode.moments import Moment, moments
from cnfkit.ode.potential import PotentialField

D = torch.float64
GRID = Solve(method="rk4", times=uniform_grid(4))
ENERGY = "hamilton_jacobi"
SIZES = [(1, 1, 1), (1, 5, 10), (2, 8, 2), (3, 4, 10), (5, 16, 3)]  # dimension, hidden, rank


def field_of(d: int = 2, hidden: int = 8, rank: int = 10, scale: float = 0.4) -> PotentialField:
    """A field whose terms are all there, in float64."""
    return redrawn(PotentialField(d, hidden, rank), scale=scale).double()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def moment(field, t: float):
    """What a solver asks, at one time."""
    (found,) = moments(field, torch.tensor([t], dtype=D))
    return found


def differentiated(field, t: float, z):
    """The gradient of the potential in the points, its derivative in the time, and the Hessian, by autograd alone."""
    z, times = z.clone().requires_grad_(), torch.full((len(z),), t, dtype=D, requires_grad=True)
    along, rate = torch.autograd.grad(field.potential(times, z).sum(), (z, times), create_graph=True)
    rows = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0] for column in along.T]
    return along.detach(), rate.detach(), torch.stack(rows, 1)


# Closed forms


def written_out(field, t, z):
    """The potential, term by term, as the formula stands."""
    s = torch.cat([z, t.expand(len(z), 1)], 1)
    u = torch.log(torch.exp(field.first(s)) + torch.exp(-field.first(s)))
    after = field.second(u)
    u = u + torch.log(torch.exp(after) + torch.exp(-after))
    form = torch.einsum("ni,ki,kj,nj->n", s, field.A, field.A, s)
    return (field.w * u).sum(1) + form / 2 + (field.b * s).sum(1)


def test_the_potential_is_the_formula():
    field, t, z = field_of(3), torch.tensor(0.7, dtype=D), normal(6, 3)
    assert all(parameter.abs().max() > 0.1 for parameter in field.parameters())
    torch.testing.assert_close(field.potential(t, z), written_out(field, t, z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t", [-0.5, 0.8])
def test_derivatives_are_autograd_s(size, t):
    field, z = field_of(*size), normal(7, size[0])
    along, rate, hessian = differentiated(field, t, z)
    at = moment(field, t)
    assert min(part.abs().max() for part in (along, rate, hessian)) > 0.05
    close = dict(rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(field(torch.tensor(t, dtype=D), z), -along, **close)
    torch.testing.assert_close(at.value(z), -along, **close)
    torch.testing.assert_close(field.gradient(at.t, z), torch.cat([along, rate[:, None]], 1), **close)
    torch.testing.assert_close(at.time_derivative_of_potential(z), rate, **close)
    v, trace = at.with_trace(z)
    torch.testing.assert_close((v, trace), (-along, -hessian.diagonal(0, 1, 2).sum(-1)), **close)
    v, rows = at.with_products(z, None)
    torch.testing.assert_close((v, rows.transpose(0, 1)), (-along, -hessian), **close)
    torch.testing.assert_close(rows, rows.transpose(0, 2), **close)  # the Jacobian is symmetric
    probes = normal(3, *z.shape, seed=1)
    torch.testing.assert_close(at.with_products(z, probes)[1], -torch.einsum("nij,knj->kni", hessian, probes), **close)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # PyTorch's own, at its first jvp
def test_the_acceleration_is_a_difference_along_the_path():
    field, z, h = field_of(3), normal(6, 3), 1e-5
    at = moment(field, 0.4)
    v = at.value(z).detach()
    difference = (moment(field, 0.4 + h).value(z + h * v) - moment(field, 0.4 - h).value(z - h * v)) / (2 * h)
    torch.testing.assert_close(at.total_derivative(z, v), difference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_the_potential_is_smooth_and_finite_wherever_points_are(dtype):
    """The activation log(eᵃ + e⁻ᵃ) overflows as it stands, and has a kink at 0 when it is written with |a|."""
    field = PotentialField(1, 1, 1).to(dtype)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        field.first.weight[0, 0] = field.w[0] = 1.0
    z = torch.tensor([[0.0], [1e-3], [-0.5], [1.0], [-9.0], [11.0], [25.0], [-400.0], [1e4]], dtype=dtype)
    z, t = z.requires_grad_(), torch.zeros((), dtype=dtype)
    size = z[:, 0].abs().double()
    exact = (size + torch.log1p(torch.exp(-2 * size)) + math.log(2)).to(dtype)  # the second layer's is at 0
    eps = dict(rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(field.potential(t, z), exact, **eps)
    (slope,) = torch.autograd.grad(field.potential(t, z).sum(), z, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), z)
    torch.testing.assert_close((slope, bend), (z.tanh(), 1 - z.tanh().square()), **eps)
    torch.testing.assert_close(moments(field, t[None])[0].with_trace(z)[1], -bend[:, 0], **eps)


@pytest.mark.parametrize("d", [1, 3])
def test_a_time_for_each_point(d):
    field, times, z = field_of(d), normal(6), normal(6, d, seed=1)
    assert field(times, z).shape == (6, d) and field.potential(times, z).shape == (6,)
    for name in ("forward", "potential", "gradient"):
        each = torch.cat([getattr(field, name)(t, point[None]) for t, point in zip(times, z, strict=True)])
        torch.testing.assert_close(getattr(field, name)(times, z), each, rtol=1e-12, atol=1e-12)
    assert not field(times, z).allclose(field(times[0], z)), "the time matters"


# Gradients in the parameters


def of_trace(field, z):
    v, trace = moment(field, 0.3).with_trace(z)
    return (normal(len(z), seed=2) * trace).sum() + (normal(*v.shape, seed=3) * v).sum()


def of_products(field, z):
    v, rows = moment(field, 0.3).with_products(z, normal(2, *z.shape, seed=2))
    return rows.square().sum() + (normal(*v.shape, seed=3) * v).sum()


def of_rate(field, z):
    return (moment(field, 0.3).time_derivative_of_potential(z) * normal(len(z), seed=2)).sum()


def of_solve(field, z):
    flow = Flow(Normal(3).double(), CNF(field))
    solve = Solve(method="rk4", times=uniform_grid(2))
    return NegativeLogLikelihood(flow, solve=solve, penalties={"kinetic_energy": 0.3, ENERGY: 0.7})(z)[0]


@pytest.mark.parametrize("function", [of_trace, of_products, of_rate, of_solve])
def test_gradients_are_finite_differences(function):
    field, z, h = field_of(3, 6, 2), normal(5, 3).requires_grad_(), 1e-5
    leaves = {**dict(field.named_parameters()), "z": z}
    found = torch.autograd.grad(function(field, z), list(leaves.values()), materialize_grads=True)
    for seed, (name, leaf, gradient) in enumerate(zip(leaves, leaves.values(), found, strict=True)):
        along, values = normal(*leaf.shape, seed=seed), []
        for factor in (h, -2 * h, h):
            with torch.no_grad():
                leaf += factor * along
            values.append(function(field, z).item())
        difference = (values[0] - values[1]) / (2 * h)
        assert (gradient * along).sum().item() == pytest.approx(difference, rel=1e-6, abs=1e-8), name


def test_second_derivatives_go_through_the_closed_forms():
    field, z = field_of(2, 4), normal(3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: moment(field, 0.3).with_trace(z), (z,))


def test_the_rate_is_computed_beside_the_trace_in_training():
    """And used again for those points alone; without gradients nothing is kept."""
    field, z, other, passes = field_of(3), normal(5, 3), normal(5, 3, seed=1), []
    field.first.register_forward_hook(lambda *_: passes.append(1))
    for at in (moment(field, 0.3), moment(field, 0.3)):
        with torch.no_grad():
            at.with_trace(z)
        for points, cost in ((z, 1), (other, 1), (z, 0), (z.clone(), 1)):
            rate, before = field.gradient(at.t, points)[:, -1], len(passes)
            found = at.time_derivative_of_potential(points)
            assert found.requires_grad and len(passes) - before == cost
            torch.testing.assert_close(found, rate, rtol=1e-13, atol=1e-13)
            at.with_trace(z)


# As a flow

CONFIGURATIONS = {
    "d = 1": (1, Solve(tolerance=1e-8)),
    "d = 2": (2, Solve(tolerance=1e-8)),
    "d = 3": (3, Solve(times=uniform_grid(4))),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_contract(name):
    d, solve = CONFIGURATIONS[name]
    flow = CNF(redrawn(PotentialField(d, 6), scale=0.2))
    bijection_contract(flow, normal(2, d, dtype=torch.float32), solve=solve, tolerance=1e-5)


@pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
def test_gradients_that_keep_few_states(gradient):
    field, x, found = redrawn(PotentialField(3, 6), scale=0.2).double(), normal(5, 3), []
    with torch.no_grad():
        field.b[-1] = 9.0  # so that the energy's sign stays: the adjoint's second solve sees no kink
    for way in ("backprop", gradient):
        solve = Solve(times=uniform_grid(10), gradient=way)
        loss = NegativeLogLikelihood(Flow(Normal(3).double(), CNF(field)), "nats", solve, {ENERGY: 0.5})
        found.append(torch.autograd.grad(loss(x)[0], list(field.parameters())))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)


def test_the_solver_takes_the_closed_forms():
    """And for a field that overtakes them, what it says."""

    class Doubled(PotentialField):
        def forward(self, t, z):
            return 2 * super().forward(t, z)

    field, z = field_of(2), normal(4, 2)
    assert type(moment(field, 0.3)).with_trace is not Moment.with_trace
    doubled = Doubled(2, 8).double()
    doubled.load_state_dict(field.state_dict())
    for twice, once in zip(moment(doubled, 0.3).with_trace(z), moment(field, 0.3).with_trace(z), strict=True):
        torch.testing.assert_close(twice, 2 * once)


@pytest.mark.parametrize("probes", [1, 4])
def test_hutchinson_s_estimate_uses_the_products(probes):
    """The same numbers as from autograd of the velocity, as the Jacobian is symmetric."""

    class Bare(nn.Module):
        def __init__(self, field):
            super().__init__()
            self.field, self.event_shape = field, field.event_shape

        def forward(self, t, z):
            return self.field(t, z)

    field, x, names = field_of(3), normal(4, 3), ("jacobian_energy",)

    def estimated(kind):
        return CNF(kind)(x, solve=Solve("hutchinson", probes, generator=seeded(), times=(0, 1), energies=names))

    ours, autograd = estimated(field), estimated(Bare(field))
    torch.testing.assert_close(ours.logdet, autograd.logdet, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.penalties, autograd.penalties, rtol=1e-11, atol=1e-11)


# The Hamilton–Jacobi equation


class Quadratic(nn.Module):
    r"""Φ = −½ zᵀ P z − qᵀ z + r, with coefficients of the time; its derivatives by autograd.

    A straight line z = x + t (C x + c) for each x, as an optimal map of Gaussians has them with C symmetric and
    I + C positive, is at t where x = (I + tC)⁻¹ (z − tc). Its velocity C x + c is P z + q with P = C (I + tC)⁻¹ and
    q = (I + tC)⁻¹ c. As P′ = −P² and q′ = −P q, ∂Φ/∂t = ½ |P z + q|² if r′ = ½ |q|², which is so for r = ½ t cᵀ q.
    """

    def __init__(self, matrix, shift, pace=lambda t: t, level: float = 1.0) -> None:
        super().__init__()
        self.matrix, self.shift, self.pace, self.level = matrix, shift, pace, level
        self.event_shape = shift.shape

    def potential(self, t, z):
        with torch.enable_grad():
            s = self.pace(t)
            (speed,) = (1.0,) if s is t else torch.autograd.grad(s, t, create_graph=True)
            inverse = torch.linalg.inv(torch.eye(len(self.shift), dtype=z.dtype) + s * self.matrix)
            q = inverse @ self.shift
            form = torch.einsum("ni,ij,nj->n", z, self.matrix @ inverse, z)
            return speed * (self.level * s * (self.shift @ q) / 2 - form / 2 - z @ q)

    def forward(self, t, z):
        return self._differentiated(t, z)[0]

    def _differentiated(self, t, z):
        with torch.enable_grad():
            t, z = t.clone().requires_grad_(), z.detach().requires_grad_()
            values = self.potential(t, z)
            (along,) = torch.autograd.grad(values.sum(), z, create_graph=True)
            rates = torch.stack([torch.autograd.grad(value, t, retain_graph=True)[0] for value in values])
        return -along.detach(), rates

    def moments(self, times, context=None):
        return [self.At(self, t) for t in times.unbind()]

    class At(Moment):
        def time_derivative_of_potential(self, z):
            return self.field._differentiated(self.t, z)[1]


C = torch.tensor([[0.8, -0.3, 0.1], [-0.3, -0.4, 0.2], [0.1, 0.2, 1.5]], dtype=D)
SHIFT = torch.tensor([1.0, -2.0, 0.5], dtype=D)


def energies(field, x, *names: str) -> tuple[torch.Tensor, ...]:
    result = CNF(field)(x, solve=Solve("none", tolerance=1e-9, energies=names))
    return result.value, *(result.penalties[name] for name in names)


def test_the_equation_holds_for_an_optimal_transport():
    """Of Gaussians: the path is straight and uniform, and the kinetic energy half the squared length of the map."""
    assert torch.linalg.eigvalsh(torch.eye(3, dtype=D) + C).min() > 0.4
    x = normal(5, 3)
    end, energy, kinetic = energies(Quadratic(C, SHIFT), x, ENERGY, "kinetic_energy")
    step = x @ C + SHIFT
    torch.testing.assert_close(end, x + step, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(kinetic, step.square().sum(-1) / 2, rtol=1e-7, atol=1e-7)
    assert energy.max() < 1e-8


@pytest.mark.parametrize("change", [dict(pace=lambda t: t**2), dict(level=0.0), dict(level=-1.0)])
def test_the_equation_does_not_hold_at_another_pace_or_level(change):
    """The same map along the same lines, and a potential that lacks its function of the time alone."""
    x = normal(5, 3)
    end, energy = energies(Quadratic(C, SHIFT, **change), x, ENERGY)
    torch.testing.assert_close(end, x + x @ C + SHIFT, rtol=1e-6, atol=1e-6)
    assert energy.min() > 0.1


def test_the_equation_of_a_potential_field_that_moves_all_points_alike():
    """Φ = bᵀz + βt holds it if β = ½ |b|², and with another β the energy is how far off it is."""
    field, x, b = PotentialField(2).double(), normal(5, 2), torch.tensor([1.5, -2.0], dtype=D)
    nn.init.zeros_(field.A)
    for beta, expected in ((3.125, 0.0), (-3.125, 6.25), (4.125, 1.0), (0.0, 3.125)):
        with torch.no_grad():
            field.b.copy_(torch.tensor([*b, beta]))
        end, energy = energies(field, x, ENERGY)
        torch.testing.assert_close(end, x - b)
        torch.testing.assert_close(energy, torch.full_like(energy, expected), rtol=1e-7, atol=1e-7)


def test_the_energy_is_the_integral_along_the_path():
    """By the midpoint rule, from the potential and autograd alone; and the same on the way back."""
    field, x, n = field_of(2, scale=0.6), normal(5, 2), 400
    end, energy = energies(field, x, ENERGY)
    z, total = x, torch.zeros(5, dtype=D)
    for k in range(n):
        middle = z - 0.5 / n * differentiated(field, k / n, z)[0]
        along, rate, _ = differentiated(field, (k + 0.5) / n, middle)
        z, total = z - along / n, total + (rate - along.square().sum(-1) / 2).abs() / n
    torch.testing.assert_close((z, total), (end.detach(), energy.detach()), rtol=1e-4, atol=1e-4)
    assert energy.min() > 0.1
    back = CNF(field).inverse(end, solve=Solve("none", tolerance=1e-9, energies=(ENERGY,)))
    torch.testing.assert_close(back.penalties[ENERGY], energy, rtol=1e-3, atol=1e-4)  # |…| has kinks


def test_other_fields_have_no_potential():
    with pytest.raises(
        ValueError, match=r"MLPField is not the gradient of a potential; wanted a cnfkit\.PotentialField"
    ):
        CNF(MLPField(2))(normal(3, 2, dtype=torch.float32), solve=Solve(energies=(ENERGY,)))


# Start and training


@pytest.mark.parametrize("d", [1, 2, 10, 43])
def test_the_flow_starts_near_the_identity_and_all_of_it_learns(d):
    flow, x = Flow(Normal(d), CNF(PotentialField(d))), 2 * normal(20, d, dtype=torch.float32)
    result = flow.bijection(x, solve=GRID)
    moved = (result.value - x).norm(dim=1) / x.norm(dim=1)
    assert 0 < moved.max() < 0.05 and result.logdet.abs().max() < 0.02 * d
    loss = NegativeLogLikelihood(flow, solve=GRID, penalties={ENERGY: 0.1})
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for step in range(2):
        optimiser.zero_grad()
        loss(x)[0].backward()
        still = {name for name, p in flow.bijection.field.named_parameters() if p.grad is None or not p.grad.any()}
        assert still == (set() if step else {"first.weight", "first.bias", "second.weight", "second.bias"})
        optimiser.step()


def test_training_lowers_the_loss_and_its_penalties_straighten_the_paths():
    data, found = toy_density("two_moons").sample(2000, seeded()), {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        flow = Flow(Normal(2), CNF(PotentialField(2, 16)))
        penalties = {"kinetic_energy": 0.05 * weight, ENERGY: weight}
        loss = NegativeLogLikelihood(flow, solve=GRID, penalties=penalties, evaluation=GRID)
        before = loss(data[:500])[1]
        fit(loss, data, steps=60, batch=128, lr=2e-2, progress=False)
        found[weight] = after = loss.eval()(data[:500])[1]
        assert after["nll"] < before["nll"] - 0.4
    assert found[1.0][ENERGY] < 0.5 * found[0.0][ENERGY]


# Errors and files


@pytest.mark.parametrize("name", ["dimension", "hidden", "rank"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", (2, 2), True, None])
def test_sizes_are_positive_whole_numbers(name, value):
    with pytest.raises(ValueError) as caught:
        PotentialField(**{"dimension": 2, name: value})
    assert str(caught.value) == f"{name} is {value!r}; wanted a whole number of at least 1"


def test_no_more_rank_than_is_of_use():
    assert [PotentialField(3, 8, rank).A.shape for rank in (2, 4, 10)] == [(2, 4), (4, 4), (4, 4)]


def test_saved_and_loaded_gives_the_same_numbers(tmp_path):
    flow = Flow(Normal(2), CNF(redrawn(PotentialField(2, 8))))
    save(tmp_path / "flow.safetensors", flow)
    other = redrawn(copy.deepcopy(flow), seed=1)
    x = normal(5, 2, dtype=torch.float32)
    assert not other.log_prob(x).allclose(flow.log_prob(x))
    load(tmp_path / "flow.safetensors", other)
    assert other.log_prob(x).equal(flow.log_prob(x))
    for another in (PotentialField(2, 9), PotentialField(2, 8, rank=2), MLPField(2)):
        with pytest.raises(CheckpointError, match="was made by another model"):
            load(tmp_path / "flow.safetensors", Flow(Normal(2), CNF(another)))


def test_repr_shows_what_a_file_is_compared_by():
    assert repr(PotentialField(3, 8)).startswith("PotentialField(\n  3, hidden=8, rank=4\n")
