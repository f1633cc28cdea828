"""The consortium service over real TLS: who may join, who may call, and what each of the others is told."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from privet.client.commands.enrolment import renew
from privet.client.network.consortium import ConsortiumClient, request_membership
from privet.client.network.enrolment import Enrolment, accept_membership, prepare_request
from privet.client.rounds.witness import Stale, Witness
from privet.client.site import load_site
from privet.common.audit.verify import verify_bundle
from privet.common.errors import (
    PrivetError,
    ProtocolError,
    RefusedError,
    StateError,
    StudyError,
    VerificationError,
)
from privet.common.log.checkpoint import Checkpoint, Policy, open_checkpoint
from privet.common.log.merkle import check_consistency, check_inclusion, leaf_hash
from privet.common.log.note import NoteKey, Signature
from privet.common.log.statements import StatedFloor
from privet.common.pki.certificates import create_authority, issue, name_of, read_certificate, request, to_pem
from privet.common.pki.enrolment import (
    ENROLMENT,
    MAX_MESSAGE_BYTES,
    SERVICE,
    JoinRequest,
    Nothing,
    RenewReply,
    RenewRequest,
    ReturnRequest,
    Status,
)
from privet.common.pki.keyfile import MLDSA_KEY, read_key, read_mldsa_key
from privet.server.commands.service import rotate
from privet.server.consortium.coordinator import log_members
from privet.server.log.journal import open_journal
from privet.server.log.roundlog import open_log
from tests.support.consortium_world import World, run, running


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("consortium")) as found:
        found.enrol("berlin")
        yield found


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def raw(
    world: World,
    method: str,
    body: bytes,
    pair: tuple[bytes, bytes] | None = None,
    port: str = "",
    metadata: Sequence[tuple[str, str]] = (),
) -> bytes:
    """Call the service without any of the client's own checks."""
    root = to_pem(world.coordinator.authority.certificate).encode()
    credentials = grpc.ssl_channel_credentials(root, *(pair or (None, None)))
    with grpc.secure_channel(port or world.coordinator.settings.address, credentials) as channel:
        answer: bytes = channel.unary_unary(method)(body, timeout=10, metadata=metadata)
    return answer


def code_of(world: World, pair: tuple[bytes, bytes] | None, method: str = f"/{SERVICE}/Status") -> str:
    try:
        raw(world, method, Nothing().encode(), pair)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


# --- joining ---------------------------------------------------------------------------------------------------


def test_a_site_joins_once_its_keys_were_compared(world: World) -> None:
    token, directory = world.invite("lyon"), world.folder / "lyon"
    asked = prepare_request(directory, token)
    first = request_membership(token, asked)
    assert (first.state, first.fingerprint) == ("pending", asked.keys.fingerprint)
    with pytest.raises(ProtocolError, match="is not a member yet"):
        accept_membership(directory, first, world.clock())
    with pytest.raises(RefusedError, match="not those of the keys that asked"):
        world.coordinator.approve("lyon", asked.keys.fingerprint[:-1] + "x", world.clock())
    world.coordinator.approve("lyon", asked.keys.fingerprint.replace(" ", "-"), world.clock())
    assert prepare_request(directory, token) == asked  # a site that was restarted asks the same
    certificate = accept_membership(directory, request_membership(token, asked), world.clock())
    assert name_of(certificate, "site") == "lyon"
    status = world.service("lyon").status()
    assert status.site == "lyon"
    assert abs(status.time - world.clock().timestamp()) < 5
    site = load_site(directory / "site.toml")
    assert dict(site.pins()) == {"lyon": bytes.fromhex(asked.keys.identity)}  # nobody else is trusted yet
    assert site.identity_key() is not None
    for file in (directory / "keys").iterdir():
        assert file.stat().st_mode & 0o077 == 0


