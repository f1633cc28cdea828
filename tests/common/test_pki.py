"""Certificates, tokens and fingerprints: what is accepted is exactly what was meant, and the rest is explained."""

from __future__ import annotations

import ssl
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import ProtocolError
from privet.common.pki.certificates import (
    Authority,
    create_authority,
    due_for_renewal,
    fingerprint,
    issue,
    name_of,
    problems,
    read_certificate,
    read_request,
    request,
    same_fingerprint,
    to_pem,
)
from privet.common.pki.token import Token, hash_of

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return create_authority("north", NOW - DAY)


def certificate(authority: Authority, name: str = "berlin", **change: object) -> x509.Certificate:
    role, now = change.get("role", "site"), change.get("now", NOW)
    return issue(authority, KEY.public_key(), name, role, now, 7)  # type: ignore[arg-type]


def test_a_good_certificate_has_no_problem(authority: Authority) -> None:
    site, service = certificate(authority), certificate(authority, "127.0.0.1", role="service")
    assert problems(site, authority.certificate, "site", NOW, "berlin") == ()
    assert problems(service, authority.certificate, "service", NOW, "127.0.0.1") == ()
    assert read_certificate(to_pem(site)) == site
    assert name_of(site, "site") == "berlin"
    assert name_of(site, "service") is None


@pytest.mark.parametrize(
    ("role", "now", "name", "why"),
    [
        ("site", NOW + 7 * DAY, "berlin", "it expired at 2026-12-03 12:00 UTC"),
        ("site", NOW - timedelta(minutes=6), "berlin", "check the clock"),
        ("service", NOW, None, "it is not for this use"),
        ("site", NOW, "lyon", "it is for berlin, expected lyon"),
    ],
)
def test_what_is_wrong_is_said_in_words(
    authority: Authority, role: str, now: datetime, name: str | None, why: str
) -> None:
    found = problems(certificate(authority), authority.certificate, role, now, name)  # type: ignore[arg-type]
    assert len(found) == 1
    assert why in found[0]


def test_another_root_of_the_same_name_is_told_apart(authority: Authority) -> None:
    other = create_authority("north", NOW - DAY)
    found = problems(certificate(other), authority.certificate, "site", NOW)
    assert len(found) == 1
    assert "not signed by the consortium's root" in found[0]
    # A member's certificate signs no further one.
    forged = Authority(certificate(authority), KEY)
    assert problems(certificate(forged), authority.certificate, "site", NOW) != ()


def test_five_minutes_of_skew_are_nobodys_problem(authority: Authority) -> None:
    assert problems(certificate(authority), authority.certificate, "site", NOW - timedelta(minutes=5)) == ()


@pytest.mark.parametrize(("after", "due"), [(0, False), (4, False), (5, True), (9, True)])
def test_renewal_is_due_at_two_thirds(authority: Authority, after: int, due: bool) -> None:
    assert due_for_renewal(certificate(authority), NOW + after * DAY) is due


@pytest.mark.parametrize("days", [0, -1, 30.1, float("nan")])
def test_certificates_are_short_lived(authority: Authority, days: float) -> None:
    with pytest.raises(ProtocolError, match="at most 30 days"):
        issue(authority, KEY.public_key(), "berlin", "site", NOW, days)


def test_openssl_reads_the_root(authority: Authority) -> None:
    context = ssl.create_default_context(cadata=to_pem(authority.certificate))
    (found,) = context.get_ca_certs()
    assert found["subject"] == ((("commonName", "north root"),),)


# --- requests --------------------------------------------------------------------------------------------------


def test_a_request_names_nobody() -> None:
    found = x509.load_pem_x509_csr(request(KEY).encode())
    assert list(found.subject) == []
    assert list(found.extensions) == []
    assert read_request(request(KEY)) == KEY.public_key()


def test_requests_that_prove_no_usable_key_are_refused() -> None:
    good = x509.load_pem_x509_csr(request(KEY).encode()).public_bytes(Encoding.DER)
    tampered = bytearray(good)
    tampered[-1] ^= 1
    weak = request(ec.generate_private_key(ec.SECP384R1()))
    for text in (weak, _pem(bytes(tampered)), _pem(good[:-4]), "", "x" * 10_000, request(KEY) + "x" * 5000, "ü"):
        with pytest.raises(ProtocolError, match="certificate request"):
            read_request(text)


def _pem(data: bytes) -> str:
    return ssl.DER_cert_to_PEM_cert(data).replace("CERTIFICATE", "CERTIFICATE REQUEST")


# --- tokens and fingerprints -----------------------------------------------------------------------------------


def test_a_token_says_where_whom_and_by_which_root(authority: Authority) -> None:
    token = Token.make("berlin", "host.example:9444", authority.certificate)
    read = Token.parse(f"  {token.text}\n")
    assert read == token
    assert read.certificate == authority.certificate
    assert len({Token.make("berlin", "x:1", authority.certificate).secret for _ in range(8)}) == 8
    assert token.secret.hex() not in hash_of(token.secret)


@settings(deadline=None)
@given(data=st.data())
def test_a_token_is_whole_or_none(data: st.DataObject) -> None:
    text = TOKEN.text
    place = data.draw(st.integers(0, len(text) - 1))
    changed = data.draw(
        st.sampled_from([text[:place], text[:place] + text[place + 1 :], text[:place] + "~" + text[place + 1 :]])
    )
    with pytest.raises(ProtocolError) as caught:
        Token.parse(changed)
    assert TOKEN.secret.hex() not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"site": "../x"}, {"address": "host\x1b[2J:1"}, {"address": "host"}, {"secret": b"x"}]
)
def test_a_token_cannot_say_what_would_mislead(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="the invitation token is incomplete"):
        Token.parse(replace(TOKEN, **change).text)


TOKEN = Token.make("berlin", "host.example:9444", create_authority("north", NOW).certificate)


@given(data=st.binary(max_size=40))
def test_fingerprints_are_sixty_digits_however_they_are_typed(data: bytes) -> None:
    found = fingerprint(data)
    assert [len(group) for group in found.split(" ")] == [5] * 12
    assert found.replace(" ", "").isdecimal()
    for typed in (found, found.replace(" ", ""), found.replace(" ", "-"), f" {found} "):
        assert same_fingerprint(typed, found)
    for wrong in ("", found[:-1], found[:29], found + "0", found[1:] + found[0] + "1"):
        assert not same_fingerprint(wrong, found)


def test_a_fingerprint_is_what_it_was() -> None:
    # SHA-256 of the domain and the data, as a number, its last 60 decimal digits.
    digest = hashes.Hash(hashes.SHA256())
    digest.update(b"privet-fingerprint/1\x00key")
    number = str(int.from_bytes(digest.finalize(), "big"))[-60:]
    assert fingerprint(b"key").replace(" ", "") == number
