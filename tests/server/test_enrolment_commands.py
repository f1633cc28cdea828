"""Enrolment by the commands that operators type: every step once over the network, and once by files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import Result

from privet.client.commands import enrolment as site
from privet.client.commands import policy as policy_commands
from privet.client.commands.site import init as init_ledger
from privet.client.network.enrolment import prepare_request
from privet.client.policy.rules import load_policy
from privet.client.policy.text import EXAMPLE, explain_policy
from privet.common.errors import ProtocolError, RefusedError, StateError, StudyError, VerificationError
from privet.common.pki.token import Token
from privet.server.commands import enrolment as coordinator
from privet.server.commands import service
from privet.server.consortium.coordinator import open_coordinator
from privet.server.consortium.service import serve_consortium
from privet.simulations.deploy import free_ports
from tests.conftest import Run
from tests.support.consortium_world import run


def said(result: Result, what: str) -> str:
    match = re.search(rf"^{what}\s+(.*)$", result.output, re.MULTILINE)
    assert match, result.output
    return match.group(1)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A consortium, made by its command and served on loopback."""
    members, joining = free_ports(2)
    done = run(
        coordinator.init,
        tmp_path / "coordinator",
        "--name=north",
        f"--address=127.0.0.1:{members}",
        f"--enrolment=127.0.0.1:{joining}",
        "--no-passphrase",
    )
    assert done.exit_code == 0, done.output
    with serve_consortium(open_coordinator(tmp_path / "coordinator"), lambda: datetime.now(UTC)):
        yield tmp_path


def invited(home: Path, name: str) -> Path:
    result = run(coordinator.invite, name, "-C", home / "coordinator")
    (home / f"{name}.token").write_text(result.stdout)
    return home / f"{name}.token"


def test_enrolment_from_both_ends(home: Path) -> None:
    directory = home / "coordinator"
    for name in ("berlin", "lyon"):
        token, own = invited(home, name), home / name
        first = run(site.join, f"@{token}", own, "--wait=0")
        assert "has not approved this site yet" in first.output
        told = said(first, "words")
        assert told not in run(coordinator.members, "-C", directory).output  # nobody types what was not read to them
        with pytest.raises(RefusedError):
            run(coordinator.approve, name, "--words=acorn", "-C", directory)
        run(coordinator.approve, name, f"--words={told}", "-C", directory)
        assert told in run(coordinator.members, "-C", directory).output
        assert "certificate valid until" in run(site.join, f"@{token}", own, "--wait=1").output
    assert "statements written: 1" in run(coordinator.found, "-C", directory).output
    listed = json.loads(run(coordinator.members, "-C", directory, "--json").output)
    assert (listed["members"], listed["quorum"]) == (2, 2)

    file = home / "berlin/site.toml"
    words = {
        name: said(run(site.roster, home / name / "site.toml"), f"{name} +this site\n") for name in ("berlin", "lyon")
    }
    shown = run(site.roster, file)
    assert shown.output.count("NOT confirmed") == 2  # the consortium and lyon: nobody is trusted by himself
    assert words["lyon"] not in shown.output  # nor can anybody type what was not read to them
    charter = said(run(coordinator.charter, "-C", directory), "words")
    assert "not due" in run(site.renew, file).output
    assert "renewed" in run(site.renew, file, "--force").output
    with pytest.raises(VerificationError, match="not those of the charter"):
        run(site.trust, file, f"--words={words['lyon']}")
    with pytest.raises(VerificationError, match="names for site lyon"):
        run(site.trust, file, "lyon", f"--words={charter}")
    with pytest.raises(ProtocolError, match="no member 'oslo'"):
        run(site.trust, file, "oslo", f"--words={charter}")
    _doctor(home, file, charter, words["lyon"])

    run(coordinator.revoke, "berlin", "--reason=left", "-C", directory)
    with pytest.raises(RefusedError, match="not a member"):
        run(site.roster, file)
    result = run(site.doctor, file, "--json")
    checks = {check["name"]: check for check in json.loads(result.output)["checks"]}
    assert not checks["connection"]["ok"]


