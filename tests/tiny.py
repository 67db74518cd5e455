"""A task small enough to reason about by hand, and holders of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from common.data.schema import Column, Schema
from common.tasks.base import Examples, HolderTables, Source, Task
from common.tasks.histograms import Estimate, Values, estimated, known

FEATURES = 3
SCHEMA = Schema(
    (
        *(Column(f"x{i}", "number", low=-10, high=10) for i in range(FEATURES)),
        Column("y", "label", categories=(0, 1)),
    )
)


def table(rows: int, seed: int = 0) -> pd.DataFrame:
    """Rows whose label is a noisy function of x0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, FEATURES))
    y = (x[:, 0] + 0.3 * rng.normal(size=rows) > 0).astype(int)
    return pd.DataFrame({**{f"x{i}": x[:, i] for i in range(FEATURES)}, "y": y})


class TinySource(Source):
    name = "tiny"
    schema = SCHEMA
    holder_size = 40
    delta = 1e-4

    def tables(self, holders: int | None = None, *, seed: int = 0) -> Mapping[str, pd.DataFrame]:
        return {f"h{i}": table(60, seed=100 * seed + i) for i in range(holders or 3)}


class TinyTask(Task):
    """Logistic regression on three numbers."""

    name = "tiny"
    unit = "record"
    headline = "accuracy"
    scalable: ClassVar[Mapping[str, float]] = {"x": 4.0}
    sources: ClassVar[Mapping[str, type[Source]]] = {"tiny": TinySource}

    def __init__(self, source: str | None = None, preprocessing: str | None = None) -> None:
        self.source = TinySource()
        self.schema = SCHEMA
        self.preprocessing = preprocessing or "default"

    def model(self, units: int) -> nn.Module:
        return nn.Linear(FEATURES, 1)

    def loss(self, model: nn.Module, batch: Examples) -> Tensor:
        logits = model(batch["x"]).squeeze(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["y"], reduction="none")

    def examples(self, table: pd.DataFrame) -> Examples:
        x = table[[f"x{i}" for i in range(FEATURES)]].to_numpy(np.float32)
        return Examples({"x": torch.tensor(x), "y": torch.tensor(table["y"].to_numpy(np.float32))})

    def predict(self, model: nn.Module, units: Examples) -> Tensor:
        return model(units["x"]).squeeze(-1)

    def metrics(self, predictions: Tensor, test: Examples) -> dict[str, float]:
        right = (predictions > 0) == (test["y"] > 0.5)
        return {"accuracy": float(right.float().mean())}

    def split(self, table: pd.DataFrame, *, holder: str, seed: int) -> HolderTables:
        return HolderTables(table.iloc[:40], table.iloc[40:])

    def recommended(self, epsilon: float | None) -> dict[str, object]:
        return {"rounds": 4, "learning_rate": 0.5}


class CountedTask(TinyTask):
    """The same with a histogram of two cells: wrong, right."""

    cells = 2

    def cells_of(self, predictions: Tensor, test: Examples) -> Tensor:
        return ((predictions > 0) == (test["y"] > 0.5)).long()

    def metrics_of(self, histogram: Values, variance: float) -> dict[str, Estimate]:
        def accuracy(histograms: Values) -> Values:
            return np.asarray(histograms[:, 1] / known(histograms.sum(1), 2 * variance))

        return {"accuracy": estimated(histogram, variance, accuracy)}
