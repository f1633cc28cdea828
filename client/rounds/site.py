"""The site behind a worker: its policy, its releases, its round log and its randomness.

Hospitals and enterprises run `RealSite`. A simulated site differs from it in these methods and in nothing else
(`privet.simulations.sites`), so the worker has no branch for simulations.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

from privet.client.budget.noise_memory import NoiseMemory, open_memory
from privet.client.budget.releases import Bookkeeping, Releases
from privet.client.budget.withdrawals import check_left
from privet.client.policy.consent import check_lost, check_policy
from privet.client.policy.scanned import check_scan
from privet.client.rounds.history import Fetch
from privet.client.rounds.logbook import Logbook, open_logbook
from privet.client.site import SiteConfig
from privet.client.training.loading import check_delta
from privet.common.errors import RefusedError
from privet.common.privacy.noise import Randomness, SecretRandomness, derive_key
from privet.common.secagg.shamir import RandomBytes
from privet.common.secagg.suites import MLKEM, Kem
from privet.common.study.messages import RoundOpen
from privet.common.study.sections import simulation_fields
from privet.common.study.study import Study


class Site(Protocol):
    """A site as its worker sees it."""

    @property
    def config(self) -> SiteConfig:
        """The site file."""

    @property
    def releases(self) -> Bookkeeping:
        """The site's releases and their cost. Raises as `Releases`."""

    @property
    def logbook(self) -> Logbook | None:
        """The site's side of the round log. Raises as `open_logbook`."""

    @property
    def memory(self) -> NoiseMemory:
        """The noise of the site's last steps, in studies with correlated noise. Raises as `open_memory`."""

    @property
    def distinct_files(self) -> bool:
        """Whether equal names of units in two files are two units."""

    def check_agreed(self, study: Study) -> None:
        """Check that the site agrees to a study, before any of its files is opened."""

    def check_files(self, study: Study) -> None:
        """Check that the site trains on its files as they are now, before it loads them."""

    def has_begun(self, study: Study) -> bool:
        """Return whether this site has trained for a study, perhaps with an earlier version."""

    def check_lost(self, study: Study, opened: RoundOpen) -> None:
        """Check that the site pays for another round, after rounds that led to nothing."""

    def check_upload(self, study: Study, size: int) -> None:
        """Check that the site still agrees, before `size` bytes leave."""

    def logbook_for(self, opened: RoundOpen) -> Logbook | None:
        """Return the log that must hold a round."""

    def committed(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the counts that the site commits to in its statement of a round."""

    def split_key(self) -> bytes:
        """Return the key that decides which units are held out for validation. It is the same in all studies."""

    def randomness(self, round_number: int, purpose: str) -> Randomness:
        """Return the source of a round's sampling or noise."""

    def random_bytes(self, round_number: int) -> RandomBytes:
        """Return the source of a round's keys, shares and rounding."""

    @property
    def kem(self) -> Kem:
        """Encapsulates secrets for other sites, in rounds of secure aggregation."""

    def seed_dropout(self, round_number: int) -> None:
        """Prepare PyTorch's generator for a round. Dropout draws from it."""


class RealSite:
    """A site with a policy, a ledger, a round log, and randomness from the operating system."""

    distinct_files = False
    kem = MLKEM

    def __init__(self, config: SiteConfig, fetch: Fetch | None = None) -> None:
        self.config = config
        self._fetch = fetch

    @cached_property
    def releases(self) -> Releases:
        """This site's releases, as its ledger records them. Raises as `Releases`."""
        return Releases(self.config)

    @cached_property
    def logbook(self) -> Logbook | None:
        """This site's side of the round log; None where the site file names none.

        Raises:
            StateError: Its policy or keys cannot be read.
            VerificationError: The site's operator has confirmed no charter.
        """
        return open_logbook(self.config, fetch=self._fetch)

    @cached_property
    def memory(self) -> NoiseMemory:
        """The noise of this site's last steps, beside its ledger. Raises as `open_memory`."""
        return open_memory(self.config)

    def check_agreed(self, study: Study) -> None:
        """Check that the policy, the approvals and the budget admit a study.

        Raises:
            RefusedError: They do not, or the site file names no round log, or it is one of a simulated site.
            StudyError, StateError, VerificationError: Policy, approvals or ledger cannot be read or trusted.
        """
        fields = simulation_fields(self.config)
        if fields:
            raise RefusedError(
                f"the site file of {self.config.name} sets {', '.join(fields)}: expected none of the fields that are "
                "for simulations alone",
                "remove these keys from the site file",
            )
        if self.config.log is None:
            raise RefusedError(
                f"the site file of {self.config.name} names no round log; without one, a site takes part in no study",
                "run `privet site setup SITE`, which adds the `[log]` table",
            )
        check_left(self.config)
        # The policy comes first and opens the ledger only when it needs it: a refusal by policy needs no ledger.
        check_policy(self.config, study, lambda: self.releases.began())
        if study.model.is_path and not self.has_begun(study):
            raise RefusedError(
                f"model.base: the study names the base by a path of another machine, {study.model.base!r}",
                "the coordinator must give the base a name, which `privet base DIRECTORY` prints; each site maps it to "
                "a directory under [resources.bases] in its site file",
            )
        if self.config.declared_count is not None:
            check_delta(study, self.config.declared_count)
        self.releases.check(study)
        check_scan(self.config, study, files=False)

    def check_files(self, study: Study) -> None:
        """Check that the kept scan, where the policy asks for one, is of these very files. Raises as `check_scan`."""
        check_scan(self.config, study, files=True)

    def has_begun(self, study: Study) -> bool:
        """Return whether the site's ledger holds a round of a study. Raises as `Releases`."""
        return study.private and study.digest in self.releases.began()

    def check_lost(self, study: Study, opened: RoundOpen) -> None:
        """Check how many rounds in a row led to nothing. Raises as `privet.client.policy.consent.check_lost`."""
        if study.private:
            most = max(len(opened.cohort), len(self.config.pins()))
            check_lost(self.config, study, self.releases.lost(study, opened, most))

    def check_upload(self, study: Study, size: int) -> None:
        """Check the policy again before `size` bytes leave. Raises as `check_policy`."""
        check_policy(self.config, study, self.releases.began, size)

    def logbook_for(self, opened: RoundOpen) -> Logbook | None:
        """Return the site's log: a real site takes part in no round outside it."""
        return self.logbook

    def committed(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the counts unchanged."""
        return counts

    def split_key(self) -> bytes:
        """Return a key that follows from the dataset's name alone."""
        # The ledger relies on it: a unit with one hash in all studies pays for training or for validation, never both.
        return derive_key(0, "validation-split", self.config.dataset or self.config.name)

    def randomness(self, round_number: int, purpose: str) -> Randomness:
        """Return a secret stream, from the operating system."""
        return SecretRandomness()

    def random_bytes(self, round_number: int) -> RandomBytes:
        """Return the operating system's source."""
        return os.urandom

    def seed_dropout(self, round_number: int) -> None:
        """Do nothing: PyTorch's generator is seeded by the operating system."""
