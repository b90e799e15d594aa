"""One field in four libraries, each used as its documentation uses it for a continuous normalizing flow.

An adapter offers ``log_prob(x, tolerance)``, ``sample(z, tolerance)``, and the ``divergence(z)`` of one evaluation of
the field. A fixed-step solver takes its number of steps in place of the tolerance. Sampling integrates the velocity
alone in every library, and the divergence is found without a graph where no gradient is wanted, as far as it allows.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import sys
import types
from unittest import mock

import torch
import torchdiffeq
from fields import PlainField, noise, points
from measure import mean_distance
from torch import Tensor, nn

import cnfkit as ck


def base_log_prob(z: Tensor) -> Tensor:
    """The standard normal, in the cheapest form: no library should win by its base."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


class Ours(nn.Module):
    """cnfkit: the flow itself, with the exact trace or Hutchinson's estimate.

    Args:
        flow: the flow.
        exact: whether the trace is.
        method: takes a number of equal steps; unless given, the usual one takes a tolerance.
    """

    def __init__(self, flow: ck.Flow, exact: bool = True, method: str | None = None) -> None:
        super().__init__()
        self.flow, self.trace, self.method = flow, "exact" if exact else "hutchinson", method

    def solve(self, trace: str, setting: float) -> ck.Solve:
        if self.method is None:
            return ck.Solve(trace=trace, tolerance=setting)
        return ck.Solve(trace=trace, method=self.method, times=ck.uniform_grid(setting))

    def log_prob(self, x: Tensor, setting: float) -> Tensor:
        return self.flow.log_prob(x, solve=self.solve(self.trace, setting))

    def sample(self, z: Tensor, setting: float) -> Tensor:
        return self.flow.bijection.inverse(z, solve=self.solve("none", setting)).value

    def divergence(self, z: Tensor) -> Tensor:
        return self.flow.bijection(z, solve=ck.Solve(trace=self.trace, method="euler", times=(0, 1))).logdet


class Torchdiffeq(nn.Module):
    """A CNF written plainly on torchdiffeq: state and log-determinant in a tuple, one backward pass for each row.

    Args:
        field: ``v(t, z)``.
        adjoint: whether gradients come from the adjoint equation, else from backpropagation through the solver.
        method: of torchdiffeq; a fixed-step one takes a number of steps.
    """

    def __init__(self, field: PlainField, adjoint: bool = False, method: str = "dopri5") -> None:
        super().__init__()
        self.field, self.adjoint, self.method = field, adjoint, method

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            z = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            v = self.field(t, z)
            trace = torch.zeros_like(z[:, 0])
            for i in range(z.shape[1]):
                row = torch.autograd.grad(v[:, i].sum(), z, create_graph=training, retain_graph=True)[0]
                trace = trace + row[:, i]
        return v, trace

    def solve(self, system: nn.Module, state, start: float, end: float, tolerance: float):
        """The state at the end."""
        fixed = self.method == "rk4"
        options = {"options": {"step_size": 1 / tolerance}} if fixed else {"rtol": tolerance, "atol": tolerance}
        solver = torchdiffeq.odeint_adjoint if self.adjoint else torchdiffeq.odeint
        interval = torch.tensor([start, end], device=next(self.field.parameters()).device)
        return solver(system, state, interval, method=self.method, **options)

    def log_prob(self, x: Tensor, tolerance: float) -> Tensor:
        z, logdet = self.solve(self, (x, torch.zeros_like(x[:, 0])), 0.0, 1.0, tolerance)
        return base_log_prob(z[-1]) + logdet[-1]

    def sample(self, z: Tensor, tolerance: float) -> Tensor:
        return self.solve(self.field, z, 1.0, 0.0, tolerance)[-1]

    def divergence(self, z: Tensor) -> Tensor:
        return self(torch.tensor(0.0, device=z.device), (z, z[:, 0]))[1]


class Zuko(nn.Module):
    """zuko: its free-form Jacobian transform, which has one solver and one gradient."""

    def __init__(self, field: PlainField, exact: bool = True) -> None:
        super().__init__()
        from zuko.transforms import FreeFormJacobianTransform

        self.field, self.exact, self.transform = field, exact, FreeFormJacobianTransform

    def at(self, tolerance: float):
        """The transform with a tolerance, from data at 0 to latents at 1."""
        phi = self.field.parameters() if torch.is_grad_enabled() else ()
        return self.transform(self.field, 0.0, 1.0, phi, atol=tolerance, rtol=tolerance, exact=self.exact)

    def log_prob(self, x: Tensor, tolerance: float) -> Tensor:
        z, logdet = self.at(tolerance).call_and_ladj(x)
        return base_log_prob(z) + logdet

    def sample(self, z: Tensor, tolerance: float) -> Tensor:
        return self.at(tolerance).inv(z)

    def divergence(self, z: Tensor) -> Tensor:
        once = lambda system, state, *_: system(torch.tensor(0.0, device=state[0].device), *state)  # noqa: E731
        with mock.patch("zuko.transforms.odeint", once):
            return self.at(1.0).call_and_ladj(z)[1]


