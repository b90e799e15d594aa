r"""Velocity fields :math:`v(t, z)`: networks that see the point and the time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnfkit.arguments import as_shape, check_features
from cnfkit.ode import tangents
from cnfkit.ode.moments import Moment


class Concat(nn.Linear):
    r"""A layer that sees the time as one more input.

    .. math:: h \mapsto W h + b + t\, w

    Args:
        inputs: the width before.
        outputs: the width after.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs + 1, outputs)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """The layer at a time, a scalar or one for each row."""
        return F.linear(h, self.weight[:, :-1], self.bias) + t[..., None] * self.weight[:, -1]

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the bias of the common layer that it is at time ``t``; of shape ``(T, ...)`` at many."""
        return self.weight[:, :-1], self.bias + t[..., None] * self.weight[:, -1]


class ConcatSquash(nn.Linear):
    r"""A layer whose output the time scales and shifts.

    .. math:: h \mapsto \sigma(t\, g + g_0) \odot (W h + b) + t\, w, \qquad \sigma(a) = \frac{1}{1 + e^{-a}}

    Source: Grathwohl et al., *FFJORD*, appendix B.1.

    Args:
        inputs: the width before.
        outputs: the width after.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.drift = nn.Linear(1, outputs, bias=False)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """The layer at a time, a scalar or one for each row."""
        t = t[..., None]
        return torch.sigmoid(self.gate(t)) * super().forward(h) + self.drift(t)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the bias of the common layer that it is at time ``t``; of shape ``(T, ...)`` at many."""
        t = t[..., None]
        gate = torch.sigmoid(self.gate(t))
        return gate[..., None] * self.weight, gate * self.bias + self.drift(t)


class Hyper(nn.Module):
    r"""A layer whose weights a small network of the time puts out: a hypernetwork.

    .. math:: h \mapsto W(t) h + b(t), \qquad (W(t), b(t)) = A \tanh(t\, u + u_0) + a

    Source: Ha, Dai and Le, *HyperNetworks*; in CNFs, Chen et al., *Neural ordinary differential equations*, section 4.

    Args:
        inputs: the width before.
        outputs: the width after.
        hidden: the width of the hypernetwork.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 8) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.net = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, outputs * inputs + outputs))
        with torch.no_grad():  # at first a common layer, which the time changes a little
            like = nn.Linear(inputs, outputs)
            self.net[-1].weight *= inputs**-0.5
            self.net[-1].bias.copy_(torch.cat([like.weight.flatten(), like.bias]))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        """The layer at a time, a scalar or one for each row."""
        weight, bias = self.at(t)
        return (weight @ h[..., None])[..., 0] + bias

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the bias of the common layer that it is at time ``t``; of shape ``(T, ...)`` at many."""
        weight, bias = self.net(t[..., None]).split([self.shape[0] * self.shape[1], self.shape[0]], dim=-1)
        return weight.unflatten(-1, self.shape), bias


LAYERS = {"concat": Concat, "concatsquash": ConcatSquash, "hyper": Hyper}
ACTIVATIONS = {"tanh": torch.tanh, "softplus": F.softplus}


class MLPField(nn.Module):
    r"""A velocity field by a fully connected network whose layers change with the time.

    .. math:: v(t, z) = W_{L}(t)\, \sigma( \cdots \sigma( W_1(t)\, z + b_1(t) ) \cdots ) + b_L(t)

    At each time it is a common network, with the weights of that time. Its last layer starts at zero, and so the flow
    at the identity.

    With one or two hidden layers the exact divergence costs less than an estimate of it, whatever :math:`d` is. With
    the slopes :math:`s_l = \sigma'(W_l h_{l-1} + b_l)`,

    .. math::

        \operatorname{tr} J &= \operatorname{tr} W_3 \operatorname{diag}(s_2) W_2 \operatorname{diag}(s_1) W_1

        &= s_2^\top \left( W_2 \odot (W_1 W_3)^\top \right) s_1

    since a trace does not change when the last factor is moved to the front: it is :math:`\sum_{kh} s_{2k} (W_2)_{kh}
    s_{1h} (W_1 W_3)_{hk}`. The matrix in the middle is computed once a solve. Deeper networks carry :math:`d` tangents.

    Args:
        dimension: :math:`d`.
        hidden: the widths between; at least one.
        time: how the layers depend on the time, ``"concat"``, ``"concatsquash"`` or ``"hyper"``.
        activation: :math:`\sigma`, ``"tanh"`` or ``"softplus"``. Both are smooth, as the solver's error estimate and
            the derivative of the divergence need.
        context: the number of features of a context, which the first layer takes besides; none unless given.

    Raises:
        ValueError: if a width is not a positive whole number, or a name is unknown; on a call, if the context is
            missing or has another width.

    >>> MLPField(2)(torch.tensor(0.5), torch.randn(7, 2)).shape
    torch.Size([7, 2])
    >>> MLPField(2, context=3)(torch.rand(7), torch.randn(7, 2), torch.randn(7, 3)).shape  # a time for each point
    torch.Size([7, 2])
    """

    def __init__(
        self,
        dimension: int,
        hidden: Sequence[int] = (64, 64, 64),
        time: str = "concatsquash",
        activation: str = "tanh",
        context: int = 0,
    ) -> None:
        super().__init__()
        hidden = as_shape("hidden", hidden)
        for name, value, known in (("time", time, LAYERS), ("activation", activation, ACTIVATIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; wanted one of {', '.join(known)}")
        if not isinstance(context, int) or context < 0:
            raise ValueError(f"context is {context!r}; wanted a number of features, 0 for none")
        self.event_shape = as_shape("dimension", dimension)
        if len(self.event_shape) != 1:
            raise ValueError(f"dimension is {dimension!r}; wanted one number")
        self.hidden, self.time, self.activation, self.context = tuple(hidden), time, activation, context
        d = self.event_shape[0]
        self.layers = nn.ModuleList(LAYERS[time](a, b) for a, b in pairwise((d + context, *hidden, d)))
        last = self.layers[-1]
        for parameter in (last.net[-1] if time == "hyper" else last).parameters():
            nn.init.zeros_(parameter)

    @property
    def takes_context(self) -> bool:
        return self.context > 0

    def forward(self, t: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity, shape ``(n, d)``.

        Args:
            t: a scalar tensor, or a time for each point, shape ``(n,)``.
            z: points, shape ``(n, d)``.
            context: shape ``(n, features)``.
        """
        if self.context:
            z = torch.cat([z, check_features("MLPField", context, z.shape[:1], self.context)], -1)
        for layer in self.layers[:-1]:
            z = ACTIVATIONS[self.activation](layer(t, z))
        return self.layers[-1](t, z)

    def moments(self, times: Tensor, context: Tensor | None = None) -> list:
        """The field at some times, with the weights of those times computed once.

        Args:
            times: shape ``(T,)``.
            context: shape ``(n, features)``.
        """
        layers, activation = [layer.at(times) for layer in self.layers], self.activation
        if activation == "tanh":
            layers, activation = tangents.as_logistic(layers), "logistic"
        if self.context:  # it shifts the sums of the first layer, the same at every evaluation
            (weight, bias), features = (
                layers[0],
                check_features("MLPField", context, getattr(context, "shape", ())[:1], self.context),
            )
            weight, seen = weight.split([self.event_shape[0], self.context], dim=-1)
            layers[0] = weight, bias[:, None] + features @ seen.mT
        network = Network(activation, layers, len(times))
        return [MLPMoment(self, t, context, network, k) for k, t in enumerate(times.unbind())]

    def with_products(
        self, t: Tensor, z: Tensor, probes: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""The velocity, and the products :math:`J \varepsilon_k` of its Jacobian, from one pass.

        .. math:: h' = \sigma(W h + b), \qquad \dot h' = \sigma'(W h + b) \odot W \dot h

        Args:
            t: a scalar tensor.
            z: points, shape ``(n, d)``.
            probes: :math:`\varepsilon_k`, shape ``(k, n, d)``; the unit vectors, k = d, if not given.
            context: shape ``(n, features)``.

        Returns:
            The velocity, shape ``(n, d)``, and the products, shape ``(k, n, d)``.
        """
        if self.context:
            check_features("MLPField", context, z.shape[:1], self.context)
        (moment,) = self.moments(t[None], context)
        return moment.with_products(z, probes)

    def extra_repr(self) -> str:
        context = f", context={self.context}" * bool(self.context)
        return (
            f"{self.event_shape[0]}, hidden={self.hidden}, time={self.time!r}, activation={self.activation!r}{context}"
        )


class Network:
    """The common networks that an :class:`MLPField` is at some times.

    Attributes:
        activation: ``"logistic"`` or ``"softplus"``.
        parts: the weights, shape ``(outputs, inputs)`` if they are the same at all times, else with T in front, and
            the biases, shape ``(T, outputs)``, or ``(T, n, outputs)`` where each point has its own; in turn.
    """

    def __init__(self, activation: str, layers: Sequence[tuple[Tensor, Tensor]], times: int) -> None:
        self.activation, self.times = activation, times
        self.parts = [part for layer in layers for part in layer]
        self.steady = [weight.dim() == 2 for weight, _ in layers]
        self.layers = [list(zip(parts[::2], parts[1::2], strict=True)) for parts in self.each(self.parts)]
        self._forms: dict[bool, Tensor | None] = {}

    def each(self, parts: Sequence[Tensor | None]) -> list[tuple[Tensor | None, ...]]:
        """For each time its share of something of the parts' shapes, and of the form's if it comes last."""
        steady = [same for weight in self.steady for same in (weight, False)] + [all(self.steady)]
        columns = [
            [part] * self.times if same or part is None else part.unbind()
            for part, same in zip(parts, steady[: len(parts)], strict=True)
        ]
        return list(zip(*columns, strict=True))

    def form(self) -> Tensor | None:
        """What the exact trace needs of the weights of all times, computed when it is first asked for."""
        recorded = torch.is_grad_enabled()  # one without a graph must not be given out where there is to be one
        if recorded not in self._forms:
            self._forms[recorded] = tangents.trace_form(self.parts[::2])
        return self._forms[recorded]


class MLPMoment(Moment):
    """An :class:`MLPField` at one of a network's times."""

    def __init__(self, field: MLPField, t: Tensor, context: Tensor | None, network: Network, k: int) -> None:
        super().__init__(field, t, context)
        self.network, self.k, self.layers = network, k, network.layers[k]

    def form(self) -> Tensor | None:
        form = self.network.form()
        return form if form is None or all(self.network.steady) else form[self.k]

    def value(self, z: Tensor) -> Tensor:
        return tangents.with_tangents(self.network.activation, self.layers, z, None)[0]

    def with_products(self, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        probes = "unit" if probes is None else probes
        return tangents.with_tangents(self.network.activation, self.layers, z, probes)

    def with_trace(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return tangents.with_trace(self.network.activation, self.layers, z, self.form())
