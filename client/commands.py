"""Commands about bases and data files, for whoever writes a study or prepares a site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from privet.client.site import public_key, write_identity
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


def identity(
    file: Annotated[Path, typer.Argument(help="Where the private key goes, e.g. identity.pem; must not exist.")],
) -> None:
    """Make this site's identity key, and print the public key that the other sites pin.

    The private key never leaves the site. Tell the other operators the public key by a way that the coordinator
    cannot change; they list it in the [peers] table of their site files, and so does this site.
    """
    key = write_identity(file)
    typer.echo(public_key(key))


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
