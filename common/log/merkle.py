"""Merkle trees of RFC 6962 as pure functions: hashes, proofs and their checks.

A tree is stored as one growing list of hashes, in the order in which they become known: the hash of each leaf,
followed by those of the perfect subtrees that it completes. The list of a tree of n leaves has 2n - popcount(n)
hashes, and none of them ever changes. Root and proofs need O(log n) of them. A `HashReader` fetches hashes from
wherever the list is stored.

Leaves are numbered from 0, a size is a number of leaves, and a hash has 32 bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from privet.common.errors import ProtocolError, VerificationError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
_UNTRUSTED = (
    "get the proof and the checkpoint again; if they still differ, do not trust the log and tell the other sites"
)
"""Root of the tree without leaves (RFC 6962, section 2.1)."""

HashProof = tuple[bytes, ...]
HashReader = Callable[[Sequence[int]], Sequence[bytes]]
"""Returns the hashes at these places of the list, in the given order."""


def leaf_hash(leaf: bytes) -> bytes:
    """Return the hash of a leaf (RFC 6962, section 2.1). The prefix separates leaves from nodes."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of a node over its two children (RFC 6962, section 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


# The list of hashes


def stored_count(size: int) -> int:
    """Return how many hashes the list of a tree of `size` leaves holds."""
    return 2 * size - size.bit_count()


def stored_index(level: int, number: int) -> int:
    """Return the place of the hash over leaves `number * 2^level` to `(number + 1) * 2^level`, exclusive."""
    last_leaf = ((number + 1) << level) - 1
    return stored_count(last_leaf) + level


@dataclass(frozen=True)
class Frontier:
    """The hashes that a tree needs to grow: the roots of its perfect subtrees, largest first.

    Attributes:
        size: Number of leaves.
        roots: One for each bit that is set in `size`.
    """

    size: int = 0
    roots: tuple[bytes, ...] = ()

    def append(self, leaf: bytes) -> tuple[Frontier, tuple[bytes, ...]]:
        """Add the leaf with this hash. Return the new frontier and the hashes to append to the list."""
        gained, roots, size = [leaf], list(self.roots), self.size
        while size & 1:  # each trailing one bit is a subtree that the new leaf completes
            gained.append(node_hash(roots.pop(), gained[-1]))
            size >>= 1
        return Frontier(self.size + 1, (*roots, gained[-1])), tuple(gained)

    @property
    def root(self) -> bytes:
        """Root of the tree."""
        return _fold(self.roots) if self.roots else EMPTY_ROOT


def frontier(size: int, read: HashReader) -> Frontier:
    """Read the frontier of a tree of `size` leaves from its list."""
    return Frontier(size, tuple(read(_subtrees(0, size))))


def root(size: int, read: HashReader) -> bytes:
    """Return the root of the tree of the first `size` leaves."""
    return frontier(size, read).root


def _subtrees(low: int, high: int) -> list[int]:
    """Return the places of the perfect subtrees that make up leaves low to high, largest first."""
    places = []
    while low < high:
        level = (high - low).bit_length() - 1
        places.append(stored_index(level, low >> level))
        low += 1 << level
    return places


def _fold(hashes: Sequence[bytes]) -> bytes:
    """Hash perfect subtrees, largest first, into one root."""
    result = hashes[-1]
    for left in reversed(hashes[:-1]):
        result = node_hash(left, result)
    return result


def _range_root(low: int, high: int, read: HashReader) -> bytes:
    """Return the root over leaves low to high, a subtree of RFC 6962."""
    return _fold(read(_subtrees(low, high)))


# Proofs


def prove_inclusion(index: int, size: int, read: HashReader) -> HashProof:
    """Prove that leaf `index` is in the tree of `size` leaves: PATH of RFC 6962, section 2.1.1.

    Returns:
        At most 64 hashes, from the leaf's sibling up to a child of the root.

    Raises:
        ProtocolError: The tree has no such leaf.
    """
    if not 0 <= index < size:
        raise ProtocolError(
            f"the round log of {size} leaves has no leaf {index}",
            "give a leaf number from 0 to below the number of leaves",
        )
    low, high, path = 0, size, []
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            path.append((middle, high))
            high = middle
        else:
            path.append((low, middle))
            low = middle
    return tuple(_range_root(a, b, read) for a, b in reversed(path))


