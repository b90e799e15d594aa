"""Normalizing flows from the change of variables to FFJORD and RNODE: small, checked, and fast.

``z = f(x)`` everywhere: data to latent is forward, and every log-determinant is that of the direction that was gone.
"""

from cnfkit.bases import Base, Normal, Uniform
from cnfkit.bijections import (
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    Arcsinh,
    Bijection,
    Chain,
    Diagonal,
    Elementwise,
    Inverse,
    Logit,
    Multiscale,
    Result,
    Squeeze,
    Standardize,
    mask,
)
from cnfkit.checkpoint import CheckpointError, load, save
from cnfkit.checks import CheckFailed, check
from cnfkit.contract import bijection_contract, flow_contract
from cnfkit.data import Images, ToyDensity, digits, mnist, toy_density
from cnfkit.dequantise import Dequantised, UniformDequantiser
from cnfkit.evaluation import Evaluation, evaluate, solver_error
from cnfkit.flow import Flow
from cnfkit.grids import FrozenGrid, JitteredGrid, uniform_grid
from cnfkit.losses import NegativeLogLikelihood, bits_per_dimension
from cnfkit.nets import MLP, ConvNet
from cnfkit.ode.cnf import CNF
from cnfkit.ode.fields import MLPField
from cnfkit.ode.solve import Solve
from cnfkit.ode.statistics import SolveError, Statistics
from cnfkit.settings import device, retrain, steps
from cnfkit.training import History, fit
from cnfkit.zoo import trained

__version__ = "0.1.0"

__all__ = [
    "CNF",
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Arcsinh",
    "Base",
    "Bijection",
    "Chain",
    "CheckFailed",
    "CheckpointError",
    "ConvNet",
    "Dequantised",
    "Diagonal",
    "Elementwise",
    "Evaluation",
    "Flow",
    "FrozenGrid",
    "History",
    "Images",
    "Inverse",
    "JitteredGrid",
    "Logit",
    "MLPField",
    "Multiscale",
    "NegativeLogLikelihood",
    "Normal",
    "Result",
    "Solve",
    "SolveError",
    "Squeeze",
    "Standardize",
    "Statistics",
    "ToyDensity",
    "Uniform",
    "UniformDequantiser",
    "bijection_contract",
    "bits_per_dimension",
    "check",
    "device",
    "digits",
    "evaluate",
    "fit",
    "flow_contract",
    "load",
    "mask",
    "mnist",
    "retrain",
    "save",
    "solver_error",
    "steps",
    "toy_density",
    "trained",
    "uniform_grid",
]
