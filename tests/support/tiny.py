"""Tiny models, studies and data for tests: real formats and real libraries, in kilobytes and without network.

A tiny base is a directory as `save_pretrained` writes it: random weights of one of four model families in
safetensors, and a BPE tokenizer trained on the sentences that the rows below are made of.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import string
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from privet.client.bases.files import pins_of
from privet.client.bases.names import FOLDERS
from privet.client.budget.ledger import Ledger
from privet.client.rounds.site import RealSite, Site
from privet.client.rounds.worker import Worker
from privet.client.site import load_site
from privet.client.training.data import Records
from privet.common.pki.keyfile import public_key
from privet.common.study.adapter import Adapter, AdapterSpec
from privet.common.study.sections import GENERATING, ROLES
from privet.common.study.study import Study
from privet.simulations.sites import SimulatedSite, load_simulated, simulated_identity
from tests.support.site_log import with_log

Row = dict[str, Any]

RECORDS = {"unit": "record", "epsilon": 10.0, "delta": 1e-3}
FAMILIES = ("bert", "gpt2", "llama", "qwen2")
TARGETS = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
}
LABELS = ("heart", "skin", "bone")
TAGS = ("O", "B-sign", "I-sign")
PAD, UNKNOWN, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"

_SIGNS = {
    "heart": ("chest pain", "fast pulse", "faint spell"),
    "skin": ("itchy rash", "red patch", "dry scale"),
    "bone": ("swollen knee", "broken wrist", "stiff back"),
}
_FILLER = (
    "man",
    "woman",
    "child",
    "since",
    "monday",
    "friday",
    "after",
    "work",
    "sleep",
    "lunch",
    "again",
    "mild",
)
_ORDER = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WHOLE = (
    "columns",
    "sha256",
    "rank_pattern",
    "alpha_pattern",
)  # tables that an override replaces as a whole; their keys may have dots
_CHAT = (
    "{% for message in messages %}<s>{{ message.role }} {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


# --- bases -----------------------------------------------------------------------------------------------


def tiny_tokenizer(family: str, chat: bool = False) -> Any:
    """Return a BPE tokenizer of some 240 tokens; words that it never saw fall into several pieces.

    BERT's puts `<s>` before and `</s>` behind a text, as encoders of its kind do. GPT-2's and Qwen2's split
    bytes, as their real ones do. With `chat`, it has a chat template.
    """
    corpus = [row["text"] for row in class_rows(60, seed=0)]
    corpus += ["system user assistant \n", f"{string.ascii_letters} {string.digits} {string.punctuation}"]
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    if family in ("gpt2", "qwen2"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    special = [PAD, UNKNOWN, BOS, EOS]
    trainer = trainers.BpeTrainer(vocab_size=240, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    if family == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 2), (EOS, 3)]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, bos_token=BOS, eos_token=EOS
    )
    if chat:
        fast.chat_template = _CHAT
    return fast


def tiny_base(path: Path, family: str, chat: bool = False) -> Path:
    """Write a random base of `family`, one of `FAMILIES`, into `path` and return it.

    Two layers of width 32. The same family gives the same bytes every time.
    """
    tokenizer = tiny_tokenizer(family, chat)
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    wide = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    }
    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "bert":
            model = transformers.BertModel(transformers.BertConfig(**common, **wide, num_attention_heads=4))
        elif family == "gpt2":
            config = transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=128)
            model = transformers.GPT2LMHeadModel(config)
        elif family == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **wide, **grouped))
        elif family == "qwen2":
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common, **wide, **grouped))
        else:
            raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family}")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def sha256_table(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a base that decides a token, as `model.sha256` wants it."""
    return pins_of(path)


@lru_cache(maxsize=1)
def _named() -> Path:
    """Return the directory in which this process and its children look up bases by name."""
    folder = tempfile.TemporaryDirectory(prefix="privet-test-bases-")
    atexit.register(folder.cleanup)
    os.environ[FOLDERS] = folder.name
    return Path(folder.name)


def name_of(base: Path) -> str:
    """Return a name of a base that leads to its directory in this process and its children."""
    name = f"{base.name}-{hashlib.sha256(str(base.resolve()).encode()).hexdigest()[:8]}"
    link = _named() / name
    if not link.is_symlink():
        link.symlink_to(base.resolve())
    return name


# --- studies ---------------------------------------------------------------------------------------------


