"""Figures as text."""

from __future__ import annotations

import math
from collections.abc import Mapping

_MOST = 1_000_000
"""Perplexities above this say nothing but that a model is broken."""


def as_text(primary: str, value: float | None) -> str:
    """Return a metric as text: fractions in percent, perplexity as a plain number."""
    if value is None:
        return "-"
    if primary != "perplexity":
        return f"{100 * value:.1f} %"
    if math.isnan(value):
        return "not a number"
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < _MOST else f"over {_MOST:,}"


def extremes(values: Mapping[str, float], metric: str, kind: str) -> str:
    """Return the best and the worst of a metric by name, and the gap between them, in words.

    Args:
        values: The metric by name; two names or more.
        metric: The metric.
        kind: What the names are of, such as `site`.
    """
    ordered = sorted(values, key=lambda name: values[name], reverse=metric != "perplexity")
    best, worst = ordered[0], ordered[-1]
    low, high = as_text(metric, values[worst]), as_text(metric, values[best])
    if low == high:
        return f"every {kind} {high}"
    gap = abs(values[best] - values[worst])
    size = f"{gap:.2f}" if metric == "perplexity" else f"{100 * gap:.1f} points"
    return f"worst {worst} ({low}), best {best} ({high}), gap {size}"
