"""The report: the guarantee in a sentence, whatever was shared and whoever wrote the names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks.histograms import Estimate
from server.runs import RunResult
from server.summaries import RoundSummary
from simulations.results import aggregation_document, privacy_document, summarise
from sotto.report import epsilon_curve, write_report
from tests.tiny import CountedTask, TinyTask

SHARED = {"h0": {"accuracy": 0.5}, "h1": {"accuracy": 0.9}}
Metrics = Mapping[str, Mapping[str, float]]


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TinyTask(), {"rounds": 4, "epsilon": 2.0, **settings})


def history(
    metrics: Metrics | None = None, missed: Mapping[str, str] | None = None
) -> list[RoundSummary]:
    return [
        RoundSummary(number, ("h0", "h1"), missed or {}, 0.1, metrics or {})
        for number in range(1, 5)
    ]


def report(
    folder: Path,
    plan: TrainingPlan,
    rounds: list[RoundSummary],
    *,
    task: TinyTask | None = None,
    simulated: bool = False,
    **extra: object,
) -> str:
    """The page about a run."""
    result = RunResult("run", plan, np.zeros(4, np.float32), rounds)
    shared = rounds[-1].metrics
    written = {
        "holders": 2,
        "seeds": [plan.seed],
        "privacy": privacy_document(plan.privacy),
        "aggregation": aggregation_document(plan, "opacus"),
        "metrics": summarise([shared]) if shared else {},
        **extra,
    }
    path = write_report(folder, result, task or TinyTask(), written, simulated=simulated)
    assert path == folder / "report.html"
    page = path.read_text()
    assert well_formed(page)
    return page


class _Tags(HTMLParser):
    """Whether every tag that needs an end has one, in the right order."""

    VOID = frozenset({"meta", "html", "body", "doctype", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.well = True

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            self.well &= bool(self.open) and self.open.pop() == tag


def well_formed(page: str) -> bool:
    tags = _Tags()
    tags.feed(page)
    return tags.well and not tags.open


def test_the_check_of_tags_can_fail() -> None:
    assert well_formed("<p><b>x</b></p>")
    assert not well_formed("<p><b>x</p></b>")
    assert not well_formed("<p>x")


def test_the_guarantee_is_one_sentence_with_unit_relation_delta_and_adversary(
    tmp_path: Path,
) -> None:
    page = report(tmp_path, plan(), history(SHARED))
    assert escape(plan().privacy.guarantee()) in page
    for part in ("For each record", "(2, 0.0001)", "adding or removing", "against a coordinator"):
        assert part in page
    assert "This was a simulation" not in page
    assert "ε of a holder that took part in every round" in page


def test_a_simulation_says_that_it_was_one(tmp_path: Path) -> None:
    page = report(tmp_path, plan(), history(SHARED), simulated=True)
    assert "This was a simulation: its noise was seeded and its metrics are exact" in page


def test_what_limits_the_guarantee_stands_beside_it(tmp_path: Path) -> None:
    task = TinyTask()
    task.caveat = "Scaled by each holder's own mean."
    page = report(tmp_path, plan(), history(SHARED), task=task)
    quote = page.partition("<blockquote>")[2].partition("</blockquote>")[0]
    assert escape(task.caveat) in quote


def test_no_privacy_is_said_and_no_epsilon_is_drawn(tmp_path: Path) -> None:
    page = report(tmp_path, plan(no_dp=True, epsilon=None), history(SHARED))
    assert "No differential privacy: updates leave the holders without clipping and noise" in page
    assert "ε spent" not in page
    assert "accuracy: mean, and each holder" in page


def test_figures_of_federation_and_baselines_stand_side_by_side(tmp_path: Path) -> None:
    baselines = {"local": {"accuracy": 0.612}, "pooled": {"accuracy": None}}
    page = report(tmp_path, plan(), history(SHARED), baselines=baselines)
    assert "<tr><td>accuracy</td><td>0.700</td><td>0.612</td><td>–</td></tr>" in page
    assert "<th>each holder alone</th><th>pooled data</th>" in page
    assert "<tr><td>h0</td><td>0.500</td></tr><tr><td>h1</td><td>0.900</td></tr>" in page


def test_several_seeds_have_a_deviation(tmp_path: Path) -> None:
    seeds = [SHARED, {"h0": {"accuracy": 0.9}, "h1": {"accuracy": 0.9}}]
    page = report(
        tmp_path, plan(), history(SHARED), simulated=True, seeds=[0, 1], metrics=summarise(seeds)
    )
    assert "2 seeds" in page
    assert "<td>0.800 ± 0.141</td>" in page


def test_without_shared_metrics_it_says_that_the_holders_keep_them(tmp_path: Path) -> None:
    page = report(tmp_path, plan(), history())
    assert "The holders keep their exact figures" in page
    assert "mean, and each holder" not in page
    assert "ε of a holder that took part in every round" in page


def test_with_nothing_to_draw_there_is_no_drawing(tmp_path: Path) -> None:
    page = report(tmp_path, plan(no_dp=True, epsilon=None), history())
    assert "Over the rounds" not in page
    assert "<svg" not in page


def test_an_undefined_figure_is_a_dash(tmp_path: Path) -> None:
    page = report(
        tmp_path, plan(), history({"h0": {"accuracy": math.nan}, "h1": {"accuracy": 0.5}})
    )
    assert "<tr><td>h0</td><td>–</td></tr>" in page
    assert "<tr><td>accuracy</td><td>0.500</td></tr>" in page


def test_missed_rounds_are_listed_with_their_reasons(tmp_path: Path) -> None:
    missed = {"h9": "declined: this run needs ε=2.00 more"}
    page = report(tmp_path, plan(), history(missed=missed))
    listed = page.partition("<h2>Missed rounds</h2>")[2]
    assert listed.count("<td>h9</td>") == 4
    assert "<td>h9</td><td>3</td><td>declined: this run needs ε=2.00 more</td>" in listed
    assert "Missed rounds" not in report(tmp_path, plan(), history())


def test_many_missed_rounds_are_counted_rather_than_listed(tmp_path: Path) -> None:
    missed = {f"h{number}": "no reply within 1 s" for number in range(20)}
    page = report(tmp_path, plan(), history(missed=missed))
    assert page.count("<td>no reply within 1 s</td>") == 50
    assert "… and 30 more." in page


def test_nothing_that_others_wrote_becomes_markup(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    rounds = history({bad: {"accuracy": 0.5}}, missed={f"{bad}2": f"declined: {bad}"})
    named = plan().model_copy(update={"task": bad, "source": bad, "preprocessing": bad})
    task = TinyTask()
    task.caveat = bad
    page = report(tmp_path, named, rounds, task=task, baselines={"local": {}, "pooled": {}})
    assert "<script" not in page
    assert page.count(escape(bad)) >= 6


def test_a_run_without_a_folder_has_no_report() -> None:
    result = RunResult("run", plan(), np.zeros(4, np.float32), history())
    assert write_report(None, result, TinyTask(), {}) is None


@pytest.mark.parametrize("rounds", [1, 4, 100])
def test_the_curve_of_epsilon_ends_at_the_target(rounds: int) -> None:
    numbers, epsilons = epsilon_curve(plan(rounds=rounds), points=20)
    assert list(numbers) == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (1, rounds)
    assert len(numbers) <= 20
    assert list(epsilons) == sorted(epsilons)
    assert 1.99 < epsilons[-1] <= 2.0


def test_released_figures_have_their_price_and_error_bars(tmp_path: Path) -> None:
    """What is lost in the noise is a dash, in the table and in the drawing."""
    wanted = plan_for(CountedTask(), {"rounds": 4, "epsilon": 2.0, "evaluation_epsilon": 0.5})
    lost = Estimate(math.nan, math.nan, math.nan)
    found = {"accuracy": Estimate(0.81, 0.77, 0.85), "auc": lost}
    rounds = [
        RoundSummary(number, ("h0",), {}, 0.1, {}, found if number == 4 else {})
        for number in range(1, 5)
    ]
    evaluation = {"accuracy": {"value": 0.81, "low": 0.77, "high": 0.85}}
    evaluation["auc"] = dict.fromkeys(("value", "low", "high"))
    price = {"epsilon": 0.5, "delta": 1e-4, "noise_multiplier": 6.0, "evaluations": 1}
    page = report(tmp_path, wanted, rounds, evaluation=evaluation, evaluation_price=price)
    assert "From noised histograms" in page
    assert "0.770 to 0.850" in page
    assert "<td>–</td>" in page
    assert "– to –" not in page
    assert "too few held-out units for the noise" in page
    assert "(0.5, 0.0001)-differentially private" in page


def test_the_curve_of_the_account_has_the_evaluations_in_it() -> None:
    settings = {"rounds": 4, "epsilon": 2.0, "evaluate": "every 2"}
    priced = plan_for(CountedTask(), {**settings, "evaluation_epsilon": 1.0})
    free = plan_for(CountedTask(), settings)
    numbers, spent = epsilon_curve(priced)
    without = dict(zip(*epsilon_curve(free), strict=True))
    more = [value - without[number] for number, value in zip(numbers, spent, strict=True)]
    assert more[0] == pytest.approx(0.0, abs=1e-6)
    assert all(difference > 0.01 for difference in more[1:])
