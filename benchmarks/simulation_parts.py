"""What `simulation.py` measures, part by part."""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.floor import floor
from benchmarks.peer_environments import CACHE, measure_peer
from benchmarks.simulated import (
    MLP,
    PFL,
    WARM_UP,
    Case,
    Simulated,
    names_of,
    records,
    simulated,
)
from common.data.on_demand import OnDemand
from common.settings import plan_for
from common.tasks import load as load_task
from common.tasks.base import Examples, HolderData
from server.summaries import RoundSummary
from simulations.experiment import COHORTS_KEPT, Experiment, run_experiment
from simulations.jobs import Assignment, Cut, Job, Judged, Outcome
from simulations.sweep import Sweep, run_sweep
from simulations.workers import Workers

__all__ = ["PARTS", "Options", "Part", "Target"]

_HERE = Path(__file__).resolve().parent
_CHILD_SECONDS = 1_800.0
GIB = 2**30


@dataclass(frozen=True)
class Options:
    """How thoroughly to measure.

    Args:
        cache: folder of the peers' environments.
        quick: a few rounds of everything, to see that it works.
        say: called with what is being done.
    """

    cache: Path = CACHE
    quick: bool = False
    say: Callable[[str], None] = print

    def count(self, full: int, quick: int) -> int:
        """One or the other."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Args:
        name: for people.
        target: the number.
        got: what was measured.
        at_least: whether more is better.
    """

    name: str
    target: float
    got: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.got >= self.target if self.at_least else self.got <= self.target

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "name": self.name,
            "target": self.target,
            "bound": "at least" if self.at_least else "at most",
            "got": float(f"{self.got:.4g}"),
            "met": self.met,
        }


@dataclass
class Part:
    """What came of a part.

    Args:
        case: figures, for JSON.
        targets: for JSON and for people.
        rows: what, and how much, for people.
    """

    case: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)
    rows: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Series:
    """Rounds of one system in one setting, of several runs.

    Args:
        seconds: of each round, warm-up left out.
        load: of the machine when each run began.
        settings: that it ran with.
    """

    seconds: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, seconds: Sequence[float], load: float, **settings: Any) -> None:
        """Another run's."""
        self.seconds += seconds
        self.load.append(load)
        self.settings = settings

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            **self.settings,
            "median": round(self.median, 5),
            "fastest": round(min(self.seconds), 5),
            "rounds": [round(value, 5) for value in self.seconds],
            "load": self.load,
        }


class _Table(dict[str, Series]):
    """Series by label; one that is asked for is there."""

    def __missing__(self, label: str) -> Series:
        self[label] = Series()
        return self[label]

    def document(self) -> dict[str, Any]:
        return {label: series.document() for label, series in self.items()}

    def rows(self) -> list[tuple[str, str]]:
        return [
            (label, f"{series.median:.4f} s a round (fastest {min(series.seconds):.4f})")
            for label, series in self.items()
        ]


def _load() -> float:
    return round(os.getloadavg()[0], 2)


ALL, ONE = "sotto", "sotto, one process"


def _measure_own(table: _Table, case: Case, rounds: int, data: Mapping[str, HolderData]) -> None:
    """A run with as many processes as the engine takes, and a run with one."""
    for label, processes in ((ALL, None), (ONE, 1)):
        _run_own(table, label, case, rounds, data, processes)


def _run_own(
    table: _Table,
    label: str,
    case: Case,
    rounds: int,
    data: Mapping[str, HolderData],
    processes: int | None = None,
) -> Simulated:
    load = _load()
    done = simulated(case.task, case.plan(WARM_UP + rounds), data, processes=processes)
    table[label].add(done.timed, load, processes=done.processes)
    return done


def _measure_peer(table: _Table, name: str, options: Options, *arguments: str) -> dict[str, Any]:
    """A run of a peer's script; one series for each of its settings. Returns its document."""
    load = _load()
    document = measure_peer(name, *arguments, cache=options.cache)
    for result in document["results"]:
        settings = {
            key: result[key] for key in ("style", "processes", "threads", "dp") if key in result
        }
        table[_label(name, settings)].add(result["rounds"], load, **settings)
    return document


def _label(name: str, settings: Mapping[str, Any]) -> str:
    """Such as ``pfl, 2 × 1 threads``: two processes of one thread each."""
    words = [f"{name} {settings['style']}" if "style" in settings else name]
    words.append(f"{settings['processes']} × {settings['threads']} thread(s)")
    if name == "pfl" and settings["dp"]:
        words.append("central DP")
    return ", ".join(words)


