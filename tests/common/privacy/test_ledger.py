"""The account: what it charges, what it refuses, and that nobody can quietly change it."""

import math
import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BudgetExceeded, ConfigurationError, Refusal, StateError
from common.privacy.accounting import epsilon, noise_multiplier
from common.privacy.events import Composition, Event, SubsampledGaussian, Unprotected
from common.privacy.ledger import Budget, Kind, Ledger, Release
from common.privacy.releases import GENESIS, Entry, chain

DELTA = 1e-5
ROUND = SubsampledGaussian(1.0, 10.0, 2)
RUN = Composition.of(ROUND) * 5
WIDE = Budget(100.0, DELTA)


def release(
    number: int = 1, run: str = "run-1", event: Event = ROUND, data_set: str = "clinic-a"
) -> Release:
    return Release(
        request_id=f"{run}/{number:06d}",
        data_set=data_set,
        task="medical-diagnosis",
        coordinator="hospital-trust",
        run_id=run,
        plan_digest="p" * 64,
        round=number,
        event=event,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.open(path) as opened:
        yield opened


def spend(ledger: Ledger, item: Release, budget: Budget | None, planned: Composition) -> None:
    ledger.reserve(item, budget, planned)
    ledger.commit(item.request_id, "d" * 64)


# -- adding up -------------------------------------------------------------------------------


def test_three_runs_of_five_rounds_over_restarts_cost_what_fifteen_rounds_cost(path: Path) -> None:
    """And the run after them is refused before anything, with what is left."""
    sigma = noise_multiplier(0.1, 15 * 20, 3.0, DELTA)
    event = SubsampledGaussian(0.1, sigma, 20)
    planned, budget = Composition.of(event) * 5, Budget(3.0, DELTA)
    for run in range(3):
        with Ledger.open(path) as ledger:
            for number in range(1, 6):
                spend(ledger, release(number, f"run-{run}", event), budget, planned)

    with Ledger.open(path) as ledger:
        assert ledger.epsilon("clinic-a", DELTA) == epsilon(planned * 3, DELTA)
        # An account that restarts with each run would show this instead.
        assert ledger.epsilon("clinic-a", DELTA) > 1.5 * epsilon(planned, DELTA)
        before = ledger.entries()
        with pytest.raises(BudgetExceeded, match=r"needs ε=.* more, 0\.00 of 3\.00 is left"):
            ledger.reserve(release(1, "run-3", event), budget, planned)
        assert ledger.entries() == before


def test_data_sets_and_runs_are_counted_apart(ledger: Ledger) -> None:
    for number, (run, data_set) in enumerate([("a", "x"), ("b", "x"), ("b", "y")], start=1):
        spend(ledger, release(number, run, data_set=data_set), WIDE, RUN)
    one = Composition.of(ROUND)
    assert ledger.composition("x") == one * 2
    assert ledger.composition("x", run_id="b") == ledger.composition("y") == one
    assert ledger.composition("x", run_id="c") == ledger.composition("z") == Composition()
    assert ledger.data_sets() == ["x", "y"]
    assert ledger.epsilon("z", DELTA) == 0.0
    assert [entry.request_id for entry in ledger.entries("y")] == ["b/000003"] * 2


def test_reserved_counts_as_spent_until_it_is_committed_and_after(ledger: Ledger) -> None:
    ledger.reserve(release(1), WIDE, RUN)
    ledger.reserve(release(2), WIDE, RUN)
    ledger.commit(release(2).request_id, "digest")
    assert ledger.composition("clinic-a") == Composition.of(ROUND) * 2
    assert [item.release for item in ledger.reserved()] == [release(1)]
    assert ledger.reserved("clinic-b") == []


def test_every_kind_of_release_counts(ledger: Ledger) -> None:
    for number, kind in enumerate(get_args(Kind), start=1):
        spend(ledger, replace(release(number), kind=kind), WIDE, RUN)
    assert ledger.composition("clinic-a") == Composition.of(ROUND) * 4


def test_there_are_no_other_kinds_of_release() -> None:
    with pytest.raises(ConfigurationError, match=r"kind must be one of .*update.* got 'rumour'"):
        replace(release(), kind="rumour")  # type: ignore[arg-type]


# -- the same request again ------------------------------------------------------------------


def test_a_repeated_request_costs_nothing_and_tells_its_state(ledger: Ledger) -> None:
    tight = Budget(epsilon(RUN, DELTA), DELTA)
    for number in range(1, 6):
        assert not ledger.reserve(release(number), tight, RUN).repeated
    again = ledger.reserve(release(5), tight, RUN)
    assert (again.state, again.repeated) == ("reserved", True)
    ledger.commit(release(5).request_id, "digest")
    again = ledger.reserve(release(5), tight, RUN)
    assert (again.state, again.repeated, again.reply_digest) == ("committed", True, "digest")
    assert ledger.composition("clinic-a") == RUN


def test_a_crash_between_reserve_and_commit_is_spent_and_can_be_resumed_for_nothing(
    path: Path,
) -> None:
    tight = Budget(epsilon(RUN, DELTA), DELTA)
    crashed = Ledger.open(path)  # stays open: it never gets to tidy up
    for number in range(1, 6):
        crashed.reserve(release(number), tight, RUN)

    with Ledger.open(path) as ledger:
        assert ledger.epsilon("clinic-a", DELTA) == epsilon(RUN, DELTA)
        with pytest.raises(BudgetExceeded):
            ledger.reserve(release(1, "run-2"), tight, Composition.of(ROUND))
        assert ledger.reserve(release(5), tight, RUN).repeated
        ledger.commit(release(5).request_id, "digest")
        assert ledger.epsilon("clinic-a", DELTA) == epsilon(RUN, DELTA)
    crashed.close()


def test_a_stored_reply_resolves_what_a_crash_left_reserved(path: Path) -> None:
    with Ledger.open(path) as crashed:
        for number in (1, 2, 3):
            crashed.reserve(release(number), WIDE, RUN)
        crashed.commit(release(3).request_id, "third")

    replies = {release(2).request_id: "second", release(3).request_id: "never asked for"}
    with Ledger.open(path) as ledger:
        (resolved,) = ledger.resolve(replies.get)
        assert resolved == ledger.find(release(2).request_id)
        assert (resolved.state, resolved.reply_digest) == ("committed", "second")
        assert ledger.find(release(3).request_id).reply_digest == "third"  # type: ignore[union-attr]
        assert [item.release for item in ledger.reserved()] == [release(1)]
        assert ledger.composition("clinic-a") == Composition.of(ROUND) * 3
        assert ledger.resolve(replies.get) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("event", SubsampledGaussian(1.0, 0.1, 2)),
        ("data_set", "clinic-b"),
        ("plan_digest", "q" * 64),
        ("coordinator", "somebody else"),
        ("kind", "evaluation"),
    ],
)
def test_a_request_id_cannot_be_used_again_for_other_terms(
    ledger: Ledger, field: str, value: object
) -> None:
    """Or a coordinator would pay for little noise with the price of much."""
    ledger.reserve(release(1), WIDE, RUN)
    other = replace(release(1), **{field: value})  # type: ignore[arg-type]
    with pytest.raises(Refusal, match=f"made before with another {field}; use a new"):
        ledger.reserve(other, WIDE, RUN)
    assert ledger.composition("clinic-a") == Composition.of(ROUND)


