"""Every message of the protocol.

A message is encoded as ``b"PSA" || version || type || fields``. The version is that of the suite in the messages that
differ between suites, up to `Masked`, and 1 in the others. The fields are written as `codec` says, in the order of the
table in `privet.common.secagg.encoding`. Its `decode` accepts only bytes that its `encode` would write,
up to the size limits here. Sites are numbered by their place in the cohort (u16), in ascending order of name.

Signatures (Ed25519) cover::

    "privet-secagg/1 message" || 0 || type || session || round (u64) || parameters digest || roster digest
    || the message without signature, tags and words

where the roster digest is 32 zero bytes in `Advertise`. Tags are MACs that their receivers check, so they need no
signature. The words of a `Masked` are not signed, because hashing them would cost the coordinator more than unmasking.
The transport protects them on the way. Whoever could change them could only change the sum, as any site can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from privet.common.secagg.quantize import Layout, Segment, Words
from privet.common.secagg.shamir import SHARE_BYTES
from privet.common.secagg.suites import CIPHERTEXT_BYTES, DEFAULT, Suite

VERSION: Final = 1
MAX_SITES: Final = 4096
MAX_SEGMENTS: Final = 65_535
MAX_WORDS: Final = 2**28
MAX_CONTROL_BYTES: Final = 64 * 2**20
# A share of the seed of the self mask and one of the seed of the mask key, and the tag of AES-GCM.
SEALED_BYTES: Final = 2 * SHARE_BYTES + 16
SECRET_BYTES: Final = 32
# In a block no secret is shared: the item for another site holds its authentication and, in a hybrid suite, as above.
LINK_BYTES: Final = 16
DIGEST_BYTES: Final = 32
# In a hybrid suite also a secret for the receiver. Before the box come its ciphertext and the secret's commitment.
HYBRID_SEALED_BYTES: Final = CIPHERTEXT_BYTES + DIGEST_BYTES + SEALED_BYTES + SECRET_BYTES
HYBRID_LINK_BYTES: Final = CIPHERTEXT_BYTES + DIGEST_BYTES + LINK_BYTES + SECRET_BYTES
MAX_BLOCK: Final = 65_535
# In a block with drop-outs the item holds, for each round, the commitment to a secret for the receiver, two shares and
# that secret.
DEALT_BYTES: Final = 2 * SHARE_BYTES + SECRET_BYTES
MAX_DEALT: Final = 2**18
"""Largest product of sites and rounds of a block with drop-outs: a site's items stay below 40 MB."""
TAG_BYTES: Final = 16
NO_SIGNATURE: Final = bytes(64)
# Words of 63 bits that are sent in one word less: each of the others has room for one bit.
PACKED_GROUP: Final = 64


@dataclass(frozen=True)
class CohortMember:
    """A site of the cohort.

    Attributes:
        name: The site's name in the study.
        identity: Its Ed25519 public key, 32 bytes.
    """

    name: str
    identity: bytes


@dataclass(frozen=True)
class Parameters:
    """What the coordinator proposes for one round (coordinator to all sites).

    Attributes:
        session: 32 bytes that name the study.
        round: Number of the round in the session.
        inputs: Digest of everything but a site's data that its vector depends on: the study and the model of
            the round. The caller defines it.
        cohort: The sites asked, ascending by name; a site's number is its place here.
        degree: Neighbours per site in the masking graph; 0 for all.
        threshold: Shares that reconstruct a secret.
        corrupt: Number of sites that may collude with the coordinator without harm.
        security: Statistical security of the graph in bits.
        min_survivors: Least number of sites in the sum.
        bits: Resolution of real values.
        segments: The segments of the vector.
        suite: The key agreement.
    """

    session: bytes
    round: int
    inputs: bytes
    cohort: tuple[CohortMember, ...]
    degree: int
    threshold: int
    corrupt: int
    security: int
    min_survivors: int
    bits: int
    segments: tuple[Segment, ...]
    suite: Suite = Suite.X25519

    @property
    def layout(self) -> Layout:
        """Layout of the vector in words.

        Raises:
            StudyError: Bits, segments and cohort make no valid layout.
        """
        return Layout(self.segments, self.bits, len(self.cohort))

    @property
    def packed(self) -> bool:
        """Whether masked vectors are sent without the top bit of each word (`masks.pack`)."""
        return self.suite.hybrid and self.layout.spare_bit

    @property
    def sent_words(self) -> int:
        """64-bit words of a masked vector as it is sent."""
        words = self.layout.words
        return words - words // PACKED_GROUP if self.packed else words


