"""`sotto sweep`: lists for flags, one table of results, and nothing that was finished is lost."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.errors import ConfigurationError
from sotto.options import _LISTED, _SHARED, Output, Settings
from sotto.show import Screen, Share, sweep_rows
from sotto.sweep_figure import across, draw, series_of
from sotto.sweep_report import SEARCH, _is_ahead, findings
from tests.commands import Said, sotto
from tests.sotto.test_report import well_formed
from tests.test_docs import ROOT, fenced

TASK = "medical-diagnosis"
QUICK = ("--rounds", 2, "--seeds", 2)


def swept(folder: Path, *words: object) -> tuple[Said, dict[str, Any]]:
    """A sweep that ends well, and its document."""
    said = sotto("sweep", TASK, *QUICK, "--out", folder, *words)
    assert said.code == 0, said.err
    return said, json.loads((folder / "sweep.json").read_text())


def timeless(written: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in written.items() if name != "seconds"}


# -- flags ----------------------------------------------------------------------------------------


def settings(**flags: object) -> Settings:
    return Settings.merged({**dict.fromkeys(_SHARED), **flags}, lists=True)


def test_every_plan_flag_takes_a_list_of_its_type() -> None:
    elements = {int: ("1,2", (1, 2)), float: ("0.5, 1e-3", (0.5, 1e-3)), str: ("a,b", ("a", "b"))}
    for name in _LISTED:
        (kind,) = {kind for kind in _SHARED[name].__origin__.__args__ if kind is not type(None)}
        text, values = elements[kind]
        assert settings(**{name: text}).plan == {name: values}
    assert settings(epsilon="0.5,inf").plan["epsilon"] == (0.5, float("inf"))
    assert {"epsilon", "rounds", "strategy", "clip_norm", "local_steps"} <= _LISTED


def test_a_file_may_give_lists(tmp_path: Path) -> None:
    config = tmp_path / "sweep.toml"
    config.write_text(
        tomli_w.dumps(
            {"epsilon": [1, float("inf")], "batch-size": [32, "full"], "rounds": 5, "seeds": 3}
        )
    )
    read = settings(config=config, rounds="2,3")
    assert read.plan == {
        "epsilon": (1.0, float("inf")), "batch_size": ("32", "full"), "rounds": (2, 3),
    }  # fmt: skip
    assert read.seeds == 3
    with pytest.raises(ConfigurationError, match=r"epsilon must be of type float, got \[1"):
        Settings.merged({**dict.fromkeys(_SHARED), "config": config})  # as simulate reads it


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"epsilon": [1, "two"]}, "epsilon must be of type float, got 'two'"),
        ({"rounds": [1, 2.5]}, "rounds must be of type int, got 2.5"),
        ({"rounds": []}, r"rounds must be of type int, got \[\]"),
        ({"seed": [1, 2]}, "seed must be of type int"),
        ({"seeds": [1, 2]}, "seeds must be of type int"),
    ],
)
def test_a_wrong_list_in_a_file_is_named(
    values: Mapping[str, Any], says: str, tmp_path: Path
) -> None:
    config = tmp_path / "sweep.toml"
    config.write_text(tomli_w.dumps(values))
    with pytest.raises(ConfigurationError, match=says):
        settings(config=config)


def test_baselines_are_on_unless_they_are_declined() -> None:
    assert settings().baselines
    assert not settings(baselines=False).baselines
    assert not Settings.merged(dict.fromkeys(_SHARED)).baselines


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--epsilon", "1,two"], "--epsilon 1,two: element 2 is 'two', which is not of type float"),
        (["--rounds", "1,2.5"], "--rounds 1,2.5: element 2 is '2.5', which is not of type int"),
        (["--rounds", "1,,2"], "element 2 is '', which is not of type int"),
        (["--seed", "1,2"], "'1,2' is not a valid integer"),
        (["--rounds", "2,2"], "rounds has 2 twice"),
        (["--strategy", "fedavg,mine"], "there is no strategy 'mine'; there are fedavg, "),
        (["--epsilon", "1,inf", "--no-dp"], "contradict each other"),
        (["--epsilon", "1,-1"], "epsilon must be positive"),
        (["--learning-rate", "0.1,-1"], "learning_rate: input should be greater than 0"),
        (["--engine", "opacus"], "trains one holder at a time and cannot sweep"),
        (["--engine", "mine"], "there is no engine 'mine' to sweep with; use batched or ray"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--json", "no/such/folder.json"], "must be a file in a folder"),
    ],
)
def test_a_mistake_is_a_sentence_and_leaves_nothing_behind(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = sotto("sweep", TASK, *words)
    assert said.code == 2
    assert said.err.startswith("sotto: ")
    assert says in said.err
    assert not list(tmp_path.iterdir())


# -- what comes out -------------------------------------------------------------------------------


def test_a_sweep_leaves_table_document_picture_and_page(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "sweep"
    said, written = swept(
        folder, "--epsilon", "1,inf", "--strategy", "fedavg,fedadam", "--json", tmp_path / "s.json"
    )
    assert json.loads((tmp_path / "s.json").read_text()) == written
    assert list(written["swept"].items()) == [
        ("strategy", ["fedavg", "fedadam"]),
        ("epsilon", [1.0, None]),
    ]
    assert len(written["points"]) == 4
    assert written["seeds"] == [0, 1]
    for row in sweep_rows(written)[1]:
        assert all(cell in said.out for cell in row)
    for sentence in (*findings(written), SEARCH):
        assert sentence in said.out.replace("\n", " ")
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert well_formed(page)
    assert "<svg" in page
    assert page.count("<details>") == 4
    for words in ("(ε, 0.0001)-differentially private", "no ε above covers it", "seeded"):
        assert words in page
    assert not re.findall(r"""(?:src|href)=["'][^#]""", page)


