"""One bug in each kind of finite flow, as people make them; the contract must catch it, and name the broken promise."""

import pytest
import torch
from builders import redrawn, seeded
from torch import nn

from cnfkit import (
    CNF,
    MADE,
    MLP,
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineLU,
    Arcsinh,
    Autoregressive,
    Beta,
    Chain,
    CheckFailed,
    Conv1x1,
    Coordinatewise,
    Coupling,
    Diagonal,
    Elementwise,
    Flatten,
    Flow,
    Inverse,
    LipschitzMLP,
    Logit,
    MixtureCDF,
    MixtureLogit,
    MLPField,
    NormalMixture,
    Permutation,
    Planar,
    Residual,
    Result,
    ScaleShift,
    Solve,
    bijection_contract,
    flow_contract,
    mask,
)
from cnfkit.bijections.base import sum_event
from cnfkit.bijections.inversion import solve_increasing
from cnfkit.ode.cnf import Dynamics
from cnfkit.ode.solvers import runge_kutta_step, stages
from cnfkit.ode.tableaux import TABLEAUX

INVERSE = "the inverse undoes the map"
CANCEL = "both log-determinants cancel"
JACOBIAN = "the log-determinant is that of autograd's Jacobian"
INVERSE_JACOBIAN = "the inverse's Jacobian is the inverse Jacobian"
LOGDET_GRADIENT = "the log-determinant's gradient in the parameters is the Jacobian's"
INVERSE_GRADIENT = "the inverse's gradient in the parameters cancels the map's"
BATCH = "a point's result does not depend on its batch or on earlier calls"


class Autoregression(Autoregressive):
    """A whole one, to be broken."""

    def __init__(self, net=None):
        super().__init__(net or MADE(3, order=[2, 0, 1], hidden=(8,)))


class SeesItself(MADE):
    """The mask of the last layer is off by one: a coordinate's own value decides how it is changed."""

    def __init__(self):
        super().__init__(3, order=[2, 0, 1], hidden=(8,))
        rank = torch.tensor(self.order).argsort()
        self.layers[0].allowed = torch.ones_like(self.layers[0].allowed)
        self.layers[-1].allowed = (torch.arange(8) % 3 <= rank.repeat(2)[:, None]).float()


