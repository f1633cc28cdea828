"""A site's own copy of the round log, replayed from its first leaf: who the members are, and whether it trusts them.

The coordinator tells a site which keys cosign the log, and could name keys of its own. So a site takes the log's leaves
from the coordinator, hashes them, and believes them only where their root is that of a checkpoint that the log signed
and this site cosigned. Then it replays them with the rules of the auditor, and compares: the genesis with the charter,
and every member's keys with those that its operator confirmed. From this alone follow the witnesses and the quorum.

One file keeps the leaves, each behind its length in four bytes. It needs no protection: bytes that were changed give
another root, and are taken anew.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from privet.client.trust import Trusted
from privet.common.audit.verify import Tree
from privet.common.errors import PrivetError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.checkpoint import Checkpoint, Policy, least_quorum
from privet.common.log.merkle import leaf_hash
from privet.common.log.note import NoteKey
from privet.common.log.replay import Replay, admit
from privet.common.log.statements import Member
from privet.common.log.tiles import MAX_LEAF_BYTES
from privet.common.pki.charter import Charter

MOST_BYTES = 2**28
"""Most bytes of leaves that a site takes at a time: some 300,000 statements."""
_LENGTH = 4
_STOP = "take part in no round, and ask the operators of coordinator and sites"
_MOST_LEAVES = 1 << 22  # of a log: a checkpoint alone may claim 2^53
Fetch = Callable[[int], list[bytes]]
"""Returns leaves of the log from a number on, as many as it likes; none at the log's end."""


@dataclass
class LogCopy:
    """A site's copy of a log.

    Attributes:
        site: The site's name.
        file: Where the leaves are kept.
        trusted: Returns what the site's operator has confirmed, as it stands now.
        newest: Returns the newest checkpoint that this site cosigned.
        fetch: Returns leaves from the coordinator.
        writes: Whether leaves are added to the file. One process at a time may do so; others read it.
    """

    site: str
    file: Path
    trusted: Callable[[], Trusted]
    newest: Callable[[], Checkpoint]
    fetch: Fetch
    writes: bool = True
    _tree: Tree = field(default_factory=Tree)
    _history: Replay = field(default_factory=Replay)
    _broken: str = ""
    _loaded: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def size(self) -> int:
        """Number of leaves in the copy."""
        return self._tree.frontier.size

    def policy(self, checkpoint: Checkpoint) -> Policy:
        """Return who has to cosign, from the log up to the newest checkpoint that this site cosigned.

        Args:
            checkpoint: Signed by the log and cosigned by this site; that one, or an earlier one.

        Raises:
            VerificationError: The leaves are not those of the checkpoint; a statement in them breaks the log's rules;
                or they name a log, a coordinator or members other than those that the site's operator confirmed.
            PrivetError: As `fetch`. StateError: The copy cannot be read or written.
        """
        return policy_of(self.history(checkpoint), self.trusted(), self.site, checkpoint.size)

    def history(self, checkpoint: Checkpoint) -> Replay:
        """Return the history of which a checkpoint is a part. Raises as `policy`."""
        with self._lock:
            newest = self.newest()
            if newest.size > _MOST_LEAVES:
                raise VerificationError(
                    f"the round log has {newest.size} leaves by its checkpoint, more than the {_MOST_LEAVES} that a "
                    "site copies",
                    _STOP,
                )
            if self.size < newest.size:
                self._catch_up(newest)
            if self._broken:
                raise VerificationError(self._broken, _STOP)
            if self.size < checkpoint.size or self._tree.root_at(checkpoint.size) != checkpoint.root:
                raise VerificationError(
                    f"the checkpoint of {checkpoint.size} leaves is not one of the log that this site has a copy of",
                    _STOP,
                )
            return self._history

    def _catch_up(self, newest: Checkpoint) -> None:
        if not self._loaded:
            if kept := list(kept_leaves(self.file))[: newest.size]:
                with suppress(VerificationError):  # they were changed, or are of another log: all are fetched anew
                    self._take([*kept, *self._fetched(len(kept), newest.size)], newest)
            self._loaded = True
        if self.size < newest.size and not self._broken:
            self._take(self._fetched(self.size, newest.size), newest)

    def _fetched(self, first: int, size: int) -> list[bytes]:
        found: list[bytes] = []
        taken = 0
        while first + len(found) < size:
            batch = self.fetch(first + len(found))
            taken += sum(map(len, batch))
            if taken > MOST_BYTES:
                # They can be checked only once all are here, and the coordinator decides how many there are.
                raise VerificationError(
                    f"the leaves of the round log that this site has not seen have more than {MOST_BYTES} bytes", _STOP
                )
            if not batch:
                raise VerificationError(
                    f"the round log has {size} leaves by its checkpoint, but the coordinator gives "
                    f"{first + len(found)} of them",
                    _STOP,
                )
            found += batch
        return found[: size - first]

    def _take(self, leaves: Sequence[bytes], newest: Checkpoint) -> None:
        """Add leaves that give the checkpoint's root. Nothing of them is parsed before."""
        tree = Tree(self._tree.frontier, list(self._tree.hashes), dict(self._tree.roots))
        for leaf in leaves:
            tree.append(leaf_hash(leaf))
        if (tree.frontier.size, tree.frontier.root) != (newest.size, newest.root):
            raise VerificationError(
                f"the leaves that the coordinator gives are not those of the checkpoint of {newest.size} leaves that "
                "this site cosigned",
                _STOP,
            )
        first, self._tree = self.size, tree
        for index, leaf in enumerate(leaves, start=first):
            try:
                admit(self._history, index, leaf, tree.root_at)
            except PrivetError as error:
                # The log holds this leaf for ever, so no later checkpoint of it can be accepted.
                self._broken = f"leaf {index} of the round log breaks the rules of the log: {error.message}"
                return
            except BaseException:
                # Of any other kind, such as too little memory: a history without this leaf must not be relied on.
                self._tree, self._history, self._loaded = Tree(), Replay(), False
                raise
        if self.writes:
            _keep(self.file, leaves, first)


