"""Logs for machines: every line is JSON, and every event and field is in docs/operate.md."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.link.log import RationedLog
from sotto.logs import EVENTS, EventScreen, JsonLines
from sotto.options import Output
from sotto.show import LiveTable

ROOT = Path(__file__).parents[2]
SPEAKERS = ("serve", "join", "resident", "pages", "logs")
"""Modules of the two commands that take --log-format."""

OF_EVERY_LINE = {"time", "level", "logger", "event", "message"}


class Lines(logging.Handler):
    """Keeps what would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.formatter = JsonLines()
        self.written: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.written.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    log, handler = logging.getLogger("tests.logs"), Lines()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield handler
    log.removeHandler(handler)


@pytest.fixture
def screen(lines: Lines) -> EventScreen:
    return EventScreen(Output(), logging.getLogger("tests.logs"))


def test_an_event_is_one_line_with_its_fields(lines: Lines, screen: EventScreen) -> None:
    screen.say("round 1/4:\n2 updates", "round", round=1, accepted=("a", "b"), missed={"c": "away"})

    (line,) = lines.written
    assert "\n" not in line
    written = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", written.pop("time"))
    assert written == {
        "level": "info",
        "logger": "tests.logs",
        "event": "round",
        "message": "round 1/4:\n2 updates",
        "round": 1,
        "accepted": ["a", "b"],
        "missed": {"c": "away"},
    }


def test_a_log_line_has_the_same_shape(lines: Lines) -> None:
    logging.getLogger("tests.logs").warning("%s left", "north")

    written = json.loads(lines.written[0])
    assert written.keys() == OF_EVERY_LINE
    assert (written["event"], written["level"]) == ("log", "warning")
    assert written["message"] == "north left"


def test_a_traceback_stays_in_its_line(lines: Lines) -> None:
    try:
        raise ValueError("wrong\nin two lines")
    except ValueError:
        logging.getLogger("tests.logs").exception("failed")

    (line,) = lines.written
    assert "\n" not in line
    assert "ValueError: wrong\nin two lines" in json.loads(line)["exception"]


def test_what_json_does_not_know_is_null_or_text(lines: Lines, screen: EventScreen) -> None:
    figures = {"a": math.nan, "b": [math.inf, 1.0]}
    screen.say("…", "answered", epsilon_spent=math.inf, more=figures, path=Path("here"))

    written = json.loads(lines.written[0], parse_constant=lambda text: pytest.fail(text))
    assert written["epsilon_spent"] is None
    assert written["more"] == {"a": None, "b": [None, 1.0]}
    assert written["path"] == "here"


def test_a_field_never_takes_the_place_of_the_lines_own(lines: Lines, screen: EventScreen) -> None:
    screen.say("really", "note", message="forged", level="forged")

    written = json.loads(lines.written[0])
    assert (written["message"], written["level"]) == ("really", "info")


def test_tables_and_live_tables_are_events_too(
    lines: Lines, screen: EventScreen, capsys: pytest.CaptureFixture[str]
) -> None:
    screen.table("Evaluation", ["metric", "value"], [["auc", "0.8"]])
    with LiveTable(screen, "run", ["round"]) as table:
        table.update([["1"]], "round 1", "round", round=1)

    first, second = map(json.loads, lines.written)
    assert (first["event"], first["rows"]) == ("table", [["auc", "0.8"]])
    assert (second["event"], second["round"]) == ("round", 1)
    assert capsys.readouterr() == ("", "")


def test_levels_say_what_needs_somebody(lines: Lines, screen: EventScreen) -> None:
    for event in ("joined", "declined", "failed"):
        screen.say("…", event)

    assert [json.loads(line)["level"] for line in lines.written] == ["info", "warning", "error"]


# -- the contract ---------------------------------------------------------------------------------


def said() -> Iterator[tuple[str, set[str]]]:
    """Every event that the commands speak, with the names of its fields, from their source."""
    for module in SPEAKERS:
        for call in ast.walk(ast.parse((ROOT / "sotto" / f"{module}.py").read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            place = {"say": 1, "update": 2}.get(call.func.attr)
            if place is None or len(call.args) <= place:
                continue
            words = [
                node.value
                for node in ast.walk(call.args[place])
                if isinstance(node, ast.Constant) and node.value in EVENTS
            ]
            fields = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
            for word in words:
                yield str(word), fields


def documented(heading: str = "### Events\n") -> dict[str, set[str]]:
    """Event → fields, from a table of docs/operate.md."""
    text = (ROOT / "docs" / "operate.md").read_text()
    text = text.partition(heading)[2].partition("\n##")[0]
    rows = re.findall(r"^\| `(\w+)` \| \w+ \|(.*)\|$", text, re.MULTILINE)
    return {event: set(re.findall(r"`(\w+)`", rest.rpartition("|")[2])) for event, rest in rows}


def test_every_event_is_documented_with_its_level() -> None:
    text = (ROOT / "docs" / "operate.md").read_text()
    assert documented().keys() == EVENTS.keys()
    for event, level in EVENTS.items():
        assert f"| `{event}` | {logging.getLevelName(level).lower()} |" in text, event


def test_every_field_is_documented() -> None:
    found = list(said())
    assert len(found) > 15
    for event, fields in found:
        assert fields <= documented()[event], event


def test_every_event_of_the_link_is_documented() -> None:
    source = (ROOT / "server" / "link" / "switchboard.py").read_text()
    words = set(re.findall(r'event="(\w+)"', source))
    assert documented("### Events of the coordinator's link\n").keys() == words


def test_a_line_of_the_link_names_its_holder(lines: Lines) -> None:
    RationedLog(logging.getLogger("tests.logs")).info(
        "north", "%s joined", "north", event="holder_joined"
    )

    written = json.loads(lines.written[0])
    assert (written["event"], written["holder"]) == ("holder_joined", "north")


def test_a_mistake_is_said_in_json_too(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "sotto.cli", "serve", "medical-diagnosis"]
    flags = ["--state", tmp_path, "--log-format", "json", "--rounds", "nothing"]
    done = subprocess.run(
        [*program, *flags], capture_output=True, text=True, timeout=120, check=False
    )

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert json.loads(line).keys() == {*OF_EVERY_LINE, "exit_code"}
    assert (json.loads(line)["event"], json.loads(line)["exit_code"]) == ("unusable", 2)
