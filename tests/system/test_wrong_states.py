"""Wrong states of a site and of a coordinator: each kind ends with its exit code and one error that says what mends
it, and the command that mends it is run."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from privet.client.budget.accounts import RoundKey
from privet.client.budget.releases import open_ledger
from privet.client.network.enrolment import Enrolment, keep_terms, prepare_request
from privet.client.policy.text import EXAMPLE
from privet.client.site import load_site
from privet.common.canonical import digest
from privet.server import studies
from privet.server.consortium.coordinator import Coordinator, open_coordinator
from privet.server.log.journal import open_journal
from privet.server.rounds.state import RunState
from privet.simulations.deploy import free_ports
from tests.conftest import Run
from tests.server.test_coordinator_run import adapter_in, study_in
from tests.support.consortium_world import Clock, World, running
from tests.support.site_world import LIMIT, ready
from tests.support.synthetic import start_adapter, study_of
from tests.support.wrong import SECRET, Kind, Story, Table, play

EXAMPLE_STUDY = Path("simulations/studies/deploy.toml")
RECORDS = f"name,note,specialty\n{SECRET},{SECRET},0\n"


@contextmanager
def full_disk() -> Iterator[None]:
    """Let every write fail, as on a full disk."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("privet.common.files._write", fail)
        yield


