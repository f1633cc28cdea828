"""What a site has released and may still release: its ledger, bound to its site file.

A round is reserved before it is trained and charged, with the exact bytes, before anything leaves; asked for again,
it is answered with those bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from privet.common.masking.parameters import inputs_of
from privet.common.privacy.accounting import plan
from privet.common.secagg.site import RecordedStep
from privet.common.study.messages import Contribution, RoundOpen
from privet.common.study.study import Study

Account = Callable[[str, str, float], str]
"""Gives the digest under which the round log knows the account of a dataset, a unit of privacy and a delta."""


class Spending(Protocol):
    """What a worker needs to know and to record of its releases."""

    def check(self, study: Study) -> None:
        """Check, before any record is read, that the dataset's limit covers the study from here to its end."""

    def reserve(self, study: Study, opened: RoundOpen) -> Contribution | None:
        """Reserve a round, or return what was released for it before."""

    def charge(self, study: Study, contribution: Contribution) -> None:
        """Charge a round and store what it releases."""

    def began(self) -> Mapping[str, datetime]:
        """Return when each study began on the dataset, by its digest."""

    def take(self, entry: RecordedStep) -> None:
        """Record a step of secure aggregation, once."""

    def head(self, sequence: int, head: str) -> LedgerHead | None:
        """Return where the ledger stands, given its head in the site's last statement; None where none is kept."""

    def charged(self, study: Study, round_number: int, account: Account) -> Charge | None:
        """Return what a round cost the dataset's account, and what it has spent after it; None without privacy."""


class Releases:
    """A site's releases. Opens the ledger that the site file names; none is ever made here.

    Raises:
        RefusedError: The site names no ledger or dataset.
        StateError: There is no ledger at the path named.
        VerificationError: The ledger was changed, or is older than its anchor.
    """

    def __init__(self, site: SiteConfig) -> None:
        self._site = site
        with _own_affair():
            self._ledger = open_ledger(site)

    def check(self, study: Study) -> None:
        """Check, before any record is read, that the dataset's limit covers the study from here to its end.

        Raises:
            RefusedError: The limit does not admit this kind of study, or a private study finds no limit.
            BudgetExhaustedError: The limit does not cover it.
        """
        with _own_affair():
            self._check(study)

    def _check(self, study: Study) -> None:
        cost, limit, dataset = cost_of_round(study), limit_of(self._site), str(self._site.dataset)
        if cost is not None and limit is None:
            raise RefusedError(
                f"site {self._site.name} sets no limit for dataset {dataset}, which a private study needs",
                "set unit, epsilon and delta under `[limit]` in the site file",
            )
        check_cost(dataset, limit, cost)
        if cost is None or limit is None:
            return
        items = self._ledger.items(dataset)
        done = sum(item.rounds for item in items if item.study == study.digest)
        left = max(study.training.rounds - done, 0)
        release = RoundKey(dataset, study.digest, min(done + 1, study.training.rounds))
        check_budget(release, limit, cost, items, left)

    def reserve(self, study: Study, opened: RoundOpen) -> Contribution | None:
        """Reserve a round, or return what was released for it before.

        Raises:
            As `Ledger.reserve`.
        """
        release = self._release(study, opened.round)
        sites = len(opened.cohort) if study.distributed else 0
        inputs = f"sha256:{inputs_of(release.study, opened.round, opened.adapter_digest, sites).hex()}"
        cost, limit = cost_of_round(study), limit_of(self._site)
        with _own_affair():
            stored = self._ledger.reserve(release, cost, inputs, limit, study.training.rounds)
        return None if stored is None else _read(stored, self._site.name, opened)

    def charge(self, study: Study, contribution: Contribution) -> None:
        """Charge a round and store what it releases: durable on return.

        Raises:
            As `Ledger.charge`.
        """
        release = self._release(study, contribution.round)
        self._ledger.charge(release, _payload(contribution))
        # The round came from a later adapter than the one before: that one's bytes are not asked for again.
        if contribution.round > 1:
            before = self._release(study, contribution.round - 1)
            if self._ledger.stored(before) is not None:
                self._ledger.acknowledge(before)

    def began(self) -> Mapping[str, datetime]:
        """Return when each study began on the dataset, by its digest."""
        return self._ledger.began(str(self._site.dataset))

    def take(self, entry: RecordedStep) -> None:
        """Record a step of secure aggregation, durably and once. Raises as `Ledger.take`."""
        self._ledger.take(entry)

    def head(self, sequence: int, head: str) -> LedgerHead:
        """Return where the ledger stands, given its head in the site's last statement.

        Args:
            sequence: Entry of the ledger at the last statement that the log holds; 0 before the first.
            head: Its head there.

        Raises:
            VerificationError: That head was never this ledger's.
        """
        if sequence:
            with _own_affair():
                self._ledger.check_anchor(sequence, head)
        now, digest_now = self._ledger.head
        return LedgerHead(sequence=now, head=digest_now, previous=head if sequence else None)

    def charged(self, study: Study, round_number: int, account: Account) -> Charge | None:
        """Return what a round cost the dataset's account, and what it has spent after it; None without privacy.

        Args:
            study: The study.
            round_number: The round, which has been charged.
            account: Gives the account's digest for dataset, unit and delta.
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
    """Mark errors as the site's own affair: they name its dataset and its limit."""
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
    if site.ledger is None or site.dataset is None:
        raise RefusedError(
            f"site {site.name} names no {'ledger' if site.ledger is None else 'dataset'}, without which it releases "
            "nothing",
            "set `dataset` and `ledger` in the site file, then run `privet site init` once",
        )
    return Ledger.open(site.ledger, site.anchor)


def cost_of_round(study: Study) -> Cost | None:
    """Return what one round of a study costs each unit, or None where the study is not private."""
    mechanism = plan(study)
    if mechanism is None:
        return None
    # Without a column for it, a unit is named by its row as the study reads it.
    named = study.data.unit or digest(canonical_json(study.data.model_dump(mode="json")))
    return Cost(mechanism.training, mechanism.validation, study.data.validation_fraction, named)


def charge_of(
    site: SiteConfig, study: Study, round_number: int, account: Account, spent: tuple[float, float] | None = None
) -> Charge | None:
    """Return what a round cost a dataset, as the site states it; None without privacy.

    Args:
        site: The site.
        study: The study.
        round_number: The round, which has been charged.
        account: Gives the account's digest for dataset, unit and delta.
        spent: Delta and epsilon of all that the dataset has spent; None takes what the study has spent alone.
    """
    mechanism, limit = plan(study), limit_of(site)
    if mechanism is None:
        return None
    delta, epsilon = spent or (mechanism.delta, mechanism.spent(round_number))
    return Charge(
        account=account(site.dataset or site.name, study.privacy.unit, delta),
        training=mechanism_of(mechanism.training),
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
        raise StateError(f"what the ledger stored for round {opened.round} cannot be read") from None