def _doctor(home: Path, file: Path, charter: str, lyon: str) -> None:
    """What is missing is named with what to do; once all is done, all is well."""
    result = run(site.doctor, file)
    assert result.exit_code == 1
    for name in ("data", "trust", "log", "policy", "limit", "patients", "ledger", "anchor"):
        assert re.search(rf"^FAIL  {name} ", result.output, re.MULTILINE), result.output
    for name in ("certificate", "connection", "clock", "site file"):
        assert re.search(rf"^ok    {name} ", result.output, re.MULTILINE), result.output
    (file.parent / "data").mkdir()
    (file.parent / "data/train.csv").write_text("mrn,t,l\n7,x,a\n")
    limit = '[limit]\nunit = "patient"\nepsilon = 6.0\ndelta = 1e-6\n'
    text = file.read_text().replace("# declared_count", "declared_count") + limit
    text = text.replace('# patient_column = "patient_id"', 'patient_column = "mrn"')
    text = text.replace('# anchor = "/mnt/other-disk/ledger-head.json"', 'anchor = "anchor/head.json"')
    text = text.replace("# anchor_same_disk = true ", "anchor_same_disk = true ")
    file.write_text(text)
    with pytest.raises(ProtocolError, match="this site itself"):
        run(site.trust, file, "berlin", "--withdraw")
    assert "next         lyon" in run(site.trust, file, f"--words={charter}").output
    assert "all members  confirmed" in run(site.trust, file, "lyon", f"--words={lyon.upper()}").output
    run(init_ledger, file)
    run(policy_commands.policy, file, "--init")
    result = run(site.doctor, file)
    assert result.exit_code == 0, result.output


def waiting(home: Path, *names: str) -> dict[str, str]:
    """Let sites ask to join; return the words of each."""
    asked = {name: run(site.join, f"@{invited(home, name)}", home / name, "--wait=0") for name in names}
    return {name: said(result, "words") for name, result in asked.items()}


def members_of(home: Path) -> list[str]:
    return [row.keys.site for row in open_coordinator(home / "coordinator").members.rows() if row.state == "member"]


def test_several_sites_are_approved_by_one_command_and_wrong_words_hold_up_nobody(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = waiting(home, "berlin", "lyon", "paris")
    approve = (coordinator.approve, "berlin", "lyon", "paris", "-C", home / "coordinator")
    with pytest.raises(StudyError, match="once for each of 3 sites, found 1"):
        run(*approve, f"--words={words['berlin']}")
    with pytest.raises(StateError, match="no terminal to type them at"):
        run(*approve)
    assert members_of(home) == []
    # Typed at a terminal: the words of two sites are exchanged, as by somebody between the telephones.
    typed = {"berlin": words["berlin"], "lyon": words["paris"], "paris": words["paris"]}
    monkeypatch.setattr("privet.server.commands.enrolment._at_terminal", lambda: True)
    monkeypatch.setattr("privet.server.commands.enrolment._ask_words", typed.__getitem__)
    with pytest.raises(RefusedError, match="1 of 3 sites are not approved: lyon") as caught:
        run(*approve)
    assert "privet coordinator invite lyon" in caught.value.hint
    assert members_of(home) == ["berlin", "paris"]
    with pytest.raises(RefusedError, match="oslo has not asked to join"):  # before anybody types
        run(coordinator.approve, "oslo", "lyon", "-C", home / "coordinator")
    with pytest.raises(RefusedError, match="berlin is a member already"):
        run(coordinator.approve, "berlin", "-C", home / "coordinator")
    assert "member   lyon" in run(coordinator.approve, "lyon", f"--words={words['lyon']}", "-C", approve[-1]).output
    assert members_of(home) == ["berlin", "lyon", "paris"]


def test_one_sites_wrong_words_among_given_ones_end_in_a_refusal(home: Path) -> None:
    words = waiting(home, "berlin", "lyon")
    given = (f"--words={words['lyon']}", f"--words={words['lyon']}")
    with pytest.raises(RefusedError, match="1 of 2 sites are not approved: berlin"):
        run(coordinator.approve, "berlin", "lyon", *given, "-C", home / "coordinator")
    assert members_of(home) == ["lyon"]


def test_a_second_service_says_that_there_is_one_and_names_no_open_ports(
    privet: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *given: None)
    code, out, err = privet("coordinator", "serve", "-C", home / "coordinator")
    assert (code, out) == (4, "")
    assert "another `privet coordinator serve` may run already" in err


def test_the_way_by_files(tmp_path: Path) -> None:
    directory, own = tmp_path / "coordinator", tmp_path / "oslo"
    run(coordinator.init, directory, "--name=north", "--address=host.example:9443", "--colluding=1", "--no-passphrase")
    token = invited(tmp_path, "oslo")
    made = run(site.join, f"@{token}", own, f"--offline={tmp_path / 'request.json'}")
    assert (tmp_path / "request.json").stat().st_mode & 0o077 == 0
    sign = (coordinator.sign, tmp_path / "request.json", tmp_path / "reply.json", "-C", directory)
    assert said(run(*sign), "state") == "pending"
    assert not (tmp_path / "reply.json").exists()
    run(coordinator.approve, "oslo", f"--fingerprint={said(made, 'fingerprint')}", "-C", directory)
    assert said(run(*sign), "state") == "member"
    assert "certificate valid until" in run(site.join, f"@{token}", own, f"--reply={tmp_path / 'reply.json'}").output
    with pytest.raises(RefusedError, match="needs at least 2 if"):
        run(coordinator.found, "-C", directory)


def test_the_roots_key_is_kept_under_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "word").write_text("correct horse\n")
    (tmp_path / "other").write_text("battery staple\n")
    arguments = ("--name=north", "--address=host.example:9443", f"--passphrase-file={tmp_path / 'word'}")
    following = run(coordinator.init, tmp_path / "c", *arguments).output.splitlines()[-1]
    assert f"coordinator serve -C {tmp_path / 'c'} --passphrase-file {tmp_path / 'word'}`" in following
    assert b"ENCRYPTED" in (tmp_path / "c/ca/root.key").read_bytes()
    # Only what issues certificates needs the key.
    token = Token.parse(run(coordinator.invite, "oslo", "-C", tmp_path / "c").stdout)
    assert "0: sites that may collude" in run(coordinator.charter, "-C", tmp_path / "c").output
    request = prepare_request(tmp_path / "oslo", token)
    open_coordinator(tmp_path / "c").answer(request, datetime.now(UTC))
    approve = (coordinator.approve, "oslo", f"--words={request.keys.words}", "-C", tmp_path / "c")
    with pytest.raises(StateError, match="no terminal to type it"):
        run(*approve)
    with pytest.raises(StateError, match="no terminal to type it"):
        run(service.serve, "-C", tmp_path / "c")
    with pytest.raises(StateError, match=r"does not open the root's key .*ca/root\.key"):
        run(*approve, f"--passphrase-file={tmp_path / 'other'}")
    assert open_coordinator(tmp_path / "c").members.rows()[0].state == "pending"
    monkeypatch.setattr("privet.server.commands.enrolment.ask_passphrase", lambda: b"correct horse")
    run(*approve)
    assert open_coordinator(tmp_path / "c").members.rows()[0].state == "member"
    with pytest.raises(StateError, match="not empty"):
        run(coordinator.init, tmp_path / "c", *arguments)
    (tmp_path / "c/ca/root.key").chmod(0o644)
    with pytest.raises(StateError, match="other users of this machine"):
        run(coordinator.invite, "lyon", "-C", tmp_path / "c", f"--passphrase-file={tmp_path / 'word'}")


