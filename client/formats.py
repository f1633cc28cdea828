"""How a site's files are written: separator, encoding, decimal mark, names of columns, spellings of labels.

These settings are the site's own. They stand in the site file, never in the study, so they do not change its digest.
Nothing is guessed while training: a file that does not match its settings is refused (`privet.client.training.files`),
and `privet data` proposes settings that match (`privet.client.training.proposals`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from privet.client.editing import quoted, toml_value
from privet.common.errors import StudyError
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import Section

Delimiter = Literal["comma", "semicolon", "tab", "pipe"]
Encoding = Literal["utf-8", "utf-8-sig", "cp1252", "latin-1", "utf-16", "utf-16-le", "utf-16-be"]
Decimal = Literal["point", "comma"]

DELIMITERS: Mapping[Delimiter, str] = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
"""The character of each delimiter, by its name in the site file."""
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]+),([0-9]+)")


class FileFormat(Section):
    """How one file is written. Settings that a kind of file does not have are not used: Parquet has no delimiter."""

    delimiter: Delimiter | None = None
    """What separates the values of a row. Without it: a comma; in a file whose name ends in .tsv, a tab."""
    encoding: Encoding = "utf-8"
    """Encoding of a text file. A byte order mark before UTF-8 is accepted. utf-16 needs one."""
    decimal: Decimal = "point"
    """Decimal mark of numbers in the columns of labels and of patients. Texts are never changed."""
    strip_header: bool = False
    """Remove white space around the names of columns."""
    columns: dict[str, str] = Field(default={})
    """The study's name for each column of the file that has another name."""
    labels: dict[str, str] = Field(default={})
    """The study's label for each label of the file that is spelt differently. Several may become one label."""

    @field_validator("columns")
    @classmethod
    def _columns_differ(cls, columns: dict[str, str]) -> dict[str, str]:
        if len(set(columns.values())) < len(columns):
            raise ValueError("expected each column of the study once, found one twice")
        return columns

    def separator(self, default: Delimiter) -> str:
        """Return the character that separates values, in a file whose own delimiter is `default`."""
        return DELIMITERS[self.delimiter or default]

    def names(self, header: Sequence[str]) -> list[str]:
        """Return the names of columns as studies give them."""
        own = [name.strip() for name in header] if self.strip_header else list(header)
        return [self.columns.get(name, name) for name in own]

    def number(self, value: Any) -> Any:
        """Return a value; a text that is a number with the file's decimal mark, with a decimal point."""
        found = _DECIMAL_COMMA.fullmatch(value) if self.decimal == "comma" and isinstance(value, str) else None
        return value if found is None else f"{found[1]}.{found[2]}"

    def label(self, value: Any) -> Any:
        """Return a label as the study spells it; any other value unchanged."""
        if isinstance(value, bool) or not isinstance(value, str | int):
            return value
        found = self.labels.get(str(value))
        return self.number(value) if found is None else found


class FormatSection(FileFormat):
    """`[format]` in the site file: how all files are written, and what is different in some of them."""

    files: dict[Path, FileFormat] = Field(default={})
    """Settings of single files, by path, as in `train` and `test`. They replace those of all files."""

    def of(self, path: Path) -> FileFormat:
        """Return how one file is written."""
        common = {name: getattr(self, name) for name in self.model_fields_set if name != "files"}
        own = self.files.get(path, self.files.get(path.resolve()))
        return FileFormat(
            **common | ({} if own is None else {name: getattr(own, name) for name in own.model_fields_set})
        )

    def within(self, root: Path) -> Self:
        """Return these settings with the paths that are relative to `root` made absolute."""
        files = {(root / path).resolve(): own for path, own in self.files.items()}
        return self.model_copy(update={"files": files}) if files else self

    def lines(self) -> list[str]:
        """Return these settings as lines of a site file."""
        found = toml_lines("format", {name: getattr(self, name) for name in sorted(self.model_fields_set - {"files"})})
        for path, own in self.files.items():
            settings = {name: getattr(own, name) for name in sorted(own.model_fields_set)}
            found += toml_lines(f"format.files.{quoted(str(path))}", settings)
        return found


class Formatted(Section):
    """A table that names files, in `train` and `test`, and says how they are written."""

    train: tuple[Path, ...] = ()
    """Training files."""
    test: tuple[Path, ...] = ()
    """Test files."""
    format: Annotated[FormatSection | None, Field(exclude_if=lambda value: value is None)] = None
    """How these files are written, where they are not written as RFC 4180 and UTF-8 say, and which labels of the study
    their labels are. `privet data` proposes it."""

    def within(self, root: Path) -> Self:
        """Return this table with the paths that are relative to `root` made absolute.

        Raises:
            StudyError: `format.files` names a file that `train` and `test` do not name: it would apply to nothing.
        """
        train, test = (tuple((root / path).resolve() for path in paths) for paths in (self.train, self.test))
        own = None if self.format is None else self.format.within(root)
        for path in () if own is None else own.files:
            if path not in (*train, *test):
                raise StudyError(
                    f"format.files: expected files that `train` or `test` names, found {path}",
                    "correct the path under [format.files] in the site file (in a simulation: in the study file)",
                )
        return self.model_copy(update={"train": train, "test": test, "format": own})

    def form_of(self, path: Path) -> FileFormat:
        """Return how one of the files is written."""
        return FileFormat() if self.format is None else self.format.of(path)


def load_format(path: Path) -> FormatSection:
    """Return the `[format]` of a site file, or of a file with this table alone.

    Raises:
        StudyError: The file is missing, or the table is not valid.
    """
    found = read_toml(path, what="site").get("format", {})
    return validate(FormatSection, found, what=f"table [format] of {path}").within(path.parent)


def training_files(path: Path) -> tuple[Path, ...]:
    """Return the training files that a site file names; none for a file with the table [format] alone."""
    named = read_toml(path, what="site").get("train", ())
    return tuple((path.parent / name).resolve() for name in named if isinstance(name, str))


def toml_lines(table: str, settings: Mapping[str, Any]) -> list[str]:
    """Return a table of a site file: its name, and one line for each of its settings."""
    return [f"[{table}]", *(f"{name} = {toml_value(value)}" for name, value in settings.items() if value is not None)]


def inline(settings: Mapping[str, Any]) -> str:
    """Return settings as one line of a site file: `format = { ... }`."""
    return f"format = {toml_value(settings)}"
