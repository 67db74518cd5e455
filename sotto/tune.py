"""``sotto tune``: choose settings on a holder's own data, at a price."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigurationError
from sotto.options import Settings, list_options
from sotto.show import Screen, figure, setting_text, write_json

if TYPE_CHECKING:  # they need torch
    from client.policy import Policy
    from common.tasks.base import Task
    from common.tasks.histograms import Estimate
    from simulations.tuning import Trial, Tuning

__all__ = ["tune"]

DEFAULT_EXPECTED_RUNS = 10.0


@list_options
def tune(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="Name of the task; see 'sotto tasks'.")],
    data: Annotated[
        Path | None, typer.Option(help="A file of your own, CSV or Parquet; needs --state.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option(help="The holder's folder, whose ledger pays.")
    ] = None,
    data_set: Annotated[
        str | None,
        typer.Option(help="Name that the budget attaches to; the policy's only one, or 'default'."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Instead of --data: a holder of the public source; free of charge."),
    ] = None,
    expected_runs: Annotated[
        float, typer.Option(help="How many runs to make on average; the number is random.")
    ] = DEFAULT_EXPECTED_RUNS,
) -> None:
    """Choose settings by private runs on one holder's data; only the best of them is told.

    Settings of the plan take lists, and --epsilon is the price of all of it:
    --learning-rate 0.1,0.3,1 --clip-norm 0.5,1 --epsilon 3
    """
    # torch takes seconds to import; flags are checked, and help is shown, without it.
    from client.trainer import pick_device
    from common.privacy.noise import OsRandomness
    from common.settings import DEFAULT_EPSILON
    from common.tasks import load
    from simulations.tuning import Tuning
    from sotto.join import own_data

    _check(data, state, part, settings)
    screen = Screen(settings.output)
    loaded = load(task, settings.source, settings.preprocessing)
    tried = dict(settings.plan)
    price = _only(tried, "epsilon", DEFAULT_EPSILON)
    delta = _only(tried, "delta", loaded.source.delta)
    own = own_data(loaded, data, part, settings.holders, tried.pop("seed", 0))
    tuning = Tuning.over(loaded, tried, price=price, delta=delta, expected_runs=expected_runs)
    tuning.check_data(len(own.train))
    screen.say(
        f"Choosing among {len(tuning.candidates)} candidates for {task} at ε={tuning.cost:.3g} "
        f"(δ={tuning.delta:g}), {expected_runs:g} runs on average."
    )
    folder = settings.output.folder_for(f"tune-{task}")
    with _paid(tuning, state, data_set, len(own.train)) as commit:
        best = tuning.run(own, OsRandomness, pick_device(settings.device))
        written = _document(tuning, best, charged=state is not None)
        commit(_write(folder, loaded, best, written))
    screen.table(
        f"{task}: the best of the runs that were made",
        ["setting", "value"],
        [[name, setting_text(name, value)] for name, value in best.candidate.values.items()],
    )
    for sentence in _sentences(tuning, best, charged=state is not None):
        screen.say(sentence)
    screen.say(f"Its plan and model: {folder}")
    write_json(settings.output.json, written)


def _check(data: Path | None, state: Path | None, part: str | None, settings: Settings) -> None:
    if (data is None) == (part is None):
        raise ConfigurationError("give either --data FILE or --part NAME, and not both")
    if data is not None and state is None:
        raise ConfigurationError(
            "choosing settings on data of your own is a release about them: give --state DIR, "
            "whose ledger pays for it"
        )
    if data is None and state is not None:
        raise ConfigurationError("a public source costs nothing: leave --state out with --part")
    if settings.seeds != 1:
        raise ConfigurationError("a search is made once: leave --seeds out")


def _only(settings: dict[str, Any], name: str, default: float) -> float:
    """Take the one value of a setting that is not tuned out of ``settings``."""
    values: tuple[float, ...] = settings.pop(name, (default,))
    if len(values) != 1:
        raise ConfigurationError(f"--{name} is of the whole search: give one value")
    return values[0]


@contextmanager
def _paid(
    tuning: Tuning, state: Path | None, named: str | None, units: int
) -> Iterator[Callable[[str], None]]:
    """Reserve the price before anything is computed; yields what commits it.

    A search that is interrupted stays reserved, which counts as spent: begun anew it is another.

    Args:
        tuning: the search.
        state: the holder's folder; None where the data are public.
        named: the data set that pays; None for the policy's only one.
        units: how many training units there are.
    """
    if state is None:
        yield lambda _: None
        return
    from uuid import uuid4

    from client.policy_file import PolicyFile, policy_path
    from client.state import HolderState
    from common.privacy.events import Composition
    from common.privacy.ledger import Release

    size = tuning.task.source.nominal_size()
    file = PolicyFile.load(policy_path(state))
    data_set = named or (next(iter(file.policies)) if len(file.policies) == 1 else "default")
    policy = file.policy(data_set, size_class=size)
    _check_policy(policy, units)
    run = f"tune-{uuid4().hex[:12]}"
    release = Release(
        request_id=f"{run}/000001",
        data_set=data_set,
        task=tuning.task.name,
        coordinator="this holder",
        run_id=run,
        plan_digest=tuning.digest,
        round=1,
        kind="selection",
        event=tuning.event,
    )
    with HolderState.at(state) as memory:
        memory.ledger.reserve(release, policy.budget, Composition.of(tuning.event), policy.limits)

        def commit(digest: str) -> None:
            memory.ledger.commit(release.request_id, digest)

        yield commit


def _check_policy(policy: Policy, units: int) -> None:
    """What a holder's rules say of any release of its own, whoever asks for it."""
    policy.check_data(units)
    if policy.dry_run:
        raise ConfigurationError(
            f"data set {policy.data_set!r} is on a dry run, so nothing is computed from it; take "
            "dry_run out of policy.toml"
        )
    if policy.budget is None and not policy.unprotected:
        raise ConfigurationError(
            f"no budget is set for data set {policy.data_set!r}, so nothing about it may be "
            "released; set one with 'sotto ledger budget set'"
        )


