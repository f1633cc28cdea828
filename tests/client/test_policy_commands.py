"""The commands by which a site's people look at policy, budget and receipts before and after a study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from privet.client.budget.accounts import Cost, Limit, RoundKey
from privet.client.budget.ledger import Ledger
from privet.client.commands import head, policy, reservations
from privet.client.commands import site as site_commands
from privet.client.policy.consent import approved, check_policy, record_approval
from privet.client.policy.rules import base_digest
from privet.client.rounds.logbook import WITNESS
from privet.client.rounds.memory import Memory
from privet.client.rounds.site import RealSite
from privet.client.site import load_site
from privet.client.training.data import site_records
from privet.common.errors import DataError, PolicyError, StateError, StudyError
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.note import parse_note
from privet.common.pki.words import words_of
from privet.common.privacy import accounting
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.study.study import load_study
from tests.support.consortium_world import run
from tests.support.log_world import ORIGIN, signed
from tests.support.site_log import with_log
from tests.support.tiny import write_policy

STUDY = """\
name = "asked"
[model]
base = "package:some-base"
sha256 = { "model.safetensors" = "abababababababababababababababababababababababababababababababab" }
[task]
kind = "text-classification"
labels = ["a", "b"]
[data]
columns = { text = "t", label = "l" }
[lora]
targets = ["query"]
[training]
rounds = 10
local_steps = 4
sampling_rate = 0.1
learning_rate = 0.1
[privacy]
mode = "local"
epsilon = 2.0
delta = 1e-5
clip_norm = 1.0
"""
SITE = """\
name = "north"
train = ["notes.csv"]
declared_count = 900
dataset = "notes"
ledger = "ledger.db"
anchor = "elsewhere/head.json"
policy = "policy.toml"
approvals = "approvals"
[limit]
unit = "record"
epsilon = 3.0
delta = 1e-5
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A site, and a study that its data files fit."""
    (tmp_path / "notes.csv").write_text("t,l\ntext,a\n")
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "elsewhere").mkdir()
    Ledger.create(tmp_path / "ledger.db", tmp_path / "elsewhere/head.json").close()
    write_policy(tmp_path / "policy.toml")
    return tmp_path / "site.toml", tmp_path / "study.toml"


def test_check_says_what_the_site_itself_will_say(files: tuple[Path, Path]) -> None:
    site, study = files
    refused = run(policy.check, site, study)
    assert refused.exit_code == 3
    assert "E_NOT_APPROVED" in refused.output
    assert base_digest(load_study(study)) in refused.output
    run(policy.approve, site, study)
    assert run(policy.check, site, study).exit_code == 0
    write_policy(site.parent / "policy.toml", **{"privacy.max_epsilon": 1.0, "model.max_rank": 4})
    answer = json.loads(run(policy.check, site, study, "--json").output)
    assert (answer["admitted"], answer["budget"]) == (False, "")
    assert [finding["code"] for finding in answer["findings"]] == ["E_RANK", "E_EPSILON"]
    refused = run(policy.approve, site, study)
    assert (refused.exit_code, "would refuse the study now" in refused.output) == (3, True)


def test_a_refusal_needs_no_approver_and_is_taken_back_by_an_approval(files: tuple[Path, Path]) -> None:
    site, study = files
    run(policy.approve, site, study)
    refused = run(policy.refuse, site, study, "--reason", "not our patients")
    assert f"To take it back: privet site approve {site} {study}" in refused.output
    checked = run(policy.check, site, study)
    assert (checked.exit_code, "E_REFUSED" in checked.output) == (3, True)
    assert f"next: privet site approve {site} {study}" in checked.output
    run(policy.approve, site, study)
    assert run(policy.check, site, study).exit_code == 0


def test_a_study_that_the_files_do_not_fit_is_not_approved_and_consent_would_say_the_same(
    files: tuple[Path, Path],
) -> None:
    site, study = files
    (site.parent / "notes.csv").write_text("t,l\na secret text,J\nanother,N\n")
    with pytest.raises(DataError) as consenting:
        site_records(load_site(site), load_study(study))
    for command in (policy.check, policy.approve):
        said = run(command, site, study)
        assert said.exit_code == 3
        assert f"data files         {consenting.value.message}" in said.output
        assert f"to admit it  {consenting.value.hint.replace('SITE', str(site))}" in said.output
        assert "secret" not in said.output
    assert approved(load_site(site)) == frozenset()
    answer = json.loads(run(policy.check, site, study, "--json").output)
    assert (answer["admitted"], answer["data"]) == (False, consenting.value.message)
    (site.parent / "notes.csv").write_text("t,l\ntext,a\n")
    run(policy.approve, site, study)
    assert "the data files fit" in run(policy.check, site, study).output


def test_what_is_reserved_and_has_not_begun_can_be_cancelled(files: tuple[Path, Path]) -> None:
    site, file = files
    study = load_study(file).digest
    limit, inputs = Limit("record", 3.0, 1e-5), "sha256:" + "1" * 64
    cost = Cost(PrivacyEvent(20.0, 0.01, 1, "record"), None, 0.0, "n")
    with closing(Ledger.open(site.parent / "ledger.db", site.parent / "elsewhere/head.json")) as ledger:
        for number in (1, 2, 3):
            ledger.reserve(RoundKey("notes", study, number), cost, inputs, limit, 10)
        ledger.begin(RoundKey("notes", study, 1))
    with pytest.raises(StateError, match="no terminal to ask"):
        run(reservations.cancel, site, file)
    assert "cancelled: rounds 2, 3" in run(reservations.cancel, site, file, "--yes").output
    for name in (study, study.removeprefix("sha256:")[:8]):  # the ledger knows it, also after the run was withdrawn
        assert "nothing to cancel" in run(reservations.cancel, site, name, "--yes").output
    with closing(Ledger.open(site.parent / "ledger.db", site.parent / "elsewhere/head.json")) as ledger:
        assert [item.rounds for item in ledger.items("notes")] == [1]


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Total steps of every study whose noise was calibrated."""
    done: list[int] = []

    def calibrated(target: float, delta: float, rate: float, steps: int, beside: float | None) -> float:
        done.append(steps)
        return 2.0

    monkeypatch.setattr(accounting, "_calibrated", calibrated)
    return done


