"""What is measured: one function for each case, each of which returns what JSON can hold.

The definitions. *Gradient error*: the relative L2 distance over all parameters to the gradient in float64 within 1e-10,
on the same weights. *Log-density error*: the mean of |Δ log p| over held-out points. *Sample error*: the mean distance
of the points to those of a tight solve. *Solver error*: the log-density error of the solve that a training uses.
*Floor*: the bare field, forward and backward, times the evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from fields import Bare, PlainField, first_block, noise, points, trained_flow
from iterations import PENALTIES, over_the_floor, training
from measure import Scale, cheapest, iteration, mean_distance, peak_memory, relative_distance, row, threads
from peers import Ours, Torchdiffeq, Torchdyn, Zuko, judge, require_agreement
from precision import precision
from torch import Tensor, nn

import cnfkit as ck


@torch.no_grad()
def evaluation(scale: Scale, below: float = 1e-4) -> dict:
    """Log-densities, and samples, to one error, for everybody by the largest tolerance or the fewest steps."""
    x = points(scale.points, 6, scale.device)
    z = noise(scale.points, 2, seed=7, device=scale.device)
    results: dict = {}
    for name in scale.fields:
        flow = trained_flow(name, scale.device)
        plain = PlainField(flow.bijection.field)
        grids = {
            "cnfkit, rk6, uniform grid": Ours(flow, method="rk6"),
            "torchdiffeq, rk4, uniform grid": Torchdiffeq(plain, method="rk4"),
        }
        libraries = {
            "cnfkit": Ours(flow),
            "zuko": Zuko(plain),
            "torchdyn, dopri5": Torchdyn(plain),
            "torchdyn, tsit5": Torchdyn(plain, solver="tsit5"),
            "torchdiffeq": Torchdiffeq(plain),
        }
        require_agreement(libraries | grids, plain)
        results[name] = {}
        for what, of in (("log_prob", x), ("sample", z)):
            truth = getattr(judge(plain), what)(of[: scale.judged].double(), scale.tight)
            found, runs = {}, {}
            for key, library in (libraries | grids).items():
                call, settings = getattr(library, what), scale.grids if key in grids else scale.tolerances
                error = lambda s, call=call, of=of, truth=truth: mean_distance(call(of, s), truth)  # noqa: E731
                if hit := cheapest(settings, error, below):
                    found[key], runs[key] = hit, partial(call, of, hit[0])
            with threads(scale.threads[0]):
                taken = scale.time(runs)
            results[name][what] = [
                row(key, taken[key], setting=setting, error=error) for key, (setting, error) in found.items()
            ]
    return {"below": below, "points": scale.points, "fields": results}


def divergence(scale: Scale, dimension: int = 43, width: int = 128) -> dict:
    """The exact divergence of one evaluation in many dimensions, beside cnfkit's own estimate of it."""
    torch.manual_seed(0)
    velocity = ck.MLPField(dimension, hidden=(width, width), time="concat")
    nn.init.normal_(velocity.layers[-1].weight, std=width**-0.5)
    flow = ck.Flow(ck.Normal(dimension), ck.CNF(velocity)).to(scale.device)
    plain = PlainField(velocity)
    libraries = {
        "cnfkit": Ours(flow),
        "zuko": Zuko(plain),
        "torchdyn": Torchdyn(plain),
        "torchdiffeq": Torchdiffeq(plain),
        "cnfkit, Hutchinson": Ours(flow, exact=False),
        "zuko, Hutchinson": Zuko(plain, exact=False),
        "torchdyn, Hutchinson": Torchdyn(plain, exact=False),
    }
    z = noise(scale.batch, dimension, seed=8, device=scale.device)
    calls = {name: lambda library=library: library.divergence(z) for name, library in libraries.items()}
    truth = calls["cnfkit"]().detach()
    for name, call in calls.items():
        distance = relative_distance(call().detach(), truth)
        if "Hutchinson" not in name and not distance < 1e-4:
            raise AssertionError(f"{name}: its divergences differ from cnfkit's by {distance:.1e}; wanted 1e-4")
    runs = {}
    for name, call in calls.items():
        learnt = list((flow if "cnfkit" in name else plain).parameters())
        runs[f"{name}|forward"] = torch.no_grad()(call)
        runs[f"{name}|both"] = iteration(lambda call=call: call().mean(), learnt)
    with threads(scale.threads[0]):
        taken = scale.time(runs)
    rows = [{"name": name, **{part: asdict(taken[f"{name}|{part}"]) for part in ("forward", "both")}} for name in calls]
    return {"dimension": dimension, "width": width, "batch": scale.batch, "rows": rows}


