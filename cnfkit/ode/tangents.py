r"""A fully connected network and the products of its Jacobian, in one pass that is differentiated by hand.

With :math:`h_0 = z`, :math:`a_l = W_l h_{l-1} + b_l`, :math:`h_l = \sigma(a_l)` and the last layer without
:math:`\sigma`, a *tangent* goes through the layers beside the value: :math:`\tau_0 = \varepsilon`,
:math:`\tau_l = \sigma'(a_l) \odot W_l \tau_{l-1}`, until :math:`W_L \tau_{L-1} = J \varepsilon`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from cnfkit.arguments import by_hand, full_precision

Layers = Sequence[tuple[Tensor, Tensor]]


# An activation's value y; its slope σ' as a function of y; and σ''/σ' = 1 − m·x, as m and which of (y, σ') is x.
VALUES: dict[str, Callable[[Tensor], Tensor]] = {"logistic": torch.sigmoid_, "softplus": F.softplus}
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda y: torch.addcmul(y, y, y, value=-1),
    "softplus": lambda y: -torch.expm1(-y),
}
BENDS = {"logistic": (2, 0), "softplus": (1, 1)}

# Where nothing is kept, so many points go through all layers at once: what they need fits the cache of a core.
BLOCK = 1024


def as_logistic(layers: Layers) -> list[tuple[Tensor, Tensor]]:
    r"""The layers of the logistic network that is the same function as a network with tanh.

    As :math:`\tanh a = 2 \sigma(2a) - 1`, the factors and the shift go into the weights. PyTorch's logistic function is
    several times faster than its tanh on a CPU.

    Args:
        layers: weights, shape ``(..., outputs, inputs)``, and biases, shape ``(..., outputs)``, from first to last.
    """
    folded = []
    for k, (weight, bias) in enumerate(layers):
        if k:  # what comes in is 2σ − 1
            weight, bias = 2 * weight, bias - weight.sum(-1)
        if k < len(layers) - 1:  # what goes out is σ of twice the sum
            weight, bias = 2 * weight, 2 * bias
        folded.append((weight, bias))
    return folded


def with_tangents(activation: str, layers: Layers, z: Tensor, probes: Tensor | str | None) -> tuple[Tensor, Tensor]:
    r"""The network's value and products :math:`J \varepsilon_k`.

    Args:
        activation: ``"logistic"`` or ``"softplus"``.
        layers: weights, shape ``(outputs, inputs)``, and biases, shape ``(outputs,)``, or ``(n, outputs)`` where each
            point has its own.
        z: points, shape ``(n, d)``.
        probes: :math:`\varepsilon_k`, shape ``(k, n, d)``; ``"unit"`` for the unit vectors, k = d; ``"trace"`` for the
            trace alone; None for no product.

    Returns:
        The value, shape ``(n, outputs)``, and the products, shape ``(k, n, outputs)``, or the trace, shape ``(n,)``.
    """
    learnt = isinstance(probes, Tensor) and probes.requires_grad
    if learnt or not by_hand(z):  # there is none for probes
        return plain_tangents(activation, layers, z, probes)
    if torch.is_grad_enabled():
        return _Tangents.apply(activation, probes, z, *(part for layer in layers for part in layer))
    if z.device.type != "cpu" or any(bias.dim() == 2 for _, bias in layers):
        return _inferred(activation, layers, z, probes)
    blocks = z.split(BLOCK)
    parts = probes.split(BLOCK, dim=1) if isinstance(probes, Tensor) else [probes] * len(blocks)
    done = [_inferred(activation, layers, *block) for block in zip(blocks, parts, strict=True)]
    if len(done) == 1:
        return done[0]
    outs, rows = zip(*done, strict=True)
    if probes is None:
        return torch.cat(outs), None
    return torch.cat(outs), torch.cat(rows, dim=0 if rows[0].dim() == 1 else 1)


def plain_tangents(activation: str, layers: Layers, z: Tensor, probes: Tensor | str | None) -> tuple[Tensor, Tensor]:
    """The same in a few lines, left to autograd: the twin that the other is tested against."""
    tangents = probes
    if isinstance(probes, str):
        tangents = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)[:, None].expand(-1, *z.shape)
    for weight, bias in layers[:-1]:
        z = VALUES[activation](z @ weight.T + bias)
        tangents = None if tangents is None else SLOPES[activation](z) * (tangents @ weight.T)
    weight, bias = layers[-1]
    rows = None if tangents is None else tangents @ weight.T
    return z @ weight.T + bias, torch.einsum("ini->n", rows) if isinstance(probes, str) and probes == "trace" else rows


def trace_form(weights: Sequence[Tensor]) -> Tensor | None:
    r"""What makes the trace of a shallow network's Jacobian from its slopes, in any dimension.

    With :math:`s_l = \sigma'(a_l)`, and one hidden layer or two,

    .. math::

        \operatorname{tr} J = \operatorname{tr} W_2 \operatorname{diag}(s_1) W_1 = \sum_h (W_1 W_2)_{hh} \, s_{1h},

        \operatorname{tr} J = \operatorname{tr} W_3 \operatorname{diag}(s_2) W_2 \operatorname{diag}(s_1) W_1
        = s_2^\top \left( W_2 \odot (W_1 W_3)^\top \right) s_1

    The proof stands in :class:`cnfkit.MLPField`. So an exact trace costs one product of a matrix with :math:`s_1`,
    where :math:`d` tangents cost :math:`d` times as much as the network.

    Args:
        weights: from the first layer to the last, shape ``(..., outputs, inputs)``.

    Returns:
        The vector or the matrix; None for deeper networks, which need the tangents of all unit vectors.
    """
    first, *others, last = weights
    if not others:
        return (last.mT * first).sum(-1)
    return others[0] * (first @ last).mT if len(others) == 1 else None


def with_trace(activation: str, layers: Layers, z: Tensor, form: Tensor | None) -> tuple[Tensor, Tensor]:
    """The network's value and the trace of its Jacobian, shape ``(n,)``.

    Args:
        activation: ``"logistic"`` or ``"softplus"``.
        layers: as in :func:`with_tangents`.
        z: points, shape ``(n, d)``.
        form: :func:`trace_form` of the weights.
    """
    if form is None:
        return with_tangents(activation, layers, z, "trace")
    slopes = []
    for weight, bias in layers[:-1]:
        z = VALUES[activation](torch.addmm(bias, z, weight.T))
        slopes.append(SLOPES[activation](z))
    weight, bias = layers[-1]
    return torch.addmm(bias, z, weight.T), _traced_by(form, slopes)


def _traced_by(form: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    return slopes[0] @ form if form.dim() == 1 else (slopes[0] @ form.T * slopes[1]).sum(-1)


def _form_pulled(form: Tensor, slopes: Sequence[Tensor], g: Tensor) -> tuple[list[Tensor], Tensor]:
    """The gradients in the slopes and in the form, from those in the traces, shape ``(n,)``."""
    g = g[:, None]
    if form.dim() == 1:
        return [g * form], (g * slopes[0]).sum(0)
    first, second = slopes
    weighted = g * second
    return [weighted @ form, g * (first @ form.T)], weighted.T @ first


def _inferred(activation: str, layers: Layers, z: Tensor, probes: Tensor | str | None) -> tuple[Tensor, Tensor]:
    """The same for no gradient: nothing is kept, and no slope is computed that nobody needs."""
    tangents = None
    for k, (weight, bias) in enumerate(layers[:-1]):
        z = VALUES[activation](torch.addmm(bias, z, weight.T))
        if probes is None:
            continue
        if k:
            tangents = _linear(tangents.flatten(0, 1), weight).unflatten(0, tangents.shape[:2])
        elif isinstance(probes, str):  # the product with a unit vector is a column of the weight
            tangents = weight.T.contiguous()[:, None].expand(-1, *z.shape)
        else:
            tangents = _linear(probes.flatten(0, 1), weight).unflatten(0, probes.shape[:2])
        tangents = SLOPES[activation](z) * tangents
    weight, bias = layers[-1]
    return _linear(z, weight) + bias, None if probes is None else _last(Rows(tangents), weight, probes)


class Rows:
    """A tensor of shape ``(k, n, features)``, as a whole, as one matrix, and one by one: a view takes time to make."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    @cached_property
    def flat(self) -> Tensor:
        return self.whole.reshape(-1, self.whole.shape[-1])

    @cached_property
    def each(self) -> tuple[Tensor, ...]:
        return self.whole.unbind()


