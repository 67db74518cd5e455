"""A hundred holders' DP-SGD in Flower's Ray simulation, with Opacus in every client.

    python benchmarks/peers/flower_ray.py [--rounds 8] [--actors 2] [--style tuned]

Flower's own FedAvg asks every client in every round; the client (`flower_app.py`) makes its model
private with Opacus on each call, as Flower's Opacus example does. Timed is a round, from
``configure_train`` to the end of ``aggregate_train``.

There are two styles. ``stock`` has Opacus compute per-example gradients as it does by default and
in the example (``hooks``); ``tuned`` in the way that is fastest for this model (``ew``), which
saves a fifth of a step.

In Flower's favour: one CPU and one thread per actor, so that all cores train and none is
oversubscribed; actors import the client once and keep the data they have made; no ε is computed
in the clients (the example does, on every call); the messages carry the model and a few numbers;
nobody evaluates; nothing is logged; telemetry and Ray's dashboard are off; the rounds in which
actors start are warm-up. A ``DataLoader`` of 32 has ten batches of 300 records, so that Opacus
samples at 1/10: thirty records a step, not thirty-two.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
import traceback
from collections.abc import Iterable

# Read when they are imported; Ray's actors inherit them.
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import torch
from flower_app import client, network
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from report import result, write

CASE = {
    "model": "MLP 30-64-32-2, ReLU",
    "holders": 100,
    "records": 300,
    "batch": 30,
    "sampling": "Poisson, rate 1/10",
    "steps": 10,
    "noise_multiplier": 1.0,
    "clip_norm": 1.0,
    "learning_rate": 0.1,
    "grad_sample_mode": {"stock": "hooks", "tuned": "ew"},
}
STYLES = CASE["grad_sample_mode"]
HOLDERS, STEPS = 100, 10
WARM_UP = 2


class Timed(FedAvg):
    """Flower's own strategy with a clock: a round is configure_train to aggregate_train."""

    def __init__(self) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=HOLDERS, min_available_nodes=HOLDERS
        )
        self.seconds: list[float] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Start the clock."""
        self.begin = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stop it, and see that everybody has done what is timed."""
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.begin)
        if [_steps(reply) for reply in replies] != [STEPS] * HOLDERS:
            raise RuntimeError(f"round {server_round}: a client has failed or trained less")
        return arrays, metrics


def _steps(reply: Message) -> int:
    if reply.has_error():
        raise RuntimeError(reply.error.reason)
    return reply.content["metrics"]["steps"]


def rounds(count: int, actors: int, style: str) -> list[float]:
    """Seconds of each round."""
    server, strategy = ServerApp(), Timed()

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        strategy.start(
            grid,
            ArrayRecord(network().state_dict()),
            num_rounds=count,
            train_config=ConfigRecord({"grad-sample-mode": STYLES[style]}),
        )

    run_simulation(
        server,
        client,
        HOLDERS,
        backend_config={
            "init_args": {
                "address": "local",  # whatever other cluster may be running here
                "num_cpus": actors,
                "num_gpus": 0,
                "log_to_driver": False,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return strategy.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--actors", type=int, default=os.cpu_count())
    parser.add_argument("--style", choices=STYLES, default="stock")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    style, actors = arguments.style, arguments.actors
    try:
        seconds = rounds(WARM_UP + arguments.rounds, actors, style)[WARM_UP:]
    except RuntimeError:
        traceback.print_exc()
        os._exit(1)  # Flower's threads would wait for ever
    results = [result(seconds, style=style, processes=actors, threads=1, dp=True)]
    write("flower-ray", ["flwr", "ray", "opacus", "torch"], CASE, results)


if __name__ == "__main__":
    main()
