"""Keys are rotated by one statement: who holds which key gets no other history, and no statement, accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.common.audit.story import story
from privet.common.audit.verify import Verdict, verify_bundle
from privet.common.errors import ProtocolError, VerificationError
from privet.common.log import note
from privet.common.log.checkpoint import Checkpoint, OtherKeyError, Policy, open_checkpoint
from privet.common.log.encoding import encode_statement, parse_statement
from privet.common.log.epochs import KeyEpoch, RotationPlace, epoch_at, possession_text
from privet.common.log.merkle import Frontier, leaf_hash
from privet.common.log.note import ED25519, Note, NoteKey
from privet.common.log.replay import Leaf, Replay
from privet.common.log.statements import Join, Rotate, Statement
from tests.support.log_world import ORIGIN, World, digest, log_key, member, private, public, signed, witness_key
from tests.support.rotated_log import Rotated, place_of, rotate

ZERO = bytes.fromhex("01" + "00" * 31).hex()


def verdict(world: World, policy: Policy, signer: str = "log 2", size: int | None = None) -> Verdict:
    """Verify the first leaves of a world, under a checkpoint of this signer that all witnesses cosigned."""
    size = len(world.leaves) if size is None else size
    head = Checkpoint(ORIGIN, size, world.roots[size])
    return verify_bundle(lambda: world.leaves[:size], signed(head, world.sites, signer), policy)


def replayed(world: World) -> Replay:
    history = Replay()
    for index, (statement, author) in enumerate(world.said):
        leaf = Leaf(index, f"sha256:{leaf_hash(world.leaves[index]).hex()}", public(author))
        history.admit(leaf, statement, lambda size: world.roots[size])
    return history


def refusal(world: World, statement: Statement, author: str = "coordinator") -> str:
    """Return why a log does not take a statement next, and check that it leaves no trace."""
    history = replayed(world)
    before = (list(history.epochs), dict(history.keys))
    leaf = Leaf(len(world.leaves), digest("leaf"), public(author))
    with pytest.raises(VerificationError) as caught:
        history.admit(leaf, statement, lambda size: world.roots[size])
    assert (list(history.epochs), dict(history.keys)) == before
    return caught.value.message


# --- what holds ----------------------------------------------------------------------------------------------


def test_one_table_says_which_key_counts_for_which_size_and_leaf() -> None:
    made = Rotated().goes_on()
    history = replayed(made.world)
    assert [epoch.since for epoch in history.epochs] == [0, made.leaf + 1]
    for size, name in ((0, ""), (made.leaf, ""), (made.leaf + 1, " 2"), (10**6, " 2")):
        at = history.epoch_at(size)
        assert (at.log, at.coordinator) == (log_key(f"log{name}"), public(f"coordinator{name}"))
    assert epoch_at(history.epochs, made.leaf) == history.epochs[0]
    assert history.epochs[-1].charter == digest("charter")


def test_a_log_verifies_under_the_policy_of_its_size() -> None:
    made = Rotated().goes_on()
    assert verdict(made.world, made.policy).ok
    assert verdict(made.world, made.policy, size=made.leaf + 1).ok  # the first checkpoint with the statement
    assert verdict(made.world, made.world.policy, "log", made.leaf).ok  # the last one of the old key
    told = zip([Leaf(n, "", b"") for n in range(99)], [each for each, _ in made.world.said], strict=False)
    assert any("keys of log and coordinator are replaced" in line for line in story(told))


def test_keys_can_be_rotated_again() -> None:
    made = Rotated().goes_on()
    world = made.world
    world.say(rotate(place_of(world, "2"), "log 3", "coordinator 3"), "coordinator 2")
    world.say(world.run_open("copd"), "coordinator 3")
    assert verdict(world, replace(made.policy, log=log_key("log 3")), "log 3").ok
    assert len(replayed(world).epochs) == 3
    for earlier in ("", " 2"):
        policy = replace(made.policy, log=log_key(f"log{earlier}"))
        assert not verdict(world, policy, f"log{earlier}").ok


def test_the_statement_has_one_encoding() -> None:
    statement = rotate(place_of(World()))
    assert parse_statement(encode_statement(statement)) == statement


# --- who may rotate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("author", ["coordinator 2", "log", "log 2", "oslo", "witness oslo"])
def test_only_the_present_key_of_the_coordinator_signs_a_rotation(author: str) -> None:
    world = World()
    world.found()
    assert "which is not the coordinator's key" in refusal(world, rotate(place_of(world)), author)


@pytest.mark.parametrize(
    ("log", "coordinator"),
    [
        ("log", "coordinator 2"),
        ("log 2", "coordinator"),
        ("coordinator", "coordinator 2"),
        ("log 2", "log"),
        ("witness oslo", "coordinator 2"),
        ("log 2", "oslo"),
    ],
)
def test_no_key_of_the_history_comes_back_as_another(log: str, coordinator: str) -> None:
    world = World()
    world.found()
    assert "used before" in refusal(world, rotate(place_of(world), log, coordinator))


def test_the_key_of_an_epoch_that_ended_or_of_a_former_member_does_not_come_back() -> None:
    made = Rotated()
    for log, coordinator in (("log", "coordinator 3"), ("log 3", "coordinator"), ("log 2", "coordinator 3")):
        assert "used before" in refusal(
            made.world, rotate(place_of(made.world, "2"), log, coordinator), "coordinator 2"
        )
    for key in ("coordinator", "log", "coordinator 2", "log 2"):
        guest = member("paris").model_copy(update={"key": public(key).hex()})
        join = Join(time=1, member=guest, quorum=3)
        assert "used before" in refusal(made.world, join, "coordinator 2")


def test_two_equal_or_weak_keys_are_no_statement() -> None:
    place = place_of(World())
    for lies in (
        {"coordinator": public("log 2").hex()},
        {"coordinator": ZERO},
        {"log": NoteKey(ORIGIN, ED25519, bytes.fromhex(ZERO)).text},
        {"log": witness_key("oslo").text},
        {"log": "nothing"},
    ):
        with pytest.raises(ValueError, match="Rotate"):
            Rotate.model_validate(rotate(place).model_dump() | lies)


def test_the_log_keeps_its_name() -> None:
    world = World()
    world.found()
    other = NoteKey("example.org/elsewhere", ED25519, public("log 2")).text
    assert "name of the log" in refusal(world, rotate(place_of(world), log="log 2").model_copy(update={"log": other}))


def test_keys_are_not_replaced_while_a_round_is_open() -> None:
    world = World()
    world.found()
    opened = world.say(world.round_open("flu", 1))
    assert "a round of run flu is open" in refusal(world, rotate(place_of(world)))
    world.say(world.round_abort("flu", 1, opened))
    world.say(rotate(place_of(world)))
    assert len(replayed(world).epochs) == 2


# --- proofs of possession --------------------------------------------------------------------------------------


def elsewhere(**changes: Any) -> Callable[[RotationPlace], RotationPlace]:
    return lambda place: replace(place, **changes)


@pytest.mark.parametrize(
    "other",
    [
        elsewhere(index=1),
        elsewhere(consortium="south"),
        elsewhere(root=bytes(32)),
        elsewhere(present=KeyEpoch(0, log_key("log 3"), public("coordinator"))),
        elsewhere(present=KeyEpoch(0, log_key(), public("coordinator 3"))),
        elsewhere(present=KeyEpoch(0, NoteKey("example.org/other", ED25519, public("log")), public("coordinator"))),
    ],
)
def test_a_proof_for_another_place_is_none(other: Callable[[RotationPlace], RotationPlace]) -> None:
    """Attack: a statement of another log, of another fork, or of another place in this one is signed anew."""
    world = World()
    world.found()
    assert "has not signed for this place" in refusal(world, rotate(other(place_of(world))))


@pytest.mark.parametrize("name", ["log_proof", "coordinator_proof"])
def test_keys_that_are_not_at_hand_are_not_named(name: str) -> None:
    """Attack: to name a key of somebody else, whose statements would then be the coordinator's."""
    world = World()
    world.found()
    place = place_of(world)
    true, swapped = rotate(place), {"log_proof": "coordinator_proof", "coordinator_proof": "log_proof"}[name]
    by_old = private("coordinator").sign(possession_text(place, true)).hex()
    for proof in ("0" * 128, by_old, getattr(true, swapped)):
        assert "has not signed for this place" in refusal(world, true.model_copy(update={name: proof}))


