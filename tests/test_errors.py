"""Bad calls: each raises at once, and its message names the argument, what came, and what is wanted."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Field, image_bijection, real_nvp, two_moons_flow
from torch import nn

import cnfkit as k
from cnfkit import figures
from cnfkit.noise import PointNoise

EYE, X = torch.eye(2), torch.zeros(3, 2)
EVEN = k.mask("even", 2)
IMAGE = torch.zeros(3, 1, 8, 8)
NAN = torch.tensor([[0.0, 1.0], [math.nan, 1.0]])
LEVELS = torch.zeros(3, 2, dtype=torch.uint8)


def flow() -> k.Flow:
    return two_moons_flow(layers=1)


def cnf() -> k.CNF:
    return k.CNF(k.MLPField(2, (4,)))


def levels() -> k.Dequantised:
    return k.Dequantised(flow(), k.UniformDequantiser(4))


def fit(data=None, loss=None, **options):
    data = torch.randn(20, 2) if data is None else data
    loss = k.NegativeLogLikelihood(flow()) if loss is None else loss
    return k.fit(loss, data, **dict(steps=2, progress=False) | options)


class Double(nn.Module):
    """No contraction."""

    def forward(self, x):
        return 2 * x


class Pair(k.Arcsinh):
    """What other libraries' maps return."""

    def _forward(self, x, context, solve):
        return self.function(x), x.sum(-1)


def emptied(bijection: k.Bijection, name: str) -> k.Bijection:
    """With one parameter set to zero, as a training gone wrong may leave it."""
    with torch.no_grad():
        getattr(bijection, name).zero_()
    return bijection


def given() -> k.AffineCoupling:
    return k.AffineCoupling(EVEN, k.MLP(2, 4, context=3))


def off_the_cube() -> k.VariationalDequantiser:
    return k.VariationalDequantiser(4, k.Flow(k.Normal(2), k.AffineCoupling(EVEN, k.MLP(2, 4, context=2))))


def noise(context: int = 2) -> k.VariationalDequantiser:
    coupling = k.AffineCoupling(EVEN, k.MLP(2, 4, context=context))
    return k.VariationalDequantiser(4, k.Flow(k.Normal(2), k.Chain(k.Logit(2), coupling)))


@dataclass
class Bad:
    call: object
    error: type[Exception]
    message: str


