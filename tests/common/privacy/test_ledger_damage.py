"""A ledger that is damaged, cut or older than it was refuses to open, and says what to do.

``SOTTO_CORRUPTION=all`` (``make corruption``) flips every byte of every file, the suite a sample.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import BudgetExceeded, ConfigurationError, StateError
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Entry, Ledger, Release, Reservation

DELTA = 1e-5
EVENT = SubsampledGaussian(1.0, 10.0, 1)
BUDGET = Budget(5.0, DELTA)
FILES = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.head")
CORRUPTION = os.environ.get("SOTTO_CORRUPTION", "120")
"""Bytes of each file that are flipped, or ``all``."""
REMEDIES = "restore the file", "put back the newest", "choose another state folder"
# In memory where there is such a folder: damage is what is tested, not disks.
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


def release(number: int, data_set: str = "clinic") -> Release:
    return Release(f"run/{number}", data_set, "task", "hub", "run", "plan", number, EVENT)


def spend(ledger: Ledger, *numbers: int, data_set: str = "clinic") -> None:
    for number in numbers:
        ledger.reserve(release(number, data_set), BUDGET, Composition.of(EVENT))
        ledger.commit(f"run/{number}", "digest")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as made:
        yield Path(made)


@pytest.fixture
def path(folder: Path) -> Path:
    return folder / "ledger.sqlite"


@pytest.fixture
def running(path: Path) -> Iterator[Ledger]:
    """A ledger with 8 entries whose process has not closed it: some are in the WAL only."""
    with Ledger.open(path) as ledger:
        spend(ledger, 1, 2, 3, 4)
        yield ledger


def copied(folder: Path, name: str, *files: str) -> Path:
    """The files as they are now, in a folder of their own."""
    there = folder / name
    there.mkdir()
    for file in files or FILES:
        if (folder / file).exists():
            shutil.copy(folder / file, there)
    return there


def at_rest(folder: Path) -> dict[str, bytes]:
    """The files of a ledger that was closed in good order."""
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        spend(ledger, 1, 2, 3, 4)
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def opened(folder: Path) -> list[Entry]:
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        return ledger.entries()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for file in folder.iterdir():
        file.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


# -- damage ------------------------------------------------------------------------------------


def in_use(folder: Path) -> dict[str, bytes]:
    """The files of the same ledger, copied while it was open: all of it is in the WAL."""
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        spend(ledger, 1, 2, 3, 4)
        return {name: (folder / name).read_bytes() for name in FILES}


CASES = pytest.mark.parametrize(
    ("files", "where"),
    [(at_rest, "ledger.sqlite"), (in_use, "ledger.sqlite"), (in_use, "ledger.sqlite-wal")],
)


def harmless_or_refused(folder: Path, entries: list[Entry]) -> bool:
    """Whether a ledger opens; what opens must have every entry, as it was written."""
    try:
        found = opened(folder)
    except StateError:
        return False
    assert found == entries
    return True


@dataclass(frozen=True)
class Sayings:
    """Everything that a ledger says, and what it would decide."""

    entries: list[Entry]
    epsilon: float
    by_run: Composition
    requests: list[Reservation | None]
    reserved: list[Reservation]
    rounds: int
    refusals: list[str]

    @classmethod
    def of(cls, ledger: Ledger) -> Sayings:
        one, many = Composition.of(EVENT), Composition.of(EVENT) * 1000
        asked = [(release(2), one), (release(8), one), (release(98), one), (release(99), many)]
        return cls(
            ledger.entries(),
            ledger.epsilon("clinic", DELTA),
            ledger.composition("clinic", run_id="run"),
            [ledger.find(f"run/{number}") for number in (1, 7, 8, 99)],
            ledger.reserved(),
            ledger.rounds_since("clinic", "2000-01-01"),
            [str(each) for item, plan in asked for each in ledger.refusals(item, BUDGET, plan)],
        )


def outcome(folder: Path, before: Sayings) -> str:
    """What becomes of a damaged ledger: refused, or nothing is changed and it goes on as ever.

    Anything else fails: another exception, a refusal that does not say what to do, a ledger that
    says or decides anything else, or one in which the next release cannot be found again.
    """
    path, refused = folder / "ledger.sqlite", ""
    try:
        with Ledger.open(path) as ledger:
            assert Sayings.of(ledger) == before
            spend(ledger, 50)
            ledger.verify()
    except StateError as error:
        refused = str(error)
    if refused:
        assert any(remedy in refused for remedy in REMEDIES), refused
        return "refused"
    with Ledger.open(path) as ledger:
        ledger.verify()
        entries = ledger.entries()
        assert entries[:-2] == before.entries
        assert [entry.request_id for entry in entries[-2:]] == ["run/50", "run/50"]
    return "harmless"


def places(size: int, dice: random.Random) -> list[int]:
    if CORRUPTION == "all":
        return list(range(size))
    return sorted(dice.sample(range(size), min(size, int(CORRUPTION))))


def of_every_kind(ledger: Ledger, *rounds: int) -> None:
    ledger.note_holder("north", "keys")
    ledger.note_budget("clinic", BUDGET, by="officer", sentence="set")
    spend(ledger, *rounds)


def closed(folder: Path) -> dict[str, bytes]:
    """The files of a ledger that was closed in good order, with one release not resolved."""
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        of_every_kind(ledger, 1, 2, 3, 4, 5, 6, 7)
        ledger.reserve(release(8), BUDGET, Composition.of(EVENT))
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def reopened(folder: Path) -> dict[str, bytes]:
    """The files of the same ledger, copied while in use: the older half is in its main file."""
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        of_every_kind(ledger, 1, 2, 3, 4, 5)
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        spend(ledger, 6, 7)
        ledger.reserve(release(8), BUDGET, Composition.of(EVENT))
        return {name: (folder / name).read_bytes() for name in FILES}


EACH_FILE = pytest.mark.parametrize(
    ("files", "where"),
    [
        (closed, "ledger.sqlite"),
        (closed, "ledger.head"),
        (reopened, "ledger.sqlite"),
        (reopened, "ledger.sqlite-wal"),
        (reopened, "ledger.head"),
    ],
)


@pytest.mark.timeout(7200)
@EACH_FILE
def test_every_byte_that_is_flipped_is_refused_or_carries_nothing(
    folder: Path,
    files: Callable[[Path], dict[str, bytes]],
    where: str,
) -> None:
    """One random bit of each byte, or all the bits of a random mask."""
    good = files(folder)
    put(folder, good)
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        before = Sayings.of(ledger)
    dice, found = random.Random(f"{files.__name__} {where}"), Counter[str]()
    for place in places(len(good[where]), dice):
        mask = dice.choice([1 << dice.randrange(8), dice.randint(1, 255)])
        damaged = bytearray(good[where])
        damaged[place] ^= mask
        put(folder, good | {where: bytes(damaged)})
        try:
            found[outcome(folder, before)] += 1
        except BaseException as error:
            error.add_note(f"byte {place} of {where} of a ledger {files.__name__}, mask {mask}")
            raise
    print(f"{files.__name__} {where}: {len(good[where])} bytes, {dict(found)}")
    # Control: where nothing is ever refused, nothing was hit.
    assert found["refused"]


@CASES
def test_bytes_flipped_in_a_row_are_harmless_or_refused(
    folder: Path, files: Callable[[Path], dict[str, bytes]], where: str
) -> None:
    """Harmless: in a page's unused part, or in a page that the WAL has anew."""
    good = files(folder)
    put(folder, good)
    entries = opened(folder)

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(good[where]) - 1), st.integers(1, 255), st.integers(1, 64))
    def flip(place: int, mask: int, length: int) -> None:
        damaged = bytearray(good[where])
        for offset in range(place, min(place + length, len(damaged))):
            damaged[offset] ^= mask
        put(folder, good | {where: bytes(damaged)})
        harmless_or_refused(folder, entries)

    flip()


