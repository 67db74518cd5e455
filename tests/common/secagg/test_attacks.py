"""A coordinator that attacks: each attack is stopped by a holder, which says by which one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.errors import ConfigurationError, ProtocolViolation, Refusal
from common.link.signing import Identity, Trust, signing_fingerprint
from common.secagg import holder as holding
from common.secagg.messages import Confirmations, Delivery, Roster, Survivors
from common.secagg.session import Session
from tests.common.secagg.rounds import Round, identities_of, names_of, session_of, vectors

NAMES = names_of(8)
VICTIM = NAMES[0]


def a_round(session: Session | None = None, **fields: Any) -> Round:
    session = session or session_of(8)
    return Round(session, vectors(names_of(session.cohort), 4, np.uint32), wire=False, **fields)


def violation(attack: Callable[[], object]) -> ProtocolViolation:
    with pytest.raises(ProtocolViolation) as caught:
        attack()
    return caught.value


def roster_with(roster: Roster, name: str, **changes: Any) -> Roster:
    return Roster(
        tuple(replace(a, **changes) if a.name == name else a for a in roster.advertisements)
    )


# -- swapped keys ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["box_key", "mask_key"])
@pytest.mark.parametrize("whose", [NAMES[3], VICTIM])
def test_a_key_that_the_coordinator_swapped_is_refused(which: str, whose: str) -> None:
    one = a_round()
    roster = one.advertised().roster
    mine = holding.keys.public(holding.keys.private_key(bytes(32)))

    swapped = roster_with(roster, whose, **{which: mine})

    assert violation(lambda: one.states[VICTIM].share_keys(swapped)).code == "swapped-keys"


def test_a_roster_without_the_holder_itself_is_refused() -> None:
    one = a_round()
    roster = one.advertised().roster
    without = Roster(tuple(a for a in roster.advertisements if a.name != VICTIM))

    assert violation(lambda: one.states[VICTIM].share_keys(without)).code == "swapped-keys"


def test_a_key_with_which_everybody_agrees_on_the_same_is_refused() -> None:
    one = a_round()
    sharing, name = one.advertised(), NAMES[5]
    unsigned = replace(one.states[name].advertisement, mask_key=bytes(32))
    signed = replace(unsigned, signature=one.holders[name].sign(unsigned.signed(one.session)))
    one.states[name] = replace(one.states[name], advertisement=signed)  # a holder in league
    sharing.roster = Roster(
        tuple(signed if a.name == name else a for a in sharing.roster.advertisements)
    )
    delivery = one.share(sharing).deliveries[VICTIM]

    refused = violation(lambda: one.states[VICTIM].receive_shares(delivery))

    assert refused.code == "swapped-keys"
    assert "everybody agrees" in str(refused)


# -- a cohort of one honest holder -------------------------------------------------------------


def test_a_roster_of_the_holder_alone_is_refused() -> None:
    one = a_round()
    own = Roster(one.advertised().roster.advertisements[:1])

    assert violation(lambda: one.states[VICTIM].share_keys(own)).code == "lone-holder"


def test_one_holder_under_several_names_is_refused() -> None:
    """Every entry but the victim's is signed by one key, with fresh keys of the round."""
    session = session_of(8)
    real, clone = Identity.unsigned(VICTIM), Identity.unsigned("clone")
    state, own = holding.advertise_keys(session, real, Trust())
    others = []
    for name in NAMES[1:]:
        identity = Identity(replace(clone.credential, name=name), clone.key)
        others.append(holding.advertise_keys(session, identity, Trust())[1])

    refused = violation(lambda: state.share_keys(Roster((own, *others))))

    assert refused.code == "lone-holder"
    assert "one signing key" in str(refused)


@pytest.mark.parametrize("copied", ["name", "key of this round"])
def test_one_entry_in_several_places_is_refused(copied: str) -> None:
    one = a_round()
    ads = list(one.advertised().roster.advertisements)
    if copied == "name":
        ads[4] = ads[3]
    else:
        unsigned = replace(ads[4], box_key=ads[3].mask_key)
        signature = one.holders[NAMES[4]].sign(unsigned.signed(one.session))
        ads[4] = replace(unsigned, signature=signature)

    refused = violation(lambda: one.states[VICTIM].share_keys(Roster(tuple(ads))))

    assert refused.code == "lone-holder"
    assert copied in str(refused)


