"""Read a site's files: CSV, JSON Lines or Parquet. Only the needed columns, with unchanged values."""

from __future__ import annotations

import csv
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from privet.common.errors import DataError
from privet.common.study.study import Study

_LISTED = 20
Columns = dict[str, list[Any]]


# --- reading ---------------------------------------------------------------------------------------------


def reader_of(path: Path, study: Study) -> tuple[str, Callable[[Path, Sequence[str]], Columns]]:
    """Return the format of `path` and its reader, after checking that the file exists and is not empty."""
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path.name}: expected a file name that ends in {', '.join(_READERS)}",
            "convert the file to one of these formats, or rename it if only its name is unusual",
        )
    if not path.is_file():
        raise DataError(
            f"data file {path.name}: " + ("it is a directory, not a file" if path.is_dir() else "it does not exist"),
            "check the path of the file",
        )
    if path.stat().st_size == 0:
        raise DataError(f"the data file {path.name} is empty: it has 0 bytes", "export the file again")
    format_, read = _READERS[path.suffix.lower()]
    if format_ == "csv" and study.task.kind == "token-classification":
        raise DataError(
            f"{path.name}: the columns {', '.join(study.data.columns.values())} hold lists, which CSV cannot store",
            "convert the file to JSON Lines (.jsonl) or Parquet (.parquet)",
        )
    return format_, read


def _read_json_lines(path: Path, needed: Sequence[str]) -> Columns:
    """Read one JSON object a line, with exactly the types of the file."""
    table: Columns = {name: [] for name in needed}
    found: dict[str, None] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path.name}: line {number} is not one JSON object in UTF-8",
                    "write each row as one JSON object on its own line (JSON Lines)",
                )
            found.update(dict.fromkeys(row))
            for name in needed:
                table[name].append(row.get(name))
    if not found:
        return table
    _check_columns(list(found), needed, path.name)
    return table


def _read_csv(path: Path, needed: Sequence[str]) -> Columns:
    """Read a CSV file with every value as a string, unchanged: "NA" and "001" included."""
    unreadable = DataError(
        f"{path.name} is not a readable CSV file",
        "export it as UTF-8, separated by commas, with one name per column in its first line, no row longer than "
        "that line, and every quote closed",
    )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next((row for row in csv.reader(file) if row), [])
            has_rows = any(line.strip() for line in file)
    except (UnicodeDecodeError, csv.Error):
        raise unreadable from None
    if not set(header) & set(needed):
        # Without a header line, these names would be a record, so the message does not quote them.
        raise DataError(
            f"{path.name}: expected the column names {', '.join(needed)} in the first line, found {len(header)} other "
            "values separated by commas",
            "write the column names into the first line, or correct data.columns in the study",
        )
    _check_columns(header, needed, path.name)
    if not has_rows:
        return {name: [] for name in needed}

    from datasets import Dataset, Features, Value

    # Columns outside the contract get new names, because their own may repeat. None of these columns is kept.
    names = [name if name in needed else f"(column {index})" for index, name in enumerate(header)]
    with _converting(path, unreadable) as (link, cache):
        dataset = Dataset.from_csv(
            link,
            features=Features({name: Value("string") for name in names}),
            cache_dir=cache,
            keep_in_memory=True,
            column_names=names,
            header=0,
            index_col=False,  # otherwise a row longer than the header shifts every column by one
            na_filter=False,
        )
        return _to_lists(dataset, needed)


def _read_parquet(path: Path, needed: Sequence[str]) -> Columns:
    """Read the needed columns of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    unreadable = DataError(f"{path.name} is not a readable Parquet file", "export the file again")
    try:
        metadata = pq.read_metadata(path)
        found = metadata.schema.to_arrow_schema().names
    except (pa.ArrowException, OSError):
        raise unreadable from None
    _check_columns(found, needed, path.name)
    if not metadata.num_rows:
        return {name: [] for name in needed}
    with _converting(path, unreadable) as (link, cache):
        dataset = Dataset.from_parquet(link, columns=list(needed), cache_dir=cache, keep_in_memory=True)
        return _to_lists(dataset, needed)


_READERS: dict[str, tuple[str, Callable[[Path, Sequence[str]], Columns]]] = {
    ".csv": ("csv", _read_csv),
    ".jsonl": ("jsonl", _read_json_lines),
    ".json-lines": ("jsonl", _read_json_lines),
    ".parquet": ("parquet", _read_parquet),
}


def _to_lists(dataset: Any, needed: Sequence[str]) -> Columns:
    lists: Columns = dataset.select_columns(list(needed)).to_dict()
    return lists


@contextmanager
def _converting(path: Path, unreadable: DataError) -> Iterator[tuple[str, str]]:
    """Let `datasets` convert `path`, silently and in a temporary directory. Yield (path to read, cache).

    It reads through a link with a plain name: `datasets` interprets `*`, `[` and `::` in a path as patterns and would
    open other files, or none. Its error log and its exceptions quote the file, so neither leaves this function.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging
    from pandas.errors import ParserWarning

    bars, verbosity = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="privet-") as folder:
            warnings.simplefilter("ignore")
            # Where pandas only warns, it drops values that have no column name.
            warnings.simplefilter("error", ParserWarning)
            link = Path(folder, "data" + path.suffix.lower())
            link.symlink_to(path.absolute())
            yield str(link), str(Path(folder, "cache"))
    except (DatasetsError, ValueError, TypeError) as error:
        if isinstance(error.__cause__, OSError):  # a fault of the disk, not of the file
            raise error.__cause__ from None
        raise unreadable from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


def check_exact(path: Path, column: str) -> None:
    """Check that a column of floats holds every whole number below 2^53 exactly.

    Raises:
        DataError: The file stores the column in less than 64 bits, so that two ids may have become one or changed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() != ".parquet":
        return
    kind = pq.read_schema(path).field(column).type
    if pa.types.is_floating(kind) and kind.bit_width < 64:
        raise DataError(
            f"{path.name}: expected ids as integers, strings or floats of 64 bits in the column {column}, found floats "
            f"of {kind.bit_width} bits, which round large numbers",
            "export the column again as integers or strings",
        )


# --- the contract ----------------------------------------------------------------------------------------


def _check_columns(found: Sequence[str], needed: Sequence[str], file: str) -> None:
    missing = [name for name in needed if name not in found]
    if missing:
        shown = [name[:64] for name in found[:_LISTED]]
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise DataError(
            f"{file}: expected the columns {', '.join(missing)}, found only {', '.join(shown)}{more}",
            "rename the columns of the file to the names in data.columns and data.unit of the study",
        )
    repeated = [name for name in needed if list(found).count(name) > 1]
    if repeated:
        raise DataError(f"{file} has several columns named {', '.join(repeated)}", "keep one column of each name")
