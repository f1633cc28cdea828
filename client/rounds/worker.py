"""The worker: the one object at a site that holds its data and its model.

Its API is narrow, and every call checks before it acts. What it returns is what may leave the site.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from privet.client.policy.consent import policy_digest
from privet.client.rounds.loading import SiteData, load_data
from privet.client.rounds.logbook import LoggedRound, SitePart
from privet.client.rounds.masked import MaskedRounds, check_known
from privet.client.rounds.site import RealSite, Site
from privet.client.rounds.validation import SENSITIVITY, validation_sums
from privet.client.site import load_site
from privet.client.training.model import ModelHost, open_host
from privet.client.training.train import Draws, release_step, train_round
from privet.common.canonical import digest
from privet.common.errors import DivergedError, ProtocolError, RefusedError, VerificationError
from privet.common.masking.noise_shares import shared_noise
from privet.common.pki.keyfile import public_key
from privet.common.privacy.accounting import plan
from privet.common.privacy.noise import gaussian_release
from privet.common.secagg.site import Identity
from privet.common.study.adapter import Adapter
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
from privet.common.study.study import Study


class Worker:
    """A site's part in studies. Holds data, model and, for each round, its randomness."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.name = site.config.name
        self._open: tuple[str, SiteData, ModelHost] | None = None
        self._masked: MaskedRounds | None = None
        self._checked: tuple[RoundOpen, LoggedRound] | None = None
        self._opening = threading.RLock()

    def offer(self, study: Study) -> Consent:
        """Load data and model for a study and consent to it.

        Raises:
            StudyError, DataError, RefusedError, VerificationError: The site cannot or will not take part.
        """
        if study.secure_aggregation.mode == "masked":
            self._masking(study)
        data, host = self.open(study)
        key = self.site.config.identity_key()  # by which the round log knows its members, also where nothing is masked
        public = "" if key is None else public_key(key)
        return Consent(self.name, study.digest, host.spec.digest, data.training.declared, public)

    def open(self, study: Study) -> tuple[SiteData, ModelHost]:
        """Return data and model for a study, loading both at most once.

        Raises:
            RefusedError: The site's policy or its people have not agreed to this study. Nothing is opened then.
        """
        self.site.check_agreed(study)
        with self._opening:  # another study may be opened at the same time
            found = self._open
            if found is None or found[0] != study.digest:
                host = self._host(study)
                found = self._open = (study.digest, self._load(study, host), host)
        return found[1], found[2]

    def _host(self, study: Study) -> ModelHost:
        return open_host(study, self.site.config.resources)

    def _load(self, study: Study, host: ModelHost) -> SiteData:
        site = self.site
        return load_data(site.config, study, host, site.split_key(), distinct=site.distinct_files)

    def _masking(self, study: Study) -> MaskedRounds:
        """Return this site's side of secure aggregation.

        Raises:
            RefusedError: The site file names no identity key, or does not list it among its peers.
        """
        self.site.check_agreed(study)
        if self._masked is None:
            site = self.site.config
            key = site.identity_key()
            if key is None or site.peers.get(self.name) != public_key(key):
                raise RefusedError(
                    f"site {self.name}: the study masks updates, for which the site file must name this site's "
                    "identity key and list the public keys of all sites, this one's included",
                    "make a key with `privet site identity`, and set `identity` and `[peers]` in the site file",
                )
            identity = Identity(self.name, key)
            pins, floor = site.pins(), site.floor.terms()
            self._masked = MaskedRounds(identity, pins, floor, self.site.releases.take, self._state)
        return self._masked

    def cosign(self, shown: Shown) -> Cosigned:
        """Cosign a checkpoint of the round log, if it follows from the last one.

        Raises:
            ProtocolError: This site witnesses no log, or the message is malformed.
            VerificationError: The log is another, or does not go on from where it was: a rollback or a fork.
        """
        if self.site.logbook is None:
            raise ProtocolError(f"site {self.name} witnesses no log")
        return self.site.logbook.cosign(shown)

    def refusal(self, asked: Message, error: RefusedError) -> bytes:
        """Return a signed refusal of what was asked, for the round log; nothing where it belongs to no run of the log.

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
        """Return how the round was opened that a message of secure aggregation belongs to."""
        return self._masked.opened(asked) if self._masked is not None and isinstance(asked, Secured) else None

    def _state(self, opened: RoundOpen, upload: bytes) -> bytes:
        """Return the signed statement of this site's part in a round; nothing where no log is kept."""
        logbook = self.site.logbook_for(opened)
        if logbook is None:
            return b""
        study = Study.parse(dict(opened.study))
        data, _ = self.open(study)
        known = self._checked
        seen = known[1] if known and known[0] is opened else logbook.check(study, opened, self.site.config.pins())
        counts = {"units": len(data.training.units), "validation-units": len(data.validation_units)}
        part = SitePart(
            upload=digest(upload),
            policy=policy_digest(self.site.config),
            ledger=self.site.releases.head(opened.evidence.sequence, opened.evidence.head),
            charge=self.site.releases.charged(study, opened.round, logbook.account),
            values=self.site.committed(counts),
        )
        return logbook.state(seen, opened, part)

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
        random_bytes = self.site.random_bytes(opened.round)
        with host.lock:
            return self._masking(study).open(study, host.spec, opened, data.training.declared, random_bytes)

    def _check_round(self, opened: RoundOpen) -> tuple[Study, SiteData, ModelHost]:
        """Check a round before anything is trained, and return its study with data and model."""
        study = Study.parse(dict(opened.study))
        if self.name not in opened.cohort:
            raise ProtocolError(f"round {opened.round}: site {self.name} is not in its cohort")
        if not 1 <= opened.round <= study.training.rounds:
            raise ProtocolError(f"round {opened.round}: the study has rounds 1 to {study.training.rounds}")
        self.site.check_agreed(study)
        pins, logbook = self.site.config.pins(), self.site.logbook_for(opened)
        if study.secure_aggregation.mode == "masked":
            check_known(opened, pins)
        if logbook is not None:
            self._checked = opened, logbook.check(study, opened, pins)
            # Now, as otherwise the round would be charged and could not be stated.
            self.site.releases.head(opened.evidence.sequence, opened.evidence.head)
        data, host = self.open(study)
        self._received(host, opened)
        return study, data, host

    def answer(self, asked: Secured) -> Secured:
        """Answer one message of secure aggregation.

        Raises:
            ProtocolError: The round is not this site's live one, or the message is out of turn.
            PrivetError: As `update`, and as the protocol's steps raise it.
        """
        if self._masked is None or self._open is None:
            raise ProtocolError(f"round {asked.round}: this site is not in it, or was restarted since")
        with self._open[2].lock:
            return self._masked.answer(asked, self._contribution)

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
        with host.lock:  # held until the answer is on record, so that two requests cannot both train a round
            if (sent := self.site.releases.reserve(study, opened)) is not None:
                return sent
            self.site.seed_dropout(opened.round)
            part = self._step if study.distributed else self._local
            contribution = part(study, host, adapter, data, opened)
            # Policy and approvals may have changed while the site trained: what has not left can still be kept.
            self.site.check_upload(study, contribution.update.nbytes + contribution.metrics.nbytes)
            self.site.releases.charge(study, contribution)
            return contribution

    def _local(
        self, study: Study, host: ModelHost, adapter: Adapter, data: SiteData, opened: RoundOpen
    ) -> Contribution:
        """Return this site's update of a round, with noise of its own where the study is private."""
        mechanism = plan(study)
        # Before training, which replaces the received adapter in the host.
        metrics = self._validate(study, host, adapter, data, opened.round)
        update = train_round(
            host,
            study,
            adapter,
            data.training,
            self._draws(opened.round),
            first_step=(opened.round - 1) * study.training.steps,
            mechanism=mechanism.training if mechanism is not None else None,
            physical_batch=self.site.config.resources.physical_batch,
        )
        if not np.isfinite(update).all():
            raise DivergedError(
                f"site {self.name}: the update of round {opened.round} is not finite",
                "lower the learning rate",
            )
        weight = float(data.training.declared) if study.aggregation.weighting == "declared" else 1.0
        return Contribution(
            self.name, opened.round, opened.nonce, weight, (weight * update).astype(np.float32), metrics
        )

    def _step(self, study: Study, host: ModelHost, adapter: Adapter, data: SiteData, opened: RoundOpen) -> Contribution:
        """Return this site's part in the one step of a round whose sites share the noise."""
        numbers = release_step(
            host,
            study,
            adapter,
            data.training,
            self._draws(opened.round),
            shares=shared_noise(study, len(opened.cohort)),
            physical_batch=self.site.config.resources.physical_batch,
        )
        weight = float(data.training.declared)
        return Contribution(self.name, opened.round, opened.nonce, weight, numbers, np.empty(0, np.float64))

    def _validate(
        self, study: Study, host: ModelHost, adapter: Adapter, data: SiteData, round_number: int
    ) -> NDArray[np.float64]:
        """Return the received adapter's validation sums [3], with noise if private; [0] where nothing is held out."""
        if study.data.validation_fraction == 0:
            return np.empty(0)
        sums, mechanism = validation_sums(host, study, adapter, data), plan(study)
        if mechanism is None or mechanism.validation is None:
            return sums
        noise = self.site.randomness(round_number, "validation-noise")
        return gaussian_release(sums, mechanism.validation.noise_multiplier * SENSITIVITY, noise)

    def _draws(self, round_number: int) -> Draws:
        return Draws(self.site.randomness(round_number, "sampling"), self.site.randomness(round_number, "noise"))


@lru_cache(maxsize=64)
def open_worker(path: Path) -> Worker:
    """Return the process's worker for a site file, built once."""
    return Worker(RealSite(load_site(path)))
