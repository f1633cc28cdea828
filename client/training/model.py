"""The base model and its adapter: verified on disk, loaded once, shared by everything in the process.

A base is a directory with `config.json`, tokenizer files and `*.safetensors`. Its weight files must be the
ones the study pins. Nothing in a base directory is ever executed: no pickle, no remote code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait slow everything down on a machine that has other work to do.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from privet.common.canonical import file_sha256
from privet.common.errors import RefusedError, StudyError, VerificationError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.privacy.noise import SeededRandomness
from privet.common.resources import Resources
from privet.common.study.adapter import Adapter, AdapterSpec, TensorSpec, Vector, tensor_role
from privet.common.study.study import LoraSection, ModelSection, Section, Study, TaskSection

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# What the model families call their dropout rates.
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
)
# Families whose position numbers start after the padding token.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "opt")
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
            f"model.base: no installed Python package {name!r} carries a model",
            "`make setup` installs the one that the demo uses",
        )
    path = Path(model.base).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.base.startswith("."):
        raise StudyError(f"model.base: no directory {path}", "check the path")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.base, revision=model.revision, local_files_only=True))
    except Exception as error:  # the hub's errors have no common base; all of them mean "not in the cache"
        raise StudyError(
            f"model.base: {model.base!r} is neither a directory nor in the local cache ({type(error).__name__})",
            "copy the model's directory to this machine and name its path",
        ) from None


@lru_cache(maxsize=8)
def _verified(base: str, pinned: tuple[tuple[str, str], ...], stamp: tuple[tuple[str, int, int], ...]) -> None:
    for name, expected in pinned:
        found = file_sha256(Path(base) / name)
        if found != expected:
            raise VerificationError(
                f"{name} in {base}: expected SHA-256 {expected}, found {found}",
                "this is another model than the study's: fetch the right one, or agree on a new study",
            )


def open_base(model: ModelSection) -> Path:
    """Locate the study's base and verify it: right bytes, safetensors only, no code.

    Raises:
        StudyError: There is no such base, or it has no safetensors weights.
        RefusedError: It wants code of its own to be run.
        VerificationError: A file is not the one the study pins, or is not pinned.
    """
    path = locate_base(model)
    weights = {file.name for file in path.glob("*.safetensors")}
    if not weights:
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        found = f"found {', '.join(pickles)}" if pickles else "found no weights at all"
        raise StudyError(
            f"model.base: {path} has no *.safetensors file; {found}",
            "pickled weights can run code when loaded: convert them to safetensors",
        )
    if unpinned := weights - set(model.sha256):
        raise VerificationError(
            f"model.sha256: {', '.join(sorted(unpinned))} in {path} is not pinned",
            f"`privet base {path}` prints the table to paste into the study",
        )
    if missing := [name for name in model.sha256 if Path(name).name != name or not (path / name).is_file()]:
        raise VerificationError(f"model.sha256: {', '.join(sorted(missing))} is not in {path}")
    for name in ("config.json", "tokenizer_config.json"):
        file = path / name
        if file.is_file() and "auto_map" in _json(file):
            raise RefusedError(f"{name} in {path} asks to run code of its own (auto_map)", "privet never does that")
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
        raise StudyError(f"model.base: {file} is not a JSON table", "fetch the model again")
    return document


class HeadModel(nn.Module):
    """A pretrained backbone with a linear classifier on its last hidden states.

    With `pooling`, token vectors [n, t, h] become one unit-RMS vector [n, h] (the mean over tokens, the
    first token, or the last one) and the output is [n, classes]; without, the output is [n, t, classes].
    The classifier starts at zero, so that every site starts from the same function.
    """

    def __init__(self, backbone: nn.Module, classes: int, pooling: str | None) -> None:
        super().__init__()
        self.config = backbone.config
        self.backbone = backbone
        self.pooling = pooling
        self.classifier = nn.Linear(int(backbone.config.hidden_size), classes)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits for token ids and mask, both [n, t]."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling is None:
            return self.classifier(hidden)  # type: ignore[no-any-return]
        if self.pooling == "mean":
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        elif self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            last = attention_mask.sum(1) - 1
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        pooled = nn.functional.normalize(pooled.float(), dim=-1) * hidden.shape[-1] ** 0.5
        return self.classifier(pooled)  # type: ignore[no-any-return]


@dataclass
class ModelHost:
    """A loaded base with one mounted adapter, its tokenizer and where it computes.

    Sites in one process share a host: only adapter values differ between them. Use it under `lock`.
    """

    model: PeftModel
    tokenizer: Any
    device: torch.device
    autocast: torch.dtype | None
    spec: AdapterSpec
    parameters: Mapping[str, nn.Parameter]
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def base_parameters(self) -> int:
        """Number of frozen parameters."""
        total: int = sum(p.numel() for p in self.model.parameters())
        return total - sum(p.numel() for p in self.parameters.values())

    def mount(self, adapter: Adapter) -> None:
        """Copy an adapter's values into the model."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(np.array(adapter.values[name])))

    def train_only(self, trained: tuple[TensorSpec, ...]) -> list[tuple[TensorSpec, nn.Parameter]]:
        """Let gradients flow to `trained` and to nothing else; return those parameters in order."""
        names = {tensor.name for tensor in trained}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        return [(tensor, self.parameters[tensor.name]) for tensor in trained]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the enclosed computation in this host's precision."""
        with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            yield


