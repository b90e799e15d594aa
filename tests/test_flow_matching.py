"""Flow matching: the field that minimises it is known for Gaussians, and the best pairing for few points."""

import math
import re
from itertools import permutations

import pytest
import torch
from builders import Conditional, Counted, Field, redrawn, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cnfkit import (
    CNF,
    ActNorm,
    Chain,
    Dequantised,
    Diagonal,
    Flow,
    Inverse,
    Logit,
    Multiscale,
    NegativeLogLikelihood,
    Normal,
    NormalMixture,
    Permutation,
    Solve,
    Squeeze,
    Standardize,
    Uniform,
    UniformDequantiser,
    evaluate,
    fit,
    toy_density,
    uniform_grid,
)
from cnfkit.flow_matching import FlowMatching, optimal_pairing

INTERVAL = (0.5, 2.5)  # neither from 0 nor of length 1: a time that is not scaled is seen


class Net(nn.Module):
    """A small field that takes one time, or one for each point."""

    def __init__(self, d: int, width: int = 32) -> None:
        super().__init__()
        self.event_shape = (d,)
        layers = [nn.Linear(d + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, d)]
        self.net = nn.Sequential(*layers)

    def forward(self, t, z):
        return self.net(torch.cat([z, t.expand(len(z))[:, None]], -1))


def model(d: int = 2, base=None, interval=INTERVAL, seed: int = 0) -> Flow:
    return Flow(base or Normal(d), CNF(redrawn(Net(d), seed), interval=interval))


def of(function, *parameters, d: int = 2, interval=INTERVAL) -> Flow:
    """A flow in float64 whose field is a function."""
    field = Field(function, d, [nn.Parameter(p) for p in parameters] or [nn.Parameter(torch.zeros(1))])
    return Flow(Normal(d), CNF(field, interval=interval)).double()


class Gaussian:
    """Data from N(μ, Σ), a standard normal base, lines between independent points, and the mean velocity of those."""

    MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
    ROOT = torch.tensor([[1.5, 0.0], [-0.6, 0.4]], dtype=torch.float64)
    COVARIANCE = ROOT @ ROOT.T

    def sample(self, n: int, seed: int) -> Tensor:
        return self.MEAN + torch.randn(n, 2, generator=seeded(seed), dtype=torch.float64) @ self.ROOT.T

    def velocity(self, t: Tensor, z: Tensor) -> Tensor:
        r"""(-\mu + cov(z_1 - z_0, z_t) cov(z_t)^{-1} (z - E z_t)) / (t_1 - t_0), by the formula for normal vectors."""
        t0, t1 = INTERVAL
        s = ((t - t0) / (t1 - t0)).expand(len(z))[:, None]
        eye, rest = torch.eye(2, dtype=z.dtype), (z - (1 - s) * self.MEAN)[..., None]
        s = s[..., None]
        between = s * eye - (1 - s) * self.COVARIANCE
        own = s**2 * eye + (1 - s) ** 2 * self.COVARIANCE
        return ((between @ torch.linalg.solve(own, rest))[..., 0] - self.MEAN) / (t1 - t0)

    @property
    def loss(self) -> float:
        r"""The variance about that velocity, \sum_i \int \lambda_i / ((1-s)^2 \lambda_i + s^2) ds / (t_1 - t_0)^2.

        The integral is that of the arc tangent: \sqrt{\lambda_i} \pi / 2.
        """
        roots = torch.linalg.eigvalsh(self.COVARIANCE).sqrt().sum().item()
        return math.pi / 2 * roots / (INTERVAL[1] - INTERVAL[0]) ** 2


# What is minimised


def test_lines_from_one_point_are_known_exactly():
    """If all data are one point a, the line through z at t comes from there: v = (z - a) / (t - t0), and the loss 0."""
    a = torch.tensor([3.0, -1.0], dtype=torch.float64)
    flow = of(lambda t, z: (z - a) / (t - INTERVAL[0])[:, None])
    loss, terms = FlowMatching(flow)(a.expand(500, 2), seeded())
    assert loss.item() < 1e-15
    z1 = flow.base.sample(500, seeded())
    assert terms["squared_distance"].item() == pytest.approx((z1 - a).square().sum(-1).mean().item())


