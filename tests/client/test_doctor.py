"""The doctor: a good site passes every check, each fault is found by the check it is of and by no other, and no
secret is printed."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from privet.client.budget.accounts import RoundKey
from privet.client.budget.releases import open_ledger
from privet.client.checks import Check
from privet.client.commands import doctor, enrolment
from privet.client.commands import policy as policy_commands
from privet.client.commands import setup as setup_command
from privet.client.commands.site import init as init_ledger
from privet.client.network.enrolment import Enrolment, keep_terms, key_pem
from privet.client.policy.consent import policy_digest
from privet.client.policy.text import EXAMPLE
from privet.client.rounds.logbook import SALT, WITNESS
from privet.client.site import load_site
from privet.client.trainer.confinement import Confined
from privet.client.trust import Trusted, read_trusted, write_trusted
from privet.common.canonical import digest
from privet.common.errors import StateError, StudyError
from privet.common.log.replay import Replay
from privet.common.pki.keyfile import make_key, public_key
from privet.simulations.deploy import free_ports
from tests.common.test_hints import objection
from tests.support.consortium_world import Clock, World, run
from tests.support.log_world import in_memory
from tests.support.site_world import LIMIT, PATIENTS, ready

NAMES = (
    "site file", "process", "data", "certificate", "connection", "clock", "trust", "log", "policy", "limit",
    "patients", "ledger", "anchor", "disk", "files", "device", "bases", "studies",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium of berlin and lyon that was founded; berlin's directory is complete. Read only."""
    with ready(tmp_path_factory.mktemp("consortium")) as world:
        yield world


@pytest.fixture
def site(world: World, tmp_path: Path) -> Path:
    """The file of a good site, of which each test has its own copy."""
    return Path(shutil.copytree(world.folder / "berlin", tmp_path / "berlin")) / "site.toml"


def examined(site: Path, clock: Callable[[], datetime] = Clock()) -> dict[str, Check]:  # noqa: B008
    checks = doctor.examine(site, clock)
    return {check.name: check for check in checks}


def change(site: Path, old: str, new: str) -> None:
    """Replace what stands once in the site file."""
    text = site.read_text()
    assert len(re.findall(old, text, re.MULTILINE)) == 1, (old, text)
    site.write_text(re.sub(old, new, text, flags=re.MULTILINE))


def test_a_good_site_passes_every_check(site: Path) -> None:
    checks = doctor.examine(site, Clock())
    assert tuple(check.name for check in checks) == NAMES
    assert [check for check in checks if not check.ok] == []


# --- faults ----------------------------------------------------------------------------------------------


def no_data(site: Path) -> None:
    (site.parent / "data/train.csv").unlink()


def no_count(site: Path) -> None:
    change(site, r"^declared_count = \d+", "")


def no_own_pin(site: Path) -> None:
    trusting(site, lambda trusted: trusted.without("berlin"))


def no_identity(site: Path) -> None:
    change(site, '^identity = "keys/identity.pem"$', "")


def another_pin(site: Path) -> None:
    other = public_key(make_key(site.parent / "other.pem"))

    def changed(trusted: Trusted) -> Trusted:
        lyon = trusted.keys["lyon"].model_copy(update={"identity": other})
        return trusted.without("lyon").with_member(lyon, lyon.words)

    trusting(site, changed)


def no_charter(site: Path) -> None:
    trusting(site, lambda trusted: trusted.model_copy(update={"charter": None}))


def another_charter(site: Path) -> None:
    def changed(trusted: Trusted) -> Trusted:
        assert trusted.charter is not None
        return trusted.model_copy(update={"charter": trusted.charter.model_copy(update={"colluding": 1})})

    trusting(site, changed)


def no_trusted(site: Path) -> None:
    (site.parent / "consortium/trusted.json").unlink()


def trusting(site: Path, change: Callable[[Trusted], Trusted]) -> None:
    file = site.parent / "consortium/trusted.json"
    write_trusted(file, change(read_trusted(file)))


def open_identity(site: Path) -> None:
    (site.parent / "keys/identity.pem").chmod(0o644)


def no_log(site: Path) -> None:
    text = site.read_text()
    site.write_text(re.sub(r"^\[log\].*?^(?=#)", "", text, flags=re.MULTILINE | re.DOTALL))


def another_witness(site: Path) -> None:
    log = load_site(site).log
    assert log is not None
    for path in (site.parent / "keys/witness.pem", log.state):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    make_key(site.parent / "keys/witness.pem")
    shutil.rmtree(site.parent / "anchor")
    (site.parent / "state/ledger.db").unlink()
    assert run(init_ledger, site).exit_code == 0


