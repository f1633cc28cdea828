"""What a run directory tells without its adapter: its study, where it stands, whom it waits for, its rounds.

Whoever shows a run reads it by this module alone, which loads no library for arrays, and no file as a whole that grows
with sites and rounds. `server/rounds/state.py` describes the files, and writes them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from privet.common.errors import StateError, VerificationError
from privet.common.files import beside, inside, no_directory, why_not, write_durably, write_whole
from privet.common.study.study import Study, kept_study
from privet.server.rounds.sealed import BrokenSealError, standing_in
from privet.server.rounds.wait import Wait

STUDY, STATE, CONFIG = "study.json", "state.safetensors", "adapter_config.json"
_LOCK, _WAITING, _WITHDRAWN = ".lock", "waiting.json", "withdrawn.json"
STOP = "stop"
"""Name of the file that asks the process which plays a run to stop."""
RESTORE = "restore the newest backup of the run directory"


@dataclass(frozen=True)
class RunFolder:
    """An existing run directory."""

    path: Path
    study: Study
    peft_config: str = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run directory.

        Raises:
            StateError: It is not one.
        """
        if why := no_directory(path):
            raise StateError(
                f"{path} is not a run directory: {why}",
                f"name the directory that the run was written to{beside(path, STUDY)}; "
                "`privet simulate STUDY` trains a study and writes one",
            )
        try:
            study = kept_study(path / STUDY)
            config = (path / "adapter" / CONFIG).read_text(encoding="utf-8")
        except (OSError, ValueError, AttributeError) as error:
            parts = (STUDY, f"adapter/{CONFIG}")
            damaged = any((path / part).exists() for part in (*parts, STATE))
            name = f"name the directory that the run was written to{inside(path, STUDY) or beside(path, STUDY)}"
            raise StateError(
                f"{path} is not a run directory: {why_not(path, parts, error)}",
                f"{RESTORE}, if it is one; otherwise {name}" if damaged else name,
            ) from None
        return cls(path, study, config)

    @property
    def simulated(self) -> bool:
        """Whether sites are simulated, with noise from a public seed: `privet simulate` keeps its study file here."""
        return (self.path / "study.toml").is_file()

    @contextmanager
    def locked(self, busy: str = "wait until it ends, or stop it") -> Iterator[None]:
        """Lock the run for this process.

        Args:
            busy: What to do where another process has locked it.

        Raises:
            StateError: Another process has locked it.
        """
        with (self.path / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateError(f"another process is using the run directory {self.path}", busy) from None
            yield

    @property
    def withdrawn(self) -> str | None:
        """Why the coordinator withdrew the run; None if it did not."""
        found = self._withdrawal()
        return None if found is None else str(found.get("reason", ""))

    def _withdrawal(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.path / _WITHDRAWN).read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise StateError(f"{self.path / _WITHDRAWN} cannot be read ({type(error).__name__})", RESTORE) from None

    def withdraw(self, reason: str, *, begun: bool = False) -> None:
        """Mark the run as withdrawn; `begun`: after a round may have reached sites. Durable on return."""
        document = {"reason": reason, "time": int(time.time()), "begun": begun}
        write_durably(self.path / _WITHDRAWN, json.dumps(document).encode())

    @property
    def waiting(self) -> Wait | None:
        """What the process that plays the run waits for; None if no process of this machine plays it."""
        try:
            found = json.loads((self.path / _WAITING).read_bytes())
            os.kill(found.pop("process"), 0)
            return Wait(**{**found, "answered": tuple(found["answered"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    @property
    def interrupted(self) -> int:
        """Number of the round that was open when the process that played the run ended; 0 if none was."""
        try:
            found = json.loads((self.path / _WAITING).read_bytes())
            number = int(found["round"])
            return number if self.waiting is None and number == self.standing()[0] + 1 else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def note_wait(self, wait: Wait | None, interrupted: int = 0) -> None:
        """Note for readers what this process waits for; None at its end, with the round that it leaves open."""
        with suppress(OSError):  # a full disk must not end the run here, where nothing is lost by it
            if wait is None and interrupted:
                write_whole(self.path / _WAITING, json.dumps({"round": interrupted}).encode())
            elif wait is None:
                (self.path / _WAITING).unlink(missing_ok=True)
            else:
                document = {**asdict(wait), "process": os.getpid()}
                write_whole(self.path / _WAITING, json.dumps(document).encode())

    @property
    def stopping(self) -> bool:
        """Whether somebody has asked the process that plays the run to stop."""
        return (self.path / STOP).exists()

    def ask_to_stop(self) -> None:
        """Ask the process that plays the run to stop after the current round; between rounds, at once.

        Raises:
            StateError: The run has ended.
        """
        if self.standing()[1]:
            raise StateError(
                f"run {self.path.name} has ended, so there is nothing to stop",
                "`privet coordinator status` lists all runs",
            )
        (self.path / STOP).touch()

    # Where it stands, and its rounds

    def standing(self, *, sealed: bool = False) -> tuple[int, bool]:
        """Return the last closed round, and whether the run has ended, without the adapter.

        `sealed`: also check that the state, with its adapter, is what was written.

        Raises:
            StateError: The state cannot be read, or is damaged.
            VerificationError: It belongs to another study.
        """
        file = self.path / STATE
        try:
            found = standing_in(file, sealed=sealed)
        except BrokenSealError:
            raise StateError(f"{file} is damaged: its content does not match the digest in it", RESTORE) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"{file} cannot be read ({type(error).__name__})", RESTORE) from None
        if found.study != self.study.digest:
            raise VerificationError(
                f"{file}: the run directory has study {self.study.digest}, but this state is of study {found.study}"
            )
        return found.round, found.stopped

    def rounds(self) -> dict[int, object]:
        """Return the published rounds, newest first, each with a value that changes with its statement."""
        found = {}
        for file in self.path.glob("rounds/[0-9]*.json"):
            status = file.stat()
            found[int(file.stem)] = status.st_size, status.st_mtime_ns
        return dict(sorted(found.items(), reverse=True))

    def statement(self, number: int) -> dict[str, Any]:
        """Return the statement about a published round. With 1,000 sites it takes 50 kB.

        Raises:
            StateError: It cannot be read.
        """
        file = self.path / "rounds" / f"{number:04d}.json"
        try:
            return dict(json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise StateError(f"{file} cannot be read ({type(error).__name__})", RESTORE) from None


def run_paths(coordinator: Path) -> list[Path]:
    """Return the directories of all runs in a coordinator's directory."""
    return [path for path in sorted((coordinator / "runs").glob("*")) if (path / STUDY).is_file()]


def spent(statement: Mapping[str, Any]) -> float | None:
    """Return the largest epsilon that a site has spent after a round; None without privacy."""
    return max(((statement.get("privacy") or {}).get("epsilon") or {}).values(), default=None)
