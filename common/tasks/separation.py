"""The part of the Task contract on which clipping rests: a unit's loss is its own."""

from __future__ import annotations

import torch
from torch import nn

from common.errors import ConfigurationError
from common.tasks.base import Examples, Task

__all__ = ["require_separate_units"]


def require_separate_units(task: Task, model: nn.Module, data: Examples) -> None:
    """Refuse a task whose batch or loss lets one unit depend on who else is sampled.

    Args:
        task: to look at.
        model: the task's, for the units of ``data``; put into evaluation mode.
        data: a holder's training units, on the model's device; fewer than two tell nothing.

    Raises:
        ConfigurationError: it does, so no clip bounds what one unit changes.
    """
    if len(data) < 2:
        return
    device = next(iter(data.tensors.values())).device
    units = data.take(torch.arange(2, device=device))
    chance = torch.Generator().manual_seed(0)
    draws = torch.rand(2, task.draws, generator=chance, dtype=torch.float64).to(device)
    batch = task.batch(units, draws)
    alone = task.batch(units.take(torch.tensor([0], device=device)), draws[:1])
    model.eval()
    with torch.no_grad():
        together, apart = task.loss(model, batch)[0], task.loss(model, alone)[0]
    if not torch.allclose(together, apart, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ConfigurationError(
            f"the loss of task {task.name!r} gives one unit another value when a second is in the "
            "batch; entry i must depend on unit i only"
        )
