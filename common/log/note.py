"""Signed notes (C2SP signed-note) and witness cosignatures (C2SP tlog-cosignature), with Ed25519 and ML-DSA-65.

A note is a text, an empty line and signature lines::

    — <key name> base64(key id (4 bytes) || signature)

A *hybrid* key is an Ed25519 key and an ML-DSA-65 key of one owner, as one vkey. It signs two lines: the one that every
C2SP tool verifies, and one of a signature type of our own, since C2SP assigns none to ML-DSA-65. The key has signed
only if both lines are there and match (docs/decisions/0014-hybrid-signatures.md).

Parsing accepts exactly the bytes that `Note.encode` writes. Signatures of keys that the reader does not know are
ignored. A signature of a known key must match, or the whole note is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from privet.common.errors import ProtocolError, VerificationError
from privet.common.log import mldsa
from privet.common.log.mldsa import Use

MAX_NOTE_BYTES = 1_000_000
MAX_SIGNERS = 100
"""Both limits are those of Go's golang.org/x/mod/sumdb/note, so that it opens every note that privet writes with
Ed25519 keys. It reads 100 lines, and a hybrid key has two: so it opens those of up to 50 hybrid keys."""
MAX_SIGNATURES = 2 * MAX_SIGNERS
"""Most lines of a note."""

ED25519 = 0x01
COSIGNATURE = 0x04
"""Signature types of C2SP signed-note: a log signs the text, a witness signs time and text."""

KEY_BYTES = 32
VKEY_CHARACTERS = 4000
"""Enough for the vkey of any key that privet makes."""
# Signature types without an assigned byte are 0xff and a name (C2SP signed-note). Both keys follow the name.
_HYBRID = {
    ED25519: b"\xffprivet ed25519+ml-dsa-65 log\n",
    COSIGNATURE: b"\xffprivet ed25519+ml-dsa-65 cosignature\n",
}
_USES = {ED25519: Use.CHECKPOINT, COSIGNATURE: Use.COSIGNATURE}
# y of the points of order 4, 1, 8, 8, 2 and, not reduced, of order 4 and 1.
_WEAK = frozenset(
    bytes.fromhex(point)
    for point in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
_DAMAGED = "get the file or message again: it is damaged or of another kind"
_DASH = "— "
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]")
_VKEY = re.compile(r"([^+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]+={0,2})")


def encode_base64(data: bytes) -> str:
    """Return standard base64 with padding (RFC 4648, section 4)."""
    return base64.b64encode(data).decode("ascii")


def decode_base64(text: str | bytes, what: str) -> bytes:
    """Decode standard base64, refusing every form but the canonical one.

    Raises:
        ProtocolError: Other characters, missing padding, or unused bits that are not 0.
    """
    try:
        raw = text.encode("ascii") if isinstance(text, str) else text
        data = base64.b64decode(raw, validate=True)
    except (binascii.Error, UnicodeEncodeError):
        raise ProtocolError(f"{what}: expected base64, found other characters", _DAMAGED) from None
    if base64.b64encode(data) != raw:
        raise ProtocolError(f"{what}: expected canonical base64 (no unused bits set), found another form", _DAMAGED)
    return data


@dataclass(frozen=True)
class NoteKey:
    """A public key for checking notes.

    Attributes:
        name: Name of the signer, such as ``example.org/consortium``, without spaces and plus signs.
        kind: `ED25519` for a log, `COSIGNATURE` for a witness.
        public: Ed25519 public key, 32 bytes.
        pq: ML-DSA-65 public key of a hybrid key, 1,952 bytes; empty for Ed25519 alone.
    """

    name: str
    kind: int
    public: bytes
    pq: bytes = b""

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.kind not in (ED25519, COSIGNATURE) or len(self.public) != KEY_BYTES:
            raise ProtocolError(
                f"public key of {self.name}: expected type 1 (log) or 4 (witness) and {KEY_BYTES} bytes, got type "
                f"{self.kind} "
                f"and {len(self.public)} bytes",
                "copy the whole key again",
            )
        if len(self.pq) not in (0, mldsa.PUBLIC_BYTES):
            raise ProtocolError(
                f"public key of {self.name}: expected {mldsa.PUBLIC_BYTES} bytes of ML-DSA-65, got {len(self.pq)}",
                "copy the whole key again",
            )
        # An id has 32 bits: who tries some 2^32 keys has one whose two lines are the same, so that one would do.
        if len(set(self.ids)) < len(self.ids):
            raise ProtocolError(f"public key of {self.name}: its two signatures have one id", "make another key")

    @property
    def id(self) -> bytes:
        """Four bytes that, with the name, identify the key of an Ed25519 signature."""
        return self._id(self._classical)

    @property
    def ids(self) -> tuple[bytes, ...]:
        """The ids of the lines that this key signs: Ed25519's, then ML-DSA-65's where it is hybrid."""
        return (self.id, self._id(self._material)) if self.pq else (self.id,)

    @property
    def publics(self) -> tuple[bytes, ...]:
        """The public keys: Ed25519, then ML-DSA-65 where it is hybrid."""
        return (self.public, self.pq) if self.pq else (self.public,)

    @property
    def text(self) -> str:
        """The key as a line of text (a vkey): ``name+id+base64(type || key)``. That of a hybrid key has both keys."""
        return f"{self.name}+{self.ids[-1].hex()}+{encode_base64(self._material)}"

    @property
    def shown(self) -> str:
        """The key for a person to read: a vkey, or of a hybrid one, which has 2,700 characters, its digest."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return f"{self.name}+{self.ids[-1].hex()} (Ed25519 and ML-DSA-65, SHA-256 {digest})" if self.pq else self.text

    @property
    def _classical(self) -> bytes:
        return bytes([self.kind]) + self.public

    @property
    def _material(self) -> bytes:
        return _HYBRID[self.kind] + self.public + self.pq if self.pq else self._classical

    def _id(self, material: bytes) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + material).digest()[:4]

    @classmethod
    def parse(cls, text: str) -> NoteKey:
        """Read a vkey.

        Raises:
            ProtocolError: It is not a vkey, or its id is not that of the key.
        """
        match = _VKEY.fullmatch(text)
        if not match:
            raise ProtocolError(
                "a public key of a log or witness (vkey) must have the form name+id+base64, with 8 lower-case "
                "hexadecimal digits as id",
                "copy the whole key, as one line",
            )
        name, key_id, encoded = match.groups()
        material = decode_base64(encoded, f"public key (vkey) of {name}")
        key = cls(name, *_taken_apart(material))
        if key.ids[-1].hex() != key_id:
            raise ProtocolError(
                f"public key (vkey) of {name}: its id must be {key.ids[-1].hex()}, got {key_id}",
                "copy the key again: a character is wrong",
            )
        return key


