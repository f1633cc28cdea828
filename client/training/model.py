"""Build a host: load the base, lay the adapter over it, choose device, precision and the shape of passes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from pydantic import Field
from torch import nn

from privet.client.bases.names import as_begun
from privet.client.bases.opened import open_base
from privet.client.repeating import repeating
from privet.client.site import Resources
from privet.client.training.architecture import first_position, most_positions
from privet.client.training.base import HeadModel, build_base
from privet.client.training.boundary import library_errors
from privet.client.training.host import ModelHost, release_memory
from privet.client.training.packing import Shape
from privet.client.training.probe import choose_shape
from privet.client.training.quantised import dequantise, values_of
from privet.client.training.start import input_directions
from privet.client.training.targets import lora_config
from privet.client.training.tokenizer import label_last_piece, open_tokenizer
from privet.client.training.verdicts import Verdict, keep, name_of, recall
from privet.client.training.vocabulary import find_vocabulary
from privet.common.canonical import canonical_json, digest
from privet.common.errors import StudyError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.privacy.noise import SeededRandomness
from privet.common.progress import duration
from privet.common.starting import settle
from privet.common.study.adapter import NO_CONFIG, Adapter, AdapterSpec, TensorSpec, Vector, tensor_role
from privet.common.study.sections import BETA, LoraSection, ModelSection, Quantisation, Section, TaskSection
from privet.common.study.study import Study


def choose_device(resources: Resources) -> torch.device:
    """Return the device that `resources` names.

    Raises:
        StudyError: `resources` asks for CUDA, and no CUDA device is visible.
    """
    if resources.device == "cuda" and not torch.cuda.is_available():
        raise StudyError(
            "resources.device: expected a CUDA device (NVIDIA GPU), but this machine has none that is visible",
            'set resources.device to "auto" or "cpu" in the site file',
        )
    wants = resources.device == "cuda" or (resources.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wants else "cpu")


def choose_autocast(resources: Resources, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 where `resources` asks for it, or where `auto` finds hardware that computes in it."""
    if resources.precision == "auto":
        cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu
        return torch.bfloat16 if fast else None
    return torch.bfloat16 if resources.precision == "bf16" else None


def _check_adapted(model: nn.Module, lora: LoraSection) -> None:
    """Refuse layers that PEFT wraps in another way than as a linear layer, such as the tables of experts."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and type(module) is not LoraLinear:
            raise StudyError(
                f"lora.targets {', '.join(lora.targets)}: the layer {name} is not a plain linear layer "
                f"({type(module).__name__})",
                "set lora.targets in the study to names of linear layers of the base model",
            )


def _check_independent(model: nn.Module, tokens: int) -> None:
    """Refuse a base in which one record could change another record's gradient, or which fails on long records.

    Raises:
        StudyError: It normalises over the batch, accepts fewer tokens than the study, or changes its rotary
            frequencies with the longest record of a batch.
    """
    config = model.config
    # Clipping bounds what one record adds to the sum. That holds only if the record changes no other record's gradient.
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise StudyError(
            "model.base: the base model has batch normalisation, by which one record changes the gradients of others",
            "choose a base model without batch normalisation",
        )
    positions = most_positions(model)
    if positions is not None and positions < tokens:
        raise StudyError(
            f"data.max_length: expected at most {positions} tokens, the limit of the base model, found {tokens}",
            "lower data.max_length in the study",
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else "default"
    # These kinds switch frequencies when any record of the batch is longer than the original length. Below it they
    # never switch.
    if kind in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if not isinstance(original, int) or tokens > original:
            raise StudyError(
                f"model.base: the base model encodes positions by a method ({kind} RoPE) that depends on the longest "
                "record of a batch, so one record would change the gradients of others",
                f"set data.max_length in the study to at most {original}" if original else "choose another base model",
            )


# Parameters of a base below which passes of several sizes are tried.
_SMALL = 50_000_000


_SAID = 10.0
"""Seconds between two lines about a probe that takes long."""
_log = logging.getLogger("privet.site")


class _Recipe(Section):
    """The part of a study that shapes the model: studies that share it share a host."""

    task: TaskSection
    lora: LoraSection
    dropout: float
    tokens: int
    pins: str
    """Digest of the base's files."""
    quantised: Annotated[tuple[Quantisation, str] | None, Field(exclude_if=lambda value: value is None)] = None
    """Number format of the base's quantised layers, and their digest."""

    @property
    def parts(self) -> tuple[TaskSection, LoraSection, float, int]:
        return self.task, self.lora, self.dropout, self.tokens


