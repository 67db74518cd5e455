"""`sotto stats`: figures for people, for programs and for plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.runs import RunFolder
from sotto.stats_report import MOST_VALUES, category_rows, number_rows, with_error
from tests.commands import Said, sotto

TASK = "medical-diagnosis"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Said, Path]:
    out = tmp_path_factory.mktemp("stats") / "out"
    columns = "mean radius,worst area,diagnosis"
    said = sotto("stats", TASK, "--epsilon", 8, "--columns", columns, "--out", out)
    assert said.code == 0, said.err
    return said, out


def test_a_person_is_shown_figures_with_error_bars_and_what_they_cost(
    told: tuple[Said, Path],
) -> None:
    said, _ = told
    for part in ("mean radius", "diagnosis = malignant", "±", "4 holders", "ε=8"):
        assert part in said.out
    assert "For each record at each holder, the holder's answer is (8, 0.0001)" in said.out
    assert "its noise was seeded" in said.out


def test_the_folder_has_the_figures_and_a_page_that_needs_nothing_else(
    told: tuple[Said, Path],
) -> None:
    _, out = told
    assert {path.name for path in out.iterdir()} == {"report.html", "statistics.json"}
    written = json.loads((out / "statistics.json").read_text())
    assert set(written["statistics"]["columns"]) == {"mean radius", "worst area", "diagnosis"}
    assert written["simulated"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1
    for part in ("worst area", "diagnosis = benign", "differentially private", "seeded"):
        assert part in page
    assert "src=" not in page
    assert "<script" not in page


def test_json_on_standard_output_is_nothing_but_json(tmp_path: Path) -> None:
    said = sotto("stats", TASK, "--columns", "diagnosis", "--json", "-", "--out", tmp_path / "o")
    assert said.code == 0, said.err
    assert json.loads(said.out)["epsilon"] == 1.0


def test_a_public_range_is_looked_in(tmp_path: Path) -> None:
    said = sotto(
        "stats", TASK, "--columns", "mean radius", "--limit", "mean radius=10:20", "--bins", 5,
        "--epsilon", 8, "--json", "-", "--out", tmp_path / "o",
    )  # fmt: skip
    column = json.loads(said.out)["statistics"]["columns"]["mean radius"]
    assert column["edges"] == [10, 12, 14, 16, 18, 20]
    assert 10 < column["mean"]["value"] < 20


def test_a_scaling_is_written_and_a_plan_uses_it(tmp_path: Path) -> None:
    scaling, run = tmp_path / "scaling.toml", tmp_path / "run"
    said = sotto("stats", TASK, "--epsilon", 8, "--scaling", scaling, "--out", tmp_path / "stats")
    assert said.code == 0, said.err
    assert "each holder paid ε=8 at δ=0.0001" in scaling.read_text()
    said = sotto(
        "simulate", TASK, "--scaling", scaling, "--rounds", 2, "--out", run, "--quiet"
    )  # fmt: skip
    assert said.code == 0, said.err
    (used,) = RunFolder(run).plan.scaling
    assert used.input == "features"
    assert len(used.shift) == 30


def test_a_file_of_ones_own_is_divided_and_asked(tmp_path: Path) -> None:
    from common.tasks import load

    path = tmp_path / "patients.csv"
    load(TASK).source.tables()["clinic-4"].to_csv(path, index=False)
    said = sotto(
        "stats", TASK, "--data", path, "--holders", 3, "--columns", "diagnosis",
        "--epsilon", 20, "--json", "-", "--out", tmp_path / "o",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert json.loads(said.out)["holders"] == ["holder-1", "holder-2", "holder-3"]


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--columns", "radius"], 2, "there is no column 'radius' to ask about"),
        (["--limit", "mean radius"], 2, "--limit must be COLUMN=LOW:HIGH"),
        (["--limit", "mean radius=5"], 2, "--limit must be COLUMN=LOW:HIGH"),
        (["--epsilon", "0"], 2, "epsilon: input should be greater than 0, got 0.0"),
        (["--listen", "127.0.0.1:0"], 2, "give both --listen HOST:PORT and --state DIR"),
        (["--state", "there"], 2, "give both --listen HOST:PORT and --state DIR"),
        (["--insecure"], 2, "belong to --listen"),
        (["--listen", "h:1", "--state", "s", "--data", "f.csv"], 2, "a coordinator has no data"),
        (["--scaling", "s.toml", "--columns", "diagnosis"], 2, "a scaling needs every input"),
        (["--epsilon", "0.01"], 3, "the noise is too large for the 4 holders"),
    ],
)
def test_what_cannot_work_is_a_sentence(flags: list[str], code: int, says: str) -> None:
    said = sotto("stats", TASK, *flags)
    assert says in said.err
    assert said.code == code


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (54.7482, 3.012, "54.7 ± 3.0"),
        (166228.4, 2868.0, "166,228 ± 2,868"),
        (0.00123, 0.0456, "0.001 ± 0.046"),
        (5.0, 0.0, "5"),
        (5.0, None, "5"),
        (None, None, "–"),
    ],
)
def test_figures_have_as_many_digits_as_their_error_leaves(
    value: float | None, error: float | None, text: str
) -> None:
    assert with_error({"value": value, "error": error}) == text


def test_of_many_values_the_most_frequent_are_shown() -> None:
    values = [
        {
            "value": place,
            "count": {"value": float(place), "error": 1.0},
            "share": {"value": place / 100, "error": 0.01},
        }
        for place in range(40)
    ]
    written = {"statistics": {"columns": {"item": {"kind": "category", "values": values}}}}
    _, rows = category_rows(written)
    assert [row[0] for row in rows] == [f"item = {39 - place}" for place in range(MOST_VALUES)]
    assert number_rows(written)[1] == []
