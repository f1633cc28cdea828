"""A site's own configuration: who it is, where its files are, what machine it has.

This file never leaves the site and the coordinator has no say in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from privet.common.errors import StudyError
from privet.common.resources import Resources
from privet.common.study import Name, Section, read_toml, validate


class SiteConfig(Section):
    """One site, read from TOML. Relative paths are relative to the file."""

    name: Name
    train: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Training files: CSV, JSON Lines or Parquet."""
    test: tuple[Path, ...] = ()
    """Test files, for evaluation at the site or in a simulation."""
    declared_count: Annotated[int, Field(ge=1)] | None = None
    """The count this site declares: its weight, and public. Private studies need it; otherwise None takes the
    number of units, rounded to two digits."""
    studies: tuple[str, ...] = ()
    """Digests of the studies that the operator has read and agreed to; every other one is refused."""
    distinct_files: bool = False
    """Simulations only: the files are different sites', so equal names of units in two files are two units."""
    reproducible_seed: int | None = None
    """Simulations only: makes sampling and noise reproducible, and thereby worthless as protection."""
    resources: Resources = Resources()


def load_site(path: Path) -> SiteConfig:
    """Read a site's configuration.

    Raises:
        StudyError: The file is missing or not valid.
    """
    document = read_toml(path, what="site")
    site = validate(SiteConfig, document, what=f"site file {path.name}")
    root = path.parent
    return site.model_copy(
        update={
            "train": tuple((root / file).resolve() for file in site.train),
            "test": tuple((root / file).resolve() for file in site.test),
        }
    )


def rounded_count(units: int) -> int:
    """Return a count rounded to two significant digits; below 100 that is the count itself.

    Raises:
        StudyError: There are no units.
    """
    if units < 1:
        raise StudyError("a site without units cannot declare a count")
    scale = int(10 ** max(0, len(str(units)) - 2))
    return (units + scale // 2) // scale * scale
