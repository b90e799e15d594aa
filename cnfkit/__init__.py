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
from cnfkit.flow import Flow
from cnfkit.losses import NegativeLogLikelihood, bits_per_dimension
from cnfkit.nets import MLP, ConvNet
from cnfkit.ode import Solve
from cnfkit.settings import device, retrain, steps
from cnfkit.training import History, fit
from cnfkit.zoo import trained

__version__ = "0.1.0"

__all__ = [
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
    "Flow",
    "History",
    "Images",
    "Inverse",
    "Logit",
    "Multiscale",
    "NegativeLogLikelihood",
    "Normal",
    "Result",
    "Solve",
    "Squeeze",
    "Standardize",
    "ToyDensity",
    "Uniform",
    "UniformDequantiser",
    "bijection_contract",
    "bits_per_dimension",
    "check",
    "device",
    "digits",
    "fit",
    "flow_contract",
    "load",
    "mask",
    "mnist",
    "retrain",
    "save",
    "steps",
    "toy_density",
    "trained",
]
