"""What a graphics processor offers beside float32 and eager steps: TF32, and a compiled step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from fields import first_block, points, trained_flow
from iterations import PENALTIES
from measure import Scale, gradient, iteration, relative_distance, row
from torch import Tensor, nn

import cnfkit as ck


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Matrix products and convolutions of float32 numbers, with 10 bits behind the point or with all 23."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


Loss = Callable[[nn.Module, Tensor], Tensor]


def modes(scale: Scale) -> dict[str, tuple[bool, bool]]:
    """Of each mode whether its products are in TF32, and whether the step is compiled.

    No bf16: autocast ends where a map of cnfkit begins, for its inverse and its log-determinant must match it.
    """
    found = {"float32": (False, False), "TF32": (True, False)}
    return found | ({"TF32, compiled": (True, True)} if scale.compiled else {})


def small_field(scale: Scale, batch: int) -> tuple[nn.Module, Tensor, Loss]:
    """Four Runge–Kutta steps of the field in two dimensions, with the exact trace."""
    solve = ck.Solve(method="rk4", times=ck.uniform_grid(4))
    flow = trained_flow("rnode", scale.device)
    return flow, points(batch, 3, scale.device), lambda flow, x: -flow.log_prob(x, solve=solve).mean()


def images(scale: Scale) -> tuple[nn.Module, Tensor, Loss]:
    """One Runge–Kutta step of MNIST's first block, with a probe and both penalties."""
    field, x = first_block(scale.images, scale.device)
    flow = ck.Flow(ck.Normal(field.event_shape), ck.CNF(field)).to(scale.device)
    solve = ck.Solve(trace="hutchinson", method="rk4", times=ck.uniform_grid(1))

    def loss(flow: nn.Module, x: Tensor) -> Tensor:
        probes = torch.Generator(x.device).manual_seed(0)
        return ck.NegativeLogLikelihood(flow, solve=solve, penalties=PENALTIES)(x, generator=probes)[0]

    return flow, x, loss


def precision(scale: Scale) -> dict:
    """A training iteration in each mode, and the distance of its gradient from the one in float32."""
    tasks = {f"{batch} points": small_field(scale, batch) for batch in (scale.batch, scale.batches[-1])}
    tasks[f"{scale.images} images"] = images(scale)
    results = {}
    for task, (flow, x, loss) in tasks.items():
        runs, gradients = {}, {}
        for mode, (tf32, compiled) in modes(scale).items():
            value = partial(torch.compile(loss) if compiled else loss, flow, x)
            with products(tf32):
                gradients[mode] = gradient(value, flow.parameters())
            runs[mode] = products(tf32)(iteration(value, flow.parameters()))
        errors = {mode: relative_distance(came, gradients["float32"]) for mode, came in gradients.items()}
        taken = scale.time(runs)
        results[task] = [row(mode, taken[mode], error=error) for mode, error in errors.items()]
    return results
