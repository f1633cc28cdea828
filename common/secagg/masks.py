"""The keys of a round, and the masks that are added to a vector in place.

Every key is HKDF-SHA256 (RFC 5869) of what two sites agreed on, or of a random seed. The salt is the roster's
digest, which fixes session, round, parameters, identities and all public keys. The info names the purpose and the
sites. So no key serves two purposes, two pairs, two directions or two vectors, and each key is used once: the fixed
initial counter of AES-256-CTR and the fixed nonce of AES-256-GCM never repeat under one key.
"""

from __future__ import annotations

import copy
import hmac
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from privet.common.errors import ProtocolError, VerificationError
from privet.common.secagg.messages import PACKED_GROUP, TAG_BYTES
from privet.common.secagg.quantize import WORD, Words

# Number of the vector, as a round masks one. A protocol that masks several in one round must number them, so that no
# keystream repeats.
VECTOR = 0

# A block of the vector, of the keystream and of zeros stay in the second-level cache while all masks are applied.
_BLOCK_BYTES = 192 * 1024
_BLOCK = _BLOCK_BYTES // 8
_ZEROS = bytes(_BLOCK_BYTES)
_NONCE = bytes(12)
_HIGHEST = np.uint64(63)
_TOP = np.uint64(1 << 63)
LOW = np.uint64((1 << 63) - 1)
"""The bits of a word that lanes use where `Layout.spare_bit` holds."""
_BITS: Words = np.arange(PACKED_GROUP - 1, dtype=WORD)[:, None]
# Words that are packed at a time: few calls for a short vector, and few enough for the second-level cache.
_PACK_BLOCK = 32768

_Operation = Callable[[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]], object]


def derive(secret: bytes, salt: bytes, purpose: str, *numbers: int, length: int = 32, bound: bytes = b"") -> bytes:
    """Return a key of `length` bytes: HKDF-SHA256 with purpose, numbers (u32) and `bound` as info.

    The salt is the digest of what has been agreed so far: the roster's, or before it the parameters'.
    """
    info = f"privet-secagg/1 {purpose}\0".encode() + b"".join(number.to_bytes(4, "big") for number in numbers)
    return HKDF(SHA256(), length, salt, info + bound).derive(secret)


def pair_mask_key(secret: bytes, roster: bytes, first: int, second: int) -> bytes:
    """Return the key of the mask that two sites share, given their secret. The order of the sites does not matter.

    The secret is X25519's; in a hybrid suite, `pair_secret` of the site with the lower number.
    """
    return derive(secret, roster, "pair mask", min(first, second), max(first, second), VECTOR)


def next_link(link: bytes, roster: bytes, round_number: int, first: int, second: int) -> bytes:
    """Return what two sites of a block share after a round, given what they shared in it. There is no way back."""
    numbers = min(first, second), max(first, second)
    return derive(link, roster, "next link", *numbers, bound=round_number.to_bytes(8, "big"))


def pair_secret(seed: bytes, roster: bytes, sender: int, receiver: int) -> bytes:
    """Return the secret, 32 bytes, that `sender` sends to `receiver` in a hybrid suite, given the seed of its masks.

    The lower site's makes the pair's mask. The higher site's is a one-time pad on it, used once.
    """
    return derive(seed, roster, "pair secret", sender, receiver)