def test_json_on_standard_output_is_alone_there(tmp_path: Path) -> None:
    said = sotto(
        "sweep", TASK, *QUICK, "--no-baselines", "--json", "-", "--out", tmp_path, "--seed", 5
    )
    written = json.loads(said.out)
    assert written["seeds"] == [5, 6]
    assert written["swept"] == {}
    assert "baselines" not in written["points"][0]
    assert "Sweeping medical-diagnosis" in said.err


def test_a_failed_run_is_counted_and_named(tmp_path: Path) -> None:
    said, written = swept(tmp_path, "--no-dp", "--learning-rate", "0.1,1e30")
    assert [len(point["failed"]) for point in written["points"]] == [0, 6]
    assert "6 run(s) failed and count nothing; the first: seed 0, federation:" in said.out
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Failed runs</h2>" in page
    assert "without a result: learning rate 1e+30" in draw(written).get_suptitle()


def test_the_example_for_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = fenced((ROOT / "docs/sweep.md").read_text(), "python")
    exec(compile(example, "docs/sweep.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index("}") + 1] for line in lines] == [
        "{'epsilon': 1.0}", "{'epsilon': 8.0}", "{'epsilon': None}",
    ]  # fmt: skip


# -- going on -------------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    words = ("--epsilon", "1,inf")
    first, written = swept(tmp_path, *words)
    assert "found finished" not in first.out
    runs = tmp_path / "runs.jsonl"
    lines = runs.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2 * 6
    runs.write_text("".join(lines[: len(lines) // 2]))

    again, rewritten = swept(tmp_path, *words)
    assert f"12 of 24 runs were found finished in {tmp_path}" in again.out.replace("\n", " ")
    assert timeless(rewritten) == timeless(written)
    assert sorted(runs.read_text().splitlines(keepends=True)) == sorted(lines)


def test_an_interrupted_process_goes_on_where_it_was(tmp_path: Path) -> None:
    # The first stack, without privacy, is done soon; the second one is long.
    words = ["sweep", TASK, "--no-dp", "--rounds", "2,200000", "--no-baselines", "--quiet"]
    command = [sys.executable, "-m", "sotto.cli", *words, "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        runs, until = tmp_path / "runs.jsonl", time.monotonic() + 120
        while not (runs.exists() and runs.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert f"the same command with --out {tmp_path} goes on from there" in out
    assert err.strip() == "sotto: interrupted"
    assert len(runs.read_text().splitlines()) == 1

    said = sotto("sweep", TASK, "--no-dp", "--rounds", "2,3", "--no-baselines", "--out", tmp_path)
    assert said.code == 0
    assert "1 of 2 runs were found finished" in said.out


# -- words and lines ------------------------------------------------------------------------------


def document(
    federation: list[float | None], local: list[float | None], values: list[object], name: str
) -> dict[str, Any]:
    """A document with these means, one point a value."""

    def summary(mean: float | None) -> dict[str, Any]:
        if mean is None:
            return {}
        return {"auc": {"mean": mean, "sd": 0.01, "per_seed": [mean] * 2, "per_holder": {}}}

    return {
        "task": "t", "source": "s", "preprocessing": "default", "holders": 3, "seeds": [0, 1],
        "headline": "auc", "swept": {name: values},
        "points": [
            {
                "settings": {name: value}, "rounds": 5, "metrics": summary(mine),
                "baselines": {"local": summary(alone), "pooled": summary(0.9)}, "failed": [],
            }
            for value, mine, alone in zip(values, federation, local, strict=True)
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("federation", "local", "says"),
    [
        ([0.8, 0.8, 0.8], [0.7, 0.7, 0.7], ["At ε = 1 the", "everywhere that was tried"]),
        (
            [0.6, 0.8, 0.8],
            [0.7, 0.7, 0.7],
            ["At ε = 2 the", "over seeds, at ε = 2 and without DP."],
        ),
        (
            [0.8, 0.6, 0.8],
            [0.7, 0.7, 0.7],
            ["At ε = 1 the", "over seeds, at ε = 1 and without DP."],
        ),
        ([0.6, 0.6, 0.6], [0.7, 0.7, 0.7], ["Without DP the", "nowhere that was tried"]),
        ([None, 0.8, 0.8], [0.7, 0.7, 0.7], ["At ε = 2 the", "everywhere"]),
        (
            [0.8, 0.8, 0.8],
            [0.7, None, 0.7],
            ["At ε = 1 the", "over seeds, at ε = 1 and without DP."],
        ),
        ([None, None, None], [0.7, 0.7, 0.7], ["no run came to an end"]),
    ],
)
def test_the_finding_names_the_smallest_epsilon_at_which_joining_is_worth_it(
    federation: list[float | None], local: list[float | None], says: list[str]
) -> None:
    written = document(federation, local, [1.0, 2.0, None], "epsilon")
    (sentence,) = findings(written)
    assert all(words in sentence for words in says), sentence
    assert draw(written)


def test_a_difference_that_chance_over_seeds_makes_is_none() -> None:
    written = document([0.8], [0.7], [1.0], "epsilon")
    (point,) = written["points"]
    point["metrics"]["auc"]["per_seed"] = [0.9, 0.7, None]
    point["baselines"]["local"]["auc"]["per_seed"] = [0.7, 0.7, 0.9]
    assert not _is_ahead(point, "auc")
    point["baselines"]["local"]["auc"]["per_seed"] = [0.75, 0.6, 0.9]
    assert _is_ahead(point, "auc")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([0.001, 0.01, 1.0], "learning_rate"),
        (["fedavg", "krum", "fedadam"], "strategy"),
        (["16", "64", "full"], "batch_size"),
        ([None, 3.0, 1.0], "epsilon"),
    ],
)
def test_any_setting_can_lie_along_the_axis(values: list[object], name: str) -> None:
    written = document([0.8, 0.7, 0.6], [0.5, 0.5, 0.5], values, name)
    assert across(written) == name
    (series,) = series_of(written)
    assert len(series.points) == 3
    figure = draw(written)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(set(labels)) == 3


def test_lines_of_progress_are_few_and_tell_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("sotto.show.time.monotonic", lambda: now[0])
    with Share(Screen(Output(quiet=True))) as progress:
        for step in range(1, 1001):
            now[0] += 0.3
            progress.reached(step / 1000, "work")
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 20
    assert lines[0] == "5% done, about 5 min left (work)"
