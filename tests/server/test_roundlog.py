"""The log on disk: whole whatever happens, in order, and readable by anyone from its files."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.rounds.witness import Stale, Witness
from privet.common.audit.verify import Verdict, verify_bundle
from privet.common.errors import PrivetError, ProtocolError, StateError, TooFewSitesError, VerificationError
from privet.common.files import Step
from privet.common.log import envelope, tiles
from privet.common.log.checkpoint import Checkpoint, accept_checkpoint, least_quorum, open_checkpoint, verify_leaf
from privet.common.log.merkle import check_consistency
from privet.common.log.note import Note, Signature, parse_note
from privet.common.log.replay import Replay, admit
from privet.server.consortium.membership import next_quorum
from privet.server.log.journal import NEWCOMERS, convincing
from privet.server.log.roundlog import RoundLog, create_log, lean, open_log
from tests.support.log_world import ORIGIN, World, in_memory, log_key, private, public, sign_head, story, witness_key

WORLD = story()
LEAVES, POLICY = WORLD.leaves, WORLD.policy
NOW = 1_800_000_000


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as directory:
        yield directory


def opened(directory: Path, step: Step = lambda name: None) -> AbstractContextManager[RoundLog]:
    return open_log(directory, ORIGIN, private("log"), step)


@contextmanager
def fresh(directory: Path) -> Iterator[RoundLog]:
    create_log(directory)
    with opened(directory) as log:
        yield log


def witnesses(directory: Path) -> list[Witness]:
    """Return the sites' witnesses, created where they are not there yet."""
    found = []
    for site in WORLD.sites:
        args = (directory / site, log_key(), witness_key(site).name, private(f"witness {site}"))
        found.append(Witness(*args) if args[0].exists() else Witness.create(*args))
    return found


def witness_all(log: RoundLog, sites: list[Witness]) -> None:
    """Have every witness cosign the newest checkpoint, as a round does."""
    note, answers = log.checkpoint(), list[Signature]()
    for site in sites:
        last = site.last.size
        answer = site.add(note, last, log.prove_consistency(last, log.size), NOW)
        assert not isinstance(answer, Stale)
        answers += answer
    assert log.cosign(log.size, answers, POLICY) == 0


def audited(directory: Path) -> Verdict:
    """Verify the published files, tiles included."""
    size = open_checkpoint((directory / "checkpoint").read_bytes(), log_key())[0].size

    def fetch(path: str) -> bytes:
        return (directory / path).read_bytes()

    return verify_bundle(
        lambda: tiles.read_leaves(size, fetch),
        (directory / "checkpoint").read_bytes(),
        POLICY,
        lambda: tiles.read_leaf_hashes(size, fetch),
    )


def many(count: int) -> list[bytes]:
    return [b"leaf %d" % i for i in range(count)]


# Append and checkpoint


def test_leaves_are_there_again_after_reopening(tmp_path: Path) -> None:
    with fresh(tmp_path) as log:
        assert log.append(LEAVES[:1]) == range(1)
        assert log.append(LEAVES[1:9]) == range(1, 9)
        assert log.append([]) == range(9, 9)
        note = log.checkpoint()
    with opened(tmp_path) as log:
        assert list(log.leaves()) == LEAVES[:9]
        assert list(log.leaves(7)) == LEAVES[7:9]
        assert log.checkpoint() == note == sign_head(LEAVES[:9])
        assert log.append(LEAVES[9:]) == range(9, 28)
    with opened(tmp_path) as log:
        assert open_checkpoint(log.checkpoint(), log.public)[0].root == WORLD.frontier.root


def test_one_checkpoint_per_size_for_ever(tmp_path: Path) -> None:
    with fresh(tmp_path) as log:
        with pytest.raises(ProtocolError, match="empty round log"):
            log.checkpoint()
        log.append(many(3))
        assert log.checkpoint() == log.checkpoint() == sign_head(many(3))
        log.append([b"more"])
        assert log.note(3) == sign_head(many(3))
        with pytest.raises(ProtocolError, match="has not signed a checkpoint of 4 leaves"):
            log.note(4)


