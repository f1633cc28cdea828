"""The adapter: the named tensors that training changes, as arrays, as bytes and as one flat vector.

Names and shapes are PEFT's own (`base_model.model...lora_A.weight`), so the published file loads with
`PeftModel.from_pretrained`. Values are float32 everywhere. The byte form is safetensors with tensors in
name order. It is canonical: equal adapters have equal digests.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from privet.common.canonical import canonical_json, digest
from privet.common.errors import DivergedError, ProtocolError

Vector = NDArray[np.float32]
TensorRole = Literal["lora_A", "lora_B", "full"]

# A header takes about 150 bytes for each tensor, so this is room for thousands.
_HEADER_LIMIT = 1 << 20
NO_CONFIG = "{}\n"
"""The `adapter_config.json` of an adapter without tensors: that of a study which only counts records."""
_RESTORE = "name a file that privet wrote, or copy the adapter again: it is damaged or of another program"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an adapter: `lora_A` is [rank, d_in], `lora_B` [d_out, rank], `full` any shape."""

    name: str
    shape: tuple[int, ...]
    role: TensorRole

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterSpec:
    """Names, shapes and roles of all tensors, in name order."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("tensors must be unique and in name order")

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec]) -> AdapterSpec:
        """Build a spec from tensors in any order."""
        return cls(tuple(sorted(tensors, key=lambda tensor: tensor.name)))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(tensor.name for tensor in self.tensors)

    def trained(self, method: str, *, head: bool = True) -> tuple[TensorSpec, ...]:
        """Return the tensors that a site trains: all of them under `fedavg`, all but A otherwise.

        Without `head`, the task's head stays as it is. `Study.trained` says what a study trains.
        """
        fixed = frozenset(() if head else self.head())
        return tuple(t for t in self.tensors if (method == "fedavg" or t.role != "lora_A") and t not in fixed)

    def head(self) -> tuple[TensorSpec, ...]:
        """Return the tensors of the task's head: the classifier's weights [classes, width], and its bias, if any."""
        return tuple(t for t in self.tensors if t.role == "full" and ".classifier." in t.name)

    def class_sums(self) -> TensorSpec:
        """Return the layout of a head start's sums: for each class its features, and a count in the last column.

        Raises:
            ValueError: The adapter has no head.
        """
        weights = [tensor for tensor in self.head() if len(tensor.shape) == 2]
        if len(weights) != 1:
            raise ValueError(f"expected one head, found {len(weights)}")
        classes, width = weights[0].shape
        return TensorSpec("class-sums", (classes, width + 1), "full")

    def part(self, method: str) -> AdapterSpec:
        """Return the layout of what rounds may change, alone: what sites train, and the head in any case."""
        return AdapterSpec(self.trained(method))

    def frozen(self, method: str) -> tuple[TensorSpec, ...]:
        """Return the tensors that no round changes: A under `ffa`. Under `fedsvd` the coordinator changes A."""
        return tuple(t for t in self.tensors if method == "ffa" and t.role == "lora_A")

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Return the (A, B) names of each adapted layer."""
        names = set(self.names)
        pairs = [(t.name, t.name.replace("lora_A", "lora_B")) for t in self.tensors if t.role == "lora_A"]
        if any(b not in names for _, b in pairs):
            raise ValueError("a lora_A tensor has no matching lora_B tensor")
        return tuple(pairs)

    def document(self) -> dict[str, Any]:
        """Return the spec as plain JSON values."""
        return {"tensors": [[t.name, list(t.shape), t.role] for t in self.tensors]}

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> AdapterSpec:
        """Read what `document` wrote."""
        return cls(tuple(TensorSpec(name, tuple(shape), role) for name, shape, role in document["tensors"]))

    @cached_property
    def digest(self) -> str:
        """Digest of names, shapes and roles."""
        return digest(canonical_json(self.document()))

    @cached_property
    def header(self) -> bytes:
        """The bytes of an adapter's safetensors file before the values: tensors in name order, float32."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + 4 * tensor.size
            header[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True)
class Adapter:
    """Values for every tensor of a spec. Treat the arrays as read-only."""

    spec: AdapterSpec
    values: Mapping[str, Vector]

    def __post_init__(self) -> None:
        for tensor in self.spec.tensors:
            value = self.values.get(tensor.name)
            if value is None or value.shape != tensor.shape or value.dtype != np.float32:
                found = "nothing" if value is None else f"{value.dtype}{list(value.shape)}"
                raise ProtocolError(
                    f"adapter tensor {tensor.name}: expected float32 of shape {list(tensor.shape)}, got {found}"
                )
        if len(self.values) != len(self.spec.tensors):
            raise ProtocolError(f"adapter: expected {len(self.spec.tensors)} tensors, got {len(self.values)}")

    def flatten(self, names: Sequence[str]) -> Vector:
        """Return the named tensors as one float32 vector, in the order given."""
        if not names:
            return np.empty(0, np.float32)
        return np.concatenate([self.values[name].ravel() for name in names])

    @property
    def adds_nothing(self) -> bool:
        """Whether a model with this adapter is the base: every B is zero, and no module is trained in full."""
        added = (tensor for tensor in self.spec.tensors if tensor.role != "lora_A")
        return not any(tensor.role == "full" or self.values[tensor.name].any() for tensor in added)

    def replace(self, values: Mapping[str, Vector]) -> Adapter:
        """Return a copy with some tensors replaced."""
        return Adapter(self.spec, {**self.values, **values})

    def part(self, method: str) -> Adapter:
        """Return what rounds may change, alone."""
        spec = self.spec.part(method)
        return Adapter(spec, {name: self.values[name] for name in spec.names})

    def check_finite(self, what: str) -> None:
        """Raise `DivergedError` if any value is NaN or infinite."""
        bad = [name for name, value in self.values.items() if not np.isfinite(value).all()]
        if bad:
            raise DivergedError(
                f"{what}: {len(bad)} of {len(self.values)} tensors hold values that are not finite "
                f"(infinite or NaN), first {bad[0]}",
                "lower the learning rate: training diverged",
            )

    @cached_property
    def data(self) -> bytes:
        """The adapter as a safetensors file with tensors in name order."""
        body = [np.ascontiguousarray(self.values[name], "<f4").tobytes() for name in self.spec.names]
        return b"".join([self.spec.header, *body])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `data`."""
        return digest(self.data)

    @classmethod
    def read(cls, spec: AdapterSpec, data: bytes) -> Adapter:
        """Read an adapter whose layout is known in advance.

        The header must equal, byte for byte, the one that `data` writes for this spec. So the header of a
        stranger is never parsed: oversized headers, foreign names and overlapping offsets cannot do harm.

        Raises:
            ProtocolError: The bytes are not this spec's adapter.
        """
        head = len(spec.header)
        expected = head + 4 * sum(tensor.size for tensor in spec.tensors)
        if len(data) != expected or data[:head] != spec.header:
            raise ProtocolError(
                f"adapter: expected {expected} bytes with the tensors of layout {spec.digest[:19]}, got {len(data)} "
                "bytes"
                " or other tensors",
                "compare study and base model of both sides: they must be the same",
            )
        values: dict[str, Vector] = {}
        offset = head
        for tensor in spec.tensors:
            flat = np.frombuffer(data, "<f4", tensor.size, offset)
            values[tensor.name] = flat.reshape(tensor.shape).astype(np.float32)
            offset += 4 * tensor.size
        return cls(spec, values)


