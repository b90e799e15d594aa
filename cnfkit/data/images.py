"""Real images: scikit-learn's digits, which ship with it; MNIST, Fashion-MNIST and CIFAR-10 from their public files."""

from __future__ import annotations

import gzip
import hashlib
import math
import tarfile
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnfkit.data.download import DAMAGE, check_md5, damaged, fetch, home

# Mirrors, and the checksums of each file, of the archive or of what it unpacks to. MNIST's archives were packed more
# than once, so the original bytes are checked; the authors of Fashion-MNIST publish the md5 of their archives.
IDX = {
    "MNIST": (
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        {
            "train-images-idx3-ubyte": ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",),
            "train-labels-idx1-ubyte": ("65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",),
            "t10k-images-idx3-ubyte": ("0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",),
            "t10k-labels-idx1-ubyte": ("ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",),
        },
    ),
    "Fashion-MNIST": (
        (
            "https://fashion-mnist.s3.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        {
            "train-images-idx3-ubyte": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "f4a8712d7a061bf5bd6d2ca38dc4d50a"),
            "train-labels-idx1-ubyte": ("25c81989df183df01b3e8a0aad5dffbe", "9018921c3c673c538a1fc5bad174d6f9"),
            "t10k-images-idx3-ubyte": ("bef4ecab320f06d8554ea6380940ec79", "8181f5470baa50b63fa0f6fddb340f0a"),
            "t10k-labels-idx1-ubyte": ("bb300cfdad3c16e7a12a480ee83cd310", "15d484375f8d13e6eb1aabb0c3f46965"),
        },
    ),
}

