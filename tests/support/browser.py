"""A real browser for tests: Chromium, driven through its DevTools protocol.

`PRIVET_REQUIRE_CHROMIUM` makes a missing browser a failure; otherwise tests that need one are skipped.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT = 15.0
_FAULTS = Path(__file__).with_name("faults.js").read_text(encoding="utf-8")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--remote-debugging-port=0", "--hide-scrollbars",
)  # fmt: skip


@dataclass
class Browser:
    """One page of a browser.

    Attributes:
        asked: Addresses that the page asked for.
        complaints: What the page or the browser complained about: errors of scripts, and breaches of the page's policy.
    """

    socket: ClientConnection
    session: str
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    _number: int = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and note what happens meanwhile."""
        self._number += 1
        self.socket.send(
            json.dumps({"id": self._number, "method": method, "params": parameters, "sessionId": self.session})
        )
        while True:
            message = json.loads(self.socket.recv(timeout=WAIT))
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        found = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(found["request"]["url"])
        elif message.get("method") == "Log.entryAdded" and found["entry"]["source"] in ("security", "javascript"):
            self.complaints.append(found["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(found["exceptionDetails"]["text"])
        elif message.get("method") == "Page.javascriptDialogOpening":
            self.complaints.append(f"a script opened a dialog: {found['message']}")
            self.socket.send(
                json.dumps(
                    {
                        "id": 0,
                        "method": "Page.handleJavaScriptDialog",
                        "params": {"accept": True},
                        "sessionId": self.session,
                    }
                )
            )

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            try:
                if self.run(f"!!({script})"):
                    return
            except AssertionError:
                pass  # the page is being replaced
            time.sleep(0.05)
        pytest.fail(f"not within {WAIT} s: {script}\n{self.text()[:2000]}")

    def open(self, address: str) -> None:
        """Go to an address, and wait for the page."""
        self.run("window.leaving = true")
        self.call("Page.navigate", url=address)
        self.until("!window.leaving && document.readyState === 'complete'")

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

    def follow(self, selector: str) -> None:
        """Click, and wait for the page that follows."""
        self.run("window.leaving = true")
        self.run(f"document.querySelector({json.dumps(selector)}).click()")
        self.until("!window.leaving && document.readyState === 'complete'")

    def picture(
        self, file: Path, width: int = 1100, height: int = 900, *, dark: bool = False, whole: bool = True
    ) -> None:
        """Write a picture of the page as PNG."""
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))

    def faults(self) -> list[str]:
        """Return what keeps somebody from using the page, in light and in dark colours (`faults.js`)."""
        found: list[str] = []
        for scheme in ("dark", "light"):
            self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            found += [f"{scheme}: {each}" for each in self.run(_FAULTS)]
        return found

    def width(self, width: int) -> int:
        """Return how wide the page is in a window of this width."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        return int(self.run("document.documentElement.scrollWidth"))


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile. Skips the test, or fails it, where there is none."""
    if CHROMIUM is None:
        if os.environ.get("PRIVET_REQUIRE_CHROMIUM"):
            pytest.fail("PRIVET_REQUIRE_CHROMIUM is set, and there is no Chromium")
        pytest.skip("there is no Chromium: install the package chromium of Debian")
    errors = folder / "chromium.log"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"], stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + WAIT
        while not (found := re.search(r"ws://\S+", errors.read_text(errors="replace"))):
            assert time.monotonic() < end, errors.read_text(errors="replace")
            time.sleep(0.05)
        with connect(found.group(), max_size=2**26) as socket:
            yield _page(socket)
    finally:
        process.terminate()
        process.wait(10)


def _page(socket: ClientConnection) -> Browser:
    whole = Browser(socket, "")

    def ask(method: str, **parameters: Any) -> dict[str, Any]:
        whole._number += 1
        socket.send(json.dumps({"id": whole._number, "method": method, "params": parameters}))
        while (message := json.loads(socket.recv(timeout=WAIT))).get("id") != whole._number:
            pass
        return dict(message["result"])

    target = ask("Target.createTarget", url="about:blank")["targetId"]
    page = Browser(socket, ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"], _number=1000)
    for name in ("Page", "Network", "Log", "Runtime"):
        page.call(f"{name}.enable")
    return page


def look_at(browser: Browser, address: str) -> None:
    """Open a page: nobody is kept from using it, and it fits a phone."""
    browser.open(address)
    found, wide = browser.faults(), browser.width(390)
    assert not found, f"{address}: {found}"
    assert wide <= 390, f"{address}: {wide} pixels wide"
