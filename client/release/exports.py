"""Export a trained adapter as a directory that other tools load, and prove it equal by loading it with them.

The logits of the loaded export are compared with those of the adapter as it was trained, on fixed inputs. An export
that differs by more than its bound is deleted.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
)

from privet.client.bases.files import is_own
from privet.client.bases.names import as_begun, locate_base
from privet.client.bases.opened import open_base
from privet.client.release.card import base_name, export_card, licence_files, modelfile, release_documents
from privet.client.release.generation import stop_tokens
from privet.client.release.gguf_file import check_family, write_gguf
from privet.client.release.opened import Release, knowing_bases, mounted
from privet.client.site import Resources
from privet.client.training.base import HeadModel
from privet.client.training.features import prompt_ids
from privet.client.training.host import ModelHost
from privet.client.training.quantised import dequantise
from privet.common.audit.release import ADAPTER, CARD, STUDY
from privet.common.canonical import canonical_json
from privet.common.errors import RefusedError, StateError, StudyError, VerificationError
from privet.common.privacy.accounting import quiet_warnings
from privet.common.study.sections import GENERATING
from privet.common.study.study import Study

Format = Literal["peft", "merged", "gguf", "sentence-transformers"]
FORMATS: tuple[Format, ...] = ("peft", "merged", "gguf", "sentence-transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROOF = "export.json"
Say = Callable[[str], None]

# Largest difference of logits: absolute in float32; as a fraction of the largest logit where weights were rounded.
_EXACT, _ROUNDED = 1e-4, {"bf16": 5e-2, "fp16": 1e-2, "F16": 1e-2}
_INPUTS = (
    "man, 61: chest pain since monday",
    "An itchy rash on both arms after work; no fever.",
    "What can be done about a stiff back in the morning?",
    "Na\u00efve \u00dcbersicht: 37.5 \u00b0C, pulse 104/min, 2\u00d75 mg",
)
# Everything in a base's directory that decides tokens and generation.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_PLAIN = "backbone."


@dataclass(frozen=True)
class Reference:
    """What an export has to reproduce.

    Attributes:
        texts: The fixed inputs.
        ids: Tokens of each.
        logits: Of the trained adapter, one tensor for each input: [classes] or [t, classes or vocabulary].
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Trained:
    """An opened adapter and all that is exported with it.

    Attributes:
        release: The adapter and its study.
        base: Directory of the base's verified files.
        source: The base's own directory, for its licence.
        host: The model with the adapter mounted.
        plain: A copy of the model with the adapter merged into its weights, in float32.
        reference: What to reproduce.
    """

    release: Release
    base: Path
    source: Path
    host: ModelHost
    plain: Any
    reference: Reference

    @property
    def study(self) -> Study:
        """The study."""
        return self.release.study


def default_format(study: Study) -> Format:
    """Return the format that a study's adapter can be exported in, without a choice."""
    return "sentence-transformers" if _normalised(study) else "merged"


def _normalised(study: Study) -> bool:
    """Return whether a text's vector is normalised before it is classified, which the library's classes do not do."""
    return study.task.kind == "text-classification" and study.task.head is None


def export_release(
    release: Release, out: Path, form: str, dtype: str = "fp32", say: Say = lambda line: None
) -> dict[str, Any]:
    """Write an export, load it with the tools it is made for, and compare. Return what was compared.

    Args:
        release: The trained adapter.
        out: New directory.
        form: Format of the export.
        dtype: For merged: fp32, bf16 or fp16.
        say: Told what is being done.

    Raises:
        StateError: `out` exists, or cannot be written.
        StudyError, RefusedError: The base cannot be opened, or the adapter cannot be exported in this format.
        VerificationError: The base is not the study's, or the loaded export differs from the adapter.
    """
    if out.exists():
        raise StateError(f"{out} exists already", "choose a new directory; an existing one is never overwritten")
    _check_format(release.study, form, dtype)
    resources = knowing_bases(release, Resources(device="cpu", precision="fp32"))
    model = as_begun(release.study.model, resources.bases)
    base, source = open_base(model, resources.bases), locate_base(model, resources.bases)
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    say("loading the base, and computing what the export has to reproduce")
    with mounted(release, resources, scoring=False) as host, quiet_warnings():
        reference = _reference(host, release.study)
        # The host's own model stays as it is: others may use it.
        plain = None if form == "peft" else _merged(copy.deepcopy(host.model))
        trained = Trained(release, base, source, host, plain, reference)
        try:
            staging.mkdir(parents=True)
            with _library_errors(form):
                say(f"writing {form}")
                _WRITERS[form](trained, staging, dtype)
                say("loading the export, and comparing")
                proof = _prove(trained, staging, form, dtype)
            _write_documents(trained, staging, form, proof)
            staging.rename(out)
        except OSError as error:
            raise StateError(
                f"{out} cannot be written ({error.strerror or type(error).__name__})",
                "check that you may write to the directory and that the disk is not full",
            ) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return proof


