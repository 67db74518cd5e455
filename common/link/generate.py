"""Regenerates the stubs of the protos here: ``python -m common.link.generate``.

Needs grpcio-tools, which is a development dependency only: the stubs are committed, and
``tests/common/link/test_generate.py`` fails when they no longer match the protos.
"""

from __future__ import annotations

from pathlib import Path

from common.errors import ConfigurationError

__all__ = ["ROOT", "STUBS", "generate"]

ROOT = Path(__file__).parents[2]
_NAMES = ("federation", "operations")
_PROTOS = tuple(f"common/link/{name}.proto" for name in _NAMES)
STUBS = tuple(
    f"common/link/{name}_{ending}"
    for name in _NAMES
    for ending in ("pb2.py", "pb2.pyi", "pb2_grpc.py")
)


def generate(into: Path = ROOT) -> tuple[Path, ...]:
    """Write the stubs of every proto here.

    The protos are compiled from the root of the project, so that the stubs import each other by
    their absolute names.

    Args:
        into: the folder that gets ``common/link/...``; the project itself unless given.

    Returns:
        The files written.

    Raises:
        ConfigurationError: grpcio-tools is not installed, or a proto does not compile.
    """
    try:
        from grpc_tools import protoc  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigurationError(
            "grpcio-tools is not installed; run: pip install 'sotto[dev]'"
        ) from error
    outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", *outputs, *(str(ROOT / name) for name in _PROTOS)]) != 0:
        raise ConfigurationError("a proto does not compile; see protoc's output above")
    return tuple(into / stub for stub in STUBS)


if __name__ == "__main__":
    for path in generate():
        print(path.relative_to(ROOT))
