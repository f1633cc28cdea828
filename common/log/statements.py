"""The statements of the round log: fifteen kinds of in-toto statements, frozen and strictly validated.

Each is the predicate of an in-toto Statement v1. Its `type` and `format` give the predicate's type, and its
subject is the artifact that it is about. `parse_statement` accepts exactly the bytes that `encode_statement`
writes (`privet.common.log.encoding`), so unknown, missing, repeated and reordered keys are refused.

Everyone in the consortium reads the log. So a statement holds digests, names of sites and privacy costs. It holds
no counts of patients, no names of datasets and no metrics of a single site, but for counts of canaries that the site
made up. A value that a site may have to show an auditor later is held as a salted commitment
(`privet.common.log.envelope.commit`).
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from privet.common.errors import ProtocolError
from privet.common.log.checkpoint import Quorum
from privet.common.log.mldsa import SIGNATURE_BYTES
from privet.common.log.note import COSIGNATURE, ED25519, VKEY_CHARACTERS, NoteKey, is_weak
from privet.common.study.sections import MOST_BAND, MOST_CANARIES, Name, Positive

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes in hexadecimal: a hash, or an Ed25519 public key."""
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
"""An Ed25519 signature in hexadecimal."""
Proof = Annotated[str, Field(pattern=rf"^[0-9a-f]{{128}}([0-9a-f]{{{2 * SIGNATURE_BYTES}}})?$")]
"""An Ed25519 signature in hexadecimal, followed by one with ML-DSA-65 where the key is hybrid."""
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
PrintableLine = Annotated[str, Field(max_length=300, pattern=r"^[ -~]*$")]
"""Printable ASCII, so that a text cannot steer a terminal or confuse a reader of the log."""
Vkey = Annotated[str, Field(max_length=VKEY_CHARACTERS, pattern=r"^[!-~]+$")]
"""A key that signs notes. The ML-DSA-65 key in a hybrid one signs its owner's statements as well."""
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")]
# JSON holds integers exactly below 2^53.
Natural = Annotated[int, Field(ge=0, lt=2**53)]
Time = Annotated[int, Field(ge=0, lt=2**53)]
"""Unix seconds by the author's own clock. They inform readers; no rule relies on them."""
NotNegative = Annotated[float, Field(ge=0)]
Names = tuple[Name, ...]
Tested = Literal["canary", "membership", "repeated"]
"""A condition of a gate that a site tests."""
LATER = Field(exclude_if=lambda value: value is None)
"""A field that earlier versions do not have. It is left out where it is empty, so that their bytes stay the same."""


class StatementPart(BaseModel):
    """A part of a statement: frozen, strict about types, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Member(StatementPart):
    """A site of the consortium."""

    site: Name
    key: Hex32
    """Signs the site's statements."""
    witness: Vkey | None
    """Cosigns checkpoints, and differs from `key`. Null for a site that does not cosign: a note has room for few."""

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.witness is not None and _vkey(self.witness, COSIGNATURE).public.hex() == self.key:
            raise ValueError(f"{self.site}: the keys of statements and of cosignatures must differ")
        return self

    def publics(self) -> tuple[bytes, ...]:
        """Return the member's public keys: 32 bytes each, and 1,952 for ML-DSA-65."""
        witness = () if self.witness is None else NoteKey.parse(self.witness).publics
        return (bytes.fromhex(self.key), *witness)


class StatedFloor(StatementPart):
    """Limits for every run of the consortium, whatever its study says. Null leaves a limit to the sites."""

    max_epsilon: Positive | None = None
    """For one run."""
    max_delta: Positive | None = None
    min_sites: Annotated[int, Field(ge=1, lt=2**16)] = 1


class Mechanism(StatementPart):
    """The releases of a round of one kind, as `privet.common.privacy.accounting.PrivacyEvent.document` gives them."""

    mechanism: Literal[
        "poisson-subsampled-gaussian",
        "poisson-subsampled-shared-gaussian",
        "poisson-subsampled-shared-banded-gaussian",
    ]
    version: Literal[1]
    neighbouring: Literal["add-or-remove-one-unit"]
    unit: Literal["record", "patient"]
    noise_multiplier: Positive
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1, lt=2**53)]
    band: Annotated[int | None, Field(ge=2, le=MOST_BAND, exclude_if=lambda value: value is None)] = None
    """Number of classes of units, of which a round draws one: that of its number modulo the band. Banded noise only."""


