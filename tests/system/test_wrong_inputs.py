"""Wrong files, studies and arguments: each kind ends with its exit code and one error that says what mends it."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from privet.common import errors
from privet.server.rounds.state import RunDirectory
from tests.conftest import Run
from tests.simulations.test_simulate import _toml, study_file
from tests.support.synthetic import PEFT_CONFIG, start_adapter, study_of
from tests.support.tiny import LABELS, private, sha256_table, tiny_document
from tests.support.wrong import SECRET, Kind, Story, Table, play

GOOD = "text,label,patient\n" + "".join(f"{SECRET} {n},{LABELS[n % 3]},{SECRET}-{n}\n" for n in range(12))


@dataclass(frozen=True)
class Desk:
    """A researcher's directory, and a base."""

    folder: Path
    base: Path

    def file(self, name: str, content: str | bytes) -> Path:
        """Write a file."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def study(self, overrides: dict[str, Any] | None = None, old: str = "", new: str = "") -> Path:
        """Write a study without simulated sites, in which a part of the text is replaced."""
        lines: list[str] = []
        _toml(tiny_document(self.base, overrides or {}), "", lines)
        text = "\n".join(lines) + "\n"
        assert old in text
        return self.file("study.toml", text.replace(old, new))

    def simulated(self, overrides: dict[str, Any] | None = None, simulation: dict[str, Any] | None = None) -> Path:
        """Write a study over three simulated sites, and their files."""
        return study_file(self.folder / "simulated", self.base, overrides, simulation)

    def site(self, file: str, more: str = "") -> Path:
        """Write a site file."""
        return self.file("site.toml", f'name = "north"\ntrain = ["{file}"]\n{more}')

    def run(self) -> Path:
        """Make the directory of a run."""
        if not (self.folder / "run").exists():
            RunDirectory.create(self.folder / "run", study_of(), start_adapter(), PEFT_CONFIG)
        return self.folder / "run"


@pytest.fixture
def desk(tmp_path: Path, bert: Path) -> Desk:
    return Desk(tmp_path, bert)


# --- data files ------------------------------------------------------------------------------------------

data = Table()


def rewritten(desk: Desk, name: str, wrong: str | bytes, good: str | bytes = GOOD) -> Story:
    """Examine a file that is wrong, and then one that is right."""
    study, file = desk.study(), desk.file(name, wrong)
    yield ("data", study, file)
    desk.file(name, good)
    yield ("data", study, file)


def proposed(desk: Desk, name: str, content: str | bytes) -> Story:
    """Examine a file that is written in a way of its own, and take the settings that are proposed."""
    study = desk.study()
    desk.file(name, content)
    said = yield ("data", study, "--site", desk.site(name))
    settings = said.out.partition("[format]")[2].splitlines()[1:]
    lines = [line.strip() for line in settings if line.startswith("  ") and not line.startswith("  (")]
    yield ("data", study, "--site", desk.site(name, "[format]\n" + "\n".join(lines).replace('"?"', '"heart"') + "\n"))


@data(2, "a.csv: it does not exist", "check the path")
def missing(desk: Desk) -> Story:
    study = desk.study()
    yield ("data", study, desk.folder / "a.csv")
    yield ("data", study, desk.file("a.csv", GOOD))


@data(2, "it is a directory, not a file", "check the path")
def directory(desk: Desk) -> Story:
    study = desk.study()
    file = desk.file("a.csv", GOOD)
    (desk.folder / "b.csv").mkdir()
    yield ("data", study, desk.folder / "b.csv")
    yield ("data", study, file)


@data(2, "is empty: it has 0 bytes", "export the file again")
def empty(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", "")


@data(2, "at least 1 record, found none: 0 rows", "a site without records cannot take part")
def no_rows(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", "text,label\n")


@data(2, "expected the column names text, label in the first line", "write the column names into the first line")
def no_header(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", GOOD.partition("\n")[2])


@data(2, "found 1 other values separated by commas", 'delimiter = "semicolon"')
def wrong_separator(desk: Desk) -> Story:
    yield from proposed(desk, "a.csv", GOOD.replace(",", ";"))


@data(2, "not text in UTF-8: line 2", "privet data STUDY FILE")
def wrong_encoding(desk: Desk) -> Story:
    yield from proposed(desk, "a.csv", GOOD.replace(SECRET, f"{SECRET}ä").encode("latin-1"))


@data(2, "line 5: text after a closing quote", "each quote in it twice")
def stray_quote(desk: Desk) -> Story:
    wrong = GOOD.replace(f"{SECRET} 3", f'"{SECRET}" 3')
    yield from rewritten(desk, "a.csv", wrong, GOOD.replace(f"{SECRET} 3", f'"""{SECRET}"" 3"'))


