"""The history of a log, replayed leaf by leaf: who may state what, and when.

`Replay.admit` takes verified statements one by one, and refuses the first that its rules do not allow. The coordinator
calls it before it appends a leaf, and an auditor for every leaf, so both use one set of rules. Nothing here does I/O;
hashes and roots are arguments. A statement that is refused changes nothing.

======================  ==========================================================================================
statement               is allowed if
======================  ==========================================================================================
genesis                 it is leaf 0
join, revoke            the site is new (join) or a member (revoke); no key was used before; the new quorum is safe
renew                   the site is a member without ML-DSA-65 key; its new one was not used before; the identity key
                        and the new key have signed the change, which changes nothing else. From the next leaf on, its
                        statements need both signatures
rotate                  no round is open; both keys are new in the log's history, and each has signed this leaf's place;
                        the log's name stays. From the next leaf on, the coordinator's statements count under the new
                        key
run-open                its name is new; its promise is within the floor of the genesis; no gate withholds the adapter
                        that it begins from
round-open              no round of the run is open; its number is the next one; its adapter is the last published
                        one; its nonce is new; its cohort are members, and as many as the run needs; `parameters` is
                        the digest of the cohort's identity keys as the log has them here
site-round              the author is in that round's cohort and has not stated it before; its checkpoint is one of
                        this log and holds the round-open; the site's ledger continues that of its last statement;
                        the account's epsilon does not fall and is within the site's limit. It may come after the
                        round has ended
round-close             the round is open; its survivors are in the cohort, as many as the run needs, and each has a
                        site-round; its adapter before is that of the round-open; it publishes the new adapter, one
                        from which an earlier round of the run started, or at the end an average; it has a
                        transcript exactly if the run uses secure aggregation
round-abort             the round is open; its adapter is that of the round-open; the sites that failed are in the
                        cohort. Under secure aggregation the next
                        round has the next number, since sites may have masked for this one; a plain round may be
                        opened again or given up
refusal                 its author is a member; its run was opened, for its study; the run has such a round
export                  its adapter is the one that its round published; an adapter that was released before keeps its
                        state, and a revoked one is revoked whichever run releases it. Of a run with a gate, it is the
                        candidate, an egress decision has accepted it, and that has not expired; of another run, no gate
                        withholds it
adapter-state           its run released this adapter; the state is later in the order released, superseded, retired,
                        revoked; what supersedes it is a release of another run that is neither retired nor revoked
egress-review           its author answered a round of the run and has not left since; the run has a gate and has ended;
                        study and adapter are the candidate's; nothing is decided; the site has not spoken, or takes its
                        signature back
egress-decision         study and adapter are the candidate's; nothing is decided; its figures follow from the log; if
                        it accepts, every condition of the gate is met (`privet.common.log.gate`)
======================  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from privet.common.errors import PrivetError, VerificationError
from privet.common.log.agreement import keys_digest
from privet.common.log.checkpoint import Quorum
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.epochs import KeyEpoch, RotationPlace, check_possession, epoch_at
from privet.common.log.gate import Gate
from privet.common.log.merkle import leaf_hash
from privet.common.log.note import NoteKey
from privet.common.log.renewal import check_renewal
from privet.common.log.statements import (
    AdapterState,
    Charge,
    EgressDecision,
    EgressReview,
    Export,
    Genesis,
    Join,
    Member,
    Refusal,
    Renew,
    Revoke,
    Rotate,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SiteRound,
    StatedFloor,
    Statement,
)
from privet.common.masking.isolation import Isolation, Sums

STATES = ("released", "superseded", "retired", "revoked")
"""The states of a released adapter. It never goes back to an earlier one."""
RootAt = Callable[[int], bytes]
"""Returns the root of the tree of the first n leaves, for n up to the leaf's number."""


@dataclass(frozen=True)
class Leaf:
    """The facts about a leaf besides its statement.

    Attributes:
        index: Number of the leaf.
        hash: Its leaf hash as ``sha256:<hex>``.
        key: Ed25519 public key of its signer, 32 bytes.
    """

    index: int
    hash: str
    key: bytes


