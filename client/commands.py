"""Commands about bases and data files, for whoever writes a study or prepares a site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from privet.common.canonical import file_sha256
from privet.common.errors import StudyError
from privet.common.study import load_study


def base(
    directory: Annotated[Path, typer.Argument(help="A model directory with config.json and *.safetensors.")],
) -> None:
    """Print the [model] table that pins a base model in a study file."""
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise StudyError(
            f"{directory} has no *.safetensors file", "name a model directory; pickled weights are refused"
        )
    pinned = [
        *weights,
        *(f for f in (directory / "config.json", directory / "tokenizer.json") if f.is_file()),
    ]
    table = ", ".join(f"{json.dumps(file.name)} = {json.dumps(file_sha256(file))}" for file in pinned)
    typer.echo(f"[model]\nbase = {json.dumps(str(directory.resolve()))}\nsha256 = {{ {table} }}")


def data(
    study: Annotated[Path, typer.Argument(help="The study file whose data contract applies.")],
    files: Annotated[list[Path], typer.Argument(help="CSV, JSON Lines or Parquet files of one site.")],
) -> None:
    """Check a site's files against a study's data contract. Prints counts, never contents."""
    from privet.client.data import load_records

    contract = load_study(study)
    for file in files:
        _, report = load_records(file, contract)
        typer.echo("\n".join(report.lines()))
