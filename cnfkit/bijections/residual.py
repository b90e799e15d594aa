"""Residual flows: the identity plus a contraction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cnfkit.arguments import as_count, check_positive, full_precision
from cnfkit.bijections.base import Bijection, Result
from cnfkit.noise import PointNoise, draw
from cnfkit.ode.divergence import average, draw_probes
from cnfkit.ode.solve import Solve

# The roulette: so many terms always, then with this chance one more, and so on. Terms fall as cᵏ and weights grow as
# ANOTHER⁻ᵏ, so the variance is finite for c² < ANOTHER, as with c = 0.9; with an even chance it need not be.
ALWAYS, ANOTHER = 4, 0.85


class Residual(Bijection):
    r"""The identity plus a contraction, which is invertible whatever else the contraction is.

    .. math::

        z = x + g(x), \quad \|g(x) - g(y)\| \le c \, \|x - y\|, \quad c < 1,

        \log \left| \det \frac{\partial z}{\partial x} \right| = \sum_{k=1}^\infty \frac{(-1)^{k+1}}{k}
        \operatorname{tr} J^k, \quad J = \frac{\partial g}{\partial x}

    ``Solve.trace`` says how the log-determinant is found: ``"exact"``, from all of :math:`J`, for :math:`d` products
    with it; or ``"hutchinson"``, an unbiased estimate from ``Solve.probes`` vectors :math:`v`, each with a random
    number of terms :math:`N`, on average about ten, and of finite variance if :math:`c^2 < 0.85`. Its gradient is
    unbiased as well, and takes the memory of one term:

    .. math::

        \sum_{k=1}^N \frac{(-1)^{k+1}}{k} \frac{v^\top J^k v}{P(N \ge k)},

        \sum_{k=0}^{N-1} \frac{(-1)^k}{P(N > k)} v^\top J^k \, \mathrm dJ \, v

    With a fixed :math:`N`, ``terms``, the log-determinant is off by up to :math:`d \sum_{k > N} c^k / k`.

    The inverse is the limit of :math:`x_{j+1} = z - g(x_j)`, from :math:`x_0 = z`. Its gradient is solved for likewise,
    at the memory of one step.

    .. math:: \|x_j - x\| \le \frac{c}{1 - c} \|x_j - x_{j-1}\| \le \frac{c^j}{1 - c} \|x_1 - x_0\|

    Sources: Behrmann et al., *Invertible residual networks*, algorithms 1 and 2; Chen et al., *Residual flows for
    invertible generative modeling*, equations 6 and 8.

    Args:
        net: :math:`g`, a module that keeps the shape ``(n, *event_shape)`` and treats each point on its own, such as
            :class:`cnfkit.LipschitzMLP`. If it has ``contracted()``, this gives the function to use in a whole pass.
        event_shape: the shape of one point.
        terms: a fixed number of terms.
        tolerance: the inverse is found when no point changes by more, relative to :math:`1 + \|x\| + \|z\|`; unless
            given, when rounding alone changes it.
        max_iterations: a bound on the steps.

    Raises:
        TypeError: if ``net`` is no module; on a call, if it returns another dtype.
        ValueError: if an argument is out of range; on a call, if the net returns another shape.
        FloatingPointError: on a call, if the inverse or its gradient is not found, or meets NaN.
        RuntimeError: if the gradient of an estimate is to be differentiated again.

    >>> block = Residual(LipschitzMLP(2), 2)
    >>> x = torch.randn(5, 2)
    >>> torch.allclose(block.inverse(block(x).value).value, x, atol=1e-5)
    True
    >>> block(x, solve=Solve(trace="hutchinson", probes=4)).logdet.shape
    torch.Size([5])
    """

    def __init__(
        self,
        net: nn.Module,
        event_shape: int | Sequence[int],
        terms: int | None = None,
        tolerance: float | None = None,
        max_iterations: int = 1000,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise TypeError(f"net is a {type(net).__name__}; wanted a torch.nn.Module")
        super().__init__(event_shape)
        if tolerance is not None:
            check_positive("tolerance", tolerance)
        self.net, self.tolerance = net, tolerance
        self.terms = None if terms is None else as_count("terms", terms)
        self.max_iterations = as_count("max_iterations", max_iterations)

    def _forward(self, x: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        return self._pass(self._there, x, solve or Solve())

    def _inverse(self, z: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        return self._pass(self._back, z, solve or Solve())

    def _pass(self, go: Callable, points: Tensor, solve: Solve) -> Result:
        if torch.is_inference_mode_enabled():  # where autograd records nothing, not even for a Jacobian
            with torch.inference_mode(False), torch.no_grad():
                return self._pass(go, points.clone(), solve)
        batch = points.shape[: points.dim() - len(self.event_shape)]
        if not points.numel():
            return Result(points, points.new_zeros(batch))
        with full_precision(points):
            g = self.net.contracted() if hasattr(self.net, "contracted") else self.net
        with full_precision(points):  # half precision would not keep the bound
            value, logdets = go(lambda x: _same_kind(g(x), x), points.reshape(-1, *self.event_shape), solve)
        logdet, error = average(logdets, solve)
        error = error if error is None else error.view(batch)
        return Result(value.view(points.shape), logdet.view(batch), standard_error=error)

    def _there(self, g: Callable, x: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
        if solve.trace == "none":
            return x + g(x), x.new_full((1, len(x)), math.nan)
        training = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in [x, *self.net.parameters()])
        with torch.enable_grad():
            y, pull = _linearised(g, x if training and x.requires_grad else x.detach().requires_grad_())
        with torch.set_grad_enabled(training):
            logdets = self._estimate(pull, x, solve) if solve.trace == "hutchinson" else _log_determinant(pull, x)[None]
        return x + (y if training else y.detach()), logdets

    def _back(self, g: Callable, z: Tensor, solve: Solve) -> tuple[Tensor, Tensor]:
        x = self._fixed_point(g, z)
        return x, -self._there(g, x, solve)[1]

    def _fixed_point(self, step: Callable, b: Tensor) -> Tensor:
        """The x with x = b − step(x), differentiable once in step's parameters, and in b as often as step is."""
        with torch.no_grad():
            x = self._iterate(step, b)
        if not torch.is_grad_enabled():
            return x

        def adjoint(x: Tensor, v: Tensor) -> Tensor:
            """What b − step(x) receives if x receives v: of (I + J) dx = db − d step, the w with w = v − wᵀJ."""
            with torch.enable_grad():
                _, pull = _linearised(step, x)
            size = v.detach().abs().amax(tuple(range(1, v.dim())), keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
            return size * self._fixed_point(pull, v / size)  # a gradient may be tiny, and must not drown in 1 + ‖w‖

        return _Pullback.apply(b - step(x), adjoint)

    def _iterate(self, step: Callable, b: Tensor) -> Tensor:
        finest = torch.finfo(b.dtype).eps
        x, change, iterations = b, math.inf, 0
        while iterations < self.max_iterations and not math.isnan(change):
            last, before, x = change, x, b - step(x)
            moved, to, of = (torch.linalg.vector_norm(part.flatten(1), dim=1) for part in (x - before, x, b))
            change = (moved / (1 + to + of)).amax().item()
            iterations += 1
            at_rounding = last <= change < finest ** (2 / 3)  # in this norm a contraction's changes shrink, but for it
            if at_rounding or change <= (self.tolerance or finest):
                return x
        raise FloatingPointError(
            f"Residual: no fixed point after {iterations} iterations, the last of which changed x by {change:.2g}, "
            "relative to 1 + ‖x‖ + ‖z‖; wanted finite numbers and a net that is a contraction, such as LipschitzMLP; "
            "if it is one, try a larger tolerance or max_iterations"
        )

    def _estimate(self, pull: Callable, x: Tensor, solve: Solve) -> Tensor:
        probes = draw_probes(solve, x)
        numbers, another = torch.full((len(probes),), self.terms or ALWAYS), 1.0
        if self.terms is None:
            each = isinstance(solve.generator, PointNoise)  # then each point has a number of terms of its own
            numbers, another = numbers[0] + draw(_further, probes.shape[: 1 + each], solve.generator, points=1), ANOTHER
        estimates = []
        for v, n in zip(probes, numbers, strict=True):
            w, series, total = v, 0.0, 0.0
            with torch.no_grad():
                for k in range(int(n.max())):
                    w = w * (k < n).to(w).view(-1, *[1] * (w.dim() - 1)) if n.dim() else w
                    weight = (-1) ** k / another ** max(k + 1 - ALWAYS, 0)  # divided by P(N > k)
                    series = series + weight * w  # of w = vᵀJᵏ
                    w = pull(w)
                    total = total + weight / (k + 1) * (w * v).flatten(1).sum(1)
            if torch.is_grad_enabled():
                slope = (pull(series) * v).flatten(1).sum(1)
                total = total + _Pullback.apply(slope - slope.detach(), _once)
            estimates.append(total)
        return torch.stack(estimates)

    def extra_repr(self) -> str:
        options = {"terms": self.terms, "tolerance": self.tolerance, "max_iterations": self.max_iterations}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in options.items() if value)


