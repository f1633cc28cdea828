"""The status of a coordinator, read from its directory: members, connections, runs."""

from __future__ import annotations

from typing import Any

from privet.server.consortium.coordinator import Coordinator
from privet.server.network.service import link_of
from privet.server.rounds.state import RunDirectory


def consortium_status(made: Coordinator) -> dict[str, Any]:
    """Return the status as a JSON document: members, connected nodes, statements for the log, runs."""
    link = link_of(made.directory)
    online = {node.public_key for node in link.nodes() if node.online}
    runs = []
    for path in sorted((made.directory / "runs").iterdir()):
        if (path / "study.json").is_file():
            state = RunDirectory.open(path).load()
            ends = [statement["type"] for statement in state.statements]
            runs.append(
                {
                    "run": path.name,
                    "round": state.round,
                    "closed": ends.count("round-close"),
                    "aborted": ends.count("round-abort"),
                    "ended": state.stopped,
                    "adapter": state.adapter.digest,
                    "released": (path / "release").is_dir(),
                }
            )
    return {
        "consortium": made.settings.name,
        "members": [member.site for member in made.members.members()],
        "nodes_online": len(online),
        "statements_waiting": len(made.members.statements()),
        "runs": runs,
    }


def as_lines(found: dict[str, Any]) -> list[str]:
    """Return the status as lines of text."""
    lines = [
        f"consortium  {found['consortium']}",
        f"members     {', '.join(found['members']) or 'none'}; {found['nodes_online']} connected",
    ]
    if found["statements_waiting"]:
        lines.append(f"log         {found['statements_waiting']} statements about members wait for the log")
    for run in found["runs"]:
        state = "finished" if run["ended"] else "unfinished"
        release = ", released" if run["released"] else ""
        lines.append(
            f"run         {run['run']}: {run['closed']} rounds closed, {run['aborted']} aborted, {state}{release}; "
            f"adapter {run['adapter']}"
        )
    return lines
