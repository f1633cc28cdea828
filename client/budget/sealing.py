"""Stored updates are encrypted (budget): a thief of a ledger's file, or of its backup, reads none of them.

The ledger keeps the exact bytes of an update, before masking, until it has arrived. Each is sealed with AES-256-GCM
under a key that lies in a file of its own. The associated data are the charge that the update belongs to (dataset,
study, round, row of the ledger), so no update can take the place of another. The nonce is 96 random bits: after 2^32
updates under one key, two are alike with probability 2^-33 (NIST SP 800-38D, section 8.3).

The charge itself stays for ever, and holds a *mark* of the update. An open digest would confirm a guess of an update
without noise, so the mark is an HMAC-SHA256. Both keys are derived from the one in the file (HKDF, RFC 5869).

The key is not derived from the site's identity key, for two reasons. It needs no backup: its loss costs no more than
the rounds whose updates are on their way. And whoever destroys it makes the updates unreadable in every old backup.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privet.common.canonical import canonical_json, digest
from privet.common.errors import StateError
from privet.common.files import write_new

KEY_BYTES, NONCE_BYTES = 32, 12
_MARK = "hmac-sha256"
_LOST = (
    "restore the file from a backup. If it is lost, run `privet site init SITE --ledger-key` to make another: the site "
    "then sits out the rounds whose updates have not arrived"
)


class Sealer:
    """Seals a ledger's updates. It reads its key when it first needs it.

    Args:
        file: File of the key, 32 bytes in hexadecimal, readable by its owner alone. None: a key in memory.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._keys: tuple[str, bytes, bytes] | None = None

    def make(self) -> None:
        """Make the key's file.

        Raises:
            StateError: It exists already, or cannot be written.
        """
        if self.file is not None and self.file.exists():
            raise StateError(
                f"the ledger's key {self.file} exists",
                "if it is not this ledger's, restore the right one, or move it away first",
            )
        if self.file is not None:
            write_new(self.file, os.urandom(KEY_BYTES).hex().encode() + b"\n")

    def ready(self) -> None:
        """Read the key.

        Raises:
            StateError: It is missing or malformed, or other users may read it.
        """
        self._loaded()

    @property
    def missing(self) -> bool:
        """Whether there is no file of the key."""
        return self.file is not None and not self.file.exists()

    def mark(self, payload: bytes) -> str:
        """Return the mark of an update: which key, and its HMAC under that key. Raises as `ready`."""
        name, _, key = self._loaded()
        return f"{_MARK}:{name}:{hmac.digest(key, payload, 'sha256').hex()}"

    def opens(self, mark: str) -> bool:
        """Return whether an update with this mark can be read with the present key. Raises as `ready`."""
        return not is_sealed(mark) or mark.startswith(f"{_MARK}:{self._loaded()[0]}:")

    def is_marked(self, mark: str, payload: bytes) -> bool:
        """Return whether a mark is the update's. Raises as `ready`."""
        found = self.mark(payload) if is_sealed(mark) else digest(payload)
        return hmac.compare_digest(mark, found)

    def seal(self, payload: bytes, charge: Mapping[str, Any]) -> bytes:
        """Return an update encrypted: a random nonce, ciphertext and tag.

        Args:
            payload: The update.
            charge: The values that the update belongs to. Opening it needs the same.

        Raises:
            As `ready`. OverflowError: The update has 2 GiB or more.
        """
        nonce = os.urandom(NONCE_BYTES)
        return nonce + AESGCM(self._loaded()[1]).encrypt(nonce, payload, canonical_json(charge))

    def open(self, sealed: bytes, charge: Mapping[str, Any]) -> bytes | None:
        """Return a sealed update; None if it is not one of this key and charge. Raises as `ready`."""
        try:
            nonce, text = sealed[:NONCE_BYTES], sealed[NONCE_BYTES:]
            return AESGCM(self._loaded()[1]).decrypt(nonce, text, canonical_json(charge))
        except (InvalidTag, ValueError):  # ValueError: cut short
            return None

    def _loaded(self) -> tuple[str, bytes, bytes]:
        if self._keys is None:
            self._keys = _derived(
                os.urandom(KEY_BYTES) if self.file is None else read_secret(self.file, "the ledger's key", _LOST)
            )
        return self._keys


def is_sealed(mark: str) -> bool:
    """Return whether a charge's mark is of a sealed update. Earlier versions stored updates open, with a digest."""
    return mark.startswith(_MARK + ":")


def key_beside(ledger: Path) -> Path:
    """Return where a ledger's key lies if nobody chose a place."""
    return ledger.with_suffix(".key")


def _derived(key: bytes) -> tuple[str, bytes, bytes]:
    """Return the key's name (8 bytes in hexadecimal), the key that encrypts and the key that marks, 32 bytes each."""
    name, sealing, marking = (
        HKDF(SHA256(), KEY_BYTES, None, b"privet ledger 1: " + label).derive(key)
        for label in (b"name of the key", b"AES-256-GCM of updates", b"HMAC of updates")
    )
    return name[:8].hex(), sealing, marking


def read_secret(file: Path, what: str, hint: str) -> bytes:
    """Return a secret of 32 bytes out of its file, which has it in hexadecimal.

    Args:
        file: The file.
        what: What it is, for errors.
        hint: What to do where it cannot be read.

    Raises:
        StateError: Others can read the file, or it is missing or malformed.
    """
    try:
        if file.stat().st_mode & 0o077:
            raise StateError(f"other users of this machine can read {what} {file}", f"run `chmod 600 {file}`")
        key = bytes.fromhex(file.read_text("ascii").strip())
    except (OSError, ValueError) as error:
        raise StateError(f"{what} {file} is missing or malformed ({type(error).__name__})", hint) from None
    if len(key) != KEY_BYTES:
        raise StateError(f"{what} {file} is malformed: expected {KEY_BYTES} bytes, found {len(key)}", hint)
    return key
