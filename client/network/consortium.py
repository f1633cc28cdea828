"""Calls of a site to the consortium service: over TLS 1.3 to join, over mutual TLS 1.3 as a member.

A server gives no reason when it refuses a certificate. So this module checks the site's certificate first, and says
what is wrong with it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import Certificate

from privet.client.network.enrolment import Enrolment, check_certificate, key_pem
from privet.client.network.proxies import HINT, through
from privet.client.network.tunnel import tunnel
from privet.common.errors import PrivetError, ProtocolError, RefusedError
from privet.common.log.encoding import one_line
from privet.common.log.note import decode_base64, encode_base64
from privet.common.pki.certificates import read_certificate, request
from privet.common.pki.enrolment import (
    ENROLMENT,
    MAX_MESSAGE_BYTES,
    SERVICE,
    CheckpointReply,
    ConsistencyRequest,
    InclusionRequest,
    JoinReply,
    JoinRequest,
    KeysRequest,
    LeavesReply,
    LeavesRequest,
    Nothing,
    ProofReply,
    Proposal,
    ProposalsReply,
    ReleasedReply,
    ReleasedRequest,
    RenewReply,
    RenewRequest,
    ReturnRequest,
    ReviewRequest,
    Spoken,
    Status,
    Terms,
)
from privet.common.pki.keyfile import KEPT, read_key
from privet.common.pki.tls import load_pair, tls_context
from privet.common.pki.token import Token

if TYPE_CHECKING:
    import grpc

_CONNECTING, _SECONDS = 10.0, 30.0
_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
_Reply = TypeVar("_Reply", bound=Spoken)


def request_membership(token: Token, asked: JoinRequest) -> JoinReply:
    """Send a request to join. Only the token's root is trusted, so no other server ever receives the token.

    Raises:
        RefusedError: The token is not valid, or has expired.
        ProtocolError: The service cannot be reached, or its certificate does not chain to the token's root.
    """
    trusting = tls_context(ssl.PROTOCOL_TLS_CLIENT, token.certificate)
    try:
        return _call(token.address, trusting, f"/{ENROLMENT}/Join", asked, JoinReply)
    except RefusedError as error:
        error.hint = f"ask the coordinator's operator for a new token: `privet coordinator invite {token.site}`"
        raise


@dataclass(frozen=True)
class ConsortiumClient:
    """The consortium service, as a member calls it. Every method raises as `call`."""

    enrolment: Enrolment
    clock: Callable[[], datetime]

    def call(self, method: str, asked: Spoken, kind: type[_Reply]) -> _Reply:
        """Call a method of the service.

        Raises:
            VerificationError: This site's certificate is not acceptable. This is checked before anything is sent.
            RefusedError: The service refuses this site or its request.
            ProtocolError: The service cannot be reached, did not answer in time, or gave an unknown answer.
        """
        return _call(self.enrolment.terms.address, self.context(), f"/{SERVICE}/{method}", asked, kind)

    def context(self) -> ssl.SSLContext:
        """Return the context for TLS with this site's certificate.

        Raises:
            VerificationError: The certificate is not acceptable.
        """
        own = self.enrolment
        certificate, root, tls = own.certificate, own.root, own.tls
        check_certificate(certificate, root, own.asked.keys.site, tls, self.clock())
        mutual = tls_context(ssl.PROTOCOL_TLS_CLIENT, root)
        key = load_pem_private_key(tls, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ProtocolError("the site's TLS key is not on an elliptic curve", "run `privet site renew SITE`")
        load_pair(mutual, certificate, key)
        return mutual

    def status(self) -> Status:
        """Return the service's status of this site."""
        return self.call("Status", Nothing(), Status)

    def roster(self) -> Terms:
        """Return all members' public keys and the log's policy."""
        return self.call("Roster", Nothing(), Terms)

    def checkpoint(self) -> bytes:
        """Return the log's newest checkpoint; empty while the log is empty."""
        return self.call("Checkpoint", Nothing(), CheckpointReply).note.encode()

    def proposals(self) -> tuple[Proposal, ...]:
        """Return the coordinator's runs with their studies, newest first: claims, until a digest is compared."""
        return self.call("Proposals", Nothing(), ProposalsReply).runs

    def accepted(self) -> bytes:
        """Return the newest checkpoint that a quorum cosigned; empty before the first."""
        return self.call("Accepted", Nothing(), CheckpointReply).note.encode()

    def released(self, run: str, file: str, first: int) -> tuple[bytes, int]:
        """Return a part of a file that a run released, from byte `first` on, and the size of the whole file."""
        reply = self.call("Released", ReleasedRequest(run=run, file=file, first=first), ReleasedReply)
        return decode_base64(reply.part, "released file"), reply.size

    def candidate(self, run: str, file: str, first: int) -> tuple[bytes, int]:
        """Return a part of a file of a run's candidate, from byte `first` on, and the size of the whole file."""
        reply = self.call("Candidate", ReleasedRequest(run=run, file=file, first=first), ReleasedReply)
        return decode_base64(reply.part, "file of a candidate"), reply.size

    def review(self, statement: bytes) -> None:
        """Send this site's signed review of a candidate."""
        self.call("Review", ReviewRequest(statement=encode_base64(statement)), Nothing)

    def leaves(self, first: int) -> list[bytes]:
        """Return leaves from `first` on, as many as one answer holds; an empty list at the log's end."""
        reply = self.call("Leaves", LeavesRequest(first=first), LeavesReply)
        return [decode_base64(leaf, "leaf of the round log") for leaf in reply.leaves]

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        """Return the proof that the log only grew."""
        reply = self.call("Consistency", ConsistencyRequest(old=old, new=new), ProofReply)
        return tuple(bytes.fromhex(each) for each in reply.hashes)

    def inclusion(self, index: int, size: int) -> tuple[bytes, ...]:
        """Return the proof that a leaf is in the log."""
        reply = self.call("Inclusion", InclusionRequest(index=index, size=size), ProofReply)
        return tuple(bytes.fromhex(each) for each in reply.hashes)

    def renew(self) -> Certificate:
        """Get a new certificate for a new key, over a connection with the present one, and replace both.

        Raises:
            As `call`.
        """
        return self._replaced(lambda wanted: self.call("Renew", RenewRequest(request=wanted), RenewReply))

    def renew_keys(self, asked: KeysRequest) -> JoinReply:
        """Ask for an ML-DSA-65 key beside this site's keys, and return how far that is."""
        return self.call("RenewKeys", asked, JoinReply)

    def come_back(self) -> Certificate:
        """Get a new certificate with the identity key, as after the present one expired. Raises as `call`."""
        own = self.enrolment
        hint = f"{KEPT}; if it is lost, join again with a new token: `privet site join @TOKEN DIRECTORY`"
        identity = read_key(own.directory / "keys/identity.pem", "identity", hint)
        trusting = tls_context(ssl.PROTOCOL_TLS_CLIENT, own.root)

        def ask(wanted: str) -> RenewReply:
            asked = ReturnRequest.make(own.asked.keys.site, wanted, identity, self.clock())
            return _call(own.terms.enrolment, trusting, f"/{ENROLMENT}/Return", asked, RenewReply)

        return self._replaced(ask)

    def _replaced(self, ask: Callable[[str], RenewReply]) -> Certificate:
        own, key = self.enrolment, ec.generate_private_key(ec.SECP256R1())
        with self._alone():
            certificate = read_certificate(ask(request(key)).certificate)
            check_certificate(certificate, own.root, own.asked.keys.site, key_pem(key), self.clock())
            own.keep_certificate(certificate, key_pem(key))
            # One call with the new certificate: the service keeps accepting the old one until it sees the new one in
            # use, so a crash before this line leaves the site a certificate that works.
            with suppress(PrivetError):
                self.status()
        return certificate

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock renewal among the site's processes: of two, one could store what the other has replaced."""
        lock = self.enrolment.directory / "keys/tls.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _call(address: str, context: ssl.SSLContext, method: str, asked: Spoken, kind: type[_Reply]) -> _Reply:
    import grpc  # 10 MB, which a process that asks nobody does without

    host = address.rpartition(":")[0]
    options = [*_OPTIONS, ("grpc.default_authority", host)]
    try:
        with tunnel(address, context, _CONNECTING) as way, grpc.insecure_channel(way, options) as channel:
            data = channel.unary_unary(method)(asked.encode(), timeout=_SECONDS)
    except grpc.RpcError as error:
        raise _failure(error, address) from None
    except (OSError, TimeoutError) as error:
        raise _unreachable(address, _why(error)) from None
    return kind.decode(data)


