"""Which files belong to which site, by their names: `north-train.csv`, `north.csv`, `north/train.csv`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from privet.client.training.decoding import kind_of
from privet.common.errors import DataError, StudyError
from privet.common.files import most_like

SAVE_SHEETS = "save its sheet as CSV UTF-8"
_WORKBOOKS = frozenset((".xlsx", ".xls", ".xlsm", ".ods"))
_PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}


@dataclass
class SiteData:
    """The files of one site. A name that says no site, as in `train.csv`, is the empty string."""

    name: str
    train: list[Path] = field(default_factory=list)
    test: list[Path] = field(default_factory=list)


def data_files(given: Sequence[Path]) -> list[Path]:
    """Return the data files among paths: a directory stands for those in it, and in the directories right in it.

    Raises:
        StudyError: A path does not exist, or a directory holds none.
    """
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise StudyError(
                f"{path}: expected a data file or a directory of them, but it does not exist",
                f"check the path{most_like(path, folders=True)}",
            )
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for pattern in ("*", "*/*") for file in path.glob(pattern))
        data = [file for file in inside if file.is_file() and _is_data(file)]
        if not data:
            raise StudyError(
                f"{path}: expected data files in this directory, found none (.csv, .tsv, .jsonl, .json, .parquet)",
                SAVE_SHEETS if workbooks([path]) else "name the files, as in `privet new north.csv south.csv west.csv`",
            )
        found += data
    return list(dict.fromkeys(found))


def workbooks(given: Sequence[Path]) -> list[Path]:
    """Return the spreadsheets in the directories among paths: their rows are not read."""
    folders = [path for path in given if path.is_dir()]
    inside = (file for folder in folders for pattern in ("*", "*/*") for file in folder.glob(pattern))
    return sorted(file for file in inside if file.suffix.lower() in _WORKBOOKS and not file.name.startswith(("~", ".")))


def _is_data(file: Path) -> bool:
    try:
        kind_of(file)
    except DataError:
        return False
    return not file.name.endswith(".schema.json")  # as `privet new --schema` writes


def sites_of(files: Sequence[Path]) -> list[SiteData]:
    """Return the sites that the names of files tell, by name.

    Raises:
        StudyError: A site has test files alone.
    """
    names = [_named(file) for file in files]
    sites: dict[str, SiteData] = {}
    for file, (name, part) in zip(files, names, strict=True):
        site = sites.setdefault(name, SiteData(name))
        (site.test if part == "test" else site.train).append(file)
    for site in sites.values():
        if not site.train:
            raise StudyError(
                f"{', '.join(file.name for file in site.test)}: expected a training file beside it, found none",
                "name both, as in `privet new north-train.csv north-test.csv`",
            )
    return [sites[name] for name in sorted(sites)]


def _named(file: Path) -> tuple[str, str]:
    """Return the site and the part ("train", "test" or "") that a file's name tells."""
    words = _words(Path(file.name.removesuffix(".gz")).stem)
    part = next((_PARTS[word] for word in words if word in _PARTS), "")
    rest = [word for word in words if word not in _PARTS]
    if part and not rest:  # north/train.csv, beside south/train.csv
        folders = {path.parent for path in file.absolute().parent.parent.glob("*/*") if path.stem.lower() in _PARTS}
        rest = _words(file.absolute().parent.name) if len(folders) > 1 else []
    return plain_name(" ".join(rest)), part


def plain_name(text: str) -> str:
    """Return a text as a name of sites and studies is written; empty if it has no letter and no digit of ASCII."""
    return "-".join(_words(text))[:63].strip("-")


def _words(name: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.findall(r"[a-z0-9]+", plain.lower())
