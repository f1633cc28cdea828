"""What stands in the round log: ten kinds of in-toto statements, frozen and strictly validated.

Each is the predicate of an in-toto Statement v1; its `type` and `format` give the predicate's type, and its
subject is the artifact that it speaks of. `parse_statement` accepts exactly the bytes that `encode_statement`
writes, so unknown, missing, repeated and reordered keys are refused.

Everybody in the consortium reads the log. So a statement holds digests, names of sites, and what privacy cost;
no counts of patients, no names of datasets and no metrics of a single site. What a site may have to show an
auditor later stands there as a salted commitment (`privet.common.log.envelope.commit`).
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from privet.common.errors import ProtocolError
from privet.common.log.checkpoint import Quorum
from privet.common.log.note import COSIGNATURE, ED25519, NoteKey
from privet.common.study.sections import Name, Positive

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes in hexadecimal: a hash, or an Ed25519 public key."""
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
PrintableLine = Annotated[str, Field(max_length=300, pattern=r"^[ -~]*$")]
"""Printable ASCII, so that no terminal or log reader is led astray."""
Vkey = Annotated[str, Field(max_length=300, pattern=r"^[!-~]+$")]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
# JSON holds integers exactly below 2^53.
Natural = Annotated[int, Field(ge=0, lt=2**53)]
Time = Annotated[int, Field(ge=0, lt=2**53)]
"""Unix seconds by the author's own clock: for readers; no rule relies on it."""
NotNegative = Annotated[float, Field(ge=0)]
Names = tuple[Name, ...]


class StatementPart(BaseModel):
    """A part of a statement: frozen, strict about types, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Member(StatementPart):
    """A site of the consortium."""

    site: Name
    key: Hex32
    """Signs the site's statements."""
    witness: Vkey | None
    """Cosigns checkpoints; another key than `key`. Null for a site that does not: a note has room for few."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.witness is not None and _vkey(self.witness, COSIGNATURE).public.hex() == self.key:
            raise ValueError(f"{self.site}: the key of statements and that of cosignatures must differ")
        return self

    def publics(self) -> tuple[bytes, ...]:
        """Return the member's public keys, 32 bytes each."""
        witness = () if self.witness is None else (NoteKey.parse(self.witness).public,)
        return (bytes.fromhex(self.key), *witness)


class StatedFloor(StatementPart):
    """What every run of the consortium keeps to, whatever its study says; null leaves it to the sites."""

    max_epsilon: Positive | None = None
    """For one run."""
    max_delta: Positive | None = None
    min_sites: Annotated[int, Field(ge=1, lt=2**16)] = 1


class Mechanism(StatementPart):
    """A round's releases of one kind, as `privet.common.privacy.accounting.PrivacyEvent.document` gives them."""

    mechanism: Literal["poisson-subsampled-gaussian", "poisson-subsampled-shared-gaussian"]
    version: Literal[1]
    neighbouring: Literal["add-or-remove-one-unit"]
    unit: Literal["record", "patient"]
    noise_multiplier: Positive
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1, lt=2**53)]


class Privacy(StatementPart):
    """The promise of a run and the mechanism that keeps it."""

    epsilon: Positive
    """For a site that takes part in every round."""
    delta: Positive
    clip_norm: Positive
    accountant: PrintableLine
    """Name and version."""
    training: Mechanism
    """In one round."""
    validation: Mechanism | None


class Charge(StatementPart):
    """What a round cost a site's privacy account: one dataset at one delta, over all its runs."""

    account: Digest
    """The same for every round of the account, and telling nothing about the dataset."""
    training: Mechanism
    validation: Mechanism | None
    delta: Positive
    epsilon: NotNegative
    """Of the account after this round, at `delta`."""
    limit: Positive | None
    """The site's ceiling for it; null where its operator set none."""


class LedgerHead(StatementPart):
    """Where a site's privacy ledger stands."""

    sequence: Natural
    """Entries; it grows from statement to statement."""
    head: Digest
    previous: Digest | None
    """The head in the site's last statement in this log; null in its first."""


class SeenCheckpoint(StatementPart):
    """A checkpoint that a site saw. A forked log contradicts itself as soon as it holds one of the other branch."""

    size: Natural
    root: Hex32


