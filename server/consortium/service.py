"""The consortium service: gRPC over TLS for joining, and over mutual TLS for members.

There are two ports, because a port either requires a client's certificate or accepts none. On the enrolment port a site
sends its request to join, repeatedly until it is a member; it trusts the root certificate in its token. On the members'
port each call is checked anew: the name in the certificate, its validity, and that the site is still a member. The
service's own certificate is made when it starts and renewed while it runs; its key is never written to the disk.

Connections are accepted and counted by `server/consortium/front.py`, which also ends TLS 1.3; gRPC itself listens on a
Unix socket. The size of messages and the number of calls are limited, also for each member, and answers have only the
fields that `common/pki/enrolment.py` defines. Refusals are logged. Each call is served as a stream with one request:
for a call with a single request gRPC calls the handler only after it received the request, so requests that gRPC
refuses itself would not be logged.
"""

from __future__ import annotations

import base64
import logging
import socket
import ssl
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import Certificate

from privet.common.doors.places import Share
from privet.common.errors import PrivetError, ProtocolError, RefusedError, StateError
from privet.common.log.encoding import one_line
from privet.common.pki.addresses import split_address
from privet.common.pki.certificates import issue, name_of, problems, to_pem
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
    KeysRequest,
    LeavesReply,
    LeavesRequest,
    Nothing,
    ProofReply,
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
from privet.common.pki.tls import load_pair, tls_context
from privet.common.refusals import Refusals
from privet.server.consortium.candidates import candidate_part, keep_review
from privet.server.consortium.coordinator import Coordinator, Settings
from privet.server.consortium.front import Front, Peer
from privet.server.consortium.proposals import proposed
from privet.server.consortium.releases import accepted, released_part
from privet.server.doors.door import Door, LoopThread, Manners, listen
from privet.server.log.logfile import LogFile

_log = logging.getLogger("privet.consortium")
Clock = Callable[[], datetime]
_SERVICE_DAYS = 7
_LEAF_BYTES = MAX_MESSAGE_BYTES // 2  # base64 adds a third
_MAX_HEADERS = 8192
# Threads of a port, the calls that one member or one stranger's connection may make at a time, and the seconds that a
# call may take to send its message. A member's calls leave threads to all others.
_CALLS, _EACH, _PATIENCE = 128, 4, 10.0
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", _MAX_HEADERS),
    ("grpc.absolute_max_metadata_size", 2 * _MAX_HEADERS),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_concurrent_streams", 2 * _EACH),
    ("grpc.keepalive_time_ms", 60_000),
]
MANNERS = Manners()
"""How long both ports wait for callers."""
_NO_METHOD = "there is no such method"
_FILES = 3  # of one connection: the caller's, and both ends of the one to gRPC
_CODES = {RefusedError: grpc.StatusCode.PERMISSION_DENIED, ProtocolError: grpc.StatusCode.INVALID_ARGUMENT}
Request = TypeVar("Request", bound=Spoken)


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
    caller: Callable[[str], Peer | None] = lambda peer: None
    turns: Turns = field(default_factory=lambda: Turns(_EACH))

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

    def renew_keys(self, request: KeysRequest, caller: Caller) -> JoinReply:
        """Take the caller's request for an ML-DSA-65 key, and return its state."""
        return self.coordinator.renew_keys(caller.site, request, self.clock())

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

    def proposals(self, request: Nothing, caller: Caller) -> ProposalsReply:
        """Return the studies of the coordinator's runs, which sites are asked to take part in."""
        return ProposalsReply(runs=proposed(self.coordinator.directory, caller.site, MAX_MESSAGE_BYTES // 2))

    def accepted(self, request: Nothing, caller: Caller) -> CheckpointReply:
        """Return the newest checkpoint that a quorum cosigned; empty before the first."""
        return CheckpointReply(note=accepted(self.coordinator.directory).decode("utf-8"))

    def released(self, request: ReleasedRequest, caller: Caller) -> ReleasedReply:
        """Return a part of a released file."""
        return released_part(self.coordinator.directory, caller.site, request, self.clock())

    def candidate(self, request: ReleasedRequest, caller: Caller) -> ReleasedReply:
        """Return a part of a file of a candidate, which waits at its gate, to a site that took part."""
        return candidate_part(self.coordinator, caller.site, request)

    def review(self, request: ReviewRequest, caller: Caller) -> Nothing:
        """Take the caller's review of a candidate. It is in the log when the log is written next."""
        keep_review(self.coordinator, caller.site, base64.b64decode(request.statement), self.clock())
        return Nothing()

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
        peer = self.caller(str(context.peer()))
        certificate = None if peer is None else peer.certificate
        if certificate is None:
            raise RefusedError(
                "the call came without a site's certificate",
                "call through `privet site`, which uses the certificate that the coordinator issued",
            )
        return self.member(certificate)

    def member(self, certificate: Certificate) -> Caller:
        """Return the member that a certificate belongs to; the caller has proved to own it.

        Raises:
            RefusedError: The certificate is not acceptable, or the site is not a member now.
        """
        site = name_of(certificate, "site")
        why = problems(certificate, self.coordinator.root, "site", self.clock())
        if why or site is None:
            raise RefusedError(
                f"the coordinator does not accept the site's certificate: {'; '.join(why) or 'it has no site name'}",
                "check both clocks; if the certificate is of another consortium, use the right site directory",
            )
        # TLS checks the root certificate only, which also signed that of a revoked site: ask the members' file.
        if not self.coordinator.members.admits(site, certificate):
            self.coordinator.members.check_not_revoked(site)
            raise RefusedError(
                f"site {site} is not a member, or the certificate that it uses was replaced or withdrawn",
                "if the site did not renew its certificate itself, its key was copied: tell the coordinator",
            )
        return Caller(site, certificate)

    def judge(self, certificate: Certificate) -> str:
        """Return the name of the member that a certificate belongs to; empty if it belongs to none."""
        try:
            return self.member(certificate).site
        except PrivetError:  # a call is told why
            return ""


@contextmanager
def serve_consortium(
    coordinator: Coordinator, clock: Clock, bind: tuple[str, str] | None = None, refusals: Refusals | None = None
) -> Iterator[Consortium]:
    """Run the service until the block ends.

    Args:
        coordinator: The coordinator.
        clock: Returns the time.
        bind: Addresses to listen on, for members and for enrolment; None: those of the settings. Port 0: any free port.
        refusals: Logs refusals.

    Yields:
        The running service.

    Raises:
        ProtocolError: The service cannot listen on an address.
    """
    settings, refusals = coordinator.settings, refusals or Refusals(_log)
    addresses = bind or (settings.address, settings.enrolment)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="privet-")))
        outside = Service(coordinator, clock, refusals)
        members, joining = Front(directory, "members", outside.judge), Front(directory, "joining")
        service = replace(outside, caller=lambda peer: members.caller(peer) or joining.caller(peer))
        doors = []
        for address, told, share, mutual in (
            (addresses[0], settings.address, shares(settings).members, True),
            (addresses[1], settings.enrolment, shares(settings).joining, False),
        ):
            tls = _Tls(coordinator, clock, split_address(told)[0], mutual)
            doors.append(Door(stack.enter_context(_listening(address)), tls.context, share, refusals, MANNERS))
        loop = LoopThread("consortium", refusals)
        stack.callback(loop.stop)
        stack.enter_context(_answering(members, SERVICE, _for_members(service), service))
        stack.enter_context(_answering(joining, ENROLMENT, _for_anybody(service), service))
        loop.start([partial(members.serve, doors[0]), partial(joining.serve, doors[1])])
        yield Consortium(doors[0].port, doors[1].port, loop)


