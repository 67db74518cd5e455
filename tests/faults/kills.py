"""One run that is killed again and again, beside the same run left alone.

A :class:`Schedule` says who is killed when: at a moment (:mod:`tests.faults.moments`), which may be
one of recovering, or after some seconds, one process or all in one instant. Whoever was killed is
started again, as an operator or systemd would. Then everything that the run left must be what the
undisturbed one left: the model to the last bit, every release at its price and once, every round's
figures. No model may have left the coordinator in two versions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from common.privacy.accounting import epsilon
from common.privacy.ledger import Ledger
from common.privacy.releases import Release
from common.settings import plan_for
from common.tasks import load
from tests.faults.forked import Fault, warm_up
from tests.faults.moments import Counted, KilledAt
from tests.faults.seeds import chance, seed
from tests.faults.world import COORDINATOR, ENDED_BY_KILL, TASK, World
from tests.integration.federation import DATA_SET, PATIENCE, SOURCE

__all__ = [
    "SETTINGS",
    "Left",
    "Schedule",
    "Setting",
    "Tally",
    "disturbed",
    "play",
    "reference",
    "require_same",
    "setting_of",
]

_POLL = 0.002  # seconds
_CLINICS = tuple(f"clinic-{number}" for number in range(1, 5))


@dataclass(frozen=True)
class Setting:
    """A plan to run, and what holds of it.

    Args:
        plan: settings of it, which `sotto serve` has as flags.
        holders: how many there are; all of them must contribute to every round.
        policy: of the holders, beside a budget that holds this run and nothing more.
        repeats: whether a second run gives the same bits: the coordinator draws nothing itself.
        killed: who may be killed; a holder that dies in a masked round has dropped out of it.
        gives_up: whether the coordinator may end with exit code 3, to be started again.
    """

    plan: Mapping[str, Any]
    holders: int = 2
    policy: Mapping[str, Any] = field(default_factory=dict)
    repeats: bool = True
    killed: str = "anybody"
    gives_up: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the holders."""
        return _CLINICS[: self.holders]

    @property
    def flags(self) -> list[str]:
        """The plan as `sotto serve` takes it."""
        flags = []
        for name, value in {"round_deadline": PATIENCE, **self._quorum, **self.plan}.items():
            flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return flags

    def world(self, folder: Path) -> World:
        """A federation for it, whose holders can afford it once."""
        task = load(TASK, SOURCE)
        plan = plan_for(task, {**self._quorum, **self.plan}, holders=None)
        policy = {"unprotected": True, "evaluation": "histogram", **self.policy}
        if plan.privacy.kind not in ("none", "central"):
            price = epsilon(plan.composition(), task.source.delta)
            policy["budget"] = {"epsilon": price * (1 + 1e-9), "delta": task.source.delta}
        return World(folder, self.names, policy=policy)

    @property
    def answers_repeat(self) -> bool:
        """Whether stored answers are the same, too; a part that left masked has a random name."""
        return self.repeats and not self._masked

    @property
    def _masked(self) -> bool:
        return self.plan.get("aggregation", "plain") != "plain"

    @property
    def _quorum(self) -> dict[str, int]:
        return {"cohort": self.holders} if self._masked else {"min_holders": self.holders}


_EVALUATED = {"evaluate": "every 2", "evaluation_epsilon": 8}

SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "fedavg": Setting(
            {"rounds": 8, "epsilon": 3, "strategy": "fedavg", "evaluate": "never"}, holders=3
        ),
        "fedadam, evaluated": Setting(
            {"rounds": 6, "epsilon": 3, "strategy": "fedadam", **_EVALUATED}
        ),
        "fedavgm, averaged": Setting(
            {
                "rounds": 8,
                "epsilon": 3,
                "strategy": "fedavgm",
                "average_from": 0.5,
                "evaluate": "never",
            }
        ),
        "central": Setting(
            {"rounds": 6, "epsilon": 8, "unit": "holder", "evaluate": "never"}, repeats=False
        ),
        "secure": Setting(
            {
                "rounds": 4,
                "epsilon": 3,
                "aggregation": "secure",
                "dropouts": 0,
                "evaluate": "never",
            },
            holders=3,
            killed=COORDINATOR,
        ),
        "secure-sum": Setting(
            {
                "rounds": 4,
                "epsilon": 3,
                "aggregation": "secure-sum",
                "dropouts": 0,
                "evaluate": "never",
            },
            holders=3,
            policy={"aggregation": ("secure-sum",)},
            killed=COORDINATOR,
        ),
    }
)


