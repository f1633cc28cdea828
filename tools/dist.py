"""Build wheel and source archive so that everybody who builds the same commit gets the same bytes.

::

    python tools/dist.py [DIRECTORY]    # dist/, unless a directory is given

What is built is the last commit, not the working tree: an export of Git with its times and modes. Times in both files
are the commit's. `SHA256SUMS` and `privet.txt`, lines for `sha256sum --check` and for `pip install --require-hashes`,
are written beside them. The bytes depend on the versions of setuptools (locked), Python and zlib.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BACKEND = "import sys, setuptools.build_meta as build; getattr(build, sys.argv[1])(sys.argv[2])"


def commit_time(root: Path = ROOT) -> int:
    """Return when the last commit was made, in seconds since 1970."""
    return int(subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=root))


def export(root: Path, directory: Path) -> None:
    """Write the files of the last commit into a new directory, each readable by all and writable by its owner."""
    data = subprocess.check_output(["git", "-c", "tar.umask=0022", "archive", "--format=tar", "HEAD"], cwd=root)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(directory, filter="data")


def normalised(archive: bytes, time: int) -> bytes:
    """Return a `.tar.gz` with its entries sorted, owned by nobody in particular, and as old as the commit.

    Args:
        archive: The bytes of a `.tar.gz`.
        time: Seconds since 1970, for every entry.
    """
    plain = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for entry in sorted(old.getmembers(), key=lambda each: each.name):
            clean = tarfile.TarInfo(entry.name)
            clean.type, clean.size, clean.linkname = entry.type, entry.size, entry.linkname
            clean.mtime = time
            clean.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
            new.addfile(clean, old.extractfile(entry) if entry.isreg() else None)
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=time) as file:
        file.write(plain.getvalue())
    return packed.getvalue()


def build(root: Path, target: Path) -> list[Path]:
    """Build the last commit of a repository, and return the wheel and the source archive in the target directory."""
    time = commit_time(root)
    environment = {"PATH": os.environ["PATH"], "SOURCE_DATE_EPOCH": str(time), "PYTHONHASHSEED": "0"}
    environment |= {"LC_ALL": "C.UTF-8", "TZ": "UTC", "GIT_DIR": os.devnull}  # the export is nobody's repository
    same: Callable[[bytes, int], bytes] = lambda data, _: data  # noqa: E731
    target.mkdir(parents=True, exist_ok=True)
    built = []
    for hook, suffix, made in (("build_wheel", ".whl", same), ("build_sdist", ".tar.gz", normalised)):
        with tempfile.TemporaryDirectory() as directory:
            tree, out = Path(directory, "tree"), Path(directory, "out")
            export(root, tree)
            out.mkdir()
            command = [sys.executable, "-c", BACKEND, hook, str(out)]
            done = subprocess.run(
                command, cwd=tree, env=environment, umask=0o022, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"setuptools could not build privet:\n{done.stderr}")
            (file,) = out.glob(f"*{suffix}")
            built.append(target / file.name)
            built[-1].write_bytes(made(file.read_bytes(), time))
    return built


def main() -> None:
    """Build into a directory, and write the hashes beside the files."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in build(ROOT, target)}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    hashes = " ".join(f"--hash=sha256:{digest}" for digest in digests.values())
    (target / "privet.txt").write_text(f"privet=={version} {hashes}\n", encoding="utf-8")
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    (target / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
    print("".join(lines), end="")


if __name__ == "__main__":
    main()
