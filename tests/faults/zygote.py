"""What a process of these tests has imported when it begins; see :mod:`tests.faults.forked`.

Only multiprocessing's fork server imports this module, once, and then forks a process for every
start. Forking is safe there, because what must not be carried across a fork has only been imported
and never used:

* torch and the linear algebra under it compute in the calling thread, with one thread; no operation
  has run, so that neither a pool of threads nor autograd's engine exists yet;
* gRPC begins its threads with the first channel or server, and none has been made;
* pyarrow's allocator (jemalloc) has a thread of its own, and stops and restarts it around a fork;
* no file of a run, socket or ledger is open.

The last lines make sure of the threads.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it
os.environ["COLUMNS"] = "200"  # rich breaks no line that a test looks for

for _name in (
    "sotto.cli",  # first: it tells gRPC and Flower to be quiet, which they read once
    "client.app",
    "client.node",
    "client.secure",
    "common.tasks.medical_diagnosis",
    "matplotlib.figure",
    "pytest",
    "server.app",
    "server.grid",
    "server.runs",
    "simulations.results",
    "sklearn.datasets",
    "sotto.join",
    "sotto.keys_report",
    "sotto.report",
    "sotto.resident",
    "sotto.serve",
    "tests.faults.holder",
    "tests.mutants",
    "torch._dynamo",  # torch imports it with the first optimizer: over a second
):
    import_module(_name)

_ALLOWED = {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}
for _thread in Path("/proc/self/task").iterdir():
    assert (_thread / "comm").read_text().strip() in _ALLOWED, "not safe to fork"
