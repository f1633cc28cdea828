"""Load the model of any family that can be trained: an encoder, a decoder, or the text model of a multimodal one.

Families differ in their classes, in the kinds of attention that they offer, in the names of their dropout rates, and in
the number at which positions start. All of that is found from the configuration and the loaded modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from privet.client.training.boundary import library_errors
from privet.common.errors import StudyError
from privet.common.study.sections import GENERATING

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

_OTHER = "choose another base model: docs/families.md lists the families that were tried"


def load_text_model(
    base: Path, kind: str, dropout: float, attention: str, dtype: torch.dtype | None
) -> tuple[nn.Module, list[str]]:
    """Load a verified base's text model, and return it with the names of weights that it needs and the files lack.

    Args:
        base: The directory.
        kind: Kind of task; a language model has a head.
        dropout: Rate of every dropout.
        attention: Attention to use where the family offers it: "sdpa" or "eager".
        dtype: Of the weights; None leaves them as the files have them.

    Raises:
        StudyError: The base is an encoder-decoder or of an unknown family, or its files cannot be loaded.
    """
    with library_errors(f"model.base: the model {base.name} cannot be loaded", _OTHER):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config()
        if any(getattr(found, "is_encoder_decoder", False) for found in (config, text)):
            raise StudyError(
                "model.base: an encoder-decoder; take an encoder or a decoder",
                "choose a base model that is an encoder (for classes and tags) or a decoder",
            )
        for found in {id(config): config, id(text): text}.values():
            set_dropout(found, dropout)
        if text is config:
            auto = AutoModelForCausalLM if kind in GENERATING else AutoModel
            return _loaded(auto, base, config, attention, dtype)
        return _text_part(base, config, kind, attention, dtype)


def set_dropout(config: Any, rate: float) -> None:
    """Set every dropout rate of a configuration. Families have names of their own, and all have "drop" in them.

    A rate at which whole layers are left out is no dropout of values, and is set to 0.
    """
    for name in [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float)]:
        setattr(config, name, 0.0 if "layerdrop" in name else rate)


def _class_of(auto: Any, config: Any) -> Any:
    """Return the class that loads a configuration as `auto` does.

    Raises:
        StudyError: There is none.
    """
    if type(config) not in auto._model_mapping:
        wanted = (
            "a language model, which task.kind causal-lm or preference needs"
            if auto is AutoModelForCausalLM
            else "a text model"
        )
        raise StudyError(
            f"model.base: the family {getattr(config, 'model_type', 'unknown')} has no class for {wanted}", _OTHER
        )
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _loaded(
    auto: Any, base: Path, config: Any, attention: str, dtype: torch.dtype | None
) -> tuple[nn.Module, list[str]]:
    # Families whose attention is written in one way only say so in their class.
    offered = attention != "sdpa" or getattr(_class_of(auto, config), "_supports_sdpa", False)
    model, info = auto.from_pretrained(
        base,
        config=config,
        dtype=dtype or "auto",
        attn_implementation=attention if offered else "eager",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    return model, sorted(info["missing_keys"])


def _text_part(
    base: Path, config: Any, kind: str, attention: str, dtype: torch.dtype | None
) -> tuple[nn.Module, list[str]]:
    """Load a multimodal model, and return its text model alone, in the class that text models of its kind have.

    The library knows how each family names its weights on disk, so the whole model is loaded and the rest dropped.
    """
    whole = next(
        (auto for auto in (AutoModelForImageTextToText, AutoModelForCausalLM) if type(config) in auto._model_mapping),
        AutoModel,
    )
    model, missing = _loaded(whole, base, config, attention, dtype)
    inner = model.base_model
    backbone = getattr(inner, "language_model", None) or getattr(inner, "text_model", None)
    if backbone is None or (kind in GENERATING and model.get_output_embeddings() is None):  # type: ignore[operator]
        raise StudyError(
            f"model.base: a multimodal model ({config.model_type}) whose text model cannot be taken alone",
            "choose a base model that is a text model",
        )
    missing = [name for name in missing if "language_model" in name or "text_model" in name or "lm_head" in name]
    if kind not in GENERATING:
        return backbone, missing
    text = config.get_text_config()
    with torch.device("meta"):  # a frame without values, which the loaded parts fill
        framed = _class_of(AutoModelForCausalLM, text)._from_config(text)
    if type(framed.base_model) is not type(backbone):
        raise StudyError(
            f"model.base: a multimodal model ({config.model_type}) whose text model is no language model of its own",
            "choose a base model that is a text model",
        )
    setattr(framed, framed.base_model_prefix, backbone)
    framed.set_output_embeddings(model.get_output_embeddings())  # type: ignore[operator]
    framed.config = backbone.config
    framed.generation_config = getattr(model, "generation_config", None) or framed.generation_config
    return framed.eval(), missing


def first_position(model: nn.Module) -> int:
    """Return the position number of a record's first token, for a base that is told positions.

    Families that follow RoBERTa count positions from behind the number of the padding token, which their table of
    positions knows.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def most_positions(model: nn.Module) -> int | None:
    """Return the most tokens of a record that a base has positions for; None if it names no limit."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    # OPT adds 2 to positions by itself.
    return limit - (2 if getattr(config, "model_type", "") == "opt" else first_position(model))
