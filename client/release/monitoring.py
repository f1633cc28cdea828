"""Where a site keeps the counts of its adapters, and how they are published for Prometheus.

With a directory, each adapter has three files in it, named after the adapter's run::

    NAME.counts.json     the state of the counts, for the next process; its owner's alone
    NAME.reference.json  what the counts are compared with, made by this site from a file of its own
    NAME.prom            what is published, for the textfile collector of Prometheus's node exporter

Without one, the counts end with the process, and nothing is compared.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from pydantic import ValidationError

from privet.client.release.counts import (
    CHARACTERS,
    CONFIDENCE,
    LEAST,
    PARTS,
    TOKENS,
    Counts,
    Part,
    State,
    classes_of,
)
from privet.client.release.opened import Release
from privet.common.canonical import canonical_json, digest
from privet.common.errors import PrivetError, StateError
from privet.common.files import make_directory, require_free, write_durably, write_new

SECONDS = 30.0
"""Between two writings of the counts, while an endpoint serves."""
_ENDS: Mapping[Part, tuple[float, ...]] = {"confidence": CONFIDENCE, "characters": CHARACTERS, "tokens": TOKENS}


class Monitor:
    """The counts of some adapters, by the names of their runs."""

    def __init__(self, adapters: Mapping[str, tuple[str, tuple[str, ...]]], directory: Path | None = None) -> None:
        """Begin to count, or go on from a directory.

        Args:
            adapters: Digest of each adapter, and the classes that it predicts.
            directory: Holds the files; None keeps nothing.

        Raises:
            StateError: The directory is in use or cannot be read or written; or its counts are of another adapter.
        """
        self._directory = directory
        self._locks: list[int] = []
        self._saving, self._left = threading.Lock(), False
        self.registry = CollectorRegistry()
        if directory is not None:
            make_directory(directory)
        try:
            self._counts = {name: self._opened(name, *adapter) for name, adapter in adapters.items()}
        except BaseException:
            self._unlock()
            raise
        self.registry.register(_Published(self._counts))

    @classmethod
    def of(cls, releases: Mapping[str, Release], directory: Path | None = None, base: str = "") -> Monitor:
        """Return the counts of releases, and of their base by a name that is given. Raises as the constructor."""
        counted = {name: (each.adapter.digest, classes_of(each.study)) for name, each in releases.items()}
        if base:
            study = next(iter(releases.values())).study
            counted[base] = digest(canonical_json(dict(study.model.sha256))), classes_of(study)
        return cls(counted, directory)

    def __getitem__(self, name: str) -> Counts:
        """Return the counts of one adapter."""
        return self._counts[name]

    def save(self) -> None:
        """Write counts and published figures.

        Raises:
            StateError: They cannot be written.
        """
        # One thread at a time: an older state must not be written over a newer one, nor after the directory was left.
        with self._saving:
            if self._directory is not None and not self._left:
                self._write(self._directory)

    def _write(self, directory: Path) -> None:
        for name, counts in self._counts.items():
            try:
                state = counts.state().model_dump_json().encode()
                write_durably(directory / f"{name}.counts.json", state + b"\n", 0o600)
                own = CollectorRegistry()
                own.register(_Published({name: counts}))
                write_durably(directory / f"{name}.prom", generate_latest(own), 0o644)
            except OSError as error:
                raise StateError(
                    f"the counts in {directory} cannot be written ({error.strerror})",
                    "check the disk space and the permissions; answers are given all the same",
                ) from None

    @contextmanager
    def kept(self, *, always: bool = True) -> Iterator[None]:
        """Save the counts when the block ends, and let other processes use the directory.

        Args:
            always: Whether to save them also if the block fails. Where its results are then lost and computed again,
                they would count twice.
        """
        done = always
        try:
            yield
            done = True
        finally:
            try:
                if done:
                    self.save()
            finally:
                with self._saving:
                    self._left = True
                    self._unlock()

    def _opened(self, name: str, adapter: str, classes: tuple[str, ...]) -> Counts:
        fresh = State.new(adapter, classes)
        if self._directory is None:
            return Counts(fresh)
        self._locks.append(_locked(self._directory, name))
        kept = _read(self._directory / f"{name}.counts.json", fresh)
        reference = _read(self._directory / f"{name}.reference.json", fresh)
        return Counts(kept or fresh, None if reference is None else reference.total)

    def _unlock(self) -> None:
        while self._locks:
            os.close(self._locks.pop())


def reference_file(directory: Path, name: str) -> Path:
    """Return the file for a new reference of an adapter. Raises StateError: there is one already."""
    path = directory / f"{name}.reference.json"
    require_free(path, f"move it away first: `mv {path} {path}.old`")
    return path


def keep_reference(directory: Path, name: str, counts: Counts) -> Path:
    """Keep counts of a file of the site's own as the reference of an adapter, and return the file.

    Raises:
        StateError: There is one already, or it cannot be written; or the file had no input that was answered.
    """
    path, state = reference_file(directory, name), counts.state()
    if not state.total.inputs:
        raise StateError(
            "expected a file with inputs that the adapter answers, found none", "choose another file with --data"
        )
    make_directory(directory)
    write_new(path, state.model_dump_json().encode() + b"\n")
    return path


def _locked(directory: Path, name: str) -> int:
    try:
        descriptor = os.open(directory / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateError(
            f"the directory {directory} cannot be written ({error.strerror})", "choose another one with --counts"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StateError(
            f"another process counts the answers of {name} in {directory}",
            "wait until it has ended, or choose another directory with --counts",
        ) from None
    return descriptor


def _read(path: Path, fresh: State) -> State | None:
    """Return the counts in a file, which must be of the same adapter; None if there is no file."""
    try:
        found = State.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StateError(
            f"{path} cannot be read ({type(error).__name__})", f"move it away: `mv {path} {path}.old`"
        ) from None
    if (found.adapter, found.classes) != (fresh.adapter, fresh.classes):
        raise StateError(
            f"{path} counts the answers of another adapter: expected {fresh.adapter}, found {found.adapter}",
            f"move it away, and the counting begins anew: `mv {path} {path}.old`",
        )
    return found


class _Published:
    """The published figures, as Prometheus collects them."""

    def __init__(self, counts: Mapping[str, Counts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics. Counts of classes and intervals are rounded down to multiples of `LEAST`."""
        inputs = CounterMetricFamily("privet_model_inputs", "Inputs that were answered", labels=["model"])
        refused = CounterMetricFamily(
            "privet_model_refused", "Inputs that were not answered, by reason", labels=["model", "reason"]
        )
        classes = CounterMetricFamily(
            "privet_model_predictions", "Predictions by class, in steps of 10", labels=["model", "class"]
        )
        histograms: dict[Part, HistogramMetricFamily] = {
            "confidence": HistogramMetricFamily(
                "privet_model_confidence", "Probability of predicted classes, in steps of 10", labels=["model"]
            ),
            "characters": HistogramMetricFamily(
                "privet_model_input_characters", "Length of inputs in characters, in steps of 10", labels=["model"]
            ),
            "tokens": HistogramMetricFamily(
                "privet_model_answer_tokens", "Length of answers in tokens, in steps of 10", labels=["model"]
            ),
        }
        recent = GaugeMetricFamily(
            "privet_model_recent_inputs", "Newest inputs, over which drift is measured", labels=["model"]
        )
        drift = GaugeMetricFamily(
            "privet_model_drift",
            "Drift of the newest inputs from the reference: psi (population stability index) and js (Jensen-Shannon)",
            labels=["model", "of", "measure"],
        )
        chance = GaugeMetricFamily(
            "privet_model_drift_by_chance",
            "Population stability index that chance alone exceeds once in 1,000 windows",
            labels=["model", "of"],
        )
        for name, counts in self._counts.items():
            state = counts.state()
            shown = state.shown
            inputs.add_metric([name], shown.tally.inputs)
            for reason, count in state.refused.items():
                refused.add_metric([name, reason], count)
            for label, count in zip(state.classes, shown.tally.classes, strict=True):
                classes.add_metric([name, label], _rounded(count))
            for part, family in histograms.items():
                family.add_metric([name], _buckets(shown.tally.of(part), _ENDS[part]), None)
            recent.add_metric([name], shown.recent)
            for part in PARTS:
                if part in shown.drift:
                    stability, divergence, by_chance = shown.drift[part]
                    drift.add_metric([name, part, "psi"], stability)
                    drift.add_metric([name, part, "js"], divergence)
                    chance.add_metric([name, part], by_chance)
        yield from (inputs, refused, classes, *histograms.values(), recent, drift, chance)


def _rounded(count: int) -> int:
    return count - count % LEAST


def _buckets(counts: list[int], ends: tuple[float, ...]) -> list[tuple[str, float]]:
    """Return cumulative buckets, as Prometheus wants them."""
    taken, found = 0, []
    for end, count in zip((*map(str, map(float, ends)), "+Inf"), counts, strict=True):
        taken += _rounded(count)
        found.append((end, float(taken)))
    return found


def saving(monitor: Monitor) -> float:
    """Save the counts and return the seconds until the next time. What fails is tried again then."""
    with suppress(PrivetError):
        monitor.save()
    return SECONDS
