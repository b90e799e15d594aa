"""Every bijection keeps the contract; each does what its formula says."""

import inspect
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Conditional, image_bijection, net_for, real_nvp, redrawn, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cnfkit
from cnfkit import (
    CNF,
    MADE,
    MLP,
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    AffineLU,
    Arcsinh,
    Autoregressive,
    Bijection,
    Chain,
    Conv1x1,
    Coordinatewise,
    Coupling,
    Diagonal,
    Flatten,
    Flow,
    Inverse,
    LipschitzMLP,
    Logit,
    MixtureCDF,
    MixtureLogit,
    MLPField,
    Multiscale,
    Normal,
    Permutation,
    Planar,
    Residual,
    Result,
    Squeeze,
    Standardize,
    Statistics,
    Uniform,
    bijection_contract,
    ffjord,
    flow_contract,
    flowpp,
    glow,
    maf,
    mask,
    nice,
    realnvp,
    residual,
)

# One line per bijection that cnfkit exports: whoever adds one adds a line, or a test below fails.
REGISTRY = {
    ActNorm: lambda: ActNorm((2, 3, 3)),
    AdditiveCoupling: lambda: AdditiveCoupling(mask("even", 3), MLP(3, 3, hidden=(8,))),
    Affine: lambda: Affine(torch.tensor([[2.0, 1.0], [-1.0, 0.5]]), torch.tensor([0.3, -2.0])),
    AffineLU: lambda: AffineLU(torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.0], [3.0, 1.0, 1.0]])),
    AffineCoupling: lambda: AffineCoupling(mask("even", 3), MLP(3, 6, hidden=(8,))),
    Arcsinh: lambda: Arcsinh((2, 2)),
    Autoregressive: lambda: Autoregressive(MADE(4, order=[2, 0, 3, 1], hidden=(12, 12))),
    CNF: lambda: CNF(MLPField(2, hidden=(8, 8))),
    Chain: lambda: Chain(Diagonal(3), Arcsinh(3), AffineCoupling(mask("even", 3), MLP(3, 6, hidden=(8,)))),
    Conv1x1: lambda: Conv1x1((3, 2, 2)),
    Coordinatewise: lambda: Coordinatewise((2, 2), MixtureCDF(3)),
    Coupling: lambda: Coupling(mask("even", 3), MLP(3, 3 * 14, hidden=(8,)), MixtureLogit(4)),
    Diagonal: lambda: Diagonal((2, 3), log_scale=0.5, shift=torch.arange(3.0)),
    Flatten: lambda: Flatten((2, 2, 3)),
    Inverse: lambda: Inverse(Affine(torch.tensor([[2.0, 1.0], [-1.0, 0.5]]))),
    Logit: lambda: Logit(3),
    Multiscale: lambda: Multiscale(Squeeze((1, 4, 4)), Chain(Diagonal((2, 2, 2)), Squeeze((2, 2, 2)))),
    Permutation: lambda: Permutation((3, 2, 2), [2, 0, 1]),
    Planar: lambda: Planar(3),
    Residual: lambda: Residual(LipschitzMLP(3, hidden=(8,)), 3),
    Squeeze: lambda: Squeeze((2, 4, 6)),
    Standardize: lambda: Standardize(torch.tensor([1.0, -2.0]), torch.tensor([0.1, 5.0])),
}

