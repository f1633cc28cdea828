"""The history that a log tells, replayed leaf by leaf: who may say what, and when.

`Replay.admit` takes one verified statement after the other and refuses the first that cannot stand where it stands.
The coordinator asks it before it appends a leaf, an auditor asks it about every leaf: one set of rules for both.
Nothing here does I/O; hashes and roots are handed in. A statement that is refused changes nothing.

======================  ==========================================================================================
statement               may stand where
======================  ==========================================================================================
genesis                 it is leaf 0, and nowhere else
join, revoke            the site is new, or a member; keys are never used twice; the new quorum is one
run-open                the name is new; the promise keeps to the floor of the genesis
round-open              no round of the run is open; its number follows; its adapter is the one last published; its
                        nonce is new; its cohort are members, and enough
site-round              by a member of that round's cohort, once; its checkpoint is one of this very log and holds the
                        round-open; the site's ledger follows from its last statement; epsilon of the account does not
                        fall and stays under the site's limit. It may come late, after the round has ended.
round-close             the round is open; survivors are of the cohort, enough, and have each stated their site-round;
                        the adapter before is that of the round-open
round-abort             the round is open; the adapter stays. Under secure aggregation the next round has the next
                        number, as sites may have masked for this one; a plain round may be opened again
refusal                 by a member, about a run that was opened, its study, and a round that it may have
export                  the adapter is what that round published
======================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from privet.common.errors import PrivetError, VerificationError
from privet.common.log.checkpoint import Quorum
from privet.common.log.note import NoteKey
from privet.common.log.statements import (
    Charge,
    Export,
    Genesis,
    Join,
    Member,
    Refusal,
    Revoke,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SiteRound,
    StatedFloor,
    Statement,
)

RootAt = Callable[[int], bytes]
"""Returns the root of the tree of the first n leaves, for n up to the leaf's number."""


@dataclass(frozen=True)
class Leaf:
    """What is known of a leaf besides its statement.

    Attributes:
        index: Its number.
        hash: ``sha256:<hex>`` of its leaf hash.
        key: Who signed it: Ed25519 public key, 32 bytes.
    """

    index: int
    hash: str
    key: bytes


@dataclass
class OpenedRound:
    """A round-open and who has answered it."""

    statement: RoundOpened
    index: int
    answered: set[str] = field(default_factory=set)


@dataclass
class LoggedRun:
    """What a run has come to.

    Attributes:
        statement: Its run-open.
        adapter: The adapter in force.
        next: Number of the next round.
        published: Adapter after each closed round.
        rounds: Every attempt at a round by the hash of its round-open.
        open: Hash of the round-open that waits for its end.
    """

    statement: RunOpen
    adapter: str
    next: int = 1
    published: dict[int, str] = field(default_factory=dict)
    rounds: dict[str, OpenedRound] = field(default_factory=dict)
    nonces: set[str] = field(default_factory=set)
    open: str | None = None
    ended: bool = False


@dataclass(frozen=True)
class Standing:
    """Where a site stood in its last statement."""

    checkpoint: int = 0
    ledger: tuple[int, str] | None = None