@data(2, "line 14: expected at least 2 values, found 1", "no row of another length")
def short_row(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", GOOD + SECRET + "\n")


@data(2, "line 14: the column names once more", "one name per column in its first line")
def joined_files(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", GOOD + GOOD)


@data(2, "its end is missing", "copy or export it again")
def truncated_gzip(desk: Desk) -> Story:
    packed = gzip.compress(GOOD.encode())
    yield from rewritten(desk, "a.csv.gz", packed[:-9], packed)


@data(2, "line 2 is not one JSON object", "one JSON object on its own line")
def bad_json_line(desk: Desk) -> Story:
    good = json.dumps({"text": SECRET, "label": "heart"})
    yield from rewritten(desk, "a.jsonl", f"{good}\n{good[:-5]}\n", f"{good}\n{good}\n")


@data(2, "expected the columns label, found only text, diagnosis, patient", "data.columns")
def wrong_column(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", GOOD.replace("label", "diagnosis"))


@data(2, "12 rows read, dropped: missing value: 12", "correct the dropped rows")
def all_unlabelled(desk: Desk) -> Story:
    wrong = GOOD
    for label in LABELS:
        wrong = wrong.replace(f",{label},", ",,")
    yield from rewritten(desk, "a.csv", wrong)


@data(2, "found others in 4 of 12 rows: rows 1, 4, 7, 10", "`privet data STUDY FILE` proposes it")
def unknown_labels(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", GOOD.replace(",heart,", f",{SECRET},"))


@data(2, "2 spellings that may name only 1 patients", 'patient_ids = "text"')
def ids_of_two_spellings(desk: Desk) -> Story:
    study = desk.study({"privacy": private(unit="patient"), "data.unit": "patient"})
    rows = "".join(f"{SECRET},{label},{start}{SECRET}\n" for label, start in (("heart", "A"), ("skin", "a")))
    file = desk.file("a.csv", "text,label,patient\n" + rows)
    yield ("data", study, file)
    site = desk.site("a.csv", 'patient_column = "patient"\npatient_ids = "text"\n')
    yield ("data", study, "--site", site)


@data(2, r"cannot be read \(Permission denied\)", "permissions")
def unreadable(desk: Desk) -> Story:
    study, file = desk.study(), desk.file("a.csv", GOOD)
    read = Path.read_bytes

    def refuse(self: Path) -> bytes:
        if self.name == file.name:  # also where the tests run as root, who may read everything
            raise PermissionError(13, "Permission denied", str(self))
        return read(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        yield ("data", study, file)
    yield ("data", study, file)


@data(2, "a workbook or an archive", "save the sheet as CSV UTF-8")
def workbook(desk: Desk) -> Story:
    yield from rewritten(desk, "a.csv", b"PK\x03\x04" + SECRET.encode())


@data(2, "expected a file name that ends in", "convert the file")
def unknown_kind_of_file(desk: Desk) -> Story:
    study = desk.study()
    yield ("data", study, desk.file("a.txt", GOOD))
    yield ("data", study, desk.file("a.csv", GOOD))


@data(2, "not a readable Parquet file", "export the file again")
def broken_parquet(desk: Desk) -> Story:
    study = desk.study()
    yield ("data", study, desk.file("a.parquet", f"PAR1 {SECRET}"))


@data(2, r"holds more than 100 bytes when it is decompressed", "divide the file")
def too_long(desk: Desk) -> Story:
    study, file = desk.study(), desk.file("a.csv.gz", gzip.compress(GOOD.encode()))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("privet.client.training.decoding.MOST_BYTES", 100)
        yield ("data", study, file)
    yield ("data", study, file)


@data.each
def test_data_files(kind: Kind, privet: Run, desk: Desk) -> None:
    play(kind, privet, desk)


# --- studies ---------------------------------------------------------------------------------------------

studies = Table()


def corrected(desk: Desk, wrong: Path) -> Story:
    """Check a study that is wrong, and then one that is right."""
    yield ("check", wrong)
    yield ("check", desk.study())


@studies(2, "there is no study file", "`privet new FILES` makes a study")
def no_study(desk: Desk) -> Story:
    said = yield ("check", desk.folder / "study.toml")
    for name in ("a", "b"):
        desk.file(f"{name}.csv", GOOD.replace(SECRET, f"text {name}"))
    files = [desk.folder / f"{name}.csv" for name in ("a", "b")]
    made = [*said.command("new")[:1], *files, "--out", desk.folder / "study.toml", "--base", desk.base, "--yes"]
    yield made
    yield ("check", desk.folder / "study.toml")


@studies(2, "expected a study file, found the directory", r"name the study file \(TOML\)")
def study_is_a_directory(desk: Desk) -> Story:
    yield from corrected(desk, desk.folder)


@studies(2, "expected a study file, found the sweep file", "name the study file")
def another_kind_of_file(desk: Desk) -> Story:
    yield from corrected(desk, desk.file("sweep.toml", 'study = "study.toml"\n[fields]\nseed = [1]\n'))


@studies(2, r"not valid TOML: .*line 10, column 6", "correct the file at the line and column")
def not_toml(desk: Desk) -> Story:
    yield from corrected(desk, desk.study(old="[task]", new="[task"))


@studies(2, "expected a study file, found the data file .*a.csv", "privet new .*a.csv")
def data_for_a_study(desk: Desk) -> Story:
    yield ("check", desk.file("a.csv", GOOD))
    yield ("check", desk.study())


@studies(2, "not valid TOML: line 1 is not text in UTF-8", "save the file as UTF-8")
def study_in_latin_1(desk: Desk) -> Story:
    yield from corrected(desk, desk.file("latin.toml", 'name = "a" # für\n'.encode("latin-1")))


@studies(2, "training.learning_rat: unknown key; did you mean learning_rate", "correct each field")
def unknown_key(desk: Desk) -> Story:
    yield from corrected(desk, desk.study(old="learning_rate", new="learning_rat"))


@studies(2, "trainin: unknown key; did you mean training", "correct each field")
def unknown_table(desk: Desk) -> Story:
    yield from corrected(desk, desk.study(old="[training]", new="[trainin]"))


@studies(2, "sites.alpha.tran: unknown key; did you mean train", "correct each field")
def unknown_key_of_a_simulated_site(desk: Desk) -> Story:
    yield from corrected(desk, desk.simulated({}, {"sites": {"alpha": {"tran": ["alpha.jsonl"]}}}))


@studies(2, "training.rounds: input should be a valid integer, got 'three'", "correct each field")
def wrong_type(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"training.rounds": "three"}))


@studies(2, "task: is missing", "correct each field")
def missing_table(desk: Desk) -> Story:
    yield from corrected(desk, desk.study(old="[task]", new="[exercise]"))


@studies(2, "there is no directory .*nowhere", "copy the model there, or correct model.base")
def base_missing(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"model.base": "./nowhere"}))


@studies(5, "model.safetensors .* expected SHA-256 0{64}, found [0-9a-f]{64}", "copy the model that the study pins")
def wrong_pin(desk: Desk) -> Story:
    pins = {**sha256_table(desk.base), "model.safetensors": "0" * 64}
    yield from corrected(desk, desk.study({"model.sha256": pins}))


@studies(2, "privacy.epsilon: input should be greater than 0, got 0", "correct each field")
def epsilon_0(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"privacy": private(epsilon=0.0)}))


