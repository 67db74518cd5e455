from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import ConfigurationError
from common.secagg.graph import CUT_BITS, FAILURE_BITS, Graph, graph_for
from tests.common.secagg.rounds import names_of

COIN = bytes(range(32))


def test_without_neighbours_all_share_with_all_in_order_of_names() -> None:
    graph = Graph.of(reversed(names_of(5)), None, COIN)

    assert graph.neighbourhood("holder-0003") == tuple(names_of(5))
    assert graph.peers("holder-0000") == tuple(names_of(5)[1:])


def test_on_the_ring_everybody_has_k_neighbours_and_they_have_it() -> None:
    graph = Graph.of(names_of(20), 6, COIN)

    for name in graph.ring:
        peers = graph.peers(name)
        assert len(set(peers)) == 6
        assert name not in peers
        assert all(name in graph.peers(peer) for peer in peers)


def test_everybody_computes_the_same_graph_and_another_coin_gives_another() -> None:
    graph = Graph.of(names_of(20), 6, COIN)

    assert Graph.of(reversed(names_of(20)), 6, COIN) == graph
    assert Graph.of(names_of(20), 6, bytes(32)) != graph


def test_every_order_of_the_ring_is_as_likely() -> None:
    """Chi-square over the 24 orders of 4 names, 100 of each expected; p below 1e-6 would fail."""
    orders = Counter(Graph.of("abcd", 2, number.to_bytes(32, "big")).ring for number in range(2400))

    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > 1e-6


@given(st.integers(9, 24), st.data())
def test_the_poorest_is_counted_as_one_would(size: int, data: st.DataObject) -> None:
    neighbours = data.draw(st.sampled_from([4, 6, 8]))
    graph = Graph.of(names_of(size), neighbours, COIN)
    survivors = frozenset(data.draw(st.lists(st.sampled_from(names_of(size)), min_size=1)))

    counted = min(len(survivors & set(graph.neighbourhood(name))) for name in survivors)

    assert graph.poorest(survivors) == counted


@settings(max_examples=200)
@given(st.integers(13, 40), st.data())
def test_the_honest_survivors_are_connected_whomever_the_coordinator_drops(
    size: int, data: st.DataObject
) -> None:
    """The claim of graph_for: wherever at most w of k/2 in a row are corrupted, t = k/2 + w + 2."""
    half = data.draw(st.sampled_from([4, 6]))
    graph = Graph.of(names_of(size), 2 * half, COIN)
    corrupted = frozenset(data.draw(st.lists(st.sampled_from(graph.ring), max_size=size // 3)))
    in_a_row = max(
        sum(graph.ring[(start + i) % size] in corrupted for i in range(half))
        for start in range(size)
    )
    threshold = half + in_a_row + 2
    dropped = data.draw(st.lists(st.sampled_from(graph.ring), max_size=size // 2))
    survivors = frozenset(graph.ring) - frozenset(dropped)
    if not survivors or graph.poorest(survivors) < threshold:
        return

    assert is_connected(graph, survivors - corrupted)


def is_connected(graph: Graph, names: frozenset[str]) -> bool:
    reached: set[str] = set()
    ahead = list(names)[:1]
    while ahead:
        name = ahead.pop()
        reached.add(name)
        ahead += [peer for peer in graph.peers(name) if peer in names and peer not in reached]
    return reached == names


def test_a_lower_threshold_would_let_the_coordinator_cut_the_ring() -> None:
    """The control: two gaps of k/2 cut a ring, and leave k/2 + 1 in the poorest neighbourhood."""
    half = 4
    graph = Graph.of(names_of(30), 2 * half, COIN)
    gaps = {*graph.ring[5 : 5 + half], *graph.ring[20 : 20 + half]}
    survivors = frozenset(graph.ring) - gaps

    assert not is_connected(graph, survivors)
    assert graph.poorest(survivors) == half + 1 < half + 2


@pytest.mark.parametrize("cohort", [64, 200, 512, 1000])
@pytest.mark.parametrize(("dropped", "corrupt"), [(0.1, 0.1), (0.05, 0.1), (0.1, 0.2)])
def test_the_promises_of_a_graph_hold_by_scipys_tails(
    cohort: int, dropped: float, corrupt: float
) -> None:
    plan = graph_for(cohort, dropped, corrupt)
    half, lost = plan.neighbours // 2, math.ceil(dropped * cohort)
    worst = plan.share_threshold - half - 2

    fails = stats.hypergeom.logsf(
        plan.neighbours - plan.share_threshold, cohort - 1, lost, plan.neighbours
    )
    cut = stats.hypergeom.logsf(worst, cohort - lost - 1, math.ceil(corrupt * cohort), half)

    assert (fails + math.log(cohort)) / math.log(2) <= -FAILURE_BITS
    assert (cut + math.log(cohort - lost)) / math.log(2) <= -CUT_BITS


def test_figures_that_the_documentation_states() -> None:
    found = {cohort: graph_for(cohort) for cohort in (100, 200, 512, 1000, 10_000)}

    assert {n: (p.neighbours, p.share_threshold) for n, p in found.items()} == {
        100: (44, 34),
        200: (84, 64),
        512: (180, 139),
        1000: (228, 175),
        10_000: (312, 237),
    }


def test_where_no_graph_will_do_the_sentence_says_so() -> None:
    with pytest.raises(ConfigurationError, match="leave out neighbours"):
        graph_for(8)
    with pytest.raises(ConfigurationError, match="third"):
        graph_for(1000, dropped=0.4)
