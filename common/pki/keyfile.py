"""Private keys in files: PEM, PKCS 8, readable only by their owner. Most are Ed25519."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from privet.common.errors import StateError
from privet.common.files import write_new

Key = Ed25519PrivateKey | MLDSA65PrivateKey | ec.EllipticCurvePrivateKey
K = TypeVar("K", Ed25519PrivateKey, MLDSA65PrivateKey, ec.EllipticCurvePrivateKey)
_SALTED = re.compile(rb"scrypt-65536-8-1 ([0-9a-f]{32})\n")

MLDSA_KEY = "mldsa65.pem"
"""Name of the file of a party's ML-DSA-65 key, beside its Ed25519 keys."""
_NEW = "make one with `privet site identity FILE`"
KEPT = "restore the file from a backup"
"""What to do where a key or certificate is missing that cannot be made again."""


def read_key(path: Path, what: str, hint: str = _NEW) -> Ed25519PrivateKey:
    """Read an Ed25519 private key.

    Args:
        path: The file.
        what: Name of the key in errors.
        hint: What to do where there is no such key.

    Raises:
        StateError: The file is missing, is not such a key, or may be read by other users of this machine.
    """
    key = _read(path, what, hint)
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(f"{what}: {path} is not an Ed25519 key", hint)
    return key


def read_mldsa_key(path: Path, what: str, hint: str = KEPT) -> MLDSA65PrivateKey:
    """Read an ML-DSA-65 private key. Raises as `read_key`."""
    key = _read(path, what, hint)
    if not isinstance(key, MLDSA65PrivateKey):
        raise StateError(f"{what}: {path} is not an ML-DSA-65 key", hint)
    return key


def read_release_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the P-256 key that signs releases. Raises as `read_key`."""
    key = _read(path, "release key", KEPT)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(f"release key: {path} is not an elliptic-curve key", KEPT)
    return key


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the P-384 key (OpenSSH) that authenticates a site's node to the coordinator. Raises as `read_key`."""
    hint = f"{KEPT}; or join the consortium again with `privet site join TOKEN DIRECTORY`, which makes a new key"
    key = _read(path, "node key", hint, load_ssh_private_key)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise StateError(f"node key: {path} is not a P-384 key", hint)
    return key


def _read(path: Path, what: str, hint: str, load: Callable[[bytes, None], object] = load_pem_private_key) -> object:
    try:
        if path.stat().st_mode & 0o077:
            what = f"{path}: other users of this machine can read this private key"
            raise StateError(what, f"run `chmod 600 {path}`")
        return load(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StateError(f"{what}: {path} cannot be read as a private key ({type(error).__name__})", hint) from None


def read_locked_key(path: Path, passphrase: bytes, what: str) -> Ed25519PrivateKey:
    """Read an Ed25519 private key that `write_locked_key` wrote.

    Raises:
        StateError: As `read_key`; or the passphrase does not open it, or it is not encrypted.
    """

    def load(data: bytes, none: None) -> object:
        salted = _SALTED.match(data)
        if salted is None or b"ENCRYPTED" not in data:
            raise StateError(f"{what}: {path} is not encrypted, as a person's key must be", KEPT)
        try:
            return load_pem_private_key(
                data[salted.end() :], _stretched(passphrase, bytes.fromhex(salted[1].decode("ascii")))
            )
        except (ValueError, TypeError):
            raise StateError(f"the passphrase does not open {what}, or its file is damaged", "try again") from None

    key = _read(path, what, KEPT, load)
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(f"{what}: {path} is not an Ed25519 key", KEPT)
    return key


def write_locked_key(path: Path, key: Ed25519PrivateKey, passphrase: bytes) -> None:
    """Write an Ed25519 private key encrypted under a passphrase: PEM, after a line with a salt. Raises as `write_key`.

    Processes of the site can read the file, and guess. PKCS 8 as the library writes it lets them try a passphrase in
    half a millisecond (PBKDF2 with 2,048 rounds). scrypt (RFC 7914) takes some tenths of a second and 64 MiB.
    """
    salt = os.urandom(16)
    hidden = BestAvailableEncryption(_stretched(passphrase, salt))
    write_new(path, b"scrypt-65536-8-1 %b\n" % salt.hex().encode() + _pem(key, hidden))


def _stretched(passphrase: bytes, salt: bytes) -> bytes:
    found = hashlib.scrypt(passphrase, salt=salt, n=65_536, r=8, p=1, maxmem=2**27, dklen=32)
    return found.hex().encode()


def make_key(path: Path) -> Ed25519PrivateKey:
    """Make an Ed25519 private key and write it. Raises as `write_key`."""
    return write_key(path, Ed25519PrivateKey.generate())


def write_key(path: Path, key: K, passphrase: bytes | None = None) -> K:
    """Write a private key to a file that only its owner can read, and return the key. Encrypt it under a passphrase.

    Raises:
        StateError: `path` exists already, or cannot be written.
    """
    hidden = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    write_new(path, _pem(key, hidden))
    return key


def _pem(key: Key, hidden: KeySerializationEncryption) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


def public_key(key: Ed25519PrivateKey) -> str:
    """Return the public key in hexadecimal, the form that [peers] of a site file holds."""
    return key.public_key().public_bytes_raw().hex()
