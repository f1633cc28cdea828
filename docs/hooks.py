"""MkDocs hook: pages may link to files of the repository that lie outside `docs/`, as they do on a code host.

Such files become part of the site: Markdown files as pages, all others as they are, under `files/`. So every link is
checked, and none leads to another host.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {name: name.lower() for name in ("SECURITY.md", "CONTRIBUTING.md", "LICENSE")}
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")


def targets(text: str, page: str) -> set[str]:
    """Return the files outside `docs/` that a page links to, relative to the repository. `page` is so as well."""
    found = {posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for _, link in LINK.findall(text)}
    return {target for target in found if not target.startswith(("docs/", "../"))}


def address(target: str) -> str:
    """Return where a file of the repository lies in the site's sources."""
    return PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else f"files/{target}")


def relinked(text: str, page: str) -> str:
    """Return a page's text with its links as they hold in the site."""

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2]))
        return f"{match[1]}{posixpath.relpath(address(target), posixpath.dirname(address(page)) or '.')}"

    return LINK.sub(moved, text)


def on_files(files: Files, config: Any) -> Files:
    """Add the repository's own pages, and every file that some page links to."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES if name.endswith(".md")}
    for file in files.documentation_pages():
        pages[f"docs/{file.src_uri}"] = file.content_string
    linked = {target for page, text in pages.items() for target in targets(text, page)}
    for target in sorted({*linked, *pages}):
        if not target.startswith("docs/") and (ROOT / target).is_file():
            content = (ROOT / target).read_bytes()
            files.append(File.generated(config, address(target), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Move a page's links."""
    known = {moved: name for name, moved in PAGES.items()}
    return relinked(markdown, known.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
