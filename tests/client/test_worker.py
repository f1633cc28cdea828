"""The worker: it checks before it acts, and what it returns is what its site agreed to release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privet.client.budget.releases import open_ledger
from privet.client.rounds.logbook import Logbook, LoggedRound
from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker, open_worker
from privet.client.site import load_site, rounded_count
from privet.client.training.counts import finite_loss
from privet.client.training.model import initial_adapter
from privet.client.training.passes import score
from privet.client.training.tasks import collate, forward
from privet.client.training.train import Draws, train_round
from privet.client.training.validation import EXACT, validation_points
from privet.common.canonical import digest
from privet.common.errors import (
    BudgetExhaustedError,
    DataError,
    DivergedError,
    PolicyError,
    ProtocolError,
    RefusedError,
    StateError,
    StudyError,
    VerificationError,
)
from privet.common.pki.keyfile import public_key
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.adapter import Adapter
from privet.common.study.messages import RoundOpen
from privet.common.study.sections import VALIDATION_LOSS_CAP
from privet.common.study.study import Study
from tests.support.losses import record_losses
from tests.support.site_log import logged
from tests.support.tiny import (
    RECORDS,
    Row,
    private,
    random_adapter,
    rows_for,
    site_toml,
    tiny_study,
    worker_of,
    write_policy,
    write_rows,
)

WATCHED = {"data.validation_fraction": 0.4}


def make_worker(folder: Path, study: Study, rows: Sequence[Row] | int = 30, **more: Any) -> Worker:
    chosen = rows_for(study, rows) if isinstance(rows, int) else rows
    if more.get("seed", 1) is None:
        limit = RECORDS if study.private else None
        more = {"studies": [study.digest], "declared_count": 30, "limit": limit, **more}
    return worker_of(site_toml(folder, more.pop("name", "north"), chosen, **more))


def round_open(
    study: Study, adapter: Adapter, number: int = 1, cohort: tuple[str, ...] = ("north", "south")
) -> RoundOpen:
    return RoundOpen(study.document(), number, "1" * 32, adapter.digest, cohort, adapter.data)


def in_log(worker: Worker, opened: RoundOpen) -> RoundOpen:
    """Return the round as it stands in the site's log."""
    return logged({worker.name: worker}, opened)


def adapter_of(worker: Worker, study: Study) -> Adapter:
    return random_adapter(worker.open(study)[1].spec, scale=0.1)


# --- consent ---------------------------------------------------------------------------------------------


