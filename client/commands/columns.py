"""Which columns of a site's files a study reads: asked by `privet site setup` and `privet site approve`.

A site may name its columns as it likes: Befund where the study says note. The site file holds the mapping, in
`format.columns`. It is never guessed: a person says which column is which, and each answer is written at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from privet.client.commands.guide import Guide
from privet.client.commands.labels import asked_studies
from privet.client.scan.patterns import may_be_name
from privet.client.training.glance import columns_of, lacking_columns
from privet.client.training.headings import believed
from privet.common.errors import StudyError
from privet.common.study.study import Study


def take_columns(guide: Guide, given: Mapping[str, str]) -> None:
    """Write which column of a study a column of the files is, as options say.

    Raises:
        StudyError: No training file has such a column.
    """
    site = guide.site
    mapped = {} if site.format is None else site.format.columns
    own = {study: column for column, study in mapped.items()}
    found = dict.fromkeys(own.get(name, name) for path in site.train for name in columns_of(site, path))
    shown = ", ".join(_shown([*found]) if believed(found, own) else []) or "others"
    for column in given:
        if column not in found:
            raise StudyError(
                f"--column {column}={given[column]}: expected a column of the files, found {shown}",
                f"run `privet site setup {guide.file} --column {shlex.quote(f'COLUMN={given[column]}')}` with one of "
                "these",
            )
    if given:
        _write(guide, given)


def ask_columns(guide: Guide, study: str | None) -> list[str]:
    """Ask for the columns that the files lack, of a study as `named_study` takes it, or of those proposed now.

    Returns:
        The names of the studies that still need columns which the files lack.
    """
    return [each.name for each in asked_studies(guide, study) if not settle_columns(guide, each)]


def settle_columns(guide: Guide, study: Study) -> bool:
    """Ask which columns of the files are those that a study needs and the files lack; return whether none is left."""
    needed, found = lacking_columns(guide.site, study)
    if not needed:
        return True
    found = _shown(found)
    guide.explain("Columns", f"{columns_said(study, needed, found)} Say which column is which.")
    site = guide.site
    if site.format is not None and any("columns" in own.model_fields_set for own in site.format.files.values()):
        guide.say("[format.files] in the site file names columns of single files. Complete them there by hand.")
        return False
    for name in needed if found else ():
        answer = guide.ask(
            f"Column of your files that is {name} (Enter: decide later)",
            f"--column {shlex.quote(f'COLUMN={name}')}",
            partial(_one_of, guide.file, name, found),
            "",
        )
        if answer:
            _write(guide, {answer: name})
            found.remove(answer)
    needed, found = lacking_columns(guide.site, study)
    if needed:
        guide.say(f"Not mapped yet: {', '.join(needed)}. Until then the site refuses the study. To map them:")
        guide.say(f"{column_command(guide.file, needed)}.")
    return not needed


def columns_said(study: Study, needed: Sequence[str], found: Sequence[str]) -> str:
    """Return in one sentence which columns of a study the files lack, and which others they have."""
    others = f"they have {', '.join(_shown(found)) or 'no others that may be shown (is the first line a record?)'}"
    return f"The study {study.name} needs the columns {', '.join(needed)}, which your files lack; {others}."


def column_command(site: Path, needed: Sequence[str]) -> str:
    """Return in words how a person says which columns of the files a study's are."""
    own = [f"COLUMN{number}" if len(needed) > 1 else "COLUMN" for number in range(1, len(needed) + 1)]
    options = " --column ".join(shlex.quote(f"{column}={name}") for column, name in zip(own, needed, strict=True))
    them = f"{', '.join(own[:-1])} and {own[-1]} are" if len(own) > 1 else "COLUMN is"
    return f"`privet site setup {site} --column {options}`, where {them} what your files name so"


def _shown(found: Sequence[str]) -> list[str]:
    """Return names of columns; none where one of them may be a value of a record."""
    return list(found) if all(map(may_be_name, found)) else []


def _one_of(file: Path, name: str, found: Sequence[str], answer: str) -> str:
    if answer and answer not in found:
        raise StudyError(
            f"the column {name}: expected one of {', '.join(found)}, found {answer}",
            f"run `privet site setup {file} --column {shlex.quote(f'COLUMN={name}')}` with one of these",
        )
    return answer


def _write(guide: Guide, more: Mapping[str, str]) -> None:
    """Write a mapping. The column of patients is named as studies name it, so it follows."""
    site = guide.site
    before = {} if site.format is None else site.format.columns
    values: dict[str, object] = {"format.columns": {**before, **more}}
    own = next((column for column, study in before.items() if study == site.patient_column), site.patient_column)
    if own is not None and own in more:
        values["patient_column"] = more[own]
    guide.put(**values)
