"""A holder that stays: joined to its coordinator, answering, until a signal ends it."""

from __future__ import annotations

import signal
import time
from collections import OrderedDict
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from common.link.keepalive import KEEPALIVE
from sotto.pages import metrics_page
from sotto.show import Screen, figure

if TYPE_CHECKING:
    from flwr.app import Message

    from client.holder import Holder
    from client.metrics import HolderMetrics
    from client.node import Backoff, Handler, Node, NodeEvent, Replied
    from client.secure import Participant
    from common.link.keys import HolderKeys

__all__ = ["stay"]

OWN_NETWORK = (
    "That page holds timings and ε, which are about the data: keep it within the holder's own "
    "network."
)

_REMEMBERED = 16  # requests whose rounds are known when they are answered
_SAY_AGAIN = 60.0  # seconds; attempts to connect come every second or two


def stay(
    screen: Screen,
    holder: Holder,
    server: str,
    keys: HolderKeys | None,
    *,
    metrics: str | None = None,
    wrap: Callable[[Handler], Handler] = lambda handler: handler,
    backoff: Backoff | None = None,
    keepalive: float = KEEPALIVE,
) -> None:
    """Answer a coordinator until a signal; a second one does not wait for the work in hand.

    SIGTERM and SIGINT are taken over, so this is called on the main thread.

    Args:
        screen: is told what happens.
        holder: answers; whoever made it closes its state afterwards.
        server: the coordinator's ``HOST:PORT``.
        keys: the holder's certificate; None for plain text on loopback.
        metrics: address of a page of figures; None serves none.
        wrap: goes around what answers requests; for tests.
        backoff: how long to wait between attempts to connect; None for the usual.
        keepalive: seconds of silence before the coordinator is asked whether it is there.

    Raises:
        LinkError: the coordinator refuses this holder, another process has taken its place, or the
            coordinator cannot be trusted.
    """
    from flwr.app import Context, RecordDict

    from client.app import build_app
    from client.metrics import HolderMetrics
    from client.node import Node
    from common.limits import largest_request

    participant = _participant(holder, keys)
    app, context = build_app(lambda _: participant), Context(1, 1, {}, RecordDict(), {})
    policy = holder.policy
    figures = HolderMetrics(policy.data_set, policy.budget, holder.spent, lambda: node.traffic)
    voice = _Voice(screen, holder, keys, figures)

    def answer(message: Message) -> Message:
        voice.asked(message)
        return app(message, context)

    node = Node(
        server,
        wrap(answer),
        keys=keys,
        name=holder.name,
        task=holder.task.name,
        on_event=voice.told,
        backoff=backoff,
        max_message_bytes=largest_request(holder.task),
        keepalive=keepalive,
    )
    holder.trainer.on_step = node.progressed
    holder.on_phase = figures.phase
    _leave_on_signals(node)
    with metrics_page(screen, metrics, figures, OWN_NETWORK):
        node.run()
    screen.say(f"{holder.name}: left.", "left", holder=holder.name)


def _participant(holder: Holder, keys: HolderKeys | None) -> Participant:
    """The holder with its signing key; without TLS there is none."""
    from client.secure import Participant
    from common.link.signing import Identity, Trust

    if keys is None:
        return Participant.unsigned(holder)
    trust = Trust(keys.authority, frozenset(holder.policy.holders))
    return Participant(holder, lambda: Identity.of(keys), trust)


def _leave_on_signals(node: Node) -> None:
    signalled = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal signalled
        del number, frame
        node.stop(now=signalled)
        signalled = True

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)


