"""The worker: the one object at a site that holds its data and its model.

Its API is narrow, and every call checks before it acts. Only its return values leave the site.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.client.budget.chain import Head
from privet.client.budget.draws import Paid, Payment
from privet.client.budget.withdrawals import Withdrawn, withdrawn_of
from privet.client.policy.consent import policy_digest
from privet.client.rounds.history import Fetch
from privet.client.rounds.logbook import LoggedRound, SitePart
from privet.client.rounds.masked import MaskedRounds, check_known
from privet.client.rounds.planted import plant
from privet.client.rounds.received import completed, read_adapter
from privet.client.rounds.site import RealSite, Site
from privet.client.site import load_site
from privet.client.trainer.apart import Trainer
from privet.client.trainer.opening import forget, opening, trainer_of
from privet.client.training.counts import count_sum, score_sum
from privet.client.training.headstart import class_sums
from privet.client.training.host import ModelHost
from privet.client.training.loading import SiteData, load_data
from privet.client.training.meter import Meter
from privet.client.training.model import check_terms, initial_adapter, open_host
from privet.client.training.sums import Summing, release_sum, share_sum
from privet.client.training.train import Draws, release_correlated, release_step, train_round
from privet.client.training.validation import EXACT, validation_points
from privet.common.canonical import digest
from privet.common.errors import DivergedError, PrivetError, ProtocolError, RefusedError, StateError
from privet.common.log.statements import Charge
from privet.common.masking.noise_shares import shared_noise
from privet.common.masking.parameters import check_count, suite_of
from privet.common.masking.vector import VALIDATION_SUMS, released
from privet.common.pki.keyfile import public_key
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import lattice_release, lattice_unit
from privet.common.privacy.shared_noise import Integers
from privet.common.secagg.site import Identity
from privet.common.secagg.terms import check_suite
from privet.common.study.adapter import Adapter
from privet.common.study.columns import own_values
from privet.common.study.counts import check_measured
from privet.common.study.messages import (
    Consent,
    Contribution,
    Cosigned,
    Message,
    Offer,
    RoundOpen,
    Secured,
    Shown,
)
from privet.common.study.sections import VALIDATION_SENSITIVITY
from privet.common.study.study import Study

_AS_STUDY = "the coordinator must open the round as the study states; run the same version of privet on both sides"


Host = ModelHost | Trainer
"""Where records are used: in this process, or by a trainer apart."""


class Worker:
    """A site's part in studies. It holds data, model and, for each round, randomness."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.name = site.config.name
        # Called after a round's training, with what it took; the numbers stay at the site.
        self.trained: Callable[[Study, Meter], None] = lambda study, took: None
        # Called with what a round cost the dataset, before its update leaves; the numbers stay at the site.
        self.charged: Callable[[Study, int, Charge | None], None] = lambda study, number, charge: None
        # Called before a round's training with the earlier rounds that led to nothing.
        self.lost: Callable[[Study, Collection[int]], None] = lambda study, numbers: None
        self._open: tuple[str, Head | None, SiteData, Host] | None = None
        # Also while it is queued or loads, when nothing is open.
        self._trainer: Trainer | None = None
        self._ended = False
        self._masked: MaskedRounds | None = None
        self._checked: tuple[RoundOpen, LoggedRound] | None = None
        # A thread takes locks in this order: a study's turn, what is open, and the open model's own.
        self._turns: dict[str, threading.RLock] = {}
        self._opening = threading.RLock()

    def offer(self, study: Study, run: str = "", node: str = "") -> Consent:
        """Load data and model for a study and consent to it, for one run and for the node that was asked.

        Raises:
            StudyError, DataError, RefusedError, VerificationError: The site cannot or will not take part.
        """
        if study.secure_aggregation.mode == "masked":
            self._masking(study)
        data, host = self._opened_for(study)
        with _kept(host):
            check_count(study, data.training.declared)  # also where the site file declares none
        # The round log names its members by identity key, so the consent carries it also where nothing is masked.
        key = self.site.config.identity_key()
        public = "" if key is None else public_key(key)
        consent = Consent(self.name, study.digest, host.spec.digest, data.training.declared, public)
        return consent if key is None else replace(consent, proof=key.sign(consent.signed(run, node)).hex())

    def open(self, study: Study) -> tuple[SiteData, ModelHost]:
        """Return data and model for a study. Each is loaded at most once.

        Raises:
            RefusedError: The site's policy, approvals or budget do not admit the study. No file is opened then.
            StudyError: As `check_terms`.
        """
        data, host = self._opened_for(study)
        if not isinstance(host, ModelHost):
            raise StateError(
                "the model of this site is in a trainer apart, not in this process", "report this as a bug"
            )
        return data, host

    def close(self) -> None:
        """End what runs beside this process. A batch job is cancelled, wherever it is in its queue.

        It takes no lock, as a message that waits for the job holds it, and may wait for hours.
        """
        self._ended = True
        if self._trainer is not None:
            self._trainer.close()
        forget(self.site.config)

    def _opened_for(self, study: Study) -> tuple[SiteData, Host]:
        """As `open`, also where a trainer apart has the model. Then it runs, or `StateError` says why it does not."""
        self.site.check_agreed(study)
        check_terms(study)
        # Messages of two studies may arrive at the same time, and each replaces what is open.
        with self._opening:
            found = self._open
            # Whoever is withdrawn leaves the next round, also of a study that has begun: its files are read again.
            withdrawn = withdrawn_of(self.site.config)
            head = None if withdrawn is None else withdrawn.head
            if head is None and found is not None and found[1] is not None:
                raise StateError(
                    "people were withdrawn from this site's data, but the marks of all of them are missing",
                    "restore the newest copies; until then this site reads no file",
                )
            if self.site.config.resources.trainer != "inside":
                return self._apart(study, found, withdrawn)
            if found is None or found[0] != study.digest or not isinstance(found[3], ModelHost):
                host = self._host(study)
                found = self._open = (study.digest, head, self._load(study, host), host)
            elif found[1] != head:
                found = self._open = (study.digest, head, self._load(study, found[3]), found[3])
        return found[2], found[3]

    def _apart(
        self, study: Study, found: tuple[str, Head | None, SiteData, Host] | None, withdrawn: Withdrawn | None
    ) -> tuple[SiteData, Trainer]:
        """Return a study's records, without contents, and the trainer that has them."""
        if self._ended:
            raise StateError("this site's process ends", "ask again once it serves")
        site, trainer = self.site, self._trainer
        head = None if withdrawn is None else withdrawn.head
        if found is None or trainer is None or found[:2] != (study.digest, head) or trainer.stale:
            site.check_files(study)
            opened = opening(
                site.config,
                study,
                begun=site.has_begun(study),
                split_key=site.split_key(),
                distinct=site.distinct_files,
                planting=plant(site.config, study),
                withdrawn=withdrawn,
            )
            # One that was queued when its answer was awaited last is this study's still. And a job that was submitted
            # before this process began is taken over, if it is for this very study.
            if trainer is None or trainer.stale or trainer.opening.digest != opened.digest:
                if trainer is not None:
                    trainer.close()
                trainer = self._trainer = trainer_of(site.config, opened, lambda: site.check_files(study))
        self._open = None
        trainer.ready()
        self._open = (study.digest, head, trainer.data, trainer)
        return trainer.data, trainer

    def _host(self, study: Study) -> ModelHost:
        return open_host(study, self.site.config.resources, begun=self.site.has_begun(study))

    def _load(self, study: Study, host: ModelHost) -> SiteData:
        site = self.site
        site.check_files(study)
        planting = plant(site.config, study)
        return load_data(site.config, study, host, site.split_key(), distinct=site.distinct_files, planting=planting)

    def _masking(self, study: Study) -> MaskedRounds:
        """Return this site's side of secure aggregation.

        Raises:
            RefusedError: The site file names no identity key, or does not pin its public key under `[peers]`, or its
                floor refuses the study's key agreement.
        """
        self.site.check_agreed(study)
        site = self.site.config
        floor = site.floor.terms()
        check_suite(suite_of(study), floor)
        pins = site.pins()
        if self._masked is None:
            key = site.identity_key()
            if key is None or pins.get(self.name) != bytes.fromhex(public_key(key)):
                raise RefusedError(
                    f"site {self.name}: the study masks updates, so the site file must name this site's identity "
                    "key and pin the public keys of all sites, its own included",
                    "make a key with `privet site identity FILE`, then set `identity` and `[peers]` in the site file",
                )
            take, kem = self.site.releases.take, self.site.kem
            self._masked = MaskedRounds(Identity(self.name, key), pins, floor, take, self._state, kem, self._revealed)
        # Whom the site trusts may have changed since the last round.
        self._masked.pins = pins
        return self._masked

    def cosign(self, shown: Shown) -> Cosigned:
        """Cosign a checkpoint of the round log, if it follows from the last one.

        Raises:
            ProtocolError: This site witnesses no log, or the message is malformed.
            VerificationError: It is another log, or the checkpoint does not follow: a rollback or a fork.
        """
        if self.site.logbook is None:
            raise ProtocolError(
                f"site {self.name} is no witness of a round log: its site file has no [log] table",
                "run `privet site setup SITE`, which adds the `[log]` table",
            )
        return self.site.logbook.cosign(shown)

    def refusal(self, asked: Message, error: RefusedError) -> bytes:
        """Return a signed refusal of a message, for the round log; empty where it belongs to no run of the log.

        Raises:
            StudyError, StateError: The site's policy cannot be read.
        """
        logbook = self.site.logbook
        if logbook is None:
            return b""
        refused = asked if isinstance(asked, Offer | RoundOpen) else self._opened(asked)
        if refused is None:
            return b""
        study = Study.parse(dict(refused.study))
        if isinstance(refused, Offer):
            run, number = refused.run, 0
        else:
            run, number = logbook.run_of(study, refused), refused.round
        return logbook.refuse(study, run, number, error, policy_digest(self.site.config)) if run else b""

    def _opened(self, asked: Message) -> RoundOpen | None:
        """Return the `RoundOpen` of the live round that a message of secure aggregation belongs to."""
        return self._masked.opened(asked) if self._masked is not None and isinstance(asked, Secured) else None

    def _state(self, opened: RoundOpen, upload: bytes) -> bytes:
        """Return the signed statement of this site's part in a round; empty where it keeps no log."""
        logbook = self.site.logbook_for(opened)
        if logbook is None:
            return b""
        study = Study.parse(dict(opened.study))
        # The very message that was checked, not an equal one: its proofs need no second verification.
        checked = self._checked
        seen = checked[1] if checked and checked[0] is opened else logbook.check(study, opened, self.site.config.pins())
        charge = self.site.releases.charged(study, opened.round, logbook.account)
        self.charged(study, opened.round, charge)
        part = SitePart(
            upload=digest(upload),
            policy=policy_digest(self.site.config),
            ledger=self.site.releases.head(opened.evidence.sequence, opened.evidence.head),
            charge=charge,
            values=self.site.committed(self._units(study)),
        )
        return logbook.state(seen, opened, part)

    def _units(self, study: Study) -> dict[str, int]:
        """Return the counts that a site commits to. A trainer that has ended is not asked again: the round is paid."""
        trainer = self._trainer
        known = trainer is not None and not trainer.stale and trainer.knows(study)
        data = trainer.data if trainer is not None and known else self._opened_for(study)[0]
        return {"units": len(data.training.units), "validation-units": len(data.validation_units)}

    def _revealed(self, study: Study, opened: RoundOpen) -> None:
        if study.privacy.band is not None:
            self.site.memory.added(study, opened.round)

    def update(self, opened: RoundOpen) -> Contribution:
        """Train for one round from the received adapter, for a study whose updates are not masked.

        Raises:
            ProtocolError: The study masks updates, this site is not in the round's cohort, or the adapter does
                not fit.
            VerificationError: The adapter is not the announced one.
            RefusedError: The site does not agree to the study, or it reserved the round for another adapter.
            SpentRoundError: The round is private, and an earlier attempt at it failed after its first random draw.
            DivergedError: Training gave a value that is not finite. A private round is charged all the same.
        """
        study, _, _, opened = self._check_round(opened)
        if study.secure_aggregation.mode == "masked":
            raise ProtocolError(
                f"round {opened.round}: the study masks updates, so this site sends none in the clear; the coordinator "
                "asked for an update without secure aggregation",
                _AS_STUDY,
            )
        contribution = self._contribution(opened)
        return replace(contribution, statement=self._state(opened, contribution.upload))

    def advertise(self, opened: RoundOpen) -> Secured:
        """Begin one round under secure aggregation: check the message, and return this site's keys.

        In a later round of a block, train and return the masked vector.

        Raises:
            ProtocolError: The study does not mask updates, this site is not in the round's cohort, the adapter
                does not fit, or the parameters do not follow from the study.
            VerificationError: The adapter is not the announced one, or keys are not the pinned ones.
            RefusedError: The site does not agree to the study, or masking would be weaker than its floor.
        """
        study, data, host, opened = self._check_round(opened)
        if study.secure_aggregation.mode != "masked":
            raise ProtocolError(
                f"round {opened.round}: the study does not mask updates, but the coordinator asked for secure "
                "aggregation",
                _AS_STUDY,
            )
        random_bytes = self.site.random_bytes(opened.round)
        with self._turn(study.digest), _kept(host):
            return self._masking(study).open(
                study, host.spec, opened, data.training.declared, random_bytes, self._contribution
            )

    def _check_round(self, opened: RoundOpen) -> tuple[Study, SiteData, Host, RoundOpen]:
        """Check a round before any training. Return its study, data and model, and the message with a whole adapter."""
        study = Study.parse(dict(opened.study))
        if self.name not in opened.cohort:
            raise ProtocolError(
                f"round {opened.round}: the coordinator asked site {self.name}, which is not in the round's cohort",
                _AS_STUDY,
            )
        if not 1 <= opened.round <= study.rounds:
            raise ProtocolError(
                f"round {opened.round}: expected a round from 1 to {study.rounds}, as the study sets training.rounds",
                _AS_STUDY,
            )
        # Again for each round, as policy and approvals may have changed since the site consented.
        self.site.check_agreed(study)
        pins, logbook = self.site.config.pins(), self.site.logbook_for(opened)
        if study.secure_aggregation.mode == "masked":
            check_known(opened, pins)
        seen = None
        if logbook is not None:
            seen = logbook.check(study, opened, pins)
            # Before training: a ledger that contradicts the log's last head could charge the round, but not state it.
            self.site.releases.head(opened.evidence.sequence, opened.evidence.head)
            # The coordinator may quote an old head, for a ledger and an anchor that were both put back. The site's own
            # copy of the log holds the last one.
            if seen.ledger is not None:
                self.site.releases.head(*seen.ledger)
            self.lost(study, seen.lost)
        # Only now, as the work grows with the cohort, which the log has confirmed.
        self.site.check_lost(study, opened)
        data, host = self._opened_for(study)
        with _kept(host):
            whole = completed(host, study, opened, lambda: _start(study, host))
            if study.counts:
                check_measured(study, read_adapter(host, whole))
        if seen is not None:
            self._checked = whole, seen
        return study, data, host, whole

    def answer(self, asked: Secured) -> Secured:
        """Answer one message of secure aggregation.

        Raises:
            ProtocolError: The round is not this site's live one, or the message is out of order.
            PrivetError: As `update`, and as the protocol's steps raise it.
        """
        masked = self._masked
        if masked is None or masked.opened(asked) is None:
            raise ProtocolError(
                f"round {asked.round}: this site is not in the round, or has restarted since it began",
                "continue the round without this site: it counts as a drop-out",
            )
        with self._turn(asked.study):
            return masked.answer(asked, self._contribution)

    def _turn(self, study_digest: str) -> threading.RLock:
        """Return the lock under which one message of a study is answered at a time."""
        return self._turns.setdefault(study_digest, threading.RLock())

    def _contribution(self, opened: RoundOpen) -> Contribution:
        """Train for a round, or return the contribution that was trained for it before."""
        study = Study.parse(dict(opened.study))
        if study.secure_aggregation.mode == "masked":
            # Again, as the operator may have withdrawn a confirmation since the round was opened.
            check_known(opened, self.site.config.pins())
        data, host = self._opened_for(study)
        with _kept(host):
            return self._made(study, opened, data, host)

    def _made(self, study: Study, opened: RoundOpen, data: SiteData, host: Host) -> Contribution:
        adapter = read_adapter(host, opened)
        # Held until the ledger has charged the contribution: two requests must not both train a round, as noise drawn
        # twice for one round is two releases.
        with self._turn(study.digest), host.lock:
            # The size is known before training, and a refusal now costs nothing.
            self.site.check_upload(study, _upload_bytes(study, host, opened.round))
            # Reserved before a record is used. A round charged before gets the same bytes again, and no new noise; one
            # that began and has no bytes is refused.
            contribution = self.site.releases.reserve(study, opened, data.names)
            if contribution is None:
                self.site.seed_dropout(opened.round)
                part = self._step if study.distributed else self._local
                # The first draw spends the round's cost, so whatever happens afterwards, no draw is unpaid.
                payment = Payment(lambda: self.site.releases.begin(study, opened.round))
                before = host.meter.copy()
                contribution = part(study, host, adapter, data, opened, payment)
                # Stored before it leaves, so that the same bytes leave if the round is asked for again.
                self.site.releases.charge(study, contribution)
                self.trained(study, host.meter.since(before))
            # Policy and approvals may have changed during training, and the update has not left yet. If they admit it
            # again later, the stored bytes leave.
            self.site.check_upload(study, 4 * contribution.update.size + contribution.metrics.nbytes)
            return contribution

    def _local(
        self,
        study: Study,
        host: Host,
        adapter: Adapter,
        data: SiteData,
        opened: RoundOpen,
        payment: Payment,
    ) -> Contribution:
        """Return this site's update of a round, with its own noise where the study is private."""
        mechanism = plan(study)
        # Before training, which replaces the received adapter in the host.
        metrics = self._validate(study, host, adapter, data, opened.round, payment)
        draws, batch = self._draws(opened.round, payment), self.site.config.resources.physical_batch
        head = study.sums_units(opened.round)
        event = None if mechanism is None else mechanism.event(head=head)
        weight = study.aggregation.weight(data.training.declared)
        if head:
            terms = _terms(study, host, adapter, data, draws, batch)
            total = release_sum(study, terms, len(data.training.units), draws.noise, event, host.meter)
            # What a head start sends is weight times a mean in float32, as every update is. Counts leave as they are.
            update: NDArray[np.floating[Any]]
            update = total / weight if study.counts else (total / weight).astype(np.float32)
        else:
            done = study.trained_before(opened.round) * study.training.steps
            update = train_round(
                host,
                study,
                adapter,
                data.training,
                draws,
                first_step=done,
                mechanism=event,
                physical_batch=batch,
                own=own_values(study, host.spec, self.name),
            )
        with np.errstate(over="ignore"):
            weighted = (weight * update).astype(np.float32)
        if not np.isfinite(weighted).all():
            raise DivergedError(
                f"site {self.name}: the update of round {opened.round} has a value that is infinite or not a number"
                + ("" if mechanism is None else "; the round is charged, and the site sits it out"),
                "lower training.learning_rate in the study",
            )
        return Contribution(self.name, opened.round, opened.nonce, weight, weighted, metrics)

    def _step(
        self,
        study: Study,
        host: Host,
        adapter: Adapter,
        data: SiteData,
        opened: RoundOpen,
        payment: Payment,
    ) -> Contribution:
        """Return this site's part of the single step in a round where sites share the noise."""
        draws, batch = self._draws(opened.round, payment), self.site.config.resources.physical_batch
        head = study.sums_units(opened.round)
        shares, own = shared_noise(study, len(opened.cohort), head=head), own_values(study, host.spec, self.name)
        if head:
            terms = _terms(study, host, adapter, data, draws, batch)
            numbers = share_sum(terms, len(data.training.units), draws.noise, shares, host.meter)
        elif shares.band is None:
            numbers = release_step(
                host, study, adapter, data.training, draws, shares=shares, physical_batch=batch, own=own
            )
        else:
            # The step is the number of the round, whether or not this site was in the rounds before: a clock of its own
            # would bring the steps of a class closer together than the band.
            numbers, noise = release_correlated(
                host,
                study,
                adapter,
                data.training,
                draws,
                shares=shares,
                physical_batch=batch,
                step=opened.round - 1,
                past=self.site.memory.past(study, opened),
                own=own,
            )
            self.site.memory.keep(study, opened, noise)
        weight = float(data.training.declared)
        return Contribution(self.name, opened.round, opened.nonce, weight, numbers, np.empty(0, np.float64))

    def _validate(
        self,
        study: Study,
        host: Host,
        adapter: Adapter,
        data: SiteData,
        round_number: int,
        payment: Payment,
    ) -> NDArray[np.float64]:
        """Return the received adapter's validation sums [3], with noise if private; [0] where no unit is held out."""
        if study.data.validation_fraction == 0:
            return np.empty(0)
        mechanism = plan(study)
        if mechanism is None or mechanism.validation is None:
            return np.multiply(_validated(host, adapter, data, EXACT), EXACT, dtype=np.float64)
        # Every reader of the curve looks at the validation units, so these sums are a release with noise of their own.
        lattice = lattice_unit(mechanism.validation.noise_multiplier * VALIDATION_SENSITIVITY)
        points = _validated(host, adapter, data, lattice)
        noise = Paid(self.site.randomness(round_number, "validation-noise"), payment)
        return lattice_release(points, lattice, noise)

    def _draws(self, round_number: int, payment: Payment) -> Draws:
        sampling, noise = (self.site.randomness(round_number, purpose) for purpose in ("sampling", "noise"))
        return Draws(Paid(sampling, payment), Paid(noise, payment))


