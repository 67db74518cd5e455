"""A federation of processes, none of which can unpickle, does everything it otherwise does."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from client.policy import Policy
from client.policy_file import add_policy, policy_path
from common.privacy.ledger import Budget
from common.tasks import load
from tests.integration.federation import CLINICS, DATA_SET, SOURCE, Federation, end, ended

ROOT = Path(__file__).parents[2]
ROUNDS = 2
KINDS = (".csv", ".parquet")
START = """\
import pathlib
from tests.unpickling import forbid
forbid(pathlib.Path({log!r}))
"""
"""Python runs a module of the name ``sitecustomize`` before anything else."""


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where every Python that is started notes that it is watched, and that it unpickles."""
    log = tmp_path / "unpickling.log"
    (tmp_path / "sitecustomize.py").write_text(START.format(log=str(log)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    return log


@pytest.mark.parametrize(
    "attempt",
    [
        "pickle.loads(pickle.dumps(1))",
        "pickle.Unpickler(io.BytesIO(b'N.')).load()",
        "np.load(io.BytesIO(objects), allow_pickle=True)",
        # One that somebody kept from before is noticed too, by what it looks up.
        "next(c for c in object.__subclasses__() if c.__name__ == 'Unpickler'"
        " and c.__module__ == '_pickle')(io.BytesIO(pickle.dumps(print))).load()",
    ],
)
def test_a_process_that_unpickles_is_stopped_and_noticed(log: Path, attempt: str) -> None:
    prepared = (
        "import io, pickle, numpy as np; file = io.BytesIO(); "
        "np.save(file, np.array([print], dtype=object), allow_pickle=True); "
        "objects = file.getvalue(); "
    )
    done = subprocess.run([sys.executable, "-c", prepared + attempt], capture_output=True)
    assert done.returncode == 1
    assert b"this process must not unpickle" in done.stderr
    assert log.read_text().splitlines()[-1] == "unpickled"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_federation_needs_no_unpickling(log: Path, tmp_path: Path) -> None:
    """CSV and Parquet; certificates, policy, plan, updates, histograms, ledgers, checkpoints."""
    federation = Federation(tmp_path)
    federation.enrol(*CLINICS)
    tables = load("medical-diagnosis", SOURCE).source.tables()
    files = {name: tmp_path / f"{name}{kind}" for name, kind in zip(CLINICS, KINDS, strict=True)}
    tables[CLINICS[0]].to_csv(files[CLINICS[0]], index=False)
    tables[CLINICS[1]].to_parquet(files[CLINICS[1]], index=False)
    rules = Policy(
        data_set=DATA_SET, budget=Budget(20.0, 1e-4), size_class=100, evaluation="histogram"
    )
    for name in CLINICS:
        add_policy(policy_path(federation.holder(name)), rules)
    with ExitStack() as stack:
        holders = [
            stack.enter_context(federation.join(name, "--data", file))
            for name, file in files.items()
        ]
        asked = ("--rounds", ROUNDS, "--evaluate", "final", "--evaluation-epsilon", 8)
        coordinator = stack.enter_context(federation.serve(*asked))
        assert ended(coordinator, *holders) == 0, coordinator.last_words()
        assert [end(holder) for holder in holders] == [0, 0]
    assert [len(line["accepted"]) for line in federation.rounds()] == [2] * ROUNDS
    assert federation.rounds()[-1]["evaluation"]
    notes = log.read_text().splitlines()
    assert set(notes) == {"watched"}
    assert len(notes) >= len(holders) + 1
