"""Flags that several commands share; each is also a key of ``--config FILE.toml``.

There is one table. `sotto sweep` takes lists where the other commands take single values, and its
flags are made from the same entries.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import ConfigurationError

__all__ = ["Output", "Settings", "list_options", "shared_options"]


def _option(kind: object, help_text: str, *names: str, panel: str = "Plan", **extra: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=help_text, rich_help_panel=panel, **extra)]


_PLAN: dict[str, Any] = {
    "rounds": _option(int | None, "Exchanges with the holders."),
    "cohort": _option(int | None, "Holders asked each round; everyone if left out."),
    "over_selection": _option(
        float | None, "Share of the cohort asked besides; the first updates count."
    ),
    "min_holders": _option(int | None, "A round with fewer accepted updates fails."),
    "local_steps": _option(int | None, "Optimizer steps between download and upload."),
    "batch_size": _option(str | None, "Expected units in a step, or 'full'."),
    "learning_rate": _option(float | None, "Of the holders' optimizer."),
    "optimizer": _option(str | None, "Of the holders: sgd or adam."),
    "momentum": _option(float | None, "Of the holders' SGD."),
    "strategy": _option(
        str | None,
        "fedavg, fedprox, fedadam, fedyogi, fedadagrad, fedavgm, fedmedian, fedtrimmedavg, krum, "
        "fedbuff.",
    ),
    "server_learning_rate": _option(float | None, "The coordinator's learning rate."),
    "server_momentum": _option(float | None, "Of fedavgm."),
    "proximal_mu": _option(float | None, "Of fedprox."),
    "trim": _option(float | None, "Fraction that fedtrimmedavg cuts at each end."),
    "malicious": _option(int | None, "Malicious holders that krum must withstand."),
    "buffer": _option(int | None, "Of fedbuff: so many updates make the next model."),
    "max_staleness": _option(
        int | None, "Of fedbuff: older updates, in models since the one they are of, are dropped."
    ),
    "weighting": _option(str | None, "equal, or size: by the size class that holders declare."),
    "holder_size": _option(int | None, "Public nominal number of units of one holder."),
    "average_from": _option(float | None, "Average the models after this fraction of rounds."),
    "evaluate": _option(str | None, "When holders judge the model: never, 'every N' or final."),
    "scaling": _option(str | None, "File of shifts and scales of inputs; see 'sotto stats'."),
    "aggregation": _option(
        str | None, "What the coordinator sees: plain, secure or secure-sum.", panel="Privacy"
    ),
    "dropouts": _option(
        float | None,
        "Share of the cohort that a masked sum may lose; below a third.",
        panel="Privacy",
    ),
    "coalition": _option(
        int | None, "With secure-sum: holders that may help the coordinator.", panel="Privacy"
    ),
    "round_deadline": _option(float | None, "Seconds until a silent holder misses the round."),
    "deadline_extensions": _option(
        int | None, "Further deadlines for a holder that makes progress; 0 for none."
    ),
    "max_update_norm": _option(float | None, "Bound on updates of a plan without privacy."),
    "epsilon": _option(float | None, "ε of the whole run, for each holder.", panel="Privacy"),
    "delta": _option(float | None, "δ; below 1/n of the unit.", panel="Privacy"),
    "no_dp": _option(
        bool | None, "Train without differential privacy.", "--no-dp", panel="Privacy"
    ),
    "clip_norm": _option(
        float | None, "L2 bound of one unit's gradient, or of a holder's update.", panel="Privacy"
    ),
    "unit": _option(
        str | None, "The task's own, or holder: then the coordinator is trusted.", panel="Privacy"
    ),
    "clipping": _option(
        str | None, "Of holders' updates, with --unit holder: fixed or adaptive.", panel="Privacy"
    ),
    "mechanism": _option(
        str | None, "Of the noise, with --unit holder: gaussian or banded.", panel="Privacy"
    ),
    "bands": _option(
        int | None, "With banded noise: a holder is asked once in so many rounds.", panel="Privacy"
    ),
    "evaluation_epsilon": _option(
        float | None,
        "Price of all evaluations: noised histograms leave. Nothing leaves if left out.",
        panel="Privacy",
    ),
    "seed": _option(int | None, "First seed."),
}
_RUN: dict[str, Any] = {
    "source": _option(str | None, "Where the data come from; see 'sotto data list'.", panel="Data"),
    "preprocessing": _option(str | None, "Preparation of that source.", panel="Data"),
    "holders": _option(int | None, "How many holders; the source's own number.", panel="Data"),
    "seeds": _option(int | None, "How many seeds to run.", panel="Run"),
    "device": _option(str | None, "auto, cpu or cuda:N.", panel="Run"),
    "baselines": _option(
        bool | None,
        "Also train each holder alone, and all data pooled.",
        "--baselines/--no-baselines",
        panel="Run",
    ),
    "config": _option(Path | None, "TOML file with any of these flags as keys.", panel="Run"),
    "json": _option(str | None, "Write the result as JSON; - for standard output.", panel="Output"),
    "out": _option(Path | None, "Folder for plan, metrics, model and report.", panel="Output"),
    "quiet": _option(bool | None, "Plain lines, no live display.", "--quiet", panel="Output"),
}
_SHARED = {**_PLAN, **_RUN}

_SINGLE = frozenset(
    {"seed", "evaluate", "scaling", "round_deadline", "deadline_extensions", "no_dp"}
)
"""Flags of a plan that are one value in a sweep too: a first seed, and what decides no result."""
_LISTED = frozenset(_PLAN) - _SINGLE


def _kinds(name: str) -> set[type]:
    """The types of a flag's value."""
    return {kind for kind in _SHARED[name].__origin__.__args__ if kind is not type(None)}