@dataclass(frozen=True)
class Signature:
    """A signature line.

    Attributes:
        name: The key's name.
        key_id: The key's id, 4 bytes.
        data: The signature, 64 bytes, or 3,309 of ML-DSA-65; in a cosignature with 8 bytes of time before it.
    """

    name: str
    key_id: bytes
    data: bytes

    @property
    def line(self) -> str:
        """The line without its newline."""
        return f"{_DASH}{self.name} {encode_base64(self.key_id + self.data)}"

    @property
    def time(self) -> int:
        """Unix time of a cosignature in seconds."""
        return int.from_bytes(self.data[:8], "big")

    @classmethod
    def parse(cls, line: str) -> Signature:
        """Read a line without its newline.

        Raises:
            ProtocolError: It is not a signature line.
        """
        name, space, encoded = line.removeprefix(_DASH).partition(" ")
        if not (line.startswith(_DASH) and space):
            raise ProtocolError(
                "checkpoint: a signature line must be an em dash, a name and base64, separated by spaces", _DAMAGED
            )
        _check_name(name)
        data = decode_base64(encoded, f"checkpoint: signature by {name}")
        if len(data) < 5:
            raise ProtocolError(
                f"checkpoint: signature by {name}: expected a key id (4 bytes) and a signature, got {len(data)} bytes",
                _DAMAGED,
            )
        return cls(name, data[:4], data[4:])


@dataclass(frozen=True)
class Note:
    """A text and its signatures, not yet verified.

    Attributes:
        text: The text that is signed. It ends with a newline.
        signatures: At most 200, and one with each key id.
    """

    text: str
    signatures: tuple[Signature, ...]

    def encode(self) -> bytes:
        """Return the note's bytes."""
        return "".join([self.text, "\n", *(f"{signature.line}\n" for signature in self.signatures)]).encode()