@studies(2, "privacy.delta: input should be less than 0.1, got 0.2", "correct each field")
def delta_above_a_tenth(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"privacy": private(delta=0.2)}))


@studies(2, "training.sampling_rate: input should be less than or equal to 1, got 1.5", "correct each field")
def sampling_rate_above_1(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"training.sampling_rate": 1.5}))


@studies(2, "labels: a label is named twice", "correct each field")
def labels_twice(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"task.labels": ["heart", "skin", "heart"]}))


@studies(2, "expected simulation.data", "add the table .simulation.")
def nothing_to_simulate(desk: Desk) -> Story:
    yield ("simulate", desk.study(), "--out", desk.folder / "run")
    yield ("check", desk.simulated())


@studies(2, "no layer querry; its linear layers are dense, key, query, value", "correct the names")
def no_such_layer(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"lora.targets": ["querry"]}))


@studies(2, "the study demands 4 sites, the simulation has 3", "correct these fields")
def more_sites_than_there_are(desk: Desk) -> Story:
    yield ("check", desk.simulated({"cohort.min_sites": 4}))
    yield ("check", desk.simulated({"cohort.min_sites": 3}))


@studies(2, "task.kind: input should be 'text-classification', .* got 'text-clasification'", "correct each field")
def unknown_task(desk: Desk) -> Story:
    yield from corrected(desk, desk.study(old='"text-classification"', new='"text-clasification"'))


