"""What people compared is what a site trusts: a coordinator that lies about anything else gets nothing.

Attack: with every fingerprint right, the coordinator's reply to a site that joins named witnesses of the coordinator's
own, and two sites then accepted two logs under one key. Its kind: whatever a site takes from the coordinator.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.client.budget.accounts import RoundKey
from privet.client.budget.ledger import Ledger
from privet.client.budget.releases import Releases
from privet.client.network.enrolment import (
    Enrolment,
    accept_membership,
    confirm,
    migrate_site,
    prepare_request,
)
from privet.client.network.opening import open_member
from privet.client.rounds import history
from privet.client.rounds import logbook as logbook_module
from privet.client.rounds.logbook import Confirmed, create_witness, open_logbook
from privet.client.rounds.witness import Witness
from privet.client.site import load_site
from privet.client.trust import TRUSTED, read_trusted, write_trusted
from privet.common.audit.verify import Tree
from privet.common.canonical import digest
from privet.common.errors import PrivetError, ProtocolError, RefusedError, StudyError, VerificationError
from privet.common.log.agreement import keys_digest, round_opened, run_opened
from privet.common.log.checkpoint import Checkpoint, LeafProof, Policy, open_checkpoint
from privet.common.log.envelope import sign_envelope
from privet.common.log.merkle import Frontier, leaf_hash
from privet.common.log.note import COSIGNATURE, ED25519, Note, NoteKey, log_lines
from privet.common.log.replay import admit
from privet.common.log.statements import (
    Genesis,
    Join,
    LedgerHead,
    Member,
    Revoke,
    RoundAbort,
    SeenCheckpoint,
    SiteRound,
    StatedFloor,
    Statement,
)
from privet.common.log.statements import RoundOpened as OpenedStatement
from privet.common.masking.isolation import Isolation
from privet.common.pki.enrolment import JoinReply, Terms
from privet.common.study.messages import Evidence, RoundOpen
from privet.server.consortium.coordinator import Coordinator, log_members
from privet.server.log.journal import open_journal
from privet.server.log.roundlog import open_log
from tests.support.consortium_world import leaf_of_site, lines_of_site, make_coordinator
from tests.support.log_world import World
from tests.support.masked_world import masked_study

NAMES = ("berlin", "lyon", "oslo")


@dataclass
class Town:
    """A consortium of three sites, founded, on one disk; each site asked and was approved."""

    folder: Path
    coordinator: Coordinator
    replies: dict[str, JoinReply] = field(default_factory=dict)

    @property
    def words(self) -> dict[str, str]:
        """What each site's operator reads out."""
        return {name: Enrolment(self.folder / name).asked.keys.words for name in NAMES}

    def leaves(self) -> list[bytes]:
        """The leaves of the coordinator's log."""
        with open_log(self.coordinator.log_directory, "example.org/north", self.coordinator.keys.log) as log:
            return list(log.leaves())


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Town:
    folder = tmp_path_factory.mktemp("town")
    town, now = Town(folder, make_coordinator(folder / "coordinator", colluding=1)), datetime.now(UTC)
    made = town.coordinator
    asked = {name: prepare_request(folder / name, made.invite(name, now)) for name in NAMES}
    for name, request in asked.items():
        made.answer(request, now)
        made.approve(name, request.keys.words, now)
    made.members.found(StatedFloor(), now)
    with open_journal(made.log_directory, made.keys) as journal:
        log_members(made, journal)
    town.replies = {name: made.answer(request, now) for name, request in asked.items()}
    return town


@pytest.fixture
def town(founded: Town, tmp_path: Path) -> Town:
    """A copy for one test: sites that have asked and have not read the reply yet."""
    shutil.copytree(founded.folder, tmp_path / "town")
    return replace(founded, folder=tmp_path / "town")


def joined(town: Town, name: str, reply: JoinReply | None = None) -> Path:
    """Let a site take the coordinator's reply, and its operator confirm all by the words of the real keys."""
    directory = town.folder / name
    accept_membership(directory, reply or town.replies[name], datetime.now(UTC))
    confirm(directory, None, town.coordinator.charter.words)
    for other, words in town.words.items():
        confirm(directory, other, words)
    return directory


