"""Faults in mid run: real processes with mutual TLS and proxies, and the books afterwards.

Holders are seeded, so that a run that was disturbed must end with the bits of one that was not.
"""

from __future__ import annotations

import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from tests.faults.network import until
from tests.faults.proxy import Proxy, Way
from tests.faults.world import COORDINATOR, World
from tests.integration.federation import Account
from tests.integration.processes import Process, free_port

PAIR = ("clinic-1", "clinic-2")
THREE = (*PAIR, "clinic-3")
POLICY = {"budget": {"epsilon": 8.0, "delta": 1e-4}}
ROUNDS = 40
SHORT_DEADLINE = 1.5  # seconds
LATENCY = 0.01  # seconds each way, so that a run lasts long enough to be disturbed


@dataclass(frozen=True)
class Books:
    """What a run left: everything that must not depend on the network.

    Args:
        parameters: of the model, to the last bit.
        releases: holder → round → how often it was charged.
        states: holder → state → entries of its ledger.
        epsilon: holder → of everything it ever released.
    """

    parameters: bytes
    releases: Mapping[str, Mapping[str, int]]
    states: Mapping[str, Mapping[str, int]]
    epsilon: Mapping[str, float]

    @classmethod
    def of(cls, world: World) -> Books:
        """Read them; the processes have ended."""
        accounts = {name: world.federation.account(name) for name in world.names}
        return cls(
            world.parameters().tobytes(),
            {name: _by_round(account) for name, account in accounts.items()},
            {name: dict(account.states) for name, account in accounts.items()},
            {name: account.epsilon for name, account in accounts.items()},
        )


def _by_round(account: Account) -> dict[str, int]:
    """Request ids begin with the run's, which differs from run to run."""
    return {key.partition("/")[2]: times for key, times in account.releases.items()}


@cache
def undisturbed() -> Books:
    """What a run of the pair leaves when nothing happens."""
    with tempfile.TemporaryDirectory() as folder, World(Path(folder), PAIR, policy=POLICY) as world:
        _serve(world)
        for name in PAIR:
            world.join(name)
        _end(world)
        return Books.of(world)


def _serve(world: World, *flags: object) -> None:
    world.serve(
        "--rounds", ROUNDS, "--epsilon", 3, "--min-holders", 2, "--evaluate", "never", *flags
    )  # fmt: skip


def _end(world: World) -> None:
    assert world.end_of(COORDINATOR) == 0
    world.leave()


@contextmanager
def _disturbed(folder: Path, proxies: Mapping[str, Proxy] | None = None) -> Iterator[World]:
    """A run of the pair in its third round, which must end as the undisturbed one.

    Args:
        folder: for it.
        proxies: holder → its way to the coordinator; None for straight there.
    """
    expected = undisturbed()
    with World(folder, PAIR, policy=POLICY) as world:
        for proxy in (proxies or {}).values():
            proxy.move(("127.0.0.1", world.federation.port))
            proxy.slow(delay=LATENCY)
        _serve(world)
        for name in PAIR:
            server = f"127.0.0.1:{proxies[name].port if proxies else world.federation.port}"
            world.join(name, server=server)
        _wait_for_round(world, 3)
        yield world
        _end(world)
        assert Books.of(world) == expected


def _wait_for_round(world: World, number: int) -> None:
    until(lambda: len(world.rounds()) >= number, f"round {number}")


def _next_round(world: World) -> float:
    """Wait until one more round is done; the seconds that took."""
    begin, before = time.monotonic(), len(world.rounds())
    _wait_for_round(world, before + 1)
    return time.monotonic() - begin


@contextmanager
def _proxies(*names: str) -> Iterator[dict[str, Proxy]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Proxy(None, seed=k)) for k, name in enumerate(names)}


def restarted(folder: Path, outage: float = 0.5) -> float:
    """The coordinator is killed and comes back at its address."""
    with _disturbed(folder) as world:
        return _restart(world, outage)


def moved(folder: Path, outage: float = 1.0) -> float:
    """The coordinator comes back on another machine, behind a load balancer that stays."""
    with _proxies(*PAIR) as proxies, _disturbed(folder, proxies) as world:
        elsewhere = free_port()
        for proxy in proxies.values():
            proxy.move(("127.0.0.1", elsewhere))
        return _restart(world, outage, elsewhere)