def _fastest(table: _Table, start: str) -> Series:
    """Of the settings whose labels begin so, the fastest."""
    return min(
        (series for label, series in table.items() if label.startswith(start)),
        key=lambda series: series.median,
    )


# -- side by side ---------------------------------------------------------------------------------


def mlp(options: Options) -> Part:
    """A hundred holders' DP-SGD beside Flower with Opacus, and Opacus in a loop."""
    table, versions = _Table(), {}
    data, rounds = MLP.data(), options.count(30, 10)
    _measure_own(table, MLP, rounds, data)
    for _ in range(options.count(2, 1)):
        for peer, peer_rounds in (
            ("opacus-loop", options.count(5, 1)),
            ("flower-ray", options.count(6, 1)),
        ):
            for style in ("stock", "tuned"):
                options.say(f"{peer}, {style} ...")
                arguments = ("--style", style, "--rounds", str(peer_rounds))
                versions |= _measure_peer(table, peer, options, *arguments)["versions"]
                _measure_own(table, MLP, rounds, data)
    targets = []
    for peer, name, least in (("flower-ray", "Flower + Opacus", 50), ("opacus-loop", "Opacus", 40)):
        for style in ("stock", "tuned"):
            ratio = _fastest(table, f"{peer} {style}").median / table[ALL].median
            targets.append(Target(f"MLP, times {name} ({style})", least, ratio))
    case = {"case": MLP.label, "systems": table.document(), "versions": versions}
    case["ratios_of_one_process"] = {
        f"{peer} {style}": round(_fastest(table, f"{peer} {style}").median / table[ONE].median, 1)
        for peer in ("flower-ray", "opacus-loop")
        for style in ("stock", "tuned")
    }
    return Part(case, targets, table.rows())


def pfl(options: Options) -> Part:
    """Pfl's case: without DP beside pfl, and with record-level DP beside pfl without any."""
    table, versions = _Table(), {}
    private = replace(PFL, private=True)
    data, rounds = PFL.data(), options.count(30, 10)

    def own() -> None:
        _measure_own(table, PFL, rounds, data)
        for label, processes in ((ALL, None), (ONE, 1)):
            _run_own(table, f"{label}, record-level DP", private, rounds, data, processes)

    own()
    for _ in range(options.count(2, 1)):
        options.say("pfl ...")
        versions |= _measure_peer(table, "pfl", options, "--rounds", str(options.count(20, 3)))[
            "versions"
        ]
        own()
    one, two = (table[_label("pfl", {"processes": n, "threads": 1, "dp": False})] for n in (1, 2))
    targets = [
        Target(
            f"pfl's case, {what}, times pfl of {peer}", least, series.median / table[label].median
        )
        for label, what, least in (
            (ALL, "no DP", 20),
            (f"{ALL}, record-level DP", "record-level DP", 8),
        )
        for series, peer in ((one, "one process"), (two, "two workers"))
    ]
    case = {"case": PFL.label, "systems": table.document(), "versions": versions}
    case["ratios_of_one_process"] = {
        "no DP": round(one.median / table[ONE].median, 1),
        "record-level DP": round(one.median / table[f"{ONE}, record-level DP"].median, 1),
    }
    return Part(case, targets, table.rows())


# -- growth ---------------------------------------------------------------------------------------


def scale(options: Options) -> Part:
    """What a holder's step costs, with few holders and with many."""
    rounds = {100: options.count(20, 6), 1_000: options.count(8, 2), 10_000: options.count(3, 1)}
    data = MLP.of(max(rounds)).data()
    table = _Table()
    for _ in range(options.count(3, 1)):
        for holders, count in rounds.items():
            some = {name: data[name] for name in names_of(holders)}
            for label, processes in (
                (f"{holders} holders", None),
                (f"{holders} holders, one process", 1),
            ):
                options.say(f"{label} ...")
                _run_own(table, label, MLP.of(holders), count, some, processes)

    def cost(holders: int, suffix: str = "") -> float:
        return table[f"{holders} holders{suffix}"].median / (holders * MLP.steps)

    part = Part({"case": MLP.label, "systems": table.document()})
    for suffix in ("", ", one process"):
        costs = {holders: cost(holders, suffix) for holders in rounds}
        part.case[f"us_a_holder_step{suffix}"] = {
            str(holders): round(value * 1e6, 2) for holders, value in costs.items()
        }
        part.rows += [
            (f"{holders} holders{suffix}", f"{value * 1e6:.2f} µs a holder's step")
            for holders, value in costs.items()
        ]
        spread = max(costs.values()) / min(costs.values()) - 1
        part.targets.append(
            Target(
                f"cost of a holder's step, largest over smallest − 1{suffix}",
                0.25,
                spread,
                at_least=False,
            )
        )
    return part


