"""The sites that take part in a round, and what they give the coordinator together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import DivergedError, PrivetError, TooFewSitesError
from privet.common.study.messages import Consent, Failure, RoundOpen


@dataclass(frozen=True)
class Participant:
    """A consenting site and the address it answers at."""

    node: int
    consent: Consent


@dataclass(frozen=True)
class RoundSum:
    """What a round gives the coordinator.

    Attributes:
        weight: Sum of the survivors' weights.
        update: Sum of w times update, float64 [d].
        metrics: Sum of the validation sums, float64 [k].
        survivors: Sites in the sum, in name order.
        failures: Sites of the cohort that are not, and why.
        groups: Under secure aggregation, what each sum was taken over and by which parameters.
    """

    weight: float
    update: NDArray[np.float64]
    metrics: NDArray[np.float64]
    survivors: tuple[str, ...]
    failures: Mapping[str, Failure]
    groups: tuple[Mapping[str, Any], ...] = ()


def too_few(
    opened: RoundOpen, survivors: Sequence[str], failures: Mapping[str, Failure], min_sites: int
) -> PrivetError:
    """Return the error of a round with too few survivors: what kept each of the others away."""
    # Where nothing but divergence kept every site away, that is what the reader should be told.
    diverged = not survivors and {failure.error for failure in failures.values()} == {DivergedError.__name__}
    return (DivergedError if diverged else TooFewSitesError)(
        f"round {opened.round}: {len(survivors)} of {len(opened.cohort)} sites delivered, "
        f"the study demands {min_sites}" + "".join(f"\n  {site}: {failure}" for site, failure in failures.items()),
        next((failure.hint for failure in failures.values() if failure.hint), ""),
    )
