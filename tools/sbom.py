"""Write a bill of materials (CycloneDX 1.6, JSON) for every lock in `requirements/`.

::

    python tools/sbom.py [DIRECTORY]    # dist/sbom/, unless a directory is given

Each names privet and every package of its lock: version, package URL and the SHA-256 of the one file that is installed.
The same commit gives the same bytes.
"""

from __future__ import annotations

import sys
import tomllib
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.dist import commit_time
from tools.lock import FOLDER, ROOT, Locked, read_lock

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "privet")
"""For serial numbers, which are made from a lock's bytes (RFC 9562, version 5)."""


def component(package: Locked) -> Component:
    """Return the entry of one locked package."""
    url = PackageURL("pypi", None, package.name, package.version)
    return Component(
        name=package.name,
        version=package.version,
        type=ComponentType.LIBRARY,
        bom_ref=url.to_string(),
        purl=url,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=package.sha256)],
    )


def bill(name: str, text: str, version: str, time: int) -> str:
    """Return the bill of materials of a lock as JSON.

    Args:
        name: The lock's name, such as `cpu-py311`.
        text: The lock.
        version: privet's version.
        time: Seconds since 1970, as the time of the bill.

    Raises:
        LockError: If the lock is malformed.
    """
    packages: Iterable[Locked] = read_lock(text).values()
    bom = Bom(serial_number=uuid.uuid5(NAMESPACE, f"{name}\n{version}\n{text}"))
    url = PackageURL("pypi", None, "privet", version)
    root = Component(name="privet", version=version, type=ComponentType.APPLICATION, bom_ref=url.to_string(), purl=url)
    bom.metadata.component = root
    bom.metadata.timestamp = datetime.fromtimestamp(time, UTC)
    parts = [component(package) for package in packages]
    bom.components.update(parts)
    bom.register_dependency(root, parts)
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def bills() -> dict[str, str]:
    """Return the bill of materials of every lock, by the lock's name."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    time = commit_time()
    locks = sorted(FOLDER.glob("*.txt"))
    return {path.stem: bill(path.stem, path.read_text(encoding="utf-8"), version, time) for path in locks}


def main() -> None:
    """Write the bills of materials."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "sbom"
    target.mkdir(parents=True, exist_ok=True)
    for name, text in bills().items():
        (target / f"{name}.cdx.json").write_text(text, encoding="utf-8")
        print(target / f"{name}.cdx.json")


if __name__ == "__main__":
    main()
