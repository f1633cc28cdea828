"""Change values of a TOML file that people write: their comments, their order and all other lines stay.

A key is replaced where it stands, or where a template has it in a comment (`# anchor = "..."`), or added to its table.
The result is parsed again: if it is not exactly the old document with the new values, nothing is changed.
"""

from __future__ import annotations

import json
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from privet.common.errors import StateError, StudyError
from privet.common.files import write_durably

Changes = Mapping[str, Any]
"""New values by dotted key, such as `limit.epsilon`; None removes a key."""

_HEADER = re.compile(r"\s*(?:#\s*)?\[([A-Za-z0-9_.-]+)\]\s*(?:#.*)?")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BASES = "resources.bases."  # the keys of this table may hold dots
_MOST_LINES = 200
"""Most lines of one value."""


def change_file(path: Path, changes: Changes, check: Callable[[dict[str, Any]], object]) -> None:
    """Change values of a TOML file, atomically.

    Args:
        path: The file.
        changes: The new values.
        check: Called with the new document; it raises if the file must not become that.

    Raises:
        StudyError: The file is not TOML, or the values cannot be put into it by this program.
        StateError: The file cannot be read or written.
    """
    try:
        path = path.resolve(strict=True)  # a link stays one, and what it leads to is changed
        before, mode = path.read_text(encoding="utf-8"), stat.S_IMODE(path.stat().st_mode)
        after = changed(before, changes, path.name)
        if after == before:
            return
        check(tomllib.loads(after))
        write_durably(path, after.encode(), mode)
    except UnicodeError:
        raise StudyError(
            f"{path.name} cannot be changed: it, or a new value, is no text in UTF-8",
            "save the file as UTF-8, and rename files whose names are in another encoding",
        ) from None
    except OSError as error:
        raise StateError(
            f"{path} cannot be changed ({error.strerror})", "check the disk space and the permissions, then try again"
        ) from None


def changed(text: str, changes: Changes, name: str) -> str:
    """Return a TOML text with new values.

    Raises:
        StudyError: The text is not TOML, or a value cannot be put into it.
    """
    try:
        wanted = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "correct the file at the line and column named"
        raise StudyError(f"{name} is not valid TOML: {error}", hint) from None
    lines = text.splitlines()
    for dotted, value in changes.items():
        table, key = _split(dotted)
        if _put(wanted, table, key, value):
            lines = _edited(lines, table, key, value)
    after = "\n".join(lines) + "\n"
    try:
        same = tomllib.loads(after) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        written = "; ".join(f"{dotted} = {toml_value(value)}" for dotted, value in changes.items() if value is not None)
        raise StudyError(f"{name} is written in a form that this command cannot change", f"set by hand: {written}")
    return after


def _split(dotted: str) -> tuple[str, str]:
    """Return the table and the key that a dotted name means."""
    if dotted.startswith(_BASES):
        return _BASES[:-1], dotted.removeprefix(_BASES)
    table, _, key = dotted.rpartition(".")
    return table, key


def _put(document: dict[str, Any], table: str, key: str, value: Any) -> bool:
    """Set a value in a parsed document, and return whether that changes it."""
    for part in filter(None, table.split(".")):
        document = document.setdefault(part, {})
        if not isinstance(document, dict):
            raise StudyError(f"{part}: expected a table, found {document!r}", f"write [{table}] on a line of its own")
    if value is None:
        return document.pop(key, None) is not None
    changes = key not in document or document[key] != value
    document[key] = json.loads(json.dumps(value))
    return changes


def _edited(lines: list[str], table: str, key: str, value: Any) -> list[str]:
    first, end = _table(lines, table)
    if first is None:
        if value is None:
            return lines
        # A table that only a template's comment has becomes a real one, without the rest of the template.
        commented = [number for number, line in enumerate(lines) if _header(line) == table]
        if not commented:
            return [*lines, "", f"[{table}]", _line(key, value)]
        lines = [*lines]
        lines[commented[0]] = re.sub(r"^(\s*)#\s*", r"\1", lines[commented[0]])
        first, end = _table(lines, table)
    start = 0 if first is None else first
    found = _extent(lines, start, end, key, commented=False)
    if value is None:
        return lines if found is None else [*lines[: found[0]], *lines[found[1] :]]
    found = found or _extent(lines, start, end, key, commented=True)
    if found is None:
        while end > start and not lines[end - 1].strip():
            end -= 1
        return [*lines[:end], _line(key, value), *lines[end:]]
    begin, until = found
    remark = _remark(lines[begin]) if until == begin + 1 else ""
    return [*lines[:begin], _line(key, value) + remark, *lines[until:]]


def _table(lines: list[str], table: str) -> tuple[int | None, int]:
    """Return the first line after a table's header, and the line at which the next table begins."""
    first: int | None = None if table else 0
    for number, line in enumerate(lines):
        name = _header(line)
        if name is None:
            continue
        if first is not None:
            return first, _without_remarks(lines, number)
        if name == table and not line.lstrip().startswith("#"):
            first = number + 1
    return first, len(lines)


def _without_remarks(lines: list[str], end: int) -> int:
    """Return where a table ends: comments directly above the next header belong to that one."""
    while end and lines[end - 1].lstrip().startswith("#") and "=" not in lines[end - 1]:
        end -= 1
    return end


def _header(line: str) -> str | None:
    match = _HEADER.fullmatch(line)
    return None if match is None else match.group(1)


def _extent(lines: list[str], start: int, end: int, key: str, *, commented: bool) -> tuple[int, int] | None:
    """Return the lines of a key and its value, from the first to the one after the last."""
    for number in range(start, end):
        line = lines[number].lstrip()
        if commented != line.startswith("#"):
            continue
        line = line.lstrip("# ") if commented else line
        if not re.match(rf"(?:{re.escape(key)}|{re.escape(quoted(key))})\s*=", line):
            continue
        if commented:
            return number, number + 1
        for until in range(number + 1, min(number + _MOST_LINES, end) + 1):
            if _parses("\n".join(lines[number:until])):
                return number, until
    return None


def _remark(line: str) -> str:
    """Return the comment behind a value, with the spaces before it; empty if there is none."""
    line = line.lstrip("# ")
    for match in re.finditer(r"\s+#", line):
        if _parses(line[: match.start()]):
            return line[match.start() :]
    return ""


def _parses(text: str) -> bool:
    try:
        return bool(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return False


def _line(key: str, value: Any) -> str:
    return f"{toml_key(key)} = {toml_value(value)}"


def toml_key(name: str) -> str:
    """Return a key as TOML writes it."""
    return name if _BARE.fullmatch(name) else quoted(name)


def toml_value(value: Any) -> str:
    """Return a string, number, truth value, or a list or table of these as TOML, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(name)} = {toml_value(each)}" for name, each in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        return quoted(value)
    return repr(value) if isinstance(value, float) else json.dumps(value)


def quoted(text: str) -> str:
    """Return a text as TOML writes it."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
