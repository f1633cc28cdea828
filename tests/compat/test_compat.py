"""What an earlier version left on disk is opened and gone on with, and what it said is said in the same bytes.

`make.py` made `data/` with the code of commit 88891e7, before its modules were moved. A test that fails here means that
sites and coordinators of the two versions do not understand each other, or that a directory needs migration.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from privet.client.network.enrolment import Enrolment
from tests.compat import vectors
from tests.compat.make import (
    EXPECTED,
    LOOKS,
    MADE,
    QUIET,
    SITES,
    VECTORS,
    WORLD,
    World,
    environment,
    free_ports,
    machine,
)
from tests.compat.make import make_anew as make_databases
from tests.compat.make import schema as schema_of
from tests.conftest import Run
from tests.support.forks import Forks

EXPECT: dict[str, Any] = json.loads(EXPECTED.read_text(encoding="utf-8"))
BYTES: dict[str, str] = json.loads(VECTORS.read_text(encoding="utf-8"))
BUILT = vectors.build()
ONE_THREAD = os.environ.get("OMP_NUM_THREADS") == "1"  # now: libraries have read it when a test sets it
ROUNDS = {"simulated": 8, "second": 4}


def unpacked(folder: Path) -> Path:
    with tarfile.open(WORLD) as archive:
        archive.extractall(folder, filter="tar")
    return folder / "world"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world for commands that leave it as it is."""
    folder = unpacked(tmp_path_factory.mktemp("compat"))
    (folder / "made").mkdir()
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A copy of the world for one test."""
    return unpacked(tmp_path)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, shared: Path) -> Path:
    """The shared world, as where commands run."""
    return enter(monkeypatch, shared)


def enter(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder / "inputs")
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    return folder


# --- bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BYTES)
def test_what_is_said_and_signed_has_the_bytes_it_had(name: str) -> None:
    assert BUILT[name] == bytes.fromhex(BYTES[name])


def test_nothing_is_said_that_has_no_vector() -> None:
    assert list(BUILT) == list(BYTES)


@pytest.mark.parametrize(("data", "again"), [pytest.param(d, a, id=n) for n, d, a in vectors.reread()])
def test_what_was_said_is_read_and_comes_out_the_same(data: bytes, again: Any) -> None:
    assert again() == data


def test_errors_have_their_names_and_exit_codes() -> None:
    found = vectors.errors()
    assert {name: found.get(name) for name in EXPECT["errors"]} == EXPECT["errors"]


def test_enrolment_papers_are_read_and_come_out_the_same(shared: Path) -> None:
    for name in SITES:
        papers = shared / "consortium" / name / "consortium"
        for file, kind in vectors.PAPERS.items():
            data = (papers / file).read_bytes()
            assert vectors.again(kind, data) == data


# --- looking ---------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Return what a command prints, without what depends on the time of day or on installed versions."""
    text = re.sub(r'"nodes_online": \d+', '"nodes_online": 0', text)
    text = re.sub(r"; \d+ connected", "; N connected", text)
    text = re.sub(r'"versions": \{[^}]*\}', '"versions": {}', text)
    text = re.sub(r"all files: .*\n", "", text)  # a line that the old one did not print
    return re.sub(r"(privet|opacus|numpy|cryptography) \d+(\.\d+)+", r"\1 V", text)


def check_adapters(world: Path, run: str) -> None:
    """Check that a run came to an adapter like that of the one that was made.

    Its values are others: the weight is no part of what is masked any longer, so that other values are rounded up, and
    others down, and FedAdam makes much of the smallest of them. With 24 bits instead of 14, both agree to 1e-4.
    """
    found, wanted = (load_file(world / each / "adapter/adapter_model.safetensors") for each in (run, "finished"))
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert np.abs(found[name] - wanted[name]).max() < 2 * np.abs(wanted[name]).max() + 1


def as_when_made() -> bool:
    """Whether a run comes to the figures it came to when the data were made: same machine, one thread."""
    return machine() == EXPECT["machine"] and ONE_THREAD


def facts(text: str) -> list[str]:
    """Return the figures, digests and names of sites in what a command prints, in their order."""
    names = "|".join(SITES)
    return re.findall(rf"sha256:[0-9a-f]+|\b[0-9a-f]{{16,}}\b|\b(?:{names})\b|\d[\d.:-]*\d|\d", plain(text))


