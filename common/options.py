"""Arguments and options that several commands share, each with one name, one type and one help text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from privet.common.errors import StudyError
from privet.common.files import MAKES, most_like

StudyFile = Annotated[Path, typer.Argument(help="The study file (TOML).", metavar="STUDY")]
SimulatedStudy = Annotated[
    Path, typer.Argument(help="The study file (TOML), with a [simulation] table.", metavar="STUDY")
]


def require_study(path: Path) -> None:
    """Refuse a study file that is missing, before the imports that take seconds. Raises `StudyError`."""
    if not path.exists():
        raise StudyError(f"there is no study file at {path}", f"check the path{most_like(path)}; {MAKES['study']}")


def require_files(files: Iterable[Path], option: str) -> None:
    """Refuse data files that are missing, before the imports that take seconds. Raises `StudyError`."""
    for path in files:
        if not path.is_file():
            raise StudyError(f"{option}: there is no file {path}", f"check the path{most_like(path)}")


def site_file(path: Path) -> Path:
    """Return the site file that a path means: itself, or that of the site's directory, which may not exist yet."""
    named = not path.exists() and not path.suffix and not str(path).startswith("@")  # @FILE is a token
    return path / "site.toml" if path.is_dir() or named else path


def _format_file(path: Path | None) -> Path | None:
    return None if path is None else site_file(path)


FormatFile = Annotated[
    Path | None,
    typer.Option(
        "--format",
        help="Site file, or the site's directory: its [format] says how the data files are written.",
        metavar="SITE",
        show_default=False,
        callback=_format_file,
    ),
]
SiteFile = Annotated[
    Path,
    typer.Argument(help="The site file (TOML), or the site's directory.", metavar="SITE", callback=site_file),
]
RunPath = Annotated[Path, typer.Argument(help="A run directory.", metavar="RUN")]
PublicLog = Annotated[
    Path | None,
    typer.Option(
        help="Directory where the round log is published.  [default: RUN/public; for a run in a coordinator's "
        "directory, the directory's public]"
    ),
]
RunName = Annotated[
    str,
    typer.Argument(help="Name of a run of this coordinator, as `privet coordinator status` lists it.", metavar="RUN"),
]
BaseDirectory = Annotated[
    Path | None,
    typer.Option(
        "--base",
        help="Directory of the study's base model on this machine. Default: the directory of that name in "
        "PRIVET_BASES, or the installed package or cached model that the study names.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

# A coordinator's commands

HERE = Path()
Directory = Annotated[
    Path,
    typer.Option("--directory", "-C", help="The coordinator's directory, which `privet coordinator init` created."),
]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        envvar="PRIVET_PASSPHRASE_FILE",
        help="File that holds the passphrase of the coordinator's root key.",
    ),
]
RunMetricsPort = Annotated[
    int, typer.Option(help="Port number on 127.0.0.1 at which the run serves Prometheus metrics. 0: no metrics.")
]
GatherTime = Annotated[
    float,
    typer.Option(
        min=0,
        help="Number of seconds to wait until enough sites consent to the study, and until enough of them cosign the "
        "round log.",
    ),
]
RoundTime = Annotated[float, typer.Option(min=0, help="Number of seconds that sites have to train one round.")]
StepTime = Annotated[
    float,
    typer.Option(
        min=0, help="Number of seconds that sites have to answer each request of a round but training (--round-time)."
    ),
]

# Simulations

Workers = Annotated[
    int, typer.Option(min=1, help="Number of processes that train in parallel. Each holds the base model in memory.")
]
