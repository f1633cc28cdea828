"""The scan of data files: what patterns find, what is alike, and that nothing of a record is in any output."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from privet.client.budget.ledger import Ledger
from privet.client.commands import policy, scan
from privet.client.pages.style import STYLE
from privet.client.policy.consent import policy_digest
from privet.client.policy.rules import ScanRules, SitePolicy, load_policy
from privet.client.policy.scanned import check_scan, load, record_path
from privet.client.rounds.answers import _failure
from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker
from privet.client.scan import checks, scanning
from privet.client.scan.kinds import ANY, COUNTED, FAULTS, KINDS
from privet.client.scan.patterns import kinds_in, plain
from privet.client.scan.twins import Twins
from privet.client.site import load_site
from privet.client.training.host import ModelHost
from privet.common.errors import PrivetError, RefusedError, ScanError
from privet.common.study.sections import EvaluationSection
from privet.common.study.study import load_study
from tests.client.test_policy_commands import SITE, STUDY
from tests.support.consortium_world import run
from tests.support.tiny import write_policy

FOUND = [
    ("us-ssn", "SSN 123-45-6789"),
    ("uk-nhs", "NHS 943 476 5919"),
    ("uk-nino", "AB 12 34 56 C"),
    ("fr-nir", "2 55 08 14 168 025 38"),
    ("de-insurance", "A123456780"),
    ("es-dni", "12345678Z"),
    ("es-dni", "X-1234567-L"),
    ("nl-bsn", "111222333"),
    ("it-cf", "RSSMRA85T10A562S"),
    ("it-cf", "rss mra 85t10 a562s"),
    ("iban", "GB82 WEST 1234 5698 7654 32"),
    ("card", "4111-1111-1111-1111"),
    ("vehicle", "1M8GDM9AXKP042788"),
    ("licence", "DEA AB1234563"),
    ("health-plan", "1EG4-TE5-MK73"),
    ("record-number", "MRN: 00412345"),
    ("record-number", "Fall-Nr. 887766"),
    ("account", "Konto-Nr. 12345678"),
    ("device", "serial no. SN-44921X"),
    ("device", "00:1B:44:11:3A:B7"),
    ("email", "j.doe (at) example.org"),
    ("url", "https://portal.example.org/p/12"),
    ("ip", "10.0.0.1"),
    ("ip", "2001:db8::1"),
    ("phone", "(555) 234-5678"),
    ("phone", "06.12.34.56.78"),
    ("fax", "Fax: +49 30 1234567"),
    ("date", "3. März 2020"),
    ("date", "03/2020"),
    ("age-over-89", "93-year-old"),
    ("address", "Hauptstraße 12"),
    ("address", "12 Old Mill Road"),
    ("postcode", "Boston, MA 02115"),
    ("name", "Frau Dr. Grünwald"),
    ("long-number", "98765432109"),
]


@pytest.mark.parametrize(("kind", "text"), FOUND)
def test_each_kind_is_found_as_the_only_one_wherever_it_stands(kind: str, text: str) -> None:
    for around in ("{}", "seen today\n{}\nstable", "({})", "seen, {}; stable."):
        assert kinds_in(around.format(text)) - {"url"} in ({kind}, {kind} - {"url"}) or kind == "url", text
        assert kind in kinds_in(around.format(text))


def test_every_kind_that_patterns_know_is_in_the_table_above() -> None:
    assert {kind for kind, _ in FOUND} | {"health-plan"} >= KINDS.keys() - {"postcode"}
    assert {*KINDS, ANY, *FAULTS} == set(COUNTED)


@pytest.mark.parametrize(
    "text",
    [
        "metformin 1000 mg 1-0-1, BP 120/80, HbA1c 6.5 %, CK-MB 25 U/l, platelets 150000, B12 5MG",
        "ICD-10 I21.4, ATC C09AA05, GCS 15/15, pain 7/10, T 37.2, version 2.1.10.4",
        "may 2 tablets; since 1987; patient 62; case 3 of 4; MR angiography",
        "HR 94, SpO2 97 %, day 12 of 21, cycle 3/6, seen at 06:15:00",
    ],
)
def test_clinical_values_are_no_identifiers(text: str) -> None:
    assert kinds_in(text) == set()


@pytest.mark.parametrize(
    ("check", "number"),
    [
        (checks.luhn, "4111111111111111"),
        (checks.iban, "GB82WEST12345698765432"),
        (checks.nhs, "9434765919"),
        (checks.nir, "255081416802538"),
        (checks.kvnr, "A123456780"),
        (checks.dni, "12345678Z"),
        (checks.dni, "X1234567L"),
        (checks.bsn, "111222333"),
        (checks.codice_fiscale, "RSSMRA85T10A562S"),
        (checks.vin, "1M8GDM9AXKP042788"),
        (checks.dea, "AB1234563"),
    ],
)
def test_check_digits_find_every_single_wrong_digit(check: Any, number: str) -> None:
    assert check(number)
    for place, sign in enumerate(number):
        for other in "0123456789" if sign.isdigit() else "":
            changed = number[:place] + other + number[place + 1 :]
            # By their rules, a VIN, a codice fiscale and a DEA number miss some.
            if other != sign and check not in (checks.codice_fiscale, checks.vin, checks.dea):
                assert not check(changed), changed


def test_disguises_are_seen_through() -> None:
    assert kinds_in("\uff12\uff10\uff12\uff10-\uff10\uff13-\uff11\uff12") == {"date"}
    assert "phone" in kinds_in("٠٦ ١٢ ٣٤ ٥٦ ٧٨")
    assert "us-ssn" in kinds_in("123–45–6789")  # noqa: RUF001
    assert "us-ssn" in kinds_in("12\u200b3-45-67\u200d89")
    assert "email" in kinds_in("jоhn@ехample.org")  # noqa: RUF001
    assert "phone" in kinds_in("phone:\n555-\n234-5678")
    assert "nl-bsn" in kinds_in("BSN\u00a0111\u202f222\u2009333")
    assert plain("a\u2011b") == "a-b"


def test_names_are_found_by_lists_where_they_are_capitalised() -> None:
    assert kinds_in("his wife Amelia came", {"amelia"}) == {"name"}
    assert kinds_in("his wife Amelia came") == set()
    assert kinds_in("rose to the ceiling", {"rose"}) == set()


@pytest.mark.parametrize(
    "part",
    [
        "1",
        "1 ",
        "a",
        "A ",
        "1-",
        "(",
        "+1",
        "@",
        "a.",
        "via a ",
        "Mr ",
        "1:",
        "A1",
        "01/",
        "a@",
        "no. ",
        "ﷺ",
        "٣",
        "RSSMRA85T10A562S ",
        "\u0315\u0300\u05ae",
    ],
)
def test_time_is_linear_in_adversarial_texts(part: str) -> None:
    def seconds(length: int) -> float:
        text = "phone of " + part * (length // len(part))
        began = time.process_time()
        kinds_in(text)
        return time.process_time() - began

    seconds(1000)
    # Twenty times the text takes at most about twenty times as long; quadratic time would take 400 times.
    assert seconds(20_000) < 80 * seconds(1000) + 0.1


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_scanned(text: str) -> None:
    assert kinds_in(text) <= KINDS.keys()


# --- texts that are alike -------------------------------------------------------------------------------


def test_texts_that_are_alike_are_counted_by_unit_file_and_label() -> None:
    base = "the patient presents with {} of the left leg for three days and denies fever nausea cough or chest pain "
    long = base + "and takes aspirin daily after a fall at home which was two weeks ago without fracture or loss of {}"
    twins = Twins()
    twins.add(long.format("pain", "sense"), "a", "x", test=False)
    twins.add(long.format("pain", "mind"), "a", "x", test=False)  # of the same unit
    assert twins.counts().near_duplicate == 0
    twins.add(long.format("pain", "hope"), "b", "y", test=False)
    twins.add("something else altogether is written here about another person", "c", "y", test=False)
    found = twins.counts()
    assert (found.near_duplicate, found.label_noise, found.train_test) == (3, 3, 0)
    twins.add(long.format("pain", "care"), "d", "x", test=True)
    found = twins.counts()
    assert (found.compared, found.near_duplicate, found.train_test) == (5, 3, 3)


def test_templates_are_counted_and_a_crowd_of_equal_texts_is_quick() -> None:
    twins = Twins()
    for number in range(3000):
        twins.add(
            "Discharge letter of the department of medicine with kind regards yours", f"{number}", None, test=False
        )
    for number in range(100):
        twins.add(f"note {number} says {number * 7} and {number * 11} of {number * 13}", f"x{number}", None, test=False)
    began = time.process_time()
    found = twins.counts()
    assert time.process_time() - began < 2
    assert found.near_duplicate >= 3000
    assert 0.9 * found.sampled < found.templated < found.sampled


def test_beyond_the_bound_texts_are_not_compared_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privet.client.scan.twins.MOST_TEXTS", 5)
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"a text {n}\n" for n in range(20)))
    out = run(scan.scan_files, tmp_path / "a.csv").output
    assert "only the first 5 texts were compared" in out


# --- the commands ---------------------------------------------------------------------------------------

LETTERS = st.text("BCDFGHJKLMNPQRSTVWXYZ", min_size=5, max_size=12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=LETTERS, number=st.integers(10**8, 10**9 - 1), suffix=st.sampled_from([".csv", ".jsonl"]), exact=st.booleans()
)
def test_nothing_of_a_record_is_in_any_output(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: str, number: int, suffix: str, exact: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    text = f"Mr {first.title()} of {first.lower()}@{first.lower()}.org, MRN {number}, www.{first.lower()}.com"
    path, page = tmp_path / f"a{suffix}", tmp_path / "page.html"
    rows = [{"text": text, "who": str(number)}] * 12
    lines = ["text,who", *(f'"{row["text"]}",{row["who"]}' for row in rows)]
    path.write_text("\n".join(lines if suffix == ".csv" else map(json.dumps, rows)) + "\n")
    options = ["--exact"] if exact else []
    said = [
        run(scan.scan_files, path, "--html", page, *options).output,
        run(scan.scan_files, path, "--json", *options).output,
    ]
    assert all("email" in each for each in said)
    everything = "\n".join([*said, page.read_text(), caplog.text])
    assert not leaked([first.title(), first.lower(), str(number)], everything, tmp_path)
    # The same search finds what a careless report would print: one value.
    assert leaked([first.lower()], f"{everything}\nfirst value: {first.lower()}", tmp_path)


def leaked(secrets: list[str], output: str, folder: Path) -> list[str]:
    """Return the pieces of four characters of secrets that are in an output, apart from digests, times and paths."""
    output = re.sub(r"[0-9a-f]{64}|20\d\d-\d\d-\d\dT[\d:+]+", "", output.replace(str(folder), "")).replace(STYLE, "")
    pieces = [secret[place : place + 4] for secret in secrets for place in range(len(secret) - 3)]
    return [piece for piece in pieces if piece in output]


def test_counts_of_few_records_are_shown_to_who_asks_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "seen without fever\n" * 30 + "write to a@b.org\n" * 3)
    assert re.search(r"text +email +fewer than 10 of 33\n", run(scan.scan_files, path).output)
    assert re.search(r"text +email +3 of 33; rows 31, 32, 33\n", run(scan.scan_files, path, "--exact").output)
    found = json.loads(run(scan.scan_files, path, "--json").output)
    assert found["files"][0]["columns"]["text"] == {"records": 33, "kinds": {"email": None, ANY: None}}


def test_a_column_says_what_its_values_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"phone": 5552345678, "turns": [{"role": "user", "content": "mail a@b.org"}]}) + "\n")
    found = json.loads(run(scan.scan_files, path, "--json", "--exact").output)["files"][0]["columns"]
    assert found["phone"]["kinds"] == {ANY: 1, "phone": 1}
    assert found["turns"]["kinds"]["email"] == 1


def test_keys_of_few_records_are_not_printed_as_names_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows: list[dict[str, str]] = [{"text": "calm"} for _ in range(12)]
    rows += [{"text": "calm", name: "mail a@b.org"} for name in ("Amelia Smithson", "Jon Smithson")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = run(scan.scan_files, path, "--json", "--exact").output
    assert "Smithson" not in answer
    found = json.loads(answer)["files"][0]["columns"]
    assert found.keys() == {"text", scanning.RARE}
    assert found[scanning.RARE]["kinds"] == {ANY: 2, "email": 2}
    assert found[scanning.RARE]["rows"]["email"] == [13, 14]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"Mr Smithson,5552345678\nMr Smithson,5552345678\n"),  # no line of names
        ("a.csv", b"Smithson,text\nSmithson,other\n"),
        ("a.jsonl", b'{"Smithson@example.org": "x"}\n'),
        ("a.csv", b"text\n\xff\xfe\xfa Smithson\n"),
        ("a.parquet", b"Smithson"),
        ("a.json", b'{"text": "Smithson"'),
        ("a.docx", b"Smithson"),
    ],
)
def test_wrong_files_are_refused_in_a_sentence_without_contents(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrivetError) as found:
        run(scan.scan_files, tmp_path / name)
    assert "Smithson" not in str(found.value)
    assert "555" not in str(found.value)
    with pytest.raises(PrivetError, match="cannot be read"):
        run(scan.scan_files, tmp_path / "absent.csv")


def test_recognisers_are_loaded_by_name_and_cannot_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\nhis wife Amelia\n")

    def broken(text: str) -> set[str]:
        raise ValueError(text)

    found: dict[str, Any] = {"wife": lambda text: ["name"], "wrong": lambda text: [text], "broken": broken}
    entries = [SimpleNamespace(name=name, load=lambda own=each: own) for name, each in found.items()]
    monkeypatch.setattr(scanning, "entry_points", lambda group: entries)
    assert "name" in run(scan.scan_files, path, "--recogniser", "wife").output
    for name in ("wrong", "broken", "absent"):
        with pytest.raises(PrivetError) as error:
            run(scan.scan_files, path, "--recogniser", name)
        assert "Amelia" not in str(error.value)


# --- the policy -----------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site with an approved study."""
    (tmp_path / "notes.csv").write_text("t,l\n" + "".join(f"seen without fever {n} {n * n},a\n" for n in range(40)))
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "elsewhere").mkdir()
    Ledger.create(tmp_path / "ledger.db", tmp_path / "elsewhere/head.json").close()
    write_policy(tmp_path / "policy.toml")
    assert run(policy.approve, tmp_path / "site.toml", tmp_path / "study.toml").exit_code == 0
    return tmp_path / "site.toml"


