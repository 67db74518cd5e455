"""The holder's Flower ClientApp.

The same app runs in the resident process (:mod:`client.node`), in simulations, and on Flower's
own runtimes through ``flwr run``; only the way a :class:`~client.holder.Holder` is found differs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.answers import answered
from client.holder import Holder
from client.policy import Policy
from client.policy_file import policy_of_node
from client.secure import Participant, masked_rounds
from client.state import HolderState
from client.trainer import pick_device
from common.errors import WireError
from common.privacy.ledger import Budget
from common.secagg.wire import STEPS
from common.tasks import load
from common.tasks.base import Task
from common.wire import RoundRequest, StatisticsRequest, TrainReply

__all__ = ["app", "build_app"]


def build_app(find: Callable[[Context], Participant]) -> ClientApp:
    """A ClientApp over holders.

    Args:
        find: the holder that a context speaks of, as a participant in masked rounds.
    """
    client = ClientApp(mods=[masked_rounds(find)])

    @client.train()
    def train(message: Message, context: Context) -> Message:
        return answered(message, lambda: find(context).holder.train(RoundRequest.of(message)))

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answered(message, lambda: find(context).holder.evaluate(RoundRequest.of(message)))

    @client.query()
    def statistics(message: Message, context: Context) -> Message:
        return answered(
            message, lambda: find(context).holder.statistics(StatisticsRequest.of(message))
        )

    # Flower runs mods around registered functions only; the mod answers these by itself.
    for step in STEPS:
        client.query(step)(_not_masked)
    return client


def _not_masked(message: Message, context: Context) -> Message:
    del context

    def refuse() -> TrainReply:
        raise WireError("a step of a masked round came without its message")

    return answered(message, refuse)


@cache
def _holder_of_node(
    task: Task, part: int, parts: int | None, folder: Path | None, epsilon: float | None
) -> Participant:
    data = task.holder_data(parts)
    name = list(data)[part]
    budget = None if epsilon is None else Budget(epsilon, task.source.delta)
    size = task.source.nominal_size(parts)
    if folder is None:
        policy, state = Policy.of_experiment(name, budget, size), HolderState.in_memory()
    else:
        policy, state = policy_of_node(folder, name, budget, size), HolderState.at(folder)
        state.ledger.note_holder(name, "no certificate of its own, a node of Flower's runtime")
    return Participant.unsigned(Holder(name, task, data[name], policy, state, pick_device("auto")))


_cached_task = cache(load)


def holder_of_context(context: Context) -> Participant:
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
