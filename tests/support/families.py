"""Tiny random bases of many families of transformers: two layers of width 32, as `save_pretrained` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from privet.common.study.study import Study
from tests.support.tiny import tiny_study, tiny_tokenizer

_WIDE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_DISTIL = {"dim": 32, "n_layers": 2, "hidden_dim": 64, "n_heads": 4, "max_position_embeddings": 128}
_LAYERED = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
_ROUTER = {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
_SIGHT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
_OTHERWISE = "the model computes something else on records laid end to end"
_SHARED = "a trained layer computes on something other than the rows of the pass"
_UNPLACED = "the model does not take records laid end to end"
_ROUTED = "the model has operations that are not known to treat each row by itself"


@dataclass(frozen=True)
class Family:
    """How to build a tiny base of a family.

    Attributes:
        name: Prefix of its classes in transformers.
        targets: The layers that get adapters.
        sizes: Of its configuration.
        encoder: Whether it has no language-model head; its tokenizer puts tokens around a text.
        verdict: How the probe's reason for one record a pass begins; empty if records are packed.
        tied: Whether the language-model head is the embedding.
        suffix: Of its class that is saved; empty for the usual one.
        sight: Configuration of the vision tower of a multimodal model; its text model is that of `sizes`.
    """

    name: str
    targets: tuple[str, ...]
    sizes: Mapping[str, Any] = field(default_factory=lambda: _WIDE)
    encoder: bool = False
    verdict: str = ""
    tied: bool = False
    suffix: str = ""
    sight: Mapping[str, Any] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of task to try."""
        heads = ("text-classification", "token-classification")
        return heads if self.encoder else ("causal-lm",) if self.name == "Mixtral" else (*heads, "causal-lm")


_QV, _BERT = ("q_proj", "v_proj"), ("query", "value")

FAMILIES = {
    "bert": Family("Bert", _BERT, encoder=True),
    "roberta": Family("Roberta", _BERT, encoder=True),
    "distilbert": Family("DistilBert", ("q_lin", "v_lin"), _DISTIL, encoder=True),
    "modernbert": Family("ModernBert", ("Wqkv", "Wo"), {**_WIDE, "local_attention": 8}, encoder=True),
    "electra": Family("Electra", _BERT, {**_WIDE, "embedding_size": 32}, encoder=True),
    "albert": Family("Albert", _BERT, {**_WIDE, "embedding_size": 32}, encoder=True),
    "mpnet": Family("MPNet", ("q", "v"), encoder=True, verdict=_OTHERWISE),
    "deberta-v2": Family("DebertaV2", ("query_proj", "value_proj"), encoder=True, verdict=_OTHERWISE),
    "gpt2": Family("GPT2", ("c_attn",), {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}, tied=True),
    "llama": Family("Llama", _QV, _GROUPED),
    "qwen2": Family("Qwen2", _QV, _GROUPED),
    "qwen3": Family("Qwen3", _QV, {**_GROUPED, "head_dim": 8}),
    "mistral": Family("Mistral", _QV, {**_GROUPED, "sliding_window": 8}),
    "gemma2": Family("Gemma2", _QV, {**_GROUPED, "head_dim": 8, "sliding_window": 8}, tied=True),
    "phi3": Family("Phi3", ("qkv_proj", "o_proj"), _GROUPED),
    "opt": Family(
        "OPT",
        _QV,
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 64,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "dropout": 0.0,  # functional: recomputing layers are in training mode
        },
        tied=True,
    ),
    "bloom": Family(
        "Bloom",
        ("query_key_value",),
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        verdict=_OTHERWISE,
        tied=True,
    ),
    "mixtral": Family("Mixtral", _QV, {**_GROUPED, "num_local_experts": 4}, verdict=_ROUTED),
}