def test_commit_is_idempotent_and_nothing_else(ledger: Ledger) -> None:
    with pytest.raises(StateError, match=r"was never made.*reserve it first"):
        ledger.commit("nothing", "digest")
    ledger.reserve(release(1), WIDE, RUN)
    assert ledger.commit(release(1).request_id, "digest").reply_digest == "digest"
    ledger.commit(release(1).request_id, "digest")
    assert len(ledger.entries()) == 2
    with pytest.raises(StateError, match="committed with another reply; send the stored one"):
        ledger.commit(release(1).request_id, "other")


# -- the budget ------------------------------------------------------------------------------


def test_a_run_that_would_pass_the_budget_is_refused_before_its_first_step(ledger: Ledger) -> None:
    short = Budget(epsilon(Composition.of(ROUND) * 4, DELTA), DELTA)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(release(1), short, RUN)
    assert ledger.entries() == []
    ledger.reserve(release(1), short, Composition.of(ROUND) * 4)


def test_a_run_that_departs_from_its_plan_is_held_to_what_it_does(ledger: Ledger) -> None:
    planned = Composition.of(ROUND) * 2
    exact = Budget(epsilon(planned, DELTA), DELTA)
    for number in (1, 2):
        spend(ledger, release(number), exact, planned)
    with pytest.raises(BudgetExceeded):  # a third round of a plan of two
        ledger.reserve(release(3), exact, planned)
    noisier = release(4, event=SubsampledGaussian(1.0, 50.0, 1))
    with pytest.raises(BudgetExceeded):  # or something the plan does not have
        ledger.reserve(noisier, exact, planned)


