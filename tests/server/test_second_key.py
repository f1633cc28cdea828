"""A member with Ed25519 keys alone gains an ML-DSA-65 key: what its thief, the coordinator and peers can do with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from privet.client.commands.enrolment import renew
from privet.client.network.enrolment import (
    Enrolment,
    accept_membership,
    confirm,
    keep_request,
    keep_terms,
    prepare_request,
)
from privet.client.network.proposals import LogReader
from privet.client.rounds.history import policy_of
from privet.client.rounds.logbook import create_witness
from privet.client.second_key import gain_second_key
from privet.client.site import load_site
from privet.client.trust import read_trusted
from privet.common.audit.receipts import check_receipts, receipts_file
from privet.common.audit.verify import verify_bundle
from privet.common.errors import PrivetError, ProtocolError, RefusedError, VerificationError
from privet.common.log import mldsa
from privet.common.log.checkpoint import Policy
from privet.common.log.envelope import sign_envelope
from privet.common.log.mldsa import Use
from privet.common.log.note import Note, NoteKey, log_lines, parse_note, verify_note, witness_lines
from privet.common.log.proofs import prove
from privet.common.log.renewal import renewal_text
from privet.common.log.replay import Leaf, Replay, admit
from privet.common.log.statements import Member, Renew
from privet.common.pki.enrolment import JoinRequest, KeysRequest, SiteKeys
from privet.common.pki.keyfile import MLDSA_KEY, read_key
from privet.server.log.journal import open_journal
from tests.support.consortium_world import World, lines_of_site, run, running
from tests.support.log_world import World as LogWorld
from tests.support.log_world import member, private, public, second, witness_key

# --- the statement -------------------------------------------------------------------------------------------

CLASSICAL, HYBRID = member("oslo"), member("oslo", hybrid=True)


def proof_of(renewed: Member, present: Member = CLASSICAL, name: str = "north", who: str = "oslo") -> str:
    return prove(renewal_text(name, present, renewed), private(who), second("oslo"), Use.RENEWAL)


def renewed(**changes: Any) -> Renew:
    return Renew.model_validate({"time": 1, "member": HYBRID, "proof": proof_of(HYBRID)} | changes)


def log_of(*statements: Renew, hybrid: bool = False) -> tuple[LogWorld, Replay]:
    world, history = LogWorld(), Replay()
    members = [member(site, hybrid=hybrid) for site in world.sites]
    world.say(world.genesis(members=tuple(members)))
    for statement in statements:
        world.say(statement)
    for index, leaf in enumerate(world.leaves):
        admit(history, index, leaf, world.roots.__getitem__)
    return world, history


def test_from_the_renewal_on_a_member_signs_twice() -> None:
    world, history = log_of(renewed())
    assert history.members["oslo"] == HYBRID
    assert history.pq_of(public("oslo")) == mldsa.public_of(second("oslo"))
    world.say(world.run_open("flu"))
    admit(history, 2, world.leaves[2], world.roots.__getitem__)
    world.say(world.refusal("oslo", "flu"), "oslo")
    with pytest.raises(VerificationError, match="with Ed25519 and with ML-DSA-65, found one"):
        admit(history, 3, world.leaves[3], world.roots.__getitem__)
    with pytest.raises(VerificationError, match="expected its present keys with an ML-DSA-65 key besides"):
        history.admit(Leaf(4, "sha256:" + "0" * 64, public("coordinator")), renewed(), world.roots.__getitem__)


def keys_with(**changes: Any) -> Member:
    return HYBRID.model_copy(update=changes)


STRANGER = keys_with(witness=replace(witness_key("oslo", hybrid=True), public=public("stranger")).text)
RENAMED = keys_with(witness=replace(witness_key("oslo", hybrid=True), name="lyon.example").text)


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        (renewed(proof=proof_of(HYBRID)[:128]), "have not both signed"),
        (renewed(proof=proof_of(HYBRID)[:128] + "0" * 6618), "have not both signed"),
        (renewed(proof=proof_of(HYBRID, who="lyon")), "have not both signed"),
        (renewed(proof=proof_of(HYBRID, name="south")), "have not both signed"),
        (renewed(proof=proof_of(HYBRID, present=HYBRID)), "have not both signed"),
        (renewed(member=CLASSICAL, proof=proof_of(CLASSICAL)), "with an ML-DSA-65 key besides"),
        (renewed(member=keys_with(witness=None)), "with an ML-DSA-65 key besides"),
        (renewed(member=keys_with(key=public("stranger").hex())), "with an ML-DSA-65 key besides"),
        (
            renewed(member=STRANGER, proof=proof_of(STRANGER)),
            "must stay the same",
        ),
        (renewed(member=RENAMED, proof=proof_of(RENAMED)), "must stay the same"),
        (renewed(member=keys_with(site="paris")), "the log has no member paris"),
    ],
)
def test_nothing_but_a_second_key_is_gained_and_both_keys_sign_it(statement: Renew, why: str) -> None:
    """Attacks: half a proof, another site's, one of another consortium or state; keys replaced under its cover."""
    with pytest.raises(VerificationError, match=why):
        log_of(statement)


