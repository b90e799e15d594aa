"""Data: toy densities that are known exactly, and real images."""

from cnfkit.data.images import Images, digits, mnist
from cnfkit.data.toy import ToyDensity, toy_density

__all__ = ["Images", "ToyDensity", "digits", "mnist", "toy_density"]
