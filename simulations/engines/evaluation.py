"""Evaluation on the sites' test files: per site, and over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add
from pathlib import Path

from privet.client.release.generation import greedy_answers
from privet.client.training.data import Records, concatenate, load_files
from privet.client.training.features import Feature, encode_records
from privet.client.training.forms import prompt_of, reference_of
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.client.training.scores import Tally, answer_quality
from privet.client.training.tasks import evaluate
from privet.common.study.adapter import Adapter
from privet.common.study.study import Study
from privet.simulations.engines.memory import load_sites

PRIMARY = {
    "text-classification": "accuracy",
    "token-classification": "f1",
    "causal-lm": "perplexity",
    "preference": "accuracy",
}
"""The metric of curves and tables, by task."""


@dataclass(frozen=True)
class Evaluator:
    """The test records of all sites, and the host that scores adapters."""

    study: Study
    host: ModelHost
    records: Mapping[str, Records]

    @cached_property
    def features(self) -> Mapping[str, Sequence[Feature]]:
        """The records as tokens, by site."""
        return {name: encode_records(self.study, self.host.tokenizer, rows) for name, rows in self.records.items()}

    def tallies(self, adapter: Adapter, limit: int | None = None) -> dict[str, Tally]:
        """Return each site's test statistics, on its first `limit` records where a limit is given."""
        with self.host.lock:
            self.host.mount(adapter)
            return {site: evaluate(self.host, self.study, rows[:limit]) for site, rows in self.features.items()}

    def metrics(self, tallies: Mapping[str, Tally]) -> dict[str, float]:
        """Return the metrics over the all-site test."""
        return reduce(add, tallies.values()).metrics(self.study.task.labels)

    def answers(self, adapter: Adapter, each: int) -> dict[str, float]:
        """Return ROUGE-L and BLEU of greedy answers to each site's first `each` test prompts."""
        rows = [row for records in self.records.values() for row in records.rows[:each]]
        with self.host.lock:
            self.host.mount(adapter)
            answers = greedy_answers(self.host, self.study, [prompt_of(row) for row in rows])
        return answer_quality([reference_of(row) for row in rows], answers)


def open_evaluator(study: Study, files: Sequence[Path]) -> Evaluator:
    """Load the test files of all sites that have any.

    Raises:
        StudyError, DataError: A test file does not fit the study.
    """
    records: dict[str, Records] = {}
    sites = load_sites(files)
    for site in sites:
        if site.test:
            records[site.name] = concatenate(load_files(site, study, training=False)[0])
    return Evaluator(study, open_host(study, sites[0].resources, begun=True), records)
