"""Counts at a site: one unit moves them by its own vector, within the bound; exact, noised, charged, or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
from scipy import stats

from privet.client.budget.releases import limit_of, open_ledger
from privet.client.policy.agreement import agreement
from privet.client.policy.opinion import unfit_of
from privet.client.policy.rules import judge
from privet.client.rounds.worker import Worker
from privet.client.site import Resources, load_site
from privet.client.training import counts as counting_module
from privet.client.training.counts import Countable, count_sum, score_sum, unit_scores
from privet.client.training.dp import Clipping
from privet.client.training.loading import load_data
from privet.client.training.meter import Meter
from privet.client.training.model import initial_adapter, open_host
from privet.client.training.preference import judge as judged
from privet.client.training.sums import release_sum
from privet.common.errors import BudgetExhaustedError, PolicyError, StudyError
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import Randomness, SecretRandomness, SeededRandomness
from privet.common.study.counts import cells_of, check_measured
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study
from tests.client.test_policy import facts, policy_of
from tests.support.site_log import logged
from tests.support.tiny import (
    LABELS,
    answer_rows,
    class_rows,
    counting_document,
    policy_document,
    private,
    random_adapter,
    site_toml,
    token_rows,
    worker_of,
    write_policy,
)

FINE = 2.0**-40
PATIENT: dict[str, Any] = {
    "data.unit": "patient",
    "privacy": private(epsilon=1.0, unit="patient", max_records_per_unit=2),
}


def study_of(base: Path, kind: str = "statistics", **overrides: Any) -> Study:
    """Return a study that counts."""
    return Study.parse(counting_document(base, kind, overrides))


def counted(folder: Path, study: Study, rows: Sequence[dict[str, Any]]) -> Countable:
    """Return a site's rows as the study counts them."""
    site = load_site(site_toml(folder, "north", rows, seed=None))
    host = open_host(study, Resources(device="cpu", precision="fp32"))
    counts = load_data(site, study, host, b"key", distinct=False).counts
    assert counts is not None
    return counts


def sums(study: Study, data: Countable, randomness: Randomness | None = None) -> np.ndarray[Any, Any]:
    """Return the integer sums of some units."""
    return count_sum(study, data, randomness or SeededRandomness(1, "rows"), Clipping(1.0, FINE))


def named(study: Study, values: Any) -> dict[str, float]:
    """Return counts by cell, of those that are not 0."""
    cells = cells_of(study)
    found = np.asarray(values, np.float64) / cells.scale
    return {name: float(value) for name, value in zip(cells.names, found, strict=True) if value}


# --- one unit --------------------------------------------------------------------------------------------


def test_counts_without_noise_are_those_of_the_rows(tmp_path: Path, bert: Path) -> None:
    rows = [
        *class_rows(8),
        {"text": "", "label": "heart", "patient": "p9"},
        {"text": None, "label": "bone", "patient": "p1"},
    ]
    study = study_of(bert, statistics={"lengths": [4, 8, 16]})
    data = counted(tmp_path, study, rows)
    found = named(study, sums(study, data) * FINE)
    labels = [row["label"] for row in rows[:8]]
    assert {name: found[name] for name in ("units", "missing")} == {"units": 10, "missing": 2}
    assert [found[f"label.{k}"] for k in range(3)] == [labels.count(label) for label in LABELS]
    tokenizer = open_host(study, Resources(device="cpu", precision="fp32")).tokenizer
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in rows[:8]]
    assert found.get("length.2", 0) == sum(8 < each <= 16 for each in lengths)
    assert sum(value for name, value in found.items() if name.startswith("length.")) == 8


def test_no_weights_are_loaded_to_count(bert: Path) -> None:
    host = open_host(study_of(bert), Resources(device="cpu", precision="fp32"))
    assert host.base_parameters == 0
    assert host.spec.tensors == ()