@dataclass(frozen=True)
class SeveralRounds(Parameters):
    """What the coordinator proposes for consecutive rounds of one cohort with one set-up.

    `round` and `inputs` are those of the first round. The rules demand that `degree` is 0.

    Attributes:
        rounds: Number of rounds, from 1 to 65,535.
    """

    rounds: int = 1


@dataclass(frozen=True)
class BlockParameters(SeveralRounds):
    """Parameters of a block in which nobody may drop out. The rules demand that `min_survivors` is the whole cohort."""


@dataclass(frozen=True)
class DealtParameters(SeveralRounds):
    """Parameters of a block that tolerates drop-outs: the secrets of all its rounds are shared at once.

    The rules demand a hybrid suite, the least safe threshold, and at most `MAX_DEALT` for sites times rounds.
    """


@dataclass(frozen=True)
class Advertise:
    """A site's keys for one round (site to coordinator).

    Attributes:
        parameters: Digest of the `Parameters` that the site accepts.
        site: The sender.
        share_key: X25519 or P-256 public key for the shares' encryption.
        mask_key: X25519 public key for the pairwise masks; empty in a hybrid suite.
        nonce: 16 random bytes, so that no two rosters are equal.
        signature: Ed25519.
        kem_key: ML-KEM-768 encapsulation key for the shares' encryption; empty in the suite x25519.
        suite: The round's suite.
    """

    parameters: bytes
    site: int
    share_key: bytes
    mask_key: bytes
    nonce: bytes
    signature: bytes = NO_SIGNATURE
    kem_key: bytes = b""
    suite: Suite = Suite.X25519

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """The two public keys: for the shares and for the masks, or the two keys for the shares."""
        return self.share_key, self.kem_key if self.suite.hybrid else self.mask_key


@dataclass(frozen=True)
class Roster:
    """All sites' keys (coordinator to all sites that advertised).

    Attributes:
        adverts: Ascending by site.
    """

    adverts: tuple[Advertise, ...]

    @property
    def suite(self) -> Suite:
        """The suite of the keys, which is one."""
        return self.adverts[0].suite if self.adverts else Suite.X25519


@dataclass(frozen=True)
class Sealed:
    """Encrypted shares. `site` is the receiver on the way to the coordinator, and the sender on the way from it.

    In a hybrid suite, `data` is an ML-KEM-768 ciphertext, the commitment to the pair's secret, and the encrypted item.
    """

    site: int
    data: bytes


@dataclass(frozen=True)
class Links:
    """A site's items for all others, with which each pair agrees on a secret for a block (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        sealed: For each other site, an item that authenticates the pair's keys, without any share.
        signature: Ed25519.
        suite: The block's suite.
    """

    roster: bytes
    site: int
    sealed: tuple[Sealed, ...]
    signature: bytes = NO_SIGNATURE
    suite: Suite = Suite.X25519


@dataclass(frozen=True)
class LinkDelivery:
    """The items for one site (coordinator to that site).

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        sealed: The items from all other sites.
        suite: The block's suite.
    """

    roster: bytes
    site: int
    sealed: tuple[Sealed, ...]
    suite: Suite = Suite.X25519


@dataclass(frozen=True)
class Joined:
    """A site has opened the items of all others (site to coordinator). No site trains before all have.

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        signature: Ed25519.
    """

    roster: bytes
    site: int
    signature: bytes = NO_SIGNATURE


@dataclass(frozen=True)
class Step:
    """Begins a round of a block (coordinator to all sites), after or beside the round's number and model.

    Attributes:
        roster: Digest of the block's roster.
    """

    roster: bytes


@dataclass(frozen=True)
class Deal:
    """A site's shares of its secrets of all rounds of a block with drop-outs (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        commitments: For each round, the digests of the seeds of its self mask and of its pair masks, 64 bytes.
        sealed: For each other site of the roster, the item of all rounds.
        signature: Ed25519.
        suite: The block's suite, a hybrid one.
    """

    roster: bytes
    site: int
    commitments: tuple[bytes, ...]
    sealed: tuple[Sealed, ...]
    signature: bytes = NO_SIGNATURE
    suite: Suite = DEFAULT


@dataclass(frozen=True)
class DealDelivery:
    """The items for one site (coordinator to that site). It and their senders are the members of the block.

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        sealed: The items from all other members.
        suite: The block's suite.
    """

    roster: bytes
    site: int
    sealed: tuple[Sealed, ...]
    suite: Suite = DEFAULT


@dataclass(frozen=True)
class Expected:
    """Begins a round of a block with drop-outs (coordinator to the sites that it expects to answer).

    Attributes:
        roster: Digest of the block's members.
        sites: The expected sites.
    """

    roster: bytes
    sites: tuple[int, ...]