def test_the_times_are_one_for_each_point_and_the_whole_interval():
    seen = []

    def field(t, z):
        seen.append(t)
        return 0 * z

    FlowMatching(of(field))(torch.zeros(20_000, 2, dtype=torch.float64), seeded())
    (t,) = seen
    assert t.shape == (20_000,) and t.dtype == torch.float64
    assert INTERVAL[0] <= t.min() < 0.501 and 2.499 < t.max() < INTERVAL[1]
    assert t.sort().values.diff().max() < 2 * 15 / 20_000, "uniform: no gap is longer than chance makes it"


def test_the_mean_velocity_carries_the_data_to_the_base():
    """So that what the loss teaches is what the CNF integrates: the flow of that field has the data's density."""
    gaussian = Gaussian()
    x = gaussian.sample(20, seed=1)
    truth = torch.distributions.MultivariateNormal(gaussian.MEAN, gaussian.COVARIANCE)
    log_prob = of(gaussian.velocity).log_prob(x, solve=Solve(tolerance=1e-9))
    torch.testing.assert_close(log_prob, truth.log_prob(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("away", [0.0, 0.5])
def test_its_gradient_is_that_of_the_distance_from_the_mean_velocity(away):
    """The theorem, at the mean velocity itself, where both gradients are 0, and away from it.

    Their difference, batch by batch at the same points, is noise about 0; that of the losses is the variance.
    """
    gaussian, generator = Gaussian(), seeded(2)
    starts = [away * torch.randn(shape, generator=generator) for shape in ((2,), (2,), (2, 2))]
    seen = []

    def field(t, z):
        seen.append((t, z))
        bias, drift, matrix = flow.bijection.field.learnt
        return gaussian.velocity(t, z) + bias + t[:, None] * drift + z @ matrix.T

    flow = of(field, *starts)
    loss, parameters = FlowMatching(flow), list(flow.parameters())
    losses, gradients = [], []
    for k in range(40):
        conditional = loss(gaussian.sample(2000, seed=100 + k), generator)[0]
        t, z = seen[-1]
        marginal = (field(t, z) - gaussian.velocity(t, z)).square().sum(-1).mean()
        losses.append((conditional - marginal).detach())
        both = (torch.autograd.grad(one, parameters) for one in (conditional, marginal))
        gradients.append(torch.cat([(a - b).flatten() for a, b in zip(*both, strict=True)]))
    for noise, mean in ((torch.stack(losses), gaussian.loss), (torch.stack(gradients), 0.0)):
        error = noise.std(0) / len(noise) ** 0.5
        assert ((noise.mean(0) - mean).abs() < 4 * error).all()
        assert (error < 0.02).all(), "or it would say nothing"


def test_the_loss_has_gradients_in_the_field_alone():
    """Even if another part is no longer frozen: to train the likelihood afterwards, say."""
    base = NormalMixture(torch.tensor([[-1.0], [1.0]]))
    flow = Flow(base, Chain(Diagonal(1, log_scale=0.5).requires_grad_(False), model(1).bijection))
    matching = FlowMatching(flow, pairing="optimal")
    flow.requires_grad_(True)
    loss, terms = matching(torch.randn(10, 1))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flow.bijection[1].field.parameters())
    assert flow.bijection[0].log_scale.grad is None
    assert not any(term.requires_grad for term in terms.values())


def test_no_equation_is_solved():
    flow = model()
    counted = Counted(flow.bijection.field)
    FlowMatching(Flow(Normal(2), CNF(counted)))(torch.randn(10, 2))
    assert (counted.plain, counted.with_rows) == (1, 0)


# Pairing


def cost(x: Tensor, z: Tensor) -> float:
    return (x - z).square().sum().item()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 2, 2)])
def test_the_pairing_is_the_best_of_all(seed, shape):
    x, z = (1 + torch.randn(5, *shape, generator=seeded(10 * seed + k)) for k in range(2))
    best = min(cost(x, z[list(order)]) for order in permutations(range(5)))
    order = optimal_pairing(x, z)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4] and order.dtype == torch.long
    assert cost(x, z[order]) == pytest.approx(best, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 3), seed=st.integers(0, 1000), far=st.sampled_from([0.0, 1e6]))
def test_the_pairing_costs_no_more_than_any_other(n, d, seed, far):
    """Nor does it change when all points of one set are moved together."""
    x, z = (torch.randn(n, d, generator=seeded(2 * seed + k), dtype=torch.float64) for k in range(2))
    best = cost(x, z[optimal_pairing(x, z)])
    assert cost(x, z[optimal_pairing(x + far, z)]) == pytest.approx(best, rel=1e-8)
    others = [torch.arange(n), *(torch.randperm(n, generator=seeded(seed + k)) for k in range(5))]
    assert all(best <= cost(x, z[other]) * (1 + 1e-9) for other in others)


