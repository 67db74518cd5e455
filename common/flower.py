"""The one place that touches names which Flower keeps private, and the base of our Grids.

Flower's public API gives no way to stamp a message's id or to say who the sender is outside of
its own runtimes, so a Grid of one's own needs two private names: ``TaskIdentity`` and
``Message.metadata._message_id``. ``tests/common/test_flower.py`` fails when an upgrade moves
either. ``Run``, the type of the abstract ``Grid.run``, is imported here for the same reason.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from uuid import uuid4

from cryptography.x509 import Certificate
from flwr.app import Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "COORDINATOR_NODE_ID",
    "Around",
    "BaseGrid",
    "Run",
    "holder_name",
    "incoming_message",
    "quiet_flower",
    "set_identity",
    "stamp",
    "wait_for_change",
]

COORDINATOR_NODE_ID = 1
_POLL = 0.05  # seconds

_PROCESS, _NUMBERS = uuid4().hex, count()
"""Together an id that nobody else gives, at a tenth of the price of another UUID."""


def set_identity(run_id: int) -> None:
    """Make ``Message(...)`` work in this process: it stamps the sender's identity."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = COORDINATOR_NODE_ID


def stamp(message: Message, message_id: str | None = None) -> str:
    """Give ``message`` an id (a fresh one unless given) and return it."""
    chosen = message_id or f"{_PROCESS}-{next(_NUMBERS)}"
    message.metadata.__dict__["_message_id"] = chosen
    return chosen