def test_a_second_key_is_never_replaced_by_a_renewal_nor_used_twice() -> None:
    """Attack: whoever has stolen a site's first pair gets rid of its second key; or one key serves two members."""
    with pytest.raises(VerificationError, match="with an ML-DSA-65 key besides"):
        log_of(renewed(proof=proof_of(HYBRID, present=HYBRID)), hybrid=True)
    shared = replace(witness_key("lyon"), pq=mldsa.public_of(second("oslo"))).text
    lyon = member("lyon").model_copy(update={"witness": shared})
    text = renewal_text("north", member("lyon"), lyon)
    also = Renew(time=1, member=lyon, proof=prove(text, private("lyon"), second("oslo"), Use.RENEWAL))
    with pytest.raises(VerificationError, match="was used before in this round log"):
        log_of(renewed(), also)


def test_an_auditor_counts_both_signatures_and_names_what_is_older() -> None:
    world, history = log_of(renewed())
    text = world.head.text
    lines = log_lines(text, world.policy.log.name, private("log"))
    for site in ("lyon", "oslo"):
        key, pq = private(f"witness {site}"), second(site) if site == "oslo" else None
        lines += witness_lines(text, witness_key(site).name, key, 1, pq)
    policy = Policy(world.policy.log, (witness_key("berlin"), witness_key("lyon"), witness_key("oslo", hybrid=True)), 2)
    found = verify_bundle(lambda: world.leaves, Note(text, lines).encode(), policy)
    assert found.ok, found
    assert "statements of oslo before leaf 1, but for the checkpoints after it" in found.classical
    # Under the policy of before, half of oslo's cosignature is still none: the log says so.
    half = Note(text, lines[:-1]).encode()
    assert "cosignatures of 2 members" in verify_bundle(lambda: world.leaves, half, world.policy).reason
    assert history.renewed == {public("oslo"): 1}


def test_receipts_of_before_still_count() -> None:
    world, history = log_of(renewed())
    refusal = world.refusal("oslo", "flu")
    key, pq = private("oslo"), second("oslo")
    for signed in (sign_envelope(refusal, key), sign_envelope(refusal, key, pq)):
        assert check_receipts(receipts_file("oslo", [signed]), history).later
    with pytest.raises(VerificationError, match="does not match"):
        check_receipts(receipts_file("oslo", [sign_envelope(refusal, key, second("lyon"))]), history)
    _, always = log_of(hybrid=True)
    with pytest.raises(VerificationError, match="found one"):
        check_receipts(receipts_file("oslo", [sign_envelope(refusal, key)]), always)


# --- a consortium ---------------------------------------------------------------------------------------------


def enrol_classical(world: World, site: str) -> None:
    """Enrol a site as an earlier version did: its request, its files and its keys know no ML-DSA-65."""
    token, directory = world.invite(site), world.folder / site
    asked = prepare_request(directory, token)
    (directory / "keys" / MLDSA_KEY).unlink()
    old = asked.keys.model_copy(update={"witness": replace(NoteKey.parse(asked.keys.witness), pq=b"").text})
    request = JoinRequest.make(token.secret, old, read_key(directory / "keys/identity.pem", "identity"))
    keep_request(directory, request)
    world.coordinator.answer(request, world.clock())
    world.coordinator.approve(site, old.words, world.clock())
    accept_membership(directory, world.coordinator.answer(request, world.clock()), world.clock())
    file = directory / "site.toml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("mldsa")))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with running(tmp_path) as world:
        enrol_classical(world, "oslo")
        world.found("berlin", "lyon")
        world.compare("berlin", "lyon", "oslo")
        yield world


