"""Released adapters: listed from the round log, received and verified, followed, and what the coordinator decides."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privet.client.commands import adapters as commands
from privet.client.network.adapters import FOLDER, LEAF, PROOF, adapter_at, follow, receive
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.following import Follower
from privet.client.network.proposals import consulted
from privet.client.release import opened
from privet.client.release.opened import caution, open_release
from privet.client.release.received import read_received
from privet.client.rounds.logbook import COPY
from privet.client.site import load_site
from privet.common.audit.bundle import CHECKPOINT
from privet.common.audit.release import ADAPTER, CONFIG, KEY, SIGNATURE, STUDY
from privet.common.canonical import canonical_json, digest
from privet.common.clock import now
from privet.common.errors import PrivetError, RefusedError, StateError, StudyError, VerificationError
from privet.common.log import note
from privet.common.log.agreement import run_opened
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.note import Note, parse_note
from privet.common.log.replay import STATES, Replay, admit
from privet.common.log.statements import AdapterState, Export, RoundClose, RoundOpened, SeenCheckpoint, SiteRound
from privet.common.pki.enrolment import ReleasedRequest
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study, load_study
from privet.common.study.terms import check_receiver, terms_text
from privet.server.commands import registry as deciding
from privet.server.consortium.registry import decide, entries, log_decisions, logged_history
from privet.server.consortium.releases import released_part
from privet.server.log.journal import open_journal
from privet.server.log.logfile import LogFile
from privet.server.rounds.release import digests_of, sign_files
from privet.server.rounds.state import RunDirectory
from privet.server.studies import begin
from privet.server.tracking.figures import tracked
from tests.support.consortium_world import World, leaf_of_site, lines_of_site, run
from tests.support.log_world import World as LogWorld
from tests.support.site_world import ready
from tests.support.synthetic import B, start_adapter

SITES = ("berlin", "lyon")
OWN_FILES = {
    "personal.json": b'{"site":"berlin","shared":"sha256:0"}',
    "bases.json": b'{"base":"/etc"}',
    "received.json": b"{}",
    PROOF: b"proof",
}
"""Names of files that only a site writes, in a release of a coordinator that wants to write them."""
TERMS = {"to": "participants", "purpose": "triage of referrals", "until": "2200-02-28"}


def study_of(name: str, **changes: Any) -> Study:
    document = load_study(Path("simulations/studies/deploy.toml")).document()
    document |= {
        "name": name,
        "privacy": {"mode": "none"},
        "secure_aggregation": {"mode": "plain"},
        "cohort": {**document["cohort"], "min_sites": 2},
    }
    return Study.parse({**document, **changes})


def trained(start: Adapter, step: float = 1.0) -> Adapter:
    return replace(start, values={**start.values, B: start.values[B] + np.float32(step)})


def play(
    world: World, name: str, start: Adapter, study: Study | None = None, besides: Mapping[str, bytes] | None = None
) -> Adapter:
    """Play a run of one round, as far as log and release directory go, and return its adapter.

    It releases the adapter, unless the study has a gate.
    """
    own, study, after = world.coordinator, study or study_of(name), trained(start)
    directory = RunDirectory.create(own.directory / "runs" / name, study, after, "{}")
    with open_journal(own.log_directory, own.keys) as journal:
        time = journal.clock()
        journal.say(run_opened(name, study, start.digest, time))
        opened = journal.say(
            RoundOpened(
                time=time, run=name, round=1, nonce=digest(name.encode())[7:39], adapter=start.digest, cohort=SITES,
                parameters=None,
            )
        )  # fmt: skip
        journal.flush()
        journal.sign_head()
        head = Checkpoint.parse(parse_note(LogFile(own.log_directory).checkpoint()).text)
        for site in SITES:
            said = SiteRound(
                time=time, site=site, run=name, round=1, opened=opened, policy=digest(b"policy"), ledger=None,
                charge=None, upload=digest(site.encode()),
                checkpoint=SeenCheckpoint(size=head.size, root=head.root.hex()),
            )  # fmt: skip
            journal.hear(leaf_of_site(world.folder / site, said), site)
        journal.say(
            RoundClose(
                time=time, run=name, round=1, opened=opened, survivors=SITES, failures={}, adapter_before=start.digest,
                adapter_after=after.digest, adapter_published=after.digest, aggregation=study.aggregation.method,
                transcript=None, metrics=None, epsilon=None, ended=True,
            )
        )  # fmt: skip
        if study.gate is not None:
            journal.flush()
            journal.sign_head()
            return after
        files = released_files(study, after, own.keys.release, besides or {})
        journal.say(Export(time=time, run=name, round=1, adapter=after.digest, files=digests_of(files)))
        journal.flush()
        journal.sign_head()
    (directory.path / "release").mkdir()
    for file, data in files.items():
        (directory.path / "release" / file).write_bytes(data)
    cosign(world)
    return after


def released_files(study: Study, adapter: Adapter, signer: Any, besides: Mapping[str, bytes]) -> dict[str, bytes]:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = signer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    files = {
        ADAPTER: adapter.data,
        "adapter_config.json": b"{}",
        STUDY: canonical_json(study.document()),
        KEY: key,
        "README.md": b"card",
        **besides,
    }
    return {**files, SIGNATURE: sign_files(files, study.name, signer)}


def cosign(world: World, sites: tuple[str, ...] = SITES) -> None:
    """Publish the newest checkpoint with these sites' cosignatures."""
    own = world.coordinator
    keys, text = own.keys, parse_note(LogFile(own.log_directory).checkpoint()).text
    lines = note.log_lines(text, keys.origin, keys.log, keys.pq)
    with open_journal(own.log_directory, own.keys) as journal:
        members = journal.history.members
    for site in sites:
        name = note.NoteKey.parse(str(members[site].witness)).name
        lines += lines_of_site(world.folder / site, name, text, 1_900_000_000)
    (own.directory / "public").mkdir(exist_ok=True)
    (own.directory / "public" / CHECKPOINT).write_bytes(Note(text, lines).encode())


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium of two with four runs: lent, whose study states terms; flu, flu-2 that goes on from it, and copd."""
    with ready(tmp_path_factory.mktemp("consortium")) as world:
        play(world, "lent", start_adapter(2), study_of("lent", release=TERMS))
        first = play(world, "flu", start_adapter())
        play(world, "flu-2", first)
        play(world, "copd", start_adapter(1), besides=OWN_FILES)
        yield world


@pytest.fixture
def world(played: World) -> Iterator[World]:
    yield played
    shutil.rmtree(home_of(played) / FOLDER, ignore_errors=True)


def home_of(world: World) -> Path:
    return world.folder / "berlin"


def site_file(world: World) -> Path:
    return home_of(world) / "site.toml"


def folder_of(world: World) -> Path:
    return home_of(world) / FOLDER


def test_adapters_are_listed_received_and_opened(world: World) -> None:
    rows = json.loads(run(commands.adapters, site_file(world), "--json").output)["adapters"]
    assert [row["run"] for row in rows] == ["copd", "flu-2", "flu", "lent"]
    assert all((row["state"], row["own"], row["path"]) == ("released", True, "") for row in rows)
    said = run(commands.adapters, site_file(world)).output
    assert f"next: receive one with `privet site get {site_file(world)} copd`" in said

    said = run(commands.get, site_file(world), "flu").output
    path = folder_of(world) / "flu"
    assert f"The adapter of run flu is verified, and lies in {path}." in said
    named = " --data FILE" * (not load_site(site_file(world)).test)  # evaluate needs it where there are no test files
    assert f"`privet site evaluate {site_file(world)} flu{named}`" in said
    export = logged_history(world.coordinator).runs["flu"].releases[-1].statement
    for name, expected in export.files.items():
        assert digest((path / name).read_bytes()) == expected
    assert {PROOF, LEAF, "received.json"} < {file.name for file in path.iterdir()}
    release = open_release(path)
    assert release.adapter.digest == export.adapter
    assert caution(release) == ""
    rows = json.loads(run(commands.adapters, site_file(world), "--json").output)["adapters"]
    assert [row["path"] for row in rows] == ["", "", str(path), ""]
    with pytest.raises(StateError, match="flu exists already"):
        run(commands.get, site_file(world), "flu")


def test_what_was_received_is_used_without_the_coordinator_and_refused_when_changed(world: World) -> None:
    run(commands.get, site_file(world), "copd")
    path = adapter_at(folder_of(world), "copd")  # asks nobody
    with pytest.raises(StateError, match="has not received the adapter of run flu") as caught:
        adapter_at(folder_of(world), "flu")
    assert "privet site get SITE flu" in caught.value.hint
    other = trained(start_adapter(1), 2.0)
    (path / ADAPTER).write_bytes(other.data)
    for opens in (lambda: adapter_at(folder_of(world), "copd"), lambda: open_release(path)):
        with pytest.raises(VerificationError, match="not the one that was received"):
            opens()


@pytest.mark.parametrize("file", [ADAPTER, STUDY, SIGNATURE, "README.md", KEY])
def test_a_file_that_the_coordinator_changes_is_refused_and_nothing_is_kept(world: World, file: str) -> None:
    held = world.coordinator.directory / "runs/flu/release" / file
    right = held.read_bytes()
    try:
        held.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
        with pytest.raises(VerificationError, match=f"exports {file} with digest"):
            run(commands.get, site_file(world), "flu")
    finally:
        held.write_bytes(right)
    assert list(folder_of(world).iterdir()) == []


def test_no_file_of_a_release_takes_the_place_of_the_sites_own(world: World) -> None:
    """Attack: `personal.json` makes a revoked adapter one of the site's own; `bases.json` chooses its base."""
    run(commands.get, site_file(world), "copd")
    path = folder_of(world) / "copd"
    assert {file.name for file in path.iterdir()} == {
        ADAPTER, CONFIG, STUDY, KEY, SIGNATURE, "README.md", "received.json", PROOF, LEAF,
    }  # fmt: skip
    assert (path / PROOF).read_bytes() != OWN_FILES[PROOF]
    release = open_release(path)
    assert release.personal == ""
    assert release.received is not None
    assert "bases.json" not in {file.name for file in path.rglob("*")}


