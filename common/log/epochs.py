"""Key epochs: which key of the log counts for a checkpoint, and which key of the coordinator for a leaf.

A statement of type rotate, at leaf i, begins an epoch at i + 1. A checkpoint of n leaves counts under the log's key of
the epoch of n; a statement of the coordinator at leaf n counts under the coordinator's key of the epoch of n. So the
statement itself is signed with the old key, and the first checkpoint that contains it with the new one.

`privet.common.log.replay.Replay.epochs` is the one list of them, and docs/decisions/0013-rotation.md the reason.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from privet.common.canonical import canonical_json
from privet.common.errors import VerificationError
from privet.common.log.mldsa import Use
from privet.common.log.note import NoteKey
from privet.common.log.proofs import proves
from privet.common.log.statements import Rotate

_ROTATES = b"privet-rotate/1\x00"


@dataclass(frozen=True)
class KeyEpoch:
    """The keys that count from a number of leaves on.

    Attributes:
        since: Size of the first checkpoint, and number of the first leaf.
        log: Signs checkpoints. The ML-DSA-65 key in it, if it is hybrid, also signs the coordinator's statements.
        coordinator: Ed25519 public key of the coordinator's statements, 32 bytes.
        charter: Digest of the charter with these keys, as the rotation states it; empty in the first epoch.
    """

    since: int
    log: NoteKey
    coordinator: bytes
    charter: str = field(default="", compare=False)


@dataclass(frozen=True)
class RotationPlace:
    """The place in a log for which new keys are made.

    Attributes:
        consortium: Its name.
        index: Number of the leaf.
        root: Root of the tree of the leaves before it, 32 bytes.
        present: The keys that the new ones replace.
    """

    consortium: str
    index: int
    root: bytes
    present: KeyEpoch


def epoch_at(epochs: Sequence[KeyEpoch], number: int) -> KeyEpoch:
    """Return the epoch of a checkpoint of `number` leaves, or of leaf `number`. The first begins at 0."""
    return epochs[bisect_right([epoch.since for epoch in epochs], number) - 1]


def possession_text(place: RotationPlace, rotate: Rotate) -> bytes:
    """Return what each new key signs. The first bytes separate it from checkpoints and statements.

    It names the place, so that a signature that was copied is of no use in another log, or elsewhere in this one.
    """
    present = {"log": place.present.log.text, "coordinator": place.present.coordinator.hex()}
    new = {"log": rotate.log, "coordinator": rotate.coordinator}
    where = {"consortium": place.consortium, "index": place.index, "root": place.root.hex()}
    return _ROTATES + canonical_json({**where, "present": present, "new": new, "charter": rotate.charter})


def check_possession(place: RotationPlace, rotate: Rotate) -> None:
    """Check that the holder of each new key has signed for this place.

    Raises:
        VerificationError: One has not.
    """
    text, log = possession_text(place, rotate), NoteKey.parse(rotate.log)
    for what, keys, proof in (
        ("the log", log.publics, rotate.log_proof),
        ("the coordinator's statements", (bytes.fromhex(rotate.coordinator),), rotate.coordinator_proof),
    ):
        if not proves(keys, proof, text, Use.ROTATION):
            raise VerificationError(
                f"statement rotate: the new key of {what} has not signed for this place in this log"
            )