class _Voice:
    """Tells people, machines and the ledger what the node does.

    Args:
        screen: for people, or their log.
        holder: whose node it is.
        keys: of the holder; None where there is no TLS.
        figures: for Prometheus.
    """

    def __init__(
        self, screen: Screen, holder: Holder, keys: HolderKeys | None, figures: HolderMetrics
    ) -> None:
        self._screen, self._holder, self._keys, self._figures = screen, holder, keys, figures
        self._rounds: OrderedDict[str, tuple[str, int]] = OrderedDict()
        self._outage = ("", 0.0)  # why there is no connection, and when that was said last

    def asked(self, message: Message) -> None:
        """A request is about to be answered; called on the worker's thread.

        The node knows nothing of rounds, so which one a request is of is kept until its reply.
        """
        from common.errors import WireError
        from common.wire import round_of

        records = message.content.config_records.values() if message.has_content() else ()
        for record in records:
            try:
                self._rounds[message.metadata.message_id] = round_of(record)
            except WireError:
                continue
        while len(self._rounds) > _REMEMBERED:
            self._rounds.popitem(last=False)

    def told(self, event: NodeEvent) -> None:
        """Something has happened; called on the node's thread."""
        from client.node import Connected, Disconnected, Replied

        if isinstance(event, Connected):
            self._note_keys()
            self._figures.connected(now=True)
            self._outage = ("", 0.0)
            who, federation = event.holder, event.federation
            proxy = {"proxy": event.proxy} if event.proxy else {}
            way = f" through the proxy {event.proxy}" if event.proxy else ""
            sentence = f"{who}: joined {federation}{way}."
            self._screen.say(sentence, "joined", holder=who, federation=federation, **proxy)
        elif isinstance(event, Disconnected):
            self._figures.connected(now=False)
            self._say_disconnected(event.reason, event.retry_in)
        elif isinstance(event, Replied):
            run_and_round = self._rounds.get(event.message_id)
            self._figures.replied(event, run_and_round[1] if run_and_round else None)
            if event.error is not None or not self._screen.quiet:
                self._say_replied(event, run_and_round)

    def _note_keys(self) -> None:
        """Have the ledger say whose it is and which keys it shows, before anything leaves.

        Where it cannot, the work goes on: the entry protects nobody.
        """
        from common.errors import LinkError, StateError
        from sotto.keys_report import keys_sentence

        name = self._holder.name
        try:
            self._holder.state.ledger.note_holder(name, keys_sentence(self._keys))
        except (LinkError, StateError) as error:
            self._screen.say(
                f"{name}: the ledger does not say which keys it shows: {error}.",
                "keys_not_noted",
                holder=name,
                reason=str(error),
            )

    def _say_disconnected(self, reason: str, retry_in: float) -> None:
        """Why, and when the next attempt comes: once, and then once a minute while it stays so."""
        now, name = time.monotonic(), self._holder.name
        before, said = self._outage
        if reason == before and now - said < _SAY_AGAIN:
            return
        self._outage = (reason, now)
        self._screen.say(
            f"{name}: {reason}; trying again in {retry_in:.1f} s.",
            "disconnected",
            holder=name,
            reason=reason,
            retry_in_seconds=retry_in,
        )

    def _say_replied(self, event: Replied, run_and_round: tuple[str, int] | None) -> None:
        from client.metrics import outcome_of

        outcome, rule = outcome_of(event)
        run, number = run_and_round or (None, None)
        how = f"done in {event.seconds:.2f} s"
        fields: dict[str, object] = {
            "holder": self._holder.name,
            "request": event.message_type,
            "run": run,
            "round": number,
            "seconds": event.seconds,
        }
        if event.error is not None:
            how = f"{outcome} ({event.error})"
            fields |= {"rule": rule or None, "reason": event.error}
        account = ""
        if (spent := self._spent()) is not None:
            account, more = spent
            fields |= more
        sentence = f"{self._holder.name}: {event.message_type} {how}{account}."
        self._screen.say(sentence, "answered" if outcome == "done" else outcome, **fields)

    def _spent(self) -> tuple[str, dict[str, object]] | None:
        """What the account says, in words and as fields; None without a budget or a ledger."""
        from common.errors import StateError

        policy = self._holder.policy
        if (budget := policy.budget) is None:
            return None
        try:
            spent = self._holder.spent()
        except StateError:  # the disk is full or gone: the reply has said so
            return None
        figures = {"epsilon_spent": spent, "epsilon_budget": budget.epsilon}
        words = f"; ε spent {figure(spent, 2)} of {budget.epsilon:g}"
        return words, {"data_set": policy.data_set, **figures}
