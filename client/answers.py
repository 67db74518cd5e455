"""The message that leaves a holder: a reply, a refusal, or the type of an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Error, Message, RecordDict

from common.errors import Refusal
from common.link.log import RationedLog
from common.wire import FAILED, refusal_error

__all__ = ["Reply", "answered"]

log = RationedLog(logging.getLogger("sotto.holder"))


class Reply(Protocol):
    """Anything that leaves a holder."""

    def records(self) -> RecordDict:
        """The content of the message."""
        ...


def answered(message: Message, answer: Callable[[], Reply]) -> Message:
    """The reply to a request; whatever goes wrong, no text about data leaves.

    Args:
        message: the request.
        answer: makes the reply.
    """
    try:
        return Message(answer().records(), reply_to=message)
    except Refusal as refusal:
        # `sotto join` says it in a line of its own.
        log.info("", "declined (%s): %s", refusal.code, refusal.sentence)
        return Message(refusal_error(refusal), reply_to=message)
    except Exception as error:  # the text may hold data: only the type leaves
        log.exception("", "a %s request failed", message.metadata.message_type)
        return Message(Error(FAILED, type(error).__name__), reply_to=message)
