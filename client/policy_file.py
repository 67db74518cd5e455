"""``policy.toml``: a holder's rules as its people write, read and sign them.

The file has rules about who may ask, and one table of rules for each data set::

    tasks = ["medical-diagnosis"]

    [data_sets.default]
    budget = { epsilon = 8.0, delta = 1e-5 }

A key that is left out has the most careful value that makes sense, so a short file allows little.
It is read when a holder starts, and what it says then holds until the holder is started again.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import tomli_w

from client.policy import Policy
from common.durable import write_bytes
from common.errors import ConfigurationError
from common.frozen import validated
from common.privacy.releases import Budget
from common.texts import read_toml

__all__ = [
    "DATA_SET_KEYS",
    "FILE_NAME",
    "HOLDER_KEYS",
    "MEANINGS",
    "PolicyFile",
    "add_policy",
    "policy_of_node",
    "policy_path",
]

FILE_NAME = "policy.toml"

HOLDER_KEYS = ("coordinators", "holders", "tasks", "dry_run")
"""Rules for all data sets: they stand at the top of the file."""

DATA_SET_KEYS = tuple(
    name for name in Policy.model_fields if name not in (*HOLDER_KEYS, "data_set")
)
"""Rules for one data set: they stand in its table."""

MEANINGS: Mapping[str, str] = {
    "coordinators": "fingerprints of the authorities whose coordinator may ask, as 'sotto keys "
    "install' shows them; empty: of the one whose keys are installed here",
    "holders": "fingerprints of the signing keys of the other holders that may take part in a "
    "masked round with this one, as 'sotto keys list' shows them there; empty: whoever the "
    "federation's authority has signed, and a dishonest coordinator, which has that authority's "
    "key, could add holders of its own",
    "tasks": "what may be learned; left out: the task that the holder joins with",
    "dry_run": "check and log every request, compute and send nothing",
    "budget": "the most that may ever be released about these data: ε and δ of everything, over "
    "all runs and tasks; left out: nothing is released",
    "epsilon_per_run": "the most ε that one run may cost, at the budget's δ; left out: the budget",
    "min_noise_multiplier": "the least noise, in units of the clip norm",
    "max_clip_norm": "the largest bound of one unit's gradient",
    "max_rounds_per_day": "rounds, of whatever runs, that are answered from midnight to midnight "
    "UTC",
    "min_cohort": "the fewest holders with which a plan may go on, and that a masked sum is of "
    "(its min_holders)",
    "size_class": "how many training units these data have, roughly; a public number; left out: "
    "the source's own",
    "evaluation": "what leaves of an evaluation: 'never', a noised 'histogram' at a price, or "
    "'exact' figures, which need unprotected = true",
    "statistics": "whether noised figures of the data leave, at a price",
    "unprotected": "the data are public or synthetic: requests without privacy are answered",
    "aggregation": "the levels that are allowed: 'plain', where the coordinator sees this holder's "
    "own noised updates; 'secure', where it sees sums of noised updates; 'secure-sum', where only "
    "the sum carries the full noise, so that ε rests on other holders' noise and honesty",
    "coalition": "with 'secure-sum': the fewest holders in league with the coordinator that a "
    "plan's ε must withstand",
}
"""Key → what it allows, as it stands in a file that is written here."""


def policy_path(state: Path) -> Path:
    """Where a holder's policy lies unless it was told otherwise."""
    return state / FILE_NAME