# --- a site ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Office:
    """A site's own directory, and its consortium.

    Attributes:
        file: The site file.
        world: The consortium. Read only.
    """

    file: Path
    world: World

    @property
    def home(self) -> Path:
        return self.file.parent

    def change(self, old: str, new: str) -> None:
        """Replace what is once in the site file."""
        text, count = re.subn(old, lambda _: new, self.file.read_text(), flags=re.MULTILINE)
        assert count == 1
        self.file.write_text(text)

    def study(self, **changes: str) -> Path:
        """Write a study that the policy admits, but for these changes of its lines."""
        text = EXAMPLE_STUDY.read_text().replace('unit = "patient"\nmax_length', 'unit = "name"\nmax_length')
        lines = {"unit": '"patient"', "epsilon": "4.0", "delta": "1e-7", **changes}
        for key, value in lines.items():
            text, count = re.subn(rf"(\[privacy\][^\[]*^{key} = ).*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
            assert count == 1
        path = self.home / "study.toml"
        path.write_text(text.partition("[simulation]")[0])
        return path

    def give_back_certificate(self) -> None:
        """Keep a renewed certificate for other tests: its first use withdraws the one that they copy."""
        shutil.copy(self.home / "keys/tls.pem", self.world.folder / "berlin/keys/tls.pem")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ready(tmp_path_factory.mktemp("consortium")) as world:
        (world.folder / "berlin/data/train.csv").write_text(RECORDS)
        yield world


@pytest.fixture
def office(world: World, tmp_path: Path) -> Office:
    return Office(Path(shutil.copytree(world.folder / "berlin", tmp_path / "berlin")) / "site.toml", world)


sites = Table()


@sites(2, "there is no site file", "`privet site setup .*/site.toml`")
def no_site_file(at: Office) -> Story:
    yield ("site", "budget", at.home / "elsewhere")
    yield ("site", "budget", at.home)


@sites(2, "declared_cuont: unknown key; did you mean declared_count", "correct each field")
def unknown_key_in_the_site_file(at: Office) -> Story:
    at.change("^declared_count", "declared_cuont")
    yield ("site", "budget", at.file)
    at.change("^declared_cuont", "declared_count")
    yield ("site", "budget", at.file)


@sites(2, "expected a site file, found the study file", "name the site file")
def study_for_a_site(at: Office) -> Story:
    yield ("site", "budget", at.study())
    yield ("site", "budget", at.file)


@sites(6, "there is no ledger", "`privet site init .*/site.toml`")
def no_ledger(at: Office) -> Story:
    for part in ("state", "anchor"):
        shutil.rmtree(at.home / part)
    (at.home / "keys/ledger.key").unlink()
    said = yield ("site", "budget", at.file)
    yield said.command("site init", SITE=at.file)
    yield ("site", "budget", at.file)


@sites(3, "names no ledger", "`privet site setup .*/site.toml`")
def ledger_is_not_named(at: Office) -> Story:
    at.change("^ledger = .*$", "")
    said = yield ("site", "budget", at.file)
    yield [*said.command("site setup", SITE=at.file), "--yes"]
    yield ("site", "budget", at.file)


@sites(6, "SQLITE_NOTADB", "restore the ledger from a backup")
def ledger_is_no_database(at: Office) -> Story:
    ledger = at.home / "state/ledger.db"
    kept = ledger.read_bytes()
    ledger.write_text(SECRET * 100)
    yield ("site", "budget", at.file)
    ledger.write_bytes(kept)
    yield ("site", "budget", at.file)


@sites(6, "anchor .* cannot be read", "`privet site init .*/site.toml --anchor`")
def anchor_is_lost(at: Office) -> Story:
    (at.home / "anchor/head.json").unlink()
    said = yield ("site", "budget", at.file)
    yield said.command("site init", SITE=at.file)
    yield ("site", "budget", at.file)


@sites(5, "it ends at row 1, but row 3 is on record elsewhere", "restore the newest copy of the ledger")
def ledger_is_older_than_its_anchor(at: Office) -> Story:
    shutil.copytree(at.home / "state", at.home / "older")
    ledger = open_ledger(load_site(at.file))
    release = RoundKey("notes", digest(b"study"), 1)
    ledger.reserve(release, None, digest(b"inputs"), None, 1)
    ledger.charge(release, b"an update")
    ledger.close()
    (at.home / "state").rename(at.home / "newest")
    (at.home / "older").rename(at.home / "state")
    yield ("site", "budget", at.file)
    shutil.rmtree(at.home / "state")
    (at.home / "newest").rename(at.home / "state")
    yield ("site", "budget", at.file)


@sites(2, "sets no limit", "unit, epsilon and delta under .limit.")
def no_limit(at: Office) -> Story:
    at.change(re.escape(LIMIT), "")
    yield ("site", "budget", at.file)
    at.file.write_text(at.file.read_text() + LIMIT)
    yield ("site", "budget", at.file)


@sites(1, "FAIL  ledger .*other users", "`chmod 600 ", verdict=True)
def key_is_readable_by_others(at: Office) -> Story:
    (at.home / "keys/ledger.key").chmod(0o644)
    said = yield ("site", "doctor", at.file)
    said.run("chmod 600")
    yield ("site", "doctor", at.file)


@sites(2, "policy.toml is not valid TOML", "correct the file at the line and column")
def policy_is_malformed(at: Office) -> Story:
    (at.home / "policy.toml").write_text("bases = [")
    yield ("site", "policy", at.file)
    (at.home / "policy.toml").write_text(EXAMPLE)
    yield ("site", "policy", at.file)


@sites(2, "there is no policy file", "`privet site policy .*/site.toml --init`")
def policy_is_missing(at: Office) -> Story:
    (at.home / "policy.toml").unlink()
    said = yield ("site", "policy", at.file)
    yield said.command("site policy", SITE=at.file)


@sites(6, "other users of this machine can write to the policy", "`chmod go-w ")
def policy_is_writable_by_others(at: Office) -> Story:
    (at.home / "policy.toml").chmod(0o666)
    said = yield ("site", "policy", at.file)
    said.run("chmod go-w")
    yield ("site", "policy", at.file)


@sites(6, "policy.toml exists already", "rename it, and run `privet site policy .* --init` again")
def policy_is_there_already(at: Office) -> Story:
    said = yield ("site", "policy", at.file, "--init")
    (at.home / "policy.toml").rename(at.home / "policy.old")
    yield said.command("site policy")


@sites(6, "trusted.json .* is missing", "`privet site setup .*/site.toml`")
def trusted_file_is_missing(at: Office) -> Story:
    (at.home / "consortium/trusted.json").unlink()
    said = yield ("site", "roster", at.file)
    own = at.world.coordinator.charter.words
    other = Enrolment(at.world.folder / "lyon").asked.keys.words
    yield [*said.command("site setup", SITE=at.file), "--yes", f"--charter={own}", f"--member=lyon={other}"]
    yield ("site", "roster", at.file)


@sites(6, "keys/tls.pem cannot be read", "`privet site renew .*/site.toml --force`")
def certificate_is_missing(at: Office) -> Story:
    (at.home / "keys/tls.pem").unlink()
    said = yield ("site", "studies", at.file)
    yield said.command("site renew", SITE=at.file)
    at.give_back_certificate()
    yield ("site", "studies", at.file)


@sites(5, "the certificate of site berlin cannot be used", "`privet site renew .*/site.toml --force`")
def certificate_of_another_site(at: Office) -> Story:
    shutil.copy(at.world.folder / "lyon/keys/tls.pem", at.home / "keys/tls.pem")
    said = yield ("site", "studies", at.file)
    yield said.command("site renew", SITE=at.file)
    at.give_back_certificate()
    yield ("site", "studies", at.file)


@sites(1, "FAIL  certificate .*it expired at", "`privet site renew .* --force`", verdict=True)
def certificate_has_expired(at: Office) -> Story:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("privet.client.commands.enrolment.now", Clock(timedelta(days=8)))
        yield ("site", "doctor", at.file)


@sites(4, "cannot be reached", "`privet site doctor .*/site.toml --network`")
def coordinator_is_away(at: Office) -> Story:
    terms, (port,) = Enrolment(at.home).terms, free_ports(1)
    keep_terms(at.home, terms.model_copy(update={"address": f"127.0.0.1:{port}"}))
    yield ("site", "studies", at.file)
    keep_terms(at.home, terms)
    yield ("site", "studies", at.file)


@sites(1, "FAIL  data .*train.csv", "`privet site setup .* --train FILE`", verdict=True)
def data_file_was_moved(at: Office) -> Story:
    moved = (at.home / "data/train.csv").rename(at.home / "moved.csv")
    said = yield ("site", "doctor", at.file)
    yield [*said.command("site setup", FILE=moved), "--yes"]
    yield ("site", "doctor", at.file)


@sites(3, "E_NOT_APPROVED", "next: privet site approve ", verdict=True)
def study_is_not_approved(at: Office) -> Story:
    study = at.study()
    said = yield ("site", "check", at.file, study)
    yield said.command("site approve")
    yield ("site", "check", at.file, study)


@sites(3, "E_BASE", "`privet site policy .* --admit-base ", verdict=True)
def base_is_not_admitted(at: Office) -> Story:
    (at.home / "policy.toml").write_text(EXAMPLE.replace('bases = "any"', "bases = []"))
    study = at.study()
    said = yield ("site", "approve", at.file, study)
    yield said.command("site policy")
    yield ("site", "approve", at.file, study)


@sites(3, "noisy sums of loss and accuracy", "`privet site policy .* --admit validation`", verdict=True)
def validation_is_not_admitted(at: Office) -> Story:
    (at.home / "policy.toml").write_text(EXAMPLE)
    study = at.study()
    study.write_text(study.read_text().replace("max_length = 48", "max_length = 48\nvalidation_fraction = 0.1"))
    said = yield ("site", "approve", at.file, study)
    yield said.command("site policy")
    yield ("site", "approve", at.file, study)


@sites(3, "protects each patient, but the study protects each record", 'set privacy.unit = "patient"', verdict=True)
def study_protects_another_unit(at: Office) -> Story:
    yield ("site", "approve", at.file, at.study(unit='"record"'))
    yield ("site", "approve", at.file, at.study())


@sites(3, "E_BUDGET .*the limit is epsilon 6", "to admit it  ", verdict=True)
def study_costs_more_than_the_limit(at: Office) -> Story:
    yield ("site", "approve", at.file, at.study(epsilon="8.0"))
    yield ("site", "approve", at.file, at.study())


@sites(3, "data files .*labels", "`privet data ", verdict=True)
def labels_are_not_those_of_the_study(at: Office) -> Story:
    study = at.study()
    (at.home / "data/train.csv").write_text(RECORDS.replace(",0", ",J"))
    yield ("site", "approve", at.file, study)
    (at.home / "data/train.csv").write_text(RECORDS)
    yield ("site", "approve", at.file, study)


@sites(6, "proposes no study of this name", "`privet site studies .*/site.toml`")
def study_is_not_proposed(at: Office) -> Story:
    said = yield ("site", "approve", at.file, "flu")
    yield said.command("site studies", SITE=at.file)


@sites(5, "not those of the keys", "have them read out again")
def words_were_misheard(at: Office) -> Story:
    yield ("site", "trust", at.file, "lyon", "--words", "acorn acorn")
    yield ("site", "trust", at.file, "lyon", "--words", Enrolment(at.world.folder / "lyon").asked.keys.words)


@sites(4, "no member 'oslo'", "`privet site roster .*/site.toml`")
def member_is_unknown(at: Office) -> Story:
    said = yield ("site", "trust", at.file, "oslo", "--words", "acorn")
    yield said.command("site roster", SITE=at.file)


def joining(at: Office, token: str, directory: Path) -> list[object]:
    """Return the words that join with a token in a file, as a token on the command line would be seen by others."""
    file = at.home / "token"
    file.write_text(token)
    return ["site", "join", f"@{file}", directory, "--wait", "0"]


@sites(4, "incomplete or has a wrong character", "copy all of the token")
def token_is_cut_off(at: Office) -> Story:
    token = at.world.invite("oslo").text
    yield joining(at, token[:-9], at.home / "oslo")
    yield joining(at, token, at.home / "oslo")


@sites(4, "found the name of the file", "`privet site join @.*/token .*/oslo`")
def token_file_without_its_sign(at: Office) -> Story:
    words = joining(at, at.world.invite("oslo").text, at.home / "oslo")
    said = yield ["site", "join", str(words[2]).removeprefix("@"), *words[3:]]
    yield [*said.command("site join"), "--wait", "0"]


@sites(6, "has asked to join, and the coordinator has not approved it yet", "`privet site join @TOKEN .*/graz`")
def site_is_not_approved(at: Office) -> Story:
    prepare_request(at.home / "graz", at.world.invite("graz"))
    yield ("site", "setup", at.home / "graz", "--yes")


@sites(6, "has asked to join, and the coordinator has not approved it yet", "`privet site join @TOKEN .*/linz`")
def site_without_a_file_is_not_approved(at: Office) -> Story:
    prepare_request(at.home / "linz", at.world.invite("linz"))
    yield ("site", "studies", at.home / "linz")


@sites(1, "there is no site file at .*/nowhere/site.toml", "`privet site join @TOKEN .*/nowhere`", verdict=True)
def directory_is_misspelt(at: Office) -> Story:
    yield ("site", "doctor", at.home / "nowhere")


@sites(1, r"site.toml is not valid: declared_cuont: unknown key", "each field named above; or start it", verdict=True)
def unknown_key_that_the_doctor_names(at: Office) -> Story:
    at.change("^declared_count", "declared_cuont")
    said = yield ("site", "doctor", at.file)
    assert "?  " not in said.out
    at.change("^declared_cuont", "declared_count")
    yield ("site", "budget", at.file)


@sites(3, "the token is not valid: unknown, used, expired", "`privet coordinator invite bern`")
def token_was_used(at: Office) -> Story:
    token = at.world.invite("bern").text
    at.world.invite("bern")  # withdraws it
    yield joining(at, token, at.home / "bern")
    yield joining(at, at.world.invite("bern").text, at.home / "bern")


@sites(6, "belongs to site berlin already", "`privet site join @TOKEN DIRECTORY`")
def directory_of_another_site(at: Office) -> Story:
    token = at.world.invite("oslo").text
    yield joining(at, token, at.home)
    yield joining(at, token, at.home / "new")


@sites(6, "No space left on device", "free space on the disk, then run the command again")
def disk_is_full_when_joining(at: Office) -> Story:
    words = joining(at, at.world.invite("oslo").text, at.home / "oslo")
    with full_disk():
        yield words
    yield words


@sites(6, "No space left on device", "disk")
def disk_is_full_when_approving(at: Office) -> Story:
    study = at.study()
    with full_disk():
        yield ("site", "approve", at.file, study)
    yield ("site", "approve", at.file, study)


@sites.each
def test_states_of_a_site(kind: Kind, privet: Run, office: Office) -> None:
    play(kind, privet, office)


def test_a_site_that_is_not_complete_says_so_when_it_begins_to_serve(
    privet: Run, office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privet.client.network.serve.serve_site", lambda file: None)
    assert "not complete" not in privet("site", "serve", office.file)[2]
    (office.home / "consortium/trusted.json").unlink()
    (office.home / "policy.toml").unlink()
    code, _, err = privet("site", "serve", office.file)
    assert code == 0
    for name, command in (("trust", "privet site setup"), ("policy", "privet site policy")):
        (line,) = [line for line in err.splitlines() if f"this site is not complete: {name}:" in line]
        assert f"`{command} {office.file}" in json.loads(line)["message"]


# --- a coordinator ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Desk:
    """A coordinator's directory with two members, a study and the adapter that it starts from."""

    home: Path
    study: Path
    start: Path

    @property
    def made(self) -> Coordinator:
        return open_coordinator(self.home)

    @property
    def founded(self) -> Desk:
        """The same, founded."""
        from privet.common.log.statements import StatedFloor
        from privet.server.commands.enrolment import write_genesis

        write_genesis(self.made, StatedFloor())
        return self

    def begun(self, name: str = "flu") -> studies.StudyRun:
        """Begin a run."""
        return studies.begin(self.made, study_of(), self.start, name)

    def words(self, *words: object) -> list[object]:
        """Return the words of a command in this directory."""
        return ["coordinator", *words, "-C", self.home]

    def running(self, *options: object) -> list[object]:
        """Return the words that run the study without waiting for sites."""
        return self.words("run", self.study, "--adapter", self.start, "--gather", "0.1", *options)

    def file(self, name: str, text: str) -> Path:
        path = self.home.parent / name
        path.write_text(text)
        return path


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with running(tmp_path_factory.mktemp("members")) as world:
        for name in ("berlin", "lyon"):
            world.enrol(name)
        yield world


@pytest.fixture
def desk(consortium: World, tmp_path: Path) -> Desk:
    home = Path(shutil.copytree(consortium.folder / "coordinator", tmp_path / "coordinator"))
    return Desk(home, study_in(tmp_path), adapter_in(tmp_path))


coordinators = Table()


def encrypted(at: Desk) -> tuple[Path, Path]:
    """Make another coordinator, whose key is encrypted. Return its directory and the file of its passphrase."""
    from datetime import UTC, datetime

    from privet.server.consortium.coordinator import create

    new = at.home.parent / "new"
    create(new, at.made.settings, f"{SECRET} {SECRET}".encode(), datetime.now(UTC))
    return new, at.file("passphrase", f"{SECRET} {SECRET}\n")


@coordinators(6, "needs a passphrase, and there is no terminal", "add --passphrase-file FILE")
def no_passphrase(at: Desk) -> Story:
    home, file = encrypted(at)
    words = ("coordinator", "rotate", "--passphrase", "--new-passphrase-file", file, "-C", home)
    yield words
    yield (*words, "--passphrase-file", file)


@coordinators(6, "the passphrase does not open the root's key", "the right passphrase with --passphrase-file")
def wrong_passphrase(at: Desk) -> Story:
    home, file = encrypted(at)
    wrong = at.file("wrong", f"not {SECRET}\n")
    words = ("coordinator", "rotate", "--passphrase", "--new-passphrase-file", file, "-C", home, "--passphrase-file")
    yield (*words, wrong)
    yield (*words, file)


@coordinators(6, "expected 12 bytes or more, found 6", "choose a longer one")
def short_passphrase(at: Desk) -> Story:
    words = ("coordinator", "init", at.home.parent / "new", "--name=north", "--address=127.0.0.1:9443")
    yield (*words, "--passphrase-file", at.file("short", f"{SECRET}\n"))
    yield (*words, "--passphrase-file", at.file("long", f"{SECRET} {SECRET}\n"))


@coordinators(2, "there is no coordinator file", "name it with -C")
def another_directory(at: Desk) -> Story:
    yield ("coordinator", "status", "-C", at.home.parent)
    yield at.words("status")


@coordinators(2, "colludng: unknown key; did you mean colluding", "correct each field")
def unknown_setting(at: Desk) -> Story:
    file = at.home / "coordinator.toml"
    file.write_text(file.read_text().replace("colluding", "colludng"))
    yield at.words("status")
    file.write_text(file.read_text().replace("colludng", "colluding"))
    yield at.words("status")


@coordinators(6, "other users of this machine can read this private key", "`chmod 600 ")
def root_key_is_readable_by_others(at: Desk) -> Story:
    (at.home / "ca/root.key").chmod(0o644)
    said = yield at.words("status")
    said.run("chmod 600")
    yield at.words("status")


def lost(at: Desk, name: str) -> Story:
    (at.home / name).rename(at.home / "backup")
    yield at.words("status")
    (at.home / "backup").rename(at.home / name)
    yield at.words("status")


@coordinators(6, "ca/root.pem cannot be read", "restore the file from a backup")
def root_certificate_is_lost(at: Desk) -> Story:
    yield from lost(at, "ca/root.pem")


@coordinators(6, "keys/log.pem cannot be read as a private key", "^restore the file from a backup$")
def key_of_the_log_is_lost(at: Desk) -> Story:
    yield from lost(at, "keys/log.pem")


@coordinators(6, "members.db does not exist", "--directory")
def list_of_members_is_lost(at: Desk) -> Story:
    yield from lost(at, "members.db")


@coordinators(6, "no run flu; its runs are: none yet", "`privet coordinator run STUDY")
def unknown_run(at: Desk) -> Story:
    yield at.words("resume", "flu")


@coordinators(6, "no run ../runs/flu; its runs are: flu", "name one of its runs")
def path_for_a_run(at: Desk) -> Story:
    at.founded.begun()
    yield at.words("stop", "../runs/flu")
    yield at.words("stop", "flu")


@coordinators(2, "--name: expected 1 to 63 lower-case letters", "--name flu-2")
def path_for_the_name_of_a_new_run(at: Desk) -> Story:
    yield at.founded.running("--name", "../flu")


@coordinators(6, "run synthetic exists already", "`privet coordinator withdraw synthetic --reason TEXT")
def name_of_a_run_is_used(at: Desk) -> Story:
    at.founded.begun("synthetic")
    said = yield at.running()
    yield said.command("coordinator withdraw", TEXT="a typo")


@coordinators(6, "run flu has ended", "`privet coordinator run STUDY")
def run_has_ended(at: Desk) -> Story:
    at.founded.begun().directory.commit(RunState(4, start_adapter(), stopped=True))
    yield at.words("withdraw", "flu", "--reason", "late")


@coordinators(6, "run flu was withdrawn: a typo", "`privet coordinator run STUDY")
def run_was_withdrawn(at: Desk) -> Story:
    studies.withdraw(at.founded.begun(), "a typo")
    yield at.words("stop", "flu")


@coordinators(
    4, "0 sites consented .*\n  berlin: not connected", "`privet coordinator withdraw synthetic --reason TEXT"
)
def service_is_not_running(at: Desk) -> Story:
    said = yield at.founded.running()
    assert "start the service: `privet coordinator serve" in said.err
    yield said.command("coordinator withdraw", TEXT="later")


@coordinators(6, "no terminal to ask whether to found it", "`privet coordinator found")
def not_founded(at: Desk) -> Story:
    said = yield at.running()
    yield said.command("coordinator found")


@coordinators(3, "founded already", "`privet coordinator approve")
def founded_twice(at: Desk) -> Story:
    yield at.founded.words("found")


@coordinators(6, "the study needs 3 sites, but the members are berlin, lyon", "`privet coordinator approve SITE")
def fewer_members_than_the_study_needs(at: Desk) -> Story:
    study_in(at.home.parent, 3)
    yield at.running("--yes")


@coordinators(6, "state.safetensors cannot be read", "restore the newest backup")
def state_of_a_run_is_damaged(at: Desk) -> Story:
    state = at.founded.begun().directory.path / "state.safetensors"
    kept = state.read_bytes()
    state.write_bytes(kept[:-9])
    yield at.words("withdraw", "flu", "--reason", "x")
    state.write_bytes(kept)
    yield at.words("withdraw", "flu", "--reason", "x")


@coordinators(6, "the round log has no run of this study with the name flu", "check the directories of run and log")
def state_and_log_do_not_match(at: Desk) -> Story:
    statement = {"round": 1, "type": "round-close", "metrics": None}
    run = at.founded.begun().directory
    run.commit(RunState(1, start_adapter(), statements=(statement,)))
    yield at.words("resume", "flu", "--gather", "0.1")


@coordinators(6, "another process has locked the round log", "wait until the other process ends")
def log_is_in_use(at: Desk) -> Story:
    at.founded.begun()
    with open_journal(at.made.log_directory, at.made.keys):
        yield at.words("withdraw", "flu", "--reason", "x")
    yield at.words("withdraw", "flu", "--reason", "x")


@coordinators(6, "another process is using the run directory", "`privet coordinator stop flu")
def run_is_in_use(at: Desk) -> Story:
    with at.founded.begun().directory.locked():
        yield at.words("withdraw", "flu", "--reason", "x")
    yield at.words("withdraw", "flu", "--reason", "x")


@coordinators(6, "has no adapter", "`privet adapter STUDY DIRECTORY`")
def start_adapter_is_missing(at: Desk) -> Story:
    yield at.founded.words("run", at.study, "--adapter", at.home)


@coordinators(3, "oslo has not asked to join", "`privet coordinator invite oslo")
def site_is_unknown(at: Desk) -> Story:
    said = yield at.words("approve", "oslo", "--words", "acorn")
    yield [*said.command("coordinator invite"), "--out", at.home.parent / "tokens"]


@coordinators(3, "lyon is a member already", "`privet coordinator members")
def member_is_approved_again(at: Desk) -> Story:
    said = yield at.words("approve", "lyon", "--words", "acorn")
    yield said.command("coordinator members")


@coordinators(3, "oslo is not a member", "`privet coordinator members")
def member_to_revoke_is_unknown(at: Desk) -> Story:
    said = yield at.words("revoke", "oslo", "--reason", "left")
    yield said.command("coordinator members")


@coordinators(3, "lyon is a member already", "`privet coordinator revoke lyon --reason left")
def member_is_invited_again(at: Desk) -> Story:
    words = at.words("invite", "lyon", "--out", at.home.parent / "tokens")
    said = yield words
    yield said.command("coordinator revoke")
    yield words


@coordinators(2, "the site oslo is named twice", "name each site once")
def site_is_named_twice(at: Desk) -> Story:
    yield at.words("invite", "oslo", "oslo")
    yield at.words("invite", "oslo", "--out", at.home.parent / "tokens")


@coordinators(2, "lower-case letters, digits and dashes, found 'St. Anne'", "for example st-anne")
def name_of_a_site_is_wrong(at: Desk) -> Story:
    yield at.words("invite", "St. Anne")
    yield at.words("invite", "st-anne", "--out", at.home.parent / "tokens")


@coordinators(4, "is not a site's request to join", "`privet site join TOKEN --offline REQUEST`")
def file_is_no_request(at: Desk) -> Story:
    yield at.words("sign", at.study, at.home.parent / "reply")


@coordinators(6, "is not empty", "choose a new directory")
def directory_is_in_use(at: Desk) -> Story:
    words = ("--name=south", "--address=127.0.0.1:9443", "--no-passphrase")
    yield ("coordinator", "init", at.home, *words)
    yield ("coordinator", "init", at.home.parent / "south", *words)


@coordinators(2, "with a port from 1 to 65533, found 'host.example'", "--address host.example:9443")
def address_without_a_port(at: Desk) -> Story:
    words = ("coordinator", "init", at.home.parent / "south", "--name=south", "--no-passphrase", "--address")
    yield (*words, "host.example")
    yield (*words, "host.example:9443")


@coordinators(2, "with a port from 1 to 65533, found '127.0.0.1:65534'", "--address 127.0.0.1:9443")
def address_without_two_further_ports(at: Desk) -> Story:
    words = ("coordinator", "init", at.home.parent / "south", "--name=south", "--no-passphrase", "--address")
    yield (*words, "127.0.0.1:65534")
    yield (*words, "127.0.0.1:65533")


@coordinators(3, "oslo has not asked to join yet; its token is valid until", "wait until its operator has run")
def site_is_invited_and_has_not_joined(at: Desk) -> Story:
    at.made.invite_all(["oslo"], datetime.now(UTC))
    yield at.words("approve", "oslo", "--words", "acorn")
    yield at.words("status")


@coordinators(6, "No space left on device", "free space on the disk, then run the command again")
def disk_is_full(at: Desk) -> Story:
    words = at.words("invite", "oslo", "--out", at.home.parent / "tokens")
    with full_disk():
        yield words
    yield words


@coordinators.each
def test_states_of_a_coordinator(kind: Kind, privet: Run, desk: Desk) -> None:
    play(kind, privet, desk)
