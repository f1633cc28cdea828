"""The documentation holds together: its commands exist, its map of the code is true, and it builds as a site."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import typer.main
from typer.testing import CliRunner

from privet.common.cli import build_command
from tests.layout.survey import defined_in, public_names
from tests.support.pages import PAGES, ROOT, blocks, commands, inline, links, rows, text_of

# Commands


@cache
def privet() -> click.Command:
    return typer.main.get_command(build_command())


def resolve(words: list[str]) -> tuple[click.Command, list[str], list[str]]:
    """Return the command that words name, its path, and the words that are left."""
    command, path = privet(), list[str]()
    while words and isinstance(command, click.Group) and words[0] in command.commands:
        command, path, words = command.commands[words[0]], [*path, words[0]], words[1:]
    if words and isinstance(command, click.Group) and "pin" in command.commands:  # an argument of its own command
        command = command.commands["pin"]
    return command, path, words


def complaint(line: str, *, whole: bool) -> str:
    """Return what is wrong with a `privet` command, or nothing. One that is `whole` has all it needs."""
    command, _, left = resolve(shlex.split(line)[1:])
    if isinstance(command, click.Group):
        return f"{line}: there is no such command" if whole or (left and not left[0].startswith("-")) else ""
    try:
        values, surplus, _ = command.make_parser(click.Context(command)).parse_args(list(left))
    except click.UsageError as error:
        return f"{line}: {error.format_message()}"
    if surplus:
        return f"{line}: does not take {' '.join(surplus)}"
    given = {name for name, value in values.items() if isinstance(value, str | int) or value}
    missing = [str(p.name) for p in command.params if p.required and p.name not in given]
    return f"{line}: needs {', '.join(missing)}" if whole and missing else ""


def test_every_command_of_a_console_block_parses() -> None:
    lines = [(page, line) for page in PAGES for line in commands(page) if line.startswith("privet ")]
    assert len(lines) > 40
    assert [f"{page}: {wrong}" for page, line in lines if (wrong := complaint(line, whole=True))] == []


def test_every_fenced_block_is_of_a_kind_that_is_checked_or_marked_as_output() -> None:
    kinds = {(page, kind) for page in PAGES for kind in re.findall(r"^```(\S+)$", text_of(page), re.MULTILINE)}
    assert {each for each in kinds if each[1] not in {"console", "json", "python", "text", "toml"}} == set()
    for page in PAGES:
        for block in blocks(page, "toml"):
            tomllib.loads(block)


def test_every_command_in_the_text_exists() -> None:
    lines = [(page, code) for page in PAGES for code in inline(page) if code.startswith("privet ")]
    assert len(lines) > 100
    assert [f"{page}: {wrong}" for page, line in lines if (wrong := complaint(line, whole=False))] == []


def test_that_check_finds_what_it_looks_for() -> None:
    for line in ("privet simulat x", "privet site check a b --loud", "privet base a b", "privet audit verify x"):
        assert complaint(line, whole=True)
    assert complaint("privet site nothing", whole=False)
    assert not complaint("privet site check", whole=False)
    assert not complaint("privet audit verify x --policy y", whole=True)


def test_every_command_that_is_named_has_help() -> None:
    lines = {line for page in PAGES for line in (*commands(page), *inline(page)) if line.startswith("privet ")}
    paths = {tuple(resolve(shlex.split(line)[1:])[1]) for line in lines}
    runner = CliRunner()
    app = build_command()
    assert [path for path in sorted(paths) if runner.invoke(app, [*path, "--help"]).exit_code != 0] == []


def test_every_benchmark_that_is_named_exists() -> None:
    pages = [text_of(page) for page in PAGES if page != "CHANGELOG.md"]  # which names one that was
    named = {name for text in pages for name in re.findall(r"benchmarks/\w+\.py", text)}
    assert {name for name in named if not (ROOT / name).is_file()} == set()


# The screens


def test_every_screen_is_shown_once_and_small() -> None:
    files = sorted((ROOT / "docs/images/screens").iterdir())
    shown = re.findall(r"\]\(images/screens/([\w-]+\.svg)\)", text_of("docs/screens.md"))
    assert sorted(shown) == [file.name for file in files]
    assert sum(file.stat().st_size for file in files) < 400_000
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert set(re.findall(r"https?://[^\s\"<)]+", text)) == {"http://www.w3.org/2000/svg"}  # nothing is fetched


def test_a_terminal_is_drawn_as_programs_write_to_it() -> None:
    tool = runpy.run_path(str(ROOT / "tools/screens.py"))
    screen = tool["Terminal"](8)
    screen.feed(
        "\x1b[1mab\x1b[0mc\r\n\x1b[2mbar 10 %\x1b[0m\r\x1b[2K\x1b[1Aline\r\n\x1b[32mbar 99 %more\x1b[0m\x1b[?25l"
    )
    assert screen.plain().splitlines() == ["line", "bar 99 %", "more"]
    assert screen.ansi().splitlines()[1:] == ["\x1b[0m\x1b[32mbar 99 %", "\x1b[0m\x1b[32mmore"]


# The map of the code


def names_in(file: str) -> set[str]:
    """Return the functions and classes of a file, with methods as `Class.method`."""
    found = set()
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return found


def located() -> Iterator[tuple[str, str]]:
    """Yield file and name wherever a table of the architecture names both: `file.py` `name`, `name`."""
    for line in text_of("docs/architecture.md").splitlines():
        if line.startswith("|"):
            for file, names in re.findall(r"`([\w/]+\.py)`((?:,? `[\w.]+`)+)(?=[;,) |])", line):
                yield from ((file, name) for name in re.findall(r"`([\w.]+)`", names))


def test_the_architecture_names_what_exists() -> None:
    found = list(located())
    assert len(found) > 60
    assert [f"{file} {name}" for file, name in found if name not in names_in(file)] == []


def test_the_architecture_tells_where_enough_is() -> None:
    assert len(rows("docs/architecture.md", "behaviour | file and function")) >= 25


def test_the_architecture_has_every_package() -> None:
    packages = {
        str(path.parent.relative_to(ROOT))
        for part in ("client", "common", "server", "simulations")
        for path in (ROOT / part).glob("*/__init__.py")
    }
    table = " ".join(row[0] for row in rows("docs/architecture.md", "package | what you find there"))
    assert {package for package in packages if f"`{package}`" not in table} == set()


def test_the_glossary_says_where_a_name_is_defined_twice() -> None:
    twice = {name for name, modules in public_names().items() if len(modules) > 1}
    table = {row[0].strip("`"): row[1] for row in rows("docs/glossary.md", "name | defined in | command")}
    assert len(table) >= 6
    assert set(table) - twice == set()
    for name, files in table.items():
        assert all(name in defined_in(file) for file in re.findall(r"`([\w/]+\.py)`", files)), name


def test_the_glossary_has_each_term_once() -> None:
    terms = [row[0] for row in rows("docs/glossary.md", "term | meaning")]
    assert len(terms) > 70
    assert sorted(terms) == sorted(set(terms))


def test_the_index_has_every_page() -> None:
    index = {path.resolve() for path in (*links("docs/index.md"), *links("docs/decisions/index.md"))}
    missing = {page for page in PAGES if (ROOT / page).resolve() not in index}
    assert missing == {"docs/index.md"}


# The site


class Page(HTMLParser):
    """What a built page loads, where its links lead, and what can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "a":
            self.links += [found["href"]] if "href" in found else []
        else:
            self.loads += [found[name] for name in ("src", "href", "srcset", "data") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.mark.slow
def test_the_site_requests_nothing_from_another_host(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 30
    outside = {path.name: [load for load in page.loads if re.match(r"(\w+:)?//", load)] for path, page in pages.items()}
    assert {name: loads for name, loads in outside.items() if loads} == {}
    for sheet in site.rglob("*.css"):
        style = sheet.read_text(encoding="utf-8")
        assert re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", style) == [], sheet.name
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert 'class="mermaid"' not in text  # the theme would fetch a renderer for it


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site: Path) -> None:
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links if path.name != "404.html" else ():
            if re.match(r"\w+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / unquote(name)).resolve() if name else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                broken.append(f"{path.name}: {link}")
    assert broken == []


@pytest.mark.slow
def test_the_site_can_be_searched(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "noise multiplier" in index
    assert "architecture.html" in index


def test_each_security_claim_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    claimed = text[text.index("## What is claimed") : text.index("## What is not claimed")]
    claims = re.split(r"^\* ", claimed, flags=re.MULTILINE)[1:]
    assert len(claims) >= 15
    for claim in claims:
        named = re.findall(r"`(tests/[\w/]+\.py)`", claim.partition("Tests:")[2])
        assert named, claim
        assert [file for file in named if not (ROOT / file).is_file()] == []
