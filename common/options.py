"""Arguments and options that several commands share, each with one name, one type and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

StudyFile = Annotated[Path, typer.Argument(help="The study file (TOML).", metavar="STUDY")]
SimulatedStudy = Annotated[
    Path, typer.Argument(help="The study file (TOML), with a [simulation] table.", metavar="STUDY")
]
SiteFile = Annotated[Path, typer.Argument(help="The site file (TOML).", metavar="SITE")]
RunPath = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
RunName = Annotated[str, typer.Argument(help="Name of a run of this coordinator.", metavar="RUN")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

# A coordinator's commands

HERE = Path()
Directory = Annotated[Path, typer.Option("--directory", "-C", help="The coordinator's directory.")]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", envvar="PRIVET_PASSPHRASE_FILE", help="File that holds the passphrase of the root key."
    ),
]
RunMetricsPort = Annotated[
    int, typer.Option(help="Port on 127.0.0.1 that serves the run's Prometheus metrics. 0: none.")
]
GatherTime = Annotated[
    float, typer.Option(help="Seconds to wait for enough sites to consent, and for enough of them to cosign.")
]
RoundTime = Annotated[float, typer.Option(help="Seconds in which sites must train a round.")]
StepTime = Annotated[float, typer.Option(help="Seconds in which sites must answer any other request of a round.")]

# Simulations

Workers = Annotated[int, typer.Option(min=1, help="Processes that train. Each holds the base model in memory.")]
