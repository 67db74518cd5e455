"""Masked rounds between real processes over mTLS: sums come out, and holders may die and return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.aggregation import Masked
from common.settings import plan_for
from common.tasks import load
from simulations.experiment import Experiment, run_experiment
from tests.integration.federation import (
    PATIENCE,
    SOURCE,
    Federation,
    ended,
    kill,
    wait_for_words,
)
from tests.integration.processes import Process, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CLINICS = ("clinic-1", "clinic-2", "clinic-3", "clinic-4")
ENOUGH, EPSILON = 3, 3.0


def joined(
    federation: Federation, stack: ExitStack, *flags: object, names: tuple[str, ...] = CLINICS
) -> dict[str, Process]:
    return {name: stack.enter_context(federation.join(name, *flags)) for name in names}


def test_a_masked_run_gives_the_model_that_a_plain_one_gives_in_process(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS)
    settings = {"rounds": 4, "no_dp": True, "batch_size": "full"}
    with ExitStack() as stack:
        coordinator = stack.enter_context(
            federation.serve(
                *("--rounds", 4, "--no-dp", "--batch-size", "full"),
                *("--aggregation", "secure", "--dropouts", 0),
            )
        )
        holders = joined(federation, stack, "--allow-no-dp")
        assert ended(coordinator, *holders.values()) == 0
    assert "The whole protocol ran" in coordinator.output
    assert "the sum of at least 4 of 4 and nothing else" in coordinator.output

    (run,) = federation.runs
    task = load("medical-diagnosis", SOURCE)
    result = run.result(task)
    assert [set(each.accepted) for each in result.history] == [set(CLINICS)] * 4
    plain = plan_for(task, {**settings, "min_holders": 4})
    (expected,) = run_experiment(Experiment(task, plain, (0,))).runs
    # Each round rounds the mean of the updates by half a step at most; floats round besides.
    assert isinstance(run.plan.aggregation, Masked)
    allowed = 4 * run.plan.aggregation.encoding(run.plan).step / 2 + 1e-5
    assert np.abs(result.parameters - expected.parameters).max() <= allowed
    assert np.abs(expected.parameters).max() > 100 * allowed


def test_a_holder_may_die_and_return_and_with_too_few_the_run_ends(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS)
    last = CLINICS[-1]
    with ExitStack() as stack:
        coordinator = stack.enter_context(
            federation.serve(
                *("--rounds", 5000, "--epsilon", EPSILON, "--evaluate", "never"),
                *("--aggregation", "secure-sum", "--round-deadline", 6),
            )
        )
        flags = ("--budget", EPSILON, "--aggregation", "secure-sum")
        holders = joined(federation, stack, *flags)

        def until(what: str, condition: Callable[[Mapping[str, Any]], bool], after: int) -> int:
            """Wait for a round after another one, and return its number."""

            def found() -> int:
                rounds = federation.rounds()[after:]
                return next((each["round"] for each in rounds if condition(each)), 0)

            return wait_until(found, what, timeout=PATIENCE, watching=[coordinator])

        everyone = until("everybody", lambda one: len(one["accepted"]) == 4, 0)
        kill(holders[last])
        fewer = until("a round without it", lambda one: len(one["accepted"]) == ENOUGH, everyone)
        (run,) = federation.runs
        lines = federation.rounds()[everyone:fewer]
        assert not any(line["lost"] for line in lines), "three are enough"
        assert last not in lines[-1]["accepted"]

        again = stack.enter_context(federation.join(last, *flags))
        until("its return", lambda one: last in one["accepted"], fewer)

        kill(again)
        kill(holders[CLINICS[0]])
        code = wait_until(
            lambda: coordinator.handle.poll(), "the end of the run", timeout=PATIENCE
        )  # not watched: it is to end
        assert code != 0
        wait_for_words(coordinator, "start again with the same state folder to go on")
        assert f"of at least {ENOUGH}" in coordinator.output
        lost = [line["lost"] for line in federation.rounds() if line["lost"]]
        assert all(f"fewer than {ENOUGH} holders remained" in why for why in lost)

    # Whoever stayed paid for each round once, whatever came of it.
    account = federation.account(CLINICS[1])
    assert set(account.releases.values()) == {1}
    assert account.epsilon <= EPSILON
    assert all(name.startswith(run.run_id) for name in account.releases)