def test_leaves_that_do_not_fit_are_refused_all_together(tmp_path: Path) -> None:
    with fresh(tmp_path) as log:
        for wrong in (b"", b"x" * 65_536):
            with pytest.raises(ProtocolError, match="1 to 65535 bytes"):
                log.append([b"good", wrong])
        assert log.size == 0
        log.append([b"x" * 65_535])


def test_proofs_hold(tmp_path: Path) -> None:
    with fresh(tmp_path) as log:
        log.append(many(300))
        heads = [Checkpoint.parse(parse_note(sign_head(many(size))).text) for size in (1, 77, 256, 300)]
        for old in heads:
            for new in heads:
                if old.size <= new.size:
                    proof = log.prove_consistency(old.size, new.size)
                    check_consistency(proof, old.size, old.root, new.size, new.root)
        with pytest.raises(ProtocolError, match="for 301 leaves of the round log, but the log has 300"):
            log.prove_consistency(1, 301)


# Witness and publish


def test_nothing_is_published_before_a_quorum_has_cosigned(tmp_path: Path) -> None:
    sites = witnesses(tmp_path / "sites")
    with fresh(tmp_path / "log") as log:
        log.append(LEAVES[:4])
        note = log.checkpoint()
        for number, site in enumerate(sites):
            if number < POLICY.needed:
                assert log.accepted(POLICY) is None
                with pytest.raises(TooFewSitesError, match="has the 2 cosignatures that its policy demands"):
                    log.publish(tmp_path / "public", POLICY)
                with pytest.raises(TooFewSitesError, match="leaf 3 of the round log is not cosigned yet"):
                    log.prove_leaf(3, POLICY)
            answer = site.add(note, 0, (), NOW)
            assert not isinstance(answer, Stale)
            assert log.cosign(4, answer, POLICY) == max(0, POLICY.needed - number - 1)
            assert log.cosign(4, answer, POLICY) == max(0, POLICY.needed - number - 1)
        assert not (tmp_path / "public").exists()
        assert log.publish(tmp_path / "public", POLICY).size == 4
        verify_leaf(log.prove_leaf(3, POLICY), LEAVES[3], POLICY)
        # Leaves beyond the accepted checkpoint wait.
        log.append(LEAVES[4:6])
        log.checkpoint()
        assert log.publish(tmp_path / "public", POLICY).size == 4
        with pytest.raises(TooFewSitesError, match="leaf 5"):
            log.prove_leaf(5, POLICY)
    assert audited(tmp_path / "public").ok


