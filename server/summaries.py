"""What a round did, for tables, logs, checkpoints and ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from common.tasks.histograms import Estimate

__all__ = ["RoundSummary"]


@dataclass(frozen=True)
class RoundSummary:
    """What one round did.

    Args:
        round: 1-based.
        accepted: names of the holders whose updates count; one that sent two is there twice.
        missed: name → reason of those whose updates do not: they were away, silent, declined,
            failed, or sent what cannot count.
        seconds: wall time.
        metrics: name of holder → metrics, of holders that share them; after evaluation.
        evaluation: metrics of the held-out units of all holders together, with error bars, from
            their noised histograms; after an evaluation that has a price.
        lost: why the round gave nothing, where too few holders remained for a masked sum; the
            model is then that of the round before.
        missed_in_a_row: name → how many rounds up to this one a holder has missed, without one
            between them that it did not.
        phases: ``wait`` (for a quorum), ``exchange`` (asking), ``aggregate``, ``checkpoint`` and
            ``evaluate`` → wall seconds.
        staleness: for each of ``accepted``, how many models were made since the one that its update
            is of; empty where holders go in rounds.
    """

    round: int
    accepted: tuple[str, ...]
    missed: Mapping[str, str]
    seconds: float
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evaluation: Mapping[str, Estimate] = field(default_factory=dict)
    lost: str = ""
    missed_in_a_row: Mapping[str, int] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    staleness: tuple[int, ...] = ()

    def to_json(self, **more: str) -> str:
        """One line; figures that are no numbers become null.

        Args:
            more: fields that go before the summary's own.
        """
        return json.dumps(_without_nan({**more, **asdict(self)}))

    @classmethod
    def from_json(cls, line: str) -> RoundSummary:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: the line is not whole, or not one of ours.
        """
        values = json.loads(line)
        try:
            return cls._of(values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a summary of a round: {type(error).__name__}") from None

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> RoundSummary:
        evaluation, metrics = values["evaluation"], values["metrics"]
        return cls(
            int(values["round"]),
            tuple(values["accepted"]),
            values["missed"],
            values["seconds"],
            {name: _with_nan(figures) for name, figures in metrics.items()},
            {name: Estimate(**_with_nan(figures)) for name, figures in evaluation.items()},
            values["lost"],
            values["missed_in_a_row"],
            values["phases"],
            tuple(values["staleness"]),
        )


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _with_nan(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {key: math.nan if value is None else value for key, value in figures.items()}
