"""`privet site serve`: the resident process of a site, with its lock, its application log and its metrics."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment
from privet.client.network.fleet import FleetLink, connected
from privet.client.network.following import following
from privet.client.network.lock import content_of, exclusive, lock_of
from privet.client.network.node import Answer, Connection, NodeState
from privet.client.network.opening import open_member
from privet.client.network.renewal import Renewal, renewing
from privet.client.network.telemetry import SiteMetrics
from privet.client.rounds.answers import answer
from privet.client.rounds.diary import ROUNDS, Diary
from privet.client.rounds.worker import Worker
from privet.client.site import JOINED, CoordinatorSection
from privet.client.trainer.confinement import hide_memory
from privet.client.trainer.opening import forget
from privet.common.clock import now
from privet.common.doors.files import raise_limit
from privet.common.doors.metrics import MetricsServer
from privet.common.errors import StateError, StudyError
from privet.common.jsonlog import log_as_json
from privet.common.pki.keyfile import read_node_key
from privet.common.refusals import sparing


def serve_site(file: Path) -> None:
    """Take part in the coordinator's studies until stopped, as the site file configures it.

    Raises:
        StudyError: The site file is not valid, or names no coordinator.
        StateError: Another process serves this site, or a key or certificate cannot be read.
    """
    log_as_json()
    raise_limit()
    serve_worker(open_member(file.resolve()), file)


def serve_worker(worker: Worker, file: Path) -> None:
    """Serve the site of a worker. `file` is its site file. Raises as `serve_site`."""
    config, lock = worker.site.config, lock_of(worker.site.config)
    if config.coordinator is None or lock is None:
        hint = "add a [coordinator] table with address, root and key to the site file"
        raise StudyError(f"the site file {file.name} has no [coordinator] table, so the site cannot connect", hint)
    # The secrets of a masked round are in one process: a second one would receive some of its messages without them.
    with exclusive(lock, content_of(config)):
        metrics = SiteMetrics()
        metrics.watch_budget(config)
        diary = Diary(config.name, config.dataset or config.name)
        worker.trained, worker.charged, worker.lost = metrics.trained, diary.charged, diary.lost
        if config.coordinator.metrics_port:
            MetricsServer(config.coordinator.metrics_port, metrics.registry)
        _end_on_signals()
        if config.resources.trainer != "inside":
            hide_memory()
        if config.resources.slurm is None:
            forget(config)  # a job of a former site file, or one that could not be cancelled
        with (
            closing(worker),
            _renewing(file.resolve().parent, metrics),
            following(file.resolve(), config),
            sparing(ROUNDS),
        ):
            answers: Answer = lambda read: answer(read, lambda: worker, diary)  # noqa: E731 - the type names it
            serve_coordinator(config.coordinator, answers, metrics, diary.arrived)


@contextmanager
def _renewing(directory: Path, metrics: SiteMetrics) -> Iterator[None]:
    """Renew the certificate while the block runs, if the site has joined a consortium."""
    if not (directory / JOINED).exists():
        yield
        return
    with renewing(Renewal(ConsortiumClient(Enrolment(directory), now), metrics.certificate_until)):
        yield


def serve_coordinator(
    coordinator: CoordinatorSection, answers: Answer, metrics: SiteMetrics, arrived: Callable[[], None]
) -> None:
    """Connect to a coordinator and answer its messages until the process is stopped.

    Args:
        coordinator: Where it is.
        answers: Answers a message.
        metrics: Counts events.
        arrived: Called when an answer has arrived.
    """
    try:
        root = coordinator.root.read_bytes()
        root.decode("ascii")
    except (OSError, ValueError) as error:
        hint = "get it from the coordinator's operator, and compare its fingerprint by telephone"
        what = f"coordinator.root: the root certificate {coordinator.root} cannot be read ({type(error).__name__})"
        raise StateError(what, hint) from error
    key = read_node_key(coordinator.key)
    with connected(FleetLink(coordinator.address, root, key, coordinator.largest_message, metrics.moved)) as link:
        Connection(link, answers, NodeState(coordinator.key.with_suffix(".state")), metrics, arrived=arrived).serve()


def _end_on_signals() -> None:
    """On SIGTERM, sign off and end. The message in progress is on disk, and the next start answers it."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
