"""The coordinator's keys beside its round log: what each of them signs, and their files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from privet.common.errors import PrivetError, StateError
from privet.common.log.checkpoint import Policy
from privet.common.log.note import ED25519, NoteKey, public_of
from privet.common.pki.keyfile import KEPT, MLDSA_KEY, read_key, read_mldsa_key, read_release_key, write_key

if TYPE_CHECKING:
    from privet.common.log.replay import Replay  # it loads NumPy, which whoever opens a coordinator may not need

POLICY, LOG_KEY, COORDINATOR_KEY, RELEASE_KEY = "policy", "log.pem", "coordinator.pem", "release.pem"


@dataclass(frozen=True)
class Keys:
    """The coordinator's keys, each with one purpose.

    Attributes:
        origin: The log's name.
        log: Signs checkpoints.
        coordinator: Signs statements.
        release: P-256 key that signs released files.
        pq: Signs checkpoints and statements with ML-DSA-65, beside the first two; None in a consortium without it.
    """

    origin: str
    log: Ed25519PrivateKey
    coordinator: Ed25519PrivateKey
    release: ec.EllipticCurvePrivateKey
    pq: MLDSA65PrivateKey | None = None

    @property
    def public(self) -> NoteKey:
        """The key that verifies checkpoints."""
        return public_of(self.origin, ED25519, self.log, self.pq)

    def count_for(self, history: Replay) -> bool:
        """Return whether these are the present keys of a log; so it is before its first leaf."""
        if not history.epochs:
            return True
        present = history.epochs[-1]
        return (present.log, present.coordinator) == (self.public, self.coordinator.public_key().public_bytes_raw())


def read_keys(directory: Path) -> Keys:
    """Read the keys beside a log: its policy names the log, three files hold the private keys.

    Raises:
        StateError: A file is missing, is not a key, or is readable by other users.
    """
    try:
        origin = Policy.parse((directory / POLICY).read_text(encoding="utf-8")).log.name
    except (OSError, PrivetError) as error:
        raise StateError(
            f"{directory / POLICY} cannot be read as the policy of the round log ({type(error).__name__})",
            "restore it from a backup",
        ) from None
    return read_keys_of(directory, origin)


def read_keys_of(directory: Path, origin: str) -> Keys:
    """Read the keys of log, statements and releases in a directory. Raises as `read_keys`."""
    log, coordinator = (read_key(directory / name, "coordinator", KEPT) for name in (LOG_KEY, COORDINATOR_KEY))
    # A consortium that was created without ML-DSA-65 has none. Where the log names one, other keys do not count.
    pq = read_mldsa_key(directory / MLDSA_KEY, "coordinator") if (directory / MLDSA_KEY).exists() else None
    return Keys(origin, log, coordinator, read_release_key(directory / RELEASE_KEY), pq)


def write_keys(directory: Path, keys: Keys) -> None:
    """Write the private keys beside a log. Overwrites nothing.

    Raises:
        StateError: A file exists already, or cannot be written.
    """
    write_key(directory / LOG_KEY, keys.log)
    write_key(directory / COORDINATOR_KEY, keys.coordinator)
    write_key(directory / RELEASE_KEY, keys.release)
    if keys.pq is not None:
        write_key(directory / MLDSA_KEY, keys.pq)
