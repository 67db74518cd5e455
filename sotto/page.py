"""What the pages that commands leave have in common: style, tables, drawings."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure

__all__ = ["ACCENT", "INK", "MUTED", "details", "page", "svg", "table", "tidy"]

INK, ACCENT, MUTED = "#1d2433", "#2f6f8f", "#8a93a6"
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2433; margin: 0 auto; max-width: 62rem;
       padding: 2.5rem 1.5rem 4rem; }
h1 { font-weight: 650; font-size: 1.7rem; margin: 0; }
h2 { font-weight: 600; font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p.lead { color: #5b6478; margin: .3rem 0 1.6rem; }
blockquote { margin: 0; padding: .9rem 1.2rem; background: #eef4f7; border-left: 4px solid #2f6f8f;
             border-radius: 0 6px 6px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 24rem; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #e4e8ef; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: #5b6478; }
svg { max-width: 100%; height: auto; }
svg + p.caption { color: #5b6478; font-size: .9rem; margin: .2rem 0 0; }
p.finding { font-size: 1.15rem; line-height: 1.5; margin: 0 0 .6rem; }
details { margin: .3rem 0; }
summary { cursor: pointer; }
pre { background: #f6f7fa; padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """A page that needs nothing but itself."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>Sotto: {escape(title)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(sections)}</body></html>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its first column is text, the others are numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def details(title: str, text: str) -> str:
    """Text as it stands, folded away."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def svg(drawing: Figure) -> str:
    """The drawing as part of a page."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def tidy(axis: Any) -> None:
    """Quiet frame, ticks and grid."""
    axis.tick_params(colors=MUTED, labelsize=8)
    axis.grid(axis="y", color="#e4e8ef", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color("#cfd5e0")
