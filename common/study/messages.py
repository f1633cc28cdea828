"""The messages between coordinator and sites: typed, validated, and independent of the transport.

A message is a frozen dataclass. On the wire it is a kind, plain JSON fields and named binary parts
(`Parts`). Decoding is strict. No message holds a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError

SAME_VERSION = "install the same version of privet at coordinator and sites; if it is the same, the message was changed"
"""Hint of errors about a message's form."""


_CONSENTS = b"privet-consent/1\x00"
# The texts of a failure enter statements of the log, so their length is bounded.
_LONGEST = 1000
_LONGEST_LINES = 8_000  # two signature lines of a hybrid key have some 4,700 characters


@dataclass(frozen=True)
class Parts:
    """A message in the parts that are sent: its kind, JSON values, and bytes by name."""

    kind: str
    fields: Mapping[str, Any]
    blobs: Mapping[str, bytes]


class Message(Protocol):
    """A message: it can be taken apart for the wire, and put together again."""

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
    """Coordinator to node: asks whether the site takes part in this study.

    Attributes:
        run: Name of the run in the round log; empty if the run keeps no log.
        node: The node that is asked; a consent is signed for it alone. Empty from an earlier version.
    """

    kind: ClassVar[str] = "offer"
    study: Mapping[str, Any]
    run: str = ""
    node: str = ""

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, {"study": dict(self.study), "run": self.run} | _given(node=self.node), {})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(
            study=_take(fields, "study", dict), run=_take(fields, "run", str), node=_take(fields, "node", str, "")
        )


@dataclass(frozen=True)
class Consent:
    """Site to coordinator: the site takes part in exactly this study, with this weight.

    The weight is a count of units that the site declares once. It is public, and the site may round it. The identity
    is the site's Ed25519 public key in hexadecimal. It is empty if the site has none; secure aggregation and the round
    log both need one. The proof is the identity key's signature over all of it, for one run and one node (`signed`), in
    hexadecimal: so nobody takes part, and nobody is billed, under another site's name.
    """

    kind: ClassVar[str] = "consent"
    site: str
    study_digest: str
    spec_digest: str
    weight: int
    identity: str = ""
    proof: str = ""

    def parts(self) -> Parts:
        """Take the message apart."""
        fields = {name: value for name, value in vars(self).items() if name != "proof"}
        return Parts(self.kind, fields | _given(proof=self.proof), {})

    def signed(self, run: str, node: str) -> bytes:
        """Return the bytes that the identity key signs for a run and a node."""
        said = {name: value for name, value in vars(self).items() if name != "proof"}
        return _CONSENTS + canonical_json({**said, "run": run, "node": node})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(
            site=_take(fields, "site", str),
            study_digest=_take(fields, "study_digest", str),
            spec_digest=_take(fields, "spec_digest", str),
            weight=_take(fields, "weight", int),
            identity=_take(fields, "identity", str),
            proof=_take(fields, "proof", str, ""),
        )


