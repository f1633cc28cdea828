"""What a report is made of: the files of one run directory, read and checked, and what follows from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.common.audit.privacy_statement import privacy_document
from privet.common.errors import StateError
from privet.common.study.adapter import AdapterSpec
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory
from privet.simulations.terminal.explain import bytes_up

ATTACK_KINDS = ("canaries", "membership", "reconstruction", "poisoning")


@dataclass(frozen=True)
class Traffic:
    """Bytes over all rounds and sites, by what the messages hold: without protocol overhead."""

    down: int
    up: int


@dataclass(frozen=True)
class RunFacts:
    """One run as a report shows it.

    Attributes:
        name: The run directory's name.
        summary: `summary.json`.
        statements: Its rounds' statements, oldest first.
        privacy: Its privacy statement, every number in it computed again.
        attacks: Results in `attacks/`, by attack.
        groups: Metrics by kind of group; empty where they were not computed.
        no_groups: Why not, where they were not.
    """

    name: str
    study: Study
    summary: Mapping[str, Any]
    statements: Sequence[Mapping[str, Any]]
    privacy: Mapping[str, Any]
    attacks: Mapping[str, Mapping[str, Any]]
    traffic: Traffic
    groups: Mapping[str, Sequence[tuple[str, int, float]]]
    no_groups: str


def gather(
    path: Path, groups: Mapping[str, Sequence[tuple[str, int, float]]] | None = None, no_groups: str = ""
) -> RunFacts:
    """Read a finished run.

    Args:
        path: The run directory.
        groups: Metrics by kind of group, as `subgroups.evaluate` returns them.
        no_groups: Why there are none.

    Raises:
        StateError: It is no finished run, or a file in it cannot be read.
        VerificationError: A number in its statements is not what it must be.
    """
    run = RunDirectory.open(path)
    state = run.load()
    summary = read_json(path / "summary.json", f"{path} has no summary: the run is not finished", "resume it first")
    if summary.get("study_digest") != run.study.digest:
        raise StateError(f"{path / 'summary.json'} is another study's", "run the study again")
    attacks = {}
    for name in ATTACK_KINDS:
        file = path / "attacks" / f"{name}.json"
        if file.is_file():
            attacks[name] = read_json(file, f"{file} cannot be read", "run the attack again")
            if attacks[name].get("attacked") != run.study.digest:
                raise StateError(f"{file} is another study's", "run the attack again, or remove the file")
    simulated = (path / "study.toml").is_file()
    return RunFacts(
        name=path.resolve().name,
        study=run.study,
        summary=summary,
        statements=state.statements,
        privacy=privacy_document(run.study, state.statements, simulated=simulated),
        attacks=attacks,
        traffic=traffic_of(run.study, state.adapter.spec, state.statements),
        groups=groups or {},
        no_groups=no_groups,
    )


def read_json(file: Path, problem: str, hint: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        StateError: There is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{problem} ({type(error).__name__})", hint) from None
    if not isinstance(found, dict):
        raise StateError(f"{file} is not a JSON object", hint)
    return found


def traffic_of(study: Study, spec: AdapterSpec, statements: Sequence[Mapping[str, Any]]) -> Traffic:
    """Return the bytes of adapters sent to the sites asked, and of updates from those that delivered."""
    asked = sum(len(statement["cohort"]) for statement in statements)
    delivered = sum(len(statement["survivors"]) for statement in statements)
    trained = sum(tensor.size for tensor in spec.trained(study.aggregation.method))
    each = 4 * sum(tensor.size for tensor in spec.tensors)
    return Traffic(each * asked, bytes_up(study, trained) * delivered)