CIFAR10 = (
    (
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
    ),
    "c32a1d4ab5d03f1284b67883e8d87530",  # md5, from www.cs.toronto.edu/~kriz/cifar.html
)
BATCHES = [f"cifar-10-batches-bin/{batch}.bin" for batch in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")]


@dataclass(frozen=True)
class Images:
    """Images as whole numbers.

    Attributes:
        train: shape ``(n, channels, height, width)``, dtype uint8.
        test: held-out images, likewise; for the last measurement only, choices are made on a part of ``train``.
        levels: the number of values that a pixel takes, 0 to ``levels - 1``.
        train_labels: the class of each image, shape ``(n,)``, dtype int64; None where there are none.
        test_labels: likewise.

    >>> images = digits()
    >>> y, _ = UniformDequantiser(images.levels)(images.train[:5])
    >>> y.shape, bool((y > 0).all() and (y < 1).all())
    (torch.Size([5, 1, 8, 8]), True)
    """

    train: Tensor
    test: Tensor
    levels: int
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def halved(self) -> Images:
        r"""The images at half their height and width: each pixel is the mean of 2 × 2, rounded, and a half goes up.

        .. math:: \lfloor \tfrac14 (k_{2i,2j} + k_{2i+1,2j} + k_{2i,2j+1} + k_{2i+1,2j+1}) + \tfrac12 \rfloor

        Another data set: no number for the one is comparable with a number for the other.

        Raises:
            ValueError: if the height or the width is odd.

        >>> digits().halved().train.shape
        torch.Size([1438, 1, 4, 4])
        """
        height, width = self.train.shape[-2:]
        if height % 2 or width % 2:
            raise ValueError(f"the images have {height} × {width} pixels, which cannot be halved; wanted even numbers")
        return replace(self, train=_halved(self.train), test=_halved(self.test))


def digits() -> Images:
    """Scikit-learn's handwritten digits: 1797 images of 8 × 8 pixels in 17 grey levels, a fifth of them held out.

    The split is fixed. Source: Alpaydin and Kaynak, *Optical recognition of handwritten digits*, 1998.

    >>> images = digits()
    >>> images.train.shape, images.test.shape, images.levels
    (torch.Size([1438, 1, 8, 8]), torch.Size([359, 1, 8, 8]), 17)
    >>> images.train_labels[:5]
    tensor([7, 7, 1, 9, 8])
    """
    from sklearn.datasets import load_digits  # here, because it takes seconds to import

    bundle = load_digits()
    images, labels = torch.from_numpy(bundle.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(bundle.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order.split([len(images) // 5, len(images) - len(images) // 5])
    return Images(images[train], images[test], 17, labels[train].long(), labels[test].long())


def mnist(folder: str | Path | None = None) -> Images:
    """MNIST's 60 000 training and 10 000 test images of digits, 28 × 28 pixels in 256 grey levels.

    Source: LeCun, Bottou, Bengio and Haffner, *Gradient-based learning applied to document recognition*, 1998.

    Args:
        folder: where the IDX files are, packed with gzip or not. Unless given, ``mnist`` in ``CNFKIT_DATA``, else in
            ``~/.cache/cnfkit``, and what is missing is downloaded. Images without their labels are taken as they are.

    Raises:
        FileNotFoundError: if a file is not in the folder that was given.
        ValueError: if a file is damaged: it does not unpack, or its checksum is not that of the published one.
        ConnectionError: if a file is missing, and no mirror gives it.
        OSError: if a downloaded file cannot be written.
    """
    return _idx_images("MNIST", folder)


def fashion_mnist(folder: str | Path | None = None) -> Images:
    """Fashion-MNIST's 60 000 training and 10 000 test images of clothes, 28 × 28 pixels in 256 grey levels.

    Source: Xiao, Rasul and Vollgraf, *Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms*, 2017.

    Args:
        folder: as that of :func:`mnist`, with ``fashion-mnist`` for ``mnist``.

    Raises:
        FileNotFoundError, ValueError, ConnectionError, OSError: as :func:`mnist`.
    """
    return _idx_images("Fashion-MNIST", folder)


def cifar10(folder: str | Path | None = None) -> Images:
    """CIFAR-10's 50 000 training and 10 000 test photographs, 32 × 32 pixels of three colours in 256 levels.

    Source: Krizhevsky, *Learning multiple layers of features from tiny images*, 2009; the archive for C programs.

    Args:
        folder: where ``cifar-10-binary.tar.gz`` is. Unless given, ``cifar-10`` in ``CNFKIT_DATA``, else in
            ``~/.cache/cnfkit``, and the archive is downloaded if it is missing.

    Raises:
        FileNotFoundError: if the archive is not in the folder that was given.
        ValueError: if its checksum is not that of the published one, or it holds other files.
        ConnectionError: if it is missing, and no mirror gives it.
        OSError: if the downloaded archive cannot be written.
    """
    mirrors, md5 = CIFAR10
    path = home("cifar-10", folder) / "cifar-10-binary.tar.gz"
    if folder is None:
        fetch(path, mirrors, partial(check_md5, md5=md5))
    elif not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {path.parent}; without a folder, it is downloaded")
    try:
        check_md5(path, md5)
        with tarfile.open(path) as archive:
            *train, test = (_cifar(archive.extractfile(batch).read()) for batch in BATCHES)
    except DAMAGE as error:
        raise damaged(path, error) from None
    train, train_labels = map(torch.cat, zip(*train, strict=True))
    return Images(train, test[0], 256, train_labels, test[1])


def _cifar(content: bytes) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch: of each a byte for the label, then the red, green and blue pixels."""
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()


def _halved(images: Tensor) -> Tensor:
    """The means of 2 × 2 pixels, rounded; a half goes up."""
    sums = images.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).sum((-3, -1))
    return ((sums + 2) // 4).to(torch.uint8)


def _idx_images(name: str, folder: str | Path | None) -> Images:
    """The images and labels of four IDX files."""
    mirrors, checksums = IDX[name]
    paths = {file: home(name.lower(), folder) / file for file in checksums}
    if folder is None and not all(_there(path) for file, path in paths.items() if "images" in file):
        for file, path in paths.items():
            if not _there(path):
                verify = partial(_unpacked, checksums=checksums[file])
                fetch(path.with_name(f"{file}.gz"), [f"{mirror}{file}.gz" for mirror in mirrors], verify)
    found = {}
    for file, path in paths.items():
        if there := _there(path):
            try:
                found[file] = _idx(_unpacked(there, checksums[file]), 3 if "images" in file else 1)
            except ValueError as error:
                raise damaged(there, error) from None
        elif "images" in file:
            raise FileNotFoundError(
                f"{name}'s {file} (or {file}.gz) is not in {path.parent}; without a folder, it is downloaded"
            )
    images = [found[f"{part}-images-idx3-ubyte"].unsqueeze(1) for part in ("train", "t10k")]
    labels = [found.get(f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    for pictures, classes in zip(images, labels, strict=True):
        if classes is not None and len(classes) != len(pictures):
            raise ValueError(f"{path.parent} holds {len(classes)} labels for {len(pictures)} images")
    return Images(*images, 256, *(None if classes is None else classes.long() for classes in labels))


def _there(path: Path) -> Path | None:
    """The file, or its archive, whichever is there."""
    return next((file for file in (path, path.with_name(f"{path.name}.gz")) if file.is_file()), None)


def _unpacked(path: Path, checksums: tuple[str, ...]) -> bytes:
    """What a file holds, packed with gzip or not, or a ``ValueError`` unless it is what was published."""
    content = packed = path.read_bytes()
    if packed[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(packed)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"it does not unpack ({error})") from None
    algorithm = "md5" if len(checksums[0]) == 32 else "sha256"
    came = [hashlib.new(algorithm, part, usedforsecurity=False).hexdigest() for part in (content, packed)]
    if not {*came} & {*checksums}:
        raise ValueError(f"its {algorithm} is {came[0]}, wanted {' or '.join(checksums)}")
    return content


def _idx(content: bytes, dimensions: int) -> Tensor:
    """The numbers of an IDX file: two zeros, type 8 (bytes), how many dimensions, their big-endian sizes, the bytes."""
    start = 4 + 4 * dimensions
    sizes = [int(size) for size in np.frombuffer(content[4:start].ljust(start - 4, b"\0"), dtype=">i4")]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + math.prod(sizes):
        raise ValueError(f"it does not hold the {' × '.join(map(str, sizes))} bytes that it announces")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(sizes).copy())
