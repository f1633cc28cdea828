"""Envelopes and statements: one encoding each, nothing parsed unverified, nothing accepted that is not ours."""

from __future__ import annotations

import base64
import hashlib
import json
from contextlib import suppress
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from privet.common.canonical import canonical_json
from privet.common.errors import PrivetError, ProtocolError, VerificationError
from privet.common.log import envelope, note
from privet.common.log.encoding import encode_statement, parse_statement
from privet.common.log.envelope import Envelope, pae
from privet.common.log.merkle import leaf_hash
from privet.common.log.statements import Mechanism, Statement
from privet.common.privacy.accounting import PrivacyEvent
from tests.support.log_world import World, digest, member, private, public, story

WORLD = story()
STATEMENTS: dict[str, tuple[Statement, str]] = {statement.type: (statement, author) for statement, author in WORLD.said}
KEYS = {public(name) for name in ("coordinator", *WORLD.sites)}
LEAF = WORLD.leaves[4]


def sealed(payload: bytes, author: str = "coordinator") -> bytes:
    """Sign any payload whatever."""
    signature = private(author).sign(pae(envelope.PAYLOAD_TYPE, payload))
    return Envelope(payload, public(author), signature).encode()


# Known answers


def test_the_pre_authentication_encoding_is_that_of_the_specification() -> None:
    # DSSE v1.0.0, protocol.md, section Test Vectors.
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    # Lengths count bytes, not characters.
    assert pae("é", "è".encode()) == "DSSEv1 2 é 2 è".encode()


def test_an_envelope_is_read_by_any_json_reader_as_dsse_and_in_toto_say() -> None:
    document = json.loads(LEAF)
    assert set(document) == {"payload", "payloadType", "signatures"}
    assert document["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(document["payload"])
    statement = json.loads(payload)
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "urn:privet:statement:site-round:1"
    assert all(set(subject) == {"name", "digest"} for subject in statement["subject"])
    (signature,) = document["signatures"]
    assert signature["keyid"] == public("berlin").hex()
    private("berlin").public_key().verify(base64.b64decode(signature["sig"]), pae(document["payloadType"], payload))
    # RFC 8785 twice over.
    assert canonical_json(document) == LEAF
    assert canonical_json(statement) == payload


def test_statements_are_canonical_json_as_another_library_writes_it() -> None:
    for leaf in WORLD.leaves:
        payload = Envelope.decode(leaf).payload
        assert rfc8785.dumps(json.loads(payload)) == payload


@settings(max_examples=200)
@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e9), st.integers(0, 2**53 - 1))
def test_numbers_are_written_as_rfc_8785_says(metric: float, epsilon: float, time: int) -> None:
    world = World()
    world.adapters["flu"] = digest("adapter")
    statement = world.round_close(
        "flu", 1, digest("x"), time=time, metrics={"loss": metric}, epsilon={"oslo": epsilon}, failures={"lyon": '"\\'}
    )
    payload = encode_statement(statement)
    assert payload == rfc8785.dumps(json.loads(payload, parse_int=float))
    assert parse_statement(payload) == statement


def test_the_format_has_not_moved() -> None:
    """Logs are kept for years: a change here needs a new `format`."""
    assert leaf_hash(WORLD.leaves[0]).hex() == FIRST
    assert WORLD.frontier.root.hex() == ROOT


FIRST = "32a81b1c262ab8ff66ceb05f975c498fb0b0e46ea38b2bb56fe9c543aa2a8275"
ROOT = "60e6d1b520fb71b01d3415ccd278c05874094d711faa6573be57200ef2612dc4"


# Envelopes


@pytest.mark.parametrize("kind", sorted(STATEMENTS))
def test_every_kind_of_statement_is_signed_and_read_back(kind: str) -> None:
    statement, author = STATEMENTS[kind]
    data = envelope.sign_envelope(statement, private(author))
    assert envelope.verify_envelope(data, KEYS) == (public(author), statement)
    assert len(data) < 3000
    subject = json.loads(Envelope.decode(data).payload)["subject"]
    assert {entry["name"]: entry["digest"]["sha256"] for entry in subject} == {
        name: value.removeprefix("sha256:") for name, value in statement.subject().items()
    }


def test_the_story_has_every_kind_but_those_that_change_members() -> None:
    assert len(STATEMENTS) == 8
    assert {"join", "revoke"}.isdisjoint(STATEMENTS)


