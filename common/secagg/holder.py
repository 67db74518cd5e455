"""The holder's side of Bonawitz et al. 2017, figure 4, round by round.

::

    advertise_keys ─▶ Advertised ─share_keys─▶ SharedKeys ─receive_shares─▶ ReceivedShares
        ─masked_input─▶ MaskedInput ─consistency_check─▶ ConsistencyChecked
        ─unmask─▶ the shares that give the sum

Each state takes one message of the coordinator and makes the next state and what is sent. Nothing
here reads or writes anything, or waits. A state can be used once: a coordinator that does not
like an answer cannot ask again with other words, and a holder whose state is used up or lost is
one that dropped out. All checks are those of figure 4, and those that a comment or docstring adds.

The coordinator is the adversary. What a holder refuses it says with
:class:`~common.errors.ProtocolViolation`; after that it sends nothing more in this session.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import ProtocolViolation
from common.link.signing import Identity, Trust
from common.secagg import keys, shamir
from common.secagg.masks import apply_masks
from common.secagg.messages import (
    TAG_BYTES,
    Advertisement,
    Confirmation,
    Confirmations,
    Delivery,
    EncryptedShares,
    Roster,
    Survivors,
    Unmasking,
)
from common.secagg.ring import RingVector
from common.secagg.roster import Members, is_signed
from common.secagg.seeds import commitment, pairwise_seed, self_mask_seed
from common.secagg.session import Session

__all__ = [
    "Advertised",
    "ConsistencyChecked",
    "MaskedInput",
    "ReceivedShares",
    "SharedKeys",
    "advertise_keys",
]

Randomness = Callable[[int], bytes]


class _Once:
    """Whether a state was used; copying or pickling one fails, as it does for a lock."""

    def __init__(self) -> None:
        self._lock = Lock()

    def use(self, code: str, what: str) -> None:
        if not self._lock.acquire(blocking=False):
            raise ProtocolViolation(
                code,
                f"this holder was asked {what} a second time; it answers once in a session, "
                "so the round must go on without it",
            )


@dataclass(frozen=True)
class _State:
    """What every state of a holder knows.

    Args:
        session: of the round.
        name: the holder's own.
    """

    session: Session
    name: str
    _once: _Once = field(default_factory=_Once, init=False, repr=False, compare=False)


@dataclass(frozen=True)
class _Secrets:
    """What a holder made for this session."""

    box_key: X25519PrivateKey = field(repr=False)  # c_u^SK
    mask_key: X25519PrivateKey = field(repr=False)  # s_u^SK
    self_mask: bytes = field(repr=False)  # b_u


@dataclass(frozen=True)
class _Shares:
    """A share of one holder's two secrets."""

    mask_key: int = field(repr=False)  # s_{v,u}^SK
    self_mask: int = field(repr=False)  # b_{v,u}

    def to_bytes(self) -> bytes:
        return b"".join(
            share.to_bytes(shamir.SHARE_BYTES, "big") for share in (self.mask_key, self.self_mask)
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> _Shares:
        first, second = data[: shamir.SHARE_BYTES], data[shamir.SHARE_BYTES :]
        shares = cls(int.from_bytes(first, "big"), int.from_bytes(second, "big"))
        if len(data) != 2 * shamir.SHARE_BYTES or max(shares.mask_key, shares.self_mask) >= (
            shamir.PRIME
        ):
            raise ValueError("not two shares")
        return shares


def advertise_keys(
    session: Session, identity: Identity, trust: Trust, randomness: Randomness = os.urandom
) -> tuple[Advertised, Advertisement]:
    """AdvertiseKeys: make this session's keys, and sign their public halves.

    Args:
        session: as the holder derives it from the plan that it agreed to.
        identity: the holder's own.
        trust: whose credentials count.
        randomness: n → n bytes; anything but the operating system's is for simulations only.
    """
    secrets = _Secrets(
        keys.private_key(randomness(keys.KEY_BYTES)),
        keys.private_key(randomness(keys.KEY_BYTES)),
        randomness(keys.KEY_BYTES),
    )
    unsigned = Advertisement(
        session.digest[:TAG_BYTES],
        identity.credential,
        keys.public(secrets.box_key),
        keys.public(secrets.mask_key),
        signature=b"",
    )
    advertisement = replace(unsigned, signature=identity.sign(unsigned.signed(session)))
    state = Advertised(session, advertisement.name, identity, trust, secrets, advertisement)
    return state, advertisement


@dataclass(frozen=True)
class Advertised(_State):
    """Keys were advertised; the roster is awaited."""

    identity: Identity
    trust: Trust
    secrets: _Secrets
    advertisement: Advertisement

    def share_keys(self, roster: Roster) -> tuple[SharedKeys, EncryptedShares]:
        """ShareKeys: check the roster, share both secrets among the neighbours.

        Raises:
            ProtocolViolation: ``"swapped-keys"``: a signature is wrong, or the holder's own entry
                is missing or changed; ``"replay"``: keys of another session; ``"lone-holder"``: one
                holder in several places, or in the only one; ``"threshold"``: fewer than the
                threshold, or more than the cohort.
            Refusal: ``"identity"`` or ``"roster"``: a holder that is not trusted, or not pinned.
        """
        self._once.use("out-of-order", "to share keys")
        members = Members.of(self.session, roster, self.trust)
        if self.advertisement not in roster.advertisements:
            raise ProtocolViolation(
                "swapped-keys",
                "the roster does not show the keys that this holder has advertised; what others "
                "encrypt for it somebody else could read, so nothing is sent",
            )
        shared = self._share(members)
        agreed = self._agree(members)
        boxes = {
            peer: keys.seal(
                _box_key(self.session, secret, self.name, peer),
                shared[peer].to_bytes(),
                _box_context(self.session, members, self.name, peer),
            )
            for peer, secret in agreed.items()
        }
        state = SharedKeys(
            self.session,
            self.name,
            self.identity,
            self.secrets,
            members,
            {
                peer: _box_key(self.session, secret, peer, self.name)
                for peer, secret in agreed.items()
            },
            shared[self.name],
        )
        return state, EncryptedShares(commitment(self.session, self.secrets.self_mask), boxes)

    def _share(self, members: Members) -> Mapping[str, _Shares]:
        """Shares of this holder's secrets, one pair for each of its neighbourhood."""
        holders = members.graph.neighbourhood(self.name)
        needed = self.session.shares_needed
        mask_key, self_mask = (
            shamir.split(secret, needed, len(holders))
            for secret in (self.secrets.mask_key.private_bytes_raw(), self.secrets.self_mask)
        )
        return dict(zip(holders, map(_Shares, mask_key, self_mask), strict=True))

    def _agree(self, members: Members) -> Mapping[str, bytes]:
        """KA.agree(c_u^SK, c_v^PK) for every neighbour."""
        return {
            peer: _agreed(self.secrets.box_key, members.keys[peer][0], peer)
            for peer in members.graph.peers(self.name)
        }


@dataclass(frozen=True)
class SharedKeys(_State):
    """Secrets were shared; the neighbours' shares are awaited."""

    identity: Identity
    secrets: _Secrets
    members: Members
    box_keys: Mapping[str, bytes] = field(repr=False)  # sender → key of its box
    own: _Shares

    def receive_shares(self, delivery: Delivery) -> ReceivedShares:
        """MaskedInputCollection, before there is an input: open the boxes of U2.

        Figure 4 opens them in Unmasking. Here a holder that was sent a damaged share drops out
        before its input is made, let alone counted: when that costs least.

        Args:
            delivery: the boxes of those that are in U2.

        Raises:
            ProtocolViolation: ``"threshold"``: U2 is too small; ``"tampered-shares"``: a box is not
                what its sender sealed for this holder; ``"roster"``: from somebody who is no
                neighbour.
        """
        self._once.use("out-of-order", "for its masked input")
        shares = {self.name: self.own}
        for sender, box in delivery.boxes.items():
            shares[sender] = self._opened(sender, box)
        if len(shares) < self.session.shares_needed:
            raise ProtocolViolation(
                "threshold",
                f"{len(shares)} of this holder's neighbourhood shared keys, "
                f"{self.session.shares_needed} are needed",
            )
        agreed = {
            peer: _agreed(self.secrets.mask_key, self.members.keys[peer][1], peer)
            for peer in delivery.boxes
        }
        return ReceivedShares(
            self.session, self.name, self.identity, self.secrets, self.members, shares, agreed
        )

    def _opened(self, sender: str, box: bytes) -> _Shares:
        if sender not in self.box_keys:
            raise ProtocolViolation(
                "roster", f"shares came from {sender!r}, who is no neighbour of this holder"
            )
        context = _box_context(self.session, self.members, sender, self.name)
        try:
            return _Shares.from_bytes(keys.open_box(self.box_keys[sender], box, context))
        except ValueError:
            raise ProtocolViolation(
                "tampered-shares",
                f"the shares delivered from {sender!r} are not what it sealed for this holder in "
                "this session; they were changed, exchanged or are old, so no input is sent",
            ) from None


@dataclass(frozen=True)
class ReceivedShares(_State):
    """The neighbours' shares are here and good; the input is awaited."""

    identity: Identity
    secrets: _Secrets
    members: Members
    shares: Mapping[str, _Shares] = field(repr=False)  # of U2 among the neighbourhood
    agreed: Mapping[str, bytes] = field(repr=False)  # KA.agree(s_u^SK, s_v^PK) of the same

    def masked_input(
        self, vector: RingVector, model: bytes = b""
    ) -> tuple[MaskedInput, RingVector]:
        """MaskedInputCollection: y_u = x_u + PRG(b_u) + Σ ±PRG(s_{u,v}), over the neighbours in U2.

        Args:
            vector: x_u, encoded: [D] uint32 or uint64; it is not changed.
            model: digest of what the coordinator sent for the input to be made of. Only inputs that
                were made of the same come out in a sum.

        Returns:
            The next state, and y_u of the same shape and type.
        """
        self._once.use("out-of-order", "for its masked input")
        masked = vector.copy()
        added, subtracted = self._seeds(model)
        apply_masks(masked, added=added, subtracted=subtracted)
        state = MaskedInput(
            self.session, self.name, self.identity, self.members, self.shares, model
        )
        return state, masked

    def _seeds(self, model: bytes) -> tuple[list[bytes], list[bytes]]:
        """Seeds of the masks that are added and subtracted; of a pair, the first name adds."""
        added = [self_mask_seed(self.session, self.secrets.self_mask)]
        subtracted: list[bytes] = []
        for peer, agreed in self.agreed.items():
            seed = pairwise_seed(self.session, agreed, self.name, peer, model)
            (added if self.name < peer else subtracted).append(seed)
        return added, subtracted


@dataclass(frozen=True)
class MaskedInput(_State):
    """The masked input was sent; the survivors are awaited."""

    identity: Identity
    members: Members
    shares: Mapping[str, _Shares] = field(repr=False)  # of U2 among the neighbourhood
    model: bytes

    def consistency_check(self, survivors: Survivors) -> tuple[ConsistencyChecked, Confirmation]:
        """ConsistencyCheck: sign the one list of survivors that this holder will ever accept.

        Beyond figure 4, every survivor must keep enough surviving neighbours: else the coordinator
        could call all of somebody's neighbours dropped, and take their masks off its input.

        Raises:
            ProtocolViolation: ``"survivor-lists"``: a second list, or one with strangers, without
                this holder, or with a neighbour that never shared keys; ``"threshold"``: too few.
        """
        self._once.use("survivor-lists", "to confirm survivors")
        self._check(survivors.names)
        signature = self.identity.sign(self.members.confirmed(survivors.names, self.model))
        state = ConsistencyChecked(
            self.session, self.name, self.members, self.shares, survivors.names, self.model
        )
        return state, Confirmation(signature)

    def _check(self, survivors: frozenset[str]) -> None:
        session, members = self.session, self.members
        if self.name not in survivors:
            raise ProtocolViolation(
                "survivor-lists",
                "this holder sent its masked input and is not among the survivors; its shares "
                "could unmask an input that others are told is not there",
            )
        neighbours = frozenset(members.graph.neighbourhood(self.name))
        if not survivors <= members.keys.keys() or not survivors & neighbours <= self.shares.keys():
            raise ProtocolViolation(
                "survivor-lists",
                "the survivors include somebody who is not in the roster or has shared no keys",
            )
        if len(survivors) < session.threshold:
            raise ProtocolViolation(
                "threshold",
                f"{len(survivors)} holders are said to survive, {session.threshold} are needed; a "
                "sum of fewer says too much about each",
            )
        poorest = members.graph.poorest(survivors)
        if poorest < session.shares_needed:
            raise ProtocolViolation(
                "threshold",
                f"a survivor would keep only {poorest} of its neighbourhood, "
                f"{session.shares_needed} are needed to hide its input",
            )


@dataclass(frozen=True)
class ConsistencyChecked(_State):
    """One list of survivors was signed; the others' signatures are awaited."""

    members: Members
    shares: Mapping[str, _Shares] = field(repr=False)
    survivors: frozenset[str]
    model: bytes

    def unmask(self, confirmations: Confirmations) -> Unmasking:
        """Unmasking: of each neighbour a share of b_v if it survives, of s_v^SK if it dropped out.

        Raises:
            ProtocolViolation: ``"both-kinds-of-share"``: asked again; ``"survivor-lists"``: a
                signature of a stranger, or for other survivors or another roster;
                ``"threshold"``: too few signatures.
        """
        self._once.use("both-kinds-of-share", "for shares")
        self._check(confirmations.signatures)
        alive = {n: s.self_mask for n, s in self.shares.items() if n in self.survivors}
        dropped = {n: s.mask_key for n, s in self.shares.items() if n not in self.survivors}
        return Unmasking(alive, dropped)

    def _check(self, signatures: Mapping[str, bytes]) -> None:
        message = self.members.confirmed(self.survivors, self.model)
        for name, signature in signatures.items():
            if name not in self.survivors or not is_signed(
                self.members.signers[name], signature, message
            ):
                raise ProtocolViolation(
                    "survivor-lists",
                    f"{name!r} has not confirmed the survivors that this holder was shown, and the "
                    "model that it was sent; it may have been given others, so no share is sent",
                )
        if len(signatures) < self.session.threshold:
            raise ProtocolViolation(
                "threshold",
                f"{len(signatures)} holders confirmed the survivors, {self.session.threshold} are "
                "needed to know that all were shown the same",
            )


def _agreed(private: X25519PrivateKey, public: bytes, peer: str) -> bytes:
    try:
        return keys.agree(private, public)
    except ValueError:
        raise ProtocolViolation(
            "swapped-keys", f"{peer!r} advertised a key with which everybody agrees on the same"
        ) from None


def _box_key(session: Session, agreed: bytes, sender: str, recipient: str) -> bytes:
    return keys.derive(agreed, session.context("box", sender, recipient))


def _box_context(session: Session, members: Members, sender: str, recipient: str) -> bytes:
    """Authenticated with a box: the u and v that figure 4 puts into it, and the roster."""
    return session.context("shares", members.roster.digest, sender, recipient)