def test_on_a_line_it_pairs_in_order():
    x, z = (torch.randn(100, 1, generator=seeded(k)) for k in range(2))
    assert z[optimal_pairing(x, z)][:, 0].argsort().equal(x[:, 0].argsort())


def test_the_loss_pairs_within_groups():
    flow, x = model(), torch.randn(12, 2, generator=seeded(1))
    z = flow.base.sample(12, seeded())
    for pairing, expected in (
        ("independent", cost(x, z)),
        ("optimal", sum(cost(a, b[optimal_pairing(a, b)]) for a, b in zip(x.split(5), z.split(5), strict=True))),
    ):
        _, terms = FlowMatching(flow, pairing, pairing_batch=5)(x, seeded())
        assert terms["squared_distance"].item() == pytest.approx(expected / 12, rel=1e-5)


def test_in_large_groups_the_lines_do_not_cross():
    """On a line, N(μ, σ²) goes to N(0, 1) by x -> (x - μ) / σ: the field of that map leaves next to nothing."""
    mean, std, (t0, t1) = 2.0, 0.5, INTERVAL

    def field(t, z):
        s = ((t - t0) / (t1 - t0))[:, None]
        x = (z + s * mean / std) / (1 - s + s / std)
        return ((x - mean) / std - x) / (t1 - t0)

    flow = of(field, d=1)
    x = mean + std * torch.randn(900, 1, generator=seeded(1), dtype=torch.float64)
    independent, optimal = (
        FlowMatching(flow, pairing, pairing_batch=300)(x, seeded())[0].item() for pairing in ("independent", "optimal")
    )
    assert optimal < 0.03 * independent
    assert independent > 0.9 * math.pi / 2 * std / (t1 - t0) ** 2, "which has no field below that without the 0.9"


# With what it is used


def same(a, b) -> bool:
    return a[0].equal(b[0]) and all(a[1][name].equal(b[1][name]) for name in a[1])


@pytest.mark.parametrize("pairing", ["independent", "optimal"])
@pytest.mark.parametrize("training", [True, False])
def test_all_noise_comes_from_the_generator(pairing, training):
    loss, x = FlowMatching(model(), pairing, pairing_batch=8).train(training), torch.randn(20, 2)
    state = torch.get_rng_state()
    first = loss(x, seeded())
    assert same(first, loss(x, seeded())) and not first[0].equal(loss(x, seeded(1))[0])
    assert torch.get_rng_state().equal(state)
    loss(x)
    assert not torch.get_rng_state().equal(state), "without one, from PyTorch's own"


def test_float64_goes_through():
    loss, terms = FlowMatching(model().double(), "optimal")(torch.randn(7, 2).double(), seeded())
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert all(term.dtype == torch.float64 for term in terms.values())


def test_what_stands_before_the_cnf_is_applied_first():
    x, flow = 5 + 3 * torch.randn(50, 2, generator=seeded(1)), model()
    standardize, swap = Standardize.of(x), Permutation(2, [1, 0])
    nested = Flow(Normal(2), Chain(standardize, Chain(swap, flow.bijection)))
    there = standardize(x).value.flip(1)
    assert same(FlowMatching(nested)(x, seeded()), FlowMatching(flow)(there, seeded()))


def test_images_are_points_too():
    shape = (1, 4, 4)
    flow = Flow(Normal((4, 2, 2)), Chain(Squeeze(shape), CNF(Field(lambda t, z: 0 * z, (4, 2, 2)))))
    x = torch.randn(6, *shape)
    loss, _ = FlowMatching(flow, "optimal", pairing_batch=1)(x, seeded())
    z = flow.base.sample(6, seeded())
    assert loss.item() == pytest.approx(cost(Squeeze(shape)(x).value, z) / 6)


def test_discrete_data_are_dequantised_first():
    dequantiser, k = UniformDequantiser(4), torch.randint(4, (30, 2), generator=seeded(1))
    flow = Flow(Normal(2), Chain(Logit(2), model().bijection))
    noise = seeded()
    points, _ = dequantiser(k, noise)
    assert same(FlowMatching(Dequantised(flow, dequantiser))(k, seeded()), FlowMatching(flow)(points, noise))


