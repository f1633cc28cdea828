"""The privacy costs that a log states, computed again from the mechanisms that it states.

`Accounts.observe` takes verified statements in their order, and `Accounts.finish` ends them. What is compared:

* a run's promise is kept by its mechanisms: all its rounds together cost at most its epsilon, at its delta;
* `epsilon` at the end of a round is what the rounds in whose cohort a site was cost, aborted ones included;
* a site's charge is at least what the statements of its account cost, over all runs of the log, at the account's delta.
  It may be more: a ledger also counts rounds that were drawn and never stated, and rounds outside this log.

A site has one account in a run. Another account in another run declares another dataset, unit or delta; that is the
site's word, so a verdict lists what its accounts would cost together if they held the same people. Within a run a site
may change its delta, and so its account; the new account must then cover the whole run.

With correlated noise a round is a release to one class of units, which its number decides. "Rounds" here are then those
of the largest class of a study.

A composition of k rounds costs more the larger k is. Up to 255 rounds each cost is computed; beyond, that of every 2nd,
4th, ... round and the last. One in between must lie between its computed neighbours, and is not below the last one
computed for its account. So an audit of long runs takes bounded time, and the totals are always computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from privet.common.errors import VerificationError
from privet.common.log.replay import Leaf
from privet.common.log.statements import (
    Charge,
    Mechanism,
    RoundAbort,
    RoundClose,
    RoundOpened,
    RunOpen,
    SiteRound,
    Statement,
)
from privet.common.privacy.accounting import MOST_STEPS, PrivacyEvent, epsilon

TOLERANCE = 1e-6
"""Relative difference that another version of an accountant may make."""
_EXACT = 255
# Distinct mechanisms that one composition takes. Of more, it takes the most frequent: a bound from below all the same.
_MOST_MECHANISMS = 16
_MOST_COMPOSITIONS = 20_000
_VERSIONS = "use the version of privet that the run was made with, or a newer one"

Round = tuple[Mechanism, Mechanism | None, str, int]
"""What a round releases: of training, and of validation. With correlated noise, also the study whose hash decides the
units that it may draw, and their class; otherwise "" and 0."""


@dataclass(frozen=True)
class AccountCost:
    """The cost of one account of a site, over all its statements in a log.

    Attributes:
        site: The site.
        account: Digest of the account.
        unit: Unit of privacy.
        delta: Delta of all epsilons here.
        rounds: Number of rounds that it stated.
        computed: Epsilon that their mechanisms cost together.
        stated: Epsilon in the last statement.
        limit: Limit in the last statement; None if the site states none.
    """

    site: str
    account: str
    unit: str
    delta: float
    rounds: int
    computed: float
    stated: float
    limit: float | None


@dataclass
class _Account:
    """An account so far.

    Attributes:
        unit: Unit of privacy.
        delta: Delta of its epsilons.
        history: Rounds that it pays for.
        covered: How many of a run's rounds these are, by run.
        floor: Epsilon of the history when it was last computed.
        last: The charge in its last statement.
    """

    unit: str
    delta: float
    history: Counter[Round] = field(default_factory=Counter)
    covered: dict[str, int] = field(default_factory=dict)
    floor: float = 0.0
    last: Charge | None = None


@dataclass
class _Attempt:
    """A round that was opened: its number and cohort."""

    number: int
    cohort: tuple[str, ...]


@dataclass
class _Run:
    """A run so far.

    Attributes:
        statement: Its run-open.
        attempts: Its round-opens, by leaf hash.
        counted: Numbers of the ended rounds in whose cohort a site was, by site. A plain round that was aborted is left
            out: it may be opened again, and is then one release.
        asked: Leaf hashes of all rounds in whose cohort a site was, by site.
        accounts: Each site's account.
        stated: What each site states to have released, by site.
        numbers: Sites and round numbers of that.
        last: The end of its last round.
    """

    statement: RunOpen
    attempts: dict[str, _Attempt] = field(default_factory=dict)
    counted: dict[str, set[int]] = field(default_factory=dict)
    asked: dict[str, set[str]] = field(default_factory=dict)
    accounts: dict[str, str] = field(default_factory=dict)
    stated: dict[str, list[Round]] = field(default_factory=dict)
    numbers: set[tuple[str, int]] = field(default_factory=set)
    last: RoundClose | RoundAbort | None = None


class Accounts:
    """The privacy costs of a log up to the last statement observed."""

    def __init__(self) -> None:
        self._runs: dict[str, _Run] = {}
        self._accounts: dict[tuple[str, str], _Account] = {}
        self._known: dict[tuple[frozenset[tuple[tuple[Mechanism, Mechanism | None, str], int]], float], float] = {}

    def observe(self, leaf: Leaf, statement: Statement) -> None:
        """Take the next statement that `Replay` admitted.

        Raises:
            VerificationError: A cost in it is not the one that the mechanisms in the log give.
        """
        if isinstance(statement, RunOpen):
            self._run_open(statement)
        elif isinstance(statement, RoundOpened):
            run = self._runs[statement.run]
            run.attempts[leaf.hash] = _Attempt(statement.round, statement.cohort)
            for site in statement.cohort:
                run.asked.setdefault(site, set()).add(leaf.hash)
        elif isinstance(statement, SiteRound):
            self._site_round(statement)
        elif isinstance(statement, RoundClose | RoundAbort):
            self._end(statement)

    def finish(self) -> None:
        """Check the last costs of every run and account.

        Raises:
            VerificationError: One is not the cost that the mechanisms in the log give.
        """
        for run in self._runs.values():
            if run.last is not None:
                self._check_end(run, run.last, exact=True)
        for (site, name), account in self._accounts.items():
            if account.last is not None:
                self._check_charge(f"site {site}, account {name}", account, account.last, exact=True)

    def costs(self) -> tuple[AccountCost, ...]:
        """Return the cost of every account, by site."""
        found = [
            AccountCost(
                site,
                name,
                account.unit,
                account.delta,
                account.history.total(),
                self._composed(account.history, account.delta),
                account.last.epsilon,
                account.last.limit,
            )
            for (site, name), account in self._accounts.items()
            if account.last is not None
        ]
        return tuple(sorted(found, key=lambda cost: (cost.site, cost.account)))

    def together(self) -> dict[str, float]:
        """Return the epsilon of each site with several accounts of one unit, if all of them held the same people.

        It is computed at the smallest of their deltas.
        """
        groups: dict[tuple[str, str], list[_Account]] = {}
        for (site, _), account in self._accounts.items():
            groups.setdefault((site, account.unit), []).append(account)
        found: dict[str, float] = {}
        for (site, _), accounts in sorted(groups.items()):
            if len(accounts) > 1:
                whole = sum((account.history for account in accounts), Counter[Round]())
                cost = self._composed(whole, min(account.delta for account in accounts))
                found[site] = max(cost, found.get(site, 0.0))
        return found

    # Runs

    def _run_open(self, opened: RunOpen) -> None:
        self._runs[opened.run] = _Run(opened)
        promise = opened.privacy
        if promise is None:
            return
        where = f"run {opened.run}"
        if promise.training.steps * opened.rounds > MOST_STEPS:
            raise VerificationError(
                f"{where}: expected at most {MOST_STEPS:.0f} steps in all rounds together, as privet accounts for no "
                f"more, found {promise.training.steps * opened.rounds}"
            )
        units = {each.unit for each in (promise.training, promise.validation, promise.head) if each is not None}
        if len(units) > 1:
            raise VerificationError(f"{where}: training and validation must protect the same unit of privacy")
        cost = self._spent(opened, self._counted(opened, range(1, opened.rounds + 1)), head=True)
        if not cost <= promise.epsilon * (1 + TOLERANCE):
            raise VerificationError(
                f"{where}: the run promises epsilon {promise.epsilon:g}, but its mechanisms cost {cost:.6g} in "
                f"{opened.rounds} rounds at delta {promise.delta:g}"
            )

    def _spent(self, opened: RunOpen, rounds: int, *, head: bool) -> float:
        """Return the epsilon of so many rounds of a run, each a release to the same units; `head`: round 1 is one."""
        promise = opened.privacy
        if promise is None or rounds == 0:
            return 0.0
        history = Counter({(*promise.of_round(2), "", 0): rounds})
        if head:
            history += Counter({(*promise.of_round(1), "", 0): 1})
            history -= Counter({(*promise.of_round(2), "", 0): 1})
        return self._composed(history, promise.delta)

    @staticmethod
    def _counted(opened: RunOpen, numbers: Collection[int]) -> int:
        """Return how many rounds of a run, of those with these numbers, are releases to one unit.

        A head start is one to all units. Of rounds that draw a class each, those of the largest class count.
        """
        promise = opened.privacy
        band = 1 if promise is None else _band(promise.training)
        head = 1 in numbers and promise is not None and promise.head is not None
        classes = Counter(number % band for number in numbers if not (head and number == 1))
        return head + max(classes.values(), default=0)

    def _end(self, ending: RoundClose | RoundAbort) -> None:
        run = self._runs[ending.run]
        self._check_end(run, ending)
        run.last = ending
        attempt = run.attempts[ending.opened]
        if isinstance(ending, RoundClose) or run.statement.secure_aggregation == "masked":
            for site in attempt.cohort:
                run.counted.setdefault(site, set()).add(attempt.number)

    def _check_end(self, run: _Run, ending: RoundClose | RoundAbort, *, exact: bool = False) -> None:
        """Compare the epsilons at the end of a round with the cost of the rounds in whose cohort each site was."""
        if ending.epsilon is None:
            return
        where, attempt = f"run {ending.run}, round {ending.round}", run.attempts[ending.opened]
        promise = run.statement.privacy
        least = {*run.counted, *attempt.cohort}
        if not least <= set(ending.epsilon) <= set(run.asked):
            raise VerificationError(
                f"{where}: the {ending.type} must state the epsilon of every site that was asked into a round of the "
                f"run, and of no other: expected {', '.join(sorted(least))}, found {', '.join(sorted(ending.epsilon))}"
            )
        for site, stated in ending.epsilon.items():
            numbers = run.counted.get(site, set()) | ({attempt.number} if site in attempt.cohort else set())
            # Plain attempts that were aborted count at most once each.
            fewest, most = len(numbers), max(len(run.asked[site]), len(numbers))
            if promise is not None and _band(promise.training) > 1:  # masked, so no number is opened twice
                fewest = self._counted(run.statement, numbers)
                most = self._counted(run.statement, {run.attempts[leaf].number for leaf in run.asked[site]} | numbers)
            gap = 1 if exact else _gap(most)
            first = any(run.attempts[asked].number == 1 for asked in run.asked[site])
            low = self._spent(run.statement, fewest - fewest % gap, head=1 in numbers)
            high = self._spent(run.statement, -(-most // gap) * gap, head=first)
            # Four places, rounded up (`round_ended`).
            if not low * (1 - TOLERANCE) <= stated <= high * (1 + TOLERANCE) + _step(high):
                raise VerificationError(
                    f"{where}: the mechanisms of the run cost site {site} epsilon {low:.6g} in {fewest} rounds, but "
                    f"the {ending.type} states {stated:g}"
                )

    # Accounts

    def _site_round(self, stated: SiteRound) -> None:
        charge = stated.charge
        if charge is None:
            return
        run = self._runs[stated.run]
        band = _band(charge.training)
        lane = ("", 0) if band == 1 else (run.statement.study, stated.round % band)
        where = f"run {stated.run}, round {stated.round}, site {stated.site}"
        before = run.accounts.get(stated.site, charge.account)
        new = _Account(charge.training.unit, charge.delta)
        account = self._accounts.setdefault((stated.site, charge.account), new)
        if before != charge.account and account.delta == self._accounts[stated.site, before].delta:
            raise VerificationError(
                f"{where}: a site has one account in a run, which changes only with the delta of its limit: expected "
                f"account {before}, found {charge.account}"
            )
        if account.unit != charge.training.unit:
            raise VerificationError(
                f"{where}: the account {charge.account} protects each {account.unit}, but the run protects each "
                f"{charge.training.unit}"
            )
        run.accounts[stated.site] = charge.account
        rounds = run.stated.setdefault(stated.site, [])
        # A plain round that is opened again is stated again, with the same bytes: one release.
        if (stated.site, stated.round) not in run.numbers:
            run.numbers.add((stated.site, stated.round))
            rounds.append((charge.training, charge.validation, *lane))
        # A run has one dataset. So an account that changes within it pays for the run's earlier rounds too.
        account.history.update(rounds[account.covered.get(stated.run, 0) :])
        account.covered[stated.run] = len(rounds)
        account.last = charge
        self._check_charge(where, account, charge, exact=account.history.total() % _gap(account.history.total()) == 0)

    def _check_charge(self, where: str, account: _Account, charge: Charge, *, exact: bool) -> None:
        if exact:
            account.floor = self._composed(account.history, account.delta)
        # Also where it is not computed anew: what was computed for fewer rounds is less.
        if not charge.epsilon >= account.floor * (1 - TOLERANCE):
            raise VerificationError(
                f"{where}: the mechanisms of the {account.history.total()} statements of account {charge.account} cost "
                f"epsilon {account.floor:.6g} at delta {account.delta:g}, but the site states {charge.epsilon:g}"
            )

    def _composed(self, history: Mapping[Round, int], delta: float) -> float:
        """Return the epsilon of rounds, for the unit that pays most; where there are many mechanisms, a bound below."""
        # Of a study's classes, a unit pays for one: the largest.
        largest: dict[tuple[Mechanism, Mechanism | None, str], int] = {}
        for (training, validation, study, _), count in history.items():
            largest[training, validation, study] = max(count, largest.get((training, validation, study), 0))
        key = frozenset(largest.items()), delta
        if key not in self._known:
            if len(self._known) >= _MOST_COMPOSITIONS:
                raise VerificationError(
                    f"the log states more than {_MOST_COMPOSITIONS} different histories of privacy costs, which are "
                    "too many to compute",
                    _VERSIONS,
                )
            # A unit trains in all runs, or is held out in all that validate. Others pay for a mix of the two, which
            # depends on how each study splits units, and is not in the log.
            trains = _events((training, count) for (training, _, _), count in largest.items())
            held_out = _events((validation or training, count) for (training, validation, _), count in largest.items())
            self._known[key] = max(epsilon(trains, delta), epsilon(held_out, delta))
        return self._known[key]


def _band(mechanism: Mechanism) -> int:
    return mechanism.band or 1


def _events(mechanisms: Iterable[tuple[Mechanism, int]]) -> list[PrivacyEvent]:
    """Return the releases of mechanisms, each in a number of rounds, as far as an accountant takes them."""
    steps: Counter[PrivacyEvent] = Counter()
    for mechanism, rounds in mechanisms:
        event = PrivacyEvent.parse(mechanism.model_dump())
        steps[replace(event, steps=1, shared=False, band=1)] += event.steps * rounds
    found, left = [], int(MOST_STEPS)
    for event, count in steps.most_common(_MOST_MECHANISMS):
        taken = min(count, left)
        found.append(replace(event, steps=taken))
        left -= taken
    # In one order: sums of floats depend on it.
    return sorted(found, key=lambda event: (event.noise_multiplier, event.sampling_rate, event.steps))


def _gap(count: int) -> int:
    """Return the distance of computed costs around so many rounds: 1 up to 255, then 2, 4, ..."""
    return int(1 << max(0, count.bit_length() - _EXACT.bit_length()))


def _step(value: float) -> float:
    """Return by how much an epsilon at the end of a round may be rounded up."""
    return 1e-4 if value < 10_000 and math.isfinite(value) else 1.0
