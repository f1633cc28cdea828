"""Rounds that are logged: what stands in the log, what a site accepts, and what survives a coordinator that dies."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privet.client.rounds.logbook import read_openings
from privet.common.audit import bundle
from privet.common.audit.bundle import check_bundle, history_of
from privet.common.audit.release import EGRESS, FILES
from privet.common.audit.verify import verify_bundle
from privet.common.canonical import digest
from privet.common.errors import (
    PrivetError,
    ProtocolError,
    RefusedError,
    StateError,
    TooFewSitesError,
)
from privet.common.log.checkpoint import LeafProof
from privet.common.log.envelope import commit
from privet.common.log.statements import Export, Refusal, RoundAbort, RoundClose, SiteRound, Statement
from privet.common.study.messages import Evidence, Failure, Message, RoundOpen, Secured, Shown
from privet.common.study.study import Study
from privet.server.log.journal import Journal, Listening
from privet.server.rounds.archive import bundle_files
from privet.server.rounds.state import RunDirectory
from privet.server.studies import line_of
from tests.support.logged_world import QUICK, LoggedSite, LoggedWorld, world_of
from tests.support.masked_world import masked_study, stage_of
from tests.support.synthetic import study_of

PRIVATE = {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
MODES = {
    "masked": lambda **more: masked_study(**{"training": {"rounds": 3}, **more}),
    "plain": lambda **more: study_of(**{"training": {"rounds": 3}, **more}),
}


def told(world: LoggedWorld) -> list[Statement]:
    """Return what the published log says, verified."""
    verdict, found = history_of(bundle.read_archive(world.folder / "run" / "public"), world.policy)
    assert verdict.ok, verdict
    return [statement for _, statement in found]


def kinds(world: LoggedWorld) -> list[str]:
    return [statement.type for statement in told(world)]


def files_of(world: LoggedWorld, **more: Any) -> dict[str, bytes]:
    return bundle_files(world.run, world.folder / "run" / "public", **{"with_weights": True, **more})


# --- what stands in the log ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("privacy", [{"mode": "none"}, PRIVATE])
def test_a_study_leaves_a_log_that_verifies_and_a_release_that_follows_from_it(
    tmp_path: Path, mode: str, privacy: dict[str, Any]
) -> None:
    world = world_of(tmp_path, MODES[mode](privacy=privacy))
    state = world.play()
    round_of = ["round-open", *["site-round"] * 3, "round-close"]
    assert kinds(world) == ["genesis", "run-open", *round_of * 3, "export"]
    statements = told(world)
    closed = [each for each in statements if isinstance(each, RoundClose)]
    assert [each.adapter_published for each in closed][-1] == state.adapter.digest
    assert [each.ended for each in closed] == [False, False, True]
    assert [each.adapter_before for each in closed[1:]] == [each.adapter_after for each in closed[:-1]]
    report = check_bundle(files_of(world), world.policy)
    assert report.ok, report
    assert len(report.checked) == 5
    assert check_bundle(files_of(world, with_weights=False), world.policy).ok
    assert {file.name for file in (tmp_path / "run" / "release").iterdir()} == FILES - {EGRESS}
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    assert state.adapter.digest in card
    assert ("Differentially private for each record" in card) == (privacy["mode"] == "local")


def test_a_logged_study_ends_where_the_same_study_without_a_log_does(tmp_path: Path) -> None:
    from privet.server.rounds.rounds import run_study
    from privet.server.rounds.run_log import Unlogged
    from tests.support.masked_world import federation
    from tests.support.synthetic import PEFT_CONFIG, start_adapter

    study = masked_study(training={"rounds": 3})
    logged = world_of(tmp_path / "logged", study).play()
    bare = RunDirectory.create(tmp_path / "bare", study, start_adapter(), PEFT_CONFIG)
    assert run_study(Unlogged(bare), federation(study, 3), timing=QUICK).adapter.digest == logged.adapter.digest


def test_a_site_can_open_what_it_committed_to(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    world.play()
    stated = next(each for each in told(world) if isinstance(each, SiteRound))
    value, salt = read_openings(tmp_path / stated.site, stated.opened)["units"]
    assert commit("units", value, salt) == stated.commitments["units"] != commit("units", value + 1, salt)


def test_sites_that_do_not_witness_are_in_the_log_all_the_same(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}), 5, witnesses=2)
    world.play()
    assert kinds(world).count("site-round") == 5
    assert len(world.policy.witnesses) == 2


def test_a_second_run_of_another_study_goes_into_the_same_log(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    world.play("first")
    with pytest.raises(StateError, match="the round log has no run of this study with the name"):
        world.play("second")  # the run's state has rounds that this name has not
    from tests.support.synthetic import PEFT_CONFIG, start_adapter

    other = masked_study(training={"rounds": 1}, aggregation={"learning_rate": 0.5})
    (tmp_path / "run").rename(tmp_path / "old")
    RunDirectory.create(tmp_path / "run", other, start_adapter(), PEFT_CONFIG)
    with pytest.raises(StateError, match="the round log has no run of this study with the name"):
        world.play("first")
    world.play("second")
    assert kinds(world).count("run-open") == 2


def test_a_refusal_is_signed_logged_once_and_told(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 2}), 4)
    site = next(iter(world.sites.values()))
    site.refuses = True
    world.play()
    said = [each for each in told(world) if isinstance(each, Refusal)]
    assert [(each.site, each.rule) for each in said] == [(site.name, "not today")]


@pytest.mark.parametrize("mode", MODES)
def test_a_refused_round_is_logged_and_told_and_the_run_still_verifies(tmp_path: Path, mode: str) -> None:
    world = world_of(tmp_path, MODES[mode](), 4)
    site = next(iter(world.sites.values()))
    site.refuses_rounds = (2,)
    state = world.play()
    said = [(each.site, each.run, each.round, each.rule) for each in told(world) if isinstance(each, Refusal)]
    assert said == [(site.name, "run", 2, "not at night")]
    assert state.statements[1]["failures"] == {site.name: "RefusedError: not at night"}
    assert line_of(state.statements[1]).endswith(f", 1 missing\n  {site.name}: RefusedError: not at night")
    assert check_bundle(files_of(world), world.policy).ok


def test_a_site_refuses_in_its_own_name_alone(tmp_path: Path) -> None:
    study = study_of(training={"rounds": 1})
    world = world_of(tmp_path, study, 4)
    site, other = list(world.sites.values())[:2]
    assert site.logbook is not None
    stolen = site.logbook.refuse(study, "run", 1, RefusedError("no"), digest(b"policy"))
    other.answer = lambda asked, honest: (
        Failure("RefusedError", "no", "", stolen) if isinstance(asked, RoundOpen) else honest
    )
    state = world.play()
    assert "sent a refusal in the name of site" in state.statements[0]["failures"][other.name]
    assert "refusal" not in kinds(world)


def test_a_refusal_whose_text_is_private_has_no_figures(tmp_path: Path) -> None:
    """What was asked and allowed may be what a trainer apart has stated."""
    study = study_of(training={"rounds": 1})
    site = next(iter(world_of(tmp_path, study, 4).sites.values()))
    assert site.logbook is not None
    error = RefusedError("more than 3141 bytes")
    error.asked, error.allowed = "3141", "2718"
    for private in (False, True):
        error.private = private
        said = b64decode(json.loads(site.logbook.refuse(study, "run", 1, error, digest(b"policy")))["payload"])
        assert (b"3141" in said, b"2718" in said) == (not private, not private)


def test_what_sites_say_of_their_failures_cannot_write_to_the_terminal() -> None:
    hostile = {"failures": {"a": "\x1b[2J\nround 9: all well"}, "round": 1, "seconds": 1.0, "privacy": None}
    closed = line_of({**hostile, "type": "round-close", "survivors": ["b"]})
    aborted = line_of({**hostile, "type": "round-abort", "reason": "too few\n  a: \x1b[2J"})
    for text in (closed, aborted):
        assert "\x1b" not in text
        assert len(text.splitlines()) == 2


def test_an_aborted_round_says_that_its_number_is_spent() -> None:
    lost = {"failures": {}, "round": 1, "seconds": 1.0, "privacy": None, "type": "round-abort", "reason": "too few"}
    assert line_of(lost, 2).endswith("Number 1 is spent: no site runs it again. Of the study's 2 rounds, 1 is left.")
    assert line_of({**lost, "round": 2}, 2).endswith("Of the study's 2 rounds, none is left.")


def test_a_stranger_is_no_site(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}, cohort={"min_sites": 3}), 4)
    stranger = next(iter(world.sites.values()))
    stranger.number = 9  # consents with a key that the log does not know
    world.play()
    assert all(stranger.name not in each.cohort for each in told(world) if each.type == "round-open")


def test_too_few_witnesses_wait_and_the_run_goes_on_when_they_are_back(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}), 4)
    for site in list(world.sites.values())[:2]:
        site.answer = lambda asked, honest: None if isinstance(asked, Shown) else honest
    with pytest.raises(TooFewSitesError, match="cosignatures of 3 of its 4 witnesses"):
        world.play()
    assert all(not site.trained for site in world.sites.values())
    assert not (tmp_path / "run" / "public").exists()
    for site in world.sites.values():
        site.answer = lambda asked, honest: honest
    world.play()
    # It had reached nobody, so its number is not spent.
    assert kinds(world) == ["genesis", "run-open", "round-open", *["site-round"] * 4, "round-close", "export"]


def test_a_round_that_reached_nobody_is_given_up_if_its_sites_do_not_come_back(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 2}), 4)
    for site in list(world.sites.values())[:2]:
        site.answer = lambda asked, honest: None if isinstance(asked, Shown) else honest
    with pytest.raises(TooFewSitesError):
        world.play()
    gone, back = list(world.sites.values())[:2]
    gone.answer = lambda asked, honest: None
    back.answer = lambda asked, honest: honest
    world.play()
    assert [each.type for each in told(world)][2:4] == ["round-open", "round-abort"]
    assert [each.cohort for each in told(world) if each.type == "round-open"][1] == tuple(world.sites)[1:]


# --- what a coordinator might try ------------------------------------------------------------------------


def first_round(world: LoggedWorld, change: Callable[[RoundOpen], RoundOpen]) -> dict[str, Message]:
    """Open one round as the run log does, alter what one site is sent, and return what all of them answer."""
    answers: dict[str, Message] = {}
    victim = min(world.exchange.sites)
    world.exchange.alter = lambda node, asked: (
        change(asked) if isinstance(asked, RoundOpen) and node == victim else asked
    )
    with pytest.raises(PrivetError):
        world.play()
    for replies in world.exchange.replies:
        for node, reply in replies.items():
            if node == victim and isinstance(reply, Failure):
                answers[world.exchange.sites[node].name] = reply
    return answers


def other_adapter(opened: RoundOpen) -> RoundOpen:
    from privet.common.canonical import digest

    data = opened.adapter[:-4] + b"\0\0\x80?"
    return replace(opened, adapter=data, adapter_digest=digest(data))


def proof_of_run(evidence: Evidence) -> bytes:
    """Return the proof of the run with the cosignatures of the other one: it is sent without any."""
    checkpoint = LeafProof.parse(evidence.opened_proof).checkpoint
    return replace(LeafProof.parse(evidence.run_proof), checkpoint=checkpoint).encode()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_adapter, "the round log does not hold the adapter that this site expects"),
        (lambda o: replace(o, evidence=Evidence()), "expected proofs that the round log holds the round"),
        (lambda o: replace(o, nonce="f" * 32), "the round log does not hold the nonce that this site expects"),
        (lambda o: replace(o, round=2), "the round log does not hold the round that this site expects"),
        (lambda o: replace(o, cohort=o.cohort[:2]), "the round log does not hold the cohort that this site expects"),
        (
            lambda o: replace(o, study=Study.parse({**o.study, "seed": 5}).document()),
            "opens run run for another study",
        ),
        (
            lambda o: replace(
                o, evidence=replace(o.evidence, opened=o.evidence.run, opened_proof=proof_of_run(o.evidence))
            ),
            "run-open and round-open as proof of the round, found run-open and run-open",
        ),
        (lambda o: replace(o, evidence=replace(o.evidence, opened_proof=proof_of_run(o.evidence))), "inclusion"),
        (lambda o: replace(o, evidence=replace(o.evidence, opened_proof=o.evidence.run_proof)), "found 0"),
        (lambda o: replace(o, evidence=replace(o.evidence, opened=b"x")), "inclusion"),
    ],
)
def test_a_round_that_is_not_the_one_in_the_log_is_refused_before_anything_is_done(
    tmp_path: Path, change: Callable[[RoundOpen], RoundOpen], text: str
) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    answers = first_round(world, change)
    ((name, reply),) = answers.items()
    assert isinstance(reply, Failure)
    assert text in reply.message
    assert not world.sites[name].trained


def test_a_round_under_a_checkpoint_without_a_quorum_is_refused(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))

    def strip(opened: RoundOpen) -> RoundOpen:
        lines = opened.evidence.opened_proof.split(b"\n")
        proof = b"\n".join([line for line in lines if b"site-0001" not in line and b"site-0002" not in line])
        return replace(opened, evidence=replace(opened.evidence, opened_proof=proof))

    ((_, reply),) = first_round(world, strip).items()
    assert isinstance(reply, Failure)
    assert "expected cosignatures of 2" in reply.message


def test_a_checkpoint_that_a_site_has_not_cosigned_convinces_it_of_nothing(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}), 4)
    absent = next(iter(world.sites.values()))
    absent.deaf = True
    world.play()
    (closed,) = [each for each in told(world) if isinstance(each, RoundClose)]
    assert absent.name not in closed.survivors
    assert "has not cosigned" in closed.failures[absent.name]
    assert not absent.trained


def test_a_log_that_was_put_back_finds_no_witness_and_leaves_evidence(tmp_path: Path) -> None:
    import shutil

    world = world_of(tmp_path, masked_study(training={"rounds": 2}))
    shutil.copytree(tmp_path / "log", tmp_path / "backup")
    shutil.copytree(tmp_path / "run", tmp_path / "run-backup")
    world.play()
    for name, copy in (("log", "backup"), ("run", "run-backup")):
        shutil.rmtree(tmp_path / name)
        (tmp_path / copy).rename(tmp_path / name)
    with pytest.raises(TooFewSitesError, match="expected a checkpoint of at least 13 leaves, found one of 3"):
        world.play()
    assert all(len(site.trained) == 2 for site in world.sites.values())
    assert all(len(site.logbook.witness.evidence) == 1 for site in world.sites.values() if site.logbook is not None)


# --- what a site might try -------------------------------------------------------------------------------


def broken(change: Callable[[Secured], Secured]) -> Callable[[Message, Message], Message]:
    def answer(asked: Message, honest: Message) -> Message:
        return change(honest) if stage_of(asked) == "mask" and isinstance(honest, Secured) else honest

    return answer


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda reply: replace(reply, statement=b""), "an update without its signed statement"),
        (lambda reply: replace(reply, statement=reply.statement[:-1]), "canonical form"),
        (lambda reply: replace(reply, statement=b"\xff" * 9), "canonical form"),
        (
            lambda reply: replace(reply, body=reply.body[:-1] + bytes([reply.body[-1] ^ 1])),
            "not about this round, or not about the update",
        ),
    ],
)
def test_a_contribution_without_a_statement_that_fits_is_none(
    tmp_path: Path, change: Callable[[Secured], Secured], text: str
) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}), 4)
    liar = next(iter(world.sites.values()))
    liar.answer = broken(change)
    world.play()
    (closed,) = [each for each in told(world) if isinstance(each, RoundClose)]
    assert text in closed.failures[liar.name]
    assert liar.name not in closed.survivors


def test_a_site_cannot_speak_for_another(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}), 4)
    liar, victim = list(world.sites.values())[:2]
    assert liar.logbook is not None
    liar.logbook = replace(liar.logbook, site=victim.name)
    world.play()
    (closed,) = [each for each in told(world) if isinstance(each, RoundClose)]
    assert "is not the current identity key of site" in closed.failures[liar.name]
    assert victim.name in closed.survivors


# --- dying anywhere --------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the coordinator as a signal would: nothing catches it."""