class ForgetsTheMask(MADE):
    def forward(self, x, context=None):
        for layer in self.layers:
            x = nn.functional.linear(x, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else layer(x)
        return x


class InverseInAnotherOrder(Autoregression):
    def _inverse(self, z, context, solve):
        order, self.net.order = self.net.order, [0, 1, 2]
        try:
            return super()._inverse(z, context, solve)
        finally:
            self.net.order = order


class InverseInOnePass(Autoregression):
    """All coordinates at once, from the latent in place of the data: right for a coupling."""

    def _inverse(self, z, context, solve):
        x, log_derivative = self.univariate.inverse(z, self.parameters_of(z, context))
        return Result(x, sum_event(log_derivative, self.event_shape))


class LogdetOfTheFirstCoordinates(Autoregression):
    """The last coordinate is left out of the sum."""

    def _forward(self, x, context, solve):
        z, log_derivative = self.univariate.forward(x, self.parameters_of(x, context))
        return Result(z, log_derivative[..., :-1].sum(-1))


class StaleParameters(Autoregression):
    """The net's answer of the call before is used again."""

    stale = None

    def parameters_of(self, seen, context=None):
        fresh = super().parameters_of(seen, context)
        used = self.stale if self.stale and self.stale[0].shape == fresh[0].shape else fresh
        self.stale = [part.detach() for part in fresh]
        return used


class Dropped(Autoregression):
    """Both log-determinants are, so that they agree with each other."""

    factor = 0.0

    def _forward(self, x, context, solve):
        result = super()._forward(x, context, solve)
        return Result(result.value, self.factor * result.logdet)

    def _inverse(self, z, context, solve):
        result = super()._inverse(z, context, solve)
        return Result(result.value, self.factor * result.logdet)


class Negated(Dropped):
    factor = -1.0


class Halved(Dropped):
    factor = 0.5


class OtherLayoutInTheInverse(Autoregression):
    """The net's answer is read coordinate after coordinate, where it was written parameter after parameter."""

    def _inverse(self, z, context, solve):
        theirs, self.parameters_of = self.parameters_of, self.by_coordinate
        try:
            return super()._inverse(z, context, solve)
        finally:
            self.parameters_of = theirs

    def by_coordinate(self, seen, context=None):
        return self.net(seen).unflatten(-1, (-1, self.univariate.outputs)).unbind(-1)


class ContextForgottenInTheInverse(Autoregressive):
    def _inverse(self, z, context, solve):
        return super()._inverse(z, torch.zeros_like(context), solve)


class ContextOfTheFirstRow(Coupling):
    """A context that is thought to be one for the whole batch."""

    def parameters_of(self, seen, context=None):
        return super().parameters_of(seen, context.reshape(-1, context.shape[-1])[0].expand_as(context))


class SignForgotten(AffineLU):
    """The determinant's sign is left out of the matrix in one direction."""

    def _solve(self, columns):
        lower, upper = self._factors()
        upper = upper.triu(1) + torch.diag(upper.diagonal().abs())
        columns = torch.linalg.solve_triangular(lower, self.permutation.T @ columns, upper=False)
        return torch.linalg.solve_triangular(upper, columns, upper=True)


class PermutationForgotten(AffineLU):
    def _solve(self, columns):
        lower, upper = self._factors()
        return torch.linalg.solve_triangular(
            upper, torch.linalg.solve_triangular(lower, columns, upper=False), upper=True
        )


class Transposed(Affine):
    def _solve(self, columns):
        return torch.linalg.solve(self.matrix.T, columns)


class DeterminantWithoutItsLogarithm(Affine):
    def _log_abs_det(self):
        return torch.linalg.det(self.matrix)


class LogdetOfOnePixel(Conv1x1):
    """log|det W| once, in place of once for each pixel."""

    def _by_pixel(self, go, points):
        result = super()._by_pixel(go, points)
        return Result(result.value, result.logdet / (points.shape[-1] * points.shape[-2]))


class LogdetOfOneRow(Conv1x1):
    """log|det W| once for each column of pixels: height forgotten, or thought to be in it."""

    def _by_pixel(self, go, points):
        result = super()._by_pixel(go, points)
        return Result(result.value, result.logdet / points.shape[-2])


class RowsForColumns(Conv1x1):
    """The image comes back lying on its side."""

    def _inverse(self, z, context, solve):
        result = super()._inverse(z, context, solve)
        return Result(result.value.mT, result.logdet)


class Unconstrained(Planar):
    """u as it stands: for wᵀu < −1 some points share their image."""

    def direction(self):
        return self.u, 1 + self.w @ self.u


class SlopeOfAnotherActivation(Planar):
    def _forward(self, x, context, solve):
        result = super()._forward(x, context, solve)
        a = x @ self.w + self.b
        _, least = self.direction()
        return Result(result.value, torch.log1p((least - 1) * torch.sigmoid(a) * (1 - torch.sigmoid(a))))


class DensityWithoutItsScale(MixtureCDF):
    """The components' densities are not divided by σ."""

    def _log_density(self, u, mixture):
        log_weights, means, log_scales = mixture
        return super()._log_density(u, (log_weights, means, torch.zeros_like(log_scales)))


class WeightsThatDoNotAddUp(MixtureCDF):
    """No softmax: value and derivative go together, but 1 is not the limit of the one, nor the mass of the other."""

    def _mixture(self, parameters):
        weights, means, raw_scales = super()._mixture(parameters)
        return weights - 0.2, means, raw_scales


class RoughInverse(MixtureLogit):
    """Bisection that is stopped after a few steps."""

    def inverse(self, z, parameters):
        low, high = torch.full_like(z, -8.0), torch.full_like(z, 8.0)
        for _ in range(10):
            middle = (low + high) / 2
            below = self.forward(middle, parameters)[0] < z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return middle, -self.forward(middle, parameters)[1]


class InverseWithoutGradients(MixtureLogit):
    """Found without autograd, and given back as it is: a sample would not train."""

    def inverse(self, z, parameters):
        x = super().inverse(z, parameters)[0].detach()
        return x, -self.forward(x, parameters)[1]


class InverseWithGradientsOfItsPointAlone(MixtureLogit):
    """The implicit function theorem, applied to z and not to the parameters: samples would not train a net."""

    def inverse(self, z, parameters):
        return super().inverse(z, [parameter.detach() for parameter in parameters])


class ScaleOfTheInverse(ScaleShift):
    def inverse(self, z, parameters):
        x, log_derivative = super().inverse(z, parameters)
        return x, -log_derivative


class KeptPartCounted(Coupling):
    """What the net says of the kept part is left out of the value, but not of the log-determinant."""

    def _forward(self, x, context, solve):
        theta = self.parameters_of(x * self.kept, context)
        z, log_derivative = self.univariate.forward(x, theta)
        return Result(torch.where(self.mask, x, z), sum_event(log_derivative, self.event_shape))


class ItsOwnInverse(Permutation):
    def _inverse(self, z, context, solve):
        return self._pick(z, self.order)


class ColumnsFirst(Flatten):
    def _inverse(self, z, context, solve):
        x = z.unflatten(-1, self.event_shape).mT.reshape(*z.shape[:-1], *self.event_shape)
        return Result(x, z.new_zeros(z.shape[:-1]))


class NoContraction(LipschitzMLP):
    """The bound is forgotten."""

    def contracted(self):
        network = super().contracted()
        return lambda x: -3 * x + network(x)


class FirstTermOfTheSeries(Residual):
    """The trace of the Jacobian in place of the logarithm of the determinant: right for a small step only."""

    def _forward(self, x, context, solve):
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            rows = self.net(point).unbind(-1)
            slopes = [torch.autograd.grad(y.sum(), point, create_graph=True)[0][..., i] for i, y in enumerate(rows)]
        return Result(super()._forward(x, context, solve).value, sum(slopes))


def rough(kind):
    return lambda: Coordinatewise(2, kind(3))


MATRIX = torch.tensor([[0.0, 1.0, 2.0], [-1.0, 0.5, 0.0], [3.0, 1.0, 1.0]])
EVEN = mask("even", 3)
MUTANTS = {
    "made sees itself": (lambda: Autoregression(SeesItself()), INVERSE),
    "made without masks": (lambda: Autoregression(ForgetsTheMask(3, order=[2, 0, 1], hidden=(8,))), INVERSE),
    "inverse in another order": (InverseInAnotherOrder, INVERSE),
    "inverse in one pass": (InverseInOnePass, INVERSE),
    "log-determinant without the last": (LogdetOfTheFirstCoordinates, CANCEL),
    "stale parameters": (StaleParameters, BATCH),
    "log-determinants dropped": (Dropped, JACOBIAN),
    "log-determinants negated": (Negated, JACOBIAN),
    "log-determinants halved": (Halved, JACOBIAN),
    "another layout in the inverse": (OtherLayoutInTheInverse, INVERSE),
    "sign forgotten": (lambda: SignForgotten(MATRIX), INVERSE),
    "permutation forgotten": (lambda: PermutationForgotten(MATRIX), INVERSE),
    "transposed": (lambda: Transposed(MATRIX), INVERSE),
    "no logarithm": (lambda: DeterminantWithoutItsLogarithm(MATRIX), JACOBIAN),
    "one pixel": (lambda: LogdetOfOnePixel((3, 2, 2)), JACOBIAN),
    "one row": (lambda: LogdetOfOneRow((3, 2, 2)), JACOBIAN),
    "rows for columns": (lambda: RowsForColumns((3, 2, 2)), INVERSE),
    "another slope": (lambda: SlopeOfAnotherActivation(3), CANCEL),
    "no scale in the density": (rough(DensityWithoutItsScale), JACOBIAN),
    "weights that do not add up": (rough(WeightsThatDoNotAddUp), INVERSE),
    "rough inverse": (rough(RoughInverse), INVERSE),
    "inverse without gradients": (rough(InverseWithoutGradients), INVERSE_JACOBIAN),
    "inverse with gradients of its point alone": (rough(InverseWithGradientsOfItsPointAlone), INVERSE_GRADIENT),
    "inverse with the map's log-derivative": (rough(lambda k: ScaleOfTheInverse()), CANCEL),
    "kept part counted": (lambda: KeptPartCounted(EVEN, MLP(3, 6, hidden=(8,)), ScaleShift()), CANCEL),
    "a permutation as its inverse": (lambda: ItsOwnInverse(3, [2, 0, 1]), INVERSE),
    "columns first": (lambda: ColumnsFirst((1, 2, 3)), INVERSE),
    "first term of the series": (lambda: FirstTermOfTheSeries(LipschitzMLP(3, hidden=(8,)), 3), CANCEL),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_contract_catches(name):
    make, promise = MUTANTS[name]
    bijection = redrawn(make(), scale=0.4)
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(bijection, torch.randn(4, *bijection.event_shape, generator=seeded()))
    assert str(failed.value).startswith(f"✗ {promise}: measured ")


def test_contract_catches_a_planar_flow_that_folds():
    layer = Unconstrained(2)
    with torch.no_grad():
        layer.w.copy_(torch.tensor([2.0, 0.0]))
        layer.u.copy_(torch.tensor([-2.0, 1.0]))  # wᵀu = −4
    with pytest.raises(CheckFailed):
        bijection_contract(layer, torch.linspace(-1, 1, 12).view(6, 2))


def test_a_residual_block_that_is_no_contraction_says_so():
    with pytest.raises(FloatingPointError, match="a net that is a contraction"):
        bijection_contract(Residual(NoContraction(2), 2), torch.randn(4, 2, generator=seeded()))


WHOLE = {
    "autoregressive": Autoregression,
    "factors": lambda: AffineLU(MATRIX),
    "mixture": rough(MixtureLogit),
    "coupling": lambda: Coupling(EVEN, MLP(3, 6, hidden=(8,)), ScaleShift()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_the_mutants_break_is_whole(name):
    bijection = redrawn(WHOLE[name](), scale=0.4)
    bijection_contract(bijection, torch.randn(4, *bijection.event_shape, generator=seeded()))


CONDITIONED = {
    "context forgotten in the inverse": (
        lambda: ContextForgottenInTheInverse(MADE(3, order=[2, 0, 1], hidden=(8,), context=2)),
        INVERSE,
    ),
    "context of the first row": (
        lambda: ContextOfTheFirstRow(EVEN, MLP(3, 6, hidden=(8,), context=2), ScaleShift()),
        BATCH,
    ),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_contract_catches_given_a_context(name):
    make, promise = CONDITIONED[name]
    x, context = torch.randn(4, 3, generator=seeded()), torch.randn(4, 2, generator=seeded(1))
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(redrawn(make(), scale=0.4), x, context)
    assert str(failed.value).startswith(f"✗ {promise}: measured ")


# Flows and bases


class WithoutItsNormaliser(Beta):
    def _log_prob(self, z):
        return super()._log_prob(z) + 0.1


class TurnedRound(Beta):
    """α and β are exchanged in the samples."""

    def _sample(self, *args, **options):
        return 1 - super()._sample(*args, **options)


class VariancesForDeviations(NormalMixture):
    def _sample(self, batch, generator, **options):
        weights = self.log_weights.exp()
        return NormalMixture(self.means, self.stds.square(), weights)._sample(batch, generator, **options)


class EqualWeights(NormalMixture):
    """The weights are in the density, and not in the samples."""

    def _sample(self, batch, generator, **options):
        return NormalMixture(self.means, self.stds)._sample(batch, generator, **options)


def mixture(kind, d: int) -> NormalMixture:
    means = torch.zeros(2, d)
    means[:, 0] = torch.tensor([-1.5, 1.5])
    return kind(means, 0.7, torch.tensor([1.0, 4.0]))


BROKEN = {
    "no normaliser": lambda d: Flow(WithoutItsNormaliser(d, 2.0, 3.0), Inverse(Logit(d))),
    "turned round": lambda d: Flow(TurnedRound(d, 2.0, 3.0), Inverse(Logit(d))),
    "variances": lambda d: Flow(mixture(VariancesForDeviations, d), Diagonal(d)),
    "equal weights": lambda d: Flow(mixture(EqualWeights, d), Diagonal(d)),
}


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("name", BROKEN)
def test_flow_contract_catches(name, d):
    """What leaves the bijection whole shows in the integrals."""
    with pytest.raises(CheckFailed) as failed:
        flow_contract(BROKEN[name](d))
    promise = "the density integrates to 1" if name == "no normaliser" else "samples fall where the density says"
    assert str(failed.value).startswith(f"✗ {promise}")


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "no normaliser"])
def test_flow_contract_catches_in_many_dimensions(name):
    """Where there are no integrals, a base's samples are held to its density, but for a constant."""
    with pytest.raises(CheckFailed, match="✗ a Metropolis step leaves the base's samples as they are"):
        flow_contract(BROKEN[name](4))


@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("kind", [Beta, NormalMixture])
def test_what_those_mutants_break_is_whole(kind, d):
    flow_contract(Flow(Beta(d, 2.0, 3.0), Inverse(Logit(d))) if kind is Beta else Flow(mixture(kind, d), Diagonal(d)))


# Maps of one number, coordinate by coordinate


class Wave(Elementwise):
    """x + a sin x, solved as if it increased: it does so for a < 1."""

    def __init__(self, a):
        super().__init__(2)
        self.a = a

    def function(self, x):
        return x + self.a * x.sin()

    def inverse_function(self, z):
        return solve_increasing(lambda x: (self.function(x), self.log_derivative(x, z)), z, z - self.a, z + self.a)

    def log_derivative(self, x, z):
        return (1 + self.a * x.cos()).abs().log()  # the absolute value hides the folds


class SameCoordinate(Arcsinh):
    """The first coordinate in every place."""

    def _forward(self, x, context, solve):
        return super()._forward(x[..., :1].expand_as(x), context, solve)


@pytest.mark.parametrize("bijection", [Wave(2.0), SameCoordinate(2)], ids=["folds", "same coordinate"])
def test_contract_catches_an_elementwise_map(bijection):
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(bijection, torch.linspace(-4, 4, 12).view(6, 2))
    assert str(failed.value).startswith(f"✗ {INVERSE}: measured ")


def test_a_lower_wave_is_whole():
    bijection_contract(Wave(0.9), torch.linspace(-4, 4, 12).view(6, 2))


class WeightsOneByOne(NormalMixture):
    """Each weight lies between 0 and 1, and nobody sees to it that they add up to 1."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log_weights = nn.functional.logsigmoid(self.log_weights)


@pytest.mark.parametrize("d", [1, 2])
def test_flow_contract_catches_weights_that_are_chosen_one_by_one(d):
    """It may report any likelihood: the mass alone shows it."""
    with pytest.raises(CheckFailed, match=r"^✗ the density integrates to 1"):
        flow_contract(Flow(mixture(WeightsOneByOne, d), Diagonal(d)))


# Reversible blocks, one after the other


class UndoneInTheOrderInWhichDone(Chain):
    """Each block is undone rightly, but the first one first."""

    def _inverse(self, z, context, solve):
        result = Result(z, z.new_zeros(z.shape[:-1]))
        for block in self:
            result = result.then(block.inverse(result.value, context, solve))
        return result


def shifts(kind):
    return redrawn(kind(*[AdditiveCoupling(kept, MLP(3, 3, hidden=(8,))) for kept in (EVEN, ~EVEN)]), scale=0.4)


def test_contract_catches_blocks_that_are_undone_in_the_order_in_which_they_were_done():
    """The density is right, and so is its total mass: the samples are another's."""
    x = torch.randn(4, 3, generator=seeded())
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(shifts(UndoneInTheOrderInWhichDone), x)
    assert str(failed.value).startswith(f"✗ {INVERSE}: measured ")
    bijection_contract(shifts(Chain), x)


# Actnorm


class StartsInEveryBatch(ActNorm):
    """The statistics are those of the batch at hand, so that a point's density depends on its company."""

    def _forward(self, x, context, solve):
        self._start_from(x.reshape(-1, *self.event_shape))
        return super()._forward(x, context, solve)


def test_contract_catches_an_actnorm_that_starts_in_every_batch():
    x = torch.randn(4, 3, 2, 2, generator=seeded())
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(StartsInEveryBatch((3, 2, 2)), x)
    assert str(failed.value).startswith(f"✗ {BATCH}: measured ")
    whole = ActNorm((3, 2, 2))
    whole.initialize(x)
    bijection_contract(whole, x)


# The loop of a solver


class SolverOnAWalk(CNF):
    """Steps of RK4 one after the other; unless it updates the state, the field is always asked where the path began."""

    def __init__(self, field, updates):
        super().__init__(field)
        self.updates = updates

    def _integrate(self, points, start, end, context, solve):
        path = state = points.reshape(-1, *self.event_shape)
        dynamics, h, logdet = Dynamics(self, Solve(), state, context), (end - start) / 32, state.new_zeros(len(state))
        for k in range(32):
            times = points.new_tensor(stages(TABLEAUX["rk4"], start + k * h, h))
            new, integral, _ = runge_kutta_step(dynamics.at(times), TABLEAUX["rk4"], h, state)
            path, logdet = path + (new - state), logdet + integral[0]
            state = path if self.updates else state
        return Result(path.view(points.shape), logdet.view(points.shape[:-1]))


def test_contract_catches_a_solver_that_forgets_to_update_its_state():
    """A straight line, whatever the steps: it can be trained through, and is not undone."""
    field, x = redrawn(MLPField(3, hidden=(8,)), scale=0.4), torch.randn(4, 3, generator=seeded())
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(SolverOnAWalk(field, updates=False), x)
    assert str(failed.value).startswith(f"✗ {INVERSE}: measured ")
    bijection_contract(SolverOnAWalk(field, updates=True), x)


# Estimated log-determinants, where the estimate is exact


class EachByItself(nn.Module):
    """A field with a diagonal Jacobian, whose trace one probe of signs gives without error."""

    event_shape = (3,)

    def __init__(self):
        super().__init__()
        self.speed = nn.Parameter(torch.tensor([0.5, -0.3, 0.8]))

    def forward(self, t, z):
        return torch.tanh(z) * self.speed


def uniform_probes(solve, z):
    """Between -1 and 1: of variance 1/3."""
    return 2 * torch.rand(1, *z.shape, dtype=z.dtype) - 1


def test_contract_catches_probes_without_unit_variance(monkeypatch):
    flow, x = CNF(EachByItself()), torch.randn(4, 3, generator=seeded())
    solve = Solve(trace="hutchinson", tolerance=1e-10)
    bijection_contract(flow, x, solve=solve)
    monkeypatch.setattr("cnfkit.ode.cnf.draw_probes", uniform_probes)
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(flow, x, solve=solve)
    assert str(failed.value).startswith(f"✗ {BATCH}: measured ")


# A field that sees other points


class InCompany(nn.Module):
    """A field on points that are centred and scaled by their own batch, or by constants."""

    event_shape = (3,)

    def __init__(self, by_batch):
        super().__init__()
        self.field, self.by_batch = redrawn(MLPField(3, hidden=(8,)), scale=0.4), by_batch

    def forward(self, t, z):
        mean, scale = (z.mean(0), (z.var(0, correction=0) + 1e-5).sqrt()) if self.by_batch else (0.5, 2.0)
        return self.field(t, (z - mean) / scale)


def test_contract_catches_batch_normalisation_inside_a_field():
    """It is a map of whole batches, whose determinant the points' own traces do not give."""
    x = torch.randn(4, 3, generator=seeded())
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(CNF(InCompany(by_batch=True)), x)
    assert str(failed.value).startswith(f"✗ {BATCH}: measured ")
    bijection_contract(CNF(InCompany(by_batch=False)), x)


# A field of images whose derivatives are carried by hand


class CarriedByHand(nn.Module):
    """Two convolutions; a derivative that passes them must leave their biases behind."""

    event_shape = (1, 2, 2)

    def __init__(self, biased):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        self.biased = biased

    def forward(self, t, z):
        return self.last(torch.tanh(self.first(z) + t))

    def with_products(self, t, z, probes):
        probes = torch.eye(4).to(z).view(4, 1, 1, 2, 2).expand(-1, *z.shape) if probes is None else probes
        slope = 1 - torch.tanh(self.first(z) + t).square()
        return self(t, z), torch.stack([self.carry(self.last, slope * self.carry(self.first, e)) for e in probes])

    def carry(self, layer, delta):
        return layer(delta) if self.biased else nn.functional.conv2d(delta, layer.weight, padding=1)


def test_contract_catches_derivatives_that_take_a_bias_along():
    x = torch.randn(4, 1, 2, 2, generator=seeded())
    with pytest.raises(CheckFailed) as failed:
        bijection_contract(CNF(CarriedByHand(biased=True)), x)
    assert str(failed.value).startswith(f"✗ {JACOBIAN}: measured ")
    bijection_contract(CNF(CarriedByHand(biased=False)), x)