def test_a_request_that_a_crash_cut_short_is_made_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    token, directory = world.invite("nancy"), world.folder / "nancy"
    with monkeypatch.context() as broken:
        broken.setattr("privet.client.network.enrolment.write_new", _interrupted)
        with pytest.raises(InterruptedError):
            prepare_request(directory, token)
    asked = prepare_request(directory, token)
    assert prepare_request(directory, token) == asked
    world.coordinator.answer(asked, world.clock())
    world.coordinator.approve("nancy", asked.keys.fingerprint, world.clock())
    accept_membership(directory, request_membership(token, asked), world.clock())
    assert world.service("nancy").status().site == "nancy"


def test_a_token_serves_one_request(world: World) -> None:
    token = world.invite("oslo")
    asked = prepare_request(world.folder / "oslo", token)
    request_membership(token, asked)
    thief = prepare_request(world.folder / "thief", token)
    with pytest.raises(RefusedError, match="not valid"):
        request_membership(token, thief)
    assert request_membership(token, asked).state == "pending"


def test_of_many_that_use_a_token_at_once_one_is_taken(world: World) -> None:
    token = world.invite("split")
    asked = [prepare_request(world.folder / f"split-{number}", token) for number in range(6)]

    def attempt(request: JoinRequest) -> bool:
        try:
            return request_membership(token, request).state == "pending"
        except RefusedError:
            return False

    with ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(attempt, asked))
    assert sum(taken) == 1
    (row,) = [row for row in world.coordinator.members.rows() if row.keys.site == "split"]
    assert row.keys == asked[taken.index(True)].keys


@pytest.mark.parametrize("name", ["../x", "a/b", "A", "", "x\n", "x\0", "-x", "x" * 64])
def test_a_site_has_no_name_that_is_a_path(world: World, name: str) -> None:
    with pytest.raises(StudyError, match="site: expected a name of 1 to 63 lower-case letters"):
        world.invite(name)


def test_tokens_that_do_not_count(world: World) -> None:
    token = world.invite("bern")
    asked = prepare_request(world.folder / "bern", token)
    world.clock.ahead = timedelta(hours=24)
    try:
        with pytest.raises(RefusedError, match="not valid"):
            request_membership(token, asked)
    finally:
        world.clock.ahead = timedelta()
    other = world.invite("bern")  # a new one withdraws the first
    with pytest.raises(RefusedError, match="not valid"):
        request_membership(token, asked)
    witness = replace(NoteKey.parse(asked.keys.witness), name="basel").text
    elsewhere = asked.keys.model_copy(update={"site": "basel", "witness": witness})
    with pytest.raises(RefusedError, match="not valid"):
        request_membership(other, JoinRequest.make(other.secret, elsewhere, *private_keys(world, "bern")))
    with pytest.raises(RefusedError, match="berlin is a member already"):
        world.invite("berlin")


def private_key(world: World, site: str) -> Ed25519PrivateKey:
    return read_key(world.folder / site / "keys/identity.pem", "identity")


def private_keys(world: World, site: str) -> tuple[Ed25519PrivateKey, MLDSA65PrivateKey]:
    return private_key(world, site), read_mldsa_key(world.folder / site / "keys" / MLDSA_KEY, "mldsa")


def raw_join(world: World, body: bytes) -> bytes:
    try:
        return raw(world, f"/{ENROLMENT}/Join", body, port=world.coordinator.settings.enrolment)
    except grpc.RpcError as error:
        raise ProtocolError(str(error.details())) from None


def test_a_token_that_expired_is_followed_by_another_for_the_same_keys(world: World) -> None:
    directory = world.folder / "lund"
    first = prepare_request(directory, world.invite("lund"))
    token = world.invite("lund")
    second = prepare_request(directory, token)
    assert second.keys == first.keys
    assert second.digest != first.digest
    assert request_membership(token, second).state == "pending"
    with pytest.raises(StateError, match="belongs to site lund already"):
        prepare_request(directory, world.invite("lulea"))


