"""Checkpoints: the log's signed tree heads, the policy that says who must cosign them, and proofs for leaves.

Formats: C2SP tlog-checkpoint, tlog-policy (one log, one group of witnesses) and tlog-proof. The log signs a
checkpoint under its origin, the log's name. A checkpoint is *accepted* once a quorum of witnesses has cosigned
it. `Quorum` says how many witnesses that takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from privet.common.errors import ProtocolError, TooFewSitesError, VerificationError
from privet.common.log.merkle import HASH_BYTES, HashProof, check_inclusion, leaf_hash
from privet.common.log.note import (
    COSIGNATURE,
    ED25519,
    MAX_SIGNERS,
    Note,
    NoteKey,
    decode_base64,
    encode_base64,
    parse_note,
    verify_note,
)

MAX_SIZE = 2**53
LogAt = Callable[[int], NoteKey]
"""Returns the log's key for checkpoints of a size (`privet.common.log.epochs`)."""
_NUMBER = re.compile(r"0|[1-9][0-9]{0,15}", re.ASCII)
_PROOF_HEADER = "c2sp.org/tlog-proof@v1"
_GROUP = "sites"
# Words after each keyword of a policy file: a key; name and key; name and number, then the members; a group's name.
_POLICY_WORDS = {"log": 1, "witness": 2, "group": 2, "quorum": 1}


_FETCH = "get the checkpoint again from the coordinator: it is damaged or not a checkpoint"
_POLICY = "get the policy file again, better from a site than from the coordinator, and compare its keys"
_PROOF_AGAIN = "get the leaf proof again: the file is damaged or not a leaf proof"


class OtherKeyError(VerificationError):
    """A log of the right name signed, but with another key: its keys were rotated, or it is another log."""


@dataclass(frozen=True)
class Checkpoint:
    """A tree head.

    Attributes:
        origin: The log's name.
        size: Leaves.
        root: Root of the tree, 32 bytes.
    """

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The text that is signed: three lines."""
        return f"{self.origin}\n{self.size}\n{encode_base64(self.root)}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read the text of a checkpoint.

        Extension lines, which C2SP allows but does not recommend, are refused: no monitor can check them.

        Raises:
            ProtocolError: It is not the text of a checkpoint.
        """
        lines = text.split("\n")
        if len(lines) != 4 or lines[3] or not lines[0]:
            raise ProtocolError(
                "checkpoint: its text must have three lines: the log's name, the number of leaves and the root hash",
                _FETCH,
            )
        root = decode_base64(lines[2], "checkpoint: root")
        if len(root) != HASH_BYTES:
            raise ProtocolError(f"checkpoint: expected a root hash of {HASH_BYTES} bytes, got {len(root)}", _FETCH)
        return cls(lines[0], _number(lines[1], "checkpoint: size"), root)


@dataclass(frozen=True)
class Quorum:
    """The number of n witnesses that must cosign if f of them may collude with the log.

    If two branches of a log both have q cosignatures, at least 2q - n witnesses cosigned both. If all of these
    collude, both branches are accepted. One honest witness among them prevents it, since it never cosigns two
    heads of which neither extends the other. Hence 2q - n > f, that is q > (n + f) / 2.

    Attributes:
        witnesses: n.
        needed: q.
    """

    witnesses: int
    needed: int

    def __post_init__(self) -> None:
        if not (self.colluding >= 0 and self.needed <= min(self.witnesses, MAX_SIGNERS - 1)):
            raise ProtocolError(
                f"quorum: {self.needed} of {self.witnesses} witnesses must cosign a checkpoint; expected more than "
                f"half, and at most {min(self.witnesses, MAX_SIGNERS - 1)}",
                f"set the quorum to {least_quorum(self.witnesses, 0)} or more, and add witnesses if there are fewer",
            )

    @property
    def colluding(self) -> int:
        """f: number of colluding witnesses that this withstands. Below 0: unsafe even if all witnesses are honest."""
        return 2 * self.needed - self.witnesses - 1


def least_quorum(witnesses: int, colluding: int) -> int:
    """Return the least q above (n + f) / 2. It is above `witnesses` if no q withstands so many: f must be below n."""
    return (witnesses + colluding) // 2 + 1