class Privacy(StatementPart):
    """The privacy promise of a run, and the mechanisms that keep it."""

    epsilon: Positive
    """For a site that takes part in every round."""
    delta: Positive
    clip_norm: Positive
    accountant: PrintableLine
    """Name and version."""
    training: Mechanism
    """In one round."""
    validation: Mechanism | None
    head: Annotated[Mechanism | None, LATER] = None
    """Of round 1 instead of `training`, where that is a head start before rounds that train."""

    def of_round(self, number: int) -> tuple[Mechanism, Mechanism | None]:
        """Return the mechanisms of round `number`: of training, and of validation."""
        return self.head if self.head is not None and number == 1 else self.training, self.validation


class Charge(StatementPart):
    """The cost of a round to a site's privacy account. An account is one dataset at one delta, over all its runs."""

    account: Digest
    """Identifies the account in all its rounds, and reveals nothing about the dataset."""
    training: Mechanism
    validation: Mechanism | None
    delta: Positive
    epsilon: NotNegative
    """Of the account after this round, at `delta`: everything charged, composed as if it had been fixed in advance.
    Where noise is shared, it holds against the coordinator with the corrupt sites that the studies allow for."""
    limit: Positive | None
    """The site's limit for that epsilon; null if its operator set none."""


class LedgerHead(StatementPart):
    """The head of a site's privacy ledger."""

    sequence: Natural
    """Number of entries. It never falls from one statement to the next."""
    head: Digest
    previous: Digest | None
    """The head in the site's last statement in this log; null in its first."""


class SeenCheckpoint(StatementPart):
    """A checkpoint that a site saw. A forked log contradicts itself as soon as it quotes one of the other branch."""

    size: Natural
    root: Hex32


class Genesis(StatementPart):
    """Leaf 0, by the coordinator: the members of the consortium, and the keys whose statements count."""

    type: Literal["genesis"] = "genesis"
    format: Literal[1] = 1
    time: Time
    consortium: Name
    log: Vkey
    """Signs checkpoints; its name is the log's origin."""
    coordinator: Hex32
    """Signs the coordinator's statements. It differs from the log's key."""
    members: tuple[Member, ...]
    """Ascending by site."""
    quorum: Natural
    """Number of cosignatures that a checkpoint needs."""
    floor: StatedFloor

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend([member.site for member in self.members], "members")
        keys = [*(key.hex() for key in _vkey(self.log, ED25519).publics), self.coordinator]
        for member in self.members:
            keys += [key.hex() for key in member.publics()]
        if len(set(keys)) != len(keys):
            raise ValueError("each key of the consortium must have one purpose and one owner; a key is named twice")
        names = [NoteKey.parse(member.witness).name for member in self.members if member.witness is not None]
        if len(set(names)) != len(names):
            raise ValueError("each witness must have its own name; a name is used twice")
        _quorum(len([member for member in self.members if member.witness is not None]), self.quorum)
        return self

    @property
    def joining(self) -> tuple[Member, ...]:
        """The members that this statement adds."""
        return self.members

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
    """Number of cosignatures that a checkpoint needs from here on."""

    @property
    def joining(self) -> tuple[Member, ...]:
        """The member that this statement adds."""
        return (self.member,)

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
    """Number of cosignatures that a checkpoint needs from here on."""

    def subject(self) -> dict[str, str]:
        """The site's key."""
        return {self.site: _key_digest(bytes.fromhex(self.key))}


class Renew(StatementPart):
    """A member has an ML-DSA-65 key from the next leaf on, beside its Ed25519 keys, which stay; by the coordinator."""

    type: Literal["renew"] = "renew"
    format: Literal[1] = 1
    time: Time
    member: Member
    """With the new key in the vkey of its witness."""
    proof: Proof
    """Signatures by the member's identity key and by the new key (`privet.common.log.renewal`)."""

    def subject(self) -> dict[str, str]:
        """The site's key."""
        return {self.member.site: _key_digest(bytes.fromhex(self.member.key))}


