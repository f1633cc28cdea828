"""What the console shows a privacy officer: promises and costs over the years, tests, releases, decisions, and terms.

All of it is read from what the site holds: ledger, its copy of the round log, its approvers' decisions, the tests that
it made itself, and the files that it keeps. Figures of tests are shown here and leave the site in no other way than on
the command line. Who was withdrawn is not shown, and neither is how many.

Each part is read by itself, so that a file which cannot be read hides no other part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from privet.client.budget.accounts import Item, Limit, Spending, StudySpending, composed_epsilon, paid_rounds
from privet.client.budget.releases import limit_of, open_ledger
from privet.client.budget.withdrawals import withdrawn_of
from privet.client.console.reading import Said, cosigned, known_leaves, ledger_files, log_stamp
from privet.client.network.candidates import FOLDER, TEST
from privet.client.policy.consent import approved
from privet.client.policy.decisions import Decision, decisions
from privet.client.retention import kept_by
from privet.client.rounds.logbook import open_witness
from privet.client.site import SiteConfig
from privet.common.audit.verify import Tree
from privet.common.errors import PrivetError, StateError
from privet.common.log.gate import Gate
from privet.common.log.merkle import leaf_hash
from privet.common.log.replay import LoggedRun, Replay, admit
from privet.common.log.statements import EgressReview
from privet.common.retention import RetentionSection, report
from privet.common.web.events import stamps

_MOST = 100
"""Most runs, and most decisions, that the page lists."""
_MOST_TEST_BYTES = 1 << 20
_SURE = 1.05
"""A claim that canaries contradict: their bound is computed on this site, the claim elsewhere, so not by digits."""
_VOID, _WHOLE = 20.0, 10.0
T = TypeVar("T")


@dataclass(frozen=True)
class Part(Generic[T]):
    """A part of the page.

    Attributes:
        value: What it shows; None where it cannot be read.
        error: Why it cannot be read; None if it can.
    """

    value: T | None
    error: PrivetError | None = None


def part(read: Callable[[], T]) -> Part[T]:
    """Read a part of the page; what keeps it from being read becomes its error."""
    try:
        return Part(read())
    except PrivetError as error:
        return Part(None, error)


# Budgets


@dataclass(frozen=True)
class Year:
    """What a dataset paid until the end of a year.

    Attributes:
        year: In UTC.
        studies: Number of studies that paid in this year.
        rounds: Number of rounds that began in it.
        epsilon: Of everything charged until its end, composed; infinite where something is not private.
    """

    year: int
    studies: int
    rounds: int
    epsilon: float


@dataclass(frozen=True)
class Dataset:
    """What was spent on a dataset.

    Attributes:
        name: Its name in the ledger.
        present: Whether it is the dataset of the site file, to which the limit applies.
        spending: What was spent, by study.
        years: By year, oldest first.
    """

    name: str
    present: bool
    spending: Spending
    years: tuple[Year, ...]


def by_year(paid: Sequence[tuple[int, Item]], limit: Limit) -> tuple[Year, ...]:
    """Return what was charged by year, oldest first. Epsilons are of all years until then, and are not added up.

    Args:
        paid: What was charged, with its year, ascending.
        limit: Gives unit and delta.
    """
    found, before = [], list[Item]()
    for year, rows in groupby(paid, key=lambda row: row[0]):
        items = [item for _, item in rows]
        before += items
        studies, rounds = len({item.study for item in items}), sum(item.rounds for item in items)
        found.append(Year(year, studies, rounds, composed_epsilon(paid_rounds(before), limit)))
    return tuple(found)


@dataclass
class Budgets:
    """The datasets of a site's ledger. They are read again when its files change: composing epsilons takes time."""

    site: SiteConfig
    _known: tuple[object, tuple[Dataset, ...]] | None = None

    def all(self) -> tuple[Dataset, ...]:
        """Return the datasets, that of the site file first; none where the site file sets no limit.

        Raises:
            PrivetError: As `open_ledger`.
        """
        limit, seen = limit_of(self.site), stamps(ledger_files(self.site))
        if limit is None:
            return ()
        if self._known is None or self._known[0] != seen:
            ledger, own = open_ledger(self.site), str(self.site.dataset)
            try:
                names = sorted({own, *ledger.datasets()}, key=lambda name: (name != own, name))
                found = [
                    Dataset(name, name == own, ledger.statement(name, limit), by_year(ledger.paid(name), limit))
                    for name in names
                ]
            finally:
                ledger.close()
            self._known = stamps(ledger_files(self.site)), tuple(found)
        return self._known[1]