def logbook_of(directory: Path, leaves: Sequence[bytes]) -> tuple[Confirmed, Witness]:
    """Return a site's rule and witness; the coordinator gives it these leaves."""
    site = load_site(directory / "site.toml")
    create_witness(site)
    logbook = open_logbook(site, fetch=lambda first: list(leaves[first:]))
    assert logbook is not None
    assert isinstance(logbook.rule, Confirmed)
    return logbook.rule, logbook.witness


def checkpoint_of(town: Town, leaves: Sequence[bytes]) -> bytes:
    """Return a checkpoint over any leaves, signed by the log's true key: the coordinator holds it."""
    frontier = Frontier()
    for leaf in leaves:
        frontier, _ = frontier.append(leaf_hash(leaf))
    key = town.coordinator.keys
    text = Checkpoint(key.origin, len(leaves), frontier.root).text
    return Note(text, log_lines(text, key.origin, key.log, key.pq)).encode()


def shown(town: Town, directory: Path, leaves: Sequence[bytes]) -> Policy:
    """Show a site a log, and return whom it asks for cosignatures afterwards."""
    rule, witness = logbook_of(directory, leaves)
    note = checkpoint_of(town, leaves)
    assert witness.add(note, 0, (), 1)
    return rule.policy(open_checkpoint(note, witness.log)[0])


# --- what was compared ---------------------------------------------------------------------------------------


def test_all_members_derive_one_policy_from_what_they_compared(town: Town) -> None:
    policies = {shown(town, joined(town, name), town.leaves()).text for name in NAMES}
    assert policies == {town.replies["oslo"].terms.policy}  # type: ignore[union-attr]
    (policy,) = policies
    assert Policy.parse(policy).needed == 3  # of three, as one may collude
    assert (town.folder / "lyon/consortium/log.policy").read_text() == policy


def test_nothing_is_trusted_before_it_was_compared(town: Town) -> None:
    directory = town.folder / "lyon"
    accept_membership(directory, town.replies["lyon"], datetime.now(UTC))
    trusted = read_trusted(directory / TRUSTED)
    assert (trusted.charter, [keys.site for keys in trusted.members]) == (None, ["lyon"])
    with pytest.raises(VerificationError, match="has not confirmed the charter"):
        open_logbook(load_site(directory / "site.toml"))
    confirm(directory, None, town.coordinator.charter.words)
    with pytest.raises(VerificationError, match="has not confirmed: berlin, oslo"):
        shown(town, directory, town.leaves())


@pytest.mark.parametrize("place", range(12))
def test_one_wrong_word_confirms_nothing(town: Town, place: int) -> None:
    directory = town.folder / "lyon"
    accept_membership(directory, town.replies["lyon"], datetime.now(UTC))
    for name, words in ((None, town.coordinator.charter.words), ("oslo", town.words["oslo"])):
        heard = words.split()
        heard[place] = "acorn" if heard[place] != "acorn" else "zebra"
        with pytest.raises(VerificationError, match="the words are not those"):
            confirm(directory, name, " ".join(heard))
    assert read_trusted(directory / TRUSTED).charter is None


# --- every field of the join reply -----------------------------------------------------------------------------


def another_vkey(name: str, kind: int) -> str:
    return NoteKey(name, kind, Ed25519PrivateKey.generate().public_key().public_bytes_raw()).text


def policy_with_own_witnesses(terms: Terms) -> str:
    """Return the policy of attack 1: this site's key is in it, and the others' are the coordinator's."""
    policy = Policy.parse(terms.policy)
    witnesses = [
        witness if witness.name == "lyon" else NoteKey.parse(another_vkey(witness.name, COSIGNATURE))
        for witness in policy.witnesses
    ]
    return Policy(policy.log, tuple(witnesses), policy.needed).text


TERMS: dict[str, Callable[[Terms], Any]] = {
    "consortium": lambda terms: "south",
    "address": lambda terms: "127.0.0.1:9",
    "enrolment": lambda terms: "127.0.0.1:9",
    "fleet": lambda terms: "127.0.0.1:9",
    "coordinator": lambda terms: "ab" * 32,
    "log": lambda terms: another_vkey("example.org/north", ED25519),
    "colluding": lambda terms: 0,
    "policy": policy_with_own_witnesses,
    "members": lambda terms: terms.members[:1] + terms.members[1:2],
}
MEMBERS: dict[str, Callable[[], str]] = {
    "site": lambda: "paris",
    "identity": lambda: Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex(),
    "witness": lambda: another_vkey("oslo", COSIGNATURE),
}


