"""What a stack makes of its holders' updates; whole runs are in ``test_sweep.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.plan import TrainingPlan
from common.settings import plan_for
from simulations.jobs import Assignment, Job, Outcome, Total
from simulations.lanes import _Gathered
from simulations.sums import ExactSum
from tests.tiny import FEATURES, TinyTask

SIZE = FEATURES + 1
HOLDERS = 3


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"no_dp": True, "rounds": 1, "min_holders": 2, **settings})


def job(wanted: TrainingPlan, *, individually: bool) -> Job:
    assignments = [Assignment(f"h{place}", "rows", wanted) for place in range(HOLDERS)]
    return Job(assignments, 1, torch.zeros(1, SIZE), individually=individually)


def total(*updates: Tensor) -> Total:
    found = Total(ExactSum(SIZE))
    for update in updates:
        found.add(update.double(), 1.0)
    return found


def gathered(asked: Job, outcome: Outcome) -> _Gathered:
    found = _Gathered(torch.zeros(1, SIZE))
    found.add(asked, outcome)
    return found


@pytest.mark.parametrize("size", [1.0, 1e9, float("nan")], ids=str)
def test_an_update_that_was_left_out_of_the_sum_does_not_count_as_accepted(size: float) -> None:
    """Two ways to take a norm may round apart at the very bound; one has decided."""
    wanted = plan(min_holders=3)
    aside = {2: torch.full((SIZE,), size)}
    outcome = Outcome({0: total(torch.ones(SIZE), torch.ones(SIZE))}, aside, {2: 1.0})
    found = gathered(job(wanted, individually=False), outcome)
    assert "2 of at least 3" in found.shortfall(0, wanted, 1)
    (reply,) = found.replies({0: wanted}, {}, linear=True)
    assert reply.update.tolist() == [1.0] * SIZE


def test_each_update_counts_where_each_was_wanted_unless_the_plan_forbids_it() -> None:
    wanted = plan()
    singles = {0: torch.ones(SIZE), 1: torch.full((SIZE,), 1e9), 2: 2 * torch.ones(SIZE)}
    outcome = Outcome(singles=singles, weights=dict.fromkeys(range(3), 1.0))
    found = gathered(job(wanted, individually=True), outcome)
    assert found.shortfall(0, wanted, 1) == ""
    replies = found.replies({0: wanted}, {}, linear=False)
    assert [float(reply.update[0]) for reply in replies] == [1.0, 2.0]


def test_who_failed_is_missing() -> None:
    wanted = plan()
    outcome = Outcome({0: total(torch.ones(SIZE))}, failed={0: "OSError", 1: "OSError"})
    found = gathered(job(wanted, individually=False), outcome)
    assert "1 of at least 2" in found.shortfall(0, wanted, 1)


def test_a_run_that_failed_stands_still_beside_those_that_go_on() -> None:
    found = _Gathered(torch.zeros(2, SIZE))
    wanted = plan(min_holders=1)
    assignments = [Assignment("h0", "rows", wanted, point) for point in (0, 1)]
    found.add(Job(assignments, 1, torch.zeros(2, SIZE)), Outcome({1: total(3 * torch.ones(SIZE))}))
    (reply,) = found.replies({0: wanted, 1: wanted}, {0: "why"}, linear=True)
    assert reply.update.tolist() == [0.0] * SIZE + [3.0] * SIZE