@contextmanager
def _kept(host: Host) -> Iterator[None]:
    """Keep the texts of errors at the site where a trainer apart stated the layout and the counts that they name.

    One that is broken into could write a record into these numbers.
    """
    try:
        yield
    except PrivetError as error:
        error.private = error.private or isinstance(host, Trainer)
        raise


def _start(study: Study, host: Host) -> Adapter:
    """Return the adapter that a study starts from."""
    return host.start(study) if isinstance(host, Trainer) else initial_adapter(study, host)


def _validated(host: Host, adapter: Adapter, data: SiteData, lattice: float) -> Integers:
    """Return the validation sums of an adapter, as `validation_points`."""
    if isinstance(host, Trainer):
        return host.validation_points(adapter, lattice)
    return validation_points(host, adapter, data, lattice)


def _terms(study: Study, host: Host, adapter: Adapter, data: SiteData, draws: Draws, physical_batch: int) -> Summing:
    """Return what adds up the terms of all units, of a round that is one sum over them."""
    if isinstance(host, Trainer):
        size = sum(tensor.size for tensor in released(study, host.spec, head=True))
        return partial(host.unit_sum, study, adapter, draws.sampling, size)
    if data.counts is not None:
        return partial(count_sum, study, data.counts, draws.sampling)
    if study.kind == "evaluate":
        return partial(score_sum, host, study, adapter, data.training.features, data.training.units)
    return partial(class_sums, host, study, adapter, data.training, physical_batch)


def _upload_bytes(study: Study, host: Host, number: int) -> int:
    """Return the bytes of an update as the policy counts them: 4 for each value, also of a step's sum, before masks."""
    values = sum(tensor.size for tensor in released(study, host.spec, head=study.sums_units(number)))
    validates = study.data.validation_fraction > 0 and not study.distributed
    return 4 * values + (8 * VALIDATION_SUMS if validates else 0)


@lru_cache(maxsize=64)
def open_worker(path: Path, fetch: Fetch | None = None) -> Worker:
    """Return the process's worker for a site file, built once.

    Args:
        path: The site file.
        fetch: Returns leaves of the round log from the coordinator; None at a site that has not joined.

    Raises:
        StudyError: The site file is missing or not valid.
    """
    return Worker(RealSite(load_site(path), fetch))
