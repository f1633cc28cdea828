"""How a dossier writes days, others' words, and bounds."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from privet.common.audit.privacy_text import rounded_up

_MARKS = str.maketrans("“”„«»", "'''''")
_MOST_EXPONENT, _LONG = 700.0, 14.0
"""An exponent whose power is a float64, and one from which on the power is too long to read."""


def day_of(time: float) -> str:
    """Return the day of a time in seconds since 1970, in UTC."""
    return datetime.fromtimestamp(min(time, 253_402_300_799), UTC).strftime("%Y-%m-%d")


def quoted(text: str) -> str:
    """Return others' words between quotation marks that they cannot close: what follows them is privet's statement."""
    return f"“{text.translate(_MARKS)}”"


def shown(epsilon: float) -> str:
    """Return an epsilon as text, rounded up; it may be infinite."""
    return rounded_up(epsilon) if math.isfinite(epsilon) else "infinite"


def factor_of(epsilon: float) -> tuple[float, str]:
    """Return exp(epsilon), as far as a float holds it, and as text, rounded up."""
    factor = math.exp(min(epsilon, _MOST_EXPONENT))
    return factor, rounded_up(factor) if epsilon < _LONG else f"exp({rounded_up(epsilon)})"
