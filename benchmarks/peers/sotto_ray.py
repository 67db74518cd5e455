"""Sotto itself on Ray: two thousand holders' DP-SGD with one and with two one-thread workers.

    python benchmarks/peers/sotto_ray.py [--rounds 5] [--holders 2000] [--workers 1 2]

Not a peer, but like the peers it needs an environment of its own, one with Ray. The case is that
of `flower_ray.py`, with more holders. Each number of workers is run in turn, several times. The
final models must be the same to the last bit, and the same as without Ray.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# Ray's actors inherit the path, and find there what the task is made of.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from report import result, write

from benchmarks.simulated import MLP, simulated
from common.flower import quiet_flower
from simulations.ray import RayWorkers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--holders", type=int, default=2_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--alternations", type=int, default=2)
    arguments = parser.parse_args()
    quiet_flower()
    case = MLP.of(arguments.holders)
    data, plan = case.data(), case.plan(2 + arguments.rounds)
    seconds: dict[int, list[float]] = {number: [] for number in arguments.workers}
    digests = {"without Ray": simulated(case.task, plan, data).digest}
    for _ in range(arguments.alternations):
        for number, timed in seconds.items():
            workers = RayWorkers(case.task, data, torch.device("cpu"), workers=number)
            done = simulated(case.task, plan, data, workers=workers)
            timed += done.timed
            digests[f"{number} workers"] = done.digest
    write(
        "sotto-ray",
        ["sotto", "ray", "torch"],
        {"model": case.label, "holders": case.holders, "digests": digests},
        [result(timed, processes=number, threads=1, dp=True) for number, timed in seconds.items()],
    )


if __name__ == "__main__":
    main()