def test_a_runs_own_rounds_are_not_counted_twice(ledger: Ledger) -> None:
    """Once as released and once as planned would refuse the second round."""
    exact = Budget(epsilon(RUN, DELTA), DELTA)
    for number in range(1, 6):
        spend(ledger, release(number), exact, RUN)
    assert ledger.epsilon("clinic-a", DELTA) <= exact.epsilon


def test_other_runs_count_in_full(ledger: Ledger) -> None:
    both = Budget(epsilon(RUN * 2, DELTA), DELTA)
    for run in ("run-1", "run-2"):
        for number in range(1, 6):
            spend(ledger, release(number, run), both, RUN)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(release(1, "run-3", SubsampledGaussian(1.0, 30.0, 1)), both, Composition())


def test_a_lowered_budget_holds_at_once(ledger: Ledger) -> None:
    spend(ledger, release(1), WIDE, RUN)
    with pytest.raises(BudgetExceeded):
        ledger.reserve(release(2), Budget(0.01, DELTA), RUN)
    with pytest.raises(BudgetExceeded):  # a smaller δ makes the same releases dearer
        ledger.reserve(release(2), Budget(epsilon(RUN, DELTA), 1e-9), RUN)


def test_the_refusal_says_what_is_needed_left_and_allowed(ledger: Ledger) -> None:
    spend(ledger, release(1), WIDE, Composition.of(ROUND))
    before = ledger.epsilon("clinic-a", DELTA)
    budget = Budget(1.0, DELTA)
    with pytest.raises(BudgetExceeded) as refused:
        ledger.reserve(release(1, "run-2"), budget, RUN)
    sentence = refused.value.sentence
    found = re.fullmatch(
        r"data set 'clinic-a': this run needs ε=(\d\.\d\d) more, (\d\.\d\d) of 1\.00 is left "
        r"\(δ=1e-05\); lower the plan's ε or raise the budget",
        sentence,
    )
    assert found, sentence
    needs, left = map(float, found.groups())
    assert refused.value.left == 1.0 - before
    assert left <= refused.value.left < left + 0.01
    true_need = epsilon(Composition.of(ROUND) + RUN, DELTA) - before
    assert needs - 0.01 < true_need <= needs


@pytest.mark.parametrize("excess", [1 + 1e-9, 1.001])
def test_a_refusal_never_reads_as_if_there_were_enough(ledger: Ledger, excess: float) -> None:
    budget = Budget(epsilon(RUN, DELTA) / excess, DELTA)
    with pytest.raises(BudgetExceeded) as refused:
        ledger.reserve(release(1), budget, RUN)
    needs, left = re.findall(r"ε=(\S+) more, (\S+) of", refused.value.sentence)[0]
    assert float(left) < float(needs)


def test_unprotected_releases_need_a_data_set_without_budget(ledger: Ledger) -> None:
    unprotected = release(1, event=Unprotected())
    with pytest.raises(BudgetExceeded, match="no privacy guarantee, which costs ε=∞"):
        ledger.reserve(unprotected, WIDE, Composition.of(Unprotected()))
    spend(ledger, unprotected, None, Composition.of(Unprotected()))
    assert ledger.epsilon("clinic-a", DELTA) == math.inf
    with pytest.raises(BudgetExceeded, match=r"'clinic-a'.*without a.*guarantee.*infinite"):
        ledger.reserve(release(2), WIDE, RUN)
    ledger.reserve(release(3), None, RUN)
    ledger.reserve(release(4, data_set="clinic-b"), WIDE, RUN)


def test_without_a_budget_everything_is_still_written_down(ledger: Ledger) -> None:
    spend(ledger, release(1), None, RUN)
    assert ledger.composition("clinic-a") == Composition.of(ROUND)


