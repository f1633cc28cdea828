"""The status of a coordinator, read from its directory: members, connections, runs."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from privet.server.consortium.coordinator import Coordinator
from privet.server.network.nodes import listens
from privet.server.network.service import link_of, owners_of
from privet.server.rounds.folder import run_paths, spent
from privet.server.rounds.quality import quality
from privet.server.rounds.state import RunDirectory
from privet.server.rounds.wait import Wait, details, sentence

_WIDTH = 80
_LABEL = 12
_SHORT = 19
"""Characters of a digest that are shown: its name, and 12 digits."""


def consortium_status(made: Coordinator) -> dict[str, Any]:
    """Return the status as a JSON document: members, connected nodes, statements for the log, runs."""
    link = link_of(made.directory)
    serving = listens(made.settings)  # without the service, the link state names nodes of a minute ago
    nodes = [node for node in link.nodes() if node.online and serving]
    owners = owners_of(made, link)
    rows = made.members.rows()
    return {
        "consortium": made.settings.name,
        "founded": made.members.founded(),
        "members": [row.keys.site for row in rows if row.state == "member"],
        "connected": sorted({owners[node.id] for node in nodes if node.id in owners}),
        "asking": [row.keys.site for row in rows if row.state == "pending"],
        "serving": serving,
        "nodes_online": len({node.public_key for node in nodes}),
        "statements_waiting": len(made.members.statements()),
        "runs": [run_status(path) for path in run_paths(made.directory)],
    }


def run_status(path: Path) -> dict[str, Any]:
    """Return the status of one run."""
    directory = RunDirectory.open(path)
    state, wait = directory.load(), directory.waiting
    ends = [statement["type"] for statement in state.statements]
    return {
        "run": path.name,
        "round": state.round,
        "rounds": directory.study.rounds,
        "closed": ends.count("round-close"),
        "aborted": ends.count("round-abort"),
        "ended": state.stopped,
        "withdrawn": directory.withdrawn,
        "waiting": None if wait is None else asdict(wait),
        **({"stopping": True} if wait is not None and directory.stopping else {}),
        **({"interrupted": left} if (left := directory.interrupted) else {}),
        "epsilon": spent(state.statements[-1]) if state.statements else None,
        "metrics": next((each["metrics"] for each in reversed(state.statements) if each["metrics"]), None),
        "adapter": state.adapter.digest,
        "released": (path / "release").is_dir(),
        **({"counts": True} if directory.study.counts else {}),
        **({} if directory.study.gate is None else {"gated": True}),
    }


def as_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the status as lines of text, for 80 columns."""
    founded = "" if found["founded"] else ": not founded, no run has begun"
    lines = _entry("consortium", f"{found['consortium']}{founded}")
    away = [name for name in found["members"] if name not in found["connected"]]
    lines += _entry("members", f"{', '.join(found['members']) or 'none'}; {found['nodes_online']} connected")
    if found["members"] and not found["serving"]:
        lines += _entry("service", "not running on this machine: `privet coordinator serve` starts it")
    if away and found["connected"]:
        lines += _entry("away", f"{', '.join(away)}: their operators start `privet site serve`")
    if found["asking"]:
        lines += _entry("asking", f"{', '.join(found['asking'])}: approve after their operator has read out the words")
    if found["statements_waiting"]:
        lines += _entry("log", f"{found['statements_waiting']} statements about members wait for the log")
    for run in found["runs"]:
        lines += _lines_of(run)
    return lines


def _lines_of(run: Mapping[str, Any]) -> list[str]:
    ended = "finished" if run["closed"] else "ended without a result: no round closed"
    left = "running" if run["waiting"] else f"not running (`privet coordinator resume {run['run']}`)"
    state = ended if run["ended"] else left
    if run["ended"] and run["closed"] and not (run["released"] or run["waiting"] or run.get("counts")):
        state = f"ended, and not released yet (`privet coordinator resume {run['run']}` releases it)"
    state += ", asked to stop" if run.get("stopping") else ""
    if run["withdrawn"] is not None:
        state = f"withdrawn: {run['withdrawn']}"
    elif run["ended"] and run.get("gated") and not run["released"]:
        state = "ended with a candidate, which waits at its gate (`privet gate status`)"
    rounds = f"{run['closed']} of {run['rounds']} rounds closed, {run['aborted']} aborted"
    if "interrupted" in run and not run["ended"] and run["withdrawn"] is None:
        rounds += f", round {run['interrupted']} interrupted"
    lines = _entry("run", f"{run['run']}: {rounds}, {state}{', released' if run['released'] else ''}")
    if run["waiting"]:
        wait = Wait(**run["waiting"])
        lines += _entry("", sentence(wait, time.time()))
        for line in details(wait):
            lines += _entry("", line.strip())
    if run["epsilon"] is not None:
        lines += _entry("", f"at most epsilon {run['epsilon']:.3f} spent so far, by the site that spent most")
    if run["metrics"]:
        lines += _entry("", quality(run["metrics"]))
    return [*lines, *_entry("", f"adapter {run['adapter'][:_SHORT]}")]


def _entry(label: str, text: str) -> list[str]:
    """Return a label and its text, wrapped at the width of a terminal."""
    wrapped = textwrap.wrap(text, _WIDTH - _LABEL, break_on_hyphens=False)
    return [f"{label if not number else '':<{_LABEL}}{line}" for number, line in enumerate(wrapped)]
