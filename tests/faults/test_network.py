"""Networks fail in these ways, and Sotto survives each: the table is what docs/faults.md shows.

``python benchmarks/recovery.py`` plays the same faults again and again and says how many seconds
they take; here nothing depends on the clock but patience.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from common.link import federation_pb2 as pb
from common.link.keys import CoordinatorKeys
from common.link.transfer import Beginning
from server.grid import LinkGrid
from tests.faults import link_faults, network, run_faults
from tests.faults.network import PATIENCE, NetworkFault, until
from tests.faults.proxy import Cut, Proxy, Way
from tests.linking import ask, enrol, running

ROOT = Path(__file__).parents[2]

FAULTS = (
    NetworkFault(
        "coordinator restarts",
        "kill -9 of the coordinator in mid run; nothing listens until it is back at its address",
        "the run goes on; model and ledgers are those of an undisturbed run",
        "it listens again",
        2.0,
        run_faults.restarted,
    ),
    NetworkFault(
        "coordinator moves",
        "the same behind a load balancer, which accepts and resets until it is back, elsewhere",
        "the run goes on; model and ledgers are those of an undisturbed run",
        "it listens again",
        2.0,
        run_faults.moved,
    ),
    NetworkFault(
        "resets all along",
        "connections are reset after 2 to 6 kB, again and again, during a whole run",
        "the run goes on; model and ledgers are those of an undisturbed run",
        "a reset",
        2.0,
        run_faults.resets_all_along,
    ),
    NetworkFault(
        "partition of all",
        "nothing passes for a second; nobody is told",
        "the run goes on; model and ledgers are those of an undisturbed run",
        "the partition ends",
        2.0,
        run_faults.partition_of_all,
    ),
    NetworkFault(
        "partition of one",
        "one of three holders hears and is not heard, for longer than the deadline",
        "rounds close without it and say so; it is back; its late reply is dropped, and its price "
        "stays in its ledger",
        "the partition ends",
        2.0,
        run_faults.partition_of_one,
    ),
    NetworkFault(
        "HTTP proxy restarts",
        "holders reach the coordinator through an HTTP proxy (CONNECT), which is gone for a second",
        "the run goes on; model and ledgers are those of an undisturbed run",
        "the proxy listens again",
        2.0,
        run_faults.http_proxy_restarted,
    ),
    NetworkFault(
        "coordinator restarts behind it",
        "kill -9 of the coordinator; until it is back, the HTTP proxy answers 502",
        "the run goes on; model and ledgers are those of an undisturbed run",
        "it listens again",
        2.0,
        run_faults.restarted_behind_http_proxy,
    ),
    NetworkFault(
        "reset while idle",
        "reset between two rounds",
        "the holder is back for the next round",
        "the reset",
        2.0,
        link_faults.reset_while_idle,
    ),
    NetworkFault(
        "reset within a request",
        "reset within the sixth of eight chunks of a request",
        "it goes on at that chunk",
        "the reset",
        2.0,
        link_faults.reset_within_request,
    ),
    NetworkFault(
        "reset within a reply",
        "reset within the sixth of eight chunks of a reply",
        "it goes on at that chunk; nothing is computed again",
        "the reset",
        2.0,
        link_faults.reset_within_reply,
    ),
    NetworkFault(
        "resets every three chunks",
        "no message of eight chunks gets through in one piece, either way",
        "request and reply arrive; nothing is computed again",
        "a reset, on average",
        2.0,
        link_faults.resets_again_and_again,
    ),
    NetworkFault(
        "half-open, coordinator's end left",
        "the holder's end is reset, the coordinator's is not",
        "the holder is back; its new stream replaces the dead one",
        "the reset",
        2.0,
        link_faults.holder_told,
    ),
    NetworkFault(
        "half-open, holder's end left",
        "the coordinator's end is reset, the holder's is not; keep-alive 1 s",
        "keep-alive notices; the holder is back",
        "the reset",
        4.0,
        link_faults.coordinator_told,
    ),
    NetworkFault(
        "forgotten connection",
        "a middlebox forgets the connection while a reply is due; nobody is told; keep-alive 1 s",
        "keep-alive notices; the reply arrives; nothing is computed again",
        "it is forgotten",
        4.0,
        link_faults.nobody_told,
    ),
    NetworkFault(
        "silence within a request",
        "a middlebox forgets the connection within a chunk; nobody is told; keep-alive 1 s",
        "keep-alive notices; the request goes on at that chunk",
        "it is forgotten",
        4.0,
        link_faults.silence_within_request,
    ),
    NetworkFault(
        "trickle",
        "so little bandwidth that a message takes longer than the round's deadline",
        "what moves extends the deadline; the reply counts",
        "the request; all of it is the transfer",
        10.0,
        link_faults.trickle,
    ),
    NetworkFault(
        "delay",
        "300 to 500 ms each way",
        "rounds go on over the same connection",
        "the request; most of it is the delay",
        1.5,
        link_faults.delay,
    ),
    NetworkFault(
        "idle limit, kept alive",
        "a middlebox cuts what is idle for 2 s; keep-alive 1 s; the holder computes for 4.5 s",
        "it is never cut",
        "the reply is ready",
        0.5,
        link_faults.idle_and_kept_alive,
    ),
    NetworkFault(
        "idle limit, cut",
        "a middlebox cuts what is idle for 1 s; the holder computes for 3 s",
        "the holder is back before it is done; nothing is computed again",
        "the reply is ready",
        2.0,
        link_faults.idle_and_cut,
    ),
    NetworkFault(
        "tarpit",
        "what the holder connects to accepts and never says a word; then the coordinator is back",
        "the attempt ends by itself; the holder is back",
        "the coordinator is back",
        12.0,
        link_faults.tarpit,
    ),
    NetworkFault(
        "new address",
        "the coordinator's name leads from 127.0.0.1 to ::1",
        "the holder is back",
        "it listens again",
        2.0,
        link_faults.new_address,
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_this_fault_is_survived(
    fault: NetworkFault, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    seconds = fault.play(tmp_path)
    record_property("recovered_in", round(seconds, 3))
    print(f"{fault.name}: recovered in {seconds:.2f} s, {fault.bound:g} s are promised")


CUTS = [  # bytes: within TLS's hellos, certificates and last words, HTTP/2's settings, Hello
    (way, count, cut)
    for way in Way
    for count in (1, 200, 900, 1300, 1500, 1900, 2200, 2550, 3200, 3600)
    for cut in (Cut.RESET, Cut.FIN)
]


def test_a_cut_anywhere_in_the_beginning_of_a_connection_is_not_taken_for_a_refusal(
    tmp_path: Path,
) -> None:
    coordinator = CoordinatorKeys.create_or_load(tmp_path / "coordinator", ["127.0.0.1"])
    keys = enrol(tmp_path / "a", coordinator, "a")
    with (
        LinkGrid("127.0.0.1:0", keys=coordinator) as grid,
        Proxy(("127.0.0.1", grid.port)) as proxy,
        running(proxy.port, keys=keys, host="127.0.0.1") as holder,
    ):
        for way, count, cut in CUTS:
            grid.wait_for_holders(1, PATIENCE)
            begun = len(proxy.connections)
            proxy.cut_after(way, count, cut)
            proxy.cut()
            until(lambda b=begun: len(proxy.connections) > b, "an attempt to connect")
            assert grid.send_and_receive([ask("a")], timeout=PATIENCE), (way, count, cut)
            assert holder.error is None


# The faults are real ones: a link that is a little worse does not survive them.


@pytest.mark.parametrize("play", [link_faults.reset_within_request, link_faults.reset_within_reply])
def test_a_link_that_begins_messages_again_is_noticed(
    play: Callable[[Path], float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Beginning, "named", property(lambda _: pb.Begun()))
    with pytest.raises(AssertionError, match="bytes went"):
        play(tmp_path)


def test_a_deadline_that_progress_does_not_extend_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "EXTENSIONS", 0)
    with pytest.raises(AssertionError, match="no reply came in time"):
        link_faults.trickle(tmp_path)


def test_the_documentation_lists_every_fault() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    for fault in FAULTS:
        (row,) = re.findall(rf"^\| {re.escape(fault.name)} \|.*$", text, re.MULTILINE) or [""]
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[2:6] == [fault.injected, fault.survived, fault.since, f"{fault.bound:g} s"]
