"""``nn.Embedding``: rows gathered from, and added to, the tables of many holders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from common.errors import ConfigurationError
from simulations.layers.base import Call, Record, Rule, Weights, gradient, sequences, square_lengths

__all__ = ["EmbeddingRule", "distinct_square_norms", "gathered"]

_MARKS = 2**22
"""Entries of the table of marks (4 bytes each) that finds repeated indices."""

_SPARSE = 256
"""Rows of the embedding for each index of a unit from which sorting finds them faster."""


class EmbeddingRule(Rule):
    """``nn.Embedding`` on indices [H·B, ...]."""

    def __init__(self, layer: nn.Module, name: str) -> None:
        super().__init__(layer, name)
        assert isinstance(layer, nn.Embedding)
        for setting in ("max_norm", "scale_grad_by_freq"):
            if getattr(layer, setting):
                raise ConfigurationError(
                    f"layer {name!r} has {setting}={getattr(layer, setting)!r}, by which one unit "
                    "acts on another's gradient, so that its contribution cannot be bounded; "
                    "leave it out"
                )
        self._padding = layer.padding_idx

    def forward(
        self,
        weights: Weights,
        holders: int,
        record: Record,
        input: Tensor,
    ) -> Tensor:
        """The holder's own row for each index."""
        index = input.reshape(holders, input.shape[0] // holders, *input.shape[1:])
        return record(gathered(weights["weight"], index), {"index": sequences(index, 0)})

    def square_norms(self, weights: Weights, calls: Sequence[Call]) -> Tensor:
        """The squared norm of the sum of g over each index, added over the distinct ones."""
        index, grads = self._index_and_grads(calls)
        squares = distinct_square_norms(
            index.flatten(0, 1), grads.flatten(0, 1), weights["weight"].shape[1]
        )
        return squares.view(index.shape[:2])

    def add_sums(
        self, weights: Weights, calls: Sequence[Call], factors: Tensor, into: Weights
    ) -> None:
        """Adds f · g to the rows that occur; no other row is touched."""
        del weights
        index, grads = self._index_and_grads(calls)
        scaled = (grads * factors[..., None, None]).flatten(1, 2)
        rows, table = index.flatten(1), into["weight"]
        if table.device.type == "cpu":
            # In the order of the units whatever the number of threads, which index_put_ is not.
            table.scatter_add_(1, rows.unsqueeze(-1).expand_as(scaled), scaled)
        else:
            # Sorts, where scatter_add_ adds in the order in which threads arrive.
            holder = torch.arange(len(rows), device=rows.device).unsqueeze(1)
            table.index_put_((holder, rows), scaled, accumulate=True)

    def _index_and_grads(self, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
        """[H, B, T], [H, B, T, d], all calls one after the other; zero where padded."""
        indices = [call.saved["index"] for call in calls]
        each = [sequences(gradient(call), 1) for call in calls]
        index = indices[0] if len(calls) == 1 else torch.cat(indices, dim=2)
        grads = each[0] if len(calls) == 1 else torch.cat(each, dim=2)
        if self._padding is not None:
            grads = torch.where((index == self._padding).unsqueeze(-1), 0, grads)
        return index, grads


def gathered(tables: Tensor, index: Tensor) -> Tensor:
    """Rows of each holder's own table, which is not copied.

    Args:
        tables: [H, V, d], possibly strided between holders.
        index: [H, B, ...] integers from 0 to V - 1.

    Returns:
        [H·B, ..., d].
    """
    holders, size, width = tables.shape
    holder = torch.arange(holders, device=index.device).view(-1, *[1] * (index.dim() - 1))
    if tables.device.type != "cpu" or tables.stride()[1:] != (width, 1) or not index.numel():
        return tables[holder, index].flatten(0, 1)
    # One gather, five times as fast as indexing with (holder, index): "rows" that begin at every
    # number of the buffer, of which ours are some. An index too large would find another
    # parameter's numbers, so it is looked for here.
    least, most = (int(bound) for bound in torch.aminmax(index))
    if least < 0 or most >= size:
        raise IndexError(f"index {least if least < 0 else most} is not in a table of {size} rows")
    stride = tables.stride(0)
    numbers = (holders - 1) * stride + size * width
    windows = tables.as_strided((numbers - width + 1, width), (1, 1))
    return F.embedding((index * width + holder * stride).flatten(0, 1), windows)


def distinct_square_norms(index: Tensor, grads: Tensor, size: int) -> Tensor:
    """Σ over distinct indices i of |Σ_{t: index_t = i} g_t|², for each unit.

    Args:
        index: [R, T].
        grads: [R, T, d].
        size: V, more than any index.

    Returns:
        [R].
    """
    if index.shape[1] < 2:
        return square_lengths(grads).sum(1)
    units = max(1, _MARKS // size)
    parts = [
        _merged(rows, values, size).square_().sum((1, 2))
        for rows, values in zip(torch.split(index, units), torch.split(grads, units), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _merged(index: Tensor, grads: Tensor, size: int) -> Tensor:
    """Each unit's sum over an index where that index first occurs, and zero elsewhere: [R, T, d].

    Few indices occur twice, so only those are added up.
    """
    length = index.shape[1]
    first = _first_marked(index, size) if size <= _SPARSE * length else _first_sorted(index)
    again = (first != torch.arange(length, device=index.device)).flatten().nonzero().squeeze(1)
    merged = grads.flatten(0, 1).clone()
    where = again - again % length + first.flatten()[again]
    if merged.device.type == "cpu":
        merged.index_add_(0, where, merged[again])
    else:
        merged.index_put_((where,), merged[again], accumulate=True)
    return merged.index_fill_(0, again, 0).view_as(grads)


def _first_marked(index: Tensor, size: int) -> Tensor:
    """Where in its unit each index first occurs, by writing to a table: [R, T].

    Of the table nothing else is ever read, so it need not be initialised. Eight times as fast as
    sorting where the table is small, slower where it is mostly gaps.
    """
    units, length = index.shape
    position = torch.arange(length, dtype=torch.int32, device=index.device).expand(units, length)
    marks = position.new_empty((units, size))
    # The least position and not any: which one wins must not depend on the device's timing.
    marks.scatter_reduce_(1, index, position, "amin", include_self=False)
    return marks.gather(1, index)


def _first_sorted(index: Tensor) -> Tensor:
    """The same by sorting."""
    ordered, origin = index.sort(dim=1, stable=True)
    place = torch.arange(index.shape[1], device=index.device).expand_as(index)
    same = torch.zeros_like(ordered, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    start = place.masked_fill(same, 0).cummax(1).values
    return torch.empty_like(origin).scatter_(1, origin, origin.gather(1, start))
