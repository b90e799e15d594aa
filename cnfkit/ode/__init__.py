"""The continuous side: how an ODE is solved."""

from cnfkit.ode.solve import Solve

__all__ = ["Solve"]
