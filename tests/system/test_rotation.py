"""A coordinator rotates its keys, and sites follow by words alone: over a real service, against thieves and forks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privet.client.commands import enrolment as site_commands
from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment, confirm, keep_terms
from privet.client.network.rotation import confirm_charter, confirm_rotation, is_rotation
from privet.client.rounds.logbook import Confirmed, Logbook, create_witness, open_logbook
from privet.client.site import load_site
from privet.client.trust import TRUSTED, EndedKeys, Trusted, read_trusted, write_trusted
from privet.common.audit.verify import verify_bundle
from privet.common.canonical import digest
from privet.common.errors import PrivetError, ProtocolError, RefusedError, StateError, StudyError, VerificationError
from privet.common.log.checkpoint import Checkpoint, LeafProof, Policy
from privet.common.log.envelope import Envelope, sign_envelope
from privet.common.log.merkle import Frontier, leaf_hash
from privet.common.log.note import ED25519, Note, NoteKey, log_lines
from privet.common.log.statements import StatedFloor, Statement
from privet.common.pki.charter import Charter
from privet.common.pki.enrolment import JoinRequest
from privet.common.pki.keyfile import make_key
from privet.common.study.messages import Cosigned, Evidence, RoundOpen, Shown
from privet.server.commands import service as commands
from privet.server.consortium import coordinator as owner
from privet.server.consortium.coordinator import Coordinator, log_members, new_keys, open_coordinator
from privet.server.consortium.rotation import Rotation, rotate_keys
from privet.server.log.journal import FormerKeysError, open_journal, rotation
from privet.server.log.keys import Keys
from privet.server.log.logfile import LogFile
from tests.support.consortium_world import World, make_coordinator, run, running
from tests.support.log_world import World as Said
from tests.support.masked_world import masked_study

NAMES = ("berlin", "lyon", "oslo")


@dataclass(frozen=True)
class Town:
    """Three sites that have confirmed each other and the charter, and witness the log of a running service."""

    world: World
    first: Charter

    @property
    def made(self) -> Coordinator:
        return self.world.coordinator

    @property
    def log(self) -> LogFile:
        return LogFile(self.made.log_directory)

    def file(self, name: str) -> Path:
        return self.world.folder / name / "site.toml"

    def trusted(self, name: str) -> Trusted:
        return read_trusted(self.world.folder / name / TRUSTED)

    def book(self, name: str) -> Logbook:
        found = open_logbook(load_site(self.file(name)), self.world.service(name).leaves)
        assert found is not None
        return found

    def shown(self, name: str, note: bytes | None = None) -> Cosigned:
        """Show a site the newest checkpoint, or another one, as a round does."""
        book = self.book(name)
        note = self.log.checkpoint() if note is None else note
        answer = book.cosign(Shown(note, 0, b""))
        if answer.line or not answer.size:
            return answer
        size = Checkpoint.parse(note.decode().split("\n\n")[0] + "\n").size
        return book.cosign(Shown(note, answer.size, b"".join(self.log.consistency(answer.size, size))))

    def policy(self, name: str) -> Policy:
        book = self.book(name)
        assert isinstance(book.rule, Confirmed)
        return book.rule.policy(book.witness.last)

    def says(self, *statements: Statement) -> None:
        """Append statements of the coordinator, and sign the head."""
        with open_journal(self.made.log_directory, self.made.keys) as journal:
            for statement in statements:
                journal.say(statement)
            journal.sign_head()

    def told(self, name: str) -> None:
        """Fetch the roster, as `privet site trust` does first."""
        keep_terms(self.file(name).parent, self.world.service(name).roster())

    def follows(self, name: str, words: str | None = None, service: ConsortiumClient | None = None) -> Trusted:
        self.told(name)
        told = self.made.charter.words if words is None else words
        return confirm_rotation(self.file(name), service or self.world.service(name), told)

    def evidence(self, name: str) -> int:
        return len(self.book(name).witness.evidence)


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    with grown(tmp_path) as found:
        yield found


@contextmanager
def grown(folder: Path) -> Iterator[Town]:
    with running(folder) as world:
        for name in NAMES:
            world.enrol(name)
        world.compare(*NAMES)
        made = world.coordinator
        made.members.found(StatedFloor(), world.clock())
        with open_journal(made.log_directory, made.keys) as journal:
            log_members(made, journal)
        for name in NAMES:
            create_witness(load_site(folder / name / "site.toml"))
        yield Town(world, made.charter)


def run_open(name: str) -> Statement:
    return Said(private=False).run_open(name)


# --- a rotation -----------------------------------------------------------------------------------------------


def test_a_consortium_of_earlier_gets_mldsa_by_a_rotation_and_never_loses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "new_keys", lambda origin: replace(new_keys(origin), pq=None))
    with grown(tmp_path) as town:
        monkeypatch.undo()
        assert not NoteKey.parse(town.first.log).pq
        town.says(run_open("flu"))
        for name in NAMES:
            town.shown(name)
        assert not town.policy("oslo").log.pq
        rotate_keys(town.made)
        for name in NAMES:
            town.follows(name)
        town.says(run_open("copd"))
        for name in NAMES:
            assert town.shown(name).line.count("\n") == 1
        assert town.policy("oslo").log == town.made.keys.public
        assert town.made.keys.public.pq
        second, old = town.made.charter, town.made.keys
        rotate_keys(town.made)
        assert town.follows("oslo").charter == town.made.charter
        assert town.made.keys.public.pq != old.public.pq
        # Whoever reads out a charter without ML-DSA-65, and true words, is believed by nobody.
        bare = second.model_copy(update={"log": replace(old.public, pq=b"").text})
        with pytest.raises(VerificationError, match="changes more than the keys"):
            town.trusted("oslo").with_rotation(bare, bare.words, ())


def test_sites_follow_by_words_and_the_log_goes_on(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    town.says(run_open("flu"))
    for name in NAMES:
        assert town.shown(name).line
    before, file = town.policy("oslo"), town.world.folder / "oslo" / TRUSTED
    assert b"former" not in file.read_bytes()  # the bytes of earlier versions
    old_note = town.log.checkpoint()

    done = rotate_keys(town.made)
    assert done.leaf == 2
    assert (done.charter, done.needed, done.members) == (town.made.charter, 2, 3)
    assert done.charter.renews(town.first)
    assert done.charter.words != town.first.words

    # Nobody has confirmed anything: no site cosigns, and each says what to do.
    for name in NAMES:
        with pytest.raises(VerificationError, match="has not confirmed that key") as caught:
            town.shown(name)
        assert "`privet site trust SITE`" in str(caught.value.hint)
        assert town.evidence(name) == 0

    # The old words, others, and one that is wrong confirm nothing.
    wrong = done.charter.words.split()
    wrong[11] = "zebra" if wrong[11] != "zebra" else "yogurt"
    for words in (town.first.words, town.trusted("lyon").keys["lyon"].words, " ".join(wrong), ""):
        with pytest.raises(VerificationError, match="not those of the charter"):
            town.follows("oslo", words)
    assert town.trusted("oslo").charter == town.first
    with pytest.raises(VerificationError, match="the site follows only if its log says so too"):
        confirm(town.world.folder / "oslo", None, done.charter.words)

    for name in NAMES:
        followed = town.follows(name)
        assert followed == town.trusted(name)
        assert followed.charter == done.charter
        ended = EndedKeys(log=town.first.log, coordinator=town.first.coordinator, until=3)
        assert followed.former == (ended,)
        policy = town.world.folder / name / "consortium/log.policy"
        assert Policy.parse(policy.read_text()).log.text == done.charter.log  # what auditors ask for
        assert town.book(name).witness.last.size == 3  # it has cosigned what it was shown when it followed
        assert town.shown(name).line
    town.says(run_open("copd"))
    assert {len(town.shown(name).line) > 0 for name in NAMES} == {True}
    policies = {town.policy(name).text for name in NAMES}
    assert policies == {replace(before, log=NoteKey.parse(done.charter.log)).text}
    assert (town.world.folder / "oslo/consortium/log.policy").read_text() in policies
    assert (town.made.directory / "public/log.policy").read_text() in policies
    assert (town.made.directory / "public/log.vkey").read_text() == done.charter.log + "\n"
    assert town.world.service("oslo").roster().log == done.charter.log  # the service has not been restarted

    # A late message with an old checkpoint is known, and an earlier run counts under the key of its leaf.
    assert town.book("oslo").cosign(Shown(old_note, 0, b"")) == Cosigned("", 4)
    rule = town.book("oslo").rule
    for leaf, charter in ((1, town.first), (2, town.first), (3, done.charter)):
        assert rule.coordinator(leaf, town.book("oslo").witness.last)[0].hex() == charter.coordinator


def test_the_commands_say_what_changes_and_what_to_do(town: Town) -> None:
    file, directory = town.file("lyon"), town.made.directory
    assert town.shown("lyon").line
    with pytest.raises(StudyError, match="expected one of them"):
        run(commands.rotate, "-C", directory, "--keys", "--passphrase")
    output = run(commands.rotate, "-C", directory, "--keys").output
    words = open_coordinator(directory).charter.words
    assert words in output
    assert "No round opens before 2 of 3 sites have confirmed" in " ".join(output.split())
    town.made.follow_keys()  # as the running service does each second
    checks = {each["name"]: each for each in json.loads(run(site_commands.doctor, file, "--json").output)["checks"]}
    assert "has not confirmed that key" in checks["log"]["text"]
    assert f"privet site trust {file}" in checks["log"]["hint"]
    assert "NOT confirmed" in run(site_commands.roster, file).output.splitlines()[0]
    checks = {each["name"]: each for each in json.loads(run(site_commands.doctor, file, "--json").output)["checks"]}
    assert "has rotated its keys" in checks["trust"]["text"]
    assert f"privet site trust {file}" in checks["trust"]["hint"]
    with pytest.raises(VerificationError, match="not those of the charter"):
        run(site_commands.trust, file, f"--words={town.first.words}")
    shown = run(site_commands.trust, file, f"--words={words}").output
    for line in ("rotation ", "changes ", "stays ", "confirmed ", "followed     the new keys count from leaf 2"):
        assert line in shown
    checks = {each["name"]: each for each in json.loads(run(site_commands.doctor, file, "--json").output)["checks"]}
    assert (checks["trust"]["ok"], checks["log"]["ok"]) == (True, True)


def test_a_site_that_was_away_follows_several_rotations_at_once_and_one_that_joins_later_none(town: Town) -> None:
    assert town.shown("oslo").line
    rotate_keys(town.made)
    town.follows("lyon")
    town.says(run_open("flu"))
    rotate_keys(town.made)
    for name in ("oslo", "lyon"):
        town.follows(name)
    assert town.trusted("oslo").former == town.trusted("lyon").former
    assert [each.until for each in town.trusted("oslo").former] == [2, 4]

    town.world.enrol("paris")
    town.follows("berlin")
    with open_journal(town.made.log_directory, town.made.keys) as journal:
        log_members(town.made, journal)
    keep_terms(town.file("paris").parent, town.world.service("paris").roster())
    own = {name: Enrolment(town.world.folder / name).asked.keys.words for name in (*NAMES, "paris")}
    confirm(town.world.folder / "paris", None, town.made.charter.words)
    for name, words in own.items():
        confirm(town.world.folder / "paris", name, words)
    create_witness(load_site(town.file("paris")))
    town.told("oslo")
    confirm(town.world.folder / "oslo", "paris", own["paris"])
    for name in ("paris", "oslo"):
        assert town.shown(name).line
    assert town.trusted("paris").former == ()
    assert town.policy("paris") == town.policy("oslo")
    rotate_keys(town.made)
    town.follows("paris")
    assert [each.until for each in town.trusted("paris").former] == [2, 4, 6]


def test_what_the_keys_have_signed_before_stays_verifiable(town: Town) -> None:
    """A bundle of before under the policy of before, one of after under the new policy."""
    for name in NAMES:
        town.shown(name)
    old = town.policy("oslo")
    early, leaves = cosigned(town), list(town.log.leaves(0, 99, 10**6))
    rotate_keys(town.made)
    for name in NAMES:
        town.follows(name)
    late, later = cosigned(town), list(town.log.leaves(0, 99, 10**6))
    assert verify_bundle(lambda: leaves, early, old).ok
    assert verify_bundle(lambda: later, late, town.policy("oslo")).ok
    assert "leaf 1 of this log" in verify_bundle(lambda: later, late, old).reason
    assert "use the policy of that time" in verify_bundle(lambda: leaves, early, town.policy("oslo")).reason


def cosigned(town: Town) -> bytes:
    """Return the newest checkpoint with the cosignatures of all sites."""
    note = town.log.checkpoint()
    lines = [town.shown(name).line for name in NAMES]
    return note + "".join(f"{line}\n" for line in lines).encode()


# --- thieves and forks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forged:
    """A service that gives a log of somebody's own. Whatever else it is asked, the true one answers."""

    true: ConsortiumClient
    history: Sequence[bytes]
    note: bytes
    log: LogFile

    @property
    def enrolment(self) -> Enrolment:
        return self.true.enrolment

    def clock(self) -> datetime:
        return datetime.now(UTC)

    def checkpoint(self) -> bytes:
        return self.note

    def leaves(self, first: int) -> list[bytes]:
        return list(self.history[first:])

    def consistency(self, old: int, new: int) -> tuple[bytes, ...]:
        return (bytes(32),) * 2