REORDERED = json.dumps(dict(reversed(json.loads(LEAF).items())), separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"{}",
        b" " + LEAF,
        LEAF + b"\n",
        json.dumps(json.loads(LEAF)).encode(),
        REORDERED,
        LEAF.replace(b'"keyid"', b'"keyId"'),
        LEAF.replace(b'"payloadType":"application/vnd.in-toto+json",', b""),
        LEAF.replace(b"vnd.in-toto+json", b"vnd.in-toto.x+json"),
        LEAF.replace(b'"signatures":[', b'"signatures":[],"signatures":['),
        LEAF.replace(b'"payload":"', b'"payload":"\\u0065'),
        LEAF.replace(public("berlin").hex().encode(), public("berlin").hex().upper().encode()),
        LEAF.replace(b'=="}]}', b'="}]}'),
        LEAF.replace(b'"}]}', b'"},{"keyid":"' + b"0" * 64 + b'","sig":"' + b"A" * 86 + b'=="}]}'),
        b'{"payload":"eyJ9","payloadType":"application/vnd.in-toto+json","signatures":[]}',
    ],
)
def test_other_envelopes_are_refused(wrong: bytes) -> None:
    assert wrong != LEAF
    with pytest.raises(ProtocolError, match="envelope"):
        Envelope.decode(wrong)


def test_base64_has_one_form() -> None:
    """Python's decoder skips foreign characters and ignores trailing bits; both would make a leaf malleable."""
    payload = json.loads(LEAF)["payload"]
    at = LEAF.index(payload.encode()) + len(payload)
    spaced = LEAF[: at - 8] + b" " + LEAF[at - 8 :]
    with pytest.raises(ProtocolError):
        Envelope.decode(spaced)
    for padding, bits in (("=", 4), ("==", 16)):
        text = base64.b64encode(b"x" * (4 if padding == "==" else 5)).decode()
        assert text.endswith(padding)
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        last = text.rstrip("=")[-1]
        accepted = 0
        for offset in range(bits):
            other = alphabet[alphabet.index(last) // bits * bits + offset]
            varied = text.rstrip("=")[:-1] + other + padding
            assert base64.b64decode(varied) == base64.b64decode(text)
            with suppress(ProtocolError):
                Envelope.decode(LEAF.replace(payload.encode(), varied.encode()))
                accepted += 1
        assert accepted == 1


WEAK = (
    "00" * 32,
    "01" + "00" * 31,
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "ed" + "ff" * 30 + "7f",
    "ec" + "ff" * 31,
)


@pytest.mark.parametrize("key", WEAK)
def test_no_signature_counts_under_a_key_of_small_order(key: str) -> None:
    statement, _ = STATEMENTS["site-round"]
    for number in range(16):  # about a quarter of all messages would have this signature
        data = envelope.sign_envelope(statement.model_copy(update={"time": number}), private("berlin"))
        forged = Envelope(
            Envelope.decode(data).payload, bytes.fromhex(key), bytes.fromhex(WEAK[1]) + bytes(32)
        ).encode()
        with pytest.raises(VerificationError, match="is a weak one"):
            envelope.verify_envelope(forged, {bytes.fromhex(key)})
    witness = note.NoteKey("oslo", note.ED25519, bytes.fromhex(key))
    signed = note.Signature("oslo", witness.id, bytes.fromhex(WEAK[1]) + bytes(32))
    with pytest.raises(VerificationError, match="is a weak one"):
        note.verify_note(note.Note("text\n", (signed,)), (witness,))


def test_a_signature_counts_only_if_it_matches_and_its_key_is_known() -> None:
    statement, _ = STATEMENTS["site-round"]
    data = envelope.sign_envelope(statement, private("berlin"))
    with pytest.raises(VerificationError, match="is not a key of a member"):
        envelope.verify_envelope(data, KEYS - {public("berlin")})
    forged = data.replace(public("berlin").hex().encode(), public("oslo").hex().encode())
    with pytest.raises(VerificationError, match="does not match"):
        envelope.verify_envelope(forged, KEYS)


def test_nothing_is_parsed_before_its_signature_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    monkeypatch.setattr(envelope, "parse_statement", parsed.append)
    signed = Envelope.decode(LEAF)
    for bad in (
        Envelope(signed.payload + b" ", signed.key, signed.signature),
        Envelope(signed.payload, signed.key, bytes(64)),
        Envelope(signed.payload, private("mallory").public_key().public_bytes_raw(), signed.signature),
    ):
        with pytest.raises(VerificationError):
            envelope.verify_envelope(bad.encode(), KEYS)
    assert parsed == []
    envelope.verify_envelope(LEAF, KEYS)
    assert parsed == [signed.payload]


def test_the_same_bytes_signed_as_something_else_do_not_count() -> None:
    payload = Envelope.decode(LEAF).payload
    for message in (payload, pae("application/json", payload), b"DSSEv1" + payload):
        with pytest.raises(VerificationError):
            envelope.verify_envelope(
                Envelope(payload, public("berlin"), private("berlin").sign(message)).encode(), KEYS
            )


def test_an_envelope_fits_a_leaf() -> None:
    world = World(sites=tuple(f"site-{i:05d}-" + "x" * 40 for i in range(1000)))
    world.adapters["flu"] = digest("adapter")
    with pytest.raises(ProtocolError, match="at most 65535 bytes, got"):
        envelope.sign_envelope(world.round_open("flu", 1), private("coordinator"))
    with pytest.raises(ProtocolError, match="at most 65535 bytes, got 65536"):
        Envelope.decode(b"x" * 65_536)


# Statements


def resigned(statement: Statement, change: Any) -> bytes:
    """Return the payload with its JSON changed by `change`, in canonical form again."""
    document = json.loads(encode_statement(statement))
    change(document)
    return canonical_json(document)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*at, key), *paths(inner, (*at, key))]]


