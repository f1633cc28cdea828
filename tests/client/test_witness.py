"""A witness cosigns one history and no other, whatever happens to it."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.client.rounds.memory import Memory
from privet.client.rounds.witness import Stale, Witness
from privet.common.errors import PrivetError, ProtocolError, StateError, VerificationError
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.merkle import EMPTY_ROOT, Frontier, HashProof, leaf_hash, prove_consistency
from privet.common.log.note import Note, Signature, parse_note, sign_note, verify_note
from tests.support.log_world import in_memory, log_key, private, sign_head, witness_key

NOW = 1_800_000_000
LEAVES = [b"leaf %d" % i for i in range(40)]
FORK = [*LEAVES[:5], b"another leaf", *LEAVES[6:]]


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    with in_memory(tmp_path) as directory:
        yield directory


def proof(leaves: Sequence[bytes], old: int, new: int) -> HashProof:
    hashes: list[bytes] = []
    frontier = Frontier()
    for leaf in leaves[:new]:
        frontier, gained = frontier.append(leaf_hash(leaf))
        hashes += gained
    return prove_consistency(old, new, lambda places: [hashes[place] for place in places])


def create(directory: Path) -> Witness:
    return Witness.create(directory, log_key(), "oslo.example", private("witness oslo"))


def show(witness: Witness, leaves: list[bytes], size: int, old: int | None = None) -> tuple[Signature, ...] | Stale:
    """Show the witness a checkpoint, with a proof from where it stands or from `old`."""
    start = witness.last.size if old is None else old
    return witness.add(sign_head(leaves[:size]), start, proof(leaves, min(start, size), size), NOW)


def test_a_cosignature_is_one_that_others_verify(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    assert witness.last == Checkpoint(log_key().name, 0, EMPTY_ROOT)
    for size in (1, 2, 7, 7, 40):
        answer = show(witness, LEAVES, size)
        assert not isinstance(answer, Stale)
        (line,) = answer
        assert line.time == NOW
        text = parse_note(sign_head(LEAVES[:size])).text
        assert verify_note(Note(text, (line,)), [witness_key("oslo")]) == (witness.public,)
        assert witness.last == Checkpoint.parse(text)
    assert witness.evidence == ()


def test_it_says_where_it_stands(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    assert show(witness, LEAVES, 9, old=3) == Stale(0)
    show(witness, LEAVES, 9)
    assert show(witness, LEAVES, 12, old=0) == Stale(9)
    assert show(witness, LEAVES, 12, old=12) == Stale(9)
    assert witness.last.size == 9
    assert isinstance(show(witness, LEAVES, 9, old=3), tuple)  # asked again, as its answer was lost
    show(witness, LEAVES, 12)
    assert show(witness, LEAVES, 9, old=9) == Stale(12)  # a message that came late
    assert witness.evidence == ()


@pytest.mark.parametrize(
    ("size", "old", "says"),
    [
        (12, 9, "expected roots"),
        (9, 9, "two checkpoints of 9 leaves have different roots"),
        (9, 0, "two checkpoints of 9 leaves have different roots"),
        (8, 0, "at least 9 leaves, found one of 8: the log was rolled back"),
        (6, 9, "at least 9 leaves, found one of 6: the log was rolled back"),
    ],
)
def test_a_fork_is_refused_and_kept_as_evidence(tmp_path: Path, size: int, old: int, says: str) -> None:
    witness = create(tmp_path / "w")
    show(witness, LEAVES, 9)
    with pytest.raises(VerificationError, match=says) as caught:
        show(witness, FORK, size, old=old)
    (file,) = witness.evidence
    assert str(file) in caught.value.hint
    content = file.read_bytes()
    assert sign_head(FORK[:size]) in content  # the log's own signature on the other branch
    assert parse_note(sign_head(LEAVES[:9])).text.encode() in content
    assert witness.last.size == 9
    assert isinstance(show(witness, LEAVES, 12), tuple)  # the branch it knows goes on


def test_a_branch_at_a_size_cosigned_before_is_a_fork(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    show(witness, LEAVES, 7)
    show(witness, LEAVES, 9)
    with pytest.raises(VerificationError, match="the log was rolled back"):
        show(witness, FORK, 7, old=0)
    assert parse_note(sign_head(LEAVES[:7])).text.encode() in witness.evidence[0].read_bytes()


def test_two_witnesses_apart_cosign_two_branches_and_then_neither_the_others(tmp_path: Path) -> None:
    """Why a quorum is needed: a witness that is kept alone cannot see a fork, two that talk can."""
    here, there = create(tmp_path / "here"), create(tmp_path / "there")
    assert isinstance(show(here, LEAVES, 9), tuple)
    assert isinstance(show(there, FORK, 9), tuple)
    for witness, leaves in ((here, FORK), (there, LEAVES)):
        with pytest.raises(VerificationError):
            show(witness, leaves, 12)


def test_what_the_log_did_not_sign_is_refused_and_is_no_evidence(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    for data in (
        sign_head(LEAVES[:3], signer="mallory"),
        sign_head(LEAVES[:3]).replace(b"\n3\n", b"\n4\n"),
    ):
        with pytest.raises(VerificationError):
            witness.add(data, 0, (), NOW)
    for data in (b"", b"text\n", sign_head(LEAVES[:3])[:-1]):
        with pytest.raises(ProtocolError):
            witness.add(data, 0, (), NOW)
    assert witness.evidence == ()
    assert witness.last.size == 0


def test_it_never_starts_again_in_silence(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    show(witness, LEAVES, 9)
    with pytest.raises(StateError, match="this site has a witness already"):
        create(tmp_path / "w")
    rewrite(tmp_path / "w", "UPDATE cosigned SET note = x'' WHERE size = 9")
    with pytest.raises(StateError, match="cannot be read"):
        show(witness, LEAVES, 12, old=0)
    rewrite(tmp_path / "w", "DELETE FROM cosigned")
    with pytest.raises(StateError, match="holds no checkpoint"):
        show(witness, LEAVES, 12, old=0)
    for file in (tmp_path / "w").glob("cosigned.db*"):
        file.unlink()
    for _ in range(2):  # also through the open file, which has no name any more
        with pytest.raises(StateError, match="cannot be read or written"):
            show(witness, LEAVES, 12, old=0)
    (tmp_path / "w" / "cosigned.db").touch()
    with pytest.raises(StateError, match="cannot be read or written"):
        show(witness, LEAVES, 12, old=0)
    shutil.rmtree(tmp_path / "w")
    with pytest.raises(StateError, match="cannot be read or written"):
        show(replace(witness), LEAVES, 12, old=0)


def test_a_changed_state_is_noticed(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    show(witness, LEAVES, 9)
    note = witness.notes()[-1].replace(b"\n9\n", b"\n8\n")
    rewrite(tmp_path / "w", f"UPDATE cosigned SET note = x'{note.hex()}' WHERE size = 9")  # noqa: S608
    with pytest.raises(StateError, match="cannot be read"):
        show(witness, LEAVES, 12, old=8)


# --- many checkpoints, and those of an earlier version ---------------------------------------------------------


def rewrite(directory: Path, sql: str) -> None:
    with closing(sqlite3.connect(directory / "cosigned.db")) as database, database:
        database.execute(sql)


def as_before(witness: Witness) -> None:
    """Turn a witness's directory into that of the version that kept a file for each checkpoint."""
    empty = Checkpoint(log_key().name, 0, EMPTY_ROOT).text.encode()
    notes = [empty, *witness.notes()]
    (witness.directory / "cosigned").mkdir()
    for note in notes:
        size = parse_note(note).text.splitlines()[1] if note != empty else 0
        (witness.directory / "cosigned" / f"{int(size):012d}").write_bytes(note)
    (witness.directory / "cosigned.db").unlink()


