"""What cnfkit's own choices cost beside each other, in a minute or two: choices.json, for the book's page on choosing.

python benchmarks/choices.py          wants no peer
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import page
import torch
from fields import Bare, points, trained_flow
from iterations import PENALTIES
from measure import gradient, interleaved, iteration, machine, peak_memory, relative_distance, row
from torch import nn

import cnfkit as ck

RESULTS = Path(__file__).parent / "choices.json"
KINDS = ("backprop", "checkpoint", "adjoint")
SECONDS = 5.0


def gradients(batch: int = 256, steps: int = 8, tolerance: float = 1e-5) -> dict:
    """Ways to differentiate a solve, on a grid and with steps that a tolerance chooses: time, peak memory, error."""
    x, flow = points(batch, seed=3), trained_flow("plain")
    exact = copy.deepcopy(flow).double()
    tight = ck.Solve(tolerance=1e-10, gradient="checkpoint")
    truth = gradient(lambda: -exact.log_prob(x.double(), solve=tight).mean(), exact.parameters())
    bases = {
        f"{steps} steps of rk6": (ck.Solve(method="rk6", times=ck.uniform_grid(steps)), KINDS),
        "adaptive": (ck.Solve(tolerance=tolerance), KINDS),
        "torchdiffeq": (ck.Solve(method="torchdiffeq:dopri5", tolerance=tolerance), ("backprop", "adjoint")),
        "a tenth of the tolerance": (ck.Solve(tolerance=tolerance / 10), ("backprop",)),
    }
    ways = {
        f"{base}, {kind}": replace(solve, gradient=kind) for base, (solve, kinds) in bases.items() for kind in kinds
    }

    def loss(flow: ck.Flow, solve: ck.Solve) -> torch.Tensor:
        return -flow.log_prob(x, solve=solve).mean()

    def run_and_forget(solve: ck.Solve) -> None:
        anew = trained_flow("plain")  # a field may hold on to the memory of its last solve
        iteration(lambda: loss(anew, solve), anew.parameters())()

    runs = {name: iteration(partial(loss, flow, solve), flow.parameters()) for name, solve in ways.items()}
    taken = interleaved(runs, SECONDS)
    rows = []
    for name, solve in ways.items():
        error = relative_distance(gradient(partial(loss, flow, solve), flow.parameters()), truth)
        rows.append(row(name, taken[name], peak=peak_memory(partial(run_and_forget, solve)), error=error))
    return {"batch": batch, "steps": steps, "tolerance": tolerance, "rows": rows}


def traces(batch: int = 256, width: int = 64, dimensions: tuple[int, ...] = (2, 8, 32, 128)) -> dict:
    """The exact trace over Hutchinson's estimate, in an iteration of one Runge–Kutta step."""
    kinds: dict[str, Callable[[int], nn.Module]] = {
        "two hidden layers": lambda d: ck.MLPField(d, hidden=(width,) * 2),
        "three hidden layers": lambda d: ck.MLPField(d, hidden=(width,) * 3),
        "any module, by autograd": lambda d: Bare(ck.MLPField(d, hidden=(width,) * 2)),
        "PotentialField": lambda d: ck.PotentialField(d, hidden=width),
    }
    rows = []
    for d in dimensions:
        x, runs = torch.randn(batch, d, generator=torch.Generator().manual_seed(d)), {}
        for name, made in kinds.items():
            flow = ck.Flow(ck.Normal(d), ck.CNF(made(d)))
            for parameter in flow.parameters():  # the last layer starts at zero, where gradients vanish
                nn.init.normal_(parameter, std=0.1)
            for trace in ("exact", "hutchinson"):
                solve = ck.Solve(trace=trace, method="rk4", times=ck.uniform_grid(1))
                loss = partial(lambda flow, solve, x: -flow.log_prob(x, solve=solve).mean(), flow, solve, x)
                runs[f"{name}|{trace}"] = iteration(loss, flow.parameters())
        taken = interleaved(runs, SECONDS / 2, least=3)
        for key, timing in taken.items():
            name, trace = key.split("|")
            rows.append(row(name, timing, dimension=d, trace=trace))
    return {"batch": batch, "width": width, "rows": rows}


