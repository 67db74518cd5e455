"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with zero padding: a Linear over patches.

Holder by holder: the kernels of one holder's convolution beat one grouped convolution for all
(measured on a CPU), and the patches of one holder, many times as large as its input, stay in the
cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from simulations.layers.base import Call, Record, Rule, Weights, gradient
from simulations.layers.linear import outer_square_norms

__all__ = ["ConvolutionRule"]


class ConvolutionRule(Rule):
    """A convolution of [H·B, channels, ...]."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, name)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self._kernel, self._stride = layer.kernel_size, layer.stride
        self._dilation, self._groups = layer.dilation, layer.groups
        self._padding = _padding(layer)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Only zeros as padding."""
        return super().fits(layer) and getattr(layer, "padding_mode", "zeros") == "zeros"

    def forward(
        self,
        weights: Weights,
        holders: int,
        record: Record,
        input: Tensor,
    ) -> Tensor:
        """One convolution for each holder."""
        # Padded once, so that what is saved is what the patches are cut from.
        padded = F.pad(input, self._padding) if any(self._padding) else input
        rows = padded.reshape(holders, padded.shape[0] // holders, *padded.shape[1:])
        output = torch.cat(
            [self._convolved(one, weights, holder) for holder, one in enumerate(rows.unbind())]
        )
        return record(output, {"input": rows.detach()})

    def square_norms(self, weights: Weights, calls: Sequence[Call]) -> Tensor:
        """As of a Linear for each group, whose sequence are the output's positions."""
        return torch.stack(
            [
                self._square_norms(
                    [call.saved["input"][holder] for call in calls],
                    [gradient(call)[holder] for call in calls],
                    bias="bias" in weights,
                )
                for holder in range(len(weights["weight"]))
            ]
        )

    def add_sums(
        self, weights: Weights, calls: Sequence[Call], factors: Tensor, into: Weights
    ) -> None:
        """An ordinary convolution's gradient, with the units' output gradients scaled."""
        for call in calls:
            grads = gradient(call)
            scaled = grads * factors.view(*factors.shape, *[1] * (grads.dim() - 2))
            for holder, (rows, one) in enumerate(
                zip(call.saved["input"].unbind(), scaled.unbind(), strict=True)
            ):
                self._add_sum(rows, one, weights, into, holder)

    # -- one holder --------------------------------------------------------------------------

    def _convolved(self, rows: Tensor, weights: Weights, holder: int) -> Tensor:
        bias = weights["bias"][holder] if "bias" in weights else None
        convolved: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self._kernel) - 1]
        output: Tensor = convolved(
            rows, weights["weight"][holder], bias, self._stride, 0, self._dilation, self._groups
        )
        return output

    def _square_norms(
        self, inputs: Sequence[Tensor], grads: Sequence[Tensor], *, bias: bool
    ) -> Tensor:
        """[B, C, ...], [B, out, ...] → [B]."""
        patches = torch.cat([self._patches(rows) for rows in inputs], dim=2)
        by_group = torch.cat(
            [
                grad.reshape(len(grad), self._groups, grad.shape[1] // self._groups, -1)
                for grad in grads
            ],
            dim=3,
        )
        return outer_square_norms(patches, by_group.permute(1, 0, 3, 2), bias=bias).sum(0)

    def _patches(self, rows: Tensor) -> Tensor:
        """What each output position sees: [B, C, ...] → [groups, B, positions, C/groups·kernel]."""
        spatial = len(self._kernel)
        for axis, (size, stride, dilation) in enumerate(
            zip(self._kernel, self._stride, self._dilation, strict=True), start=2
        ):
            rows = rows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        channels = rows.shape[1] // self._groups
        groups = rows.reshape(len(rows), self._groups, channels, *rows.shape[2:])
        positions = list(range(3, 3 + spatial))
        kernel = list(range(3 + spatial, 3 + 2 * spatial))
        # Positions last in memory: long runs to copy.
        ordered = groups.permute(1, 0, 2, *kernel, *positions)
        width = channels * math.prod(self._kernel)
        length = math.prod(rows.shape[2 : 2 + spatial])
        return ordered.reshape(self._groups, len(rows), width, length).transpose(2, 3)

    def _add_sum(
        self, rows: Tensor, grads: Tensor, weights: Weights, into: Weights, holder: int
    ) -> None:
        bias = "bias" in into
        weight = weights["weight"][holder]
        _, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grads,
            rows,
            weight,
            [len(weight)] if bias else None,
            self._stride,
            [0] * len(self._kernel),
            self._dilation,
            False,  # transposed
            [0] * len(self._kernel),
            self._groups,
            [False, True, bias],  # of the input, the weight and the bias
        )
        into["weight"][holder].add_(of_weight)
        if bias:
            into["bias"][holder].add_(of_bias)


def _padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """As ``F.pad`` wants it: before and after, last dimension first."""
    pads: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if isinstance(layer.padding, str):
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            total = reach if layer.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [layer.padding[axis]] * 2
    return pads
