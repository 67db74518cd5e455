"""What the coordinator makes of an evaluation: holders' noised histograms, summed, and metrics.

It sees one histogram of each holder with that holder's own noise in it, so with H holders the sum
has H times the variance of one. Everything here is post-processing of releases that are paid for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from common.plan import LARGEST_SIZE_CLASS, LARGEST_UNDERSTATEMENT, TrainingPlan
from common.tasks.base import Task
from common.tasks.histograms import Estimate
from common.wire import EvaluateReply, Integers

__all__ = ["estimates", "expected_of"]

TAIL = 40.0
"""Deviations of noise that no draw exceeds: their probability is below exp(−40²/2)."""


def expected_of(plan: TrainingPlan, task: Task) -> Mapping[str, int]:
    """What :meth:`EvaluateReply.of` is to hold a reply to: ``cells`` and the ``largest`` count."""
    if plan.evaluation.kind != "histogram":
        return {}
    units = LARGEST_SIZE_CLASS * LARGEST_UNDERSTATEMENT * plan.holder_size
    noise = TAIL * plan.evaluation.event().noise_multiplier
    return {"cells": task.cells, "largest": units + math.ceil(noise)}


def estimates(
    plan: TrainingPlan, task: Task, replies: Collection[EvaluateReply]
) -> dict[str, Estimate]:
    """Metrics of the held-out units of all holders together, with error bars.

    Args:
        plan: of the run.
        task: of the plan.
        replies: validated, one from each holder.

    Returns:
        Name → estimate; nothing where the plan pays for no histogram, or nobody sent one.
    """
    histograms: list[Integers] = [
        reply.histogram for reply in replies if reply.histogram is not None
    ]
    if plan.evaluation.kind != "histogram" or not histograms:
        return {}
    variance = len(histograms) * plan.evaluation.event().noise_multiplier ** 2
    return task.metrics_of(np.stack(histograms).sum(axis=0).astype(np.float64), variance)