def policy_of(history: Replay, trusted: Trusted, site: str, size: int) -> Policy:
    """Return the policy of a log from its history, if all in it is what a site's operator has confirmed.

    Args:
        history: The replayed log.
        trusted: What was confirmed.
        site: The site's name.
        size: Of the checkpoint for which the policy is: the log's key may have been rotated since.

    Raises:
        VerificationError: It is not.
    """
    charter = confirmed(trusted)
    genesis = history.genesis
    if genesis is None:
        raise VerificationError(
            "the round log has no genesis", "ask the coordinator's operator to found the consortium"
        )
    if charter.consortium != genesis.consortium:
        raise VerificationError("the round log's first leaf has another name of the consortium than the charter", _STOP)
    _check_epochs(history, trusted, charter)
    own = history.members.get(site)
    mine = trusted.stated.get(site)
    if own is None and mine is not None and history.revoked.intersection(mine.publics()):
        raise VerificationError(
            f"by the round log, site {site} was revoked",
            "ask the coordinator's operator; to take part again, join anew with new keys: `privet site join @TOKEN "
            "NEW-DIRECTORY`",
        )
    if own is None:
        raise VerificationError(
            f"the round log names no member {site}",
            "wait until the coordinator has founded the consortium, or ask its operator whether this site was revoked",
        )
    strangers = sorted(name for name, member in history.members.items() if trusted.stated.get(name) != member)
    if site in strangers:
        hint = _STOP
        if _gained(trusted.stated.get(site), own):
            hint = (
                "if this site's operator asked for it, finish it with `privet site renew SITE --keys`; otherwise "
                + _STOP
            )
        raise VerificationError("the round log names other keys for this site than its own", hint)
    gained = [name for name in strangers if _gained(trusted.stated.get(name), history.members[name])]
    if strangers and strangers == gained:
        raise VerificationError(
            f"by the round log, these members have an ML-DSA-65 key now, which this site's operator has not confirmed: "
            f"{', '.join(gained)}",
            "have the operator of each read out the words of its keys, and type them: `privet site trust SITE NAME`",
        )
    if strangers:
        raise VerificationError(
            f"the round log names members whose keys this site's operator has not confirmed: {', '.join(strangers)}",
            "have the operator of each read out the words of its keys, and type them: `privet site trust SITE NAME`",
        )
    witnesses = [NoteKey.parse(member.witness) for member in history.members.values() if member.witness is not None]
    # Who left counts until the operator has heard of it. Otherwise the coordinator could show two parts of the members
    # a log each, in which the others are revoked, and the colluding ones would be enough for both quorums.
    departed = sorted(set(trusted.keys) - set(history.members))
    count = len(witnesses) + len(departed)
    needed = max(least_quorum(count, min(charter.colluding, max(count - 1, 0))), history.quorum)
    if needed > len(witnesses):
        raise VerificationError(
            f"{needed} of {count} members must cosign the round log, but in the log {', '.join(departed) or 'others'} "
            "left",
            "ask the operator of each whether that is true, and confirm it: `privet site trust SITE NAME --withdraw`",
        )
    return Policy(history.epoch_at(size).log, tuple(sorted(witnesses, key=lambda key: key.name)), needed)


