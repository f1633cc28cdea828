"""The command that writes a dossier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from privet.common.options import PublicLog
from privet.common.progress import closing, doing


@doing("Verifying {run}, and writing its dossier")
def dossier(
    run: Annotated[Path, typer.Argument(help="A run directory, or a bundle.", metavar="RUN")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The directory to write; it must not exist.  [default: dossier in the run directory; of a bundle, "
            "NAME-dossier here]"
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            help="A C2SP policy file: the log and the witnesses that you trust.  [default: the one beside the run's "
            "log; a bundle has none]"
        ),
    ] = None,
    public: PublicLog = None,
) -> None:
    """Write the dossier of a run: documents for regulators and review boards, each sentence with its source.

    RUN is a run of a simulation or of a coordinator, or a bundle. The command verifies it first. If anything was
    changed, it writes nothing and ends with exit code 5. What privet does not know is a gap, which says who has to
    state it. A dossier finds no conformity with any law.
    """
    from privet.common.canonical import digest
    from privet.common.files import staged, write_durably
    from privet.simulations.dossier.evidence import gather, is_bundle
    from privet.simulations.dossier.folder import INDEX, WHOLE, documents, dossier_files, first_page

    evidence = gather(run, policy, public)
    target = out or (Path(f"{run.stem}-dossier") if is_bundle(run) else run / "dossier")
    files = dossier_files(evidence)
    with staged(target, "choose another directory with --out") as staging:
        for name, data in files.items():
            file = staging / name
            file.parent.mkdir(parents=True, exist_ok=True)
            write_durably(file, data, 0o644)
    made = documents(evidence)
    said = [sentence for each in (first_page(evidence), *made) for sentence in each.sentences()]
    gaps = sum(each.gap is not None for each in said)
    typer.echo(f"SHA-256 of {WHOLE}, which has those of all other files: {digest(files[WHOLE])}")
    typer.echo(
        closing(
            f"{target}: {len(said)} sentences in {len(made)} documents, each with its source; {gaps} of "
            "them are gaps that others have to fill",
            f"open {target / INDEX} in a browser",
        )
    )
