"""Train cnfkit and zuko side by side, by the clock: every curve, in results/train.json, and the book's page.

python benchmarks/train.py [--seconds CAP] [RUN ...]          a RUN is "DENSITY/SEED/NAME"

It takes about an hour. The file is written after each run, and what it holds is not run again: delete a run, or the
file, to repeat it. Held-out likelihoods are all measured on the same points within the same tolerance, and the clock
stands still meanwhile. It counts the processor's time, of one thread: on a machine that does nothing else it goes like
the one on the wall, and elsewhere it does not count what others do.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import page
import torch
from bench import PACKAGES
from iterations import PENALTIES
from measure import machine
from torch import Tensor, nn

import cnfkit as ck

# What cnfkit passes on its way, in nats; the entropies are 2.04, 2.83 and 1.01.
TARGETS = {"pinwheel": 2.30, "eight_gaussians": 2.95, "two_moons": 1.20}
SEEDS = (0, 1, 2)
STEPS, BATCH, RATE = 400, 512, 1e-2
CAP, TOLERANCE = 200.0, 1e-6


class Finished(Exception):
    """The run has reached its target, or the cap."""


class Watch:
    """A clock for a run, which stands still while the held-out likelihood is measured.

    Args:
        held_out_nll: measures it.
        target: ends the run when it is reached; None for none.
        cap: ends the run, in seconds.
    """

    def __init__(self, held_out_nll: Callable[[], float], target: float | None, cap: float) -> None:
        self.held_out_nll, self.target, self.cap = held_out_nll, target, cap
        self.curve: list[tuple[float, int, float]] = []  # seconds, steps, NLL
        self.step, self.seconds, self.due = 0, 0.0, 1.0
        self.began = time.process_time()

    def tick(self) -> None:
        """After each step: measure when it is time, ever more seldom."""
        self.step += 1
        if self.seconds + time.process_time() - self.began >= min(self.due, self.cap):
            self.look()
            self.due = 1.08 * self.seconds
            if self.seconds >= self.cap or (self.target is not None and self.curve[-1][2] <= self.target):
                raise Finished

    def look(self) -> None:
        """Measure now."""
        self.seconds += time.process_time() - self.began
        self.curve.append((round(self.seconds, 3), self.step, round(self.held_out_nll(), 5)))
        self.began = time.process_time()


class Watched(nn.Module):
    """A loss whose every call in training is a tick: ``cnfkit.fit`` knows nothing of the clock."""

    def __init__(self, loss: nn.Module, watch: Watch) -> None:
        super().__init__()
        self.loss, self.watch = loss, watch

    def forward(self, batch: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        self.watch.tick()
        return self.loss(batch, generator)


class ZukoLoss(nn.Module):
    """zuko's CNF with its defaults, the exact trace among them, in a network of the same widths."""

    def __init__(self) -> None:
        super().__init__()
        import zuko

        self.flow = zuko.flows.CNF(2, hidden_features=(64, 64, 64))

    def forward(self, batch: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -self.flow().log_prob(batch).mean()
        return loss, {"nll": loss.detach()}

    @torch.no_grad()
    def held_out_nll(self, x: Tensor) -> float:
        flow = copy.deepcopy(self.flow).eval()
        for module in flow.modules():
            if hasattr(module, "atol"):
                module.atol = module.rtol = TOLERANCE
        return -flow().log_prob(x).mean().item()


def ours(data: Tensor, held_out: Tensor, seed: int, target: float, cap: float, warm_start: int = 0) -> dict:
    """The guarded default, to the end of its schedule; after some steps of flow matching, or none."""
    flow = ck.Flow(ck.Normal(2), ck.CNF(ck.MLPField(2)))
    loss = ck.NegativeLogLikelihood(flow, solve=ck.FrozenGrid(), penalties=PENALTIES)

    @torch.no_grad()
    def held_out_nll() -> float:
        return -flow.log_prob(held_out, solve=ck.Solve(tolerance=TOLERANCE)).mean().item()

    watch = Watch(held_out_nll, None, cap)
    schedule = {"batch": BATCH, "lr": RATE, "validation": 0, "seed": seed, "progress": False}
    try:
        if warm_start:
            ck.fit(Watched(ck.FlowMatching(flow), watch), data, steps=warm_start, **schedule)
        ck.fit(Watched(loss, watch), data, steps=STEPS, **schedule)
        watch.look()
    except Finished:
        pass
    error = ck.solver_error(flow, held_out[:500], solve=loss.solve.solve)
    return {"curve": watch.curve, "solver_error": error}


def after_flow_matching(data: Tensor, held_out: Tensor, seed: int, target: float, cap: float) -> dict:
    return ours(data, held_out, seed, target, cap, warm_start=STEPS)


def zuko_plain(data: Tensor, held_out: Tensor, seed: int, target: float, cap: float) -> dict:
    """Adam at 1e-3 in batches of 256, until the target or the cap."""
    loss, generator = ZukoLoss(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    watch = Watch(lambda: loss.held_out_nll(held_out), target, cap)
    try:
        while True:
            for rows in torch.randperm(len(data), generator=generator).split(256):
                optimizer.zero_grad()
                loss(data[rows])[0].backward()
                optimizer.step()
                watch.tick()
    except Finished:
        return {"curve": watch.curve}


def zuko_scheduled(data: Tensor, held_out: Tensor, seed: int, target: float, cap: float) -> dict:
    """The learning rate, cosine schedule and batches of cnfkit's run."""
    loss = ZukoLoss()
    watch = Watch(lambda: loss.held_out_nll(held_out), target, cap)
    try:
        ck.fit(Watched(loss, watch), data, steps=STEPS, batch=BATCH, lr=RATE, validation=0, seed=seed, progress=False)
        watch.look()
    except Finished:
        pass
    return {"curve": watch.curve}


RUNS = {
    "cnfkit": ours,
    "cnfkit, flow matching first": after_flow_matching,
    "zuko, Adam 1e-3": zuko_plain,
    "zuko, our schedule": zuko_scheduled,
}


def main() -> None:
    names = [f"{density}/{seed}/{run}" for density in TARGETS for seed in SEEDS for run in RUNS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"such as {names[0]!r}; all unless given")
    parser.add_argument("--seconds", type=float, default=CAP, help="the cap of a run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=page.TRAIN)
    options = parser.parse_args()
    if unknown := set(options.runs) - set(names):
        parser.error(f"RUN {min(unknown)!r} is not known; wanted one such as {names[0]!r}")

    torch.set_num_threads(options.threads)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first one imports for seconds, which are no training
    path = options.output
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    for k, name in enumerate(options.runs or names):
        if name in results["runs"]:
            continue
        density, seed, run = name.split("/")
        points = ck.toy_density(density).sample(52_000, torch.Generator().manual_seed(100 + int(seed)))
        torch.manual_seed(int(seed))
        print(f"[{k + 1}/{len(options.runs or names)}] {name}", end="", flush=True)
        facts = RUNS[run](points[2000:], points[:2000], int(seed), TARGETS[density], options.seconds)
        seconds, step, nll = facts["curve"][-1]
        error = f", solver error {facts['solver_error']:.1e}" if "solver_error" in facts else ""
        print(f": {nll:.3f} nats after {seconds:.0f} s, {step} steps{error}", flush=True)
        done = results["runs"] | {name: facts}
        results["runs"] = {run: done[run] for run in names if run in done}  # in one order, whichever was repeated
        results |= {"machine": machine(PACKAGES), "threads": options.threads, "targets": TARGETS}
        page.write_json(path, results)
    if path == page.TRAIN:
        page.write()


if __name__ == "__main__":
    main()
