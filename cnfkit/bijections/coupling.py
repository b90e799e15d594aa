"""Coupling layers: one part of a point stays, and decides how the other part is changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cnfkit.bijections.base import Result, sum_event
from cnfkit.bijections.univariate import Conditioned, ScaleShift, Shift, Univariate


class Coupling(Conditioned):
    r"""Change one part of the point by increasing functions whose parameters the other part decides.

    .. math::

        z_i = x_i \text{ where } m_i = 1, \quad z_i = g(x_i; \theta_i) \text{ elsewhere},

        \theta = \text{net}(m \odot x),

        \log|\det \partial z / \partial x| = \sum_{i : m_i = 0} \log g'(x_i; \theta_i)

    With :class:`cnfkit.MixtureLogit` it is the coupling layer of Flow++.
    Source: Dinh, Krueger and Bengio, *NICE: Non-linear independent components estimation*, section 3.2.

    Args:
        mask: :math:`m`, a boolean tensor of shape ``event_shape`` (see :func:`cnfkit.mask`).
        net: any module that maps ``(*batch, *event_shape)`` to the same shape with the first event dimension times
            ``univariate.outputs``: the parameters, one after the other. If its attribute ``takes_context`` is true, it
            is called with the context, ``(*batch, features)``, as its second argument.
        univariate: the family :math:`g`, a :class:`cnfkit.Univariate`.

    Raises:
        TypeError: if ``mask`` is not boolean, or ``net`` or ``univariate`` is of another kind.
        ValueError: if one part of the mask is empty; on a call, if the net's output has the wrong shape.

    >>> layer = Coupling(mask("even", 2), MLP(2, 2 * 17), MixtureLogit(components=5))
    >>> x = torch.randn(3, 2)
    >>> torch.equal(layer(x).value[:, 0], x[:, 0])
    True
    """

    def __init__(self, mask: Tensor, net: nn.Module, univariate: Univariate) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask is {getattr(mask, 'dtype', type(mask).__name__)}; wanted a boolean tensor")
        if mask.all() or not mask.any():
            raise ValueError("mask: one of its two parts is empty; a coupling layer needs both")
        super().__init__(mask.shape, net, univariate)
        self.register_buffer("kept", mask.to(torch.get_default_dtype()))  # what a net sees is a product with it

    @property
    def mask(self) -> Tensor:
        """:math:`m`, boolean, shape ``event_shape``."""
        return self.kept > 0

    def _forward(self, x, context, solve):
        return self._changed(self.univariate.forward, x, context)

    def _inverse(self, z, context, solve):
        # the kept part of z is that of x, so the same parameters are at hand
        return self._changed(self.univariate.inverse, z, context)

    def _changed(self, go: Callable, points: Tensor, context: Tensor | None) -> Result:
        theta = self.parameters_of(points * self.kept, context)
        # what is kept may lie where g, or its inverse, has no value; 1/2 stands in its place
        mask = self.mask
        changed, log_derivative = go(points.masked_fill(mask, 0.5), theta)
        value = torch.where(mask, points, changed)
        return Result(value, sum_event(log_derivative.masked_fill(mask, 0.0), self.event_shape))


class AffineCoupling(Coupling):
    r"""Scale and shift one part of the point by functions of the other part.

    .. math::

        z = m \odot x + (1 - m) \odot \bigl( x \odot e^{s} + t \bigr),

        (s, t) = \text{net}(m \odot x),

        \log|\det \partial z / \partial x| = \sum_{i : m_i = 0} s_i

    The log-scale is squashed, :math:`s = c \tanh(\tilde s / c)`, so that no step of training can blow it up.
    Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, equations 4, 5, 7 and 9.

    Args:
        mask: :math:`m`, a boolean tensor of shape ``event_shape`` (see :func:`cnfkit.mask`).
        net: as in :class:`cnfkit.Coupling`, with two numbers per coordinate: :math:`\tilde s` and :math:`t`.
        bound: :math:`c`, the largest :math:`|s|`.

    Raises:
        TypeError, ValueError: as :class:`cnfkit.Coupling`, or if ``bound`` is no positive number.

    >>> layer = AffineCoupling(mask("even", 2), MLP(2, 4))
    >>> x = torch.randn(5, 2)
    >>> torch.equal(layer(x).value[:, 0], x[:, 0])
    True
    """

    def __init__(self, mask: Tensor, net: nn.Module, bound: float = 2.0) -> None:
        super().__init__(mask, net, ScaleShift(bound))

    @property
    def bound(self) -> float:
        return self.univariate.bound

    def scale_and_shift(self, kept: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log-scale and shift that the kept part decides; both are zero on the kept part itself."""
        scale, shift = self.univariate.scale_and_shift(self.parameters_of(kept, context))
        return scale * (1 - self.kept), shift * (1 - self.kept)

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, bound={self.bound}"


class AdditiveCoupling(Coupling):
    r"""Shift one part of the point by a function of the other part; volume is preserved.

    .. math::

        z = m \odot x + (1 - m) \odot \bigl( x + t \bigr), \quad t = \text{net}(m \odot x),

        \log|\det \partial z / \partial x| = 0

    Source: Dinh, Krueger and Bengio, *NICE: Non-linear independent components estimation*, section 3.2.

    Args:
        mask: :math:`m`, a boolean tensor of shape ``event_shape``.
        net: as in :class:`cnfkit.Coupling`, with one number per coordinate: any module from ``(*batch, *event_shape)``
            to the same shape.

    Raises:
        TypeError, ValueError: as :class:`cnfkit.Coupling`.

    >>> AdditiveCoupling(mask("even", 2), MLP(2, 2))(torch.randn(5, 2)).logdet
    tensor([0., 0., 0., 0., 0.])
    """

    def __init__(self, mask: Tensor, net: nn.Module) -> None:
        super().__init__(mask, net, Shift())