def test_a_consortium_has_no_root_in_the_clear_unless_somebody_says_so(tmp_path: Path) -> None:
    new = (tmp_path / "c", "--name=north", "--address=host.example:9443")
    with pytest.raises(StateError, match="no terminal to type it") as caught:
        run(coordinator.init, *new)
    assert "--no-passphrase" in caught.value.hint
    (tmp_path / "short").write_text("hunter2\n")
    with pytest.raises(StateError, match="expected 12 bytes or more, found 7"):
        run(coordinator.init, *new, f"--passphrase-file={tmp_path / 'short'}")
    assert not (tmp_path / "c").exists()
    run(coordinator.init, *new, "--no-passphrase")
    assert b"ENCRYPTED" not in (tmp_path / "c/ca/root.key").read_bytes()


def test_a_passphrase_is_changed_and_an_old_root_gets_one(tmp_path: Path) -> None:
    run(coordinator.init, tmp_path / "c", "--name=north", "--address=host.example:9443", "--no-passphrase")
    root = open_coordinator(tmp_path / "c").authority
    words = [tmp_path / "one", tmp_path / "two"]
    for file in words:
        file.write_text(f"passphrase {file.name} is long\n")
    change = (service.rotate, "--passphrase", "-C", tmp_path / "c")
    run(*change, f"--new-passphrase-file={words[0]}")
    with pytest.raises(StateError, match="no terminal to type it"):
        run(*change, f"--new-passphrase-file={words[1]}")
    run(*change, f"--new-passphrase-file={words[1]}", f"--passphrase-file={words[0]}")
    file = tmp_path / "c/ca/root.key"
    assert (b"ENCRYPTED" in file.read_bytes(), file.stat().st_mode & 0o777) == (True, 0o600)
    again = open_coordinator(tmp_path / "c", words[1].read_bytes().strip()).authority
    assert again.key.private_numbers() == root.key.private_numbers()


def test_the_first_policy_is_valid_restrictive_and_explained(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(EXAMPLE)
    policy = load_policy(tmp_path / "policy.toml")
    assert policy.approval == "person"  # nothing passes before someone has approved it
    assert policy.privacy.required
    assert policy.cohort.secure_aggregation == "required"
    sentences = explain_policy(policy)
    assert "Every study must be private." in sentences
    assert len(sentences) == 17
