"""Settings of a site file that fit a data file: found out by looking at it, for a person to read and to add.

Nothing here decides how a file is read while training. The person who runs the site does, by adding the lines.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from privet.client.formats import DELIMITERS, Delimiter, FileFormat, inline, toml_lines
from privet.client.training.csvrows import csv_rows, marked
from privet.client.training.decoding import content_of, detected, kind_of, text_of
from privet.common.errors import DataError

FEWEST = 10
"""Fewest units of a label that is shown: a value of fewer may be a text or a patient's id in a wrong column."""
_MOST_LABELS = 12
_LONGEST = 24
_ROWS = 50
_LETTERS = 8
_DECIMAL_COMMA = re.compile(r"[0-9]+,0+")


def proposed(path: Path, needed: Sequence[str], form: FileFormat) -> dict[str, Any]:
    """Return the settings with which a file gives the needed columns, as far as they differ from `form`.

    Empty where no other settings fit better.
    """
    try:
        kind = kind_of(path).name
        if kind == "parquet":
            return {}
        encoding = detected(content_of(path))
        if encoding is None:
            return {}
        found: dict[str, Any] = {} if _same_encoding(path, form, encoding) else {"encoding": encoding}
        if kind in ("csv", "tsv"):
            text = text_of(path, found.get("encoding", form.encoding))
            found |= _layout(path, text, needed, form, "tab" if kind == "tsv" else "comma")
    except (DataError, OSError):
        return {}
    return found


def _same_encoding(path: Path, form: FileFormat, encoding: str) -> bool:
    """Return whether the file's own settings read it already."""
    if form.encoding == encoding:
        return True
    try:
        text_of(path, form.encoding)
    except DataError:
        return False
    return True


def _layout(path: Path, text: str, needed: Sequence[str], form: FileFormat, default: Delimiter) -> dict[str, Any]:
    """Return the delimiter and the treatment of blanks under which most of the needed names are in the first line."""
    own = form.delimiter or default
    named = marked(text)
    best: tuple[int, bool, bool, Delimiter] | None = None
    for name, separator in DELIMITERS.items():
        if named not in (None, name):
            continue
        header = next(_rows(path, text, separator), [])
        for strip in (False, True):
            names = merged(form, {"strip_header": strip}).names(header)
            # Of equally good ones: the site's own delimiter, and no stripping.
            rank = (len(set(needed) & set(names)), name == own, not strip, name)
            best = rank if best is None or rank > best else best
    if best is None:
        return {}
    hits, _, plain, name = best
    if not hits:
        name, plain = named or _regular(path, text) or own, True
    found: dict[str, Any] = {} if name == own else {"delimiter": name}
    return found if plain or form.strip_header else {**found, "strip_header": True}


def _rows(path: Path, text: str, separator: str) -> Iterator[list[str]]:
    try:
        # A first line sep= is of this separator, or there is none: others were left out.
        yield from (row for _, row in csv_rows(path, text, separator))
    except DataError:
        return


def _regular(path: Path, text: str) -> Delimiter | None:
    """Return the delimiter that divides the first rows into the same number of values, two or more."""
    for name, separator in DELIMITERS.items():
        widths = {len(row) for row in islice(_rows(path, text, separator), _ROWS)}
        if len(widths) == 1 and widths.pop() > 1:
            return name
    return None


def hint_for(path: Path, needed: Sequence[str], form: FileFormat) -> str:
    """Return the beginning of a hint: the settings that fit a file; empty where none do."""
    found = proposed(path, needed, form)
    if not found:
        return ""
    return (
        f"add the line {inline(found)} to the site file, above its first table (in a simulation: under "
        "[simulation.sites.NAME]), if that is how the file is written; otherwise "
    )


def with_settings(error: DataError, paths: Sequence[Path], needed: Sequence[str]) -> DataError:
    """Return an error about files that were read plainly, with a hint at the settings that fit the first odd one."""
    for path in paths:
        if found := proposed(path, needed, FileFormat()):
            lines = "\n  ".join(toml_lines("format", found))
            hint = "if the file is written so, save these lines as format.toml, and add `--format format.toml`:"
            return DataError(error.message, f"{hint}\n  {lines}")
    if error.missing and paths:
        names = {f"COLUMN-{number}": name for number, name in enumerate(error.missing, 1)}
        lines = "\n  ".join(toml_lines("format", {"columns": names}))
        hint = (
            f"save these lines as format.toml, with the file's own names in place of {' and '.join(names)}, and add "
            "`--format format.toml`:"
        )
        return DataError(error.message, f"{hint}\n  {lines}")
    return error


def letters_of(path: Path, encoding: Any) -> str:
    """Return the most frequent letters beyond ASCII in an encoding, so that a person sees whether it is the right one.

    Single characters tell nothing of a record.
    """
    counts = Counter(each for each in text_of(path, encoding) if not each.isascii() and each.isprintable())
    return " ".join(each for each, count in counts.most_common(_LETTERS) if count > 1)


def decimals(values: Sequence[Any]) -> bool:
    """Return whether ids are written as whole numbers with a decimal comma, such as 101,0, all of them."""
    texts = [value for value in values if value not in (None, "")]
    return bool(texts) and all(isinstance(each, str) and _DECIMAL_COMMA.fullmatch(each) for each in texts)


def unknown_labels(values: Iterable[tuple[Any, Any]], known: Sequence[str]) -> dict[str, str]:
    """Return a mapping for labels that the study does not have, to be completed by a person.

    Only values that look like codes are shown: short, printable, few of them, and each of at least `FEWEST` units. Each
    gets the label of the study that differs from it in case and blanks alone, or else `?`, which is no label: a mapping
    that nobody has completed is refused.

    Args:
        values: Each label that is not the study's, with the unit that has it.
        known: The study's labels.
    """
    units: dict[str, set[Any]] = {}
    for value, unit in values:
        if isinstance(value, str | int) and not isinstance(value, bool):
            units.setdefault(str(value), set()).add(unit)
    found = [value for value in units if value not in known and value != ""]
    alike = {label.strip().casefold(): label for label in known}
    if len(found) > _MOST_LABELS:
        return {}
    return {
        value: alike.get(value.strip().casefold(), "?")
        for value in found
        if len(units[value]) >= FEWEST and len(value) <= _LONGEST and value.isprintable()
    }


def merged(form: FileFormat, more: Mapping[str, Any]) -> FileFormat:
    """Return a format with further settings."""
    return FileFormat(**{name: getattr(form, name) for name in form.model_fields_set} | dict(more))