class Memory:
    """Room for what is kept until the backward pass, and for what is used at once."""

    def kept(self, like: Tensor, shape: tuple[int, ...]) -> Rows:
        """Room of a shape, with the dtype and the device of a tensor, of any content."""
        return Rows(like.new_empty(shape))

    def scratch(self, which: int, like: Tensor, shape: tuple[int, ...]) -> Rows:
        """The same, until the next of this number and shape is taken."""
        return Rows(like.new_empty(shape))


class _Tangents(torch.autograd.Function):
    """One node of autograd's graph where the twin makes dozens."""

    @staticmethod
    def forward(ctx, activation, probes, z, *parts):
        layers = list(zip(parts[::2], parts[1::2], strict=True))
        value, rows, values, products = carry(activation, layers, z, probes)
        kept = values + [product.whole for product in products]
        ctx.activation, ctx.depth, ctx.traced = activation, len(layers), probes is not None
        ctx.probes = None if isinstance(probes, Tensor) else probes
        ctx.save_for_backward(*parts, *kept, *([probes] if isinstance(probes, Tensor) else []))
        return value, rows

    @staticmethod
    def backward(ctx, g, g_rows):
        saved, depth = ctx.saved_tensors, ctx.depth
        if torch.is_grad_enabled():  # it is to be differentiated once more
            return _by_autograd(ctx, saved, g, g_rows)
        parts, probes, kept = saved[: 2 * depth], ctx.probes, saved[2 * depth :]
        if probes is None and ctx.traced:
            *kept, probes = kept
        layers = list(zip(parts[::2], parts[1::2], strict=True))
        wanted = zip(parts, ctx.needs_input_grad[3:], strict=True)
        sums = [torch.zeros_like(part) if needed else None for part, needed in wanted]
        values, products = kept[:depth], [Rows(product) for product in kept[depth:]]
        with full_precision(g):
            g_z = pull(ctx.activation, layers, probes, values, products, g, g_rows, sums, ctx.needs_input_grad[2])
        return None, None, g_z, *sums


