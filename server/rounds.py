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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from common.errors import ConfigurationError, RunError, WireError
from common.flower import Around, BaseGrid, holder_name, wait_for_change
from common.guarantees import CentralPrivacy
from common.plan import TrainingPlan
from common.tasks.base import Task, derived_seed
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
from server.summaries import RoundSummary

__all__ = [
    "Answer",
    "cohort_of",
    "evaluate",
    "exchange",
    "named",
    "others_than",
    "reasons_of",
    "requests_to",
    "result_of",
    "rounds",
    "timed",
    "validated",
    "wait_for_quorum",
]


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
    lost: int = 0,
) -> Iterator[tuple[RunState, RoundSummary]]:
    """Train from ``state`` to the end of the plan, yielding the state after every round.

    Args:
        grid: reaches the holders.
        plan: calibrated.
        strategy: of the plan.
        state: to go on from.
        combination: of a round's replies; the plan's, unpredictable, if left out.
        lost: rounds before this one that gave nothing, in a row.

    Raises:
        RunError: too few updates were accepted in a round, or every round gave nothing.
        ConfigurationError: holders are asked in turn, and the Grid does not know them apart.
    """
    _require_names(grid, plan)
    restore(plan.strategy.name, strategy, state.strategy)
    combination = combination or combination_of(plan)
    while state.round < plan.rounds:
        state, summary = next_round(grid, plan, strategy, state, combination)
        yield state, summary
        lost = lost + 1 if summary.lost else 0
        if lost >= MOST_LOST_IN_A_ROW:
            raise RunError(
                f"{lost} rounds in a row gave nothing, the last because {summary.lost} "
                f"({reasons_of(summary.missed)}); once that is mended, start again with the same "
                "state folder to go on"
            )
        if lost and state.round < plan.rounds:
            _wait_for_more(grid, plan)
    if lost >= plan.rounds:
        raise RunError(
            f"all {plan.rounds} rounds gave nothing, and the model is the one that the run began "
            "with; move its folder away to begin another run"
        )


def next_round(
    grid: Grid,
    plan: TrainingPlan,
    strategy: Strategy,
    state: RunState,
    combination: Combination | None = None,
) -> tuple[RunState, RoundSummary]:
    """One round: ask, validate, combine, aggregate; see :func:`rounds`."""
    combination = combination or combination_of(plan)
    number, phases = state.round + 1, dict[str, float]()
    before = _begun(grid, number)
    with timed(phases, "wait"):
        wait_for_quorum(grid, plan)  # a holder that restarts between two rounds is waited for
    begin = time.perf_counter()
    clip_norm = combination.clip_norm(state.strategy)
    request = RoundRequest(state.run_id, number, plan, state.parameters, clip_norm)
    cohort = _cohort(grid, plan, combination, number) if before is None else before

    with timed(phases, "exchange"):
        accepted, missed = _ask(grid, strategy, request, cohort, combination.fewest)
    nodes = sorted(node for answer, _ in accepted for node in answer.nodes)
    names = tuple(holder_name(grid, node) for node in nodes)
    if len(nodes) < combination.fewest <= len(cohort) and plan.aggregation.kind != "plain":
        # What holders sent for this round is not sent again, so there is no second try.
        why = f"fewer than {combination.fewest} holders remained for a masked sum"
        seconds = time.perf_counter() - begin
        summary = RoundSummary(number, (), missed, seconds, lost=why, phases=phases)
        return state.skipped(), summary
    _require_quorum(combination.fewest, number, names, missed)

    with timed(phases, "aggregate"):
        replies = [reply for _, reply in accepted]
        state = _aggregated(plan, strategy, state, combination, replies)
    return state, RoundSummary(number, names, missed, time.perf_counter() - begin, phases=phases)


def _aggregated(
    plan: TrainingPlan,
    strategy: Strategy,
    state: RunState,
    combination: Combination,
    replies: Sequence[TrainReply],
) -> RunState:
    """The state that a round's accepted replies lead to."""
    number, old = state.round + 1, state.parameters
    seen, memory = combination.combined(number, replies, state.strategy, len(old))
    messages = [Message(reply.parameters(old), 1, MessageType.TRAIN) for reply in seen]
    arrays, _ = strategy.aggregate_train(number, messages)
    return state.advanced(
        result_of(arrays, old),
        {**snapshot(plan.strategy.name, strategy), **memory},
        average=number > plan.average_from * plan.rounds,
    )