def _as_list(name: str) -> Any:
    """The same flag for a command that takes lists: text with commas, which we take apart."""
    (option,), (kind,) = _SHARED[name].__metadata__, _kinds(name)
    takes = {int: "INTEGER", float: "FLOAT", str: "TEXT"}[kind]
    return _option(
        str | None,
        option.help,
        *option.param_decls,
        panel=option.rich_help_panel,
        metavar=f"{takes},…",
    )


def _elements(name: str, text: str) -> tuple[object, ...]:
    """The values of a flag like ``0.5,1,2``.

    Raises:
        ConfigurationError: one of them is not of the flag's type.
    """
    (kind,) = _kinds(name)
    values = []
    for number, word in enumerate(text.split(","), start=1):
        try:
            if not word.strip():
                raise ValueError
            values.append(kind(word.strip()))
        except ValueError:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} {text}: element {number} is {word.strip()!r}, which "
                f"is not of type {kind.__name__}; give values separated by commas"
            ) from None
    return tuple(values)


@dataclass(frozen=True)
class Output:
    """Where a command's words go.

    Args:
        json: a file, ``-`` for standard output (then nothing else goes there), or None.
        out: folder of the run, or None for a new one under ``runs/``.
        quiet: plain lines even on a terminal.

    Raises:
        ConfigurationError: something could not be written there once the work is done.
    """

    json: str | None = None
    out: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.json not in (None, "-"):
            file = Path(self.json).absolute()
            if file.is_dir() or not file.parent.is_dir():
                raise ConfigurationError(
                    f"--json {self.json} must be a file in a folder that exists, or -"
                )
        if self.out is not None and self.out.exists() and not self.out.is_dir():
            raise ConfigurationError(f"--out {self.out} must be a folder, and is a file")

    def folder_for(self, task: str) -> Path:
        """:attr:`out`, or a new folder under ``runs/``."""
        now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
        return self.out or Path("runs") / f"{task}-{now}"