def test_the_table_names_every_field_of_the_reply() -> None:
    assert set(JoinReply.model_fields) == {"state", "fingerprint", "certificate", "terms"}
    assert set(TERMS) == set(Terms.model_fields)


@pytest.mark.parametrize("name", TERMS)
def test_no_field_of_the_terms_moves_what_a_site_trusts(town: Town, name: str) -> None:
    """Whatever the field, the site ends up with the true policy, or with none."""
    reply = town.replies["lyon"]
    assert reply.terms is not None
    terms = reply.terms.model_copy(update={name: TERMS[name](reply.terms)})
    lie = reply.model_copy(update={"terms": terms})
    if name in ("consortium", "coordinator", "log", "colluding"):
        with pytest.raises(VerificationError, match="not those of the charter"):
            joined(town, "lyon", lie)
        assert read_trusted(town.folder / "lyon" / TRUSTED).charter is None
    elif name == "members":
        with pytest.raises(ProtocolError, match="names no member 'oslo'"):
            joined(town, "lyon", lie)
        with pytest.raises(VerificationError, match="has not confirmed: oslo"):
            shown(town, town.folder / "lyon", town.leaves())
    else:
        # Addresses lead to a server that the root has not certified; the policy is not read at all.
        assert shown(town, joined(town, "lyon", lie), town.leaves()).text == reply.terms.policy


@pytest.mark.parametrize("name", MEMBERS)
def test_no_key_of_a_member_is_taken_in_anothers_place(town: Town, name: str) -> None:
    reply = town.replies["lyon"]
    assert reply.terms is not None
    berlin, lyon, oslo = reply.terms.members
    lie = oslo.model_copy(update={name: MEMBERS[name]()})
    terms = reply.terms.model_copy(update={"members": (berlin, lyon, lie)})
    with pytest.raises((VerificationError, ProtocolError), match=r"for site oslo|with the site's name"):
        joined(town, "lyon", reply.model_copy(update={"terms": terms}))
    assert "oslo" not in read_trusted(town.folder / "lyon" / TRUSTED).keys


def test_own_keys_that_were_changed_are_noticed(town: Town) -> None:
    reply = town.replies["lyon"]
    assert reply.terms is not None
    berlin, lyon, oslo = reply.terms.members
    forged = lyon.model_copy(update={"identity": MEMBERS["identity"]()})
    for lie in (
        reply.model_copy(update={"fingerprint": forged.fingerprint}),
        reply.model_copy(update={"terms": reply.terms.model_copy(update={"members": (berlin, forged, oslo)})}),
        reply.model_copy(update={"certificate": town.replies["oslo"].certificate}),
    ):
        with pytest.raises(PrivetError):
            accept_membership(town.folder / "lyon", lie, datetime.now(UTC))
    assert not (town.folder / "lyon" / TRUSTED).exists()


# --- the log ---------------------------------------------------------------------------------------------------


def genesis_with(town: Town, **changed: Any) -> Genesis:
    made = town.coordinator
    members = tuple(Enrolment(town.folder / name).asked.keys.member for name in NAMES)
    values: dict[str, Any] = {
        "time": 1,
        "consortium": "north",
        "log": made.keys.public.text,
        "coordinator": made.charter.coordinator,
        "members": members,
        "quorum": 3,
        "floor": StatedFloor(),
    }
    return Genesis(**(values | changed))


def said(town: Town, *statements: Statement) -> list[bytes]:
    """Return leaves that the coordinator signs."""
    return [
        sign_envelope(statement, town.coordinator.keys.coordinator, town.coordinator.keys.pq)
        for statement in statements
    ]


def own_witness(member: Member) -> Member:
    return member.model_copy(update={"witness": another_vkey(member.site, COSIGNATURE)})


def own_identity(member: Member) -> Member:
    return member.model_copy(update={"key": MEMBERS["identity"]()})


