"""A holder in masked rounds: charged once, masked once, and never fooled by its coordinator."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.secure import MOST_RUNS, Participant
from client.state import HolderState
from common.errors import SottoError
from common.link.signing import Identity, Trust, signing_fingerprint
from common.privacy.accounting import epsilon
from common.privacy.events import Composition, Unprotected
from common.privacy.noise import OsRandomness, Randomness
from common.secagg.coordinator import AdvertiseKeys, MaskedInputCollection
from common.secagg.messages import Confirmations, Delivery, Roster, Survivors, Unmasking
from common.secagg.wire import model_digest
from common.wire import RoundRequest
from tests.masked import (
    NAMES,
    Declined,
    Round,
    clinic,
    contribution,
    deliveries,
    masked_plan,
)

ALL = Survivors(frozenset(NAMES)).to_bytes()


def everybody() -> dict[str, Participant]:
    return {name: clinic(name) for name in NAMES}


def collecting(one: Round) -> MaskedInputCollection:
    """An honest round up to where parts are collected, through the coordinator's own states."""
    aggregation = one.aggregation
    dtype = aggregation.encoding(one.plan).dtype
    advertising = AdvertiseKeys(one.session, aggregation.dimension, dtype, Trust())
    for each in one.advertise().advertisements:
        advertising.receive(each.name, each)
    sharing = advertising.close()
    for name, shares in one.share(sharing.roster).items():
        sharing.receive(name, shares)
    return sharing.close()


def whole(one: Round) -> np.ndarray:
    """An honest round to its end, through the coordinator's own states."""
    session, encoding = one.session, one.aggregation.encoding(one.plan)
    masking = collecting(one)
    for name in NAMES:
        masking.receive(name, one.masked(name, masking.deliveries[name].to_bytes()).vector)
    checking = masking.close(model_digest(one.parameters))
    for name in NAMES:
        checking.receive(name, one.confirm(name, checking.survivors.to_bytes()))
    unmasking = checking.close()
    for name in NAMES:
        body = one.step(name, "unmasking", unmasking.confirmations.to_bytes())
        unmasking.receive(name, Unmasking.from_bytes(body, session))
    return encoding.decode(unmasking.close())


def up_to_masked(one: Round) -> None:
    sent = deliveries(one.share(one.advertise()))
    for name in NAMES:
        one.masked(name, Delivery(sent[name]).to_bytes())


def up_to_confirmed(one: Round) -> bytes:
    up_to_masked(one)
    signatures = {name: one.confirm(name, ALL).signature for name in NAMES}
    return Confirmations(signatures).to_bytes()


def test_the_sum_is_that_of_the_holders_updates() -> None:
    one = Round(everybody(), masked_plan(no_dp=True))
    wanted = sum(contribution(holder, one) for holder in one.holders.values())
    ring = one.aggregation.ring
    assert ring is not None
    assert np.abs(whole(one) - wanted).max() <= len(NAMES) * ring.step / 2


def test_what_leaves_looks_like_nothing_in_particular() -> None:
    """The same update, masked in two runs: no number of one says anything about the other's."""
    first, second = everybody(), everybody()
    vectors = []
    for holders in (first, second):
        one = Round(holders, masked_plan(no_dp=True))
        sent = deliveries(one.share(one.advertise()))
        vectors.append(one.masked("a", Delivery(sent["a"]).to_bytes()).vector)
    assert not np.any(vectors[0] == vectors[1])


