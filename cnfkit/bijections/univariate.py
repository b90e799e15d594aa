"""Functions of one number: increasing, with parameters that a network decides, or training alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnfkit.arguments import check_positive
from cnfkit.bijections.base import Bijection, Result, sum_event


class Univariate(ABC):
    r"""A family of increasing functions of one number.

    .. math:: z = g(x; \theta), \qquad g' > 0

    It has settings but no state: couplings, autoregressive maps and :class:`Coordinatewise` bring the parameters.
    A new one writes ``outputs``, ``forward`` and ``inverse``; both must take 1/2, which a coupling puts in the place of
    what it keeps.
    """

    onto = "line"  # or "interval": where z lies

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many parameters one function has."""

    @abstractmethod
    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``z`` and ``log g'(x)``, both of the shape of ``x``, from parameters that broadcast to it."""

    @abstractmethod
    def inverse(self, z: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``x`` and the log-derivative of the inverse, ``-log g'(x)``."""


@dataclass(frozen=True)
class Shift(Univariate):
    r"""A shift: volume is preserved.

    .. math:: g(x; t) = x + t

    >>> Shift().forward(torch.tensor([1.0]), torch.tensor([0.5]).unbind())
    (tensor([1.5000]), tensor([0.]))
    """

    outputs = 1

    def forward(self, x, parameters):
        return x + parameters[0], torch.zeros_like(x)

    def inverse(self, z, parameters):
        return z - parameters[0], torch.zeros_like(z)


@dataclass(frozen=True)
class ScaleShift(Univariate):
    r"""A scale and a shift.

    .. math:: g(x; \tilde s, t) = x e^s + t, \qquad s = c \tanh(\tilde s / c)

    The log-scale is squashed so that no step of training can blow it up.

    Args:
        bound: :math:`c`, the largest :math:`|s|`.

    Raises:
        ValueError: if ``bound`` is no positive number.

    >>> z, log_derivative = ScaleShift().forward(torch.ones(1), torch.tensor([100.0, 0.5]).unbind())
    >>> log_derivative
    tensor([2.])
    """

    bound: float = 2.0
    outputs = 2

    def __post_init__(self) -> None:
        check_positive("bound", self.bound)

    def scale_and_shift(self, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The log-scale :math:`s` and the shift :math:`t`."""
        raw_scale, shift = parameters
        return self.bound * torch.tanh(raw_scale * (1 / self.bound)), shift

    def forward(self, x, parameters):
        scale, shift = self.scale_and_shift(parameters)
        return x * scale.exp() + shift, scale.expand_as(x)

    def inverse(self, z, parameters):
        scale, shift = self.scale_and_shift(parameters)
        return (z - shift) * (-scale).exp(), -scale.expand_as(z)


class Coordinatewise(Bijection):
    r"""Each coordinate through a function of its own, whose parameters are trained directly.

    .. math::

        z_i = g(x_i; \theta_i),

        \log|\det \partial z / \partial x| = \sum_i \log g'(x_i; \theta_i)

    With :class:`cnfkit.MixtureCDF` it is the flow that carries each coordinate to the uniform distribution by the
    distribution function of a mixture.

    Args:
        event_shape: the shape of one point.
        univariate: the family :math:`g`, a :class:`cnfkit.Univariate`.

    Raises:
        TypeError: if ``univariate`` is none.

    >>> Coordinatewise(2, MixtureCDF(components=3))(torch.zeros(1, 2)).value.detach()
    tensor([[0.5000, 0.5000]])
    """

    def __init__(self, event_shape, univariate: Univariate) -> None:
        super().__init__(event_shape)
        require_univariate(univariate)
        self.univariate = univariate
        self.theta = nn.Parameter(torch.zeros(univariate.outputs, *self.event_shape))

    def _forward(self, x, context, solve):
        z, log_derivative = self.univariate.forward(x, self.theta.unbind())
        return Result(z, sum_event(log_derivative, self.event_shape))

    def _inverse(self, z, context, solve):
        x, log_derivative = self.univariate.inverse(z, self.theta.unbind())
        return Result(x, sum_event(log_derivative, self.event_shape))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.univariate}"


class Conditioned(Bijection):
    """What couplings and autoregressive maps share: a network that decides the parameters of univariate functions.

    Args:
        event_shape: the shape of one point.
        net: maps ``(*batch, *event_shape)`` to the same shape with the first event dimension times
            ``univariate.outputs``; if it has an attribute ``takes_context`` that is true, it is called with the
            context as its second argument.
        univariate: the family of functions.
    """

    def __init__(self, event_shape, net: nn.Module, univariate: Univariate) -> None:
        super().__init__(event_shape)
        if not isinstance(net, nn.Module):
            raise TypeError(f"net is a {type(net).__name__}; wanted a torch.nn.Module")
        require_univariate(univariate)
        self.net = net
        self.univariate = univariate
        self.takes_context = bool(getattr(net, "takes_context", False))

    def parameters_of(self, seen: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the net decides from what it may see: each parameter in the shape of the points."""
        answer = self.net(seen, context) if self.takes_context else self.net(seen)
        answer = answer.to(seen.dtype)  # under autocast the net answers in half precision
        first, *rest = self.event_shape
        outputs, place = self.univariate.outputs, -len(self.event_shape)
        wanted = (*seen.shape[:place], outputs * first, *rest)
        if answer.shape != wanted:
            raise ValueError(f"{type(self).__name__}: net gave shape {tuple(answer.shape)}; wanted {wanted}")
        return answer.chunk(outputs, place)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.univariate}"


def require_univariate(univariate: Univariate) -> None:
    """Raise unless it is one."""
    if not isinstance(univariate, Univariate):
        kinds = "cnfkit.Shift(), ScaleShift(), MixtureCDF() or MixtureLogit()"
        raise TypeError(f"univariate is {univariate!r}; wanted a Univariate, such as {kinds}")