@contextmanager
def _library_errors(form: str) -> Iterator[None]:
    """Turn what a library raises over a family that it cannot handle into one sentence."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError) as error:
        raise RefusedError(
            f"--format {form}: the installed libraries cannot write or load this family of models in this format "
            f"({type(error).__name__})",
            "choose another format, or use `privet predict RUN --data FILE`",
        ) from None


def _check_format(study: Study, form: str, dtype: str) -> None:
    kind = study.task.kind
    if form not in FORMATS or dtype not in DTYPES:
        raise StudyError(
            f"expected a format of {', '.join(FORMATS)} and a type of {', '.join(DTYPES)}, got {form} and {dtype}",
            "correct --format or --dtype",
        )
    if dtype != "fp32" and form != "merged":
        raise StudyError(f"--dtype {dtype}: only --format merged takes a type", "leave --dtype out")
    if form == "gguf" and kind not in GENERATING:
        raise RefusedError(
            f"--format gguf: expected a language model, but the study's task is {kind}",
            f"use `privet export RUN OUT --format {default_format(study)}`",
        )
    if study.task.head_reads is not None:
        raise RefusedError(
            f"--format {form}: the study's head reads all layers (task.head_reads), which no other library's does",
            "use `privet predict RUN --data FILE`, or train without head_reads",
        )
    if form == "sentence-transformers" and not _normalised(study):
        raise RefusedError(
            f"--format sentence-transformers: expected a classifier of normalised vectors, but the study trains {kind}"
            + (" with the library's head" if study.task.head else ""),
            "use `privet export RUN OUT --format merged`",
        )
    if form == "peft" and study.model.quantisation is not None:
        raise RefusedError(
            f"--format peft: the study trains on a base in {study.model.quantisation}, and this adapter would be "
            "loaded over the base as it was before, with other logits",
            f"use `privet export RUN OUT --format {default_format(study)}`",
        )
    if form in ("peft", "merged") and _normalised(study):
        raise RefusedError(
            f"--format {form}: a study's text classifier normalises the vector of a text before its classifier, which "
            "AutoModelForSequenceClassification does not, so its logits would differ",
            "use `privet export RUN OUT --format sentence-transformers`, which computes the same logits, or train with "
            'head = "library" under [task]',
        )


# --- what has to be reproduced ------------------------------------------------------------------------------


@torch.no_grad()
def _reference(host: ModelHost, study: Study) -> Reference:
    tokenizer = host.tokenizer
    if study.task.generates:
        rows = [prompt_ids(study, tokenizer, text) for text in _INPUTS]
    else:
        encoded = tokenizer(list(_INPUTS), truncation=True, max_length=study.data.max_length)
        rows = list(encoded["input_ids"])
    most = study.data.max_length if not study.task.generates else host.model.config.max_position_embeddings
    ids = tuple(tuple(row[: int(most)]) for row in rows)
    return Reference(_INPUTS, ids, _logits_of(host.model, ids))


@torch.no_grad()
def _logits_of(model: Any, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...]:
    """Return the logits of each input, each computed alone."""
    found = []
    for row in ids:
        tokens = torch.tensor([list(row)])
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        logits = output if isinstance(output, torch.Tensor) else output.logits
        found.append(logits[0])
    return tuple(found)


def _merged(model: Any) -> Any:
    """Add B·A to the weights in float32, and return the model without PEFT around it."""
    output = model.get_base_model()
    output = output.get_output_embeddings() if hasattr(output, "get_output_embeddings") else None
    layer = getattr(output, "base_layer", None)
    if layer is not None:
        # The weights of a tied head are those of the embedding, which must not get the head's adapter.
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    dequantise(model)
    merged = model.merge_and_unload()
    if not isinstance(merged, HeadModel) and getattr(merged.config, "tie_word_embeddings", False):
        inner, outer = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
        merged.config.tie_word_embeddings = bool(inner is outer or torch.equal(inner, outer))
    return merged.eval()


# --- formats ------------------------------------------------------------------------------------------------


def _copy_tokenizer(trained: Trained, to: Path) -> None:
    """Copy what decides tokens and generation from the base.

    Raises:
        RefusedError: A file is a link to another place. Exports are published.
    """
    for name in _TOKENIZER:
        if (trained.base / name).is_file():
            if not is_own(trained.source / name):
                raise RefusedError(
                    f"{name} in {trained.source} is a link to a file outside the model's directory, which is not "
                    "copied into an export",
                    "if the file belongs to the model, put a copy of it in the place of the link",
                )
            shutil.copyfile(trained.base / name, to / name)
    try:
        _check_tokens(trained, _tokenizer(to))
    except VerificationError:
        # The library takes a tokenizer's class from the model's configuration too, which an adapter's directory lacks.
        trained.host.tokenizer.save_pretrained(to)


def _labelled(config: Any, study: Study) -> Any:
    config = copy.deepcopy(config)
    config.num_labels = len(study.task.labels)
    config.id2label = dict(enumerate(study.task.labels))
    config.label2id = {label: number for number, label in enumerate(study.task.labels)}
    return config


def _library_kind(study: Study) -> Any:
    kinds = {
        "token-classification": AutoModelForTokenClassification,
        "text-classification": AutoModelForSequenceClassification,
    }
    return kinds.get(study.task.kind, AutoModelForCausalLM)


def _library_head(model: Any, hidden: int, classes: int) -> str:
    """Return the name of the library's own classifier, one linear layer on the hidden states.

    Raises:
        RefusedError: The library's model has another head.
    """
    for name in ("classifier", "score"):
        layer = getattr(model, name, None)
        if isinstance(layer, nn.Linear) and layer.weight.shape == (classes, hidden):
            return name
    raise RefusedError(
        f"the library's classifier of the family {model.config.model_type} is more than one linear layer, so it "
        "cannot compute what was trained",
        "use `privet predict RUN --data FILE`",
    )


def _library_model(trained: Trained) -> tuple[Any, str]:
    """Return the library's own model for a classifier, with the merged weights, and the name of its head."""
    plain, study = trained.plain, trained.study
    model = _library_kind(study).from_config(_labelled(plain.config, study), dtype=torch.float32)
    head = _library_head(model, plain.classifier.in_features, len(study.task.labels))
    values = plain.backbone.state_dict()
    if hasattr(plain, "pooler_weight"):
        values |= {"pooler.dense.weight": plain.pooler_weight, "pooler.dense.bias": plain.pooler_bias}
    lacking = model.base_model.load_state_dict(values, strict=False)
    if lacking.unexpected_keys or [name for name in lacking.missing_keys if "pooler" not in name]:
        raise RefusedError(
            f"the library's classifier of the family {model.config.model_type} has other layers than its base",
            "use `privet predict RUN --data FILE`",
        )
    getattr(model, head).load_state_dict(plain.classifier.state_dict())
    return model.eval(), head