def test_only_a_witness_of_the_policy_cosigns_and_only_this_checkpoint(tmp_path: Path) -> None:
    with fresh(tmp_path / "log") as log:
        log.append(LEAVES[:4])
        log.checkpoint()
        lines = parse_note(sign_head(LEAVES[:4], ("oslo",))).signatures
        other = parse_note(sign_head(LEAVES[:3], ("oslo",))).signatures[1]
        stranger = parse_note(sign_head(LEAVES[:4], ("paris",))).signatures[1]
        with pytest.raises(VerificationError, match="does not match"):
            log.cosign(4, [lines[1], other], POLICY)
        with pytest.raises(ProtocolError, match=r"paris.example, which is not a witness"):
            log.cosign(4, [stranger], POLICY)
        with pytest.raises(ProtocolError, match="is not a witness"):
            log.cosign(4, [lines[0]], POLICY)
        with pytest.raises(ProtocolError, match="has not signed a checkpoint of 3"):
            log.cosign(3, [other], POLICY)
        assert log.cosign(4, [lines[1]], POLICY) == 1


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_the_files_are_those_of_the_specification(tmp_path: Path, size: int) -> None:
    with fresh(tmp_path / "log") as log:
        log.append(many(size))
        sites = witnesses(tmp_path / "sites")
        witness_all(log, sites)
        log.publish(tmp_path / "public", POLICY)
        files = {str(p.relative_to(tmp_path / "public")) for p in (tmp_path / "public").rglob("*") if p.is_file()}
        assert files == {"checkpoint", *(tile.path for tile in tiles.tiles(size))}
        # Again, and after more leaves: what is there stays as it is, partial files go once the full ones stand.
        stamp = {name: (tmp_path / "public" / name).stat().st_mtime_ns for name in files - {"checkpoint"}}
        log.publish(tmp_path / "public", POLICY)
        log.append([b"more"] * 300)
        witness_all(log, sites)
        log.publish(tmp_path / "public", POLICY)
    files_now = {str(p.relative_to(tmp_path / "public")) for p in (tmp_path / "public").rglob("*") if p.is_file()}
    assert files_now >= {"checkpoint", *(tile.path for tile in tiles.tiles(size + 300))}
    assert not {name for name in files_now if ".partial" in name}
    for name in files_now & stamp.keys():
        assert (tmp_path / "public" / name).stat().st_mtime_ns == stamp[name]
    full = {tile.path for tile in tiles.tiles(size + 300) if tile.width == tiles.WIDTH}
    assert not {name for name in files_now if any(name.startswith(f"{path}.p/") for path in full)}
    read = list(tiles.read_leaves(size + 300, lambda path: (tmp_path / "public" / path).read_bytes()))
    assert read == [*many(size), *[b"more"] * 300]


def test_a_lost_file_is_written_again(tmp_path: Path) -> None:
    with fresh(tmp_path / "log") as log:
        log.append(LEAVES)
        witness_all(log, witnesses(tmp_path / "sites"))
        log.publish(tmp_path / "public", POLICY)
        for lost in ("tile/0/000.p/28", "tile/entries/000.p/28"):
            (tmp_path / "public" / lost).unlink()
        log.publish(tmp_path / "public", POLICY)
    assert audited(tmp_path / "public").ok


def test_an_old_copy_of_the_log_is_not_published_over_a_newer_one(tmp_path: Path) -> None:
    sites = witnesses(tmp_path / "sites")
    with fresh(tmp_path / "log") as log:
        log.append(LEAVES[:5])
        witness_all(log, sites)
    shutil.copytree(tmp_path / "log", tmp_path / "old")
    with opened(tmp_path / "log") as log:
        log.append(LEAVES[5:8])
        witness_all(log, sites)
        log.publish(tmp_path / "public", POLICY)
    with opened(tmp_path / "old") as log:
        with pytest.raises(StateError, match="from 8 leaves, but this round log of 5 leaves does not continue them"):
            log.publish(tmp_path / "public", POLICY)
        # Nor does a witness go along with it.
        log.append([b"another history"])
    for site in sites:
        with (
            opened(tmp_path / "old") as log,
            pytest.raises(VerificationError, match="expected a checkpoint of at least 8 leaves, found one of 6"),
        ):
            site.add(log.checkpoint(), 5, log.prove_consistency(5, 6), NOW)
    assert all(site.evidence for site in sites)
    assert audited(tmp_path / "public").ok


def test_another_logs_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "checkpoint").write_bytes(sign_head(LEAVES[:2], signer="mallory"))
    with fresh(tmp_path / "log") as log:
        log.append(LEAVES[:5])
        witness_all(log, witnesses(tmp_path / "sites"))
        with pytest.raises(StateError, match="not a checkpoint of this round log"):
            log.publish(tmp_path / "public", POLICY)


# One writer, no silent start, no silent change


def test_a_log_is_created_once_and_opened_by_one(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="has no round log"), opened(tmp_path):
        pass
    create_log(tmp_path)
    with pytest.raises(StateError, match="has a round log already"):
        create_log(tmp_path)
    with opened(tmp_path), pytest.raises(StateError, match="another process"), opened(tmp_path):
        pass
    with opened(tmp_path) as log:
        log.append(many(2))