def choose_device(resources: Resources) -> torch.device:
    """Return the device that `resources` names.

    Raises:
        StudyError: CUDA is asked for and there is none.
    """
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise StudyError("resources.device: cuda was asked for, and no CUDA device is visible", 'use "auto" or "cpu"')
    wants = resources.device == "cuda" or (resources.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wants else "cpu")


def choose_autocast(resources: Resources, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where it is asked for, or where `auto` finds hardware that computes in it."""
    if resources.precision == "auto":
        cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if resources.precision == "bf16" else None


def build_base(base: Path, task: TaskSection, dropout: float, attention: str, dtype: torch.dtype) -> nn.Module:
    """Load a verified base for a task, in evaluation mode.

    Raises:
        StudyError: The base lacks weights that the task needs: they would be random, another at every site.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    kind = AutoModelForCausalLM if task.kind == "causal-lm" else AutoModel
    loaded: nn.Module
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
    # Nothing here reads an encoder's pooler: many bases come without one, and none computes it for nothing.
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise StudyError(
            f"model.base: {base} lacks {len(missing)} tensors of a {task.kind} model, first {missing[0]}",
            "choose a base that was trained for this kind of task",
        )
    if task.kind == "causal-lm":
        return loaded
    if hasattr(loaded, "pooler"):
        loaded.pooler = None  # type: ignore[assignment]
    return HeadModel(loaded, len(task.labels), task.pooling if task.kind == "text-classification" else None)


def lora_config(lora: LoraSection, task: TaskSection, layers: int) -> LoraConfig:
    """Return PEFT's configuration of the study's adapter, for a base of `layers` layers.

    Raises:
        StudyError: The study adapts more layers than there are.
    """
    if lora.layers is not None and lora.layers > layers:
        raise StudyError(f"lora.layers: {lora.layers} asked for, the base has {layers}")
    top = None if lora.layers is None else list(range(layers - lora.layers, layers))
    head = () if task.kind == "causal-lm" else ("classifier",)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        modules_to_save=list(dict.fromkeys((*head, *lora.modules_to_save))) or None,
        layers_to_transform=top,
        task_type="CAUSAL_LM" if task.kind == "causal-lm" else None,
    )


def _check_names(lora: LoraSection, names: Sequence[str]) -> None:
    """Check that every name of the study found its layers: PEFT passes over names that match nothing."""
    if any(".lora_embedding_" in name for name in names):
        raise StudyError("lora.targets: an embedding is named", "linear layers only; or use lora.modules_to_save")
    for field_name, found, wanted in (
        ("targets", "lora_B", lora.targets),
        ("modules_to_save", "modules_to_save", lora.modules_to_save),
    ):
        unknown = [layer for layer in wanted if not any(f".{layer}.{found}." in name for name in names)]
        if unknown:
            raise StudyError(f"lora.{field_name}: the base has no {', '.join(unknown)}", "check the spelling")