def test_the_proofs_hold_for_their_charter_and_for_both_keys_together() -> None:
    world = World()
    world.found()
    true, other = rotate(place_of(world)), rotate(place_of(world), coordinator="coordinator 3")
    for update in (
        {"charter": digest("another")},
        {"coordinator": other.coordinator, "coordinator_proof": other.coordinator_proof},
    ):
        assert "has not signed for this place" in refusal(world, true.model_copy(update=update))


def test_a_proof_is_neither_a_checkpoint_nor_a_statement() -> None:
    """The text cannot be that of a note or an envelope, whatever the place."""
    text = possession_text(place_of(World()), rotate(place_of(World())))
    with pytest.raises(ProtocolError):
        note.sign_note(text.decode() + "\n", ORIGIN, private("log 2"))
    assert not text.startswith(b"DSSEv1")


# --- before and after -----------------------------------------------------------------------------------------


def test_a_statement_counts_under_the_key_of_its_leaf() -> None:
    made = Rotated()
    said = made.world.run_open("copd")
    assert f"that key was replaced at leaf {made.leaf}" in refusal(made.world, said)
    before = World()
    before.found()
    assert "not the coordinator's key" in refusal(before, said, "coordinator 2")


@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_checkpoint_with_the_statement_is_none_under_the_old_key(more: int) -> None:
    """Attack: a thief of the old log key goes on signing; a quorum cosigned the same tree."""
    made = Rotated().goes_on()
    found = verdict(made.world, made.world.policy, "log", made.leaf + 1 + more)
    assert (found.ok, found.leaf) == (False, made.leaf)
    assert "still signed with it" in found.reason


