"""The fault matrix of the deployed system: inject faults, and check the study, its charges, its log and its adapter.

    python benchmarks/fault_matrix.py [--quick] [--json] [--seed N] [--save] [--cell TEXT] [--seeds N] [--minutes N]

A coordinator and three or four sites, each a process of its own, run a study of two rounds over TLS on loopback, with
local differential privacy, masked secure aggregation, ledgers, and the round log with its witnesses. One fault is
injected. Processes that die are started again, as a supervisor would, and the study runs to its end. Then all processes
are killed. The files on disk are checked against the six invariants of `faults.checks` and against the expected outcome
of the cell (`faults.cells`).

Processes are forked from one that has loaded all libraries, so recovery times leave out the five seconds that a new
interpreter needs. A killed process does not test power loss: data in the system's file cache survives a kill.

The two cells with a full disk need the right to mount a small disk. Without it they are left out, and a line reports
it.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import statistics
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path

from faults.cells import CELLS, NOTHING, Cell
from faults.play import forks
from faults.run import Result, can_mount, run_cell
from faults.study import write_base
from faults.world import KINDS, make_template
from harness import Bench, Check, start

SEEDS, AT_ONCE = 5, 2
_QUICK = (
    "coordinator: collecting masked updates",
    "coordinator: state durable, round-close not",
    "site: charged, not sent",
    "plain: site charged, around sending",
)
Results = Mapping[str, Sequence[Result]]


@dataclass(frozen=True)
class Arena:
    """The place in which cells run.

    Attributes:
        folder: Holds the consortia.
        templates: By kind: the consortium to copy.
        context: Starts processes.
        bench: Prints failures.
        references: By kind and seed: digest of the adapter of an undisturbed run.
    """

    folder: Path
    templates: Mapping[str, Path]
    context: ForkServerContext
    bench: Bench
    references: dict[tuple[str, int], str] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path, bench: Bench) -> Arena:
        """Make a consortium of each kind, and the process from which all others are forked."""
        base = write_base(folder / "base")
        templates = {name: make_template(folder / f"template-{name}", kind, base) for name, kind in KINDS.items()}
        return cls(folder, templates, forks(templates["three"]), bench)

    def play(self, cell: Cell, seed: int) -> Result:
        """Run one cell with one seed. Its folder is kept if a check failed."""
        place = self.folder / re.sub("[^a-z0-9]+", "-", f"{cell.name} {seed}")
        try:
            made, reference = (self.templates[cell.kind], self.context), self.references.get((cell.kind, seed))
            result, adapter = run_cell(cell, seed, made, place, reference)
        except Exception as error:  # A run that could not be judged must appear in the results.
            wrong = "".join(traceback.format_exception(error))
            result, adapter = Result(seed, "not judged", (wrong,), False, 0, 0, (0, 0), 0, 0), ""
        if cell in NOTHING.values():
            self.references[cell.kind, seed] = adapter
        for line in result.wrong:
            self.bench.say(f"WRONG  {cell.name}, seed {seed}: {line}\n       kept in {place}")
        if not result.wrong:
            shutil.rmtree(place)
        return result


def play_all(arena: Arena, cells: Sequence[Cell], seeds: Sequence[int], at_once: int, minutes: float) -> Results:
    """Run all cells with one seed after another, while the time allows for another seed.

    Undisturbed runs come first, because the adapters of the others are compared with theirs.
    """
    idle = [NOTHING[kind] for kind in sorted({cell.kind for cell in cells})]
    found: dict[str, list[Result]] = {cell.name: [] for cell in (*idle, *cells)}
    began = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        for number, seed in enumerate(seeds):
            if number and (time.monotonic() - began) * (number + 1) / number > 60 * minutes:
                arena.bench.say(f"stopped after {number} seeds: another one would take longer than --minutes allows")
                break
            for group in (idle, cells):
                for cell, result in zip(group, pool.map(lambda cell: arena.play(cell, seed), group), strict=True):  # noqa: B023
                    found[cell.name].append(result)
            arena.bench.say(f"seed {seed}: {len(found)} cells in {time.monotonic() - began:.0f} s so far")
    return found


def line_of(cell: Cell, results: Sequence[Result]) -> str:
    """Return the line of a cell in the table."""
    got = ", ".join(f"{end} x{times}" for end, times in sorted(Counter(each.got for each in results).items()))
    wrong = sum(bool(each.wrong) for each in results)
    seconds = statistics.median(each.seconds for each in results)
    verdict = f"{wrong} WRONG" if wrong else "ok"
    return f"{cell.name:<52} {'/'.join(cell.expects):<12} {got:<26} {verdict:<8} {seconds:5.1f} s"


def percentile(values: Sequence[float | None], share: float) -> float:
    """Return the smallest known value that at least a share of the known values do not exceed; 0 if none is known."""
    known = sorted(value for value in values if value is not None)
    return known[min(int(share * len(known)), len(known) - 1)] if known else 0.0


def report(bench: Bench, cells: Sequence[Cell], found: Results, left_out: Sequence[str]) -> None:
    """Print and save the results."""
    for cell in cells:
        bench.say(line_of(cell, found[cell.name]))
    results = [result for each in found.values() for result in each]
    wrong = [line for result in results for line in result.wrong]
    broken = sum(line[:2] in {f"I{number}" for number in range(1, 7)} for line in wrong)
    fewest = min(map(len, found.values()))
    charged, wasted = (sum(result.charges[at] for result in results) for at in range(2))
    moves, ends = ([pair[at] for result in results for pair in result.recovery] for at in range(2))
    checks = [
        Check("violations of the six invariants", broken, "", "0", broken == 0),
        Check("other outcomes than expected", len(wrong) - broken, "", "0", len(wrong) == broken),
        Check("cells", len(cells), "", "", None),
        Check("seeds for each", fewest, "", ">= 5", None if bench.quick else fewest >= 5),
        Check("faults injected", sum(result.faults for result in results), "", "", None),
        Check("rounds closed", sum(result.closed for result in results), "", "", None),
        Check("rounds aborted", sum(result.aborted for result in results), "", "", None),
        Check("adapters equal to an undisturbed run's", sum(result.compared for result in results), "", "", None),
        Check("charges that no sum holds", 100 * wasted / max(charged, 1), "%", "", None),
        Check("duplicates suppressed", sum(result.duplicates for result in results), "", "", None),
        Check("recovery: kill to next message, median", percentile(moves, 0.5), "s", "", None),
        Check("recovery: kill to next message, 95 %", percentile(moves, 0.95), "s", "", None),
        Check("recovery: kill to end of a round, median", percentile(ends, 0.5), "s", "", None),
        Check("recovery: kill to end of a round, 95 %", percentile(ends, 0.95), "s", "", None),
    ]
    table = [
        {
            "cell": cell.name,
            "what": cell.what,
            "kind": cell.kind,
            "runs": len(found[cell.name]),
            "expected": list(cell.expects),
            "got": dict(Counter(result.got for result in found[cell.name])),
            "wrong": sum(bool(result.wrong) for result in found[cell.name]),
            "results": [asdict(result) for result in found[cell.name]],
        }
        for cell in cells
    ]
    bench.finish(checks, {"cells": table, "left_out": list(left_out)})


def main() -> None:
    """Read the arguments, run the cells, and report."""
    more = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    more.add_argument("--cell", action="append", help="run only cells whose name contains this text; may be repeated")
    more.add_argument("--seeds", type=int, default=SEEDS, help="number of seeds for each cell")
    more.add_argument("--at-once", type=int, default=AT_ONCE, help="number of consortia that run at the same time")
    more.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        help="do not begin a seed that would end later than this many minutes after the start",
    )
    given, rest = more.parse_known_args()
    bench = start("faults", __doc__, rest)
    logging.disable(logging.WARNING)
    wanted = given.cell or ([*_QUICK] if bench.quick else [""])
    chosen = [cell for cell in CELLS if any(text in cell.name for text in wanted)]
    seeds = range(bench.seed, bench.seed + (1 if bench.quick else given.seeds))
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    left_out = [] if can_mount(folder) else [cell.name for cell in chosen if cell.disk]
    for name in left_out:
        bench.say(f"left out, because this process may not mount a disk: {name}")
    cells = [cell for cell in chosen if cell.name not in left_out]
    found = play_all(Arena.make(folder, bench), cells, seeds, given.at_once, given.minutes)
    report(bench, [cell for cell in (*NOTHING.values(), *cells) if cell.name in found], found, left_out)


if __name__ == "__main__":
    main()
