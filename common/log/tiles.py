"""The log as plain files (C2SP tlog-tiles), which any web server or archive can hold.

``tile/<L>/<N>[.p/<W>]`` holds up to 256 consecutive hashes of level 8L of the tree. ``tile/entries/<N>[.p/<W>]``
holds the leaves, each after its length. The name of a file fixes its content for ever, so no file is written
twice. Only the file ``checkpoint`` beside them changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from privet.common.errors import ProtocolError, VerificationError
from privet.common.log.merkle import HASH_BYTES, HashReader, stored_index

WIDTH = 256
"""Number of hashes in a full tile, and of leaves in a full bundle."""
MAX_LEAF_BYTES = 65_535
"""Largest leaf, in bytes: the length before a leaf has 16 bits."""

_LEVEL_BITS = 8
_COPY = "get the file of the log again: it is damaged, or the log was changed"
_PATH = re.compile(r"tile/(entries|0|[1-9][0-9]?)/((?:x[0-9]{3}/)*[0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?", re.ASCII)

Fetch = Callable[[str], bytes]
"""Returns the content of a file of the log by its path, such as ``tile/0/000``."""


@dataclass(frozen=True)
class Tile:
    """One file of the log.

    Attributes:
        level: L; None for a bundle of leaves.
        number: N, counted along the level.
        width: Number of hashes or leaves in it, 1 to 256. Below 256 it is partial.
    """

    level: int | None
    number: int
    width: int = WIDTH

    @property
    def path(self) -> str:
        """Path of the file in the log's directory."""
        groups = [f"{self.number % 1000:03d}"]
        rest = self.number // 1000
        while rest:
            groups.insert(0, f"x{rest % 1000:03d}")
            rest //= 1000
        partial = "" if self.width == WIDTH else f".p/{self.width}"
        return f"tile/{'entries' if self.level is None else self.level}/{'/'.join(groups)}{partial}"

    @classmethod
    def parse(cls, path: str) -> Tile:
        """Read a path. Each file has exactly one.

        Raises:
            ProtocolError: It is not the path of a tile or bundle.
        """
        match = _PATH.fullmatch(path)
        if match:
            level, number, width = match.groups()
            tile = cls(
                None if level == "entries" else int(level),
                int(re.sub("[x/]", "", number)),
                int(width) if width else WIDTH,
            )
            if tile.path == path and (tile.level or 0) <= 63:
                return tile
        raise ProtocolError(
            f"{path[:80]!r} is not the path of a tile (a file of the published round log)",
            "give a path such as tile/0/x001/234.p/17",
        )


def tiles(size: int) -> Iterator[Tile]:
    """Yield every file of a log of `size` leaves, except the checkpoint."""
    yield from _row(None, size)
    level, count = 0, size
    while count:
        yield from _row(level, count)
        level, count = level + 1, count >> _LEVEL_BITS


def bundles(size: int) -> Iterator[Tile]:
    """Yield the bundles that hold the leaves of a log of `size` leaves, in order."""
    return _row(None, size)


def _row(level: int | None, count: int) -> Iterator[Tile]:
    full, rest = divmod(count, WIDTH)
    yield from (Tile(level, number) for number in range(full))
    if rest:
        yield Tile(level, full, rest)


def tile_bytes(tile: Tile, read: HashReader) -> bytes:
    """Return the content of a tile of hashes: `width` hashes of 32 bytes."""
    if tile.level is None:
        raise ProtocolError(f"the tile {tile.path} holds leaves, expected one of hashes", "report this as a bug")
    first = tile.number * WIDTH
    level = tile.level * _LEVEL_BITS
    return b"".join(read([stored_index(level, first + i) for i in range(tile.width)]))


def bundle_bytes(leaves: Iterable[bytes]) -> bytes:
    """Return the content of a bundle: each leaf after its length in two bytes, big-endian.

    Raises:
        ProtocolError: A leaf is longer than 65 535 bytes.
    """
    parts = []
    for leaf in leaves:
        check_leaf(leaf)
        parts += [len(leaf).to_bytes(2, "big"), leaf]
    return b"".join(parts)


def check_leaf(leaf: bytes) -> None:
    """Raise `ProtocolError` unless a leaf fits a bundle."""
    if not 1 <= len(leaf) <= MAX_LEAF_BYTES:
        raise ProtocolError(
            f"a leaf of the round log must have 1 to {MAX_LEAF_BYTES} bytes, got {len(leaf)}",
            "write a digest to the log, and keep the content outside it",
        )


def read_bundle(tile: Tile, data: bytes) -> tuple[bytes, ...]:
    """Take a bundle apart into its `width` leaves.

    Raises:
        VerificationError: It holds another number of leaves, or bytes that belong to no leaf.
    """
    leaves: list[bytes] = []
    at = 0
    while at < len(data) and len(leaves) <= tile.width:
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        if end == at + 2 or end > len(data):
            raise VerificationError(f"the log file {tile.path}: leaf {len(leaves)} in it is empty or cut off", _COPY)
        leaves.append(data[at + 2 : end])
        at = end
    if len(leaves) != tile.width:
        raise VerificationError(
            f"the log file {tile.path} must hold {tile.width} leaves, found {len(leaves)} or more", _COPY
        )
    return tuple(leaves)


def read_leaves(size: int, fetch: Fetch) -> Iterator[bytes]:
    """Yield the leaves of a log of `size` leaves from its files. Raises as `read_bundle` and as `fetch`."""
    for bundle in bundles(size):
        yield from read_bundle(bundle, fetch(bundle.path))


def read_leaf_hashes(size: int, fetch: Fetch) -> Iterator[bytes]:
    """Yield the hash of each leaf as the tiles state it.

    Raises:
        VerificationError: A tile does not have the length that its name says.
    """
    for tile in _row(0, size):
        data = fetch(tile.path)
        if len(data) != tile.width * HASH_BYTES:
            raise VerificationError(
                f"the log file {tile.path} must have {tile.width * HASH_BYTES} bytes, found {len(data)}", _COPY
            )
        yield from (data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES))
