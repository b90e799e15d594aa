"""What continuous flows are computed by: tangents, moments, contexts, stages, standard errors, energies."""

import copy
import math

import pytest
import torch
from builders import Bare, Counted, Field, redrawn, seeded
from torch import nn
from torch.func import functional_call, jacrev, jvp, stack_module_state, vmap

from cnfkit import (
    CNF,
    ActNorm,
    Affine,
    Chain,
    Flow,
    Inverse,
    MLPField,
    NegativeLogLikelihood,
    Normal,
    Residual,
    Solve,
    SolveError,
    bijection_contract,
    flow_contract,
    uniform_grid,
)
from cnfkit.ode import tangents
from cnfkit.ode.energies import RATES
from cnfkit.ode.integrate import integrate
from cnfkit.ode.moments import Moment, Tangent, moments
from cnfkit.ode.solve import ENERGIES
from cnfkit.ode.tangents import as_logistic, plain_tangents, trace_form, with_tangents, with_trace

D = torch.float64
GRID = Solve(times=uniform_grid(3))
TIMES, ACTIVATIONS = ("concat", "concatsquash", "hyper"), ("tanh", "softplus")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = D) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=D).to(dtype)


def field_of(d: int = 2, hidden=(6, 5), **options) -> MLPField:
    return redrawn(MLPField(d, hidden, **options)).double()


# Tangents


def network(d: int, hidden, dtype: torch.dtype = D, per_point: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Layers with weights of the usual size; if wanted, the first and the last have a bias for each point."""
    widths, layers = (d, *hidden, d), []
    for k in range(len(widths) - 1):
        rows = (per_point,) if per_point and k in (0, len(hidden)) else ()
        weight = normal(widths[k + 1], widths[k], seed=k, dtype=dtype) / widths[k] ** 0.5
        layers.append((weight, normal(*rows, widths[k + 1], seed=50 + k, dtype=dtype)))
    return layers


def outputs_of(function, activation: str, parts, probes) -> list[torch.Tensor]:
    """The value, and the products if there are any, of a network that is given as a flat list."""
    z, *parts = parts
    found = function(activation, list(zip(parts[::2], parts[1::2], strict=True)), z, *probes)
    return [part for part in found if part is not None]


def derivatives(function, activation: str, parts, probes, wanted=None) -> list[list[torch.Tensor]]:
    """Outputs; first derivatives, along one weighting, from a plain and from a differentiable backward pass; second.

    Args:
        wanted: which of the parts are differentiated; all unless given.
    """
    parts = [part.clone().requires_grad_(wanted is None or k in wanted) for k, part in enumerate(parts)]
    outputs = outputs_of(function, activation, parts, probes)
    leaves = [part for part in parts if part.requires_grad]
    weights = [normal(*out.shape, seed=20 + k, dtype=out.dtype).requires_grad_() for k, out in enumerate(outputs)]
    first = torch.autograd.grad(outputs, leaves, weights, retain_graph=True, materialize_grads=True)
    again = torch.autograd.grad(outputs, leaves, weights, create_graph=True, materialize_grads=True)
    along = [normal(*part.shape, seed=30 + k, dtype=part.dtype) for k, part in enumerate(leaves)]
    total = sum((a * b).sum() for a, b in zip(again, along, strict=True))
    second = torch.autograd.grad(total, [*leaves, *weights], materialize_grads=True)
    return [part.detach() for group in (outputs, first, again, second) for part in group]


PROBES = {
    "value alone": lambda n, d: None,
    "unit": lambda n, d: "unit",
    "trace": lambda n, d: "trace",
    "probes": lambda n, d: normal(2, n, d, seed=9),
}
HIDDEN = [(5,), (70,), (6, 70), (70, 5), (5, 66, 7), (5, 4, 3, 6)]


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("activation", ["logistic", "softplus"])
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_the_backward_pass_by_hand_is_that_of_autograd(hidden, activation, probes):
    """Value and products, first and second derivatives in points, weights, biases and what comes in from above."""
    n, d = 4, 3
    for dtype, per_point in ((D, 0), (D, n), (torch.float32, n)):
        chosen = PROBES[probes](n, d)
        chosen = chosen.to(dtype) if isinstance(chosen, torch.Tensor) else chosen
        layers = network(d, hidden, dtype, per_point)
        parts = [normal(n, d, seed=8, dtype=dtype), *(part for layer in layers for part in layer)]
        ours, theirs = (derivatives(f, activation, parts, (chosen,)) for f in (with_tangents, plain_tangents))
        assert all(part.dtype == dtype for part in ours)
        tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == D else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("activation", ["logistic", "softplus"])
@pytest.mark.parametrize("per_point", [0, 7], ids=["one bias", "a bias for each point"])
@pytest.mark.parametrize("points", [0, 1, 3, 7])
def test_without_gradients_points_go_through_in_blocks(points, per_point, activation, probes, monkeypatch):
    """Of three here; the last block may be shorter."""
    monkeypatch.setattr(tangents, "BLOCK", 3)
    for hidden in ((5,), (70, 5), (5, 4, 66)):
        layers, z, chosen = network(3, hidden), normal(points, 3), PROBES[probes](points, 3)
        if per_point:
            layers = [(weight, bias + normal(points, 1)) for weight, bias in layers]
        with torch.no_grad():
            ours, theirs = (f(activation, layers, z, chosen) for f in (with_tangents, plain_tangents))
        with_gradients = with_tangents(activation, layers, z, chosen)
        for k in range(1 if probes == "value alone" else 2):
            assert ours[k].shape == theirs[k].shape == with_gradients[k].shape
            torch.testing.assert_close(ours[k], theirs[k], rtol=1e-12, atol=1e-12)
        assert probes != "value alone" or ours[1] is with_gradients[1] is None


@pytest.mark.parametrize("d", [1, 66])
def test_in_one_dimension_and_in_many(d):
    """The last layer has more rows than are computed transposed, or one."""
    parts = [normal(3, d), *(part for layer in network(d, (5, 4)) for part in layer)]
    for probes in ("unit", "trace", normal(2, 3, d)):
        ours, theirs = (derivatives(f, "logistic", parts, (probes,)) for f in (with_tangents, plain_tangents))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (5,), (5, 6), (0, 3), (1, 4, 6)], ids=str)
@pytest.mark.parametrize("probes", PROBES)
def test_parts_that_are_frozen_get_no_gradient_and_change_no_other(wanted, probes):
    """The points, one weight, one bias; the rest is given."""
    parts = [normal(4, 3), *(part for layer in network(3, (6, 5)) for part in layer)]
    chosen = PROBES[probes](4, 3)
    ours, theirs = (derivatives(f, "softplus", parts, (chosen,), wanted) for f in (with_tangents, plain_tangents))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    leaves = [part.clone().requires_grad_(k in wanted) for k, part in enumerate(parts)]
    sum(out.sum() for out in outputs_of(with_tangents, "softplus", leaves, (chosen,))).backward()
    assert [leaf.grad is not None for leaf in leaves] == [k in wanted for k in range(len(parts))]


def test_where_nothing_is_to_be_learnt_there_is_no_graph():
    layers, z = network(3, (6, 5)), normal(4, 3)
    assert not any(out.requires_grad for out in with_tangents("logistic", layers, z, "unit"))
    with torch.no_grad():
        assert not any(out.requires_grad for out in with_tangents("logistic", layers, z.requires_grad_(), "unit"))


def test_probes_may_be_learnt_too():
    """A product is linear in its probe; a gradient of zero would be wrong, and nobody would notice."""
    layers, z, probes = network(3, (6, 5)), normal(4, 3), normal(2, 4, 3).requires_grad_()
    _, rows = with_tangents("logistic", layers, z, probes)
    (gradient,) = torch.autograd.grad(rows.square().sum(), probes)
    _, rows = plain_tangents("logistic", layers, z, probes)
    torch.testing.assert_close(gradient, torch.autograd.grad(rows.square().sum(), probes)[0])


def test_third_derivatives():
    """The second are left to autograd, which can go on."""
    layers, results = network(2, (4,)), []
    for function in (with_tangents, plain_tangents):
        z = normal(3, 2).requires_grad_()
        part = sum(out.square().sum() for out in function("logistic", layers, z, "unit"))
        for _ in range(3):
            (part,) = torch.autograd.grad(part.square().sum(), z, create_graph=True)
        results.append(part.detach())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 60], ids=["usual", "far out"])
def test_the_twin_is_the_network_and_its_jacobian(size):
    """What both are compared with is right itself, also where the activations are flat or straight."""
    layers, z = network(3, (6, 5)), size * normal(4, 3)
    for activation, function in (("logistic", torch.sigmoid), ("softplus", nn.functional.softplus)):

        def net(z, function=function):
            for weight, bias in layers[:-1]:
                z = function(weight @ z + bias)
            return layers[-1][0] @ z + layers[-1][1]

        jacobian = vmap(jacrev(net))(z)
        for ours in (plain_tangents, with_tangents):
            value, columns = ours(activation, layers, z, "unit")
            torch.testing.assert_close(value, vmap(net)(z))
            torch.testing.assert_close(columns, jacobian.permute(2, 0, 1), rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(ours(activation, layers, z, "trace")[1], vmap(torch.trace)(jacobian))


def saved_by(function) -> int:
    """How many numbers autograd holds on to, of those that hooks on saved tensors see."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes.values())


@pytest.mark.parametrize("probes", ["unit", "trace", "probes"])
def test_all_that_is_kept_for_the_backward_pass_is_seen_by_hooks(probes):
    """So that it can be counted, and moved to the CPU or to a disk: the node itself holds no tensor beside."""
    layers, z, kept = network(3, (6, 5)), normal(4, 3).requires_grad_(), []

    def away(tensor):
        kept.append(tensor.numpy(force=True).copy())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(away, lambda place: torch.from_numpy(kept[place])):
        outputs = with_tangents("logistic", layers, z, PROBES[probes](4, 3))
    leaves, _ = torch.utils._pytree.tree_flatten(vars(outputs[0].grad_fn))
    assert kept and not any(isinstance(leaf, torch.Tensor) for leaf in leaves)
    (gradient,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), z)
    again = plain_tangents("logistic", layers, z, PROBES[probes](4, 3))
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(out.square().sum() for out in again), z)[0])
    # and everything of the gradient goes through them
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor * math.nan, lambda tensor: tensor):
        outputs = with_tangents("logistic", layers, z, PROBES[probes](4, 3))
    (gradient,) = torch.autograd.grad(sum(out.sum() for out in outputs), z)
    assert gradient.isnan().all()


