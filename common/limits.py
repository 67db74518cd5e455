"""How long the messages of a plan can be: what either end of the link accepts, and no more.

A longer one is refused by its header, before a byte of it is kept. These are bounds for honest
messages, so they follow from what is public: the model's size, the plan and the task.
"""

from __future__ import annotations

from common.link.transfer import message_bytes
from common.plan import TrainingPlan
from common.privacy.statistics import Layout
from common.statistics_plan import StatisticsPlan
from common.tasks.base import Task
from common.tasks.parameters import dimension_of

__all__ = ["largest_reply", "largest_request", "largest_statistics"]

_MOST_PEERS = 1024
"""Other holders that a request may speak of one by one; a holder learns the cohort only with it."""


def largest_reply(plan: TrainingPlan, task: Task) -> int:
    """Bytes of the longest reply to a request of a run: an update, masked or not, or a histogram.

    Args:
        plan: of the run.
        task: of the plan.
    """
    cells = task.cells if plan.evaluation.kind == "histogram" else 0
    peers = 0 if plan.aggregation.kind == "plain" else plan.cohort or 0
    return message_bytes(max(dimension_of(task), cells), peers)


def largest_statistics(plan: StatisticsPlan) -> int:
    """Bytes of the longest reply to a request for statistics."""
    return message_bytes(Layout.of(plan).dimension)


def largest_request(task: Task) -> int:
    """Bytes of the longest request that a holder of this task's data has to understand."""
    return message_bytes(dimension_of(task), _MOST_PEERS)
