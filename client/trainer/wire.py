"""Messages between the site's process and its trainer: a head of JSON with named arrays, and how they are sealed.

No pickle. The arrays are safetensors. This module is loaded before the trainer has confined itself, so it loads no
library that starts threads until there are arrays.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from privet.common.canonical import canonical_json
from privet.common.errors import StateError, VerificationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = version("privet")
"""That of the code which this process loaded, also after another was installed."""
KEY_BYTES, PUBLIC_BYTES, TAG_BYTES = 32, 32, 16
SPARE = 2**20
"""Bytes of a message beside its arrays, at most."""
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Packet:
    """One request or answer.

    Attributes:
        kind: What is asked, or `done` or `error`.
        head: JSON values.
        arrays: By name.
    """

    kind: str
    head: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def pack(packet: Packet) -> bytes:
    """Return a packet as bytes."""
    head = canonical_json({"kind": packet.kind, "head": dict(packet.head)})
    body = b""
    if packet.arrays:
        from safetensors.numpy import save

        body = save(dict(packet.arrays))
    return _LENGTH.pack(len(head)) + head + body


def unpack(data: bytes) -> Packet:
    """Read a packet.

    Raises:
        StateError: The bytes are none.
    """
    try:
        (length,) = _LENGTH.unpack_from(data)
        found = json.loads(data[_LENGTH.size : _LENGTH.size + length], parse_constant=_no_number)
        kind, head, rest = found["kind"], found["head"], data[_LENGTH.size + length :]
        if not isinstance(kind, str) or not isinstance(head, dict):
            raise TypeError
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise malformed("a message") from None
    if not rest:
        return Packet(kind, head)
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return Packet(kind, head, load(rest))
    except (SafetensorError, KeyError, ValueError):
        raise malformed("its arrays") from None


def _no_number(name: str) -> None:
    raise ValueError(name)


def malformed(what: str) -> StateError:
    """Return the error of a message that is none."""
    return StateError(
        f"the trainer and the site's process do not understand each other: {what} cannot be read",
        "run the same version of privet in both; if they are the same, report this as a bug",
    )


def ragged(name: str, rows: Sequence[Sequence[int]]) -> dict[str, NDArray[Any]]:
    """Return lists of numbers as two arrays: all of them, and where each list ends."""
    import numpy as np

    ends = np.cumsum([len(each) for each in rows], dtype=np.int64)
    flat = np.fromiter((row for each in rows for row in each), np.int64)
    return {name: flat, f"{name}-ends": ends}


def lists(packet: Packet, name: str) -> list[list[int]]:
    """Return what `ragged` wrote.

    Raises:
        StateError: The packet holds no such lists.
    """
    import numpy as np

    flat, ends = packet.arrays.get(name), packet.arrays.get(f"{name}-ends")
    if flat is None or ends is None or flat.dtype != np.int64 or ends.dtype != np.int64 or flat.ndim + ends.ndim != 2:
        raise malformed(f"the lists {name}")
    edges = [0, *ends.tolist()]
    if edges[-1] != len(flat) or any(first > last for first, last in pairwise(edges)):
        raise malformed(f"the lists {name}")
    rows = flat.tolist()
    return [rows[first:last] for first, last in pairwise(edges)]


def agreed(own: X25519PrivateKey, public: bytes) -> bytes:
    """Return the secret that both ends of a session have in common.

    Raises:
        VerificationError: The other end's key is none.
    """
    try:
        return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise _foreign() from None


def _foreign() -> VerificationError:
    error = VerificationError(
        "a message of the trainer's job: expected one of this session, with this number, found another",
        "let nobody else write into the job's directory, `directory` under [resources.slurm] in the site file",
    )
    error.private = True
    return error


ASK, ANSWER = b"\x01", b"\x02"
"""The two directions of a message."""


class Seal:
    """Seals messages of one session with AES-256-GCM (NIST SP 800-38D).

    Both ends derive the session's key from the job's key, the public key by which the site's process opened the
    session, and what both agreed on by X25519 (RFC 7748), but for the first request and its answer, which bring the
    keys for that (HKDF, RFC 5869). Direction and number of a message are its nonce: each pair occurs once, as each end
    counts and never repeats a number. So an answer of another job, of another session, to another request, or a changed
    one does not open. And whoever copies the directory twice, once with the job's key in it, reads no sum.

    Args:
        key: Of the job, 32 random bytes.
        public: Of the session, 32 bytes.
        secret: What both agreed on.
    """

    def __init__(self, key: bytes, public: bytes, secret: bytes = b"") -> None:
        derived = HKDF(SHA256(), 32, salt=public, info=b"privet trainer, version 2").derive(key + secret)
        self._cipher = AESGCM(derived)

    def close(self, direction: bytes, number: int, body: bytes) -> bytes:
        """Return a message sealed."""
        return self._cipher.encrypt(direction + number.to_bytes(11, "big"), body, None)

    def open(self, direction: bytes, number: int, sealed: bytes) -> bytes:
        """Return what was sealed.

        Raises:
            VerificationError: It is not what the other end of this session wrote as this message.
        """
        try:
            return self._cipher.decrypt(direction + number.to_bytes(11, "big"), sealed, None)
        except InvalidTag:
            raise _foreign() from None
