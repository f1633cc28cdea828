"""Which canaries a site plants in a study: drawn once, before the study's first round here, and kept.

The file stays at the site. Its key decides which canaries were in the training, so who knows it can make an audit look
good or bad.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from privet.client.site import SiteConfig
from privet.client.training.canaries import Planting
from privet.common.canonical import canonical_json
from privet.common.errors import StateError
from privet.common.files import write_durably
from privet.common.study.study import Study

CANARIES = "canaries"
"""Directory under the site's state of the log: a file for each study."""


def planting_of(site: SiteConfig, study: Study) -> Planting | None:
    """Return the canaries that a site has planted in a study; None if it has planted none.

    Raises:
        StateError: The file that says so cannot be read.
    """
    path = _file(site, study)
    if path is None:
        return None
    try:
        found = json.loads(path.read_bytes())
        return Planting(int(found["count"]), bytes.fromhex(found["key"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path}, which says what canaries were planted, cannot be read ({type(error).__name__})",
            "restore it from a backup; without it, this site cannot audit the study with canaries",
        ) from None


def plant(site: SiteConfig, study: Study) -> Planting | None:
    """Return the canaries to train with: those of before, or new ones where study and site file ask for them.

    Raises:
        StateError: The file that keeps them cannot be read or written.
    """
    path, found = _file(site, study), planting_of(site, study)
    if found is not None or path is None or study.gate is None or study.gate.canaries is None:
        return found
    if site.canaries is None:
        return None
    made = Planting(site.canaries, os.urandom(32))
    document = {"study": study.digest, "count": made.count, "key": made.key.hex()}
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, canonical_json(document) + b"\n", mode=0o600)
    except OSError as error:
        raise StateError(
            f"{path}, which keeps what canaries are planted, cannot be written ({error.strerror})",
            "check the disk and the permissions of the directory",
        ) from None
    return made


def _file(site: SiteConfig, study: Study) -> Path | None:
    if site.log is None:
        return None
    return site.log.state / CANARIES / f"{study.digest.removeprefix('sha256:')}.json"