T, V = TypeError, ValueError
TABLE = {
    # points
    "points of another width": Bad(
        lambda: real_nvp()(torch.zeros(3, 4)), V, "Chain: x has shape (3, 4); wanted (*batch, 2)"
    ),
    "latent of another width": Bad(
        lambda: real_nvp().inverse(torch.zeros(3)), V, "Chain: z has shape (3,); wanted (*batch, 2)"
    ),
    "points with too few dimensions": Bad(
        lambda: k.Squeeze((1, 8, 8))(torch.zeros(8, 8)), V, "Squeeze: x has shape (8, 8); wanted (*batch, 1, 8, 8)"
    ),
    "points that are a number": Bad(
        lambda: flow().log_prob(torch.tensor(1.0)), V, "x has shape (); wanted (*batch, 2)"
    ),
    "points that are a list": Bad(lambda: flow().log_prob([[0.0, 0.0]]), T, "x is a list; wanted a torch.Tensor"),
    "points that are an array": Bad(
        lambda: k.Normal(2).log_prob(np.zeros((3, 2))), T, "z is a ndarray; wanted a torch.Tensor"
    ),
    "images that are flat": Bad(
        lambda: image_bijection()(torch.zeros(3, 64)), V, "Multiscale: x has shape (3, 64); wanted (*batch, 1, 8, 8)"
    ),
    "a latent that is an image": Bad(
        lambda: image_bijection().inverse(IMAGE), V, "Multiscale: z has shape (3, 1, 8, 8); wanted (*batch, 64)"
    ),
    "whole numbers": Bad(lambda: flow().log_prob(X.long()), T, "x has dtype torch.int64; wanted floating point"),
    "whole numbers to a map without parameters": Bad(
        lambda: k.Arcsinh(2)(X.int()), T, "Arcsinh: x has dtype torch.int32; wanted floating point"
    ),
    "float64 to float32": Bad(
        lambda: real_nvp()(X.double()), T, "x has dtype torch.float64, but the parameters are torch.float32; call .to("
    ),
    "float64 to a flow without parameters": Bad(
        lambda: k.Flow(k.Normal(2), k.Arcsinh(2)).log_prob(X.double()),
        T,
        "x has dtype torch.float64, but the parameters",
    ),
    "float64 to float32 statistics": Bad(
        lambda: k.Standardize.of(torch.randn(9, 2))(X.double()), T, "Standardize: x has dtype torch.float64, but"
    ),
    "float32 to float64": Bad(
        lambda: flow().double().log_prob(X), T, "x has dtype torch.float32, but the parameters are torch.float64"
    ),
    "another device": Bad(lambda: real_nvp()(X.to("meta")), T, "x is on meta, but the parameters are on cpu; move one"),
    "a flow on another device": Bad(
        lambda: flow().to("meta").log_prob(X), T, "x is on cpu, but the parameters are on meta"
    ),
    "a base on another device": Bad(lambda: k.Normal(2).log_prob(X.to("meta")), T, "Normal: z is on meta, but"),
    "NaN": Bad(lambda: flow().log_prob(NAN), V, "1 of 4 entries of x are NaN or infinite; clean the data"),
    "infinity": Bad(lambda: flow().log_prob(NAN / 0), V, "entries of x are NaN or infinite"),
    "context to a map that takes none": Bad(
        lambda: real_nvp()(X, context=X), V, "Chain: context was given, but this map takes none"
    ),
    "context to a flow that takes none": Bad(
        lambda: flow().log_prob(X, X), V, "context was given, but this map takes none"
    ),
    "context to sampling that takes none": Bad(
        lambda: flow().sample(3, X), V, "context was given, but this map takes none"
    ),
    # finite flows, each by its call
    "AffineLU(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))": Bad(
        lambda: k.AffineLU(torch.tensor([[1.0, 2.0], [2.0, 4.0]])),
        V,
        "matrix is singular or not finite: the map has no inverse",
    ),
    'emptied(k.Affine(EYE), "matrix").inverse(X)': Bad(
        lambda: emptied(k.Affine(EYE), "matrix").inverse(X),
        V,
        "Affine: the matrix has become singular, so the map has no inverse; AffineLU cannot become so",
    ),
    "Conv1x1(3)": Bad(lambda: k.Conv1x1(3), V, "event_shape is (3,); wanted (c, h, w)"),
    "Planar((1, 2))": Bad(lambda: k.Planar((1, 2)), V, "dimension is (1, 2); wanted a positive whole number"),
    "Planar(0)": Bad(lambda: k.Planar(0), V, "dimension is 0; wanted positive sizes, such as 2 or (1, 8, 8)"),
    'emptied(k.Planar(2), "w")(X)': Bad(
        lambda: emptied(k.Planar(2), "w")(X),
        V,
        "Planar: w is zero, and no direction is along it; start from another seed, or train slower",
    ),
    "Permutation(3, [0, 1, 1])": Bad(
        lambda: k.Permutation(3, [0, 1, 1]), V, "order is [0, 1, 1]; wanted each of 0 to 2 once"
    ),
    "Permutation(3, [0, 1])": Bad(lambda: k.Permutation(3, [0, 1]), V, "order is [0, 1]; wanted each of 0 to 2 once"),
    'Permutation(3, "abc")': Bad(
        lambda: k.Permutation(3, "abc"), V, "order is ['a', 'b', 'c']; wanted each of 0 to 2 once"
    ),
    "Permutation(3, 5)": Bad(lambda: k.Permutation(3, 5), V, "order is 5; wanted each of 0 to 2 once"),
    "ScaleShift(bound=0)": Bad(lambda: k.ScaleShift(bound=0), V, "bound is 0; wanted a positive number"),
    "MixtureCDF(components=0)": Bad(
        lambda: k.MixtureCDF(components=0), V, "components is 0; wanted a whole number of at least 1"
    ),
    'MixtureCDF(kind="cauchy")': Bad(
        lambda: k.MixtureCDF(kind="cauchy"), V, "kind is 'cauchy'; wanted 'normal' or 'logistic'"
    ),
    "MixtureLogit(bound=-1.0)": Bad(lambda: k.MixtureLogit(bound=-1.0), V, "bound is -1.0; wanted a positive number"),
    "Coordinatewise(2, MixtureCDF(2)).inverse(X + 2)": Bad(
        lambda: k.Coordinatewise(2, k.MixtureCDF(2)).inverse(X + 2),
        V,
        "MixtureCDF: 6 of 6 entries of z lie outside (0, 1), where no distribution function leads; a base on",
    ),
    "Coordinatewise(2, Normal(2))": Bad(
        lambda: k.Coordinatewise(2, k.Normal(2)),
        T,
        "univariate is Normal((2,)); wanted a Univariate, such as cnfkit.Shift(), ScaleShift(), MixtureCDF()",
    ),
    "Coordinatewise(2, MixtureCDF)": Bad(
        lambda: k.Coordinatewise(2, k.MixtureCDF),
        T,
        "univariate is <class 'cnfkit.bijections.mixture.MixtureCDF'>; wanted a Univariate, such as",
    ),
    'Coupling(EVEN, MLP(2, 4), "affine")': Bad(
        lambda: k.Coupling(EVEN, k.MLP(2, 4), "affine"),
        T,
        "univariate is 'affine'; wanted a Univariate, such as cnfkit.Shift(), ScaleShift(), MixtureCDF() or",
    ),
    "Coupling(EVEN, lambda x: x, Shift())": Bad(
        lambda: k.Coupling(EVEN, lambda x: x, k.Shift()), T, "net is a function; wanted a torch.nn.Module"
    ),
    "Coupling(EVEN, MLP(2, 4), MixtureLogit(2))(X)": Bad(
        lambda: k.Coupling(EVEN, k.MLP(2, 4), k.MixtureLogit(2))(X),
        V,
        "Coupling: net gave shape (3, 4); wanted (3, 16)",
    ),
    "given()(X)": Bad(lambda: given()(X), V, "AffineCoupling: context is missing; this map is conditioned on one"),
    "given()(X, torch.zeros(3, 2))": Bad(
        lambda: given()(X, torch.zeros(3, 2)), V, "MLP: context has shape (3, 2); wanted (3, 3)"
    ),
    "given()(X, torch.zeros(2, 3))": Bad(
        lambda: given()(X, torch.zeros(2, 3)), V, "AffineCoupling: context has shape (2, 3); wanted (3, 'features')"
    ),
    "given()(X, torch.zeros(3, 3).double())": Bad(
        lambda: given()(X, torch.zeros(3, 3).double()),
        T,
        "AffineCoupling: context has dtype torch.float64, but the parameters are torch.float32; call",
    ),
    "given()(X, [1.0])": Bad(lambda: given()(X, [1.0]), T, "AffineCoupling: context is a list; wanted a torch.Tensor"),
    'given()(X, torch.zeros(3, 3, device="meta"))': Bad(
        lambda: given()(X, torch.zeros(3, 3, device="meta")),
        T,
        "AffineCoupling: context is on meta, but the parameters are on cpu; move one to the other",
    ),
    "Autoregressive(MLP(2, 4))": Bad(
        lambda: k.Autoregressive(k.MLP(2, 4)),
        T,
        "net is a MLP without an order of its inputs; wanted one like cnfkit.MADE",
    ),
    'Autoregressive(MADE(2), "affine")': Bad(
        lambda: k.Autoregressive(k.MADE(2), "affine"),
        T,
        "univariate is 'affine'; wanted a Univariate, such as cnfkit.Shift(), ScaleShift(), MixtureCDF() or",
    ),
    "Autoregressive(MADE(2, outputs=3))(X)": Bad(
        lambda: k.Autoregressive(k.MADE(2, outputs=3))(X), V, "Autoregressive: net gave shape (3, 6); wanted (3, 4)"
    ),
    "MADE(0)": Bad(lambda: k.MADE(0), V, "dimension, hidden, outputs are [0, 64, 64, 2]; wanted positive widths"),
    "MADE(2, outputs=0)": Bad(
        lambda: k.MADE(2, outputs=0), V, "dimension, hidden, outputs are [2, 64, 64, 0]; wanted positive widths"
    ),
    "MADE(2, hidden=8)": Bad(
        lambda: k.MADE(2, hidden=8), V, "hidden is 8; wanted a sequence of widths, such as (64, 64)"
    ),
    "MADE(2, order=[1, 2])": Bad(lambda: k.MADE(2, order=[1, 2]), V, "order is [1, 2]; wanted each of 0 to 1 once"),
    "MADE(2, context=-1)": Bad(
        lambda: k.MADE(2, context=-1), V, "context is -1; wanted a number of features, 0 for none"
    ),
    "MADE(2)(torch.zeros(3, 3))": Bad(
        lambda: k.MADE(2)(torch.zeros(3, 3)), V, "MADE: input has shape (3, 3); wanted (*batch, 2)"
    ),
    "MADE(2, context=1)(X)": Bad(
        lambda: k.MADE(2, context=1)(X), V, "MADE: context is missing; this map is conditioned on one"
    ),
    "MLP(2, 4, context=1.5)": Bad(
        lambda: k.MLP(2, 4, context=1.5), V, "context is 1.5; wanted a number of features, 0 for none"
    ),
    "ConvNet(1, 2, context=(1, 8))": Bad(
        lambda: k.ConvNet(1, 2, context=(1, 8)),
        V,
        "context is (1, 8); wanted a number of features, or a shape (c, h, w)",
    ),
    "ConvNet(1, 2, context=(1, 8, 8))(IMAGE, torch.zeros(3, 7))": Bad(
        lambda: k.ConvNet(1, 2, context=(1, 8, 8))(IMAGE, torch.zeros(3, 7)),
        V,
        "ConvNet: context has shape (3, 7); wanted (3, 64)",
    ),
    "ConvNet(1, 2, context=-1)": Bad(
        lambda: k.ConvNet(1, 2, context=-1), V, "context is -1; wanted positive sizes, such as 2 or (1, 8, 8)"
    ),
    "Beta(2, 0.0, 1.0)": Bad(lambda: k.Beta(2, 0.0, 1.0), V, "alpha is 0.0; wanted a positive number"),
    "Beta(2, 1.0, -1.0)": Bad(lambda: k.Beta(2, 1.0, -1.0), V, "beta is -1.0; wanted a positive number"),
    "Beta(2, 1.0, 1.0).sample(generator=0)": Bad(
        lambda: k.Beta(2, 1.0, 1.0).sample(generator=0), T, "generator is a int; wanted a torch.Generator"
    ),
    "NormalMixture(torch.zeros(3))": Bad(
        lambda: k.NormalMixture(torch.zeros(3)), V, "means has shape (3,); wanted (K, *event_shape)"
    ),
    "NormalMixture([[0.0]])": Bad(
        lambda: k.NormalMixture([[0.0]]), T, "means is a list; wanted a floating-point torch.Tensor"
    ),
    "NormalMixture(NAN)": Bad(lambda: k.NormalMixture(NAN), V, "means holds NaN or infinite entries"),
    "NormalMixture(X, stds=0.0)": Bad(lambda: k.NormalMixture(X, stds=0.0), V, "stds holds 0; wanted positive numbers"),
    "NormalMixture(X, stds=torch.ones(5))": Bad(
        lambda: k.NormalMixture(X, stds=torch.ones(5)), V, "stds has shape (5,); wanted one that broadcasts to (3, 2)"
    ),
    "NormalMixture(X, weights=torch.ones(2))": Bad(
        lambda: k.NormalMixture(X, weights=torch.ones(2)),
        V,
        "weights has shape (2,); wanted one that broadcasts to (3,)",
    ),
    "NormalMixture(X, weights=torch.tensor([1.0, 0.0, 1.0]))": Bad(
        lambda: k.NormalMixture(X, weights=torch.tensor([1.0, 0.0, 1.0])), V, "weights holds 0; wanted positive numbers"
    ),
    "VariationalDequantiser(4, flow())": Bad(
        lambda: k.VariationalDequantiser(4, flow()),
        T,
        "flow is a Flow without a context; wanted a Flow that takes the levels as its context",
    ),
    "VariationalDequantiser(4, Normal(2))": Bad(
        lambda: k.VariationalDequantiser(4, k.Normal(2)),
        T,
        "flow is a Normal; wanted a Flow that takes the levels as its context",
    ),
    "VariationalDequantiser(1, flow())": Bad(
        lambda: k.VariationalDequantiser(1, flow()), V, "levels is 1; wanted a whole number of at least 2"
    ),
    "off_the_cube()(LEVELS)": Bad(
        lambda: off_the_cube()(LEVELS),
        V,
        "flow gives points outside the unit cube; begin its bijection with cnfkit.Logit, alpha=0",
    ),
    "nice((2, 2))": Bad(
        lambda: k.nice((2, 2)), V, "event_shape is (2, 2); wanted d for vectors or (c, h, w) for images"
    ),
    "realnvp(2, layers=0)": Bad(lambda: k.realnvp(2, layers=0), V, "layers is 0; wanted a whole number of at least 1"),
    "realnvp((1, 8, 8), scales=0)": Bad(
        lambda: k.realnvp((1, 8, 8), scales=0), V, "scales is 0; wanted a whole number of at least 1"
    ),
    "realnvp((1, 7, 8))": Bad(
        lambda: k.realnvp((1, 7, 8)),
        V,
        "scales is 2, but 7 × 8 pixels cannot be halved so often",
    ),
    "realnvp(1)": Bad(lambda: k.realnvp(1), V, "event_shape is 1, but a coupling needs two coordinates; maf takes one"),
    "glow(2, layers=True)": Bad(
        lambda: k.glow(2, layers=True), V, "layers is True; wanted a whole number of at least 1"
    ),
    'maf(2, mix="shuffle")': Bad(lambda: k.maf(2, mix="shuffle"), V, "mix is 'shuffle'; wanted 'reverse' or 'linear'"),
    'maf(2, univariate="spline")': Bad(
        lambda: k.maf(2, univariate="spline"),
        T,
        "univariate is 'spline'; wanted a Univariate, such as cnfkit.Shift(), ScaleShift(), MixtureCDF() or",
    ),
    "residual(2, bound=1.0)": Bad(lambda: k.residual(2, bound=1.0), V, "bound is 1.0; wanted a number between 0 and 1"),
    "flowpp(2, components=0)": Bad(
        lambda: k.flowpp(2, components=0), V, "components is 0; wanted a whole number of at least 1"
    ),
    "ffjord((1, 7, 8))": Bad(lambda: k.ffjord((1, 7, 8)), V, "scales is 2, but 7 × 8 pixels cannot be halved so often"),
    "ffjord(2, blocks=0)": Bad(lambda: k.ffjord(2, blocks=0), V, "blocks is 0; wanted a whole number of at least 1"),
    "ffjord((1, 8, 8), context=3)": Bad(
        lambda: k.ffjord((1, 8, 8), context=3), V, "context is 3, but the fields of images take none; wanted 0"
    ),
    'preset("realNVP", 2)': Bad(
        lambda: k.preset("realNVP", 2), V, "name is 'realNVP'; wanted one of nice, realnvp, glow, maf, residual, flowpp"
    ),
    'preset("nice", 2, depth=3)': Bad(
        lambda: k.preset("nice", 2, depth=3), T, "nice() got an unexpected keyword argument 'depth'"
    ),
    'preset("nice", "2")': Bad(
        lambda: k.preset("nice", "2"), V, "event_shape is '2'; wanted positive sizes, such as 2 or (1, 8, 8)"
    ),
    "Residual(torch.tanh, 2)": Bad(
        lambda: k.Residual(torch.tanh, 2), T, "net is a builtin_function_or_method; wanted a torch.nn.Module"
    ),
    "Residual(LipschitzMLP(2), 2, terms=0)": Bad(
        lambda: k.Residual(k.LipschitzMLP(2), 2, terms=0), V, "terms is 0; wanted a whole number of at least 1"
    ),
    "Residual(LipschitzMLP(2), 2, tolerance=0.0)": Bad(
        lambda: k.Residual(k.LipschitzMLP(2), 2, tolerance=0.0), V, "tolerance is 0.0; wanted a positive number"
    ),
    "Residual(LipschitzMLP(2), 2, max_iterations=0)": Bad(
        lambda: k.Residual(k.LipschitzMLP(2), 2, max_iterations=0),
        V,
        "max_iterations is 0; wanted a whole number of at least 1",
    ),
    "Residual(nn.Linear(2, 1), 2)(X)": Bad(
        lambda: k.Residual(nn.Linear(2, 1), 2)(X),
        V,
        "Residual: net gave shape (3, 1) for points of (3, 2); wanted the same",
    ),
    "Residual(LipschitzMLP(3), 2)(X)": Bad(
        lambda: k.Residual(k.LipschitzMLP(3), 2)(X), V, "LipschitzMLP: input has shape (3, 2); wanted (*batch, 3)"
    ),
    "Residual(Double(), 2).inverse(X + 1)": Bad(
        lambda: k.Residual(Double(), 2).inverse(X + 1),
        FloatingPointError,
        "Residual: no fixed point after 65 iterations, the last of which changed x by nan, relative to 1 +",
    ),
    "Residual(LipschitzMLP(2), 2).inverse(X * math.nan)": Bad(
        lambda: k.Residual(k.LipschitzMLP(2), 2).inverse(X * math.nan),
        FloatingPointError,
        "Residual: no fixed point after 1 iterations, the last of which changed x by nan, relative to 1 +",
    ),
    "LipschitzMLP(0)": Bad(lambda: k.LipschitzMLP(0), V, "dimension, hidden are [0, 64, 64]; wanted positive widths"),
    "LipschitzMLP(2, 64)": Bad(
        lambda: k.LipschitzMLP(2, 64), V, "hidden is 64; wanted a sequence of widths, such as (64, 64)"
    ),
    "LipschitzMLP(2, bound=1.0)": Bad(
        lambda: k.LipschitzMLP(2, bound=1.0), V, "bound is 1.0; wanted a number between 0 and 1"
    ),
    "LipschitzConvNet(1, 0)": Bad(
        lambda: k.LipschitzConvNet(1, 0), V, "channels, hidden are [1, 0]; wanted positive numbers"
    ),
    "LipschitzConvNet(2)(X)": Bad(
        lambda: k.LipschitzConvNet(2)(X), V, "LipschitzConvNet: input has shape (3, 2); wanted (*batch, 2, h, w)"
    ),
    "maf(2, univariate=MixtureCDF())": Bad(
        lambda: k.maf(2, univariate=k.MixtureCDF()), V, "which ends in the unit interval; wanted"
    ),
    "flowpp((1, 8, 8), context=(1, 8, 8))": Bad(
        lambda: k.flowpp((1, 8, 8), context=(1, 8, 8)), V, "context is (1, 8, 8); wanted a number of features"
    ),
    "realnvp(2, hidden=())": Bad(lambda: k.realnvp((1, 8, 8), hidden=0), V, "wanted positive numbers"),
    "Inverse(ActNorm(2)).initialize(X)": Bad(
        lambda: k.Inverse(k.Chain(k.ActNorm(2))).initialize(torch.randn(9, 2)),
        V,
        "no data reach bijection.members.0, which stands in an Inverse; initialise the map inside it",
    ),
    "weights of another order": Bad(
        lambda: k.MADE(3).load_state_dict(k.MADE(3, order=[2, 1, 0]).state_dict()),
        V,
        "the weights are of a MADE of order [2, 1, 0]; this one's is [0, 1, 2]",
    ),
    # finite flows, what else may come
    "AffineLU([[1.0]])": Bad(lambda: k.AffineLU([[1.0]]), T, "matrix is a list; wanted a floating-point torch.Tensor"),
    "AffineLU(torch.ones(2, 3))": Bad(
        lambda: k.AffineLU(torch.ones(2, 3)), V, "matrix has shape (2, 3); wanted (d, d)"
    ),
    "AffineLU(EYE, torch.zeros(3))": Bad(
        lambda: k.AffineLU(EYE, torch.zeros(3)), V, "shift has shape (3,); wanted (2,)"
    ),
    "AffineLU(EYE, torch.zeros(2).double())": Bad(
        lambda: k.AffineLU(EYE, torch.zeros(2).double()),
        T,
        "AffineLU: shift has dtype torch.float64, but the parameters are torch.float32; call",
    ),
    'AffineLU(EYE, torch.zeros(2, device="meta"))': Bad(
        lambda: k.AffineLU(EYE, torch.zeros(2, device="meta")),
        T,
        "AffineLU: shift is on meta, but the parameters are on cpu; move one to the other",
    ),
    "AffineLU(EYE)(torch.zeros(3, 3))": Bad(
        lambda: k.AffineLU(EYE)(torch.zeros(3, 3)), V, "AffineLU: x has shape (3, 3); wanted (*batch, 2)"
    ),
    "Conv1x1((0, 2, 2))": Bad(
        lambda: k.Conv1x1((0, 2, 2)), V, "event_shape is (0, 2, 2); wanted positive sizes, such as 2 or (1, 8, 8)"
    ),
    "Conv1x1((1, 8, 8), generator=0)": Bad(
        lambda: k.Conv1x1((1, 8, 8), generator=0), T, "generator is a int; wanted a torch.Generator"
    ),
    "Conv1x1((1, 8, 8), generator=1)": Bad(
        lambda: k.Conv1x1((1, 8, 8), generator=1), T, "generator is a int; wanted a torch.Generator"
    ),
    "Conv1x1((1, 8, 8))(torch.zeros(3, 8, 8, 1))": Bad(
        lambda: k.Conv1x1((1, 8, 8))(torch.zeros(3, 8, 8, 1)),
        V,
        "Conv1x1: x has shape (3, 8, 8, 1); wanted (*batch, 1, 8, 8)",
    ),
    'emptied(Conv1x1((1, 8, 8), lu=False).linear, "matrix").inverse(torch.zeros(3, 1))': Bad(
        lambda: emptied(k.Conv1x1((1, 8, 8), lu=False).linear, "matrix").inverse(torch.zeros(3, 1)),
        V,
        "Affine: the matrix has become singular, so the map has no inverse; AffineLU cannot become so",
    ),
    "Planar(2.0)": Bad(lambda: k.Planar(2.0), V, "dimension is 2.0; wanted positive sizes, such as 2 or (1, 8, 8)"),
    "Planar(2, generator=1)": Bad(lambda: k.Planar(2, generator=1), T, "generator is a int; wanted a torch.Generator"),
    "Planar(2)(X.double())": Bad(
        lambda: k.Planar(2)(X.double()),
        T,
        "Planar: x has dtype torch.float64, but the parameters are torch.float32; call .to(torch.float32) on",
    ),
    "Planar(2)(X, X)": Bad(lambda: k.Planar(2)(X, X), V, "Planar: context was given, but this map takes none"),
    'emptied(Planar(2), "w").inverse(X)': Bad(
        lambda: emptied(k.Planar(2), "w").inverse(X),
        V,
        "Planar: w is zero, and no direction is along it; start from another seed, or train slower",
    ),
    "Permutation(2, [0.0, 1.0])": Bad(
        lambda: k.Permutation(2, [0.0, 1.0]), V, "order is [0.0, 1.0]; wanted each of 0 to 1 once"
    ),
    "Permutation(2, [False, True])": Bad(
        lambda: k.Permutation(2, [False, True]), V, "order is [False, True]; wanted each of 0 to 1 once"
    ),
    "Permutation(2, torch.tensor([[0], [1]]))": Bad(
        lambda: k.Permutation(2, torch.tensor([[0], [1]])), V, "order is [[0], [1]]; wanted each of 0 to 1 once"
    ),
    'Permutation(2)(X.to("meta"))': Bad(
        lambda: k.Permutation(2)(X.to("meta")),
        T,
        "Permutation: x is on meta, but the parameters are on cpu; move one to the other",
    ),
    'Permutation(2).to("meta").inverse(X)': Bad(
        lambda: k.Permutation(2).to("meta").inverse(X),
        T,
        "Permutation: z is on cpu, but the parameters are on meta; move one to the other",
    ),
    "Flatten(0)": Bad(lambda: k.Flatten(0), V, "event_shape is 0; wanted positive sizes, such as 2 or (1, 8, 8)"),
    "Flatten((1, 8, 8))(torch.zeros(3, 64))": Bad(
        lambda: k.Flatten((1, 8, 8))(torch.zeros(3, 64)), V, "Flatten: x has shape (3, 64); wanted (*batch, 1, 8, 8)"
    ),
    "Flatten((1, 8, 8)).inverse(IMAGE)": Bad(
        lambda: k.Flatten((1, 8, 8)).inverse(IMAGE), V, "Flatten: z has shape (3, 1, 8, 8); wanted (*batch, 64)"
    ),
    'ScaleShift(bound="2")': Bad(lambda: k.ScaleShift(bound="2"), V, "bound is '2'; wanted a positive number"),
    "ScaleShift(bound=torch.tensor(2.0))": Bad(
        lambda: k.ScaleShift(bound=torch.tensor(2.0)), V, "bound is tensor(2.); wanted a positive number"
    ),
    "MixtureCDF(bound=math.nan)": Bad(
        lambda: k.MixtureCDF(bound=math.nan), V, "bound is nan; wanted a positive number"
    ),
    "MixtureLogit(components=2.0)": Bad(
        lambda: k.MixtureLogit(components=2.0), V, "components is 2.0; wanted a whole number of at least 1"
    ),
    "MixtureLogit(kind=None)": Bad(lambda: k.MixtureLogit(kind=None), V, "kind is None; wanted 'normal' or 'logistic'"),
    "Coordinatewise(-2, Shift())": Bad(
        lambda: k.Coordinatewise(-2, k.Shift()), V, "event_shape is -2; wanted positive sizes, such as 2 or (1, 8, 8)"
    ),
    "Coordinatewise(2, None)": Bad(
        lambda: k.Coordinatewise(2, None),
        T,
        "univariate is None; wanted a Univariate, such as cnfkit.Shift(), ScaleShift(), MixtureCDF() or",
    ),
    "Coordinatewise(2, MixtureCDF(2)).inverse(X * math.nan)": Bad(
        lambda: k.Coordinatewise(2, k.MixtureCDF(2)).inverse(X * math.nan),
        V,
        "MixtureCDF: 6 of 6 entries of z lie outside (0, 1), where no distribution function leads; a base on",
    ),
    "Autoregressive(MADE(2, 15), MixtureCDF(5)).inverse(X - 1)": Bad(
        lambda: k.Autoregressive(k.MADE(2, 15), k.MixtureCDF(5)).inverse(X - 1),
        V,
        "MixtureCDF: 3 of 3 entries of z lie outside (0, 1), where no distribution function leads; a base on",
    ),
    'Coupling("even", MLP(2, 2), Shift())': Bad(
        lambda: k.Coupling("even", k.MLP(2, 2), k.Shift()), T, "mask is str; wanted a boolean tensor"
    ),
    "Coupling(EVEN, Shift(), MLP(2, 2))": Bad(
        lambda: k.Coupling(EVEN, k.Shift(), k.MLP(2, 2)), T, "net is a Shift; wanted a torch.nn.Module"
    ),
    "Coupling(EVEN, MLP(2, 2), Shift)": Bad(
        lambda: k.Coupling(EVEN, k.MLP(2, 2), k.Shift),
        T,
        "univariate is <class 'cnfkit.bijections.univariate.Shift'>; wanted a Univariate, such as",
    ),
    "given().inverse(X)": Bad(
        lambda: given().inverse(X), V, "AffineCoupling: context is missing; this map is conditioned on one"
    ),
    "given()(X, torch.tensor(1.0))": Bad(
        lambda: given()(X, torch.tensor(1.0)), V, "AffineCoupling: context has shape (); wanted (3, 'features')"
    ),
    "given()(X, torch.zeros(3, 3).long())": Bad(
        lambda: given()(X, torch.zeros(3, 3).long()),
        T,
        "AffineCoupling: context has dtype torch.int64; wanted floating point, such as one_hot(labels).float()",
    ),
    'Autoregressive("MADE")': Bad(
        lambda: k.Autoregressive("MADE"), T, "net is a str without an order of its inputs; wanted one like cnfkit.MADE"
    ),
    "Autoregressive(MADE)": Bad(
        lambda: k.Autoregressive(k.MADE), T, "net is a type without an order of its inputs; wanted one like cnfkit.MADE"
    ),
    "Autoregressive(MADE(2, outputs=3)).inverse(X)": Bad(
        lambda: k.Autoregressive(k.MADE(2, outputs=3)).inverse(X),
        V,
        "Autoregressive: net gave shape (3, 6); wanted (3, 4)",
    ),
    "Autoregressive(MADE(2))(torch.zeros(3, 3))": Bad(
        lambda: k.Autoregressive(k.MADE(2))(torch.zeros(3, 3)),
        V,
        "Autoregressive: x has shape (3, 3); wanted (*batch, 2)",
    ),
    "Autoregressive(MADE(2, context=3)).inverse(X)": Bad(
        lambda: k.Autoregressive(k.MADE(2, context=3)).inverse(X),
        V,
        "Autoregressive: context is missing; this map is conditioned on one",
    ),
    "MADE(2.0)": Bad(lambda: k.MADE(2.0), V, "dimension, hidden, outputs are [2.0, 64, 64, 2]; wanted positive widths"),
    "MADE(2, hidden=(8, 0))": Bad(
        lambda: k.MADE(2, hidden=(8, 0)), V, "dimension, hidden, outputs are [2, 8, 0, 2]; wanted positive widths"
    ),
    "MADE(2, order=1)": Bad(lambda: k.MADE(2, order=1), V, "order is 1; wanted each of 0 to 1 once"),
    "MADE(2, order=[1, 0, 2])": Bad(
        lambda: k.MADE(2, order=[1, 0, 2]), V, "order is [1, 0, 2]; wanted each of 0 to 1 once"
    ),
    "MADE(2, context=None)": Bad(
        lambda: k.MADE(2, context=None), V, "context is None; wanted a number of features, 0 for none"
    ),
    "MADE(2, context=3)(X, torch.zeros(4, 3))": Bad(
        lambda: k.MADE(2, context=3)(X, torch.zeros(4, 3)), V, "MADE: context has shape (4, 3); wanted (3, 'features')"
    ),
    "MADE(2, context=3)(X, [0.0])": Bad(
        lambda: k.MADE(2, context=3)(X, [0.0]), T, "MADE: context is a list; wanted a torch.Tensor"
    ),
    "MLP(2, 4, context=3)(X, torch.zeros(3, 4))": Bad(
        lambda: k.MLP(2, 4, context=3)(X, torch.zeros(3, 4)), V, "MLP: context has shape (3, 4); wanted (3, 3)"
    ),
    "MLP(2, 4, context=3)(X, torch.zeros(4, 3))": Bad(
        lambda: k.MLP(2, 4, context=3)(X, torch.zeros(4, 3)), V, "MLP: context has shape (4, 3); wanted (3, 'features')"
    ),
    "MLP(2, 4, context=3)(X, torch.tensor(1.0))": Bad(
        lambda: k.MLP(2, 4, context=3)(X, torch.tensor(1.0)), V, "MLP: context has shape (); wanted (3, 'features')"
    ),
    "MLP(2, 4, context=3)(X, torch.zeros(3, 3).int())": Bad(
        lambda: k.MLP(2, 4, context=3)(X, torch.zeros(3, 3).int()),
        T,
        "MLP: context has dtype torch.int32; wanted floating point, such as one_hot(labels).float()",
    ),
    'MLP(2, 4, context="3")': Bad(
        lambda: k.MLP(2, 4, context="3"), V, "context is '3'; wanted a number of features, 0 for none"
    ),
    "ConvNet(1, 2, context=2.5)": Bad(
        lambda: k.ConvNet(1, 2, context=2.5), V, "context is 2.5; wanted positive sizes, such as 2 or (1, 8, 8)"
    ),
    "ConvNet(1, 2, context=None)": Bad(
        lambda: k.ConvNet(1, 2, context=None), V, "context is None; wanted positive sizes, such as 2 or (1, 8, 8)"
    ),
    "ConvNet(1, 2, hidden=(8,))": Bad(
        lambda: k.ConvNet(1, 2, hidden=(8,)), V, "inputs, hidden, outputs are [1, (8,), 2]; wanted positive numbers"
    ),
    "ConvNet(1, 2, context=3)(IMAGE)": Bad(
        lambda: k.ConvNet(1, 2, context=3)(IMAGE), V, "ConvNet: context is missing; this map is conditioned on one"
    ),
    "ConvNet(1, 2, context=3)(IMAGE, torch.zeros(2, 3))": Bad(
        lambda: k.ConvNet(1, 2, context=3)(IMAGE, torch.zeros(2, 3)),
        V,
        "ConvNet: context has shape (2, 3); wanted (3, 'features')",
    ),
    "ConvNet(1, 2, context=(1, 4, 4))(IMAGE, torch.zeros(3, 16))": Bad(
        lambda: k.ConvNet(1, 2, context=(1, 4, 4))(IMAGE, torch.zeros(3, 16)),
        V,
        "ConvNet: input has shape (3, 1, 8, 8); wanted (*batch, 1, 4, 4)",
    ),
    "Beta(0, 1.0, 1.0)": Bad(
        lambda: k.Beta(0, 1.0, 1.0), V, "event_shape is 0; wanted positive sizes, such as 2 or (1, 8, 8)"
    ),
    'Beta(2, "1", 1.0)': Bad(lambda: k.Beta(2, "1", 1.0), V, "alpha is '1'; wanted a positive number"),
    "Beta(2, torch.ones(2), 1.0)": Bad(
        lambda: k.Beta(2, torch.ones(2), 1.0), V, "alpha is tensor([1., 1.]); wanted a positive number"
    ),
    "Beta(2, 1.0, math.inf)": Bad(lambda: k.Beta(2, 1.0, math.inf), V, "beta is inf; wanted a positive number"),
    "Beta(2, math.nan, 1.0)": Bad(lambda: k.Beta(2, math.nan, 1.0), V, "alpha is nan; wanted a positive number"),
    "Beta(2, 1.0, 1.0).log_prob(torch.zeros(3, 3))": Bad(
        lambda: k.Beta(2, 1.0, 1.0).log_prob(torch.zeros(3, 3)), V, "Beta: z has shape (3, 3); wanted (*batch, 2)"
    ),
    "Beta(2, 1.0, 1.0).log_prob(X.double())": Bad(
        lambda: k.Beta(2, 1.0, 1.0).log_prob(X.double()),
        T,
        "Beta: z has dtype torch.float64, but the parameters are torch.float32; call .to(torch.float32) on",
    ),
    "Beta(2, 1.0, 1.0).sample(-1)": Bad(
        lambda: k.Beta(2, 1.0, 1.0).sample(-1), V, "n is -1; wanted a number of points, or a batch shape such as (3, 5)"
    ),
    "NormalMixture(LEVELS)": Bad(
        lambda: k.NormalMixture(LEVELS), T, "means is a tensor of torch.uint8; wanted a floating-point torch.Tensor"
    ),
    "NormalMixture(torch.zeros(0, 2))": Bad(
        lambda: k.NormalMixture(torch.zeros(0, 2)), V, "means has shape (0, 2); wanted (K, *event_shape)"
    ),
    'NormalMixture(X, stds="wide")': Bad(
        lambda: k.NormalMixture(X, stds="wide"), T, "stds is a str; wanted a floating-point torch.Tensor"
    ),
    "NormalMixture(X, stds=None)": Bad(
        lambda: k.NormalMixture(X, stds=None), T, "stds is a NoneType; wanted a floating-point torch.Tensor"
    ),
    "NormalMixture(X, stds=-1)": Bad(lambda: k.NormalMixture(X, stds=-1), V, "stds holds -1; wanted positive numbers"),
    "NormalMixture(X, stds=math.nan)": Bad(
        lambda: k.NormalMixture(X, stds=math.nan), V, "stds holds nan; wanted positive numbers"
    ),
    "NormalMixture(X, stds=torch.ones(2).double())": Bad(
        lambda: k.NormalMixture(X, stds=torch.ones(2).double()),
        T,
        "NormalMixture: stds has dtype torch.float64, but the parameters are torch.float32; call",
    ),
    "NormalMixture(X, weights=[1.0, 1.0, 1.0])": Bad(
        lambda: k.NormalMixture(X, weights=[1.0, 1.0, 1.0]),
        T,
        "weights is a list; wanted a floating-point torch.Tensor",
    ),
    "NormalMixture(X, weights=torch.ones(3).double())": Bad(
        lambda: k.NormalMixture(X, weights=torch.ones(3).double()),
        T,
        "NormalMixture: weights has dtype torch.float64, but the parameters are torch.float32; call",
    ),
    'NormalMixture(X, weights=torch.ones(3, device="meta"))': Bad(
        lambda: k.NormalMixture(X, weights=torch.ones(3, device="meta")),
        T,
        "NormalMixture: weights is on meta, but the parameters are on cpu; move one to the other",
    ),
    "NormalMixture(X).sample(3, generator=1)": Bad(
        lambda: k.NormalMixture(X).sample(3, generator=1), T, "generator is a int; wanted a torch.Generator"
    ),
    'NormalMixture(X).log_prob(X.to("meta"))': Bad(
        lambda: k.NormalMixture(X).log_prob(X.to("meta")),
        T,
        "NormalMixture: z is on meta, but the parameters are on cpu; move one to the other",
    ),
    "noise()(LEVELS[0])": Bad(lambda: noise()(LEVELS[0]), V, "k has shape (2,); wanted (n, *event_shape)"),
    "noise()(LEVELS + 4)": Bad(lambda: noise()(LEVELS + 4), V, "k holds values 4 to 4; wanted 0 to 3"),
    "noise()(X)": Bad(lambda: noise()(X), T, "k has dtype torch.float32; wanted whole numbers, 0 to 3"),
    "noise()(LEVELS, 1)": Bad(lambda: noise()(LEVELS, 1), T, "generator is a int; wanted a torch.Generator"),
    'noise()(LEVELS.to("meta"))': Bad(
        lambda: noise()(LEVELS.to("meta")), T, "k is on meta, but the dequantiser is on cpu; move one to the other"
    ),
    "noise()(torch.zeros(3, 3, dtype=torch.uint8))": Bad(
        lambda: noise()(torch.zeros(3, 3, dtype=torch.uint8)), V, "MLP: context has shape (3, 3); wanted (3, 2)"
    ),
    "noise()(LEVELS[:, None])": Bad(
        lambda: noise()(LEVELS[:, None]), V, "flow gives points of shape (3, 2); wanted that of k, (3, 1, 2)"
    ),
    "noise(context=3)(LEVELS)": Bad(
        lambda: noise(context=3)(LEVELS), V, "MLP: context has shape (3, 2); wanted (3, 3)"
    ),
    "UniformDequantiser(4)(LEVELS[0])": Bad(
        lambda: k.UniformDequantiser(4)(LEVELS[0]), V, "k has shape (2,); wanted (n, *event_shape)"
    ),
    "UniformDequantiser(4)(LEVELS[0, 0])": Bad(
        lambda: k.UniformDequantiser(4)(LEVELS[0, 0]), V, "k has shape (); wanted (n, *event_shape)"
    ),
    "UniformDequantiser(4)(LEVELS, 0)": Bad(
        lambda: k.UniformDequantiser(4)(LEVELS, 0), T, "generator is a int; wanted a torch.Generator"
    ),
    "UniformDequantiser(4)(LEVELS, 1)": Bad(
        lambda: k.UniformDequantiser(4)(LEVELS, 1), T, "generator is a int; wanted a torch.Generator"
    ),
    "UniformDequantiser(4)(LEVELS > 0)": Bad(
        lambda: k.UniformDequantiser(4)(LEVELS > 0), T, "k has dtype torch.bool; wanted whole numbers, 0 to 3"
    ),
    "levels().log_prob(LEVELS, generator=0)": Bad(
        lambda: levels().log_prob(LEVELS, generator=0), T, "generator is a int; wanted a torch.Generator"
    ),
    "levels().sample(3, context=X)": Bad(
        lambda: levels().sample(3, context=X), V, "Chain: context was given, but this map takes none"
    ),
    "levels().sample(3, generator=0)": Bad(
        lambda: levels().sample(3, generator=0), T, "generator is a int; wanted a torch.Generator"
    ),
    "Dequantised(Flow(Normal(2), given()), UniformDequantiser(4)).sample(3)": Bad(
        lambda: k.Dequantised(k.Flow(k.Normal(2), given()), k.UniformDequantiser(4)).sample(3),
        V,
        "AffineCoupling: context is missing; this map is conditioned on one",
    ),
    "Dequantised(Flow(Normal(2), given()), UniformDequantiser(4)).log_prob(LEVELS)": Bad(
        lambda: k.Dequantised(k.Flow(k.Normal(2), given()), k.UniformDequantiser(4)).log_prob(LEVELS),
        V,
        "AffineCoupling: context is missing; this map is conditioned on one",
    ),
    "Flow(Normal(2), given()).sample(3)": Bad(
        lambda: k.Flow(k.Normal(2), given()).sample(3),
        V,
        "AffineCoupling: context is missing; this map is conditioned on one",
    ),
    "Flow(Normal(2), given()).sample(3, [0.0])": Bad(
        lambda: k.Flow(k.Normal(2), given()).sample(3, [0.0]), T, "Flow: context is a list; wanted a torch.Tensor"
    ),
    "Flow(Normal(2), given()).sample(3, torch.zeros(5, 4))": Bad(
        lambda: k.Flow(k.Normal(2), given()).sample(3, torch.zeros(5, 4)),
        V,
        "MLP: context has shape (3, 5, 4); wanted (3, 5, 3)",
    ),
    "Flow(Normal(2), given()).log_prob(X, torch.zeros(2, 3))": Bad(
        lambda: k.Flow(k.Normal(2), given()).log_prob(X, torch.zeros(2, 3)),
        V,
        "AffineCoupling: context has shape (2, 3); wanted (3, 'features')",
    ),
    "Flow(Normal(2), given()).sample(3, torch.tensor(0.0))": Bad(
        lambda: k.Flow(k.Normal(2), given()).sample(3, torch.tensor(0.0)),
        V,
        "Flow: context has shape (); wanted ('features',)",
    ),
    "Flow(NormalMixture(X.double()), Planar(2))": Bad(
        lambda: k.Flow(k.NormalMixture(X.double()), k.Planar(2)),
        T,
        "base.like is torch.float64 on cpu, but bijection.u is torch.float32 on cpu; convert one of them",
    ),
    # bijections
    "matrix that is a list": Bad(
        lambda: k.Affine([[1.0]]), T, "matrix is a list; wanted a floating-point torch.Tensor"
    ),
    "matrix of whole numbers": Bad(
        lambda: k.Affine(EYE.long()), T, "matrix is a tensor of torch.int64; wanted a floating-point"
    ),
    "matrix that is not square": Bad(lambda: k.Affine(torch.ones(2, 3)), V, "matrix has shape (2, 3); wanted (d, d)"),
    "matrix that is a vector": Bad(lambda: k.Affine(torch.ones(2)), V, "matrix has shape (2,); wanted (d, d)"),
    "singular matrix": Bad(
        lambda: k.Affine(torch.tensor([[1.0, 2.0], [2.0, 4.0]])), V, "matrix is singular or not finite"
    ),
    "matrix with NaN": Bad(lambda: k.Affine(NAN), V, "matrix is singular or not finite"),
    "shift of another width": Bad(lambda: k.Affine(EYE, torch.zeros(3)), V, "shift has shape (3,); wanted (2,)"),
    "shift of another dtype": Bad(
        lambda: k.Affine(EYE, torch.zeros(2).double()), T, "shift has dtype torch.float64, but"
    ),
    "scale that does not broadcast": Bad(
        lambda: k.Diagonal(2, torch.zeros(3)), V, "log_scale has shape (3,); wanted one that broadcasts to (2,)"
    ),
    "scale of whole numbers": Bad(
        lambda: k.Diagonal(2, shift=torch.arange(2)), T, "shift is a tensor of torch.int64; wanted"
    ),
    "statistics of different shapes": Bad(
        lambda: k.Standardize(torch.zeros(2), torch.ones(3)), V, "std has shape (3,); wanted that of mean, (2,)"
    ),
    "statistics of different dtypes": Bad(
        lambda: k.Standardize(torch.zeros(2), torch.ones(2).double()), T, "std has dtype torch.float64, but"
    ),
    "deviation of zero": Bad(lambda: k.Standardize.of(X), V, "std: every entry must be positive; a constant column"),
    "statistics of NaN": Bad(lambda: k.Standardize.of(NAN), V, "mean holds NaN or infinite entries"),
    "statistics of no data": Bad(
        lambda: k.Standardize.of(torch.zeros(0, 2)), V, "data has shape (0, 2); wanted (n, *event_shape)"
    ),
    "statistics of whole numbers": Bad(
        lambda: k.Standardize.of(LEVELS), T, "data is a tensor of torch.uint8; wanted a floating"
    ),
    "actnorm of a constant channel": Bad(lambda: k.ActNorm(2).initialize(X), V, "x: a channel is constant"),
    "actnorm of NaN": Bad(lambda: k.ActNorm(2).initialize(NAN), V, "x holds NaN or infinite entries"),
    "actnorm of no data": Bad(
        lambda: k.ActNorm(2).initialize(torch.zeros(0, 2)), V, "x has shape (0, 2); wanted (n, 2)"
    ),
    "actnorm of one point": Bad(lambda: k.ActNorm(2).initialize(torch.zeros(2)), V, "x has shape (2,); wanted (n, 2)"),
    "alpha out of range": Bad(lambda: k.Logit(2, alpha=0.5), V, "alpha is 0.5; wanted a number in [0, 0.5)"),
    "grey levels to a logit": Bad(
        lambda: k.Logit(2)(X + 255), V, "6 of 6 entries of x lie outside (0, 1); scale the data first"
    ),
    "mask of numbers": Bad(
        lambda: k.AffineCoupling(EVEN.float(), k.MLP(2, 4)), T, "mask is torch.float32; wanted a boolean tensor"
    ),
    "mask that is a list": Bad(
        lambda: k.AffineCoupling([True, False], k.MLP(2, 4)), T, "mask is list; wanted a boolean tensor"
    ),
    "mask of one part": Bad(
        lambda: k.AffineCoupling(EVEN | True, k.MLP(2, 4)), V, "mask: one of its two parts is empty"
    ),
    "bound of zero": Bad(
        lambda: k.AffineCoupling(EVEN, k.MLP(2, 4), bound=0), V, "bound is 0; wanted a positive number"
    ),
    "infinite bound": Bad(
        lambda: k.AffineCoupling(EVEN, k.MLP(2, 4), bound=math.inf), V, "bound is inf; wanted a positive"
    ),
    "net with too few outputs": Bad(
        lambda: k.AffineCoupling(EVEN, k.MLP(2, 2))(X), V, "net gave shape (3, 2); wanted (3, 4)"
    ),
    "net with too many outputs": Bad(
        lambda: k.AdditiveCoupling(EVEN, k.MLP(2, 4))(X), V, "net gave shape (3, 4); wanted (3, 2)"
    ),
    "net with other inputs": Bad(
        lambda: k.AffineCoupling(EVEN, k.MLP(3, 4))(X), V, "MLP: input has shape (3, 2); wanted (*batch, 3)"
    ),
    "unknown mask": Bad(lambda: k.mask("odd", 2), V, "kind is 'odd'; wanted one of even, checkerboard"),
    "mask that does not fit": Bad(
        lambda: k.mask("checkerboard", 4), V, "'checkerboard' does not fit event_shape (4,); vectors take 'even'"
    ),
    "mask with an empty part": Bad(
        lambda: k.mask("top", (1, 1, 4)), V, "event_shape (1, 1, 4) leaves one of its two parts empty"
    ),
    "negative size": Bad(lambda: k.Arcsinh(-2), V, "event_shape is -2; wanted positive sizes, such as 2 or (1, 8, 8)"),
    "size of zero": Bad(lambda: k.Diagonal((2, 0)), V, "event_shape is (2, 0); wanted positive sizes"),
    "no size": Bad(lambda: k.Normal(()), V, "event_shape is (); wanted positive sizes"),
    "size that is no number": Bad(lambda: k.Normal(2.0), V, "event_shape is 2.0; wanted positive sizes"),
    "squeeze of a vector": Bad(lambda: k.Squeeze(4), V, "event_shape is (4,); wanted (c, h, w) with h and w divisible"),
    "squeeze that does not divide": Bad(lambda: k.Squeeze((1, 8, 7)), V, "event_shape is (1, 8, 7); wanted (c, h, w)"),
    "squeeze by nothing": Bad(
        lambda: k.Squeeze((1, 8, 8), factor=0), V, "factor is 0; wanted a whole number of at least 1"
    ),
    # combinations
    "empty chain": Bad(lambda: k.Chain(), V, "bijections: at least one is needed, got none"),
    "chain of a list": Bad(lambda: k.Chain([k.Arcsinh(2)]), T, "bijections[0] is a list; wanted a Bijection"),
    "chain of a net": Bad(lambda: k.Chain(k.Arcsinh(2), k.MLP(2, 2)), T, "bijections[1] is a MLP; wanted a Bijection"),
    "chain that does not fit": Bad(
        lambda: k.Chain(k.Arcsinh(2), k.Arcsinh(3)),
        V,
        "bijections[0] (Arcsinh) gives shape (2,), but bijections[1] (Arcsinh) takes (3,)",
    ),
    "inverse of a class": Bad(lambda: k.Inverse(k.Arcsinh), T, "bijection is a ABCMeta; wanted a Bijection"),
    "empty multiscale": Bad(lambda: k.Multiscale(), V, "stages: at least one is needed, got none"),
    "multiscale of a net": Bad(lambda: k.Multiscale(k.ConvNet(1, 1)), T, "stages[0] is a ConvNet; wanted a Bijection"),
    "multiscale of vectors": Bad(
        lambda: k.Multiscale(k.Arcsinh(4)), V, "stages[0] gives (4,); wanted (c, h, w), c even to split"
    ),
    "multiscale of odd channels": Bad(
        lambda: k.Multiscale(k.Arcsinh((3, 2, 2)), k.Arcsinh((1, 2, 2))),
        V,
        "stages[0] gives (3, 2, 2); wanted (c, h, w)",
    ),
    "multiscale that does not fit": Bad(
        lambda: k.Multiscale(k.Squeeze((1, 4, 4)), k.Arcsinh((4, 2, 2))),
        V,
        "stages[1] takes (4, 2, 2); wanted (2, 2, 2)",
    ),
    "flow the wrong way round": Bad(lambda: k.Flow(k.Arcsinh(2), k.Normal(2)), T, "base is a Arcsinh; wanted a Base"),
    "flow of a net": Bad(lambda: k.Flow(k.Normal(2), k.MLP(2, 2)), T, "bijection is a MLP; wanted a Bijection"),
    "flow that does not fit": Bad(
        lambda: k.Flow(k.Normal(2), k.Arcsinh(3)),
        V,
        "base has event_shape (2,), but the bijection ends in (3,); they must agree",
    ),
    # sampling
    "negative number of samples": Bad(
        lambda: flow().sample(-1), V, "n is -1; wanted a number of points, or a batch shape"
    ),
    "half a sample": Bad(lambda: flow().sample(0.5), V, "n is 0.5; wanted a number of points"),
    "negative batch": Bad(lambda: flow().rsample((2, -1)), V, "n is (2, -1); wanted a number of points"),
    "seed for a generator": Bad(
        lambda: flow().sample(2, generator=0), T, "generator is a int; wanted a torch.Generator"
    ),
    # nets
    "net of no width": Bad(
        lambda: k.MLP(2, 0), V, "inputs, hidden, outputs are [2, 64, 64, 0]; wanted positive widths"
    ),
    "net of one hidden width": Bad(lambda: k.MLP(2, 4, hidden=64), V, "hidden is 64; wanted a sequence of widths"),
    "convolutions of no channels": Bad(
        lambda: k.ConvNet(0, 2), V, "inputs, hidden, outputs are [0, 32, 2]; wanted positive"
    ),
    "convolutions of other channels": Bad(
        lambda: k.ConvNet(2, 2)(IMAGE), V, "ConvNet: input has shape (3, 1, 8, 8); wanted (*batch, 2, h, w)"
    ),
    # dequantisation and units
    "one level": Bad(lambda: k.UniformDequantiser(1), V, "levels is 1; wanted a whole number of at least 2"),
    "half a level": Bad(lambda: k.UniformDequantiser(2.5), V, "levels is 2.5; wanted a whole number"),
    "levels out of range": Bad(lambda: levels().log_prob(LEVELS + 4), V, "k holds values 4 to 4; wanted 0 to 3"),
    "negative levels": Bad(lambda: levels().log_prob(LEVELS.int() - 1), V, "k holds values -1 to -1; wanted 0 to 3"),
    "levels that are no whole numbers": Bad(
        lambda: levels().log_prob(X), T, "k has dtype torch.float32; wanted whole numbers, 0 to 3"
    ),
    "levels of another shape": Bad(lambda: levels().log_prob(LEVELS[0]), V, "k has shape (2,); wanted (n, 2)"),
    "no levels": Bad(
        lambda: levels().log_prob(LEVELS[:0]), V, "k has shape (0, 2), no values; wanted at least one point"
    ),
    "levels that are a list": Bad(lambda: levels().log_prob([[0, 1]]), T, "k is a list; wanted a torch.Tensor"),
    "levels to dequantise that are a list": Bad(
        lambda: k.UniformDequantiser(2)([[0, 1]]), T, "k is a list; wanted a torch.Tensor"
    ),
    "no draws": Bad(lambda: levels().log_prob(LEVELS, draws=0), V, "draws is 0; wanted a whole number of at least 1"),
    "dequantised bijection": Bad(
        lambda: k.Dequantised(real_nvp(), k.UniformDequantiser(2)), T, "flow is a Chain; wanted a Flow"
    ),
    "dequantised by a number": Bad(lambda: k.Dequantised(flow(), 256), T, "dequantiser is a int; wanted a Dequantiser"),
    "no dimensions": Bad(lambda: k.bits_per_dimension(X, 0), V, "dimensions is 0; wanted at least 1"),
    "unknown unit": Bad(
        lambda: k.NegativeLogLikelihood(flow(), "bits/dim"), V, "unit is 'bits/dim'; wanted 'nats' or 'bits'"
    ),
    "loss of a bijection": Bad(
        lambda: k.NegativeLogLikelihood(real_nvp()), T, "model is a Chain; wanted a Flow or a Dequantised"
    ),
    # training
    "a flow for a loss": Bad(
        lambda: fit(loss=flow()), T, "loss is a Flow; wanted a loss module, such as NegativeLogLikelihood"
    ),
    "a function for a loss": Bad(lambda: fit(loss=lambda batch: 0), T, "loss is a function; wanted a loss module"),
    "nothing to train": Bad(
        lambda: fit(loss=k.NegativeLogLikelihood(k.Flow(k.Normal(2), k.Arcsinh(2)))),
        V,
        "loss has no parameters to train",
    ),
    "data that are an array": Bad(
        lambda: fit(np.zeros((3, 2))), T, "data is a ndarray; wanted a torch.Tensor of shape (n, *event"
    ),
    "data without a batch": Bad(
        lambda: fit(torch.zeros(2)), V, "data has shape (2,); wanted (n, *event_shape) with n at least 1"
    ),
    "no data": Bad(
        lambda: fit(torch.zeros(0, 2)), V, "data has shape (0, 2); wanted (n, *event_shape) with n at least 1"
    ),
    "data with NaN": Bad(lambda: fit(NAN), V, "data: 1 of 2 points hold NaN or infinite entries"),
    "data of another width": Bad(
        lambda: fit(torch.zeros(9, 3), validation=0), V, "x has shape (9, 3); wanted (*batch, 2)"
    ),
    "data of another dtype": Bad(
        lambda: fit(torch.randn(9, 2).double(), validation=0), T, "x has dtype torch.float64, but the parameters are"
    ),
    "whole numbers to a flow": Bad(
        lambda: fit(torch.ones(9, 2).long(), validation=0), T, "x has dtype torch.int64; wanted floating point"
    ),
    "no steps": Bad(lambda: fit(steps=0), V, "steps is 0; wanted a whole number of at least 1"),
    "half a batch": Bad(lambda: fit(batch=0.5), V, "batch is 0.5; wanted a whole number of at least 1"),
    "no records": Bad(lambda: fit(records=0), V, "records is 0; wanted a whole number of at least 1"),
    "no learning rate": Bad(lambda: fit(lr=0), V, "lr is 0; wanted a positive number"),
    "NaN for a learning rate": Bad(lambda: fit(lr=math.nan), V, "lr is nan; wanted a positive number"),
    "everything held out": Bad(
        lambda: fit(validation=1.0), V, "validation is 1.0; wanted a fraction in [0, 1), or held-out points"
    ),
    "held-out number as text": Bad(lambda: fit(validation="10%"), V, "validation is '10%'; wanted a fraction"),
    "nothing held out": Bad(lambda: fit(validation=X[:0]), V, "validation has shape (0, 2); wanted (n, *event_shape)"),
    "held-out points with NaN": Bad(lambda: fit(validation=NAN), V, "validation: 1 of 2 points hold NaN"),
    "held-out points of another width": Bad(
        lambda: fit(validation=torch.zeros(3, 5)), V, "validation has points of shape (5,); data of (2,)"
    ),
    "a fraction of nothing": Bad(
        lambda: fit(torch.zeros(9, 2)), V, "validation is 0.1 of 9 points, none; wanted 0, or more of them"
    ),
    "contexts of other points": Bad(
        lambda: fit(context=torch.zeros(3, 1)), V, "context has 3 rows; wanted 20, one for each of the points"
    ),
    "a context that is no tensor": Bad(
        lambda: fit(context=[[1.0]] * 20), T, "context is a list; wanted a torch.Tensor of shape (n, *event_shape)"
    ),
    "held-out points without their context": Bad(
        lambda: fit(context=torch.zeros(20, 1), validation=X),
        V,
        "validation has points alone; wanted points and a context, as the data are given",
    ),
    "held-out points with too much": Bad(
        lambda: fit(validation=(X, X, X)), V, "validation has 3 members; wanted points, or points and their context"
    ),
    "a context that the model does not take": Bad(
        lambda: fit(context=torch.zeros(20, 1)), V, "Chain: context was given, but this map takes none"
    ),
    "an unknown schedule": Bad(
        lambda: fit(schedule="linear"), V, "schedule is 'linear'; wanted one of cosine, constant"
    ),
    "a negative warm-up": Bad(lambda: fit(warmup=-1), V, "warmup is -1; wanted a whole number, 0 for none"),
    "recoveries without end": Bad(
        lambda: fit(recoveries=math.inf), V, "recoveries is inf; wanted a whole number, 0 for none"
    ),
    "a seed of one half": Bad(lambda: fit(seed=0.5), V, "seed is 0.5; wanted a whole number"),
    "True for a learning rate": Bad(lambda: fit(lr=True), V, "lr is True; wanted a positive number"),
    "a list of schedules": Bad(lambda: fit(schedule=["cosine"]), V, "schedule is ['cosine']; wanted one of cosine"),
    "a number for a report": Bad(lambda: fit(report=3), T, "report is a int; wanted a function"),
    "a number for a checkpoint": Bad(lambda: fit(checkpoint=3), T, "checkpoint is a int; wanted a str or a pathlib"),
    "a weight that is text": Bad(
        lambda: k.NegativeLogLikelihood(flow(), penalties={"kinetic_energy": "0.1"}),
        V,
        "penalties has kinetic_energy: '0.1'; wanted a weight of at least 0",
    ),
    "a decay of 1": Bad(lambda: fit(ema=1), V, "ema is 1; wanted a decay between 0 and 1, such as 0.999"),
    "a gradient of no length": Bad(lambda: fit(clip=0), V, "clip is 0; wanted a positive number"),
    "no patience": Bad(lambda: fit(patience=0), V, "patience is 0; wanted a whole number of at least 1"),
    "patience with nothing held out": Bad(
        lambda: fit(patience=2, validation=0), V, "patience is given, but validation is 0; wanted held-out points"
    ),
    "a folder for a checkpoint": Bad(lambda: fit(checkpoint="."), V, "checkpoint is '.', a folder; wanted a file"),
    # how to solve
    "unknown trace": Bad(lambda: k.Solve(trace="hutch"), V, "trace is 'hutch'; wanted one of exact, hutchinson"),
    "unknown gradient": Bad(
        lambda: k.Solve(gradient="none"), V, "gradient is 'none'; wanted one of backprop, checkpoint, adjoint"
    ),
    "no probes": Bad(lambda: k.Solve(probes=0), V, "probes is 0; wanted a whole number of at least 1"),
    "a truth for a number of probes": Bad(
        lambda: k.Solve(probes=True), V, "probes is True; wanted a whole number of at least 1"
    ),
    "no energies": Bad(lambda: k.Solve(energies=None), T, "energies is None; wanted a tuple of names"),
    "method that is wrong on unequal steps": Bad(
        lambda: k.Solve(method="torchdiffeq:explicit_adams", times=(0, 1)),
        V,
        "method is 'torchdiffeq:explicit_adams'; wanted one of",
    ),
    "tolerances": Bad(lambda: k.Solve(tolerance=[1e-3, 1e-5]), V, "tolerance is [0.001, 1e-05]; wanted a positive"),
    "no solver steps": Bad(lambda: k.Solve(max_steps=1.5), V, "max_steps is 1.5; wanted a whole number of at least 1"),
    "seed for probes": Bad(lambda: k.Solve(generator=1), T, "generator is a int; wanted a torch.Generator"),
    "grid and tolerance": Bad(lambda: k.Solve(times=(0, 1), tolerance=1e-3), V, "times and tolerance are both given"),
    "one time": Bad(lambda: k.Solve(times=(0,)), V, "times is (0,); wanted increasing numbers from 0 to 1"),
    "a number of times": Bad(lambda: k.Solve(times=10), V, "times is 10; wanted increasing numbers from 0 to 1"),
    "times that go back": Bad(
        lambda: k.Solve(times=(0, 1, 0.5)), V, "times is (0, 1, 0.5); wanted increasing numbers from 0 to 1"
    ),
    "a time that is NaN": Bad(
        lambda: k.Solve(times=(0, math.nan)), V, "times is (0, nan); wanted increasing numbers from 0 to 1"
    ),
    "unknown noise": Bad(
        lambda: k.Solve(trace="hutchinson", noise="normal"), V, "noise is 'normal'; wanted one of rademacher, gaussian"
    ),
    "unknown reduction": Bad(lambda: k.Solve(reduction="max"), V, "reduction is 'max'; wanted one of sum, mean"),
    "unknown method": Bad(
        lambda: k.Solve(method="rk5"),
        V,
        "method is 'rk5'; wanted one of euler, midpoint, rk4, rk4_38, rk6, dopri5, torchdiff",
    ),
    "no method": Bad(lambda: k.Solve(method=None), V, "method is None; wanted one of euler"),
    "unknown method of torchdiffeq": Bad(
        lambda: k.Solve(method="torchdiffeq:rk4_38", times=(0, 1)), V, "method is 'torchdiffeq:rk4_38'; wanted one of"
    ),
    "an energy, not in a tuple": Bad(
        lambda: k.Solve(energies="kinetic_energy"),
        V,
        "energies is 'kinetic_energy'; wanted a tuple of names, such as ('kinetic_energy',)",
    ),
    "unknown energy": Bad(
        lambda: k.Solve(energies=("kinetic",)),
        V,
        "energies is 'kinetic'; wanted one of kinetic_energy, jacobian_energy",
    ),
    "energy of a Jacobian without one": Bad(
        lambda: k.Solve(trace="none", energies=("jacobian_energy",)),
        V,
        "trace is 'none', but jacobian_energy needs the field's derivatives; choose another trace",
    ),
    "checkpoints of torchdiffeq": Bad(
        lambda: k.Solve(method="torchdiffeq:dopri5", gradient="checkpoint"),
        V,
        "gradient is 'checkpoint', which torchdiffeq does not have; wanted backprop or adjoint",
    ),
    "grid for a solver that takes none": Bad(
        lambda: k.Solve(method="torchdiffeq:dopri5", times=(0, 1)),
        V,
        "times are given, but torchdiffeq:dopri5 chooses its own steps; give a tolerance",
    ),
    "no grid for a solver that needs one": Bad(
        lambda: k.Solve(method="rk4"), V, "method 'rk4' takes fixed steps; give their times, such as uniform_grid(8)"
    ),
    "tolerance for a solver that needs a grid": Bad(
        lambda: k.Solve(method="torchdiffeq:rk4", tolerance=1e-3), V, "method 'torchdiffeq:rk4' takes fixed steps; give"
    ),
    "times that end too early": Bad(
        lambda: k.Solve(times=torch.tensor([0.0, 0.5])), V, "times is (0.0, 0.5); wanted increasing numbers from 0 to 1"
    ),
    "times that begin too late": Bad(
        lambda: k.Solve(times=(0.1, 1)), V, "times is (0.1, 1); wanted increasing numbers"
    ),
    "the same time twice": Bad(lambda: k.Solve(times=(0, 0.5, 0.5, 1)), V, "times is (0, 0.5, 0.5, 1); wanted increas"),
    "grid for times": Bad(lambda: k.Solve(times=k.JitteredGrid(2)), V, "times is JitteredGrid(jitter=0.9, "),
    "more times than steps": Bad(
        lambda: k.Solve(times=k.uniform_grid(8), max_steps=7), V, "times has 8 steps, max_steps is 7"
    ),
    "no tolerance at all": Bad(lambda: k.Solve(tolerance=0), V, "tolerance is 0; wanted a positive number"),
    "infinite tolerance": Bad(lambda: k.Solve(tolerance=math.inf), V, "tolerance is inf; wanted a positive number"),
    "tolerance that is NaN": Bad(lambda: k.Solve(tolerance=math.nan), V, "tolerance is nan; wanted a positive number"),
    "tolerance finer than the dtype": Bad(
        lambda: cnf()(X, solve=k.Solve(tolerance=1e-8)),
        V,
        "tolerance is 1e-08, finer than torch.float32 resolves (5e-07); wanted a larger one, or a model and points in",
    ),
    "tolerance finer than the dtype of torchdiffeq": Bad(
        lambda: cnf().inverse(X, solve=k.Solve(method="torchdiffeq:bosh3", tolerance=1e-8)),
        V,
        "tolerance is 1e-08, finer than torch.float32 resolves",
    ),
    "a name for a solve": Bad(lambda: cnf()(X, solve="rk4"), T, "CNF: solve is a str; wanted a cnfkit.Solve"),
    "a grid for a solve": Bad(
        lambda: flow().log_prob(X, solve=k.JitteredGrid(2)), T, "solve is a JitteredGrid; wanted a cnfkit.Solve"
    ),
    "a dictionary for a solve of a finite map": Bad(
        lambda: k.Squeeze((1, 8, 8))(IMAGE, solve={}), T, "Squeeze: solve is a dict; wanted a cnfkit.Solve"
    ),
    "a name for a solve in sampling": Bad(
        lambda: flow().sample(2, solve="rk4"), T, "solve is a str; wanted a cnfkit.Solve"
    ),
    "a name for a solve in sampling with density": Bad(
        lambda: flow().sample_and_log_prob(2, solve="rk4"), T, "solve is a str; wanted a cnfkit.Solve"
    ),
    "density without a trace": Bad(
        lambda: k.Flow(k.Normal(2), cnf()).log_prob(X, solve=k.Solve(trace="none")),
        V,
        "solve has trace='none', which gives points but no density; wanted exact or hutchinson",
    ),
    "density of samples without a trace": Bad(
        lambda: k.Flow(k.Normal(2), cnf()).sample_and_log_prob(3, solve=k.Solve(trace="none")),
        V,
        "solve has trace='none', which gives points but no density; wanted exact or hutchinson",
    ),
    "density of levels without a trace": Bad(
        lambda: levels().log_prob(LEVELS, solve=k.Solve(trace="none")), V, "solve has trace='none', which gives points"
    ),
    # grids
    "grid of no steps": Bad(lambda: k.uniform_grid(0), V, "steps is 0; wanted a whole number of at least 1"),
    "grid of half a step": Bad(lambda: k.uniform_grid(0.5), V, "steps is 0.5; wanted a whole number of at least 1"),
    "jittered grid of no steps": Bad(lambda: k.JitteredGrid(0), V, "steps is 0; wanted a whole number of at least 1"),
    "jitter of a whole step": Bad(lambda: k.JitteredGrid(4, 1.0), V, "jitter is 1.0; wanted a share in [0, 1)"),
    "negative jitter": Bad(lambda: k.JitteredGrid(4, -0.1), V, "jitter is -0.1; wanted a share in [0, 1)"),
    "jitter of an unknown method": Bad(lambda: k.JitteredGrid(4, method="rk5"), V, "method is 'rk5'; wanted one of"),
    "grid that is never renewed": Bad(
        lambda: k.FrozenGrid(every=0), V, "every is 0; wanted a whole number of at least 1"
    ),
    "grid of no rows": Bad(lambda: k.FrozenGrid(rows=0.5), V, "rows is 0.5; wanted a whole number of at least 1"),
    "grid of a negative tolerance": Bad(lambda: k.FrozenGrid(-1.0), V, "tolerance is -1.0; wanted a positive number"),
    "grid for a flow without steps": Bad(
        lambda: k.FrozenGrid()(flow(), X), V, "FrozenGrid: the model holds no CNF, and needs no grid"
    ),
    # continuous flows
    "function for a field": Bad(lambda: k.CNF(lambda t, z: z), T, "field is a function; wanted a torch.nn.Module"),
    "field of unknown shape": Bad(
        lambda: k.CNF(nn.Tanh()), V, "event_shape is missing, and Tanh has none; wanted a shape, such as 2"
    ),
    "event of no size": Bad(lambda: k.CNF(nn.Tanh(), 0), V, "event_shape is 0; wanted positive sizes"),
    "field of another shape": Bad(
        lambda: k.CNF(k.MLPField(2), 3), V, "event_shape is (3,), but that of the field is (2,); they must agree"
    ),
    "interval that is one number": Bad(
        lambda: k.CNF(k.MLPField(2), interval=1), V, "interval is 1; wanted two numbers, the smaller one first"
    ),
    "penalties without weights": Bad(
        lambda: k.NegativeLogLikelihood(flow(), penalties=["kinetic_energy"]),
        T,
        "penalties is ['kinetic_energy']; wanted weights by name",
    ),
    "tolerance as text": Bad(lambda: k.Solve(tolerance="1e-5"), V, "tolerance is '1e-5'; wanted a positive number"),
    "interval that goes back": Bad(
        lambda: k.CNF(k.MLPField(2), interval=(1, 0)),
        V,
        "interval is (1, 0); wanted two numbers, the smaller one first",
    ),
    "interval without an end": Bad(
        lambda: k.CNF(k.MLPField(2), interval=(0, math.inf)), V, "interval is (0, inf); wanted two numbers, the smaller"
    ),
    "interval from NaN": Bad(
        lambda: k.CNF(k.MLPField(2), interval=(math.nan, 1)), V, "interval is (nan, 1); wanted two numbers, the smaller"
    ),
    "a part that goes back": Bad(
        lambda: cnf().between(0.5, 0.2), V, "t0, t1 are 0.5, 0.2; wanted times in order, within (0.0, 1.0)"
    ),
    "a part that begins too early": Bad(
        lambda: cnf().between(-0.5, 1), V, "t0, t1 are -0.5, 1; wanted times in order, within (0.0, 1.0)"
    ),
    "a part that ends too late": Bad(lambda: cnf().between(0, 1.5), V, "t0, t1 are 0, 1.5; wanted times in order"),
    "a part from NaN": Bad(lambda: cnf().between(math.nan, 1), V, "t0, t1 are nan, 1; wanted times in order"),
    "velocity of another dtype": Bad(
        lambda: k.CNF(Field(lambda t, z: z.double(), 2))(X),
        T,
        "CNF: the field Field returned torch.float64 for points of torch.float32; wanted the same",
    ),
    "velocity of another dtype in sampling": Bad(
        lambda: k.Flow(k.Normal(2), k.CNF(Field(lambda t, z: z.half(), 2))).sample(3),
        T,
        "CNF: the field Field returned torch.float16 for points of torch.float32; wanted the same",
    ),
    "velocity of another shape": Bad(
        lambda: k.CNF(Field(lambda t, z: z[:, :1], 2))(X),
        V,
        "CNF: the field Field returned shape (3, 1) for points of shape (3, 2); wanted the same",
    ),
    "velocity of another shape in sampling": Bad(
        lambda: k.Flow(k.Normal(2), k.CNF(Field(lambda t, z: z.sum(), 2))).sample(3),
        V,
        "CNF: the field Field returned shape () for points of shape (3, 2); wanted the same",
    ),
    "points of another width to a continuous flow": Bad(
        lambda: cnf()(torch.zeros(3, 4)), V, "CNF: x has shape (3, 4); wanted (*batch, 2)"
    ),
    "float64 to a continuous flow": Bad(
        lambda: cnf().inverse(X.double()), T, "CNF: z has dtype torch.float64, but the parameters are torch.float32"
    ),
    "context to a continuous flow": Bad(lambda: cnf()(X, X), V, "CNF: context was given, but this map takes none"),
    "field of no dimensions": Bad(lambda: k.MLPField(0), V, "dimension is 0; wanted positive sizes"),
    "field of images": Bad(lambda: k.MLPField((1, 8, 8)), V, "dimension is (1, 8, 8); wanted one number"),
    "field without hidden layers": Bad(lambda: k.MLPField(2, ()), V, "hidden is (); wanted positive sizes"),
    "field of no width": Bad(lambda: k.MLPField(2, (8, 0)), V, "hidden is (8, 0); wanted positive sizes"),
    "unknown dependence on time": Bad(
        lambda: k.MLPField(2, time="blend"), V, "time is 'blend'; wanted one of concat, concatsquash, hyper"
    ),
    "activation that is not smooth": Bad(
        lambda: k.MLPField(2, activation="relu"), V, "activation is 'relu'; wanted one of tanh, softplus"
    ),
    # losses and evaluations of continuous flows
    "a name for the solve of a loss": Bad(
        lambda: k.NegativeLogLikelihood(flow(), solve="rk4"), T, "solve is a str; wanted a Solve or a grid"
    ),
    "a module that is no grid": Bad(
        lambda: k.NegativeLogLikelihood(flow(), solve=nn.Linear(2, 2)), T, "solve is a Linear; wanted a Solve or a grid"
    ),
    "a grid for the evaluation": Bad(
        lambda: k.NegativeLogLikelihood(flow(), evaluation=k.JitteredGrid(2)),
        T,
        "evaluation is a JitteredGrid; wanted a Solve",
    ),
    "energies in the solve of a loss": Bad(
        lambda: k.NegativeLogLikelihood(flow(), solve=k.FrozenGrid(energies=("kinetic_energy",))),
        V,
        "solve has energies ('kinetic_energy',); name them in penalties, with weight 0 to watch",
    ),
    "unknown penalty": Bad(
        lambda: k.NegativeLogLikelihood(flow(), penalties={"kinetic": 1}),
        V,
        "penalties has 'kinetic'; wanted kinetic_energy or jacobian_energy",
    ),
    "negative weight": Bad(
        lambda: k.NegativeLogLikelihood(flow(), penalties={"kinetic_energy": -1}),
        V,
        "penalties has kinetic_energy: -1; wanted a weight of at least 0",
    ),
    "weight that is NaN": Bad(
        lambda: k.NegativeLogLikelihood(flow(), penalties={"kinetic_energy": math.nan}),
        V,
        "penalties has kinetic_energy: nan; wanted a weight of at least 0",
    ),
    "penalty of a finite flow": Bad(
        lambda: k.NegativeLogLikelihood(flow(), penalties={"kinetic_energy": 1})(X),
        V,
        "penalties has 'kinetic_energy', but the model holds no CNF that has one",
    ),
    "loss without a trace": Bad(
        lambda: k.NegativeLogLikelihood(flow(), solve=k.Solve(trace="none"))(X),
        V,
        "solve has trace='none', which gives",
    ),
    "evaluation of a map": Bad(lambda: k.evaluate(cnf(), X), T, "model is a CNF; wanted a Flow or a Dequantised"),
    "evaluation at one point": Bad(
        lambda: k.evaluate(flow(), X[:1]), V, "x has 1 points; a standard error needs at least 2, and each process one"
    ),
    "evaluation in draws of a flow": Bad(
        lambda: k.evaluate(flow(), X, draws=2), V, "draws and bin_centres are for a Dequantised, but model is a Flow"
    ),
    "evaluation at bin centres of a flow": Bad(
        lambda: k.evaluate(flow(), X, bin_centres=True), V, "are for a Dequantised, but model is a Flow; leave them out"
    ),
    "evaluation with a seed that is none": Bad(
        lambda: k.evaluate(flow(), X, seed="0"), V, "seed is '0'; wanted a whole number, or None"
    ),
    "evaluation in batches of none": Bad(
        lambda: k.evaluate(flow(), X, batch=0), V, "batch is 0; wanted a whole number of at least 1"
    ),
    "noise for other points": Bad(
        lambda: k.Normal(2).sample(4, PointNoise(0, range(3))),
        V,
        "generator has noise for 3 points; wanted it for 4",
    ),
    "half precision with steps that adapt": Bad(
        lambda: k.Solve(precision="bfloat16"),
        V,
        "precision is 'bfloat16', which adaptive steps would take",
    ),
    "an unknown precision": Bad(
        lambda: k.Solve(precision="half"), V, "precision is 'half'; wanted one of full, bfloat16"
    ),
    "evaluation of no rows": Bad(
        lambda: k.evaluate(flow(), X, rows=0), V, "rows is 0; wanted a whole number of at least 1"
    ),
    "evaluation by a name": Bad(
        lambda: k.evaluate(levels(), LEVELS, solve="rk4"), T, "solve is a str; wanted a cnfkit.Solve"
    ),
    "evaluation without a trace": Bad(
        lambda: k.evaluate(flow(), X, solve=k.Solve(trace="none")), V, "solve has trace='none', which gives points"
    ),
    "evaluation of another width": Bad(
        lambda: k.evaluate(flow(), torch.zeros(3, 5)), V, "x has shape (3, 5); wanted (*batch, 2)"
    ),
    "solver error of a map": Bad(lambda: k.solver_error(cnf(), X), T, "model is a CNF; wanted a Flow or a Dequantised"),
    "solver error by a grid": Bad(
        lambda: k.solver_error(flow(), X, solve=k.FrozenGrid()), T, "solve is a FrozenGrid; wanted a cnfkit.Solve"
    ),
    "negative tolerance": Bad(lambda: k.Solve(tolerance=-1e-3), V, "tolerance is -0.001; wanted a positive number"),
    # checks and contract
    "check without a bound": Bad(
        lambda: k.check("c", 1), V, "check 'c': wanted exactly one of below, above, within; got none"
    ),
    "check of nothing": Bad(
        lambda: k.check("c", X[:0], below=1), V, "check 'c': nothing was measured (an empty tensor)"
    ),
    "check within a number": Bad(
        lambda: k.check("c", 1, within=2), V, "check 'c': within is 2; wanted an interval (low, high)"
    ),
    "check within nothing": Bad(
        lambda: k.check("c", 1, within=(2, 1)), V, "check 'c': within is (2, 1); wanted an interval"
    ),
    "contract of a flow": Bad(
        lambda: k.bijection_contract(flow(), X), T, "bijection is a Flow; wanted a Bijection (a Flow has .bijection)"
    ),
    "contract at one point": Bad(
        lambda: k.bijection_contract(real_nvp(), X[:1]), V, "x has 1 points; the contract needs at least 2"
    ),
    "flow contract on half a line": Bad(
        lambda: k.flow_contract(flow(), support=(0, math.inf)),
        V,
        "support is (0, inf); wanted an interval with both ends, or the whole line",
    ),
    "a bijection that returns a pair": Bad(lambda: Pair(2)(X), T, "Pair returned a tuple; wanted a Result"),
    "flow contract of a map": Bad(lambda: k.flow_contract(real_nvp()), T, "flow is a Chain; wanted a Flow"),
    # data and figures
    "unknown density": Bad(
        lambda: k.toy_density("moons"), V, "name is 'moons'; wanted one of two_moons, eight_gaussians"
    ),
    "toy points in space": Bad(
        lambda: k.toy_density("pinwheel").log_prob(torch.zeros(5, 3)),
        V,
        "Pinwheel: x has shape (5, 3); wanted (*batch, 2)",
    ),
    "toy points of whole numbers": Bad(
        lambda: k.toy_density("checkerboard").log_prob(X.long()),
        T,
        "Checkerboard: x has dtype torch.int64; wanted floating",
    ),
    "negative number of toy points": Bad(
        lambda: k.toy_density("two_moons").sample(-5), V, "n is -5; wanted a number of points"
    ),
    "images without a channel": Bad(
        lambda: figures.images(None, torch.zeros(3, 8, 8)),
        V,
        "pictures has shape (3, 8, 8); wanted (n, 1 or 3, height, width)",
    ),
    "missing checkpoint": Bad(
        lambda: k.load("absent.safetensors", nn.Linear(2, 2)),
        FileNotFoundError,
        "no checkpoint at absent.safetensors; train the",
    ),
    "missing MNIST": Bad(
        lambda: k.mnist("absent"), FileNotFoundError, "MNIST's train-images-idx3-ubyte (or train-images-idx3-ubyte.gz)"
    ),
    "missing Fashion-MNIST": Bad(
        lambda: k.fashion_mnist("absent"), FileNotFoundError, "Fashion-MNIST's train-images-idx3-ubyte (or train-"
    ),
    "missing CIFAR-10": Bad(
        lambda: k.cifar10("absent"), FileNotFoundError, "cifar-10-binary.tar.gz is not in absent; without a folder, it"
    ),
    "unknown table": Bad(
        lambda: k.table("POWER"), V, "name is 'POWER'; wanted one of power, gas, hepmass, miniboone, bsds300, wine"
    ),
    "missing table": Bad(
        lambda: k.table("miniboone", "absent"),
        FileNotFoundError,
        "MiniBooNE_PID.txt (or MiniBooNE_PID.txt.gz, or miniboone.zip) is not in absent; without a folder, it is",
    ),
    # files
    "weights to a number": Bad(lambda: k.save(3, nn.Linear(2, 2)), T, "path is a int; wanted a str or a pathlib.Path"),
    "weights to a folder": Bad(
        lambda: k.save(".", nn.Linear(2, 2)), IsADirectoryError, "this is a folder; wanted a file: '.'"
    ),
    "weights below a file": Bad(
        lambda: k.save(Path(__file__) / "a.safetensors", nn.Linear(2, 2)),
        FileExistsError,
        "File exists; this was not written, and what was there before is as it was",
    ),
    "weights without their module": Bad(
        lambda: k.save("a.safetensors", nn.Linear(2, 2).state_dict()),
        T,
        "module is a OrderedDict; wanted a torch.nn.Module",
    ),
    "weights with a fact that is no JSON": Bad(
        lambda: k.save("a.safetensors", nn.Linear(2, 2), mean=X[0]),
        T,
        "mean is tensor([0., 0.]); wanted a fact that JSON can hold: Object of type Tensor is not JSON serializable",
    ),
    "weights that are not there yet": Bad(
        lambda: k.save("a.safetensors", nn.Linear(2, 2, device="meta")),
        T,
        "weight is torch.strided, torch.float32, on meta; wanted a dense tensor with values, to be saved",
    ),
    "weights of a type that files lack": Bad(
        lambda: k.save("a.safetensors", nn.Linear(2, 2, dtype=torch.complex128)),
        T,
        "a tensor is torch.complex128; wanted a type that safetensors knows",
    ),
    "weights from a number": Bad(
        lambda: k.load(3, nn.Linear(2, 2)), T, "path is a int; wanted a str or a pathlib.Path"
    ),
    "weights from a folder": Bad(
        lambda: k.load(".", nn.Linear(2, 2)), k.CheckpointError, ". is a folder; wanted a file"
    ),
    "weights into a class": Bad(lambda: k.load("a", nn.Linear), T, "module is a type; wanted a torch.nn.Module"),
    "weights from a text": Bad(
        lambda: k.load(__file__, nn.Linear(2, 2)), k.CheckpointError, "test_errors.py is damaged or no safetensors file"
    ),
    "a look into nothing": Bad(
        lambda: k.inspect("absent.safetensors"), FileNotFoundError, "no checkpoint at absent.safetensors; train the"
    ),
    "a look into a module": Bad(lambda: k.inspect(nn.Linear(2, 2)), T, "path is a Linear; wanted a str or a pathlib"),
    "published weights that are missing": Bad(
        lambda: k.trained("absent.safetensors", nn.Linear(2, 2), fit),
        FileNotFoundError,
        "no checkpoint at absent.safetensors; train the model first (chapters: CNFKIT_RETRAIN=1)",
    ),
    "published weights of no module": Bad(
        lambda: k.trained("absent.safetensors", fit, nn.Linear(2, 2)),
        T,
        "module is a function; wanted a torch.nn.Module",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_bad_call(name):
    bad = TABLE[name]
    with pytest.raises(bad.error, match=re.escape(bad.message)) as raised:
        bad.call()
    assert type(raised.value) is bad.error, "not of a class that happens to derive from it"
    last = raised.traceback[-1].path
    assert Path(k.__file__).parent in last.parents, f"raised by {last}, which knows nothing of the argument"


def test_a_refused_call_changes_nothing():
    """After a refusal the same object goes on as before."""
    model, x = flow(), torch.randn(4, 2)
    before = model.log_prob(x)
    for call in (lambda: model.log_prob(NAN), lambda: model.log_prob(X.double()), lambda: model.sample(-1)):
        with pytest.raises((TypeError, ValueError)):
            call()
    assert model.log_prob(x).equal(before)


@pytest.mark.parametrize("at", range(3))
def test_a_nan_that_arises_inside_a_flow_is_not_called_a_density(at):
    """NaN weights, as a diverged run leaves them: the density is NaN or nothing, and a check on it fails."""
    model = two_moons_flow(layers=2)
    with torch.no_grad():
        list(model.parameters())[at].fill_(math.nan)
    log_prob = model.log_prob(torch.ones(4, 2))
    assert log_prob.isnan().all()
    with pytest.raises(k.CheckFailed, match="measured nan"):
        k.check("the log-density is finite", log_prob, above=-1e9)