def penalties(batch: int = 512, steps: int = 8) -> dict:
    """An iteration with RNODE's penalties and without, on one grid."""
    x, flow, runs = points(batch, seed=3), trained_flow("rnode"), {}
    for trace in ("exact", "hutchinson"):
        solve = ck.Solve(trace=trace, method="rk4", times=ck.uniform_grid(steps))
        for name, weights in (("without", None), ("with", PENALTIES)):
            loss = ck.NegativeLogLikelihood(flow, solve=solve, penalties=weights)
            runs[f"{trace}, {name}"] = iteration(lambda loss=loss: loss(x)[0], flow.parameters())
    return {"batch": batch, "steps": steps, "rows": [row(*item) for item in interleaved(runs, SECONDS).items()]}


def models(dimension: int = 32, batch: int = 1000, tolerance: float = 1e-5) -> dict:
    """Densities, samples and a training iteration of the flows by name; of these the CNF alone is trained, before."""
    torch.manual_seed(0)
    clusters = ck.NormalMixture(torch.randn(10, dimension), stds=0.3)
    x = clusters.sample(batch, torch.Generator().manual_seed(1))
    flows = {name: ck.preset(name, dimension) for name in ("nice", "realnvp", "glow", "flowpp", "maf", "residual")}
    flows["iaf"] = ck.Flow(ck.Normal(dimension), ck.Inverse(ck.maf(dimension).bijection))
    flows["cnf"] = ck.Flow(ck.Normal(dimension), ck.CNF(ck.MLPField(dimension, hidden=(128, 128))))
    for flow in flows.values():
        flow.initialize(x)
    train = clusters.sample(10_000, torch.Generator().manual_seed(2))
    ck.fit(ck.FlowMatching(flows["cnf"]), train, steps=2000, batch=256, lr=2e-3, validation=0, progress=False)
    adaptive, noise = ck.Solve(tolerance=tolerance), torch.Generator().manual_seed(0)
    training = {"cnf": ck.FrozenGrid(), "residual": ck.Solve(trace="hutchinson")}
    runs: dict[str, Callable[[], object]] = {}
    for name, flow in flows.items():
        loss = ck.NegativeLogLikelihood(flow, solve=training.get(name))
        runs[f"{name}|density"] = torch.no_grad()(partial(flow.log_prob, x, solve=adaptive))
        runs[f"{name}|sample"] = partial(flow.sample, batch, solve=adaptive, generator=noise)
        runs[f"{name}|iteration"] = iteration(lambda loss=loss: loss(x[:256])[0], flow.parameters())
    matching = ck.FlowMatching(flows["cnf"])
    runs["matching"] = iteration(lambda: matching(x[:256])[0], flows["cnf"].parameters())
    taken = interleaved(runs, 2 * SECONDS, least=4)
    rows = [
        {
            "name": name,
            "parameters": sum(parameter.numel() for parameter in flow.parameters()),
            **{part: asdict(taken[f"{name}|{part}"]) for part in ("density", "sample", "iteration")},
        }
        for name, flow in flows.items()
    ]
    evaluations = flows["cnf"].log_prob_and_result(x, solve=adaptive)[1].evaluations
    return {
        "dimension": dimension,
        "points": batch,
        "tolerance": tolerance,
        "evaluations": evaluations,
        "matching": asdict(taken["matching"]),
        "rows": rows,
    }


def main() -> None:
    torch.set_num_threads(1)
    results: dict = {"machine": machine(("cnfkit", "torch", "torchdiffeq")), "threads": 1}
    for case in (gradients, traces, penalties, models):
        began = time.perf_counter()
        torch.manual_seed(0)
        results[case.__name__] = case()
        print(f"{case.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
    page.write_json(RESULTS, results)


if __name__ == "__main__":
    main()
