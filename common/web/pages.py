"""Pages: templates that escape by themselves, and the ways in which numbers, times and digests are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse

from privet.common.progress import duration
from privet.common.web.sessions import Role, Session
from privet.common.web.texts import LANGUAGES, Texts

_OWN = Path(__file__).with_name("templates")
_DIGITS = 12
_NOTHING = "\u2013"


@lru_cache(maxsize=8)
def environment(folder: Path) -> Environment:
    """Return the templates of a view, over those of this package. Values are escaped; a missing value is an error."""
    made = Environment(
        loader=FileSystemLoader([folder, _OWN]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whoever writes a study's or a site's name must not steer the page: no control characters, no reversed writing.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.filters |= {
        "epsilon": epsilon,
        "size": size,
        "moment": moment,
        "short": short,
        "lasted": duration,
        "prose": prose,
    }
    for name in made.list_templates(["html"]):  # compiled now, and not while somebody waits for the first page
        made.get_template(name)
    return made


def page(
    folder: Path,
    name: str,
    texts: Texts,
    session: Session | None,
    values: Mapping[str, Any],
    status: int = 200,
    *,
    live: bool = False,
) -> HTMLResponse:
    """Return a page.

    Args:
        folder: Templates of the view.
        name: The template.
        texts: The texts of the reader's language.
        session: Of the reader; None before there is one.
        values: What the template shows.
        status: Of the answer.
        live: Whether the page is asked for again when something changes. Not the answer to a form: that would send the
            form again.
    """
    common = {
        "t": texts,
        "languages": LANGUAGES,
        "token": "" if session is None else session.token,
        "entered": session is not None,
        "approver": session is not None and session.role is Role.APPROVER,
        "live": live,
    }
    return HTMLResponse(environment(folder).get_template(name).render({**common, **values}), status)


def visible(text: str) -> str:
    """Return a text for a page: a sign in place of what is invisible, or turns the direction of writing."""
    return "".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text)


def prose(text: str) -> Markup:
    """Return a text in which what stands between backquotes is code. All of it is escaped."""
    pieces = visible(text).split("`")
    parts = [
        Markup("<code>{}</code>").format(each) if number % 2 else escape(each) for number, each in enumerate(pieces)
    ]
    return Markup().join(parts)


def epsilon(value: float | None) -> str:
    """Return an epsilon with three digits; a dash where there is none."""
    if value is None:
        return _NOTHING
    return f"{value:.3g}" if math.isfinite(value) else "∞"


def size(count: int) -> str:
    """Return a number of bytes with its unit: `812 B`, `1.9 MB`."""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.3g} {units[0]}"


def moment(value: float | str | datetime) -> str:
    """Return a time to the minute, in UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    elif not isinstance(value, datetime):
        value = datetime.fromtimestamp(value, UTC)
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def short(digest: str) -> str:
    """Return the first digits of a digest, which the page shows in full on request."""
    return digest.rpartition(":")[2][:_DIGITS]


def bars(parts: Sequence[tuple[str, float]], whole: float) -> list[dict[str, Any]]:
    """Return the segments of a bar, for a template that draws it.

    Args:
        parts: Kinds of segments, as classes of the style sheet, each with its value, from left to right.
        whole: The value of the whole bar. What goes beyond it is cut.
    """
    found, left = [], 0.0
    for kind, value in parts:
        width = max(0.0, min(100.0 * value / whole if whole > 0 else 0.0, 100.0 - left))
        found.append({"kind": kind, "x": f"{left:.2f}", "width": f"{width:.2f}"})
        left += width
    return found
