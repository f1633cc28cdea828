"""Run a study with Flower's own simulation engine: `flwr run` on a SuperLink of our own, with Ray as backend.

The apps are the deployed ones, as in `privet.simulations.runs.simulate.run_arm`, which runs them in one process.
With the same site files and seeds, both end at the same adapter up to float32 rounding: only the number of CPU
threads differs, and so the order of additions. Ray is slow to start and holds the model and data of every site in
every actor. It is worthwhile from tens of sites or minutes of training on.

No code is shipped: the Flower app is only a `pyproject.toml`, whose components name the installed package. The
SuperLink listens on a loopback port, unencrypted and without authentication (Flower has none there). During a run,
another user of this machine could submit code to it, so use a machine of your own.

Every process of a run inherits one random mark in its environment. Flower detaches some processes into sessions of
their own. So the mark, and not a process group, finds all of them when the run ends.
"""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]

from privet.common import errors
from privet.common.errors import PrivetError, StateError, StudyError
from privet.server.rounds.state import RunDirectory
from privet.simulations.engines.choice import require_ray
from privet.simulations.engines.ray_client import SIMULATION

Start = Callable[[list[str], int | IO[bytes]], "subprocess.Popen[bytes]"]
"""Starts a command whose output goes to a pipe or a file."""

_CONNECTION = "own"
_LOG = "ray.log"  # in the run directory: the last output of Flower, Ray and the coordinator
_POLL = 0.2  # seconds between looks at the log and at the SuperLink
_STARTUP = 120.0  # seconds until a SuperLink must listen
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL
_KEPT = 2000  # log lines searched for the reason of a failure
_LONGEST_ROOT = 24  # Ray's socket paths, 80 characters longer, must stay below the 104 of a Unix socket
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"privet\.common\.errors\.(\w+): (.+)")


def run_with_ray(
    run: Path,
    sites: Path,
    *,
    nodes: int,
    cpus_per_site: int = 1,
    timeout: float = 3600.0,
    on_log: Callable[[str], None] | None = None,
) -> None:
    """Run or resume the study of a run directory on Flower's simulation engine. Do nothing if it has finished.

    Args:
        run: A run directory, at any round.
        sites: Directory of site files; node i is the i-th `*.toml` in name order.
        nodes: How many of them take part.
        cpus_per_site: CPUs that Ray reserves for one site. PyTorch uses the same number of threads if the site file
            names none. Ray trains as many sites at a time as this machine has CPUs for.
        timeout: Seconds for the whole run, start-up included. The sites have half of them to consent.
        on_log: Called with each line of the engine's log, without colours.

    Raises:
        StudyError: Ray is missing, or `nodes` does not fit the site files.
        StateError: `run` is not a run directory, or the study did not reach its end; it can be resumed.
        PrivetError: The coordinator's error, of its own class, such as `TooFewSitesError`.
    """
    directory = RunDirectory.open(run.resolve())
    if directory.load().stopped:
        return
    require_ray()
    check_size(sites, nodes, cpus_per_site)
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="privet-", dir=short_root(), ignore_cleanup_errors=True) as name:
        home = Path(name)
        port = free_port()
        app = write_app(home, run_config(directory.path, sites.resolve(), timeout))
        write_connection(home, port)
        size = engine_size(nodes, cpus_per_site, os.cpu_count() or 1)
        with (
            terminable(),
            own_processes(environment(home), home) as start,
            (directory.path / _LOG).open("wb") as log,
        ):
            superlink = start(superlink_command(port), log)
            wait_until_listening(superlink, port, min(deadline, time.monotonic() + _STARTUP))
            command = [
                executable("flwr"),
                "run",
                str(app),
                _CONNECTION,
                "--stream",
                "--federation-config",
                size,
            ]
            lines = follow(start(command, subprocess.PIPE), superlink, deadline, on_log)
    state = directory.load()
    if not state.stopped:
        standing = f"the study had completed {state.round} of {directory.study.rounds} rounds"
        raise reason(lines, f"{run}: {standing}", timeout if time.monotonic() >= deadline else None)


def check_size(sites: Path, nodes: int, cpus_per_site: int) -> None:
    """Raise `StudyError` unless there is a site file for each node, and a CPU for each site."""
    files = len(list(sites.glob("*.toml")))
    if not 1 <= nodes <= files:
        raise StudyError(
            f"nodes, the number of sites: expected 1 to {files}, because {sites} has {files} site files; got {nodes}",
            "set nodes to the number of sites that take part",
        )
    if cpus_per_site < 1:
        raise StudyError(
            f"cpus_per_site, the CPU cores of each simulated site: expected at least 1, got {cpus_per_site}",
            "set cpus_per_site to 1 or more",
        )


