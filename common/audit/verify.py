"""Verifying a whole log offline: from a signed checkpoint down to what each leaf says.

In this order, so that nothing is parsed before it was authenticated:

1. the checkpoint is signed by the log and cosigned by a quorum of the policy's witnesses;
2. the leaves, as bytes, make the tree that it commits to;
3. each leaf is an envelope whose signature holds;
4. each leaf's statement was said by one who may say it, at a point of the history where it can be said
   (`privet.common.audit.replay`);
5. the log is the one that its genesis names, and no cosignature that counts is of a revoked key.

Whatever goes wrong on the way, an error that nobody foresaw included, is a failure, with the first leaf to blame.

What it shows: nobody has changed, removed, inserted or reordered anything since the witnesses cosigned, and every
author said what stands there. What it cannot show: that a site trained as it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from privet.common.audit.replay import Leaf, Replay, RootAt
from privet.common.errors import PrivetError, TooFewSitesError, VerificationError
from privet.common.log.checkpoint import Checkpoint, LeafProof, Policy, accept_checkpoint
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.merkle import Frontier, HashProof, leaf_hash, prove_inclusion, root, stored_index
from privet.common.log.note import NoteKey
from privet.common.log.statements import Statement

Leaves = Callable[[], Iterable[bytes]]
"""Returns the leaves from the first on; called for each pass over them, so that they need not fit in memory."""
LeafObserver = Callable[[Leaf, Statement], None]


@dataclass(frozen=True)
class Verdict:
    """What came of verifying a log.

    Attributes:
        reason: What is wrong; empty if nothing is.
        leaf: Number of the first leaf to blame; None where it is none's fault.
        size: Leaves that the checkpoint commits to; 0 where it is not acceptable itself.
        cosigners: Names of the witnesses that cosigned.
        history: What the leaves say, up to the bad one.
    """

    reason: str = ""
    leaf: int | None = None
    size: int = 0
    cosigners: tuple[str, ...] = ()
    history: Replay = field(default_factory=Replay)

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.reason

    def __str__(self) -> str:
        if self.ok:
            return f"verified: {self.size} leaves, cosigned by {', '.join(self.cosigners)}"
        return f"FAILED{f' at leaf {self.leaf}' if self.leaf is not None else ''}: {self.reason}"


@dataclass
class _Progress:
    """How far a verification has come; what a verdict is made of, whenever it ends."""

    leaf: int | None = None
    size: int = 0
    cosigners: tuple[NoteKey, ...] = ()
    history: Replay = field(default_factory=Replay)

    def verdict(self, reason: str = "") -> Verdict:
        names = tuple(key.name for key in self.cosigners)
        return Verdict(reason, self.leaf if reason else None, self.size, names, self.history)


@dataclass
class Tree:
    """The hashes of all leaves read so far."""

    frontier: Frontier = field(default_factory=Frontier)
    hashes: list[bytes] = field(default_factory=list)
    roots: dict[int, bytes] = field(default_factory=dict)

    def append(self, leaf: bytes) -> None:
        """Add the hash of the next leaf."""
        self.frontier, gained = self.frontier.append(leaf)
        self.hashes += gained

    def leaf(self, index: int) -> bytes:
        """Return the hash of a leaf."""
        return self.hashes[stored_index(0, index)]

    def root_at(self, size: int) -> bytes:
        """Return the root of the tree of the first `size` leaves."""
        if size not in self.roots:  # a cohort quotes one checkpoint many times
            self.roots[size] = root(size, lambda places: [self.hashes[place] for place in places])
        return self.roots[size]

    def prove(self, index: int) -> HashProof:
        """Prove that a leaf is in the tree of all leaves."""
        return prove_inclusion(index, self.frontier.size, lambda places: [self.hashes[place] for place in places])


def verify_bundle(
    leaves: Leaves,
    checkpoint: bytes,
    policy: Policy,
    stated: Callable[[], Iterable[bytes]] | None = None,
    observe: LeafObserver = lambda leaf, statement: None,
) -> Verdict:
    """Verify a log.

    Args:
        leaves: The log's leaves.
        checkpoint: The note of the checkpoint that the leaves are to make.
        policy: Whose checkpoints the reader accepts.
        stated: Leaf hashes as the log's tiles state them. Not trusted, and not needed; where they make the signed
            root, they tell which leaf was changed.
        observe: Called with each statement that holds.

    Returns:
        The verdict. Never raises because of what the log holds.
    """
    progress = _Progress()
    try:
        _verify(leaves, checkpoint, policy, stated or (lambda: ()), observe, progress)
    except PrivetError as error:
        return progress.verdict(error.message)
    except Exception as error:  # whatever a log can provoke is a failure of that log, never a pass
        return progress.verdict(f"could not be checked ({type(error).__name__})")
    return progress.verdict()


def _verify(
    leaves: Leaves, data: bytes, policy: Policy, stated: Leaves, observe: LeafObserver, progress: _Progress
) -> None:
    checkpoint, progress.cosigners = accept_checkpoint(data, policy)
    progress.size = checkpoint.size
    tree = _read_tree(leaves, checkpoint.size, progress)
    if tree.frontier.size != checkpoint.size or tree.frontier.root != checkpoint.root:
        _blame(leaves, checkpoint, stated, tree, progress)
    for index, leaf in enumerate(_counted(leaves(), progress)):
        if index >= checkpoint.size or leaf_hash(leaf) != tree.leaf(index):
            raise VerificationError("was changed while it was read")
        admitted, statement = admit(progress.history, index, leaf, tree.root_at)
        observe(admitted, statement)
    if progress.leaf != checkpoint.size:
        raise VerificationError("was removed while it was read")
    _check_policy(policy, progress)


def _read_tree(leaves: Leaves, size: int, progress: _Progress) -> Tree:
    """Hash the leaves, and not many more than there should be."""
    tree = Tree()
    try:
        for leaf in _counted(leaves(), progress):
            tree.append(leaf_hash(leaf))
            if tree.frontier.size > size:
                break
    except OSError as error:
        raise VerificationError(f"cannot be read ({type(error).__name__})") from None
    progress.leaf = None
    return tree


def _check_policy(policy: Policy, progress: _Progress) -> None:
    """Check that the genesis names the policy's log, and that enough cosigners are not revoked."""
    genesis = progress.history.genesis
    if genesis is None or genesis.log != policy.log.text:
        progress.leaf = 0
        raise VerificationError(f"expected the genesis of the log {policy.log.text}, found another's or none")
    progress.leaf = None
    valid = [key for key in progress.cosigners if key.public not in progress.history.revoked]
    if len(valid) < policy.needed:
        raise TooFewSitesError(
            f"expected {policy.needed} cosignatures of keys that are not revoked, found {len(valid)}"
        )


