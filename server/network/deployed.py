"""Run a study over Flower's deployment engine, in the coordinator's own process."""

from __future__ import annotations

from collections.abc import Callable

from privet.common.study.adapter import AdapterSpec
from privet.server.network.grid import GridExchange, Owners
from privet.server.network.link import Link
from privet.server.rounds.rounds import Observer, run_study
from privet.server.rounds.run_log import RunLog, Unlogged
from privet.server.rounds.state import RunState
from privet.server.rounds.timing import PATIENT, Timing
from privet.server.rounds.wait import Wait
from privet.server.rounds.watch import Watch

# Seconds between two looks for replies; without a change in the link state, a look takes microseconds.
_POLL = 0.005
# Bytes for everything in an answer but the update.
_REST = 16 * 2**20


def run_over_flower(
    log: RunLog | Unlogged,
    link: Link,
    observe: Observer = lambda statement, adapter: None,
    timing: Timing = PATIENT,
    owners: Owners | None = None,
    tell: Callable[[Wait], None] = lambda wait: None,
    check: Callable[[], None] = lambda: None,
) -> RunState:
    """Run, or resume, a study with the sites that are connected, as a new Flower run.

    A `FleetServer` on the same link state serves the sites, in this process or in another one; it may be restarted
    during the study. Starts no ServerApp process and makes no bundle. With `owners`, a node is heard only in the name
    of the site that it belongs to. `tell` receives what the run waits for. `check` may raise to end it where no round
    is under way.

    Raises:
        As `run_study`.
    """
    with link.run(largest_answer(log.run.load().adapter.spec)) as grid:
        return run_study(log, GridExchange(grid, _POLL, owners), observe, timing, Watch(tell, owners or dict, check))


def largest_answer(spec: AdapterSpec) -> int:
    """Return the largest size, in bytes, of an answer in a study with this adapter layout.

    In every form of an update a value takes at most a word of eight bytes (`privet.common.secagg.quantize`). Everything
    else that sites send, such as shares for each other, is small.
    """
    return 8 * sum(tensor.size for tensor in spec.tensors) + _REST
