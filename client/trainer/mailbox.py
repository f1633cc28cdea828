"""A trainer as a job of a batch system: requests and answers are files in a directory that both ends see.

::

    key             of the job; it reads and deletes this file when it begins
    attached        public key of the session: of the process of the site that asks now
    PUBLIC-N.ask    request N, from 0, sealed; deleted when it was read
    PUBLIC-N.answer its answer, sealed; that to request 0 brings the job's own public key of the session

The site's process opens a session when it meets the job, also after it was killed. The job then drops what it did for
an earlier one. Each file appears by a rename, as a whole.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privet.client.trainer.wire import ANSWER, ASK, KEY_BYTES, PUBLIC_BYTES, TAG_BYTES, Seal, agreed
from privet.client.waiting import awaited_until
from privet.common.errors import StateError
from privet.common.progress import duration

_log = logging.getLogger("privet.site")
KEY, ATTACHED = "key", "attached"
State = Literal["queued", "running", "ended", "unknown"]
_SHORTEST, _LONGEST = 0.005, 0.25
_ASKED_EVERY = 5.0
"""Seconds between two questions to the batch system: it answers everybody's."""


class Job(Protocol):
    """One job at its batch system, and its directory."""

    @property
    def name(self) -> str:
        """Its name at the batch system."""

    @property
    def folder(self) -> Path:
        """Its directory."""

    @property
    def key(self) -> bytes:
        """Its key."""

    def state(self) -> State:
        """Return where the job is; unknown if the batch system does not say."""

    def fate(self) -> str:
        """Return in a few words how it ended."""


class Jobs(Protocol):
    """The jobs of a site, of which there is one at a time."""

    def take(self) -> Job:
        """Return the job: the one that was submitted before, if it is of use, or a new one."""

    def drop(self) -> None:
        """Cancel the job, wherever it is, and delete its directory."""


def name_of(key: bytes) -> str:
    """Return what names a job's key to those who may see it: its SHA-256, in hexadecimal."""
    return hashlib.sha256(key).hexdigest()


def put(path: Path, data: bytes) -> None:
    """Write a file that appears as a whole, readable by its owner alone."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    partial.rename(path)


@dataclass
class MailboxChannel:
    """The end of the site's process.

    Attributes:
        jobs: Where the job comes from.
        queued: Whether the job was still queued when an answer was awaited last.
    """

    jobs: Jobs
    queued: bool = False
    _job: Job | None = field(default=None, repr=False)
    _own: X25519PrivateKey | None = field(default=None, repr=False)
    _public: bytes = field(default=b"", repr=False)
    _seal: Seal | None = field(default=None, repr=False)
    _number: int = 0
    _asked: float = -math.inf
    _state: State = "unknown"

    def open(self) -> None:
        """Open a session with the job. What is left of others is deleted."""
        job, own = self.jobs.take(), X25519PrivateKey.generate()
        self._own, self._public = own, own.public_key().public_bytes_raw()
        self._job, self._seal, self._number = job, Seal(job.key, self._public), 0
        self._asked, self._state = -math.inf, "unknown"
        try:
            for old in [*job.folder.glob("*.ask"), *job.folder.glob("*.answer")]:
                old.unlink(missing_ok=True)
            put(job.folder / ATTACHED, self._public.hex().encode())
        except OSError as error:
            raise _unwritable(job.folder, error) from None

    @property
    def alive(self) -> bool:
        """Whether a session is open, and the job has not ended."""
        return self._job is not None and self._state_now(self._job) != "ended"

    def send(self, body: bytes, until: float) -> None:
        """Send a request. Raises `StateError` if the directory cannot be written."""
        job, seal = self._session()
        try:
            put(job.folder / f"{self._public.hex()}-{self._number}.ask", seal.close(ASK, self._number, body))
        except OSError as error:
            raise _unwritable(job.folder, error) from None

    def receive(self, most: int, until: float) -> bytes:
        """Return the answer, of at most `most` bytes, by a time on the clock of `time.monotonic`.

        Raises:
            StateError: The job ended, or did not answer in time; then `queued` says whether it waits still.
            VerificationError: The answer is none of this session.
        """
        job, seal = self._session()
        path, wait = job.folder / f"{self._public.hex()}-{self._number}.answer", _SHORTEST
        self.queued = said = False
        # In the queue, a site waits as long as its answer is of use, and no longer: others may need its cosignature.
        patience = awaited_until(until - time.monotonic())
        while (data := self._answered(job, path, most)) is None:
            if time.monotonic() > (patience if self._state == "queued" else until):
                self.queued = self._state == "queued"
                raise _late(job.name, queued=self.queued)
            if self._number == 0 and self._state == "queued" and not said:
                said, left = True, patience - time.monotonic()
                _log.info("the trainer's job %s is queued; this answer is awaited for %s", job.name, duration(left))
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST)
        body = seal.open(ANSWER, self._number, data)
        if self._own is not None:
            theirs, body = body[:PUBLIC_BYTES], body[PUBLIC_BYTES:]
            self._seal, self._own = Seal(job.key, self._public, agreed(self._own, theirs)), None
        path.unlink(missing_ok=True)
        self._number += 1
        return body

    def close(self) -> None:
        """Cancel the job, and delete its directory."""
        self._seal = self._job = self._own = None
        self.jobs.drop()

    def _answered(self, job: Job, path: Path, most: int) -> bytes | None:
        """Return the sealed answer; None if there is none yet. Raises `StateError` if there will be none."""
        ended = self._state_now(job) == "ended"
        # Looked for after the state: a job may answer, and end.
        data = _content(path, most + TAG_BYTES + PUBLIC_BYTES)
        if data is None and ended:
            raise StateError(
                f"the trainer's job {job.name} ended: {job.fate()}",
                "the site submits another in the next round; see [resources.slurm] in the site file for its time, and "
                "`privet site doctor SITE`",
            )
        return data

    def _session(self) -> tuple[Job, Seal]:
        if self._seal is None or self._job is None:
            raise StateError("the trainer has no job", "the site submits one in the next round")
        return self._job, self._seal

    def _state_now(self, job: Job) -> State:
        if time.monotonic() - self._asked > _ASKED_EVERY:
            self._asked, self._state = time.monotonic(), job.state()
        return self._state


def _content(path: Path, most: int) -> bytes | None:
    """Return a file's content; None if it is not there yet.

    The directory is the job's as well. It could put a link there, or a pipe on which a reader waits for ever.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        raise _odd(path.name) from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise _odd(path.name)
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > most:
            raise StateError(
                f"the trainer's answer: expected at most {most} bytes, found {found.st_size}", "report this as a bug"
            )
        return file.read(most)


