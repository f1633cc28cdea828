"""The metrics of a site, for Prometheus."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from privet.client.budget.accounts import Limit
from privet.client.budget.chain import Head
from privet.client.budget.releases import limit_of, open_ledger
from privet.client.network.fleet import Direction
from privet.client.site import SiteConfig
from privet.client.training.meter import PHASES, Meter
from privet.common.clock import now
from privet.common.errors import PrivetError
from privet.common.study.study import Study

_BUCKETS = (0.1, 0.5, 1, 5, 30, 120, 600, 3600)


class SiteMetrics:
    """The metrics of a site, for its own monitoring.

    Under privacy no number here depends on a record, except times: how long a round trains shows about how many records
    were drawn for it. Without privacy there is a training loss as well.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = Histogram(
            "privet_site_answer_seconds", "Time to answer a message", ["kind"], buckets=_BUCKETS, registry=self.registry
        )
        self._up = Gauge("privet_site_connected", "1 while the coordinator accepts this node", registry=self.registry)
        self._retries = Counter(
            "privet_site_retries", "Requests to the coordinator that had to be repeated", registry=self.registry
        )
        self._left = Gauge(
            "privet_site_certificate_seconds", "Seconds until this site's certificate expires", registry=self.registry
        )
        self._bytes = Counter(
            "privet_site_bytes",
            "Bytes of request and response bodies, to and from the coordinator",
            ["direction"],
            registry=self.registry,
        )
        self._epsilon = Gauge(
            "privet_site_epsilon",
            "Epsilon that the dataset has spent; against the coordinator with corrupt sites, where sites shared noise",
            registry=self.registry,
        )
        self._everybody = Gauge(
            "privet_site_epsilon_everybody",
            "Epsilon that the dataset has spent against everybody, by this site's own noise alone",
            registry=self.registry,
        )
        self._counted = Gauge(
            "privet_site_epsilon_counted",
            "Epsilon that counts against the limit, with reserved rounds",
            registry=self.registry,
        )
        self._limit = Gauge(
            "privet_site_epsilon_limit", "Epsilon that the dataset may spend in its lifetime", registry=self.registry
        )
        self._training = Counter(
            "privet_site_training_seconds",
            "Seconds of training: passes (forwards and backwards), clipping, noise",
            ["phase"],
            registry=self.registry,
        )
        self._speed = Gauge(
            "privet_site_tokens_per_second",
            "Tokens in a second of training passes in the last round, to 2 digits; NaN before the first",
            registry=self.registry,
        )
        self._loss = Gauge(
            "privet_site_training_loss",
            "Mean training loss of a record in the last round; NaN under privacy",
            registry=self.registry,
        )
        self._speed.set(math.nan)
        self._loss.set(math.nan)
        for phase in PHASES:
            self._training.labels(phase)
        gpu = Gauge("privet_site_gpu_bytes", "GPU memory that the model takes", registry=self.registry)
        gpu.set_function(lambda: torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)

    def answered(self, kind: str, seconds: float) -> None:
        """Count one answer, by its kind."""
        self._answers.labels(kind).observe(seconds)

    def connected(self, up: bool) -> None:
        """Record whether the coordinator accepts this node."""
        self._up.set(float(up))

    def retried(self) -> None:
        """Count one request that has to be repeated."""
        self._retries.inc()

    def certificate_until(self, time: datetime) -> None:
        """Record when this site's certificate expires."""
        self._left.set_function(lambda: (time - now()).total_seconds())

    def moved(self, direction: Direction, size: int) -> None:
        """Count the body of a request or an answer."""
        self._bytes.labels(direction).inc(size)

    def trained(self, study: Study, took: Meter) -> None:
        """Count what a round's training took.

        Args:
            study: The round's study.
            took: What was counted in this round alone.
        """
        for phase, seconds in took.seconds.items():
            self._training.labels(phase).inc(seconds)
        # Of passes alone: with the noise's time in it, the speed would show how many tokens were drawn. Where none were
        # drawn, it stays as it was.
        passes = took.seconds["passes"]
        if took.tokens and passes:
            self._speed.set(float(f"{took.tokens / passes:.2g}"))
        loss = None if study.private else took.mean_loss
        self._loss.set(math.nan if loss is None else loss)

    def watch_budget(self, site: SiteConfig) -> None:
        """Report the limit and the epsilons of the ledger, where the site file sets a limit."""
        limit = limit_of(site)
        if limit is None:
            return
        self._limit.set(limit.epsilon)
        spent = _Spent(site, limit)
        self._epsilon.set_function(lambda: spent.epsilons()[0])
        self._everybody.set_function(lambda: spent.epsilons()[1])
        self._counted.set_function(lambda: spent.epsilons()[2])


@dataclass
class _Spent:
    """The epsilons of a dataset. They are computed again only if the ledger has new rows."""

    site: SiteConfig
    limit: Limit
    _known: tuple[Head, tuple[float, float, float]] | None = None

    def epsilons(self) -> tuple[float, float, float]:
        """Return the epsilons spent as charged, spent against everybody, and counted; NaN if unknown."""
        try:
            ledger = open_ledger(self.site)
            head = ledger.head
            if self._known is None or self._known[0] != head:
                found = ledger.statement(str(self.site.dataset), self.limit)
                self._known = head, (found.epsilon, found.everybody, found.counted)
            return self._known[1]
        except PrivetError:  # the application log and `privet site doctor` report the reason
            return math.nan, math.nan, math.nan
