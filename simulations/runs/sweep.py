"""A sweep: one study simulated over many settings, on a grid or at random, resumable run by run.

::

    sweep.json        the result: the fields, and a row for each run
    studies/ID.toml   the study file of each run
    runs/ID/          the directory of each run; ID is a digest of study and scenario
    failed/ID.json    runs that diverged, or ended because too few sites were left

A finished run is not repeated, and an interrupted run is resumed. The choice of settings by their results on private
data is itself a release. A sweep therefore states on which kind of data it ran, and for private data the privacy cost
of all its runs together.
"""

from __future__ import annotations

import copy
import fcntl
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from privet.common.canonical import canonical_json, digest
from privet.common.errors import DivergedError, ProtocolError, StateError, StudyError
from privet.common.files import make_directory, write_durably
from privet.common.privacy.accounting import PrivacyEvent, epsilon, plan
from privet.common.privacy.noise import SeededRandomness
from privet.common.study.reading import read_toml, validate
from privet.common.study.sections import Section
from privet.common.study.study import Study
from privet.simulations.data.federation import Plan, check_files, plan_of
from privet.simulations.engines.crew import crew_of
from privet.simulations.runs.simulate import Simulated, Watcher, prepare, reopen, run_simulation
from privet.simulations.runs.toml import absolute_paths, to_toml

Scalar = bool | int | float | str
_SHOWN = 5
_ID = 12


class Span(Section):
    """A range of numbers for a random search."""

    low: float
    high: float
    scale: Literal["linear", "log"] = "linear"
    integer: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low: expected low < high, got low {self.low} and high {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f'low: expected a number above 0 with scale = "log", got {self.low}')
        return self

    def at(self, fraction: float) -> float | int:
        """Return the value at a fraction of the range, from 0 (low) to 1 (high)."""
        if self.scale == "log":
            value = self.low * (self.high / self.low) ** fraction
        else:
            value = self.low + (self.high - self.low) * fraction
        return round(value) if self.integer else float(f"{value:.6g}")


