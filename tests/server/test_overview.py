"""How things stand at a coordinator: what is said is what lies in its directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from privet.common.log.statements import StatedFloor
from privet.server.commands import service
from privet.server.consortium.coordinator import Coordinator
from privet.server.network.nodes import RegisteredNode
from privet.server.overview import as_lines, consortium_status
from privet.server.rounds.quality import accuracy_within, quality
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.wait import Wait
from tests.support.consortium_world import make_coordinator, run, running
from tests.support.synthetic import PEFT_CONFIG, start_adapter, study_of

CLOSED, ABORTED = "round-close", "round-abort"


@dataclass(frozen=True)
class Nodes:
    """A link state that holds some nodes."""

    found: tuple[RegisteredNode, ...]

    def nodes(self) -> tuple[RegisteredNode, ...]:
        return self.found

    def owners(self, names: Mapping[bytes, str]) -> Mapping[int, str]:
        return {}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Coordinator:
    """A coordinator without members. Read only, but for `runs/`, where each test makes its own."""
    return make_coordinator(tmp_path_factory.mktemp("coordinator") / "north")


@pytest.fixture
def made(shared: Coordinator) -> Coordinator:
    shutil.rmtree(shared.directory / "runs")
    (shared.directory / "runs").mkdir()
    return shared


def begin(made: Coordinator, name: str, *rounds: str, ended: bool = False) -> Path:
    """Make a run whose rounds came to this."""
    directory = RunDirectory.create(made.directory / "runs" / name, study_of(), start_adapter(), PEFT_CONFIG)
    statements = [{"round": number, "type": kind, "metrics": {}} for number, kind in enumerate(rounds, 1)]
    for number in range(1, len(rounds) + 1):
        state = RunState(number, start_adapter(), statements=tuple(statements[:number]), stopped=ended)
        directory.commit(state)
    return directory.path


def test_a_new_coordinator_has_nothing_and_says_so(made: Coordinator) -> None:
    found = consortium_status(made)
    assert found == {
        "consortium": "north", "founded": False, "members": [], "connected": [], "asking": [], "nodes_online": 0,
        "serving": False, "statements_waiting": 0, "runs": [],
    }  # fmt: skip
    assert [line.split()[0] for line in as_lines(found)] == ["consortium", "members"]


def test_a_run_is_told_as_its_state_is(made: Coordinator) -> None:
    begin(made, "b-new")
    (begin(made, "a-ended", CLOSED, ABORTED, CLOSED, ended=True) / "release").mkdir()
    done, new = consortium_status(made)["runs"]  # by name, whichever began first
    both: dict[str, object] = {"rounds": 4, "withdrawn": None, "waiting": None, "epsilon": None, "metrics": None}
    both |= {"adapter": start_adapter().digest}
    assert done == both | {
        "run": "a-ended", "round": 3, "closed": 2, "aborted": 1, "ended": True, "released": True,
    }  # fmt: skip
    assert new == both | {
        "run": "b-new", "round": 0, "closed": 0, "aborted": 0, "ended": False, "released": False,
    }  # fmt: skip


def test_an_accuracy_is_within_its_interval_19_times_of_20() -> None:
    generator = np.random.default_rng(5)
    true, units, noise, inside = 0.8, 60, 4.0, 0
    for _ in range(4000):
        right, measured = generator.binomial(units, true), units + noise * generator.standard_normal()
        accuracy = (right + noise * generator.standard_normal()) / measured
        inside += abs(accuracy - true) <= accuracy_within(accuracy, measured, noise)
    assert 0.93 < inside / 4000 < 0.98
    assert accuracy_within(0.8, 1e6, 0.0) < 0.001
    assert accuracy_within(0.8, 5.0, 40.0) == 1.0
    measured_well = {"validation_loss": 0.5, "validation_accuracy": 0.8, "validation_units": 900.0}
    assert quality({**measured_well, "validation_noise": 3.0}) == "validation accuracy 80.0 % (\u00b1 3), loss 0.5"
    assert "loss not known" in quality({**measured_well, "validation_noise": 30.0})


def test_what_a_run_waits_for_measured_and_spent_is_shown_within_80_columns(made: Coordinator) -> None:
    path = begin(made, "flu", CLOSED)
    directory = RunDirectory.open(path)
    spent = {"epsilon": {"berlin": 0.5, "lyon": 1.25}}
    measured = {"validation_loss": 0.5, "validation_accuracy": 0.812}
    statement = {"round": 1, "type": CLOSED, "metrics": measured, "privacy": spent}
    directory.commit(RunState(1, start_adapter(), statements=(statement,)))
    wait = Wait("train", 2, 0, ("berlin",), {"lyon": "", **{f"hospital-of-saint-{n}": "" for n in range(9)}}, 1.0)
    directory.note_wait(wait)
    found = consortium_status(made)
    assert found["runs"][0]["waiting"] == asdict(wait)
    text = "\n".join(as_lines(found))
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("1 of 4 rounds closed", "running", "waiting for lyon", "at most epsilon 1.250", "accuracy 81.2 %"):
        assert part in text
    assert (
        quality(measured | {"validation_loss": -0.8})
        == "validation accuracy 81.2 %, loss not known: the noise is larger"
    )
    directory.note_wait(None)
    directory.withdraw("the study was wrong")
    text = "\n".join(as_lines(consortium_status(made)))
    assert "withdrawn: the study was wrong" in text
    assert "waiting for" not in text


def test_the_wait_of_a_process_that_is_gone_is_not_shown(made: Coordinator) -> None:
    path = begin(made, "flu")
    RunDirectory.open(path).note_wait(Wait("train", 1))
    file = path / "waiting.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "process": 2**22 + 1}))
    assert RunDirectory.open(path).waiting is None
    # It was killed within a round. One that ends in order notes the same.
    for killed in (True, False):
        if not killed:
            RunDirectory.open(path).note_wait(None, 1)
        assert RunDirectory.open(path).interrupted == 1
        (line,) = [line for line in as_lines(consortium_status(made)) if line.startswith("run ")]
        assert "0 of 4 rounds closed, 0 aborted, round 1" in line
    RunDirectory.open(path).note_wait(None, 2)  # of a state that was restored from a backup
    assert RunDirectory.open(path).interrupted == 0
    RunDirectory.open(path).note_wait(None)
    assert RunDirectory.open(path).interrupted == 0


def test_what_is_no_run_is_passed_over(made: Coordinator) -> None:
    runs = made.directory / "runs"
    (runs / "being-made").mkdir()
    (runs / "note.txt").write_text("of the operator's")
    assert consortium_status(made)["runs"] == []


def test_only_nodes_that_are_connected_now_count_each_key_once(
    made: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = (RegisteredNode(1, b"a", True), RegisteredNode(2, b"b", False), RegisteredNode(3, b"a", True))
    monkeypatch.setattr("privet.server.overview.link_of", lambda directory: Nodes(nodes))
    assert consortium_status(made)["nodes_online"] == 0  # the service is down: they were connected before
    monkeypatch.setattr("privet.server.overview.listens", lambda settings: True)
    assert consortium_status(made)["nodes_online"] == 1


def test_members_are_named_and_what_the_log_does_not_hold_yet_is_counted(tmp_path: Path) -> None:
    with running(tmp_path) as world:
        for site in ("lyon", "berlin"):
            world.enrol(site)
        world.invite("oslo")  # is none yet
        assert consortium_status(world.coordinator)["statements_waiting"] == 0
        world.coordinator.members.found(StatedFloor(), datetime.now(UTC))
        found = consortium_status(world.coordinator)
    assert found["members"] == ["berlin", "lyon"]
    assert found["statements_waiting"] == 1  # the genesis
    assert found["asking"] == []  # an invitation alone asks for nothing
    lines = as_lines(found)
    assert "members     berlin, lyon; 0 connected" in lines
    assert [line for line in as_lines(found | {"serving": False}) if "`privet coordinator serve`" in line]
    away = "away        lyon: their operators start `privet site serve`"
    assert away in as_lines(found | {"connected": ["berlin"], "nodes_online": 1})
    assert [line for line in lines if line.startswith("log ") and "1 " in line]


def test_the_command_tells_people_and_programs_the_same(made: Coordinator) -> None:
    (begin(made, "flu", CLOSED, CLOSED, ended=True) / "release").mkdir()
    begin(made, "copd", ABORTED)
    found = json.loads(run(service.status, "-C", made.directory, "--json").output)
    assert found == consortium_status(made)
    lines = run(service.status, "-C", made.directory).output.splitlines()
    assert lines == as_lines(found)
    copd, flu = (line for line in lines if line.startswith("run "))
    assert "copd" in copd
    assert "flu" in flu
    assert lines[-1].strip() == f"adapter {start_adapter().digest[:19]}"
    assert ("released" in flu, "released" in copd) == (True, False)
    assert ("2 of 4 rounds" in flu, "1 aborted" in copd) == (True, True)
