"""Synthetic clinical triage notes of several hospitals: the data of the demo and of larger simulations.

Nothing here comes from a patient. A note is a few facts (age, complaint, duration, finding, denials, past
history) written in the style of its hospital. What makes the task real enough to learn from:

* Denials and past history name *other* specialties ("denies rash", "hx of asthma"), general symptoms belong
  to none, and some complaints ("chest pain") belong to several, so that the whole note has to be read.
* Each hospital specialises (label skew) and writes in its own style (feature skew).
* A patient has one to four notes, which share age, sex, history and mostly the specialty.
* Some complaints and findings are held out: they occur in test notes only (`HELD_OUT`).
"""

from __future__ import annotations

import csv
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from privet.common.canonical import canonical_json, digest
from privet.common.errors import DataError, StudyError

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
        specialty: The label, one of `SPECIALTIES`.
    """

    patient: str
    note: str
    specialty: str


@dataclass(frozen=True)
class Hospital:
    """What distinguishes one hospital's notes from another's.

    Attributes:
        name: Lower-case letters, digits and hyphens.
        style: One of `STYLES`.
        patients: Number of patients with training notes; a patient has 2.2 notes on average.
        mix: Share of each specialty among the patients. Need not sum to 1; a specialty left out has none.

    Raises:
        StudyError: A name, style, number or mix that no hospital can have.
    """

    name: str
    style: str
    patients: int
    mix: dict[str, float]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise StudyError(f"hospital name: expected letters a-z, digits and hyphens, got {self.name!r}")
        if self.style not in STYLES:
            raise StudyError(f"style of {self.name}: expected one of {', '.join(STYLES)}, got {self.style!r}")
        if self.patients < 1:
            raise StudyError(f"patients of {self.name}: expected 1 or more, got {self.patients}")
        if unknown := sorted(set(self.mix) - set(SPECIALTIES)):
            raise StudyError(
                f"mix of {self.name}: expected specialties among {', '.join(SPECIALTIES)}, got {', '.join(unknown)}"
            )
        shares = list(self.mix.values())
        if not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
            raise StudyError(f"mix of {self.name}: expected shares of at least 0 with a positive sum")


def generate_notes(hospital: Hospital, *, seed: int, part: Split) -> list[ClinicalNote]:
    """Return a hospital's notes, equal for equal arguments.

    Training patients follow `hospital.mix`, and no training note holds a phrase of `HELD_OUT`. Test patients
    are spread evenly over all specialties, whatever the mix: each hospital contributes its style, and the
    union of the hospitals' test parts is balanced (up to the varying number of notes per patient).

    Args:
        hospital: Who writes, how much and about what.
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
    """Write notes as a table with the columns patient, note and specialty; the suffix decides the format.

    Args:
        notes: The records, in the order they are written.
        path: A .csv, .jsonl or .parquet file; its directory must exist.

    Raises:
        DataError: Another suffix.
    """
    columns = [field.name for field in fields(ClinicalNote)]
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
        raise DataError(f"expected a file that ends in .csv, .jsonl or .parquet, got {path.name}", "rename the file")


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
        StudyError: A count, number of patients or skew that is not positive.
    """
    if count < 1:
        raise StudyError(f"count: expected 1 hospital or more, got {count}")
    if not (math.isfinite(skew) and skew > 0):
        raise StudyError(f"skew: expected a positive number, got {skew}")
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


# Facts of a note: drawn first, written down afterwards in the hospital's style.


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
        notes.append(ClinicalNote(patient, _misspell(STYLES[style](facts, rng), rng), specialty))
    return notes


def _person(first: int, rng: np.random.Generator) -> _Person:
    """Draw a patient; most of the history is of other specialties than the patient comes for."""
    others = [name for index, name in enumerate(SPECIALTIES) if index != first]
    sources = [_pick(others, rng) for _ in range(_draw(_HISTORIES, rng))]
    if rng.random() < 0.15:
        sources.append(SPECIALTIES[first])
    history = tuple(dict.fromkeys(_pick(_WORDS[source].histories, rng) for source in sources))
    return _Person(age=int(rng.integers(18, 92)), woman=bool(rng.random() < 0.5), history=history)


def _facts(person: _Person, specialty: str, part: Split, *, follow_up: bool, rng: np.random.Generator) -> _Facts:
    """Draw one note's facts; complaint, symptom and finding share the specialty and are else independent."""
    words = _WORDS[specialty]
    shared = rng.random() < _AMBIGUOUS
    complaint = _shared_complaint(specialty, rng) if shared else _phrase(words.complaints, part, rng)
    symptom = ""
    if rng.random() < _RELATED_SYMPTOM:
        symptom = _phrase(words.complaints, part, rng)
    elif rng.random() < _GENERAL_SYMPTOM:
        symptom = _pick(_GENERAL_SYMPTOMS, rng)
    bland = rng.random() < _BLAND_FINDING and not shared
    finding = _pick(_BLAND_FINDINGS, rng) if bland else _phrase(words.findings, part, rng)
    others = [name for name in SPECIALTIES if name != specialty]
    denials = [_pick(_WORDS[_pick(others, rng)].denials, rng) for _ in range(_draw(_DENIALS, rng))]
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


