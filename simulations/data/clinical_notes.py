"""Synthetic clinical triage notes of several hospitals: the data of the demo and of larger simulations.

No note comes from a patient. A note is a few facts (age, complaint, duration, finding, denials, past history), written
in the style of its hospital. Four properties make the task realistic:

* Denials and past history name *other* specialties ("denies rash", "hx of asthma"), general symptoms belong to none,
  and some complaints ("chest pain") belong to several. A classifier must therefore read the whole note.
* Each hospital specialises (label skew) and writes in its own style (feature skew).
* A patient has one to four notes. They share age, sex and history, and most of them share the specialty.
* Some complaints and findings occur only in test notes (`clinical_words.HELD_OUT`).

A note has two targets: its specialty, for a classifier, and a reply in a fixed form, for a language model.
"""

from __future__ import annotations

import csv
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from privet.common.canonical import canonical_json, digest
from privet.common.errors import DataError, StudyError
from privet.simulations.data.clinical_words import (
    ABBREVIATIONS,
    BLAND_FINDINGS,
    GENERAL_SYMPTOMS,
    NUMBER_WORDS,
    SHARED_COMPLAINTS,
    SPECIALTIES,
    VOCABULARY,
    Phrases,
)

Split = Literal["train", "test"]

TEST_SHARE: Final = 0.15
"""Test patients of a hospital per training patient, before rounding up to the same number per specialty."""

_NOTES_PER_PATIENT: Final = (0.30, 0.35, 0.22, 0.13)  # shares of patients with 1, 2, 3 and 4 notes
_DENIALS: Final = (0.62, 0.33, 0.05)  # shares of notes with 0, 1 and 2 denials
_HISTORIES: Final = (0.60, 0.35, 0.05)  # shares of patients with 0, 1 and 2 histories of other specialties
_SECOND_PROBLEM: Final = 0.15  # share of later notes that are about another specialty than the first
_AMBIGUOUS: Final = 0.10  # share of complaints that several specialties share
_RELATED_SYMPTOM: Final = 0.60  # share of notes with a second symptom of the same specialty
_GENERAL_SYMPTOM: Final = 0.25  # share of the other notes with a symptom that belongs to none
_BLAND_FINDING: Final = 0.25  # share of findings that say nothing, unless the complaint is ambiguous
_HELD_OUT: Final = 0.50  # share of a test note's complaints and findings that no training note has


@dataclass(frozen=True)
class ClinicalNote:
    """One record of a site.

    Attributes:
        patient: Identifier of the patient, unique over hospitals and parts; the privacy unit `patient`.
        note: The text, mostly 20 to 40 word pieces long.
        specialty: The label, one of `clinical_words.SPECIALTIES`.
        reply: What a language model should answer to the note: where the patient goes, when, and why.
    """

    patient: str
    note: str
    specialty: str
    reply: str = ""


NOTE_COLUMNS: Final = tuple(field.name for field in fields(ClinicalNote))
"""The columns of a file of generated notes, in order."""


@dataclass(frozen=True)
class Hospital:
    """A hospital: its style, its size, and the mix of its specialties.

    Attributes:
        name: Lower-case letters, digits and hyphens.
        style: One of `STYLES`.
        patients: Number of patients with training notes; a patient has 2.2 notes on average.
        mix: Share of each specialty among the patients. Need not sum to 1; a specialty left out has none.

    Raises:
        StudyError: The name, style, number of patients or mix is not valid.
    """

    name: str
    style: str
    patients: int
    mix: dict[str, float]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise StudyError(
                f"name of a simulated hospital: expected only letters a-z, digits and hyphens, got {self.name!r}",
                "rename the hospital",
            )
        if self.style not in STYLES:
            raise StudyError(
                f"style of simulated hospital {self.name}: expected one of {', '.join(STYLES)}, got {self.style!r}",
                "choose one of these styles",
            )
        if self.patients < 1:
            raise StudyError(
                f"number of patients of simulated hospital {self.name}: expected 1 or more, got {self.patients}",
                "give the hospital at least one patient",
            )
        if unknown := sorted(set(self.mix) - set(SPECIALTIES)):
            raise StudyError(
                f"mix of specialties of hospital {self.name}: expected names among {', '.join(SPECIALTIES)}, "
                f"got {', '.join(unknown)}",
                "use only these names",
            )
        shares = list(self.mix.values())
        if not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
            raise StudyError(
                f"mix of specialties of hospital {self.name}: each share must be a finite number, 0 or more, "
                "and their sum must be above 0",
                "give at least one specialty a positive share",
            )


