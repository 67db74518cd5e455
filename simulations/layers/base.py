"""What a rule is, and what it is given."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Call", "Record", "Rule", "Weights", "gradient", "sequences", "square_lengths"]

Weights = Mapping[str, Tensor]
"""A layer's parameters by their name in the layer, each [H, *shape]."""


class Call:
    """One call of a layer in a step: what its gradients are made of.

    Args:
        saved: what the rule needs of the input, each [H, B, ...].
        about: anything else that the rule needs.
    """

    __slots__ = ("about", "grad", "saved")

    def __init__(self, saved: Mapping[str, Tensor], about: object = None) -> None:
        self.saved = dict(saved)
        self.about = about
        self.grad: Tensor | None = None
        """Of the output, [H, B, ...]; None until the backward pass, and if none reached it."""

    def keep(self, rows: Tensor) -> None:
        """Put zero wherever ``rows`` ([H, B] bool) is False: 0 · nan would be nan."""
        if self.grad is not None:
            self.grad = _kept(self.grad, rows)
        self.saved = {name: _kept(value, rows) for name, value in self.saved.items()}


def _kept(value: Tensor, rows: Tensor) -> Tensor:
    return torch.where(rows.view(*rows.shape, *[1] * (value.dim() - 2)), value, 0)


class Record(Protocol):
    """Notes a call; see :meth:`Rule.forward`."""

    def __call__(self, output: Tensor, saved: Mapping[str, Tensor], about: object = None) -> Tensor:
        """The output to pass on."""


class Rule(ABC):
    """What one layer does for H holders of B units each.

    Args:
        layer: the template, for its settings; its own parameters are never read.
        name: of the layer in the model, for messages.
    """

    def __init__(self, layer: nn.Module, name: str) -> None:
        self.layer = layer
        self.name = name

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Whether the rule holds for this layer's settings.

        Not where the parameters are others than the type's own: weight normalisation, for one,
        leaves the type and replaces ``weight``.
        """
        return {name for name, _ in layer.named_parameters()} <= {"weight", "bias"}

    @abstractmethod
    def forward(
        self, weights: Weights, holders: int, record: Record, *inputs: Any, **named: Any
    ) -> Any:
        """The layer's output, with rows as in the input.

        Gradients flow to the inputs and not to ``weights``.

        Args:
            weights: the layer's parameters.
            holders: H.
            record: to be called with each output, [H·B, ...], and what its gradients need,
                [H, B, ...]; returns the output to pass on.
            *inputs: as the layer is called, [H·B, ...].
            **named: the same, by keyword.
        """

    @abstractmethod
    def square_norms(self, weights: Weights, calls: Sequence[Call]) -> Tensor:
        """Squared L2 norm of each unit's gradient for all parameters of the layer: [H, B].

        Gradients of several calls add before the norm is taken.

        Args:
            weights: the layer's parameters.
            calls: of this step, at least one, each with its gradient.
        """

    @abstractmethod
    def add_sums(
        self, weights: Weights, calls: Sequence[Call], factors: Tensor, into: Weights
    ) -> None:
        """Add Σ_b factors[h, b] · gradient of unit b to ``into[name][h]``, for every parameter.

        Args:
            weights: the layer's parameters.
            calls: as for :meth:`square_norms`.
            factors: [H, B].
            into: as ``weights``, possibly strided; changed in place.
        """


def gradient(call: Call) -> Tensor:
    """Of the call's output, [H, B, ...]; calls without one are never handed to a rule."""
    assert call.grad is not None
    return call.grad


def square_lengths(rows: Tensor) -> Tensor:
    """|x|² along the last dimension."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=-1)  # one pass, where vecdot makes two
    return lengths.square()


def sequences(value: Tensor, trailing: int) -> Tensor:
    """[H, B, ..., *rest] as [H, B, T, *rest], where ``rest`` has ``trailing`` dimensions."""
    split = value.dim() - trailing
    # Not -1, which cannot be inferred where another dimension is empty.
    length = math.prod(value.shape[2:split])
    return value.reshape(*value.shape[:2], length, *value.shape[split:])