# The round log


@dataclass
class Story:
    """The history in the leaves that lie under a checkpoint which this site cosigned. It is replayed when it grows."""

    site: SiteConfig
    _known: object = None
    _history: Replay = field(default_factory=Replay)

    def history(self, said: Said) -> Replay:
        """Return the history.

        Args:
            said: Has the leaves that follow the site's copy, as the coordinator sends them.

        Raises:
            StateError: The site has cosigned nothing that its copy holds. PrivetError: As `admit`.
        """
        known = log_stamp(self.site, said)
        if known != self._known:
            tree, history = Tree(), Replay()
            for leaf in known_leaves(self.site, said):
                tree.append(leaf_hash(leaf))
            size = cosigned(self.site, tree)
            if not size:
                raise _unproven(self.site, tree.frontier.size)
            # Read a second time, as the leaves together may be larger than the memory. The first pass proved them by
            # their hashes; a leaf that is another one now gives another root, and none is shown as proven by it.
            for index, leaf in enumerate(islice(known_leaves(self.site, said), size)):
                if leaf_hash(leaf) != tree.leaf(index):
                    raise _unproven(self.site, index)
                admit(history, index, leaf, tree.root_at)
            self._known, self._history = known, history
        return self._history


def _unproven(site: SiteConfig, leaves: int) -> StateError:
    seen = 0 if site.log is None else open_witness(site, site.log).last.size
    if leaves < seen:  # it cosigns the end of a run, and copies the leaves before the next round
        return StateError(
            f"this site's copy of the round log has {leaves} of the {seen} leaves that the site cosigned",
            "open the page again when the coordinator can be asked: it gives the others",
        )
    return StateError(
        "this site's copy of the round log holds no checkpoint that the site cosigned",
        "it is filled while `privet site serve` takes part in a round",
    )


@dataclass(frozen=True)
class Statement:
    """The privacy statement of a finished run, for this site.

    Attributes:
        run: Its name.
        rounds: Rounds of the run.
        paid: Rounds that this site paid for; 0 if its ledger does not know the study.
        private: Whether the study has privacy.
        promised: Epsilon and delta that the study promised.
        unit: Unit of privacy.
        epsilon: Of what this site released in it, by its ledger; what was promised where the ledger does not know it.
        delta: Of `epsilon`.
        factor: By which the probability of anything differs at most, with and without one unit: e to the power of
            `epsilon`, rounded up.
        shared: Whether the guarantee holds for sums over sites alone.
        corrupt: Corrupt sites that a shared guarantee allows for; None where unknown.
    """

    run: str
    rounds: int
    paid: int
    private: bool
    promised: tuple[float, float] = (math.inf, 1.0)
    unit: str = "record"
    epsilon: float = math.inf
    delta: float = 1.0
    factor: str = ""
    shared: bool = False
    corrupt: int | None = None


def statements(history: Replay, site: str, spending: Spending | None) -> list[Statement]:
    """Return the statements of the finished runs in which a site answered a round, newest first.

    Args:
        history: The history of the log.
        site: The site's name.
        spending: What was spent on the site's dataset; None where it sets no limit.
    """
    ended = [run for run in reversed(history.runs.values()) if run.ended and _answered(run, site)]
    spent = {} if spending is None else {each.study: (each, spending.limit.delta) for each in spending.studies}
    return [_statement(run, spent.get(run.statement.study)) for run in ended[:_MOST]]


def _answered(run: LoggedRun, site: str) -> bool:
    return any(site in opened.answered for opened in run.rounds.values())


