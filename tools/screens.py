"""Draw the first hour's screens for the docs: real commands in a terminal of 80 and of 140 columns, as SVG.

`python tools/screens.py DIRECTORY` works in an empty directory, and writes `docs/images/screens/`. It takes some
minutes: it trains the tutorial's study twice, and deploys a consortium of three sites on this machine. Names after the
directory draw these screens alone: new, check, training, simulate, report, deployed.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

from privet.simulations.deploy import Deployment, SitePlan, free_ports

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images" / "screens"
WIDTHS = (80, 140)
_LINES = 50
_MOST_SECONDS = 600.0
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.|([\x00-\x1f])|(.)", re.DOTALL)
# The fonts are the reader's own: a picture in the docs asks no other host for one.
_SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<style>.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px }}
.{unique_id}-title {{ font-family: sans-serif; font-size: 15px }}
{styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


class Terminal:
    """What a terminal shows: as much of a terminal's language as rich and click write.

    Attributes:
        rows: Of each line: its characters with their styles, as SGR sequences.
    """

    def __init__(self, width: int) -> None:
        self.rows: list[list[tuple[str, str]]] = [[]]
        self._width, self._style = width, ""
        self._line = self._column = 0

    def feed(self, text: str) -> None:
        """Take what a program writes."""
        for found in _TOKEN.finditer(text):
            numbers, command, control, character = found.groups()
            if command:
                self._obey(command, numbers)
            elif control == "\n":
                self._line += 1
                self._reach()
            elif control == "\r":
                self._column = 0
            elif character:
                self._put(character)

    def ansi(self) -> str:
        """Return what it shows, with styles."""
        lines = []
        for row in self.rows[: len(self.plain().splitlines())]:
            parts = groupby(row, key=lambda cell: cell[1])
            lines.append("".join(f"\x1b[0m{style}{''.join(each for each, _ in cells)}" for style, cells in parts))
        return "\n".join(lines)

    def plain(self) -> str:
        """Return what it shows, without styles."""
        return "\n".join("".join(character for character, _ in row).rstrip() for row in self.rows).rstrip()

    def _obey(self, command: str, numbers: str) -> None:
        first = int(numbers.split(";")[0]) if numbers.split(";")[0].isdecimal() else 0
        if command == "m":
            self._style = "" if not first and ";" not in numbers else f"{self._style}\x1b[{numbers}m"
        elif command == "A":
            self._line = max(self._line - max(first, 1), 0)
        elif command == "B":
            self._line += max(first, 1)
            self._reach()
        elif command == "G":
            self._column = max(first, 1) - 1
        elif command == "K":
            self.rows[self._line][0 if first == 2 else self._column :] = []
        elif command == "J":
            self.rows[self._line][self._column :] = []
            self.rows[self._line + 1 :] = []

    def _put(self, character: str) -> None:
        if self._column == self._width:
            self._line, self._column = self._line + 1, 0
            self._reach()
        row = self.rows[self._line]
        row += [(" ", "")] * (self._column - len(row))
        row[self._column : self._column + 1] = [(character, self._style)]
        self._column += 1

    def _reach(self) -> None:
        while len(self.rows) <= self._line:
            self.rows.append([])


@contextmanager
def running(command: Sequence[str], width: int, folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a command in a terminal, and yield our end of it; end the command afterwards."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _LINES, width, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    environment = {**kept, "TERM": "xterm-256color", "FLWR_HOME": str(folder / "flwr"), "OMP_WAIT_POLICY": "PASSIVE"}
    program = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        yield ours, program
    finally:
        program.terminate()
        program.wait()
        os.close(ours)


def shown(line: str, width: int, folder: Path, until: str | None = None) -> Terminal:
    """Run a `privet` command line, and return the screen at its end, or when it matches `until` for the first time.

    Raises:
        RuntimeError: The command failed, or ended before the screen matched.
    """
    screen = Terminal(width)
    screen.feed(f"\x1b[1m$ {line}\x1b[0m\r\n")
    words = [sys.executable, "-m", "privet", *line.split()[1:]]
    deadline = time.monotonic() + _MOST_SECONDS
    with running(words, width, folder) as (terminal, program):
        rest = b""
        while time.monotonic() < deadline:
            ready, _, _ = select.select([terminal], [], [], 1.0)
            try:
                read = os.read(terminal, 65536) if ready else b"-"
            except OSError:  # the program closed its end
                read = b""
            if not read:
                break
            if ready:
                rest += read
                text = rest.decode(errors="ignore")
                rest = rest[len(text.encode()) :]
                screen.feed(text)
            if until is not None and re.search(until, screen.plain()):
                return screen
        if program.wait() != 0 or until is not None:
            raise RuntimeError(f"{line} ended otherwise than expected:\n{screen.plain()}")
    return screen


def draw(name: str, screen: Terminal, width: int) -> None:
    """Write a screen as SVG."""
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(screen.ansi()), soft_wrap=True)
    title = screen.plain().splitlines()[0].removeprefix("$ ")
    drawn = console.export_svg(title=title, code_format=_SVG, unique_id=f"t{width}")
    file = IMAGES / f"{name}-{width}.svg"
    file.write_text("\n".join(line.rstrip() for line in drawn.splitlines()) + "\n", encoding="utf-8")
    print(f"{file.name}  {file.stat().st_size // 1000} kB")


def write_data(folder: Path) -> None:
    """Write the tutorial's data: three sites, two columns."""
    page = (IMAGES.parents[1] / "tutorial.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True)


def simulated(folder: Path, names: Sequence[str]) -> None:
    """Draw what a researcher sees."""
    lines = {
        "new": ("privet new data --name triage --yes", None),
        "check": ("privet check study.toml", None),
        "training": ("privet simulate study.toml --out runs/triage", r"round 2 of"),
        "simulate": ("privet simulate study.toml --out runs/triage", None),
        "report": ("privet report runs/triage", None),
    }
    for width in WIDTHS:
        for name in names:
            if name == "new":
                (folder / "study.toml").unlink(missing_ok=True)
            if name in ("training", "simulate"):
                shutil.rmtree(folder / "runs", ignore_errors=True)
            line, until = lines[name]
            draw(name, shown(line, width, folder, until), width)


def deployed(folder: Path) -> None:
    """Draw what the operators of coordinator and site see: a run that waits for a site, and the site's approval."""
    study = folder / "study.toml"
    plans = {
        name: SitePlan(folder / "data" / f"{own}-train.csv", 300)
        for name, own in (("berlin", "north"), ("paris", "south"), ("lyon", "west"))
    }
    made = Deployment(folder / "consortium", print)
    made.folder.mkdir()
    try:
        made.found(free_ports(3))
        for name in plans:
            made.enrol(name)
        made.compare([*plans])
        for name in plans:
            made.equip(name, plans[name], study)
        (made.site("lyon").parent / "state/approvals").unlink()
        for name in ("berlin", "lyon"):
            made.start(name, "site", "serve", made.site(name))
        made.connected(2)
        (folder / "hq").symlink_to(made.coordinator)
        (folder / "site").symlink_to(made.folder / "lyon")
        operators(folder)
    finally:
        made.end_all()


def operators(folder: Path) -> None:
    """Draw the coordinator's and the site's screens, where both are running."""
    runs = dict(zip(WIDTHS, ("triage", "triage-2"), strict=True))  # what was begun is not begun again
    for width, run in runs.items():
        line = f"privet coordinator run study.toml --name {run} --yes -C hq"
        draw("waiting", shown(line, width, folder, until=r"has not approved study.*\n.*paris: not.*\n.*needed"), width)
    for width, run in runs.items():
        draw("approve", shown(f"privet site approve site/ {run}", width, folder, until=r"\[y/N\]"), width)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    at, asked = Path(sys.argv[1]).resolve(), sys.argv[2:]
    if not (at / "data").exists():
        write_data(at)
    simulated(at, [name for name in ("new", "check", "training", "simulate", "report") if not asked or name in asked])
    if not asked or "deployed" in asked:
        deployed(at)