def play_until(world: LoggedWorld, stop: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run the coordinator until the given step of anything that it makes durable; tell whether it ended by itself."""
    from privet.common import files
    from privet.server.log import roundlog
    from privet.server.rounds import run_log, state

    count = 0

    def step(*_: object) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise Killed

    def write(path: Path, data: bytes, mode: int = 0o666) -> None:
        step()
        files.write_durably(path, data, mode)
        step()

    original = roundlog.RoundLog.__init__

    def opened(log: Any, directory: Path, database: Any, signer: Any, _: object) -> None:
        original(log, directory, database, signer, step)

    with monkeypatch.context() as patched:
        patched.setattr(roundlog.RoundLog, "__init__", opened)
        for module in (run_log, state, roundlog):
            patched.setattr(module, "write_durably", write)
        try:
            world.play()
        except Killed:
            return False
    return True


@pytest.mark.parametrize("mode", MODES)
def test_a_coordinator_killed_at_any_step_goes_on_with_a_log_that_verifies(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = MODES[mode](training={"rounds": 2})
    stop, ended = 1, False
    while not ended:
        world = world_of(tmp_path / str(stop), study)
        ended = play_until(world, stop, monkeypatch)
        try:
            state = world.play()
        except TooFewSitesError:
            assert mode == "masked"  # both rounds were given up
            state = world.run.load()
        statements = told(world)
        opened = [each for each in statements if each.type == "round-open"]
        closed = [each for each in statements if isinstance(each, RoundClose)]
        aborted = [each for each in statements if isinstance(each, RoundAbort)]
        assert len(opened) == len(closed) + len(aborted)
        assert state.stopped
        assert [s["round"] for s in state.statements if s["type"] == "round-close"] == [each.round for each in closed]
        if closed:
            assert closed[-1].adapter_published == state.adapter.digest
            assert sum(isinstance(each, Export) for each in statements) == 1
            assert check_bundle(files_of(world), world.policy).ok
        # No site was asked to mask a round twice.
        assert all(len(set(site.trained)) == len(site.trained) or mode == "plain" for site in world.sites.values())
        stop += 7 if stop > 3 else 1
    assert stop > 60


def test_a_plain_round_that_a_site_has_lost_is_given_up_and_the_study_goes_on(tmp_path: Path) -> None:
    world = world_of(tmp_path, MODES["plain"](privacy=PRIVATE, training={"rounds": 4}, cohort={"min_sites": 3}))
    north, lost = next(iter(world.sites.values())), []

    def answer(asked: Message, honest: Message) -> Message | None:
        if isinstance(asked, RoundOpen) and asked.round == 2:
            lost.append(asked.nonce)
            # Killed in training; restarted, it refuses to draw again.
            return Failure("SpentRoundError", "it sits the round out", "") if lost[1:] else None
        return honest

    north.answer = answer
    with pytest.raises(TooFewSitesError):
        world.play()
    assert world.run.load().round == 1
    state = world.play()
    assert [(each["type"], each["round"]) for each in state.statements] == [
        ("round-close", 1),
        ("round-abort", 2),
        ("round-close", 3),
        ("round-close", 4),
    ]
    assert [each.round for each in told(world) if isinstance(each, RoundAbort)] == [2, 2]
    assert check_bundle(files_of(world), world.policy).ok
    # A round of the same number cannot follow any more, and no two numbers can be passed over.
    numbers = [each.round for each in told(world) if each.type == "round-open"]
    assert numbers == [1, 2, 2, 3, 4]


# --- what an auditor is shown ----------------------------------------------------------------------------


def changed(files: dict[str, bytes], name: str, change: Callable[[Any], None]) -> dict[str, bytes]:
    from privet.common.canonical import canonical_json

    document = json.loads(files[name])
    change(document)
    return {**files, name: canonical_json(document) + (b"" if name in ("study.json", "software.json") else b"\n")}


TAMPERED: dict[str, tuple[str, Callable[[dict[str, bytes]], dict[str, bytes]]]] = {
    "another study": ("study.json", lambda f: changed(f, "study.json", lambda d: d.update(seed=99))),
    "other software": (
        "software.json",
        lambda f: changed(f, "software.json", lambda d: d["versions"].update(privet="9")),
    ),
    "a round's survivors": ("rounds/", lambda f: changed(f, "rounds/0002.json", lambda d: d["survivors"].pop())),
    "a round's epsilon": (
        "rounds/",
        lambda f: changed(f, "rounds/0002.json", lambda d: d["privacy"]["epsilon"].update({"site-0000": 0.1})),
    ),
    "a round's masking": (
        "rounds/",
        lambda f: changed(f, "rounds/0001.json", lambda d: d["masking"][0].update(threshold=1)),
    ),
    "a round left out": ("rounds/", lambda f: {n: v for n, v in f.items() if n != "rounds/0003.json"}),
    "a round played twice": ("rounds/", lambda f: {**f, "rounds/0004.json": f["rounds/0003.json"]}),
    "another adapter": ("release/", lambda f: {**f, "release/adapter_model.safetensors": b"x"}),
    "another card": ("release/", lambda f: {**f, "release/README.md": f["release/README.md"] + b"better\n"}),
    "a file more": ("release/", lambda f: {**f, "release/extra.bin": b"x"}),
    "a file less": ("release/", lambda f: {n: v for n, v in f.items() if n != "release/lineage.json"}),
    "no run": ("bundle.json", lambda f: {**f, "bundle.json": b'{"format":1,"run":"other"}\n'}),
    "no study": ("study.json", lambda f: {n: v for n, v in f.items() if n != "study.json"}),
    "nonsense": ("rounds/", lambda f: {**f, "rounds/0001.json": b"\xff"}),
}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], LoggedWorld]:
    world = world_of(tmp_path_factory.mktemp("world"), masked_study(training={"rounds": 3}, privacy=PRIVATE))
    world.play()
    return files_of(world), world


@pytest.mark.parametrize("name", TAMPERED)
def test_whatever_beside_the_log_was_changed_is_found_and_named(
    bundled: tuple[dict[str, bytes], LoggedWorld], name: str
) -> None:
    files, world = bundled
    where, change = TAMPERED[name]
    report = check_bundle(change(files), world.policy)
    assert report.verdict.ok
    assert not report.ok
    assert report.where == where


def test_every_file_of_the_log_counts(bundled: tuple[dict[str, bytes], LoggedWorld]) -> None:
    files, world = bundled
    for name in files:
        if name == "checkpoint" or name.startswith("tile/entries"):
            data = bytearray(files[name])
            data[len(data) // 2] ^= 1
            report = check_bundle({**files, name: bytes(data)}, world.policy)
            assert not report.verdict.ok, name
            missing = {other: value for other, value in files.items() if other != name}
            assert not check_bundle(missing, world.policy).verdict.ok


def test_an_archive_gives_back_its_files_and_the_same_files_the_same_archive(
    bundled: tuple[dict[str, bytes], LoggedWorld], tmp_path: Path
) -> None:
    files, _ = bundled
    for name in ("one.tar", "two.tar"):
        bundle.write_archive(tmp_path / name, files)
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    assert bundle.read_archive(tmp_path / "one.tar") == files
    with pytest.raises(StateError, match="cannot be written"):
        bundle.write_archive(tmp_path / "one.tar", files)


@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "a\nb"])
def test_an_archive_with_names_that_lead_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    bundle.write_archive(tmp_path / "bad.tar", {name: b"x"})
    with pytest.raises(ProtocolError, match="its name is no plain relative path or appears twice"):
        bundle.read_archive(tmp_path / "bad.tar")


def test_an_archive_with_links_or_without_end_is_refused(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "link.tar", "w") as archive:
        entry = tarfile.TarInfo("study.json")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry)
    with pytest.raises(ProtocolError, match="is not a plain file"):
        bundle.read_archive(tmp_path / "link.tar")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "link.tar").read_bytes()[:700])
    (tmp_path / "none.tar").write_bytes(b"nothing")
    for name in ("none.tar", "missing.tar"):
        with pytest.raises(StateError, match="is not a bundle"):
            bundle.read_archive(tmp_path / name)


def test_the_log_by_itself_verifies_with_the_audit_module_alone(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    world.play()
    files = bundle.read_archive(tmp_path / "run" / "public")
    size = bundle.head_of(files, world.policy.log).size
    assert verify_bundle(lambda: bundle.leaves_of(files, size), files["checkpoint"], world.policy).ok


def test_a_listener_leaves_other_messages_alone(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study())
    with world.journal() as journal:
        assert isinstance(journal, Journal)
        listening = Listening(world.exchange, journal)
        assert listening.nodes() == world.exchange.nodes()
        assert isinstance(next(iter(world.sites.values())), LoggedSite)
