from __future__ import annotations

import re
import time
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families

from client.metrics import PHASES, HolderMetrics, outcome_of
from client.node import Replied
from common.errors import StorageError
from common.link.traffic import Traffic
from common.privacy.ledger import Budget
from tests.server.test_metrics import metrics_in_the_document

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

DATA_SET = (("data_set", "heart"),)
BUDGET = Budget(2.0, 1e-4)


class Account:
    """ε as a ledger would say it, and how often it was asked."""

    def __init__(self, epsilon: float = 0.5) -> None:
        self.epsilon, self.asked = epsilon, 0
        self.error: Exception | None = None

    def spent(self) -> float:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.epsilon


def metrics_of(
    spent: Callable[[], float] | None = None, budget: Budget | None = BUDGET
) -> HolderMetrics:
    return HolderMetrics(
        "heart", budget, spent or Account().spent, lambda: Traffic(3, 4, 5, 6, 0, 7, 8)
    )


def samples(metrics: HolderMetrics) -> Samples:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def replied(kind: str = "train", error: str | None = None) -> Replied:
    return Replied(kind, "", 0.1, error, "id")


def requests(found: Samples) -> dict[tuple[str, ...], float]:
    """Outcome, what was asked, rule → how often."""
    return {
        tuple(value for _, value in labels): count
        for (name, labels), count in found.items()
        if name == "sotto_holder_requests_total"
    }


def test_replies_are_counted_by_outcome_and_rule() -> None:
    metrics = metrics_of()
    metrics.replied(replied(), 1)
    metrics.replied(replied(), 2)
    metrics.replied(replied("evaluate", "budget: 0.1 is left"), 2)
    metrics.replied(replied("query.share_keys", "ValueError"), 3)

    assert requests(samples(metrics)) == {
        ("done", "train", ""): 2,
        ("declined", "evaluate", "budget"): 1,
        ("failed", "query", ""): 1,
    }


def test_the_last_round_is_of_what_was_trained() -> None:
    metrics = metrics_of()
    before = time.time()
    metrics.replied(replied(), 7)
    metrics.replied(replied("evaluate"), 7)
    metrics.replied(replied(error="ValueError"), 8)
    metrics.replied(replied(), None)

    found = samples(metrics)
    assert found["sotto_holder_last_round", ()] == 7
    assert before <= found["sotto_holder_last_reply_timestamp_seconds", ()] <= time.time()


def test_phases_and_the_connection_are_measured() -> None:
    metrics = metrics_of()
    metrics.connected(now=True)
    for phase in PHASES:
        metrics.phase(phase, 0.2)

    found = samples(metrics)
    assert found["sotto_holder_connected", ()] == 1
    assert found["sotto_holder_phase_seconds_sum", (("phase", "commit"),)] == 0.2
    assert found["sotto_holder_sent_bytes_total", ()] == 3
    assert found["sotto_holder_received_bytes_total", ()] == 4
    assert found["sotto_holder_connections_total", ()] == 7
    assert found["sotto_holder_connections_failed_total", ()] == 8
    metrics.connected(now=False)
    assert samples(metrics)["sotto_holder_connected", ()] == 0


def test_what_is_left_of_the_budget_is_shown() -> None:
    found = samples(metrics_of())
    assert found["sotto_holder_epsilon_spent", DATA_SET] == 0.5
    assert found["sotto_holder_epsilon_budget", DATA_SET] == 2.0
    assert found["sotto_holder_epsilon_left", DATA_SET] == 1.5

    unlimited = samples(metrics_of(budget=None))
    assert unlimited["sotto_holder_epsilon_spent", DATA_SET] == 0.5
    assert ("sotto_holder_epsilon_left", DATA_SET) not in unlimited

    passed = samples(metrics_of(Account(float("inf")).spent))
    assert passed["sotto_holder_epsilon_spent", DATA_SET] == float("inf")
    assert passed["sotto_holder_epsilon_left", DATA_SET] == 0.0


def test_epsilon_is_priced_when_somebody_looks_and_something_was_answered() -> None:
    account = Account()
    metrics = metrics_of(account.spent)
    for _ in range(10):
        metrics.replied(replied(), 1)
        metrics.phase("commit", 0.1)
    assert account.asked == 0  # no round waits for it

    for _ in range(3):
        metrics.text()
    assert account.asked == 1
    account.epsilon = 0.75
    metrics.replied(replied(), 2)
    assert samples(metrics)["sotto_holder_epsilon_spent", DATA_SET] == 0.75
    assert account.asked == 2


def test_a_ledger_that_cannot_be_read_costs_the_page_only_its_epsilon() -> None:
    account = Account()
    account.error = StorageError("the disk is full")
    metrics = metrics_of(account.spent)
    found = samples(metrics)
    assert ("sotto_holder_epsilon_spent", DATA_SET) not in found
    assert ("sotto_holder_sent_bytes_total", ()) in found

    account.error = None
    assert samples(metrics)["sotto_holder_epsilon_spent", DATA_SET] == 0.5


def test_what_others_write_makes_no_series_without_end() -> None:
    metrics = metrics_of()
    for number in range(500):
        metrics.replied(replied(f"kind-{number}", f"rule-{number}: ..."), number)
        metrics.phase(f"phase-{number}", 0.1)

    found = samples(metrics)
    assert len(requests(found)) < 40
    assert {outcome for outcome, *_ in requests(found)} == {"declined"}


def test_outcomes() -> None:
    assert outcome_of(replied()) == ("done", "")
    assert outcome_of(replied(error="task: another one")) == ("declined", "task")
    assert outcome_of(replied(error="ValueError")) == ("failed", "")


def test_names_follow_the_conventions_and_are_documented() -> None:
    metrics = metrics_of()
    metrics.replied(replied(), 1)
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", metrics.text().decode(), re.MULTILINE))
    own = {name: kind for name, kind in kinds.items() if name.startswith("sotto_")}
    assert metrics_in_the_document("### Of a holder") == {
        name: kind for name, kind in own.items() if not name.endswith("_created")
    }
    for name, kind in kinds.items():
        assert name.startswith(("sotto_holder_", "process_")), name
        assert re.fullmatch(r"[a-z_]+", name), name
        assert (kind == "counter") == name.endswith("_total"), name
