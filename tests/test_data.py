"""Toy densities are densities; images are the published bytes."""

import functools
import gzip
import hashlib
import math
import struct
import zlib

import pytest
import torch
from builders import seeded

import cnfkit
from cnfkit import digits, mnist, toy_density
from cnfkit.data import images
from cnfkit.data.toy import DENSITIES, Checkerboard, GaussianRing, TwoMoons

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


def test_entropy_is_that_of_the_integral(name):
    """−∫ p log p by the midpoint rule, against the mean over samples: within four of its standard errors."""
    integral = torch.special.entr(log_density(name).exp()).sum().item() * AREA
    mean, error = toy_density(name).entropy(50_000)
    assert 0 <= error < 0.01 and mean == pytest.approx(integral, abs=4 * error + 1e-4)
    assert toy_density(name).entropy(1000) == toy_density(name).entropy(1000)


def test_entropies_in_closed_form():
    assert Checkerboard().entropy(1000)[0] == pytest.approx(math.log(8))
    far_apart = GaussianRing(components=8, radius=100.0, sigma=0.5)
    mean, error = far_apart.entropy()
    assert mean == pytest.approx(math.log(8) + math.log(2 * math.pi * math.e * 0.25), abs=4 * error)


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


# MNIST's files


def idx(pixels: torch.Tensor) -> bytes:
    n, _, height, width = pixels.shape
    return struct.pack(">4i", 0x00000803, n, height, width) + pixels.numpy().tobytes()


PARTS = {
    "train": torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 1, 4, 5),
    "test": torch.arange(200, 220, dtype=torch.uint8).view(1, 1, 4, 5),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with small files of MNIST's names, whose checksums stand for the published ones."""
    names = {part: name for part, (name, _) in images.MNIST_FILES.items()}
    for part, pixels in PARTS.items():
        (tmp_path / f"{names[part]}.gz").write_bytes(gzip.compress(idx(pixels)))
    publish(monkeypatch, {part: idx(pixels) for part, pixels in PARTS.items()})
    return tmp_path


def publish(monkeypatch, contents: dict[str, bytes]) -> None:
    sums = {part: hashlib.sha256(content).hexdigest() for part, content in contents.items()}
    files = {part: (name, sums[part]) for part, (name, _) in images.MNIST_FILES.items()}
    monkeypatch.setattr(images, "MNIST_FILES", files)


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_mnist_files(folder, packed):
    for file in list(folder.iterdir()):
        if not packed:
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
    data = mnist(folder)
    assert data.train.equal(PARTS["train"]) and data.test.equal(PARTS["test"]) and data.levels == 256
    data.train[0] = 0  # memory of its own: writing needs no warning


def test_mnist_is_looked_for_in_the_data_folder(folder, monkeypatch, tmp_path_factory):
    parent = tmp_path_factory.mktemp("data")
    folder.rename(parent / "mnist")
    monkeypatch.setenv("CNFKIT_DATA", str(parent))
    assert mnist().train.equal(PARTS["train"])


def test_missing_mnist(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte \(or .*\.gz\) is not in .*CNFKIT_DATA"):
        mnist(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 20, -9, -1])
def test_truncated_archive(folder, keep):
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte(\.gz)? is damaged: "):
        mnist(folder)


def test_archive_with_a_bad_block(folder):
    file = folder / "train-images-idx3-ubyte.gz"
    packed = bytearray(file.read_bytes())
    packed[10:14] = b"\xff\xff\xff\xff"  # no deflate block begins so
    with pytest.raises(zlib.error):
        gzip.decompress(bytes(packed))
    file.write_bytes(packed)
    with pytest.raises(ValueError, match="does not unpack"):
        mnist(folder)


def test_other_bytes_than_the_published(folder):
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(PARTS["test"])[:-1] + b"\x00")
    with pytest.raises(
        ValueError, match=r"t10k-images-idx3-ubyte is damaged: its sha256 is .*, wanted .*; fetch it again"
    ):
        mnist(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        idx(PARTS["train"])[:-1],
        idx(PARTS["train"]) + b"\x00",
        b"\x00\x00\x08\x01" + idx(PARTS["train"])[4:],
    ],
    ids=["empty", "shorter than its header", "a pixel too few", "a pixel too many", "labels"],
)
def test_files_that_announce_something_else(folder, monkeypatch, content):
    """Beyond the checksum, which only guards the two published files: the parser refuses what it does not read."""
    publish(monkeypatch, {"train": content, "test": idx(PARTS["test"])})
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged: it does not hold the"):
        mnist(folder)


def test_real_mnist():
    try:
        data = mnist()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    assert data.train.shape == (60_000, 1, 28, 28) and data.test.shape == (10_000, 1, 28, 28)
    assert data.train.dtype == torch.uint8 and int(data.train.max()) == 255
    # the mean grey level that everybody standardises with
    assert (data.train.double() / 255).mean().item() == pytest.approx(0.1307, abs=1e-4)
    model = cnfkit.UniformDequantiser(data.levels)
    y, _ = model(data.train[:10])
    assert model.quantise(y).equal(data.train[:10].long())
