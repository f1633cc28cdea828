"""One self-contained HTML page: it holds its style, and neither runs nor fetches anything."""

from __future__ import annotations

from collections.abc import Iterable

from privet.client.pages.html import Child, Html, element
from privet.client.pages.style import STYLE

# The browser refuses scripts, images and requests, even if a name in the page escaped the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def document(title: str, content: Iterable[Child]) -> str:
    """Return the whole file of a page.

    Args:
        title: Title in the browser's window.
        content: Everything on the page, in order.
    """
    head = element(
        "head",
        {},
        element("meta", {"charset": "utf-8"}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("title", {}, title),
        Html(f"<style>{STYLE}</style>"),
    )
    body = element("body", {}, element("main", {}, *content))
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, head, body)}\n"
