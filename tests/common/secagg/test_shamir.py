from __future__ import annotations

import random

import pytest
import shamirs
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg.shamir import ATTEMPTS, PRIME, combine, recover, split

secrets = st.binary(min_size=32, max_size=32)


def is_prime(number: int) -> bool:
    """Miller–Rabin with the first 40 primes as bases; enough for numbers nobody has chosen."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    bases = [p for p in range(2, 180) if all(p % q for q in range(2, p))][:40]

    def passes(base: int) -> bool:
        power = pow(base, odd, number)
        return power in (1, number - 1) or any(
            (power := power * power % number) == number - 1 for _ in range(twos - 1)
        )

    return all(map(passes, bases))


def test_the_field_is_the_least_that_holds_256_bits() -> None:
    assert [k for k in range(1, 298) if is_prime(2**256 + k)] == [297]
    assert PRIME == 2**256 + 297


@st.composite
def sharings(draw: st.DrawFn) -> tuple[bytes, int, dict[int, int]]:
    """A secret, its threshold, and as many of its shares as that."""
    count = draw(st.integers(2, 20))
    threshold = draw(st.integers(1, count))
    secret = draw(secrets)
    shares = split(secret, threshold, count)
    places = draw(st.permutations(range(1, count + 1)))[:threshold]
    return secret, threshold, {place: shares[place - 1] for place in places}


@settings(max_examples=50, deadline=None)
@given(sharings())
def test_any_threshold_of_shares_gives_the_secret_and_what_the_library_gives(case) -> None:
    secret, _, shares = case
    points = [shamirs.share(place, value, PRIME) for place, value in shares.items()]

    assert combine(shares) == secret
    assert int.from_bytes(secret, "big") == shamirs.interpolate(points)


@settings(max_examples=30, deadline=None)
@given(sharings(), secrets)
def test_one_share_fewer_fits_every_secret(case, other: bytes) -> None:
    """With any other secret in the place of one share, the rest are still on one polynomial."""
    _, _, shares = case
    *rest, last = shares
    if not rest:
        return
    known = {place: shares[place] for place in rest}
    at_last = _through({0: int.from_bytes(other, "big"), **known}, last)

    assert combine({**known, last: at_last}) == other


def _through(points: dict[int, int], x: int) -> int:
    """The polynomial through points, at ``x``, as in a textbook."""
    total = 0
    for i, value in points.items():
        weight = 1
        for j in points:
            if j != i:
                weight = weight * (x - j) * pow(i - j, -1, PRIME) % PRIME
        total += weight * value
    return total % PRIME


def test_the_largest_secret_and_a_share_beyond_256_bits() -> None:
    largest = b"\xff" * 32
    shares = split(largest, 2, 3)

    assert combine({1: shares[0], 3: shares[2]}) == largest
    # A line through PRIME - 1 at 0 gives no secret of 32 bytes.
    assert combine({1: PRIME - 1, 2: PRIME - 1}) is None


@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_wrong_shares_are_named_where_there_are_some_to_spare(wrong: int) -> None:
    secret = bytes(range(32))
    shares = dict(enumerate(split(secret, 8, 16), 1))
    chance = random.Random(wrong)
    liars = frozenset(chance.sample(range(1, 17), wrong))
    for place in sorted(liars):  # not all by one: two such errors may cancel out in the secret
        shares[place] = (shares[place] + chance.randrange(1, PRIME)) % PRIME

    found = recover(shares, 8, secret.__eq__)

    # A draw of 8 of 16 avoids 3 liars with probability C(13, 8) / C(16, 8) = 0.1; 200 draws all
    # fail with probability 7e-10.
    assert found is not None
    assert found.secret == secret
    assert found.wrong == liars


def test_a_suspect_is_asked_last() -> None:
    secret = bytes(range(32))
    shares = dict(enumerate(split(secret, 3, 5), 1))
    shares[1] ^= 1
    tried: list[bytes] = []

    def is_right(candidate: bytes) -> bool:
        tried.append(candidate)
        return candidate == secret

    assert recover(shares, 3, is_right, suspects={1}) is not None
    assert tried == [secret]


def test_the_search_for_a_secret_ends() -> None:
    shares = dict(enumerate(split(bytes(32), 5, 12), 1))
    tried: list[bytes] = []

    assert recover(shares, 5, lambda candidate: bool(tried.append(candidate))) is None
    assert len(tried) <= ATTEMPTS


def test_without_a_share_to_spare_there_is_one_attempt() -> None:
    shares = dict(enumerate(split(bytes(32), 5, 5), 1))
    tried: list[bytes] = []

    assert recover(shares, 5, lambda candidate: bool(tried.append(candidate))) is None
    assert len(tried) == 1
