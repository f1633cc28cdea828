"""A site from invitation to serving: join waits, setup asks or takes options, goes on where it stopped, and keeps the
file that people write."""

from __future__ import annotations

import pwd
import threading
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privet.client.budget.accounts import RoundKey
from privet.client.budget.ledger import Ledger
from privet.client.commands import enrolment
from privet.client.commands.setup import setup
from privet.client.commands.site import init
from privet.client.editing import change_file, changed
from privet.client.network.enrolment import Enrolment
from privet.client.policy.rules import Facts, judge, load_policy
from privet.client.policy.text import first_policy
from privet.client.setup import other_owner, safe_delta
from privet.client.site import LimitSection, SiteConfig, load_site
from privet.common.errors import StateError, StudyError, VerificationError
from privet.common.study.study import load_study
from tests.support.consortium_world import World, run, running

ROWS = "mrn,note,label\n" + "".join(f"{number % 300},text,a\n" for number in range(900))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium that was founded by berlin and lyon. Sites of other names are members later, each of one test."""
    with running(tmp_path_factory.mktemp("consortium")) as world:
        world.found("berlin", "lyon")
        yield world


@pytest.fixture
def home(world: World, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The directory of a member that is not set up; it leaves afterwards, so that others need not confirm it."""
    name = request.node.name.replace("_", "-").partition("[")[0][-40:].strip("-")
    world.enrol(name)
    world.log_members()
    home = world.folder / name
    (home / "notes.csv").write_text(ROWS)
    yield home
    world.coordinator.members.revoke(name, "left", datetime.now(UTC))
    world.log_members()


def words(world: World, home: Path) -> list[str]:
    """Return the options that confirm the consortium and all other members."""
    members = Enrolment(home).terms.members
    told = [f"--member={each.site}={each.words}" for each in members if each.site != home.name]
    return [f"--charter={world.coordinator.charter.words}", *told]


# --- joining ---------------------------------------------------------------------------------------------


