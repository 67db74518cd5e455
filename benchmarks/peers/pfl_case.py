"""A central iteration of Apple's pfl: a hundred users' plain SGD, averaged.

    python benchmarks/peers/pfl_case.py [--rounds 20]

Every iteration trains all hundred users for two epochs of five batches of ten records, once
without privacy and once with central DP (the update clipped, Gaussian noise on the sum). Timed
is one central iteration, from the end of the one before.

In pfl's favour: data are tensors made before the clock starts, in pfl's own in-memory dataset,
one object per user, so that sampling is a look-up; the device is named, which spares pfl a query
per batch; SGD is told which of its loops is the fastest for this model; nobody evaluates;
metrics are not printed. Besides one process with one and with two threads, pfl runs the way its
guide recommends for more than one core: as two worker processes (``PFL_WORKER_ADDRESSES``), one
thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from report import result, write
from torch import nn
from torch.nn.functional import cross_entropy

CASE = {
    "model": "MLP 30-64-2, ReLU",
    "holders": 100,
    "records": 50,
    "batch": 10,
    "sampling": "two epochs in order",
    "steps": 10,
    "learning_rate": 0.1,
    "central_dp": {"noise_multiplier": 1.0, "clip_norm": 1.0},
}
USERS, RECORDS, BATCH, EPOCHS = 100, 50, 10, 2
WARM_UP = 3
SECONDS_PER_RUN = 300.0


class Network(nn.Sequential):
    """The model, with the two methods that pfl asks for."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What a local step minimises."""
        return cross_entropy(self(features), labels)

    def metrics(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """None; nobody evaluates."""
        return {}


class Clock(TrainingProcessCallback):
    """Notes when each central iteration ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *, model: object) -> Metrics:
        """Start."""
        self.begin = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: object, model: object, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Lap."""
        now = time.perf_counter()
        self.seconds.append(now - self.begin)
        self.begin = now
        return False, Metrics()


def users() -> FederatedDataset:
    torch.manual_seed(0)
    features = torch.randn(USERS, RECORDS, 30)
    labels = (features[..., 0] > 0).long()
    data = [
        PyTorchTensorDataset((features[user], labels[user]), user_id=str(user))
        for user in range(USERS)
    ]
    return FederatedDataset(
        data.__getitem__, get_user_sampler("minimize_reuse", list(range(USERS)))
    )


def iterations(count: int, dp: bool) -> list[float]:
    """Seconds of each central iteration of this process's share of the run."""
    np.random.seed(0)
    network = Network()
    model = PyTorchModel(
        network,
        local_optimizer_create=lambda parameters, lr: torch.optim.SGD(
            parameters, lr, foreach=False
        ),
        central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
    )
    data, clock = users(), Clock()
    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(1.0, 1.0))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=count,
            # Never after the first iteration, which is warm-up.
            evaluation_frequency=count + 1,
            train_cohort_size=USERS,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, postprocessors=[mechanism] if dp else []),
        model,
        NNTrainHyperParams(
            local_batch_size=BATCH, local_num_epochs=EPOCHS, local_learning_rate=0.1
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    return clock.seconds


def run(processes: int, threads: int, dp: bool, rounds: int) -> list[float]:
    """Seconds of each timed iteration, as the first of fresh processes saw them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    command = [sys.executable, __file__, "--rounds", str(rounds), "--threads", str(threads)]
    workers = []
    for rank in range(processes):
        distributed = {
            "PFL_WORKER_RANK": str(rank),
            "PFL_WORKER_ADDRESSES": ",".join([address] * processes),
        }
        workers.append(
            subprocess.Popen(
                [*command, "--dp"] if dp else command,
                stdout=subprocess.PIPE,
                text=True,
                # torch has renamed things that pfl uses.
                env=os.environ
                | {"PYTHONWARNINGS": "ignore"}
                | (distributed if processes > 1 else {}),
            )
        )
    try:
        outputs = [worker.communicate(timeout=SECONDS_PER_RUN)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if any(worker.returncode for worker in workers):
        raise RuntimeError("a pfl process failed; its own message is above")
    seconds: list[float] = json.loads(outputs[0].splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dp", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        seconds = iterations(WARM_UP + arguments.rounds, arguments.dp)[WARM_UP:]
        print(json.dumps(seconds), flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        os._exit(0)  # what takes torch's connections down now and then aborts
    results = []
    for dp in (False, True):
        for processes, threads in ((1, 1), (1, 2), (2, 1)):
            seconds = run(processes, threads, dp, arguments.rounds)
            results.append(result(seconds, processes=processes, threads=threads, dp=dp))
    write("pfl", ["pfl", "torch"], CASE, results)


if __name__ == "__main__":
    main()