@pytest.mark.parametrize("refused", ["not approved", "too large a rank", "both", "no policy"])
def test_a_study_that_is_refused_costs_the_site_no_calibration(
    files: tuple[Path, Path], calibrations: list[int], refused: str
) -> None:
    site, file = files
    config, study = load_site(site), load_study(file)
    if refused == "too large a rank":
        record_approval(config, study, datetime.now(UTC))
    if refused in ("too large a rank", "both"):
        write_policy(site.parent / "policy.toml", **{"model.max_rank": 4})
    if refused == "no policy":
        config = config.model_copy(update={"policy": None})
    with pytest.raises(PolicyError) as error:
        check_policy(config, study, dict)
    assert calibrations == []
    assert "E_NOISE" not in [finding.code for finding in error.value.findings]


def test_a_site_judges_its_policy_before_its_budget(files: tuple[Path, Path], calibrations: list[int]) -> None:
    site, file = files
    site.write_text(SITE + '[log]\npolicy = "p"\ncoordinator = "' + "0" * 64 + '"\nstate = "s"\nkey = "k"\n')
    with pytest.raises(PolicyError, match="has not approved"):
        RealSite(load_site(site)).check_agreed(load_study(file))
    assert calibrations == []
    record_approval(load_site(site), load_study(file), datetime.now(UTC))
    RealSite(load_site(site)).check_agreed(load_study(file))
    assert calibrations == [40] * len(calibrations) != []


def test_an_operator_who_looks_is_told_of_the_noise_too(files: tuple[Path, Path], calibrations: list[int]) -> None:
    site, study = files
    write_policy(site.parent / "policy.toml", **{"privacy.min_noise_multiplier": 2.5})
    answer = json.loads(run(policy.check, site, study, "--json").output)
    assert [finding["code"] for finding in answer["findings"]] == ["E_NOISE", "E_NOT_APPROVED"]
    assert calibrations != []


def test_check_says_that_the_site_has_run_the_study_before(files: tuple[Path, Path]) -> None:
    site, file = files
    run(policy.approve, site, file)
    digest, limit = load_study(file).digest, Limit("record", 3.0, 1e-5)
    cost = Cost(PrivacyEvent(20.0, 0.01, 1, "record"), None, 0.0, "n")
    for first, last in ((1, 9), (10, 10)):
        with closing(Ledger.open(site.parent / "ledger.db", site.parent / "elsewhere/head.json")) as ledger:
            for number in range(first, last + 1):
                ledger.reserve(RoundKey("notes", digest, number), cost, "sha256:" + "1" * 64, limit, 10)
                ledger.begin(RoundKey("notes", digest, number))
        result = run(policy.check, site, file)
        if last == 9:
            assert (result.exit_code, "9 of 10 are in this site's ledger" in result.output) == (0, True)
    assert (result.exit_code, "E_SPENT" in result.output) == (3, True)
    assert "another seed: `privet new --from STUDY --seed NUMBER`" in result.output
    assert "run all 10 rounds" in json.loads(run(policy.check, site, file, "--json").output)["budget"]


def test_check_holds_the_study_against_the_ledger(files: tuple[Path, Path]) -> None:
    site, study = files
    run(policy.approve, site, study)
    site.write_text(SITE.replace("epsilon = 3.0", "epsilon = 1.0"))
    result = run(policy.check, site, study)
    assert result.exit_code == 3
    assert "E_BUDGET" in result.output


def charge(site: Path, costs: Sequence[Cost]) -> None:
    """Charge one round of a study for each cost, unless it is charged already."""
    ledger = Ledger.open(site.parent / "ledger.db")
    for number, cost in enumerate(costs):
        release = RoundKey("notes", f"sha256:{number:064x}", 1)
        if ledger.reserve(release, cost, f"sha256:{'0' * 64}", Limit("record", 3.0, 1e-5), 1) is None:
            ledger.begin(release)
            ledger.charge(release, b"noised")
    ledger.close()


