"""The consortium service: gRPC over TLS for joining, and over mutual TLS for members.

There are two ports, because a port either requires a client's certificate or accepts none. On the enrolment port a site
sends its request to join, repeatedly until it is a member; it trusts the root certificate in its token. On the members'
port each call is checked anew: the name in the certificate, its validity, and that the site is still a member. The
service's own certificate is made when it starts and renewed while it runs; its key is never written to the disk.

The size of messages and the number of calls are limited, and answers have only the fields that
`common/pki/enrolment.py` defines. Refusals are logged. Each call is served as a stream with one request: for a call
with a single request gRPC calls the handler only after it received the request, so requests that gRPC refuses itself
would not be logged.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, TypeVar

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import Certificate

from privet.common.errors import PrivetError, ProtocolError, RefusedError
from privet.common.log.encoding import one_line
from privet.common.pki.certificates import issue, name_of, problems, read_certificate, to_pem
from privet.common.pki.enrolment import (
    ENROLMENT,
    MAX_LEAVES,
    MAX_MESSAGE_BYTES,
    SERVICE,
    CheckpointReply,
    ConsistencyRequest,
    InclusionRequest,
    JoinReply,
    JoinRequest,
    LeavesReply,
    LeavesRequest,
    Nothing,
    ProofReply,
    RenewReply,
    RenewRequest,
    ReturnRequest,
    Spoken,
    Status,
    Terms,
)
from privet.common.refusals import Refusals
from privet.server.consortium.coordinator import Coordinator
from privet.server.log.logfile import LogFile

_log = logging.getLogger("privet.consortium")
Clock = Callable[[], datetime]
_SERVICE_DAYS = 7
_LEAF_BYTES = MAX_MESSAGE_BYTES // 2  # base64 adds a third
_MAX_HEADERS = 8192
# Calls at a time, one thread each, and the seconds that a call may take to send its message.
_CALLS, _PATIENCE = 64, 10.0
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MAX_HEADERS),
    ("grpc.absolute_max_metadata_size", 2 * _MAX_HEADERS),
    ("grpc.so_reuseport", 0),
    # A client that connects and sends nothing is disconnected soon. Otherwise idle connections could use up the file
    # descriptors of the process, which the fleet port needs too.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_allowed_incoming_connections", 256),
    ("grpc.keepalive_time_ms", 60_000),
]
_TLS = "the TLS handshake failed"
# What gRPC writes about TLS handshakes, and the reason that is logged for it.
_HANDSHAKES = {
    "certificate has expired": f"{_TLS}: certificate has expired",
    "certificate is not yet valid": f"{_TLS}: certificate is not yet valid",
    "unable to get local issuer certificate": f"{_TLS}: unable to get local issuer certificate",
    "CERTIFICATE_VERIFY_FAILED": f"{_TLS}: the certificate is not acceptable",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": f"{_TLS}: no certificate",
    "Handshake failed": _TLS,
}
_CODES = {RefusedError: grpc.StatusCode.PERMISSION_DENIED, ProtocolError: grpc.StatusCode.INVALID_ARGUMENT}
Request = TypeVar("Request", bound=Spoken)
Who = Callable[[grpc.ServicerContext], str]
"""Returns the name of the member that calls; empty for an outsider."""


@dataclass(frozen=True)
class Caller:
    """A member that calls, and the certificate of its connection."""

    site: str
    certificate: Certificate


@dataclass(frozen=True)
class Service:
    """The answers to all calls. Threads share it; it has no state of its own."""

    coordinator: Coordinator
    clock: Clock
    refusals: Refusals

    def join(self, request: JoinRequest) -> JoinReply:
        """Take a request to join, and return its state."""
        return self.coordinator.answer(request, self.clock())

    def come_back(self, request: ReturnRequest) -> RenewReply:
        """Issue a new certificate to a member that proves its identity key, when its old certificate is not valid."""
        return RenewReply(certificate=to_pem(self.coordinator.readmit(request, self.clock())))

    def status(self, request: Nothing, caller: Caller) -> Status:
        """Return the caller's name and certificate as the service sees them, and its time."""
        return Status(
            site=caller.site,
            valid_until=int(caller.certificate.not_valid_after_utc.timestamp()),
            time=int(self.clock().timestamp()),
            members=len(self.coordinator.members.members()),
            leaves=self._log.size(),
        )

    def renew(self, request: RenewRequest, caller: Caller) -> RenewReply:
        """Issue a new certificate with the name of the old one."""
        certificate = self.coordinator.renew(caller.site, request.request, self.clock(), caller.certificate)
        return RenewReply(certificate=to_pem(certificate))

    def roster(self, request: Nothing, caller: Caller) -> Terms:
        """Return all members' public keys and the log's policy."""
        return self.coordinator.members.terms()

    def checkpoint(self, request: Nothing, caller: Caller) -> CheckpointReply:
        """Return the log's newest checkpoint."""
        return CheckpointReply(note=self._log.checkpoint().decode("utf-8"))

    def leaves(self, request: LeavesRequest, caller: Caller) -> LeavesReply:
        """Return leaves of the log."""
        found = self._log.leaves(request.first, MAX_LEAVES, _LEAF_BYTES)
        return LeavesReply(leaves=tuple(base64.b64encode(leaf).decode("ascii") for leaf in found))

    def consistency(self, request: ConsistencyRequest, caller: Caller) -> ProofReply:
        """Prove that the newer log extends the older one."""
        return ProofReply(hashes=tuple(each.hex() for each in self._log.consistency(request.old, request.new)))

    def inclusion(self, request: InclusionRequest, caller: Caller) -> ProofReply:
        """Prove that a leaf is in the log."""
        return ProofReply(hashes=tuple(each.hex() for each in self._log.inclusion(request.index, request.size)))

    @property
    def _log(self) -> LogFile:
        return LogFile(self.coordinator.log_directory)

    def identify(self, context: grpc.ServicerContext) -> Caller:
        """Return the caller: the name is from its certificate, and the site must be a member now."""
        presented = context.auth_context().get("x509_pem_cert", [b""])[0]
        certificate = read_certificate(presented)
        site = name_of(certificate, "site")
        why = problems(certificate, self.coordinator.authority.certificate, "site", self.clock())
        if why or site is None:
            raise RefusedError(
                f"the coordinator does not accept the site's certificate: {'; '.join(why) or 'it has no site name'}",
                "check both clocks; if the certificate is of another consortium, use the right site directory",
            )
        # TLS checks the root certificate only, which also signed that of a revoked site: ask the members' file.
        if not self.coordinator.members.admits(site, certificate):
            raise RefusedError(
                f"site {site} is not a member, or the certificate that it uses was replaced or withdrawn",
                "if the site did not renew its certificate itself, its key was copied: tell the coordinator",
            )
        return Caller(site, certificate)


