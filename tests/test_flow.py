"""Flows: densities against closed forms, sampling, dtypes, and what can be done with the object."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from builders import NoFloat64, image_bijection, redrawn, seeded, two_moons_flow
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, multivariate_normal
from torch.distributions import MultivariateNormal

from cnfkit import (
    CNF,
    ActNorm,
    Affine,
    Arcsinh,
    Bijection,
    Chain,
    Dequantised,
    Diagonal,
    Flow,
    Logit,
    Multiscale,
    NegativeLogLikelihood,
    Normal,
    Result,
    Solve,
    Squeeze,
    Standardize,
    Uniform,
    UniformDequantiser,
    ffjord,
    realnvp,
    residual,
)
from cnfkit.bijections.base import as_double


def image_flow() -> Flow:
    standard = Standardize(torch.zeros(1, 8, 8), torch.full((1, 8, 8), 2.0))
    return Flow(Normal(64), Chain(Logit((1, 8, 8), alpha=0.05), standard, image_bijection()))


FLOWS = {
    "two moons": two_moons_flow,
    "affine": lambda: redrawn(Flow(Normal(3), Affine(torch.eye(3)))),
    "without parameters": lambda: Flow(Normal(2), Arcsinh(2)),
    "images": image_flow,
}


@pytest.fixture(params=FLOWS)
def flow(request) -> Flow:
    return FLOWS[request.param]()


# Closed forms


@settings(deadline=None, derandomize=True, max_examples=15)
@given(d=st.integers(1, 5), seed=st.integers(0, 1000))
def test_affine_flow_is_the_multivariate_normal(d, seed):
    """x = A⁻¹(z − b) has mean −A⁻¹b and covariance A⁻¹A⁻ᵀ."""
    generator = seeded(seed)
    a = torch.randn(d, d, generator=generator, dtype=torch.float64) + 3 * torch.eye(d, dtype=torch.float64)
    b, x = torch.randn(d, generator=generator).double(), torch.randn(7, d, generator=generator).double()
    flow = Flow(Normal(d).double(), Affine(a, b))
    inverse = torch.linalg.inv(a)
    mean, covariance = -inverse @ b, inverse @ inverse.T
    measured = flow.log_prob(x).detach()
    torch.testing.assert_close(measured, MultivariateNormal(mean, covariance).log_prob(x))
    reference = multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(x.numpy())
    torch.testing.assert_close(measured, torch.from_numpy(reference).double())


def test_cube_scaled_by_two_has_density_one_eighth():
    flow = Flow(Uniform(3), Diagonal(3, log_scale=-math.log(2)))
    inside, outside = torch.full((1, 3), 1.9), torch.tensor([[1.0, 1.0, 2.1]])
    assert flow.log_prob(inside).exp().item() == pytest.approx(1 / 8)
    assert flow.log_prob(outside).exp().item() == 0
    samples = flow.sample(1000, generator=seeded())
    assert samples.min() >= 0 and 1.9 < samples.max() <= 2


def test_standardised_flow_speaks_in_the_units_of_the_data():
    """Micrometres or metres: the density changes by exactly the unit, the flow does not."""
    x = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    metres = Flow(Normal(2).double(), Standardize.of(x))
    micrometres = Flow(Normal(2).double(), Standardize.of(1e6 * x))
    torch.testing.assert_close(micrometres.log_prob(1e6 * x) + 2 * math.log(1e6), metres.log_prob(x))


@pytest.mark.parametrize(("base", "cdf"), [(Normal, "norm"), (Uniform, "uniform")])
def test_bases_are_what_they_say(base, cdf):
    """Kolmogorov and Smirnov's test of one seeded draw; a false alarm has probability 0.001, and happens never."""
    draw = base(2).sample(5000, generator=seeded())
    assert kstest(draw.flatten().numpy(), cdf).pvalue > 0.001
    assert abs(torch.corrcoef(draw.T)[0, 1]) < 3 / math.sqrt(5000)


def test_uniform_base_gives_nan_no_density():
    assert Uniform(2).log_prob(torch.tensor([[0.0, 1.0], [0.5, math.nan]])).tolist() == [0.0, -math.inf]


# Sampling


@pytest.mark.parametrize(("n", "batch"), [((), ()), (3, (3,)), ((2, 3), (2, 3)), ([4], (4,)), (0, (0,)), ((), ())])
def test_shapes_are_those_of_torch_distributions(flow, n, batch):
    reference = torch.distributions.Normal(torch.zeros(()), 1.0).sample(torch.Size([n] if isinstance(n, int) else n))
    assert reference.shape == batch
    for draw in (flow.sample(n), flow.rsample(n)):
        assert draw.shape == (*batch, *flow.event_shape)
    for points, log_prob in (flow.sample_and_log_prob(n), flow.rsample_and_log_prob(n)):
        assert points.shape == (*batch, *flow.event_shape) and log_prob.shape == batch
    assert flow.log_prob(points).shape == batch