def generate_notes(hospital: Hospital, *, seed: int, part: Split) -> list[ClinicalNote]:
    """Return the notes of a hospital. Equal arguments give equal notes.

    Training patients follow `hospital.mix`, and no training note holds a phrase of `HELD_OUT`. Test patients are spread
    evenly over all specialties, whatever the mix: each hospital contributes its style, and the union of all test parts
    is balanced, except for the varying number of notes per patient.

    Args:
        hospital: The hospital that writes the notes.
        seed: Seed of the simulation.
        part: `train`, or `test` with about `TEST_SHARE` times as many patients, none of them in `train`.
    """
    rng = _generator({"hospital": hospital.name, "part": part, "seed": seed})
    if part == "train":
        mix = np.array([hospital.mix.get(name, 0.0) for name in SPECIALTIES])
        firsts = rng.choice(len(SPECIALTIES), size=hospital.patients, p=mix / mix.sum())
    else:
        mix = np.ones(len(SPECIALTIES))
        each = math.ceil(TEST_SHARE * hospital.patients / len(SPECIALTIES))
        firsts = rng.permutation(np.repeat(np.arange(len(SPECIALTIES)), each))
    notes: list[ClinicalNote] = []
    for number, first in enumerate(firsts, start=1):
        patient = f"{hospital.name}-{part}-{number:05d}"
        notes += _notes_of_patient(patient, int(first), mix / mix.sum(), hospital.style, part, rng)
    return notes


def write_site(notes: Sequence[ClinicalNote], path: Path) -> None:
    """Write notes as a table with the columns patient, note and specialty. The suffix of the path sets the format.

    Args:
        notes: The records, in the order they are written.
        path: A .csv, .jsonl or .parquet file; its directory must exist.

    Raises:
        DataError: The path has another suffix.
    """
    columns = list(NOTE_COLUMNS)
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(note) for note in notes)
    elif path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(asdict(note), ensure_ascii=False) + "\n" for note in notes)
    elif path.suffix == ".parquet":
        schema = pa.schema([(column, pa.string()) for column in columns])
        pq.write_table(pa.Table.from_pylist([asdict(note) for note in notes], schema=schema), path)
    else:
        raise DataError(
            f"file for generated notes: expected a name that ends in .csv, .jsonl or .parquet, got {path.name}",
            "choose a file name with one of these endings",
        )


def generic_hospitals(count: int, *, patients: int, skew: float, seed: int) -> tuple[Hospital, ...]:
    """Return `count` hospitals of equal size whose mixes are drawn from a symmetric Dirichlet distribution.

    Args:
        count: Number of hospitals, named site-001 onwards, which take the styles in turn.
        patients: Training patients of each hospital.
        skew: Concentration of the Dirichlet distribution: 0.1 is close to one specialty per hospital, 100 is
            close to the same mix everywhere (Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical
            Data Distribution for Federated Visual Classification").
        seed: Seed of the mixes.

    Raises:
        StudyError: The count, the number of patients or the skew is not positive.
    """
    if count < 1:
        raise StudyError(f"generated notes: expected 1 hospital or more, got {count}", "ask for at least one hospital")
    if not (math.isfinite(skew) and skew > 0):
        raise StudyError(
            f"generated notes: expected a positive, finite skew, got {skew}",
            "use 0.1 for about one specialty per hospital, or 100 for the same mix at each",
        )
    rng = _generator({"generic": True, "seed": seed})
    mixes = rng.dirichlet(np.full(len(SPECIALTIES), skew), size=count)
    styles = list(STYLES)
    return tuple(
        Hospital(
            name=f"site-{number + 1:03d}",
            style=styles[number % len(styles)],
            patients=patients,
            mix={name: float(share) for name, share in zip(SPECIALTIES, mixes[number], strict=True)},
        )
        for number in range(count)
    )


def _generator(inputs: dict[str, str | int]) -> np.random.Generator:
    state = int(digest(canonical_json(inputs)).removeprefix("sha256:"), 16)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(state)))


# Facts of a note: they are drawn first, and then written in the style of the hospital.


@dataclass(frozen=True)
class _Person:
    age: int
    woman: bool
    history: tuple[str, ...]


@dataclass(frozen=True)
class _Facts:
    person: _Person
    follow_up: bool
    complaint: str
    duration: tuple[int, str]  # number and unit, such as (3, "day")
    symptom: str  # a second one; may be empty
    finding: str
    denials: tuple[str, ...]