@dataclass
class OpenedRound:
    """A round-open.

    Attributes:
        statement: The statement.
        index: Its leaf.
        answered: Sites that have stated what they released.
        survivors: Sites in the sum of the round; none before it is closed, or where it was aborted.
    """

    statement: RoundOpened
    index: int
    answered: set[str] = field(default_factory=set)
    survivors: frozenset[str] = frozenset()


@dataclass
class Released:
    """An adapter that a run released.

    Attributes:
        statement: The export.
        index: Its leaf.
        change: What later became of it; None while it is in use.
    """

    statement: Export
    index: int
    change: AdapterState | None = None

    @property
    def state(self) -> str:
        """Its state: one of `STATES`."""
        return STATES[0] if self.change is None else self.change.state


@dataclass
class LoggedRun:
    """The state of a run.

    Attributes:
        statement: Its run-open.
        adapter: The adapter in force.
        next: Number of the next round.
        skips: Whether round `next` was aborted in the clear, so that it may be given up for the one after it.
        published: Adapter after each closed round.
        rounds: Every attempt at a round, by the hash of its round-open.
        nonces: Nonces of all its round-opens.
        open: Hash of the round-open whose end is not logged yet; None if no round is open.
        ended: Whether a round-close ended the run.
        releases: What it released, oldest first.
        isolation: What its rounds say about who spoils.
        gate: What the log says of its candidate; None if its study has no gate.
    """

    statement: RunOpen
    adapter: str
    next: int = 1
    skips: bool = False
    published: dict[int, str] = field(default_factory=dict)
    rounds: dict[str, OpenedRound] = field(default_factory=dict)
    nonces: set[str] = field(default_factory=set)
    open: str | None = None
    ended: bool = False
    releases: list[Released] = field(default_factory=list)
    isolation: Isolation = field(default_factory=Isolation)
    gate: Gate | None = None


@dataclass(frozen=True)
class Standing:
    """The checkpoint size and the ledger (entries, head) in a site's last statement."""

    checkpoint: int = 0
    ledger: tuple[int, str] | None = None


