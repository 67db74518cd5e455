"""A hundred holders' DP-SGD with Opacus, one after the other in one process.

    python benchmarks/peers/opacus_loop.py [--rounds 10] [--threads 1 2] [--style stock tuned]

A round is: for every holder, the common model's parameters are set, ten Poisson batches are
drawn, clipped and noised, and the difference is added up; at the end the mean is applied. There
are two styles of it.

``stock`` is what Opacus' tutorials show, done for one holder after another: a model, an optimiser
and a ``DataLoader`` are made and made private by ``PrivacyEngine().make_private`` as it comes, and
an epoch of its Poisson batches is trained. A ``DataLoader`` of 32 has ten batches of 300 records,
so that Opacus samples at 1/10: thirty records a step, not thirty-two.

``tuned`` is its best plain loop. In Opacus's favour: the model, its wrapper and its optimiser are
made once; of Opacus's ways to per-example gradients the fastest for this model is used (``ew``:
0.73 ms a step, ``hooks`` 0.87, ``ghost`` 1.05, ``functorch`` 2.0); batches are indexed straight
out of a tensor in place of a ``DataLoader`` that fetches records one at a time; parameters move
in one call; SGD is told which of its loops is the fastest for this model; nothing is accounted.
In neither style is an ε computed, or anything logged or evaluated.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.optimizers import DPOptimizer
from report import result, write
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

CASE = {
    "model": "MLP 30-64-32-2, ReLU",
    "holders": 100,
    "records": 300,
    "batch": {"stock": 30, "tuned": 32},
    "sampling": {"stock": "Poisson, rate 1/10", "tuned": "Poisson, rate 32/300"},
    "steps": 10,
    "noise_multiplier": 1.0,
    "clip_norm": 1.0,
    "learning_rate": 0.1,
    "grad_sample_mode": {"stock": "hooks", "tuned": "ew"},
}
HOLDERS, RECORDS, BATCH, STEPS = 100, 300, 32, 10
WARM_UP = 1


@dataclass(frozen=True)
class Holders:
    """Everybody's data, one tensor each; the first index is the holder's."""

    features: Tensor
    labels: Tensor


def holders() -> Holders:
    torch.manual_seed(0)
    features = torch.randn(HOLDERS, RECORDS, 30)
    return Holders(features, (features[..., 0] > 0).long())


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


def stock(data: Holders, count: int) -> list[float]:
    """Seconds of each round, everything made anew for each holder."""
    datasets = [TensorDataset(*own) for own in zip(data.features, data.labels, strict=True)]
    common = network().state_dict()
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        total = {name: torch.zeros_like(value) for name, value in common.items()}
        for dataset in datasets:
            model = network()
            model.load_state_dict(common)
            _epoch(model, dataset)
            for name, value in model.state_dict().items():
                total[name] += value - common[name]
        common = {name: value + total[name] / HOLDERS for name, value in common.items()}
        seconds.append(time.perf_counter() - begin)
    return seconds


def _epoch(model: nn.Module, dataset: TensorDataset) -> None:
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    steps = 0
    for features, labels in loader:
        optimizer.zero_grad()
        cross_entropy(private(features), labels).backward()
        optimizer.step()
        steps += 1
    if steps != STEPS:
        raise RuntimeError(f"an epoch had {steps} steps, not {STEPS}")


def tuned(data: Holders, count: int) -> list[float]:
    """Seconds of each round, everything made once."""
    model = network()
    private = GradSampleModuleExpandedWeights(model)
    parameters = list(model.parameters())
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=0.1, foreach=False),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
    )
    common = [parameter.detach().clone() for parameter in parameters]
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        total = [torch.zeros_like(parameter) for parameter in common]
        for features, labels in zip(data.features, data.labels, strict=True):
            with torch.no_grad():
                torch._foreach_copy_(parameters, common)
            for _ in range(STEPS):
                batch = (torch.rand(RECORDS) < BATCH / RECORDS).nonzero().squeeze(1)
                optimizer.zero_grad(set_to_none=True)
                cross_entropy(private(features[batch]), labels[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                torch._foreach_add_(total, parameters)
                torch._foreach_sub_(total, common)
        torch._foreach_add_(common, total, alpha=1 / HOLDERS)
        seconds.append(time.perf_counter() - begin)
    return seconds


STYLES: Mapping[str, Callable[[Holders, int], list[float]]] = {"stock": stock, "tuned": tuned}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--style", choices=STYLES, nargs="+", default=list(STYLES))
    arguments = parser.parse_args()
    # Of backward hooks; they change nothing.
    warnings.filterwarnings("ignore", category=UserWarning)
    data = holders()
    results = []
    for style in arguments.style:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            seconds = STYLES[style](data, WARM_UP + arguments.rounds)[WARM_UP:]
            results.append(result(seconds, style=style, processes=1, threads=threads, dp=True))
    write("opacus-loop", ["opacus", "torch"], CASE, results)


if __name__ == "__main__":
    main()