def _phrase(phrases: _Phrases, part: Split, rng: np.random.Generator) -> str:
    """Draw a phrase; held-out ones for the test part only."""
    held_out = part == "test" and rng.random() < _HELD_OUT
    return _with_side(_pick(phrases.held_out if held_out else phrases.known, rng), rng)


def _shared_complaint(specialty: str, rng: np.random.Generator) -> str:
    return _with_side(_pick([text for text, owners in _SHARED_COMPLAINTS if specialty in owners], rng), rng)


def _with_side(phrase: str, rng: np.random.Generator) -> str:
    return phrase.replace("SIDE", _pick(("left", "right"), rng))


def _draw(shares: tuple[float, ...], rng: np.random.Generator) -> int:
    """Draw an index with the given probabilities: as `rng.choice`, which takes ten times as long."""
    return bisect_right(_sums(shares), rng.random())


@lru_cache(maxsize=64)
def _sums(shares: tuple[float, ...]) -> list[float]:
    sums = np.cumsum(shares)
    return list(sums / sums[-1])


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


# Styles: the same facts as four hospitals would write them.


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
"""How a hospital writes: name of the style, and the function that writes facts in it."""

_NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _counted(number: int) -> str:
    return _NUMBERS[number] if number < len(_NUMBERS) else str(number)


_ABBREVIATIONS: Final = {
    "shortness of breath on exertion": "SOBOE",
    "shortness of breath": "SOB",
    "chest pain": "CP",
    "abdominal": "abdo",
    "headache": "HA",
    "hypertension": "HTN",
    "type 2 diabetes": "T2DM",
    "osteoarthritis": "OA",
    "blood pressure": "BP",
    "left": "L",
    "right": "R",
    "bilateral": "b/l",
    "with": "w/",
    "without": "w/o",
    "after": "p",
    "previous": "prev",
    "fracture": "#",
    "temperature": "temp",
    "examination": "exam",
    "normal": "NAD",
    "and": "&",
}
_ABBREVIABLE: Final = re.compile(r"\b(" + "|".join(sorted(_ABBREVIATIONS, key=len, reverse=True)) + r")\b")


def abbreviate(text: str) -> str:
    """Return `text` as the style `abbreviated` writes it."""
    return _ABBREVIABLE.sub(lambda match: _ABBREVIATIONS[match[0]], text)


def _misspell(text: str, rng: np.random.Generator, rate: float = 0.012) -> str:
    """Swap or drop a letter inside a few of the longer words."""
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) > 5 and word.isalpha() and rng.random() < rate:
            at = int(rng.integers(1, len(word) - 2))
            middle = word[at + 1] + word[at] if rng.random() < 0.5 else word[at + 1]
            words[index] = word[:at] + middle + word[at + 2 :]
    return " ".join(words)


# Vocabulary. SIDE stands for left or right.


@dataclass(frozen=True)
class _Phrases:
    known: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class _Words:
    complaints: _Phrases
    findings: _Phrases
    histories: tuple[str, ...]
    denials: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


