"""What a peer says, made fit for a log or a terminal."""

from __future__ import annotations

__all__ = ["shown"]


def shown(text: str, longest: int = 300) -> str:
    r"""One line of printable characters, however long ``text`` is and whatever is in it.

    >>> shown("a name\x1b[2J\n", 8)
    'a name[2'
    """
    return "".join(filter(str.isprintable, text[: 2 * longest]))[:longest]
