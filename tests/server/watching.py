"""What the tests of status and metrics share: a Grid that is only looked at."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.link.traffic import Traffic
from common.plan import TrainingPlan
from common.settings import plan_for
from server.link.mailroom import Errand
from server.link.sessions import Holder
from server.status import Watch
from server.summaries import RoundSummary
from tests.tiny import TinyTask


@dataclass
class Looked:
    """Says what it is told to say."""

    holders: list[Holder] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    errands: dict[str, Errand] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    draining: bool = False

    def join(self, *names: str) -> None:
        self.holders += [Holder(len(name), name, "tiny", "sotto", "10.0.0.1") for name in names]

    def leave(self, name: str, moment: float) -> None:
        self.holders = [holder for holder in self.holders if holder.name != name]
        self.left[name] = moment


def plan(rounds: int = 4, min_holders: int = 2) -> TrainingPlan:
    return plan_for(TinyTask(), {"rounds": rounds, "min_holders": min_holders, "epsilon": 2.0})


def watch(grid: Looked, **more: object) -> Watch:
    return Watch(grid, plan(), "run-1", "127.0.0.1:7443", **more)  # type: ignore[arg-type]


def summary(number: int, *accepted: str, **missed: str) -> RoundSummary:
    return RoundSummary(
        number,
        accepted,
        missed,
        0.5,
        missed_in_a_row=dict.fromkeys(missed, number),
        phases={"exchange": 0.4, "aggregate": 0.1},
    )
