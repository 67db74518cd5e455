"""What plans and policies are made of: immutable, and checked in sentences when they are built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigurationError
from common.texts import read_json
from common.words import shown

__all__ = ["Frozen", "PublicPlan", "validated"]

_Model = TypeVar("_Model", bound="Frozen")

MOST_CHARACTERS = 1 << 20
"""Of a plan as it travels; parsed plans are kept, so that a run's is read once."""

_MOST_SENTENCES = 20


def validated(model: type[_Model], values: Mapping[str, Any]) -> _Model:
    """Build ``model`` from ``values``.

    Raises:
        ConfigurationError: one sentence per field: its name, the bound, and what was found.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigurationError(_sentences(error)) from None


_TAGS = (
    *("dp", "none", "central", "distributed", "local", "histogram", "number", "category"),
    *("plain", "secure", "secure-sum"),
)
"""Of the plan's unions, which pydantic puts among the names of fields; no user wrote them."""


def _sentences(error: ValidationError) -> str:
    def sentence(problem: Mapping[str, Any]) -> str:
        message = problem["msg"].removeprefix("Value error, ")
        field = ".".join(str(part) for part in problem["loc"] if part not in _TAGS)
        found = f", got {problem['input']!r}" if field and problem["type"] != "missing" else ""
        return f"{field}: {message[0].lower()}{message[1:]}{found}" if field else message

    # What a stranger wrote is in them: neither long nor many, whatever it was.
    problems = error.errors()
    sentences = [shown(sentence(dict(problem)), 1000) for problem in problems[:_MOST_SENTENCES]]
    if len(problems) > _MOST_SENTENCES:
        sentences.append(f"and {len(problems) - _MOST_SENTENCES} more")
    return "; ".join(sentences)


class Frozen(BaseModel):
    """Immutable, and strict about unknown keys and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PublicPlan(Frozen):
    """A plan as it travels: the same text for everybody, and a digest that names it."""

    @property
    def digest(self) -> str:
        """Sha256 of the canonical form; what ledgers and checkpoints refer to."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON, as sent to holders."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=16)  # a run sends the same text with every request
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`.

        Raises:
            ConfigurationError: the text is not such a plan.
        """
        if len(text) > MOST_CHARACTERS:
            raise ConfigurationError(
                f"a plan has at most {MOST_CHARACTERS} characters, got {len(text)}"
            )
        try:
            values = read_json(text)
        except ValueError as error:
            raise ConfigurationError(f"the plan is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ConfigurationError("the plan is not a JSON object")
        return validated(cls, values)
