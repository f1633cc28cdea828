"""The worker: the one object at a site that holds its data and its model.

Its API is narrow, and every call checks before it acts. What it returns is what may leave the site.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from privet.client.budget.releases import Releases
from privet.client.policy.consent import check_policy, policy_digest
from privet.client.rounds.logbook import Logbook, LoggedRound, SitePart, open_logbook
from privet.client.rounds.masked import MaskedRounds, check_known
from privet.client.site import SiteConfig, load_site, rounded_count
from privet.client.training.data import DataReport, Records, concatenate, load_records, split_records
from privet.client.training.model import ModelHost, open_host
from privet.client.training.tasks import Feature, batches, collate, encode_records, forward, record_losses
from privet.client.training.train import Draws, TrainingSet, release_step, train_round
from privet.common.canonical import digest
from privet.common.errors import (
    DataError,
    DivergedError,
    ProtocolError,
    RefusedError,
    VerificationError,
)
from privet.common.masking.noise_shares import shared_noise
from privet.common.pki.keyfile import public_key
from privet.common.privacy.accounting import PrivacyEvent, plan
from privet.common.privacy.noise import (
    Randomness,
    SecretRandomness,
    SeededRandomness,
    derive_key,
    derive_seed,
    gaussian_release,
)
from privet.common.secagg.shamir import RandomBytes
from privet.common.secagg.site import Identity
from privet.common.study.adapter import Adapter
from privet.common.study.messages import (
    VALIDATION_LOSS_CAP,
    Consent,
    Contribution,
    Cosigned,
    Message,
    Offer,
    RoundOpen,
    Secured,
    Shown,
)
from privet.common.study.study import Study

Before = Callable[[int], Sequence[RoundOpen | Secured]]
"""Returns what a site was asked in the live round, from the given place on."""


@dataclass(frozen=True)
class SiteData:
    """A site's files under one study: features ready to train on, and what was dropped on the way."""

    training: TrainingSet
    validation: Sequence[Feature]
    validation_units: Sequence[Sequence[int]]
    reports: Sequence[DataReport]