def evidence(site: Path) -> None:
    log = load_site(site).log
    assert log is not None
    folder = log.state / WITNESS / "evidence"
    folder.mkdir(exist_ok=True)
    (folder / "5-0123456789abcdef.txt").write_text("{}")


def no_policy(site: Path) -> None:
    change(site, '^policy = "policy.toml".*$', "")


def no_base_admitted(site: Path) -> None:
    (site.parent / "policy.toml").write_text(EXAMPLE.replace('bases = "any"', "bases = []"))


def broken_policy(site: Path) -> None:
    (site.parent / "policy.toml").write_text("bases = [")


def no_limit(site: Path) -> None:
    change(site, re.escape(LIMIT), "")


def no_patients(site: Path) -> None:
    change(site, r"^patient_column = .*$", "")


def another_column(site: Path) -> None:
    change(site, '^patient_column = "name"', 'patient_column = "patient"')


def lost_policy(site: Path) -> None:
    (site.parent / "policy.toml").unlink()


def another_fleet(site: Path) -> None:
    change(site, '^address = ".*"', 'address = "127.0.0.1:1"')


def no_ledger(site: Path) -> None:
    (site.parent / "state/ledger.db").unlink()


def broken_ledger(site: Path) -> None:
    (site.parent / "state/ledger.db").write_bytes(b"no database")


def no_anchor(site: Path) -> None:
    change(site, "^anchor = .*$", "")


def key_beside_the_ledger(site: Path) -> None:
    change(site, "^ledger_key = .*$", "")


def open_ledger_key(site: Path) -> None:
    (site.parent / "keys/ledger.key").chmod(0o644)


def lost_ledger_key(site: Path) -> None:
    ledger = open_ledger(load_site(site))
    release = RoundKey("notes", digest(b"study"), 1)
    ledger.reserve(release, None, digest(b"inputs"), None, 1)
    ledger.charge(release, b"an update")
    ledger.close()
    (site.parent / "keys/ledger.key").unlink()


def no_certificate(site: Path) -> None:
    (site.parent / "keys/tls.pem").unlink()


def no_root(site: Path) -> None:
    (site.parent / "consortium/root.pem").unlink()


def another_tls_key(site: Path) -> None:
    file = site.parent / "keys/tls.pem"
    certificate = file.read_bytes().partition(b"-----BEGIN CERTIFICATE")
    file.write_bytes(key_pem(ec.generate_private_key(ec.SECP256R1())) + b"".join(certificate[1:]))


def unnamed_ledger(site: Path) -> None:
    change(site, "^ledger = .*$", "")


def lost_anchor(site: Path) -> None:
    (site.parent / "anchor/head.json").unlink()


def service_away(site: Path) -> None:
    (port,) = free_ports(1)
    keep_terms(site.parent, Enrolment(site.parent).terms.model_copy(update={"address": f"127.0.0.1:{port}"}))


def no_gpu(site: Path) -> None:
    change(site, r"^\[coordinator\]$", '[resources]\ndevice = "cuda"\n\n[coordinator]')


