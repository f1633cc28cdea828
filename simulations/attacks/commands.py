"""The commands that attack a run or a study."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privet.common.errors import StudyError
from privet.common.files import write_durably
from privet.common.options import Json, SimulatedStudy
from privet.common.progress import Say, closing, doing

if TYPE_CHECKING:
    from privet.client.training.data import Records
    from privet.common.study.study import Study
    from privet.simulations.attacks.arms import Workshop

Into = Annotated[
    Path | None,
    typer.Option(
        "--run", help="Run directory of this study. The result is saved there for `privet report`.", metavar="RUN"
    ),
]


@doing("Attacking {run}: membership inference with {shadows} shadow adapters")
def membership(
    run: Annotated[Path, typer.Argument(help="A finished run of `privet simulate`.", metavar="RUN")],
    shadows: Annotated[
        int, typer.Option(help="Number of adapters to train per study for comparison; even, and 4 or more.")
    ] = 4,
    most: Annotated[int, typer.Option(help="Largest number of records to attack. They are drawn at random.")] = 2000,
    as_json: Json = False,
) -> None:
    """Attack a run by membership inference: tell which records it was trained on.

    The two attacks are the loss threshold and LiRA. Both are compared with a baseline without protection. The study is
    trained again for one target and for each shadow adapter, on random halves of the records. The result is written to
    RUN/attacks/membership.json.
    """
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.attacks.arms import Workshop, read_sites
    from privet.simulations.attacks.membership import pool_of, run_membership
    from privet.simulations.runs.simulate import reopen

    simulated = reopen(run)
    study = simulated.plan.study
    pool = pool_of(read_sites(simulated.sites, study), read_sites(simulated.sites, study, part="test"))
    adapter = RunDirectory.open(run).load().adapter
    with TemporaryDirectory(prefix="privet-") as folder:
        workshop = Workshop(Path(folder), simulated.plan.simulation.resources)
        found = run_membership(workshop, study, pool, adapter, shadows=shadows, most=most, say=_say(as_json))
    _finish(found, study, run, as_json)


@doing("Auditing {study}: planting {count} canaries")
def canaries(
    study: SimulatedStudy,
    count: Annotated[
        int, typer.Option("--canaries", help="Number of canaries. Each enters the training with probability 1/2.")
    ] = 1000,
    epsilon: Annotated[
        list[float] | None,
        typer.Option(help="Epsilon to audit; give the option once for each. Default: that of the study."),
    ] = None,
    run: Into = None,
    as_json: Json = False,
) -> None:
    """Audit the epsilon of a study: measure a lower bound with planted records, the canaries.

    The study is trained once for each epsilon, and once as a baseline without protection. The method is the one-run
    audit of Steinke et al. (2023).
    """
    from privet.simulations.attacks.canaries import run_audit

    with _opened(study, run) as (workshop, parsed, sites, _):
        found = run_audit(workshop, parsed, sites, canaries=count, epsilons=epsilon or (), say=_say(as_json))
    _finish(found, parsed, run, as_json)


@doing("Attacking {study}: reading words out of updates")
def reconstruction(
    study: SimulatedStudy,
    rank: Annotated[
        int, typer.Option(help="Rank of the adapter. An update from fewer tokens than this reveals them.")
    ] = 64,
    sites: Annotated[int, typer.Option(help="Number of sites whose updates secure aggregation sums; 3 or more.")] = 5,
    epsilon: Annotated[float, typer.Option(help="Epsilon of the attacked update with differential privacy.")] = 8.0,
    run: Into = None,
    as_json: Json = False,
) -> None:
    """Attack a study by reconstruction: read the words of a record out of an update.

    The attack is tried on the update of one site without protection (the baseline), on the update of one site with
    privacy, and on the secure sum of several sites.
    """
    from privet.simulations.attacks.arms import pooled_records
    from privet.simulations.attacks.reconstruction import draw, exposed_study, run_reconstruction

    with _opened(study, run, precision="fp32") as (workshop, parsed, found_sites, _):
        secrets, others = draw(pooled_records(list(found_sites.values())), sites, parsed.seed)
        found = run_reconstruction(
            workshop, exposed_study(parsed, rank), secrets, others, epsilon=epsilon, say=_say(as_json)
        )
    _finish(found, parsed, run, as_json)


@doing("Attacking {study}: {malicious} of {sites} sites are malicious")
def poisoning(
    study: SimulatedStudy,
    sites: Annotated[
        int, typer.Option(help="Number of simulated sites, 4 or more. The defence 'groups' needs 30.")
    ] = 30,
    malicious: Annotated[int, typer.Option(help="Number of malicious sites; fewer than half of all sites.")] = 1,
    run: Into = None,
    as_json: Json = False,
) -> None:
    """Attack a study by poisoning: malicious sites send harmful updates, with and without the defences.

    They train on flipped labels, plant a backdoor, replace the model, or flip the sign of their update.
    """
    from privet.simulations.attacks.arms import pooled_records
    from privet.simulations.attacks.poisoning import deal_in_turn, poisoned_study, run_poisoning

    with _opened(study, run) as (workshop, parsed, found_sites, test):
        dealt = deal_in_turn(pooled_records(list(found_sites.values())), sites, parsed.seed)
        found = run_poisoning(
            workshop,
            poisoned_study(parsed, sites),
            dealt,
            pooled_records(list(test.values())),
            malicious=malicious,
            say=_say(as_json),
        )
    _finish(found, parsed, run, as_json)


@contextmanager
def _opened(
    file: Path, run: Path | None, precision: str | None = None
) -> Iterator[tuple[Workshop, Study, dict[str, Records], dict[str, Records]]]:
    """Open a study with the training and test records of its sites, in a temporary directory.

    Raises:
        StudyError: `run` is the run of another study.
    """
    from privet.client.site import Resources
    from privet.server.rounds.state import RunDirectory
    from privet.simulations.attacks.arms import Workshop, read_sites
    from privet.simulations.data.federation import load_plan, write_federation

    plan = load_plan(file)
    if run is not None and RunDirectory.open(run).study != plan.study:
        raise StudyError(
            f"--run: expected a run directory of the study {file}, but {run} is a run of another study",
            "name a run directory of this study, or leave --run out",
        )
    resources = plan.simulation.resources
    if precision is not None:
        resources = resources.model_copy(
            update={"precision": Resources.model_validate({"precision": precision}).precision}
        )
    with TemporaryDirectory(prefix="privet-") as folder:
        root = Path(folder)
        (root / "data").mkdir()
        files = write_federation(plan, root / "data")
        sites, test = read_sites(files, plan.study), read_sites(files, plan.study, part="test")
        yield Workshop(root, resources), plan.study, sites, test


def _say(as_json: bool) -> Say:
    return lambda line: None if as_json else typer.echo(line)


def _finish(found: dict[str, Any], study: Study, run: Path | None, as_json: bool) -> None:
    """Print a result, and write it to the run that it belongs to, with the digest of the attacked study."""
    from privet.simulations.attacks.labels import attack_sentence

    found = {**found, "attacked": study.digest}
    following = "to show the result in a report, name the study's run: add `--run RUN`"
    if run is not None:
        from privet.server.rounds.state import RunDirectory

        folder = RunDirectory.open(run).path / "attacks"
        folder.mkdir(exist_ok=True)
        file = folder / f"{found['attack']}.json"
        write_durably(file, (json.dumps(found, indent=2, sort_keys=True) + "\n").encode())
        following = f"show it in the report: `privet report {quote(str(run))}`"
        if not as_json:
            typer.echo(f"written  {file}")
    typer.echo(json.dumps(found) if as_json else closing(attack_sentence(found), following))