def _failure(error: grpc.RpcError, address: str) -> PrivetError:
    """Return the error for a failed call."""
    import grpc

    # The details are text of the other side: on one line, so that it cannot forge lines of a terminal or a log.
    code, details = error.code(), one_line(str(error.details()))
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return RefusedError(
            f"the consortium service refuses the request: {details}",
            "correct this reason, or ask the coordinator's operator about it",
        )
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED):
        return ProtocolError(
            f"the consortium service does not accept this site's message: {details}",
            "run the same version of privet at the site and at the coordinator",
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(
            f"the consortium service at {address} runs an earlier version of privet, which does not answer this",
            "ask the coordinator's operator to install a newer version, or to send what you need, such as a study, as "
            "a file",
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unreachable(address, "it closed the connection, as where it does not accept this site's certificate")
    return ProtocolError(
        f"the consortium service at {address} did not answer as expected (gRPC status {code.name})",
        "run the command again",
    )


def _why(error: OSError) -> str:
    """Return why a connection was not made."""
    if isinstance(error, ConnectionRefusedError):
        return "it refuses connections: the service does not run, or a firewall rejects them"
    if isinstance(error, socket.gaierror):
        return f"DNS does not know this name ({error.strerror})"
    if isinstance(error, ssl.SSLError):
        said = getattr(error, "verify_message", None) or error.reason or type(error).__name__
        return f"site and service do not accept each other's certificate ({said})"
    if isinstance(error, TimeoutError):
        return "no answer in time: a firewall on the way may drop the packets"
    return f"the connection failed ({type(error).__name__})"


def _unreachable(address: str, reason: str) -> ProtocolError:
    proxied = through(address.rpartition(":")[0])
    return ProtocolError(
        f"the consortium service at {address} cannot be reached{proxied}: {reason}",
        "`privet site doctor SITE --network` says which step fails; before the site has joined, `privet site doctor "
        "@TOKEN --network`" + (f"; {HINT}" if proxied else ""),
    )
