r"""A field that is a gradient: the potential of OT-Flow, whose derivatives are written out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnfkit.arguments import as_count
from cnfkit.ode.moments import Moment


class PotentialField(nn.Module):
    r"""A velocity field :math:`v = -\nabla \Phi`, by a network for the potential of the point and the time together.

    With :math:`s = (z, t)`, it is a residual network of two layers and a quadratic form:

    .. math::

        \Phi(s) = w^\top (u_0 + u_1) + \tfrac12 |A s|^2 + b^\top s,

        a_0 = K_0 s + b_0, \quad a_1 = K_1 u_0 + b_1,

        u_l = \sigma(a_l), \quad \sigma(a) = \log(e^a + e^{-a})

    As :math:`\sigma' = \tanh` and :math:`\sigma'' = 1 - \tanh^2`, the chain rule gives all derivatives in closed form,
    with :math:`\tau_l = \tanh(a_l)`, the derivative :math:`p = w + K_1^\top (w \odot \tau_1)` of the first term in
    :math:`u_0`, and that of :math:`a_1` in :math:`s`, :math:`G = K_1 \operatorname{diag}(\tau_0) K_0`:

    .. math::

        \nabla_s \Phi = K_0^\top (\tau_0 \odot p) + A^\top A s + b,

        \nabla_s^2 \Phi = K_0^\top D_0 K_0 + G^\top D_1 G + A^\top A,

        D_0 = \operatorname{diag}\bigl( (1 - \tau_0^2) \odot p \bigr),

        D_1 = \operatorname{diag}\bigl( (1 - \tau_1^2) \odot w \bigr)

    The velocity is minus the first :math:`d` entries of the gradient, of which the last is
    :math:`\partial \Phi / \partial t`; its Jacobian is minus as many rows and columns of the Hessian, and so symmetric.

    No path of an optimal transport turns or changes its speed, and its field is such a gradient, with
    :math:`\partial \Phi / \partial t = \tfrac12 |\nabla \Phi|^2`. So the field is made for the penalties
    ``"kinetic_energy"`` and ``"hamilton_jacobi"`` of :class:`cnfkit.NegativeLogLikelihood`.

    At the start :math:`w` and :math:`b` are zero and :math:`A` is small, and the flow is nearly the identity.

    Source: Onken, Wu Fung, Li and Ruthotto, *OT-Flow*, section 3.

    Args:
        dimension: :math:`d`.
        hidden: the width of both layers.
        rank: the number of rows of :math:`A`, of which :math:`d + 1` are of use, and no more are made.

    Raises:
        ValueError: if an argument is not a positive whole number.

    >>> field = PotentialField(2)
    >>> field.potential(torch.tensor(0.5), torch.randn(7, 2)).shape
    torch.Size([7])
    >>> penalties = {"kinetic_energy": 0.1, "hamilton_jacobi": 0.1}
    >>> loss, terms = NegativeLogLikelihood(Flow(Normal(2), CNF(field)), penalties=penalties)(torch.randn(7, 2))
    >>> list(terms)
    ['nll', 'kinetic_energy', 'hamilton_jacobi', 'evaluations']
    """

    def __init__(self, dimension: int, hidden: int = 64, rank: int = 10) -> None:
        super().__init__()
        d, hidden = as_count("dimension", dimension), as_count("hidden", hidden)
        self.event_shape = torch.Size([d])
        self.hidden, self.rank = hidden, min(as_count("rank", rank), d + 1)
        self.first, self.second = nn.Linear(d + 1, hidden), nn.Linear(hidden, hidden)
        self.w, self.b = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(d + 1))
        # not zero: there the derivative in A vanishes, and it would stay
        self.A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.rank, d + 1), gain=0.1))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        r"""The velocity :math:`-\nabla \Phi`, shape ``(n, d)``.

        Args:
            t: a scalar tensor, or a time for each point, shape ``(n,)``.
            z: points, shape ``(n, d)``.
        """
        return -self.gradient(t, z)[..., :-1]

    def potential(self, t: Tensor, z: Tensor) -> Tensor:
        r""":math:`\Phi`, up to a constant, shape ``(n,)``."""
        s = _joined(t, z)
        u = _sigma(self.first(s))
        return (u + _sigma(self.second(u))) @ self.w + 0.5 * (s @ self.A.T).square().sum(-1) + s @ self.b

    def gradient(self, t: Tensor, z: Tensor) -> Tensor:
        r""":math:`\nabla_s \Phi`: the derivatives in the point, and last that in the time, shape ``(n, d + 1)``."""
        return self._parts(t, z)[0]

    def _parts(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The gradient, and what it is made of: both tanh, and p."""
        s = _joined(t, z)
        a = self.first(s)
        tau0, tau1 = a.tanh(), self.second(_sigma(a)).tanh()
        p = self.w + (self.w * tau1) @ self.second.weight
        return (tau0 * p) @ self.first.weight + (s @ self.A.T) @ self.A + self.b, tau0, tau1, p

    def moments(self, times: Tensor, context: Tensor | None = None) -> list:
        """The field at some times, shape ``(T,)``, each with its derivatives in closed form."""
        return [PotentialMoment(self, t) for t in times.unbind()]

    def extra_repr(self) -> str:
        return f"{self.event_shape[0]}, hidden={self.hidden}, rank={self.rank}"