class Rotate(StatementPart):
    """The keys of log and coordinator are replaced, by the coordinator, signed with the key that ends here.

    The new keys count from the next leaf on, and for checkpoints that contain this leaf (`privet.common.log.epochs`).
    """

    type: Literal["rotate"] = "rotate"
    format: Literal[1] = 1
    time: Time
    log: Vkey
    """Signs checkpoints from here on. Its name is the log's origin, as before."""
    coordinator: Hex32
    """Signs the coordinator's statements from here on."""
    charter: Digest
    """Of the charter with these keys. Each site compares it with the charter that its operator confirmed."""
    log_proof: Proof
    """Signature by the new key of the log over its place (`privet.common.log.epochs.possession_text`)."""
    coordinator_proof: Hex64
    """Signature by the new key of the coordinator over the same."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        log, coordinator = _vkey(self.log, ED25519).public, bytes.fromhex(self.coordinator)
        if log == coordinator:
            raise ValueError("the keys of log and coordinator must differ")
        if is_weak(log) or is_weak(coordinator):
            raise ValueError("expected keys that are not of small order")
        return self

    def subject(self) -> dict[str, str]:
        """Both keys."""
        log = NoteKey.parse(self.log).public
        return {"coordinator": _key_digest(bytes.fromhex(self.coordinator)), "log": _key_digest(log)}


class StatedGate(StatementPart):
    """The conditions under which an adapter of a run may leave (`privet.common.log.gate`). Null leaves one out."""

    signatures: Annotated[int, Field(ge=1, lt=2**16)]
    """Number of sites that must sign."""
    days: Annotated[int, Field(ge=1, le=3650)]
    """Most days that a signature counts."""
    canaries: Annotated[int, Field(ge=20, le=MOST_CANARIES)] | None
    """Least number of canaries of a site's audit."""
    epsilon: Positive | None
    """Largest lower bound on epsilon that canaries may show; null without canaries."""
    membership: Annotated[float, Field(gt=0.5, le=1)] | None
    repeated: Annotated[float, Field(gt=0, le=1)] | None
    metric: Label | None
    """Name of a metric of the rounds."""
    least: float | None
    """Its least value, of a loss its negative; null without a metric."""

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if (self.canaries is None) != (self.epsilon is None) or (self.metric is None) != (self.least is None):
            raise ValueError("expected canaries with an epsilon, and a metric with its least value")
        return self


class CanaryCounts(StatementPart):
    """The guesses about canaries that a site planted (`privet.common.privacy.one_run`). Records decide none of them."""

    planted: Annotated[int, Field(ge=20, le=MOST_CANARIES)]
    """Of which a fair coin included each. Whoever replays the log computes a bound of it, in time and memory that rise
    with it."""
    guesses: Natural
    """Of the best try."""
    right: Natural

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.right <= self.guesses <= self.planted:
            raise ValueError("expected right <= guesses <= planted")
        return self


class RunOpen(StatementPart):
    """A study is started, by the coordinator."""

    type: Literal["run-open"] = "run-open"
    format: Literal[1] = 1
    time: Time
    run: Name
    study: Digest
    base: Digest
    """Of the base's weight files: digest of the canonical JSON of their names and digests."""
    tokenizer: Digest | None
    """Of all other files that the study pins, likewise; null if it pins no other file."""
    software: Digest
    """Of the coordinator's software: the modules of privet and the versions of its libraries."""
    adapter: Digest
    """Of the adapter that the first round starts from."""
    rounds: Annotated[int, Field(ge=1, lt=2**53)]
    min_sites: Annotated[int, Field(ge=1, lt=2**16)]
    secure_aggregation: Literal["masked", "plain"]
    privacy: Privacy | None
    """Null if the run is not private."""
    gate: Annotated[StatedGate | None, LATER] = None
    """Where the study has a gate: without an accepted egress decision, nothing of the run is exported."""

    def subject(self) -> dict[str, str]:
        """The study and the first adapter."""
        return {"study": self.study, "adapter": self.adapter}


