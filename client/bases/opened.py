"""Verify a base, and show libraries nothing but what was verified.

Libraries read whatever they find in a model's directory: an added chat template, tokens or an adapter. So they are
given a private directory of links to the pinned files, and what is not pinned does not exist for them.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from privet.client.bases.files import acceptable, decides, deciding, digest_of, pins_of
from privet.client.bases.names import locate_base
from privet.common.errors import RefusedError, StateError, StudyError, VerificationError
from privet.common.files import no_directory
from privet.common.study.sections import ModelSection

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_CONFIGURATIONS = ("*config.json", "config.*.json", "*.index.json")
# Entries of a configuration in which libraries read the names of further files.
_NAMING = ("configuration_files", "fast_tokenizer_files", "transformers_weights")
_NONE: Mapping[str, Path] = {}
_LARGE = 500_000_000
"""Bytes of a base whose hashing takes so long that it is announced."""


def open_base(model: ModelSection, bases: Mapping[str, Path] = _NONE) -> Path:
    """Locate the study's base and verify it: the pinned bytes, safetensors only, no code.

    Args:
        model: The study's base.
        bases: The directory of each base that this machine maps by name.

    Returns:
        A directory that holds links to the pinned files and nothing else. It lasts as long as the process.

    Raises:
        StudyError: There is no such base, it has no safetensors weights, or it is an adapter.
        RefusedError: It asks to run code of its own.
        VerificationError: A file differs from the one the study pins, or decides a token and is not pinned.
        StateError: The links cannot be made.
    """
    path = locate_base(model, bases)
    check_base(model, path)
    asked = str(path), tuple(sorted(model.sha256.items())), os.getpid()
    staged = _staged(*asked)
    if not all((staged / name).is_file() for name in model.sha256):  # removed by a cleaner of old temporary files
        _staged.cache_clear()
        _folder.cache_clear()
        staged = _staged(*asked)
    return staged


def check_base(model: ModelSection, path: Path) -> None:
    """Verify a base's directory against the study's pins. Raises as `open_base`."""
    weights = {file.name for file in path.glob("*.safetensors")}
    if not weights:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        found = f"found {', '.join(pickles)}" if pickles else "found no weights"
        raise StudyError(
            f"model.base: {path} has no *.safetensors file; {found}",
            f"convert the weights to safetensors with `privet base import {path} DIRECTORY`: pickled weights can run "
            "code when they are loaded",
        )
    if missing := [name for name in model.sha256 if not acceptable(name) or not (path / name).is_file()]:
        raise VerificationError(
            f"model.sha256: {', '.join(sorted(missing))} is pinned in the study, but is not in the directory {path}",
            "copy the complete model directory",
        )
    # A file that the study does not pin could hold any weights, words or template.
    if unpinned := sorted(set(deciding(path)) - set(model.sha256)):
        raise VerificationError(
            f"model.sha256: {', '.join(unpinned)} in {path} is not pinned: the study has no SHA-256 for it, and a base "
            "is every file that decides a token",
            f"run `privet base {path}`, and paste the table into the study",
        )
    for name, expected in sorted(model.sha256.items()):
        found = digest_of(path / name)
        if found != expected:
            raise VerificationError(
                f"model.sha256: the file {name} in {path}: expected SHA-256 {expected}, found {found}",
                "copy the model that the study pins to this machine: this file belongs to another model or is damaged",
            )
    check_harmless(path)


def pin(directory: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, str]:
    """Return the SHA-256 of every file of a base directory that decides a token, after checking that it is a base.

    Args:
        directory: A model directory.
        say: Receives a line before many bytes are hashed.

    Raises:
        StudyError: The directory has no safetensors, or cannot be read.
        RefusedError: As `check_harmless`.
    """
    if why := no_directory(directory):
        raise StudyError(f"{directory}: expected the directory of a base model, but {why}", "check the path")
    if not any(directory.glob("*.safetensors")):
        raise StudyError(
            f"the directory {directory} holds no *.safetensors file",
            f"convert the model with `privet base import {directory} NEW-DIRECTORY`, or give another directory",
        )
    check_harmless(directory)
    try:
        size = sum((directory / name).stat().st_size for name in deciding(directory))
        if size > _LARGE:
            say(f"hashing {size / 1e9:.1f} GB")
        return pins_of(directory)
    except OSError as error:
        raise StudyError(
            f"the directory {directory} cannot be read: {error.strerror}", "make its files readable for this user"
        ) from None


def check_harmless(path: Path) -> None:
    """Check that a base asks for no code of its own and for no file of another place, and is no adapter.

    Raises:
        StudyError: It is an adapter, or a configuration is damaged.
        RefusedError: It asks for code, or names a file outside its directory: no pin would cover that file.
    """
    if (path / "adapter_config.json").is_file():
        raise StudyError(
            f"model.base: {path} holds an adapter (adapter_config.json), which libraries would lay over the base",
            "give the directory of the model alone, or one that the adapter was merged into",
        )
    # Of files that decide nothing, such as sentence-transformers' `data_config.json`, no library sees any.
    found = {file for pattern in _CONFIGURATIONS for file in path.glob(pattern) if decides(file.name)}
    for file in sorted(found):
        document = read_object(file)
        if "auto_map" in document:
            raise RefusedError(
                f"{file.name} in {path} asks to run code of its own (auto_map)",
                "choose another base model: privet never runs code that a model brings",
            )
        if not all(isinstance(name, str) and acceptable(name) for name in _named_in(document)):
            raise RefusedError(
                f"{file.name} in {path} names a file outside the model's directory, which no SHA-256 covers",
                "choose another base model, or copy all of its files into one directory and correct the names",
            )


def _named_in(document: Mapping[str, Any]) -> list[object]:
    """Return the names of further files in a configuration, or in an index of weights, that libraries would read."""
    named = [document.get(key) for key in _NAMING]
    index = document.get("weight_map")
    named += [list(index.values()) if isinstance(index, dict) else index]
    return [name for value in named if value is not None for name in (value if isinstance(value, list) else [value])]


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of a base.

    Raises:
        StudyError: The file is damaged.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise StudyError(
            f"model.base: the file {file} is damaged: it is not a JSON object", "copy the model directory again"
        )
    return document


@lru_cache(maxsize=64)
def _staged(path: str, pins: tuple[tuple[str, str], ...], process: int) -> Path:
    """Return the directory of links to the pinned files, one for each process and set of pins.

    Loaded models are known by this directory, so other contents under the same names need another one.
    """
    base = Path(path)
    try:
        directory = Path(tempfile.mkdtemp(prefix=f"base-{len(pins)}-", dir=_folder(process))) / base.name
        for name, _ in pins:
            link = directory / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((base / name).resolve())
    except OSError as error:
        raise StateError(
            f"no links to the base's files can be made in {tempfile.gettempdir()}: {error.strerror}",
            "set TMPDIR to a directory on a file system with symbolic links that this user can write",
        ) from None
    return directory


@lru_cache(maxsize=1)
def _folder(process: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="privet-bases-"))
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a child that was forked from the process
        shutil.rmtree(folder, ignore_errors=True)