@pytest.mark.parametrize(
    ("eps", "delta", "message"),
    [
        (0.0, 1e-5, "epsilon must be positive and finite, got 0.0"),
        (math.inf, 1e-5, "for no limit, set no budget"),
        (math.nan, 1e-5, "got nan"),
        (1.0, 0.0, "delta must be above 0 and below 1, got 0.0"),
        (1.0, 1.0, "got 1.0"),
    ],
)
def test_a_budget_out_of_range_is_refused(eps: float, delta: float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Budget(eps, delta)


actions = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "commit", "reopen"]),
        st.integers(1, 4),
        st.sampled_from(["run-1", "run-2"]),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(actions)
def test_any_history_stays_within_the_budget_and_shows_what_left(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int, str]]
) -> None:
    path = tmp_path_factory.mktemp("history") / "ledger.sqlite"
    budget = Budget(epsilon(Composition.of(ROUND) * 5, DELTA), DELTA)
    planned = Composition.of(ROUND) * 3
    sent: set[str] = set()
    ledger = Ledger.open(path)
    dead: list[Ledger] = []
    for action, number, run in history:
        item = release(number, run)
        try:
            if action == "reserve":
                ledger.reserve(item, budget, planned)
            elif action == "commit":
                ledger.commit(item.request_id, "digest")
                sent.add(item.request_id)
            else:
                dead.append(ledger)
                ledger = Ledger.open(path)
        except (BudgetExceeded, StateError):
            pass
        assert ledger.epsilon("clinic-a", DELTA) <= budget.epsilon
        assert ledger.composition("clinic-a").covers(Composition.of(ROUND) * len(sent))
    ledger.verify()
    for opened in [ledger, *dead]:
        opened.close()


# -- threads ---------------------------------------------------------------------------------


def test_threads_share_a_ledger(ledger: Ledger) -> None:
    budget = Budget(epsilon(RUN, DELTA), DELTA)
    refused: list[int] = []

    def work(run: int) -> None:
        try:
            spend(ledger, release(1, f"run-{run}"), budget, Composition.of(ROUND))
        except BudgetExceeded:
            refused.append(run)

    threads = [threading.Thread(target=work, args=(run,)) for run in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 7
    assert ledger.composition("clinic-a") == RUN
    ledger.verify()


def test_two_connections_see_each_others_entries(path: Path) -> None:
    with Ledger.open(path) as first, Ledger.open(path) as second:
        first.reserve(release(1), WIDE, RUN)
        assert second.composition("clinic-a") == Composition.of(ROUND)
        second.commit(release(1).request_id, "digest")
        assert first.find(release(1).request_id).state == "committed"  # type: ignore[union-attr]


def test_a_refused_write_leaves_memory_and_file_alike(path: Path) -> None:
    with Ledger.open(path) as ledger:
        with pytest.raises(BudgetExceeded):
            ledger.reserve(release(1), Budget(0.01, DELTA), RUN)
        assert ledger.composition("clinic-a") == Composition()
        ledger.reserve(release(1), WIDE, RUN)
        assert [entry.number for entry in ledger.entries()] == [1]


# -- what is written stays -------------------------------------------------------------------


def filled(path: Path) -> None:
    with Ledger.open(path) as ledger:
        for number in (1, 2, 3):
            spend(ledger, release(number), WIDE, RUN)


def tamper(path: Path, *statements: str) -> None:
    """As somebody with the file in hand and no scruples would."""
    connection = sqlite3.connect(path, isolation_level=None)
    triggers = connection.execute(
        "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
    ).fetchall()
    for name, _ in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        connection.execute(statement)
    for _, text in triggers:
        connection.execute(text)
    connection.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = 'x'",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE number = 6",
    ],
)
def test_triggers_forbid_changes(path: Path, statement: str) -> None:
    filled(path)
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("number", [1, 2, 4, 6])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE entries SET body = replace(body, 'reserved', 'budget') || ' ' WHERE number = {n}",
        "UPDATE entries SET body = replace(body, 'clinic-a', 'clinic-b') || ' ' WHERE number = {n}",
        "UPDATE entries SET digest = 'f' || substr(digest, 2, 63) || '0' WHERE number = {n}",
        "UPDATE entries SET body = (SELECT body FROM entries WHERE number = 3) WHERE number = {n}",
    ],
)
def test_any_changed_entry_is_found_and_named(path: Path, number: int, change: str) -> None:
    filled(path)
    tamper(path, change.format(n=number))
    with pytest.raises(StateError, match=rf"entry {number} is not what was written.*restore"):
        Ledger.open(path)


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_dropped_entry_is_found_and_named(path: Path, number: int) -> None:
    filled(path)
    tamper(path, f"DELETE FROM entries WHERE number = {number}")
    with pytest.raises(StateError, match=f"entry {number} is missing"):
        Ledger.open(path)


