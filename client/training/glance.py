"""A first look at a site's data files, before there is any study: their columns, and how many units they hold.

For the set-up of a site, whose operator is asked for what follows from it. `privet data` checks files against a study.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from privet.client.site import IdRule, SiteConfig
from privet.client.training.files import read_rows
from privet.client.training.headings import believed, listed
from privet.client.training.ids import unit_names, units_by_rule
from privet.common.errors import DataError, StudyError
from privet.common.study.study import Study


def columns_of(site: SiteConfig, path: Path) -> list[str]:
    """Return the names of a file's columns; of JSON, those of the first row.

    Raises:
        DataError: As `read_rows`.
    """
    return list(next(read_rows(path, site.form_of(path)), {}))


def check_column(site: SiteConfig, path: Path, column: str, mend: str) -> None:
    """Check that a file has the column of patients. `mend` is what to do if it has not.

    Raises:
        StudyError: It has no such column. DataError: As `read_rows`.
    """
    found = columns_of(site, path)
    if column not in found:
        raise StudyError(
            f"{path.name} has no column {column!r}; found {columns_named(site, path, found)}",
            f"{mend}; if the columns look wrong, `[format]` in the site file says how the file is written",
        )


def columns_named(site: SiteConfig, path: Path, found: Sequence[str]) -> str:
    """Return in words which columns of a site's file there are: by name, unless the names may be a record."""
    given = [*site.form_of(path).columns.values(), *([site.patient_column] if site.patient_column else [])]
    return listed(found, given)


def lacking_columns(site: SiteConfig, study: Study) -> tuple[list[str], list[str]]:
    """Return the columns of a study that a site's files lack, and the others of the first file that lacks one.

    Nothing of a file that cannot be read, and no names that may be a record.
    """
    needed = [*study.data.columns.values(), *([study.data.unit] if study.data.unit else [])]
    lacking: dict[str, None] = {}
    others: list[str] = []
    for path in (*site.train, *site.test):
        with suppress(DataError):
            found = columns_of(site, path)
            if missing := [name for name in needed if name not in found]:
                others = others or [name for name in found if name not in needed and believed(found, needed)]
                lacking |= dict.fromkeys(missing)
    return list(lacking), others


def units_under(site: SiteConfig, column: str) -> dict[IdRule, int | None]:
    """Return the number of units that the ids in a column come to under each rule.

    None for `number` where an id is no whole number; for all rules where they cannot be compared.

    Raises:
        DataError: As `read_rows`; or a file lacks the column.
    """
    values = _values(site, column)
    try:
        return units_by_rule(unit_names(values, None, column, "the files"))
    except DataError:
        return {}


def count_units(site: SiteConfig) -> int:
    """Return the number of units in a site's training files: of distinct patients, or of rows.

    Raises:
        DataError: As `units_under`; or an id is no whole number under `number`.
    """
    if site.patient_column is None:
        return sum(1 for path in site.train for _ in read_rows(path, site.form_of(path)))
    column = site.patient_column
    names = unit_names(_values(site, column), site.patient_ids, column, "the files")
    return len({name for name in names if name})


def _values(site: SiteConfig, column: str) -> list[Any]:
    values: list[Any] = []
    for path in site.train:
        for row in read_rows(path, site.form_of(path)):
            if column not in row:
                raise DataError(f"{path}: there is no column {column}", "correct `patient_column` in the site file")
            values.append(row[column])
    return values
