"""A candidate between coordinator and site: given for tests, reviewed, decided, and used for nothing else before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from privet.client.commands import adapters as commands
from privet.client.commands import gate as reviewing
from privet.client.network.candidates import FOLDER, MARK, TEST
from privet.client.release.candidate import Outcome
from privet.client.release.opened import open_release
from privet.client.rounds.planted import CANARIES, plant, planting_of
from privet.client.site import load_site
from privet.client.training.canaries import Planting
from privet.client.training.data import Records
from privet.common.audit.release import ADAPTER, EGRESS, STUDY
from privet.common.canonical import digest
from privet.common.clock import now
from privet.common.errors import PrivetError, ProtocolError, RefusedError, StateError, StudyError, VerificationError
from privet.common.log.envelope import commit
from privet.common.log.gate import DAY
from privet.common.log.statements import EgressReview, Export
from privet.common.pki.enrolment import ReleasedRequest
from privet.server.commands import gate as deciding
from privet.server.commands import registry
from privet.server.commands import service as running
from privet.server.consortium import candidates
from privet.server.consortium.candidates import candidate_of, keep_review, log_reviews
from privet.server.consortium.registry import check_in_use, logged_history
from privet.server.consortium.releases import released_part
from privet.server.log.journal import open_journal
from privet.server.rounds.release import digests_of
from privet.server.rounds.state import RunDirectory
from tests.client.test_adapters import cosign, play, released_files, study_of
from tests.support.consortium_world import World, leaf_of_site, run
from tests.support.site_world import ready
from tests.support.synthetic import start_adapter

GATE = {"signatures": 2, "membership": 0.6}
HOLDS = Outcome(
    ("membership",), (), None, {"membership": {"upper": 0.55, "loss": {"auc": 0.5, "interval": [0.4, 0.55]}}}
)
FAILS = replace(HOLDS, failed=("membership",))


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A consortium of two with a run for each test, whose study has a gate; and one, given, that has none."""
    with ready(tmp_path_factory.mktemp("consortium")) as world:
        play(world, "free", start_adapter(3))
        yield world


class Runs:
    """Names runs, so that each test has a candidate of its own in one log."""

    number = 0


@pytest.fixture
def name(founded: World) -> str:
    Runs.number += 1
    chosen = f"flu-{Runs.number}"
    play(founded, chosen, start_adapter(Runs.number), study_of(chosen, gate=GATE))
    return chosen


@pytest.fixture
def world(founded: World) -> Iterator[World]:
    yield founded
    for folder in ("adapters", FOLDER):
        shutil.rmtree(founded.folder / "berlin" / folder, ignore_errors=True)
    shutil.rmtree(founded.coordinator.directory / "reviews", ignore_errors=True)


def site_file(world: World) -> Path:
    return world.folder / "berlin/site.toml"


def home(world: World) -> Path:
    return world.coordinator.directory


def after_test(world: World, name: str, monkeypatch: pytest.MonkeyPatch, outcome: Outcome = HOLDS) -> str:
    """Run the site's test, with this outcome in place of what a model would give."""
    monkeypatch.setattr("privet.client.release.candidate.outcome_of", lambda *_: outcome)
    return run(reviewing.examine, site_file(world), name).output


def said_by(world: World, site: str, name: str, **changes: Any) -> bytes:
    """Return what a site says of a candidate, signed with its keys."""
    history = logged_history(world.coordinator)
    gate, time = history.runs[name].gate, int(now().timestamp())
    assert gate is not None
    given: dict[str, Any] = {
        "time": time,
        "site": site,
        "run": name,
        "study": gate.run.study,
        "adapter": gate.candidate,
        "verdict": "signed",
        "tested": ("membership",),
        "failed": (),
        "canaries": None,
        "test": digest(b"figures"),
        "reason": "",
        "expires": time + DAY,
    }
    return leaf_of_site(world.folder / site, EgressReview.model_validate(given | changes))


def write_reviews(world: World) -> None:
    """Write waiting reviews into the log, as a coordinator's next command that opens it does."""
    with open_journal(world.coordinator.log_directory, world.coordinator.keys) as journal:
        log_reviews(world.coordinator, journal)


