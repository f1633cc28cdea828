"""A trainer as a child of the site's process, and the two pipes between both."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from privet.client.trainer.places import discard, make_private
from privet.common.errors import StateError

_LENGTH = struct.Struct(">Q")
_CHUNK = 1 << 20
_KEPT = ("LANG", "LC_ALL", "LC_CTYPE", "TZ")
_KEPT_PREFIXES = ("MKL_", "ONEDNN_", "DNNL_", "OMP_", "KMP_", "GOMP_", "ATEN_", "TORCH_", "PYTORCH_", "CUDA_",
                  "CUBLAS_", "NVIDIA_", "OPENBLAS_", "LD_LIBRARY_PATH")  # fmt: skip
"""Variables that choose language, kernels or devices. All others could hold secrets."""
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables by which a library binds threads to processors. A trainer may not, as it may not bind others."""
_SECRET = re.compile("KEY|TOKEN|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
MODULE = "privet.client.trainer.start"


def stripped(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of a trainer whose files lie in `home`."""
    chosen = [n for n in environment if n.startswith(_KEPT_PREFIXES) and n not in _BINDING and not _SECRET.search(n)]
    kept = {name: environment[name] for name in (*_KEPT, *chosen) if name in environment}
    places = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "XDG_CACHE_HOME": str(home / "cache")}
    return {**kept, **places, "PATH": os.defpath}


@dataclass
class PipeChannel:
    """The parent's end.

    Attributes:
        home: The child's working directory; it may write there and nowhere else.
        device: Number of the CUDA device that the child sees; None: all.
    """

    home: Path
    device: int | None = None
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    queued = False

    def open(self) -> None:
        """Start the child, unless it runs."""
        if self.alive:
            return
        discard(self.home / "tmp")  # what a child left that was killed
        for path in (self.home, self.home / "tmp", self.home / "cache"):
            make_private(path)
        environment = stripped(os.environ, self.home)
        if self.device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = _nth_device(environment, self.device)
        # What it prints could hold records, so nobody reads it. It says what went wrong in its answers.
        self._child = subprocess.Popen(
            [sys.executable, "-I", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.home,
            env=environment,
        )
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                with suppress(OSError):  # larger pipes, fewer turns
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _CHUNK)

    @property
    def alive(self) -> bool:
        """Whether the child runs."""
        return self._child is not None and self._child.poll() is None

    def send(self, body: bytes, until: float) -> None:
        """Send a request, by a time on the clock of `time.monotonic`. Raises `StateError` if that fails."""
        child = self._running()
        rest = memoryview(_LENGTH.pack(len(body)) + body)
        while rest:
            self._wait(child.stdin.fileno() if child.stdin else -1, select.POLLOUT, until)
            try:
                rest = rest[os.write(child.stdin.fileno() if child.stdin else -1, rest[:_CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._ended() from None

    def receive(self, most: int, until: float) -> bytes:
        """Return the answer, of at most `most` bytes. Raises `StateError` as `send`, and if it is larger."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, until))
        if length > most:
            raise StateError(
                f"the trainer's answer: expected at most {most} bytes, found {length}", "report this as a bug"
            )
        return self._read(length, until)

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _read(self, size: int, until: float) -> bytes:
        child = self._running()
        parts, missing = [], size
        while missing:
            self._wait(child.stdout.fileno() if child.stdout else -1, select.POLLIN, until)
            try:
                part = os.read(child.stdout.fileno() if child.stdout else -1, min(missing, _CHUNK))
            except BlockingIOError:
                continue
            if not part:
                raise self._ended()
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def _wait(self, descriptor: int, event: int, until: float) -> None:
        left = until - time.monotonic()
        waiter = select.poll()
        waiter.register(descriptor, event)
        if left <= 0 or not waiter.poll(min(left, 1e6) * 1e3):
            raise StateError(
                "the trainer did not answer within hours, and was ended",
                "the site starts it again in the next round; see whether its device works: `privet site doctor SITE`",
            )

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise StateError("the trainer does not run", "the site starts it again in the next round")
        return self._child

    def _ended(self) -> StateError:
        code = None
        if self._child is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self._child.wait(5)
        how = f"with signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return StateError(
            f"the trainer's process ended {how}",
            "the site starts it again in the next round; signal 9 means that memory ran out, or that somebody ended it",
        )


def _nth_device(environment: Mapping[str, str], number: int) -> str:
    """Return the name of a CUDA device, of those that this process may use."""
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[number % len(visible)] if visible else str(number)


class PipeEnd:
    """The child's end."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink

    def receive(self) -> bytes | None:
        """Return the next request; None if there will be none."""
        head = self._read(_LENGTH.size)
        return None if head is None else self._read(_LENGTH.unpack(head)[0])

    def send(self, body: bytes) -> None:
        """Answer the last request."""
        rest = memoryview(_LENGTH.pack(len(body)) + body)
        while rest:
            rest = rest[os.write(self._sink, rest[:_CHUNK]) :]

    def _read(self, size: int) -> bytes | None:
        parts, missing = [], size
        while missing:
            part = os.read(self._source, min(missing, _CHUNK))
            if not part:
                return None
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
