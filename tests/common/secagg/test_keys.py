from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.secagg import keys
from common.secagg.masks import BLOCK_BYTES, add_mask, subtract_mask
from common.secagg.seeds import commitment, pairwise_seed, self_mask_seed
from tests.common.secagg.rounds import session_of

ONE, OTHER = (keys.private_key(bytes([number]) * 32) for number in (1, 2))


def test_both_ends_agree_and_nobody_else() -> None:
    secret = keys.agree(ONE, keys.public(OTHER))

    assert secret == keys.agree(OTHER, keys.public(ONE))
    assert secret != keys.agree(ONE, keys.public(ONE))


@pytest.mark.parametrize("point", [bytes(32), b"\x01" + bytes(31)])
def test_points_of_low_order_are_not_agreed_with(point: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # cryptography's own
        keys.agree(ONE, point)


def test_a_box_opens_with_its_key_and_context_only() -> None:
    key, other = keys.derive(bytes(32), b"one"), keys.derive(bytes(32), b"other")
    box = keys.seal(key, b"two shares", b"context")

    assert keys.open_box(key, box, b"context") == b"two shares"
    assert len(box) == len(b"two shares") + keys.SEAL_BYTES
    for wrong in ((other, box, b"context"), (key, box[:-1], b"context"), (key, box, b"contexts")):
        with pytest.raises(ValueError, match="not sealed"):
            keys.open_box(*wrong)


def test_seeds_differ_by_purpose_pair_and_round_and_not_by_order() -> None:
    session, later = session_of(4), session_of(4, round=2)
    secret = bytes(32)
    seeds = [
        pairwise_seed(session, secret, "a", "b"),
        pairwise_seed(session, secret, "a", "c"),
        pairwise_seed(later, secret, "a", "b"),
        self_mask_seed(session, secret),
        self_mask_seed(later, secret),
        commitment(session, secret),
    ]

    assert len(set(seeds)) == len(seeds)
    assert pairwise_seed(session, secret, "b", "a") == seeds[0]


@given(
    hnp.arrays(st.sampled_from([np.uint32, np.uint64]), st.integers(0, 40)),
    st.binary(min_size=32, max_size=32),
)
def test_a_mask_comes_off_again(vector, seed) -> None:
    masked = vector.copy()
    add_mask(masked, seed)
    assert len(vector) < 4 or (masked != vector).any()
    subtract_mask(masked, seed)

    np.testing.assert_array_equal(masked, vector)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_a_mask_is_the_key_stream_of_aes_in_little_endian_words(dtype: type) -> None:
    """Longer than two blocks, and not a multiple of one."""
    length = 2 * BLOCK_BYTES // np.dtype(dtype).itemsize + 5
    seed = bytes(range(32))
    masked = np.zeros(length, dtype)
    add_mask(masked, seed)
    cipher = Cipher(AES256(seed), CTR(bytes(16))).encryptor()
    stream = cipher.update(bytes(masked.nbytes))

    np.testing.assert_array_equal(masked, np.frombuffer(stream, np.dtype(dtype).newbyteorder("<")))
