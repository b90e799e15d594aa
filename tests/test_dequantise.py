"""Dequantisation: the bound that it gives, against probabilities that are known."""

import math

import pytest
import torch
from builders import redrawn, seeded, two_moons_flow
from hypothesis import given, settings
from hypothesis import strategies as st

from cnfkit import (
    CNF,
    MLP,
    Affine,
    AffineCoupling,
    Beta,
    Chain,
    ConvNet,
    Dequantised,
    Dequantiser,
    Diagonal,
    Flatten,
    Flow,
    Logit,
    MLPField,
    NegativeLogLikelihood,
    Normal,
    Solve,
    Uniform,
    UniformDequantiser,
    VariationalDequantiser,
    bits_per_dimension,
    evaluate,
    load,
    mask,
    save,
    uniform_grid,
)
from cnfkit.noise import PointNoise


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


class Middle(Dequantiser):
    """No noise at all, so that draws differ in their probes alone."""

    def _noise(self, k, generator):
        return torch.full(k.shape, 0.5), torch.zeros(len(k))


@pytest.mark.parametrize("noise", [seeded(), PointNoise(0, range(6))])
def test_draws_share_their_probes(noise):
    """Noise of their own would be taken for weights that differ: its exponentials have a mean above one."""
    flow = Flow(Normal(2), CNF(redrawn(MLPField(2, (8,)))))
    k, solve = torch.randint(4, (6, 2), generator=seeded()), Solve(trace="hutchinson").on(uniform_grid(2))
    model = Dequantised(flow, Middle(4))
    weights, _ = model.log_weights(k, solve=solve, draws=3, generator=noise)
    assert weights[1:].equal(weights[:1].expand(2, 6))
    assert not model.log_weights(k, solve=solve, draws=3, generator=noise)[0].equal(weights), "but not of all calls"
    torch.testing.assert_close(model.log_weights(k)[0], flow.log_prob((k + 0.5) / 4)[None] - 2 * math.log(4))


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


# Noise that knows its cell

LEVELS = 3
GRID = torch.cartesian_prod(torch.arange(LEVELS), torch.arange(LEVELS))  # every discrete point there is
EVEN = mask("even", 2)


def correlated() -> Flow:
    """A density on the unit square that is steep within each of its nine cells."""
    matrix = torch.tensor([[1.0, 0.0], [-1.0, 1.2]], dtype=torch.float64)
    flow = Flow(Normal(2).double(), Chain(Logit(2), Affine(matrix, torch.tensor([0.6, 0.2], dtype=torch.float64))))
    return flow.requires_grad_(False)


def log_probabilities(flow: Flow, fine: int = 150) -> torch.Tensor:
    """Of the nine points, by the midpoint rule in each cell."""
    line = (torch.arange(LEVELS * fine, dtype=torch.float64) + 0.5) / (LEVELS * fine)
    density = flow.log_prob(torch.cartesian_prod(line, line)).exp().view(LEVELS, fine, LEVELS, fine)
    return density.mean((1, 3)).flatten().log() - 2 * math.log(LEVELS)


def noise_flow(seed: int = 0, scale: float = 0.5) -> Flow:
    """Near the uniform one at the start: its tails must not be lighter than the density's, which it divides."""
    couplings = [AffineCoupling(m, MLP(2, 4, (16,), context=2)) for m in (EVEN, ~EVEN)]
    layers = [Diagonal(2, log_scale=-0.6), *[redrawn(layer, seed, scale) for layer in couplings]]
    return Flow(Normal(2), Chain(Logit(2), *layers)).double()


