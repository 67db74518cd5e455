"""Logs for machines: with ``--log-format json`` everything is a JSON object a line.

What a person would read as a sentence is an *event* then: a word that does not change, with its
figures as fields of their own. It goes the same way as what the program logs, to standard error,
so that one collector gets all of it. docs/operate.md lists events and fields; they are a contract.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from types import TracebackType
from typing import Annotated, Any

import typer

from common.link.log import LOG
from sotto.options import Output
from sotto.show import Screen

__all__ = [
    "EVENTS",
    "EventScreen",
    "JsonLines",
    "LogFormat",
    "LogFormatOption",
    "in_json",
    "report",
    "screen_for",
    "set_up",
]

EVENTS: Mapping[str, int] = {
    # of both sides
    "certificate_expires": logging.WARNING,
    "metrics": logging.INFO,
    "note": logging.INFO,
    "table": logging.INFO,
    "unusable": logging.ERROR,
    "run_failed": logging.ERROR,
    "interrupted": logging.WARNING,
    "crashed": logging.CRITICAL,
    # of `sotto serve`
    "keys_made": logging.INFO,
    "no_status": logging.WARNING,
    "health": logging.INFO,
    "listening": logging.INFO,
    "begun": logging.INFO,
    "resumed": logging.INFO,
    "waiting": logging.INFO,
    "round": logging.INFO,
    "guarantee": logging.INFO,
    "finished": logging.INFO,
    # of `sotto join`
    "policy_written": logging.INFO,
    "ready": logging.INFO,
    "unpinned": logging.WARNING,
    "joined": logging.INFO,
    "disconnected": logging.WARNING,
    "answered": logging.INFO,
    "declined": logging.WARNING,
    "failed": logging.ERROR,
    "keys_not_noted": logging.WARNING,
    "left": logging.INFO,
}
"""Word → level of everything that ``sotto serve`` and ``sotto join`` tell people."""

_OWN = ("time", "level", "logger", "event", "message")


class LogFormat(StrEnum):
    """How logs are written."""

    TEXT = "text"
    JSON = "json"


class JsonLines(logging.Formatter):
    """A record as one line of JSON.

    It has ``time`` (ISO 8601, UTC, milliseconds), ``level``, ``logger``, ``event`` and ``message``,
    then the event's own fields, then ``exception`` if there is a traceback. A record brings its
    word as ``extra={"event": ...}`` and its fields as ``extra={"fields": {...}}``.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S.") + f"{time.microsecond // 1000:03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", LOG),
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", {})
        line |= {name: _plain(value) for name, value in fields.items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, allow_nan=False, default=str)


def _plain(value: object) -> object:
    """Numbers that JSON does not know are null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class EventScreen(Screen):
    """A screen that logs events in place of sentences and tables.

    Args:
        output: the command's output options.
        log: gets the events.
    """

    def __init__(self, output: Output, log: logging.Logger) -> None:
        super().__init__(output)
        self.live = False
        self._log = log

    def say(self, sentence: str, event: str = "note", **fields: object) -> None:
        """Log an event; the sentence is its message."""
        self._log.log(EVENTS[event], "%s", sentence, extra={"event": event, "fields": fields})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Log a table as it would be drawn, cell by cell."""
        self.say(title, "table", columns=list(columns), rows=[list(row) for row in rows])


def screen_for(command: str, output: Output) -> Screen:
    """The screen of a command, by the format of the logs.

    Args:
        command: its name.
        output: its output options.
    """
    if not in_json():
        return Screen(output)
    import flwr.app  # noqa: F401 - it makes a handler of its own when it is imported

    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.propagate = True
    log = logging.getLogger(f"sotto.{command}")
    log.setLevel(logging.INFO)  # these are no details that only --verbose shows
    return EventScreen(output, log)


def set_up(*, verbose: bool) -> None:
    """Log to standard error as text.

    Args:
        verbose: everything that happens, not only what people must know.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def in_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.root.handlers)


def report(sentence: str, event: str, code: int) -> None:
    """Log why the command ends.

    Args:
        sentence: that a person would read.
        event: one of :data:`EVENTS`.
        code: of the exit.
    """
    fields = {"exit_code": code}
    logging.getLogger("sotto").log(
        EVENTS[event], "%s", sentence, extra={"event": event, "fields": fields}
    )


def _choose(chosen: LogFormat) -> LogFormat:
    """Have every log be JSON from now on, and warnings and tracebacks too."""
    if chosen is LogFormat.JSON:
        for handler in logging.root.handlers:
            handler.setFormatter(JsonLines())
        logging.captureWarnings(capture=True)
        sys.excepthook = _crashed
        threading.excepthook = lambda arguments: _crashed(
            arguments.exc_type,
            arguments.exc_value or arguments.exc_type(),
            arguments.exc_traceback,
        )
    return chosen


def _crashed(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logging.getLogger("sotto").log(
        EVENTS["crashed"],
        "a defect of Sotto, or of a task: %s",
        kind.__name__,
        exc_info=(kind, error, traceback),
        extra={"event": "crashed"},
    )


# Eager: what is wrong with other flags is said in the format that was asked for, too.
LogFormatOption: Any = Annotated[
    LogFormat,
    typer.Option(
        "--log-format",
        callback=_choose,
        is_eager=True,
        help="text, or json: one object a line, on standard error; see docs/operate.md.",
    ),
]
"""The flag of commands that run for long."""