def _gained(known: Member | None, logged: Member) -> bool:
    """Return whether the log has an ML-DSA-65 key beside a member's confirmed keys, and else the same ones."""
    if known is None or logged.witness is None:
        return False
    return known == logged.model_copy(update={"witness": replace(NoteKey.parse(logged.witness), pq=b"").text})


def _check_epochs(history: Replay, trusted: Trusted, charter: Charter) -> None:
    """Check that the log's present keys are the charter's, and its earlier ones those that the site knew."""
    present = history.epochs[-1]
    if (present.log.text, present.coordinator.hex()) == (charter.log, charter.coordinator):
        if trusted.former and list(trusted.epochs) != history.epochs:
            raise VerificationError(
                "the round log rotated its keys at other leaves, or from other keys, than this site has confirmed",
                _STOP,
            )
        return
    ended = [at for was, at in pairwise(history.epochs) if was.log.text == charter.log]
    if ended:
        raise VerificationError(
            f"leaf {ended[0].since - 1} of the round log replaces the keys that this site's operator has confirmed",
            "have the coordinator's operator read out the new charter, and type its words: `privet site trust SITE`",
        )
    what = "key of the log" if present.log.text != charter.log else "key of the coordinator"
    raise VerificationError(f"the round log has another {what} than the charter", _STOP)


def confirmed(trusted: Trusted) -> Charter:
    """Return the charter that a site's operator has confirmed.

    Raises:
        VerificationError: None yet.
    """
    if trusted.charter is None:
        raise VerificationError(
            "this site's operator has not confirmed the charter of the consortium",
            "have the coordinator's operator read out its words, and type them: `privet site trust SITE`",
        )
    return trusted.charter


def kept_leaves(file: Path) -> Iterator[bytes]:
    """Yield the leaves of a file; one that was cut short by a crash ends them."""
    try:
        with file.open("rb") as opened:
            while len(head := opened.read(_LENGTH)) == _LENGTH:
                size = int.from_bytes(head, "big")
                leaf = opened.read(size) if 0 < size <= MAX_LEAF_BYTES else b""
                if not leaf or len(leaf) < size:
                    return
                yield leaf
    except FileNotFoundError:
        return
    except OSError as error:
        raise StateError(f"{file} cannot be read ({error.strerror})", "check the disk, or delete the file") from None


def _keep(file: Path, leaves: Sequence[bytes], first: int) -> None:
    data = b"".join(len(leaf).to_bytes(_LENGTH, "big") + leaf for leaf in leaves)
    try:
        if first == 0:
            write_durably(file, data, 0o600)
            return
        with file.open("ab") as kept:
            kept.write(data)
            kept.flush()
            os.fsync(kept.fileno())
    except OSError as error:
        raise StateError(
            f"{file}, the site's copy of the round log, cannot be written ({error.strerror})",
            "check the disk space and the permissions; the site takes part in no round meanwhile",
        ) from None
