"""Train the fields that the benchmarks are timed on: benchmarks/weights/*.safetensors.

python benchmarks/weights.py [plain] [rnode]

A field at its initialisation is easier to integrate than any that has learnt something, and so no field to time.
"""

from __future__ import annotations

import sys
import time

import torch
from fields import WEIGHTS, new_flow, points

import cnfkit as ck

PENALTIES = {"plain": None, "rnode": {"kinetic_energy": 0.01, "jacobian_energy": 0.01}}
STEPS, BATCH, RATE, TOLERANCE = 1500, 512, 5e-3, 1e-3


def train(name: str) -> None:
    """Train one field and save it, with how that was done and what came of it."""
    torch.manual_seed(0)
    flow = new_flow()
    loss = ck.NegativeLogLikelihood(flow, solve=ck.FrozenGrid(tolerance=TOLERANCE), penalties=PENALTIES[name])
    start = time.perf_counter()
    ck.fit(loss, points(60_000, seed=1), steps=STEPS, batch=BATCH, lr=RATE, seed=0)
    seconds = time.perf_counter() - start
    evaluation = ck.evaluate(flow, points(5000, seed=2))
    print(f"{name}: {evaluation}, after {seconds:.0f} s")
    facts = {"command": f"python benchmarks/weights.py {name}", "seed": 0, "nll": round(evaluation.nll, 3)}
    ck.save(WEIGHTS / f"{name}.safetensors", flow, **facts, evaluations=round(evaluation.evaluations))


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in another order would give other weights
    for name in sys.argv[1:] or PENALTIES:
        if name not in PENALTIES:
            sys.exit(f"weights.py: {name!r} is not known; wanted one of {', '.join(PENALTIES)}")
        train(name)
