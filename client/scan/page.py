"""A scan in words, as JSON and as a page: counts below the least cell are not shown, and contents never exist here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from privet.client.pages.document import document
from privet.client.pages.html import Child, bullets, element, paragraph, table
from privet.client.pages.suppression import SMALLEST
from privet.client.scan.kinds import ANY, FAULTS, KINDS
from privet.client.scan.scanning import Places, Scan
from privet.client.training.headings import is_number

LIMITS = (
    "Patterns miss names without a salutation or label, misspelt identifiers and identifiers in pictures. "
    "A scan without findings does not show that texts are anonymous."
)


NUMBERED = (
    "Columns are shown by number where their names may be contents of a record. With `--study STUDY`, the names of the "
    "study are shown."
)


def shown(count: int, *, exact: bool) -> str:
    """Return a count; one of few records only if exact counts were asked for. Zero says nothing of any record."""
    return str(count) if exact or not 0 < count < SMALLEST else f"fewer than {SMALLEST}"


def rows_of(scan: Scan, places: Places, *, exact: bool) -> list[tuple[str, str, str, str, str]]:
    """Return file, column, kind, number of records, and the first rows, for each kind that was found."""
    found = []
    for file in scan.files:
        for column, counts in file.columns.items():
            for kind in (*KINDS, ANY):
                if counts.kinds.get(kind):
                    rows = ", ".join(map(str, places.get((file.path, column, kind), ()))) if exact else ""
                    count = shown(counts.kinds[kind], exact=exact)
                    found.append((file.path, column, kind, f"{count} of {shown(counts.records, exact=exact)}", rows))
    return found


def faults_of(scan: Scan, *, exact: bool) -> list[tuple[str, str, str]]:
    """Return name, number of records and description of each fault of texts that was looked for."""
    texts, found = scan.texts, []
    for name, what in FAULTS.items():
        if (name == "label-noise" and not texts.labelled) or (name == "train-test" and not texts.tested):
            continue
        of = texts.sampled if name == "templated" else texts.records
        count = shown(getattr(texts, name.replace("-", "_")), exact=exact)
        found.append((name, f"{count} of {shown(of, exact=exact)}", what))
    return found


def lines_of(scan: Scan, places: Places, faults: Sequence[str], *, exact: bool) -> list[str]:
    """Return a scan as text, one fact a line."""
    lines = []
    rows = rows_of(scan, places, exact=exact)
    for file in scan.files:
        lines.append(f"{file.path} ({file.role}): {shown(file.records, exact=exact)} records")
        for path, column, kind, count, where in rows:
            if path == file.path:
                lines.append(f"  {column}  {kind:<14} {count}{f'; rows {where}' if where else ''}")
        if not any(path == file.path for path, *_ in rows):
            lines.append("  no identifier found")
    lines.append("texts of the training files:")
    lines += [f"  {name:<14} {count}: {what}" for name, count, what in faults_of(scan, exact=exact)]
    if not scan.texts.complete:
        lines.append(f"  only the first {scan.texts.compared} texts were compared with each other")
    lines += [NUMBERED] if _numbered(scan) else []
    return [*lines, *(f"BROKEN: {each}" for each in faults), LIMITS]


def _numbered(scan: Scan) -> bool:
    return any(is_number(column) for file in scan.files for column in file.columns)


def json_of(scan: Scan, places: Places, faults: Sequence[str], *, exact: bool) -> dict[str, Any]:
    """Return a scan as JSON values: a count of few records is null unless exact counts were asked for."""

    def number(count: int) -> int | None:
        return count if exact or not 0 < count < SMALLEST else None

    texts = scan.texts.model_dump(mode="json")
    files = [
        {
            "path": file.path,
            "role": file.role,
            "sha256": file.sha256,
            "records": number(file.records),
            "columns": {
                column: {
                    "records": number(counts.records),
                    "kinds": {kind: number(count) for kind, count in counts.kinds.items()},
                }
                | ({"rows": {k: places.get((file.path, column, k), []) for k in counts.kinds}} if exact else {})
                for column, counts in file.columns.items()
            },
        }
        for file in scan.files
    ]
    return {
        "time": scan.time,
        "smallest": 1 if exact else SMALLEST,
        "names": scan.names,
        "recognisers": list(scan.recognisers),
        "files": files,
        "texts": {name: value if isinstance(value, bool) else number(value) for name, value in texts.items()},
        "broken": [*faults],
    }


def page_of(scan: Scan, faults: Sequence[str]) -> str:
    """Return a scan as one HTML page, which shows no count of few records."""
    rows = [
        (kind, KINDS.get(kind, "an identifier of any kind"), column, Path(path).name, count)
        for path, column, kind, count, _ in rows_of(scan, {}, exact=False)
    ]
    content: list[Child] = [
        element("h1", {}, "Scan of data files"),
        paragraph(f"Made at {scan.time}. Counts of fewer than {SMALLEST} records are not shown."),
        paragraph(LIMITS),
        *([paragraph(NUMBERED)] if _numbered(scan) else []),
        table("Direct identifiers, in records", ("Kind", "What it is", "Column", "File", "Records"), rows)
        if rows
        else paragraph("No identifier was found."),
        table("Texts of the training files", ("Fault", "Records", "What it is"), faults_of(scan, exact=False)),
    ]
    if faults:
        content.append(element("h2", {}, "Rules of the policy that are broken"))
        content.append(bullets(faults))
    return document("Scan of data files", content)