class Sweep(Section):
    """A sweep file."""

    study: Path
    """The study file to vary, relative to this one."""
    data: Literal["public", "private"]
    """Kind of the records on which settings are chosen. private: the result states the privacy cost of all runs."""
    search: Literal["grid", "random"] = "grid"
    """grid: every combination. random: `samples` of them."""
    samples: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """For random: number of runs."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of a random search."""
    fields: Annotated[dict[str, Annotated[tuple[Scalar, ...], Field(min_length=1)] | Span], Field(min_length=1)]
    """Values of each field, by its dotted name in the study file, e.g. "privacy.epsilon", "simulation.partition.sites".
    A random search also takes `{ low, high, scale, integer }`."""

    @model_validator(mode="after")
    def _search_fits(self) -> Self:
        if (self.samples is not None) != (self.search == "random"):
            raise ValueError('samples: search = "random" needs this field, search = "grid" does not take it')
        spans = [name for name, values in self.fields.items() if isinstance(values, Span)]
        if spans and self.search == "grid":
            raise ValueError(f'fields.{spans[0]}: search = "grid" takes a list of values, got a range')
        return self

    def combinations(self) -> list[dict[str, Scalar]]:
        """Return the settings of all runs, in order and without repetition."""
        if self.search == "grid":
            lists = [values for values in self.fields.values() if not isinstance(values, Span)]
            found = [dict(zip(self.fields, chosen, strict=True)) for chosen in itertools.product(*lists)]
        else:
            draws = SeededRandomness(self.seed, "sweep").uniform(len(self.fields) * (self.samples or 0))
            found = [
                {
                    name: values.at(float(draw)) if isinstance(values, Span) else values[int(draw * len(values))]
                    for (name, values), draw in zip(self.fields.items(), row, strict=True)
                }
                for row in draws.reshape(-1, len(self.fields))
            ]
        return list({canonical_json(fields): fields for fields in found}.values())


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        identity: Digest of study and scenario.
        fields: The fields that are set, and their values.
        document: The plain values of the study file, with absolute paths.
        plan: The checked study and scenario.
    """

    identity: str
    fields: Mapping[str, Any]
    document: Mapping[str, Any]
    plan: Plan


def load_sweep(path: Path) -> tuple[Sweep, list[SweepRun]]:
    """Read a sweep file, and check every run before any is started.

    Raises:
        StudyError: A file is missing or not valid, or some settings give no valid study. The message names them.
    """
    sweep = validate(Sweep, read_toml(path, what="sweep"), what="sweep file")
    source = (path.parent / sweep.study).resolve()
    document = read_toml(source, what="study")
    entries: list[SweepRun] = []
    wrong: list[str] = []
    for fields in sweep.combinations():
        try:
            entries.append(entry_of(document, fields, source.parent))
        except StudyError as error:
            wrong.append(f"{named(fields)}: {error.message}")
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise StudyError(
            f"sweep file {path}: {len(wrong)} of {len(wrong) + len(entries)} settings give no valid study:\n  "
            + "\n  ".join(wrong[:_SHOWN])
            + more,
            "correct these settings in the sweep file; no run was started",
        )
    return sweep, entries


def entry_of(document: Mapping[str, Any], fields: Mapping[str, Any], root: Path) -> SweepRun:
    """Return the run of a study file with some fields set.

    Raises:
        StudyError: The study file with these fields is not valid.
    """
    changed = copy.deepcopy(dict(document))
    for name, value in fields.items():
        *tables, last = name.split(".")
        table = changed
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise StudyError(
                    f"fields.{name}: in the study file, {part} is not a table, so it has no fields",
                    'name a field by its path in the study file, such as "privacy.epsilon"',
                )
        table[last] = value
    changed = absolute_paths(changed, root)
    found = plan_of(changed, root)
    check_files(found)
    # The identity covers everything that decides the result, so that no run is taken for one with other settings.
    content = {"study": found.study.document(), "simulation": found.simulation.model_dump(mode="json")}
    return SweepRun(digest(canonical_json(content)).removeprefix("sha256:")[:_ID], dict(fields), changed, found)


def named(fields: Mapping[str, Any]) -> str:
    """Return settings as one line of text."""
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())


def run_sweep(
    sweep: Sweep,
    entries: Sequence[SweepRun],
    out: Path,
    watch: Callable[[SweepRun, Mapping[str, Any]], None],
    workers: int = 1,
    rounds: Watcher = lambda report: None,
) -> dict[str, Any]:
    """Simulate each run that has no result yet, and return and write the result.

    Args:
        sweep: The sweep file.
        entries: Its runs.
        out: The sweep's directory: a new one, or the one of the same sweep.
        watch: Receives the row of each run as soon as the run has ended.
        workers: Processes, each with one run at a time; 1 uses this process.
        rounds: Receives a report of each closed round of the runs in this process.

    Raises:
        StateError: `out` holds another sweep, or another process uses it.
        PrivetError: A run failed, other than by diverging or by losing its sites.
    """
    out = out.resolve()
    asked = {"sweep": sweep.model_dump(mode="json"), "runs": [entry.identity for entry in entries]}
    with claimed(out, asked), crew_of(min(workers, len(entries))) as crew:
        rows = []
        done = (
            crew.map(partial(run_entry, out=out), entries)
            if crew
            else map(partial(run_entry, out=out, watch=rounds), entries)
        )
        for entry, summary in zip(entries, done, strict=True):
            rows.append(row_of(entry, summary))
            watch(entry, rows[-1])
            # Written after each run, so that an interrupted sweep leaves its results so far.
            write_result(out, result_of(sweep, entries, rows))
    return result_of(sweep, entries, rows)


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a sweep so far, durably."""
    write_durably(out / "sweep.json", (json.dumps(result, indent=2) + "\n").encode())


@contextmanager
def claimed(out: Path, asked: Mapping[str, Any]) -> Iterator[None]:
    """Reserve a directory for one sweep or comparison until the block ends.

    Raises:
        StateError: The directory belongs to other settings, or another process has reserved it.
    """
    make_directory(out)
    file, text = out / "asked.json", canonical_json(asked)
    with (out / ".lock").open("w") as lock:
        # The system releases the lock when the process ends, however it ends.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"another process uses the directory {out}",
                "wait until that process has ended, or choose another --out",
            ) from None
        if file.is_file() and file.read_bytes() != text:
            raise StateError(
                f"{out} was begun with other settings: the sweep file or study file has been changed since, "
                "or the directory belongs to another one",
                "choose another --out, or restore the file",
            )
        write_durably(file, text)
        yield