def carry(
    activation: str,
    layers: Layers,
    z: Tensor,
    probes: Tensor | str | None,
    form: Tensor | None = None,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor], list[Rows]]:
    """The network's value and products, and what :func:`pull` needs to go back.

    Kept are the values, and the products before their slopes: slopes and tangents come from them in less time than
    they would take to be fetched from memory, once a solve has more evaluations than the processor's cache holds.

    Args:
        activation, layers, z, probes: as in :func:`with_tangents`.
        form: of :func:`trace_form`, by which the trace is found if it is given.
        memory: where what is kept is; new memory unless given.

    Returns:
        The value, the products or the trace, and what is kept: the values and the products of all layers but the last.
    """
    memory = memory or Memory()
    unit, carried = isinstance(probes, str), probes is not None and form is None
    values, products, tangents = [z], [], Rows(probes) if carried and not unit else None
    for weight, bias in layers[:-1]:
        room, across = memory.kept(z, (len(z), len(weight))).whole, weight.T
        values.append(VALUES[activation](torch.addmm(bias, values[-1], across, out=room)))
        if not carried:
            continue
        if tangents is None:  # the product with a unit vector is a column of the weight
            product = Rows(across.contiguous()[:, None])
        else:
            product = memory.kept(z, (len(tangents.whole), len(z), len(weight)))
            torch.mm(tangents.flat, across, out=product.flat)
        products.append(product)
        tangents = memory.scratch(0, z, (len(product.whole), len(z), len(weight)))
        torch.mul(SLOPES[activation](values[-1]), product.whole, out=tangents.whole)
    weight, bias = layers[-1]
    out, rows = _linear(values[-1], weight) + bias, None
    if form is not None:
        rows = _traced_by(form, [SLOPES[activation](value) for value in values[1:]])
    elif carried:
        rows = _last(tangents, weight, probes)
    return out, rows, values, products


