"""A holder's answer: refused before any work, charged before it leaves, given once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client.app import build_app
from client.holder import Holder
from client.policy import Policy
from client.secure import Participant
from client.state import KEPT_RUNS, HolderState
from common.errors import ConfigurationError, Refusal
from common.flower import set_identity, stamp
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.ledger import Budget
from common.settings import plan_for
from common.tasks.base import HolderData
from common.tasks.parameters import initial_parameters
from common.wire import RoundRequest, TrainReply
from tests.tiny import TinyTask, table

TASK = TinyTask()


def plan(**settings: object) -> TrainingPlan:
    return plan_for(TASK, {"epsilon": 1.0, "rounds": 5, "min_holders": 2, **settings})


def request(number: int = 1, run: str = "run", **settings: object) -> RoundRequest:
    return RoundRequest(run, number, plan(**settings), initial_parameters(TASK, 0))


def holder(state: HolderState, **policy: object) -> Holder:
    data = HolderData(TASK.examples(table(40)), TASK.examples(table(20, seed=1)))
    rules = Policy.model_validate(
        {"data_set": "patients", "budget": Budget(5.0, 1e-4), "size_class": 40, **policy}
    )
    return Holder("clinic", TASK, data, rules, state, torch.device("cpu"))


def ask(holder: Holder, request: RoundRequest, kind: str = "train") -> Message:
    set_identity(1)
    message = Message(request.records(), 2, kind)
    stamp(message)
    return build_app(lambda _: Participant.unsigned(holder))(
        message, Context(1, 2, {}, RecordDict(), {})
    )


def test_an_answer_is_charged_and_committed_before_it_is_given(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        reply = ask(clinic, request())
        assert TrainReply.of(reply.content, plan(), 4).weight == 1.0
        entry = state.ledger.find("run/000001")
        assert entry is not None
        assert entry.state == "committed"
        assert clinic.spent() == epsilon(plan().composition().of(plan().round_event()), 1e-4)


def test_the_same_request_gets_the_same_bytes_and_costs_nothing_again(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        first, spent = clinic.train(request()), clinic.spent()
        again = clinic.train(request())
        assert np.array_equal(first.update, again.update)
        assert clinic.spent() == spent
    with HolderState.at(tmp_path) as state:  # and after a restart
        later = holder(state)
        assert np.array_equal(first.update, later.train(request()).update)
        assert later.spent() == spent


def test_noise_is_fresh_for_every_round_and_holder(tmp_path: Path) -> None:
    with HolderState.at(tmp_path / "a") as one, HolderState.at(tmp_path / "b") as other:
        first, second = holder(one), holder(other)
        updates = [
            first.train(request(1)).update,
            first.train(request(2)).update,
            second.train(request(1)).update,
        ]
    for i in range(3):
        for j in range(i):
            assert not np.array_equal(updates[i], updates[j])


def test_three_runs_with_a_restart_add_up_and_the_next_is_refused_untrained(
    tmp_path: Path,
) -> None:
    """Must show 6 of the federation issue, at the level of the app."""
    whole = plan().composition() * 3
    cost = epsilon(whole, 1e-4)
    budget = Budget(cost * 1.01, 1e-4)
    for run in ("one", "two", "three"):
        with HolderState.at(tmp_path) as state:
            clinic = holder(state, budget=budget)
            for number in range(1, 6):
                assert ask(clinic, request(number, run)).has_content()
    with HolderState.at(tmp_path) as state:
        clinic = holder(state, budget=budget)
        assert clinic.spent() == cost
        clinic.trainer = Untrainable()  # type: ignore[assignment]
        reply = ask(clinic, request(1, "four"))
        assert reply.has_error()
        assert "is left" in str(reply.error.reason)
        assert f"of {budget.epsilon:.2f}" in str(reply.error.reason)
        assert clinic.spent() == cost


def test_every_setting_that_is_tried_is_paid_for(tmp_path: Path) -> None:
    """Three learning rates on the same data: the account shows all three, not the best one."""
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        for rate in (0.1, 0.5, 1.0):
            clinic.train(request(run=f"rate-{rate:.1f}".replace(".", "_"), learning_rate=rate))
        one = plan().composition().of(plan().round_event())
        assert clinic.spent() == epsilon(one * 3, 1e-4)


class Untrainable:
    """Stands for a trainer where nothing may be computed."""

    units = 40
    dimension = 4

    def train(self, *_: object, **__: object) -> None:
        raise AssertionError("trained although refused")


@pytest.mark.parametrize(
    ("policy", "asked", "code"),
    [
        ({}, {"no_dp": True, "epsilon": None}, "unprotected"),
        ({"budget": None}, {}, "budget"),
        ({"budget": Budget(0.1, 1e-4)}, {}, "budget"),
        ({}, {"delta": 0.01}, "delta"),
        ({}, {"holder_size": 3}, "holder_size"),
    ],
)
def test_what_the_policy_does_not_allow_is_refused_before_any_work(
    policy: dict[str, object], asked: dict[str, object], code: str, tmp_path: Path
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state, **policy)
        clinic.trainer = Untrainable()  # type: ignore[assignment]
        reply = ask(clinic, request(**asked))
        assert reply.has_error()
        assert str(reply.error.reason).startswith(f"{code}: ")
        assert state.ledger.find("run/000001") is None


def test_another_task_is_refused(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        other = plan().model_copy(update={"task": "credit-risk"})
        with pytest.raises(Refusal, match=r"credit-risk.*this holder serves tiny"):
            clinic.train(RoundRequest("run", 1, other, initial_parameters(TASK, 0)))


def failing(text: str) -> Callable[..., None]:
    def train(*_: object, **__: object) -> None:
        raise ValueError(text)

    return train


def test_an_exceptions_text_stays_on_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        monkeypatch.setattr(clinic.trainer, "train", failing("patient 17 has x=3"))
        reply = ask(clinic, request())
    assert reply.error.reason == "ValueError"


def test_work_that_a_crash_cut_short_is_done_under_the_same_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        with monkeypatch.context() as broken:
            broken.setattr(clinic.trainer, "train", failing("power cut"))
            ask(clinic, request())
        reserved = clinic.spent()
        assert reserved > 0, "a reservation counts as spent"
        assert ask(clinic, request()).has_content()
        assert clinic.spent() == reserved


def test_a_failure_is_no_question_that_may_be_asked_of_one_model_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it fails may depend on the data, and one charge pays for one answer."""
    other = replace(request(), parameters=request().parameters + 1)
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        with monkeypatch.context() as broken:
            broken.setattr(clinic.trainer, "train", failing("patient 17"))
            assert ask(clinic, request()).error.reason == "ValueError"
            assert "failed here before" in str(ask(clinic, other).error.reason)
        assert "failed here before" in str(ask(clinic, other).error.reason)
        assert ask(clinic, request()).has_content(), "the same request is answered after all"
        assert ask(clinic, replace(other, round=2)).has_content()


