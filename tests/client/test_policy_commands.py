"""The commands by which a site's people look at policy, budget and receipts before and after a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from privet.client.budget.accounts import Cost, Limit, RoundKey
from privet.client.budget.ledger import Ledger
from privet.client.commands import policy
from privet.client.policy.rules import base_digest
from privet.common.errors import StateError, StudyError
from privet.common.privacy.accounting import PrivacyEvent
from privet.common.study.study import load_study
from tests.support.consortium_world import run
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
train = ["nowhere.csv"]
declared_count = 900
dataset = "notes"
ledger = "ledger.db"
policy = "policy.toml"
approvals = "approvals"
[limit]
unit = "record"
epsilon = 3.0
delta = 1e-5
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A site without any data, and a study."""
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "site.toml").write_text(SITE)
    Ledger.create(tmp_path / "ledger.db").close()
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
    assert "would refuse the study now" in run(policy.approve, site, study).output


def test_check_holds_the_study_against_the_ledger(files: tuple[Path, Path]) -> None:
    site, study = files
    run(policy.approve, site, study)
    site.write_text(SITE.replace("epsilon = 3.0", "epsilon = 1.0"))
    result = run(policy.check, site, study)
    assert result.exit_code == 3
    assert "E_BUDGET" in result.output


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
