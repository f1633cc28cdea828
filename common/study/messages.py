"""What the coordinator and a site say to each other: typed, validated, independent of the transport.

A message is a frozen dataclass. On the wire it is a kind, plain JSON fields and named binary parts
(`Parts`); decoding is strict. Nothing here refers to a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import ProtocolError

VALIDATION_LOSS_CAP = 10.0
"""Validation losses are cut here and sent as a fraction of it: a bounded contribution is what bounds their noise."""


# A failure's texts enter statements, so a site cannot make them as long as it likes.
_LONGEST = 1000


@dataclass(frozen=True)
class Parts:
    """A message taken apart for the wire."""

    kind: str
    fields: Mapping[str, Any]
    blobs: Mapping[str, bytes]


class Message(Protocol):
    """Anything that can be taken apart for the wire."""

    kind: ClassVar[str]

    def parts(self) -> Parts:
        """Take the message apart."""

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, and remove from `fields` and `blobs` all that it consists of.

        Raises:
            ProtocolError: A field is missing or of the wrong type.
            KeyError, ValueError, OverflowError: A binary part is missing or malformed, or a number is too large.
        """


@dataclass(frozen=True)
class Offer:
    """Coordinator to node: will you take part in this study?

    Attributes:
        run: Name of the run in the round log; empty where none is kept.
    """

    kind: ClassVar[str] = "offer"
    study: Mapping[str, Any]
    run: str = ""

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, {"study": dict(self.study), "run": self.run}, {})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(study=_take(fields, "study", dict), run=_take(fields, "run", str))


@dataclass(frozen=True)
class Consent:
    """Site to coordinator: yes, to this very study, with this weight.

    The weight is a count that the site declares once, rounded as it likes; it is public. The identity is the
    site's Ed25519 public key in hexadecimal, empty where it has none, which neither masking nor the log puts up with.
    """

    kind: ClassVar[str] = "consent"
    site: str
    study_digest: str
    spec_digest: str
    weight: int
    identity: str = ""

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, dict(vars(self)), {})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(
            site=_take(fields, "site", str),
            study_digest=_take(fields, "study_digest", str),
            spec_digest=_take(fields, "spec_digest", str),
            weight=_take(fields, "weight", int),
            identity=_take(fields, "identity", str),
        )


@dataclass(frozen=True)
class Shown:
    """Coordinator to site: a checkpoint of the round log, to be cosigned.

    Attributes:
        checkpoint: The signed note.
        old: Size of the tree from which `proof` starts: the last one that this site is known to have cosigned.
        proof: Consistency of that tree with the checkpoint's: hashes of 32 bytes, one after the other.
    """

    kind: ClassVar[str] = "shown"
    checkpoint: bytes = field(repr=False)
    old: int
    proof: bytes = field(repr=False)

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, {"old": self.old}, {"checkpoint": self.checkpoint, "proof": self.proof})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(checkpoint=blobs.pop("checkpoint"), old=_take(fields, "old", int), proof=blobs.pop("proof"))


@dataclass(frozen=True)
class Cosigned:
    """Site to coordinator: its signature line on the checkpoint; or an empty one, and the size it stands at."""

    kind: ClassVar[str] = "cosigned"
    line: str
    size: int

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, dict(vars(self)), {})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(line=_take(fields, "line", str)[:_LONGEST], size=_take(fields, "size", int))


@dataclass(frozen=True)
class Evidence:
    """What shows a site that a round stands in the witnessed log. All empty where a run keeps no log.

    Attributes:
        run: Leaf `run-open`.
        run_proof: Its ``.tlog-proof``, under a checkpoint that a quorum cosigned.
        opened: Leaf `round-open`.
        opened_proof: Likewise.
        sequence: Entry of the site's ledger in the last statement of the site that the log holds; 0 before the first.
        head: Its head there.
    """

    run: bytes = field(default=b"", repr=False)
    run_proof: bytes = field(default=b"", repr=False)
    opened: bytes = field(default=b"", repr=False)
    opened_proof: bytes = field(default=b"", repr=False)
    sequence: int = 0
    head: str = ""

    def __bool__(self) -> bool:
        return bool(self.opened)


@dataclass(frozen=True)
class RoundOpen:
    """Coordinator to site: train from this adapter.

    Attributes:
        cohort: All sites asked in this round, in name order.
        adapter: Its bytes.
        masking: `secagg.messages.Parameters` of the site's group; empty where the study does not mask updates.
        declared: Under masking, the count that this site consented with.
        evidence: That the round stands in the log.
    """

    kind: ClassVar[str] = "round-open"
    study: Mapping[str, Any]
    round: int
    nonce: str
    adapter_digest: str
    cohort: tuple[str, ...]
    adapter: bytes = field(repr=False)
    masking: bytes = field(default=b"", repr=False)
    declared: int = 0
    evidence: Evidence = Evidence()

    def parts(self) -> Parts:
        """Take the message apart."""
        blobs = {"adapter": self.adapter, "masking": self.masking}
        fields = {name: value for name, value in vars(self).items() if name not in (*blobs, "evidence")}
        logged = dict(vars(self.evidence))
        fields |= {name: logged.pop(name) for name in ("sequence", "head")}
        return Parts(self.kind, {**fields, "cohort": list(self.cohort)}, blobs | logged)

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(
            study=_take(fields, "study", dict),
            round=_take(fields, "round", int),
            nonce=_take(fields, "nonce", str),
            adapter_digest=_take(fields, "adapter_digest", str),
            cohort=_take_names(fields, "cohort"),
            adapter=blobs.pop("adapter"),
            masking=blobs.pop("masking"),
            declared=_take(fields, "declared", int),
            evidence=Evidence(
                run=blobs.pop("run"),
                run_proof=blobs.pop("run_proof"),
                opened=blobs.pop("opened"),
                opened_proof=blobs.pop("opened_proof"),
                sequence=_take(fields, "sequence", int),
                head=_take(fields, "head", str),
            ),
        )


