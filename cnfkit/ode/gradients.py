r"""Three ways to differentiate a solve in one node of autograd's graph.

*Backpropagation* keeps what every evaluation computed, in memory that one solve leaves to the next. *Checkpointing*
keeps the state at the beginning of each step, and takes the step once more when its turn comes: the same gradients, to
rounding. The *adjoint* keeps the last state alone, and solves an equation for the gradient backwards in time: the
gradients within the tolerance of that second solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cnfkit.arguments import full_precision
from cnfkit.ode.solve import Solve
from cnfkit.ode.solvers import Counting, grid_steps, run, stages, weighted, without_error
from cnfkit.ode.statistics import Statistics
from cnfkit.ode.tape import Given, Tape


class Backpropagated(torch.autograd.Function):
    r"""A solve on a grid that goes back through its steps by hand, as autograd would through each operation.

    With the step :math:`z' = z + h \sum_i b_i k_i`, :math:`k_i = v(z + h \sum_{j<i} a_{ij} k_j)`, and the gradients
    :math:`\bar z'` after it and :math:`g` in the integrals,

    .. math::

        \bar k_i = h \Bigl( b_i \bar z' + \sum_{j>i} a_{ji} y_j \Bigr), \qquad
        y_i = \left( \frac{\partial v}{\partial z} \right)^{\!\top} \bar k_i
            + h b_i \left( \frac{\partial r}{\partial z} \right)^{\!\top} g, \qquad
        \bar z = \bar z' + \sum_i y_i

    Source: Hairer, Lubich and Wanner, *Geometric numerical integration*, section VI.10.
    """

    @staticmethod
    def forward(ctx, dynamics: Counting, start: float, end: float, solve: Solve, z, *tensors):
        ctx.tape, ctx.way = dynamics.dynamics, (start, end, solve)
        ctx.save_for_backward(z, *tensors)
        return run(dynamics, z, start, end, solve, 0)[:2]

    @staticmethod
    def backward(ctx, g, g_total):
        tape, (start, end, solve) = ctx.tape, ctx.way
        z, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or tape.kept is None:  # a second derivative, or a second time
            twice = torch.is_grad_enabled()
            with torch.enable_grad():
                dynamics = Counting(tape.plain, Statistics())
                ends = run(dynamics, z, start, end, solve, 0)[:2]
            # the form of a trace is made of the weights, and what comes to it has come to them
            needed = [*ctx.needs_input_grad[4:-1], ctx.needs_input_grad[-1] and tape.form is None]
            starts = [tensor for tensor, need in zip((z, *tensors), needed, strict=True) if need]
            options = {"create_graph": twice, "retain_graph": True, "materialize_grads": True}
            found = iter(torch.autograd.grad(ends, starts, (g, g_total), **options))
            return *[None] * 4, *(next(found) if need else None for need in needed)
        with full_precision(g):
            return *[None] * 4, *_back_by_hand(tape, start, end, solve, g, g_total, ctx.needs_input_grad[5:])


def _back_by_hand(tape: Tape, start: float, end: float, solve: Solve, g: Tensor, g_total: Tensor, wanted) -> tuple:
    """The gradients in the points and in the tape's tensors."""
    tableau, k = without_error(solve.method), len(tape.kept)
    sums, shares = tape.zeros(wanted)
    for _, h in reversed(grid_steps(solve, start, end)):
        pulled: list[Tensor] = []  # y, from the last stage to the first
        for i in reversed(range(len(tableau.b))):
            k -= 1
            after = [row[i] for row in reversed(tableau.a[i:])]
            g_velocity = weighted(h, [tableau.b[i], *after], [g, *pulled])
            pulled.append(tape.pull(k, shares[k], g_velocity, h * tableau.b[i] * g_total))
        g = sum(pulled, g)
    tape.clear()
    return g, *sums


def backpropagated(dynamics: Counting, z: Tensor, start: float, end: float, solve: Solve) -> tuple[Tensor, Tensor]:
    """The state at the end of a grid, and the integrals: gone back by hand where that is possible, else by autograd."""
    field = dynamics.dynamics
    if not hasattr(field, "taped"):
        return run(dynamics, z, start, end, solve, 0)[:2]
    tableau = without_error(solve.method)
    times = [time for t, h in grid_steps(solve, start, end) for time in stages(tableau, t, h)]
    found = field.moments(torch.stack([z.new_full((), t) for t in times]))
    tape = field.taped(found, z)
    counting = Counting(tape or Given(field.evaluations(found)), dynamics.stats, dynamics.watched)
    if tape is None:
        return run(counting, z, start, end, solve, 0)[:2]
    return Backpropagated.apply(counting, start, end, solve, z, *tape.tensors)


class Checkpointed(torch.autograd.Function):
    r"""A solve whose steps are taken again, from the last to the first, in the backward pass.

    .. math:: \bar z_k = \left( \frac{\partial z_{k+1}}{\partial z_k} \right)^{\!\top} \bar z_{k+1}
    """

    @staticmethod
    def forward(ctx, dynamics: Counting, start: float, end: float, solve: Solve, controlled: int, z, *parameters):
        value, total, path = run(dynamics, z, start, end, solve, controlled, keep=True)
        ctx.dynamics, ctx.step = dynamics, solve.on((0, 1), solve.method)
        ctx.steps = [(t, h) for t, h, _ in path]
        ctx.save_for_backward(*parameters, *(begun for _, _, begun in path))
        return value, total

    @staticmethod
    def backward(ctx, g, g_total):
        parameters, states = ctx.saved_tensors[: -len(ctx.steps)], ctx.saved_tensors[-len(ctx.steps) :]
        _refuse_twice("checkpoint")
        dynamics = Counting(ctx.dynamics.dynamics, Statistics(), watched=False)  # it has been, there
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for (t, h), z in zip(reversed(ctx.steps), reversed(states), strict=True):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                ends = backpropagated(dynamics, z, t, t + h, ctx.step)
            g, *gradients = _gradients(ends, (g, g_total), (z, *parameters))
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
        ctx.dynamics.stats.backward_evaluations += dynamics.stats.evaluations
        return *[None] * 5, g, *sums


class Adjoint(torch.autograd.Function):
    r"""A solve that is differentiated by another one, backwards in time.

    With :math:`L` a function of the end :math:`z(t_1)` and of the integrals :math:`\int r \, \mathrm dt`, and
    :math:`g = \partial L / \partial \int r`,

    .. math::

        \dot a = -\left( \frac{\partial v}{\partial z} \right)^{\!\top} a
                 - \left( \frac{\partial r}{\partial z} \right)^{\!\top} g, \qquad
        a(t_1) = \frac{\partial L}{\partial z(t_1)}, \qquad
        a(t_0) = \frac{\partial L}{\partial z(t_0)},

        \frac{\partial L}{\partial \theta} = \int_{t_0}^{t_1} \left( \frac{\partial v}{\partial \theta} \right)^{\!\top}
        a + \left( \frac{\partial r}{\partial \theta} \right)^{\!\top} g \, \mathrm dt

    The state goes back along, from its end. The steps of an adaptive solver are chosen so that all three are within its
    tolerance: the last can be hard where the others rest. Sources: Pontryagin et al., 1962; Chen et al., *Neural
    ordinary differential equations*, section 2.
    """

    @staticmethod
    def forward(ctx, dynamics: Counting, start: float, end: float, solve: Solve, controlled: int, z, *parameters):
        value, total, _ = run(dynamics, z, start, end, solve, controlled)
        ctx.dynamics, ctx.interval, ctx.solve = dynamics, (start, end), solve
        ctx.save_for_backward(value, *parameters)
        return value, total

    @staticmethod
    def backward(ctx, g, g_total):
        _refuse_twice("adjoint")
        value, *parameters = ctx.saved_tensors
        # the equation is linear in the gradient; of size 1 it is solved as well as the points are, however small it is
        size = max((part.abs().amax().item() for part in (g, g_total) if part.numel()), default=0.0) or 1.0
        g, g_total = g / size, g_total / size

        def augmented(t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            z, a = state.unbind()
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                v, rates = ctx.dynamics.dynamics(t, z)
            g_z, *g_parameters = _gradients((v, rates), (a, g_total), (z, *parameters))
            flat = [gradient.flatten() for gradient in g_parameters]
            return torch.stack([v.detach(), -g_z]), torch.cat([z.new_zeros(0), *flat])

        back, (start, end) = Counting(augmented, Statistics()), ctx.interval
        sizes = [parameter.numel() for parameter in parameters]
        state, total, _ = run(back, torch.stack([value, g]), end, start, ctx.solve, sum(sizes))
        ctx.dynamics.stats.backward_evaluations += back.stats.evaluations
        sums = [-part.view_as(parameter) for part, parameter in zip(total.split(sizes), parameters, strict=True)]
        return *[None] * 5, size * state[1], *(size * part for part in sums)


def _gradients(ends, weights, starts) -> tuple[Tensor, ...]:
    """Vector–Jacobian products; zeros where nothing depends on anything."""
    pairs = [(end, weight) for end, weight in zip(ends, weights, strict=True) if end.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(start) for start in starts)
    ends, weights = zip(*pairs, strict=True)
    return torch.autograd.grad(ends, starts, weights, materialize_grads=True)


def _refuse_twice(gradient: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"gradient is {gradient!r}, which differentiates once; 'backprop' differentiates twice")