def test_the_base_may_be_another():
    """Its samples are the ends of the lines, and its shape that of the points."""
    flow = model(base=Uniform(2))
    _, terms = FlowMatching(flow)(torch.zeros(10_000, 2), seeded())
    assert terms["squared_distance"].item() == pytest.approx(2 / 3, abs=0.02)


def test_in_eval_mode_it_is_the_same_or_the_likelihood():
    flow, x = model(), torch.randn(20, 2)
    plain = FlowMatching(flow)
    training = plain(x, seeded())
    assert same(plain.eval()(x, seeded()), training)
    solve = Solve(trace="hutchinson", tolerance=1e-6)
    judged = FlowMatching(flow, evaluation=solve)
    assert same(judged(x, seeded()), training)
    assert same(judged.eval()(x, seeded()), NegativeLogLikelihood(flow, evaluation=solve).eval()(x, seeded()))


def test_a_repr_shows_the_options():
    """By it a run that is resumed is held to the loss that it began with."""
    shown = FlowMatching(model(), "optimal", 32, Solve(tolerance=1e-3)).extra_repr()
    assert shown.startswith("pairing='optimal', pairing_batch=32, evaluation=Solve(") and "tolerance=0.001" in shown


@pytest.mark.parametrize("pairing", ["independent", "optimal"])
def test_fit_learns_a_mixture(pairing):
    """Two bumps on a line: the NLL comes near their entropy, from more than a nat above it."""
    truth = NormalMixture(torch.tensor([[-1.0], [2.0]]), 0.4, torch.tensor([1.0, 2.0]))
    x, test = truth.sample(4000, seeded(1)), truth.sample(1000, seeded(2))
    flow = model(1, interval=(0.0, 2.0))
    loss = FlowMatching(flow, pairing)
    before = evaluate(flow, test).nll
    history = fit(loss, x, steps=400, batch=256, lr=1e-2, records=4, progress=False)
    assert list(history.terms) == ["flow_matching", "squared_distance"]
    assert min(history.validation) == history.validation[history.steps.index(history.best_step)]
    after, floor = evaluate(flow, test).nll, -truth.log_prob(test).mean().item()
    assert before > floor + 1 and floor - 0.02 < after < floor + 0.1


def test_straighter_paths_need_fewer_steps():
    """What optimal pairing is for: one step of Euler's comes closer to the flow than after independent pairs."""
    x = toy_density("eight_gaussians").sample(4000, seeded(1))
    errors = []
    for pairing in ("independent", "optimal"):
        flow = model(interval=(0.0, 1.0))
        fit(FlowMatching(flow, pairing, 128), x, steps=300, batch=128, lr=1e-2, progress=False)
        euler = Solve(method="euler", times=uniform_grid(1))
        one, many = (flow.sample(500, solve=solve, generator=seeded()) for solve in (euler, None))
        errors.append((one - many).norm(dim=-1).mean().item())
    assert errors[1] < 0.3 * errors[0]


def test_a_run_with_the_likelihood_as_its_judge():
    loss = FlowMatching(model(1), evaluation=Solve(tolerance=1e-3))
    x = torch.randn(100, 1, generator=seeded())
    history = fit(loss, x[:80], validation=x[80:], steps=2, records=1, progress=False)
    expected = -loss.model.log_prob(x[80:], solve=Solve(tolerance=1e-3)).mean().item()
    assert history.validation == pytest.approx([expected], rel=1e-5)


# Bad calls

X = torch.zeros(3, 2)


def twice() -> Chain:
    return Chain(model().bijection, Diagonal(2), model(seed=1).bijection)


def call(x, **options):
    return FlowMatching(model(), **options)(x)


