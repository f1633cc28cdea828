"""Notes, cosignatures, checkpoints and quorums: what Go and public logs wrote is read, and nothing else."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import PrivetError, ProtocolError, TooFewSitesError, VerificationError
from privet.common.log import note
from privet.common.log.checkpoint import (
    Checkpoint,
    LeafProof,
    Policy,
    Quorum,
    accept_checkpoint,
    least_quorum,
    open_checkpoint,
    verify_leaf,
)
from privet.common.log.merkle import EMPTY_ROOT, leaf_hash, node_hash
from privet.common.log.note import COSIGNATURE, ED25519, Note, NoteKey, Signature, parse_note, verify_note

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "log" / "notes.json").read_text())
GO, SUMDB, WITNESSED, EXAMPLE = (VECTORS[name] for name in ("go", "sumdb", "witnessed", "example"))
PETER, ENOCH = (NoteKey.parse(vkey) for vkey in GO["vkeys"])


def private(seed: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(seed.encode().ljust(32, b"."))


def key(name: str, kind: int = COSIGNATURE) -> NoteKey:
    return NoteKey(name, kind, private(name).public_key().public_bytes_raw())


LOG = key("example.org/log", ED25519)
WITNESSES = tuple(key(f"w{i}") for i in range(1, 6))
POLICY = Policy(LOG, WITNESSES, 4)
HEAD = Checkpoint("example.org/log", 7, bytes(range(32)))


def signed(head: Checkpoint, witnesses: tuple[NoteKey, ...] = WITNESSES, log: NoteKey = LOG) -> bytes:
    lines = [note.sign_note(head.text, log.name, private(log.name))]
    lines += [note.cosign(head.text, w.name, private(w.name), 1_800_000_000) for w in witnesses]
    return Note(head.text, tuple(lines)).encode()


# Known answers


def test_a_signature_is_the_one_that_go_makes() -> None:
    name, seed = "PeterNeumann", base64.b64decode(GO["private"].split("+", 4)[4])[1:]
    signature = note.sign_note(GO["text"], name, Ed25519PrivateKey.from_private_bytes(seed))
    assert signature.line == GO["lines"][0]
    assert Note(GO["text"], (signature,)).encode().decode() == f"{GO['text']}\n{GO['lines'][0]}\n"


def test_a_note_that_go_signed_verifies() -> None:
    data = f"{GO['text']}\n{GO['lines'][0]}\n{GO['lines'][1]}\n".encode()
    found = parse_note(data)
    assert found.text == GO["text"]
    assert found.encode() == data
    assert verify_note(found, [PETER]) == (PETER,)
    assert verify_note(found, [ENOCH, PETER]) == (PETER, ENOCH)
    assert verify_note(found, [LOG]) == ()


def test_tree_heads_of_gos_checksum_database_verify() -> None:
    sumdb = NoteKey.parse(SUMDB["vkey"])
    for text in SUMDB["notes"]:
        found = parse_note(text.encode())
        assert verify_note(found, [sumdb]) == (sumdb,)
        head = Checkpoint.parse(found.text)
        assert head.origin == "go.sum database tree"
        assert head.text == found.text


def test_a_checkpoint_of_the_public_witness_network_is_accepted() -> None:
    witnesses = tuple(map(NoteKey.parse, WITNESSED["witnesses"]))
    policy = Policy(NoteKey.parse(WITNESSED["log"]), witnesses, 3)
    data = WITNESSED["note"].encode()
    head, cosigners = accept_checkpoint(data, policy)
    assert head.size == 1432088532
    assert {cosigner.name for cosigner in cosigners} == {witness.name for witness in witnesses}
    times = {line.name: line.time for line in parse_note(data).signatures}
    assert times["remora.n621.de"] == WITNESSED["time"]
    with pytest.raises(VerificationError, match=r"remora.n621.de|witness|arche"):
        accept_checkpoint(data.replace(b"1432088532", b"1432088533"), policy)


def test_the_examples_of_the_specification_are_read() -> None:
    for text in EXAMPLE["notes"]:
        assert parse_note(text.encode()).encode() == text.encode()
    checkpoint = parse_note(EXAMPLE["notes"][0].encode())
    assert Checkpoint.parse(checkpoint.text).size == 20852163
    assert checkpoint.signatures[1].time == EXAMPLE["time"]


def test_keys_are_read_and_written_as_go_does() -> None:
    for vkey in [*GO["vkeys"], SUMDB["vkey"], WITNESSED["log"], *WITNESSED["witnesses"]]:
        assert NoteKey.parse(vkey).text == vkey
    assert PETER.id.hex() == "c74f20a3"


def test_no_mangled_key_is_accepted() -> None:
    vkey = PETER.text
    for start, end in combinations(range(len(vkey) + 1), 2):
        if (start, end) != (0, len(vkey)):
            with pytest.raises(ProtocolError):
                NoteKey.parse(vkey[start:end])
    for at, character in enumerate(vkey):
        with pytest.raises(ProtocolError):
            NoteKey.parse(vkey[:at] + chr(ord(character) + 1) + vkey[at + 1 :])
    for wrong in (  # from Go's tests: a wrong length, and an unknown algorithm, each with its right id
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        vkey.replace("c74f20a3", "C74F20A3"),
    ):
        with pytest.raises(ProtocolError):
            NoteKey.parse(wrong)


# Notes


PETER_LINE = GO["lines"][0]


@pytest.mark.parametrize(
    "wrong",
    [
        GO["text"],
        GO["text"] + "\n",
        GO["text"] + "\n" + PETER_LINE,
        "\x01" + GO["text"] + "\n" + PETER_LINE + "\n",
        "\t" + GO["text"] + "\n" + PETER_LINE + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("PeterNeumann", "Bad Name") + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("PeterNeumann", "Bad+Name") + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("PeterNeumann", "Bad\u00a0Name") + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("PeterNeumann", "Bad\u202eName") + "\n",
        GO["text"] + "\n" + PETER_LINE + "\nUnexpected line.\n",
        GO["text"] + "\n" + PETER_LINE + "\r\n",
        GO["text"] + "\n" + PETER_LINE.replace("— ", "- ") + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("JnAM=", "JnAN=") + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("JnAM=", "JnAM") + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("x08g", "x0 8g") + "\n",
        GO["text"] + "\n" + PETER_LINE.replace("x08g", "x0-8g") + "\n",
        GO["text"] + "\n— PeterNeumann x08gow==\n",
        GO["text"] + "\n" + PETER_LINE + "\n" + PETER_LINE + "\n",
        "\n" + PETER_LINE + "\n",
        "",
    ],
)
def test_other_notes_are_refused(wrong: str) -> None:
    with pytest.raises(ProtocolError):
        verify_note(parse_note(wrong.encode()), [PETER])


def test_size_and_number_of_signatures_are_capped() -> None:
    lines = [note.sign_note("text\n", f"k{i}", private(f"k{i}")) for i in range(201)]
    assert len(parse_note(Note("text\n", tuple(lines[:200])).encode()).signatures) == 200
    with pytest.raises(ProtocolError, match="at most 200 signatures, got 201"):
        parse_note(Note("text\n", tuple(lines)).encode())
    with pytest.raises(ProtocolError, match="at most 1000000 bytes"):
        parse_note(Note("x" * 1_000_000 + "\n", (lines[0],)).encode())
    with pytest.raises(ProtocolError, match="UTF-8"):
        parse_note(b"\xff" + Note("text\n", (lines[0],)).encode())


def test_a_line_of_a_known_key_has_to_verify() -> None:
    other = Note(
        GO["text"].replace("answer", "Answer"), parse_note(f"{GO['text']}\n{PETER_LINE}\n".encode()).signatures
    )
    assert verify_note(other, [ENOCH]) == ()
    with pytest.raises(VerificationError, match="signature by PeterNeumann does not match"):
        verify_note(other, [ENOCH, PETER])
    short = Note("text\n", (Signature(PETER.name, PETER.id, b"x" * 63),))
    with pytest.raises(VerificationError, match="must have 64 bytes, got 63"):
        verify_note(short, [PETER])


def test_a_text_and_a_cosignature_are_not_mistaken_for_each_other() -> None:
    # A log key under the name of a witness: the id tells the types apart, and so does what is signed.
    text, holder = "a\n1\n" + "A" * 43 + "=\n", private("w")
    as_log = NoteKey("w", ED25519, holder.public_key().public_bytes_raw())
    as_witness = NoteKey("w", COSIGNATURE, as_log.public)
    assert as_log.id != as_witness.id
    line = note.cosign(text, "w", holder, 5)
    assert verify_note(Note(text, (line,)), [as_log]) == ()
    assert verify_note(Note(text, (line,)), [as_witness]) == (as_witness,)
    for forged in (
        Signature("w", as_log.id, line.data[8:]),
        Signature("w", as_witness.id, bytes(8) + holder.sign(text.encode())),
        Signature("w", as_witness.id, (6).to_bytes(8, "big") + line.data[8:]),
        Signature("w", as_witness.id, (2**63).to_bytes(8, "big") + line.data[8:]),
    ):
        with pytest.raises(VerificationError):
            verify_note(Note(text, (forged,)), [as_log, as_witness])


def test_a_time_beyond_63_bits_is_refused_though_signed() -> None:
    text, time = "a\n", 2**63
    data = time.to_bytes(8, "big") + private("w").sign(f"cosignature/v1\ntime {time}\n{text}".encode())
    witness = key("w")
    with pytest.raises(VerificationError, match="above 2"):
        verify_note(Note(text, (Signature("w", witness.id, data),)), [witness])


def test_what_cannot_stand_in_a_note_is_not_signed() -> None:
    for text in ("no newline", "a\tb\n", "a\r\n", "\ud800\n"):
        with pytest.raises(ProtocolError):
            note.sign_note(text, "log", private("log"))
    for name in ("", "a b", "a+b", "a\nb", "a\u2003b"):
        with pytest.raises(ProtocolError, match="name"):
            note.sign_note("text\n", name, private("log"))
    for time in (-1, 2**63):
        with pytest.raises(ProtocolError, match="time"):
            note.cosign("text\n", "w", private("w"), time)


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), max_size=60).map(lambda t: t + "\n")


@given(texts, st.lists(st.sampled_from(["a", "b/c", "dé"]), min_size=1, unique=True))
def test_a_note_is_read_back(text: str, names: list[str]) -> None:
    written = Note(text, tuple(note.sign_note(text, name, private(name)) for name in names))
    data = written.encode()
    assert parse_note(data) == written
    keys = [key(name, ED25519) for name in names]
    assert verify_note(parse_note(data), keys) == tuple(keys)


@settings(max_examples=200)
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_no_bytes_make_the_parsers_fail(data: bytes) -> None:
    with suppress(PrivetError):
        assert parse_note(data).encode() == data
    with suppress(PrivetError):
        assert LeafProof.parse(data).encode() == data
    text = data.decode("utf-8", "replace")
    with suppress(PrivetError):
        assert Checkpoint.parse(text).text == text
    with suppress(PrivetError):
        assert NoteKey.parse(text).text == text
    with suppress(PrivetError):
        assert Policy.parse(Policy.parse(text).text).text
    with suppress(PrivetError):
        assert Signature.parse(text).line == text


@settings(max_examples=200)
@given(st.data())
def test_no_changed_note_makes_the_parsers_fail_or_is_accepted(data: st.DataObject) -> None:
    original = signed(HEAD)
    at, value = data.draw(st.integers(0, len(original) - 1)), data.draw(st.integers(0, 255))
    for changed in (
        original[:at] + bytes([value]) + original[at + 1 :],
        original[:at] + original[at + 1 :],
        original[:at] + bytes([value]) + original[at:],
    ):
        try:
            head, cosigners = accept_checkpoint(changed, POLICY)
        except PrivetError:
            continue
        # One lost cosignature of five leaves a quorum: its name was changed to that of nobody we know.
        assert head == HEAD
        assert changed == original or len(cosigners) == 4


# Checkpoints


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("\n7\n", "\n07\n"),
        ("\n7\n", "\n-7\n"),
        ("\n7\n", "\n+7\n"),
        ("\n7\n", "\n7 \n"),
        ("\n7\n", "\n\u0667\n"),
        ("\n7\n", "\n9007199254740993\n"),
        ("\n7\n", "\n99999999999999999999\n"),
        ("example.org/log\n", "\n"),
        ("Hh8=\n", "Hh8=\nextension\n"),
        ("Hh8=\n", "Hh8=\n\n"),
        ("Hh8=\n", "Hh8=" * 2 + "\n"),
        ("Hh8=\n", "Hh9=\n"),
        ("Hh8=\n", "Hg==\n"),
        ("Hh8=\n", "\n"),
    ],
)
def test_other_checkpoints_are_refused(old: str, new: str) -> None:
    text = HEAD.text.replace(old, new)
    assert text != HEAD.text
    with pytest.raises(ProtocolError):
        Checkpoint.parse(text)


def test_a_checkpoint_is_the_logs_own() -> None:
    assert open_checkpoint(signed(HEAD), LOG)[0] == HEAD
    with pytest.raises(VerificationError, match=r"a signature by the log example[.]org/log, found none"):
        open_checkpoint(signed(HEAD, log=key("other.org/log", ED25519)), LOG)
    with pytest.raises(VerificationError, match="found one of 'other'"):
        open_checkpoint(signed(Checkpoint("other", 7, HEAD.root)), LOG)


def test_a_checkpoint_needs_its_quorum() -> None:
    assert accept_checkpoint(signed(HEAD, WITNESSES[1:]), POLICY) == (HEAD, WITNESSES[1:])
    with pytest.raises(TooFewSitesError, match="expected cosignatures of 4 of 5 witnesses, found 3"):
        accept_checkpoint(signed(HEAD, WITNESSES[2:]), POLICY)
    strangers = tuple(key(f"x{i}") for i in range(9))
    with pytest.raises(TooFewSitesError, match="found 3"):
        accept_checkpoint(signed(HEAD, (*WITNESSES[2:], *strangers)), POLICY)


# Quorums


@pytest.mark.parametrize(("witnesses", "colluding", "needed"), [(3, 0, 2), (3, 1, 3), (5, 1, 4), (1, 0, 1), (4, 1, 3)])
def test_known_quorums(witnesses: int, colluding: int, needed: int) -> None:
    assert least_quorum(witnesses, colluding) == needed
    assert Quorum(witnesses, needed).colluding >= colluding


@pytest.mark.parametrize("n", range(1, 8))
def test_any_two_quorums_share_an_honest_witness_and_fewer_would_not(n: int) -> None:
    """By trying all pairs of sets, and all sets of liars."""
    for f in range(n):
        q = least_quorum(n, f)
        assert q == min(k for k in range(n + 1) if least_overlap(n, k) > f)
        if q <= n:
            assert Quorum(n, q).colluding >= f


def least_overlap(n: int, q: int) -> int:
    """How many witnesses the two quorums share that share the fewest; n + 1 where there is no such pair."""
    sets = [set(members) for members in combinations(range(n), q)]
    return min(len(a & b) for a in sets for b in sets)


@pytest.mark.parametrize(("witnesses", "needed"), [(4, 2), (3, 1), (3, 4), (0, 0), (200, 150), (1, 0)])
def test_unsafe_quorums_are_refused(witnesses: int, needed: int) -> None:
    with pytest.raises(ProtocolError, match="quorum"):
        Quorum(witnesses, needed)


# Policies and leaf proofs


def test_a_policy_is_read_back() -> None:
    assert Policy.parse(POLICY.text) == POLICY
    assert Quorum(len(POLICY.witnesses), POLICY.needed).colluding == 2
    commented = "# our consortium\n\n" + POLICY.text.replace("log ", "  log\t")
    assert Policy.parse(commented) == POLICY


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("group sites 4", "group sites 2"),
        ("group sites 4", "group sites 6"),
        ("group sites 4", "group sites any"),
        ("group sites 4", "group sites 04"),
        ("quorum sites", "quorum w1"),
        ("quorum sites", "quorum none"),
        ("quorum sites", "quorum sites\nquorum sites"),
        (" w4 w5", " w4"),
        (" w4 w5", " w4 w4"),
        (f"log {LOG.text}\n", ""),
        (f"log {LOG.text}", f"log {WITNESSES[0].text}"),
        (f"log {LOG.text}", f"log {LOG.text} https://example.org"),
        (f"witness w1 {WITNESSES[0].text}", f"witness w1 {LOG.text}"),
        (f"witness w1 {WITNESSES[0].text}", f"witness w1 {WITNESSES[1].text}"),
        ("quorum", "unknown"),
    ],
)
def test_other_policies_are_refused(old: str, new: str) -> None:
    assert old in POLICY.text
    with pytest.raises(ProtocolError):
        Policy.parse(POLICY.text.replace(old, new))


def test_no_witness_counts_twice() -> None:
    twin = NoteKey("w9", COSIGNATURE, WITNESSES[0].public)
    with pytest.raises(ProtocolError, match="each name and each key must appear once"):
        Policy(LOG, (*WITNESSES, twin), 4)
    with pytest.raises(ProtocolError, match="each name and each key must appear once"):
        Policy(LOG, (*WITNESSES, NoteKey("w9", COSIGNATURE, LOG.public)), 4)


def test_a_leaf_proof_is_read_back_and_holds_for_its_leaf_alone() -> None:
    leaf = b"a leaf"
    other = leaf_hash(b"another")
    head = Checkpoint(LOG.name, 2, node_hash(leaf_hash(leaf), other))
    proof = LeafProof(0, (other,), signed(head))
    text = proof.encode()
    assert text.startswith(b"c2sp.org/tlog-proof@v1\nindex 0\n")
    assert LeafProof.parse(text) == proof
    assert verify_leaf(proof, leaf, POLICY) == head
    for wrong in (LeafProof(1, (other,), signed(head)), LeafProof(0, (EMPTY_ROOT,), signed(head))):
        with pytest.raises(VerificationError):
            verify_leaf(wrong, leaf, POLICY)
    with pytest.raises(VerificationError):
        verify_leaf(proof, b"a Leaf", POLICY)
    for old, new in [
        (b"@v1", b"@v2"),
        (b"index 0", b"index 00"),
        (b"index 0\n", b""),
        (b"index 0", b"extra AA\nindex 0"),
    ]:
        with pytest.raises(ProtocolError):
            verify_leaf(LeafProof.parse(text.replace(old, new)), leaf, POLICY)