def tiny_document(base: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study of `base` as plain values, with `overrides` laid over the defaults.

    An override is nested, `{"training": {"rounds": 3}}`, or dotted, `{"training.rounds": 3}`. Labels, columns
    and LoRA targets follow `task.kind` and the base's family where they are not given. Default: classify text
    with three labels, one site is enough, no privacy.
    """
    chosen = _nested(overrides)
    family = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    kind = chosen.get("task", {}).get("kind", "text-classification")
    labels = {"text-classification": LABELS, "token-classification": TAGS, "causal-lm": (), "preference": ()}[kind]
    document: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "model": {"base": name_of(base), "sha256": sha256_table(base)},
        "task": {"kind": kind, "labels": list(labels)},
        "data": {"columns": {role: role for role in ROLES[kind]}, "max_length": 32},
        "lora": {"rank": 4, "alpha": 8.0, "targets": TARGETS.get(family, [])},
        "training": {
            "learning_rate": 0.02,
            "rounds": 2,
            "local_steps": 3,
            "sampling_rate": 0.25,
        },
        "aggregation": {},
        "cohort": {"min_sites": 1},
        "privacy": {"mode": "none"},
        "secure_aggregation": {"mode": "plain"},
    }
    if "local_epochs" in chosen.get("training", {}):
        del document["training"]["local_steps"]
    if kind in GENERATING:
        document["task"]["max_new_tokens"] = 6
    return _merged(document, chosen)


def tiny_study(base: Path, **overrides: Any) -> Study:
    """Return a small valid study of `base`; see `tiny_document` for `overrides` and defaults."""
    return Study.parse(tiny_document(base, overrides))


def counting_document(base: Path, kind: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a study of `base` that trains nothing, as `tiny_document` does; `kind` is statistics or evaluate."""
    document = tiny_document(base, overrides)
    del document["training"]
    if kind == "statistics":
        del document["lora"]
    return {**document, "kind": kind}


def private(epsilon: float = 8.0, delta: float = 1e-3, clip_norm: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return a `privacy` table that promises (epsilon, delta) locally."""
    return {"mode": "local", "epsilon": epsilon, "delta": delta, "clip_norm": clip_norm, **more}


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in overrides.items():
        first, dot, rest = key.partition(".")
        inner = {rest: value} if dot else value
        if isinstance(inner, Mapping) and first not in _WHOLE:
            inner = _nested(inner)
        document = _merged(document, {first: inner})
    return document


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    shared = [key for key in over if key in under and _tables(under, over, key)]
    both = {key: _merged(under[key], over[key]) for key in shared}
    return {**under, **over, **both}


def _tables(under: dict[str, Any], over: dict[str, Any], key: str) -> bool:
    return isinstance(under[key], dict) and isinstance(over[key], dict) and key not in _WHOLE


# --- data ------------------------------------------------------------------------------------------------


def class_rows(count: int, seed: int = 0, labels: Sequence[str] = LABELS) -> list[Row]:
    """Return `count` different texts of 6 to 12 words with label and patient; two words tell the label.

    Labels take turns, and so do patients, each with three rows.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        label = labels[index % len(labels)]
        signs = _SIGNS.get(label) or _SIGNS[LABELS[labels.index(label) % len(LABELS)]]
        before = [str(word) for word in rng.choice(_FILLER, rng.integers(1, 5))]
        after = [_ORDER[int(digit)] for digit in f"{seed}{index}"]
        sign = str(rng.choice(signs))
        rows.append({"text": " ".join([*before, sign, *after]), "label": label, "patient": f"p{index // 3}"})
    return rows


def token_rows(count: int, seed: int = 0) -> list[Row]:
    """Return the sentences of `class_rows` as words with IOB2 tags; the sign is the entity."""
    signs = [sign.split() for found in _SIGNS.values() for sign in found]
    known = {word: tag for sign in signs for word, tag in zip(sign, TAGS[1:], strict=True)}
    rows = []
    for row in class_rows(count, seed):
        tokens = row["text"].split()
        tags = [known.get(token, "O") for token in tokens]
        rows.append({"tokens": tokens, "tags": tags, "patient": row["patient"]})
    return rows


def answer_rows(count: int, seed: int = 0) -> list[Row]:
    """Return the texts of `class_rows` as prompts, with the label's name as the answer."""
    rows = class_rows(count, seed)
    return [{"prompt": row["text"], "answer": row["label"], "patient": row["patient"]} for row in rows]


def pair_rows(count: int, seed: int = 0) -> list[Row]:
    """Return the texts of `class_rows` as prompts, with two answers that name the label: a mild one is preferred."""
    rows = class_rows(count, seed)
    pairs = [{"chosen": f"mild {row['label']}", "rejected": f"{row['label']} after work"} for row in rows]
    return [{"prompt": row["text"], **pair, "patient": row["patient"]} for row, pair in zip(rows, pairs, strict=True)]


def rows_for(study: Study, count: int, seed: int = 0) -> list[Row]:
    """Return rows that fit the study's task, with its labels; every row has a `patient`."""
    if study.task.kind == "text-classification":
        return class_rows(count, seed, study.task.labels)
    if study.task.kind == "preference":
        return pair_rows(count, seed)
    return token_rows(count, seed) if study.task.kind == "token-classification" else answer_rows(count, seed)


def records_of(study: Study, rows: Sequence[Row]) -> Records:
    """Return rows as records, as if read from a file but without cleaning; units are patients."""
    index = {label: position for position, label in enumerate(study.task.labels)}
    found: list[Row] = []
    for row in rows:
        kept = {role: row[column] for role, column in study.data.columns.items()}
        if "label" in kept:
            kept["label"] = index[kept["label"]]
        if "tags" in kept:
            kept["tags"] = [index[tag] for tag in kept["tags"]]
        found.append(kept)
    return Records(tuple(found), tuple(str(row.get("patient", i)) for i, row in enumerate(rows)))


def random_adapter(spec: AdapterSpec, seed: int = 0, scale: float = 0.3) -> Adapter:
    """Return an adapter with normal values everywhere, so that no gradient is zero by construction."""
    rng = np.random.default_rng(seed)
    values = {t.name: (scale * rng.standard_normal(t.shape)).astype(np.float32) for t in spec.tensors}
    return Adapter(spec, values)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON Lines and return `path`."""
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def site_toml(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    test_rows: Sequence[Mapping[str, Any]] | None = None,
    seed: int | None = 1,
    peers: Sequence[str] = (),
    limit: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write a site's data and its file `NAME.toml` into `folder`, and return the file.

    Args:
        seed: The site's `reproducible_seed`; None leaves it out, and randomness is secret.
        peers: Simulated sites of the same seed whose public keys the site pins.
        limit: What the site's dataset may spend; see `RECORDS`. A site without a seed gets a ledger, an identity and
            a log of its own, and a policy that leaves all to approvals.
        more: Further top-level keys, e.g. `declared_count=50`; `resources` is a table, `witnesses` the sites of the
            log, and `studies` the digests of those that the operator has approved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"{name}-train.jsonl", rows)
    keys: dict[str, Any] = {"name": name, "train": [f"{name}-train.jsonl"]}
    if test_rows is not None:
        write_rows(folder / f"{name}-test.jsonl", test_rows)
        keys["test"] = [f"{name}-test.jsonl"]
    if seed is not None:
        keys["reproducible_seed"] = seed
    else:
        keys |= {"dataset": "notes", "patient_column": "patient", **make_ledger(folder, name)}
        approve_studies(folder / f"{name}.approvals", more.pop("studies", ()))
        write_policy(folder / f"{name}.policy.toml")
        keys |= {"policy": f"{name}.policy.toml", "approvals": f"{name}.approvals"}
    witnesses = more.pop("witnesses", ())
    resources = {"device": "cpu", "precision": "fp32", **more.pop("resources", {})}
    # JSON's strings, numbers, booleans and arrays are TOML as well.
    lines = [f"{key} = {json.dumps(value)}" for key, value in {**keys, **more}.items()]
    lines += ["[resources]", *(f"{key} = {json.dumps(value)}" for key, value in resources.items())]
    if limit is not None:
        lines += ["[limit]", *(f"{key} = {json.dumps(value)}" for key, value in limit.items())]
    if peers:
        lines += ["[peers]", *(f'{peer} = "{public_key(simulated_identity(seed or 0, peer))}"' for peer in peers)]
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path if seed is not None else with_log(path, witnesses)


def make_ledger(folder: Path, name: str) -> dict[str, str]:
    """Create a site's ledger with its anchor, if there is none, and return the keys that name them in a site file."""
    (folder / "anchors").mkdir(exist_ok=True)
    keys = {"ledger": f"{name}.ledger", "anchor": f"anchors/{name}.json"}
    if not (folder / keys["ledger"]).exists():
        Ledger.create(folder / keys["ledger"], folder / keys["anchor"]).close()
    return keys


def site_of(file: Path) -> Site:
    """Return the site of a file: a simulated one where it sets a seed."""
    if "reproducible_seed" in file.read_text(encoding="utf-8"):
        return SimulatedSite(load_simulated(file))
    return RealSite(load_site(file))


def worker_of(file: Path) -> Worker:
    """Return a new worker for a site file."""
    return Worker(site_of(file))


def approve_studies(path: Path, digests: Sequence[str]) -> None:
    """Write a file of approvals."""
    path.write_text("".join(f"{digest} 2026-01-01T00:00:00+00:00 tiny\n" for digest in digests), encoding="utf-8")


def policy_document(**changes: Any) -> dict[str, Any]:
    """Return a policy that admits whatever a person approves, with dotted changes such as `model.max_rank`."""
    return _merged(
        {
            "version": 1,
            "approval": "person",
            "model": {"bases": "any", "targets": "any", "full_modules": [], "max_rank": 512},
            "tasks": {"allow": list(ROLES)},
            "privacy": {
                "required": False,
                "unit": "record",
                "max_epsilon": 100.0,
                "max_delta": 0.1,
                "min_noise_multiplier": 0.1,
                "max_clip_norm": 1e6,
                "max_epsilon_alone": "any",
                "min_units": 1,
            },
            "cohort": {"secure_aggregation": "optional", "min_sites": 1, "min_threshold": 1},
            "metrics": {"allow": ["validation"]},
            "limits": {
                "max_rounds": 100_000,
                "max_studies_per_day": 100,
                "max_upload_bytes": 2**40,
                "hours_utc": ["00:00-00:00"],
            },
        },
        _nested(changes),
    )


def write_policy(path: Path, **changes: Any) -> Path:
    """Write the policy that `policy_document` returns, and return the file."""
    document = policy_document(**changes)
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in document.items() if key not in tables]
    for name, rules in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in rules.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.chmod(0o644)
    return path