@pytest.mark.parametrize("change", [own_witness, own_identity])
@pytest.mark.parametrize("place", range(3))
def test_a_log_that_names_other_keys_than_the_confirmed_ones_is_refused(
    town: Town, place: int, change: Callable[[Member], Member]
) -> None:
    """Attack 1 in the log itself: two sites cannot be given two logs under one key."""
    directory, members = joined(town, "lyon"), list(genesis_with(town).members)
    members[place] = change(members[place])
    with pytest.raises(VerificationError, match=r"not confirmed|other keys for this site"):
        shown(town, directory, said(town, genesis_with(town, members=tuple(members))))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"consortium": "south"}, "another name of the consortium"),
        ({"coordinator": "ab" * 32}, "breaks the rules"),
        ({"log": another_vkey("example.org/north", ED25519)}, "expected signatures with Ed25519 alone, found two"),
        ({"log": "of Ed25519"}, "another key of the log"),
    ],
)
def test_a_genesis_that_is_not_the_charters_is_refused(town: Town, changed: Mapping[str, Any], why: str) -> None:
    if changed.get("log") == "of Ed25519":  # half of the key is the log's own, so the genesis is signed as it must be
        other = NoteKey.parse(another_vkey("example.org/north", ED25519)).public
        changed = {"log": replace(town.coordinator.keys.public, public=other).text}
    with pytest.raises(VerificationError, match=why):
        shown(town, joined(town, "lyon"), said(town, genesis_with(town, **changed)))


def test_a_low_quorum_in_the_genesis_is_raised_to_the_charters(town: Town) -> None:
    # Two of three would do against an honest coordinator alone; the members compared that one may collude.
    assert shown(town, joined(town, "lyon"), said(town, genesis_with(town, quorum=2))).needed == 3


def test_a_member_that_joins_later_has_to_be_confirmed_and_one_that_left_does_not_count(town: Town) -> None:
    directory = joined(town, "lyon")
    paris = Member(site="paris", key=MEMBERS["identity"](), witness=another_vkey("paris", COSIGNATURE))
    join = said(town, genesis_with(town), Join(time=2, member=paris, quorum=3))
    with pytest.raises(VerificationError, match="not confirmed: paris"):
        shown(town, directory, join)
    shutil.rmtree(directory / "state/log")
    left = Revoke(time=2, site="oslo", key=genesis_with(town).members[2].key, reason="left", quorum=2)
    leaves = said(town, genesis_with(town), left)
    with pytest.raises(VerificationError, match="3 of 3 members must cosign the round log, but in the log oslo left"):
        shown(town, directory, leaves)
    write_trusted(directory / TRUSTED, read_trusted(directory / TRUSTED).without("oslo"))
    shutil.rmtree(directory / "state/log")
    policy = shown(town, directory, leaves)
    assert [witness.name for witness in policy.witnesses] == ["berlin", "lyon"]


def test_the_coordinator_cannot_fork_the_log_by_revoking_one_part_of_the_members_towards_the_other(town: Town) -> None:
    """Attack: to each of two sites, the log says that the other one left; a third one, in league, cosigns both."""
    members = genesis_with(town).members
    for honest, other in (("berlin", "oslo"), ("oslo", "berlin")):
        key = next(member.key for member in members if member.site == other)
        left = Revoke(time=2, site=other, key=key, reason="left", quorum=2)
        with pytest.raises(VerificationError, match=f"in the log {other} left"):
            shown(town, joined(town, honest), said(town, genesis_with(town), left))


def test_leaves_that_are_not_the_checkpoints_are_not_even_parsed(town: Town) -> None:
    directory, leaves = joined(town, "lyon"), town.leaves()
    rule, witness = logbook_of(directory, said(town, genesis_with(town, time=9)))
    note = checkpoint_of(town, leaves)
    witness.add(note, 0, (), 1)
    with pytest.raises(VerificationError, match="not those of the checkpoint"):
        rule.policy(open_checkpoint(note, witness.log)[0])
    missing = logbook_of_again(directory, [])
    with pytest.raises(VerificationError, match="gives 0 of them"):
        missing.policy(open_checkpoint(note, witness.log)[0])


