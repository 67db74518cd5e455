"""A run of `sotto serve` with four honest holders, without and with a thousand hostile connections.

    python benchmarks/hostile.py --json -
    python benchmarks/hostile.py --connections 200 --rounds 10 --json -

All processes are real and on this machine. Strangers of every kind (``tests/hostile.py``) hold a
thousand connections between them and come back when they are thrown out; a third of those that
show a certificate show a revoked one of the right federation. Two holders on the roster break the
contract of the link in every round. The run has to finish with all of the honest holders in every
round. Peak memory is the coordinator's, as the kernel counts it (VmHWM).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import grpc

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.link import federation_pb2 as pb
from common.link.channels import channel_options
from common.link.federation_pb2_grpc import FederationStub
from common.link.keys import CoordinatorKeys, HolderKeys
from common.link.tls import channel_credentials
from common.link.versions import NEWEST
from tests.hostile import STRANGERS, Crowd, Target
from tests.integration.federation import Federation, wait_for_words
from tests.integration.processes import Process, wait_until

HONEST = 4
INSIDERS = ("insider-1", "insider-2")
PATIENCE = 900.0  # seconds for a whole run


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        seconds: of each round.
        accepted: updates of honest holders in each round.
        peak: of the coordinator's memory, in bytes.
        log_bytes: that it wrote to its terminal.
        attempts: of strangers, by kind.
    """

    seconds: list[float]
    accepted: list[int]
    peak: int
    log_bytes: int
    attempts: dict[str, int]

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rounds": len(self.seconds),
            "round_median_s": round(statistics.median(self.seconds), 4),
            "round_max_s": round(max(self.seconds), 4),
            "accepted_fewest": min(self.accepted),
            "coordinator_peak_mb": round(self.peak / 2**20, 1),
            "coordinator_log_bytes": self.log_bytes,
            "hostile_connections": sum(self.attempts.values()),
            "by_kind": self.attempts,
        }


def measure(folder: Path, rounds: int, connections: int) -> Outcome:
    """One run, with so many hostile connections at a time."""
    federation = Federation(folder)
    names = [f"clinic-{number}" for number in range(1, HONEST + 1)]
    federation.enrol(*names)
    keys = CoordinatorKeys.load(federation.coordinator)
    attackers = _attackers(folder, keys)
    with ExitStack() as stack:
        serve = stack.enter_context(
            federation.serve(
                *("--rounds", rounds, "--min-holders", HONEST, "--holders", HONEST),
                *("--evaluate", "never", "--round-deadline", 120),
            )
        )
        wait_for_words(serve, "listening")
        counts = (
            stack.enter_context(_attack(federation.port, attackers, connections))
            if connections
            else {}
        )
        for name in names:
            stack.enter_context(
                federation.join(name, "--holders", HONEST, "--budget", 1000, "--quiet")
            )
        peak = _follow(serve)
    lines = federation.rounds()
    accepted = [sum(name in names for name in line["accepted"]) for line in lines]
    seconds = [float(line["seconds"]) for line in lines]
    return Outcome(seconds, accepted, peak, serve.log.stat().st_size, dict(counts))


