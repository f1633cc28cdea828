"""How a dossier writes days, others' words, and bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import ROUND_UP, Context, Decimal

from privet.common.audit.privacy_text import rounded_up

_MARKS = str.maketrans("“”„«»", "'''''")
_MOST_EXPONENT, _LONG, _WHOLE = 700.0, 14.0, 100
"""An exponent whose power is a float64; one from which on the power is too long to read; a factor without decimals."""


_EXAMPLE_HOST = re.compile(
    r"(?<![\w-])(?:example\.(?:com|net|org)|[\w-]+\.(?:example|invalid|test|localhost))(?![\w-]|\.\w)", re.I
)
_EXAMPLE_TEXT = re.compile(
    r"\W*example(?:\s*[:;,.()]|[\s_-]*\d|\s+[\u2013\u2014-]\s|\s*$)|.*\b(?:Dr|Prof|Mrs?|Ms)\.? (?:\w\. ?)*Example\b",
    re.I,
)


def placeholder(text: str) -> bool:
    """Whether a text is one that stands for another: an example by its own words, or an address that nobody can have.

    Reserved are the names of RFC 2606, sections 2 and 3. A real name that contains the word is none: "Example-based
    learning", "Examination office".
    """
    return bool(_EXAMPLE_HOST.search(text) or _EXAMPLE_TEXT.match(text))


def up(number: float) -> str:
    """Return a small number with two digits, rounded up, without an exponent."""
    return f"{Context(prec=2, rounding=ROUND_UP).create_decimal_from_float(number):f}"


def second_of(time: float) -> str:
    """Return a time in seconds since 1970 as a day and a time of day, in UTC."""
    return datetime.fromtimestamp(min(time, 253_402_300_799), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


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
    """Return exp(epsilon), as far as a float holds it, and as text, rounded up to what a reader can use."""
    factor = math.exp(min(epsilon, _MOST_EXPONENT))
    if epsilon >= _LONG:
        return factor, f"exp({rounded_up(epsilon)})"
    return factor, str(math.ceil(factor)) if factor >= _WHOLE else f"{math.ceil(factor * 100) / 100:.2f}"


def plain(number: float) -> str:
    """Return a small number without an exponent: 0.00001, not 1e-05."""
    return f"{Decimal(f'{number:g}'):f}"


def sentence(text: str) -> str:
    """Return others' words between quotation marks, with a full stop after them where they have none."""
    return quoted(text) + ("" if text.endswith((".", "!", "?")) else ".")


def spoken(names: Sequence[str]) -> str:
    """Return names in a list that is read aloud: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "nobody"


def period(first: float, last: float) -> str:
    """Return the days from one time to another: one day where both are the same."""
    days = day_of(first), day_of(last)
    return f"on {days[0]}" if days[0] == days[1] else f"from {days[0]} to {days[1]}"
