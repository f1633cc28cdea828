"""What the coordinator tells members of its runs: the study of each, and how far it is.

A site can so look at a study before it approves it. It computes the study's digest itself, and compares it with the
round log.
"""

from __future__ import annotations

from pathlib import Path

from privet.common.canonical import canonical_json
from privet.common.errors import PrivetError
from privet.common.pki.enrolment import Proposal
from privet.server.rounds.state import RunDirectory

_MOST = 100


def proposed(directory: Path, site: str, most_bytes: int) -> tuple[Proposal, ...]:
    """Return the runs that a site may take part in, newest first, as many as fit into `most_bytes` bytes.

    A study that names its sites is shown to these alone. A run that cannot be read is left out: it must not hide the
    others.
    """
    files = (directory / "runs").glob("*/study.json")
    found: list[Proposal] = []
    for file in sorted(files, key=lambda each: (-each.stat().st_mtime, each.parent.name)):
        try:
            run = RunDirectory.open(file.parent)
            if run.study.cohort.sites and site not in run.study.cohort.sites:
                continue
            number, ended = run.standing()
            text = canonical_json(run.study.document()).decode()
            over = ended or run.withdrawn is not None
            proposal = Proposal(run=file.parent.name, study=text, round=number, ended=over)
        except (PrivetError, ValueError):  # also a directory that has no run's name, as one that is being made
            continue
        most_bytes -= len(text)
        if most_bytes < 0 or len(found) == _MOST:
            break
        found.append(proposal)
    return tuple(found)
