"""An evaluation is a release: charged before it leaves, given once, and without an exact figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict

from client.app import build_app
from client.holder import Holder
from client.policy import Policy
from client.requests import Request
from client.secure import Participant
from client.state import HolderState
from common.errors import Refusal
from common.flower import set_identity, stamp
from common.guarantees import HistogramEvaluation
from common.plan import TrainingPlan
from common.privacy.accounting import epsilon
from common.privacy.events import Composition
from common.privacy.ledger import Budget
from common.privacy.noise import OsRandomness, Randomness, SeededRandomness
from common.settings import plan_for
from common.tasks.base import HolderData
from common.tasks.parameters import initial_parameters
from common.wire import RoundRequest
from tests.tiny import CountedTask, TinyTask, table

TASK = CountedTask()
EXACT = {"accuracy"}


def plan(**settings: object) -> TrainingPlan:
    given = {"epsilon": 1.0, "rounds": 5, "min_holders": 2, "evaluation_epsilon": 0.5}
    return plan_for(TASK, {**given, "evaluate": "every 1", **settings})


def request(number: int = 1, run: str = "run", **settings: object) -> RoundRequest:
    return RoundRequest(run, number, plan(**settings), initial_parameters(TASK, 0))


def holder(state: HolderState, task: TinyTask = TASK, **policy: object) -> Holder:
    data = HolderData(task.examples(table(40)), task.examples(table(20, seed=1)))
    rules = {
        "data_set": "patients",
        "budget": Budget(5.0, 1e-4),
        "size_class": 40,
        "evaluation": "histogram",
        **policy,
    }
    return Holder("clinic", task, data, Policy.model_validate(rules), state, torch.device("cpu"))


def counts_of(holder: Holder, request: RoundRequest) -> list[int]:
    reply = holder.evaluate(request)
    assert reply.histogram is not None
    return list(reply.histogram.tolist())


def test_it_is_charged_and_committed_before_it_is_given(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        clinic.evaluate(request())
        entry = state.ledger.find("run.evaluation/000001")
        assert entry is not None
        assert (entry.state, entry.release.kind) == ("committed", "evaluation")
        evaluation = plan().evaluation
        assert isinstance(evaluation, HistogramEvaluation)
        assert entry.release.event == evaluation.event()
        assert clinic.spent() == epsilon(Composition.of(evaluation.event()), 1e-4)


def test_all_of_a_runs_evaluations_cost_what_the_plan_says(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        for number in range(1, 6):
            clinic.evaluate(request(number))
        assert clinic.spent() == pytest.approx(0.5, rel=0.01)
        for number in range(1, 6):
            clinic.train(request(number))
        assert clinic.spent() == pytest.approx(epsilon(plan().composition(), 1e-4))


def test_the_same_request_gets_the_same_counts_and_costs_nothing_again(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        first, spent = counts_of(clinic := holder(state), request()), clinic.spent()
        assert counts_of(clinic, request()) == first
        assert clinic.spent() == spent
    with HolderState.at(tmp_path) as state:  # and after a restart
        assert counts_of(holder(state), request()) == first


def test_nothing_but_noised_counts_leaves(tmp_path: Path) -> None:
    """The holder's own figures are in its own file."""
    set_identity(1)
    message = Message(request().records(), 2, "evaluate")
    stamp(message)
    with HolderState.at(tmp_path) as state:
        clinic = holder(state)
        answer = build_app(lambda _: Participant.unsigned(clinic))(
            message, Context(1, 2, {}, RecordDict(), {})
        )
    assert set(answer.content) == {"arrays", "metrics"}
    assert set(answer.content["metrics"]) == {"weight"}
    assert set(answer.content["arrays"]) == {"histogram"}
    assert (tmp_path / "metrics.jsonl").read_text().count("accuracy") == 1


