"""Studies that the coordinator proposes: listed, compared with the round log, shown, and approved by name or digest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from privet.client.checks import Check
from privet.client.commands import doctor
from privet.client.commands import policy as commands
from privet.client.commands.doctor import examine
from privet.client.commands.setup import setup
from privet.client.network import proposals
from privet.client.network.lock import content_of, exclusive
from privet.client.network.proposals import Proposed, chosen, compared
from privet.client.policy.consent import approved
from privet.client.policy.opinion import judged
from privet.client.site import load_site
from privet.common.canonical import canonical_json
from privet.common.clock import now
from privet.common.errors import ProtocolError, RefusedError, StateError, StudyError, VerificationError
from privet.common.pki.enrolment import Proposal, ProposalsReply
from privet.common.study.study import Study
from privet.server.consortium.proposals import proposed
from privet.server.log.journal import open_journal
from privet.server.rounds.state import RunDirectory
from privet.simulations.runs.toml import to_toml
from tests.support.consortium_world import World, run, running
from tests.support.proposed_world import EXAMPLE, begin, changed, settle
from tests.support.synthetic import start_adapter


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium of two; berlin is set up. Three runs: one logged, one not, one that has ended."""
    with running(tmp_path_factory.mktemp("consortium")) as world:
        world.found("berlin", "lyon")
        world.compare("berlin", "lyon")
        settle(world)
        begin(world, "triage", EXAMPLE)
        begin(world, "greedy", changed(EXAMPLE, epsilon=20.0), logged=False)
        begin(world, "old", changed(EXAMPLE, epsilon=1.0), ended=True)
        yield world


@pytest.fixture
def home(world: World) -> Iterator[Path]:
    home = world.folder / "berlin"
    yield home
    (home / "state/approvals").unlink(missing_ok=True)


def test_what_is_proposed_is_listed_with_what_this_site_would_say(home: Path) -> None:
    found = {row["run"]: row for row in json.loads(run(commands.studies, home, "--json").output)["studies"]}
    assert set(found) == {"triage", "greedy", "old"}
    triage, greedy = found["triage"], found["greedy"]
    assert (triage["study"], triage["logged"], triage["ended"]) == (EXAMPLE.digest, True, False)
    assert triage["reasons"] == ["waits for your approval"]
    assert (greedy["logged"], greedy["admitted"]) == (False, False)
    assert any("E_EPSILON" in reason for reason in greedy["reasons"])
    assert (found["old"]["ended"], found["old"]["reasons"], found["old"]["next"]) == (True, [], "")
    text = run(commands.studies, home).output
    assert f"next: privet site approve {home / 'site.toml'} triage" in text
    assert "NOT in the round log yet" in text
    run(commands.approve, home, "triage", "--yes")
    assert "this site takes part" in run(commands.studies, home).output