# What users build from them.
CHAINS = {
    "RealNVP in two dimensions": real_nvp,
    "RealNVP of standardised data": lambda: Chain(
        Standardize(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])), *real_nvp()
    ),
    "image flow of three stages, convolutions": lambda: image_bijection("conv"),
    "image flow of three stages, MLPs": lambda: image_bijection("mlp"),
    "image flow from the unit cube": lambda: Chain(Logit((1, 8, 8), alpha=0.05), image_bijection("conv")),
    "inverse of a chain": lambda: Inverse(real_nvp()),
    "inverse of an image flow": lambda: Inverse(image_bijection("conv")),
    "chain of inverses": lambda: Chain(Inverse(real_nvp()), Inverse(Inverse(real_nvp()))),
    "RealNVP in ten dimensions": lambda: real_nvp(d=10),
    "continuous flow among couplings": lambda: Chain(
        Standardize(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.5])),
        redrawn(ActNorm(2)),
        redrawn(CNF(MLPField(2, (8,)))),
        *real_nvp(2),
        Inverse(redrawn(CNF(MLPField(2, (4,), time="concat"), interval=(0, 0.5)))),
    ),
    "top half of an image": lambda: redrawn(AffineCoupling(mask("top", (1, 4, 4)), net_for("conv", (1, 4, 4)))),
}
# Flows by name, and others of the course.
NAMED = {
    "NICE": lambda: nice(3, hidden=(8,)).bijection,
    "NICE of an image": lambda: nice((1, 2, 2), hidden=(8,)).bijection,
    "Glow in three dimensions": lambda: glow(3, layers=2, hidden=(8,)).bijection,
    "Glow of an image": lambda: glow((1, 4, 4), layers=1, hidden=4).bijection,
    "MAF": lambda: maf(4, layers=2, hidden=(8,)).bijection,
    "IAF": lambda: Inverse(maf(3, layers=2, hidden=(8,)).bijection),
    "linear and autoregressive maps in turn": lambda: maf(3, layers=2, hidden=(8,), mix="linear").bijection,
    "Flow++ of an image": lambda: flowpp((1, 4, 4), layers=2, components=2, hidden=4).bijection,
    "Residual Flow": lambda: residual(2, layers=2, hidden=(8,)).bijection,
    "Residual Flow of an image": lambda: residual((1, 4, 4), layers=1, hidden=4, scales=1).bijection,
    "FFJORD in two blocks": lambda: ffjord(2, blocks=2, hidden=(6,)).bijection,
    "FFJORD of an image": lambda: ffjord((1, 2, 2), blocks=1, hidden=(2,)).bijection,
    "planar flow": lambda: Chain(*[Planar(3) for _ in range(4)]),
    "planar flow for inference": lambda: Inverse(Chain(Planar(2), Planar(2))),
    "inverse of mixtures": lambda: Inverse(Coordinatewise(2, MixtureLogit(3))),
    "mixture conditionals": lambda: Autoregressive(MADE(2, outputs=15, hidden=(8,), order=[1, 0]), MixtureCDF(5)),
    "each coordinate by its distribution function, then couplings": lambda: Chain(
        Coordinatewise(2, MixtureCDF(3)), Logit(2), *real_nvp(2)
    ),
}
FRESH = {kind.__name__: make for kind, make in REGISTRY.items()} | NAMED
BUILT = {name: lambda make=make: redrawn(make(), scale=0.15) for name, make in FRESH.items()} | CHAINS
FIXED = {"Arcsinh", "Flatten", "Logit", "Permutation", "Squeeze", "Standardize"}  # have no parameters


