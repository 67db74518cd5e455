"""Coordinator and holders as processes over mTLS: they train, stay, come back, and keep account."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.events import Composition
from common.settings import plan_for
from common.tasks import load
from server.runs import RunFolder, resume_or_begin
from server.summaries import RoundSummary
from tests.integration.federation import (
    CLINICS,
    PATIENCE,
    SOURCE,
    Account,
    Federation,
    end,
    ended,
    kill,
    lines,
    sotto,
    wait_for_words,
)
from tests.integration.processes import Process, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROUNDS, EPSILON = 5, 3.0
OWN_FILE = "own-file"


# -- one run, from the first key to the last signal -----------------------------------------------


@dataclass(frozen=True)
class Finished:
    """What one run of three holders left.

    Args:
        federation: its folders.
        run: the coordinator's run folder.
        served: exit code of `sotto serve`, and everything it said.
        stayed: holder → whether its process was alive after the run.
        left: holder → exit code after SIGTERM, and everything it said.
    """

    federation: Federation
    run: RunFolder
    served: tuple[int, str]
    stayed: dict[str, bool]
    left: dict[str, tuple[int, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`sotto serve`, keys by hand, three `sotto join` (one with a file of its own), SIGTERM."""
    federation = Federation(tmp_path_factory.mktemp("federation"))
    own = federation.folder / "patients.csv"
    load("medical-diagnosis", SOURCE).source.tables()["clinic-3"].to_csv(own, index=False)

    plan = ("--rounds", ROUNDS, "--epsilon", EPSILON, "--min-holders", 3)
    with federation.serve(*plan) as coordinator, ExitStack() as stack:
        wait_for_words(coordinator, "Waiting for at least 3 holders")  # its keys are made
        holders = {}
        for name in (*CLINICS, OWN_FILE):
            exchange_keys(federation, name)
            data = ("--data", own) if name == OWN_FILE else ()
            holders[name] = stack.enter_context(federation.join(name, "--budget", EPSILON, *data))
        served = ended(coordinator, *holders.values())
        for holder in holders.values():
            wait_for_words(holder, "trying again")  # it has seen the coordinator go
        stayed = {name: holder.handle.poll() is None for name, holder in holders.items()}
        left = {name: (end(holder), holder.output) for name, holder in holders.items()}
    (run,) = federation.runs
    return Finished(federation, run, (served, coordinator.output), stayed, left)


def exchange_keys(federation: Federation, name: str) -> None:
    """What two people do with `sotto keys`, each on their own machine."""
    holder, coordinator = federation.holder(name), federation.coordinator
    sotto("keys", "request", "--name", name, "--state", holder)
    sotto("keys", "approve", holder / "keys" / f"{name}.request.pem", "--state", coordinator)
    sotto("keys", "install", coordinator / "keys" / "bundles" / f"{name}.pem", "--state", holder)


def test_a_run_ends_well_and_leaves_model_plan_figures_and_report(finished: Finished) -> None:
    code, said = finished.served
    assert code == 0, said
    left = {path.name for path in finished.run.path.iterdir()}
    assert left == {"model.safetensors", "plan.toml", "metrics.jsonl", "report.html"}

    result = finished.run.result(load("medical-diagnosis", SOURCE))
    assert [summary.round for summary in result.history] == [1, 2, 3, 4, 5]
    assert all(set(each.accepted) == {*CLINICS, OWN_FILE} for each in result.history)
    assert not any(summary.missed for summary in result.history)
    assert float(abs(result.parameters).max()) > 0
    assert result.plan.privacy.guarantee() in said


def test_a_holder_trains_on_a_file_of_its_own(finished: Finished) -> None:
    account = finished.federation.account(OWN_FILE)
    account.require_each_round_once(finished.run.plan, finished.run.run_id)
    assert lines(finished.federation.holder(OWN_FILE) / "metrics.jsonl")[-1]["metrics"]["auc"] > 0.5


def test_holders_stay_joined_after_the_run_and_leave_on_sigterm(finished: Finished) -> None:
    assert finished.stayed == dict.fromkeys((*CLINICS, OWN_FILE), True)
    for name, (code, said) in finished.left.items():
        assert code == 0, said
        assert f"{name}: left." in said


def test_no_figure_of_a_holder_reaches_the_coordinator(finished: Finished) -> None:
    fields = {"time"} | {field.name for field in dataclasses.fields(RoundSummary)}
    rounds = lines(finished.run.path / "metrics.jsonl")
    assert [set(line) for line in rounds] == [fields] * ROUNDS
    assert [(line["metrics"], line["evaluation"]) for line in rounds] == [({}, {})] * ROUNDS
    assert "keep their exact figures" in (finished.run.path / "report.html").read_text()
    # There was something to keep: each holder evaluated, and noted it down at home.
    for name in (*CLINICS, OWN_FILE):
        assert lines(finished.federation.holder(name) / "metrics.jsonl")[-1]["metrics"]["auc"] > 0