def test_a_stored_answer_resolves_what_a_crash_left_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the answer was stored and before the commit: it is given, not made again."""
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        with monkeypatch.context() as crash:
            crash.setattr(state.ledger, "commit", lambda *_: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                clinic.train(request())
        stored = state.answers.digest("run/000001")
        spent = clinic.spent()
    with HolderState.at(tmp_path) as state:
        entry = state.ledger.find("run/000001")
        assert entry is not None
        assert (entry.state, entry.reply_digest) == ("committed", stored)
        clinic = holder(state)
        clinic.trainer.train = lambda *_, **__: pytest.fail("computed twice")  # type: ignore[method-assign]
        clinic.train(request())
        assert clinic.spent() == spent


def test_a_request_that_no_model_here_fits_costs_nothing(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        short = RoundRequest("run", 1, plan(), initial_parameters(TASK, 0)[:-1])
        assert "3 shared parameters" in str(ask(clinic, short).error.reason)
        assert clinic.spent() == 0


def test_a_stored_answer_is_for_the_request_it_answered(tmp_path: Path) -> None:
    """An answer without privacy must not leave again for a plan with privacy, unpaid."""
    with HolderState.at(tmp_path) as state:
        holder(state, unprotected=True).train(request(no_dp=True, epsilon=None))
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        with pytest.raises(Refusal, match=r"asked before with another .*event"):
            clinic.train(request())


def test_answers_of_the_last_runs_only_are_kept_and_never_the_new_one_dropped(
    tmp_path: Path,
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state, budget=Budget(50.0, 1e-4))
        for run in range(KEPT_RUNS + 2):
            for number in (2, 3, 4, 5, 6, 1):  # round 1 last: an older round, asked later
                clinic.train(request(number, f"run{run}", rounds=500))
        runs = list((tmp_path / "answers").iterdir())
        assert len(runs) == KEPT_RUNS
        last = tmp_path / "answers" / f"run{KEPT_RUNS + 1}"
        kept = sorted(path.stem for path in last.iterdir())
        assert kept == ["000001", "000004", "000005", "000006"]


def test_an_evaluation_that_fails_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is paid for evaluating, so a failure that depends on data must not show."""
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        monkeypatch.setattr(clinic.trainer, "evaluate", failing("patient 17"))
        reply = ask(clinic, request(), "evaluate")
    assert set(reply.content["metrics"]) == {"weight"}


