"""Simulated sites: their configuration, and how they differ from real sites.

A simulated site's keys, sampling and noise follow from a public seed. So its rounds are reproducible, and they protect
nobody. It keeps no ledger, has no policy, and agrees to every study. Its worker is the deployed one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Self

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import model_validator

from privet.client.budget.noise_memory import NoiseMemory
from privet.client.budget.releases import Account, charge_of
from privet.client.budget.sealing import Sealer
from privet.client.rounds.logbook import OPENINGS, SALT, Logbook, open_logbook, open_witness
from privet.client.rounds.witness import Witness
from privet.client.site import IdRule, LogSection, SiteConfig, read_site
from privet.common.files import write_whole
from privet.common.log.envelope import SALT_BYTES
from privet.common.log.statements import Charge, LedgerHead
from privet.common.pki.keyfile import public_key, read_key
from privet.common.privacy.noise import Randomness, SeededRandomness, derive_key, derive_seed
from privet.common.secagg.shamir import RandomBytes
from privet.common.secagg.site import RecordedStep
from privet.common.secagg.suites import Kem
from privet.common.study.messages import Contribution, RoundOpen
from privet.common.study.sections import SimulationOnly
from privet.common.study.study import Study
from privet.simulations.kem import SimulatedKem


class SimulatedConfig(SiteConfig):
    """A simulated site's file. A real site refuses it: it does not know these keys, and they are marked."""

    reproducible_seed: Annotated[int, SimulationOnly()]
    """Public seed of keys, sampling and noise. It makes them reproducible, so that they protect nobody."""
    distinct_files: Annotated[bool, SimulationOnly()] = False
    """The files belong to different sites, so equal unit names in two files are two units."""

    @model_validator(mode="after")
    def _rule_has_a_column(self) -> Self:
        return self

    @model_validator(mode="after")
    def _trains_inside(self) -> Self:
        if self.resources.trainer != "inside":
            raise ValueError('resources.trainer: expected "inside", as simulated sites train in one process')
        return self

    def rule_for(self, column: str | None) -> IdRule | None:
        """Return how ids are written. A simulated site takes the column from the study."""
        return None if column is None else self.patient_ids

    def identity_key(self) -> Ed25519PrivateKey:
        """Return the site's private key: the one in its key file, or the one that follows from the seed."""
        if self.identity is not None:
            return read_key(self.identity, "identity")
        return simulated_identity(self.reproducible_seed, self.name)

    def cosigning_key(self, log: LogSection) -> Ed25519PrivateKey:
        """Return the key with which the site cosigns checkpoints, as `identity_key` does."""
        if log.key is not None:
            return read_key(log.key, "log.key")
        return simulated_witness_key(self.reproducible_seed, self.name)


def simulated_identity(seed: int, name: str) -> Ed25519PrivateKey:
    """Return the identity key of a simulated site. It follows from a public seed, so it proves nothing."""
    return Ed25519PrivateKey.from_private_bytes(derive_key(seed, "identity", name))


def simulated_witness_key(seed: int, name: str) -> Ed25519PrivateKey:
    """Return the cosigning key of a simulated site."""
    return Ed25519PrivateKey.from_private_bytes(derive_key(seed, "witness", name))


@lru_cache(maxsize=8)
def _names_beside(folder: Path, changed: int) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in folder.glob("*.toml")))


@lru_cache(maxsize=8)
def simulated_peers(seed: int, names: tuple[str, ...]) -> dict[str, str]:
    """Return the public keys of simulated sites by name. All of them share one table."""
    return {name: public_key(simulated_identity(seed, name)) for name in names}


def load_simulated(path: Path) -> SimulatedConfig:
    """Read a simulated site's configuration.

    If a site file names no peers, its peers are the sites with files in the same directory.

    Raises:
        StudyError: The file is missing, not valid, or of a real site.
    """
    site = read_site(SimulatedConfig, path)
    if site.peers:
        return site
    names = _names_beside(path.parent, path.parent.stat().st_mtime_ns)
    return site.model_copy(update={"peers": simulated_peers(site.reproducible_seed, names)})