def test_a_witness_of_an_earlier_version_goes_on_and_that_version_does_not(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    for size in (3, 7, 9):
        show(witness, LEAVES, size)
    notes = witness.notes()
    as_before(witness)
    assert witness.last.size == 9
    assert witness.notes() == notes
    assert not (tmp_path / "w" / "cosigned").exists()
    with pytest.raises(VerificationError, match="the log was rolled back"):
        show(witness, FORK, 7, old=0)
    assert isinstance(show(witness, LEAVES, 12), tuple)


def test_a_crash_while_it_takes_over_loses_nothing(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    for size in (3, 9):
        show(witness, LEAVES, size)
    kept = (tmp_path / "w" / "cosigned.db").read_bytes()
    as_before(witness)
    (tmp_path / "w" / "cosigned.db").write_bytes(kept)  # it died before it removed the files
    assert [witness.last.size, len(witness.notes())] == [9, 2]
    assert not (tmp_path / "w" / "cosigned").exists()


def test_an_emptied_directory_of_an_earlier_version_is_no_new_witness(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    show(witness, LEAVES, 9)
    as_before(witness)
    for file in (tmp_path / "w" / "cosigned").iterdir():
        file.unlink()
    for _ in range(2):
        with pytest.raises(StateError, match="cannot be read or written"):
            show(witness, LEAVES, 12, old=0)


def test_ten_thousand_checkpoints_take_four_files_and_no_more_steps_than_ten(tmp_path: Path) -> None:
    witness = create(tmp_path / "w")
    frontier, key = Frontier(), private("log")
    few = steps_of(lambda: show(witness, LEAVES, 9))
    with Memory(tmp_path / "w", durable=False).rows(write=True) as memory:
        for size in range(1, 10_001):
            frontier, _ = frontier.append(leaf_hash(b"leaf %d" % size))
            if size in (10, 10_000):
                text = Checkpoint(log_key().name, size, frontier.root).text
                note = Note(text, (sign_note(text, log_key().name, key),)).encode()
            memory.keep(size, note if size >= 10 else b"")
    assert len(list((tmp_path / "w").iterdir())) <= 4
    assert witness.last.size == 10_000
    again = steps_of(lambda: witness.add(note, 0, (), NOW))
    assert again <= 2 * few


def steps_of(work: Callable[[], object]) -> int:
    """Return how many of Python's calls and of SQLite's steps, in hundreds, `work` takes."""
    count, connect = [0], sqlite3.connect

    def counted(*args: Any, **more: Any) -> sqlite3.Connection:
        database: sqlite3.Connection = connect(*args, **more)
        database.set_progress_handler(lambda: count.__setitem__(0, count[0] + 1), 100)
        return database

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", counted)
        sys.setprofile(lambda *event: count.__setitem__(0, count[0] + 1))
        try:
            work()
        finally:
            sys.setprofile(None)
    return count[0]


@settings(max_examples=25, deadline=None)
@given(shown=st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 40)), max_size=8))
def test_no_order_of_checkpoints_makes_it_cosign_two_branches(shown: list[tuple[bool, int, int]]) -> None:
    with TemporaryDirectory() as name, in_memory(Path(name)) as directory:
        cosigned = outcome(create(directory / "w"), shown)
    branches = {forked for forked, size in cosigned if size > 5}
    assert len(branches) <= 1
    assert [size for _, size in cosigned] == sorted(size for _, size in cosigned)


