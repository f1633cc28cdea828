"""Markup that is escaped by construction: text becomes markup only through `element`, which escapes it.

Names of sites, labels and studies come from files of other people, and readers open a report in a browser. Without
escaping, a name could run a script there.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

# Tags and attributes are constants of this package. Values are not: in a link or a style they could run or fetch code.
_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")
_VOID = ("meta", "line", "circle", "rect", "polyline", "path")
_REFUSED = ("href", "src", "style")
_LOCAL = re.compile(r"(?=[^#]|#)(?:\w[\w-]*(?:\.[\w-]+)*(?:/\w[\w-]*(?:\.[\w-]+)*)*)?(?:#[\w-]+)?", re.ASCII)
_FEW, _SHORT = 4, 30
"""Columns, or letters of their names, that a telephone shows beside each other."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Text that is markup already. Only `element` and `joined` make it from other text."""

    __slots__ = ()


Child = Html | str
Attributes = Mapping[str, str | float]


def visible(value: str) -> str:
    """Return a text for a page or a terminal: a sign for what controls either, or changes the direction of writing."""
    return _CONTROL.sub("\ufffd", value)


def text(value: str) -> Html:
    """Escape text. What `visible` replaces becomes a visible sign."""
    return Html(html.escape(visible(value), quote=True))


def joined(parts: Iterable[Child]) -> Html:
    """Concatenate parts, and escape those that are text."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts))


def element(tag: str, attributes: Attributes, *children: Child) -> Html:
    """Return an element with escaped attribute values and children.

    Raises:
        ValueError: The name of a tag or attribute is not valid, or the attribute could fetch or run something.
    """
    for name in (tag, *attributes):
        if not _NAME.fullmatch(name) or name.lower() in _REFUSED or name.lower().startswith("on"):
            raise ValueError(f"{name!r} is not allowed as a tag or attribute in a report")
    shown = "".join(f' {name}="{text(_shown(value))}"' for name, value in attributes.items())
    if tag in _VOID:
        return Html(f"<{tag}{shown}>" if tag == "meta" else f"<{tag}{shown}/>")
    return Html(f"<{tag}{shown}>{joined(children)}</{tag}>")


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def link(target: str, *children: Child) -> Html:
    """Return a link to another file of the same folder, or to a place in it. Raises `ValueError` for any other target.

    Args:
        target: A relative path of plain names, with `#` and an id, or without.
        children: What is shown.
    """
    if not _LOCAL.fullmatch(target):
        raise ValueError("a page links to plain names in its own folder alone")
    return Html(f'<a href="{target}">{joined(children)}</a>')


def paragraph(*children: Child) -> Html:
    """Return a paragraph. Its text is marked up by `prose`."""
    return element("p", {}, *map(prose, children))


def prose(words: Child) -> Html:
    """Return a text in which what stands between backquotes is code. Markup stays as it is."""
    if isinstance(words, Html):
        return words
    pieces = re.split("`([^`]+)`", words)
    return joined(element("code", {}, piece) if number % 2 else piece for number, piece in enumerate(pieces))


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Child]], numbers: Sequence[int] = ()) -> Html:
    """Return a table. The first cell of a row is its heading; columns of numbers are aligned to the right.

    A table of many columns becomes a list on a narrow screen, where each cell shows the name of its column.

    Args:
        caption: One line about the content of the table.
        head: Names of the columns.
        rows: Rows with one cell for each column.
        numbers: Positions of the columns of numbers.
    """
    kind = [{"class": "number"} if position in numbers else {} for position in range(len(head))]
    top = [element("th", {"scope": "col", **kind[i]}, name) for i, name in enumerate(head)]
    body = []
    for row in rows:
        cells = [element("th", {"scope": "row", **kind[0]}, row[0])]
        cells += [element("td", {**kind[i], "data-name": head[i]}, cell) for i, cell in enumerate(row[1:], start=1)]
        body.append(element("tr", {}, *cells))
    whole = element(
        "table",
        {},
        element("caption", {}, caption),
        element("thead", {}, element("tr", {}, *top)),
        element("tbody", {}, *body),
    )
    many = len(head) > _FEW and sum(map(len, head)) > _SHORT
    return element("div", {"class": "wide many" if many else "wide"}, whole)


def facts(pairs: Sequence[tuple[str, Child]]) -> Html:
    """Return a list of names and values."""
    rows = [element("div", {}, element("dt", {}, name), element("dd", {}, value)) for name, value in pairs]
    return element("dl", {}, *rows)


def bullets(items: Sequence[Child]) -> Html:
    """Return a bulleted list."""
    return element("ul", {}, *(element("li", {}, item) for item in items))
