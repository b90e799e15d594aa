"""Training iterations: by everybody at one gradient error, and over the floor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from fields import PlainField, floor, points, trained_flow
from measure import Scale, cheapest, gradient, iteration, relative_distance, row, threads
from peers import Ours, judge, require_agreement, training_peers
from torch import Tensor, nn

import cnfkit as ck

PENALTIES = {"kinetic_energy": 0.01, "jacobian_energy": 0.01}
METHODS = ("rk4", "rk6", "dopri5")


@dataclass
class Way:
    """A way to train: the loss and the evaluations at a setting, and the settings, the cheapest first.

    Attributes:
        calls: how many iterations are timed at once: a grid that serves 25 batches is chosen once in them.
    """

    name: str
    loss: Callable[[float], Callable[[], Tensor]]
    evaluations: Callable[[float], int]
    parameters: list[nn.Parameter]
    settings: tuple[float, ...]
    calls: int = 1
    facts: dict = field(default_factory=dict)

    def error(self, truth: Tensor, setting: float) -> float:
        return relative_distance(gradient(self.loss(setting), self.parameters), truth)

    def run(self, setting: float) -> Callable[[], None]:
        once = iteration(self.loss(setting), self.parameters)
        return lambda: [once() for _ in range(self.calls)]


def our_way(name: str, flow: ck.Flow, x: Tensor, solve: Callable, penalties: dict | None = None, **options) -> Way:
    def loss(setting: float) -> ck.NegativeLogLikelihood:
        return ck.NegativeLogLikelihood(flow, solve=solve(setting), penalties=penalties)

    def value(setting: float) -> Callable[[], Tensor]:
        module = loss(setting)
        return lambda: module(x)[0]

    return Way(name, value, lambda s: int(loss(s)(x)[1]["evaluations"]), list(flow.parameters()), **options)


def our_ways(flow: ck.Flow, x: Tensor, scale: Scale) -> list[Way]:
    def uniform(method: str) -> Callable[[float], ck.Solve]:
        return lambda steps: ck.Solve(method=method, times=ck.uniform_grid(steps))

    def frozen(tolerance: float) -> ck.FrozenGrid:
        return ck.FrozenGrid(tolerance=tolerance)

    every, tolerances = ck.FrozenGrid().every if scale.refreshes else 1, scale.tolerances
    return [
        *(our_way(f"cnfkit, {m}, uniform grid", flow, x, uniform(m), settings=scale.grids) for m in METHODS),
        our_way("cnfkit, frozen grid", flow, x, frozen, settings=tolerances, calls=every),
        our_way("cnfkit, adaptive", flow, x, lambda s: ck.Solve(tolerance=s), settings=tolerances),
    ]


def peer_way(name: str, peer: nn.Module, plain: PlainField, x: Tensor, scale: Scale) -> Way:
    def loss(setting: float) -> Callable[[], Tensor]:
        return lambda: -peer.log_prob(x, setting).mean()

    def evaluations(setting: float) -> int:
        calls: list[int] = []
        handle = plain.net.register_forward_hook(lambda *_: calls.append(1))
        loss(setting)().backward()
        handle.remove()
        return len(calls)

    return Way(name, loss, evaluations, list(plain.parameters()), scale.grids if "rk4" in name else scale.tolerances)


def guarded_way(flow: ck.Flow, x: Tensor, scale: Scale) -> Way:
    """The default that is recommended for training; its truth is the gradient of the same loss, penalties included."""
    grid = ck.FrozenGrid()
    options = {"settings": (grid.adaptive.tolerance,), "calls": grid.every if scale.refreshes else 1}
    way = our_way("cnfkit, guarded default", flow, x, lambda _: ck.FrozenGrid(), PENALTIES, **options)
    exact, solve = copy.deepcopy(flow).double(), ck.Solve(tolerance=scale.tight, gradient="checkpoint")
    tight = ck.NegativeLogLikelihood(exact, solve=solve, penalties=PENALTIES)
    truth = gradient(lambda: tight(x.double())[0], exact.parameters())
    way.facts["error"] = way.error(truth, way.settings[0])
    way.facts["solver_error"] = ck.solver_error(flow, x, solve=grid(flow, x))
    return way


def training(scale: Scale, below: float = 3e-4) -> dict:
    """A training iteration at one gradient error, for everybody by the cheapest setting that reaches it."""
    x, results = points(scale.batch, 3, scale.device), {}
    for name in scale.fields:
        flow = trained_flow(name, scale.device)
        plain = PlainField(flow.bijection.field)
        peers = training_peers(plain)
        require_agreement({"cnfkit": Ours(flow), **peers}, plain)
        tight = judge(plain)
        truth = gradient(lambda tight=tight: -tight.log_prob(x.double(), scale.tight).mean(), tight.parameters())
        found, unreached = [], []
        for way in [*our_ways(flow, x, scale), *(peer_way(key, peer, plain, x, scale) for key, peer in peers.items())]:
            if hit := cheapest(way.settings, partial(way.error, truth), below):
                found.append((way, hit[0], {"error": hit[1]}))
            else:
                unreached.append(way.name)
        guarded = guarded_way(flow, x, scale)
        found.append((guarded, guarded.settings[0], guarded.facts))
        runs = {way.name: way.run(setting) for way, setting, _ in found}
        results[name] = {"unreached": unreached, "threads": {}}
        for n in scale.threads:
            rounds = scale if n == scale.threads[0] else replace(scale, least=2)
            with threads(n):
                taken = rounds.time(runs)
            results[name]["threads"][str(n)] = [
                row(
                    way.name,
                    taken[way.name].over(way.calls),
                    setting=setting,
                    evaluations=way.evaluations(setting),
                    **facts,
                )
                for way, setting, facts in found
            ]
    return {"below": below, "batch": scale.batch, "fields": results}


def over_the_floor(scale: Scale, steps: int = 4) -> dict:
    """A training iteration by a few Runge–Kutta steps over the bare field for as many evaluations."""
    flow, x = trained_flow("rnode", scale.device), points(scale.batch, 3, scale.device)
    bare, evaluations = floor(flow.bijection.field), 4 * steps
    inputs = torch.cat([x, x.new_zeros(len(x), 1)], 1).requires_grad_()
    outer = torch.ones_like(x)

    def bottom() -> None:
        for _ in range(evaluations):
            torch.autograd.grad(bare(inputs), [inputs, *bare.parameters()], outer)

    runs: dict[str, Callable[[], object]] = {"floor": bottom}
    for trace in ("exact", "hutchinson"):
        solve = ck.Solve(trace=trace, method="rk4", times=ck.uniform_grid(steps))
        runs[trace] = iteration(lambda solve=solve: -flow.log_prob(x, solve=solve).mean(), flow.parameters())
    results = {}
    for n in scale.threads:
        with threads(n):
            results[str(n)] = [row(name, timing) for name, timing in scale.time(runs, 0.5).items()]
    return {"steps": steps, "evaluations": evaluations, "batch": scale.batch, "threads": results}
