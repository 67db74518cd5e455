"""The diagnosis task: its two sources, and the three preparations of the hospitals' files."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from common.data.encoding import Encoder
from common.data.medical import CELL_RANGES, CLINICAL_RANGES, BreastCancer, HeartDisease
from common.data.tables import check_table
from common.errors import ConfigurationError, DataError
from common.tasks.base import Examples
from common.tasks.medical_diagnosis import MedicalDiagnosis
from tests.common.tasks import contract

SIZES = {"cleveland": (199, 104), "hungary": (172, 89), "switzerland": (30, 16), "va": (85, 45)}


# ----------------------------------------------------------------------------- breast cancer


@pytest.fixture(scope="module")
def breast() -> MedicalDiagnosis:
    return MedicalDiagnosis()


def test_the_embedded_source_is_the_default(breast: MedicalDiagnosis) -> None:
    assert (breast.source.name, breast.preprocessing, breast.caveat) == (
        "breast-cancer",
        "default",
        "",
    )


def test_the_clinics_share_all_patients_and_differ_in_size_and_case_mix() -> None:
    tables = BreastCancer().tables()
    assert list(tables) == ["clinic-1", "clinic-2", "clinic-3", "clinic-4"]
    sizes = [len(table) for table in tables.values()]
    malignant = [(table["diagnosis"] == "malignant").mean() for table in tables.values()]
    assert sum(sizes) == 569
    assert sizes == sorted(sizes)
    assert sizes[3] > 2 * sizes[0]
    assert malignant == sorted(malignant)
    assert malignant[3] > 2 * malignant[0] > 0


def test_the_division_depends_on_its_seed_only() -> None:
    first, same, other = (BreastCancer().tables(3, seed=seed)["clinic-2"] for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, same)
    assert not first.equals(other)


def test_scaled_measurements_lie_about_between_minus_one_and_one(
    breast: MedicalDiagnosis,
) -> None:
    features = breast.inputs(pd.concat(BreastCancer().tables().values()))["features"]
    assert features.shape == (569, len(CELL_RANGES))
    assert features.dtype == torch.float32
    assert features.min() >= -1.1
    assert features.max() <= 1.3


def test_the_contract_holds(breast: MedicalDiagnosis) -> None:
    table = breast.source.tables()["clinic-4"]
    examples = breast.examples(table)
    contract.check_losses_are_per_row(breast, examples)
    contract.check_opacus_gives_each_rows_gradient(breast, examples)
    contract.check_rows_encode_alone(breast, table)
    contract.check_batches_are_pure(breast, examples)
    contract.check_predictions_are_per_unit(breast, examples)
    contract.check_histogram(breast, examples.take(torch.arange(50)))
    contract.check_many_holders_are_judged_as_each_alone(
        breast, [breast.examples(own) for own in breast.source.tables().values()]
    )
    contract.check_recommended(breast)


def test_the_model_starts_undecided_and_learns(breast: MedicalDiagnosis) -> None:
    data = breast.holder_data()
    train = Examples.concatenate([holder.train for holder in data.values()])
    test = Examples.concatenate([holder.test for holder in data.values()])
    torch.testing.assert_close(
        breast.loss(breast.model(1), test), torch.full((len(test),), 0.6931472)
    )
    metrics = breast.evaluate(contract.train(breast, train), test)
    assert list(metrics) == ["accuracy", "auc", "f1", "recall", "brier"]
    assert metrics["auc"] > 0.97


def test_public_sizes_suit_the_split(breast: MedicalDiagnosis) -> None:
    data = breast.holder_data()
    mean = sum(len(holder.train) for holder in data.values()) / len(data)
    assert abs(breast.source.holder_size - mean) < 2
    assert breast.source.delta < 1 / breast.source.holder_size


# ----------------------------------------------------------------------------- heart disease


@pytest.mark.parametrize("preprocessing", ["public", "flamby"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_patients_and_split_sizes_are_flambys(
    shared_data: Path, preprocessing: str, seed: int
) -> None:
    task = MedicalDiagnosis("heart-disease", preprocessing)
    data = task.holder_data(seed=seed)
    assert {name: (len(part.train), len(part.test)) for name, part in data.items()} == SIZES
    assert all(part.train["features"].shape[1] == 13 for part in data.values())


def test_public_and_flamby_share_their_splits(shared_data: Path) -> None:
    """The same patients in the same order: the labels agree, and so do z-scores of both."""
    public, flamby = (
        MedicalDiagnosis("heart-disease", name).holder_data(seed=3) for name in ("public", "flamby")
    )
    for hospital in SIZES:
        for half in ("train", "test"):
            torch.testing.assert_close(
                getattr(public[hospital], half)["label"], getattr(flamby[hospital], half)["label"]
            )


def test_flamby_inputs_have_mean_zero_and_spread_one_in_training(shared_data: Path) -> None:
    for part in MedicalDiagnosis("heart-disease", "flamby").holder_data().values():
        mean = part.train["features"].mean(dim=0)
        spread = part.train["features"].std(dim=0, correction=0)
        torch.testing.assert_close(mean, torch.zeros(13), atol=1e-5, rtol=0)
        constant = spread < 1e-6
        torch.testing.assert_close(spread[~constant], torch.ones(int((~constant).sum())))
        assert constant.sum() <= 2, "Switzerland recorded no cholesterol"


def test_only_flamby_carries_a_caveat() -> None:
    assert "not covered by ε" in MedicalDiagnosis("heart-disease", "flamby").caveat
    assert MedicalDiagnosis("heart-disease", "public").caveat == ""


def test_a_zero_cholesterol_is_not_measured_in_public_and_a_number_in_flamby() -> None:
    row = {
        "age": 50.0,
        "sex": 1,
        "cp": 4,
        "trestbps": 130.0,
        "chol": 0.0,
        "fbs": 0,
        "restecg": 0,
        "thalach": 140.0,
        "exang": 0,
        "oldpeak": 1.0,
        "disease": 1,
    }
    table = pd.DataFrame([row])
    public, flamby = (
        MedicalDiagnosis("heart-disease", name).inputs(table)["features"]
        for name in ("public", "flamby")
    )
    low, high = CLINICAL_RANGES["chol"]
    assert public.tolist() == [[0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert (flamby - public).abs().sum() == pytest.approx((low + high) / (high - low))


def test_full_keeps_every_patient_and_tells_empty_cells(shared_data: Path) -> None:
    task = MedicalDiagnosis("heart-disease", "full")
    tables = task.source.tables()
    assert sum(len(table) for table in tables.values()) == 920
    examples = task.examples(tables["switzerland"])
    assert torch.isfinite(examples["features"]).all()
    names = Encoder(task.schema).names
    unmeasured = examples["features"][:, names.index("chol?")]
    assert unmeasured.all(), "Switzerland recorded no cholesterol"
    assert examples["features"].shape[1] == len(names) == 28


def test_the_split_is_a_partition_and_stratified_where_it_can_be(shared_data: Path) -> None:
    task = MedicalDiagnosis("heart-disease")
    for hospital, table in task.source.tables().items():
        halves = task.split(table, holder=hospital, seed=0)
        both = pd.concat([halves.train, halves.test])
        pd.testing.assert_frame_equal(
            both.sort_values(list(both.columns), ignore_index=True),
            table.sort_values(list(both.columns), ignore_index=True),
        )
        if hospital != "switzerland":
            rates = [half["disease"].mean() for half in (halves.train, halves.test)]
            assert rates[0] == pytest.approx(rates[1], abs=0.02)


def test_splits_differ_between_seeds_and_between_holders(shared_data: Path) -> None:
    task = MedicalDiagnosis("heart-disease")
    table = task.source.tables()["va"]
    splits = [
        task.split(table, holder=holder, seed=seed).test
        for holder, seed in (("va", 0), ("va", 0), ("va", 1), ("other", 0))
    ]
    assert splits[0].equals(splits[1])
    assert not splits[0].equals(splits[2])
    assert not splits[0].equals(splits[3])


@pytest.mark.parametrize("preprocessing", ["public", "flamby", "full"])
def test_the_contract_holds_for_the_hospitals(shared_data: Path, preprocessing: str) -> None:
    task = MedicalDiagnosis("heart-disease", preprocessing)
    table = task.source.tables()["va"]
    contract.check_losses_are_per_row(task, task.examples(table))
    contract.check_opacus_gives_each_rows_gradient(task, task.examples(table))
    contract.check_rows_encode_alone(task, table)
    contract.check_predictions_are_per_unit(task, task.examples(table))
    contract.check_recommended(task)


def test_a_table_of_the_source_passes_its_own_check(shared_data: Path) -> None:
    for every_row in (False, True):
        source = HeartDisease(every_row=every_row)
        for table in source.tables().values():
            pd.testing.assert_frame_equal(check_table(table, source.schema, file="again"), table)


def test_the_hospitals_are_given() -> None:
    with pytest.raises(ConfigurationError, match=r"4 holders, its hospitals.*got holders=3"):
        HeartDisease().tables(3)


def test_without_the_files_the_way_to_get_them_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOTTO_DATA", raising=False)
    monkeypatch.setenv("SOTTO_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="sotto data get heart-disease"):
        MedicalDiagnosis("heart-disease").holder_data()


@pytest.mark.parametrize(
    ("source", "preprocessing"), [("heart", None), ("heart-disease", "none"), (None, "public")]
)
def test_an_unknown_choice_lists_the_choices(source: str | None, preprocessing: str | None) -> None:
    with pytest.raises(ConfigurationError, match=r"heart-disease \(public, flamby, full\)"):
        MedicalDiagnosis(source, preprocessing)


def test_no_clinic_at_all_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="at least 1, got 0"):
        BreastCancer().tables(0)
