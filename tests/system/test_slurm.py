"""A study through a real Slurm. The site's process is killed while its job is queued, while it runs, and after its end.

Coordinator, port, round log, ledger and site are the production ones; one site takes part.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from privet.client.budget.releases import Releases, open_ledger
from privet.client.network.serve import serve_worker
from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker
from privet.client.site import Resources, load_site
from privet.client.trainer.opening import FOLDER
from privet.client.training.model import initial_adapter, open_host, peft_config_text
from privet.common.errors import TooFewSitesError
from privet.common.jsonlog import log_as_json
from privet.common.log.note import COSIGNATURE, NoteKey
from privet.common.log.statements import Genesis, Member, StatedFloor
from privet.common.pki.keyfile import public_key
from privet.server.log.journal import create_journal, open_journal
from privet.server.log.keys import Keys
from privet.server.network.deployed import run_over_flower
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory, RunState
from privet.server.rounds.timing import Timing
from tests.support.fleet_world import World, node_file, online, until
from tests.support.forks import forked
from tests.support.log_world import ORIGIN, private, public
from tests.support.logged_world import NOW, RELEASE_KEY
from tests.support.slurm_world import Slurm, slurm
from tests.support.tiny import private as local
from tests.support.tiny import tiny_study
from tests.support.trainer_world import place, with_table

WAITED = 600.0
"""Seconds that a machine with much else to do may take to start a job's Python and to load the model."""
TIMING = Timing(gathering=600, round=600, step=120)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm(Path(folder)) as found:
        yield found


def mortal(kind: type[Any], name: str, marker: Path, *, after: bool) -> None:
    """Kill this process at the next call of a method, once for each time that the marker is made."""
    original = getattr(kind, name)

    def call(*arguments: Any, **more: Any) -> Any:
        found = original(*arguments, **more) if after else None
        if marker.exists():
            marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return found if after else original(*arguments, **more)

    setattr(kind, name, call)


def serve(file: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # that of the server of forks may be older than the cluster
    with file.with_suffix(".log").open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    log_as_json()
    mortal(Releases, "begin", file.with_name("die-begun"), after=True)
    mortal(Releases, "charge", file.with_name("die-charged"), after=True)
    serve_worker(Worker(RealSite(load_site(file))), file)


@contextmanager
def serving(world: World, file: Path) -> Iterator[BaseProcess]:
    # What the coordinator notices within a minute: that the process before is gone.
    for number in online(world):
        world.link._state.deactivate_node(number)
    with forked(serve, file, {name: os.environ[name] for name in ("SLURM_CONF", "PATH")}) as process:
        yield process


def begun(file: Path) -> list[int]:
    """Return the rounds that began, by the site's ledger."""
    ledger = open_ledger(load_site(file))
    with ledger._chain.reading() as database:
        found = database.execute("SELECT round FROM entries WHERE kind = 'begin' ORDER BY sequence").fetchall()
    ledger.verify()
    ledger.close()
    return [number for (number,) in found]


@pytest.mark.slow
def test_a_site_is_killed_while_its_job_is_queued_runs_and_has_ended(
    bert: Path, tmp_path: Path, cluster: Slurm
) -> None:
    study = tiny_study(bert, privacy=local(), **{"training.rounds": 3, "training.local_steps": 2})
    world, shared = World(tmp_path), tmp_path / "shared, 'it' $(touch x)"
    shared.mkdir()
    asked = {"directory": str(shared), "idle": 60, "extra": ["--comment=a b; touch y"]}
    file = place(tmp_path / "site", study, sites=("ash",), slurm=asked, threads=1)
    record = tmp_path / "site/ash.state" / FOLDER / "job.json"
    run, keys = start(tmp_path, study, bert, file)
    final: list[RunState] = []

    def coordinate() -> None:
        with open_journal(tmp_path / "log", keys) as journal:
            log = RunLog(journal, run, "run", tmp_path / "run" / "public")
            while not final:
                # Of one site that was killed, a round has no contribution; then the run is resumed.
                with suppress(TooFewSitesError):
                    final.append(run_over_flower(log, world.link, timing=TIMING))

    with world.server() as server:
        point(world, file, server.port)
        coordinator = threading.Thread(target=coordinate, daemon=True)
        coordinator.start()
        cluster.hold()
        with serving(world, file):
            until(lambda: cluster.jobs("PENDING") != [], WAITED)
            names = cluster.jobs()
            assert names == [json.loads(record.read_bytes())["name"]]
        # Killed while it is queued. Nothing was drawn, and the next process takes the very same job.
        assert begun(file) == []
        with serving(world, file) as process:
            until(lambda: "going on with it" in file.with_suffix(".log").read_text(), WAITED)
            assert cluster.jobs() == names
            (file.parent / "die-begun").touch()
            cluster.release()
            process.join(WAITED)
        # Killed while it runs, after the first draw: round 1 is lost, the job serves the next process.
        assert begun(file) == [1]
        assert cluster.jobs("RUNNING") == names
        (file.parent / "die-charged").touch()
        with serving(world, file) as process:
            process.join(WAITED)
        # Killed with the update of round 2 stored; the job ends before the site is back.
        assert begun(file) == [1, 2]
        assert cluster.jobs("RUNNING") == names
        cluster.run("scancel", f"--name={names[0]}")
        until(lambda: cluster.jobs() == [], WAITED)
        with serving(world, file) as process:
            coordinator.join(WAITED)
            assert not coordinator.is_alive()
            assert cluster.jobs("RUNNING") != names
            process.terminate()
            process.join(60)
            assert process.exitcode == 0
    # Stopped in order, a site leaves no job, no directory and no key.
    until(lambda: cluster.jobs() == [], WAITED)
    assert list(shared.iterdir()) == []
    assert not record.exists()
    assert begun(file) == [1, 2, 3]
    assert [statement["type"] for statement in final[0].statements] == ["round-abort", *["round-close"] * 2]
    assert not [path for path in (tmp_path, Path.cwd(), shared) if (path / "x").exists() or (path / "y").exists()]
    said = file.with_suffix(".log").read_text()
    assert "Traceback" not in said
    assert said.count("was submitted as") == 2


def start(folder: Path, study: Any, base: Path, file: Path) -> tuple[RunDirectory, Keys]:
    """Begin a run, in a log of which the site of a file is the one member."""
    site = load_site(file)
    identity = site.identity_key()
    assert identity is not None
    witness = NoteKey("ash", COSIGNATURE, public("witness ash")).text
    members = (Member(site="ash", key=public_key(identity), witness=witness),)
    keys = Keys(ORIGIN, private("log"), private("coordinator"), RELEASE_KEY)
    genesis = Genesis(
        time=NOW,
        consortium="north",
        log=keys.public.text,
        coordinator=public("coordinator").hex(),
        members=members,
        quorum=1,
        floor=StatedFloor(),
    )
    create_journal(folder / "log", keys, [genesis])
    host = open_host(study, Resources(device="cpu", precision="fp32"))
    run = RunDirectory.create(folder / "run", study, initial_adapter(study, host), peft_config_text(host, study))
    return run, keys


def point(world: World, file: Path, port: int) -> None:
    """Name the coordinator in the site's file."""
    key = file.with_name("node.key")
    key.write_bytes(node_file(world.node_key()))
    key.chmod(0o600)
    (file.parent / "root.pem").write_bytes(world.authority.root())
    with_table(file, "coordinator", address=f"127.0.0.1:{port}", root="root.pem", key=key.name)