def cohort(options: Options) -> Part:
    """A thousand holders of a hundred thousand, and of a thousand; data made on demand."""
    asked, table, made = 1_000, _Table(), {}
    shared = records(4_096, 0)
    test = records(1, 0)
    rounds = options.count(8, 2)
    for _ in range(options.count(3, 1)):
        for holders in (100_000, asked):
            label = f"{asked:,} of {holders:,}"
            options.say(f"{label} ...")
            # Copies of this process count too.
            counter = multiprocessing.Value("q", 0)

            def make(name: str, counter: Any = counter) -> HolderData:
                with counter.get_lock():
                    counter.value += 1
                first = int(name.rpartition("-")[2]) % (len(shared) - MLP.records)
                return HolderData(_slice(shared, first, MLP.records), test)

            data = OnDemand(names_of(holders), make, COHORTS_KEPT * asked)
            case, load = MLP.of(holders), _load()
            plan = case.plan(WARM_UP + rounds, cohort=asked, min_holders=asked)
            done = simulated(case.task, plan, data)
            table[label].add(done.timed, load, processes=done.processes)
            made[label] = counter.value
    ratio = table[f"{asked:,} of 100,000"].median / table[f"{asked:,} of 1,000"].median
    case = {
        "case": MLP.label,
        "systems": table.document(),
        "rounds_in_a_run": WARM_UP + rounds,
        "made_on_demand_in_a_run": made,
    }
    rows = [
        *table.rows(),
        *(
            (label, f"{count:,} holders' data made in {WARM_UP + rounds} rounds")
            for label, count in made.items()
        ),
    ]
    name = "a round of 1,000 out of 100,000, times one of 1,000 out of 1,000"
    return Part(case, [Target(name, 1.10, ratio, at_least=False)], rows)


def _slice(examples: Examples, first: int, count: int) -> Examples:
    return Examples(
        {name: value[first : first + count] for name, value in examples.tensors.items()}
    )


def memory(options: Options) -> Part:
    """Peak memory of ten thousand holders beyond imports and data, in a process of its own."""
    part = Part()
    holders = 10_000
    for label, chosen in (("all processes", []), ("one process", ["--processes", "1"])):
        options.say(f"{holders:,} holders, {label} ...")
        load = _load()
        command = [sys.executable, str(_HERE / "peak_memory.py"), "--holders", str(holders)]
        found = json.loads(_child([*command, "--rounds", str(options.count(4, 2)), *chosen]))
        part.case[label] = found | {"load": load}
        part.rows.append(
            (
                label,
                f"{found['excess'] / GIB:.3f} GiB beyond {found['imports'] / GIB:.2f} GiB of "
                f"imports and {found['data'] / GIB:.2f} GiB of data; "
                f"{found['processes']} process(es)",
            )
        )
        name = f"GiB beyond imports and data, {holders:,} holders, {label}"
        part.targets.append(Target(name, 1.0, found["excess"] / GIB, at_least=False))
    return part


def _child(command: Sequence[str], folder: Path | None = None) -> str:
    """Standard output of a process that must succeed."""
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=_CHILD_SECONDS
    )
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-4000:]}")
    return finished.stdout


# -- whole experiments ----------------------------------------------------------------------------

_EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, float("inf"))
_SEEDS = 20


