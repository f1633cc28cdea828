"""A second verifier: Go's own sumdb packages read what we write, and we read what they write.

Needs Debian's `golang-go` and `golang-golang-x-mod-dev`. Without them the tests are skipped, but not where the
environment says PRIVET_REQUIRE_GO=1, as `.ci/run` does: there their absence is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from privet.common.log import merkle, tiles
from privet.common.log.checkpoint import Checkpoint
from privet.common.log.merkle import leaf_hash
from privet.common.log.note import COSIGNATURE, ED25519, NoteKey, decode_base64, encode_base64, parse_note, verify_note
from privet.server.log.roundlog import RoundLog, create_log, open_log
from tests.support.log_world import ORIGIN, World, log_key, private, public, second, sign_head, witness_key
from tests.support.logged_world import world_of
from tests.support.masked_world import masked_study
from tests.support.rotated_log import Rotated

GOPATH = Path("/usr/share/gocode")  # where Debian puts the sources of Go packages
MISSING = [
    name
    for name, found in {
        "go": shutil.which("go") is not None,
        "golang.org/x/mod/sumdb": (GOPATH / "src/golang.org/x/mod/sumdb/tlog").is_dir(),
    }.items()
    if not found
]
INSTALL = "apt-get install -y --no-install-recommends golang-go golang-golang-x-mod-dev"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING) and os.environ.get("PRIVET_REQUIRE_GO") != "1",
        reason=f"{', '.join(MISSING)} not installed: {INSTALL}",
    ),
]

SOURCE = Path(__file__).with_name("verify.go")
LEAVES = 700
WORLD = World()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the Go program from Debian's sources, without a network."""
    if MISSING:
        pytest.fail(f"PRIVET_REQUIRE_GO expects {', '.join(MISSING)}: {INSTALL}")
    built = tmp_path_factory.mktemp("go") / "verify"
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": str(GOPATH), "GOFLAGS": "", "GOPROXY": "off"}
    environment.setdefault("GOCACHE", str(built.parent / "cache"))
    subprocess.run(["go", "build", "-o", built, SOURCE], env=environment, check=True, timeout=300)
    return built


def go(program: Path, *arguments: object, stdin: str = "", succeeds: bool = True) -> str:
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode == 0) == succeeds, done.stderr
    return done.stdout if succeeds else done.stderr


def vkeys() -> list[str]:
    return [log_key().text, *(witness_key(site).text for site in WORLD.sites)]


@contextmanager
def written(directory: Path) -> Iterator[RoundLog]:
    """Write a log of 700 leaves and more, witnessed and published."""
    if not WORLD.leaves:
        WORLD.found()
        number = 1
        while len(WORLD.leaves) < LEAVES:
            WORLD.play("flu", number)
            number += 1
    create_log(directory / "log")
    with open_log(directory / "log", ORIGIN, private("log")) as log:
        log.append(WORLD.leaves)
        log.checkpoint()
        log.cosign(log.size, parse_note(WORLD.checkpoint()).signatures[1:], WORLD.policy)
        log.publish(directory / "public", WORLD.policy)
        yield log


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, RoundLog]]:
    """A published log, and the open one that it came from."""
    directory = tmp_path_factory.mktemp("published")
    with written(directory) as log:
        yield directory / "public", log


def test_go_verifies_our_log(program: Path, published: tuple[Path, RoundLog]) -> None:
    directory, log = published
    found = json.loads(go(program, "log", directory, *vkeys()))
    assert found == {"size": log.size, "signatures": 4, "unknown": 0}
    assert log.size >= LEAVES
    assert json.loads(go(program, "log", directory, vkeys()[0]))["unknown"] == 3


def test_go_verifies_the_log_that_a_study_left(program: Path, tmp_path: Path) -> None:
    world = world_of(tmp_path, masked_study(training={"rounds": 2}), 4)
    world.play()
    keys = [world.policy.log.text, *(key.text for key in world.policy.witnesses)]
    found = json.loads(go(program, "log", tmp_path / "run" / "public", *keys))
    assert found == {"size": 15, "signatures": 5, "unknown": 0}


def test_go_verifies_the_ed25519_lines_of_hybrid_keys(program: Path, tmp_path: Path) -> None:
    """And passes over the others, whose type it does not know."""
    world = World(hybrid=True)
    world.found()
    world.play("flu", 1)
    create_log(tmp_path / "log")
    with open_log(tmp_path / "log", ORIGIN, private("log"), pq=second("log")) as log:
        log.append(world.leaves)
        log.checkpoint()
        log.cosign(log.size, parse_note(world.checkpoint()).signatures[2:], world.policy)
        log.publish(tmp_path / "public", world.policy)
    found = json.loads(go(program, "log", tmp_path / "public", *vkeys()))
    assert found == {"size": len(world.leaves), "signatures": 4, "unknown": 4}
    assert "FAILED" in go(program, "log", tmp_path / "public", world.policy.log.text, succeeds=False)