def prove_consistency(old: int, new: int, read: HashReader) -> HashProof:
    """Prove that the tree of `old` leaves is a prefix of that of `new`: PROOF of RFC 6962, section 2.1.2.

    Empty if `old` is 0 or `new`.

    Raises:
        ProtocolError: The old tree is larger than the new one.
    """
    if not 0 <= old <= new:
        raise ProtocolError(
            f"a round log of {new} leaves never had {old} leaves", "give an old size from 0 to the new size"
        )
    if old in (0, new):
        return ()
    low, high, path = 0, new, []
    while old != high:
        middle = low + _split(high - low)
        if old <= middle:
            path.append((middle, high))
            high = middle
        else:
            path.append((low, middle))
            low = middle
    if low > 0:  # SUBPROOF with b false: the verifier does not have this subtree's root
        path.append((low, high))
    return tuple(_range_root(a, b, read) for a, b in reversed(path))


def _split(size: int) -> int:
    """Return the largest power of two below `size`, at least 2: k of RFC 6962, section 2.1."""
    return 1 << ((size - 1).bit_length() - 1)


# Checks. They follow RFC 9162, which gives them as loops, and share no code with the proofs above.


def check_inclusion(proof: HashProof, index: int, size: int, tree_root: bytes, leaf: bytes) -> None:
    """Check that the leaf with the hash `leaf` has the number `index` in a tree (RFC 9162, section 2.1.3.2).

    Raises:
        VerificationError: The proof does not prove it.
    """
    if not 0 <= index < size:
        raise VerificationError(f"inclusion proof: the round log of {size} leaves has no leaf {index}", _UNTRUSTED)
    _check_hashes(proof)
    node, last, result = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise VerificationError(
                f"inclusion proof of leaf {index} in {size} leaves: it has too many hashes", _UNTRUSTED
            )
        if node & 1 or node == last:
            result = node_hash(sibling, result)
            node, last = _up(node, last)
        else:
            result = node_hash(result, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise VerificationError(f"inclusion proof of leaf {index} in {size} leaves: it has too few hashes", _UNTRUSTED)
    if result != tree_root:
        raise VerificationError(
            f"inclusion proof of leaf {index} in {size} leaves: expected root {tree_root.hex()}, the proof gives "
            f"{result.hex()}",
            _UNTRUSTED,
        )


def check_consistency(proof: HashProof, old: int, old_root: bytes, new: int, new_root: bytes) -> None:
    """Check that a tree is a prefix of another (RFC 9162, section 2.1.4.2).

    Raises:
        VerificationError: The proof does not prove it.
    """
    if not 0 <= old <= new:
        raise VerificationError(
            f"consistency proof: a log of {old} leaves cannot have grown to {new} leaves", _UNTRUSTED
        )
    _check_hashes(proof)
    if old in (0, new):
        expected = EMPTY_ROOT if old == 0 else new_root
        if proof or old_root != expected:
            raise VerificationError(
                f"consistency proof of {old} and {new} leaves: expected no hashes and root {expected.hex()} at {old} "
                "leaves, "
                f"got {len(proof)} hashes and root {old_root.hex()}",
                _UNTRUSTED,
            )
        return
    # If `old` is a power of two, its root is a node of the new tree, and the proof leaves it out.
    path = proof if old & (old - 1) else (old_root, *proof)
    if not path:
        raise VerificationError(f"consistency proof of {old} and {new} leaves: it has too few hashes", _UNTRUSTED)
    node, last = _up(old - 1, new - 1, while_odd=True)
    old_result = new_result = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise VerificationError(f"consistency proof of {old} and {new} leaves: it has too many hashes", _UNTRUSTED)
        if node & 1 or node == last:
            old_result, new_result = node_hash(sibling, old_result), node_hash(sibling, new_result)
            node, last = _up(node, last)
        else:
            new_result = node_hash(new_result, sibling)
        node, last = node >> 1, last >> 1
    if last != 0:
        raise VerificationError(f"consistency proof of {old} and {new} leaves: it has too few hashes", _UNTRUSTED)
    if (old_result, new_result) != (old_root, new_root):
        raise VerificationError(
            f"consistency proof of {old} and {new} leaves: expected roots {old_root.hex()} and {new_root.hex()}, "
            f"the proof gives {old_result.hex()} and {new_result.hex()}",
            _UNTRUSTED,
        )


def _up(node: int, last: int, *, while_odd: bool = False) -> tuple[int, int]:
    """Climb while `node` is a left child (or, with `while_odd`, a right one), to a node that has a sibling."""
    while (node & 1) == while_odd and node != 0:
        node, last = node >> 1, last >> 1
    return node, last


def _check_hashes(proof: HashProof) -> None:
    if len(proof) > 64 or any(len(value) != HASH_BYTES for value in proof):
        raise VerificationError(
            f"a proof of the round log must have at most 64 hashes, each of {HASH_BYTES} bytes", _UNTRUSTED
        )