class Torchdyn(nn.Module):
    """torchdyn: a ``CNF`` in a ``NeuralODE``, the log-determinant as the first coordinate of the state.

    Args:
        field: the network in it is shared; torchdyn sets the time of its layers.
        sensitivity: ``"adjoint"`` or ``"autograd"``.
        solver: ``"dopri5"`` or ``"tsit5"``. Its fixed-step ``"rk4"`` is left out: it takes its stages at 0, 0, 1/2 and
            1/2 of the step in place of 0, 1/2, 1/2 and 1, and is of first order where the field depends on time.
        exact: the trace by autograd, or Hutchinson's estimate.
    """

    def __init__(
        self, field: PlainField, sensitivity: str = "autograd", solver: str = "dopri5", exact: bool = True
    ) -> None:
        super().__init__()
        # torchdyn takes one name of pytorch_lightning, a base class of its models that nothing here needs.
        sys.modules.setdefault("pytorch_lightning", types.SimpleNamespace(LightningModule=nn.Module))
        from torchdyn.core import NeuralODE
        from torchdyn.models import CNF, hutch_trace

        d, device = field.event_shape[0], next(field.parameters()).device
        noise = torch.distributions.MultivariateNormal(*(make(d, device=device) for make in (torch.zeros, torch.eye)))
        options = {"trace_estimator": hutch_trace, "noise_dist": noise} if not exact else {}
        with contextlib.redirect_stdout(io.StringIO()):  # it says of every network that it wraps it
            models = CNF(field.net, **options), field.net
            self.density, self.velocity = (
                NeuralODE(model, solver=solver, solver_adjoint=solver, sensitivity=sensitivity) for model in models
            )

    def log_prob(self, x: Tensor, tolerance: float) -> Tensor:
        state = self.solve(self.density, torch.cat([torch.zeros_like(x[:, :1]), x], 1), (0.0, 1.0), tolerance)
        return base_log_prob(state[:, 1:]) - state[:, 0]

    def sample(self, z: Tensor, tolerance: float) -> Tensor:
        return self.solve(self.velocity, z, (1.0, 0.0), tolerance)

    def divergence(self, z: Tensor) -> Tensor:
        state, _ = self.density._prep_integration(torch.cat([torch.zeros_like(z[:, :1]), z], 1), None)  # the probes
        return -self.density.vf(torch.tensor(0.0, device=z.device), state)[:, 0]

    def solve(self, model: nn.Module, state: Tensor, interval: tuple[float, float], tolerance: float) -> Tensor:
        """The state at the end."""
        model.atol = model.rtol = model.atol_adjoint = model.rtol_adjoint = tolerance
        return model(state, torch.tensor(interval, device=state.device))[1][-1]


def training_peers(field: PlainField) -> dict[str, nn.Module]:
    """Every way in which a peer trains a CNF with the exact trace, by name."""
    return {
        "zuko": Zuko(field),
        "torchdyn, adjoint": Torchdyn(field, "adjoint"),
        "torchdyn, autograd": Torchdyn(field, "autograd"),
        "torchdyn, tsit5, autograd": Torchdyn(field, "autograd", "tsit5"),
        "torchdiffeq, adjoint": Torchdiffeq(field, adjoint=True),
        "torchdiffeq, backprop": Torchdiffeq(field),
        "torchdiffeq, rk4, backprop": Torchdiffeq(field, method="rk4"),
    }


def judge(plain: PlainField) -> Torchdiffeq:
    """The same field in float64, integrated by a method of order 8 that nobody is timed with."""
    return Torchdiffeq(copy.deepcopy(plain).double(), adjoint=True, method="dopri8")


def require_agreement(libraries: dict[str, nn.Module], plain: PlainField) -> None:
    """Raise unless all libraries give the same log-densities and samples: else they would be timed at other tasks."""
    device = next(plain.parameters()).device
    x, z = points(200, 4, device), noise(200, 2, seed=5, device=device)
    with torch.no_grad():
        log_prob, sample = (call(of.double(), 1e-8) for call, of in _calls(judge(plain), x, z))
        for name, library in libraries.items():
            setting = 32 if "rk4" in name or "rk6" in name else 1e-5
            for (call, of), truth in zip(_calls(library, x, z), (log_prob, sample), strict=True):
                if not (distance := mean_distance(call(of, setting), truth)) < 1e-3:
                    raise AssertionError(f"{name}: its {call.__name__} is {distance:.1e} from the truth; wanted 1e-3")


def _calls(library: nn.Module, x: Tensor, z: Tensor) -> tuple:
    return (library.log_prob, x), (library.sample, z)
