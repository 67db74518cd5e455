"""The message that leaves a holder: a reply, a refusal, or the type of an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Error, Message, RecordDict

from common.errors import Refusal, StateError, StorageError
from common.link.log import RationedLog
from common.wire import FAILED, refusal_error

__all__ = ["Reply", "answered"]

log = RationedLog(logging.getLogger("sotto.holder"))

STORAGE = (
    "the holder cannot write to or read from its own disk (full, read-only, gone or locked), and "
    "nothing was sent; it stays joined and answers again once its operator, whose log says more, "
    "has mended that"
)
DAMAGED = (
    "something in the holder's state folder is not as it was written, and nothing is sent that "
    "rests on it; its operator's log says what, and what to do"
)
"""All that leaves of trouble with the disk; where it is, and what it is, stays here."""


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
    except StorageError as error:
        log.warning("", "declined (storage): %s", error)
        return Message(refusal_error(Refusal("storage", STORAGE)), reply_to=message)
    except StateError as error:
        log.warning("", "declined (state): %s", error)
        return Message(refusal_error(Refusal("state", DAMAGED)), reply_to=message)
    except Exception as error:  # the text may hold data: only the type leaves
        log.exception("", "a %s request failed", message.metadata.message_type)
        return Message(Error(FAILED, type(error).__name__), reply_to=message)