def test_the_name_is_the_tokens_and_not_the_requests(world: World) -> None:
    token = world.invite("turin")
    asked = prepare_request(world.folder / "turin", token)
    key = load_pem_private_key((world.folder / "turin/keys/tls.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "berlin")])
    wanted = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:privet:site:berlin")])
    forged = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(wanted, critical=False)
    forged_pem = forged.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    keys = asked.keys.model_copy(update={"request": forged_pem})
    request_membership(token, JoinRequest.make(token.secret, keys, *private_keys(world, "turin")))
    row = world.coordinator.approve("turin", keys.fingerprint, world.clock())
    assert row.certificate is not None
    assert name_of(row.certificate, "site") == "turin"
    assert b"berlin" not in row.certificate.public_bytes(Encoding.DER)


def test_a_server_of_another_root_never_sees_the_token(world: World, tmp_path: Path) -> None:
    with running(tmp_path) as impostor:
        token = world.invite("graz")
        lured = type(token)(token.site, impostor.coordinator.settings.enrolment, token.root, token.secret)
        with pytest.raises(ProtocolError, match="cannot be reached"):
            request_membership(lured, prepare_request(tmp_path / "graz", lured))
        assert impostor.coordinator.members.rows() == ()


def test_keys_that_were_changed_on_the_way_are_noticed(world: World) -> None:
    token = world.invite("wien")
    asked = prepare_request(world.folder / "wien", token)
    reply = request_membership(token, asked)
    with pytest.raises(VerificationError, match="other public keys"):
        accept_membership(world.folder / "wien", reply.model_copy(update={"fingerprint": "0"}), world.clock())
    changed = asked.model_copy(update={"keys": asked.keys.model_copy(update={"identity": "ab" * 32})})
    with pytest.raises(ProtocolError, match="proof"):
        raw_join(world, changed.encode())


def test_a_thief_of_the_members_file_learns_no_token(world: World) -> None:
    token = world.invite("riga")
    request_membership(token, prepare_request(world.folder / "riga", token))
    stolen = b"".join(path.read_bytes() for path in world.coordinator.directory.glob("members.db*"))
    for secret in (token.secret, token.secret.hex().encode(), token.text.encode()):
        assert secret not in stolen
    for file in (world.folder / "riga/keys").iterdir():
        assert file.name.endswith(".pub") or file.read_bytes() not in stolen


# --- calling ---------------------------------------------------------------------------------------------------


def site_pair(world: World, name: str, **change: object) -> tuple[bytes, bytes]:
    """Return key and certificate for `name`, right in every respect but what is changed."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority, now = change.get("authority", world.coordinator.authority), change.get("now", world.clock())
    made = issue(authority, key.public_key(), name, change.get("role", "site"), now, 1)  # type: ignore[arg-type]
    if change.get("known", True) and name == "berlin":
        world.coordinator.members.renew(name, made, world.clock())
    return pem(key), to_pem(made).encode()


def test_only_a_members_valid_certificate_opens_the_service(world: World) -> None:
    now, day = world.clock(), timedelta(days=1)
    assert code_of(world, site_pair(world, "berlin")) == "OK"
    assert code_of(world, site_pair(world, "berlin", now=now - 2 * day)) == "UNAVAILABLE"  # expired
    assert code_of(world, site_pair(world, "berlin", now=now + day)) == "UNAVAILABLE"  # not yet valid
    other = create_authority("north", now)
    assert code_of(world, site_pair(world, "berlin", authority=other)) == "UNAVAILABLE"
    assert code_of(world, None) == "UNAVAILABLE"
    assert code_of(world, site_pair(world, "berlin", role="service")) in ("UNAVAILABLE", "PERMISSION_DENIED")
    assert code_of(world, site_pair(world, "nobody")) == "PERMISSION_DENIED"
    # Signed by the right root in a member's name, and never issued: a stolen root key alone is not enough.
    assert code_of(world, site_pair(world, "berlin", known=False)) == "PERMISSION_DENIED"


def test_the_service_judges_by_its_own_clock_too(world: World) -> None:
    # TLS goes by the machine's clock; the check of each call by the one handed in.
    pair = site_pair(world, "berlin")  # for a day
    world.clock.ahead = timedelta(days=2)
    try:
        assert code_of(world, pair) == "PERMISSION_DENIED"
    finally:
        world.clock.ahead = timedelta()
    late = ConsortiumClient(world.service("berlin").enrolment, lambda: world.clock() + timedelta(days=8))
    with pytest.raises(VerificationError, match=r"expired at .* UTC; this machine's clock says"):
        late.status()


def test_the_service_renews_its_own_certificate(tmp_path: Path) -> None:
    with running(tmp_path) as world:
        presented = []
        for world.clock.ahead in (timedelta(), timedelta(days=4), timedelta(days=5)):
            with suppress(grpc.RpcError):  # from here on not yet valid by this machine's clock
                raw(world, f"/{SERVICE}/Status", b"{}", None, world.coordinator.settings.enrolment)
            host, port = world.coordinator.settings.enrolment.split(":")
            presented.append(ssl.get_server_certificate((host, int(port))))
        assert presented[0] == presented[1] != presented[2]


def presented(world: World) -> str:
    """Return the certificate that the service shows to a new connection."""
    host, port = world.coordinator.settings.enrolment.split(":")
    return ssl.get_server_certificate((host, int(port)))


def test_a_rotation_replaces_the_services_key_while_it_runs(world: World) -> None:
    def handshake() -> str:
        with suppress(grpc.RpcError):  # gRPC looks for a newer certificate at each connection of its own
            raw(world, f"/{SERVICE}/Status", b"{}", None, world.coordinator.settings.enrolment)
        return presented(world)

    before = handshake()
    assert handshake() == before
    world.coordinator.rotate(world.clock() + timedelta(hours=1))  # nothing is due before its time
    assert handshake() == before
    assert run(rotate, "-C", world.coordinator.directory).exit_code == 0
    after = handshake()
    assert read_certificate(after).public_key() != read_certificate(before).public_key()
    assert world.enrol("graz").status().site == "graz"
    (world.coordinator.directory / "flower/rotated").write_text("soon")
    with pytest.raises(StateError, match="cannot be read"):
        world.coordinator.outdated(read_certificate(after), world.clock())
    world.coordinator.rotate(world.clock() - timedelta(hours=1))
    assert not world.coordinator.outdated(read_certificate(after), world.clock())
    assert world.coordinator.outdated(read_certificate(after), world.clock() - timedelta(hours=2))  # the clock was fast


def test_a_revoked_site_is_refused_at_its_next_call(world: World) -> None:
    service = world.enrol("parma")
    assert service.status().site == "parma"
    world.coordinator.members.revoke("parma", "key-compromise", world.clock())
    with pytest.raises(RefusedError, match=r"parma was revoked \(key-compromise\) and is not a member"):
        service.status()
    with pytest.raises(RefusedError, match="not a member"):
        service.renew()
    again = world.invite("parma")  # it may come back, with new keys alone
    with pytest.raises(StateError, match="belongs to site parma already"):
        prepare_request(world.folder / "parma", again)
    old = Enrolment(world.folder / "parma").asked.keys
    with pytest.raises(RefusedError, match="used in this consortium before"):
        request_membership(again, JoinRequest.make(again.secret, old, *private_keys(world, "parma")))


def test_the_name_in_a_call_is_the_certificates(world: World) -> None:
    pair = site_pair(world, "berlin")
    answer = Status.decode(raw(world, f"/{SERVICE}/Status", Nothing().encode(), pair))
    assert answer.site == "berlin"
    with pytest.raises(grpc.RpcError, match="Extra inputs"):
        raw(world, f"/{SERVICE}/Status", b'{"site":"lyon"}', pair)


def test_a_renewed_certificate_replaces_the_old_one(world: World) -> None:
    service = world.enrol("porto")
    before = service.enrolment.certificate
    after = service.renew()
    assert after.serial_number != before.serial_number
    assert name_of(after, "site") == "porto"
    assert service.enrolment.certificate == after
    assert (service.enrolment.directory / "keys/tls.pem").stat().st_mode & 0o077 == 0
    assert service.status().site == "porto"


def test_two_renewals_of_a_site_at_once_leave_it_a_certificate_that_counts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, keep, first, kept = world.enrol("vaduz"), Enrolment.keep_certificate, threading.Lock(), threading.Event()

    def slowly(own: Enrolment, certificate: x509.Certificate, key: bytes) -> None:
        if first.acquire(blocking=False):
            kept.wait(0.5)  # as long as the other needs
        keep(own, certificate, key)
        kept.set()

    monkeypatch.setattr(Enrolment, "keep_certificate", slowly)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda _: service.renew(), range(2)))
    assert service.status().site == "vaduz"


def pair_of(service: ConsortiumClient) -> tuple[bytes, bytes]:
    """Return key and certificate as a backup of a site holds them now."""
    return service.enrolment.tls, to_pem(service.enrolment.certificate).encode()


def renewed_over(world: World, pair: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Renew a certificate as whoever has its key can."""
    key = ec.generate_private_key(ec.SECP256R1())
    reply = raw(world, f"/{SERVICE}/Renew", RenewRequest(request=request(key)).encode(), pair)
    return pem(key), RenewReply.decode(reply).certificate.encode()


def test_a_certificate_from_an_old_backup_opens_and_renews_nothing(world: World) -> None:
    service = world.enrol("lund")
    backup = pair_of(service)
    service.renew()
    assert code_of(world, backup) == "PERMISSION_DENIED"
    with pytest.raises(grpc.RpcError, match="replaced or withdrawn"):
        renewed_over(world, backup)
    assert service.status().site == "lund"
    assert service.renew() == service.enrolment.certificate


def test_a_site_whose_new_certificate_was_lost_renews_the_old_one_again(world: World) -> None:
    service = world.enrol("narvik")
    lost = [renewed_over(world, pair_of(service)) for _ in range(3)]
    assert service.status().site == "narvik"
    service.renew()
    assert service.status().site == "narvik"
    assert [code_of(world, pair) for pair in lost] == ["PERMISSION_DENIED"] * 3


@pytest.mark.parametrize("used", [False, True])
def test_of_a_site_and_a_thief_of_its_key_one_goes_on(world: World, used: bool) -> None:
    name = "kiel" if used else "bonn"
    service = world.enrol(name)
    stolen = renewed_over(world, pair_of(service))
    if used:
        assert code_of(world, stolen) == "OK"
        with pytest.raises(RefusedError, match="replaced or withdrawn"):  # which shows the theft
            service.renew()
        outcome = run(renew, "--force", world.folder / name / "site.toml")
        assert "asking again with the identity key" in outcome.stderr
    else:
        service.renew()
    assert code_of(world, stolen) == "PERMISSION_DENIED"
    assert service.status().site == name


def test_a_thief_withdraws_nothing_that_the_identity_key_has_asked_for(world: World) -> None:
    stolen = renewed_over(world, pair_of(world.enrol("turku")))
    assert code_of(world, stolen) == "OK"
    key = ec.generate_private_key(ec.SECP256R1())
    asked = ReturnRequest.make("turku", request(key), private_key(world, "turku"), world.clock())
    back = world.coordinator.readmit(asked, world.clock())
    with pytest.raises(grpc.RpcError, match="replaced or withdrawn"):  # before the site has used what it got
        renewed_over(world, stolen)
    assert code_of(world, (pem(key), to_pem(back).encode())) == "OK"


def test_a_member_that_was_away_for_too_long_comes_back_by_its_identity(world: World) -> None:
    service = world.enrol("genf")
    own = service.enrolment
    key = load_pem_private_key(own.tls, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    old = issue(world.coordinator.authority, key.public_key(), "genf", "site", world.clock() - timedelta(days=9), 7)
    own.keep_certificate(old, own.tls)
    with pytest.raises(VerificationError, match="expired"):
        service.status()
    assert service.come_back().not_valid_after_utc > world.clock()
    assert service.status().site == "genf"
    wanted = request(ec.generate_private_key(ec.SECP256R1()))
    now, identity = world.clock(), private_key(world, "genf")
    stranger = ReturnRequest.make("genf", wanted, private_key(world, "berlin"), now)
    swapped = ReturnRequest.make("genf", wanted, identity, now).model_copy(update={"site": "berlin"})
    nobody = ReturnRequest.make("nobody", wanted, identity, now)
    late = [ReturnRequest.make("genf", wanted, identity, now + timedelta(minutes=m)) for m in (-6, 6)]
    redated = late[0].model_copy(update={"time": int(now.timestamp())})
    unsigned = "is not a member, or the request for a new certificate was not signed"
    refused = [(asked, unsigned) for asked in (stranger, swapped, nobody, redated)]
    for asked, why in [
        *refused,
        *((asked, "differs by over 5 minutes from the coordinator's clock") for asked in late),
    ]:
        with pytest.raises(grpc.RpcError, match=why):
            raw(world, f"/{ENROLMENT}/Return", asked.encode(), port=world.coordinator.settings.enrolment)
    world.coordinator.members.revoke("genf", "left", world.clock())
    own.keep_certificate(old, own.tls)
    with pytest.raises(RefusedError, match=r"genf was revoked \(left\)"):
        service.come_back()
    with pytest.raises(grpc.RpcError, match="is not a member, or") as told:  # who has not its keys is not told
        raw(world, f"/{ENROLMENT}/Return", stranger.encode(), port=world.coordinator.settings.enrolment)
    assert "revoked" not in str(told.value)


@pytest.mark.parametrize("method", [f"/{SERVICE}/Renew", f"/{ENROLMENT}/Join"])
def test_messages_have_a_size(world: World, method: str) -> None:
    joining = method.startswith(f"/{ENROLMENT}/")
    port = world.coordinator.settings.enrolment if joining else ""
    pair = None if joining else site_pair(world, "berlin")
    with pytest.raises(grpc.RpcError) as caught:
        raw(world, method, b"x" * (MAX_MESSAGE_BYTES + 1), pair, port)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as caught:
        raw(world, method, b"[" * MAX_MESSAGE_BYTES, pair, port)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_headers_have_a_size(world: World) -> None:
    root = to_pem(world.coordinator.authority.certificate).encode()
    with grpc.secure_channel(world.coordinator.settings.enrolment, grpc.ssl_channel_credentials(root)) as channel:
        call = channel.unary_unary(f"/{ENROLMENT}/Join")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"{}", timeout=10, metadata=[("bomb", "x" * 200_000)])
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.RpcError) as caught:
            call(b"{}", timeout=10)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # and the service goes on


def test_the_joining_port_serves_nothing_else_and_both_speak_tls_1_3(world: World) -> None:
    settings = world.coordinator.settings
    with pytest.raises(grpc.RpcError) as caught:
        raw(world, f"/{SERVICE}/Roster", Nothing().encode(), None, settings.enrolment)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    context = ssl.create_default_context(cadata=to_pem(world.coordinator.authority.certificate))
    context.set_alpn_protocols(["h2"])
    host, port = settings.enrolment.split(":")
    with socket.create_connection((host, int(port)), 5) as plain, context.wrap_socket(plain, server_hostname=host) as s:
        assert s.version() == "TLSv1.3"


def test_nothing_is_answered_in_the_clear(world: World) -> None:
    with grpc.insecure_channel(world.coordinator.settings.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{SERVICE}/Status")(b"{}", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


# --- the log ---------------------------------------------------------------------------------------------------


def test_members_read_the_log_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(tmp_path) as world:
        sites = [world.enrol(name) for name in ("berlin", "lyon", "oslo")]
        assert sites[0].checkpoint() == b""
        assert sites[0].roster().policy == ""
        own = world.coordinator
        own.members.found(StatedFloor(), world.clock())
        with open_journal(own.log_directory, own.keys) as journal:
            assert log_members(own, journal) == 1
            assert log_members(own, journal) == 0
        fourth = world.enrol("turin")
        own.members.revoke("lyon", "left", world.clock())
        with open_journal(own.log_directory, own.keys) as journal, monkeypatch.context() as broken:
            # Killed after the leaves were written and before that was noted, they are not written twice.
            broken.setattr(own.members, "mark_logged", _interrupted)
            with pytest.raises(InterruptedError):
                log_members(own, journal)
        with open_journal(own.log_directory, own.keys) as journal:
            assert log_members(own, journal) == 2
        with open_log(own.log_directory, own.settings.origin, own.keys.log) as log:
            assert log.size == 3
            note = log.checkpoint()
        assert fourth.checkpoint() == note
        leaves = fourth.leaves(0)
        assert fourth.leaves(3) == []
        policy = Policy.parse(fourth.roster().policy)
        assert [witness.name for witness in policy.witnesses] == ["berlin", "oslo", "turin"]
        checkpoint, _ = open_checkpoint(note, policy.log)
        check_inclusion(fourth.inclusion(2, 3), 2, 3, checkpoint.root, leaf_hash(leaves[2]))
        with open_log(own.log_directory, own.settings.origin, own.keys.log) as log:
            first = log.root_at(1)
        check_consistency(fourth.consistency(1, 3), 1, first, 3, checkpoint.root)
        with pytest.raises(ProtocolError, match="has fewer leaves"):
            fourth.inclusion(3, 3)
        with pytest.raises(ProtocolError, match="has fewer leaves"):
            fourth.consistency(1, 4)
        # The members witness it, and an auditor accepts it under the policy that the service hands out.
        signatures = list[Signature]()
        for site in (sites[0], sites[2], fourth):
            key = read_key(site.enrolment.directory / "keys/witness.pem", "witness")
            witness = Witness.create(
                tmp_path / f"w-{site.enrolment.asked.keys.site}",
                policy.log,
                site.status().site,
                key,
                pq=private_keys(world, site.enrolment.asked.keys.site)[1],
            )
            assert NoteKey.parse(site.enrolment.asked.keys.witness) == witness.public
            answer = witness.add(note, 0, (), 1)
            assert not isinstance(answer, Stale)
            signatures += answer
        with open_log(own.log_directory, own.settings.origin, own.keys.log, pq=own.keys.pq) as log:
            assert log.cosign(3, signatures, policy) == 0
            accepted = log.note(3)
        verdict = verify_bundle(lambda: leaves, accepted, policy)
        assert verdict.ok, verdict
        assert Checkpoint.parse(accepted.decode().split("\n\n")[0] + "\n").size == 3


def _interrupted(*arguments: object) -> None:
    raise InterruptedError


# --- without a network -----------------------------------------------------------------------------------------


def test_the_way_by_files_is_the_way_by_wire(world: World, tmp_path: Path) -> None:
    token = world.invite("malmo")
    directory = tmp_path / "malmo"
    asked = prepare_request(directory, token)
    by_file = world.coordinator.answer(JoinRequest.decode(asked.encode()), world.clock())
    assert by_file == request_membership(token, asked)
    world.coordinator.approve("malmo", asked.keys.fingerprint, world.clock())
    by_file = world.coordinator.answer(JoinRequest.decode(asked.encode()), world.clock())
    assert by_file == request_membership(token, asked)
    accept_membership(directory, by_file, world.clock())
    written = {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    accept_membership(directory, request_membership(token, asked), world.clock())
    assert {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == written
    json.loads(by_file.encode())


def test_errors_of_the_service_name_no_secret(world: World) -> None:
    token = world.invite("genoa")
    with pytest.raises(PrivetError) as caught:
        raw_join(world, b'{"secret":"' + token.secret.hex().encode() + b'","keys":1}')
    assert token.secret.hex() not in str(caught.value)


def test_requests_are_for_keys_that_tls_and_flower_take(world: World) -> None:
    asked = Enrolment(world.folder / "berlin").asked.keys.model_dump()
    for change in (
        {"request": request(ec.generate_private_key(ec.SECP384R1()))},
        {"request": "-----BEGIN CERTIFICATE REQUEST-----"},
        {"node": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1bfzdhDMd1bfzdhDMd1bfzdhDMd1bfzdhDMd1bfzdh"},
        {"node": "x"},
        {"witness": "berlin+00000000+AAAA"},
        {"site": "../x"},
    ):
        with pytest.raises(ValueError, match="validation error"):
            type(Enrolment(world.folder / "berlin").asked.keys)(**{**asked, **change})
