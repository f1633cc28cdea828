"""What `privet data` says of a site's files: counts, faults with their rows, overlaps, and lines for the site file.

A person at the site reads this. It holds counts, names of files and columns, and places of rows. Of the contents it
shows labels that look like codes (`privet.client.training.proposals.unknown_labels`), and never a text or an id.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privet.client.budget.withdrawals import Withdrawn, withdrawn_of
from privet.client.editing import quoted
from privet.client.formats import FileFormat, toml_lines
from privet.client.site import IdRule, SiteConfig
from privet.client.training.data import DataReport, Records, concatenate, load_records
from privet.client.training.files import kept_columns
from privet.client.training.forms import Places, kinds_of, read_list
from privet.client.training.overlap import overlaps, part_of
from privet.client.training.proposals import decimals, letters_of, merged, proposed, unknown_labels
from privet.common.errors import DataError
from privet.common.study.study import Study

_FAR = 2.0


@dataclass(frozen=True)
class Examined:
    """One file.

    Attributes:
        path: The file.
        test: Whether it is a test file.
        records: Its records; None where it does not fit.
        report: Counts of them.
        fault: What is wrong with it, as it is read now.
        settings: Settings of the site file that fit it better.
        letters: The most frequent letters beyond ASCII in the proposed encoding.
    """

    path: Path
    test: bool
    records: Records | None = None
    report: DataReport | None = None
    fault: DataError | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    letters: str = ""


def examine(
    study: Study,
    train: Sequence[Path],
    test: Sequence[Path],
    form_of: Callable[[Path], FileFormat],
    rule: IdRule | None,
    withdrawn: Withdrawn | None = None,
) -> list[Examined]:
    """Read all files, each as the site file says; where one does not fit, find settings that do."""
    found = []
    for is_test, paths in ((False, train), (True, test)):
        for path in paths:
            found.append(_examined(study, path, form_of(path), rule, withdrawn, test=is_test))
    return found


def _examined(
    study: Study, path: Path, form: FileFormat, rule: IdRule | None, withdrawn: Withdrawn | None, *, test: bool
) -> Examined:
    records, report, fault = None, None, None
    try:
        records, report = load_records(path, study, training=not test, rule=rule, form=form, withdrawn=withdrawn)
    except DataError as error:
        fault = error
    settings = _settings(study, path, form, fault, withdrawn)
    letters = letters_of(path, settings["encoding"]) if "encoding" in settings else ""
    return Examined(path, test, records, report, fault, settings, letters)


def _settings(
    study: Study, path: Path, form: FileFormat, fault: DataError | None, withdrawn: Withdrawn | None
) -> dict[str, Any]:
    """Return the settings that fit a file better than its own."""
    columns, unit = study.data.columns, study.data.unit
    needed = list(dict.fromkeys([*columns.values(), *([unit] if unit else [])]))
    found = {} if fault is None else proposed(path, needed, form)
    try:
        table = kept_columns(path, study, needed, merged(form, found), withdrawn)
    except DataError:
        return found
    if unit is not None and form.decimal == "point" and decimals(table.columns[unit]):
        found["decimal"] = "comma"
    if fault is not None:
        raw = {role: table.columns[column] for role, column in columns.items()}
        owners = range(len(table.columns[needed[0]])) if unit is None else map(str, table.columns[unit])
        if labels := unknown_labels(*_labels(raw, list(owners), study, form)):
            found["labels"] = {**form.labels, **labels}
    return found


def _labels(
    raw: dict[str, list[Any]], owners: Sequence[Any], study: Study, form: FileFormat
) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    """Return the labels of a file that are not the study's, each with the unit of its row, and those of the study."""
    labels = labels_of(study)
    if "spans" in raw:
        known: Any = labels
        lists = [
            [span.get("label") for span in spans if isinstance(span, dict)] if isinstance(spans, list) else []
            for spans in map(read_list, raw["spans"])
        ]
    else:
        known = Places(labels)
        lists = [tags if isinstance(tags, list) else [] for tags in raw.get("tags", ())]
        lists = lists or [[label] for label in raw.get("label", ())]
    pairs = [(value, owner) for values, owner in zip(lists, owners, strict=False) for value in values]
    return [(value, owner) for value, owner in pairs if form.label(value) not in known], labels