def parse_note(data: bytes) -> Note:
    """Take a note apart without verifying it.

    Raises:
        ProtocolError: It is not a note: wrong encoding, control characters, a malformed or repeated line, or too long.
    """
    if len(data) > MAX_NOTE_BYTES:
        raise ProtocolError(f"checkpoint: expected at most {MAX_NOTE_BYTES} bytes, got {len(data)}", _DAMAGED)
    try:
        whole = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("checkpoint: expected text in UTF-8, found other bytes", _DAMAGED) from None
    text, blank, lines = whole.rpartition("\n\n")
    if not (blank and lines.endswith("\n")):
        raise ProtocolError(
            "checkpoint: expected a text, an empty line and signature lines, each ended by a newline", _DAMAGED
        )
    _check_text(text + "\n")
    found = lines.split("\n")[:-1]
    if len(found) > MAX_SIGNATURES:
        raise ProtocolError(f"checkpoint: expected at most {MAX_SIGNATURES} signatures, got {len(found)}", _DAMAGED)
    signatures = tuple(Signature.parse(line) for line in found)
    if len({(signature.name, signature.key_id) for signature in signatures}) != len(signatures):
        raise ProtocolError("checkpoint: expected at most one signature by each key, found two", _DAMAGED)
    return Note(text + "\n", signatures)


def sign_note(text: str, name: str, key: Ed25519PrivateKey) -> Signature:
    """Sign a text as a log does (C2SP signed-note, Ed25519 signatures).

    Raises:
        ProtocolError: A note cannot hold the text or the name.
    """
    _check_text(text)
    public = public_of(name, ED25519, key)
    return Signature(name, public.id, key.sign(_message(public, text, 0)))


def cosign(text: str, name: str, key: Ed25519PrivateKey, time: int) -> Signature:
    """Sign a text as a witness does at `time`, in Unix seconds (C2SP tlog-cosignature, Ed25519).

    Raises:
        ProtocolError: A note cannot hold the text, the name or the time.
    """
    _check_text(text)
    if not 0 <= time < 2**63:
        raise ProtocolError(
            f"the time of a cosignature must be 0 to 2^63 - 1 seconds since 1970, got {time}",
            "correct this machine's clock",
        )
    public = public_of(name, COSIGNATURE, key)
    return Signature(name, public.id, time.to_bytes(8, "big") + key.sign(_message(public, text, time)))


def log_lines(
    text: str, name: str, key: Ed25519PrivateKey, pq: MLDSA65PrivateKey | None = None
) -> tuple[Signature, ...]:
    """Return the lines of a log: that of `sign_note`, and with `pq` one of ML-DSA-65. Raises as `sign_note`."""
    first = sign_note(text, name, key)
    return (first,) if pq is None else (first, _second(public_of(name, ED25519, key, pq), pq, text, b""))


def witness_lines(
    text: str, name: str, key: Ed25519PrivateKey, time: int, pq: MLDSA65PrivateKey | None = None
) -> tuple[Signature, ...]:
    """Return the lines of a witness: that of `cosign`, and with `pq` one of ML-DSA-65. Raises as `cosign`."""
    first = cosign(text, name, key, time)
    return (first,) if pq is None else (first, _second(public_of(name, COSIGNATURE, key, pq), pq, text, first.data[:8]))


def public_of(name: str, kind: int, key: Ed25519PrivateKey, pq: MLDSA65PrivateKey | None = None) -> NoteKey:
    """Return the public key of a log or witness that holds these private keys. Raises as `NoteKey`."""
    return NoteKey(name, kind, key.public_key().public_bytes_raw(), b"" if pq is None else mldsa.public_of(pq))


def verify_note(note: Note, keys: Iterable[NoteKey]) -> tuple[NoteKey, ...]:
    """Return those of the keys that signed, in the order of their lines. A hybrid key has signed if both lines match.

    Raises:
        VerificationError: A signature of one of the keys does not match. (C2SP signed-note: reject the whole note.)
    """
    known = {(key.name, key_id): key for key in keys for key_id in key.ids}
    found: dict[NoteKey, dict[bytes, Signature]] = {}
    for signature in note.signatures:
        key = known.get((signature.name, signature.key_id))
        if key is not None:
            _check_signature(key, note.text, signature)
            found.setdefault(key, {})[signature.key_id] = signature
    for key, lines in found.items():
        # Both are of one act. Otherwise the older half of one cosignature could be paired with the newer of another.
        if key.kind == COSIGNATURE and len({line.time for line in lines.values()}) > 1:
            raise VerificationError(f"checkpoint: the two cosignatures by {key.name} are of different times", _DAMAGED)
    return tuple(key for key, lines in found.items() if lines.keys() == set(key.ids))


