"""Tables come out as the papers prepare them; small files of the true raw formats stand for the published ones."""

import gzip
import hashlib
import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cnfkit import Table, table
from cnfkit.data import tables, uci

RANDOM = np.random.default_rng(0)


def zipped(path: Path, files: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {"../escaped.txt": "no", "readme.txt": "what it is", **files}.items():
            archive.writestr(name, content)


def lines(data: np.ndarray, delimiter: str, form: str = "%.18e") -> str:
    text = io.StringIO()
    np.savetxt(text, data, fmt=form, delimiter=delimiter)
    return text.getvalue()


def published(monkeypatch, name: str, *size: int) -> None:
    monkeypatch.setitem(tables.PUBLISHED, name, size)


def parts(data: Table) -> list[np.ndarray]:
    return [part.numpy() for part in (data.train, data.validation, data.test)]


def assert_equal(data: Table, expected: list[np.ndarray]) -> None:
    for part, wanted in zip(parts(data), expected, strict=True):
        assert part.dtype == np.float32
        np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-6)


# POWER


def power_text(n: int = 120, gaps: int = 20) -> tuple[str, np.ndarray]:
    """The text of the file, and the complete rows in it: seven numbers and the minute of the day."""
    text, rows = ["Date;Time;Global_active_power;...;Sub_metering_3"], []
    for k in range(n + gaps):
        hour, minute = 23 - k % 24, (7 * k) % 60
        stamp = f"{1 + k % 28}/12/2006;{hour:02}:{minute:02}:00"
        if 30 <= k < 30 + gaps:
            text.append(f"{stamp};?;?;?;?;?;?;")
        else:
            numbers = [round(x, 3) for x in RANDOM.random(4) * (5, 1, 250, 20)] + [
                float(k % 3),
                float(k % 5),
                float(k % 7),
            ]
            text.append(f"{stamp};" + ";".join(f"{x:.3f}" for x in numbers))
            rows.append([*numbers, 60 * hour + minute])
    return "\n".join(text) + "\n", np.array(rows)


def power_as_published(data: np.ndarray) -> list[np.ndarray]:
    """The published code's steps, which shuffle the rows themselves and draw the noise in this order."""
    random = np.random.RandomState(42)
    random.shuffle(data)
    data = data[:, [0, 2, 4, 5, 6, 7]]
    for columns, width in (([1], 0.01), ([0], 0.001), ([2, 3, 4], 1.0), ([5], 1.0)):
        data[:, columns] += width * random.rand(len(data), len(columns))
    train, validation, test = data[:98], data[98:108], data[108:]
    mean, deviation = data[:108].mean(0), data[:108].std(0)
    return [(part - mean) / deviation for part in (train, validation, test)]


