"""The round log, written: sign, check and append statements, have sites cosign, and prove what is in the log.

Nothing enters the log that an audit would reject. A statement is admitted to the history first
(`privet.common.log.replay`), then buffered, and appended together with the others that arrived meanwhile: one wait
for the disk. A round's statements are on the disk before the round's next step begins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from privet.common.canonical import digest
from privet.common.errors import PrivetError, ProtocolError, StateError, VerificationError
from privet.common.files import write_durably
from privet.common.log.checkpoint import Checkpoint, Policy, Quorum, least_quorum
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope, sign_envelope
from privet.common.log.epochs import RotationPlace, possession_text
from privet.common.log.mldsa import Use
from privet.common.log.note import Note, NoteKey, Signature, parse_lines, parse_note, verify_note
from privet.common.log.proofs import prove
from privet.common.log.replay import Leaf, Replay, admit
from privet.common.log.statements import (
    Export,
    Genesis,
    Join,
    Member,
    Refusal,
    Renew,
    Revoke,
    Rotate,
    RunOpen,
    SiteRound,
    Statement,
)
from privet.common.pki.keyfile import public_key
from privet.common.secagg.encoding import is_kind
from privet.common.secagg.messages import Masked
from privet.common.study.messages import Contribution, Cosigned, Evidence, Failure, Message, RoundOpen, Secured, Shown
from privet.server.exchange import Exchange
from privet.server.log.keys import POLICY, Keys
from privet.server.log.roundlog import RoundLog, create_log, lean, open_log

NEWCOMERS = 4
"""Members that a site may have confirmed before the log has them."""
_VERSION = "run the same version of privet at the site and at the coordinator"


class FormerKeysError(StateError):
    """The round log was opened with other keys than its present ones."""


class Journal:
    """An open round log with its history; `open_journal` makes it. Belongs to the thread that opened it."""

    def __init__(self, log: RoundLog, keys: Keys, clock: Callable[[], int]) -> None:
        self.clock = clock
        self.history = Replay()
        self._log = log
        self._keys = keys
        self._held: list[bytes] = []
        self._leaves: dict[str, int] = {}
        self._runs: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._refused: set[tuple[str, str, int]] = set()
        self._exports: dict[str, Export] = {}
        # By content: ML-DSA-65 never gives a statement the same envelope twice.
        self._members: list[tuple[bytes, Statement]] = []
        self._uploads: dict[tuple[str, str], str] = {}
        for data in log.leaves():
            self._admit(data)
        # Nothing is signed with a key that ended, also by a process that has read it before.
        if not keys.count_for(self.history):
            raise FormerKeysError(
                "the round log names other keys of log and coordinator than this command has read: they were rotated, "
                "or the rotation was interrupted",
                "start the command again; if that does not help, run `privet coordinator rotate --keys`, or restore "
                "the newest `keys/`",
            )
        log.follow(lambda size: self.history.epoch_at(size).log)

    @property
    def policy(self) -> Policy:
        """The witnesses of the log, and how many of them must cosign now."""
        return policy_of(self._keys.public, list(self.history.members.values()), self.history.quorum)

    @property
    def keys(self) -> Keys:
        """The keys that sign checkpoints, statements and releases."""
        return self._keys

    def exported(self, run: str) -> Export | None:
        """Return the last `export` of a run; None before the first."""
        return self._exports.get(run)

    # Statements

    def say(self, statement: Statement) -> str:
        """Sign a statement of the coordinator and add it; return its leaf's hash.

        Raises:
            VerificationError: The history does not allow it at this place.
        """
        data = sign_envelope(statement, self._keys.coordinator, self._keys.pq)
        leaf = self._admit(data)
        self._held.append(data)
        return leaf.hash

    def holds(self, statement: Statement) -> bool:
        """Whether the log has this statement about members, by the coordinator's present key."""
        return (self._keys.coordinator.public_key().public_bytes_raw(), statement) in self._members

    def hear(self, data: bytes, author: str) -> None:
        """Add a site's signed statement.

        Args:
            data: Its envelope.
            author: The site that must have signed it.

        Raises:
            ProtocolError, VerificationError: Another key signed it, or the history does not allow it at this place.
                Nothing is added.
        """
        # By the key that the log has for the site: a site must not be able to make statements in another's name.
        key = Envelope.decode(data).key
        if self.history.keys.get(key) != author:
            raise VerificationError(
                f"site {author} sent a statement that is signed with key {key.hex()[:16]}, which is not its identity "
                "key in the round log",
                "revoke the site, and let it join again if its operator changed the key",
            )
        self._admit(data)
        self._held.append(data)

    def hear_round(self, reply: Secured | Contribution, opened: str, author: str) -> None:
        """Add a site's statement about its part in a round.

        Args:
            reply: The site's update, with its statement.
            opened: Hash of the round's `round-open`.
            author: The site.

        Raises:
            ProtocolError, VerificationError: There is no statement, or it is about another round or update.
        """
        if not reply.statement:
            raise VerificationError(
                "the site sent an update without its signed statement about the round",
                _VERSION,
            )
        stated = parse_statement(Envelope.decode(reply.statement).payload)
        # The statement must name this round and the digest of this update. Otherwise a site could deny later what it
        # sent, or replay the statement of another round.
        if not isinstance(stated, SiteRound) or (stated.opened, stated.upload) != (opened, digest(reply.upload)):
            raise VerificationError(
                f"the site's statement of type {stated.type} is not about this round, or not about the update that was "
                "sent with it",
                _VERSION,
            )
        if self._uploads.get((opened, author)) != stated.upload:  # a repeated answer is logged once
            self.hear(reply.statement, author)

    def hear_refusal(self, data: bytes, author: str | None = None) -> None:
        """Add a site's refusal of a run or of a round, once: the site is asked again before every round.

        Args:
            data: Its envelope.
            author: The site that must have signed it; None if it is not known yet which site answers.

        Raises:
            ProtocolError, VerificationError: It is not a refusal, or the history does not allow it.
        """
        stated = parse_statement(Envelope.decode(data).payload)
        if not isinstance(stated, Refusal):
            raise ProtocolError(
                f"a site that refuses must send a statement of type refusal, found type {stated.type}", _VERSION
            )
        if author is not None and stated.site != author:
            raise VerificationError(
                f"site {author} sent a refusal in the name of site {stated.site}",
                "ask the site's operator; revoke the site if it does so again",
            )
        said = (stated.site, stated.run, stated.round)
        if said not in self._refused:
            self.hear(data, stated.site)
            self._refused.add(said)

    def rotate(self, following: Keys, charter: str) -> int:
        """Replace the keys of log and coordinator, durably; return the number of the leaf that says so.

        Args:
            following: The keys from the next leaf on.
            charter: Digest of the charter with these keys.

        Raises:
            VerificationError: A round is open, or a key was used before.
            StateError: The log cannot be written.
        """
        self.flush()
        index, genesis = self._log.size, self.history.genesis
        if genesis is None:
            raise StateError("the round log is empty: the consortium is not founded", "run `privet coordinator found`")
        place = RotationPlace(genesis.consortium, index, self._log.root_at(index), self.history.epoch_at(index))
        self.say(rotation(place, following, charter, self.clock()))
        self.flush()
        self._keys = following
        self._log.sign_with(following.log, following.pq)
        return index

    def leaf_at(self, index: int) -> bytes:
        """Return the bytes of a leaf. Raises StateError: It cannot be read, or what is buffered cannot be written."""
        self.flush()
        return next(iter(self._log.leaves(index)))

    def flush(self) -> None:
        """Append the buffered statements: durable on return.

        Raises:
            StateError: It could not be written.
        """
        if self._held:
            self._log.append(self._held)
            self._held = []

    def _admit(self, data: bytes) -> Leaf:
        leaf, statement = admit(self.history, len(self._leaves), data, self._log.root_at)
        self._leaves[leaf.hash] = leaf.index
        if isinstance(statement, Genesis | Join | Revoke | Renew):
            self._members.append((leaf.key, statement))
        if isinstance(statement, RunOpen):
            self._runs[statement.run] = leaf.index
        if isinstance(statement, SiteRound):
            self._uploads[statement.opened, statement.site] = statement.upload
        if isinstance(statement, Export):
            self._exports[statement.run] = statement
        if isinstance(statement, Refusal):
            self._refused.add((statement.site, statement.run, statement.round))
        return leaf

    # Witnesses

    @property
    def witnessed(self) -> bool:
        """Whether a quorum has cosigned everything in the log."""
        return not self._held and self.accepted_size == self._log.size

    @property
    def accepted_size(self) -> int:
        """Number of leaves under the newest checkpoint that a quorum has cosigned."""
        return self._log.accepted_size(self.policy)

    def accepts(self, leaf: str) -> bool:
        """Whether a checkpoint that a quorum has cosigned covers the leaf with this hash."""
        return self._leaves[leaf] < self.accepted_size

    def sign_head(self) -> None:
        """Sign a checkpoint over all leaves, so that members can replay the log before any run. Raises as `witness`."""
        self.flush()
        self._log.checkpoint()

    def witness(self, exchange: Exchange, nodes: Mapping[str, int], timeout: float) -> dict[str, Failure]:
        """Ask sites to cosign the log as it is now.

        Args:
            exchange: Reaches them.
            nodes: Their addresses by name.
            timeout: Seconds that each of at most two exchanges may take.

        Returns:
            The reasons of the sites that did not cosign, by name.

        Raises:
            StateError: The log could not be written.
        """
        self.flush()
        note, size = self._log.checkpoint(), self._log.size
        shown = parse_note(note)
        names = {node: name for name, node in nodes.items()}
        found: list[Signature] = []
        failures: dict[str, Failure] = {}
        waiting = dict(nodes)
        # Twice: a site that has cosigned another size than assumed answers with that size, and gets a proof from there.
        for _ in range(2):
            requests = {node: self._shown(note, self._seen.get(name, 0)) for name, node in waiting.items()}
            waiting = {}
            for node, reply in exchange.ask(requests, timeout=timeout):
                name = names[node]
                try:
                    if isinstance(reply, Cosigned) and not reply.line:
                        self._seen[name] = self._known(reply.size)
                        waiting[name] = node
                        continue
                    found += self._cosignatures(shown, name, reply)
                    self._seen[name] = size
                except PrivetError as error:
                    failures[name] = Failure(type(error).__name__, error.message, error.hint)
        self._log.cosign(size, found, self.policy)
        return failures

    def _shown(self, note: bytes, old: int) -> Shown:
        # A witness reads the log's own signature, and nobody else's.
        own = lean(note, self.history.epoch_at(self._log.size).log, (), 0)
        return Shown(own, old, b"".join(self._log.prove_consistency(old, self._log.size)))

    def _known(self, size: int) -> int:
        if not 0 <= size <= self._log.size:
            raise VerificationError(
                f"the site has cosigned {size} leaves, but this round log has {self._log.size}",
                "if several sites report this, the log is an old backup: restore the newest, and never start a new log",
            )
        return size

    def _cosignatures(self, note: Note, name: str, reply: Message) -> tuple[Signature, ...]:
        """Return a site's verified cosignature, as its lines; none if the site is not a witness of the log."""
        if isinstance(reply, Failure):
            raise VerificationError(reply.message, reply.hint)
        if not isinstance(reply, Cosigned):
            raise VerificationError(
                f"the site must answer a checkpoint with a cosignature, found a message of type {reply.kind}", _VERSION
            )
        lines = parse_lines(reply.line)
        member = self.history.members.get(name)
        if member is None or member.witness is None:
            return ()
        key = NoteKey.parse(member.witness)
        if verify_note(Note(note.text, lines), (key,)) != (key,) or len(lines) != len(key.ids):
            raise VerificationError(
                f"the site's cosignature was not made with the cosigning key that the round log has for {key.name}"
                + (", which signs with Ed25519 and with ML-DSA-65" if key.pq else ""),
                "let the site restore its cosigning key, or join again with new keys",
            )
        return lines

    # Proofs and files

    def evidence(self, run: str, opened: str) -> Evidence:
        """Return the proof that a round is in the log.

        With ML-DSA-65 a cosignature has 4.6 kB, so none is sent that no site needs: a site has cosigned the run's
        checkpoint itself, and counts the cosignatures of the round's alone. An auditor has all of them, in the log.

        Raises:
            TooFewSitesError: No quorum has cosigned it yet.
        """
        policy = self.policy
        places = self._runs[run], self._leaves[opened]
        leaves = [next(iter(self._log.leaves(place))) for place in places]
        proofs = [self._log.prove_leaf(place, policy) for place in places]
        log = self.history.epoch_at(Checkpoint.parse(parse_note(proofs[1].checkpoint).text).size).log
        left = set(self.history.owners.values()) - set(self.history.members)
        most = convincing(len(policy.witnesses), policy.needed, len(left))
        started, stated = (
            replace(proof, checkpoint=lean(proof.checkpoint, log, policy.witnesses, count)).encode()
            for proof, count in zip(proofs, (0, most), strict=True)
        )
        return Evidence(leaves[0], started, leaves[1], stated)

    def for_site(self, evidence: Evidence, site: str) -> Evidence:
        """Add the position of the site's ledger from its last statement in the log."""
        # The site compares it with its own ledger: a ledger restored from a backup would be behind it.
        sequence, head = self.history.ledger_of(site) or (0, "")
        return replace(evidence, sequence=sequence, head=head)

    def publish(self, directory: Path) -> Checkpoint:
        """Write the log as static files up to the newest accepted checkpoint. Raises as `RoundLog.publish`."""
        return self._log.publish(directory, self.policy)


