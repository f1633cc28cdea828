"""Studies that train nothing: what they may ask, what one unit adds at most, their cost, and what an auditor finds."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant

from privet.common.audit.counts import check_counts, count_lines, counts_document, drift
from privet.common.audit.privacy_statement import privacy_document
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.errors import StudyError, VerificationError
from privet.common.log.agreement import check_leaf_size
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.vector import segments_of, step_segments
from privet.common.privacy.accounting import plan
from privet.common.study.adapter import AdapterSpec
from privet.common.study.counts import MOST_CLASSES, cells_of
from privet.common.study.study import Study
from tests.support.synthetic import BASE, study_of

DELTA = 1e-4
LOCAL = {"mode": "local", "epsilon": 0.5, "delta": DELTA}
SHARED: dict[str, Any] = {
    "privacy": {**LOCAL, "mode": "distributed"},
    "secure_aggregation": {"mode": "masked"},
    "cohort": {"min_sites": 3},
    "aggregation": {"largest_count": 300},
}
NONE = AdapterSpec(())


def counting(kind: str = "statistics", **sections: Any) -> Study:
    """Return a study that counts, or measures an adapter, with some keys of some tables replaced."""
    left_out = {"training"} | ({"lora"} if kind == "statistics" else set())
    document = {name: value for name, value in BASE.items() if name not in left_out} | {"kind": kind}
    if kind == "evaluate":
        document["evaluation"] = {"adapter": f"sha256:{'a' * 64}"}
    for name, values in sections.items():
        document[name] = {**document.get(name, {}), **values}
    return Study.parse(document)


# --- the study -------------------------------------------------------------------------------------------


def test_a_study_that_trains_is_the_study_that_it_was() -> None:
    # Recorded before studies had a kind.
    assert study_of().digest == "sha256:912415d2a4e808d5952383231ce86dadf271671d85fc881b47ff5136dbf45bda"
    assert Study.parse({**BASE, "kind": "train"}).digest == study_of().digest
    assert not {"kind", "statistics", "evaluation"} & study_of().document().keys()


@pytest.mark.parametrize("kind", ["statistics", "evaluate"])
def test_a_study_that_counts_has_one_round_and_says_the_same_again(kind: str) -> None:
    study = counting(kind, privacy=LOCAL)
    assert (study.rounds, study.counts, study.sums_units(1), study.is_head_start(1)) == (1, True, True, False)
    assert study.privacy.promise.clip_norm == 1.0
    again = Study.parse(study.document())
    assert (again, again.digest) == (study, study.digest)


@pytest.mark.parametrize(
    ("kind", "sections", "says"),
    [
        ("statistics", {"training": BASE["training"]}, "training: a study of kind statistics trains nothing"),
        ("statistics", {"lora": BASE["lora"]}, "lora: a study of kind statistics trains nothing"),
        ("evaluate", {"data": {"validation_fraction": 0.1}}, "data.validation_fraction: a study of kind evaluate"),
        ("statistics", {"aggregation": {"weighting": "equal"}}, "aggregation.weighting"),
        ("statistics", {"aggregation": {"weight_power": 0.5}}, "aggregation.weight_power"),
        ("evaluate", {"privacy": {**LOCAL, "head_clip_share": 0.5}}, "privacy.head_clip_share"),
        ("evaluate", {"lora": {"site_ranks": {"a": 1}}, "aggregation": {"method": "ffa"}}, "lora.site_ranks"),
        ("statistics", {"statistics": {"lengths": [32, 16]}}, "ascending order"),
        ("evaluate", {"evaluation": {"adapter": "base"}}, "the base alone has no head"),
        ("evaluate", {"evaluation": {"adapter": "latest"}}, "evaluation.adapter"),
        ("evaluate", {"statistics": {}}, "statistics: a study of kind statistics needs this table"),
    ],
)
def test_what_does_not_go_together_is_refused(kind: str, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError) as raised:
        counting(kind, **sections)
    assert says in str(raised.value)


def test_a_study_that_trains_has_no_table_of_counts() -> None:
    with pytest.raises(StudyError, match="evaluation: a study of kind evaluate needs this table"):
        study_of(evaluation={"adapter": f"sha256:{'a' * 64}"})
    with pytest.raises(ValueError, match="no cells"):
        cells_of(study_of())


# --- cells and cost --------------------------------------------------------------------------------------


def test_the_bound_is_the_norm_of_alike_complete_records() -> None:
    records = cells_of(counting(privacy=LOCAL))
    assert records.names[:3] == ("units", "missing", "label.0")
    assert records.bound == pytest.approx(math.sqrt(1 + 1 + 1))  # the unit, a label, a length
    patient: dict[str, Any] = {
        "privacy": {**LOCAL, "unit": "patient", "max_records_per_unit": 3},
        "data": {"unit": "patient"},
    }
    patients = cells_of(counting(**patient))
    assert patients.names[:4] == ("units", "beyond", "records", "missing")
    assert patients.bound == pytest.approx(math.sqrt(1 + 1 + 3 * 9))
    assert patients.bound * patients.scale <= 1.0 < patients.bound * patients.scale * (1 + 1e-9)
    measured = cells_of(counting("evaluate", privacy=LOCAL))
    assert (len(measured.names), measured.bound) == (3 + 9, 2.0)
    assert cells_of(counting()).scale == 1.0  # without noise, counts are whole


@pytest.mark.parametrize("target", [0.1, 1.0])
def test_the_round_costs_epsilon_by_an_accountant_of_others(target: float) -> None:
    found = plan(counting(privacy={**LOCAL, "epsilon": target}))
    assert found is not None
    other = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    other.compose(GaussianDpEvent(found.training.noise_multiplier))
    # The numerical bound from above, which the noise is calibrated to, is within 0.01 of the cost.
    assert target - 0.0105 <= other.get_epsilon(DELTA) <= target
    half = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    half.compose(GaussianDpEvent(found.training.noise_multiplier / 2))
    assert half.get_epsilon(DELTA) > target


def test_what_is_masked_is_one_vector_of_counts() -> None:
    cut, counts = segments_of(counting(privacy=LOCAL), NONE, head=True)
    assert (cut.name, counts.name, counts.size) == ("cut", "counts", 1 + 1 + 3 + 9)
    (exact,) = segments_of(counting(), NONE, head=True)
    assert exact.count
    (shared,) = step_segments(counting(**SHARED), NONE, 4, head=True)
    assert shared.size == counts.size
    with pytest.raises(StudyError, match="largest_count"):
        segments_of(counting(aggregation={"largest_count": 2**47}), NONE, head=True)


# --- result and audit ------------------------------------------------------------------------------------


def statement(study: Study, **changes: Any) -> dict[str, Any]:
    """Return the statement of a closed round in which each count is 100 levels of noise, or 100."""
    cells, sites = cells_of(study), ["alder", "birch", "cedar", "dogwood"]
    unit = 1.0 if not study.distributed else shared_noise(study, len(sites), head=True).level / cells.scale
    mechanism, privacy = plan(study), None
    if mechanism is not None:
        privacy = {
            "unit": study.privacy.unit,
            "delta": mechanism.delta,
            "target": mechanism.target,
            "accountant": "prv",
            "training": mechanism.training.document(),
            "validation": None,
            "epsilon": dict.fromkeys(sites, mechanism.spent(1)),
        }
    return {
        "type": "round-close",
        "round": 1,
        "study": study.digest,
        "cohort": sites,
        "survivors": sites,
        "adapter_before": "sha256:a",
        "adapter_after": "sha256:a",
        "metrics": dict.fromkeys(cells.names, 100 * unit),
        "privacy": privacy,
        **changes,
    }


def test_intervals_cover_the_noise_that_sites_added() -> None:
    study = counting(privacy=LOCAL)
    found, mechanism = counts_document(study, [statement(study)]), plan(study)
    assert mechanism is not None
    deviation = mechanism.training.noise_multiplier * cells_of(study).bound * 2  # of four sites, each its own
    assert found["deviation"] == pytest.approx(deviation)
    assert found["cells"][0] == {
        "name": "units",
        "title": "records",
        "value": 100.0,
        "low": pytest.approx(100 - 1.96 * deviation, rel=1e-3),
        "high": pytest.approx(100 + 1.96 * deviation, rel=1e-3),
    }
    exact = counting()
    rows = counts_document(exact, [statement(exact)])
    assert all(cell["low"] == cell["value"] == cell["high"] for cell in rows["cells"])
    assert count_lines(rows)[0].split()[:2] == ["records", "100.0"]
    assert counts_document(exact, [])["cells"] == []


def test_an_evaluation_also_says_how_few_units_there_are() -> None:
    study = counting("evaluate")
    metrics = dict.fromkeys(cells_of(study).names, 0.0)
    metrics |= {"units": 400.0, "correct": 300.0, "loss": 20.0, "confusion.0": 90.0, "confusion.1": 10.0}
    found = {each["title"]: each for each in counts_document(study, [statement(study, metrics=metrics)])["figures"]}
    accuracy = found["accuracy"]
    assert accuracy["value"] == 0.75
    assert accuracy["high"] - 0.75 == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 400), rel=0.02)
    assert found["loss"]["value"] == pytest.approx(0.5)
    assert found["recall of no"]["value"] == 0.9
    noisy = counting("evaluate", privacy=LOCAL)
    wider = counts_document(noisy, [statement(noisy, metrics=metrics)])["figures"][0]
    assert wider["high"] - wider["low"] > accuracy["high"] - accuracy["low"]


@pytest.mark.parametrize("classes", [MOST_CLASSES, MOST_CLASSES + 1])
def test_a_result_fits_in_a_leaf_of_the_log(classes: int) -> None:
    labels = [f"label {number}" for number in range(classes)]
    study = counting("evaluate", task={"labels": labels}, privacy=LOCAL)
    names, sites = cells_of(study).names, [f"site-{number:04d}" for number in range(100)]
    assert len(names) == 3 + (classes**2 if classes == MOST_CLASSES else 0)
    assert cells_of(study).bound ** 2 == pytest.approx(4 if classes == MOST_CLASSES else 3)
    check_leaf_size(sites, sites, sites, hybrid=True, counts=names)
    assert len(json.dumps(dict.fromkeys(names, -1.2345678901234567e-300))) <= sum(len(name) + 30 for name in names)
    many = counting(task={"labels": [f"label {number}" for number in range(1000)]})
    with pytest.raises(StudyError, match="name fewer labels or lengths than make 1011 counts"):
        check_leaf_size(sites, sites, counts=cells_of(many).names)


def test_drift_is_told_beside_what_noise_alone_gives() -> None:
    study = counting()
    names = cells_of(study).names
    first = dict.fromkeys(names, 0.0) | {"units": 100.0, "label.0": 50.0, "label.1": 50.0, "length.0": 100.0}
    second = {**first, "label.0": 20.0, "label.1": 80.0}
    before, after = (counts_document(study, [statement(study, metrics=each)]) for each in (first, second))
    assert drift(before, after) == [
        {"block": "label", "distance": pytest.approx(0.3), "noise": 0.0},
        {"block": "length", "distance": 0.0, "noise": 0.0},
    ]
    noisy = {**after, "deviation": 10.0}
    assert drift(before, noisy)[0]["noise"] == pytest.approx(3 * 0.1 * math.sqrt(2 / math.pi) / 2)
    other = counts_document(counting(statistics={"lengths": [8]}), [])
    assert drift(before, other) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adapter_after": "sha256:b"}, "the adapter has changed"),
        ({"metrics": None}, "expected the 14 counts"),
        ({"metrics": {"units": 1.0}}, "expected the 14 counts"),
        (1.001, "no sum of whole levels"),
        (1e308, "no sum of whole levels"),
    ],
)
def test_a_false_statement_of_counts_is_found(changes: Any, says: str) -> None:
    study = counting(**SHARED)
    honest = statement(study)
    check_counts(study, honest)
    if isinstance(changes, float):
        changes = {"metrics": {**honest["metrics"], "label.1": honest["metrics"]["label.1"] * changes}}
    with pytest.raises(VerificationError, match=says):
        check_counts(study, {**honest, **changes})


@pytest.mark.parametrize("kind", ["statistics", "evaluate"])
def test_the_privacy_statement_says_what_is_counted(kind: str) -> None:
    study = counting(kind, **SHARED)
    document = privacy_document(study, [statement(study)])
    text = " ".join(privacy_markdown(document).split())
    assert "Nothing is trained" in text
    assert "Poisson-subsampled" not in text
    assert all(title in text for title in list(cells_of(study).titles.values())[:3])
    deviation = plan(study).training.noise_multiplier * cells_of(study).bound  # type: ignore[union-attr]
    assert f"standard deviation of at least {deviation:.6g}" in text