class Shares(NamedTuple):
    """How many connections each port serves at a time."""

    fleet: Share
    members: Share
    joining: Share


def shares(settings: Settings) -> Shares:
    """Return how many connections each port serves, by the settings."""
    fleet = Share(settings.connections, min(settings.connections_per_address, settings.connections))
    other = Share(fleet.strangers // 2, fleet.address // 2, _EACH)
    return Shares(fleet, other, other)


def files_needed(settings: Settings, members: int) -> int:
    """Return the most files that the connections of all three ports take with so many members."""
    fleet, calling, joining = shares(settings)
    return fleet.most(members) + _FILES * (calling.most(members) + joining.most(0))


@dataclass(frozen=True)
class Consortium:
    """The running service: its two ports, and the thread that accepts their connections."""

    members: int
    joining: int
    loop: LoopThread


@contextmanager
def _listening(address: str) -> Iterator[socket.socket]:
    try:
        found = listen(*split_address(address))
    except OSError:
        raise ProtocolError(
            f"the service cannot listen on {address}; another `privet coordinator serve` may run already",
            "stop the program that uses the port. Change the address in coordinator.toml only before sites join: "
            "they and their invitations hold the old one",
        ) from None
    with found:
        yield found


@contextmanager
def _answering(front: Front, name: str, methods: dict[str, Any], service: Service) -> Iterator[None]:
    """Answer the calls that come through a front, until the block ends."""
    pool = ThreadPoolExecutor(_CALLS, thread_name_prefix=name)
    server = grpc.server(pool, options=_OPTIONS, maximum_concurrent_rpcs=4 * _CALLS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods), _Unknown(service)))
    server.add_insecure_port(front.address)
    server.start()
    try:
        yield
    finally:
        server.stop(grace=1).wait(5)


def _for_members(service: Service) -> dict[str, Any]:
    return {
        "Status": _member(service, Nothing, service.status),
        "Renew": _member(service, RenewRequest, service.renew),
        "RenewKeys": _member(service, KeysRequest, service.renew_keys),
        "Roster": _member(service, Nothing, service.roster),
        "Checkpoint": _member(service, Nothing, service.checkpoint),
        "Proposals": _member(service, Nothing, service.proposals),
        "Accepted": _member(service, Nothing, service.accepted),
        "Released": _member(service, ReleasedRequest, service.released),
        "Candidate": _member(service, ReleasedRequest, service.candidate),
        "Review": _member(service, ReviewRequest, service.review),
        "Leaves": _member(service, LeavesRequest, service.leaves),
        "Consistency": _member(service, ConsistencyRequest, service.consistency),
        "Inclusion": _member(service, InclusionRequest, service.inclusion),
    }


