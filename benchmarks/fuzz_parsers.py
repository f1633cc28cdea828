"""Fuzz all parsers of input from outside with mutated valid input: they must read it or refuse it, and never crash.

Each parser gets its own valid samples, mutated again and again: bits flipped, bytes inserted, removed and repeated, two
samples spliced, lengths and quotes changed. Allowed are a result, or one of privet's own errors.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from harness import Bench, Check, start

from privet.common.audit.bundle import read_archive, write_archive
from privet.common.canonical import canonical_json
from privet.common.errors import PrivetError
from privet.common.log.checkpoint import Checkpoint, LeafProof, Policy
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope, sign_envelope
from privet.common.log.note import (
    COSIGNATURE,
    ED25519,
    Note,
    NoteKey,
    Signature,
    cosign,
    parse_note,
    public_of,
    sign_note,
)
from privet.common.log.statements import Refusal
from privet.common.log.tiles import Tile, bundle_bytes, read_bundle
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec, read_layout
from privet.common.study.messages import Failure, Parts, RoundOpen, rebuild

SECONDS = 600.0
_TOKENS = (b'"', b"\n", b"\xff", b"\0", b"{", b"+", b"=", b"9999999999999999999", b"-1", b"null", b"\xe2\x80\x94 ")
Parser = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """A parser and samples that it accepts."""

    name: str
    parse: Parser
    samples: Sequence[bytes]


def targets(folder: Path) -> list[Target]:
    """Return all parsers, each with valid samples."""
    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    public = key.public_key().public_bytes_raw()
    log, witness = NoteKey("example.org/log", ED25519, public), NoteKey("w.example", COSIGNATURE, public[::-1])
    head = Checkpoint(log.name, 7, bytes(32))
    note = Note(head.text, (sign_note(head.text, log.name, key), cosign(head.text, "w.example", key, 5))).encode()
    pq = MLDSA65PrivateKey.from_seed_bytes(bytes(32))
    both = public_of("example.org/log", ED25519, key, pq)
    refusal = sign_envelope(
        Refusal(
            time=1,
            site="a",
            run="r",
            study="sha256:" + "0" * 64,
            round=0,
            code="E_X",
            rule="x",
            asked="1",
            allowed="2",
            policy="sha256:" + "0" * 64,
        ),
        key,
    )
    hybrid = sign_envelope(parse_statement(Envelope.decode(refusal).payload), key, pq)

    spec = AdapterSpec.of(
        [TensorSpec("m.lora_A.weight", (2, 3), "lora_A"), TensorSpec("m.lora_B.weight", (4, 2), "lora_B")]
    )
    adapter = Adapter(spec, {t.name: np.zeros(t.shape, np.float32) for t in spec.tensors})
    write_archive(folder / "sample.tar", {"study.json": b"{}", "tile/entries/000.p/1": b"\0\1x"})
    opened = RoundOpen({}, 1, "0" * 32, adapter.digest, ("a", "b"), adapter.data)
    failure = Failure("a", "b", "c").parts().fields
    policy = Policy(log, (witness,), 1)

    def archive(data: bytes) -> object:
        (folder / "mutant.tar").write_bytes(data)
        return read_archive(folder / "mutant.tar")

    def message(data: bytes) -> object:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError):
            return None
        blobs = dict.fromkeys(opened.parts().blobs, data[:40])
        return rebuild(Parts("round-open", fields, blobs)) if isinstance(fields, dict) else None

    return [
        Target("note", parse_note, [note]),
        Target("checkpoint", lambda data: Checkpoint.parse(data.decode("utf-8", "replace")), [head.text.encode()]),
        Target("vkey", lambda data: NoteKey.parse(data.decode("utf-8", "replace")), [log.text.encode()]),
        Target(
            "signature line",
            lambda data: Signature.parse(data.decode("utf-8", "replace")),
            [line for line in note.splitlines() if line.startswith("—".encode())],
        ),
        Target("policy", lambda data: Policy.parse(data.decode("utf-8", "replace")), [policy.text.encode()]),
        Target("leaf proof", LeafProof.parse, [LeafProof(3, (bytes(32), bytes(32)), note).encode()]),
        Target("envelope", Envelope.decode, [refusal, hybrid]),
        Target("hybrid vkey", lambda data: NoteKey.parse(data.decode("utf-8", "replace")), [both.text.encode()]),
        Target("statement", parse_statement, [Envelope.decode(refusal).payload]),
        Target("tile path", lambda data: Tile.parse(data.decode("utf-8", "replace")), [b"tile/0/x001/234.p/17"]),
        Target("bundle of leaves", lambda data: read_bundle(Tile(None, 0, 2), data), [bundle_bytes([b"one", refusal])]),
        Target("safetensors header", read_layout, [adapter.data]),
        Target("adapter", lambda data: Adapter.read(spec, data), [adapter.data]),
        Target("archive", archive, [(folder / "sample.tar").read_bytes()]),
        Target("message", message, [canonical_json(opened.parts().fields), canonical_json(failure)]),
    ]  # fmt: skip


def mutate(draw: random.Random, samples: Sequence[bytes]) -> bytes:
    """Return a sample that was broken in one to four places."""
    data = bytearray(draw.choice(samples))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(7):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                data[at:at] = draw.choice(_TOKENS)
            case 2:
                del data[at : at + draw.randint(1, 40)]
            case 3:
                data[at:at] = data[at : at + draw.randint(1, 60)] * draw.randint(1, 5)
            case 4:
                data[at:] = draw.choice(samples)[draw.randrange(len(draw.choice(samples))) :]
            case 5:
                data[at : at + 8] = draw.randbytes(draw.randint(0, 12))
            case _:
                del data[at:]
    return bytes(data)


def fuzz(bench: Bench, seconds: float, folder: Path) -> dict[str, dict[str, int]]:
    """Feed every parser in turn until the time is up; return executions, refusals and crashes of each."""
    draw = random.Random(bench.seed)  # noqa: S311 - nothing here is secret
    known = targets(folder)
    for target in known:
        for sample in target.samples if target.name != "message" else target.samples[:1]:
            target.parse(sample)
    found = {target.name: {"executions": 0, "refused": 0, "crashes": 0} for target in known}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for target in known:
            count = found[target.name]
            for _ in range(50):
                data = mutate(draw, target.samples)
                count["executions"] += 1
                try:
                    target.parse(data)
                except PrivetError:
                    count["refused"] += 1
                except Exception as error:
                    count["crashes"] += 1
                    bench.say(f"{target.name}: {type(error).__name__} on {data[:200]!r}")
    return found


def main() -> None:
    """Fuzz, and print what came of it."""
    bench = start("fuzz_parsers", __doc__)
    seconds = 20.0 if bench.quick else SECONDS
    with TemporaryDirectory() as folder:
        found = fuzz(bench, seconds, Path(folder))
    crashes = sum(count["crashes"] for count in found.values())
    checks = [
        Check("executions", sum(count["executions"] for count in found.values()), "", "", None),
        Check("refused", sum(count["refused"] for count in found.values()), "", "", None),
        Check("crashes", crashes, "", "0", crashes == 0),
    ]
    bench.finish(checks, {"seconds": seconds, "parsers": found})


if __name__ == "__main__":
    main()
