"""The members' file: who is in, by which rules, and what the log is to say of it."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from privet.client.network.enrolment import prepare_request
from privet.common.errors import RefusedError, StateError
from privet.common.log import envelope
from privet.common.log.checkpoint import Quorum
from privet.common.log.merkle import Frontier, leaf_hash
from privet.common.log.note import NoteKey
from privet.common.log.replay import Leaf, Replay
from privet.common.log.statements import Genesis, Join, Revoke, StatedFloor
from privet.common.pki.enrolment import JoinRequest, SiteKeys
from privet.common.pki.token import Token
from privet.server.consortium.coordinator import Coordinator
from privet.server.consortium.members import Members
from privet.server.consortium.membership import check_token, next_quorum
from tests.support.consortium_world import make_coordinator

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)


@pytest.fixture
def own(tmp_path: Path) -> Coordinator:
    return make_coordinator(tmp_path / "coordinator", colluding=1)


def asked(own: Coordinator, site: str, number: int = 0) -> tuple[Token, JoinRequest]:
    token = own.invite(site, NOW)
    return token, prepare_request(own.directory.parent / f"{site}-{number}", token)


def joined(own: Coordinator, site: str, number: int = 0) -> SiteKeys:
    _, request = asked(own, site, number)
    own.answer(request, NOW)
    own.approve(site, request.keys.fingerprint, NOW)
    return request.keys


@given(members=st.integers(1, 98), colluding=st.integers(0, 98))
def test_every_quorum_is_one_and_withstands_what_it_can(members: int, colluding: int) -> None:
    quorum = Quorum(members, next_quorum(members, colluding))
    assert quorum.colluding >= min(colluding, members - 1)


@given(used=st.none() | st.sampled_from(["sha256:a", "sha256:b"]), now=st.integers(0, 20), known=st.booleans())
def test_a_token_is_used_once_and_in_time(used: str | None, now: int, known: bool) -> None:
    invitation: dict[str, Any] | None = {"request": used, "expires": 10} if known else None
    if known and used == "sha256:a":
        assert check_token(invitation, "sha256:a", now) is False
    elif known and used is None and now < 10:
        assert check_token(invitation, "sha256:a", now) is True
    else:
        with pytest.raises(RefusedError, match="not valid"):
            check_token(invitation, "sha256:a", now)


def test_what_the_log_is_to_say_holds_by_its_own_rules(own: Coordinator) -> None:
    joined(own, "berlin")
    with pytest.raises(RefusedError, match="needs at least"):
        own.members.found(StatedFloor(), NOW)
    joined(own, "lyon")
    assert own.members.policy() is None
    own.members.found(StatedFloor(min_sites=2), NOW)
    with pytest.raises(RefusedError, match="founded already"):
        own.members.found(StatedFloor(), NOW)
    joined(own, "oslo")
    own.members.revoke("lyon", "key-compromise", NOW)
    joined(own, "lyon", 1)  # back, with new keys
    own.members.revoke("berlin", "left", NOW)
    own.members.revoke("oslo", "expelled", NOW)
    said = [statement for _, statement in own.members.statements()]
    assert [type(each) for each in said] == [Genesis, Join, Revoke, Join, Revoke, Revoke]
    quorums = [each.quorum for each in said if isinstance(each, Genesis | Join | Revoke)]
    assert quorums == [2, 3, 2, 3, 2, 1]
    history, frontier = Replay(), Frontier()
    for index, statement in enumerate(said):
        leaf = envelope.sign_envelope(statement, own.keys.coordinator, own.keys.pq)
        frontier, _ = frontier.append(leaf_hash(leaf))
        key = own.keys.coordinator.public_key().public_bytes_raw()
        history.admit(Leaf(index, f"sha256:{leaf_hash(leaf).hex()}", key), statement, lambda size: b"")
    assert list(history.members) == ["lyon"]
    policy = own.members.policy()
    assert policy is not None
    assert [witness.name for witness in policy.witnesses] == ["lyon"]
    own.members.revoke("lyon", "left", NOW)
    assert own.members.policy() is None
    assert len(own.members.statements()) == 6  # of the last member's end no log can say anything


def test_a_statement_is_handed_out_until_the_log_holds_it(own: Coordinator) -> None:
    for site in ("berlin", "lyon"):
        joined(own, site)
    own.members.found(StatedFloor(), NOW)
    joined(own, "oslo")
    (first, genesis), (second, _) = own.members.statements()
    assert isinstance(genesis, Genesis)
    own.members.mark_logged(first)
    assert [number for number, _ in own.members.statements()] == [second]


def test_a_failed_approval_changes_nothing(own: Coordinator) -> None:
    _, request = asked(own, "berlin")
    own.answer(request, NOW)

    def fails(keys: SiteKeys) -> Any:
        raise StateError("no certificate today")

    with pytest.raises(StateError):
        own.members.approve("berlin", request.keys.fingerprint, fails, NOW)
    assert [row.state for row in own.members.rows()] == ["pending"]
    assert own.members.members() == ()
    with pytest.raises(RefusedError, match="not asked"):
        own.approve("lyon", request.keys.fingerprint, NOW)


@pytest.mark.parametrize("part", ["identity", "witness", "node", "request"])
def test_no_key_serves_two_sites(own: Coordinator, part: str) -> None:
    keys = joined(own, "berlin")
    token, request = asked(own, "lyon")
    taken = getattr(keys, part)
    if part == "witness":
        taken = replace(NoteKey.parse(keys.witness), name="lyon").text
    copied = request.keys.model_copy(update={part: taken})
    fake = request.model_copy(update={"keys": copied})  # as the service would see it, were the proof no check
    with pytest.raises(RefusedError, match="used in this consortium before"):
        own.members.ask(fake, NOW)
    assert own.members.ask(request, NOW).state == "pending"
    assert token.secret


@pytest.mark.parametrize(
    "spelling", ["{kind} {head}!{tail}", "{kind} {head}{tail}*", "{kind}  {head}{tail}", "{kind} {head}{tail} x"]
)
def test_no_node_key_serves_two_sites_however_it_is_written(own: Coordinator, spelling: str) -> None:
    """Attack: base64 that is read leniently. The node of another then belongs to whoever wrote its key otherwise."""
    kind, text = joined(own, "berlin").node.split()
    _, request = asked(own, "lyon")
    taken = spelling.format(kind=kind, head=text[:40], tail=text[40:])
    with pytest.raises(ValidationError, match="as OpenSSH writes it"):
        SiteKeys.model_validate({**request.keys.model_dump(), "node": taken})


@pytest.mark.parametrize("point", ["01" + "00" * 31, "00" * 32, "ee" + "ff" * 30 + "7f"])
def test_a_key_under_which_anybody_signs_is_no_sites_key(own: Coordinator, point: str) -> None:
    """Attack: under a point of small order, one signature fits every request, consent and message."""
    _, request = asked(own, "lyon")
    witness = replace(NoteKey.parse(request.keys.witness), public=bytes.fromhex(point)).text
    for changed in ({"identity": point}, {"witness": witness}):
        with pytest.raises(ValidationError, match="small order"):
            SiteKeys.model_validate({**request.keys.model_dump(), **changed})


def test_a_new_invitation_withdraws_the_request_before(own: Coordinator) -> None:
    _, first = asked(own, "berlin")
    own.answer(first, NOW)
    _, second = asked(own, "berlin", 1)
    with pytest.raises(RefusedError, match="not valid"):
        own.answer(first, NOW)
    with pytest.raises(RefusedError, match="not asked"):
        own.approve("berlin", first.keys.fingerprint, NOW)
    own.answer(second, NOW)
    with pytest.raises(RefusedError, match="the words are not those"):
        own.approve("berlin", first.keys.fingerprint, NOW)
    own.approve("berlin", second.keys.fingerprint, NOW)


def test_waiting_longer_than_the_token_lives_loses_nothing(own: Coordinator) -> None:
    _, request = asked(own, "berlin")
    own.answer(request, NOW + timedelta(hours=23))
    own.approve("berlin", request.keys.fingerprint, NOW + timedelta(days=3))
    assert own.answer(request, NOW + timedelta(days=4)).state == "member"


def test_the_file_is_durable_private_and_created_once(own: Coordinator) -> None:
    path = own.members.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with pytest.raises(StateError, match="exists already"):
        Members.create(path, own.members.consortium)
    with pytest.raises(StateError, match=r"the members' file .* does not exist"):
        Members(path.with_name("other.db"), own.members.consortium).rows()


def test_a_failure_of_the_disk_names_no_data(own: Coordinator) -> None:
    own.members.path.write_bytes(b"x" * 8192)
    call: Callable[[], object] = own.members.rows
    with pytest.raises(StateError, match="cannot be read or written") as caught:
        call()
    assert caught.value.private