class Genesis(StatementPart):
    """Leaf 0, by the coordinator: who belongs to the consortium and whose word counts."""

    type: Literal["genesis"] = "genesis"
    format: Literal[1] = 1
    time: Time
    consortium: Name
    log: Vkey
    """Signs checkpoints; its name is the log's origin."""
    coordinator: Hex32
    """Signs the coordinator's statements; another key than the log's."""
    members: tuple[Member, ...]
    """Ascending by site."""
    quorum: Natural
    """Cosignatures that a checkpoint needs."""
    floor: StatedFloor

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend([member.site for member in self.members], "members")
        keys = [_vkey(self.log, ED25519).public.hex(), self.coordinator]
        for member in self.members:
            keys += [key.hex() for key in member.publics()]
        if len(set(keys)) != len(keys):
            raise ValueError("every key of the consortium has one purpose and one owner")
        names = [NoteKey.parse(member.witness).name for member in self.members if member.witness is not None]
        if len(set(names)) != len(names):
            raise ValueError("every witness has a name of its own")
        _quorum(len([member for member in self.members if member.witness is not None]), self.quorum)
        return self

    def subject(self) -> dict[str, str]:
        """The log's key."""
        return {"log": _key_digest(NoteKey.parse(self.log).public)}


class Join(StatementPart):
    """A site joins, by the coordinator."""

    type: Literal["join"] = "join"
    format: Literal[1] = 1
    time: Time
    member: Member
    quorum: Natural
    """From here on."""

    def subject(self) -> dict[str, str]:
        """The site's key."""
        return {self.member.site: _key_digest(bytes.fromhex(self.member.key))}


class Revoke(StatementPart):
    """A site leaves or its keys are no longer trusted, by the coordinator."""

    type: Literal["revoke"] = "revoke"
    format: Literal[1] = 1
    time: Time
    site: Name
    key: Hex32
    reason: Literal["left", "key-compromise", "expelled"]
    quorum: Natural
    """From here on."""

    def subject(self) -> dict[str, str]:
        """The site's key."""
        return {self.site: _key_digest(bytes.fromhex(self.key))}


class RunOpen(StatementPart):
    """A study is started, by the coordinator."""

    type: Literal["run-open"] = "run-open"
    format: Literal[1] = 1
    time: Time
    run: Name
    study: Digest
    base: Digest
    """Of the base's files: the canonical JSON of names and digests."""
    tokenizer: Digest | None
    """Of what the study pins beside the weights, likewise; null where it pins nothing else."""
    software: Digest
    """Of what the coordinator runs: its modules and the versions of what they use."""
    adapter: Digest
    """That the first round starts from."""
    rounds: Annotated[int, Field(ge=1, lt=2**53)]
    min_sites: Annotated[int, Field(ge=1, lt=2**16)]
    secure_aggregation: Literal["masked", "plain"]
    privacy: Privacy | None
    """Null where the run is not private."""

    def subject(self) -> dict[str, str]:
        """The study and the first adapter."""
        return {"study": self.study, "adapter": self.adapter}


class RoundOpened(StatementPart):
    """A round is opened, by the coordinator. Accepted by the witnesses before any site trains."""

    type: Literal["round-open"] = "round-open"
    format: Literal[1] = 1
    time: Time
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    nonce: Nonce
    adapter: Digest
    """That the sites train from."""
    cohort: Names
    """Ascending."""
    parameters: Digest | None
    """Of what the parameters of secure aggregation follow from beside the study and this statement: the canonical JSON
    of the cohort's identity keys by site. Null in plain mode."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend(self.cohort, "cohort")
        return self

    def subject(self) -> dict[str, str]:
        """The adapter."""
        return {"adapter": self.adapter}


class SiteRound(StatementPart):
    """A site's part in a round, by the site, before its update leaves."""

    type: Literal["site-round"] = "site-round"
    format: Literal[1] = 1
    time: Time
    site: Name
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    opened: Digest
    """Hash of the leaf `round-open` that the site acted on."""
    policy: Digest
    ledger: LedgerHead | None
    """Null only in a simulation without ledgers."""
    charge: Charge | None
    """Null where the run is not private."""
    upload: Digest
    """Of what was sent: masked, where aggregation is secure."""
    checkpoint: SeenCheckpoint
    """The last one seen; it holds `opened`."""
    commitments: dict[Label, Digest] = {}
    """Salted commitments to what the site may show an auditor."""

    def subject(self) -> dict[str, str]:
        """The upload."""
        return {"upload": self.upload}


