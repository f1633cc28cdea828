"""The scan that a site keeps, and whether it admits training on the site's files.

The record is bound to the SHA-256 of each file and holds exact counts, so only its owner may read it. What a study's
coordinator learns is one code, `E_SCAN`, whether there is no scan, an old one, or one that breaks a rule: otherwise a
refusal would say something of the records.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from privet.client.policy.rules import load_policy
from privet.client.scan.kinds import FAULTS
from privet.client.scan.scanning import Scan, sha256_of, sha256_of_form, text_columns
from privet.client.site import SiteConfig
from privet.client.training.data import counted_files
from privet.common.errors import ScanError, StateError, StudyError
from privet.common.files import write_durably
from privet.common.study.reading import validate
from privet.common.study.study import Study

_RECORD = "scan.json"
Role = Literal["train", "test"]
_FILES: Mapping[Role, str] = {"train": "training", "test": "test"}
_COMMAND = "run `privet site scan SITE --study STUDY`"


@dataclass(frozen=True)
class Broken:
    """A rule of the policy that a scan breaks.

    Attributes:
        name: What the rule limits, of `privet.client.scan.kinds.COUNTED`.
        where: The column; empty where the rule is about whole records.
        most: Largest share of records that the rule allows.
        measured: Whether the scan measured it at all.
    """

    name: str
    where: str
    most: float
    measured: bool = True

    def __str__(self) -> str:
        column = f" in the column {self.where}" if self.where else ""
        found = f"more than {self.most:g} of the records" if self.measured else "not measured for all records"
        return f"scan.max_rate {self.name}{column}: {found}"


def record_path(site: SiteConfig) -> Path | None:
    """Return where a site keeps its scan: beside the file of approvals; None where the site file names none."""
    return None if site.approvals is None else site.approvals.with_name(_RECORD)


def save(path: Path, scan: Scan) -> None:
    """Keep a scan in place of an earlier one. Durable on return."""
    write_durably(path, json.dumps(scan.model_dump(mode="json"), indent=1).encode(), 0o600)


def load(path: Path) -> Scan:
    """Read a scan that was kept.

    Raises:
        StateError: Other users may write the file, or it is not a scan.
    """
    fault = "it is not the record of a scan"
    try:
        if path.stat().st_mode & 0o022:
            fault = "other users of this machine can write to it"
        else:
            found: Scan = validate(Scan, json.loads(path.read_bytes()), what="scan")
            return found
    except (OSError, ValueError, RecursionError, StudyError):
        pass  # the texts of these errors may quote the file
    raise StateError(f"the scan {path} cannot be used: {fault}", f"delete the file, then {_COMMAND}")


def broken(
    scan: Scan, rules: Mapping[str, float], columns: Collection[str] | None = None, role: Role = "train"
) -> list[Broken]:
    """Return the rules that the files of a scan break.

    Args:
        scan: The scan.
        rules: Largest share of records by what it limits.
        columns: The columns that count; None: all.
        role: The files that count. Faults of texts are about training, so no test file breaks their rules.
    """
    return [found for name, most in sorted(rules.items()) for found in _broken(scan, name, most, columns, role)]


def _broken(scan: Scan, name: str, most: float, columns: Collection[str] | None, role: Role) -> Iterator[Broken]:
    if name in FAULTS:
        if role == "test":
            return
        texts = scan.texts
        count = getattr(texts, name.replace("-", "_"))
        of = texts.sampled if name == "templated" else texts.records
        # Fail closed: what was not compared may be alike.
        measured = (texts.complete or name in ("empty", "templated")) and (texts.labelled or name != "label-noise")
        if not measured or count > most * of:
            yield Broken(name, "", most, measured)
        return
    found: dict[str, tuple[int, int]] = {}
    for file in scan.files:
        for column, counts in file.columns.items() if file.role == role else ():
            if columns is None or column in columns:
                hits, records = found.get(column, (0, 0))
                found[column] = hits + counts.kinds.get(name, 0), records + counts.records
    for column, (hits, records) in sorted(found.items()):
        if hits > most * records:
            yield Broken(name, column, most)


def check_scan(site: SiteConfig, study: Study, *, files: bool) -> None:
    """Check that a site's policy asks for no scan, or that the kept one admits the files that a study reads.

    Args:
        site: The site file.
        study: The study.
        files: Whether to compare the digests of the files too, which reads them.

    Raises:
        ScanError: There is no scan of these very files and columns, read as they are read now, or it breaks a rule.
        StudyError, StateError: The policy or the record cannot be read or trusted; DataError: a file cannot be read.
    """
    policy = None if site.policy is None else load_policy(site.policy)
    if policy is None or policy.scan is None:
        return
    path = record_path(site)
    if path is None:
        raise ScanError(
            "the policy requires a scan of the data files, but the site file names no file for approvals, beside which "
            "the scan is kept",
            "set `approvals` in the site file to a path, then run `privet site scan SITE --study STUDY`",
        )
    if not path.exists():
        raise ScanError("the policy requires a scan of the data files, and there is none", _COMMAND)
    scan = load(path)
    role: Role = "train" if study.evaluation is None else study.evaluation.files
    _check_covered(site, study, scan, role, digests=files)
    faults = broken(scan, policy.scan.max_rate, text_columns(study), role)
    if faults:
        raise ScanError(
            f"the scan of the {_FILES[role]} files breaks rules of the policy: " + "; ".join(map(str, faults)),
            "mend the records that `privet site scan SITE --study STUDY --exact` names, then scan again; or change "
            "[scan] in the policy",
        )


def _check_covered(site: SiteConfig, study: Study, scan: Scan, role: Role, *, digests: bool) -> None:
    wanted, what = text_columns(study), f"the {_FILES[role]} file"
    kept = {Path(file.path): file for file in scan.files if file.role == role}
    for path in counted_files(site, study).train:
        found = kept.get(path)
        if found is None:
            raise ScanError(f"the kept scan does not cover {what} {path}", _COMMAND)
        if not wanted <= found.columns.keys():
            raise ScanError(f"the kept scan does not cover all columns of {path} that the study reads", _COMMAND)
        if found.form != sha256_of_form(site.form_of(path)):
            raise ScanError(f"the settings in [format] for {what} {path} are not those of the kept scan", _COMMAND)
        if digests and sha256_of(path) != found.sha256:
            raise ScanError(f"{what} {path} has changed since the kept scan", _COMMAND)
