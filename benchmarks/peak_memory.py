"""Peak memory of a simulation, of a process of its own: started by `simulation.py`.

    python benchmarks/peak_memory.py --holders 10000 --rounds 3 [--processes 1]

Peak resident memory of every process, as the system counts it, less what this one held after its
imports (and a first round of two holders, which imports more) and less the data. Copies of this
process share the data and the imports; both are taken off each of them, and what else they share
is counted for each.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

# A script's own folder is on the path; the packages beside it are not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.simulated import MLP, simulated
from common.flower import quiet_flower
from common.tasks.base import HolderData


def _peak(who: int) -> int:
    """Bytes; of children, the largest one's that has ended."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(who).ru_maxrss


def _resident() -> int:
    """Bytes that this process holds now; where that is not told, the most it ever held."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return _peak(resource.RUSAGE_SELF)
    return pages * resource.getpagesize()


def _bytes(data: Mapping[str, HolderData]) -> int:
    halves = [half for own in data.values() for half in (own.train, own.test)]
    tensors = {id(tensor): tensor for half in halves for tensor in half.tensors.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--holders", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int)
    arguments = parser.parse_args()
    quiet_flower()
    # What the first round of anything loads belongs to the imports.
    small = MLP.of(2)
    simulated(small.task, small.plan(1), small.data(), processes=1)
    imports = _resident()
    case = MLP.of(arguments.holders)
    data = case.data()
    size = _bytes(data)
    result = simulated(case.task, case.plan(arguments.rounds), data, processes=arguments.processes)
    here = _peak(resource.RUSAGE_SELF) - imports - size
    copies = result.processes - 1
    each = max(0, _peak(resource.RUSAGE_CHILDREN) - imports - size) if copies else 0
    document = {
        "holders": arguments.holders,
        "processes": result.processes,
        "imports": imports,
        "data": size,
        "this_process": here,
        "each_copy": each,
        "excess": here + copies * each,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