def signed_head(leaves: Sequence[bytes], keys: Keys) -> bytes:
    frontier = Frontier()
    for leaf in leaves:
        frontier, _ = frontier.append(leaf_hash(leaf))
    text = Checkpoint(keys.origin, len(leaves), frontier.root).text
    return Note(text, log_lines(text, keys.origin, keys.log, keys.pq)).encode()


def fresh_keys(origin: str) -> Keys:
    return new_keys(origin)


def forked(town: Town, old: Keys, new: Keys, charter: str, leaves: Sequence[bytes]) -> list[bytes]:
    """Return a log whose last leaf rotates to these keys, as the holder of all keys can make it."""
    from privet.common.log.epochs import KeyEpoch, RotationPlace

    frontier = Frontier()
    for leaf in leaves:
        frontier, _ = frontier.append(leaf_hash(leaf))
    present = KeyEpoch(0, old.public, old.coordinator.public_key().public_bytes_raw())
    place = RotationPlace("north", len(leaves), frontier.root, present)
    return [*leaves, sign_envelope(rotation(place, new, charter, 1), old.coordinator, old.pq)]


def test_a_larger_tree_under_the_old_key_is_refused_and_kept_once_a_site_has_followed(town: Town) -> None:
    """Attack: a thief of the old keys goes on with the log, towards a site that has followed."""
    old = town.made.keys
    for name in NAMES:
        town.shown(name)
    rotate_keys(town.made)
    town.follows("oslo")
    town.says(run_open("flu"))
    leaves = list(town.log.leaves(0, 99, 10**6))
    for thief in (signed_head(leaves, old), signed_head([*leaves, b"more"], old)):
        with pytest.raises(VerificationError, match="which counts no longer: somebody has a copy of it"):
            town.book("oslo").cosign(Shown(thief, 2, b""))
    assert town.evidence("oslo") == 2
    assert town.book("oslo").witness.last.size == 2
    # And a statement of his enters no log.
    stated = sign_envelope(run_open("copd"), old.coordinator, old.pq)
    with open_journal(town.made.log_directory, town.made.keys) as journal, pytest.raises(VerificationError):
        journal._admit(stated)


