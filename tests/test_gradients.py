"""Three ways to differentiate a solve: through its steps, through steps that are taken again, and by the adjoint."""

import copy
import gc
import math
import pickle
from dataclasses import replace

import pytest
import torch
from builders import Bare, Field, NoFloat64, redrawn, seeded
from torch import nn

from cnfkit import CNF, Chain, Flow, Inverse, MLPField, NegativeLogLikelihood, Normal, Solve, SolveError, uniform_grid
from cnfkit.ode import tape
from cnfkit.ode.cnf import Dynamics
from cnfkit.ode.tape import Tape

D = torch.float64
ENERGIES = ("kinetic_energy", "jacobian_energy", "total_derivative")
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4, "rk4_38": 4, "rk6": 7, "dopri5": 6}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=D).to(dtype)


KINDS = {"products": lambda field: field, "autograd": Bare}


def flow_of(kind: str = "products", d: int = 2, hidden=(5, 4), interval=(0.0, 1.0), **options) -> CNF:
    torch.manual_seed(0)  # the same flow at every call of a test
    return CNF(KINDS[kind](redrawn(MLPField(d, hidden, **options))), interval=interval).double()


def loss_of(result, weight: float = 1.0) -> torch.Tensor:
    """Something of everything that a solve gives."""
    total = (result.value * normal(*result.value.shape, seed=7)).sum() + 0.5 * result.value.square().sum()
    if not result.logdet.isnan().any():
        total = total + (result.logdet * normal(*result.logdet.shape, seed=8)).sum()
    for k, energy in enumerate(result.penalties.values()):
        total = total + (k + 1) / 10 * energy.sum()
    return weight * total


def gradients(flow: CNF, solve: Solve, x: torch.Tensor, back: bool = False, loss=loss_of):
    """Of a loss, in the points and all parameters, and the account of the solve."""
    x = x.clone().requires_grad_()
    result = (flow.inverse if back else flow)(x, solve=solve)
    found = torch.autograd.grad(loss(result), [x, *flow.parameters()], materialize_grads=True)
    return torch.cat([part.flatten() for part in found]), result.stats[0]


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).abs().max() / truth.abs().max()).item()


BOTH_WAYS = pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
EACH = pytest.mark.parametrize(
    ("kind", "back"),
    [("products", False), ("products", True), ("autograd", False)],
    ids=["products, there", "products, back", "autograd, there"],
)
OTHERS = pytest.mark.parametrize("gradient", ["checkpoint", "adjoint"])
TRACES = {"exact": {}, "hutchinson": dict(trace="hutchinson", probes=2), "none": dict(trace="none")}


def energies_for(trace: str) -> tuple[str, ...]:
    return ENERGIES[::2] if trace == "none" else ENERGIES


# Checkpointing


@EACH
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize(
    "steps",
    [dict(tolerance=1e-3), dict(times=(0, 1)), dict(method="midpoint", times=(0, 0.2, 0.7, 1))],
    ids=["chosen", "dopri5", "midpoint"],
)
def test_checkpointing_changes_no_digit_but_the_last(steps, trace, kind, back):
    flow, x = flow_of(kind, interval=(-0.5, 1.0)), normal(4, 2)

    def go(gradient):
        options = TRACES[trace] | {"energies": energies_for(trace), "generator": seeded()}
        return gradients(flow, Solve(**steps, **options, gradient=gradient), x, back)

    (plain, account), (again, twice) = go("backprop"), go("checkpoint")
    torch.testing.assert_close(again, plain, rtol=1e-11, atol=1e-11)
    assert plain.abs().min() > 0 or trace == "none"
    stages = STAGES[steps.get("method", "dopri5")]
    assert twice.times == account.times and twice.evaluations == account.evaluations
    assert (account.backward_evaluations, twice.backward_evaluations) == (0, stages * twice.accepted)


# The adjoint


MATRIX = torch.tensor([[0.3, -1.2, 0.4], [0.8, -0.5, 0.1], [0.0, 0.6, 0.9]], dtype=D)
SHIFT = torch.tensor([0.5, -0.2, 1.0], dtype=D)