def _log_determinant(pull: Callable, x: Tensor) -> Tensor:
    unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
    jacobian = torch.stack([pull(row.view(x.shape[1:]).expand_as(x)).flatten(1) for row in unit], 1)
    return torch.linalg.slogdet(unit + jacobian).logabsdet


def _further(shape: tuple[int, ...], generator: torch.Generator | None, **options) -> Tensor:
    """How many terms more than those that are always taken."""
    return (torch.empty(shape, **options).geometric_(1 - ANOTHER, generator=generator) - 1).long()


def _linearised(g: Callable, x: Tensor) -> tuple[Tensor, Callable]:
    """y = g(x), and w ↦ wᵀJ from the same evaluation, with a graph where gradients are on."""
    y = g(x)

    def pull(w: Tensor) -> Tensor:
        if not y.requires_grad:  # a constant
            return torch.zeros_like(x)
        options = {"create_graph": torch.is_grad_enabled(), "retain_graph": True, "materialize_grads": True}
        return torch.autograd.grad(y, x, w, **options)[0]

    return y, pull


def _same_kind(y: Tensor, x: Tensor) -> Tensor:
    """What a net gave for x, if it is of the same shape and dtype: others would broadcast or promote in silence."""
    if y.shape != x.shape:
        raise ValueError(f"Residual: net gave shape {tuple(y.shape)} for points of {tuple(x.shape)}; wanted the same")
    if y.dtype != x.dtype:
        raise TypeError(f"Residual: net gave {y.dtype} for points of {x.dtype}; wanted the same")
    return y


class _Pullback(torch.autograd.Function):
    """The identity, with a given backward pass: a function of the point and of the gradient that it receives."""

    @staticmethod
    def forward(ctx, value: Tensor, pull: Callable) -> Tensor:
        ctx.pull, value = pull, value.view_as(value)
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return ctx.pull(value if torch.is_grad_enabled() else value.detach().requires_grad_(), gradient), None


def _once(_, gradient: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError("Residual: an estimate can be differentiated once; wanted trace='exact', or no create_graph")
    return gradient
