"""Read a site's files: separated values, JSON Lines, JSON arrays or Parquet, as the site file says they are written.

Values are unchanged, but for what the site's settings say of labels and numbers. `read_columns` reads the columns that
a study needs; `read_rows` yields whole rows, for predictions.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from privet.client.budget.withdrawals import Withdrawn
from privet.client.formats import Delimiter, FileFormat
from privet.client.training.csvrows import Body, check_length, read_body
from privet.client.training.decoding import check_file, kind_of, text_of
from privet.client.training.headings import FEWEST, believed, listed
from privet.client.training.ids import names_by_rule
from privet.client.training.proposals import hint_for
from privet.common.errors import DataError
from privet.common.files import close_to
from privet.common.study.sections import FORMS
from privet.common.study.study import Study

PLAIN = FileFormat()
"""How a file is written if nobody says otherwise."""
_SHOWN = 5
_T = TypeVar("_T")
Columns = dict[str, list[Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Columns of a file.

    Attributes:
        kind: `csv`, `tsv`, `jsonl`, `json` or `parquet`, with `.gz` if the file is compressed.
        columns: The values by name of the column, all of one length.
        lines: The first line of each row, from 1; None where rows are not lines.
        rows: The number of each row in the file, from 0; None where all of them are here.
    """

    kind: str
    columns: Columns
    lines: Sequence[int] | None = None
    rows: Sequence[int] | None = None

    def places(self, rows: Sequence[int]) -> str:
        """Return where rows are, by number from 1 and by line: the first few of them. Rows are counted from 0."""
        shown, more = rows[:_SHOWN], len(rows) - _SHOWN
        named = ", ".join(str((row if self.rows is None else self.rows[row]) + 1) for row in shown)
        text = f"{'row' if len(rows) == 1 else 'rows'} {named}"
        if self.lines is not None:
            lines = ", ".join(str(self.lines[row]) for row in shown)
            text += f" (line{'' if len(rows) == 1 else 's'} {lines})"
        return text + (f" and {more} more" if more > 0 else "")


def read_columns(path: Path, study: Study, names: Sequence[str], form: FileFormat = PLAIN) -> Table:
    """Return some columns of a file, with the site's spellings of labels and numbers as they are in the file.

    Raises:
        DataError: The file is missing, of an unknown kind, or does not match its format; or it has no such column.
    """
    return _guarded(path, lambda: _read_columns(path, study, names, form))


def kept_columns(
    path: Path, study: Study, names: Sequence[str], form: FileFormat = PLAIN, withdrawn: Withdrawn | None = None
) -> Table:
    """Return some columns of a file without the rows of people who were withdrawn, as if the file did not have them.

    Raises:
        DataError: As `read_columns`; also if people were withdrawn, and the file lacks the column of their ids.
    """
    if not withdrawn or withdrawn.column is None:
        return read_columns(path, study, names, form)
    table = read_columns(path, study, list(dict.fromkeys([*names, withdrawn.column])), form)
    gone = left_out(path, withdrawn, form)
    rows = [row for row, value in enumerate(table.columns[withdrawn.column]) if not gone(value)]
    lines = None if table.lines is None else [table.lines[row] for row in rows]
    columns = {name: [table.columns[name][row] for row in rows] for name in names}
    return Table(table.kind, columns, lines, rows)


def left_out(path: Path, withdrawn: Withdrawn, form: FileFormat) -> Callable[[Any], bool]:
    """Return a function that says of a value of the column of patients whether its rows are left out.

    The function raises `DataError` for a value that cannot be compared with ids, such as a decimal of Parquet: a study
    that names no unit would otherwise read the rows of people who were withdrawn.
    """
    known: dict[Any, bool] = {}

    def gone(value: Any) -> bool:
        if not isinstance(value, str | int | float):
            if value is None:
                return False
            raise _no_id(path, withdrawn.column)
        key = (type(value), value)
        if key not in known:
            known[key] = _is_held(path, withdrawn, form, value)
        return known[key]

    return gone


def _is_held(path: Path, withdrawn: Withdrawn, form: FileFormat, value: str | float) -> bool:
    names = names_by_rule(form.number(value))
    if isinstance(value, float) and not math.isnan(value):
        check_exact(path, str(withdrawn.column), form)
        if not names:  # no whole number, or one that a float may have rounded
            raise _no_id(path, withdrawn.column)
    return withdrawn.holds(names)


def _no_id(path: Path, column: str | None) -> DataError:
    return DataError(
        f"{path}: expected ids as strings or whole numbers in the column {column}, by which people were withdrawn at "
        "this site; found other values, which cannot be compared with their ids",
        "export the column again as integers or strings",
    )