def convincing(witnesses: int, needed: int, left: int) -> int:
    """Return how many cosignatures convince every member, as its site counts them (`client/rounds/history.py`).

    A site counts who left until its operator has withdrawn them, and who was approved as soon as its operator has
    confirmed them, which may be before the log has them.

    Args:
        witnesses: Number of members.
        needed: How many must cosign by the log.
        left: Number of sites that ever left.
    """
    return max(needed, least_quorum(witnesses + left + NEWCOMERS, Quorum(witnesses, needed).colluding))


@dataclass(frozen=True)
class Listening:
    """An exchange that enters the statements in replies in the round log before it passes the replies on.

    A reply with an update but without a valid statement counts as a failure.

    Attributes:
        exchange: The transport.
        journal: Receives the statements.
        names: Sites by address.
        opened: Hash of the `round-open` of the current round; empty between rounds.
        evidence: Proves to sites that the round is in the log.
    """

    exchange: Exchange
    journal: Journal
    names: Mapping[int, str] = field(default_factory=dict)
    opened: str = ""
    evidence: Evidence = field(default_factory=Evidence)

    def nodes(self) -> Sequence[int]:
        """Return the addresses that are online now."""
        return self.exchange.nodes()

    def ask(self, requests: Mapping[int, Message], *, timeout: float) -> Iterable[tuple[int, Message]]:
        """Send one message to each address, yield the replies, and make their statements durable."""
        shown = {node: self._shown(node, request) for node, request in requests.items()}
        for node, reply in self.exchange.ask(shown, timeout=timeout):
            yield node, self._heard(node, reply)
        self.journal.flush()

    def _shown(self, node: int, request: Message) -> Message:
        if not isinstance(request, RoundOpen):
            return request
        return replace(request, evidence=self.journal.for_site(self.evidence, self.names[node]))

    def _heard(self, node: int, reply: Message) -> Message:
        try:
            if isinstance(reply, Failure) and reply.statement:
                self.journal.hear_refusal(reply.statement, self.names.get(node))
            elif self.opened and isinstance(reply, Contribution | Secured) and _is_upload(reply):
                self.journal.hear_round(reply, self.opened, self.names[node])
        except (ProtocolError, VerificationError) as error:
            # The update must not be counted: in an audit it would be one that no site has stated.
            return Failure(
                type(error).__name__, f"the site's statement for the round log was refused: {error.message}", error.hint
            )
        return reply