def test_samples_are_a_function_of_the_generator(flow):
    state = torch.get_rng_state()
    first, again, other = (flow.sample(5, generator=seeded(seed)) for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    assert torch.get_rng_state().equal(state), "a generator was given, so the global one is left alone"
    together, _ = flow.sample_and_log_prob(5, generator=seeded(0))
    assert together.equal(first) and flow.rsample(5, generator=seeded(0)).equal(first)


def test_samples_without_a_generator_follow_the_global_seed(flow):
    torch.manual_seed(3)
    first = flow.sample(4)
    torch.manual_seed(3)
    assert flow.sample(4).equal(first) and not flow.sample(4).equal(first)


def test_one_pass_gives_the_density_of_its_samples(flow):
    flow = flow.double()
    points, log_prob = flow.sample_and_log_prob(6, generator=seeded())
    torch.testing.assert_close(log_prob, flow.log_prob(points).detach())


@pytest.mark.parametrize("name", ["two moons", "affine", "images"])
def test_rsample_has_gradients_and_sample_has_none(name):
    flow = FLOWS[name]()
    assert not any(t.requires_grad for t in (flow.sample(2), *flow.sample_and_log_prob(2)))
    points, log_prob = flow.rsample_and_log_prob(4)
    (points.square().sum() + log_prob.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_gradient_of_rsample_is_that_of_finite_differences():
    """What a VAE's posterior rests on: d E[x²] / ds for x = e⁻ˢ z."""
    flow = Flow(Normal(1).double(), Diagonal(1, log_scale=torch.tensor(0.3, dtype=torch.float64)))

    def moment():
        return flow.rsample(1000, generator=seeded()).square().mean()

    moment().backward()
    gradient, h = flow.bijection.log_scale.grad.item(), 1e-5
    with torch.no_grad():
        values = []
        for value in (0.3 + h, 0.3 - h):
            flow.bijection.log_scale.fill_(value)
            values.append(moment().item())
    assert gradient == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def test_forward_gives_the_latent_and_its_log_determinant(flow):
    x = flow.sample(3, generator=seeded())
    result = flow(x)
    assert result.value.shape == (3, *flow.base.event_shape)
    torch.testing.assert_close(flow.base.log_prob(result.value) + result.logdet, flow.log_prob(x))


# Dtypes


def test_float32_stays_float32(flow):
    x = flow.sample(4, generator=seeded())
    with NoFloat64():
        loss, _ = NegativeLogLikelihood(flow, unit="bits")(x)
        if loss.requires_grad:
            loss.backward()
            torch.optim.Adam(flow.parameters()).step()
        flow.sample_and_log_prob(3, generator=seeded())


def test_dequantised_float32_stays_float32():
    model = Dequantised(image_flow(), UniformDequantiser(17))
    with NoFloat64():
        NegativeLogLikelihood(model, unit="bits")(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))[0].backward()
        model.log_prob(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), draws=3)
        model.sample(2)


def test_initialising_float32_stays_float32():
    with NoFloat64():
        ActNorm(2).initialize(torch.randn(9, 2))
        Standardize.of(torch.randn(9, 2))


def test_the_float64_alarm_rings():
    with pytest.raises(AssertionError, match="made a float64"), NoFloat64():
        torch.zeros(2).double()


def test_float64_works_and_is_more_exact(flow):
    wide = copy.deepcopy(flow).double()
    x = wide.sample(6, generator=seeded())
    assert x.dtype == wide.log_prob(x).dtype == torch.float64
    torch.testing.assert_close(flow.log_prob(x.float()).double(), wide.log_prob(x), rtol=1e-3, atol=1e-2)
    assert not flow.log_prob(x.float()).double().equal(wide.log_prob(x))


def test_default_dtype_is_respected():
    torch.set_default_dtype(torch.float64)
    try:
        flow = Flow(Normal(2), Diagonal(2, log_scale=0.5))
        assert flow.log_prob(flow.sample(3)).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


# The object


