"""What the tests share: tiny bases, built once a session, and the command. And what makes all of them quick."""

from __future__ import annotations

import atexit
import fcntl
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Idle threads of PyTorch wait without working, also where a test asks for more of them than there are cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from privet.common.cli import main
from tests.support import divergences
from tests.support.forks import Forks

Run = Callable[..., tuple[int, str, str]]
"""Runs the command with these arguments, and returns exit code, stdout, and stderr without lines of progress."""

# No test measures time: on a busy machine, a pause of another process would be a failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Importing torch and all else makes millions of objects that stay, and looking through them for garbage again and again
# takes half of the time. So nobody looks during collection, and what there is by then is left out for good.
gc.disable()

# Tests write durably all the time, and none can tell whether fsync reaches a disk: where there is memory to write to,
# they do not wait for one.
_MEMORY = Path("/dev/shm")  # noqa: S108 - pytest makes a directory of the user's own in it
_MEMORY_BYTES = 4 * 2**30

# Where a test runs another one in a session of its own: the directory with the bases of the session around it.
BASES = "PRIVET_TEST_BASES"

# Longest first: what takes more than some ten seconds of two cores. The rest follows in the order of the files.
LONGEST = (
    "test_all_of_it_works_without_any_network_but_loopback",
    "test_the_researcher_s_path_runs_as_written",
    "test_keys_are_rotated_between_two_rounds_and_the_run_goes_on",
    "test_the_tutorial_runs_as_written",
    "test_the_table_of_the_documentation_is_what_is_measured",
    "test_a_private_study_gives_the_same_adapter_in_one_two_and_four_processes",
    "test_killed_and_brought_back_a_deployed_study_gives_the_bits_of_one_in_memory",
    "test_two_processes_give_the_same_bits_as_one_also_where_one_was_killed",
    "test_a_sweep_and_its_rows_are_the_same_in_two_processes",
    "test_an_arm_that_fails_ends_the_others_at_once",
    "test_killed_at_any_time",
    "test_any_order_of_anything_keeps_the_promises_longer",
    "test_killed_sites_crowds_and_full_disks",
)


def pytest_configure() -> None:
    """Put what tests write into memory, unless somebody has chosen a place or there is too little."""
    if not os.access(_MEMORY, os.W_OK):
        return
    found = os.statvfs(_MEMORY)
    if found.f_bavail * found.f_frsize >= _MEMORY_BYTES and not found.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


def pytest_sessionstart() -> None:
    """Share what is kept between commands between the workers, out of the user's own directory.

    What sites refuse until its review has ended is admitted (`client/trainer/opening.py`).
    """
    os.environ["PRIVET_UNREVIEWED_TRAINER"] = "1"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tempfile.mkdtemp(prefix="privet-tests-")
        os.environ["XDG_CACHE_HOME"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    divergences.remember()


@pytest.hookimpl(trylast=True)  # when those that were not asked for are gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each worker begin with its part of the longest tests. `worksteal` gives each one stretch of the list."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    names = {item: getattr(item, "originalname", item.name) for item in items}
    long = sorted((item for item in items if names[item] in ranks), key=lambda item: ranks[names[item]])
    rest = [item for item in items if names[item] not in ranks]
    size, ordered = len(items) / workers, list[pytest.Item]()
    for worker in range(workers):
        ordered += long[worker::workers]
        room = max(round(size * (worker + 1)) - len(ordered), 0)
        ordered += rest[:room]
        rest = rest[room:]
    items[:] = ordered + rest


def pytest_collection_finish() -> None:
    """Look for garbage again, among what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Mapping[str, Path]:
    """Tiny bases by family, and `llama-chat`, which has a chat template. Read only: all workers have the same."""
    if BASES in os.environ:
        return {path.name: path for path in Path(os.environ[BASES]).iterdir()}
    from tests.support.tiny import FAMILIES, tiny_base  # here, so that tests without a model do not load torch

    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent
    kinds = {**{family: (family, False) for family in FAMILIES}, "llama-chat": ("llama", True)}
    with (root / "bases.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "bases").exists():
            for name, (family, chat) in kinds.items():
                tiny_base(root / "bases.partial" / name, family, chat)
            (root / "bases.partial").rename(root / "bases")
    return {name: root / "bases" / name for name in kinds}


@pytest.fixture(scope="session")
def bert(bases: Mapping[str, Path]) -> Path:
    """A tiny encoder. Read only."""
    return bases["bert"]


@pytest.fixture(scope="session")
def llama(bases: Mapping[str, Path]) -> Path:
    """A tiny decoder. Read only."""
    return bases["llama"]


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Start the command as a process that has loaded the libraries already."""
    with Forks() as starting:
        yield starting


@pytest.fixture
def privet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process and return exit code, stdout and stderr without lines of progress."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["privet", *map(str, arguments)])
        # A service logs to what is standard error now, and which is closed after the test.
        handlers = logging.getLogger().handlers[:]
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            logging.getLogger().handlers[:] = handlers
        captured = capsys.readouterr()
        kept = [line for line in captured.err.splitlines(keepends=True) if not line.endswith(" …\n")]
        return int(ended.value.code or 0), captured.out, "".join(kept)

    return run