class RoundOpened(StatementPart):
    """A round is opened, by the coordinator. The witnesses accept it before any site trains."""

    type: Literal["round-open"] = "round-open"
    format: Literal[1] = 1
    time: Time
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    nonce: Nonce
    adapter: Digest
    """Of the adapter that the sites train from."""
    cohort: Names
    """Ascending."""
    parameters: Digest | None
    """Of the cohort's identity keys: digest of their canonical JSON by site. With the study and this statement, they
    determine the parameters of secure aggregation. Null in plain mode."""
    participants: Annotated[Names | None, LATER] = None
    """Ascending: the sites that consented, from which the cohort was drawn; left out where all of them are in it."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend(self.cohort, "cohort")
        if self.participants is not None:
            _ascend(self.participants, "participants")
            if not set(self.participants) > set(self.cohort):
                raise ValueError("participants: expected the cohort and others, or nothing")
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
    """Null if the run is not private."""
    upload: Digest
    """Of the bytes that the site sent; under secure aggregation, of the masked vector."""
    checkpoint: SeenCheckpoint
    """The last checkpoint that the site saw. It holds the leaf `opened`."""
    commitments: dict[Label, Digest] = {}
    """Salted commitments to values that the site may show an auditor."""

    def subject(self) -> dict[str, str]:
        """The upload."""
        return {"upload": self.upload}


class RoundClose(StatementPart):
    """A round has produced an adapter, by the coordinator. The witnesses accept it before the adapter is used."""

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
    """Why the other sites of the cohort are missing, as far as known."""
    adapter_before: Digest
    adapter_after: Digest
    adapter_published: Digest
    """`adapter_after`; after an early stop, the adapter of an earlier round; or an `average`."""
    aggregation: Literal["fedsvd", "ffa", "fedavg"]
    transcript: Digest | None
    """Of the canonical JSON of `masking` in the run's statement of the round; null in plain mode."""
    metrics: dict[Label, float] | None
    """Over all survivors together, with the noise that the sites added."""
    epsilon: dict[Name, NotNegative] | None
    """Of each site in this run so far, rounded up to four places; null if the run is not private."""
    ended: bool
    """Whether the run is over."""
    spoiled: Annotated[tuple[Names, ...] | None, LATER] = None
    """The sites of each masked sum that could not be used, ascending; no names stand for the whole cohort. The field is
    left out where there is no such sum."""
    left_out: Annotated[Names | None, LATER] = None
    """Sites that are known by now to spoil, and take part no longer: those that this round adds."""
    average: Annotated[Literal["tail", "exponential"] | None, LATER] = None
    """Of the last round: the published adapter is this average of `adapter_after` of closed rounds, as the study says
    (`privet.common.study.average`)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend(self.survivors, "survivors")
        if self.adapter_published != self.adapter_after and not self.ended:
            raise ValueError("adapter_published: only a run that ends publishes an earlier adapter")
        if self.average is not None and not self.ended:
            raise ValueError("average: only a run that ends publishes one")
        _check_spoiled(self.spoiled, self.left_out)
        return self

    def subject(self) -> dict[str, str]:
        """The adapter that was published."""
        return {"adapter": self.adapter_published}


class RoundAbort(StatementPart):
    """A round is aborted, by the coordinator. Sites keep its privacy cost.

    Under secure aggregation its number is used up. A plain round may be opened again, with another nonce.
    """

    type: Literal["round-abort"] = "round-abort"
    format: Literal[1] = 1
    time: Time
    run: Name
    round: Annotated[int, Field(ge=1, lt=2**53)]
    opened: Digest
    adapter: Digest
    """Of the adapter that stays in force."""
    failures: dict[Name, PrintableLine]
    """Why sites are missing, as far as known."""
    reason: PrintableLine
    epsilon: dict[Name, NotNegative] | None
    """Of each site in this run so far, rounded up to four places; null if the run is not private."""
    spoiled: Annotated[tuple[Names, ...] | None, LATER] = None
    """As in a round-close."""
    left_out: Annotated[Names | None, LATER] = None
    """As in a round-close."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_spoiled(self.spoiled, self.left_out)
        return self

    def subject(self) -> dict[str, str]:
        """The adapter."""
        return {"adapter": self.adapter}


class Refusal(StatementPart):
    """A site refuses a run or a round, by the site. No number in it depends on data."""

    type: Literal["refusal"] = "refusal"
    format: Literal[2] = 2
    time: Time
    site: Name
    run: Name
    study: Digest
    """The study that the site was asked to take part in, so that the refusal cannot be used for another study."""
    round: Natural
    """0 if the site refuses the run."""
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
    """The round after which the adapter was published."""
    adapter: Digest
    files: Annotated[dict[Label, Digest], Field(min_length=1)]

    def subject(self) -> dict[str, str]:
        """The files."""
        return dict(self.files)


class AdapterState(StatementPart):
    """A released adapter is superseded, retired or revoked, by the coordinator. Sites then refuse to use a revoked one.

    Nothing can be taken back that a site has: it is told, and its own software obeys.
    """

    type: Literal["adapter-state"] = "adapter-state"
    format: Literal[1] = 1
    time: Time
    run: Name
    """The run that released it."""
    adapter: Digest
    state: Literal["superseded", "retired", "revoked"]
    by: Name | None
    """The run whose release supersedes it; null in the other states."""
    reason: Annotated[PrintableLine, Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.state == "superseded") != (self.by is not None):
            raise ValueError("by: expected the name of a run exactly where the state is superseded")
        return self

    def subject(self) -> dict[str, str]:
        """The adapter."""
        return {"adapter": self.adapter}