@lru_cache(maxsize=2)
def _host(key: str, base: Path, resources: Resources, training: bool) -> ModelHost:
    recipe = _Recipe.model_validate_json(key)
    task, lora, dropout, tokens = recipe.parts
    if resources.threads is not None:
        torch.set_num_threads(resources.threads)
    device = choose_device(resources)
    autocast = choose_autocast(resources, device)
    on_cpu = device.type == "cpu"
    # Measured: on CPUs, PyTorch's fused attention is faster than the eager one in float32, and slower in bfloat16.
    attention = "eager" if on_cpu and autocast is not None else "sdpa"
    dtype = autocast if autocast is not None and not on_cpu else torch.float32
    with quiet_warnings():
        bare = build_base(base, task, dropout, attention, dtype, recipe.quantised).to(device)
        _check_independent(bare, tokens)
        # Also dropouts whose rate has none of the configuration names that `build_base` sets.
        for module in bare.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        with library_errors("lora: the adapter cannot be laid over the base model", "correct [lora] in the study"):
            model = get_peft_model(bare, lora_config(lora, task, bare))
    _check_adapted(model, lora)
    model.eval()  # `ModelHost.passing` says when otherwise
    if resources.gradient_checkpointing:
        backbone = bare.backbone if isinstance(bare, HeadModel) else bare
        base_kind = getattr(bare.config, "model_type", "unknown")
        try:
            with quiet_warnings():
                backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
        except ValueError:
            raise StudyError(
                f"resources.gradient_checkpointing: the base model's family, {base_kind}, has no layers "
                "that can compute their activations again",
                "set resources.gradient_checkpointing to false in the site file",
            ) from None
        backbone.enable_input_require_grads()  # type: ignore[operator]
    parameters = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            # Adapters stay in float32, also on a base in bfloat16.
            parameter.data = parameter.data.float()
            parameters[name.replace(".modules_to_save.default.", ".").replace(".default.", ".")] = parameter
    spec = AdapterSpec.of(TensorSpec(n, tuple(p.shape), tensor_role(n)) for n, p in parameters.items())
    tokenizer = open_tokenizer(base, task)
    _check_embeddings(bare, len(tokenizer))
    if isinstance(bare, HeadModel) and task.kind == "token-classification" and is_causal(bare):
        label_last_piece(tokenizer)
    host = ModelHost(
        model=model,
        tokenizer=tokenizer,
        device=device,
        autocast=autocast,
        spec=spec,
        parameters={n: parameters[n] for n in spec.names},
        kind=task.kind,
        dropout=max(dropout, lora.dropout) > 0,
        shape=shape_of(device, tokens, values_of(bare)),
        first_position=first_position(bare),
        vocabulary=find_vocabulary(bare, {id(p) for p in parameters.values()}) if task.generates else None,
        beta=None if task.kind != "preference" else task.beta or BETA,
    )
    if training:
        # The digest of the base is in the key: files of equal names, sizes and times can hold another model.
        _probe(host, name_of([key, resources.model_dump(mode="json")]), tokens, len(task.labels))
    else:
        host.round_frozen()
        host.shape, host.vocabulary = Shape(), None
    release_memory()
    if host.verdict:
        _log.warning("passes take one record each, which is slower: %s", host.verdict)
    return host


def _probe(host: ModelHost, name: str, tokens: int, classes: int) -> None:
    """Choose a host's shape of passes, or take the choice that was made before under the same name."""
    known = recall(name)
    if known is None:
        _log.info("checking that this device computes each record's gradient by itself; a large base takes minutes")
        began = time.monotonic()

        def said() -> float:
            if (passed := time.monotonic() - began) > _SAID / 2:
                _log.info("still checking this device, for %s so far", duration(passed))
            return _SAID

        with repeating("probe", said):
            host.shape, host.verdict = choose_shape(host, tokens, classes)
        keep(name, Verdict(host.shape.packed, host.verdict, host.threads, host.vocabulary is not None))
        return
    host.round_frozen()
    host.shape = host.shape if known.packed else Shape()
    host.verdict, host.threads = known.objection, known.threads
    host.vocabulary = host.vocabulary if known.in_parts else None


def _check_embeddings(bare: nn.Module, tokens: int) -> None:
    """Refuse a base without a table of tokens, or with fewer rows in it than the tokenizer has tokens."""
    with library_errors("model.base: the model has no table of token embeddings", "choose a base model for text"):
        backbone: Any = bare.backbone if isinstance(bare, HeadModel) else bare
        rows = int(backbone.get_input_embeddings().weight.shape[0])
    if tokens > rows:
        raise StudyError(
            f"model.base: the tokenizer has {tokens} tokens, but the model has embeddings for {rows} only",
            "copy model and tokenizer from the same release of the base model",
        )


@torch.no_grad()
def is_causal(model: HeadModel) -> bool:
    """Return whether no token of a record sees a later one: another last token changes no other vector."""
    rows = torch.tensor([[1, 2, 1, 0], [1, 2, 1, 3]], device=model.classifier.weight.device)
    found = [
        model.backbone(input_ids=row[None], attention_mask=torch.ones_like(row[None])).last_hidden_state[:, :-1]
        for row in rows
    ]
    first, second = found
    # Experts that get other tokens may change last bits, and nothing more.
    return float((first - second).norm()) <= 1e-3 * float(first.norm())


