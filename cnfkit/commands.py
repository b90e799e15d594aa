"""What ``python -m cnfkit`` does: train, evaluate and sample what a configuration describes."""

from __future__ import annotations

import csv
import io
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cnfkit import distributed, figures
from cnfkit.atomic import put, remove_drafts
from cnfkit.checkpoint import CheckpointError, inspect, load, save
from cnfkit.config import FIT, Config, ConfigError, Points, find_config
from cnfkit.dequantise import Dequantised
from cnfkit.evaluation import Evaluation
from cnfkit.evaluation import evaluate as measure
from cnfkit.flow import Flow
from cnfkit.ode.solve import Solve
from cnfkit.rows import fingerprint
from cnfkit.run import History
from cnfkit.settings import device
from cnfkit.shards import parts
from cnfkit.training import fit

CONFIG, RUN, WEIGHTS, LOG, CURVES = "config.toml", "run.safetensors", "model.safetensors", "log.csv", "curves.png"
CHUNK = 1000  # points that are sampled at once


def train(config: str, output: str | None = None, resume: bool = False, minutes: float | None = None) -> int:
    """Train, or go on; write configuration, checkpoint, log, curves and weights into the run's folder.

    Returns:
        The exit status: 0, or 128 and the number of the signal that ended the run before its time.
    """
    began, (name, text) = time.monotonic(), find_config(config)
    settings = Config.of(text, f"{name}.toml")
    folder = Path(output) if output else Path("runs") / name
    _require_free(folder, settings, resume)
    distributed.wait()  # before the first process writes into the folder
    where, points = device(), settings.points()
    model = settings.built(points).to(where)
    loss = settings.loss_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    if first := distributed.rank() == 0:
        for file in (CONFIG, LOG, CURVES):
            remove_drafts(folder / file)
        put(folder / CONFIG, text.encode())
    log = Log(folder / LOG, resume, began)
    print(f"{name}: {len(points.train)} points, {_count(model)} parameters, on {where.type}; writes to {folder}/")
    facts = {"config": settings.as_dict(), "event_shape": points.train.shape[1:], "levels": points.levels}
    facts["data"] = fingerprint((points.train, points.test))

    with signals() as came:
        try:
            history = fit(
                loss,
                points.train,
                validation=points.validation,
                checkpoint=folder / RUN,
                report=log.write,
                stop=lambda: bool(came) or (minutes is not None and time.monotonic() - began >= 60 * minutes),
                **settings.training,
            )
        except FloatingPointError:  # the model has the weights that did best before
            if first:
                save(folder / WEIGHTS, model, **facts, seconds=log.seconds())
            raise
    facts |= {"history": asdict(history), "seconds": log.seconds()}
    if first:
        save(folder / WEIGHTS, model, **facts)
        if history.steps:
            draw_curves(history, folder / CURVES)
    distributed.wait()
    step = f"step {inspect(folder / RUN).facts['step']} of {settings.training['steps']}"
    if history.ended == "stop":
        why = f" by {signal.Signals(came[0]).name}" if came else ""
        print(f"stopped{why} at {step}; {_how_to_go_on(config, output)}")
        return 128 + came[0] if came else 0
    result = _measured(model, points, settings.solve())
    if first:
        save(folder / WEIGHTS, model, **facts, test=asdict(result))
    print(f"{step}, weights of step {history.best_step}")
    print(_said(result, points))
    return 0


def evaluate(
    config: str,
    output: str | None = None,
    rows: int | None = None,
    draws: int = 1,
    bin_centres: bool = False,
    tolerance: list[float] | None = None,
) -> int:
    """Print the likelihood of the test points under the weights of a run, once for each tolerance that is named."""
    model, settings, facts, _ = restored(config, output)
    points = settings.points()
    if "file" in settings.data and fingerprint((points.train, points.test)) != facts["data"]:
        raise ConfigError(f"{settings.data['file']} is not the file that the model was trained on; wanted the same")
    for within in tolerance or [None]:
        solve = settings.solve() if within is None else settings.solve().within(within)
        result = _measured(model, points, solve, rows, draws=draws, bin_centres=bin_centres)
        print(_said(result, points) if within is None else f"within {within:g}: {_said(result, points)}", flush=True)
    return 0


