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
from functools import partial
from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import ConfigurationError, RunError, WireError
from common.flower import Around, BaseGrid, holder_name
from common.guarantees import CentralPrivacy
from common.plan import TrainingPlan
from common.tasks.base import Task, derived_seed
from common.tasks.histograms import Estimate
from common.wire import (
    EvaluateReply,
    RoundRequest,
    TrainReply,
    Vector,
    error_message,
    vector_of,
)
from server.aggregation import restore, snapshot
from server.central import Combination, combination_of
from server.checkpoints import RunState
from server.evaluation import estimates, expected_of

__all__ = [
    "Answer",
    "RoundSummary",
    "cohort_of",
    "evaluate",
    "exchange",
    "result_of",
    "rounds",
    "wait_for_quorum",
]


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
        evaluation: metrics of the held-out units of all holders together, with error bars, from
            their noised histograms; after an evaluation that has a price.
        lost: why the round gave nothing, where too few holders remained for a masked sum; the
            model is then that of the round before.
    """

    round: int
    accepted: tuple[str, ...]
    missed: Mapping[str, str]
    seconds: float
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    evaluation: Mapping[str, Estimate] = field(default_factory=dict)
    lost: str = ""


MOST_LOST_IN_A_ROW = 3
"""After so many rounds in a row that gave nothing, the run stops and says so."""


class _Cohort(Around):
    """A Grid that shows a strategy this round's holders and no others."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        super().__init__(grid)
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> list[int]:
        return self._node_ids


def rounds(
    grid: Grid,
    plan: TrainingPlan,
    strategy: Strategy,
    state: RunState,
    combination: Combination | None = None,
) -> Iterator[tuple[RunState, RoundSummary]]:
    """Train from ``state`` to the end of the plan, yielding the state after every round.

    Args:
        grid: reaches the holders.
        plan: calibrated.
        strategy: of the plan.
        state: to go on from.
        combination: of a round's replies; the plan's, unpredictable, if left out.

    Raises:
        RunError: too few updates were accepted in a round.
        ConfigurationError: holders are asked in turn, and the Grid does not know them apart.
    """
    _require_names(grid, plan)
    restore(plan.strategy.name, strategy, state.strategy)
    combination = combination or combination_of(plan)
    lost = 0
    while state.round < plan.rounds:
        state, summary = next_round(grid, plan, strategy, state, combination)
        yield state, summary
        lost = lost + 1 if summary.lost else 0
        if lost == MOST_LOST_IN_A_ROW:
            raise RunError(
                f"{lost} rounds in a row gave nothing, the last because {summary.lost} "
                f"({_reasons(summary.missed)}); once that is mended, start again with the same "
                "state folder to go on"
            )
        if lost and state.round < plan.rounds:
            _wait_for_more(grid, plan)


def next_round(
    grid: Grid,
    plan: TrainingPlan,
    strategy: Strategy,
    state: RunState,
    combination: Combination | None = None,
) -> tuple[RunState, RoundSummary]:
    """One round: ask, validate, combine, aggregate; see :func:`rounds`."""
    combination = combination or combination_of(plan)
    wait_for_quorum(grid, plan)  # a holder that restarts between two rounds is waited for
    begin, number = time.perf_counter(), state.round + 1
    clip_norm = combination.clip_norm(state.strategy)
    request = RoundRequest(state.run_id, number, plan, state.parameters, clip_norm)
    present = sorted(grid.get_node_ids())
    chosen = combination.cohort(present, partial(holder_name, grid), number)
    cohort = cohort_of(present, plan, number) if chosen is None else chosen

    accepted, missed = _ask(grid, strategy, request, cohort, combination.fewest)
    nodes = sorted(node for answer, _ in accepted for node in answer.nodes)
    names = tuple(holder_name(grid, node) for node in nodes)
    if len(nodes) < combination.fewest <= len(cohort) and plan.aggregation.kind != "plain":
        # What holders sent for this round is not sent again, so there is no second try.
        why = f"fewer than {combination.fewest} holders remained for a masked sum"
        seconds = time.perf_counter() - begin
        return state.skipped(), RoundSummary(number, (), missed, seconds, lost=why)
    _require_quorum(combination.fewest, number, names, missed)

    replies = [reply for _, reply in accepted]
    seen, memory = combination.combined(number, replies, state.strategy, len(state.parameters))
    messages = [Message(reply.parameters(state.parameters), 1, MessageType.TRAIN) for reply in seen]
    arrays, _ = strategy.aggregate_train(number, messages)
    parameters = result_of(arrays, state.parameters)
    state = state.advanced(
        parameters,
        {**snapshot(plan.strategy.name, strategy), **memory},
        average=number > plan.average_from * plan.rounds,
    )
    return state, RoundSummary(number, names, missed, time.perf_counter() - begin)


