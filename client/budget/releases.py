"""The releases of a site: its ledger (budget), used with the limit and the dataset of its site file.

A round is reserved before it is trained. Its cost is spent before its first random draw, and it is charged with the
exact bytes before anything leaves. If it is requested again, the answer is those bytes; if there are none, a refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from privet.client.budget.accounts import Cost, Limit, RoundKey, check_budget, check_cost
from privet.client.budget.ledger import Ledger
from privet.client.site import SiteConfig
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, RefusedError, StateError
from privet.common.log.agreement import mechanism_of
from privet.common.log.statements import Charge, LedgerHead
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.parameters import inputs_of
from privet.common.privacy.accounting import plan
from privet.common.secagg.site import RecordedStep
from privet.common.study.messages import Contribution, RoundOpen
from privet.common.study.study import Study

ANCHOR_LINE = 'anchor = "/mnt/other-disk/ledger-head.json"'
"""What a site file lacks that names no anchor: a path on another disk than the ledger's."""

Account = Callable[[str, str, float], str]
"""Returns the digest that names an account in the round log: of a dataset, a unit of privacy and a delta."""


class Bookkeeping(Protocol):
    """The part of a site's releases that its worker uses."""

    def check(self, study: Study) -> None:
        """Check, before any record is read, that the dataset's limit covers the study from here to its end."""

    def reserve(self, study: Study, opened: RoundOpen, names: str = "") -> Contribution | None:
        """Reserve a round, or return the contribution that was charged for it before.

        Args:
            study: The study.
            opened: The round.
            names: With correlated noise, a digest of the names of all units that could be named differently later.
        """

    def begin(self, study: Study, round_number: int) -> None:
        """Spend the cost of a reserved round, before its first random draw."""

    def charge(self, study: Study, contribution: Contribution) -> None:
        """Charge a round and store its contribution."""

    def began(self) -> Mapping[str, datetime]:
        """Return the time when each study began on the dataset, by its digest."""

    def take(self, entry: RecordedStep) -> None:
        """Record a step of secure aggregation, once."""

    def head(self, sequence: int, head: str) -> LedgerHead | None:
        """Return the ledger's head, given its head in the site's last statement; None where there is no ledger."""

    def charged(self, study: Study, round_number: int, account: Account) -> Charge | None:
        """Return the cost of a round to the dataset's account, and the account's total; None without privacy."""