def _follow(serve: Process) -> int:
    """Wait for the run's end; returns the most memory that the coordinator had."""
    peak = [0]

    def ended() -> bool:
        # A process that has just ended has no such line.
        status = Path(f"/proc/{serve.handle.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("VmHWM"):
                peak[0] = max(peak[0], int(line.split()[1]) * 1024)
        return serve.handle.poll() is not None

    wait_until(ended, "the end of the run", timeout=PATIENCE)
    assert serve.wait(0) == 0, serve.last_words()
    return peak[0]


# -- the attack ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attackers:
    """Who has which keys.

    Args:
        revoked: of a holder that was on the roster.
        foreign: of a holder of another federation.
        insiders: of holders on the roster.
    """

    revoked: HolderKeys
    foreign: HolderKeys
    insiders: tuple[HolderKeys, ...]


def _attackers(folder: Path, keys: CoordinatorKeys) -> Attackers:
    def enrolled(coordinator: CoordinatorKeys, name: str) -> HolderKeys:
        state = folder / name
        return HolderKeys.install(state, coordinator.approve(HolderKeys.request(state, name)))

    other = CoordinatorKeys.create_or_load(folder / "other-federation")
    revoked = enrolled(keys, "revoked")
    insiders = tuple(enrolled(keys, name) for name in INSIDERS)
    keys.revoke("revoked")
    return Attackers(revoked, enrolled(other, "foreign"), insiders)


@contextmanager
def _attack(port: int, attackers: Attackers, connections: int) -> Iterator[dict[str, int]]:
    """Until the block ends, from a process of its own; the counts are complete after that."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    results: multiprocessing.Queue[dict[str, int]] = context.Queue()
    arguments = (port, attackers, connections, stop, results)
    process = context.Process(target=_rage, args=arguments, daemon=True)
    process.start()
    counts: dict[str, int] = {}
    try:
        assert results.get(timeout=PATIENCE) == {}, "the attack has begun"
        yield counts
    finally:
        stop.set()
        counts |= results.get(timeout=PATIENCE)
        process.kill()  # gRPC's threads may wait for a stream that is gone
        process.join()


def _rage(
    port: int,
    attackers: Attackers,
    connections: int,
    stop: Event,
    results: multiprocessing.Queue[dict[str, int]],
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * connections + 256), hard))
    insiders = Counter[str]()
    for keys in attackers.insiders:
        arguments = (port, keys, stop, insiders)
        threading.Thread(target=_insider, args=arguments, daemon=True).start()
    crowds = (
        Crowd(Target.of(port, attackers.foreign), 2 * connections // 3),
        Crowd(Target.of(port, attackers.revoked), connections - 2 * connections // 3),
    )

    async def rage() -> None:
        tasks = [asyncio.create_task(crowd.rage()) for crowd in crowds]
        while sum(sum(crowd.attempts.values()) for crowd in crowds) < connections:
            await asyncio.sleep(0.1)
        results.put({})
        while not stop.is_set():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(rage())
    attempts: Counter[str] = Counter()
    for crowd in crowds:
        attempts += crowd.attempts
    results.put(dict(attempts + insiders))


def _insider(port: int, keys: HolderKeys, stop: Event, counts: Counter[str]) -> None:
    """Join, wait to be asked, answer with something that breaks the contract, and again."""
    nuisances = (_oversized, _unasked, _tiny_chunks)
    while not stop.is_set():
        nuisance = nuisances[sum(counts.values()) % len(nuisances)]
        counts[f"insider{nuisance.__name__}"] += 1
        channel = grpc.secure_channel(
            f"127.0.0.1:{port}", channel_credentials(keys), options=channel_options()
        )
        frames = _Frames(nuisance)
        with suppress(grpc.RpcError), channel:
            for frame in FederationStub(channel).Join(iter(frames)):
                if frame.HasField("header"):
                    frames.asked(frame.header.message_id)
        frames.asked("")
        time.sleep(0.2)


class _Frames:
    """The frames of an insider: Hello, and once it was asked, those of a nuisance."""

    def __init__(self, nuisance: Any) -> None:
        self._nuisance = nuisance
        self._asked = threading.Event()
        self._message_id = ""

    def asked(self, message_id: str) -> None:
        """A request has come, or with an empty id, none will any more."""
        self._message_id = message_id
        self._asked.set()

    def __iter__(self) -> Iterator[pb.HolderFrame]:
        yield pb.HolderFrame(hello=pb.Hello(protocol=NEWEST))
        self._asked.wait()
        if self._message_id:
            yield from self._nuisance(self._message_id)


def _oversized(message_id: str) -> Iterator[pb.HolderFrame]:
    yield pb.HolderFrame(header=pb.Header(reply_to=message_id, payload_bytes=1 << 40))


def _unasked(message_id: str) -> Iterator[pb.HolderFrame]:
    for number in range(1000):
        yield pb.HolderFrame(header=pb.Header(reply_to=f"{number} is not {message_id}"))
    yield from _oversized(message_id)


def _tiny_chunks(message_id: str) -> Iterator[pb.HolderFrame]:
    yield pb.HolderFrame(header=pb.Header(reply_to=message_id, payload_bytes=10_000))
    for offset in range(10_000):
        yield pb.HolderFrame(chunk=pb.Chunk(offset=offset, data=b"x"))


# -- the program -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=1000, help="hostile, at the same time")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="write there; - for standard output")
    options = parser.parse_args()
    outcomes = {}
    for name, connections in (("quiet", 0), ("attacked", options.connections)):
        with tempfile.TemporaryDirectory(prefix="sotto-hostile-") as folder:
            outcomes[name] = measure(Path(folder), options.rounds, connections)
    document = {
        "connections": options.connections,
        "kinds_of_strangers": list(STRANGERS),
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        **{name: outcome.document() for name, outcome in outcomes.items()},
    }
    text = json.dumps(document, indent=2)
    if options.json and options.json != "-":
        Path(options.json).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