@dataclass(frozen=True)
class PolicyFile:
    """Everything in a ``policy.toml``, checked.

    Args:
        policies: data set → its rules, together with those for all data sets.
        path: of the file, for messages.
    """

    policies: Mapping[str, Policy]
    path: Path

    @classmethod
    def load(cls, path: Path) -> PolicyFile:
        """Read a file.

        Raises:
            ConfigurationError: it is not there, is not TOML, or says something that is not
                allowed: the message names the file, the key, what was found and what is allowed.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigurationError(
                f"there is no {path}; 'sotto policy init --state DIR --budget EPS' writes one"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{path} cannot be read: {error}") from None
        return cls.parse(text, path)

    @classmethod
    def parse(cls, text: str, path: Path) -> PolicyFile:
        """Check a file's text.

        Args:
            text: TOML.
            path: where it comes from, for messages.

        Raises:
            ConfigurationError: as :meth:`load`.
        """
        try:
            values = read_toml(text)
        except ValueError as error:
            raise ConfigurationError(f"{path} is not TOML: {error}") from None
        tables = values.pop("data_sets", {})
        _refuse_unknown(values, (*HOLDER_KEYS, "data_sets"), str(path))
        _check(f"{path}:", {**values, "data_set": "any"})
        if not isinstance(tables, dict):
            raise ConfigurationError(
                f"{path}: data_sets must be tables [data_sets.NAME], got {tables!r}"
            )
        return cls({name: _policy(name, tables[name], values, path) for name in tables}, path)

    def policy(self, data_set: str, *, size_class: int) -> Policy:
        """The rules for a data set.

        Args:
            data_set: its name.
            size_class: what it declares where the file does not say: the source's nominal size.

        Raises:
            ConfigurationError: the file has no rules for it.
        """
        found = self.policies.get(data_set)
        if found is None:
            raise ConfigurationError(
                f"{self.path} has no [data_sets.{data_set}], so nothing about data set "
                f"{data_set!r} may leave; it has {', '.join(self.policies) or 'none'}"
            )
        if "size_class" in found.model_fields_set:
            return found
        return found.model_copy(update={"size_class": size_class})

    def budgets(self) -> dict[str, Budget | None]:
        """Data set → its budget; None where the file sets none."""
        return {name: policy.budget for name, policy in self.policies.items()}


def policy_of_node(folder: Path, data_set: str, budget: Budget | None, size_class: int) -> Policy:
    """The rules of one of Flower's own nodes: its folder's file, or else a default with a budget.

    Args:
        folder: the node's state.
        data_set: that it serves.
        budget: from its node config; None if that names none.
        size_class: the source's nominal size.

    Raises:
        ConfigurationError: file and node config disagree, or there are no rules for the data set.
    """
    path = policy_path(folder)
    if not path.exists():
        return Policy(data_set=data_set, budget=budget, size_class=size_class)
    policy = PolicyFile.load(path).policy(data_set, size_class=size_class)
    if budget is not None and budget != policy.budget:
        raise ConfigurationError(
            f"the node config has a budget of {budget} and {path} one of {policy.budget}; leave "
            "budget out of the node config, or change the file with 'sotto ledger budget set'"
        )
    return policy


# -- writing -------------------------------------------------------------------------------------


def add_policy(path: Path, policy: Policy) -> None:
    """Write a file with one data set's rules, or add their table to a file that is there.

    Every key stands in it, one that is not set as a comment, with its meaning.

    Args:
        path: of the file.
        policy: to write down. Where the file is there, its rules for all data sets stay as they
            are.

    Raises:
        ConfigurationError: the file has rules for that data set.
    """
    table = _table(policy)
    if path.exists():
        if policy.data_set in PolicyFile.load(path).policies:
            raise ConfigurationError(
                f"{path} has rules for data set {policy.data_set!r}; edit the file, change a "
                "budget with 'sotto ledger budget set', or name another data set"
            )
        text = path.read_text(encoding="utf-8").rstrip("\n") + "\n\n" + table
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _HEAD + "".join(_lines(policy, HOLDER_KEYS)) + "\n" + table
    PolicyFile.parse(text, path)  # nothing is written that could not be read
    write_bytes(path, text.encode())


_HEAD = """\
# What this holder allows, whatever a coordinator asks. See docs/policy.md.
# It is read when `sotto join` starts: after a change, start it again.

"""

_EXAMPLES = {
    "tasks": '["medical-diagnosis"]',
    "budget": "{ epsilon = 8.0, delta = 1e-5 }",
    "epsilon_per_run": "4.0",
    "size_class": "160",
}
"""Keys that mean something else when they are left out, and what could stand there."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def _table(policy: Policy) -> str:
    name = policy.data_set
    key = name if _BARE_KEY.fullmatch(name) else _toml(name)
    return f"[data_sets.{key}]\n" + "".join(_lines(policy, DATA_SET_KEYS))


def _lines(policy: Policy, keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        meaning = MEANINGS[key][0].upper() + MEANINGS[key][1:] + "."
        yield textwrap.fill(meaning, 96, initial_indent="# ", subsequent_indent="# ") + "\n"
        value = getattr(policy, key)
        if key in _EXAMPLES and (value is None or key not in policy.model_fields_set):
            yield f"# {key} = {_EXAMPLES[key]}\n"
        elif value is None:
            raise ConfigurationError(f"{key}: a file sets a limit, and this policy has none")
        else:
            yield f"{key} = {_toml(value)}\n"


def _toml(value: object) -> str:
    if isinstance(value, Budget):
        return f"{{ epsilon = {value.epsilon!r}, delta = {value.delta!r} }}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return tomli_w.dumps({"key": value}).removeprefix("key = ").rstrip("\n")


# -- reading -------------------------------------------------------------------------------------


def _policy(name: str, table: object, common: Mapping[str, Any], path: Path) -> Policy:
    where = f"{path}: [data_sets.{name}]"
    if not isinstance(table, dict):
        raise ConfigurationError(f"{where} must be a table, got {table!r}")
    _refuse_unknown(table, DATA_SET_KEYS, where)
    return _check(where, {**common, **table, "data_set": name})


def _check(where: str, values: Mapping[str, Any]) -> Policy:
    try:
        return validated(Policy, values)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where} {error}") from None


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key in known:
            continue
        close = get_close_matches(key, known, n=1)
        elsewhere = key in HOLDER_KEYS or key in DATA_SET_KEYS
        hint = f" Did you mean {close[0]!r}?" if close else ""
        if elsewhere:
            place = "at the top of the file" if key in HOLDER_KEYS else "in a [data_sets.NAME]"
            hint = f" It belongs {place}."
        raise ConfigurationError(
            f"{where}: there is no key {key!r} here.{hint} There are: {', '.join(known)}"
        )
