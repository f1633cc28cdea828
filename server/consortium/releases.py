"""What the coordinator gives its members of finished runs: the files of a release, and the checkpoint that covers them.

A member checks all of it by itself, against the round log. Here it is only decided who is given what.
"""

from __future__ import annotations

import base64
import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from privet.common.audit.bundle import CHECKPOINT
from privet.common.audit.egress import check_kept
from privet.common.audit.release import ADAPTER
from privet.common.canonical import file_sha256
from privet.common.errors import RefusedError
from privet.common.pki.enrolment import PART_BYTES, ReleasedReply, ReleasedRequest
from privet.common.study.terms import check_receiver, check_until
from privet.server.rounds.run_log import RELEASE
from privet.server.rounds.state import RunDirectory


def accepted(directory: Path) -> bytes:
    """Return the note of the newest checkpoint that a quorum cosigned; empty before the first."""
    try:
        return (directory / "public" / CHECKPOINT).read_bytes()
    except OSError:
        return b""


def released_part(directory: Path, site: str, asked: ReleasedRequest, now: datetime) -> ReleasedReply:
    """Return a part of a file that a run released.

    Raises:
        RefusedError: There is no such file, or the study is not for this site. Both have one text: a site learns
            nothing of a study that names others. Or the terms of the release or its gate do not admit it.
    """
    refused = RefusedError(
        f"run {asked.run} released no file {asked.file} for site {site}",
        "list what there is: `privet site adapters SITE`",
    )
    # Names have no slashes, and both directories hold what this coordinator wrote.
    folder = directory / "runs" / asked.run
    if not folder.is_dir():
        raise refused
    run = RunDirectory.open(folder)
    if run.withdrawn is not None or (run.study.cohort.sites and site not in run.study.cohort.sites):
        raise refused
    _check_terms(run, site, now)
    if run.study.gate is not None:
        check_kept(run.study, _digest(folder / RELEASE / ADAPTER), folder / RELEASE)
    try:
        return part_of(folder / RELEASE / asked.file, asked.first)
    except OSError:
        raise refused from None


def part_of(path: Path, first: int) -> ReleasedReply:
    """Return a part of a file, from byte `first` on. Raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(min(first, size))
        part = file.read(PART_BYTES)
    return ReleasedReply(part=base64.b64encode(part).decode("ascii"), size=size)


def _digest(file: Path) -> str:
    """Return the digest of a file; empty if there is none. It is asked for with each part of a large file."""
    try:
        found = file.stat()
    except OSError:
        return ""
    return _hashed(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=16)
def _hashed(file: Path, time: int, size: int) -> str:
    return f"sha256:{file_sha256(file)}"


def _check_terms(run: RunDirectory, site: str, now: datetime) -> None:
    terms = run.study.release
    if terms is None:
        return
    check_until(run.study, now)
    if terms.to == "participants":
        # Asked for each part of a large file, so no more rounds are read than it takes to find the site.
        rounds = (json.loads(file.read_bytes()) for file in (run.path / "rounds").glob("*.json"))
        check_receiver(run.study, site, (site,) if any(site in each["survivors"] for each in rounds) else ())