class RoundClose(StatementPart):
    """A round has given an adapter, by the coordinator. Accepted by the witnesses before the adapter is used."""

    type: Literal["round-close"] = "round-close"
    format: Literal[1] = 1
    time: Time
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    opened: Digest
    """Hash of the leaf `round-open`."""
    survivors: Names
    """Ascending."""
    failures: dict[Name, PrintableLine]
    """Why the others are missing, as far as known."""
    adapter_before: Digest
    adapter_after: Digest
    adapter_published: Digest
    """`adapter_after`, but for an early stop, which publishes that of an earlier round."""
    aggregation: Literal["fedsvd", "ffa", "fedavg"]
    transcript: Digest | None
    """Of the canonical JSON of what was masked with what (`masking` in the run's statement); null in plain mode."""
    metrics: dict[Label, float] | None
    """Over all survivors together, as noisy as the sites sent them."""
    epsilon: dict[Name, NotNegative] | None
    """Of each site in this run so far, rounded up to four places; null where the run is not private."""
    ended: bool
    """Whether the run is over."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend(self.survivors, "survivors")
        if self.adapter_published != self.adapter_after and not self.ended:
            raise ValueError("adapter_published: only a run that ends publishes an earlier adapter")
        return self

    def subject(self) -> dict[str, str]:
        """The adapter that was published."""
        return {"adapter": self.adapter_published}


class RoundAbort(StatementPart):
    """A round came to nothing, by the coordinator; its cost is kept.

    Under secure aggregation its number is spent; a plain round may be opened again, with another nonce.
    """

    type: Literal["round-abort"] = "round-abort"
    format: Literal[1] = 1
    time: Time
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    opened: Digest
    adapter: Digest
    """That stays in force."""
    failures: dict[Name, PrintableLine]
    """Why sites are missing, as far as known."""
    reason: PrintableLine
    epsilon: dict[Name, NotNegative] | None
    """Of each site in this run so far, rounded up to four places; null where the run is not private."""

    def subject(self) -> dict[str, str]:
        """The adapter."""
        return {"adapter": self.adapter}


class Refusal(StatementPart):
    """A site says no, by the site. No numbers that depend on data."""

    type: Literal["refusal"] = "refusal"
    format: Literal[2] = 2
    time: Time
    site: Name
    run: Name
    study: Digest
    """What was asked of it in the run's name, so that no other study can be put in its place."""
    round: Natural
    """0 where it refuses the run."""
    code: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]
    rule: PrintableLine
    asked: PrintableLine
    allowed: PrintableLine
    policy: Digest

    def subject(self) -> dict[str, str]:
        """The site's policy."""
        return {"policy": self.policy}


class Export(StatementPart):
    """An adapter is released, by the coordinator."""

    type: Literal["export"] = "export"
    format: Literal[1] = 1
    time: Time
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    """After which it was published."""
    adapter: Digest
    files: Annotated[dict[Label, Digest], Field(min_length=1)]

    def subject(self) -> dict[str, str]:
        """The files."""
        return dict(self.files)


Statement = Genesis | Join | Revoke | RunOpen | RoundOpened | SiteRound | RoundClose | RoundAbort | Refusal | Export
"""What `parse_statement` returns. Of each, `subject` gives the artifacts that it speaks of: digests by name."""


def _ascend(names: tuple[str, ...] | list[str], what: str) -> None:
    if not all(a < b for a, b in pairwise(names)):
        raise ValueError(f"{what}: names ascend, and none stands twice")


def _vkey(text: str, kind: int) -> NoteKey:
    try:
        key = NoteKey.parse(text)
    except ProtocolError as error:
        raise ValueError(error.message) from None
    if key.kind != kind:
        raise ValueError(f"expected a vkey of type {kind}, got type {key.kind}")
    return key


def _quorum(witnesses: int, needed: int) -> None:
    try:
        Quorum(witnesses, needed)
    except ProtocolError as error:
        raise ValueError(error.message) from None


def _key_digest(public: bytes) -> str:
    return "sha256:" + hashlib.sha256(public).hexdigest()