def test_consent_names_site_study_layout_and_a_rounded_count(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    worker = make_worker(tmp_path, study, 128)
    consent = worker.offer(study)
    assert consent.site == "north"
    assert consent.study_digest == study.digest
    assert consent.spec_digest == worker.open(study)[1].spec.digest
    assert consent.weight == 130
    assert set(consent.parts().fields) == {"site", "study_digest", "spec_digest", "weight", "identity", "proof"}
    key = worker.site.config.identity_key()
    assert key is not None
    key.public_key().verify(bytes.fromhex(consent.proof), consent.signed("", ""))
    assert consent.identity == public_key(key)  # by which the log knows a member, also where nothing is masked


def test_a_site_may_declare_its_count_itself(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    assert make_worker(tmp_path, study, declared_count=1000).offer(study).weight == 1000


@given(units=st.integers(1, 10**9))
def test_a_rounded_count_keeps_two_digits(units: int) -> None:
    found = rounded_count(units)
    assert len(str(found).rstrip("0")) <= 2
    assert abs(found - units) <= 0.05 * units
    assert found >= 1


def test_rounded_counts_by_hand() -> None:
    assert [rounded_count(n) for n in (1, 9, 10, 99, 100, 104, 105, 996, 1449, 1450)] == [
        1, 9, 10, 99, 100, 100, 110, 1000, 1400, 1500,
    ]  # fmt: skip
    with pytest.raises(StudyError):
        rounded_count(0)


def test_units_are_rows_or_patients_as_the_study_says(bert: Path, tmp_path: Path) -> None:
    by_record = tiny_study(bert, privacy=private(), **{"data.unit": "patient"})
    by_patient = tiny_study(bert, privacy=private(unit="patient"), **{"data.unit": "patient"})
    worker = make_worker(tmp_path, by_record, 60)
    assert worker.offer(by_record).weight == 60
    assert worker.offer(by_patient).weight == 20
    assert {len(rows) for rows in worker.open(by_patient)[0].training.units} == {3}


def test_a_patient_in_two_files_is_one_unit(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private(unit="patient"), **{"data.unit": "patient", **WATCHED})
    rows = rows_for(study, 60)
    for half in (0, 1):  # every patient has rows in both files
        write_rows(tmp_path / f"part{half}.jsonl", rows[half::2])
    (tmp_path / "site.toml").write_text(
        'name = "north"\nreproducible_seed = 1\ntrain = ["part0.jsonl", "part1.jsonl"]\n'
        '[resources]\nprecision = "fp32"\n'
    )
    data, _ = worker_of(tmp_path / "site.toml").open(study)
    assert len(data.training.units) + len(data.validation_units) == 20
    assert {len(unit) for unit in (*data.training.units, *data.validation_units)} == {3}


@pytest.mark.parametrize("delta", [1 / 30, 0.05])
def test_a_delta_that_would_allow_publishing_a_record_is_refused(bert: Path, tmp_path: Path, delta: float) -> None:
    study = tiny_study(bert, privacy=private(delta=delta))
    with pytest.raises(RefusedError, match="expected a value below 1/n"):
        make_worker(tmp_path, study, 30).offer(study)
    allowed = tiny_study(bert, privacy=private(delta=0.99 / 30))
    make_worker(tmp_path, allowed, 30).offer(allowed)


def test_training_and_validation_share_no_unit_and_lose_none(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private(unit="patient"), **{"data.unit": "patient", **WATCHED})
    data, _ = make_worker(tmp_path, study, 90).open(study)
    training, validation = data.training, data.validation
    assert len(training.features) + len(validation) == 90
    assert len(training.units) + len(data.validation_units) == 30
    assert sorted(row for unit in training.units for row in unit) == list(range(len(training.features)))
    assert sorted(row for unit in data.validation_units for row in unit) == list(range(len(validation)))
    assert not {feature.ids for feature in training.features} & {feature.ids for feature in validation}
    assert 4 <= len(data.validation_units) <= 20


def test_a_site_that_keeps_nothing_to_train_on_says_so(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, **{"data.validation_fraction": 0.5})
    for name in ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j"):
        worker = make_worker(tmp_path, study, 1, name=name)
        try:
            worker.offer(study)
        except DataError as error:
            assert "no training records" in str(error)  # noqa: PT017 - which of the ten it is, the split decides
            return
    pytest.fail("no split left a site without training records")


# --- what an update refuses ------------------------------------------------------------------------------


def test_a_round_that_is_not_this_sites_is_refused(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    worker = make_worker(tmp_path, study)
    adapter = adapter_of(worker, study)
    good = round_open(study, adapter)
    worker.update(good)
    for wrong, error, text in (
        (replace(good, cohort=("south",)), ProtocolError, "not in the round's cohort"),
        (replace(good, cohort=()), ProtocolError, "not in the round's cohort"),
        (replace(good, round=0), ProtocolError, "expected a round from 1 to 2"),
        (replace(good, round=3), ProtocolError, "expected a round from 1 to 2"),
        (replace(good, adapter_digest="sha256:" + "0" * 64), VerificationError, "expected adapter"),
        (replace(good, adapter=good.adapter[:-4]), ProtocolError, "layout"),
        (replace(good, adapter=good.adapter + b"\0"), ProtocolError, "layout"),
        (replace(good, study={**good.study, "more": 1}), StudyError, "unknown key"),
    ):
        with pytest.raises(error, match=text):
            worker.update(wrong)


def test_another_adapter_than_the_announced_one_is_refused(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    worker = make_worker(tmp_path, study)
    announced = adapter_of(worker, study)
    changed = bytearray(announced.data)
    changed[-1] ^= 1
    with pytest.raises(VerificationError, match="found sha256"):
        worker.update(replace(round_open(study, announced), adapter=bytes(changed)))


def part_of(opened: RoundOpen, adapter: Adapter) -> RoundOpen:
    """Return a round's message with what sites train alone."""
    return replace(opened, adapter=adapter.part("ffa").data)


def test_a_site_completes_an_adapter_with_what_it_received_before(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private(), **{"aggregation.method": "ffa"})
    worker, other = (make_worker(tmp_path / name, study) for name in ("parts", "whole"))
    first = adapter_of(worker, study)
    trained = {tensor.name: first.values[tensor.name] + 0.01 for tensor in first.spec.trained("ffa")}
    second = first.replace(trained)
    rounds = [round_open(study, adapter, number) for number, adapter in enumerate((first, second), 1)]
    for opened in rounds:
        whole = other.update(opened)
    worker.update(rounds[0])
    assert len(second.part("ffa").data) < len(second.data)
    assert np.array_equal(worker.update(part_of(rounds[1], second)).update, whole.update)


def test_a_site_that_restarted_makes_the_frozen_tensors_itself(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, **{"aggregation.method": "ffa"})
    worker, other = (make_worker(tmp_path / name, study) for name in ("parts", "whole"))
    host = worker.open(study)[1]
    first = initial_adapter(study, host)
    second = first.replace({tensor.name: first.values[tensor.name] + 0.01 for tensor in first.spec.trained("ffa")})
    opened = round_open(study, second, 2)
    host.kept.clear()
    sent = worker.update(part_of(opened, second))
    assert list(host.kept) == [study.digest]
    assert np.array_equal(sent.update, other.update(opened).update)


def test_a_completed_adapter_must_be_the_announced_one(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private(), **{"aggregation.method": "ffa"})
    worker = make_worker(tmp_path, study, seed=None)
    adapter = adapter_of(worker, study)
    opened = in_log(worker, round_open(study, adapter))
    worker.open(study)[1].kept.clear()
    with pytest.raises(VerificationError, match="found sha256"):  # its A does not follow from the seed
        worker.update(part_of(opened, adapter))
    worker.update(opened)
    other = adapter.replace({name: value + 1 for name, value in adapter.values.items()})
    second = in_log(worker, round_open(study, other, 2))  # with another A, too
    charged = open_ledger(worker.site.config).receipts("notes")
    with pytest.raises(VerificationError, match="found sha256"):
        worker.update(part_of(second, other))
    assert open_ledger(worker.site.config).receipts("notes") == charged
    worker.update(second)
    assert [receipt.round for receipt in open_ledger(worker.site.config).receipts("notes")] == [1, 2]


def test_a_part_where_every_tensor_changes_is_refused(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    worker = make_worker(tmp_path, study)
    adapter = adapter_of(worker, study)
    worker.update(round_open(study, adapter))
    with pytest.raises(ProtocolError, match="layout"):
        worker.update(part_of(round_open(study, adapter, 2), adapter))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_is_not_finite_is_refused(bert: Path, tmp_path: Path, value: float) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study)
    adapter = adapter_of(worker, study)
    name = adapter.spec.names[0]
    broken = adapter.values[name].copy()
    broken.flat[0] = value
    with pytest.raises(DivergedError, match="received adapter"):
        worker.update(round_open(study, adapter.replace({name: broken})))


# --- what an update holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("privacy", [{"mode": "none"}, private()])
def test_an_update_is_weighted_finite_and_of_the_trained_size(
    bert: Path, tmp_path: Path, privacy: dict[str, Any]
) -> None:
    study = tiny_study(bert, privacy=privacy)
    worker = make_worker(tmp_path, study, declared_count=50)
    adapter = adapter_of(worker, study)
    found = worker.update(round_open(study, adapter))
    assert (found.site, found.round, found.nonce, found.weight) == ("north", 1, "1" * 32, 50.0)
    assert found.update.dtype == np.float32
    assert found.update.size == sum(t.size for t in adapter.spec.trained(study.aggregation.method))
    assert np.isfinite(found.update).all()
    assert found.metrics.size == 0
    equal = tiny_study(bert, privacy=privacy, **{"aggregation.weighting": "equal"})
    single = worker.update(round_open(equal, adapter))
    assert single.weight == 1.0
    np.testing.assert_allclose(found.update, 50 * single.update, rtol=1e-6)


@pytest.mark.parametrize("privacy", [{"mode": "none"}, private()])
def test_a_seeded_site_repeats_itself_whatever_came_before(bert: Path, tmp_path: Path, privacy: dict[str, Any]) -> None:
    dropout = 0.2 if privacy["mode"] == "none" else 0.0  # a private study has none
    study = tiny_study(bert, privacy=privacy, **WATCHED, **{"training.dropout": dropout})
    worker = make_worker(tmp_path / "one", study)
    adapter = adapter_of(worker, study)
    first, second = (worker.update(round_open(study, adapter, number)) for number in (1, 2))
    assert not np.array_equal(first.update, second.update)
    other = make_worker(tmp_path / "two", study)
    for number, expected in ((2, second), (1, first)):
        again = other.update(round_open(study, adapter, number))
        assert np.array_equal(again.update, expected.update)
        assert np.array_equal(again.metrics, expected.metrics)
    elsewhere = make_worker(tmp_path / "three", study, name="south").update(round_open(study, adapter))
    assert not np.array_equal(elsewhere.update, first.update)
    reseeded = make_worker(tmp_path / "four", study, seed=2).update(round_open(study, adapter))
    assert not np.array_equal(reseeded.update, first.update)


def test_each_round_draws_its_own_batches(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    worker = make_worker(tmp_path, study)
    adapter = adapter_of(worker, study)
    first, second = (worker.update(round_open(study, adapter, number)).update for number in (1, 2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("number", [1, 2])
def test_sampling_and_noise_come_from_streams_of_site_round_and_purpose(
    bert: Path, tmp_path: Path, number: int
) -> None:
    study = tiny_study(bert, privacy=private(), **{"training.schedule": {"shape": "linear"}})
    worker = make_worker(tmp_path, study, seed=5)
    adapter = adapter_of(worker, study)
    found = worker.update(round_open(study, adapter, number))
    data, host = worker.open(study)
    mechanism = plan(study)
    assert mechanism is not None
    expected = train_round(
        host,
        study,
        adapter,
        data.training,
        Draws(*(SeededRandomness(5, "north", number, purpose) for purpose in ("sampling", "noise"))),
        first_step=3 * (number - 1),
        mechanism=mechanism.training,
        physical_batch=32,
    )
    assert np.array_equal(found.update, (30.0 * expected).astype(np.float32))


def test_a_site_without_a_seed_draws_its_own_noise(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private(), **WATCHED)
    workers = [make_worker(tmp_path / folder, study, seed=None) for folder in "ab"]
    adapter = adapter_of(workers[0], study)
    one, two = (worker.update(in_log(worker, round_open(study, adapter))) for worker in workers)
    assert not np.any(one.update == two.update)
    assert not np.any(one.metrics == two.metrics)


def test_a_false_head_of_the_ledger_costs_nothing_and_is_told_nothing(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    opened = in_log(worker, round_open(study, adapter_of(worker, study)))
    before = worker.site.releases.head(0, "")
    with pytest.raises(VerificationError) as caught:
        worker.update(replace(opened, evidence=replace(opened.evidence, sequence=1, head="sha256:" + "0" * 64)))
    assert caught.value.private
    assert worker.site.releases.head(0, "") == before


def test_a_ledger_behind_the_sites_own_copy_of_the_log_draws_nothing(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    opened = in_log(worker, round_open(study, adapter_of(worker, study)))
    before, check = worker.site.releases.head(0, ""), Logbook.check

    def checked(self: Logbook, *asked: Any) -> LoggedRound:
        return replace(check(self, *asked), ledger=(9, digest(b"of the ledger that was replaced")))

    monkeypatch.setattr(Logbook, "check", checked)
    with pytest.raises(VerificationError, match="row 9 is on record elsewhere") as caught:
        worker.update(opened)
    assert caught.value.private
    assert worker.site.releases.head(0, "") == before


def test_a_site_without_an_anchor_takes_part_in_nothing(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    bare = Worker(RealSite(worker.site.config.model_copy(update={"anchor": None})))
    with pytest.raises(RefusedError, match="names no anchor") as caught:
        bare.offer(study)
    assert "privet site init SITE --anchor" in caught.value.hint


def test_a_round_asked_for_again_is_answered_with_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private(), **{**WATCHED, "training.rounds": 3})
    worker = make_worker(tmp_path, study, seed=None)
    adapter = adapter_of(worker, study)
    first = worker.update(in_log(worker, round_open(study, adapter, number=2)))
    restarted = Worker(worker.site)
    for asked in (worker, restarted):
        again = asked.update(in_log(asked, replace(round_open(study, adapter, number=2), nonce="a" * 32)))
        assert again.nonce == "a" * 32
        assert again.weight == first.weight
        assert again.update.tobytes() == first.update.tobytes()
        assert again.metrics.tobytes() == first.metrics.tobytes()
        other = random_adapter(adapter.spec, seed=7)
        with pytest.raises(RefusedError, match="would be an uncharged release"):
            asked.update(in_log(asked, round_open(study, other, number=2)))
    assert worker.update(in_log(worker, round_open(study, other, number=3))).round == 3
    with pytest.raises(RefusedError, match=r"no longer keeps the update|would be an uncharged release"):
        worker.update(in_log(worker, round_open(study, adapter, number=2)))


def test_a_site_stops_at_its_limit_before_a_record_is_read(bert: Path, tmp_path: Path) -> None:
    first, second = (tiny_study(bert, privacy=private(), seed=seed) for seed in (7, 8))
    limits: dict[str, Any] = {"limit": {**RECORDS, "epsilon": 9.0}, "studies": [first.digest, second.digest]}
    worker = make_worker(tmp_path, first, seed=None, **limits)
    adapter = adapter_of(worker, first)
    for number in (1, 2):
        worker.update(in_log(worker, round_open(first, adapter, number)))
    (tmp_path / "north-train.jsonl").unlink()  # whoever opened the data now would fail otherwise
    for asked in (worker, Worker(worker.site)):
        with pytest.raises(
            BudgetExhaustedError, match=r"limit\.epsilon of dataset notes: the limit is epsilon 9 .* 7.* is spent"
        ) as caught:
            asked.offer(second)
        assert "the limit is epsilon 9 for each record" in caught.value.message
    renamed = make_worker(tmp_path, first, seed=None, **limits, train=["moved.jsonl"])
    with pytest.raises(BudgetExhaustedError):
        renamed.offer(second)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"limit": None}, "sets no limit for dataset notes"),
        ({"limit": {**RECORDS, "unit": "patient"}}, "limit.unit of dataset notes"),
        ({"limit": {**RECORDS, "epsilon": 7.0}}, "limit.epsilon of dataset notes"),
        ({"limit": {**RECORDS, "delta": 1e-9}}, "limit.epsilon of dataset notes"),
    ],
)
def test_a_study_beyond_the_sites_limit_is_refused_with_the_rule(
    bert: Path, tmp_path: Path, change: dict[str, Any], rule: str
) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None, **change)
    (tmp_path / "north-train.jsonl").unlink()
    with pytest.raises(RefusedError, match=rule):
        worker.offer(study)


def test_a_dataset_with_a_limit_admits_private_studies_alone(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    with pytest.raises(RefusedError, match="the study has no privacy"):
        make_worker(tmp_path, study, seed=None, limit=RECORDS).offer(study)


def test_the_policy_is_judged_before_a_record_is_read(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    adapter = adapter_of(worker, study)
    worker.offer(study)
    (tmp_path / "north-train.jsonl").unlink()  # whoever opened the data now would fail otherwise
    write_policy(tmp_path / "north.policy.toml", **{"model.max_rank": 3})
    for asked in (worker, Worker(worker.site)):  # the change holds at once, also for what was consented to
        with pytest.raises(PolicyError, match=r"E_RANK: model\.max_rank: asked 4, allowed at most 3"):
            asked.offer(study)
        with pytest.raises(PolicyError):
            asked.update(in_log(worker, round_open(study, adapter)))
    (tmp_path / "north.policy.toml").unlink()
    with pytest.raises(StudyError, match="no policy file"):
        worker.update(in_log(worker, round_open(study, adapter)))


def test_the_policy_is_judged_again_before_an_update_leaves(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    adapter = adapter_of(worker, study)
    write_policy(tmp_path / "north.policy.toml", **{"limits.max_upload_bytes": 100})
    worker.offer(study)  # how long an update is, is known once there is one
    with pytest.raises(PolicyError) as caught:
        worker.update(in_log(worker, round_open(study, adapter)))
    assert [finding.code for finding in caught.value.findings] == ["E_UPLOAD"]
    assert open_ledger(worker.site.config).receipts("notes") == ()
    write_policy(tmp_path / "north.policy.toml")
    sent = worker.update(in_log(worker, round_open(study, adapter)))  # the same round, trained anew and paid for once
    (receipt,) = open_ledger(worker.site.config).receipts("notes")
    assert (receipt.study, receipt.round) == (study.digest, 1)
    assert receipt.bytes >= sent.update.nbytes


def test_the_ledger_knows_what_began_today(bert: Path, tmp_path: Path) -> None:
    first, second = (tiny_study(bert, privacy=private(), seed=seed) for seed in (7, 8))
    worker = make_worker(
        tmp_path, first, seed=None, studies=[first.digest, second.digest], limit={**RECORDS, "epsilon": 50.0}
    )
    adapter = adapter_of(worker, first)
    write_policy(tmp_path / "north.policy.toml", **{"limits.max_studies_per_day": 1})
    worker.update(in_log(worker, round_open(first, adapter)))
    with pytest.raises(PolicyError, match="E_STUDIES_PER_DAY"):
        worker.offer(second)
    worker.update(in_log(worker, round_open(first, adapter, 2)))


def test_a_site_without_its_ledger_releases_nothing(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private())
    worker = make_worker(tmp_path, study, seed=None)
    (tmp_path / "north.ledger").unlink()
    with pytest.raises(StateError, match="there is no ledger"):
        worker.offer(study)
    nameless = Worker(RealSite(worker.site.config.model_copy(update={"ledger": None})))
    with pytest.raises(RefusedError, match="names no ledger"):
        nameless.offer(study)


# --- validation ------------------------------------------------------------------------------------------


def test_validation_sums_are_the_sums_over_units(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy={"mode": "none", "unit": "patient"}, **{"data.unit": "patient", **WATCHED})
    worker = make_worker(tmp_path, study, 60)
    data, host = worker.open(study)
    adapter = random_adapter(host.spec)
    found = worker.update(round_open(study, adapter)).metrics
    host.mount(adapter)
    expected, points = np.zeros(3), np.zeros(3, np.int64)
    for rows in data.validation_units:
        losses, hits = [], []
        for row in rows:
            batch = collate(host, [data.validation[row]])
            with torch.no_grad():
                logits = forward(host, batch)
                losses.append(float(record_losses(host.kind, logits, batch)))
            hits.append(float(logits.argmax() == batch.labels[0]))
        expected += [1, min(float(np.mean(losses)), VALIDATION_LOSS_CAP) / VALIDATION_LOSS_CAP, float(np.mean(hits))]
        alone = replace(data, validation=[data.validation[row] for row in rows], validation_units=[range(len(rows))])
        points += validation_points(host, adapter, alone, EXACT)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # A unit adds exactly what it adds alone.
    assert np.array_equal(found, points * EXACT)
    assert found[0] == len(data.validation_units) > 3


@pytest.mark.parametrize("kind", ["text-classification", "token-classification", "causal-lm"])
def test_scores_are_per_record_and_bounded(bert: Path, llama: Path, tmp_path: Path, kind: str) -> None:
    study = tiny_study(llama if kind == "causal-lm" else bert, **{"task.kind": kind}, **WATCHED)
    worker = make_worker(tmp_path, study, 40)
    data, host = worker.open(study)
    host.mount(random_adapter(host.spec, scale=50.0))
    scores = score(host, data.validation)
    assert len(scores) == len(data.validation)
    assert all(0 <= found.correct <= 1 for found in scores)
    assert all(np.isfinite(finite_loss(found)) for found in scores)
    for index in (0, len(scores) - 1):
        (alone,) = score(host, [data.validation[index]])
        assert (alone.loss, alone.correct) == (scores[index].loss, scores[index].correct)
    # A huge adapter has huge losses; in the sum, each is cut to 1.
    metrics = worker.update(round_open(study, random_adapter(host.spec, scale=50.0))).metrics
    assert 0 <= metrics[2] <= metrics[0]
    assert 0 < metrics[1] <= metrics[0]


def test_under_privacy_validation_sums_carry_noise_of_their_sensitivity(bert: Path, tmp_path: Path) -> None:
    rounds = 120
    # A rate of 1 lets training and validation share one calibration, which is what takes time here.
    short = {"training.rounds": rounds, "training.local_steps": 1, "training.sampling_rate": 1.0, **WATCHED}
    study = tiny_study(bert, privacy=private(), **short)
    worker = make_worker(tmp_path, study, 12)
    adapter = adapter_of(worker, study)
    open_study = tiny_study(bert, **{**short, "training.rounds": 1})
    exact = worker.update(round_open(open_study, adapter)).metrics
    mechanism = plan(study)
    assert mechanism is not None
    assert mechanism.validation is not None
    found = np.stack([worker.update(round_open(study, adapter, n + 1)).metrics for n in range(rounds)])
    scaled = (found - exact) / (mechanism.validation.noise_multiplier * 3**0.5)
    assert stats.kstest(scaled.ravel(), "norm").pvalue > 1e-3
    assert scaled.var() == pytest.approx(1, abs=5 * (2 / scaled.size) ** 0.5)
    assert np.abs(np.corrcoef(scaled.T) - np.eye(3)).max() < 5 / rounds**0.5


def test_validation_noise_is_not_the_updates_noise() -> None:
    streams = [SeededRandomness(1, "north", 1, use).normal(3) for use in ("noise", "validation-noise", "sampling")]
    assert len({value for stream in streams for value in stream}) == 9


# --- the site file ---------------------------------------------------------------------------------------


def test_paths_are_relative_to_the_site_file(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert)
    site = load_site(site_toml(tmp_path / "deep", "north", rows_for(study, 3), rows_for(study, 3, 1), seed=None))
    assert site.train == ((tmp_path / "deep" / "north-train.jsonl").resolve(),)
    assert site.test == ((tmp_path / "deep" / "north-test.jsonl").resolve(),)


def test_a_site_file_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="unknown key"):
        load_site(site_toml(tmp_path, "north", [], seed=None, secret=True))
    with pytest.raises(StudyError, match="reproducible_seed: unknown key"):  # a simulated site's
        load_site(site_toml(tmp_path, "north", []))
    with pytest.raises(StudyError, match="no site file"):
        load_site(tmp_path / "nowhere.toml")


def test_a_worker_is_built_once_and_loads_once(bert: Path, tmp_path: Path) -> None:
    study, longer = tiny_study(bert), tiny_study(bert, **{"training.rounds": 7})
    path = site_toml(tmp_path, "north", rows_for(study, 6), seed=None, studies=[study.digest, longer.digest])
    worker = open_worker(path)
    assert open_worker(path) is worker
    data, host = worker.open(study)
    assert worker.open(study) == (data, host)
    assert worker.open(study)[0] is data
    again = worker.open(longer)
    assert again[0] is not data
    assert again[1] is host


def test_labels_reach_training_as_the_study_orders_them(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, **{"task.labels": ["bone", "heart", "skin"]})
    worker = make_worker(tmp_path, study, 30)
    data, host = worker.open(study)
    assert Counter(feature.labels for feature in data.training.features) == {0: 10, 1: 10, 2: 10}
    assert initial_adapter(study, host).spec == host.spec
