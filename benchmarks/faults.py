"""The fault matrix of the deployed system: what becomes of a study, its charges, its log and its adapter.

    python benchmarks/faults.py [--quick] [--json] [--seed N] [--save] [--cell TEXT] [--seeds N] [--at-once N]

A coordinator and three or four sites, each a process of its own, run a study of two rounds over TLS on loopback: local
DP, masked secure aggregation, ledgers, and the round log with its witnesses. One thing befalls them; what died is
started again, as a supervisor would; the study goes on to its end. Then everything is killed, and what lies on disk is
held against the six invariants of `fault_checks` and against what the cell expects (`fault_cells`).

Processes are forked from one that has loaded all libraries: recovery times leave out the five seconds that a new
interpreter takes. A killed process does not test power loss: what the system holds for the disk survives it.

Needs the right to mount a small disk for the two cells with a full one; without it they are left out, and it says so.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.context import ForkServerContext
from pathlib import Path

from fault_cells import CELLS, NOTHING, Cell
from fault_play import forks
from fault_run import Result, can_mount, run_cell
from fault_world import KINDS, make_base, make_template
from harness import Bench, Check, start

SEEDS, AT_ONCE = 5, 2
_QUICK = (
    "coordinator: collecting masked updates",
    "coordinator: state durable, round-close not",
    "site: charged, not sent",
    "plain: site charged, around sending",
)
Results = Mapping[str, Sequence[Result]]


def play_all(cells: Sequence[Cell], seeds: Sequence[int], folder: Path, at_once: int, bench: Bench) -> Results:
    """Play cells with seeds, `at_once` at a time; undisturbed runs first, as the others are held against them."""
    base = make_base(folder)
    templates = {name: make_template(folder / f"template-{name}", kind, base) for name, kind in KINDS.items()}
    context = forks(templates["three"])
    references: dict[tuple[str, int], str] = {}
    found: dict[str, list[Result]] = {}

    def one(cell: Cell, seed: int) -> Result:
        place = folder / f"{cell.name} {seed}".replace(" ", "-").replace(":", "").replace("/", "-")
        result, adapter = attempt(cell, seed, (templates[cell.kind], context), place, references)
        if cell in NOTHING.values():
            references[cell.kind, seed] = adapter
        for line in result.wrong:
            bench.say(f"WRONG  {cell.name}, seed {seed}: {line}\n       kept in {place}")
        if not result.wrong:
            shutil.rmtree(place)
        return result

    kinds = sorted({cell.kind for cell in cells})
    with ThreadPoolExecutor(at_once) as pool:
        for group in ([NOTHING[kind] for kind in kinds], cells):
            jobs = [(cell, pool.submit(one, cell, seed)) for cell in group for seed in seeds]
            for cell, job in jobs:
                results = found.setdefault(cell.name, [])
                results.append(job.result())
                if len(results) == len(seeds):
                    bench.say(line_of(cell, results))
    return found


def attempt(
    cell: Cell,
    seed: int,
    made: tuple[Path, ForkServerContext],
    place: Path,
    references: Mapping[tuple[str, int], str],
) -> tuple[Result, str]:
    """Play one; whatever goes wrong in the harness itself is a failure of the cell, never a pass."""
    try:
        return run_cell(cell, seed, made, place, references.get((cell.kind, seed)))
    except Exception as error:  # a run that could not be judged must not be lost among those that could
        wrong = "".join(traceback.format_exception(error))
        return Result(seed, "not judged", (wrong,), False, 0, 0, (0, 0), 0, 0), ""


def line_of(cell: Cell, results: Sequence[Result]) -> str:
    """Return a cell's line of the table."""
    got = ", ".join(f"{end} x{times}" for end, times in sorted(Counter(each.got for each in results).items()))
    wrong = sum(bool(each.wrong) for each in results)
    seconds = statistics.median(each.seconds for each in results)
    verdict = f"{wrong} WRONG" if wrong else "ok"
    return f"{cell.name:<52} {'/'.join(cell.expects):<12} {got:<26} {verdict:<8} {seconds:5.1f} s"


def percentile(values: Sequence[float | None], share: float) -> float:
    """Return the value that a share of those that are known do not exceed; 0 of nothing."""
    known = sorted(value for value in values if value is not None)
    return known[min(int(share * len(known)), len(known) - 1)] if known else 0.0


def report(bench: Bench, cells: Sequence[Cell], found: Results, left_out: Sequence[str]) -> None:
    """Print and save what came of it."""
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
    """Read the arguments, play and report."""
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--cell", action="append", help="only cells whose name holds this text; may be repeated")
    more.add_argument("--seeds", type=int, default=SEEDS, help="how many seeds for each cell")
    more.add_argument("--at-once", type=int, default=AT_ONCE, help="how many consortia to play at the same time")
    given, rest = more.parse_known_args()
    bench = start("faults", __doc__, rest)
    logging.disable(logging.WARNING)
    wanted = given.cell or ([*_QUICK] if bench.quick else [""])
    chosen = [cell for cell in CELLS if any(text in cell.name for text in wanted)]
    seeds = range(bench.seed, bench.seed + (1 if bench.quick else given.seeds))
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    left_out = [] if can_mount(folder) else [cell.name for cell in chosen if cell.disk]
    for name in left_out:
        bench.say(f"left out, as no disk may be mounted here: {name}")
    cells = [cell for cell in chosen if cell.name not in left_out]
    found = play_all(cells, seeds, folder, given.at_once, bench)
    report(bench, [*(NOTHING[kind] for kind in sorted({cell.kind for cell in cells})), *cells], found, left_out)


if __name__ == "__main__":
    main()