class Paced(nn.Module):
    """v = a(t) (A z + b) with a = 1 + cos 3t."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(MATRIX.clone()), nn.Parameter(SHIFT.clone())
        self.event_shape = torch.Size([3])

    def forward(self, t, z):
        return (1 + (3 * t).cos()) * (z @ self.matrix.T + self.shift)


def paced_gradients(x: torch.Tensor, back: bool) -> torch.Tensor:
    """Of value and log-determinant, from the closed form: one matrix exponential of A and b for the time ∫ a."""
    field, x = Paced(), x.clone().requires_grad_()
    length = (2.0 + math.sin(6) / 3 - 0.5 - math.sin(1.5) / 3) * (-1 if back else 1)
    both = torch.cat([torch.cat([field.matrix, field.shift[:, None]], 1), torch.zeros(1, 4, dtype=D)])
    y = torch.cat([x, torch.ones(len(x), 1, dtype=D)], 1) @ torch.matrix_exp(length * both).T
    value, logdet = y[:, :-1], (length * field.matrix.trace()).expand(len(x))
    total = (value * normal(*value.shape, seed=7)).sum() + 0.5 * value.square().sum()
    total = total + (logdet * normal(len(x), seed=8)).sum()
    found = torch.autograd.grad(total, [x, field.matrix, field.shift])
    return torch.cat([part.flatten() for part in found])


@BOTH_WAYS
def test_the_adjoint_converges_to_the_gradient_of_the_exact_flow(back):
    """As the tolerance falls, and as the steps of a grid do; our own, and torchdiffeq's."""
    flow, x = CNF(Paced(), interval=(0.5, 2.0)), normal(4, 3)
    truth = paced_gradients(x, back)
    for method, tolerance in (("dopri5", 1e-4), ("dopri5", 1e-6), ("dopri5", 1e-9), ("torchdiffeq:dopri5", 1e-6)):
        found, _ = gradients(flow, Solve(method=method, tolerance=tolerance, gradient="adjoint"), x, back)
        assert error(found, truth) < 10 * tolerance, (method, tolerance)
    for method, order in (("rk4", 4), ("dopri5", 5), ("midpoint", 2)):
        errors = [
            error(gradients(flow, Solve(method=method, times=uniform_grid(n), gradient="adjoint"), x, back)[0], truth)
            for n in (8, 16)
        ]
        assert errors[0] / errors[1] > 0.7 * 2**order, (method, errors)


@EACH
@pytest.mark.parametrize("trace", TRACES)
def test_the_adjoint_of_estimates_and_energies(trace, kind, back):
    """The same probes go back that went there."""
    flow, x = flow_of(kind, interval=(-0.5, 1.0)), normal(4, 2)

    def go(**steps):
        return gradients(
            flow, Solve(**steps, **TRACES[trace], energies=energies_for(trace), generator=seeded()), x, back
        )

    truth, _ = go(method="rk6", times=uniform_grid(4))
    found, account = go(tolerance=1e-5, gradient="adjoint", control_logdet=True)
    assert error(found, truth) < 1e-3 and account.backward_evaluations > 10
    found, _ = go(method="rk6", times=uniform_grid(4), gradient="adjoint")
    assert error(found, truth) < 1e-5


@BOTH_WAYS
@OTHERS
@pytest.mark.parametrize("trace", TRACES)
def test_gradients_are_those_of_central_differences(trace, gradient, back):
    """Along one direction through the points and all parameters: nothing of the library differentiates here."""
    flow, x = flow_of(), normal(3, 2)

    def go(flow, x):
        options = TRACES[trace] | {"energies": energies_for(trace), "generator": seeded()}
        solve = Solve(method="rk6", times=uniform_grid(4), **options, gradient=gradient)
        return (flow.inverse if back else flow)(x, solve=solve)

    leaves = [x.requires_grad_(), *flow.parameters()]
    found = torch.autograd.grad(loss_of(go(flow, x)), leaves)
    along = [normal(*leaf.shape, seed=20 + k) for k, leaf in enumerate(leaves)]
    predicted = sum((a * b).sum() for a, b in zip(found, along, strict=True)).item()
    values = []
    with torch.no_grad():
        for h in (1e-4, -1e-4):
            moved = copy.deepcopy(flow)
            for parameter, direction in zip(moved.parameters(), along[1:], strict=True):
                parameter += h * direction
            values.append(loss_of(go(moved, x + h * along[0])).item())
    assert predicted == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6)


def value_alone(result, weight):
    return weight * (result.value * normal(*result.value.shape, seed=7)).sum()


def logdet_alone(result, weight):
    return weight * (result.logdet * normal(*result.logdet.shape, seed=7)).sum()


def energy_alone(result, weight):
    return weight * result.penalties["jacobian_energy"].sum()


SPIN = torch.tensor([[0.3, -4.0], [4.0, -0.5]], dtype=D)


