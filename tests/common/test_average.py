"""The average of adapters: of products, exact where A is fixed or turned, and of the rounds that the study says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from privet.common.errors import StudyError
from privet.common.study.adapter import Adapter
from privet.common.study.average import counts, extended
from privet.common.study.study import Study
from privet.server.rounds.aggregate import refactor
from tests.support.synthetic import HEAD, SPEC, A, B, product, start_adapter, study_of


def averaging(kind: str, method: str = "ffa", **training: Any) -> Study:
    return study_of(aggregation={"average": kind, "method": method}, training=training)


def moved(adapter: Adapter, seed: int) -> Adapter:
    """Return an adapter with other B and head."""
    rng = np.random.default_rng(seed)
    return adapter.replace(
        {name: rng.standard_normal(adapter.values[name].shape).astype(np.float32) for name in (B, HEAD)}
    )


@pytest.mark.parametrize(("kind", "weights"), [("tail", [1, 1, 1]), ("exponential", [0.81, 0.9, 1])])
@pytest.mark.parametrize("method", ["ffa", "fedsvd"])
def test_it_is_the_average_of_the_products(kind: str, weights: list[float], method: str) -> None:
    study, mean, adapters = averaging(kind, method), None, []
    adapter = start_adapter()
    for seed in range(3):
        adapter = moved(adapter, seed)
        if method == "fedsvd":
            adapter, _ = refactor(adapter)
        adapters.append(adapter)
        mean = extended(study, mean, adapter)
    assert mean is not None
    found = mean.adapter(SPEC)
    expected = np.average([product(each) for each in adapters], axis=0, weights=weights)
    assert product(found) == pytest.approx(expected, abs=1e-6)
    heads = [each.values[HEAD] for each in adapters]
    assert found.values[HEAD] == pytest.approx(np.average(heads, axis=0, weights=weights), abs=1e-6)
    assert np.array_equal(found.values[A], adapter.values[A])


def test_one_adapter_is_its_own_average() -> None:
    adapter = moved(start_adapter(), 1)
    assert extended(averaging("tail"), None, adapter).adapter(SPEC).digest == adapter.digest


def test_a_tail_is_the_second_half_of_the_rounds_that_train() -> None:
    study = averaging("tail", rounds=5)
    assert [counts(study, number) for number in range(1, 6)] == [False, False, True, True, True]
    started = averaging("tail", rounds=4, head_start="class-means")
    assert [counts(started, number) for number in range(1, 6)] == [False, False, False, True, True]
    every = averaging("exponential", rounds=2, head_start="class-means")
    assert [counts(every, number) for number in range(1, 4)] == [False, True, True]
    assert not any(counts(study_of(), number) for number in range(1, 5))


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"aggregation": {"average": "tail", "method": "fedavg"}}, "not the average of B·A"),
        (
            {
                "aggregation": {"average": "tail"},
                "training": {"patience": 1},
                "data": {"validation_fraction": 0.2},
            },
            "publishes the best adapter",
        ),
        ({"aggregation": {"average": "tail"}, "training": {"rounds": 0, "head_start": "class-means"}}, "nothing to"),
    ],
)
def test_what_has_no_average_is_refused(sections: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        study_of(**sections)


def test_a_study_without_an_average_is_the_study_that_it_was() -> None:
    assert study_of(aggregation={"average": "none"}).digest == study_of().digest