class Replay:
    """A log's history up to now.

    Attributes:
        genesis: Leaf 0, once it was admitted.
        members: By name.
        revoked: Keys of members that left, statement and cosigning keys alike.
        runs: By name.
        epsilon: What each account of each site has spent, with its delta.
    """

    def __init__(self) -> None:
        self.genesis: Genesis | None = None
        self.members: dict[str, Member] = {}
        self.revoked: set[bytes] = set()
        self.quorum = 0
        self.runs: dict[str, LoggedRun] = {}
        self.epsilon: dict[tuple[str, str], tuple[float, float]] = {}
        self._sites: dict[str, Standing] = {}
        self._keys: set[bytes] = set()
        self._owners: dict[bytes, str] = {}

    @property
    def keys(self) -> Mapping[bytes, str]:
        """Who may sign statements now: name by public key, the coordinator under ''."""
        return self._owners

    def ledger_of(self, site: str) -> tuple[int, str] | None:
        """Return entry and head of a site's ledger in its last statement; None before its first."""
        return self._sites.get(site, Standing()).ledger

    def admit(self, leaf: Leaf, statement: Statement, root_at: RootAt) -> None:
        """Take the next leaf into the history, or refuse it and change nothing.

        Raises:
            VerificationError: It cannot stand there. The message says what was expected and found.
        """
        if isinstance(statement, Genesis):
            self._genesis(leaf, statement)
            return
        if self.genesis is None:
            raise VerificationError(f"expected a genesis as leaf 0, found a {statement.type}")
        author = statement.site if isinstance(statement, SiteRound | Refusal) else ""
        if self._owners.get(leaf.key) != author:
            whose = f"of {author}" if author else "of the coordinator"
            raise VerificationError(
                f"a {statement.type} is signed with key {leaf.key.hex()[:16]}, which is not a key {whose}"
            )
        match statement:
            case Join():
                self._join(statement)
            case Revoke():
                self._revoke(statement)
            case RunOpen():
                self._run_open(statement)
            case RoundOpened():
                self._round_open(leaf, statement)
            case SiteRound():
                self._site_round(statement, leaf, root_at)
            case RoundClose():
                self._round_close(statement)
            case RoundAbort():
                self._round_abort(statement)
            case Refusal():
                self._refusal(statement)
            case Export():
                self._export(statement)

    # Members

    def _genesis(self, leaf: Leaf, genesis: Genesis) -> None:
        if leaf.index != 0 or self.genesis is not None:
            raise VerificationError("a genesis is leaf 0 and stands once")
        if leaf.key.hex() != genesis.coordinator:
            raise VerificationError(
                f"a genesis is signed by the coordinator that it names, found {leaf.key.hex()[:16]}"
            )
        self.genesis, self.quorum = genesis, genesis.quorum
        self.members = {member.site: member for member in genesis.members}
        self._keys = {NoteKey.parse(genesis.log).public, leaf.key}
        self._owners = {leaf.key: ""}
        for member in genesis.members:
            self._keys |= set(member.publics())
            self._owners[bytes.fromhex(member.key)] = member.site

    def _join(self, join: Join) -> None:
        member = join.member
        if member.site in self.members:
            raise VerificationError(f"{member.site} joins, but is a member already")
        if not self._keys.isdisjoint(member.publics()):
            raise VerificationError(f"{member.site} joins with a key that was used before")
        if member.witness is not None:
            name, others = NoteKey.parse(member.witness).name, [each.witness for each in self.members.values()]
            if any(NoteKey.parse(other).name == name for other in others if other is not None):
                raise VerificationError(f"{member.site} joins as a witness under a name that is taken")
        self._change_quorum([*self.members.values(), member], join.quorum)
        self.members[member.site] = member
        self._keys |= set(member.publics())
        self._owners[bytes.fromhex(member.key)] = member.site

    def _revoke(self, revoke: Revoke) -> None:
        member = self.members.get(revoke.site)
        if member is None or member.key != revoke.key:
            raise VerificationError(f"{revoke.site} is revoked, but is no member with that key")
        self._change_quorum([other for other in self.members.values() if other is not member], revoke.quorum)
        del self.members[revoke.site]
        self.revoked |= set(member.publics())
        del self._owners[bytes.fromhex(member.key)]

    def _change_quorum(self, members: Sequence[Member], needed: int) -> None:
        try:
            Quorum(len([member for member in members if member.witness is not None]), needed)
        except PrivetError as error:
            raise VerificationError(error.message) from None
        self.quorum = needed

    # Runs and rounds

    def _run_open(self, opened: RunOpen) -> None:
        if opened.run in self.runs:
            raise VerificationError(f"run {opened.run} is opened a second time")
        if self.genesis is not None:
            _check_floor(self.genesis.floor, opened)
        self.runs[opened.run] = LoggedRun(opened, opened.adapter)

    def _round_open(self, leaf: Leaf, opened: RoundOpened) -> None:
        run = self._run(opened.run)
        where = f"run {opened.run}, round {opened.round}"
        if run.ended or opened.round > run.statement.rounds:
            raise VerificationError(f"{where}: is opened after the run has ended")
        if run.open is not None:
            raise VerificationError(f"{where}: is opened while round {run.rounds[run.open].statement.round} is open")
        _equal(f"{where}: its number", run.next, opened.round)
        _equal(f"{where}: its adapter", run.adapter, opened.adapter)
        if opened.nonce in run.nonces:
            raise VerificationError(f"{where}: its nonce was used before")
        strangers = [site for site in opened.cohort if site not in self.members]
        if strangers:
            raise VerificationError(f"{where}: {strangers[0]} is in the cohort and no member")
        if len(opened.cohort) < run.statement.min_sites:
            raise VerificationError(f"{where}: expected {run.statement.min_sites} sites, found {len(opened.cohort)}")
        if (opened.parameters is None) != (run.statement.secure_aggregation == "plain"):
            raise VerificationError(f"{where}: parameters of secure aggregation stand in masked runs alone")
        run.rounds[leaf.hash] = OpenedRound(opened, leaf.index)
        run.nonces.add(opened.nonce)
        run.open = leaf.hash

    def _site_round(self, stated: SiteRound, leaf: Leaf, root_at: RootAt) -> None:
        run = self._run(stated.run)
        where = f"run {stated.run}, round {stated.round}, site {stated.site}"
        opened = run.rounds.get(stated.opened)
        if opened is None or opened.statement.round != stated.round:
            raise VerificationError(f"{where}: answers a round-open that is not in the log")
        if stated.site not in opened.statement.cohort or stated.site in opened.answered:
            raise VerificationError(f"{where}: is not in the cohort, or has answered before")
        standing = self._sites.get(stated.site, Standing())
        seen = stated.checkpoint
        if not max(opened.index + 1, standing.checkpoint) <= seen.size <= leaf.index:
            raise VerificationError(
                f"{where}: quotes a checkpoint of {seen.size} leaves; it must hold leaf {opened.index}, "
                f"be no smaller than {standing.checkpoint} and no larger than {leaf.index}"
            )
        _equal(f"{where}: root of the quoted checkpoint of {seen.size} leaves", root_at(seen.size).hex(), seen.root)
        ledger = self._check_ledger(where, standing, stated)
        if stated.charge is not None:
            self._check_charge(where, run, stated.site, stated.charge)
        elif run.statement.privacy is not None:
            raise VerificationError(f"{where}: expected what the round cost, found nothing")
        opened.answered.add(stated.site)
        self._sites[stated.site] = replace(standing, checkpoint=seen.size, ledger=ledger)
        if stated.charge is not None:
            self.epsilon[stated.site, stated.charge.account] = (stated.charge.epsilon, stated.charge.delta)

    def _check_ledger(self, where: str, standing: Standing, stated: SiteRound) -> tuple[int, str] | None:
        """Check that the site's ledger follows from its last statement; return where it stands now."""
        if stated.ledger is None:
            if standing.ledger is not None:
                raise VerificationError(f"{where}: its ledger is missing")
            return None
        sequence, head = standing.ledger or (0, None)
        _equal(f"{where}: head of its ledger in its last statement", head, stated.ledger.previous)
        if stated.ledger.sequence < sequence or (
            stated.ledger.sequence == sequence and stated.ledger.head != head and standing.ledger is not None
        ):
            raise VerificationError(
                f"{where}: its ledger went from entry {sequence} to {stated.ledger.sequence}: it was rolled back"
            )
        return stated.ledger.sequence, stated.ledger.head

    def _check_charge(self, where: str, run: LoggedRun, site: str, charge: Charge) -> None:
        promise = run.statement.privacy
        if promise is None:
            raise VerificationError(f"{where}: states a cost in a run without privacy")
        _equal(f"{where}: mechanism", (promise.training, promise.validation), (charge.training, charge.validation))
        spent, delta = self.epsilon.get((site, charge.account), (0.0, charge.delta))
        _equal(f"{where}: delta of the account", delta, charge.delta)
        if charge.epsilon < spent:
            raise VerificationError(f"{where}: epsilon of the account fell from {spent} to {charge.epsilon}")
        if charge.limit is not None and charge.epsilon > charge.limit:
            raise VerificationError(f"{where}: epsilon {charge.epsilon} is above the site's limit of {charge.limit}")

    def _round_close(self, closed: RoundClose) -> None:
        run, opened = self._open_round(closed)
        where = f"run {closed.run}, round {closed.round}"
        _equal(f"{where}: adapter before", opened.statement.adapter, closed.adapter_before)
        cohort = set(opened.statement.cohort)
        if not (
            cohort.issuperset({*closed.survivors, *closed.failures})
            and closed.failures.keys().isdisjoint(closed.survivors)
        ):
            raise VerificationError(f"{where}: survivors and failures are sites of the cohort, each one of both")
        if len(closed.survivors) < run.statement.min_sites:
            raise VerificationError(
                f"{where}: expected {run.statement.min_sites} survivors, found {len(closed.survivors)}"
            )
        silent = [site for site in closed.survivors if site not in opened.answered]
        if silent:
            raise VerificationError(f"{where}: {silent[0]} survived without a statement of its own")
        _check_epsilons(where, run, closed)
        run.adapter = run.published[closed.round] = closed.adapter_published
        run.next = closed.round + 1
        run.open = None
        run.ended = closed.ended

    def _round_abort(self, aborted: RoundAbort) -> None:
        run, opened = self._open_round(aborted)
        where = f"run {aborted.run}, round {aborted.round}"
        _equal(f"{where}: adapter", opened.statement.adapter, aborted.adapter)
        _check_epsilons(where, run, aborted)
        if run.statement.secure_aggregation == "masked":
            run.next = aborted.round + 1
        run.open = None

    def _export(self, export: Export) -> None:
        run = self._run(export.run)
        if export.round not in run.published:
            raise VerificationError(f"run {export.run}: exports round {export.round}, which is not closed")
        _equal(
            f"run {export.run}: exported adapter of round {export.round}", run.published[export.round], export.adapter
        )

    def _refusal(self, refusal: Refusal) -> None:
        run = self._run(refusal.run).statement
        where = f"{refusal.site} refuses run {refusal.run}"
        _equal(f"{where}: study", run.study, refusal.study)
        if refusal.round > run.rounds:
            raise VerificationError(f"{where}: it has {run.rounds} rounds, found round {refusal.round}")

    def _run(self, name: str) -> LoggedRun:
        run = self.runs.get(name)
        if run is None:
            raise VerificationError(f"run {name}: was not opened")
        return run

    def _open_round(self, ending: RoundClose | RoundAbort) -> tuple[LoggedRun, OpenedRound]:
        run = self._run(ending.run)
        where = f"run {ending.run}, round {ending.round}"
        if run.open is None or run.open != ending.opened or run.rounds[run.open].statement.round != ending.round:
            raise VerificationError(f"{where}: a {ending.type} of a round that is not open")
        return run, run.rounds[run.open]


def _check_floor(floor: StatedFloor, opened: RunOpen) -> None:
    """Check that a run keeps to what the genesis demands of every run."""
    promise = opened.privacy
    for what, most, given in (
        ("epsilon", floor.max_epsilon, promise.epsilon if promise else None),
        ("delta", floor.max_delta, promise.delta if promise else None),
    ):
        if most is not None and (given is None or given > most):
            raise VerificationError(f"run {opened.run}: the genesis allows {what} up to {most}, found {given}")
    if opened.min_sites < floor.min_sites:
        raise VerificationError(
            f"run {opened.run}: the genesis demands {floor.min_sites} sites, found {opened.min_sites}"
        )


def _check_epsilons(where: str, run: LoggedRun, ending: RoundClose | RoundAbort) -> None:
    if (ending.epsilon is None) != (run.statement.privacy is None):
        raise VerificationError(f"{where}: epsilons stand in private runs alone")


def _equal(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise VerificationError(f"{what}: expected {expected}, found {found}")