class Replay:
    """The history of a log up to its last admitted leaf.

    Attributes:
        genesis: Leaf 0, once it is admitted.
        members: Members by name.
        revoked: Identity keys and cosigning keys of members that left.
        quorum: Number of cosignatures that a checkpoint needs now.
        runs: Runs by name.
        epsilon: Epsilon spent, and delta, by site and account.
        owners: Names of all members that there ever were, by identity key.
        witnesses: Cosigning keys that a member ever had, as vkeys.
        renewed: Numbers of the leaves that gave members an ML-DSA-65 key, by identity key.
        refusals: Refused study and its refusal, by site, run and round.
        epochs: The keys of log and coordinator, and from which number of leaves on they count; the present ones last.
    """

    def __init__(self) -> None:
        self.genesis: Genesis | None = None
        self.members: dict[str, Member] = {}
        self.revoked: set[bytes] = set()
        self.quorum = 0
        self.runs: dict[str, LoggedRun] = {}
        self.epsilon: dict[tuple[str, str], tuple[float, float]] = {}
        self.owners: dict[bytes, str] = {}
        self.witnesses: set[str] = set()
        self.renewed: dict[bytes, int] = {}
        self.refusals: dict[tuple[str, str, int], Refusal] = {}
        self.epochs: list[KeyEpoch] = []
        self._sites: dict[str, Standing] = {}
        self._keys: set[bytes] = set()
        self._owners: dict[bytes, str] = {}
        self._pq: dict[bytes, bytes] = {}

    @property
    def keys(self) -> Mapping[bytes, str]:
        """Names of those who may sign statements now, by public key. The coordinator's name is ''."""
        return self._owners

    def pq_of(self, key: bytes) -> bytes:
        """Return the ML-DSA-65 key of the owner of an Ed25519 key of statements, also of a former one; empty: none."""
        return self._pq.get(key, b"")

    def ledger_of(self, site: str) -> tuple[int, str] | None:
        """Return number of entries and head of a site's ledger in its last statement; None before its first."""
        return self._sites.get(site, Standing()).ledger

    def epoch_at(self, number: int) -> KeyEpoch:
        """Return the keys that count for a checkpoint of `number` leaves, and for leaf `number`. There is a genesis."""
        return epoch_at(self.epochs, number)

    def admit(self, leaf: Leaf, statement: Statement, root_at: RootAt) -> None:
        """Add the next leaf to the history, or refuse it and change nothing.

        Raises:
            VerificationError: A rule does not allow it. The message says what was expected and found.
        """
        if isinstance(statement, Genesis):
            self._genesis(leaf, statement)
            return
        if self.genesis is None:
            raise VerificationError(
                f"leaf 0 of the round log must be a statement of type genesis, found type {statement.type}"
            )
        # A valid signature is not enough: only a site may speak for itself, and only the coordinator for the rest.
        author = statement.site if isinstance(statement, SiteRound | Refusal | EgressReview) else ""
        if self._owners.get(leaf.key) != author:
            whose = f"the current identity key of site {author}" if author else "the coordinator's key"
            ended = [at.since - 1 for was, at in pairwise(self.epochs) if was.coordinator == leaf.key]
            raise VerificationError(
                f"the statement of type {statement.type} is signed with key {leaf.key.hex()[:16]}, which is not {whose}"
                + (f": that key was replaced at leaf {ended[0]}" if ended else "")
            )
        match statement:
            case Join():
                self._join(statement)
            case Revoke():
                self._revoke(statement)
            case Renew():
                self._renew(leaf, statement)
            case Rotate():
                self._rotate(leaf, statement, root_at)
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
                self._export(statement, leaf)
            case AdapterState():
                self._adapter_state(statement)
            case EgressReview():
                self._gate(statement.run).review(statement)
            case EgressDecision():
                self._gate(statement.run).decide(statement, leaf.index)

    # Members

    def _genesis(self, leaf: Leaf, genesis: Genesis) -> None:
        if leaf.index != 0 or self.genesis is not None:
            raise VerificationError(
                f"only leaf 0 of the round log may be a statement of type genesis, found another as leaf {leaf.index}"
            )
        if leaf.key.hex() != genesis.coordinator:
            raise VerificationError(
                f"the genesis names the coordinator's key {genesis.coordinator[:16]}, but is signed with key "
                f"{leaf.key.hex()[:16]}"
            )
        self.genesis, self.quorum = genesis, genesis.quorum
        self.members = {member.site: member for member in genesis.members}
        self._keys = {*NoteKey.parse(genesis.log).publics, leaf.key}
        self._owners = {leaf.key: ""}
        self._pq[leaf.key] = NoteKey.parse(genesis.log).pq
        self.epochs = [KeyEpoch(0, NoteKey.parse(genesis.log), leaf.key)]
        for member in genesis.members:
            self._enter(member)

    def _enter(self, member: Member) -> None:
        key = bytes.fromhex(member.key)
        self._keys |= set(member.publics())
        self._owners[key] = self.owners[key] = member.site
        if member.witness is not None:
            self.witnesses.add(member.witness)
            self._pq[key] = NoteKey.parse(member.witness).pq

    def _join(self, join: Join) -> None:
        member = join.member
        if member.site in self.members:
            raise VerificationError(f"statement join: site {member.site} is a member already")
        # Also keys of former members: whoever holds a revoked key must not come back under it, or as another site.
        if not self._keys.isdisjoint(member.publics()):
            raise VerificationError(f"statement join: a key of site {member.site} was used before in this round log")
        if member.witness is not None:
            name, others = NoteKey.parse(member.witness).name, [each.witness for each in self.members.values()]
            if any(NoteKey.parse(other).name == name for other in others if other is not None):
                raise VerificationError(
                    f"statement join: site {member.site} has the same witness name as another member"
                )
        self._change_quorum([*self.members.values(), member], join.quorum)
        self.members[member.site] = member
        self._enter(member)

    def _revoke(self, revoke: Revoke) -> None:
        member = self.members.get(revoke.site)
        if member is None or member.key != revoke.key:
            raise VerificationError(
                f"statement revoke: no member has the name {revoke.site} and the identity key {revoke.key[:16]}"
            )
        self._change_quorum([other for other in self.members.values() if other is not member], revoke.quorum)
        del self.members[revoke.site]
        self.revoked |= set(member.publics())
        del self._owners[bytes.fromhex(member.key)]
        for run in self.runs.values():
            if run.gate is not None:
                run.gate.leave(revoke.site)

    def _renew(self, leaf: Leaf, renew: Renew) -> None:
        present = self.members.get(renew.member.site)
        if present is None:
            raise VerificationError(f"statement renew: the log has no member {renew.member.site}")
        consortium = self.genesis.consortium if self.genesis is not None else ""
        if check_renewal(consortium, present, renew.member, renew.proof) in self._keys:
            raise VerificationError(
                f"statement renew: the new key of site {present.site} was used before in this round log"
            )
        self.members[present.site] = renew.member
        self.renewed[bytes.fromhex(present.key)] = leaf.index
        self._enter(renew.member)

    def _rotate(self, leaf: Leaf, rotate: Rotate, root_at: RootAt) -> None:
        present, log, coordinator = self.epochs[-1], NoteKey.parse(rotate.log), bytes.fromhex(rotate.coordinator)
        _equal("statement rotate: name of the log", present.log.name, log.name)
        if present.log.pq and not log.pq:
            raise VerificationError(
                "statement rotate: the new key of the log lacks ML-DSA-65, which the present one has"
            )
        # So that each round is opened and ended under one key, which its sites know.
        opened = [name for name, run in self.runs.items() if run.open is not None]
        if opened:
            raise VerificationError(f"statement rotate: a round of run {opened[0]} is open; keys change between rounds")
        # Also keys of former epochs and of members: whoever holds one must not come back as somebody else.
        if not self._keys.isdisjoint({*log.publics, coordinator}):
            raise VerificationError("statement rotate: a new key was used before in this round log")
        consortium = self.genesis.consortium if self.genesis is not None else ""
        check_possession(RotationPlace(consortium, leaf.index, root_at(leaf.index), present), rotate)
        self.epochs = [*self.epochs, KeyEpoch(leaf.index + 1, log, coordinator, rotate.charter)]
        self._keys |= {*log.publics, coordinator}
        del self._owners[present.coordinator]
        self._owners[coordinator] = ""
        self._pq[coordinator] = log.pq

    def _change_quorum(self, members: Sequence[Member], needed: int) -> None:
        try:
            Quorum(len([member for member in members if member.witness is not None]), needed)
        except PrivetError as error:
            raise VerificationError(error.message) from None
        self.quorum = needed

    # Runs and rounds

    def _run_open(self, opened: RunOpen) -> None:
        if opened.run in self.runs:
            raise VerificationError(f"statement run-open: the round log has a run named {opened.run} already")
        if self.genesis is not None:
            _check_floor(self.genesis.floor, opened)
        self._check_withheld(f"run {opened.run} begins", opened.adapter)
        gate = None if opened.gate is None else Gate(opened, opened.gate)
        self.runs[opened.run] = LoggedRun(opened, opened.adapter, gate=gate)

    def _round_open(self, leaf: Leaf, opened: RoundOpened) -> None:
        run = self._run(opened.run)
        where = f"run {opened.run}, round {opened.round}"
        if run.ended or opened.round > run.statement.rounds:
            raise VerificationError(f"{where}: the round was opened after the run had ended")
        if run.open is not None:
            raise VerificationError(
                f"{where}: the round was opened while round {run.rounds[run.open].statement.round} was still open"
            )
        # Sites that spent a round and lost their updates take no part in it again, so it may be given up.
        if not (run.skips and opened.round == run.next + 1):
            _equal(f"{where}: number of the opened round", run.next, opened.round)
        _equal(f"{where}: digest of the adapter with which the round was opened", run.adapter, opened.adapter)
        # A second nonce of the same value would make answers to one attempt valid for another.
        if opened.nonce in run.nonces:
            raise VerificationError(
                f"{where}: an earlier round of the run had the same nonce, which must be new in every round"
            )
        strangers = [site for site in opened.participants or opened.cohort if site not in self.members]
        if strangers:
            raise VerificationError(f"{where}: {strangers[0]} takes part, but is not a member of the consortium")
        left_out = set(opened.cohort) & set(run.isolation.left_out)
        if left_out:
            raise VerificationError(
                f"{where}: {min(left_out)} is in the cohort, but was left out, as it spoiled sums of the run"
            )
        if len(opened.cohort) < run.statement.min_sites:
            raise VerificationError(
                f"{where}: expected at least {run.statement.min_sites} sites in the cohort, found {len(opened.cohort)}"
            )
        if (opened.parameters is None) != (run.statement.secure_aggregation == "plain"):
            raise VerificationError(
                f"{where}: the statement round-open must have parameters of secure aggregation if the run uses secure "
                "aggregation, and none if it does not"
            )
        if opened.parameters is not None:
            _equal(
                f"{where}: parameters, the digest of the cohort's identity keys",
                keys_digest({site: self.members[site].key for site in opened.cohort}),
                opened.parameters,
            )
        if run.gate is not None:
            if run.gate.reviews or run.gate.decision is not None:
                raise VerificationError(f"{where}: the round was opened after sites had reviewed the candidate")
            run.gate.candidate = None
        run.rounds[leaf.hash] = OpenedRound(opened, leaf.index)
        run.nonces.add(opened.nonce)
        run.next, run.skips = opened.round, False
        run.open = leaf.hash

    def _site_round(self, stated: SiteRound, leaf: Leaf, root_at: RootAt) -> None:
        run = self._run(stated.run)
        where = f"run {stated.run}, round {stated.round}, site {stated.site}"
        opened = run.rounds.get(stated.opened)
        if opened is None or opened.statement.round != stated.round:
            raise VerificationError(
                f"{where}: the site's statement names a round-open statement that the log does not have for this round"
            )
        if stated.site not in opened.statement.cohort or stated.site in opened.answered:
            raise VerificationError(
                f"{where}: the site is not in the round's cohort, or the log has its statement about this round already"
            )
        # The site quotes the checkpoint that it saw. It must hold the round-open, must not be older than the one quoted
        # before, and its root must be this log's: a site that saw another branch exposes the fork here.
        standing = self._sites.get(stated.site, Standing())
        seen = stated.checkpoint
        if not max(opened.index + 1, standing.checkpoint) <= seen.size <= leaf.index:
            raise VerificationError(
                f"{where}: the site's statement must quote a checkpoint of at least "
                f"{max(opened.index + 1, standing.checkpoint)} and at most {leaf.index} leaves, found {seen.size}"
            )
        _equal(
            f"{where}: root hash of the checkpoint of {seen.size} leaves that the site quotes",
            root_at(seen.size).hex(),
            seen.root,
        )
        ledger = self._check_ledger(where, standing, stated)
        if stated.charge is not None:
            self._check_charge(where, run, stated, stated.charge)
        elif run.statement.privacy is not None:
            raise VerificationError(f"{where}: the run is private, but the site's statement has no privacy cost")
        # Every check has passed: only now does the history change.
        opened.answered.add(stated.site)
        if run.gate is not None:
            run.gate.answered.add(stated.site)
        self._sites[stated.site] = replace(standing, checkpoint=seen.size, ledger=ledger)
        if stated.charge is not None:
            self.epsilon[stated.site, stated.charge.account] = (stated.charge.epsilon, stated.charge.delta)

    def _check_ledger(self, where: str, standing: Standing, stated: SiteRound) -> tuple[int, str] | None:
        """Check that the site's ledger continues that of its last statement. Return its entries and head."""
        if stated.ledger is None:
            if standing.ledger is not None:
                raise VerificationError(
                    f"{where}: the site's last statement named the state of its ledger, but this statement does not"
                )
            return None
        # Each statement names the head in the one before. A ledger that was restored from a backup, and so forgot some
        # spent privacy, does not continue it.
        sequence, head = standing.ledger or (0, None)
        _equal(f"{where}: hash of the newest ledger entry in the site's last statement", head, stated.ledger.previous)
        if stated.ledger.sequence < sequence or (
            stated.ledger.sequence == sequence and stated.ledger.head != head and standing.ledger is not None
        ):
            raise VerificationError(
                f"{where}: the site's ledger is an older copy: expected it to continue after entry {sequence}, found a "
                f"different history that ends with entry {stated.ledger.sequence}",
                "at the site, restore the newest copy of the ledger",
            )
        return stated.ledger.sequence, stated.ledger.head

    def _check_charge(self, where: str, run: LoggedRun, stated: SiteRound, charge: Charge) -> None:
        promise, site = run.statement.privacy, stated.site
        if promise is None:
            raise VerificationError(f"{where}: the site's statement has a privacy cost, but the run is not private")
        _equal(
            f"{where}: mechanism (noise, sampling rate, steps) in the site's statement",
            promise.of_round(stated.round),
            (charge.training, charge.validation),
        )
        spent, delta = self.epsilon.get((site, charge.account), (0.0, charge.delta))
        _equal(f"{where}: delta of the site's ledger account {charge.account}", delta, charge.delta)
        if charge.epsilon < spent:
            raise VerificationError(
                f"{where}: the epsilon spent in the site's ledger cannot fall: it was {spent}, found {charge.epsilon}"
            )
        if charge.limit is not None and charge.epsilon > charge.limit:
            raise VerificationError(
                f"{where}: the site spent epsilon {charge.epsilon}, which is above its limit of {charge.limit}"
            )

    def _round_close(self, closed: RoundClose) -> None:
        run, opened = self._open_round(closed)
        where = f"run {closed.run}, round {closed.round}"
        _equal(
            f"{where}: digest of the adapter before the round, in its round-close",
            opened.statement.adapter,
            closed.adapter_before,
        )
        cohort = set(opened.statement.cohort)
        if not (
            cohort.issuperset({*closed.survivors, *closed.failures})
            and closed.failures.keys().isdisjoint(closed.survivors)
        ):
            raise VerificationError(
                f"{where}: each survivor and each failed site must be in the cohort, and no site may be both"
            )
        if len(closed.survivors) < run.statement.min_sites:
            raise VerificationError(
                f"{where}: expected at least {run.statement.min_sites} survivors (sites in the sum), found "
                f"{len(closed.survivors)}"
            )
        opened.survivors = frozenset(closed.survivors)
        # A survivor's update is in the adapter, so the log must hold the site's own account of what it released.
        silent = [site for site in closed.survivors if site not in opened.answered]
        if silent:
            raise VerificationError(
                f"{where}: {silent[0]} is a survivor, but the log has no site-round statement of it for this round"
            )
        if (closed.transcript is None) != (run.statement.secure_aggregation == "plain"):
            raise VerificationError(
                f"{where}: the statement round-close must have a transcript if the run uses secure aggregation, and "
                "none if it does not"
            )
        # An early stop publishes the adapter that validated best: one from which a round started.
        earlier = any(each.statement.adapter == closed.adapter_published for each in run.rounds.values())
        if closed.adapter_published != closed.adapter_after and closed.average is None and not earlier:
            raise VerificationError(
                f"{where}: expected the round's new adapter to be published, or one from which a round of the run "
                f"started, found {closed.adapter_published}"
            )
        _check_epsilons(where, run, closed)
        _note_sums(where, run, cohort, closed)
        run.adapter = run.published[closed.round] = closed.adapter_published
        run.next = closed.round + 1
        run.open = None
        run.ended = closed.ended
        if run.gate is not None:
            run.gate.spent, run.gate.measured = closed.epsilon, closed.metrics or run.gate.measured
            run.gate.made |= {closed.adapter_after, closed.adapter_published}
            run.gate.candidate = _candidate(run)

    def _round_abort(self, aborted: RoundAbort) -> None:
        run, opened = self._open_round(aborted)
        where = f"run {aborted.run}, round {aborted.round}"
        _equal(f"{where}: digest of the adapter in its round-abort", opened.statement.adapter, aborted.adapter)
        strangers = sorted(aborted.failures.keys() - set(opened.statement.cohort))
        if strangers:
            raise VerificationError(f"{where}: site {strangers[0]} failed, but is not in the round's cohort")
        _check_epsilons(where, run, aborted)
        _note_sums(where, run, opened.statement.cohort, aborted)
        # Sites may have masked for this round, and must not mask for it again: its number is used up.
        if run.statement.secure_aggregation == "masked":
            run.next = aborted.round + 1
        else:
            run.skips = True
        run.open = None
        if run.gate is not None:
            run.gate.spent = aborted.epsilon
            run.gate.candidate = _candidate(run)

    def withholding(self, adapter: str, own: LoggedRun | None = None) -> LoggedRun | None:
        """Return the run whose gate withholds an adapter: one that its rounds made, and that no gate has let out.

        The run `own` is left out. An adapter that a run began from is not withheld, as where no round has changed it.
        Those of the rounds before the last one stay withheld for good: no gate ever asks about them.
        """
        gated = [(run, run.gate) for run in self.runs.values() if run.gate is not None]
        if any(gate.exported and gate.candidate == adapter for _, gate in gated):
            return None
        others = ((run, gate) for run, gate in gated if run is not own)
        return next((run for run, gate in others if adapter != gate.run.adapter and adapter in gate.made), None)

    def _check_withheld(self, where: str, adapter: str, own: LoggedRun | None = None) -> None:
        run = self.withholding(adapter, own)
        if run is not None:
            raise VerificationError(f"{where}: the gate of run {run.statement.run} withholds adapter {adapter}")

    def _gate(self, name: str) -> Gate:
        gate = self._run(name).gate
        if gate is None:
            raise VerificationError(f"run {name}: its study has no gate, so its adapter is no candidate")
        return gate

    def _export(self, export: Export, leaf: Leaf) -> None:
        run = self._run(export.run)
        if export.round not in run.published:
            raise VerificationError(
                f"run {export.run}: the export names round {export.round}, but the log has no round-close of it"
            )
        _equal(
            f"run {export.run}: digest of the exported adapter of round {export.round}",
            run.published[export.round],
            export.adapter,
        )
        self._check_withheld(f"run {export.run}", export.adapter, run)
        if run.gate is not None:
            why = run.gate.withheld(export.time)
            # Released again, as after a crash, it is what was accepted once.
            if why and not run.gate.exported:
                raise VerificationError(f"run {export.run}: the export: {why}")
            _equal(f"run {export.run}: digest of the exported candidate", run.gate.candidate, export.adapter)
            run.gate.exported = True
        # Released again, also by another run, it is the same adapter. Without its state, a revoked one would be back.
        earlier = [
            each.change
            for name, run_of_it in self.runs.items()
            for each in run_of_it.releases
            if each.statement.adapter == export.adapter and (name == export.run or each.state == STATES[-1])
        ]
        changes = [change for change in earlier if change is not None]
        latest = max(changes, key=lambda change: STATES.index(change.state), default=None)
        run.releases.append(Released(export, leaf.index, latest))

    def _adapter_state(self, change: AdapterState) -> None:
        where = f"run {change.run}, adapter {change.adapter}"
        released = self._released(change.run, change.adapter, where)
        if STATES.index(change.state) <= STATES.index(released.state):
            raise VerificationError(f"{where}: it is {released.state}, so it does not become {change.state}")
        if change.by is not None:
            if change.by == change.run:
                raise VerificationError(f"{where}: expected another run whose release supersedes it")
            if not any(each.state in STATES[:2] for each in self._run(change.by).releases):
                raise VerificationError(f"{where}: run {change.by} has no release that is in use")
        for name, run in self.runs.items():
            for each in run.releases:
                same = each.statement.adapter == change.adapter
                if same and (name == change.run or change.state == STATES[-1]):
                    each.change = change

    def _released(self, run: str, adapter: str, where: str) -> Released:
        """Return the last release of an adapter by a run."""
        found = [each for each in self._run(run).releases if each.statement.adapter == adapter]
        if not found:
            raise VerificationError(f"{where}: the log has no export statement of it")
        return found[-1]

    def _refusal(self, refusal: Refusal) -> None:
        run = self._run(refusal.run).statement
        where = f"{refusal.site} refuses run {refusal.run}"
        _equal(f"{where}: digest of the study", run.study, refusal.study)
        if refusal.round > run.rounds:
            raise VerificationError(
                f"{where}: the run has {run.rounds} rounds, but the refusal is of round {refusal.round}"
            )
        self.refusals.setdefault((refusal.site, refusal.run, refusal.round), refusal)

    def _run(self, name: str) -> LoggedRun:
        run = self.runs.get(name)
        if run is None:
            raise VerificationError(f"run {name}: the log has no run-open statement that opens this run")
        return run

    def _open_round(self, ending: RoundClose | RoundAbort) -> tuple[LoggedRun, OpenedRound]:
        run = self._run(ending.run)
        where = f"run {ending.run}, round {ending.round}"
        if run.open is None or run.open != ending.opened or run.rounds[run.open].statement.round != ending.round:
            raise VerificationError(f"{where}: the statement of type {ending.type} is about a round that is not open")
        return run, run.rounds[run.open]