def test_a_closed_up_gap_is_found(path: Path) -> None:
    filled(path)
    tamper(
        path,
        "DELETE FROM entries WHERE number = 2",
        *(f"UPDATE entries SET number = {n - 1} WHERE number = {n}" for n in range(3, 7)),
    )
    with pytest.raises(StateError, match="entry 2 is not what was written"):
        Ledger.open(path)


def test_verify_finds_what_happens_to_the_file_while_it_is_open(path: Path) -> None:
    filled(path)
    with Ledger.open(path) as ledger:
        ledger.verify()
        tamper(path, "UPDATE entries SET body = body || ' ' WHERE number = 2")
        with pytest.raises(StateError, match="entry 2 is not what was written"):
            ledger.verify()


def test_verify_finds_a_ledger_that_was_cut_short_or_replaced_while_open(path: Path) -> None:
    filled(path)
    with Ledger.open(path) as ledger:
        tamper(path, "DELETE FROM entries WHERE number > 4")
        with pytest.raises(StateError, match="entry 5 is gone"):
            ledger.verify()


def rewritten(path: Path, number: int, old: str, new: str) -> None:
    """Change an entry and make all digests fit, as somebody who knows how they are made can."""
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT number, body FROM entries ORDER BY number").fetchall()
    connection.close()
    statements, digest = [], GENESIS
    for found, body in rows:
        changed = body.replace(old, new) if found == number else body
        digest = chain(digest, changed)
        statements.append(
            f"UPDATE entries SET body = '{changed}', digest = '{digest}' WHERE number = {found}"
        )
    tamper(path, *statements)


def test_a_sound_chain_in_the_place_of_the_one_that_was_read_is_found(path: Path) -> None:
    """The last digest stands for all before it: memory holds no other."""
    filled(path)
    with Ledger.open(path) as ledger:
        ledger.verify()
        rewritten(path, 3, "clinic-a", "clinic-b")
        with pytest.raises(StateError, match="entry 6 or one before it is another than it was"):
            ledger.verify()
        with pytest.raises(StateError, match="entry 6 is gone, or another than it was"):
            ledger.reserve(release(4), WIDE, RUN)


def test_a_request_is_known_whatever_became_of_its_entry_in_the_file(path: Path) -> None:
    """A charged release must not look like one that never was: it would be computed again."""
    filled(path)
    with Ledger.open(path) as ledger:
        tamper(path, "UPDATE entries SET body = replace(body, '000001', '000009')")
        for ask in (
            lambda: ledger.reserve(release(1), WIDE, RUN),
            lambda: ledger.find(release(1).request_id),
            lambda: ledger.commit(release(1).request_id, "d" * 64),
        ):
            with pytest.raises(StateError, match="entry 1 is not what was written"):
                ask()
        assert ledger.find("run-1/000009") is None


def test_terms_are_believed_only_if_they_fit_their_own_digest(path: Path) -> None:
    """Even where the file's digests fit each other, and the last entry is the one that was."""
    filled(path)
    with Ledger.open(path) as ledger:
        entry = ledger.entries()[0]
        forged = entry.body().replace("hospital-trust", "somebody else")
        tamper(
            path,
            f"UPDATE entries SET body = '{forged}', digest = '{chain(GENESIS, forged)}' "
            "WHERE number = 1",
        )
        with pytest.raises(StateError, match="entry 1 is not what was written"):
            ledger.find(release(1).request_id)


def test_a_chain_that_is_sound_but_makes_no_sense_is_refused(path: Path) -> None:
    """Somebody who can compute digests still cannot commit what was never reserved."""
    Ledger.open(path).close()
    entry = Entry(1, "committed", Entry.now(), "run-1/000001")
    connection = sqlite3.connect(path)
    connection.execute(
        "INSERT INTO entries VALUES (1, ?, ?)", (entry.body(), entry.digest(GENESIS))
    )
    connection.commit()
    connection.close()
    with pytest.raises(StateError, match="entry 1 does not follow"):
        Ledger.open(path)


