"""The base model: located and verified on disk, and built from its files alone.

A base is a directory with `config.json`, tokenizer files and `*.safetensors`. The study pins the digests of its weight
files. Nothing in a base directory is ever executed: no pickle, no remote code.
"""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from privet.client.training.packing import Layout, within_records
from privet.common.canonical import file_sha256
from privet.common.errors import RefusedError, StudyError, VerificationError
from privet.common.study.sections import ModelSection, TaskSection

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Families whose position numbers start after the padding token. The last one counts from it by itself.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "opt")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


def locate_base(model: ModelSection) -> Path:
    """Return the directory of the study's base, without verifying it.

    Raises:
        StudyError: There is no such directory, package or cached revision.
    """
    if model.base.startswith("package:"):
        name = model.base.removeprefix("package:")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
        for config in sorted(config for root in roots for config in root.glob("**/config.json")):
            if any(config.parent.glob("*.safetensors")):
                return config.parent
        raise StudyError(
            f"model.base: no installed Python package {name!r} contains a model",
            "install the package; for the demo's, run `make setup`",
        )
    path = Path(model.base).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.base.startswith("."):
        raise StudyError(
            f"model.base: there is no directory {path} on this machine",
            "copy the model there, or correct model.base in the study",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.base, revision=model.revision, local_files_only=True))
    except Exception as error:  # the hub's errors have no common base; all of them mean "not in the cache"
        raise StudyError(
            f"model.base: {model.base!r} is neither a directory nor a model in the local Hugging Face cache "
            f"({type(error).__name__})",
            "copy the model's directory to this machine, and set model.base to its path",
        ) from None


@lru_cache(maxsize=8)
def _verified(base: str, pinned: tuple[tuple[str, str], ...], stamp: tuple[tuple[str, int, int], ...]) -> None:
    # Cached by sizes and times of the files, so that a process hashes large weights once.
    for name, expected in pinned:
        found = file_sha256(Path(base) / name)
        if found != expected:
            raise VerificationError(
                f"model.sha256: the file {name} in {base}: expected SHA-256 {expected}, found {found}",
                "copy the model that the study pins to this machine: this file belongs to another model or is damaged",
            )


def open_base(model: ModelSection) -> Path:
    """Locate the study's base and verify it: the pinned bytes, safetensors only, no code.

    Raises:
        StudyError: There is no such base, or it has no safetensors weights.
        RefusedError: It asks to run code of its own.
        VerificationError: A file differs from the one the study pins, or is not pinned.
    """
    path = locate_base(model)
    weights = {file.name for file in path.glob("*.safetensors")}
    if not weights:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        found = f"found {', '.join(pickles)}" if pickles else "found no weights"
        raise StudyError(
            f"model.base: {path} has no *.safetensors file; {found}",
            "convert the weights to safetensors: pickled weights can run code when they are loaded",
        )
    # A weight file that the study does not pin would be loaded too, and could hold any weights.
    if unpinned := weights - set(model.sha256):
        raise VerificationError(
            f"model.sha256: {', '.join(sorted(unpinned))} in {path} is not pinned: the study has no SHA-256 for it",
            f"run `privet base {path}`, and paste the table into the study",
        )
    if missing := [name for name in model.sha256 if Path(name).name != name or not (path / name).is_file()]:
        raise VerificationError(
            f"model.sha256: {', '.join(sorted(missing))} is pinned in the study, but is not in the directory {path}",
            "copy the complete model directory",
        )
    for name in ("config.json", "tokenizer_config.json"):
        file = path / name
        if file.is_file() and "auto_map" in _json(file):
            raise RefusedError(
                f"{name} in {path} asks to run code of its own (auto_map)",
                "choose another base model: privet never runs code that a model brings",
            )
    stats = [(name, (path / name).stat()) for name in sorted(model.sha256)]
    stamp = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    _verified(str(path), tuple(sorted(model.sha256.items())), stamp)
    return path


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise StudyError(
            f"model.base: the file {file} is damaged: it is not a JSON object", "copy the model directory again"
        )
    return document


