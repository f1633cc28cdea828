"""What a worker relies on and does not decide itself: what its site agreed to, has spent, witnesses, and draws from.

`RealSite` is the one that hospitals and enterprises run. Simulated sites differ in these points and in no others
(`privet.simulations.sites`): the worker has no branch for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

from privet.client.budget.releases import Releases, Spending
from privet.client.policy.consent import check_policy
from privet.client.rounds.loading import check_delta
from privet.client.rounds.logbook import Logbook, open_logbook
from privet.client.site import SiteConfig
from privet.common.errors import RefusedError
from privet.common.privacy.noise import Randomness, SecretRandomness, derive_key
from privet.common.secagg.shamir import RandomBytes
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study


class Site(Protocol):
    """A site as its worker sees it."""

    @property
    def config(self) -> SiteConfig:
        """The site file."""

    @property
    def releases(self) -> Spending:
        """What was released, and at what cost. Raises as `Releases`."""

    @property
    def logbook(self) -> Logbook | None:
        """The site's side of the round log. Raises as `open_logbook`."""

    @property
    def distinct_files(self) -> bool:
        """Whether equal names of units in two files are two units."""

    def check_agreed(self, study: Study) -> None:
        """Check that the site agrees to a study, before anything of it is opened."""

    def check_upload(self, study: Study, size: int) -> None:
        """Check that the site still agrees, now that `size` bytes are about to leave."""

    def logbook_for(self, opened: RoundOpen) -> Logbook | None:
        """Return the log in which a round must be."""

    def committed(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the counts to which the site commits in its statement of a round."""

    def split_key(self) -> bytes:
        """Return the key by which units are held out for validation, in all studies alike."""

    def randomness(self, round_number: int, purpose: str) -> Randomness:
        """Return the source of a round's sampling or noise."""

    def random_bytes(self, round_number: int) -> RandomBytes:
        """Return the source of a round's keys, shares and rounding."""

    def seed_dropout(self, round_number: int) -> None:
        """Prepare PyTorch's generator, from which dropout draws, for a round."""


class RealSite:
    """A site with a policy, a ledger, a round log, and randomness from the operating system."""

    distinct_files = False

    def __init__(self, config: SiteConfig) -> None:
        self.config = config

    @cached_property
    def releases(self) -> Releases:
        """What this site has released, by its ledger. Raises as `Releases`."""
        return Releases(self.config)

    @cached_property
    def logbook(self) -> Logbook | None:
        """This site's side of the round log; None where the site file names none.

        Raises:
            StateError: Its policy or keys cannot be read.
        """
        return open_logbook(self.config)

    def check_agreed(self, study: Study) -> None:
        """Check that policy, people and budget admit a study.

        Raises:
            RefusedError: They do not, or the site file names no round log.
            StudyError, StateError, VerificationError: Policy, approvals or ledger cannot be read or trusted.
        """
        if self.config.log is None:
            raise RefusedError(
                f"site {self.config.name} names no round log, without which it takes part in nothing",
                "set `[log]` in the site file, then run `privet site init` once",
            )
        # The ledger is asked for only where the policy looks at it, so that a policy's refusal needs no ledger.
        check_policy(self.config, study, lambda: self.releases.began())
        if self.config.declared_count is not None:
            check_delta(study, self.config.declared_count)
        self.releases.check(study)

    def check_upload(self, study: Study, size: int) -> None:
        """Check the policy again before `size` bytes leave. Raises as `check_policy`."""
        check_policy(self.config, study, self.releases.began, size)

    def logbook_for(self, opened: RoundOpen) -> Logbook | None:
        """Return the site's log: no round is played outside it."""
        return self.logbook

    def committed(self, counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the counts as they are."""
        return counts

    def split_key(self) -> bytes:
        """Return a key that follows from the dataset: the ledger counts on it for every study."""
        return derive_key(0, "validation-split", self.config.dataset or self.config.name)

    def randomness(self, round_number: int, purpose: str) -> Randomness:
        """Return a stream that nobody can compute."""
        return SecretRandomness()

    def random_bytes(self, round_number: int) -> RandomBytes:
        """Return the operating system's source."""
        return os.urandom

    def seed_dropout(self, round_number: int) -> None:
        """Do nothing: PyTorch's generator is seeded by the operating system."""