@dataclass(frozen=True)
class Settings:
    """What the user asked for, flags over file; None where nothing was said.

    Args:
        plan: keys of ``common.settings.SETTINGS``; in a sweep a value may be a tuple of several.
        source: of the task.
        preprocessing: of the source.
        holders: how many.
        seeds: how many.
        device: as given.
        baselines: whether to compare.
        output: where words go.
    """

    plan: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    preprocessing: str | None = None
    holders: int | None = None
    seeds: int = 1
    device: str = "auto"
    baselines: bool = False
    output: Output = field(default_factory=Output)

    @classmethod
    def merged(cls, flags: Mapping[str, Any], *, lists: bool = False) -> Settings:
        """Flags over the keys of ``--config``.

        Args:
            flags: name → value, None where nothing was said.
            lists: whether settings of the plan may be lists: text with commas as a flag, an array
                in the file. Baselines are on then, unless they are declined.

        Raises:
            ConfigurationError: the file is not TOML or has a key that is no flag, a value is not
                of its flag's type, or there is nothing to run.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        path = given.pop("config", None)
        if lists:
            given |= {name: _elements(name, given[name]) for name in _LISTED & set(given)}
        values = {**(_read(Path(path), lists=lists) if path else {}), **given}
        out, seeds = values.get("out"), values.get("seeds", 1)
        if seeds < 1:
            raise ConfigurationError(f"seeds must be at least 1, got {seeds}")
        return cls(
            plan={name: values[name] for name in _PLAN if name in values},
            source=values.get("source"),
            preprocessing=values.get("preprocessing"),
            holders=values.get("holders"),
            seeds=seeds,
            device=values.get("device", "auto"),
            baselines=values.get("baselines", lists),
            output=Output(
                json=values.get("json"),
                out=Path(out) if out else None,
                quiet=values.get("quiet", False),
            ),
        )


def _read(path: Path, *, lists: bool) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--config {path} is not TOML: {error}") from None
    read: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in _SHARED or name == "config":
            close = get_close_matches(name, _SHARED, n=1)
            hint = f" Did you mean {close[0].replace('_', '-')!r}?" if close else ""
            keys = (known.replace("_", "-") for known in _SHARED if known != "config")
            there = ", ".join(sorted(keys))
            raise ConfigurationError(
                f"--config {path}: there is no key {key!r}.{hint} There are: {there}"
            )
        if lists and name in _LISTED and isinstance(value, list) and value:
            read[name] = tuple(_typed(path, name, element) for element in value)
        else:
            read[name] = _typed(path, name, value)
    return read


def _typed(path: Path, name: str, value: object) -> object:
    """The value if it has the flag's type; a bool is no number and a list is nothing."""
    wanted = _kinds(name)
    if wanted & {str, Path} and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    if float in wanted and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if int in wanted and isinstance(value, int) and not isinstance(value, bool):
        return value
    if bool in wanted and isinstance(value, bool):
        return value
    kinds = " or ".join(sorted(kind.__name__ for kind in wanted))
    raise ConfigurationError(f"--config {path}: {name} must be of type {kinds}, got {value!r}")


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a typer command every shared flag, and hand them to it as one ``settings``.

    The command declares ``settings: Settings`` among its parameters; typer sees the flags.
    """
    return _with_flags(command, _SHARED, Settings.merged)


def list_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same for a command that takes lists: every setting of a plan may have several values."""
    flags = {
        name: _as_list(name) if name in _LISTED else annotation
        for name, annotation in _SHARED.items()
    }
    return _with_flags(command, flags, partial(Settings.merged, lists=True))


def _with_flags(
    command: Callable[..., None],
    annotations: Mapping[str, Any],
    merge: Callable[[Mapping[str, Any]], Settings],
) -> Callable[..., None]:
    own = [
        parameter
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
        if name != "settings"
    ]
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in annotations.items()
    ]

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        settings = merge({name: arguments.pop(name) for name in annotations})
        command(settings=settings, **arguments)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapped.__signature__ = inspect.Signature([*parameters, *flags])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {
        parameter.name: parameter.annotation for parameter in [*parameters, *flags]
    }
    return wrapped
