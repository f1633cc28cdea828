"""A site's personal adapter on disk: trained from a received one, kept beside it, and never released."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from privet.client.bases.names import BASES
from privet.client.release.opened import PERSONAL, Release, mounted
from privet.client.site import SiteConfig
from privet.client.training.loading import load_data
from privet.client.training.personal import Material, Personal, Tell, personal_study, personalise
from privet.client.training.train import Draws
from privet.common.audit.release import ADAPTER, STUDY
from privet.common.errors import StateError
from privet.common.files import make_directory, write_durably
from privet.common.privacy.noise import SecretRandomness

FOLDER = "personal"
"""Directory of the personal adapter, in that of the received one."""
_CONFIG = "adapter_config.json"


def personalise_release(release: Release, site: SiteConfig, tell: Tell) -> Personal:
    """Train a site's own adapter from a received one, on the training files of the site file.

    Args:
        release: The received adapter.
        site: The site.
        tell: Hears how far it is.

    Raises:
        StudyError, DataError: The files do not fit the study, or have too few units.
    """
    own = personal_study(release.study)
    with mounted(release, site.resources) as host:
        tell("reading the records", 0, 1)
        data = load_data(site, own, host, secrets.token_bytes(32), distinct=False)
        material = Material(data.training, data.validation, data.validation_units)
        draws = Draws(SecretRandomness(), SecretRandomness())
        return personalise(host, release.study, release.adapter, material, draws, site.resources.physical_batch, tell)


def keep_personal(release: Release, site: str, found: Personal) -> Path:
    """Write a personal adapter beside the received one, in place of an earlier one, and return its directory.

    Raises:
        StateError: It cannot be written.
    """
    target = release.path / FOLDER
    try:
        shutil.rmtree(target, ignore_errors=True)
        make_directory(target)
        for name in (STUDY, _CONFIG, BASES):
            if (release.path / name).is_file():
                shutil.copyfile(release.path / name, target / name)
        write_durably(target / PERSONAL, (json.dumps(document(release, site, found), indent=2) + "\n").encode())
        write_durably(target / ADAPTER, found.adapter.data)  # last: without it, the directory opens as nothing
    except OSError as error:
        raise StateError(
            f"{target} cannot be written ({error.strerror})", "check the disk space and the permissions"
        ) from None
    return target


def document(release: Release, site: str, found: Personal) -> Mapping[str, Any]:
    """Return how a personal adapter was made and chosen, as JSON. Its figures are of real records, without noise."""
    return {
        "format": 1,
        "site": site,
        "shared": release.adapter.digest,
        "adapter": found.adapter.digest,
        "units": {"trained": found.units[0], "compared": found.units[1]},
        "chosen": asdict(found.chosen),
        "candidates": {"shared": asdict(found.shared), "trained": asdict(found.trained)},
    }
