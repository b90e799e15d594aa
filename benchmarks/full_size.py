"""One training step of an image flow at full size: images a second in each precision, and where the time goes.

python benchmarks/full_size.py [--config mnist-rnode-paper] [--batch 200] [--device cuda] [--output FILE]

The images are random, of the right shape: no data are needed. Only cnfkit and PyTorch are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import page
import torch
from measure import gradient, interleaved, iteration, machine, relative_distance
from precision import products
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cnfkit.config import Config, find_config

SHAPES = {"digits": ((1, 8, 8), 17), "mnist": ((1, 28, 28), 256), "fashion_mnist": ((1, 28, 28), 256)}
SHAPES["cifar10"] = ((3, 32, 32), 256)
CONVOLUTIONS = ("aten::_convolution", "aten::convolution_backward")
MODES = {"float32": (False, "full"), "TF32": (True, "full"), "bfloat16": (False, "bfloat16")}
EPOCH = 60_000


def task(config: str, batch: int, device: str) -> tuple[nn.Module, Tensor, Config]:
    """The loss of a configuration, whose field no longer stands still, and a batch of noise."""
    name, text = find_config(config)
    settings = Config.of(text, name)
    shape, levels = SHAPES[settings.data["name"]]
    loss = settings.loss_of(settings.shaped(shape, levels))
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=noise))
    images = torch.randint(levels, (batch, *shape), generator=noise).to(torch.uint8)
    return loss.to(device), images.to(device), settings


def steps(loss: nn.Module, images: Tensor, compiled: bool) -> dict[str, tuple[bool, Callable[[], Tensor]]]:
    """Of each mode whether products are in TF32, and the loss."""

    def value(precision: str, call: Callable) -> Tensor:
        loss.solve = replace(loss.solve, precision=precision)
        return call(images, torch.Generator().manual_seed(0))[0]

    found = {mode: (tf32, partial(value, precision, loss)) for mode, (tf32, precision) in MODES.items()}
    if compiled:
        for mode in ("TF32", "bfloat16"):
            tf32, precision = MODES[mode]
            found[f"{mode}, compiled"] = tf32, partial(value, precision, torch.compile(loss))
    return found


def share_of_convolutions(run: Callable[[], None], device: str) -> float:
    """What part of a step's computing is spent in convolutions; the rest moves numbers through memory."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds) as profiler:
        run()
    events = profiler.key_averages()
    own, whole = ("self_device_time_total", "device_time_total") if device == "cuda" else (
        "self_cpu_time_total", "cpu_time_total")  # fmt: skip
    total = sum(getattr(event, own) for event in events)
    return sum(getattr(event, whole) for event in events if event.key in CONVOLUTIONS) / total


def measured(config: str, batch: int, device: str, seconds: float, compiled: bool) -> list[dict]:
    """A row for each mode."""
    loss, images, _ = task(config, batch, device)
    parameters, runs, rows = list(loss.parameters()), {}, []
    truth = None
    for mode, (tf32, value) in steps(loss, images, compiled).items():
        began = time.perf_counter()
        run = products(tf32)(iteration(value, parameters))
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with products(tf32):
            came = gradient(value, parameters)
        first = time.perf_counter() - began
        memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
        truth = came if truth is None else truth
        facts = {"error": relative_distance(came, truth), "first_seconds": round(first, 1), "bytes": memory}
        rows.append({"mode": mode, "batch": batch, **facts, "convolutions": share_of_convolutions(run, device)})
        runs[mode] = run
    taken = interleaved(runs, seconds, 3)
    for row in rows:
        row["ms"] = taken[row["mode"]].ms
        row["images_per_second"] = round(1000 * batch / row["ms"], 1)
        row["minutes_per_epoch"] = round(EPOCH / row["images_per_second"] / 60, 2)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="mnist-rnode-paper")
    parser.add_argument("--batch", type=int, nargs="+", default=[200])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=20.0, help="for each batch, at least three rounds")
    parser.add_argument("--compiled", action="store_true", help="compiled steps, too: each takes minutes to begin")
    parser.add_argument("--output", type=Path, help="the JSON file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"PyTorch {torch.__version__} sees no GPU here")
    torch.backends.cudnn.benchmark = True
    found = {"config": options.config, "machine": machine(("cnfkit", "torch"), options.device), "rows": []}
    for batch in options.batch:
        for row in measured(options.config, batch, options.device, options.seconds, options.compiled):
            found["rows"].append(row)
            print(", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in row.items()), flush=True)  # fmt: skip
    if options.output:
        page.write_json(options.output, found)


if __name__ == "__main__":
    main()