@dataclass(frozen=True)
class Shown:
    """Coordinator to site: a checkpoint of the round log that the site should cosign.

    Attributes:
        checkpoint: The signed note.
        old: Size of the tree from which `proof` starts: the last one that this site is known to have cosigned.
        proof: Proof that the checkpoint's tree extends that tree: hashes of 32 bytes, one after the other.
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
    """Site to coordinator: its signature on the checkpoint, or an empty line and the size that it cosigned last.

    A hybrid key signs two lines, which are joined by a newline.

    The empty line asks for a proof that starts from that size.
    """

    kind: ClassVar[str] = "cosigned"
    line: str
    size: int

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, dict(vars(self)), {})

    @classmethod
    def from_parts(cls, fields: dict[str, Any], blobs: dict[str, bytes]) -> Self:
        """Put the message together, as `Message.from_parts` says."""
        return cls(line=_take(fields, "line", str)[:_LONGEST_LINES], size=_take(fields, "size", int))


@dataclass(frozen=True)
class Evidence:
    """Proof for a site that the witnessed log holds a round. All fields are empty if the run keeps no log.

    Attributes:
        run: Leaf `run-open`.
        run_proof: Its ``.tlog-proof``, under a checkpoint that a quorum cosigned.
        opened: Leaf `round-open`.
        opened_proof: Its ``.tlog-proof``, likewise.
        sequence: Entry of the site's ledger in the last statement of the site that the log holds; 0 before the first.
        head: Head of the ledger in that statement.
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
        adapter_digest: Digest of the whole adapter, as the log has it.
        adapter: Bytes of the adapter; or of what sites train alone, for a site that was sent the whole adapter before
            (`privet.common.study.adapter.AdapterSpec.part`).
        masking: `secagg.messages.Parameters` of the site's group, encoded; empty if the study does not mask updates.
        declared: Under secure aggregation, the count that this site declared in its consent.
        evidence: Proof that the log holds the round.
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
    """One message of secure aggregation, in either direction.

    Attributes:
        study: Digest of the study.
        round: Number of the round, from 1.
        nonce: Nonce of the round's `RoundOpen`.
        body: The message as `privet.common.secagg.encoding.encode` writes it; its first bytes name its kind.
        statement: With a masked vector, the site's signed `site-round` for the log; empty if the run keeps no log.
    """

    kind: ClassVar[str] = "secured"
    study: str
    round: int
    nonce: str
    body: bytes = field(repr=False)
    statement: bytes = field(default=b"", repr=False)

    @property
    def upload(self) -> bytes:
        """The bytes whose digest the statement holds."""
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
    """Site to coordinator: the site's part of the sum.

    Attributes:
        weight: w, the site's declared weight.
        update: w times the update, float32 [d]. With shared noise: int64 [d], a step's sum with a share of the noise,
            which must be masked before it leaves the site.
        metrics: Sums over the site's validation units of (1, capped loss, fraction right), float64 [3], with noise
            if the study is private; empty if the study does not validate.
        statement: The site's signed `site-round` for the log; empty if the run keeps no log.
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
        """The bytes whose digest the statement holds."""
        arrays = (np.array([self.weight], "<f8"), self.update.astype("<f4"), self.metrics.astype("<f8"))
        return b"".join(array.tobytes() for array in arrays)

    def parts(self) -> Parts:
        """Take the message apart.

        Raises:
            ProtocolError: The update has only a share of the noise, so it must not be sent unmasked.
        """
        # One share is less noise than the study promises: only the sum of all sites has enough.
        if self.update.dtype == np.int64:
            raise ProtocolError(
                "the site's update holds only a share of the noise, so it must not leave the site without a mask",
                "report this as a bug",
            )
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
    """Site to coordinator: the site cannot or will not do this, and why.

    The texts come from a `PrivetError`, which never carries data.

    Attributes:
        statement: If the site refuses, its signed `refusal` for the log; otherwise empty.
    """

    kind: ClassVar[str] = "failure"
    error: str
    message: str
    hint: str
    statement: bytes = field(default=b"", repr=False)

    def __str__(self) -> str:
        """Return the message without control characters, so that a site's text cannot steer a terminal."""
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
        ProtocolError: The kind is unknown, or a part is missing, unknown or of the wrong type.
    """
    if parts.kind not in _BY_KIND:
        raise ProtocolError(f"a message is of unknown kind {parts.kind[:32]!r}", SAME_VERSION)
    fields, blobs = dict(parts.fields), dict(parts.blobs)
    try:
        message = _BY_KIND[parts.kind].from_parts(fields, blobs)
    except (KeyError, ValueError, OverflowError) as error:
        raise ProtocolError(
            f"message {parts.kind}: a field or binary part is missing or malformed: {error}", SAME_VERSION
        ) from None
    if fields or blobs:
        unknown = ", ".join(sorted([*fields, *blobs]))
        raise ProtocolError(
            f"message {parts.kind}: holds unknown fields or binary parts: {unknown[:200]}", SAME_VERSION
        )
    return message


def _given(**fields: str) -> dict[str, str]:
    """Return the fields that are not empty: an earlier version does not know them."""
    return {name: value for name, value in fields.items() if value}


def _take(fields: dict[str, Any], name: str, kind: type | tuple[type, ...], otherwise: str | None = None) -> Any:
    if name not in fields and otherwise is not None:
        return otherwise
    if name not in fields:
        raise ProtocolError(f"a message between site and coordinator lacks the field {name}", SAME_VERSION)
    value = fields.pop(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(
            f"a message between site and coordinator: field {name} has the wrong type {type(value).__name__}",
            SAME_VERSION,
        )
    return value


def _take_names(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    values = _take(fields, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ProtocolError(
            f"a message between site and coordinator: field {name} must be a list of names", SAME_VERSION
        )
    return tuple(values)
