"""From what is agreed on or shared to the seeds of masks: the same on both sides."""

from __future__ import annotations

from common.secagg.keys import derive
from common.secagg.session import Session

__all__ = ["commitment", "pairwise_seed", "self_mask_seed"]


def pairwise_seed(
    session: Session, agreed: bytes, one: str, other: str, model: bytes = b""
) -> bytes:
    """The seed of the mask that two holders share, s_{u,v}: 32 bytes.

    It takes in the model, so that the masks of holders that were sent different ones never cancel.

    Args:
        session: of the round.
        agreed: KA.agree(s_u^SK, s_v^PK).
        one: name of a holder.
        other: name of the other; their order does not matter.
        model: digest of what the input was made of.
    """
    return derive(agreed, session.context("pairwise mask", model, *sorted((one, other))))


def self_mask_seed(session: Session, secret: bytes) -> bytes:
    """The seed of a holder's own mask, from b_u: 32 bytes."""
    return derive(secret, session.context("self mask"))


def commitment(session: Session, secret: bytes) -> bytes:
    """What binds a holder to its b_u before anybody knows who will survive: 32 bytes.

    So the coordinator can tell a wrong share. It says nothing about the mask: HKDF gives
    independent outputs for different contexts, and b_u has 256 bits.
    """
    return derive(secret, session.context("commitment"))
