"""Which files of a base decide a token.

A base is every file that the libraries read when they load it: weights, configurations, vocabularies, chat templates.
A file with the suffix of such a file decides, unless its name says that it only describes. A study pins each of them.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from privet.common.canonical import file_sha256

TEMPLATES = "additional_chat_templates"
"""Directory of chat templates beside the first one."""
SUMMARY = "privet-base.json"
"""What `privet base import` says about a base that it wrote. It decides nothing."""

_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab", ".codes", ".spm")
# Read by nobody who loads the model as privet does: what other programs leave beside it.
_DESCRIBING = (
    SUMMARY,
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "data_config.json",
    "params.json",
    "requirements.txt",
    "trainer_state.json",
    "all_results.json",
    "eval_results.json",
    "train_results.json",
)
_PROSE = ("readme", "license", "licence", "notice", "copying", "changelog", "use_policy", "usage_policy", "authors")
# What versions before `privet base import` pinned besides the weights.
_ONCE = ("config.json", "tokenizer.json")


def decides(name: str) -> bool:
    """Return whether a file decides a token, by its name relative to the base's directory."""
    folder, _, file = name.lower().rpartition("/")
    if folder:
        return folder == TEMPLATES and file.endswith(".jinja")
    if file.startswith((".", *_PROSE)) or file in _DESCRIBING:
        return False
    # "tokenizer.model.v3" and the like have their version behind the suffix.
    return file.endswith(_SUFFIXES) or ".model." in file


def deciding(directory: Path) -> list[str]:
    """Return the names of the files that decide a token, relative to a base's directory, in order.

    Raises:
        OSError: The directory cannot be read.
    """
    found = [file.name for file in directory.iterdir() if file.is_file()]
    extra = directory / TEMPLATES
    if extra.is_dir():
        found += [f"{TEMPLATES}/{file.name}" for file in extra.iterdir() if file.is_file()]
    return sorted(name for name in found if decides(name))


def acceptable(name: str) -> bool:
    """Return whether a pinned name is one of a file in the base's directory, and of no other place."""
    parts = Path(name).parts
    inside = len(parts) == 1 or (len(parts) == 2 and parts[0] == TEMPLATES)
    return inside and "/".join(parts) == name and ".." not in parts and "\\" not in name


def is_own(file: Path) -> bool:
    """Return whether a file of a base is the base's own, and no link to a file of another place.

    A directory that somebody hands over may hold such links, to a file that is private to whoever copies it. The local
    cache of the Hugging Face Hub keeps a model's files in `blobs`, beside `snapshots`.
    """
    folder, real = file.parent.resolve(), file.resolve()
    base = folder.parent if folder.name == TEMPLATES else folder
    known = [base, base.parent.parent / "blobs"] if base.parent.name == "snapshots" else [base]
    return any(real.is_relative_to(place) for place in known)


def pinned_once(names: set[str]) -> bool:
    """Return whether only those files are pinned that earlier versions pinned."""
    return all(name.endswith(".safetensors") or name in _ONCE for name in names)


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file. A process reads a file once, unless its size or times change."""
    stat = file.stat()
    # Anybody who may write a file can set its time of change back, but not that of its inode.
    return _digest(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@lru_cache(maxsize=512)
def _digest(file: str, size: int, changed: int, inode_changed: int, inode: int) -> str:
    return file_sha256(Path(file))


def pins_of(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that decides a token, by name.

    Raises:
        OSError: A file cannot be read.
    """
    return {name: digest_of(directory / name) for name in deciding(directory)}