class HeadModel(nn.Module):
    """A pretrained backbone with a linear classifier on its last hidden states.

    With `pooling`, the token vectors of a record become one vector of root mean square 1 (from the mean over tokens,
    the first token, or the last one), and the record gets one row of logits; without, each token gets one.
    The classifier starts at zero, so that every site starts from the same function.
    """

    base_model_prefix = "backbone"  # where libraries look for the pretrained part

    def __init__(self, backbone: nn.Module, classes: int, pooling: str | None) -> None:
        super().__init__()
        self.config = backbone.config
        self.backbone = backbone
        self.pooling = pooling
        self.classifier = nn.Linear(int(backbone.config.hidden_size), classes)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        layout: Layout | None = None,
        **where: torch.Tensor,
    ) -> torch.Tensor:
        """Return logits.

        Args:
            input_ids: Tokens: padded records [n, t], or a pass [1, rows].
            attention_mask: 1 at tokens, [n, t]; None for a packed pass.
            layout: Where the records of a pass lie. A record's logits are then those at its first row.
            where: What else the backbone takes, such as `position_ids`.

        Returns:
            Logits [n, classes] with pooling, and [n, t, classes] without; [1, rows, classes] of a pass.
        """
        # A packed pass has no mask: its attention takes the layout.
        if layout is not None and attention_mask is None:
            where["layout"] = layout  # type: ignore[assignment]
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **where)
        hidden: torch.Tensor = output.last_hidden_state
        if self.pooling is None:
            return self.classifier(hidden)  # type: ignore[no-any-return]
        if layout is None:
            ends = torch.ones_like(input_ids).sum(1) if attention_mask is None else attention_mask.sum(1)
            pooled = [self._pooled(row[:end]) for row, end in zip(hidden, ends.tolist(), strict=True)]
            return self.classifier(torch.stack(pooled))  # type: ignore[no-any-return]
        spans = layout.spans
        with within_records():
            pooled = [self._pooled(hidden[0, start : start + length]) for start, length in spans]
            together = torch.stack(pooled)
            # At the record's first row, so that the classifier works on rows of the pass as every other layer does.
            first = torch.tensor([start for start, _ in spans], device=hidden.device)
            rows = together.new_zeros(layout.rows, hidden.shape[-1]).index_copy(0, first, together)
        return self.classifier(rows.unsqueeze(0))  # type: ignore[no-any-return]

    def _pooled(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return one vector [h] for a record's token vectors [t, h]: no other record takes part."""
        if self.pooling == "mean":
            pooled = vectors.float().mean(0)
        else:
            pooled = vectors[0 if self.pooling == "cls" else -1].float()
        scaled: torch.Tensor = nn.functional.normalize(pooled, dim=-1) * vectors.shape[-1] ** 0.5
        return scaled


def _loaded(kind: Any, base: Path, config: Any, attention: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    loaded, info = kind.from_pretrained(
        base,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    return loaded, info


def build_base(base: Path, task: TaskSection, dropout: float, attention: str, dtype: torch.dtype) -> nn.Module:
    """Load a verified base for a task, in evaluation mode.

    Raises:
        StudyError: The base lacks weights that the task needs: they would be random, and different at every site.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    # Families call their rates by names of their own, and all of these have "drop" in them.
    for name in [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]:
        setattr(config, name, dropout)
    kind = AutoModelForCausalLM if task.generates else AutoModel
    loaded: nn.Module
    try:
        loaded, info = _loaded(kind, base, config, attention, dtype)
    except ValueError:  # a family without this kind of attention
        loaded, info = _loaded(kind, base, config, "eager", dtype)
    # An encoder's pooler is not used here, and many bases have none. It is removed below, so that none is computed.
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise StudyError(
            f"model.base: the model {base} lacks {len(missing)} weight tensors that {task.kind} (task.kind) needs, for "
            f"example {missing[0]}",
            "choose a base that was trained for this kind of task",
        )
    if task.generates:
        return loaded
    if hasattr(loaded, "pooler"):
        loaded.pooler = None  # type: ignore[assignment]
    return HeadModel(loaded, len(task.labels), task.pooling if task.kind == "text-classification" else None)
