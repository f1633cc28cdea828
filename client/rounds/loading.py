"""A site's records under one study: read, checked, split and encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privet.client.site import SiteConfig, rounded_count
from privet.client.training.data import DataReport, Records, concatenate, load_records, split_records
from privet.client.training.model import ModelHost
from privet.client.training.tasks import Feature, encode_records
from privet.client.training.train import TrainingSet
from privet.common.errors import DataError, RefusedError
from privet.common.study.study import Study


@dataclass(frozen=True)
class SiteData:
    """A site's files under one study: features ready to train on, and what was dropped on the way."""

    training: TrainingSet
    validation: Sequence[Feature]
    validation_units: Sequence[Sequence[int]]
    reports: Sequence[DataReport]


def load_data(site: SiteConfig, study: Study, host: ModelHost, split_key: bytes, *, distinct: bool) -> SiteData:
    """Read a site's files for a study.

    Args:
        site: The site, whose training files are read.
        study: The study, whose data contract they must fit.
        host: Its model, which has the tokenizer.
        split_key: Decides which units are held out for validation.
        distinct: Whether equal names of units in two files are two units.

    Raises:
        StudyError, DataError: The files do not fit the study, or no record is left to train on.
        RefusedError: The study's delta is too large for so few units.
    """
    parts, reports = zip(*(load_records(path, study) for path in site.train), strict=True)
    records: Records = concatenate(parts, distinct=distinct)
    training, validation = split_records(records, study.data.validation_fraction, split_key)
    if not len(training):
        raise DataError(
            f"site {site.name}: no training records are left after the validation split",
            "use more data, or a smaller data.validation_fraction",
        )
    units = _units_of(study, training)
    declared = site.declared_count or rounded_count(len(units))
    check_delta(study, declared)
    return SiteData(
        training=TrainingSet(encode_records(study, host.tokenizer, training), units, declared),
        validation=encode_records(study, host.tokenizer, validation),
        validation_units=_units_of(study, validation),
        reports=reports,
    )


def _units_of(study: Study, records: Records) -> list[list[int]]:
    """Return the rows of each unit of privacy."""
    if study.privacy.unit == "patient":
        return list(records.by_unit().values())
    return [[row] for row in range(len(records))]


def check_delta(study: Study, units: int) -> None:
    """Refuse a delta at which publishing one unit outright would be within the promise.

    Raises:
        RefusedError: Delta times the units that the site declares is 1 or more.
    """
    if study.privacy.delta is not None and study.privacy.delta * units >= 1:
        raise RefusedError(
            f"privacy.delta: {study.privacy.delta} is not below 1/n for this site's declared {units} units",
            "lower privacy.delta",
        )
