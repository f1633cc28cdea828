"""An evaluation on the terminal: the verdict, a table of figures, and the figures of the task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from privet.client.pages.html import visible
from privet.client.release.bootstrap import Estimate, between
from privet.client.release.bootstrap import shown as as_text

TELLS = {"better": "better", "worse": "worse", "unclear": "unclear", "equal": "equal", "few": "too few"}
"""What a comparison tells of the tuned model, in words."""

_ANY = 1000
"""Columns: more than a table has."""
_STYLES = {"better": "bold green", "worse": "bold red"}


def evaluation_text(document: Mapping[str, Any]) -> RenderableType:
    """Return an evaluation for the terminal, from its document."""
    parts: list[RenderableType] = [Text(document["verdict"], style="bold"), Text("")]
    parts.append(_measures("", document["measures"]))
    if "chance" in document:
        parts.append(Text(f"A guess is right in {100 * document['chance']:.1f} % of the multiple-choice questions."))
    if "most_frequent" in document:
        most = document["most_frequent"]
        parts.append(
            Text(f"To always answer {most['label']} would be right in {100 * most['accuracy']:.1f} % of the texts.")
        )
    parts += _classes(document) + _positive(document)
    if "entities" in document:
        parts += [
            Text(""),
            _rows("Entities by type, tuned", "type", document["entities"], ("precision", "recall", "overlap_f1", "f1")),
        ]
    for kind, found in document["groups"].items():
        parts += [Text(""), _groups(kind, found)]
    for key in ("repeated", "canaries"):
        if key in document:
            parts += [Text(""), Text(document[key]["says"], style="bold")]
            parts += [_repeats(document[key])] if key == "repeated" else []
    parts += [
        Text(""),
        *(Text(note, style="bold yellow" if "WARNING" in note else "dim") for note in document["notes"]),
    ]
    return Group(*parts)


def _literal(text: str) -> str:
    """Return a record's, a model's or a study's text for a terminal: neither markup nor control characters."""
    return escape(visible(text))


def texts_shown(shown: Sequence[Mapping[str, str]]) -> RenderableType:
    """Return prompts with the answers of base and tuned model, for the site's own screen."""
    table = Table(title="Answers (records: for this screen only)", title_justify="left", show_lines=True)
    for name in ("prompt", "reference", "base", "tuned"):
        table.add_column(name, ratio=1, overflow="fold")
    for row in shown:
        table.add_row(*(_literal(row[name]) for name in ("prompt", "reference", "base", "tuned")))
    return table


def estimate_of(document: Mapping[str, Any] | None) -> Estimate:
    """Return an estimate from its JSON values, in which null stands for a number that is not finite."""
    values = [math.nan if (document or {}).get(key) is None else float((document or {})[key]) for key in _BOUNDS]
    return Estimate(*values)


_BOUNDS = ("value", "low", "high")


def cell(document: Mapping[str, Any], arm: str) -> str:
    """Return base, tuned or difference of a measure with its interval."""
    return between(estimate_of(document[arm]), percent=document["percent"], signed=arm == "difference", level="")


def titled(document: Mapping[str, Any]) -> str:
    """Return a measure's title with its unit and direction."""
    arrow = "↓" if document["better"] == "lower" else "↑"
    return f"{document['title']}{' [%]' if document['percent'] else ''} {arrow}"


def counts_differ(measures: Mapping[str, Any]) -> bool:
    """Return whether measures are of different numbers of records. Otherwise the verdict says the number."""
    return len({found["records"] for found in measures.values()}) > 1


def _tells(found: Mapping[str, Any]) -> Text:
    return Text(TELLS[found["tells"]], style=_STYLES.get(found["tells"], "dim"))


class _Fitting:
    """A table that is made for a wide terminal, or for a narrow one, where each interval is below its value."""

    def __init__(self, make: Callable[[bool], Table]) -> None:
        """Take what makes the table: narrow or not."""
        self._make = make

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the wide table if it fits, else the narrow one."""
        wide = self._make(False)
        if Measurement.get(console, options.update(max_width=_ANY), wide).maximum <= options.max_width:
            yield wide
            return
        narrow = self._make(True)
        narrow.show_edge = narrow.pad_edge = False
        for column in narrow.columns:
            column.no_wrap = column.justify == "right"
        yield narrow


def _below(text: str, narrow: bool) -> str:
    """Return a value with its interval below it, or a title with its unit below it, where the table is narrow."""
    if not narrow:
        return text
    value, bracket, interval = text.partition(" (")
    return f"{value}\n{interval[:-1]}" if bracket else text.replace(" [%]", "\n[%]")


def _measures(title: str, measures: Mapping[str, Any]) -> RenderableType:
    return _Fitting(lambda narrow: _measures_table(title, measures, narrow))


def _measures_table(title: str, measures: Mapping[str, Any], narrow: bool) -> Table:
    table = Table(
        title=title or None,
        title_justify="left",
        caption="↑ higher is better, ↓ lower is better. Intervals of 95 % by a bootstrap over units.",
        caption_justify="left",
    )
    table.add_column("measure")
    for name in ("base", "tuned", "difference"):
        table.add_column(name, justify="right")
    table.add_column("tuned\nis" if narrow else "tuned is")
    if counted := counts_differ(measures):
        table.add_column("records", justify="right")
    for found in measures.values():
        word = _tells(found)
        cells = [_below(cell(found, arm), narrow) for arm in ("base", "tuned", "difference")]
        table.add_row(_below(titled(found), narrow), *cells, word, *([str(found["records"])] if counted else []))
    return table


def _rows(title: str, name: str, rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> RenderableType:
    """Return one line for each class or type, with some measures of the tuned model, and the base's of the last."""
    return _Fitting(lambda narrow: _rows_table(title, name, rows, wanted, narrow))