def logbook_of_again(directory: Path, leaves: Sequence[bytes]) -> Confirmed:
    logbook = open_logbook(load_site(directory / "site.toml"), fetch=lambda first: list(leaves[first:]))
    assert logbook is not None
    assert isinstance(logbook.rule, Confirmed)
    return logbook.rule


def test_the_copy_survives_a_restart_and_what_was_changed_in_it_is_fetched_anew(town: Town) -> None:
    directory, leaves = joined(town, "lyon"), town.leaves()
    first = shown(town, directory, leaves)
    site = load_site(directory / "site.toml")
    assert site.log is not None
    kept, note = site.log.state / "log.leaves", checkpoint_of(town, leaves)
    head = open_checkpoint(note, NoteKey.parse(town.coordinator.charter.log))[0]
    whole = kept.read_bytes()
    assert logbook_of_again(directory, []).policy(head) == first  # nothing is fetched again
    for damaged in (b"", whole[:-1], whole[:3], whole.replace(b"ed25519", b"ed25518"), b"\xff" * 9, whole[4:]):
        kept.write_bytes(damaged)
        assert logbook_of_again(directory, leaves).policy(head) == first
        assert kept.read_bytes() == whole


def test_a_statement_that_breaks_the_rules_stops_the_site_for_good(town: Town) -> None:
    directory = joined(town, "lyon")
    twice = said(town, genesis_with(town), genesis_with(town, time=2))
    with pytest.raises(VerificationError, match="leaf 1 of the round log breaks the rules"):
        shown(town, directory, twice)


def test_a_checkpoint_of_another_branch_is_none_of_the_copy(town: Town) -> None:
    directory, leaves = joined(town, "lyon"), town.leaves()
    rule, witness = logbook_of(directory, leaves)
    note = checkpoint_of(town, leaves)
    witness.add(note, 0, (), 1)
    head = open_checkpoint(note, witness.log)[0]
    assert rule.policy(head)
    for forged in (replace(head, root=bytes(32)), replace(head, size=head.size + 1)):
        with pytest.raises(VerificationError, match="not one of the log"):
            rule.policy(forged)


# --- the ledger --------------------------------------------------------------------------------------------------


def log_of_a_round(town: Town, ledger: LedgerHead) -> list[bytes]:
    """Return a log with one round, in which lyon states the head of its ledger."""
    world = World(sites=NAMES, private=False)
    keys = {name: Enrolment(town.folder / name).asked.keys.identity for name in NAMES}
    started = world.run_open("run")
    opened = world.round_open("run", 1, parameters=keys_digest(keys))
    leaves = said(town, genesis_with(town), started, opened)
    frontier = Frontier()
    for leaf in leaves:
        frontier, _ = frontier.append(leaf_hash(leaf))
    seen = SeenCheckpoint(size=3, root=frontier.root.hex())
    hashed = f"sha256:{leaf_hash(leaves[2]).hex()}"
    stated = world.site_round("lyon", "run", 1, hashed, ledger=ledger, checkpoint=seen)
    return [*leaves, leaf_of_site(town.folder / "lyon", stated)]