def test_holders_that_the_coordinator_made_up_are_refused_by_whoever_has_pinned_its_peers() -> None:
    """Six of the eight are the coordinator's own: nothing but a pin can tell."""
    session, identities = session_of(8), identities_of(8)
    pins = frozenset(signing_fingerprint(i.credential) for i in identities)
    made_up = [Identity.unsigned(name) for name in NAMES[2:]]
    taking_part = identities[:2] + made_up
    states = [holding.advertise_keys(session, i, Trust(None, pins)) for i in taking_part]
    roster = Roster(tuple(advertisement for _, advertisement in states))

    with pytest.raises(Refusal) as caught:
        states[0][0].share_keys(roster)
    assert caught.value.code == "roster"

    # The control: with nothing pinned, they are believed.
    state, _ = holding.advertise_keys(session, identities[0], Trust())
    state.share_keys(Roster((state.advertisement, *roster.advertisements[1:])))


def test_a_roster_out_of_order_is_refused() -> None:
    one = a_round()
    roster = Roster(one.advertised().roster.advertisements[::-1])

    assert violation(lambda: one.states[VICTIM].share_keys(roster)).code == "roster"


# -- replay ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        session_of(8, round=2),
        replace(session_of(8), run_id="another run"),
        replace(session_of(8), plan_digest="another plan"),
        session_of(8, 7),
        session_of(9, 7),
    ],
)
def test_keys_of_another_round_run_plan_or_threshold_are_refused(other: Session) -> None:
    one = a_round()
    roster = one.advertised().roster
    old = holding.advertise_keys(other, one.holders[NAMES[3]], Trust())[1]
    replayed = Roster(tuple(old if a.name == old.name else a for a in roster.advertisements))
    relabelled = roster_with(replayed, old.name, session=roster.advertisements[0].session)

    assert violation(lambda: one.states[VICTIM].share_keys(replayed)).code == "replay"
    assert violation(lambda: one.states[NAMES[1]].share_keys(relabelled)).code == "swapped-keys"


def test_shares_of_an_old_round_are_refused() -> None:
    identities = {i.credential.name: i for i in identities_of(8)}
    first, second = (a_round(session_of(8, round=r), identities=identities) for r in (1, 2))
    old = first.share(first.advertised()).deliveries[VICTIM]
    new = second.share(second.advertised()).deliveries[VICTIM]
    mixed = Delivery({**new.boxes, NAMES[3]: old.boxes[NAMES[3]]})

    refused = violation(lambda: second.states[VICTIM].receive_shares(mixed))

    assert refused.code == "tampered-shares"


def test_confirmations_of_an_old_round_are_refused() -> None:
    identities = {i.credential.name: i for i in identities_of(8)}
    first, second = (a_round(session_of(8, round=r), identities=identities) for r in (1, 2))
    old = first.check(first.mask(first.share(first.advertised()))).confirmations
    second.check(second.mask(second.share(second.advertised())))

    assert violation(lambda: second.states[VICTIM].unmask(old)).code == "survivor-lists"


# -- shares that are not what was sealed -------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda d, v: {**d[v].boxes, NAMES[3]: d[v].boxes[NAMES[4]]},  # another sender's
        lambda d, v: {**d[v].boxes, NAMES[3]: d[NAMES[5]].boxes[NAMES[3]]},  # for another
        lambda d, v: {**d[v].boxes, NAMES[3]: bytes(len(d[v].boxes[NAMES[3]]))},
        lambda d, v: {**d[v].boxes, NAMES[3]: b""},
    ],
)
def test_a_box_that_was_exchanged_or_changed_is_refused(change: Any) -> None:
    one = a_round()
    deliveries = one.share(one.advertised()).deliveries
    delivery = Delivery(change(deliveries, VICTIM))

    refused = violation(lambda: one.states[VICTIM].receive_shares(delivery))

    assert refused.code == "tampered-shares"
    assert NAMES[3] in str(refused)


def test_a_box_from_a_stranger_is_refused() -> None:
    one = a_round()
    delivery = one.share(one.advertised()).deliveries[VICTIM]
    delivery = Delivery({**delivery.boxes, "stranger": bytes(82)})

    refused = violation(lambda: one.states[VICTIM].receive_shares(delivery))

    assert refused.code == "roster"


# -- both kinds of share -----------------------------------------------------------------------


