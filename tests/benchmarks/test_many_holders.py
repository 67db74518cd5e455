"""Ten holders of two processes: the benchmark runs, and says what a silent holder did to rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from benchmarks.many_holders import FROZEN, Run, Silence, holder_names, measure
from server.summaries import RoundSummary

HOLDERS, DEADLINE = 10, 1.0
NAMES = holder_names(HOLDERS)


@pytest.mark.slow
def test_a_frozen_holder_is_named_in_every_round_and_delays_none_beyond_its_deadline(
    tmp_path: Path,
) -> None:
    runs = measure(tmp_path, HOLDERS, processes=2, rounds=6, hindered=3, deadline=DEADLINE)
    for run in runs.values():
        # The slack is for a machine that is busy with other things.
        assert run.faults(NAMES, DEADLINE, slack=20.0) == []
    assert all(len(summary.accepted) == HOLDERS for summary in runs["all"].summaries)
    assert [len(summary.accepted) for summary in runs[FROZEN].summaries] == [HOLDERS - 1] * 3
    # It was waited for, as the deadline says.
    assert min(runs[FROZEN].seconds) > DEADLINE
    stopped = runs["stopped"]
    (silent,) = (s for s in stopped.summaries if s.round in stopped.silence.rounds)
    assert len(silent.accepted) == HOLDERS // 2
    assert len(stopped.summaries[-1].accepted) == HOLDERS


def run_of(
    accepted: Sequence[str], missed: Mapping[str, str], *, silent: Sequence[str] = ()
) -> Run:
    """One round, which waited for 2.4 seconds and was busy for one more."""
    phases = {"wait": 0.4, "exchange": 2.0, "aggregate": 1.0}
    summary = RoundSummary(1, tuple(accepted), missed, 3.4, phases=phases)
    silence = Silence(frozenset(silent), range(1, 2))
    return Run(silence, [summary], [0.0, 3.4], [0.0, 0.0], [0, 0])


def test_a_round_that_waits_beyond_its_deadline_is_a_fault() -> None:
    run = run_of(NAMES, {})
    assert run.faults(NAMES, 2.0, slack=0.5) == []
    assert run.faults(NAMES, 2.0, slack=0.3) == ["round 1 waited for 2.40 s"]


def test_a_silent_holder_that_is_not_named_is_a_fault() -> None:
    first, *others = NAMES
    named = run_of(others, {first: "no reply within 2 s"}, silent=[first])
    assert named.faults(NAMES, 2.0, slack=1.0) == []
    (fault,) = run_of(others, {}, silent=[first]).faults(NAMES, 2.0, slack=1.0)
    assert fault == "round 1 does not say that holder-001 missed it"


def test_an_update_that_does_not_count_is_a_fault() -> None:
    first, *others = NAMES
    (fault,) = run_of(others, {first: "reply rejected"}).faults(NAMES, 2.0, slack=1.0)
    assert fault == "round 1 lost holder-001: reply rejected"
