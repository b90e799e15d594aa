"""Timing side by side, errors against float64, the search for the cheapest setting, and memory."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """What a function took, in milliseconds: the median and the quartiles of its calls."""

    ms: float
    low: float
    high: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        return cls(*(round(1000 * value, 4) for value in (middle, low, high)), len(seconds))

    def over(self, n: int) -> Timing:
        """The time of one of ``n`` things that were done in each call."""
        return Timing(*(round(value / n, 4) for value in (self.ms, self.low, self.high)), self.calls)


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        threads: numbers of threads, that of the headline first.
        fields: names of trained fields.
        batch: points of a training iteration.
        points: points of an evaluation.
        judged: how many of them its error is measured on.
        seconds: how long a comparison goes on, unless ``least`` rounds take longer.
        least: the fewest rounds.
        images: of a convolutional training step.
        batches, steps: those of the scaling.
        refreshes: whether iterations on a frozen grid are timed with the choice of the grid, which serves many.
        tight: the tolerance of the truth, in float64.
        tolerances, grids: the settings that are tried, the cheapest first; of grids, the numbers of steps.
        device: where it is measured.
        compiled: whether a compiled step is among the modes of precision.
    """

    threads: tuple[int, ...] = (1, 2)
    fields: tuple[str, ...] = ("plain", "rnode")
    batch: int = 512
    points: int = 10_000
    judged: int = 1000
    seconds: float = 8.0
    least: int = 3
    images: int = 16
    batches: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    refreshes: bool = True
    tight: float = 1e-10
    # finer tolerances float32 does not resolve, and some solvers would not return
    tolerances: tuple[float, ...] = tuple(10 ** (-k / 2) for k in range(2, 13))
    grids: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32)
    device: str = "cpu"
    compiled: bool = True

    def time(self, functions: dict[str, Callable[[], object]], share: float = 1.0) -> dict[str, Timing]:
        """Time functions side by side, for a share of the seconds."""
        return interleaved(functions, share * self.seconds, self.least)


QUICK = Scale(
    (1,),
    ("rnode",),
    64,
    500,
    100,
    0.0,
    1,
    1,
    (64, 128, 256),
    (1, 2, 4),
    False,
    1e-6,
    (1e-5, 1e-6),
    (16, 24),
    compiled=False,
)


def row(name: str, timing: Timing, **facts) -> dict:
    """A line of a table."""
    return {"name": name, **facts, **asdict(timing)}


@contextlib.contextmanager
def threads(n: int):
    """PyTorch on so many threads, whatever it had before."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    functions: dict[str, Callable[[], object]], seconds: float, least: int = 5, most: int = 400
) -> dict[str, Timing]:
    """Time functions side by side: in each round every one is called once, in an order drawn anew.

    What slows the machine down for a while then slows all of them, and the ratios of the medians stand.

    Args:
        functions: by name.
        seconds: how long to go on, between ``least`` and ``most`` rounds.
        least: the fewest rounds, however long they take; one more, before them, is not counted.
        most: the most rounds.
    """
    if not functions:
        raise ValueError("functions is empty; wanted at least one to time")
    if not 1 <= least <= most:
        raise ValueError(f"least is {least!r} and most is {most!r}; wanted 1 <= least <= most")
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None  # a GPU computes behind our back
    order, shuffle = list(functions), random.Random(0).shuffle
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for count in range(most):
            if count >= least and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                wait()
                start = time.perf_counter()
                functions[name]()
                wait()
                taken[name].append(time.perf_counter() - start)
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in taken.items()}


def cheapest(
    settings: Sequence[float], error: Callable[[float], float], below: float, refinements: int = 2
) -> tuple[float, float] | None:
    """The cheapest setting whose error is small enough, and that error; None if there is none.

    The settings are tried one after the other, since an error need not fall evenly. Between the first that will do and
    the one before it a few more are, so that nobody pays for a coarse list.

    Args:
        settings: the cheapest first: tolerances that fall, or whole numbers of steps that rise.
        error: of a setting. A solver that gives up has no error that is small enough.
        below: what the error may be at most.
        refinements: how often the interval is halved, on a logarithmic scale.
    """

    def attempt(setting: float) -> float:
        try:
            return error(setting)
        except (ArithmeticError, AssertionError, RuntimeError):  # how the libraries say that they cannot go on
            return math.inf

    failed = None
    for setting in settings:
        if (reached := attempt(setting)) <= below:
            break
        failed = setting
    else:
        return None
    for _ in range(refinements if failed else 0):
        middle = math.sqrt(failed * setting)
        middle = round(middle) if isinstance(setting, int) else middle
        if middle in (failed, setting):
            break
        if (closer := attempt(middle)) <= below:
            setting, reached = middle, closer
        else:
            failed = middle
    return setting, reached


def gradient(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Tensor:
    """The gradient of a loss over all parameters, in float64, flat; no gradient is left behind."""
    parameters = list(parameters)
    iteration(loss, parameters)()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()
    for parameter in parameters:
        parameter.grad = None
    return flat


def iteration(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> Callable[[], None]:
    """One training iteration without the optimiser's step, which costs everyone the same."""
    parameters = list(parameters)

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        loss().backward()

    return run


def relative_distance(came: Tensor, truth: Tensor) -> float:
    """The relative L2 distance."""
    return ((came.to(truth) - truth).norm() / truth.norm()).item()


def mean_distance(came: Tensor, truth: Tensor) -> float:
    """The mean over the points that the truth is known for: of numbers, or of points in space."""
    difference = came[: len(truth)].to(truth) - truth
    return (difference.abs() if difference.dim() == 1 else difference.norm(dim=-1)).mean().item()


def peak_memory(function: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes of tensors alive at once during a call, beyond those alive before it.

    Every allocation and release of PyTorch's CPU allocator is recorded by its profiler, so that the number is exact:
    what the process occupies moves in pages and arenas, and would hide the few kilobytes a step that are to be seen.
    """
    function()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says on the terminal when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def machine(packages: Sequence[str], device: str = "cpu") -> dict:
    """What the numbers depend on; nothing that tells whose machine it was."""
    versions = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name).split("+")[0]
    about = {"python": platform.python_version(), "versions": versions, "date": date.today().isoformat()}
    if device == "cuda":
        return {"processor": torch.cuda.get_device_name()} | about
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"processor": processor(), "cores": cores} | about


def processor() -> str:
    """The name of the processor."""
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
