"""``sotto ledger``: what was said about one's data, whether the account is whole, its budgets."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.ledger_report import (
    Format,
    account_document,
    costs_of,
    export_entries,
    owner_document,
    owner_sentence,
    show_account,
    verdict,
)
from sotto.options import Output
from sotto.show import Screen, figure, write_json

if TYPE_CHECKING:  # they take a second to import
    from common.plan import TrainingPlan
    from common.privacy.ledger import Budget, Ledger

__all__ = ["app", "read_plan"]

app = typer.Typer(
    help="A holder's account: what was released, whether it is whole, and its budgets.",
    no_args_is_help=True,
)
budget_app = typer.Typer(help="Budgets of data sets.", no_args_is_help=True)
app.add_typer(budget_app, name="budget")

_State = Annotated[Path, typer.Option("--state", help="The holder's state folder.")]
_Anchors = Annotated[
    list[Path] | None,
    typer.Option("--anchor", help="A further file that notes the last entry; may be repeated."),
]
_Policy = Annotated[
    Path | None, typer.Option("--policy", help="Where budgets stand; policy.toml in --state.")
]
_Json = Annotated[
    str | None, typer.Option("--json", help="A file for machines; - for standard output.")
]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


# -- reading -----------------------------------------------------------------------------------


@app.command()
def show(
    state: _State,
    data_set: Annotated[
        list[str] | None, typer.Option("--data-set", help="Only this one; may be repeated.")
    ] = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option("--plan", help="A plan.toml that might be run next; may be repeated."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="ε to measure against; the policy's own.")
    ] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="δ; the policy's own.")] = None,
    policy: _Policy = None,
    anchor: _Anchors = None,
    json: _Json = None,
) -> None:
    """Show what was released about each data set, ε spent and left, and what a plan would cost."""
    from common.privacy.statement import owners, statement

    output = Output(json=json)
    screen = Screen(output)
    plans = {str(path): read_plan(path) for path in plan or ()}
    budgets = _Budgets(_budgets_of(state, policy), budget, delta)
    document: dict[str, Any] = {"holder": [], "data_sets": []}
    with _opened(state, anchor) as ledger:
        known = owners(ledger)
        document["holder"] = [owner_document(entry) for entry in known]
        for entry in known[-1:]:
            screen.say(f"{owner_sentence(entry)}.")
        names = data_set or sorted({*ledger.data_sets(), *budgets.policy})
        for name in names:
            limit = budgets.of(name, ledger)
            account = statement(ledger, name, limit, delta)
            costs = costs_of(ledger, account, plans)
            document["data_sets"].append(account_document(account, costs))
            show_account(screen, account, costs)
    if not names:
        screen.say("Nothing was ever released, and the policy names no data set.")
    write_json(json, document)


@app.command()
def verify(state: _State, anchor: _Anchors = None) -> None:
    """Recompute the chain of digests, the heads, and every ε from the entries."""
    from common.errors import StateError
    from common.privacy.statement import last_budget, owners, passed_budgets, statement

    screen = Screen(Output())
    passed = []
    with _opened(state, anchor) as ledger:
        ledger.verify()
        screen.say(
            f"{state / 'ledger.sqlite'}: {len(ledger.entries())} entries, each digest follows from "
            "the one before"
        )
        for entry in owners(ledger):
            screen.say(owner_sentence(entry))
        for path, head in ledger.heads():
            screen.say(f"{path}: knows of entry {head.number if head else 0}, as the ledger does")
        for name in ledger.data_sets():
            passed += passed_budgets(ledger, name)
            screen.say(verdict(statement(ledger, name, last_budget(ledger, name))))
    if passed:
        raise StateError("; ".join(passed))


@app.command()
def export(
    state: _State,
    form: Annotated[
        Format, typer.Option("--format", help="csv for people, jsonl for programs.")
    ] = Format.CSV,
    out: Annotated[
        Path | None, typer.Option("--out", help="A file; standard output if left out.")
    ] = None,
    anchor: _Anchors = None,
) -> None:
    """Write every entry with its digest, so that somebody else can recompute the chain."""
    with _opened(state, anchor) as ledger:
        entries = ledger.entries()
    if out is None:
        export_entries(sys.stdout, entries, form)
        return
    with out.open("w", encoding="utf-8", newline="") as file:
        export_entries(file, entries, form)
    print(f"{len(entries)} entries are in {out}.")


# -- what people do ----------------------------------------------------------------------------


@app.command()
def accept(
    state: _State,
    data_set: Annotated[
        list[str] | None,
        typer.Option("--data-set", help="One that the copy lacks; may be repeated."),
    ] = None,
    policy: _Policy = None,
    anchor: _Anchors = None,
    yes: _Yes = False,
) -> None:
    """Go on with an older copy of the ledger, and count its budgets as spent for ever."""
    from common.privacy.ledger import Ledger

    path = _ledger_in(state)
    named = {*(data_set or ()), *_budgets_of(state, policy)}
    _confirm(
        "Entries are lost, so what was released since this copy was made is not known. ε of every "
        f"data set in it{_and(named)} becomes infinite: no budget will allow a release about them "
        "again. This stays in the ledger. If a newer copy exists, put that back instead.",
        yes=yes,
    )
    with Ledger.accept_loss(path, anchor or (), data_sets=named, by=_who()) as ledger:
        (*_, entry) = ledger.entries()
    lost = ", ".join(entry.remark.data_sets) if entry.remark else ""
    print(f"Entry {entry.number} says so. No budget holds any more for: {lost}.")


@app.command("anchor")
def add_anchor(
    file: Annotated[Path, typer.Argument(help="A new file, best on another disk.")],
    state: _State,
    anchor: _Anchors = None,
) -> None:
    """Note the ledger's last entry in one more file, so that a rollback of the folder is seen."""
    with _opened(state, anchor) as ledger:
        ledger.add_anchor(file)
    print(f"{file} knows of the last entry. Name it with --anchor from now on.")


