"""Records that stand where they should not: in training and in test files, or at two simulated sites. Counts only.

Test figures on records that were trained on say nothing about others. One patient at two sites has two guarantees, of
which each holds for what one site releases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from privet.client.training.data import Records
from privet.common.canonical import canonical_json, digest
from privet.common.study.study import Study

_NAMED = 5


@dataclass(frozen=True)
class Part:
    """What one site's training or test files hold, without the texts.

    Attributes:
        site: Name of the site.
        test: Whether the files are for the test.
        files: The files: device and number, or path where there is none.
        rows: Digest of each row.
        units: Names of the units.
    """

    site: str
    test: bool
    files: tuple[tuple[int, int], ...]
    rows: tuple[str, ...]
    units: frozenset[str]


def part_of(site: str, paths: Sequence[Path], parts: Sequence[Records], *, test: bool = False) -> Part:
    """Return what a site's files hold."""
    return Part(
        site=site,
        test=test,
        files=tuple(((found := path.stat()).st_dev, found.st_ino) for path in paths),
        rows=tuple(digest(canonical_json(row)) for part in parts for row in part.rows),
        units=frozenset(unit for part in parts for unit in part.units if unit),
    )


def overlaps(study: Study, parts: Sequence[Part]) -> list[str]:
    """Return what is in two of these parts, one sentence each; none if they are apart."""
    training, tests = ([part for part in parts if part.test is test] for test in (False, True))
    return [
        *_same_files(training, tests),
        *_same_rows(training, tests),
        *(_same_units(study, training, tests) if study.data.unit is not None else ()),
    ]


def _same_files(training: Sequence[Part], tests: Sequence[Part]) -> list[str]:
    found = []
    trained = {file for part in training for file in part.files}
    both = [part.site for part in tests if trained & set(part.files)]
    if both:
        found.append(f"a test file is also a training file, at {_named(both)}: test figures then measure memory")
    for kind, parts in (("training", training), ("test", tests)):
        twice = [part.site for part in parts if len(set(part.files)) < len(part.files)]
        if twice:
            found.append(f"a {kind} file is named twice, at {_named(twice)}: its records count twice")
    if shared := _shared([(part.site, set(part.files)) for part in training]):
        found.append(f"{shared[0]} training files are at more than one site: {_named(shared[1])}")
    return found


def _same_rows(training: Sequence[Part], tests: Sequence[Part]) -> list[str]:
    found = []
    trained = {row for part in training for row in part.rows}
    seen = {part.site: sum(row in trained for row in part.rows) for part in tests}
    if equal := sum(seen.values()):
        total = sum(len(part.rows) for part in tests)
        where = _named([site for site, count in seen.items() if count])
        found.append(f"{equal} of {total} test records are equal to training records, at {where}")
    if shared := _shared([(part.site, set(part.rows)) for part in training]):
        found.append(f"{shared[0]} training records are at more than one site: {_named(shared[1])}")
    return found


def _same_units(study: Study, training: Sequence[Part], tests: Sequence[Part]) -> list[str]:
    found = []
    column = study.data.unit
    if shared := _shared([(part.site, part.units) for part in training]):
        found.append(
            f"{shared[0]} values of {column} are at more than one site: {_named(shared[1])}. If they name the "
            "same units, the stated epsilon holds for what each site releases, and not for all of it together"
        )
    own = {part.site: part.units for part in training}
    both = {part.site: len(part.units & own.get(part.site, frozenset())) for part in tests}
    if count := sum(both.values()):
        where = _named([site for site, each in both.items() if each])
        found.append(f"{count} values of {column} are in training and in test files, at {where}")
    return found


def _shared(parts: Sequence[tuple[str, Iterable[object]]]) -> tuple[int, list[str]] | None:
    """Return how many things are at two sites or more, and these sites; None if each is at one."""
    sites: dict[object, set[str]] = {}
    for site, things in parts:
        for thing in things:
            sites.setdefault(thing, set()).add(site)
    several = [names for names in sites.values() if len(names) > 1]
    return (len(several), sorted(set().union(*several))) if several else None


def _named(sites: Sequence[str]) -> str:
    more = f" and {len(sites) - _NAMED} more" if len(sites) > _NAMED else ""
    return ", ".join(sites[:_NAMED]) + more