def bounds(model: Dequantised, draws: int = 1, n: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
    """The bound of each of the nine points, and its standard error."""
    with torch.no_grad():
        bound = model.log_prob(GRID.repeat(n, 1), draws=draws, generator=seeded(7)).view(n, -1)
    return bound.mean(0), bound.std(0) / math.sqrt(n)


class SplitDequantiser(Dequantiser):
    """A dequantiser of one's own: noise from Beta(2, 3), whatever the level."""

    def __init__(self, levels: int) -> None:
        super().__init__(levels)
        self.base = Beta(2, 2.0, 3.0)

    def _noise(self, k, generator):
        noise = self.base.sample(len(k), generator)
        return noise, self.base.log_prob(noise)


DEQUANTISERS = {
    "uniform": lambda: UniformDequantiser(LEVELS).double(),
    "variational": lambda: VariationalDequantiser(LEVELS, noise_flow(scale=0.3)),
    "one's own": lambda: SplitDequantiser(LEVELS).double(),
}


def deviation(dequantiser: Dequantiser) -> float:
    """How far the mean of p(y) / q(y | k) is from P(k), in its standard errors: the worst of the nine points."""
    flow, n = correlated(), 4000
    with torch.no_grad():
        weights = Dequantised(flow, dequantiser).log_prob(GRID.repeat(n, 1), generator=seeded()).exp().view(n, -1)
    error = (weights.mean(0) - log_probabilities(flow).exp()).abs()
    return (error / (weights.std(0) / math.sqrt(n))).max().item()


@pytest.mark.parametrize("name", DEQUANTISERS)
def test_weights_are_the_probability_in_the_mean(name):
    """E[p(y) / q(y | k)] = P(k), whatever q is: that is what makes every mean of logarithms a bound."""
    assert log_probabilities(correlated()).exp().sum().item() == pytest.approx(1, abs=1e-3)
    assert deviation(DEQUANTISERS[name]()) < 4.5


class ForgetsItsDensity(VariationalDequantiser):
    def _noise(self, k, generator):
        noise, log_q = super()._noise(k, generator)
        return noise, 0 * log_q


class WrongSign(VariationalDequantiser):
    def _noise(self, k, generator):
        noise, log_q = super()._noise(k, generator)
        return noise, -log_q


class ForgetsTheLevels(SplitDequantiser):
    def forward(self, k, generator=None):
        y, log_q = super().forward(k, generator)
        return y, log_q - k[0].numel() * math.log(self.levels)


class LevelsOfOneCoordinate(SplitDequantiser):
    def forward(self, k, generator=None):
        y, log_q = super().forward(k, generator)
        return y, log_q - math.log(self.levels)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: ForgetsItsDensity(LEVELS, noise_flow(scale=0.3)),
        lambda: WrongSign(LEVELS, noise_flow(scale=0.3)),
        lambda: ForgetsTheLevels(LEVELS).double(),
        lambda: LevelsOfOneCoordinate(LEVELS).double(),
    ],
    ids=["density", "sign", "levels", "coordinate"],
)
def test_a_broken_dequantiser_is_noticed(broken):
    assert deviation(broken()) > 10


@pytest.mark.parametrize("name", DEQUANTISERS)
def test_every_dequantiser_stays_in_the_cell(name):
    dequantiser, k = DEQUANTISERS[name](), GRID.repeat(300, 1)
    y, log_q = dequantiser(k, seeded())
    assert dequantiser.quantise(y).equal(k) and y.dtype == log_q.dtype == torch.float64
    assert y.shape == k.shape and log_q.shape == k.shape[:1]
    assert dequantiser(k, seeded())[0].equal(y) and not dequantiser(k, seeded(1))[0].equal(y)
    assert not dequantiser(k)[0].equal(dequantiser(k)[0])


def test_variational_noise_is_the_flows_given_the_levels():
    """log q(y | k) = d log L + log p(u; k), with levels 0, 1, 2 as the numbers -1, 0, 1."""
    dequantiser = VariationalDequantiser(LEVELS, noise_flow())
    y, log_q = dequantiser(GRID, seeded())
    u = y * LEVELS - GRID
    expected = dequantiser.flow.log_prob(u, (GRID - 1).double()) + 2 * math.log(LEVELS)
    torch.testing.assert_close(log_q, expected)
    same_noise, _ = dequantiser.flow.rsample_and_log_prob(context=(GRID - 1).double(), generator=seeded())
    torch.testing.assert_close(u, same_noise)
    assert (u[:, None] - u).abs().sum(-1)[~torch.eye(9, dtype=torch.bool)].min() > 1e-3, "every cell its own place"