def _counted(leaves: Iterable[bytes], progress: _Progress) -> Iterator[bytes]:
    """Yield leaves and keep count, so that whatever happens is put down to the leaf at hand."""
    progress.leaf = 0
    for index, leaf in enumerate(leaves):
        progress.leaf = index
        yield leaf
        progress.leaf = index + 1


def admit(history: Replay, index: int, data: bytes, root_at: RootAt) -> tuple[Leaf, Statement]:
    """Check one leaf from its bytes up: envelope, signature, statement, place in the history, which takes it in.

    A coordinator calls this before it appends a leaf, so that nothing enters its log that an audit would refuse.

    Args:
        history: What the leaves before it say.
        index: Number of the leaf.
        data: Its bytes.
        root_at: Root of the tree of the first n leaves.

    Raises:
        ProtocolError, VerificationError: The leaf cannot stand there; `history` is as it was.
    """
    envelope = Envelope.decode(data)
    envelope.check()
    statement = parse_statement(envelope.payload)
    leaf = Leaf(index, f"sha256:{leaf_hash(data).hex()}", envelope.key)
    history.admit(leaf, statement, root_at)
    return leaf, statement


def _blame(leaves: Leaves, checkpoint: Checkpoint, stated: Leaves, tree: Tree, progress: _Progress) -> None:
    """Find the leaf because of which the tree is another, and raise `VerificationError`."""
    try:
        committed = list(stated())
    except (OSError, PrivetError):
        committed = []  # the tiles are damaged as well, or not there
    check = Tree()
    for value in committed:
        check.append(value)
    if (check.frontier.size, check.frontier.root) == (checkpoint.size, checkpoint.root):
        for index, value in enumerate(committed):
            if index >= tree.frontier.size or tree.leaf(index) != value:
                progress.leaf = index
                raise VerificationError("is missing, or not the one that the log committed to")
    history = Replay()
    for index, leaf in enumerate(_counted(leaves(), progress)):
        admit(history, index, leaf, tree.root_at)
    progress.leaf = None
    if tree.frontier.size != checkpoint.size:
        progress.leaf = min(tree.frontier.size, checkpoint.size)
        raise VerificationError(f"expected {checkpoint.size} leaves, found {tree.frontier.size}")
    raise VerificationError(
        f"the leaves do not make the tree of the checkpoint: expected root {checkpoint.root.hex()}, "
        f"found {tree.frontier.root.hex()}: leaves were exchanged, or this is another branch of the log"
    )


def prove_leaf(leaves: Leaves, checkpoint: bytes, policy: Policy, index: int) -> LeafProof:
    """Make a proof for one leaf of a log that was verified.

    Raises:
        ProtocolError, VerificationError, TooFewSitesError: The checkpoint is not acceptable, or the log has no such
            leaf.
    """
    head, _ = accept_checkpoint(checkpoint, policy)
    tree = Tree()
    for leaf in leaves():
        tree.append(leaf_hash(leaf))
    if (tree.frontier.size, tree.frontier.root) != (head.size, head.root):
        raise VerificationError(f"the leaves do not make the checkpoint of {head.size} leaves", "verify the log first")
    return LeafProof(index, tree.prove(index), checkpoint)