def _candidate(run: LoggedRun) -> str | None:
    """Return the candidate of a run of which no round is left; None while one is, and if no round was closed."""
    left = run.statement.rounds - run.next + 1 - run.skips
    return run.adapter if run.published and (run.ended or left <= 0) else None


def _check_floor(floor: StatedFloor, opened: RunOpen) -> None:
    """Check that a run is within the limits that the genesis sets for every run."""
    promise = opened.privacy
    for what, most, given in (
        ("epsilon", floor.max_epsilon, promise.epsilon if promise else None),
        ("delta", floor.max_delta, promise.delta if promise else None),
    ):
        if most is not None and (given is None or given > most):
            found = "no privacy" if given is None else given
            raise VerificationError(
                f"run {opened.run}: the log's genesis (leaf 0) allows {what} up to {most}, found {found}"
            )
    if opened.min_sites < floor.min_sites:
        raise VerificationError(
            f"run {opened.run}: the log's genesis (leaf 0) demands at least {floor.min_sites} sites in a sum, found "
            f"{opened.min_sites}"
        )


def _note_sums(where: str, run: LoggedRun, cohort: Collection[str], ending: RoundClose | RoundAbort) -> None:
    """Check who is said to have spoiled sums, and who is left out for it."""
    spoiled = tuple(frozenset(names or cohort) for names in ending.spoiled or ())
    if any(not names <= set(cohort) for names in spoiled):
        raise VerificationError(f"{where}: a spoiled sum names a site that is not in the cohort")
    if spoiled and run.statement.secure_aggregation == "plain":
        raise VerificationError(f"{where}: only a masked sum can be spoiled without a name, and the run masks nothing")
    survivors = frozenset(ending.survivors) if isinstance(ending, RoundClose) else frozenset[str]()
    # Whoever is in a spoiled sum is in no usable one of the round. No names stand for the cohort, and say less.
    if any(not survivors.isdisjoint(names) for names in ending.spoiled or ()):
        raise VerificationError(f"{where}: a survivor is said to be in a sum that could not be used")
    usable = (survivors,) if isinstance(ending, RoundClose) else ()
    found = replace(run.isolation)
    found.note(Sums(spoiled, usable))
    news = tuple(sorted(set(found.left_out) - set(run.isolation.left_out))) or None
    _equal(f"{where}: sites that are left out from here on, as the sums of the run say", news, ending.left_out)
    run.isolation = found


