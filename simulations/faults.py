"""Holders that stay silent, come late or lie: a Grid around a simulation's Grid.

A lie is told with the update, which the Grid forges, or with the rows that it is computed from,
which the experiment poisons before anything is trained; both are entries of :data:`ATTACKS`.

Who fails in a round, and how long an answer takes, is decided by the plan's seed, the round and the
holder's name alone, so it is the same for every engine, whoever else is asked, and after a restart.
Time is simulated: nobody sleeps. Only training is disturbed; an evaluation reaches everybody.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pandas as pd
from flwr.app import Message, MessageType

from common.data.schema import Schema
from common.errors import ConfigurationError, WireError
from common.flower import Around, BaseGrid
from common.plan import TrainingPlan
from common.secagg.wire import STEPS, message_type_of
from common.tasks.base import HolderTables, Task, derived_seed, generator
from common.wire import RoundRequest, TrainReply

__all__ = [
    "ATTACKS",
    "EXCHANGES",
    "Attack",
    "Byzantine",
    "Faults",
    "FaultyGrid",
    "Pace",
    "RoundFaults",
    "Straggle",
]

EXCHANGES = (
    *map(message_type_of, STEPS[:2]),
    MessageType.TRAIN,
    *map(message_type_of, STEPS[2:]),
)
"""Message types of a masked round's exchanges, in order."""

Updates = npt.NDArray[np.float32]
"""One flat update a row: [M, D]."""


# -- attacks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Honest:
    """What the malicious holders of a round have before they lie.

    Args:
        updates: their honest updates, [M, D].
        strength: of the attack.
        draws: a generator for each, of its own.
        longest: L2 norm above which the coordinator rejects an update; public, like the plan.
    """

    updates: Updates
    strength: float
    draws: Sequence[np.random.Generator]
    longest: float


@dataclass(frozen=True)
class Attack:
    """One attack.

    Args:
        forge: what is sent instead of the honest updates, [M, D].
        strength: unless a user sets it; None if the attack has none.
        source: who described it.
        poison: what a malicious holder trains on instead of its own rows, from these and their
            schema; None if it trains honestly.
    """

    forge: Callable[[Honest], npt.NDArray[np.floating]]
    strength: float | None = None
    source: str = ""
    poison: Callable[[pd.DataFrame, Schema], pd.DataFrame] | None = None


def _noise(honest: Honest) -> npt.NDArray[np.floating]:
    """Gaussian; ``strength`` times as long as the honest update, on average."""
    dimension = honest.updates.shape[1]
    deviations = honest.strength * np.linalg.norm(honest.updates, axis=1) / math.sqrt(dimension)
    return np.stack(
        [
            own.normal(0.0, size, dimension)
            for own, size in zip(honest.draws, deviations, strict=True)
        ]
    )


def _little(honest: Honest) -> npt.NDArray[np.floating]:
    """All send mean − z·std of what they would have sent: near enough to look honest."""
    mean, deviation = honest.updates.mean(0), honest.updates.std(0)
    return np.broadcast_to(mean - honest.strength * deviation, honest.updates.shape)


SHORT = 1e-3
"""By so much less than the bound a forged update stays, so that rounding cannot take it past."""


