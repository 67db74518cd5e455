"""The recommendation task leaves one out correctly, and a user's loss is that user's alone."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from torch import Tensor, nn

from common.data.tables import check_table
from common.errors import DataError
from common.settings import plan_for
from common.tasks import load, task_class
from common.tasks.base import Examples, HolderData, HolderTables
from common.tasks.recommendation import Recommendation
from tests.common.tasks import contract

ITEMS = 200
"""The catalogue of the synthetic source."""

OPACUS_WARNS = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
"""torch says so of every hooked layer whose inputs are indices; Opacus does not use these."""


@pytest.fixture(scope="module")
def task() -> Recommendation:
    return Recommendation()


@pytest.fixture(scope="module")
def shop(task: Recommendation) -> HolderData:
    return task.holder_data()["shop-01"]


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def table_of(*users: list[int], times: list[list[float]] | None = None) -> pd.DataFrame:
    """Items of each user, users numbered 7, 14, …; times ascend unless given."""
    rows = [
        (7 * (user + 1), item, float(place) if times is None else times[user][place])
        for user, items in enumerate(users)
        for place, item in enumerate(items)
    ]
    return pd.DataFrame(rows, columns=["user", "item", "time"])


def positives(examples: Examples, row: int) -> set[int]:
    return set(examples["items"][row, : int(examples["count"][row])].tolist())


def taken(table: pd.DataFrame) -> dict[int, set[int]]:
    return {user: set(table.loc[table["user"] == user, "item"]) for user in table["user"].unique()}


def batch_of(task: Recommendation, units: Examples, rng: torch.Generator) -> Examples:
    """A batch of all ``units``, with fresh draws."""
    return task.batch(units, torch.rand(len(units), task.draws, generator=rng, dtype=torch.float64))


BASKETS = st.lists(
    st.lists(st.integers(1, ITEMS), min_size=2, max_size=30, unique=True), min_size=1, max_size=8
)


# -------------------------------------------------------------------------- leaving one out


@settings(max_examples=30, deadline=None)
@given(baskets=BASKETS, seed=st.integers(0, 2**32))
def test_the_latest_item_is_held_out_and_nothing_is_lost(
    baskets: list[list[int]], seed: int
) -> None:
    tables = Recommendation().split(table_of(*baskets), holder="shop", seed=seed)
    held_out = tables.test[tables.test["held_out"]]
    assert held_out["item"].tolist() == [basket[-1] for basket in baskets]
    assert taken(tables.train) == {
        7 * (user + 1): set(basket[:-1]) for user, basket in enumerate(baskets)
    }


@settings(max_examples=30, deadline=None)
@given(baskets=BASKETS, seed=st.integers(0, 2**32))
def test_negatives_are_99_distinct_items_that_the_user_never_took(
    baskets: list[list[int]], seed: int
) -> None:
    tables = Recommendation().split(table_of(*baskets), holder="shop", seed=seed)
    negatives = taken(tables.test[~tables.test["held_out"]])
    for user, basket in enumerate(baskets):
        drawn = negatives[7 * (user + 1)]
        assert len(drawn) == 99
        assert drawn <= set(range(1, ITEMS + 1)) - set(basket)


def test_every_user_of_the_source_is_tested_once(task: Recommendation) -> None:
    for holder, table in task.source.tables().items():
        tables = task.split(table, holder=holder, seed=3)
        train, held_out = taken(tables.train), taken(tables.test[tables.test["held_out"]])
        assert train.keys() == held_out.keys()
        assert {user: train[user] | held_out[user] for user in train} == taken(table)
        assert all(len(items) == 1 for items in held_out.values())


def held_out_items(table: pd.DataFrame, seeds: range) -> set[int]:
    splits = (Recommendation().split(table, holder="shop", seed=seed) for seed in seeds)
    return {int(split.test["item"].iloc[0]) for split in splits}


def test_ties_for_the_latest_time_are_broken_by_the_seed() -> None:
    table = table_of([1, 2, 3, 4], times=[[0.0, 5.0, 5.0, 5.0]])
    assert held_out_items(table, range(40)) == {2, 3, 4}


def test_without_all_times_any_item_may_be_held_out() -> None:
    table = table_of([1, 2, 3], times=[[0.0, np.nan, 9.0]])
    assert held_out_items(table, range(40)) == {1, 2, 3}


def test_the_same_seed_gives_the_same_split(task: Recommendation) -> None:
    table = task.source.tables()["shop-02"]
    first, second, other = (task.split(table, holder="h", seed=seed) for seed in (4, 4, 5))
    pd.testing.assert_frame_equal(first.train, second.train)
    pd.testing.assert_frame_equal(first.test, second.test)
    assert not first.test.equals(other.test)


def test_the_same_item_twice_is_one_interaction_and_its_last_time_counts() -> None:
    tables = Recommendation().split(table_of([5, 6, 5]), holder="shop", seed=0)
    assert taken(tables.train) == {7: {6}}
    assert tables.test["item"].iloc[0] == 5


def test_users_who_cannot_be_tested_are_still_trained_on() -> None:
    single, greedy, ordinary = [9], list(range(1, ITEMS - 97)), [1, 2]
    data = Recommendation().prepare(
        Recommendation().split(table_of(single, greedy, ordinary), holder="shop", seed=0)
    )
    assert data.train["count"].tolist() == [1, ITEMS - 98, 1]
    assert data.test["user"].tolist() == [2]


# --------------------------------------------------------------------------------- encoding


def test_examples_have_one_padded_ascending_row_per_user(task: Recommendation) -> None:
    examples = task.examples(table_of([30, 10, 20], [5]))
    assert examples["user"].tolist() == [0, 1]
    assert examples["items"].tolist() == [[9, 19, 29], [4, ITEMS, ITEMS]]
    assert examples["count"].tolist() == [3, 1]


def test_test_rows_point_at_their_users_training_rows(task: Recommendation) -> None:
    table = table_of([9], [1, 2, 3], [4, 5])
    data = task.prepare(task.split(table, holder="shop", seed=0))
    assert data.test["user"].tolist() == [1, 2]
    assert positives(data.test, 0) == positives(data.train, 1) == {0, 1}
    assert data.test["held_out"].tolist() == [2, 4]
    assert data.test["negatives"].shape == (2, 99)


def test_a_user_who_took_everything_is_refused(task: Recommendation) -> None:
    with pytest.raises(DataError, match="all 200 items"):
        task.examples(table_of(list(range(1, ITEMS + 1))))


def test_a_table_of_ones_own_may_leave_times_empty(task: Recommendation) -> None:
    cells = pd.DataFrame({"user": ["1", "1", "2"], "item": ["3", "4", "5"], "time": ["", "8", ""]})
    checked = check_table(cells, task.schema, file="own.csv")
    data = task.prepare(task.split(checked, holder="own", seed=0))
    assert len(data.train) == 2
    with pytest.raises(DataError, match=r"'item'.*from 1 to 200"):
        check_table(cells.assign(item="201"), task.schema, file="own.csv")


# --------------------------------------------------------------------------------- batches


def test_positives_are_the_users_own_and_negatives_are_not(
    task: Recommendation, shop: HolderData, rng: torch.Generator
) -> None:
    index = torch.tensor([4, 0, 17])
    batch = batch_of(task, shop.train.take(index), rng)
    assert batch["user"].tolist() == [4, 0, 17]
    for row, user in enumerate(index.tolist()):
        own = positives(shop.train, user)
        assert set(batch["positives"][row].tolist()) <= own
        drawn = set(batch["negatives"][row].tolist())
        assert drawn <= set(range(ITEMS)) - own


@pytest.mark.parametrize("kind", ["positives", "negatives"])
def test_draws_are_uniform(task: Recommendation, rng: torch.Generator, kind: str) -> None:
    """Every allowed item comes up as often as any other, within five standard deviations."""
    basket = [1, 2, 60, 130, ITEMS]
    examples = task.examples(table_of(basket, list(range(1, 40))))
    draws = batch_of(task, examples.take(torch.zeros(2_000, dtype=torch.int64)), rng)[kind]
    own = {item - 1 for item in basket}
    allowed = sorted(own if kind == "positives" else set(range(ITEMS)) - own)
    seen = torch.bincount(draws.flatten(), minlength=ITEMS)
    expected = draws.numel() / len(allowed)
    assert seen.sum() == seen[allowed].sum()
    assert (seen[allowed] - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2.0**-53])
def test_the_extreme_draws_stay_within_the_users_items(task: Recommendation, draw: float) -> None:
    units = task.examples(table_of([1, 2, ITEMS], [7]))
    batch = task.batch(units, torch.full((2, task.draws), draw, dtype=torch.float64))
    first = draw == 0.0
    assert batch["positives"][:, 0].tolist() == ([0, 6] if first else [ITEMS - 1, 6])
    assert batch["negatives"][:, 0].tolist() == ([2, 0] if first else [ITEMS - 2, ITEMS - 1])


def test_the_contract_holds(task: Recommendation) -> None:
    shops = list(task.holder_data(40).values())
    contract.check_batches_are_pure(task, shops[0].train)
    contract.check_predictions_are_per_unit(task, shops[0].test)
    contract.check_histogram(task, shops[0].test)
    contract.check_many_holders_are_judged_as_each_alone(task, [shop.test for shop in shops])


def test_shops_whose_users_took_different_numbers_of_items_fit_in_one_tensor(
    task: Recommendation, rng: torch.Generator
) -> None:
    narrow, wide = task.examples(table_of([30, 10])), task.examples(table_of([5], [7, 8, 9]))
    both = Examples.concatenate([narrow, wide], task.padding)
    assert both["items"].tolist() == [
        [9, 29, ITEMS],
        [4, ITEMS, ITEMS],
        [6, 7, 8],
    ]
    draws = torch.rand(3, task.draws, generator=rng, dtype=torch.float64)
    for name, tensor in task.batch(narrow, draws[:1]).tensors.items():
        assert torch.equal(task.batch(both, draws)[name][:1], tensor), name


# ----------------------------------------------------------------------- loss and gradients


def shared_gradients(task: Recommendation, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if name not in task.private_parameters:
            assert parameter.grad is not None
            yield name, parameter.grad


def test_changing_one_user_changes_one_loss(
    task: Recommendation, shop: HolderData, rng: torch.Generator
) -> None:
    model = task.model(len(shop.train))
    batch = batch_of(task, shop.train.take(torch.arange(6)), rng)
    before = task.loss(model, batch)
    changed = dict(batch.tensors)
    for name in ("positives", "negatives"):
        changed[name] = changed[name].clone()
        changed[name][3] = torch.randint(ITEMS, changed[name][3].shape, generator=rng)
    after = task.loss(model, Examples(changed))
    assert before.shape == (6,)
    assert (before != after).tolist() == [False, False, False, True, False, False]


def hooked(task: Recommendation, model: nn.Module) -> GradSampleModule:
    """The model under Opacus as the Trainer has it: private parameters are hidden from it."""
    private = [model.get_parameter(name) for name in task.private_parameters]
    for parameter in private:
        parameter.requires_grad_(False)
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum")
    for parameter in private:
        parameter.requires_grad_(True)
    return wrapped


def per_unit_gradients(task: Recommendation, model: nn.Module) -> dict[str, Tensor]:
    """What Opacus left: [B, …] of each shared parameter."""
    return {
        name: parameter.grad_sample  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters()
        if name not in task.private_parameters
    }


@OPACUS_WARNS
def test_each_user_has_one_gradient_and_together_they_are_the_batchs(
    task: Recommendation, shop: HolderData, rng: torch.Generator
) -> None:
    """What Opacus clips for each user is that user's whole gradient of the shared parameters."""
    model = task.model(len(shop.train))
    batch = batch_of(task, shop.train.take(torch.arange(6)), rng)
    wrapped = hooked(task, model)
    task.loss(wrapped, batch).sum().backward()  # type: ignore[no-untyped-call]
    samples, private = per_unit_gradients(task, model), model.users.weight.grad.clone()
    assert not hasattr(model.users.weight, "grad_sample")
    wrapped.disable_hooks()
    for user in range(6):
        model.zero_grad()
        task.loss(model, batch.take(torch.tensor([user]))).sum().backward()  # type: ignore[no-untyped-call]
        for name, gradient in shared_gradients(task, model):
            torch.testing.assert_close(samples[name][user], gradient)
        torch.testing.assert_close(private[user], model.users.weight.grad[user])


