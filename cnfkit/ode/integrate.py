r"""Solving :math:`\dot z = v(t, z)` from one time to another: which solver, and which gradient."""

from __future__ import annotations

import torch
import torchdiffeq
from torch import Tensor

from cnfkit.arguments import concrete
from cnfkit.ode.gradients import Adjoint, Checkpointed, backpropagated
from cnfkit.ode.solve import Solve, adapts
from cnfkit.ode.solvers import Counting, Dynamics, finite, largest, not_finite, run
from cnfkit.ode.statistics import SolveError, Statistics


def integrate(
    dynamics: Dynamics,
    z: Tensor,
    start: float,
    end: float,
    solve: Solve,
    rates: int = 0,
    controlled: int = 0,
    parameters: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor, Statistics]:
    r"""Solve :math:`\dot z = v(t, z)` and integrate rates along the solution.

    .. math:: z(t_1) = z(t_0) + \int_{t_0}^{t_1} v \, \mathrm dt, \qquad \int_{t_0}^{t_1} \text{rates} \, \mathrm dt

    Args:
        dynamics: gives velocity and rates.
        z: the state at ``start``, shape ``(n, *event)``.
        start, end: :math:`t_0` and :math:`t_1`, in either order.
        solve: how.
        rates: their number :math:`m`.
        controlled: how many of them, the first ones, the error control of an adaptive solver looks at.
        parameters: what checkpointing and the adjoint differentiate with respect to, beside ``z``.

    Returns:
        The state at ``end``; the integrals, shape ``(m, n)``; the statistics.

    Raises:
        SolveError: if a number is not finite, or an adaptive solver's step vanishes or its steps are too many.
        ValueError: if the tolerance is finer than the dtype of ``z`` resolves.
    """
    stats = Statistics()
    counting = Counting(dynamics, stats)
    if solve.tolerance is not None:
        stats.status = "within tolerance"
        finest = 4 * torch.finfo(z.dtype).eps
        if solve.tolerance < finest:
            raise ValueError(
                f"tolerance is {solve.tolerance:.2g}, finer than {z.dtype} resolves ({finest:.1g}); "
                "wanted a larger one, or a model and points in float64"
            )
    if solve.method.startswith("torchdiffeq:"):
        z, integrals = _by_torchdiffeq(counting, z, start, end, solve, rates, controlled, parameters)
    elif not torch.is_grad_enabled() or (solve.gradient == "backprop" and solve.times is None):
        z, integrals, _ = run(counting, z, start, end, solve, controlled)
    elif solve.gradient == "backprop":
        z, integrals = backpropagated(counting, z, start, end, solve)
    else:
        kind = Checkpointed if solve.gradient == "checkpoint" else Adjoint
        z, integrals = kind.apply(counting, start, end, solve, controlled, z, *parameters)
    counting.forward = False
    return z, integrals, stats


def _by_torchdiffeq(
    dynamics: Counting, z: Tensor, start: float, end: float, solve: Solve, rates: int, controlled: int, parameters
) -> tuple[Tensor, Tensor]:
    method = solve.method.removeprefix("torchdiffeq:")
    shares, options = (0.0, 1.0), {"method": method}
    if adapts(solve.method):
        options |= {"rtol": solve.tolerance, "atol": solve.tolerance}
    else:
        shares = solve.times if end > start else tuple(1 - share for share in reversed(solve.times))
        dynamics.stats.accepted, dynamics.stats.times = len(shares) - 1, solve.times
    solver = torchdiffeq.odeint
    if solve.gradient == "adjoint":
        solver, options["adjoint_params"] = torchdiffeq.odeint_adjoint, parameters
    grid = z.new_tensor([start + (end - start) * share for share in shares])
    if adapts(solve.method):  # it would step past the end and interpolate back, unless the end is a time to step to
        norm = {"norm": lambda state: _norm(state, controlled), "max_num_steps": solve.max_steps, "step_t": grid}
        options["options"] = norm | ({"dtype": torch.float32} if z.device.type == "mps" else {})
    state = (z, z.new_zeros(rates, len(z))) if rates else (z,)

    def system(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return dynamics(t, state[0])[: len(state)]

    try:
        path = solver(system, state, grid, **options)
    except AssertionError as error:  # how torchdiffeq says that it cannot go on
        raise SolveError(
            f"torchdiffeq's {method} stopped ({(str(error) or 'an assertion failed').splitlines()[0]}); it had begun",
            start,
            0,
            largest(z),
            "try a larger tolerance or max_steps, or penalties on the path",
        ) from error
    z, total = path[0][-1], path[1][-1] if rates else z.new_zeros(0, len(z))
    if concrete(z) and not finite(z, total):
        bad = next(k for k in range(len(grid)) if not finite(*(part[k] for part in path)))
        last = max(bad - 1, 0)
        raise not_finite(grid[last].item(), last, path[0][last])
    return z, total


def _norm(state: tuple[Tensor, ...], controlled: int) -> Tensor:
    parts = [state[0].flatten(), *(rates[:controlled].flatten() for rates in state[1:])]
    return torch.cat(parts).square().mean().sqrt()