def test_join_waits_until_the_site_is_approved(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(enrolment, "_TELL_SECONDS", 0.1)
    token, made = world.invite("oslo"), world.coordinator

    def approve() -> None:
        made.approve("oslo", Enrolment(tmp_path / "oslo").asked.keys.words, datetime.now(UTC))

    timer = threading.Timer(0.5, approve)
    timer.start()
    result = run(enrolment.join, token.text, tmp_path / "oslo")
    timer.join()
    made.members.revoke("oslo", "left", datetime.now(UTC))
    assert result.exit_code == 0
    lines = result.output.splitlines()
    told = [line.partition(" ")[0] for line in lines]
    assert lines[told.index("words")].split()[1:] == Enrolment(tmp_path / "oslo").asked.keys.words.split()
    assert "Ctrl-C is safe" in result.output
    assert "still waiting, since" in result.output
    assert "members' port" in result.output
    assert lines[-1] == f"next: privet site setup {tmp_path / 'oslo'}"


def test_join_may_be_stopped_and_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = world.invite("turin")

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    result = run(enrolment.join, token.text, tmp_path / "turin")
    assert (result.exit_code, "run the same command again" in result.output) == (130, True)
    assert "Run this command again" in run(enrolment.join, token.text, tmp_path / "turin", "--wait=0").output
    (tmp_path / "turin/consortium/root.pem").unlink()
    run(enrolment.join, token.text, tmp_path / "turin", "--wait=0")
    assert (tmp_path / "turin/consortium/root.pem").exists()


# --- setting up ------------------------------------------------------------------------------------------


def test_by_options(world: World, home: Path) -> None:
    file = home / "site.toml"
    file.write_text(file.read_text() + "# our own remark\n")
    before = file.read_text()
    result = run(
        setup, home, "--yes", *words(world, home), "--train", home / "notes.csv", "--patient-column=mrn", "--epsilon=6",
        "--anchor", home / "elsewhere/head.json", "--anchor-same-disk",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    site = load_site(file)
    assert (site.train, site.patient_column, site.patient_ids) == ((home / "notes.csv",), "mrn", "number")
    assert (site.declared_count, site.limit) == (300, LimitSection(unit="patient", epsilon=6.0, delta=1e-5))
    assert 'train = ["notes.csv"]' in file.read_text()  # relative to the file, as it lies beside it
    assert "# our own remark" in file.read_text()
    assert [line for line in before.splitlines() if line.startswith("#  ")] == [
        line for line in file.read_text().splitlines() if line.startswith("#  ")
    ]
    assert load_policy(home / "policy.toml").privacy.max_epsilon == 6
    assert result.output.splitlines()[-1] == f"then: privet site serve {file}"
    before, policy = file.read_text(), (home / "policy.toml").read_text()
    assert run(setup, home, "--yes").exit_code == 0
    assert file.read_text() == before
    said = run(setup, home, "--yes", "--no-validation")
    assert "policy.toml exists, and --shared-noise" in " ".join(said.output.split())
    assert (home / "policy.toml").read_text() == policy
    said = run(setup, home, "--yes", "--declared-count=3000")
    assert "declares 3000 units, and its files have about 300" in said.output
    assert "declares" not in run(setup, home, "--yes", "--declared-count=250").output


def test_by_answers(world: World, home: Path) -> None:
    members = [each for each in Enrolment(home).terms.members if each.site != home.name]
    answers = [world.coordinator.charter.words]
    answers += [text for each in members for text in ("acorn", each.words)]  # misheard once
    answers += [str(home / "notes.csv"), "mrn", "", "", "", "", str(home / "elsewhere/head.json"), "y", "n", ""]
    result = run(setup, home, answers="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    site = load_site(home / "site.toml")
    assert (site.patient_ids, site.declared_count, site.anchor_same_disk) == ("number", 300, True)
    assert site.limit == LimitSection(unit="patient", epsilon=8.0, delta=1e-5)
    assert site.policy is not None
    rules = load_policy(site.policy)
    assert (rules.privacy.max_epsilon_alone, rules.metrics.allow) == (8.0, ("validation",))
    assert result.output.count("Have them read out again") == len(members)
    for title in ("Trust: the consortium", "Data files", "Who a patient is", "Declared count", "Limit", "Anchor"):
        assert title in result.output
    assert "a limit of the same size admits one such study, and then none ever again" in " ".join(result.output.split())
    assert "295" not in result.output  # no id of a patient


def test_it_stops_and_goes_on(world: World, home: Path) -> None:
    file = home / "site.toml"
    with pytest.raises(StateError, match="stopped at: Column of patients") as caught:
        run(setup, home, *words(world, home), answers=f"{home / 'notes.csv'}\n")
    assert "--patient-column" in caught.value.hint
    assert load_site(file).train == (home / "notes.csv",)
    with pytest.raises(StudyError, match="no safe default") as missing:
        run(setup, home, "--yes", "--patient-column=mrn")
    assert "--anchor PATH" in missing.value.hint
    with pytest.raises(StudyError, match="on the ledger's disk"):
        run(setup, home, "--yes", "--anchor", home / "elsewhere/head.json")
    result = run(setup, home, "--yes", "--anchor", home / "elsewhere", "--anchor-same-disk", "--no-validation")
    assert result.exit_code == 0, result.output
    assert load_policy(home / "policy.toml").metrics.allow == ()


def test_what_is_wrong_is_refused_and_changes_nothing(world: World, home: Path) -> None:
    file = home / "site.toml"
    before = file.read_text()
    for arguments, error, said in (
        (["--train", home / "none.csv"], StudyError, "there is no file"),
        (["--charter", "acorn"], VerificationError, "not those of the charter"),
        (["--member", "lyon"], StudyError, "NAME=VALUE"),
        (["--member", "lion=acorn"], StudyError, r"expected another member of the consortium \(.*lyon.*\), found lion"),
        (["--device", "auto", "--base", "nothing"], StudyError, "NAME=VALUE"),
    ):
        with pytest.raises(error, match=said):
            run(setup, home, "--yes", *arguments)
    assert file.read_text().replace('\n[resources]\ndevice = "auto"\n', "") == before
    run_with = [*words(world, home), "--train", home / "notes.csv"]
    with pytest.raises(StudyError, match="has no column 'nobody'; found mrn, note, label"):
        run(setup, home, *run_with, answers="nobody\n" * 3)
    with pytest.raises(StudyError, match=r"limit\.delta"):
        run(setup, home, "--yes", "--patient-column=mrn", "--delta=0.5")
    with pytest.raises(StudyError, match=r"limit\.epsilon"):
        run(setup, home, "--yes", "--epsilon=0")
    assert load_site(file).limit is None


def test_a_person_who_answers_wrongly_is_asked_again(world: World, home: Path) -> None:
    other = home / "elsewhere/head.json"
    (home / "notes.csv").write_text(ROWS.replace(",", ";"))
    answers = [
        str(home / "note.csv"), str(home / "notes.csv"), "y",  # a file, and how it is written
        "patient", "mrn", "numbers", "number", "about 300", "300", "eight", "8", "1", "1e-5",
        str(other), "n", str(other), "y", "n", "n",
    ]  # fmt: skip
    result = run(setup, home, *words(world, home), answers="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    assert " ".join(result.output.split()).count("Answer again.") == 7
    site = load_site(home / "site.toml")
    assert (site.patient_column, site.patient_ids, site.declared_count) == ("mrn", "number", 300)
    assert site.form_of(site.train[0]).delimiter == "semicolon"
    assert site.limit == LimitSection(unit="patient", epsilon=8.0, delta=1e-5)


def test_a_rule_that_takes_one_patient_for_two_is_asked_about(world: World, home: Path) -> None:
    spelled = [f"{number:04}" if number % 3 else str(number) for number in range(90)] + [f"{n}" for n in range(30)]
    (home / "notes.csv").write_text("mrn,note,label\n" + "".join(f"{each},text,a\n" for each in spelled))
    gone = home / "gone/deep/head.json"
    answers = [
        "",
        str(home / "notes.csv"),
        "mrn",
        "text",
        "n",
        "",
        "90",
        "",
        "",
        "",
        str(gone),
        "n",
        str(gone),
        "y",
        "n",
        "",
    ]
    result = run(setup, home, *words(world, home), answers="\n".join(answers) + "\n")
    said = " ".join(result.output.split())
    assert result.exit_code == 0, result.output
    assert "Files of training data: this question has no default. Answer again." in said
    assert "under text the ids are 110 patients, under number 90: some differ only in how they are written" in said
    assert load_site(home / "site.toml").patient_ids == "number"
    assert f"{gone.parent} does not exist (is a disk not mounted?)" in said
    # An option is an answer: it holds, with a warning.
    result = run(setup, home, "--yes", "--patient-ids=text")
    assert "WARNING: under text the ids are 110 patients" in " ".join(result.output.split())
    assert load_site(home / "site.toml").patient_ids == "text"


def test_a_wrong_column_in_the_site_file_is_no_dead_end(world: World, home: Path) -> None:
    file = home / "site.toml"
    own = [*words(world, home), "--train", home / "notes.csv", "--anchor", home / "first/head.json"]
    before = file.read_bytes()
    with pytest.raises(StudyError, match="no column 'patient'; found mrn, note, label") as caught:
        run(setup, home, "--yes", *own, "--anchor-same-disk", "--patient-column=patient")
    assert "run the same command with the right --patient-column" in caught.value.hint
    assert file.read_bytes() == before
    assert run(setup, home, "--yes", "--patient-column=mrn", *own, "--anchor-same-disk").exit_code == 0
    file.write_text(file.read_text().replace('"mrn"', '"patient"'))
    with pytest.raises(StudyError, match="no column 'patient'") as caught:
        run(setup, home, "--yes")
    assert f"`privet site setup {file} --patient-column COLUMN`" in caught.value.hint
    assert run(setup, home, answers="mrn\n").exit_code == 0
    assert load_site(file).patient_column == "mrn"


def test_an_anchor_named_after_the_ledger_is_no_dead_end(world: World, home: Path) -> None:
    file = home / "site.toml"
    run(setup, home, "--yes", *words(world, home), "--train", home / "notes.csv", "--unit=record",
        "--anchor", home / "first/head.json", "--anchor-same-disk")  # fmt: skip
    file.write_text(file.read_text().replace("first/head.json", "second/head.json"))  # by hand, and no such file
    assert run(setup, home, "--yes").exit_code == 0
    (home / "third").mkdir()
    assert run(setup, home, "--yes", "--anchor", home / "third").exit_code == 0
    assert load_site(file).anchor == home / f"third/{home.name}-ledger-head.json"
    file.write_text(changed(file.read_text(), {"anchor": None}, "site.toml"))
    assert run(setup, home, "--yes", "--anchor", home / "fourth/head.json").exit_code == 0
    with pytest.raises(StateError, match="exist already"):
        run(init, file)


def test_sites_may_name_one_directory_for_their_anchors(world: World, home: Path) -> None:
    file, other, shared = home / "site.toml", home / "other.json", home / "shared"
    other.write_text('{"head": "of another site"}')
    own = [*words(world, home), "--train", home / "notes.csv", "--unit=record"]
    for taken in (other, f"{other}/", other / "deep"):  # nothing of it is written
        with pytest.raises(StudyError, match=r"exists already|is a file") as caught:
            run(setup, home, "--yes", *own, "--anchor", taken, "--anchor-same-disk")
        assert "--anchor PATH" in caught.value.hint
        assert load_site(file).anchor is None
    answers = [str(other), f"{shared}/", "maybe", "y", "n", "y"]
    result = run(setup, home, *own, answers="\n".join(answers) + "\n")
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "is not the anchor of this site's ledger. Answer again." in said
    assert "expected y or n, found 'maybe'. Answer again." in said
    anchor = load_site(file).anchor
    assert anchor == shared / f"{home.name}-ledger-head.json"
    assert anchor.is_file()
    # A directory that does not exist yet needs no slash.
    assert run(setup, home, "--yes", "--anchor", home / "fresh").exit_code == 0
    assert load_site(file).anchor == home / f"fresh/{home.name}-ledger-head.json"


def test_what_was_in_use_is_not_made_again(world: World, home: Path) -> None:
    file = home / "site.toml"
    run(setup, home, "--yes", *words(world, home), "--train", home / "notes.csv", "--unit=record",
        "--anchor", home / "first/head.json", "--anchor-same-disk")  # fmt: skip
    site = load_site(file)
    assert site.ledger is not None
    assert site.anchor is not None
    ledger = Ledger.open(site.ledger, site.anchor, site.ledger_key)
    ledger.reserve(RoundKey("notes", f"sha256:{'0' * 64}", 1), None, f"sha256:{'0' * 64}", None, 1)
    ledger.close()
    site.anchor.unlink()
    with pytest.raises(StateError, match=r"anchor .* is missing") as caught:
        run(setup, home, "--yes")
    assert "privet site init SITE --anchor" in caught.value.hint
    run(init, file, "--anchor")
    site.ledger.unlink()
    with pytest.raises(StateError, match="there was a ledger before"):
        run(setup, home, "--yes")


def test_a_site_file_that_was_lost_is_written_anew(world: World, home: Path) -> None:
    (home / "site.toml").unlink()
    result = run(setup, home, "--yes", *words(world, home), "--train", home / "notes.csv", "--unit=record",
                 "--anchor", home / "first/head.json", "--anchor-same-disk")  # fmt: skip
    assert (result.exit_code, "anew" in result.output) == (0, True)


# --- what it writes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "shared"), [("deploy", False), ("demo", False), ("demo-llm", True), ("medquad", True)]
)
def test_the_first_policy_admits_the_examples(tmp_path: Path, study: str, shared: bool) -> None:
    asked = load_study(Path("simulations/studies") / f"{study}.toml")
    limit = LimitSection(unit="record", epsilon=8.0, delta=max(asked.privacy.promise.delta, safe_delta(300)))
    site = SiteConfig(name="a", train=(Path("x.csv"),), declared_count=300, limit=limit)
    (tmp_path / "policy.toml").write_text(first_policy(site, shared_noise=shared))
    policy = load_policy(tmp_path / "policy.toml")
    assert judge(policy, asked, Facts(datetime.now(UTC), approved=True, declared=300, began_before=())) == ()
    (finding,) = judge(policy, asked, Facts(datetime.now(UTC), approved=False, declared=300, began_before=()))
    assert finding.code == "E_NOT_APPROVED"


@pytest.mark.parametrize(("units", "delta"), [(1, 1e-5), (900, 1e-5), (10_000, 1e-5), (10_001, 1e-6), (10**6, 1e-7)])
def test_delta_is_well_below_one_unit(units: int, delta: float) -> None:
    assert safe_delta(units) == delta


def test_a_text_keeps_what_is_not_changed() -> None:
    text = 'a = [\n  "x",  # one\n]  # many\nb = "#"  # b\n# c = 3 # c\n\n[t]\nd = 1\n\n# about u\n'
    text += "[u]\n# e = 1\n# [v]\n# f = 1\n"
    new = {"a": ["y"], "b": 'q"\\', "c": True, "t.x": 1.5, "u.e": 2, "v.f": "g", "w.h": 1, "resources.bases.m.1": "/m"}
    after = changed(text, new, "x.toml")
    assert tomllib.loads(after) == {
        "a": ["y"], "b": 'q"\\', "c": True, "t": {"d": 1, "x": 1.5}, "u": {"e": 2}, "v": {"f": "g"}, "w": {"h": 1},
        "resources": {"bases": {"m.1": "/m"}},
    }  # fmt: skip
    for kept in ("# b", "# c", "# about u"):
        assert kept in after
    assert changed(after, {"t.x": None}, "x.toml").count("x =") == 0
    assert changed(text, {"b": "#"}, "x.toml") == text
    with pytest.raises(StudyError, match="cannot change") as caught:
        changed("t = { a = 1 }\n", {"t.b": 2}, "x.toml")
    assert "t.b = 2" in caught.value.hint
    with pytest.raises(StudyError, match="not valid TOML"):
        changed("a = ", {"a": 1}, "x.toml")


def test_another_user_is_told_whose_the_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `sudo privet site setup`: the service could not read what root has made."""
    assert other_owner(tmp_path) == other_owner(tmp_path / "missing") == ""
    owner = pwd.getpwuid(tmp_path.stat().st_uid).pw_name
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert other_owner(tmp_path) == owner


def test_what_cannot_be_written_into_a_file_changes_nothing(tmp_path: Path) -> None:
    """Names in another encoding, a value where a table is expected, and line ends of Unicode in a remark."""
    file = tmp_path / "x.toml"
    for text, new in (
        (b"a = 1\n", {"b": "caf\udce9.csv"}),
        (b"a = 1 # \xff\n", {"b": 1}),
        (b'log = "x"\n', {"log.state": "y"}),
        (b"[[limit]]\nunit = 1\n", {"limit.unit": "record"}),
        ("a = 1 # x\u2028evil = true\n".encode(), {"b": 1}),
        (b'a = """\n[t]\nx = 1\n"""\n', {"t.x": 2}),
    ):
        file.write_bytes(text)
        with pytest.raises(StudyError):
            change_file(file, new, lambda document: None)
        assert file.read_bytes() == text


def test_a_file_behind_a_link_is_changed_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/site.toml").write_text("a = 1\n")
    (tmp_path / "site.toml").symlink_to("kept/site.toml")
    change_file(tmp_path / "site.toml", {"a": 2}, lambda document: None)
    assert (tmp_path / "site.toml").is_symlink()
    assert (tmp_path / "kept/site.toml").read_text() == "a = 2\n"