def test_no_more_is_kept_than_by_the_twin():
    layers, z = [tuple(part.requires_grad_() for part in layer) for layer in network(3, (32, 32))], normal(50, 3)
    ours, theirs = (saved_by(lambda f=f: f("softplus", layers, z, "unit")) for f in (with_tangents, plain_tangents))
    assert ours <= theirs


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("per_point", [0, 3])
def test_gradients_that_come_in_are_left_as_they_are(probes, per_point):
    """They belong to the caller: a second pass over the same graph, with the same tensors, gives the same.

    All layers are as wide here, so that a result would fit into the memory of what came in.
    """
    layers, z = network(3, (3, 3), per_point=per_point), normal(3, 3).requires_grad_()
    parts = [z, *(part.requires_grad_() for layer in layers for part in layer)]
    outputs = [out for out in with_tangents("logistic", layers, z, PROBES[probes](3, 3)) if out is not None]
    g = normal(3, 3, seed=3)
    # one tensor for the value and for every product, whose copies share its memory; and one number for all
    for shared in (g, torch.tensor(2.0, dtype=D).expand(3, 3)):
        weights = [(shared if out.dim() > 1 else shared[0]).expand(out.shape) for out in outputs]
        before = shared.clone()
        first, second = (torch.autograd.grad(outputs, parts, weights, retain_graph=True) for _ in range(2))
        assert shared.equal(before) and all(a.equal(b) for a, b in zip(first, second, strict=True))
        apart = torch.autograd.grad(outputs, parts, [weight.clone() for weight in weights], retain_graph=True)
        assert all(a.equal(b) for a, b in zip(first, apart, strict=True))
        copies = [part.clone() for part in first]
        torch.autograd.grad(outputs, parts, weights, retain_graph=True)
        assert all(a.equal(b) for a, b in zip(first, copies, strict=True)), "nor is what was given out written to"


