"""The figures of the page on benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")  # before pyplot: no window, whatever the machine

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tables import FIELDS, seeds

from cnfkit import figures

WIDTH = 6.4  # inches: still legible on a phone


def plain_numbers(ax: Axes, x: Sequence[int]) -> None:
    """Logarithmic axes in numbers that need no reading: of the abscissae every second one, of the others 1, 2, 5, …"""
    ax.set_xticks(x[::-2], [str(value) for value in x[::-2]])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def training(results: dict) -> Figure:
    """Bars: an iteration by everybody, ours in the colour of data."""
    fields = results["training"]["fields"]
    fig, axes = plt.subplots(len(fields), 1, figsize=(WIDTH, 3.6 * len(fields)), squeeze=False)
    for ax, (field, part) in zip(axes[:, 0], fields.items(), strict=True):
        rows = sorted(part["threads"][str(results["threads"])], key=lambda row: -row["ms"])
        colours = [figures.DATA if row["name"].startswith("cnfkit") else figures.LATENT for row in rows]
        around = [[row["ms"] - row["low"] for row in rows], [row["high"] - row["ms"] for row in rows]]
        ax.barh([row["name"] for row in rows], [row["ms"] for row in rows], color=colours, xerr=around)
        ax.set(title=f"field {FIELDS[field]}", xlabel="milliseconds")
        ax.tick_params(axis="y", labelsize=10)
    return fig


def scaling(results: dict) -> Figure:
    """Lines: time against the batch and against the steps, with proportionality beside."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True)
    for ax, what in zip(axes, ("batch", "steps"), strict=True):
        rows = results["scaling"][f"by_{what}"]
        x, y = [row[what] for row in rows], [row["ms"] for row in rows]
        ax.loglog(x, y, "o-")
        ax.loglog(x, [y[-1] * value / x[-1] for value in x], ":", color="0.6")
        ax.set_xlabel(what)
        plain_numbers(ax, x)
    axes[0].set_ylabel("milliseconds")
    return fig


def memory(results: dict) -> Figure:
    """Lines: peak memory against the steps."""
    part = results["memory"]
    fig, ax = plt.subplots(figsize=(WIDTH, 3.2))
    for kind, peaks in part["peaks"].items():
        ax.loglog(part["steps"], [peak / 2**20 for peak in peaks], "o-", label=kind)
    ax.set(xlabel="steps", ylabel="peak memory, MiB")
    plain_numbers(ax, part["steps"])
    ax.legend()
    return fig


def train(results: dict) -> Figure:
    """Lines: the held-out NLL against the seconds of training, every run; its target as a level."""
    targets = results["train"]["targets"]
    fig, axes = plt.subplots(len(targets), 1, figsize=(WIDTH, 3.0 * len(targets)), squeeze=False, sharex=True)
    for ax, (density, target) in zip(axes[:, 0], targets.items(), strict=True):
        for colour, (name, runs) in zip(figures.CYCLE, seeds(results, density).items(), strict=False):
            for k, run in enumerate(runs):
                seconds, _, nll = zip(*run["curve"], strict=True)
                ax.semilogx(seconds, nll, color=colour, linewidth=1.2, label=name if k == 0 else None)
        ax.axhline(target, color="0.6", linestyle=":", linewidth=1)
        ax.set(title=density.replace("_", " "), ylabel="nats", ylim=(target - 0.4, target + 1.2))
    axes[0, 0].legend(fontsize=10)
    axes[-1, 0].set_xlabel("seconds of training")
    return fig


PICTURES: dict[str, tuple[Callable[[dict], Figure], str]] = {
    "training": (
        training,
        "Horizontal bars, one for each way to train, the shorter the faster: blue those of cnfkit, orange its peers",
    ),
    "scaling": (
        scaling,
        "Two plots with logarithmic axes, the time of an iteration against the batch and against the steps: both "
        "approach the dotted line of proportionality",
    ),
    "memory": (
        memory,
        "Peak memory against the steps with logarithmic axes: backpropagation rises, checkpointing is nearly level",
    ),
    "train": (
        train,
        "For each density the held-out likelihood against the seconds of training, a line for each run: those of "
        "cnfkit fall first",
    ),
}


def draw(results: dict, folder: Path) -> None:
    """Draw what the results have, each in a file of its name."""
    figures.use_style()
    for name, (picture, _) in PICTURES.items():
        if name in results:
            fig = picture(results)
            fig.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
            plt.close(fig)