def _notes_of_patient(
    patient: str, first: int, mix: np.ndarray, style: str, part: Split, rng: np.random.Generator
) -> list[ClinicalNote]:
    person = _person(first, rng)
    notes = []
    for index in range(1 + _draw(_NOTES_PER_PATIENT, rng)):
        second = index > 0 and rng.random() < _SECOND_PROBLEM
        specialty = SPECIALTIES[_draw(tuple(mix), rng) if second else first]
        facts = _facts(person, specialty, part, follow_up=index > 0 and not second, rng=rng)
        note = _misspell(STYLES[style](facts, rng), rng)
        notes.append(ClinicalNote(patient, note, specialty, _reply(specialty, facts)))
    return notes


def _reply(specialty: str, facts: _Facts) -> str:
    """Return the reply that all hospitals agree on. Every part of it follows from the note."""
    urgency = {"hour": "today", "day": "this week"}.get(facts.duration[1], "routine")
    return f"Refer to: {specialty}. When: {urgency}. Reason: {facts.complaint}."


def _person(first: int, rng: np.random.Generator) -> _Person:
    """Draw a patient. Most of the history belongs to other specialties than the first note."""
    others = [name for index, name in enumerate(SPECIALTIES) if index != first]
    sources = [_pick(others, rng) for _ in range(_draw(_HISTORIES, rng))]
    if rng.random() < 0.15:
        sources.append(SPECIALTIES[first])
    history = tuple(dict.fromkeys(_pick(VOCABULARY[source].histories, rng) for source in sources))
    return _Person(age=int(rng.integers(18, 92)), woman=bool(rng.random() < 0.5), history=history)


def _facts(person: _Person, specialty: str, part: Split, *, follow_up: bool, rng: np.random.Generator) -> _Facts:
    """Draw the facts of one note. Complaint, symptom and finding share the specialty, and are independent otherwise."""
    words = VOCABULARY[specialty]
    shared = rng.random() < _AMBIGUOUS
    complaint = _shared_complaint(specialty, rng) if shared else _phrase(words.complaints, part, rng)
    symptom = ""
    if rng.random() < _RELATED_SYMPTOM:
        symptom = _phrase(words.complaints, part, rng)
    elif rng.random() < _GENERAL_SYMPTOM:
        symptom = _pick(GENERAL_SYMPTOMS, rng)
    bland = rng.random() < _BLAND_FINDING and not shared
    finding = _pick(BLAND_FINDINGS, rng) if bland else _phrase(words.findings, part, rng)
    others = [name for name in SPECIALTIES if name != specialty]
    denials = [_pick(VOCABULARY[_pick(others, rng)].denials, rng) for _ in range(_draw(_DENIALS, rng))]
    unit = _pick(("hour", "day", "day", "week", "week", "month"), rng)
    return _Facts(
        person=person,
        follow_up=follow_up and rng.random() < 0.6,
        complaint=complaint,
        duration=(int(rng.integers(2, 24 if unit == "hour" else 8)), unit),
        symptom="" if symptom == complaint else symptom,
        finding=finding,
        denials=tuple(name for name in dict.fromkeys(denials) if name not in f"{complaint}, {symptom}"),
    )


def _phrase(phrases: Phrases, part: Split, rng: np.random.Generator) -> str:
    """Draw a phrase. Only the test part draws held-out phrases."""
    held_out = part == "test" and rng.random() < _HELD_OUT
    return _with_side(_pick(phrases.held_out if held_out else phrases.known, rng), rng)


def _shared_complaint(specialty: str, rng: np.random.Generator) -> str:
    return _with_side(_pick([text for text, owners in SHARED_COMPLAINTS if specialty in owners], rng), rng)


def _with_side(phrase: str, rng: np.random.Generator) -> str:
    return phrase.replace("SIDE", _pick(("left", "right"), rng))


def _draw(shares: tuple[float, ...], rng: np.random.Generator) -> int:
    """Draw an index with the given probabilities. The result is that of `rng.choice`, ten times as fast."""
    return bisect_right(_sums(shares), rng.random())


@lru_cache(maxsize=64)
def _sums(shares: tuple[float, ...]) -> list[float]:
    sums = np.cumsum(shares)
    return list(sums / sums[-1])


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


# Styles: four ways to write the same facts.


def _terse(facts: _Facts, rng: np.random.Generator) -> str:
    person, (number, unit) = facts.person, facts.duration
    parts = [
        f"{person.age}{'F' if person.woman else 'M'}{' review' if facts.follow_up else ''}",
        f"{facts.complaint} {number} {unit}s" + (f", {facts.symptom}" if facts.symptom else ""),
        facts.finding,
        " ".join(f"no {name}." for name in facts.denials).rstrip("."),
        f"PMH {', '.join(person.history)}" if person.history else _pick(("no PMH", ""), rng),
    ]
    return ". ".join(part for part in parts if part) + "."


