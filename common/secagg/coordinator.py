"""The coordinator's side of Bonawitz et al. 2017, figure 4, round by round.

::

    AdvertiseKeys ─▶ ShareKeys ─▶ MaskedInputCollection ─▶ ConsistencyCheck ─▶ Unmasking ─▶ sum

Each stage collects one message of every holder that is still there: ``receive`` takes one as it
comes, ``close`` ends the stage and makes the next, whose attributes hold what is to be sent.
Nothing here reads or writes anything, or waits: how long is for the caller to decide.

A holder whose message is bad is as one that sent none: it costs itself the round, never the others.
Why is in ``rejected``. When too few remain, ``close`` raises
:class:`~common.errors.BelowThreshold`. Masked inputs are summed as they come, so memory is one
vector and not the cohort's. A share that is wrong is found out, by what its owner committed to, and
another is taken where there is one to spare; a sum is exact, or it does not come about.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Generic, TypeVar, cast

import numpy as np

from common.errors import AggregationFailed, BelowThreshold, Refusal, WireError
from common.link.signing import Trust
from common.secagg import keys, messages, shamir
from common.secagg.masks import add_mask, subtract_mask
from common.secagg.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Delivery,
    EncryptedShares,
    Roster,
    Survivors,
)
from common.secagg.ring import RingVector
from common.secagg.roster import Members, check_advertisement, is_signed
from common.secagg.seeds import commitment, pairwise_seed, self_mask_seed
from common.secagg.session import Session, Stage

__all__ = [
    "AdvertiseKeys",
    "ConsistencyCheck",
    "MaskedInputCollection",
    "ShareKeys",
    "Unmasking",
]

_ANYBODY = Trust()
_Message = TypeVar("_Message")
_Kept = TypeVar("_Kept")


class _Stage(ABC, Generic[_Message, _Kept]):
    """A stage: who may answer, and what is kept of the answers.

    Args:
        session: of the round.
        expected: holders that may answer; None for whoever does.
        rejected: holder → why its message was not taken, so far.
    """

    stage: ClassVar[Stage]

    def __init__(
        self,
        session: Session,
        expected: Iterable[str] | None = None,
        rejected: Mapping[str, str] | None = None,
    ) -> None:
        self.session = session
        self.expected = None if expected is None else frozenset(expected)
        self.rejected = dict(rejected or {})
        self._received: dict[str, _Kept] = {}

    def receive(self, name: str, message: _Message) -> None:
        """Take a holder's message; what is wrong with it ends up in ``rejected``.

        Args:
            name: of the holder that the link says it came from.
            message: as decoded. Of several the first counts.
        """
        if name in self._received or name in self.rejected:
            return
        if self.expected is not None and name not in self.expected:
            self.reject(name, f"it is not asked at {self.stage}")
            return
        try:
            self._received[name] = self._take(name, message)
        except (WireError, Refusal) as problem:
            self.reject(name, str(problem))

    def reject(self, name: str, sentence: str) -> None:
        """Count a holder as dropped, e.g. because its message could not be decoded."""
        self.rejected.setdefault(name, sentence)

    @abstractmethod
    def _take(self, name: str, message: _Message) -> _Kept:
        """What is to be kept of a message; WireError or Refusal if it is not right."""

    def _enough(self, of: int | None = None) -> None:
        if len(self._received) < self.session.threshold:
            raise BelowThreshold(
                self.stage,
                have=len(self._received),
                need=self.session.threshold,
                of=of or self.session.cohort,
            )


class AdvertiseKeys(_Stage[Advertisement, Advertisement]):
    """Round 0: public keys.

    Args:
        session: of the round.
        dimension: D, of the vectors to be summed.
        dtype: uint32 or uint64.
        trust: whose credentials count; by default those without certificates.
    """

    stage = Stage.ADVERTISE_KEYS

    def __init__(
        self,
        session: Session,
        dimension: int,
        dtype: np.dtype[np.uint32] | np.dtype[np.uint64] | type[np.uint32] | type[np.uint64],
        trust: Trust = _ANYBODY,
    ) -> None:
        super().__init__(session)
        self._sum = cast(RingVector, np.zeros(dimension, dtype=dtype))
        self._trust = trust
        self._probe = keys.private_key(os.urandom(keys.KEY_BYTES))
        self._seen: set[bytes] = set()

    def close(self) -> ShareKeys:
        """U1 is complete: who advertised takes part.

        Raises:
            BelowThreshold: too few did.
        """
        self._enough()
        roster = Roster(tuple(self._received[name] for name in sorted(self._received)))
        members = Members.of(self.session, roster, self._trust)
        return ShareKeys(members, self._sum, self.rejected)

    def _take(self, name: str, message: Advertisement) -> Advertisement:
        if message.name != name:
            raise WireError(f"it advertised keys as {message.name!r}")
        if len(self._received) == self.session.cohort:
            raise WireError(f"the cohort of {self.session.cohort} is complete")
        check_advertisement(self.session, message, self._trust)
        shown = {message.credential.signing_key, message.box_key, message.mask_key}
        if len(shown) < 3 or shown & self._seen:
            raise WireError("it advertised a key that is in the roster already")
        try:
            keys.agree(self._probe, message.box_key)
            keys.agree(self._probe, message.mask_key)
        except ValueError:
            raise WireError("it advertised a key with which everybody agrees on the same") from None
        self._seen |= shown
        return message


class ShareKeys(_Stage[EncryptedShares, EncryptedShares]):
    """Round 1: every holder's secrets, shared among its neighbours and encrypted for them.

    Attributes:
        roster: for every member.
    """

    stage = Stage.SHARE_KEYS

    def __init__(self, members: Members, zeros: RingVector, rejected: Mapping[str, str]) -> None:
        super().__init__(members.session, members.keys, rejected)
        self.roster = members.roster
        self._members = members
        self._sum = zeros

    def close(self) -> MaskedInputCollection:
        """U2 is complete: whose secrets are shared.

        Raises:
            BelowThreshold: too few are.
        """
        self._enough(len(self._members.keys))
        return MaskedInputCollection(self._members, self._received, self._sum, self.rejected)

    def _take(self, name: str, message: EncryptedShares) -> EncryptedShares:
        if message.boxes.keys() != set(self._members.graph.peers(name)):
            raise WireError("its shares are not for its neighbours, one for each")
        return message


class MaskedInputCollection(_Stage[RingVector, None]):
    """Round 2: masked inputs, summed as they come.

    Attributes:
        deliveries: holder in U2 → what its neighbours in U2 have encrypted for it.
    """

    stage = Stage.MASKED_INPUT

    def __init__(
        self,
        members: Members,
        shared: Mapping[str, EncryptedShares],
        zeros: RingVector,
        rejected: Mapping[str, str],
    ) -> None:
        super().__init__(members.session, shared, rejected)
        self.deliveries = {
            name: Delivery(
                {p: shared[p].boxes[name] for p in members.graph.peers(name) if p in shared}
            )
            for name in shared
        }
        self._members = members
        self._commitments = {name: message.commitment for name, message in shared.items()}
        self._sum = zeros

    def close(self, model: bytes = b"") -> ConsistencyCheck:
        """U3 is complete: whose input is in the sum.

        Args:
            model: digest of what the inputs were made of; see ``SharedKeys.masked_input``.

        Raises:
            BelowThreshold: too few are.
            AggregationFailed: one of them has lost too many neighbours.
        """
        self._enough(len(self._members.keys))
        survivors = frozenset(self._received)
        poorest, needed = self._members.graph.poorest(survivors), self.session.shares_needed
        if poorest < needed:
            raise AggregationFailed(
                f"secure aggregation: a holder kept only {poorest} of its neighbourhood at "
                f"{self.stage}, {needed} are needed; tolerate more dropouts in the plan"
            )
        return ConsistencyCheck(
            self._members, self._commitments, survivors, self._sum, self.rejected, model
        )

    def _take(self, name: str, message: RingVector) -> None:  # noqa: ARG002
        if message.dtype != self._sum.dtype or message.shape != self._sum.shape:
            raise WireError(
                f"its masked input is {message.dtype}{list(message.shape)}, expected "
                f"{self._sum.dtype}{list(self._sum.shape)}"
            )
        np.add(self._sum, message, out=self._sum)


class ConsistencyCheck(_Stage[Confirmation, Confirmation]):
    """Round 3: signatures for the list of survivors.

    Attributes:
        survivors: U3, for every one of them.
    """

    stage = Stage.CONSISTENCY_CHECK

    def __init__(
        self,
        members: Members,
        commitments: Mapping[str, bytes],
        survivors: frozenset[str],
        masked_sum: RingVector,
        rejected: Mapping[str, str],
        model: bytes,
    ) -> None:
        super().__init__(members.session, survivors, rejected)
        self.survivors = Survivors(survivors)
        self._members = members
        self._commitments = commitments
        self._sum = masked_sum
        self._message = members.confirmed(survivors, model)
        self._model = model

    def close(self) -> Unmasking:
        """U4 is complete: who confirmed the survivors.

        Raises:
            BelowThreshold: too few did.
        """
        self._enough(len(self._members.keys))
        signatures = {name: message.signature for name, message in self._received.items()}
        return Unmasking(
            self._members,
            self._commitments,
            self.survivors,
            Confirmations(signatures),
            self._sum,
            self.rejected,
            self._model,
        )

    def _take(self, name: str, message: Confirmation) -> Confirmation:
        if not is_signed(self._members.signers[name], message.signature, self._message):
            raise WireError("its signature is not for the survivors that it was sent")
        return message


class Unmasking(_Stage[messages.Unmasking, messages.Unmasking]):
    """Round 4: shares, from which the masks in the sum are computed and taken off.

    Attributes:
        confirmations: for every holder in U4.
    """

    stage = Stage.UNMASKING

    def __init__(
        self,
        members: Members,
        commitments: Mapping[str, bytes],
        survivors: Survivors,
        confirmations: Confirmations,
        masked_sum: RingVector,
        rejected: Mapping[str, str],
        model: bytes,
    ) -> None:
        super().__init__(members.session, confirmations.signatures, rejected)
        self._model = model
        self.confirmations = confirmations
        self._members = members
        self._commitments = commitments
        self._survivors = survivors.names
        self._dropped = frozenset(commitments) - survivors.names
        self._sum = masked_sum

    def close(self) -> RingVector:
        """The sum over U3: [D] in the ring.

        It costs one mask for every survivor, and for every holder that dropped out after ShareKeys
        one for each of its surviving neighbours.

        Raises:
            BelowThreshold: too few sent shares.
            AggregationFailed: a secret cannot be recovered: too many shares are wrong.
        """
        self._enough(len(self._members.keys))
        for name in sorted(self._survivors):
            secret = self._self_mask(name)
            subtract_mask(self._sum, self_mask_seed(self.session, secret))
        for name in sorted(self._dropped):
            self._take_off_masks_with(name, self._mask_key(name))
        return self._sum

    def _take(self, name: str, message: messages.Unmasking) -> messages.Unmasking:
        around = frozenset(self._members.graph.neighbourhood(name))
        if (
            message.self_mask_shares.keys() != around & self._survivors
            or message.mask_key_shares.keys() != around & self._dropped
        ):
            raise WireError("its shares are not those of its neighbours, one of each")
        return message

    def _self_mask(self, name: str) -> bytes:
        """b_v of a survivor, which is what it committed to."""
        shares = {
            holder: message.self_mask_shares[name]
            for holder, message in self._received.items()
            if name in message.self_mask_shares
        }
        return self._recovered(
            name, shares, lambda b: commitment(self.session, b) == self._commitments[name]
        )

    def _mask_key(self, name: str) -> bytes:
        """s_v^SK of a holder that dropped out, which belongs to what it advertised."""
        shares = {
            holder: message.mask_key_shares[name]
            for holder, message in self._received.items()
            if name in message.mask_key_shares
        }
        advertised = self._members.keys[name][1]
        return self._recovered(
            name, shares, lambda s: keys.public(keys.private_key(s)) == advertised
        )

    def _recovered(
        self, owner: str, shares: Mapping[str, int], is_right: Callable[[bytes], bool]
    ) -> bytes:
        """A holder's secret from the shares of its neighbourhood; who sent a wrong one is noted."""
        needed = self.session.shares_needed
        around = self._members.graph.neighbourhood(owner)
        places = {place: holder for place, holder in enumerate(around, 1) if holder in shares}
        recovered = len(shares) >= needed and shamir.recover(
            {place: shares[holder] for place, holder in places.items()},
            needed,
            is_right,
            suspects={place for place, holder in places.items() if holder in self.rejected},
        )
        if not recovered:
            raise AggregationFailed(
                f"secure aggregation: no {needed} of {len(shares)} shares of a secret of {owner!r} "
                "fit together; it, or those that sent them, did not follow the protocol"
            )
        for place in recovered.wrong:
            self.reject(places[place], f"its share of a secret of {owner!r} was wrong")
        return recovered.secret

    def _take_off_masks_with(self, name: str, secret: bytes) -> None:
        """Take the masks that survivors share with a dropped holder off the sum."""
        private = keys.private_key(secret)
        for peer in self._members.graph.peers(name):
            if peer not in self._survivors:
                continue
            agreed = keys.agree(private, self._members.keys[peer][1])
            seed = pairwise_seed(self.session, agreed, name, peer, self._model)
            # Of a pair, the first name has added it.
            (subtract_mask if peer < name else add_mask)(self._sum, seed)
