"""The credit task: the shared card schema, its sources, the network."""

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import pandas as pd
import pytest
import torch

from common.data.credit import (
    CARD_SCHEMA,
    STATES,
    GermanCredit,
    SyntheticCredit,
    UciDefault,
    read_workbook,
)
from common.data.tables import check_table
from common.errors import ConfigurationError, DataError
from common.tasks.base import Examples
from common.tasks.credit_risk import CreditRisk
from common.tasks.tabular import Tier, settings_for
from tests.common.tasks import contract


@pytest.fixture(scope="module")
def synthetic() -> CreditRisk:
    return CreditRisk()


def test_the_embedded_source_is_the_default(synthetic: CreditRisk) -> None:
    assert (synthetic.source.name, synthetic.preprocessing) == ("synthetic", "default")
    assert synthetic.schema == UciDefault.schema == CARD_SCHEMA


def test_the_synthetic_clients_are_the_same_everywhere_and_plausible() -> None:
    table, again = SyntheticCredit().table(), SyntheticCredit().table()
    pd.testing.assert_frame_equal(table, again)
    assert len(table) == 8_000
    assert table["default.payment.next.month"].mean() == pytest.approx(0.2, abs=0.05)
    late = table[list(STATES)].max(axis=1) > 1
    rates = table["default.payment.next.month"].groupby(late).mean()
    assert rates[True] > 1.8 * rates[False], "who pays late defaults more often"


def test_the_banks_share_all_clients_and_differ(synthetic: CreditRisk) -> None:
    tables = synthetic.source.tables()
    assert list(tables) == ["bank-1", "bank-2", "bank-3", "bank-4"]
    assert sum(len(table) for table in tables.values()) == 8_000
    rates = [table["default.payment.next.month"].mean() for table in tables.values()]
    assert max(rates) > 1.5 * min(rates)


def test_the_contract_holds(synthetic: CreditRisk) -> None:
    table = synthetic.source.tables()["bank-1"]
    examples = synthetic.examples(table)
    contract.check_losses_are_per_row(synthetic, examples)
    contract.check_opacus_gives_each_rows_gradient(synthetic, examples)
    contract.check_rows_encode_alone(synthetic, table)
    contract.check_batches_are_pure(synthetic, examples)
    contract.check_predictions_are_per_unit(synthetic, examples)
    contract.check_histogram(synthetic, examples.take(torch.arange(50)))
    contract.check_many_holders_are_judged_as_each_alone(
        synthetic, [synthetic.examples(own) for own in synthetic.source.tables().values()]
    )
    contract.check_recommended(synthetic)


def test_the_model_starts_undecided_and_learns(synthetic: CreditRisk) -> None:
    data = synthetic.holder_data()
    train = Examples.concatenate([holder.train for holder in data.values()])
    test = Examples.concatenate([holder.test for holder in data.values()])
    torch.testing.assert_close(
        synthetic.loss(synthetic.model(1), test), torch.full((len(test),), 0.6931472)
    )
    metrics = synthetic.evaluate(contract.train(synthetic, train, steps=60), test)
    assert list(metrics) == ["auc", "ks", "brier", "accuracy", "recall", "f1"]
    assert metrics["auc"] > 0.72


def test_every_category_has_its_own_row_of_the_embedding(synthetic: CreditRisk) -> None:
    examples = synthetic.examples(synthetic.source.tables()["bank-1"])
    columns = synthetic.schema.of_kind("category")
    first = 0
    for position, column in enumerate(columns):
        rows = examples["categories"][:, position]
        assert first <= rows.min()
        first += len(column.categories)
        assert rows.max() < first
    assert synthetic.model(1).embed.num_embeddings == first


def test_numbers_are_small_whatever_the_schema_allows(synthetic: CreditRisk) -> None:
    extremes = []
    for pick in (0, -1):
        row = {
            column.name: column.categories[pick]
            if column.categories
            else (column.low, column.high)[pick]
            for column in CARD_SCHEMA.columns
        }
        extremes.append(row)
    numbers = synthetic.inputs(pd.DataFrame(extremes))["numbers"]
    assert torch.isfinite(numbers).all()
    assert numbers.abs().max() < 7


