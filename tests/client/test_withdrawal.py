"""A person is withdrawn: in no later draw, count, scan or evaluation; no id is kept; what was spent stays spent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from privet.client.budget import withdrawals
from privet.client.budget.certificate import verified
from privet.client.budget.chain import Chain
from privet.client.budget.ledger import Ledger
from privet.client.budget.withdrawals import Places, Withdrawals, withdrawn_of
from privet.client.commands import doctor
from privet.client.commands.withdrawal import withdraw
from privet.client.release.asking import Asked, trained_records
from privet.client.release.material import UNNAMED, read_material
from privet.client.rounds.answers import answer
from privet.client.scan.scanning import Source, scan
from privet.client.setup import move_anchor
from privet.client.site import SiteConfig, load_site
from privet.client.training.data import load_files, site_records
from privet.client.training.examination import examine
from privet.client.training.ids import names_by_rule
from privet.common.clock import now
from privet.common.errors import DataError, PolicyError, RefusedError, StateError, StudyError, VerificationError
from privet.common.study.messages import Failure, Offer
from privet.common.study.study import Study
from tests.support.consortium_world import run
from tests.support.tiny import private, rows_for, site_toml, tiny_study, worker_of

IDS = ("0101", "0102", "Anna ", "0104", "0105", "0106")


@pytest.fixture
def study(bert: Path) -> Study:
    return tiny_study(bert, **{"data.unit": "patient"})


def site_in(folder: Path, study: Study, ids: Sequence[Any] = IDS, **more: Any) -> Path:
    """Return the file of a site with two rows of each patient, in training and in test files."""
    rows = [{**row, "patient": ids[n // 2]} for n, row in enumerate(rows_for(study, 2 * len(ids)))]
    tests = [{**row, "patient": ids[n]} for n, row in enumerate(rows_for(study, len(ids), seed=1))]
    return site_toml(folder, "north", rows, tests, seed=None, declared_count=100, **more)


def gone(site: Path, *ids: str) -> str:
    """Withdraw people, and return what the command prints."""
    file = site.parent / "ids.txt"
    file.write_text("".join(f"{each}\n" for each in ids))
    result = run(withdraw, site, "--unit-file", file)
    assert result.exit_code == 0, result.output
    file.unlink()
    return result.output


def units(config: SiteConfig, study: Study) -> set[str]:
    return set(site_records(config, study)[0].units)


# The loader


def test_a_withdrawn_unit_is_in_no_later_record(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    config = load_site(site)
    everybody = units(config, study)
    assert len(everybody) == len(IDS)
    before = load_files(config, study)[0][0]
    said = gone(site, "Anna", "0104")
    assert "withdrawn  2 people" in said
    assert f"4 rows of {tmp_path / 'north-train.jsonl'} are left out" in said
    assert units(config, study) == everybody - {"Anna", "0104"}
    (records,), (report,) = load_files(config, study)
    assert (report.rows_read, report.kept, report.units) == (8, 8, 4)
    # The others' records are what they were: nobody else is moved by a withdrawal.
    kept = [row for row, unit in zip(before.rows, before.units, strict=True) if unit not in ("Anna", "0104")]
    assert list(records.rows) == kept
    tests = load_files(config, study, training=False)[0][0]
    assert set(tests.units) == everybody - {"Anna", "0104"}


@pytest.mark.parametrize("unit", [None, "text"])
def test_whatever_a_study_names_as_its_unit(tmp_path: Path, bert: Path, study: Study, unit: str | None) -> None:
    site = site_in(tmp_path, study)
    other = tiny_study(bert, **({} if unit is None else {"data.unit": study.data.columns["text"]}))
    config = load_site(site)
    everybody = len(site_records(config, other)[0])
    gone(site, "0102")
    assert len(site_records(config, other)[0]) == everybody - 2


@pytest.mark.parametrize(
    ("rule", "ids", "given", "left"),
    [
        ("number", [101, "0102", "103.0"], "0101", {"102", "103"}),
        ("number", ["101", "0102", "103.0"], "+103", {"101", "102"}),
        ("text", ["ab-1", "AB-2", "ab-3"], "AB\u20131", {"ab-2", "ab-3"}),
        ("case", ["ab-1", "AB-1", "ab-3"], "ab-1", {"AB-1", "ab-3"}),
        (None, ["ab-1", "ab-2", "ab-3"], " AB-1", {"ab-2", "ab-3"}),
    ],
)
def test_spellings_of_an_id_are_one_person(
    tmp_path: Path, study: Study, rule: str | None, ids: list[Any], given: str, left: set[str]
) -> None:
    more = {} if rule is None else {"patient_ids": rule}
    site = site_in(tmp_path, study, ids, **more)
    gone(site, given)
    assert units(load_site(site), study) == left


def test_counts_scan_and_evaluation_leave_the_person_out(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    config = load_site(site)
    left_out = withdrawn_of(config)
    files = examine(study, config.train, config.test, config.form_of, config.rule_for("patient"), left_out)
    assert [each.report and each.report.units for each in files] == [5, 5]
    source = Source(config.train, config.test, config.form_of, study, "patient", withdrawn=left_out)
    found, _ = scan(source, "now")
    assert [each.records for each in found.files] == [10, 5]
    assert found.texts.records == 10
    material = read_material(study, [(UNNAMED, config.test[0])], ("patient",), withdrawn=left_out)
    assert len(material.records) == 5
    assert "0101" not in material.groups["patient"]


def test_a_fault_in_a_withdrawn_row_is_no_fault_and_rows_keep_their_numbers(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    train = tmp_path / "north-train.jsonl"
    lines = [json.loads(line) for line in train.read_text().splitlines()]
    label = study.data.columns["label"]
    lines[0][label] = "no such label"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gone(site, "0101")
    site_records(load_site(site), study)
    lines[5][label] = "no such label"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"row 6 \(line 6\)"):
        site_records(load_site(site), study)


def test_a_running_study_draws_no_withdrawn_unit_in_its_next_round(tmp_path: Path, bert: Path) -> None:
    study = tiny_study(bert, **{"data.unit": "patient", "privacy.unit": "patient"})
    site = site_in(tmp_path, study, studies=[study.digest])
    worker = worker_of(site)
    first, host = worker.open(study)
    assert len(first.training.units) == len(IDS)
    assert worker.open(study)[0] is first
    gone(site, "0105")
    second, same = worker.open(study)
    assert len(second.training.units) == len(IDS) - 1
    assert same is host


# What is kept


def test_no_id_is_kept_in_clear_and_a_mark_tells_nothing_without_the_key(tmp_path: Path, study: Study) -> None:
    sites = [site_in(tmp_path / name, study) for name in ("one", "two")]
    marks = []
    for site in sites:
        said = gone(site, "Anna")
        assert "Anna" not in said.replace(str(tmp_path), "")
        config = load_site(site)
        places = Places.of(config)
        assert places is not None
        held = [*places.files, *(site.parent / "certificates").iterdir()]
        assert len(held) == 5
        for file in held:
            assert b"anna" not in file.read_bytes().lower(), file
        document = json.loads((site.parent / "certificates/withdrawal-000002.txt").with_suffix(".json").read_bytes())
        assert document["payloadType"].endswith("withdrawal+json")
        with Withdrawals.open(config) as opened:
            assert opened is not None
            marks.append(opened._rows()[0][-1]["marks"])
    assert not set(marks[0].values()) & set(marks[1].values())  # each site has its own key
    assert len(set(marks[0].values())) == len(marks[0])  # and each rule its own


def test_the_ledger_is_not_touched(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    config = load_site(site)
    assert config.ledger is not None
    with_head = Ledger.open(config.ledger, config.anchor, config.ledger_key)
    head = with_head.head
    with_head.close()
    gone(site, "0101", "0102")
    after = Ledger.open(config.ledger, config.anchor, config.ledger_key)
    # Its rows are counted in the round log: one for each withdrawal would tell everybody when somebody left.
    assert after.head == head
    after.close()


def test_withdrawing_twice_changes_nothing(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    head = withdrawn_of(load_site(site))
    assert "1 more were withdrawn before" in gone(site, "0101", "0102")
    gone(site, "0102")
    after = withdrawn_of(load_site(site))
    # A certificate that was written stays: another one would name studies that were begun since.
    first = tmp_path / "certificates/withdrawal-000002.json"
    written = first.stat().st_mtime_ns
    gone(site, "0101")
    assert first.stat().st_mtime_ns == written
    assert head is not None
    assert after is not None
    assert (head.head[0], after.head[0]) == (2, 3)


# It fails closed


def test_without_marks_key_or_anchor_nothing_is_read(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    config = load_site(site)
    places = Places.of(config)
    assert places is not None
    assert [each.ok for each in doctor.examine(site, now, only={"withdrawn"})] == [True, True]
    for file in places.files:
        file.rename(file.with_suffix(".away"))
        (_, found) = doctor.examine(site, now, only={"withdrawn"})
        assert (found.ok, "`cp BACKUP FILE`" in found.hint) == (False, True)
        with pytest.raises(StateError, match="is missing"):
            site_records(config, study)
        file.with_suffix(".away").rename(file)
    key = places.key.read_bytes()
    places.key.write_bytes(b"11" * 32)
    with pytest.raises(StateError, match="another one than the marks"):
        site_records(config, study)
    (site.parent / "more.txt").write_text("0102")
    with pytest.raises(StateError, match="another one than the marks"):
        run(withdraw, site, "--unit-file", site.parent / "more.txt")
    places.key.write_bytes(key)
    places.key.chmod(0o644)
    with pytest.raises(StateError, match="can read the key"):
        site_records(config, study)
    places.key.chmod(0o600)
    assert len(units(config, study)) == len(IDS) - 1


def test_an_old_copy_of_the_marks_is_refused(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    config = load_site(site)
    places = Places.of(config)
    assert places is not None
    shutil.copy(places.marks, tmp_path / "old")
    gone(site, "0102")
    for extra in ("-wal", "-shm"):
        places.marks.with_name(places.marks.name + extra).unlink(missing_ok=True)
    shutil.copy(tmp_path / "old", places.marks)
    with pytest.raises(VerificationError, match="an old copy was restored"):
        site_records(config, study)


def test_the_marks_follow_the_ledger_s_anchor(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    (tmp_path / "other").mkdir()
    move_anchor(site, tmp_path / "other/head.json", same_disk=True)
    config = load_site(site)
    assert config.anchor == tmp_path / "other/head.json"
    assert config.anchor.exists()
    places = Places.of(config)
    assert places is not None
    assert all(file.exists() for file in places.files)
    assert len(units(config, study)) == len(IDS) - 1
    gone(site, "0102")
    assert len(units(config, study)) == len(IDS) - 2


def test_a_column_of_another_name_is_refused_until_somebody_says_that_it_holds_the_same_ids(
    tmp_path: Path, study: Study, bert: Path
) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    for name in ("train", "test"):
        file = tmp_path / f"north-{name}.jsonl"
        file.write_text(file.read_text().replace('"patient"', '"mrn"'))
    site.write_text(site.read_text().replace('patient_column = "patient"', 'patient_column = "mrn"'))
    renamed = tiny_study(bert, **{"data.unit": "mrn"})
    with pytest.raises(StateError, match="nobody could be left out"):
        site_records(load_site(site), renamed)
    assert run(withdraw, site, "--renamed").exit_code == 0
    assert len(units(load_site(site), renamed)) == len(IDS) - 1


def test_a_file_without_the_column_is_refused(tmp_path: Path, study: Study, bert: Path) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    bare = tiny_study(bert)
    file = tmp_path / "north-train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "patient"}) + "\n" for row in rows))
    with pytest.raises(DataError, match="expected the columns patient"):
        site_records(load_site(site), bare)


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        ("", {}, "found none"),
        ("\n \n", {}, "found none"),
        ("x1\n", {"patient_ids": "number"}, "are no ids"),
    ],
)
def test_what_names_nobody_is_refused(
    tmp_path: Path, study: Study, text: str, options: dict[str, str], why: str
) -> None:
    site = site_in(tmp_path, study, [1, 2, 3] if options else IDS, **options)
    (tmp_path / "ids").write_text(text)
    with pytest.raises(DataError, match=why):
        run(withdraw, site, "--unit-file", tmp_path / "ids")
    assert withdrawn_of(load_site(site)) is None
    for wrong in ((), ("--everything", "--renamed")):
        with pytest.raises(StudyError, match="expected one of"):
            run(withdraw, site, *wrong)
    with pytest.raises(StudyError, match="cannot be read"):
        run(withdraw, site, "--unit-file", tmp_path / "none")
    with pytest.raises(StateError, match="nobody was withdrawn"):
        run(withdraw, site, "--renamed")


@pytest.mark.parametrize(
    "ids",
    [
        [Decimal(n) for n in range(101, 107)],
        [str(n).encode() for n in range(101, 107)],
        [[str(n)] for n in range(101, 107)],
        [2.0**53 + 2 * n for n in range(101, 107)],
        [n + 0.5 for n in range(101, 107)],
    ],
    ids=["decimals", "bytes", "lists", "large floats", "fractions"],
)
def test_ids_that_cannot_be_compared_are_refused_also_where_the_study_names_no_unit(
    tmp_path: Path, study: Study, bert: Path, ids: list[Any]
) -> None:
    site = site_in(tmp_path, study)
    gone(site, "101")
    _as_parquet(site, ids)
    with pytest.raises(DataError, match="cannot be compared"):
        site_records(load_site(site), tiny_study(bert))


def test_floats_of_32_bits_are_no_ids(tmp_path: Path, study: Study, bert: Path) -> None:
    site = site_in(tmp_path, study)
    gone(site, "101")
    _as_parquet(site, pa.array([101.0, 102.0, None, 104.0, 105.0, 106.0], pa.float32()))
    with pytest.raises(DataError, match="floats of 32 bits"):
        site_records(load_site(site), tiny_study(bert))
    _as_parquet(site, pa.array([101.0, 102.0, None, 104.0, 105.0, 106.0], pa.float64()))
    assert len(site_records(load_site(site), tiny_study(bert))[0]) == 5


def _as_parquet(site: Path, ids: Any) -> None:
    rows = [json.loads(line) for line in (site.parent / "north-train.jsonl").read_text().splitlines()][: len(ids)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "patient"}
    pq.write_table(pa.table({**columns, "patient": ids}), site.parent / "north-train.parquet")
    site.write_text(site.read_text().replace("north-train.jsonl", "north-train.parquet"))


def test_an_id_is_spelled_as_in_the_files(tmp_path: Path, study: Study) -> None:
    ids = ["101,0", "102,0", "103,0"]
    site = site_in(tmp_path, study, ids, patient_ids="number")
    site.write_text(f'{site.read_text()}\n[format]\ndecimal = "comma"\n')
    assert "withdrawn  1 person" in gone(site, "102,0")
    assert units(load_site(site), study) == {"101", "103"}


def test_what_was_one_id_stays_left_out_as_one_under_another_rule(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study, ["0101", "101", "102", "103", "104", "105"], patient_ids="number")
    gone(site, "0101")
    assert units(load_site(site), study) == {"102", "103", "104", "105"}
    site.write_text(site.read_text().replace('patient_ids = "number"', 'patient_ids = "text"'))
    assert units(load_site(site), study) == {"102", "103", "104", "105"}


def test_marks_are_missed_where_all_of_them_are_lost_or_the_ledger_was_moved(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study, studies=[study.digest])
    gone(site, "0101")
    line = "withdrawals = true\n"
    assert line in site.read_text()
    marked = site.read_text()
    site.write_text(marked.replace(line, ""))  # as when the process began, before the first withdrawal
    worker = worker_of(site)
    worker.open(study)
    site.write_text(marked)
    places = Places.of(load_site(site))
    assert places is not None
    for file in places.files:
        file.unlink()
    with pytest.raises(StateError, match="is missing"):
        site_records(load_site(site), study)
    with pytest.raises(StateError, match="are missing"):
        worker.open(study)
    with pytest.raises(StateError, match="names no ledger"):
        withdrawn_of(load_site(site).model_copy(update={"ledger": None}))


@pytest.mark.parametrize("step", ["anchor", "key"])
def test_an_interrupted_first_withdrawal_leaves_a_site_that_reads_and_can_withdraw(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    site = site_in(tmp_path, study)

    def stops(*_: object) -> None:
        raise StateError("the power failed")

    with monkeypatch.context() as patch:
        if step == "key":
            patch.setattr(withdrawals, "write_new", stops)
        else:
            patch.setattr(Chain, "start_anchor", stops)
        with pytest.raises(StateError, match="power"):
            gone(site, "0101")
    assert len(units(load_site(site), study)) == len(IDS)
    gone(site, "0101")
    assert len(units(load_site(site), study)) == len(IDS) - 1


def test_the_coordinator_is_not_told_that_there_are_marks(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study, studies=[study.digest])
    gone(site, "0101")
    places = Places.of(load_site(site))
    assert places is not None
    said = []
    damages: list[Callable[[], None]] = [
        partial(places.key.chmod, 0o644),
        places.key.unlink,
        partial(_roll_back, places),
    ]
    for damage in damages:
        damage()
        reply = answer(lambda: Offer(study.document()), lambda: worker_of(site))
        assert isinstance(reply, Failure)
        said.append(reply.message + reply.hint)
    assert [text for text in said if "withdraw" in text or str(tmp_path) in text] == []


def _roll_back(places: Places) -> None:
    places.key.write_text("00" * 32)
    places.key.chmod(0o600)
    assert places.anchor is not None
    places.anchor.write_text(json.dumps({"sequence": 9, "head": "x"}))


def test_nobody_is_withdrawn_where_a_count_would_tell_of_it(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    site.write_text(site.read_text().replace("declared_count = 100\n", ""))
    (tmp_path / "ids").write_text("0101\n")
    with pytest.raises(StateError, match="declares no count"):
        run(withdraw, site, "--unit-file", tmp_path / "ids")
    assert withdrawn_of(load_site(site)) is None


def test_no_answer_of_a_withdrawn_person_is_looked_for_in_a_model(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    config = load_site(site)
    asked = Asked(files=((UNNAMED, config.test[0]),), train=config.train, withdrawn=withdrawn_of(config))
    assert len(trained_records(study, asked)) == 2 * (len(IDS) - 1)


# The certificate, and a site that leaves


def test_the_certificate_is_signed_and_says_what_privacy_bounds_and_what_it_does_not(
    tmp_path: Path, bert: Path
) -> None:
    from privet.client.budget.accounts import RoundKey
    from privet.client.budget.releases import cost_of_round, limit_of, open_ledger

    study = tiny_study(bert, **{"data.unit": "patient", "privacy": private(unit="patient")})
    limit = {"unit": "patient", "epsilon": 100.0, "delta": 1e-3}
    site = site_in(tmp_path, study, limit=limit)
    config = load_site(site)
    ledger = open_ledger(config)
    release = RoundKey("notes", study.digest, 1)
    ledger.reserve(release, cost_of_round(study, config, number=1), "sha256:" + "0" * 64, limit_of(config), 1)
    ledger.begin(release)
    bound = limit_of(config)
    assert bound is not None
    spent = ledger.statement("notes", bound).epsilon
    ledger.close()
    gone(site, "0101")
    data = (tmp_path / "certificates/withdrawal-000002.json").read_bytes()
    key = config.identity_key()
    assert key is not None
    public = key.public_key().public_bytes_raw()
    document = verified(data, public)
    assert document["studies"] == [{"study": study.digest, "rounds": 1, "epsilon": pytest.approx(spent)}]
    assert document["together"] == pytest.approx(spent)
    text = (tmp_path / "certificates/withdrawal-000002.txt").read_text()
    for part in ("What differential privacy bounds", "What it does not bound", "Nothing can be taken back", "continue"):
        assert part in text
    assert document["mark"] in text
    ledger = open_ledger(config)
    assert ledger.statement("notes", bound).epsilon == spent  # the composition stays
    ledger.close()
    for changed, with_key in ((data.replace(b"payload", b"payl0ad", 1), public), (data, bytes(31) + b"\x01")):
        with pytest.raises(VerificationError, match="has signed"):
            verified(changed, with_key)
    other = json.loads(data)
    other["payload"] = other["payload"][:-4] + "AAAA"
    with pytest.raises(VerificationError, match="has signed"):
        verified(json.dumps(other).encode(), public)


def test_a_certificate_before_any_study_says_that_nothing_has_left(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study)
    gone(site, "0101")
    text = (tmp_path / "certificates/withdrawal-000002.txt").read_text()
    assert "no update made of it has left" in text
    assert "Nothing can be taken back" not in text


def test_a_site_that_leaves_refuses_every_round_and_certifies_what_that_means(tmp_path: Path, study: Study) -> None:
    site = site_in(tmp_path, study, studies=[study.digest])
    worker = worker_of(site)
    worker.offer(study)
    with pytest.raises(StateError, match="no terminal"):
        run(withdraw, site, "--everything")
    result = run(withdraw, site, "--everything", "--yes")
    assert "ask the coordinator's operator to revoke" in result.output
    for again in (worker, worker_of(site)):
        with pytest.raises(RefusedError, match="for good") as caught:
            again.offer(study)
        assert not isinstance(caught.value, PolicyError)
        assert caught.value.code == "E_WITHDRAWN"
    text = (tmp_path / "certificates/withdrawal-000002.txt").read_text()
    assert "The whole dataset was withdrawn" in text
    assert "cannot be undone" in text


def test_the_names_of_an_id_by_rule() -> None:
    assert names_by_rule("0101") == {"plain": "0101", "number": "101", "text": "0101", "case": "0101"}
    assert names_by_rule("Ab") == {"plain": "Ab", "text": "ab", "case": "Ab"}
    assert names_by_rule(None) == {}
    assert names_by_rule(101.0) == {"plain": "101", "number": "101", "text": "101", "case": "101"}