def test_public_data_come_with_exact_figures_each_time_they_are_asked() -> None:
    clinic = holder(HolderState.in_memory(), evaluation="exact", unprotected=True)
    first, again = clinic.evaluate(request()), clinic.evaluate(request())
    assert set(first.metrics) == EXACT
    assert first.metrics == again.metrics


def test_noise_is_unpredictable_and_fresh_for_every_release() -> None:
    clinic = holder(HolderState.in_memory(), budget=Budget(50.0, 1e-4))
    assert not clinic.evaluation_randomness(request()).predictable
    found = {
        tuple(counts_of(clinic, request(number, run))) for number in (1, 2) for run in ("a", "b")
    }
    assert len(found) > 1, "four draws of σ above 10 are not all alike"


def seeded(*parts: object) -> Callable[[Request], Randomness]:
    return lambda request: SeededRandomness(*parts, request.run_id)


@pytest.mark.parametrize(("scale", "passes"), [(1.0, True), (0.5, False), (0.0, False)])
def test_the_noise_is_of_the_plans_size(scale: float, passes: bool) -> None:
    """Over 300 releases of two cells the mean square is σ² to 4 deviations, √(2/600) each.

    The control: with half the noise, or none, it is not.
    """
    clinic = holder(HolderState.in_memory(), budget=None, evaluation="exact", unprotected=True)
    clinic.evaluation_randomness = seeded("noise")
    truth = clinic.task.histogram(
        clinic.trainer.predictions(torch.tensor(request().parameters), None, clinic.data.test),
        clinic.data.test,
    ).numpy()
    evaluation = plan().evaluation
    assert isinstance(evaluation, HistogramEvaluation)
    sigma = evaluation.event().noise_multiplier
    draws = [np.array(counts_of(clinic, request(1, f"run{n}"))) - truth for n in range(300)]
    square = scale**2 * np.mean(np.square(draws)) / sigma**2
    assert (abs(square - 1) < 4 * np.sqrt(2 / 600)) == passes


# -- what is refused ------------------------------------------------------------------------------


class Blind:
    """Fails where anything is computed."""

    dimension = 4

    def predictions(self, *_: object) -> None:
        raise AssertionError("it was computed")

    evaluate = predictions


@pytest.mark.parametrize(
    ("rules", "asked", "code"),
    [
        ({"evaluation": "never"}, {}, "evaluation"),
        ({"budget": Budget(0.4, 1e-4)}, {}, "budget"),
        ({}, {"evaluate": "final"}, "evaluation"),  # this is round 1 of 5
    ],
)
def test_what_is_not_allowed_is_refused_uncomputed(
    rules: dict[str, object], asked: dict[str, object], code: str, tmp_path: Path
) -> None:
    with HolderState.at(tmp_path) as state:
        clinic = holder(state, **rules)
        clinic.trainer = Blind()  # type: ignore[assignment]
        with pytest.raises(Refusal) as caught:
            clinic.evaluate(request(1, **asked))
        assert caught.value.code == code
        assert clinic.spent() == 0.0
        assert not (tmp_path / "metrics.jsonl").exists()


def test_a_task_without_cells_releases_nothing() -> None:
    clinic = holder(HolderState.in_memory(), task=TinyTask())
    clinic.trainer = Blind()  # type: ignore[assignment]
    with pytest.raises(Refusal, match="no histogram"):
        clinic.evaluate(request())


def test_a_dry_run_sends_nothing_and_spends_nothing() -> None:
    clinic = holder(HolderState.in_memory(), dry_run=True)
    clinic.trainer = Blind()  # type: ignore[assignment]
    with pytest.raises(Refusal, match="dry run"):
        clinic.evaluate(request())
    assert clinic.spent() == 0.0


def test_who_guesses_the_seed_of_training_does_not_have_the_noise_of_the_evaluation() -> None:
    """A holder has two sources: the evaluation's is never that of the same round's update."""
    clinic = holder(HolderState.in_memory())
    clinic.randomness = seeded("training")
    assert isinstance(clinic.evaluation_randomness(request()), OsRandomness)
