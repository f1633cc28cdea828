"""An evaluation as one self-contained HTML page, for readers who do not program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from privet.client.pages.charts import Span, interval_chart, reliability_chart
from privet.client.pages.document import document as whole_page
from privet.client.pages.html import Child, Html, bullets, element, facts, joined, paragraph, table
from privet.client.release.bootstrap import between
from privet.client.release.bootstrap import shown as as_text
from privet.client.release.evaluation_text import TELLS, cell, counts_differ, estimate_of, titled

_ARMS = ("base", "tuned")


def evaluation_page(document: Mapping[str, Any]) -> str:
    """Return the page of an evaluation, from its document."""
    warnings: list[str] = []
    notes: list[Child] = []
    for note in document["notes"]:
        (warnings if "WARNING" in note else notes).append(note)
    parts: list[Child] = [element("h1", {}, f"Evaluation: {document['study']}")]
    parts.append(element("p", {"class": "lead"}, "A tuned model beside its base, on records that a site chose."))
    parts += [element("p", {"class": "bad"}, warning) for warning in warnings]
    parts += [element("p", {"class": _class_of(document)}, document["verdict"]), _tiles(document)]
    sections = [
        ("Figures", _figures(document)),
        ("Classes", _classes(document)),
        ("Calibration", _calibration(document)),
        ("Thresholds", _thresholds(document)),
        ("Entities", _entities(document)),
        *((f"By {kind}", _groups(kind, found)) for kind, found in document["groups"].items()),
        ("What the model repeats", _memory(document)),
        ("Notes", bullets(notes)),
        ("Identity", _identity(document)),
    ]
    parts += [element("section", {}, element("h2", {}, name), content) for name, content in sections if content]
    return whole_page(f"Evaluation: {document['study']}", parts)


def _class_of(document: Mapping[str, Any]) -> str:
    tells = document["measures"][document["primary"]]["tells"]
    return {"better": "good", "worse": "bad"}.get(tells, "note")


def _tiles(document: Mapping[str, Any]) -> Html:
    found = document["measures"][document["primary"]]
    unit = " %" if found["percent"] else ""
    tiles = [(f"{found['title']}, {arm}", _value(found, arm) + unit) for arm in _ARMS]
    tiles += [("records", str(document["records"])), ("units", str(document["units"]))]
    return element(
        "div",
        {"class": "tiles"},
        *(
            element("div", {"class": "tile"}, element("b", {}, value), element("span", {}, name))
            for name, value in tiles
        ),
    )


def _value(found: Mapping[str, Any], arm: str) -> str:
    return as_text(estimate_of(found[arm]).value, percent=found["percent"])


def _figures(document: Mapping[str, Any]) -> Html:
    parts: list[Child] = [_measures("Intervals of 95 %, by a bootstrap over units", document["measures"])]
    if "chance" in document:
        parts.append(paragraph(f"A guess is right in {100 * document['chance']:.1f} % of the questions."))
    if "most_frequent" in document:
        most = document["most_frequent"]
        share = f"{100 * most['accuracy']:.1f} %"
        parts.append(paragraph(f"To always answer {most['label']} would be right in {share} of the texts."))
    rows = {found["title"]: _spans(found) for found in document["measures"].values() if found["percent"]}
    if rows:
        chart = interval_chart("Base and tuned with intervals, in %", rows, _ARMS, document["verdict"])
        parts.append(chart)
    return joined(parts)


def _spans(found: Mapping[str, Any]) -> tuple[Span, Span]:
    scale = 100.0 if found["percent"] else 1.0
    spans = []
    for arm in _ARMS:
        own = estimate_of(found[arm])
        spans.append(Span(scale * own.value, scale * own.low, scale * own.high))
    return spans[0], spans[1]


def _measures(caption: str, measures: Mapping[str, Any]) -> Html:
    counted = counts_differ(measures)
    rows = [
        [
            titled(found),
            *(cell(found, arm) for arm in (*_ARMS, "difference")),
            TELLS[found["tells"]],
            *([str(found["records"])] if counted else []),
        ]
        for found in measures.values()
    ]
    head = ["measure", *_ARMS, "difference", "tuned is", *(["records"] if counted else [])]
    return table(caption, head, rows, numbers=(1, 2, 3, 5))


def _rows(caption: str, name: str, rows: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> Html:
    first = next((row for row in rows if not row["hidden"]), None)
    if first is None:
        return paragraph("Not shown: each is too rare in these files.")
    cells: list[list[Child]] = []
    for row in rows:
        if row["hidden"]:
            cells.append([row["label"], "hidden", *[""] * (len(wanted) + 1)])
            continue
        own = [cell(row["measures"][key], "tuned") for key in wanted]
        cells.append([row["label"], str(row["records"]), *own, _value(row["measures"][wanted[-1]], "base")])
    titles = [titled(first["measures"][key]) for key in wanted]
    head = [name, "records", *titles, f"base: {first['measures'][wanted[-1]]['title']}"]
    return table(caption, head, cells, numbers=range(1, len(head)))


def _classes(document: Mapping[str, Any]) -> Html | None:
    if "classes" not in document:
        return None
    found = _rows("Tuned, with intervals of 95 %", "class", document["classes"], ("precision", "recall", "f1"))
    rows: list[list[Child]] = []
    matrix = document["confusion"]
    for place, row in enumerate(matrix, start=1):
        shares = row["predicted"]
        if shares is None:
            rows.append([f"{place} {row['label']}", "hidden" if row["hidden"] else "", *[""] * (len(matrix) - 1)])
            continue
        cells = [f"{shares[o['label']]:.0f}" if o["label"] in shares else "·" for o in matrix]
        rows.append([f"{place} {row['label']}", *cells])
    head = ["class", *(str(place) for place in range(1, len(matrix) + 1))]
    caption = "Confusion, tuned: of the texts of each class (row), % predicted as each class (column)"
    return joined([found, table(caption, head, rows, numbers=range(1, len(head)))])


def _calibration(document: Mapping[str, Any]) -> Html | None:
    if "calibration" not in document:
        return None
    found = document["calibration"]["tuned"]
    base = document["calibration"]["base"]["ece"]
    said = f"Expected calibration error: base {100 * base:.1f}, tuned {100 * found['ece']:.1f} points."
    points = [(row["stated"], row["right"]) for row in found["table"]]
    rows = [[str(r["texts"]), f"{100 * r['stated']:.1f}", f"{100 * r['right']:.1f}"] for r in found["table"]]
    return joined(
        [
            paragraph(said),
            reliability_chart("Calibration of the tuned model, in bins of equally many texts", points, said),
            table(
                "The same in numbers", ["texts", "mean stated probability [%]", "right [%]"], rows, numbers=(0, 1, 2)
            ),
        ]
    )


def _thresholds(document: Mapping[str, Any]) -> Html | None:
    found = document.get("positive")
    if found is None:
        return None
    if "measures" not in found:
        return paragraph(found["says"])
    names = ("sensitivity", "specificity", "ppv", "npv")
    rows = []
    for row in found["thresholds"]:
        cells = [between(estimate_of(row[name]), percent=True, level="") for name in names]
        mark = f"{row['threshold']:.3f}{' *' if row['youden'] else ''}"
        rows.append([mark, f"{100 * row['flagged']:.1f}", *cells])
    head = ["threshold", "flagged", "sensitivity", "specificity", "PPV", "NPV"]
    return joined(
        [
            _measures(f"{found['label']} against all others", found["measures"]),
            table(f"{found['label']}, tuned, in %", head, rows, numbers=range(1, 6)),
            paragraph(f"* {found['says']}"),
        ]
    )


def _entities(document: Mapping[str, Any]) -> Html | None:
    if "entities" not in document:
        return None
    wanted = ("precision", "recall", "overlap_f1", "f1")
    return _rows("Tuned, with intervals of 95 %", "type", document["entities"], wanted)


def _groups(kind: str, found: Mapping[str, Any]) -> Html:
    shown = [row for row in found["groups"] if not row["hidden"]]
    if not shown:
        return paragraph(found["says"])
    rows: list[list[Child]] = []
    for row in found["groups"]:
        if row["hidden"]:
            rows.append([row["group"], "hidden", "", "", "", ""])
        else:
            cells = [cell(row, arm) for arm in (*_ARMS, "difference")]
            rows.append([row["group"], str(row["units"]), *cells, TELLS[row["tells"]]])
    unit = " in %" if shown[0]["percent"] else ""
    chart = interval_chart(
        f"{shown[0]['title']}{unit} by {kind}, with intervals",
        {row["group"]: _spans(row) for row in shown},
        _ARMS,
        found["says"],
    )
    head = [kind, "units", *_ARMS, "difference", "tuned is"]
    return joined([paragraph(found["says"]), chart, table(titled(shown[0]), head, rows, numbers=(1, 2, 3, 4))])


def _memory(document: Mapping[str, Any]) -> Html | None:
    parts: list[Child] = []
    repeated, canaries = document.get("repeated"), document.get("canaries")
    if repeated is not None:
        parts.append(paragraph(repeated["says"]))
        for key, name in (("trained", "Answers it was trained on"), ("unseen", "Other answers")):
            if repeated[key]:
                parts.append(_measures(name, repeated[key]["measures"]))
    if canaries is not None:
        parts += [paragraph(canaries["says"]), _measures("Planted canaries", canaries["measures"])]
    return joined(parts) if parts else None


def _identity(document: Mapping[str, Any]) -> Html:
    return facts(
        [
            ("Run", document["run"]),
            ("Study", document["study_digest"]),
            ("Adapter", document["adapter_digest"]),
            ("Files", ", ".join(document["files"])),
            ("Rows that are no records", ", ".join(f"{k}: {v}" for k, v in document["dropped"].items()) or "none"),
            ("Bootstrap", f"{document['replicates']} replicates over units, seed {document['seed']}"),
            ("Smallest group shown", f"{document['smallest']} units"),
        ]
    )
