"""Sites that share the noise of a step, without a model: a gradient towards an optimum, and whole integers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from privet.common.masking.noise_shares import shared_noise
from privet.common.privacy.noise import SecretRandomness, cut
from privet.common.privacy.shared_noise import Integers, contribute
from privet.common.study.adapter import Adapter
from privet.common.study.messages import Contribution, RoundOpen
from privet.common.study.study import Study
from privet.server.rounds.state import RunState
from tests.support.masked_world import MaskedSite, Relay
from tests.support.secagg_world import identity, pins
from tests.support.synthetic import SPEC, flat, optima, start_adapter, towards

Array = NDArray[np.float64]


@dataclass
class SharingSite(MaskedSite):
    """A site that sends its gradient towards its optimum with a share of the noise; `silent` leaves the noise out."""

    silent: bool = False
    sent: dict[int, Integers] = field(default_factory=dict)
    gradients: dict[int, Array] = field(default_factory=dict)

    def contribute(self, opened: RoundOpen) -> Contribution:
        study = Study.parse(dict(opened.study))
        gradient = gradient_of(self, opened)
        contribution = shared(self, opened)
        if self.silent:
            numbers = np.rint(gradient / shared_noise(study, len(opened.cohort)).level).astype(np.int64)
            contribution = replace(contribution, update=numbers)
        self.trained.append(opened.round)
        self.sent[opened.round], self.gradients[opened.round] = contribution.update.astype(np.int64), gradient
        return contribution


def gradient_of(site: MaskedSite, opened: RoundOpen) -> Array:
    return -site.learn(Study.parse(dict(opened.study)), Adapter.read(SPEC, opened.adapter))


def shared(site: MaskedSite, opened: RoundOpen) -> Contribution:
    """Return a site's gradient with its share of the noise."""
    shares = shared_noise(Study.parse(dict(opened.study)), len(opened.cohort))
    numbers = contribute(cut(gradient_of(site, opened), shares.lattice), shares, SecretRandomness())
    return Contribution(site.name, opened.round, opened.nonce, float(site.weight), numbers, np.empty(0))


def sharing(study: Study, count: int, silent: int = 0) -> Relay:
    """Return `count` sites with weights 10 to 60, the last `silent` of which add no noise."""
    known = pins(count)
    sites = [
        SharingSite(
            identity(i).name,
            towards(optimum, 0.2),
            10 * (i % 6 + 1),
            number=i,
            pins=known,
            silent=i >= count - silent,
        )
        for i, optimum in enumerate(optima(study, count))
    ]
    return Relay(dict(enumerate(sites, start=2)))


def sites_of(exchange: Relay) -> list[SharingSite]:
    return [site for site in exchange.sites.values() if isinstance(site, SharingSite)]


def moved(study: Study, state: RunState) -> Array:
    return flat(study, state.adapter) - flat(study, start_adapter())