def sweep(options: Options) -> Part:
    """Six ε with twenty seeds, over one of these runs: as commands, and in this process."""
    table = _Table()
    task = load_task("medical-diagnosis", "heart-disease")
    holders = len(task.source.tables())
    on_data = ["medical-diagnosis", "--source", "heart-disease"]
    listed = ",".join(f"{epsilon:g}" for epsilon in _EPSILONS)
    commands = {
        "one run, command": ["simulate", *on_data, "--epsilon", "1", "--baselines"],
        "sweep, command": ["sweep", *on_data, "--epsilon", listed, "--seeds", str(_SEEDS)],
    }
    plan = plan_for(task, {"epsilon": 1.0, "min_holders": holders, "evaluate": "never"})
    plan = plan.model_copy(update={"evaluate_every": max(1, plan.rounds // 20)})
    calls: dict[str, Callable[[], object]] = {
        "one run, in process": lambda: run_experiment(Experiment(task, plan, baselines=True)),
        "sweep, in process": lambda: run_sweep(
            Sweep.over(task, {"epsilon": list(_EPSILONS)}, range(_SEEDS))
        ),
    }
    calls["one run, in process"]()  # imports what it needs
    for _ in range(options.count(3, 1)):
        for label, arguments in commands.items():
            options.say(f"$ sotto {' '.join(arguments)}")
            load, seconds = _load(), _command_seconds(arguments)
            table[label].add([seconds], load)
        for label, call in calls.items():
            options.say(f"{label} ...")
            load, begin = _load(), time.perf_counter()
            call()
            table[label].add([time.perf_counter() - begin], load)
    targets = [
        Target(
            f"a sweep of {len(_EPSILONS)} ε × {_SEEDS} seeds, times one run, {how}",
            10.0,
            table[f"sweep, {how}"].median / table[f"one run, {how}"].median,
            at_least=False,
        )
        for how in ("command", "in process")
    ]
    shown = {label: f"sotto {' '.join(arguments)}" for label, arguments in commands.items()}
    rows = [(label, f"{series.median:.2f} s") for label, series in table.items()]
    return Part({"commands": shown, "systems": table.document()}, targets, rows)


def _command_seconds(arguments: Sequence[str]) -> float:
    """Wall time of a command, from the start of its process to the end."""
    with tempfile.TemporaryDirectory(prefix="sotto-benchmark-") as folder:
        begin = time.perf_counter()
        _child(
            [sys.executable, "-m", "sotto.cli", *arguments, "--quiet", "--out", f"{folder}/out"],
            Path(folder),
        )
        return time.perf_counter() - begin


def recommendation(options: Options) -> Part:
    """MovieLens-1M with one user per holder: rounds that ask all of them."""
    users, table = 6_040, _Table()
    part = Part()
    task = load_task("recommendation", "movielens-1m")
    for label, settings in (
        ("ε=5, 1 local step", {"epsilon": 5.0, "local_steps": 1}),
        ("no DP, 10 local steps", {"no_dp": True, "local_steps": 10}),
    ):
        options.say(f"{users:,} holders, {label} ...")
        rounds = {"rounds": options.count(6, 3), "evaluate": "never", "min_holders": users}
        plan = plan_for(task, {**settings, **rounds}, holders=users)
        seconds: list[float] = []
        processes: list[int] = [1]

        def note(
            stage: str,
            seed: int,
            summary: RoundSummary,
            seconds: list[float] = seconds,
            processes: list[int] = processes,
        ) -> None:
            seconds.append(summary.seconds)
            processes.append(1 + len(multiprocessing.active_children()))

        load = _load()
        run_experiment(Experiment(task, plan, holders=users), note)
        table[label].add(seconds[1:], load, processes=max(processes), first=round(seconds[0], 3))
        part.rows.append(
            (label, f"{table[label].median:.2f} s a round, the first {seconds[0]:.2f}")
        )
        name = f"seconds of a round, MovieLens-1M, {users:,} holders, {label}"
        part.targets += [
            Target(name, 10.0, table[label].median, at_least=False),
            Target(f"{name}, the first", 10.0, seconds[0], at_least=False),
        ]
    part.case = {"holders": users, "systems": table.document()}
    return part


# -- Ray ------------------------------------------------------------------------------------------


def ray(options: Options) -> Part:
    """Two one-thread workers over one, on two thousand holders."""
    table = _Table()
    arguments = (
        "--rounds", str(options.count(5, 2)), "--alternations", str(options.count(2, 1))
    )  # fmt: skip
    options.say("sotto on Ray ...")
    found = _measure_peer(table, "sotto-ray", options, *arguments)
    one, two = (
        table[_label("sotto-ray", {"processes": number, "threads": 1})] for number in (1, 2)
    )
    digests = found["case"]["digests"]
    same = len(set(digests.values())) == 1
    case = {"case": found["case"], "systems": table.document(), "versions": found["versions"]}
    targets = [
        Target("Ray, two workers, times one", 1.6, one.median / two.median),
        Target("distinct models of 0, 1 and 2 Ray workers", 1, len(set(digests.values())), False),
    ]
    words = "the same bits" if same else "DIFFERENT BITS"
    return Part(case, targets, [*table.rows(), (", ".join(digests), words)])


# -- floor, determinism ---------------------------------------------------------------------------


def lowest(options: Options) -> Part:
    """What the MLP case costs beside what its products and random numbers cost alone."""
    table = _Table()
    data, rounds = MLP.data(), options.count(30, 10)
    _run_own(table, ONE, MLP, rounds, data, 1)
    least = floor(MLP, options.count(200, 30))
    _run_own(table, ONE, MLP, rounds, data, 1)
    _run_own(table, ALL, MLP, rounds, data)
    own = table[ONE].median
    shares = {name: round(value / own, 3) for name, value in least["seconds"].items()}
    case = {"floor": least, "systems": table.document(), "shares_of_one_process": shares}
    case["times_the_floor"] = round(own / least["total"], 2)
    rows = [
        *table.rows(),
        ("floor, one thread", f"{least['total']:.4f} s a round, {least['total'] / own:.0%}"),
        *(
            (f"floor: {name.replace('_', ' ')}", f"{value:.4f} s, {shares[name]:.0%}")
            for name, value in least["seconds"].items()
        ),
        ("products", f"{least['gflops_a_second']:.0f} GFLOP/s"),
    ]
    return Part(case, [], rows)


class _Recut:
    """Workers whose jobs have so many holders at most, and a note of how many they had.

    Args:
        workers: that compute them.
        holders: in a job at most.
    """

    def __init__(self, workers: Workers, holders: int) -> None:
        self._workers, self._holders = workers, holders
        self.largest = 0

    def measure(self, assignment: Assignment) -> Cut:
        """The engine's own, but for the number of holders."""
        return replace(self._workers.measure(assignment), holders=self._holders)

    def train(self, jobs: Sequence[Job]) -> Iterator[Outcome]:
        """What the engine gives."""
        self.largest = max(self.largest, *(len(job.assignments) for job in jobs))
        return self._workers.train(jobs)

    def evaluate(self, jobs: Sequence[Job]) -> Iterator[list[Judged]]:
        """What the engine gives."""
        return self._workers.evaluate(jobs)

    def close(self) -> None:
        """Close the engine's."""
        self._workers.close()


def determinism(options: Options) -> Part:
    """The same seed gives the same bits; other block sizes, the same numbers but for rounding."""
    # The engine may halve a round that is one block; how large blocks were is noted.
    case, rounds = MLP.of(90), options.count(5, 2)
    data, plan = case.data(), case.plan(rounds)
    runs = {
        "two processes": simulated(case.task, plan, data, processes=2, around=_in_blocks(25)),
        "again": simulated(case.task, plan, data, processes=2, around=_in_blocks(25)),
        "one process": simulated(case.task, plan, data, processes=1, around=_in_blocks(25)),
    }
    digests = {label: run.digest for label, run in runs.items()}
    reference = runs["again"].parameters
    blocks = {}
    for size in (7, 25, 100):
        recuts: list[_Recut] = []
        done = simulated(case.task, plan, data, around=_in_blocks(size, recuts))
        difference = (done.parameters - reference).abs().max() / reference.abs().max()
        blocks[str(size)] = {"largest_job": recuts[0].largest, "difference": float(difference)}
    worst = max(block["difference"] for block in blocks.values())
    distinct = len(set(digests.values()))
    return Part(
        {
            "holders": case.holders,
            "rounds": rounds,
            "processes": {label: run.processes for label, run in runs.items()},
            "sha256": digests,
            "blocks": blocks,
        },
        [
            Target("distinct models of one seed, 1 and 2 processes", 1, distinct, at_least=False),
            Target("largest difference between block sizes", 1e-6, worst, at_least=False),
        ],
        [
            (", ".join(digests), "the same bits" if distinct == 1 else "DIFFERENT BITS"),
            *(
                (f"blocks of {block['largest_job']}", f"differ by {block['difference']:.1e}")
                for block in blocks.values()
            ),
        ],
    )


def _in_blocks(size: int, made: list[_Recut] | None = None) -> Callable[[Workers], Workers]:
    def around(workers: Workers) -> Workers:
        recut = _Recut(workers, size)
        if made is not None:
            made.append(recut)
        return recut

    return around


PARTS: Mapping[str, Callable[[Options], Part]] = {
    "determinism": determinism,
    "floor": lowest,
    "mlp": mlp,
    "pfl": pfl,
    "scale": scale,
    "cohort": cohort,
    "memory": memory,
    "sweep": sweep,
    "ray": ray,
    "recommendation": recommendation,
}
