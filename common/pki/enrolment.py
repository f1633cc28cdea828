"""What a site and the consortium service say to each other: frozen messages in canonical JSON, strictly read.

A site joins with a `JoinRequest`, made of its public keys and proof that it has the private ones. The request is one
and the same over the network and in a file, and so is the `JoinReply`. Everybody compares fingerprints of the same
bytes: `SiteKeys.fingerprint`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, ProtocolError
from privet.common.log.encoding import one_line
from privet.common.log.note import COSIGNATURE, NoteKey
from privet.common.log.statements import Hex32, Member
from privet.common.pki.certificates import ADDRESS_PATTERN, SKEW, fingerprint, key_bytes, read_request
from privet.common.study.sections import Name

SERVICE, ENROLMENT = "privet.Consortium", "privet.Enrolment"
"""Names of the gRPC services: for members, with mutual TLS; and for joining, with the server's certificate alone."""
MAX_MESSAGE_BYTES = 1 << 20
"""Of one message, either way."""
MAX_LEAVES = 256
"""In one answer; fewer where they are long."""

_JOINS, _RETURNS = b"privet-join/1\x00", b"privet-return/1\x00"
LongText = Annotated[str, Field(max_length=200_000)]
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
            ProtocolError: It is longer than 1 MiB, or not such a message.
        """
        if len(data) > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"{cls.__name__}: expected at most {MAX_MESSAGE_BYTES} bytes, got {len(data)}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            # Of a key that there is not, the place is the key: the sender's words, which an error does not repeat.
            place = first["loc"][:-1] if first["type"] == "extra_forbidden" else first["loc"]
            where = ".".join(str(part) for part in place)[:200]
            raise ProtocolError(f"{cls.__name__}: {one_line(where)}: {one_line(first['msg'])}") from None


class SiteKeys(Spoken):
    """A site's public keys, each for one purpose."""

    site: Name
    identity: Hex32
    """Ed25519: signs the site's statements and its part in secure aggregation; the other sites pin it."""
    witness: Short
    """C2SP vkey of type 4: cosigns the log's checkpoints."""
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
            raise ValueError("witness: expected a vkey of type 4 in the site's name, with a key of its own")
        _check_node(self.node)
        return self

    @property
    def member(self) -> Member:
        """The site as the log's statements name it."""
        return Member(site=self.site, key=self.identity, witness=self.witness)

    @property
    def fingerprint(self) -> str:
        """What the operators of site and coordinator compare: of all four keys and the name."""
        tls = key_bytes(read_request(self.request)).hex()
        return fingerprint(canonical_json({**self.model_dump(exclude={"request"}), "tls": tls}))


class JoinRequest(Spoken):
    """A site asks to join."""

    secret: Hex32
    """Of the token."""
    keys: SiteKeys
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    """By the identity key, over token and keys: who copies another site's public keys cannot join with them."""

    @classmethod
    def make(cls, secret: bytes, keys: SiteKeys, identity: Ed25519PrivateKey) -> JoinRequest:
        """Make the request of a site that holds the identity key."""
        return cls(secret=secret.hex(), keys=keys, proof=identity.sign(_proven(secret.hex(), keys)).hex())

    @model_validator(mode="after")
    def _proved(self) -> Self:
        if not _signed(self.keys.identity, self.proof, _proven(self.secret, self.keys)):
            raise ValueError("proof: the identity key did not sign this")
        return self

    @property
    def digest(self) -> str:
        """Of the whole request: a token serves one request, as often as its answer gets lost."""
        return digest(self.encode())


class Terms(Spoken):
    """What a member has to know of its consortium."""

    consortium: Name
    address: Address
    """Host and port of the service for members."""
    enrolment: Address
    """Host and port for joining, and for coming back with an expired certificate."""
    fleet: Address
    """Host and port at which the site's node connects for studies."""
    coordinator: Hex32
    """Ed25519: signs the coordinator's statements."""
    policy: LongText
    """C2SP policy of the log: its key, the witnesses', and how many have to cosign."""
    members: tuple[SiteKeys, ...]
    """Ascending by name; certificate requests included, so that fingerprints can be computed."""


class JoinReply(Spoken):
    """The answer to a request: wait until the keys were compared, or the certificate with all that goes with it."""

    state: Literal["pending", "member"]
    fingerprint: Short
    """Of the keys as they arrived; the site compares it with what it sent."""
    certificate: Short = ""
    terms: Terms | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.state == "member") != (self.terms is not None and bool(self.certificate)):
            raise ValueError("a member, and nobody else, is given a certificate and terms")
        return self


class Nothing(Spoken):
    """A question without details."""


class Status(Spoken):
    """How the service sees a member."""

    site: Name
    valid_until: Size
    """Of the certificate that asked, in Unix seconds."""
    time: Size
    """By the service's clock: `doctor` compares it."""
    members: Size
    leaves: Size


class RenewRequest(Spoken):
    """A member asks for a new certificate, with the old one."""

    request: Short


class ReturnRequest(Spoken):
    """A member whose certificate has expired, or was replaced, asks for a new one.

    Whoever repeats it gains nothing, as the certificate is of use to the key in the request alone; but what the site
    was issued since does not count then. So it holds for minutes.
    """

    site: Name
    request: Short
    time: Size
    """When it was made, in Unix seconds."""
    proof: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
    """By the member's identity key, over all of these."""

    @classmethod
    def make(cls, site: str, request: str, identity: Ed25519PrivateKey, now: datetime) -> ReturnRequest:
        """Make the request of a member that holds the identity key."""
        time = int(now.timestamp())
        return cls(site=site, request=request, time=time, proof=identity.sign(_returns(site, request, time)).hex())

    def proves(self, identity: str) -> bool:
        """Whether the identity key, in hexadecimal, signed this."""
        return _signed(identity, self.proof, _returns(self.site, self.request, self.time))

    def is_fresh(self, now: datetime) -> bool:
        """Whether it was made lately."""
        return abs(now.timestamp() - self.time) <= SKEW.total_seconds()


class RenewReply(Spoken):
    """The new certificate."""

    certificate: Short


class CheckpointReply(Spoken):
    """The log's newest checkpoint, with the cosignatures it has so far; empty while the log is."""

    note: LongText


class LeavesRequest(Spoken):
    """Leaves from a number on."""

    first: Size


class LeavesReply(Spoken):
    """As many as fit, in base64; none means that the log ends there."""

    leaves: Annotated[tuple[Base64, ...], Field(max_length=MAX_LEAVES)]


class ConsistencyRequest(Spoken):
    """Proof that the tree of `new` leaves extends that of `old`."""

    old: Size
    new: Size


class InclusionRequest(Spoken):
    """Proof that a leaf is in the tree of `size` leaves."""

    index: Size
    size: Size


class ProofReply(Spoken):
    """Hashes of a proof."""

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
        raise ValueError("node: not a public key of OpenSSH") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("node: expected an ECDSA key on P-384")