def shape_of(device: torch.device, tokens: int, parameters: int) -> Shape:
    """Return the shape of passes to try.

    Args:
        device: Where the model is.
        tokens: Most tokens of a record.
        parameters: Of the base.
    """
    if device.type != "cpu":
        # An accelerator needs many rows to be busy, and one launch for several records.
        least = max(1024, -(-tokens // 1024) * 1024)
        larger = tuple(2**n for n in range(10, 14) if 2**n > least)
        return Shape((least, *larger), together=1024, alignment=32)
    least = max(512, -(-tokens // 128) * 128)
    # With small matrices, what a pass costs besides its products counts. With large ones, checking many sizes does.
    return Shape(tuple(range(least, 2049, 512)) or (least,) if parameters < _SMALL else (least,))


def open_host(study: Study, resources: Resources, *, training: bool = True, begun: bool = False) -> ModelHost:
    """Return the process's host for this study's model. It is loaded once.

    Args:
        study: The study.
        resources: The machine.
        training: Whether records will be trained on, which a study that counts never does. If not, nobody checks that
            the device keeps records apart, which takes a while; passes then take one record each.
        begun: The study was begun here already, perhaps by a version that pinned less of a base (`as_begun`).

    Raises:
        StudyError, RefusedError, VerificationError: As `open_base`, or the adapter does not fit the base.
    """
    settle()
    model = as_begun(study.model, resources.bases) if begun else study.model
    base = open_base(model, resources.bases)
    if study.kind == "statistics":
        return _reader(base, study.task.model_dump_json())
    recipe = _Recipe(
        task=study.task,
        lora=study.lora,
        dropout=study.training.dropout,
        tokens=study.data.max_length,
        pins=digest(canonical_json(model.sha256)),
        quantised=_quantised(model),
    )
    with library_errors(f"model.base: the model {base.name} cannot be used", "choose another base model"):
        own = resources if resources.trainer == "inside" else resources.inside
        return _host(recipe.model_dump_json(), base, own, training and not study.counts)


def _quantised(model: ModelSection) -> tuple[Quantisation, str] | None:
    if model.quantisation is None or model.quantised is None:
        return None
    return model.quantisation, model.quantised


@lru_cache(maxsize=2)
def _reader(base: Path, task: str) -> ModelHost:
    """Return the host of a study that counts records: with the base's tokenizer, and without a model or an adapter."""
    section = TaskSection.model_validate_json(task)
    return ModelHost(
        model=cast(PeftModel, nn.Module()),
        tokenizer=open_tokenizer(base, section),
        device=torch.device("cpu"),
        autocast=None,
        spec=AdapterSpec(()),
        parameters={},
        kind=section.kind,
        dropout=False,
        shape=Shape(),
    )


def forget_hosts() -> None:
    """Let the next call of `open_host` load anew, as a model that was handed out is about to change."""
    _host.cache_clear()


def check_terms(study: Study) -> None:
    """Refuse a private study in which a record's term would not depend on that record alone.

    Raises:
        StudyError: It applies dropout: masks are drawn for a whole pass, so a record would change those of all others.
    """
    # Masks from a stream of the record's own would keep the promise, and cost a draw for every activation. With clipped
    # and noised gradients of adapters, dropout was not seen to help, so it is refused.
    for name, rate in (("lora.dropout", study.lora.dropout), ("training.dropout", study.training.dropout)):
        if study.private and rate:
            raise StudyError(
                f"{name}: expected 0 in a private study, found {rate:g}: dropout would let one record change the "
                "gradients of others",
                f"remove {name} from the study",
            )


def initial_adapter(study: Study, host: ModelHost) -> Adapter:
    """Return the adapter that a study starts from, a function of its base and seed alone.

    B is zero, so the model starts as the base. The rows of A are orthonormal (QR of a normal matrix) instead
    of PEFT's uniform values, which keeps gradients of B at one scale; or, as `lora.start` says, the directions in which
    inputs vary. A head starts at zero. Other modules trained in full start with the values of the base.
    """
    if study.lora.start != "inputs":
        return _random_adapter(study, host)
    with host.lock:
        if study.seed not in host.starts:
            random = _random_adapter(study, host)
            host.mount(random)
            host.starts[study.seed] = random.replace(input_directions(host, study.seed))
        return host.starts[study.seed]


def _random_adapter(study: Study, host: ModelHost) -> Adapter:
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
    if not host.spec.tensors:
        return NO_CONFIG
    config = host.model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = study.model.base
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"


def load_bare(study: Study, bases: Mapping[str, Path] | None = None) -> nn.Module:
    """Load the study's base ready for `PeftModel.from_pretrained(load_bare(study), run / "adapter")`.

    `bases` is the directory of each base on this machine, by name. A simulated run keeps it
    (`privet.client.bases.names.kept_bases`).
    """
    known = bases or {}
    base = open_base(as_begun(study.model, known), known)
    with quiet_warnings():
        bare = build_base(base, study.task, 0.0, "sdpa", torch.float32, _quantised(study.model))
    dequantise(bare)
    return bare
