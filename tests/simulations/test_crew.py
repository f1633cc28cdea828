"""Simulations in several processes: the same result as in one, and no process is waited for or left behind."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from privet.common import errors
from privet.common.errors import PrivetError, StateError, StudyError
from privet.common.study.messages import RoundOpen
from privet.server.rounds.state import RunDirectory
from privet.simulations.engines import crew
from privet.simulations.engines.crew import Crew, CrewExchange, crew_of
from privet.simulations.engines.memory import Stopwatch
from privet.simulations.runs.simulate import (
    RoundReport,
    _Curve,
    prepare,
    reopen,
    run_baselines,
    run_simulation,
)
from privet.simulations.runs.sweep import load_sweep, run_sweep
from privet.simulations.runs.toml import to_toml
from tests.support.forks import training_processes
from tests.support.scenarios import MEASURED, scenario_file
from tests.support.tiny import private

pytestmark = pytest.mark.slow
SCENARIO = {
    "faults": {"dropout": {"train": 0.2}, "stragglers": 0.2, "slowdown": 3.0},
    "malicious": [{"attack": "sign-flip", "sites": 1}],
    "curious": True,
    "baselines": ["local", "pooled"],
}
OVERRIDES = {"training.rounds": 3, "lora.layers": 1}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork training processes from one that has loaded the libraries, instead of loading them in each.

    How the processes start of themselves is shown by the test that ends the one that started them.
    """
    monkeypatch.setattr(crew, "get_context", lambda method: training_processes())


def followed(summary: dict[str, Any]) -> dict[str, Any]:
    """Return what follows from the study file alone."""
    return {key: value for key, value in summary.items() if key not in MEASURED}


def test_two_processes_give_the_same_bits_as_one_also_where_one_was_killed(tmp_path: Path, bert: Path) -> None:
    one = run_simulation(prepare(scenario_file(tmp_path / "1", bert, SCENARIO, OVERRIDES), tmp_path / "1" / "run"))

    def kill(report: RoundReport) -> None:
        if report.round == 2:
            multiprocessing.active_children()[-1].kill()

    path = tmp_path / "2" / "run"
    simulated = prepare(scenario_file(tmp_path / "2", bert, SCENARIO, OVERRIDES), path)
    with pytest.raises(StateError, match="has ended"):
        run_simulation(simulated, kill, workers=2)
    assert not multiprocessing.active_children()
    two = run_simulation(reopen(path), workers=2)
    assert followed(two) == followed(one)
    assert two["training_seconds"] > 0
    assert two["peak_memory_mb"] > one["peak_memory_mb"] + 300  # the two have a base each


def test_a_private_study_gives_the_same_adapter_in_one_two_and_four_processes(tmp_path: Path, bert: Path) -> None:
    private_study = OVERRIDES | {"privacy": private(), "aggregation.method": "ffa"}
    found = []
    for number in (1, 2, 4):
        file = scenario_file(tmp_path / str(number), bert, {"baselines": []}, private_study)
        run_simulation(prepare(file, run := tmp_path / str(number) / "run"), workers=number)
        found.append(RunDirectory.open(run).load().adapter.digest)
    assert found == [found[0]] * 3


def test_a_sweep_and_its_rows_are_the_same_in_two_processes(tmp_path: Path, bert: Path) -> None:
    quick = {"training.rounds": 1, "training.local_steps": 1, "secure_aggregation.mode": "plain"}
    scenario_file(tmp_path, bert, overrides=quick)
    file = tmp_path / "sweep.toml"
    file.write_text(to_toml({"study": "study.toml", "data": "public", "fields": {"seed": [1, 2]}}))
    seen: list[str] = []
    results = [
        run_sweep(*load_sweep(file), tmp_path / str(workers), lambda entry, row: seen.append(row["id"]), workers)
        for workers in (1, 2)
    ]
    for result in results:
        for row in result["rows"]:
            del row["seconds"]
    assert results[0] == results[1]
    assert seen[:2] == seen[2:]


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    script = (
        "import os, time; from privet.simulations.engines.crew import Crew\n"
        "if __name__ == '__main__':\n"
        "    crew = Crew(2); print(*crew.map(os.getppid, []), flush=True)\n"
        "    print(*[hand.submit(os.getpid).result() for hand in crew._hands], flush=True); time.sleep(600)"
    )
    file = tmp_path / "start.py"
    file.write_text(script)
    process = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    children = [int(word) for word in process.stdout.readline().split()]
    assert len(children) == 2
    assert all(psutil.pid_exists(child) for child in children)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(child) for child in children)


