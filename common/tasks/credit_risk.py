"""Credit risk: does a client default."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

from common.data.credit import (
    BILLS,
    PAYMENTS,
    STATES,
    GermanCredit,
    SyntheticCredit,
    UciDefault,
)
from common.data.encoding import category_codes
from common.data.schema import Schema
from common.errors import ConfigurationError
from common.tasks.tabular import BinaryTask, Tier, full_batch, settings_for

__all__ = ["CreditNet", "CreditRisk"]

Matrix = npt.NDArray[np.float64]


class CreditNet(nn.Module):
    """One hidden layer over numbers and embedded categories.

    Every category value has an embedding as wide as the hidden layer, and the hidden layer adds
    those of a row's values to the projection of its numbers: ``tanh(W·numbers + b + Σ e_k)``.
    The output layer starts at zero, so that every row starts at probability one half.

    Args:
        numbers: how many numeric inputs, N.
        values: how many category values, over all categories.
        hidden: width of the hidden layer.
    """

    def __init__(self, numbers: int, values: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Linear(numbers, hidden)
        self.embed = nn.Embedding(values, hidden)
        self.output = nn.Linear(hidden, 1)
        bound = 1 / math.sqrt(numbers + values)
        nn.init.uniform_(self.project.weight, -bound, bound)
        nn.init.uniform_(self.embed.weight, -bound, bound)
        nn.init.zeros_(self.project.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Logits, [B, 1].

        Args:
            numbers: [B, N] float32.
            categories: [B, K] int64, rows of the embedding table.
        """
        hidden = self.project(numbers) + self.embed(categories).sum(dim=1)
        logits: Tensor = self.output(torch.tanh(hidden))
        return logits


class CreditRisk(BinaryTask):
    """A small network on one client's record; the unit of privacy is the client."""

    name = "credit-risk"
    input_names = ("numbers", "categories")
    measures = ("auc", "ks", "brier", "accuracy", "recall", "f1")
    scalable = MappingProxyType({"numbers": 2.0})
    sources = MappingProxyType(
        {"synthetic": SyntheticCredit, "uci-default": UciDefault, "german": GermanCredit}
    )

    def __init__(self, source: str | None = None, preprocessing: str | None = None) -> None:
        name = source or next(iter(self.sources))
        if name not in self.sources or preprocessing not in (None, "default"):
            raise ConfigurationError(
                f"task {self.name!r} has no source {name!r} with preprocessing "
                f"{preprocessing!r}; it has {', '.join(self.sources)}, each with 'default'"
            )
        self.source = self.sources[name]()
        self.schema = self.source.schema
        self.preprocessing = "default"
        self._form = _FORMS[name]
        self.usual_ranges = self._form.usual_ranges

    def model(self, units: int) -> nn.Module:
        """A fresh :class:`CreditNet`."""
        del units
        values = sum(len(column.categories) for column in self.schema.of_kind("category"))
        return CreditNet(self._form.width, values, self._form.hidden)

    def inputs(self, table: pd.DataFrame) -> dict[str, Tensor]:
        """``numbers``: [N, D] float32; ``categories``: [N, K] int64."""
        return {
            "numbers": torch.from_numpy(self._form.numbers(table).astype(np.float32)),
            "categories": torch.from_numpy(_table_rows(table, self.schema)),
        }

    def recommended(self, epsilon: float | None) -> dict[str, object]:
        """Full-batch steps, one a round: 40 of them at ε=1, 100 from ε=5, 200 without privacy."""
        return settings_for(self._form.tiers, epsilon)

    def recommended_for_sum(self, epsilon: float) -> dict[str, object]:
        """More and larger steps than with noise at each holder."""
        return settings_for(self._form.sum_tiers, epsilon)


# --------------------------------------------------------------------------------- encoding


def _table_rows(table: pd.DataFrame, schema: Schema) -> npt.NDArray[np.int64]:
    """Each category's row in the one embedding table that all categories share: [N, K]."""
    rows, first = [], 0
    for column in schema.of_kind("category"):
        rows.append(first + category_codes(table[column.name], column))
        first += len(column.categories)
    return np.stack(rows, axis=1)


def _signed_log(money: Matrix, unit: float) -> Matrix:
    """Money on a scale where ten times as much is the same distance anywhere."""
    return np.sign(money) * np.log1p(np.abs(money) / unit)


