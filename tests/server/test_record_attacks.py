"""Attacks on logged rounds: what a node, a site or a coordinator might try against log, rounds and auditor."""

from __future__ import annotations

import io
import json
import math
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privet.client.rounds.logbook import read_openings
from privet.client.rounds.memory import Memory
from privet.common import cli
from privet.common.audit.bundle import RELEASE, check_bundle, read_archive
from privet.common.audit.privacy_text import privacy_markdown
from privet.common.audit.release import ADAPTER, PRIVACY, STUDY
from privet.common.audit.story import story
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, ProtocolError, StateError, StudyError, VerificationError
from privet.common.log.agreement import check_leaf_size, follows, round_ended, run_opened
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.envelope import commit, sign_envelope, verify_envelope
from privet.common.log.note import COSIGNATURE, Note, NoteKey, Signature, sign_note
from privet.common.log.replay import Leaf
from privet.common.log.statements import Genesis, Join, Member, Refusal, SiteRound
from privet.common.study.messages import Contribution, Cosigned, Message, Offer, RoundOpen, Shown
from privet.common.study.study import Study
from privet.server.rounds import statements
from privet.server.rounds.archive import bundle_files
from privet.server.rounds.release import release_files
from privet.server.rounds.state import RunDirectory
from tests.server.test_record import changed, files_of, kinds, told
from tests.support.log_world import ORIGIN, private, public
from tests.support.logged_world import NOW, LoggedWorld, world_of
from tests.support.masked_world import masked_study
from tests.support.synthetic import PEFT_CONFIG, start_adapter, study_of


def one(world: LoggedWorld) -> Any:
    return next(iter(world.sites.values()))


# --- nodes and sites against the coordinator -------------------------------------------------------------


def test_a_node_that_answers_an_offer_with_a_contribution_is_no_site_and_ends_nothing(tmp_path: Path) -> None:
    import numpy as np

    world = world_of(tmp_path, masked_study(training={"rounds": 1}), 4)
    odd = Contribution("site-0000", 1, "0" * 32, 1.0, np.zeros(3, np.float32), np.zeros(0), b"x")
    one(world).answer = lambda asked, honest: odd if isinstance(asked, Offer) else honest
    world.play()
    assert kinds(world)[-1] == "export"


def test_a_site_that_does_not_witness_cannot_stop_the_log_with_a_false_cosignature(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}), 4, witnesses=3)
    witness, *_, liar = world.sites.values()
    key = NoteKey(witness.name, COSIGNATURE, public(f"witness {witness.name}"))
    line = Signature(key.name, key.id, bytes(72)).line
    liar.answer = lambda asked, honest: Cosigned(line, 0) if isinstance(asked, Shown) else honest
    world.play()
    assert kinds(world)[-1] == "export"


@pytest.mark.parametrize(("count", "length"), [(620, 20), (250, 63), (1000, 9)])
@pytest.mark.parametrize("spent", [1.2345678901234567e-05, math.nextafter(7639.7251, 8000), 9999.99991, 123456789.1])
def test_what_fits_before_a_round_fits_after_it_whatever_sites_say_of_their_failures(
    count: int, length: int, spent: float
) -> None:
    names = [f"site-{number:04d}".ljust(length, "x") for number in range(count)]
    check_leaf_size(names, names)
    with pytest.raises(StudyError, match="bytes in the round log, at most 49151 bytes fit"):
        check_leaf_size(names * 2, names * 2)
    statement = {
        "type": "round-close",
        "round": 1,
        "survivors": names[:90],
        "failures": dict.fromkeys(names[90:], '"' * 1000),  # twice as long in JSON
        "adapter_before": digest(b"a"),
        "adapter_after": digest(b"b"),
        "adapter_published": digest(b"b"),
        "aggregation": "fedavg",
        "secure_aggregation": "plain",
        "metrics": {"validation_loss": 0.12345678901234567, "validation_accuracy": 0.12345678901234567},
        "privacy": {"epsilon": dict.fromkeys(names, spent)},
    }
    ended = round_ended("run", digest(b"o"), statement, False, NOW)
    assert verify_envelope(sign_envelope(ended, private("coordinator")), (public("coordinator"),))[1] == ended
    assert ended.epsilon is not None
    assert all(spent <= value <= spent + 1 for value in ended.epsilon.values())


# --- a coordinator against sites -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"secure_aggregation": "plain"},
        {"min_sites": 1},
        {"rounds": 9},
        {"base": digest(b"other")},
        {"tokenizer": digest(b"other")},
    ],
)
def test_a_run_open_on_other_terms_than_the_study_s_is_not_its(lie: dict[str, Any]) -> None:
    study = masked_study(training={"rounds": 1})
    honest = run_opened("run", study, digest(b"a"), NOW)
    assert follows(honest, study)
    assert not follows(honest.model_copy(update=lie), study)