def half_an_answer(number: int) -> bytes:
    """In a process: answer at length, and be killed in the middle of it."""

    def send(self: Any, data: bytes) -> None:
        os.write(self._handle, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    connection.Connection._send = send  # type: ignore[attr-defined]
    return bytes(10**6 + number)


def test_half_an_answer_of_a_process_that_was_killed_is_not_waited_for() -> None:
    with Crew(1) as hands:
        for _ in range(2):  # the second time it has ended before it is asked
            with pytest.raises(StateError, match="has ended"):
                list(hands.map(half_an_answer, [0]))


def test_a_process_that_is_killed_with_questions_before_it_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    asked = RoundOpen(study={}, round=1, nonce="", adapter_digest="", cohort=(), adapter=bytes(10**6))
    with Crew(1) as hands:
        exchange = CrewExchange(1, dict.fromkeys(range(2000), hands._hands[0]), Stopwatch())
        answers = exchange.ask(dict.fromkeys(range(2000), asked), timeout=1)
        assert next(iter(answers))[0] == 0
        (process,) = hands._started
        os.kill(process.pid or 0, signal.SIGSTOP)
        answers.close()  # type: ignore[attr-defined]
        process.kill()
        process.join()
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_an_arm_that_fails_ends_the_others_at_once(tmp_path: Path, bert: Path) -> None:
    many = {"training.rounds": 200, "lora.layers": 1}
    simulated = prepare(scenario_file(tmp_path, bert, {"baselines": ["local"]}, many), tmp_path / "run")
    seen: list[RoundReport] = []

    def fail(report: RoundReport) -> None:
        seen.append(report)
        if report.arm == seen[0].arm:
            raise KeyboardInterrupt

    evaluator = simulated.evaluator()
    curve = _Curve(tmp_path, simulated.plan, evaluator, fail, Stopwatch())
    with pytest.raises(KeyboardInterrupt), Crew(2) as hands:
        run_baselines(simulated, evaluator, curve, hands)
    assert len(seen) < 20


def test_a_little_memory_for_frozen_layers_stays_some_in_each_process(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []

    def fail(processes: int, megabytes: int) -> Any:
        given.append(megabytes)
        raise KeyboardInterrupt

    monkeypatch.setattr("privet.simulations.runs.simulate.crew_of", fail)
    for megabytes in (0, 1, 9):
        path = tmp_path / str(megabytes)
        simulated = prepare(scenario_file(path, bert, {"activations_mb": megabytes}), path / "run")
        with pytest.raises(KeyboardInterrupt):
            run_simulation(simulated, workers=2)
    assert given == [0, 1, 3]


def test_a_crew_ends_no_process_that_somebody_else_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    submit = ProcessPoolExecutor.submit

    def submit_beside(*args: Any) -> Any:
        other.start()
        return submit(*args)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", submit_beside)
    hands = Crew(1)
    with pytest.raises(KeyboardInterrupt), hands:
        raise KeyboardInterrupt
    other.join(0.5)
    assert other.is_alive()
    other.kill()
    other.join()


class Keeping:
    """A site that keeps what it was asked."""

    def __init__(self) -> None:
        self.kept: list[RoundOpen] = []

    def update(self, opened: RoundOpen) -> None:
        self.kept.append(opened)


def test_sites_of_a_process_keep_one_copy_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Keeping()
    monkeypatch.setattr(crew, "_here", crew._Process(workers={(1, 2): site}))  # type: ignore[dict-item]
    for filling in (1, 1, 2):
        asked = RoundOpen(study={}, round=1, nonce="", adapter_digest="", cohort=(), adapter=bytes([filling]) * 99)
        crew._reply((1, 2), asked)
    one, same, other = (opened.adapter for opened in site.kept)
    assert one is same
    assert other == bytes([2]) * 99


def test_an_error_of_ours_keeps_its_class_and_its_text_between_processes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PrivetError)]
    assert len(kinds) > 8
    for kind in kinds:
        error = kind("expected one, got two", "choose")
        for key in ("code", "private"):
            if hasattr(error, key):
                setattr(error, key, "other")
        # How a process sends an error is how it is copied.
        copied = copy.copy(error)
        assert (type(copied), str(copied), vars(copied)) == (kind, str(error), vars(error))


def test_one_process_is_the_own_one_and_ray_has_its_own(tmp_path: Path, bert: Path) -> None:
    with crew_of(1) as none:
        assert none is None
    simulated = prepare(scenario_file(tmp_path, bert), tmp_path / "run")
    with pytest.raises(StudyError, match="Ray starts"):
        run_simulation(simulated, engine="ray", workers=2)