def require(site: Path, rules: str) -> None:
    write_policy(site.parent / "policy.toml")
    with (site.parent / "policy.toml").open("a") as file:
        file.write(f"\n[scan]\nmax_rate = {{ {rules} }}\n")


def test_a_policy_without_the_table_keeps_its_digest_and_needs_no_scan(site: Path) -> None:
    assert "scan" not in load_policy(site.parent / "policy.toml").model_dump(mode="json")
    before = policy_digest(load_site(site))
    assert before == "sha256:" + before[7:]
    require(site, "")
    assert policy_digest(load_site(site)) != before
    assert isinstance(load_policy(site.parent / "policy.toml"), SitePolicy)
    with pytest.raises(ValidationError, match="expected names among"):
        ScanRules(max_rate={"emial": 0.0})


def test_a_site_trains_only_on_scanned_files_within_the_limits(site: Path) -> None:
    study = site.parent / "study.toml"
    asked, notes = load_study(study), site.parent / "notes.csv"
    assert run(policy.check, site, study).exit_code == 0
    require(site, "email = 0.0, date = 0.05")

    def refused(words: str, *, files: bool = True) -> None:
        with pytest.raises(ScanError, match=words):
            check_scan(load_site(site), asked, files=files)
        answer = run(policy.check, site, study)
        assert answer.exit_code == 3
        assert re.search(words, answer.output)
        assert f"privet site scan {site} --study STUDY" in answer.output

    refused("there is none", files=False)
    assert run(scan.scan_site, site, "--study", study).exit_code == 0
    check_scan(load_site(site), asked, files=True)
    assert run(policy.check, site, study).exit_code == 0
    with notes.open("a") as file:
        file.write("seen on 3 March 2020,b\n")
    refused("has changed since")
    assert run(scan.scan_site, site, "--study", study).exit_code == 0  # 1 of 41 is below 5 %
    with notes.open("a") as file:
        file.write("write to a@b.org,b\n")
    answer = run(scan.scan_site, site, "--study", study)
    assert (answer.exit_code, "BROKEN: scan.max_rate email in the column t" in answer.output) == (3, True)
    refused("email in the column t: more than 0 of the records", files=False)
    with pytest.raises(ScanError):
        RealSite(load_site(site).model_copy(update={"log": None})).check_files(asked)


