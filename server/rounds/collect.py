"""One round's collection in the clear: ask a cohort, check every contribution, return only the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privet.common.errors import ProtocolError
from privet.common.study.messages import Contribution, Failure, Message, RoundOpen
from privet.server.exchange import Exchange
from privet.server.rounds.participants import Participant, RoundSum, too_few

_LATE = "check that the site is running and online, or allow more time for a round"
_VERSION = "run the same version of privet at the site and at the coordinator"
# A validation sum is at most a count of units. Without a bound, one site could make the sum of all sites overflow.
_LARGEST_METRIC = 2.0**53


@dataclass(frozen=True)
class Shape:
    """What a round's contributions must have.

    Attributes:
        update: Number of values of an update.
        metrics: Number of validation sums.
        weight: The weight of a site by its declared count.
        own: Which values [d] a site trains, by its name; None: all.
    """

    update: int
    metrics: int
    weight: Callable[[int], float]
    own: Callable[[str], NDArray[np.bool_] | None] = lambda site: None


def collect(
    exchange: Exchange,
    cohort: Mapping[str, Participant],
    opened: RoundOpen,
    shape: Shape,
    *,
    min_sites: int,
    timeout: float,
) -> RoundSum:
    """Run one round's exchange in the clear and sum what arrives, in the order of site names.

    Raises:
        TooFewSitesError: Fewer than `min_sites` valid contributions arrived.
        DivergedError: No site delivered, because training diverged at every one.
    """
    replies = dict(exchange.ask({member.node: opened for member in cohort.values()}, timeout=timeout))
    weight, update, metrics = 0.0, np.zeros(shape.update), np.zeros(shape.metrics)
    survivors: list[str] = []
    # In the order of names, not of arrival: sums of floating-point numbers depend on the order, and a run must be
    # reproducible.
    failures: dict[str, Failure] = {}
    for site, member in sorted(cohort.items()):
        reply = replies.get(member.node)
        try:
            contribution = check_contribution(reply, site, member, opened, shape)
        except ProtocolError as error:
            failures[site] = (
                reply if isinstance(reply, Failure) else Failure("ProtocolError", error.message, error.hint)
            )
            continue
        weight += contribution.weight
        update += contribution.update
        metrics += contribution.metrics
        survivors.append(site)
    if len(survivors) < min_sites:
        raise too_few(opened, survivors, failures, min_sites)
    return RoundSum(weight, update, metrics, tuple(survivors), failures)


def check_contribution(
    reply: Message | None, site: str, member: Participant, opened: RoundOpen, shape: Shape
) -> Contribution:
    """Return the reply if it is this site's contribution to this round, of the right shape and finite.

    Raises:
        ProtocolError: It is not.
    """
    if reply is None:
        raise ProtocolError("the site did not answer before the deadline of the round", _LATE)
    if isinstance(reply, Failure):
        raise ProtocolError(f"{reply.error}: {reply.message}")
    if not isinstance(reply, Contribution):
        raise ProtocolError(
            f"the site must answer a round with a contribution (its update), found a message of type {reply.kind}",
            _VERSION,
        )
    # Site and nonce: an answer from another site or an earlier round must not be counted. Weight: a site that weighs
    # itself higher than it declared would move the mean further.
    expected: dict[str, Any] = {
        "site": site,
        "round": opened.round,
        "nonce": opened.nonce,
        "weight": shape.weight(member.consent.weight),
    }
    for name, value in expected.items():
        if getattr(reply, name) != value:
            raise ProtocolError(
                f"the site's contribution has another value in its field {name} than the coordinator's request for "
                "this round",
                _VERSION,
            )
    for name, size in (("update", shape.update), ("metrics", shape.metrics)):
        array = getattr(reply, name)
        if array.shape != (size,):
            raise ProtocolError(
                f"the site's contribution must have {size} values in its field {name}, found {array.size}", _VERSION
            )
        if not np.isfinite(array).all():
            raise ProtocolError(
                f"the site's contribution has values in its field {name} that are infinite or not a number",
                "lower training.learning_rate in the study file",
            )
    own = shape.own(site)
    if own is not None and reply.update[~own].any():
        # They would count in a mean that is not divided by this site's weight.
        raise ProtocolError(
            "the site's contribution has values in columns beyond the rank that lora.site_ranks gives it", _VERSION
        )
    if np.abs(reply.metrics).max(initial=0.0) > _LARGEST_METRIC:
        raise ProtocolError(
            "the site's contribution has a validation sum above 2^53, more than any number of records gives",
            _VERSION,
        )
    return reply
