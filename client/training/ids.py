"""Names of units: when two values of the unit column are one unit.

One person under two names has twice the influence, and the guarantee fails. One name for two people costs accuracy
alone. So every rule joins rather than splits: NFKC, no invisible characters, one dash, no outer white space, one space
for inner white space, and no decimal .0 after digits. A rule then says the rest:

* `number`: whole numbers. 101, "0101", "+101", "1 01", "101." and 101.0 are one unit. Other values are refused.
* `text`: text. Upper and lower case are the same (Unicode case folding). 0101 and 101 differ.
* `case`: text. Upper and lower case differ.

Floats are read under `number` alone: a program that made 101.0 of "0101" has dropped the zero.

Without a rule, a unit's name is its NFKC form without outer white space, and `check_spellings` refuses names that any
rule, or a looser comparison, would join. Hence without a rule every rule gives the same units.

Letters of two scripts that look alike stay different. Ids stay in this process: errors hold counts.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from privet.client.site import IdRule
from privet.common.errors import DataError

_RULES: tuple[IdRule, ...] = get_args(IdRule)
_ADD = "beside `patient_column = {}` in the site file, add {} (in a simulation: in the [simulation] table)"
_EACH = (
    '`patient_ids = "number"` if 101, 0101 and 101.0 are one patient, `patient_ids = "text"` if upper and lower case '
    'do not matter, or `patient_ids = "case"` if they do'
)
_TEXT = '`patient_ids = "text"`'
_NUMBER = re.compile(r"([+-]?)([0-9]+)(?:\.0*)?")
_DECIMAL = re.compile(r"([0-9]+)\.0*")
_EXPONENT = re.compile(r"[0-9](?:\.[0-9]+)?e\+[0-9]+", re.IGNORECASE)
_LEADING = re.compile(r"(?<![0-9])0+(?=[0-9])")
# Floats hold integers exactly below this: above it, two ids may have become one value, and others two.
_EXACT = 2.0**53
_MOST_PASSES = 16
# Characters without a picture that are neither white space nor of the categories Cc and Cf (Unicode
# Default_Ignorable_Code_Point, and the blank Braille pattern).
_BLANK = frozenset(
    map(
        chr,
        [
            *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
            *range(0x180B, 0x1810),
            *range(0xFE00, 0xFE10),
            *range(0xE0000, 0xE1000),
        ],
    )
)
# Dashes that Unicode puts outside its category Pd: minus signs, the hyphen bullet.
_DASHES = frozenset("\u2212\u2043\u02d7\u207b\u208b")


@dataclass(frozen=True)
class Spellings:
    """Names that may be one unit, in counts.

    Attributes:
        names: Number of names that share a loose form with another name.
        units: Number of units that these names may come to.
    """

    names: int
    units: int


def unit_names(
    values: Sequence[Any],
    rule: IdRule | None,
    column: str,
    file: str,
    places: Callable[[Sequence[int]], str] | None = None,
) -> list[str]:
    """Return the unit's name for each value of the unit column; the empty string where there is none.

    Args:
        values: Strings, integers or None; under `number` also floats. NaN is no unit.
        rule: How ids are written; None: see the module.
        column: Name of the column, for errors.
        file: Name of the file, for errors.
        places: Says where rows are, for errors.

    Raises:
        DataError: A value has another type, or is no whole number under `number`.
    """
    _check_types(values, rule, column, file, places)
    known: dict[Any, str | None] = {}
    names = []
    for value in values:
        key = (type(value), value)
        if key not in known:
            known[key] = _name(value, rule)
        names.append(known[key])
    wrong = [row for row, name in enumerate(names) if name is None]
    if wrong:
        raise DataError(
            f"{file}: expected whole numbers in the column {column}, as the site's patient_ids is number; found other "
            f"values in {len(wrong)} of {len(values)} rows" + _at(wrong, places),
            "write these ids with all their digits, without commas and without an exponent such as E+12; or set "
            'patient_ids = "text" in the site file if ids may hold letters',
        )
    return [name or "" for name in names]


def canonical(value: str, rule: IdRule | None) -> str | None:
    """Return the name of the unit that `value` names under a rule; None if it is no whole number under `number`.

    Idempotent: the name of a name is that name.
    """
    if rule is None:
        return unicodedata.normalize("NFKC", value).strip()
    text = _text(value, fold=rule != "case")
    return text if rule != "number" or not text else _number(_digits(text))


def names_by_rule(value: Any) -> dict[str, str]:
    """Return the names that an id has by each rule that it fits, and by none of them (`plain`); empty without an id."""
    found = {rule or "plain": _name(value, rule) for rule in (None, *_RULES)}
    return {rule: name for rule, name in found.items() if name}


def spellings(names: Iterable[str]) -> Spellings:
    """Count the names that may be one unit.

    Names may be one unit if they share a loose form: the letters and digits alone, without case, zeros in front of a
    number, or the decimals of a whole number. Any two names that a rule joins share one.
    """
    distinct = sorted({name for name in names if name})
    owner: dict[str, int] = {}
    parent = list(range(len(distinct)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for index, name in enumerate(distinct):
        for form in _loose(name):
            parent[root(index)] = root(owner.setdefault(form, index))
    sizes: dict[int, int] = {}
    for index in range(len(distinct)):
        sizes[root(index)] = sizes.get(root(index), 0) + 1
    shared = [size for size in sizes.values() if size > 1]
    return Spellings(sum(shared), len(shared))


def units_by_rule(names: Iterable[str]) -> dict[IdRule, int | None]:
    """Return the number of units under each rule; None for `number` if a name is no whole number."""
    distinct = {name for name in names if name}
    forms = {rule: {canonical(name, rule) for name in distinct} for rule in _RULES}
    return {rule: None if None in found else len(found) for rule, found in forms.items()}


def check_spellings(names: Iterable[str], column: str) -> None:
    """Refuse names, read without a rule from all of a site's files, if two of them may be one unit.

    Args:
        names: Names of units, as `unit_names` returned them; repeated ones count once.
        column: Name of the unit column, for the error.

    Raises:
        DataError: Two names may be one unit, or a name is a rounded number. The message holds counts alone.
    """
    distinct = {name for name in names if name}
    rounded = sum(_EXPONENT.fullmatch(name) is not None for name in distinct)
    if rounded:
        raise DataError(
            f"column {column}: expected ids with all their digits, found {rounded} ids with an exponent, as in "
            "1.23E+12: spreadsheets shorten long numbers to this form, and lose digits",
            "export the ids again as text; if they are no numbers, " + _ADD.format(json.dumps(column), _TEXT),
        )
    found = spellings(distinct)
    if not found.names:
        return
    counts = ", ".join(
        f'"{rule}" gives {count}' if count is not None else f'"{rule}" does not fit, as some ids are no whole numbers'
        for rule, count in units_by_rule(distinct).items()
    )
    raise DataError(
        f"column {column}: expected one spelling for each patient over all files; found {found.names} spellings that "
        f"may name only {found.units} patients (they differ in case, spaces, dashes, other punctuation, leading zeros, "
        f"a decimal .0 or invisible characters). Patients in all files: {counts}",
        _ADD.format(json.dumps(column), _EACH),
    )


def _check_types(
    values: Sequence[Any],
    rule: IdRule | None,
    column: str,
    file: str,
    places: Callable[[Sequence[int]], str] | None,
) -> None:
    floats: list[int] = []
    wrong: list[int] = []
    for row, value in enumerate(values):
        if isinstance(value, float):
            floats.append(row)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            wrong.append(row)
    if wrong or (floats and rule != "number"):
        expected = "strings, integers or whole floats" if rule == "number" else "strings or integers"
        decimal = floats and rule is None
        found = sorted([*wrong, *floats])
        raise DataError(
            f"{file}: expected {expected} in the column {column}, found other types in {len(found)} of "
            f"{len(values)} rows"
            + (" (ids with a decimal, such as 101.0)" if floats and not wrong else "")
            + _at(found, places),
            _ADD.format(json.dumps(column), '`patient_ids = "number"` if the ids are whole numbers')
            + "; otherwise convert the column in the file"
            if decimal
            else "convert the column in the file, or correct data.unit in the study",
        )


def _at(rows: Sequence[int], places: Callable[[Sequence[int]], str] | None) -> str:
    return "" if places is None else f": {places(rows)}"


def _name(value: Any, rule: IdRule | None) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else None
    # Half a surrogate pair has no UTF-8 form, which hashing of the unit needs.
    return canonical(str(value).encode("utf-8", "replace").decode("utf-8"), rule)


def _text(value: str, *, fold: bool) -> str:
    text = _collapsed(value, fold=fold)
    decimal = _DECIMAL.fullmatch(text)
    return text if decimal is None else decimal[1]


def _collapsed(value: str, *, fold: bool) -> str:
    if value.isascii() and value.isprintable():
        return " ".join((value.casefold() if fold else value).split())
    # Until nothing changes: taking a character out, or folding, can make a sequence that NFKC composes.
    for _ in range(_MOST_PASSES):
        before, value = value, unicodedata.normalize("NFKC", value)
        value = "".join(map(_shown, value))
        value = " ".join((value.casefold() if fold else value).split())
        if value == before:
            break
    return value


def _shown(character: str) -> str:
    if character.isascii() and character.isprintable():
        return character
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category in ("Cc", "Cf") or character in _BLANK:
        return ""
    return "-" if category == "Pd" or character in _DASHES else character


def _digits(text: str) -> str:
    """Return `text` without white space, and with the decimal digits of every script as ASCII digits."""
    if text.isascii():
        return "".join(text.split())
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text if not c.isspace())


def _number(digits: str) -> str | None:
    found = _NUMBER.fullmatch(digits)
    if found is None:
        return None
    value = found[2].lstrip("0") or "0"  # not as an integer, whose conversion is slow and limited in length
    return f"-{value}" if found[1] == "-" and value != "0" else value


def _loose(name: str) -> set[str]:
    """Return the loose forms of a name. With zeros taken away before or after punctuation: 12-01, 12-1 and 1201."""
    text = _digits(_text(name, fold=True))
    number = _number(text)
    if number is not None:
        return {number.lstrip("-")}
    return {_LEADING.sub("", _bare(text)), _bare(_LEADING.sub("", text))}


def _bare(text: str) -> str:
    return "".join(c for c in text if c.isalnum() or unicodedata.category(c)[0] in "LNM")
