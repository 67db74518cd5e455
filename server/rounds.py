"""Federated training, a round at a time.

    for each round:
        ask the cohort            strategy.configure_train, then the Grid
        validate every reply      a bad reply costs its holder the round, not the run
        aggregate                 strategy.aggregate_train
        checkpoint

The loop never knows what the Grid is: a gRPC link, this process, or Flower's own runtime.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import RunError, WireError
from common.flower import BaseGrid
from common.plan import TrainingPlan
from common.tasks.base import derived_seed
from common.wire import (
    EvaluateReply,
    RoundRequest,
    TrainReply,
    Vector,
    error_message,
    vector_of,
)
from server.aggregation import restore, snapshot
from server.checkpoints import RunState

__all__ = ["RoundSummary", "cohort_of", "evaluate", "result_of", "rounds", "wait_for_quorum"]


@dataclass(frozen=True)
class RoundSummary:
    """What one round did, for tables, logs and ``metrics.jsonl``.

    Args:
        round: 1-based.
        accepted: names of the holders whose updates count.
        missed: name → reason of those whose updates do not: they were away, silent, declined,
            failed, or sent what cannot count.
        seconds: wall time.
        metrics: name of holder → metrics, of holders that share them; after evaluation.
    """

    round: int
    accepted: tuple[str, ...]
    missed: Mapping[str, str]
    seconds: float
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class _Cohort(BaseGrid):
    """A Grid that shows a strategy this round's holders and no others."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        super().__init__(grid.run.run_id)
        self._grid, self._node_ids = grid, list(node_ids)
        self._away = grid.away() if isinstance(grid, BaseGrid) else []

    def get_node_ids(self) -> list[int]:
        return self._node_ids

    def away(self) -> list[str]:
        return self._away

    def holder_name(self, node_id: int) -> str:
        return _name(self._grid, node_id)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return list(self._grid.send_and_receive(messages, timeout=timeout))


def rounds(
    grid: Grid, plan: TrainingPlan, strategy: Strategy, state: RunState
) -> Iterator[tuple[RunState, RoundSummary]]:
    """Train from ``state`` to the end of the plan, yielding the state after every round.

    Raises:
        RunError: fewer than ``plan.min_holders`` updates were accepted in a round.
    """
    restore(plan.strategy.name, strategy, state.strategy)
    while state.round < plan.rounds:
        state, summary = next_round(grid, plan, strategy, state)
        yield state, summary


def next_round(
    grid: Grid, plan: TrainingPlan, strategy: Strategy, state: RunState
) -> tuple[RunState, RoundSummary]:
    """One round: ask, validate, aggregate."""
    wait_for_quorum(grid, plan)  # a holder that restarts between two rounds is waited for
    begin, number = time.perf_counter(), state.round + 1
    request = RoundRequest(state.run_id, number, plan, state.parameters)
    cohort = _Cohort(grid, _choose(grid, plan, number))

    asked = strategy.configure_train(number, request.arrays(), request.config(), cohort)
    answers, missed = _exchange(grid, asked, plan)
    missed |= dict.fromkeys(cohort.away(), "away when the round began")
    accepted, rejected = _validate(answers, plan, state.parameters)
    missed |= _named(grid, rejected)
    names = tuple(_name(grid, node) for node in sorted(_nodes(accepted)))
    _require_quorum(plan, number, names, missed)

    arrays, _ = strategy.aggregate_train(number, [answer.reply for answer in accepted])
    parameters = result_of(arrays, state.parameters)
    state = state.advanced(
        parameters,
        snapshot(plan.strategy.name, strategy),
        average=number > plan.average_from * plan.rounds,
    )
    return state, RoundSummary(number, names, missed, time.perf_counter() - begin)


def evaluate(
    grid: Grid, plan: TrainingPlan, state: RunState, summary: RoundSummary
) -> RoundSummary:
    """Send the model for evaluation; holders keep their figures unless their policy shares them.

    A plan with a cohort has as many holders evaluate, drawn anew: a hundred thousand need not look
    at every model.
    """
    request = RoundRequest(state.run_id, state.round, plan, state.released)
    content = request.records()
    asked = [
        Message(content, node, MessageType.EVALUATE)
        for node in _choose(grid, plan, state.round, "evaluation")
    ]
    answers, missed = _exchange(grid, asked, plan)
    metrics: dict[str, Mapping[str, float]] = {}
    for answer in answers:
        name = _name(grid, answer.nodes[0])
        try:
            metrics[name] = EvaluateReply.of(answer.reply.content).metrics
        except WireError as error:
            missed[name] = f"evaluation rejected: {error}"
    shared = {name: figures for name, figures in metrics.items() if figures}
    return replace(summary, metrics=shared, missed={**missed, **summary.missed})


