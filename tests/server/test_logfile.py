"""Reading the log beside its writer: what was committed, proofs that verify, and nothing that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from privet.client.rounds.witness import Stale, Witness
from privet.common.errors import ProtocolError, StateError
from privet.common.log.checkpoint import open_checkpoint
from privet.common.log.merkle import check_consistency, check_inclusion, leaf_hash
from privet.common.log.note import parse_note
from privet.server.log.logfile import LogFile
from privet.server.log.roundlog import RoundLog, create_log, log_file, open_log
from tests.support.log_world import ORIGIN, in_memory, log_key, private, sign_head, story, witness_key

WORLD = story()
LEAVES = WORLD.leaves
NOW = 1_800_000_000


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundLog]:
    """A log of the whole story, held open by its writer; its checkpoint has no cosignatures. Read only."""
    with in_memory(tmp_path_factory.mktemp("log")) as directory:
        create_log(directory)
        with open_log(directory, ORIGIN, private("log")) as log:
            log.append(LEAVES)
            log.checkpoint()
            yield log


@pytest.fixture
def reader(log: RoundLog) -> LogFile:
    return LogFile(log.directory)


def test_an_empty_log_has_no_leaves_and_no_checkpoint() -> None:
    with TemporaryDirectory() as folder:
        create_log(Path(folder))
        empty = LogFile(Path(folder))
        assert (empty.size(), empty.checkpoint(), empty.leaves(0, 9, 10**6)) == (0, b"", [])


def test_what_was_committed_is_seen_while_the_writer_holds_the_log(reader: LogFile) -> None:
    assert reader.size() == len(LEAVES)
    assert reader.leaves(0, len(LEAVES) + 5, 10**9) == LEAVES
    assert reader.checkpoint() == sign_head(LEAVES)


def test_leaves_are_limited_by_number_and_by_bytes_but_one_is_always_given(reader: LogFile) -> None:
    assert reader.leaves(3, 2, 10**9) == LEAVES[3:5]
    assert reader.leaves(len(LEAVES), 5, 10**9) == []
    two = len(LEAVES[4]) + len(LEAVES[5])
    assert reader.leaves(4, 9, two) == LEAVES[4:6]
    assert reader.leaves(4, 9, two - 1) == LEAVES[4:5]
    assert reader.leaves(4, 9, 0) == LEAVES[4:5]  # a site that asks for one leaf gets on, however long it is


def test_proofs_between_any_two_sizes_verify(reader: LogFile) -> None:
    for new in range(1, len(LEAVES) + 1):
        for old in range(1, new + 1):
            check_consistency(reader.consistency(old, new), old, WORLD.roots[old], new, WORLD.roots[new])
        for index in range(new):
            check_inclusion(reader.inclusion(index, new), index, new, WORLD.roots[new], leaf_hash(LEAVES[index]))


def test_no_proof_is_made_of_leaves_that_are_not_there(reader: LogFile) -> None:
    size = len(LEAVES)
    for old, new in ((1, size + 1), (size + 1, size + 1), (3, 2)):
        with pytest.raises(ProtocolError, match="log"):
            reader.consistency(old, new)
    for index, of in ((0, size + 1), (size, size), (5, 5), (7, 3)):
        with pytest.raises(ProtocolError, match="log"):
            reader.inclusion(index, of)


def test_a_checkpoint_comes_with_the_cosignatures_it_has_so_far(tmp_path: Path) -> None:
    reader = LogFile(tmp_path / "log")
    create_log(reader.directory)
    with open_log(reader.directory, ORIGIN, private("log")) as log:
        log.append(LEAVES[:5])
        log.checkpoint()
        for number, site in enumerate(WORLD.sites):
            assert len(parse_note(reader.checkpoint()).signatures) == 1 + number
            key = witness_key(site)
            witness = Witness.create(tmp_path / site, log_key(), key.name, private(f"witness {site}"))
            answer = witness.add(log.checkpoint(), 0, log.prove_consistency(0, 5), NOW)
            assert not isinstance(answer, Stale)
            log.cosign(5, answer, WORLD.policy)
        note = reader.checkpoint()
        assert {signature.name for signature in parse_note(note).signatures} == {
            ORIGIN,
            *(witness_key(site).name for site in WORLD.sites),
        }
        assert open_checkpoint(note, log_key())[0].root == WORLD.roots[5]
        log.append(LEAVES[5:7])
        assert reader.checkpoint() == note  # the newest that was signed, until there is a newer one
        log.checkpoint()
        assert open_checkpoint(reader.checkpoint(), log_key())[0].size == 7


def test_what_is_no_log_is_an_error_and_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=str(tmp_path)):
        LogFile(tmp_path).size()
    assert list(tmp_path.iterdir()) == []
    log_file(tmp_path).write_bytes(b"no database" * 100)
    for ask in (LogFile.size, LogFile.checkpoint):
        with pytest.raises(StateError, match=str(tmp_path)):
            ask(LogFile(tmp_path))


def test_reading_writes_nothing(reader: LogFile) -> None:
    before = {path.name: path.read_bytes() for path in reader.directory.iterdir()}
    reader.leaves(0, 3, 10**6)
    reader.checkpoint()
    reader.consistency(1, 5)
    assert {path.name: path.read_bytes() for path in reader.directory.iterdir()} == before