class PotentialMoment(Moment):
    """A :class:`PotentialField` at one time."""

    _last: tuple[Tensor | None, Tensor | None] = (None, None)

    def with_products(self, z: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""The velocity, and the products :math:`J \varepsilon_k` with minus the Hessian, a factor after the other."""
        if probes is None:
            probes = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)[:, None]
        v, tau, bend0, bend1, first, root = self._curvature(z)
        second = self.field.second.weight
        inner = probes @ first.T
        inner = bend0 * inner + tau * ((bend1 * ((tau * inner) @ second.T)) @ second)
        return v, -(inner @ first + (probes @ root.T) @ root)

    def with_trace(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""The velocity and its divergence, minus the Laplacian of the potential, shape ``(n,)``.

        For any matrix, :math:`\operatorname{tr} X^\top \operatorname{diag}(c) X = \sum_k c_k |X_k|^2` with the rows
        :math:`X_k`. So, with the first :math:`d` columns of :math:`K_0`, :math:`G` and :math:`A`,

        .. math::

            \Delta \Phi = \sum_k (D_0)_{kk} \, |(K_0)_k|^2 + \sum_k (D_1)_{kk} \, |G_k|^2 + \sum_k |A_k|^2

        The work is :math:`G = K_1 \operatorname{diag}(\tau_0) K_0`, one product for the whole batch.
        """
        v, tau, bend0, bend1, first, root = self._curvature(z)
        columns = (tau[:, None] * first.T) @ self.field.second.weight.T  # Gᵀ of each point, shape (n, d, hidden)
        laplacian = bend0 @ first.square().sum(-1) + (bend1 * columns.square().sum(1)).sum(-1) + root.square().sum()
        return v, -laplacian

    def time_derivative_of_potential(self, z: Tensor) -> Tensor:
        seen, derivative = self._last
        return derivative if seen is z else self.field.gradient(self.t, z)[..., -1]

    def _curvature(self, z: Tensor) -> tuple[Tensor, ...]:
        """The velocity, what stands in the Hessian between the matrices, and K_0 and A without the time's column."""
        field = self.field
        gradient, tau0, tau1, p = field._parts(self.t, z)
        if gradient.requires_grad:  # autograd holds on to it anyway
            self._last = z, gradient[..., -1]
        bends = (1 - tau0.square()) * p, (1 - tau1.square()) * field.w
        return -gradient[..., :-1], tau0, *bends, field.first.weight[:, :-1], field.A[:, :-1]


def _joined(t: Tensor, z: Tensor) -> Tensor:
    """s = (z, t), of one time for all points or of one for each."""
    return torch.cat([z, t.expand(z.shape[:-1])[..., None]], -1)


def _sigma(a: Tensor) -> Tensor:
    """log(exp(a) + exp(−a)), in a form that neither overflows nor has a kink at 0, as one with |a| would."""
    return F.softplus(2 * a, threshold=40) - a  # beyond 40 it is 2a to the last digit of float64
