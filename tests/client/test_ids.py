"""Who a patient is: the site says it, and no spelling and no column makes two units of one person."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from privet.client.budget.releases import cost_of_round
from privet.client.commands import site as commands
from privet.client.policy.rules import Facts, judge
from privet.client.rounds.site import RealSite
from privet.client.rounds.worker import Worker
from privet.client.site import IdRule, SiteConfig, load_site
from privet.client.training.data import concatenate, load_records
from privet.client.training.ids import canonical, check_spellings, spellings, unit_names, units_by_rule
from privet.common.errors import DataError, PolicyError, PrivetError, RefusedError, StudyError
from privet.common.study.messages import Offer
from privet.common.study.sections import Section, SimulationOnly, simulation_fields
from privet.common.study.study import Study
from privet.simulations.data.federation import Simulation, plan_of, write_federation
from privet.simulations.sites import SimulatedConfig, load_simulated
from tests.client.test_data import make_study
from tests.client.test_policy import NOON, policy_of, study_of
from tests.client.test_site_refusals import refused
from tests.support.consortium_world import run
from tests.support.tiny import RECORDS, private, rows_for, site_toml, tiny_study, worker_of, write_policy, write_rows

PATIENTS = {"privacy": private(unit="patient"), "data.unit": "patient"}
LIMIT = {**RECORDS, "unit": "patient"}
RULES: tuple[IdRule | None, ...] = (None, "number", "text", "case")

# By trick: how one id is spelt, and how it is spelt elsewhere.
NUMBERS: dict[str, tuple[Any, Any]] = {
    "a decimal": ("101", "101.0"),
    "two decimals": ("101", "101.00"),
    "leading zeros": ("101", "000101"),
    "leading zeros and a decimal": ("0101", "101.0"),
    "white space around": ("101", " 101\t"),
    "a space that does not break": ("101", "101\u00a0"),
    "white space within": ("9434765919", "943 476 5919"),
    "full-width digits": ("101", "\uff11\uff10\uff11"),
    "digits of another script": ("101", "\u0661\u0660\u0661"),
    "a zero-width space": ("101", "1\u200b01"),
    "a byte order mark": ("101", "\ufeff101"),
    "a variation selector": ("101", "101\ufe0f"),
    "a plus sign": ("101", "+101"),
    "an integer": (101, "101"),
}
TEXTS: dict[str, tuple[Any, Any]] = {
    "white space around": ("berlin-12", "berlin-12 \n"),
    "white space within": ("anna  meier", "anna meier"),
    "white space of another width": ("anna\u2003meier", "anna meier"),
    "a dash of another kind": ("berlin-12", "berlin\u201312"),
    "a minus sign": ("berlin-12", "berlin\u221212"),
    "a hyphen that does not break": ("berlin-12", "berlin\u201112"),
    "a soft hyphen": ("berlin12", "ber\u00adlin12"),
    "a zero-width joiner": ("berlin-12", "berlin\u200d-12"),
    "a blank letter": ("berlin-12", "berlin-12\u3164"),
    "an isolate": ("berlin-12", "\u2066berlin-12\u2069"),
    "composed and decomposed": ("Zoé", "Zoe\u0301"),
    "decomposed around an invisible character": ("Zoé", "Zoe\u200b\u0301"),
    "a ligature": ("ﬁn-1", "fin-1"),
    "a decimal": ("101", "101.0"),
}
CASES: dict[str, tuple[Any, Any]] = {
    "upper case": ("berlin-12", "BERLIN-12 "),
    "a sharp s": ("straße-1", "STRASSE-1"),
    "a final sigma": ("ΣΑΣ", "σας"),
}
# Only the operator can know whether these are one.
LOOSER: dict[str, tuple[Any, Any]] = {
    "punctuation": ("berlin_12", "berlin/12"),
    "no punctuation": ("berlin-12", "berlin 12"),
    "a part with zeros": ("berlin-012", "berlin-12"),
    "a thousands separator": ("1,234", "1234"),
    "zeros after punctuation": ("123-045", "12345"),
    "zeros after punctuation that is gone": ("123-045", "123045"),
}
TRICKS = {f"{of}: {name}": pair for of, group in (("number", NUMBERS), ("text", TEXTS), ("case", CASES),
          ("looser", LOOSER)) for name, pair in group.items()}  # fmt: skip


def named(values: Sequence[Any], rule: IdRule | None) -> list[str]:
    return unit_names(values, rule, "patient", "site.csv")


# --- rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trick", NUMBERS)
def test_one_number_spelt_two_ways_is_one_unit(trick: str) -> None:
    one, other = named(NUMBERS[trick], "number")
    assert one == other


@pytest.mark.parametrize("trick", TEXTS)
@pytest.mark.parametrize("rule", ["text", "case"])
def test_one_text_spelt_two_ways_is_one_unit(trick: str, rule: IdRule) -> None:
    one, other = named(TEXTS[trick], rule)
    assert one == other


@pytest.mark.parametrize("trick", CASES)
def test_case_matters_where_the_site_says_so(trick: str) -> None:
    assert len(set(named(CASES[trick], "text"))) == 1
    assert len(set(named(CASES[trick], "case"))) == 2


@pytest.mark.parametrize("trick", TRICKS)
def test_without_a_rule_what_may_be_one_patient_is_refused_in_counts(trick: str) -> None:
    names = [*named(TRICKS[trick], None), "someone-else-77"]
    if len(set(names)) == 2:  # joined already, by its Unicode form
        check_spellings(names, "patient")
        return
    assert (spellings(names).names, spellings(names).units) == (2, 1)
    with pytest.raises(DataError) as caught:
        check_spellings(names, "patient")
    assert "2 spellings that may name only 1 patients" in caught.value.message
    assert "patient_ids" in caught.value.hint
    assert caught.value.private
    for value in TRICKS[trick]:
        if str(value) not in ("101", "0101", "101.0"):  # these are examples in the hint
            assert str(value) not in str(caught.value)


def test_distinct_ids_are_not_taken_for_one() -> None:
    names = ["101", "102", "1010", "berlin-12", "berlin-13", "lyon-12", "a", "b", "Zoe", "Zoé", "1-12", "p0", "p1"]
    check_spellings(names, "patient")
    assert set(units_by_rule(names).values()) == {None, len(names)}
    assert units_by_rule(["7", "07", "7.0", "8"]) == {"number": 2, "text": 3, "case": 3}


@pytest.mark.parametrize("value", ["1.5", "1e3", "1.23E+12", "12a", "1,234", "--1", "nan", 1.5, 2.0**53, float("inf")])
def test_no_whole_number_is_refused_where_ids_are_numbers(value: Any) -> None:
    with pytest.raises(DataError, match=r"in 1 of 3 rows"):
        named(["101", value, 102], "number")


def test_floats_are_ids_only_where_the_site_says_that_ids_are_numbers() -> None:
    gaps = [101.0, float("nan"), None, "0101", -0.0, ""]
    assert named(gaps, "number") == ["101", "", "", "101", "0", ""]
    for rule in (None, "text", "case"):
        with pytest.raises(DataError, match="ids with a decimal") as caught:
            named(gaps[:3], rule)
        assert ('`patient_ids = "number"`' in caught.value.hint) == (rule is None)
    for value in (True, b"101", ["101"]):
        with pytest.raises(DataError, match="other types in 1 of 1 rows"):
            named([value], "number")


def test_numbers_that_a_spreadsheet_rounded_are_refused() -> None:
    with pytest.raises(DataError, match=r"found 2 ids with an exponent") as caught:
        check_spellings(["1.23457E+12", "2e+9", "7"], "patient")
    assert "1.23457E+12" not in str(caught.value)


def test_floats_of_32_bits_are_refused_as_they_round_ids(tmp_path: Path) -> None:
    for kind, well in ((pa.float32(), False), (pa.float64(), True)):
        ids = pa.array([16777217.0, 16777216.0], kind)
        pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "x"], "p": ids}), tmp_path / "site.parquet")
        study = make_study(unit="p")
        if well:
            assert load_records(tmp_path / "site.parquet", study, rule="number")[0].units == ("16777217", "16777216")
            continue
        with pytest.raises(DataError, match="32 bits"):
            load_records(tmp_path / "site.parquet", study, rule="number")


def test_half_a_surrogate_pair_and_very_long_numbers_have_names() -> None:
    assert named(["\ud800"], "text") == ["?"]
    assert named(["0" * 9000 + "7" * 9000], "number") == ["7" * 9000]


# What people and programs do to an id.
DEEDS: dict[str, Callable[[str], str]] = {
    "nothing": lambda s: s,
    "upper": str.upper,
    "lower": str.lower,
    "title": str.title,
    "NFD": lambda s: unicodedata.normalize("NFD", s),
    "NFKD": lambda s: unicodedata.normalize("NFKD", s),
    "pad": lambda s: f" \t{s}\u3000",
    "mark": lambda s: f"\ufeff{s}",
    "invisible": lambda s: "\u200b".join(s),
    "dash": lambda s: s.replace("-", "\u2013"),
    "spaces": lambda s: s.replace(" ", "\u00a0 "),
    "wide": lambda s: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in s),
    "zeros": lambda s: f"00{s}" if s.isascii() and s.isdigit() else s,
    "decimal": lambda s: f"{s}.0" if s.isascii() and s.isdigit() else s,
}
KEEPS_CASE = {"upper": False, "lower": False, "title": False}
ids = st.one_of(
    st.integers(0, 10**12).map(str),
    st.from_regex(r"[A-Za-zÀ-ž]{1,5}[- ][0-9]{1,4}", fullmatch=True),
    st.text(max_size=6),
)
deeds = st.lists(st.sampled_from(sorted(DEEDS)), max_size=3)
anything = st.text(max_size=8)


def done(text: str, names: Sequence[str]) -> str:
    for name in names:
        text = DEEDS[name](text)
    return text


@settings(deadline=None)
@given(text=anything, rule=st.sampled_from(RULES))
def test_the_name_of_a_name_is_that_name(text: str, rule: IdRule | None) -> None:
    (name,) = named([text], None)
    first = canonical(name, rule)
    assert first == canonical(text.encode("utf-8", "replace").decode(), rule)
    assert first is None or canonical(first, rule) == first


@settings(deadline=None)
@given(one=ids, how=deeds, other=anything)
def test_what_any_rule_joins_is_refused_without_a_rule(one: str, how: list[str], other: str) -> None:
    """So files that are admitted without a rule have the same units under every rule."""
    for a, b in ((one, done(one, how)), (one, other)):
        names = {name for name in named([a, b], None) if name}
        joined = any(len({canonical(name, rule) for name in names} - {None}) < len(names) for rule in ("text", "case"))
        numbers = {canonical(name, "number") for name in names}
        joined |= None not in numbers and len(numbers) < len(names)
        if joined:
            assert spellings(names).names == len(names) == 2


@settings(deadline=None, max_examples=200)
@given(patients=st.lists(st.integers(1, 10**9), min_size=1, max_size=5, unique=True), data=st.data())
def test_no_spelling_of_a_number_makes_two_units_of_one(patients: list[int], data: st.DataObject) -> None:
    spelt = [done(str(each), data.draw(deeds)) for each in patients for _ in range(3)]
    assert len(set(named(spelt, "number"))) == len(patients)
    names = named(spelt, None)
    if len(set(names)) > len(patients):
        with pytest.raises(DataError):
            check_spellings(names, "patient")


# --- end to end ------------------------------------------------------------------------------------------


def two_files(folder: Path, study: Study, spelt: Sequence[Any], **more: Any) -> Worker:
    """Return a real site whose first file has `spelt[0]` as the patient of all rows, and whose second has the other."""
    folder.mkdir(exist_ok=True)
    rows = rows_for(study, 18)
    others = [{**row, "patient": f"{900 + i}"} for i, row in enumerate(rows[12:])]
    for number, value in enumerate(spelt):
        half = [{**row, "patient": value} for row in rows[6 * number : 6 * number + 6]]
        write_rows(folder / f"part{number}.jsonl", [*half, *others[3 * number : 3 * number + 3]])
    known: dict[str, Any] = {"limit": LIMIT, "studies": [study.digest], "declared_count": 7, **more}
    file = site_toml(folder, "north", rows, seed=None, train=["part0.jsonl", "part1.jsonl"], **known)
    write_policy(folder / "north.policy.toml", **{"privacy.unit": known["limit"]["unit"]})
    return worker_of(file)


@pytest.mark.parametrize("trick", TRICKS)
def test_a_site_that_names_no_rule_counts_no_patient_twice(bert: Path, tmp_path: Path, trick: str) -> None:
    study = tiny_study(bert, **PATIENTS)
    worker = two_files(tmp_path, study, TRICKS[trick])
    try:
        data, _ = worker.open(study)
    except DataError as error:
        assert "2 spellings that may name only 1 patients" in error.message  # noqa: PT017 - or it is admitted as one
        return
    assert len(data.training.units) == 7
    assert max(map(len, data.training.units)) == 12


@pytest.mark.parametrize(
    ("rule", "trick"), [("number", each) for each in NUMBERS] + [(r, each) for each in TEXTS for r in ("text", "case")]
)
def test_a_site_that_names_a_rule_counts_no_patient_twice(bert: Path, tmp_path: Path, rule: IdRule, trick: str) -> None:
    study = tiny_study(bert, **PATIENTS)
    pair = (NUMBERS if rule == "number" else TEXTS)[trick]
    data, _ = two_files(tmp_path, study, pair, patient_ids=rule).open(study)
    assert sorted(map(len, data.training.units)) == [1] * 6 + [12]


def test_a_column_of_floats_beside_one_of_integers_is_one_patient(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, **PATIENTS)
    data, _ = two_files(tmp_path, study, [101, 101.0], patient_ids="number").open(study)
    assert sorted(map(len, data.training.units)) == [1] * 6 + [12]
    with pytest.raises(DataError, match="ids with a decimal"):
        two_files(tmp_path / "other", study, [101, 101.0]).open(study)


def test_what_the_coordinator_learns_of_it_is_a_fixed_text(bert: Path, tmp_path: Path) -> None:
    from privet.client.rounds.answers import answer

    study = tiny_study(bert, **PATIENTS)
    worker = two_files(tmp_path, study, TRICKS["case: upper case"])
    told = answer(lambda: Offer(study.document(), "run"), lambda: worker)
    assert vars(told)["message"] == "the site's data files do not meet the study's requirements"


@pytest.mark.parametrize("column", ["patient", "Note_id", "note_id ", None])
def test_a_study_of_another_column_is_refused_before_a_file_is_opened(
    bert: Path, tmp_path: Path, column: str | None
) -> None:
    study = tiny_study(bert, privacy=private(unit="patient"), **{"data.unit": "note_id"})
    config = two_files(tmp_path, study, ("1", "2")).site.config
    worker = Worker(RealSite(config.model_copy(update={"patient_column": column})))
    for file in config.train:
        file.unlink()
    with pytest.raises(PolicyError, match="E_UNIT_COLUMN: patient_column: asked column note_id, allowed "):
        worker.offer(study)
    _, stated = refused(worker, Offer(study.document(), "run"))
    assert (stated.code, stated.rule, stated.asked) == ("E_UNIT_COLUMN", "patient_column", "column note_id")


def test_a_study_of_records_may_name_any_column(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, privacy=private(), **{"data.unit": "patient"})
    worker = two_files(tmp_path, study, ("b-1", "B-1"), limit=RECORDS, patient_column="mrn")
    assert len(worker.open(study)[0].training.units) == 18


def test_the_ledger_tells_names_by_one_rule_from_names_by_another(bert: Path) -> None:
    study = tiny_study(bert, **{**PATIENTS, "data.validation_fraction": 0.2})
    site = SiteConfig(name="north", train=(Path("x.csv"),), patient_column="patient")
    splits = []
    for change in ({}, {"patient_ids": "number"}, {"patient_ids": "text"}, {"patient_ids": "case"}):
        cost = cost_of_round(study, site.model_copy(update=change))
        assert cost is not None
        splits.append(cost.split)
    assert splits[0] == "patient"  # as ledgers of earlier versions name it
    assert len(set(splits)) == 4
    # The rule is about the patients' column alone.
    other = cost_of_round(study, site.model_copy(update={"patient_column": "mrn", "patient_ids": "text"}))
    assert other is not None
    assert other.split == "patient"


def test_without_a_rule_names_are_those_of_earlier_versions() -> None:
    assert named(["Zoe\u0301 ", "\uff11\uff10\uff11", "zoé", None], None) == ["Zoé", "101", "zoé", ""]


# --- simulations -----------------------------------------------------------------------------------------


def test_a_simulated_site_takes_the_column_from_the_study_and_refuses_as_a_real_one(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, **PATIENTS)
    rows = [{**row, "patient": ("b-1", "B-1 ")[i % 2]} for i, row in enumerate(rows_for(study, 12))]
    with pytest.raises(DataError, match="2 spellings"):
        worker_of(site_toml(tmp_path, "north", rows)).open(study)
    data, _ = worker_of(site_toml(tmp_path, "south", rows, patient_ids="text")).open(study)
    assert len(data.training.units) == 1
    pooled = site_toml(tmp_path, "pooled", rows, distinct_files=True)
    with pytest.raises(DataError, match="2 spellings"):
        worker_of(pooled).open(study)


def test_a_simulation_may_name_the_rule_and_its_pool_keeps_a_patient_at_one_site(bert: Path, tmp_path: Path) -> None:
    study = tiny_study(bert, **PATIENTS)
    spelt = [each for i in range(6) for each in (f"b-{i}", f"B-{i} ", f"b\u2013{i}")]
    rows = [{**row, "patient": p} for row, p in zip(rows_for(study, 18), spelt, strict=True)]
    write_rows(tmp_path / "pool.jsonl", rows)
    partition = {"split": "iid", "sites": 3, "least_units": 1, "train": ["pool.jsonl"]}
    table = {"data": "files", "patient_ids": "text", "partition": partition}
    plan = plan_of({**study.document(), "simulation": table}, tmp_path)
    files = write_federation(plan, tmp_path / "run")
    found = [worker_of(file).open(study)[0].training.units for file in files]
    assert [len(rows) for units in found for rows in units] == [3] * 6
    assert all(load_simulated(file).patient_ids == "text" for file in files)


def test_a_rule_needs_a_column_at_a_real_site_only(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('name = "north"\ntrain = ["x.csv"]\npatient_ids = "text"\n')
    with pytest.raises(StudyError, match="patient_ids: needs patient_column"):
        load_site(tmp_path / "site.toml")
    (tmp_path / "site.toml").write_text('name = "n"\ntrain = ["x.csv"]\npatient_ids = "text"\nreproducible_seed = 1\n')
    assert load_simulated(tmp_path / "site.toml").rule_for("anything") == "text"


class Deep(Section):
    order: Annotated[int, SimulationOnly()] = 0
    other: int = 0


class Future(Study):
    """A study as a later version may have it, with fields for simulations."""

    replayed: Annotated[bool, SimulationOnly()] = False
    deep: Deep = Deep()
    many: tuple[Deep, ...] = ()


def future(**more: Any) -> Study:
    document = study_of().document() | more
    return Future.model_validate_json(json.dumps(document), strict=True)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"replayed": True}, "replayed"),
        ({"deep": {"order": 1}}, "deep.order"),
        ({"many": [{"order": 2}]}, "many.order"),
    ],
)
def test_a_field_for_simulations_is_refused_in_production(change: dict[str, Any], field: str) -> None:
    known = Facts(NOON, approved=True, declared=500, began_before=(), patient_column="patient")
    assert judge(policy_of(), future(deep={"other": 7}), known) == ()
    (found,) = judge(policy_of(), future(**change), known)
    assert (found.code, found.asked) == ("E_SIMULATION", field)


def fields(kind: type[BaseModel], at: str = "") -> dict[str, Any]:
    """Return every field of a model and of the models within it, by dotted name."""
    found: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields(field.annotation, f"{at}{name}.")
        else:
            found[at + name] = field
    return found


# Fields whose texts speak of simulations or comparisons, and why real sites may admit them.
ADMITTED = {
    "seed": "public in production too: the adapter's first values and the cohorts follow from it",
    "secure_aggregation.mode": "the policy decides: cohort.secure_aggregation, E_NOT_MASKED",
    "test": "no training file, and read in simulations alone",
    "model.base": "a name at every real site: one that is given a path refuses it",
}


def test_every_field_that_is_for_simulations_is_marked_as_such() -> None:
    known = fields(Study) | fields(SiteConfig)
    assert len(known) > 90
    speaking = {
        name
        for name, field in known.items()
        if any(word in (field.description or "").lower() for word in ("simulat", "comparison", "experiment"))
    }
    marked = {name for name, field in known.items() if any(isinstance(mark, SimulationOnly) for mark in field.metadata)}
    assert speaking - marked == set(ADMITTED)
    # What a simulation is, and is not, is no part of a study: a study file's other tables are refused.
    for name in set(Simulation.model_fields) - set(Study.model_fields) - {"patient_ids"}:
        with pytest.raises(StudyError, match=f"{name}: unknown key"):
            Study.parse(study_of().document() | {name: 1})


def test_what_only_simulated_sites_may_set_is_refused_by_real_ones(bert: Path, tmp_path: Path) -> None:
    own = set(SimulatedConfig.model_fields) - set(SiteConfig.model_fields)
    assert own == {"reproducible_seed", "distinct_files"}
    values = {"reproducible_seed": "1", "distinct_files": "true"}
    for name in own:
        (tmp_path / "site.toml").write_text(f'name = "north"\ntrain = ["x.csv"]\n{name} = {values[name]}\n')
        with pytest.raises(StudyError, match=f"{name}: unknown key"):
            load_site(tmp_path / "site.toml")
    # Nor does code that hands a real site the file of a simulated one get past it.
    study = tiny_study(bert, **PATIENTS)
    config = SimulatedConfig(name="north", train=(Path("x.csv"),), reproducible_seed=1, distinct_files=True)
    assert set(simulation_fields(config)) == own
    with pytest.raises(RefusedError, match="reproducible_seed, distinct_files"):
        Worker(RealSite(config)).open(study)


# --- `privet data` ---------------------------------------------------------------------------------------


def test_the_command_counts_units_over_all_files(bert: Path, tmp_path: Path) -> None:
    document = make_study(unit="p").document()
    study = tmp_path / "study.toml"

    def written(unit: str) -> Path:
        text = [
            'name = "s"\n[model]\nbase = "b"\nsha256 = { "model.safetensors" = "' + "0" * 64 + '" }',
            f'[task]\nkind = "text-classification"\nlabels = {json.dumps(document["task"]["labels"])}',
            '[data]\ncolumns = { text = "text", label = "label" }\nunit = "p"\n[lora]\ntargets = ["query"]',
            "[training]\nlearning_rate = 0.1\nrounds = 1\nlocal_steps = 1\nsampling_rate = 0.1",
            f'[privacy]\nmode = "local"\nunit = "{unit}"\nepsilon = 1.0\ndelta = 1e-5\nclip_norm = 1.0',
        ]
        study.write_text("\n".join(text) + "\n")
        return study

    files = [
        write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n} {i}", "label": "x", "p": p} for i, p in enumerate(found)])
        for n, found in enumerate((["101", "102", "102"], ["101", "103"]))
    ]
    result = run(commands.data, written("patient"), *files)
    assert "all files: 5 records, 3 units of privacy (each patient is one)" in result.output
    total = json.loads(run(commands.data, study, *files, "--json").output)["total"]
    assert total == {
        "records": 5, "units": 3, "unit": "patient", "column": "p", "patient_ids": None,
        "alike": {"names": 0, "units": 0}, "token_lengths": None, "declared_count": 10,
    }  # fmt: skip
    assert json.loads(run(commands.data, written("record"), *files, "--json").output)["total"]["units"] == 5

    write_rows(files[1], [{"text": "t", "label": "x", "p": "0101"}])
    with pytest.raises(DataError, match='"number" gives 2, "text" gives 3'):
        run(commands.data, written("patient"), *files)
    site = tmp_path / "site.toml"
    lines = [f'name = "north"\ntrain = {json.dumps([str(file) for file in files])}', 'patient_column = "p"']
    site.write_text("\n".join([*lines, 'patient_ids = "number"\n']))
    assert "4 records, 2 units of privacy" in run(commands.data, study, "--site", site).output
    site.write_text(site.read_text().replace('"p"', '"mrn"'))
    with pytest.raises(PrivetError):
        run(commands.data, study, "--site", site)
    with pytest.raises(StudyError, match="at least one data file"):
        run(commands.data, study)


def test_files_together_are_those_that_are_compared(tmp_path: Path) -> None:
    study = make_study(unit="p")
    parts = [
        load_records(write_rows(tmp_path / f"{i}.jsonl", [{"text": "t", "label": "x", "p": p}]), study)[0]
        for i, p in enumerate(("b-1", "B-1"))
    ]
    for part in parts:
        check_spellings(part.units, "p")
    with pytest.raises(DataError):
        check_spellings(concatenate(parts).units, "p")
    assert replace(parts[0]).units == ("b-1",)
