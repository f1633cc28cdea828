"""Chromium, for tests of pages: found on this machine, and driven through a pipe by its own DevTools protocol.

Needs Debian's `chromium`. Without it such tests are skipped, but not where the environment says
PRIVET_REQUIRE_CHROMIUM=1, as `.ci/run` does: there its absence is a failure.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest

INSTALL = "apt-get install -y --no-install-recommends chromium"
_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def path() -> str | None:
    """Return the path of Chromium; None if it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def required() -> str:
    """Return the path of Chromium. Skip the test without it, or fail where the environment demands it."""
    found = path()
    if found is None:
        told = f"chromium is not installed: {INSTALL}"
        if os.environ.get("PRIVET_REQUIRE_CHROMIUM") == "1":
            pytest.fail(told)
        pytest.skip(told)
    return found


class Tab:
    """One tab of a browser.

    Attributes:
        events: What the browser has reported so far: method and parameters.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._number, self._session = to, back, b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read(60.0)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._to, data) :]

    def _read(self, seconds: float) -> dict[str, Any]:
        """Read the next message; events are kept."""
        ends = time.monotonic() + seconds
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(ends - time.monotonic(), 0))
            data = os.read(self._back, 1 << 20) if ready else b""
            assert data, "Chromium does not answer, or has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, url: str) -> None:
        """Load a page, and wait until it is loaded."""
        before = len(self.events)
        self.call("Page.navigate", url=url)
        while not any(name == "Page.loadEventFired" for name, _ in self.events[before:]):
            self._read(60.0)

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript, wait for its promise, and return its value."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until an expression is true."""
        ends = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < ends, f"never true: {expression}"
            time.sleep(0.02)

    def size(self, width: int, height: int) -> None:
        """Set the size of the window in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, dark: bool) -> None:
        """Prefer dark or light colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, file: Path) -> None:
        """Write the whole page as a PNG."""
        box = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": box["width"], "height": box["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(found["data"]))

    def complaints(self) -> list[str]:
        """Return errors, violations of a content security policy, and requests other than for files and data."""
        found = []
        for name, given in self.events:
            if name == "Log.entryAdded":
                found.append(f"{given['entry']['source']}: {given['entry']['text']}")
            elif name == "Runtime.exceptionThrown":
                found.append(str(given["exceptionDetails"]))
            elif name == "Network.requestWillBeSent" and not given["request"]["url"].startswith(
                ("file:", "data:", "about:")
            ):
                found.append(f"request: {given['request']['url']}")
        return found


T = TypeVar("T", bound=Tab)


@contextmanager
def browser(kind: type[T]) -> Iterator[T]:
    """Start Chromium, and yield a tab of this kind. Skips or fails as `required`."""
    program = required()
    with TemporaryDirectory(prefix="chromium-") as home:
        into, to = os.pipe()
        back, out = os.pipe()

        def place() -> None:
            # Chromium reads commands from descriptor 3, and writes answers to 4.
            high = [os.dup(into), os.dup(out)]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={home}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place,
            close_fds=False,
        )
        os.close(into)
        os.close(out)
        try:
            yield kind(to, back)
        finally:
            os.close(to)  # Chromium ends with its pipe
            os.close(back)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