class Releases:
    """A site's releases. It opens the ledger that the site file names, and never creates one.

    Raises:
        RefusedError: The site file names no ledger, no dataset or no anchor.
        StateError: There is no ledger at that path.
        VerificationError: The ledger was changed, or is older than its anchor.
    """

    def __init__(self, site: SiteConfig) -> None:
        self._site = site
        with _own_affair():
            if site.ledger is not None and site.anchor is None:
                raise RefusedError(
                    f"the site file of {site.name} names no anchor; without one, an old copy of the ledger would pass "
                    "for the newest",
                    f"add the line {ANCHOR_LINE} to the site file, then run `privet site init SITE --anchor` once",
                )
            self._ledger = open_ledger(site)

    def check(self, study: Study) -> None:
        """Check, before any record is read, that the dataset's limit covers the study from here to its end.

        Raises:
            RefusedError: The limit cannot cover this kind of study, or the study is private and there is no limit.
            BudgetExhaustedError: The limit does not cover it.
        """
        with _own_affair():
            self._check(study)

    def _check(self, study: Study) -> None:
        cost, limit, dataset = cost_of_round(study, self._site), limit_of(self._site), str(self._site.dataset)
        if cost is not None and limit is None:
            raise RefusedError(
                f"the site file of {self._site.name} sets no limit for dataset {dataset}; a private study needs one",
                "set unit, epsilon and delta under `[limit]` in the site file",
            )
        check_cost(dataset, limit, cost)
        if cost is None or limit is None:
            return
        items = self._ledger.items(dataset)
        done = sum(item.rounds for item in items if item.study == study.digest)
        release = RoundKey(dataset, study.digest, min(done + 1, study.rounds))
        # A site that was not asked into the head start pays for training alone.
        left = max(study.training.rounds - done + self._took_head(study), 0)
        first = [] if done or not study.sums_units(1) else [(cost_of_round(study, self._site, number=1), 1)]
        check_budget(release, limit, cost, items, left, [(each, count) for each, count in first if each is not None])

    def _took_head(self, study: Study) -> bool:
        """Whether a head start counts among the study's rounds in the ledger."""
        return study.sums_units(1) and self._ledger.counts(self._release(study, 1))

    def reserve(self, study: Study, opened: RoundOpen, names: str = "") -> Contribution | None:
        """Reserve a round, or return the contribution that was charged for it before.

        Args:
            study: The study.
            opened: The round.
            names: With correlated noise, a digest of the names of all units that could be named differently later.

        Raises:
            As `Ledger.reserve`.
        """
        release = self._release(study, opened.round)
        sites = len(opened.cohort) if study.distributed else 0
        inputs = f"sha256:{inputs_of(release.study, opened.round, opened.adapter_digest, sites).hex()}"
        cost, limit = cost_of_round(study, self._site, sites=sites, number=opened.round), limit_of(self._site)
        head = study.sums_units(opened.round)
        with _own_affair():
            planned = 1 if head else study.training.rounds + self._took_head(study)
            later = cost_of_study(study, self._site)[1:] if head else ()
            naming = None if cost is None or study.privacy.band is None else f"{cost.split} {names}"
            stored = self._ledger.reserve(release, cost, inputs, limit, planned, later, naming)
        return None if stored is None else _read(stored, self._site.name, opened)

    def lost(self, study: Study, opened: RoundOpen, sites: int) -> int:
        """Return how many rounds of a study in a row the dataset has paid for since the adapter changed last.

        Args:
            study: The study.
            opened: The next round. Earlier rounds from its adapter led to nothing.
            sites: Most sites that a cohort can have.
        """
        with _own_affair():
            paid = self._ledger.inputs(str(self._site.dataset), study.digest)
        # With shared noise a round's record names the size of its cohort, too.
        sizes = range(1, sites + 1) if study.distributed else (0,)
        count = 0
        for number in sorted((each for each in paid if each < opened.round), reverse=True):
            same = {inputs_of(study.digest, number, opened.adapter_digest, size).hex() for size in sizes}
            if paid[number].removeprefix("sha256:") not in same:
                break
            count += 1
        return count

    def begin(self, study: Study, round_number: int) -> None:
        """Spend the cost of a reserved round, before its first random draw. Durable on return.

        Raises:
            As `Ledger.begin`.
        """
        with _own_affair():
            self._ledger.begin(self._release(study, round_number))

    def charge(self, study: Study, contribution: Contribution) -> None:
        """Charge a begun round and store its contribution. Both are durable on return.

        Raises:
            As `Ledger.charge`.
        """
        release = self._release(study, contribution.round)
        self._ledger.charge(release, _payload(contribution))
        # This round started from the adapter that the round before led to, so the coordinator has closed that round
        # durably and does not request its bytes again.
        if contribution.round > 1:
            before = self._release(study, contribution.round - 1)
            if self._ledger.holds(before):
                self._ledger.acknowledge(before)

    def began(self) -> Mapping[str, datetime]:
        """Return the time when each study began on the dataset, by its digest."""
        return self._ledger.began(str(self._site.dataset))

    def take(self, entry: RecordedStep) -> None:
        """Record a step of secure aggregation, durably and once. Raises as `Ledger.take`."""
        self._ledger.take(entry)

    def head(self, sequence: int, head: str) -> LedgerHead:
        """Return the ledger's head, given its head in the site's last statement.

        Args:
            sequence: Row of the ledger in the last statement that the log holds; 0 before the first.
            head: Head of that row in the statement.

        Raises:
            VerificationError: This ledger never had that head.
        """
        # The round log is a second anchor: an attacker who can write the ledger and its anchor cannot rewrite it.
        if sequence:
            with _own_affair():
                self._ledger.check_anchor(sequence, head)
        now, digest_now = self._ledger.head
        return LedgerHead(sequence=now, head=digest_now, previous=head if sequence else None)

    def charged(self, study: Study, round_number: int, account: Account) -> Charge | None:
        """Return the cost of a round to the dataset's account, and the account's total; None without privacy.

        Args:
            study: The study.
            round_number: The round, which has been charged.
            account: Returns the account's digest for dataset, unit and delta.
        """
        limit = limit_of(self._site)
        if limit is None or plan(study) is None:
            return charge_of(self._site, study, round_number, account)
        with _own_affair():
            spent = self._ledger.statement(str(self._site.dataset), limit).epsilon
        return charge_of(self._site, study, round_number, account, (limit.delta, spent))

    def _release(self, study: Study, round_number: int) -> RoundKey:
        return RoundKey(str(self._site.dataset), study.digest, round_number)


@contextmanager
def _own_affair() -> Iterator[None]:
    """Mark errors as private to the site: they name its dataset and its limit."""
    try:
        yield
    except PrivetError as error:
        error.private = True
        raise