MAPS = ("failures", "metrics", "commitments", "files", "epsilon", "subject")
NULLABLE = {"charge", "ledger", "parameters", "transcript", "metrics", "epsilon", "privacy", "validation", "previous"}
NULLABLE |= {"max_epsilon", "max_delta", "limit", "witness", "tokenizer"}


def json_type(value: Any) -> type:
    return float if type(value) is int else type(value)


@pytest.mark.parametrize("kind", sorted(STATEMENTS))
def test_a_field_of_another_type_or_a_missing_one_is_refused(kind: str) -> None:
    statement, _ = STATEMENTS[kind]
    document = json.loads(encode_statement(statement))
    for path in paths(document):
        *inside, name = path
        target = document
        for part in inside:
            target = target[part]
        original = target[name]
        value: Any
        for value in (True, [], {}, "\x1b[31m", -1, None):
            same = json_type(value) is json_type(original) and value != "\x1b[31m"
            if not same and not (value is None and name in NULLABLE):
                target[name] = value
                with pytest.raises(ProtocolError):
                    parse_statement(canonical_json(document))
        if isinstance(target, dict) and (not inside or inside[-1] not in MAPS):
            del target[name]
            with pytest.raises(ProtocolError):
                parse_statement(canonical_json(document))
        target[name] = original
    assert parse_statement(canonical_json(document)) == statement