@pytest.mark.parametrize("damage", ["garbage", "header", "middle", "empty"])
def test_a_damaged_file_is_refused_with_what_to_do(path: Path, damage: str) -> None:
    filled(path)
    sqlite3.connect(path).execute("PRAGMA wal_checkpoint(TRUNCATE)").connection.close()
    content = path.read_bytes()
    path.write_bytes(
        {
            "garbage": b"not a ledger" * 1000,
            "header": b"\0" * 100 + content[100:],
            "middle": content[: len(content) // 2] + b"\xff" * (len(content) - len(content) // 2),
            "empty": b"",
        }[damage]
    )
    with pytest.raises(
        StateError, match=r"ledger\.sqlite.*(restore the file|put back the newest|folder)"
    ):
        Ledger.open(path)


def test_another_programs_database_is_not_a_ledger(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY)")
    connection.close()
    with pytest.raises(StateError, match="not a ledger; choose another state folder"):
        Ledger.open(path)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER entries_never_go",
        "CREATE TRIGGER quiet BEFORE INSERT ON entries BEGIN SELECT RAISE(IGNORE); END",
        "ALTER TABLE entries ADD COLUMN request_id TEXT",
        "PRAGMA application_id = 1",
    ],
)
def test_tables_that_are_not_as_they_were_made_are_damage(path: Path, statement: str) -> None:
    """A trigger may do other than we ask, and a missing one lets others do what we forbid."""
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    with pytest.raises(StateError, match=r"tables are not as they were made.*restore the file"):
        Ledger.open(path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="check that its folder is there"):
        Ledger.open(tmp_path / "absent" / "ledger.sqlite")


def test_the_file_is_durable_as_promised(ledger: Ledger) -> None:
    pragma = ledger._store._connection.execute
    assert pragma("PRAGMA journal_mode").fetchone() == ("wal",)
    assert pragma("PRAGMA synchronous").fetchone() == (2,)  # FULL


def test_a_ledger_in_memory_is_a_ledger() -> None:
    with Ledger.open(":memory:") as ledger:
        spend(ledger, release(1), WIDE, RUN)
        ledger.verify()
        assert ledger.find(release(1).request_id).state == "committed"  # type: ignore[union-attr]


def test_the_ledger_says_whose_it_is_once_for_each_change(ledger: Ledger) -> None:
    for name, keys in [("north", "A"), ("north", "A"), ("north", "B"), ("south", "B")]:
        ledger.note_holder(name, keys)
    notes = [entry.remark for entry in ledger.entries()]
    assert [(note.by, note.sentence) for note in notes if note is not None] == [
        ("north", "A"),
        ("north", "B"),
        ("south", "B"),
    ]


def test_whose_it_is_is_remembered_over_restarts_and_between_processes(path: Path) -> None:
    with Ledger.open(path) as ledger, Ledger.open(path) as other:
        ledger.note_holder("north", "A")
        other.note_holder("north", "A")
    with Ledger.open(path) as ledger:
        ledger.note_holder("north", "A")
        assert len(ledger.entries()) == 1


def test_whose_it_is_costs_nothing_and_is_about_no_data_set(ledger: Ledger) -> None:
    spend(ledger, release(1), WIDE, RUN)
    before = ledger.composition("clinic-a")
    ledger.note_holder("north", "A")
    assert ledger.composition("clinic-a") == before
    assert ledger.data_sets() == ["clinic-a"]
    assert len(ledger.entries("clinic-a")) == 2
    ledger.verify()


def test_a_changed_name_in_the_ledger_is_found(path: Path) -> None:
    """The chain covers these entries as it covers the others."""
    with Ledger.open(path) as ledger:
        ledger.note_holder("north", "A")
        spend(ledger, release(1), WIDE, RUN)
    tamper(path, "UPDATE entries SET body = replace(body, 'north', 'south') WHERE number = 1")
    with pytest.raises(StateError, match="entry 1 is not what was written"):
        Ledger.open(path)


def test_entries_tell_the_whole_story(ledger: Ledger) -> None:
    spend(ledger, release(1), WIDE, RUN)
    reserved, committed = ledger.entries()
    assert reserved.release == release(1)
    assert (reserved.state, committed.state) == ("reserved", "committed")
    assert committed.reply_digest == "d" * 64
    assert reserved.time <= committed.time
    assert reserved.time.endswith("+00:00")
