"""Flows by name: those of the course, for vectors and for images, each a base and a bijection put together from parts.

They are short on purpose. Where one does not fit, copy its lines and change them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from cnfkit.arguments import as_count, as_shape
from cnfkit.bases import Normal
from cnfkit.bijections.affine import AffineLU, Diagonal
from cnfkit.bijections.autoregressive import Autoregressive
from cnfkit.bijections.base import Bijection, Chain
from cnfkit.bijections.coupling import AdditiveCoupling, Coupling
from cnfkit.bijections.elementwise import Logit
from cnfkit.bijections.glow import ActNorm, Conv1x1, rotation
from cnfkit.bijections.masks import mask
from cnfkit.bijections.mixture import MixtureLogit
from cnfkit.bijections.residual import Residual
from cnfkit.bijections.shape import Flatten, Multiscale, Permutation, Squeeze
from cnfkit.bijections.univariate import ScaleShift, Univariate, require_univariate
from cnfkit.flow import Flow
from cnfkit.lipschitz import LipschitzConvNet, LipschitzMLP
from cnfkit.nets import MADE, MLP, ConvNet
from cnfkit.ode.cnf import CNF
from cnfkit.ode.convfield import ConvField
from cnfkit.ode.fields import MLPField

Shape = int | Sequence[int]


def nice(
    event_shape: Shape,
    layers: int = 4,
    *,
    hidden: Sequence[int] = (64, 64),
    context: int = 0,
    alpha: float = 0.05,
) -> Flow:
    r"""NICE: additive couplings, then a scale for each coordinate. An image is taken as one vector.

    .. math:: z = e^{s} \odot (f_K \circ \dots \circ f_1)(x), \qquad
              \log|\det \partial z / \partial x| = \sum_i s_i

    Source: Dinh, Krueger and Bengio, *NICE: Non-linear independent components estimation*, sections 3.2 and 3.3.

    Args:
        event_shape: ``d`` for a vector, ``(c, h, w)`` for an image in the unit cube.
        layers: how many couplings.
        hidden: the widths of their networks.
        context: the number of features of a context; 0 for none.
        alpha: of an image, that of the :class:`cnfkit.Logit` which leads from the cube to the line.

    Raises:
        ValueError: if a number is not positive, or the shape neither a vector's nor an image's.

    >>> nice(2).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    d, start = _as_vector(_for_couplings(event_shape), alpha)
    couplings = [AdditiveCoupling(m, MLP(d, d, hidden, context)) for m in _alternating("even", d, layers)]
    return Flow(Normal(d), Chain(*start, *couplings, Diagonal(d)))


def realnvp(
    event_shape: Shape,
    layers: int = 8,
    *,
    hidden: int | Sequence[int] | None = None,
    scales: int = 2,
    context: int = 0,
    alpha: float = 0.05,
) -> Flow:
    """RealNVP: affine couplings; of an image, over checkerboards and channels in several scales.

    Source: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, sections 3.4 to 3.6.

    Args:
        event_shape: ``d`` for a vector, ``(c, h, w)`` for an image in the unit cube.
        layers: how many couplings a vector passes; of an image, how many before each squeeze, and after.
        hidden: the widths of their networks, (64, 64) unless given; of an image, the channels, 32.
        scales: of an image, how often it is squeezed.
        context: the number of features of a context; 0 for none.
        alpha: of an image, that of the :class:`cnfkit.Logit` which leads from the cube to the line.

    Raises:
        ValueError: if a number is not positive, or the shape neither a vector's nor an image's.

    >>> realnvp((1, 8, 8), layers=2).sample(3).shape
    torch.Size([3, 1, 8, 8])
    """
    return _coupling_flow(event_shape, ScaleShift(), layers, hidden, scales, context, alpha)


