"""The field of images: its tangents against autograd, its times, and what it refuses."""

import pytest
import torch
from builders import Bare, redrawn, seeded
from torch.func import jacrev, vmap

from cnfkit import CNF, ConvField, Flow, FrozenGrid, Normal, Solve, bijection_contract, uniform_grid
from cnfkit.ode.convfield import activate, plain_activate

D = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=D)


def field_of(shape=(2, 4, 3), hidden=(5, 3)) -> ConvField:
    return redrawn(ConvField(shape, hidden)).double()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_activations_by_hand_are_those_of_autograd(k):
    """Values, first and second derivatives."""
    sums, shift = normal(1 + k, 4, 2, 3, 3).requires_grad_(), normal(2, 3, 3, seed=1).requires_grad_()
    found = []
    for function in (activate, plain_activate):
        out = function(sums, shift)
        first = torch.autograd.grad(out.sin().sum(), (sums, shift), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (sums, shift))
        found.append((out, *first, *second))
    torch.testing.assert_close(*found)


def test_products_are_those_of_the_jacobian():
    field, z, t = field_of(), normal(3, 2, 4, 3), torch.tensor(0.3, dtype=D)
    (moment,) = field.moments(t[None])
    jacobian = vmap(jacrev(lambda point: field(t, point[None])[0]))(z).flatten(1, 3).flatten(2)
    v, rows = moment.with_products(z, None)
    torch.testing.assert_close((v, moment.value(z)), (field(t, z), field(t, z)))
    torch.testing.assert_close(rows.flatten(2), jacobian.permute(2, 0, 1))
    torch.testing.assert_close(moment.with_trace(z)[1], jacobian.diagonal(dim1=1, dim2=2).sum(-1))
    probes = normal(2, *z.shape, seed=2)
    _, rows = moment.with_products(z, probes)
    torch.testing.assert_close(rows.flatten(2), torch.einsum("nij,knj->kni", jacobian, probes.flatten(2)))


def test_the_time_is_a_channel_of_its_own_for_each_image():
    field, z, t = field_of(), normal(3, 2, 4, 3), torch.tensor([0.1, 0.5, 0.9], dtype=D)
    singly = torch.cat([field(t[k], z[k : k + 1]) for k in range(3)])
    torch.testing.assert_close(field(t, z), singly)
    for k, moment in enumerate(field.moments(t)):
        torch.testing.assert_close(moment.value(z[k : k + 1]), singly[k : k + 1])


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_a_training_step_has_autograds_gradients(trace):
    field, x = field_of((1, 3, 3)), normal(4, 1, 3, 3)
    found = []
    for kind in (field, Bare(field)):
        solve = Solve(trace=trace, method="rk4", times=uniform_grid(2), generator=seeded())
        flow = Flow(Normal((1, 3, 3)), CNF(kind.float())).double()
        loss = -flow.log_prob(x, solve=solve).mean()
        found.append((loss, *torch.autograd.grad(loss, list(field.parameters()))))
    torch.testing.assert_close(*found)


def test_half_the_digits_give_nearly_the_same_gradients():
    """And none of it is left in a solve that judges."""
    field, x, found = field_of((1, 4, 4)).float(), normal(4, 1, 4, 4).float(), []
    flow = Flow(Normal((1, 4, 4)), CNF(field))
    for precision in ("full", "bfloat16"):
        solve = Solve(trace="hutchinson", method="rk4", times=uniform_grid(2), precision=precision, generator=seeded())
        loss = -flow.log_prob(x, solve=solve).mean()
        gradients = torch.autograd.grad(loss, list(field.parameters()))
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    (loss, gradient), (other, rough) = found
    assert rough.dtype == torch.float32 and 0 < (loss - other).abs() < 0.05 * loss.abs()
    assert 1e-5 < (gradient - rough).norm() / gradient.norm() < 0.05
    assert solve.within(1e-5).precision == "full" and FrozenGrid(precision="bfloat16").adaptive.precision == "full"


def test_contract():
    flow = redrawn(CNF(ConvField((1, 2, 2), hidden=(3,))), scale=0.3)
    x = normal(2, 1, 2, 2).float()
    bijection_contract(flow, x, solve=Solve(times=uniform_grid(4)), tolerance=1e-5)


def test_a_fresh_field_is_the_identity():
    x = normal(2, 1, 4, 4).float()
    result = CNF(ConvField((1, 4, 4), hidden=(3,)))(x)
    assert result.value.equal(x) and not result.logdet.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(event_shape=(3, 4)), r"event_shape is \(3, 4\); wanted channels, height and width"),
        (dict(event_shape=(1, 0, 4)), r"event_shape is \(1, 0, 4\); wanted positive sizes"),
        (dict(event_shape=(1, 4, 4), hidden=()), r"hidden is \(\); wanted positive sizes"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvField(**arguments)