# By fault: the checks that fail, and words that say what is wrong or where to mend it.
FAULTS: dict[Callable[[Path], None], tuple[set[str], str]] = {
    no_data: ({"data"}, "train.csv"),
    no_count: ({"data"}, "declared-count"),
    no_own_pin: ({"trust", "log"}, "own key"),
    no_identity: ({"trust"}, "own key"),
    another_pin: ({"trust", "log"}, "lyon"),
    no_charter: ({"trust", "log"}, r"privet site trust /\S+/site.toml`"),
    another_charter: ({"trust"}, "another charter"),
    no_trusted: ({"trust", "log"}, "trusted.json"),
    open_identity: ({"trust"}, "identity"),
    no_log: ({"log"}, r"\[log\]"),
    another_witness: ({"log"}, "log.key"),
    evidence: ({"log"}, "5-0123456789abcdef"),
    no_policy: ({"policy"}, "privet site setup"),
    lost_policy: ({"policy"}, "there is no file"),
    another_column: ({"patients"}, "no column patient; found name"),
    another_fleet: ({"connection"}, "refuses connections"),
    no_base_admitted: ({"policy"}, "admit-base"),
    broken_policy: ({"policy"}, "policy"),
    no_limit: ({"limit"}, r"\[limit\]"),
    no_patients: ({"patients"}, "patient-column"),
    no_ledger: ({"ledger"}, "ledger"),
    broken_ledger: ({"ledger"}, "ledger"),
    no_anchor: ({"anchor"}, "anchor"),
    key_beside_the_ledger: ({"ledger"}, "ledger_key"),
    open_ledger_key: ({"ledger"}, "chmod 600"),
    lost_ledger_key: ({"ledger"}, r"privet site init /\S+/site.toml --ledger-key"),
    no_certificate: ({"certificate", "connection", "clock", "log"}, "tls.pem"),
    no_root: ({"certificate", "connection", "clock", "trust", "log"}, "root.pem"),
    another_tls_key: ({"certificate", "connection", "clock", "log"}, "berlin"),
    unnamed_ledger: ({"ledger"}, "ledger"),
    lost_anchor: ({"ledger", "anchor"}, "anchor"),
    service_away: ({"connection", "clock", "log"}, "127.0.0.1"),
    no_gpu: ({"device"}, "PyTorch"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_by_its_own_check_with_what_mends_it_and_nothing_secret_is_said(
    fault: Callable[[Path], None], site: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    expected, words = FAULTS[fault]
    secret = secrets_of(site)
    fault(site)
    result = run(enrolment.doctor, site, "--json")
    checks = {check["name"]: check for check in json.loads(result.output)["checks"]}
    failed = {name: check for name, check in checks.items() if not check["ok"]}
    assert set(checks) == set(NAMES)
    assert failed.keys() == expected
    assert result.exit_code == 1
    assert re.search(words, " ".join(f"{check['text']} {check['hint']}" for check in failed.values()))
    for check in failed.values():
        assert "SITE" not in check["hint"].replace("SITE FILE", "")
        named = re.findall("`([^`]+)`", check["hint"])
        assert named, check
        assert [line for line in named if line.startswith("privet ") and objection(line)] == []
    said = result.output + run(enrolment.doctor, site).output
    assert [name for name, text in secret if text in said] == []
    if fault in MENDS:
        mend(fault, site, world, " ".join(check["hint"] for check in failed.values()))


def secrets_of(site: Path) -> list[tuple[str, str]]:
    """Return what must not be printed, with where it stands: keys, the token and what is in the data."""
    home = site.parent
    found = [("data", word) for word in ("Maria", "Muster", "diabetes")]
    found.append(("token", Enrolment(home).asked.secret))
    for file in (home / "keys").iterdir():
        if file.suffix != ".pub":
            text = file.read_text()
            lines = text.split() if file.name == "ledger.key" else private_lines(text)
            found += [(file.name, line) for line in lines]
    salt = (home / "state/log" / SALT).read_bytes()
    return [*found, (SALT, salt.hex()), (SALT, repr(salt)[2:-1])]


def private_lines(pem: str) -> list[str]:
    """Return the lines of the private keys in a PEM file, without its certificates."""
    blocks = re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\n(.*?)-----END", pem, re.DOTALL)
    assert blocks
    return [line for block in blocks for line in block.split()]


COMMANDS = {
    "init": init_ledger,
    "policy": policy_commands.policy,
    "renew": enrolment.renew,
    "setup": setup_command.setup,
    "trust": enrolment.trust,
}
EXAMPLE_STUDY, POLICY_INIT = "simulations/studies/deploy.toml", "privet site policy {site} --init"
# By fault: the command that its hint names, what to put in for words in capitals, and the checks that still fail then.
MENDS: dict[Callable[[Path], None], tuple[str, Mapping[str, str], set[str]]] = {
    no_data: ("privet site setup {site} --train FILE", {"FILE": "{home}/other.csv"}, set()),
    no_count: ("privet site setup {site} --declared-count NUMBER", {"NUMBER": "1200"}, set()),
    no_own_pin: ("privet site setup {site}", {}, set()),
    no_identity: ("privet site setup {site}", {}, set()),
    another_pin: ("privet site trust {site} lyon", {"": "{lyon}"}, set()),
    no_charter: ("privet site trust {site}", {"": "{charter}"}, set()),
    another_charter: ("privet site trust {site}", {"": "{charter}"}, set()),
    no_trusted: ("privet site setup {site}", {}, {"trust", "log"}),
    open_identity: ("chmod 600 {home}/keys/identity.pem", {}, set()),
    no_log: ("privet site setup {site}", {}, set()),
    no_policy: ("privet site setup {site}", {}, set()),
    another_fleet: (r"sed -i 's|127\.0\.0\.1:1|{fleet}|' {site}", {}, set()),
    lost_policy: (POLICY_INIT, {}, set()),
    another_column: ("privet site setup {site} --patient-column COLUMN", {"COLUMN": "name"}, set()),
    no_base_admitted: (
        "privet site policy {site} --admit-base STUDY",
        {"STUDY": "simulations/studies/deploy.toml"},
        set(),
    ),
    broken_policy: (
        "mv {home}/policy.toml {home}/policy.toml.old",
        {"then": "privet site policy {site} --init"},
        set(),
    ),
    no_limit: ("privet site setup {site}", {}, set()),
    no_patients: ("privet site setup {site} --patient-column COLUMN", {"COLUMN": "name"}, set()),
    no_anchor: ("privet site setup {site} --anchor PATH", {"PATH": "{home}/elsewhere"}, set()),
    key_beside_the_ledger: ("privet site setup {site}", {}, set()),
    open_ledger_key: ("chmod 600 {home}/keys/ledger.key", {}, set()),
    lost_ledger_key: ("privet site init {site} --ledger-key", {}, set()),
    no_certificate: ("privet site renew {site} --force", {}, set()),
    another_tls_key: ("privet site renew {site} --force", {}, set()),
    unnamed_ledger: ("privet site setup {site}", {}, set()),
    lost_anchor: ("privet site init {site} --anchor", {}, set()),
    no_gpu: ("privet site setup {site} --device cpu", {}, set()),
}
# What no command mends: a file that is restored from a backup, a network that is down, a fork.
BEYOND = {another_witness, evidence, no_ledger, broken_ledger, no_root, service_away}


@pytest.mark.parametrize("name", [*NAMES, "records", "trainer"])
def test_a_finding_without_a_command_gets_that_of_its_check(name: str) -> None:
    for hint in ("", "look again"):
        found = doctor._with_command(Check(name, False, "wrong", hint), Path("/a b/site.toml"), None).hint
        named = re.findall("`([^`]+)`", found)
        assert named
        assert not re.search(r"\b(SITE|DIRECTORY|POLICY|LEDGER)\b", found)
        assert [line for line in named if line.startswith("privet ") and objection(line)] == []
        assert found.startswith(hint)


def test_each_fault_has_a_command_or_is_beyond_one() -> None:
    assert set(FAULTS) == set(MENDS) | BEYOND


def mend(fault: Callable[[Path], None], site: Path, world: World, hints: str) -> None:
    """Run the command that the hints name, and check that the fault is gone."""
    (site.parent / "other.csv").write_text(PATIENTS)
    (site.parent / "elsewhere").mkdir()
    named, values, left = MENDS[fault]
    known = {
        "site": site,
        "home": site.parent,
        "fleet": Enrolment(site.parent).terms.fleet,
        "lyon": Enrolment(world.folder / "lyon").asked.keys.words,
        "charter": world.coordinator.charter.words,
    }
    assert f"`{named.format(**known)}`" in hints
    command = named.format(**known)
    for word, value in values.items():
        if word.isupper():
            command = command.replace(word, value.format(**known))
        elif not word:
            command += f" --words={shlex.quote(value.format(**known))}"
    for line in (command, *(value.format(**known) for word, value in values.items() if word == "then")):
        words = shlex.split(line)
        if words[0] != "privet":
            subprocess.run(words, check=True)
            continue
        result = run(COMMANDS[words[2]], *words[3:], *(["--yes"] if words[2] == "setup" else []))
        assert result.exit_code == (1 if left else 0), result.output
        if words[2] == "renew":  # the first use of a certificate withdraws the one that other tests copy
            shutil.copy(site.parent / "keys/tls.pem", world.folder / "berlin/keys/tls.pem")
    assert {name for name, check in examined(site).items() if not check.ok} == left


def test_another_ledger_key_is_made_only_where_one_is_lost(site: Path) -> None:
    with pytest.raises(StateError, match=r"key .* exists"):
        run(init_ledger, site, "--ledger-key")
    lost_ledger_key(site)
    made = run(init_ledger, site, "--ledger-key")
    assert (made.exit_code, "1 stored updates" in made.output) == (0, True)
    assert (site.parent / "keys/ledger.key").stat().st_mode & 0o777 == 0o600
    assert examined(site)["ledger"].ok


@pytest.mark.parametrize("content", [None, b"", b"name = ", b'name = "berlin"\n', b"\xff"])
def test_a_site_file_that_cannot_be_read_is_the_only_finding(site: Path, content: bytes | None) -> None:
    site.unlink() if content is None else site.write_bytes(content)
    (check,) = doctor.examine(site, Clock())
    assert (check.name, check.ok) == ("site file", False)
    assert site.name in check.text


# --- time, and what the machine has ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead", "failed"),
    [
        (timedelta(seconds=50), ""),
        (timedelta(seconds=-50), ""),
        (timedelta(seconds=70), "clock"),
        (timedelta(seconds=-70), "clock"),
        (timedelta(days=5), "certificate clock"),  # of 7: renewal is due, and the service still takes it
        (timedelta(days=8), "certificate connection clock log"),
    ],
    ids=str,
)
def test_the_clock_is_compared_and_a_certificate_is_missed_before_it_ends(
    site: Path, ahead: timedelta, failed: str
) -> None:
    checks = examined(site, Clock(ahead))
    assert {name for name, check in checks.items() if not check.ok} == set(failed.split())
    if ahead == timedelta(days=5):
        assert "privet site renew" in checks["certificate"].hint


def test_without_an_answer_the_clock_is_not_well_but_its_hint_is_the_connection(site: Path) -> None:
    service_away(site)
    assert "connection" in examined(site)["clock"].hint


@pytest.mark.parametrize(("free", "ok"), [(2 * 2**30, True), (2 * 2**30 - 1, False)])
def test_a_disk_with_less_than_two_gigabytes_is_too_full(
    site: Path, monkeypatch: pytest.MonkeyPatch, free: int, ok: bool
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    assert examined(site)["disk"].ok == ok


def test_a_gpu_that_is_there_is_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "Model T")
    no_gpu(site)
    device = examined(site)["device"]
    assert (device.ok, device.text) == (True, "Model T")


def test_a_lost_anchor_is_named_with_one_remedy(site: Path) -> None:
    lost_anchor(site)
    checks = examined(site)
    assert checks["anchor"].hint == checks["ledger"].hint
    assert checks["anchor"].text == f"{site.parent / 'anchor/head.json'} is missing"


def test_an_anchor_on_the_ledgers_disk_has_to_be_accepted(site: Path, tmp_path: Path) -> None:
    beside = examined(site)["anchor"]
    assert (beside.ok, "the site file accepts this" in beside.text) == (True, True)
    change(site, "^anchor_same_disk = true$", "")
    refused = examined(site)["anchor"]
    assert (refused.ok, "--anchor-same-disk" in refused.hint) == (False, True)
    with in_memory(tmp_path) as memory:
        shutil.move(site.parent / "anchor/head.json", memory)
        change(site, "^anchor = .*$", f'anchor = "{memory / "head.json"}"')
        checks = examined(site)
        elsewhere = memory.stat().st_dev != site.stat().st_dev
    assert checks["ledger"].ok
    assert checks["anchor"].ok == elsewhere


def test_a_site_gets_no_ledger_without_an_anchor_on_another_disk(site: Path) -> None:
    shutil.rmtree(site.parent / "anchor")
    shutil.rmtree(site.parent / "state")
    change(site, "^anchor_same_disk = true$", "")
    with pytest.raises(StudyError, match="on the file system of the ledger"):
        run(init_ledger, site)
    change(site, "^anchor = .*$", "")
    with pytest.raises(StudyError, match="names no anchor") as caught:
        run(init_ledger, site)
    assert 'anchor = "/mnt/other-disk/ledger-head.json"' in caught.value.hint
    assert not (site.parent / "state/ledger.db").exists()


def test_a_ledger_without_an_anchor_gets_one_by_one_command_and_once(site: Path) -> None:
    (site.parent / "anchor/head.json").unlink()  # as the file of an earlier version, which named none
    with pytest.raises(StateError, match=r"anchor .* cannot be read"):
        open_ledger(load_site(site))
    made = run(init_ledger, site, "--anchor")
    assert (made.exit_code, "from row 1" in made.output) == (0, True)
    assert examined(site)["anchor"].ok
    with pytest.raises(StateError, match="exists already"):
        run(init_ledger, site, "--anchor")


def test_a_ledger_that_lacks_what_the_log_says_of_it_fails(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ledger and anchor were put back together, so they agree with each other."""
    monkeypatch.setattr(Replay, "ledger_of", lambda self, name: (7, digest(b"a head")) if name == "berlin" else None)
    found = examined(site)["ledger"]
    assert (found.ok, "row 7 is on record elsewhere" in found.text) == (False, True)


def test_what_is_well_is_told_with_figures(site: Path) -> None:
    checks, known = examined(site), load_site(site)
    assert policy_digest(known) in checks["policy"].text
    assert re.search(r"\b0 studies approved", checks["policy"].text)
    for name, figure in {
        "data": "1200",
        "limit": "6",
        "log": "2 of 2",
        "ledger": "1",
        "trust": "2",
        "patients": "name",
    }.items():
        assert re.search(rf"\b{figure}\b", checks[name].text), checks[name]


def test_the_column_of_patients_and_the_rule_of_its_ids_are_shown(site: Path) -> None:
    assert "No patient_ids is set" in examined(site)["patients"].text
    change(site, "^# patient_ids", "patient_ids")
    assert "whole numbers" in examined(site)["patients"].text
    change(site, r"^patient_column = .*$", "")
    assert "patient_ids: needs patient_column" in examined(site)["site file"].text


def test_a_policy_that_approves_by_rule_is_told_from_one_that_asks_a_person(site: Path) -> None:
    by_person = examined(site)["policy"].text
    policy = site.parent / "policy.toml"
    text = policy.read_text().replace('approval = "person"', 'approval = "rule"')
    some = 'bases = ["sha256:' + "0" * 64 + '"]'
    text = re.sub("^bases = .*$", some, text, flags=re.MULTILINE)
    policy.write_text(re.sub("^targets = .*$", 'targets = ["q_proj"]', text, flags=re.MULTILINE))
    by_rule = examined(site)["policy"]
    assert by_rule.ok
    assert by_rule.text.partition(";")[2] != by_person.partition(";")[2]


# --- the command -----------------------------------------------------------------------------------------


def test_the_command_ends_with_0_where_all_is_well_and_lists_every_check(site: Path) -> None:
    secret = secrets_of(site)
    for arguments in ((), ("--json",)):
        result = run(enrolment.doctor, site, *arguments)
        assert result.exit_code == 0
        assert [name for name, text in secret if text in result.output] == []
    assert json.loads(result.output)["ok"] is True
    lines = run(enrolment.doctor, site).output.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(NAMES)


def test_the_command_ends_with_1_and_prints_a_hint_below_what_fails(site: Path) -> None:
    no_limit(site)
    result = run(enrolment.doctor, site)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    (number,) = (number for number, line in enumerate(lines) if line.startswith("FAIL"))
    assert lines[number].split()[1] == "limit"
    assert examined(site)["limit"].hint in lines[number + 1]
    assert len(lines) == len(NAMES) + 1
    assert json.loads(run(enrolment.doctor, site, "--json").output)["ok"] is False


def test_looking_changes_nothing(site: Path) -> None:
    def everything() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in site.parent.rglob("*") if path.is_file()}

    before = everything()
    examined(site)
    assert everything() == before


def trainer(site: Path, *lines: str) -> Check:
    change(site, r"^\[coordinator\]$", "\n".join(["[resources]", *lines, "", "[coordinator]"]))
    return examined(site)["trainer"]


def test_a_trainer_in_a_process_says_what_is_enforced(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available", lambda: Confined(network=True, files=True, signals=False))
    found = trainer(site, 'trainer = "process"', "devices = 2")
    assert (found.ok, found.text) == (
        True,
        "2 processes apart from the keys; confined: network, files; not confined: signals",
    )
    monkeypatch.setattr(doctor, "available", lambda: Confined(network=True, files=False, signals=False))
    assert not examined(site)["trainer"].ok
    change(site, r'^train = \["data/train.csv"\]', 'train = ["keys/../state/ledger.db"]')
    assert "state/ledger.db lies where a trainer reads" in examined(site)["trainer"].text


def test_a_trainer_in_slurm_needs_its_programs_a_directory_and_a_controller(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    table = ("[resources.slurm]", f'directory = "{tmp_path}/shared"')
    assert "missing: sbatch, squeue, scancel" in trainer(site, 'trainer = "slurm"', *table).text
    for name in ("sbatch", "squeue", "scancel"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / "bin" / name).chmod(0o755)
    assert f"mkdir -m 700 {tmp_path}/shared" in examined(site)["trainer"].hint
    (tmp_path / "shared").mkdir()
    checks = examined(site)
    assert checks["trainer"].ok
    assert checks["device"].ok
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    assert "no controller" in examined(site)["trainer"].text
