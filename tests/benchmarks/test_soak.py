"""What the soak finds, and what it does not take for growth; and that it runs."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.footprint import Footprint
from benchmarks.soak import (
    BOUND,
    COORDINATOR,
    MEGABYTE,
    POOLED,
    Growth,
    Sample,
    document,
    soak,
    table,
)

ROUNDS, AFTER, EVERY = 10_000, 500, 20
LIMIT = BOUND * MEGABYTE


def samples(
    *,
    creep: float = 0.0,
    step: float = 0.0,
    noise: float = 0.0,
    files: int = 0,
    pooled: int = 0,
) -> list[Sample]:
    """Of a process of 400 MB.

    Args:
        creep: bytes that it grows by in a round.
        step: bytes that it takes at round 8,000.
        noise: standard deviation of its memory, in bytes.
        files: descriptors that it opens for good, at round 5,000.
        pooled: threads that gRPC's pool takes then.
    """
    chance = np.random.default_rng(3)
    found = []
    for number in range(0, ROUNDS, EVERY):
        memory = 400 * MEGABYTE + creep * number + step * (number > 8000)
        memory += noise * float(chance.normal())
        # Every other look falls into the moment in which a checkpoint is open.
        late, briefly = number > 5000, number // EVERY % 2
        held = Footprint(int(memory), 0, 0, 10 + files * late + briefly, 7, 4 + pooled * late)
        found.append(Sample(number, 0.1 * number, held))
    return found


def growth(**changes: object) -> Growth:
    return Growth.of(samples(**changes), AFTER, ROUNDS)  # type: ignore[arg-type]


def test_a_process_that_keeps_its_size_is_let_go() -> None:
    """With noise of 0.5 MB.

    The slope of 475 samples with deviation σ, evenly over N rounds, has deviation σ√12/(N√475) at
    the mean, and 1.024 of it at Theil and Sen's: 0.08 MB over all rounds. The difference of medians
    of 47 has √2 · 1.253σ/√47 = 0.13 MB. The bound of 2 MB is 15 deviations away.
    """
    assert growth(noise=MEGABYTE / 2).faults(LIMIT) == []


def test_a_leak_of_a_quarter_of_a_kilobyte_in_a_round_is_found() -> None:
    """2.3 MB in 9,500 rounds; four deviations of the noise above the bound."""
    (fault,) = growth(creep=256, noise=MEGABYTE / 2).faults(LIMIT)
    assert fault.startswith("grew by 2.")


def test_half_of_that_is_let_go() -> None:
    assert growth(creep=128, noise=MEGABYTE / 2).faults(LIMIT) == []


def test_a_process_that_grows_at_once_and_stays_there_is_found() -> None:
    found = growth(step=3.0 * MEGABYTE)
    assert found.creep < LIMIT < found.step
    assert found.faults(LIMIT) == ["grew by 3.0 MB"]


def test_what_it_takes_before_the_first_rounds_are_over_does_not_count() -> None:
    late = [
        sample if sample.round > AFTER else Sample(sample.round, 0.0, Footprint(0, 0, 0, 0, 0, 0))
        for sample in samples()
    ]
    assert Growth.of(late, AFTER, ROUNDS).faults(LIMIT) == []


def test_a_descriptor_that_stays_open_is_found_and_one_that_closes_is_not() -> None:
    assert growth().descriptors == 0
    assert growth(files=1).faults(LIMIT) == ["has 1 descriptors more"]


def test_the_pool_of_grpc_may_size_itself_within_reason() -> None:
    assert growth(pooled=POOLED).faults(LIMIT) == []
    assert growth(pooled=40).faults(LIMIT) == ["has 40 threads more in gRPC's pool"]


def test_too_few_samples_say_so() -> None:
    with pytest.raises(ValueError, match="too few samples"):
        Growth.of(samples()[:26], AFTER, ROUNDS)


def test_a_footprint_counts_what_this_process_opens_and_takes(tmp_path: Path) -> None:
    before = Footprint.of(os.getpid())
    with (tmp_path / "open").open("w"):
        taken = np.ones(4 * MEGABYTE)  # 32 MB
        after = Footprint.of(os.getpid())
    assert after.descriptors == before.descriptors + 1
    # The rest of the process may take and give back a few pages meanwhile.
    for more in (after.resident - before.resident, after.private - before.private):
        assert 0.75 * taken.nbytes < more < 1.25 * taken.nbytes
    assert Footprint.peak(os.getpid()) >= after.resident


@pytest.mark.slow
def test_a_small_soak_watches_every_process(tmp_path: Path) -> None:
    run = soak(tmp_path, rounds=40, holders=2, every=0.05, evaluate="never")
    assert list(run.samples) == [COORDINATOR, "clinic-1", "clinic-2"]
    assert run.missed == 0
    # Forty rounds are all warm-up: only that there are figures is certain.
    written = document(run, after=1, bound=1e12)
    assert written["faults"] == []
    for figures in written["processes"].values():
        assert figures["resident_mb"] > 100
        assert figures["disk_bytes_per_round"] > 0
    rows = list(csv.DictReader(table(run).splitlines()))
    assert {row["process"] for row in rows} == set(run.samples)
