"""A run whose study has a gate: it ends with a candidate, and is released when an egress decision has accepted that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privet.client.release.opened import open_release
from privet.common.audit.bundle import RELEASE, Report, check_bundle, history_of
from privet.common.audit.release import EGRESS
from privet.common.audit.story import story
from privet.common.errors import RefusedError, VerificationError
from privet.common.log.envelope import sign_envelope
from privet.common.log.gate import DAY
from privet.common.log.statements import EgressDecision, EgressReview
from privet.server.overview import _lines_of, run_status
from privet.server.rounds.archive import bundle_files
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import RunLog
from privet.server.tracking.figures import tracked
from privet.simulations.runs.simulate import released
from tests.conftest import Run
from tests.simulations.test_simulate import study_file
from tests.support.logged_world import QUICK, LoggedWorld, pass_gate, review_of, world_of
from tests.support.masked_world import masked_study
from tests.support.secagg_world import identity
from tests.support.synthetic import start_adapter

PRIVATE = {"mode": "local", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0}
GATE = {"signatures": 2, "canaries": 20}


@pytest.fixture
def ended(tmp_path: Path) -> LoggedWorld:
    """A run of one round that has ended with a candidate."""
    world = world_of(tmp_path, masked_study(training={"rounds": 1}, privacy=PRIVATE, gate=GATE))
    assert world.play().stopped
    return world


def report_of(world: LoggedWorld) -> tuple[Report, dict[str, bytes]]:
    released = (world.run.path / "release").is_dir()
    files = bundle_files(world.run, world.folder / "run" / "public", with_weights=released)
    return check_bundle(files, world.policy), files


def test_a_gated_run_ends_with_a_candidate_and_resuming_it_changes_nothing(ended: LoggedWorld) -> None:
    for _ in range(2):
        assert not (ended.run.path / "release").exists()
        report, files = report_of(ended)
        assert report.ok, report
        assert "the log does not export: it is a candidate, and no egress decision has accepted it" in str(report)
        assert not any(name.startswith(RELEASE) for name in files)
        with ended.journal() as journal:
            log = ended.log(journal)
            assert log.released  # as far as its gate lets it go
            assert "no egress decision has accepted it" in log.withheld
        with pytest.raises(RefusedError, match="for tests alone"):
            bundle_files(ended.run, ended.folder / "run" / "public", with_weights=True)
        nothing: Any = None
        for where in (ended.run.path, ended.run.path / "adapter"):
            with pytest.raises(RefusedError, match="for tests alone"):
                released(where, nothing)
        with pytest.raises(RefusedError, match="for tests alone"):
            tracked(ended.run.path)
        ended.play()
    lines = "\n".join(story(history_of(files, ended.policy)[1]))
    assert "its adapter has to pass a gate, which 2 sites sign" in lines


def test_the_status_of_a_coordinator_says_that_a_run_waits_at_its_gate(ended: LoggedWorld) -> None:
    lines = "\n".join(_lines_of(run_status(ended.run.path)))
    assert "ended with a candidate" in lines
    assert "(`privet gate status`)" in lines
    assert "released" not in lines


def test_an_accepted_candidate_is_released_when_the_run_is_resumed(ended: LoggedWorld) -> None:
    pass_gate(ended, (0, 2))
    assert not (ended.run.path / "release").exists()
    ended.play()
    report, files = report_of(ended)
    assert report.ok, report
    assert f"{RELEASE}{EGRESS}" in files
    lines = "\n".join(story(history_of(files, ended.policy)[1]))
    assert "site-0000 signs the candidate" in lines
    assert "is accepted" in lines
    assert "signed by site-0000, site-0002; epsilon spent" in lines
    # A release without the decision, or with another one, is none.
    for change in (lambda kept: None, lambda kept: kept.replace(b"a", b"b", 1)):
        wrong: Callable[[bytes], bytes | None] = change
        found = wrong(files[f"{RELEASE}{EGRESS}"])
        rest = {name: data for name, data in files.items() if name != f"{RELEASE}{EGRESS}"}
        assert not check_bundle(rest if found is None else {**rest, f"{RELEASE}{EGRESS}": found}, ended.policy).ok


def test_a_coordinator_that_is_killed_after_the_decision_releases_once(
    ended: LoggedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_gate(ended, (0, 1))

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "publish", dies)
        with pytest.raises(KeyboardInterrupt):
            ended.play()
    ended.play()
    report, _ = report_of(ended)
    assert report.ok, report
    with ended.journal() as journal:
        assert len(journal.history.runs["run"].releases) == 1


def test_a_decision_that_has_expired_releases_nothing(ended: LoggedWorld) -> None:
    pass_gate(ended, (0, 1))
    with ended.journal() as journal:
        real = journal.clock
        journal.clock = lambda: real() + 2 * DAY
        run_study(ended.log(journal), ended.exchange, timing=QUICK)
        assert "has expired" in ended.log(journal).withheld
    assert not (ended.run.path / "release").exists()


def test_a_refusal_is_in_the_bundle_and_nothing_is_released_after_it(ended: LoggedWorld) -> None:
    with ended.journal() as journal:
        refused = review_of(journal, 1, verdict="refused", reason="members are told apart", failed=("canary",))
        journal.hear(sign_envelope(refused, identity(1).key), "site-0001")
        for number in (0, 2):
            said = review_of(journal, number)
            journal.hear(sign_envelope(said, identity(number).key), said.site)
        journal.flush()
    with pytest.raises(VerificationError, match="condition canary: failed in the test of site-0001"):
        pass_gate(ended, ())
    with ended.journal() as journal:
        gate = journal.history.runs["run"].gate
        assert gate is not None
        facts = gate.facts(journal.clock())
        journal.say(
            EgressDecision(
                time=journal.clock(),
                run="run",
                study=gate.run.study,
                adapter=str(gate.candidate),
                verdict="refused",
                epsilon=facts.epsilon,
                bound=facts.bound,
                quality=None,
                signed=facts.signed,
                refused=facts.refused,
                reason="a site refused",
                expires=None,
            )
        )
        journal.flush()
        assert "was refused at its gate: a site refused" in ended.log(journal).withheld
    ended.play()
    report, files = report_of(ended)
    assert report.ok, report
    assert "it was refused at its gate: a site refused" in str(report)
    lines = "\n".join(story(history_of(files, ended.policy)[1]))
    assert "site-0001 REFUSES the candidate" in lines
    assert "failed: canary" in lines
    assert "signed by site-0000, site-0002, refused by site-0001" in lines


def test_a_journal_takes_no_review_in_anothers_name(ended: LoggedWorld) -> None:
    with ended.journal() as journal:
        said: EgressReview = review_of(journal, 0)
        for key, author in ((identity(1).key, "site-0000"), (identity(0).key, "site-0001")):
            with pytest.raises(VerificationError, match="not its identity key"):
                journal.hear(sign_envelope(said, key), author)
        with pytest.raises(VerificationError, match="not the current identity key of site site-0000"):
            journal.hear(sign_envelope(said, identity(1).key), "site-0001")


def test_the_run_directory_of_a_candidate_is_opened_for_tests_alone(ended: LoggedWorld) -> None:
    with pytest.raises(RefusedError, match="is a candidate, for tests alone"):
        open_release(ended.run.path)
    assert open_release(ended.run.path, testing=True).adapter.digest != start_adapter().digest
    pass_gate(ended, (0, 1))
    ended.play()
    for path in (ended.run.path, ended.run.path / "release"):
        assert open_release(path).study.gate is not None
    kept = ended.run.path / "release" / EGRESS
    assert json.loads(kept.read_bytes())["payloadType"] == "application/vnd.in-toto+json"


def test_a_simulated_run_ends_with_a_candidate_that_is_tested_and_not_exported(
    bert: Path, tmp_path: Path, privet: Run
) -> None:
    """Its sites sign nothing. The researcher measures it, attacks it and continues from it."""
    gate = {"signatures": 2, "membership": 0.9}
    file = study_file(tmp_path, bert, {"training.rounds": 1, "gate": gate})
    run = tmp_path / "run"
    code, out, err = privet("simulate", file, "--out", run)
    assert code == 0, err
    assert not (run / "release").exists()
    for command in (("predict", run, "--text", "a note"), ("export", run, tmp_path / "out")):
        code, out, err = privet(*command)
        assert code != 0
        assert "for tests alone" in out + err
    assert not (tmp_path / "out").exists()
    code, out, err = privet("evaluate", run, "--data", tmp_path / "alpha-test.jsonl", "--json")
    assert code == 0, err
    code, out, err = privet("audit", "bundle", run, "--out", tmp_path / "run.tar")
    assert code == 0, err
    code, out, err = privet("audit", "verify", tmp_path / "run.tar", "--policy", run / "log" / "policy")
    assert code == 0, out + err
    assert "it is a candidate, and no egress decision has accepted it" in out