def test_both_leaves_of_the_evidence_must_be_under_checkpoints_that_the_site_cosigned(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 2}))
    opened: list[RoundOpen] = []

    def keep(asked: Message, honest: Message) -> Message:
        opened.extend([asked] if isinstance(asked, RoundOpen) else [])
        return honest

    one(world).answer = keep
    world.play()
    logbook, study = one(world).logbook, world.study
    logbook.check(study, opened[1], one(world).pins)
    with closing(sqlite3.connect(logbook.witness.directory / "cosigned.db")) as database, database:
        sizes = [size for (size,) in database.execute("SELECT size FROM cosigned ORDER BY size")]
        database.execute("DELETE FROM cosigned WHERE size = ?", (sizes[1],))  # the one after the empty tree
    assert sizes[1] < logbook.witness.last.size
    older = replace(opened[1].evidence, run_proof=opened[0].evidence.run_proof)
    with pytest.raises(PrivetError, match="has not cosigned"):
        logbook.check(study, replace(opened[1], evidence=older), one(world).pins)


def test_a_site_that_is_asked_twice_can_still_open_what_it_stated_first(tmp_path: Path) -> None:
    world = world_of(tmp_path, study_of(training={"rounds": 1}))
    opened: list[RoundOpen] = []

    def twice(asked: Message, honest: Message) -> Message:
        if isinstance(asked, RoundOpen):
            opened.append(asked)
            one(world).respond(asked)
        return honest

    one(world).answer = twice
    world.play()
    assert opened
    stated = next(each for each in told(world) if isinstance(each, SiteRound) and each.site == one(world).name)
    value, salt = read_openings(tmp_path / stated.site, stated.opened)["units"]
    assert commit("units", value, salt) == stated.commitments["units"]


def test_a_proof_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study())
    with pytest.raises(ProtocolError, match="at most"):
        one(world).logbook.cosign(Shown(b"", 0, bytes(32 * 1000)))


def test_a_witness_stands_at_the_largest_size_however_many_digits_it_has(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study())
    witness = one(world).logbook.witness
    for size in (999_999_999_999, 1_000_000_000_000):
        text = Checkpoint(ORIGIN, size, bytes(32)).text
        with Memory(witness.directory).rows(write=True) as memory:
            memory.keep(size, Note(text, (sign_note(text, ORIGIN, private("log")),)).encode())
    assert witness.last.size == 1_000_000_000_000


# --- a coordinator against the auditor -------------------------------------------------------------------


