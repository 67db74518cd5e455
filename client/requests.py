"""What is asked of a holder, as far as its policy looks at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from common.aggregation import SecureSum
from common.guarantees import DistributedPrivacy, Privacy
from common.plan import TrainingPlan
from common.privacy.events import Composition
from common.statistics_plan import StatisticsPlan

__all__ = ["Level", "Planned", "Request", "Terms"]

Level = Literal["plain", "secure", "secure-sum"]
"""What the coordinator gets to see of an update (:mod:`common.aggregation`)."""


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
        private: whether everything that would leave is noised and priced, with noise of this
            holder's own or, under ``secure-sum``, of the sum's.
        unit: whose privacy is counted; None where nothing is private.
        delta: the largest δ of any of its parts; None where nothing is private.
        noise_multiplier: the least σ of any of its parts, which under ``secure-sum`` is that of
            the sum; None where one has none.
        clip_norm: C of one unit's gradient.
        min_holders: the fewest holders that take part, or that a masked sum is of.
        holder_size: nominal number of units of one holder.
        aggregation: the level: what the coordinator gets to see of an update.
        coalition: how many holders may help the coordinator, and ε still holds; None where ε does
            not rest on other holders.
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
    aggregation: Level | None = None
    coalition: int | None = None
    evaluation: str | None = None
    statistics: bool = False

    @classmethod
    def of_plan(cls, plan: TrainingPlan) -> Terms:
        """The terms of a training plan.

        Only ``dp``, and ``distributed`` noise where the coordinator gets nothing but the sum that
        carries it, protect what leaves a holder. Every other kind of privacy, one that trusts the
        coordinator with exact updates included, counts as none.
        """
        dp, aggregation = _privacy_of_updates(plan), plan.aggregation
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
            aggregation=aggregation.kind,
            coalition=aggregation.coalition if isinstance(aggregation, SecureSum) else None,
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


def _privacy_of_updates(plan: TrainingPlan) -> Privacy | DistributedPrivacy | None:
    """What protects a holder's updates from the coordinator; None if nothing does."""
    if plan.privacy.kind == "dp":
        return plan.privacy
    # No valid plan has one without the other; a share of the noise by itself protects nobody.
    if plan.privacy.kind == "distributed" and isinstance(plan.aggregation, SecureSum):
        return plan.privacy
    return None
