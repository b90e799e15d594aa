"""The tables of the MAF and FFJORD papers: how each is read from its public files, cleaned and split."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cnfkit.data.download import DAMAGE, check_md5, damaged, fetch, home, member, progress_bar

UCI = "https://archive.ics.uci.edu"


@dataclass(frozen=True)
class Source:
    """An archive on public mirrors, and the folder that it is kept in.

    The UCI repository publishes no checksums: of its archives, the checksums that a zip holds are verified.
    """

    home: str
    archive: str
    mirrors: tuple[str, ...]
    md5: str | None = None

    def verify(self, inside: str, path: Path) -> None:
        """Raise a ``ValueError`` unless the archive is the published one, or holds the file undamaged."""
        if self.md5 is not None:
            return check_md5(path, self.md5)
        try:
            with zipfile.ZipFile(path) as archive, archive.open(inside) as content:
                while content.read(1 << 20):
                    pass
        except DAMAGE as error:
            raise ValueError(f"it is no zip archive with {inside} ({error})") from None


# The data of the MAF paper, doi:10.5281/zenodo.1161203, which gives the md5
MAF = Source(
    "maf",
    "data.tar.gz",
    (
        "https://zenodo.org/records/1161203/files/data.tar.gz?download=1",
        "https://zenodo.org/api/records/1161203/files/data.tar.gz/content",
    ),
    md5="9b9c9b0375315ad270eba4ce80c093ab",
)
SOURCES = {
    "power": Source(
        "power",
        "household_power_consumption.zip",
        (
            f"{UCI}/static/public/235/individual+household+electric+power+consumption.zip",
            f"{UCI}/ml/machine-learning-databases/00235/household_power_consumption.zip",
        ),
    ),
    "gas": Source(
        "gas",
        "gas_mixtures.zip",
        (
            f"{UCI}/static/public/322/gas+sensor+array+under+dynamic+gas+mixtures.zip",
            f"{UCI}/ml/machine-learning-databases/00322/data.zip",
        ),
    ),
    "miniboone": Source(
        "miniboone", "miniboone.zip", (f"{UCI}/static/public/199/miniboone+particle+identification.zip",)
    ),
    "hepmass": MAF,
    "bsds300": MAF,
}

# The first tenth of each of HEPMASS's files
HEPMASS = {"1000_train.csv": 700_000, "1000_test.csv": 350_000}


@contextmanager
def opened(table: str, folder: str | Path | None, inside: str) -> Iterator[BinaryIO]:
    """A file of a table, to read: it lies in the folder, packed with gzip or not, or inside its archive there."""
    source, file = SOURCES[table], Path(inside).name
    loose, archive = home(table, folder) / file, home(source.home, folder) / source.archive
    path = next((path for path in (loose, Path(f"{loose}.gz"), archive) if path.is_file()), None)
    if path is None and folder is not None:
        raise FileNotFoundError(
            f"{file} (or {file}.gz, or {archive.name}) is not in {folder}; without a folder, it is downloaded"
        )
    if path is None:
        path = archive
        fetch(path, source.mirrors, partial(source.verify, inside))
    try:
        with member(path, inside) as content:
            yield content
    except DAMAGE as error:
        raise damaged(path, error) from None


def numbers(file: BinaryIO, name: str, rows: int | None = None, line=str.strip, **options) -> np.ndarray:
    """The numbers in the first rows of a text; ``line`` prepares each, or makes it empty to leave it out."""
    parts = []
    with io.TextIOWrapper(file, encoding="ascii") as text, progress_bar(name, unit=" rows", unit_scale=True) as bar:
        lines = islice(text, rows)
        while block := list(islice(lines, 50_000)):
            if wanted := list(filter(None, map(line, block))):
                parts.append(np.loadtxt(wanted, ndmin=2, **options))
            bar.update(len(block))
    return np.concatenate(parts)


def cut(data: np.ndarray, nth: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows but the last ``nth`` part of them, and those."""
    return data[: len(data) - len(data) // nth], data[len(data) - len(data) // nth :]


def split(data: np.ndarray, nth: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For training, validation and test: the last part for the test, the last part of the others for validation."""
    rest, test = cut(data, nth)
    return *cut(rest, nth), test


def standardised(*parts: np.ndarray, by: int = 2, ddof: int = 0) -> list[np.ndarray]:
    """With mean 0 and variance 1 in each column of the first ``by`` parts together."""
    those = np.concatenate(parts[:by])
    return [(part - those.mean(0)) / those.std(0, ddof=ddof) for part in parts]


def continuous(data: np.ndarray) -> list[int]:
    """The columns that have a density: those whose least value occurs five times at most."""
    return np.flatnonzero((data == data.min(0)).sum(0) <= 5).tolist()


def _power(folder):
    """A household's consumption, minute by minute: rows with gaps left out, noise within the meters' resolution."""

    def complete(line):  # 16/12/2006;17:24:00;4.216;0.418;234.840;18.400;0.000;1.000;17.000, and ? for a gap
        return "" if "?" in line else line.replace(":", ";")

    with opened("power", folder, "household_power_consumption.txt") as file:
        file.readline()
        data = numbers(file, "POWER", line=complete, delimiter=";", usecols=(4, 6, 8, 9, 10, 1, 2))
    random, n = np.random.RandomState(42), len(data)
    data = data[random.permutation(n)]
    voltage, power, meters, minute = (width * random.rand(n, k) for width, k in ((0.01, 1), (0.001, 1), (1, 3), (1, 1)))
    minutes = 60 * data[:, 5:6] + data[:, 6:]
    data = np.hstack([data[:, :5], minutes]) + np.hstack([power, voltage, meters, minute])
    columns = ("active power", "voltage", "kitchen", "laundry", "heating", "minute of the day")
    return columns, *standardised(*split(data))


def _gas(folder):
    """Sensors in a mixture of ethylene and CO: a quarter of the rows, of two that say the same only the latter."""
    with opened("gas", folder, "ethylene_CO.txt") as file:
        file.readline()
        data = numbers(file, "GAS", usecols=range(3, 19))  # after time and concentrations
    data = data[np.random.RandomState(42).permutation(len(data))[: round(len(data) / 4)]]
    alike, keep = np.corrcoef(data.T) > 0.98, list(range(data.shape[1]))
    while doubled := [k for k in keep if alike[k, keep].sum() > 1]:
        keep.remove(doubled[0])
    return [f"sensor {k + 1}" for k in keep], *standardised(*split(data[:, keep]), by=3, ddof=1)


def _hepmass(folder):
    """Collisions in which a new particle of mass 1000 arises."""
    parts = []
    for file, rows in HEPMASS.items():
        with opened("hepmass", folder, f"data/hepmass/{file}") as text:
            names = text.readline().decode().strip().split(",")[1:]
            data = numbers(text, "HEPMASS", rows, delimiter=",")
        parts.append((names, data[data[:, 0] == 1, 1:]))  # the first column is 1 for these, 0 for background
    (names, train), (_, test) = parts
    keep = continuous(train)  # the file for the test has a column more, the last
    return [names[k] for k in keep], *standardised(*cut(train[:, keep], 10), test[:, keep], ddof=1)


def _miniboone(folder):
    """Electron neutrinos in a detector; eleven that were not measured are left out."""
    with opened("miniboone", folder, "MiniBooNE_PID.txt") as file:
        data = numbers(file, "MINIBOONE", rows=int(file.readline().split()[0]))  # then the background follows
    data = data[data[:, 0] >= -100]
    keep = continuous(data)
    return [f"feature {k + 1}" for k in keep], *standardised(*split(data[:, keep]))


def _bsds300(folder):
    """Patches of 8 × 8 pixels from photographs, less their mean and without the last pixel; split as they come."""
    try:
        import h5py
    except ImportError:
        raise ImportError("table 'bsds300' is an HDF5 file, which needs h5py: pip install 'cnfkit[bsds300]'") from None
    with opened("bsds300", folder, "data/BSDS300/BSDS300.hdf5") as file:
        try:
            with h5py.File(io.BytesIO(file.read())) as data:
                parts = [data[part][:] for part in ("train", "validation", "test")]
        except OSError as error:
            raise ValueError(error) from None
    return [f"pixel {k + 1}" for k in range(parts[0].shape[1])], *parts


PREPARED = {"power": _power, "gas": _gas, "hepmass": _hepmass, "miniboone": _miniboone, "bsds300": _bsds300}
