"""Two builds of one commit give the same bytes, and both files install by their hashes beside the locked packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tools.lock import FOLDER, MODELS, ROOT, name_of, read_lock

pytestmark = pytest.mark.slow
WHEEL, SOURCE = "privet-0.1.0-py3-none-any.whl", "privet-0.1.0.tar.gz"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the packages and settings of this process."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=own | environment, capture_output=True, text=True, check=False, umask=0o077
    )


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two builds: in this folder, and in a clone elsewhere with other settings and a file not committed."""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    one = run(sys.executable, ROOT / "tools" / "dist.py", here, cwd=ROOT)
    assert one.returncode == 0, one.stderr
    clone = run("git", "clone", "--quiet", ROOT, there / "clone", cwd=there)
    assert clone.returncode == 0, clone.stderr
    (there / "clone" / "common" / "stray.py").write_text("raise SystemExit\n")
    settings = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "HOME": str(there), "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "9"}
    two = run(sys.executable, there / "clone/tools/dist.py", there / "dist", cwd=there, **settings)
    assert two.returncode == 0, two.stderr
    return here, there / "dist"


def test_two_builds_in_different_folders_give_the_same_bytes(builds: tuple[Path, Path]) -> None:
    here, there = builds
    assert {path.name for path in here.iterdir()} == {WHEEL, SOURCE, "SHA256SUMS", "privet.txt"}
    for path in here.iterdir():
        assert path.read_bytes() == (there / path.name).read_bytes(), path.name
    assert run("sha256sum", "--check", "--quiet", "SHA256SUMS", cwd=here).returncode == 0


def lock() -> Path:
    build = "cpu" if metadata.version("torch").endswith("+cpu") else "cuda"
    return FOLDER / f"{name_of(build, f'{sys.version_info.major}.{sys.version_info.minor}', dev=False)}.txt"


def site(environment: Path) -> Path:
    return environment / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)


def empty(environment: Path) -> Path:
    """Make an environment of the packages of the lock and the demo's model, and nothing else.

    They are links to those that `make setup` installed by their hashes.
    """
    venv.create(environment, with_pip=False)
    for name in [*read_lock(lock().read_text(encoding="utf-8")), *MODELS]:
        files = metadata.distribution(name).files or []
        base = Path(str(metadata.distribution(name).locate_file("")))
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            shared = (base / top).is_dir() and not top.endswith("-info") and not (base / top / "__init__.py").is_file()
            parts = {Path(*file.parts[:2]) for file in files if file.parts[0] == top} if shared else {Path(top)}
            for part in parts:
                (site(environment) / part).parent.mkdir(exist_ok=True)
                (site(environment) / part).symlink_to(base / part)
    return environment


def install(environment: Path, folder: Path, kind: str) -> subprocess.CompletedProcess[str]:
    python = environment / "bin" / "python"
    command: list[str | Path] = [sys.executable, "-m", "pip", "--python", python, "--no-cache-dir", "install"]
    command += ["--no-index", "--find-links", folder, f"--{kind}=privet", "--require-hashes", "--no-build-isolation"]
    return run(*command, "--no-compile", "-r", lock(), "-r", folder / "privet.txt", cwd=environment)


def test_each_installs_by_its_hash_beside_the_locked_packages(builds: tuple[Path, Path], tmp_path: Path) -> None:
    files: dict[str, dict[str, bytes]] = {}
    for kind in ("only-binary", "no-binary"):
        environment = empty(tmp_path / kind)
        assert run(environment / "bin/python", "-c", "import privet", cwd=tmp_path).returncode != 0
        done = install(environment, builds[0], kind)
        assert done.returncode == 0, done.stderr
        package = site(environment) / "privet"
        files[kind] = {str(path.relative_to(package)): path.read_bytes() for path in package.rglob("*.*")}
        shown = run(environment / "bin/privet", "--help", cwd=tmp_path)
        assert "simulate" in shown.stdout, shown.stderr
    assert len(files["only-binary"]) > 200
    assert files["only-binary"] == files["no-binary"]  # so what works from one works from the other
    study = ROOT / "simulations" / "studies" / "demo.toml"
    checked = run(environment / "bin/privet", "check", study, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(("kind", "file"), [("only-binary", WHEEL), ("no-binary", SOURCE)])
def test_one_byte_more_is_refused(builds: tuple[Path, Path], tmp_path: Path, kind: str, file: str) -> None:
    folder = tmp_path / "dist"
    shutil.copytree(builds[0], folder)
    with (folder / file).open("ab") as stream:
        stream.write(b"\0")
    done = install(empty(tmp_path / "environment"), folder, kind)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
