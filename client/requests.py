"""What is asked of a holder, as far as its policy looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from common.plan import TrainingPlan
from common.privacy.events import Composition
from common.statistics_plan import StatisticsPlan

__all__ = ["Planned", "Request", "Terms"]


class Planned(Protocol):
    """What the account needs to know of a plan, whatever is planned."""

    @property
    def digest(self) -> str:
        """Names the plan."""
        ...

    @property
    def seed(self) -> int:
        """Of a simulation."""
        ...

    def composition(self) -> Composition:
        """Everything that one holder releases in the whole run."""
        ...


class Request(Protocol):
    """What every kind of request has."""

    @property
    def run_id(self) -> str:
        """Names the run."""
        ...

    @property
    def round(self) -> int:
        """Within the run, from 1."""
        ...

    @property
    def plan(self) -> Planned:
        """Of the run."""
        ...


@dataclass(frozen=True)
class Terms:
    """The terms of a request: of a whole training plan, or of a request for statistics.

    A holder judges all kinds of requests by the same rules, so what a rule looks at is here, in
    one form. What a kind of request does not have is None, and its rule is silent.

    Args:
        what: names the request in sentences: ``"plan"`` or ``"request"``.
        task: what it is about.
        source: whose schema it uses.
        preprocessing: the preparation of that source.
        private: whether everything that would leave is noised and priced.
        unit: whose privacy is counted; None where nothing is private.
        delta: the largest δ of any of its parts; None where nothing is private.
        noise_multiplier: the least σ of any of its parts; None where one has none.
        clip_norm: C of one unit's gradient.
        min_holders: the fewest holders that take part.
        holder_size: nominal number of units of one holder.
        aggregation: what the coordinator gets to see.
        evaluation: ``"local"`` or ``"histogram"``.
        statistics: whether figures of the data themselves would leave.
    """

    what: str
    task: str
    source: str
    preprocessing: str
    min_holders: int
    private: bool = True
    unit: str | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    holder_size: int | None = None
    aggregation: str = "plain"
    evaluation: str | None = None
    statistics: bool = False

    @classmethod
    def of_plan(cls, plan: TrainingPlan) -> Terms:
        """The terms of a training plan.

        Only ``dp`` protects what leaves a holder. Every other kind of privacy, one that trusts the
        coordinator with exact updates included, counts as none.
        """
        dp = plan.privacy if plan.privacy.kind == "dp" else None
        histogram = plan.evaluation if plan.evaluation.kind == "histogram" else None
        parts = [part for part in (dp, histogram) if part is not None]
        known = [part.noise_multiplier for part in parts if part.noise_multiplier is not None]
        return cls(
            what="plan",
            task=plan.task,
            source=plan.source,
            preprocessing=plan.preprocessing,
            min_holders=plan.min_holders,
            private=dp is not None,
            unit=dp.unit if dp else None,
            delta=max((part.delta for part in parts), default=None),
            noise_multiplier=min(known) if known and len(known) == len(parts) else None,
            clip_norm=dp.clip_norm if dp else None,
            holder_size=plan.holder_size,
            aggregation=plan.aggregation,
            evaluation=plan.evaluation.kind,
        )

    @classmethod
    def of_statistics(cls, plan: StatisticsPlan) -> Terms:
        """The terms of a plan for statistics, whose every answer is noised."""
        return cls(
            what="request",
            task=plan.task,
            source=plan.source,
            preprocessing=plan.preprocessing,
            min_holders=plan.min_holders,
            unit=plan.unit,
            delta=plan.delta,
            noise_multiplier=plan.noise_multiplier,
            statistics=True,
        )