def test_no_holder_gives_both_kinds_of_share_of_one_peer() -> None:
    one = a_round()
    collecting = one.share(one.advertised())
    checking = one.mask(collecting)
    unmasking = one.check(checking)
    shares = one.states[VICTIM].unmask(unmasking.confirmations)

    assert not shares.self_mask_shares.keys() & shares.mask_key_shares.keys()
    assert shares.self_mask_shares.keys() | shares.mask_key_shares.keys() == set(NAMES)

    again = violation(lambda: one.states[VICTIM].unmask(unmasking.confirmations))
    assert again.code == "both-kinds-of-share"


def test_a_second_list_of_survivors_is_refused() -> None:
    one = a_round()
    checking = one.mask(one.share(one.advertised()))
    before = one.states[VICTIM]
    before.consistency_check(checking.survivors)
    without_one = Survivors(checking.survivors.names - {NAMES[3]})

    for asked in (without_one, checking.survivors):  # even the same one
        refused = violation(lambda asked=asked: before.consistency_check(asked))
        assert refused.code == "survivor-lists"


def test_a_state_serves_once_even_if_it_refused() -> None:
    one = a_round()
    roster = one.advertised().roster
    state = one.states[VICTIM]
    swapped = roster_with(roster, NAMES[3], mask_key=roster.advertisements[4].box_key)
    violation(lambda: state.share_keys(swapped))

    assert violation(lambda: state.share_keys(roster)).code == "out-of-order"


def test_a_state_cannot_be_copied_to_serve_twice() -> None:
    one = a_round()
    one.advertised()

    with pytest.raises(TypeError):
        copy.deepcopy(one.states[VICTIM])


# -- different survivor lists to different holders ---------------------------------------------


def test_holders_that_are_shown_different_survivors_give_no_shares() -> None:
    """Half is told that holder 7 survived and half that it did not: 7's mask would come off."""
    one = a_round()
    everybody = one.mask(one.share(one.advertised())).survivors.names
    lists = [Survivors(everybody), Survivors(everybody - {NAMES[7]})]
    states, signatures = {}, {}
    for i, name in enumerate(NAMES[:7]):
        states[name], signed = one.states[name].consistency_check(lists[i % 2])
        signatures[name] = signed.signature
    same = {name: signatures[name] for name in NAMES[:7:2]}

    assert violation(lambda: states[NAMES[0]].unmask(Confirmations(signatures))).code == (
        "survivor-lists"
    )
    assert violation(lambda: states[NAMES[2]].unmask(Confirmations(same))).code == "threshold"


def test_holders_that_were_sent_different_models_give_no_shares() -> None:
    """All but one are sent a model on which their updates vanish: the sum would be that one's."""
    one = a_round()
    deliveries = one.share(one.advertised()).deliveries
    survivors, states, signatures = Survivors(frozenset(NAMES)), {}, {}
    for name in NAMES:
        model = b"the model" if name == VICTIM else b"another"
        state, _ = (
            one.states[name].receive_shares(deliveries[name]).masked_input(one.inputs[name], model)
        )
        states[name], signed = state.consistency_check(survivors)
        signatures[name] = signed.signature

    for name in (VICTIM, NAMES[1]):
        state = states[name]
        refused = violation(lambda state=state: state.unmask(Confirmations(signatures)))
        assert refused.code == "survivor-lists"


def test_a_signature_of_one_who_is_said_to_have_dropped_out_does_not_count() -> None:
    one = a_round()
    everybody = one.mask(one.share(one.advertised())).survivors.names
    survivors = Survivors(everybody - {NAMES[7]})
    signatures = {}
    for name in NAMES[:7]:
        one.states[name], signed = one.states[name].consistency_check(survivors)
        signatures[name] = signed.signature
    signatures[NAMES[7]] = signatures[NAMES[6]]

    refused = violation(lambda: one.states[VICTIM].unmask(Confirmations(signatures)))

    assert refused.code == "survivor-lists"


@pytest.mark.parametrize(
    "shown",
    [
        frozenset(NAMES[1:]),  # without the holder that is asked
        frozenset([*NAMES, "stranger"]),
    ],
)
def test_survivors_without_the_holder_or_with_strangers_are_refused(shown: frozenset[str]) -> None:
    one = a_round()
    one.mask(one.share(one.advertised()))

    refused = violation(lambda: one.states[VICTIM].consistency_check(Survivors(shown)))

    assert refused.code == "survivor-lists"


