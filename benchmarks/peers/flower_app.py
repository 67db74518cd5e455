"""The client of `flower_ray.py`, in a module of its own: Ray's actors import it once and keep it.

(Defined in the script that is run, it would be pickled whole with every message.)
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

RECORDS, BATCH = 300, 32

torch.set_num_threads(1)
# Of backward hooks, once per actor; they change nothing.
warnings.filterwarnings("ignore", category=UserWarning)
client = ClientApp()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2)
    )


@cache
def records(holder: int) -> TensorDataset:
    """A holder's data, made once per actor."""
    features = torch.randn(RECORDS, 30, generator=torch.Generator().manual_seed(holder))
    return TensorDataset(features, (features[:, 0] > 0).long())


@client.train()
def train(message: Message, context: Context) -> Message:
    """One epoch of ten Poisson batches, made private as Flower's Opacus example does it."""
    mode = message.content["config"]["grad-sample-mode"]
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(records(context.node_config["partition-id"]), BATCH),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    steps = 0
    for features, labels in loader:
        optimizer.zero_grad()
        cross_entropy(private(features), labels).backward()
        optimizer.step()
        steps += 1
    metrics = MetricRecord({"num-examples": RECORDS, "steps": steps})
    reply = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(reply, reply_to=message)