@budget_app.command("set")
def set_budget(
    data_set: Annotated[str, typer.Argument(help="Name of the data set.")],
    epsilon: Annotated[float, typer.Argument(help="ε of everything ever released about it.")],
    state: _State,
    delta: Annotated[float | None, typer.Option("--delta", help="δ; the present one.")] = None,
    policy: _Policy = None,
    anchor: _Anchors = None,
    yes: _Yes = False,
) -> None:
    """Set a data set's budget in policy.toml, and note in the ledger who did."""
    from client.policy_file import policy_path
    from common.errors import ConfigurationError
    from common.privacy.ledger import Budget, Ledger

    path = policy or policy_path(state)
    before = _budget_in(path, data_set)
    at = delta or (before.delta if before else None)
    if at is None:
        raise ConfigurationError(f"data set {data_set!r} has no budget yet: give --delta, too")
    after = Budget(epsilon, at)
    text = _with_budget(path, data_set, after)
    change = f"from {_words(before)} to {_words(after)}"
    if _raises(before, after):
        _confirm(
            f"This raises the budget of data set {data_set!r} {change}. Each unit in it may lose "
            f"that much privacy, ε={epsilon:g} in all and for good; what is released cannot be "
            "called back.",
            yes=yes,
        )
    with Ledger.open(state / "ledger.sqlite", anchor or ()) as ledger:
        # Before the file is written: a budget must not hold that the chain does not know of.
        ledger.note_budget(data_set, after, by=_who(), sentence=f"budget set {change}")
        spent = ledger.epsilon(data_set, after.delta)
    _write(path, text)
    print(f"Data set {data_set!r}: budget {change}; ε={figure(spent)} of it is spent.")
    if spent >= epsilon:
        print("Nothing more will be released about it.")
    print("A holder that is running goes on with the old budget: start `sotto join` again.")


# -- where things are --------------------------------------------------------------------------


@contextmanager
def _opened(state: Path, anchors: Sequence[Path] | None) -> Iterator[Ledger]:
    """The ledger in a folder; one that is not there is not made."""
    from common.privacy.ledger import Ledger

    with Ledger.open(_ledger_in(state), anchors or ()) as ledger:
        yield ledger