def exclusive_or(one: bytes, other: bytes) -> bytes:
    """Return the bitwise exclusive or of two byte strings of equal length."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


def hybrid_channel(secret: bytes, roster: bytes, sender: int, receiver: int, ciphertext: bytes) -> Channel:
    """Return the channel from `sender` to `receiver`, given both secrets (ML-KEM's, then the classical one)."""
    keys = derive(secret, roster, "hybrid channel", sender, receiver, length=64, bound=ciphertext)
    return Channel(keys, roster, sender, receiver)


def self_mask_key(seed: bytes, roster: bytes, site: int) -> bytes:
    """Return the key of the mask that `site` alone adds, given its seed."""
    return derive(seed, roster, "self mask", site, VECTOR)


def channels(secret: bytes, roster: bytes, me: int, other: int) -> tuple[Channel, Channel]:
    """Return the channels to and from `other`, given the X25519 secret of the two sites' share keys."""
    keys = derive(secret, roster, "channels", min(me, other), max(me, other), length=128)
    there, back = (keys[:64], keys[64:]) if me < other else (keys[64:], keys[:64])
    return Channel(there, roster, me, other), Channel(back, roster, other, me)


class Channel:
    """The channel from one site to another in a round: for one sealed message, and for tags on digests.

    Args:
        keys: 32 bytes for AES-256-GCM and 32 for HMAC, for this direction alone.
        roster: The roster's digest.
        sender: Number of the sending site.
        receiver: Number of the receiving site.
    """

    def __init__(self, keys: bytes, roster: bytes, sender: int, receiver: int) -> None:
        self._seal, self._mac = keys[:32], keys[32:]
        self._bound = roster + sender.to_bytes(2, "big") + receiver.to_bytes(2, "big")
        self._names = (sender, receiver)

    def seal(self, plain: bytes, beside: bytes = b"") -> bytes:
        """Encrypt and authenticate the one message of the channel. The key is used once, so the nonce is fixed.

        Args:
            plain: What is encrypted.
            beside: Sent in clear beside it, and authenticated.
        """
        return AESGCM(self._seal).encrypt(_NONCE, plain, self._bound + beside)

    def open(self, sealed: bytes, beside: bytes = b"") -> bytes:
        """Return the plain text of the channel's message.

        Raises:
            VerificationError: The message was altered, or is for another pair, direction or round.
        """
        try:
            return AESGCM(self._seal).decrypt(_NONCE, sealed, self._bound + beside)
        except InvalidTag:
            sender, receiver = self._names
            raise VerificationError(
                f"the encrypted shares from site number {sender} to site number {receiver} of the cohort cannot be "
                "decrypted",
                "take part in no further round until the coordinator explains it: the shares were changed, swapped "
                "or belong to another round",
            ) from None

    def for_tags(self) -> Channel:
        """Return the channel without the key of its one message."""
        channel = copy.copy(self)
        channel._seal = b""
        return channel

    def tag(self, what: bytes) -> bytes:
        """Return the channel's MAC on `what`, a digest bound to its purpose: HMAC-SHA256, cut to 128 bits."""
        return hmac.digest(self._mac, self._bound + what, "sha256")[:TAG_BYTES]

    def check(self, what: bytes, tag: bytes) -> None:
        """Check a MAC.

        Raises:
            VerificationError: It is not the sender's MAC on `what`.
        """
        if not hmac.compare_digest(self.tag(what), tag):
            sender, receiver = self._names
            raise VerificationError(
                f"site number {sender} of the cohort did not confirm to site number {receiver} the list of sites "
                f"that site {receiver} got",
                "take part in no further round until the coordinator explains it: it gave the sites different "
                "lists; nothing was revealed",
            )


def apply(words: Words, plus: Sequence[bytes], minus: Sequence[bytes], *, workers: int = 1) -> None:
    """Add the keystreams of `plus` to `words` and subtract those of `minus`, modulo 2^64, in place.

    The mask of a key is the AES-256-CTR keystream from counter 0, read as little-endian words. Whole words are masked,
    so the cost does not depend on the lane width.

    Args:
        words: Shape (m,), little-endian 64-bit words, writable.
        plus: Keys of 32 bytes.
        minus: Keys of 32 bytes.
        workers: Threads; each takes a stretch of the vector. The result does not depend on their number.
    """
    blocks = -(-words.size // _BLOCK)
    stretch = -(-blocks // max(1, min(workers, blocks))) * _BLOCK if blocks else 1
    starts = range(0, words.size, stretch)
    if len(starts) <= 1:
        _apply(words, 0, plus, minus)
        return
    with ThreadPoolExecutor(len(starts)) as pool:
        jobs = [pool.submit(_apply, words[s : s + stretch], s, plus, minus) for s in starts]
        for job in jobs:
            job.result()


def _apply(words: Words, offset: int, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Apply the masks to `words`, which start `offset` words (a whole number of blocks) into the vector."""
    # AES blocks have 16 bytes. Starting the counter in the middle gives each thread its part of the same keystream.
    counter = (offset * 8 // 16).to_bytes(16, "big")
    add: _Operation = np.add
    subtract: _Operation = np.subtract
    streams = [
        (Cipher(AES256(key), CTR(counter)).encryptor().update_into, operation)
        for keys, operation in ((plus, add), (minus, subtract))
        for key in keys
    ]
    keystream = np.empty(_BLOCK, WORD)
    buffer = keystream.view(np.uint8).data
    whole = words.size - words.size % _BLOCK
    for start in range(0, whole, _BLOCK):
        block = words[start : start + _BLOCK]
        for fill, operation in streams:
            fill(_ZEROS, buffer)
            operation(block, keystream, block)
    if whole < words.size:
        block, rest = words[whole:], words.size - whole
        zeros, tail, part = _ZEROS[: 8 * rest], buffer[: 8 * rest], keystream[:rest]
        for fill, operation in streams:
            fill(zeros, tail)
            operation(block, part, block)


def pack(words: Words) -> Words:
    """Drop the top bit of every word, and return the row of words that carries the others: a view of `words`.

    Of m words, the last D = m // 64 are taken apart: bit k of word m - D + i becomes the top bit of word k * D + i,
    for k < 63. The top bits of the fewer than 64 words between are 0. So one vector has one form.

    Args:
        words: Shape (m,), little-endian 64-bit words, writable. They are packed in place and must not be used again.
            Memory use beyond them is a block, or m / 64 words if that is more.
    """
    rows, rest, last = _parted(words)
    np.bitwise_and(rest, LOW, out=rest)
    for part, bits, scratch in _blocks(rows):
        np.left_shift(last, _HIGHEST - bits, out=scratch)
        # Change a top bit where it is not yet the one to be carried.
        np.bitwise_xor(scratch, part, out=scratch)
        np.bitwise_and(scratch, _TOP, out=scratch)
        np.bitwise_xor(part, scratch, out=part)
    return words[: words.size - last.size]


def add_packed(total: Words, packed: Words, *, whose: str) -> None:
    """Add a packed vector to `total`, in place. Only the lower 63 bits of the sum have a meaning (`LOW`).

    Args:
        total: Shape (m,), little-endian 64-bit words, writable.
        packed: What `pack` made of m words. It is only read; memory use beyond it is as that of `pack`.
        whose: Who sent it, for the error.

    Raises:
        ProtocolError: `pack` does not make `packed` of any m words. `total` is then unchanged.
    """
    rows, rest, last = _parted(total)
    kept = total.size - last.size
    if packed.shape != (kept,) or (packed[rows.size :] & _TOP).any():
        raise ProtocolError(
            f"{whose} must send a masked vector of {total.size} words packed in {kept} words of 64 bits, of which "
            f"those after the first {rows.size} have a top bit of 0; got {packed.size} words, or another top bit",
            "install the same version of privet at that site; if it happens again, leave the site out of the cohort",
        )
    np.add(rest, packed[rows.size :], out=rest)
    sent = packed[: rows.size].reshape(rows.shape)
    for part, bits, scratch in _blocks(rows):
        theirs = sent[int(bits[0, 0]) :][: len(part)]
        np.add(part, theirs, out=part)
        np.right_shift(theirs, _HIGHEST, out=scratch)
        np.left_shift(scratch, bits, out=scratch)
        for row in scratch:
            np.add(last, row, out=last)


def _parted(words: Words) -> tuple[Words, Words, Words]:
    """Return views of m words: 63 rows of D = m // 64, the fewer than 64 after them, and the last D."""
    size = words.size // PACKED_GROUP
    start = (PACKED_GROUP - 1) * size
    return words[:start].reshape(-1, size or 1), words[start : words.size - size], words[words.size - size :]


def _blocks(rows: Words) -> Iterator[tuple[Words, Words, Words]]:
    """Yield a few rows at a time, the numbers of their bits as a column, and a buffer of the rows' shape."""
    step = max(1, min(len(rows), _PACK_BLOCK // rows.shape[1]))
    scratch = np.empty((min(step, len(rows)), rows.shape[1]), WORD)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        yield part, _BITS[start : start + len(part)], scratch[: len(part)]
