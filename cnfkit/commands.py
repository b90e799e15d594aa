"""What ``python -m cnfkit`` does: train, evaluate and sample what a configuration describes."""

from __future__ import annotations

import csv
import io
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cnfkit import figures
from cnfkit.atomic import put
from cnfkit.checkpoint import CheckpointError, inspect, load, save
from cnfkit.config import Config, ConfigError, Points, find_config
from cnfkit.dequantise import Dequantised
from cnfkit.evaluation import Evaluation
from cnfkit.evaluation import evaluate as measure
from cnfkit.flow import Flow
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
    began, path = time.monotonic(), find_config(config)
    text = path.read_text(encoding="utf-8")
    settings = Config.of(text, path.name)
    folder = Path(output) if output else Path("runs") / path.stem
    _require_free(folder, settings, resume)
    where, seed = device(), settings.training.get("seed", 0)
    points = settings.points()
    model = settings.built(points, seed).to(where)
    loss = settings.loss_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / CONFIG, text.encode())
    log = Log(folder / LOG, resume, began)
    print(f"{path.name}: {len(points.train)} points, {_count(model)} parameters, on {where.type}; writes to {folder}/")

    with signals() as came:
        history = fit(
            loss,
            points.train,
            validation=points.validation,
            checkpoint=folder / RUN,
            report=log.write,
            stop=lambda: bool(came) or (minutes is not None and time.monotonic() - began >= 60 * minutes),
            **settings.training,
        )
    step, steps = _last_step(folder), settings.training["steps"]
    facts = {"step": step, "history": asdict(history), "seconds": log.seconds()}
    if came:
        save(folder / WEIGHTS, model, config=settings.as_dict(), **facts)
        print(f"stopped at step {step} of {steps} by {signal.Signals(came[0]).name}; {_how_to_go_on(config, output)}")
        return 128 + came[0]
    draw_curves(history, folder / CURVES)
    result = _measured(model, points, settings)
    save(folder / WEIGHTS, model, config=settings.as_dict(), **facts, test=asdict(result))
    early = "" if step >= steps or _is_out_of_patience(settings, history) else f"; {_how_to_go_on(config, output)}"
    print(f"step {step} of {steps}, weights of step {history.best_step}{early}")
    print(_said(result, points))
    return 0


def evaluate(config: str, output: str | None = None, rows: int | None = None) -> int:
    """Print the likelihood of the test points under the weights of a run."""
    model, settings, _ = restored(config, output)
    points = settings.points()
    print(_said(_measured(model, points, settings, rows), points))
    return 0


def sample(config: str, output: str | None = None, n: int = 1000, seed: int = 0, to: str | None = None) -> int:
    """Write samples into a file, and a picture of them where there is one to draw."""
    model, settings, folder = restored(config, output)
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


def restored(config: str, output: str | None) -> tuple[Flow | Dequantised, Config, Path]:
    """The model of a run with its weights, and where it lies: from a configuration's name, a folder or a file."""
    path = Path(config)
    if path.is_dir():
        path = path / WEIGHTS
    elif path.suffix != ".safetensors":
        path = Path(output or Path("runs") / find_config(config).stem) / WEIGHTS
    if not parts(path):
        raise FileNotFoundError(f"no weights at {path}; train first: python -m cnfkit train {config}")
    about = inspect(path)
    if "config" not in about.facts:
        raise CheckpointError(f"{path} has no configuration inside; wanted the {WEIGHTS} of a run")
    settings = Config.from_dict(about.facts["config"], str(path))
    model = settings.built(settings.points(), settings.training.get("seed", 0))
    load(path, model)
    return model.to(device()).eval(), settings, path.parent


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
        fig, axes = plt.subplots(1 + len(lower), 1, figsize=(7, 3.2 + 1.8 * len(lower)), sharex=True, squeeze=False)
        top, *others = axes[:, 0]
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
        axes[-1, 0].set_xlabel("step")
        put_picture(path, fig)


def draw_samples(x: Tensor, model: Flow | Dequantised) -> Figure | None:
    """A picture of samples, if they are points of the plane or images."""
    with plt.rc_context(figures.STYLE):
        if x.shape[1:] == (2,):
            fig, ax = plt.subplots(figsize=(5, 5))
            figures.points(ax, x)
            return fig
        if x.dim() == 4 and x.shape[1] in (1, 3) and isinstance(model, Dequantised):
            fig, ax = plt.subplots(figsize=(6, 6))
            figures.images(ax, x[:100], levels=model.dequantiser.levels)
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
    plt.close(fig)
    put(path, content.getvalue())


def _require_free(folder: Path, settings: Config, resume: bool) -> None:
    """Raise if the folder holds a run that would be lost, or one of another configuration."""
    if not (folder / RUN).is_file():
        return
    if not resume:
        raise ConfigError(f"{folder} holds a run; --resume goes on with it, --output takes another folder")
    if not (folder / CONFIG).is_file():
        return
    before = Config.of((folder / CONFIG).read_text(encoding="utf-8"), str(folder / CONFIG)).as_dict()
    for section, now in settings.as_dict().items():
        for name in {**before[section], **now}:
            if section != "evaluation" and before[section].get(name) != now.get(name):
                raise ConfigError(
                    f"{folder} holds a run with [{section}] {name} = {before[section].get(name)!r}, now it is "
                    f"{now.get(name)!r}; --output takes another folder"
                )


def _measured(model, points: Points, settings: Config, rows: int | None = None) -> Evaluation:
    test = points.test[:rows].to(next(model.parameters()).device)
    return measure(model, test, solve=settings.solve(), rows=200 if test.dim() == 2 else 32)


def _said(result: Evaluation, points: Points) -> str:
    truth = "" if points.entropy is None else f"; the entropy of the truth is {points.entropy:.3f}"
    return f"test: {result}{truth}"


def _count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _last_step(folder: Path) -> int:
    return inspect(folder / RUN).facts["step"]


def _is_out_of_patience(settings: Config, history: History) -> bool:
    patience = settings.training.get("patience")
    return patience is not None and len(history.steps) - history.steps.index(history.best_step) - 1 >= patience


def _how_to_go_on(config: str, output: str | None) -> str:
    return f"go on with: python -m cnfkit train {config} --resume" + (f" --output {output}" if output else "")