def test_state_dict_round_trip_gives_the_same_bits(flow):
    other = copy.deepcopy(flow)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.add_(1.0)
    other.load_state_dict(flow.state_dict())
    x = flow.sample(5, generator=seeded())
    assert other.log_prob(x).equal(flow.log_prob(x)) and other.sample(5, generator=seeded()).equal(x)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))], ids=["copy", "pickle"]
)
def test_copies_give_the_same_bits_and_share_nothing(flow, copied):
    other, x = copied(flow), flow.sample(5, generator=seeded())
    expected = flow.log_prob(x)
    assert other.log_prob(x).equal(expected) and other.sample(5, generator=seeded()).equal(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert flow.log_prob(x).equal(expected)


def test_the_base_adds_nothing_to_the_state():
    assert set(Flow(Normal(2), Diagonal(2)).state_dict()) == {"bijection.log_scale", "bijection.shift"}


def test_a_double_of_a_flow_without_saved_state(monkeypatch):
    """What no file holds says, too, where the flow is; a device without float64 is played by a name."""
    flow, moved = Flow(Normal(2), Arcsinh(2)), []
    assert not flow.state_dict() and as_double(flow).sample().dtype == torch.float64
    monkeypatch.setattr(Flow, "buffers", lambda self: iter([SimpleNamespace(device=torch.device("mps"))]))
    monkeypatch.setattr(Flow, "to", lambda self, device: moved.append(device) or self)
    as_double(flow)
    assert moved == ["cpu"]


def test_repr_shows_base_and_map():
    assert repr(Flow(Normal(2), Arcsinh(2))).splitlines() == [
        "Flow(",
        "  (base): Normal((2,))",
        "  (bijection): Arcsinh((2,))",
        ")",
    ]


class Towards(Bijection):
    """Moves points to where the context says: the smallest conditional map."""

    takes_context = True

    def _forward(self, x, context, solve):
        return Result(x - context, x.new_zeros(x.shape[:-1]))

    def _inverse(self, z, context, solve):
        return Result(z + context, z.new_zeros(z.shape[:-1]))


def test_each_row_of_a_context_gets_its_own_samples():
    flow, context = Flow(Normal(2), Towards(2)), 100.0 * torch.arange(5)[:, None].expand(5, 2)
    one = flow.sample(context=context, generator=seeded())
    many, log_prob = flow.sample_and_log_prob((3, 4), context, generator=seeded())
    assert one.shape == (5, 2) and many.shape == (3, 4, 5, 2) and log_prob.shape == (3, 4, 5)
    assert ((many - context).abs() < 6).all()
    assert len((one - context).flatten().unique()) == 10, "the same noise for every row"
    torch.testing.assert_close(flow.log_prob(one, context), Normal(2).log_prob(one - context))


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, ValueError, "context is missing"),
        (torch.zeros(4, 2), ValueError, r"context has shape \(4, 2\); wanted \(5, 'features'\)"),
        (torch.zeros(5, 2).double(), TypeError, "context has dtype torch.float64"),
        ([0.0, 0.0], TypeError, "context is a list"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(context, error, message):
    with pytest.raises(error, match=message):
        Flow(Normal(2), Chain(Towards(2), Diagonal(2, log_scale=1.0))).log_prob(torch.zeros(5, 2), context)


def test_a_flow_is_of_one_dtype():
    with pytest.raises(TypeError, match=r"bijection.mean is torch.float64 on cpu, but base.like is torch.float32"):
        Flow(Normal(2), Standardize(torch.zeros(2).double(), torch.ones(2).double()))


def test_a_slice_of_a_chain_is_a_chain():
    chain, x = two_moons_flow().bijection, torch.randn(3, 2, generator=seeded())
    torch.testing.assert_close(chain[2:](chain[:2](x).value).value, chain(x).value)


def test_densities_can_be_traced_and_mapped():
    """Looking at values would break the graph, so it is left out there."""
    flow, x = two_moons_flow(), torch.randn(4, 2, generator=seeded())
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), flow.log_prob(x))
    torch.testing.assert_close(torch.func.vmap(flow.log_prob)(x), flow.log_prob(x))
    assert copy.deepcopy(flow).to("meta").log_prob(x.to("meta")).shape == (4,)


def test_log_prob_takes_the_context_that_the_samples_were_drawn_with():
    flow, rows = realnvp(2, layers=2, context=3), torch.randn(4, 3, generator=seeded())
    redrawn(flow, scale=0.3)
    samples = flow.sample((5, 6), context=rows, generator=seeded())
    given_once = flow.log_prob(samples, context=rows)
    assert given_once.equal(flow.log_prob(samples, context=rows.expand(5, 6, 4, 3)))
    assert flow.log_prob(samples, context=rows[:1]).shape == (5, 6, 4)
    with pytest.raises(ValueError, match=r"context has shape \(3, 3\); wanted \(5, 6, 4, 'features'\)"):
        flow.log_prob(samples, context=rows[:3])


def test_a_flow_initialises_its_layers_without_the_cost_of_a_determinant():
    flow = residual(2, layers=2, hidden=(8,))
    x = 3 + 2 * torch.randn(200, 2, generator=seeded())
    flow.initialize(x)
    z = flow.bijection(x, solve=Solve(trace="none")).value
    torch.testing.assert_close(z.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(2))


def test_initialize_reaches_every_layer_and_starts_it_from_its_own_input():
    stage = Chain(ActNorm((1, 4, 4)), Squeeze((1, 4, 4)), ActNorm((4, 2, 2)))
    bijection = Multiscale(stage, ActNorm((2, 2, 2)))
    bijection.initialize(3 + 2 * torch.randn(500, 1, 4, 4, generator=seeded()))
    z = bijection(3 + 2 * torch.randn(500, 1, 4, 4, generator=seeded())).value
    torch.testing.assert_close(z.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_the_network_of_rnode_for_mnist():
    """800 636 parameters, ten CNFs, 784 latent numbers."""
    flow = ffjord((1, 28, 28), scales=3, alpha=1e-5)
    assert sum(p.numel() for p in flow.parameters()) == 800_636
    shapes = [tuple(part.event_shape) for part in flow.modules() if isinstance(part, CNF)]
    assert shapes == [(1, 28, 28)] * 2 + [(4, 14, 14)] * 2 + [(2, 14, 14)] * 2 + [(8, 7, 7)] * 2 + [(4, 7, 7)] * 2
    assert flow.base.event_shape == (784,)
