"""The holder's Flower ClientApp.

The same app runs in the resident process (:mod:`client.node`), in simulations, and on Flower's
own runtimes through ``flwr run``; only the way a :class:`~client.holder.Holder` is found differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from client.holder import Holder
from client.policy import Policy
from client.policy_file import policy_of_node
from client.state import HolderState
from client.trainer import pick_device
from common.errors import Refusal
from common.privacy.ledger import Budget
from common.tasks import load
from common.tasks.base import Task
from common.wire import (
    FAILED,
    EvaluateReply,
    RoundRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    refusal_error,
)

__all__ = ["app", "build_app"]

logger = logging.getLogger("sotto.holder")


def build_app(find: Callable[[Context], Holder]) -> ClientApp:
    """A ClientApp over holders.

    Args:
        find: the holder that a context speaks of.
    """
    client = ClientApp()

    def guarded(
        message: Message, answer: Callable[[], TrainReply | EvaluateReply | StatisticsReply]
    ) -> Message:
        try:
            return Message(answer().records(), reply_to=message)
        except Refusal as refusal:
            # `sotto join` says it in a line of its own.
            logger.info("declined (%s): %s", refusal.code, refusal.sentence)
            return Message(refusal_error(refusal), reply_to=message)
        except Exception as error:  # the text may hold data: only the type leaves
            logger.exception("a %s request failed", message.metadata.message_type)
            return Message(Error(FAILED, type(error).__name__), reply_to=message)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return guarded(message, lambda: find(context).train(RoundRequest.of(message)))

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return guarded(message, lambda: find(context).evaluate(RoundRequest.of(message)))

    @client.query()
    def statistics(message: Message, context: Context) -> Message:
        return guarded(message, lambda: find(context).statistics(StatisticsRequest.of(message)))

    return client


@cache
def _holder_of_node(
    task: Task, part: int, parts: int | None, folder: Path | None, epsilon: float | None
) -> Holder:
    data = task.holder_data(parts)
    name = list(data)[part]
    budget = None if epsilon is None else Budget(epsilon, task.source.delta)
    size = task.source.nominal_size(parts)
    if folder is None:
        policy, state = Policy.of_experiment(name, budget, size), HolderState.in_memory()
    else:
        policy, state = policy_of_node(folder, name, budget, size), HolderState.at(folder)
    return Holder(name, task, data[name], policy, state, pick_device("auto"))


_cached_task = cache(load)


def holder_of_context(context: Context) -> Holder:
    """The holder of one of Flower's own nodes, from its node config and the run's config.

    A SuperNode is told ``state="DIR" budget=EPS partition-id=I num-partitions=N`` in its
    ``--node-config``: the ledger lives in that folder and refuses past the budget. A
    ``policy.toml`` in it holds as it does for ``sotto join``. Flower's
    simulation tells its nodes ``partition-id`` and ``num-partitions`` only; such a node holds a
    part of a public source, keeps its account in memory, and shares exact metrics.
    """
    node, run = context.node_config, context.run_config
    task = _cached_task(
        str(run.get("task") or "medical-diagnosis"),
        str(run["source"]) if run.get("source") else None,
        str(run["preprocessing"]) if run.get("preprocessing") else None,
    )
    parts, folder, budget = (node.get(key) for key in ("num-partitions", "state", "budget"))
    return _holder_of_node(
        task,
        int(node.get("partition-id", 0)),
        None if parts is None else int(parts),
        None if folder is None else Path(str(folder)),
        None if budget is None else float(budget),
    )


app = build_app(holder_of_context)
