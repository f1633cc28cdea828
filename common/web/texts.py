"""The texts of the console: one file a language, `texts/en.toml` and so on, with the same keys.

A text may have places in braces, which are filled when a page is made. What is filled in is escaped with the page.
Sentences that commands print too, such as a policy's findings, stay as the commands say them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

LANGUAGES = {"en": "English", "de": "Deutsch", "zh": "中文"}
"""The languages, each by its own name. The first is the default."""
_FOLDER = Path(__file__).with_name("texts")


class Texts:
    """The texts of one language.

    Args:
        language: A key of `LANGUAGES`.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self._texts = catalogue(language)

    def __call__(self, key: str, **values: object) -> str:
        """Return a text with its places filled.

        Raises:
            KeyError: The catalogue has no such text, or the text has a place that `values` lacks.
        """
        return self._texts[key].format_map(values)


@lru_cache(maxsize=len(LANGUAGES))
def catalogue(language: str) -> Mapping[str, str]:
    """Return the texts of a language by dotted key."""
    with (_FOLDER / f"{language}.toml").open("rb") as file:
        tables = tomllib.load(file)
    return {f"{table}.{key}": text for table, texts in tables.items() for key, text in texts.items()}


def preferred(header: str) -> str:
    """Return the language that an `Accept-Language` header asks for first, of those there are (RFC 9110, 12.5.4)."""
    wanted: list[tuple[float, str]] = []
    for part in header[:200].split(","):
        name, _, quality = part.strip().partition(";q=")
        try:
            wanted.append((-float(quality or 1), name.split("-")[0].lower()))
        except ValueError:
            continue
    return next((name for _, name in sorted(wanted, key=lambda each: each[0]) if name in LANGUAGES), "en")
