"""Messages: what was packed is what is unpacked, and everything else is a ProtocolError."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from privet.common.canonical import canonical_json
from privet.common.errors import ProtocolError
from privet.common.flower.records import pack, unpack
from privet.common.study.messages import (
    Consent,
    Contribution,
    Failure,
    Message,
    Offer,
    Parts,
    RoundOpen,
    Secured,
    rebuild,
)

text = st.text(st.characters(codec="utf-8"), max_size=20)
whole = st.integers(-(2**53) + 1, 2**53 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | whole | text, lambda inner: st.lists(inner, max_size=3), max_leaves=6
)
tables = st.dictionaries(text, json_values, max_size=4)
finite = st.floats(allow_nan=False, allow_infinity=False)

messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(Offer, study=tables),
    st.builds(Consent, site=text, study_digest=text, spec_digest=text, weight=whole, identity=text),
    st.builds(
        RoundOpen,
        study=tables,
        round=whole,
        nonce=text,
        adapter_digest=text,
        cohort=st.lists(text, max_size=4).map(tuple),
        adapter=st.binary(max_size=50),
        masking=st.binary(max_size=50),
    ),
    st.builds(Secured, study=text, round=whole, nonce=text, body=st.binary(max_size=50)),
    st.builds(
        Contribution,
        site=text,
        round=whole,
        nonce=text,
        weight=finite,
        update=hnp.arrays(np.float32, st.integers(0, 6)),
        metrics=hnp.arrays(np.float64, st.integers(0, 3)),
    ),
    st.builds(Failure, error=text, message=text, hint=text),
)

EXAMPLES: tuple[Message, ...] = (
    Offer({"name": "x"}),
    Consent("alder", "d", "s", 10, "ab"),
    RoundOpen({"name": "x"}, 1, "n", "d", ("alder", "birch"), b"bytes", b"more"),
    Contribution("alder", 1, "n", 10.0, np.arange(3, dtype=np.float32), np.arange(2, dtype=np.float64)),
    Failure("DataError", "what", "do"),
    Secured("d", 1, "n", b"bytes"),
)


def assert_same(one: Message, other: Message) -> None:
    assert type(one) is type(other)
    assert is_dataclass(one)
    for item in fields(one):
        a, b = getattr(one, item.name), getattr(other, item.name)
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        else:
            assert a == b


def records(kind: Any, fields_: Any, blobs: dict[str, Any] | None = None) -> RecordDict:
    record = ConfigRecord({"kind": kind, "fields": fields_})
    for name, value in (blobs or {}).items():
        record[f"blob.{name}"] = value
    return RecordDict({"privet": record})


def refused(content: RecordDict) -> str:
    with pytest.raises(ProtocolError) as caught:
        unpack(content)
    return caught.value.message


@given(messages)
def test_unpacking_inverts_packing(message: Message) -> None:
    assert_same(unpack(pack(message)), message)


@given(messages)
def test_packing_is_deterministic_and_one_record(message: Message) -> None:
    packed = pack(message)
    assert list(packed) == ["privet"]
    again = pack(unpack(packed))
    assert dict(packed["privet"]) == dict(again["privet"])


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.kind)
def test_a_missing_part_is_refused(message: Message) -> None:
    parts = message.parts()
    for name in parts.fields:
        rest = {key: value for key, value in parts.fields.items() if key != name}
        with pytest.raises(ProtocolError, match=f"lacks the field {name}"):
            rebuild(Parts(parts.kind, rest, parts.blobs))
    for name in parts.blobs:
        rest = {key: value for key, value in parts.blobs.items() if key != name}
        with pytest.raises(ProtocolError, match=f"missing or malformed.*{name}"):
            rebuild(Parts(parts.kind, parts.fields, rest))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.kind)
def test_a_surplus_part_is_refused(message: Message) -> None:
    parts = message.parts()
    with pytest.raises(ProtocolError, match="unknown fields or binary parts: surplus"):
        rebuild(Parts(parts.kind, {**parts.fields, "surplus": 1}, parts.blobs))
    with pytest.raises(ProtocolError, match="unknown fields or binary parts: surplus"):
        rebuild(Parts(parts.kind, parts.fields, {**parts.blobs, "surplus": b""}))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.kind)
@pytest.mark.parametrize("value", [None, True, False, 1.5, [1], [None], {"a": 1}, "text", 7])
def test_a_field_of_another_type_is_refused(message: Message, value: Any) -> None:
    parts = message.parts()
    for name, right in parts.fields.items():
        fits = (float, int) if isinstance(right, float) else (type(right),)
        if type(value) in fits and not (type(right) is list and value in ([1], [None])):
            continue
        with pytest.raises(ProtocolError, match=f"field {name}"):
            rebuild(Parts(parts.kind, {**parts.fields, name: value}, parts.blobs))


def test_a_truth_value_is_no_integer() -> None:
    parts = EXAMPLES[1].parts()
    with pytest.raises(ProtocolError, match="field weight has the wrong type bool"):
        rebuild(Parts(parts.kind, {**parts.fields, "weight": True}, {}))


@pytest.mark.parametrize(("name", "data"), [("update", b"123"), ("metrics", b"1234567")])
def test_a_torn_array_is_refused(name: str, data: bytes) -> None:
    parts = EXAMPLES[3].parts()
    with pytest.raises(ProtocolError, match="missing or malformed"):
        rebuild(Parts(parts.kind, parts.fields, {**parts.blobs, name: data}))


def test_an_unknown_kind_is_refused_without_echoing_it_whole() -> None:
    with pytest.raises(ProtocolError, match="unknown kind") as caught:
        rebuild(Parts("x" * 10_000, {}, {}))
    assert len(caught.value.message) < 100


def test_other_records_are_refused() -> None:
    assert "lacks the record 'privet'" in refused(RecordDict())
    assert "lacks the record 'privet'" in refused(RecordDict({"other": pack(EXAMPLES[0])["privet"]}))
    assert "lacks the record 'privet'" in refused(RecordDict({"privet": ArrayRecord()}))
    for record in (ConfigRecord(), ConfigRecord({"kind": "offer"}), ConfigRecord({"fields": b"{}"})):
        assert "lacks the kind or the fields" in refused(RecordDict({"privet": record}))
    assert "lacks the kind or the fields" in refused(records("offer", "{}"))
    assert "lacks the kind or the fields" in refused(records(3, b"{}"))
    assert "not bytes" in refused(records("offer", b'{"study":{}}', {"x": "text"}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"3",
        b"null",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"study":{"x":NaN}}',
        b'{"study":{"x":Infinity}}',
        b'{"study":{"x":1e999}}',
        b'{"study":{"x":' + b"9" * 400 + b"}}",
        b'{"study":{"x":' + b"9" * 5000 + b"}}",
        b'{"study":{"x":9007199254740993}}',
        b'{"study":{"x":"\\ud800"}}',
        b'{"study":{},"study":{}}',
        b'{ "study":{}}',
    ],
)
def test_fields_that_are_not_a_table_in_canonical_json_are_refused(data: bytes) -> None:
    assert "are not" in refused(records("offer", data))


def test_a_weight_beyond_all_floats_is_refused() -> None:
    parts = EXAMPLES[3].parts()
    with pytest.raises(ProtocolError, match="missing or malformed"):
        rebuild(Parts(parts.kind, {**parts.fields, "weight": 10**400}, parts.blobs))


@given(st.binary(max_size=60), st.sampled_from(["offer", "consent", "round-open", "contribution", "failure"]))
def test_no_bytes_do_anything_but_fail(data: bytes, kind: str) -> None:
    refused(records(kind, data))


@given(tables, st.sampled_from(["offer", "consent", "round-open", "contribution", "failure", "other"]))
def test_any_table_gives_a_message_or_a_protocol_error(table: dict[str, Any], kind: str) -> None:
    try:
        message = unpack(records(kind, canonical_json(table)))
    except ProtocolError:
        return
    assert canonical_json(message.parts().fields) == canonical_json(table)


def test_integral_weights_come_back_as_floats() -> None:
    packed = pack(EXAMPLES[3])
    record = packed["privet"]
    assert isinstance(record, ConfigRecord)
    assert json.loads(bytes(record["fields"]))["weight"] == 10  # type: ignore[arg-type]
    again = unpack(packed)
    assert isinstance(again, Contribution)
    assert type(again.weight) is float