def test_a_ledger_and_an_anchor_put_back_together_contradict_the_sites_own_copy_of_the_log(town: Town) -> None:
    """Attack: an operator, or a thief, replaces both by an older pair, and nobody quotes the newest head."""
    directory = joined(town, "lyon")
    file = directory / "site.toml"
    file.write_text(file.read_text().replace('# anchor = "/mnt/other-disk/', 'anchor = "elsewhere/'))
    site = load_site(file)
    assert site.ledger is not None
    assert site.anchor is not None
    for folder in (site.ledger.parent, site.anchor.parent):
        folder.mkdir(exist_ok=True)
    ledger = Ledger.create(site.ledger, site.anchor, site.ledger_key)
    ledger.close()
    old = {path: path.read_bytes() for path in (site.ledger, site.anchor)}
    release = RoundKey("notes", digest(b"study"), 1)
    ledger = Ledger.open(site.ledger, site.anchor, site.ledger_key)
    ledger.reserve(release, None, digest(b"inputs"), None, 1)
    ledger.charge(release, b"an update")
    sequence, head = ledger.head
    ledger.close()

    leaves = log_of_a_round(town, LedgerHead(sequence=sequence, head=head, previous=None))
    rule, witness = logbook_of(directory, leaves)
    note = checkpoint_of(town, leaves)
    witness.add(note, 0, (), 1)
    assert rule.copy is not None
    stated = rule.copy.history(open_checkpoint(note, witness.log)[0]).ledger_of("lyon")
    assert stated == (sequence, head)
    assert Releases(site).head(*stated).sequence == sequence
    for path, data in old.items():
        path.write_bytes(data)
    assert Releases(site).head(0, "").sequence == 1  # what a coordinator that quotes nothing gets
    with pytest.raises(VerificationError, match="row 3 is on record elsewhere"):
        Releases(site).head(*stated)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_an_unforeseen_error_leaves_no_part_of_a_history(
    town: Town, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Attack: the error strikes at the leaf by which a stranger joins; later calls went on without that leaf."""
    directory = joined(town, "lyon")
    paris = Member(site="paris", key=MEMBERS["identity"](), witness=None)
    leaves = said(town, genesis_with(town), Join(time=2, member=paris, quorum=3))
    rule, witness = logbook_of(directory, leaves)
    note = checkpoint_of(town, leaves)
    witness.add(note, 0, (), 1)
    head = open_checkpoint(note, witness.log)[0]
    true = admit

    def failing(replay: Any, index: int, leaf: bytes, root_at: Any) -> Any:
        if index == 1:
            raise error
        return true(replay, index, leaf, root_at)

    with monkeypatch.context() as patched:
        patched.setattr("privet.client.rounds.history.admit", failing)
        with pytest.raises(error):
            rule.policy(head)
    with pytest.raises(VerificationError, match="not confirmed: paris"):
        rule.policy(head)


def test_a_log_without_end_does_not_fill_a_sites_memory(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: a checkpoint needs no leaves, so it may claim any number, and the coordinator gives leaves for ever."""
    directory, key = joined(town, "lyon"), town.coordinator.keys
    asked: list[int] = []

    def endless(first: int) -> list[bytes]:
        asked.append(first)
        return [bytes(60_000)] * 8

    for size, why in ((2**50, "more than the"), (2**20, "more than 4194304 bytes")):
        monkeypatch.setattr(history, "MOST_BYTES", 1 << 22)
        site = load_site(directory / "site.toml")
        create_witness(site)
        logbook = open_logbook(site, fetch=endless)
        assert logbook is not None
        text = Checkpoint(key.origin, size, bytes(32)).text
        logbook.witness.add(Note(text, log_lines(text, key.origin, key.log, key.pq)).encode(), 0, (), 1)
        with pytest.raises(PrivetError, match=why):
            logbook.rule.policy(logbook.witness.last)
        shutil.rmtree(directory / "state/log")
    assert len(asked) < 20


def test_two_commands_at_a_time_undo_nothing_of_each_other(town: Town) -> None:
    directory = joined(town, "lyon")
    file = directory / TRUSTED
    for _ in range(10):
        write_trusted(file, read_trusted(file).without("berlin").without("oslo"))
        both = [Thread(target=confirm, args=(directory, name, town.words[name])) for name in ("berlin", "oslo")]
        for each in both:
            each.start()
        for each in both:
            each.join()
        assert sorted(read_trusted(file).keys) == list(NAMES)


@pytest.fixture
def opened_round(town: Town) -> Callable[..., None]:
    """Return a check of round 1 or 2 at lyon, by the log with these statements after its run-open and round-open."""
    study, adapter = masked_study(), f"sha256:{'1' * 64}"
    keys = {name: Enrolment(town.folder / name).asked.keys.identity for name in NAMES}
    directory = joined(town, "lyon")

    def leaf_of(statement: Statement) -> bytes:
        return said(town, statement)[0]

    def check(*after: Callable[[str, Sequence[bytes]], bytes], number: int = 1) -> None:
        message = RoundOpen(study.document(), number, f"{number:032x}", adapter, NAMES, b"")
        first = replace(message, round=1, nonce=f"{1:032x}")
        leaves = [
            *town.leaves(),
            leaf_of(run_opened("flu", study, adapter, 1)),
            leaf_of(round_opened("flu", first, keys, 1)),
        ]
        begun = f"sha256:{leaf_hash(leaves[-1]).hex()}"
        for make in after:
            leaves.append(make(begun, leaves))
        if number == 2:
            leaves.append(leaf_of(round_opened("flu", message, keys, 1)))
        asked = leaves[-1] if number == 2 else leaves[2]
        note, names = checkpoint_of(town, leaves), NAMES
        text = open_checkpoint(note, NoteKey.parse(town.coordinator.charter.log))[1].text
        lines = [line for name in names for line in lines_of_site(town.folder / name, name, text)]
        whole = note + b"".join(f"{line.line}\n".encode() for line in lines)
        tree = Tree()
        for each in leaves:
            tree.append(leaf_hash(each))
        proofs = {
            each: LeafProof(leaves.index(each), tree.prove(leaves.index(each)), whole).encode() for each in leaves
        }
        site = load_site(directory / "site.toml")
        create_witness(site)
        logbook = open_logbook(site, fetch=lambda start: list(leaves[start:]))
        assert logbook is not None
        logbook.witness.add(note, 0, (), 1)
        evidence = Evidence(leaves[1], proofs[leaves[1]], asked, proofs[asked], 0, "")
        pins = {name: bytes.fromhex(key) for name, key in keys.items()}
        logbook.check(study, replace(message, evidence=evidence), pins)

    return check


def aborted(town: Town) -> Callable[[str, Sequence[bytes]], bytes]:
    def make(begun: str, leaves: Sequence[bytes]) -> bytes:
        adapter = f"sha256:{'1' * 64}"
        end = RoundAbort(
            time=1, run="flu", round=1, opened=begun, adapter=adapter, failures={}, reason="it rained", epsilon=None
        )
        return said(town, end)[0]

    return make


def stated(town: Town) -> Callable[[str, Sequence[bytes]], bytes]:
    """Lyon's own statement, with a ledger of nine entries."""

    def make(begun: str, leaves: Sequence[bytes]) -> bytes:
        tree = Tree()
        for each in leaves:
            tree.append(leaf_hash(each))
        some = f"sha256:{'2' * 64}"
        statement = SiteRound(
            time=1,
            site="lyon",
            run="flu",
            round=1,
            opened=begun,
            policy=some,
            ledger=LedgerHead(sequence=9, head=some, previous=None),
            charge=None,
            upload=some,
            checkpoint=SeenCheckpoint(size=len(leaves), root=tree.frontier.root.hex()),
        )
        return leaf_of_site(town.folder / "lyon", statement)

    return make


def test_a_site_with_both_keys_takes_part_in_no_round_of_a_log_on_ed25519_alone(
    town: Town, opened_round: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a consortium of earlier, whose coordinator has not rotated its keys."""
    file, judge = town.folder / "lyon/site.toml", logbook_module.refusal_of
    monkeypatch.setattr(logbook_module, "refusal_of", lambda keys: judge([replace(keys[0], pq=b""), *keys[1:]]))
    with pytest.raises(RefusedError, match=r"Ed25519 alone by example[.]org/north:") as refused:
        opened_round()
    assert refused.value.code == "E_CLASSICAL_SIGNATURES"
    shutil.rmtree(file.parent / "state/log")
    file.write_text(file.read_text() + "\n[floor]\nclassical_signatures = true\n")
    opened_round()


def test_a_round_that_is_open_is_taken_part_in(opened_round: Callable[..., None]) -> None:
    opened_round()


def test_no_site_trains_for_a_round_that_the_log_has_ended(town: Town, opened_round: Callable[..., None]) -> None:
    """Attack: the log says that the round was aborted at once, and the coordinator runs it all the same."""
    with pytest.raises(VerificationError, match="has ended"):
        opened_round(aborted(town))


def test_the_coordinator_cannot_make_a_site_forget_what_its_ledger_was(
    town: Town, opened_round: Callable[..., None]
) -> None:
    """Attack: with a thief who restored ledger and anchor, it says that the log has no statement of the site."""
    with pytest.raises(VerificationError, match="0 entries"):
        opened_round(stated(town), aborted(town), number=2)


# --- old sites ---------------------------------------------------------------------------------------------------


OLD = """\
name = "lyon"
train = ["data/train.csv"]
identity = "keys/identity.pem"

[coordinator]
address = "127.0.0.1:9"
root = "consortium/root.pem"
key = "keys/node"

[log]
policy = "consortium/log.policy"   # from the coordinator
coordinator = "{coordinator}"
state = "state/log"
key = "keys/witness.pem"

[peers]                             # compare each key
lyon = "{lyon}"
oslo = "{oslo}"

[limit]
unit = "record"
epsilon = 1.0
delta = 1e-5
"""


def test_a_site_of_an_earlier_version_is_refused_until_it_is_migrated_by_one_command(town: Town) -> None:
    directory = joined(town, "lyon")
    (directory / TRUSTED).unlink()
    file = directory / "site.toml"
    keys = {name: Enrolment(town.folder / name).asked.keys.identity for name in NAMES}
    file.write_text(OLD.format(coordinator="ab" * 32, lyon=keys["lyon"], oslo=keys["oslo"]))
    with pytest.raises(StudyError, match="privet site migrate"):
        open_member(file)
    file.chmod(0o600)
    file.with_name("site.toml.before-trust").write_bytes(file.read_bytes())  # of a migration that was interrupted
    kept = migrate_site(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert kept.read_text() == OLD.format(coordinator="ab" * 32, lyon=keys["lyon"], oslo=keys["oslo"])
    site = load_site(file)
    assert (site.peers, site.limit is not None, site.identity_key() is not None) == ({}, True, True)
    # Nobody was compared yet: what the old file trusted does not count.
    assert [keys.site for keys in read_trusted(directory / TRUSTED).members] == ["lyon"]
    with pytest.raises(ProtocolError, match="already"):
        migrate_site(file)
    confirm(directory, None, town.coordinator.charter.words)
    for other, words in town.words.items():
        confirm(directory, other, words)
    assert shown(town, directory, town.leaves()).needed == 3
    assert open_member(file).name == "lyon"


def test_a_file_that_people_wrote_otherwise_is_left_as_it_was(town: Town) -> None:
    file = joined(town, "lyon") / "site.toml"
    text = OLD.format(coordinator="ab" * 32, lyon="cd" * 32, oslo="ef" * 32)
    inline = 'peers = { lyon = "' + "cd" * 32 + '" }\n'
    text = inline + text[: text.index("[peers]")] + text[text.index("[limit]") :]
    file.write_text(text)
    with pytest.raises(StudyError, match="cannot be changed by this command"):
        migrate_site(file)
    assert file.read_text() == text


# --- the draw ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("participants", "cohort", "why"),
    [
        (("berlin", "lyon", "oslo", "wien"), ("berlin", "lyon", "oslo", "wien"), None),
        (("berlin", "lyon", "oslo", "wien"), ("berlin", "lyon", "oslo"), "not the one that the study's public seed"),
        (("berlin", "lyon", "oslo", "wien"), ("berlin", "lyon", "wien"), "not the one that the study's public seed"),
        (("berlin", "lyon", "oslo"), ("berlin", "lyon", "oslo"), None),
    ],
)
def test_the_coordinator_does_not_choose_who_is_summed(
    town: Town, participants: tuple[str, ...], cohort: tuple[str, ...], why: str | None
) -> None:
    """Two sums over sets that differ by one site give that site's update away, where there is no noise."""

    class Replayed:
        def isolation(self, run: str, checkpoint: Checkpoint) -> Isolation:
            return Isolation()

    book = open_logbook(load_site(joined(town, "lyon") / "site.toml"))
    assert book is not None
    book = replace(book, rule=Replayed())  # type: ignore[arg-type]
    stated = OpenedStatement(
        time=1,
        run="run",
        round=1,
        nonce="0" * 32,
        adapter="sha256:" + "0" * 64,
        cohort=cohort,
        parameters=None,
        participants=participants if set(participants) > set(cohort) else None,
    )
    opened = RoundOpen({}, 1, "0" * 32, stated.adapter, cohort, b"")
    head = Checkpoint("example.org/north", 1, bytes(32))
    if why is None:
        book._check_draw(masked_study(), opened, stated, head)
    else:
        with pytest.raises(VerificationError, match=why):
            book._check_draw(masked_study(), opened, stated, head)