# -- the account over runs and restarts -----------------------------------------------------------


def test_three_runs_cost_what_their_steps_cost_together_and_a_fourth_is_refused(
    tmp_path: Path,
) -> None:
    settings = {"rounds": ROUNDS, "epsilon": EPSILON}
    once = plan_for(load("medical-diagnosis", SOURCE), settings)
    delta = once.privacy.delta
    price = epsilon(once.composition() * 3, delta)
    assert price < 3 * EPSILON  # composed, not added up: the figure says something
    budget = math.ceil(price * 1000) / 1000

    federation = Federation(tmp_path)
    federation.enrol(*CLINICS)
    flags = ("--rounds", ROUNDS, "--epsilon", EPSILON)
    for number in (1, 2, 3):
        with ExitStack() as stack:
            clinics = [  # started anew for every run
                stack.enter_context(federation.join(name, "--budget", budget)) for name in CLINICS
            ]
            coordinator = stack.enter_context(federation.serve(*flags))
            assert ended(coordinator, *clinics) == 0, coordinator.last_words()
            if number < 3:
                continue
            refused = stack.enter_context(federation.serve(*flags))
            assert ended(refused, *clinics) == 3, refused.last_words()

    plans = [run.plan for run in federation.runs]
    assert plans[:3] == [plans[0]] * 3
    expected = epsilon(Composition.sum(plan.composition() for plan in plans[:3]), delta)
    assert expected == pytest.approx(price, rel=1e-9)
    for name in CLINICS:
        account = federation.account(name)
        assert account.epsilon == pytest.approx(expected, rel=1e-9)
        assert account.states == {"reserved": 15, "committed": 15}
        assert account.releases.total() == len(account.releases) == 15
        answered = {path.name for path in (federation.holder(name) / "answers").iterdir()}
        assert answered == {run.run_id for run in federation.runs[:3]}  # nothing for the fourth

    said = " ".join(refused.output.split())
    assert "round 1: 0 of at least 2 updates were accepted" in said
    for name in CLINICS:
        assert f"{name}: declined: budget: data set 'default': this run needs ε=" in said
    assert f"0.00 of {budget:.2f} is left" in said


def test_evaluations_are_released_at_their_price_and_once(tmp_path: Path) -> None:
    """Over the real link: noised counts come, figures with error bars are in the run's folder."""
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS)
    with ExitStack() as stack:
        for name in CLINICS:
            sotto(
                "policy", "init", "--state", federation.holder(name), "--task", "medical-diagnosis",
                "--source", SOURCE, "--budget", 20, "--evaluation", "histogram",
            )  # fmt: skip
        clinics = [stack.enter_context(federation.join(name)) for name in CLINICS]
        asked = ("--evaluate", "every 2", "--evaluation-epsilon", 8)
        coordinator = stack.enter_context(federation.serve("--rounds", 3, *asked))
        assert ended(coordinator, *clinics) == 0, coordinator.last_words()
    found = [line["evaluation"] for line in federation.rounds()]
    assert [bool(each) for each in found] == [False, True, True]
    assert 0 <= found[-1]["accuracy"]["low"] <= found[-1]["accuracy"]["high"] <= 1
    assert not any(line["metrics"] for line in federation.rounds())
    assert "From noised histograms" in (federation.runs[-1].path / "report.html").read_text()
    plan = federation.runs[-1].plan
    for name in CLINICS:
        account = federation.account(name)
        assert account.states == {"reserved": 5, "committed": 5}, "three updates, two evaluations"
        assert account.epsilon == pytest.approx(epsilon(plan.composition(), plan.privacy.delta))


# -- power cuts -----------------------------------------------------------------------------------

# Long enough to be cut in the middle; evaluation would only slow it down.
LONG = ("--rounds", 200, "--epsilon", EPSILON, "--evaluate", "never")


def wait_for_round(federation: Federation, number: int, *watching: Process) -> None:
    wait_until(
        lambda: len(federation.rounds()) >= number, f"round {number}",
        timeout=PATIENCE, watching=watching,
    )  # fmt: skip


@pytest.fixture
def holders(tmp_path: Path) -> Iterator[tuple[Federation, dict[str, Process]]]:
    """Two clinics, started before their coordinator."""
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS)
    with ExitStack() as stack:
        yield (
            federation,
            {
                name: stack.enter_context(federation.join(name, "--budget", EPSILON))
                for name in CLINICS
            },
        )


