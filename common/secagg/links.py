"""What two neighbours share in a round: channels for shares and tags, and the key of their common mask.

`make_links` agrees with all neighbours; `seal` makes the item for one of them, and `open` reads the item from one. In
the suite x25519 everything follows from the keys of the roster. In a hybrid suite each item carries its own
ML-KEM ciphertext and a secret that makes the pair's mask (docs/secure-aggregation.md, section 12).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

from privet.common.errors import ProtocolError, VerificationError
from privet.common.secagg import masks, suites
from privet.common.secagg.codec import MALFORMED
from privet.common.secagg.messages import DIGEST_BYTES, LINK_BYTES, SECRET_BYTES, Advertise
from privet.common.secagg.shamir import SHARE_BYTES, RandomBytes
from privet.common.secagg.signatures import pair_commitment
from privet.common.secagg.suites import CIPHERTEXT_BYTES, ClassicalKey, Kem, Suite

HELD = 2 * SHARE_BYTES
"""Bytes of the two shares in an item; an item of a block has none."""


@dataclass(frozen=True, repr=False)
class Keys:
    """A site's private keys of one round.

    Attributes:
        share: For the channels.
        seed: 32 bytes, from which the masks with neighbours follow. `site.share` splits it: if this site drops out,
            the others reconstruct it and remove these masks.
        kem: The second key for the channels, in a hybrid suite.
    """

    share: ClassicalKey
    seed: bytes
    kem: MLKEM768PrivateKey | None

    def public(self) -> tuple[bytes, bytes, bytes]:
        """Return the public keys as an `Advertise` has them: share key, mask key, KEM key."""
        if self.kem is not None:
            return suites.public_bytes(self.share), b"", self.kem.public_key().public_bytes_raw()
        return suites.public_bytes(self.share), mask_public(self.seed), b""


def mask_public(seed: bytes) -> bytes:
    """Return the public mask key, 32 bytes, of the suite x25519."""
    return suites.public_bytes(suites.private_key(Suite.X25519, seed))


def make_keys(suite: Suite, parameters: bytes, random_bytes: RandomBytes) -> Keys:
    """Return the keys of a round. Draws 64 bytes.

    Args:
        suite: The round's suite.
        parameters: The parameters' digest.
        random_bytes: A CSPRNG.
    """
    drawn, seed = random_bytes(32), random_bytes(SECRET_BYTES)
    if not suite.hybrid:
        return Keys(suites.private_key(suite, drawn), seed, None)
    share = masks.derive(drawn, parameters, "share key", length=suite.seed_bytes)
    kem = masks.derive(drawn, parameters, "kem seed", length=64)
    return Keys(suites.private_key(suite, share), seed, MLKEM768PrivateKey.from_seed_bytes(kem))


@dataclass(frozen=True, repr=False)
class Link:
    """What this site has with a neighbour whose item it has opened.

    Attributes:
        shares: The neighbour's two shares for this site, 66 bytes.
        there: The channel to the neighbour.
        back: The channel from it.
        pair_key: Key of the common mask, 32 bytes.
        wrap: What lets the coordinator find that key if the neighbour drops out, 32 bytes; empty in the suite x25519,
            and where the neighbour has the lower number.
    """

    shares: bytes
    there: masks.Channel
    back: masks.Channel
    pair_key: bytes
    wrap: bytes


class Links(Protocol):
    """A site's agreement with each of its neighbours."""

    def seal(self, other: int, shares: bytes) -> bytes:
        """Return the item with `shares` (66 bytes; none in a block) for a neighbour. Call it once for each."""

    def open(self, other: int, data: bytes, held: int = HELD) -> Link:
        """Read the item of a neighbour, with `held` bytes of shares.

        Raises:
            VerificationError: It was altered, belongs elsewhere, or does not fit the sender's commitment.
            ProtocolError: It, or what it holds, has another length.
        """


def make_links(
    keys: Keys, roster: bytes, me: int, adverts: Mapping[int, Advertise], name_of: Callable[[int], str], kem: Kem
) -> Links:
    """Agree with each neighbour.

    Args:
        keys: This site's private keys.
        roster: The roster's digest.
        me: This site's number.
        adverts: The neighbours' keys, by number.
        name_of: Returns a site's name, for errors.
        kem: Encapsulates in a hybrid suite.

    Raises:
        VerificationError: A neighbour's key is not usable.
    """
    if keys.kem is None:
        return _Classical(keys, roster, me, adverts, name_of)
    own = {other: masks.pair_secret(keys.seed, roster, me, other) for other in adverts}
    return _Hybrid(HybridChannels(keys, roster, me, adverts, name_of, kem), own, roster, me, name_of)


class _Classical:
    def __init__(
        self, keys: Keys, roster: bytes, me: int, adverts: Mapping[int, Advertise], name_of: Callable[[int], str]
    ) -> None:
        mask_key = suites.private_key(Suite.X25519, keys.seed)
        self._pairs: dict[int, bytes] = {}
        self._channels: dict[int, tuple[masks.Channel, masks.Channel]] = {}
        for other, advert in adverts.items():
            secret = suites.agree(mask_key, advert.mask_key, whose=name_of(other))
            self._pairs[other] = masks.pair_mask_key(secret, roster, me, other)
            secret = suites.agree(keys.share, advert.share_key, whose=name_of(other))
            self._channels[other] = masks.channels(secret, roster, me, other)

    def seal(self, other: int, shares: bytes) -> bytes:
        return self._channels[other][0].seal(shares)

    def open(self, other: int, data: bytes, held: int = HELD) -> Link:
        there, back = self._channels[other]
        return Link(_sized(back.open(data), held, other), there, back, self._pairs[other], b"")