def pull(
    activation: str,
    layers: Layers,
    probes: Tensor | str | None,
    values: Sequence[Tensor],
    products: Sequence[Rows],
    g: Tensor,
    g_rows: Tensor | None,
    sums: Sequence[Tensor | None],
    onwards: bool = True,
    form: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor | None:
    """The gradient in the points, from those in the value and the products; those in the layers go to sums.

    Args:
        activation, layers, probes, form: as in :func:`carry`.
        values, products: what it kept.
        g: the gradient in the value, shape ``(n, outputs)``.
        g_rows: that in what comes beside it, of the same shape.
        sums: one for each weight, to add to, and bias, to set, and last for the form if there is one, to add to; None
            where no gradient is wanted.
        onwards: whether the gradient in the points is.
        memory: what lends room for the time of the call.
    """
    memory = memory or Memory()
    depth, unit, carried = len(layers), isinstance(probes, str), probes is not None and form is None
    multiple, which = BENDS[activation]
    if form is not None:
        slopes = [SLOPES[activation](value) for value in values[1:]]
        g_slopes, g_form = _form_pulled(form, slopes, g_rows)
        if sums[-1] is not None:
            sums[-1].add_(g_form)
    for k in reversed(range(depth)):  # g and g_rows are the gradients after layer k, then before it
        weight, bias = layers[k]
        g_weight, g_bias = sums[2 * k : 2 * k + 2]
        slope = None if not k else SLOPES[activation](values[k]) if form is None else slopes[k - 1]
        summed = carried and k == depth - 1 and unit and probes == "trace"
        if carried and k:
            product = products[k - 1]
            shape = (len(product.whole), *slope.shape)
        if carried and k == depth - 1 and not summed:
            g_rows = Rows(g_rows)
        if g_weight is not None:
            _accumulate(g_weight, g, values[k])
            if carried and k:
                tangents = memory.scratch(0, g, shape)
                torch.mul(slope, product.whole, out=tangents.whole)
            if summed:
                g_weight += g_rows @ tangents.whole
            elif carried and k:
                _accumulate(g_weight, g_rows.flat, tangents.flat)
            elif unit and carried:
                g_weight += g_rows.whole.sum(1).T
            elif carried:
                _accumulate(g_weight, g_rows.flat, probes.flatten(0, 1))
        if g_bias is not None and bias.dim() == 1:
            torch.sum(g, 0, out=g_bias)
        elif g_bias is not None:
            g_bias.copy_(g)
        if not k:
            return _linear(g, weight.T) if onwards else None
        g, g_slope = g @ weight, None
        if carried:
            after, g_rows = g_rows, memory.scratch(1 + k % 2, g, shape)
            if summed:
                torch.mul(after[:, None], weight[:, None], out=g_rows.whole)
            else:
                torch.mm(after.flat, weight, out=g_rows.flat)
            g_slope = _sum_of_products(g_rows.each, product.each)
            g_rows.whole.mul_(slope)
        elif form is not None:
            g_slope = g_slopes[k - 1]
        if g_slope is not None:
            g.add_(g_slope).addcmul_(g_slope, (values[k], slope)[which], value=-multiple)
        g.mul_(slope)


def _by_autograd(ctx, saved, g, g_rows):
    """The same gradients from the twin, as a function of everything that they depend on."""
    parts, z = saved[: 2 * ctx.depth], saved[2 * ctx.depth]
    probes = ctx.probes or (saved[-1] if ctx.traced else None)

    def twin(z, *parts):
        layers = list(zip(parts[::2], parts[1::2], strict=True))
        return plain_tangents(ctx.activation, layers, z, probes)[: 1 + ctx.traced]

    _, gradients = torch.func.vjp(twin, z, *parts)
    found = gradients((g, g_rows)[: 1 + ctx.traced])
    return None, None, *(part if needed else None for part, needed in zip(found, ctx.needs_input_grad[2:], strict=True))


def _last(tangents: Rows, weight: Tensor, probes: Tensor | str) -> Tensor:
    """The products with the Jacobian, or its trace, from the tangents that meet the last weight."""
    if not isinstance(probes, str) or probes == "unit":
        return _linear(tangents.flat, weight).unflatten(0, tangents.whole.shape[:2])
    rows = weight.unbind()
    trace = tangents.each[0] @ rows[0]
    for k in range(1, len(rows)):
        trace.addmv_(tangents.each[k], rows[k])
    return trace


def _linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """x Wᵀ, computed transposed if it has few columns: with few on the outside it takes several times longer."""
    if len(weight) < 64:
        return torch.mm(weight, x.T, out=out if out is None else out.T).T
    return torch.mm(x, weight.T, out=out)


def _sum_of_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    total = left[0] * right[0]
    for k in range(1, len(left)):
        total.addcmul_(left[k], right[k])
    return total


def _accumulate(total: Tensor, g: Tensor, x: Tensor) -> None:
    """total += gᵀ x, computed transposed likewise."""
    if x.shape[1] < g.shape[1]:
        total.T.addmm_(x.T, g)
    else:
        total.addmm_(g.T, x)
