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
_OTHERWISE = "the model computes something else on records laid end to end"
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
    """

    name: str
    targets: tuple[str, ...]
    sizes: Mapping[str, Any] = field(default_factory=lambda: _WIDE)
    encoder: bool = False
    verdict: str = ""
    tied: bool = False

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


def family_base(path: Path, name: str) -> Path:
    """Write a random base of one of `FAMILIES` into `path` and return it. The same name gives the same bytes."""
    family = FAMILIES[name]
    tokenizer = tiny_tokenizer("bert" if family.encoder else name)
    config = getattr(transformers, f"{family.name}Config")(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **{"init_std" if name == "opt" else "initializer_range": 0.2},
        **family.sizes,
    )
    suffix = "Model" if family.encoder else "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    kind = getattr(transformers, family.name + suffix)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def family_study(base: Path, name: str, **overrides: Any) -> Study:
    """Return a small study of a base of `name`: see `tiny_study`."""
    return tiny_study(base, **{"lora.targets": list(FAMILIES[name].targets), **overrides})