def test_a_survivor_whose_shares_were_held_back_is_refused() -> None:
    one = a_round()
    stage = one.share(one.advertised())
    held_back = Delivery({n: b for n, b in stage.deliveries[VICTIM].boxes.items() if n != NAMES[3]})
    state, _ = one.states[VICTIM].receive_shares(held_back).masked_input(one.inputs[VICTIM])

    refused = violation(lambda: state.consistency_check(Survivors(frozenset(NAMES))))

    assert refused.code == "survivor-lists"


def test_a_victim_cannot_be_cut_off_from_its_neighbours_on_the_graph() -> None:
    """All its neighbours are called dropped: their masks would come off the victim's input.

    The list is one for all and above the threshold, so it would pass figure 4.
    """
    session = session_of(40, 27, neighbours=12, share_threshold=12)
    one = a_round(session)
    sharing = one.advertised()
    graph = sharing._members.graph
    one.mask(one.share(sharing))
    victim = graph.ring[0]
    shown = Survivors(frozenset(graph.ring) - set(graph.peers(victim)))
    assert len(shown.names) >= session.threshold

    for state in (one.states[victim], one.states[graph.ring[20]]):
        refused = violation(lambda state=state: state.consistency_check(shown))
        assert refused.code == "threshold"


# -- a shrunken threshold ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "threshold"), [(8, 5), (8, 2), (8, 9), (3, 2), (2, 1), (1, 1), (64, 42)]
)
def test_a_session_with_too_small_a_threshold_cannot_be_made(cohort: int, threshold: int) -> None:
    with pytest.raises(ConfigurationError, match=f"got {threshold}"):
        session_of(cohort, threshold)


@pytest.mark.parametrize(
    ("neighbours", "share_threshold"),
    [(7, 6), (2, 2), (30, 24), (12, 11), (12, 13), (8, 8), (None, 12), (12, None)],
)
def test_a_graph_that_could_be_cut_cannot_be_asked_for(
    neighbours: int | None, share_threshold: int | None
) -> None:
    with pytest.raises(ConfigurationError, match=r"neighbours|share_threshold"):
        session_of(40, 30, neighbours=neighbours, share_threshold=share_threshold)


def test_fewer_than_the_threshold_are_refused_at_every_stage() -> None:
    one = a_round()
    sharing = one.advertised()
    small = Roster(sharing.roster.advertisements[:5])
    assert violation(lambda: one.states[NAMES[1]].share_keys(small)).code == "threshold"

    one = a_round()
    collecting = one.share(one.advertised())
    few = Delivery(dict(list(collecting.deliveries[NAMES[1]].boxes.items())[:4]))
    assert (
        violation(
            lambda: one.states[NAMES[1]].receive_shares(few).masked_input(one.inputs[NAMES[1]])
        ).code
        == "threshold"
    )

    one = a_round()
    checking = one.mask(one.share(one.advertised()))
    shrunken = Survivors(frozenset(NAMES[:5]))
    assert violation(lambda: one.states[NAMES[1]].consistency_check(shrunken)).code == "threshold"

    one = a_round()
    confirmations = one.check(one.mask(one.share(one.advertised()))).confirmations
    few_signed = Confirmations({n: confirmations.signatures[n] for n in NAMES[:5]})
    assert violation(lambda: one.states[NAMES[1]].unmask(few_signed)).code == "threshold"
    assert checking.session.threshold == 6


def test_more_holders_than_the_cohort_are_refused() -> None:
    """t = 6 of 8 keeps two halves from being told apart; of 12 it would not."""
    session = session_of(8)
    states = [holding.advertise_keys(session, i, Trust()) for i in identities_of(12)]
    roster = Roster(tuple(advertisement for _, advertisement in states))

    assert violation(lambda: states[0][0].share_keys(roster)).code == "threshold"


# -- what must not be seen ---------------------------------------------------------------------


def test_no_secret_is_in_the_text_of_a_state() -> None:
    one = a_round()
    stage = one.advertised()
    state = one.states[VICTIM]
    secrets = [
        state.secrets.box_key.private_bytes_raw(),
        state.secrets.mask_key.private_bytes_raw(),
        state.secrets.self_mask,
    ]
    collecting = one.share(stage)
    shared = one.states[VICTIM]
    one.mask(collecting)
    texts = repr(state) + repr(shared) + repr(one.states[VICTIM])

    own = [shared.own.mask_key, shared.own.self_mask]
    assert not any(repr(secret) in texts for secret in [*secrets, *own])
    assert not any(repr(key) in texts for key in shared.box_keys.values())
