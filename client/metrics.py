"""A holder's figures for Prometheus; docs/operate.md lists them.

They hold timings and ε, which are about the data: the page belongs to the holder's own network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from client.node import Replied
from common.errors import SottoError
from common.link.traffic import Traffic
from common.privacy.ledger import Budget

__all__ = ["PHASES", "HolderMetrics", "Outcome", "outcome_of"]

PHASES = ("admit", "compute", "store", "commit")

SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Bounds of what a phase takes."""

_KINDS = ("train", "evaluate", "query")
_MOST_CODES = 32  # rules of a refusal; there are fewer than twenty

_TRAFFIC = {
    "bytes_sent": ("sotto_holder_sent_bytes", "Of replies' payloads."),
    "bytes_received": ("sotto_holder_received_bytes", "Of requests' payloads."),
    "connections": ("sotto_holder_connections", "To the coordinator, that it admitted."),
    "refused": ("sotto_holder_connections_failed", "Attempts that did not get through."),
}

Outcome = tuple[str, str]
"""``done``, ``declined`` or ``failed``; and the rule that declined, or ``""``."""


def outcome_of(event: Replied) -> Outcome:
    """What became of a request.

    >>> outcome_of(Replied("train", "1", 0.1, "budget: 0.2 is left"))
    ('declined', 'budget')
    """
    if event.error is None:
        return "done", ""
    # A refusal says "rule: sentence"; of a failure there is only the exception's type.
    rule, colon, _ = event.error.partition(": ")
    return ("declined", rule) if colon else ("failed", "")


class HolderMetrics(Collector):
    """Figures of one holder, in a registry of their own.

    Labels are words of ours, so there are never more series than that.

    Args:
        data_set: that the budget belongs to.
        budget: of the policy; None where it sets none.
        spent: ε of everything released so far; called when somebody asks, on his thread, and not
            again until something was answered.
        traffic: counts of the link; called likewise.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(
        self,
        data_set: str,
        budget: Budget | None,
        spent: Callable[[], float],
        traffic: Callable[[], Traffic],
    ) -> None:
        self._data_set, self._budget, self._spent, self._traffic = data_set, budget, spent, traffic
        self._priced: float | None = None
        self._stale = threading.Event()
        self._stale.set()
        self._codes: set[str] = set()
        self._registry = registry = CollectorRegistry()
        self._connected = Gauge(
            "sotto_holder_connected", "1 while the coordinator knows it.", registry=registry
        )
        self._requests = Counter(
            "sotto_holder_requests",
            "Answered, by what was asked, the outcome, and the rule that declined.",
            ["request", "outcome", "rule"],
            registry=registry,
        )
        self._seconds = Histogram(
            "sotto_holder_phase_seconds",
            "Of a request's phases.",
            ["phase"],
            registry=registry,
            buckets=SECONDS,
        )
        self._round = Gauge("sotto_holder_last_round", "Trained for.", registry=registry)
        self._last = Gauge(
            "sotto_holder_last_reply_timestamp_seconds", "When it left.", registry=registry
        )
        for phase in PHASES:
            self._seconds.labels(phase)  # a series that is not there cannot be told from no news
        registry.register(self)
        ProcessCollector(registry=registry)

    def connected(self, *, now: bool) -> None:
        """The coordinator knows the holder, or does not any more."""
        self._connected.set(now)

    def replied(self, event: Replied, number: int | None) -> None:
        """Count a reply.

        Args:
            event: says what became of the request.
            number: of its round; None where that is not known.
        """
        outcome, rule = outcome_of(event)
        kind = event.message_type.partition(".")[0]
        self._requests.labels(kind if kind in _KINDS else "other", outcome, self._known(rule)).inc()
        self._last.set(time.time())
        if kind != "evaluate" and outcome == "done" and number is not None:
            self._round.set(number)
        self._stale.set()

    def phase(self, name: str, seconds: float) -> None:
        """Count a phase of a request."""
        if name in PHASES:
            self._seconds.labels(name).observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are ours and cannot clash, and ε is not priced at the start."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """ε and the link's counts."""
        yield from self._epsilon()
        traffic = self._traffic()
        for field, (name, meaning) in _TRAFFIC.items():
            yield CounterMetricFamily(name, meaning, value=getattr(traffic, field))

    def _known(self, rule: str) -> str:
        if rule in self._codes or len(self._codes) < _MOST_CODES:
            self._codes.add(rule)
            return rule
        return "other"

    def _epsilon(self) -> Iterable[Metric]:
        spent = self._price()
        if spent is None:
            return
        yield self._about_data("sotto_holder_epsilon_spent", "Of all releases, ever.", spent)
        if self._budget is not None:
            most = self._budget.epsilon
            yield self._about_data("sotto_holder_epsilon_budget", "Of the policy.", most)
            yield self._about_data(
                "sotto_holder_epsilon_left", "Of the budget.", max(0.0, most - spent)
            )

    def _price(self) -> float | None:
        """ε spent; None while the ledger cannot be read."""
        if self._stale.is_set():
            self._stale.clear()
            try:
                self._priced = self._spent()
            except SottoError:
                self._priced = None
                self._stale.set()
        return self._priced

    def _about_data(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=["data_set"])
        family.add_metric([self._data_set], value)
        return family
