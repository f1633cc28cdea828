"""Simulate a study: the federation and its baselines, through the same code paths as a deployment."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from privet.client.bases.names import keep_bases
from privet.client.release.opened import open_release
from privet.client.training.model import initial_adapter, peft_config_text
from privet.client.training.scores import binomial_interval
from privet.common.audit.bundle import check_bundle
from privet.common.audit.counts import COUNTS, counts_document
from privet.common.audit.egress import check_kept
from privet.common.audit.release import ADAPTER, STUDY
from privet.common.canonical import canonical_json
from privet.common.errors import DivergedError, PrivetError, ProtocolError, StateError, StudyError
from privet.common.files import staged, write_durably
from privet.common.log.agreement import RoundStatement
from privet.common.log.checkpoint import Policy
from privet.common.privacy.accounting import PrivacyPlan
from privet.common.privacy.accounting import plan as privacy_plan
from privet.common.progress import Tell, silent
from privet.common.study.adapter import Adapter, read_layout
from privet.common.study.sections import CohortSection, SecureAggregationSection
from privet.common.study.study import Study
from privet.server.app import LOG, PUBLIC, opened_log
from privet.server.exchange import Exchange
from privet.server.log.keys import POLICY
from privet.server.rounds.archive import bundle_files
from privet.server.rounds.rounds import run_study
from privet.server.rounds.state import TAKEN, RunDirectory, RunState
from privet.server.rounds.timing import Timing
from privet.simulations.data.federation import (
    Plan,
    lay_out,
    load_plan,
    plan_of_run,
    site_files,
    write_pooled_site,
)
from privet.simulations.engines.activations import remembering
from privet.simulations.engines.choice import check_engine
from privet.simulations.engines.crew import Crew, crew_of
from privet.simulations.engines.evaluation import PRIMARY, Evaluator, open_evaluator
from privet.simulations.engines.memory import DataPool, Fleet, Stopwatch, open_fleet, peak_memory_mb
from privet.simulations.runs.continued import continuation, keep_parent
from privet.simulations.runs.inspection import inspect
from privet.simulations.runs.own_records import better_together, own_records, training_records
from privet.simulations.runs.personal import run_personal
from privet.simulations.scenarios.conditions import exchange_of, scenario_document
from privet.simulations.scenarios.malicious import backdoor_success, choose_liars

FEDERATED = "federated"
# Baselines at once per process. Each trains in one process; those of the same process take turns.
_ARMS = 4


@dataclass(frozen=True)
class RoundReport:
    """Report to a watcher that a round has closed.

    Attributes:
        arm: The federation or a baseline, by name.
        round: Number of the round, from 1.
        rounds: Number of rounds of the study.
        sites: Sites whose updates are in the round.
        epsilon: Largest epsilon that any site has spent; None if the study is not private.
        metrics: Metrics on the test records; None if the round was not evaluated.
        training: What the round's training took; None for a baseline.
    """

    arm: str
    round: int
    rounds: int
    sites: int
    epsilon: float | None
    metrics: Mapping[str, float] | None
    training: Mapping[str, Any] | None = None


Watcher = Callable[[RoundReport], None]


@dataclass(frozen=True)
class Simulated:
    """A simulation on disk, ready to run or resume."""

    path: Path
    plan: Plan
    pool: DataPool = field(default_factory=DataPool, compare=False, repr=False)
    tests: Evaluator | None = field(default=None, compare=False, repr=False)

    @property
    def sites(self) -> list[Path]:
        """The site files, in order of their names."""
        return site_files(self.path)

    def fleet(self) -> Fleet:
        """Return the workers of all sites, including the malicious sites of the scenario."""
        files = self.sites
        liars = choose_liars(self.plan.simulation.malicious, [file.stem for file in files], self.plan.study.seed)
        return open_fleet(files, self.pool, liars)

    def evaluator(self) -> Evaluator:
        """Return the evaluator for the test records of all sites."""
        return self.tests or open_evaluator(self.plan.study, self.sites)


def prepare(
    study_file: Path, out: Path, start: Path | None = None, say: Callable[[str], None] = lambda line: None
) -> Simulated:
    """Check all that can be checked before training, and create the run directory.

    Args:
        study_file: The study file, with its `[simulation]` table.
        out: Path of the run directory; it must not exist.
        start: Run whose released adapter training starts from; None for a new adapter.
        say: Receives lines about the files of the sites.

    Raises:
        StudyError, DataError, RefusedError, VerificationError, StateError: A check failed. Nothing is left at `out`.
    """
    plan, out, pool = load_plan(study_file), out.resolve(), DataPool()
    # Everything is written beside `out` and moved there at the end, so that a failed check leaves nothing behind.
    with staged(out, TAKEN) as directory:
        for line in plan.lines():
            say(line)
        shutil.copyfile(study_file, directory / "study.toml")
        keep_bases(directory, plan.simulation.resources.bases)
        files = lay_out(plan, directory, say)
        evaluator = inspect(plan, files, pool, say, lambda line: say(f"WARNING: {line}"))
        adapter = initial_adapter(plan.study, evaluator.host) if start is None else released(start, evaluator)
        RunDirectory.fill(directory, plan.study, adapter, peft_config_text(evaluator.host, plan.study))
        if start is not None and not _is_peft(start):
            keep_parent(directory, start)
    return Simulated(out, plan, pool, evaluator)


@contextmanager
def keeping_only_progress(simulated: Simulated) -> Iterator[None]:
    """Remove the directory of a run if the block fails before a round has closed."""
    try:
        yield
    except PrivetError:
        if RunDirectory.open(simulated.path).load().round == 0:
            shutil.rmtree(simulated.path)
        raise


def released(run: Path, evaluator: Evaluator) -> Adapter:
    """Return the adapter that an earlier run released, or that a directory in PEFT's format holds.

    Args:
        run: The run, or the directory.
        evaluator: Of a study with the same base and adapter layout.

    Raises:
        StateError: `run` is not a run directory, or its adapter has another layout.
        RefusedError: It is a coordinator's run whose gate withholds the adapter.
    """
    if _is_peft(run) and run.resolve().name == "adapter" and (run.resolve().parent / STUDY).is_file():
        return released(run.resolve().parent, evaluator)  # the folder in a run, which has the study and the gate
    if _is_peft(run):
        data = (run / ADAPTER).read_bytes()
        adapter = Adapter.read(read_layout(data), data)
        if (run / STUDY).is_file():
            open_release(run)  # a release or a candidate, which says whether it may be used
    else:
        found = RunDirectory.open(run)
        adapter = found.load().adapter
        if not found.simulated:  # of a simulation, whose sites sign nothing, the candidate is the researcher's own
            check_kept(found.study, adapter.digest, run)
    if adapter.spec != evaluator.host.spec:
        raise StateError(
            f"--continue-from: the adapter of {run} does not fit this study: its tensors have other names or shapes",
            "give this study the same base model, labels and [lora] table as that run's study",
        )
    return adapter


def _is_peft(path: Path) -> bool:
    """Whether a directory holds an adapter in PEFT's format, and not a run."""
    return (path / ADAPTER).is_file()


