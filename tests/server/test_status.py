from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from flwr.app import Error

from common.link.keys import CoordinatorKeys
from common.link.traffic import Traffic
from common.wire import REFUSED, error_message
from server.link.mailroom import Errand
from server.status import HolderState, Watch, kind_of_miss
from tests.linking import enrol
from tests.server.watching import Looked, plan, summary, watch


def states(seen: Watch) -> dict[str, HolderState]:
    return {holder.name: holder.state for holder in seen.status().holders}


def test_a_run_is_named_and_measured() -> None:
    status = watch(Looked(traffic=Traffic(bytes_sent=7))).status()

    assert (status.run, status.task, status.listen) == ("run-1", "tiny", "127.0.0.1:7443")
    assert status.plan == plan().digest
    assert (status.round, status.rounds, status.min_holders) == (1, 4, 2)
    assert status.traffic.bytes_sent == 7
    assert status.uptime_seconds >= status.round_seconds >= 0


def test_the_phase_follows_from_what_is_open() -> None:
    grid = Looked()
    seen = watch(grid)
    assert seen.status().phase == "waiting"

    grid.join("north", "south")
    assert seen.status().phase == "aggregating"
    grid.errands = {"north": Errand("1", "train"), "south": Errand("2", "train", "answered")}
    assert seen.status().phase == "asking"
    grid.errands["north"] = Errand("1", "train", "answered")
    assert seen.status().phase == "aggregating"
    grid.errands["north"] = Errand("3", "evaluate")
    assert seen.status().phase == "evaluating"
    grid.draining = True
    assert seen.status().phase == "stopping"


def test_the_end_is_the_last_phase() -> None:
    grid = Looked()
    seen = watch(grid)
    seen.finish()
    grid.draining = True

    assert seen.status().phase == "finished"


def test_holders_are_told_apart_by_what_they_do() -> None:
    grid = Looked()
    grid.join("a-works", "b-answered", "c-idle", "d-late")
    grid.errands = {
        "a-works": Errand("1", "train"),
        "b-answered": Errand("2", "train", "answered"),
        "d-late": Errand("3", "train", "withdrawn"),
    }
    grid.leave("e-gone", 1000.0)

    assert states(watch(grid)) == {
        "a-works": "working",
        "b-answered": "answered",
        "c-idle": "connected",
        "d-late": "connected",
        "e-gone": "away",
    }
    (gone,) = (h for h in watch(grid).status().holders if h.name == "e-gone")
    assert gone.since == 1000.0


def test_an_answer_of_the_last_round_is_none_in_this_one() -> None:
    grid = Looked()
    grid.join("north", "south")
    grid.errands = {"north": Errand("1", "train", "answered")}
    seen = watch(grid)
    assert states(seen)["north"] == "answered"

    seen.note(summary(1, "north", "south"))
    assert states(seen)["north"] == "connected"
    assert seen.status().round == 2


def test_the_roster_says_who_never_came_and_who_must_not(tmp_path: Path) -> None:
    keys = CoordinatorKeys.create_or_load(tmp_path / "coordinator")
    for name in ("north", "south", "thief"):
        enrol(tmp_path / name, keys, name)
    keys.roster.revoke("thief")
    grid = Looked()
    grid.join("north")

    seen = watch(grid, roster=keys.roster)
    assert states(seen) == {"north": "connected", "south": "never_joined", "thief": "revoked"}
    assert seen.status().counted()["never_joined"] == 1
    assert [h.enrolled for h in seen.status().holders] == [True, True, False]


def test_misses_in_a_row_come_with_the_last_reason() -> None:
    grid = Looked()
    grid.join("north")
    grid.leave("south", 0.0)
    seen = watch(grid)
    seen.note(summary(1, "north", south="no reply within 5 s"))
    seen.note(summary(2, "north", south="away when the round began"))

    north, south = seen.status().holders
    assert (north.missed_in_a_row, north.last_reason) == (0, "")
    assert (south.missed_in_a_row, south.last_reason) == (2, "away when the round began")


def test_a_status_speaks_of_the_last_rounds_only() -> None:
    seen = watch(Looked(), history=[summary(number, "north") for number in range(1, 30)], done=2)

    recent = seen.status().recent
    assert [past.round for past in recent] == list(range(20, 30))
    assert recent[-1].phases == {"exchange": 0.4, "aggregate": 0.1}
    assert seen.status().round == 3


def test_connections_beyond_the_first_are_reconnections() -> None:
    grid = Looked(traffic=Traffic(connections=5))
    grid.join("north")
    grid.leave("south", 0.0)

    assert watch(grid).status().reconnections == 3


def test_a_status_is_json() -> None:
    grid = Looked()
    grid.leave("south", 0.0)
    seen = watch(grid)
    seen.note(summary(1, "north", south="no reply within 5 s"))

    written = json.loads(json.dumps(seen.status().document(), allow_nan=False))
    assert written["holders"][0]["since"] == "1970-01-01T00:00:00.000+00:00"
    assert written["recent"][0]["missed"] == {"south": "no reply within 5 s"}
    assert written.keys() == asdict(seen.status()).keys()


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("away when the round began", "away"),
        ("no reply within 5 s", "silent"),
        (error_message(Error(REFUSED, "budget: 0.1 is left")), "declined"),
        (error_message(Error(2, "ValueError")), "failed"),
        ("reply rejected: not finite", "rejected"),
        ("evaluation rejected: 3 cells", "rejected"),
        ("something new", "other"),
    ],
)
def test_reasons_have_classes(reason: str, kind: str) -> None:
    assert kind_of_miss(reason) == kind