def evaluate(
    grid: Grid, plan: TrainingPlan, task: Task, state: RunState, summary: RoundSummary
) -> RoundSummary:
    """Send the model for evaluation: holders keep their figures, or send noised histograms.

    A plan with a cohort has as many holders evaluate, drawn anew: a hundred thousand need not look
    at every model.
    """
    request = RoundRequest(state.run_id, state.round, plan, state.released)
    content = request.records()
    asked = [
        Message(content, node, MessageType.EVALUATE)
        for node in _choose(grid, plan, state.round, "evaluation")
    ]
    answers, missed = exchange(grid, asked, plan.round_deadline)
    replies: dict[str, EvaluateReply] = {}
    expected = expected_of(plan, task)
    for answer in answers:
        name = holder_name(grid, answer.nodes[0])
        try:
            replies[name] = EvaluateReply.of(answer.reply.content, **expected)
        except WireError as error:
            missed[name] = f"evaluation rejected: {error}"
    return replace(
        summary,
        metrics={name: reply.metrics for name, reply in replies.items() if reply.metrics},
        evaluation=estimates(plan, task, replies.values()),
        missed={**missed, **summary.missed},
    )


def _require_names(grid: Grid, plan: TrainingPlan) -> None:
    """Turns go by name: a holder that came back as another node could take two of them."""
    privacy = plan.privacy
    if (
        isinstance(privacy, CentralPrivacy)
        and privacy.mechanism == "banded"
        and not isinstance(grid, BaseGrid)
    ):
        raise ConfigurationError(
            "mechanism 'banded' asks holders in turn, and Flower's own runtime does not say which "
            "node is which holder; use 'sotto serve' or 'sotto simulate', or mechanism 'gaussian'"
        )


class _Quorum(Protocol):
    """A plan, as far as waiting for holders goes."""

    @property
    def min_holders(self) -> int: ...

    @property
    def round_deadline(self) -> float: ...


def wait_for_quorum(grid: Grid, plan: _Quorum, poll: float = 0.05) -> int:
    """Wait until ``plan.min_holders`` are there, for ``plan.round_deadline`` seconds at most.

    Returns:
        How many are there.
    """
    deadline = time.monotonic() + plan.round_deadline
    simulated = isinstance(grid, BaseGrid) and grid.complete
    while (present := len(list(grid.get_node_ids()))) < plan.min_holders:
        if simulated or time.monotonic() > deadline:
            break
        time.sleep(poll)
    return present


# -- the parts of a round -------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A reply, and whose it is.

    Args:
        nodes: of the holders that it speaks for, in ascending order; several where the Grid sums.
        reply: theirs.
    """

    nodes: tuple[int, ...]
    reply: Message


def _ask(
    grid: Grid, strategy: Strategy, request: RoundRequest, cohort: Sequence[int], fewest: int
) -> tuple[list[tuple[Answer, TrainReply]], dict[str, str]]:
    """Ask a cohort; and where too few of it count, whoever else is there or comes.

    So a holder that declines does not hold up those who would not.

    Args:
        grid: reaches the holders.
        strategy: whose requests they are.
        request: of the round.
        cohort: whom to ask first.
        fewest: updates that the round needs.

    Returns:
        Answers that count, by ascending node, and name → reason of holders without one.
    """
    deadline = time.monotonic() + request.plan.round_deadline
    asked: set[int] = set()
    accepted: list[tuple[Answer, TrainReply]] = []
    missed = dict.fromkeys(_Cohort(grid, []).away(), "away when the round began")
    nodes = list(cohort)
    while True:
        asked.update(nodes)
        messages = _requests(strategy, request, _Cohort(grid, nodes))
        answers, silent = exchange(grid, messages, max(0.0, deadline - time.monotonic()))
        counted, rejected = _validate(answers, request)
        accepted += counted
        missed |= silent | _named(grid, rejected)
        if request.plan.aggregation.kind != "plain":
            break  # nobody can be added to a masked sum
        lacking = fewest - sum(len(answer.nodes) for answer, _ in accepted)
        # As many as are lacking: a hundred thousand need not be asked because one declined.
        nodes = _others(grid, asked, deadline)[:lacking] if lacking > 0 else []
        if not nodes:
            break
    names = {holder_name(grid, node) for answer, _ in accepted for node in answer.nodes}
    missed = {name: why for name, why in missed.items() if name not in names}
    return sorted(accepted, key=lambda pair: pair[0].nodes), missed


def _others(grid: Grid, asked: set[int], deadline: float, poll: float = 0.05) -> list[int]:
    """Holders that were not asked, waiting for one to come as long as that may be."""
    patience = grid.patience if isinstance(grid, BaseGrid) else 0.0
    deadline = min(deadline, time.monotonic() + patience)
    while not (others := sorted(set(grid.get_node_ids()) - asked)):
        if time.monotonic() >= deadline:
            break
        time.sleep(poll)
    return others


def _wait_for_more(grid: Grid, plan: TrainingPlan) -> None:
    """After a lost round, wait for a holder to come, if the cohort is not complete.

    Where somebody declines, rounds are lost in no time, and those who would make up for it have
    not joined yet.
    """
    present = set(grid.get_node_ids())
    if plan.cohort is not None and len(present) < plan.cohort:
        _others(grid, present, time.monotonic() + plan.round_deadline)


NOBODY = 1
"""A node id that no holder has: Flower's own, of the coordinator."""


