"""Images are the published bytes, with their labels; small files of the true formats stand for them."""

import gzip
import hashlib
import io
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch

import cnfkit
from cnfkit import cifar10, fashion_mnist, mnist
from cnfkit.data import images
from cnfkit.settings import data_folder

LOADERS = {"MNIST": mnist, "Fashion-MNIST": fashion_mnist}
CONTENT = {
    "train-images-idx3-ubyte": torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5),
    "train-labels-idx1-ubyte": torch.tensor([7, 0, 9], dtype=torch.uint8),
    "t10k-images-idx3-ubyte": torch.arange(200, 220, dtype=torch.uint8).view(1, 4, 5),
    "t10k-labels-idx1-ubyte": torch.tensor([3], dtype=torch.uint8),
}


def idx(numbers: torch.Tensor) -> bytes:
    return struct.pack(f">{1 + numbers.dim()}i", 0x00000800 + numbers.dim(), *numbers.shape) + numbers.numpy().tobytes()


def publish(monkeypatch, contents: dict[str, bytes], name: str = "MNIST", mirrors: tuple[str, ...] = ()) -> None:
    sums = {file: (hashlib.sha256(content).hexdigest(),) for file, content in contents.items()}
    monkeypatch.setitem(images.IDX, name, (mirrors, sums))


@pytest.fixture(params=LOADERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with small files of both sets' names, whose checksums stand for the published ones."""
    for file, numbers in CONTENT.items():
        (tmp_path / f"{file}.gz").write_bytes(gzip.compress(idx(numbers)))
    for name in LOADERS:
        publish(monkeypatch, {file: idx(numbers) for file, numbers in CONTENT.items()}, name)
    return tmp_path


def check(data: cnfkit.Images) -> None:
    assert data.train[:, 0].equal(CONTENT["train-images-idx3-ubyte"]) and data.levels == 256
    assert data.test[:, 0].equal(CONTENT["t10k-images-idx3-ubyte"])
    assert data.train_labels.tolist() == [7, 0, 9] and data.test_labels.tolist() == [3]
    assert data.train.dtype == torch.uint8 and data.train_labels.dtype == torch.int64


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "plain"])
def test_idx_files(folder, name, packed):
    for file in list(folder.iterdir()):
        if not packed:
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
    data = LOADERS[name](folder)
    check(data)
    data.train[0] = 0  # memory of its own: writing needs no warning


def test_archives_that_are_published_by_their_own_checksum(folder, monkeypatch):
    sums = {file: (hashlib.md5((folder / f"{file}.gz").read_bytes()).hexdigest(), "0" * 32) for file in CONTENT}
    monkeypatch.setitem(images.IDX, "Fashion-MNIST", ((), sums))
    check(fashion_mnist(folder))


def test_files_are_looked_for_in_the_data_folder(folder, name, monkeypatch, tmp_path_factory):
    parent = tmp_path_factory.mktemp("data")
    folder.rename(parent / name.lower())
    monkeypatch.setenv("CNFKIT_DATA", str(parent))
    check(LOADERS[name]())


def test_images_without_labels_are_taken_as_they_are(folder, monkeypatch):
    """Also in the data folder: nothing is asked for then."""
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    folder.rename(folder.with_name("mnist"))
    monkeypatch.setenv("CNFKIT_DATA", str(folder.parent))
    for data in (mnist(), mnist(folder.with_name("mnist"))):
        assert data.train_labels is None and data.test_labels.tolist() == [3] and len(data.train) == 3


def test_what_is_missing_is_downloaded(folder, name, monkeypatch, tmp_path):
    """A mirror that is a folder; what is there already stays."""
    home = tmp_path / "data" / name.lower()
    home.mkdir(parents=True)
    file = "train-images-idx3-ubyte"
    (home / file).write_bytes(idx(CONTENT[file]))
    contents = {file: idx(numbers) for file, numbers in CONTENT.items()}
    publish(monkeypatch, contents, name, ("file:///nowhere/", f"{folder.as_uri()}/"))
    monkeypatch.setenv("CNFKIT_DATA", str(tmp_path / "data"))
    check(LOADERS[name]())
    assert sorted(path.name for path in home.iterdir()) == sorted([file, *(f"{f}.gz" for f in CONTENT if f != file)])
    folder.joinpath("t10k-images-idx3-ubyte.gz").unlink()
    check(LOADERS[name]())


def test_missing_files(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name}'s train-images-idx3-ubyte \(or .*\.gz\) is not in "):
        LOADERS[name](tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 20, -9, -1])
def test_truncated_archive(folder, keep):
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged: "):
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