def evaluate(
    grid: Grid, plan: TrainingPlan, task: Task, state: RunState, summary: RoundSummary
) -> RoundSummary:
    """Send the model for evaluation: holders keep their figures, or send noised histograms.

    A plan with a cohort has as many holders evaluate, drawn anew: a hundred thousand need not look
    at every model.
    """
    request = RoundRequest(state.run_id, state.round, plan, state.released)
    content = request.records()
    nodes = _begun(grid, state.round, evaluation=True)
    if nodes is None:
        nodes = cohort_of(sorted(grid.get_node_ids()), plan, state.round, "evaluation")
    asked = [Message(content, node, MessageType.EVALUATE) for node in nodes]
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


def wait_for_quorum(grid: Grid, plan: _Quorum) -> int:
    """Wait until ``plan.min_holders`` are there, for ``plan.round_deadline`` seconds at most.

    Returns:
        How many are there.
    """
    enough = plan.min_holders
    return len(_wait_until(grid, lambda present: len(present) >= enough, plan.round_deadline))


def _wait_until(
    grid: Grid, satisfied: Callable[[Sequence[int]], bool], seconds: float
) -> Sequence[int]:
    """Who is there, once that satisfies or the time is over; in a simulation nobody will come."""
    deadline = time.monotonic() + seconds
    present = sorted(grid.get_node_ids())
    if isinstance(grid, BaseGrid):
        wait = grid.wait_for_change
        if grid.complete:
            return present
    else:
        wait = partial(wait_for_change, grid)
    while not satisfied(present) and (left := deadline - time.monotonic()) > 0:
        present = wait(present, left)
    return present


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Note how many seconds a block takes."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - begin


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
    left = request.plan.round_deadline
    deadline = time.monotonic() + left
    enough = request.plan.cohort if request.plan.over_selection else None
    asked: set[int] = set()
    accepted: list[tuple[Answer, TrainReply]] = []
    missed = dict.fromkeys(_Cohort(grid, []).away(), "away when the round began")
    nodes = list(cohort)
    while True:
        asked.update(nodes)
        messages = requests_to(nodes, strategy, request, grid)
        answers, silent = exchange(grid, messages, left, enough)
        counted, rejected = _validate(answers, request)
        accepted += counted
        missed |= silent | named(grid, rejected)
        if request.plan.aggregation.kind != "plain":
            break  # nobody can be added to a masked sum
        lacking = fewest - sum(len(answer.nodes) for answer, _ in accepted)
        # As many as are lacking: a hundred thousand need not be asked because one declined.
        nodes = others_than(asked, grid, deadline)[:lacking] if lacking > 0 else []
        if not nodes:
            break
        left = max(0.0, deadline - time.monotonic())
    names = {holder_name(grid, node) for answer, _ in accepted for node in answer.nodes}
    missed = {name: why for name, why in missed.items() if name not in names}
    return sorted(accepted, key=lambda pair: pair[0].nodes), missed


def others_than(asked: set[int], grid: Grid, deadline: float) -> list[int]:
    """Holders that were not asked, waiting for one to come as long as that may be.

    Args:
        asked: node ids.
        grid: reaches the holders.
        deadline: on the monotonic clock.
    """
    patience = grid.patience if isinstance(grid, BaseGrid) else 0.0
    seconds = min(patience, deadline - time.monotonic())
    present = _wait_until(grid, lambda present: bool(set(present) - asked), seconds)
    return sorted(set(present) - asked)


def _wait_for_more(grid: Grid, plan: TrainingPlan) -> None:
    """After a lost round, wait for a holder to come, if the cohort is not complete.

    Where somebody declines, rounds are lost in no time, and those who would make up for it have
    not joined yet.
    """
    present = set(grid.get_node_ids())
    if plan.cohort is not None and len(present) < plan.cohort:
        others_than(present, grid, time.monotonic() + plan.round_deadline)


NOBODY = 1
"""A node id that no holder has: Flower's own, of the coordinator."""


def requests_to(
    nodes: Sequence[int], strategy: Strategy, request: RoundRequest, grid: Grid
) -> list[Message]:
    """The strategy's requests to a cohort; a cohort drawn by coins may be empty.

    A strategy waits until there is somebody to ask, and it must see every round all the same, as
    it takes down the parameters that the round begins with.
    """
    shown = _Cohort(grid, nodes or [NOBODY])
    asked = strategy.configure_train(request.round, request.arrays(), request.config(), shown)
    return [message for message in asked if message.metadata.dst_node_id != NOBODY]


def _begun(grid: Grid, number: int, *, evaluation: bool = False) -> Sequence[int] | None:
    """Whom a round had asked before the coordinator was started again; None if nobody."""
    return grid.begun(number, evaluation=evaluation) if isinstance(grid, BaseGrid) else None