def labels_of(study: Study) -> tuple[str, ...]:
    """Return the labels that files of a study have: its classes, or the kinds of its spans."""
    labels = tuple(study.task.labels)
    return kinds_of(labels) if "spans" in study.data.columns else labels


def foreign_labels(study: Study, site: SiteConfig) -> dict[str, str]:
    """Return the labels in a site's files that neither are the study's nor are mapped to one of them.

    Returns:
        For each that `unknown_labels` shows: the label of the study that differs from it in case and blanks alone, or
        `?`.
    """
    found: dict[str, str] = {}
    for each in examine(study, site.train, site.test, site.form_of, site.rule_for(study.data.unit), withdrawn_of(site)):
        known = site.form_of(each.path).labels
        proposed_here = each.settings.get("labels", {}).items()
        found |= {label: meant for label, meant in proposed_here if meant == "?" or known.get(label) != meant}
    return found


def label_command(site: Path, found: Mapping[str, str], study: Study) -> str:
    """Return in words how a person says what foreign labels mean."""
    options = " --label ".join(shlex.quote(f"{label}=LABEL") for label in found)
    return f"`privet site setup {site} --label {options}`, where each LABEL is one of {', '.join(labels_of(study))}"


def proposal(files: Sequence[Examined], table: str = "format") -> list[str]:
    """Return the lines of a site file that fit these files: for all of them, or for each that needs its own."""
    needing = [each for each in files if each.settings]
    if not needing:
        return []
    first = needing[0].settings
    if all(each.settings == first for each in files):
        return toml_lines(table, first)
    lines = []
    for each in needing:
        lines += toml_lines(f"{table}.files.{quoted(str(each.path))}", each.settings)
    return lines


def warnings_of(study: Study, files: Sequence[Examined], site: str) -> list[str]:
    """Return what stands in training and in test files, in counts."""
    parts = []
    for test in (False, True):
        read = [(each.path, each.records) for each in files if each.test is test and each.records is not None]
        if read:
            parts.append(part_of(site, [path for path, _ in read], [records for _, records in read], test=test))
    return overlaps(study, parts)


def units_of(study: Study, records: Records) -> int:
    """Return the number of units of privacy."""
    return len(set(records.units)) if study.privacy.unit == "patient" else len(records)


def training_records(files: Sequence[Examined]) -> Records:
    """Return the records of all training files that fit."""
    return concatenate([each.records for each in files if not each.test and each.records is not None])


def proposed_count(units: int) -> int:
    """Return a count to declare for a number of units: two digits of it, and tens at the finest.

    The count is public, and no privacy guarantee covers it: an exact one would tell whether somebody was added.
    """
    scale: int = 10 ** max(1, len(str(units)) - 2)
    return max(scale, (units + scale // 2) // scale * scale)


def count_lines(units: int, declared: int | None, largest: int, *, at_site: bool = True) -> list[str]:
    """Return the proposal for `declared_count`, and what is wrong with the count that a site declares.

    Args:
        units: The number of units.
        declared: What the site file declares; None if it declares nothing.
        largest: Largest count that the study admits.
        at_site: Whether there is a site file. If not, only what is wrong is returned.
    """
    count = proposed_count(units)
    if not at_site:
        lines = []
    elif declared is None:
        lines = [
            f"declared_count = {count}",
            "  (add this line to the site file, above its first table. The count is public,",
            "  so it is rounded. Keep it when records are added)",
        ]
    else:
        lines = [f"the site file declares {declared} units; its files hold about {count}. Keep the declared count"]
    if declared is not None and not units / _FAR <= declared <= units * _FAR:
        lines.append(f"  WARNING: the site file declares {declared}, more than {_FAR:g} times away from its files.")
    if (declared or count) > largest:
        lines.append(f"  WARNING: the study allows at most {largest} (aggregation.largest_count).")
    return lines
