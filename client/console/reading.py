"""What the site's console shows, read from the files and databases that the site has anyway.

Nothing of a record is read: neither the data files nor the updates that the ledger keeps. What the console may show of
data files are the findings of `privet site doctor`, which hold names of columns and counts of files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privet.client.budget.accounts import Spending
from privet.client.budget.ledger import Receipt
from privet.client.budget.releases import limit_of, open_ledger
from privet.client.network.proposals import LogReader, Proposed, compared, consulted
from privet.client.policy.consent import approved
from privet.client.policy.decisions import Decision, decisions, newest
from privet.client.policy.opinion import judged
from privet.client.policy.rules import SitePolicy, load_policy
from privet.client.rounds.history import kept_leaves
from privet.client.rounds.logbook import COPY, open_witness
from privet.client.site import SiteConfig, load_site
from privet.common.audit.verify import Tree
from privet.common.clock import now
from privet.common.errors import Finding, PrivetError
from privet.common.log.encoding import parse_statement
from privet.common.log.envelope import Envelope
from privet.common.log.merkle import leaf_hash
from privet.common.log.statements import RunOpen, SiteRound
from privet.common.study.study import Study
from privet.common.web.events import stamps

FRESH_SECONDS, IDLE_SECONDS, PATIENCE_SECONDS = 20.0, 60.0, 2.0
"""How old an answer of the coordinator may be when a page is asked for, and while it is open; and how long a page waits
for the first one."""
_NEVER = datetime.min.replace(tzinfo=UTC)
_LEDGER_SECONDS = 15.0


@dataclass(frozen=True)
class Said:
    """What a coordinator answers.

    Attributes:
        proposals: Its studies, compared with the round log.
        first: Number of the first of `leaves`.
        leaves: The leaves of the round log that this site's copy does not hold yet.
    """

    proposals: tuple[Proposed, ...] = ()
    first: int = 0
    leaves: tuple[bytes, ...] = ()


Ask = Callable[[], Said]
"""Asks the coordinator."""


@dataclass
class Consulting:
    """Asks the coordinator for its studies, and for what the site's copy of the round log lacks.

    Attributes:
        file: The site file.
    """

    file: Path
    _reader: LogReader | None = None

    def __call__(self) -> Said:
        """Ask once. What was read of the log before is not read again.

        Raises:
            PrivetError: As `consulted` and `compared`.
        """
        site = load_site(self.file)
        if self._reader is None or self._reader.site != site:
            self._reader = LogReader(site)
        service, log = consulted(self.file, site, now, self._reader)
        proposals = compared(service.proposals(), None if log is None else log.history)
        if log is None or site.log is None:
            return Said(proposals)
        first = sum(1 for _ in kept_leaves(site.log.state / COPY))
        leaves: list[bytes] = []
        while first + len(leaves) < log.newest.size and (batch := service.leaves(first + len(leaves))):
            leaves += batch
        return Said(proposals, first, tuple(leaves))


@dataclass(frozen=True)
class Heard:
    """What the coordinator said last.

    Attributes:
        said: Its answer.
        at: When, in Unix seconds; 0: never.
        error: Why it cannot be asked now; None if it can.
    """

    said: Said = Said()
    at: float = 0.0
    error: PrivetError | None = None

    @property
    def proposals(self) -> tuple[Proposed, ...]:
        """Its studies."""
        return self.said.proposals


class Coordinator:
    """Asks the coordinator in the background, so that no page waits for the network.

    Args:
        ask: Asks it once.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask, self._heard, self._lock = ask, Heard(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked = float("-inf")

    def heard(self) -> Heard:
        """Return what it said last. If that is old, it is asked again; the first time, this waits a little."""
        thread = self._ask_again(FRESH_SECONDS)
        if not self._heard.at and thread is not None:
            thread.join(PATIENCE_SECONDS)
        return self._heard

    def _ask_again(self, age: float) -> threading.Thread | None:
        with self._lock:
            asking = self._thread is not None and self._thread.is_alive()
            if time.monotonic() - self._asked >= age and not asking:
                self._asked = time.monotonic()
                self._thread = threading.Thread(target=self._listen, daemon=True)
                self._thread.start()
            return self._thread

    @property
    def version(self) -> object:
        """What changes with what it said. While a page is open, it is asked once in a minute."""
        self._ask_again(IDLE_SECONDS)
        heard = self._heard
        return tuple((each.study.digest, each.round, each.ended) for each in heard.proposals), heard.error is None

    def _listen(self) -> None:
        try:
            self._heard = Heard(self._ask(), time.time())
        except PrivetError as error:
            self._heard = Heard(self._heard.said, self._heard.at, error)


@dataclass(frozen=True)
class Offered:
    """A proposed study, with what this site would say to it now.

    Attributes:
        proposed: The study.
        state: `ended`, `admitted`, `waiting` for people, or `refused`.
        reasons: Findings that speak against it.
        decided: The newest decision of each approver about it.
    """

    proposed: Proposed
    state: str
    reasons: tuple[Finding, ...]
    decided: Mapping[str, Decision]


def offered(site: SiteConfig, heard: Heard) -> list[Offered]:
    """Return the proposed studies; those that wait for people first, then those that run, then the others."""
    found = [_offer(site, each, decisions(site) if site.approvers else ()) for each in heard.proposals]
    order = ("waiting", "admitted", "refused", "ended")
    return sorted(found, key=lambda each: order.index(each.state))


def _offer(site: SiteConfig, proposed: Proposed, made: Sequence[Decision]) -> Offered:
    decided = newest(made, proposed.study.digest)
    if proposed.ended:
        return Offered(proposed, "ended", (), decided)
    opinion = judged(site, proposed.study, thorough=False)
    state = "refused" if opinion.against or opinion.refused else "waiting" if opinion.waits else "admitted"
    return Offered(proposed, state, opinion.against, decided)


@dataclass(frozen=True)
class Rule:
    """One line of the policy's verdict.

    Attributes:
        key: The rule, as the policy writes it.
        allowed: What it allows.
        finding: How the study breaks it; None if it does not.
    """

    key: str
    allowed: str
    finding: Finding | None


def verdict_lines(site: SiteConfig, findings: Sequence[Finding]) -> list[Rule]:
    """Return the policy rule by rule, broken ones first, with what no rule of the policy file says."""
    policy = None if site.policy is None else load_policy(site.policy)
    broken = {each.rule: each for each in findings}
    rules = [] if policy is None else [Rule(key, text, broken.pop(key, None)) for key, text in _rules(policy)]
    rules += [Rule(key, each.allowed, each) for key, each in broken.items()]
    return sorted(rules, key=lambda each: each.finding is None)


def _rules(policy: SitePolicy) -> list[tuple[str, str]]:
    document = policy.model_dump(mode="json", exclude={"version", "adapters", "scan"}, exclude_none=True)
    return [(key, _text(value)) for key, value in flat(document)]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "\u2013"
    return str(value).lower() if isinstance(value, bool) else str(value)


def flat(document: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Return the values of a document by dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in document.items():
        found += flat(value, f"{above}{key}.") if isinstance(value, dict) else [(f"{above}{key}", value)]
    return found


def differences(before: Study, after: Study) -> list[tuple[str, str, str]]:
    """Return the fields in which two studies differ, each with both values."""
    old, new = dict(flat(before.document())), dict(flat(after.document()))
    keys = dict.fromkeys([*new, *old])
    return [(key, _text(old.get(key, "")), _text(new.get(key, ""))) for key in keys if old.get(key) != new.get(key)]


def last_approved(site: SiteConfig, proposals: Sequence[Proposed], study: Study) -> Proposed | None:
    """Return the newest other study that this site approves or took part in, of those that the coordinator has."""
    ledger = open_ledger(site)
    try:
        began = ledger.began(str(site.dataset))
    finally:
        ledger.close()
    known = approved(site) | began.keys()
    others = [each for each in proposals if each.study.digest in known and each.study.digest != study.digest]
    return max(others, key=lambda each: began.get(each.study.digest, _NEVER), default=None)


@dataclass(frozen=True)
class Stated:
    """What the round log holds about a round of this site.

    Attributes:
        index: Number of the leaf that this site signed.
        run: The run.
        upload: Digest of the bytes that left.
        epsilon: Of the account after the round; None without privacy.
        proven: Whether the leaf lies under a checkpoint that this site cosigned, by the hashes of its own copy.
    """

    index: int
    run: str
    upload: str
    epsilon: float | None
    proven: bool


@dataclass
class OwnLog:
    """This site's statements in its own copy of the round log, and in the leaves that follow it.

    All leaves are hashed. Those under a checkpoint that this site cosigned are proven, whoever sent them, as its root
    follows from them alone. They are read again when there are more.
    """

    site: SiteConfig
    _known: Any = None
    _found: dict[tuple[str, int], Stated] = field(default_factory=dict)
    leaves: int = 0
    cosigned: int = 0

    def stated(self, said: Said) -> Mapping[tuple[str, int], Stated]:
        """Return the statements by study and round; empty while there is no copy.

        Args:
            said: Has the leaves that follow the copy, as the coordinator sends them.
        """
        known = log_stamp(self.site, said)
        if known != self._known:
            self._read(known_leaves(self.site, said))
            self._known = known
        return self._found

    def _read(self, leaves: Iterable[bytes]) -> None:
        tree, found, studies = Tree(), dict[tuple[str, int], Stated](), dict[str, str]()
        own = self.site.identity_key()
        key = b"" if own is None else own.public_key().public_bytes_raw()
        for index, leaf in enumerate(leaves):
            tree.append(leaf_hash(leaf))
            try:
                envelope = Envelope.decode(leaf)
                statement = parse_statement(envelope.payload)
                if isinstance(statement, RunOpen):
                    studies[statement.run] = statement.study
                elif isinstance(statement, SiteRound) and envelope.key == key:
                    envelope.check_first()  # this site's own word, also where nobody has cosigned it yet
                    epsilon = None if statement.charge is None else statement.charge.epsilon
                    where = studies.get(statement.run, ""), statement.round
                    found[where] = Stated(index, statement.run, statement.upload, epsilon, proven=False)
            except PrivetError:
                continue  # nothing that can be read as a statement of the log; it proves nothing
        self.leaves, self.cosigned = tree.frontier.size, cosigned(self.site, tree)
        self._found = {where: replace(each, proven=each.index < self.cosigned) for where, each in found.items()}


def log_stamp(site: SiteConfig, said: Said) -> object:
    """Return what changes with `known_leaves`."""
    return () if site.log is None else (stamps([site.log.state / COPY]), said.first, len(said.leaves))


def known_leaves(site: SiteConfig, said: Said) -> Iterator[bytes]:
    """Yield the leaves of the site's copy of the round log, and those that follow it in the coordinator's answer."""
    kept = 0
    for leaf in () if site.log is None else kept_leaves(site.log.state / COPY):
        kept += 1
        yield leaf
    if said.first <= kept:
        yield from said.leaves[kept - said.first :]


def cosigned(site: SiteConfig, tree: Tree) -> int:
    """Return how many leaves of a tree lie under the last checkpoint that this site cosigned; 0: of none."""
    if site.log is None:
        return 0
    seen = open_witness(site, site.log).last
    fits = 0 < seen.size <= tree.frontier.size and tree.root_at(seen.size) == seen.root
    return seen.size if fits else 0


@dataclass(frozen=True)
class Left:
    """What left in one round.

    Attributes:
        receipt: From the ledger.
        stated: From the round log; None if its copy here does not hold it.
        name: Name of the study, if it is known.
    """

    receipt: Receipt
    stated: Stated | None
    name: str


@dataclass(frozen=True)
class Books:
    """What the ledger says.

    Attributes:
        left: Rounds, newest first.
        bytes: Of all rounds, before masking.
        spending: None if the site file sets no limit.
    """

    left: tuple[Left, ...]
    bytes: int
    spending: Spending | None


@dataclass
class Accounts:
    """The ledger, read again when its files change: opening verifies it, and composing epsilons takes time."""

    site: SiteConfig
    log: OwnLog
    _known: tuple[object, Sequence[Receipt], Spending | None] | None = None
    _read_at: float = 0.0

    def books(self, said: Said) -> Books:
        """Return what the ledger says.

        Args:
            said: The coordinator's answer.

        Raises:
            PrivetError: As `open_ledger`.
        """
        receipts, spending = self._read()
        stated, names = self.log.stated(said), {each.study.digest: each.study.name for each in said.proposals}
        newest_first = sorted(receipts, key=lambda each: each.row, reverse=True)
        left = tuple(
            Left(each, stated.get((each.study, each.round)), names.get(each.study, "")) for each in newest_first
        )
        return Books(left, sum(each.bytes for each in receipts), spending)

    def _read(self) -> tuple[Sequence[Receipt], Spending | None]:
        files = ledger_files(self.site)
        seen = stamps(files)
        old = time.monotonic() - self._read_at > _LEDGER_SECONDS  # a change while it is read is seen then
        if self._known is None or self._known[0] != seen or old:
            self._read_at = time.monotonic()
            limit, ledger = limit_of(self.site), open_ledger(self.site)
            try:
                receipts = ledger.receipts(str(self.site.dataset))
                spending = None if limit is None else ledger.statement(str(self.site.dataset), limit)
            finally:
                ledger.close()
            self._known = stamps(files), receipts, spending
        return self._known[1:]


def ledger_files(site: SiteConfig) -> list[Path]:
    """Return the files whose change is one of the ledger."""
    if site.ledger is None:
        return []
    anchor = [] if site.anchor is None else [site.anchor]
    return [site.ledger, site.ledger.with_name(f"{site.ledger.name}-wal"), *anchor]
