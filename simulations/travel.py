"""Objects that go to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Travels"]


class Travels:
    """Its tensors go to another process as numpy arrays: torch would open a file for each."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: _as_arrays(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update({name: _as_tensors(value) for name, value in state.items()})


def _as_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, Mapping):
        return {key: _as_arrays(item) for key, item in value.items()}
    return value


def _as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.tensor(value)  # a copy: the array may be somebody else's memory
    if isinstance(value, Mapping):
        return {key: _as_tensors(item) for key, item in value.items()}
    return value
