"""Bijections: maps with an inverse and a log-determinant."""

from cnfkit.bijections.affine import Affine, Diagonal, Standardize
from cnfkit.bijections.base import Bijection, Chain, Inverse, Result
from cnfkit.bijections.coupling import AdditiveCoupling, AffineCoupling
from cnfkit.bijections.elementwise import Arcsinh, Elementwise, Logit
from cnfkit.bijections.glow import ActNorm
from cnfkit.bijections.masks import mask
from cnfkit.bijections.shape import Multiscale, Squeeze

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Arcsinh",
    "Bijection",
    "Chain",
    "Diagonal",
    "Elementwise",
    "Inverse",
    "Logit",
    "Multiscale",
    "Result",
    "Squeeze",
    "Standardize",
    "mask",
]