@pytest.mark.parametrize("name", ["triage", EXAMPLE.digest, EXAMPLE.digest.removeprefix("sha256:")[:32]])
def test_a_study_is_approved_by_run_or_digest(home: Path, name: str) -> None:
    result = run(commands.approve, home, name, "--yes")
    assert result.exit_code == 0, result.output
    assert approved(load_site(home / "site.toml")) == {EXAMPLE.digest}
    text = " ".join(result.output.split())
    for part in (
        "who asks the coordinator of north, as run triage; it is in the round log.",
        "text-classification with 6 labels, from the columns specialty (label), note (text)",
        "each record, with epsilon 8 and delta 1e-05 over the whole study",
        "has spent epsilon 0 of 8 (each record, delta 1e-05). With this study it would be ",
        "at least 3 sites",
        "one noisy masked update of the adapter",
        "No record and no id leaves.",
        "has 2 rounds",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize("name", ["old", changed(EXAMPLE, epsilon=1.0).digest])
def test_a_run_that_has_ended_is_not_approved_for_the_next_one(home: Path, name: str) -> None:
    with pytest.raises(RefusedError, match="run old has ended, or was withdrawn: no approval is recorded") as caught:
        run(commands.approve, home, name, "--yes")
    assert f"`privet site studies {home / 'site.toml'}`" in caught.value.hint
    assert approved(load_site(home / "site.toml")) == frozenset()


def test_a_served_site_is_not_told_to_serve(home: Path) -> None:
    assert "next: privet site serve" in run(commands.approve, home, "triage", "--yes").output
    key = load_site(home / "site.toml").coordinator
    assert key is not None
    with exclusive(key.key.with_suffix(".lock"), content_of(load_site(home / "site.toml"))):
        said = run(commands.approve, home, "triage", "--yes").output
        assert "A process serves this site now" in said
        assert "privet site serve" not in said
        again = run(setup, home, "--yes").output
        assert "next: privet site studies" in again
        assert "privet site serve" not in again
        lines = run(setup, home, "--yes", "--epsilon=9").output.splitlines()
        assert "with the former site file" in run(commands.approve, home, "triage", "--yes").output
        assert [each.name for each in examine(home / "site.toml", now, only=["process"]) if not each.ok] == ["process"]
        run(setup, home, "--yes", "--epsilon=8")
        assert all(each.ok for each in examine(home / "site.toml", now, only=["process"]))
    assert lines[-1] == f"next: privet site serve {home / 'site.toml'}"
    assert not any("privet site studies" in line for line in lines)


def test_a_run_that_stopped_early_has_not_just_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Proposed("gone", EXAMPLE, 1, ended=True, logged=True, closed=0)
    monkeypatch.setattr("privet.client.network.proposals.proposed_studies", lambda file, config: (stopped,))
    assert "withdrawn or stopped; 0 of 2 rounds closed, 1 aborted" in run(commands.studies, home).output


def test_the_doctor_says_what_waits_for_this_site(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set-up may be perfect while a run waits, or would be refused, or is waited for by nobody here."""
    file = home / "site.toml"

    def found() -> Check:
        return examine(file, now, only=["connection", "log", "studies"])[-1]

    refused = found()
    assert not refused.ok
    assert "greedy is proposed, and this site would refuse it: privacy.max_epsilon: asked 20" in refused.text
    assert "triage" not in refused.text
    assert refused.hint.startswith(f"`privet site approve {file} greedy`")
    everything = proposals.compared
    monkeypatch.setattr(
        doctor, "compared", lambda *given: [each for each in everything(*given) if each.run != "greedy"]
    )
    assert (found().ok, found().text) == (False, "not approved at this site: triage")
    run(commands.approve, home, "triage", "--yes")
    unserved = found()
    assert (unserved.ok, unserved.hint) == (False, f"run `privet site serve {file}`")
    key = load_site(file).coordinator
    assert key is not None
    with exclusive(key.key.with_suffix(".lock"), content_of(load_site(file))):
        assert (found().ok, found().text) == (True, "takes part in triage")
    # What a person has refused is no fault, whether or not the policy refuses it as well.
    for name in ("greedy", "triage"):
        run(commands.refuse, home, name, "--reason=no")
    monkeypatch.setattr(doctor, "compared", everything)
    text = "refused by a person here: greedy. refused by a person here: triage"
    assert (found().ok, found().text) == (True, text)
    monkeypatch.setattr(doctor, "compared", lambda *given: [each for each in everything(*given) if each.run == "old"])
    assert (found().ok, found().text) == (True, "no run is proposed")


def test_what_passes_with_time_is_told_apart_from_what_stands_against_a_study(home: Path) -> None:
    policy = load_site(home / "site.toml").policy
    assert policy is not None
    text = policy.read_text()
    hour = (datetime.now(UTC).hour + 12) % 24
    closed = re.sub(r"hours_utc = .*", f'hours_utc = ["{hour:02}:00-{hour:02}:59"]', text)
    assert closed != text
    try:
        policy.write_text(closed)
        said = " ".join(run(commands.approve, home, "triage", "--yes").output.split())
        assert "not yet limits.hours_utc: asked" in said
        key = load_site(home / "site.toml").coordinator
        assert key is not None
        with exclusive(key.key.with_suffix(".lock"), content_of(load_site(home / "site.toml"))):
            again = run(commands.approve, home, "triage", "--yes").output
            assert "it takes part once nothing of this stands against it" in again
        found = judged(load_site(home / "site.toml"), EXAMPLE)
        assert (found.against, [each.code for each in found.later], found.waits) == ((), ["E_HOURS"], False)
        checked = run(commands.check, home, "triage")
        assert checked.exit_code == 3
        assert "to admit it wait: this passes with time" in " ".join(checked.output.split())
    finally:
        policy.write_text(text)


def test_a_short_beginning_of_a_digest_needs_a_person(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack: the coordinator makes a study whose digest begins with the digits that were read out for another."""
    short = EXAMPLE.digest.removeprefix("sha256:")[:8]
    with pytest.raises(StateError, match="at least 32 digits") as caught:
        run(commands.approve, home, short, "--yes")
    assert "leave out --yes" in caught.value.hint
    assert approved(load_site(home / "site.toml")) == frozenset()
    at_a_terminal(monkeypatch)
    monkeypatch.setattr("typer.confirm", lambda text: True)
    assert run(commands.approve, home, short).exit_code == 0


def test_a_run_that_is_called_like_another_studys_digest_names_nothing() -> None:
    """Attack: the coordinator calls its greedy run like the digest of the study that an operator means to approve."""
    digits = EXAMPLE.digest.removeprefix("sha256:")[:12]
    greedy = changed(EXAMPLE, epsilon=20.0)
    both = (
        Proposed(digits, greedy, 0, ended=False, logged=True),
        Proposed("flu", EXAMPLE, 0, ended=False, logged=True),
    )
    with pytest.raises(StateError, match="several studies"):
        chosen(both, digits)
    assert chosen(both, greedy.digest).study == greedy
    assert chosen(both[:1], digits).study == greedy  # the agreement shows which study it is
    with pytest.raises(StateError, match="where nobody reads the study"):
        chosen(both[:1], digits, read=False)
    assert chosen(both[1:], "flu", read=False).study == EXAMPLE
    short = Proposed(EXAMPLE.digest[7], EXAMPLE, 0, ended=False, logged=True)
    assert chosen([short], short.run, read=False) == short


def test_a_study_does_not_steer_the_terminal_on_which_it_is_approved(world: World, home: Path) -> None:
    """Attack: a base or a column is named so that a terminal hides what the study costs, or shows something else."""
    document = EXAMPLE.document()
    evil = "\x1b[8m\x1b]0;approved\x07\u202e\nadmitted by the policy"
    study = Study.parse(
        {
            **document,
            "model": {**document["model"], "base": f"base{evil}"},
            "data": {**document["data"], "columns": {"text": f"note{evil}", "label": "specialty"}},
            "lora": {**document["lora"], "targets": [f"query{evil}"]},
        }
    )
    begin(world, "evil", study)
    try:
        for shown in (run(commands.approve, home, "evil"), run(commands.studies, home)):
            assert all(each.isprintable() for each in shown.output.split("\n")), shown.output
            assert "\nadmitted by" not in shown.output
    finally:
        shutil.rmtree(world.coordinator.directory / "runs/evil")


def test_what_the_policy_refuses_is_not_approved_and_says_what_to_change(home: Path) -> None:
    result = run(commands.approve, home, "greedy", "--yes")
    assert result.exit_code == 3
    assert "E_EPSILON          privacy.max_epsilon: asked 20, allowed at most 8" in result.output
    assert f"to admit it  privacy.max_epsilon in {home / 'policy.toml'}" in result.output
    assert "does not fit: the least limit that admits it is 20" in " ".join(result.output.split())
    assert approved(load_site(home / "site.toml")) == frozenset()


def test_a_study_without_room_for_the_units_of_this_site_is_not_approved(home: Path, tmp_path: Path) -> None:
    document = EXAMPLE.document()
    small = Study.parse({**document, "aggregation": {**document["aggregation"], "largest_count": 100}})
    (tmp_path / "small.toml").write_text(to_toml(small.document(), {}))
    for command in (commands.approve, commands.check):
        result = run(command, home, tmp_path / "small.toml")
        assert result.exit_code == 3
        assert "E_LARGEST_COUNT" in result.output
        assert "this site declares 300 units" in result.output
        assert "with largest_count = 300 or more under [aggregation]" in result.output
    assert approved(load_site(home / "site.toml")) == frozenset()


def test_a_person_is_asked_where_there_is_a_terminal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match="no terminal to confirm") as caught:
        run(commands.approve, home, "triage")
    assert EXAMPLE.digest in caught.value.hint
    assert run(commands.approve, home, EXAMPLE.digest).exit_code == 0  # names one study, whatever the coordinator says
    (home / "state/approvals").unlink()
    at_a_terminal(monkeypatch)
    for answer, code in ((False, 1), (True, 0)):
        monkeypatch.setattr("typer.confirm", lambda text, answer=answer: answer)
        assert run(commands.approve, home, "triage").exit_code == code
        assert bool(approved(load_site(home / "site.toml"))) is answer


def test_names_that_name_nothing(home: Path) -> None:
    for name in ("nobody", EXAMPLE.digest[7:14], "0" * 64):
        with pytest.raises(StateError, match="proposes no study"):
            run(commands.approve, home, name, "--yes")


def test_a_study_that_the_log_does_not_open_is_refused(world: World) -> None:
    with open_journal(world.coordinator.log_directory, world.coordinator.keys) as journal:
        history = journal.history
    told = Proposal(
        run="triage", study=canonical_json(changed(EXAMPLE, epsilon=2.0).document()).decode(), round=0, ended=False
    )
    with pytest.raises(VerificationError, match="the round log opens this run for"):
        compared([told], history)
    (known,) = compared([told], None)
    assert not known.logged
    two = compared([told, told.model_copy(update={"study": canonical_json(EXAMPLE.document()).decode()})], None)
    with pytest.raises(StateError, match="several studies"):
        chosen(two, "triage")
    for text in ("{}", "null", "[" * 100_000):
        with pytest.raises(StudyError, match="does not know"):
            compared([told.model_copy(update={"study": text})], None)


def test_an_earlier_coordinator_is_told_from_a_broken_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    service = world.service("berlin")
    with pytest.raises(ProtocolError, match="earlier version of privet") as caught:
        service.call("Nonsense", ProposalsReply(runs=()), ProposalsReply)
    assert "as a file" in caught.value.hint


def with_sites(*sites: str) -> Study:
    document = EXAMPLE.document()
    return Study.parse({**document, "cohort": {**document["cohort"], "sites": list(sites)}})


def test_a_study_that_names_its_sites_is_shown_to_these_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = with_sites("lyon", "oslo", "turin")
    RunDirectory.create(tmp_path / "runs/closed", study, start_adapter(), "{}")
    assert [each.run for each in proposed(tmp_path, "lyon", 10**6)] == ["closed"]
    with monkeypatch.context() as patched:  # however many newer runs there are for others
        patched.setattr("privet.server.consortium.proposals._MOST", 1)
        RunDirectory.create(tmp_path / "runs/newer", with_sites("oslo", "paris", "turin"), start_adapter(), "{}")
        assert [each.run for each in proposed(tmp_path, "lyon", 10**6)] == ["closed"]
        assert [each.run for each in proposed(tmp_path, "oslo", 10**6)] == ["newer"]
    assert proposed(tmp_path, "berlin", 10**6) == ()


def test_what_cannot_be_read_hides_no_other_run(world: World) -> None:
    runs = world.coordinator.directory / "runs"
    (runs / "broken").mkdir()
    (runs / "broken/study.json").write_text("{")
    (runs / ".making.1.partial").mkdir()
    (runs / ".making.1.partial/study.json").write_text("{}")
    assert {each.run for each in proposed(world.coordinator.directory, "berlin", 10**6)} == {"triage", "greedy", "old"}
    assert len(proposed(world.coordinator.directory, "berlin", 3000)) < 3


def test_a_site_without_a_study_file_names_a_study_by_run_or_digits(home: Path) -> None:
    from privet.client.commands.reservations import cancel
    from privet.client.commands.site import data

    digits = EXAMPLE.digest.removeprefix("sha256:")[:8]
    for name in ("triage", digits):
        assert "300 records" in run(data, name, "--site", home).output
        assert f"study   {EXAMPLE.digest}" in run(commands.check, home, name).output
        assert "nothing to cancel" in run(cancel, home, name, "--yes").output
    for command in (
        (data, "none.toml", "--site", home),
        (cancel, home, "none.toml"),
        (commands.check, home, "none.toml"),
    ):
        with pytest.raises(StudyError, match="no study file") as caught:
            run(*command)
        assert f"`privet site studies {home / 'site.toml'}`" in caught.value.hint


# --- columns that the site names otherwise ---------------------------------------------------------------

COLUMNS = {"Befund": "note", "Fach": "specialty", "Patient": "patient"}


@pytest.fixture
def german(home: Path) -> Iterator[Path]:
    """The site with another file, whose columns have other names, and with patients as units."""
    file = home / "site.toml"
    before = file.read_bytes()
    rows = "".join(f"text;{EXAMPLE.task.labels[0]};{number}\n" for number in range(60))
    (home / "befunde.csv").write_text("Befund;Fach;Patient\n" + rows)
    yield home
    file.write_bytes(before)


def protecting_patients(folder: Path) -> Path:
    """Write the study with patients as its unit, and return its file."""
    document = EXAMPLE.document()
    parts = {"data": {**document["data"], "unit": "patient"}, "privacy": {**document["privacy"], "unit": "patient"}}
    (folder / "patients.toml").write_text(to_toml({**document, **parts}, {}))
    return folder / "patients.toml"


def columns_in(home: Path) -> dict[str, str]:
    form = load_site(home / "site.toml").format
    return {} if form is None else form.columns


def test_columns_of_other_names_are_said_at_once_and_mapped_by_options(german: Path, tmp_path: Path) -> None:
    study = protecting_patients(tmp_path)
    own = ("--train", german / "befunde.csv", "--patient-column=Patient", "--patient-ids=number")
    shown = run(setup, german, "--yes", *own, "--study", study)
    text = " ".join(shown.output.split())
    assert "needs the columns note, specialty, patient, which your files lack; they have Befund, Fach, Patient." in text
    assert f"First map the columns that study {EXAMPLE.name} needs, with the command above." in text
    refused = run(commands.approve, german, study)
    text = " ".join(refused.output.split())
    assert refused.exit_code == 3
    assert "Your files LACK the columns note, specialty, patient." in text
    assert (
        f"setup {german / 'site.toml'} --column COLUMN1=note --column COLUMN2=specialty --column COLUMN3=patient`"
        in text
    )
    assert "--patient-column" not in text
    with pytest.raises(StudyError, match="expected a column of the files, found Befund, Fach, Patient"):
        run(setup, german, "--yes", "--column=Text=note")
    mapping = [f"--column={column}={name}" for column, name in COLUMNS.items()]
    done = run(setup, german, "--yes", *mapping, "--study", study).output
    assert "lack" not in done
    assert columns_in(german) == COLUMNS
    assert load_site(german / "site.toml").patient_column == "patient"
    assert "LACK" not in run(commands.check, german, study).output
    with pytest.raises(StudyError, match="expected each column of the study once"):
        run(setup, german, "--yes", "--column=Fach=note")


def test_a_first_line_that_may_be_a_record_is_not_shown(german: Path) -> None:
    rows = "".join(f"Kommt am 12.03.2024 wieder, Nr. {number};x;{number}\n" for number in range(60))
    (german / "befunde.csv").write_text(rows)
    shown = run(setup, german, "--yes", "--train", german / "befunde.csv").output
    shown += run(commands.approve, german, "triage", "--yes").output
    assert "(is the first line a record?)" in " ".join(shown.split())
    assert "12.03.2024" not in shown


def test_approve_asks_which_columns_a_study_reads(german: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(setup, german, "--yes", "--train", german / "befunde.csv")
    at_a_terminal(monkeypatch)
    assert run(commands.approve, german, "triage", answers="Fach\n\n\n").exit_code == 3
    assert columns_in(german) == {"Fach": "specialty"}
    done = run(commands.approve, german, "triage", answers="nothing\nBefund\nPatient\ny\n")
    assert done.exit_code == 0, done.output


# --- labels that the site spells otherwise ---------------------------------------------------------------

CODES = {"A": EXAMPLE.task.labels[0], "B": EXAMPLE.task.labels[1]}


@pytest.fixture
def coded(home: Path) -> Iterator[Path]:
    """The site with another file, in which labels are codes, separated by semicolons and in Latin-1."""
    file = home / "site.toml"
    before = file.read_bytes()
    rows = "".join(f"über;{'A' if number % 2 else 'B'};{number}\n" for number in range(60))
    (home / "codes.csv").write_bytes(("note;specialty;patient\n" + rows).encode("latin-1"))
    shown = run(setup, home, "--yes", "--train", home / "codes.csv").output
    assert "format.delimiter = semicolon" in shown
    assert "Not mapped yet: B, A" in shown  # the coordinator proposes studies that do not have these
    yield home
    file.write_bytes(before)


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "privet.client.commands.policy.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    )


def labels_in(home: Path) -> dict[str, str]:
    form = load_site(home / "site.toml").format
    assert form is not None
    return form.labels


def test_options_say_what_labels_mean(coded: Path) -> None:
    first, second = CODES.values()
    refused = run(commands.approve, coded, "triage", "--yes")
    assert refused.exit_code == 3
    said = " ".join(refused.output.split())
    assert f"say what the labels B, A mean: `privet site setup {coded / 'site.toml'} --label B=LABEL --label" in said
    assert f"one of {', '.join(EXAMPLE.task.labels)}" in said
    for wrong, why in (
        ("A", "NAME=VALUE"),
        (f"A={first.upper()}", f"the label A: expected one of {first}, .* found {first.upper()}"),
        (f"{first}={second}", "which the study has"),
    ):
        with pytest.raises(StudyError, match=why):
            run(setup, coded, "--yes", f"--label={wrong}")
    with pytest.raises(StudyError, match="found one twice"):
        run(setup, coded, "--yes", f"--label=A={first}", f"--label=A={second}")
    assert labels_in(coded) == {}
    half = " ".join(run(setup, coded, "--yes", f"--label=A={first}").output.split())
    assert "Not mapped yet: B. Until then the site refuses the study." in half
    assert labels_in(coded) == {"A": first}
    done = run(setup, coded, "--yes", f"--label=B={second}").output
    assert "How labels are written" not in done
    assert labels_in(coded) == CODES
    assert run(commands.approve, coded, "triage", "--yes").exit_code == 0


def test_setup_asks_what_labels_mean_and_goes_on_where_it_stopped(coded: Path, tmp_path: Path) -> None:
    first, second = CODES.values()
    with pytest.raises(StateError, match=r"stopped at: A means") as caught:
        run(setup, coded, answers=f"nothing\n{second}\n")
    assert "--label A=LABEL" in caught.value.hint
    assert labels_in(coded) == {"B": second}
    shown = run(setup, coded, answers="\n").output
    assert "Not mapped yet: A" in shown
    assert run(setup, coded, "--study=triage", answers=f"{first}\n").exit_code == 0
    assert labels_in(coded) == CODES
    file = coded / "site.toml"
    file.write_text(file.read_text().replace(f'A = "{first}"', 'A = "x"'))  # by hand, and wrong
    assert "Not mapped yet: A." in run(setup, coded, answers="\n").output


def test_approve_asks_what_labels_mean(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_a_terminal(monkeypatch)
    first, second = CODES.values()
    key = load_site(coded / "site.toml").coordinator
    assert key is not None
    assert run(commands.approve, coded, "triage", answers=f"\n{first}\n").exit_code == 3
    with exclusive(key.key.with_suffix(".lock"), content_of(load_site(coded / "site.toml"))):
        done = run(commands.approve, coded, "triage", answers=f"{second}\ny\n")
    assert done.exit_code == 0, done.output
    assert labels_in(coded) == CODES
    assert "with the former site file" in done.output
    assert approved(load_site(coded / "site.toml")) == {EXAMPLE.digest}


def test_labels_of_single_files_are_left_to_a_person(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_a_terminal(monkeypatch)
    file = coded / "site.toml"
    file.write_text(file.read_text() + '[format.files."codes.csv"]\nlabels = { A = "x" }\n')
    before = file.read_bytes()
    shown = run(commands.approve, coded, "triage")
    assert (shown.exit_code, "Complete them there by hand" in " ".join(shown.output.split())) == (3, True)
    assert file.read_bytes() == before
