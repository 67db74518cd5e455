"""A disk that is full, a file that is read-only, a lock that another holds: later it goes on."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import StateError, StorageError
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Ledger, Release, Reservation
from common.privacy.storage import EntryStore

EVENT = SubsampledGaussian(1.0, 10.0, 1)
ONE = Composition.of(EVENT)
BUDGET = Budget(50.0, 1e-5)


def reserve(ledger: Ledger, number: int) -> Reservation:
    release = Release(f"run/{number}", "clinic", "task", "hub", "run", "plan", number, EVENT)
    return ledger.reserve(release, BUDGET, ONE)


def spend(ledger: Ledger, number: int) -> None:
    reserve(ledger, number)
    ledger.commit(f"run/{number}", "digest")


def spend_until_refused(ledger: Ledger) -> int:
    for number in range(2, 100):
        try:
            spend(ledger, number)
        except StorageError:
            return number
    raise AssertionError("there was room for everything")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path) as opened:
        spend(opened, 1)
        yield opened


@contextmanager
def no_file_grows_beyond(size: int) -> Iterator[None]:
    """The kernel writes as far as that and no further, for every file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_write_that_a_full_disk_cuts_off_can_be_made_again(
    ledger: Ledger, path: Path
) -> None:
    """At each size at which the log of the file, or its head, ends somewhere in the midst."""
    wal, head = path.with_name("ledger.sqlite-wal"), path.with_suffix(".head")
    refused = 0
    for number in range(2, 40):
        before = ledger.composition("clinic")
        size = wal.stat().st_size + 211 * (number - 2) if number < 30 else head.stat().st_size + 5
        with no_file_grows_beyond(size):
            try:
                spend(ledger, number)
            except StorageError:
                refused += 1
                known = ledger.find(f"run/{number}")
                # Charged or not, and never by half.
                charged = before if known is None else before + ONE
                assert ledger.composition("clinic") == charged
        spend(ledger, number)
        assert ledger.composition("clinic") == before + ONE
    assert refused >= 20, "the limit was to be felt"
    ledger.verify()
    with Ledger.open(path) as other:
        assert other.entries() == ledger.entries()
        assert len(other.entries()) == 2 * 39


def test_a_full_database_says_so_and_goes_on_when_there_is_room(ledger: Ledger) -> None:
    pragma = ledger._store._connection.execute
    (pages,) = pragma("PRAGMA page_count").fetchone()
    pragma(f"PRAGMA max_page_count = {pages}")
    number = spend_until_refused(ledger)
    entries = ledger.entries()
    with pytest.raises(StorageError, match=r"full.*the disk is not full"):
        spend(ledger, number)
    assert ledger.entries() == entries
    pragma("PRAGMA max_page_count = 1000000")
    spend(ledger, number)
    ledger.verify()
    assert ledger.composition("clinic") == ONE * number


def test_no_room_to_remember_a_request_is_no_reason_to_charge_it_twice(ledger: Ledger) -> None:
    """Its entry is in the file by then; what follows is that the ledger must read it again."""
    pragma = ledger._account._index._connection.execute
    (pages,) = pragma("PRAGMA page_count").fetchone()
    pragma(f"PRAGMA max_page_count = {pages}")
    number = spend_until_refused(ledger)
    with pytest.raises(StorageError, match="TMPDIR"):
        ledger.epsilon("clinic", 1e-5)  # it would be too low
    pragma("PRAGMA max_page_count = 1000000")
    assert reserve(ledger, number).repeated
    ledger.commit(f"run/{number}", "digest")
    assert ledger.composition("clinic") == ONE * number
    ledger.verify()


def test_a_head_that_cannot_be_used_holds_the_release_back(ledger: Ledger, path: Path) -> None:
    reserve(ledger, 2)
    head = path.with_suffix(".head")
    content = head.read_bytes()
    head.unlink()
    head.mkdir()
    with pytest.raises(StorageError, match=r"nothing is released without it\. Check that its disk"):
        ledger.commit("run/2", "digest")
    head.rmdir()
    head.write_bytes(content)
    assert ledger.commit("run/2", "digest").state == "committed"
    assert ledger.composition("clinic") == ONE * 2


def held(path: Path) -> sqlite3.Connection:
    """Another process in the midst of a transaction."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


def test_a_lock_that_is_held_for_long_is_told_from_damage(path: Path) -> None:
    Ledger.open(path).close()
    with Ledger.checked(EntryStore.open(path, patience=0.05)) as ledger:
        other = held(path)
        with pytest.raises(StorageError, match=r"locked.*no other process holds it"):
            reserve(ledger, 1)
        # Reading needs no lock.
        assert ledger.composition("clinic") == Composition()
        other.execute("ROLLBACK")
        reserve(ledger, 1)
        other.close()


def test_opening_waits_for_a_lock_no_longer_than_its_patience(path: Path) -> None:
    Ledger.open(path).close()
    other = held(path)
    with pytest.raises(StorageError, match="locked"):
        EntryStore.open(path, patience=0.05)
    other.close()
    EntryStore.open(path, patience=0.05).close()


def test_a_read_only_file_is_told_from_damage(ledger: Ledger) -> None:
    pragma = ledger._store._connection.execute
    pragma("PRAGMA query_only = 1")
    with pytest.raises(StorageError, match="writable"):
        reserve(ledger, 2)
    pragma("PRAGMA query_only = 0")
    spend(ledger, 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write what is read-only")
def test_a_read_only_folder_is_told_from_damage(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="writable"):
            Ledger.open(tmp_path / "ledger.sqlite")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:600], lambda content: b"SQLite format 2" + content[15:]]
)
def test_damage_is_no_matter_of_waiting(path: Path, damage: Callable[[bytes], bytes]) -> None:
    with Ledger.open(path) as ledger:
        spend(ledger, 1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StateError) as refused:
        Ledger.open(path)
    assert not isinstance(refused.value, StorageError)