def test_tags_count_by_their_share_of_a_record(tmp_path: Path, bert: Path) -> None:
    rows = token_rows(5)
    study = study_of(bert, **{"task.kind": "token-classification"})
    found = named(study, sums(study, counted(tmp_path, study, rows)) * FINE)
    shares = [row["tags"].count("O") / len(row["tags"]) for row in rows]
    assert found["label.0"] == pytest.approx(sum(shares), abs=1e-9)
    assert sum(value for name, value in found.items() if name.startswith("label.")) == pytest.approx(5)


@pytest.mark.parametrize("overrides", [{"privacy": private(epsilon=1.0)}, PATIENT], ids=["record", "patient"])
def test_a_unit_moves_the_counts_by_its_own_vector_within_the_clip_norm(
    tmp_path: Path, bert: Path, overrides: dict[str, Any]
) -> None:
    study = study_of(bert, **overrides)
    data = counted(tmp_path, study, [*class_rows(9), {"text": "", "label": "skin", "patient": "patient-1"}])
    whole, norms = sums(study, data), []
    for number, unit in enumerate(data.units):
        term = sums(study, replace(data, units=[unit]))
        rest = sums(study, replace(data, units=[each for place, each in enumerate(data.units) if place != number]))
        # Which rows of a patient count is drawn, so a patient with too many is compared by the number of them.
        drawn = study.privacy.unit == "patient"
        assert drawn or (whole - rest == term).all()
        norms.append(float(np.linalg.norm(term.astype(np.float64))) * FINE)
    assert max(norms) <= study.privacy.promise.clip_norm


def alike(study: Study, most: int) -> Countable:
    """Return one patient with twice as many records as count, all alike."""
    cells = cells_of(study)
    row = tuple((cells.names.index(name), 1.0) for name in ("records", "label.0", "length.0"))
    return Countable([row] * (2 * most), [list(range(2 * most))])


