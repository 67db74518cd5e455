"""What the coordinator saw of a masked run: said on the terminal, in the page and in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.distributed import against_coalitions
from common.settings import plan_for
from common.wire import dropped_error, error_message, lost_error
from server.runs import RunResult
from server.summaries import RoundSummary
from simulations.results import MOST_COALITIONS, aggregation_document, run_document
from simulations.sweep import Sweep
from sotto.report import epsilon_curve, write_report
from sotto.show import guarantee
from sotto.sums import (
    MASKS_LEFT_OUT,
    aggregation_rows,
    coalition_note,
    coalition_rows,
    lost_sentence,
    masks_sentence,
    missed,
    missed_words,
)
from sotto.sweep_report import guarantees
from tests.commands import sotto
from tests.masked import masked_plan
from tests.sotto.test_report import well_formed
from tests.tiny import CountedTask, TinyTask

TASK = TinyTask()
WHY = "fewer than 3 holders remained for a masked sum"


def about(level: str = "secure-sum", holders: int = 4, **settings: object) -> dict[str, Any]:
    return aggregation_document(masked_plan(level, holders, **settings), "batched")


def history(plan: TrainingPlan, *lost: int) -> list[RoundSummary]:
    gone = {
        "h0": error_message(lost_error("4 of 5 remained")),
        "h3": error_message(dropped_error("no reply within 60 s")),
    }
    return [
        RoundSummary(number, (), gone, 0.1, lost=WHY)
        if number in lost
        else RoundSummary(number, ("h0", "h1", "h2"), {"h3": "away when the round began"}, 0.1)
        for number in range(1, plan.rounds + 1)
    ]


def run(level: str = "secure-sum", *lost: int, **settings: object) -> RunResult:
    plan = masked_plan(level, 4, **{"rounds": 5, **settings})
    return RunResult("run", plan, np.zeros(4, np.float32), history(plan, *lost))


# -- the document ---------------------------------------------------------------------------------


def test_the_document_has_the_level_its_threshold_and_its_ring() -> None:
    plan = masked_plan("secure", 7)
    assert aggregation_document(plan, "opacus") == {
        "kind": "secure",
        "cohort": 7,
        "threshold": 5,
        "tolerated_dropouts": 2,
        "tolerated_helpers": 2,
        "neighbours": None,
        "ring_bits": 32,
        "bytes_per_parameter": 4,
        "masks_computed": True,
    }
    assert aggregation_document(masked_plan("plain", 7), "opacus") == {"kind": "plain"}


@pytest.mark.parametrize(
    ("engine", "computed"), [("batched", False), ("ray", False), ("opacus", True)]
)
def test_masks_are_computed_by_the_engine_that_runs_the_protocol(
    engine: str, computed: bool
) -> None:
    assert aggregation_document(masked_plan(), engine)["masks_computed"] is computed


@pytest.mark.parametrize("holders", range(2, 12))
def test_helpers_are_fewer_than_would_sign_two_lists(holders: int) -> None:
    """c helpers sign both of two lists and n − c honest holders one: 2t must be more."""
    found = about("secure", holders)
    helpers, threshold = found["tolerated_helpers"], found["threshold"]
    assert 2 * threshold > holders + helpers
    assert not 2 * threshold > holders + helpers + 1


def test_a_coalition_costs_epsilon() -> None:
    plan = masked_plan("secure-sum", 7, coalition=2)
    found = aggregation_document(plan, "batched")
    assert found["coalition"] == 2
    spent = [each["epsilon"] for each in found["coalitions"]]
    assert [each["holders"] for each in found["coalitions"]] == list(range(plan.min_holders))
    assert spent == sorted(spent)
    assert spent[2] <= plan.privacy.epsilon < spent[3]
    assert spent[2] == pytest.approx(epsilon(plan.composition(), plan.privacy.delta), rel=0.01)


def test_of_many_sizes_of_a_coalition_some_are_shown_with_both_ends() -> None:
    plan = masked_plan("secure-sum", 60)
    found = aggregation_document(plan, "batched")["coalitions"]
    assert len(found) == MOST_COALITIONS
    everybody = against_coalitions(plan)
    for shown, each in ((found[0], everybody[0]), (found[-1], everybody[-1])):
        assert (shown["holders"], shown["epsilon"]) == (each.holders, each.epsilon)


def test_lost_rounds_are_in_the_document_with_their_seed_and_reason() -> None:
    written = run_document(run("secure-sum", 2, 3), "cpu")
    assert written["lost_rounds"] == [{"seed": 0, "round": number, "why": WHY} for number in (2, 3)]
    assert run_document(run("secure"), "cpu")["lost_rounds"] == []
    assert "lost_rounds" not in run_document(run("plain"), "cpu")
    assert json.loads(json.dumps(written, allow_nan=False)) == written


# -- words ----------------------------------------------------------------------------------------


def test_a_guarantee_says_what_masks_add() -> None:
    said = guarantee(masked_plan("secure", 7), TASK, simulated=False)
    assert "against a coordinator that sees every update" in said
    assert "sees the sum of at least 5 of 7 and nothing else" in said
    assert "even if it lies and has the help of 2 holders, which can tell it their own" in said
    assert "masked" not in guarantee(masked_plan("plain", 7), TASK, simulated=False)


def test_a_guarantee_of_sums_says_whose_noise_it_counts_on() -> None:
    said = guarantee(masked_plan("secure-sum", 7, coalition=2), TASK, simulated=False)
    assert "the sums of this run are (2, 0.0001)-differentially private" in said
    assert "a sum with noise of 3 holders that it does not know" in said
    two = guarantee(masked_plan("secure", 2), TASK, simulated=False)
    assert "has the help of 1 holder, which can tell it its own part and no other." in two


def test_evaluations_are_in_the_guarantee_of_sums() -> None:
    task = CountedTask()
    settings = {"aggregation": "secure-sum", "epsilon": 2.0, "evaluation_epsilon": 0.5}
    plan = plan_for(task, settings, holders=4)
    total = epsilon(plan.composition(), plan.privacy.delta)
    said = guarantee(plan, task, simulated=False)
    assert f"the sums of this run are ({total:.3g}, 0.0001)" in said
    assert "That is sums of updates, at (2, 0.0001), and 1 noised histogram" in said


def test_the_curve_of_epsilon_is_that_of_the_sums() -> None:
    plan = masked_plan("secure-sum", 4, rounds=9)
    numbers, spent = epsilon_curve(plan)
    assert numbers[-1] == 9
    assert 1.99 < spent[-1] <= 2.0


def test_it_is_said_whether_anything_was_masked() -> None:
    assert "were not computed" in masks_sentence({"masks_computed": False})
    assert "The whole protocol ran" in masks_sentence({"masks_computed": True})


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ((), ""),
        ((2,), "1 of 5 rounds was lost: fewer than 3 holders remained"),
        ((2, 4), "2 of 5 rounds were lost: fewer than 3 holders remained"),
    ],
)
def test_lost_rounds_are_counted(lost: tuple[int, ...], said: str) -> None:
    assert lost_sentence(run_document(run("secure", *lost), "cpu")).startswith(said)
    assert bool(lost_sentence(run_document(run("secure", *lost), "cpu"))) == bool(said)


def test_who_did_its_part_in_a_lost_round_did_not_miss_it() -> None:
    one = history(masked_plan(rounds=1), 1)[0]
    assert missed(one) == {"h3": "no reply within 60 s"}
    assert missed_words(one) == f"LOST, {WHY}: h3 no reply within 60 s"


def test_holders_that_miss_a_round_for_one_reason_are_named_together() -> None:
    one = RoundSummary(1, ("a",), {"b": "away", "c": "declined: no", "d": "away"}, 0.1)
    assert missed_words(one) == "b, d away; c declined: no"
    assert missed_words(RoundSummary(1, ("a",), {}, 0.1)) == ""


def test_a_table_says_how_far_helpers_are_borne() -> None:
    found = about("secure-sum", 4)
    assert [row[0] for row in coalition_rows(found)[1]] == ["0", "1", "2"]
    assert [row[2] for row in coalition_rows(found)[1]] == ["lies", "lies", "keeps to the protocol"]
    assert "With more than 1 helper, a coordinator that lies" in coalition_note(found)
    everybody = about("secure-sum", 4, dropouts=0.0)
    assert coalition_note(everybody) == ""
    assert ["holders in a sum, at least", "4"] in aggregation_rows(everybody)[1]


def test_cohorts_with_neighbours_say_how_many() -> None:
    rows = dict(map(tuple, aggregation_rows(about("secure", 400))[1]))  # type: ignore[arg-type]
    assert rows["each holder shares masks with"].endswith(" others")
    assert rows["helpers that a lying coordinator may have"] == "40"


# -- pages and commands ---------------------------------------------------------------------------


def page_about(folder: Path, result: RunResult) -> str:
    path = write_report(folder, result, TASK, run_document(result, "cpu"), simulated=False)
    assert path is not None
    page = path.read_text()
    assert well_formed(page)
    return page


def test_the_page_says_what_the_coordinator_saw_and_what_was_lost(tmp_path: Path) -> None:
    page = page_about(tmp_path, run("secure-sum", 2))
    assert "secure-sum aggregation" in page
    assert "<h2>What the coordinator saw</h2>" in page
    assert "<tr><td>holders in a sum, at least</td><td>3</td></tr>" in page
    assert "<h2>If holders tell the coordinator their noise</h2>" in page
    assert f"<tr><td>0</td><td>2</td><td>{WHY}</td></tr>" in page
    assert "1 of 5 rounds was lost" in page
    missed_rounds = page.partition("<h2>Missed rounds</h2>")[2]
    assert "no reply within 60 s" in missed_rounds
    assert "4 of 5 remained" not in missed_rounds


def test_a_plain_page_has_nothing_of_it(tmp_path: Path) -> None:
    page = page_about(tmp_path, run("plain"))
    assert "coordinator saw" not in page
    assert "Lost rounds" not in page


def test_a_sweep_over_levels_says_what_each_promises() -> None:
    levels = ["plain", "secure", "secure-sum"]
    sweep = Sweep.over(TASK, {"aggregation": levels, "epsilon": [1.0, 2.0]}, holders=4)
    thresholds = {each.plan.aggregation.kind: each.plan.min_holders for each in sweep.settings}
    assert thresholds == {"plain": 4, "secure": 3, "secure-sum": 3}
    said = guarantees(sweep)
    assert "With aggregation plain or secure: For each record" in said
    assert "With aggregation secure-sum: For each record at each holder, the sums" in said
    assert MASKS_LEFT_OUT in said
    plain = guarantees(Sweep.over(TASK, {"epsilon": [1.0, 2.0]}, holders=4))
    assert "With aggregation" not in plain
    assert MASKS_LEFT_OUT not in plain


def simulate(folder: Path, *words: object) -> tuple[str, Mapping[str, Any]]:
    target = folder / "result.json"
    said = sotto(
        *("simulate", "medical-diagnosis", "--rounds", 6, "--epsilon", 2, "--quiet"),
        *("--json", target, "--out", folder / "run", *words),
    )
    assert said.code == 0, said.err
    return said.out, json.loads(target.read_text())


def test_the_command_says_it_all(tmp_path: Path) -> None:
    said, written = simulate(tmp_path, "--aggregation", "secure-sum", "--baselines")
    for part in ("What the coordinator saw", "If holders tell", "The masks were not computed"):
        assert part in said
    assert written["aggregation"]["threshold"] == 3
    assert written["lost_rounds"] == []
    assert set(written["baselines"]) == {"local", "pooled"}


def test_faults_of_a_masked_run_are_drops_out_of_a_sum(tmp_path: Path) -> None:
    words = ("--aggregation", "secure", "--holders", 6, "--dropout", 0.2, "--seed", 1)
    said, written = simulate(tmp_path, *words)
    assert written["faults"]["dropped"] > 0
    assert written["aggregation"]["threshold"] == 5, "faults do not lower what masks need"
    lost = len(written["lost_rounds"])
    assert lost, "the seed is one with a lost round"
    assert f"{lost} of 6 rounds" in said