@contextmanager
def serve_consortium(
    coordinator: Coordinator, clock: Clock, bind: tuple[str, str] | None = None, refusals: Refusals | None = None
) -> Iterator[tuple[int, int]]:
    """Run the service until the block ends.

    Args:
        coordinator: The coordinator.
        clock: Returns the time.
        bind: Addresses to listen on, for members and for enrolment; None: those of the settings. Port 0: any free port.
        refusals: Logs refusals.

    Yields:
        The two ports.

    Raises:
        ProtocolError: The service cannot listen on an address.
    """
    service, settings = Service(coordinator, clock, refusals or Refusals(_log)), coordinator.settings
    for_members = {
        "Status": _member(service, Nothing, service.status),
        "Renew": _member(service, RenewRequest, service.renew),
        "Roster": _member(service, Nothing, service.roster),
        "Checkpoint": _member(service, Nothing, service.checkpoint),
        "Leaves": _member(service, LeavesRequest, service.leaves),
        "Consistency": _member(service, ConsistencyRequest, service.consistency),
        "Inclusion": _member(service, InclusionRequest, service.inclusion),
    }
    addresses = bind or (settings.address, settings.enrolment)
    members = _server(SERVICE, for_members, service, _caller)
    for_anybody = {
        "Join": _anybody(service, JoinRequest, service.join),
        "Return": _anybody(service, ReturnRequest, service.come_back),
    }
    joining = _server(ENROLMENT, for_anybody, service)
    ports = []
    for server, address, told, mutual in (
        (members, addresses[0], settings.address, True),
        (joining, addresses[1], settings.enrolment, False),
    ):
        try:
            port = server.add_secure_port(address, _credentials(service, told.rpartition(":")[0], mutual))
        except RuntimeError:
            port = 0
        if port == 0:
            raise ProtocolError(
                f"the service cannot listen on {address}",
                "stop the program that uses the port, or change the address in coordinator.toml",
            )
        ports.append(port)
    members.start()
    joining.start()
    try:
        yield ports[0], ports[1]
    finally:
        ended = [members.stop(grace=1), joining.stop(grace=1)]
        for event in ended:
            event.wait(5)


def _server(name: str, methods: dict[str, Any], service: Service, member: Who = lambda context: "") -> grpc.Server:
    pool = ThreadPoolExecutor(_CALLS, thread_name_prefix=name)
    server = grpc.server(pool, options=_OPTIONS, maximum_concurrent_rpcs=_CALLS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods), _Unknown(service, member)))
    return server


