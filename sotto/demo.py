"""``sotto demo``: a coordinator and its holders as processes on this machine, over mTLS."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sotto.options import Settings, shared_options
from sotto.show import LiveTable, Rounds, Screen, comparison_rows, figure, guarantee, write_json

if TYPE_CHECKING:
    from common.plan import TrainingPlan
    from common.tasks.base import Task
    from server.runs import RunResult

__all__ = ["demo"]

_POLL = 0.1

_Processes = Mapping[str, "subprocess.Popen[bytes]"]


@shared_options
def demo(
    settings: Settings,
    task: Annotated[str, typer.Argument(help="Name of the task.")] = "medical-diagnosis",
) -> None:
    """Watch a federation train: real processes, mutual TLS, DP-SGD, and what it is worth."""
    from common.errors import ConfigurationError
    from common.settings import plan_for
    from common.tasks import load

    if settings.seeds != 1:
        raise ConfigurationError(
            f"a demo is one run, got seeds={settings.seeds}; use 'sotto simulate' for several"
        )
    screen = Screen(settings.output)
    loaded = load(task, settings.source, settings.preprocessing)
    names = list(loaded.source.tables(settings.holders))
    asked = settings.plan
    if "dropouts" not in asked:  # which says how many of them a masked sum needs
        asked = {"min_holders": len(names), **asked}
    plan = plan_for(loaded, asked, holders=settings.holders)
    if plan.privacy.kind == "central":
        raise ConfigurationError(
            "a demo compares the federation with each holder alone, and where holders are the unit "
            "nothing about one holder can be learned; use 'sotto simulate', or leave --unit out"
        )
    out = settings.output.out or Path("runs") / f"demo-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (out / "coordinator").exists():
        raise ConfigurationError(f"--out {out} holds an earlier demo; give another folder")
    out.mkdir(parents=True, exist_ok=True)

    screen.say(
        f"Starting a coordinator and {len(names)} holders as processes on this machine, over "
        "mutually authenticated gRPC. Each needs a few seconds to load torch."
    )
    begin = time.perf_counter()
    federation = _Federation(loaded, plan, names, settings, out)
    with _started(federation) as processes:
        _watch(screen, federation, processes)
    _conclude(screen, federation, time.perf_counter() - begin)


@dataclass(frozen=True)
class _Federation:
    """A demo's processes and folders.

    Args:
        task: on its source.
        plan: of the run.
        names: of the holders.
        settings: of the command.
        out: the demo's folder; every process has its state folder in it.
    """

    task: Task
    plan: TrainingPlan
    names: Sequence[str]
    settings: Settings
    out: Path

    @property
    def coordinator(self) -> Path:
        return self.out / "coordinator"

    def holder(self, name: str) -> Path:
        return self.out / name

    @property
    def run_folder(self) -> Path:
        """The run's folder; it need not be there yet."""
        runs = sorted((self.coordinator / "runs").glob("*"))
        return runs[0] if runs else self.coordinator / "runs" / "none"

    def rounds(self) -> list[dict[str, Any]]:
        """The coordinator's lines so far."""
        return _lines(self.run_folder / "metrics.jsonl")

    def notes(self, name: str) -> list[dict[str, Any]]:
        """A holder's own lines so far: read from its folder, for they are not sent."""
        return _lines(self.holder(name) / "metrics.jsonl")

    def with_notes(self, result: RunResult) -> RunResult:
        """The coordinator's result with the metrics that each holder noted down for itself."""
        nan = float("nan")
        noted: dict[int, dict[str, dict[str, float]]] = {}
        for name in self.names:
            for note in self.notes(name):
                figures = {key: nan if v is None else v for key, v in note["metrics"].items()}
                noted.setdefault(note["round"], {})[name] = figures
        history = [replace(line, metrics=noted.get(line.round, {})) for line in result.history]
        return replace(result, history=history)


@contextmanager
def _started(federation: _Federation) -> Iterator[_Processes]:
    """Start every process; stop them, whatever happens."""
    _exchange_keys(federation)
    _write_policies(federation)
    port = _free_port()
    commands = {"coordinator": _serve_command(federation, port)}
    commands |= {name: _join_command(federation, name, port) for name in federation.names}
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(_process(command, federation.out / name))
            for name, command in commands.items()
        }


def _exchange_keys(federation: _Federation) -> None:
    """What people do with ``sotto keys`` on three machines, on one."""
    from common.link.keys import CoordinatorKeys, HolderKeys

    coordinator = CoordinatorKeys.create_or_load(federation.coordinator, ["127.0.0.1"])
    for name in federation.names:
        request = HolderKeys.request(federation.holder(name), name)
        HolderKeys.install(federation.holder(name), coordinator.approve(request))


def _write_policies(federation: _Federation) -> None:
    """What each holder's people do with ``sotto policy init``: allow this plan, and no more."""
    from client.policy import Policy
    from client.policy_file import add_policy, policy_path
    from client.requests import Terms
    from simulations.policy import price_of

    terms = Terms.of_plan(federation.plan)
    policy = Policy(
        data_set="default",
        budget=price_of(federation.plan),
        min_noise_multiplier=terms.noise_multiplier or 0.0,
        max_clip_norm=terms.clip_norm or 1.0,
        max_rounds_per_day=federation.plan.rounds,
        min_cohort=terms.min_holders,
        evaluation="histogram" if terms.evaluation == "histogram" else "never",
        unprotected=not terms.private,
        aggregation=(federation.plan.aggregation.kind,),
        coalition=terms.coalition or 0,
        tasks=(terms.task,),
    )
    for name in federation.names:
        add_policy(policy_path(federation.holder(name)), policy)