def outcome(witness: Witness, shown: list[tuple[bool, int, int]]) -> list[tuple[bool, int]]:
    """Show checkpoints of both branches; return those that were cosigned."""
    cosigned: list[tuple[bool, int]] = []
    for forked, size, old in shown:
        try:
            answer = show(witness, FORK if forked else LEAVES, size, old=old if old <= size else None)
        except PrivetError:
            continue
        if not isinstance(answer, Stale):
            cosigned.append((forked, size))
    return cosigned


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a child process and return the signal that ended it, or 0."""
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


@pytest.mark.parametrize("where", ["witness:checked", "witness:stored"])
def test_killed_anywhere_it_forgets_nothing_that_it_answered(tmp_path: Path, where: str) -> None:
    create(tmp_path / "w")

    def die(step: str) -> None:
        if step == where:
            os.kill(os.getpid(), signal.SIGKILL)

    witness = Witness(tmp_path / "w", log_key(), "oslo.example", private("witness oslo"))
    show(witness, LEAVES, 7)
    assert in_child(lambda: show(replace(witness, step=die), LEAVES, 9)) == signal.SIGKILL
    assert witness.last.size == (9 if where == "witness:stored" else 7)
    if where == "witness:stored":
        with pytest.raises(VerificationError):
            show(witness, FORK, 12)
    assert isinstance(show(witness, LEAVES, 12), tuple)
    assert witness.last.size == 12
