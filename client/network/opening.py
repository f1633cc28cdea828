"""The worker of a site that has joined a consortium: its copy of the round log comes from the consortium service."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from privet.client.network.consortium import ConsortiumClient
from privet.client.network.enrolment import Enrolment
from privet.client.site import JOINED, load_site
from privet.common.clock import now
from privet.common.errors import StudyError

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds
    from privet.client.rounds.worker import Worker


def open_member(file: Path) -> Worker:
    """Return the process's worker for a site file.

    Raises:
        StudyError: The site file is missing or not valid; or the site has joined, and its file trusts what an earlier
            version wrote into it.
    """
    from privet.client.rounds.worker import open_worker

    if not (file.parent / JOINED).exists():
        return open_worker(file)
    check_migrated(file)
    return open_worker(file, ConsortiumClient(Enrolment(file.parent), now).leaves)


def check_migrated(file: Path) -> None:
    """Check that a site that has joined trusts what its operator confirmed, and nothing that the coordinator wrote.

    Raises:
        StudyError: It does not, or the site file is missing or not valid.
    """
    if load_site(file).trusted is None:
        raise StudyError(
            f"the site file {file.name} names no file `trusted`: an earlier version of privet wrote it, and trusts the "
            "keys that the coordinator gave",
            f"run `privet site migrate {file}`, then confirm consortium and members with `privet site trust`",
        )