def _serve_command(federation: _Federation, port: int) -> list[str]:
    plan = federation.out / "settings.toml"
    plan.write_text(_settings_toml(federation))
    return [
        "serve", federation.task.name, "--state", str(federation.coordinator),
        "--listen", f"127.0.0.1:{port}", "--config", str(plan), "--quiet",
    ]  # fmt: skip


def _settings_toml(federation: _Federation) -> str:
    import tomli_w

    chosen = {
        "source": federation.task.source.name,
        "preprocessing": federation.task.preprocessing,
        "holders": federation.settings.holders,
        "min_holders": federation.plan.min_holders,
        **federation.settings.plan,
    }
    return tomli_w.dumps({key: value for key, value in chosen.items() if value is not None})


def _join_command(federation: _Federation, name: str, port: int) -> list[str]:
    holders = federation.settings.holders
    cut = [] if holders is None else ["--holders", str(holders)]
    return [
        "join", "--server", f"127.0.0.1:{port}", "--state", str(federation.holder(name)),
        "--task", federation.task.name, "--source", federation.task.source.name,
        "--preprocessing", federation.task.preprocessing, "--part", name, *cut,
        "--device", federation.settings.device, "--quiet",
    ]  # fmt: skip


@contextmanager
def _process(arguments: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One ``sotto`` process; its words go to ``log.txt`` in its folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sotto.cli", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _watch(screen: Screen, federation: _Federation, processes: _Processes) -> None:
    """Follow the run until its model is there."""
    shown = 0
    with LiveTable(
        screen, f"{federation.task.name}: {len(federation.names)} holders", _columns(federation)
    ) as table:
        while True:
            done = (federation.run_folder / "model.safetensors").exists()
            lines = federation.rounds()
            if len(lines) > shown:
                shown = len(lines)
                table.update(_rows(federation), _sentence(federation, lines[-1]))
            if done:
                return
            _require_alive(federation, processes)
            time.sleep(_POLL)


def _columns(federation: _Federation) -> list[str]:
    return ["holder", "round", federation.task.headline, "ε spent", "of", "seconds a round"]


def _rows(federation: _Federation) -> list[list[str]]:
    lines = federation.rounds()
    seconds = lines[-1]["seconds"] if lines else None
    rows = []
    for name in federation.names:
        note = (federation.notes(name) or [{}])[-1]
        rows.append(
            [
                name,
                f"{note.get('round', 0)}/{federation.plan.rounds}",
                figure(note.get("metrics", {}).get(federation.task.headline)),
                figure(note.get("epsilon_spent"), 2),
                figure(note.get("epsilon_budget"), 2),
                figure(seconds, 2),
            ]
        )
    return rows


def _sentence(federation: _Federation, line: Mapping[str, Any]) -> str:
    headline = federation.task.headline
    parts = []
    for name in federation.names:
        note = (federation.notes(name) or [{}])[-1]
        value = figure(note.get("metrics", {}).get(headline))
        parts.append(f"{name} {value} (ε {figure(note.get('epsilon_spent'), 2)})")
    return (
        f"round {line['round']}/{federation.plan.rounds}, {line['seconds']:.2f} s, {headline}: "
        + ", ".join(parts)
    )


def _require_alive(federation: _Federation, processes: _Processes) -> None:
    """Say which process ended early, and what it said last."""
    from common.errors import RunError

    for name, process in processes.items():
        if process.poll() not in (None, 0):
            log = federation.out / name / "log.txt"
            words = log.read_text(errors="replace").strip().splitlines()
            raise RunError(
                f"the {name} process ended: {words[-1] if words else 'it said nothing'} "
                f"(all its words: {log})"
            )


def _conclude(screen: Screen, federation: _Federation, seconds: float) -> None:
    """Compare with each holder alone and with pooled data, and write the report."""
    from client.trainer import pick_device
    from server.runs import RunFolder
    from simulations.experiment import Baselines, Experiment, ExperimentResult, train_baselines
    from simulations.results import document
    from sotto.report import write_report

    plan, settings, names = federation.plan, federation.settings, federation.names
    experiment = Experiment(
        federation.task, plan, (0,), settings.holders, pick_device(settings.device), baselines=True
    )
    with Rounds(screen, (len(names) + 1) * plan.rounds) as progress:
        local, pooled = train_baselines(experiment, 0, lambda stage, _, __: progress.advance(stage))
    folder = RunFolder(federation.run_folder)
    result = federation.with_notes(folder.result(federation.task))
    written = document(
        ExperimentResult(experiment, names, [result], Baselines([local], [pooled]), seconds)
    )
    report = write_report(folder.path, result, federation.task, written, simulated=False)
    screen.say(
        f"{plan.rounds} rounds in {seconds:.1f} s with starting and stopping; a round takes "
        f"{result.round_median:.3f} s (median)."
    )
    screen.table(
        "What it is worth: this federation, each holder alone, all data pooled",
        *comparison_rows(written),
    )
    screen.say(
        guarantee(plan, federation.task, simulated=False)
        + " The figures above were read from the holders' folders on this machine; over the link "
        "they were not sent."
    )
    screen.say(f"Everything about this run: {report}")
    write_json(settings.output.json, written)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that another process is writing."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