def test_a_creation_that_was_cut_short_is_no_log_and_no_hindrance(tmp_path: Path) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):
        (tmp_path / f".log.sqlite.partial{suffix}").write_bytes(b"half a file")
    with pytest.raises(StateError, match="has no round log"), opened(tmp_path):
        pass
    with fresh(tmp_path) as log:
        log.append(LEAVES[:1])


def tampered(directory: Path, *statements: str) -> None:
    """Change the file as somebody with root rights would: past the triggers."""
    with sqlite3.connect(directory / "log.sqlite") as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            database.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            database.execute(statement)
    database.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("UPDATE leaves SET data = x'00' WHERE number = 3", "leaf 3 was changed, or is missing"),
        ("DELETE FROM leaves WHERE number = 3", "leaf 3 was changed, or is missing"),
        ("DELETE FROM leaves WHERE number = 8", "leaves from number 8 on are missing"),
        ("UPDATE leaves SET number = 100 WHERE number = 8", "leaf 8 was changed, or is missing"),
        ("INSERT INTO leaves VALUES (9, x'00')", "leaf 9 was changed, or is missing"),
        ("UPDATE hashes SET hash = zeroblob(32) WHERE place = 6", "leaf 3 was changed, or is missing"),
        ("DELETE FROM hashes WHERE place = 14", "leaf 7 was changed, or is missing"),
        ("INSERT INTO hashes VALUES (99, zeroblob(32))", "leaves from number 9 on are missing"),
        ("UPDATE checkpoints SET size = 8", "checkpoint of 8 leaves that was not made from these leaves"),
        ("UPDATE checkpoints SET size = 12", "leaves from number 9 on are missing"),
        ("UPDATE checkpoints SET note = x'00'", "checkpoint: expected"),
        ("PRAGMA application_id = 1", "is not a round log"),
    ],
)
def test_a_changed_file_is_noticed_when_it_is_opened(tmp_path: Path, change: str, says: str) -> None:
    with fresh(tmp_path) as log:
        log.append(LEAVES[:9])
        log.checkpoint()
    tampered(tmp_path, change)
    with pytest.raises(PrivetError, match=says), opened(tmp_path):
        pass


def test_the_file_only_grows(tmp_path: Path) -> None:
    with fresh(tmp_path) as log:
        log.append(LEAVES[:3])
        log.checkpoint()
        log.cosign(3, parse_note(sign_head(LEAVES[:3], ("oslo",))).signatures[1:], POLICY)
    with sqlite3.connect(tmp_path / "log.sqlite") as database:
        for table in ("leaves", "hashes", "checkpoints", "cosignatures"):
            for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET rowid = rowid + 1"):  # noqa: S608
                with pytest.raises(sqlite3.IntegrityError, match="only grows"):
                    database.execute(statement)
    database.close()