def engine_size(nodes: int, cpus_per_site: int, cpus: int) -> str:
    """Return the engine's size as a value of `flwr run --federation-config`.

    Ray starts an actor for each share of its CPUs. So it gets no more CPUs than the sites need and the machine has.
    """
    total = max(cpus_per_site, min(nodes * cpus_per_site, cpus))
    # Output of sites stays out of the log: only the coordinator's own errors are searched for and raised.
    return (
        f"num-supernodes={nodes} client-resources-num-cpus={cpus_per_site} "
        f"init-args-num-cpus={total} init-args-log-to-driver=false"
    )


def run_config(run: Path, sites: Path, timeout: float) -> dict[str, str | float]:
    """Return the run configuration that the two apps read.

    All nodes are present from the start, so waiting for more of them never helps. But the first answer waits until Ray
    has started and every site has loaded its data.
    """
    return {"run": str(run), "sites": str(sites), "gather-timeout": min(60.0, timeout / 2), "round-timeout": timeout}


def write_app(home: Path, config: dict[str, str | float]) -> Path:
    """Write a Flower app without code: only the names of our apps and a run configuration. Return its directory."""
    app = home / "app"
    app.mkdir()
    lines = [
        "[project]",
        'name = "privet-ray"',
        'version = "1.0.0"',
        'description = "Runs the installed privet; carries no code"',
        'license = "Apache-2.0"',
        "dependencies = []",
        "[tool.flwr.app]",
        'publisher = "privet"',
        "[tool.flwr.app.components]",
        'serverapp = "privet.server.app:app"',
        'clientapp = "privet.simulations.engines.ray_client:app"',
        "[tool.flwr.app.config]",
        *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in config.items()),
    ]
    (app / "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return app


def write_connection(home: Path, port: int) -> None:
    """Write the configuration of `flwr`. It names our SuperLink and no other."""
    lines = [
        "[superlink]",
        f'default = "{_CONNECTION}"',
        f"[superlink.{_CONNECTION}]",
        f'address = "127.0.0.1:{port}"',
        "insecure = true",
    ]
    (home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower and Ray: no telemetry, no installation of packages, no other cluster."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
    unproxied = ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1", "localhost")))
    return inherited | {
        # SuperExec looks for `flwr-simulation` on the path. It must be the one of this installation.
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "NO_PROXY": unproxied,
        "no_proxy": unproxied,
        "PYTHONUNBUFFERED": "1",
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray listens on more than loopback. Its token keeps other machines out.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # A site's own file chooses its device, so Ray must not hide the GPU.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        SIMULATION: secrets.token_hex(16),
        # Ray renames its processes; without this, the new name would overwrite the mark.
        "SPT_NOENV": "1",
    }


def executable(name: str) -> str:
    """Return the path of a command that is installed beside this interpreter.

    Raises:
        StudyError: It is not there.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise StudyError(
            f"--engine ray: Flower's program {name} is missing in the directory of {sys.executable}",
            "run `pip install 'privet[ray]'` in this Python environment",
        )
    return str(path)


def superlink_command(port: int) -> list[str]:
    """Return the command of a SuperLink for simulation. Only this machine can reach it."""
    flags = ["--simulation", "--insecure", "--disable-runtime-dependency-installation"]
    return [executable("flower-superlink"), *flags, "--host", "127.0.0.1", "--port", str(port)]


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def short_root() -> str:
    """Return the parent of temporary directories. It is short enough for Ray's sockets."""
    root = tempfile.gettempdir()
    return root if len(root) <= _LONGEST_ROOT else "/tmp"  # noqa: S108 - only the parent of a private directory


def wait_until_listening(superlink: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    """Wait until the SuperLink accepts connections.

    Raises:
        StateError: It ended, or did not accept any in time.
    """
    while superlink.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=_POLL).close()
            return
        except OSError:
            time.sleep(_POLL)
    raise StateError(
        f"Flower's server program, the SuperLink, did not start (exit status {superlink.poll()})",
        f"read {_LOG} in the run directory for the reason",
    )


def follow(
    stream: subprocess.Popen[bytes],
    superlink: subprocess.Popen[bytes],
    deadline: float,
    on_log: Callable[[str], None] | None,
) -> list[str]:
    """Pass on the log until the run ends, the SuperLink ends or the time is up. Return the last lines of the log."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(stream, lines), daemon=True).start()
    kept: deque[str] = deque(maxlen=_KEPT)
    while time.monotonic() < deadline:
        try:
            line = lines.get(timeout=_POLL)
        except queue.Empty:
            if superlink.poll() is not None:
                break
            continue
        if line is None:
            break
        kept.append(line)
        if on_log is not None:
            on_log(line)
    return list(kept)


def _read(stream: subprocess.Popen[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    assert stream.stdout is not None  # noqa: S101 - narrows the type; it was started with a pipe
    for line in stream.stdout:
        lines.put(_COLOUR.sub("", line.decode(errors="replace")).rstrip())
    lines.put(None)


def reason(lines: Iterable[str], standing: str, timeout: float | None) -> PrivetError:
    """Return the reason why the run ended early: the last of our errors in the coordinator's log, if there is one.

    Args:
        lines: The end of the log.
        standing: The progress of the study, in words.
        timeout: The timeout in seconds if it was reached, else None.
    """
    if (found := logged_error(lines)) is not None:
        return found
    if timeout is not None:
        return StateError(
            f"{standing} when the timeout of {timeout:g} s ended",
            f"resume the run with a larger timeout; {_LOG} in the run directory says how far it came",
        )
    return StateError(
        f"{standing} when Flower's simulation engine ended unexpectedly",
        f"read {_LOG} in the run directory for the reason, then resume the run",
    )


def logged_error(lines: Iterable[str]) -> PrivetError | None:
    """Return the last of our errors in a log, with its own class and text. Our errors never hold data."""
    found: tuple[type[PrivetError], list[str]] | None = None
    reading = False
    for line in lines:
        raised = _RAISED.search(line)
        kind = getattr(errors, raised[1], None) if raised else None
        if raised and isinstance(kind, type) and issubclass(kind, PrivetError):
            found, reading = (kind, [raised[2]]), True
        elif found and reading and line.startswith("  ") and not line.lstrip().startswith("File "):
            found[1].append(line)
        else:
            reading = False
    return None if found is None else found[0]("\n".join(found[1]))


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block, let SIGTERM unwind the stack, so that it leaves no processes behind."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def own_processes(environ: dict[str, str], home: Path) -> Iterator[Start]:
    """Yield a function that starts commands. When the block ends, in any way, end them and all their descendants.

    Raises:
        StateError: The block ended without an error, but a process could not be ended.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], output: int | IO[bytes]) -> subprocess.Popen[bytes]:
        # A neutral directory, so that nothing in it is imported. A session of its own, so that Ctrl-C reaches only us.
        started.append(
            subprocess.Popen(
                command,
                cwd=home,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        return started[-1]

    left = []
    try:
        yield start
    finally:
        left = end_marked(environ[SIMULATION])
        for process in started:
            if process.pid not in left:
                process.wait()
    if left:
        raise StateError(
            f"processes of Flower's simulation engine could not be ended; their ids are {', '.join(map(str, left))}",
            f"run `kill -9 {' '.join(map(str, left))}`",
        )


def end_marked(mark: str) -> list[int]:
    """End every process with the mark, first with SIGTERM, then with SIGKILL. Return the ids of those that remain."""
    known: set[psutil.Process] = set()
    for process in living(mark, known):
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + _GRACE
    while living(mark, known) and time.monotonic() < deadline:
        time.sleep(_POLL / 2)
    deadline = time.monotonic() + _GRACE
    # A process may start another between the search and the signal, so repeat until none is found.
    while (left := living(mark, known)) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(_POLL / 2)
    return [process.pid for process in left]


def living(mark: str, known: set[psutil.Process]) -> list[psutil.Process]:
    """Return the living processes that have, or are known to have had, the mark. Add them to `known`."""
    known.update(process for process in psutil.process_iter() if _mark_of(process) == mark)
    return [process for process in known if _lives(process)]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        mark: str | None = process.environ().get(SIMULATION)
    except (psutil.Error, OSError):  # it has ended meanwhile, or belongs to another user
        return None
    return mark


def _lives(process: psutil.Process) -> bool:
    try:
        # A dead process has no environment while its last threads end, but it still holds its files and locks.
        ended = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        return process.is_running() and not ended
    except psutil.Error:
        return False
