"""Local optimizers on stacked parameters [H, D], with each holder's own settings [H, 1].

The formulas are those of ``torch.optim.SGD`` and ``torch.optim.Adam`` with their defaults.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Adam", "Optimizer", "Sgd"]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Optimizer(Protocol):
    """Takes a step in place."""

    def step(self, parameters: Tensor, gradients: Tensor, active: Tensor | None) -> None:
        """One step.

        Args:
            parameters: [H, D]; changed in place.
            gradients: [H, D]; may be changed.
            active: whose step it is, [H, 1] bool; for others nothing changes. None for all.
        """
        ...


class Sgd:
    """Gradient descent, with momentum if there is any.

    Args:
        learning_rate: [H, 1].
        momentum: [H, 1], or None.
    """

    def __init__(self, learning_rate: Tensor, momentum: Tensor | None) -> None:
        self._rate, self._momentum = learning_rate, momentum
        self._velocity: Tensor | None = None

    def step(self, parameters: Tensor, gradients: Tensor, active: Tensor | None) -> None:
        """See :meth:`Optimizer.step`."""
        if self._momentum is not None:
            gradients = self._accelerated(self._momentum, gradients, active)
        rate = self._rate if active is None else torch.where(active, self._rate, 0.0)
        # Selected, not only multiplied: 0 · nan is nan.
        if active is not None:
            gradients = torch.where(active, gradients, 0.0)
        parameters.addcmul_(gradients, -rate)

    def _accelerated(self, momentum: Tensor, gradients: Tensor, active: Tensor | None) -> Tensor:
        if self._velocity is None:
            self._velocity = torch.zeros_like(gradients)
        velocity = self._velocity * momentum + gradients
        if active is not None:
            velocity = torch.where(active, velocity, self._velocity)
        self._velocity = velocity
        return velocity


class Adam:
    """Kingma & Ba 2015, algorithm 1.

    Args:
        learning_rate: [H, 1].
    """

    def __init__(self, learning_rate: Tensor) -> None:
        self._rate = learning_rate
        self._steps = torch.zeros_like(learning_rate, dtype=torch.float64)
        self._first: Tensor | None = None
        self._second: Tensor | None = None

    def step(self, parameters: Tensor, gradients: Tensor, active: Tensor | None) -> None:
        """See :meth:`Optimizer.step`."""
        if self._first is None or self._second is None:
            self._first, self._second = torch.zeros_like(gradients), torch.zeros_like(gradients)
        first = torch.lerp(self._first, gradients, 1 - BETA1)
        second = torch.addcmul(self._second * BETA2, gradients, gradients, value=1 - BETA2)
        steps = self._steps + 1
        rate = (self._rate / (1 - BETA1**steps)).to(gradients.dtype)
        root = (1 - BETA2**steps).sqrt().to(gradients.dtype)
        moved = rate * first / (second.sqrt() / root + EPSILON)
        if active is None:
            self._first, self._second, self._steps = first, second, steps
        else:
            self._first = torch.where(active, first, self._first)
            self._second = torch.where(active, second, self._second)
            self._steps = torch.where(active, steps, self._steps)
            moved = torch.where(active, moved, 0.0)
        parameters.sub_(moved)
