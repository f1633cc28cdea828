"""Pack a run into a bundle for an auditor (`privet.common.audit.bundle` describes its content)."""

from __future__ import annotations

import json
from pathlib import Path

from privet.common.audit.bundle import (
    CHECKPOINT,
    MANIFEST,
    PROVED,
    RELEASE,
    ROUNDS,
    SOFTWARE,
    STUDY,
    leaves_of,
    proof_name,
)
from privet.common.audit.egress import check_kept
from privet.common.audit.release import ADAPTER
from privet.common.audit.verify import Tree
from privet.common.canonical import canonical_json
from privet.common.errors import StateError, VerificationError
from privet.common.log.checkpoint import Checkpoint, LeafProof
from privet.common.log.merkle import leaf_hash
from privet.common.log.note import parse_note
from privet.common.log.replay import Replay, admit
from privet.common.log.statements import RoundOpened, RunOpen
from privet.common.log.tiles import tiles
from privet.common.study.average import AVERAGED
from privet.server.rounds.state import RunDirectory


def bundle_files(run: RunDirectory, public: Path, *, with_weights: bool) -> dict[str, bytes]:
    """Return the files of a run's bundle by name.

    Args:
        run: The run.
        public: Where its log is published.
        with_weights: Whether to include the adapter's weights.

    Raises:
        StateError: No log is published there, or a file of the run is missing.
        RefusedError: The gate of the study withholds the weights.
    """
    if with_weights:
        # Of a run that releases an average, a bundle with the weights has adapters of rounds as well.
        check_kept(run.study, run.load().adapter.digest, run.path)
    try:
        note = (public / CHECKPOINT).read_bytes()
        size = Checkpoint.parse(parse_note(note).text).size
        files = {CHECKPOINT: note} | {tile.path: (public / tile.path).read_bytes() for tile in tiles(size)}
        files |= {name: (run.path / name).read_bytes() for name in (STUDY, SOFTWARE)}
        files |= {f"{ROUNDS}{file.name}": file.read_bytes() for file in (run.path / "rounds").glob("*.json")}
        if with_weights:
            parts = (run.path / AVERAGED).glob("*.safetensors")
            files |= {f"{AVERAGED}{file.name}": file.read_bytes() for file in parts}
        released = [file for file in (run.path / "release").glob("*") if with_weights or file.name != ADAPTER]
        files |= {f"{RELEASE}{file.name}": file.read_bytes() for file in released}
    except OSError as error:
        raise StateError(
            f"{error.filename} cannot be read ({error.strerror})",
            "resume the run once: that publishes the log and the run's files again",
        ) from None
    name, proofs = _proofs(files, size, run.study.digest)
    return {**files, **proofs, MANIFEST: canonical_json({"format": 1, "run": name}) + b"\n"}


def published_log(run: Path) -> Path:
    """Return where the log of a run is published: within a simulated run, beside the runs of a coordinator.

    Raises:
        StateError: It is at neither place, as for a copy of a deployed run.
    """
    places = [run / "public", run.resolve().parent.parent / "public"]
    for place in places:
        if (place / CHECKPOINT).is_file():
            return place
    raise StateError(
        f"the published round log of the run is neither in {places[0]} nor in {places[1]}",
        "name its directory with --public: of a deployed run, it is `public` in the coordinator's directory",
    )


def own_policy(run: Path) -> Path:
    """Return the policy that the owner of a run's log keeps: within a simulated run, beside a coordinator's public log.

    Raises:
        StateError: There is none, as for a bundle or a copy of a run.
    """
    home = run.resolve().parent.parent
    for place in (run / "log" / "policy", home / "public" / "log.policy"):
        if place.is_file():
            return place
    raise StateError(
        f"there is no policy of the round log beside {run}",
        "name it with --policy: a site keeps one in consortium/log.policy",
    )


def _nonce(name: str, data: bytes) -> str:
    """Return the nonce in a round's statement. Raises `VerificationError` if there is none."""
    try:
        return str(json.loads(data)["nonce"])
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"{name} is no statement of a round ({type(error).__name__})",
            "resume the run once: that writes all statements again",
        ) from None


def _proofs(files: dict[str, bytes], size: int, study: str) -> tuple[str, dict[str, bytes]]:
    """Return the run's name in the log, and proofs for the leaves that an auditor looks at first.

    The run is the one that has the rounds in `files`; before the first round, the last run of the study.
    """
    history, tree = Replay(), Tree()
    stated = []
    for index, data in enumerate(leaves_of(files, size)):
        stated.append(admit(history, index, data, tree.root_at))
        tree.append(leaf_hash(data))
    runs = [statement.run for _, statement in stated if isinstance(statement, RunOpen) and statement.study == study]
    nonces = {_nonce(name, data) for name, data in files.items() if name.startswith(ROUNDS)}
    runs += [
        statement.run for _, statement in stated if isinstance(statement, RoundOpened) and statement.nonce in nonces
    ]
    if not runs:
        raise StateError(
            "the published round log has no run of the study in this run directory",
            "name the directory of the log of this run with --public",
        )
    proofs = {}
    for leaf, statement in stated:
        if isinstance(statement, PROVED) and statement.run == runs[-1]:
            proofs[proof_name(leaf.index, statement.type)] = LeafProof(
                leaf.index, tree.prove(leaf.index), files[CHECKPOINT]
            ).encode()
    return runs[-1], proofs
