"""What the coordinator saw of a run, in words and tables, from the document about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sotto.show import Screen, counted, figure

if TYPE_CHECKING:  # it needs torch
    from server.summaries import RoundSummary

__all__ = [
    "MASKS_LEFT_OUT",
    "aggregation_rows",
    "coalition_note",
    "coalition_rows",
    "lost_rows",
    "lost_sentence",
    "masks_sentence",
    "missed",
    "missed_words",
    "show_sums",
]

MASKS_LEFT_OUT = (
    "The masks were not computed: this engine adds the holders' parts as they are, which is what "
    "masks leave of them."
)

Rows = tuple[list[str], list[list[str]]]
"""Columns, and rows of as many cells."""


def show_sums(screen: Screen, written: Mapping[str, Any]) -> None:
    """Everything below on a terminal; nothing of a run whose updates were seen one by one.

    Args:
        screen: where.
        written: the JSON document.
    """
    about = written["aggregation"]
    if about["kind"] == "plain":
        return
    screen.table("What the coordinator saw", *aggregation_rows(about))
    if "coalitions" in about:
        screen.table("If holders tell the coordinator their noise", *coalition_rows(about))
        if note := coalition_note(about):
            screen.say(note)
    screen.say(masks_sentence(about))
    if sentence := lost_sentence(written):
        screen.say(sentence)


def aggregation_rows(about: Mapping[str, Any]) -> Rows:
    """How sums are masked.

    Args:
        about: the document's ``aggregation``.
    """
    neighbours = about["neighbours"]
    others = "all others" if neighbours is None else f"{neighbours} others"
    rows = [
        ["holders in a round, at most", str(about["cohort"])],
        ["holders in a sum, at least", str(about["threshold"])],
        ["dropouts that a round bears", str(about["tolerated_dropouts"])],
        ["helpers that a lying coordinator may have", str(about["tolerated_helpers"])],
        ["each holder shares masks with", others],
        ["bits of a masked number", str(about["ring_bits"])],
        ["bytes a parameter", str(about["bytes_per_parameter"])],
    ]
    return ["aggregation", about["kind"]], rows


def coalition_rows(about: Mapping[str, Any]) -> Rows:
    """ε against the coordinator, by how many holders tell it everything, their noise included."""
    rows = [
        [str(each["holders"]), figure(each["epsilon"]), _holds(about, each["holders"])]
        for each in about["coalitions"]
    ]
    return ["holders that help", "ε", "if the coordinator"], rows


def _holds(about: Mapping[str, Any], helpers: int) -> str:
    return "lies" if helpers <= about["tolerated_helpers"] else "keeps to the protocol"


def coalition_note(about: Mapping[str, Any]) -> str:
    """What the last rows of that table rest on; empty if all rest on the same."""
    if about["coalitions"][-1]["holders"] <= about["tolerated_helpers"]:
        return ""
    return (
        f"With more than {counted(about['tolerated_helpers'], 'helper')}, a coordinator that lies "
        "could undo the masks of one holder, whose part alone has less noise."
    )


def masks_sentence(about: Mapping[str, Any]) -> str:
    """Whether anything was masked, as nothing need be in a simulation."""
    if about["masks_computed"]:
        return "The whole protocol ran: keys, masks, shares and signatures of every round."
    return f"{MASKS_LEFT_OUT} --engine opacus runs the whole protocol in this process."


def lost_sentence(written: Mapping[str, Any]) -> str:
    """How many rounds came to nothing; empty if none did."""
    lost = written.get("lost_rounds", [])
    if not lost:
        return ""
    rounds = written["rounds"] * len(written["seeds"])
    were = "was" if len(lost) == 1 else "were"
    return (
        f"{len(lost)} of {counted(rounds, 'round')} {were} lost: fewer than "
        f"{written['aggregation']['threshold']} holders remained, so the model stayed as it was."
    )


def lost_rows(written: Mapping[str, Any]) -> Rows:
    """The rounds that were lost, and why."""
    rows = [[str(each["seed"]), str(each["round"]), each["why"]] for each in written["lost_rounds"]]
    return ["seed", "round", "why"], rows


def missed(summary: RoundSummary) -> dict[str, str]:
    """Who missed a round, and why: without those who did their part in one that was lost."""
    from common.wire import LOST_WITH_ITS_ROUND

    return {
        name: why for name, why in summary.missed.items() if not why.startswith(LOST_WITH_ITS_ROUND)
    }


def missed_words(summary: RoundSummary) -> str:
    """The same in a line, and that the round was lost if it was; empty where nobody is missing."""
    names: dict[str, list[str]] = {}
    for name, why in missed(summary).items():
        names.setdefault(why, []).append(name)
    who = "; ".join(f"{', '.join(own)} {why}" for why, own in names.items())
    lost = f"LOST, {summary.lost}" if summary.lost else ""
    return ": ".join(filter(None, (lost, who)))
