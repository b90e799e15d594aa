"""Seven flows of MNIST at 14 × 14 pixels, each with the same time on one thread: the numbers of chapter 19.

python benchmarks/some_numbers.py [ROW ...]          a ROW is "MODEL/SEED", such as "rnode/0"; all of them unless given

A row trains its model for some six minutes, writes the weights into notebooks/checkpoints, measures them on test
images, and writes results/some_numbers/MODEL_SEED.json; a row whose file is there is not run again, unless --again
asks for it. The clock counts the processor's time. Which learning rate, and how many steps fit into the time, was
tried on validation images:

python benchmarks/some_numbers.py --tune [MODEL ...]

With what it found, results/some_numbers/tuning.json keeps the end of two trainings in full that failed: of RealNVP at
a learning rate of 0.03, one for each seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import page
import torch
from measure import machine
from PIL import Image
from torch import Tensor

import cnfkit as ck
from cnfkit.noise import PointNoise

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "some_numbers"
CHECKPOINTS = ROOT / "notebooks" / "checkpoints"
SEEDS, SHAPE = (0, 1), (1, 14, 14)
VALIDATION, TEST = 250, 1000  # images: of the training set's end, of the test set's beginning
ALPHA = 1e-5  # of the logit
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # that were tried,
SHARES = (18, 6)  # in trainings so many times as short

ESTIMATE = {"trace": "hutchinson"}
STRAIGHT = {"times": ck.uniform_grid(4), "method": "rk4_38", "reduction": "mean", **ESTIMATE}
PENALTIES = {"kinetic_energy": 0.01, "jacobian_energy": 0.01}
CNFS = {"blocks": 2, "hidden": (44, 44), "scales": 1}

# A preset with its options, the solve in training, the penalties; batches, the learning rate and the steps.
MODELS = {
    "realnvp": {"preset": "realnvp", "options": {"layers": 4, "hidden": 48, "scales": 1}},
    "glow": {"preset": "glow", "options": {"layers": 8, "hidden": 40, "scales": 1}},
    "flowpp": {"preset": "flowpp", "options": {"layers": 4, "components": 4, "hidden": 18, "scales": 1}},
    "iresnet": {
        "preset": "residual",
        "options": {"layers": 4, "hidden": 56, "scales": 1},
        "terms": 5,  # of the series in training
        "solve": ESTIMATE,
    },
    "residual": {"preset": "residual", "options": {"layers": 4, "hidden": 56, "scales": 1}, "solve": ESTIMATE},
    "ffjord": {"preset": "ffjord", "squeezed": True, "options": CNFS, "solve": ESTIMATE},
    "rnode": {
        "preset": "ffjord",
        "squeezed": True,  # before all else: at full size a convolution of so many channels is dear
        "options": CNFS,
        "solve": STRAIGHT,
        "penalties": PENALTIES,
    },
    "rnode2": {  # RNODE as it failed: its grid is exploited
        "preset": "ffjord",
        "squeezed": True,
        "options": CNFS,
        "solve": STRAIGHT | {"times": ck.uniform_grid(2)},
        "penalties": PENALTIES,
    },
}
TRAINING = {
    "realnvp": {"batch": 64, "lr": 1e-2, "steps": 3780},
    "glow": {"batch": 64, "lr": 1e-2, "steps": 7200},
    "flowpp": {"batch": 64, "lr": 3e-2, "steps": 3240},
    "iresnet": {"batch": 16, "lr": 1e-1, "steps": 1860},
    "residual": {"batch": 16, "lr": 1e-1, "steps": 1320},
    "ffjord": {"batch": 16, "lr": 3e-3, "steps": 1560},
    "rnode": {"batch": 16, "lr": 3e-3, "steps": 1860},
    "rnode2": {"batch": 16, "lr": 1e-2, "steps": 720},
}
ROWS = [f"{name}/{seed}" for seed in SEEDS for name in MODELS if name != "rnode2"] + ["rnode2/0"]
EVALUATION = ck.Solve(tolerance=1e-4, **ESTIMATE)  # of every model; those without CNFs take of it what they need


def build(name: str, train: Tensor | None, seed: int) -> ck.Dequantised:
    """A model before its training: the logit, a fixed scale and shift of each pixel, then the preset's flow.

    Without images nothing is measured, and weights have to be loaded.
    """
    recipe, first = MODELS[name], ck.Squeeze(SHAPE)
    members = [first] if "squeezed" in recipe else []
    shape = first.latent_shape if members else first.event_shape
    torch.manual_seed(seed)
    flow = ck.preset(recipe["preset"], shape, alpha=ALPHA, **recipe["options"])
    logit, rest = flow.bijection
    dequantise, standard = ck.UniformDequantiser(256), ck.Standardize(torch.zeros(shape), torch.ones(shape))
    if train is not None:
        y, _ = dequantise(train[:5000], torch.Generator().manual_seed(0))
        standard = ck.Standardize.of(ck.Chain(*members, logit)(y).value)
    flow = ck.Flow(flow.base, ck.Chain(*members, logit, standard, rest))
    if train is not None and any(isinstance(layer, ck.ActNorm) for layer in flow.modules()):
        flow.initialize(y[:500])
    return with_terms(ck.Dequantised(flow, dequantise), recipe.get("terms"))


def with_terms(model: ck.Dequantised, terms: int | None) -> ck.Dequantised:
    """The model with so many terms in each series of a log-determinant; None for a random number, without bias."""
    for block in model.modules():
        if isinstance(block, ck.Residual):
            block.terms = terms
    return model


class Clock:
    """The processor's time at each record of a training."""

    def __init__(self) -> None:
        self.began, self.seconds = time.process_time(), []

    def note(self, history: ck.History) -> None:
        self.seconds.append(round(time.process_time() - self.began, 1))