def rows_left_out(path: Path, withdrawn: Withdrawn, form: FileFormat = PLAIN) -> int:
    """Return how many rows of a file are left out. Raises as `read_rows`."""
    gone = left_out(path, withdrawn, form)
    return sum(gone(row.get(withdrawn.column or "")) for row in read_rows(path, form))


def read_rows(path: Path, form: FileFormat = PLAIN) -> Iterator[Row]:
    """Yield the rows of a file with all their columns, one after another.

    Raises:
        DataError: As `read_columns`; also a CSV row that is shorter than the header, or two columns of one name.
    """
    rows = _guarded(path, lambda: _rows(path, form))
    while True:
        row = _guarded(path, lambda: next(rows, None))
        if row is None:
            return
        yield row


def _guarded(path: Path, read: Callable[[], _T]) -> _T:
    """Return what `read` returns; a fault of the disk becomes a sentence."""
    try:
        return read()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or type(error).__name__})",
            "check the file's permissions, and its disk",
        ) from None


def _read_columns(path: Path, study: Study, names: Sequence[str], form: FileFormat) -> Table:
    check_file(path)
    kind = kind_of(path)
    if kind.name in _SEPARATED and "tokens" in study.data.columns:
        raise DataError(
            f"{path}: the columns {', '.join(study.data.columns.values())} hold lists, which CSV cannot store",
            "convert the file to JSON Lines (.jsonl) or Parquet (.parquet)",
        )
    if kind.name == "parquet":
        return Table(kind.text, _parquet_columns(path, names, form))
    if kind.name in _SEPARATED:
        return _csv_columns(path, names, form)
    lines: list[int] = []
    columns: Columns = {name: [] for name in names}
    found: Counter[str] = Counter()
    for line, row in _objects(path, form):
        lines.append(line)
        found.update(row.keys())
        for name in names:
            columns[name].append(row.get(name))
    if found:
        usual = [name for name, rows in found.items() if rows >= min(FEWEST, len(lines))]
        _check_columns(path, list(found), names, form, usual)
    return Table(kind.text, columns, lines if kind.name == "jsonl" else None)


def _rows(path: Path, form: FileFormat) -> Iterator[Row]:
    check_file(path)
    kind = kind_of(path)
    if kind.name == "parquet":
        return _parquet_rows(path, form)
    if kind.name in _SEPARATED:
        return _csv_rows(path, form)
    return (row for _, row in _objects(path, form))


# --- separated values ------------------------------------------------------------------------------------

_SEPARATED: dict[str, Delimiter] = {"csv": "comma", "tsv": "tab"}


def _body(path: Path, form: FileFormat) -> Body:
    return read_body(path, text_of(path, form.encoding), form, _SEPARATED[kind_of(path).name])


def _csv_columns(path: Path, needed: Sequence[str], form: FileFormat) -> Table:
    """Read every value as a string, unchanged: "NA" and "001" included."""
    body = _body(path, form)
    header = body.header
    if not set(header) & set(needed):
        # Without a header line, these names would be a record, so the message does not quote them.
        raise DataError(
            f"{path}: expected the column names {', '.join(needed)} in the first line, found {len(header)} other "
            f"values separated by {body.separated}" + _other_form(header),
            hint_for(path, needed, form)
            + "write the column names into the first line, or say which they are: "
            + _mapping(needed),
            tuple(needed),
        )
    _check_columns(path, header, needed, form)
    columns: Columns = {name: [] for name in needed}
    places = [(values, header.index(name)) for name, values in columns.items()]
    least = max(place for _, place in places) + 1
    lines: list[int] = []
    for line, row in body.rows:
        check_length(path, line, row, least)
        lines.append(line)
        for values, place in places:
            values.append(row[place])
    return Table(kind_of(path).text, columns, lines)


def _csv_rows(path: Path, form: FileFormat) -> Iterator[Row]:
    body = _body(path, form)
    if len(set(body.header)) < len(body.header):
        raise DataError(f"{path} has several columns of one name", "give each column its own name")
    for line, row in body.rows:
        check_length(path, line, row, len(body.header))
        yield dict(zip(body.header, row, strict=True))


# --- JSON ------------------------------------------------------------------------------------------------


def _objects(path: Path, form: FileFormat) -> Iterator[tuple[int, Row]]:
    """Yield the line and the content of each object of JSON Lines, without empty lines; of an array, its number."""
    text = text_of(path, form.encoding)
    lines = kind_of(path).name == "jsonl"
    for number, row in _json_lines(path, text) if lines else enumerate(_json_array(path, text), start=1):
        named = None if not isinstance(row, dict) else dict(zip(form.names(list(row)), row.values(), strict=True))
        if named is None or len(named) < len(row):
            raise DataError(
                f"{path}: {'line' if lines else 'row'} {number} is not one JSON object in which each name stands once",
                "write each row as one JSON object on its own line (JSON Lines)"
                if lines
                else "write each row as one JSON object of the array",
            )
        yield number, named


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    at, number = 0, 0
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line, at, number = text[at:end], end + 1, number + 1
        if line.strip():
            try:
                yield number, json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError):
                yield number, None