def keys_at(world: World, site: str) -> SiteKeys:
    return Enrolment(world.folder / site).asked.keys


def policy_at(world: World, site: str) -> Policy:
    """Return the policy that a site derives from the newest log, and have it cosign nothing."""
    config = load_site(world.folder / site / "site.toml")
    assert config.log is not None
    if not (config.log.state / "witness").exists():
        create_witness(config)
    log = LogReader(config).read(world.service(site))
    assert log is not None
    return policy_of(log.history, read_trusted(world.folder / site / "consortium/trusted.json"), site, log.newest.size)


def test_a_site_gains_a_second_key_and_stays_a_member(world: World) -> None:
    file, own, before = world.folder / "oslo/site.toml", world.coordinator, keys_at(world, "oslo")
    assert load_site(file).mldsa is None
    said = run(renew, file, "--keys").output
    assert "The round log does not state the new key yet." in said
    assert "privet coordinator approve oslo --words WORDS" in said
    assert (keys_at(world, "oslo"), load_site(file).mldsa) == (before, None)
    assert run(renew, file, "--keys").output == said  # the same keys: nothing is asked anew
    assert [row.state for row in own.members.rows() if row.keys.site == "oslo"].count("pending") == 1
    (waiting,) = [row for row in own.members.rows() if row.state == "pending"]
    assert waiting.reason == ""

    with pytest.raises(RefusedError, match="the words are not those"):
        own.approve("oslo", before.words, world.clock())
    own.approve("oslo", waiting.keys.words, world.clock())
    assert "does not state the new key yet" in run(renew, file, "--keys").output  # it is in no leaf
    assert policy_at(world, "lyon").witnesses[2].pq == b""
    world.log_members()
    world.log_members()  # nothing is stated twice
    with pytest.raises(VerificationError, match="names other keys for this site") as caught:
        policy_at(world, "oslo")
    assert "privet site renew SITE --keys" in caught.value.hint
    with pytest.raises(VerificationError, match="oslo") as caught:
        policy_at(world, "lyon")
    assert "have an ML-DSA-65 key now" in caught.value.message

    said = run(renew, file, "--keys").output
    assert "in use" in said
    assert "Ed25519 alone" not in said
    after = keys_at(world, "oslo")
    assert (after, load_site(file).mldsa) == (waiting.keys, world.folder / "oslo/keys" / MLDSA_KEY)
    assert replace(NoteKey.parse(after.witness), pq=b"").text == before.witness
    assert read_trusted(file.parent / "consortium/trusted.json").keys["oslo"] == after
    world.service("oslo").status()  # its certificate is what it was
    world.service("oslo").renew()
    keep_terms(world.folder / "lyon", world.service("lyon").roster())
    with pytest.raises(VerificationError, match="the words are not those"):
        confirm_at(world, "lyon", before.words)
    confirm_at(world, "lyon", after.words)
    for site in ("lyon", "oslo"):
        assert policy_at(world, site).witnesses[2] == NoteKey.parse(after.witness)
    held = {path: path.read_bytes() for path in file.parent.rglob("*") if path.is_file()}
    assert "There is nothing to do" in run(renew, file, "--keys").output
    assert held == {path: path.read_bytes() for path in held}

    with open_journal(own.log_directory, own.keys) as journal:
        note = parse_note(journal._log.checkpoint())
        assert [type(each).__name__ for each in journal.history.renewed] == ["bytes"]
        lines = lines_of_site(world.folder / "oslo", "oslo", note.text)
        assert verify_note(Note(note.text, lines), journal.policy.witnesses) == (NoteKey.parse(after.witness),)
    own.members.revoke("oslo", "left", world.clock())
    world.log_members()
    log = LogReader(load_site(world.folder / "lyon/site.toml")).read(world.service("lyon"))
    assert log is not None
    with pytest.raises(VerificationError, match="by the round log, site oslo was revoked"):
        policy_of(log.history, read_trusted(file.parent / "consortium/trusted.json"), "oslo", log.newest.size)


def confirm_at(world: World, site: str, words: str) -> None:
    confirm(world.folder / site, "oslo", words)