def test_another_runs_files_are_refused(world: World) -> None:
    """A coordinator gives the whole release of another run, each file with a true signature."""
    runs = world.coordinator.directory / "runs"
    (runs / "flu/release").rename(runs / "kept")
    shutil.copytree(runs / "copd/release", runs / "flu/release")
    try:
        with pytest.raises(VerificationError, match="exports"):
            run(commands.get, site_file(world), "flu")
    finally:
        shutil.rmtree(runs / "flu/release")
        (runs / "kept").rename(runs / "flu/release")


def test_terms_and_policy_decide_about_receiving(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file, config, fetched = site_file(world), load_site(site_file(world)), list[str]()
    assert config.policy is not None
    ask, written = ConsortiumClient.released, config.policy.read_text()

    def released(self: ConsortiumClient, name: str, part: str, first: int) -> tuple[bytes, int]:
        fetched.append(part)
        return ask(self, name, part, first)

    monkeypatch.setattr(ConsortiumClient, "released", released)
    rounds = world.coordinator.directory / "runs/lent/rounds"
    rounds.mkdir(exist_ok=True)
    (rounds / "0001.json").write_text(json.dumps({"survivors": ["lyon"]}))
    with pytest.raises(RefusedError, match="to the sites that took part, and site berlin did not"):
        run(commands.get, file, "lent")
    (rounds / "0001.json").write_text(json.dumps({"survivors": SITES}))
    rules = '[adapters]\npurposes = ["research"]\nprivate = true\nown = true\n'
    try:
        config.policy.write_text(written + rules)
        fetched.clear()
        with pytest.raises(RefusedError, match=r"E_ADAPTER_PURPOSE.*'triage of referrals', allowed research") as caught:
            run(commands.get, file, "lent")
        assert "E_ADAPTER_NOT_PRIVATE" in caught.value.message
        assert "E_ADAPTER_NOT_OWN" not in caught.value.message
        assert fetched == [STUDY]  # nothing else is asked for
        with pytest.raises(RefusedError, match=r"E_ADAPTER_PURPOSE.*no stated purpose"):
            run(commands.get, file, "flu")
        config.policy.write_text(written + rules.replace("research", TERMS["purpose"]).replace("true", "false", 1))
        run(commands.get, file, "lent")
    finally:
        config.policy.write_text(written)
    path = folder_of(world) / "lent"
    assert open_release(path).study.release is not None
    assert "release" not in load_study(Path("simulations/studies/deploy.toml")).document()

    service, log = consulted(file, config, now)
    assert log is not None
    late = datetime(2200, 3, 1, tzinfo=UTC)
    with pytest.raises(RefusedError, match=r"until 2200-02-28 \(UTC\), which is over"):
        receive(config, folder_of(world) / "late", "lent", log, service, late, lambda *_: None)
    asked = ReleasedRequest(run="lent", file=ADAPTER, first=0)
    assert released_part(world.coordinator.directory, "lyon", asked, late - timedelta(seconds=1)).size
    with pytest.raises(RefusedError, match="which is over"):
        released_part(world.coordinator.directory, "lyon", asked, late)
    monkeypatch.setattr(opened, "now", lambda: late)
    with pytest.raises(RefusedError, match="which is over"):
        open_release(path)


def test_terms_are_checked_and_told() -> None:
    lent = study_of("lent", release=TERMS)
    assert lent.digest != study_of("lent").digest
    assert "for this purpose: triage of referrals, until 2200-02-28" in terms_text(lent)
    assert terms_text(study_of("flu")) == ""
    check_receiver(lent, "lyon", SITES)
    with pytest.raises(RefusedError, match="site oslo did not"):
        check_receiver(lent, "oslo", SITES)
    for wrong in ({"until": "2026-2-3"}, {"until": "2026-02-30"}, {"to": "all"}, {"purpose": "a\x1b[2J"}):
        with pytest.raises(StudyError, match=f"release.{next(iter(wrong))}|until"):
            study_of("lent", release=wrong)


class Lying(ConsortiumClient):
    """The service, with other answers."""

    def accepted(self) -> bytes:
        return b""


def test_a_release_that_no_quorum_cosigned_is_refused(world: World) -> None:
    file, config = site_file(world), load_site(site_file(world))
    service, log = consulted(file, config, now)
    assert log is not None
    lying = Lying(service.enrolment, service.clock)

    def get(source: Any) -> Path:
        return receive(config, folder_of(world), "flu", log, source, now(), lambda *_: None)

    with pytest.raises(VerificationError, match="has not cosigned the release yet"):
        get(lying)
    cosign(world, ("lyon",))
    try:
        with pytest.raises(PrivetError, match="cosign"):
            get(service)
    finally:
        cosign(world)
    contradicting = Lying(service.enrolment, service.clock)
    object.__setattr__(contradicting, "released", lambda run, file, first: (b"", 1 << 20))
    with pytest.raises(PrivetError, match="contradict each other"):
        get(contradicting)
    assert list(folder_of(world).iterdir()) == []


def test_who_may_not_see_a_study_is_given_no_file_of_it(tmp_path: Path, world: World) -> None:
    runs = world.coordinator.directory / "runs"
    document = study_of("closed").document()
    closed = Study.parse({**document, "cohort": {**document["cohort"], "sites": ["lyon", "oslo"]}})
    RunDirectory.create(runs / "closed", closed, start_adapter(), "{}")
    (runs / "closed/release").mkdir()
    (runs / "closed/release" / ADAPTER).write_bytes(b"secret")
    try:
        assert world.service("lyon").released("closed", ADAPTER, 0) == (b"secret", 6)
        said = set()
        for name, file in (("closed", ADAPTER), ("none", ADAPTER), ("flu", "none")):
            with pytest.raises(RefusedError) as caught:
                world.service("berlin").released(name, file, 0)
            said.add(str(caught.value).replace(name, "RUN").replace(file, "FILE"))
        assert len(said) == 1  # nothing tells a study for others from none
        for file in ("..", "../study.json", ".hidden"):
            with pytest.raises((PrivetError, ValueError)):
                world.service("lyon").released("closed", file, 0)
    finally:
        shutil.rmtree(runs / "closed")


# --- what the coordinator decides --------------------------------------------------------------------------


@pytest.fixture
def deciding_world(tmp_path: Path) -> Iterator[World]:
    with ready(tmp_path) as world:
        first = play(world, "flu", start_adapter())
        play(world, "flu-2", first)
        yield world


def test_an_adapter_is_superseded_retired_and_revoked_and_sites_follow(deciding_world: World) -> None:
    world = deciding_world
    own, file = world.coordinator, site_file(world)
    run(commands.get, file, "flu")
    path, follower = folder_of(world) / "flu", Follower(site_file(world), load_site(site_file(world)))
    listed = json.loads(run(deciding.list_, "--directory", own.directory, "--json").output)["adapters"]
    assert [(row["run"], row["parent"], row["state"]) for row in listed] == [
        ("flu-2", "flu", "released"), ("flu", None, "released"),
    ]  # fmt: skip

    run(deciding.supersede, "flu", "--by", "flu-2", "--reason", "more sites", "--directory", own.directory)
    follower.look()
    assert caution(open_release(path)) == "note: this adapter is superseded by that of run flu-2: more sites"

    run(deciding.retire, "flu", "--reason", "not maintained", "--directory", own.directory)
    follower.look()
    assert caution(open_release(path)) == "note: the coordinator retired this adapter: not maintained"
    path.rename(path.with_name("kept"))
    with pytest.raises(RefusedError, match="its adapter is retired: not maintained"):
        run(commands.get, file, "flu")
    path.with_name("kept").rename(path)
    with pytest.raises(StateError, match="the adapter of run flu is retired") as caught:
        begin(own, study_of("flu-3"), own.directory / "runs/flu/release", "flu-3")
    assert "privet registry list" in caught.value.hint
    assert not (own.directory / "runs/flu-3").exists()

    said = run(deciding.revoke, "flu", "--reason", "a canary was found", "--directory", own.directory).output
    assert "the decision is in the round log" in said
    assert adapter_at(folder_of(world), "flu") == path  # the site has not looked yet
    follower.look()
    for refused in (lambda: adapter_at(folder_of(world), "flu"), lambda: open_release(path)):
        with pytest.raises(RefusedError, match="revoked this adapter: a canary was found"):
            refused()
    with pytest.raises(RefusedError, match="the adapter of run flu is revoked: a canary was found"):
        tracked(own.directory / "runs/flu")
    shown = run(deciding.show, "flu", "--directory", own.directory).output
    assert "state       revoked: a canary was found" in shown
    with pytest.raises(StateError, match="is revoked already"):
        run(deciding.retire, "flu", "--reason", "again", "--directory", own.directory)
    with pytest.raises(StateError, match="no other adapter that is in use"):
        run(deciding.supersede, "flu-2", "--by", "flu", "--reason", "back", "--directory", own.directory)
    with pytest.raises(StudyError, match="printable ASCII"):
        run(deciding.revoke, "flu-2", "--reason", "\x1b[2J", "--directory", own.directory)
    with pytest.raises(StateError, match="run nothing has released no adapter; released have: flu-2, flu"):
        run(deciding.show, "nothing", "--directory", own.directory)
    said = json.loads(run(commands.adapters, file, "--json").output)["adapters"]
    assert {row["run"]: row["state"] for row in said} == {"flu-2": "released", "flu": "revoked"}


def test_no_revoked_adapter_comes_back(deciding_world: World) -> None:
    """Attack: it is released again; or a site is shown a log in which it is only superseded."""
    world = deciding_world
    own, file, path = world.coordinator, site_file(world), folder_of(world) / "flu"
    run(commands.get, file, "flu")
    before = logged_history(own)
    run(deciding.revoke, "flu", "--reason", "a canary was found", "--directory", own.directory)
    with open_journal(own.log_directory, own.keys) as journal:
        released = journal.exported("flu")
        assert released is not None
        journal.say(released.model_copy(update={"time": released.time + 1}))
        journal.sign_head()
    history = logged_history(own)
    assert [each.state for each in history.runs["flu"].releases] == ["revoked", "revoked"]
    with pytest.raises(RefusedError, match="its adapter is revoked"):
        run(commands.get, file, "flu")
    follow(history, folder_of(world))
    with pytest.raises(RefusedError, match="revoked this adapter"):
        open_release(path)
    superseded = AdapterState(
        time=1, run="flu", adapter=released.adapter, state="superseded", by="flu-2", reason="nothing"
    )
    before.runs["flu"].releases[-1].change = superseded
    assert follow(before, folder_of(world)) == ()
    with pytest.raises(RefusedError, match="revoked this adapter"):
        open_release(path)


def test_an_adapter_that_was_revoked_while_it_arrived_is_found(deciding_world: World) -> None:
    world = deciding_world
    own, file, path = world.coordinator, site_file(world), folder_of(world) / "flu"
    run(commands.get, file, "flu-2")
    run(commands.get, file, "flu")
    follower = Follower(file, load_site(file))
    path.rename(home_of(world) / "arriving")
    run(deciding.revoke, "flu", "--reason", "a canary was found", "--directory", own.directory)
    follower.look()
    (home_of(world) / "arriving").rename(path)
    follower.look()
    with pytest.raises(RefusedError, match="revoked this adapter"):
        open_release(path)
    # Nor does a damaged file of one adapter keep the site from hearing of another.
    (path / "received.json").write_text("{}")
    run(deciding.revoke, "flu-2", "--reason", "so is its origin", "--directory", own.directory)
    follower.look()
    for damaged, error in (("flu", StateError), ("flu-2", RefusedError)):
        with pytest.raises(error):
            open_release(folder_of(world) / damaged)


def test_an_adapter_is_revoked_in_every_run_that_releases_it() -> None:
    for first in (True, False):
        log = LogWorld(private=False)
        log.found("flu")
        log.play("flu", 1)
        log.say(log.export("flu", 1))
        bad = log.adapters["flu"]
        revoked = AdapterState(time=1, run="flu", adapter=bad, state="revoked", by=None, reason="wrong labels")
        if first:
            log.say(revoked)
        log.say(log.run_open("copd", adapter=bad))
        log.adapters["copd"] = bad
        opened = log.say(log.round_open("copd", 1))
        for site in log.sites:
            log.say(log.site_round(site, "copd", 1, opened), site)
        log.say(log.round_close("copd", 1, opened, adapter_published=bad, ended=True))
        log.say(log.export("copd", 1))
        if not first:
            log.say(revoked)
        history = Replay()
        for index, leaf in enumerate(log.leaves):
            admit(history, index, leaf, log.roots.__getitem__)
        assert [run.releases[-1].state for run in history.runs.values()] == ["revoked", "revoked"]


def test_a_decision_waits_while_a_run_has_the_log_open(deciding_world: World) -> None:
    own = deciding_world.coordinator
    with open_journal(own.log_directory, own.keys) as journal:
        said = run(deciding.revoke, "flu", "--reason", "wrong labels", "--directory", own.directory).output
        assert "written later" in said
        (_, flu) = entries(own)
        assert (flu.state, flu.document()["logged"]) == ("revoked", False)
        assert logged_history(own).runs["flu"].releases[-1].state == "released"
        assert log_decisions(own, journal) == 1
    (_, flu) = entries(own)
    assert (flu.state, flu.document()["logged"]) == ("revoked", True)


def test_revoking_names_the_runs_that_continue_from_it(deciding_world: World) -> None:
    at = ("--directory", deciding_world.coordinator.directory)
    assert "which is revoked" not in run(deciding.list_, *at).output
    said = " ".join(run(deciding.revoke, "flu", "--reason", "wrong labels", *at).output.split())
    assert "within 15 minutes" in said
    assert "run flu-2 began from it and stays released" in said
    assert "privet registry revoke flu-2 --reason TEXT" in said
    assert "continues flu, which is revoked" in run(deciding.list_, *at).output
    assert "the release of run flu, which is revoked" in run(deciding.show, "flu-2", *at).output
    assert "note" not in run(deciding.revoke, "flu-2", "--reason", "so is its origin", *at).output


def test_killed_at_any_step_the_registry_is_what_the_log_says(
    deciding_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between any two steps of a decision; the next one that has the log finishes it, once."""
    own = deciding_world.coordinator

    class KilledError(BaseException):
        pass

    def dies(*_: object, **__: object) -> None:
        raise KilledError

    places = (
        "privet.server.log.journal.Journal.say",
        "privet.server.log.journal.Journal.flush",
        "privet.server.log.roundlog.RoundLog.append",
        "privet.server.log.journal.Journal.sign_head",
        "pathlib.Path.unlink",
    )
    for number, (place, state) in enumerate(zip(places, [*STATES[1:], "", ""], strict=True)):
        name = "flu" if number < 3 else "flu-2"
        state = state or STATES[number - 1]
        decide(own, name, state, f"reason {number}", now(), "flu-2" if state == "superseded" else None)  # type: ignore[arg-type]
        with monkeypatch.context() as patched:
            patched.setattr(place, dies)
            with pytest.raises(KilledError), open_journal(own.log_directory, own.keys) as journal:
                log_decisions(own, journal)
        assert {entry.name: entry.state for entry in entries(own)}[name] == state
        with open_journal(own.log_directory, own.keys) as journal:
            log_decisions(own, journal)
            assert log_decisions(own, journal) == 0
        assert logged_history(own).runs[name].releases[-1].state == state
    changes = [each for each in map(str, logged_history(own).runs) if each]
    assert changes == ["flu", "flu-2"]


def test_only_new_leaves_are_fetched(deciding_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world, fetched, asked = deciding_world, list[bytes](), ConsortiumClient.leaves
    own, file = world.coordinator, site_file(world)
    run(commands.get, file, "flu")
    config = load_site(file)
    assert config.log is not None
    kept = config.log.state / COPY

    def leaves(self: ConsortiumClient, first: int) -> list[bytes]:
        found = asked(self, first)
        fetched.extend(found)
        return found

    def looked(follower: Follower) -> int:
        fetched.clear()
        follower.look()
        return len(fetched)

    monkeypatch.setattr(ConsortiumClient, "leaves", leaves)
    follower, size = Follower(file, config), LogFile(own.log_directory).size()
    assert looked(follower) == size  # no copy yet
    every = list(fetched)
    assert looked(follower) == 0
    assert not kept.exists()  # it only reads
    run(deciding.retire, "flu", "--reason", "not maintained", "--directory", own.directory)
    assert looked(follower) == LogFile(own.log_directory).size() - size > 0

    write = b"".join(len(leaf).to_bytes(4, "big") + leaf for leaf in every)
    kept.write_bytes(write)  # as the site's worker keeps it
    assert looked(Follower(file, config)) == LogFile(own.log_directory).size() - size
    assert kept.read_bytes() == write
    kept.write_bytes(write[:-1] + bytes([write[-1] ^ 1]))  # damaged: all are fetched, after the new ones
    assert looked(Follower(file, config)) >= LogFile(own.log_directory).size()
    received = read_received(folder_of(world) / "flu")
    assert received is not None
    assert received.state == "retired"


def test_a_follower_survives_whatever_the_coordinator_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run(commands.get, site_file(world), "flu")
    follower = Follower(site_file(world), load_site(site_file(world)))
    for error in (OSError("disk"), VerificationError("another log"), ValueError("bytes")):
        with monkeypatch.context() as patched:

            def fails(self: object, error: Exception = error) -> bytes:
                raise error

            patched.setattr(ConsortiumClient, "checkpoint", fails)
            follower.look()
    received = read_received(folder_of(world) / "flu")
    assert received is not None
    assert received.state == "released"