def test_a_site_that_has_followed_is_not_rolled_back(town: Town) -> None:
    """Attack: a thief of the old keys shows a shorter log of his own, as it could have been before the rotation."""
    old = town.made.keys
    rotate_keys(town.made)
    town.follows("oslo")
    with pytest.raises(VerificationError, match="rolled back"):
        town.book("oslo").cosign(Shown(signed_head([b"his own genesis"], old), 0, b""))
    with pytest.raises(VerificationError, match="which counts only later"):
        town.book("oslo").cosign(Shown(signed_head([b"any"], town.made.keys), 0, b""))
    assert town.evidence("oslo") == 2


def test_a_statement_under_the_old_key_stops_a_site_that_is_shown_it(town: Town) -> None:
    """Attack: whoever has all keys logs a run under the old one, which other sites may still believe."""
    old = town.made.keys
    rotate_keys(town.made)
    leaves = [*town.log.leaves(0, 99, 10**6), sign_envelope(run_open("flu"), old.coordinator, old.pq)]
    note = signed_head(leaves, town.made.keys)
    service = Forged(town.world.service("oslo"), leaves, note, town.log)
    town.told("oslo")
    with pytest.raises(VerificationError, match="leaf 2 of the round log breaks the rules") as caught:
        confirm_rotation(town.file("oslo"), service, town.made.charter.words)  # type: ignore[arg-type]
    assert "that key was replaced at leaf 1" in caught.value.message
    assert town.trusted("oslo").charter == town.first


