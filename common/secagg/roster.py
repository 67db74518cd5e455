"""Who takes part in a session, once their advertisements have been found good."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from common.errors import ProtocolViolation
from common.link.signing import Signer, Trust
from common.secagg.graph import Graph
from common.secagg.messages import TAG_BYTES, Advertisement, Roster
from common.secagg.session import Session

__all__ = ["Members", "check_advertisement", "is_signed"]


@dataclass(frozen=True)
class Members:
    """The holders of a roster, all checked, and who is whose neighbour.

    Args:
        session: which they take part in.
        roster: as the coordinator sent it.
        signers: name → whose signatures count as that holder's.
        keys: name → (c^PK, s^PK).
        graph: of the neighbours.
    """

    session: Session
    roster: Roster
    signers: dict[str, Signer]
    keys: dict[str, tuple[bytes, bytes]]
    graph: Graph

    @classmethod
    def of(cls, session: Session, roster: Roster, trust: Trust) -> Members:
        """Check a roster.

        What is checked does not depend on who checks it, so holders of one process that are shown
        the same roster share the work.

        Raises:
            ProtocolViolation: it breaks the protocol; the code says how.
            Refusal: ``trust`` does not believe one of the credentials.
        """
        return _members(session, roster, trust)

    def confirmed(self, survivors: Collection[str], model: bytes) -> bytes:
        """What a holder signs in ConsistencyCheck: U3, which roster it was shown, and which model.

        Figure 4 of the paper signs U3 alone. With the roster, holders that were shown different
        ones do not confirm each other. With the model, neither do holders that were sent different
        ones: a coordinator that sends all others a model on which their updates vanish would read
        the last one's in the sum (Pasquini, Francati & Ateniese 2022, "Eluding secure aggregation
        in federated learning via model inconsistency").
        """
        names = hashlib.sha256(self.session.context("U3", *sorted(survivors))).digest()
        return self.session.context("ConsistencyCheck", self.roster.digest, model, names)


@lru_cache(maxsize=4)
def _members(session: Session, roster: Roster, trust: Trust) -> Members:
    advertisements = roster.advertisements
    _check_size(session, len(advertisements))
    _check_distinct(advertisements)
    signers = {a.name: check_advertisement(session, a, trust) for a in advertisements}
    keys = {a.name: (a.box_key, a.mask_key) for a in advertisements}
    coin = hashlib.sha256(session.context("neighbours", roster.digest)).digest()
    return Members(session, roster, signers, keys, Graph.of(signers, session.neighbours, coin))


def check_advertisement(session: Session, advertisement: Advertisement, trust: Trust) -> Signer:
    """Whose advertisement it is.

    Raises:
        ProtocolViolation: it was made for another session, or not by who is named.
        Refusal: ``trust`` does not believe the credential.
    """
    name = advertisement.name
    if advertisement.session != session.digest[:TAG_BYTES]:
        raise ProtocolViolation(
            "replay",
            f"the keys shown for {name!r} were made for another run, plan, round or threshold than "
            f"round {session.round} of this one; the coordinator must collect new keys each round",
        )
    signer = trust.check(advertisement.credential)
    if not is_signed(signer, advertisement.signature, advertisement.signed(session)):
        raise ProtocolViolation(
            "swapped-keys",
            f"the keys shown for {name!r} are not signed by {name!r}; somebody between that holder "
            "and this one has changed them, so nothing is sent",
        )
    return signer


def _check_size(session: Session, size: int) -> None:
    if size < session.threshold:
        raise ProtocolViolation(
            "lone-holder" if size < 2 else "threshold",
            f"the roster names {size} holders, and the plan's threshold is {session.threshold}; a "
            "sum of fewer says too much about each",
        )
    if size > session.cohort:
        raise ProtocolViolation(
            "threshold",
            f"the roster names {size} holders, and the plan's cohort is {session.cohort}; its "
            f"threshold of {session.threshold} protects no larger one",
        )


def _check_distinct(advertisements: Collection[Advertisement]) -> None:
    """No two entries of a roster may be one holder, or one key."""
    names = [a.name for a in advertisements]
    if names != sorted(names):
        raise ProtocolViolation("roster", "the roster is not in order of names")
    keys = [key for a in advertisements for key in (a.box_key, a.mask_key)]
    for what, values in (
        ("name", names),
        ("signing key", [a.credential.signing_key for a in advertisements]),
        ("key of this round", keys),
    ):
        if len(set(values)) < len(values):
            raise ProtocolViolation(
                "lone-holder",
                f"two entries of the roster have one {what}; one holder in several places could "
                "leave another alone in the sum",
            )


def is_signed(signer: Signer, signature: bytes, message: bytes) -> bool:
    """Whether a signature is the signer's for a message.

    Remembered, since all holders of a session are shown the same signatures; public keys,
    signatures and digests are all that is.
    """
    return _is_signed(signer.key.public_bytes_raw(), signature, message)


@lru_cache(maxsize=2**14)
def _is_signed(key: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True
