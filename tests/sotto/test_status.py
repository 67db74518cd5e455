from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from common.link.traffic import Traffic
from server.link.health import Health
from server.link.mailroom import Errand
from server.link.operations import Operations
from server.status import RoundStatus, Status, Watch
from sotto.status import view
from tests.commands import sotto
from tests.server.watching import Looked, summary, watch


@pytest.fixture
def seen() -> Watch:
    grid = Looked(traffic=Traffic(12_345_678, 999, 9, 8, 1, 3, 2))
    grid.join("north", "west")
    grid.errands = {"north": Errand("1", "train"), "west": Errand("2", "train", "answered")}
    grid.leave("south", time.time() - 200)
    return watch(grid, history=[summary(1, "north", "west", south="no reply within 5 s")], done=1)


@pytest.fixture
def state(tmp_path: Path, seen: Watch) -> Iterator[Path]:
    with Operations(tmp_path, seen.status, Health()):
        yield tmp_path


def drawn(status: Status, width: int = 140) -> str:
    console = Console(width=width, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(view(status))
    return capture.get()


def test_a_page_says_what_goes_on(seen: Watch) -> None:
    page = drawn(seen.status())

    assert "tiny: round 2 of 4, asking for updates" in page
    assert "Run run-1, plan " in page
    assert "Holders: 1 working, 1 answered, 1 away" in page
    row, why = (line for line in page.splitlines() if line.strip().startswith("south"))
    assert "away since" in row
    assert "(3 min)" in row
    assert row.rstrip().endswith("1")
    assert why == "  south missed the last round: no reply within 5 s"
    assert "12.3 MB" in page
    assert "999 B" in page


def test_waiting_lost_and_finished_rounds_are_said_to_be(seen: Watch) -> None:
    status = replace(seen.status(), phase="waiting")
    assert "waiting for holders (2 of at least 2 are there)" in drawn(status)

    lost = replace(status, recent=[RoundStatus(7, 1.0, 0, {}, "too few")])
    assert "7 LOST" in drawn(lost)
    assert "tiny: finished after 4 rounds" in drawn(replace(status, phase="finished"))
    assert "No holder has joined yet." in drawn(replace(status, holders=()))


def test_what_others_wrote_does_not_steer_the_terminal(seen: Watch) -> None:
    hostile = "declined: \x1b[2J[bold]"
    holders = [replace(h, last_reason=hostile, missed_in_a_row=1) for h in seen.status().holders]

    page = drawn(replace(seen.status(), holders=holders))
    assert "\x1b" not in page
    assert "[bold]" in page


def test_the_command_shows_the_page(state: Path) -> None:
    said = sotto("status", "--state", state)
    assert (said.code, said.err) == (0, "")
    assert "tiny: round 2 of 4" in said.out


def test_the_command_writes_json(state: Path, seen: Watch, tmp_path: Path) -> None:
    said = sotto("status", "--state", state, "--json", "-")
    document = json.loads(said.out)
    assert document.keys() == seen.status().document().keys()
    assert [holder["state"] for holder in document["holders"]] == ["working", "away", "answered"]

    sotto("status", "--state", state, "--json", tmp_path / "status.json")
    assert json.loads((tmp_path / "status.json").read_text())["run"] == "run-1"


def test_watching_ends_with_the_coordinator(tmp_path: Path, seen: Watch) -> None:
    looks = iter(range(3))

    def look() -> Status:
        if next(looks) == 1:
            operations._remove_old()  # as if the process had ended
        return seen.status()

    operations = Operations(tmp_path, look, Health())
    with operations:
        said = sotto("status", "--state", tmp_path, "--watch", "--interval", "0.01", "--json", "-")

    assert len([json.loads(line) for line in said.out.splitlines()]) == 2
    assert said.code == 0


def test_nobody_there_is_exit_code_3(tmp_path: Path) -> None:
    said = sotto("status", "--state", tmp_path)
    assert said.code == 3
    assert "no coordinator runs with" in said.err


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    assert sotto("status", "--state", tmp_path / "nowhere").code == 2
    said = sotto("status", "--state", tmp_path, "--watch", "--interval", "0")
    assert said.code == 2
    assert "--interval must be positive" in said.err
