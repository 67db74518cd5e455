from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.words import shown


@given(st.text(max_size=500), st.integers(0, 300))
def test_it_is_one_short_printable_line(text: str, longest: int) -> None:
    line = shown(text, longest)
    assert line.isprintable()
    assert len(line) <= longest


def test_what_is_harmless_stays() -> None:
    assert shown("nobody answers at hub.example:7443") == "nobody answers at hub.example:7443"
    assert shown("\x1b]0;owned\x07line\r\nnext") == "]0;ownedlinenext"
