"""A coordinator's way to its release in few commands: invitations, founding, the first adapter, and giving up a run."""

from __future__ import annotations

import shlex
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest

from privet.common.audit.bundle import check_bundle, read_archive
from privet.common.errors import (
    RefusedError,
    StateError,
    StudyError,
    TooFewSitesError,
    VerificationError,
)
from privet.common.log.statements import RoundAbort
from privet.common.pki.token import Token
from privet.common.progress import in_directory
from privet.common.study.study import load_study
from privet.server import studies
from privet.server.commands import enrolment, service
from privet.server.commands.screen import Screen
from privet.server.consortium.coordinator import Coordinator, open_coordinator
from privet.server.log.journal import open_journal
from privet.server.log.keys import Keys
from privet.server.rounds.rounds import run_study
from privet.server.rounds.state import RunDirectory, RunState, unfinished
from privet.server.rounds.timing import Timing
from privet.server.rounds.wait import CONSENT, Wait
from privet.server.rounds.watch import COSIGN, TRAIN, Watch
from privet.simulations.runs.compare import _deployed_row
from tests.conftest import Run
from tests.simulations.test_simulate import _toml
from tests.support.consortium_world import World, run, running
from tests.support.log_world import digest, private
from tests.support.logged_world import QUICK, LoggedWorld, world_of
from tests.support.masked_world import masked_study
from tests.support.synthetic import PEFT_CONFIG, start_adapter, study_of


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium with two members, not founded: its directory is copied by each test that changes it."""
    with running(tmp_path_factory.mktemp("world")) as world:
        for name in ("berlin", "lyon"):
            world.enrol(name)
        yield world


@pytest.fixture
def home(consortium: World, tmp_path: Path) -> Path:
    shutil.copytree(consortium.folder / "coordinator", tmp_path / "coordinator")
    return tmp_path / "coordinator"


def study_in(folder: Path, sites: int = 2) -> Path:
    document = study_of(cohort={"min_sites": sites}).document()
    document["model"]["sha256"] |= {"config.json": "0" * 64, "tokenizer.json": "1" * 64}
    lines: list[str] = []
    _toml(document, "", lines)
    (folder / "study.toml").write_text("\n".join(lines) + "\n")
    return folder / "study.toml"


def adapter_in(folder: Path) -> Path:
    (folder / "start").mkdir()
    (folder / "start/adapter_model.safetensors").write_bytes(start_adapter().data)
    (folder / "start/adapter_config.json").write_text(PEFT_CONFIG)
    return folder / "start"


def test_several_sites_are_invited_at_once_all_or_none(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "tokens"
    result = run(enrolment.invite, "oslo", "bern", "--out", out, "-C", home)
    for name in ("oslo", "bern"):
        file = out / f"{name}.token"
        assert file.stat().st_mode & 0o777 == 0o600
        assert Token.parse(file.read_text()).site == name
        assert str(file) in result.stdout
    assert "privet1." not in result.output  # a secret that is in a file is not on the screen as well
    assert "not valid any more" not in result.stderr
    again = run(enrolment.invite, "oslo", "bern", "-C", home)
    assert "Of oslo, bern, the earlier token, or a request made with it, is not valid any more." in again.stderr
    lines = again.stdout.splitlines()
    assert [Token.parse(line.split()[1]).site for line in lines] == ["oslo", "bern"]
    for names, error in ((("paris", "paris"), StudyError), (("paris", "berlin"), RefusedError)):
        with pytest.raises(error):
            run(enrolment.invite, *names, "-C", home)
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be written"):
        run(enrolment.invite, "paris", "--out", tmp_path / "file", "-C", home)
    # Nothing was stored of what was refused.
    with open_coordinator(home).members._transaction() as database:
        stored = {row["site"] for row in database.execute("SELECT site FROM invitations").fetchall()}
    assert stored == {"berlin", "lyon", "oslo", "bern"}


def test_what_to_do_next_names_the_directory(
    privet: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beyond = tmp_path / "my consortium"
    home.rename(beyond)
    code, _, said = privet("coordinator", "stop", "flu", "--directory", beyond)
    assert (code, f"`privet coordinator run STUDY -C '{beyond}'`" in said) == (6, True)
    assert f"`privet registry list -C '{beyond}'`" in privet("registry", "show", "flu", "-C", beyond)[2]
    said = privet("coordinator", "invite", "oslo", "-C", beyond)[2]
    assert f"`privet coordinator approve oslo -C '{beyond}'`" in said
    assert open_coordinator(beyond).charter.words in said
    monkeypatch.chdir(beyond)
    assert "`privet coordinator run STUDY`" in privet("coordinator", "stop", "flu")[2]
    said = "`privet coordinator serve -C there`, or `privet coordinator init DIRECTORY`"
    assert in_directory(said, beyond) == said
    said = "next: privet coordinator approve oslo --words WORDS{}, then run it again"
    assert in_directory(said.format(""), Path("there")) == said.format(" -C there")


def test_a_run_founds_the_consortium_when_somebody_has_agreed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, made = adapter_in(tmp_path), open_coordinator(home)
    begun = (service.run, study_in(tmp_path), "--adapter", start, "-C", home, "--gather", 0.1)
    with pytest.raises(StateError, match="needs 3 sites, but the members are berlin, lyon"):
        run(service.run, study_in(tmp_path, 3), "--adapter", start, "-C", home, "--yes")
    study_in(tmp_path)
    with pytest.raises(StateError, match="no terminal to ask") as caught:
        run(*begun)
    assert "--yes" in caught.value.hint
    assert not made.members.founded()
    said: list[str] = []
    monkeypatch.setattr("typer.echo", lambda text, **more: said.append(str(text)))
    monkeypatch.setattr(Screen, "note", lambda screen, text: said.append(text))
    with pytest.raises(TooFewSitesError) as failed:
        run(*begun, "--yes")
    text = "\n".join(said)
    assert "once for ever, with 2 members: berlin, lyon" in text
    assert "2 of them must cosign" in text
    assert made.members.founded()
    assert (home / "public/log.policy").is_file()
    assert "Nothing listens at 127.0.0.1:9445" in text
    # Who is missing is named, and both ways on are whole commands.
    assert "\n  berlin: not connected\n  lyon: not connected" in failed.value.message
    assert "privet coordinator resume synthetic" in failed.value.hint
    assert "privet coordinator withdraw synthetic --reason" in failed.value.hint


def test_a_service_that_stops_is_named_once_and_one_that_listens_never(home: Path) -> None:
    out, made = StringIO(), open_coordinator(home)

    def looking(host: str, port: int) -> service._Service:
        settings = made.settings.model_copy(update={"fleet": f"{host}:{port}"})
        return service._Service(replace(made, settings=settings), Screen(out, terminal=False))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        looking("192.0.2.1", port).look()  # no address of this machine
        watched = looking("127.0.0.1", port)
        watched.look()
        assert out.getvalue() == ""
    watched.look()
    watched.look()
    assert out.getvalue().count("Nothing listens") == 1
    with socket.create_server(("127.0.0.1", port)):
        watched.look()
        watched.look()
    assert out.getvalue().count(f"The service listens at 127.0.0.1:{port}.") == 1


def test_without_an_adapter_one_is_made_or_it_is_said_how(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, study = open_coordinator(home), study_in(tmp_path)
    calls: list[list[str]] = []

    @dataclass
    class Done:
        returncode: int = 0
        stderr: str = ""

    def makes(command: list[str], **more: Any) -> Done:
        calls.append(command)
        Path(command[-1]).mkdir()
        return Done()

    monkeypatch.setattr("subprocess.run", makes)
    with service.starting_adapter(made, study, None) as start:
        assert start.is_dir()
        assert calls[0][1:] == ["-P", "-m", "privet", "adapter", str(study), str(start)]
    assert not start.exists()
    with service.starting_adapter(made, study, tmp_path) as given:
        assert given == tmp_path
    failed = Done(2, "Traceback of nobody\nerror: model.base: no such base\n hint: get it\n")
    monkeypatch.setattr("subprocess.run", lambda command, **more: failed)
    with pytest.raises(StateError, match="no such base") as caught, service.starting_adapter(made, study, None):
        pass
    assert f"privet adapter {study} start --base DIRECTORY" in caught.value.hint


def test_making_an_adapter_runs_nothing_from_the_present_directory(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a study arrives in a folder that has a module called like one of the program's."""
    (tmp_path / "privet").mkdir()
    for name in ("privet/__init__.py", "privet/__main__.py", "torch.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    study = study_in(tmp_path)
    with (
        pytest.raises(StateError, match="cannot be made"),
        service.starting_adapter(open_coordinator(home), study, None),
    ):
        pass
    assert not (tmp_path / "ran").exists()


def test_a_run_that_is_withdrawn_frees_its_name(home: Path, tmp_path: Path) -> None:
    made = open_coordinator(home)
    with pytest.raises(StateError, match="no run flu; its runs are: none yet"):
        studies.reopen_study(made, "flu")
    run(enrolment.found, "-C", home)
    study, start = study_of(), adapter_in(tmp_path)
    assert studies.free_name(made, "flu") == "flu"
    begun = studies.begin(made, study, start, "flu")
    with pytest.raises(StateError, match="run flu exists already") as caught:
        studies.free_name(made, "flu")
    assert "privet coordinator withdraw flu" in caught.value.hint
    with pytest.raises(StateError, match="runs/flu exists already") as late:  # of two commands at once, the second
        studies.begin(made, study, start, "flu")
    assert late.value.hint == caught.value.hint
    assert f"next: privet coordinator resume flu -C {home}\n" in run(service.stop, "flu", "-C", home).output
    assert f"`privet coordinator resume flu -C {home}`" in unfinished(begun.directory)
    result = run(service.withdraw, "flu", "--reason", "the wrong\nbase", "-C", home)
    assert f"next: privet coordinator run STUDY -C {home}\n" in result.output
    assert "run flu is withdrawn\n" in result.output
    assert studies.free_name(made, "flu") == "flu-2"
    resumed = run(service.resume, "flu", "-C", home)
    assert (resumed.exit_code, resumed.stdout.partition(";")[0]) == (0, "run flu was withdrawn: the wrong?base")
    with pytest.raises(StateError, match="was withdrawn"):
        run(service.stop, "flu", "-C", home)
    studies.begin(made, study, start, "flu-2")
    with pytest.raises(StateError, match="run flu-2 exists already"):
        studies.free_name(made, "flu")


def test_the_name_of_a_run_that_has_ended_is_taken_and_there_is_nothing_to_stop(home: Path, tmp_path: Path) -> None:
    made, start = open_coordinator(home), adapter_in(tmp_path)
    run(enrolment.found, "-C", home)
    begun = studies.begin(made, study_of(), start, "flu")
    begun.directory.commit(
        RunState(1, start_adapter(), statements=({"round": 1, "type": "round-abort", "metrics": None},), stopped=True)
    )
    with pytest.raises(StateError, match="exists already, and has ended") as caught:
        studies.free_name(made, "flu")
    assert "--name flu-2" in caught.value.hint
    assert "resume" not in caught.value.hint
    with pytest.raises(StateError, match="run flu has ended"):
        run(service.stop, "flu", "-C", home)


def test_no_site_is_called_connected_while_the_service_is_down(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Wait] = []
    begun = studies.begin(open_coordinator(home), study_of(), adapter_in(tmp_path), "flu")
    tell, wait = (
        replace(begun, tell=told.append)._noting(),
        Wait(CONSENT, 0, 2, (), {"berlin": "", "lyon": "not today"}),
    )
    tell(wait)
    assert told[-1].missing["berlin"].startswith("not reachable")
    assert told[-1].missing["lyon"] == "not today"
    assert begun.directory.waiting == told[-1]
    monkeypatch.setattr("privet.server.studies.listens", lambda settings: True)
    tell(wait)
    assert told[-1] == wait


@pytest.mark.parametrize(("last", "says"), [(False, "continue it"), (True, "make the release")])
def test_a_run_that_stops_says_what_is_left_of_it(home: Path, tmp_path: Path, last: bool, says: str) -> None:
    made = open_coordinator(home)
    begun = studies.begin(made, study_of(), adapter_in(tmp_path), "flu")
    statement: Any = {"round": 1, "type": "round-abort", "metrics": None, "seconds": 1, "reason": "", "failures": {},
                      "privacy": None}  # fmt: skip
    begun.directory.commit(RunState(1, start_adapter(), statements=(statement,), stopped=last))
    (begun.directory.path / "stop").touch()
    with pytest.raises(studies.StoppedError) as stopped:
        begun._observer(studies.RunMetrics(), lambda line: None)(statement, start_adapter())
    assert stopped.value.hint == f"{says} with `privet coordinator resume flu`"
    assert ("before its release" in stopped.value.message) == last


def test_a_run_that_has_its_release_is_not_resumed(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = studies.begin(open_coordinator(home), study_of(), adapter_in(tmp_path), "flu")
    played: list[str] = []
    monkeypatch.setattr(service, "_play", lambda found, *given: played.append(found.name))
    statement: Any = {"round": 1, "type": "round-close", "metrics": None}
    begun.directory.commit(RunState(1, start_adapter(), statements=(statement,), stopped=True))
    run(service.resume, "flu", "-C", home)
    assert played == ["flu"]  # killed before its release
    (begun.directory.path / "release").mkdir()
    said = run(service.resume, "flu", "-C", home).output
    assert played == ["flu"]
    assert "run flu ended after round 1; nothing was changed, and no site was asked" in said
    assert f"next: privet report {begun.directory.path} --out flu.html" in said


@pytest.mark.parametrize(("closed", "aborted", "stopped", "says"), [
    (3, 0, True, "completed"),
    (2, 1, True, "ended; 1 of 3 rounds aborted"),
    (2, 0, True, "stopped early"),
    (1, 1, False, "not ended"),
])  # fmt: skip
def test_a_run_that_lost_rounds_has_not_stopped_early(
    home: Path, tmp_path: Path, closed: int, aborted: int, stopped: bool, says: str
) -> None:
    study = study_of(training={"rounds": 3})
    begun = studies.begin(open_coordinator(home), study, adapter_in(tmp_path), "flu")
    kinds = ["round-close"] * closed + ["round-abort"] * aborted
    statements: Any = tuple(
        {"round": at, "type": kind, "metrics": None, "cohort": ["berlin", "lyon"], "privacy": None}
        for at, kind in enumerate(kinds, 1)
    )
    begun.directory.commit(RunState(len(kinds), start_adapter(), statements=statements, stopped=stopped))
    assert _deployed_row(begun.directory)["outcome"] == says


def test_rounds_of_one_study_are_not_run_twice(home: Path, tmp_path: Path) -> None:
    made, study, start = open_coordinator(home), study_of(), adapter_in(tmp_path)
    run(enrolment.found, "-C", home)
    begun = studies.begin(made, study, start, "flu")
    statement = {"round": 1, "type": "round-abort", "metrics": None}
    begun.directory.commit(RunState(1, start_adapter(), statements=(statement,)))
    assert "To start over, change the study's seed" in run(service.withdraw, "flu", "--reason", "x", "-C", home).output
    with pytest.raises(StateError, match="this very study was run before, as flu, which was withdrawn"):
        studies.check_new(made, study)
    studies.check_new(made, study_of(cohort={"min_sites": 1}))


def test_a_study_that_was_run_is_refused_with_a_command_that_makes_one_to_run(
    privet: Run, home: Path, tmp_path: Path
) -> None:
    made, start, file = open_coordinator(home), adapter_in(tmp_path), study_in(tmp_path)
    study = load_study(file)
    run(enrolment.found, "-C", home)
    begun = studies.begin(made, study, start, "other")
    with pytest.raises(StateError, match="run other is of this very study, and has not ended") as going:
        studies.check_new(made, study, file)
    assert "`privet coordinator resume other`" in going.value.hint
    statement = {"round": 1, "type": "round-close", "metrics": None}
    begun.directory.commit(RunState(1, start_adapter(), statements=(statement,), stopped=True))
    with pytest.raises(StateError, match="this very study was run before, as other;") as refused:
        run(service.run, file, "--name", "anew", "-C", home, "--adapter", start)
    assert not (home / "runs/anew").exists()
    command = shlex.split(refused.value.hint.split("`")[1])
    assert privet(*command[1:])[0] == 0
    again = load_study(tmp_path / "synthetic-2.toml")
    assert (again.name, again.seed) == ("synthetic-2", study.seed + 1)
    studies.check_new(made, again)
    assert studies.free_name(made, again.name) == again.name
    for given, said in (
        (("--seed", 9), "expected --seed with --from"),
        (("--from", file, "--seed", study.seed), "expected another seed"),
        (("--from", file, "--seed", 9, "--out", home / "x.toml"), "expected a file beside"),
    ):
        out = () if "--out" in given else ("--out", tmp_path / "x.toml")
        code, _, err = privet("new", *given, *out)
        assert (code, said in err) == (2, True)


def test_a_run_that_waits_for_consent_stops_within_seconds_and_can_be_withdrawn(home: Path, tmp_path: Path) -> None:
    made, start = open_coordinator(home), adapter_in(tmp_path)
    run(enrolment.found, "-C", home)
    begun = studies.begin(made, load_study(study_in(tmp_path)), start, "flu")
    said: list[str] = []

    def stops(wait: Wait) -> None:
        if not said:
            said.append(run(service.stop, "flu", "-C", home).output)
            said.append(run(service.status, "-C", home).output)
            with pytest.raises(StateError, match="another process is using the run directory") as busy:
                run(service.withdraw, "flu", "--reason", "x", "-C", home)
            said.append(busy.value.hint)

    with pytest.raises(studies.StoppedError, match="flu stopped before its first round"):
        replace(begun, tell=stops).play(Timing(600, 600, 600), print)
    assert "run flu waits for consent, and stops within seconds" in said[0]
    assert "running, asked to stop" in said[1]
    assert "`privet coordinator stop flu" in said[2]
    assert "asked to stop" not in run(service.status, "-C", home).output
    assert "no process of this machine runs flu" in run(service.stop, "flu", "-C", home).output
    assert "is withdrawn" in run(service.withdraw, "flu", "--reason", "x", "-C", home).output


def test_a_run_that_is_withdrawn_while_a_process_waits_for_the_log_does_not_go_on(home: Path, tmp_path: Path) -> None:
    made = open_coordinator(home)
    run(enrolment.found, "-C", home)
    begun = studies.begin(made, study_of(), adapter_in(tmp_path), "flu")
    found = studies.reopen_study(made, "flu")
    run(service.withdraw, "flu", "--reason", "wrong", "-C", home)
    for waiting in (begun, found):
        with pytest.raises(studies.WithdrawnError, match="flu was withdrawn: wrong"):
            waiting.play(QUICK, print)
    with open_journal(made.log_directory, made.keys) as journal:
        assert "flu" not in journal.history.runs


@dataclass(frozen=True)
class Made:
    """The part of a coordinator that giving up a run needs."""

    directory: Path
    log_directory: Path
    keys: Keys


def stopped_within_a_round(world: LoggedWorld) -> None:
    """Play until the sites are asked to train, and be killed there."""

    def kill(wait: Wait) -> None:
        if wait.stage == TRAIN:
            raise KeyboardInterrupt

    with world.journal() as journal, pytest.raises(KeyboardInterrupt):
        run_study(world.log(journal), world.exchange, timing=QUICK, watch=Watch(kill))


@pytest.mark.parametrize("stage", [CONSENT, COSIGN, TRAIN])
def test_a_run_that_is_stopped_between_rounds_loses_none(tmp_path: Path, stage: str) -> None:
    world, told = world_of(tmp_path, masked_study(training={"rounds": 2})), list[str]()

    def check() -> None:
        if stage in told:
            raise studies.StoppedError("asked to stop")

    for site in world.sites.values():
        site.deaf = stage == COSIGN  # so it waits for cosignatures
    watch = Watch(lambda wait: told.append(wait.stage), check=check)
    with world.journal() as journal, pytest.raises(studies.StoppedError):
        run_study(world.log(journal), world.exchange, timing=replace(QUICK, gathering=60.0), watch=watch)
    for site in world.sites.values():
        site.deaf = False
    assert len(world.run.load().statements) == (stage == TRAIN)  # a round that is under way is ended first
    assert [each["type"] for each in world.play().statements] == ["round-close", "round-close"]


def test_an_open_round_is_aborted_in_a_log_that_verifies(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 1}))
    stopped_within_a_round(world)
    made = cast("Coordinator", Made(tmp_path, world.folder / "log", world.keys))
    assert studies.withdraw(studies.StudyRun(made, world.run), "too few patients")
    assert world.run.withdrawn == "too few patients"
    assert [each["reason"] for each in world.run.load().statements] == [
        "ProtocolError: the coordinator withdrew the run: too few patients"
    ]
    with world.journal() as journal:
        assert journal.history.runs["run"].open is None
        stated = [each for each in map(_statement, journal._log.leaves()) if isinstance(each, RoundAbort)]
    assert [each.reason for each in stated] == ["ProtocolError: the coordinator withdrew the run: too few patients"]

    # The next run of the log is witnessed and verified by the rules of any version, with all that came before.
    (world.folder / "run").rename(world.folder / "old")
    RunDirectory.create(world.folder / "run", world.study, start_adapter(), PEFT_CONFIG)
    assert world.play("run-2").stopped
    report = check_bundle(read_archive(world.folder / "run" / "public"), world.policy)
    assert report.holds
    with pytest.raises(StateError, match="has ended"):
        studies.withdraw(studies.StudyRun(made, world.run), "too late")


