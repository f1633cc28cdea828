"""The noise of a site's last steps in studies with correlated noise: what it takes back in the next ones.

One file holds the noise of one round, sealed under the ledger's key (`client/budget/sealing.py`) and bound to its study
and round. It is written before the round is charged, and renamed once the site's share has entered a sum. Files that no
later step takes back are deleted. With a release of this site in the clear, the noise would give its gradient sum.

Any state of these files keeps the promise of the study (`docs/correlated-noise.md`): noise that is missing, or that a
crash left behind, counts as not to be taken back. So nothing here is a transaction with the ledger, the directory needs
no backup, and it may be deleted at any time. What a step takes back follows from what the coordinator sees, and never
from the noise itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privet.client.budget.sealing import Sealer, key_beside
from privet.client.site import SiteConfig
from privet.common.errors import StateError
from privet.common.files import sync_directory, write_durably
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study

Integers = NDArray[np.int64]

_KEPT, _ADDED = ".kept", ".added"
_DIGEST_BYTES = 32


class NoiseMemory:
    """A site's noise of its last steps.

    Args:
        directory: Where it is kept, made when it is first needed; None: in the memory of this process.
        sealer: Seals it.
    """

    def __init__(self, directory: Path | None, sealer: Sealer) -> None:
        self._files: _Files = _InMemory() if directory is None else _OnDisk(directory)
        self._sealer = sealer

    def past(self, study: Study, opened: RoundOpen) -> dict[int, Integers]:
        """Return the noise that the step of a round takes back, int64 [d], by the number of steps since.

        It is that of each step whose sum held this site's share, except where the adapter has not changed since: then
        the sum was not used.

        Raises:
            StateError: The memory cannot be read.
        """
        band, found = study.privacy.band or 1, {}
        for lag in range(1, min(band, opened.round)):
            sealed = self._files.read(_name(study.digest, opened.round - lag) + _ADDED)
            noise = None if sealed is None else self._sealer.open(sealed, _context(study.digest, opened.round - lag))
            if noise is None:  # not there, sealed under another key, or cut short
                continue
            if noise[:_DIGEST_BYTES] == _adapter(opened):
                # For good: noise that one step leaves and the next one takes back could grow from step to step.
                self._files.delete(_name(study.digest, opened.round - lag) + _ADDED)
            else:
                found[lag] = np.frombuffer(noise[_DIGEST_BYTES:], "<i8").astype(np.int64)
        return found

    def keep(self, study: Study, opened: RoundOpen, noise: Integers) -> None:
        """Keep the noise of a round's step, before the round is charged, and delete what no later step takes back.

        Raises:
            StateError: The memory cannot be written.
        """
        band, last = study.privacy.band or 1, study.rounds
        for name in self._files.names(_prefix(study.digest)):
            number = int(name.removeprefix(_prefix(study.digest)).partition(".")[0])
            if number <= opened.round + 1 - band or number >= opened.round or opened.round == last:
                self._files.delete(name)
        if opened.round < last:
            text = _adapter(opened) + noise.astype("<i8").tobytes()
            sealed = self._sealer.seal(text, _context(study.digest, opened.round))
            self._files.write(_name(study.digest, opened.round) + _KEPT, sealed)

    def added(self, study: Study, round_number: int) -> None:
        """Note that the sum of a round held this site's share.

        Raises:
            StateError: The memory cannot be written.
        """
        name = _name(study.digest, round_number)
        self._files.rename(name + _KEPT, name + _ADDED)


def open_memory(site: SiteConfig) -> NoiseMemory:
    """Return a site's noise memory: a directory beside its ledger, for its dataset.

    Raises:
        StateError: The site file names no ledger or no dataset.
    """
    if site.ledger is None or site.dataset is None:
        raise StateError(
            f"the site file of {site.name} names no ledger or no dataset, so there is no place for the noise of a "
            "study with correlated noise",
            "`privet site setup SITE` puts the lines back",
        )
    directory = site.ledger.with_name(f"{site.ledger.stem}.{site.dataset}.noise")
    return NoiseMemory(directory, Sealer(site.ledger_key or key_beside(site.ledger)))


def _adapter(opened: RoundOpen) -> bytes:
    return bytes.fromhex(opened.adapter_digest.removeprefix("sha256:"))


def _prefix(study_digest: str) -> str:
    return study_digest.removeprefix("sha256:") + "-"


def _name(study_digest: str, round_number: int) -> str:
    return f"{_prefix(study_digest)}{round_number}"


def _context(study_digest: str, round_number: int) -> dict[str, str | int]:
    return {"kind": "noise", "study": study_digest, "round": round_number}


class _InMemory:
    """Files that end with the process."""

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._held if name.startswith(prefix)]

    def read(self, name: str) -> bytes | None:
        return self._held.get(name)

    def write(self, name: str, data: bytes) -> None:
        self._held[name] = data

    def delete(self, name: str) -> None:
        self._held.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        if old in self._held:
            self._held[new] = self._held.pop(old)


class _OnDisk:
    """Files of a directory that its owner alone can read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def names(self, prefix: str) -> list[str]:
        with _errors(self._directory):
            files = self._directory.glob(f"{prefix}*") if self._directory.is_dir() else ()
            return [file.name for file in files if file.suffix in (_KEPT, _ADDED)]

    def read(self, name: str) -> bytes | None:
        with _errors(self._directory):
            file = self._directory / name
            return file.read_bytes() if file.is_file() else None

    def write(self, name: str, data: bytes) -> None:
        with _errors(self._directory):
            self._directory.mkdir(mode=0o700, exist_ok=True)
            write_durably(self._directory / name, data, 0o600)

    def delete(self, name: str) -> None:
        with _errors(self._directory):
            (self._directory / name).unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> None:
        with _errors(self._directory):
            if (self._directory / old).is_file():
                (self._directory / old).replace(self._directory / new)
                sync_directory(self._directory)


_Files = _InMemory | _OnDisk


@contextmanager
def _errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"the noise memory {directory} cannot be read or written ({error.strerror})",
            "check disk space and the rights on the directory, then repeat; or delete the directory: the site then "
            "takes no earlier noise back, which is safe",
        ) from None