@OPACUS_WARNS
def test_an_empty_batch_is_an_ordinary_one(
    task: Recommendation, shop: HolderData, rng: torch.Generator
) -> None:
    model = task.model(len(shop.train))
    nobody = shop.train.take(torch.zeros(0, dtype=torch.int64))
    losses = task.loss(hooked(task, model), batch_of(task, nobody, rng))
    assert losses.shape == (0,)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    for name, gradients in per_unit_gradients(task, model).items():
        assert gradients.shape == (0, *model.get_parameter(name).shape), name


def test_private_vectors_are_sized_by_the_holder_and_nothing_shared_is(
    task: Recommendation,
) -> None:
    def seeded(units: int) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return dict(task.model(units).named_parameters())

    one, many = seeded(1), seeded(30)
    assert task.private_parameters <= one.keys()
    for name in one:
        if name in task.private_parameters:
            assert len(many[name]) == 30
        else:
            assert torch.equal(one[name], many[name]), name


# -------------------------------------------------------------------------------- learning


def train(task: Recommendation, data: HolderData, steps: int) -> nn.Module:
    """Plain gradient descent on one holder with everybody in each batch."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    model = task.model(len(data.train))
    for _ in range(steps):
        model.zero_grad()
        batch = batch_of(task, data.train, rng)
        task.loss(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                private = name in task.private_parameters
                rate = task.private_learning_rate if private else 1.0 / len(data.train)
                parameter.sub_(parameter.grad, alpha=rate)
    return model


class Popularity(nn.Module):
    """Scores an item by how many users of the training data took it."""

    def __init__(self, train: Examples) -> None:
        super().__init__()
        self.taken = torch.bincount(train["items"].flatten(), minlength=ITEMS + 1).float()

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        del user
        return self.taken[item]


def test_a_learned_model_clearly_beats_popularity_on_the_synthetic_source(
    task: Recommendation,
) -> None:
    (data,) = task.holder_data(1).values()
    learned = task.evaluate(train(task, data, 150), data.test)
    popular = task.evaluate(Popularity(data.train), data.test)
    for metric in learned:
        assert learned[metric] > 1.5 * popular[metric], metric
    assert popular["hr@10"] > 0.1


def test_one_user_per_holder_trains_and_is_measured(task: Recommendation) -> None:
    holders = task.holder_data(300)
    data = holders["shop-042"]
    assert len(data.train) == len(data.test) == 1
    metrics = task.evaluate(train(task, data, 3), data.test)
    assert all(0.0 <= value <= 1.0 for value in metrics.values())


# --------------------------------------------------------------------------------- metrics


class Fixed(nn.Module):
    """The same score for an item, whoever asks."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        del user
        return self.scores[item]


