"""A field at one time: what a solver asks of it, by the fastest way that the field offers."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


class Moment:
    r"""A field :math:`v(t, \cdot)` at one time, for one context: its value and its derivatives.

    A field may bring moments of its own, from ``field.moments(times, context)``, in which everything that depends on
    the time alone is computed once; :class:`cnfkit.MLPField` does. Any other has these.

    Args:
        field: a module that takes a time, points, and the context if there is one.
        t: a scalar tensor.
        context: shape ``(n, features)``, or None.
    """

    def __init__(self, field: nn.Module, t: Tensor, context: Tensor | None = None) -> None:
        self.field, self.t, self.context = field, t, context

    def value(self, z: Tensor) -> Tensor:
        """The velocity, shape ``(n, *event)``."""
        return self.field(self.t, z, *self._context())

    def with_products(self, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""The velocity and its Jacobian's products with probes, or with the unit vectors, by autograd.

        They are :math:`\varepsilon_k^\top J` here, and :math:`J \varepsilon_k` where tangents are carried: the same
        diagonal, and the same mean square.

        Args:
            z: points, shape ``(n, *event)``.
            probes: shape ``(k, n, *event)``; the unit vectors, k = d, if None.

        Returns:
            The velocity, shape ``(n, *event)``, and the products, shape ``(k, n, *event)``.
        """
        training = torch.is_grad_enabled()
        if training and not (z.requires_grad or any(parameter.requires_grad for parameter in self.field.parameters())):
            training = self.value(z).requires_grad  # by a tensor that the field holds; else the graph is for nobody
        if probes is None:
            unit = torch.eye(z[0].numel(), dtype=z.dtype, device=z.device)
            probes = unit.view(-1, 1, *z.shape[1:]).expand(-1, *z.shape)
        with torch.enable_grad():
            if not (training and z.requires_grad):
                z = z.detach().requires_grad_()
            v = self.value(z)
            require_velocity(self.field, v, z)
            if not v.requires_grad:  # a constant
                return v, torch.zeros_like(probes)
            options = {"create_graph": training, "retain_graph": True, "materialize_grads": True}
            rows = torch.stack([torch.autograd.grad(v, z, probe, **options)[0] for probe in probes])
        return (v, rows) if training else (v.detach(), rows)

    def with_trace(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""The velocity and its divergence :math:`\sum_i e_i^\top J e_i`, shape ``(n,)``."""
        v, rows = self.with_products(z, None)
        return v, rows.flatten(2).diagonal(dim1=0, dim2=2).sum(-1)

    def total_derivative(self, z: Tensor, v: Tensor) -> Tensor:
        r"""The acceleration along the path, shape ``(n, *event)``.

        .. math:: \frac{\mathrm d v}{\mathrm d t} = \frac{\partial v}{\partial z} v + \frac{\partial v}{\partial t}
        """
        field, context = self.field, self._context()
        with warnings.catch_warnings():  # of PyTorch to itself: its forward mode calls what it has deprecated
            warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
            return torch.func.jvp(lambda t, z: field(t, z, *context), (self.t, z), (torch.ones_like(self.t), v))[1]

    def lowered(self) -> Moment:
        """The same with its products in bfloat16, for fields that spend their time on them; others stay as they are."""
        return self

    def time_derivative_of_potential(self, z: Tensor) -> Tensor:
        r"""Of a field that is a gradient, :math:`\partial \Phi / \partial t`, shape ``(n,)``."""
        raise ValueError(
            f"energies has 'hamilton_jacobi', but {type(self.field).__name__} is not the gradient of a potential; "
            "wanted a cnfkit.PotentialField"
        )

    def _context(self) -> tuple[Tensor, ...]:
        return () if self.context is None else (self.context,)


class Tangent(Moment):
    """A moment of a field that has ``with_products(t, z, probes)``."""

    def with_products(self, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        v, rows = self.field.with_products(self.t, z, probes, *self._context())
        require_velocity(self.field, v, z)
        return v, rows


def moments(field: nn.Module, times: Tensor, context: Tensor | None = None) -> list[Moment]:
    """A field at some times, by the method that was written last: a subclass may have overtaken a faster one.

    Args:
        field: the field.
        times: shape ``(T,)``.
        context: shape ``(n, features)``, or None.
    """
    depth = {name: _depth(type(field), name) for name in ("moments", "with_products", "forward")}
    newest = min(depth.values())
    if depth["moments"] == newest:
        return field.moments(times, context)
    kind = Tangent if depth["with_products"] == newest else Moment
    return [kind(field, t, context) for t in times.unbind()]


def _depth(kind: type, name: str) -> int:
    """How far up the ancestors of a class an attribute is found; a number that is larger than any if it is not."""
    return next((k for k, parent in enumerate(kind.__mro__) if name in vars(parent)), len(kind.__mro__))


def require_velocity(field: nn.Module, v: Tensor, z: Tensor) -> None:
    """Raise unless a velocity has the shape and dtype of the points: others would broadcast or promote in silence."""
    if v.shape != z.shape:
        raise ValueError(
            f"CNF: the field {type(field).__name__} returned shape {tuple(v.shape)} for points of shape "
            f"{tuple(z.shape)}; wanted the same"
        )
    if v.dtype != z.dtype:
        raise TypeError(
            f"CNF: the field {type(field).__name__} returned {v.dtype} for points of {z.dtype}; wanted the same"
        )
