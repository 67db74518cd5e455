"""`sotto stats` as the coordinator of real holders: paid, once, and only where it is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.policy import Policy
from client.policy_file import add_policy, policy_path
from common.privacy.accounting import epsilon
from common.privacy.ledger import Budget
from common.statistics_plan import statistics_plan_for
from common.tasks import load
from tests.integration.federation import (
    CLINICS,
    DATA_SET,
    SOURCE,
    Federation,
    end,
    ended,
    wait_for_words,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TASK, COLUMNS, PRICE = "medical-diagnosis", ("mean radius", "diagnosis"), 4.0
SILENT, DELTA = "clinic-3", 1e-4


def allow(federation: Federation, name: str) -> None:
    """The policy that people write: a budget, and statistics for those who let them leave."""
    rules = Policy(
        data_set=DATA_SET,
        budget=Budget(10.0, DELTA),
        size_class=100,
        statistics=name in CLINICS,
    )
    add_policy(policy_path(federation.holder(name)), rules)


def test_holders_that_allow_it_tell_statistics_once_and_the_others_are_named(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS, SILENT)
    for name in (*CLINICS, SILENT):
        allow(federation, name)
    command = (
        "stats", TASK, "--source", SOURCE, "--state", federation.coordinator, "--listen",
        f"127.0.0.1:{federation.port}", "--columns", ",".join(COLUMNS), "--epsilon", PRICE,
    )  # fmt: skip
    with federation.start(*command) as first:
        wait_for_words(first, "Waiting for at least 2 holders")
        with federation.join(CLINICS[0]) as willing, federation.join(SILENT) as unwilling:
            assert ended(first, willing, unwilling) == 3, first.output
            end(unwilling)
            assert f"{SILENT}: declined: statistics" in first.output
            with federation.start(*command) as second, federation.join(CLINICS[1]) as other:
                assert ended(second, willing, other) == 0, second.output
            end(willing)

    (folder,) = (federation.coordinator / "statistics").iterdir()  # it went on under its name
    written = json.loads((folder / "statistics.json").read_text())
    assert (folder / "report.html").exists()
    assert not written["simulated"]
    assert written["holders"] == list(CLINICS)
    assert set(written["statistics"]["columns"]) == set(COLUMNS)

    plan = statistics_plan_for(load(TASK, SOURCE), PRICE, columns=COLUMNS)
    assert not federation.account(SILENT).releases
    for name in CLINICS:
        account = federation.account(name)
        assert dict(account.releases) == {f"{folder.name}.statistics/000001": 1}, (
            "asked twice, charged once"
        )
        assert account.epsilon == epsilon(plan.composition(), DELTA)