def test_a_constant_model_scores_as_a_guess(task: Recommendation, shop: HolderData) -> None:
    metrics = task.evaluate(Fixed(torch.zeros(ITEMS)), shop.test)
    assert metrics["hr@10"] == pytest.approx(0.1)
    assert 0.05 < metrics["hr@10-full"] < 0.07  # 10 of about 175 items that were not taken


def test_full_ranking_leaves_training_positives_out(task: Recommendation) -> None:
    """The user took items 1 to 12; item 12 is held out and only 1 to 11 score higher."""
    data = task.prepare(task.split(table_of(list(range(1, 13))), holder="shop", seed=0))
    metrics = task.evaluate(Fixed(-torch.arange(float(ITEMS))), data.test)
    assert metrics == {"hr@10": 1.0, "ndcg@10": 1.0, "hr@10-full": 1.0, "ndcg@10-full": 1.0}
    worst = task.evaluate(Fixed(torch.arange(float(ITEMS))), data.test)
    assert set(worst.values()) == {0.0}


def test_sampled_and_full_ranking_agree_with_sorting(
    task: Recommendation, shop: HolderData
) -> None:
    scores = torch.randn(ITEMS, generator=torch.Generator().manual_seed(2))
    hits = {"hr@10": 0, "hr@10-full": 0}
    for user in range(len(shop.test)):
        held_out = int(shop.test["held_out"][user])
        sampled = {held_out, *shop.test["negatives"][user].tolist()}
        full = set(range(ITEMS)) - positives(shop.test, user)
        for name, competing in (("hr@10", sampled), ("hr@10-full", full)):
            best = sorted(competing, key=lambda item: -float(scores[item]))[:10]
            hits[name] += held_out in best
    metrics = task.evaluate(Fixed(scores), shop.test)
    for name, count in hits.items():
        assert metrics[name] == pytest.approx(count / len(shop.test))