_WORDS: Final = {
    "cardiology": _Words(
        complaints=_Phrases(
            known=_list(
                """crushing central chest pain; chest tightness on exertion; palpitations at rest; racing
                irregular heartbeat; ankle swelling by evening; breathlessness lying flat; heavy chest
                climbing stairs; pain from the chest into the SIDE arm; fluttering in the chest; waking
                at night gasping; jaw ache walking uphill; blackout on standing; cold sweat with chest
                pressure; calf cramps on walking; irregular pulse on smart watch; swollen legs on
                diuretics; heart racing after exercise; breathless with swollen ankles"""
            ),
            held_out=_list(
                """pounding heart after coffee; a squeezing feeling behind the breastbone; skipped beats;
                fainting during sport; puffy feet with rapid weight gain; feeling of an elephant on the
                chest; thumping pulse in the neck; angina when walking the dog; heart stopping for a
                second then thudding"""
            ),
        ),
        findings=_Phrases(
            known=_list(
                """ST depression on ECG; troponin raised; irregularly irregular pulse; BP 182/104;
                pansystolic murmur; raised JVP; pitting oedema to the knees; new bundle branch block;
                ejection fraction 35%; pulse 148 regular"""
            ),
            held_out=_list(
                """T wave inversion V4 to V6; BNP markedly elevated; harsh aortic murmur; runs of
                tachycardia on cardiac monitor; absent foot pulses; gallop rhythm; long QT interval"""
            ),
        ),
        histories=_list(
            """previous MI; hypertension; AF on apixaban; coronary stent; heart failure; pacemaker; high
            cholesterol; bypass surgery"""
        ),
        denials=_list("chest pain; palpitations; ankle swelling; syncope; orthopnoea; exertional chest pain"),
    ),
    "respiratory": _Words(
        complaints=_Phrases(
            known=_list(
                """productive cough with green sputum; wheeze worse at night; shortness of breath on
                exertion; chest infection not clearing; coughing up blood; dry cough since a cold;
                sharp pain on breathing in; using blue inhaler every two hours; noisy breathing; chesty
                cough and fever; breathless after a flight; rusty phlegm; morning cough in a smoker;
                snoring with pauses in breathing; tight chest around pollen; feeling of full lungs;
                inability to catch breath; runny nose and cough"""
            ),
            held_out=_list(
                """barking cough with sore throat; struggling to get air in; whistling sound when
                exhaling; hacking cough with night sweats; out of breath walking across the room;
                asthma attack after cat exposure; bringing up thick mucus; gaps in breathing during
                sleep; needing inhaler more often; lung infection after flu"""
            ),
        ),
        findings=_Phrases(
            known=_list(
                """SpO2 89% on air; crackles at the SIDE base; peak flow half of predicted; widespread
                wheeze; SIDE lower lobe consolidation; dull percussion at the SIDE base; breathing at
                28 a minute; hyperinflated lungs; reduced air entry; D-dimer raised"""
            ),
            held_out=_list(
                """low oxygen saturation on walking; small pneumothorax on x-ray; SIDE pleural effusion;
                prolonged expiration; talking in short phrases; FEV1 52%; fine inspiratory crepitations"""
            ),
        ),
        histories=_list(
            """asthma; COPD; previous pneumonia; bronchiectasis; sleep apnoea on CPAP; pulmonary embolism;
            30 pack years; home oxygen"""
        ),
        denials=_list("cough; wheeze; shortness of breath; haemoptysis; sputum; pleuritic pain"),
    ),
    "gastroenterology": _Words(
        complaints=_Phrases(
            known=_list(
                """burning pain after meals; upper abdominal pain after fatty food; black tarry stools;
                vomiting after every meal; bloody diarrhoea; bloating with alternating bowel habit;
                food sticking on swallowing; heartburn at night; yellow eyes and dark urine; cramping
                abdominal pain; constipation with straining; rectal bleeding; acid taste in the mouth;
                swollen abdomen; stomach pain after spicy food; nausea and vomiting; watery diarrhoea
                after travel; painful bowel movements"""
            ),
            held_out=_list(
                """vomiting coffee grounds; gripping tummy ache; loose stools after antibiotics;
                indigestion and belching; greasy floating stools; jaundice with pale stools; no bowel
                motion despite laxatives; regurgitating food when bending; retching and stomach cramps"""
            ),
        ),
        findings=_Phrases(
            known=_list(
                """epigastric tenderness; ALT 410; guarding in the SIDE iliac fossa; Murphy positive;
                lipase raised; faecal calprotectin high; shifting dullness; distended tympanic abdomen;
                blood on PR; bilirubin 96"""
            ),
            held_out=_list(
                """gallstones on ultrasound; H pylori positive; palpable liver edge; hyperactive bowel
                sounds; coeliac serology positive; tender SIDE upper quadrant; anal fissure seen"""
            ),
        ),
        histories=_list(
            """reflux on omeprazole; Crohn's disease; irritable bowel; gallstones; peptic ulcer; fatty
            liver; appendicectomy; coeliac disease"""
        ),
        denials=_list("abdominal pain; vomiting; melaena; diarrhoea; heartburn; change in bowel habit"),
    ),
    "neurology": _Words(
        complaints=_Phrases(
            known=_list(
                """throbbing headache with light sensitivity; sudden SIDE face droop; slurred speech;
                tremor of the SIDE hand; tonic clonic seizure; pins and needles in both feet; double
                vision; unsteady gait; visual aura then headache; word finding difficulty; worsening
                memory; SIDE leg weakness; spinning on turning over in bed; shooting nerve pain in the
                cheek; weakness down one side; jerking of the SIDE arm; forgetting names; numb fingers"""
            ),
            held_out=_list(
                """thunderclap headache; sudden loss of speech and vision; staring spells with lip
                smacking; shuffling and small handwriting; migraine with vomiting; clumsy hand with
                trembling; confusion noticed by family; tingling and numb legs; convulsion with tongue
                biting; fits during sleep"""
            ),
        ),
        findings=_Phrases(
            known=_list(
                """power 3/5 in the SIDE arm; upgoing SIDE plantar; nystagmus to the SIDE; cogwheel
                rigidity; absent ankle reflexes; GCS 14; SIDE homonymous hemianopia; neck stiffness;
                MoCA 19/30; papilloedema"""
            ),
            held_out=_list(
                """post-ictal and drowsy; dysarthria and tongue deviation; reduced vibration sense;
                positive Romberg; SIDE pronator drift; unequal pupils; acute stroke on CT brain"""
            ),
        ),
        histories=_list(
            """migraine; epilepsy on levetiracetam; previous stroke; Parkinson's disease; multiple
            sclerosis; TIA; peripheral neuropathy; dementia"""
        ),
        denials=_list("headache; seizures; limb weakness; visual loss; numbness; speech disturbance"),
    ),
    "orthopaedics": _Words(
        complaints=_Phrases(
            known=_list(
                """SIDE knee pain after twisting; fall onto outstretched SIDE hand; SIDE hip pain on
                weight bearing; low back pain after lifting; SIDE shoulder stuck and painful; SIDE
                ankle sprain; knee locking and giving way; stiff hands in cold weather; SIDE heel pain
                in the morning; wrist swelling after a fall; groin pain walking; popping sound at the
                SIDE calf; neck pain after a car accident; elbow pain gripping; broken SIDE toe; aching
                joints after running; torn hamstring; spine stiffness"""
            ),
            held_out=_list(
                """SIDE thumb jammed in a door; difficulty straightening the SIDE leg; twisted ankle at
                football; stiff finger joint; sore collarbone after bike crash; painful bunion and
                hammer toe; knee grinding when kneeling; SIDE shin bruise from a hammer; shoulder and
                elbow ache after tennis"""
            ),
        ),
        findings=_Phrases(
            known=_list(
                """bony tenderness; undisplaced fracture on x-ray; SIDE knee effusion; reduced range of
                movement; positive drawer test; unable to weight bear; straight leg raise 40 degrees;
                joint line tenderness; shortened rotated SIDE leg; painful arc"""
            ),
            held_out=_list(
                """scaphoid tender; dislocated SIDE shoulder on film; loose hardware; valgus deformity;
                torn meniscus on MRI; positive Thompson test; bruised and swollen malleolus"""
            ),
        ),
        histories=_list(
            """hip replacement; osteoarthritis; wrist fracture; osteoporosis; slipped disc; knee
            arthroscopy; gout; rotator cuff repair"""
        ),
        denials=_list("joint pain; trauma; back pain; joint swelling; locking; recent fall"),
    ),
    "dermatology": _Words(
        complaints=_Phrases(
            known=_list(
                """itchy rash on both arms; changing mole on the back; scaly plaques on the elbows;
                weeping rash in skin folds; blisters on the trunk; facial redness and pustules; hives
                after new detergent; painful lump in the armpit; dry cracked hands; hair loss in
                patches; thickened yellow toenails; ulcer on the nose that bleeds; ring shaped patch on
                the SIDE thigh; peeling skin between the toes; red itchy patches; boil on the SIDE
                buttock; spreading skin sores; pimples on the face"""
            ),
            held_out=_list(
                """dark freckle getting bigger; flaky itchy scalp; skin itching and scratching at night;
                acne spots with scarring; sunburn with peeling; wart on the SIDE thumb; white patches
                on the hands; crusty skin sore on the lip; itchy welts all over"""
            ),
        ),
        findings=_Phrases(
            known=_list(
                """asymmetric pigmented lesion 8 mm; well demarcated plaques with silver scale;
                excoriations; pearly papule with telangiectasia; vesicles in a dermatome; lichenified
                flexures; comedones; burrows in finger webs; nail pitting; blanching urticaria"""
            ),
            held_out=_list(
                """irregular border on dermoscopy; annular erythema with central clearing; honey coloured
                crust; Nikolsky sign positive; depigmented macules; scattered wheals; inflamed nodule
                with pus"""
            ),
        ),
        histories=_list(
            """eczema; psoriasis on methotrexate; melanoma excised; acne; rosacea; chronic urticaria;
            contact dermatitis; basal cell carcinoma"""
        ),
        denials=_list("rash; itch; skin lesions; mole change; blisters; skin infection"),
    ),
}