def test_an_interrupted_command_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file = world.folder / "oslo/site.toml"
    keys, _ = gain_second_key(file, world.service("oslo"))
    world.coordinator.approve("oslo", keys.words, world.clock())
    world.log_members()
    for place in ("keep_terms", "keep_request", "restore"):
        with monkeypatch.context() as patched:

            def dies(*_: object) -> None:
                raise KeyboardInterrupt

            patched.setattr(f"privet.client.second_key.{place}", dies)
            with pytest.raises(KeyboardInterrupt):
                gain_second_key(file, world.service("oslo"))
    assert gain_second_key(file, world.service("oslo")) == (keys, True)
    assert load_site(file).mldsa is not None


def test_a_thief_of_the_old_key_gains_nothing_that_people_do_not_say(world: World) -> None:
    """Attack: he has the identity key and the certificate, and names a second key of his own in the site's name."""
    keys, own = keys_at(world, "oslo"), world.coordinator
    his = mldsa.new_key()
    witness = replace(NoteKey.parse(keys.witness), pq=mldsa.public_of(his)).text
    identity = read_key(world.folder / "oslo/keys/identity.pem", "identity")
    forged = KeysRequest.make("north", keys, witness, identity, his)
    assert world.service("oslo").renew_keys(forged).state == "pending"
    true, used = gain_second_key(world.folder / "oslo/site.toml", world.service("oslo"))
    assert not used
    assert world.service("oslo").renew_keys(forged).state == "pending"  # he is the last to ask
    with pytest.raises(RefusedError, match="the words are not those"):
        own.approve("oslo", true.words, world.clock())
    # The coordinator approves him all the same: the site and its peers see it, and follow no key that nobody read out.
    own.approve("oslo", forged.keys("north", keys).words, world.clock())
    world.log_members()
    for site in ("oslo", "lyon"):
        with pytest.raises(VerificationError):
            policy_at(world, site)
    with pytest.raises(PrivetError):
        gain_second_key(world.folder / "oslo/site.toml", world.service("oslo"))


def test_no_key_of_another_and_no_half_request_is_taken(world: World) -> None:
    keys, other = keys_at(world, "oslo"), keys_at(world, "lyon")
    identity = read_key(world.folder / "oslo/keys/identity.pem", "identity")
    taken = replace(NoteKey.parse(keys.witness), pq=NoteKey.parse(other.witness).pq).text
    service, pq = world.service("oslo"), mldsa.new_key()
    new = replace(NoteKey.parse(keys.witness), pq=mldsa.public_of(pq)).text
    good = KeysRequest.make("north", keys, new, identity, pq)
    with pytest.raises(RefusedError, match="have not both signed"):
        service.renew_keys(KeysRequest.make("north", keys, taken, identity, pq))
    with pytest.raises(RefusedError, match="have not both signed"):
        service.renew_keys(good.model_copy(update={"proof": good.proof[:128]}))
    with pytest.raises(ProtocolError, match="a cosigning vkey with the site's name"):
        world.service("lyon").renew_keys(good)
    lyons = read_key(world.folder / "lyon/keys/identity.pem", "identity")
    again = replace(NoteKey.parse(other.witness), pq=mldsa.public_of(pq)).text
    with pytest.raises(RefusedError, match="with an ML-DSA-65 key besides"):  # it has one
        world.service("lyon").renew_keys(KeysRequest.make("north", other, again, lyons, pq))
    with pytest.raises(ProtocolError):
        service.renew_keys(good.model_copy(update={"witness": "no key"}))
    assert [row.state for row in world.coordinator.members.rows()] == ["member"] * 3


def test_a_site_that_is_not_founded_yet_gains_its_key_for_the_genesis(tmp_path: Path) -> None:
    with running(tmp_path) as world:
        enrol_classical(world, "oslo")
        file = world.folder / "oslo/site.toml"
        keys, _ = gain_second_key(file, world.service("oslo"))
        world.coordinator.approve("oslo", keys.words, datetime.now(UTC))
        assert gain_second_key(file, world.service("oslo")) == (keys, True)
        world.found("lyon")
        with open_journal(world.coordinator.log_directory, world.coordinator.keys) as journal:
            assert journal.history.members["oslo"] == keys.member
