"""Names of the compared runs in the result of an attack, and the texts that people read for them."""

from __future__ import annotations

BASELINE = "no privacy"
"""Name of the baseline without protection in a result file."""


def label(arm: str) -> str:
    """Return the text for a run that is trained with privacy, as its name says, or for the baseline."""
    return "baseline without protection" if arm == BASELINE else f"run with privacy, {arm}"
