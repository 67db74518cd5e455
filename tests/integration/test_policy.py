"""Real processes: a holder whose policy says no is left out, and the run goes on without it."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from client.policy_file import PolicyFile, policy_path
from common.privacy.ledger import Budget
from common.tasks import load
from tests.integration.federation import (
    CLINICS,
    PATIENCE,
    SOURCE,
    Federation,
    end,
    ended,
    sotto,
    wait_for_words,
)
from tests.integration.processes import Process, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROUNDS, EPSILON = 150, 3.0
STRICT, REHEARSING, MASKED = REFUSING = ("clinic-3", "clinic-4", "clinic-5")


def wait_for_round(federation: Federation, number: int, *watching: Process) -> None:
    wait_until(
        lambda: len(federation.rounds()) >= number, f"round {number}",
        timeout=PATIENCE, watching=watching,
    )  # fmt: skip


def test_holders_that_refuse_are_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    """One asks for more noise, one is on a dry run, and one takes part in sums only.

    Must show 7 of the ledger issue.
    """
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS, *REFUSING)
    write = ("policy", "init", "--budget", EPSILON, "--delta", 1e-4)
    sotto(*write, "--state", federation.holder(STRICT), "--min-noise-multiplier", 50)
    sotto(*write, "--state", federation.holder(REHEARSING))
    sotto(*write, "--state", federation.holder(MASKED), "--aggregation", "secure")
    dry = policy_path(federation.holder(REHEARSING))
    dry.write_text(dry.read_text().replace("dry_run = false", "dry_run = true"))

    plan = ("--rounds", ROUNDS, "--epsilon", EPSILON, "--evaluate", "never")
    with ExitStack() as stack:
        holders = {
            name: stack.enter_context(federation.join(name, "--holders", len(CLINICS + REFUSING)))
            for name in REFUSING
        }
        for holder in holders.values():  # ready, and held until the run goes on without them
            wait_for_words(holder, "ready;")
            holder.handle.send_signal(signal.SIGSTOP)
        coordinator = stack.enter_context(federation.serve(*plan))
        for name in CLINICS:
            holders[name] = stack.enter_context(federation.join(name, "--budget", EPSILON))
        wait_for_round(federation, 2, coordinator)
        for name in REFUSING:
            holders[name].handle.send_signal(signal.SIGCONT)
        assert ended(coordinator, *holders.values()) == 0, coordinator.last_words()
        for holder in holders.values():
            assert end(holder) == 0, holder.last_words()

    rounds = federation.rounds()
    assert [set(line["accepted"]) for line in rounds] == [set(CLINICS)] * ROUNDS
    reasons = {name: why for line in rounds for name, why in line["missed"].items()}
    assert set(reasons) == set(REFUSING), "each was asked"
    assert "noise: the plan's noise multiplier is" in reasons[STRICT]
    assert "the holder asks for at least 50" in reasons[STRICT]
    assert "dry-run: the holder is on a dry run" in reasons[REHEARSING]
    assert "aggregation: under the plan's aggregation, 'plain'," in reasons[MASKED]
    assert "A dry run: nothing is computed or sent" in holders[REHEARSING].output

    (run,) = federation.runs
    for name in CLINICS:
        federation.account(name).require_each_round_once(run.plan, run.run_id)
        written = PolicyFile.load(policy_path(federation.holder(name))).policies["default"]
        assert written.budget == Budget(EPSILON, load("medical-diagnosis", SOURCE).source.delta)
        assert "Wrote" in holders[name].output
    for name in REFUSING:
        account = federation.account(name)
        assert (account.epsilon, dict(account.releases)) == (0.0, {})
        folder = federation.holder(name)
        assert not list((folder / "answers").iterdir()), "nothing was computed"
        assert not (folder / "metrics.jsonl").exists()
