"""A console in Chromium: used by mouse and keyboard, and examined for what keeps somebody from using it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.chromium import Tab, browser

_FAULTS = Path(__file__).with_name("faults.js").read_text(encoding="utf-8")
AXE = Path(__file__).parent / "vendor/axe-core"
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
"""axe-core 4.14.1 as npm has it, under the Mozilla Public License 2.0, which lies beside it."""
_RUN_AXE = """axe.run(document, {preload: false, resultTypes: ["violations"], ...OPTIONS})
  .then((found) => found.violations
  .filter((each) => each.impact === "serious" || each.impact === "critical")
  .map((each) => `${each.id}, ${each.impact}: ${each.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`))"""
_LOADED = "!window.leaving && document.readyState === 'complete'"


class Browser(Tab):
    """A tab that a person uses."""

    @property
    def asked(self) -> list[str]:
        """Addresses that the page asked for."""
        return [given["request"]["url"] for name, given in self.events if name == "Network.requestWillBeSent"]

    @property
    def objections(self) -> list[str]:
        """Errors of scripts, dialogs that they opened, and breaches of the page's policy."""
        found = []
        for name, given in self.events:
            if name == "Log.entryAdded" and given["entry"]["source"] in ("security", "javascript"):
                found.append(given["entry"]["text"])
            elif name in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                found.append(f"{name}: {json.dumps(given)[:200]}")
        return found

    def until(self, script: str, seconds: float = 30.0) -> None:
        """Wait until an expression in the page is true, also while another page is loaded."""
        self.wait(f"(() => {{ try {{ return !!({script}) }} catch {{ return false }} }})()", seconds)

    def text(self) -> str:
        """Return the text of the page."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def fill(self, selector: str, value: str) -> None:
        """Type into a field, as a keyboard does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=value)

    def press(self, key: str, code: int) -> None:
        """Press a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def leave(self) -> None:
        """Mark the present page, so that `arrived` can tell the next one."""
        self.run("window.leaving = true")

    def arrived(self, seconds: float = 30.0) -> None:
        """Wait for the page that follows the marked one."""
        self.until(_LOADED, seconds)

    def follow(self, selector: str, seconds: float = 30.0) -> None:
        """Click, and wait for the page that follows."""
        self.leave()
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
        self.arrived(seconds)

    def faults(self) -> list[str]:
        """Return what keeps somebody from using the page, in light and in dark colours (`faults.js`)."""
        found: list[str] = []
        for dark in (True, False):
            self.dark(dark)
            found += [f"{'dark' if dark else 'light'}: {each}" for each in self.run(_FAULTS)]
        return found

    def width(self, width: int) -> int:
        """Return how wide the page is in a window of this width."""
        self.size(width, 800)
        return int(self.run("document.documentElement.scrollWidth"))


@contextmanager
def browsing() -> Iterator[Browser]:
    """Start a browser with an empty profile. Skips or fails as `privet`'s other tests of pages."""
    with browser(Browser) as tab:
        yield tab


def axe(tab: Tab) -> list[str]:
    """Return the serious and critical findings of axe-core on the present page, in light and in dark colours."""
    tab.run((AXE / "axe.min.js").read_text(encoding="utf-8") + ";0")
    tab.dark(True)  # only colours differ
    dark = tab.run(_RUN_AXE.replace("OPTIONS", "{runOnly: ['color-contrast']}"))
    tab.dark(False)
    return [*(f"dark: {each}" for each in dark), *tab.run(_RUN_AXE.replace("OPTIONS", "{}"))]


def look_at(tab: Browser, address: str) -> None:
    """Open a page: nobody is kept from using it, and it fits a phone."""
    tab.open(address)
    found, wide = [*tab.faults(), *axe(tab)], tab.width(390)
    assert not found, f"{address}: {found}"
    assert wide <= 390, f"{address}: {wide} pixels wide"