class Worker:
    """A site's part in studies. Holds data, model and, for each round, its randomness."""

    def __init__(self, site: SiteConfig) -> None:
        self.site = site
        self._open: tuple[str, SiteData, ModelHost] | None = None
        self._masked: MaskedRounds | None = None
        self._checked: tuple[RoundOpen, LoggedRound] | None = None
        self._opening = threading.RLock()
        self._releases: Releases | None = None

    def offer(self, study: Study) -> Consent:
        """Load data and model for a study and consent to it.

        Raises:
            StudyError, DataError, RefusedError, VerificationError: The site cannot or will not take part.
        """
        if study.secure_aggregation.mode == "masked":
            self._masking(study)
        data, host = self.open(study)
        key = self.site.identity_key()  # by which the round log knows its members, also where nothing is masked
        public = "" if key is None else public_key(key)
        return Consent(self.site.name, study.digest, host.spec.digest, data.training.declared, public)

    def open(self, study: Study) -> tuple[SiteData, ModelHost]:
        """Return data and model for a study, loading both at most once.

        Raises:
            RefusedError: The site's policy or its people have not agreed to this study. Nothing is opened then.
        """
        self._check_agreed(study)
        with self._opening:  # another study may be opened at the same time
            found = self._open
            if found is None or found[0] != study.digest:
                host = self._host(study)
                found = self._open = (study.digest, self._load(study, host), host)
        return found[1], found[2]

    def _host(self, study: Study) -> ModelHost:
        return open_host(study, self.site.resources)

    def _check_agreed(self, study: Study) -> None:
        if self.site.reproducible_seed is not None:
            return  # a simulated site: its file says so, and nothing there is protected
        if self.site.log is None:
            raise RefusedError(
                f"site {self.site.name} names no round log, without which it takes part in nothing",
                "set `[log]` in the site file, then run `privet site init` once",
            )
        check_policy(self.site, study, lambda: self.releases.began())
        if self.site.declared_count is not None:
            _check_delta(study, self.site.declared_count)
        self.releases.check(study)

    def _load(self, study: Study, host: ModelHost) -> SiteData:
        parts, reports = zip(*(load_records(path, study) for path in self.site.train), strict=True)
        records: Records = concatenate(parts, distinct=self.site.distinct_files)
        key = self._split_key()
        training, validation = split_records(records, study.data.validation_fraction, key)
        if not len(training):
            raise DataError(
                f"site {self.site.name}: no training records are left after the validation split",
                "use more data, or a smaller data.validation_fraction",
            )
        by_unit = study.privacy.unit == "patient"
        units = list(training.by_unit().values()) if by_unit else [[row] for row in range(len(training))]
        held_out = list(validation.by_unit().values()) if by_unit else [[row] for row in range(len(validation))]
        declared = self.site.declared_count or rounded_count(len(units))
        _check_delta(study, declared)
        return SiteData(
            training=TrainingSet(encode_records(study, host.tokenizer, training), units, declared),
            validation=encode_records(study, host.tokenizer, validation),
            validation_units=held_out,
            reports=reports,
        )

    def _split_key(self) -> bytes:
        seed = self.site.reproducible_seed
        # By the dataset, as its ledger counts on a unit being held out or not in all studies alike.
        return derive_key(seed if seed is not None else 0, "validation-split", self.site.dataset or self.site.name)

    def _masking(self, study: Study) -> MaskedRounds:
        """Return this site's side of secure aggregation.

        Raises:
            RefusedError: The site file names no identity key, or does not list it among its peers.
        """
        self._check_agreed(study)
        if self._masked is None:
            key = self.site.identity_key()
            if key is None or self.site.peers.get(self.site.name) != public_key(key):
                raise RefusedError(
                    f"site {self.site.name}: the study masks updates, for which the site file must name this site's "
                    "identity key and list the public keys of all sites, this one's included",
                    "make a key with `privet site identity`, and set `identity` and `[peers]` in the site file",
                )
            identity = Identity(self.site.name, key)
            pins, floor = self.site.pins(), self.site.floor.terms()
            self._masked = MaskedRounds(identity, pins, floor, self.releases.take, self._state)
        return self._masked

    @cached_property
    def logbook(self) -> Logbook | None:
        """This site's side of the round log; None for a simulated site without one.

        Raises:
            StateError: Its policy or keys cannot be read.
        """
        return open_logbook(self.site)

    def cosign(self, shown: Shown) -> Cosigned:
        """Cosign a checkpoint of the round log, if it follows from the last one.

        Raises:
            ProtocolError: This site witnesses no log, or the message is malformed.
            VerificationError: The log is another, or does not go on from where it was: a rollback or a fork.
        """
        if self.logbook is None:
            raise ProtocolError(f"site {self.site.name} witnesses no log")
        return self.logbook.cosign(shown)

    def refusal(self, asked: Message, error: RefusedError) -> bytes:
        """Return a signed refusal of what was asked, for the round log; nothing where it belongs to no run of the log.

        Raises:
            StudyError, StateError: The site's policy cannot be read.
        """
        if self.logbook is None:
            return b""
        refused = asked if isinstance(asked, Offer | RoundOpen) else self._opened(asked)
        if refused is None:
            return b""
        study = Study.parse(dict(refused.study))
        if isinstance(refused, Offer):
            run, number = refused.run, 0
        else:
            run, number = self.logbook.run_of(study, refused), refused.round
        return self.logbook.refuse(study, run, number, error, policy_digest(self.site)) if run else b""

    def _opened(self, asked: Message) -> RoundOpen | None:
        """Return how the round was opened that a message of secure aggregation belongs to."""
        return self._masked.opened(asked) if self._masked is not None and isinstance(asked, Secured) else None

    def _state(self, opened: RoundOpen, upload: bytes) -> bytes:
        """Return the signed statement of this site's part in a round; nothing where no log is kept."""
        logbook = self._logbook_for(opened)
        if logbook is None:
            return b""
        study = Study.parse(dict(opened.study))
        data, _ = self.open(study)
        known = self._checked
        seen = known[1] if known and known[0] is opened else logbook.check(study, opened, self.site.pins())
        counts = {"units": len(data.training.units), "validation-units": len(data.validation_units)}
        part = SitePart(
            upload=digest(upload),
            policy=policy_digest(self.site),
            ledger=self.releases.head(opened.evidence.sequence, opened.evidence.head),
            charge=self.releases.charged(study, opened.round, logbook.account),
            values=counts if self.site.reproducible_seed is None else {},
        )
        return logbook.state(seen, opened, part)

    def _logbook_for(self, opened: RoundOpen) -> Logbook | None:
        """Return the log that a round must stand in; a simulated site may play one that stands in none."""
        return None if self.site.reproducible_seed is not None and not opened.evidence else self.logbook

    def update(self, opened: RoundOpen) -> Contribution:
        """Train for one round from the received adapter, for a study whose updates travel in the clear.

        Raises:
            ProtocolError: The study masks updates, this site is not in the round's cohort, or the adapter does
                not fit.
            VerificationError: The adapter is not the announced one.
            RefusedError: The study is not agreed to, or the round was released before with another adapter.
            DivergedError: Training without privacy gave a value that is not finite.
        """
        study, _, _ = self._check_round(opened)
        if study.secure_aggregation.mode == "masked":
            raise ProtocolError(f"round {opened.round}: the study masks updates, and none is sent in the clear")
        contribution = self._contribution(opened)
        return replace(contribution, statement=self._state(opened, contribution.upload))

    def advertise(self, opened: RoundOpen) -> Secured:
        """Begin one round under secure aggregation: accept what was received, and return this site's keys.

        Raises:
            ProtocolError: The study does not mask updates, this site is not in the round's cohort, the adapter
                does not fit, or the parameters are not those that follow from the study.
            VerificationError: The adapter is not the announced one, or keys are not the pinned ones.
            RefusedError: The study is not agreed to, or masking would be weaker than this site demands.
        """
        study, data, host = self._check_round(opened)
        if study.secure_aggregation.mode != "masked":
            raise ProtocolError(f"round {opened.round}: the study does not mask updates")
        random_bytes = self._random_bytes(opened.round)
        with host.lock:
            return self._masking(study).open(study, host.spec, opened, data.training.declared, random_bytes)

    def _check_round(self, opened: RoundOpen) -> tuple[Study, SiteData, ModelHost]:
        """Check a round before anything is trained, and return its study with data and model."""
        study = Study.parse(dict(opened.study))
        if self.site.name not in opened.cohort:
            raise ProtocolError(f"round {opened.round}: site {self.site.name} is not in its cohort")
        if not 1 <= opened.round <= study.training.rounds:
            raise ProtocolError(f"round {opened.round}: the study has rounds 1 to {study.training.rounds}")
        self._check_agreed(study)
        logbook = self._logbook_for(opened)
        if study.secure_aggregation.mode == "masked":
            check_known(opened, self.site.pins())
        if logbook is not None:
            self._checked = opened, logbook.check(study, opened, self.site.pins())
            self.releases.head(opened.evidence.sequence, opened.evidence.head)  # or what is charged could not be stated
        data, host = self.open(study)
        self._received(host, opened)
        return study, data, host

    def answer(self, asked: Secured, before: Before = lambda start: ()) -> Secured:
        """Answer one message of secure aggregation.

        Args:
            asked: The message.
            before: For a simulated site, whose steps may have been taken in other processes: what it was asked in
                this round so far.

        Raises:
            ProtocolError: The round is not this site's live one, or the message is out of turn.
            PrivetError: As `update`, and as the protocol's steps raise it.
        """
        if self.site.reproducible_seed is not None:
            self._catch_up(asked, before)
        if self._masked is None or self._open is None:
            raise ProtocolError(f"round {asked.round}: this site is not in it, or was restarted since")
        with self._open[2].lock:
            return self._masked.answer(asked, self._contribution)

    def _catch_up(self, asked: Secured, before: Before) -> None:
        """Take the steps of a round again that this simulated site took in other processes."""
        taken = 0 if self._masked is None else self._masked.steps(asked)
        for message in before(taken):
            if isinstance(message, RoundOpen):
                self.advertise(message)
            elif self._masked is not None:
                self._masked.replay(message)

    def _received(self, host: ModelHost, opened: RoundOpen) -> Adapter:
        """Return the adapter that a round starts from, checked."""
        adapter = Adapter.read(host.spec, opened.adapter)
        if adapter.digest != opened.adapter_digest:
            raise VerificationError(
                f"round {opened.round}: expected adapter {opened.adapter_digest}, received {adapter.digest}"
            )
        adapter.check_finite(f"round {opened.round}: the received adapter")
        return adapter

    def _contribution(self, opened: RoundOpen) -> Contribution:
        """Train for a round, or return what was trained for it before."""
        study = Study.parse(dict(opened.study))
        data, host = self.open(study)
        adapter = self._received(host, opened)
        mechanism = plan(study)
        with host.lock:  # held until the answer is on record, so that two requests cannot both train a round
            if (sent := self.releases.reserve(study, opened)) is not None:
                return sent
            self._seed_dropout(opened.round)
            draws = Draws(self._randomness(opened.round, "sampling"), self._randomness(opened.round, "noise"))
            if study.distributed:
                contribution = self._step(study, host, adapter, data.training, draws, opened)
                self.releases.charge(study, contribution)
                return contribution
            validation = mechanism.validation if mechanism is not None else None
            metrics = self._validate(study, host, adapter, data, opened.round, validation)
            update = train_round(
                host,
                study,
                adapter,
                data.training,
                draws,
                first_step=(opened.round - 1) * study.training.steps,
                mechanism=mechanism.training if mechanism is not None else None,
                physical_batch=self.site.resources.physical_batch,
            )
            if not np.isfinite(update).all():
                raise DivergedError(
                    f"site {self.site.name}: the update of round {opened.round} is not finite",
                    "lower the learning rate",
                )
            weight = float(data.training.declared) if study.aggregation.weighting == "declared" else 1.0
            contribution = Contribution(
                self.site.name, opened.round, opened.nonce, weight, (weight * update).astype(np.float32), metrics
            )
            size = contribution.update.nbytes + contribution.metrics.nbytes
            check_policy(self.site, study, self.releases.began, size)
            self.releases.charge(study, contribution)
            return contribution

    def _step(
        self, study: Study, host: ModelHost, adapter: Adapter, data: TrainingSet, draws: Draws, opened: RoundOpen
    ) -> Contribution:
        """Return this site's part in the one step of a round whose sites share the noise."""
        numbers = release_step(
            host,
            study,
            adapter,
            data,
            draws,
            shares=shared_noise(study, len(opened.cohort)),
            physical_batch=self.site.resources.physical_batch,
        )
        return Contribution(
            self.site.name, opened.round, opened.nonce, float(data.declared), numbers, np.empty(0, np.float64)
        )

    @property
    def releases(self) -> Releases:
        """What this site has released, by its ledger. Raises as `Releases`."""
        if self._releases is None:
            self._releases = Releases(self.site)
        return self._releases

    def _validate(
        self,
        study: Study,
        host: ModelHost,
        adapter: Adapter,
        data: SiteData,
        round_number: int,
        event: PrivacyEvent | None,
    ) -> NDArray[np.float64]:
        """Return the validation sums of the received adapter: units, capped losses, correct units.

        Each unit contributes a vector in [0, 1]^3, so its L2 norm is at most sqrt(3); under privacy the sums
        carry Gaussian noise of that sensitivity and the event's multiplier.
        """
        if study.data.validation_fraction == 0:
            return np.empty(0)
        sums = np.zeros(3)
        host.mount(adapter)
        if data.validation:
            losses, correct = unit_scores(host, study, data.validation)
            for rows in data.validation_units:
                loss = min(float(np.mean([losses[row] for row in rows])), VALIDATION_LOSS_CAP) / VALIDATION_LOSS_CAP
                sums += [1.0, loss, float(np.mean([correct[row] for row in rows]))]
        if event is not None:
            noise = self._randomness(round_number, "validation-noise")
            sums = gaussian_release(sums, event.noise_multiplier * 3**0.5, noise)
        return sums

    def _randomness(self, round_number: int, purpose: str) -> Randomness:
        seed = self.site.reproducible_seed
        if seed is None:
            return SecretRandomness()
        return SeededRandomness(seed, self.site.name, round_number, purpose)

    def _random_bytes(self, round_number: int) -> RandomBytes:
        """Return the source of a round's keys, shares and rounding."""
        if self.site.reproducible_seed is None:
            return os.urandom
        stream = self._randomness(round_number, "secagg")
        return lambda count: stream.words(-(-count // 8)).tobytes()[:count]

    def _seed_dropout(self, round_number: int) -> None:
        if self.site.reproducible_seed is not None:
            torch.manual_seed(derive_seed(self.site.reproducible_seed, self.site.name, round_number, "dropout"))


@torch.no_grad()
def unit_scores(host: ModelHost, study: Study, features: Sequence[Feature]) -> tuple[list[float], list[float]]:
    """Return each record's loss and the fraction it gets right, non-finite losses as the cap."""
    losses, correct = [0.0] * len(features), [0.0] * len(features)
    host.model.eval()
    try:
        for indices in batches(features, 64):
            batch = collate(host, [features[index] for index in indices])
            logits = forward(host, batch)
            values = record_losses(study, logits, batch).nan_to_num(
                VALIDATION_LOSS_CAP, VALIDATION_LOSS_CAP, VALIDATION_LOSS_CAP
            )
            labels = batch.labels
            if study.task.kind == "causal-lm":
                logits, labels = logits[:, :-1], labels[:, 1:]
            right = (logits.argmax(-1) == labels).float()
            if right.dim() > 1:
                kept = (labels >= 0).float()
                right = (right * kept).sum(1) / kept.sum(1).clamp(min=1)
            for index, loss, hit in zip(indices, values.tolist(), right.tolist(), strict=True):
                losses[index], correct[index] = loss, hit
    finally:
        host.model.train()
    return losses, correct


def _check_delta(study: Study, units: int) -> None:
    """Refuse a delta at which publishing one unit outright would be within the promise."""
    if study.privacy.delta is not None and study.privacy.delta * units >= 1:
        raise RefusedError(
            f"privacy.delta: {study.privacy.delta} is not below 1/n for this site's declared {units} units",
            "lower privacy.delta",
        )


@lru_cache(maxsize=2048)
def open_worker(path: Path) -> Worker:
    """Return the process's worker for a site file, built once."""
    return Worker(load_site(path))