class EgressReview(StatementPart):
    """A site has tested the candidate of a run whose study has a gate, and signs or refuses it; by the site.

    Its figures about its own records stay at the site. It can open the commitment `test` to an auditor.
    """

    type: Literal["egress-review"] = "egress-review"
    format: Literal[1] = 1
    time: Time
    """Counts: the review holds from here until `expires`."""
    site: Name
    run: Name
    study: Digest
    adapter: Digest
    verdict: Literal["signed", "refused"]
    tested: Annotated[tuple[Tested, ...], Field(max_length=3)]
    """The conditions that its own test covered, ascending. Of a signature: and met."""
    failed: Annotated[tuple[Tested, ...], Field(max_length=3)]
    """Those that its own test found broken, ascending. Only of a refusal."""
    canaries: CanaryCounts | None
    """Null where it tested no canaries."""
    test: Digest | None
    """Salted commitment to the figures of its test; null if it made none."""
    reason: PrintableLine
    """Of a refusal."""
    expires: Time
    """Unix seconds from which it does not count."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend(self.tested, "tested")
        _ascend(self.failed, "failed")
        if not set(self.failed) <= set(self.tested):
            raise ValueError("failed: expected conditions that were tested")
        if ("canary" in self.tested) != (self.canaries is not None):
            raise ValueError("canaries: expected counts exactly where canaries were tested")
        if (self.test is None) != (not self.tested):
            raise ValueError("test: expected a commitment exactly where something was tested")
        if self.verdict == "signed" and (self.failed or self.reason):
            raise ValueError("failed, reason: expected none with a signature")
        if self.verdict == "refused" and not self.reason:
            raise ValueError("reason: expected one with a refusal")
        if self.expires <= self.time:
            raise ValueError("expires: expected a time after `time`")
        return self

    def subject(self) -> dict[str, str]:
        """The candidate."""
        return {"adapter": self.adapter}


class EgressDecision(StatementPart):
    """Whether the candidate of a run may leave, by the coordinator. All but reason and time follow from the log."""

    type: Literal["egress-decision"] = "egress-decision"
    format: Literal[1] = 1
    time: Time
    """Counts: reviews that have expired by then are not counted."""
    run: Name
    study: Digest
    adapter: Digest
    verdict: Literal["accepted", "refused"]
    epsilon: NotNegative | None
    """Most that a site has spent in the run; null if it is not private."""
    bound: NotNegative | None
    """Largest lower bound on epsilon that the reviews' canaries show, with two places; null where none was audited."""
    quality: float | None
    """Last value of the gate's metric, of a loss its negative; null without a metric, or without a value."""
    signed: Names
    """The sites whose signatures count, ascending."""
    refused: Names
    """The sites whose refusals count, ascending."""
    reason: PrintableLine
    """Of a refusal."""
    expires: Time | None
    """Unix seconds from which nothing is exported under it: when the first signature ends. Null with a refusal."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ascend(self.signed, "signed")
        _ascend(self.refused, "refused")
        accepted = self.verdict == "accepted"
        if accepted != (self.expires is not None) or accepted != (not self.reason):
            raise ValueError("expires, reason: expected an expiry if accepted, and a reason if refused")
        return self

    def subject(self) -> dict[str, str]:
        """The candidate."""
        return {"adapter": self.adapter}


Statement = (
    Genesis
    | Join
    | Revoke
    | Renew
    | Rotate
    | RunOpen
    | RoundOpened
    | SiteRound
    | RoundClose
    | RoundAbort
    | Refusal
    | Export
    | AdapterState
    | EgressReview
    | EgressDecision
)
"""Any statement. Its `subject` returns the artifacts that it is about: digests by name."""


def _check_spoiled(spoiled: tuple[Names, ...] | None, left_out: Names | None) -> None:
    if spoiled == () or left_out == ():
        raise ValueError("spoiled, left_out: expected names, or nothing")
    for names in spoiled or ():
        _ascend(names, "spoiled")
    _ascend(left_out or (), "left_out")


def _ascend(names: tuple[str, ...] | list[str], what: str) -> None:
    if not all(a < b for a, b in pairwise(names)):
        raise ValueError(f"{what}: names must be in ascending order, each once")


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
