"""Private keys in files: PEM, PKCS 8, readable by their owner alone. Ed25519, but for the one that signs releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from privet.common.errors import StateError
from privet.common.files import write_new

K = TypeVar("K", Ed25519PrivateKey, ec.EllipticCurvePrivateKey)


def read_key(path: Path, what: str) -> Ed25519PrivateKey:
    """Read an Ed25519 private key.

    Args:
        path: The file.
        what: What the key is, for errors.

    Raises:
        StateError: The file is missing or no such key, or others on this machine may read it.
    """
    key = _read(path, what)
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(f"{what}: {path} is not an Ed25519 key", "make one with `privet site identity FILE`")
    return key


def read_release_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the P-256 key that signs releases. Raises as `read_key`."""
    key = _read(path, "release")
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError(f"release: {path} is not an elliptic-curve key", "restore it from a backup")
    return key


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the P-384 key (OpenSSH) by which the coordinator knows a site's node. Raises as `read_key`."""
    key = _read(path, "node key", load_ssh_private_key)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise StateError(f"node key: {path} is not on P-384", "join the consortium again: that makes a new key")
    return key


def _read(path: Path, what: str, load: Callable[[bytes, None], object] = load_pem_private_key) -> object:
    try:
        if path.stat().st_mode & 0o077:
            raise StateError(f"{path}: others on this machine may read this private key", "chmod 600 it")
        return load(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        hint = "make one with `privet site identity FILE`"
        raise StateError(f"{what}: {path} is not a private key ({type(error).__name__})", hint) from None


def make_key(path: Path) -> Ed25519PrivateKey:
    """Make an Ed25519 private key and write it. Raises as `write_key`."""
    return write_key(path, Ed25519PrivateKey.generate())


def write_key(path: Path, key: K) -> K:
    """Write a private key where only its owner can read it, and return it.

    Raises:
        StateError: There is something at `path` already, or nothing can be written there.
    """
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_new(path, text)
    return key


def public_key(key: Ed25519PrivateKey) -> str:
    """Return the public key in hexadecimal, as `peers` holds it."""
    return key.public_key().public_bytes_raw().hex()