class _Unknown:
    """Answers calls of methods that do not exist."""

    def __init__(self, service: Service, member: Who) -> None:
        self._service, self._member = service, member

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler for every method without a handler of its own."""

        def handle(data: Iterator[bytes], context: grpc.ServicerContext) -> NoReturn:
            self._service.refusals.note("there is no such method", _peer(context), member=self._member(context))
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
            raise ProtocolError("there is no such method")  # not reached: `abort` raises

        return grpc.stream_unary_rpc_method_handler(handle)


def _credentials(service: Service, host: str, mutual: bool) -> grpc.ServerCredentials:
    """Return the server's credentials; key and certificate are replaced as soon as they are outdated."""
    authority = service.coordinator.authority
    current: list[Certificate] = []

    def configuration() -> Any:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = issue(authority, key.public_key(), host, "service", service.clock(), _SERVICE_DAYS)
        current[:] = [certificate]
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pair = [(private, to_pem(certificate).encode("ascii"))]
        return grpc.ssl_server_certificate_configuration(pair, to_pem(authority.certificate).encode("ascii"))

    def renewed() -> Any:
        return configuration() if service.coordinator.outdated(current[0], service.clock()) else None

    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(configuration(), renewed, mutual)
    return credentials


def _member(service: Service, kind: type[Request], answer: Callable[[Request, Caller], Spoken]) -> Any:
    """Return the handler of a method for members: the caller is identified before the message is read."""

    def handle(data: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with _errors_told(service, context, _caller(context)):
            caller = service.identify(context)
            return answer(kind.decode(_single(data, context)), caller).encode()

    return grpc.stream_unary_rpc_method_handler(handle)


def _anybody(service: Service, kind: type[Request], answer: Callable[[Request], Spoken]) -> Any:
    """Return the handler of a method that needs no certificate: the message itself proves what it needs."""

    def handle(data: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with _errors_told(service, context):
            return answer(kind.decode(_single(data, context))).encode()

    return grpc.stream_unary_rpc_method_handler(handle)


def _single(data: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
    """Return the one message of a call. A second message is not read."""
    # A call occupies one of few threads: a client that sends nothing must not keep it.
    patience = threading.Timer(_PATIENCE, context.cancel)
    patience.daemon = True
    patience.start()
    try:
        found = next(data, None)
    except grpc.RpcError:  # gRPC has refused the message, without a reason
        found = None
    finally:
        patience.cancel()
    if found is None:
        raise ProtocolError(
            f"the request to the coordinator is too large, or did not arrive within {_PATIENCE:.0f} s",
            "check the network, then try again",
        )
    return found


@contextmanager
def _errors_told(service: Service, context: grpc.ServicerContext, member: str = "") -> Iterator[None]:
    """End a call with the error's message, unless that is private to the coordinator; and log the refusal."""
    try:
        yield
    except PrivetError as error:
        service.refusals.note(_reason(error), _peer(context), member=member, detail=one_line(error.message))
        _abort(context, error)
    except Exception as error:
        detail = f"failed: {type(error).__name__}"
        service.refusals.note("the call failed", _peer(context), member=member, detail=detail)
        context.abort(grpc.StatusCode.INTERNAL, "the service failed; its application log has the reason")


def note_native(refusals: Refusals, line: str) -> None:
    """Log what gRPC writes to standard error (`native_errors`): certificates that TLS does not accept."""
    known = next((said for mark, said in _HANDSHAKES.items() if mark in line), "")
    if known:
        refusals.note(known, "unknown")
    else:
        note_fault(refusals, "gRPC", line)


def note_fault(refusals: Refusals, library: str, line: str) -> None:
    """Log a fault that a library reports. It counts as a refusal, because a caller may cause it as often as it likes.

    Only a member's node can cause one in Flower.
    """
    member = "unknown" if library == "Flower" else ""
    refusals.note(f"{library} reports a fault", "unknown", member=member, detail=one_line(line)[:200])


def _reason(error: PrivetError) -> str:
    """Return one of three reasons. Entries are counted by it, so it must not be a text that quotes the request."""
    if isinstance(error, RefusedError):
        return "the caller is not authorised"
    return "the message is malformed" if isinstance(error, ProtocolError) else "the service cannot answer"


def _caller(context: grpc.ServicerContext) -> str:
    """Return the name in a caller's certificate, which TLS has verified. A former member may still have one."""
    try:
        presented = context.auth_context().get("x509_pem_cert", [b""])[0]
        return name_of(read_certificate(presented), "site") or "unnamed"
    except ProtocolError:
        return "unnamed"


def _peer(context: grpc.ServicerContext) -> str:
    """Return the caller's address without the port, which differs for each connection."""
    kind, _, address = str(context.peer()).partition(":")
    return address.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind


def _abort(context: grpc.ServicerContext, error: PrivetError) -> NoReturn:
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), grpc.StatusCode.UNAVAILABLE)
    told = "the service cannot answer now; its application log has the reason" if error.private else error.message
    context.abort(code, one_line(told))
    raise error  # not reached: `abort` raises
