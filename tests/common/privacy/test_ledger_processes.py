"""Several processes on one ledger: what SQLite's locks and our transactions owe each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common.privacy.accounting import epsilon
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Ledger

DELTA = 1e-5
STEP = SubsampledGaussian(1.0, 10.0, 1)
ALLOWED = 20

# Reserves until it is refused; dies without closing, half of the time without committing.
SPENDER = f"""
import os, sys
from typing import get_args
from common.errors import BudgetExceeded
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Kind, Ledger, Release

path, name, limit = sys.argv[1], sys.argv[2], float(sys.argv[3])
step = SubsampledGaussian({STEP.sampling_rate}, {STEP.noise_multiplier}, {STEP.steps})
ledger = Ledger.open(path)
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    kind = get_args(Kind)[number % 4]
    release = Release(
        f"{{name}}/{{number}}", "shared", "task", "someone", name, "plan", number, step, kind
    )
    try:
        ledger.reserve(release, Budget(limit, {DELTA}), Composition.of(step))
    except BudgetExceeded:
        break
    print("reserved", flush=True)
    if number % 2:
        ledger.commit(release.request_id, "digest")
os._exit(0)
"""


# Forks four holders again and again and kills them at random instants, most of them at work. A
# holder does as client/holder.py: reserve, store the reply whole, commit, send. What it sends
# is a line in a file, with the reply that it has stored.
BUTCHER = f"""
import os, random, signal, sys, time
from pathlib import Path
from common.errors import BudgetExceeded, StateError
from common.privacy.events import Composition, SubsampledGaussian
from common.privacy.ledger import Budget, Ledger, Release

folder, limit = Path(sys.argv[1]), float(sys.argv[2])
kinds = {{
    "update": SubsampledGaussian(1.0, 10.0, 2),
    "evaluation": SubsampledGaussian(1.0, 20.0, 1),
    "statistics": SubsampledGaussian(1.0, 15.0, 1),
}}

def stored(request):
    path = folder / request
    return path.read_text() if path.exists() else None

def store(request, reply):
    part = folder / f"{{os.getpid()}}.part"
    part.write_text(reply)
    part.rename(folder / request)

def work(name):
    sent = os.open(folder / "sent", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    ledger = Ledger.open(folder / "ledger.sqlite")
    ledger.resolve(stored)
    for number in range(1000):
        kind = sorted(kinds)[number % 3]
        request, event = f"{{name}}-{{number}}", kinds[kind]
        known = ledger.find(request)
        if known is None or known.state == "reserved":
            release = Release(
                request, "shared", "task", "hub", name, "plan", number, event, kind
            )
            try:
                ledger.reserve(release, Budget(limit, {DELTA}), Composition.of(event))
            except BudgetExceeded:
                break
            store(request, os.urandom(8).hex())
            ledger.commit(request, stored(request))
        os.write(sent, f"{{request}} {{stored(request)}}\\n".encode())

def lines():
    path = folder / "sent"
    return path.read_text().count("\\n") if path.exists() else 0

random.seed(20)
killed, patience = 0, 0.02
while (killed < 40 or lines() < 40) and patience < 10:
    before, children = lines(), []
    for name in "abcd":
        child = os.fork()
        if child == 0:
            try:
                work(name)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        time.sleep(random.uniform(0.0, patience))
        os.kill(child, signal.SIGKILL)
    killed += sum(os.waitpid(child, 0)[1] == signal.SIGKILL for child in children)
    # On a slow machine they need longer to get anywhere; the budget's end is not what is tested.
    patience *= 1.3 if lines() == before else 1.0
print(killed)
"""


@pytest.mark.slow
def test_eight_processes_at_once_never_pass_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    limit = epsilon(Composition.of(STEP) * ALLOWED, DELTA)
    Ledger.open(path).close()
    spenders = [
        subprocess.Popen(
            [sys.executable, "-c", SPENDER, str(path), f"spender-{number}", str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    # All are up and wait before the first may begin.
    for spender in spenders:
        assert spender.stdout is not None
        assert spender.stdout.readline() == "ready\n"
    for spender in spenders:
        assert spender.stdin is not None
        spender.stdin.write("go\n")
        spender.stdin.flush()
    granted = [spender.communicate()[0].count("reserved") for spender in spenders]

    assert [spender.returncode for spender in spenders] == [0] * 8
    # Neither more than the budget, nor less: no grant was lost between file and process.
    assert sum(granted) == ALLOWED
    with Ledger.open(path) as ledger:
        assert ledger.composition("shared") == Composition.of(STEP) * ALLOWED
        assert ledger.epsilon("shared", DELTA) <= limit
        ledger.verify()


@pytest.mark.slow
def test_holders_that_are_killed_at_any_instant_send_nothing_unaccounted_or_twice(
    tmp_path: Path,
) -> None:
    limit = epsilon(Composition.of(STEP) * 4000, DELTA)
    butcher = subprocess.run(
        [sys.executable, "-c", BUTCHER, str(tmp_path), str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert butcher.stderr == ""
    # Control: enough of them died, and enough was sent, for the rest to mean something.
    assert int(butcher.stdout) >= 40
    sent = {tuple(line.split()) for line in (tmp_path / "sent").read_text().splitlines()}
    assert sent
    assert len({request for request, _ in sent}) == len(sent), "one price, two replies"
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        for request, reply in sent:
            found = ledger.find(request)
            assert found is not None
            assert (found.state, found.reply_digest) == ("committed", reply)
        assert ledger.epsilon("shared", DELTA) <= limit
        ledger.verify()