def convolution(scale: Scale) -> dict:
    """A training step of MNIST's first block, by the field's own tangents and by autograd's products."""
    own, x = first_block(scale.images, scale.device)
    solve = ck.Solve(trace="hutchinson", method="rk4", times=ck.uniform_grid(1))
    runs, first = {}, {}
    for name, velocity in (("own tangents", own), ("autograd", Bare(own))):
        flow = ck.Flow(ck.Normal(own.event_shape), ck.CNF(velocity)).to(scale.device)
        loss = ck.NegativeLogLikelihood(flow, solve=solve, penalties=PENALTIES)

        def value(loss=loss) -> Tensor:
            return loss(x, generator=torch.Generator(scale.device).manual_seed(0))[0]

        first[name] = value().item()
        runs[name] = iteration(value, own.parameters())
    if abs(first["autograd"] - first["own tangents"]) > 0.01 * abs(first["autograd"]):
        raise AssertionError(f"convolution: the two losses are {first}; wanted the same")
    with threads(scale.threads[0]):
        taken = scale.time(runs, 2.0)
    return {"images": scale.images, "rows": [row(name, timing) for name, timing in taken.items()]}


def scaling(scale: Scale, steps: int = 4) -> dict:
    """The time of a training iteration against the batch, and against the steps."""
    flow = trained_flow("rnode", scale.device)

    def run(batch: int, steps: int) -> Callable[[], None]:
        x, solve = points(batch, 3, scale.device), ck.Solve(method="rk4", times=ck.uniform_grid(steps))
        return iteration(lambda: -flow.log_prob(x, solve=solve).mean(), flow.parameters())

    with threads(scale.threads[0]):
        by_batch = scale.time({str(n): run(n, steps) for n in scale.batches}, 0.5)
        by_steps = scale.time({str(n): run(scale.batch, n) for n in scale.steps}, 0.5)
    return {
        "steps": steps,
        "batch": scale.batch,
        "by_batch": [{"batch": n, **asdict(by_batch[str(n)])} for n in scale.batches],
        "by_steps": [{"steps": n, **asdict(by_steps[str(n)])} for n in scale.steps],
    }


def memory(scale: Scale) -> dict:
    """The peak memory of a training iteration against the steps, for each way to differentiate."""
    x = points(scale.batch, 3, scale.device)

    def measured(gradient: str, steps: int) -> int:
        solve = ck.Solve(method="rk4", times=ck.uniform_grid(steps), gradient=gradient)

        def run_and_forget() -> None:
            flow = trained_flow("rnode", scale.device)  # anew: a field holds on to the memory of its last solve
            iteration(lambda: -flow.log_prob(x, solve=solve).mean(), flow.parameters())()

        return peak_memory(run_and_forget, scale.device)

    peaks = {kind: [measured(kind, n) for n in scale.steps] for kind in ("backprop", "checkpoint")}
    return {"batch": scale.batch, "state": x.numel() * x.element_size(), "steps": list(scale.steps), "peaks": peaks}


CASES = {
    f.__name__: f for f in (training, over_the_floor, evaluation, divergence, convolution, precision, scaling, memory)
}
ELSEWHERE = ("precision",)  # what a CPU has no use for


def usual(device: str) -> list[str]:
    """The names of the cases that are measured on a device."""
    return [name for name in CASES if device != "cpu" or name not in ELSEWHERE]
