"""A solve's evaluations, kept so that a backward pass written by hand goes through all of them in one node."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from cnfkit.ode.divergence import divergence_pulled
from cnfkit.ode.energies import PULLED, Visit
from cnfkit.ode.tangents import Memory, Rows, carry, pull

if TYPE_CHECKING:
    from cnfkit.ode.cnf import Dynamics
    from cnfkit.ode.fields import MLPMoment


class Arena(Memory):
    """Memory that one solve after another keeps its evaluations in.

    Fresh memory comes from the operating system page by page, at the first touch: on a CPU that took a fourth of a
    training iteration.
    """

    SPARE = 2**28  # bytes that the last solve had no use for, which are kept nevertheless

    def __init__(self) -> None:
        self.blocks: dict[tuple, list[Rows]] = {}
        self.used: Counter[tuple] = Counter()

    def kept(self, like: Tensor, shape: tuple[int, ...]) -> Rows:
        return self._block((shape, like.dtype), like)

    def scratch(self, which: int, like: Tensor, shape: tuple[int, ...]) -> Rows:
        key = shape, like.dtype, which
        self.used[key] = 0
        return self._block(key, like)

    def _block(self, key: tuple, like: Tensor) -> Rows:
        blocks, k = self.blocks.setdefault(key, []), self.used[key]
        if k == len(blocks):
            blocks.append(Rows(like.new_empty(key[0])))
        self.used[key] += 1
        return blocks[k]

    def reset(self) -> None:
        """Make all that was taken free, and let go what was not if it is much."""
        spare = [block.whole for key, blocks in self.blocks.items() for block in blocks[self.used[key] :]]
        if sum(block.nbytes for block in spare) > self.SPARE:
            self.blocks = {key: blocks[: self.used[key]] for key, blocks in self.blocks.items() if self.used[key]}
        self.used.clear()


# Of each field, that of its last solve, while no other solve has it. It goes when the field does.
_FREE: WeakKeyDictionary[nn.Module, Arena] = WeakKeyDictionary()


class Given:
    """A dynamics whose evaluations at the times of a grid are known."""

    def __init__(self, evaluations: list) -> None:
        self.evaluations = evaluations

    def at(self, times: Tensor) -> list:
        return self.evaluations


class Tape:
    """The dynamics of an :class:`cnfkit.MLPField` at the times of a grid, which keeps what it computes.

    Args:
        dynamics: the dynamics.
        moments: the field's at those times.

    Attributes:
        tensors: all that it depends on beside the points.
        plain: the same, for autograd.
        kept: of each evaluation so far.
    """

    def __init__(self, dynamics: Dynamics, moments: list[MLPMoment]) -> None:
        self.dynamics, self.moments, self.network = dynamics, moments, moments[0].network
        self.plain = Given(dynamics.evaluations(moments))
        self.carried = dynamics.carried()
        self.form = self.network.form() if self.carried == "trace" else None
        self.tensors = (*self.network.parts, *([] if self.form is None else [self.form]))
        self.kept: list[tuple] | None = []
        on_cpu = self.tensors[0].device.type == "cpu"  # elsewhere PyTorch keeps memory for the next who asks
        self.memory = (_FREE.pop(dynamics.field, None) or Arena()) if on_cpu else Memory()

    def at(self, times: Tensor) -> list:
        """The dynamics at the times of the grid, as functions of the state."""
        return [partial(self._evaluate, k) for k in range(len(times))]

    def _evaluate(self, k: int, z: Tensor, rated: bool = True) -> tuple[Tensor, Tensor | None]:
        moment, carried, form = self.moments[k], None, None
        if rated:
            carried, form = self.carried, None if self.form is None else moment.form()
        v, rows, *kept = carry(self.network.activation, moment.layers, z, carried, form, self.memory)
        if not rated:
            self.kept.append((None, carried, form, kept))
            return v, None
        divergences, rows = (rows[None], None) if carried == "trace" else (None, rows)
        visit = Visit(moment, z, v, rows, self.dynamics.probes)
        self.kept.append((visit, carried, form, kept))
        return v, self.dynamics.rates_at(visit, divergences)

    def zeros(self, wanted: tuple[bool, ...]) -> tuple[list[Tensor | None], list[tuple]]:
        """Room for the gradients in the tensors where they are wanted, and for each time its part of it."""
        sums = [torch.zeros_like(tensor) if w else None for tensor, w in zip(self.tensors, wanted, strict=True)]
        return sums, self.network.each(sums)

    def pull(self, k: int, sums: tuple, g_v: Tensor, g_rates: Tensor) -> Tensor:
        """The gradient in the points of an evaluation, from those in what it gave; those in the layers are added."""
        visit, carried, form, kept = self.kept[k]
        g_rows = None
        if visit is not None:
            traces = self.dynamics.traces
            if carried == "trace":
                g_rows = g_rates[0]
            elif carried is not None:
                g_rows = divergence_pulled(g_rates[:traces], visit.products, visit.probes)
            for name, g in zip(self.dynamics.solve.energies, g_rates[traces:], strict=True):
                g_v, g_rows = PULLED[name](visit, g / self.dynamics.dimensions, g_v, g_rows)
        activation, layers = self.network.activation, self.moments[k].layers
        return pull(activation, layers, carried, *kept, g_v, g_rows, sums, True, form, self.memory)

    def clear(self) -> None:
        """Forget what was kept; the memory is the next solve's."""
        self.kept = None
        if isinstance(self.memory, Arena):
            self.memory.reset()
            _FREE[self.dynamics.field] = self.memory
        self.memory = None