def incoming_message(
    content: RecordDict | None,
    error: Error | None,
    *,
    message_id: str,
    message_type: str,
    src_node_id: int,
    dst_node_id: int,
    reply_to: str = "",
    group_id: str = "",
    run_id: int = 0,
    created_at: float = 0.0,
    ttl: float = 0.0,
) -> Message:
    """A message as it comes off a wire, with exactly the metadata given."""
    metadata = Metadata(
        run_id=run_id,
        message_id=message_id,
        src_node_id=src_node_id,
        dst_node_id=dst_node_id,
        reply_to_message_id=reply_to,
        group_id=group_id,
        created_at=created_at,
        ttl=ttl,
        message_type=message_type,
    )
    # `metadata=` is Flower's own keyword for this, missing from its public overloads.
    return Message(content=content, error=error, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def quiet_flower() -> None:
    """Keep Flower's progress log, which repeats what Sotto shows itself, to errors."""
    logging.getLogger("flwr").setLevel(logging.ERROR)


class BaseGrid(Grid):
    """What every Sotto Grid has in common; subclasses say who is there and how to ask them."""

    def __init__(self, run_id: int = 1) -> None:
        self._run = Run.create_empty(run_id)
        self._replies: dict[str, Message] = {}
        set_identity(run_id)

    @property
    def run(self) -> Run:
        """The run this Grid operates in."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Operate in another run."""
        self._run = run
        set_identity(run.run_id)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See ``flwr.serverapp.Grid.create_message``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @abstractmethod
    def get_node_ids(self) -> list[int]:
        """Node ids of the holders that can be asked now, in ascending order."""

    @abstractmethod
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """See ``flwr.serverapp.Grid.send_and_receive``; replies come in the order of requests."""

    @abstractmethod
    def holder_name(self, node_id: int) -> str:
        """The name of the holder behind a node id, for logs, tables and summaries."""

    def answered_by(self, reply: Message) -> Sequence[int]:
        """Node ids of the holders that a reply speaks for: one, unless this Grid sums updates.

        Only the Grid can say so; nothing that a holder writes into a reply counts.
        """
        return [reply.metadata.src_node_id]

    @property
    def sums_unseen(self) -> bool:
        """Whether a plan with masked aggregation gets its sums from this Grid as it is."""
        return False

    def individually(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """:meth:`send_and_receive`, with a reply from each holder even if this Grid sums."""
        return self.send_and_receive(messages, timeout=timeout)

    def replies(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Iterator[Message]:
        """Ask holders, and hand out what they say as it comes in.

        It ends when all have answered, when enough have, or when the time is over. A reply that has
        not come by then is never handed out.

        Args:
            messages: requests.
            timeout: seconds; None waits for all.
            enough: replies without an error that suffice; None for all.
        """
        found = 0
        for reply in self.send_and_receive(messages, timeout=timeout):
            yield reply
            found += not reply.has_error()
            if enough is not None and found >= enough:
                return

    def begun(self, number: int, *, evaluation: bool = False) -> Sequence[int] | None:
        """Whom a round had asked before this process began; None if nobody.

        Args:
            number: of the round, which comes next.
            evaluation: whom it asked to evaluate, and not to train.
        """
        del number, evaluation
        return None

    def wait_for_change(self, present: Collection[int], timeout: float) -> list[int]:
        """Wait until there are others than there were.

        Args:
            present: node ids at the last look.
            timeout: seconds.

        Returns:
            Node ids now, in ascending order; the same if nobody came or went in time.
        """
        return wait_for_change(self, present, timeout)

    def away(self) -> list[str]:
        """Names of holders that joined before and cannot be asked now."""
        return []

    @property
    def complete(self) -> bool:
        """Whether everybody who will ever be there is there: in simulations."""
        return False

    @property
    def patience(self) -> float:
        """Seconds in which a holder that is running, and not there, would come; 0 if none can."""
        return 0.0

    @property
    def authority(self) -> Certificate | None:
        """Who vouches for holders' keys; None where names are believed."""
        return None

    def push_messages(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[str]:
        """Send and wait; the replies are then there for :meth:`pull_messages`.

        Args:
            messages: requests.
            timeout: seconds until a request is overdue; None for never.
        """
        requests = list(messages)
        for reply in self.send_and_receive(requests, timeout=timeout):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [request.metadata.message_id for request in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies to :meth:`push_messages`, each handed out once."""
        return [self._replies.pop(key) for key in list(message_ids) if key in self._replies]

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Return as soon as one of the requests is answered or overdue, or the time is over.

        Args:
            message_ids: of requests that were pushed.
            timeout: seconds.
        """
        del message_ids, timeout  # whatever was pushed has been answered, or never will be

    def overdue(self, message_ids: Iterable[str]) -> list[str]:
        """Those requests that were pushed and whose time is over: no reply to them will come.

        Args:
            message_ids: of requests whose replies were not pulled; each is named once.
        """
        return [key for key in list(message_ids) if key not in self._replies]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Withdraw requests that were pushed: their replies are no longer wanted."""
        self.pull_messages(message_ids)


class Around(BaseGrid):
    """A Grid around another: what it does not change is as the other has it.

    Args:
        grid: the other; where it is not one of ours, what only ours know is as if nobody knew.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid.run.run_id)
        self._grid = grid
        self._known = grid if isinstance(grid, BaseGrid) else None

    @property
    def run(self) -> Run:
        """The other Grid's run."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Operate in another run."""
        self._grid.set_run(run)

    def get_node_ids(self) -> list[int]:
        """Whom the other Grid reaches."""
        return list(self._grid.get_node_ids())

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Ask through the other Grid."""
        return list(self._grid.send_and_receive(messages, timeout=timeout))

    def holder_name(self, node_id: int) -> str:
        """The name that the other Grid knows."""
        return holder_name(self._grid, node_id)

    def answered_by(self, reply: Message) -> Sequence[int]:
        """The holders that a reply speaks for."""
        return super().answered_by(reply) if self._known is None else self._known.answered_by(reply)

    @property
    def sums_unseen(self) -> bool:
        """Whether the other Grid does."""
        return self._known is not None and self._known.sums_unseen

    def begun(self, number: int, *, evaluation: bool = False) -> Sequence[int] | None:
        """Whom the other Grid had asked."""
        return None if self._known is None else self._known.begun(number, evaluation=evaluation)

    def wait_for_change(self, present: Collection[int], timeout: float) -> list[int]:
        """Wait as the other Grid does."""
        if self._known is None:
            return super().wait_for_change(present, timeout)
        return self._known.wait_for_change(present, timeout)

    def away(self) -> list[str]:
        """Names of holders that the other Grid cannot ask now."""
        return [] if self._known is None else self._known.away()

    @property
    def complete(self) -> bool:
        """Whether the other Grid is."""
        return self._known is not None and self._known.complete

    @property
    def patience(self) -> float:
        """The other Grid's."""
        return 0.0 if self._known is None else self._known.patience

    @property
    def authority(self) -> Certificate | None:
        """The other Grid's."""
        return None if self._known is None else self._known.authority

    def push_messages(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[str]:
        """Ask through the other Grid."""
        if self._known is None:
            return super().push_messages(messages, timeout=timeout)
        return self._known.push_messages(messages, timeout=timeout)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies that have come to the other Grid."""
        if self._known is None:
            return super().pull_messages(message_ids)
        return self._known.pull_messages(message_ids)

    def wait(self, message_ids: Iterable[str], timeout: float) -> None:
        """Until the other Grid has a reply."""
        if self._known is not None:
            self._known.wait(message_ids, timeout)

    def overdue(self, message_ids: Iterable[str]) -> list[str]:
        """Requests that the other Grid will have no reply to."""
        if self._known is None:
            return super().overdue(message_ids)
        return self._known.overdue(message_ids)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Withdraw requests from the other Grid."""
        if self._known is None:
            super().forget(message_ids)
        else:
            self._known.forget(message_ids)


def wait_for_change(grid: Grid, present: Collection[int], timeout: float) -> list[int]:
    """Wait until a Grid reaches others than it did, by looking again and again.

    Args:
        grid: Flower's or ours.
        present: node ids at the last look.
        timeout: seconds.
    """
    deadline = time.monotonic() + timeout
    while (found := sorted(grid.get_node_ids())) == sorted(present):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        time.sleep(min(_POLL, left))
    return found


def holder_name(grid: Grid, node_id: int) -> str:
    """The holder's name where the Grid knows names."""
    return grid.holder_name(node_id) if isinstance(grid, BaseGrid) else f"node-{node_id}"
