"""All that is checked of a simulation before it trains, at once: for `privet simulate` and for `privet check`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from privet.client.site import SiteConfig
from privet.client.training.data import load_files
from privet.client.training.overlap import Part, overlaps, part_of
from privet.common.errors import PrivetError, StudyError, together
from privet.common.log.agreement import check_leaf_size as check_round
from privet.common.masking.groups import check_columns, corrupt_sites, groups_of
from privet.common.masking.isolation import cohort_size
from privet.common.masking.parameters import parameters_of
from privet.common.privacy.accounting import plan as privacy_plan
from privet.common.study.counts import cells_of
from privet.common.study.messages import RoundOpen
from privet.common.study.study import Study
from privet.simulations.data.federation import Plan, faults_of, lay_out
from privet.simulations.engines.evaluation import Evaluator, open_evaluator
from privet.simulations.engines.memory import DataPool, SimulatedWorker, open_fleet

Say = Callable[[str], None]
_LISTED = 20


def check_simulation(plan: Plan, warn: Say) -> Evaluator:
    """Check a plan as `prepare` does, and leave nothing behind. Raises as `inspect`."""
    with TemporaryDirectory() as folder:
        return inspect(plan, lay_out(plan, Path(folder), _quietly), DataPool(), _quietly, warn)


def inspect(plan: Plan, files: Sequence[Path], pool: DataPool, say: Say, warn: Say) -> Evaluator:
    """Check the data of all simulated sites, and what the study demands of them. Return what evaluates on it.

    Args:
        plan: The plan.
        files: The site files that were written for it.
        pool: Keeps the records as tokens.
        say: Receives a line about each site's data.
        warn: Receives warnings.

    Raises:
        PrivetError: The simulation cannot begin. One error names every fault, of all sites.
    """
    names = [file.stem for file in files]
    faults: list[PrivetError] = [*faults_of(plan, names)]
    _tried(faults, lambda: check_largest_round(plan, names))
    _tried(faults, lambda: privacy_plan(plan.study))
    workers = list(open_fleet(files, pool).workers.values())
    parts: list[Part] = []
    for number, worker in enumerate(workers):
        found = _parts_of(plan.study, worker.config, faults)
        parts += found
        if any(not part.test for part in found):
            _tried(faults, partial(_open, plan.study, worker, say if number < _LISTED else _quietly))
    unreadable = faults and plan.simulation.test_fraction is not None  # then nothing could be held out
    if not plan.study.counts and not unreadable and not any(worker.config.test for worker in workers):
        faults.append(
            StudyError(
                "the study: no site has test records, but the results are measured and compared on them",
                "name `test` files in [simulation.partition] or [simulation.sites], or set test_fraction = 0.25 in "
                "[simulation]",
            )
        )
    if faults:
        raise together(faults)
    if len(files) > _LISTED:
        say(f"and {len(files) - _LISTED} other sites")
    for line in _units_said(plan.study):
        say(line)
    for line in overlaps(plan.study, parts):
        warn(f"{line}.")
    evaluator = open_evaluator(plan.study, files)
    _check_masks(plan.study, evaluator, names)
    return evaluator


def _quietly(line: str) -> None:
    """Say nothing."""


def _parts_of(study: Study, site: SiteConfig, faults: list[PrivetError]) -> list[Part]:
    """Return what a site's files hold, or add what is wrong with them. Missing files were named before."""
    found: list[Part] = []
    for test, paths in ((False, site.train), (True, site.test)):
        present = tuple(path for path in paths if path.is_file())
        only = site.model_copy(update={"test" if test else "train": present})
        try:
            records, _ = load_files(only, study, training=not test)
        except PrivetError as error:
            faults.append(_of_site(error, site.name))
        else:
            if present == paths and paths:
                found.append(part_of(site.name, paths, records, test=test))
    return found


def _units_said(study: Study) -> list[str]:
    """Return what the units of the files are, where epsilon is not for each of them."""
    if study.data.unit is None or not study.private or study.privacy.unit == "patient":
        return []
    return [
        f"units are the values of the column {study.data.unit}; epsilon is per {study.privacy.unit}: it protects one "
        "row, and a unit with several rows less"
    ]


def _open(study: Study, worker: SimulatedWorker, say: Say) -> None:
    """Load a site's records as a round does."""
    data, _ = worker.open(study)
    for report in data.reports:
        say(f"{worker.name}: {report.headline(report.file)}")
    counts = [report.labels for report in data.reports]
    if missing := [label for label in study.task.labels if not any(each.get(label) for each in counts)]:
        say(f"{worker.name}: no training record has the label {', '.join(missing)}; it learns of it from the others")
    if data.training.declared > study.aggregation.largest_count:
        raise StudyError(
            f"site {worker.name}: it declares {data.training.declared} units, the study allows at most "
            f"{study.aggregation.largest_count} (aggregation.largest_count)",
            "raise aggregation.largest_count in the study file, or leave this site out",
        )


def _tried(faults: list[PrivetError], check: Callable[[], object]) -> None:
    try:
        check()
    except PrivetError as error:
        faults.append(error)


def _of_site(error: PrivetError, site: str) -> PrivetError:
    error.message = "\n  ".join(f"site {site}: {line}" for line in error.message.split("\n  "))
    return error


def check_largest_round(plan: Plan, names: Sequence[str]) -> None:
    """Check that the statements of the largest round fit the round log.

    Raises:
        StudyError: They do not fit.
    """
    study = plan.study
    size = cohort_size(study, len(names))
    counts = cells_of(study).names if study.counts else ()
    check_round(names[:size], names[: size * study.rounds] if study.private else (), counts=counts)


def _check_masks(study: Study, evaluator: Evaluator, names: Sequence[str]) -> None:
    """Check that masks for the first round's groups withstand the corrupt sites of the study.

    Raises:
        StudyError: No parameters allow so many corrupt sites.
        TooFewSitesError: Too few sites have one of the ranks.
    """
    if study.secure_aggregation.mode != "masked":
        return
    cohort = tuple(sorted(names)[: cohort_size(study, len(names))])
    opened = RoundOpen(study.document(), 1, os.urandom(16).hex(), "sha256:" + "0" * 64, cohort, b"")
    for group in groups_of(study, 1, cohort):
        check_columns(study, group, corrupt_sites(study, len(cohort)), 1 + study.training.starts_head)
        keys = {name: number.to_bytes(32) for number, name in enumerate(group)}
        parameters_of(study, evaluator.host.spec, opened, keys)