MORE = {
    "longformer": Family(
        "Longformer", _BERT, {**_WIDE, "attention_window": [8, 8]}, encoder=True, verdict=_UNPLACED
    ),
    "deberta": Family("Deberta", ("in_proj",), {**_WIDE, **_RELATIVE}, encoder=True, verdict=_OTHERWISE),
    "deberta-v3": Family(
        "DebertaV2",
        ("query_proj", "key_proj"),
        {**_WIDE, **_RELATIVE, "share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"},
        encoder=True,
        verdict=_SHARED,
    ),
    "esm": Family("Esm", _BERT, {**_WIDE, "position_embedding_type": "rotary"}, encoder=True),
    "big-bird": Family(
        "BigBird", _BERT, {**_WIDE, "attention_type": "original_full"}, encoder=True, verdict=_UNPLACED),
    "xlnet": Family(
        "XLNet",
        ("layer_1", "layer_2"),
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        encoder=True,
        verdict=_OTHERWISE,
        suffix="LMHeadModel",
    ),
    "gpt-neox": Family("GPTNeoX", ("query_key_value",)),
    "gpt-neo": Family(
        "GPTNeo",
        _QV,
        {**_LAYERED, "intermediate_size": 64, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        verdict=_UNPLACED,
        tied=True,
    ),
    "olmo2": Family("Olmo2", _QV, _GROUPED),
    "smollm3": Family("SmolLM3", _QV, _GROUPED),
    "granite": Family("Granite", _QV, _GROUPED),
    "gemma3": Family("Gemma3", _QV, {**_GROUPED, "head_dim": 8, "sliding_window": 8}, tied=True),
    "qwen2-moe": Family(
        "Qwen2Moe", _QV, {**_ROUTER, "shared_expert_intermediate_size": 32}, verdict=_ROUTED
    ),
    "qwen3-moe": Family("Qwen3Moe", _QV, _ROUTER, verdict=_ROUTED),
    "mamba": Family(
        "Mamba", ("in_proj", "x_proj"), {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, verdict=_OTHERWISE
    ),
    "gemma3-vision": Family(
        "Gemma3", _QV, {**_GROUPED, "head_dim": 8, "sliding_window": 8}, tied=True, suffix="ForConditionalGeneration",
        sight={"model_type": "siglip_vision_model", **_SIGHT},
    ),
    "llava": Family(
        "Llava", _QV, {"model_type": "llama", **_GROUPED}, suffix="ForConditionalGeneration",
        sight={"model_type": "clip_vision_model", **_SIGHT},
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VL", _QV, {"model_type": "qwen2_5_vl_text", **_GROUPED,
         "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        suffix="ForConditionalGeneration",
        sight={"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32},
    ),
    "t5": Family("T5", ("q", "v"), {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
                 encoder=True, suffix="Model"),
    "bart": Family(
        "Bart", _QV,
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128},
        encoder=True, suffix="Model"),
}  # fmt: skip
"""More families, that the table in the documentation has and quick tests do not."""


def family_base(path: Path, name: str, *, head: bool = False) -> Path:
    """Write a random base of a family into `path` and return it. The same name gives the same bytes.

    With `head`, an encoder has the head for masked words with which encoders are published.
    """
    family = (FAMILIES | MORE)[name]
    tokenizer = tiny_tokenizer("bert" if family.encoder else name)
    sizes = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "init_std" if name in ("opt", "bart") else "initializer_range": 0.2,
        **family.sizes,
    }
    if name == "t5":
        del sizes["initializer_range"]
    if family.sight is not None:
        sizes = {"text_config": sizes, "vision_config": dict(family.sight)}
    suffix = family.suffix
    text = "Text" if name == "gemma3" else ""
    config = getattr(transformers, f"{family.name}{text}Config")(**sizes)
    if not suffix and family.encoder:
        suffix = "ForMaskedLM" if head else "Model"
    if not suffix:
        suffix = "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    kind = getattr(transformers, family.name + suffix)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def family_study(base: Path, name: str, **overrides: Any) -> Study:
    """Return a small study of a base of `name`: see `tiny_study`."""
    return tiny_study(base, **{"lora.targets": list((FAMILIES | MORE)[name].targets), **overrides})
