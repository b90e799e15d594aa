"""Normalizing flows from the change of variables to FFJORD and RNODE: small, checked, and fast.

``z = f(x)`` everywhere: data to latent is forward, and every log-determinant is that of the direction that was gone.
"""

from cnfkit.bases import Base, Beta, Normal, NormalMixture, Uniform
from cnfkit.bijections import (
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    AffineLU,
    Arcsinh,
    Autoregressive,
    Bijection,
    Chain,
    Conv1x1,
    Coordinatewise,
    Coupling,
    Diagonal,
    Elementwise,
    Flatten,
    Inverse,
    Logit,
    MixtureCDF,
    MixtureLogit,
    Multiscale,
    Permutation,
    Planar,
    Residual,
    Result,
    ScaleShift,
    Shift,
    Squeeze,
    Standardize,
    Univariate,
    mask,
)
from cnfkit.checkpoint import CheckpointError, Contents, inspect, load, save
from cnfkit.checks import CheckFailed, check
from cnfkit.contract import bijection_contract, flow_contract
from cnfkit.data import Images, Table, ToyDensity, cifar10, digits, fashion_mnist, mnist, table, toy_density
from cnfkit.dequantise import Dequantised, Dequantiser, UniformDequantiser, VariationalDequantiser
from cnfkit.evaluation import Evaluation, evaluate, solver_error
from cnfkit.flow import Flow
from cnfkit.flow_matching import FlowMatching, optimal_pairing
from cnfkit.grids import FrozenGrid, Grid, JitteredGrid, uniform_grid
from cnfkit.lipschitz import LipschitzConvNet, LipschitzMLP
from cnfkit.losses import NegativeLogLikelihood, bits_per_dimension
from cnfkit.nets import MADE, MLP, ConvNet
from cnfkit.ode.cnf import CNF
from cnfkit.ode.convfield import ConvField
from cnfkit.ode.fields import MLPField
from cnfkit.ode.potential import PotentialField
from cnfkit.ode.solve import Solve
from cnfkit.ode.statistics import SolveError, Statistics
from cnfkit.presets import ffjord, flowpp, glow, maf, nice, preset, realnvp, residual
from cnfkit.run import History
from cnfkit.settings import device, retrain, steps
from cnfkit.training import fit
from cnfkit.zoo import trained

__version__ = "0.1.0"

__all__ = [
    "CNF",
    "MADE",
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "AffineLU",
    "Arcsinh",
    "Autoregressive",
    "Base",
    "Beta",
    "Bijection",
    "Chain",
    "CheckFailed",
    "CheckpointError",
    "Contents",
    "Conv1x1",
    "ConvField",
    "ConvNet",
    "Coordinatewise",
    "Coupling",
    "Dequantised",
    "Dequantiser",
    "Diagonal",
    "Elementwise",
    "Evaluation",
    "Flatten",
    "Flow",
    "FlowMatching",
    "FrozenGrid",
    "Grid",
    "History",
    "Images",
    "Inverse",
    "JitteredGrid",
    "LipschitzConvNet",
    "LipschitzMLP",
    "Logit",
    "MLPField",
    "MixtureCDF",
    "MixtureLogit",
    "Multiscale",
    "NegativeLogLikelihood",
    "Normal",
    "NormalMixture",
    "Permutation",
    "Planar",
    "PotentialField",
    "Residual",
    "Result",
    "ScaleShift",
    "Shift",
    "Solve",
    "SolveError",
    "Squeeze",
    "Standardize",
    "Statistics",
    "Table",
    "ToyDensity",
    "Uniform",
    "UniformDequantiser",
    "Univariate",
    "VariationalDequantiser",
    "bijection_contract",
    "bits_per_dimension",
    "check",
    "cifar10",
    "device",
    "digits",
    "evaluate",
    "fashion_mnist",
    "ffjord",
    "fit",
    "flow_contract",
    "flowpp",
    "glow",
    "inspect",
    "load",
    "maf",
    "mask",
    "mnist",
    "nice",
    "optimal_pairing",
    "preset",
    "realnvp",
    "residual",
    "retrain",
    "save",
    "solver_error",
    "steps",
    "table",
    "toy_density",
    "trained",
    "uniform_grid",
]
