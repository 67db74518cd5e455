"""Every honest message fits the limits, and little more does."""

from __future__ import annotations

import numpy as np

from common.limits import largest_reply, largest_request, largest_statistics
from common.link.codec import encode
from common.privacy.statistics import Layout
from common.settings import plan_for
from common.statistics_plan import CategoryQuestion, NumberQuestion, StatisticsPlan
from common.tasks.parameters import dimension_of
from common.wire import EvaluateReply, RoundRequest, StatisticsReply, TrainReply
from tests.tiny import CountedTask, TinyTask

ROOM = 2**20


def test_requests_and_replies_of_a_run_fit() -> None:
    task = CountedTask()
    plan = plan_for(task, {"epsilon": 5.0, "evaluation_epsilon": 1.0})
    vector = np.ones(dimension_of(task), np.float32)
    histogram = np.arange(task.cells)

    reply, request = largest_reply(plan, task), largest_request(task)

    assert encode(TrainReply(vector, 1.0).records()).size <= reply
    assert encode(EvaluateReply({"x" * 50: 1.0}, histogram).records()).size <= reply
    assert encode(RoundRequest("r" * 100, 1, plan, vector).records()).size <= request
    assert reply < ROOM


def test_a_masked_reply_has_room_for_the_widest_ring_and_every_peer() -> None:
    task = TinyTask()
    plain = plan_for(task, {"epsilon": 5.0, "cohort": 40})
    masked = plan_for(task, {"epsilon": 5.0, "cohort": 40, "aggregation": "secure"})

    assert largest_reply(masked, task) - largest_reply(plain, task) == 40 * 8 * 1024


def test_statistics_fit() -> None:
    questions = (
        NumberQuestion(name="age", low=0.0, high=90.0, bins=50),
        CategoryQuestion(name="sex", values=("f", "m")),
    )
    plan = StatisticsPlan(
        task="t", source="s", questions=questions, epsilon=1.0, delta=1e-5, unit="record"
    )
    sums = np.arange(Layout.of(plan).dimension)

    assert encode(StatisticsReply(sums).records()).size <= largest_statistics(plan) < ROOM