def sample(config: str, output: str | None = None, n: int = 1000, seed: int = 0, to: str | None = None) -> int:
    """Write samples into a file, and a picture of them where there is one to draw."""
    model, settings, _, folder = restored(config, output)
    path = Path(to) if to else folder / "samples.npy"
    if path.suffix not in (".npy", ".csv"):
        raise ConfigError(f"to is {str(path)!r}; wanted a .npy or .csv file")
    generator, solve, rows = torch.Generator().manual_seed(seed), settings.solve(), []
    for k in range(0, n, CHUNK):
        rows.append(model.sample(min(CHUNK, n - k), None, solve, generator).cpu())
    x = torch.cat(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    if path.suffix == ".npy":
        np.save(content, x.numpy())
    else:
        np.savetxt(content, x.flatten(1).numpy(), delimiter=",", fmt="%.9g")
    put(path, content.getvalue())
    print(f"{n} samples of shape {tuple(x.shape[1:])} in {path}")
    if picture := draw_samples(x, model):
        put_picture(path.with_suffix(".png"), picture)
        print(f"a picture of them in {path.with_suffix('.png')}")
    return 0


def restored(config: str, output: str | None) -> tuple[Flow | Dequantised, Config, dict, Path]:
    """The model of a run with its weights, its configuration and facts, and the folder where it lies.

    ``config`` is the run's folder, its weights, or the file or the name of a configuration; that file then says how the
    model is evaluated.
    """
    path, evaluation = Path(config), None
    if path.is_dir():
        path = path / WEIGHTS
    elif path.suffix != ".safetensors":
        name, text = find_config(config)
        path, evaluation = Path(output or Path("runs") / name) / WEIGHTS, Config.of(text, f"{name}.toml").evaluation
    if not parts(path):
        raise FileNotFoundError(f"no weights at {path}; train first: python -m cnfkit train {config}")
    facts = inspect(path).facts
    if not {"config", "event_shape", "levels"} <= set(facts):
        raise CheckpointError(f"{path} has no configuration inside; wanted the {WEIGHTS} of a run")
    settings = Config.from_dict(facts["config"], str(path))
    if evaluation is not None:
        settings = replace(settings, evaluation=evaluation)
    model = settings.shaped(facts["event_shape"], facts["levels"])
    load(path, model)
    return model.to(device()).eval(), settings, facts, path.parent


class Log:
    """A table of the run's records, written whole after each.

    Args:
        path: of the CSV file; with ``resume``, the seconds that stand in it are kept.
    """

    def __init__(self, path: Path, resume: bool, began: float) -> None:
        self.path, self.began, self.clock = path, began, {}
        if resume and path.is_file():
            with open(path, encoding="utf-8", newline="") as file:
                self.clock = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader(file) if row["seconds"]}
        self.before = max(self.clock.values(), default=0.0)

    def seconds(self) -> float:
        """Since the run began, without the time between its parts."""
        return round(self.before + time.monotonic() - self.began, 1)

    def write(self, history: History) -> None:
        self.clock[history.steps[-1]] = self.seconds()
        columns = {"step": history.steps, "seconds": [self.clock.get(step, "") for step in history.steps]}
        columns |= {"train": history.train, "validation": history.validation, "solver_error": history.solver_error}
        columns = {name: column for name, column in (columns | history.terms).items() if column}
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        put(self.path, table.getvalue().encode())


def draw_curves(history: History, path: Path) -> None:
    """Losses, and what changes of the solver's error and the evaluations, against the steps, as a picture."""
    lower = {"solver error": history.solver_error, "evaluations": history.terms.get("evaluations", [])}
    lower = {name: values for name, values in lower.items() if len(set(values)) > 1}
    with plt.rc_context(figures.STYLE):
        fig = Figure(figsize=(7, 3.2 + 1.8 * len(lower)))  # no pyplot: it would want a display
        top, *others = fig.subplots(1 + len(lower), 1, sharex=True, squeeze=False)[:, 0]
        top.plot(history.steps, history.train, color=figures.CYCLE[0], label="training")
        if history.validation:
            top.plot(history.steps, history.validation, color=figures.CYCLE[1], label="held out")
        top.set_ylabel("loss")
        top.legend()
        for ax, (name, values) in zip(others, lower.items(), strict=True):
            ax.plot(history.steps, values, color=figures.CYCLE[2])
            ax.set_ylabel(name)
            if name == "solver error" and min(values) > 0:
                ax.set_yscale("log")
        fig.axes[-1].set_xlabel("step")
        put_picture(path, fig)


def draw_samples(x: Tensor, model: Flow | Dequantised) -> Figure | None:
    """A picture of samples, if they are points of the plane or images."""
    with plt.rc_context(figures.STYLE):
        if x.shape[1:] == (2,):
            fig = Figure(figsize=(5, 5))
            figures.points(fig.subplots(), x)
            return fig
        if x.dim() == 4 and x.shape[1] in (1, 3) and isinstance(model, Dequantised):
            fig = Figure(figsize=(6, 6))
            figures.images(fig.subplots(), x[:100], levels=model.dequantiser.levels)
            return fig
    return None


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGTERM and the first Ctrl-C in a list, for the run to end after its step; a second Ctrl-C interrupts."""
    came: list[int] = []

    def note(number: int, frame) -> None:
        if number in came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        print(f"\n{signal.Signals(number).name}: ends after this step", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def put_picture(path: Path, fig: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    content = io.BytesIO()
    fig.savefig(content, format="png", dpi=130)
    put(path, content.getvalue())


def _require_free(folder: Path, settings: Config, resume: bool) -> None:
    """Raise if the folder holds a run that would be lost, or one of another configuration."""
    if not parts(folder / RUN):
        return
    if not resume:
        raise ConfigError(f"{folder} holds a run; --resume goes on with it, --output takes another folder")
    before = Config.read(folder / CONFIG).as_dict()
    for section, now in settings.as_dict().items():
        usual = FIT if section == "training" else {}
        for name in {**before[section], **now}:
            came, wanted = (part.get(name, usual.get(name)) for part in (before[section], now))
            if came != wanted:
                raise ConfigError(
                    f"{folder} holds a run with [{section}] {name} = {came!r}, now it is {wanted!r}; --output takes "
                    "another folder, or delete this one"
                )


def _measured(model, points: Points, solve: Solve, rows: int | None = None, **options) -> Evaluation:
    test = points.test[:rows].to(next(model.parameters()).device)
    watched, batch = (200, 2000) if test.dim() == 2 else (32, 500)
    return measure(model, test, solve=solve, rows=watched, batch=batch, seed=0, **options)


def _said(result: Evaluation, points: Points) -> str:
    truth = "" if points.entropy is None else f"; the entropy of the truth is {points.entropy:.3f}"
    return f"test: {result}{truth}"


def _count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _how_to_go_on(config: str, output: str | None) -> str:
    return f"go on with: python -m cnfkit train {config} --resume" + (f" --output {output}" if output else "")