def test_metrics_of_nobody_are_nan(task: Recommendation, shop: HolderData) -> None:
    nobody = shop.test.take(torch.zeros(0, dtype=torch.int64))
    metrics = task.evaluate(Fixed(torch.zeros(ITEMS)), nobody)
    assert all(np.isnan(value) for value in metrics.values())


def test_metrics_do_not_depend_on_how_users_are_chunked(task: Recommendation) -> None:
    (data,) = task.holder_data(1).values()
    model = task.model(len(data.train))
    whole = task.evaluate(model, data.test)
    parts = [task.evaluate(model, data.test.take(chunk)) for chunk in torch.arange(300).chunk(3)]
    for name, value in whole.items():
        assert value == pytest.approx(np.mean([part[name] for part in parts]))


# --------------------------------------------------------------------------- registration


def test_it_is_registered_and_leads_with_the_sampled_hit_rate() -> None:
    assert task_class("recommendation") is Recommendation
    task = load("recommendation")
    assert (task.source.name, task.unit, task.headline) == ("synthetic", "user", "hr@10")


@pytest.mark.parametrize("source", ["synthetic", "movielens-100k", "movielens-1m"])
@pytest.mark.parametrize("epsilon", [None, 8.0])
def test_recommended_settings_make_a_plan(source: str, epsilon: float | None) -> None:
    task = load("recommendation", source)
    plan_for(task, {"no_dp": True} if epsilon is None else {"epsilon": epsilon})
    if epsilon is not None:
        plan_for(task, {"aggregation": "secure-sum", "epsilon": epsilon}, holders=4)


@pytest.mark.usefixtures("shared_data")
def test_a_shop_of_movielens_is_prepared_whole() -> None:
    task = load("recommendation", "movielens-100k")
    data = task.holder_data()
    assert sum(len(holder.train) for holder in data.values()) == 943
    assert sum(len(holder.test) for holder in data.values()) == 943
    assert sum(int(holder.train["count"].sum()) for holder in data.values()) == 100_000 - 943


@pytest.mark.usefixtures("shared_data")
def test_the_held_out_film_of_movielens_is_a_latest_one() -> None:
    task = load("recommendation", "movielens-100k")
    table = task.source.tables()["shop-03"]
    tables: HolderTables = task.split(table, holder="shop-03", seed=1)
    held_out = tables.test[tables.test["held_out"]].merge(table, on=["user", "item"])
    latest = table.groupby("user")["time"].max()
    assert (held_out.set_index("user")["time"] == latest).all()