def _card_numbers(table: pd.DataFrame) -> Matrix:
    """A card client's 26 numbers, about -1 to 1, scaled by constants only: [N, 26]."""
    limit, age = (table[[name]].to_numpy(dtype=float) for name in ("LIMIT_BAL", "AGE"))
    bills, payments = (table[list(names)].to_numpy(dtype=float) for names in (BILLS, PAYMENTS))
    states = table[list(STATES)].to_numpy(dtype=float)
    return np.hstack(
        [
            np.log(limit / 100_000) / 2,
            (age - 35) / 15,
            _signed_log(bills, 1_000) / 3 - 0.7,
            _signed_log(payments, 1_000) / 2 - 0.5,
            np.clip(bills / limit, -1, 2),
            np.clip(states, -1, 8) / 2,
        ]
    )


def _loan_numbers(table: pd.DataFrame) -> Matrix:
    """A loan's 7 numbers, about -1 to 1, scaled by constants only: [N, 7]."""
    return np.stack(
        [
            (table["duration"] - 24) / 24,
            np.log(table["amount"] / 2_500) / 1.5,
            (table["rate"] - 2.5) / 1.5,
            (table["residence"] - 2.5) / 1.5,
            (table["age"] - 40) / 20,
            (table["credits"] - 2) / 2,
            table["dependants"] - 1,
        ],
        axis=1,
    )


# --------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class _Form:
    """What distinguishes card clients from loans.

    Args:
        numbers: table → [N, width] numeric inputs.
        width: how many numeric inputs.
        hidden: width of the hidden layer.
        tiers: recommended settings.
        sum_tiers: the same where noise is in the sum of holders.
        usual_ranges: column → range in which statistics look.
    """

    numbers: Callable[[pd.DataFrame], Matrix]
    width: int
    hidden: int
    tiers: Sequence[Tier]
    sum_tiers: Sequence[Tier]
    usual_ranges: Mapping[str, tuple[float, float]]


_CARD_RANGES: Mapping[str, tuple[float, float]] = {
    "LIMIT_BAL": (0.0, 800_000.0),
    "AGE": (20.0, 80.0),
    **dict.fromkeys(BILLS, (0.0, 400_000.0)),
    **dict.fromkeys(PAYMENTS, (0.0, 40_000.0)),
}
"""New Taiwan dollars that most cards sold there allow, bill and get paid in a month, and years."""

_LOAN_RANGES: Mapping[str, tuple[float, float]] = {
    "duration": (0.0, 72.0),
    "amount": (0.0, 16_000.0),
    "age": (18.0, 80.0),
    "credits": (1.0, 5.0),
    "dependants": (0.0, 5.0),
}

_CARD_TIERS = (
    full_batch(math.inf, rounds=200, learning_rate=1.0),
    full_batch(5.0, rounds=100, learning_rate=1.0, clip_norm=3.0),
    full_batch(2.0, rounds=60, learning_rate=0.5, clip_norm=2.0),
    full_batch(0.0, rounds=40, learning_rate=0.5, clip_norm=1.5),
)
_CARD_SUM_TIERS = (
    full_batch(8.0, rounds=150, learning_rate=1.0, clip_norm=3.0),
    full_batch(3.0, rounds=100, learning_rate=1.0, clip_norm=3.0),
    full_batch(0.75, rounds=60, learning_rate=0.5, clip_norm=3.0),
    full_batch(0.4, rounds=60, learning_rate=0.5, clip_norm=1.5),
    full_batch(0.08, rounds=40, learning_rate=0.5, clip_norm=1.5),
    full_batch(0.0, rounds=40, learning_rate=0.5, clip_norm=0.5),
)
_LOAN_TIERS = (
    full_batch(math.inf, rounds=60, learning_rate=0.5),
    full_batch(5.0, rounds=60, learning_rate=0.25),
    full_batch(0.0, rounds=30, learning_rate=0.25),
)

_LOAN_SUM_TIERS = _LOAN_TIERS[1:]

_FORMS: Mapping[str, _Form] = MappingProxyType(
    {
        "synthetic": _Form(_card_numbers, 26, 16, _CARD_TIERS, _CARD_SUM_TIERS, _CARD_RANGES),
        "uci-default": _Form(_card_numbers, 26, 16, _CARD_TIERS, _CARD_SUM_TIERS, _CARD_RANGES),
        "german": _Form(_loan_numbers, 7, 8, _LOAN_TIERS, _LOAN_SUM_TIERS, _LOAN_RANGES),
    }
)