@dataclass(frozen=True)
class Shares:
    """A site's shares for its neighbours (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        commitment: Digest of the seed of its self mask.
        sealed: For each neighbour, its two shares under AES-256-GCM.
        signature: Ed25519.
        seed_commitment: Digest of the seed of its pairwise masks; empty in the suite x25519.
        suite: The round's suite.
    """

    roster: bytes
    site: int
    commitment: bytes
    sealed: tuple[Sealed, ...]
    signature: bytes = NO_SIGNATURE
    seed_commitment: bytes = b""
    suite: Suite = Suite.X25519


@dataclass(frozen=True)
class Delivery:
    """The shares for one site (coordinator to that site).

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        sharers: All sites that sent shares: U2.
        sealed: The shares from the receiver's neighbours among them.
        suite: The round's suite.
    """

    roster: bytes
    site: int
    sharers: tuple[int, ...]
    sealed: tuple[Sealed, ...]
    suite: Suite = Suite.X25519


@dataclass(frozen=True)
class Tag:
    """A MAC with which one site confirms its lists to a neighbour.

    `site` is the receiver on the way to the coordinator, and the sender on the way from it.
    """

    site: int
    data: bytes


@dataclass(frozen=True)
class Wrap:
    """The secret of a pair's mask under the one-time pad that `site`, the neighbour of higher number, sent."""

    site: int
    data: bytes


@dataclass(frozen=True, eq=False)
class Masked:
    """A site's masked vector (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        sharers: Digest of U2 as the site received it; in a block, the digest of the round (`transcript.step_digest`),
            and where it tolerates drop-outs, that of the expected sites (`transcript.expected_digest`).
        tags: For each neighbour in U2, a MAC on that digest; none in a block without drop-outs.
        words: The masked vector as it is sent, shape (parameters.sent_words,), little-endian.
        signature: Ed25519.
        wraps: For each neighbour in U2 of higher number, the pair's secret; empty in the suite x25519 and in a block
            without drop-outs.
        suite: The round's suite.
    """

    roster: bytes
    site: int
    sharers: bytes
    tags: tuple[Tag, ...]
    words: Words
    signature: bytes = NO_SIGNATURE
    wraps: tuple[Wrap, ...] = ()
    suite: Suite = Suite.X25519


@dataclass(frozen=True)
class Finish:
    """All expected sites of a round of a block have sent their vectors (coordinator to each of them).

    Attributes:
        roster: Digest of the block's members.
        site: The receiver.
        tags: From each other expected site, its MAC on the expected sites.
    """

    roster: bytes
    site: int
    tags: tuple[Tag, ...]


@dataclass(frozen=True)
class Survivors:
    """The sites whose vectors are summed (coordinator to each survivor).

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        survivors: U3.
        tags: From each of the receiver's neighbours in U3, its MAC.
    """

    roster: bytes
    site: int
    survivors: tuple[int, ...]
    tags: tuple[Tag, ...]


@dataclass(frozen=True)
class Confirm:
    """A site's signature on the one pair of lists that it accepts (site to coordinator).

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        lists: Digest of U2 and U3.
        tags: For each neighbour in U3, a MAC on that digest.
        signature: Ed25519.
    """

    roster: bytes
    site: int
    lists: bytes
    tags: tuple[Tag, ...]
    signature: bytes = NO_SIGNATURE


@dataclass(frozen=True)
class Proof:
    """A quorum's confirmations (coordinator to each site that confirmed).

    Attributes:
        roster: Digest of the roster.
        site: The receiver.
        tags: The MACs of its neighbours that confirmed.
        confirms: Signed confirmations of other sites, without tags, if the neighbours are not a quorum.
    """

    roster: bytes
    site: int
    tags: tuple[Tag, ...]
    confirms: tuple[Confirm, ...]


@dataclass(frozen=True)
class Share:
    """A share of a secret of `site`: of the seed of its self mask if it survived, else of the seed of its mask key."""

    site: int
    data: bytes


@dataclass(frozen=True)
class Reveal:
    """The shares that unmask the sum (site to coordinator).

    A message does not say which of a site's two secrets a share belongs to. That follows from the survivors that
    the sender confirmed, so no message can hold shares of both.

    Attributes:
        roster: Digest of the roster.
        site: The sender.
        lists: Digest of U2 and U3.
        shares: For each site of U2 whose shares the sender holds, one.
        signature: Ed25519.
    """

    roster: bytes
    site: int
    lists: bytes
    shares: tuple[Share, ...]
    signature: bytes = NO_SIGNATURE


Signed = Advertise | Links | Deal | Joined | Shares | Masked | Confirm | Reveal
ProtocolMessage = (
    Parameters | Roster | Delivery | LinkDelivery | DealDelivery | Step | Expected | Finish | Survivors | Proof | Signed
)