T, V = TypeError, ValueError
BAD = {
    "a map": (lambda: FlowMatching(model().bijection), T, "model is a CNF; wanted a Flow or a Dequantised"),
    "a finite flow": (
        lambda: FlowMatching(Flow(Normal(2), Diagonal(2))),
        V,
        "model has the bijections Diagonal; wanted a CNF as the last, and no other",
    ),
    "a CNF that is not the last": (
        lambda: FlowMatching(Flow(Normal(2), Chain(model().bijection, Diagonal(2)))),
        V,
        "model has the bijections CNF, Diagonal; wanted a CNF as the last, and no other",
    ),
    "two CNFs": (lambda: FlowMatching(Flow(Normal(2), twice())), V, "model has the bijections CNF, Diagonal, CNF;"),
    "a CNF within another map": (
        lambda: FlowMatching(Flow(Normal(2), Chain(Inverse(model().bijection), model().bijection))),
        V,
        "model has the bijections Inverse, CNF;",
    ),
    "a CNF turned round": (
        lambda: FlowMatching(Flow(Normal(2), Inverse(model().bijection))),
        V,
        "model has the bijections Inverse;",
    ),
    "several scales": (
        lambda: FlowMatching(Flow(Normal(4), Multiscale(Squeeze((1, 2, 2))))),
        V,
        "model has the bijections Multiscale;",
    ),
    "an interval of no length": (
        lambda: FlowMatching(model(interval=(1.0, 1.0))),
        V,
        "model has a CNF on the interval (1.0, 1.0); wanted one of some length",
    ),
    "no context": (
        lambda: FlowMatching(Flow(Normal(2), Chain(Conditional(2).requires_grad_(False), model().bijection)))(X),
        V,
        "Conditional: context is missing; this map is conditioned on one",
    ),
    "a context of a flow without": (
        lambda: FlowMatching(model())(X, context=X),
        V,
        "FlowMatching: context was given, but the model takes none",
    ),
    "contexts that would be exchanged": (
        lambda: FlowMatching(
            Flow(Normal(2), Chain(Conditional(2).requires_grad_(False), model().bijection)), "optimal"
        )(X, context=X),
        V,
        "pairing is 'optimal', which would exchange the contexts; wanted 'independent' with them",
    ),
    "a map that would be trained": (
        lambda: FlowMatching(Flow(Normal(2), Chain(ActNorm(2), model().bijection))),
        V,
        "model would learn bijection.members.0.log_scale, bijection.members.0.shift, outside the field of its CNF; "
        "wanted them frozen, by requires_grad_(False)",
    ),
    "an unknown pairing": (
        lambda: FlowMatching(model(), "best"),
        V,
        "pairing is 'best'; wanted one of independent, optimal",
    ),
    "a group of none": (
        lambda: FlowMatching(model(), pairing_batch=0),
        V,
        "pairing_batch is 0; wanted a whole number of at least 1",
    ),
    "an evaluation by name": (
        lambda: FlowMatching(model(), evaluation="dopri5"),
        T,
        "evaluation is a str; wanted a Solve",
    ),
    "points of another width": (
        lambda: call(torch.zeros(3, 4)),
        V,
        "FlowMatching: batch has shape (3, 4); wanted (*batch, 2)",
    ),
    "one point": (lambda: call(torch.zeros(2)), V, "batch has shape (2,); wanted (n, 2)"),
    "points in two dimensions": (lambda: call(torch.zeros(3, 3, 2)), V, "batch has shape (3, 3, 2); wanted (n, 2)"),
    "whole numbers": (lambda: call(X.long()), T, "FlowMatching: batch has dtype torch.int64; wanted floating point"),
    "float64": (lambda: call(X.double()), T, "FlowMatching: batch has dtype torch.float64, but the parameters are"),
    "a list": (lambda: call([[0.0, 0.0]]), T, "FlowMatching: batch is a list; wanted a torch.Tensor"),
    "NaN": (
        lambda: call(torch.tensor([[0.0, 1.0], [math.nan, math.inf]])),
        V,
        "batch: 1 of 2 points are not finite where they enter the CNF",
    ),
    "no generator": (lambda: FlowMatching(model())(X, 0), T, "generator is a int; wanted a torch.Generator"),
    "a field of another shape": (
        lambda: FlowMatching(of(lambda t, z: t * z.sum(-1)))(X.double()),
        V,
        "CNF: the field Field returned shape (3,) for points of shape (3, 2); wanted the same",
    ),
    "arrays to pair": (lambda: optimal_pairing(X, X.numpy()), T, "z is a ndarray; wanted a torch.Tensor"),
    "a number to pair": (
        lambda: optimal_pairing(torch.zeros(3), X),
        V,
        "x has shape (3,); wanted (n, *event_shape), the same for x and z",
    ),
    "fewer to pair": (
        lambda: optimal_pairing(X, X[:2]),
        V,
        "z has shape (2, 2); wanted (n, *event_shape), the same for x and z",
    ),
    "NaN to pair": (lambda: optimal_pairing(X, X / 0), V, "z holds NaN or infinite entries"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_call(name):
    bad, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        bad()