def points(bijection: Bijection, *batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Points that a bijection takes: normal ones, or uniform ones where a Logit comes first."""
    first = bijection
    while isinstance(first, Chain):
        first = first[0]
    shape = (*batch, *bijection.event_shape)
    if isinstance(first, Logit):
        return 0.01 + 0.98 * torch.rand(shape, generator=seeded(), dtype=dtype)
    return torch.randn(shape, generator=seeded(), dtype=dtype)


@pytest.fixture(params=BUILT)
def built(request) -> Bijection:
    return BUILT[request.param]()


def test_every_exported_bijection_is_in_the_registry():
    exported = {getattr(cnfkit, name) for name in cnfkit.__all__}
    bijections = {
        kind
        for kind in exported
        if inspect.isclass(kind) and issubclass(kind, Bijection) and not inspect.isabstract(kind)
    }
    assert bijections == REGISTRY.keys()


def test_every_bijection_is_exported():
    assert set(cnfkit.bijections.__all__) <= set(cnfkit.__all__)


def test_contract(built):
    bijection_contract(built, points(built, 4))


def test_contract_from_float64(built):
    bijection_contract(built.double(), points(built, 3, dtype=torch.float64))


def test_identity_at_the_start():
    """Nets' last layers are zero, so a fresh coupling flow is the identity, where training starts calmly."""
    flow = Chain(*[AffineCoupling(m, MLP(2, 4)) for m in (mask("even", 2), ~mask("even", 2))], ActNorm(2))
    x = points(flow, 5)
    result = flow(x)
    assert torch.equal(result.value, x) and not result.logdet.any()


@settings(deadline=None, derandomize=True, max_examples=25)
@given(batch=st.lists(st.integers(1, 3), max_size=3), double=st.booleans(), name=st.sampled_from(list(BUILT)))
def test_any_batch_shape_and_dtype(name, batch, double):
    """A batch of any shape gives what its points give in one row, in both directions, in the dtype that came."""
    bijection = BUILT[name]().to(torch.float64 if double else torch.float32)
    x = points(bijection, *batch, dtype=torch.float64 if double else torch.float32)
    for go, given_, event in ((bijection, x, bijection.event_shape), (bijection.inverse, None, bijection.latent_shape)):
        given_ = bijection(x).value if given_ is None else given_
        result, row = go(given_), go(given_.reshape(-1, *event))
        assert result.value.shape[: len(batch)] == result.logdet.shape == torch.Size(batch)
        assert result.value.dtype == result.logdet.dtype == x.dtype
        torch.testing.assert_close(result.value.flatten(), row.value.flatten(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.logdet.flatten(), row.logdet, rtol=1e-4, atol=1e-4)


@settings(deadline=None, derandomize=True, max_examples=10)
@given(event=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_any_event_shape(event):
    """Maps that act on each coordinate take events of any shape, and sum their log-determinant over all of it."""
    x = torch.randn(3, *event, generator=seeded(), dtype=torch.float64)
    diagonal = Diagonal(event, log_scale=torch.tensor(0.5, dtype=torch.float64))
    ones = torch.ones(event, dtype=torch.float64)
    for bijection in (diagonal, Standardize(3 * ones, 2 * ones), Arcsinh(event)):
        bijection_contract(bijection, x)
    assert diagonal(x).logdet.tolist() == pytest.approx([0.5 * math.prod(event)] * 3)


ELSEWHERE = """
import sys
from pathlib import Path
import torch
from test_bijections import FRESH, there_and_back
import cnfkit

folder = Path(sys.argv[1])
torch.manual_seed(1)  # other weights, until those of the file are loaded
for name, make in FRESH.items():
    model = make()
    if model.state_dict():
        cnfkit.load(folder / f"{name}.safetensors", model)
    torch.save(there_and_back(model), folder / f"{name}.pt")
"""


def there_and_back(bijection: Bijection) -> list[torch.Tensor]:
    with torch.no_grad():
        there = bijection(points(bijection, 3))
        back = bijection.inverse(there.value)
    return [there.value, there.logdet, back.value, back.logdet]


def test_weights_saved_here_give_the_same_numbers_in_another_process(tmp_path):
    """To the last bit, and all that a map needs is in the file: what a call leaves on a module is not."""
    here = {}
    for name, make in FRESH.items():
        model = redrawn(make(), scale=0.15)
        cnfkit.save(tmp_path / f"{name}.safetensors", model)
        here[name] = there_and_back(model)
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], cwd=Path(__file__).parent, check=True)
    for name, numbers in here.items():
        there = torch.load(tmp_path / f"{name}.pt")
        assert all(a.equal(b) for a, b in zip(numbers, there, strict=True)), name


@pytest.mark.parametrize("name", NAMED)
def test_samples_are_the_generators(name):
    bijection = BUILT[name]()
    flow = Flow(Uniform(2) if name == "mixture conditionals" else Normal(bijection.latent_shape), bijection)
    first, second, other = (flow.sample(2, generator=seeded(seed)) for seed in (3, 3, 4))
    assert first.equal(second) and not first.equal(other)


@pytest.mark.parametrize("name", NAMED)
def test_autocast_leaves_the_map_whole(name):
    """Nets may answer in half precision; the map, its inverse and its log-determinants still belong together."""
    bijection = BUILT[name]()
    x = points(bijection, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        there = bijection(x)
        back = bijection.inverse(there.value)
    assert there.value.dtype == there.logdet.dtype == torch.float32
    torch.testing.assert_close(back.value, x, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(back.logdet, -there.logdet, atol=2e-2, rtol=2e-3)


def test_sizes_may_be_numpy_integers():
    """What a table's shape, or a sum, gives."""
    assert realnvp(np.int64(3), hidden=(np.int64(8),)).event_shape == (3,)


def test_empty_batch(built):
    """No points are no error: a filter may leave none."""
    result = built(points(built, 0))
    assert result.value.shape == (0, *built.latent_shape) and result.logdet.shape == (0,)


@pytest.mark.parametrize("name", [name for name in BUILT if name not in FIXED])
def test_gradients_reach_every_parameter(name):
    built = BUILT[name]()
    result = built(points(built, 4))
    (result.value.square().sum() + result.logdet.sum()).backward()
    missing = [name for name, p in built.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_repr_shows_the_shapes():
    assert repr(Squeeze((1, 2, 2))) == "Squeeze((1, 2, 2) -> (4, 1, 1))"
    assert repr(Logit(2, alpha=0.05)) == "Logit((2,), alpha=0.05)"


# Affine


def test_affine_map_by_hand():
    a, b = torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([1.0, -1.0])
    result = Affine(a, b)(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    assert result.value.tolist() == [[4.0, 2.0], [3.0, 5.0]]
    torch.testing.assert_close(result.logdet.exp(), torch.full((2,), 6.0))


def test_affine_map_that_turns_space_over_has_the_same_volume():
    x = torch.randn(3, 2, generator=seeded())
    mirrored = Affine(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert mirrored(x).value.equal(x.flip(-1)) and not mirrored(x).logdet.any()


def test_affine_does_not_keep_the_callers_tensor():
    matrix = torch.eye(2)
    layer = Affine(matrix)
    matrix.zero_()
    assert layer.matrix.equal(torch.eye(2))


def test_standardize_of_data():
    data = 5 + 3 * torch.randn(1000, 2, generator=seeded())
    standard = Standardize.of(data)(data)
    torch.testing.assert_close(standard.value.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.value.std(0, correction=0), torch.ones(2))
    assert not list(Standardize.of(data).parameters())
    assert set(Standardize.of(data).state_dict()) == {"mean", "std"}


def test_actnorm_is_initialised_once_and_by_hand():
    layer, x = ActNorm((2, 4, 4)), 3 + 2 * torch.randn(50, 2, 4, 4, generator=seeded())
    assert layer(x).value.equal(x)  # no hidden initialisation by the first batch
    layer.initialize(x)
    z = layer(x).value
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(2))
    assert layer.log_scale.requires_grad and layer.log_scale.shape == (2, 1, 1)


# Elementwise


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_logit_keeps_the_tails_to_rounding(alpha):
    layer = Logit(1, alpha).double()
    x = torch.tensor([[1e-12], [0.5], [1 - 1e-12]], dtype=torch.float64)
    s = alpha + (1 - 2 * alpha) * x
    expected = math.log(1 - 2 * alpha) - s.log() - torch.log1p(-s)
    torch.testing.assert_close(layer(x).logdet, expected.squeeze(-1), rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.inverse(layer(x).value).value, x, rtol=1e-4, atol=1e-15)


def test_logit_takes_every_sample_of_its_inverse():
    """With alpha > 0 the preimage of the line is a little wider than the unit interval: samples must be accepted."""
    flow = Flow(Normal(2), Logit(2, alpha=0.05))
    samples = flow.sample(5000, generator=seeded())
    assert samples.min() < 0 and samples.max() > 1
    assert flow.log_prob(samples).isfinite().all()


@pytest.mark.parametrize(("alpha", "low", "high"), [(0.0, 0.0, 1.0), (0.1, -0.125, 1.125)])
def test_logit_refuses_what_has_no_image(alpha, low, high):
    layer = Logit(1, alpha)
    layer(torch.tensor([[low + 1e-3], [high - 1e-3]]))
    for outside in (low - 1e-3, high + 1e-3, math.nan):
        with pytest.raises(ValueError, match=r"1 of 1 entries of x lie outside \("):
            layer(torch.tensor([[outside]]))


# Couplings


@pytest.mark.parametrize("kind", [AffineCoupling, AdditiveCoupling])
def test_coupling_keeps_its_part_and_asks_the_net_of_it_alone(kind):
    seen = []

    class Spy(MLP):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    m = mask("even", 4)
    layer = redrawn(kind(m, Spy(4, 8 if kind is AffineCoupling else 4)))
    x = torch.randn(6, 4, generator=seeded())
    z = layer(x).value
    layer.inverse(z)
    assert z[:, m].equal(x[:, m]) and not torch.isclose(z[:, ~m], x[:, ~m]).any()
    assert len(seen) == 2
    for asked in seen:
        assert asked[:, m].equal(x[:, m]) and not asked[:, ~m].any()


def test_coupling_bounds_its_scale():
    layer = AffineCoupling(mask("even", 4), MLP(4, 8), bound=1.5)
    nn.init.constant_(layer.net[-1].bias, 1e6)
    assert layer(torch.zeros(1, 4)).logdet.item() == pytest.approx(2 * 1.5)


def test_additive_coupling_preserves_volume():
    layer = redrawn(AdditiveCoupling(mask("even", 4), MLP(4, 4)))
    x = torch.randn(6, 4, generator=seeded())
    assert not layer(x).logdet.any() and not layer.inverse(x).logdet.any()


MASKS = {
    "checkerboard": [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]],
    "top": [[1] * 4, [1] * 4, [0] * 4, [0] * 4],
    "bottom": [[0] * 4, [0] * 4, [1] * 4, [1] * 4],
    "left": [[1, 1, 0, 0]] * 4,
    "right": [[0, 0, 1, 1]] * 4,
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_images(kind):
    m = mask(kind, (3, 4, 4))
    assert m.dtype == torch.bool and m.shape == (3, 4, 4)
    assert all(channel.int().tolist() == MASKS[kind] for channel in m)


def test_masks_of_vectors_and_channels():
    assert mask("even", 5).tolist() == [True, False, True, False, True]
    assert mask("channels", (5, 1, 2)).all((1, 2)).tolist() == [True, True, False, False, False]


@settings(deadline=None, derandomize=True, max_examples=20)
@given(kind=st.sampled_from([*MASKS, "channels"]), shape=st.tuples(*[st.integers(2, 5)] * 3))
def test_masks_share_out_every_coordinate(kind, shape):
    """Both parts hold something, and as near to half as the shape lets them."""
    m = mask(kind, shape)
    assert m.shape == shape
    m[0] = ~m[0]  # its own memory: an expanded mask would refuse this, or change elsewhere
    m[0] = ~m[0]
    fraction = m.double().mean().item()
    assert 0 < fraction < 1 and abs(fraction - 0.5) <= 1 / 6 + 1e-9


# Shapes


def test_squeeze_makes_channels_of_blocks():
    x = torch.arange(2 * 4 * 6.0).view(2, 4, 6)
    z = Squeeze((2, 4, 6))(x).value
    for c in range(2):
        for i in range(2):
            for j in range(2):
                assert z[4 * c + 2 * i + j].equal(x[c, i::2, j::2])


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_squeeze_of_any_shape_is_a_permutation(c, h, w, factor):
    layer = Squeeze((c, h * factor, w * factor), factor)
    x = torch.arange(float(layer.event_shape.numel())).view(1, *layer.event_shape)
    result = layer(x)
    assert result.value.shape[1:] == layer.latent_shape
    assert result.value.flatten().sort().values.equal(x.flatten()) and not result.logdet.any()
    assert layer.inverse(result.value).value.equal(x)


def test_multiscale_lets_the_second_half_of_the_channels_leave():
    class Nothing(Bijection):
        def _forward(self, x, context, solve):
            return Result(x, x.new_zeros(x.shape[:-3]))

        _inverse = _forward

    flow = Multiscale(Nothing((4, 1, 1)), Nothing((2, 1, 1)), Nothing((1, 1, 1)))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)
    assert flow(x).value.tolist() == [3.0, 4.0, 2.0, 1.0]
    assert flow.inverse(flow(x).value).value.equal(x)


def test_multiscale_adds_the_log_determinants_of_its_stages():
    flow = Multiscale(Diagonal((2, 2, 2), log_scale=1.0), Diagonal((1, 2, 2), log_scale=10.0))
    assert flow(torch.zeros(3, 2, 2, 2)).logdet.tolist() == [8.0 + 40.0] * 3


# Combinations


class Costly(Diagonal):
    """Reports what a continuous flow would."""

    def _forward(self, x, context, solve):
        result = super()._forward(x, context, solve)
        penalty = result.logdet.detach() * 0 + 2.0
        return Result(result.value, result.logdet, {"kinetic_energy": penalty}, (Statistics(evaluations=6),))

    def _inverse(self, z, context, solve):
        result = super()._inverse(z, context, solve)
        return Result(result.value, result.logdet, {}, (Statistics(evaluations=7, rejected=1),))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(Costly((2, 2, 2)), Diagonal((2, 2, 2)), Costly((2, 2, 2))),
        lambda: Multiscale(Costly((2, 2, 2)), Costly((1, 2, 2))),
        lambda: Inverse(Inverse(Chain(Costly((2, 2, 2)), Costly((2, 2, 2))))),
    ],
    ids=["chain", "multiscale", "inverse"],
)
def test_penalties_and_statistics_add_up(make):
    flow = make()
    there = flow(torch.zeros(3, *flow.event_shape))
    back = flow.inverse(there.value)
    assert there.penalties["kinetic_energy"].tolist() == [4.0] * 3 and there.evaluations == 12
    assert back.penalties == {} and back.evaluations == 14
    assert [stats.rejected for stats in back.stats] == [1, 1]


def test_chain_is_a_sequence():
    a, b = Diagonal(2), Arcsinh(2)
    chain = Chain(a, b)
    assert list(chain) == [a, b] and len(chain) == 2 and chain[1] is b


CONDITIONED = {
    "affine coupling": lambda: AffineCoupling(mask("even", 2), MLP(2, 4, hidden=(8,), context=3)),
    "additive coupling": lambda: AdditiveCoupling(mask("even", 2), MLP(2, 2, hidden=(8,), context=3)),
    "mixture coupling": lambda: Coupling(mask("even", 2), MLP(2, 16, hidden=(8,), context=3), MixtureLogit(2)),
    "autoregressive": lambda: Autoregressive(MADE(3, hidden=(8,), order=[1, 2, 0], context=3)),
    "RealNVP": lambda: realnvp(2, layers=2, hidden=(8,), context=3).bijection,
    "NICE": lambda: nice(2, layers=2, hidden=(8,), context=3).bijection,
    "MAF of one coordinate": lambda: maf(1, layers=2, hidden=(8,), context=3).bijection,
    "Glow of an image": lambda: glow((1, 4, 4), layers=1, hidden=4, context=3).bijection,
    "Flow++ of an image": lambda: flowpp((1, 2, 2), layers=1, components=2, hidden=4, scales=1, context=3).bijection,
    "alone": lambda: Conditional(2),
    "chain": lambda: Chain(Diagonal(2), Conditional(2), *real_nvp()),
    "inverse": lambda: Inverse(Conditional(2)),
    "multiscale": lambda: Multiscale(
        Chain(Conditional((1, 2, 2)), Squeeze((1, 2, 2))), Diagonal((2, 1, 1)), Conditional((1, 1, 1))
    ),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_context_reaches_those_who_take_it(name):
    flow = redrawn(CONDITIONED[name]())
    assert flow.takes_context
    x, context = points(flow, 4), torch.randn(4, 3, generator=seeded(1))
    bijection_contract(flow, x, context)
    assert not torch.isclose(flow(x, context).value.flatten(1), flow(x, -context).value.flatten(1)).all(-1).any()


def test_conditional_flow_keeps_the_contract():
    context = torch.randn(5, 3, generator=seeded())
    flow_contract(Flow(Normal(2), redrawn(CONDITIONED["chain"]())), context=context)