def encode_lines(signatures: Iterable[Signature]) -> str:
    """Return the lines of one signer, with a newline between them."""
    return "\n".join(signature.line for signature in signatures)


def parse_lines(text: str) -> tuple[Signature, ...]:
    """Read the lines of one signer: one, or two of a hybrid key.

    Raises:
        ProtocolError: They are not signature lines, or not of one name.
    """
    lines = text.split("\n")
    found = tuple(Signature.parse(line) for line in lines[:2])
    if len(lines) > 2 or len({line.name for line in found}) != 1 or len({line.key_id for line in found}) != len(lines):
        raise ProtocolError("checkpoint: expected one or two signature lines of one signer, found others", _DAMAGED)
    return found


def is_weak(public: bytes) -> bool:
    """Whether an Ed25519 public key is a point of small order, as libsodium lists them; either sign.

    Under such a key, one signature is valid for many messages, and its owner could deny them all.
    """
    return len(public) == 32 and bytes((*public[:31], public[31] & 0x7F)) in _WEAK


@lru_cache(maxsize=4096)  # of signatures that match; an error is never cached
def _check_signature(key: NoteKey, text: str, signature: Signature) -> None:
    hybrid = signature.key_id != key.id
    before = 0 if key.kind == ED25519 else 8
    length = before + (mldsa.SIGNATURE_BYTES if hybrid else 64)
    if len(signature.data) != length:
        raise VerificationError(
            f"checkpoint: the signature by {key.name} must have {length} bytes, got {len(signature.data)}", _DAMAGED
        )
    if key.kind == COSIGNATURE and signature.time >= 2**63:
        raise VerificationError(
            f"checkpoint: the time of the cosignature by {key.name} is above 2^63 - 1 seconds since 1970", _DAMAGED
        )
    if is_weak(key.public):
        raise VerificationError(f"checkpoint: the key of {key.name} is a weak one: it signs everything", _DAMAGED)
    message, data = _message(key, text, signature.time), signature.data[before:]
    if not (_verifies_hybrid(key, data, message) if hybrid else _verifies(key.public, data, message)):
        raise VerificationError(
            f"checkpoint: the {'ML-DSA-65 ' if hybrid else ''}signature by {key.name} does not match the text",
            "do not trust the checkpoint: its text or the signature was changed",
        )


def _second(public: NoteKey, pq: MLDSA65PrivateKey, text: str, time: bytes) -> Signature:
    message = _named(public, _message(public, text, int.from_bytes(time, "big")))
    return Signature(public.name, public.ids[1], time + mldsa.sign(pq, message, _USES[public.kind]))


def _verifies(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _verifies_hybrid(key: NoteKey, signature: bytes, message: bytes) -> bool:
    return mldsa.verifies(key.pq, signature, _named(key, message), _USES[key.kind])


def _named(key: NoteKey, message: bytes) -> bytes:
    """Return the message of an ML-DSA-65 line, which names its signer; the Ed25519 formats of C2SP do not."""
    return key.name.encode() + b"\n" + message


def _message(key: NoteKey, text: str, time: int) -> bytes:
    """Return the message of a signature. The first line of a cosignature separates it from other uses of the key."""
    return text.encode() if key.kind == ED25519 else f"cosignature/v1\ntime {time}\n{text}".encode()


def _taken_apart(material: bytes) -> tuple[int, bytes, bytes]:
    """Return kind, Ed25519 key and ML-DSA-65 key of a vkey; what is no key is refused by `NoteKey`."""
    for kind, label in _HYBRID.items():
        if material.startswith(label) and len(material) == len(label) + KEY_BYTES + mldsa.PUBLIC_BYTES:
            keys = material.removeprefix(label)
            return kind, keys[:KEY_BYTES], keys[KEY_BYTES:]
    return (material[0] if material else 0), material[1:], b""


def _check_text(text: str) -> None:
    if not text.endswith("\n") or _CONTROL.search(text):
        raise ProtocolError(
            "checkpoint: the text must end with a newline and hold no other control characters than newlines", _DAMAGED
        )


def _check_name(name: str) -> None:
    if not name or "+" in name or any(c.isspace() for c in name) or _CONTROL.search(name) or not name.isprintable():
        raise ProtocolError(
            "the name of a key must have at least one character and no spaces, plus signs or control characters, "
            f"got {name[:80]!r}",
            "correct the name",
        )
