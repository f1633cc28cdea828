"""Commands as processes that start at once: each is forked from a process that has already loaded the libraries.

A new interpreter takes four seconds of a core to load PyTorch and its companions, and a deployment starts dozens of
commands. A forked process has its own arguments, environment, directory, standard streams and exit code, and can be
killed, like any other. tests/system/test_deploy.py compares it with a command in an interpreter of its own.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, NoReturn, Self

ROOT = Path(__file__).parents[2]
_LARGEST = 2**20
# Seconds until it is seen that a process has ended. A thread would see it at once, but a process that forks has none.
_LATEST = 0.05


class Program:
    """A process that was forked: what the tests use of `subprocess.Popen`."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self.pid = int(line.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code.

        Raises:
            subprocess.TimeoutExpired: The process runs after `timeout` seconds.
        """
        if (code := self._ended(timeout)) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, sig: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        """Ask the process to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float | None) -> int | None:
        if self.returncode is None:
            self._line.settimeout(None)
            if select.select([self._line], [], [], seconds)[0]:
                self.returncode = int(self._line.recv(64) or -signal.SIGKILL)
                self._line.close()
        return self.returncode


class Forks:
    """Starts `privet` commands as processes forked from one. A context manager: that one ends with it."""

    def __init__(self) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"from tests.support import forks; forks._serve({theirs.fileno()})"
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process that the others are forked from."""
        self._line.close()
        self._process.wait(30)

    def start(
        self,
        arguments: Sequence[object],
        environment: Mapping[str, str],
        output: IO[bytes],
        *,
        errors: IO[bytes] | None = None,
        directory: Path | None = None,
    ) -> Program:
        """Start `privet` with these arguments. Its errors go where its output goes, unless a file is named for them."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asked = [list(map(str, arguments)), dict(environment), str(directory or Path.cwd())]
        streams = [output.fileno(), (errors or output).fileno(), theirs.fileno()]
        socket.send_fds(self._line, [json.dumps(asked).encode()], streams)
        theirs.close()
        return Program(ours)

    def run(
        self, arguments: Sequence[object], environment: Mapping[str, str], directory: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `privet` with these arguments to its end, as `subprocess.run` does with `capture_output` and `text`."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            code = self.start(arguments, environment, output, errors=errors, directory=directory).wait()
            texts = []
            for file in (output, errors):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess(shlex.join(map(str, arguments)), code, *texts)


def _forked(line: socket.socket) -> bool:
    """Fork a process for each request. Return True in each of them, and False once nobody can ask any more."""
    asking: dict[int, socket.socket] = {}
    while True:
        ready = select.select([line], [], [], _LATEST if asking else None)[0]
        while asking and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            asked = asking.pop(ended[0])
            with suppress(OSError):  # nobody may wait for it any longer
                asked.send(str(os.waitstatus_to_exitcode(ended[1])).encode())
            asked.close()
        if not ready:
            continue
        data, streams, _, _ = socket.recv_fds(line, _LARGEST, 3)
        if not data:
            return False
        pid = os.fork()
        if pid == 0:
            for other in (line, *asking.values()):
                other.close()
            _become(streams, *json.loads(data))
            return True
        asking[pid] = socket.socket(fileno=streams[2])
        asking[pid].send(str(pid).encode())
        os.close(streams[0])
        os.close(streams[1])


def _become(streams: Sequence[int], arguments: list[str], environment: dict[str, str], directory: str) -> None:
    os.dup2(streams[0], 1)
    os.dup2(streams[1], 2)
    for each in streams:
        os.close(each)
    os.environ.clear()
    os.environ.update(environment)
    found = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [each for each in found if each and each not in sys.path]
    os.chdir(directory)
    sys.argv = ["privet", *arguments]


def _command() -> NoReturn:
    """Run the command, and end as an interpreter does, except that it does not free what it shares with others."""
    from privet.common.cli import main

    code = 1
    try:
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(descriptor: int) -> None:
    """Be the process that others are forked from."""
    gc.disable()
    importlib.import_module("tests.support.loaded")
    gc.freeze()  # or each process would copy all of it to look through it
    gc.enable()
    if _forked(socket.socket(fileno=descriptor)):
        _command()


def training_processes(*modules: str) -> ForkServerContext:
    """Return a context of `multiprocessing` whose processes are forked from one that has loaded libraries and modules.

    Python has one such process. Where another test has started it already, the modules are loaded in each process.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.support.loaded", *modules])
    return context


def end_training_processes() -> None:
    """End the process of `training_processes`, so that the next one loads what its own user asks for."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@contextmanager
def forked(target: Callable[..., None], *arguments: Any) -> Iterator[BaseProcess]:
    """Run a function in a training process, until the block ends at the latest."""
    process = training_processes().Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
