"""Opens the trainer of a study as the site file says: what it is told, and where it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from privet.client.bases.files import is_own
from privet.client.bases.names import as_begun, locate_base
from privet.client.budget.withdrawals import Withdrawn
from privet.client.site import SiteConfig
from privet.client.trainer.apart import Channel, Opening, Trainer
from privet.client.trainer.confinement import Confined, require_unexposed
from privet.client.trainer.mailbox import MailboxChannel
from privet.client.trainer.pipe import PipeChannel
from privet.client.trainer.places import discard
from privet.client.trainer.reviewed import require_reviewed
from privet.client.trainer.slurm import SlurmJobs, drop_job
from privet.client.training.canaries import Planting
from privet.common.errors import RefusedError, StateError
from privet.common.study.study import Study

_log = logging.getLogger("privet.site")
_TOLD = {"name", "train", "test", "format", "patient_column", "patient_ids", "declared_count", "resources"}
"""What of the site file a trainer is told: nothing of keys, ledger, log, policy or coordinator."""
_RECORD = "job.json"
FOLDER = "trainer"
"""Directory under the site's state of the log: what belongs to its trainers."""


def opening(
    config: SiteConfig,
    study: Study,
    *,
    begun: bool,
    split_key: bytes,
    distinct: bool,
    planting: Planting | None,
    withdrawn: Withdrawn | None,
) -> Opening:
    """Return what a study's trainers are opened with.

    Args:
        config: The site file.
        study: The study.
        begun: Whether this site has begun the study, perhaps with an earlier version (`open_host`).
        split_key: Decides which units are held out.
        distinct: Whether equal names of units in two files are two units.
        planting: The canaries.
        withdrawn: Who is left out.

    Raises:
        StudyError: The base is not on this machine.
    """
    base = locate_base(study.model, config.resources.bases)
    resources = config.resources.inside.knowing({study.model.base: base})
    told = config.model_copy(update={"resources": resources}).model_dump(mode="json", include=_TOLD)
    # Files of a cache are links to another directory, of which these alone are read. Other links could lead anywhere.
    files = {str(path.resolve()) for path in base.glob("**/*") if path.is_file() and is_own(path)}
    records = [str(path.resolve()) for path in (*config.train, *config.test)]
    gpus = 0
    if config.resources.trainer == "process" and config.resources.device == "auto":
        import torch

        gpus = torch.cuda.device_count()
    request = {
        "study": study.document(),
        "site": told,
        # Only where it matters: it changes within a study, and a trainer that runs is to be found again by this.
        "begun": begun and as_begun(study.model, config.resources.bases) != study.model,
        "split": split_key.hex(),
        "distinct": distinct,
        "planting": None if planting is None else {"count": planting.count, "key": planting.key.hex()},
        "withdrawn": None if withdrawn is None else withdrawn.document(),
        # A trainer that has read the files as they were before is of no use.
        "files": [_identity(Path(path)) for path in records],
    }
    readable = sorted({*records, str(base.resolve()), *files})
    return Opening(study, readable, request, config.declared_count, gpus)


def _identity(file: Path) -> str:
    """Return what changes with a file: its number, size and time. Empty if it cannot be looked at now."""
    try:
        found = file.stat()
    except OSError:
        return ""
    return f"{found.st_dev}:{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def trainer_of(config: SiteConfig, opened: Opening, check: Callable[[], None]) -> Trainer:
    """Return the trainer of a study, as the site file says where it runs. Nothing runs yet.

    Args:
        config: The site file.
        opened: What it is opened with.
        check: Checks the data files, whenever a trainer has read them.

    Raises:
        RefusedError: The site file names no round log, beside which trainers have their files.
        StateError: It asks for a trainer that this version does not have, or nobody has admitted what is not reviewed.
    """
    require_reviewed(config)
    require_unexposed(config, opened.readable)
    if config.log is None:
        raise RefusedError(
            f"the site file of {config.name} names no round log, and a trainer apart has its files beside it",
            "run `privet site setup SITE`, which adds the `[log]` table",
        )
    folder, resources = config.log.state / FOLDER, config.resources
    channels: list[Channel]
    if resources.slurm is not None:
        channels = [MailboxChannel(SlurmJobs(resources.slurm, folder / _RECORD, opened.digest))]
    elif resources.trainer == "process":
        ways, home = range(resources.devices), folder / opened.digest[:16]
        # What a trainer has written is for the next one of the same study alone: it keeps the verdict of its probe
        # there, on which the promise to other studies must not depend.
        for other in [path for path in folder.glob("*") if path.is_dir() and path != home]:
            discard(other)
        channels = [PipeChannel(home / str(way), way if resources.devices > 1 else None) for way in ways]
    else:
        raise StateError(f"there is no trainer {resources.trainer} apart", "report this as a bug")
    return Trainer(opened, channels, _said, check)


def forget(config: SiteConfig) -> None:
    """Cancel the batch job that a site has, also one that another process of it submitted, or could not cancel."""
    if config.log is not None and (config.log.state / FOLDER).is_dir():
        drop_job(config.log.state / FOLDER / _RECORD)


def _said(head: Mapping[str, Any]) -> None:
    confined = Confined(*(head.get(name) is True for name in ("network", "files", "signals")))
    _log.info("the trainer runs apart from the keys; %s", confined.text)