def test_a_plain_round_that_was_withdrawn_is_not_run_again_in_another_run(tmp_path: Path) -> None:
    """The state does not count it, as it may be opened again; but its sites have begun it, and begin a round once."""
    world = world_of(tmp_path, study_of(training={"rounds": 2}))
    stopped_within_a_round(world)
    made = cast("Coordinator", Made(tmp_path, world.folder / "log", world.keys))
    assert studies.withdraw(studies.StudyRun(made, world.run), "too few patients")
    assert world.run.load().statements == ()
    (tmp_path / "runs").mkdir()
    world.run.path.rename(tmp_path / "runs/run")
    with pytest.raises(StateError, match="this very study was run before, as run, which was withdrawn"):
        studies.check_new(made, world.study)


def test_a_resumed_run_says_that_the_round_in_which_it_was_stopped_is_aborted(tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 2}))
    stopped_within_a_round(world)
    seen: list[tuple[int, str]] = []
    with world.journal() as journal:
        run_study(
            world.log(journal),
            world.exchange,
            observe=lambda statement, adapter: seen.append((statement["round"], statement["type"])),
            timing=QUICK,
        )
    assert seen == [(1, "round-abort"), (2, "round-close")]


@pytest.mark.parametrize("cosigned", [True, False])
def test_a_round_that_was_left_open_does_not_keep_keys_from_being_rotated(tmp_path: Path, cosigned: bool) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 2}))
    if cosigned:
        stopped_within_a_round(world)
    else:
        for site in world.sites.values():
            site.deaf = True
        with pytest.raises(TooFewSitesError, match="needs cosignatures"):
            world.play()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/run").symlink_to(tmp_path / "run")
    made = cast("Coordinator", Made(tmp_path, world.folder / "log", world.keys))
    with world.journal() as journal:
        assert journal.history.runs["run"].open is not None
        with pytest.raises(VerificationError, match="a round of run run is open"):
            journal.rotate(replace(world.keys, log=private("log 2"), coordinator=private("coordinator 2")), digest("c"))
        studies.end_rounds(made, journal)
        assert journal.history.runs["run"].open is None
        studies.end_rounds(made, journal)  # nothing is left to do
    for site in world.sites.values():
        site.deaf = False
    # The run goes on with the next round, and an auditor accepts what was aborted.
    assert [each["type"] for each in world.play().statements] == ["round-abort", "round-close"]
    assert check_bundle(read_archive(world.folder / "run" / "public"), world.policy).holds
    with world.journal() as journal:
        new = replace(world.keys, log=private("log 2"), coordinator=private("coordinator 2"))
        assert journal.rotate(new, digest("charter")) == journal.history.epochs[-1].since - 1
        journal.sign_head()


def _statement(leaf: bytes) -> object:
    from privet.common.log.encoding import parse_statement
    from privet.common.log.envelope import Envelope

    return parse_statement(Envelope.decode(leaf).payload)