@pytest.mark.parametrize("loss", [value_alone, logdet_alone, energy_alone], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("weight", [1.0, 1e-4, 1e-8])
def test_a_small_loss_is_differentiated_as_well_as_a_large_one(weight, loss):
    """The mean over ten thousand points, say: a gradient of 1e-4 within an absolute tolerance would be none.

    The points rest, and say nothing about the steps that their gradients need, which turn fast.
    """
    matrix, tolerance = nn.Parameter(SPIN.clone()), 1e-6
    flow = CNF(Field(lambda t, z: z @ matrix.T + z.square(), 2, [matrix]))

    def go(**options):
        solve = Solve(**options, energies=("jacobian_energy",))
        return gradients(flow, solve, torch.zeros(3, 2, dtype=D), loss=lambda result: loss(result, weight))[0]

    truth = go(method="rk6", times=uniform_grid(25))
    assert error(go(tolerance=tolerance, gradient="adjoint"), truth) < 10 * tolerance


def test_the_mean_over_many_points_is_differentiated_as_well_as_their_sum():
    """A training loss, in the precision of training."""
    flow = Flow(Normal(2), CNF(redrawn(MLPField(2, (5, 4)))))
    x = normal(10_000, 2, dtype=torch.float32)
    found = []
    for gradient, tolerance in (("backprop", 1e-6), ("adjoint", 1e-4)):
        loss = NegativeLogLikelihood(flow, solve=Solve(tolerance=tolerance, gradient=gradient))
        parts = torch.autograd.grad(loss(x)[0], list(flow.parameters()))
        found.append(torch.cat([part.flatten() for part in parts]))
    assert error(found[1], found[0]) < 1e-3


def test_a_gradient_of_zero_is_zero():
    flow, x = flow_of(), normal(3, 2)
    for gradient in ("checkpoint", "adjoint"):
        solve = Solve(tolerance=1e-4, gradient=gradient)
        found, _ = gradients(flow, solve, x, loss=lambda result: 0 * (result.value.sum() + result.logdet.sum()))
        assert not found.any()


# What both promise


PARTS = {
    "value": lambda result: result.value.square().sum(),
    "log-determinant": lambda result: result.logdet.square().sum(),
    "energy": lambda result: result.penalties["kinetic_energy"].square().sum(),
    "one point": lambda result: result.value[1].square().sum() + result.logdet[1],
}


@OTHERS
@pytest.mark.parametrize("part", PARTS)
def test_a_loss_of_some_of_the_results(gradient, part):
    flow, x = flow_of(), normal(3, 2)
    plain, other = (
        gradients(flow, Solve(tolerance=1e-8, energies=ENERGIES[:1], gradient=g), x, loss=PARTS[part])[0]
        for g in ("backprop", gradient)
    )
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)


@OTHERS
@pytest.mark.parametrize("solve", [Solve(tolerance=1e-6), Solve(method="rk4", times=uniform_grid(5))])
def test_evaluations_are_counted_there_and_back(gradient, solve):
    """Every call of the field is one evaluation; those of a second backward pass come on top."""
    matrix = nn.Parameter(SPIN.clone())
    field = Field(lambda t, z: z @ matrix.T, 2, [matrix])
    result = CNF(field)(normal(3, 2), solve=Solve(**vars(solve) | dict(gradient=gradient, trace="none")))
    stats = result.stats[0]
    assert (field.calls, stats.backward_evaluations) == (stats.evaluations, 0)
    loss = result.value.square().sum()
    (first,) = torch.autograd.grad(loss, matrix, retain_graph=True)
    once = stats.backward_evaluations
    assert field.calls == stats.evaluations + once
    if solve.tolerance is None:
        assert stats.evaluations == once == 20
    elif gradient == "checkpoint":
        assert once == 6 * stats.accepted
    else:
        assert once > 12 and (once - 2) % 6 == 0
    (second,) = torch.autograd.grad(loss, matrix)
    assert (
        first.equal(second) and stats.backward_evaluations == 2 * once and field.calls == stats.evaluations + 2 * once
    )


def test_each_solve_has_its_own_account():
    first, second = flow_of(), flow_of(hidden=(3,))
    flow = Chain(first, Inverse(second))
    for gradient, backward in (("backprop", (0, 0)), ("checkpoint", (12, 12)), ("adjoint", (12, 12))):
        result = flow(normal(3, 2), solve=Solve(method="rk4", times=uniform_grid(3), gradient=gradient))
        result.logdet.sum().backward()
        assert tuple(stats.backward_evaluations for stats in result.stats) == backward


