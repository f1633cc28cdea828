"""The trainer as a job of a Slurm cluster: submitted, found again after the site's process was killed, and cancelled.

A site has one such job at a time. Its name is random, and is written down, with the job's directory and key, before it
is submitted. So a process that was killed at any moment leaves nothing that the next one does not find by that name.
A job that starts without anybody wanting it finds no key, or no request, and ends.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from privet.client.site import SlurmSection
from privet.client.trainer.mailbox import ATTACHED, KEY, State, name_of, put
from privet.client.trainer.pipe import MODULE
from privet.client.trainer.places import discard, require_guarded
from privet.client.trainer.wire import KEY_BYTES
from privet.common.canonical import canonical_json
from privet.common.errors import StateError
from privet.common.files import write_durably

_log = logging.getLogger("privet.site")
_SECONDS = 60
_LEFT = "cancel"
"""Name of the file, beside the record, that names jobs which are still to be cancelled."""
_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
_OPTIONS = ("SBATCH_", "SQUEUE_", "SCANCEL_")
"""Beginnings of variables that are options of these programs, of which a site sets all that it needs."""
COMMANDS = ("sbatch", "squeue", "scancel")
"""The programs of Slurm that a site uses."""


@dataclass(frozen=True)
class SlurmJob:
    """One job (`privet.client.trainer.mailbox.Job`).

    Attributes:
        name: Its name.
        folder: Its directory.
        key: Its key.
        opening: Digest of what it is opened with.
    """

    name: str
    folder: Path
    key: bytes = field(repr=False)
    opening: str

    def state(self) -> State:
        """Return where the job is; unknown if the controller does not answer."""
        try:  # a stranger may give a job the same name
            done = _run("squeue", "--me", "--noheader", f"--name={self.name}", "--format=%T")
        except StateError:
            return "unknown"
        if done.returncode:
            return "unknown"
        states = set(done.stdout.split())
        if not states:
            return "ended"
        return "queued" if states <= _QUEUED else "running"

    def fate(self) -> str:
        """Return how it ended, as far as the controller still knows."""
        with suppress(StateError):
            done = _run("squeue", "--me", "--noheader", f"--name={self.name}", "--states=all", "--format=%T %r")
            if done.returncode == 0 and done.stdout.strip():
                return " ".join(done.stdout.split())[:200]
        return "the controller does not say how"


@dataclass(frozen=True)
class SlurmJobs:
    """The job of a site (`privet.client.trainer.mailbox.Jobs`).

    Attributes:
        section: How jobs are submitted.
        record: The file that names the job, with its key; in a directory of the site alone.
        opening: Digest of what the trainer is opened with: a job that was opened with something else is of no use.
    """

    section: SlurmSection
    record: Path
    opening: str

    def take(self) -> SlurmJob:
        """Return the job: the one that was submitted before, if it is of use, or a new one.

        Raises:
            StateError: Slurm does not take it, or its directory cannot be made.
        """
        _cancel(self.record.with_name(_LEFT))
        known = _recorded(self.record)
        if known is not None:
            if known.opening == self.opening and known.state() != "ended" and (known.folder / ATTACHED).exists():
                _log.info("the trainer's job %s was submitted before; going on with it", known.name)
                return known
            self.drop()
        return self._submit()

    def drop(self) -> None:
        """Cancel the job, wherever it is, and delete its directory and the record. See `drop_job`."""
        drop_job(self.record)

    def _submit(self) -> SlurmJob:
        name = f"privet-{secrets.token_hex(8)}"
        job = SlurmJob(name, self.section.directory / name, os.urandom(KEY_BYTES), self.opening)
        known = {"name": name, "folder": str(job.folder), "key": job.key.hex(), "opening": job.opening}
        try:
            require_guarded(self.section.directory)
            self.record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(self.record, canonical_json(known) + b"\n", mode=0o600)
            job.folder.mkdir(mode=0o700)
            put(job.folder / KEY, job.key)
            # Until a session is opened the job waits, and one that finds no such file ends.
            put(job.folder / ATTACHED, b"")
        except OSError as error:
            raise StateError(
                f"the files of the trainer's job cannot be made: {error.filename or job.folder}: {error.strerror}",
                "correct `directory` under [resources.slurm] in the site file: this user must be able to write there",
            ) from None
        done = _run("sbatch", *options(self.section, name, job.folder), script=script(job, self.section.idle))
        if done.returncode:
            self.drop()
            said = " ".join(done.stderr.split())[:300]
            raise StateError(
                f"Slurm does not take the trainer's job: {said}", "correct [resources.slurm] in the site file"
            )
        _log.info("the trainer's job %s was submitted as %s", name, done.stdout.strip()[:40])
        return job


def drop_job(record: Path) -> None:
    """Cancel a site's job, wherever it is, and delete its directory and the record.

    A job that cannot be cancelled now, as the controller does not answer, is noted, and cancelled the next time.
    """
    left, known = record.with_name(_LEFT), _recorded(record)
    if known is not None:
        noted = left.read_bytes() if left.exists() else b""
        write_durably(left, noted + known.name.encode() + b"\n", mode=0o600)
        discard(known.folder)
        record.unlink(missing_ok=True)
    _cancel(left)


def _cancel(left: Path) -> None:
    """Cancel the jobs that a file names, and delete the file once none is left."""
    try:
        names = left.read_text(encoding="ascii").split()
    except FileNotFoundError:
        return
    while names:
        try:
            done = _run("scancel", "--me", f"--name={names[0]}")
        except StateError:
            break
        if done.returncode:
            break
        names.pop(0)
    if names:
        _log.warning("the trainer's job %s could not be cancelled; this is tried again", names[0])
        write_durably(left, "".join(f"{name}\n" for name in names).encode(), mode=0o600)
    else:
        left.unlink(missing_ok=True)


def _recorded(record: Path) -> SlurmJob | None:
    """Return the job that a record names; None if there is none. One that cannot be read is forgotten."""
    try:
        found = json.loads(record.read_bytes())
        key = bytes.fromhex(found["key"])
        return SlurmJob(str(found["name"]), Path(found["folder"]), key, str(found["opening"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        _log.warning("the record of the trainer's job cannot be read; its job, if there is one, ends by itself")
        return None


def options(section: SlurmSection, name: str, folder: Path) -> list[str]:
    """Return the options of `sbatch`: privet's, and the site's after them."""
    own = [
        "--parsable",
        "--no-requeue",
        f"--job-name={name}",
        f"--chdir={folder}",
        # What it prints could hold records.
        "--output=/dev/null",
        "--error=/dev/null",
        # Neither the site's environment nor a login's: both could hold secrets.
        "--export=NIL",
    ]
    asked = {"partition": section.partition, "gres": section.gres, "time": section.time}
    return [*own, *(f"--{key}={value}" for key, value in asked.items() if value is not None), *section.extra]


def script(job: SlurmJob, idle: int) -> str:
    """Return the job's script. Its one command comes first, so no name can be read as an option of `sbatch`.

    Raises:
        StateError: The directory's path holds a control character.
    """
    command = [sys.executable, "-I", "-m", MODULE, str(job.folder), str(idle), name_of(job.key)]
    if any(not character.isprintable() for word in command for character in word):
        raise StateError(
            "the path of the trainer's job, or of Python, holds a character that cannot be printed",
            "choose another `directory` under [resources.slurm] in the site file",
        )
    return f"#!/bin/sh\nexec {shlex.join(command)}\n"


def missing() -> Sequence[str]:
    """Return the programs of Slurm that are not installed here."""
    return [name for name in COMMANDS if shutil.which(name) is None]


def controller() -> str:
    """Return why the controller cannot be asked; empty if it answers. Raises `StateError` where Slurm is missing."""
    done = _run("squeue", "--noheader", "--me")
    return " ".join(done.stderr.split())[:200] or "the controller does not answer" if done.returncode else ""


def _run(program: str, *arguments: str, script: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of Slurm.

    Raises:
        StateError: It is not installed, or does not end.
    """
    path = shutil.which(program)
    if path is None:
        raise StateError(
            f"the program {program} of Slurm is not installed here",
            "run the site on a machine from which jobs are submitted, and see `privet site doctor SITE`",
        )
    try:
        return subprocess.run(
            [path, *arguments],
            input=script,
            env={name: value for name, value in os.environ.items() if not name.startswith(_OPTIONS)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise StateError(
            f"{program} did not end within {_SECONDS} s", "see whether Slurm's controller answers: `scontrol ping`"
        ) from None