@dataclass(frozen=True)
class Policy:
    """The log and the witnesses whose checkpoints a reader accepts (C2SP tlog-policy).

    Attributes:
        log: Key of the log. Its name is the origin.
        witnesses: Keys of the witnesses, ascending by name.
        needed: Number of cosignatures that a checkpoint needs.
    """

    log: NoteKey
    witnesses: tuple[NoteKey, ...]
    needed: int

    def __post_init__(self) -> None:
        if self.log.kind != ED25519 or any(witness.kind != COSIGNATURE for witness in self.witnesses):
            raise ProtocolError(
                "policy of the log: the log's key must be of type 1 and each witness's key of type 4", _POLICY
            )
        names = [witness.name for witness in self.witnesses]
        keys = [key for each in (self.log, *self.witnesses) for key in each.publics]
        if names != sorted(set(names)) or len(set(keys)) != len(keys):
            raise ProtocolError(
                "policy of the log: each name and each key must appear once, and witnesses in ascending order of name",
                _POLICY,
            )
        Quorum(len(self.witnesses), self.needed)

    @property
    def text(self) -> str:
        """Text of the policy file, which any C2SP tool can read."""
        lines = [f"log {self.log.text}"]
        lines += [f"witness {witness.name} {witness.text}" for witness in self.witnesses]
        lines += [f"group {_GROUP} {self.needed} {' '.join(witness.name for witness in self.witnesses)}"]
        return "".join(f"{line}\n" for line in [*lines, f"quorum {_GROUP}"])

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read a policy file: one log, its witnesses, one group of all of them with a number, and the quorum.

        Empty lines and comments are ignored. URLs and nested groups, which C2SP allows, are refused.

        Raises:
            ProtocolError: It is not such a policy.
        """
        lines = _policy_lines(text)
        (log,), (group,) = lines["log"], lines["group"]
        keys = dict(lines["witness"])
        (group_name, needed, *members), quorum = group, lines["quorum"][0][0]
        if len(keys) != len(lines["witness"]) or sorted(members) != sorted(keys):
            raise ProtocolError(
                "policy of the log: the group line must name each witness of the file once, and no other", _POLICY
            )
        if quorum != group_name:
            raise ProtocolError(
                f"policy of the log: the quorum line must name the group {group_name[:80]!r}, found {quorum[:80]!r}",
                _POLICY,
            )
        witnesses = sorted((NoteKey.parse(key) for key in keys.values()), key=lambda key: key.name)
        return cls(NoteKey.parse(log[0]), tuple(witnesses), _number(needed, "policy: number of the group"))


def _policy_lines(text: str) -> dict[str, list[list[str]]]:
    """Return the words after the keyword of each line of a policy file, by keyword.

    Raises:
        ProtocolError: A line has another form; log, group or quorum is missing or repeated; or the quorum comes before
            the group.
    """
    lines: dict[str, list[list[str]]] = {keyword: [] for keyword in _POLICY_WORDS}
    for number, line in enumerate(text.splitlines(), start=1):
        keyword, *words = line.split() or ["#"]
        if keyword.startswith("#"):
            continue
        _check_policy_line(number, keyword, words)
        if keyword == "quorum" and not lines["group"]:
            raise ProtocolError(
                f"policy of the log: line {number}: the group line must come before the quorum line", _POLICY
            )
        lines[keyword].append(words)
    for keyword in ("log", "group", "quorum"):
        if len(lines[keyword]) != 1:
            raise ProtocolError(
                f"policy of the log: expected one line that begins with '{keyword}', found {len(lines[keyword])}",
                _POLICY,
            )
    return lines


def _check_policy_line(number: int, keyword: str, words: list[str]) -> None:
    """Check the form of a line. Errors do not quote it: it may be from another file, such as a private key."""
    expected = _POLICY_WORDS.get(keyword, -1)
    if len(words) == expected or (keyword == "group" and len(words) > expected):
        return
    raise ProtocolError(
        f"policy of the log: line {number}: expected 'log KEY', 'witness NAME KEY', 'group NAME NUMBER WITNESS...' or "
        "'quorum GROUP'",
        _POLICY,
    )


def open_checkpoint(data: bytes, log: NoteKey | LogAt) -> tuple[Checkpoint, Note]:
    """Read a checkpoint that the log has signed. Cosignatures are not checked.

    Args:
        data: Its note.
        log: The log's key; or, of a log whose keys were rotated, the function that returns the key for a size.

    Raises:
        ProtocolError: It is not the note of a checkpoint.
        OtherKeyError: A log of this name signed it, but with another key.
        VerificationError: The log's signature is missing or wrong, or the origin is not the log's.
    """
    note = parse_note(data)
    if not isinstance(log, NoteKey):
        log = log(Checkpoint.parse(note.text).size)
    if not verify_note(note, [log]):
        others = [each.key_id.hex() for each in note.signatures if each.name == log.name]
        if log.id.hex() in others or log.ids[-1].hex() in others:
            raise VerificationError(
                f"checkpoint: expected signatures by the log {log.name} with Ed25519 and with ML-DSA-65, found one",
                "do not trust the checkpoint: whoever can forge one of the two takes the other away",
            )
        found = f"one with the key {others[0]} instead of {log.id.hex()}" if others else "none"
        raise (OtherKeyError if others else VerificationError)(
            f"checkpoint: expected a signature by the log {log.name}, found {found}",
            "compare the log's key in the policy with the coordinator's, and get the checkpoint again",
        )
    checkpoint = Checkpoint.parse(note.text)
    if checkpoint.origin != log.name:
        raise VerificationError(
            f"checkpoint: expected one of the log {log.name}, found one of {checkpoint.origin[:80]!r}",
            "name the checkpoint and the policy of the same log",
        )
    return checkpoint, note


@lru_cache(maxsize=16)
def accept_checkpoint(data: bytes, policy: Policy) -> tuple[Checkpoint, tuple[NoteKey, ...]]:
    """Read a checkpoint that a quorum has cosigned. Return it with the witnesses that cosigned.

    Raises:
        ProtocolError: It is not the note of a checkpoint.
        VerificationError: A signature of the log or of a witness is wrong, or the log's is missing.
        TooFewSitesError: Fewer witnesses cosigned than the policy demands.
    """
    checkpoint, note = open_checkpoint(data, policy.log)
    cosigners = verify_note(note, policy.witnesses)
    if len(cosigners) < policy.needed:
        raise TooFewSitesError(
            f"checkpoint of {checkpoint.size} leaves: expected cosignatures of {policy.needed} of "
            f"{len(policy.witnesses)} witnesses, found {len(cosigners)}",
            "wait until more sites have cosigned it",
        )
    return checkpoint, cosigners


@dataclass(frozen=True)
class LeafProof:
    """Proof that a leaf is in the log, which can be checked offline (C2SP tlog-proof).

    Attributes:
        index: Number of the leaf.
        proof: Inclusion proof of the leaf in the checkpoint's tree.
        checkpoint: Note of the checkpoint.
    """

    index: int
    proof: HashProof
    checkpoint: bytes

    def encode(self) -> bytes:
        """Return the content of a ``.tlog-proof`` file."""
        lines = [_PROOF_HEADER, f"index {self.index}", *map(encode_base64, self.proof), ""]
        return "".join(f"{line}\n" for line in lines).encode() + self.checkpoint

    @classmethod
    def parse(cls, data: bytes) -> LeafProof:
        """Read a ``.tlog-proof`` file without extra data. `verify_leaf` checks it.

        Raises:
            ProtocolError: It is not a ``.tlog-proof`` file.
        """
        head, blank, checkpoint = data.partition(b"\n\n")
        try:
            header, index, *hashes = head.decode("ascii").split("\n")
        except ValueError:
            raise ProtocolError(
                f"leaf proof: expected the line {_PROOF_HEADER}, a line with an index, lines with hashes and a "
                "checkpoint",
                _PROOF_AGAIN,
            ) from None
        if header != _PROOF_HEADER or not index.startswith("index ") or not blank or len(hashes) > 64:
            raise ProtocolError(
                f"leaf proof: expected the line {_PROOF_HEADER}, a line with an index, lines with hashes and a "
                "checkpoint",
                _PROOF_AGAIN,
            )
        number = _number(index.removeprefix("index "), "leaf proof: index")
        return cls(number, tuple(decode_base64(text, "leaf proof: hash") for text in hashes), checkpoint)


def verify_leaf(proof: LeafProof, leaf: bytes, policy: Policy) -> Checkpoint:
    """Check that a leaf is in the log under a checkpoint that a quorum cosigned. Return the checkpoint.

    Raises:
        ProtocolError, VerificationError, TooFewSitesError: As `accept_checkpoint` and `check_inclusion`.
    """
    checkpoint, _ = accept_checkpoint(proof.checkpoint, policy)
    check_inclusion(proof.proof, proof.index, checkpoint.size, checkpoint.root, leaf_hash(leaf))
    return checkpoint


def _number(text: str, what: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text) > MAX_SIZE:
        raise ProtocolError(
            f"{what}: expected a whole number up to 2^53 without leading zeros, got {text[:40]!r}",
            "get the file again, or correct the number",
        )
    return int(text)