@pytest.mark.parametrize("packed", ["text", "gz", "zip"])
def test_power(tmp_path, monkeypatch, packed):
    text, rows = power_text()
    published(monkeypatch, "power", 98, 10, 12, 6)
    file = tmp_path / "household_power_consumption.txt"
    if packed == "text":
        file.write_text(text)
    elif packed == "gz":
        Path(f"{file}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        zipped(file.with_suffix(".zip"), {file.name: text})
    data = table("power", tmp_path)
    assert data.name == "power" and data.columns[0] == "active power" and data.columns[5] == "minute of the day"
    assert data.train_target is None and len(list(tmp_path.iterdir())) == 1, "nothing is unpacked"
    assert_equal(data, power_as_published(rows.copy()))
    with pytest.raises(ValueError, match=r"power has 98, 10 and 12 rows of 6 columns; wanted \(9, .*, as published"):
        published(monkeypatch, "power", 9, 10, 12, 6)
        table("power", tmp_path)


# GAS


def test_gas(tmp_path, monkeypatch):
    """A quarter of the rows; of sensors that say the same, the last one; standardised over all rows."""
    one, two, three = RANDOM.normal(size=(3, 400))
    sensors = RANDOM.normal(size=(400, 16))
    sensors[:, 0] = 2 * one + 1
    sensors[:, 3] = one + 0.01 * sensors[:, 3]
    sensors[:, 15] = one
    sensors[:, 4], sensors[:, 5] = two, -two  # the opposite is not the same
    sensors[:, 7], sensors[:, 8] = three, three + 0.3 * sensors[:, 8]  # correlation 0.96
    everything = np.hstack([np.arange(400)[:, None] / 100, np.zeros((400, 2)), sensors])
    header = "Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels) \n"
    (tmp_path / "ethylene_CO.txt").write_text(header + lines(everything, "  ", "%.6f"))
    published(monkeypatch, "gas", 81, 9, 10, 14)
    data = table("gas", tmp_path)
    assert data.columns == tuple(f"sensor {k}" for k in range(1, 17) if k not in (1, 4))
    rows = np.round(sensors, 6)[:, [k for k in range(16) if k not in (0, 3)]]
    rows = rows[np.random.RandomState(42).permutation(400)[:100]]
    rows = (rows - rows.mean(0)) / rows.std(0, ddof=1)
    assert_equal(data, [rows[:81], rows[81:90], rows[90:]])


# HEPMASS


def hepmass_files(n: int = 60) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    """The files, in which every third row is background, and the signal of each; the test has a column more."""
    files, signal = {}, []
    for name, size in (("1000_train.csv", n), ("1000_test.csv", n // 2)):
        label = (np.arange(size) % 3 > 0).astype(float)
        features = RANDOM.normal(size=(size, 4))
        features[:, 1] = np.maximum(features[:, 1], 0)  # at zero again and again
        features[:, 3] = 500  # the same everywhere
        table = np.hstack([label[:, None], features])
        header = "# label,f0,f1,f2,f3\n"
        if "test" in name:
            table, header = np.hstack([table, table[:, :1]]), "# label,f0,f1,f2,f3,mass\n"
        files[name] = header + lines(table, ",")
        signal.append(features[label == 1][:, [0, 2]])
    return files, *signal


def hepmass_as_published(train: np.ndarray, test: np.ndarray) -> list[np.ndarray]:
    mean, deviation = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    n = len(train) // 10
    return [train[:-n], train[-n:], test]


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "text"])
def test_hepmass(tmp_path, monkeypatch, packed):
    files, train, test = hepmass_files()
    for name, text in files.items():
        (tmp_path / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    published(monkeypatch, "hepmass", 36, 4, 20, 2)
    data = table("hepmass", tmp_path)
    assert data.columns == ("f0", "f2")
    assert_equal(data, hepmass_as_published(train, test))


def test_of_hepmass_the_first_rows_are_read(tmp_path, monkeypatch):
    """The files of the papers' data end there."""
    files, train, test = hepmass_files()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(uci, "HEPMASS", {"1000_train.csv": 30, "1000_test.csv": 15})
    published(monkeypatch, "hepmass", 18, 2, 10, 2)
    assert_equal(table("hepmass", tmp_path), hepmass_as_published(train[:20], test[:10]))
    assert list(uci.HEPMASS.values()) == [30, 15]


# MINIBOONE


def test_miniboone(tmp_path, monkeypatch):
    """Signal only, without what was not measured, and without columns that are at their least again and again."""
    signal, background = RANDOM.normal(size=(43, 50)), np.zeros((20, 50))
    signal[:, 7] = np.maximum(signal[:, 7], 0)
    signal[:, 9] = np.minimum(signal[:, 9], 0)  # at its largest: that, the published code does not look for
    signal[[3, 17, 42]] = -999.0
    text = lines(np.vstack([signal, background]), "   ", "%14.6E")
    zipped(tmp_path / "miniboone.zip", {"MiniBooNE_PID.txt": f"     43    20\n{text}"})
    published(monkeypatch, "miniboone", 33, 3, 4, 49)
    data = table("miniboone", tmp_path)
    rows = np.delete(np.delete(signal, [3, 17, 42], 0), 7, 1)
    assert data.columns == tuple(f"feature {k}" for k in range(1, 51) if k != 8)
    assert_equal(data, [(part - rows[:36].mean(0)) / rows[:36].std(0) for part in (rows[:33], rows[33:36], rows[36:])])


# BSDS300, and the archive that it shares with HEPMASS


def write_maf(path: Path, files: dict[str, bytes]) -> str:
    """The archive of the MAF paper, with a pickle that nobody opens; its md5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"data/gas/ethylene_CO.pickle": b"cos\nsystem\n(S'false'\ntR.", **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "file"])
def test_bsds300(tmp_path, monkeypatch, packed):
    h5py = pytest.importorskip("h5py")
    patches, content = RANDOM.normal(size=(9, 63)), io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, rows in (("train", patches[:6]), ("validation", patches[6:7]), ("test", patches[7:])):
            file[name] = rows
    if packed:
        write_maf(tmp_path / "data.tar.gz", {"data/BSDS300/BSDS300.hdf5": content.getvalue()})
    else:
        (tmp_path / "BSDS300.hdf5").write_bytes(content.getvalue())
    published(monkeypatch, "bsds300", 6, 1, 2, 63)
    assert_equal(table("bsds300", tmp_path), [patches[:6], patches[6:7], patches[7:]])
    (tmp_path / "BSDS300.hdf5").write_bytes(content.getvalue()[:500])
    with pytest.raises(ValueError, match=r"BSDS300\.hdf5 is damaged: .*; delete it"):
        table("bsds300", tmp_path)


def test_bsds300_without_h5py(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"needs h5py: pip install 'cnfkit\[bsds300\]'"):
        table("bsds300", tmp_path)


# Downloads


def mirrored(monkeypatch, name: str, path: Path, **changes) -> None:
    """Replace the mirrors of a table by a file, after one that is not there."""
    mirrors = ("file:///nowhere/archive", path.as_uri())
    monkeypatch.setitem(uci.SOURCES, name, replace(uci.SOURCES[name], mirrors=mirrors, **changes))


def test_an_archive_is_downloaded_once(tmp_path, monkeypatch):
    text, rows = power_text()
    zipped(tmp_path / "mirror.zip", {"household_power_consumption.txt": text})
    mirrored(monkeypatch, "power", tmp_path / "mirror.zip")
    published(monkeypatch, "power", 98, 10, 12, 6)
    monkeypatch.setenv("CNFKIT_DATA", str(tmp_path / "data"))
    assert_equal(table("power"), power_as_published(rows.copy()))
    (tmp_path / "mirror.zip").unlink()
    assert_equal(table("power"), power_as_published(rows.copy()))
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")]
    assert found == ["data/power/household_power_consumption.zip"]


def test_the_archive_of_the_papers_is_verified(tmp_path, monkeypatch):
    files, train, test = hepmass_files()
    inside = {f"data/hepmass/{name}": text.encode() for name, text in files.items()}
    md5 = write_maf(tmp_path / "mirror.tar.gz", inside)
    published(monkeypatch, "hepmass", 36, 4, 20, 2)
    monkeypatch.setenv("CNFKIT_DATA", str(tmp_path / "data"))
    mirrored(monkeypatch, "hepmass", tmp_path / "mirror.tar.gz")
    with pytest.raises(ConnectionError, match=rf"its md5 is {md5}, wanted 9b9c9b03"):
        table("hepmass")
    mirrored(monkeypatch, "hepmass", tmp_path / "mirror.tar.gz", md5=md5)
    assert_equal(table("hepmass"), hepmass_as_published(train, test))
    assert (tmp_path / "data" / "maf" / "data.tar.gz").is_file()


@pytest.mark.parametrize("trouble", ["cut off", "a bad block", "another file"])
def test_a_zip_without_a_published_checksum_is_verified_by_its_own(tmp_path, monkeypatch, trouble):
    path = tmp_path / "mirror.zip"
    zipped(path, {"other.txt" if trouble == "another file" else "household_power_consumption.txt": power_text()[0]})
    content = bytearray(path.read_bytes())
    if trouble == "cut off":
        del content[-50:]
    elif trouble == "a bad block":
        content[len(content) // 2] ^= 255
    path.write_bytes(content)
    mirrored(monkeypatch, "power", path)
    monkeypatch.setenv("CNFKIT_DATA", str(tmp_path / "data"))
    with pytest.raises(
        ConnectionError, match=r"mirror\.zip: it is no zip archive with household_power_consumption\.txt"
    ):
        table("power")
    (tmp_path / "household_power_consumption.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"household_power_consumption\.zip is damaged: .*; delete it"):
        table("power", tmp_path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ethylene_CO\.txt \(or .*\.gz, or gas_mixtures\.zip\) is not in "):
        table("gas", tmp_path)
    for text in ("", "header\n", "header\n1 2 three\n", "header\n1 2 3\n", "header\n" + "1 " * 18 + "é\n"):
        (tmp_path / "ethylene_CO.txt").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"ethylene_CO\.txt is damaged: .*; delete it"):
            table("gas", tmp_path)
    (tmp_path / "1000_train.csv.gz").write_bytes(gzip.compress(b"# label,f0\n1,2\n" * 99)[:-20])
    with pytest.raises(ValueError, match=r"1000_train\.csv\.gz is damaged: "):
        table("hepmass", tmp_path)


def test_the_published_sizes():
    """Of Papamakarios, Pavlakou and Murray's table 4: the parts are a tenth, and a tenth of the others."""
    for name in ("power", "gas", "miniboone"):
        train, validation, test, _ = tables.PUBLISHED[name]
        assert test == (train + validation + test) // 10 and validation == (train + validation) // 10
    assert tables.PUBLISHED["hepmass"][1] == sum(tables.PUBLISHED["hepmass"][:2]) // 10
    assert sum(tables.PUBLISHED["power"][:3]) == 2_075_259 - 25_979, "all minutes but those with gaps"
    assert sum(tables.PUBLISHED["gas"][:3]) == round(4_208_261 / 4)
    assert sum(tables.PUBLISHED["miniboone"][:3]) == 36_499 - 11
    assert [size[3] for size in tables.PUBLISHED.values()] == [6, 8, 21, 43, 63]
    assert set(tables.PUBLISHED) == set(uci.PREPARED) == set(uci.SOURCES)


# scikit-learn's


@pytest.mark.parametrize(
    "name, sizes, dropped, sum_of_bytes",
    [
        ("wine", (115, 28, 35, 13), set(), "584d3b923ff52424"),
        ("breast_cancer", (365, 91, 113, 24), {"mean concavity", "worst concave points"}, "de2ff30b1d1d8c53"),
        ("diabetes", (284, 70, 88, 8), {"sex", "s4"}, "52cb1e5240a11c9a"),
    ],
)
def test_tables_that_ship(name, sizes, dropped, sum_of_bytes):
    from sklearn import datasets

    bundle = getattr(datasets, f"load_{name}")()
    data = table(name)
    targets = (data.train_target, data.validation_target, data.test_target)
    assert (*map(len, parts(data)), len(data.columns)) == sizes and sum(sizes[:3]) == len(bundle.data)
    assert dropped <= set(bundle.feature_names) - set(data.columns)
    assert [len(target) for target in targets] == [len(part) for part in parts(data)]
    assert data.train.dtype == torch.float32 and data.train.shape[1] == len(data.columns)
    torch.testing.assert_close(data.train.mean(0), torch.zeros(sizes[3]), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.train.std(0, correction=0), torch.ones(sizes[3]), atol=1e-5, rtol=0)
    split = b"".join((part * 1000).round().astype(np.int32).tobytes() for part in parts(data))
    assert hashlib.sha256(split).hexdigest()[:16] == sum_of_bytes, "numbers of different years are to be compared"


@pytest.mark.parametrize("name", tables.SHIPPED)
def test_targets_belong_to_their_rows(name):
    """Every row of the original is there once, with its own target: both are brought to one scale and one order."""
    from sklearn import datasets

    bundle = getattr(datasets, f"load_{name}")()
    data = table(name)
    keep = [list(bundle.feature_names).index(column) for column in data.columns]
    target = torch.cat([data.train_target, data.validation_target, data.test_target]).double()
    ours = np.hstack([np.concatenate(parts(data)), target.reshape(-1, 1)])
    theirs = np.hstack([bundle.data[:, keep], bundle.target.reshape(-1, 1)])
    ours, theirs = ((rows - rows.mean(0)) / rows.std(0) for rows in (ours, theirs))
    ours, theirs = (rows[np.lexsort(rows.round(3).T)] for rows in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    kind = (torch.float32, (442, 1)) if name == "diabetes" else (torch.int64, (len(bundle.data),))
    assert (data.train_target.dtype, (len(bundle.data), *data.train_target.shape[1:])) == kind
    if name == "diabetes":
        assert data.train_target.mean().abs() < 1e-6 and (data.train_target.std(correction=0) - 1).abs() < 1e-5
