"""Honest holders and an honest coordinator: sums are exact, or they do not come about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import AggregationFailed, BelowThreshold
from common.secagg.graph import graph_for
from common.secagg.messages import Advertisement, EncryptedShares, Unmasking
from common.secagg.ring import Encoding
from common.secagg.session import Session, Stage
from tests.common.secagg.rounds import Round, names_of, session_of, total_of, vectors

STAGES = list(Stage)
BEFORE_THE_SUM = STAGES[:3]
"""Who is silent at one of these is not in the sum."""


def summed(drops: Mapping[str, Stage], names: list[str]) -> list[str]:
    return [name for name in names if drops.get(name) not in BEFORE_THE_SUM]


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Session, dict[str, Stage], type]:
    """A session of 2 to 64 holders, and as many dropouts, anywhere, as its threshold allows."""
    cohort = draw(st.integers(2, 64))
    session = session_of(cohort, draw(st.integers(max(2, 2 * cohort // 3 + 1), cohort)))
    dropping = draw(st.integers(0, cohort - session.threshold))
    dropped = draw(st.permutations(names_of(cohort)))[:dropping]
    drops = {name: draw(st.sampled_from(STAGES)) for name in dropped}
    return session, drops, draw(st.sampled_from([np.uint32, np.uint64]))


@settings(max_examples=25, deadline=None)
@given(rounds(), st.integers(0, 2**32))
@example((session_of(2), {}, np.uint32), 0)
@example((session_of(64), dict(zip(names_of(21), 5 * STAGES, strict=False)), np.uint64), 0)
def test_sums_are_exact_in_the_ring_whoever_drops_out(
    case: tuple[Session, dict[str, Stage], type], seed: int
) -> None:
    session, drops, dtype = case
    names = names_of(session.cohort)
    inputs = vectors(names, 7, dtype, seed)

    one = Round(session, inputs, drops)

    np.testing.assert_array_equal(one.run(), total_of(inputs, summed(drops, names)))
    assert not one.rejected


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_the_round_fails_and_says_where(stage: Stage) -> None:
    session, names = session_of(8), names_of(8)
    drops = dict.fromkeys(names[:3], stage)

    with pytest.raises(BelowThreshold) as caught:
        Round(session, vectors(names, 4, np.uint32), drops).run()

    assert str(caught.value) == (
        f"secure aggregation: 5 of 8 holders remained at {stage}, 6 are needed"
    )


def test_dropouts_add_up_over_the_stages() -> None:
    session, names = session_of(8), names_of(8)
    drops = dict(
        zip(names, [Stage.ADVERTISE_KEYS, Stage.SHARE_KEYS, Stage.UNMASKING], strict=False)
    )

    with pytest.raises(BelowThreshold, match="5 of 7 holders remained at Unmasking, 6 are needed"):
        Round(session, vectors(names, 4, np.uint32), drops).run()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(3, 12),
    st.sampled_from([32, 64]),
    st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=5),
)
def test_real_numbers_come_out_as_the_sum_of_their_roundings(
    cohort: int, width: int, values: list[float]
) -> None:
    encoding = Encoding(32 if width == 32 else 64, 2.0**-20, 2**20, cohort)
    names = names_of(cohort)
    real = {name: np.roll(values, i) for i, name in enumerate(names)}
    rounded = {n: np.rint(v / encoding.step).astype(np.int64) for n, v in real.items()}

    total = Round(session_of(cohort), {n: encoding.encode(v) for n, v in real.items()}).run()

    expected = sum(rounded.values(), np.zeros(len(values), np.int64))
    np.testing.assert_array_equal(encoding.decode_integers(total), expected)


# k = 12 and t = 10: a neighbourhood of 13 that loses any 3 keeps 10, and of the 12 neighbours of
# one of these 3, at least 10 remain.
RING = session_of(20, 17, neighbours=12, share_threshold=10)


@settings(max_examples=25, deadline=None)
@given(st.permutations(names_of(20)), st.lists(st.sampled_from(STAGES), max_size=3))
def test_sums_are_exact_on_the_neighbour_graph(order: list[str], stages: list[Stage]) -> None:
    names = names_of(20)
    drops = dict(zip(order, stages, strict=False))
    inputs = vectors(names, 5, np.uint32)

    total = Round(RING, inputs, drops).run()

    np.testing.assert_array_equal(total, total_of(inputs, summed(drops, names)))


def test_a_neighbourhood_that_loses_too_many_fails_the_round_with_a_sentence() -> None:
    session = session_of(40, 30, neighbours=12, share_threshold=12)
    names = names_of(40)
    one = Round(session, vectors(names, 4, np.uint32))
    sharing = one.advertised()
    ring = sharing._members.graph.ring
    one.drops = dict.fromkeys(ring[:4], Stage.MASKED_INPUT)

    with pytest.raises(AggregationFailed, match="kept only 9 of its neighbourhood"):
        one.unmask(one.check(one.mask(one.share(sharing))))


@pytest.mark.slow
def test_a_thousand_holders_with_the_neighbour_graph() -> None:
    plan = graph_for(1000, dropped=0.05)
    session = session_of(
        1000, 950, neighbours=plan.neighbours, share_threshold=plan.share_threshold
    )
    names = names_of(1000)
    drops = {name: STAGES[i % 5] for i, name in enumerate(names[::20])}
    inputs = vectors(names, 16, np.uint32)

    total = Round(session, inputs, drops, wire=False).run()

    assert len(drops) == 50
    np.testing.assert_array_equal(total, total_of(inputs, summed(drops, names)))


# -- holders that do not follow the protocol ---------------------------------------------------


def wrong_share(message: Unmasking) -> Unmasking:
    shares = {name: share ^ 1 for name, share in message.self_mask_shares.items()}
    keys = {name: share ^ 1 for name, share in message.mask_key_shares.items()}
    return Unmasking(shares, keys)


def test_a_wrong_share_is_found_out_and_the_sum_is_still_exact() -> None:
    session, names = session_of(10), names_of(10)
    inputs = vectors(names, 6, np.uint32)
    drops = {names[0]: Stage.MASKED_INPUT}
    tamper = {(names[1], Stage.UNMASKING): wrong_share, (names[4], Stage.UNMASKING): wrong_share}

    one = Round(session, inputs, drops, tamper=tamper)

    np.testing.assert_array_equal(one.run(), total_of(inputs, names[1:]))
    assert one.rejected.keys() == {names[1], names[4]}
    assert "share" in one.rejected[names[1]]


def test_wrong_shares_with_none_to_spare_fail_the_round() -> None:
    session, names = session_of(10), names_of(10)
    tamper = {(name, Stage.UNMASKING): wrong_share for name in names[:4]}

    with pytest.raises(AggregationFailed, match="did not follow the protocol"):
        Round(session, vectors(names, 6, np.uint32), tamper=tamper).run()


def test_a_seed_that_was_not_committed_to_fails_the_round() -> None:
    session, names = session_of(6), names_of(6)
    tamper = {(names[2], Stage.SHARE_KEYS): lambda sent: replace(sent, commitment=bytes(32))}

    with pytest.raises(AggregationFailed, match=f"of a secret of '{names[2]}'"):
        Round(session, vectors(names, 6, np.uint32), tamper=tamper).run()


def with_another_key(sent: Advertisement) -> Advertisement:
    return replace(sent, mask_key=bytes(31) + b"\x09")


def without_a_box(sent: EncryptedShares) -> EncryptedShares:
    return replace(sent, boxes=dict(list(sent.boxes.items())[1:]))


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        (Stage.ADVERTISE_KEYS, with_another_key),
        (Stage.SHARE_KEYS, without_a_box),
        (Stage.MASKED_INPUT, lambda vector: vector[:-1]),
        (Stage.MASKED_INPUT, lambda vector: vector.astype(np.uint64)),
        (Stage.CONSISTENCY_CHECK, lambda sent: replace(sent, signature=bytes(64))),
        (Stage.UNMASKING, lambda sent: replace(sent, self_mask_shares={})),
    ],
)
def test_a_bad_message_costs_its_holder_the_round_and_nobody_else(stage, change) -> None:
    session, names = session_of(8), names_of(8)
    inputs = vectors(names, 6, np.uint32)

    one = Round(session, inputs, tamper={(names[3], stage): change})
    total = one.run()

    kept = [n for n in names if n != names[3] or stage not in BEFORE_THE_SUM]
    np.testing.assert_array_equal(total, total_of(inputs, kept))
    assert one.rejected.keys() == {names[3]}


def test_a_key_that_everybody_agrees_with_is_not_taken() -> None:
    """A point of low order would make the masks that its owner shares with others public."""
    session, names = session_of(4), names_of(4)
    one = Round(session, vectors(names, 3, np.uint32))

    def low_order(sent: Advertisement) -> Advertisement:
        unsigned = replace(sent, mask_key=bytes(32))
        signature = one.holders[names[0]].sign(unsigned.signed(session))
        return replace(unsigned, signature=signature)

    one.tamper = {(names[0], Stage.ADVERTISE_KEYS): low_order}
    one.run()

    assert "everybody agrees" in one.rejected[names[0]]


def test_a_copied_key_is_not_taken() -> None:
    session, names = session_of(4), names_of(4)
    one = Round(session, vectors(names, 3, np.uint32))
    shown: list[Advertisement] = []

    def copied(sent: Advertisement) -> Advertisement:
        unsigned = replace(sent, box_key=shown[0].box_key)
        return replace(unsigned, signature=one.holders[sent.name].sign(unsigned.signed(session)))

    one.tamper = {
        (names[0], Stage.ADVERTISE_KEYS): lambda sent: shown.append(sent) or sent,
        (names[1], Stage.ADVERTISE_KEYS): copied,
    }
    one.run()

    assert "in the roster already" in one.rejected[names[1]]


def test_only_the_first_message_of_a_holder_counts() -> None:
    session, names = session_of(4), names_of(4)
    inputs = vectors(names, 3, np.uint32)
    one = Round(session, inputs)
    stage = one.share(one.advertised())
    receive = stage.receive
    stage.receive = lambda name, vector: [receive(name, vector) for _ in range(2)]  # type: ignore

    np.testing.assert_array_equal(one.unmask(one.check(one.mask(stage))), total_of(inputs, names))


def test_a_stranger_is_not_heard() -> None:
    session, names = session_of(4), names_of(4)
    one = Round(session, vectors(names, 3, np.uint32))
    stage = one.share(one.advertised())

    stage.receive("stranger", np.ones(3, np.uint32))

    assert stage.rejected == {"stranger": "it is not asked at MaskedInputCollection"}
