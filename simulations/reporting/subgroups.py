"""Evaluate the released adapter on groups of test records: by label, by length, and by columns of the test files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from privet.client.training.data import Records, concatenate
from privet.client.training.features import encode_records
from privet.client.training.model import open_host
from privet.client.training.preference import judge
from privet.common.progress import Tell, silent
from privet.common.study.study import Study
from privet.server.rounds.state import RunDirectory
from privet.simulations.attacks.arms import read_sites
from privet.simulations.data.federation import plan_of_run, site_files

Groups = Mapping[str, Sequence[tuple[str, int, float]]]
"""By kind of group: name, records and fraction right of each group (for token tasks, the mean over records)."""

_LENGTHS = ("shortest third", "middle third", "longest third")
_EMPTY = "(not given)"
# A column with more values than this names individuals rather than groups.
_MOST = 30


def evaluate_groups(run: Path, columns: Sequence[str] = (), tell: Tell = silent) -> Groups:
    """Evaluate the adapter of a simulated run on the test records of all sites, and group the results.

    Args:
        run: The run directory.
        columns: Columns of the test files to group by, besides labels and lengths.
        tell: Receives what is being done.

    Raises:
        StateError: `run` is not a run directory.
        PrivetError: The files or the base of the run are missing, or a test file lacks a column.
    """
    directory = RunDirectory.open(run)
    study, plan, files = directory.study, plan_of_run(run, directory.study), site_files(run)
    test = read_sites(files, study, part="test")
    if not test:
        return {}
    tell("loading the base", 0, None)
    records = concatenate([test[site] for site in sorted(test)])
    host = open_host(study, plan.simulation.resources, begun=True)
    features = encode_records(study, host.tokenizer, records)
    tell(f"evaluating {len(records)} test records", 0, None)
    with host.lock:
        host.mount(directory.load().adapter)
        right = [found.correct for found in judge(host, features)]
    found: dict[str, Sequence[tuple[str, int, float]]] = {}
    if study.task.kind == "text-classification":
        found["label"] = grouped([study.task.labels[row["label"]] for row in records.rows], right)
    found["length"] = grouped(thirds([len(feature.ids) for feature in features]), right, _LENGTHS)
    for column in columns:
        values = [value.strip() or _EMPTY for value in read_column(files, study, column)]
        many = len(set(values))
        found[column] = grouped(values, right) if many <= _MOST else ()
    return found


def grouped(
    names: Sequence[str], right: Sequence[float], order: Sequence[str] | None = None
) -> list[tuple[str, int, float]]:
    """Return name, size and mean of each group, in the given order or sorted by name."""
    found = []
    for name in order or sorted(set(names)):
        values = [value for own, value in zip(names, right, strict=True) if own == name]
        if values:
            found.append((name, len(values), float(np.mean(values))))
    return found


def thirds(lengths: Sequence[int]) -> list[str]:
    """Return for each length the third of all lengths that it is in. Equal lengths are in the same third."""
    low, high = np.quantile(lengths, [1 / 3, 2 / 3])
    return [_LENGTHS[0 if length <= low else 1 if length <= high else 2] for length in lengths]


def read_column(files: Sequence[Path], study: Study, column: str) -> list[str]:
    """Return the value of a column for each test record of all sites, in the order of reading.

    Raises:
        DataError: A test file lacks the column.
    """
    # The reader returns the unit of each record that it keeps, so the column is read as if it were the unit of privacy.
    data = study.data.model_copy(update={"unit": column})
    found: dict[str, Records] = read_sites(files, study.model_copy(update={"data": data}), part="test")
    return [unit for site in sorted(found) for unit in found[site].units]