def _json_array(path: Path, text: str) -> list[Any]:
    if not text.lstrip().startswith("["):
        raise DataError(
            f"{path}: expected an array of objects, as its name ends in .json; found another beginning",
            "rename it to .jsonl if each line is one object; otherwise export the rows as one array",
        )
    try:
        found = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        where = f" in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path} is not a JSON array of objects{where}", "export the file again") from None
    return list(found)


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object of JSON. Of a name that stands twice, readers silently drop one value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError
    return found


# --- Parquet ---------------------------------------------------------------------------------------------

# Arrow's own threads would live on after reading (of its pools, and of `pre_buffer`), and a process that ends at once,
# such as a refused command, can be aborted by one that is only starting. They save nothing here: rows become Python's.


def _parquet_columns(path: Path, needed: Sequence[str], form: FileFormat) -> Columns:
    """Read the needed columns of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # An open file, as a path may be taken for the address of another place.
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            stored = list(file.schema_arrow.names)
            names = form.names(stored)
            _check_columns(path, names, needed, form)
            own = {name: stored[names.index(name)] for name in needed}
            table = file.read(columns=list(own.values()), use_threads=False)
            return {name: table.column(own[name]).to_pylist() for name in needed}
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _not_parquet(path, error) from None


def _parquet_rows(path: Path, form: FileFormat) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            for batch in file.iter_batches(256, use_threads=False):
                for row in batch.to_pylist():
                    yield dict(zip(form.names(list(row)), row.values(), strict=True))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise _not_parquet(path, error) from None


def _not_parquet(path: Path, error: Exception) -> Exception:
    """Return the error of a file that is not Parquet; a fault of the disk as it is."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return DataError(f"{path} is not a readable Parquet file", "export the file again")


def check_exact(path: Path, column: str, form: FileFormat = PLAIN) -> None:
    """Check that a column of floats holds every whole number below 2^53 exactly.

    Raises:
        DataError: The file stores the column in less than 64 bits, so that two ids may have become one or changed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() != ".parquet":
        return
    schema = pq.read_schema(path)
    kind = schema.types[form.names(schema.names).index(column)]
    if pa.types.is_floating(kind) and kind.bit_width < 64:
        raise DataError(
            f"{path}: expected ids as integers, strings or floats of 64 bits in the column {column}, found floats "
            f"of {kind.bit_width} bits, which round large numbers",
            "export the column again as integers or strings",
        )


# --- the contract ----------------------------------------------------------------------------------------


def _check_columns(
    path: Path, found: Sequence[str], needed: Sequence[str], form: FileFormat, usual: Sequence[str] | None = None
) -> None:
    """Check that a file has the needed columns, once. Of others, the error names the `usual` ones, if it may."""
    missing = [name for name in needed if name not in found]
    if missing:
        usual = found if usual is None else usual
        other = [name for name in usual if name not in needed] if believed(usual, needed) else []
        raise DataError(
            f"{path}: expected the columns {', '.join(missing)}, found only {listed(usual, needed)}"
            + "".join(f"; did you mean {near[:64]} for {name}?" for name in missing if (near := close_to(name, other)))
            + _other_form(found),
            hint_for(path, needed, form)
            + "rename the columns of the file to the names in data.columns and data.unit of the study, or say which "
            f"they are: {_mapping(missing)}",
            tuple(missing),
        )
    repeated = [name for name in needed if list(found).count(name) > 1]
    if repeated:
        raise DataError(f"{path} has several columns named {', '.join(repeated)}", "keep one column of each name")


def _mapping(names: Sequence[str]) -> str:
    """Return how a person says which columns of a file are these ones of the study."""
    options = " --column ".join(shlex.quote(f"COLUMN={name}") for name in names)
    first = names[0]
    return (
        f"`privet site setup SITE --column {options}`, where each COLUMN is the name of a column in the file (in a "
        f'simulation, write format = {{ columns = {{ COLUMN = "{first}" }} }} under [simulation.sites.NAME])'
    )


def _other_form(found: Sequence[str]) -> str:
    """Return a sentence about the form of records that the columns of a file suggest; empty if there is none."""
    for kind, forms in FORMS.items():
        for form in forms:
            if set(form.needed) <= set(found):
                pairs = ", ".join(f'{role} = "{role}"' for role in (*form.needed, *form.optional) if role in found)
                return f"; a study of kind {kind} reads these with data.columns = {{ {pairs} }}"
    return ""