def _write_merged(trained: Trained, out: Path, dtype: str) -> None:
    plain = trained.plain
    model = _library_model(trained)[0] if isinstance(plain, HeadModel) else plain
    if hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig()  # the base's own file is copied below, whatever it holds
    model.config.pad_token_id = trained.host.tokenizer.pad_token_id
    model.to(DTYPES[dtype])
    model.save_pretrained(out)
    model.to(torch.float32)
    _copy_tokenizer(trained, out)


def _write_peft(trained: Trained, out: Path, dtype: str) -> None:
    study, release = trained.study, trained.release
    values = {name: torch.from_numpy(value.copy()) for name, value in release.adapter.values.items()}
    config = trained.host.model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_name(study), "inference_mode": True}
    if not study.task.generates:
        library = AutoConfig.from_pretrained(trained.base, trust_remote_code=False)
        with torch.device("meta"):
            model = _library_kind(study).from_config(_labelled(library, study))
        hidden = trained.host.model.get_base_model().classifier.weight.shape[1]
        head = _library_head(model, int(hidden), len(study.task.labels))
        values = {_renamed(name, model.base_model_prefix, head): value for name, value in values.items()}
        layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in values if ".lora_" in name}
        others = {name for name in config["modules_to_save"] or () if name != "classifier"}
        config |= {
            "task_type": "TOKEN_CLS" if study.task.kind == "token-classification" else "SEQ_CLS",
            "target_modules": sorted(layers),
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": sorted({head, *others}),
        }
    save_file(dict(sorted(values.items())), out / ADAPTER, metadata={"format": "pt"})
    text = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (out / "adapter_config.json").write_text(json.dumps(text, indent=2, sort_keys=True, default=str) + "\n")
    _copy_tokenizer(trained, out)