def _statement(run: LoggedRun, spent: tuple[StudySpending, float] | None) -> Statement:
    opened, privacy = run.statement, run.statement.privacy
    paid = 0 if spent is None else spent[0].charged
    if privacy is None:
        return Statement(opened.run, opened.rounds, paid, private=False)
    promised = privacy.epsilon, privacy.delta
    epsilon, delta = promised if spent is None or not paid else (spent[0].epsilon, spent[1])
    costs = () if spent is None else (cost for cost, _ in spent[0].events if cost is not None)
    return Statement(
        run=opened.run,
        rounds=opened.rounds,
        paid=paid,
        private=True,
        promised=promised,
        unit=privacy.training.unit,
        epsilon=epsilon,
        delta=delta,
        factor=factor_of(epsilon),
        shared="-shared-" in privacy.training.mechanism,
        corrupt=next((cost.corrupt for cost in costs), None),
    )


def factor_of(epsilon: float) -> str:
    """Return e to the power of an epsilon, rounded up; the sign of infinity above 20, where it bounds nothing."""
    if epsilon > _VOID:
        return "\u221e"
    factor = math.exp(epsilon)
    return f"{math.ceil(factor)}" if factor >= _WHOLE else f"{math.ceil(factor * 100) / 100:.2f}"


# Tests and releases


@dataclass(frozen=True)
class Tested:
    """A figure of this site's own test of a candidate.

    Attributes:
        run: The run.
        attack: `canary`, `membership` or `repeated`.
        figures: The figures of the attack.
        failed: Whether the gate's condition is broken.
        allowed: What the gate allows; None where the site's copy of the log does not hold the gate.
        claim: Epsilon that the study promised; None without privacy.
    """

    run: str
    attack: str
    figures: Mapping[str, Any]
    failed: bool
    allowed: float | None
    claim: float | None

    @property
    def contradicts(self) -> bool:
        """Whether canaries show more than the study promised."""
        shown = self.figures.get("epsilon") if self.attack == "canary" else None
        return shown is not None and self.claim is not None and shown > self.claim * _SURE


def own_tests(folder: Path, history: Replay) -> list[Tested]:
    """Return the figures of the tests that the site keeps, by run.

    Args:
        folder: Where the site keeps candidates.
        history: The history of the log.

    Raises:
        StateError: A kept test cannot be read.
    """
    found = []
    for path in sorted(folder.glob(f"*/{TEST}"))[:_MOST]:
        document, name = _test_in(path), path.parent.name
        run = history.runs.get(name)
        gate = None if run is None else run.gate
        claim = None if run is None or run.statement.privacy is None else run.statement.privacy.epsilon
        for attack, figures in sorted(document["figures"].items()):
            allowed = None if gate is None else _allowed(gate, attack)
            found.append(Tested(name, attack, figures, attack in document["failed"], allowed, claim))
    return found


_FIGURES: Mapping[str, Sequence[str]] = {
    "canary": ("epsilon", "canaries", "guesses", "right"),
    "membership": ("upper", "loss"),
    "repeated": ("answers", "repeated", "upper"),
}


