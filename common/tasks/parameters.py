"""Shared parameters ↔ the flat vector that travels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from common.tasks.base import Task, derived_seed

__all__ = [
    "dimension_of",
    "flat",
    "initial_parameters",
    "load_private",
    "load_shared",
    "named_shared",
    "private_of",
    "shared_of",
    "split_shared",
]


def named_shared(task: Task, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that travel, in the model's order."""
    for name, parameter in model.named_parameters():
        if name not in task.private_parameters:
            yield name, parameter


def dimension_of(task: Task) -> int:
    """D, how many parameters travel; it depends on nobody's data."""
    with torch.random.fork_rng(devices=[]):
        model = task.model(0)
    return sum(parameter.numel() for _, parameter in named_shared(task, model))


def shared_of(task: Task, model: nn.Module) -> Tensor:
    """The shared parameters as one vector, [D] float32 on the CPU."""
    parts = [parameter.detach().reshape(-1) for _, parameter in named_shared(task, model)]
    return torch.cat(parts).to("cpu", torch.float32)


@torch.no_grad()
def load_shared(task: Task, model: nn.Module, vector: Tensor) -> None:
    """Write a vector [D] into the model's shared parameters.

    Raises:
        ValueError: the vector's length is not the model's.
    """
    parameters = [parameter for _, parameter in named_shared(task, model)]
    sizes = [parameter.numel() for parameter in parameters]
    if vector.numel() != sum(sizes):
        raise ValueError(f"got {vector.numel()} parameters, the model has {sum(sizes)}")
    for parameter, part in zip(parameters, torch.split(vector, sizes), strict=True):
        parameter.copy_(part.view_as(parameter))


def private_of(task: Task, model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that stay, on the CPU."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if name in task.private_parameters
    }


@torch.no_grad()
def load_private(model: nn.Module, private: dict[str, Tensor]) -> None:
    """Write :func:`private_of`'s result back."""
    parameters = dict(model.named_parameters())
    for name, value in private.items():
        parameters[name].copy_(value)


def initial_parameters(task: Task, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The shared parameters a run starts from, [D] float32; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("initial", seed))
        vector: np.ndarray[tuple[int], np.dtype[np.float32]] = shared_of(
            task, task.model(1)
        ).numpy()
    return vector


def split_shared(task: Task, vector: Tensor) -> dict[str, Tensor]:
    """The vector cut into named tensors, as ``model.safetensors`` holds them."""
    with torch.random.fork_rng(devices=[]):
        model = task.model(1)
    load_shared(task, model, vector)
    return {name: parameter.detach().clone() for name, parameter in named_shared(task, model)}


def flat(task: Task, tensors: dict[str, Tensor]) -> Tensor:
    """Inverse of :func:`split_shared`: the vector [D] float32."""
    with torch.random.fork_rng(devices=[]):
        model = task.model(1)
    return torch.cat([tensors[name].reshape(-1) for name, _ in named_shared(task, model)])
