"""A site's records under one study: read, checked, split and encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from privet.client.budget.withdrawals import Withdrawn
from privet.client.site import SiteConfig, rounded_count
from privet.client.training.canaries import Planting
from privet.client.training.counts import Countable, countable
from privet.client.training.data import DataReport, Records, counted_files, site_records, split_records
from privet.client.training.features import Feature, encode_records
from privet.client.training.host import ModelHost
from privet.client.training.train import TrainingSet
from privet.common.canonical import canonical_json, digest
from privet.common.errors import DataError, RefusedError
from privet.common.masking.noise_shares import band_in
from privet.common.study.study import Study


@dataclass(frozen=True)
class SiteData:
    """A site's files under one study: features ready for training, and reports of what was dropped.

    Attributes:
        names: With correlated noise, a digest of the names of units that follow from their rows: of records; else "".
        counts: The records as a study of kind statistics counts them; None for other kinds.
    """

    training: TrainingSet
    validation: Sequence[Feature]
    validation_units: Sequence[Sequence[int]]
    reports: Sequence[DataReport]
    names: str = ""
    counts: Countable | None = None


def load_data(
    site: SiteConfig,
    study: Study,
    host: ModelHost,
    split_key: bytes,
    *,
    distinct: bool,
    planting: Planting | None = None,
    withdrawn: Callable[[SiteConfig], Withdrawn | None] | None = None,
) -> SiteData:
    """Read a site's files for a study.

    Args:
        site: The site, whose training files are read.
        study: The study. The files must fit its data contract.
        host: Its model, with the tokenizer.
        split_key: Decides which units are held out for validation.
        distinct: Whether equal names of units in two files are two units.
        planting: The canaries that are trained with. They are units as others are; the declared number stays.
        withdrawn: Returns who is left out. None: who is, by the site's own marks.

    Raises:
        StudyError, DataError: The files do not fit the study, two spellings may be one patient and the site file does
            not say which rule holds, or no training record is left.
        RefusedError: The study's delta is too large for so few units.
    """
    records, reports = site_records(counted_files(site, study), study, distinct=distinct, withdrawn=withdrawn)
    if study.kind == "statistics":
        counts = countable(study, host.tokenizer, records)
        declared = site.declared_count or rounded_count(len(counts.units))
        check_delta(study, declared)
        return SiteData(TrainingSet((), counts.units, declared), (), (), reports, counts=counts)
    training, validation = split_records(records, study.data.validation_fraction, split_key)
    if not len(training):
        raise DataError(
            f"site {site.name}: no training records are left after the validation split",
            "add training records, or lower data.validation_fraction in the study",
        )
    # Before canaries enter: the number is public, and must not tell how many the coins include.
    declared = site.declared_count or rounded_count(len(_units_of(study, training)))
    if planting is not None:
        training = planting.planted(study, host.tokenizer, training)
    units, classes = _units_of(study, training), _classes_of(study, training)
    check_delta(study, declared)
    # What one record does to a private study must not show, not even in a refusal.
    features, held_out = (
        encode_records(study, host.tokenizer, part, blank=study.private) for part in (training, validation)
    )
    return SiteData(
        training=TrainingSet(features, units, declared, classes),
        validation=held_out,
        validation_units=_units_of(study, validation),
        reports=reports,
        names=_names_of(study, training),
    )


def _units_of(study: Study, records: Records) -> list[list[int]]:
    """Return the rows of each unit of privacy."""
    if study.privacy.unit == "patient":
        return list(records.by_unit().values())
    return [[row] for row in range(len(records))]


def _classes_of(study: Study, records: Records) -> list[int]:
    """Return the class of each unit of privacy, by its own name alone; empty without correlated noise."""
    band = band_in(study)
    if band is None:
        return []
    names = records.by_unit() if study.privacy.unit == "patient" else records.units
    return [band.class_of(study.seed, name) for name in names]


def _names_of(study: Study, records: Records) -> str:
    if study.privacy.band is None or study.privacy.unit == "patient":
        return ""
    return digest(canonical_json({"units": sorted(records.units)}))


def check_delta(study: Study, units: int) -> None:
    """Refuse a delta so large that a release of one whole unit would keep the guarantee.

    Raises:
        RefusedError: Delta times the number of declared units is 1 or more.
    """
    if study.privacy.delta is not None and study.privacy.delta * units >= 1:
        raise RefusedError(
            f"privacy.delta: expected a value below 1/n = {1 / units:.2g} for this site's {units} declared units, "
            f"found {study.privacy.delta:g}",
            "lower privacy.delta in the study",
        )