def _sentences(facts: _Facts, rng: np.random.Generator) -> str:
    person, (number, unit) = facts.person, facts.duration
    noun, pronoun, possessive = ("woman", "She", "Her") if person.woman else ("man", "He", "His")
    verb = "returns with" if facts.follow_up else _pick(("presents with", "attends with", "reports"), rng)
    told = facts.complaint + (f", also {facts.symptom}," if facts.symptom else "")
    text = [f"{person.age}-year-old {noun} who {verb} {told} for {_counted(number)} {unit}s."]
    text.append(f"{_pick(('Examination', 'We noted', 'Of note'), rng)}: {facts.finding}.")
    if facts.denials:
        text.append(f"{pronoun} denies {' or '.join(facts.denials)}.")
    if person.history:
        text.append(f"{possessive} past history includes {' and '.join(person.history)}.")
    return " ".join(text)


def _sections(facts: _Facts, rng: np.random.Generator) -> str:
    person, (number, unit) = facts.person, facts.duration
    told = [f"{'ongoing ' if facts.follow_up else ''}{facts.complaint}, {number} {unit}s", facts.symptom]
    told += [f"denies {name}" for name in facts.denials]
    sex, background = "female" if person.woman else "male", ", ".join(person.history) or "nil"
    lines = [
        f"S: {person.age} y/o {sex}, {', '.join(item for item in told if item)}.",
        f"O: {facts.finding}.",
        f"{_pick(('Hx', 'PMHx'), rng)}: {background}.",
    ]
    return " ".join(lines)


def _abbreviated(facts: _Facts, rng: np.random.Generator) -> str:
    person, (number, unit) = facts.person, facts.duration
    opening = _pick(("pt c/o", "c/o", "p/w"), rng)
    text = f"{person.age}yo {'F' if person.woman else 'M'} {'f/u, ' if facts.follow_up else ''}{opening} "
    text += f"{facts.complaint} x{number}{'mo' if unit == 'month' else unit[0]}"
    text += f" + {facts.symptom}; " if facts.symptom else "; "
    text += f"o/e {facts.finding}; "
    text += "".join(f"nil {name}; " for name in facts.denials)
    text += f"h/o {' + '.join(person.history)}" if person.history else "nil sig hx"
    return abbreviate(text)


STYLES: Final[dict[str, Callable[[_Facts, np.random.Generator], str]]] = {
    "terse": _terse,
    "sentences": _sentences,
    "sections": _sections,
    "abbreviated": _abbreviated,
}
"""By name of a style: the function that writes facts in it."""


def _counted(number: int) -> str:
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) else str(number)


_ABBREVIABLE: Final = re.compile(r"\b(" + "|".join(sorted(ABBREVIATIONS, key=len, reverse=True)) + r")\b")


def abbreviate(text: str) -> str:
    """Return a text in the abbreviations of the style `abbreviated`."""
    return _ABBREVIABLE.sub(lambda match: ABBREVIATIONS[match[0]], text)


def _misspell(text: str, rng: np.random.Generator, rate: float = 0.012) -> str:
    """Swap or drop a letter inside a few of the longer words."""
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) > 5 and word.isalpha() and rng.random() < rate:
            at = int(rng.integers(1, len(word) - 2))
            middle = word[at + 1] + word[at] if rng.random() < 0.5 else word[at + 1]
            words[index] = word[:at] + middle + word[at + 2 :]
    return " ".join(words)


def _specialised(*main: str) -> dict[str, float]:
    """Return the mix of a hospital with three specialties and 1 % of each other one."""
    shares = dict(zip(main, (0.45, 0.32, 0.20), strict=True))
    return {name: shares.get(name, 0.01) for name in SPECIALTIES}


HOSPITALS: Final[tuple[Hospital, ...]] = (
    Hospital("northgate", "terse", 340, _specialised("cardiology", "respiratory", "neurology")),
    Hospital("riverside", "sentences", 300, _specialised("neurology", "orthopaedics", "cardiology")),
    Hospital("st-anne", "sections", 260, _specialised("gastroenterology", "dermatology", "respiratory")),
    Hospital("hillcrest", "abbreviated", 220, _specialised("orthopaedics", "dermatology", "gastroenterology")),
)
"""The hospitals of the demo. Each specialty is a main specialty of exactly two hospitals."""


def scaled_hospitals(patients: int | None) -> tuple[Hospital, ...]:
    """Return the hospitals of the demo with another number of patients in all, in the same proportions."""
    if patients is None:
        return HOSPITALS
    total = sum(hospital.patients for hospital in HOSPITALS)
    return tuple(replace(each, patients=max(1, round(each.patients * patients / total))) for each in HOSPITALS)
