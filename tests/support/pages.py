"""The documentation as tests read it: its pages, their code blocks, their inline code and their links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    str(path.relative_to(ROOT)) for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
)

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    """Return a page's Markdown."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Return a page's fenced blocks of one language."""
    return [body for found, body in _FENCED.findall(text_of(page)) if found == language]


def commands(page: str) -> list[str]:
    """Return the commands of a page's console blocks, without their comments."""
    lines = [line.split(" #")[0].strip() for block in blocks(page, "console") for line in block.splitlines()]
    return [line for line in lines if line]


def inline(page: str) -> list[str]:
    """Return a page's inline code; code that a line break divides is joined."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", _FENCED.sub("", text_of(page)))]


def links(page: str) -> list[Path]:
    """Return the files that a page links to."""
    found = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", _FENCED.sub("", text_of(page)))
    return [(ROOT / page).parent / target for target in found]


def rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the tables with this heading (as its cells, joined by bars), row by row."""
    tables = re.findall(rf"^\| {re.escape(heading)} \|\n\|[-| ]+\|\n((?:\|.*\n)*)", text_of(page) + "\n", re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for table in tables for line in table.splitlines()]
