"""Noise: from one generator for a whole batch, or from one for each point, whatever batch the point comes in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class PointNoise:
    """A generator for each point of a batch: its noise depends on a seed and on the point's number alone.

    It stands wherever a ``torch.Generator`` does in the calls that give likelihoods. So a bound is the same for every
    size of batch, and for every number of processes that share the points; and two models are compared under the same
    noise.

    Args:
        seed: of all of them.
        numbers: which points these are, one for each row of the batch.

    >>> some, one = PointNoise(0, [3, 4, 5]), PointNoise(0, [5])
    >>> Normal(2).sample(3, some)[2:].equal(Normal(2).sample(1, one))
    True
    """

    device = torch.device("cpu")

    def __init__(self, seed: int, numbers: Iterable[int]) -> None:
        self.generators = [seeded(seed, "point", number) for number in numbers]


Generator = torch.Generator | PointNoise


def seeded(seed: int, purpose: str, k: int) -> torch.Generator:
    """The generator of one purpose at one step: a function of its arguments alone, so nothing need be saved."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose} {k}".encode()))


def check_generator(generator: Generator | None) -> None:
    """Raise unless it is one, or none."""
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator is a {type(generator).__name__}; wanted a torch.Generator")


def fork(generator: Generator | None) -> Callable[[], Generator]:
    """What gives, as often as it is called, a generator of the same noise; of one for each point, one for each."""
    if isinstance(generator, PointNoise):
        forks = [fork(one) for one in generator.generators]

        def again() -> PointNoise:
            noise = PointNoise(0, ())
            noise.generators = [one() for one in forks]
            return noise

        return again
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(2**31, (), generator=generator, device=device))
    return lambda: torch.Generator(device).manual_seed(seed)


def draw(make: Callable[..., Tensor], shape: Iterable[int], generator: Generator | None, points: int = 0, **options):
    """Random numbers: from the generator, on its device; or from each point's own.

    Args:
        make: what draws them, such as ``torch.randn``; called with a shape, ``generator=`` and the options.
        shape: of all of them.
        generator: where they come from.
        points: the dimension of ``shape`` that counts the points.
        options: ``dtype``, and the ``device`` unless a generator has one.

    Raises:
        ValueError: if there is a generator for each point, but not as many as points.
    """
    shape = torch.Size(shape)
    if not isinstance(generator, PointNoise):
        device = {} if generator is None else {"device": generator.device}
        return make(shape, generator=generator, **options | device)
    if len(shape) <= points or shape[points] != len(generator.generators):
        wanted = shape[points] if len(shape) > points else "a single one, without a batch"
        raise ValueError(f"generator has noise for {len(generator.generators)} points; wanted it for {wanted}")
    of_one = shape[:points] + shape[points + 1 :]
    return torch.stack([draw(make, of_one, one, **options) for one in generator.generators], points)
