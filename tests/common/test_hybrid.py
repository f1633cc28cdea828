"""Hybrid signatures: who can forge one of Ed25519 and ML-DSA-65, or takes one away, gets nothing."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey

from privet.client.rounds.logbook import refusal_of
from privet.client.site import load_site
from privet.common.audit.verify import Verdict, verify_bundle
from privet.common.errors import PrivetError, ProtocolError, TooFewSitesError, VerificationError
from privet.common.log import mldsa
from privet.common.log.checkpoint import Checkpoint, Policy, accept_checkpoint, open_checkpoint
from privet.common.log.envelope import (
    PAYLOAD_TYPE,
    Envelope,
    SecondSignature,
    pae,
    sign_envelope,
    verify_envelope,
)
from privet.common.log.merkle import Frontier, leaf_hash
from privet.common.log.mldsa import Use
from privet.common.log.note import (
    Note,
    NoteKey,
    Signature,
    encode_lines,
    log_lines,
    parse_lines,
    parse_note,
    verify_note,
)
from privet.common.log.replay import Replay, admit
from privet.common.log.statements import Rotate, Statement
from privet.common.log.tiles import MAX_LEAF_BYTES
from privet.common.secagg.terms import Floor
from tests.support import mldsa_reference
from tests.support.log_world import (
    ORIGIN,
    World,
    log_key,
    member,
    private,
    public,
    second,
    sign_head,
    signed,
    story,
    witness_key,
)
from tests.support.rotated_log import place_of, rotate

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "log" / "hybrid.json").read_text())
STORY = story(hybrid=True)
HEAD, POLICY = STORY.checkpoint(), STORY.policy
LOG, OSLO = log_key(hybrid=True), witness_key("oslo", hybrid=True)


def lines_of(data: bytes) -> list[Signature]:
    return list(parse_note(data).signatures)


def with_lines(lines: list[Signature]) -> bytes:
    return Note(parse_note(HEAD).text, tuple(lines)).encode()


def verdict_of(leaves: list[bytes], policy: Policy = POLICY) -> Verdict:
    return verify_bundle(lambda: leaves, sign_head(leaves, STORY.sites, hybrid=True), policy)


# --- keys ----------------------------------------------------------------------------------------------------


def test_a_hybrid_key_is_one_line_of_text_and_no_other_key() -> None:
    for key in (LOG, OSLO):
        assert NoteKey.parse(key.text) == key
        classical = replace(key, pq=b"")
        assert NoteKey.parse(classical.text) == classical
        # A C2SP tool finds the id of the Ed25519 line where it always was; the other is that of both keys together.
        assert key.ids[0] == classical.id == key.id
        assert len({key.id, key.ids[1], replace(key, pq=second("paris").public_key().public_bytes_raw()).ids[1]}) == 3
    assert log_key(hybrid=True).ids[1] != replace(OSLO, name=ORIGIN, public=LOG.public, pq=LOG.pq).ids[1]


def test_no_mangled_hybrid_key_is_read() -> None:
    text, dice = LOG.text, random.Random(1)
    for at in [*range(len(text) - 2700, len(text) - 2600), *dice.sample(range(len(text)), 100)]:
        for mangled in (text[:at] + text[at + 1 :], text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :], text[:at]):
            with pytest.raises(ProtocolError):
                NoteKey.parse(mangled)


# --- checkpoints and cosignatures ----------------------------------------------------------------------------


def test_a_checkpoint_carries_both_signatures_of_everybody() -> None:
    head, cosigners = accept_checkpoint(HEAD, POLICY)
    assert (head, set(cosigners)) == (STORY.head, set(POLICY.witnesses))
    assert len(lines_of(HEAD)) == 2 * (1 + len(STORY.sites))
    assert verify_note(parse_note(HEAD), [log_key(), witness_key("oslo")]) == (log_key(), witness_key("oslo"))


@pytest.mark.parametrize("gone", [0, 1])
def test_half_a_signature_of_the_log_is_none(gone: int) -> None:
    lines = lines_of(HEAD)
    with pytest.raises(VerificationError, match="with Ed25519 and with ML-DSA-65, found one"):
        open_checkpoint(with_lines(lines[:gone] + lines[gone + 1 :]), LOG)


@pytest.mark.parametrize("half", [0, 1])
def test_half_a_cosignature_does_not_count(half: int) -> None:
    lines = lines_of(HEAD)
    kept = lines[:2] + [line for line in lines[2:] if line.key_id in {key.ids[half] for key in POLICY.witnesses}]
    assert len(kept) == 2 + len(STORY.sites)
    with pytest.raises(TooFewSitesError, match="found 0"):
        accept_checkpoint(with_lines(kept), POLICY)


def test_a_log_that_goes_on_with_ed25519_alone_is_refused() -> None:
    """Attack: whoever can forge Ed25519, a quantum attacker, signs for the log and for every witness."""
    forged = signed(replace(STORY.head, root=bytes(32)), STORY.sites)
    with pytest.raises(VerificationError, match="found one"):
        accept_checkpoint(forged, POLICY)
    # His Ed25519 lines, and beside them the ML-DSA-65 lines of the true checkpoint, under either text.
    mixed = [line for line in lines_of(HEAD) if len(line.data) > 72] + lines_of(forged)
    for text in (parse_note(forged).text, parse_note(HEAD).text):
        with pytest.raises(VerificationError, match="does not match"):
            accept_checkpoint(Note(text, tuple(mixed)).encode(), POLICY)


def test_no_line_counts_for_another_signer_text_time_or_use() -> None:
    text, other, time = "a\n1\nx\n", "a\n2\nx\n", (5).to_bytes(8, "big")
    key, pq = private("witness oslo"), second("oslo")

    def by_oslo(text: str, signed_text: str, name: str = OSLO.name, use: Use = Use.COSIGNATURE) -> Note:
        message = f"cosignature/v1\ntime 5\n{signed_text}".encode()
        first = Signature(OSLO.name, OSLO.id, time + key.sign(f"cosignature/v1\ntime 5\n{text}".encode()))
        data = time + mldsa.sign(pq, name.encode() + b"\n" + message, use)
        return Note(text, (first, Signature(OSLO.name, OSLO.ids[1], data)))

    assert verify_note(by_oslo(text, text), [OSLO]) == (OSLO,)
    for forged in (
        by_oslo(text, other),
        by_oslo(text, text, name="lyon.example"),
        *(by_oslo(text, text, use=use) for use in Use if use is not Use.COSIGNATURE),
    ):
        with pytest.raises(VerificationError, match=r"ML-DSA-65 signature by oslo[.]example does not match"):
            verify_note(forged, [OSLO])
    # Both halves are true, and of two acts.
    first, late = by_oslo(text, text).signatures, (6).to_bytes(8, "big")
    message = f"oslo.example\ncosignature/v1\ntime 6\n{text}".encode()
    later = replace(first[1], data=late + mldsa.sign(pq, message, Use.COSIGNATURE))
    with pytest.raises(VerificationError, match="different times"):
        verify_note(Note(text, (first[0], later)), [OSLO])
    # A note that was not parsed may repeat a line: two halves of one kind are no whole.
    assert verify_note(Note(text, (first[0], first[0])), [OSLO]) == ()


def test_no_changed_bit_of_a_signature_is_accepted() -> None:
    dice, lines = random.Random(2), lines_of(HEAD)
    for number, line in enumerate(lines):
        for bit in dice.sample(range(8 * len(line.data)), 8):
            data = bytearray(line.data)
            data[bit // 8] ^= 1 << bit % 8
            changed = [*lines[:number], replace(line, data=bytes(data)), *lines[number + 1 :]]
            with pytest.raises(VerificationError):
                accept_checkpoint(with_lines(changed), POLICY)
        for shorter in (b"", line.data[:-1], line.data + b"\0"):
            with pytest.raises(PrivetError):
                accept_checkpoint(
                    with_lines([*lines[:number], replace(line, data=shorter), *lines[number + 1 :]]), POLICY
                )


def test_the_lines_of_one_signer_are_read_and_nothing_else() -> None:
    pair = tuple(lines_of(HEAD)[2:4])
    assert parse_lines(encode_lines(pair)) == pair
    assert parse_lines(pair[0].line) == pair[:1]
    for wrong in ((*pair, pair[0]), (pair[0], pair[0]), (pair[0], lines_of(HEAD)[4])):
        with pytest.raises(ProtocolError):
            parse_lines(encode_lines(wrong))
    with pytest.raises(ProtocolError):
        parse_lines("")


def test_a_policy_names_each_second_key_once() -> None:
    assert Policy.parse(POLICY.text) == POLICY
    twin = replace(POLICY.witnesses[1], pq=POLICY.witnesses[0].pq)
    with pytest.raises(ProtocolError, match="each key must appear once"):
        replace(POLICY, witnesses=(POLICY.witnesses[0], twin, POLICY.witnesses[2]))
    with pytest.raises(ProtocolError, match="each key must appear once"):
        replace(POLICY, log=replace(LOG, pq=POLICY.witnesses[0].pq))


# --- statements ----------------------------------------------------------------------------------------------


def test_a_whole_log_verifies_and_each_signature_is_needed() -> None:
    leaves = STORY.leaves
    assert verdict_of(leaves).ok
    for index, leaf in enumerate(leaves):
        stripped = replace(Envelope.decode(leaf), second=None).encode()
        found = verdict_of([*leaves[:index], stripped, *leaves[index + 1 :]])
        assert (found.leaf, "expected signatures with Ed25519 and with ML-DSA-65" in found.reason) == (index, True)


def test_an_auditor_reads_what_rests_on_ed25519_alone() -> None:
    assert verdict_of(STORY.leaves).classical == ()
    classical = story()
    assert verify_bundle(lambda: classical.leaves, classical.checkpoint(), classical.policy).classical == (
        "all signatures",
    )
    # A consortium of earlier whose coordinator has rotated its keys: the sites' stay as they were.
    world = World()
    world.found()
    world.say(rotate(place_of(world), hybrid=True))
    head = Checkpoint(ORIGIN, world.frontier.size, world.frontier.root)
    lines = log_lines(head.text, ORIGIN, private("log 2"), second("log 2"))
    lines += tuple(line for line in parse_note(world.checkpoint()).signatures[1:])
    policy = replace(world.policy, log=log_key("log 2", hybrid=True))
    found = verify_bundle(lambda: world.leaves, Note(head.text, lines).encode(), policy)
    assert found.ok, found
    assert found.classical == (
        "the coordinator's statements before leaf 3, but for the checkpoints after it",
        "statements of berlin, lyon, oslo",
        "the cosignatures of berlin.example, lyon.example, oslo.example",
    )
    # Half of the new key is none, under the policy that names the whole.
    half = Note(head.text, (lines[0], *lines[2:])).encode()
    assert "found one" in verify_bundle(lambda: world.leaves, half, policy).reason


def test_a_site_that_has_an_mldsa_key_takes_part_where_all_have() -> None:
    assert refusal_of((LOG, *POLICY.witnesses)) is None
    refused = refusal_of((log_key(), *POLICY.witnesses))
    assert refused is not None
    assert refused.code == "E_CLASSICAL_SIGNATURES"
    assert f"Ed25519 alone by {ORIGIN}:" in refused.message
    assert "privet coordinator rotate --keys" in refused.hint
    refused = refusal_of((LOG, witness_key("berlin"), OSLO))
    assert refused is not None
    assert "Ed25519 alone by berlin.example:" in refused.message
    assert "privet site renew SITE --keys" in refused.hint


@pytest.mark.parametrize(
    ("mldsa", "said", "accepts"),
    [("", "", True), ('mldsa = "m.pem"', "", False), ('mldsa = "m.pem"', "true", True), ("", "false", False)],
)
def test_a_site_of_earlier_goes_on_and_a_new_one_asks_for_both(
    tmp_path: Path, mldsa: str, said: str, accepts: bool
) -> None:
    file = tmp_path / "site.toml"
    floor = f"[floor]\nclassical_signatures = {said}\n" if said else ""
    file.write_text(f'name = "oslo"\ntrain = ["a.csv"]\n{mldsa}\n{floor}')
    site = load_site(file)
    assert site.classical_signatures is accepts
    assert site.floor.terms() == Floor()


def test_a_second_signature_of_somebody_without_a_key_is_refused() -> None:
    classical = story()
    leaf = Envelope.decode(classical.leaves[0])
    added = replace(leaf, second=Envelope.decode(STORY.leaves[0]).second).encode()
    with pytest.raises(VerificationError, match="with Ed25519 alone, found two"):
        admit(Replay(), 0, added, lambda size: b"")


LEAF = Envelope.decode(STORY.leaves[-1])
OWN = mldsa.public_of(second("lyon"))


def forged_second(author: str = "lyon", use: Use = Use.STATEMENT, payload: bytes = LEAF.payload) -> SecondSignature:
    return replace(leaf_second(), signature=mldsa.sign(second(author), pae(PAYLOAD_TYPE, payload), use))


def leaf_second() -> SecondSignature:
    assert LEAF.second is not None
    return LEAF.second


@pytest.mark.parametrize(
    ("forged", "why"),
    [
        (replace(leaf_second(), key=bytes(32)), "it is of another key"),
        (replace(leaf_second(), signature=Envelope.decode(STORY.leaves[-2]).second.signature), "does not match"),  # type: ignore[union-attr]
        (Envelope.decode(STORY.leaves[0]).second, "it is of another key"),
        (forged_second("oslo"), "does not match"),
        (forged_second(use=Use.CHECKPOINT), "does not match"),
        (forged_second(use=Use.ROTATION), "does not match"),
        (forged_second(payload=LEAF.payload + b" "), "does not match"),
        (replace(leaf_second(), signature=bytes(mldsa.SIGNATURE_BYTES)), "does not match"),
        (None, "found one"),
    ],
)
def test_a_statement_needs_its_authors_signature_for_this_use(forged: SecondSignature | None, why: str) -> None:
    LEAF.check(OWN)
    forgery = replace(LEAF, second=forged)
    assert Envelope.decode(forgery.encode()) == forgery
    with pytest.raises(VerificationError, match=why):
        forgery.check(OWN)
    with pytest.raises(VerificationError):
        verify_envelope(forgery.encode(), (public("lyon"),), OWN)


def test_the_first_signature_is_needed_as_well() -> None:
    """Attack: whoever can forge ML-DSA-65, because lattices turned out weak, has not Ed25519."""
    with pytest.raises(VerificationError, match="does not match"):
        replace(LEAF, signature=bytes(64)).check(OWN)


def test_an_envelope_has_one_form() -> None:
    data, dice = STORY.leaves[-1], random.Random(3)
    end = data.index(b"signatures")
    for at in [*range(end, end + 260), *dice.sample(range(len(data)), 100)]:
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(PrivetError):
            verify_envelope(changed, (public("lyon"),), OWN)
    with pytest.raises(ProtocolError):
        Envelope.decode(data.replace(b"mldsa65:", b"mldsa44:"))
    assert len(data) < MAX_LEAF_BYTES


def test_two_signatures_over_one_statement_differ_and_both_count() -> None:
    statement: Statement = STORY.said[-1][0]
    one, two = (sign_envelope(statement, private("lyon"), second("lyon")) for _ in range(2))
    assert one != two
    assert verify_envelope(one, (public("lyon"),), OWN) == verify_envelope(two, (public("lyon"),), OWN)


# --- rotation ------------------------------------------------------------------------------------------------


def after(world: World, statement: Rotate) -> Replay:
    """Return the history of a world that ends with a rotation."""
    history, frontier = Replay(), Frontier()
    roots = [frontier.root]
    pq = second("coordinator") if world.hybrid else None
    for index, leaf in enumerate([*world.leaves, sign_envelope(statement, private("coordinator"), pq)]):
        admit(history, index, leaf, roots.__getitem__)
        frontier, _ = frontier.append(leaf_hash(leaf))
        roots.append(frontier.root)
    return history


@pytest.mark.parametrize("before", [False, True])
def test_a_rotation_brings_a_new_second_key_or_the_first_one(before: bool) -> None:
    world = World(hybrid=before)
    world.found()
    history = after(world, rotate(place_of(world), hybrid=True))
    assert history.epochs[-1].log == log_key("log 2", hybrid=True)
    assert history.pq_of(public("coordinator 2")) == mldsa.public_of(second("coordinator 2"))
    assert bool(history.pq_of(public("coordinator"))) == before  # of what it signed before


def test_no_rotation_goes_back_to_ed25519_alone() -> None:
    """Attack: whoever forges Ed25519 needs a log that trusts it alone again."""
    world = World(hybrid=True)
    world.found()
    with pytest.raises(VerificationError, match="lacks ML-DSA-65, which the present one has"):
        after(world, rotate(place_of(world), hybrid=False))


def test_a_new_second_key_is_new_and_at_hand() -> None:
    world = World(hybrid=True)
    world.found()
    place = place_of(world)
    good = rotate(place, hybrid=True)
    for proof in (good.log_proof[:128], good.log_proof[:-2] + "00", good.log_proof[:128] + "0" * 6618):
        with pytest.raises(VerificationError, match="the new key of the log has not signed"):
            after(world, good.model_copy(update={"log_proof": proof}))
    for owner in ("coordinator", "oslo"):
        taken = replace(log_key("log 2"), pq=mldsa.public_of(second(owner))).text
        with pytest.raises(VerificationError, match="used before"):
            after(world, good.model_copy(update={"log": taken}))


# --- keys under which anybody signs --------------------------------------------------------------------------


def test_nobody_has_an_mldsa_key_under_which_anybody_signs() -> None:
    """Attack: a site joins with a second key that binds nobody, so that Ed25519 alone is left, and can deny it all."""
    flat = bytes(32) + bytes(mldsa.PUBLIC_BYTES - 32)
    forged = mldsa_reference.forged(flat, b"a statement", b"privet-statement/2")
    assert mldsa_reference.verify(flat, b"a statement", forged, b"privet-statement/2")
    library = MLDSA65PublicKey.from_public_bytes(flat)
    library.verify(forged, b"a statement", b"privet-statement/2")  # it is valid, by the standard
    assert not mldsa.verifies(flat, forged, b"a statement", Use.STATEMENT)
    # Near 0 modulo q are the coefficients 0 and 1,023, and those beside them.
    for coefficient in (0, 1, 100, 1000, 1023):
        packed = sum(coefficient << 10 * i for i in range(1536)).to_bytes(1920, "little")
        assert mldsa.is_weak(bytes(32) + packed)
    for name in ("oslo", "lyon", "coordinator"):
        assert not mldsa.is_weak(mldsa.public_of(second(name)))


def test_no_hybrid_key_has_one_id_for_both_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: of 2^32 keys one has two equal ids. Its Ed25519 line would be both lines."""
    monkeypatch.setattr(NoteKey, "_id", lambda self, material: b"same")
    with pytest.raises(ProtocolError, match="its two signatures have one id"):
        NoteKey(OSLO.name, OSLO.kind, OSLO.public, OSLO.pq)
    NoteKey(OSLO.name, OSLO.kind, OSLO.public)


