"""A masked study deployed on loopback: three site processes, killed and brought back, and the same bits as in memory.

The run carries a bundle with code, as a hostile coordinator's would.
"""

from __future__ import annotations

import io
import os
import sys
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.fab import Fab

from privet.client.app import find_worker
from privet.client.network.lock import exclusive
from privet.client.network.serve import serve_site, serve_worker
from privet.client.rounds.worker import Worker
from privet.client.site import Resources, load_site
from privet.client.training.model import initial_adapter, open_host, peft_config_text
from privet.common.errors import StateError, StudyError
from privet.common.jsonlog import log_as_json
from privet.common.pki.keyfile import read_node_key
from privet.common.study.study import Study
from privet.server.network.deployed import run_over_flower
from privet.server.network.grid import GridExchange
from privet.server.rounds.rounds import run_study
from privet.server.rounds.run_log import Unlogged
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.timing import Timing
from privet.simulations.engines import ray_client
from privet.simulations.sites import SimulatedSite, load_simulated
from tests.support.fleet_world import World, node_file, online, until
from tests.support.forks import forked
from tests.support.memory_grid import MemoryGrid
from tests.support.tiny import class_rows, private, site_toml, tiny_study

SITES = ("alder", "birch", "cedar")
TIMING = Timing(gathering=120, round=120, step=60)


def masked(base: Path) -> Study:
    return tiny_study(
        base,
        privacy=private(),
        cohort={"min_sites": 3},
        secure_aggregation={"mode": "masked"},
        **{"training.rounds": 2, "training.local_steps": 2},
    )


def site_file(world: World, folder: Path, number: int) -> Path:
    name = SITES[number]
    file = site_toml(folder, name, class_rows(30, seed=number), seed=7, peers=SITES)
    key = folder / f"{name}.key"
    key.write_bytes(node_file(world.node_key()))
    key.chmod(0o600)
    (folder / "root.pem").write_bytes(world.authority.root())
    return file


def point_at(file: Path, port: int) -> None:
    """Name the coordinator in a site file."""
    table = f'\n[coordinator]\naddress = "127.0.0.1:{port}"\nroot = "root.pem"\nkey = "{file.stem}.key"\n'
    file.write_text(file.read_text(encoding="utf-8") + table, encoding="utf-8")


