"""The run directory: all files of a run, and the one file that it resumes from.

::

    study.json            the study, canonical
    state.safetensors     round, adapter, server optimizer, statements: the commit point of a round
    adapter/              the current adapter in PEFT's format
    rounds/0001.json ...  one statement per round
    averaged/0001.safetensors ...  the adapters of which the released one is the average, if it is one
    metrics.jsonl         one line per round
    waiting.json          while a coordinator plays the run: what it waits for
    withdrawn.json        if the coordinator withdrew the run: the reason

`state.safetensors` is replaced atomically. All other files are written from it, and written again on resume. A run
that is killed at any point therefore continues from the last closed round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from privet.common.audit.bundle import SOFTWARE
from privet.common.canonical import canonical_json, digest
from privet.common.errors import StateError, VerificationError
from privet.common.files import staged, write_durably
from privet.common.progress import in_directory
from privet.common.study.adapter import Adapter, AdapterSpec
from privet.common.study.average import AVERAGED, Mean, averaged_name
from privet.common.study.counts import check_measured
from privet.common.study.study import Study
from privet.server.rounds.folder import CONFIG, RESTORE, STATE, STUDY, RunFolder

TAKEN = "choose another directory with --out, or continue the run with --resume"
"""What to do where the directory of a new run exists already, for a command with these options."""


@dataclass(frozen=True)
class RunState:
    """The state that a run resumes from.

    Attributes:
        round: Last closed round; 0 before the first.
        optimizer: The server optimizer's settings and arrays.
        statements: One for each closed or aborted round, oldest first.
        best: Under early stopping: the lowest federated validation loss, the round that gave the adapter with this
            loss (0: the start adapter), and that adapter.
        stopped: Whether the run has ended, early or not.
        mean: Where the study publishes an average: that of the adapters so far which are part of it.
        part: The adapter after the last round if it is part of the average. It is stored in a file of its own.
    """

    round: int
    adapter: Adapter
    optimizer: tuple[Mapping[str, Any], Mapping[str, np.ndarray[Any, Any]]] | None = None
    statements: tuple[Mapping[str, Any], ...] = ()
    best: tuple[float, int, Adapter] | None = None
    stopped: bool = False
    mean: Mean | None = None
    part: Adapter | None = None


class RunDirectory(RunFolder):
    """An existing run directory, with its adapter."""

    @classmethod
    def create(cls, path: Path, study: Study, adapter: Adapter, peft_config: str, taken: str = TAKEN) -> RunDirectory:
        """Create the directory of a new run: complete, or not at all.

        Args:
            path: The directory.
            study: The study.
            adapter: The adapter that it starts from.
            peft_config: Text of its `adapter_config.json`.
            taken: What to do where `path` exists already.

        Raises:
            StateError: `path` exists already.
            StudyError: The study measures another adapter.
        """
        with staged(path, taken) as staging:
            cls.fill(staging, study, adapter, peft_config)
        return cls(path, study, peft_config)

    @classmethod
    def fill(cls, path: Path, study: Study, adapter: Adapter, peft_config: str) -> None:
        """Write a new run, before its first round, into the existing directory `path`.

        Raises:
            StudyError: The study measures another adapter.
        """
        check_measured(study, adapter)
        (path / STUDY).write_bytes(canonical_json(study.document()))
        (path / "adapter").mkdir()
        (path / "adapter" / CONFIG).write_text(peft_config, encoding="utf-8")
        cls(path, study, peft_config).commit(RunState(0, adapter))

    @property
    def deployed(self) -> bool:
        """Whether real sites run it: a coordinator has begun it, and keeps its software's list here."""
        return not self.simulated and (self.path / SOFTWARE).is_file()

    @property
    def withdrawn_begun(self) -> bool:
        """Whether the run was withdrawn after a round of it may have reached sites."""
        found = self._withdrawal()
        # An earlier version wrote no `begun`. The state counts no plain round that was aborted.
        return found is not None and (bool(found.get("begun")) or bool(self.load().statements))

    def load(self) -> RunState:
        """Read the state of the last closed round.

        Raises:
            StateError: The state cannot be read.
            VerificationError: It belongs to another study.
        """
        file = self.path / STATE
        try:
            with safe_open(file, framework="numpy") as opened:
                text, seal = opened.metadata()["state"], opened.metadata()["seal"]
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StateError(f"{file} cannot be read ({type(error).__name__})", RESTORE) from None
        if seal != _seal(text, arrays):
            raise StateError(f"{file} is damaged: its content does not match the digest in it", RESTORE)
        meta = json.loads(text)
        if meta["study"] != self.study.digest:
            raise VerificationError(
                f"{file}: the run directory has study {self.study.digest}, but this state is of study {meta['study']}"
            )
        spec = AdapterSpec.parse(meta["spec"])
        optimizer = None if meta["optimizer"] is None else (meta["optimizer"], _part(arrays, "optimizer/"))
        best = meta["best"] and (
            float(meta["best"][0]),
            int(meta["best"][1]),
            Adapter(spec, _part(arrays, "best/")),
        )
        return RunState(
            round=meta["round"],
            adapter=Adapter(spec, _part(arrays, "adapter/")),
            optimizer=optimizer,
            statements=tuple(meta["statements"]),
            best=best or None,
            stopped=meta["stopped"],
            mean=None if meta.get("mean") is None else Mean(float(meta["mean"]), _part(arrays, "mean/")),
        )

    def commit(self, state: RunState) -> None:
        """Make a closed round durable, then publish it."""
        self.store(state)
        self.publish(state, every=False)

    def store(self, state: RunState) -> None:
        """Make a closed round durable. Readers do not see it yet."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        arrays |= {f"adapter/{name}": value for name, value in state.adapter.values.items()}
        if state.optimizer is not None:
            arrays |= {f"optimizer/{name}": value for name, value in state.optimizer[1].items()}
        if state.best is not None:
            arrays |= {f"best/{name}": value for name, value in state.best[2].values.items()}
        if state.mean is not None:
            arrays |= {f"mean/{name}": value for name, value in state.mean.values.items()}
        if state.part is not None:
            # Before the state: an auditor computes the average again from these files.
            (self.path / AVERAGED).mkdir(exist_ok=True)
            write_durably(self.path / averaged_name(state.round), state.part.data)
        meta = {
            "round": state.round,
            "study": self.study.digest,
            "spec": state.adapter.spec.document(),
            "optimizer": None if state.optimizer is None else dict(state.optimizer[0]),
            "statements": list(state.statements),
            "best": None if state.best is None else list(state.best[:2]),
            "stopped": state.stopped,
            **({} if state.mean is None else {"mean": state.mean.weight}),
        }
        # One file for everything, replaced in one step: adapter, momenta and statements are always of the same round.
        # Contiguous, so that the seal is computed over the bytes that the file gets.
        arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        text = json.dumps(meta)
        write_durably(self.path / STATE, save(arrays, {"state": text, "seal": _seal(text, arrays)}))

    def publish(self, state: RunState, *, every: bool) -> None:
        """Write the files for readers from the committed state: the last statement, or with `every` all of them."""
        (self.path / "rounds").mkdir(exist_ok=True)
        for statement in state.statements if every else state.statements[-1:]:
            name = f"{statement['round']:04d}.json"
            write_durably(self.path / "rounds" / name, canonical_json(statement) + b"\n")
        # The whole file each time: an append that a crash has cut would leave half a line.
        lines = [json.dumps(metrics_of(statement)) + "\n" for statement in state.statements]
        write_durably(self.path / "metrics.jsonl", "".join(lines).encode())
        # The weights last: readers that see a new adapter find its statement.
        write_durably(self.path / "adapter" / CONFIG, self.peft_config.encode())
        write_durably(self.path / "adapter" / "adapter_model.safetensors", state.adapter.data)


def unfinished(run: RunDirectory) -> str:
    """Return what to do where a run is not finished: only a simulation goes on without its coordinator."""
    if run.simulated:
        return f"run `privet simulate --resume {quote(str(run.path))}`"
    path = run.path.resolve()
    home = (
        path.parent.parent if (path.parent.parent / "coordinator.toml").is_file() else Path()
    )  # a copy lies elsewhere
    return in_directory(f"at its coordinator, run `privet coordinator resume {quote(path.name)}`", home)


def metrics_of(statement: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round's line in `metrics.jsonl`: what it took, what it cost, and what the sites measured together."""
    privacy = statement.get("privacy")
    spent = {"epsilon": max(privacy["epsilon"].values(), default=0.0)} if privacy else {}
    told = {name: statement[name] for name in ("round", "type", "seconds") if name in statement}
    return told | {"sites": len(statement.get("survivors", ()))} | spent | (statement["metrics"] or {})


def _seal(text: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Return a digest of a state's content: storage may return wrong bytes without an error."""
    parts = [text.encode()]
    for name, array in sorted(arrays.items()):
        parts += [f"{name} {array.dtype} {array.shape}".encode(), array.tobytes()]
    return digest(b"\0".join(parts))


def _part(arrays: Mapping[str, np.ndarray[Any, Any]], prefix: str) -> dict[str, np.ndarray[Any, Any]]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