def accounts(federation: Federation, holders: dict[str, Process]) -> list[Account]:
    for holder in holders.values():
        assert end(holder) == 0, holder.last_words()
    return [federation.account(name) for name in holders]


def test_a_coordinator_killed_in_mid_run_goes_on_where_it_stopped(
    holders: tuple[Federation, dict[str, Process]],
) -> None:
    federation, clinics = holders
    with federation.serve(*LONG) as coordinator:
        wait_for_round(federation, 3, coordinator, *clinics.values())
        kill(coordinator)
    before = federation.rounds()
    assert 3 <= len(before) < 200
    (run,) = federation.runs
    done = run.rounds_done

    with federation.serve(*LONG) as coordinator:
        assert ended(coordinator, *clinics.values()) == 0, coordinator.last_words()
        assert f"its newest checkpoint is of round {done}." in coordinator.output

    (run,) = federation.runs  # no second run was begun
    rounds = federation.rounds()
    assert [line["round"] for line in rounds] == list(range(1, 201))
    # These were not done again; the last one's line is missing if the kill came between its
    # checkpoint and the line.
    noted = before[:done]
    assert rounds[: len(noted)] == noted
    assert len(noted) >= done - 1
    for account in accounts(federation, clinics):
        account.require_each_round_once(run.plan, run.run_id)


def test_a_holder_killed_in_mid_run_comes_back_and_pays_no_round_twice(
    holders: tuple[Federation, dict[str, Process]],
) -> None:
    federation, clinics = holders
    first, second = CLINICS
    with federation.serve(*LONG) as coordinator:
        wait_for_round(federation, 3, coordinator, *clinics.values())
        kill(clinics[first])
        assert len(federation.rounds()) < 200
        with federation.join(first, "--budget", EPSILON) as again:
            assert ended(coordinator, again, clinics[second]) == 0, coordinator.last_words()
            (run,) = federation.runs
            assert {tuple(sorted(line["accepted"])) for line in federation.rounds()} == {CLINICS}
            for account in accounts(federation, {first: again, second: clinics[second]}):
                account.require_each_round_once(run.plan, run.run_id)


# -- what does not work, and says so --------------------------------------------------------------


def test_a_holder_off_the_roster_or_of_another_authority_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.enrol("removed")
    (federation.coordinator / "keys" / "holders" / "removed.pem").unlink()
    elsewhere = Federation(tmp_path / "elsewhere")
    elsewhere.enrol("stranger")
    shutil.copytree(elsewhere.holder("stranger"), federation.holder("stranger"))

    budget = ("--budget", EPSILON, "--data", own_csv(tmp_path))
    with (
        federation.serve("--rounds", 1) as coordinator,
        federation.join("removed", *budget) as removed,
        federation.join("stranger", *budget) as stranger,
    ):
        assert ended(removed, coordinator) == 2, removed.last_words()
        assert "approve" in removed.output
        assert ended(stranger, coordinator) == 2, stranger.last_words()
        assert not federation.rounds()
    for refused in (removed, stranger):
        assert "sotto: " in refused.output
        assert "Traceback" not in refused.output


def own_csv(folder: Path) -> Path:
    path = folder / "own.csv"
    load("medical-diagnosis", SOURCE).source.tables()["clinic-1"].to_csv(path, index=False)
    return path


def test_a_holder_without_a_coordinator_keeps_trying_and_leaves_on_sigterm(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.enrol("clinic-1")
    with federation.join("clinic-1", "--budget", EPSILON) as holder:
        wait_for_words(holder, "trying again in")
        assert end(holder) == 0, holder.last_words()
        assert "clinic-1: left." in holder.output


def test_a_plan_that_differs_from_the_unfinished_run_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    unfinished = resume_or_begin(federation.coordinator, plan_with(rounds=5))
    (unfinished.path / "journal-000001.bin").touch()  # holders were asked
    with federation.serve("--rounds", 6, "--epsilon", EPSILON) as coordinator:
        assert ended(coordinator) == 2, coordinator.last_words()
    said = " ".join(coordinator.output.split())
    assert f"run {unfinished.run_id}" in said
    assert "is unfinished and has another plan (rounds is 5 there and 6 here)" in said
    assert "plan.toml to go on, or move that folder away to begin a new run" in said
    assert [run.path for run in federation.runs] == [unfinished.path]


def plan_with(**settings: object) -> TrainingPlan:
    return plan_for(
        load("medical-diagnosis", SOURCE), {"epsilon": EPSILON, "min_holders": 2, **settings}
    )
