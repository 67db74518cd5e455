"""Speed, memory and repeatability of simulations, beside Flower with Opacus, Opacus and pfl.

    python benchmarks/simulation.py                       # everything, about an hour on two cores
    python benchmarks/simulation.py --only mlp,floor --quick --json -

Peers are installed into environments of their own, kept in ``--cache``, and run on this machine
in turn with Sotto. Sotto's rounds are those of ``sotto simulate``: `server.app.federate` on a
`BatchedGrid`. Medians; two rounds of warm-up; nobody evaluates. Parts that need real data say so
where these are not: `sotto data get NAME`, or SOTTO_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.peer_environments import CACHE
from benchmarks.simulation_parts import PARTS, Options, Part
from common.errors import DataError
from common.flower import quiet_flower


def measure(name: str, options: Options, console: Console) -> Part:
    """One part; one that fails says so, and the others go on."""
    load, begin = round(os.getloadavg()[0], 2), time.perf_counter()
    console.rule(name)
    try:
        part = PARTS[name](options)
    except DataError as error:
        part = Part({"skipped": str(error)}, rows=[("skipped", str(error))])
    except Exception as error:
        traceback.print_exc()
        part = Part({"failed": str(error)}, rows=[("FAILED", str(error).splitlines()[-1])])
    part.case["load"] = {"before": load, "after": round(os.getloadavg()[0], 2)}
    part.case["seconds"] = round(time.perf_counter() - begin, 1)
    show(console, part)
    return part


def show(console: Console, part: Part) -> None:
    """A part's figures, for people."""
    table = Table(show_header=False, box=None)
    for what, figure in part.rows:
        table.add_row(what, figure)
    console.print(table)


def show_targets(console: Console, parts: Mapping[str, Part]) -> None:
    """What was to be reached, and whether it was."""
    table = Table(title="Targets")
    for column in ("target", "wanted", "got", "met"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for part in parts.values():
        for target in part.targets:
            table.add_row(
                target.name,
                f"{'≥' if target.at_least else '≤'} {target.target:g}",
                f"{target.got:.3g}",
                "[green]yes[/]" if target.met else "[red]no[/]",
            )
    console.print(table)


def document(parts: Mapping[str, Part], options: Options) -> dict[str, Any]:
    """What ``--json`` writes."""
    packages = ("sotto", "torch", "numpy", "flwr", "opacus", "cryptography")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    for part in parts.values():
        for name, number in part.case.pop("versions", {}).items():
            versions.setdefault(name, number)
    return {
        "benchmark": "simulation",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": versions,
        "cases": {name: part.case for name, part in parts.items()},
        "targets": [target.document() for part in parts.values() for target in part.targets],
    }


def _parts(text: str) -> list[str]:
    """Names of parts, separated by commas."""
    names = text.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return names


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - for stdout")
    parser.add_argument(
        "--only", type=_parts, default=list(PARTS), metavar="PART,…", help=", ".join(PARTS)
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="of the peers' environments")
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that it works")
    return parser.parse_args()


def _exit(*_: object) -> None:
    """End as an exception does, so that every process started here is stopped."""
    sys.exit(1)


def main() -> None:
    """Measure, show, write."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _exit)
    console = Console(stderr=arguments.json == "-")
    quiet_flower()
    options = Options(arguments.cache, arguments.quick, console.print)
    parts = {name: measure(name, options, console) for name in arguments.only}
    show_targets(console, parts)
    text = json.dumps(document(parts, options), indent=2) + "\n"
    if arguments.json == "-":
        sys.stdout.write(text)
    elif arguments.json:
        Path(arguments.json).write_text(text)
    if any("failed" in part.case for part in parts.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
