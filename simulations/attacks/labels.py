"""Names of the compared runs in the result of an attack, and the texts that people read for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BASELINE = "no privacy"
"""Name of the baseline without protection in a result file."""


def label(arm: str) -> str:
    """Return the text for a run that is trained with privacy, as its name says, or for the baseline."""
    return "baseline without protection" if arm == BASELINE else f"run with privacy, {arm}"


def attack_sentence(found: Mapping[str, Any]) -> str:
    """Return the result of an attack in one sentence: its success on each arm, beside that on the baseline."""
    return _SENTENCES[str(found["attack"])](found["arms"])


def _membership(arms: Any) -> str:
    told = [f"{max(arm['loss']['auc'], arm['lira']['auc']):.2f} on the {_target(arm)}" for arm in arms]
    return f"The better attack has an area under the curve of {', '.join(told)} (0.5 is guessing, 1 is always right)."


def _target(arm: Mapping[str, Any]) -> str:
    return label(arm["arm"]) + (", as released" if arm["target"] == "released" else "")


def _canaries(arms: Any) -> str:
    refuted = [f"epsilon {arm['claimed_epsilon']:g}" for arm in arms if arm["holds"] is False]
    if refuted:
        return f"The planted records refute the promise of {', '.join(refuted)}."
    told = [f"{arm['audit']['epsilon']:.2f} for the {label(arm['arm'])}" for arm in arms]
    return f"No promise is refuted: epsilon is at least {', '.join(told)}."


def _reconstruction(arms: Any) -> str:
    told = [f"{arm['arm']} {100 * arm['recovered']:.1f} %" for arm in arms]
    return f"Words recovered: {'; '.join(told)}."


def _poisoning(arms: Any) -> str:
    worst = max((arm for arm in arms if arm["attack"] != "none"), key=lambda arm: float(arm["success"]))
    return (
        f"The most harmful attack, {worst['attack']}, succeeds on {100 * worst['success']:.1f} % of records; "
        f"without it, accuracy is {100 * arms[0]['accuracy']:.1f} %."
    )


_SENTENCES = {
    "membership": _membership,
    "canaries": _canaries,
    "reconstruction": _reconstruction,
    "poisoning": _poisoning,
}