def test_a_site_that_has_not_followed_trains_nothing_and_names_the_command(town: Town) -> None:
    town.shown("oslo")
    rotate_keys(town.made)
    note = town.log.checkpoint()
    leaf = town.log.leaves(0, 1, 10**6)[0]
    proof = LeafProof(0, town.log.inclusion(0, 2), note).encode()
    opened = RoundOpen({}, 1, "ab" * 16, digest(b"adapter"), NAMES, b"", evidence=Evidence(leaf, proof, leaf, proof))
    with pytest.raises(VerificationError, match="has not confirmed that key") as caught:
        town.book("oslo").check(masked_study(), opened, town.trusted("oslo").pins)
    assert "`privet site trust SITE`" in str(caught.value.hint)


def test_a_rotation_to_the_thiefs_own_keys_has_other_words(town: Town) -> None:
    """Attack: a thief of the old keys, with the service in his hands, signs a rotation to keys of his own."""
    old, thief = town.made.keys, fresh_keys(town.made.settings.origin)
    town.shown("oslo")
    own = town.first.model_copy(
        update={"log": thief.public.text, "coordinator": thief.coordinator.public_key().public_bytes_raw().hex()}
    )
    leaves = forked(town, old, thief, digest(own.encode()), list(town.log.leaves(0, 99, 10**6)))
    service = Forged(town.world.service("oslo"), leaves, signed_head(leaves, thief), town.log)
    terms = town.world.service("oslo").roster().model_copy(update={"log": own.log, "coordinator": own.coordinator})
    keep_terms(town.file("oslo").parent, terms)
    rotated = rotate_keys(town.made)
    for words in (town.first.words, rotated.charter.words):
        with pytest.raises(VerificationError, match="not those of the charter"):
            confirm_rotation(town.file("oslo"), service, words)  # type: ignore[arg-type]
    assert town.trusted("oslo").charter == town.first
    # Nor does the true keys' charter hold with his log.
    town.told("oslo")
    with pytest.raises(VerificationError):
        confirm_rotation(town.file("oslo"), service, rotated.charter.words)  # type: ignore[arg-type]
    assert town.trusted("oslo").charter == town.first


def test_a_site_waits_for_a_rotation_that_was_interrupted_before_its_first_checkpoint(town: Town) -> None:
    town.shown("oslo")
    with pytest.raises(CrashError):
        rotate_keys(town.made, step=crashing("rotation:coordinator.pem"))
    town.made.follow_keys()
    with pytest.raises(VerificationError, match="no checkpoint under the new key yet") as caught:
        town.follows("oslo")
    assert "`privet coordinator rotate --keys`" in str(caught.value.hint)
    rotate_keys(town.made)
    assert town.follows("oslo").charter == town.made.charter


