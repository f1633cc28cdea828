"""Flower's simulation engine: the same adapter as in one process, honest failures, and nothing left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.client.site import Resources
from privet.client.training.model import initial_adapter, open_host, peft_config_text
from privet.common import errors
from privet.common.errors import PrivetError, StateError, StudyError, TooFewSitesError
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory
from privet.simulations.engines import ray
from privet.simulations.engines.ray import (
    engine_size,
    environment,
    logged_error,
    own_processes,
    run_with_ray,
    terminable,
)
from privet.simulations.runs.simulate import run_arm
from tests.support.tiny import class_rows, private, site_toml, tiny_study

FP32 = Resources(device="cpu", precision="fp32", threads=1)
TAG = "PRIVET_TEST_TAG"
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PrivetError)]


@dataclass(frozen=True)
class Federation:
    """Three tiny sites, and a way to start the same private study anew."""

    root: Path
    study: Study

    @property
    def sites(self) -> Path:
        return self.root / "sites"

    def start(self, name: str) -> RunDirectory:
        host = open_host(self.study, FP32)
        adapter = initial_adapter(self.study, host)
        return RunDirectory.create(self.root / name, self.study, adapter, peft_config_text(host, self.study))

    def in_memory(self, name: str) -> RunDirectory:
        run = self.start(name)
        run_arm(run, sorted(self.sites.glob("*.toml")), name, lambda statement, adapter: None)
        return run


@pytest.fixture
def federation(tmp_path: Path, bert: Path) -> Federation:
    masked = {"secure_aggregation": {"mode": "masked"}, "cohort": {"min_sites": 3}}
    frozen = {"aggregation": {"method": "ffa"}}  # a process may have to make A itself
    study = tiny_study(bert, privacy=private(), training={"rounds": 2}, **masked, **frozen)
    names = ("ash", "elm", "oak")
    for number, name in enumerate(names):
        site_toml(tmp_path / "sites", name, class_rows(60, seed=number), peers=names, resources={"threads": 1})
    return Federation(tmp_path, study)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Return the processes that still live among all that were started, directly or not, since the test began."""
    tag = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv(TAG, tag)
    return lambda: living(tag)


def living(tag: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- whole runs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray_and_one_process_end_at_the_same_adapter(federation: Federation, left: Callable[[], list[int]]) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'privet[ray]'")
    reference = federation.in_memory("memory").load()
    run = federation.start("ray")
    try:
        run_with_ray(run.path, federation.sites, nodes=3, timeout=240, on_log=print)
    except StateError:  # Flower's engine has hung at its start, once in some thirty runs: a run is then resumed
        run_with_ray(run.path, federation.sites, nodes=3, timeout=240, on_log=print)
    state = run.load()
    assert (state.round, state.stopped) == (2, True)
    for name, values in reference.adapter.values.items():
        assert np.abs(values - state.adapter.values[name]).max() <= 1e-5, name
    for key in ("round", "cohort", "survivors", "privacy", "study"):
        assert [s[key] for s in state.statements] == [s[key] for s in reference.statements], key
    assert state.statements[0]["survivors"] == ["ash", "elm", "oak"]
    assert left() == []


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_process_and_a_free_run_directory(
    federation: Federation, left: Callable[[], list[int]]
) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'privet[ray]'")
    run = federation.start("ray")
    running: list[int] = []

    def interrupt(line: str) -> None:
        if "Successfully installed" not in line:
            return
        # The engine's log may leave lines out, so what runs is looked at, and not what is said of it.
        end = time.monotonic() + 60
        while len(found := left()) <= 5 and time.monotonic() < end:
            time.sleep(0.1)
        running.extend(found)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_with_ray(run.path, federation.sites, nodes=3, timeout=180, on_log=interrupt)
    assert len(running) > 5  # SuperLink, SuperExec, simulation, Ray's own and its workers
    assert left() == []
    with run.locked():
        assert not run.load().stopped


@pytest.mark.slow
def test_sites_that_cannot_take_part_end_the_run_with_the_coordinators_own_error(
    federation: Federation, left: Callable[[], list[int]]
) -> None:
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'privet[ray]'")
    for file in federation.sites.glob("*.jsonl"):
        file.unlink()
    run = federation.start("ray")
    with pytest.raises(
        TooFewSitesError, match=r"0 sites consented to the study, but cohort\.min_sites demands 3"
    ) as caught:
        run_with_ray(run.path, federation.sites, nodes=2, timeout=150, on_log=print)
    assert caught.value.message.count("\n") == 2  # one line for each of two nodes
    assert left() == []


# --- before anything starts ------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, left: Callable[[], list[int]]
) -> None:
    run = federation.start("finished")
    run.commit(replace(run.load(), round=2, stopped=True))
    before = contents(run.path)
    monkeypatch.setitem(sys.modules, "ray", None)  # a finished run does not even need Ray
    run_with_ray(run.path, federation.sites, nodes=3)
    assert contents(run.path) == before
    assert left() == []


