"""MedQuAD questions to answers on a small randomly initialised decoder: perplexity, ROUGE-L and BLEU.

The decoder starts untrained, so its answers stay poor. The benchmark shows only that the task trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import Check, start
from studies import MEDQUAD, medquad_sites, require, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from privet.client.bases.files import pins_of
from privet.client.training.data import load_records
from privet.common.study.study import Study
from privet.simulations.runs.simulate import prepare, run_simulation

VOCABULARY = 4096
COLUMNS = {"prompt": "question", "answer": "answer"}


def build_decoder(directory: Path, texts: list[str], seed: int) -> dict[str, Any]:
    """Write a four-layer Llama with a byte-level BPE tokenizer of its own; return the study's [model] table."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return {"base": str(directory), "sha256": pins_of(directory)}


def study(model: dict[str, Any], rounds: int, seed: int) -> dict[str, Any]:
    """Return the study as plain values, without its simulation table."""
    return {
        "name": "medquad-answers",
        "seed": seed,
        "model": model,
        "task": {"kind": "causal-lm", "max_new_tokens": 48},
        "data": {"columns": COLUMNS, "max_length": 96},
        "lora": {
            "rank": 16, "alpha": 32, "targets": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
            "modules_to_save": ["lm_head"],
        },
        "training": {
            "rounds": rounds, "local_steps": 1, "sampling_rate": 1 / 32, "learning_rate": 6e-3,
            "schedule": {"shape": "cosine", "warmup": 0.05, "floor": 0.1},
        },
        "aggregation": {"method": "fedsvd", "optimizer": "fedavgm", "momentum": 0.5},
        "privacy": {"mode": "none"},
    }  # fmt: skip


def main() -> None:
    """Run the study and print the checks."""
    bench = start("causal_lm", __doc__)
    require(MEDQUAD)
    rounds = 3 if bench.quick else 32
    sites = medquad_sites()
    if bench.quick:
        sites = {name: sites[name] for name in ("cdc", "nhlbi", "seniorhealth")}
    with TemporaryDirectory() as name:
        directory = Path(name)
        contract = Study.parse(study({"base": "unused", "sha256": {"x": "0" * 64}}, 1, 0))
        records = [load_records(Path(files["train"][0]), contract)[0] for files in sites.values()]
        texts = [f"{row['prompt']}\n{row['answer']}" for part in records for row in part.rows]
        document = study(build_decoder(directory / "base", texts, bench.seed), rounds, bench.seed)
        table = {"data": "files", "evaluate_every": 8, "test_records": 20, "answers": 0 if bench.quick else 8}
        document["simulation"] = {**table, "sites": sites}
        simulated = prepare(write(directory / "study.toml", document), directory / "run")
        summary = run_simulation(
            simulated, lambda report: bench.say(f"{report}") if report.metrics is not None else None
        )
    before, after = summary["perplexity"]["before"], summary["perplexity"]["federated"]
    checks = [
        Check("perplexity before training", before, "", "", None),
        Check("perplexity, federated", after, "", "moves", after < 0.9 * before),
    ]
    checks += [
        Check(name, summary["federated"][name], "", "", None)
        for name in ("rouge_l", "bleu")
        if name in summary["federated"]
    ]
    bench.finish(checks, json.loads(json.dumps(summary)))


if __name__ == "__main__":
    main()
