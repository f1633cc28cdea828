"""Read and check the files of a run directory for a report, and compute the figures that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.common.audit.privacy_statement import privacy_document
from privet.common.errors import StateError
from privet.common.study.adapter import AdapterSpec
from privet.common.study.reading import read_toml
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory, unfinished
from privet.simulations.terminal.explain import bytes_up

ATTACK_KINDS = ("canaries", "membership", "reconstruction", "poisoning")


@dataclass(frozen=True)
class Traffic:
    """Bytes of adapters and updates over all rounds and sites, without protocol overhead."""

    down: int
    up: int


@dataclass(frozen=True)
class RunFacts:
    """The facts about one run for its report.

    Attributes:
        name: Name of the run directory.
        study: The study.
        summary: Content of `summary.json`; empty for a deployed run, which has none.
        statements: Statements of the rounds, oldest first.
        privacy: The privacy statement; every number in it is computed again.
        attacks: Results in `attacks/`, by attack.
        traffic: Bytes sent in all rounds.
        groups: Metrics by kind of group; empty if they were not computed.
        no_groups: The reason why they were not computed.
        data: What the records are, in words; empty if the run does not tell.
        ended: Whether the run has ended; a deployed run may be reported before.
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
    data: str = ""
    ended: bool = True

    @property
    def deployed(self) -> bool:
        """Whether real sites ran the study: there is no summary of a simulation."""
        return not self.summary


def require_finished(path: Path) -> None:
    """Raise `StateError` unless a path is a run that a report can be written of: before anything is computed."""
    _summary(RunDirectory.open(path))


def _summary(run: RunDirectory) -> dict[str, Any]:
    """Return the summary of a simulation; empty for a deployed run, which has none. Raises `StateError`."""
    if run.deployed:
        return {}
    file, resume = run.path / "summary.json", unfinished(run)
    if not file.is_file():
        raise StateError(f"{run.path} has no summary.json: the run is not finished", resume)
    return read_json(file, f"{file} cannot be read", resume)


def gather(
    path: Path, groups: Mapping[str, Sequence[tuple[str, int, float]]] | None = None, no_groups: str = ""
) -> RunFacts:
    """Read a finished run, or a deployed one that has begun.

    Args:
        path: The run directory.
        groups: Metrics by kind of group, as `evaluate_groups` returns them.
        no_groups: The reason why there are no groups.

    Raises:
        StateError: The run is not finished, or a file in it cannot be read or belongs to another study.
        VerificationError: A number in its statements differs from the computed one.
    """
    run = RunDirectory.open(path)
    state = run.load()
    summary = _summary(run)
    if summary and summary.get("study_digest") != run.study.digest:
        raise StateError(
            f"{path / 'summary.json'} belongs to another study than the other files of this run directory",
            "simulate the study again in a new directory",
        )
    simulated = (path / "study.toml").is_file()
    return RunFacts(
        name=path.resolve().name,
        study=run.study,
        summary=summary,
        statements=state.statements,
        privacy=privacy_document(run.study, state.statements, simulated=simulated),
        attacks=attacks_of(path, run.study),
        traffic=traffic_of(run.study, state.adapter.spec, state.statements),
        groups=groups or {},
        no_groups=no_groups,
        data=data_of(path, _sites(summary)) if simulated else "",
        ended=state.stopped,
    )


def attacks_of(path: Path, study: Study) -> dict[str, Mapping[str, Any]]:
    """Return the results of attacks that a run directory holds, by attack.

    Raises:
        StateError: A file of them cannot be read, or belongs to another study.
    """
    attacks: dict[str, Mapping[str, Any]] = {}
    for name in ATTACK_KINDS:
        file = path / "attacks" / f"{name}.json"
        if file.is_file():
            attacks[name] = read_json(
                file, f"{file} cannot be read", f"run the attack again: `privet attack {name} --help`"
            )
            if attacks[name].get("attacked") != study.digest:
                raise StateError(
                    f"the attack result {file} belongs to another study than this run directory",
                    f"run the attack again (see `privet attack {name} --help`), or remove the file",
                )
    return attacks


def _sites(summary: Mapping[str, Any]) -> int:
    return int(summary["counts"]["sites"]) if "counts" in summary else len(summary["federated_per_site"])


def data_of(path: Path, sites: int) -> str:
    """Return what the records of a simulated run are, in words."""
    simulation = read_toml(path / "study.toml", what="study").get("simulation", {})
    if simulation.get("data") == "notes":
        return "generated clinical notes, which are about nobody"
    if "partition" in simulation:
        return f"one pool of records, dealt out to {sites} sites"
    return f"files of {sites} sites"


def read_json(file: Path, problem: str, hint: str) -> dict[str, Any]:
    """Read a file with one JSON object.

    Args:
        file: The file.
        problem: Message of the error if the file cannot be read.
        hint: Hint of the error.

    Raises:
        StateError: The file cannot be read, or does not hold one JSON object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{problem} ({type(error).__name__})", hint) from None
    if not isinstance(found, dict):
        raise StateError(f"{file}: expected a JSON object, found a value of type {type(found).__name__}", hint)
    return found


def traffic_of(study: Study, spec: AdapterSpec, statements: Sequence[Mapping[str, Any]]) -> Traffic:
    """Return the bytes of adapters sent to all invited sites, and of updates from the sites that delivered."""
    asked = sum(len(statement["cohort"]) for statement in statements)
    delivered = sum(len(statement["survivors"]) for statement in statements)
    trained = sum(tensor.size for tensor in study.trained(spec))
    each = 4 * sum(tensor.size for tensor in spec.tensors)
    return Traffic(each * asked, bytes_up(study, trained) * delivered)
