"""The tree is RFC 6962's: known answers, a real log's proofs, and a naive implementation of the RFC's own words."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.common.errors import PrivetError, ProtocolError, VerificationError
from privet.common.log import merkle, tiles
from privet.common.log.tiles import Tile

VECTORS = Path(__file__).parents[1] / "vectors" / "log"
KNOWN = json.loads((VECTORS / "rfc6962.json").read_text())
REAL = json.loads((VECTORS / "argon2020.json").read_text())


class Stored:
    """A tree in memory that counts what is read of it."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self.hashes: list[bytes] = []
        self.roots = [merkle.EMPTY_ROOT]
        self.reads = 0
        frontier = merkle.Frontier()
        for leaf in leaves:
            frontier, gained = frontier.append(merkle.leaf_hash(leaf))
            self.hashes += gained
            self.roots.append(frontier.root)

    def read(self, places: Sequence[int]) -> list[bytes]:
        self.reads += len(places)
        return [self.hashes[place] for place in places]


# RFC 6962, section 2.1, word for word


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def largest_power_below(n: int) -> int:
    k = 1
    while 2 * k < n:
        k *= 2
    return k


def mth(entries: Sequence[bytes]) -> bytes:
    if not entries:
        return sha256(b"")
    if len(entries) == 1:
        return sha256(b"\x00" + entries[0])
    k = largest_power_below(len(entries))
    return sha256(b"\x01" + mth(entries[:k]) + mth(entries[k:]))


def path(m: int, entries: Sequence[bytes]) -> list[bytes]:
    if len(entries) == 1:
        return []
    k = largest_power_below(len(entries))
    if m < k:
        return [*path(m, entries[:k]), mth(entries[k:])]
    return [*path(m - k, entries[k:]), mth(entries[:k])]


def subproof(m: int, entries: Sequence[bytes], known: bool) -> list[bytes]:
    if m == len(entries):
        return [] if known else [mth(entries)]
    k = largest_power_below(len(entries))
    if m <= k:
        return [*subproof(m, entries[:k], known), mth(entries[k:])]
    return [*subproof(m - k, entries[k:], False), mth(entries[:k])]


