"""What every bijection is: a map with an inverse and a log-determinant, and how maps combine."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from cnfkit.arguments import as_shape, check_context, check_points
from cnfkit.ode.solve import Solve
from cnfkit.ode.statistics import Statistics


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class Result:
    """What one pass through a bijection gives.

    Attributes:
        value: the image of the points, shape ``(*batch, *event)``.
        logdet: :math:`\\log |\\det \\partial \\text{value} / \\partial \\text{input}|`, shape ``(*batch)``.
        penalties: named regularisers of the path that was taken, each of shape ``(*batch)``; empty for finite flows.
        stats: an account of each ODE solve, in the order in which they ran; empty for finite flows.
        standard_error: of an estimated log-determinant, shape ``(*batch)``, from the spread of its probes, NaN where
            there is but one; None where nothing is estimated.

    >>> first = Result(torch.zeros(3, 2), torch.full((3,), 1.0), stats=(Statistics(evaluations=4),))
    >>> second = Result(torch.ones(3, 2), torch.full((3,), 0.5), stats=(Statistics(evaluations=6),))
    >>> both = first.then(second)
    >>> both.value[0], both.logdet[0], both.evaluations
    (tensor([1., 1.]), tensor(1.5000), 10)
    """

    value: Tensor
    logdet: Tensor
    penalties: dict[str, Tensor] = field(default_factory=dict)
    stats: tuple[Statistics, ...] = ()
    standard_error: Tensor | None = None

    @property
    def evaluations(self) -> int:
        """How often fields were evaluated on the way."""
        return sum(stats.evaluations for stats in self.stats)

    def then(self, after: Result) -> Result:
        """The result of this pass followed by another: the value is the later one, everything else adds up.

        Standard errors do by their squares, as the estimates are independent.
        """
        errors = [result.standard_error for result in (self, after) if result.standard_error is not None]
        return Result(
            value=after.value,
            logdet=self.logdet + after.logdet,
            penalties=_sum(self.penalties, after.penalties),
            stats=self.stats + after.stats,
            standard_error=torch.stack(errors).square().sum(0).sqrt() if errors else None,
        )


def _sum(first: dict, second: dict) -> dict:
    return {**first, **{key: first[key] + value if key in first else value for key, value in second.items()}}


class Bijection(nn.Module, ABC):
    r"""A differentiable map with a differentiable inverse.

    .. math:: z = f(x), \qquad x = f^{-1}(z), \qquad
              \text{logdet} = \log \left| \det \frac{\partial f}{\partial x} \right|

    ``forward`` goes from data to latent, ``inverse`` back, and each reports the log-determinant of the direction that
    it went. A new bijection writes ``_forward`` and ``_inverse``; their arguments have been checked by then.

    Args:
        event_shape: the shape of one point :math:`x`.
        latent_shape: the shape of one point :math:`z`; the same unless given.

    Raises:
        ValueError: if a shape holds no or non-positive sizes; on a call, if the points do not have the right shape.
        TypeError: on a call, if the points are no floating-point tensor, or not of the parameters' dtype or device.
    """

    takes_context = False

    def __init__(self, event_shape: int | Sequence[int], latent_shape: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.event_shape = as_shape("event_shape", event_shape)
        self.latent_shape = self.event_shape if latent_shape is None else as_shape("latent_shape", latent_shape)

    def forward(self, x: Tensor, context: Tensor | None = None, solve: Solve | None = None) -> Result:
        """Data to latent: :math:`z = f(x)`.

        Args:
            x: points, shape ``(*batch, *event_shape)``.
            context: what the map is conditioned on, shape ``(*batch, features)``, for maps that take one.
            solve: how to solve an ODE and to find a log-determinant, for maps where that is to be chosen.

        Returns:
            A :class:`Result` whose value has shape ``(*batch, *latent_shape)``.
        """
        self._check("x", x, self.event_shape, context, solve)
        return self._checked(self._forward(x, context, solve), x, self.event_shape, self.latent_shape)

    def inverse(self, z: Tensor, context: Tensor | None = None, solve: Solve | None = None) -> Result:
        """Latent to data: :math:`x = f^{-1}(z)`; arguments and result as in :meth:`forward`, shapes exchanged."""
        self._check("z", z, self.latent_shape, context, solve)
        return self._checked(self._inverse(z, context, solve), z, self.latent_shape, self.event_shape)

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Send data through once, forward, and let every layer that starts from data start from what reaches it.

        Args:
            x: points, shape ``(n, *event_shape)``.
            context: as in :meth:`forward`.

        Raises:
            ValueError: if ``x`` has the wrong shape or holds NaN, a layer cannot start from what reaches it, or nothing
                reaches it, because it stands in an :class:`cnfkit.Inverse`.
        """
        waiting = {
            layer: name or type(self).__name__
            for name, layer in self.named_modules()
            if isinstance(layer, Bijection) and type(layer)._start_from is not Bijection._start_from
        }

        def start(layer: Bijection, inputs: tuple) -> None:
            layer._start_from(inputs[0])
            waiting.pop(layer, None)

        hooks = [layer.register_forward_pre_hook(start) for layer in waiting]
        try:
            with torch.no_grad():
                self(x, context, Solve(trace="none"))
        finally:
            for hook in hooks:
                hook.remove()
        if waiting:
            names = ", ".join(waiting.values())
            raise ValueError(f"no data reach {names}, which stands in an Inverse; initialise the map inside it")

    def _start_from(self, x: Tensor) -> None:
        """Set what is set from data; most maps have nothing of the kind."""

    @abstractmethod
    def _forward(self, x: Tensor, context: Tensor | None, solve: Solve | None) -> Result: ...

    @abstractmethod
    def _inverse(self, z: Tensor, context: Tensor | None, solve: Solve | None) -> Result: ...

    def _check(self, name: str, value: Tensor, shape: torch.Size, context: Tensor | None, solve: Solve | None) -> None:
        if solve is not None and not isinstance(solve, Solve):
            raise TypeError(f"{type(self).__name__}: solve is a {type(solve).__name__}; wanted a cnfkit.Solve")
        tensors = chain(self.parameters(), self.buffers())  # a Standardize, say, has buffers alone
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), next(self.buffers(), None))
        check_points(type(self).__name__, name, value, shape, like)
        if self.takes_context:
            check_context(type(self).__name__, context, value.shape[: value.dim() - len(shape)], like)
        elif context is not None:
            raise ValueError(f"{type(self).__name__}: context was given, but this map takes none")

    def _checked(self, result: Result, value: Tensor, before: torch.Size, after: torch.Size) -> Result:
        """The result, if it is one: a log-determinant of the wrong shape would broadcast, and train in silence."""
        if not isinstance(result, Result):
            raise TypeError(f"{type(self).__name__} returned a {type(result).__name__}; wanted a Result")
        batch = value.shape[: value.dim() - len(before)]
        parts = [("value", result.value, batch + after), ("logdet", result.logdet, batch)]
        parts += [(name, penalty, batch) for name, penalty in result.penalties.items()]
        for name, part, wanted in parts:
            if part.shape != wanted:
                raise ValueError(
                    f"{type(self).__name__} returned a {name} of shape {tuple(part.shape)}; wanted {tuple(wanted)}"
                )
        return result

    def extra_repr(self) -> str:
        arrow = "" if self.latent_shape == self.event_shape else f" -> {tuple(self.latent_shape)}"
        return f"{tuple(self.event_shape)}{arrow}"


