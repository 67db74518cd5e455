"""Medical diagnosis: is a breast mass malignant, is a coronary vessel narrowed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor, nn

from common.data.encoding import Encoder
from common.data.medical import (
    CELL_RANGES,
    CLINICAL_RANGES,
    NOT_MEASURED,
    BreastCancer,
    HeartDisease,
)
from common.errors import ConfigurationError
from common.tasks.base import Examples, HolderData, HolderTables
from common.tasks.tabular import BinaryTask, Tier, full_batch, linear_model, settings_for

__all__ = ["MedicalDiagnosis"]

_TIERS: Mapping[tuple[str, str], Sequence[Tier]] = {
    ("breast-cancer", "default"): (
        full_batch(math.inf, rounds=100, learning_rate=1.0),
        full_batch(5.0, rounds=60, learning_rate=0.6),
        full_batch(2.0, rounds=40, learning_rate=0.6),
        full_batch(0.0, rounds=20, learning_rate=0.3),
    ),
    ("heart-disease", "public"): (
        full_batch(math.inf, rounds=100, learning_rate=0.3),
        full_batch(0.5, rounds=20, learning_rate=0.3, clip_norm=0.5),
        full_batch(0.0, rounds=10, learning_rate=0.3, clip_norm=0.5),
    ),
    ("heart-disease", "flamby"): (
        full_batch(math.inf, rounds=15, learning_rate=0.1),
        full_batch(0.0, rounds=15, learning_rate=0.1),
    ),
    ("heart-disease", "full"): (
        full_batch(math.inf, rounds=50, learning_rate=0.3),
        full_batch(3.0, rounds=30, learning_rate=0.3, clip_norm=0.5),
        full_batch(0.0, rounds=20, learning_rate=0.3, clip_norm=0.5),
    ),
}

_SUM_TIERS: Mapping[tuple[str, str], Sequence[Tier]] = {
    ("heart-disease", "public"): (
        full_batch(0.25, rounds=50, learning_rate=1.0, clip_norm=0.25, momentum=0.0),
        full_batch(0.0, rounds=20, learning_rate=1.0, clip_norm=0.5, momentum=0.0),
    ),
}
"""Where noise is in the sum of holders; others train as :data:`_TIERS` says."""


class MedicalDiagnosis(BinaryTask):
    """Logistic regression on one patient's measurements; the unit of privacy is the patient.

    Preparations of ``heart-disease``:

    - ``public`` (default): 740 complete patients, 13 inputs scaled by clinical ranges. A zero
      pressure or cholesterol means "not measured" and is put in the middle of its range.
    - ``flamby``: the same patients, inputs and splits, but each hospital scales by its own
      training rows' mean and standard deviation, as the FLamby benchmark does. Those figures
      stay at the hospital, yet they depend on its rows outside the account: see ``caveat``.
    - ``full``: all 920 patients, 13 columns, an input for each empty cell.
    """

    name = "medical-diagnosis"
    measures = ("accuracy", "auc", "f1", "recall", "brier")
    scalable = MappingProxyType({"features": 1.0})
    sources = MappingProxyType({"breast-cancer": BreastCancer, "heart-disease": HeartDisease})
    preprocessings: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"heart-disease": ("public", "flamby", "full")}
    )

    def __init__(self, source: str | None = None, preprocessing: str | None = None) -> None:
        name = source or next(iter(self.sources))
        offered = self.preprocessings.get(name, ("default",))
        self.preprocessing = preprocessing or offered[0]
        if name not in self.sources or self.preprocessing not in offered:
            raise ConfigurationError(
                f"task {self.name!r} has no source {name!r} with preprocessing "
                f"{self.preprocessing!r}; it has {self._choices()}"
            )
        if name == "breast-cancer":
            self.source = BreastCancer()
            self.held_out = 0.25
        else:
            self.source = HeartDisease(every_row=self.preprocessing == "full")
            self.held_out = 0.34
        self.schema = self.source.schema
        self.usual_ranges = CELL_RANGES if name == "breast-cancer" else CLINICAL_RANGES
        self._encoder = self._make_encoder()
        if self.preprocessing == "flamby":
            self.caveat = _FLAMBY_CAVEAT

    def model(self, units: int) -> nn.Module:
        """Logistic regression from zero: 31 parameters for breast-cancer, 14 for heart-disease."""
        del units
        return linear_model(self._encoder.width)

    def inputs(self, table: pd.DataFrame) -> dict[str, Tensor]:
        """``features``: [N, D] float32, about -1 to 1."""
        return {"features": torch.from_numpy(self._encoder.features(table))}

    def prepare(self, tables: HolderTables) -> HolderData:
        """Encode both halves; ``flamby`` scales both by the training half's own figures."""
        data = super().prepare(tables)
        return _standardised(data) if self.preprocessing == "flamby" else data

    def measured(self, table: pd.DataFrame) -> pd.DataFrame:
        """A pressure or cholesterol of zero was not measured."""
        columns = [name for name in table if name in NOT_MEASURED]
        return table.assign(**{name: table[name].where(table[name] != 0) for name in columns})

    def recommended(self, epsilon: float | None) -> dict[str, object]:
        """Few full-batch steps with privacy, more without."""
        return settings_for(_TIERS[self.source.name, self.preprocessing], epsilon)

    def recommended_for_sum(self, epsilon: float) -> dict[str, object]:
        """More steps, each with less noise than a hospital alone would need."""
        key = (self.source.name, self.preprocessing)
        tiers = _SUM_TIERS.get(key)
        return settings_for(tiers, epsilon) if tiers else super().recommended_for_sum(epsilon)

    def _make_encoder(self) -> Encoder:
        if self.source.name == "breast-cancer":
            return Encoder(self.schema, CELL_RANGES)
        unmeasured = NOT_MEASURED if self.preprocessing != "flamby" else frozenset()
        return Encoder(self.schema, CLINICAL_RANGES, unmeasured)

    def _choices(self) -> str:
        return "; ".join(
            f"{name} ({', '.join(self.preprocessings.get(name, ('default',)))})"
            for name in self.sources
        )


_FLAMBY_CAVEAT = (
    "The flamby preparation scales each hospital's inputs by its own means and standard "
    "deviations, which depend on its patients and are not covered by ε."
)


def _standardised(data: HolderData) -> HolderData:
    """Both halves shifted and scaled by the training half's mean and standard deviation.

    An input that never varies in the training half becomes 0 there.
    """
    train = data.train["features"]
    mean, spread = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = torch.where(spread > 1e-6, spread, torch.ones_like(spread))

    def scaled(half: Examples) -> Examples:
        return Examples({**half.tensors, "features": (half["features"] - mean) / scale})

    return HolderData(train=scaled(data.train), test=scaled(data.test))
