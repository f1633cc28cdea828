"""A study over Flower's deployment engine, run in the coordinator's own process."""

from __future__ import annotations

from privet.common.study.adapter import AdapterSpec
from privet.server.network.grid import GridExchange
from privet.server.network.link import Link
from privet.server.rounds.rounds import Observer, Timing, run_study
from privet.server.rounds.run_log import RunLog
from privet.server.rounds.state import RunDirectory, RunState

# Seconds between two looks for replies; one look is a few queries.
_POLL = 0.02
_PATIENT = Timing()
_REST = 16 * 2**20


def run_over_flower(
    run: RunDirectory,
    link: Link,
    observe: Observer = lambda statement, adapter: None,
    timing: Timing = _PATIENT,
    record: RunLog | None = None,
) -> RunState:
    """Run, or resume, a study with the sites that are connected, as a new run of Flower's.

    The sites are served by a `FleetServer` on the same link state, here or in another process; it may stop and come
    back meanwhile. No ServerApp process is started and no bundle is made.

    Raises:
        As `run_study`.
    """
    with link.run(largest_answer(run.load().adapter.spec)) as grid:
        return run_study(run, GridExchange(grid, _POLL), observe, timing, record)


def largest_answer(spec: AdapterSpec) -> int:
    """Return the most bytes that an answer in a study with such an adapter may have.

    In no form of an update a value takes more than a word of eight bytes (`privet.common.secagg.quantize`). All else
    that sites say, such as shares for each other, is small.
    """
    return 8 * sum(tensor.size for tensor in spec.tensors) + _REST
