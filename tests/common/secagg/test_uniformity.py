"""What the coordinator sees of one masked update cannot be told from uniform, and what fails can.

Every test is put to the protocol's own masks and to masks that are broken, each of which must be
caught by at least one test: no mask, one mask used twice, and masks of 28 random bits, which is
what Flower's SecAgg+ has. A generator like AES hides 28 bits from tests of bytes. The coordinator
knows the generator, though, and of 2^16 masks with 28 bits, chance makes 2^32 / 2 / 2^28 = 8 pairs
alike.

All randomness is seeded but the coefficients of Shamir's polynomials, which no mask depends on. A
test rejects uniform bytes with probability below 1e-6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.secagg import holder as holding
from common.secagg import keys
from common.secagg.coordinator import AdvertiseKeys
from common.secagg.masks import add_mask
from common.secagg.seeds import pairwise_seed
from tests.common.secagg.rounds import TRUST, identities_of, names_of, seeded, session_of

REJECT = 1e-6
DIMENSION = 2**16
NAMES = names_of(4)
IDENTITIES = identities_of(4)

ZEROS = np.zeros(DIMENSION, np.uint32)
LARGEST = np.full(DIMENSION, 2**31 - 1, np.uint32)
RAMP = np.arange(DIMENSION, dtype=np.uint32) << np.uint32(16)
CHOSEN = [ZEROS, LARGEST, RAMP]
"""Inputs that the coordinator may have chosen, and that show if anything does."""


def masked(vector: Any, number: int) -> Any:
    """What the coordinator receives of the first of four holders in round ``number``."""
    session = session_of(4, round=number)
    advertise = AdvertiseKeys(session, len(vector), np.uint32, TRUST)
    states: dict[str, Any] = {}
    for identity in IDENTITIES:
        name = identity.credential.name
        randomness = seeded("holder", name, number)
        states[name], sent = holding.advertise_keys(session, identity, TRUST, randomness)
        advertise.receive(name, sent)
    sharing = advertise.close()
    for name in NAMES:
        states[name], shares = states[name].share_keys(sharing.roster)
        sharing.receive(name, shares)
    delivery = sharing.close().deliveries[NAMES[0]]
    return states[NAMES[0]].receive_shares(delivery).masked_input(vector)[1]


def unmasked(vector: Any, number: int) -> Any:
    return vector


def masked_alike(vector: Any, number: int) -> Any:
    """With the mask of the first round in every round."""
    copy = vector.copy()
    add_mask(copy, bytes(32))
    return copy


def of_28_bits(vector: Any, number: int) -> Any:
    """With a mask that 28 random bits determine."""
    bits = int.from_bytes(hashlib.sha256(b"%d" % number).digest()[:4], "big") >> 4
    copy = vector.copy()
    add_mask(copy, hashlib.sha256(bits.to_bytes(4, "big")).digest())
    return copy


Mask = Callable[[Any, int], Any]


def bytes_are_uniform(words: Any) -> float:
    """p-value of Pearson's chi-square: 255 degrees of freedom, 1024 bytes of each expected."""
    counts = np.bincount(words.view(np.uint8), minlength=256)
    return float(stats.chisquare(counts).pvalue)


def bits_are_fair(words: Any) -> float:
    """p-value of the most uneven of 32 bits, each Binomial(D, 1/2); Bonferroni over the bits."""
    ones = [int(np.count_nonzero(words & np.uint32(1 << bit))) for bit in range(32)]
    return min(1.0, 32 * min(stats.binomtest(count, len(words)).pvalue for count in ones))


def neighbours_are_independent(words: Any) -> float:
    """p-value of the bytes of differences between neighbouring words."""
    return bytes_are_uniform(np.diff(words, append=words[:1]))


VIEWS = {
    "bytes": bytes_are_uniform,
    "bits": bits_are_fair,
    "neighbours": neighbours_are_independent,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("vector", CHOSEN, ids=["zeros", "largest", "ramp"])
def test_one_masked_update_looks_uniform_whatever_the_input(view: str, vector: Any) -> None:
    assert VIEWS[view](masked(vector, 1)) > REJECT
    assert VIEWS[view](unmasked(vector, 1)) < REJECT  # the control


@pytest.mark.parametrize("view", VIEWS)
def test_two_maskings_of_one_input_have_nothing_in_common(view: str) -> None:
    assert VIEWS[view](masked(RAMP, 1) - masked(RAMP, 2)) > REJECT
    assert VIEWS[view](masked_alike(RAMP, 1) - masked_alike(RAMP, 2)) < REJECT  # the control
    # A mask used again looks uniform as long as it is seen once.
    assert VIEWS[view](masked_alike(RAMP, 1)) > REJECT


def test_holders_of_the_same_secrets_are_masked_anew_in_every_round() -> None:
    """Nothing but the round's number differs: the keys are made of it."""
    agreed = bytes(range(32))
    vectors = [np.zeros(DIMENSION, np.uint32) for _ in range(2)]
    for number, vector in enumerate(vectors, 1):
        add_mask(vector, pairwise_seed(session_of(4, round=number), agreed, *NAMES[:2]))

    assert bytes_are_uniform(vectors[0] - vectors[1]) > REJECT


SESSIONS = 2**16
SESSION = session_of(4)
INPUT = np.zeros(4, np.uint32)
PEER = keys.public(keys.private_key(bytes(range(32))))


def agreed_upon(vector: Any, number: int) -> Any:
    """Masked as a holder does it for one neighbour: from 32 random bytes on."""
    private = keys.private_key(hashlib.sha256(b"holder %d" % number).digest())
    copy = vector.copy()
    add_mask(copy, pairwise_seed(SESSION, keys.agree(private, PEER), *NAMES[:2]))
    return copy


def pairs_alike(mask: Mask) -> int:
    """How many of 2^16 maskings of one chosen input were seen before."""
    return SESSIONS - len({mask(INPUT, number).tobytes() for number in range(SESSIONS)})


def test_masks_do_not_repeat_as_those_of_28_bits_do() -> None:
    """With 128 bits seen of each, chance makes two alike with probability 2^31 / 2^128.

    Of 28 bits, 8 pairs are expected; none would have probability exp(-8), and the seed of the
    control is one that has some.
    """
    assert pairs_alike(agreed_upon) == 0
    assert pairs_alike(of_28_bits) > 0
    # Tests of bytes do not catch the control: it is the generator that makes them uniform.
    assert bytes_are_uniform(of_28_bits(ZEROS, 0)) > REJECT
