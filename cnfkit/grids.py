"""Step times of a training: equal, jittered, or chosen by an error estimate and kept for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from cnfkit import distributed
from cnfkit.arguments import as_count
from cnfkit.dequantise import Dequantised
from cnfkit.flow import Flow
from cnfkit.ode.solve import Solve

Model = Flow | Dequantised


def uniform_grid(steps: int) -> tuple[float, ...]:
    """The times of equal steps, from 0 to 1.

    Args:
        steps: how many.

    Raises:
        ValueError: if it is no whole number of at least 1.

    >>> uniform_grid(4)
    (0.0, 0.25, 0.5, 0.75, 1.0)
    """
    steps = as_count("steps", steps)
    return tuple(k / steps for k in range(steps + 1))


class Grid(nn.Module, ABC):
    """Step times that change from batch to batch: called with a model and a batch, it gives the :class:`Solve`.

    Attributes:
        solve: its options; the times are those of a :class:`FrozenGrid`'s last batch, and equal ones before.
    """

    solve: Solve

    @abstractmethod
    def forward(
        self, model: Model, batch: Tensor, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> Solve:
        """The solve for a batch."""


class JitteredGrid(Grid):
    r"""Equal steps whose inner times are moved at random, anew for each batch.

    .. math:: t_k = \frac{k + \text{jitter} \cdot (u_k - \tfrac12)}{\text{steps}}, \qquad u_k \sim \mathrm U[0, 1)

    A field cannot be fitted to the gaps of a grid that it does not know.

    Args:
        steps: how many.
        jitter: the share of a step that a time is moved over, from 0 to less than 1.
        method: of the solve.
        options: further options of :class:`cnfkit.Solve`.

    Raises:
        ValueError: if a value is out of range.

    >>> JitteredGrid(2)(None, None, torch.Generator().manual_seed(0)).times
    (0.0, 0.4983154535293579, 1.0)
    """

    def __init__(self, steps: int, jitter: float = 0.9, method: str = "rk4_38", **options) -> None:
        super().__init__()
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is {jitter!r}; wanted a share in [0, 1)")
        self.steps, self.jitter = steps, jitter
        self.solve = Solve(method=method, times=uniform_grid(steps), **options)

    def forward(
        self, model: Model, batch: Tensor, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> Solve:
        device = None if generator is None else generator.device
        noise = torch.rand(self.steps - 1, generator=generator, device=device).cpu()
        inner = torch.arange(1, self.steps) + self.jitter * (noise - 0.5)
        return replace(self.solve, times=(0.0, *(inner / self.steps).tolist(), 1.0))

    def extra_repr(self) -> str:
        return f"jitter={self.jitter}, {self.solve}"


class FrozenGrid(Grid):
    """Step times that an adaptive solver chose, kept for some batches: a fixed grid with a guard.

    Every so often a few rows of the batch are solved adaptively, without gradients; its step times serve until the
    next time, when a field that has become too fast for them gets new ones. With several CNFs in the model, those of
    the one that took the most steps serve all. The times and the count are part of the ``state_dict``.

    Args:
        tolerance: of the adaptive solve.
        every: how many batches a grid serves.
        rows: how many points it is chosen on.
        method: of the solves on the grid; the usual one is of a higher order than that which chooses the times, and
            costs no more.
        options: further options of :class:`cnfkit.Solve`, for both.

    Raises:
        ValueError: if a value is out of range; on a call, if the model holds no CNF.
        SolveError: on a call, if the adaptive solve cannot be finished within 255 steps.

    >>> grid = FrozenGrid()
    >>> solve = grid(Flow(Normal(2), CNF(MLPField(2))), torch.randn(100, 2))
    >>> solve.method, solve.times[0], solve.times[-1]
    ('rk6', 0.0, 1.0)
    """

    LONGEST = 256

    def __init__(
        self, tolerance: float = 5e-4, every: int = 25, rows: int = 64, method: str = "rk6", **options
    ) -> None:
        super().__init__()
        choosing = {"max_steps": self.LONGEST - 1, "gradient": "backprop", "precision": "full"}
        self.every, self.rows = as_count("every", every), as_count("rows", rows)
        self.adaptive = Solve(tolerance=tolerance, **options | choosing)
        self.solve = Solve(method=method, times=uniform_grid(1), **options)
        self.served = 0

    def forward(
        self, model: Model, batch: Tensor, generator: torch.Generator | None = None, context: Tensor | None = None
    ) -> Solve:
        """The solve for a batch, on the grid that is kept, or on a new one."""
        if self.served % self.every == 0:
            with distributed.agreed():
                if distributed.rank() == 0:
                    self.solve = replace(self.solve, times=self.chosen(model, batch, generator, context))
            self.set_extra_state(distributed.from_first(self.get_extra_state()))
        self.served += 1
        return self.solve

    def chosen(self, model, batch, generator, context) -> tuple[float, ...]:
        """The times of the adaptive solve's steps, on a few rows."""
        adaptive = replace(self.adaptive, generator=generator)
        with torch.no_grad():
            given = None if context is None else context[: self.rows]
            _, result = model.log_prob_and_result(batch[: self.rows], given, adaptive)
        if not any(stats.times for stats in result.stats):
            raise ValueError("FrozenGrid: the model holds no CNF, and needs no grid")
        return max((stats.times for stats in result.stats), key=len)

    def extra_repr(self) -> str:
        return f"every={self.every}, rows={self.rows}, method={self.solve.method!r}, {self.adaptive}"

    def get_extra_state(self) -> Tensor:
        """The count and the times, in a tensor whose size does not change."""
        state = torch.zeros(1 + self.LONGEST, dtype=torch.float64)
        state[0], state[1 : 1 + len(self.solve.times)] = self.served, state.new_tensor(self.solve.times)
        return state

    def set_extra_state(self, state: Tensor) -> None:
        times = state[1:].tolist()
        self.served, self.solve = int(state[0]), replace(self.solve, times=tuple(times[: times.index(1.0) + 1]))
