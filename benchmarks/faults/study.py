"""The study of the fault matrix: a tiny random BERT, thirty made-up notes at each site, and two private rounds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from privet.client.bases.files import pins_of
from privet.common.study.study import Study

ROUNDS, UNITS, DELTA = 2, 30, 1e-3
_SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
_SIGNS = {"heart": ("pain", "pulse", "faint"), "skin": ("rash", "patch", "scale"), "bone": ("knee", "wrist", "back")}
_WORDS = ("man", "woman", "child", "since", "monday", "after", "work", "mild", "again", "lunch")


def write_base(directory: Path) -> Path:
    """Write the base as `save_pretrained` does: two layers of width 32, the same bytes every time."""
    words = (*_SPECIAL, *_WORDS, *(sign for signs in _SIGNS.values() for sign in signs))
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def write_notes(file: Path, site: int) -> None:
    """Write the training file of a site: notes with one word that determines the label."""
    lines = []
    for number in range(UNITS):
        label = tuple(_SIGNS)[number % len(_SIGNS)]
        sign = _SIGNS[label][number // len(_SIGNS) % len(_SIGNS)]
        words = [_WORDS[(number * step + site) % len(_WORDS)] for step in (1, 3, 7)]
        lines.append(json.dumps({"text": " ".join([*words, sign, *words[: number % 3]]), "label": label}) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def make_study(base: Path, *, masked: bool) -> Study:
    """Return the study of this base."""
    return Study.parse(
        {
            "name": "faults",
            "seed": 7,
            "model": {"base": base.name, "sha256": pins_of(base)},
            "task": {"kind": "text-classification", "labels": list(_SIGNS)},
            "data": {"columns": {"text": "text", "label": "label"}, "max_length": 16},
            "lora": {"rank": 4, "alpha": 8.0, "targets": ["query", "value"]},
            "training": {"learning_rate": 0.02, "rounds": ROUNDS, "local_steps": 2, "sampling_rate": 0.25},
            "cohort": {"min_sites": 3},
            "privacy": {"mode": "local", "epsilon": 8.0, "delta": DELTA, "clip_norm": 1.0},
            "secure_aggregation": {"mode": "masked" if masked else "plain"},
        }
    )