@pytest.mark.parametrize("less", [0, 1, 3])
def test_a_checkpoint_before_the_statement_is_none_under_the_new_key(less: int) -> None:
    made = Rotated()
    found = verdict(made.world, made.policy, "log 2", made.leaf - less)
    assert (found.ok, found.leaf) == (False, 0)
    assert "leaf 0 is not the genesis of that log" in found.reason


def test_the_old_policy_says_which_leaf_rotated_and_what_to_get() -> None:
    made = Rotated().goes_on()
    found = verdict(made.world, made.world.policy)
    assert not found.ok
    assert f"leaf {made.leaf} of this log, which a quorum of the policy cosigned, rotates the key" in found.reason
    assert log_key("log 2").text in found.reason
    assert "from the sites" in found.reason


def test_the_new_policy_says_that_an_earlier_bundle_needs_the_earlier_one() -> None:
    made = Rotated()
    found = verdict(made.world, made.policy, "log", made.leaf)
    assert "if the bundle was made before the log's keys were rotated, use the policy of that time" in found.reason


def test_a_rotation_that_no_quorum_cosigned_is_not_announced_to_an_auditor() -> None:
    """Attack: a thief rotates to his own key, and has the auditor told to get a policy with it."""
    made = Rotated().goes_on()
    head = Checkpoint(ORIGIN, len(made.world.leaves), made.world.frontier.root)
    found = verify_bundle(lambda: made.world.leaves, signed(head, ("oslo",), "log 2"), made.world.policy)
    assert not found.ok
    assert log_key("log 2").text not in found.reason


