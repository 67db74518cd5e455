"""``nn.LayerNorm``, ``nn.RMSNorm`` and ``nn.GroupNorm`` with parameters of their own.

Their output is ``weight · n + bias`` of a normalised input n, so a unit's gradient is ``Σ g · n``
and ``Σ g`` over its positions: as small as the parameters, and taken directly.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from simulations.layers.base import Call, Record, Rule, Weights, gradient, square_lengths

__all__ = ["GroupNormRule", "LayerNormRule", "RMSNormRule"]


class _NormRule(Rule):
    """A normalisation of each unit by itself, then a scale and a shift."""

    @abstractmethod
    def _normalised(self, rows: Tensor) -> Tensor:
        """Without scale and shift."""

    @abstractmethod
    def _layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """How many positions come before the parameters' dimensions, parameters, positions after.

        Args:
            shape: of one unit.
        """

    def forward(
        self,
        weights: Weights,
        holders: int,
        record: Record,
        input: Tensor,
    ) -> Tensor:
        """``weight · n + bias``, each holder its own."""
        shape = holders, input.shape[0] // holders, *self._layout(input.shape[1:])
        normalised = self._normalised(input).reshape(shape)
        output = _scaled(normalised, weights.get("weight"), weights.get("bias"))
        return record(output.reshape(input.shape), {"normalised": normalised.detach()})

    def square_norms(self, weights: Weights, calls: Sequence[Call]) -> Tensor:
        """Of the gradients themselves."""
        return _total([square_lengths(g) for g in _unit_gradients(weights, calls).values()])

    def add_sums(
        self, weights: Weights, calls: Sequence[Call], factors: Tensor, into: Weights
    ) -> None:
        """Of the gradients themselves, one product for all holders."""
        for name, grads in _unit_gradients(weights, calls).items():
            sums = torch.bmm(factors.unsqueeze(1), grads).squeeze(1)
            into[name].add_(sums.view(into[name].shape))


def _scaled(normalised: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``weight · n + bias``, n being [H, B, T, P, S]."""
    if weight is None:
        return normalised if bias is None else normalised + _broadcast(bias)
    if bias is None:
        return normalised * _broadcast(weight)
    return torch.addcmul(_broadcast(bias), normalised, _broadcast(weight))


def _broadcast(parameter: Tensor) -> Tensor:
    """[H, *shape] as [H, 1, 1, P, 1]."""
    return parameter.reshape(len(parameter), 1, 1, parameter[0].numel(), 1)


def _unit_gradients(weights: Weights, calls: Sequence[Call]) -> dict[str, Tensor]:
    """Each parameter's, [H, B, P]; calls add up."""
    grads = [gradient(call).reshape(call.saved["normalised"].shape) for call in calls]
    found: dict[str, Tensor] = {}
    if "weight" in weights:
        found["weight"] = _total(
            [
                (grad * call.saved["normalised"]).sum((2, 4))
                for grad, call in zip(grads, calls, strict=True)
            ]
        )
    if "bias" in weights:
        found["bias"] = _total([grad.sum((2, 4)) for grad in grads])
    return found


def _total(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


class LayerNormRule(_NormRule):
    """``nn.LayerNorm`` of [H·B, ..., *normalized_shape]."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, name)
        assert isinstance(layer, nn.LayerNorm)
        self._shape, self._eps = list(layer.normalized_shape), layer.eps

    def _normalised(self, rows: Tensor) -> Tensor:
        return F.layer_norm(rows, self._shape, eps=self._eps)

    def _layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return math.prod(shape[: len(shape) - len(self._shape)]), math.prod(self._shape), 1


class RMSNormRule(_NormRule):
    """``nn.RMSNorm`` of [H·B, ..., *normalized_shape]."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, name)
        assert isinstance(layer, nn.RMSNorm)
        self._shape, self._eps = list(layer.normalized_shape), layer.eps

    def _normalised(self, rows: Tensor) -> Tensor:
        return F.rms_norm(rows, self._shape, eps=self._eps)

    def _layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return math.prod(shape[: len(shape) - len(self._shape)]), math.prod(self._shape), 1


class GroupNormRule(_NormRule):
    """``nn.GroupNorm`` of [H·B, channels, ...]."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, name)
        assert isinstance(layer, nn.GroupNorm)
        self._groups, self._eps = layer.num_groups, layer.eps

    def _normalised(self, rows: Tensor) -> Tensor:
        return F.group_norm(rows, self._groups, eps=self._eps)

    def _layout(self, shape: Sequence[int]) -> tuple[int, int, int]:
        return 1, shape[0], math.prod(shape[1:])
