"""A continuous normalizing flow: an ordinary differential equation as a bijection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from cnfkit.arguments import as_shape, by_hand, full_precision
from cnfkit.bijections.base import Bijection, Result
from cnfkit.ode.divergence import average, divergence, draw_probes
from cnfkit.ode.energies import PULLED, RATES, Visit
from cnfkit.ode.fields import MLPMoment
from cnfkit.ode.integrate import integrate
from cnfkit.ode.moments import Moment, moments, require_velocity
from cnfkit.ode.solve import Solve
from cnfkit.ode.statistics import Statistics
from cnfkit.ode.tape import Tape


class CNF(Bijection):
    r"""The flow of a velocity field, from data at :math:`t_0` to latents at :math:`t_1`.

    .. math::

        \dot z = v(t, z), \qquad f(x) = z(t_1) \text{ where } z(t_0) = x,

        \log \left| \det \frac{\partial f}{\partial x} \right| = \int_{t_0}^{t_1} \operatorname{tr}
        \frac{\partial v}{\partial z} \, \mathrm dt

    The energies of the path come on request by ``Solve.energies`` (with the mean over the dimensions in place of the
    sum if ``Solve.reduction`` says so), whichever direction is gone. The first two are RNODE's; the third is what makes
    a solver take short steps; the last is OT-Flow's, of a :class:`cnfkit.PotentialField`:

    .. math::

        \mathtt{kinetic\_energy} = \int \tfrac12 \|v\|^2 \, \mathrm dt,

        \mathtt{jacobian\_energy} = \int \left\| \frac{\partial v}{\partial z} \right\|_F^2 \mathrm dt,

        \mathtt{total\_derivative} = \int \left\| \frac{\partial v}{\partial z} v
        + \frac{\partial v}{\partial t} \right\|^2 \mathrm dt,

        \mathtt{hamilton\_jacobi} = \int \left| \frac{\partial \Phi}{\partial t}
        - \tfrac12 \|\nabla \Phi\|^2 \right| \mathrm dt

    Sources: Chen et al., *Neural ordinary differential equations*, theorem 1; Grathwohl et al., *FFJORD*, equation 4;
    Finlay et al., *How to train your neural ODE*, sections 2 and 3; Onken et al., *OT-Flow*, equation 8.

    Args:
        field: a module that takes a time, a scalar tensor, and points, shape ``(n, *event_shape)``, and returns
            velocities of the same shape; and a context, shape ``(n, features)``, if its attribute ``takes_context`` is
            true. No point's velocity may depend on another point. A field that has ``with_products(t, z, probes)``,
            see :class:`cnfkit.MLPField`, gives velocity and divergence in one pass; any other is differentiated by
            autograd.
        event_shape: the shape of one point; the field's own ``event_shape`` unless given.
        interval: :math:`(t_0, t_1)`.

    Raises:
        TypeError: if ``field`` is no module; on a call, if it returns another dtype.
        ValueError: if the event shape is not known, or the interval goes back; on a call, if the field returns another
            shape.
        SolveError: on a call, if the solve cannot be finished.

    >>> swirl = CNF(MLPField(2))
    >>> result = swirl(torch.randn(5, 2), solve=Solve(method="rk4", times=uniform_grid(4)))
    >>> result.value.shape, result.logdet.shape, result.evaluations
    (torch.Size([5, 2]), torch.Size([5]), 16)
    """

    def __init__(
        self,
        field: nn.Module,
        event_shape: int | Sequence[int] | None = None,
        interval: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if not isinstance(field, nn.Module):
            raise TypeError(f"field is a {type(field).__name__}; wanted a torch.nn.Module")
        own = getattr(field, "event_shape", None)
        if event_shape is None and own is None:
            raise ValueError(f"event_shape is missing, and {type(field).__name__} has none; wanted a shape, such as 2")
        shape = as_shape("event_shape", own if event_shape is None else event_shape)
        if own is not None and as_shape("event_shape", own) != shape:
            raise ValueError(f"event_shape is {tuple(shape)}, but that of the field is {tuple(own)}; they must agree")
        super().__init__(shape)
        try:
            t0, t1 = map(float, interval)
        except (TypeError, ValueError):
            t0, t1 = math.nan, math.nan
        if not -math.inf < t0 <= t1 < math.inf:
            raise ValueError(f"interval is {interval!r}; wanted two numbers, the smaller one first")
        self.field, self.interval = field, (t0, t1)
        self.takes_context = bool(getattr(field, "takes_context", False))

    def between(self, t0: float, t1: float) -> CNF:
        """The part of this flow from one time to a later one; it shares the field.

        A flow from the base through the part from ``t`` to the end is the density at time ``t``.
        """
        if not self.interval[0] <= t0 <= t1 <= self.interval[1]:
            raise ValueError(f"t0, t1 are {t0!r}, {t1!r}; wanted times in order, within {self.interval}")
        return CNF(self.field, self.event_shape, (t0, t1))

    def _forward(self, x: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        return self._integrate(x, *self.interval, context, solve or Solve())

    def _inverse(self, z: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        return self._integrate(z, *reversed(self.interval), context, solve or Solve())

    def _integrate(self, points: Tensor, start: float, end: float, context: Tensor | None, solve: Solve) -> Result:
        if torch.is_inference_mode_enabled():  # where autograd records nothing, not even for a divergence
            with torch.inference_mode(False), torch.no_grad():
                context = context if context is None else context.clone()
                return self._integrate(points.clone(), start, end, context, solve)
        batch = points.shape[: points.dim() - len(self.event_shape)]
        z = points.reshape(-1, *self.event_shape)
        context = context if context is None else context.reshape(-1, context.shape[-1])
        dynamics = Dynamics(self, solve, z, context)
        if not len(z) or start == end:
            value, integrals, stats = z, z.new_zeros(dynamics.rates, len(z)), Statistics()
        else:
            control = solve.trace == "exact" if solve.control_logdet is None else solve.control_logdet
            controlled = dynamics.traces if control else 0
            own = (*self.field.parameters(), *([] if context is None else [context]))
            parameters = tuple(parameter for parameter in own if parameter.requires_grad)
            with full_precision(z):  # half precision would be the solver's error
                value, integrals, stats = integrate(
                    dynamics, z, start, end, solve, dynamics.rates, controlled, parameters
                )
            if dynamics.traces and not controlled and solve.tolerance is not None:
                stats.status = "points within tolerance"
        traces, energies = integrals[: dynamics.traces], integrals[dynamics.traces :]
        logdet, error = average(traces if dynamics.traces else z.new_full((1, len(z)), math.nan), solve)
        sign = 1.0 if end > start else -1.0  # an energy is that of the path, whichever way it is gone
        return Result(
            value.view(points.shape),
            logdet.view(batch),
            {name: (sign * energy).view(batch) for name, energy in zip(solve.energies, energies, strict=True)},
            (stats,),
            error if error is None else error.view(batch),
        )

    def extra_repr(self) -> str:
        interval = "" if self.interval == (0.0, 1.0) else f", interval={self.interval}"
        return super().extra_repr() + interval


class Dynamics:
    """What the solver integrates: velocity, divergence, energies.

    Attributes:
        traces: how many of the rates are divergences: one, or one for each probe.
        rates: how many there are.
    """

    def __init__(self, flow: CNF, solve: Solve, z: Tensor, context: Tensor | None) -> None:
        self.field, self.solve, self.context = flow.field, solve, context
        self.probes = draw_probes(solve, z)
        self.dimensions = flow.event_shape.numel() if solve.reduction == "mean" else 1
        self.traces = {"none": 0, "exact": 1, "hutchinson": solve.probes or 1}[solve.trace]
        self.rates = self.traces + len(solve.energies)

    def at(self, times: Tensor) -> list:
        """The dynamics at some times, as functions of the state."""
        return self.evaluations(self.moments(times))

    def __call__(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        (evaluate,) = self.at(t[None])
        return evaluate(z)

    def moments(self, times: Tensor) -> list[Moment]:
        """The field at some times."""
        found = moments(self.field, times, self.context)
        return found if self.solve.precision == "full" else [moment.lowered() for moment in found]

    def evaluations(self, found: list[Moment]) -> list:
        """The dynamics at some moments, as functions of the state."""
        return [partial(self._evaluate, moment) for moment in found]

    def taped(self, found: list[Moment], z: Tensor) -> Tape | None:
        """The dynamics at the moments of a grid, differentiated by hand; None where there is no such way."""
        twice = "jacobian_energy" in self.solve.energies and self.solve.trace == "exact" and self.probes is not None
        if twice or not by_hand(z) or not set(self.solve.energies) <= set(PULLED):
            return None
        if not all(type(moment) is MLPMoment for moment in found):
            return None
        learnt = z.requires_grad or any(part.requires_grad for part in found[0].network.parts)
        return Tape(self, found) if learnt else None

    def carried(self) -> Tensor | str | None:
        """What goes through the field beside the points: probes, the unit vectors, what the trace needs, nothing."""
        if self.solve.trace == "none":
            return None
        if self.probes is not None:
            return self.probes
        return "unit" if "jacobian_energy" in self.solve.energies else "trace"

    def _evaluate(self, moment: Moment, z: Tensor, rated: bool = True) -> tuple[Tensor, Tensor | None]:
        """The velocity, and the rates if they are used: a step of Dormand–Prince, say, has stages of weight zero."""
        carried, divergences, rows = self.carried() if rated else None, None, None
        if carried is None:
            v = moment.value(z)
            require_velocity(self.field, v, z)
            if not rated:
                return v, None
        elif self.solve.trace == "exact" and carried != "unit":
            v, divergences = moment.with_trace(z)
            divergences = divergences[None]
            if self.probes is not None:
                _, rows = moment.with_products(z, self.probes)
        else:
            v, rows = moment.with_products(z, self.probes)
        return v, self.rates_at(Visit(moment, z, v, rows, self.probes), divergences)

    def rates_at(self, visit: Visit, divergences: Tensor | None = None) -> Tensor:
        """The rates, shape ``(m, n)``; divergences that are not given come from the products."""
        if divergences is None and self.traces:
            divergences = divergence(visit.products, visit.probes)
        rates = [] if divergences is None else [divergences]
        if not self.solve.energies:
            return rates[0] if rates else visit.z.new_zeros(0, len(visit.z))
        rates += [RATES[name](visit)[None] / self.dimensions for name in self.solve.energies]
        return torch.cat(rates)
