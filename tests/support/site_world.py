"""A consortium with a site whose directory is complete: the state that tests of a site's faults begin with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privet.client.commands.site import init
from privet.client.policy.text import EXAMPLE
from tests.support.consortium_world import World, run, running

PATIENTS = "name,note\nMaria Muster,diabetes\n"
LIMIT = '[limit]\nunit = "patient"\nepsilon = 6.0\ndelta = 1e-6\n'


@contextmanager
def ready(folder: Path) -> Iterator[World]:
    """Run a consortium of berlin and lyon that was founded; berlin's directory is complete."""
    with running(folder) as world:
        world.found("berlin", "lyon")
        world.compare("berlin", "lyon")
        home = world.folder / "berlin"
        (home / "data").mkdir()
        (home / "data/train.csv").write_text(PATIENTS)
        (home / "policy.toml").write_text(EXAMPLE)
        file = home / "site.toml"
        text = file.read_text().replace("# declared_count", "declared_count")
        text = text.replace('# patient_column = "patient_id"', 'patient_column = "name"')
        text = re.sub(r"# anchor = \S+", 'anchor = "anchor/head.json"\nanchor_same_disk = true', text)
        file.write_text(text + LIMIT)
        assert run(init, file).exit_code == 0
        yield world
