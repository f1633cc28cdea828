"""A message together with its small parts, in one request.

Flower's own calls carry a message's header and each of its parts in requests of their own: some nine for a message and
its answer. A site that has little to say between institutions then waits for requests, and not for arithmetic. The two
calls here carry the same content in one request each. Large parts still travel by themselves, so that an interrupted
transfer goes on with the next part.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import DecodeError

TAKE, GIVE = "/v1/privet/take", "/v1/privet/give"
"""Paths of the two calls: a site takes its next message, and gives its answer."""
INLINE = 2**18
"""A part of at least this many bytes travels by itself."""
_LENGTH = 4
_MOST_PIECES = 8


class Bundle:
    """Pieces of bytes, each after its length in four bytes, big-endian.

    It has the methods of a message of Protocol Buffers that Flower's HTTP client calls.
    """

    def __init__(self, pieces: Iterable[bytes] = ()) -> None:
        self.pieces = tuple(pieces)

    def SerializeToString(self, deterministic: bool = True) -> bytes:  # noqa: N802 - Flower's client calls it
        """Return the bundle's bytes; there is only one form."""
        return b"".join(len(piece).to_bytes(_LENGTH, "big") + piece for piece in self.pieces)

    def ParseFromString(self, data: bytes) -> None:  # noqa: N802 - Flower's client calls it
        """Take the pieces of a bundle's bytes.

        Raises:
            DecodeError: The bytes are no bundle, or one of more pieces than a message needs.
        """
        pieces, start = list[bytes](), 0
        while start < len(data):
            first = start + _LENGTH
            end = first + int.from_bytes(data[start:first], "big")
            if end > len(data) or first > len(data) or len(pieces) == _MOST_PIECES:
                raise DecodeError("not a bundle")
            pieces.append(data[first:end])
            start = end
        self.pieces = tuple(pieces)
