"""The messages between a site and the consortium service: frozen, in canonical JSON, and read strictly.

A site joins with a `JoinRequest`, which holds its public keys and the proof that it has the identity key. The request
is the same over the network and in a file, and so is the `JoinReply`. The operators of site and coordinator compare
the fingerprint of the same bytes: `SiteKeys.fingerprint`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, ProtocolError
from privet.common.log.encoding import one_line
from privet.common.log.mldsa import Use
from privet.common.log.note import COSIGNATURE, VKEY_CHARACTERS, NoteKey, is_weak
from privet.common.log.proofs import prove, proves
from privet.common.log.renewal import check_renewal, renewal_text
from privet.common.log.statements import LATER, Hex32, Label, Member, Proof
from privet.common.pki.addresses import ADDRESS_PATTERN
from privet.common.pki.certificates import SKEW, fingerprint, key_bytes, read_request, same_fingerprint
from privet.common.pki.words import same_words, words_of
from privet.common.study.sections import Name

SERVICE, ENROLMENT = "privet.Consortium", "privet.Enrolment"
"""Names of the gRPC services: for members, with mutual TLS; for enrolment, with a certificate of the server alone."""
_VERSION = "run the same version of privet at the site and at the coordinator"
MAX_MESSAGE_BYTES = 1 << 20
"""Largest size of a message, in either direction."""
MAX_LEAVES = 256
"""Largest number of leaves in one reply. Long leaves make it smaller."""
PART_BYTES = MAX_MESSAGE_BYTES // 2
"""Most bytes of a released file in one reply; base64 adds a third."""

_JOINS, _RETURNS = b"privet-join/1\x00", b"privet-return/1\x00"
LongText = Annotated[str, Field(max_length=200_000)]
LogText = Annotated[str, Field(max_length=600_000)]
"""A checkpoint or a policy: 99 witnesses with hybrid keys make some 460,000 characters."""
Short = Annotated[str, Field(max_length=4096)]
Address = Annotated[str, Field(pattern=ADDRESS_PATTERN)]
Base64 = Annotated[str, Field(max_length=90_000, pattern=r"^[A-Za-z0-9+/]*={0,2}$")]
Size = Annotated[int, Field(ge=0, lt=2**53)]
_M = TypeVar("_M", bound="Spoken")


class Spoken(BaseModel):
    """A message: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def encode(self) -> bytes:
        """Return canonical JSON."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def decode(cls: type[_M], data: bytes) -> _M:
        """Read a message.

        Raises:
            ProtocolError: It is longer than 1 MiB, or is not such a message.
        """
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"message {cls.__name__}: expected at most {MAX_MESSAGE_BYTES} bytes, found {len(data)}", _VERSION
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            # The location of an unknown key ends with the key, which the sender chose. An error must not quote it.
            place = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
            where = ".".join(str(part) for part in place)[:200]
            raise ProtocolError(
                f"message {cls.__name__}: {one_line(where)}: {one_line(first['msg'])}", _VERSION
            ) from None


class SiteKeys(Spoken):
    """A site's public keys, each for one purpose."""

    site: Name
    identity: Hex32
    """Ed25519: signs the site's statements and its messages of secure aggregation. The other sites pin it."""
    witness: Short
    """C2SP vkey: cosigns the log's checkpoints. The ML-DSA-65 key in a hybrid one signs the site's statements too."""
    node: Short
    """ECDSA P-384, as OpenSSH writes it: authenticates the site's node to Flower's SuperLink."""
    request: Short
    """Certificate signing request (PEM, P-256) for TLS."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            witness = NoteKey.parse(self.witness)
            read_request(self.request)
        except PrivetError as error:
            raise ValueError(error.message) from None
        if witness.kind != COSIGNATURE or witness.name != self.site or witness.public.hex() == self.identity:
            raise ValueError("witness: expected a cosigning vkey with the site's name and another key than identity")
        # Anybody signs under such a key: with the identity, a consent and a request for a certificate.
        if is_weak(bytes.fromhex(self.identity)) or is_weak(witness.public):
            raise ValueError("identity, witness: expected keys that are not of small order")
        _check_node(self.node)
        return self

    @property
    def member(self) -> Member:
        """The site as the log's statements name it."""
        return Member(site=self.site, key=self.identity, witness=self.witness)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the name and all four keys, which the operators of site and coordinator compare."""
        return fingerprint(self._compared())

    @property
    def words(self) -> str:
        """The same keys as twelve words, which are easier to read out."""
        return words_of(self._compared())

    def is_told(self, told: str) -> bool:
        """Return whether what a person typed, words or digits, stands for these keys."""
        return same_words(told, self.words) or same_fingerprint(told, self.fingerprint)

    def _compared(self) -> bytes:
        tls = key_bytes(read_request(self.request)).hex()
        return canonical_json({**self.model_dump(exclude={"request"}), "tls": tls})


class JoinRequest(Spoken):
    """A site asks to join."""

    secret: Hex32
    """Secret of the invitation token."""
    keys: SiteKeys
    proof: Proof
    """Signature of the identity key over secret and keys, so that nobody can join with copied public keys; and of the
    ML-DSA-65 key, where there is one."""

    @classmethod
    def make(
        cls, secret: bytes, keys: SiteKeys, identity: Ed25519PrivateKey, pq: MLDSA65PrivateKey | None = None
    ) -> JoinRequest:
        """Make the request of a site that holds the identity key, and the ML-DSA-65 key if it has one."""
        proof = prove(_proven(secret.hex(), keys), identity, pq, Use.JOINING)
        return cls(secret=secret.hex(), keys=keys, proof=proof)

    @model_validator(mode="after")
    def _proved(self) -> Self:
        keys, pq = (bytes.fromhex(self.keys.identity),), NoteKey.parse(self.keys.witness).pq
        if not proves((*keys, pq) if pq else keys, self.proof, _proven(self.secret, self.keys), Use.JOINING):
            raise ValueError("proof: expected a signature of each identity key over secret and keys")
        return self

    @property
    def digest(self) -> str:
        """Digest of the whole request. A token serves one request, which the site may repeat if the reply is lost."""
        return digest(self.encode())


class Terms(Spoken):
    """The facts that a member needs about its consortium."""

    consortium: Name
    address: Address
    """Host and port of the service for members."""
    enrolment: Address
    """Host and port of the service for enrolment, and for sites whose certificate has expired."""
    fleet: Address
    """Host and port to which the site's node connects for studies."""
    coordinator: Hex32
    """Ed25519: signs the coordinator's statements."""
    log: Annotated[Annotated[str, Field(max_length=VKEY_CHARACTERS)] | None, LATER] = None
    """Key of the round log (vkey); None from an earlier version."""
    colluding: Annotated[Annotated[int, Field(ge=0, le=1000)] | None, LATER] = None
    """f: number of members that may collude with the coordinator; None from an earlier version."""
    policy: LogText
    """C2SP policy of the log: its key, the witnesses' keys, and the number of cosignatures needed. It is a claim: a
    site derives its own from the keys that it trusts."""
    members: tuple[SiteKeys, ...]
    """Ascending by name. Certificate requests are included, so that fingerprints can be computed."""


