"""A site's certificate renews itself: in time, in its own name, and not that of a site that was revoked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from privet.client.network.consortium import ConsortiumClient
from privet.client.network.renewal import Renewal, due_at, renewing
from privet.client.network.telemetry import SiteMetrics
from privet.common.errors import ProtocolError
from privet.common.pki.certificates import create_authority, issue, name_of, read_certificate, to_pem
from privet.common.pki.enrolment import SERVICE, RenewReply, RenewRequest
from tests.server.test_consortium import raw, site_pair
from tests.support.consortium_world import World, running
from tests.support.fleet_world import until

DAY = timedelta(days=1)
NOW = datetime(2026, 3, 1, tzinfo=UTC)
AUTHORITY = create_authority("north", NOW)
KEY = ec.generate_private_key(ec.SECP256R1()).public_key()


def certificate(age: timedelta, days: float = 7) -> x509.Certificate:
    return issue(AUTHORITY, KEY, "berlin", "site", NOW - age, days)


@dataclass
class Issuer:
    """An issuer of these tests, whose certificates and clock are as they are set."""

    present: x509.Certificate
    now: datetime = NOW
    failure: Exception | None = None
    attempts: list[datetime] = field(default_factory=list)

    @property
    def enrolment(self) -> Issuer:
        return self

    @property
    def certificate(self) -> x509.Certificate:
        return self.present

    @property
    def clock(self) -> Callable[[], datetime]:
        return lambda: self.now

    def renew(self) -> x509.Certificate:
        self.attempts.append(self.now)
        if self.failure is not None:
            raise self.failure
        self.present = issue(AUTHORITY, KEY, "berlin", "site", self.now, 7)
        return self.present


@given(st.floats(0.001, 30), st.integers(0, 2**64))
def test_it_begins_with_less_than_a_third_of_life_left_and_time_to_repeat(days: float, seed: int) -> None:
    found = certificate(timedelta(seconds=seed % 10**6), days)
    start, end = found.not_valid_before_utc, found.not_valid_after_utc
    assert (end - start) / 6 < end - due_at(found) <= (end - start) / 3


def test_sites_that_joined_together_do_not_renew_together() -> None:
    assert len({due_at(certificate(timedelta())) for _ in range(20)}) > 10


def test_left_alone_for_a_year_a_site_is_never_without_a_certificate() -> None:
    issuer = Issuer(certificate(timedelta()))
    renewal = Renewal(issuer)
    for _ in range(365 * 30):
        assert issuer.now < issuer.present.not_valid_after_utc
        wait = renewal.tend()
        assert 0 < wait <= 3600
        issuer.now += timedelta(seconds=wait)
    assert 60 < len(issuer.attempts) < 120


def test_attempts_that_fail_are_repeated_with_longer_waits_and_end_in_time(caplog: pytest.LogCaptureFixture) -> None:
    issuer = Issuer(certificate(5.5 * DAY), failure=ProtocolError("the service cannot be reached"))
    renewal = Renewal(issuer, chance=lambda: 1.0)
    waits = [renewal.tend() for _ in range(10)]
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]
    assert "cannot be reached" in caplog.text
    for failure in (
        OSError("the disk is full"),
        x509.DuplicateExtension("what a parser says", x509.ObjectIdentifier("1.2.3")),
    ):
        issuer.failure = failure
        assert renewal.tend() == 3600
    issuer.failure = None
    assert renewal.tend() == 60
    assert renewal.tend() == 3600  # nothing to do for a while
    issuer.failure, issuer.now = ProtocolError("again"), NOW + 6 * DAY
    assert renewal.tend() == 60
    assert [Renewal(issuer, chance=lambda: 0.0).tend() for _ in range(1)] == [30]


def test_an_expired_certificate_is_not_renewed_and_the_operator_is_told_what_to_do(
    caplog: pytest.LogCaptureFixture,
) -> None:
    issuer = Issuer(certificate(7.1 * DAY))
    assert Renewal(issuer).tend() == 3600
    assert issuer.attempts == []
    assert "run `privet site renew SITE`" in caplog.text
    issuer.present = certificate(timedelta())  # the operator did
    assert Renewal(issuer).tend() == 3600


def test_the_life_left_is_measured() -> None:
    metrics = SiteMetrics()
    issuer = Issuer(certificate(timedelta()), datetime.now(UTC))
    issuer.present = issue(AUTHORITY, KEY, "berlin", "site", datetime.now(UTC), 1)
    Renewal(issuer, metrics.certificate_until).tend()
    left = metrics.registry.get_sample_value("privet_site_certificate_seconds")
    assert left is not None
    assert 86_300 < left <= 86_400


# With the real service


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("renewal")) as found:
        yield found


def aged(world: World, site: str, age: timedelta, days: float = 7.0) -> ConsortiumClient:
    """Enrol a site and give it a certificate that was issued some time ago."""
    service = world.enrol(site)
    key = load_pem_private_key(service.enrolment.tls, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    old = issue(world.coordinator.authority, key.public_key(), site, "site", world.clock() - age, days)
    world.coordinator.members.renew(site, old, world.clock())
    service.enrolment.keep_certificate(old, service.enrolment.tls)
    return service


def test_a_serving_site_renews_over_its_present_certificate(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    service = aged(world, "lyon", timedelta(seconds=40), 60 / 86_400)  # lives for a minute, and has 20 seconds left
    before = service.enrolment.certificate
    with renewing(Renewal(service)):
        until(lambda: "the certificate was renewed" in caplog.text)
    after = service.enrolment.certificate
    assert after != before
    assert name_of(after, "site") == "lyon"
    assert after.not_valid_after_utc > world.clock() + 6 * DAY
    assert service.enrolment.tls != before.public_bytes(Encoding.PEM)
    assert after.public_key() != before.public_key()
    assert service.status().site == "lyon"


def test_a_site_with_time_left_asks_for_nothing(world: World) -> None:
    service = aged(world, "oslo", 4 * DAY)
    before = service.enrolment.certificate
    assert Renewal(service).tend() == 3600
    assert service.enrolment.certificate == before


def test_a_revoked_site_does_not_renew(world: World, caplog: pytest.LogCaptureFixture) -> None:
    service = aged(world, "parma", 5.5 * DAY)
    before = service.enrolment.certificate
    world.coordinator.members.revoke("parma", "key-compromise", world.clock())
    assert Renewal(service).tend() == 3600
    assert service.enrolment.certificate == before
    assert "is not a member" in caplog.text


def test_what_a_request_to_renew_asks_for_besides_is_passed_over(world: World) -> None:
    world.enrol("berlin")
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.UniformResourceIdentifier(f"urn:privet:site:{name}") for name in ("berlin", "oslo")]
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "north root")]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )
    body = RenewRequest(request=asked).encode()
    reply = RenewReply.decode(raw(world, f"/{SERVICE}/Renew", body, site_pair(world, "berlin")))
    made = read_certificate(reply.certificate)
    assert name_of(made, "site") == "berlin"
    assert made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    uses = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(uses) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert made.not_valid_after_utc <= world.clock() + 7 * DAY


@pytest.mark.parametrize("name", ["oslo-2", "bergen"])
def test_a_certificate_in_another_name_or_for_another_key_is_not_kept(
    world: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service = aged(world, "bergen" if name == "bergen" else "trondheim", 5.5 * DAY)
    before = service.enrolment.tls
    other = issue(world.coordinator.authority, KEY, name, "site", world.clock(), 7)
    answer = RenewReply(certificate=to_pem(other))
    monkeypatch.setattr(ConsortiumClient, "call", lambda *arguments: answer)
    assert Renewal(service).tend() <= 60
    assert service.enrolment.tls == before
