"""Which engine a simulation runs on. This module imports none of them, so a wrong choice is refused at once."""

from __future__ import annotations

from importlib.util import find_spec

from privet.common.errors import StudyError

ENGINES = ("memory", "ray")
"""memory: this process and its workers. ray: the simulation engine of Flower."""


def check_engine(engine: str, workers: int) -> None:
    """Check that an engine exists, is installed, and takes several workers if there are.

    Raises:
        StudyError: It does not, or is not.
    """
    if engine not in ENGINES:
        raise StudyError(
            f"--engine: expected {' or '.join(ENGINES)}, got {engine!r}",
            "leave --engine out to simulate without Ray",
        )
    if engine != "ray":
        return
    if workers > 1:
        raise StudyError(
            f"--workers: it cannot be given with --engine ray, got {workers}; "
            "Ray starts as many processes as fit the machine",
            "leave --workers out",
        )
    require_ray()


def require_ray() -> None:
    """Raise `StudyError` unless Ray and what its engine needs are installed."""
    missing = [package for package in ("ray", "psutil") if find_spec(package) is None]
    if missing:
        raise StudyError(
            "--engine ray: Flower's simulation engine needs the Python package Ray, which is not installed "
            f"(missing: {', '.join(missing)})",
            "run `pip install 'privet[ray]'`, or leave --engine out",
        )