@pytest.mark.parametrize("content", [b"", b"not a database" * 1000])
def test_another_file_is_no_log(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log.sqlite").write_bytes(content)
    with pytest.raises(PrivetError), opened(tmp_path):
        pass


# Whatever happens


STEPS = [
    "append:begin",
    "append:half",
    "append:written",
    "append:committed",
    "checkpoint:begin",
    "checkpoint:written",
    "checkpoint:committed",
    "witness:checked",
    "witness:stored",
    "cosign:begin",
    "cosign:written",
    "cosign:committed",
    "publish:file",
    "publish:tiles",
    "publish:checkpoint",
]


def history(root: Path, total: int, step: Step = lambda name: None) -> None:
    """Go on with a history of `total` leaves from wherever it stands: append five, checkpoint, witness, publish."""
    sites = [Witness(site.directory, site.log, site.name, site.key, step) for site in witnesses(root / "sites")]
    with opened(root / "log", step) as log:
        while True:
            if log.size:
                witness_all(log, sites)
                log.publish(root / "public", POLICY)
            if log.size == total:
                return
            log.append(LEAVES[log.size : min(log.size + 5, total)])


def is_whole(root: Path) -> None:
    """Check all that has to hold after a crash: the log, its witnesses, and what is published."""
    with opened(root / "log") as log:  # which verifies it
        assert list(log.leaves()) == LEAVES[: log.size]
        assert log.size in (0, 5, 10, 15, 20, 25, 28)
        for site in witnesses(root / "sites"):
            last = site.last
            assert last.size <= log.size
            assert site.evidence == ()
            if last.size:
                assert last == open_checkpoint(log.note(last.size), log.public)[0]
        if (root / "public" / "checkpoint").exists():
            verdict = audited(root / "public")
            assert verdict.ok, str(verdict)
            assert verdict.size <= log.size


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a child process; return the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(where: str, time: int) -> Step:
    """Return a hook that kills the process at the given passage of a step."""
    passages = 0

    def step(name: str) -> None:
        nonlocal passages
        passages += name == where
        if passages == time:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


@pytest.mark.parametrize("where", STEPS)
def test_killed_at_any_step_the_log_is_whole_and_goes_on(tmp_path: Path, where: str) -> None:
    create_log(tmp_path / "log")
    witnesses(tmp_path / "sites")
    assert in_child(partial(history, tmp_path, 10, kill_at(where, 2))) == signal.SIGKILL
    is_whole(tmp_path)
    history(tmp_path, 10)
    is_whole(tmp_path)
    assert audited(tmp_path / "public").size == 10


@pytest.mark.slow
@pytest.mark.parametrize("where", STEPS)
def test_killed_at_a_step_again_and_again(tmp_path: Path, where: str) -> None:
    for seed in range(8):  # of some seven deaths each
        root, generator = tmp_path / str(seed), random.Random(f"{where} {seed}")
        create_log(root / "log")
        witnesses(root / "sites")
        killed = 0
        while in_child(partial(history, root, 28, kill_at(where, generator.randint(1, 6)))) == signal.SIGKILL:
            killed += 1
            is_whole(root)
        assert killed > 0, seed
        assert audited(root / "public").size == 28, seed


@pytest.mark.slow
def test_killed_at_any_time(tmp_path: Path) -> None:
    """Not only between steps: a timer ends the process wherever it is."""
    for seed in range(16):  # of some twenty deaths each
        root = tmp_path / str(seed)
        generator = random.Random(seed)
        create_log(root / "log")
        witnesses(root / "sites")
        delay = 0.002
        while in_child(partial(timed, root, generator.uniform(0.001, delay))) == signal.SIGALRM:
            is_whole(root)
            delay *= 1.3
        is_whole(root)


def timed(root: Path, delay: float) -> None:
    """Write the history until a timer ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, delay)
    history(root, 28)


def append_for_ever(log: RoundLog) -> None:
    while True:
        log.append([b"x" * 1000])


@pytest.mark.parametrize("limit", [90_000, 100_001, 123_456])
def test_a_full_disk_leaves_a_whole_log_that_goes_on_when_there_is_space(tmp_path: Path, limit: int) -> None:
    create_log(tmp_path)

    def fill() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with opened(tmp_path) as log:
            with pytest.raises(StateError, match="cannot be read or written"):
                append_for_ever(log)
            assert log.size > 3
            with pytest.raises(StateError, match="an earlier write failed"):
                log.append([b"x"])

    assert in_child(fill) == 0
    with opened(tmp_path) as log:
        before = log.size
        assert before > 3
        assert set(log.leaves()) == {b"x" * 1000}
        log.append([b"y"])
        log.checkpoint()
    with opened(tmp_path) as log:
        assert log.size == before + 1


def test_a_full_disk_while_publishing_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    sites = witnesses(tmp_path / "sites")
    with fresh(tmp_path / "log") as log:
        log.append(LEAVES[:9])
        witness_all(log, sites)
        log.publish(tmp_path / "public", POLICY)
        log.append(LEAVES[9:])
        witness_all(log, sites)

    def publish() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with opened(tmp_path / "log") as log:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            with pytest.raises(StateError, match="cannot be read or written"):
                log.publish(tmp_path / "public", POLICY)

    assert in_child(publish) == 0
    assert (audited(tmp_path / "public").ok, audited(tmp_path / "public").size) == (True, 9)
    with opened(tmp_path / "log") as log:
        log.publish(tmp_path / "public", POLICY)
    assert audited(tmp_path / "public").size == 28


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.binary(min_size=1, max_size=20), max_size=4), max_size=6))
def test_any_leaves_in_any_batches_make_the_same_log(batches: list[list[bytes]]) -> None:
    leaves = [leaf for batch in batches for leaf in batch]
    with TemporaryDirectory() as name, in_memory(Path(name)) as directory:
        with fresh(directory) as log:
            for batch in batches:
                log.append(batch)
            if leaves:
                assert log.checkpoint() == sign_head(leaves)
        with opened(directory) as log:
            assert list(log.leaves()) == leaves


def test_what_an_audit_would_refuse_never_enters(tmp_path: Path) -> None:
    """How a coordinator writes: a leaf is admitted to the history, and only then appended."""
    history = Replay()
    with fresh(tmp_path / "log") as log:
        for leaf, (statement, author) in zip(LEAVES, WORLD.said, strict=True):
            stranger = envelope.sign_envelope(statement, private("mallory"))
            for wrong in (stranger, leaf[:-1], leaf.replace(public(author).hex().encode(), b"0" * 64)):
                with pytest.raises(PrivetError):
                    admit(history, log.size, wrong, log.root_at)
            assert admit(history, log.size, leaf, log.root_at)[1] == statement
            log.append([leaf])
    with opened(tmp_path / "log") as log:
        again = Replay()
        for number, leaf in enumerate(log.leaves()):
            admit(again, number, leaf, log.root_at)
        with pytest.raises(ProtocolError, match="requested for 29 leaves"):
            log.root_at(29)
    assert again.runs.keys() == history.runs.keys() == {"flu", "copd"}
    assert again.epsilon == history.epsilon


def test_a_lean_checkpoint_convinces_and_has_nothing_else() -> None:
    world = World(sites=tuple(f"site-{number}" for number in range(9)), hybrid=True)
    world.say(world.genesis())
    note, policy = world.checkpoint(), world.policy
    few = lean(note, policy.log, policy.witnesses, policy.needed)
    assert len(accept_checkpoint(few, policy)[1]) == policy.needed == 5
    assert len(parse_note(few).signatures) == 2 * (1 + 5)
    bare = parse_note(lean(note, policy.log, (), 0))
    assert bare.signatures == parse_note(note).signatures[:2]
    assert lean(note, policy.log, policy.witnesses, 99) == note
    with pytest.raises(TooFewSitesError):
        accept_checkpoint(lean(note, policy.log, policy.witnesses, policy.needed - 1), policy)
    strange = Note(bare.text, (*parse_note(note).signatures, Signature("nobody", b"1234", b"x" * 64))).encode()
    assert lean(strange, policy.log, policy.witnesses, 99) == note


@pytest.mark.parametrize("colluding", [0, 1, 2, 5])
def test_so_many_cosignatures_are_sent_as_the_most_cautious_site_counts(colluding: int) -> None:
    for count, left, newcomers in product(range(1, 35), range(5), range(NEWCOMERS + 1)):
        sent = convincing(count, next_quorum(count, colluding), left)
        # As `policy_of` counts at a site that has confirmed everybody, and withdrawn nobody.
        whole = count + left + newcomers
        needed = least_quorum(whole, min(colluding, max(whole - 1, 0)))
        assert sent >= needed or needed > count