def test_a_log_without_the_statement_does_not_verify_under_the_new_key() -> None:
    """Attack: the leaf is left out, and all that follows is signed by holders of all keys, of the witnesses too."""
    made = Rotated()
    world = World()
    world.found()
    world.play("flu", 1)
    for author in ("coordinator", "coordinator 2"):
        cut = World(leaves=list(world.leaves), said=list(world.said), frontier=world.frontier, roots=list(world.roots))
        cut.adapters = dict(world.adapters)
        cut.say(cut.run_open("copd"), author)
        for signer, policy in (("log", made.policy), ("log 2", made.policy), ("log 2", made.world.policy)):
            assert not verdict(cut, policy, signer).ok


def test_every_leaf_from_the_rotation_on_is_needed_in_its_place() -> None:
    made = Rotated().goes_on()
    world = made.world

    def without(leaf: int) -> Callable[[], Sequence[bytes]]:
        return lambda: [data for index, data in enumerate(world.leaves) if index != leaf]

    head = Checkpoint(ORIGIN, len(world.leaves), world.frontier.root)
    for leaf in (made.leaf, made.leaf + 1):
        assert not verify_bundle(without(leaf), signed(head, world.sites, "log 2"), made.policy).ok
    leaves = without(made.leaf)()
    frontier = Frontier()
    for data in leaves:
        frontier, _ = frontier.append(leaf_hash(data))
    made_anew = signed(Checkpoint(ORIGIN, len(leaves), frontier.root), world.sites, "log 2")
    assert not verify_bundle(lambda: leaves, made_anew, made.policy).ok


# --- notes ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_opened_with_the_key_of_its_size() -> None:
    made = Rotated()
    history = replayed(made.world)
    for size, signer in ((made.leaf, "log"), (made.leaf + 1, "log 2")):
        head = Checkpoint(ORIGIN, size, made.world.roots[size])
        assert open_checkpoint(signed(head, (), signer), lambda n: history.epoch_at(n).log)[0] == head
        other = "log" if signer == "log 2" else "log 2"
        with pytest.raises(OtherKeyError, match="with the key"):
            open_checkpoint(signed(head, (), other), lambda n: history.epoch_at(n).log)
        both = (
            *note.parse_note(signed(head, (), other)).signatures,
            *note.parse_note(signed(head, (), signer)).signatures,
        )
        assert open_checkpoint(Note(head.text, both).encode(), lambda n: history.epoch_at(n).log)[0] == head
    with pytest.raises(VerificationError, match="found none"):
        open_checkpoint(signed(head, ("oslo",)).replace(ORIGIN.encode(), b"example.org/other"), log_key())


def test_a_forged_signature_of_the_right_key_is_not_excused_by_another() -> None:
    made = Rotated()
    head = Checkpoint(ORIGIN, made.leaf, made.world.roots[made.leaf])
    forged = note.sign_note(head.text, ORIGIN, Ed25519PrivateKey.generate())
    wrong = note.Signature(ORIGIN, log_key().id, forged.data)
    with pytest.raises(VerificationError, match="does not match"):
        open_checkpoint(Note(head.text, (wrong,)).encode(), log_key())


def test_what_new_keys_sign_is_fixed() -> None:
    place = RotationPlace("north", 7, bytes(32), KeyEpoch(0, log_key(), public("coordinator")))
    keys = [
        f'{{"coordinator":"{public(f"coordinator{name}").hex()}","log":"{log_key(f"log{name}").text}"}}'
        for name in (" 2", "")
    ]
    assert possession_text(place, rotate(place)).decode() == (
        f'privet-rotate/1\0{{"charter":"{digest("charter")}","consortium":"north","index":7,"new":{keys[0]},'
        f'"present":{keys[1]},"root":"{"0" * 64}"}}'
    )
