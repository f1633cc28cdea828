"""Enrolment with hybrid keys: no half of a key passes on the way, and a log has room for all founding members."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privet.client.network.enrolment import accept_membership, prepare_request
from privet.client.rounds.witness import Witness
from privet.client.trust import Trusted
from privet.common.canonical import canonical_json, digest
from privet.common.errors import ProtocolError, RefusedError, VerificationError
from privet.common.log.checkpoint import Policy
from privet.common.log.note import Note, NoteKey, parse_note
from privet.common.log.replay import Replay, admit
from privet.common.log.statements import Genesis, Join, StatedFloor
from privet.common.pki.charter import Charter
from privet.common.pki.enrolment import JoinReply, JoinRequest
from privet.common.pki.keyfile import MLDSA_KEY, read_key
from privet.server.consortium import members as stored
from privet.server.consortium.coordinator import Coordinator, log_members, open_coordinator
from privet.server.consortium.membership import check_new_keys
from privet.server.consortium.rotation import rotate_keys
from privet.server.log.journal import FormerKeysError, open_journal
from tests.support.consortium_world import make_coordinator

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


@pytest.fixture
def own(tmp_path: Path) -> Coordinator:
    return make_coordinator(tmp_path / "coordinator")


def asked(own: Coordinator, site: str) -> JoinRequest:
    return prepare_request(own.directory.parent / site, own.invite(site, NOW))


def enrolled(own: Coordinator, site: str) -> JoinReply:
    request = asked(own, site)
    own.answer(request, NOW)
    own.approve(site, request.keys.words, NOW)
    return own.answer(request, NOW)


def halved(vkey: str) -> str:
    return replace(NoteKey.parse(vkey), pq=b"").text


def test_new_parties_have_both_keys_and_compare_both(own: Coordinator) -> None:
    request = asked(own, "oslo")
    half = request.keys.model_copy(update={"witness": halved(request.keys.witness)})
    assert NoteKey.parse(request.keys.witness).pq
    assert half.words != request.keys.words
    assert half.fingerprint != request.keys.fingerprint
    bare = own.charter.model_copy(update={"log": halved(own.charter.log)})
    assert bare.words != own.charter.words
    for path in (own.directory / "keys" / MLDSA_KEY, own.directory.parent / "oslo/keys" / MLDSA_KEY):
        assert path.stat().st_mode & 0o077 == 0


def test_nobody_joins_with_half_a_proof_or_a_key_of_another(own: Coordinator) -> None:
    request, other = asked(own, "oslo"), asked(own, "lyon")
    key, secret = read_key(own.directory.parent / "oslo/keys/identity.pem", "identity"), bytes.fromhex(request.secret)
    body = request.model_dump(mode="json")
    taken = replace(NoteKey.parse(request.keys.witness), pq=NoteKey.parse(other.keys.witness).pq).text
    stolen = request.keys.model_copy(update={"witness": taken})
    for changed in (
        {"proof": request.proof[:128]},
        {"proof": request.proof[:-1] + ("0" if request.proof[-1] != "0" else "1")},
        {"proof": request.proof[:128] + other.proof[128:]},
        {"keys": body["keys"] | {"witness": halved(request.keys.witness)}},
        {"keys": stolen.model_dump(mode="json")},
    ):
        with pytest.raises(ProtocolError):
            JoinRequest.decode(canonical_json(body | changed))
    # With Ed25519 alone he is another site, with other words, which its operator did not read out.
    half = request.keys.model_copy(update={"witness": halved(request.keys.witness)})
    own.answer(JoinRequest.make(secret, half, key), NOW)
    with pytest.raises(RefusedError, match="the words are not those"):
        own.approve("oslo", request.keys.words, NOW)


def test_a_second_key_that_was_used_before_is_refused(own: Coordinator) -> None:
    """Attack: a guest names the coordinator's, or a member's, ML-DSA-65 key as its own. It cannot prove it either."""
    enrolled(own, "oslo")
    guest = asked(own, "lyon").keys
    for pq in (own.keys.public.pq, NoteKey.parse(own.members.members()[0].witness).pq):
        taken = guest.model_copy(update={"witness": replace(NoteKey.parse(guest.witness), pq=pq).text})
        with pytest.raises(RefusedError, match="used in this consortium before"):
            check_new_keys(taken, own.members.members(), own.members.consortium.reserved)


def test_a_join_reply_without_a_second_key_is_refused(own: Coordinator) -> None:
    """Attack: somebody on the way, who forges certificates too, takes the ML-DSA-65 keys out of the roster."""
    for site in ("oslo", "lyon"):
        reply = enrolled(own, site)
    folder, terms = own.directory.parent / "lyon", reply.terms
    assert terms is not None
    bare = tuple(keys.model_copy(update={"witness": halved(keys.witness)}) for keys in terms.members)
    with pytest.raises(VerificationError, match="holds other public keys for site lyon"):
        accept_membership(folder, reply.model_copy(update={"terms": terms.model_copy(update={"members": bare})}), NOW)
    accept_membership(folder, reply, NOW)
    # The words that were read out stand for whole keys, so half of one is not confirmed.
    trusted, claimed = Trusted(members=terms.members[:1]), Charter.claimed(terms, own.root)
    without = Charter.claimed(terms.model_copy(update={"log": halved(own.charter.log)}), own.root)
    with pytest.raises(VerificationError, match="the words are not those"):
        trusted.with_charter(without, own.charter.words)
    with pytest.raises(VerificationError, match="the words are not those"):
        trusted.with_member(bare[1], terms.members[1].words)
    assert trusted.with_charter(claimed, own.charter.words).charter == own.charter
    # No rotation leads back, also if somebody reads out its words.
    confirmed = trusted.with_charter(claimed, own.charter.words)
    assert not without.renews(claimed)
    assert claimed.renews(without)
    with pytest.raises(VerificationError, match="changes more than the keys"):
        confirmed.check_words(without, without.words)


@contextmanager
def founded(own: Coordinator, names: tuple[str, ...] = ("oslo", "lyon")) -> Iterator[Coordinator]:
    for name in names:
        enrolled(own, name)
    own.members.found(StatedFloor(), NOW)
    with open_journal(own.log_directory, own.keys) as journal:
        log_members(own, journal)
    yield own


def test_a_consortium_of_earlier_goes_on_and_rotates_to_hybrid_keys(own: Coordinator) -> None:
    (own.directory / "keys" / MLDSA_KEY).unlink()  # as an earlier version made it
    old = open_coordinator(own.directory)
    assert old.keys.pq is None
    with founded(old):
        before = old.charter
        done = rotate_keys(open_coordinator(own.directory))
    assert NoteKey.parse(done.charter.log).pq
    assert done.charter.renews(before)
    assert not before.renews(done.charter)
    after = open_coordinator(own.directory)
    with open_journal(after.log_directory, after.keys) as journal:
        assert journal.history.epochs[-1].log == after.keys.public
        assert journal.history.epochs[-1].charter == digest(done.charter.encode())
    # Without its second key, the coordinator signs nothing: not even with the first one alone.
    (own.directory / "keys" / MLDSA_KEY).unlink()
    bare = open_coordinator(own.directory)
    with pytest.raises(FormerKeysError), open_journal(bare.log_directory, bare.keys):
        pass


def test_a_rotation_replaces_the_second_key(own: Coordinator) -> None:
    with founded(own):
        first = own.keys
        rotate_keys(open_coordinator(own.directory))
    after = open_coordinator(own.directory)
    assert after.keys.public.pq not in (b"", first.public.pq)
    assert first.public.pq.hex() in after.members.consortium.reserved


def test_a_witness_refuses_a_log_that_stops_signing_with_mldsa(own: Coordinator, tmp_path: Path) -> None:
    with founded(own), open_journal(own.log_directory, own.keys) as journal:
        note = journal._log.checkpoint()
    key = read_key(own.directory.parent / "oslo/keys/witness.pem", "witness")
    witness = Witness.create(tmp_path / "w", own.keys.public, "oslo", key)
    parsed = parse_note(note)
    for line in parsed.signatures:
        with pytest.raises(VerificationError, match="with Ed25519 and with ML-DSA-65, found one"):
            witness.add(Note(parsed.text, (line,)).encode(), 0, (), 1)
    assert witness.last.size == 0
    witness.add(note, 0, (), 1)
    assert parse_note(witness.notes()[0]).signatures[:2] == parsed.signatures


def test_all_founding_members_enter_the_log_however_long_their_keys(
    own: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_STATEMENT_BYTES", 16_000)  # as 13 members would need
    names = tuple(f"site-{number}" for number in range(6))
    with founded(own, names):
        said = [statement for _, statement in own.members.statements()]
        assert said == []
    with open_journal(own.log_directory, own.keys) as journal:
        leaves = list(journal._log.leaves())
        roots = journal._log.root_at
        history, kinds = Replay(), list[type]()
        for index, leaf in enumerate(leaves):
            kinds.append(type(admit(history, index, leaf, roots)[1]))
    assert kinds == [Genesis, *[Join] * (len(kinds) - 1)]
    assert 1 < len(kinds) < 6
    assert sorted(history.members) == sorted(names)
    policy = own.members.policy()
    assert policy is not None
    assert (history.quorum, len(policy.witnesses)) == (policy.needed, 6)
    assert Policy.parse(policy.text) == policy


def test_a_genesis_without_room_for_the_members_that_may_collude_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make_coordinator(tmp_path / "coordinator", colluding=3)
    monkeypatch.setattr(stored, "MAX_STATEMENT_BYTES", 10_000)
    for number in range(5):
        enrolled(own, f"site-{number}")
    with pytest.raises(RefusedError, match="has room for 2 members, but needs 4"):
        own.members.found(StatedFloor(), NOW)