@pytest.mark.parametrize("hidden", [(5,), (6, 4), (3, 4, 5)], ids=str)
def test_a_network_with_tanh_is_a_logistic_one(hidden):
    """Also where the weights are those of several times."""
    layers, z = network(3, hidden), normal(7, 3)

    def with_tanh(z):
        for weight, bias in layers[:-1]:
            z = torch.tanh(weight @ z + bias)
        return layers[-1][0] @ z + layers[-1][1]

    value, columns = with_tangents("logistic", as_logistic(layers), z, "unit")
    torch.testing.assert_close(value, vmap(with_tanh)(z), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(columns, vmap(jacrev(with_tanh))(z).permute(2, 0, 1), rtol=1e-12, atol=1e-13)
    others = [(2 * weight, bias + 1) for weight, bias in layers]
    together = as_logistic(
        [(torch.stack([a, c]), torch.stack([b, d])) for (a, b), (c, d) in zip(layers, others, strict=True)]
    )
    for k, one in enumerate((layers, others)):
        torch.testing.assert_close([(w[k], b[k]) for w, b in together], as_logistic(one), rtol=0, atol=0)


def traced(activation: str, layers, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return with_trace(activation, layers, z, trace_form([weight for weight, _ in layers]))


@pytest.mark.parametrize("d", [1, 2, 7])
@pytest.mark.parametrize("hidden", [(5,), (6, 4), (3, 4, 5), (4, 3, 3, 5)], ids=str)
@pytest.mark.parametrize("activation", ["logistic", "softplus"])
def test_the_trace_is_that_of_autograds_jacobian(activation, hidden, d):
    """With its first and second derivatives; the forms in the slopes need no more passes in more dimensions."""

    def by_autograd(activation, layers, z):
        with torch.enable_grad():
            start = z if z.requires_grad else z.detach().requires_grad_()
            value, _ = plain_tangents(activation, layers, start, None)
            rows = [torch.autograd.grad(value[:, i].sum(), start, create_graph=True)[0][:, i] for i in range(d)]
        return value, sum(rows)

    for per_point in (0, 4):
        parts = [normal(4, d, seed=8), *(part for layer in network(d, hidden, per_point=per_point) for part in layer)]
        ours, theirs = (derivatives(f, activation, parts, ()) for f in (traced, by_autograd))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_no_tangents_are_carried_for_the_trace_of_few_layers(monkeypatch):
    """And the forms of several times are those of each."""
    monkeypatch.setattr(tangents, "with_tangents", None)
    for hidden in ((5,), (6, 4)):
        traced("softplus", network(3, hidden), normal(4, 3))
        weights = [weight for weight, _ in network(3, hidden)]
        together = trace_form([torch.stack([weight, 2 * weight]) for weight in weights])
        for k, factor in enumerate((1, 2)):
            torch.testing.assert_close(together[k], trace_form([factor * weight for weight in weights]))
    assert trace_form([weight for weight, _ in network(3, (3, 4, 5))]) is None
    with pytest.raises(TypeError):
        traced("softplus", network(3, (3, 4, 5)), normal(4, 3))


# Under torch.func, which cannot look into a backward pass written by hand

# PyTorch 2.13 loads its forward mode with a warning about itself
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@FORWARD_MODE
def test_transformed_points_take_the_twin(monkeypatch):
    layers, z, taken = network(3, (6, 5)), normal(4, 3), []

    def counted(*args):
        taken.append(args)
        return plain_tangents(*args)

    monkeypatch.setattr(tangents, "plain_tangents", counted)
    value, columns = with_tangents("logistic", layers, z, "unit")
    assert not taken

    def one(point):
        return tuple(part[..., 0, :] for part in with_tangents("logistic", layers, point[None], "unit"))

    value_of_each, columns_of_each = vmap(one)(z)
    torch.testing.assert_close((value_of_each, columns_of_each.transpose(0, 1)), (value, columns))
    torch.testing.assert_close(vmap(jacrev(lambda point: one(point)[0]))(z).permute(2, 0, 1), columns)
    along = normal(4, 3, seed=4)
    _, change = jvp(lambda z: with_tangents("logistic", layers, z, None)[0], (z,), (along,))
    torch.testing.assert_close(change, torch.einsum("knd,nk->nd", columns, along))
    assert len(taken) == 3


def test_weights_that_are_transformed_take_the_twin_too():
    layers, z = network(3, (6, 5)), normal(4, 3)
    (weight, bias), *others = layers

    def rows(weight, function=with_tangents):
        return function("logistic", [(weight, bias), *others], z, "unit")[1]

    torch.testing.assert_close(jacrev(rows)(weight), jacrev(lambda w: rows(w, plain_tangents))(weight))
    several = torch.stack([weight, 2 * weight])
    torch.testing.assert_close(vmap(rows)(several), torch.stack([rows(weight), rows(2 * weight)]))
    probes = normal(5, 2, 4, 3)
    expected = torch.stack([with_tangents("logistic", layers, z, some)[1] for some in probes])
    torch.testing.assert_close(vmap(lambda some: with_tangents("logistic", layers, z, some)[1])(probes), expected)


@pytest.mark.parametrize("trace", ["exact", "none"])
def test_an_ensemble_of_flows_is_a_map_over_their_parameters(trace):
    flows = [redrawn(CNF(MLPField(2, (4, 4, 4))), k).double() for k in range(3)]
    x, options = normal(5, 2), dict(solve=Solve(times=(0, 1), trace=trace))
    parameters, _ = stack_module_state(flows)
    together = vmap(lambda own: functional_call(flows[0], own, (x,), options).value)(parameters)
    torch.testing.assert_close(together, torch.stack([flow(x, **options).value for flow in flows]))


@FORWARD_MODE
@pytest.mark.parametrize("time", TIMES)
def test_a_field_is_differentiated_in_the_time_by_jvp(time):
    field, z, t = field_of(time=time), normal(4, 2), torch.tensor(0.4, dtype=D)
    _, (change, _) = jvp(lambda t: field.with_products(t, z), (t,), (torch.ones_like(t),))
    _, expected = jvp(lambda t: field(t, z), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(change, expected)


def test_no_points_have_no_products():
    field, t = field_of(), torch.tensor(0.4, dtype=D)
    for probes, k in ((None, 2), (torch.zeros(3, 0, 2, dtype=D), 3)):
        v, rows = field.with_products(t, torch.zeros(0, 2, dtype=D), probes)
        assert v.shape == (0, 2) and rows.shape == (k, 0, 2)


# Moments


@pytest.mark.parametrize("features", [0, 3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("time", TIMES)
def test_moments_are_the_field_at_those_times(time, activation, features):
    """Value, products and trace, and the gradients of all of them."""
    field = field_of(3, time=time, activation=activation, context=features)
    times, z = torch.tensor([0.0, 0.3, -1.2], dtype=D), normal(5, 3)
    context = (normal(5, features, seed=2),) if features else ()
    probes = normal(2, 5, 3, seed=3)

    def gradients(*parts):
        leaves = [*field.parameters(), *context]
        total = sum((k + 1) * part.square().sum() for k, part in enumerate(parts))
        return torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)

    for part in context:
        part.requires_grad_()
    found = field.moments(times, *context)
    assert len(found) == 3 and all(moment.field is field for moment in found)
    for t, moment in zip(times, found, strict=True):
        plain = Moment(field, t, *context)
        torch.testing.assert_close(moment.value(z), field(t, z, *context), rtol=1e-12, atol=1e-12)
        ours, theirs = (at.with_products(z, None) for at in (moment, plain))
        # by the columns here, by the rows there
        columns = [part.diagonal(dim1=0, dim2=2) for part in (ours[1], theirs[1])]
        torch.testing.assert_close((ours[0], columns[0]), (theirs[0], columns[1]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours[1].permute(1, 2, 0), theirs[1].transpose(0, 1), rtol=1e-12, atol=1e-12)
        estimates = [(at.with_products(z, probes)[1] * probes).sum(-1) for at in (moment, plain)]
        torch.testing.assert_close(*estimates, rtol=1e-12, atol=1e-12)
        traces = [at.with_trace(z) for at in (moment, plain)]
        torch.testing.assert_close(*traces, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(*traces[0], *estimates[:1]), gradients(*traces[1], *estimates[1:]))


@pytest.mark.parametrize("time", TIMES)
def test_a_time_for_each_point(time):
    field, z, t = field_of(3, time=time, context=2), normal(5, 3), torch.linspace(-1, 1, 5, dtype=D)
    context = normal(5, 2, seed=2)
    one_by_one = torch.cat([field(t[k], z[k : k + 1], context[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(field(t, z, context), one_by_one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(field(t[:1].expand(5), z, context), field(t[0], z, context), rtol=1e-12, atol=1e-12)


class OtherForward(MLPField):
    def forward(self, t, z, context=None):
        return 2 * super().forward(t, z, context)


class OtherProducts(MLPField):
    def with_products(self, t, z, probes=None, context=None):
        v, rows = super().with_products(t, z, probes, context)
        return v, 3 * rows


class Quarter(Moment):
    def with_products(self, z, probes):
        v, rows = super().with_products(z, probes)
        return v, rows / 4


class OtherMoments(MLPField):
    def moments(self, times, context=None):
        return [Quarter(self, t, context) for t in times]


class ForwardAfterProducts(OtherProducts):
    def forward(self, t, z, context=None):
        return 2 * super().forward(t, z, context)


class ForwardAndProducts(MLPField):
    def forward(self, t, z, context=None):
        return 2 * super().forward(t, z, context)

    def with_products(self, t, z, probes=None, context=None):
        v, rows = super().with_products(t, z, probes, context)
        return 2 * v, 2 * rows


class Unchanged(MLPField):
    """A class of one's own that adds a word."""

    name = "mine"


class ProductsAfterForward(OtherForward):
    def with_products(self, t, z, probes=None, context=None):
        v, rows = super().with_products(t, z, probes, context)
        return 2 * v, 5 * rows


# the class, the kind of its moments, and how many times the first field's velocity and divergence it has
NEWEST = [
    (OtherForward, Moment, 2, 2),
    (OtherProducts, Tangent, 1, 3),
    (OtherMoments, Quarter, 1, 0.25),
    (ForwardAfterProducts, Moment, 2, 2),
    (ForwardAndProducts, Tangent, 2, 2),
    (ProductsAfterForward, Tangent, 2, 5),
    (Unchanged, None, 1, 1),
]


@pytest.mark.parametrize(("kind", "moment", "velocity", "divergence"), NEWEST)
def test_what_a_subclass_writes_last_is_what_is_used(kind, moment, velocity, divergence):
    """One that changes ``forward`` alone is differentiated by autograd: the products that it inherits are another's."""
    field, z = kind(2, (4,)), normal(3, 2)
    redrawn(field).double()
    (found,) = moments(field, torch.tensor([0.3], dtype=D))
    assert type(found) is moment or moment is None
    first = MLPField(2, (4,)).double()
    first.load_state_dict(field.state_dict())
    (plain,) = moments(first, torch.tensor([0.3], dtype=D))
    v, trace = plain.with_trace(z)
    torch.testing.assert_close(found.value(z), velocity * v)
    torch.testing.assert_close(found.with_trace(z), (velocity * v, divergence * trace))
    step = Solve(method="euler", times=(0, 1))
    estimate = Solve(method="euler", times=(0, 1), trace="hutchinson", probes=3, generator=seeded())
    for solve in (step, Solve(**vars(step) | {"energies": ("jacobian_energy",)})):
        ours, plain = (CNF(part)(z, solve=solve) for part in (field, first))
        torch.testing.assert_close(ours.logdet, divergence * plain.logdet)
    if moment is not Moment:  # autograd multiplies the same probes from the other side
        ours = CNF(field)(z, solve=estimate).logdet
        estimate.generator.manual_seed(0)
        torch.testing.assert_close(ours, divergence * CNF(first)(z, solve=estimate).logdet)


class Named(nn.Module):
    """A field that happens to have attributes with the names of what a field or a dynamics may offer."""

    event_shape = torch.Size([2])

    def __init__(self) -> None:
        super().__init__()
        self.moments = nn.Parameter(torch.ones(2, dtype=D))
        self.with_products = nn.Linear(2, 2).double()

    def at(self, *args):
        raise AssertionError("nobody asked for that")

    def forward(self, t, z):
        return self.with_products(z) + self.moments


def test_attributes_that_mean_something_else_are_left_alone():
    field, x = Named(), normal(3, 2)
    for gradient in ("backprop", "checkpoint", "adjoint"):
        result = CNF(field)(x, solve=Solve(tolerance=1e-9, gradient=gradient))
        trace = field.with_products.weight.trace().expand(3)
        torch.testing.assert_close(result.logdet, trace, rtol=1e-7, atol=1e-8)


def test_weights_of_all_times_of_a_grid_are_computed_at_once():
    """They depend on nothing else; so a layer is asked for them once a solve, not once an evaluation."""
    field, calls = field_of(), []
    for layer in field.layers:
        layer.at = lambda t, own=layer.at: calls.append(t.shape) or own(t)
    assert CNF(field)(normal(3, 2), solve=Solve(method="rk4", times=uniform_grid(5))).evaluations == 20
    assert calls == [(20,)] * 3


# Contexts


class Given(nn.Module):
    """A field of one's own that takes a context, by the attribute that says so, and has no products."""

    takes_context = True

    def __init__(self, d: int = 2, features: int = 3) -> None:
        super().__init__()
        self.event_shape = torch.Size([d])
        self.inner, self.seen = nn.Linear(d, d), nn.Linear(features, d)

    def forward(self, t, z, context):
        return torch.tanh(self.inner(z) + (1 + t) * self.seen(context))


GIVEN = {
    "concat": lambda d=2: MLPField(d, (6,), "concat", context=3),
    "concatsquash, softplus": lambda d=2: MLPField(d, (6, 5), activation="softplus", context=3),
    "hyper, three layers": lambda d=2: MLPField(d, (5, 4, 5), "hyper", context=3),
    "one's own": lambda d=2: Given(d),
}


def given(name: str, d: int = 2) -> CNF:
    return redrawn(CNF(GIVEN[name](d)), scale=0.3)


@pytest.mark.parametrize("name", GIVEN)
def test_a_conditional_cnf_keeps_the_contract(name):
    flow, context = given(name), normal(3, 3, seed=1, dtype=torch.float32)
    assert flow.takes_context
    bijection_contract(
        flow, normal(3, 2, dtype=torch.float32), context, solve=Solve(times=uniform_grid(4)), tolerance=1e-5
    )


@pytest.mark.parametrize("name", ["concatsquash, softplus", "one's own"])
def test_the_contract_of_a_conditional_flow(name):
    """Its samples fall where its density says, given one context."""
    flow = Flow(Normal(1), Chain(given(name, 1), ActNorm(1)))
    flow_contract(flow, context=normal(3, 3, seed=1, dtype=torch.float32), solve=Solve(tolerance=1e-8), tolerance=1e-5)


@pytest.mark.parametrize("name", GIVEN)
def test_the_density_integrates_to_one_whatever_the_context(name):
    flow, contexts = Flow(Normal(1), given(name, 1)).double(), 4 * normal(4, 3, seed=1)
    line = torch.linspace(-12, 12, 401, dtype=D)
    with torch.no_grad():
        x = line.repeat(4)[:, None]
        density = flow.log_prob(x, contexts.repeat_interleave(401, 0), Solve(tolerance=1e-8)).exp().view(4, 401)
    torch.testing.assert_close(torch.trapezoid(density, line), torch.ones(4, dtype=D), rtol=1e-5, atol=0)
    assert (density - density[0]).abs().max() > 0.005, "the context matters"


@pytest.mark.parametrize("name", GIVEN)
def test_each_row_of_a_context_matters_to_its_point_alone(name):
    flow, x, context = given(name).double(), normal(3, 2), normal(3, 3, seed=1)
    before = flow(x, context, GRID)
    for k in range(3):
        other = context.clone()
        other[1, k] += 1
        after = flow(x, other, GRID)
        assert (after.value != before.value).any(1).tolist() == [False, True, False]
        assert (after.logdet != before.logdet).tolist() == [False, True, False]


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (3, 4), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("solve", [GRID, Solve(trace="none", times=(0, 1))], ids=["exact", "none"])
def test_batches_of_any_shape_with_contexts(name, batch, solve):
    flow, x, context = given(name).double(), normal(*batch, 2), normal(*batch, 3, seed=1)
    for go in (flow, flow.inverse):
        result, rows = go(x, context, solve), go(x.reshape(-1, 2), context.reshape(-1, 3), solve)
        assert result.value.shape == x.shape and result.logdet.shape == batch
        torch.testing.assert_close(result.value.reshape(-1, 2), rows.value)
        torch.testing.assert_close(result.logdet.reshape(-1), rows.logdet, equal_nan=True)


def test_a_context_that_is_not_contiguous():
    flow, x, context = given("concat").double(), normal(2, 3, 2), normal(3, 2, 3, seed=1).transpose(0, 1)
    expected = flow(x, context.contiguous(), GRID)
    torch.testing.assert_close(flow(x, context, GRID).value, expected.value, rtol=0, atol=0)


@pytest.mark.parametrize("name", GIVEN)
def test_samples_given_a_context(name):
    """So many for each row; with the density that the flow says they have."""
    flow, contexts = Flow(Normal(2), given(name)).double(), normal(3, 3, seed=1)
    solve = Solve(tolerance=1e-9)
    x, log_prob = flow.sample_and_log_prob(4, contexts, solve, generator=seeded())
    assert x.shape == (4, 3, 2) and log_prob.shape == (4, 3)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x, contexts, solve), log_prob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(flow.sample(4, contexts, solve, generator=seeded()), x, rtol=1e-7, atol=1e-7)
    alone = flow.log_prob(x[2, 1], contexts[1], solve).detach()
    torch.testing.assert_close(alone, log_prob[2, 1], rtol=1e-6, atol=1e-6)


def test_contexts_in_inference_mode():
    flow, x, context = Flow(Normal(2), given("one's own")).double(), normal(4, 2), normal(4, 3, seed=1)
    expected = flow.log_prob(x, context, GRID)
    with torch.inference_mode():
        measured = flow.log_prob(x.clone(), context.clone(), GRID)
    assert measured.equal(expected)


WAYS = {
    "backprop": Solve(tolerance=1e-10),
    "checkpoint": Solve(tolerance=1e-10, gradient="checkpoint"),
    "adjoint": Solve(tolerance=1e-10, gradient="adjoint"),
    "torchdiffeq": Solve(method="torchdiffeq:dopri5", tolerance=1e-10, gradient="adjoint"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["concatsquash, softplus", "one's own"])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_gradients_reach_the_context_and_what_it_was_made_by(name, way, back):
    """The context is that of an encoder; against central differences."""
    flow, encoder = given(name).double(), nn.Linear(2, 3).double()
    x, observed = normal(4, 2), normal(4, 2, seed=1)

    def loss(context):
        result = (flow.inverse if back else flow)(x, context, WAYS[way])
        return (result.value * normal(4, 2, seed=5)).sum() + 2 * result.logdet.sum()

    context = encoder(observed)
    context.retain_grad()
    loss(context).backward()
    along = normal(4, 3, seed=6)
    with torch.no_grad():
        difference = (loss(context + 1e-4 * along) - loss(context - 1e-4 * along)).item() / 2e-4
    assert (context.grad * along).sum().item() == pytest.approx(difference, rel=1e-6)
    torch.testing.assert_close(encoder.weight.grad, context.grad.T @ observed)
    assert all(parameter.grad.any() for parameter in flow.parameters())


T, V = TypeError, ValueError
MISFITS = {
    "missing": (lambda x, c: (x,), V, "CNF: context is missing; this map is conditioned on one"),
    "too few rows": (lambda x, c: (x, c[:2]), V, r"CNF: context has shape \(2, 3\); wanted \(4, 'features'\)"),
    "one row": (lambda x, c: (x, c[:1]), V, r"CNF: context has shape \(1, 3\); wanted \(4, 'features'\)"),
    "too many dimensions": (lambda x, c: (x, c[None]), V, r"CNF: context has shape \(1, 4, 3\); wanted"),
    "another dtype": (lambda x, c: (x, c.float()), T, "CNF: context has dtype torch.float32, but the parameters are"),
    "whole numbers": (lambda x, c: (x, c.long()), T, "CNF: context has dtype torch.int64; wanted floating point"),
    "a list": (lambda x, c: (x, c.tolist()), T, "CNF: context is a list; wanted a torch.Tensor"),
    "another device": (lambda x, c: (x, c.to("meta")), T, "CNF: context is on meta, but the parameters are on cpu"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_contexts_that_do_not_fit_are_refused(name):
    flow, (call, error, message) = given("concat").double(), MISFITS[name]
    for go in (flow, flow.inverse):
        with pytest.raises(error, match=message):
            go(*call(normal(4, 2), normal(4, 3)))


@pytest.mark.parametrize("ask", [lambda f, *a: f(*a), lambda f, t, z, *c: f.with_products(t, z, None, *c)])
def test_a_field_refuses_contexts_that_do_not_fit(ask):
    field, t, z = field_of(context=3), torch.tensor(0.5, dtype=D), normal(4, 2)
    for context, message in (
        ((), "MLPField: context is missing; this map is conditioned on one"),
        ((normal(4, 2),), r"MLPField: context has shape \(4, 2\); wanted \(4, 3\)"),
        ((normal(5, 3),), r"MLPField: context has shape \(5, 3\); wanted \(4, 'features'\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(field, t, z, *context)
    with pytest.raises(ValueError, match=r"MLPField: context has shape \(4, 2\); wanted \(4, 3\)"):
        CNF(field)(z, normal(4, 2))


def test_a_number_of_features_is_a_number():
    for features in (-1, 1.5, None, "3"):
        with pytest.raises(ValueError, match=f"context is {features!r}; wanted a number of features, 0 for none"):
            MLPField(2, context=features)


def test_a_field_without_a_context_makes_a_flow_without_one():
    flow = CNF(field_of())
    assert not flow.takes_context and not CNF(Field(lambda t, z: z)).takes_context
    for go in (flow, flow.inverse):
        with pytest.raises(ValueError, match="CNF: context was given, but this map takes none"):
            go(normal(4, 2), normal(4, 3))


def test_a_part_of_a_conditional_flow_is_conditional():
    flow, x, context = given("concat").double(), normal(4, 2), normal(4, 3, seed=1)
    parts = Chain(flow.between(0, 0.4), ActNorm(2).double(), flow.between(0.4, 1))
    solve = Solve(tolerance=1e-10)
    torch.testing.assert_close(parts(x, context, solve).logdet, flow(x, context, solve).logdet, rtol=0, atol=1e-8)


# Stages without weight


def linear(d: int = 3, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """The field v = A z, by autograd, and A."""
    matrix = nn.Parameter(normal(d, d, seed=seed))
    return Field(lambda t, z: z @ matrix.T, d, [matrix]), matrix


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize(
    ("method", "of", "rated"),
    [("euler", 1, 1), ("midpoint", 2, 1), ("rk4", 4, 4), ("rk4_38", 4, 4), ("rk6", 7, 4), ("dopri5", 6, 5)],
)
def test_no_divergence_is_found_where_it_has_no_weight(method, of, rated, trace):
    """Of Dormand–Prince's six stages the second has none, of the midpoint rule's two the first, of Butcher's three."""
    field = Counted(field_of())
    for gradient, passes in (("backprop", 1), ("checkpoint", 2)):
        field.plain = field.with_rows = 0
        solve = Solve(method=method, times=uniform_grid(3), trace=trace, gradient=gradient)
        result = CNF(field)(normal(4, 2), solve=solve)
        assert result.evaluations == 3 * of
        result.logdet.sum().backward()
        assert (field.with_rows, field.plain) == (3 * rated * passes, 3 * (of - rated) * passes)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_steps_that_are_chosen_find_the_divergence_at_six_of_seven_stages(trace):
    """The last stage is the first of the next step; its divergence serves the error estimate."""
    field = Counted(field_of())
    result = CNF(field)(normal(4, 2), solve=Solve(trace=trace, tolerance=1e-9))
    tried = result.stats[0].accepted + result.stats[0].rejected
    assert tried > 3 and (field.with_rows, field.plain) == (2 + 5 * tried, tried)


@pytest.mark.parametrize(
    "solve",
    [
        Solve(tolerance=1e-6),
        *(Solve(method=name, times=uniform_grid(3)) for name in ("midpoint", "rk4", "rk6", "dopri5")),
    ],
    ids=["chosen", "midpoint", "rk4", "rk6", "dopri5"],
)
def test_what_is_left_out_changes_no_number(solve):
    """Against all divergences and energies, at every stage; a few numbers are added in another order."""
    field, z, energies = field_of(), normal(4, 2), ("kinetic_energy", "jacobian_energy", "total_derivative")

    def everything(t, z):
        v, rows = Moment(field, t).with_products(z, None)
        speed = jacrev(lambda t: field(t, z))(t) + torch.einsum("knj,nj->nk", rows, v)
        squares = [part.square().flatten(1).sum(1) for part in (v, rows.transpose(0, 1), speed)]
        return v, torch.stack([rows.diagonal(dim1=0, dim2=2).sum(-1), squares[0] / 2, *squares[1:]])

    value, integrals, stats = integrate(everything, z, 0.0, 1.0, solve, rates=4, controlled=1)
    result = CNF(field)(z, solve=Solve(**vars(solve) | {"energies": energies}))
    assert result.evaluations == stats.evaluations and result.stats[0].times == pytest.approx(stats.times, abs=1e-9)
    found = (result.value, torch.stack([result.logdet, *result.penalties.values()]))
    torch.testing.assert_close(found, (value, integrals), rtol=1e-9, atol=1e-9)


# The first number that is not finite


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
@pytest.mark.parametrize(("method", "of"), [("euler", 1), ("midpoint", 2), ("rk4", 4), ("rk6", 7), ("dopri5", 6)])
def test_the_step_of_the_first_nan_is_named_without_another_evaluation(method, of, gradient):
    """Whichever stage it came up in; the states at the steps' ends are known, and tell."""
    for bad in range(5 * of):
        calls = iter(range(100))
        field = Field(lambda t, z, calls=calls, bad=bad: z * math.nan if next(calls) == bad else 0.1 * z, 2)
        solve = Solve(method=method, times=uniform_grid(5), trace="none", gradient=gradient)
        with pytest.raises(SolveError) as failed:
            CNF(field, interval=(0, 5))(torch.ones(3, 2, dtype=D, requires_grad=True), solve=solve)
        # Dormand–Prince's second stage has no weight, but goes into the third
        assert (failed.value.step, failed.value.t) == (bad // of, pytest.approx(bad // of))
        assert field.calls == 5 * of
        assert failed.value.norm == pytest.approx(math.exp(0.1 * (bad // of)), rel=0.05)


def test_a_nan_in_the_divergence_alone_is_found_by_its_step():
    """√|z| has no slope at 0, where the middle point stays."""
    field = Field(lambda t, z: z.abs().sqrt() if t > 2.5 else z, 1)
    with pytest.raises(SolveError) as failed, torch.no_grad():
        CNF(field, interval=(0, 5))(torch.tensor([[1.0], [0.0]]), solve=Solve(method="euler", times=uniform_grid(5)))
    assert (failed.value.step, failed.value.t, field.calls) == (3, 3, 5)


# Standard errors


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [2, 5])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
def test_the_standard_error_is_the_deviation_of_the_estimate(probes, noise, back):
    """Of the same point solved 4000 times, each time with other probes; variances of that many are good to 5 %."""
    flow, n = CNF(redrawn(field_of(3), 1, 0.5), interval=(0, 2)), 4000
    solve = Solve(method="rk4", times=(0, 1), trace="hutchinson", probes=probes, noise=noise, generator=seeded())
    with torch.no_grad():
        result = (flow.inverse if back else flow)(normal(1, 3).expand(n, 3), solve=solve)
        exact = (flow.inverse if back else flow)(normal(1, 3), solve=Solve(method="rk4", times=(0, 1)))
    claimed = result.standard_error.square().mean().sqrt().item()
    assert claimed == pytest.approx(result.logdet.std().item(), rel=0.1) and claimed > 0.01
    assert (result.logdet.mean() - exact.logdet).abs() < 5 * claimed / n**0.5
    assert result.standard_error.std() > 0, "each point has its own"


def test_the_standard_error_is_a_formula_in_the_estimates():
    """Rademacher probes of v = A z in one Euler step: each estimates εᵀAε."""
    field, matrix = linear()
    x, solve = normal(5, 3), Solve(method="euler", times=(0, 1), trace="hutchinson", probes=4, generator=seeded())
    result = CNF(field)(x, solve=solve)
    probes = torch.randint(0, 2, (4, 5, 3), generator=seeded(), dtype=torch.float32).double() * 2 - 1
    single = torch.einsum("kni,ij,knj->kn", probes, matrix, probes)
    torch.testing.assert_close(result.logdet, single.mean(0))
    torch.testing.assert_close(result.standard_error, (single.std(0) / 2).detach())


def test_one_probe_has_no_spread_and_what_is_not_estimated_no_error():
    flow, x = CNF(field_of()), normal(4, 2)
    for probes in (None, 1):
        error = flow(x, solve=Solve(trace="hutchinson", probes=probes, times=(0, 1))).standard_error
        assert error.shape == (4,) and error.isnan().all()
    for solve in (GRID, Solve(trace="none", times=(0, 1)), Solve(trace="none", probes=3, times=(0, 1))):
        assert flow(x, solve=solve).standard_error is None
    exact = Solve(probes=3, energies=("jacobian_energy",), times=(0, 1))
    assert flow(x, solve=exact).standard_error is None, "the probes are the energy's"
    several = Solve(trace="hutchinson", probes=3)
    for finite in (
        ActNorm(2),
        Affine(torch.eye(2)),
        Chain(ActNorm(2), Affine(torch.eye(2))),
        Inverse(Affine(torch.eye(2))),
    ):
        assert redrawn(finite).double()(x, solve=several).standard_error is None


@pytest.mark.parametrize("batch", [(), (0,), (3, 4)], ids=str)
def test_the_standard_error_has_the_shape_of_the_batch_and_no_gradient(batch):
    flow, x = CNF(field_of()), normal(*batch, 2).requires_grad_()
    for gradient in ("backprop", "checkpoint", "adjoint"):
        solve = Solve(trace="hutchinson", probes=3, times=(0, 1), gradient=gradient)
        for go in (flow, flow.inverse, Inverse(flow)):
            error = go(x, solve=solve).standard_error
            assert error.shape == batch and not error.requires_grad and error.isfinite().all()


def test_in_a_chain_the_squares_add_up():
    """The estimates are independent, so their variances do; a layer that estimates nothing adds nothing."""
    first, second = CNF(field_of(3)), CNF(redrawn(MLPField(3, (4,)), 1).double(), interval=(0, 3))
    middle, x = redrawn(Affine(torch.eye(3))).double(), normal(6, 3)
    options = dict(trace="hutchinson", probes=3, times=(0, 1))
    generator = seeded()
    a = first(x, solve=Solve(**options, generator=generator))
    b = middle(a.value)
    c = second.inverse(b.value, solve=Solve(**options, generator=generator))
    whole = Chain(first, middle, Inverse(second))(x, solve=Solve(**options, generator=seeded()))
    torch.testing.assert_close(whole.logdet, a.logdet + b.logdet + c.logdet)
    torch.testing.assert_close(whole.standard_error, (a.standard_error**2 + c.standard_error**2).sqrt())
    assert Chain(middle, first)(x, solve=GRID).standard_error is None
    alone = Chain(middle, first, middle)(x, solve=Solve(**options, generator=seeded())).standard_error
    assert alone.shape == (6,) and alone.isfinite().all()


def test_in_a_chain_the_standard_error_is_the_deviation_still():
    flow, n = Chain(CNF(field_of(3)), Inverse(CNF(field_of(3, time="hyper"), interval=(0, 2)))), 4000
    solve = Solve(method="euler", times=(0, 1), trace="hutchinson", probes=3, generator=seeded())
    with torch.no_grad():
        result = flow(normal(1, 3).expand(n, 3), solve=solve)
    assert result.standard_error.square().mean().sqrt().item() == pytest.approx(result.logdet.std().item(), rel=0.1)


def test_one_probe_is_the_usual_number_of_every_estimate():
    """Also of a finite flow whose log-determinant is estimated."""
    contraction = nn.Linear(2, 2)
    with torch.no_grad():
        contraction.weight.copy_(0.1 * torch.eye(2))
    flow = Chain(Residual(contraction, 2), CNF(MLPField(2, (4,))))
    given, usual = (
        flow(torch.zeros(3, 2), solve=Solve(trace="hutchinson", times=(0, 1), generator=seeded(), **probes)).logdet
        for probes in (dict(probes=1), dict())
    )
    assert given.equal(usual) and usual.isfinite().all()


# The exact trace with an energy that is estimated


@pytest.mark.parametrize("kind", [lambda field: field, Bare], ids=["products", "autograd"])
def test_the_exact_trace_with_an_estimated_energy(kind):
    """Without probes both are exact. With two, the trace still is, and the energy is right on average."""
    flow, x, n = CNF(kind(field_of(3))), normal(1, 3), 4000
    options = dict(method="rk4", times=(0, 1), energies=("jacobian_energy",))

    def squared(t, z):
        jacobian = vmap(jacrev(lambda point: flow.field(t, point[None])[0]))(z)
        return flow.field(t, z), jacobian.square().sum((1, 2))[None]

    with torch.no_grad():
        exact = flow(x, solve=Solve(**options))
        jacobian = integrate(squared, x, 0.0, 1.0, Solve(method="rk4", times=(0, 1)), rates=1)[1]
        torch.testing.assert_close(exact.penalties["jacobian_energy"], jacobian[0])
        result = flow(x.expand(n, 3), solve=Solve(**options, probes=2, generator=seeded()))
    torch.testing.assert_close(result.logdet, exact.logdet.expand(n), rtol=1e-10, atol=1e-10)
    energy = result.penalties["jacobian_energy"]
    assert (energy.mean() - jacobian).abs() < 5 * energy.std() / n**0.5 < 0.2 * jacobian


def test_without_an_energy_the_exact_trace_takes_no_probes_to_the_field():
    field, x = Counted(field_of()), normal(4, 2)
    a, b = (CNF(field)(x, solve=Solve(times=(0, 1), probes=probes)).logdet for probes in (None, 3))
    assert a.equal(b) and field.with_rows == 2 * 5


# The total derivative


class Paced(nn.Module):
    """v = a(t) (A z + b) with a = 1 + cos 3t, by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.shift = nn.Parameter(normal(3, 3) / 2), nn.Parameter(normal(3, seed=1))
        self.event_shape = torch.Size([3])

    def forward(self, t, z):
        return (1 + (3 * t).cos()) * (z @ self.matrix.T + self.shift)


def acceleration_energy(field: Paced, z: torch.Tensor, start: float, end: float) -> torch.Tensor:
    r"""∫ |dv/dt|² dt by the midpoint rule of 2000 points.

    With w = A z + b it is ẇ = a A w, so that w(t) = exp(A ∫ a) w(start) and dv/dt = (ȧ + a² A) w.
    """
    t = start + (end - start) * (torch.arange(2000, dtype=D) + 0.5) / 2000
    lengths = t - start + ((3 * t).sin() - math.sin(3 * start)) / 3
    w = (z @ field.matrix.T + field.shift) @ torch.matrix_exp(lengths[:, None, None] * field.matrix).mT
    pace, change = (part[:, None, None] for part in (1 + (3 * t).cos(), -3 * (3 * t).sin()))
    return (change * w + pace**2 * w @ field.matrix.T).square().sum(-1).mean(0) * (end - start)


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "none"])
def test_the_total_derivative_of_a_linear_field(trace):
    field, x = Paced(), normal(3, 3, seed=2)
    flow, exact = CNF(field, interval=(0.2, 1.4)), acceleration_energy(field, x, 0.2, 1.4)
    solve = Solve(trace=trace, tolerance=1e-9, energies=("total_derivative",))
    there = flow(x, solve=solve)
    torch.testing.assert_close(there.penalties["total_derivative"], exact, rtol=1e-5, atol=0)
    back = flow.inverse(there.value, solve=solve)
    torch.testing.assert_close(back.penalties["total_derivative"], exact, rtol=1e-5, atol=0)
    mean = flow(x, solve=Solve(**vars(solve) | {"reduction": "mean"})).penalties["total_derivative"]
    torch.testing.assert_close(3 * mean, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "none"])
def test_a_straight_path_of_constant_speed_has_no_total_derivative(trace):
    """ż = z / (1 + t) goes along z₀ (1 + t): the field changes with time and place, but not along the path."""
    solve = Solve(trace=trace, tolerance=1e-9, energies=("total_derivative", "kinetic_energy"))
    result = CNF(Field(lambda t, z: z / (1 + t), 2))(normal(4, 2), solve=solve)
    assert result.penalties["total_derivative"].abs().max() < 1e-12
    assert result.penalties["kinetic_energy"].min() > 0.01


def test_a_field_that_stands_still_in_space_or_in_time():
    """One of the two terms alone."""
    x, solve = normal(4, 1), Solve(tolerance=1e-10, energies=("total_derivative",))
    gust = CNF(Field(lambda t, z: (t * t).expand_as(z)))(x, solve=solve).penalties["total_derivative"]
    torch.testing.assert_close(gust, torch.full_like(gust, 4 / 3), rtol=1e-8, atol=0)
    steady = CNF(Field(lambda t, z: z))(x, solve=solve).penalties["total_derivative"]
    torch.testing.assert_close(steady, x[:, 0] ** 2 * (math.exp(2) - 1) / 2, rtol=1e-8, atol=0)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_the_gradient_of_a_loss_with_the_total_derivative(trace, gradient):
    """Against a central difference along one direction through all parameters."""
    flow, x = Flow(Normal(2).double(), CNF(field_of())), normal(5, 2)
    steps = dict(tolerance=1e-8) if gradient == "adjoint" else dict(times=uniform_grid(3))
    solve = Solve(trace=trace, probes=2, gradient=gradient, **steps)
    loss = NegativeLogLikelihood(flow, solve=solve, penalties={"total_derivative": 0.4, "kinetic_energy": 0.1})
    value, terms = loss(x, seeded())
    assert terms["total_derivative"] > 1e-3
    value.backward()
    along = [normal(*parameter.shape, seed=k) for k, parameter in enumerate(flow.parameters())]
    predicted = sum((p.grad * a).sum() for p, a in zip(flow.parameters(), along, strict=True)).item()
    values = []
    for sign in (1, -1):
        moved = copy.deepcopy(loss)
        with torch.no_grad():
            for parameter, direction in zip(moved.parameters(), along, strict=True):
                parameter += sign * 1e-5 * direction
            values.append(moved(x, seeded())[0].item())
    assert predicted == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5) and abs(predicted) > 1e-3


@pytest.mark.parametrize("name", GIVEN)
def test_the_total_derivative_given_a_context(name):
    flow, x, context = given(name).double(), normal(4, 2), normal(4, 3, seed=1)

    def squared(t, z):
        v, rows = Moment(flow.field, t, context).with_products(z, None)
        speed = jacrev(lambda t: flow.field(t, z, context))(t) + torch.einsum("knj,nj->nk", rows, v)
        return v, speed.square().sum(-1)[None]

    _, expected, _ = integrate(squared, x, 0.0, 1.0, GRID, rates=1)
    for trace in ("exact", "none"):
        solve = Solve(times=GRID.times, trace=trace, energies=("total_derivative",))
        torch.testing.assert_close(flow(x, context, solve).penalties["total_derivative"], expected[0])


# Energies by name


def test_the_names_of_energies_are_the_same_in_both_places():
    assert tuple(RATES) == ENERGIES


def test_the_equation_of_a_potential_is_refused_where_there_is_none():
    for field in (field_of(), Bare(field_of())):
        message = (
            f"energies has 'hamilton_jacobi', but {type(field).__name__} is not the gradient of a potential; wanted"
        )
        for trace in ("exact", "hutchinson", "none"):
            with pytest.raises(ValueError, match=message):
                CNF(field)(normal(4, 2), solve=Solve(trace=trace, times=(0, 1), energies=("hamilton_jacobi",)))
        loss = NegativeLogLikelihood(Flow(Normal(2).double(), CNF(field)), penalties={"hamilton_jacobi": 0.1})
        with pytest.raises(ValueError, match=message):
            loss(normal(4, 2))


@pytest.mark.parametrize("trace", ["exact", "hutchinson", "none"])
def test_autocast_changes_no_number(trace):
    flow, x = CNF(redrawn(MLPField(2, (5, 4)))), torch.randn(4, 2, generator=seeded())
    plain, cast = [], []
    for found, on in ((plain, False), (cast, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            result = flow(x, solve=Solve(trace=trace, generator=seeded()))
        found += [result.value, result.logdet]
    torch.testing.assert_close(cast, plain, rtol=0, atol=0, equal_nan=True)


def test_a_trace_without_a_graph_is_not_given_out_where_there_is_to_be_one():
    field, z = redrawn(MLPField(3, (5, 4))).double(), normal(4, 3)
    (moment,) = field.moments(torch.zeros(1, dtype=D))
    with torch.no_grad():
        moment.with_trace(z)
    found = []
    for one in (moment, field.moments(torch.zeros(1, dtype=D))[0]):
        found.append(torch.autograd.grad(one.with_trace(z)[1].sum(), field.layers[1].weight))
    torch.testing.assert_close(*found)