def _requests(strategy: Strategy, request: RoundRequest, cohort: _Cohort) -> list[Message]:
    """The strategy's requests to a cohort; a cohort drawn by coins may be empty.

    A strategy waits until there is somebody to ask, and it must see every round all the same, as
    it takes down the parameters that the round begins with.
    """
    shown = cohort if cohort.get_node_ids() else _Cohort(cohort, [NOBODY])
    asked = strategy.configure_train(request.round, request.arrays(), request.config(), shown)
    return [message for message in asked if message.metadata.dst_node_id != NOBODY]


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


def exchange(
    grid: Grid, messages: Iterable[Message], deadline: float
) -> tuple[list[Answer], dict[str, str]]:
    """Send, wait, and sort replies by holder: float sums then come out the same every time.

    Args:
        grid: reaches the holders.
        messages: one for each holder that is asked.
        deadline: seconds until a silent holder misses it.

    Returns:
        The answers, and name → reason of the holders without one.
    """
    asked = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    nodes = [message.metadata.dst_node_id for message in asked]
    replies = list(grid.send_and_receive(asked, timeout=deadline))
    # Flower's own error replies carry the coordinator's node id as source, so match by request.
    asked_of = {message.metadata.message_id: message.metadata.dst_node_id for message in asked}
    answered: dict[int, Answer] = {}
    missed: dict[int, str] = {}
    for reply in replies:
        node = asked_of.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        if reply.has_error():
            missed[node] = error_message(reply.error)
        else:
            answered[node] = Answer(_spoken_for(grid, reply, node), reply)
    answers = [answered[node] for node in sorted(answered)]
    silent = set(nodes) - _nodes(answers) - missed.keys()
    missed |= dict.fromkeys(silent, f"no reply within {deadline:.3g} s")
    return answers, _named(grid, missed)


def _validate(
    answers: Sequence[Answer], request: RoundRequest
) -> tuple[list[tuple[Answer, TrainReply]], dict[int, str]]:
    """Answers that count, each as what it says; and why the others do not."""
    accepted: list[tuple[Answer, TrainReply]] = []
    rejected: dict[int, str] = {}
    for answer in answers:
        try:
            reply = TrainReply.of(
                answer.reply.content,
                request.plan,
                len(request.parameters),
                holders=len(answer.nodes),
                clip_norm=request.clip_norm,
            )
        except WireError as error:
            rejected |= dict.fromkeys(answer.nodes, f"reply rejected: {error}")
            continue
        accepted.append((answer, reply))
    return accepted, rejected


def _spoken_for(grid: Grid, reply: Message, node: int) -> tuple[int, ...]:
    """The holders that a reply to ``node`` speaks for."""
    if isinstance(grid, BaseGrid) and len(several := grid.answered_by(reply)) > 1:
        return tuple(sorted(several))
    return (node,)


def _nodes(answers: Iterable[Answer]) -> set[int]:
    return {node for answer in answers for node in answer.nodes}


def _named(grid: Grid, reasons: Mapping[int, str]) -> dict[str, str]:
    return {holder_name(grid, node): why for node, why in sorted(reasons.items())}


def _require_quorum(
    fewest: int, number: int, accepted: Sequence[str], missed: Mapping[str, str]
) -> None:
    if len(accepted) >= fewest:
        return
    raise RunError(
        f"round {number}: {len(accepted)} of at least {fewest} updates were accepted "
        f"({_reasons(missed)}). The model of round {number - 1} is kept; start again with the same "
        "state folder to go on"
    )


def _reasons(missed: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in sorted(missed.items())) or "nobody asked"


def result_of(arrays: ArrayRecord | None, old: Vector) -> Vector:
    """The strategy's result as a flat float32 vector."""
    if arrays is None:
        return old
    (array,) = arrays.values()
    if array.dtype == "float32":
        return vector_of(array, what="aggregate")
    return np.asarray(array.numpy(), dtype=np.float32)
