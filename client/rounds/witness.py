"""A witness of the round log (Merkle): it cosigns a checkpoint only if it follows from the last one it cosigned.

The rules are those of C2SP tlog-witness, section add-checkpoint. The caller does the transport. The witness keeps one
small directory::

    cosigned.db    every checkpoint that it cosigned, by its size, with its cosignature (`client/rounds/memory.py`)
    evidence/      checkpoints that the log signed and that do not follow from these: proof of a fork or a rollback

The log's keys may be rotated. The site's operator confirms new ones; which key counts for which size is in `epochs`. A
larger tree that is signed with a former key is evidence, too: somebody has kept that key.

A new checkpoint is on disk before its cosignature is returned, so a witness forgets nothing in a crash. A lost
directory is not created again in silence: a witness that has forgotten would cosign a second history.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey

from privet.client.rounds.memory import Memory, Rows
from privet.common.errors import PrivetError, StateError, VerificationError
from privet.common.files import Step, write_durably
from privet.common.log.checkpoint import Checkpoint, OtherKeyError, open_checkpoint
from privet.common.log.epochs import KeyEpoch, epoch_at
from privet.common.log.merkle import EMPTY_ROOT, HashProof, check_consistency
from privet.common.log.note import (
    COSIGNATURE,
    Note,
    NoteKey,
    Signature,
    encode_base64,
    parse_note,
    public_of,
    verify_note,
    witness_lines,
)

_EVIDENCE = "evidence"
_MOST_EVIDENCE = 100
_FORKED = "trust no later checkpoint of this log, and show both checkpoints to the operators of the sites"
_ROTATED = (
    "call the coordinator's operator. If the keys were rotated, have the words of the new charter read out, and type "
    "them: `privet site trust SITE`. Otherwise take part in no round, and warn the operators of the other sites"
)
_RESTORE = "restore the newest copy from a backup; a new witness would vouch for a history that it has not seen"


@dataclass(frozen=True)
class Stale:
    """The proof does not start at the last checkpoint of the witness. Send one that starts at `size`."""

    size: int


@dataclass(frozen=True)
class Witness:
    """A witness of one log.

    Attributes:
        directory: Holds its cosigned checkpoints and evidence.
        log: The log's key when the witness was opened. Its name never changes.
        name: The witness's name in cosignatures.
        key: Its cosigning key.
        pq: Cosigns with ML-DSA-65 as well; None where the log knows no such key of this site.
        step: Called with the name of each step.
        durable: Whether it waits for the disk before it answers. Simulated sites need not.
        epochs: Returns the log's keys, as the site's operator has confirmed them by now; None if there is only `log`.
    """

    directory: Path
    log: NoteKey
    name: str
    key: Ed25519PrivateKey
    step: Step = lambda name: None
    durable: bool = True
    epochs: Callable[[], Sequence[KeyEpoch]] | None = None
    pq: MLDSA65PrivateKey | None = None
    _memory: Memory = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_memory", Memory(self.directory, durable=self.durable))

    @classmethod
    def create(
        cls,
        directory: Path,
        log: NoteKey,
        name: str,
        key: Ed25519PrivateKey,
        *,
        durable: bool = True,
        pq: MLDSA65PrivateKey | None = None,
    ) -> Witness:
        """Create the directory of a witness that has seen nothing.

        Raises:
            StateError: The directory is in use already.
        """
        if directory.exists() and any(directory.iterdir()):
            raise StateError(
                f"the witness's directory {directory} is not empty: this site has a witness already",
                "keep the directory: a witness is created once. For another log, set another path in log.state",
            )
        (directory / _EVIDENCE).mkdir(parents=True, exist_ok=True)
        witness = cls(directory, log, name, key, durable=durable, pq=pq)
        witness._memory.create(Checkpoint(log.name, 0, EMPTY_ROOT).text.encode())
        return witness

    @property
    def public(self) -> NoteKey:
        """The key that verifies its cosignatures."""
        return public_of(self.name, COSIGNATURE, self.key, self.pq)

    @property
    def _keys(self) -> Sequence[NoteKey]:
        return (self.log,) if self.epochs is None else [epoch.log for epoch in self.epochs()]

    def log_at(self, size: int) -> NoteKey:
        """Return the log's key for checkpoints of a size."""
        return self.log if self.epochs is None else epoch_at(self.epochs(), size).log

    def open(self, data: bytes) -> tuple[Checkpoint, Note]:
        """Read a checkpoint that the log signed with the key that this site has confirmed for its size.

        Raises:
            ProtocolError, VerificationError: As `open_checkpoint`.
        """
        try:
            return open_checkpoint(data, self.log_at)
        except OtherKeyError as error:
            raise OtherKeyError(f"{error.message}: this site's operator has not confirmed that key", _ROTATED) from None

    @property
    def last(self) -> Checkpoint:
        """The last checkpoint cosigned; a checkpoint of size 0 before the first.

        Raises:
            StateError: It cannot be read.
        """
        with self._memory.rows() as rows:
            return self._read(self._newest(rows))

    def add(self, data: bytes, old: int, proof: HashProof, time: int) -> tuple[Signature, ...] | Stale:
        """Cosign a checkpoint.

        Args:
            data: The checkpoint's note.
            old: Size of the tree that the proof starts from.
            proof: Consistency of that tree with the checkpoint's.
            time: Now, in Unix seconds.

        Returns:
            The lines of the cosignature; or `Stale` if `old` is not the size of the last checkpoint cosigned, or if the
            checkpoint is an earlier one that was cosigned before.

        Raises:
            ProtocolError: It is not a checkpoint's note.
            VerificationError: The log did not sign it, or not with its key for this size; or it did, and the checkpoint
                does not follow from those cosigned. The witness then keeps it as evidence, and the message names the
                file. So it does with one that is signed with a former key.
            StateError: The directory cannot be read or written.
        """
        # One lock over reading the last checkpoint, comparing and storing: two processes could otherwise cosign two
        # different checkpoints of one size.
        with self._memory.rows(write=True) as rows:
            try:
                checkpoint, note = self.open(data)
            except OtherKeyError:
                self._check_former(rows, data, proof)
                raise
            last = self._read(self._newest(rows))
            if checkpoint.size < last.size and checkpoint == self._cosigned(rows, checkpoint.size):
                return Stale(last.size)  # a delayed message, not a rollback
            if checkpoint.size > last.size != old:
                return Stale(last.size)
            self._check_successor(rows, data, checkpoint, proof)
            # The log's own signatures are stored with ours: they prove to others that the log signed this tree.
            lines = witness_lines(note.text, self.name, self.key, time, self.pq)
            self.step("witness:checked")
            log = self.log_at(checkpoint.size)
            own = tuple(one for one in note.signatures if one.name == log.name and one.key_id in log.ids)
            stored = Note(note.text, (*own, *lines)).encode()
            rows.keep(checkpoint.size, stored)
        # Stored before it is returned: after a crash the witness must know every checkpoint it has vouched for.
        self.step("witness:stored")
        return lines

    def check(self, data: bytes, checkpoint: Checkpoint, proof: HashProof) -> None:
        """Check that a checkpoint follows from the last one cosigned, without cosigning it. Raises as `add`.

        Args:
            data: The checkpoint's note, whose signature by the log the caller has verified.
            checkpoint: The checkpoint in it.
            proof: As for `add`.
        """
        with self._memory.rows() as rows:
            self._check_successor(rows, data, checkpoint, proof)

    def _check_successor(self, rows: Rows, data: bytes, checkpoint: Checkpoint, proof: HashProof) -> None:
        last = self._read(self._newest(rows))
        try:
            check_successor(last, checkpoint, proof)
        except VerificationError as error:
            known = rows.at(checkpoint.size) or self._newest(rows)
            raise self._refused(known, data, checkpoint, proof, error.message) from None

    def cosigned(self, checkpoint: Checkpoint) -> bool:
        """Return whether this witness cosigned that very checkpoint.

        Raises:
            StateError: The directory cannot be read.
        """
        with self._memory.rows() as rows:
            return self._cosigned(rows, checkpoint.size) == checkpoint

    def notes(self) -> list[bytes]:
        """Return the notes of all checkpoints cosigned, ascending by size, with the log's signature and its own.

        Raises:
            StateError: The directory cannot be read.
        """
        with self._memory.rows() as rows:
            return rows.notes()[1:]

    @property
    def evidence(self) -> tuple[Path, ...]:
        """Files that prove a fork or a rollback; empty while the log is consistent."""
        return tuple(sorted((self.directory / _EVIDENCE).glob("*.txt")))

    def _newest(self, rows: Rows) -> bytes:
        found = rows.newest()
        if found is None:
            raise StateError(f"the witness's directory {self.directory} holds no checkpoint", _RESTORE)
        return found

    def _cosigned(self, rows: Rows, size: int) -> Checkpoint | None:
        """Return the checkpoint of this size that was cosigned, if any."""
        found = rows.at(size)
        return None if found is None else self._read(found)

    def _read(self, data: bytes) -> Checkpoint:
        try:
            if data == Checkpoint(self.log.name, 0, EMPTY_ROOT).text.encode():
                return Checkpoint(self.log.name, 0, EMPTY_ROOT)
            # It was opened with the key of its size before it was stored. A log that says now that this key had ended
            # must find the note here, so any confirmed key will do.
            signers = verify_note(parse_note(data), self._keys)
            return open_checkpoint(data, signers[0] if signers else self.log)[0]
        except OtherKeyError:
            raise StateError(
                f"a checkpoint in the witness's directory {self.directory} is signed with a key of the log that this "
                "site has not confirmed",
                "if the file of confirmed keys is an older copy, confirm the present charter, as the coordinator's "
                "operator reads it out: `privet site trust SITE`. Otherwise restore the newest copy of the directory",
            ) from None
        except PrivetError as error:
            raise StateError(
                f"a checkpoint in the witness's directory {self.directory} cannot be read or verified "
                f"({type(error).__name__})",
                _RESTORE,
            ) from None

    def _check_former(self, rows: Rows, data: bytes, proof: HashProof) -> None:
        """Refuse, and keep as evidence, a checkpoint that the log signed with its key of another epoch."""
        for epoch in () if self.epochs is None else self.epochs():
            try:
                checkpoint = open_checkpoint(data, epoch.log)[0]
            except PrivetError:
                continue
            counts = "only later" if checkpoint.size < epoch.since else "no longer: somebody has a copy of it"
            key = epoch.log.id.hex()
            reason = f"a checkpoint of {checkpoint.size} leaves is signed with the key {key}, which counts {counts}"
            raise self._refused(self._newest(rows), data, checkpoint, proof, reason)

    def _refused(
        self, known: bytes, data: bytes, checkpoint: Checkpoint, proof: HashProof, reason: str
    ) -> VerificationError:
        kept = self._keep_evidence(known, data, checkpoint, proof, reason)
        return VerificationError(
            f"round log {self.log.name}: {reason}",
            f"take part in no round, and show the evidence to the operators of the other sites: {kept}",
        )

    def _keep_evidence(self, known: bytes, data: bytes, checkpoint: Checkpoint, proof: HashProof, reason: str) -> Path:
        """Store both checkpoints, the proof that was sent, and the reason of the refusal."""
        name = f"{checkpoint.size:012d}-{hashlib.sha256(data).hexdigest()[:16]}.txt"
        parts = [f"{reason}\n\ncosigned before:\n\n".encode(), known]
        hashes = "".join(f"{encode_base64(value)}\n" for value in proof)
        parts += [b"\nnow shown:\n\n", data, f"\nwith this proof:\n\n{hashes}".encode()]
        if len(self.evidence) >= _MOST_EVIDENCE:  # a log that signs whatever it likes must not fill the disk
            return self.directory / _EVIDENCE
        write_durably(self.directory / _EVIDENCE / name, b"".join(parts))
        return self.directory / _EVIDENCE / name


def check_successor(last: Checkpoint, new: Checkpoint, proof: HashProof) -> None:
    """Check that a log with checkpoint `last` may now have checkpoint `new`.

    Args:
        last: A checkpoint of the log that the caller has verified.
        new: A later one of the same log.
        proof: Proof that `new` extends `last`; not used where both have the same size.

    Raises:
        VerificationError: It is smaller, or does not extend `last`.
    """
    if new.size < last.size:
        raise VerificationError(
            f"expected a checkpoint of at least {last.size} leaves, found one of {new.size}: the log was rolled back",
            _FORKED,
        )
    if new.size == last.size and new.root != last.root:
        roots = f"{last.root.hex()} and {new.root.hex()}"
        raise VerificationError(
            f"two checkpoints of {new.size} leaves have different roots, {roots}: the log has forked", _FORKED
        )
    if new.size > last.size:
        check_consistency(proof, last.size, last.root, new.size, new.root)