def open_ledger(site: SiteConfig) -> Ledger:
    """Open a site's ledger.

    Raises:
        RefusedError: The site file names no ledger or no dataset.
        StateError: There is no ledger at the path named, or it cannot be read.
        VerificationError: It was changed, or is older than its anchor.
    """
    # Never created here: a site that lost its ledger would start a second one, and forget what it has spent.
    if site.ledger is None or site.dataset is None:
        raise RefusedError(
            f"the site file of {site.name} names no {'ledger' if site.ledger is None else 'dataset'}; without one, the "
            "site releases nothing",
            "`privet site setup SITE` puts the lines back, and creates a ledger if the site has never had one",
        )
    return Ledger.open(site.ledger, site.anchor, site.ledger_key)


def cost_of_study(study: Study, site: SiteConfig) -> tuple[tuple[Cost, int], ...]:
    """Return the costs of a whole study's rounds, each with its number of rounds; none where it is not private."""
    head, training = study.rounds - study.training.rounds, study.training.rounds
    parts = ((cost_of_round(study, site, number=1), head), (cost_of_round(study, site), training))
    return tuple((cost, rounds) for cost, rounds in parts if cost is not None and rounds)


def cost_of_round(study: Study, site: SiteConfig, *, sites: int = 0, number: int | None = None) -> Cost | None:
    """Return the cost of one round of a study to each unit of a site; None where the study is not private.

    Args:
        study: The study.
        site: The site.
        sites: Number of sites that the round asks, if they share the noise: the worth of a share by itself follows
            from it. 0 leaves that out.
        number: Number of the round: whether it is the head start follows from it and, with correlated noise, the class
            that it draws. None: a round that trains, of an open class.

    Raises:
        StudyError: So many sites cannot share the noise.
    """
    mechanism = plan(study)
    if mechanism is None:
        return None
    # Without a unit column, a unit's name is a digest of its row as the study reads it. So only studies that read rows
    # alike give a unit the same hash.
    named = study.data.unit or digest(canonical_json(study.data.model_dump(mode="json")))
    rule = site.rule_for(study.data.unit)
    if rule is not None:  # a rule changes names, hence hashes: another split than the column's without it
        named = digest(canonical_json({"column": study.data.unit, "rule": rule}))
    head = number is not None and study.sums_units(number)
    event = mechanism.event(head=head)
    cost = Cost(event, mechanism.validation, study.data.validation_fraction, named)
    if not (study.distributed and sites):
        return cost
    shares, band = shared_noise(study, sites, head=head), event.band
    drawn = None if number is None or band == 1 else number % band
    return replace(cost, own_multiplier=shares.own_multiplier, corrupt=shares.corrupt, drawn=drawn)


def charge_of(
    site: SiteConfig, study: Study, round_number: int, account: Account, spent: tuple[float, float] | None = None
) -> Charge | None:
    """Return the cost of a round to a dataset, for the site's statement; None without privacy.

    Args:
        site: The site.
        study: The study.
        round_number: The round, which has been charged.
        account: Returns the account's digest for dataset, unit and delta.
        spent: Delta and epsilon of everything that the dataset has spent; None: of this study alone.
    """
    mechanism, limit = plan(study), limit_of(site)
    if mechanism is None:
        return None
    delta, epsilon = spent or (mechanism.delta, mechanism.spent(round_number))
    return Charge(
        account=account(site.dataset or site.name, study.privacy.unit, delta),
        training=mechanism_of(mechanism.event(head=study.sums_units(round_number))),
        validation=None if mechanism.validation is None else mechanism_of(mechanism.validation),
        delta=delta,
        epsilon=epsilon,
        limit=None if limit is None else limit.epsilon,
    )


def limit_of(site: SiteConfig) -> Limit | None:
    """Return the limit that the site file sets for its dataset."""
    return None if site.limit is None else Limit(site.limit.unit, site.limit.epsilon, site.limit.delta)


def _payload(contribution: Contribution) -> bytes:
    arrays = {"update": contribution.update, "metrics": contribution.metrics, "weight": np.array([contribution.weight])}
    payload: bytes = save(arrays)
    return payload


def _read(payload: bytes, name: str, opened: RoundOpen) -> Contribution:
    try:
        arrays = load(payload)
        weight = float(arrays["weight"][0])
        return Contribution(name, opened.round, opened.nonce, weight, arrays["update"], arrays["metrics"])
    except (SafetensorError, KeyError, IndexError):
        raise StateError(
            f"the update of round {opened.round} that the ledger stores cannot be read",
            "verify the ledger with `privet site doctor SITE`; if it is in order, report this as a bug",
        ) from None
