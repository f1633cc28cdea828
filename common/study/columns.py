"""Sites of unequal rank: which values of an update a site trains, and the weight of the sites that train each value.

All sites have one A, which stays fixed, so column j of B belongs to row j of A at every site. A site of rank r trains
columns 0 to r - 1 of each B, and everything that is trained in full. The rest of its update is zero. The mean of
a value is the weighted sum over sites, divided by the weight of those that train it: the exact mean over these sites.
Ranks are in the study and weights in the consents, so everybody can compute the divisors, and nothing else about a site
is shown.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from privet.common.study.adapter import AdapterSpec
from privet.common.study.study import Study


def own_values(study: Study, spec: AdapterSpec, site: str) -> NDArray[np.bool_] | None:
    """Return which values [d] of an update a site trains; None if it trains all of them."""
    if study.lora.site_ranks.get(site, study.lora.ranks[1]) >= study.lora.ranks[1]:
        return None
    return _columns_below(study, spec, study.lora.site_ranks[site])


def weights_by_value(study: Study, spec: AdapterSpec, weights: Mapping[str, float]) -> NDArray[np.float64] | None:
    """Return the sum of the weights of the sites that train each value, [d]; None in a study without unequal ranks.

    Args:
        study: The study.
        spec: Layout of the adapter.
        weights: The weight of each site in the sum, by name.
    """
    if not study.lora.site_ranks:
        return None
    by_rank: dict[int, float] = {}
    for site, weight in weights.items():
        rank = study.rank_at(site)
        by_rank[rank] = by_rank.get(rank, 0.0) + weight
    parts = [weight * _columns_below(study, spec, rank) for rank, weight in sorted(by_rank.items())]
    found: NDArray[np.float64] = np.sum(parts, axis=0)
    return found


def _columns_below(study: Study, spec: AdapterSpec, rank: int) -> NDArray[np.bool_]:
    parts = []
    for tensor in study.trained(spec):
        part = np.ones(tensor.shape, np.bool_)
        if tensor.role == "lora_B":
            part[:, rank:] = False
        parts.append(part.ravel())
    return np.concatenate(parts)
