"""The average of the adapters after a study's rounds, which a run may publish at its end instead of the last one.

It is computed from what was released, so it costs no privacy. Noise in the last steps moves the last adapter about; the
average of several has less of it (Polyak and Juditsky 1992; of private training, De et al. 2022, arXiv:2204.13650).

What a layer adds is B·A, so products are averaged. Where A stays fixed (`ffa`), that is the average of B.
Where rounds refactor (`fedsvd`), every A has orthonormal rows that span the same space: B·A = (B·A·A_new^T)·A_new, so
earlier B are first turned into the newest basis, exactly. Where A is trained, the average of products has a larger rank
than an adapter can hold; such studies are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privet.common.study.adapter import Adapter, AdapterSpec
from privet.common.study.study import Study

AVERAGED = "averaged/"
"""Directory of the adapters in an average, in a run and in a bundle."""

# An exponential average counts each round so much less than the next one.
_KEEP = 0.9


@dataclass(frozen=True)
class Mean:
    """An average so far.

    Attributes:
        weight: Sum of the weights of the adapters in it; that of the newest is 1.
        values: Float64 values of every tensor; A is the newest one.
    """

    weight: float
    values: Mapping[str, NDArray[np.float64]]

    def adapter(self, spec: AdapterSpec) -> Adapter:
        """Return the average, rounded once to float32."""
        return Adapter(spec, {name: np.ascontiguousarray(value, np.float32) for name, value in self.values.items()})


def averaged_name(number: int) -> str:
    """Return the name of the file with the adapter after a round."""
    return f"{AVERAGED}{number:04d}.safetensors"


def counts(study: Study, number: int) -> bool:
    """Return whether the adapter after round `number` is part of the average that the study publishes.

    Of a tail average, that is the second half of the rounds that train.
    """
    done = study.trained_before(number) + 1
    if study.aggregation.average == "none" or done < 1:
        return False
    return study.aggregation.average == "exponential" or 2 * done > study.training.rounds


def extended(study: Study, mean: Mean | None, adapter: Adapter) -> Mean:
    """Return an average with one more adapter, the newest."""
    newest = {name: value.astype(np.float64) for name, value in adapter.values.items()}
    if mean is None:
        return Mean(1.0, newest)
    before = dict(mean.values)
    for a, b in adapter.spec.pairs():
        if not np.array_equal(before[a], newest[a]):
            before[b] = before[b] @ (before[a] @ newest[a].T)
        before[a] = newest[a]
    weight = 1 + mean.weight * (_KEEP if study.aggregation.average == "exponential" else 1)
    return Mean(weight, {name: value + (newest[name] - value) / weight for name, value in before.items()})
