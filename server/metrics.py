"""The coordinator's figures for Prometheus; docs/operate.md lists them.

What happens once a round is counted as it happens. Everything else is read off a
:class:`server.status.Status` when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.link.traffic import Traffic
from server.status import KINDS_OF_MISSES, Status, kind_of_miss
from server.summaries import RoundSummary

__all__ = ["PHASES", "CoordinatorMetrics"]

PHASES = ("wait", "exchange", "aggregate", "checkpoint", "evaluate")

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Bounds of what a round takes, from a tiny model on one machine to a large one on slow lines."""

_TRAFFIC = {
    "bytes_sent": ("sotto_sent_bytes", "Of requests' payloads."),
    "bytes_received": ("sotto_received_bytes", "Of replies' payloads."),
    "requests": ("sotto_requests", "Put to holders."),
    "replies": ("sotto_replies", "That counted."),
    "replies_dropped": ("sotto_replies_dropped", "Too late, twice, or from the wrong holder."),
    "connections": ("sotto_connections", "Of holders, that were admitted."),
    "refused": ("sotto_connections_refused", "That were not admitted."),
}
assert {field.name for field in fields(Traffic)} == set(_TRAFFIC)


class CoordinatorMetrics(Collector):
    """Figures of one run, in a registry of their own.

    Labels are words of ours and names on the roster, so there are never more series than that.

    Args:
        look: the status now; called when somebody asks, on his thread.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, look: Callable[[], Status]) -> None:
        self._look = look
        self._registry = registry = CollectorRegistry()
        self._rounds = Counter(
            "sotto_rounds", "Rounds that are over, by outcome.", ["outcome"], registry=registry
        )
        self._seconds = Histogram(
            "sotto_round_seconds", "Of a round.", registry=registry, buckets=SECONDS
        )
        self._phases = Histogram(
            "sotto_round_phase_seconds",
            "Of a round's phases.",
            ["phase"],
            registry=registry,
            buckets=SECONDS,
        )
        self._accepted = Counter("sotto_updates_accepted", "Updates that count.", registry=registry)
        self._missed = Counter(
            "sotto_updates_missed",
            "Holders that missed a round, by reason.",
            ["reason"],
            registry=registry,
        )
        for outcome in ("completed", "lost"):
            self._rounds.labels(outcome)  # a series that is not there cannot be told from no news
        for phase in PHASES:
            self._phases.labels(phase)
        for kind in KINDS_OF_MISSES:
            self._missed.labels(kind)
        registry.register(self)
        ProcessCollector(registry=registry)

    def note(self, summary: RoundSummary) -> None:
        """Count a round that is over."""
        self._rounds.labels("lost" if summary.lost else "completed").inc()
        self._seconds.observe(summary.seconds)
        for phase, seconds in summary.phases.items():
            if phase in PHASES:
                self._phases.labels(phase).observe(seconds)
        self._accepted.inc(len(summary.accepted))
        for reason in summary.missed.values():
            self._missed.labels(kind_of_miss(reason)).inc()

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are ours and cannot clash, and a status is not asked for at the start."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """What a status says."""
        status = self._look()
        about = GaugeMetricFamily(
            "sotto_run", "The run that is on; always 1.", labels=["run", "task", "plan"]
        )
        about.add_metric([status.run, status.task, status.plan], 1)
        yield about
        yield _gauge("sotto_round", "That is on, or the last one.", status.round)
        yield _gauge("sotto_plan_rounds", "Of the plan.", status.rounds)
        yield _gauge("sotto_min_holders", "Updates that a round needs.", status.min_holders)
        yield _gauge(
            "sotto_round_age_seconds", "Since the last round was over.", status.round_seconds
        )
        holders = GaugeMetricFamily("sotto_holders", "Holders by state.", labels=["state"])
        for state, count in status.counted().items():
            holders.add_metric([state], count)
        yield holders
        behind = GaugeMetricFamily(
            "sotto_missed_rounds_in_a_row", "Up to the last round.", labels=["holder"]
        )
        for holder in status.holders:
            if holder.enrolled:
                behind.add_metric([holder.name], holder.missed_in_a_row)
        yield behind
        for field, (name, meaning) in _TRAFFIC.items():
            yield CounterMetricFamily(name, meaning, value=getattr(status.traffic, field))
        yield CounterMetricFamily(
            "sotto_reconnections", "Of holders that were here before.", value=status.reconnections
        )


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)
