"""A run as the people who operate it see it: status, logs, metrics, probes and exit codes."""

from __future__ import annotations

import json
import signal
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from prometheus_client.parser import text_string_to_metric_families

from common.errors import RunError
from server.link.operations import ask
from tests.integration.federation import (
    CLINICS,
    PATIENCE,
    Federation,
    end,
    ended,
    lines,
    sotto,
)
from tests.integration.processes import Process, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JSON = ("--log-format", "json")
ROUNDS = 30


def events(running: Process, *names: str) -> list[dict[str, Any]]:
    """Events in a process's log, every line of which must be JSON."""
    return [line for line in lines(running.log) if not names or line["event"] in names]


def wait_for_event(running: Process, name: str, *others: Process) -> dict[str, Any]:
    found = wait_until(
        lambda: events(running, name), f"{name} of {running.name}",
        timeout=PATIENCE, watching=[running, *others],
    )  # fmt: skip
    return found[0]


def samples(address: str) -> dict[tuple[str, str], float]:
    """Name and last label → value."""
    with urllib.request.urlopen(address, timeout=PATIENCE) as response:
        families = text_string_to_metric_families(response.read().decode())
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in families
        for sample in family.samples
    }


def status_of(federation: Federation) -> dict[str, Any]:
    found = json.loads(sotto("status", "--state", federation.coordinator, "--json", "-"))
    assert isinstance(found, dict)
    return found


def seen(federation: Federation) -> dict[str, str]:
    """Holder → state, without the time that another process takes to begin."""
    return {holder.name: holder.state for holder in ask(federation.coordinator).holders}


def test_a_run_is_watched_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS, "clinic-3")
    north, south = CLINICS
    with ExitStack() as processes:
        serve = processes.enter_context(
            federation.serve(
                "--rounds", ROUNDS, "--min-holders", 2, "--epsilon", 2, *JSON,
                "--round-deadline", PATIENCE, "--metrics", 0, "--health", "127.0.0.1:0",
            )
        )  # fmt: skip
        pages = {serve: wait_for_event(serve, "metrics")["address"]}
        health = wait_for_event(serve, "health")["address"]
        probes = processes.enter_context(grpc.insecure_channel(health))
        anything = health_pb2.HealthCheckRequest()
        assert HealthStub(probes).Check(anything, timeout=PATIENCE).status == 1

        waiting = ask(federation.coordinator)
        assert (waiting.phase, waiting.round, waiting.rounds) == ("waiting", 1, ROUNDS)
        assert seen(federation) == dict.fromkeys((*CLINICS, "clinic-3"), "never_joined")

        for name in CLINICS:
            holder = processes.enter_context(
                federation.join(name, "--budget", 6, "--metrics", 0, *JSON)
            )
            pages[holder] = wait_for_event(holder, "metrics", serve)["address"]
        holders = [process for process in pages if process is not serve]
        wait_for_event(serve, "round", *holders)

        holders[1].handle.send_signal(signal.SIGSTOP)  # so that the run is still on
        wait_until(lambda: seen(federation)[south] == "working", f"{south} to be waited for")
        during = status_of(federation)
        assert during["phase"] in ("asking", "evaluating")
        assert during["run"] == wait_for_event(serve, "listening")["run"]
        assert {h["name"]: h["state"] for h in during["holders"]} == {
            north: "answered",
            south: "working",
            "clinic-3": "never_joined",
        }
        assert during["traffic"]["connections"] == 2
        assert during["recent"][-1]["accepted"] == 2
        figures_now = samples(pages[serve])
        assert figures_now["sotto_rounds_total", "completed"] == during["round"] - 1
        assert figures_now["sotto_holders", "working"] == 1
        holders[1].handle.send_signal(signal.SIGCONT)

        assert ended(serve, *holders) == 0
        figures = {process: samples(pages[process]) for process in holders}
        assert [end(holder) for holder in holders] == [0, 0]

        # The logs: every line is an object, and the run can be read off them.
        rounds = events(serve, "round")
        assert [line["round"] for line in rounds] == list(range(1, ROUNDS + 1))
        assert {tuple(line["accepted"]) for line in rounds} == {(north, south)}
        assert [line["event"] for line in events(serve)][-2:] == ["guarantee", "finished"]
        for holder, name in zip(holders, CLINICS, strict=True):
            answered = [e for e in events(holder, "answered") if e["request"] == "train"]
            assert [line["round"] for line in answered] == list(range(1, ROUNDS + 1))
            assert {line["run"] for line in answered} == {during["run"]}
            assert events(holder)[-1]["event"] == "left"

            # The page says what ledger and log say.
            found = figures[holder]
            assert found["sotto_holder_requests_total", "done"] == ROUNDS
            assert found["sotto_holder_last_round", ""] == ROUNDS
            assert found["sotto_holder_phase_seconds_count", "commit"] >= ROUNDS
            spent = federation.account(name).epsilon
            assert found["sotto_holder_epsilon_spent", "default"] == pytest.approx(spent)
            assert found["sotto_holder_epsilon_left", "default"] == pytest.approx(6 - spent)
            assert answered[-1]["epsilon_spent"] == pytest.approx(spent)

    with pytest.raises(RunError, match="no coordinator runs with"):
        ask(federation.coordinator)


def test_a_run_that_fails_says_so_in_json_and_by_its_code(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    with federation.serve("--round-deadline", 0.1, *JSON) as serve:
        assert ended(serve) == 3

        last = events(serve)[-1]
        assert (last["event"], last["exit_code"], last["level"]) == ("run_failed", 3, "error")