def flowpp(
    event_shape: Shape,
    layers: int = 4,
    *,
    components: int = 8,
    hidden: int | Sequence[int] | None = None,
    scales: int = 2,
    context: int = 0,
    alpha: float = 0.05,
) -> Flow:
    """A flow with Flow++'s couplings, by the distribution functions of logistic mixtures, laid out as RealNVP.

    Source: Ho et al., *Flow++: Improving flow-based generative models with variational dequantization*, section 3.2.

    Args:
        event_shape: as in :func:`cnfkit.realnvp`, like the other arguments that it has.
        layers: how many couplings.
        components: how many logistic distributions each mixture has.
        hidden: the widths of their networks, or the channels.
        scales: of an image, how often it is squeezed.
        context: the number of features of a context; 0 for none.
        alpha: of an image, that of the :class:`cnfkit.Logit` which leads from the cube to the line.

    Raises:
        ValueError: if a number is not positive, or the shape neither a vector's nor an image's.

    >>> flowpp(2).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    return _coupling_flow(event_shape, MixtureLogit(components), layers, hidden, scales, context, alpha)


def _coupling_flow(event_shape, univariate: Univariate, layers: int, hidden, scales: int, context: int, alpha) -> Flow:
    shape = _for_couplings(event_shape)
    if len(shape) == 1:
        masks = _alternating("even", shape, layers)
        return Flow(Normal(shape), Chain(*_couplings(shape, masks, univariate, hidden, context)))
    return _image_flow(
        shape,
        scales,
        alpha,
        lambda fine: _couplings(fine, _alternating("checkerboard", fine, layers), univariate, hidden, context),
        lambda coarse: _couplings(coarse, _alternating("channels", coarse, layers), univariate, hidden, context),
    )


def glow(
    event_shape: Shape,
    layers: int = 8,
    *,
    hidden: int | Sequence[int] | None = None,
    scales: int = 2,
    context: int = 0,
    alpha: float = 0.05,
) -> Flow:
    """Glow: steps of an actnorm, an invertible linear map of the channels, and an affine coupling.

    Source: Kingma and Dhariwal, *Glow: Generative flow with invertible 1×1 convolutions*, section 3.

    Args:
        event_shape: ``d`` for a vector (each coordinate a channel), ``(c, h, w)`` for an image in the unit cube.
        layers: how many steps a vector passes, or an image in each scale.
        hidden: the widths of the couplings' networks, (64, 64) unless given; of an image, the channels, 32.
        scales: of an image, how often it is squeezed.
        context: the number of features of a context; 0 for none.
        alpha: of an image, that of the :class:`cnfkit.Logit` which leads from the cube to the line.

    Raises:
        ValueError: if a number is not positive, or the shape neither a vector's nor an image's.

    >>> flow = glow(3)
    >>> flow.bijection.initialize(torch.randn(100, 3))  # actnorm starts from data
    >>> flow.log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """
    shape = _for_couplings(event_shape)

    def steps(shape) -> Iterator[Bijection]:
        for _ in range(as_count("layers", layers)):
            # the linear map mixes the channels, so that one and the same mask serves all steps
            linear = AffineLU(rotation(shape[0])) if len(shape) == 1 else Conv1x1(shape)
            yield from (ActNorm(shape), linear)
            kept = mask("even" if len(shape) == 1 else "channels", shape)
            yield Coupling(kept, _net(shape, ScaleShift(), hidden, context), ScaleShift())

    if len(shape) == 1:
        return Flow(Normal(shape), Chain(*steps(shape)))
    return _image_flow(shape, scales, alpha, lambda fine: (), steps)


def maf(
    event_shape: Shape,
    layers: int = 5,
    *,
    hidden: Sequence[int] = (64, 64),
    univariate: Univariate | None = None,
    mix: str = "reverse",
    context: int = 0,
    alpha: float = 0.05,
) -> Flow:
    r"""MAF: autoregressive maps, between which the order of the coordinates is turned round.

    With ``mix="linear"`` a trained linear map stands between them, as in transformation autoregressive networks.
    ``Flow(Normal(d), Inverse(maf(d).bijection))`` is IAF. An image is taken as one vector.
    Source: Papamakarios, Pavlakou and Murray, *Masked autoregressive flow for density estimation*, section 3;
    Oliva et al., *Transformation autoregressive networks*, section 2.

    Args:
        event_shape: ``d`` for a vector, ``(c, h, w)`` for an image in the unit cube.
        layers: how many autoregressive maps.
        hidden: the widths of their networks.
        univariate: how a coordinate is changed; a scale and a shift unless given.
        mix: ``"reverse"`` or ``"linear"``.
        context: the number of features of a context; 0 for none.
        alpha: of an image, that of the :class:`cnfkit.Logit` which leads from the cube to the line.

    Raises:
        ValueError: if a number is not positive, the shape neither a vector's nor an image's, ``mix`` unknown, or
            ``univariate`` does not end on the line.
        TypeError: if ``univariate`` is none.

    >>> maf(3, layers=2).log_prob(torch.zeros(5, 3)).shape
    torch.Size([5])
    """
    if mix not in ("reverse", "linear"):
        raise ValueError(f"mix is {mix!r}; wanted 'reverse' or 'linear'")
    univariate = ScaleShift() if univariate is None else univariate
    require_univariate(univariate)
    if univariate.onto != "line":
        raise ValueError(
            f"univariate is {univariate}, which ends in the unit interval; wanted one that ends on the line, such as "
            "MixtureLogit(), or Flow(Uniform(d), Autoregressive(...)) in place of maf"
        )
    d, members = _as_vector(event_shape, alpha)
    for k in range(as_count("layers", layers)):
        if k or mix == "linear":
            members.append(Permutation(d) if mix == "reverse" else AffineLU(rotation(d)))
        members.append(Autoregressive(MADE(d, univariate.outputs, hidden, context=context), univariate))
    return Flow(Normal(d), Chain(*members))


def residual(
    event_shape: Shape,
    layers: int = 8,
    *,
    hidden: int | Sequence[int] | None = None,
    scales: int = 2,
    bound: float = 0.9,
    alpha: float = 0.05,
) -> Flow:
    """Residual Flow: steps of an actnorm and of a residual block that is a contraction.

    How its log-determinant is found is chosen at the call, see :class:`cnfkit.Residual`: ``Solve(trace="hutchinson")``
    for training, the exact one for few dimensions.
    Source: Chen et al., *Residual flows for invertible generative modeling*, section 3.

    Args:
        event_shape: ``d`` for a vector, ``(c, h, w)`` for an image in the unit cube.
        layers: how many blocks a vector passes; of an image, how many before each squeeze, and after.
        hidden: the widths of their networks, (64, 64) unless given; of an image, the channels, 32.
        scales: of an image, how often it is squeezed.
        bound: the Lipschitz bound of each block's network, below 1.
        alpha: of an image, that of the :class:`cnfkit.Logit` which leads from the cube to the line.

    Raises:
        ValueError: if a number is out of its range, or the shape neither a vector's nor an image's.

    >>> residual(2, layers=2).log_prob(torch.zeros(3, 2)).shape
    torch.Size([3])
    """
    shape = _as_event(event_shape)

    def steps(shape) -> Iterator[Bijection]:
        for _ in range(as_count("layers", layers)):
            yield ActNorm(shape)
            if len(shape) == 1:
                yield Residual(LipschitzMLP(shape[0], (64, 64) if hidden is None else hidden, bound), shape)
            else:
                yield Residual(LipschitzConvNet(shape[0], 32 if hidden is None else hidden, bound), shape)
        yield ActNorm(shape)

    if len(shape) == 1:
        return Flow(Normal(shape), Chain(*steps(shape)))
    return _image_flow(shape, scales, alpha, steps, steps)


def ffjord(
    event_shape: Shape,
    blocks: int | None = None,
    *,
    hidden: Sequence[int] = (64, 64, 64),
    scales: int = 2,
    time: str = "concatsquash",
    activation: str = "tanh",
    context: int = 0,
    alpha: float = 0.05,
) -> Flow:
    r"""FFJORD: CNFs one after the other; of an image, with convolutions, in several scales.

    .. math::

        \frac{dz}{dt} = v(t, z),

        \log p(x) = \log p(z(1)) + \int_0^1 \operatorname{div} v(t, z(t)) \, dt

    In each scale of an image but the last some CNFs stand before a squeeze, and as many after it; then half of the
    channels leave for the latent. With ``scales=3``, ``blocks=2`` and ``alpha=1e-5`` it is RNODE's network for MNIST:
    what makes it RNODE are the penalties in training, see :class:`cnfkit.NegativeLogLikelihood`.
    Source: Grathwohl et al., *FFJORD*, section 4; Finlay et al., *How to train your neural ODE*, section 4.

    Args:
        event_shape: ``d`` for a vector, ``(c, h, w)`` for an image in the unit cube.
        blocks: how many CNFs a vector passes, 1 unless given; of an image, how many before each squeeze, and after, 2.
        hidden: the widths of the fields' networks, or the channels.
        scales: of an image; it is squeezed once less.
        time: of a vector's fields, as in :class:`cnfkit.MLPField`.
        activation: likewise.
        context: the number of features of a context; 0 for none; none of images.
        alpha: of an image, that of the :class:`cnfkit.Logit` which leads from the cube to the line.

    Raises:
        ValueError: if a number is not positive, the shape neither a vector's nor an image's, or an image has a context.

    >>> ffjord(2).log_prob(torch.zeros(3, 2), solve=Solve(tolerance=1e-3)).shape
    torch.Size([3])
    """
    shape = _as_event(event_shape)
    blocks = as_count("blocks", {1: 1, 3: 2}[len(shape)] if blocks is None else blocks)
    if len(shape) == 1:
        fields = [MLPField(shape[0], hidden, time, activation, context) for _ in range(blocks)]
        return Flow(Normal(shape), Chain(*map(CNF, fields)) if blocks > 1 else CNF(fields[0]))
    if context:
        raise ValueError(f"context is {context!r}, but the fields of images take none; wanted 0")

    def cnfs(shape) -> list[Bijection]:
        return [CNF(ConvField(shape, hidden)) for _ in range(blocks)]

    return _image_flow(shape, scales, alpha, cnfs, cnfs, last=cnfs)


PRESETS: dict[str, Callable[..., Flow]] = {
    "nice": nice,
    "realnvp": realnvp,
    "glow": glow,
    "maf": maf,
    "residual": residual,
    "flowpp": flowpp,
    "ffjord": ffjord,
}


def preset(name: str, event_shape: Shape, **options) -> Flow:
    """One of the flows of this module by its name, for commands and loops.

    Args:
        name: ``"nice"``, ``"realnvp"``, ``"glow"``, ``"maf"``, ``"residual"``, ``"flowpp"`` or
            ``"ffjord"``.
        event_shape: ``d`` for a vector, ``(c, h, w)`` for an image in the unit cube.
        options: of that flow.

    Raises:
        ValueError: if there is no flow of that name.
        TypeError: if the flow has no such option.

    >>> preset("nice", 2, layers=2).event_shape
    torch.Size([2])
    """
    if name not in PRESETS:
        raise ValueError(f"name is {name!r}; wanted one of {', '.join(PRESETS)}")
    return PRESETS[name](event_shape, **options)


def _image_flow(shape, scales: int, alpha: float, before: Callable, after: Callable, last=None) -> Flow:
    """From the unit cube to the line, then stages: what is done before the squeeze, and after it; the last without."""
    start, stages = Logit(shape, alpha), []
    squeezes = as_count("scales", scales) - (last is not None)
    if any(size % 2**squeezes for size in shape[1:]):
        raise ValueError(f"scales is {scales}, but {shape[1]} × {shape[2]} pixels cannot be halved so often")
    for _ in range(squeezes):
        squeeze = Squeeze(shape)
        stages.append(Chain(*before(shape), squeeze, *after(squeeze.latent_shape)))
        channels, *space = squeeze.latent_shape
        shape = (channels // 2, *space)
    if last is not None:
        stages.append(Chain(*last(shape)))
    bijection = Chain(start, Multiscale(*stages))
    return Flow(Normal(bijection.latent_shape), bijection)


def _couplings(shape, masks, univariate: Univariate, hidden, context: int) -> list[Bijection]:
    return [Coupling(m, _net(shape, univariate, hidden, context), univariate) for m in masks]


def _alternating(kind: str, shape, layers: int) -> list:
    kept = mask(kind, shape)
    return [~kept if k % 2 else kept for k in range(as_count("layers", layers))]


def _net(shape, univariate: Univariate, hidden, context: int) -> nn.Module:
    """The network of a coupling: an MLP for vectors, convolutions for images."""
    if not isinstance(context, int):
        raise ValueError(f"context is {context!r}; wanted a number of features (images as contexts: see ConvNet)")
    outputs = univariate.outputs * shape[0]
    if len(shape) == 1:
        return MLP(shape[0], outputs, (64, 64) if hidden is None else hidden, context)
    return ConvNet(shape[0], outputs, 32 if hidden is None else hidden, context)


def _as_event(event_shape: Shape) -> tuple[int, ...]:
    shape = as_shape("event_shape", event_shape)
    if len(shape) not in (1, 3):
        raise ValueError(f"event_shape is {tuple(shape)}; wanted d for vectors or (c, h, w) for images")
    return tuple(shape)


def _for_couplings(event_shape: Shape) -> tuple[int, ...]:
    shape = _as_event(event_shape)
    if math.prod(shape) == 1:
        raise ValueError("event_shape is 1, but a coupling needs two coordinates; maf takes one")
    return shape


def _as_vector(event_shape: Shape, alpha: float) -> tuple[int, list[Bijection]]:
    """The number of coordinates, and what makes vectors on the line of images in the unit cube."""
    shape = _as_event(event_shape)
    return math.prod(shape), [] if len(shape) == 1 else [Logit(shape, alpha), Flatten(shape)]