@studies(2, "name: string should match pattern .* got 'My study'", "correct each field")
def name_with_spaces(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"name": "My study"}))


@studies(2, "privacy.unit: patient needs data.unit", "correct each field")
def patients_without_a_column(desk: Desk) -> Story:
    yield from corrected(desk, desk.study({"privacy": private(unit="patient")}))


@studies(2, "the study needs the columns label, text, but `privet deploy` trains on generated notes", "deploy.toml")
def deployed_on_other_columns(desk: Desk) -> Story:
    yield ("deploy", desk.study(), "--out", desk.folder / "deployed")


@studies.each
def test_studies(kind: Kind, privet: Run, desk: Desk) -> None:
    play(kind, privet, desk)


def test_one_file_at_two_simulated_sites_is_allowed_with_a_warning(privet: Run, desk: Desk) -> None:
    same = {"train": ["alpha.jsonl"], "test": ["alpha-test.jsonl"]}
    code, out, _ = privet("check", desk.simulated({}, {"sites": dict.fromkeys("abc", same)}))
    assert (code, "WARNING: 1 training files are at more than one site: a, b, c" in out) == (0, True)


# --- arguments -------------------------------------------------------------------------------------------

arguments = Table()


@arguments(2, "No such command 'chek'", "Did you mean 'check'")
def unknown_command(desk: Desk) -> Story:
    yield ("chek", desk.study())
    yield ("check", desk.study())


@arguments(2, "No such command 'doktor'", "Did you mean 'doctor'")
def unknown_command_of_a_site(desk: Desk) -> Story:
    yield ("site", "doktor", desk.folder)


@arguments(2, "No such option '--output'", "Did you mean '--out'")
def unknown_option(desk: Desk) -> Story:
    yield ("simulate", desk.study(), "--output", desk.folder / "run")


@arguments(2, "^Missing option '--policy'$", "^--policy: A C2SP policy file.*`privet audit verify --help`")
def missing_option(desk: Desk) -> Story:
    yield ("audit", "verify", desk.folder)
    yield ("audit", "verify", "--help")


@arguments(2, "Missing argument 'STUDY'", "check --help")
def missing_argument(desk: Desk) -> Story:
    yield ("check",)
    yield ("check", desk.study())


@arguments(6, "taken exists already", "choose another directory with --out")
def out_exists(desk: Desk) -> Story:
    (desk.folder / "taken").mkdir()
    desk.file("taken/file", "x")
    yield ("simulate", desk.simulated(), "--out", desk.folder / "taken")


@arguments(6, "the directory .*/file cannot be made", "choose a path in a directory")
def out_below_a_file(desk: Desk) -> Story:
    desk.file("file", "x")
    yield ("simulate", desk.simulated(), "--out", desk.folder / "file/run")


@arguments(6, "file.toml: expected a new file, found one that exists", "--force`")
def new_study_over_a_file(desk: Desk) -> Story:
    desk.file("file.toml", "x")
    file = desk.file("a.csv", GOOD.replace(SECRET, "text"))
    new = ("new", file, "--out", desk.folder / "file.toml", "--base", desk.base, "--yes")
    said = yield new
    assert "--force" in said.err
    yield (*new, "--force")


@arguments(6, "adapter exists already", "`privet adapter .* DIRECTORY`")
def adapter_over_a_directory(desk: Desk) -> Story:
    (desk.folder / "adapter").mkdir()
    desk.file("adapter/file", "x")
    said = yield ("adapter", desk.study(), desk.folder / "adapter")
    yield said.command("adapter", DIRECTORY=desk.folder / "another")


@arguments(6, "is not a run directory: it does not exist", "`privet simulate STUDY`")
def resume_of_nothing(desk: Desk) -> Story:
    yield ("simulate", "--resume", desk.folder / "none")


@arguments(6, "is not a run directory: there is no study.json and no adapter", "name the directory that the run was")
def resume_of_no_run(desk: Desk) -> Story:
    yield ("simulate", "--resume", desk.folder)


@arguments(2, "study.json: .*\n.*future: unknown key", "the version of privet that wrote it")
def run_of_another_version(desk: Desk) -> Story:
    run = desk.run()
    study = json.loads((run / "study.json").read_bytes())
    (run / "study.json").write_text(json.dumps({**study, "future": 1}))
    yield ("report", run)


@arguments(2, "'--workers': -1 is not in the range x>=1", "simulate --help")
def negative_number(desk: Desk) -> Story:
    yield ("simulate", desk.study(), "--workers", "-1")