class JoinReply(Spoken):
    """The reply to a join request: pending until the operators have compared the keys, then certificate and terms."""

    state: Literal["pending", "member"]
    fingerprint: Short
    """Fingerprint of the keys as they arrived. The site compares it with that of the keys that it sent."""
    certificate: Short = ""
    terms: Terms | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.state == "member") != (self.terms is not None and bool(self.certificate)):
            raise ValueError("expected certificate and terms for a member, and neither of them before")
        return self


class Nothing(Spoken):
    """A request without fields."""


class Status(Spoken):
    """The state of a member, as the service sees it."""

    site: Name
    valid_until: Size
    """End of the life of the certificate that the member used, in Unix seconds."""
    time: Size
    """Time by the service's clock, in Unix seconds. `privet site doctor` compares it with the site's."""
    members: Size
    leaves: Size


class RenewRequest(Spoken):
    """A member with a valid certificate asks for a new one."""

    request: Short


class KeysRequest(Spoken):
    """A member that joined with Ed25519 keys alone asks to have an ML-DSA-65 key besides."""

    witness: Short
    """Its cosigning vkey, with the new key in it."""
    proof: Proof
    """Signatures by the member's identity key and by the new key (`privet.common.log.renewal`)."""

    @classmethod
    def make(
        cls, consortium: str, present: SiteKeys, witness: str, identity: Ed25519PrivateKey, pq: MLDSA65PrivateKey
    ) -> KeysRequest:
        """Make the request of a member that holds both keys."""
        renewed = present.model_copy(update={"witness": witness})
        proof = prove(renewal_text(consortium, present.member, renewed.member), identity, pq, Use.RENEWAL)
        return cls(witness=witness, proof=proof)

    def keys(self, consortium: str, present: SiteKeys) -> SiteKeys:
        """Return the member's keys with the new one.

        Raises:
            ProtocolError: They are no keys of a site.
            VerificationError: As `privet.common.log.renewal.check_renewal`.
        """
        renewed = SiteKeys.decode(canonical_json({**present.model_dump(mode="json"), "witness": self.witness}))
        if renewed != present:  # otherwise they were renewed before, and the reply was lost
            check_renewal(consortium, present.member, renewed.member, self.proof)
        return renewed


