"""The auditor's page: time from opening it in Chromium to the verdict, for a log of 10,000 leaves, and its size.

Needs Chromium (Debian's `chromium`). The time begins when the browser is told to open the file, and ends with the
verdict in the page's title; so it holds reading the file, which is most of the bundle, and drawing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

from harness import Bench, Check, start
from round_log import ORIGIN, Consortium, private

from privet.common.audit.page import page
from privet.common.audit.verify import Tree
from privet.common.log import note, tiles
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.merkle import leaf_hash

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--no-first-run",
)
WAIT = 300.0
SITES = tuple(f"site-{number:02d}" for number in range(20))


def published(consortium: Consortium, size: int) -> dict[str, bytes]:
    """Return the files of a log of at least `size` leaves, with the cosignature of every site."""
    leaves: list[bytes] = []
    tree = Tree()
    for stretch in consortium.rounds():
        leaves += stretch
        if len(leaves) >= size:
            break
    for leaf in leaves:
        tree.append(leaf_hash(leaf))
    head = Checkpoint(ORIGIN, len(leaves), tree.frontier.root).text
    lines = note.log_lines(head, ORIGIN, private(consortium.seed, "log"), consortium.second("coordinator"))
    for site in consortium.sites:
        key = private(consortium.seed, f"witness {site}")
        lines += note.witness_lines(head, f"{site}.example", key, int(time.time()), consortium.second(site))
    files = {"checkpoint": note.Note(head, lines).encode()}
    for tile in tiles.tiles(len(leaves)):
        first = tile.number * tiles.WIDTH
        files[tile.path] = (
            tiles.bundle_bytes(leaves[first : first + tile.width])
            if tile.level is None
            else tiles.tile_bytes(tile, lambda places: [tree.hashes[place] for place in places])
        )
    return files


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Start the browser, and yield the address of its DevTools, on loopback."""
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        raise SystemExit("chromium is not installed: apt-get install -y --no-install-recommends chromium")
    process = subprocess.Popen(
        [program, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port = folder / "DevToolsActivePort"
        ends = time.monotonic() + WAIT
        while not port.is_file() or (not port.read_text().endswith("\n") and len(port.read_text().split()) < 2):
            if process.poll() is not None or time.monotonic() > ends:
                raise SystemExit("Chromium did not start")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port.read_text().split()[0]}"
    finally:
        process.terminate()
        process.wait(30)


def asked(address: str, method: str = "GET") -> Any:
    """Ask the browser's DevTools."""
    with urlopen(Request(address, method=method), timeout=30) as answer:  # noqa: S310 - loopback
        return json.loads(answer.read())


def seconds_to_verdict(devtools: str, file: Path) -> tuple[float, str]:
    """Open a page, and return the time until its verdict, and the verdict."""
    started = time.perf_counter()
    tab = asked(f"{devtools}/json/new?{quote(file.as_uri())}", "PUT")
    while time.perf_counter() - started < WAIT:
        time.sleep(0.05)
        tabs = asked(f"{devtools}/json/list")
        title = next(each["title"] for each in tabs if each["id"] == tab["id"])
        if title.endswith(f": {file.stem}"):
            spent = time.perf_counter() - started
            urlopen(f"{devtools}/json/close/{tab['id']}", timeout=30).close()  # noqa: S310 - loopback
            return spent, title.removesuffix(f": {file.stem}")
    raise SystemExit(f"no verdict after {WAIT:.0f} s")


def measured(bench: Bench, folder: Path) -> tuple[list[Check], dict[str, Any]]:
    """Measure a log signed with Ed25519 alone, and one that is signed twice."""
    size = 1_000 if bench.quick else 10_000
    checks: list[Check] = []
    verdicts: dict[str, Any] = {}
    (folder / "profile").mkdir()
    with chromium(folder / "profile") as devtools:
        browser = asked(f"{devtools}/json/version")
        for hybrid in (False, True):
            what = "both signatures" if hybrid else "Ed25519 alone"
            bench.say(f"writing a log of {size} leaves, {len(SITES)} sites, {what}")
            file = folder / f"log-{int(hybrid)}.html"
            data = page(published(Consortium(bench.seed, SITES, hybrid=hybrid), size), file.stem)
            file.write_bytes(data)
            bench.say(f"opening {len(data) / 1e6:.1f} MB")
            spent, verdict = seconds_to_verdict(devtools, file)
            limit = 10.0 * size / 10_000
            good = verdict == "Not yet verified: consistent with itself"
            checks.append(
                Check(
                    f"auditor's page, {what}: time to the verdict", spent, "s", f"< {limit:g}", good and spent < limit
                )
            )
            checks.append(Check(f"auditor's page, {what}: size", len(data) / 1e6, "MB", "", None))
            verdicts[what] = verdict
    return checks, {"leaves": size, "sites": len(SITES), "browser": browser["Browser"], **verdicts}


def main() -> None:
    """Measure and print the checks."""
    bench = start("audit_page", __doc__)
    with TemporaryDirectory() as name:
        checks, details = measured(bench, Path(name))
    bench.finish(checks, details)


if __name__ == "__main__":
    main()