class Unmetered:
    """The releases of a simulated site. It keeps no ledger: its seed gives the same bytes again."""

    def __init__(self, config: SimulatedConfig) -> None:
        self._config = config

    def check(self, study: Study) -> None:
        """Admit every study."""

    def reserve(self, study: Study, opened: RoundOpen, names: str = "") -> None:
        """Return None: the round is trained, also if it was trained before."""

    def begin(self, study: Study, round_number: int) -> None:
        """Record nothing."""

    def charge(self, study: Study, contribution: Contribution) -> None:
        """Record nothing."""

    def began(self) -> Mapping[str, datetime]:
        """Return no studies."""
        return {}

    def take(self, entry: RecordedStep) -> None:
        """Record nothing."""

    def head(self, sequence: int, head: str) -> LedgerHead | None:
        """Return None: there is no ledger."""
        return None

    def charged(self, study: Study, round_number: int, account: Account) -> Charge | None:
        """Return the charge of a site that took part in every round so far."""
        return charge_of(self._config, study, round_number, account)


class SimulatedSite:
    """A `privet.client.rounds.site.Site` whose randomness follows from its seed."""

    def __init__(self, config: SimulatedConfig) -> None:
        self.config = config
        self.releases = Unmetered(config)

    @cached_property
    def logbook(self) -> Logbook | None:
        """The site's side of the round log, created when it is first opened; None where its file names none.

        Raises:
            StateError: Policy or keys cannot be read.
        """
        log = self.config.log
        if log is not None and not log.state.exists():
            _create_logbook(self.config, log)
        return open_logbook(self.config, durable=False)

    @cached_property
    def memory(self) -> NoiseMemory:
        """The noise of the site's last steps: beside its side of the log, otherwise in memory.

        Raises:
            StateError: The key of its files cannot be read or made.
        """
        if self.config.log is None:
            return NoiseMemory(None, Sealer(None))
        sealer = Sealer(self.config.log.state / "noise.key")
        if sealer.missing:
            sealer.make()
        return NoiseMemory(self.config.log.state / "noise", sealer)

    @property
    def distinct_files(self) -> bool:
        """Whether equal unit names in two files are two units, because the files belong to different sites."""
        return self.config.distinct_files

    def check_agreed(self, study: Study) -> None:
        """Agree to every study."""

    def check_files(self, study: Study) -> None:
        """Do nothing: a simulated site has no policy."""

    def has_begun(self, study: Study) -> bool:
        """Return True: a run directory may be one of an earlier version."""
        return True

    def check_lost(self, study: Study, opened: RoundOpen) -> None:
        """Agree to every round."""

    def check_upload(self, study: Study, size: int) -> None:
        """Agree to every upload."""

    def logbook_for(self, opened: RoundOpen) -> Logbook | None:
        """Return the log of a round, or None: a simulated site also takes part in rounds outside any log."""
        return self.logbook if opened.evidence else None

    def committed(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Commit to nothing: random salts would make runs differ."""
        return {}

    def split_key(self) -> bytes:
        """Return a key that follows from the seed and the dataset."""
        return derive_key(self.config.reproducible_seed, "validation-split", self.config.dataset or self.config.name)

    def randomness(self, round_number: int, purpose: str) -> Randomness:
        """Return a stream that follows from the public seed."""
        return SeededRandomness(self.config.reproducible_seed, self.config.name, round_number, purpose)

    def random_bytes(self, round_number: int) -> RandomBytes:
        """Return the bytes for a round's keys, shares and rounding. They follow from the seed."""
        stream = SeededRandomness(self.config.reproducible_seed, self.config.name, round_number, "secagg")
        return lambda count: stream.words(-(-count // 8)).tobytes()[:count]

    @cached_property
    def kem(self) -> Kem:
        """Ciphertexts that follow from the seed, as all of a simulated site's keys do."""
        return SimulatedKem(derive_key(self.config.reproducible_seed, "encapsulation", self.config.name))

    def seed_dropout(self, round_number: int) -> None:
        """Seed PyTorch's generator. Dropout draws from it."""
        torch.manual_seed(derive_seed(self.config.reproducible_seed, self.config.name, round_number, "dropout"))


def _create_logbook(config: SimulatedConfig, log: LogSection) -> None:
    """Create the files that `create_witness` creates for a real site, without waiting for the disk."""
    witness = open_witness(config, log, durable=False)
    Witness.create(witness.directory, witness.log, witness.name, witness.key, durable=False)
    (log.state / OPENINGS).mkdir(mode=0o700)
    write_whole(log.state / SALT, os.urandom(SALT_BYTES))