def release(world: World, name: str) -> None:
    """Export a candidate that was accepted, as a resumed run does after a quorum has cosigned."""
    own = world.coordinator
    folder = own.directory / "runs" / name
    study, adapter = RunDirectory.open(folder).study, RunDirectory.open(folder).load().adapter
    with open_journal(own.log_directory, own.keys) as journal:
        gate = journal.history.runs[name].gate
        assert gate is not None
        egress = {EGRESS: journal.leaf_at(gate.decided)}
        files = released_files(study, adapter, own.keys.release, egress)
        journal.say(Export(time=journal.clock(), run=name, round=1, adapter=adapter.digest, files=digests_of(files)))
        journal.flush()
        journal.sign_head()
    (folder / "release").mkdir()
    for file, data in files.items():
        (folder / "release" / file).write_bytes(data)
    cosign(world)


def test_a_candidate_is_tested_signed_accepted_released_and_received(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, path = site_file(world), world.folder / "berlin" / FOLDER / name
    said = run(commands.adapters, file).output
    assert f"{name}  " in said
    assert f"next: test it with `privet gate test {file} {name}`" in said
    with pytest.raises(RefusedError, match="has not tested membership") as caught:
        run(reviewing.sign, file, name)
    assert "privet gate test SITE RUN" in caught.value.hint

    said = after_test(world, name, monkeypatch)
    assert "membership  holds: AUC 0.500" in said
    assert f"next: `privet gate sign {file} {name}`" in said
    marked = json.loads((path / MARK).read_bytes())
    assert (marked["state"], marked["adapter"]) == ("candidate", digest((path / ADAPTER).read_bytes()))
    assert (path / TEST).stat().st_mode & 0o777 == 0o600
    # It is opened for a test, and for nothing else.
    assert open_release(path, testing=True).study.gate is not None
    with pytest.raises(RefusedError, match="is a candidate, for tests alone"):
        open_release(path)

    run(reviewing.sign, file, name)
    write_reviews(world)
    after_test(world, name, monkeypatch)  # again, which has another salt
    with pytest.raises(RefusedError, match="has signed already"):
        run(reviewing.sign, file, name)
    row = json.loads(run(deciding.status, name, "-C", home(world), "--json").output)["gates"][0]
    assert (row["state"], row["signatures"], list(row["unmet"])) == (
        "candidate", {"needed": 2, "signed": ["berlin"]}, ["signatures"],
    )  # fmt: skip
    with pytest.raises(RefusedError, match=r"signatures: 1 sites have signed, 2 are needed") as caught:
        run(deciding.decide, name, "-C", home(world))
    assert "privet gate sign SITE RUN" in caught.value.hint
    world.service("lyon").review(said_by(world, "lyon", name))
    assert f"next: privet gate decide {name}" in run(deciding.status, name, "-C", home(world)).output
    said = run(deciding.decide, name, "-C", home(world)).output
    assert f"accepted   {name}: signed by berlin, lyon; until " in said
    assert f"next: privet coordinator resume {name} -C {home(world)}" in said
    assert "accepted, until " in run(deciding.status, name, "-C", home(world)).output
    with pytest.raises(RefusedError, match="was decided about already: it is accepted"):
        run(deciding.decide, name, "-C", home(world))

    release(world, name)
    run(commands.get, file, name)
    received = world.folder / "berlin/adapters" / name
    assert open_release(received).received is not None
    (received / EGRESS).unlink()
    with pytest.raises(RefusedError, match="has no egress decision"):
        open_release(received)
    assert json.loads(run(deciding.status, name, "-C", home(world), "--json").output)["gates"][0]["state"] == "released"
    with pytest.raises(StateError, match="it is released"):
        run(reviewing.refuse, file, name, "--reason", "too late")
    # What the site committed to is what it keeps.
    logged = logged_history(world.coordinator).runs[name].gate
    kept = json.loads((path.parent / f"{name}.signed.{TEST}").read_bytes())
    assert logged is not None
    assert logged.reviews["berlin"].test == commit("egress-test", kept["figures"], bytes.fromhex(kept["salt"]))


def test_without_a_passed_gate_every_way_out_is_closed(world: World, name: str, tmp_path: Path) -> None:
    made, file = world.coordinator, site_file(world)
    folder = made.directory / "runs" / name
    asked = ReleasedRequest(run=name, file=ADAPTER, first=0)

    def copied() -> None:
        """A release directory that somebody made by hand, for the coordinator to give away."""
        shutil.copytree(folder / "adapter", folder / "release")
        shutil.copy(folder / STUDY, folder / "release")
        try:
            released_part(made.directory, "berlin", asked, now())
        finally:
            shutil.rmtree(folder / "release")

    adapter = RunDirectory.open(folder).load().adapter.digest
    for out in (
        lambda: run(commands.get, file, name),
        lambda: released_part(made.directory, "berlin", asked, now()),
        copied,
        lambda: run(registry.show, name, "-C", home(world)),
        lambda: run(registry.revoke, name, "--reason", "x", "-C", home(world)),
        lambda: running._release_of(made, name, None),
        lambda: check_in_use(made, adapter, print),
        lambda: open_release(folder),
    ):
        with pytest.raises(RefusedError) as caught:
            out()
        assert caught.value.message
        assert caught.value.hint
    assert not (world.folder / "berlin/adapters" / name).exists()
    open_release(folder, testing=True)


def test_a_refused_candidate_is_kept_with_its_reason_and_stays(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = site_file(world)
    said = after_test(world, name, monkeypatch, FAILS)
    assert "membership  fails" in said
    assert f"privet gate refuse {file} {name} --reason REASON" in said
    with pytest.raises(RefusedError, match="failed this site's test of membership"):
        run(reviewing.sign, file, name)
    with pytest.raises(StudyError, match="printable ASCII"):
        run(reviewing.refuse, file, name, "--reason", "Gef\u00e4hrlich")
    assert "naming membership" in run(reviewing.refuse, file, name, "--reason", "members are told apart").output
    world.service("lyon").review(said_by(world, "lyon", name))
    with pytest.raises(RefusedError, match="membership: failed in the test of berlin"):
        run(deciding.decide, name, "-C", home(world))
    said = run(deciding.decide, name, "--refuse", "a site tells members apart", "-C", home(world)).output
    assert "nothing of this run is released" in said
    said = run(deciding.status, name, "-C", home(world)).output
    assert "refused: a site tells members apart" in said
    assert "refused: members are told apart" in said
    with pytest.raises(StateError, match="it is refused"):
        run(reviewing.sign, file, name)
    with pytest.raises(RefusedError, match="has no candidate, or none for site lyon"):
        world.service("lyon").candidate(name, ADAPTER, 0)
    with pytest.raises(RefusedError, match="was refused at its gate: a site tells members apart"):
        run(commands.get, file, name)


def test_a_review_that_the_coordinator_leaves_out_is_noticed(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = site_file(world)
    run(reviewing.refuse, file, name, "--reason", "our committee has not met")
    after_test(world, name, monkeypatch)  # which is possible, though it changes nothing any more
    shutil.rmtree(home(world) / "reviews")
    assert json.loads(run(commands.adapters, file, "--json").output)["omitted_reviews"] == []  # it may still come
    run(deciding.decide, name, "--refuse", "x", "-C", home(world))
    assert json.loads(run(commands.adapters, file, "--json").output)["omitted_reviews"] == [name]
    assert f"WARNING: the candidate of run {name} was decided about" in run(commands.adapters, file).output


def test_the_service_takes_only_what_the_log_would(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(made: object) -> None:
        raise AssertionError

    lyon = world.service("lyon")
    other = f"{name}-b"
    play(world, other, start_adapter(50 + Runs.number), study_of(other, gate=GATE))
    for wrong, why in (
        ({"run": other}, "digest of the (study|adapter)"),
        ({"adapter": digest(b"other")}, "digest of the adapter"),
        ({"tested": (), "test": None}, "without a test of membership"),
        ({"expires": int(now().timestamp()) + 31 * DAY}, "at most 30 days"),
        ({"time": 2**40, "expires": 2**40 + 1}, "too far from the service's clock"),
    ):
        with pytest.raises(PrivetError, match=why):
            lyon.review(said_by(world, "lyon", name, **wrong))
    with pytest.raises(PrivetError, match=r"egress-review|signed envelope"):
        lyon.review(b"nothing")
    with monkeypatch.context() as patch:
        patch.setattr(candidates, "_with_waiting", nobody)  # replays the log
        with pytest.raises(RefusedError, match="no candidate that site lyon may review"):
            lyon.review(said_by(world, "lyon", name, run="free"))
    with pytest.raises(RefusedError, match="sent a review of site berlin"):
        lyon.review(said_by(world, "berlin", name))
    true = said_by(world, "lyon", name)
    lyon.review(true)
    lyon.review(true)  # sent twice, it is kept once
    time = int(now().timestamp()) + 5
    with pytest.raises(RefusedError, match="has signed already"):
        lyon.review(said_by(world, "lyon", name, time=time, expires=time + DAY))
    assert len(list((home(world) / "reviews").iterdir())) == 1
    with open_journal(world.coordinator.log_directory, world.coordinator.keys) as journal:
        assert log_reviews(world.coordinator, journal) == 1
        assert log_reviews(world.coordinator, journal) == 0
    with pytest.raises(RefusedError, match="has signed already"):
        lyon.review(said_by(world, "lyon", name, time=time, expires=time + DAY))
    # Of two that wait, one may come too late for the log: it is put aside, and the log is not held up.
    leaf = said_by(world, "berlin", name, time=time)
    keep_review(world.coordinator, "berlin", leaf, now())
    run(deciding.decide, name, "--refuse", "x", "-C", home(world))
    (home(world) / "reviews" / "000000000001.berlin.late.json").write_bytes(leaf)
    with open_journal(world.coordinator.log_directory, world.coordinator.keys) as journal:
        log_reviews(world.coordinator, journal)
    assert candidate_of(world.coordinator, name, now()).gate.state(time) == "refused"


def test_a_candidate_is_given_to_sites_that_took_part_alone(world: World, name: str) -> None:
    lyon = world.service("lyon")
    assert lyon.candidate(name, ADAPTER, 0)[1] > 0
    for asked in ((name, "state.safetensors"), (name, "../study.json"), ("free", ADAPTER), ("none", ADAPTER)):
        with pytest.raises((RefusedError, ProtocolError, ValueError)):
            lyon.candidate(*asked, 0)
    with pytest.raises(StateError, match="its study has no gate"):
        run(reviewing.examine, site_file(world), "free")
    with pytest.raises(StateError, match="the log has no such run"):
        run(reviewing.examine, site_file(world), "none")


def test_a_candidate_whose_file_is_another_is_refused(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = home(world) / "runs" / name / "adapter" / ADAPTER
    right = held.read_bytes()
    held.write_bytes(start_adapter(99).data)
    with pytest.raises(VerificationError, match="the round log has the candidate"):
        after_test(world, name, monkeypatch)
    assert not (world.folder / "berlin" / FOLDER / name).exists()
    held.write_bytes(right)
    after_test(world, name, monkeypatch)
    kept = world.folder / "berlin" / FOLDER / name
    assert not (kept / "adapter_config.json").exists()  # of which the log has no digest
    study = (kept / STUDY).read_bytes()
    (kept / STUDY).write_bytes(study.replace(b'"days":', b'"days":1'))
    with pytest.raises(VerificationError, match="has study"):
        after_test(world, name, monkeypatch)
    (kept / STUDY).write_bytes(study)
    (kept / ADAPTER).write_bytes(start_adapter(99).data)
    with pytest.raises(VerificationError, match="sign nothing"):
        after_test(world, name, monkeypatch)


# Canaries by design


class Words:
    """A tokenizer of forty words."""

    def __len__(self) -> int:
        return 40

    def decode(self, ids: list[int]) -> str:
        return f" word{chr(97 + ids[0] // 26)}{chr(97 + ids[0] % 26)}"


def test_canaries_are_planted_once_and_kept_at_the_site(world: World) -> None:
    config = load_site(site_file(world))
    gated = study_of("flu", gate={"signatures": 1, "canaries": 50, "epsilon": 3.0})
    asked = config.model_copy(update={"canaries": 200})
    assert plant(config, gated) is None  # the site plants none
    assert plant(asked, study_of("flu")) is None  # the study asks for none
    assert plant(asked, study_of("flu", gate=GATE)) is None
    found = plant(asked, gated)
    assert found is not None
    assert found.count == 200
    # Another number in the site file later changes nothing: the coins of before decide what was trained on.
    assert plant(config.model_copy(update={"canaries": 30}), gated) == found == planting_of(config, gated)
    assert config.log is not None
    (file,) = (config.log.state / CANARIES).iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert found.key.hex() not in repr(found)
    file.write_text("{}")
    with pytest.raises(StateError, match="restore it from a backup"):
        planting_of(config, gated)
    file.unlink()


def test_included_canaries_are_units_beside_the_records() -> None:
    study = study_of("flu", gate={"signatures": 1, "canaries": 50, "epsilon": 3.0})
    planting = Planting(200, b"k" * 32)
    coins, everything = planting.coins(), planting.records(study, Words())
    assert 70 < sum(coins) < 130
    assert coins != Planting(200, b"l" * 32).coins()
    own = Records(everything.rows[:1], ("patient",))
    planted = planting.planted(study, Words(), own)
    assert len(planted) == 1 + sum(coins)
    assert len(planted.by_unit()) == len(planted)
