"""Shifting and scaling a task's inputs by public numbers, the same at every holder.

The numbers are in the plan. Where they come from private statistics, those were paid for when they
were released, and using them is post-processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from common.errors import ConfigurationError
from common.tasks.base import Examples, Task
from common.texts import read_toml

__all__ = ["InputScaling", "check_scaling", "read_scaling", "scaled", "scaling_text"]

LEAST_SCALE = 1e-3
"""A smaller scale would make one odd value of an input drown all the others."""


class InputScaling(BaseModel):
    """What an input becomes: (x − shift) / scale.

    Args:
        input: name of the tensor, one of the task's ``scalable``.
        shift: [D].
        scale: [D], each at least :data:`LEAST_SCALE`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input: str
    shift: tuple[float, ...] = Field(min_length=1)
    scale: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.shift) != len(self.scale):
            raise ValueError(
                f"shift and scale must be of one length, got {len(self.shift)} and "
                f"{len(self.scale)}"
            )
        if not min(self.scale) >= LEAST_SCALE:
            raise ValueError(f"scale must be at least {LEAST_SCALE:g}, got {min(self.scale):g}")
        return self

    def apply(self, values: Tensor) -> Tensor:
        """The scaled input.

        Args:
            values: [N, D] float32; entry i of the result depends on entry i only.
        """
        shift, scale = (
            torch.tensor(numbers, dtype=values.dtype, device=values.device)
            for numbers in (self.shift, self.scale)
        )
        return (values - shift) / scale


def scaled(units: Examples, scaling: Sequence[InputScaling]) -> Examples:
    """The units as a plan's models see them; the same object where nothing is scaled."""
    if not scaling:
        return units
    changed = {one.input: one.apply(units[one.input]) for one in scaling}
    return Examples({**units.tensors, **changed})


def check_scaling(
    scaling: Sequence[InputScaling], task: Task, units: Examples | None = None
) -> None:
    """Whether a task's inputs can be scaled so.

    Args:
        scaling: of a plan.
        task: of the same plan.
        units: some of the task's, whose inputs' widths are then compared too.

    Raises:
        ConfigurationError: an input that may not be scaled, or twice, or of another width.
    """
    names = [one.input for one in scaling]
    for name in names:
        if name not in task.scalable:
            there = ", ".join(task.scalable) or "none"
            raise ConfigurationError(
                f"scaling: task {task.name!r} has no input {name!r} that may be scaled; it has "
                f"{there}"
            )
        if names.count(name) > 1:
            raise ConfigurationError(f"scaling: input {name!r} is scaled twice")
    for one in scaling if units is not None else ():
        width = units[one.input].shape[1]  # type: ignore[index]  # it is not None here
        if len(one.shift) != width:
            raise ConfigurationError(
                f"scaling: input {one.input!r} has {width} numbers, the scaling is for "
                f"{len(one.shift)}"
            )


def scaling_text(scaling: Sequence[InputScaling], comment: str) -> str:
    """The TOML of ``--scaling FILE``, with a comment of one or more lines at its head."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + tomli_w.dumps({"scaling": [one.model_dump(mode="json") for one in scaling]})


def read_scaling(path: Path) -> list[dict[str, Any]]:
    """The plan's field ``scaling`` from such a file, not yet validated.

    Raises:
        ConfigurationError: the file is not there, or is not one that :func:`scaling_text` wrote.
    """
    try:
        values = read_toml(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"--scaling {path}: {error.strerror}") from None
    except ValueError as error:  # a text that is not UTF-8, too
        raise ConfigurationError(f"--scaling {path} is not TOML: {error}") from None
    found = values.get("scaling")
    if set(values) != {"scaling"} or not isinstance(found, list) or not found:
        raise ConfigurationError(
            f"--scaling {path} must have [[scaling]] tables and nothing else; 'sotto stats TASK "
            "--scaling FILE' writes such a file"
        )
    return found