# ------------------------------------------------------------------------------- real sources


def test_uci_default_has_ten_banks_of_unequal_size_and_risk(shared_data: Path) -> None:
    tables = UciDefault().tables()
    assert next(iter(tables)) == "bank-01"
    assert len(tables) == 10
    assert sum(len(table) for table in tables.values()) == 30_000
    sizes = [len(table) for table in tables.values()]
    rates = [table["default.payment.next.month"].mean() for table in tables.values()]
    assert max(sizes) > 1.5 * min(sizes)
    assert max(rates) > 1.8 * min(rates)


def test_uci_default_keeps_the_codes_that_its_code_book_leaves_out(shared_data: Path) -> None:
    table = UciDefault().table()
    assert {0, 5, 6} <= set(table["EDUCATION"])
    assert 0 in set(table["MARRIAGE"])
    assert {-2, 0, 8} <= set(table["PAY_0"])


@pytest.mark.skipif(find_spec("xlrd") is not None, reason="xlrd is here, so nothing is missing")
def test_the_workbook_form_needs_a_reader_and_says_so() -> None:
    """Only the reader's absence is tested: the workbook itself is not at hand."""
    with pytest.raises(DataError, match="pip install xlrd"):
        read_workbook(BytesIO())


def test_german_has_five_banks_and_twenty_attributes(shared_data: Path) -> None:
    source = GermanCredit()
    tables = source.tables()
    assert len(tables) == 5
    assert sum(len(table) for table in tables.values()) == 1_000
    assert len(source.schema.columns) == 21
    assert pd.concat(tables.values())["class"].value_counts().to_dict() == {1: 700, 2: 300}


@pytest.mark.parametrize("name", ["uci-default", "german"])
def test_the_contract_holds_for_real_clients(shared_data: Path, name: str) -> None:
    task = CreditRisk(name)
    tables = task.source.tables()
    table = next(iter(tables.values()))
    contract.check_losses_are_per_row(task, task.examples(table))
    contract.check_opacus_gives_each_rows_gradient(task, task.examples(table))
    contract.check_rows_encode_alone(task, table)
    contract.check_predictions_are_per_unit(task, task.examples(table))
    contract.check_recommended(task)
    pd.testing.assert_frame_equal(check_table(table, task.schema, file="again"), table)
    trained = task.holder_data()
    mean = sum(len(holder.train) for holder in trained.values()) / len(trained)
    assert abs(task.source.holder_size - mean) < 2
    assert task.source.delta < 1 / mean


# ----------------------------------------------------------------------------------- choices


def test_an_unknown_choice_lists_the_choices() -> None:
    with pytest.raises(ConfigurationError, match="it has synthetic, uci-default, german"):
        CreditRisk("kaggle")
    with pytest.raises(ConfigurationError, match="each with 'default'"):
        CreditRisk("german", "public")


def test_too_many_banks_are_an_error() -> None:
    with pytest.raises(DataError, match="use fewer holders"):
        SyntheticCredit().tables(500)
    with pytest.raises(ConfigurationError, match="at least 1, got 0"):
        SyntheticCredit().tables(0)


def test_settings_come_from_the_highest_tier_reached() -> None:
    tiers = (Tier(float("inf"), {"r": 3}), Tier(1.0, {"r": 1}), Tier(5.0, {"r": 2}))
    chosen = {epsilon: settings_for(tiers, epsilon)["r"] for epsilon in (None, 9.0, 5.0, 2.0, 0.1)}
    assert chosen == {None: 3, 9.0: 2, 5.0: 2, 2.0: 1, 0.1: 1}
    with pytest.raises(ConfigurationError, match=r"positive, got 0\.0"):
        settings_for(tiers, 0.0)