def close(found: Any, wanted: Any) -> bool:
    """Whether two JSON values are the same but for last bits."""
    if isinstance(wanted, dict):
        same = isinstance(found, dict) and found.keys() == wanted.keys()
        return same and all(close(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(close, found, wanted))
    if isinstance(wanted, float):
        return isinstance(found, float) and bool(np.isclose(found, wanted, rtol=1e-5, atol=1e-12))
    if isinstance(wanted, str) and " " in wanted:
        return isinstance(found, str) and facts(found) == facts(wanted)
    return bool(found == wanted)


def as_before(look: str, text: str) -> str:
    """Return what a command prints now, without what it adds to mend sentences that were false or incomplete.

    * Privacy statements said that replacing a unit costs up to twice the epsilon; format 2 computes it. Format 3 words
      what the validation split does not cover as the report did.
    * `site budget` held several studies against the limit as if all had been fixed in advance, and had one total for
      own and for shared noise.
    * `check` took a base for its weights and two files more; it now pins every file that decides a token.
    * `check` left the program itself out of a site's memory, and did not say how records pass or how long they are.
    * `data` did not say how long records are in tokens, named files without their folder, and proposed no count.
    * `site policy` had no rule about rounds that lead to nothing.
    * `coordinator status` did not say how many rounds a run has, what it spent and measured, and what it waits for. It
      printed whole digests, which are in its JSON.
    * `audit verify` did not compute the cost of accounts, took proofs unread, and did not say what it does not check,
      nor what rests on Ed25519 alone.
    * `predict` left the most probable label to be found among the probabilities.
    """
    if "--json" in look and look.startswith("predict"):
        results = json.loads(text)
        assert all(each.pop("label") == max(p := each["probabilities"], key=p.__getitem__) for each in results)
        return json.dumps(results)
    if look.startswith("audit verify"):
        return verified_before(look, text)
    if "--json" in look and look.startswith("check"):
        document, old = json.loads(text), json.loads(EXPECT["looks"][look])
        assert document.pop("passes")["objection"] == ""
        assert document.pop("token_lengths")["records"] > 0
        assert document["memory_bytes"] > old["memory_bytes"]
        assert document["digest"] != old["digest"]
        return json.dumps(document | {"memory_bytes": old["memory_bytes"], "digest": old["digest"]})
    if "--json" in look and look.startswith("privacy"):
        document = json.loads(text)
        assert document.pop("format") == 3
        document.get("not_covered", {})["validation split"] = json.loads(EXPECT["looks"][look])["not_covered"][
            "validation split"
        ]
        assert document["epsilon"].pop("replacing").keys() == {"epsilon", "delta", "epsilon_at_same_delta"}
        return json.dumps(document | {"format": 1})
    if "--json" in look and look.startswith("site budget"):
        document = json.loads(text)
        added = {name: document.pop(name) for name in ("shared_noise", "corrupt", "everybody", "counted")}
        assert added["counted"] > document["committed"] == added["everybody"]["committed"]
        after = document.pop("after_counted")
        assert (after is None) == (document["after"] is None)
        return json.dumps(document)
    if "--json" in look and look.startswith("coordinator status"):
        document = json.loads(text)
        assert document.pop("founded")
        assert document.pop("serving") is False
        assert document.pop("connected") == document.pop("asking") == []
        for run in document["runs"]:
            assert run.pop("rounds") >= run["closed"]
            assert run.pop("withdrawn") is run.pop("waiting") is None
            del run["epsilon"], run["metrics"]
        return json.dumps(document)
    if look.startswith("coordinator status"):
        for whole in re.findall("sha256:[0-9a-f]{64}", EXPECT["looks"][look]):
            text = text.replace(f"{whole[:19]}\n", f"{whole}\n")
        return re.sub(r"^ +(at most epsilon|validation) .*\n|(?<=\d) of \d+", "", text, flags=re.MULTILINE)
    if look.startswith("data "):
        text = re.sub(r"^\S+/(?=\S+ \()", "", text, flags=re.MULTILINE)
        new_lines = r"^(  tokens of a record:|  data.max_length =|declared_count =|  \(add this line|  so it is) .*\n"
        return re.sub(new_lines, "", text, flags=re.MULTILINE)
    if look.startswith("site check"):  # sites run the rounds of a study once, and say so before they are asked
        assert ("E_SPENT" in text) == ("first.toml" in look)
        return re.sub(r"^(E_SPENT|to admit it) .*\n", "", text, flags=re.MULTILINE)
    if look.startswith("audit bundle"):
        return re.sub(r"^(next|then): .*\n", "", text, flags=re.MULTILINE)
    if look.startswith("site policy"):
        return re.sub(r"^.*It pays for at most 5 rounds in a row.*\n", "", text, flags=re.MULTILINE)
    if look.startswith("privacy"):
        return re.sub(r"Replacing one .*?(?=\n\n)", "", text, flags=re.DOTALL)
    if look.startswith("site budget"):
        return re.sub(r"^counted .*\n|, counted as [\d.]+", "", text, flags=re.MULTILINE)
    return text


def verified_before(look: str, text: str) -> str:
    if "--json" not in look:
        return re.sub(
            r"^(checked: (site|the proofs)|not checked:|author's word:|Ed25519 alone:) .*\n",
            "",
            text,
            flags=re.MULTILINE,
        )
    document = json.loads(text)
    added = {name: document.pop(name) for name in ("verdict", "unchecked", "accounts", "together", "receipts")}
    assert added["verdict"] == "verified"
    assert document.pop("ed25519_alone") == ["all signatures"]
    assert all(each["computed"] <= each["stated"] * (1 + 1e-6) for each in added["accounts"])
    assert document.pop("fields").keys() == document.pop("authors_word").keys()
    assert "proofs" in document["checked"].pop()
    return json.dumps(document)


@pytest.mark.parametrize("look", LOOKS)
def test_a_command_says_of_old_files_what_the_old_one_said(look: str, inside: Path, privet: Run) -> None:
    code, found, err = privet(*shlex.split(look))
    assert code in (0, 3), err
    wanted, found = EXPECT["looks"][look], as_before(look, found)
    if "--json" in look:
        assert close(json.loads(plain(found)), json.loads(plain(wanted)))
    else:  # sentences may be put better; what they tell may not change
        assert facts(found) == facts(wanted)


def members_of(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


@pytest.mark.parametrize(("run", "bundle"), [("finished", "finished"), ("consortium/coordinator/runs/first", "first")])
def test_an_old_run_is_packed_into_the_same_bundle(run: str, bundle: str, inside: Path, privet: Run) -> None:
    out, old = inside / f"{bundle}-again.tar", inside / f"{bundle}.tar"
    public = () if run == "finished" else ("--public", "consortium/coordinator/public")
    code, _, err = privet("audit", "bundle", run, *public, "--out", out)
    assert code == 0, err
    found, wanted = members_of(out), members_of(old)
    told = json.loads(privet("privacy", run, "--json")[1])["versions"]
    if told == EXPECT["versions"]:
        assert found == wanted
    else:  # the privacy statement names versions, and the table of contents its digest
        assert found.keys() == wanted.keys()
        differing = {name for name in found if found[name] != wanted[name]}
        assert all("privacy_statement" in name or name == "bundle.json" for name in differing), differing


def test_new_databases_have_the_tables_of_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    made = World(tmp_path)
    make_databases(made)
    assert {name: schema_of(tmp_path / path) for name, path in MADE.items()} == EXPECT["schemas"]


class ForkedWorld(World):
    """A world whose programs are forked from a process that has loaded the libraries."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        super().__init__(folder)
        self.forks = forks

    def start(self, name: str, *arguments: object) -> None:
        """Start a command that goes on, with its output in `logs/`."""
        (self.folder / "logs").mkdir(exist_ok=True)
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self.programs[name] = self.forks.start(arguments, environment(self.folder), log, directory=self.folder)


# --- going on --------------------------------------------------------------------------------------------


def test_an_interrupted_simulation_goes_on_to_the_adapter_of_one_that_was_not(
    world: Path, privet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, world)
    before = {file.name: file.read_bytes() for file in (world / "interrupted" / "rounds").iterdir()}
    assert 3 <= len(before) < ROUNDS["simulated"]
    code, out, err = privet("simulate", "--resume", "interrupted", "--json")
    assert code == 0, err
    summary, whole = json.loads(out), json.loads((world / "finished" / "summary.json").read_text())
    after = {file.name: file.read_bytes() for file in (world / "interrupted" / "rounds").iterdir()}
    assert {name: after[name] for name in before} == before
    assert len(after) == ROUNDS["simulated"]
    for key in ("epsilon", "outcome"):
        assert summary[key] == whole[key] or not as_when_made()
    check_adapters(world, "interrupted")
    assert privet("audit", "bundle", "interrupted", "--out", "it.tar")[0] == 0
    assert privet("audit", "verify", "it.tar", "--policy", "interrupted/log/policy")[0] == 0


def test_a_simulation_anew_comes_to_the_adapter_that_it_came_to(
    world: Path, privet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, world)
    code, out, err = privet("simulate", "simulated.toml", "--out", "again", "--json")
    assert code == 0, err
    summary, whole = json.loads(out), json.loads((world / "finished" / "summary.json").read_text())
    added = {"own_records", "better_together", "training_records"}  # which summaries did not hold then
    assert summary.keys() - added == whole.keys()
    for key in ("epsilon", "outcome"):
        assert summary[key] == whole[key] or not as_when_made()
    check_adapters(world, "again")
    for number in range(1, ROUNDS["simulated"] + 1):
        texts = [(world / run / "rounds" / f"{number:04d}.json").read_text() for run in ("again", "finished")]
        found, wanted = map(json.loads, texts)
        assert found.keys() == wanted.keys()
        assert close(found["privacy"], wanted["privacy"])
        assert found["survivors"] == wanted["survivors"]
    again, finished = (
        {str(f.relative_to(world / run)) for f in (world / run).rglob("*") if "witness" not in f.parts}
        for run in ("again", "finished")
    )  # a witness keeps its checkpoints in one file now
    # Drawn where matplotlib is; and what runs did not write then.
    assert again - {"curves.png", "training.jsonl", "release/study.json"} == finished


@pytest.fixture
def moved(world: Path, forks: Forks) -> Iterator[World]:
    """A consortium that is moved to free ports, as its operators would; what was started ends with the test."""
    ports = dict(zip(map(str, EXPECT["ports"]), map(str, free_ports(3)), strict=True))
    consortium = world / "consortium"
    papers = [consortium / name / file for name in SITES for file in ("site.toml", "consortium/roster.json")]
    for file in (consortium / "coordinator" / "coordinator.toml", *papers):
        text = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[found[1]]}", file.read_text())
        file.write_text(text)
    made = ForkedWorld(world, forks)
    with made.ending():
        yield made


@pytest.mark.slow
def test_a_consortium_goes_on_with_the_study_in_which_everybody_was_killed(
    moved: World, privet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(monkeypatch, moved.folder)
    coordinator, runs = ("-C", "consortium/coordinator"), moved.folder / "consortium/coordinator/runs"
    sites = {name: f"consortium/{name}/site.toml" for name in SITES}
    log = ("--policy", "consortium/alpha/consortium/log.policy")

    def say(*arguments: object) -> str:
        code, out, err = privet(*arguments)
        assert code == 0, (arguments, out, err)
        return out

    def told(*arguments: object) -> dict[str, Any]:
        return dict(json.loads(say(*arguments, "--json")))

    before = {name: told("site", "receipts", file)["receipts"] for name, file in sites.items()}
    spent = told("site", "budget", sites["alpha"])
    rounds = {file.name: file.read_bytes() for file in (runs / "second" / "rounds").iterdir()}

    # Each site is migrated by one command, and confirms by words what its old file took from the coordinator.
    for name, file in sites.items():
        code, _, err = privet("site", "roster", file)
        assert (code, f"privet site migrate {file}" in err) == (2, True), err
        assert "site.toml.before-trust" in say("site", "migrate", file)
        assert "head" in say("site", "budget", file), name
    moved.serve()
    moved.until_listening()
    # Its certificate has expired, so the identity key asks.
    assert "renewed: valid until" in say("site", "renew", sites["alpha"])
    charter = told("coordinator", "charter", *coordinator)["words"]
    words = {name: Enrolment(Path(file).parent).asked.keys.words for name, file in sites.items()}
    for file in sites.values():
        if file != sites["alpha"]:
            say("site", "renew", file)
        say("site", "trust", file, "--words", charter)
        for name in words:
            say("site", "trust", file, name, "--words", words[name])
    assert f"ended after round {ROUNDS['second']}: " in say(
        "coordinator", "resume", "second", *coordinator, "--gather", 120
    )
    assert "NOT confirmed" not in say("site", "roster", sites["alpha"])
    # The one thing that an earlier version let pass: the anchor on the ledger's disk. The operator moves or accepts it.
    code, out, _ = privet("site", "doctor", sites["alpha"], "--json")
    assert (code, [each["name"] for each in json.loads(out)["checks"] if not each["ok"]]) == (1, ["anchor"])
    Path(sites["alpha"]).write_text("anchor_same_disk = true\n" + Path(sites["alpha"]).read_text())
    # The process that serves the site has read the file before that.
    code, out, _ = privet("site", "doctor", sites["alpha"], "--json")
    assert (code, [each["name"] for each in json.loads(out)["checks"] if not each["ok"]]) == (1, ["process"])

    assert {name: (runs / "second" / "rounds" / name).read_bytes() for name in rounds} == rounds
    run = ("consortium/coordinator/runs/second", "--public", "consortium/coordinator/public")
    say("audit", "bundle", *run, "--out", "second.tar")
    verdict = told("audit", "verify", "second.tar", *log)
    assert (verdict["ok"], verdict["cosigners"]) == (True, list(SITES))
    statements = [json.loads(file.read_text()) for file in sorted((runs / "second" / "rounds").iterdir())]
    assert len(statements) == ROUNDS["second"]
    closed = [each for each in statements if each["type"] == "round-close"]
    assert closed[-1]["round"] == ROUNDS["second"]
    for name, file in sites.items():
        receipts = told("site", "receipts", file)["receipts"]
        assert receipts[: len(before[name])] == before[name]
        taken = [receipt["round"] for receipt in receipts if receipt["study"] == statements[0]["study"]]
        assert len(taken) == len(set(taken))
        assert {each["round"] for each in closed if name in each["survivors"]} <= set(taken)
    assert told("site", "budget", sites["alpha"])["epsilon"] > spent["epsilon"]