def _cohort(grid: Grid, plan: TrainingPlan, combination: Combination, number: int) -> list[int]:
    """Whom to ask among the holders that are there."""
    present = sorted(grid.get_node_ids())
    chosen = combination.cohort(present, partial(holder_name, grid), number)
    return cohort_of(present, plan, number) if chosen is None else chosen


def cohort_of(
    present: Sequence[int], plan: TrainingPlan, number: int, purpose: str = "cohort"
) -> list[int]:
    """Whom to ask in a round: everyone, or as many as the plan says.

    Args:
        present: whom there is, in ascending order.
        plan: its seed decides, so that it is the same after a restart.
        number: of the round.
        purpose: what they are asked for; other purposes draw others.
    """
    count = plan.asked if purpose == "cohort" else plan.cohort
    if count is None or count >= len(present):
        return list(present)
    chance = random.Random(derived_seed(purpose, plan.seed, number))
    return sorted(chance.sample(present, count))


def exchange(
    grid: Grid, messages: Iterable[Message], deadline: float, enough: int | None = None
) -> tuple[list[Answer], dict[str, str]]:
    """Send, wait, and sort replies by holder: float sums then come out the same every time.

    Args:
        grid: reaches the holders.
        messages: one for each holder that is asked.
        deadline: seconds until a silent holder misses it.
        enough: replies without an error that close it, whoever is still at work; None for all.

    Returns:
        The answers, and name → reason of the holders without one.
    """
    asked = sorted(messages, key=lambda message: message.metadata.dst_node_id)
    nodes = [message.metadata.dst_node_id for message in asked]
    known = grid if isinstance(grid, BaseGrid) else Around(grid)
    replies = list(known.replies(asked, timeout=deadline, enough=enough))
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
    closed = enough is not None and len(_nodes(answers)) >= enough
    why = f"not among the first {enough}" if closed else f"no reply within {deadline:.3g} s"
    missed |= dict.fromkeys(silent, why)
    return answers, named(grid, missed)


def _validate(
    answers: Sequence[Answer], request: RoundRequest
) -> tuple[list[tuple[Answer, TrainReply]], dict[int, str]]:
    """Answers that count, each as what it says; and why the others do not."""
    accepted: list[tuple[Answer, TrainReply]] = []
    rejected: dict[int, str] = {}
    for answer in answers:
        try:
            accepted.append((answer, validated(answer, request)))
        except WireError as error:
            rejected |= dict.fromkeys(answer.nodes, str(error))
    return accepted, rejected


def validated(answer: Answer, request: RoundRequest) -> TrainReply:
    """An answer to a training request, as what it says.

    Raises:
        WireError: it cannot count; says why.
    """
    try:
        return TrainReply.of(
            answer.reply.content,
            request.plan,
            len(request.parameters),
            holders=len(answer.nodes),
            clip_norm=request.clip_norm,
        )
    except WireError as error:
        raise WireError(f"reply rejected: {error}") from None


def _spoken_for(grid: Grid, reply: Message, node: int) -> tuple[int, ...]:
    """The holders that a reply to ``node`` speaks for."""
    if isinstance(grid, BaseGrid) and len(several := grid.answered_by(reply)) > 1:
        return tuple(sorted(several))
    return (node,)


def _nodes(answers: Iterable[Answer]) -> set[int]:
    return {node for answer in answers for node in answer.nodes}


def named(grid: Grid, reasons: Mapping[int, str]) -> dict[str, str]:
    """Reasons by name of the holder, in place of its node id."""
    return {holder_name(grid, node): why for node, why in sorted(reasons.items())}


def _require_quorum(
    fewest: int, number: int, accepted: Sequence[str], missed: Mapping[str, str]
) -> None:
    if len(accepted) >= fewest:
        return
    raise RunError(
        f"round {number}: {len(accepted)} of at least {fewest} updates were accepted "
        f"({reasons_of(missed)}). The model of round {number - 1} is kept; start again with the "
        "same state folder to go on"
    )


def reasons_of(missed: Mapping[str, str]) -> str:
    """Name → reason, in words."""
    return "; ".join(f"{name}: {why}" for name, why in sorted(missed.items())) or "nobody asked"


def result_of(arrays: ArrayRecord | None, old: Vector) -> Vector:
    """The strategy's result as a flat float32 vector."""
    if arrays is None:
        return old
    (array,) = arrays.values()
    if array.dtype == "float32":
        return vector_of(array, what="aggregate")
    return np.asarray(array.numpy(), dtype=np.float32)