def test_missing_ray_is_said_before_anything_starts(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, left: Callable[[], list[int]]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # Python's own way to say that a module is not there
    run = federation.start("ray")
    before = contents(run.path)
    with pytest.raises(StudyError) as caught:
        run_with_ray(run.path, federation.sites, nodes=3)
    assert "pip install 'privet[ray]'" in caught.value.hint
    assert contents(run.path) == before
    assert left() == []


@pytest.mark.parametrize(("nodes", "cpus"), [(0, 1), (4, 1), (3, 0)])
def test_a_size_that_does_not_fit_is_refused(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, nodes: int, cpus: int
) -> None:
    monkeypatch.setattr(ray, "require_ray", lambda: None)
    run = federation.start("ray")
    with pytest.raises(StudyError, match=r"nodes|cpus_per_site"):
        run_with_ray(run.path, federation.sites, nodes=nodes, cpus_per_site=cpus)


# --- parts -----------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 256))
def test_ray_gets_room_for_one_site_and_no_more_than_sites_need_or_the_machine_has(
    nodes: int, cpus_per_site: int, cpus: int
) -> None:
    size = dict(entry.split("=") for entry in engine_size(nodes, cpus_per_site, cpus).split())
    total = int(size["init-args-num-cpus"])
    assert cpus_per_site <= total <= nodes * cpus_per_site
    assert total <= max(cpus, cpus_per_site)


def test_the_engine_sends_nothing_out_and_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_DATABASE", "somewhere.db")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    environ = environment(tmp_path)
    assert "FLWR_DATABASE" not in environ
    assert environ["RAY_ADDRESS"] == "local"
    assert environ["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    off = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    off["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    assert off.items() <= environ.items()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("message", ["one line", "two lines:\n  site a: first\n  site b: second"])
def test_an_error_is_read_back_from_its_traceback(kind: type[PrivetError], message: str) -> None:
    def raised() -> PrivetError:
        try:
            raise kind(message, "what to do")
        except PrivetError as error:
            return error

    error = raised()
    log = ["INFO :  Starting", *"".join(traceback.format_exception(error)).splitlines(), "ERROR : Exit Code: 700", ""]
    found = logged_error(log)
    assert type(found) is kind
    assert str(found) == str(error)


def test_an_ordinary_log_holds_no_error_of_ours() -> None:
    assert logged_error(["INFO : fine", "ValueError: privet", "privet.common.errors.annotations: x"]) is None


def test_processes_end_with_the_block_even_detached_deaf_ones_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: Callable[[], list[int]]
) -> None:
    monkeypatch.setattr(ray, "_GRACE", 0.5)
    ready = tmp_path / "ready"
    deaf = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    parent = f"import subprocess,sys; subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)"
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    def block() -> None:
        with own_processes(environment(tmp_path), tmp_path) as start:
            start([sys.executable, "-c", parent], subprocess.DEVNULL).wait()  # an orphan is left
            deadline = time.monotonic() + 30
            while not ready.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            assert len(left()) == 2
            raise StateError("stop here")

    try:
        with pytest.raises(StateError, match="stop here"):
            block()
        assert left() == [bystander.pid]
    finally:
        bystander.kill()
        bystander.wait()


def test_a_termination_signal_ends_the_processes_too(tmp_path: Path, left: Callable[[], list[int]]) -> None:
    def block() -> None:
        with terminable(), own_processes(environment(tmp_path), tmp_path) as start:
            start([sys.executable, "-c", "import time; time.sleep(60)"], subprocess.DEVNULL)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        block()
    assert left() == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_app_carries_no_code(tmp_path: Path) -> None:
    app = ray.write_app(tmp_path, {"run": '/a dir/ünï"code"', "round-timeout": 3.5})
    assert [file.name for file in app.iterdir()] == ["pyproject.toml"]
    config = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert config["config"] == {"run": '/a dir/ünï"code"', "round-timeout": 3.5}
    assert json.dumps(config["components"]).count("privet.") == 2