def test_a_member_has_its_second_key_alone() -> None:
    world = World(hybrid=True)
    twin = replace(witness_key("paris", hybrid=True), pq=OSLO.pq).text
    guest = member("paris", hybrid=True).model_copy(update={"witness": twin})
    members = tuple(sorted((guest, *world.genesis().members), key=lambda each: each.site))
    with pytest.raises(ValueError, match="a key is named twice"):
        world.genesis(members=members, quorum=3)


# --- known answers -------------------------------------------------------------------------------------------


def test_committed_signatures_verify_here_and_by_another_implementation() -> None:
    for entry in VECTORS["notes"]:
        note, key = parse_note(entry["note"].encode()), NoteKey.parse(entry["vkey"])
        assert verify_note(note, [key]) == (key,)
        line = next(line for line in note.signatures if line.key_id == key.ids[1])
        data = line.data[8:] if entry["use"] == "privet-cosignature/1" else line.data
        message = bytes.fromhex(entry["message"])
        assert mldsa_reference.verify(key.pq, message, data, entry["use"].encode())
        assert not mldsa_reference.verify(key.pq, message, data, b"privet-statement/2")
    leaf = VECTORS["statement"]
    envelope, pq = Envelope.decode(leaf["envelope"].encode()), bytes.fromhex(leaf["mldsa65"])
    envelope.check(pq)
    assert envelope.second is not None
    message = pae(PAYLOAD_TYPE, envelope.payload)
    assert mldsa_reference.verify(pq, message, envelope.second.signature, b"privet-statement/2")
    assert not mldsa_reference.verify(pq, message + b" ", envelope.second.signature, b"privet-statement/2")


def test_the_keys_of_the_vectors_follow_from_their_seeds() -> None:
    assert LOG.text == VECTORS["notes"][0]["vkey"]
    assert OSLO.text == VECTORS["notes"][1]["vkey"]
    assert OWN.hex() == VECTORS["statement"]["mldsa65"]