# -- what is done to a run -----------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Who is killed when.

    Args:
        moments: name → for each start of it in turn, the moment at which it is killed.
        instants: seconds after the beginning, and who is killed then, all at once.
        pauses: seconds until somebody who was killed is started again, in turn; then none.
    """

    moments: Mapping[str, Sequence[int]] = field(default_factory=dict)
    instants: Sequence[tuple[float, Sequence[str]]] = ()
    pauses: Sequence[float] = ()

    @classmethod
    def drawn(cls, chance: random.Random, setting: Setting, known: Reference) -> Schedule:
        """Two to five kills: most aimed at a moment, some of these early, in recovering.

        Args:
            chance: decides.
            setting: whom there is to kill.
            known: how long the run is, in moments and seconds, if it is left alone.
        """
        everybody = (COORDINATOR, *setting.names)
        victims = [COORDINATOR] if setting.killed == COORDINATOR else everybody
        moments: dict[str, list[int]] = {}
        instants: list[tuple[float, Sequence[str]]] = []
        kills = chance.randint(2, 5)
        for _ in range(kills):
            # The coordinator as often as all holders together.
            who = COORDINATOR if chance.random() < 0.5 else chance.choice(victims)
            if chance.random() < 0.6:
                most = known.moments[who] if chance.random() < 0.6 else 40
                moments.setdefault(who, []).append(chance.randint(1, most))
            else:
                after = chance.uniform(0.0, known.seconds * (1 + kills / 3))
                together = victims if chance.random() < 0.25 else [who]
                instants.append((after, tuple(together)))
        pauses = [chance.choice([0.0, 0.0, chance.uniform(0.0, 0.5)]) for _ in range(kills)]
        return cls(moments, sorted(instants), pauses)


@dataclass(frozen=True)
class Tally:
    """What a disturbed run took.

    Args:
        kills: processes that were killed.
        recoveries: that were started again and went on.
        seconds: from the first start to the end of the run.
    """

    kills: int
    recoveries: int
    seconds: float


def play(
    world: World,
    setting: Setting,
    schedule: Schedule,
    faults: Mapping[str, Fault] = MappingProxyType({}),
) -> Tally:
    """Run a plan to its end while processes are killed, and started again.

    Args:
        world: the federation.
        setting: its plan.
        schedule: who is killed when.
        faults: name → what else happens in each of its processes.

    Raises:
        AssertionError: a process ended that was not killed, or the run did not end.
    """
    begin = time.monotonic()
    pauses, instants = list(schedule.pauses), list(schedule.instants)
    moments = {name: list(numbers) for name, numbers in schedule.moments.items()}
    due = dict.fromkeys(world.everybody, 0.0)  # name → when to start it
    kills = starts = 0

    def start(name: str) -> None:
        nonlocal starts
        starts += 1
        del due[name]
        inside: list[Fault] = [faults[name]] if name in faults else []
        if moments.get(name):
            inside.append(KilledAt(moments[name].pop(0)))
        if name == COORDINATOR:
            world.serve(*setting.flags, faults=inside)
        else:
            world.join(name, faults=inside)

    while True:
        now = time.monotonic() - begin
        assert now < PATIENCE, f"the run did not end within {PATIENCE:g} s"
        if instants and instants[0][0] <= now:
            world.kill(*(name for name in instants.pop(0)[1] if name not in due))
        for name in world.everybody:
            if name in due or (code := world.processes[name].handle.poll()) is None:
                continue
            if (name, code) == (COORDINATOR, 0):
                break
            if not (setting.gives_up and (name, code) == (COORDINATOR, 3)):
                assert code == ENDED_BY_KILL, f"{name} ended with {code}"
                kills += 1
            due[name] = now + (pauses.pop(0) if pauses else 0.0)
        else:
            # Killed after the run was over: an operator sees that, and begins no further one.
            if not (COORDINATOR in due and world.finished):
                for name in [name for name, when in due.items() if when <= now]:
                    start(name)
                time.sleep(_POLL)
                continue
        moments.clear()  # who has died comes back once more, and stays
        for name in setting.names:
            if name in due or world.processes[name].handle.poll() is not None:
                due[name] = now
                start(name)
        return Tally(kills, starts - len(world.everybody), now)


# -- what is left of it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """What a run left, without what differs between two runs: its name, its keys, how long it took.

    Args:
        model: its parameters, bytes of float32.
        rounds: number, who was accepted, why it was lost, and figures, of each line.
        releases: holder → release, state and sha256 of the answer, of each entry.
        epsilon: holder → ε of everything.
        shown: kind and round → sha256 of every model that any holder was shown.
    """

    model: bytes
    rounds: Sequence[tuple[object, ...]]
    releases: Mapping[str, Sequence[tuple[Release, str, str]]]
    epsilon: Mapping[str, float]
    shown: Mapping[tuple[str, int], frozenset[str]]

    @classmethod
    def by(cls, world: World) -> Left:
        """Read it; the holders' processes should have ended."""
        run_id = world.run.run_id
        shown: dict[tuple[str, int], set[str]] = {}
        for name in world.names:
            for line in world.shown(name):
                shown.setdefault((line["kind"], line["round"]), set()).add(line["model"])
        return cls(
            world.parameters().tobytes(),
            [
                (line["round"], tuple(line["accepted"]), line["lost"], line["evaluation"])
                for line in world.rounds()
            ],
            {name: _releases(world, name, run_id) for name in world.names},
            {name: world.federation.account(name).epsilon for name in world.names},
            {key: frozenset(digests) for key, digests in shown.items()},
        )


