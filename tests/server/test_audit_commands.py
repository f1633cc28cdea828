"""The auditor's commands: what they print, and which exit code they end with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from privet.common.log.checkpoint import LeafProof, verify_leaf
from tests.conftest import Run
from tests.support.log_world import World
from tests.support.logged_world import LoggedWorld, world_of
from tests.support.masked_world import masked_study
from tests.support.rotated_log import Rotated


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> LoggedWorld:
    made = world_of(tmp_path_factory.mktemp("world"), masked_study(training={"rounds": 2}))
    made.play()
    return made


def test_a_bundle_is_packed_verified_and_told(privet: Run, world: LoggedWorld, tmp_path: Path) -> None:
    tar, policy = tmp_path / "run.tar", world.folder / "log" / "policy"
    code, out, _ = privet("audit", "bundle", world.folder / "run", "--out", tar)
    assert (code, f"next: privet audit verify {tar} --policy log.policy\n" in out) == (0, True)
    code, out, _ = privet("audit", "verify", tar, "--policy", policy)
    assert code == 0
    assert out.startswith("verified: 13 leaves, cosigned by site-0000, site-0001, site-0002")
    assert "weights not included" in out
    code, out, _ = privet("audit", "show", tar, "--policy", policy)
    assert code == 0
    for line in ("consortium north begins", "run run begins: 2 rounds", "round 2 opens for 3 sites", "site-0001 sends"):
        assert line in out
    code, out, _ = privet("audit", "verify", world.folder / "run" / "public", "--policy", policy, "--json")
    document = json.loads(out)
    assert (code, document["ok"], document["verdict"], document["leaves"]) == (7, False, "log-alone", 13)
    assert document["unchecked"] == ["study, software, statements and release of: run run"]
    code, out, _ = privet("audit", "verify", world.folder / "run" / "public", "--policy", policy)
    assert (code, out.splitlines()[0][:31]) == (7, "LOG ALONE: verified: 13 leaves,")


def test_a_changed_bundle_fails_and_is_blamed(privet: Run, world: LoggedWorld, tmp_path: Path) -> None:
    policy = world.folder / "log" / "policy"
    shutil.copytree(world.folder / "run" / "public", tmp_path / "public")
    entries = tmp_path / "public" / "tile" / "entries" / "000.p" / "13"
    entries.write_bytes(entries.read_bytes().replace(b'"payload":"', b'"payl0ad":"', 1))
    code, out, _ = privet("audit", "verify", tmp_path / "public", "--policy", policy)
    assert (code, out.startswith("FAILED at leaf 0")) == (1, True)
    assert privet("audit", "show", tmp_path / "public", "--policy", policy)[0] == 1


def test_what_cannot_be_read_cannot_be_checked(privet: Run, world: LoggedWorld, tmp_path: Path) -> None:
    policy, public = world.folder / "log" / "policy", world.folder / "run" / "public"
    for bundle, trusted in (
        (tmp_path / "none.tar", policy),
        (policy, policy),
        (public, tmp_path),
    ):
        code, _, err = privet("audit", "verify", bundle, "--policy", trusted)
        assert code == 2
        assert err.startswith("error: could not check: ")
        assert "\n hint: name " in err


def test_a_leaf_is_proved_to_whoever_has_the_policy(privet: Run, world: LoggedWorld, tmp_path: Path) -> None:
    public, policy = world.folder / "run" / "public", world.folder / "log" / "policy"
    assert privet("audit", "prove", public, "--policy", policy, "--leaf", 2, "--out", tmp_path / "2.tlog-proof")[0] == 0
    proof = LeafProof.parse((tmp_path / "2.tlog-proof").read_bytes())
    with world.journal() as journal:
        leaf = list(journal._log.leaves())[2]
    assert verify_leaf(proof, leaf, world.policy).size == 13
    assert privet("audit", "prove", public, "--policy", policy, "--leaf", 99)[0] == 1


def test_two_copies_are_compared(privet: Run, world: LoggedWorld, tmp_path: Path) -> None:
    public, policy = world.folder / "run" / "public", world.folder / "log" / "policy"
    code, out, _ = privet("audit", "diff", public, public, "--policy", policy)
    assert (code, out) == (0, "equal: 13 leaves\n")
    other = world_of(tmp_path, masked_study(training={"rounds": 3}))
    other.play()
    code, out, _ = privet("audit", "diff", public, tmp_path / "run" / "public", "--policy", policy)
    assert code == 1
    assert "FORKED: the two logs differ from leaf 1 on" in out


def test_copies_from_before_and_after_a_rotation_are_compared_under_the_later_policy(
    privet: Run, tmp_path: Path
) -> None:
    made, policies, copies = Rotated(World(private=False)).goes_on(), [], []
    for number, (policy, public) in enumerate(made.publish(tmp_path)):
        copies.append(public)
        policies.append(tmp_path / f"{number}.policy")
        policies[-1].write_text(policy.text)
    for pair in (copies, copies[::-1]):
        code, out, _ = privet("audit", "diff", *pair, "--policy", policies[1])
        assert (code, "extends the other log: 6 leaves after the first 7" in out) == (0, True), out
    code, out, _ = privet("audit", "diff", *copies, "--policy", policies[0])
    assert (code, "found one with the key" in out) == (1, True)
    for copy, file, what in zip(copies, policies[::-1], ("policy of that time", "rotates the key"), strict=True):
        code, out, _ = privet("audit", "verify", copy, "--policy", file)
        assert (code, what in out) == (1, True), out
    code, out, _ = privet("audit", "show", copies[1], "--policy", policies[1])
    assert "the keys of log and coordinator are replaced" in out