def test_budget_has_one_total_for_own_noise_and_counts_several_studies(files: tuple[Path, Path]) -> None:
    site, study = files
    own = Cost(PrivacyEvent(20.0, 1.0, 4, "record"))
    charge(site, [own])
    text = run(site_commands.budget, site).output
    assert "spent    epsilon 0.3" in text
    assert "against" not in text
    assert "counted" not in text
    charge(site, [own, own])
    text = run(site_commands.budget, site, "--study", study).output
    found = json.loads(run(site_commands.budget, site, "--study", study, "--json").output)
    assert found["committed"] < found["counted"] < found["after_counted"]
    assert f"counted  epsilon {found['counted']:.4f} of the limit" in text
    assert f"counted as {found['after_counted']:.4f}: within the limit" in text
    assert found["everybody"] == {"epsilon": found["epsilon"], "committed": found["committed"]}


def test_budget_has_two_totals_where_sites_shared_noise(files: tuple[Path, Path]) -> None:
    site, _ = files
    shared = Cost(PrivacyEvent(8.0, 1.0, 1, "record", shared=True), own_multiplier=3.0, corrupt=2)
    charge(site, [shared])
    text = run(site_commands.budget, site).output
    found = json.loads(run(site_commands.budget, site, "--json").output)
    assert found["everybody"]["epsilon"] > found["epsilon"]
    assert f"epsilon {found['epsilon']:.4f} against the coordinator with up to 2 corrupt sites" in text
    assert f"epsilon {found['everybody']['epsilon']:.4f} against everybody, by this site's own noise alone" in text
    charge(site, [shared, Cost(PrivacyEvent(80.0, 1.0, 1, "record", shared=True))])
    text = run(site_commands.budget, site).output
    assert "against the coordinator with the corrupt sites that each study allows for" in text
    assert "epsilon infinite against everybody" in text


def test_receipts_list_what_has_left(files: tuple[Path, Path]) -> None:
    site, study = files
    digest = load_study(study).digest
    ledger = Ledger.open(site.parent / "ledger.db")
    for number, payload in ((1, b"first"), (2, b"second")):
        release = RoundKey("notes", digest, number)
        cost = Cost(PrivacyEvent(20.0, 0.1, 4, "record"))
        ledger.reserve(release, cost, f"sha256:{'0' * 64}", Limit("record", 3.0, 1e-5), 2)
        ledger.begin(release)
        ledger.charge(release, payload)
    lost = RoundKey("notes", digest, 3)
    ledger.reserve(lost, cost, f"sha256:{'0' * 64}", Limit("record", 3.0, 1e-5), 3)
    ledger.begin(lost)
    ledger.close()
    assert "1 more charged, of which nothing left" in run(policy.receipts, site).output
    assert "2 releases, 11 bytes" in run(policy.receipts, site).output
    found = json.loads(run(policy.receipts, site, "--json").output)["receipts"]
    assert [(each["study"], each["round"], each["bytes"]) for each in found] == [(digest, 1, 5), (digest, 2, 6)]


def test_a_policy_is_written_once_and_explained(files: tuple[Path, Path]) -> None:
    site, _ = files
    assert "It has epsilon 100 or less, delta 0.1 or less" in run(policy.policy, site).output
    with pytest.raises(StateError, match="exists already"):
        run(policy.policy, site, "--init")
    (site.parent / "policy.toml").unlink()
    with pytest.raises(StudyError, match="no policy file"):
        run(policy.policy, site)
    assert "Every study must be private." in run(policy.policy, site, "--init").output
    site.write_text(SITE.replace('policy = "policy.toml"\n', ""))
    with pytest.raises(StateError, match="refuses every study"):
        run(policy.policy, site)


def test_a_site_reads_out_the_words_of_a_head_that_it_cosigned(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The reader of an audit page types them: of the newest checkpoint, or of the one of the page's size."""
    site = with_log(files[0])
    with pytest.raises(StateError, match="no checkpoint yet"):
        run(head.head, site)
    notes = {size: signed(Checkpoint(ORIGIN, size, bytes(31) + bytes([size]))) for size in (3, 8)}
    log = load_site(site).log
    assert log is not None
    with Memory(log.state / WITNESS).rows(write=True) as rows:
        for size, note in notes.items():
            rows.keep(size, note)
    for given, size in (((), 8), (("--size", 3), 3)):
        said = run(head.head, site, *given, "--out", tmp_path / f"{size}.txt").output
        assert words_of(parse_note(notes[size]).text.encode()) in said.splitlines()
        assert f"{ORIGIN}, {size} leaves:" in said
        assert (tmp_path / f"{size}.txt").read_bytes() == notes[size]
    with pytest.raises(StateError, match="no checkpoint of 5 leaves") as refused:
        run(head.head, site, "--size", 5)
    assert refused.value.hint == "its last ones have 3, 8 leaves; choose one with --size"
