"""Statistics over all holders: one exchange, every reply validated, sums, and what they say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from common.durable import write_bytes
from common.errors import RunError, WireError
from common.flower import holder_name
from common.privacy.statistics import Layout
from common.statistics import Statistics, statistics_of
from common.statistics_plan import StatisticsPlan
from common.wire import Integers, StatisticsReply, StatisticsRequest
from server.rounds import exchange, wait_for_quorum

__all__ = ["Gathered", "StatisticsFolder", "gather"]


@dataclass(frozen=True)
class Gathered:
    """What an exchange came to.

    Args:
        plan: that was asked.
        run_id: names the exchange in the holders' ledgers.
        holders: names of those that answered.
        missed: name → reason of the others.
        total: [D] the sum of the answers, in steps of 1/ONE.
        statistics: what it says.
    """

    plan: StatisticsPlan
    run_id: str
    holders: tuple[str, ...]
    missed: Mapping[str, str]
    total: Integers
    statistics: Statistics


def gather(grid: Grid, plan: StatisticsPlan, run_id: str) -> Gathered:
    """Ask everyone who is there, and add up what comes.

    Every holder's noise is in its own answer, so the noise of the sum grows with the root of their
    number, while the count of units grows with the number itself.

    Args:
        grid: reaches the holders.
        plan: calibrated.
        run_id: names the exchange; with the same one, a holder answers the same again, free.

    Raises:
        RunError: fewer than ``plan.min_holders`` answers, or too much noise to say anything.
    """
    wait_for_quorum(grid, plan)
    content, dimension = StatisticsRequest(run_id, plan).records(), Layout.of(plan).dimension
    asked = [Message(content, node, MessageType.QUERY) for node in sorted(grid.get_node_ids())]
    answers, missed = exchange(grid, asked, plan.round_deadline)
    sums: dict[str, Integers] = {}
    for answer in answers:
        name = holder_name(grid, answer.nodes[0])
        try:
            sums[name] = StatisticsReply.of(answer.reply.content, dimension).sums
        except WireError as error:
            missed[name] = f"reply rejected: {error}"
    _require_quorum(plan, sums, missed)
    total: Integers = np.stack(list(sums.values())).sum(axis=0)
    figures = statistics_of(plan, total, len(sums))
    return Gathered(plan, run_id, tuple(sums), missed, total, figures)


def _require_quorum(
    plan: StatisticsPlan, answered: Mapping[str, Integers], missed: Mapping[str, str]
) -> None:
    if len(answered) >= plan.min_holders:
        return
    reasons = "; ".join(f"{name}: {why}" for name, why in sorted(missed.items()))
    paid = (
        "; what was answered is paid for, and is given again at no price: start again with the "
        "same --state"
        if answered
        else ""
    )
    raise RunError(
        f"{len(answered)} of at least {plan.min_holders} holders gave statistics "
        f"({reasons or f'nobody joined within {plan.round_deadline:g} s'}){paid}"
    )


# -- on disk --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatisticsFolder:
    """An exchange on the coordinator's disk: its plan, and at the end its figures.

    Args:
        path: its folder; the name is the exchange's own.
    """

    path: Path

    @property
    def run_id(self) -> str:
        """Names the exchange in the holders' ledgers."""
        return self.path.name

    @property
    def finished(self) -> bool:
        """Whether the figures are there."""
        return self._figures.exists()

    @property
    def _figures(self) -> Path:
        return self.path / "statistics.json"

    @classmethod
    def resume_or_begin(cls, state: Path, plan: StatisticsPlan) -> Self:
        """The exchange of this plan that was not finished, or a new one.

        Holders that had answered then answer the same, at no price.
        """
        for path in sorted((state / "statistics").glob("*/plan.json"), reverse=True):
            folder = cls(path.parent)
            if not folder.finished and path.read_text() == plan.to_json():
                return folder
        now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = cls(state / "statistics" / f"{now}-{uuid4().hex[:6]}")
        folder.path.mkdir(parents=True)
        write_bytes(folder.path / "plan.json", plan.to_json().encode())
        return folder

    def finish(self, written: Mapping[str, Any]) -> None:
        """Write the figures down."""
        write_bytes(self._figures, json.dumps(written, indent=2).encode())
