"""Stop an installation early where the links in `src/privet` are not links. All else stands in `pyproject.toml`."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).parent / "src" / "privet"

broken = [name for name in ("client", "common", "server", "simulations") if not (PACKAGE / name).is_dir()]
if broken:
    raise SystemExit(
        f"privet cannot be installed from here: {', '.join(str(PACKAGE / name) for name in broken)} should be symbolic "
        "links to the folders of the same name, and are not. Git or the archive tool wrote them as plain files.\n"
        "On Windows, enable developer mode and clone again with `git clone -c core.symlinks=true`; or install a wheel."
    )
setup()
