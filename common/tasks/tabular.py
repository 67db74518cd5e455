"""What the two tasks that classify the rows of a table have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from common.data.encoding import label_codes
from common.data.holders import random_split, stratified_split
from common.errors import ConfigurationError
from common.tasks.base import Examples, HolderTables, Task, generator
from common.tasks.histograms import Estimate, Values
from common.tasks.metrics import classification_metrics, classification_metrics_by_holder
from common.tasks.score_histogram import CELLS, score_cells, score_estimates

__all__ = ["BinaryTask", "Tier", "full_batch", "linear_model", "settings_for"]


class BinaryTask(Task):
    """A binary label on each row of a table; the unit of privacy is the row.

    Subclasses encode rows (:meth:`inputs`) and give the network. It is called with the tensors
    of :attr:`input_names`, in that order, and returns logits, [B, 1].
    """

    unit = "record"
    headline = "auc"
    input_names: ClassVar[tuple[str, ...]] = ("features",)
    measures: ClassVar[tuple[str, ...]]
    """Which of :data:`common.tasks.metrics.METRICS` it reports."""
    cells = CELLS
    held_out: float = 0.2
    """Share of each holder's rows that is held out (rounded up)."""

    @abstractmethod
    def inputs(self, table: pd.DataFrame) -> dict[str, Tensor]:
        """The tensors of :attr:`input_names`, [N, …] each."""

    def examples(self, table: pd.DataFrame) -> Examples:
        """Inputs, and ``label``: [N] float32 of 0 and 1."""
        label = torch.from_numpy(label_codes(table, self.schema))
        return Examples({**self.inputs(table), "label": label})

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        """Cross-entropy of each row: [B] float32."""
        return binary_cross_entropy_with_logits(
            self._logits(model, batch), batch["label"], reduction="none"
        )

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        """Probability of label 1 for each row: [B] float64."""
        return torch.sigmoid(self._logits(model, units).double())

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        """The metrics named in :attr:`measures`."""
        return classification_metrics(
            test["label"].cpu().numpy(), predictions.cpu().numpy(), self.measures
        )

    def metrics_by_holder(
        self, predictions: Tensor, test: Examples, sizes: Sequence[int]
    ) -> list[dict[str, float]]:
        """The same of every holder, computed for all of them at once."""
        values = classification_metrics_by_holder(
            test["label"].cpu().numpy(), predictions.cpu().numpy(), sizes, self.measures
        )
        rows = zip(*(values[name].tolist() for name in self.measures), strict=True)
        return [dict(zip(self.measures, row, strict=True)) for row in rows]

    def cells_of(self, predictions: Tensor, test: Examples) -> Tensor:
        """By probability and label: see :mod:`common.tasks.score_histogram`."""
        return score_cells(predictions, test["label"])

    def metrics_of(self, histogram: Values, variance: float) -> dict[str, Estimate]:
        """The metrics named in :attr:`measures`, and how well probabilities are calibrated."""
        return score_estimates(histogram, variance, (*self.measures, "calibration"))

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        """Hold out a share of the rows, each label in proportion.

        Where a label has a single row there is nothing to stratify, and rows are drawn without
        looking at labels.
        """
        codes = label_codes(table, self.schema)
        rng = generator(self.name, "split", holder, seed)
        count = math.ceil(self.held_out * len(table) - 1e-9)
        if min((codes == value).sum() for value in (0.0, 1.0)) < 2:
            train, test = random_split(len(table), count, rng)
        else:
            train, test = stratified_split(codes, count, rng)
        return HolderTables(
            train=table.iloc[train].reset_index(drop=True),
            test=table.iloc[test].reset_index(drop=True),
        )

    def _logits(self, model: nn.Module, batch: Examples) -> Tensor:
        logits: Tensor = model(*(batch[name] for name in self.input_names))
        return logits.squeeze(-1)


def linear_model(inputs: int) -> nn.Linear:
    """Logistic regression that starts at zero: every row at probability one half.

    Starting there makes the first clipped gradients alike in size and the run independent of
    the initial draw.
    """
    model = nn.Linear(inputs, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


@dataclass(frozen=True)
class Tier:
    """Plan settings that suit every privacy target from ``epsilon`` up to the next tier.

    Args:
        epsilon: smallest ε it is for; infinity for training without privacy.
        settings: keys of the plan's TOML.
    """

    epsilon: float
    settings: dict[str, object]


def full_batch(
    epsilon: float,
    *,
    rounds: int,
    learning_rate: float,
    clip_norm: float = 1.0,
    momentum: float = 0.9,
) -> Tier:
    """A tier in which every round is one step on all rows, its momentum kept by the coordinator.

    With noise, a few large steps lose least; what a holder adds to one is one clipped sum.

    Args:
        epsilon: as in :class:`Tier`.
        rounds: how many steps; the model is the mean over the second half of them.
        learning_rate: of each step.
        clip_norm: of each row's gradient.
        momentum: of the coordinator; 0 for none.
    """
    strategy = {
        "strategy": "fedavgm",
        "server_learning_rate": 1.0,
        "server_momentum": momentum,
    }
    return Tier(
        epsilon,
        {
            "rounds": rounds,
            "local_steps": 1,
            "batch_size": "full",
            "optimizer": "sgd",
            "learning_rate": learning_rate,
            "momentum": 0.0,
            "clip_norm": clip_norm,
            **(strategy if momentum else {"strategy": "fedavg"}),
            "average_from": 0.5,
            "weighting": "equal",
        },
    )


def settings_for(tiers: Sequence[Tier], epsilon: float | None) -> dict[str, object]:
    """The settings of the highest tier that ``epsilon`` reaches, or of the lowest tier.

    Raises:
        ConfigurationError: ε is not positive.
    """
    target = math.inf if epsilon is None else epsilon
    if not target > 0:
        raise ConfigurationError(f"epsilon must be positive, got {epsilon}")
    reached = [tier for tier in tiers if tier.epsilon <= target]
    lowest = min(tiers, key=lambda tier: tier.epsilon)
    chosen = max(reached, key=lambda tier: tier.epsilon, default=lowest)
    return dict(chosen.settings)