def _test_in(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            document: dict[str, Any] = json.loads(file.read(_MOST_TEST_BYTES))
        whole = isinstance(document["failed"], list) and all(
            figures.keys() >= set(_FIGURES[attack]) for attack, figures in document["figures"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, type(error).__name__) from None
    if not whole:
        raise _unreadable(path, "a figure is missing")
    return document


def _unreadable(path: Path, why: str) -> StateError:
    return StateError(f"{path} cannot be read ({why})", "test the candidate again: `privet gate test SITE RUN`")


def _allowed(gate: Gate, attack: str) -> float | None:
    return {"canary": gate.terms.epsilon, "membership": gate.terms.membership, "repeated": gate.terms.repeated}[attack]


@dataclass(frozen=True)
class Gated:
    """A run's way out, as the round log has it.

    Attributes:
        run: Its name.
        state: `running`, `candidate`, `accepted`, `expired`, `refused` or `released`; without a gate `free`, or what
            became of the release.
        needed: Signatures that its gate needs; 0 without a gate.
        reviews: What each site said.
        signed: The sites on whose signatures it was decided; without a decision, those that signed.
        time: When it was decided, or released without a gate, in Unix seconds; None: not yet.
        expires: When the decision ends; None without one.
        reason: Why the coordinator refused it.
        adapter: Digest of the adapter; empty while there is none.
    """

    run: str
    state: str
    needed: int
    reviews: tuple[EgressReview, ...]
    signed: tuple[str, ...]
    time: int | None
    expires: int | None
    reason: str
    adapter: str


def releases(history: Replay, now: datetime) -> list[Gated]:
    """Return the runs that have a gate, or released an adapter, newest first."""
    found = [run for run in reversed(history.runs.values()) if run.gate is not None or run.releases]
    return [_gated(run, run.gate, int(now.timestamp())) for run in found[:_MOST]]


def _gated(run: LoggedRun, gate: Gate | None, now: int) -> Gated:
    name, last = run.statement.run, run.releases[-1] if run.releases else None
    if gate is None:
        if last is None:
            return Gated(name, "free", 0, (), (), None, None, "", "")
        return Gated(name, last.state, 0, (), (), last.statement.time, None, "", last.statement.adapter)
    decision, reviews = gate.decision, tuple(gate.reviews[site] for site in sorted(gate.reviews))
    state: str = gate.state(now) if last is None else last.state
    signed = tuple(each.site for each in reviews if each.verdict == "signed" and now < each.expires)
    return Gated(
        run=name,
        state=state,
        needed=gate.terms.signatures,
        reviews=reviews,
        signed=signed if decision is None else decision.signed,
        time=None if decision is None else decision.time,
        expires=None if decision is None else decision.expires,
        reason="" if decision is None else decision.reason,
        adapter=gate.candidate or "",
    )


# Decisions, withdrawals and terms


@dataclass(frozen=True)
class Decided:
    """What people at the site decided about studies.

    Attributes:
        signed: The decisions of its approvers, newest first, at most 100.
        more: How many older ones there are.
        unsigned: Number of studies that were approved by nobody in particular, where the site has no approvers.
    """

    signed: tuple[Decision, ...]
    more: int
    unsigned: int


def decided(site: SiteConfig) -> Decided:
    """Return what people at the site decided. Raises as `decisions` and `approved`."""
    made = sorted(decisions(site), key=lambda each: each.time, reverse=True) if site.approvers else []
    unsigned = 0 if site.approvers else len(approved(site))
    return Decided(tuple(made[:_MOST]), max(len(made) - _MOST, 0), unsigned)


def withdrawal(site: SiteConfig) -> str:
    """Return `nobody`, `people` or `dataset`: whose withdrawal the site keeps. Raises as `withdrawn_of`."""
    found = withdrawn_of(site)
    if found is not None and found.left:
        return "dataset"
    return "people" if found else "nobody"


@dataclass(frozen=True)
class Terms:
    """What the site keeps, and until when.

    Attributes:
        rows: As `report`, what is due first.
        stated: Whether the site file has its own years.
        due: Number of rows that are due.
    """

    rows: Sequence[Mapping[str, Any]]
    stated: bool
    due: int


def kept(site: SiteConfig, folder: Path, now: datetime) -> Terms:
    """Return what the site keeps until when. Raises as `kept_by`.

    Args:
        site: The site file.
        folder: Its directory.
        now: The present time.
    """
    rows = report(kept_by(site, folder), site.retention or RetentionSection(), now)
    return Terms(rows, site.retention is not None, sum(bool(row["due"]) for row in rows))


def page_values(
    site: SiteConfig, file: Path, budgets: Budgets, story: Story, said: Said, now: datetime
) -> dict[str, Any]:
    """Return what the page shows, part by part.

    Args:
        site: The site.
        file: The site file.
        budgets: The datasets of its ledger.
        story: The history of the log.
        said: The coordinator's answer.
        now: The present time.
    """
    folder = file.resolve().parent
    datasets = part(budgets.all)
    spending = next((each.spending for each in datasets.value or ()), None)
    log = part(lambda: story.history(said))
    known = log.value or Replay()
    return {
        "datasets": datasets,
        "log": log,
        "statements": statements(known, site.name, spending),
        "tests": part(lambda: own_tests(folder / FOLDER, known)),
        "releases": releases(known, now),
        "decided": part(lambda: decided(site)),
        "withdrawal": part(lambda: withdrawal(site)),
        "kept": part(lambda: kept(site, folder, now)),
    }
