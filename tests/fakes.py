"""A Grid whose holders are functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict

from common.flower import BaseGrid, stamp
from common.wire import RoundRequest, TrainReply

Answer = Callable[[RoundRequest], RecordDict | Error | None]
"""What a holder says: records, an error, or nothing at all."""


class FakeGrid(BaseGrid):
    """Holders by name; node ids follow their order, from 2.

    Args:
        holders: what each answers.
        read: a message as the request that it is.
    """

    def __init__(
        self,
        holders: Mapping[str, Callable[[Any], RecordDict | Error | None]],
        read: Callable[[Message], Any] = RoundRequest.of,
    ) -> None:
        super().__init__(1)
        self.holders = dict(holders)
        self.read = read
        self.asked: list[tuple[str, str, int]] = []

    def get_node_ids(self) -> list[int]:
        return list(range(2, 2 + len(self.holders)))

    def holder_name(self, node_id: int) -> str:
        return list(self.holders)[node_id - 2]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            stamp(message)
            name = self.holder_name(message.metadata.dst_node_id)
            request = self.read(message)
            self.asked.append((name, message.metadata.message_type, request.round))
            answer = self.holders[name](request)
            if answer is not None:
                replies.append(Message(answer, reply_to=message))
        return replies


def pulls_towards(target: float) -> Answer:
    """An honest holder: moves a tenth of the way to ``target`` in every coordinate."""

    def answer(request: RoundRequest) -> RecordDict:
        update = (0.1 * (target - request.parameters)).astype(np.float32)
        return TrainReply(update, 1.0).records()

    return answer
