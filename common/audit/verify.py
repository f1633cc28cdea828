"""Verify a whole log offline, from a signed checkpoint down to the statement in each leaf.

The order of checks makes sure that nothing is parsed before it is authenticated:

1. the checkpoint is signed by the log and cosigned by a quorum of the policy's witnesses;
2. the leaves, as bytes, form the tree to which it commits;
3. each leaf is an envelope whose signature matches;
4. each statement is by an author who may make it, at a point of the history where it is allowed
   (`privet.common.log.replay`);
5. the policy's log key is the one that the history names for the checkpoint's size; each witness of the policy is or
   was a member, by its key in the log; enough cosignatures are of keys that are not revoked, also by the quorum and the
   members that the log itself states.

Any error in between, also an unforeseen one, is a failure, and names the first leaf that is wrong.

Verification proves that nobody changed, removed, inserted or reordered a leaf since the witnesses cosigned, and that
every author signed its statements. It cannot prove that a site trained as it states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

from privet.common.errors import PrivetError, TooFewSitesError, VerificationError
from privet.common.log.checkpoint import (
    Checkpoint,
    LeafProof,
    OtherKeyError,
    Policy,
    accept_checkpoint,
    open_checkpoint,
)
from privet.common.log.merkle import Frontier, HashProof, leaf_hash, prove_inclusion, root, stored_index
from privet.common.log.note import NoteKey, parse_note, verify_note
from privet.common.log.replay import Leaf, Replay, admit
from privet.common.log.statements import Statement

Leaves = Callable[[], Iterable[bytes]]
"""Returns the leaves from the first on. It is called for each pass over them, so they need not fit in memory."""
LeafObserver = Callable[[Leaf, Statement], None]


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
        if size not in self.roots:  # all sites of a cohort quote the same checkpoint
            self.roots[size] = root(size, lambda places: [self.hashes[place] for place in places])
        return self.roots[size]

    def prove(self, index: int) -> HashProof:
        """Prove that a leaf is in the tree of all leaves."""
        return prove_inclusion(index, self.frontier.size, lambda places: [self.hashes[place] for place in places])


@dataclass(frozen=True)
class Verdict:
    """The result of verifying a log.

    Attributes:
        reason: What is wrong; empty if nothing is.
        leaf: Number of the first leaf that is wrong; None if no single leaf is.
        size: Number of leaves to which the checkpoint commits; 0 if the checkpoint itself is not acceptable.
        cosigners: Names of the witnesses that cosigned.
        classical: What rests on Ed25519 alone, so that whoever breaks it can forge it: one phrase each.
        history: The history of the leaves before the first wrong one.
        tree: Hashes of all leaves; none unless the leaves form the tree of the checkpoint.
    """

    reason: str = ""
    leaf: int | None = None
    size: int = 0
    cosigners: tuple[str, ...] = ()
    history: Replay = field(default_factory=Replay)
    tree: Tree = field(default_factory=Tree, repr=False)
    classical: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.reason

    def __str__(self) -> str:
        if self.ok:
            return f"verified: {self.size} leaves, cosigned by {', '.join(self.cosigners)}"
        return f"FAILED{f' at leaf {self.leaf}' if self.leaf is not None else ''}: {self.reason}"


@dataclass
class _Progress:
    """The state of a verification, from which a verdict is made wherever it ends."""

    leaf: int | None = None
    size: int = 0
    cosigners: tuple[NoteKey, ...] = ()
    history: Replay = field(default_factory=Replay)
    tree: Tree = field(default_factory=Tree)

    def verdict(self, reason: str = "") -> Verdict:
        names = tuple(key.name for key in self.cosigners)
        classical = () if reason else _classical(self.history, self.cosigners)
        return Verdict(reason, self.leaf if reason else None, self.size, names, self.history, self.tree, classical)


def _classical(history: Replay, cosigners: Sequence[NoteKey]) -> tuple[str, ...]:
    """Return what of a verified log rests on Ed25519 alone."""
    found = list[str]()
    present = history.epochs[-1]
    if not (present.log.pq or any(map(history.pq_of, history.owners))):
        return ("all signatures",)
    if not present.log.pq:
        found.append("the log's checkpoints and the coordinator's statements")
    elif not all(epoch.log.pq for epoch in history.epochs):
        first = next(epoch.since for epoch in history.epochs if epoch.log.pq)
        found.append(f"the coordinator's statements before leaf {first}, but for the checkpoints after it")
    if names := sorted({name for key, name in history.owners.items() if not history.pq_of(key)}):
        found.append(f"statements of {', '.join(names)}")
    for key, leaf in history.renewed.items():
        found.append(f"statements of {history.owners[key]} before leaf {leaf}, but for the checkpoints after it")
    if names := sorted(key.name for key in cosigners if not key.pq):
        found.append(f"the cosignatures of {', '.join(names)}")
    return tuple(found)


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
        checkpoint: Note of the checkpoint that commits to the leaves.
        policy: The log and the witnesses whose checkpoints the reader accepts.
        stated: Leaf hashes as the log's tiles state them. They are optional and not trusted. If they give the signed
            root, they show which leaf was changed.
        observe: Called with each statement that passed its checks.

    Returns:
        The verdict. No content of a log makes this function raise an error.
    """
    progress = _Progress()
    try:
        _verify(leaves, checkpoint, policy, stated or (lambda: ()), observe, progress)
    except PrivetError as error:
        return progress.verdict(error.message)
    except Exception as error:  # an error that a log provokes is a failure of that log, never a pass
        return progress.verdict(f"could not be checked ({type(error).__name__})")
    return progress.verdict()