LEAVES = [bytes([i % 256, i // 256]) for i in range(600)]
TREE = Stored(LEAVES)
sizes = st.integers(0, len(LEAVES))


# Known answers


def test_roots_of_the_certificate_transparency_reference() -> None:
    leaves = [bytes.fromhex(leaf) for leaf in KNOWN["leaves"]]
    stored = Stored(leaves)
    for size, expected in enumerate(KNOWN["roots"]):
        assert stored.roots[size].hex() == merkle.root(size, stored.read).hex() == expected
        assert mth(leaves[:size]).hex() == expected


def test_proofs_of_the_certificate_transparency_reference() -> None:
    leaves = [bytes.fromhex(leaf) for leaf in KNOWN["leaves"]]
    stored = Stored(leaves)
    for case in KNOWN["inclusion"]:
        proof = merkle.prove_inclusion(case["index"], case["size"], stored.read)
        assert [value.hex() for value in proof] == case["proof"]
        leaf = merkle.leaf_hash(leaves[case["index"]])
        merkle.check_inclusion(proof, case["index"], case["size"], stored.roots[case["size"]], leaf)
    for case in KNOWN["consistency"]:
        proof = merkle.prove_consistency(case["old"], case["new"], stored.read)
        assert [value.hex() for value in proof] == case["proof"]
        old, new = case["old"], case["new"]
        merkle.check_consistency(proof, old, stored.roots[old], new, stored.roots[new])


def decode(values: list[str]) -> tuple[bytes, ...]:
    return tuple(base64.b64decode(value) for value in values)


def test_proofs_of_a_real_certificate_transparency_log_hold() -> None:
    root, old_root, data = decode([REAL["root"], REAL["old_root"], REAL["leaf"]])
    inclusion, consistency = decode(REAL["inclusion"]), decode(REAL["consistency"])
    leaf = merkle.leaf_hash(data)
    merkle.check_inclusion(inclusion, REAL["index"], REAL["size"], root, leaf)
    merkle.check_consistency(consistency, REAL["old_size"], old_root, REAL["size"], root)
    with pytest.raises(VerificationError, match="expected root"):
        merkle.check_inclusion(inclusion, REAL["index"], REAL["size"], root, merkle.leaf_hash(data[:-1]))
    with pytest.raises(VerificationError):
        merkle.check_inclusion(inclusion, REAL["index"] + 1, REAL["size"], root, leaf)
    with pytest.raises(VerificationError):
        merkle.check_consistency(consistency, REAL["old_size"] + 1, old_root, REAL["size"], root)


# Against the RFC's own words


@given(sizes)
def test_roots_and_stored_hashes_are_those_of_the_rfc(size: int) -> None:
    assert TREE.roots[size] == merkle.root(size, TREE.read) == mth(LEAVES[:size])
    assert merkle.frontier(size, TREE.read).size == size
    assert len(Stored(LEAVES[:size]).hashes) == merkle.stored_count(size)


@given(st.integers(0, 9), st.integers(0, 599))
def test_a_stored_hash_is_that_of_its_subtree(level: int, number: int) -> None:
    low, high = number << level, (number + 1) << level
    if high <= len(LEAVES):
        assert TREE.hashes[merkle.stored_index(level, number)] == mth(LEAVES[low:high])


@given(st.data())
def test_proofs_are_those_of_the_rfc_and_hold(data: st.DataObject) -> None:
    new = data.draw(st.integers(1, len(LEAVES)))
    index, old = data.draw(st.integers(0, new - 1)), data.draw(st.integers(0, new))
    TREE.reads = 0
    proof = merkle.prove_inclusion(index, new, TREE.read)
    assert TREE.reads <= new.bit_length() ** 2  # never the whole tree
    assert list(proof) == path(index, LEAVES[:new])
    merkle.check_inclusion(proof, index, new, TREE.roots[new], merkle.leaf_hash(LEAVES[index]))
    proof = merkle.prove_consistency(old, new, TREE.read)
    assert list(proof) == (subproof(old, LEAVES[:new], True) if old else [])
    merkle.check_consistency(proof, old, TREE.roots[old], new, TREE.roots[new])


def test_every_proof_of_every_small_tree_holds() -> None:
    for new in range(41):
        for index in range(new):
            proof = merkle.prove_inclusion(index, new, TREE.read)
            merkle.check_inclusion(proof, index, new, TREE.roots[new], merkle.leaf_hash(LEAVES[index]))
        for old in range(new + 1):
            proof = merkle.prove_consistency(old, new, TREE.read)
            merkle.check_consistency(proof, old, TREE.roots[old], new, TREE.roots[new])


def test_a_grown_tree_is_the_same_as_one_taken_up_from_storage() -> None:
    for size in range(0, 600, 7):
        grown, gained = merkle.frontier(size, TREE.read).append(merkle.leaf_hash(LEAVES[size]))
        assert grown.root == TREE.roots[size + 1]
        assert list(gained) == TREE.hashes[merkle.stored_count(size) : merkle.stored_count(size + 1)]


# Proofs of what is not so


@given(st.data())
def test_no_inclusion_proof_holds_for_anything_else(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.prove_inclusion(index, size, TREE.read)
    other_index = data.draw(st.integers(-1, size + 1).filter(lambda i: i != index))
    leaf, root = merkle.leaf_hash(LEAVES[index]), TREE.roots[size]
    changed = (*proof[:-1], merkle.leaf_hash(b"other")) if proof else (root,)
    for args in [
        (changed, index, size, root, leaf),
        (proof[:-1], index, size, root, leaf) if proof else (proof, 1, size, root, leaf),
        ((*proof, root), index, size, root, leaf),
        ((root, *proof), index, size, root, leaf),
        (proof, other_index, size, root, leaf),
        (proof, index, size, root, merkle.leaf_hash(b"other")),
        (proof, index, size, TREE.roots[size - 1], leaf),
    ]:
        with pytest.raises(VerificationError):
            merkle.check_inclusion(*args)


@given(st.data())
def test_no_consistency_proof_holds_for_anything_else(data: st.DataObject) -> None:
    new = data.draw(st.integers(2, 200))
    old = data.draw(st.integers(1, new - 1))
    proof = merkle.prove_consistency(old, new, TREE.read)
    old_root, new_root = TREE.roots[old], TREE.roots[new]
    fork = merkle.leaf_hash(b"fork")
    at = data.draw(st.integers(0, len(proof) - 1))
    for args in [
        ((*proof[:at], fork, *proof[at + 1 :]), old, old_root, new, new_root),
        (proof[:-1], old, old_root, new, new_root),
        ((*proof, fork), old, old_root, new, new_root),
        (proof, old, fork, new, new_root),
        (proof, old, old_root, new, fork),
        (proof, new, new_root, old, old_root),
        ((), old, old_root, new, new_root),
    ]:
        with pytest.raises(VerificationError):
            merkle.check_consistency(*args)


def test_a_proof_has_the_length_that_its_tree_demands_whatever_the_root() -> None:
    """Roots chosen to fit a proof that is too short or too long: the shape of the tree decides, not the hash."""
    leaf, extra = merkle.leaf_hash(LEAVES[0]), merkle.leaf_hash(b"extra")
    with pytest.raises(VerificationError, match="too few"):
        merkle.check_inclusion((), 0, 2, leaf, leaf)
    for root in (merkle.node_hash(leaf, extra), merkle.node_hash(extra, leaf)):
        with pytest.raises(VerificationError, match="too many"):
            merkle.check_inclusion((extra,), 0, 1, root, leaf)
    with pytest.raises(VerificationError, match="too few"):
        merkle.check_consistency((), 2, leaf, 3, leaf)
    proof = (*merkle.prove_consistency(3, 5, TREE.read), extra)
    old, new = TREE.roots[3], TREE.roots[5]
    for old_root, new_root in [
        (merkle.node_hash(extra, old), merkle.node_hash(extra, new)),
        (old, merkle.node_hash(new, extra)),
    ]:
        with pytest.raises(VerificationError, match="too many"):
            merkle.check_consistency(proof, 3, old_root, 5, new_root)


def test_the_empty_tree_and_the_tree_itself_need_no_proof_and_take_none() -> None:
    empty, root = merkle.EMPTY_ROOT, TREE.roots[5]
    merkle.check_consistency((), 0, empty, 5, root)
    merkle.check_consistency((), 5, root, 5, root)
    for proof, old, old_root in [((root,), 0, empty), ((), 0, root), ((root,), 5, root), ((), 5, empty)]:
        with pytest.raises(VerificationError, match="expected no hashes and root"):
            merkle.check_consistency(proof, old, old_root, 5, root)


def test_another_branch_has_no_consistency_proof() -> None:
    fork = Stored([*LEAVES[:10], b"other", *LEAVES[11:20]])
    proof = merkle.prove_consistency(11, 20, fork.read)
    merkle.check_consistency(proof, 11, fork.roots[11], 20, fork.roots[20])
    with pytest.raises(VerificationError, match="consistency proof of 11 and 20 leaves: expected roots"):
        merkle.check_consistency(proof, 11, TREE.roots[11], 20, fork.roots[20])


def test_leaves_and_nodes_are_never_confused() -> None:
    left, right = merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")
    assert merkle.leaf_hash(left + right) != merkle.node_hash(left, right)


@given(st.lists(st.binary(max_size=40), max_size=70), st.integers(-3, 2**60), st.integers(-3, 2**60), st.binary())
def test_checks_raise_nothing_but_our_errors(proof: list[bytes], first: int, second: int, value: bytes) -> None:
    with suppress(VerificationError):
        merkle.check_inclusion(tuple(proof), first, second, value, value)
    with suppress(VerificationError):
        merkle.check_consistency(tuple(proof), first, value, second, value)


def test_what_a_tree_does_not_have_cannot_be_proved() -> None:
    for index, size in [(5, 5), (-1, 5), (0, 0)]:
        with pytest.raises(ProtocolError, match="has no leaf"):
            merkle.prove_inclusion(index, size, TREE.read)
    with pytest.raises(ProtocolError, match="of 5 leaves never had 6 leaves"):
        merkle.prove_consistency(6, 5, TREE.read)


# Tiles


def test_paths_are_those_of_the_specification() -> None:
    assert Tile(0, 1234067).path == "tile/0/x001/x234/067"
    assert Tile(None, 0, 17).path == "tile/entries/000.p/17"
    # C2SP tlog-tiles, section Partial Tiles: a tree of size 70,000, and one of size 256.
    widths: dict[int | None, list[int]] = {}
    for tile in tiles.tiles(70_000):
        widths.setdefault(tile.level, []).append(tile.width)
    assert widths == {None: [256] * 273 + [112], 0: [256] * 273 + [112], 1: [256, 17], 2: [1]}
    assert {tile.path for tile in tiles.tiles(256)} == {"tile/entries/000", "tile/0/000", "tile/1/000.p/1"}
    assert list(tiles.tiles(0)) == []


@given(st.none() | st.integers(0, 63), st.integers(0, 2**40), st.integers(1, 256))
def test_a_path_is_read_back(level: int | None, number: int, width: int) -> None:
    tile = Tile(level, number, width)
    assert Tile.parse(tile.path) == tile


@pytest.mark.parametrize(
    "wrong",
    [
        "tile/0/00",
        "tile/0/x000/001",
        "tile/00/000",
        "tile/64/000",
        "tile/0/000.p/0",
        "tile/0/000.p/256",
        "tile/0/000.p/01",
        "tile/0/../000",
        "/tile/0/000",
        "tile/0/000\n",
        "tile/-1/000",
        "tile/0/\u0660\u0660\u0660",
        "tile/data/000",
        "checkpoint",
        "",
    ],
)
def test_other_paths_are_refused(wrong: str) -> None:
    with pytest.raises(ProtocolError):
        Tile.parse(wrong)


@given(st.text(max_size=60))
def test_no_text_makes_the_path_parser_fail(text: str) -> None:
    with suppress(ProtocolError):
        assert Tile.parse(text).path == text


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 600])
def test_a_log_is_read_back_from_its_files(size: int) -> None:
    files: dict[str, bytes] = {}
    for tile in tiles.tiles(size):
        first = tile.number * tiles.WIDTH
        files[tile.path] = (
            tiles.bundle_bytes(LEAVES[first : first + tile.width])
            if tile.level is None
            else tiles.tile_bytes(tile, TREE.read)
        )
    assert list(tiles.read_leaves(size, files.__getitem__)) == LEAVES[:size]
    hashes = list(tiles.read_leaf_hashes(size, files.__getitem__))
    assert hashes == [merkle.leaf_hash(leaf) for leaf in LEAVES[:size]]
    # A hash of level 1 is the root over a full tile.
    if size >= 256:
        assert files["tile/1/000.p/" + str(size // 256)][:32] == mth(LEAVES[:256])


@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=5))
def test_a_bundle_is_taken_apart_into_its_leaves_and_nothing_else(leaves: list[bytes]) -> None:
    data = tiles.bundle_bytes(leaves)
    tile = Tile(None, 0, len(leaves))
    assert tiles.read_bundle(tile, data) == tuple(leaves)
    fewer = tiles.bundle_bytes(leaves[:-1])
    for wrong in (data[:-1], data + b"\x00", data + b"\x00\x01x", b"\x00\x00" + data, fewer):
        with pytest.raises(VerificationError, match="tile/entries/000"):
            tiles.read_bundle(tile, wrong)


@settings(max_examples=300)
@given(st.binary(max_size=600), st.integers(1, 256))
def test_no_bytes_make_the_bundle_parser_fail(data: bytes, width: int) -> None:
    with suppress(PrivetError):
        assert tiles.bundle_bytes(tiles.read_bundle(Tile(None, 0, width), data)) == data


def test_leaves_have_a_size_that_a_bundle_can_say() -> None:
    assert len(tiles.bundle_bytes([b"x" * 65_535])) == 65_537
    for leaf in (b"", b"x" * 65_536):
        with pytest.raises(ProtocolError, match="1 to 65535 bytes"):
            tiles.bundle_bytes([leaf])
    with pytest.raises(VerificationError, match="must have 32 bytes"):
        list(tiles.read_leaf_hashes(1, lambda name: bytes(31)))
