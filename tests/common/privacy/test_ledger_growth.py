"""A holder may answer for ever: neither memory nor a request's cost grows with those before it.

Long runs with whole processes are in benchmarks/soak.py. Here objects and steps are counted, which
no other load on the machine can change.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.privacy.anchor import Head
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Entry, Ledger, Release
from common.privacy.limits import Limits
from common.privacy.storage import CACHE_KIB, EntryStore

# Without sampling, ε has a closed form: the accountant takes microseconds.
EVENT = SubsampledGaussian(1.0, 10.0, 1)
BUDGET = Budget(1e6, 1e-5)
PLANNED = Composition.of(EVENT) * 10**4
LIMITS = Limits(rounds_per_day=10**6)
# In memory where there is such a folder: nothing here is about disks.
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        yield Path(folder) / "ledger.sqlite"


def spend(ledger: Ledger, numbers: range) -> None:
    for number in numbers:
        name = f"run/{number:06d}"
        release = Release(name, "clinic", "task", "hub", "run", "p" * 64, number, EVENT)
        ledger.reserve(release, BUDGET, PLANNED, LIMITS)
        ledger.commit(name, "d" * 64)


class Watched(EntryStore):
    """Counts the objects that Python has while it hands out entries."""

    most = 0

    def after(self, last: Head) -> Iterator[tuple[Entry, str]]:
        for pair in super().after(last):
            self.most = max(self.most, sys.getallocatedblocks())
            yield pair


def objects() -> int:
    """That Python has: a digest is one, an entry with a release some twenty."""
    gc.collect()
    return sys.getallocatedblocks()


def test_memory_does_not_grow_with_entries(path: Path) -> None:
    with Ledger.open(path) as ledger:
        spend(ledger, range(1, 300))  # some caches fill first, with a few hundred objects
        before = objects()
        spend(ledger, range(300, 1300))
        # Of 2,000 entries; one object for each would show.
        assert objects() - before < 500
        # Control: the same measure sees what holds on to the entries.
        before = objects()
        entries = ledger.entries()
        assert objects() - before > 5 * len(entries)


def test_opening_and_verifying_hold_one_entry_at_a_time(path: Path) -> None:
    with Ledger.open(path) as ledger:
        spend(ledger, range(1, 1000))
    store = Watched.open(path)
    before = objects()
    with Ledger.checked(store) as ledger:
        assert 0 < store.most - before < 3000  # garbage not yet collected, and one entry
        store.most, before = 0, objects()
        ledger.verify()
        assert 0 < store.most - before < 3000  # garbage not yet collected, and one entry
        # Control: the same measure sees what holds on to the entries.
        store.most, before = 0, objects()
        entries = ledger.entries()
        assert store.most - before > 5 * len(entries)


def test_sqlite_keeps_no_more_of_the_file_in_memory_than_it_is_told(path: Path) -> None:
    with Ledger.open(path) as ledger:
        pragma = ledger._store._connection.execute
        assert pragma("PRAGMA cache_size").fetchone() == (-CACHE_KIB,)


def calls(work: Callable[[], object]) -> int:
    """How many functions some work calls."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def instructions(ledger: Ledger, work: Callable[[], object]) -> int:
    """How many instructions of SQLite's machine some work takes, on ledger and index."""
    count = 0

    def counted() -> int:
        nonlocal count
        count += 1
        return 0

    connections = ledger._store._connection, ledger._account._index._connection
    for connection in connections:
        connection.set_progress_handler(counted, 1)
    work()
    for connection in connections:
        connection.set_progress_handler(None, 0)
    return count


def test_a_round_takes_as_many_steps_after_a_thousand_as_after_ten(path: Path) -> None:
    def costs(ledger: Ledger, number: int) -> tuple[int, int]:
        spend(ledger, range(number, number + 1))
        return (
            calls(lambda: spend(ledger, range(number + 1, number + 2))),
            instructions(ledger, lambda: spend(ledger, range(number + 2, number + 3))),
        )

    with Ledger.open(path) as ledger:
        spend(ledger, range(1, 101))
        early = costs(ledger, 101)
        spend(ledger, range(104, 1100))
        late = costs(ledger, 1100)
    # Room for a collection of garbage in the midst of it, and for a deeper tree of pages.
    for before, after in zip(early, late, strict=True):
        assert after < 1.1 * before