def _verify(
    leaves: Leaves, data: bytes, policy: Policy, stated: Leaves, observe: LeafObserver, progress: _Progress
) -> None:
    try:
        checkpoint, progress.cosigners = accept_checkpoint(data, policy)
    except OtherKeyError as error:
        raise VerificationError(f"{error.message}; {_why_another_key(leaves, data, policy)}") from None
    progress.size = checkpoint.size
    tree = _read_tree(leaves, checkpoint.size, progress)
    # Before any leaf is parsed: once the root matches, every byte was seen by the witnesses.
    if tree.frontier.size != checkpoint.size or tree.frontier.root != checkpoint.root:
        _blame(leaves, checkpoint, stated, tree, progress)
    progress.tree = tree
    for index, leaf in enumerate(_counted(leaves(), progress)):
        # The leaves are read a second time. A file may have changed since its hash was checked.
        if index >= checkpoint.size or leaf_hash(leaf) != tree.leaf(index):
            raise VerificationError("the leaf has other bytes now: the file was changed while it was verified")
        admitted, statement = admit(progress.history, index, leaf, tree.root_at)
        observe(admitted, statement)
    if progress.leaf != checkpoint.size:
        raise VerificationError("the leaf is missing now: the file was changed while it was verified")
    _check_policy(policy, data, progress)


def _why_another_key(leaves: Leaves, data: bytes, policy: Policy) -> str:
    """Say why a checkpoint is signed with another key than the policy's.

    The witnesses' keys do not change with the log's. So a quorum of the policy can vouch for leaves that say so.
    """
    note = parse_note(data)
    head = Checkpoint.parse(note.text)
    if len(verify_note(note, policy.witnesses)) >= policy.needed:
        with suppress(PrivetError, OSError):
            tree = _read_tree(leaves, head.size, _Progress())
            history = Replay()
            if (tree.frontier.size, tree.frontier.root) == (head.size, head.root):
                for index, leaf in enumerate(leaves()):
                    admit(history, index, leaf, tree.root_at)
            for was, at in pairwise(history.epochs):
                if was.log == policy.log:
                    return (
                        f"leaf {at.since - 1} of this log, which a quorum of the policy cosigned, rotates the key that "
                        f"the policy trusts: get the present policy, with the log's key "
                        f"{history.epoch_at(head.size).log.shown}, from the sites, and compare it with them"
                    )
    return "if the bundle was made before the log's keys were rotated, use the policy of that time"


def _read_tree(leaves: Leaves, size: int, progress: _Progress) -> Tree:
    """Hash the leaves. Stop at the first surplus one: the source may never end."""
    tree = Tree()
    try:
        for leaf in _counted(leaves(), progress):
            tree.append(leaf_hash(leaf))
            if tree.frontier.size > size:
                break
    except OSError as error:
        raise VerificationError(f"the file with this leaf cannot be read ({type(error).__name__})") from None
    progress.leaf = None
    return tree


