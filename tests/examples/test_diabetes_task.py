"""The example package, seen through its entry point as a third party's would be."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.tasks import load
from common.tasks.tabular import BinaryTask
from tests.common.tasks.contract import (
    check_batches_are_pure,
    check_histogram,
    check_losses_are_per_row,
    check_many_holders_are_judged_as_each_alone,
    check_opacus_gives_each_rows_gradient,
    check_predictions_are_per_unit,
)

PACKAGE = Path(__file__).parents[2] / "examples" / "diabetes_task"


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """What an installation puts on Python's path: the package, and a word about it.

    The entry points are those of its pyproject.toml; nothing is installed or downloaded.
    """
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    lines = ["[sotto.tasks]"]
    lines += [f"{name} = {value}" for name, value in project["entry-points"]["sotto.tasks"].items()]
    about = tmp_path / f"diabetes_task-{project['version']}.dist-info"
    about.mkdir()
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    return [str(tmp_path), str(PACKAGE)]


@pytest.fixture
def task(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[BinaryTask]:
    for path in paths:
        monkeypatch.syspath_prepend(path)
    importlib.invalidate_caches()
    loaded = load("diabetes-risk")
    assert isinstance(loaded, BinaryTask)
    yield loaded
    for name in [name for name in sys.modules if name.split(".")[0] == "diabetes_task"]:
        del sys.modules[name]


def sotto(paths: list[str], folder: Path, *arguments: str) -> str:
    """Standard output of a ``sotto`` process that has the example package."""
    done = subprocess.run(
        [sys.executable, "-m", "sotto.cli", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([*paths, *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_simulated_by_name(paths: list[str], tmp_path: Path) -> None:
    printed = sotto(
        paths, tmp_path, "simulate", "diabetes-risk", "--rounds", "3", "--epsilon", "5",
        "--seeds", "3", "--json", "-",
    )  # fmt: skip
    written = json.loads(printed)
    assert written["task"] == "diabetes-risk"
    assert written["source"] == "generated"
    assert written["holders"] == 4
    assert written["privacy"]["kind"] == "dp"
    assert written["privacy"]["unit"] == "record"
    assert min(written["metrics"]["auc"]["per_seed"]) > 0.6


def test_its_own_file_is_checked(paths: list[str], task: BinaryTask, tmp_path: Path) -> None:
    patients = importlib.import_module("diabetes_task").patients
    patients(50, seed=1).to_csv(tmp_path / "patients.csv", index=False)
    printed = sotto(paths, tmp_path, "data", "check", "diabetes-risk", "patients.csv")
    assert printed.startswith("patients.csv fits diabetes-risk: 50 rows, 9 columns.")


def test_the_contract_holds(task: BinaryTask) -> None:
    data = list(task.holder_data().values())
    train = data[0].train
    check_losses_are_per_row(task, train)
    check_opacus_gives_each_rows_gradient(task, train)
    check_batches_are_pure(task, train)
    check_predictions_are_per_unit(task, train)
    check_histogram(task, data[0].test)
    check_many_holders_are_judged_as_each_alone(task, [own.test for own in data])


def test_inputs_are_about_minus_one_to_one(task: BinaryTask) -> None:
    for data in task.holder_data().values():
        share = (data.train["features"].abs() <= 1).float().mean()
        assert share > 0.95


def test_public_sizes_suit_the_practices(task: BinaryTask) -> None:
    sizes = [len(data.train) for data in task.holder_data().values()]
    assert len(sizes) == 4
    assert min(sizes) < task.source.holder_size < max(sizes)
    assert task.source.delta * max(sizes) < 1


def test_practices_are_the_same_everywhere(task: BinaryTask) -> None:
    first, second = task.source.tables(3), task.source.tables(3)
    assert list(first) == ["practice-1", "practice-2", "practice-3"]
    assert all(first[name].equals(second[name]) for name in first)
    assert torch.equal(
        task.examples(first["practice-1"])["features"],
        task.examples(second["practice-1"])["features"],
    )
