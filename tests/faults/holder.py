"""A holder's process for these tests: ``sotto join`` but for its randomness.

Noise of a deployment is unpredictable on purpose, so that no two runs end with the same bits. Here
it is a function of seed, holder, round and purpose; everything else is what ``sotto join`` runs:
keys, policy, ledger, answers, trainer and link. And it takes down which models it was shown.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import client.app
from client.holder import Contribution, Holder, RandomnessFor
from client.policy import Policy
from client.requests import Request
from client.secure import Participant
from client.state import HolderState
from common.durable import locked
from common.link.certificates import fingerprint
from common.link.keys import HolderKeys
from common.privacy.noise import SeededRandomness
from common.tasks import load
from common.wire import CONFIG, RoundRequest, round_of
from sotto.join import own_tables
from sotto.options import Output
from sotto.resident import stay
from sotto.show import Screen

__all__ = ["Act", "Joined", "Noted", "Seat", "Signal", "Tap", "Trap", "join", "part_path"]

App = Callable[[Message, Context], Message]

Tap = Callable[[Message, Callable[[], Message]], Message]
"""Stands between the link and the holder's ClientApp: gets a request, and what answers it."""

Act = Callable[[], object]
"""What a :class:`Trap` does."""


@dataclass(frozen=True)
class Seat:
    """Which holder to be.

    Args:
        name: as in its certificate, and of the source's part that it plays.
        server: ``HOST:PORT`` of the coordinator, or of what stands between.
        state: its folder, with its keys.
        notes: a file for every model it was shown, a line each.
        task: name of the task.
        source: of the task.
        policy: what it allows, beside its data set's name.
        seed: of its randomness.
        taps: between the link and the ClientApp, the first outermost.
        parts: a folder for what it gave to masked sums; None to keep nothing.
    """

    name: str
    server: str
    state: Path
    notes: Path
    task: str
    source: str
    policy: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    taps: tuple[Tap, ...] = ()
    parts: Path | None = None


def join(seat: Seat) -> None:
    """Hold data and answer the coordinator until stopped."""
    keys = HolderKeys.load(seat.state)
    task = load(seat.task, seat.source)
    own = own_tables(task, None, seat.name, None, 0)
    size = task.source.nominal_size(None)
    rules = Policy.model_validate({"data_set": "default", "size_class": size, **seat.policy})
    # This is the one place where `stay` looks for it.
    client.app.build_app = _tapped(client.app.build_app, (Noted(seat.notes), *seat.taps))  # type: ignore[assignment]
    with locked(seat.state, "sotto join"), HolderState.at(seat.state) as state:
        holder = Holder(
            seat.name,
            task,
            task.prepare(own),
            rules,
            state,
            torch.device("cpu"),
            coordinator=fingerprint(keys.authority),
            randomness=_seeded(seat, "training"),
            evaluation_randomness=_seeded(seat, "evaluation"),
            seed=seat.seed,
            rows=own.train,
        )
        holder.trainer.warm_up()
        if seat.parts is not None:
            _keep_parts(holder, seat.parts)
        stay(Screen(Output()), holder, seat.server, keys)


def _seeded(seat: Seat, purpose: str) -> RandomnessFor:
    """The same for the same round, however often it is asked for and whatever the run is called."""

    def randomness(request: Request) -> SeededRandomness:
        return SeededRandomness(f"faults {purpose}", seat.seed, seat.name, request.round)

    return randomness


def part_path(folder: Path, name: str, number: int) -> Path:
    """Where a holder keeps what it gave to a round's sum, [D] ring elements."""
    return folder / f"{name}-{number:06d}.npy"


def _keep_parts(holder: Holder, folder: Path) -> None:
    """Write down every part of a sum, in the clear, before it is masked."""
    real = holder.contribution

    def contribution(request: RoundRequest) -> Contribution:
        given = real(request)
        np.save(part_path(folder, holder.name, request.round), given.vector)
        return given

    holder.contribution = contribution  # type: ignore[method-assign]


def _tapped(build_app: Callable[..., ClientApp], taps: Sequence[Tap]) -> Callable[..., App]:
    """Make of the function that makes a holder's ClientApp one whose apps are tapped."""

    def build(find: Callable[[Context], Participant]) -> App:
        app = build_app(find)

        def answer(message: Message, context: Context) -> Message:
            reply: Callable[[], Message] = partial(app, message, context)
            for tap in reversed(taps):
                reply = partial(tap, message, reply)
            return reply()

        return answer

    return build


@dataclass(frozen=True)
class Noted:
    """A tap: takes down which model the holder was shown, for what, and in which round.

    Args:
        path: of a file of JSON lines.
    """

    path: Path

    def __call__(self, message: Message, answer: Callable[[], Message]) -> Message:
        """Note it, then answer."""
        kind = message.metadata.message_type
        if kind in ("train", "evaluate"):
            request = RoundRequest.of(message)
            model = hashlib.sha256(request.parameters.tobytes()).hexdigest()
            line = {"kind": kind, "round": request.round, "model": model}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return answer()


@dataclass
class Trap:
    """A tap: something happens when the holder is asked something in some round, the first time.

    Args:
        kind: type of the message, such as ``train`` or ``query.share_keys``.
        round: of it; None for any.
        act: what happens.
        answered: whether the answer is made first; it has not left then.
        again: whether it happens every time.
    """

    kind: str
    round: int | None
    act: Act = field(default_factory=lambda: Signal())
    answered: bool = False
    again: bool = False
    _sprung: bool = False

    def __call__(self, message: Message, answer: Callable[[], Message]) -> Message:
        """Answer, and act before or after."""
        here = message.metadata.message_type == self.kind
        here = here and self.round in (None, _round_of(message))
        if not here or self._sprung:
            return answer()
        self._sprung = not self.again
        if not self.answered:
            self.act()
            return answer()
        reply = answer()
        self.act()
        return reply


@dataclass(frozen=True)
class Signal:
    """An act: a signal to a process.

    Args:
        number: of the signal.
        to: a file with the pid; None for the process that acts.
    """

    number: int = signal.SIGKILL
    to: Path | None = None

    def __call__(self) -> None:
        """Send it."""
        os.kill(int(self.to.read_text()) if self.to else os.getpid(), self.number)


@dataclass(frozen=True)
class Joined:
    """An act: waiting until so many holders have joined.

    Args:
        folder: of everybody's logs.
        count: of holders.
        patience: seconds, after which it gives up.
    """

    folder: Path
    count: int
    patience: float

    def __call__(self) -> None:
        """Wait."""
        deadline = time.monotonic() + self.patience
        while sum("joined" in log.read_text() for log in self.folder.glob("*.log")) < self.count:
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)


def _round_of(message: Message) -> int:
    return round_of(message.content.get(CONFIG))[1]
