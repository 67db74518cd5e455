"""The rules of the house: who may import whom, and where third-party names may appear."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSES = ("common", "client", "server", "simulations", "sotto")
ALLOWED = {
    "common": {"common"},
    "client": {"common", "client"},
    "server": {"common", "server"},
    "simulations": {"common", "client", "server", "simulations"},
    "sotto": set(HOUSES),
}
WHERE = {
    "opacus": r"client/trainer\.py|common/privacy/.*",
    "grpc": r"common/link/.*|server/link/.*|server/grid\.py|client/link/.*|client/node\.py",
    "ray": r"simulations/ray\.py",
    "flwr.supercore": r"common/flower\.py",
    "flwr.common": r"common/flower\.py",
    "flwr.proto": r"common/flower\.py",
    "pickle": r"(?!)",
    "grpc_health": r"server/link/.*|server/grid\.py",
    "prometheus_client": r"server/metrics\.py|client/metrics\.py",
    "typer": r"sotto/.*",
    "rich": r"sotto/.*",
}


def modules() -> list[Path]:
    return [path for house in HOUSES for path in sorted((ROOT / house).rglob("*.py"))]


def imported(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    house = path.relative_to(ROOT).parts[0]
    upward = {name for name in imported(path) if name.split(".")[0] in set(HOUSES) - ALLOWED[house]}
    assert not upward, f"{house} must not import {sorted(upward)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_third_parties_stay_in_their_rooms(path: Path) -> None:
    here = str(path.relative_to(ROOT))
    if here.endswith(("_pb2.py", "_pb2_grpc.py")):
        return
    for name in imported(path):
        for package, rooms in WHERE.items():
            if name == package or name.startswith(package + "."):
                assert re.fullmatch(rooms, here), f"{here} imports {name}, allowed in {rooms}"


def test_every_public_name_exists() -> None:
    for path in modules():
        tree = ast.parse(path.read_text())
        exported = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        ]
        defined = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                defined |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        for names in exported:
            assert set(names) <= defined, f"{path}: __all__ names {set(names) - defined}"