def held(**options) -> int:
    """What autograd holds on to between forward and backward, in numbers; no node lays anything aside."""
    sizes, flow, x = {}, redrawn(CNF(MLPField(2, (32, 32)))), normal(64, 2, dtype=torch.float32)

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = flow(x, solve=Solve(**options))
    waiting, seen = [result.value.grad_fn, result.logdet.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            aside, _ = torch.utils._pytree.tree_flatten(getattr(node, "__dict__", {}))
            assert not any(isinstance(part, torch.Tensor) for part in aside)
    (result.value.sum() + result.logdet.sum()).backward()
    return sum(sizes.values())


def test_the_adjoint_holds_as_much_for_many_steps_as_for_one():
    """The last state and the parameters; checkpointing a state a step; backpropagation all there is."""
    parameters, state = sum(p.numel() for p in MLPField(2, (32, 32)).parameters()), 2 * 64
    grids = [dict(method="rk4", times=uniform_grid(n)) for n in (1, 31)]
    few, many = (held(gradient="adjoint", **grid) for grid in grids)
    assert few == many <= parameters + 2 * state
    few, many = (held(gradient="checkpoint", **grid) for grid in grids)
    assert many - few == 30 * state and few <= parameters + 2 * state
    assert held(tolerance=1e-2) > 10 * few
    coarse, fine = (held(gradient="adjoint", tolerance=tolerance) for tolerance in (1e-2, 1e-5))
    assert coarse == fine == held(gradient="adjoint", **grids[0])


@OTHERS
def test_no_tensor_outlives_the_results(gradient):
    """No cycle keeps a graph, a state or a moment of the field alive."""
    flow, x = flow_of("autograd"), normal(3, 2)

    def count() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    def go():
        result = flow(x, solve=Solve(times=uniform_grid(3), gradient=gradient))
        torch.autograd.grad(result.logdet.sum(), list(flow.parameters()), materialize_grads=True)

    go()
    before = count()
    go()
    assert count() == before
    # nor does anything wait for the collector: memory is given back at once
    gc.disable()
    try:
        go()
        alive = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    finally:
        gc.enable()
    assert alive <= before


@OTHERS
def test_a_second_derivative_is_refused_with_what_to_do(gradient):
    """Through either of them it would be wrong, or a constant."""
    flow, x = flow_of(), normal(3, 2).requires_grad_()
    for steps in (dict(tolerance=1e-6), dict(times=(0, 1))):
        result = flow(x, solve=Solve(gradient=gradient, **steps))
        with pytest.raises(RuntimeError, match=f"gradient is '{gradient}', which differentiates once.*'backprop'"):
            torch.autograd.grad(result.value.sum(), x, create_graph=True)
    result = flow(x, solve=Solve(times=(0, 1)))
    (once,) = torch.autograd.grad(result.logdet.sum(), x, create_graph=True)
    assert torch.autograd.grad(once.square().sum(), x)[0].any()


class Breaking(MLPField):
    """A field that is NaN when it is told to be."""

    broken = False

    def with_products(self, t, z, probes=None, context=None):
        v, rows = super().with_products(t, z, probes, context)
        return (v * math.nan if self.broken else v), rows


@pytest.mark.parametrize("solve", [Solve(tolerance=1e-5), Solve(times=uniform_grid(3))], ids=["chosen", "grid"])
@BOTH_WAYS
def test_a_field_that_breaks_on_the_way_back_says_where(solve, back):
    """It starts where the solve ended."""
    flow = CNF(redrawn(Breaking(2, (4,))), interval=(0, 2))
    result = (flow.inverse if back else flow)(torch.ones(3, 2), solve=Solve(**vars(solve) | {"gradient": "adjoint"}))
    flow.field.broken = True
    with pytest.raises(SolveError, match="stopped being finite") as failed:
        result.logdet.sum().backward()
    assert (failed.value.t, failed.value.step) == (0.0 if back else 2.0, 0)


def test_a_state_that_cannot_be_gone_back_to_says_so():
    """ż = −60 z forgets where it came from: on the way back it is e⁶⁰ times as large, and steps run out."""
    flow = CNF(Field(lambda t, z: -60 * z + (20 * t).cos(), 1))
    x = torch.ones(2, 1, dtype=D, requires_grad=True)
    result = flow(x, solve=Solve(tolerance=1e-6, max_steps=100, gradient="adjoint"))
    assert result.value.isfinite().all()
    with pytest.raises(SolveError, match="max_steps = 100 were not enough"):
        result.value.sum().backward()


@OTHERS
def test_frozen_parameters_get_no_gradient_and_change_no_other(gradient):
    x, solve = normal(3, 2), Solve(tolerance=1e-9, gradient=gradient)

    def learnt(frozen: str | None, solve: Solve) -> dict:
        flow = flow_of()
        for name, parameter in flow.named_parameters():
            parameter.requires_grad_(frozen is None or frozen not in name)
        loss_of(flow(x, solve=solve)).backward()
        return {name: parameter.grad for name, parameter in flow.named_parameters()}

    whole = learnt(None, Solve(tolerance=1e-9))
    for frozen in ("layers.0", "weight", "gate"):
        found = learnt(frozen, solve)
        for name, gradient_of_it in found.items():
            assert (gradient_of_it is None) == (frozen in name)
            if gradient_of_it is not None:
                torch.testing.assert_close(gradient_of_it, whole[name], rtol=1e-6, atol=1e-7)


def gradient_in_points(flow, solve, x):
    x = x.clone().requires_grad_()
    result = flow(x, solve=solve)
    return torch.autograd.grad(result.value.square().sum() + result.logdet.sum(), x)[0]


@OTHERS
def test_where_all_is_frozen_the_points_have_their_gradient_still(gradient):
    flow, x = flow_of().requires_grad_(False), normal(3, 2)
    for steps in (dict(tolerance=1e-9), dict(method="rk4", times=uniform_grid(20))):
        solve = Solve(**steps, gradient=gradient)
        result = flow(x, solve=solve)
        assert not result.value.requires_grad and not result.logdet.requires_grad
        found, plain = (gradient_in_points(flow, each, x) for each in (solve, Solve(**steps)))
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert not flow(x.requires_grad_(), solve=solve).value.requires_grad


@OTHERS
@pytest.mark.parametrize(
    "function",
    [lambda t, z: (2 * z).sin() * (1 + t), lambda t, z: t * torch.ones_like(z), lambda t, z: 0 * z],
    ids=["a function", "a wind", "nothing"],
)
def test_a_field_without_parameters(gradient, function):
    """The points alone have a gradient; where the field does not look at them, it is that of the loss."""
    flow, x = CNF(Field(function, 2)), normal(3, 2)
    for trace in TRACES:
        options = dict(tolerance=1e-8, generator=seeded(), **TRACES["exact" if trace == "none" else trace])
        plain = gradient_in_points(flow, Solve(**options), x)
        options["generator"].manual_seed(0)
        other = gradient_in_points(flow, Solve(**options, gradient=gradient), x)
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)
    assert not flow(x, solve=Solve(gradient=gradient)).value.requires_grad


