"""Toy densities are densities; digits are the same everywhere."""

import functools
import hashlib
import math

import pytest
import torch
from builders import seeded

from cnfkit import Images, digits, toy_density
from cnfkit.data.toy import DENSITIES, Checkerboard, GaussianRing, Pinwheel, TwoMoons

# A square that holds each density, and the cells into which its samples are counted, each of FINE × FINE points of a
# grid. The checkerboard's edges are edges of cells.
SQUARE, CELLS, FINE = 6.0, 24, 10
AREA = (2 * SQUARE / (CELLS * FINE)) ** 2


@functools.cache
def log_density(name: str) -> torch.Tensor:
    """On the grid, shape ``(CELLS * FINE) ** 2``."""
    n = CELLS * FINE
    line = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 * SQUARE - SQUARE
    return toy_density(name).log_prob(torch.cartesian_prod(line, line))


def cell_masses(name: str) -> torch.Tensor:
    """The mass of each cell by the midpoint rule, exact for the checkerboard and close for smooth densities."""
    return (log_density(name).exp() * AREA).view(CELLS, FINE, CELLS, FINE).sum((1, 3)).flatten()


@pytest.fixture(params=DENSITIES)
def name(request) -> str:
    return request.param


def test_density_integrates_to_one(name):
    assert cell_masses(name).sum().item() == pytest.approx(1, abs=1e-4)


def test_samples_follow_the_density(name):
    """Pearson's χ² of one seeded draw of 50 000; six standard deviations would be one in a thousand million."""
    x = toy_density(name).sample(50_000, seeded())
    cell = ((x + SQUARE) / (2 * SQUARE) * CELLS).long()
    assert cell.min() >= 0 and cell.max() < CELLS
    counts = torch.bincount(cell[:, 0] * CELLS + cell[:, 1], minlength=CELLS**2).double()
    expected = cell_masses(name) * len(x)
    often = expected >= 5
    assert counts[~often].sum() <= expected[~often].sum() + 6 * expected[~often].sum().sqrt() + 1
    statistic = ((counts - expected)[often].square() / expected[often]).sum()
    freedom = int(often.sum()) - 1
    assert freedom > 10 and abs(statistic - freedom) < 6 * math.sqrt(2 * freedom)


def test_entropy_is_the_mean_over_samples(name):
    density = toy_density(name)
    values = -density.log_prob(density.sample(100_000, seeded()).double())
    error = values.std().item() / math.sqrt(len(values))
    assert error < 0.01 and density.entropy() == pytest.approx(values.mean().item(), abs=4 * error + 1e-6)


def test_entropy_is_that_of_the_integral(name):
    """−∫ p log p by the midpoint rule, on points that have nothing to do with the density's own."""
    integral = torch.special.entr(log_density(name).exp()).sum().item() * AREA
    assert toy_density(name).entropy() == pytest.approx(integral, abs=1e-6)


def test_entropies_in_closed_form():
    of_a_normal = math.log(2 * math.pi * math.e * 0.25)
    assert Checkerboard().entropy() == math.log(8)
    assert GaussianRing(components=1, sigma=0.5).entropy() == pytest.approx(of_a_normal, abs=1e-6)
    assert GaussianRing(components=4, radius=0.0, sigma=0.5).entropy() == pytest.approx(of_a_normal, abs=1e-6)
    far_apart = GaussianRing(components=8, radius=20.0, sigma=0.5)
    assert far_apart.entropy() == pytest.approx(math.log(8) + of_a_normal, abs=1e-6)
    arms = Pinwheel(radius=10.0, along=0.6, across=0.15)
    assert arms.entropy() == pytest.approx(math.log(5 * 2 * math.pi * math.e * 0.6 * 0.15), abs=1e-6)


def test_two_moons_integral_has_converged():
    """128 nodes against 100 000 equal steps, where the density is highest and where it is not."""
    density, x = TwoMoons(), torch.tensor([[0.5, 0.0], [-0.5, 0.75], [0.3, 0.1], [1.5, 1.5]], dtype=torch.float64)
    angle = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 * math.pi
    arc = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], -1)
    squares = (x[:, None] - torch.cat([arc, -arc])).square().sum(-1)
    expected = (-squares / (2 * 0.1**2)).logsumexp(-1) - math.log(200_000) - math.log(2 * math.pi * 0.1**2)
    torch.testing.assert_close(density.log_prob(x), expected, atol=1e-4, rtol=0)


def test_toy_shapes_and_dtypes(name):
    density = toy_density(name)
    x = density.sample(6, seeded())
    assert x.shape == (6, 2) and x.dtype == torch.float32 and density.sample(0).shape == (0, 2)
    assert density.log_prob(x.view(2, 3, 2)).shape == (2, 3) and density.log_prob(x[0]).shape == ()
    assert density.log_prob(x).dtype == torch.float32 and density.log_prob(x.double()).dtype == torch.float64
    assert density.sample(6, seeded()).equal(x) and not density.sample(6, seeded(1)).equal(x)
    torch.testing.assert_close(density.log_prob(x).double(), density.log_prob(x.double()), atol=1e-3, rtol=1e-4)


# Digits


def test_digits():
    data = digits()
    assert data.train.shape == (1438, 1, 8, 8) and data.test.shape == (359, 1, 8, 8) and data.levels == 17
    assert data.train.dtype == data.test.dtype == torch.uint8
    assert data.train.min() == 0 and data.train.max() == 16 and data.test.max() <= 16


def test_digits_are_shared_out_without_overlap():
    from sklearn.datasets import load_digits

    data = digits()
    every = torch.cat([data.train, data.test]).flatten(1).tolist()
    assert sorted(every) == sorted(torch.from_numpy(load_digits().images).int().flatten(1).tolist())


def test_the_split_of_the_digits_is_fixed():
    """Numbers of different years can be compared as long as these bytes stay."""
    data = digits()
    assert [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in (data.train, data.test)] == [
        "19991e0ace178f3a",
        "921f740504ac1d66",
    ]


def test_the_labels_of_the_digits_are_theirs():
    from sklearn.datasets import load_digits

    data, bundle = digits(), load_digits()
    known = {
        tuple(image.astype(int).flatten()): label for image, label in zip(bundle.images, bundle.target, strict=True)
    }
    for images, labels in ((data.train, data.train_labels), (data.test, data.test_labels)):
        assert labels.dtype == torch.int64
        assert labels.tolist() == [known[tuple(image)] for image in images.flatten(1).tolist()]


def test_halved_images_are_rounded_means():
    train = torch.tensor([[0, 1, 255, 255], [0, 1, 254, 255], [9, 9, 0, 0], [9, 9, 0, 1]], dtype=torch.uint8)
    images = Images(train.view(1, 1, 4, 4), train.view(1, 1, 4, 4).flip(3), 256, torch.tensor([7]))
    half = images.halved()
    assert half.train.tolist() == [[[[1, 255], [9, 0]]]]  # 0.5 goes up, 254.75 as well, 0.25 down
    assert half.test.tolist() == [[[[255, 1], [0, 9]]]]
    assert half.train.dtype == torch.uint8 and half.levels == 256 and half.train_labels.equal(images.train_labels)


def test_odd_images_are_not_halved():
    images = digits().halved().halved()
    with pytest.raises(ValueError, match="1 × 1 pixels, which cannot be halved; wanted even numbers"):
        images.halved().halved()
