"""Shamir's secret sharing: any t shares give a secret back, t - 1 say nothing about it.

Shamir 1979, "How to share a secret", over the least prime above 2^256, so that a secret of 256 bits
is one element. Splitting is the library ``shamirs``. Its interpolation inverts once for every
pair of shares: 0.1 s for 43 of them, and a coordinator recombines hundreds of secrets. But a secret
is a linear function of its shares, whose weights, Lagrange's polynomials at 0, depend on nothing
but who answered, which is public; so the weights are computed here, with one inversion, once for
each set of answerers. The tests compare with the library's own interpolation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import shamirs

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "Recovered", "combine", "recover", "split"]

PRIME = 2**256 + 297
"""The least prime above 2^256."""

SECRET_BYTES = 32
SHARE_BYTES = 33
"""A share may be 2^256 or a little more, so it takes one byte more than a secret."""

ATTEMPTS = 200
"""Sets of shares that are tried before a secret is given up."""


def split(secret: bytes, threshold: int, shares: int) -> list[int]:
    """Shares of a secret, of which any ``threshold`` give it back.

    The polynomial's coefficients come from the operating system.

    Args:
        secret: 32 bytes.
        threshold: t.
        shares: how many; at least 2.

    Returns:
        The polynomial's values at 1, 2, …, ``shares``.
    """
    points = shamirs.shares(
        int.from_bytes(secret, "big"), shares, modulus=PRIME, threshold=threshold, compact=True
    )
    return [point.value for point in points]


def combine(shares: Mapping[int, int]) -> bytes | None:
    """The secret that shares belong to, if there are enough of them and none is wrong.

    Args:
        shares: place (1, 2, …) → value; exactly the threshold's number.

    Returns:
        32 bytes, which are no better than the shares; None where they give no secret of 32 bytes,
        so that one at least is wrong.
    """
    value = _value_at(0, shares)
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None


@dataclass(frozen=True)
class Recovered:
    """A secret, and who tried to spoil it.

    Args:
        secret: 32 bytes.
        wrong: the places whose shares are not of this secret; looked for only if some were in the
            way.
    """

    secret: bytes
    wrong: frozenset[int] = frozenset()


def recover(
    shares: Mapping[int, int],
    threshold: int,
    is_right: Callable[[bytes], bool],
    suspects: Set[int] = frozenset(),
) -> Recovered | None:
    """The secret, though some of the shares may be wrong.

    Tries sets of ``threshold`` shares until one gives a secret that ``is_right``: first one without
    suspects, then others; at most 200, so that a few wrong shares are found out wherever there are
    enough to spare, and the time is bounded where there are many.

    Args:
        shares: place → value, at least ``threshold``.
        threshold: t.
        is_right: tells the secret from others, by something that its owner committed to.
        suspects: places whose shares were wrong before; taken last.

    Returns:
        None where no set that was tried gives the right secret.
    """
    places = sorted(shares, key=lambda place: (place in suspects, place))
    for attempt, chosen in enumerate(islice(_choices(places, threshold), ATTEMPTS)):
        points = {place: shares[place] for place in sorted(chosen)}
        secret = combine(points)
        if secret is not None and is_right(secret):
            return Recovered(secret, _off(points, shares) if attempt else frozenset())
    return None


def _off(points: Mapping[int, int], shares: Mapping[int, int]) -> frozenset[int]:
    """The places of shares that are not on the polynomial through ``points``."""
    rest = shares.keys() - points.keys()
    return frozenset(place for place in rest if _value_at(place, points) != shares[place])


def _choices(places: list[int], threshold: int) -> Iterator[tuple[int, ...]]:
    """Sets of ``threshold`` places: the first ones, then, where there are others, any.

    They are drawn unpredictably, so that nobody can place wrong shares where no draw avoids them;
    of m shares, e wrong ones are avoided by about one draw in (m / (m - t))^e.
    """
    yield tuple(places[:threshold])
    draw = random.SystemRandom()
    while len(places) > threshold:
        yield tuple(draw.sample(places, threshold))


def _value_at(x: int, points: Mapping[int, int]) -> int:
    """The polynomial through ``points``, at ``x``."""
    weights = _weights(x, tuple(points))
    return sum(w * y for w, y in zip(weights, points.values(), strict=True)) % PRIME


@lru_cache(maxsize=1024)
def _weights(x: int, places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's polynomials of ``places`` at ``x``, which is none of them.

    w_i = ∏_{j≠i} (x - x_j) / (x_i - x_j) = ∏_j (x - x_j) / ((x - x_i) ∏_{j≠i} (x_i - x_j))
    """
    whole = math.prod(x - place for place in places) % PRIME
    below = [
        (x - place) * math.prod(place - other for other in places if other != place) % PRIME
        for place in places
    ]
    return tuple(whole * inverse % PRIME for inverse in _inverses(below))


def _inverses(values: list[int]) -> list[int]:
    """The inverses of all values for the price of one (Montgomery 1987, section 10.3.1)."""
    products = [1]
    for value in values:
        products.append(products[-1] * value % PRIME)
    inverse = pow(products[-1], -1, PRIME)
    inverses = []
    for value, product in zip(reversed(values), reversed(products[:-1]), strict=True):
        inverses.append(inverse * product % PRIME)
        inverse = inverse * value % PRIME
    return inverses[::-1]
