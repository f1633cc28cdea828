"""A site that has taken part in rounds of a deployed study, as an earlier version of privet left it."""

from __future__ import annotations

import tarfile
from pathlib import Path

from privet.client.rounds.history import _keep
from privet.client.rounds.logbook import COPY
from privet.server.log.logfile import LogFile
from tests.support.pages import ROOT

WORLD = ROOT / "tests/compat/data/world.tar.xz"


def finished_site(folder: Path) -> Path:
    """Unpack site alpha with its copy of the round log, and return its site file."""
    with tarfile.open(WORLD) as archive:
        inside = ("world/consortium/alpha", "world/consortium/coordinator/log")
        archive.extractall(folder, [each for each in archive if each.name.startswith(inside)], filter="tar")
    home = folder / "world/consortium/alpha"
    log = LogFile(folder / "world/consortium/coordinator/log")
    _keep(home / "state/log" / COPY, log.leaves(0, log.size(), 2**30), 0)
    return home / "site.toml"
