"""The learning-rate schedule of a study: one pure function, for sites and for the server."""

from __future__ import annotations

import math

from privet.common.errors import StudyError
from privet.common.study.sections import Schedule


def rate_factor(schedule: Schedule, step: int, total: int) -> float:
    """Return the factor of the learning rate in `step`; it is above 0 and at most 1.

    The first `w = round(warmup * total)` steps rise linearly, (step + 1) / (w + 1): the first step already has a
    rate above 0, and step `w` is the first one at the full rate. From there `constant` stays at 1. `linear` and
    `cosine` (Loshchilov and Hutter 2017, without restarts) fall towards `floor` and would reach it after the
    last step. No step has rate 0, since every step costs privacy.

    Args:
        schedule: From `study.training` (steps are a site's optimizer steps, `study.total_steps` in all) or
            from `study.aggregation` (steps are rounds).
        step: From 0 to total - 1.
        total: Number of steps in the whole study.

    Raises:
        StudyError: `step` is not in 0..total-1.
    """
    if not 0 <= step < total:
        raise StudyError(
            f"the learning-rate schedule has steps 0 to {total - 1}, got step {step}", "report this as a bug"
        )
    warm = min(round(schedule.warmup * total), total - 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    if schedule.shape == "constant":
        return 1.0
    fallen = (step - warm) / (total - warm)
    left = 1 - fallen if schedule.shape == "linear" else (1 + math.cos(math.pi * fallen)) / 2
    return schedule.floor + (1 - schedule.floor) * left