def _ledger_in(state: Path) -> Path:
    """The ledger's file; it may be gone, if its head is there."""
    from common.errors import ConfigurationError

    path = state / "ledger.sqlite"
    if not path.exists() and not path.with_suffix(".head").exists():
        raise ConfigurationError(
            f"there is no ledger in {state}; a holder makes one when it joins. Name the folder "
            "that was given to `sotto join --state`"
        )
    return path


def read_plan(path: Path, argument: str = "--plan") -> TrainingPlan:
    """The plan in a run's ``plan.toml``.

    Args:
        path: of the file.
        argument: which argument names it, for the error.

    Raises:
        ConfigurationError: the file cannot be read, or holds no plan.
    """
    from common.errors import ConfigurationError
    from common.plan import TrainingPlan

    try:
        return TrainingPlan.from_toml(path.read_text(encoding="utf-8")).calibrated()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{argument} {path} cannot be read: {error}") from None
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{argument} {path} is not the plan.toml of a run: {error}"
        ) from None


def _budgets_of(state: Path, policy: Path | None) -> Mapping[str, Budget | None]:
    """The budgets that the policy sets; none where there is no file and none was named."""
    from client.policy_file import PolicyFile, policy_path

    path = policy or policy_path(state)
    return PolicyFile.load(path).budgets() if policy or path.exists() else {}


@dataclass(frozen=True)
class _Budgets:
    """Where a budget is taken from: flags, then the policy, then the chain.

    Args:
        policy: data set → budget.
        epsilon: from a flag.
        delta: from a flag.
    """

    policy: Mapping[str, Budget | None]
    epsilon: float | None
    delta: float | None

    def of(self, data_set: str, ledger: Ledger) -> Budget | None:
        """A data set's budget; None if there is none anywhere.

        Raises:
            ConfigurationError: ε is given and δ is not known.
        """
        from common.errors import ConfigurationError
        from common.privacy.ledger import Budget
        from common.privacy.statement import last_budget

        known = self.policy.get(data_set) or last_budget(ledger, data_set)
        epsilon = self.epsilon or (known.epsilon if known else None)
        delta = self.delta or (known.delta if known else None)
        if epsilon is None:
            return None
        if delta is None:
            raise ConfigurationError("--budget needs --delta where no policy sets one")
        return Budget(epsilon, delta)


def _who() -> str:
    """The operating system's name for whoever runs this."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this number
        return f"user {os.getuid()}"


def _confirm(sentence: str, *, yes: bool) -> None:
    """Go on only if a person agrees, or has agreed with ``--yes``."""
    from common.errors import ConfigurationError

    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{sentence} Nobody is here to be asked: add --yes to agree")
    print(sentence)
    if not typer.confirm("Go on?"):
        raise ConfigurationError("nothing was changed")


# -- policy.toml -------------------------------------------------------------------------------


def _budget_in(path: Path, data_set: str) -> Budget | None:
    """A data set's present budget.

    Raises:
        ConfigurationError: the file is not there, or has no rules for the data set.
    """
    from client.policy_file import PolicyFile
    from common.errors import ConfigurationError

    budgets = PolicyFile.load(path).budgets()
    if data_set not in budgets:
        raise ConfigurationError(
            f"{path} has no rules for data set {data_set!r}, only for "
            f"{', '.join(map(repr, budgets)) or 'none'}; `sotto policy init` adds some"
        )
    return budgets[data_set]


def _with_budget(path: Path, data_set: str, budget: Budget) -> str:
    """The policy's text with that budget, and with its comments."""
    import tomlkit

    from client.policy_file import PolicyFile

    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    value = tomlkit.inline_table()
    value.update(asdict(budget))
    document["data_sets"][data_set]["budget"] = value
    text: str = tomlkit.dumps(document)
    PolicyFile.parse(text, path)  # nothing is written that could not be read
    return text


def _write(path: Path, text: str) -> None:
    from common.durable import write_bytes

    write_bytes(path, text.encode())


def _raises(before: Budget | None, after: Budget) -> bool:
    return before is None or after.epsilon > before.epsilon or after.delta > before.delta


def _words(budget: Budget | None) -> str:
    return f"ε={budget.epsilon:g} (δ={budget.delta:g})" if budget else "none"


def _and(names: set[str]) -> str:
    return f", and of {', '.join(sorted(names))}," if names else ""