def _restart(world: World, outage: float, port: int | None = None) -> float:
    """Kill the coordinator and start it again; seconds from when it listens to its next round."""
    world.kill(COORDINATOR)
    time.sleep(outage)
    if port is not None:
        world.federation = replace(world.federation, port=port)
    _serve(world)
    until(lambda: _accepts(world.federation.port), "the coordinator")
    return _next_round(world)


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def partition_of_all(folder: Path) -> float:
    """Every holder is cut off in silence for a while."""
    with _proxies(*PAIR) as proxies, _disturbed(folder, proxies) as world:
        for proxy in proxies.values():
            proxy.freeze()
        time.sleep(1.0)
        for proxy in proxies.values():
            proxy.thaw()
        return _next_round(world)


def partition_of_one(folder: Path) -> float:
    """One holder hears the coordinator and is not heard, for longer than the deadline."""
    lost = THREE[2]
    with _proxies(*THREE) as proxies, World(folder, THREE, policy=POLICY) as world:
        for proxy in proxies.values():
            proxy.move(("127.0.0.1", world.federation.port))
            proxy.slow(delay=LATENCY)
        _serve(world, "--round-deadline", SHORT_DEADLINE)
        for name in THREE:
            world.join(name, server=f"127.0.0.1:{proxies[name].port}")
        _wait_for_round(world, 3)
        proxies[lost].freeze(Way.UP)
        until(lambda: _unheard(world, lost), "a round without it")
        proxies[lost].thaw()
        begin, before = time.monotonic(), len(world.rounds())
        until(
            lambda: any(lost in line["accepted"] for line in world.rounds()[before:]), "its return"
        )
        seconds = time.monotonic() - begin
        _end(world)
        assert "dropped a reply" in world.said(COORDINATOR)
        # What was dropped had left the holder, and has its price like what counted.
        asked = [line["round"] for line in world.rounds() if lost in line["accepted"]]
        asked += _unheard(world, lost)
        charged = {f"{number:06d}": 1 for number in asked}
        assert Books.of(world).releases[lost] == charged
        return seconds


def _unheard(world: World, name: str) -> list[int]:
    """The rounds that were closed without the reply of a holder that was asked."""
    return [line["round"] for line in world.rounds() if "no reply" in line["missed"].get(name, "")]


def resets_all_along(folder: Path, seed: int = 0) -> float:
    """Every connection is reset again and again, after some thousand bytes."""
    chance = random.Random(seed)
    with _proxies(*PAIR) as proxies, _disturbed(folder, proxies) as world:
        coordinator, cuts = world.processes[COORDINATOR], 0
        while coordinator.handle.poll() is None:
            way, count = chance.choice(list(Way)), chance.randrange(2_000, 6_000)
            cuts += _cut_once(proxies[chance.choice(PAIR)], way, count, coordinator)
        assert cuts > 5
        return max(line["seconds"] for line in world.rounds()[3:])


def _cut_once(proxy: Proxy, way: Way, count: int, coordinator: Process) -> bool:
    """Reset one connection after so many bytes; whether the run lasted until then."""

    def over() -> bool:
        return coordinator.handle.poll() is not None

    until(lambda: over() or proxy.standing, "a connection")
    proxy.cut_after(way, count)
    until(lambda: over() or not proxy.standing, "a cut")
    return not over()


@contextmanager
def _by_http(folder: Path) -> Iterator[tuple[World, Proxy]]:
    """A run of the pair, which has no other way than an HTTP proxy, in its third round."""
    expected = undisturbed()
    with Proxy(None) as proxy, World(folder, PAIR, policy=POLICY) as world:
        proxy.slow(delay=LATENCY)
        _serve(world)
        for name in PAIR:
            world.join(name, faults=[partial(by_http_proxy, proxy.port)])
        _wait_for_round(world, 3)
        assert proxy.standing == len(PAIR)
        yield world, proxy
        _end(world)
        assert Books.of(world) == expected


def http_proxy_restarted(folder: Path, outage: float = 1.0) -> float:
    """The HTTP proxy is gone for a while."""
    with _by_http(folder) as (world, proxy):
        proxy.refuse()
        proxy.cut()
        time.sleep(outage)
        proxy.listen()
        return _next_round(world)


def restarted_behind_http_proxy(folder: Path, outage: float = 1.0) -> float:
    """The coordinator is killed and comes back; meanwhile the HTTP proxy says 502."""
    with _by_http(folder) as (world, _):
        return _restart(world, outage)


def by_http_proxy(port: int) -> None:
    """Have gRPC in this process connect through an HTTP proxy on this machine."""
    os.environ.update(https_proxy=f"http://127.0.0.1:{port}", no_proxy="", no_grpc_proxy="")
    os.environ.pop("grpc_proxy", None)
