"""Open a trained adapter: a run directory, with the study that it was trained under."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from privet.client.bases.names import kept_bases
from privet.client.site import Resources
from privet.client.training.host import ModelHost
from privet.client.training.model import open_host
from privet.common.errors import StateError, VerificationError
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.study import Study

_RESOURCES = Resources()


@dataclass(frozen=True)
class Release:
    """A trained adapter, and what was agreed about it.

    Attributes:
        path: The directory that it was read from.
        study: The study.
        adapter: The adapter's values.
    """

    path: Path
    study: Study
    adapter: Adapter


def open_release(path: Path) -> Release:
    """Read a run directory's study and adapter.

    Raises:
        StateError: `path` is not a run directory, or its files cannot be read.
        VerificationError: The adapter is not of the study's layout.
    """
    try:
        study = Study.parse(json.loads((path / "study.json").read_bytes()))
        data = (path / "adapter" / "adapter_model.safetensors").read_bytes()
    except (OSError, ValueError, AttributeError) as error:
        raise StateError(
            f"{path} is not a run directory: study.json or adapter/adapter_model.safetensors cannot be read "
            f"({type(error).__name__})",
            "name the directory that the run was written to",
        ) from None
    return Release(path, study, Adapter.read(read_layout(data), data))


@contextmanager
def mounted(release: Release, resources: Resources = _RESOURCES) -> Iterator[ModelHost]:
    """Load the base, mount the adapter, and hold the host's lock.

    Raises:
        StudyError, RefusedError: The base cannot be opened on this machine.
        VerificationError: The base is not the study's, or the adapter does not fit it.
    """
    host = open_host(release.study, resources.knowing(kept_bases(release.path)), begun=True)
    if host.spec != release.adapter.spec:
        raise VerificationError(
            f"{release.path}: the adapter's tensors are not those of the study",
            "copy the run directory again: its files belong to different runs",
        )
    with host.lock:
        host.mount(release.adapter)
        yield host