def learn(
    name: str, model: ck.Dequantised, train: Tensor, seed: int, clock: Clock | None = None, **training
) -> ck.History:
    """Train it; the last images of the training set are for validation."""
    recipe = MODELS[name]
    loss = ck.NegativeLogLikelihood(
        model,
        unit="bits",
        solve=ck.Solve(**recipe.get("solve", {})),
        penalties=recipe.get("penalties"),
        evaluation=ck.Solve(tolerance=1e-3, **ESTIMATE),
    )
    return ck.fit(
        loss,
        train[:-VALIDATION],
        **{"warmup": 20, "clip": 10.0, "ema": 0.99, "records": 6, "seed": seed} | TRAINING[name] | training,
        validation=train[-VALIDATION:],
        report=None if clock is None else clock.note,
    )


@torch.no_grad()
def bits_of(model: ck.Dequantised, k: Tensor, solve: ck.Solve = EVALUATION, batch: int = 100) -> Tensor:
    """The bits per dimension of each image; its noise depends on its place alone, so all models meet the same."""
    found = []
    for rows in torch.arange(len(k)).split(batch):
        noise = PointNoise(0, rows.tolist())
        found.append(model.log_prob(k[rows], solve=solve, generator=noise))
    return ck.bits_per_dimension(torch.cat(found), k[0].numel())


def write_images(path: Path, images: Tensor, columns: int = 40) -> None:
    """The images on one sheet, row by row, so that what was measured can be measured again without the data."""
    size = images.shape[-1]
    sheet = images.view(-1, columns, size, size).transpose(1, 2).reshape(-1, columns * size)
    Image.fromarray(sheet.numpy()).save(path, optimize=True)


def read_images(path: Path = RESULTS / "images.png", size: int = 14) -> Tensor:
    """The images of such a sheet, shape ``(n, 1, size, size)``."""
    sheet = torch.from_numpy(np.array(Image.open(path)))
    tiles = sheet.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)
    return tiles.reshape(-1, 1, size, size)


def sampling_seconds(model: ck.Dequantised, n: int = 64) -> float:
    """The processor's time for each of some images drawn at once."""
    generator = torch.Generator().manual_seed(0)
    began = time.process_time()
    model.sample(n, None, ck.Solve(tolerance=1e-3, trace="none"), generator)
    return (time.process_time() - began) / n


