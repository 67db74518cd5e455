"""Virtual environments for the systems Sotto is measured against, and runs of scripts in them.

    from benchmarks.peer_environments import PEERS, measure_peer
    measure_peer("pfl", "--rounds", "20")["results"]

The peers pin other versions than Sotto does, so that each has an environment of its own, made
with ``python -m venv`` and pip and kept for the next time in a folder outside the repository. All
of them get the very torch that runs here: it is systems that are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["CACHE", "PEERS", "Peer", "environment", "measure_peer"]

_ROOT = Path(__file__).resolve().parents[1]

CACHE = Path(tempfile.gettempdir()) / "sotto-benchmark-peers"
"""Where the environments are when nobody says otherwise."""

_SCRIPTS = Path(__file__).resolve().parent / "peers"
_INSTALL_SECONDS = 1_800.0
_RUN_SECONDS = 1_800.0
_COMPLETE = "complete.json"


@dataclass(frozen=True)
class Peer:
    """What is run, and where.

    Args:
        script: file under ``benchmarks/peers``.
        environment: name of the environment; peers may share one.
        requirements: what pip installs there beside torch.
    """

    script: str
    environment: str
    requirements: tuple[str, ...]


_FLOWER = ("flwr[simulation]>=1.39,<1.40", "opacus>=1.6,<1.7")

PEERS: Mapping[str, Peer] = {
    "flower-ray": Peer("flower_ray.py", "flower", _FLOWER),
    "opacus-loop": Peer("opacus_loop.py", "flower", _FLOWER),
    "pfl": Peer("pfl_case.py", "pfl", ("pfl[pytorch]==0.6.0",)),
    "sotto-ray": Peer("sotto_ray.py", "sotto-ray", ("--editable", f"{_ROOT}[ray]")),
}


def environment(peer: Peer, cache: Path = CACHE) -> Path:
    """The peer's Python, installed first unless a complete environment is there.

    Args:
        peer: one of `PEERS`.
        cache: folder of the environments.
    """
    folder = cache / peer.environment
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = [f"torch=={version('torch')}", *peer.requirements]
    # Written last, so that an installation that was interrupted is made anew.
    complete = folder / _COMPLETE
    if complete.exists() and json.loads(complete.read_text()) == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _install([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "-qq"]
    try:
        _install([*pip, *wanted])
    except subprocess.CalledProcessError:
        # Torch's CPU-only builds (2.13.0+cpu) are on no index but one of their own.
        _, _, build = version("torch").partition("+")
        if not build:
            raise
        _install([*pip, "--extra-index-url", f"https://download.pytorch.org/whl/{build}", *wanted])
    complete.write_text(json.dumps(wanted))
    return python


def _install(command: list[str]) -> None:
    """Run it; its standard output stays out of ours, which may be a JSON document."""
    subprocess.run(command, check=True, stdout=sys.stderr, timeout=_INSTALL_SECONDS)


def measure_peer(name: str, *arguments: str, cache: Path = CACHE) -> dict[str, Any]:
    """Run a peer's script in its environment → the JSON object it prints last.

    Args:
        name: key of `PEERS`.
        arguments: for the script.
        cache: folder of the environments.

    Raises:
        RuntimeError: the script failed; the message ends in what it said.
    """
    peer = PEERS[name]
    python = environment(peer, cache)
    # A Sotto on PYTHONPATH would bring its own versions.
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.Popen(
        [str(python), str(_SCRIPTS / peer.script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        start_new_session=True,
    )
    with run:
        try:
            output, errors = run.communicate(timeout=_RUN_SECONDS)
        finally:
            _end(run)
    if run.returncode:
        raise RuntimeError(f"{name} exited with {run.returncode}:\n{errors[-4000:]}")
    document: dict[str, Any] = json.loads(output.splitlines()[-1])
    return document


def _end(run: subprocess.Popen[str]) -> None:
    """See that nothing that a script started outlives it, however it ended."""
    if os.name == "nt":
        run.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