def _releases(world: World, name: str, run_id: str) -> list[tuple[Release, str, str]]:
    with Ledger.open(world.federation.holder(name) / "ledger.sqlite") as ledger:
        ledger.verify()
        entries = [entry for entry in ledger.entries(DATA_SET) if entry.request_id]
    made = {entry.request_id: entry.release for entry in entries if entry.release}
    return [
        (_nameless(made[entry.request_id], run_id), entry.state, entry.reply_digest)
        for entry in entries
    ]


def _nameless(release: Release, run_id: str) -> Release:
    request, run = (each.replace(run_id, "RUN") for each in (release.request_id, release.run_id))
    return replace(release, request_id=request, run_id=run, coordinator="")


def require_same(setting: Setting, alone: Left, disturbed: Left) -> None:
    """Raise AssertionError, with every difference, if a disturbed run left anything else."""
    found = differences(setting, alone, disturbed)
    assert not found, "\n".join(found)


def differences(setting: Setting, alone: Left, disturbed: Left) -> list[str]:
    """What a disturbed run left otherwise than the undisturbed one, in sentences."""
    found = [
        f"{kind} of round {number} was asked with {len(digests)} models"
        for (kind, number), digests in disturbed.shown.items()
        if len(digests) != 1
    ]
    if setting.repeats:
        if alone.model != disturbed.model:
            found.append("the model is another")
        if dict(alone.shown) != dict(disturbed.shown):
            found.append("holders were shown other models")
    if [line[:3] for line in alone.rounds] != [line[:3] for line in disturbed.rounds]:
        found.append(f"the rounds are {[line[:3] for line in disturbed.rounds]}")
    elif setting.repeats and alone.rounds != disturbed.rounds:
        found.append("figures of the evaluation are others")
    for name in alone.releases:
        before, now = (_brief(each, name, setting) for each in (alone, disturbed))
        found += [f"the ledger of {name} lacks {entry}" for entry in before if entry not in now]
        found += [f"the ledger of {name} has {entry}" for entry in now if entry not in before]
        if len(now) != len(set(now)):
            found.append(f"the ledger of {name} has an entry twice: {now}")
        if alone.epsilon[name] != disturbed.epsilon[name]:
            found.append(f"ε of {name} is {disturbed.epsilon[name]}, not {alone.epsilon[name]}")
    return found


def _brief(left: Left, name: str, setting: Setting) -> list[str]:
    """Each entry of a ledger, in words; the answers' digests where they are to be the same."""
    return [
        f"{release!r} {state}" + (f" {digest}" if setting.answers_repeat else "")
        for release, state, digest in left.releases[name]
    ]


@dataclass(frozen=True)
class Reference:
    """The undisturbed run of a setting.

    Args:
        left: by it.
        moments: name → how many its process went through.
        seconds: that it took.
    """

    left: Left
    moments: Mapping[str, int]
    seconds: float


@cache
def reference(name: str) -> Reference:
    """Run a setting undisturbed, once for all tests of a session."""
    setting = SETTINGS[name]
    warm_up()
    with TemporaryDirectory() as folder, setting.world(Path(folder)) as world:
        counts = {who: Counted(Path(folder) / f"{who}.moments") for who in world.everybody}
        tally = play(world, setting, Schedule(), counts)
        world.leave()
        return Reference(
            Left.by(world), {who: count.read() for who, count in counts.items()}, tally.seconds
        )


def setting_of(number: int) -> str:
    """Name of the setting of a disturbed run."""
    return list(SETTINGS)[number % len(SETTINGS)]


def disturbed(number: int, folder: Path) -> Tally:
    """Play one of the session's disturbed runs and compare what it left.

    Args:
        number: of the run; it decides the setting and, with the session's seed, the kills.
        folder: for its files.

    Raises:
        AssertionError: it did not end, or left something else.
    """
    name = setting_of(number)
    setting, alone = SETTINGS[name], reference(name)
    schedule = Schedule.drawn(chance("kills", number), setting, alone)
    try:
        with setting.world(folder) as world:
            tally = play(world, setting, schedule)
            world.leave()
            require_same(setting, alone.left, Left.by(world))
    except AssertionError as error:
        error.add_note(f"run {number} of seed {seed()}: {name}, {schedule}")
        raise
    return tally