def _is_upload(reply: Contribution | Secured) -> bool:
    return isinstance(reply, Contribution) or is_kind(Masked, reply.body)


def policy_of(log: NoteKey, members: Sequence[Member], quorum: int) -> Policy:
    """Return the policy that follows from the members: the members that are witnesses, and how many must cosign."""
    keys = [NoteKey.parse(member.witness) for member in members if member.witness is not None]
    return Policy(log, tuple(sorted(keys, key=lambda key: key.name)), quorum)


def rotation(place: RotationPlace, following: Keys, charter: str, time: int) -> Rotate:
    """Return the statement that keys are replaced at a place, with the proofs that the new ones are at hand."""
    draft = Rotate(
        time=time,
        log=following.public.text,
        coordinator=public_key(following.coordinator),
        charter=charter,
        log_proof="0" * 128,
        coordinator_proof="0" * 128,
    )
    text = possession_text(place, draft)
    log = prove(text, following.log, following.pq, Use.ROTATION)
    return draft.model_copy(update={"log_proof": log, "coordinator_proof": following.coordinator.sign(text).hex()})


def create_journal(directory: Path, keys: Keys, statements: Sequence[Statement]) -> None:
    """Create a log that begins with these statements of the coordinator, the genesis first.

    Raises:
        StateError: The directory has a log already, or cannot be written.
        VerificationError: The history does not allow a statement at its place.
    """
    create_log(directory)
    with open_log(directory, keys.origin, keys.log, pq=keys.pq) as log:
        journal = Journal(log, keys, _now)
        for statement in statements:
            journal.say(statement)
        journal.flush()
        write_durably(directory / POLICY, journal.policy.text.encode())


@contextmanager
def open_journal(directory: Path, keys: Keys) -> Iterator[Journal]:
    """Open a round log, lock it for this process, verify it, and replay its history.

    Raises:
        StateError: There is no log, another process has locked it, or it cannot be read.
        VerificationError: It was changed, or the history does not allow one of its statements.
    """
    with open_log(directory, keys.origin, keys.log, pq=keys.pq, one_key=False) as log:
        yield Journal(log, keys, _now)


def _now() -> int:
    return int(time.time())