@pytest.mark.parametrize("levels", [2, 17, 256, 65_536])
def test_variational_noise_stays_in_its_cell_in_float32(levels):
    """A flow that is sure of one edge of the cell: its noise rounds to 0 or 1."""
    for shift in (-40.0, 40.0):
        flow = noise_flow().float()
        flow.bijection = Chain(*flow.bijection, Diagonal(2, shift=shift))
        dequantiser, k = VariationalDequantiser(levels, flow), torch.tensor([[0, levels // 2], [levels - 1, 1]])
        y, log_q = dequantiser(k, seeded())
        assert dequantiser.quantise(y).equal(k) and (0 < y).all() and (y < 1).all() and log_q.isfinite().all()


def test_training_the_noise_alone_tightens_the_bound():
    """The model is fixed and log P known. Uniform noise < trained noise < log P; more draws come nearer still."""
    flow, exact = correlated(), log_probabilities(correlated())
    dequantiser = VariationalDequantiser(LEVELS, noise_flow(scale=0.0))
    model = Dequantised(flow, dequantiser)
    untrained, _ = bounds(model)
    optimiser = torch.optim.Adam(dequantiser.parameters(), lr=0.02)
    k = GRID.repeat(20, 1)
    for step in range(100):
        optimiser.zero_grad()
        loss, _ = NegativeLogLikelihood(model)(k, generator=seeded(step))
        loss.backward()
        optimiser.step()
    uniform, uniform_error = bounds(Dequantised(flow, UniformDequantiser(LEVELS).double()))
    trained, error = bounds(model)
    many, many_error = bounds(model, draws=10)
    for bound, its_error in ((uniform, uniform_error), (trained, error), (many, many_error)):
        assert (bound < exact + 4.5 * its_error).all(), "a bound"
    gaps = [(exact - bound).mean().item() for bound in (untrained, uniform, trained, many)]
    assert gaps[0] > 1 and gaps[1] > 1 and gaps[2] < 0.15 and gaps[3] < 0.5 * gaps[2], gaps


def test_gradients_reach_the_noise_and_the_model():
    model = Dequantised(Flow(Normal(2), Chain(Logit(2), Diagonal(2))), VariationalDequantiser(4, noise_flow().float()))
    model.log_prob(torch.tensor([[0, 3], [2, 1]]), draws=2, generator=seeded()).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing and all(p.grad.any() for p in model.dequantiser.parameters())


def test_the_noise_of_images_sees_the_image():
    """A flow of images whose net is given the levels as an image."""
    shape = (1, 8, 8)
    board = mask("checkerboard", shape)
    couplings = [AffineCoupling(m, ConvNet(1, 2, 6, context=shape)) for m in (board, ~board)]
    noise = redrawn(Flow(Normal(shape), Chain(Logit(shape), *couplings)))
    model = Dequantised(Flow(Normal(64), Chain(Logit(shape, 0.05), Flatten(shape))), VariationalDequantiser(4, noise))
    k = torch.randint(4, (5, *shape), generator=seeded())
    y, log_q = model.dequantiser(k, seeded())
    assert model.dequantiser.quantise(y).equal(k) and log_q.shape == (5,)
    changed = k.clone()
    changed[0, 0, 0, 0] = (k[0, 0, 0, 0] + 2) % 4
    moved = ((model.dequantiser(changed, seeded())[0] * 4 - changed) - (y * 4 - k)).abs() > 1e-6
    near = torch.zeros(8, 8, dtype=torch.bool)
    near[:5, :5] = True  # two layers of couplings, each with two convolutions of reach 1
    assert moved[0, 0].any() and not (moved[0, 0] & ~near).any() and not moved[1:].any()
    assert model.sample(3, generator=seeded()).shape == (3, *shape)


def test_a_model_with_variational_noise_is_saved_evaluated_and_loaded(tmp_path):
    model, other = (Dequantised(correlated(), VariationalDequantiser(LEVELS, noise_flow(seed, 0.1))) for seed in (0, 1))
    save(tmp_path / "model.safetensors", model)
    load(tmp_path / "model.safetensors", other)
    expected = model.log_prob(GRID, generator=seeded())
    assert other.log_prob(GRID, generator=seeded()).equal(expected)
    bits = evaluate(model, GRID.repeat(1000, 1)).nll
    assert bits == pytest.approx(-bounds(model)[0].mean().item() / (2 * math.log(2)), rel=0.05)


def test_levels_given_a_context():
    """Densities and samples of levels can be conditioned: here the second half is told to be bright."""
    coupling = redrawn(AffineCoupling(EVEN, MLP(2, 4, (8,), context=1)), scale=0.5)
    model = Dequantised(Flow(Normal(2), Chain(Logit(2), coupling)), UniformDequantiser(4))
    context = torch.tensor([[-3.0], [3.0]])
    k = model.sample(4000, context=context, generator=seeded())
    assert k.shape == (4000, 2, 2) and k.dtype == torch.int64
    points = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    for row in range(2):
        with torch.no_grad():
            log_prob = model.log_prob(points, context[row].expand(16, 1), draws=400, generator=seeded())
        counts = torch.bincount(4 * k[:, row, 0] + k[:, row, 1], minlength=16)
        torch.testing.assert_close(log_prob.exp(), counts / 4000, atol=0.02, rtol=0)
    one, other = (torch.bincount(k[:, row, 1], minlength=4) for row in range(2))
    assert (one - other).abs().max() > 400, "a context that matters"