def run_entry(entry: SweepRun, out: Path, watch: Watcher = lambda report: None, workers: int = 1) -> dict[str, Any]:
    """Run or resume one run unless it has ended, and return its summary, or the reason of its failure."""
    folder, failed = out / "runs" / entry.identity, out / "failed" / f"{entry.identity}.json"
    summary = folder / "summary.json"
    if not (summary.is_file() or failed.is_file()):
        try:
            run_simulation(_open(entry, out, folder), watch, workers=workers)
        # To diverge, or to lose the sites, is a result of the settings. Any other error ends the sweep.
        except (ProtocolError, DivergedError) as error:
            outcome = {"outcome": {"ended": type(error).__name__, "reason": error.message}}
            failed.parent.mkdir(exist_ok=True)
            write_durably(failed, json.dumps(outcome).encode())
    found: dict[str, Any] = json.loads((summary if summary.is_file() else failed).read_text(encoding="utf-8"))
    return found


def _open(entry: SweepRun, out: Path, folder: Path) -> Simulated:
    if folder.is_dir():
        return reopen(folder)
    study = out / "studies" / f"{entry.identity}.toml"
    study.parent.mkdir(exist_ok=True)
    study.write_text(to_toml(entry.document), encoding="utf-8")
    return prepare(study, folder)


def row_of(entry: SweepRun, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of one run in the result."""
    row: dict[str, Any] = {"id": entry.identity, "fields": dict(entry.fields), "outcome": summary["outcome"]["ended"]}
    if "metric" not in summary:
        return row | {"value": None, "interval": None, "epsilon": None}
    scores = summary[summary["metric"]]
    virtual = summary["scenario"].get("virtual")
    return row | {
        "metric": summary["metric"],
        "value": scores["federated"],
        "interval": summary["intervals"].get("federated"),
        "local_mean": scores["local_mean"],
        "pooled": scores["pooled"],
        "epsilon": summary["epsilon"],
        "virtual_seconds": None if virtual is None else virtual["seconds"],
        "seconds": summary["seconds"],
    }


def result_of(sweep: Sweep, entries: Sequence[SweepRun], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the result of a sweep: its rows, the best run, and the privacy cost of choosing it."""
    scored = [row for row in rows if row["value"] is not None and math.isfinite(row["value"])]
    metric = scored[0]["metric"] if scored else None
    choose = min if metric == "perplexity" else max
    best = choose(scored, key=lambda row: row["value"])["id"] if scored else None
    studies = [entry.plan.study for entry in entries[: len(rows)]]
    return {
        "study": entries[0].plan.study.name,
        "fields": list(sweep.fields),
        "metric": metric,
        "finished": len(rows),
        "asked": len(entries),
        "tuning": tuning_of(sweep.data, studies),
        "best": best,
        "rows": [dict(row) for row in rows],
    }


def tuning_of(data: str, studies: Sequence[Study]) -> dict[str, Any]:
    """Return the privacy cost of choosing among the results of these studies, for the kind of data."""
    if data == "public":
        return {"data": data, "says": "tuned on public data: choosing among the runs costs no privacy"}
    spent = composed_promise(studies)
    cost = (
        "some runs are not private, so no epsilon bounds the cost of choosing"
        if spent is None
        else f"all runs together cost epsilon {spent['epsilon']:.2f} at delta {spent['delta']:g} per unit"
    )
    says = f"TUNED ON PRIVATE DATA: the epsilon of the chosen run is not the whole cost; {cost}"
    return {"data": data, "says": says, "composed": spent}


def composed_promise(studies: Sequence[Study]) -> dict[str, float] | None:
    """Return epsilon and delta of all studies together on the same records, or None if one is not private.

    A unit is in each run once, at one site. Its cost is therefore at most that of the mechanisms of all runs in
    sequence (Rényi accountant, an upper bound, at the largest delta).
    """
    training: list[PrivacyEvent] = []
    validation: list[PrivacyEvent] = []
    delta = 0.0
    for study in studies:
        mechanism = plan(study)
        if mechanism is None:
            return None
        delta = max(delta, mechanism.delta)
        training += [mechanism.training] * mechanism.training.counted_rounds(study.training.rounds)
        if mechanism.validation is not None:
            validation += [mechanism.validation] * study.training.rounds
    # A unit that one run holds out for validation may train another run, so both kinds of mechanism are charged.
    return {"epsilon": round(epsilon([*training, *validation], delta, "rdp"), 4), "delta": delta}


def field_values(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[Any, list[float]]]:
    """Return the results by value of one field, in order of the values. Runs without a result are left out."""
    found: dict[Any, list[float]] = {}
    for row in rows:
        if row["value"] is not None and np.isfinite(row["value"]):
            found.setdefault(row["fields"][name], []).append(row["value"])
    return sorted(found.items(), key=lambda item: (isinstance(item[0], str), item[0]))