@dataclass(frozen=True)
class Secured:
    """One message of secure aggregation, either way.

    Attributes:
        study: The study's digest.
        round: The round, from 1.
        nonce: That of the round's `RoundOpen`.
        body: The message as `secagg.messages.encode` writes it; it tells its own type.
        statement: With a masked vector, the site's signed `site-round` for the log; empty where none is kept.
    """

    kind: ClassVar[str] = "secured"
    study: str
    round: int
    nonce: str
    body: bytes = field(repr=False)
    statement: bytes = field(default=b"", repr=False)

    @property
    def upload(self) -> bytes:
        """What the statement speaks of."""
        return self.body

    def parts(self) -> Parts:
        """Take the message apart."""
        fields = {"study": self.study, "round": self.round, "nonce": self.nonce}
        return Parts(self.kind, fields, {"body": self.body, "statement": self.statement})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(
            study=_take(fields, "study", str),
            round=_take(fields, "round", int),
            nonce=_take(fields, "nonce", str),
            body=blobs.pop("body"),
            statement=blobs.pop("statement"),
        )


@dataclass(frozen=True)
class Contribution:
    """Site to coordinator: what enters the sum.

    Attributes:
        weight: w, the site's declared weight.
        update: w times the update, float32 [d]; or int64 [d], a step's sum with a share of the noise, which leaves a
            site masked only.
        metrics: Sums over the site's validation units of (1, capped loss, fraction right), float64 [3], noised
            where the study is private; empty where it validates nothing.
        statement: The site's signed `site-round` for the log; empty where none is kept.
    """

    kind: ClassVar[str] = "contribution"
    site: str
    round: int
    nonce: str
    weight: float
    update: NDArray[np.floating[Any] | np.int64]
    metrics: NDArray[np.float64]
    statement: bytes = field(default=b"", repr=False)

    @property
    def upload(self) -> bytes:
        """What the statement speaks of."""
        arrays = (np.array([self.weight], "<f8"), self.update.astype("<f4"), self.metrics.astype("<f8"))
        return b"".join(array.tobytes() for array in arrays)

    def parts(self) -> Parts:
        """Take the message apart.

        Raises:
            ProtocolError: It holds a share of the noise only, which must not travel in the clear.
        """
        if self.update.dtype == np.int64:
            raise ProtocolError("a share of the noise protects nobody by itself and does not travel in the clear")
        fields = {"site": self.site, "round": self.round, "nonce": self.nonce, "weight": self.weight}
        blobs = {
            "update": self.update.astype("<f4").tobytes(),
            "metrics": self.metrics.astype("<f8").tobytes(),
            "statement": self.statement,
        }
        return Parts(self.kind, fields, blobs)

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(
            site=_take(fields, "site", str),
            round=_take(fields, "round", int),
            nonce=_take(fields, "nonce", str),
            weight=float(_take(fields, "weight", (int, float))),
            update=np.frombuffer(blobs.pop("update"), "<f4"),
            metrics=np.frombuffer(blobs.pop("metrics"), "<f8"),
            statement=blobs.pop("statement"),
        )


@dataclass(frozen=True)
class Failure:
    """Site to coordinator: no, and why. The text comes from a `PrivetError`, which never carries data.

    Attributes:
        statement: Where the site refuses, its signed `refusal` for the log.
    """

    kind: ClassVar[str] = "failure"
    error: str
    message: str
    hint: str
    statement: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        """Return the message for a terminal or a log: a site's text may hold control characters."""
        return "".join(c if c.isprintable() else "?" for c in self.message)

    def parts(self) -> Parts:
        """Take the message apart."""
        fields = {name: value for name, value in vars(self).items() if name != "statement"}
        return Parts(self.kind, fields, {"statement": self.statement})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        error, text, hint = (_take(fields, name, str)[:_LONGEST] for name in ("error", "message", "hint"))
        return cls(error, text, hint, blobs.pop("statement"))


_MESSAGES: tuple[type[Message], ...] = (
    Offer,
    Consent,
    Shown,
    Cosigned,
    RoundOpen,
    Secured,
    Contribution,
    Failure,
)
_BY_KIND = {message.kind: message for message in _MESSAGES}


def rebuild(parts: Parts) -> Message:
    """Put a message together again.

    Raises:
        ProtocolError: The kind is unknown, or a field is missing, surplus or of the wrong type.
    """
    if parts.kind not in _BY_KIND:
        raise ProtocolError(f"message: unknown kind {parts.kind[:32]!r}")
    fields, blobs = dict(parts.fields), dict(parts.blobs)
    try:
        message = _BY_KIND[parts.kind].from_parts(fields, blobs)
    except (KeyError, ValueError, OverflowError) as error:
        raise ProtocolError(f"message {parts.kind}: a part is missing or malformed: {error}") from None
    if fields or blobs:
        unknown = ", ".join(sorted([*fields, *blobs]))
        raise ProtocolError(f"message {parts.kind}: unknown parts {unknown[:200]}")
    return message


def _take(fields: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in fields:
        raise ProtocolError(f"message: field {name} is missing")
    value = fields.pop(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(f"message: field {name} has the wrong type {type(value).__name__}")
    return value


def _take_names(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    values = _take(fields, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ProtocolError(f"message: field {name} is not a list of names")
    return tuple(values)
