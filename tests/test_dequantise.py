"""Dequantisation: the bound that it gives, against probabilities that are known."""

import math

import pytest
import torch
from builders import seeded, two_moons_flow
from hypothesis import given, settings
from hypothesis import strategies as st

from cnfkit import (
    Chain,
    Dequantised,
    Diagonal,
    Flow,
    Logit,
    NegativeLogLikelihood,
    Normal,
    Uniform,
    UniformDequantiser,
    bits_per_dimension,
)


def logistic_model(levels: int = 5) -> Dequantised:
    """Levels whose probabilities are differences of the normal distribution function."""
    return Dequantised(
        Flow(Normal(1), Chain(Logit(1), Diagonal(1, log_scale=0.7, shift=-0.5))), UniformDequantiser(levels)
    )


def exact_log_prob(model: Dequantised) -> torch.Tensor:
    levels = model.dequantiser.levels
    edges = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    inner = torch.logit(edges[1:-1]) * math.exp(0.7) - 0.5
    cdf = torch.cat([torch.zeros(1), torch.special.ndtr(inner), torch.ones(1)])
    return cdf.diff().log()


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
@pytest.mark.parametrize("shape", [(4,), (1, 8, 8)])
def test_uniform_noise_costs_the_bits_of_its_levels(levels, shape):
    """The model that knows nothing needs log₂ L bits a coordinate: what every bits/dim is measured from."""
    model = Dequantised(Flow(Uniform(shape), Diagonal(shape)), UniformDequantiser(levels))
    k = torch.randint(levels, (6, *shape), generator=seeded())
    bits = bits_per_dimension(model.log_prob(k, draws=3), math.prod(shape))
    assert bits.tolist() == pytest.approx([math.log2(levels)] * 6, rel=1e-6)
    loss, _ = NegativeLogLikelihood(model, unit="bits")(k)
    assert loss.item() == pytest.approx(math.log2(levels), rel=1e-6)


def test_bound_rises_with_draws_to_the_log_probability():
    """Jensen: E log(mean of m weights) rises with m. Each step by five standard errors of the paired differences."""
    model, exact = logistic_model().double(), exact_log_prob(logistic_model())
    assert exact.exp().sum().item() == pytest.approx(1)
    k = torch.arange(5).repeat(4000).unsqueeze(-1)
    with torch.no_grad():
        bounds = {m: model.log_prob(k, draws=m, generator=seeded(m)) for m in (1, 4, 16)}
        many = model.log_prob(torch.arange(5).unsqueeze(-1), draws=4000, generator=seeded())
    for fewer, more in ((1, 4), (4, 16)):
        gain = bounds[more] - bounds[fewer]
        assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))
    gap = exact.repeat(4000) - bounds[16]
    assert gap.mean() > 5 * gap.std() / math.sqrt(len(gap)), "16 draws are still a bound"
    torch.testing.assert_close(many, exact, atol=0.05, rtol=0)


def test_samples_are_levels_as_often_as_they_are_probable():
    """Pearson's χ² of one seeded draw: 4 degrees of freedom, beyond 18.5 once in a thousand."""
    model = logistic_model()
    k = model.sample(20_000, generator=seeded())
    assert k.shape == (20_000, 1) and k.dtype == torch.int64 and 0 <= k.min() and k.max() <= 4
    expected = exact_log_prob(model).exp() * len(k)
    counts = torch.bincount(k.flatten(), minlength=5)
    assert ((counts - expected).square() / expected).sum() < 18.5
    assert model.sample(9, generator=seeded(1)).equal(model.sample(9, generator=seeded(1)))


def test_samples_outside_the_cube_go_to_the_nearest_level():
    model = Dequantised(two_moons_flow(), UniformDequantiser(3))
    k = model.sample(500, generator=seeded())
    assert not k.requires_grad and set(k.unique().tolist()) == {0, 1, 2}


@settings(deadline=None, derandomize=True, max_examples=30)
@given(levels=st.integers(2, 70_000), dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]), data=st.data())
def test_dequantised_points_lie_in_their_cells(levels, dtype, data):
    top = min(levels, torch.iinfo(dtype).max + 1)
    k = torch.tensor(data.draw(st.lists(st.integers(0, top - 1), min_size=1, max_size=9)), dtype=dtype)[None]
    dequantiser = UniformDequantiser(levels).double()
    y, log_q = dequantiser(k, seeded())
    assert (y >= k.double() / levels).all() and (y < (k.double() + 1) / levels).all()
    assert dequantiser.quantise(y).equal(k.long())
    assert log_q.tolist() == pytest.approx([k.numel() * math.log(levels)])


@pytest.mark.parametrize("levels", [2, 3, 17, 256, 65_536])
@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24], ids=["least", "middle", "greatest"])
def test_the_unit_interval_is_open_above_even_at_extreme_draws(monkeypatch, levels, draw):
    """In float32, 255 + u rounds to 256 where u is the greatest number that torch.rand gives."""
    monkeypatch.setattr(torch, "rand", lambda shape, *, generator, dtype, device: torch.full(shape, draw, dtype=dtype))
    k = torch.tensor([[0, levels // 2, levels - 1]])
    y, _ = UniformDequantiser(levels)(k)
    assert y.dtype == torch.float32 and (y >= 0).all() and (y < 1).all()
    assert (y - (k + draw) / levels).abs().max() < 1e-6


def test_noise_is_a_function_of_the_generator():
    k, dequantiser = torch.zeros(3, 2, dtype=torch.uint8), UniformDequantiser(4)
    assert dequantiser(k, seeded())[0].equal(dequantiser(k, seeded())[0])
    assert not dequantiser(k, seeded())[0].equal(dequantiser(k, seeded(1))[0])


def test_bits_per_dimension_by_hand():
    """A point of 2 coordinates with probability 1/64 has 6 bits, 3 per coordinate."""
    assert bits_per_dimension(torch.tensor([math.log(1 / 64), 0.0]), 2).tolist() == pytest.approx([3.0, 0.0])


@pytest.mark.parametrize(("unit", "expected"), [("nats", 2 * math.log(4)), ("bits", 2.0)])
def test_loss_units(unit, expected):
    loss = NegativeLogLikelihood(Flow(Uniform(2), Diagonal(2, log_scale=-math.log(4))), unit)
    value, terms = loss(torch.ones(3, 2))
    assert value.item() == terms["nll"].item() == pytest.approx(expected)
    assert value.requires_grad and not terms["nll"].requires_grad


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_most_extreme_draws_stay_in_their_cell(monkeypatch, levels, extreme):
    """A draw of exactly 0 would be black beyond what a logit takes; rounding could carry one into the next cell."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, extreme))
    k = torch.arange(levels)[None]
    dequantiser = UniformDequantiser(levels)
    y, _ = dequantiser(k)
    assert torch.equal(dequantiser.quantise(y), k)
    assert (0 < y).all() and (y < 1).all()