def serve(file: Path) -> None:
    """Be a site of a simulation that is served all the same. What it says goes to a log beside its file."""
    with file.with_suffix(".log").open("ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    log_as_json()
    serve_worker(Worker(SimulatedSite(load_simulated(file))), file)


def site_process(file: Path) -> AbstractContextManager[BaseProcess]:
    return forked(serve, file)


def exit_code(process: BaseProcess) -> int | None:
    process.join(30)
    return process.exitcode


def hostile_bundle(sentinel: Path) -> Fab:
    """Return a bundle whose modules write a file when they are imported, under every name that could be."""
    code = f"open({str(sentinel)!r}, 'a').write(__name__)\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in ("client/app.py", "privet/client/app.py", "sitecustomize.py", "app.py"):
            archive.writestr(name, code)
        archive.writestr("pyproject.toml", '[project]\nname="x"\nversion="1"\n')
    return Fab("", packed.getvalue(), {})


class StoppedError(Exception):
    """The coordinator's process ends here."""


def in_memory(directory: Path, study: Study, files: Sequence[Path], base: Any) -> str:
    run = RunDirectory.create(directory, study, initial_adapter(study, base), peft_config_text(base, study))
    grid = MemoryGrid(ray_client.app, {11 + i: {"site": str(file)} for i, file in enumerate(files)})
    return run_study(Unlogged(run), GridExchange(grid, 0.001), timing=TIMING).adapter.digest


@pytest.mark.slow
def test_killed_and_brought_back_a_deployed_study_gives_the_bits_of_one_in_memory(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, study, sentinel = World(tmp_path), masked(bert), tmp_path / "sentinel"
    files = [site_file(world, tmp_path / "sites", number) for number in range(3)]
    base = open_host(study, Resources(device="cpu", precision="fp32"))
    expected = in_memory(tmp_path / "memory", study, files, base)

    state: Any = world.link._state
    bundle = state.store_fab(hostile_bundle(sentinel))
    create = state.create_run
    monkeypatch.setattr(state, "create_run", lambda _i, _v, _h, *rest: create("evil/app", "1", bundle, *rest))

    run = RunDirectory.create(tmp_path / "run", study, initial_adapter(study, base), peft_config_text(base, study))

    def stop(statement: Any, adapter: Any) -> None:
        raise StoppedError

    with ExitStack() as stack:
        with world.server() as server:
            port = server.port
            for file in files:
                point_at(file, port)
            processes = [stack.enter_context(site_process(file)) for file in files]
            until(lambda: len(online(world)) == 3, 90)
            with pytest.raises(StoppedError):
                run_over_flower(Unlogged(run), world.link, stop, TIMING)
            processes[2].kill()
            processes[2].join()
        # Coordinator and one site were killed; both come back, and the run is resumed as a new one of Flower's.
        processes[2] = stack.enter_context(site_process(files[2]))
        with world.server(port) as server:
            final = run_over_flower(Unlogged(RunDirectory.open(tmp_path / "run")), world.link, timing=TIMING)
            for process in processes:
                process.terminate()
            assert [exit_code(process) for process in processes] == [0, 0, 0]
            assert online(world) == []
    assert [statement["type"] for statement in final.statements] == ["round-close"] * 2
    assert [statement["survivors"] for statement in final.statements] == [list(SITES)] * 2
    assert final.adapter.digest == expected
    assert not sentinel.exists()
    assert server.gate.answers.keys() <= {200, 403}  # nobody asked for the bundle, which would be 404
    for file in files:
        assert "Traceback" not in file.with_suffix(".log").read_text()


def test_one_process_serves_a_site(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "a.lock"),
        pytest.raises(StateError, match="another process"),
        exclusive(tmp_path / "a.lock"),
    ):
        pass
    with exclusive(tmp_path / "a.lock"):
        pass


def test_a_node_key_is_private_and_on_the_curve(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = tmp_path / "node.key"
    for curve, mode, said in (
        (ec.SECP384R1(), 0o644, "other users of this machine"),
        (ec.SECP256R1(), 0o600, "not a P-384 key"),
    ):
        key.write_bytes(node_file(ec.generate_private_key(curve)))
        key.chmod(mode)
        with pytest.raises(StateError, match=said):
            read_node_key(key)
    key.write_text("nothing")
    with pytest.raises(StateError, match="cannot be read as a private key"):
        read_node_key(key)


def test_a_simulated_site_whose_noise_is_public_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privet.client.network.serve.log_as_json", lambda: None)
    file = site_toml(tmp_path, "alder", class_rows(3), seed=7)
    point_at(file, 9)
    with pytest.raises(StudyError, match="reproducible_seed"):
        serve_site(file)
    assert not (tmp_path / "alder.lock").exists()


def test_flowers_supernode_takes_a_simulated_site_in_a_simulation_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def context(run_config: dict[str, str], **node_config: object) -> Context:
        return Context(1, 2, node_config=node_config, state=RecordDict(), run_config=run_config)  # type: ignore[arg-type]

    monkeypatch.delenv(ray_client.SIMULATION, raising=False)
    file = site_toml(tmp_path, "alder", class_rows(3), seed=7)
    with pytest.raises(StudyError, match="reproducible_seed"):
        find_worker(context({}, site=str(file)))
    with pytest.raises(StudyError, match="reproducible_seed"):
        find_worker(context({"simulated": "true"}, site=str(file)))  # as a coordinator may say
    by_partition = context({"sites": str(tmp_path)}, **{"partition-id": 0})
    with pytest.raises(StudyError, match="no `site` entry with the path of a site file"):
        find_worker(by_partition)
    # A bundle may name the simulation's app in place of the site's. It serves no node but a simulation's.
    for asked in (context({}, site=str(file)), context({"simulated": "true"}, site=str(file)), by_partition):
        with pytest.raises(StudyError, match="not part of a simulation"):
            ray_client.find_simulated_worker(asked)
    assert ray_client.find_simulated_worker(context({}, site=str(file), simulated=True)).name == "alder"
    monkeypatch.setenv(ray_client.SIMULATION, "1")
    assert ray_client.find_simulated_worker(by_partition).name == "alder"
    with pytest.raises(StudyError, match="reproducible_seed"):
        find_worker(context({}, site=str(file)))


def test_the_coordinator_table_is_strict_and_its_paths_are_the_files(tmp_path: Path) -> None:
    file = site_toml(tmp_path, "alder", class_rows(3), seed=None)
    plain = file.read_text(encoding="utf-8")
    point_at(file, 9)
    found = load_site(file).coordinator
    assert found is not None
    assert (found.root, found.key) == (tmp_path / "root.pem", tmp_path / "alder.key")
    for address in ("localhost", "https://a:1", "a:1/x", "a b:1", "a:123456", "u@a:1", "[::1:9"):
        file.write_text(f'{plain}\n[coordinator]\naddress = "{address}"\nroot = "r"\nkey = "k"\n')
        with pytest.raises(StudyError, match="address"):
            load_site(file)
    file.write_text(f'{plain}\n[coordinator]\naddress = "[::1]:9"\nroot = "r"\nkey = "k"\ninsecure = true\n')
    with pytest.raises(StudyError, match="insecure"):
        load_site(file)