@OTHERS
def test_a_parameter_that_the_field_does_not_use_has_no_gradient(gradient):
    used, unused = nn.Parameter(torch.ones(2, dtype=D)), nn.Parameter(torch.ones(3, dtype=D))
    flow = CNF(Field(lambda t, z: used * z, 2, [used, unused]))
    flow(normal(3, 2), solve=Solve(gradient=gradient)).value.sum().backward()
    assert used.grad.all() and (unused.grad is None or not unused.grad.any())


@OTHERS
def test_two_solves_by_one_field_before_one_backward(gradient):
    """There, and back from elsewhere, with other probes and another tolerance: each goes back its own way."""
    flow, x, y = flow_of(), normal(3, 2), normal(5, 2, seed=1)

    def total(gradient):
        options = dict(gradient=gradient, generator=seeded(), probes=2)
        first = flow(x, solve=Solve(tolerance=1e-9, **options))
        second = flow.inverse(y, solve=Solve(trace="hutchinson", tolerance=1e-8, **options))
        third = flow(second.value, solve=Solve(method="rk4", times=uniform_grid(20), gradient=gradient))
        both = loss_of(first) + loss_of(second) * third.logdet.square().sum()
        return torch.cat([part.flatten() for part in torch.autograd.grad(both, list(flow.parameters()))])

    torch.testing.assert_close(total(gradient), total("backprop"), rtol=1e-5, atol=1e-6)