def test_all_refusals_over_a_scan_look_the_same_to_the_coordinator(site: Path) -> None:
    study = load_study(site.parent / "study.toml")
    require(site, "email = 0.0")
    said = []
    for text in ("", "write to a@b.org,b\n"):
        if text:
            with (site.parent / "notes.csv").open("a") as file:
                file.write(text)
            run(scan.scan_site, site)
        with pytest.raises(ScanError) as found:
            check_scan(load_site(site), study, files=True)
        said.append((_failure(found.value), found.value.code, found.value.rule, found.value.asked, found.value.allowed))
    assert said[0] == said[1]


def test_other_settings_of_a_file_end_its_scan(site: Path) -> None:
    study = load_study(site.parent / "study.toml")
    require(site, "email = 0.0")
    run(scan.scan_site, site, "--study", site.parent / "study.toml")
    check_scan(load_site(site), study, files=False)
    with site.open("a") as file:
        file.write('\n[format]\nencoding = "latin-1"\n')
    with pytest.raises(ScanError, match=r"settings in .format. for the training file"):
        check_scan(load_site(site), study, files=False)


def test_an_evaluation_is_judged_by_the_files_that_it_reads(site: Path) -> None:
    text = site.read_text()
    (site.parent / "test.csv").write_text("t,l\nwrite to a@b.org,a\n" + "seen without fever,b\n" * 20)
    site.write_text(text.replace("train =", 'test = ["test.csv"]\ntrain =', 1))
    require(site, "email = 0.0, near-duplicate = 0.5")
    training = load_study(site.parent / "study.toml")
    evaluation = EvaluationSection(adapter="base", files="test")
    measuring = training.model_copy(update={"kind": "evaluate", "evaluation": evaluation})
    run(scan.scan_site, site, "--study", site.parent / "study.toml")
    check_scan(load_site(site), training, files=True)
    with pytest.raises(ScanError, match=r"test files breaks rules .* email in the column t") as found:
        check_scan(load_site(site), measuring, files=True)
    assert "near-duplicate" not in str(found.value)  # a fault of training alone
    (site.parent / "test.csv").write_text("t,l\nseen without fever,a\n")
    with pytest.raises(ScanError, match=r"test file .* has changed"):
        check_scan(load_site(site), measuring, files=True)
    run(scan.scan_site, site, "--study", site.parent / "study.toml")
    check_scan(load_site(site), measuring, files=True)
    site.write_text(text)
    with pytest.raises(RefusedError, match="names none"):
        check_scan(load_site(site), measuring, files=True)


