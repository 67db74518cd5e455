"""The documents are true: commands parse, links resolve, tables and excerpts are the code's own.

After a change of flags or schemas: ``python -m tests.test_docs`` writes the generated parts anew.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import pytest
import typer.main

from common.data.schema import Column, Schema
from common.tasks import load, task_class
from sotto.cli import _application
from sotto.options import Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
TASKS = ("medical-diagnosis", "credit-risk", "recommendation")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_:./]*")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a document in one of these languages."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in blocks if language in languages]


# ----------------------------------------------------------------------------------- commands

APPLICATION = typer.main.get_command(_application())


def command_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Every ``sotto`` command of a document, and whether it claims to be complete."""
    for block in fenced(text, "sh", "console", "ini"):
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            if found := re.match(r"\s*(?:\$ |ExecStart=)?(?:[\w./]*/)?sotto( .*)?$", line):
                yield found.group(1) or "", True
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`sotto ([^`]*)`", prose):
        yield span, False


def problem_with(line: str, *, complete: bool) -> str | None:
    """Why a command line cannot work, or None; nothing is run."""
    command: click.Command = APPLICATION
    words = [word for word in shlex.split(line, comments=True) if word not in ("…", "...", "|")]
    context = click.Context(command, info_name="sotto")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            return f"there is no command {name!r}"
        command = command.commands[name]
        context = click.Context(command, info_name=name, parent=context)
    try:
        values, left, _ = command.make_parser(context).parse_args(words)
    except click.UsageError as error:
        return error.format_message()
    return next(_misfits(command, context, values, left, complete=complete), None)


def _misfits(
    command: click.Command,
    context: click.Context,
    values: dict[str, object],
    left: list[str],
    *,
    complete: bool,
) -> Iterator[str]:
    if left:
        yield f"too many arguments: {left}"
    for parameter in command.params:
        value = values.get(str(parameter.name))
        absent = value is None or type(value).__name__ == "Sentinel"
        if absent and parameter.required and complete:
            yield f"{parameter.name} is missing"
        if absent or not isinstance(value, str) or PLACEHOLDER.fullmatch(value):
            continue
        if isinstance(parameter.type, click.types.IntParamType | click.types.FloatParamType):
            try:
                parameter.type.convert(value, parameter, context)
            except click.BadParameter as error:
                yield error.format_message()


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_line_parses(path: Path) -> None:
    wrong = {
        line: why
        for line, complete in command_lines(path.read_text())
        if (why := problem_with(line, complete=complete))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("simulate medical-diagnosis --epsilom 3", "--epsilom"),
        ("simulate --epsilon 3", "task is missing"),
        ("simulate medical-diagnosis --rounds many", "not a valid int"),
        ("simulate one two", "too many"),
        ("imagine", "no command"),
        ("join --state", "requires an argument"),
    ],
)
def test_a_wrong_command_line_would_be_noticed(line: str, why: str) -> None:
    assert why in str(problem_with(line, complete=True))


def test_command_lines_are_found() -> None:
    text = "```sh\nsotto serve T \\\n    --state D  # why\n```\nSay `sotto tasks`.\n"
    assert list(command_lines(text)) == [(" serve T --state D  # why", True), ("tasks", False)]
    assert sum(1 for path in DOCUMENTS for _ in command_lines(path.read_text())) > 40


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_settings_file_is_read(path: Path, tmp_path: Path) -> None:
    for block in fenced(path.read_text(), "toml"):
        if block.startswith("#") and ".toml" in block.splitlines()[0]:
            file = tmp_path / "settings.toml"
            file.write_text(block)
            Settings.merged({"config": file}, lists=path.name == "sweep.md")


# -------------------------------------------------------------------------- links and names


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=named)
def test_every_relative_link_resolves(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{named(path)} links to {target}"
        if anchor:
            assert anchor in anchors(there.read_text()), f"{named(path)} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_file_and_test_that_is_named_exists(path: Path) -> None:
    rooms = "common|client|server|simulations|sotto|tests|benchmarks|docs|examples"
    for file, test in re.findall(
        rf"`((?:{rooms})/[\w./-]*\.(?:py|proto|md|toml))(?:::(\w+))?", path.read_text()
    ):
        assert (ROOT / file).is_file(), f"{named(path)} names {file}"
        if test:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{named(path)} names {test}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_excerpt_is_the_codes_own(path: Path) -> None:
    """A Python block that begins with the name of a file shows lines of that file."""
    for block in fenced(path.read_text(), "python"):
        first, _, rest = block.partition("\n")
        if found := re.fullmatch(r"# (\S+\.py)", first):
            file = ROOT / found.group(1)
            for part in re.split(r"^\s*\.\.\.\n", rest, flags=re.MULTILINE):
                assert part.strip("\n") in file.read_text(), f"{named(path)} misquotes {file.name}"
        else:
            compile(block, named(path), "exec")


# --------------------------------------------------------------------------- generated parts


def flag_table(command: str) -> str:
    """The flags of a command, by panel."""
    assert isinstance(APPLICATION, click.Group)
    rows = ["| flag | takes | meaning |", "| --- | --- | --- |"]
    for parameter in APPLICATION.commands[command].params:
        if isinstance(parameter, click.Option) and parameter.name != "help":
            takes = "" if parameter.is_flag else parameter.metavar or parameter.type.name
            takes = takes.lower()
            rows.append(f"| `{parameter.opts[0]}` | {takes} | {parameter.help} |")
    return "\n".join(rows)


def schema_tables() -> str:
    """The columns of every source."""
    parts = []
    for task in TASKS:
        kind = task_class(task)
        for source in kind.sources:
            for preparation in kind.preprocessings.get(source, ("",)):
                schema = load(task, source, preparation or None).schema
                chosen = f" --preprocessing {preparation}" if preparation else ""
                parts.append(f"### `{task} --source {source}{chosen}`\n\n{_columns(schema)}")
    return "\n\n".join(parts)


def _columns(schema: Schema) -> str:
    rows = ["| column | kind | allowed | an empty cell | |", "| --- | --- | --- | --- | --- |"]
    rules = {"refuse": "error", "drop-row": "row is left out", "indicator": "allowed"}
    rows += [
        f"| `{column.name}` | {column.kind} | {_allowed(column)} | {rules[column.missing]} "
        f"| {column.description} |"
        for column in schema.columns
    ]
    return "\n".join(rows)


def _allowed(column: Column) -> str:
    if column.categories:
        return ", ".join(map(str, column.categories))
    return f"{column.low:g} to {column.high:g} {column.unit}".rstrip()


GENERATED = {
    "docs/simulate.md": ("flags", partial(flag_table, "simulate")),
    "docs/sweep.md": ("sweep flags", partial(flag_table, "sweep")),
    "docs/own-data.md": ("schemas", schema_tables),
}


def with_generated(text: str, name: str, part: str) -> str:
    begin, end = f"<!-- {name}: written by tests/test_docs.py -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{part}\n\n{end}{after}"


@pytest.mark.parametrize("document", GENERATED)
def test_generated_parts_are_up_to_date(document: str) -> None:
    text, (name, part) = (ROOT / document).read_text(), GENERATED[document]
    assert with_generated(text, name, part()) == text, "run: python -m tests.test_docs"


if __name__ == "__main__":
    for document, (name, part) in GENERATED.items():
        path = ROOT / document
        path.write_text(with_generated(path.read_text(), name, part()))