def _renamed(name: str, prefix: str, head: str) -> str:
    """Return the library's name of an adapter's tensor: privet's classifier holds the base as `backbone`."""
    inner = name.removeprefix("base_model.model.")
    if inner.startswith(_PLAIN):
        return f"base_model.model.{prefix}.{inner.removeprefix(_PLAIN)}"
    return f"base_model.model.{head}.{inner.removeprefix('classifier.')}"


def _write_gguf(trained: Trained, out: Path, dtype: str) -> None:
    check_family(trained.plain, trained.host.tokenizer)
    write_gguf(trained.plain, trained.host.tokenizer, out / "model.gguf", trained.study.name)


def _write_sentence_transformers(trained: Trained, out: Path, dtype: str) -> None:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
    except ImportError:
        raise StudyError(
            "--format sentence-transformers needs the package sentence-transformers",
            "run pip install 'privet[export]'",
        ) from None
    study, plain = trained.study, trained.plain
    parts = out / ".transformer"
    backbone = plain.backbone
    backbone.config = _labelled(backbone.config, study)
    backbone.save_pretrained(parts)
    trained.host.tokenizer.save_pretrained(parts)
    transformer = Transformer(
        str(parts), max_seq_length=study.data.max_length, config_kwargs={"trust_remote_code": False}
    )
    hidden = int(plain.classifier.in_features)
    pooling = Pooling(hidden, {"mean": "mean", "cls": "cls", "last": "lasttoken"}[study.task.pooling])
    dense = Dense(
        hidden,
        len(study.task.labels),
        activation_function=nn.Identity(),
        # Vectors of length 1 here have root mean square 1 in the study.
        init_weight=plain.classifier.weight.detach() * hidden**0.5,
        init_bias=plain.classifier.bias.detach().clone(),
    )
    SentenceTransformer(modules=[transformer, pooling, Normalize(), dense], device="cpu").save_pretrained(
        str(out), create_model_card=False
    )
    shutil.rmtree(parts)


_WRITERS: dict[str, Callable[[Trained, Path, str], None]] = {
    "merged": _write_merged,
    "peft": _write_peft,
    "gguf": _write_gguf,
    "sentence-transformers": _write_sentence_transformers,
}


# --- the proof ----------------------------------------------------------------------------------------------


def _prove(trained: Trained, out: Path, form: str, dtype: str) -> dict[str, Any]:
    """Load an export as its users will, compare its logits, and return the figures.

    Raises:
        VerificationError: The logits differ by more than the bound, or the tokens differ.
    """
    kept = "F16" if form == "gguf" else dtype
    relative, bound = kept in _ROUNDED, _ROUNDED.get(kept, _EXACT)
    reference = trained.reference.logits
    difference, computed = _difference(_LOADERS[form](trained, out, torch.float32), reference), "float32"
    if difference > bound and not relative and trained.study.task.kind != "text-classification":
        # Sums of float32 in another order differ by more where logits are large. What the files hold shows in float64.
        reference = _logits_of(copy.deepcopy(trained.host.model).double(), trained.reference.ids)
        difference, computed = _difference(_LOADERS[form](trained, out, torch.float64), reference), "float64"
    if relative:
        difference /= max(float(logits.abs().max()) for logits in reference) or 1.0
    proof = {
        "format": form,
        "dtype": kept,
        "computed": computed,
        "inputs": len(reference),
        "largest_difference": difference,
        "relative": relative,
        "bound": bound,
    }
    if not difference <= bound:  # also where it is not a number
        raise VerificationError(
            f"the export was deleted: loaded with plain libraries, its logits differ from the adapter's by "
            f"{difference:.3g}, expected at most {bound:g}",
            "report this as a bug with the family of the base; `privet predict RUN --data FILE` works meanwhile",
        )
    return proof


