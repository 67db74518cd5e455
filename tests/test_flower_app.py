"""The repository as a Flower app: what ``flwr run .`` sends, and what may be set about a run."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from common.settings import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
LARGEST_BUNDLE = 10 * 1024 * 1024  # Flower's own limit, in bytes

# Flower's builder calls what its own dependency has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return build_fab_from_disk(ROOT)


def test_every_setting_can_be_set() -> None:
    """Flower refuses a ``--run-config`` key that pyproject.toml does not name."""
    flower = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    settings = {name.replace("_", "-") for name in SETTINGS}
    assert set(flower["config"]) == {"task", "source", "preprocessing", "out"} | settings


def test_the_bundle_holds_every_module(bundle: bytes) -> None:
    sent = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    here = {
        path.relative_to(ROOT).as_posix()
        for package in ("common", "server", "client")
        for path in (ROOT / package).rglob("*.py")
    }
    assert "common/link/federation_pb2.py" in here
    assert not here - sent


def test_the_bundle_holds_no_data_and_is_small(bundle: bytes) -> None:
    sent = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert not [name for name in sent if name.endswith((".safetensors", ".sqlite", ".pem", ".key"))]
    assert len(bundle) < LARGEST_BUNDLE / 5


def test_both_apps_import_without_ray() -> None:
    """Flower's simulation is an extra; nobody else pays for it."""
    code = (
        "import sys; sys.modules['ray'] = None; import client.app, server.app; "
        "print(type(client.app.app).__name__, type(server.app.app).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["ClientApp", "ServerApp"], done.stderr