def test_nothing_is_added_to_a_statement() -> None:
    statement, _ = STATEMENTS["site-round"]

    def nested(document: Any) -> Any:
        document["predicate"]["charge"]["training"]["extra"] = 1

    for change in (
        lambda d: d.__setitem__("extra", 1),
        lambda d: d["predicate"].__setitem__("patients", 4711),
        nested,
        lambda d: d["subject"].append({"name": "other", "digest": {"sha256": "0" * 64}}),
        lambda d: d["subject"][0].__setitem__("name", "upload2"),
        lambda d: d["subject"][0]["digest"].__setitem__("sha256", "0" * 64),
        lambda d: d.__setitem__("predicateType", "urn:privet:statement:round-open:1"),
        lambda d: d["predicate"].__setitem__("type", "round-open"),
        lambda d: d["predicate"].__setitem__("format", 2),
    ):
        with pytest.raises(ProtocolError):
            parse_statement(resigned(statement, change))


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"null",
        b"[]",
        b'{"_type":"https://in-toto.io/Statement/v1"}',
        b"[" * 20_000,
        b'{"a":' * 10_000,
        b"1" * 10_000,
        b'{"_type":1e999}',
        b'"\\ud800"',
        b"\xff\xfe",
    ],
)
def test_other_payloads_are_refused(wrong: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_statement(wrong)


def test_json_has_one_form() -> None:
    statement, _ = STATEMENTS["site-round"]
    data = encode_statement(statement)
    assert parse_statement(data) == statement
    for old, new in [
        (b'"round":1', b'"round":1.0'),
        (b'"round":1', b'"round":01'),
        (b'"round":1', b'"round": 1'),
        (b'"round":2', b'"round":2,"round":2'),
        (b'"delta":0.00001', b'"delta":1e-5'),
        (b'"limit":20', b'"limit":20.0'),
        (b'"limit":20', b'"limit":2e1'),
        (b'"limit":20', b'"limit":NaN'),
        (b'"limit":20', b'"limit":Infinity'),
        (b'"run":"flu"', b'"run":"f\\u006cu"'),
        (b'"run":"copd"', b'"run":"\\u0063opd"'),
        (b'{"_type"', b'\xef\xbb\xbf{"_type"'),
    ]:
        if old in data:
            with pytest.raises(ProtocolError):
                parse_statement(data.replace(old, new))


def test_lists_of_sites_ascend_and_keys_have_one_owner() -> None:
    world = World()
    world.adapters["flu"] = digest("adapter")
    with pytest.raises(ValidationError, match="cohort: names must be in ascending order"):
        world.round_open("flu", 1, cohort=("oslo", "berlin"))
    with pytest.raises(ValidationError, match="cohort: names must be in ascending order"):
        world.round_open("flu", 1, cohort=("berlin", "berlin"))
    with pytest.raises(ValidationError, match="one purpose and one owner"):
        world.genesis(coordinator=public("log").hex())
    with pytest.raises(ValidationError, match="must differ"):
        member("oslo").model_validate(member("oslo").model_dump() | {"key": public("witness oslo").hex()})
    with pytest.raises(ValidationError, match="quorum"):
        world.genesis(quorum=1)
    with pytest.raises(ValidationError, match="type 1"):
        world.genesis(log=member("oslo").witness)
    with pytest.raises(ValidationError, match="only a run that ends"):
        world.round_close("flu", 1, digest("x"), adapter_published=digest("y"))


def test_the_mechanism_is_the_one_that_the_accountant_speaks_of() -> None:
    event = PrivacyEvent(1.1, 0.01, 10, "record")
    assert Mechanism.model_validate(event.document()).model_dump() == event.document()


def test_no_terminal_is_led_astray() -> None:
    world = World()
    for text in ("\x1b[2J", "a\nb", "a\tb", "\u202e", "x" * 301):
        with pytest.raises(ValidationError):
            world.refusal("oslo", "flu", rule=text)
    with pytest.raises(ProtocolError) as caught:
        parse_statement(b'{"\x7f\\u001b[2J":1}')
    assert str(caught.value).isprintable()


@settings(max_examples=150)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_no_bytes_make_the_parsers_fail(data: bytes) -> None:
    with suppress(PrivetError):
        assert Envelope.decode(data).encode() == data
    with suppress(PrivetError):
        assert encode_statement(parse_statement(data)) == data
    with suppress(PrivetError):
        envelope.verify_envelope(sealed(data), KEYS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(st.sampled_from(sorted(STATEMENTS)), st.data())
def test_no_changed_statement_makes_the_parser_fail(kind: str, data: st.DataObject) -> None:
    statement, _ = STATEMENTS[kind]
    document = json.loads(encode_statement(statement))
    path = data.draw(st.sampled_from(paths(document)))
    target = document
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = data.draw(json_values)
    changed = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
    with suppress(ProtocolError):
        assert encode_statement(parse_statement(changed)) == changed


@settings(max_examples=150)
@given(st.data())
def test_no_bytes_changed_in_an_envelope_are_accepted(data: st.DataObject) -> None:
    at, value = data.draw(st.integers(0, len(LEAF) - 1)), data.draw(st.integers(0, 255))
    for changed in (LEAF[:at] + bytes([value]) + LEAF[at + 1 :], LEAF[:at] + LEAF[at + 1 :]):
        if changed != LEAF:
            with pytest.raises(PrivetError):
                envelope.verify_envelope(changed, KEYS)


# Commitments


SALT = bytes(range(32))


def test_a_commitment_opens_to_what_was_committed_to_and_nothing_else() -> None:
    commitment = envelope.commit("units", 412, SALT)
    # SHA-256 over the domain, the salt and canonical JSON, computed apart.
    preimage = b"privet-commitment/1\x00" + SALT + b'{"name":"units","value":412}'
    assert commitment == "sha256:" + hashlib.sha256(preimage).hexdigest()
    for name, value, salt in [("units", 413, SALT), ("unit", 412, SALT), ("units", 412, bytes(32))]:
        assert envelope.commit(name, value, salt) != commitment
    with pytest.raises(ProtocolError, match="32 bytes, got 31"):
        envelope.commit("units", 412, bytes(31))


@given(st.text(max_size=10), json_values, st.binary(min_size=32, max_size=32))
def test_any_value_that_json_holds_can_be_committed_to(name: str, value: Any, salt: bytes) -> None:
    with suppress(PrivetError):
        assert envelope.commit(name, value, salt) == envelope.commit(name, value, salt)
