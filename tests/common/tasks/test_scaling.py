"""Inputs are shifted and scaled by public numbers, entry by entry; a wrong file is a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from common.errors import ConfigurationError
from common.plan import TrainingPlan
from common.settings import plan_for
from common.tasks.base import Examples
from common.tasks.scaling import (
    InputScaling,
    check_scaling,
    read_scaling,
    scaled,
    scaling_text,
)
from tests.tiny import TinyTask

TASK = TinyTask()
SCALING = InputScaling(input="x", shift=(1.0, 0.0, -2.0), scale=(2.0, 1.0, 0.5))
UNITS = Examples({"x": torch.tensor([[3.0, 4.0, -1.0], [1.0, 0.0, -2.0]]), "y": torch.ones(2)})


def test_inputs_are_shifted_and_scaled_and_nothing_else_is() -> None:
    got = scaled(UNITS, (SCALING,))
    assert got["x"].tolist() == [[1.0, 4.0, 2.0], [0.0, 0.0, 0.0]]
    assert got["x"].dtype == torch.float32
    assert got["y"] is UNITS["y"]
    assert UNITS["x"][0, 0] == 3.0, "the units themselves stay as they are"


def test_each_unit_is_scaled_by_itself() -> None:
    whole = scaled(UNITS, (SCALING,))
    one = scaled(UNITS.take(torch.tensor([1])), (SCALING,))
    assert torch.equal(one["x"][0], whole["x"][1])


def test_without_a_scaling_the_units_are_the_same_object() -> None:
    assert scaled(UNITS, ()) is UNITS


@pytest.mark.parametrize(
    ("shift", "scale", "says"),
    [
        ((0.0,), (1.0, 1.0), "of one length, got 1 and 2"),
        ((0.0,), (0.0,), "at least 0.001, got 0"),
        ((0.0,), (-1.0,), "at least 0.001, got -1"),
        ((0.0,), (float("nan"),), "finite"),
        ((float("inf"),), (1.0,), "finite"),
        ((), (), "at least 1"),
    ],
)
def test_numbers_that_cannot_work_are_refused(
    shift: tuple[float, ...], scale: tuple[float, ...], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        InputScaling(input="x", shift=shift, scale=scale)


def test_inputs_that_may_not_be_scaled_are_refused() -> None:
    wrong = SCALING.model_copy(update={"input": "y"})
    with pytest.raises(ConfigurationError, match="no input 'y' that may be scaled; it has x"):
        check_scaling((wrong,), TASK)
    with pytest.raises(ConfigurationError, match="'x' is scaled twice"):
        check_scaling((SCALING, SCALING), TASK)
    narrow = InputScaling(input="x", shift=(0.0,), scale=(1.0,))
    check_scaling((narrow,), TASK)
    with pytest.raises(ConfigurationError, match="has 3 numbers, the scaling is for 1"):
        check_scaling((narrow,), TASK, UNITS)


def test_a_file_becomes_part_of_the_plan_and_the_plan_travels_with_it(tmp_path: Path) -> None:
    path = tmp_path / "scaling.toml"
    path.write_text(scaling_text([SCALING], "where it is from,\nand at what price"))
    assert path.read_text().startswith("# where it is from,\n# and at what price\n")
    plan = plan_for(TASK, {"scaling": str(path)})
    assert plan.scaling == (SCALING,)
    assert TrainingPlan.from_json(plan.to_json()) == plan
    assert TrainingPlan.from_toml(plan.to_toml()) == plan
    assert plan.digest != plan_for(TASK, {}).digest
    assert hash(plan) != hash(plan_for(TASK, {}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("scaling = [", "is not TOML"),
        ("", r"must have \[\[scaling\]\] tables"),
        ("[other]", r"must have \[\[scaling\]\] tables"),
        ("scaling = 3", r"must have \[\[scaling\]\] tables"),
    ],
)
def test_another_file_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "scaling.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=says):
        read_scaling(path)


def test_a_file_that_is_not_there_or_does_not_fit_is_refused_with_its_field(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        plan_for(TASK, {"scaling": tmp_path / "none.toml"})
    path = tmp_path / "scaling.toml"
    path.write_text('[[scaling]]\ninput = "x"\nshift = [0.0]\nscale = [0.0]\n')
    with pytest.raises(ConfigurationError, match=r"scaling\.0: scale must be at least 0\.001"):
        plan_for(TASK, {"scaling": path})