@OTHERS
def test_nothing_is_left_in_the_modules(gradient):
    """A model can be copied, pickled and saved right after a solve, or between forward and backward."""
    flow, x = flow_of(), normal(3, 2)

    def everything():
        return {
            name: {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in flow.named_modules()
        }

    def tensors():
        return {name: tensor.clone() for name, tensor in flow.state_dict().items()}

    before, numbers, size = everything(), tensors(), len(pickle.dumps(flow))
    for steps in (dict(tolerance=1e-5), dict(times=(0, 1))):
        result = flow(x, solve=Solve(gradient=gradient, energies=ENERGIES, **steps))
        assert everything() == before and len(pickle.dumps(flow)) == size
        copied = copy.deepcopy(flow)
        loss_of(result).backward()
        flow.zero_grad()
        assert everything() == before and len(pickle.dumps(flow)) == size
        assert all(a.equal(b) for a, b in zip(tensors().values(), numbers.values(), strict=True))
        assert all(a.equal(b) for a, b in zip(copied.state_dict().values(), numbers.values(), strict=True))


@OTHERS
@pytest.mark.parametrize("solve", [Solve(tolerance=1e-5), Solve(times=uniform_grid(3))], ids=["chosen", "grid"])
def test_parameters_that_change_before_the_way_back_are_noticed(gradient, solve):
    """As in backpropagation: the gradient would be one of neither model."""
    flow = flow_of()
    result = flow(normal(3, 2), solve=Solve(**vars(solve) | {"gradient": gradient}))
    with torch.no_grad():
        flow.field.layers[0].weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.logdet.sum().backward()


@OTHERS
def test_what_is_kept_may_be_moved_elsewhere(gradient):
    """By hooks that give back copies: of parameters, of states, and of a context that was computed."""
    flow = CNF(redrawn(MLPField(2, (5,), context=2))).double()
    x, raw = normal(3, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    solve, leaves = Solve(times=uniform_grid(3), gradient=gradient), [x, raw, *flow.parameters()]
    plain = torch.autograd.grad(loss_of(flow(x, raw.tanh(), solve)), leaves)
    context = raw.tanh()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        result = flow(x, context, solve)
    moved = torch.autograd.grad(loss_of(result), leaves)
    torch.testing.assert_close(moved, plain, rtol=1e-12, atol=1e-12)


@OTHERS
def test_gradients_are_added_to_those_there_are(gradient):
    flow, x = flow_of(), normal(3, 2).requires_grad_()
    solve = Solve(times=uniform_grid(3), gradient=gradient)
    for _ in range(2):
        loss_of(flow(x, solve=solve)).backward()
    once = torch.autograd.grad(loss_of(flow(x, solve=solve)), [x, *flow.parameters()])
    for leaf, part in zip([x, *flow.parameters()], once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * part)


@OTHERS
@pytest.mark.parametrize("trace", TRACES)
def test_float32_goes_back_as_float32(trace, gradient):
    for steps in (dict(tolerance=1e-2), dict(method="rk4", times=(0, 1))):
        flow, x = redrawn(CNF(MLPField(2, (4,), "hyper"))), normal(3, 2, dtype=torch.float32).requires_grad_()
        energies = ENERGIES[2:] if trace == "none" else ENERGIES[:2]
        solve = Solve(gradient=gradient, energies=energies, **steps, **TRACES[trace])
        with NoFloat64():
            result = flow(x, solve=solve)
            total = result.value.square().sum() + sum(energy.sum() for energy in result.penalties.values())
            (total if trace == "none" else total + result.logdet.sum()).backward()
        assert x.grad.dtype == torch.float32 and x.grad.any()


@OTHERS
def test_training_with_either_learns_what_backpropagation_learns(gradient):
    """Ten steps on a grid, from the same start: where checkpointing ends, and nearly where the adjoint does."""
    x, ends = normal(50, 2) * torch.tensor([2.0, 0.5], dtype=D) + 1, []
    for way in ("backprop", gradient):
        flow = Flow(Normal(2).double(), flow_of(hidden=(5,)))
        loss = NegativeLogLikelihood(
            flow, solve=Solve(method="rk4", times=uniform_grid(8), gradient=way), penalties={"kinetic_energy": 0.1}
        )
        optimiser = torch.optim.SGD(flow.parameters(), lr=0.05)
        values = []
        for _ in range(10):
            optimiser.zero_grad()
            value, _ = loss(x)
            value.backward()
            optimiser.step()
            values.append(value.item())
        assert values[-1] < values[0] - 0.1
        ends.append(values)
    assert ends[1] == pytest.approx(ends[0], rel=1e-12 if gradient == "checkpoint" else 1e-5)


def test_no_gradient_is_the_business_of_a_solve_that_samples():
    """Without gradients all three are one."""
    field = flow_of().field
    results = [CNF(field)(normal(3, 2), solve=Solve(gradient=way)) for way in ("backprop", "checkpoint", "adjoint")]
    with torch.no_grad():
        others = [CNF(field)(normal(3, 2), solve=Solve(gradient=way)) for way in ("backprop", "checkpoint", "adjoint")]
    assert all(result.value.requires_grad for result in results)
    assert not any(result.value.requires_grad for result in others)
    for result in (*results, *others):
        torch.testing.assert_close(result.value, results[0].value, rtol=1e-12, atol=1e-12)
        assert result.evaluations == results[0].evaluations


TAPED = {
    "one hidden layer": dict(hidden=(5,)),
    "two, steady": dict(time="concat"),
    "two": dict(),
    "three": dict(hidden=(4, 5, 3)),
    "of one width": dict(hidden=(4, 4, 4, 4)),
    "three, steady": dict(hidden=(4, 5, 3), time="concat", activation="softplus"),
    "hyper": dict(time="hyper", activation="softplus"),
    "context": dict(hidden=(4, 5, 3), context=2),
    "context, form": dict(context=2, activation="softplus"),
}
WANTED = {
    "exact": Solve(energies=("kinetic_energy",), times=(0, 0.3, 1), method="rk6"),
    "exact, mean": Solve(energies=("jacobian_energy", "kinetic_energy"), times=(0, 0.3, 1), reduction="mean"),
    "one probe": Solve("hutchinson", times=(0, 0.3, 1), energies=("kinetic_energy", "jacobian_energy"), method="rk4"),
    "probes": Solve("hutchinson", probes=3, noise="gaussian", times=(0, 0.3, 1), energies=("jacobian_energy",)),
    "none": Solve("none", times=(0, 0.3, 1), energies=("kinetic_energy",), method="rk4_38"),
    "points alone": Solve("none", times=(0, 0.3, 1), method="euler"),
}


def taped_loss(flow: CNF, x, context, solve: Solve, back: bool):
    solve = replace(solve, generator=seeded(3))
    return loss_of((flow.inverse if back else flow)(x, context=context, solve=solve))


def taped_case(options: dict):
    flow = flow_of(d=3, **{"hidden": (5, 4), **options})
    x, context = normal(4, 3), normal(4, 2, seed=1) if "context" in options else None
    starts = [part.requires_grad_() for part in (x, context) if part is not None]
    return flow, x, context, [*starts, *flow.parameters()]


@pytest.mark.parametrize("solve", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("options", TAPED.values(), ids=TAPED)
@BOTH_WAYS
def test_backpropagation_by_hand_is_that_of_autograd(options, solve, back, monkeypatch):
    flow, x, context, starts = taped_case(options)
    passes, pull = [], Tape.pull
    monkeypatch.setattr(Tape, "pull", lambda self, *args: passes.append(1) or pull(self, *args))
    by_hand = taped_loss(flow, x, context, solve, back)
    found = torch.autograd.grad(by_hand, starts, materialize_grads=True)
    assert len(passes) == 2 * STAGES[solve.method]
    monkeypatch.setattr(Dynamics, "taped", lambda *_: None)
    plain = taped_loss(flow, x, context, solve, back)
    torch.testing.assert_close(by_hand, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain, starts, materialize_grads=True))
    assert len(passes) == 2 * STAGES[solve.method]


@pytest.mark.parametrize("solve", [WANTED["exact"], WANTED["exact, mean"], WANTED["probes"]])
def test_what_goes_back_by_hand_goes_back_twice_and_once_more(solve):
    flow, x, context, starts = taped_case(dict(hidden=(4, 3)))
    loss = taped_loss(flow, x, context, solve, False)
    first = torch.autograd.grad(loss, starts, retain_graph=True)
    again = torch.autograd.grad(loss, starts, retain_graph=True)
    torch.testing.assert_close(first, again)
    recorded = torch.autograd.grad(loss, starts, create_graph=True)
    torch.testing.assert_close(first, recorded)
    second = torch.autograd.grad(sum(part.square().sum() for part in recorded), starts)
    step, way = 1e-5, [normal(*part.shape, seed=5) for part in starts]

    def size(shift: float) -> torch.Tensor:
        with torch.no_grad():
            for part, w in zip(starts, way, strict=True):
                part += shift * w
        found = torch.autograd.grad(taped_loss(flow, x, context, solve, False), starts)
        with torch.no_grad():
            for part, w in zip(starts, way, strict=True):
                part -= shift * w
        return sum(part.square().sum() for part in found)

    slope = sum((a * b).sum() for a, b in zip(second, way, strict=True))
    torch.testing.assert_close(slope, (size(step) - size(-step)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_memory_of_a_solve_serves_the_next_of_the_same_field_and_goes_with_it(monkeypatch):
    solve, free = Solve(method="rk4", times=uniform_grid(2)), tape._FREE

    def blocks(flow: CNF) -> list[int]:
        return [block.whole.data_ptr() for rows in free[flow.field].blocks.values() for block in rows]

    gc.collect()
    others, flow = len(free), flow_of()
    gradients(flow, solve, normal(6, 2))
    begun = blocks(flow)
    assert len(begun) == 2 * 8  # of eight evaluations the values of two layers: a form gives the trace
    gradients(flow, solve, normal(6, 2))
    gradients(flow, Solve(method="rk4", times=(0, 1)), normal(6, 2))
    assert blocks(flow) == begun
    gradients(flow, solve, normal(9, 2))
    assert len(blocks(flow)) == 2 * len(begun)
    monkeypatch.setattr(tape.Arena, "SPARE", 0)  # what is much depends on who asks
    gradients(flow, solve, normal(6, 2))
    assert blocks(flow) == begun
    one, two = (flow(normal(6, 2).requires_grad_(), solve=solve) for _ in range(2))  # both before one goes back
    both = torch.autograd.grad(loss_of(one) + loss_of(two), list(flow.parameters()))
    alone = torch.autograd.grad(loss_of(flow(normal(6, 2).requires_grad_(), solve=solve)), list(flow.parameters()))
    torch.testing.assert_close(both, tuple(2 * part for part in alone))
    one, two = (flow(x, solve=solve).logdet.sum() for x in (normal(6, 2), normal(6, 2, seed=1)))
    one.backward()
    for seed in (2, 3):  # they may have the memory of the first, and none of the second
        flow(normal(6, 2, seed=seed), solve=solve)
    found = torch.autograd.grad(two, list(flow.parameters()))
    again = flow(normal(6, 2, seed=1), solve=solve).logdet.sum()
    torch.testing.assert_close(found, torch.autograd.grad(again, list(flow.parameters())))
    assert len(free) == others + 1
    del flow, one, two, again
    gc.collect()
    assert len(free) == others


def test_nothing_is_kept_where_nothing_is_learnt():
    flow = flow_of().requires_grad_(False)
    free = len(tape._FREE)
    assert not flow(normal(3, 2), solve=Solve(times=(0, 1))).logdet.requires_grad
    assert len(tape._FREE) == free


class Swinging(nn.Module):
    """At rest at 0, where its divergence and the gradient of that swing all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones((), dtype=D))

    def forward(self, t, z):
        return self.theta * torch.cos(30 * t) * z


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_the_adjoint_controls_what_it_gathers(tolerance):
    flow = CNF(Swinging(), 1)
    logdet = flow(torch.zeros(3, 1, dtype=D), solve=Solve(tolerance=tolerance, gradient="adjoint")).logdet
    (found,) = torch.autograd.grad(logdet.sum(), [flow.field.theta])
    assert abs(found.item() / 3 - math.sin(30) / 30) < 2 * tolerance


@pytest.mark.parametrize("solve", [Solve(times=(0, 1)), Solve(tolerance=1e-3)], ids=["grid", "chosen"])
def test_autocast_does_not_reach_the_way_back(solve):
    flow, x = flow_of(hidden=(5, 4, 3), time="concat").float(), normal(3, 2, dtype=torch.float32)
    truth = torch.autograd.grad(flow(x, solve=solve).logdet.sum(), list(flow.parameters()))
    logdet = flow(x, solve=solve).logdet
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(logdet.sum(), list(flow.parameters()))
    torch.testing.assert_close(found, truth, rtol=0, atol=0)


def test_many_parameters_do_not_drown_the_points_of_the_adjoint():
    def evaluations(unused: int) -> int:
        flow, x = flow_of("autograd"), normal(1, 2).requires_grad_()
        for parameter in flow.parameters():
            parameter.data.mul_(5)
        flow.field.unused = nn.Parameter(torch.zeros(unused, dtype=D))
        result = flow(x, solve=Solve(tolerance=1e-6, gradient="adjoint"))
        loss_of(result).backward()
        return result.stats[0].backward_evaluations

    assert evaluations(100_000) > 0.8 * evaluations(0)
