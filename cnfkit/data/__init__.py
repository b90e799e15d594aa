"""Data: toy densities that are known exactly, real images, and tables."""

from cnfkit.data.images import Images, cifar10, digits, fashion_mnist, mnist
from cnfkit.data.tables import TABLES as TABLES
from cnfkit.data.tables import Table, table
from cnfkit.data.toy import ToyDensity, toy_density

__all__ = ["Images", "Table", "ToyDensity", "cifar10", "digits", "fashion_mnist", "mnist", "table", "toy_density"]
