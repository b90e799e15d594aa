"""``python -m cnfkit``: configurations, runs that stop and go on, and what is said when something is wrong."""

import csv
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cnfkit as ck
from cnfkit import checkpoint as files
from cnfkit.__main__ import main
from cnfkit.config import FOLDER, IMAGES, Config, ConfigError, Points, find_config, image_models, own_configs
from cnfkit.settings import data_folder

TINY = """
[data]
name = "two_moons"
points = 200

[model]
name = "realnvp"
layers = 2
hidden = [4]

[training]
steps = 12
batch = 16
records = 4
ema = 0.9
"""
TINY_DIGITS = """
[data]
name = "digits"

[model]
name = "ffjord"
hidden = [4]
scales = 1
blocks = 1

[loss]
grid = "uniform"
steps = 1
trace = "hutchinson"

[training]
steps = 4
batch = 16
records = 2

[evaluation]
trace = "hutchinson"
tolerance = 1e-2
"""
CONFIG_OF_A_GRID = TINY + '[evaluation]\nmethod = "rk4_38"\nsteps = 8\n'
TINY_CNF = """
[data]
name = "pinwheel"
points = 100

[model]
name = "ffjord"
hidden = [4]

[loss]
penalties = { kinetic_energy = 0.01 }

[training]
steps = 4
batch = 16
records = 2

[evaluation]
tolerance = 1e-3
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "tiny") -> str:
    (folder / f"{name}.toml").write_text(text)
    return f"{name}.toml"


def said(capsys, *arguments: str, status: int = 0) -> str:
    """What a command prints, where it should; it ends with the status."""
    assert main(list(arguments)) == status
    out, err = capsys.readouterr()
    assert (err == "") == (status == 0)
    return err if status else out


# Configurations


@pytest.mark.parametrize("name", own_configs())
def test_own_configurations_train(name, here, capsys):
    """With two steps on few points."""
    text = (FOLDER / f"{name}.toml").read_text()
    config = Config.of(text, name)
    if config.data["name"] == "mnist" and not (data_folder() / "mnist").is_dir():
        pytest.skip("MNIST is not there")
    points = config.points()
    model = config.built(points)
    loss = config.loss_of(model)
    options = config.training | {"steps": 2, "batch": 4, "records": 1}
    history = ck.fit(loss, points.train[:20], validation=points.train[:4], progress=False, **options)
    assert all(map(np.isfinite, history.train + history.validation))
    said = (Path(ck.__file__).parents[1] / "README.md").read_text()
    assert f"`{name}`" in said or f"`{name.replace('_', '-')}`" in said


def test_the_recipe_for_mnist_is_that_of_the_paper():
    config = Config.of(find_config("mnist-rnode-paper")[1], "mnist_rnode_paper")
    images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    model = config.built(Points(images, 0.1, images, levels=256))
    assert sum(p.numel() for p in model.parameters()) == 800_636
    loss = config.loss_of(model)
    assert loss.unit == "bits" and loss.penalties == {"kinetic_energy": 0.01, "jacobian_energy": 0.01}
    assert loss.solve == ck.Solve(
        trace="hutchinson", noise="gaussian", method="rk4_38", times=ck.uniform_grid(4), reduction="mean"
    )
    assert config.training["batch"] == 200 and config.training["steps"] == 100 * 54_000 // 200


@pytest.mark.parametrize("model", image_models())
def test_every_model_of_images_takes_every_set(model):
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    assert set(shapes) == set(IMAGES)
    for data, shape in shapes.items():
        name, text = find_config(f"{data}-{model}".replace("_", "-"))
        config = Config.of(text, name)
        assert name == f"{data}_{model}" and config.data == {"name": data}
        if not (FOLDER / f"{name}.toml").is_file():
            assert config.model["alpha"] == (1e-5 if "mnist" in data else 0.05)
        images = torch.zeros(4, *shape, dtype=torch.uint8)
        if data == "digits":
            model_of_it = config.built(Points(images, 0.1, images, levels=17))
            options = config.training | {"steps": 1, "batch": 4, "records": 1}
            history = ck.fit(config.loss_of(model_of_it), images, validation=0, progress=False, **options)
            assert np.isfinite(history.train[0])
        config.loss_of(config.shaped(shape, 256))


def test_a_flow_of_images_is_judged_on_a_grid_that_is_asked_for():
    config = Config.of(find_config("mnist-rnode")[1] + "method = 'rk4'\nsteps = 8\n".replace("'", '"'), "own")
    assert "tolerance" in config.evaluation
    with pytest.raises(ConfigError, match=r"own: \[evaluation\]: times and tolerance are both given"):
        config.solve()
    solve = Config.of(CONFIG_OF_A_GRID, "own").solve()
    assert solve.times == ck.uniform_grid(8) and solve.method == "rk4_38"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("[data]", "[dat]"), "tiny.toml: a section has 'dat'; wanted data, evaluation, loss, model, training"),
        (("steps = 12", "step = 12"), "tiny.toml: [training] has 'step'; wanted accumulate, batch, clip, ema,"),
        (("steps = 12", ""), "tiny.toml: [training] has no steps; wanted their number"),
        (("layers = 2", "depth = 2"), "tiny.toml: [model] of the name 'realnvp' has 'depth'; wanted"),
        (('"realnvp"', '"realNVP"'), "tiny.toml: [model] name is 'realNVP'; wanted one of nice, realnvp, glow"),
        (('name = "realnvp"', ""), "tiny.toml: [model] name is missing; wanted one of nice, realnvp"),
        (('"two_moons"', '"moons"'), "tiny.toml: [data] name is 'moons'; wanted one of two_moons, eight_gaussians"),
        (("points = 200", "points = 2"), "tiny.toml: [data] points is 2; wanted a whole number of at least 10"),
        (('name = "two_moons"', ""), "tiny.toml: [data] has ['points']; wanted a name or a file, one of the two"),
        (("layers = 2", "layers = 0"), "tiny.toml: [model]: layers is 0; wanted a whole number of at least 1"),
        (("steps = 12", "steps = 0"), "tiny.toml: [training]: steps is 0; wanted a whole number of at least 1"),
        (("steps = 12", "steps = "), "tiny.toml is no TOML file: "),
        (("steps = 12", "steps = 12\nseed = 1.5"), "tiny.toml: [training]: seed is 1.5; wanted a whole number"),
        (("layers = 2", "context = 2"), "tiny.toml: [model] of the name 'realnvp' has 'context'; wanted"),
        (('name = "two_moons"', "file = 3"), "[data] file is 3; wanted points in a .npy or .csv file"),
        (('[data]\nname = "two_moons"\npoints = 200', "data = 3"), "tiny.toml: data is 3; wanted a section, [data]"),
        (("[training]", '[loss]\nkind = "nll"\n[training]'), "[loss] kind is 'nll'; wanted one of likelihood, flow_ma"),
        (("[training]", "[loss]\nsteps = 4\n[training]"), "[loss] of a model without a CNF has 'steps'; wanted noise"),
        (("[training]", "[evaluation]\nsolver = 4\n[training]"), "[evaluation] has 'solver'; wanted control_logdet"),
        (("[training]", "[evaluation]\ntolerance = 0\n[training]"), "[evaluation]: tolerance is 0; wanted a positive"),
        (('name = "two_moons"', 'file = "points.txt"'), "[data] file is 'points.txt'; wanted points in a .npy or .csv"),
        (('name = "two_moons"', 'file = "points.csv"'), "[data] file is 'points.csv', which is not there (seen from"),
    ],
)
def test_bad_configurations(here, capsys, changes, message):
    text = TINY.replace(*changes)
    assert text != TINY
    error = said(capsys, "train", write(here, text), status=1)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (here / "runs").exists()


def test_grids_of_a_cnf(here, capsys):
    config = Config.of(TINY_CNF, "tiny")
    points = config.points()

    def loss(extra: str) -> ck.NegativeLogLikelihood:
        changed = Config.of(TINY_CNF.replace("[loss]", f"[loss]\n{extra}"), "tiny")
        return changed.loss_of(changed.built(points))

    assert isinstance(loss("").solve, ck.FrozenGrid) and loss("every = 7").solve.every == 7
    assert isinstance(loss('grid = "jittered"\nsteps = 3').solve, ck.JitteredGrid)
    assert loss('grid = "uniform"\nsteps = 3').solve == ck.Solve(method="rk4", times=ck.uniform_grid(3))
    assert loss('grid = "adaptive"\ntolerance = 0.1').solve == ck.Solve(tolerance=0.1)
    assert loss("").evaluation == ck.Solve(tolerance=1e-3)
    with pytest.raises(ConfigError, match=r"tiny: \[loss\] with the grid 'uniform' has 'every'; wanted"):
        loss('grid = "uniform"\nevery = 3')
    with pytest.raises(ConfigError, match=r"tiny: \[loss\] grid is 'fixed'; wanted one of frozen, uniform"):
        loss('grid = "fixed"')
    with pytest.raises(ConfigError, match=r"tiny: \[loss\]: penalties has 'energy'"):
        changed = Config.of(TINY_CNF.replace("kinetic_energy", "energy"), "tiny")
        changed.loss_of(changed.built(points))


def test_an_unknown_configuration(here, capsys):
    error = said(capsys, "train", "three_moons", status=1)
    assert "CONFIG is 'three_moons'; wanted a TOML file, or one of digits" in error
    assert "or DATA-MODEL with data digits, mnist, fashion_mnist, cifar10 and model ffjord, glow, realnvp" in error
    with pytest.raises(ConfigError):
        find_config("absent.toml")


# Points of one's own


@pytest.mark.parametrize("kind", ["npy", "csv", "csv with names"])
def test_points_of_ones_own(here, capsys, kind):
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)).numpy() * [1, 2, 3]
    if kind == "npy":
        np.save("own.npy", x)
    else:
        np.savetxt("own.csv", x, delimiter=",", header="a,b,c" if "names" in kind else "", comments="")
    text = TINY.replace('name = "two_moons"\npoints = 200', f'file = "own.{kind[:3]}"')
    points = Config.of(text, "tiny").points()
    parts = [points.train, points.validation, points.test]
    assert [len(part) for part in parts] == [80, 10, 10]
    rows = torch.cat(parts)
    assert rows[rows[:, 0].argsort()].equal(torch.from_numpy(x).float()[torch.from_numpy(x[:, 0]).argsort()])
    assert "test: " in said(capsys, "train", write(here, text))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,2\n3\n" * 20, "does not hold points"),
        ("a,b\nc,d\n" * 20, "does not hold points"),
        ("1,NA\n" + "1,2\n" * 20, "does not hold points"),
        ("1,2\n" * 5, "holds numbers of shape (5, 2), 0 of them not finite; wanted at least 20 rows"),
        ("1,nan\n" * 30, "30 of them not finite"),
        ("", "does not hold points"),
    ],
)
def test_bad_points_of_ones_own(here, capsys, content, message):
    (here / "own.csv").write_text(content)
    text = TINY.replace('name = "two_moons"\npoints = 200', 'file = "own.csv"')
    assert message in said(capsys, "train", write(here, text), status=1)


def test_a_pickle_is_not_opened(here, capsys):
    np.save("own.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    text = TINY.replace('name = "two_moons"\npoints = 200', 'file = "own.npy"')
    assert "does not hold points" in said(capsys, "train", write(here, text), status=1)


# Runs


def test_a_run_and_its_files(here, capsys):
    out = said(capsys, "train", write(here, TINY))
    folder = here / "runs" / "tiny"
    names = ["config.toml", "curves.png", "log.csv", "model.safetensors", "run.safetensors"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert (folder / "config.toml").read_text() == TINY
    with open(folder / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]
    assert list(rows[0]) == ["step", "seconds", "train", "validation", "nll"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    facts = ck.inspect(folder / "model.safetensors").facts
    assert facts["config"] == Config.of(TINY, "tiny").as_dict() and facts["history"]["ended"] == "steps"
    assert [float(row["validation"]) for row in rows] == pytest.approx(facts["history"]["validation"])
    measured = out.splitlines()[-1]
    assert measured.startswith("test: ") and "the entropy of the truth is 1.0" in measured
    for name in ("tiny.toml", "runs/tiny", "runs/tiny/model.safetensors"):
        assert said(capsys, "evaluate", name) == measured + "\n"
    assert said(capsys, "evaluate", "tiny.toml", "--rows", "50") != measured + "\n"


def test_a_run_of_a_cnf_records_its_solver(here, capsys):
    said(capsys, "train", write(here, TINY_CNF))
    with open("runs/tiny/log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(float(row["evaluations"]) > 5 for row in rows)
    assert all(0 <= float(row["solver_error"]) < 1e-2 and float(row["kinetic_energy"]) >= 0 for row in rows)


def test_samples(here, capsys):
    said(capsys, "train", write(here, TINY))
    out = said(capsys, "sample", "tiny.toml", "-n", "1500")
    assert out.startswith("1500 samples of shape (2,) in runs/tiny/samples.npy\n")
    x = np.load("runs/tiny/samples.npy")
    assert x.shape == (1500, 2) and np.isfinite(x).all() and len(np.unique(x, axis=0)) == 1500
    assert Path("runs/tiny/samples.png").read_bytes().startswith(b"\x89PNG")
    said(capsys, "sample", "tiny.toml", "-n", "1500", "--to", "new/again.csv")
    np.testing.assert_allclose(np.loadtxt("new/again.csv", delimiter=","), x, rtol=1e-6)
    said(capsys, "sample", "tiny.toml", "-n", "1500", "--seed", "1", "--to", "other.npy")
    assert not np.array_equal(np.load("other.npy"), x)
    assert "to is 'x.txt'; wanted a .npy or .csv file" in said(capsys, "sample", "tiny.toml", "--to", "x.txt", status=1)


def test_samples_of_images(here, capsys):
    text = TINY.replace('name = "two_moons"\npoints = 200', 'name = "digits"').replace("[4]", "4")
    said(capsys, "train", write(here, text.replace("steps = 12", "steps = 1")))
    said(capsys, "sample", "tiny.toml", "-n", "7")
    x = np.load("runs/tiny/samples.npy")
    assert x.shape == (7, 1, 8, 8) and x.min() >= 0 and x.max() <= 16
    assert Path("runs/tiny/samples.png").is_file()


def weights(folder: str) -> dict[str, torch.Tensor]:
    return files.read(Path(folder) / "model.safetensors")[0]


def assert_same_weights(one: str, other: str) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_minutes_end_a_run_that_then_goes_on(here, capsys):
    config = write(here, TINY)
    said(capsys, "train", config, "--output", "straight")
    out = said(capsys, "train", config, "--output", "parts", "--minutes", "1e-9")
    assert "stopped at step 1 of 12" in out and "--resume --output parts" in out and "test" not in out
    out = said(capsys, "train", config, "--output", "parts", "--resume", "--minutes", "1e-9")
    assert "step 2 of 12" in out
    out = said(capsys, "train", config, "--output", "parts", "--resume")
    assert "step 12 of 12" in out and "go on with" not in out
    assert_same_weights("straight", "parts")
    with open("parts/log.csv") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    assert len(seconds) == 4 and seconds == sorted(seconds)


def test_a_finished_run_is_not_trained_again(here, capsys):
    config = write(here, TINY)
    first = said(capsys, "train", config).splitlines()[-1]
    content = Path("runs/tiny/run.safetensors").read_bytes()
    assert said(capsys, "train", config, "--resume").splitlines()[-1] == first
    assert Path("runs/tiny/run.safetensors").read_bytes() == content


def test_a_run_is_not_overwritten(here, capsys):
    config = write(here, TINY)
    said(capsys, "train", config)
    content = {p.name: p.read_bytes() for p in (here / "runs/tiny").iterdir()}
    assert "runs/tiny holds a run; --resume goes on with it" in said(capsys, "train", config, status=1)
    write(here, TINY.replace("layers = 2", "layers = 3"))
    error = said(capsys, "train", config, "--resume", status=1)
    assert (
        "runs/tiny holds a run with [model] layers = 2, now it is 3; --output takes another folder, or delete this one"
        in error
    )
    write(here, TINY + "\n[evaluation]\ntolerance = 1e-3\n")
    assert "[evaluation] tolerance = None, now it is 0.001" in said(capsys, "train", config, "--resume", status=1)
    write(here, TINY + "\nseed = 0\n")  # what it is anyway
    said(capsys, "train", config, "--resume")
    content |= {name: (here / "runs/tiny" / name).read_bytes() for name in ("config.toml", "curves.png", "log.csv")}
    content["model.safetensors"] = (here / "runs/tiny/model.safetensors").read_bytes()
    assert content == {p.name: p.read_bytes() for p in (here / "runs/tiny").iterdir()}


def test_weights_that_are_not_there(here, capsys):
    config = write(here, TINY)
    error = said(capsys, "evaluate", config, status=1)
    assert "no weights at runs/tiny/model.safetensors; train first: python -m cnfkit train tiny.toml" in error
    ck.save(here / "other.safetensors", torch.nn.Linear(1, 1))
    assert "has no configuration inside" in said(capsys, "sample", "other.safetensors", status=1)


@pytest.mark.parametrize(
    "arguments", [["train"], ["grow", "tiny"], ["train", "x", "--minutes", "0"], ["sample", "x", "-n", "0"]]
)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_cleanly(here, capsys, name):
    """And the run goes on to the bits of one that nobody stopped."""
    config = write(here, TINY.replace("steps = 12", "steps = 400"))
    environment = os.environ | {"PYTHONPATH": str(Path(ck.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "cnfkit", "train", config, "--output", "parts"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(6000):
        if Path("parts/log.csv").exists() or run.poll() is not None:
            break
        time.sleep(0.01)
    number = getattr(signal, name)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number, (out, err)
    assert f"stopped by {name} at step 1" in out
    assert "of 400; go on with: python -m cnfkit train tiny.toml --resume --output parts" in out
    assert "Traceback" not in err and f"{name}: ends after this step" in err
    assert 100 <= ck.inspect("parts/run.safetensors").facts["step"] < 200
    said(capsys, "train", config, "--output", "parts", "--resume")
    said(capsys, "train", config, "--output", "straight")
    assert_same_weights("straight", "parts")


def test_a_full_disk_leaves_the_last_good_state(here, capsys, monkeypatch):
    """Every write fails after some: the run ends with one line that says why, and can be taken up."""
    config, replace, count = write(here, TINY), os.replace, []

    def full(*arguments):
        count.append(arguments)
        if len(count) > 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(arguments[1]))
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", full)
    error = said(capsys, "train", config, "--output", "parts", status=1)
    assert "o space left" in error and error.count("\n") == 1
    assert not [p for p in Path("parts").iterdir() if p.name.startswith(".")]
    monkeypatch.setattr(os, "replace", replace)
    said(capsys, "train", config, "--output", "parts", "--resume")
    said(capsys, "train", config, "--output", "straight")
    assert_same_weights("straight", "parts")


def test_digits_are_measured_in_several_ways(here, capsys):
    """Bounds with their draws, the figure at the bin centres under its name, and one line for each tolerance."""
    config = write(here, TINY_DIGITS)
    said(capsys, "train", config, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    out = said(
        capsys, "evaluate", config, "--draws", "3", "--bin-centres", "--rows", "40", "--tolerance", "1e-2", "1e-3"
    )
    assert not torch.are_deterministic_algorithms_enabled()
    first, second = out.splitlines()
    assert first.startswith("within 0.01: test: ") and second.startswith("within 0.001: test: ")
    pattern = r"test: (\S+) ± \S+ bits/dim, importance-weighted with 3 draws (\S+), at bin centres \(no bound\) (\S+),"
    bound, weighted, _ = map(float, re.search(pattern, first).groups())
    assert weighted < bound
    assert said(capsys, "evaluate", config, "--rows", "40") == said(capsys, "evaluate", config, "--rows", "40")


def test_the_help_names_the_configurations(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(name in out for name in own_configs())


def test_points_of_ones_own_are_in_their_own_units(here, capsys):
    """Whatever their scale, and the first row of a file that other programs mark as Unicode is a row."""
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).numpy() * [1000, 0.001] + [50_000, 7]
    np.savetxt("own.csv", x, delimiter=",", encoding="utf-8-sig")
    text = TINY.replace('name = "two_moons"\npoints = 200', 'file = "own.csv"')
    config = Config.of(text, "tiny")
    assert len(config.points().train) == 240
    out = said(capsys, "train", write(here, text))
    assert float(out.split("test: ")[1].split()[0]) == pytest.approx(2 * 0.5 * np.log(2 * np.pi * np.e), abs=0.7)
    said(capsys, "sample", "runs/tiny", "-n", "400")
    samples = np.load("runs/tiny/samples.npy")
    np.testing.assert_allclose(samples.mean(0), [50_000, 7], rtol=0.02)
    (here / "own.csv").rename(here / "elsewhere.csv")
    said(capsys, "sample", "runs/tiny", "-n", "4")
    np.savetxt("own.csv", x[1:], delimiter=",")
    error = said(capsys, "evaluate", "runs/tiny", status=1)
    assert "own.csv is not the file that the model was trained on; wanted the same" in error


def test_a_run_is_evaluated_as_its_configuration_says_now(here, capsys):
    said(capsys, "train", write(here, TINY_CNF))
    coarse = said(capsys, "evaluate", "tiny.toml")
    write(here, TINY_CNF.replace("tolerance = 1e-3", "tolerance = 1e-5"))
    fine = said(capsys, "evaluate", "tiny.toml")
    assert coarse != fine == said(capsys, "evaluate", "tiny.toml") and coarse == said(capsys, "evaluate", "runs/tiny")


def test_images_are_evaluated_with_the_same_noise(here, capsys):
    text = TINY.replace('name = "two_moons"\npoints = 200', 'name = "digits"').replace("[4]", "4")
    out = said(capsys, "train", write(here, text.replace("steps = 12", "steps = 1")))
    assert said(capsys, "evaluate", "tiny.toml") == out.splitlines()[-1] + "\n"


def test_a_run_that_diverges_leaves_its_best_weights(here, capsys):
    text = TINY.replace("records = 4", "records = 12\nlr = 1e22\nrecoveries = 0")
    error = said(capsys, "train", write(here, text), status=1)
    assert "try a smaller lr" in error and error.count("\n") == 1
    assert all(value.isfinite().all() for value in weights("runs/tiny").values())
    assert "samples" in said(capsys, "sample", "runs/tiny", "-n", "4")


def test_minutes_and_patience(here, capsys):
    config = write(here, TINY.replace("records = 4", "records = 4\npatience = 2"))
    assert "stopped at step 1 of 12" in said(capsys, "train", config, "--minutes", "1e-9")


def test_drafts_of_a_run_that_was_killed_are_removed(here, capsys):
    (here / "runs/tiny").mkdir(parents=True)
    for name in (".log.csv.123", ".config.toml.9", ".mine"):
        (here / "runs/tiny" / name).write_text("")
    said(capsys, "train", write(here, TINY))
    assert [p.name for p in (here / "runs/tiny").iterdir() if p.name.startswith(".")] == [".mine"]
