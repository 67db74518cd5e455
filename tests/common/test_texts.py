from __future__ import annotations

from collections.abc import Callable

import pytest

from common.texts import read_json, read_toml

DEEP, LONG = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize("text", ["", "{", DEEP, LONG, '{"a": NaN'])
def test_json_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        read_json(text)


@pytest.mark.parametrize("text", ["a", "a = ", f"a = {DEEP}", f"a = {LONG}"])
def test_toml_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        read_toml(text)


@pytest.mark.parametrize(("read", "text"), [(read_json, '{"a": [1]}'), (read_toml, "a = [1]")])
def test_what_can_be_read_is(read: Callable[[str], object], text: str) -> None:
    assert read(text) == {"a": [1]}