class ReturnRequest(Spoken):
    """A member whose certificate has expired, or was replaced, asks for a new one.

    An attacker who replays the request gets a certificate that only the holder of the key in the request can use. But
    the replay would replace a certificate that the site has got since, so a request is fresh for five minutes only.
    """

    site: Name
    request: Short
    time: Size
    """Time of the request, in Unix seconds."""
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    """Signature of the member's identity key over all other fields."""

    @classmethod
    def make(cls, site: str, request: str, identity: Ed25519PrivateKey, now: datetime) -> ReturnRequest:
        """Make the request of a member that holds the identity key."""
        time = int(now.timestamp())
        return cls(site=site, request=request, time=time, proof=identity.sign(_returns(site, request, time)).hex())

    def proves(self, identity: str) -> bool:
        """Return whether the identity key, in hexadecimal, signed this request."""
        return _signed(identity, self.proof, _returns(self.site, self.request, self.time))

    def is_fresh(self, now: datetime) -> bool:
        """Return whether the time of the request is within five minutes of `now`."""
        return abs(now.timestamp() - self.time) <= SKEW.total_seconds()


class RenewReply(Spoken):
    """The new certificate."""

    certificate: Short


class Proposal(Spoken):
    """A run whose study is proposed to the members. The study's text is a claim: a site computes its digest itself."""

    run: Name
    study: LongText
    """The study in canonical JSON."""
    round: Size
    """Number of closed rounds."""
    ended: bool


class ProposalsReply(Spoken):
    """The coordinator's runs, newest first, as many as fit."""

    runs: Annotated[tuple[Proposal, ...], Field(max_length=100)]


class CheckpointReply(Spoken):
    """The log's newest checkpoint, with its cosignatures so far; empty if the log is empty."""

    note: LogText


class LeavesRequest(Spoken):
    """Asks for leaves from a number on."""

    first: Size


class LeavesReply(Spoken):
    """As many leaves as fit, in base64. No leaves: the log ends there."""

    leaves: Annotated[tuple[Base64, ...], Field(max_length=MAX_LEAVES)]


class ConsistencyRequest(Spoken):
    """Asks for a proof that the tree of `new` leaves extends that of `old` leaves."""

    old: Size
    new: Size


class InclusionRequest(Spoken):
    """Asks for a proof that a leaf is in the tree of `size` leaves."""

    index: Size
    size: Size


class ReleasedRequest(Spoken):
    """Asks for a part of a file that a run released."""

    run: Name
    file: Label
    first: Size
    """Number of the first byte."""


class ReleasedReply(Spoken):
    """A part of a file, in base64: at most `PART_BYTES` bytes."""

    part: Annotated[str, Field(max_length=4 * (PART_BYTES + 2) // 3, pattern=r"^[A-Za-z0-9+/]*={0,2}$")]
    size: Size
    """Of the whole file."""


class ReviewRequest(Spoken):
    """A site's review of a candidate: its signed statement, in base64, for the round log."""

    statement: Base64


class ProofReply(Spoken):
    """The hashes of a proof."""

    hashes: Annotated[tuple[Hex32, ...], Field(max_length=128)]


def _proven(secret: str, keys: SiteKeys) -> bytes:
    return _JOINS + canonical_json({"secret": secret, "keys": keys.model_dump(mode="json")})


def _returns(site: str, request: str, time: int) -> bytes:
    return _RETURNS + canonical_json({"site": site, "request": request, "time": time})


def _signed(key: str, signature: str, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _check_node(text: str) -> None:
    try:
        key = load_ssh_public_key(text.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("node: expected a public key in OpenSSH format") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("node: expected an ECDSA key on P-384")
    # One key has one text. Otherwise a site could join with the node key of another, written in another way.
    if key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii") != text:
        raise ValueError("node: expected the key alone, as OpenSSH writes it")