def wait_for_quorum(grid: Grid, plan: TrainingPlan, poll: float = 0.05) -> int:
    """Wait until ``plan.min_holders`` are there, for ``plan.round_deadline`` seconds at most.

    Returns:
        How many are there.
    """
    deadline = time.monotonic() + plan.round_deadline
    while (present := len(list(grid.get_node_ids()))) < plan.min_holders:
        if time.monotonic() > deadline:
            break
        time.sleep(poll)
    return present


# -- the parts of a round -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer:
    """A reply, and whose it is.

    Args:
        nodes: of the holders that it speaks for, in ascending order; several where the Grid sums.
        reply: theirs.
    """

    nodes: tuple[int, ...]
    reply: Message


def _choose(grid: Grid, plan: TrainingPlan, number: int, purpose: str = "cohort") -> list[int]:
    """The cohort among the holders that are there."""
    return cohort_of(sorted(grid.get_node_ids()), plan, number, purpose)


def cohort_of(
    present: Sequence[int], plan: TrainingPlan, number: int, purpose: str = "cohort"
) -> list[int]:
    """Whom to ask in a round: everyone, or ``plan.cohort`` of them.

    Args:
        present: whom there is, in ascending order.
        plan: its seed decides, so that it is the same after a restart.
        number: of the round.
        purpose: what they are asked for; other purposes draw others.
    """
    if plan.cohort is None or plan.cohort >= len(present):
        return list(present)
    chance = random.Random(derived_seed(purpose, plan.seed, number))
    return sorted(chance.sample(present, plan.cohort))


def _exchange(
    grid: Grid, messages: Iterable[Message], plan: TrainingPlan
) -> tuple[list[_Answer], dict[str, str]]:
    """Send, wait, and sort replies by holder: float sums then come out the same every time."""
    asked = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    nodes = [message.metadata.dst_node_id for message in asked]
    replies = list(grid.send_and_receive(asked, timeout=plan.round_deadline))
    # Flower's own error replies carry the coordinator's node id as source, so match by request.
    asked_of = {message.metadata.message_id: message.metadata.dst_node_id for message in asked}
    answered: dict[int, _Answer] = {}
    missed: dict[int, str] = {}
    for reply in replies:
        node = asked_of.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if reply.has_error():
            missed[node] = error_message(reply.error)
        else:
            answered[node] = _Answer(_spoken_for(grid, reply, node), reply)
    answers = [answered[node] for node in sorted(answered)]
    silent = set(nodes) - _nodes(answers) - missed.keys()
    missed |= dict.fromkeys(silent, f"no reply within {plan.round_deadline:g} s")
    return answers, _named(grid, missed)


def _validate(
    answers: Sequence[_Answer], plan: TrainingPlan, parameters: Vector
) -> tuple[list[_Answer], dict[int, str]]:
    """Answers that a strategy may see, holding new parameters; and why the others may not."""
    accepted: list[_Answer] = []
    rejected: dict[int, str] = {}
    for answer in answers:
        try:
            checked = TrainReply.of(
                answer.reply.content, plan, len(parameters), holders=len(answer.nodes)
            )
        except WireError as error:
            rejected |= dict.fromkeys(answer.nodes, f"reply rejected: {error}")
            continue
        answer.reply.content = checked.parameters(parameters)
        accepted.append(answer)
    return accepted, rejected


def _spoken_for(grid: Grid, reply: Message, node: int) -> tuple[int, ...]:
    """The holders that a reply to ``node`` speaks for."""
    if isinstance(grid, BaseGrid) and len(several := grid.answered_by(reply)) > 1:
        return tuple(sorted(several))
    return (node,)


def _nodes(answers: Iterable[_Answer]) -> set[int]:
    return {node for answer in answers for node in answer.nodes}


def _named(grid: Grid, reasons: Mapping[int, str]) -> dict[str, str]:
    return {_name(grid, node): why for node, why in sorted(reasons.items())}


def _require_quorum(
    plan: TrainingPlan, number: int, accepted: Sequence[str], missed: Mapping[str, str]
) -> None:
    if len(accepted) >= plan.min_holders:
        return
    reasons = "; ".join(f"{name}: {why}" for name, why in sorted(missed.items())) or "nobody asked"
    raise RunError(
        f"round {number}: {len(accepted)} of at least {plan.min_holders} updates were accepted "
        f"({reasons}). The model of round {number - 1} is kept; start again with the same state "
        "folder to go on"
    )


def result_of(arrays: ArrayRecord | None, old: Vector) -> Vector:
    """The strategy's result as a flat float32 vector."""
    if arrays is None:
        return old
    (array,) = arrays.values()
    if array.dtype == "float32":
        return vector_of(array, what="aggregate")
    return np.asarray(array.numpy(), dtype=np.float32)


def _name(grid: Grid, node_id: int) -> str:
    return grid.holder_name(node_id) if isinstance(grid, BaseGrid) else f"node-{node_id}"