def _odd(name: str) -> StateError:
    return StateError(
        f"the trainer's answer {name} is no file of its own",
        "take the trainer for broken into: train inside (`trainer` under [resources] in the site file), or elsewhere",
    )


def _late(name: str, *, queued: bool) -> StateError:
    if not queued:
        return StateError(
            f"the trainer's job {name} did not answer within hours, and was cancelled",
            "the site submits another in the next round; see whether its node works: `sinfo`",
        )
    error = StateError(
        "the site's trainer waits in the queue of its batch system; the site spent nothing, and takes part again once "
        "its job runs",
        "ask again in the next round, or give rounds more time: `privet coordinator run STUDY --round-time SECONDS`",
    )
    error.private = False  # the coordinator may know why the site is not there
    return error


def _unwritable(folder: Path, error: OSError) -> StateError:
    return StateError(
        f"the directory of the trainer's job, {folder}, cannot be written ({error.strerror})",
        "check `directory` under [resources.slurm] in the site file, its permissions and its disk",
    )


class MailboxEnd:
    """The job's end. It reads the job's key, which is then no longer there for a second process.

    Args:
        folder: The job's directory.
        idle: Seconds without a request after which there will be none.
        named: `name_of` the job's key, as the site told the batch system. The directory alone could be another one
            by now, with a key of somebody else's, who would have this job read his list of files.
        clock: Returns the time.

    Raises:
        StateError: There is no key, or another: the job was begun before, is not wanted, or is somebody else's.
    """

    def __init__(self, folder: Path, idle: float, named: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._idle, self._clock = folder, idle, clock
        try:
            found = _content(folder / KEY, KEY_BYTES)
            (folder / KEY).unlink()
        except (OSError, StateError):
            found = None
        if found is None or not hmac.compare_digest(name_of(found), named):
            raise StateError("the trainer's job has no key of its own", "the site submits another job")
        self._key = found
        self._public, self._number = "", 0
        self._seal: Seal | None = None
        self._seen: set[str] = set()

    def receive(self) -> bytes | None:
        """Return the next request; None if there will be none."""
        wait, since = _SHORTEST, self._clock()
        while self._clock() - since < self._idle:
            public = self._attached()
            if public is None:
                return None
            if public and public != self._public:
                if public in self._seen:  # a session is never gone on with: its numbers have been used
                    return None
                self._seen.add(public)
                self._public, self._number, self._seal = public, 0, Seal(self._key, bytes.fromhex(public))
            path = self._folder / f"{self._public}-{self._number}.ask"
            if self._seal is not None and path.exists():
                data = path.read_bytes()
                path.unlink(missing_ok=True)
                return self._seal.open(ASK, self._number, data)
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST)
        return None

    def send(self, body: bytes) -> None:
        """Answer the last request."""
        if self._seal is None:
            return
        seal, public = self._seal, bytes.fromhex(self._public)
        if self._number == 0:
            own = X25519PrivateKey.generate()
            body = own.public_key().public_bytes_raw() + body
            self._seal = Seal(self._key, public, agreed(own, public))
        sealed = seal.close(ANSWER, self._number, body)
        with suppress(FileNotFoundError):  # the site has given the job up
            put(self._folder / f"{self._public}-{self._number}.answer", sealed)
        self._number += 1

    def _attached(self) -> str | None:
        """Return the key of the present session; empty before the first one, None if the directory is gone."""
        try:
            public = (self._folder / ATTACHED).read_text(encoding="ascii")
        except FileNotFoundError:
            return None
        except OSError:  # of a file on another machine that was replaced just now
            return self._public
        return public if len(public) in (0, 2 * PUBLIC_BYTES) else None
