"""The vendored axe-core: the one that npm has, with its licence; it finds what keeps somebody from using a page."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tests.support.browser import AXE, AXE_SHA256, axe, browsing

_MOST_BYTES = 700_000


def test_axe_is_unchanged_small_and_has_its_licence() -> None:
    program = (AXE / "axe.min.js").read_bytes()
    assert hashlib.sha256(program).hexdigest() == AXE_SHA256
    assert len(program) < _MOST_BYTES
    assert "Mozilla Public License, version 2.0" in (AXE / "LICENSE").read_text(encoding="utf-8")
    assert {path.name for path in AXE.iterdir()} == {"axe.min.js", "LICENSE", "LICENSE-3RD-PARTY.txt"}


@pytest.mark.slow
def test_axe_finds_what_keeps_somebody_from_using_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    whole = '<!doctype html><html lang="en"><title>t</title><main><h1>t</h1><button>b</button>{}</main></html>'
    style = "<style>@media (prefers-color-scheme: dark) { p { color: #999; background: #aaa } }</style><p>text</p>"
    with browsing() as tab:
        for more, rule in (("", ""), ("<button></button>", "button-name, critical"), (style, "dark: color-contrast")):
            page.write_text(whole.format(more), encoding="utf-8")
            tab.open(page.as_uri())
            found = axe(tab)
            assert [each for each in found if rule in each] == found
            assert bool(found) == bool(rule)