def _longest(honest: Honest) -> npt.NDArray[np.floating]:
    """Against the honest update, as far as the coordinator lets anybody go."""
    updates = honest.updates.astype(np.float64)
    norms = np.maximum(np.linalg.norm(updates, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    forged: npt.NDArray[np.float64] = -(1 - SHORT) * honest.longest * (updates / norms)
    return forged


def _flipped(rows: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """The same rows, each with the other label."""
    column = schema.label
    assert column is not None, "Byzantine.check refuses tasks without a label"
    cells, (one, other) = rows[column.name], column.categories
    flipped = cells.map({one: other, other: one}).astype(cells.dtype)
    return rows.assign(**{column.name: flipped})


ATTACKS: Mapping[str, Attack] = {
    "sign-flip": Attack(lambda honest: -honest.updates, source="Li et al. 2019 (RSA)"),
    "scale": Attack(
        lambda honest: honest.strength * honest.updates, 10.0, "Bagdasaryan et al. 2020, boosting"
    ),
    "noise": Attack(_noise, 1.0, "Blanchard et al. 2017, Gaussian"),
    "nan": Attack(lambda honest: np.full_like(honest.updates, np.nan)),
    "zero": Attack(
        lambda honest: np.zeros_like(honest.updates), source="Lin et al. 2019, free rider"
    ),
    # 1.5 is what the authors' own program takes (moranant/attacking_distributed_learning).
    "little": Attack(_little, 1.5, "Baruch et al. 2019"),
    "longest": Attack(_longest, source="Sun et al. 2019, an attacker that knows the bound"),
    "label-flip": Attack(
        lambda honest: honest.updates, source="Tolpegin et al. 2020", poison=_flipped
    ),
}
"""Name → what a malicious holder does."""


# -- settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """How long a holder takes for its answer: always the same, log-normal over the holders.

    With σ = 1 the slowest of a hundred takes some hundred times as long as the fastest; with 0.2,
    not three times.

    Args:
        median_seconds: of an answer of the holder in the middle.
        sigma: σ, the standard deviation of the times' logarithms; 0 if all are alike.

    Raises:
        ConfigurationError: no length of time, or no deviation.
    """

    median_seconds: float
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.median_seconds) and self.median_seconds > 0):
            raise ConfigurationError(
                f"pace: SECONDS must be a positive number, got {self.median_seconds:g}"
            )
        if not 0 <= self.sigma <= LARGEST_SIGMA:
            raise ConfigurationError(
                f"pace: SIGMA must be from 0 to {LARGEST_SIGMA:g}, got {self.sigma:g}"
            )

    @classmethod
    def parsed(cls, text: str) -> Pace:
        """``SECONDS`` or ``SECONDS:SIGMA``; raises ConfigurationError."""
        seconds, _, sigma = text.partition(":")
        return cls(_number("pace", "SECONDS", seconds), _number("pace", "SIGMA", sigma or "0"))

    def seconds(self, seed: int, name: str) -> float:
        """Of every answer of a holder."""
        share = _uniform("pace", seed, name) + 2.0**-54  # in (0, 1)
        return self.median_seconds * math.exp(self.sigma * NormalDist().inv_cdf(share))


LARGEST_SIGMA = 5.0
"""Beyond it the slowest of a hundred takes ten thousand million times as long as the fastest."""


@dataclass(frozen=True)
class Straggle:
    """Answers that take longer.

    Args:
        probability: that a holder's answer of a round does.
        mean_seconds: of the extra time, which is exponentially distributed.

    Raises:
        ConfigurationError: no probability, or no length of time.
    """

    probability: float
    mean_seconds: float

    def __post_init__(self) -> None:
        _require_share("straggle", "probability", self.probability)
        if not (math.isfinite(self.mean_seconds) and self.mean_seconds > 0):
            raise ConfigurationError(
                f"straggle: SECONDS must be a positive number, got {self.mean_seconds:g}"
            )

    @classmethod
    def parsed(cls, text: str) -> Straggle:
        """``P:SECONDS``; raises ConfigurationError."""
        probability, found, seconds = text.partition(":")
        if not found:
            raise ConfigurationError(f"straggle must be P:SECONDS, as in 0.2:30, got {text!r}")
        return cls(_number("straggle", "P", probability), _number("straggle", "SECONDS", seconds))

    def delay(self, *who: object) -> float:
        """Extra seconds of the answer that ``who`` names; 0 if it does not straggle."""
        if _uniform("straggle", *who) >= self.probability:
            return 0.0
        return -self.mean_seconds * math.log1p(-_uniform("delay", *who))


@dataclass(frozen=True)
class Byzantine:
    """Holders that lie in every round that they are asked in.

    Args:
        share: of the holders.
        attack: a key of :data:`ATTACKS`.
        strength: of the attack; None for its own default.

    Raises:
        ConfigurationError: no share, no such attack, or one that has no strength to set.
    """

    share: float
    attack: str
    strength: float | None = None

    def __post_init__(self) -> None:
        _require_share("byzantine", "share", self.share)
        if self.attack not in ATTACKS:
            close = get_close_matches(self.attack, ATTACKS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigurationError(
                f"byzantine: there is no attack {self.attack!r}.{hint} There are: "
                f"{', '.join(ATTACKS)}"
            )
        if self.strength is None:
            object.__setattr__(self, "strength", ATTACKS[self.attack].strength)
        elif ATTACKS[self.attack].strength is None:
            tunable = ", ".join(name for name, kind in ATTACKS.items() if kind.strength is not None)
            raise ConfigurationError(
                f"byzantine: attack {self.attack!r} takes no number, got {self.strength:g}; "
                f"those that do are {tunable}"
            )
        elif not math.isfinite(self.strength):
            raise ConfigurationError(
                f"byzantine: the number of an attack must be finite, got {self.strength:g}"
            )

    @classmethod
    def parsed(cls, text: str) -> Byzantine:
        """``P:ATTACK`` or ``P:ATTACK:NUMBER``; raises ConfigurationError."""
        share, *attack = text.split(":", maxsplit=2)
        if not attack:
            raise ConfigurationError(
                f"byzantine must be P:ATTACK, as in 0.2:sign-flip, got {text!r}; attacks are "
                f"{', '.join(ATTACKS)}"
            )
        name, *strength = attack
        return cls(
            _number("byzantine", "P", share),
            name,
            _number("byzantine", name, strength[0]) if strength else None,
        )

    def malicious(self, names: Iterable[str], seed: int) -> frozenset[str]:
        """Who lies: ⌊share · n + ½⌋ of n holders, the same in the whole run."""
        everyone = sorted(names)
        count = math.floor(self.share * len(everyone) + 0.5)
        return frozenset(random.Random(derived_seed("byzantine", seed)).sample(everyone, count))

    def forged(
        self, updates: Updates, draws: Sequence[np.random.Generator], longest: float
    ) -> Updates:
        """What is sent instead of honest ``updates``: [M, D].

        Args:
            updates: [M, D].
            draws: a generator for each.
            longest: L2 norm that the coordinator accepts.
        """
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is rejected
            forge = ATTACKS[self.attack].forge
            return forge(Honest(updates, self.strength or 0.0, draws, longest)).astype(np.float32)

    @property
    def poisons(self) -> bool:
        """Whether the lie is in the rows that malicious holders train on."""
        return ATTACKS[self.attack].poison is not None

    def check(self, task: Task) -> None:
        """Refuse a task that has nothing for the attack to poison.

        Raises:
            ConfigurationError: says what the attack needs.
        """
        column = task.schema.label
        if not self.poisons or (column is not None and len(column.categories) == 2):
            return
        found = "no label" if column is None else f"one of {len(column.categories)} values"
        others = ", ".join(name for name, kind in ATTACKS.items() if kind.poison is None)
        raise ConfigurationError(
            f"byzantine: attack {self.attack!r} needs a task whose label has two values, and "
            f"{task.name!r} has {found}; attacks that work on every task are {others}"
        )

    def check_seen(self, plan: TrainingPlan) -> None:
        """Refuse a plan under which nobody sees an update that could be a lie.

        Raises:
            ConfigurationError: says which attacks there are.
        """
        if plan.aggregation.kind == "plain" or self.poisons:
            return
        poisoning = ", ".join(name for name, kind in ATTACKS.items() if kind.poison is not None)
        raise ConfigurationError(
            f"byzantine: attack {self.attack!r} forges updates, and under aggregation "
            f"{plan.aggregation.kind!r} they are masked, so that nobody could tell a forged one or "
            f"bound what it does to the sum; attacks on a holder's own rows work: {poisoning}"
        )

    def poisoned(self, tables: HolderTables, schema: Schema) -> HolderTables:
        """A malicious holder's rows: those that it trains on are poisoned, held-out ones are true.

        Args:
            tables: its own, split.
            schema: of the tables.
        """
        poison = ATTACKS[self.attack].poison
        return tables if poison is None else replace(tables, train=poison(tables.train, schema))


@dataclass(frozen=True)
class Faults:
    """What goes wrong in a simulation.

    Args:
        dropout: probability that a holder asked to train stays silent.
        straggle: answers that take longer; None for none.
        byzantine: holders that lie; None for none.
        pace: how long answers take; None for no time at all.

    Raises:
        ConfigurationError: ``dropout`` is no probability.
    """

    dropout: float = 0.0
    straggle: Straggle | None = None
    byzantine: Byzantine | None = None
    pace: Pace | None = None

    def __post_init__(self) -> None:
        _require_share("dropout", "probability", self.dropout)

    def silent(self, *who: object) -> bool:
        """Whether the holder and round that ``who`` names stay without an answer."""
        return _uniform("dropout", *who) < self.dropout

    def leaves(self, *who: object) -> int:
        """At which exchange of a masked round a silent holder falls silent, any with one chance.

        Returns:
            A place in :data:`EXCHANGES`; their number if it stays to the end.
        """
        number = len(EXCHANGES)
        return math.floor(_uniform("exchange", *who) * number) if self.silent(*who) else number

    def delay(self, seed: int, number: int, name: str) -> float:
        """Seconds until a holder's answer of round ``number``."""
        usual = self.pace.seconds(seed, name) if self.pace else 0.0
        return usual + (self.straggle.delay(seed, number, name) if self.straggle else 0.0)

    @classmethod
    def parsed(
        cls,
        dropout: float | None,
        straggle: str | None,
        byzantine: str | None,
        pace: str | None = None,
    ) -> Faults | None:
        """From the flags of ``sotto simulate``; None if none was given.

        Raises:
            ConfigurationError: says what a flag may be.
        """
        if dropout is None and straggle is None and byzantine is None and pace is None:
            return None
        return cls(
            dropout or 0.0,
            None if straggle is None else Straggle.parsed(straggle),
            None if byzantine is None else Byzantine.parsed(byzantine),
            None if pace is None else Pace.parsed(pace),
        )


def _require_share(fault: str, what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigurationError(f"{fault}: the {what} must be from 0 to 1, got {value:g}")


def _number(fault: str, what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigurationError(f"{fault}: {what} must be a number, got {text!r}") from None


def _uniform(*parts: object) -> float:
    """A number in [0, 1) that ``parts`` decide."""
    return (derived_seed(*parts) >> 10) / 2**53


# -- the Grid -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundFaults:
    """What went wrong in one round.

    Args:
        dropped: holders that stayed silent.
        late: holders that worked, and whose answers came after the deadline.
        attacked: updates of malicious holders that came in time.
        waited: simulated seconds until the last answer that came in time.
        spare: holders that worked, and whose answers came when the round had closed.
    """

    dropped: int
    late: int
    attacked: int
    waited: float
    spare: int = 0


@dataclass(frozen=True, order=True)
class _Coming:
    """An answer on its way.

    Args:
        seconds: when it comes.
        place: decides between answers that come at the same time.
        message: the request.
    """

    seconds: float
    place: float
    message: Message = field(compare=False)


@dataclass
class _Cast:
    """Who does what in a round.

    Args:
        late: requests whose answers nobody will see.
        malicious: requests whose answers are forged.
        honest: all others that are answered.
        waited: simulated seconds until the last answer that counts.
    """

    late: list[Message] = field(default_factory=list)
    malicious: list[Message] = field(default_factory=list)
    honest: list[Message] = field(default_factory=list)
    waited: float = 0.0


class FaultyGrid(Around):
    """Another Grid, whose holders fail as they are told to when they are asked to train.

    One that stays silent is not asked: its privacy and its private parameters stay where they are.
    One that is late is asked and works, so its privacy is spent, and its answer is thrown away.
    :meth:`now` is simulated time: a round that lacks an answer lasts until its deadline.

    Args:
        grid: reaches the holders, all of whom are there from the beginning.
        faults: what goes wrong.
        seed: of the plan.
        happened: what went wrong in a round is appended here.
    """

    def __init__(
        self, grid: BaseGrid, faults: Faults, seed: int, happened: list[RoundFaults]
    ) -> None:
        super().__init__(grid)
        self._grid: BaseGrid = grid
        self._faults, self._seed, self._happened = faults, seed, happened
        names = [grid.holder_name(node) for node in grid.get_node_ids()]
        byzantine = faults.byzantine
        self._malicious = byzantine.malicious(names, seed) if byzantine else frozenset[str]()
        self._clock = 0.0

    def now(self) -> float:
        """Simulated seconds since the run began."""
        return self._clock

    # -- with faults -------------------------------------------------------------------------

    def replies(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: int | None = None,
    ) -> Iterator[Message]:
        """The replies that come in time, or the first of them where so many are enough."""
        asked = list(messages)
        if enough is None or not asked or asked[0].metadata.message_type != MessageType.TRAIN:
            yield from self.send_and_receive(asked, timeout=timeout)
        else:
            yield from self._first(asked, enough, timeout)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """The replies that come in time, some of them forged."""
        return self._ask(list(messages), timeout, self._grid.send_and_receive)

    def individually(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """The same, with a reply from each holder."""
        return self._ask(list(messages), timeout, self._grid.individually)

    def _ask(
        self, messages: Sequence[Message], timeout: float | None, ask: Callable[..., list[Message]]
    ) -> list[Message]:
        if not messages or messages[0].metadata.message_type != MessageType.TRAIN:
            return ask(messages, timeout=timeout)
        request = RoundRequest.of(messages[0])  # they differ in nothing but the addressee
        cast = self._cast(messages, request.round, timeout)
        # What is thrown away or forged must not be in a sum.
        apart = self._grid.individually([*cast.late, *cast.malicious], timeout=timeout)
        late = {message.metadata.message_id for message in cast.late}
        in_time = [reply for reply in apart if reply.metadata.reply_to_message_id not in late]
        attacked = self._forge(in_time, request)
        dropped = len(messages) - len(cast.honest) - len(cast.malicious) - len(cast.late)
        self._happened.append(RoundFaults(dropped, len(cast.late), attacked, cast.waited))
        lacking = timeout is not None and (dropped or cast.late)
        self._clock += timeout if timeout is not None and lacking else cast.waited
        return [*in_time, *ask(cast.honest, timeout=timeout)]

    def _first(
        self, messages: Sequence[Message], enough: int, timeout: float | None
    ) -> list[Message]:
        """The first replies without an error; whoever comes later has worked for nothing."""
        request = RoundRequest.of(messages[0])
        coming = self._coming(messages, request.round)
        end = math.inf if timeout is None else timeout
        in_time = [one for one in coming if one.seconds <= end]
        replies, found, taken, attacked = list[Message](), 0, 0, 0
        while found < enough and taken < len(in_time):
            some = [one.message for one in in_time[taken : taken + enough - found]]
            taken += len(some)
            answers, lies = self._answered(some, request)
            replies, attacked = [*replies, *answers], attacked + lies
            found += sum(len(self.answered_by(one)) for one in answers if not one.has_error())
        self._grid.individually([one.message for one in coming[taken:]])
        waited = in_time[taken - 1].seconds if taken else 0.0
        lacking = found < enough and len(in_time) < len(messages)
        self._clock += end if lacking and timeout is not None else waited
        dropped, late = len(messages) - len(coming), len(coming) - len(in_time)
        spare = len(in_time) - taken
        self._happened.append(RoundFaults(dropped, late, attacked, waited, spare))
        return replies

    def _coming(self, messages: Sequence[Message], number: int) -> list[_Coming]:
        """The answers to round ``number``, by time; silent holders have none."""
        named = [
            (message, (self._seed, number, self.holder_name(message.metadata.dst_node_id)))
            for message in messages
        ]
        return sorted(
            _Coming(self._faults.delay(*who), _uniform("place", *who), message)
            for message, who in named
            if not self._faults.silent(*who)
        )

    def _answered(
        self, messages: Sequence[Message], request: RoundRequest
    ) -> tuple[list[Message], int]:
        """Everybody's replies, some of them forged, and how many are."""
        lying, honest = list[Message](), list[Message]()
        for message in messages:
            name = self.holder_name(message.metadata.dst_node_id)
            (lying if name in self._malicious else honest).append(message)
        # What is forged must not be in a sum.
        apart = self._grid.individually(lying)
        attacked = self._forge(apart, request)
        return [*apart, *self._grid.send_and_receive(honest)], attacked

    def _cast(self, messages: Sequence[Message], number: int, timeout: float | None) -> _Cast:
        """What becomes of every request of round ``number``."""
        faults, cast = self._faults, _Cast()
        for message in messages:
            name = self.holder_name(message.metadata.dst_node_id)
            who = (self._seed, number, name)
            if faults.silent(*who):
                continue
            delay = faults.delay(*who)
            if timeout is not None and delay > timeout:
                cast.late.append(message)
                continue
            cast.waited = max(cast.waited, delay)
            (cast.malicious if name in self._malicious else cast.honest).append(message)
        return cast

    def _forge(self, replies: Sequence[Message], request: RoundRequest) -> int:
        """Replace the updates of malicious holders; how many there were.

        A holder whose honest reply cannot count has nothing to forge.
        """
        byzantine = self._faults.byzantine
        honest = [(reply, own) for reply in replies if (own := _honest(reply, request))]
        if byzantine is None or not honest:
            return 0
        names = [self.holder_name(reply.metadata.src_node_id) for reply, _ in honest]
        draws = [generator("attack", self._seed, request.round, name) for name in names]
        updates = np.stack([own.update for _, own in honest])
        longest = request.plan.largest_update_norm(updates.shape[1], request.clip_norm)
        forged = byzantine.forged(updates, draws, longest)
        for (reply, own), update in zip(honest, forged, strict=True):
            reply.content = replace(own, update=update).records()
        return len(honest)


def _honest(reply: Message, request: RoundRequest) -> TrainReply | None:
    """The update of a reply that the round loop would accept."""
    if reply.has_error():
        return None
    try:
        return TrainReply.of(
            reply.content,
            request.plan,
            len(request.parameters),
            clip_norm=request.clip_norm,
        )
    except WireError:
        return None
