"""The sites that take part in a round, and the sum that the coordinator gets from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import DivergedError, PrivetError, SpentRoundError, TooFewSitesError
from privet.common.study.messages import Consent, Failure, RoundOpen


@dataclass(frozen=True)
class Participant:
    """A site that consented, and its address."""

    node: int
    consent: Consent


@dataclass(frozen=True)
class RoundSum:
    """The result of a round's collection.

    Attributes:
        weight: Sum of the survivors' weights.
        update: Sum of w times update, float64 [d].
        metrics: Sum of the validation sums, float64 [k].
        survivors: Sites in the sum, in name order.
        failures: Why each other site of the cohort is not in the sum.
        groups: Under secure aggregation, the sites and the parameters of each group's sum.
        spoiled: The sites of each group whose sum could not be used.
        weights: Where sites have unequal ranks, the weight of those that train each value, [d]; None: `weight`.
    """

    weight: float
    update: NDArray[np.float64]
    metrics: NDArray[np.float64]
    survivors: tuple[str, ...]
    failures: Mapping[str, Failure]
    groups: tuple[Mapping[str, Any], ...] = ()
    spoiled: tuple[frozenset[str], ...] = ()
    weights: NDArray[np.float64] | None = None

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean update, [d]: of each value over the sites that train it, and 0 where no site does."""
        if self.weights is None:
            return self.update / self.weight
        return np.divide(self.update, self.weights, out=np.zeros_like(self.update), where=self.weights > 0)


def too_few(
    opened: RoundOpen, survivors: Sequence[str], failures: Mapping[str, Failure], min_sites: int
) -> PrivetError:
    """Return the error of a round with too few survivors, with the reason of each site that is missing."""
    # If training diverged at every site, the reader has to change the study, not to wait for more sites.
    diverged = not survivors and {failure.error for failure in failures.values()} == {DivergedError.__name__}
    error = (DivergedError if diverged else TooFewSitesError)(
        f"round {opened.round}: {len(survivors)} of {len(opened.cohort)} sites delivered, "
        f"the study demands {min_sites}" + "".join(f"\n  {site}: {failure}" for site, failure in failures.items()),
        next((failure.hint for failure in failures.values() if failure.hint), ""),
    )
    if isinstance(error, TooFewSitesError):
        spent = sum(failure.error == SpentRoundError.__name__ for failure in failures.values())
        error.final = len(opened.cohort) - spent < min_sites
    return error