@arguments(2, "'--gather': -1.0 is not in the range x>=0", "run --help")
def negative_time(desk: Desk) -> Story:
    yield ("coordinator", "run", desk.study(), "--gather", "-1")


@arguments(2, "either a study file or --resume with a directory, got both", "privet simulate --resume RUN")
def two_options_that_exclude_each_other(desk: Desk) -> Story:
    yield ("simulate", desk.study(), "--resume", desk.folder)


@arguments(2, "--engine: expected memory or ray, got 'steam'", "leave --engine out")
def unknown_engine(desk: Desk) -> Story:
    yield ("simulate", desk.study(), "--engine", "steam")


@arguments(6, "study.toml is not a run directory: it is a file", "`privet simulate STUDY`")
def study_for_a_run(desk: Desk) -> Story:
    yield ("report", desk.study())


@arguments(6, "study.toml is neither a run directory nor a release: it is a file", "the directory `release` in it")
def study_for_a_release(desk: Desk) -> Story:
    yield ("predict", desk.study(), "--text", SECRET)


@arguments(2, "expected a study file, found the directory", "name the study file")
def run_for_a_study(desk: Desk) -> Story:
    yield ("check", desk.run())


@arguments(2, "expected a sweep file, found the study file", "name the sweep file")
def study_for_a_sweep(desk: Desk) -> Story:
    yield ("sweep", desk.study())


@arguments(2, "expected the directory of a base model, but it does not exist", "check the path")
def no_base(desk: Desk) -> Story:
    yield ("base", desk.folder / "none")
    yield ("base", desk.base)


@arguments(6, "the run is not finished", "at its coordinator, run `privet coordinator resume run`")
def run_that_is_not_finished(desk: Desk) -> Story:
    yield ("compare", desk.run(), desk.run())


@arguments(2, "fields.seed: tuple should have at least 1 item", "correct each field")
def sweep_over_no_values(desk: Desk) -> Story:
    yield ("sweep", desk.file("sweep.toml", 'study = "study.toml"\ndata = "public"\n[fields]\nseed = []\n'))


@arguments(2, "could not check: .*none: it cannot be read", "consortium/log.policy")
def no_policy_of_a_log(desk: Desk) -> Story:
    yield ("audit", "verify", desk.run(), "--policy", desk.folder / "none")


@arguments(2, "could not check: .*study.toml: policy of the log: line 1", "get the policy file again")
def study_for_the_policy_of_a_log(desk: Desk) -> Story:
    yield ("audit", "show", desk.folder, "--policy", desk.study())


@arguments(2, "expected either --text or --data, got neither", "`privet predict RUN --data FILE`")
def nothing_to_predict(desk: Desk) -> Story:
    yield ("predict", desk.run())


@arguments(2, "--out: there is no directory", "make the directory")
def out_in_no_directory(desk: Desk) -> Story:
    file = desk.file("a.csv", GOOD.replace(SECRET, "text"))
    new = ("new", file, "--out", desk.folder / "none/study.toml", "--base", desk.base, "--yes")
    yield new
    (desk.folder / "none").mkdir()
    yield new


@arguments.each
def test_arguments(kind: Kind, privet: Run, desk: Desk) -> None:
    play(kind, privet, desk)


def test_the_page_about_errors_has_each_exit_code() -> None:
    page = Path("docs/errors.md").read_text()
    rows = {int(code): name for code, name in re.findall(r"^\| (\d+) \| (?:`(\w+)`)? ?\|", page, re.MULTILINE)}
    named = {code: getattr(errors, name) for code, name in rows.items() if name}
    assert {code: kind.exit_code for code, kind in named.items()} == {code: code for code in named}
    found = {
        kind.exit_code
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.PrivetError)
    }
    assert found == set(named)
    assert set(rows) - set(named) == {0, errors.LOG_ALONE, 130}


def test_a_full_disk_and_a_broken_database_are_told_in_words(privet: Run, desk: Desk) -> None:
    """Also where no command expects them."""
    import sqlite3

    for fault, code, said in (
        (OSError(28, "No space left on device", "/x/y"), 6, "/x/y cannot be used (No space left on device)"),
        (sqlite3.OperationalError(f"row {SECRET}"), 6, "a database cannot be read or written"),
    ):
        with pytest.MonkeyPatch.context() as patched:

            def fail(*_: object, fault: Exception = fault) -> None:
                raise fault

            patched.setattr("privet.simulations.data.federation.load_plan", fail)
            found, out, err = privet("check", desk.study())
        assert (found, out) == (code, "")
        assert said in err
        assert " hint: " in err
        assert SECRET not in err