def _check_epsilons(where: str, run: LoggedRun, ending: RoundClose | RoundAbort) -> None:
    if (ending.epsilon is None) != (run.statement.privacy is None):
        raise VerificationError(
            f"{where}: the end of a round must state each site's epsilon if the run is private, and none if it is not"
        )


def _equal(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise VerificationError(f"{what}: expected {expected}, found {found}")


def admit(history: Replay, index: int, data: bytes, root_at: RootAt) -> tuple[Leaf, Statement]:
    """Check one leaf from its bytes up: envelope, signature, statement and place in the history. Add it to the history.

    A coordinator calls this before it appends a leaf, so that its log never holds a leaf that an audit refuses.

    Args:
        history: The history of the leaves before it.
        index: Number of the leaf.
        data: Bytes of the leaf.
        root_at: Returns the root of the tree of the first n leaves.

    Raises:
        ProtocolError, VerificationError: The leaf is not valid there. `history` is unchanged.
    """
    envelope = Envelope.decode(data)
    if history.genesis is None:
        # The first leaf names the keys of its own author.
        envelope.check_first()
        first = parse_statement(envelope.payload)
        envelope.check(NoteKey.parse(first.log).pq if isinstance(first, Genesis) else b"")
    else:
        envelope.check(history.pq_of(envelope.key))
    statement = parse_statement(envelope.payload)
    leaf = Leaf(index, f"sha256:{leaf_hash(data).hex()}", envelope.key)
    history.admit(leaf, statement, root_at)
    return leaf, statement