def _rows_table(title: str, name: str, rows: Sequence[Mapping[str, Any]], wanted: Sequence[str], narrow: bool) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(name)
    table.add_column("records", justify="right")
    first = next((row for row in rows if not row["hidden"]), None)
    if first is None:
        return table
    for key in wanted:
        table.add_column(_below(titled(first["measures"][key]), narrow), justify="right")
    base = "base:\n" if narrow else "base: "
    table.add_column(f"{base}{first['measures'][wanted[-1]]['title']}", justify="right")
    for row in rows:
        if row["hidden"]:
            table.add_row(_literal(row["label"]), "hidden", style="dim")
            continue
        cells = [_below(cell(row["measures"][key], "tuned"), narrow) for key in wanted]
        alone = estimate_of(row["measures"][wanted[-1]]["base"])
        table.add_row(_literal(row["label"]), str(row["records"]), *cells, as_text(alone.value, percent=True))
    return table


def _classes(document: Mapping[str, Any]) -> list[RenderableType]:
    if "classes" not in document:
        return []
    parts: list[RenderableType] = [Text("")]
    parts.append(_rows("Classes, tuned", "class", document["classes"], ("precision", "recall", "f1")))
    rows = document["confusion"]
    matrix = Table(title="Confusion, tuned")
    matrix.caption = "Of the texts of each class (row), % predicted as each class (column)."
    matrix.title_justify = matrix.caption_justify = "left"
    matrix.add_column("class")
    for place in range(len(rows)):
        matrix.add_column(str(place + 1), justify="right")
    for place, row in enumerate(rows):
        shares = row["predicted"]
        cells = (
            ["hidden" if row["hidden"] else ""]
            if shares is None
            else [
                Text(f"{shares[other['label']]:.0f}", style="bold green" if other is row else "")
                if other["label"] in shares
                else Text("·", style="dim")
                for other in rows
            ]
        )
        matrix.add_row(f"{place + 1} {_literal(row['label'])}", *cells)
    parts += [Text(""), matrix, Text("")]
    table = Table(title="Calibration of tuned", title_justify="left")
    for name in ("texts", "mean stated probability [%]", "right [%]"):
        table.add_column(name, justify="right")
    for row in document["calibration"]["tuned"]["table"]:
        table.add_row(str(row["texts"]), f"{100 * row['stated']:.1f}", f"{100 * row['right']:.1f}")
    base, tuned = (document["calibration"][arm]["ece"] for arm in ("base", "tuned"))
    table.caption = f"Expected calibration error: base {100 * base:.1f}, tuned {100 * tuned:.1f} points."
    table.caption_justify = "left"
    return [*parts, table]


def _positive(document: Mapping[str, Any]) -> list[RenderableType]:
    found = document.get("positive")
    if found is None:
        return []
    if "measures" not in found:
        return [Text(""), Text(found["says"])]
    table = Table(title=f"Thresholds for {_literal(found['label'])}, tuned [%]", title_justify="left")
    table.add_column("threshold", justify="right")
    table.add_column("flagged", justify="right")
    names = ("sensitivity", "specificity", "ppv", "npv")
    for name in names:
        table.add_column(name.upper() if len(name) == 3 else name, justify="right")
    for row in found["thresholds"]:
        cells = [between(estimate_of(row[name]), percent=True, level="") for name in names]
        mark = f"{row['threshold']:.3f}{' *' if row['youden'] else ''}"
        table.add_row(mark, f"{100 * row['flagged']:.1f}", *cells, style="bold" if row["youden"] else None)
    table.caption, table.caption_justify = f"* {found['says']}", "left"
    return [Text(""), _measures(f"{found['label']} against all others", found["measures"]), Text(""), table]


def _groups(kind: str, found: Mapping[str, Any]) -> RenderableType:
    if not found["groups"]:
        return Text(found["says"])
    return _Fitting(lambda narrow: _groups_table(kind, found, narrow))


def _groups_table(kind: str, found: Mapping[str, Any], narrow: bool) -> Table:
    table = Table(title=f"By {_literal(kind)}", title_justify="left", caption=found["says"], caption_justify="left")
    table.add_column(kind)
    table.add_column("units", justify="right")
    first = next((row for row in found["groups"] if not row["hidden"]), None)
    title = titled(first) if first else ""
    if narrow and title:
        table.title, title = f"By {_literal(kind)}: {title}", ""
    for arm in ("base", "tuned", "difference"):
        table.add_column(f"{title} {arm}".strip() if arm == "base" else arm, justify="right")
    table.add_column("tuned\nis" if narrow else "tuned is")
    for row in found["groups"]:
        if row["hidden"]:
            table.add_row(_literal(row["group"]), "hidden", style="dim")
            continue
        word = _tells(row)
        cells = [_below(cell(row, arm), narrow) for arm in ("base", "tuned", "difference")]
        table.add_row(_literal(row["group"]), str(row["units"]), *cells, word)
    return table


def _repeats(document: Mapping[str, Any]) -> Table:
    table = Table(title_justify="left")
    for name in ("answers", "words in a row"):
        table.add_column(name)
    for name in ("base [%]", "tuned [%]", "difference", "tuned alone (count)"):
        table.add_column(name, justify="right")
    for key, name in (("trained", "trained on"), ("unseen", "others")):
        found = document[key]
        for measure, own in found["measures"].items() if found else ():
            run = measure.rpartition("_")[2]
            cells = [cell(own, arm) for arm in ("base", "tuned", "difference")]
            table.add_row(f"{name} ({found['answers']})", run, *cells, str(found["only_tuned"][run]))
    return table