def _check_policy(policy: Policy, note: bytes, progress: _Progress) -> None:
    """Check that the policy is one of this log, and that enough members cosigned with keys that are not revoked."""
    history = progress.history
    if not history.epochs or history.epoch_at(progress.size).log != policy.log:
        ended = [at.since - 1 for was, at in pairwise(history.epochs) if was.log == policy.log]
        progress.leaf = ended[0] if ended else 0
        if ended:
            raise VerificationError(
                f"leaf {ended[0]} rotates the key {policy.log.shown} that the policy trusts, but the checkpoint of "
                f"{progress.size} leaves is still signed with it: somebody has a copy of the former key"
            )
        why = "leaf 0 is not the genesis of that log"
        if len(history.epochs) > 1:
            why += f", and no rotation names that key for a checkpoint of {progress.size} leaves"
        raise VerificationError(f"the policy trusts the log {policy.log.shown}, but {why}")
    progress.leaf = None
    # Keys of a member have one owner and one purpose (`Genesis`, `Replay`): so the coordinator is nobody's witness.
    strangers = [key for key in policy.witnesses if key.text not in history.witnesses]
    if strangers:
        raise VerificationError(
            f"the policy lists the witness {strangers[0].shown}, but no member of the log ever had this cosigning key",
            "get the policy from the sites, not from the coordinator; if a site joined after this checkpoint, use the "
            "policy from before",
        )
    # Only the whole history says which keys were revoked. So cosignatures are counted again at the end.
    valid = [key for key in progress.cosigners if key.public not in history.revoked]
    if len(valid) < policy.needed:
        raise TooFewSitesError(
            f"the checkpoint needs cosignatures of {policy.needed} witnesses with keys that are not revoked, "
            f"found {len(valid)}"
        )
    # A policy of earlier may know fewer members, or need fewer of them, than the log does by now.
    current = tuple(NoteKey.parse(each.witness) for each in history.members.values() if each.witness is not None)
    found = verify_note(open_checkpoint(note, policy.log)[1], current)
    if len({key.public for key in found}) < history.quorum:
        raise TooFewSitesError(
            f"the checkpoint needs cosignatures of {history.quorum} members, as the log states, found {len(found)}"
        )


def _counted(leaves: Iterable[bytes], progress: _Progress) -> Iterator[bytes]:
    """Yield leaves and count them, so that an error is reported with the number of the current leaf."""
    progress.leaf = 0
    for index, leaf in enumerate(leaves):
        progress.leaf = index
        yield leaf
        progress.leaf = index + 1


def _blame(leaves: Leaves, checkpoint: Checkpoint, stated: Leaves, tree: Tree, progress: _Progress) -> None:
    """Find the leaf that makes the tree differ from the checkpoint's, and raise `VerificationError`."""
    try:
        committed = list(stated())
    except (OSError, PrivetError):
        committed = []  # the tiles are damaged too, or missing
    check = Tree()
    for value in committed:
        check.append(value)
    # The tiles are not trusted, unless they give the signed root: then they are the hashes that were committed.
    if (check.frontier.size, check.frontier.root) == (checkpoint.size, checkpoint.root):
        for index, value in enumerate(committed):
            if index >= tree.frontier.size or tree.leaf(index) != value:
                progress.leaf = index
                raise VerificationError(
                    "the leaf is missing, or was changed after the log signed the checkpoint over it"
                )
    # Without such hashes, a leaf that breaks the history is the best one to name.
    history = Replay()
    for index, leaf in enumerate(_counted(leaves(), progress)):
        admit(history, index, leaf, tree.root_at)
    progress.leaf = None
    if tree.frontier.size != checkpoint.size:
        progress.leaf = min(tree.frontier.size, checkpoint.size)
        raise VerificationError(f"the checkpoint commits to {checkpoint.size} leaves, found {tree.frontier.size}")
    raise VerificationError(
        f"the leaves do not belong to this checkpoint: it has the root hash {checkpoint.root.hex()}, the leaves give "
        f"{tree.frontier.root.hex()}: a leaf was changed, or the leaves are of another branch of the log"
    )


def prove_leaf(leaves: Leaves, checkpoint: bytes, policy: Policy, index: int) -> LeafProof:
    """Make a proof for one leaf of a verified log.

    Raises:
        ProtocolError, VerificationError, TooFewSitesError: The checkpoint is not acceptable, or the log has no such
            leaf.
    """
    head, _ = accept_checkpoint(checkpoint, policy)
    tree = Tree()
    for leaf in leaves():
        tree.append(leaf_hash(leaf))
    if (tree.frontier.size, tree.frontier.root) != (head.size, head.root):
        raise VerificationError(
            f"the leaves do not belong to the checkpoint: it has {head.size} leaves and another root hash",
            "verify the log first with `privet audit verify BUNDLE --policy FILE`",
        )
    return LeafProof(index, tree.prove(index), checkpoint)