def row(name: str, seed: int, images: ck.Images) -> dict:
    """Train a model, publish its weights, and measure it."""
    train, test = images.train, images.test[:TEST]
    model, clock = build(name, train, seed), Clock()
    command = f"python benchmarks/some_numbers.py {name}/{seed}"
    path = CHECKPOINTS / f"19_{name}_{seed}.safetensors"
    began = time.process_time()
    facts = ck.trained(path, model, lambda: learn(name, model, train, seed, clock), command=command, seed=seed)
    seconds = time.process_time() - began
    with_terms(model.eval(), None)  # whatever it was trained with, it is measured without bias
    began = time.process_time()
    bits = bits_of(model, test)
    measuring = (time.process_time() - began) / len(test)
    solve = replace(EVALUATION, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        passed = model.log_prob_and_result(test[:100], solve=solve)[1]
    history, error = facts["history"], torch.tensor(ck.solver_error(model, test[:32], solve=solve))
    return {
        "model": name,
        "seed": seed,
        "command": command,
        "data": "MNIST, halved",
        "parameters": sum(part.numel() for part in model.parameters()),
        "training": TRAINING[name],
        "images_seen": TRAINING[name]["batch"] * history["steps"][-1],
        "seconds": round(seconds, 1),
        "validation": {
            "step": history["steps"],
            "seconds": clock.seconds,
            "bits": [round(value, 4) for value in history["validation"]],
            "evaluations": history["terms"].get("evaluations", []),
        },
        "best_step": history["best_step"],
        "evaluations": passed.evaluations,
        "solver_error_bits": -ck.bits_per_dimension(error, test[0].numel()).item(),
        "seconds_per_image_measured": round(measuring, 6),
        "seconds_per_sample": round(sampling_seconds(model), 6),
        "bits": round(bits.mean().item(), 5),
        "standard_error": round((bits.std() / math.sqrt(len(bits))).item(), 5),
        "bits_of_images_times_10000": (bits * 1e4).round().int().tolist(),
        "machine": machine(("cnfkit", "torch")) | {"threads": torch.get_num_threads()},
    }


def tune(names: Iterable[str], images: ck.Images) -> None:
    """A short training at each learning rate, then a longer one at the better two; validation images alone."""
    for name in names:
        rates = RATES
        for share in SHARES:
            loss = {rate: trial(name, rate, TRAINING[name]["steps"] // share, images) for rate in rates}
            rates = sorted(loss, key=loss.get)[:2]


def trial(name: str, rate: float, steps: int, images: ck.Images) -> float:
    """The validation loss of a short training at a learning rate, stored with all the others."""
    path, wanted = RESULTS / "tuning.json", {"model": name, "lr": rate, "steps": steps}
    done = json.loads(path.read_text()) if path.is_file() else []
    found = [about for about in done if wanted.items() <= about.items()]
    if not found:
        model, clock = build(name, images.train, 0), Clock()
        history = learn(name, model, images.train, 0, clock, lr=rate, steps=steps, records=2)
        found = [wanted | {"seconds": clock.seconds[-1], "bits": round(min(history.validation), 4)}]
        print(f"{found[0]}, {1000 * clock.seconds[-1] / steps:.0f} ms a step", flush=True)
        done = json.loads(path.read_text()) if path.is_file() else []
        page.write_json(path, done + found)
    return found[0]["bits"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", help="MODEL/SEED, or with --tune MODEL")
    parser.add_argument("--tune", action="store_true", help="try learning rates on validation images")
    parser.add_argument("--again", action="store_true", help="run rows that are there")
    options = parser.parse_args(arguments)
    known = [name for name in MODELS if name != "rnode2"] if options.tune else ROWS
    if unknown := set(options.rows) - set(known):
        parser.error(f"no row {min(unknown)!r}; wanted some of {', '.join(known)}")
    torch.set_num_threads(1)
    os.environ["CNFKIT_RETRAIN"] = "1"
    images = ck.mnist().halved()
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_images(RESULTS / "images.png", images.test[:TEST])
    if options.tune:
        tune(options.rows or known, images)
        return
    for wanted in options.rows or known:
        name, seed = wanted.split("/")
        path = RESULTS / f"{name}_{seed}.json"
        if options.again or not path.is_file():
            found = row(name, int(seed), images)
            page.write_json(path, found)
            bits = f"{found['bits']:.3f} ± {found['standard_error']:.3f} bits/dim"
            print(f"{wanted}: {bits}, {found['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
