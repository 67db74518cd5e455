"""Flower's own Grid is asked without waiting, with deadlines that it does not know."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.flower import Run, set_identity, stamp
from common.settings import plan_for
from common.wire import RoundRequest
from server.aggregation import build_strategy
from server.app import federate
from server.buffered import buffered_rounds
from server.checkpoints import RunState
from server.polling import PollingGrid
from server.runs import RunFolder
from tests.fakes import pulls_towards
from tests.tiny import TinyTask


class Foreign(Grid):
    """A Grid of Flower's kind: node 4 never answers."""

    def __init__(self) -> None:
        self._run = Run.create_empty(1)
        set_identity(1)
        self.pushed: dict[str, Message] = {}

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [2, 3, 4]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        keys = []
        for message in messages:
            keys.append(stamp(message))
            self.pushed[keys[-1]] = message
        return keys

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for key in list(message_ids):
            message = self.pushed[key]
            if message.metadata.dst_node_id != 4:
                del self.pushed[key]
                answer = pulls_towards(1.0)(RoundRequest.of(message))
                assert isinstance(answer, RecordDict)
                replies.append(Message(answer, reply_to=message))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise AssertionError("nobody is to wait for everybody")


def test_a_silent_node_holds_up_nobody_on_flowers_own_grid() -> None:
    settings = {"no_dp": True, "rounds": 4, "strategy": "fedbuff", "buffer": 2}
    plan = plan_for(TinyTask(), settings)
    state = RunState("run", 0, np.zeros(5, np.float32))
    found = list(buffered_rounds(Foreign(), plan, build_strategy(plan), state))
    assert [summary.accepted for _, summary in found] == [("node-2", "node-3")] * 4


def test_nor_does_it_hold_up_a_run_that_is_kept_on_disk(tmp_path: Path) -> None:
    settings = {"no_dp": True, "rounds": 2, "strategy": "fedbuff", "buffer": 2, "min_holders": 2}
    plan = plan_for(TinyTask(), {**settings, "evaluate": "never"})
    result = federate(Foreign(), plan, TinyTask(), RunFolder.begin(tmp_path, plan))
    assert [summary.accepted for summary in result.history] == [("node-2", "node-3")] * 2


def test_what_does_not_come_in_time_is_overdue_once() -> None:
    grid = PollingGrid(Foreign())
    request = RoundRequest("run", 1, plan_for(TinyTask(), {}), np.zeros(5, np.float32))
    messages = [Message(request.records(), node, "train") for node in (2, 4)]
    keys = grid.push_messages(messages, timeout=0.01)
    grid.wait(keys, 60.0)
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(keys)] == keys[:1]
    grid.wait(keys, 60.0)  # its time is over long before
    assert grid.overdue(keys) == keys[1:]
    assert grid.overdue(keys) == []