def reopen(path: Path) -> Simulated:
    """Open the run directory of a simulation.

    Raises:
        StateError: `path` is not the run directory of a simulation.
        StudyError: Its study file has changed since the run began.
    """
    path = path.resolve()
    run = RunDirectory.open(path)
    if not (path / "study.toml").is_file():
        raise StateError(
            f"{path} is not the run directory of a simulation: it has no study.toml",
            "name a directory that `privet simulate` made",
        )
    plan = plan_of_run(path, run.study)
    if plan.study != run.study:
        raise StudyError(
            f"{path}/study.toml was changed: it is no longer the study that this run began with",
            "restore the file, or simulate the new study in another directory",
        )
    return Simulated(path, plan)


def finished(simulated: Simulated) -> dict[str, Any] | None:
    """Return the summary of a simulation that completed, as its directory holds it; None if there is work left."""
    try:
        summary = json.loads((simulated.path / "summary.json").read_text(encoding="utf-8"))
        own = summary["study_digest"] == simulated.plan.study.digest
        completed = summary.get("outcome", {}).get("ended", "completed") == "completed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it is written anew
        return None
    return summary if own and completed else None


def run_simulation(
    simulated: Simulated,
    watch: Watcher = lambda report: None,
    engine: str = "memory",
    workers: int = 1,
    tell: Tell = silent,
) -> dict[str, Any]:
    """Run or resume the federation on an engine, then its baselines in memory; write and return the summary.

    Args:
        simulated: The simulation.
        watch: Receives a report of each closed round.
        engine: One of `choice.ENGINES`.
        workers: Processes that train, each with the base in memory; 1 trains in this process.
        tell: Receives what is being done besides rounds.

    Raises:
        StudyError: The engine does not support the scenario or several workers.
        PrivetError: A round failed.
    """
    started = time.perf_counter()
    plan, path = simulated.plan, simulated.path
    if engine == "ray" and (plan.simulation.hostile or plan.simulation.network or plan.simulation.curious):
        raise StudyError(
            "--engine: the study simulates faults, malicious sites, a network or a curious coordinator; "
            "these need the memory engine, got ray",
            "leave --engine out",
        )
    check_engine(engine, workers)
    if engine == "ray" and plan.study.secure_aggregation.block is not None:
        raise StudyError(
            "--engine: Ray's sites keep nothing between two rounds, which secure_aggregation.block of the study needs",
            "leave --engine out",
        )
    tell("loading the base and the test records", 0, None)
    evaluator = simulated.evaluator()
    fleet = simulated.fleet()
    workers = min(workers, len(simulated.sites))
    # Rounded upwards, as 0 switches remembering off, which changes the computation (padding included) and so the bits.
    megabytes = -(-plan.simulation.activations_mb // (workers + 1 if workers > 1 else 1))
    if plan.study.counts:  # one pass over the records at most
        megabytes = 0
    with remembering(evaluator.host, plan.study, megabytes), crew_of(workers, megabytes) as crew:
        curve = _Curve(path, plan, evaluator, watch, fleet.watch)
        if plan.study.counts:
            tell("counting", 0, None)
            state, outcome = _federate(simulated, fleet, curve, engine, crew)
            return _counted(simulated, fleet, state, outcome, started)
        tell("evaluating the base before training", 0, None)
        before = evaluator.metrics(evaluator.tallies(initial_adapter(plan.study, evaluator.host)))
        tell("training", 0, None)
        state, outcome = _federate(simulated, fleet, curve, engine, crew)
        trained = fleet.watch.seconds
        arms = {FEDERATED: state.adapter, **run_baselines(simulated, evaluator, curve, crew)}
        memory = 0 if crew is None else crew.peak_memory_mb()
        personal = None
        if "personal" in plan.simulation.baselines:
            personal = run_personal(path, plan.study, simulated.sites, evaluator, state.adapter, tell)
        summary = summarise(simulated, evaluator, state, arms, before, tell)
        continued = continuation(path, plan.study, evaluator, state.adapter, tell)
        if any(entry.attack == "backdoor" for entry in plan.simulation.malicious):
            summary["backdoors"] = backdoor_success(evaluator, state.adapter, plan.simulation.malicious)
    if personal is not None:
        summary["personal"] = personal
    if continued is not None:
        summary["continued"] = continued
    summary["outcome"] = outcome
    summary["scenario"] = scenario_document(plan, fleet, path)
    summary["curve"] = curve.points
    summary["training_seconds"] = round(trained, 1)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    summary["peak_memory_mb"] = memory + peak_memory_mb()
    write_durably(path / "summary.json", (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode())
    return summary


def _counted(
    simulated: Simulated, fleet: Fleet, state: RunState, outcome: Mapping[str, Any], started: float
) -> dict[str, Any]:
    """Write and return the summary of a study that counts."""
    plan, path = simulated.plan, simulated.path
    study = plan.study
    document = counts_document(study, state.statements)
    write_durably(path / COUNTS, canonical_json(document) + b"\n")
    summary = {
        "study": study.name,
        "study_digest": study.digest,
        "adapter_digest": state.adapter.digest,
        "counts": document,
        "rounds": state.round,
        "epsilon": spent(state.statements[-1]) if state.statements else None,
        "privacy": _mechanism(privacy_plan(study)),
        "secure_aggregation": study.secure_aggregation.mode,
        "log_verified": log_verified(RunDirectory.open(path)),
        "outcome": outcome,
        "scenario": scenario_document(plan, fleet, path),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mb": peak_memory_mb(),
    }
    write_durably(path / "summary.json", (json.dumps(summary, indent=2, sort_keys=True) + "\n").encode())
    return summary


def _federate(
    simulated: Simulated, fleet: Fleet, curve: _Curve, engine: str, crew: Crew | None
) -> tuple[RunState, dict[str, str | int | None]]:
    """Run the federation. With drop-outs or malicious sites, an early end is a result and not an error."""
    run, plan = RunDirectory.open(simulated.path), simulated.plan
    ended, reason = "completed", None
    if engine == "ray":
        from privet.simulations.engines.ray import run_with_ray

        run_with_ray(simulated.path, simulated.path / "sites", nodes=len(simulated.sites))
        state = run.load()
        curve.observe(FEDERATED)(state.statements[-1], state.adapter)
    else:
        inner = fleet.exchange() if crew is None else crew.exchange(fleet, plan.study)
        exchange = exchange_of(plan, fleet, inner, simulated.path, run.load().round)
        try:
            run_over(run, exchange, curve.observe(FEDERATED))
        except (ProtocolError, DivergedError) as error:
            if not plan.simulation.hostile:
                raise
            ended, reason = type(error).__name__, error.message
    state = run.load()
    aborted = sum(statement["type"] == "round-abort" for statement in state.statements)
    return state, {"ended": ended, "reason": reason, "aborted_rounds": aborted}


def run_over(run: RunDirectory, exchange: Exchange, observe: Callable[[RoundStatement, Adapter], None]) -> RunState:
    """Run one study directory over an exchange in this process. All sites are there, so the gathering time is 0."""
    with opened_log(run, run.path / LOG, run.study.name) as log:
        return run_study(log, exchange, observe, Timing(gathering=0.0))


def run_arm(
    run: RunDirectory, sites: Sequence[Path], name: str, observe: Callable[[RoundStatement, Adapter], None]
) -> RunState:
    """Run one study directory over the given sites, in this process."""
    return run_over(run, open_fleet(sites, DataPool()).exchange(), observe)


def run_baselines(
    simulated: Simulated, evaluator: Evaluator, curve: _Curve, crew: Crew | None = None
) -> dict[str, Adapter]:
    """Train each site alone and all data pooled, with the same study, steps and privacy, but other sites."""
    plan = simulated.plan
    arms: dict[str, list[Path]] = {}
    if "local" in plan.simulation.baselines:
        arms |= {f"local-{file.stem}": [file] for file in simulated.sites}
    if "pooled" in plan.simulation.baselines:
        pooled = simulated.path / "baselines" / "pooled.toml"
        pooled.parent.mkdir(exist_ok=True)
        arms["pooled"] = [write_pooled_site(simulated.sites, pooled, plan)]
    # With a single site there is no sum to hide in and no one to share noise with, and the site holds all records: so
    # no masks, all noise at the site, and no bound on the declared count.
    update: dict[str, Any] = {
        "cohort": CohortSection(min_sites=1),
        "secure_aggregation": SecureAggregationSection(mode="plain"),
        "aggregation": plan.study.aggregation.model_copy(update={"largest_count": 2**48 - 1}),
    }
    if plan.study.distributed:
        own = {"mode": "local", "noise": "independent", "band": None}
        update["privacy"] = plan.study.privacy.model_copy(update=own)
    alone = plan.study.model_copy(update=update)
    exchanges: dict[str, Exchange] = {}
    for name, files in arms.items():
        directory = simulated.path / "baselines" / name
        # After an interruption the directory is there, and its run is resumed.
        if not directory.exists():
            adapter = initial_adapter(plan.study, evaluator.host)
            RunDirectory.create(directory, alone, adapter, peft_config_text(evaluator.host, alone))
        fleet = open_fleet(files, simulated.pool)
        exchanges[name] = fleet.exchange() if crew is None else crew.exchange(fleet, alone)

    def train(name: str) -> Adapter:
        run = RunDirectory.open(simulated.path / "baselines" / name)
        return run_over(run, exchanges[name], curve.observe(name)).adapter

    if crew is None:
        return {name: train(name) for name in arms}
    with ThreadPoolExecutor(_ARMS * crew.processes) as threads:  # These threads only wait; the crew's processes train.
        try:
            trained = {name: threads.submit(train, name) for name in arms}
            for future in wait(trained.values(), return_when=FIRST_EXCEPTION).done:
                future.result()
            return {name: future.result() for name, future in trained.items()}
        except BaseException:  # Also on Ctrl-C: without a stop, the pool would wait for the last round.
            crew.stop()
            raise


class _Curve:
    """Evaluates the federated adapter when rounds close, and keeps the results on disk for a resumed run."""

    def __init__(self, folder: Path, plan: Plan, evaluator: Evaluator, watch: Watcher, stopwatch: Stopwatch) -> None:
        self._curve, self._training = folder / "curve.jsonl", folder / "training.jsonl"
        self._plan, self._evaluator, self._watch, self._stopwatch = plan, evaluator, watch, stopwatch
        self._before = stopwatch.copy()
        self.points, self._trained = _lines(self._curve), _lines(self._training)

    def observe(self, arm: str) -> Callable[[RoundStatement, Adapter], None]:
        def closed(statement: RoundStatement, adapter: Adapter) -> None:
            rounds = self._plan.study.rounds
            due = statement["round"] % self._plan.simulation.evaluate_every == 0 or statement["round"] == rounds
            metrics, training = None, None
            if arm == FEDERATED:
                training = training_line(self._plan.study, statement, self._stopwatch.since(self._before))
                self._before = self._stopwatch.copy()
                self._trained = _replaced(self._training, self._trained, training)
            if arm == FEDERATED and due and self._evaluator.records and not self._plan.study.counts:
                tallies = self._evaluator.tallies(adapter, self._plan.simulation.test_records)
                metrics = self._evaluator.metrics(tallies)
                point = {"round": statement["round"], "epsilon": spent(statement), **metrics}
                self.points = _replaced(self._curve, self.points, point)
            sites = len(statement["survivors"])
            self._watch(RoundReport(arm, statement["round"], rounds, sites, spent(statement), metrics, training))

        return closed


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _replaced(file: Path, lines: list[dict[str, Any]], line: dict[str, Any]) -> list[dict[str, Any]]:
    """Write a round's line. A resumed run closes a round again: the new line replaces the old and all later ones."""
    kept = [earlier for earlier in lines if earlier["round"] < line["round"]] + [line]
    write_durably(file, "".join(json.dumps(each) + "\n" for each in kept).encode())
    return kept


def training_line(study: Study, statement: RoundStatement, took: Stopwatch) -> dict[str, Any]:
    """Return a round's line in `training.jsonl`: tokens, seconds by phase, and the loss where no privacy is promised.

    A deployed site keeps these numbers to itself. Here they are of all sites together.
    """
    meter, measured = took.meter, sum(took.meter.seconds.values())
    seconds = {**meter.seconds, "other": max(0.0, took.seconds - measured)}
    line: dict[str, Any] = {
        "round": statement["round"],
        "tokens": meter.tokens,
        "tokens_per_second": round(meter.tokens / took.seconds, 1) if took.seconds else None,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    return line if study.private else line | {"loss": meter.mean_loss}


def spent(statement: RoundStatement) -> float | None:
    """Return the largest epsilon that any site has spent; None if the study is not private."""
    return None if statement["privacy"] is None else max(statement["privacy"]["epsilon"].values())


def summarise(
    simulated: Simulated,
    evaluator: Evaluator,
    state: RunState,
    arms: Mapping[str, Adapter],
    before: Mapping[str, float],
    tell: Tell = silent,
) -> dict[str, Any]:
    """Return the results.

    These are the primary metric of the federation and of each baseline on the test records of all sites, and by site on
    its own test records.
    """
    study, simulation = simulated.plan.study, simulated.plan.simulation
    primary = PRIMARY[study.task.kind]
    tallies = {}
    for number, (name, adapter) in enumerate(arms.items()):
        tell("evaluating", number, len(arms))
        tallies[name] = evaluator.tallies(adapter)
    tell("verifying the round log", 0, None)
    metrics = {"before": before, **{name: evaluator.metrics(sites) for name, sites in tallies.items()}}
    scores = {name: values[primary] for name, values in metrics.items()}
    local = {name.removeprefix("local-"): score for name, score in scores.items() if name.startswith("local-")}
    alone = {site: tallies[f"local-{site}"][site] for site in local if site in tallies[FEDERATED]}
    own = own_records(tallies[FEDERATED], alone, study.task.labels, primary)
    final = {**evaluator.metrics(tallies[FEDERATED])}
    if simulation.answers and study.task.generates:
        final |= evaluator.answers(arms[FEDERATED], simulation.answers)
    mechanism = privacy_plan(study)
    return {
        "study": study.name,
        "study_digest": study.digest,
        "adapter_digest": state.adapter.digest,
        "metric": primary,
        primary: {
            "before": before[primary],
            "federated": scores[FEDERATED],
            "local": local,
            "local_mean": sum(local.values()) / len(local) if local else None,
            "pooled": scores.get("pooled"),
        },
        "intervals": {n: binomial_interval(m["accuracy"] * m["records"], m["records"]) for n, m in metrics.items()}
        if primary == "accuracy"
        else {},
        "federated": final,
        "federated_per_site": {s: t.metrics(study.task.labels) for s, t in tallies[FEDERATED].items()},
        "own_records": own,
        "better_together": better_together(own, primary),
        "training_records": training_records(study, simulated.sites),
        "rounds": state.round,
        "epsilon": spent(state.statements[-1]) if state.statements else None,
        "privacy": _mechanism(mechanism),
        "secure_aggregation": study.secure_aggregation.mode,
        "log_verified": log_verified(RunDirectory.open(simulated.path)),
    }


def log_verified(run: RunDirectory) -> bool | None:
    """Verify the round log of a run and its files as an auditor does; return None if the run keeps no log."""
    if not (run.path / PUBLIC).is_dir():
        return None
    policy = Policy.parse((run.path / LOG / POLICY).read_text(encoding="utf-8"))
    return check_bundle(bundle_files(run, run.path / PUBLIC, with_weights=run.study.gate is None), policy).ok


def _mechanism(mechanism: PrivacyPlan | None) -> dict[str, Any] | None:
    if mechanism is None:
        return None
    return {"delta": mechanism.delta, "target": mechanism.target, "training": mechanism.training.document()}