def _difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def _check_tokens(trained: Trained, tokenizer: Any) -> None:
    """Check that an export's tokenizer gives the tokens of training."""
    study, reference = trained.study, trained.reference
    for text, expected in zip(reference.texts, reference.ids, strict=True):
        if study.task.generates:
            found = prompt_ids(study, tokenizer, text)
        else:
            found = tokenizer(text, truncation=True, max_length=study.data.max_length)["input_ids"]
        if tuple(found[: len(expected)]) != expected:
            raise VerificationError(
                "the export was deleted: its tokenizer gives other tokens than the base's",
                "report this as a bug with the family of the base",
            )


def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _load_merged(trained: Trained, out: Path, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    kind = _library_kind(trained.study)
    model = kind.from_pretrained(out, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True)
    _check_tokens(trained, _tokenizer(out))
    return _logits_of(model.eval(), trained.reference.ids)


def _load_peft(trained: Trained, out: Path, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    from peft import PeftModel

    study = trained.study
    classes = {} if study.task.generates else {"num_labels": len(study.task.labels)}
    base = _library_kind(study).from_pretrained(
        trained.base,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        **classes,
    )
    _check_tokens(trained, _tokenizer(out))
    return _logits_of(PeftModel.from_pretrained(base, out).to(dtype).eval(), trained.reference.ids)


def _load_gguf(trained: Trained, out: Path, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    from gguf import GGUFReader

    file = out / "model.gguf"
    fields = GGUFReader(file).fields
    tokenizer = trained.host.tokenizer
    written = fields["tokenizer.ggml.tokens"].contents()
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    template = fields["tokenizer.chat_template"].contents() if "tokenizer.chat_template" in fields else None
    if any(written[number] != token for number, token in names.items()) or template != (
        tokenizer.chat_template or None
    ):
        raise VerificationError(
            "the export was deleted: its vocabulary or chat template is not the base's",
            "report this as a bug with the family of the base",
        )
    with redirect_stderr(io.StringIO()):  # a bar of its own
        model = AutoModelForCausalLM.from_pretrained(
            out, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
    return _logits_of(model.eval(), trained.reference.ids)


def _load_sentence_transformers(trained: Trained, out: Path, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(out), device="cpu", trust_remote_code=False, local_files_only=True)
    _check_tokens(trained, model.tokenizer)
    rows = model.encode(list(trained.reference.texts), convert_to_tensor=True, show_progress_bar=False)
    return tuple(rows.float().cpu())


_LOADERS: dict[str, Callable[[Trained, Path, torch.dtype], tuple[torch.Tensor, ...]]] = {
    "merged": _load_merged,
    "peft": _load_peft,
    "gguf": _load_gguf,
    "sentence-transformers": _load_sentence_transformers,
}


def _write_documents(trained: Trained, out: Path, form: str, proof: dict[str, Any]) -> None:
    """Write what an export needs besides weights and tokenizer."""
    study, base = trained.study, trained.source
    documents = release_documents(trained.release)
    stops = []
    if study.task.generates:
        stops = stop_tokens(trained.host, study)
        if form != "peft":
            weights = "./model.gguf" if form == "gguf" else "."
            (out / "Modelfile").write_text(modelfile(study, weights, stops), encoding="utf-8")
        if form == "gguf":
            _copy_tokenizer(trained, out)
    card = export_card(trained.release, documents.pop(CARD).decode(), base, form, proof, stops)
    (out / CARD).write_text(card, encoding="utf-8")
    for name, data in documents.items():
        (out / name).write_bytes(data)
    for file in licence_files(base):
        shutil.copyfile(file, out / file.name)
    (out / STUDY).write_bytes(canonical_json(study.document()))
    (out / PROOF).write_text(json.dumps(proof, indent=1, sort_keys=True) + "\n", encoding="utf-8")