@pytest.mark.parametrize("file", CONTENT)
def test_other_bytes_than_the_published(folder, file):
    (folder / file).write_bytes(idx(CONTENT[file])[:-1] + b"\x01")
    with pytest.raises(ValueError, match=rf"{file} is damaged: its sha256 is .*, wanted .*; delete it"):
        mnist(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\x00\x08",
        idx(CONTENT["train-images-idx3-ubyte"])[:-1],
        idx(CONTENT["train-images-idx3-ubyte"]) + b"\x00",
        b"\x00\x00\x08\x01" + idx(CONTENT["train-images-idx3-ubyte"])[4:],
    ],
    ids=["empty", "shorter than its header", "a pixel too few", "a pixel too many", "labels"],
)
def test_files_that_announce_something_else(folder, monkeypatch, content):
    """Beyond the checksum, which only guards the published files: the parser refuses what it does not read."""
    contents = {file: idx(numbers) for file, numbers in CONTENT.items()}
    publish(monkeypatch, contents | {"train-images-idx3-ubyte": content})
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged: it does not hold the"):
        mnist(folder)


def test_labels_of_other_images(folder, monkeypatch):
    contents = {file: idx(numbers) for file, numbers in CONTENT.items()}
    contents["t10k-labels-idx1-ubyte"] = idx(torch.tensor([1, 2], dtype=torch.uint8))
    publish(monkeypatch, contents)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(contents["t10k-labels-idx1-ubyte"])
    with pytest.raises(ValueError, match="holds 2 labels for 1 images"):
        mnist(folder)


def test_real_mnist():
    if not (data_folder() / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip("MNIST's files are not here")
    data = mnist()
    assert data.train.shape == (60_000, 1, 28, 28) and data.test.shape == (10_000, 1, 28, 28)
    assert data.train.dtype == torch.uint8 and int(data.train.max()) == 255
    # the mean grey level that everybody standardises with
    assert (data.train.double() / 255).mean().item() == pytest.approx(0.1307, abs=1e-4)
    if data.train_labels is not None:
        assert data.train_labels[:5].tolist() == [5, 0, 4, 1, 9] and int(data.test_labels.bincount()[1]) == 1135
    model = cnfkit.UniformDequantiser(data.levels)
    y, _ = model(data.train[:10])
    assert model.quantise(y).equal(data.train[:10].long())


# CIFAR-10's archive


def batch(first: int, n: int) -> bytes:
    """Records of a label, and pixels that count up through red, green and blue."""
    pixels = bytes(k % 251 for k in range(3 * 32 * 32))
    return b"".join(bytes([label]) + bytes([label]) + pixels[1:] for label in range(first, first + n))


def write_archive(path: Path, batches: dict[str, bytes]) -> str:
    """The archive, among files that nobody asked for; its md5."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"../escaped.bin": b"", "cifar-10-batches-bin/readme.html": b"<p>", **batches}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "cifar-10" / "cifar-10-binary.tar.gz"
    batches = {f"cifar-10-batches-bin/data_batch_{k}.bin": batch(k, 2) for k in (3, 1, 2, 5, 4)}
    md5 = write_archive(path, batches | {"cifar-10-batches-bin/test_batch.bin": batch(9, 1)})
    monkeypatch.setattr(images, "CIFAR10", ((), md5))
    return path


def test_cifar10(archive):
    before = sorted(archive.parent.parent.rglob("*"))
    data = cifar10(archive.parent)
    assert data.train.shape == (10, 3, 32, 32) and data.test.shape == (1, 3, 32, 32) and data.levels == 256
    assert data.train.dtype == torch.uint8 and data.train_labels.dtype == torch.int64
    assert data.train_labels.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6] and data.test_labels.tolist() == [9]
    assert data.train[:, 0, 0, 0].equal(data.train_labels.byte()), "each image has its own label"
    assert data.train[4, 1, 2, 3] == (1024 + 2 * 32 + 3) % 251, "red, green, blue, each row by row"
    assert sorted(archive.parent.parent.rglob("*")) == before, "nothing is unpacked"


def test_cifar10_is_downloaded(archive, monkeypatch, tmp_path):
    monkeypatch.setenv("CNFKIT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(images, "CIFAR10", ((archive.as_uri(),), images.CIFAR10[1]))
    assert len(cifar10().train) == 10 and (tmp_path / "data/cifar-10/cifar-10-binary.tar.gz").is_file()


def test_another_archive_than_cifar10s(archive, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary\.tar\.gz is not in .*absent"):
        cifar10("absent")
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is damaged: its md5 is \w+, wanted \w+; delete it"):
        cifar10(archive.parent)
    for batches, reason in (({}, "data_batch_1.bin"), ({"cifar-10-batches-bin/data_batch_1.bin": b"odd"}, "reshape")):
        monkeypatch.setattr(images, "CIFAR10", ((), write_archive(archive, batches)))
        with pytest.raises(ValueError, match=f"damaged: .*{reason}"):
            cifar10(archive.parent)
