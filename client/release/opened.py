"""Open a trained adapter: a run directory, or the files that a run released, with the study behind them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from privet.client.bases.names import kept_bases
from privet.client.release.received import Received, check_received
from privet.client.site import Resources
from privet.common.audit.egress import check_kept
from privet.common.audit.release import ADAPTER, STUDY
from privet.common.canonical import digest
from privet.common.clock import now
from privet.common.errors import StateError, VerificationError
from privet.common.files import beside, inside, no_directory, why_not
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.study import Study, kept_study
from privet.common.study.terms import check_until

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds: what is wrong with the files is said before
    from privet.client.training.host import ModelHost

PERSONAL = "personal.json"
"""File beside an adapter that a site trained for itself."""
_RESOURCES = Resources()


@dataclass(frozen=True)
class Release:
    """A trained adapter, and what was agreed about it.

    Attributes:
        path: The directory that it was read from.
        study: The study.
        adapter: The adapter's values.
        received: Where a site received it from; None for a run's own directory, and for files that were copied.
        personal: Name of the site that trained it further for itself; empty if none did.
    """

    path: Path
    study: Study
    adapter: Adapter
    received: Received | None = None
    personal: str = ""


def open_release(path: Path, *, testing: bool = False) -> Release:
    """Read the study and the adapter of a run directory, or of a directory of released files.

    A run directory holds `study.json` and `adapter/`. A release holds both files side by side.

    Args:
        path: The directory.
        testing: Whether it is opened for a test alone. A candidate, which has not passed the gate of its study, is
            opened for nothing else.

    Raises:
        StateError: `path` is neither, or its files cannot be read.
        VerificationError: The adapter is not of the study's layout, or was changed since it was received.
        RefusedError: It was received, and is revoked; the terms of its study have ended; or it is a candidate.
    """
    if why := no_directory(path):
        raise StateError(
            f"{path} is neither a run directory nor a release: {why}",
            f"name the directory that the run was written to, or the directory `release` in it{beside(path, STUDY)}",
        )
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    weights = folder / ADAPTER
    try:
        study = kept_study(path / STUDY)
        data = weights.read_bytes()
    except (OSError, ValueError, AttributeError) as error:
        raise StateError(
            f"{path} is neither a run directory nor a release: "
            f"{why_not(path, (STUDY, str(weights.relative_to(path))), error)}",
            f"name the directory that the run was written to, or the directory `release` in it"
            f"{inside(path, STUDY) or beside(path, STUDY)}",
        ) from None
    if study.kind == "statistics":
        raise StateError(
            f"{path} holds counts of records, and no adapter: its study is of kind statistics",
            "name the run of a study that trains; `privet report RUN` shows counts",
        )
    site, shared = _personal(path)
    # What a site made of a revoked adapter is revoked with it.
    received = check_received(path.parent, shared) if site else check_received(folder, digest(data))
    check_until(study, now())
    if not testing:
        # What a site trained for itself lies in the directory of the release that it began from.
        check_kept(study, shared if site else digest(data), path.parent if site else path)
    return Release(path, study, Adapter.read(read_layout(data), data), received, site)


def _personal(path: Path) -> tuple[str, str]:
    """Return the site that trained an adapter for itself, and the digest of what it began from; both empty if none."""
    try:
        found = json.loads((path / PERSONAL).read_bytes())
        return str(found["site"]), str(found["shared"])
    except FileNotFoundError:
        return "", ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StateError(
            f"{path / PERSONAL} cannot be read ({type(error).__name__})",
            "train the adapter again: `privet site personalise SITE RUN`",
        ) from None


def caution(release: Release) -> str:
    """Return a note if an adapter is untrained, unfinished, a site's own or no longer in use; empty if none applies."""
    run = release.path
    if release.personal:
        return (
            f"note: this adapter was trained on records of site {release.personal} without privacy; it must not leave "
            "the site"
        )
    if release.received is not None:
        return release.received.note
    simulated, untrained = (run / "study.toml").is_file(), _untrained(run)
    if not untrained and (not simulated or (run / "summary.json").is_file()):
        return ""
    resume = f"; `privet simulate --resume {quote(str(run))}` trains {'it' if untrained else 'the rest'}"
    said = (
        f"no round of {run} is complete, so this adapter is untrained: what it adds to the base model is random or zero"
        if untrained
        else f"{run} is not finished, and this is the adapter of its last complete round"
    )
    return f"note: {said}{resume if simulated else ''}"


def _untrained(run: Path) -> bool:
    """Return whether a directory is that of a run of which no round is closed."""
    rounds = run / "rounds"
    if not rounds.is_dir():
        return False
    try:
        return not any(json.loads(file.read_bytes())["type"] == "round-close" for file in rounds.glob("*.json"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def knowing_bases(release: Release, resources: Resources) -> Resources:
    """Return settings that know where the run of a trained adapter found its base. A release lies in its run."""
    return resources.knowing({**kept_bases(release.path.resolve().parent), **kept_bases(release.path)})


@contextmanager
def mounted(release: Release, resources: Resources = _RESOURCES, *, scoring: bool = True) -> Iterator[ModelHost]:
    """Load the base, mount the adapter, and hold the host's lock.

    Args:
        release: The trained adapter.
        resources: The machine.
        scoring: Whether many records will be scored in passes, as in training. If not, the base opens faster.

    Raises:
        StudyError, RefusedError: The base cannot be opened on this machine.
        VerificationError: The base is not the study's, or the adapter does not fit it.
    """
    from privet.client.training.model import open_host

    host = open_host(release.study, knowing_bases(release, resources), training=scoring, begun=True)
    if host.spec != release.adapter.spec:
        raise VerificationError(
            f"{release.path}: the adapter's tensors are not those of the study",
            "copy the run directory again: its files belong to different runs",
        )
    with host.lock:
        host.mount(release.adapter)
        yield host