def _write(folder: Path, task: Task, best: Trial, written: Mapping[str, Any]) -> str:
    """The winner's plan and model; returns the model's digest."""
    import json

    import torch

    from common.durable import write_bytes, write_tensors
    from common.tasks.parameters import split_shared

    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "plan.toml", best.candidate.plan.to_toml().encode())
    write_bytes(folder / "tuning.json", json.dumps(written, indent=2).encode())
    tensors = split_shared(task, torch.tensor(best.parameters))
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return write_tensors(folder / "model.safetensors", arrays, {"plan": best.candidate.plan.digest})


def _document(tuning: Tuning, best: Trial, *, charged: bool) -> dict[str, Any]:
    """What leaves: the winner and the terms. Not how many runs there were, nor how long."""
    return {
        "task": tuning.task.name,
        "source": tuning.task.source.name,
        "preprocessing": tuning.task.preprocessing,
        "candidates": len(tuning.candidates),
        "settings": dict(best.candidate.values),
        "score": {
            "metric": tuning.task.headline,
            **{name: _finite(value) for name, value in asdict(best.score).items()},
        },
        "privacy": {
            "epsilon": tuning.cost,
            "delta": tuning.delta,
            "unit": tuning.task.unit,
            "expected_runs": tuning.expected_runs,
            "charged": charged,
        },
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _of_score(metric: str, score: Estimate) -> str:
    if math.isnan(score.value):
        return (
            f"Its {metric} is lost in the noise, so the choice was one by chance: there are too "
            "few held-out rows at this price. Choose on public data of the same kind instead."
        )
    return (
        f"Its {metric} on held-out rows, from a noised histogram: {figure(score.value)} "
        f"({figure(score.low)} to {figure(score.high)} at 95 %); the best of several, so rather "
        "too good."
    )


def _sentences(tuning: Tuning, best: Trial, *, charged: bool) -> list[str]:
    return [
        _of_score(tuning.task.headline, best.score),
        (
            f"Charged to the ledger: ε={tuning.cost:.3g}, for each {tuning.task.unit}, against "
            "whoever gets the winner's settings, model and score. How many runs were made, how "
            "long it took and how others did must not be told."
            if charged
            else "The data are public: nothing was charged."
        ),
    ]