@pytest.mark.parametrize("place", ["checkpoint", "tile/0/001", "tile/1/000.p/2", "tile/entries/000"])
def test_go_finds_what_was_changed(program: Path, published: tuple[Path, RoundLog], tmp_path: Path, place: str) -> None:
    shutil.copytree(published[0], tmp_path / "copy")
    file = tmp_path / "copy" / place
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "FAILED" in go(program, "log", tmp_path / "copy", *vkeys(), succeeds=False)


def test_go_refuses_another_logs_key(program: Path, published: tuple[Path, RoundLog]) -> None:
    assert "FAILED" in go(program, "log", published[0], log_key("mallory").text, succeeds=False)
    assert "FAILED" in go(program, "log", published[0], vkeys()[0], vkeys()[0], succeeds=False)


def cases(log: RoundLog) -> list[dict[str, Any]]:
    """Return our proofs for leaves and sizes all over the log, as Go reads them."""
    roots = [Checkpoint.parse(parse_note(sign_head(WORLD.leaves[:size])).text).root for size in range(1, 301)]
    found = []
    for number in (0, 1, 5, 127, 255, 256, 299):
        old, size = number + 1, log.size
        inclusion = log.prove_leaf(number, WORLD.policy).proof
        consistency = log.prove_consistency(old, size)
        found.append(
            {
                "Size": size,
                "Root": encode_base64(WORLD.frontier.root),
                "Index": number,
                "Leaf": encode_base64(leaf_hash(WORLD.leaves[number])),
                "Record": [encode_base64(value) for value in inclusion],
                "OldSize": old,
                "OldRoot": encode_base64(roots[old - 1]),
                "Tree": [encode_base64(value) for value in consistency],
            }
        )
    return found


def test_go_checks_our_proofs(program: Path, published: tuple[Path, RoundLog]) -> None:
    right = cases(published[1])
    assert json.loads(go(program, "check", stdin=json.dumps(right))) == {"checked": 7}
    for field in ("Root", "Leaf", "OldRoot"):
        wrong = [{**right[3], field: encode_base64(bytes(32))}]
        go(program, "check", stdin=json.dumps(wrong), succeeds=False)


@pytest.mark.parametrize(("leaf", "old"), [(0, 1), (3, 256), (255, 257), (256, 500), (701, 699)])
def test_we_check_gos_proofs(program: Path, published: tuple[Path, RoundLog], leaf: int, old: int) -> None:
    found = json.loads(go(program, "prove", published[0], vkeys()[0], leaf, old))
    decoded = {name: decode_base64(found[name], name) for name in ("Root", "Leaf", "OldRoot")}
    record, tree = (tuple(decode_base64(value, name) for value in found[name]) for name in ("Record", "Tree"))
    assert decoded["Leaf"] == leaf_hash(WORLD.leaves[leaf])
    assert decoded["Root"] == WORLD.frontier.root
    merkle.check_inclusion(record, leaf, found["Size"], decoded["Root"], decoded["Leaf"])
    merkle.check_consistency(tree, old, decoded["OldRoot"], found["Size"], decoded["Root"])
    # And they are the very proofs that we make.
    log = published[1]
    assert record == log.prove_leaf(leaf, WORLD.policy).proof
    assert tree == log.prove_consistency(old, log.size)


def test_we_verify_notes_that_go_signs_and_make_the_same(program: Path) -> None:
    text = "example.org/log\n3\n" + encode_base64(bytes(32)) + "\n"
    seed = private("log").private_bytes_raw().hex()
    key = NoteKey("example.org/log", ED25519, public("log"))
    signed = parse_note(go(program, "sign", key.name, seed, stdin=text).encode())
    assert signed.text == text
    assert verify_note(signed, [key]) == (key,)
    witness = NoteKey("w.example", COSIGNATURE, public("log"))
    cosigned = parse_note(go(program, "cosign", witness.name, seed, 1_800_000_000, stdin=text).encode())
    assert verify_note(cosigned, [witness]) == (witness,)
    assert cosigned.signatures[0].time == 1_800_000_000


def test_the_files_that_go_read_are_all_there_are(published: tuple[Path, RoundLog]) -> None:
    directory, log = published
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert files == {"checkpoint", *(tile.path for tile in tiles.tiles(log.size))}


def test_go_verifies_a_log_before_and_after_its_key_was_rotated(program: Path, tmp_path: Path) -> None:
    made = Rotated().goes_on()
    for policy, folder in made.publish(tmp_path):
        size = Checkpoint.parse(parse_note((folder / "checkpoint").read_bytes()).text).size
        witnesses = [witness.text for witness in policy.witnesses]
        found = json.loads(go(program, "log", folder, policy.log.text, *witnesses))
        assert found == {"size": size, "signatures": 4, "unknown": 0}
        other = made.policy if policy != made.policy else made.world.policy
        assert "FAILED" in go(program, "log", folder, other.log.text, succeeds=False)