def test_a_flipped_byte_in_an_entry_is_always_found(folder: Path) -> None:
    """The control of the test above: there, harmless places might be all that was hit."""
    good = at_rest(folder)
    start = good["ledger.sqlite"].index(b"hub")
    for offset in range(3):
        damaged = bytearray(good["ledger.sqlite"])
        damaged[start + offset] ^= 1
        put(folder, good | {"ledger.sqlite": bytes(damaged)})
        with pytest.raises(StateError, match=r"is not what was written.*restore the file"):
            opened(folder)


@CASES
def test_a_file_cut_anywhere_is_harmless_or_refused(
    folder: Path, files: Callable[[Path], dict[str, bytes]], where: str
) -> None:
    good = files(folder)
    put(folder, good)
    entries = opened(folder)
    size = len(good[where])
    for length in sorted({0, 1, 99, 100, 511, size - 1, *range(0, size, max(1, size // 40))}):
        put(folder, good | {where: good[where][:length]})
        whole = harmless_or_refused(folder, entries)
        # Whole only where the WAL has every page: a file alone misses what was cut off.
        assert not whole or (files, where) == (in_use, "ledger.sqlite")


def test_a_head_that_is_cut_is_a_little_older_and_no_more(folder: Path) -> None:
    good = at_rest(folder)
    entries = opened(folder)
    line = len(good["ledger.head"].splitlines(keepends=True)[0])
    for length in range(line, len(good["ledger.head"]), 37):
        put(folder, good | {"ledger.head": good["ledger.head"][:length]})
        assert opened(folder) == entries
        # Opening has made up for it.
        assert (folder / "ledger.head").read_bytes().endswith(good["ledger.head"][-line:])


# -- rollback ----------------------------------------------------------------------------------


def test_an_older_copy_is_refused_with_what_to_do(running: Ledger, folder: Path) -> None:
    copy = copied(folder, "copy", "ledger.sqlite", "ledger.sqlite-wal")
    spend(running, 5)
    shutil.copy(folder / "ledger.head", copy)
    with pytest.raises(
        StateError,
        match=r"ledger.head knows of entry 10 and the ledger ends at entry 8\. It may be an older "
        r"copy of itself: .* put back the newest copy.*`sotto ledger accept`",
    ):
        opened(copy)


def test_a_deleted_wal_is_an_older_copy(running: Ledger, folder: Path) -> None:
    copy = copied(folder, "copy", "ledger.sqlite", "ledger.head")
    with pytest.raises(StateError, match=r"-wal|is empty|knows of entry 8"):
        opened(copy)


def test_a_missing_head_is_refused(running: Ledger, folder: Path) -> None:
    copy = copied(folder, "copy", "ledger.sqlite", "ledger.sqlite-wal")
    with pytest.raises(StateError, match=r"ledger\.head is missing or damaged, .* of 8"):
        opened(copy)


def test_a_ledger_that_is_gone_does_not_begin_anew(running: Ledger, folder: Path) -> None:
    copy = copied(folder, "copy", "ledger.head")
    with pytest.raises(StateError, match="knows of entry 8 and the ledger ends at entry 0"):
        opened(copy)
    assert not (copy / "ledger.sqlite").exists()


def test_another_ledger_of_the_same_length_is_refused(
    running: Ledger, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    at_rest(other)
    shutil.copy(folder / "ledger.head", other)
    with pytest.raises(StateError, match="knows another entry 8 than the ledger has"):
        opened(other)


def test_a_process_whose_file_was_swapped_away_stops_before_it_writes(
    running: Ledger, folder: Path, path: Path
) -> None:
    """It has the old file open still, and would spend a budget that the new one spends too."""
    copy = copied(folder, "copy")
    for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
        (folder / name).rename(folder / f"{name}.away")
    for name in FILES:
        shutil.copy(copy / name, folder)
    with Ledger.open(path) as other:
        spend(other, 5)
    with pytest.raises(StateError, match="knows of entry 10"):
        spend(running, 6)


def test_what_nobody_can_notice_is_everything_put_back_together(
    running: Ledger, folder: Path
) -> None:
    """Said in docs/ledger.md; an anchor elsewhere is what helps, as the next test shows."""
    copy = copied(folder, "copy")
    spend(running, 5)
    assert len(opened(copy)) == 8


def test_an_anchor_elsewhere_notices_that_the_whole_folder_was_put_back(
    running: Ledger, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    usb = tmp_path_factory.mktemp("usb") / "clinic.head"
    running.add_anchor(usb)
    copy = copied(folder, "copy")
    with Ledger.open(copy / "ledger.sqlite", anchors=[usb]):
        pass
    spend(running, 5)
    with pytest.raises(StateError, match=r"clinic\.head knows of entry 10"):
        Ledger.open(copy / "ledger.sqlite", anchors=[usb])


def test_an_anchor_that_is_not_there_is_not_made_in_passing(
    running: Ledger, folder: Path, path: Path
) -> None:
    """An empty mount point must not count as an anchor."""
    usb = folder / "usb.head"
    with pytest.raises(StateError, match=r"usb\.head is missing or damaged"):
        Ledger.open(path, anchors=[usb])
    running.add_anchor(usb)
    with pytest.raises(StateError, match="is there already"):
        running.add_anchor(usb)
    Ledger.open(path, anchors=[usb]).close()


def test_a_head_that_cannot_be_written_stops_the_release_and_not_the_account(
    running: Ledger, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    disk = tmp_path_factory.mktemp("disk")
    running.add_anchor(disk / "clinic.head")
    (disk / "clinic.head").unlink()
    (disk / "clinic.head").mkdir()
    with pytest.raises(StateError, match="nothing is released without it"):
        spend(running, 5)
    assert len(running.entries()) == 8


# -- saying that it is lost ----------------------------------------------------------------------


@pytest.fixture
def older(running: Ledger, folder: Path) -> Path:
    """The path of an older copy beside a newer head."""
    copy = copied(folder, "copy", "ledger.sqlite", "ledger.sqlite-wal")
    spend(running, 5)
    spend(running, 6, data_set="late")
    shutil.copy(folder / "ledger.head", copy)
    return copy / "ledger.sqlite"


def test_accepting_a_loss_counts_every_budget_as_spent_for_ever(older: Path) -> None:
    with Ledger.accept_loss(older, data_sets=["late"], by="officer") as ledger:
        assert ledger.epsilon("clinic", DELTA) == ledger.epsilon("late", DELTA) == math.inf
    with Ledger.open(older) as ledger:
        for data_set in ("clinic", "late"):
            with pytest.raises(BudgetExceeded, match=r"restored from an older copy.*infinite"):
                ledger.reserve(release(9, data_set), Budget(1e6, DELTA), Composition.of(EVENT))
        spend(ledger, 10, data_set="another")
        entry = ledger.entries("late")[0]
    assert (entry.number, entry.state) == (9, "restored")
    assert entry.remark is not None
    assert entry.remark.by == "officer"
    assert entry.remark.data_sets == ("clinic", "late")
    assert "knows of entry 12 and the ledger ends at entry 8" in entry.remark.sentence


def test_a_ledger_that_is_in_order_has_no_loss_to_accept(running: Ledger, path: Path) -> None:
    with pytest.raises(StateError, match="nothing is lost"):
        Ledger.accept_loss(path, by="officer")
    assert len(running.entries()) == 8


def test_a_loss_can_be_accepted_after_a_head_was_deleted(running: Ledger, folder: Path) -> None:
    copy = copied(folder, "copy", "ledger.sqlite", "ledger.sqlite-wal")
    Ledger.accept_loss(copy / "ledger.sqlite", by="officer").close()
    with Ledger.open(copy / "ledger.sqlite") as ledger:
        assert ledger.epsilon("clinic", DELTA) == math.inf


def test_where_all_is_lost_the_data_sets_must_be_named(running: Ledger, folder: Path) -> None:
    copy = copied(folder, "copy", "ledger.head")
    with pytest.raises(ConfigurationError, match="name those that were released from"):
        Ledger.accept_loss(copy / "ledger.sqlite", by="officer")
    Ledger.accept_loss(copy / "ledger.sqlite", data_sets=["clinic"], by="officer").close()
    with Ledger.open(copy / "ledger.sqlite") as ledger:
        assert ledger.epsilon("clinic", DELTA) == math.inf


def test_a_data_set_with_a_budget_and_no_release_is_lost_too(folder: Path) -> None:
    """It may have been released from after the copy was made."""
    with Ledger.open(folder / "ledger.sqlite") as ledger:
        ledger.note_budget("fresh", BUDGET, by="officer", sentence="set")
        copy = copied(folder, "copy", "ledger.sqlite", "ledger.sqlite-wal")
        spend(ledger, 1, data_set="fresh")
        shutil.copy(folder / "ledger.head", copy)
    with Ledger.accept_loss(copy / "ledger.sqlite", by="officer") as accepted:
        assert accepted.epsilon("fresh", DELTA) == math.inf


def test_a_broken_chain_cannot_be_accepted(folder: Path, path: Path) -> None:
    """What was changed on purpose is not what a backup leaves out."""
    good = at_rest(folder)
    damaged = good["ledger.sqlite"].replace(b'"coordinator":"hub"', b'"coordinator":"bub"')
    put(folder, good | {"ledger.sqlite": damaged})
    with pytest.raises(StateError, match="is not what was written"):
        Ledger.accept_loss(path, by="officer")


@pytest.mark.parametrize("made", ["nothing", "header"])
def test_a_maker_that_was_killed_leaves_nothing_in_the_way(path: Path, made: str) -> None:
    """Between the file and its tables; no head was written, so no entry can have been."""
    connection = sqlite3.connect(path)
    if made == "header":
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    with Ledger.open(path) as ledger:
        spend(ledger, 1)


# -- other files -------------------------------------------------------------------------------


def test_a_copy_by_sqlite_itself_is_a_ledger(running: Ledger, folder: Path) -> None:
    """``VACUUM INTO`` and the backup API are how a ledger is best copied while it is in use."""
    there = folder / "backup"
    there.mkdir()
    connection = sqlite3.connect(folder / "ledger.sqlite")
    connection.execute("VACUUM INTO ?", (str(there / "ledger.sqlite"),))
    connection.close()
    shutil.copy(folder / "ledger.head", there)
    assert opened(there) == running.entries()