def _for_anybody(service: Service) -> dict[str, Any]:
    return {
        "Join": _anybody(service, JoinRequest, service.join),
        "Return": _anybody(service, ReturnRequest, service.come_back),
    }


class _Unknown:
    """Answers calls of methods that do not exist."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler for every method without a handler of its own."""

        def handle(data: Iterator[bytes], context: grpc.ServicerContext) -> NoReturn:
            service = self._service
            service.refusals.note(_NO_METHOD, _address(service, context), member=_named(service, context))
            context.abort(grpc.StatusCode.UNIMPLEMENTED, _NO_METHOD)
            raise ProtocolError(_NO_METHOD)  # not reached: `abort` raises

        return grpc.stream_unary_rpc_method_handler(handle)


class _Tls:
    """The context for a port's TLS; key and certificate are replaced as soon as they are outdated."""

    def __init__(self, coordinator: Coordinator, clock: Clock, host: str, mutual: bool) -> None:
        self._coordinator, self._clock, self._host, self._mutual = coordinator, clock, host, mutual
        self._certificate, self._context = self._make()

    def context(self) -> ssl.SSLContext:
        """Return the context for a new connection."""
        with suppress(StateError):  # `Serving.tend` reports it; the present certificate is valid for days
            if self._coordinator.outdated(self._certificate, self._clock()):
                self._certificate, self._context = self._make()
        return self._context

    def _make(self) -> tuple[Certificate, ssl.SSLContext]:
        authority, key = self._coordinator.authority, ec.generate_private_key(ec.SECP256R1())
        certificate = issue(authority, key.public_key(), self._host, "service", self._clock(), _SERVICE_DAYS)
        context = tls_context(ssl.PROTOCOL_TLS_SERVER, authority.certificate if self._mutual else None)
        load_pair(context, certificate, key)
        return certificate, context


class Turns:
    """Counts the calls that each caller has under way."""

    def __init__(self, most: int) -> None:
        self._most, self._lock, self._calls = most, threading.Lock(), Counter[str]()

    @contextmanager
    def of(self, caller: str) -> Iterator[None]:
        """Count one call of a caller while the block runs.

        Raises:
            RefusedError: The caller has too many calls under way.
        """
        with self._lock:
            if self._calls[caller] >= self._most:
                hint = "wait until earlier calls have ended"
                raise RefusedError(f"too many calls at a time: at most {self._most} are answered", hint)
            self._calls[caller] += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls[caller] -= 1
                if not self._calls[caller]:
                    del self._calls[caller]


def _member(service: Service, kind: type[Request], answer: Callable[[Request, Caller], Spoken]) -> Any:
    """Return the handler of a method for members: the caller is identified before the message is read."""

    def handle(data: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with _errors_told(service, context, _named(service, context)):
            caller = service.identify(context)
            with service.turns.of(caller.site):
                return answer(kind.decode(_single(data, context)), caller).encode()

    return grpc.stream_unary_rpc_method_handler(handle)


def _anybody(service: Service, kind: type[Request], answer: Callable[[Request], Spoken]) -> Any:
    """Return the handler of a method that needs no certificate: the message itself proves what it needs."""

    def handle(data: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with _errors_told(service, context), service.turns.of(str(context.peer())):
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
    address = _address(service, context)  # asked now: the connection may end meanwhile
    try:
        yield
    except PrivetError as error:
        service.refusals.note(_reason(error), address, member=member, detail=one_line(error.message))
        _abort(context, error)
    except Exception as error:
        detail = f"failed: {type(error).__name__}"
        service.refusals.note("the call failed", address, member=member, detail=detail)
        context.abort(grpc.StatusCode.INTERNAL, "the service failed; its application log has the reason")


def note_native(refusals: Refusals, line: str) -> None:
    """Log what gRPC writes to standard error (`native_errors`)."""
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


def _named(service: Service, context: grpc.ServicerContext) -> str:
    """Return the name in a caller's certificate, which TLS has verified; empty without a certificate.

    A former member may still have one.
    """
    peer = service.caller(str(context.peer()))
    if peer is None or peer.certificate is None:
        return ""
    return name_of(peer.certificate, "site") or "unnamed"


def _address(service: Service, context: grpc.ServicerContext) -> str:
    """Return the caller's address without the port, which differs for each connection."""
    peer = service.caller(str(context.peer()))
    return "unknown" if peer is None else peer.address


def _abort(context: grpc.ServicerContext, error: PrivetError) -> NoReturn:
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), grpc.StatusCode.UNAVAILABLE)
    told = "the service cannot answer now; its application log has the reason" if error.private else error.message
    context.abort(code, one_line(told))
    raise error  # not reached: `abort` raises