def test_a_run_that_charged_fewer_rounds_than_it_opened_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator leaves a site out of the cohort that its own statements name, so that it seems to pay less."""
    honest = statements.round_statement

    def lie(study: Study, state: Any, opened: RoundOpen, total: Any, started: float) -> dict[str, Any]:
        cohort = opened.cohort if opened.round == 1 else opened.cohort[1:]
        return honest(study, state, replace(opened, cohort=cohort), total, started)

    monkeypatch.setattr(statements, "round_statement", lie)
    world = world_of(tmp_path, study_of(training={"rounds": 2}), 4)
    world.play()
    report = check_bundle(files_of(world), world.policy)
    assert report.verdict.ok
    assert (report.where, "another cohort" in report.reason) == ("rounds/", True)


def exporting(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """Have the coordinator release, sign and export other files than it should."""
    monkeypatch.setattr("privet.server.rounds.run_log.release_files", lambda *args: change(release_files(*args)))


def better(files: dict[str, bytes]) -> dict[str, bytes]:
    return {**files, f"{PRIVACY}.md": files[f"{PRIVACY}.md"] + b"\nNothing about anybody is ever revealed.\n"}


def simulated(files: dict[str, bytes]) -> dict[str, bytes]:
    stated = json.loads(files[f"{PRIVACY}.json"])
    stated["simulated"] = True
    return {
        **files,
        f"{PRIVACY}.json": canonical_json(stated) + b"\n",
        f"{PRIVACY}.md": privacy_markdown(stated).encode(),
    }


def of_a_later_format(files: dict[str, bytes]) -> dict[str, bytes]:
    stated = json.loads(files[f"{PRIVACY}.json"])
    return {**files, f"{PRIVACY}.json": canonical_json({**stated, "format": 4}) + b"\n"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda files: {**files, ADAPTER: files[ADAPTER][:-1] + b"!"}, "but its round published the adapter"),
        (better, "its text differs from what"),
        (lambda files: {**files, STUDY: files[STUDY][:-1] + b" }"}, "the released study differs from the run's"),
        (of_a_later_format, "its format must be one of 1, 2, 3, found 4"),
        (simulated, "its content differs from what the study and the statements of the rounds give"),
    ],
)
def test_an_export_of_what_does_not_follow_from_the_rounds_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, bytes]], dict[str, bytes]],
    text: str,
) -> None:
    exporting(monkeypatch, change)
    world = world_of(tmp_path, study_of(training={"rounds": 1}))
    world.play()
    report = check_bundle(files_of(world, with_weights=False), world.policy)
    assert report.verdict.ok
    assert (report.where, text in report.reason) == (RELEASE, True)


def test_a_release_without_the_study_is_one_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporting(monkeypatch, lambda files: {name: data for name, data in files.items() if name != STUDY})
    world = world_of(tmp_path, study_of(training={"rounds": 1}))
    world.play()
    assert check_bundle(files_of(world, with_weights=False), world.policy).ok


@pytest.mark.parametrize("marked", [True, False])
def test_a_simulation_cannot_be_passed_off_as_a_real_run(tmp_path: Path, marked: bool) -> None:
    world = world_of(tmp_path, study_of(training={"rounds": 1}))
    for site in world.sites.values():
        site.keeps_ledger = False
    if marked:
        (world.run.path / "study.toml").touch()
    world.play()
    assert check_bundle(files_of(world), world.policy).ok == marked


def test_a_study_that_was_run_twice_is_bundled_under_the_name_it_had(tmp_path: Path) -> None:
    world = world_of(tmp_path, study_of(training={"rounds": 1}))
    world.play("first")
    (tmp_path / "run").rename(tmp_path / "old")
    RunDirectory.create(tmp_path / "run", world.study, start_adapter(), PEFT_CONFIG)
    world.play("second")
    for folder, name in (("old", "first"), ("run", "second")):
        run = RunDirectory.open(tmp_path / folder)
        files = bundle_files(run, tmp_path / "run" / "public", with_weights=True)
        assert json.loads(files["bundle.json"])["run"] == name
        assert check_bundle(files, world.policy).ok


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], LoggedWorld]:
    world = world_of(tmp_path_factory.mktemp("world"), masked_study(training={"rounds": 1}))
    world.play()
    return files_of(world), world


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("bundle.json", lambda f: {name: data for name, data in f.items() if name != "bundle.json"}),
        ("bundle.json", lambda f: {**f, "bundle.json": b'{"format":1,"run":"other","run":"run"}\n'}),
        ("study.json", lambda f: {**f, "study.json": f["study.json"].replace(b"{", b'{"seed":1,', 1)}),
        ("rounds/", lambda f: {**f, "rounds/0001.json": f["rounds/0001.json"].replace(b"{", b'{"seconds":NaN,', 1)}),
    ],
)
def test_a_bundle_that_two_readers_could_take_differently_fails(
    bundled: tuple[dict[str, bytes], LoggedWorld], where: str, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    files, world = bundled
    report = check_bundle(change(files), world.policy)
    assert (report.ok, report.where) == (False, where)


def test_a_bundle_cannot_write_to_the_auditor_s_terminal(bundled: tuple[dict[str, bytes], LoggedWorld]) -> None:
    files, world = bundled
    clear = "\x1b[2J\x1b[32mverified"
    report = check_bundle(
        changed(files, "rounds/0001.json", lambda d: d.update(nonce="f" * 32, round=clear)), world.policy
    )
    assert not report.ok
    assert "\x1b" not in str(report)


def test_a_statement_from_beyond_all_calendars_can_be_told() -> None:
    said = Refusal(
        time=2**53 - 1,
        site="alder",
        run="run",
        study=digest(b"s"),
        round=0,
        code="E_REFUSED",
        rule="",
        asked="",
        allowed="",
        policy=digest(b"p"),
    )
    (line,) = story([(Leaf(3, digest(b"l"), bytes(32)), said)])
    assert "9999-12-31" in line


def test_an_archive_that_unpacks_to_more_than_it_is_or_that_misleads_its_reader_is_refused(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("study.json")
    sparse.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**30)}
    for number, table in enumerate((b"1\n1073741824\n0\n", b"nonsense\n")):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=tarfile.PAX_FORMAT) as archive:
            data = table.ljust(512, b"\0")
            sparse.size = len(data)
            archive.addfile(sparse, io.BytesIO(data))
        with pytest.raises((ProtocolError, StateError), match=r"plain file|is not a bundle"):
            read_archive(tmp_path / f"{number}.tar")


def test_a_consortium_in_which_two_witnesses_have_one_name_is_none(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study())
    with world.journal() as journal:
        genesis = journal.history.genesis
        assert genesis is not None
        first, *others = genesis.members
        stolen = NoteKey(first.site, COSIGNATURE, public("witness another")).text
        twice = {**dict(genesis), "members": (first, others[0].model_copy(update={"witness": stolen}))}
        with pytest.raises(ValueError, match="must have its own name"):
            Genesis(**twice)
        with pytest.raises(VerificationError, match="the same witness name as another member"):
            journal.say(Join(time=NOW, member=Member(site="zoe", key=public("zoe").hex(), witness=stolen), quorum=3))
        assert journal.policy == world.policy


def test_an_error_that_quotes_a_site_cannot_write_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ProtocolError("first line\n  north: \x1b[2J", "\x1b]0;owned\x07")

    monkeypatch.setattr(cli, "build_command", lambda arguments: fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: first line\n  north: ?[2J\n hint: ?]0;owned?\n"