def test_a_site_that_is_killed_while_it_follows_goes_on(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys are confirmed before the checkpoint is cosigned: it is cosigned when it is shown."""
    town.shown("oslo")
    rotate_keys(town.made)

    def killed(*_: object) -> None:
        raise CrashError

    with monkeypatch.context() as patched:
        patched.setattr("privet.client.rounds.witness.Witness.add", killed)
        with pytest.raises(CrashError):
            town.follows("oslo")
    assert town.trusted("oslo").charter == town.made.charter
    assert town.book("oslo").witness.last.size == 1
    assert town.shown("oslo").line
    assert town.evidence("oslo") == 0


def test_a_rotation_does_not_drop_what_a_site_has_cosigned(town: Town) -> None:
    """Attack: the coordinator itself rotates on a branch without a run that the site has cosigned."""
    old, new = town.made.keys, fresh_keys(town.made.settings.origin)
    early = list(town.log.leaves(0, 99, 10**6))
    town.says(run_open("flu"))
    town.shown("oslo")
    charter = town.first.model_copy(
        update={"log": new.public.text, "coordinator": new.coordinator.public_key().public_bytes_raw().hex()}
    )
    branch = forked(town, old, new, digest(charter.encode()), early)
    longer = [*branch, sign_envelope(run_open("copd"), new.coordinator, new.pq)]
    terms = (
        town.world.service("oslo").roster().model_copy(update={"log": charter.log, "coordinator": charter.coordinator})
    )
    keep_terms(town.file("oslo").parent, terms)
    for number, leaves in enumerate((branch, longer), start=1):
        service = Forged(town.world.service("oslo"), leaves, signed_head(leaves, new), town.log)
        with pytest.raises(VerificationError) as caught:
            confirm_rotation(town.file("oslo"), service, charter.words)  # type: ignore[arg-type]
        assert "evidence" in str(caught.value.hint)
        assert town.evidence("oslo") == number
    assert town.trusted("oslo").charter == town.first


def test_two_sites_that_were_shown_two_rotations_do_not_cosign_each_others(town: Town) -> None:
    """Attack: one coordinator, two rotations to the same keys at two forks."""
    old, new = town.made.keys, fresh_keys(town.made.settings.origin)
    common = list(town.log.leaves(0, 99, 10**6))
    charter = town.first.model_copy(
        update={"log": new.public.text, "coordinator": new.coordinator.public_key().public_bytes_raw().hex()}
    )
    heads = {}
    for name, middle in (("oslo", []), ("lyon", [sign_envelope(run_open("flu"), old.coordinator, old.pq)])):
        leaves = forked(town, old, new, digest(charter.encode()), [*common, *middle])
        heads[name] = signed_head(leaves, new)
        service = Forged(town.world.service(name), leaves, heads[name], town.log)
        terms = town.world.service(name).roster()
        keep_terms(
            town.file(name).parent, terms.model_copy(update={"log": charter.log, "coordinator": charter.coordinator})
        )
        confirm_rotation(town.file(name), service, charter.words)  # type: ignore[arg-type]
    with pytest.raises(VerificationError):
        town.book("lyon").cosign(Shown(heads["oslo"], 3, b""))
    with pytest.raises(VerificationError):
        town.book("oslo").cosign(Shown(heads["lyon"], 2, bytes(64)))
    assert (town.evidence("oslo"), town.evidence("lyon")) == (1, 1)


def test_a_second_rotation_of_the_same_leaf_is_kept_as_evidence(town: Town) -> None:
    """A coordinator is restored from a copy of before the rotation, and rotated once more: the log has forked."""
    directory = town.made.directory
    shutil.copytree(directory, directory.with_name("copy"))
    for name in NAMES:
        town.shown(name)
    rotate_keys(town.made)
    confirmed_keys = town.follows("oslo")
    shutil.rmtree(directory)
    directory.with_name("copy").rename(directory)
    rotate_keys(open_coordinator(directory))
    town.made.follow_keys()
    with pytest.raises(VerificationError, match="different roots"):
        town.follows("oslo")
    assert town.evidence("oslo") == 1
    assert town.trusted("oslo") == confirmed_keys


def test_following_twice_changes_nothing(town: Town) -> None:
    """Two people type the words at the same time: the second waits, and finds that all is done."""
    town.shown("oslo")
    rotate_keys(town.made)
    assert town.follows("oslo") == town.follows("oslo") == town.trusted("oslo")
    assert town.evidence("oslo") == 0


def made_anew(town: Town, name: str) -> None:
    """Lose a site's file of confirmed keys, and make it anew as `privet site setup` does."""
    (town.world.folder / name / TRUSTED).unlink()
    write_trusted(
        town.world.folder / name / TRUSTED, Trusted(members=(Enrolment(town.world.folder / name).asked.keys,))
    )


def test_a_site_that_lost_its_confirmed_keys_confirms_them_anew_after_a_rotation(town: Town) -> None:
    """What the site has cosigned under the old key stays readable, and binds the log as before."""
    town.shown("oslo")
    book = town.book("oslo")
    rotate_keys(town.made)
    town.made.follow_keys()
    made_anew(town, "oslo")
    with pytest.raises(VerificationError, match="has not confirmed the charter"):  # a service that still runs
        book.cosign(Shown(town.log.checkpoint(), 0, b""))
    with pytest.raises(VerificationError, match="not those of the charter"):
        run(site_commands.trust, town.file("oslo"), f"--words={town.first.words}")
    run(site_commands.trust, town.file("oslo"), f"--words={town.made.charter.words}")
    assert [each.until for each in town.trusted("oslo").former] == [2]
    assert town.book("oslo").witness.last.size == 2
    assert town.evidence("oslo") == 0

    town.follows("lyon")
    made_anew(town, "lyon")
    run(site_commands.trust, town.file("lyon"), f"--words={town.made.charter.words}")
    assert town.trusted("lyon").former == town.trusted("oslo").former


def test_a_site_that_lost_its_confirmed_keys_before_the_first_checkpoint_confirms_them_by_words(
    town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_anew(town, "oslo")
    monkeypatch.setattr("privet.server.log.logfile.LogFile.checkpoint", lambda self: b"")
    run(site_commands.trust, town.file("oslo"), f"--words={town.made.charter.words}")
    assert town.trusted("oslo").charter == town.first


def test_lost_confirmed_keys_do_not_let_a_fork_in(town: Town) -> None:
    """Attack: the coordinator shows another log to a site that has lost its confirmed keys, but not its witness."""
    early = list(town.log.leaves(0, 99, 10**6))
    old, new = town.made.keys, fresh_keys(town.made.settings.origin)
    town.says(run_open("flu"))
    town.shown("oslo")
    charter = town.first.model_copy(
        update={"log": new.public.text, "coordinator": new.coordinator.public_key().public_bytes_raw().hex()}
    )
    leaves = forked(town, old, new, digest(charter.encode()), early)
    terms = town.world.service("oslo").roster()
    made_anew(town, "oslo")
    keep_terms(
        town.file("oslo").parent, terms.model_copy(update={"log": charter.log, "coordinator": charter.coordinator})
    )
    service = Forged(town.world.service("oslo"), leaves, signed_head(leaves, new), town.log)
    with pytest.raises(VerificationError, match="different roots"):
        confirm_charter(town.file("oslo"), service, charter.words)  # type: ignore[arg-type]
    assert town.trusted("oslo").charter is None
    assert len(list((town.world.folder / "oslo/state/log/witness/evidence").iterdir())) == 1


def test_a_thief_gains_nothing_from_a_site_whose_confirmed_keys_are_an_old_copy(town: Town) -> None:
    """Attack: `trusted.json` was restored from before the rotation; the old key goes on with the log."""
    old, file = town.made.keys, town.world.folder / "oslo" / TRUSTED
    town.shown("oslo")
    copy = file.read_bytes()
    rotate_keys(town.made)
    town.follows("oslo")
    file.write_bytes(copy)
    thief = signed_head([*town.log.leaves(0, 99, 10**6), b"more"], old)
    with pytest.raises(StateError, match="has not confirmed") as caught:
        town.book("oslo").cosign(Shown(thief, 2, b""))
    assert "`privet site trust SITE`" in caught.value.hint
    assert len(town.follows("oslo").former) == 1
    assert town.shown("oslo").line


@pytest.mark.parametrize("field", ["colluding", "root", "consortium"])
def test_nothing_else_changes_under_the_cover_of_a_rotation(town: Town, field: str) -> None:
    """Attack: the coordinator adds to the new keys that fewer members are assumed to collude."""
    others: dict[str, Any] = {"colluding": 1, "root": "ab" * 32, "consortium": "south"}
    done = rotate_keys(town.made)
    claimed = done.charter.model_copy(update={field: others[field]})
    trusted = town.trusted("oslo")
    assert not is_rotation(trusted, claimed)
    with pytest.raises(VerificationError, match="changes more than the keys"):
        trusted.with_rotation(claimed, claimed.words, ())
    if field == "colluding":
        terms = town.world.service("oslo").roster().model_copy(update={"colluding": 1})
        keep_terms(town.file("oslo").parent, terms)
        with pytest.raises(VerificationError, match="changes more than the keys"):
            confirm_rotation(town.file("oslo"), town.world.service("oslo"), claimed.words)
        with pytest.raises(VerificationError, match="changes more than the keys"):
            confirm(town.world.folder / "oslo", None, claimed.words)
    assert town.trusted("oslo").charter == town.first


def test_the_charter_of_the_statement_is_the_one_that_is_confirmed(town: Town) -> None:
    old, new = town.made.keys, fresh_keys(town.made.settings.origin)
    charter = town.first.model_copy(
        update={"log": new.public.text, "coordinator": new.coordinator.public_key().public_bytes_raw().hex()}
    )
    leaves = forked(town, old, new, digest(b"another charter"), list(town.log.leaves(0, 99, 10**6)))
    service = Forged(town.world.service("oslo"), leaves, signed_head(leaves, new), town.log)
    terms = town.world.service("oslo").roster()
    keep_terms(
        town.file("oslo").parent, terms.model_copy(update={"log": charter.log, "coordinator": charter.coordinator})
    )
    with pytest.raises(VerificationError, match="announces another charter"):
        confirm_rotation(town.file("oslo"), service, charter.words)  # type: ignore[arg-type]


def test_a_log_that_leads_to_the_keys_from_others_than_the_confirmed_ones_is_refused(town: Town) -> None:
    """Attack: a new log, founded by somebody else, that ends with the true keys' charter."""
    rotate_keys(town.made)
    town.follows("oslo")
    file = town.world.folder / "oslo" / TRUSTED
    true = read_trusted(file)
    for former in (
        true.former[0].model_copy(update={"until": 1}),
        true.former[0].model_copy(update={"coordinator": "ab" * 32}),
    ):
        write_trusted(file, true.model_copy(update={"former": (former,)}))
        with pytest.raises(PrivetError):
            town.policy("oslo")


def test_a_file_of_confirmed_keys_is_strict(town: Town) -> None:
    rotate_keys(town.made)
    true = town.follows("oslo")
    assert Trusted.decode(true.encode()) == true
    document = json.loads(true.encode())
    for change in (
        {"former": [*document["former"], *document["former"]]},
        {"former": [{**document["former"][0], "until": 0}]},
        {"former": [{**document["former"][0], "log": "x"}]},
        {"former": [{**document["former"][0], "more": 1}]},
        {"charter": None},
    ):
        with pytest.raises(ProtocolError):
            Trusted.decode(json.dumps({**document, **change}).encode())


# --- at the coordinator -----------------------------------------------------------------------------------------


def test_a_rotation_needs_a_log_without_an_open_round(town: Town, tmp_path: Path) -> None:
    empty = make_coordinator(tmp_path / "empty")
    with pytest.raises(RefusedError, match="is not founded"):
        rotate_keys(empty)
    assert not (empty.directory / "keys/next").exists()
    said = Said(sites=NAMES, private=False)
    keys = {keys.site: keys.identity for keys in town.made.members.members()}
    from privet.common.log.agreement import keys_digest

    town.says(said.run_open("flu"), said.round_open("flu", 1, parameters=keys_digest(keys)))
    before = town.made.keys.public
    with pytest.raises(RefusedError, match="round 1 of run flu is open"):
        rotate_keys(town.made)
    assert town.made.keys.public == before
    with open_journal(town.made.log_directory, town.made.keys), pytest.raises(StateError, match="has locked"):
        rotate_keys(town.made)


def test_no_site_joins_with_a_key_that_was_replaced(town: Town) -> None:
    """Attack: a thief of the coordinator's old key asks to join with it as his identity."""
    old = town.made.keys
    rotate_keys(town.made)
    token = town.world.invite("paris")
    keys = Enrolment(town.world.folder / "oslo").asked.keys
    for key in (old.coordinator, old.log, town.made.keys.coordinator):
        own = keys.model_copy(
            update={
                "site": "paris",
                "identity": key.public_key().public_bytes_raw().hex(),
                "witness": NoteKey("paris", 4, Ed25519PrivateKey.generate().public_key().public_bytes_raw()).text,
                "node": ssh_key(),
                "request": csr(),
            }
        )
        with pytest.raises(RefusedError, match="was used in this consortium before"):
            town.made.answer(JoinRequest.make(token.secret, own, key), town.world.clock())


@pytest.mark.parametrize("asks", ["before", "between"])
def test_no_site_becomes_a_member_with_a_key_that_a_rotation_brings(town: Town, asks: str) -> None:
    """Attack: the log names the new keys while the rotation is under way, and an applicant claims one as its own.

    Its witness key proves nothing, so it may be anybody's. The log would refuse such a member, and all after it.
    """
    token, identity = town.world.invite("paris"), Ed25519PrivateKey.generate()
    with pytest.raises(CrashError):
        rotate_keys(town.made, step=crashing("rotation:stated"))
    stated = town.log.leaves(0, 99, 10**6)[-1]
    new = NoteKey.parse(json.loads(Envelope.decode(stated).payload)["predicate"]["log"])
    own = Enrolment(town.world.folder / "oslo").asked.keys.model_copy(
        update={
            "site": "paris",
            "identity": identity.public_key().public_bytes_raw().hex(),
            "witness": NoteKey("paris", 4, new.public).text,
            "node": ssh_key(),
            "request": csr(),
        }
    )
    asked = JoinRequest.make(token.secret, own, identity)
    if asks == "before":  # the running service reads the keys each second, and may not have heard of the rotation yet
        town.made.answer(asked, town.world.clock())
        with pytest.raises(RefusedError, match="was used in this consortium before"):
            open_coordinator(town.made.directory).approve("paris", own.words, town.world.clock())
    else:
        town.made.follow_keys()
        with pytest.raises(RefusedError, match="was used in this consortium before"):
            town.made.answer(asked, town.world.clock())
    rotate_keys(open_coordinator(town.made.directory))
    with pytest.raises(RefusedError):
        open_coordinator(town.made.directory).approve("paris", own.words, town.world.clock())
    town.world.enrol("turin")  # the log goes on
    made = open_coordinator(town.made.directory)
    with open_journal(made.log_directory, made.keys) as journal:
        assert log_members(made, journal) == 1


def ssh_key() -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def csr() -> str:
    from privet.common.pki.certificates import request

    return request(ec.generate_private_key(ec.SECP256R1()))


class CrashError(Exception):
    """The process ends here."""


STEPS = (
    "rotation:made",
    "rotation:stated",
    "rotation:former",
    "rotation:release.pem",
    "rotation:mldsa65.pem",
    "rotation:log.pem",
    "rotation:coordinator.pem",
    "rotation:signed",
    "rotation:published",
)


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator's directory with three members and a log."""
    folder = tmp_path_factory.mktemp("founded")
    with running(folder) as world:
        for name in NAMES:
            world.enrol(name)
        made = world.coordinator
        made.members.found(StatedFloor(), world.clock())
        with open_journal(made.log_directory, made.keys) as journal:
            log_members(made, journal)
    return folder / "coordinator"


def crashing(at: str) -> Any:
    def step(name: str) -> None:
        if name == at:
            raise CrashError

    return step


@pytest.mark.parametrize("at", STEPS)
def test_a_rotation_that_was_interrupted_is_finished_by_the_same_command(
    founded: Path, tmp_path: Path, at: str
) -> None:
    directory = tmp_path / "coordinator"
    shutil.copytree(founded, directory)
    before = open_coordinator(directory)
    first, old = before.charter, before.keys
    with pytest.raises(CrashError):
        rotate_keys(before, step=crashing(at))
    for key in directory.glob("keys/**/*.pem"):
        assert key.stat().st_mode & 0o077 == 0
    between = open_coordinator(directory)
    # The log is opened with its present keys, or not at all; what is signed in between is signed with them.
    mixed = at in STEPS[1 : STEPS.index("rotation:coordinator.pem")]
    refused = pytest.raises(FormerKeysError, match="was interrupted") if mixed else nullcontext()
    with refused, open_journal(between.log_directory, between.keys) as journal:
        journal.say(run_open("flu"))
        journal.sign_head()
    done = rotate_keys(open_coordinator(directory))
    after = open_coordinator(directory)
    assert done.charter == after.charter
    assert done.charter.renews(first)
    assert not (directory / "keys/next").exists()
    assert after.keys.release.private_numbers() != old.release.private_numbers()
    former = (directory / "keys/former.txt").read_text().split()
    assert former == [*(key.hex() for key in old.public.publics), first.coordinator]
    assert (directory / "public/log.vkey").read_text() == f"{after.keys.public.text}\n"
    assert Policy.parse((directory / "public/log.policy").read_text()).log == after.keys.public
    with open_journal(after.log_directory, after.keys) as journal:
        assert len(journal.history.epochs) == 2
        journal.say(run_open("copd"))
        journal.sign_head()
    with pytest.raises(FormerKeysError), open_journal(after.log_directory, old):
        pass


def test_keys_that_no_statement_names_are_not_used_later(founded: Path, tmp_path: Path) -> None:
    """Attack: a rotation is interrupted before it is stated, and a backup of that night is stolen."""
    directory = tmp_path / "coordinator"
    shutil.copytree(founded, directory)
    with pytest.raises(CrashError):
        rotate_keys(open_coordinator(directory), step=crashing("rotation:made"))
    stolen = {path.name: path.read_bytes() for path in (directory / "keys/next").iterdir()}
    rotate_keys(open_coordinator(directory))
    assert {path.name for path in (directory / "keys").iterdir()} == {*stolen, "former.txt"}
    for name, key in stolen.items():
        assert (directory / "keys" / name).read_bytes() != key


def test_a_process_with_the_old_keys_in_memory_signs_nothing(founded: Path, tmp_path: Path) -> None:
    directory = tmp_path / "coordinator"
    shutil.copytree(founded, directory)
    made = open_coordinator(directory)
    keys = made.keys
    rotate_keys(open_coordinator(directory))
    with pytest.raises(FormerKeysError), open_journal(made.log_directory, keys):
        pass
    assert made.follow_keys()  # as the service does each second
    assert not made.follow_keys()
    assert made.charter == open_coordinator(directory).charter
    assert made.members.policy() == replace(
        open_coordinator(directory).members.policy() or made.members.policy(),  # type: ignore[type-var]
        log=made.keys.public,
    )


def test_a_restored_key_file_is_named(founded: Path, tmp_path: Path) -> None:
    directory = tmp_path / "coordinator"
    shutil.copytree(founded, directory)
    rotate_keys(open_coordinator(directory))
    for name in ("log.pem", "coordinator.pem"):
        (directory / "keys" / name).unlink()
        make_key(directory / "keys" / name)
    with pytest.raises(FormerKeysError, match="names other keys"):
        rotate_keys(open_coordinator(directory))


def test_the_result_says_which_leaf(founded: Path, tmp_path: Path) -> None:
    directory = tmp_path / "coordinator"
    shutil.copytree(founded, directory)
    found = rotate_keys(open_coordinator(directory))
    assert isinstance(found, Rotation)
    assert (found.leaf, found.needed, found.members) == (1, 2, 3)
    assert NoteKey.parse(found.charter.log).kind == ED25519