class HybridChannels:
    """Channels with other sites, each for one item: ML-KEM-768 beside a classical scheme.

    An item is the ML-KEM ciphertext, what is authenticated `beside` the encrypted part, and that part.

    Args:
        keys: This site's private keys, of a hybrid suite.
        roster: The roster's digest.
        me: This site's number.
        adverts: The other sites' keys, by number.
        name_of: Returns a site's name, for errors.
        kem: Encapsulates the secrets.

    Raises:
        VerificationError: Another site's key is not usable.
        ProtocolError: The keys are of another suite.
    """

    def __init__(
        self,
        keys: Keys,
        roster: bytes,
        me: int,
        adverts: Mapping[int, Advertise],
        name_of: Callable[[int], str],
        kem: Kem,
    ) -> None:
        if keys.kem is None:
            raise ProtocolError("the round's suite has no ML-KEM keys", "report this as a bug")
        self._key, self._kem, self._roster, self._me = keys.kem, kem, roster, me
        self._secrets: dict[int, bytes] = {}
        self._ciphertexts: dict[int, bytes] = {}
        self._there: dict[int, masks.Channel] = {}
        for other, advert in adverts.items():
            name = name_of(other)
            self._secrets[other] = suites.agree(keys.share, advert.share_key, whose=name)
            sent = kem.encapsulate(advert.kem_key, roster=roster, whose=name)
            self._ciphertexts[other] = sent.ciphertext
            self._there[other] = self._channel(sent.secret, other, me, other, sent.ciphertext)

    def _channel(self, secret: bytes, other: int, sender: int, receiver: int, ciphertext: bytes) -> masks.Channel:
        # Both secrets, and by the roster's digest and the ciphertext all public values of both schemes (SP 800-56C).
        return masks.hybrid_channel(secret + self._secrets[other], self._roster, sender, receiver, ciphertext)

    def there(self, other: int) -> masks.Channel:
        """Return the channel to another site."""
        return self._there[other]

    def seal(self, other: int, plain: bytes, beside: bytes) -> bytes:
        """Return the item for another site. Call it once for each."""
        return self._ciphertexts[other] + beside + self._there[other].seal(plain, beside)

    def open(self, other: int, data: bytes, beside: int, plain: int) -> tuple[bytes, bytes, masks.Channel]:
        """Read the item of another site, with `beside` and `plain` bytes; return both and the channel from the site.

        Raises:
            VerificationError: It was altered or belongs elsewhere.
            ProtocolError: It has another length.
        """
        expected = CIPHERTEXT_BYTES + beside + plain + LINK_BYTES
        if len(data) != expected:
            raise ProtocolError(
                f"the encrypted item of site number {other}: expected {expected} bytes, got {len(data)}", MALFORMED
            )
        ciphertext, rest = data[:CIPHERTEXT_BYTES], data[CIPHERTEXT_BYTES:]
        secret = self._kem.decapsulate(self._key, ciphertext)
        back = self._channel(secret, other, other, self._me, ciphertext)
        return back.open(rest[beside:], rest[:beside]), rest[:beside], back


class _Hybrid:
    def __init__(
        self, channels: HybridChannels, own: dict[int, bytes], roster: bytes, me: int, name_of: Callable[[int], str]
    ) -> None:
        self._channels, self._own, self._roster, self._me, self._name_of = channels, own, roster, me, name_of

    def seal(self, other: int, shares: bytes) -> bytes:
        own = self._own[other]
        return self._channels.seal(other, shares + own, pair_commitment(self._roster, self._me, other, own))

    def open(self, other: int, data: bytes, held: int = HELD) -> Link:
        plain, committed, back = self._channels.open(other, data, DIGEST_BYTES, held + SECRET_BYTES)
        theirs, own = plain[held:], self._own[other]
        check_promised(committed, self._roster, other, self._me, theirs, self._name_of(other))
        key = masks.pair_mask_key(pair_of(own, theirs, self._me, other), self._roster, self._me, other)
        return Link(plain[:held], self._channels.there(other), back, key, wrap_of(own, theirs, self._me, other))


def pair_of(own: bytes, theirs: bytes, me: int, other: int) -> bytes:
    """Return the secret of a pair's mask, of the two that the sites sent each other: that of the lower site."""
    return own if me < other else theirs


def wrap_of(own: bytes, theirs: bytes, me: int, other: int) -> bytes:
    """Return the pair's secret under the one-time pad of the higher site; empty at the higher site."""
    return masks.exclusive_or(own, theirs) if me < other else b""


def check_promised(committed: bytes, salt: bytes, sender: int, me: int, secret: bytes, name: str) -> None:
    """Check the secret that `sender` sent this site against its commitment.

    Raises:
        VerificationError: It is another one.
    """
    if not hmac.compare_digest(committed, pair_commitment(salt, sender, me, secret)):
        raise VerificationError(
            f"the secret that {name} sent this site for their common mask is not the one that it committed to",
            "take part in no further round with that site until its operator explains it: only that site can have "
            "sent it",
        )


def _sized(plain: bytes, length: int, sender: int) -> bytes:
    if len(plain) != length:
        raise ProtocolError(
            f"the decrypted shares of site number {sender}: expected {length} bytes, got {len(plain)}", MALFORMED
        )
    return plain