def tensor_role(name: str) -> TensorRole:
    """Return the role that PEFT's naming gives a tensor."""
    if ".lora_A." in name:
        return "lora_A"
    return "lora_B" if ".lora_B." in name else "full"


def read_layout(data: bytes) -> AdapterSpec:
    """Read the spec from a safetensors file's header, as PEFT or `Adapter.data` wrote it.

    Only for files that the reader's own side published. Read the adapter of a message with a known spec instead.

    Raises:
        ProtocolError: The header is malformed, too large or holds anything but float32 tensors.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > _HEADER_LIMIT:
            raise ProtocolError(
                f"adapter file: expected a safetensors header of at most {_HEADER_LIMIT} bytes, got {length}", _RESTORE
            )
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        if any(entry["dtype"] != "F32" for entry in header.values()):
            raise ProtocolError("adapter file: expected float32 tensors only, found another type", _RESTORE)
        if any(type(side) is not int or side < 0 for entry in header.values() for side in entry["shape"]):
            raise ProtocolError("adapter file: the shape of a tensor must be whole numbers of 0 or more", _RESTORE)
        spec = AdapterSpec.of(TensorSpec(n, tuple(e["shape"]), tensor_role(n)) for n, e in header.items())
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError(
            f"adapter file: expected the safetensors format, found another ({type(error).__name__})", _RESTORE
        ) from None
    expected = 8 + length + 4 * sum(tensor.size for tensor in spec.tensors)
    if len(data) != expected:
        raise ProtocolError(f"adapter file: expected {expected} bytes by its header, got {len(data)}", _RESTORE)
    return spec
