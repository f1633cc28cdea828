"""The learning-rate schedule: bounds and shape for all settings, and a few values worked by hand."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privet.common.errors import StudyError
from privet.common.privacy.schedule import rate_factor
from privet.common.study.sections import Schedule

SCHEDULES = st.builds(
    Schedule,
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 1, exclude_max=True),
    floor=st.floats(0, 1),
)


@given(SCHEDULES, st.integers(1, 200))
def test_every_step_moves_and_none_exceeds_the_rate(schedule: Schedule, total: int) -> None:
    factors = [rate_factor(schedule, step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == pytest.approx(1)


@given(SCHEDULES, st.integers(1, 200))
def test_it_rises_once_and_then_never_rises_again(schedule: Schedule, total: int) -> None:
    factors = [rate_factor(schedule, step, total) for step in range(total)]
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(factors[peak:], factors[peak + 1 :], strict=False))
    assert peak == min(round(schedule.warmup * total), total - 1)


@given(SCHEDULES, st.integers(1, 200))
def test_after_the_warm_up_it_stays_above_the_floor(schedule: Schedule, total: int) -> None:
    warm = round(schedule.warmup * total)
    assert all(rate_factor(schedule, step, total) >= schedule.floor - 1e-12 for step in range(warm, total))


@given(st.sampled_from(["linear", "cosine"]), st.floats(0, 0.9))
def test_a_long_study_ends_at_the_floor(shape: Literal["linear", "cosine"], floor: float) -> None:
    schedule = Schedule(shape=shape, floor=floor)
    assert rate_factor(schedule, 99_999, 100_000) == pytest.approx(floor, abs=2e-5)


def test_values_worked_by_hand() -> None:
    linear = Schedule(shape="linear", floor=0.2)
    assert [rate_factor(linear, step, 4) for step in range(4)] == pytest.approx([1, 0.8, 0.6, 0.4])
    cosine = Schedule(shape="cosine")
    assert [rate_factor(cosine, step, 3) for step in range(3)] == pytest.approx([1, 0.75, 0.25])
    warm = Schedule(warmup=0.3)
    assert [rate_factor(warm, step, 10) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_a_single_round_runs_at_full_rate() -> None:
    assert rate_factor(Schedule(shape="linear", warmup=0.9), 0, 1) == 1


@pytest.mark.parametrize(("step", "total"), [(-1, 5), (5, 5), (0, 0)])
def test_a_step_outside_the_study_is_refused(step: int, total: int) -> None:
    with pytest.raises(StudyError, match="got"):
        rate_factor(Schedule(), step, total)