@pytest.mark.parametrize("kind", ["secure", "secure-sum"])
def test_a_masked_part_is_charged_before_it_leaves(kind: str, tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        holders = {**everybody(), "a": clinic("a", state, unprotected=False)}
        one = Round(holders, masked_plan(kind))
        sent = deliveries(one.share(one.advertise()))
        assert state.ledger.find("run/000001") is None, "keys and shares say nothing about data"
        one.masked("a", Delivery(sent["a"]).to_bytes())
        entry = state.ledger.find("run/000001")
        assert entry is not None
        assert entry.state == "committed"
        price = epsilon(Composition.of(one.plan.round_event()), 1e-4)
        assert 0 < price < 2.0
        assert holders["a"].holder.spent() == price


def test_without_privacy_a_masked_part_is_unprotected() -> None:
    """Masks hide it from the coordinator, not from whoever gets the model: no ε comes of them."""
    one = Round(everybody(), masked_plan(no_dp=True))
    up_to_masked(one)
    assert isinstance(one.plan.round_event(), Unprotected)
    assert one.holders["a"].holder.spent() == float("inf")


def test_no_update_is_kept_where_it_could_be_asked_for_again(tmp_path: Path) -> None:
    with HolderState.at(tmp_path) as state:
        one = Round({**everybody(), "a": clinic("a", state)}, masked_plan())
        up_to_masked(one)
        entry = state.ledger.find("run/000001")
        assert entry is not None
        stored = state.answers.get("run/000001", entry.reply_digest)
        assert stored is not None
        assert not stored.tensors


# -- what a coordinator may try -------------------------------------------------------------------


def test_an_unmasked_update_of_a_masked_plan_is_not_given() -> None:
    one = Round(everybody(), masked_plan())
    with pytest.raises(Declined, match=r"declined: aggregation: .* leaves masked or not at all"):
        one.send("a", one.request.records(), "train")
    assert one.holders["a"].holder.state.ledger.find("run/000001") is None


def test_a_plain_plan_has_no_masked_rounds() -> None:
    one = Round(everybody(), masked_plan())
    plain = masked_plan("plain", min_holders=2)
    one.plan = plain
    with pytest.raises(Declined, match="failed: WireError"):
        one.step("a", "advertise_keys")


@pytest.mark.parametrize(
    ("rules", "code"),
    [
        ({"aggregation": ("plain",)}, "aggregation"),
        ({"min_cohort": 4}, "cohort"),
        ({"unprotected": False, "budget": None}, "budget"),
        ({"min_noise_multiplier": 99.0}, "noise"),
    ],
)
def test_the_policy_is_asked_before_a_round_begins(rules: dict[str, object], code: str) -> None:
    one = Round({"a": clinic("a", **rules)}, masked_plan())
    with pytest.raises(Declined, match=f"declined: {code}: "):
        one.step("a", "advertise_keys")


def test_a_shrunken_threshold_is_refused() -> None:
    """A plan that lets two of four make a sum is no plan; a roster of two is too few for this."""
    one = Round(everybody(), masked_plan())
    shrunken = one.plan.model_copy(update={"min_holders": 2})
    with pytest.raises(Declined, match="failed: WireError"):
        replace(one, plan=shrunken).step("a", "advertise_keys")
    roster = one.advertise()
    with pytest.raises(Declined, match="declined: threshold: "):
        one.step("a", "share_keys", Roster(roster.advertisements[:2]).to_bytes())


def test_swapped_keys_are_noticed() -> None:
    """A coordinator in the middle that shows its own keys as b's."""
    one = Round(everybody(), masked_plan())
    other = Round({"b": clinic("b")}, one.plan)
    a, b, c, d = one.advertise().advertisements
    (own,) = other.advertise().advertisements
    forged = replace(own, credential=b.credential)
    with pytest.raises(Declined, match=r"declined: swapped-keys: .*'b'"):
        one.step("a", "share_keys", Roster((a, forged, c, d)).to_bytes())


def test_one_honest_holder_among_made_up_ones_is_refused_with_pins() -> None:
    """The authority is the coordinator's, so it can make holders up. It cannot make pins."""
    friends = {name: Identity.unsigned(name) for name in NAMES}
    own = {name: signing_fingerprint(one.credential) for name, one in friends.items()}
    pins = frozenset(own.values()) - {own["a"]}
    made_up = {name: clinic(name) for name in NAMES[1:]}
    honest = {"a": clinic("a", identity=friends["a"], pins=pins)}
    one = Round({**honest, **made_up}, masked_plan())
    with pytest.raises(Declined, match=r"declined: roster: .* not pinned"):
        one.step("a", "share_keys", one.advertise().to_bytes())
    # The control: with those who are pinned it goes on.
    known = {
        name: clinic(name, identity=friends[name], pins=frozenset(own.values()) - {own[name]})
        for name in NAMES
    }
    assert np.isfinite(whole(Round(known, masked_plan()))).all()


def test_one_holder_in_several_places_is_refused() -> None:
    twin = Identity.unsigned("b")
    holders = {name: clinic(name, identity=twin if name == "b" else None) for name in NAMES}
    one = Round(holders, masked_plan())
    a, b, _, d = one.advertise().advertisements
    with pytest.raises(Declined, match="declined: lone-holder: "):
        one.step("a", "share_keys", Roster((a, b, b, d)).to_bytes())


def test_keys_of_an_old_round_are_refused() -> None:
    holders = everybody()
    old = Round(holders, masked_plan(), number=1)
    stale = old.advertise()
    new = Round(holders, masked_plan(), number=2)
    a, _, c, d = new.advertise().advertisements
    mixed = Roster((a, stale.advertisements[1], c, d))
    with pytest.raises(Declined, match="declined: replay: "):
        new.step("a", "share_keys", mixed.to_bytes())


def test_a_step_of_an_old_round_is_out_of_order() -> None:
    holders = everybody()
    old = Round(holders, masked_plan(), number=1)
    confirmations = up_to_confirmed(old)
    Round(holders, masked_plan(), number=2).advertise()
    with pytest.raises(Declined, match="declined: out-of-order: round 1"):
        old.step("a", "unmasking", confirmations)


def test_different_survivors_for_different_holders_are_noticed() -> None:
    one = Round(everybody(), masked_plan())
    up_to_masked(one)
    without_d = Survivors(frozenset("abc"))
    signatures = {
        name: one.confirm(name, without_d.to_bytes() if name == "a" else ALL).signature
        for name in NAMES
    }
    shown = Confirmations({name: signatures[name] for name in "abc"}).to_bytes()
    with pytest.raises(Declined, match="declined: survivor-lists: "):
        one.step("a", "unmasking", shown)


def test_a_model_of_its_own_for_one_holder_is_noticed() -> None:
    """With one on which all others' updates vanish, the sum would be the last one's update."""
    one = Round(everybody(), masked_plan())
    sent = deliveries(one.share(one.advertise()))
    for name in NAMES:
        one.parameters = one.parameters * 0 if name != "a" else one.parameters + 1
        one.masked(name, Delivery(sent[name]).to_bytes())
    signatures = {name: one.confirm(name, ALL).signature for name in NAMES}
    for name in NAMES:
        with pytest.raises(Declined, match=r"declined: survivor-lists: .* model that it was sent"):
            one.step(name, "unmasking", Confirmations(signatures).to_bytes())


def test_a_second_list_of_survivors_is_not_signed() -> None:
    one = Round(everybody(), masked_plan())
    up_to_masked(one)
    one.confirm("a", ALL)
    with pytest.raises(Declined, match=r"declined: survivor-lists: .* a second time"):
        one.confirm("a", Survivors(frozenset("abc")).to_bytes())


def test_nobody_is_both_alive_and_dropped() -> None:
    """Flower's SecAgg+ answers that, and both secrets together take any mask off."""
    one = Round(everybody(), masked_plan())
    confirmations = up_to_confirmed(one)
    shown = Unmasking.from_bytes(one.step("a", "unmasking", confirmations), one.session)
    assert shown.self_mask_shares.keys() == set(NAMES)
    assert not shown.mask_key_shares
    some = Confirmations.from_bytes(confirmations, one.session).signatures
    again = Confirmations({name: some[name] for name in "abc"}).to_bytes()
    with pytest.raises(Declined, match="declined: both-kinds-of-share: "):
        one.step("a", "unmasking", again)


def test_the_same_request_delivered_twice_gets_the_same_bytes() -> None:
    """A link that breaks delivers again; nothing more is said than the first time."""
    one = Round(everybody(), masked_plan())
    roster = one.advertise()
    assert one.advertise("a").advertisements[0] == roster.advertisements[0]
    sent = deliveries(one.share(roster))
    delivery = Delivery(sent["a"]).to_bytes()
    first, second = (one.masked("a", delivery).vector for _ in range(2))
    assert np.array_equal(first, second)


def test_a_part_is_given_once_even_after_a_restart(tmp_path: Path) -> None:
    """A second sum without c beside one with c would be c's own part."""
    with HolderState.at(tmp_path) as state:
        up_to_masked(Round({**everybody(), "a": clinic("a", state)}, masked_plan()))
        spent = state.ledger.epsilon("patients", 1e-4)
    with HolderState.at(tmp_path) as state:
        one = Round({"a": clinic("a", state)}, masked_plan())
        with pytest.raises(Declined, match=r"declined: answered: .* round 1 has left already"):
            one.step("a", "advertise_keys")
        assert Round({"a": clinic("a", state)}, masked_plan(), number=2).advertise("a")
        assert state.ledger.epsilon("patients", 1e-4) == spent


def test_a_holder_that_is_started_again_has_dropped_out() -> None:
    one = Round(everybody(), masked_plan())
    roster = one.advertise()
    restarted = Round({"a": clinic("a")}, one.plan)
    with pytest.raises(
        Declined, match=r"declined: out-of-order: .* takes part from the next round"
    ):
        restarted.step("a", "share_keys", roster.to_bytes())


def test_another_model_in_the_same_step_is_refused() -> None:
    one = Round(everybody(), masked_plan())
    sent = deliveries(one.share(one.advertise()))
    delivery = Delivery(sent["a"]).to_bytes()
    one.masked("a", delivery)
    one.parameters = one.parameters + 1
    with pytest.raises(Declined, match="declined: "):
        one.masked("a", delivery)


def test_another_plan_in_the_middle_of_a_round_is_refused() -> None:
    one = Round(everybody(), masked_plan())
    sent = deliveries(one.share(one.advertise()))
    one.plan = masked_plan(learning_rate=0.1)
    with pytest.raises(Declined, match="declined: out-of-order: "):
        one.masked("a", Delivery(sent["a"]).to_bytes())


def test_a_coordinator_that_begins_many_runs_holds_no_memory() -> None:
    one = clinic("a")
    for number in range(3 * MOST_RUNS):
        Round({"a": one}, masked_plan(), run=f"run-{number}").advertise("a")
    assert len(one._rounds) == MOST_RUNS


def test_a_survivor_that_was_sent_another_model_is_not_unmasked_by_the_others() -> None:
    """b, c and d get one model and confirm it; a got another, and nobody needs its signature."""
    one = Round(everybody(), masked_plan(no_dp=True))
    session, encoding = one.session, one.aggregation.encoding(one.plan)
    masking = collecting(one)
    common, special = one.parameters, one.parameters + 1
    one.parameters = special
    a_alone = contribution(one.holders["a"], one)
    one.parameters = common
    others = sum(contribution(one.holders[name], one) for name in "bcd")
    for name in NAMES:
        one.parameters = special if name == "a" else common
        masking.receive(name, one.masked(name, masking.deliveries[name].to_bytes()).vector)
    checking = masking.close(model_digest(common))
    for name in "bcd":  # a is never asked again
        checking.receive(name, one.confirm(name, checking.survivors.to_bytes()))
    unmasking = checking.close()
    for name in "bcd":
        try:
            body = one.step(name, "unmasking", unmasking.confirmations.to_bytes())
        except Declined:
            return
        unmasking.receive(name, Unmasking.from_bytes(body, session))
    total = encoding.decode(unmasking.close())
    # Where `common` is a model on which updates vanish, `others` is zero.
    assert not np.allclose(total - others, a_alone, atol=1e-3)


def test_a_part_that_cannot_be_masked_costs_nothing() -> None:
    """One bad box, which any holder can send to any other, makes it pay for a lost round."""
    one = Round(everybody(), masked_plan())
    sent = deliveries(one.share(one.advertise()))
    broken = {**sent["a"], "d": bytes(len(sent["a"]["d"]))}
    with pytest.raises(Declined, match="tampered-shares"):
        one.masked("a", Delivery(broken).to_bytes())
    assert one.holders["a"].holder.state.ledger.find("run/000001") is None


def test_a_plan_for_another_dimension_costs_nothing() -> None:
    """As a request that no model here fits."""
    plan = masked_plan("secure-sum")
    wrong = plan.aggregation.model_copy(update={"dimension": plan.aggregation.dimension + 1})
    one = Round(
        everybody(),
        plan.model_copy(update={"aggregation": wrong}).calibrated(),
    )
    with pytest.raises(Declined, match="declined: model: "):
        one.advertise("a")


@pytest.mark.parametrize("kind", ["plain", "secure-sum"])
def test_two_processes_at_once_give_one_answer(kind: str, tmp_path: Path) -> None:
    """The second begins, and ends, while the first computes. Under "plain" that is refused."""
    plan = masked_plan(kind, **({"min_holders": 2} if kind == "plain" else {}))
    with HolderState.at(tmp_path) as first_state, HolderState.at(tmp_path) as second_state:
        first, second = clinic("a", first_state), clinic("a", second_state)
        request = Round({"a": first}, plan).request
        given: list[np.ndarray] = []

        def give(one: Participant) -> None:
            if kind == "plain":
                given.append(one.holder.train(request).update)
            else:
                given.append(one.holder.contribution(request).vector)

        def overtaken(_: RoundRequest) -> Randomness:
            give(second)
            return OsRandomness()

        first.holder.randomness = overtaken
        with suppress(SottoError):
            give(first)
        assert len(given) == 1 or np.array_equal(*given), "two sets of noise on one sum, one charge"