def test_what_was_not_measured_breaks_its_rule(site: Path) -> None:
    study = load_study(site.parent / "study.toml")
    require(site, "label-noise = 1.0")
    named = '[format]\ncolumns = { note = "t", specialty = "l" }\n'  # by which the names of the first line are believed
    site.write_text(site.read_text() + named)
    file = site.parent / "notes.csv"
    file.write_text(file.read_text().replace("t,l", "note,specialty", 1))
    run(scan.scan_site, site)  # without the study, labels are unknown
    with pytest.raises(ScanError, match="label-noise: not measured"):
        check_scan(load_site(site), study, files=True)
    run(scan.scan_site, site, "--study", site.parent / "study.toml")
    check_scan(load_site(site), study, files=True)


def test_a_record_that_others_may_write_or_that_is_none_is_refused_without_its_contents(site: Path) -> None:
    run(scan.scan_site, site)
    path = record_path(load_site(site))
    assert path is not None
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o666)
    with pytest.raises(PrivetError, match="other users"):
        load(path)
    path.chmod(0o600)
    path.write_text('{"version": "Smithson"}')
    with pytest.raises(PrivetError) as found:
        load(path)
    assert "Smithson" not in str(found.value)


def test_a_worker_compares_the_files_before_it_loads_them(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, study = site, load_study(site.parent / "study.toml")
    file.write_text(SITE + '[log]\npolicy = "p"\ncoordinator = "' + "0" * 64 + '"\nstate = "s"\nkey = "k"\n')
    require(site, "email = 0.0")
    with pytest.raises(ScanError, match="there is none"):
        RealSite(load_site(file)).check_agreed(study)
    run(scan.scan_site, site)
    with pytest.raises(ScanError, match="does not cover all columns"):  # nothing tells that t and l are names
        RealSite(load_site(file)).check_agreed(study)
    run(scan.scan_site, site, "--study", site.parent / "study.toml")
    worker, loaded = Worker(RealSite(load_site(file))), list[str]()
    monkeypatch.setattr(worker, "_host", lambda study: ModelHost.__new__(ModelHost))
    monkeypatch.setattr("privet.client.rounds.worker.load_data", lambda *args, **kwargs: loaded.append("all"))
    worker.open(study)
    assert loaded == ["all"]
    (site.parent / "notes.csv").write_text("t,l\nanother,a\n")
    with pytest.raises(ScanError, match="has changed since"):
        Worker(RealSite(load_site(file)))._load(study, None)  # type: ignore[arg-type]
    assert loaded == ["all"]
    require(site, "any-identifier = 0.0, empty = 0.0")  # a stricter policy holds from the next message on
    worker.open(study)


def test_an_example_of_the_documentation_is_a_policy(site: Path) -> None:
    require(site, "email = 0.0, us-ssn = 0.0, date = 0.02, train-test = 0.0")
    explained = run(policy.policy, site).output
    assert "It trains only on files that `privet site scan` has scanned" in explained
    assert "date in 2.00%" in explained