def test_the_largest_unit_has_the_clip_norm_and_no_more(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(bert, **PATIENT)
    data = alike(study, 2)
    norm = float(np.linalg.norm(sums(study, data).astype(np.float64))) * FINE
    assert 1 - 1e-6 < norm <= 1.0
    # Without the limit on records, one patient would move the counts further than the noise is made for.
    monkeypatch.setattr(counting_module, "draw_rows", lambda rows, most, sampling: list(rows))
    assert float(np.linalg.norm(sums(study, data).astype(np.float64))) * FINE > 1.5


def test_which_records_of_a_patient_count_is_drawn_from_them_all(bert: Path) -> None:
    study = study_of(bert, **PATIENT)
    cells = cells_of(study)
    rows = [((cells.names.index(f"length.{k}"), 1.0),) for k in range(4)]
    found = [named(study, sums(study, Countable(rows, [range(4)]), SeededRandomness(n, "x")) * FINE) for n in range(40)]
    seen = {name for each in found for name in each if name.startswith("length.")}
    assert seen == {f"length.{k}" for k in range(4)}
    assert all(each["beyond"] == pytest.approx(1) for each in found)


def test_a_patients_row_without_an_id_is_not_counted(tmp_path: Path, bert: Path) -> None:
    rows = [
        *class_rows(6),
        {"text": "", "label": "skin", "patient": ""},
        {"text": "one", "label": "skin", "patient": ""},
    ]
    study = study_of(bert, **PATIENT)
    found = named(study, sums(study, counted(tmp_path, study, rows)) * FINE)
    assert found["units"] == pytest.approx(2)  # of three rows each, of which two count
    assert found["records"] == pytest.approx(4)
    assert "missing" not in found


# --- noise -----------------------------------------------------------------------------------------------


def spread(study: Study, cells: int, halved: float = 1.0) -> float:
    """Return the probability, under the noise that is accounted, of less noise than 60 releases of no units have."""
    mechanism = plan(study)
    assert mechanism is not None
    event = replace(mechanism.training, noise_multiplier=mechanism.training.noise_multiplier * halved)
    empty = np.zeros(cells, np.int64)
    drawn = [release_sum(study, lambda _: empty, 0, SecretRandomness(), event, Meter()) for _ in range(60)]
    deviation = mechanism.training.noise_multiplier * study.privacy.promise.clip_norm
    return float(stats.chi2.cdf(float(np.sum((np.concatenate(drawn) / deviation) ** 2)), 60 * cells))


def test_the_noise_is_as_accounted(bert: Path) -> None:
    study = study_of(bert, privacy=private(epsilon=1.0))
    cells = len(cells_of(study).names)
    # The noise is secret, so each run of the test draws anew: two in a million fail by chance.
    assert 1e-6 < spread(study, cells) < 1 - 1e-6
    assert spread(study, cells, halved=0.5) < 1e-6


# --- at a real site --------------------------------------------------------------------------------------


def site(folder: Path, study: Study, allow: Sequence[str], epsilon: float = 1.0) -> Worker:
    """Return a real site whose operator approved the study and whose policy allows some releases."""
    limits = {"unit": "record", "epsilon": epsilon, "delta": 1e-3}
    file = site_toml(
        folder, "north", class_rows(30), seed=None, studies=[study.digest], declared_count=30, limit=limits
    )
    write_policy(folder / "north.policy.toml", **{"metrics.allow": list(allow)})
    return worker_of(file)


def asked(worker: Worker, study: Study, seed: int = 0) -> RoundOpen:
    adapter = random_adapter(worker.open(study)[1].spec, seed, scale=0.1)
    opened = RoundOpen(study.document(), 1, "1" * 32, adapter.digest, ("north", "south"), adapter.data)
    return logged({worker.name: worker}, opened)


def test_the_ledger_charges_what_an_accountant_of_others_computes(tmp_path: Path, bert: Path) -> None:
    study = study_of(bert, privacy=private(epsilon=1.0))
    worker, mechanism = site(tmp_path, study, ["statistics"]), plan(study)
    assert mechanism is not None
    opened = asked(worker, study)
    first = worker.update(opened)
    assert first.update.shape == (len(cells_of(study).names),)
    assert worker.update(opened).update.tobytes() == first.update.tobytes()  # no new noise
    limit = limit_of(worker.site.config)
    assert limit is not None
    ledger = open_ledger(worker.site.config)
    spent = ledger.statement("notes", limit).epsilon
    ledger.close()
    other = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    other.compose(GaussianDpEvent(mechanism.training.noise_multiplier))
    assert other.get_epsilon(1e-3) <= spent <= other.get_epsilon(1e-3) + 0.0105
    # Another such study does not fit any more.
    again = study_of(bert, privacy=private(epsilon=1.0), seed=8)
    with pytest.raises(BudgetExhaustedError):
        site(tmp_path, again, ["statistics"]).offer(again)


@pytest.mark.parametrize(("kind", "allow"), [("statistics", ["evaluate", "validation"]), ("evaluate", ["statistics"])])
def test_a_site_whose_policy_does_not_admit_it_stays_out(
    tmp_path: Path, bert: Path, kind: str, allow: list[str]
) -> None:
    more = {"evaluation": {"adapter": f"sha256:{'a' * 64}"}} if kind == "evaluate" else {}
    study = study_of(bert, kind, privacy=private(epsilon=1.0), **more)
    worker = site(tmp_path, study, allow)
    (tmp_path / "north-train.jsonl").unlink()  # no record is read
    with pytest.raises(PolicyError, match=f"E_METRICS: metrics.allow: asked {kind}"):
        worker.offer(study)


def test_a_policy_of_before_admits_no_counts(bert: Path) -> None:
    study = study_of(bert, privacy=private(epsilon=1.0))
    codes = [each.code for each in judge(policy_of(), study, facts())]
    assert "E_METRICS" in codes
    assert "E_TARGETS" not in codes  # there is no adapter
    assert "statistics" not in policy_document()["metrics"]["allow"]


@pytest.mark.parametrize("kind", ["statistics", "evaluate"])
def test_what_is_approved_says_that_nothing_is_trained(tmp_path: Path, bert: Path, kind: str) -> None:
    more = {"evaluation": {"adapter": f"sha256:{'a' * 64}"}} if kind == "evaluate" else {}
    study = study_of(bert, kind, privacy=private(epsilon=1.0), **more)
    config = load_site(site_toml(tmp_path, "north", class_rows(6), seed=None))
    said = dict(agreement(config, study, "the coordinator", None))
    assert said["training"].startswith("NOTHING is trained")
    assert all(title in said["training"] for title in cells_of(study).titles.values())
    assert "noisy counts named above" in said["leaves"]
    assert "update" not in said["leaves"]
    assert ("sha256:aaa" in said["training"]) == (kind == "evaluate")


# --- evaluation ------------------------------------------------------------------------------------------


def test_an_evaluation_adds_up_what_validation_does_and_the_confusion_matrix(tmp_path: Path, bert: Path) -> None:
    study = study_of(bert, "evaluate", evaluation={"adapter": f"sha256:{'a' * 64}"})
    host = open_host(study, Resources(device="cpu", precision="fp32"))
    config = load_site(site_toml(tmp_path, "north", class_rows(12), seed=None))
    data = load_data(config, study, host, b"key", distinct=False)
    adapter = random_adapter(host.spec, 3)
    with host.lock:
        points = score_sum(host, study, adapter, data.training.features, data.training.units, Clipping(2.0, FINE))
        scores = judged(host, data.training.features)
    found = points * FINE
    assert found[:3] == pytest.approx(np.sum([unit_scores(scores, [row]) for row in range(12)], axis=0), abs=1e-9)
    matrix = found[3:].reshape(3, 3)
    assert matrix.sum() == pytest.approx(12, abs=1e-9)
    assert np.trace(matrix) == pytest.approx(found[2], abs=1e-9)
    assert matrix.sum(1) == pytest.approx([4, 4, 4], abs=1e-9)


def test_another_adapter_than_the_agreed_one_is_refused(tmp_path: Path, bert: Path) -> None:
    plain = study_of(bert, "evaluate", evaluation={"adapter": f"sha256:{'a' * 64}"})
    right = random_adapter(open_host(plain, Resources(device="cpu", precision="fp32")).spec, 4, scale=0.1)
    study = study_of(bert, "evaluate", evaluation={"adapter": right.digest}, privacy=private(epsilon=1.0))
    worker = site(tmp_path, study, ["evaluate"])
    with pytest.raises(StudyError, match="the study measures"):
        worker.update(asked(worker, study, 5))
    assert worker.site.releases.began() == {}  # nothing was charged
    assert worker.update(asked(worker, study, 4)).update.shape == (12,)


def test_test_files_are_read_where_the_study_says_so(tmp_path: Path, bert: Path) -> None:
    study = study_of(bert, "evaluate", evaluation={"adapter": f"sha256:{'a' * 64}", "files": "test"})
    host = open_host(study, Resources(device="cpu", precision="fp32"))
    file = site_toml(tmp_path, "north", class_rows(12), class_rows(5, seed=3), seed=None)
    assert len(load_data(load_site(file), study, host, b"key", distinct=False).training.units) == 5
    (tmp_path / "other").mkdir()
    alone = load_site(site_toml(tmp_path / "other", "north", class_rows(12), seed=None))
    with pytest.raises(Exception, match="names none"):
        load_data(alone, study, host, b"key", distinct=False)
    assert "names none" in str(unfit_of(alone, study))  # before a person approves
    assert json.loads(json.dumps(study.document()))["evaluation"]["files"] == "test"


def test_answers_have_lengths_and_no_labels_and_the_base_alone_is_measured(tmp_path: Path, llama: Path) -> None:
    rows = answer_rows(6)
    study = study_of(llama, **{"task.kind": "causal-lm"})
    found = named(study, sums(study, counted(tmp_path, study, rows)) * FINE)
    assert found["units"] == sum(value for name, value in found.items() if name.startswith("length.")) == 6
    assert not any(name.startswith("label.") for name in cells_of(study).names)
    base = study_of(llama, "evaluate", **{"task.kind": "causal-lm", "evaluation": {"adapter": "base"}})
    host = open_host(base, Resources(device="cpu", precision="fp32"))
    check_measured(base, initial_adapter(base, host))
    with pytest.raises(StudyError, match="measures the base alone"):
        check_measured(base, random_adapter(host.spec, 1))
