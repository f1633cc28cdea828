"""The adapter's bytes: one canonical form that others can read, and nothing else that we do."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from privet.common.canonical import digest
from privet.common.errors import DivergedError, ProtocolError
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec, read_layout, tensor_role

A, B, HEAD = "m.0.lora_A.weight", "m.0.lora_B.weight", "m.classifier.weight"
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(0, 4)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
specs = st.dictionaries(
    names.filter(lambda name: name != "__metadata__"), st.lists(sides, max_size=3).map(tuple), min_size=1, max_size=5
).map(lambda shapes: AdapterSpec.of(TensorSpec(n, s, tensor_role(n)) for n, s in shapes.items()))


def spec() -> AdapterSpec:
    return AdapterSpec.of(
        [TensorSpec(B, (4, 2), "lora_B"), TensorSpec(HEAD, (3,), "full"), TensorSpec(A, (2, 5), "lora_A")]
    )


def filled(layout: AdapterSpec, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(layout, {t.name: rng.standard_normal(t.shape).astype(np.float32) for t in layout.tensors})


def same(one: Adapter, other: Adapter) -> bool:
    return one.spec == other.spec and all(
        one.values[name].tobytes() == other.values[name].tobytes() for name in one.spec.names
    )


def header_length(data: bytes) -> int:
    return 8 + int(struct.unpack_from("<Q", data)[0])


def file_of(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


# Bytes


@given(specs, seeds)
def test_safetensors_reads_back_what_was_written(layout: AdapterSpec, seed: int) -> None:
    adapter = filled(layout, seed)
    read = safetensors.numpy.load(adapter.data)
    assert set(read) == set(layout.names)
    for name, value in adapter.values.items():
        assert read[name].dtype == np.float32
        assert read[name].shape == value.shape
        assert read[name].tobytes() == value.tobytes()


@given(specs, seeds)
def test_reading_inverts_writing(layout: AdapterSpec, seed: int) -> None:
    adapter = filled(layout, seed)
    again = Adapter.read(layout, adapter.data)
    assert same(again, adapter)
    assert again.digest == adapter.digest == digest(adapter.data)


@given(st.permutations([A, B, HEAD]))
def test_equal_adapters_have_equal_bytes_however_they_were_put_together(order: list[str]) -> None:
    adapter = filled(spec())
    transposed = {name: np.asfortranarray(adapter.values[name]) for name in order}
    assert Adapter(spec(), transposed).data == adapter.data
    assert AdapterSpec.of([t for name in order for t in spec().tensors if t.name == name]) == spec()


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, -0.0, np.float32(1e-45)])
def test_special_values_keep_their_bits(special: float) -> None:
    adapter = filled(spec()).replace({HEAD: np.array([1.0, special, 2.0], np.float32)})
    assert same(Adapter.read(spec(), adapter.data), adapter)


def test_the_values_that_were_read_do_not_alias_the_message() -> None:
    data = bytearray(filled(spec()).data)
    adapter = Adapter.read(spec(), bytes(data))
    before = adapter.digest
    adapter.values[HEAD][0] = 9.0
    assert Adapter.read(spec(), bytes(data)).digest == before


# Refusals


@given(st.data())
def test_any_other_byte_in_the_header_is_refused(data: st.DataObject) -> None:
    whole = bytearray(filled(spec()).data)
    index = data.draw(st.integers(0, header_length(bytes(whole)) - 1))
    whole[index] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ProtocolError, match="layout"):
        Adapter.read(spec(), bytes(whole))


def test_every_header_byte_counts() -> None:
    whole = filled(spec()).data
    for index in range(header_length(whole)):
        with pytest.raises(ProtocolError):
            Adapter.read(spec(), whole[:index] + bytes([whole[index] ^ 1]) + whole[index + 1 :])


@given(st.data())
def test_any_other_byte_in_the_body_changes_the_digest(data: st.DataObject) -> None:
    adapter = filled(spec())
    whole = bytearray(adapter.data)
    index = data.draw(st.integers(header_length(bytes(whole)), len(whole) - 1))
    whole[index] ^= data.draw(st.integers(1, 255))
    assert Adapter.read(spec(), bytes(whole)).digest != adapter.digest


@given(st.integers(0, 400))
def test_any_other_length_is_refused(length: int) -> None:
    whole = filled(spec()).data
    for other in (whole[: min(length, len(whole) - 1)], whole + b"\0" * (length + 1)):
        with pytest.raises(ProtocolError, match=f"expected {len(whole)} bytes"):
            Adapter.read(spec(), other)


@given(st.binary(max_size=300))
def test_nothing_but_an_adapter_is_read(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Adapter.read(spec(), data)
    with pytest.raises(ProtocolError):
        read_layout(data)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        (A, np.zeros((2, 5)), r"float64\[2, 5\]"),
        (A, np.zeros((5, 2), np.float32), r"float32\[5, 2\]"),
        (HEAD, np.zeros((), np.float32), r"float32\[\]"),
        (B, None, "nothing"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(name: str, value: Any, found: str) -> None:
    values = {n: v for n, v in {**filled(spec()).values, name: value}.items() if v is not None}
    with pytest.raises(ProtocolError, match=f"{name}: expected .* got {found}"):
        Adapter(spec(), values)


def test_a_surplus_tensor_is_refused() -> None:
    with pytest.raises(ProtocolError, match="expected 3 tensors, got 4"):
        filled(spec()).replace({"m.other": np.zeros(1, np.float32)})


def test_tensors_stand_once_and_in_order() -> None:
    twice = [TensorSpec(A, (1, 1), "lora_A"), TensorSpec(A, (2, 2), "lora_A")]
    with pytest.raises(ValueError, match="unique"):
        AdapterSpec.of(twice)
    with pytest.raises(ValueError, match="name order"):
        AdapterSpec(spec().tensors[::-1])


@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 9))
def test_what_is_not_finite_is_found_and_named(value: float, index: int) -> None:
    adapter = filled(spec())
    adapter.check_finite("this adapter")
    changed = adapter.values[A].copy()
    changed.flat[index] = value
    with pytest.raises(DivergedError, match=f"this adapter: 1 of 3 tensors .* first {A}"):
        adapter.replace({A: changed}).check_finite("this adapter")


# Layout


@given(specs)
def test_a_layout_survives_its_document(layout: AdapterSpec) -> None:
    again = AdapterSpec.parse(json.loads(json.dumps(layout.document())))
    assert again == layout
    assert again.digest == layout.digest


def test_the_layout_digest_covers_names_shapes_and_roles() -> None:
    first = TensorSpec("a", (2, 3), "full")
    others = [TensorSpec("b", (2, 3), "full"), TensorSpec("a", (3, 2), "full"), TensorSpec("a", (2, 3), "lora_A")]
    assert len({AdapterSpec.of([t]).digest for t in [first, *others]}) == 4


def test_what_is_trained_and_how_it_is_flattened() -> None:
    adapter = filled(spec())
    assert [t.name for t in spec().trained("fedavg")] == [A, B, HEAD]
    for method in ("ffa", "fedsvd"):
        assert [t.name for t in spec().trained(method)] == [B, HEAD]
    flat = adapter.flatten([HEAD, B])
    assert np.array_equal(flat, np.concatenate([adapter.values[HEAD], adapter.values[B].ravel()]))
    assert adapter.flatten([]).shape == (0,)
    assert spec().pairs() == ((A, B),)
    with pytest.raises(ValueError, match="no matching lora_B"):
        AdapterSpec.of([TensorSpec(A, (1, 1), "lora_A")]).pairs()


@given(specs, seeds)
def test_the_layout_is_read_from_what_we_wrote(layout: AdapterSpec, seed: int) -> None:
    assert read_layout(filled(layout, seed).data) == layout


def test_the_layout_is_read_from_what_peft_wrote(tmp_path: Any) -> None:
    import peft
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    layout = read_layout(data)
    tensors = safetensors.numpy.load(data)
    assert {t.name: t.shape for t in layout.tensors} == {name: value.shape for name, value in tensors.items()}
    assert sorted(t.role for t in layout.tensors) == ["full", "full", "lora_A", "lora_B"]
    adapter = Adapter(layout, tensors)
    assert same(Adapter.read(layout, adapter.data), adapter)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1\0\0",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**20 + 1) + b"{}" + b" " * 2**20,
        file_of(b"[" * 1_000_000),
        file_of(b'{"a":' * 200_000),
        file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b"]}}"),
        file_of(b"\xff\xfe"),
        file_of([]),
        file_of({"a": 3}),
        file_of({"a": {"dtype": "F32"}}),
        file_of({"a": {**ENTRY, "dtype": "F16"}}, bytes(8)),
        file_of({"a": {**ENTRY, "shape": ["2"]}}, bytes(8)),
        file_of({"a": {**ENTRY, "shape": [2.0]}}, bytes(8)),
        file_of({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)),
        file_of({"a": {**ENTRY, "shape": [-1, -2]}}, bytes(8)),
        file_of({"a": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(8)),
        file_of({"a": {**ENTRY, "shape": 2}}, bytes(8)),
        file_of({"a": ENTRY}, bytes(7)),
        file_of({"a": ENTRY}, bytes(9)),
        file_of({"a": ENTRY})[:-1],
    ],
)
def test_a_malformed_or_hostile_header_is_refused_at_once(data: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ProtocolError):
        read_layout(data)
    with pytest.raises(ProtocolError):
        Adapter.read(spec(), data)
    assert time.process_time() - started < 1
