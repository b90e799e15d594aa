"""What training minimises, and the units that it is reported in."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from cnfkit.dequantise import Dequantised
from cnfkit.flow import Flow


class Loss(Protocol):
    """A module that owns the model and returns a batch's loss and the terms that it is made of."""

    def __call__(self, batch: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]: ...


class NegativeLogLikelihood(nn.Module):
    r"""The mean negative log-likelihood of a batch, in nats or in bits per dimension.

    .. math:: L = -\frac1n \sum_i \log p(x_i), \qquad L_\text{bits} = \frac{L}{d \log 2}

    Args:
        model: a :class:`cnfkit.Flow`, or a :class:`cnfkit.Dequantised` for discrete data (then the loss is a bound).
        unit: ``"nats"`` or ``"bits"`` (per dimension).

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: if the unit is unknown.

    >>> loss, terms = NegativeLogLikelihood(Flow(Uniform(2), Diagonal(2, log_scale=-1.0)))(torch.full((4, 2), 0.5))
    >>> loss.item(), list(terms)
    (2.0, ['nll'])
    """

    def __init__(self, model: Flow | Dequantised, unit: str = "nats") -> None:
        super().__init__()
        if not isinstance(model, Flow | Dequantised):
            raise TypeError(f"model is a {type(model).__name__}; wanted a Flow or a Dequantised")
        if unit not in ("nats", "bits"):
            raise ValueError(f"unit is {unit!r}; wanted 'nats' or 'bits'")
        self.model = model
        self.unit = unit

    def forward(self, batch: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar with gradients, and its terms by name, without.

        Args:
            batch: points, shape ``(n, *event_shape)``.
            generator: where noise comes from, for models that draw any.
        """
        noise = {"generator": generator} if isinstance(self.model, Dequantised) else {}
        log_prob = self.model.log_prob(batch, **noise)
        if self.unit == "bits":
            loss = bits_per_dimension(log_prob, self.model.event_shape.numel()).mean()
        else:
            loss = -log_prob.mean()
        return loss, {"nll": loss.detach()}


def bits_per_dimension(log_prob: Tensor, dimensions: int) -> Tensor:
    r"""The code length per coordinate.

    .. math:: -\frac{\log P(k)}{d \log 2}

    Args:
        log_prob: log-probabilities of *discrete* points, in nats, any shape.
        dimensions: :math:`d`, coordinates per point.

    Returns:
        The same shape.

    Raises:
        ValueError: if ``dimensions`` is less than 1.

    >>> bits_per_dimension(torch.tensor(-64 * math.log(256.0)), 64)  # uniform noise of 256 levels
    tensor(8.)
    """
    if dimensions < 1:
        raise ValueError(f"dimensions is {dimensions}; wanted at least 1")
    return -log_prob / (dimensions * math.log(2))