class Chain(Bijection):
    r"""Bijections one after another.

    .. math:: f = f_K \circ \dots \circ f_1, \qquad
              \log \left| \det \frac{\partial f}{\partial x} \right|
              = \sum_k \log \left| \det \frac{\partial f_k}{\partial x_{k-1}} \right|

    Args:
        bijections: :math:`f_1, \dots, f_K`, in the order in which data pass through them.

    Raises:
        TypeError: if a member is no :class:`Bijection`.
        ValueError: if there is no member, or one does not take the shape that the one before it gives.

    >>> chain = Chain(Diagonal(2, log_scale=1.0), Diagonal(2, log_scale=0.5))
    >>> chain(torch.zeros(3, 2)).logdet
    tensor([3., 3., 3.], grad_fn=<AddBackward0>)
    """

    def __init__(self, *bijections: Bijection) -> None:
        require_bijections("bijections", bijections)
        for k, (before, after) in enumerate(pairwise(bijections)):
            if before.latent_shape != after.event_shape:
                raise ValueError(
                    f"bijections[{k}] ({type(before).__name__}) gives shape {tuple(before.latent_shape)}, but "
                    f"bijections[{k + 1}] ({type(after).__name__}) takes {tuple(after.event_shape)}"
                )
        super().__init__(bijections[0].event_shape, bijections[-1].latent_shape)
        self.members = nn.ModuleList(bijections)
        self.takes_context = any(member.takes_context for member in bijections)

    def _forward(self, x: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        result = None
        for member in self.members:
            result, x = go_on(result, member, x, context, solve)
        return result

    def _inverse(self, z: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        result = None
        for member in reversed(self.members):
            result, z = go_on(result, member, z, context, solve, back=True)
        return result

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, k: int | slice) -> Bijection:
        return Chain(*self.members[k]) if isinstance(k, slice) else self.members[k]


class Inverse(Bijection):
    r"""A bijection with its two directions exchanged.

    .. math:: z = b^{-1}(x), \qquad x = b(z)

    Args:
        bijection: the map :math:`b` to turn round.

    Raises:
        TypeError: if ``bijection`` is none.

    >>> halve = Inverse(Diagonal(1, log_scale=math.log(2.0)))
    >>> halve(torch.tensor([[4.0]])).value.item()
    2.0
    """

    def __init__(self, bijection: Bijection) -> None:
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection is a {type(bijection).__name__}; wanted a Bijection")
        super().__init__(bijection.latent_shape, bijection.event_shape)
        self.bijection = bijection
        self.takes_context = bijection.takes_context

    def _forward(self, x: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        return self.bijection.inverse(x, context, solve)

    def _inverse(self, z: Tensor, context: Tensor | None, solve: Solve | None) -> Result:
        return self.bijection(z, context, solve)


def go_on(
    result: Result | None, member: Bijection, points: Tensor, context: Tensor | None, solve: Solve | None, back=False
) -> tuple[Result, Tensor]:
    """One member of several: the result so far with its own, and the points that come out."""
    go = member.inverse if back else member
    step = go(points, context if member.takes_context else None, solve)
    return step if result is None else result.then(step), step.value


def require_bijections(name: str, members: Sequence[Bijection]) -> None:
    """Raise unless there is at least one member, and each is a bijection."""
    if not members:
        raise ValueError(f"{name}: at least one is needed, got none")
    for k, member in enumerate(members):
        if not isinstance(member, Bijection):
            raise TypeError(f"{name}[{k}] is a {type(member).__name__}; wanted a Bijection")


def as_double(value: nn.Module | Tensor) -> nn.Module | Tensor:
    """A float64 copy, on the CPU where the device has no float64."""
    if torch.is_inference_mode_enabled():  # a copy made there could not even be differentiated for a divergence
        with torch.inference_mode(False), torch.no_grad():
            return as_double(value)
    copied = copy.deepcopy(value)
    tensor = value if isinstance(value, Tensor) else next(chain(value.parameters(), value.buffers()), None)
    if tensor is not None and tensor.device.type == "mps":
        copied = copied.to("cpu")
    return copied.double()


def sum_event(value: Tensor, event_shape: torch.Size) -> Tensor:
    """Sum over the event dimensions: ``(*batch, *event_shape)`` to ``(*batch)``."""
    return value.flatten(-len(event_shape)).sum(-1)
