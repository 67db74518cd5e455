"""A holder tells statistics if its policy allows, within the same account, and once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

import client.holder
import client.statistics
from client.app import build_app
from client.holder import Holder
from client.policy import Policy
from client.secure import Participant
from client.state import HolderState
from common.errors import Refusal
from common.flower import set_identity, stamp
from common.privacy.accounting import epsilon
from common.privacy.events import Composition
from common.privacy.ledger import Budget
from common.privacy.noise import SeededRandomness
from common.privacy.statistics import ONE, Layout, sums
from common.settings import plan_for
from common.statistics_plan import StatisticsPlan, statistics_plan_for
from common.tasks import load
from common.tasks.base import HolderData
from common.tasks.parameters import initial_parameters
from common.tasks.scaling import InputScaling
from common.wire import RoundRequest, StatisticsReply, StatisticsRequest
from tests.tiny import TinyTask, table

TASK = TinyTask()
ROWS = table(40)
DELTA = 1e-4


def plan(**settings: object) -> StatisticsPlan:
    return statistics_plan_for(TASK, 1.0, **{"min_holders": 2, **settings})  # type: ignore[arg-type]


def request(run: str = "stats", **settings: object) -> StatisticsRequest:
    return StatisticsRequest(run, plan(**settings))


def holder(state: HolderState, **policy: object) -> Holder:
    data = HolderData(TASK.examples(ROWS), TASK.examples(table(20, seed=1)))
    rules = Policy(
        **{  # type: ignore[arg-type]
            "data_set": "patients",
            "budget": Budget(5.0, DELTA),
            "size_class": 40,
            "statistics": True,
            **policy,
        }
    )
    return Holder("clinic", TASK, data, rules, state, torch.device("cpu"), rows=ROWS)


def ask(holder: Holder, request: StatisticsRequest) -> Message:
    set_identity(1)
    message = Message(request.records(), 2, "query")
    stamp(message)
    return build_app(lambda _: Participant.unsigned(holder))(
        message, Context(1, 2, {}, RecordDict(), {})
    )


def spent(*plans: StatisticsPlan) -> float:
    return epsilon(Composition.sum(one.composition() for one in plans), DELTA)


# -- what is told ---------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["columns", "inputs"])
def test_the_answer_is_the_rows_sums_and_noise_of_the_plans_size(subject: str) -> None:
    asked = plan(subject=subject)
    reply = ask(holder(HolderState.in_memory()), StatisticsRequest("run", asked))
    layout = Layout.of(asked)
    got = StatisticsReply.of(reply.content, layout.dimension).sums
    columns = {
        question.name: ROWS[question.name if subject == "columns" else f"x{question.name[2]}"]
        for question in asked.questions
    }
    noise = (got - sums(layout, columns)) / layout.noise(asked)
    # At most 100 normal draws: one beyond 7 deviations comes in fewer than one of 10⁹ runs.
    assert float(np.abs(noise).max()) < 7
    assert float(np.abs(noise).max()) > 0.01, "there is noise"
    assert abs(got[0] / ONE - 40) < 7 * layout.noise(asked) / ONE


def test_a_users_statistics_count_each_user_once() -> None:
    task = load("recommendation")
    rows = next(iter(task.source.tables().values()))
    split = task.split(rows, holder="shop-01", seed=0)
    asked = statistics_plan_for(task, 1.0, columns=["item"]).model_copy(
        update={"noise_multiplier": 1e-9}
    )
    data, quiet = task.prepare(split), SeededRandomness("quiet")
    told = client.statistics.statistics_reply(asked, task, data.train, split.train, quiet)
    got = told.sums / ONE
    assert got[0] == pytest.approx(30, abs=1e-2)
    assert got[1:].sum() == pytest.approx(30, abs=1e-2)


# -- the account ----------------------------------------------------------------------------------


def test_statistics_are_charged_to_the_account_that_training_is(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        training = plan_for(TASK, {"epsilon": 1.0, "rounds": 2, "min_holders": 2})
        clinic.train(RoundRequest("run", 1, training, initial_parameters(TASK, 0)))
        clinic.statistics(request())
        entry = state.ledger.find("stats.statistics/000001")
        assert entry is not None
        assert (entry.state, entry.release.kind) == ("committed", "statistics")
        both = Composition.of(training.round_event()) + plan().composition()
        assert clinic.spent() == epsilon(both, DELTA)


def test_the_same_request_gets_the_same_bytes_and_costs_nothing_again(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        first = holder(state).statistics(request()).sums
    with HolderState.at(tmp_path) as state:  # after a restart
        clinic = holder(state)
        assert np.array_equal(clinic.statistics(request()).sums, first)
        assert clinic.spent() == spent(plan())
        fresh = clinic.statistics(request("another")).sums
        assert not np.array_equal(fresh, first)
        assert clinic.spent() == spent(plan(), plan())


def test_a_stored_answer_is_for_the_questions_it_answered() -> None:
    clinic = holder(HolderState.in_memory())
    clinic.statistics(request())
    with pytest.raises(Refusal, match="asked before with another plan_digest"):
        clinic.statistics(request(columns=["x0"]))


def test_a_training_run_of_the_same_name_is_another_request() -> None:
    clinic = holder(HolderState.in_memory())
    clinic.statistics(request("run"))
    training = plan_for(TASK, {"epsilon": 1.0, "rounds": 1, "min_holders": 2})
    clinic.train(RoundRequest("run", 1, training, initial_parameters(TASK, 0)))
    both = training.composition() + plan().composition()
    assert clinic.spent() == epsilon(both, DELTA)


# -- refusals -------------------------------------------------------------------------------------


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("computed although refused")


@pytest.mark.parametrize(
    ("policy", "asked", "code"),
    [
        ({"statistics": False}, request(), "statistics"),
        ({"budget": Budget(0.9, DELTA)}, request(), "budget"),
        ({"budget": None}, request(), "budget"),
        ({"min_noise_multiplier": 50.0}, request(), "noise"),
        ({}, request(min_holders=1), "cohort"),
        ({}, request(delta=0.01), "delta"),
        ({"dry_run": True}, request(), "dry-run"),
        ({"coordinators": ("sha256:" + "ab" * 32,)}, request(), "coordinator"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_and_nothing_is_computed(
    policy: dict[str, object],
    asked: StatisticsRequest,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client.holder, "statistics_reply", forbidden)
    state = HolderState.in_memory()
    reply = ask(holder(state, **policy), asked)
    assert reply.has_error()
    assert str(reply.error.reason).startswith(f"{code}: ")
    assert not state.ledger.entries("patients")


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        (plan().model_copy(update={"task": "other"}), "task"),
        (plan().model_copy(update={"unit": "user"}), "unit"),
        (plan().model_copy(update={"noise_multiplier": None}), "noise"),
        # It costs nothing, and as whole numbers it is a constant.
        (plan().model_copy(update={"noise_multiplier": 1e15}), "noise"),
        (plan().model_copy(update={"subject": "inputs"}), "questions"),
        (plan(subject="inputs").model_copy(update={"subject": "columns"}), "questions"),
        (
            plan(columns=["x0"]).model_copy(
                update={
                    "questions": (
                        plan(columns=["x0"]).questions[0].model_copy(update={"name": "y"}),
                    )
                }
            ),
            "questions",
        ),
    ],
)
def test_what_this_holder_cannot_answer_is_refused_before_it_is_charged(
    asked: StatisticsPlan, code: str
) -> None:
    state = HolderState.in_memory()
    reply = ask(holder(state), StatisticsRequest("run", asked))
    assert reply.has_error()
    assert str(reply.error.reason).startswith(f"{code}: ")
    assert not state.ledger.entries("patients")


def test_a_holder_without_its_rows_tells_of_inputs_only() -> None:
    clinic = holder(HolderState.in_memory())
    clinic.rows = None
    assert "encoded rows only" in str(ask(clinic, request()).error.reason)
    assert ask(clinic, request(subject="inputs")).has_content()


def test_whether_it_answers_does_not_depend_on_the_rows() -> None:
    """No rows at all: the answer is noise, and is given like any other."""
    clinic = holder(HolderState.in_memory())
    nothing = ROWS.iloc[:0]
    clinic.rows, clinic.data = nothing, HolderData(TASK.examples(nothing), clinic.data.test)
    for subject in ("columns", "inputs"):
        assert ask(clinic, request(subject, subject=subject)).has_content()


# -- scaled training ------------------------------------------------------------------------------


def test_a_scaling_of_inputs_that_are_not_there_is_refused_before_it_is_charged() -> None:
    state = HolderState.in_memory()
    clinic = holder(state)
    training = plan_for(TASK, {"epsilon": 1.0, "min_holders": 2})
    for wrong in ("y", "x"):
        scaling = (InputScaling(input=wrong, shift=(0.0,), scale=(1.0,)),)
        asked = training.model_copy(update={"scaling": scaling})
        with pytest.raises(Refusal, match="scaling: "):
            clinic.train(RoundRequest("run", 1, asked, initial_parameters(TASK, 0)))
    assert not state.ledger.entries("patients")
