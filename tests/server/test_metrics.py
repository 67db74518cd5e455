from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from common.link.keys import CoordinatorKeys
from common.link.traffic import Traffic
from server.metrics import CoordinatorMetrics
from tests.linking import enrol
from tests.server.watching import Looked, summary, watch

ROOT = Path(__file__).parents[2]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(metrics: CoordinatorMetrics) -> Samples:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def metrics_in_the_document(heading: str) -> dict[str, str]:
    """Name → type, from a table of docs/operate.md."""
    text = (ROOT / "docs" / "operate.md").read_text().partition(heading)[2].partition("\n##")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE))


def test_rounds_are_counted_as_they_end() -> None:
    metrics = CoordinatorMetrics(watch(Looked()).status)
    metrics.note(summary(1, "north", south="no reply within 5 s"))
    metrics.note(summary(2, south="declined: budget: 0.1 is left"))

    found = samples(metrics)
    assert found["sotto_rounds_total", (("outcome", "completed"),)] == 2
    assert found["sotto_rounds_total", (("outcome", "lost"),)] == 0
    assert found["sotto_updates_accepted_total", ()] == 1
    assert found["sotto_updates_missed_total", (("reason", "silent"),)] == 1
    assert found["sotto_updates_missed_total", (("reason", "declined"),)] == 1
    assert found["sotto_round_seconds_sum", ()] == 1.0
    assert found["sotto_round_phase_seconds_count", (("phase", "exchange"),)] == 2
    assert found["sotto_round_phase_seconds_count", (("phase", "evaluate"),)] == 0


def test_the_rest_is_the_status() -> None:
    grid = Looked(traffic=Traffic(3, 4, 5, 6, 7, 8, 9))
    grid.join("north")
    grid.leave("south", 0.0)

    found = samples(CoordinatorMetrics(watch(grid).status))
    assert found["sotto_holders", (("state", "connected"),)] == 1
    assert found["sotto_holders", (("state", "away"),)] == 1
    assert found["sotto_holders", (("state", "revoked"),)] == 0
    assert (found["sotto_round", ()], found["sotto_plan_rounds", ()]) == (1, 4)
    assert found["sotto_sent_bytes_total", ()] == 3
    assert found["sotto_received_bytes_total", ()] == 4
    assert found["sotto_replies_dropped_total", ()] == 7
    assert found["sotto_reconnections_total", ()] == 6
    assert found["sotto_connections_refused_total", ()] == 9


def test_only_names_on_the_roster_are_labels(tmp_path: Path) -> None:
    keys = CoordinatorKeys.create_or_load(tmp_path / "coordinator")
    enrol(tmp_path / "north", keys, "north")
    grid = Looked()
    grid.join("north", *(f"stranger-{number}" for number in range(50)))
    seen = watch(grid, roster=keys.roster)
    seen.note(summary(1, north="no reply within 5 s"))

    found = samples(CoordinatorMetrics(seen.status))
    behind = {labels: value for (name, labels), value in found.items() if "in_a_row" in name}
    assert behind == {(("holder", "north"),): 1}


def test_new_rounds_reasons_and_phases_make_no_new_series() -> None:
    metrics = CoordinatorMetrics(watch(Looked()).status)
    before = samples(metrics).keys()
    for number in range(1, 20):
        metrics.note(summary(number, f"holder-{number}", **{f"x{number}": f"reason {number}"}))

    assert samples(metrics).keys() == before


def test_two_of_them_do_not_share_a_registry() -> None:
    one, other = (CoordinatorMetrics(watch(Looked()).status) for _ in range(2))
    one.note(summary(1, "north"))

    assert samples(other)["sotto_updates_accepted_total", ()] == 0


def test_names_follow_the_conventions_and_are_documented() -> None:
    text = CoordinatorMetrics(watch(Looked()).status).text().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    own = {name: kind for name, kind in kinds.items() if name.startswith("sotto_")}
    assert metrics_in_the_document("### Of the coordinator") == {
        name: kind for name, kind in own.items() if not name.endswith("_created")
    }
    for name, kind in kinds.items():
        assert name.startswith(("sotto_", "process_")), name
        assert re.fullmatch(r"[a-z_]+", name), name
        assert (kind == "counter") == name.endswith("_total"), name