def _check_independent(model: nn.Module, tokens: int) -> None:
    """Refuse a base in which one record could change another's gradient, or fail on a record that is long.

    Raises:
        StudyError: It normalises over the batch, takes fewer tokens than the study, or changes its rotary
            frequencies with the width of the batch.
    """
    config = model.config
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise StudyError("model.base: it normalises over the batch, which mixes records", "choose another base")
    positions = getattr(config, "max_position_embeddings", None)
    offset = 2 if getattr(config, "model_type", "") in _OFFSET_POSITIONS else 0
    if isinstance(positions, int) and 0 < positions < tokens + offset:
        raise StudyError(
            f"data.max_length: {tokens} tokens, the base takes {positions - offset}", "lower data.max_length"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    if kind in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if not isinstance(original, int) or tokens > original:
            raise StudyError(
                f"model.base: rotary positions of type {kind} depend on the longest record of a batch",
                f"set data.max_length to {original} at most" if original else "choose another base",
            )


class _Recipe(Section):
    """The part of a study that shapes the model: studies that share it share a host."""

    task: TaskSection
    lora: LoraSection
    dropout: float
    tokens: int

    @property
    def parts(self) -> tuple[TaskSection, LoraSection, float, int]:
        return self.task, self.lora, self.dropout, self.tokens


@lru_cache(maxsize=2)
def _host(key: str, base: Path, resources: Resources) -> ModelHost:
    task, lora, dropout, tokens = _Recipe.model_validate_json(key).parts
    if resources.threads is not None:
        torch.set_num_threads(resources.threads)
    device = choose_device(resources)
    autocast = choose_autocast(resources, device)
    on_cpu = device.type == "cpu"
    # Measured: on CPUs, PyTorch's fused attention is the faster one in float32 and the slower one in bfloat16.
    attention = "eager" if on_cpu and autocast is not None else "sdpa"
    dtype = autocast if autocast is not None and not on_cpu else torch.float32
    with quiet_warnings():
        bare = build_base(base, task, dropout, attention, dtype).to(device)
        _check_independent(bare, tokens)
        for module in bare.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        layers = int(getattr(bare.config, "num_hidden_layers", 0))
        try:
            model = get_peft_model(bare, lora_config(lora, task, layers))
        except ValueError as error:
            reason = str(error).partition(". ")[0]
            wanted = ", ".join(lora.targets)
            raise StudyError(f"lora.targets {wanted}: {reason}", "name linear layers of the base") from None
    _check_names(lora, [name for name, _ in model.named_parameters()])
    model.train()
    if resources.gradient_checkpointing:
        # The re-entrant kind runs each forward hook once, which per-sample gradients by hooks rely on.
        backbone = bare.backbone if isinstance(bare, HeadModel) else bare
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
        backbone.enable_input_require_grads()  # type: ignore[operator]
    parameters = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameters[name.replace(".modules_to_save.default.", ".").replace(".default.", ".")] = parameter
    spec = AdapterSpec.of(TensorSpec(n, tuple(p.shape), tensor_role(n)) for n, p in parameters.items())
    with quiet_warnings():
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    rows = bare.get_input_embeddings() if task.kind == "causal-lm" else bare.backbone.get_input_embeddings()  # type: ignore[operator, union-attr]
    if len(tokenizer) > int(rows.num_embeddings):
        raise StudyError(
            f"model.base: the tokenizer has {len(tokenizer)} tokens, the model embeds {rows.num_embeddings}",
            "fetch model and tokenizer from the same place",
        )
    return ModelHost(model, tokenizer, device, autocast, spec, {n: parameters[n] for n in spec.names})


def open_host(study: Study, resources: Resources) -> ModelHost:
    """Return the process's host for this study's model, loading it once.

    Raises:
        StudyError, RefusedError, VerificationError: As `open_base`, or the adapter does not fit the base.
    """
    base = open_base(study.model)
    recipe = _Recipe(task=study.task, lora=study.lora, dropout=study.training.dropout, tokens=study.data.max_length)
    return _host(recipe.model_dump_json(), base, resources)


def initial_adapter(study: Study, host: ModelHost) -> Adapter:
    """Return the adapter that a study starts from, a function of its base and seed alone.

    B is zero, so the model starts as the base. The rows of A are orthonormal (QR of a normal matrix) instead
    of PEFT's uniform values, which keeps gradients of B at one scale. A head starts at zero; other modules
    trained in full start as the base has them.
    """
    values: dict[str, Vector] = {}
    for tensor in host.spec.tensors:
        if tensor.role == "lora_A":
            rank, width = tensor.shape
            normal = SeededRandomness(study.seed, "lora_A", tensor.name).normal(rank * width).reshape(width, rank)
            q, r = np.linalg.qr(normal)
            rows = (q * np.sign(np.diag(r))).T  # [min(rank, width), width]
            value = np.zeros((rank, width))
            value[: len(rows)] = rows
        elif tensor.role == "lora_B" or ".classifier." in tensor.name:
            value = np.zeros(tensor.shape)
        else:
            value = _base_value(host, tensor.name)
        values[tensor.name] = np.asarray(value, np.float32)
    return Adapter(host.spec, values)


def _base_value(host: ModelHost, name: str) -> np.ndarray[Any, Any]:
    mark = ".original_module."
    original = {n.replace(mark, "."): p for n, p in host.model.named_parameters() if mark in n}[name]
    value: np.ndarray[Any, Any] = original.detach().float().cpu().numpy()
    return value


def peft_config_text(host: ModelHost, study: Study) -> str:
    """Return the `adapter_config.json` to publish with an adapter of this study."""
    config = host.model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = study.model.base
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"


def load_bare(study: Study) -> nn.Module:
    """Load the study's base ready for `PeftModel.from_pretrained(load_bare(study), run / "adapter")`."""
    base = open_base(study.model)
    with quiet_warnings():
        return build_base(base, study.task, 0.0, "sdpa", torch.float32)