SPECIALTIES: Final[tuple[str, ...]] = tuple(_WORDS)
"""The labels."""

_SHARED_COMPLAINTS: Final = (
    ("chest pain", {"cardiology", "respiratory", "gastroenterology", "orthopaedics"}),
    ("collapse at home", {"cardiology", "neurology", "respiratory"}),
    ("dizziness", {"cardiology", "neurology"}),
    ("night cough", {"cardiology", "respiratory", "gastroenterology"}),
    ("breathless on stairs", {"cardiology", "respiratory"}),
    ("SIDE arm numbness", {"neurology", "orthopaedics", "cardiology"}),
    ("swollen SIDE leg", {"cardiology", "orthopaedics", "dermatology", "respiratory"}),
    ("back pain", {"orthopaedics", "neurology", "gastroenterology", "dermatology"}),
    ("sore SIDE foot", {"orthopaedics", "dermatology", "neurology"}),
    ("widespread itching", {"dermatology", "gastroenterology"}),
    ("lump in the neck", {"dermatology", "respiratory", "gastroenterology"}),
    ("burning pain on the SIDE side", {"dermatology", "neurology", "gastroenterology"}),
    ("facial pain", {"neurology", "dermatology"}),
    ("SIDE hand weakness", {"neurology", "orthopaedics"}),
)
_BLAND_FINDINGS: Final = _list(
    """obs stable; examination normal; bloods pending; looks well; afebrile; GP letter attached; triage
    obs normal; no red flags; awaiting review; pain score 5/10; alert, comfortable; temperature 37.9"""
)
_GENERAL_SYMPTOMS: Final = _list(
    """fatigue; poor sleep; reduced appetite; feeling generally unwell; low mood; mild fever; nausea;
    weight loss; anxiety; not coping at work; feeling hot and cold; light-headedness"""
)

HELD_OUT: Final = frozenset(
    phrase for words in _WORDS.values() for phrase in words.complaints.held_out + words.findings.held_out
)
"""Complaints and findings that occur in test notes only; SIDE stands for left or right."""


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
"""The hospitals of the demo: no specialty is a main one of fewer than two hospitals, or of more."""