def test_an_answer_that_is_gone_is_not_computed_twice(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        clinic.train(request())
        for path in (tmp_path / "answers").rglob("*.safetensors"):
            path.unlink()
        with pytest.raises(Refusal, match="not be computed twice"):
            clinic.train(request())


def test_metrics_stay_here_unless_shared(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        kept = ask(holder(state), request(), "evaluate")
        public = holder(state, evaluation="exact", unprotected=True)
        shared = ask(public, request(), "evaluate")
    assert set(kept.content["metrics"]) == {"weight"}
    assert set(shared.content["metrics"]) == {"weight", "accuracy"}
    assert (tmp_path / "metrics.jsonl").read_text().count("accuracy") == 2


def test_a_plan_without_privacy_makes_every_later_budget_void(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state, unprotected=True)
        clinic.train(request(run="exact", no_dp=True, epsilon=None))
        assert clinic.spent() == float("inf")
        with pytest.raises(Refusal, match="infinite"):
            clinic.train(request(run="private"))


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"size_class": 9}, "40 training units.*declared size is 9.*--size-class"),
        ({"budget": Budget(5.0, 0.03)}, "must be below 1/n"),
    ],
)
def test_a_policy_that_does_not_fit_the_data_is_refused_at_home(
    policy: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        holder(HolderState.in_memory(), **policy)


def test_no_refusal_depends_on_the_data() -> None:
    """A coordinator that varies its plan and asks again must not be able to count our units."""
    few, many = (
        Holder(
            "clinic",
            TASK,
            HolderData(TASK.examples(table(units)), TASK.examples(table(5, seed=1))),
            Policy(data_set="patients", budget=Budget(5.0, 1e-4), size_class=40),
            HolderState.in_memory(),
            torch.device("cpu"),
        )
        for units in (11, 160)
    )
    for number, asked in enumerate(
        {"holder_size": size, "delta": delta} for size in (1, 4, 5, 40) for delta in (1e-3, 1e-6)
    ):
        answers = [ask(one, request(1, f"run{number}", **asked)) for one in (few, many)]
        reasons = [str(a.error.reason) if a.has_error() else "" for a in answers]
        assert reasons[0] == reasons[1]


def test_simulated_noise_is_seeded_and_deployed_noise_is_not(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        assert not holder(state).randomness(request()).predictable


# -- where holders are the unit -------------------------------------------------------------------


def for_holders(**settings: object) -> RoundRequest:
    asked = request(unit="holder", clip_norm=0.25, local_steps=20, **settings)
    return replace(asked, clip_norm=0.25)


def test_a_holder_with_a_budget_sends_nothing_to_a_coordinator_that_it_would_have_to_trust(
    tmp_path: Path,
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        reply = ask(clinic, for_holders())
        assert reply.has_error()
        assert reply.error.reason.startswith("unprotected: ")
        assert not state.ledger.entries("patients")


def test_one_that_trusts_it_clips_its_whole_update_and_accounts_for_it_as_unprotected(
    tmp_path: Path,
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state, unprotected=True)
        asked = for_holders()
        reply = ask(clinic, asked)
        got = TrainReply.of(reply.content, asked.plan, 4, clip_norm=0.25)
        assert np.linalg.norm(got.update) == pytest.approx(0.25)
        assert got.within == 0, "it was longer than that"
        loose = ask(clinic, replace(asked, round=2, clip_norm=100.0))
        far = TrainReply.of(loose.content, asked.plan, 4, clip_norm=100.0)
        assert far.within == 1
        assert np.linalg.norm(far.update) > 0.5
        assert clinic.spent() == float("inf")


def test_the_bit_is_kept_with_the_answer(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state, unprotected=True)
        first, again = ask(clinic, for_holders()), ask(clinic, for_holders())
        assert first.content["metrics"] == again.content["metrics"]
        assert first.content["metrics"]["within"] == 0
