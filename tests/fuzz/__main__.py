"""Fuzz every decoder, guided by coverage: ``python -m tests.fuzz --inputs 1000000``.

Each decoder runs in a process of its own, under libFuzzer's limits on time and memory, with an
equal part of the inputs. Needs atheris: ``pip install '.[fuzz]'``, on Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["main"]

SECONDS_PER_INPUT = 10
MEGABYTES = 2048


def main() -> int:
    """Fuzz them all, or with ``--one`` a single one in this process."""
    options = _options()
    if options.one is not None:
        return _fuzz_one(options.one, options.inputs, options.seed, options.folder)
    from tests.fuzz.decoders import DECODERS

    names = options.only or list(DECODERS)
    shares = sum(DECODERS[name].share for name in names)
    failed = []
    for name in names:
        count = max(1, round(options.inputs * DECODERS[name].share / shares) + 1)
        if not _in_a_process(name, count, options.seed):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "no crash, no growth, no hang")
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="over all decoders")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", help="name of a decoder; may be repeated")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(name: str, count: int, seed: int) -> bool:
    """Whether a decoder stood ``count`` inputs; prints how long they took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sotto-fuzz-") as folder:
        command = [
            *(sys.executable, "-m", "tests.fuzz", "--one", name),
            *("--inputs", str(count), "--seed", str(seed), "--folder", folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    ok = done.returncode == 0
    print(f"{name}: {count} inputs, {seconds:.0f} s, {'ok' if ok else 'FAILED'}", flush=True)
    if not ok:
        print(done.stdout[-3000:], done.stderr[-6000:], sep="\n", flush=True)
    return ok


def _fuzz_one(name: str, count: int, seed: int, folder: Path) -> int:
    """Fuzz one decoder in this process, which libFuzzer ends."""
    import atheris

    # The first import is the one that counts: everything of ours is instrumented by it.
    with atheris.instrument_imports(include=["common", "client", "server"]):
        from tests.fuzz.decoders import DECODERS

    decoder = DECODERS[name]
    for number, seed_input in enumerate(decoder.seeds()):
        (folder / f"seed-{number:03d}").write_bytes(seed_input)

    def try_one(data: bytes) -> None:
        with suppress(*decoder.refuses):
            decoder.decode(data)

    flags = [
        *(f"-runs={count}", f"-seed={seed}", "-max_len=65536", "-len_control=20"),
        *(f"-timeout={SECONDS_PER_INPUT}", f"-rss_limit_mb={MEGABYTES}", "-print_final_stats=1"),
        *("-verbosity=1", f"-artifact_prefix={folder}/crash-"),
    ]
    atheris.Setup([sys.argv[0], *flags, str(folder)], try_one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
