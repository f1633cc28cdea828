"""What the coordinator and a site say to each other: typed, validated, independent of the transport.

A message is a frozen dataclass. On the wire it is a kind, plain JSON fields and named binary parts
(`Parts`); decoding is strict. Nothing here refers to a record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

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


@dataclass(frozen=True)
class Offer:
    """Coordinator to node: will you take part in this study?"""

    kind: ClassVar[str] = "offer"
    study: Mapping[str, Any]

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, {"study": dict(self.study)}, {})


@dataclass(frozen=True)
class Consent:
    """Site to coordinator: yes, to this very study, with this weight.

    The weight is a count that the site declares once, rounded as it likes; it is public. The identity is the
    site's Ed25519 public key in hexadecimal, empty where the study does not mask updates.
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


@dataclass(frozen=True)
class RoundOpen:
    """Coordinator to site: train from this adapter.

    Attributes:
        cohort: All sites asked in this round, in name order.
        adapter: Its bytes.
        masking: `secagg.messages.Parameters` of the site's group; empty where the study does not mask updates.
        declared: Under masking, the count that this site consented with.
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

    def parts(self) -> Parts:
        """Take the message apart."""
        blobs = {"adapter": self.adapter, "masking": self.masking}
        fields = {name: value for name, value in vars(self).items() if name not in blobs}
        return Parts(self.kind, {**fields, "cohort": list(self.cohort)}, blobs)


@dataclass(frozen=True)
class Secured:
    """One message of secure aggregation, either way.

    Attributes:
        study: The study's digest.
        round: The round, from 1.
        nonce: That of the round's `RoundOpen`.
        body: The message as `secagg.messages.encode` writes it; it tells its own type.
    """

    kind: ClassVar[str] = "secured"
    study: str
    round: int
    nonce: str
    body: bytes = field(repr=False)

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, {"study": self.study, "round": self.round, "nonce": self.nonce}, {"body": self.body})


@dataclass(frozen=True)
class Contribution:
    """Site to coordinator: what enters the sum.

    Attributes:
        weight: w, the site's declared weight.
        update: w times the update, float32 [d].
        metrics: Sums over the site's validation units of (1, capped loss, fraction right), float64 [3], noised
            where the study is private; empty where it validates nothing.
    """

    kind: ClassVar[str] = "contribution"
    site: str
    round: int
    nonce: str
    weight: float
    update: NDArray[np.float32]
    metrics: NDArray[np.float64]

    def parts(self) -> Parts:
        """Take the message apart."""
        fields = {"site": self.site, "round": self.round, "nonce": self.nonce, "weight": self.weight}
        blobs = {
            "update": self.update.astype("<f4").tobytes(),
            "metrics": self.metrics.astype("<f8").tobytes(),
        }
        return Parts(self.kind, fields, blobs)


@dataclass(frozen=True)
class Failure:
    """Site to coordinator: no, and why. The text comes from a `PrivetError`, which never carries data."""

    kind: ClassVar[str] = "failure"
    error: str
    message: str
    hint: str

    def __str__(self) -> str:
        """Return the message for a terminal or a log: a site's text may hold control characters."""
        return "".join(c if c.isprintable() else "?" for c in self.message)

    def parts(self) -> Parts:
        """Take the message apart."""
        return Parts(self.kind, dict(vars(self)), {})


def rebuild(parts: Parts) -> Message:
    """Put a message together again.

    Raises:
        ProtocolError: The kind is unknown, or a field is missing, surplus or of the wrong type.
    """
    fields, blobs = dict(parts.fields), dict(parts.blobs)
    try:
        match parts.kind:
            case "offer":
                message: Message = Offer(study=_take(fields, "study", dict))
            case "consent":
                message = Consent(
                    site=_take(fields, "site", str),
                    study_digest=_take(fields, "study_digest", str),
                    spec_digest=_take(fields, "spec_digest", str),
                    weight=_take(fields, "weight", int),
                    identity=_take(fields, "identity", str),
                )
            case "round-open":
                message = RoundOpen(
                    study=_take(fields, "study", dict),
                    round=_take(fields, "round", int),
                    nonce=_take(fields, "nonce", str),
                    adapter_digest=_take(fields, "adapter_digest", str),
                    cohort=_take_names(fields, "cohort"),
                    adapter=blobs.pop("adapter"),
                    masking=blobs.pop("masking"),
                    declared=_take(fields, "declared", int),
                )
            case "secured":
                message = Secured(
                    study=_take(fields, "study", str),
                    round=_take(fields, "round", int),
                    nonce=_take(fields, "nonce", str),
                    body=blobs.pop("body"),
                )
            case "contribution":
                message = Contribution(
                    site=_take(fields, "site", str),
                    round=_take(fields, "round", int),
                    nonce=_take(fields, "nonce", str),
                    weight=float(_take(fields, "weight", (int, float))),
                    update=np.frombuffer(blobs.pop("update"), "<f4"),
                    metrics=np.frombuffer(blobs.pop("metrics"), "<f8"),
                )
            case "failure":
                message = Failure(*(_take(fields, name, str)[:_LONGEST] for name in ("error", "message", "hint")))
            case _:
                raise ProtocolError(f"message: unknown kind {parts.kind[:32]!r}")
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
