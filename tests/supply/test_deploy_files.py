"""The files in `deploy/` confine what they start: no privileges, nothing to write but its state, nothing unpinned."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.confined import allowed, settings
from tests.support.pages import ROOT, text_of

DEPLOY = ROOT / "deploy"
UNITS = {path.stem: path for path in DEPLOY.glob("*.service")}
DEMANDED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "AmbientCapabilities": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "ProtectProc": "invisible",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "PrivateDevices": "yes",
    "PrivateTmp": "yes",
    "PrivateUsers": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "yes",
    "LockPersonality": "yes",
    "RemoveIPC": "yes",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
    "LimitNOFILE": "65536",
    "LimitCORE": "0",
}
DANGEROUS = {"add_key", "bpf", "chown", "chroot", "init_module", "io_uring_setup", "kexec_load", "keyctl", "mount"}
DANGEROUS |= {"perf_event_open", "pivot_root", "process_vm_readv", "process_vm_writev", "ptrace", "reboot", "setuid"}
DANGEROUS |= {"swapon", "userfaultfd"}
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze") and not os.environ.get("PRIVET_REQUIRE_SYSTEMD"), reason="systemd is missing"
)


def exposure(*texts: str, directory: Path) -> float:
    """Return how exposed systemd finds a unit: 0 is not at all, 10 is without any limits."""
    unit = directory / "privet-x.service"
    unit.write_text("\n".join(texts), encoding="utf-8")
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", text)
    assert found, text
    return float(found[1])


# Units


def test_there_is_a_unit_for_each_process() -> None:
    assert set(UNITS) == {"privet-coordinator", "privet-run@", "privet-site"}


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_runs_without_privileges_and_says_so_once(name: str) -> None:
    own = settings(UNITS[name])
    assert {key: own[key] for key in DEMANDED} == {key: [value] for key, value in DEMANDED.items()}
    assert own["User"] == ["privet"]
    assert own["ExecStart"][0].startswith("/opt/privet/bin/privet ")  # no "+" or "!", which would lift the limits
    paths = set(" ".join(own["ReadWritePaths"]).split())
    paths -= {"-/mnt/other-disk"} if name == "privet-site" else set()  # of the ledger's anchor
    assert all(path.startswith("/var/lib/privet/") for path in paths)
    assert set(own) & {"ExecStartPre", "ExecStartPost", "PermissionsStartOnly", "Delegate", "EnvironmentFile"} == set()


def test_all_units_confine_in_the_same_way() -> None:
    differ = {"Description", "After", "Wants", "ExecStart", "Restart", "RestartSec", "Environment", "OOMPolicy"}
    differ |= {"ReadWritePaths", "ReadOnlyPaths", "IPAddressDeny", "IPAddressAllow", "LoadCredential"}
    first, *others = ({k: v for k, v in settings(unit).items() if k not in differ} for unit in UNITS.values())
    assert all(each == first for each in others)


def test_a_site_outlives_a_trainer_that_runs_out_of_memory() -> None:
    assert settings(UNITS["privet-site"])["OOMPolicy"] == ["continue"]


def test_a_run_reaches_no_other_host() -> None:
    own = settings(UNITS["privet-run@"])
    assert (own["IPAddressDeny"], own["IPAddressAllow"]) == (["any"], ["localhost"])


@needs_systemd
def test_the_system_calls_of_a_unit_are_those_of_a_service() -> None:
    for unit in UNITS.values():
        names = allowed(settings(unit)["SystemCallFilter"])
        assert {"openat", "socket", "futex", "epoll_wait"} <= names
        assert names & DANGEROUS == set()


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_a_unit_hardly_exposed(name: str, tmp_path: Path) -> None:
    text = UNITS[name].read_text(encoding="utf-8")
    assert exposure(text, directory=tmp_path) <= 2.5
    if name == "privet-site":
        gpu = (DEPLOY / "gpu.conf").read_text(encoding="utf-8")
        assert exposure(text, gpu, directory=tmp_path) <= 2.5
    without = "\n".join(line for line in text.splitlines() if line.partition("=")[0] not in DEMANDED)
    assert exposure(without, directory=tmp_path) > 2.5  # so the figure does depend on them


@needs_systemd
@pytest.mark.slow
def test_training_and_the_network_work_under_a_units_limits() -> None:
    """A study over TLS, and training in bfloat16, whose kernels are made at run time: both under the real filter."""
    network = "tests/system/test_fleet.py::test_a_study_over_the_network_gives_what_it_gives_in_memory"
    kernels = "tests/client/test_train.py::test_bfloat16_comes_close_to_float32"
    command = [sys.executable, "-m", "tests.support.confined", str(UNITS["privet-site"]), sys.executable, "-m"]
    command += ["pytest", "-q", "-p", "no:cacheprovider", network, kernels]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_systemd
@pytest.mark.parametrize(
    "attempt",
    [
        "os.chown('.', 1, 1)",
        "os.setuid(65534)",
        "socket.sethostname('x')",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "subprocess.run(['unshare', '--user', 'true'], check=True)",
        "subprocess.run(['mount', '-t', 'tmpfs', 'x', '/mnt'], check=True, stderr=-3)",
    ],
)
def test_what_a_service_has_no_use_for_is_refused(attempt: str) -> None:
    code = f"import os, socket, subprocess\n{attempt}"
    command = [sys.executable, "-m", "tests.support.confined", str(UNITS["privet-site"]), sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "PermissionError" in done.stderr or "CalledProcessError" in done.stderr, done.stderr


# The image


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Containerfile with their arguments, comments and line ends removed."""
    lines = [line for line in (DEPLOY / "Containerfile").read_text().splitlines() if not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in whole) if word]


def test_the_image_has_no_base_but_the_one_that_is_given_by_its_digest() -> None:
    assert instructions()[:2] == [("ARG", "BASE"), ("FROM", "${BASE} AS base")]
    assert [rest for word, rest in instructions() if word == "FROM"] == ["${BASE} AS base", "base AS build", "base"]
    (check,) = [rest for word, rest in instructions() if word == "RUN" and rest.startswith("case")]
    for base, good in {
        f"docker.io/library/python@sha256:{'a' * 64}": True,
        f"docker.io/library/python:3.11-slim@sha256:{'a' * 64}": True,
        "docker.io/library/python:3.11-slim": False,
        "docker.io/library/python": False,
        f"docker.io/library/python@sha256:{'a' * 63}": False,
        f"docker.io/library/python@sha256:{'a' * 65}": False,
        "": False,
    }.items():
        done = subprocess.run(["sh", "-c", check], env={"BASE": base}, capture_output=True, check=False)
        assert (done.returncode == 0) == good, base


def test_the_image_holds_what_is_hashed_and_runs_as_nobody() -> None:
    last = [word for word, _ in instructions()].index("USER")
    assert instructions()[last] == ("USER", "65532:65532")
    assert {word for word, _ in instructions()[last:]} == {"USER", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}
    (install,) = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    for option in ("--require-hashes", "--no-build-isolation", "--only-binary :all:", "-r dist/privet.txt"):
        assert option in install
    assert "-r requirements/${BUILD}-py311.txt" in install
    assert [rest for word, rest in instructions() if word in {"COPY", "ADD"}] == [
        "requirements requirements",
        "dist dist",
        "--from=build /opt/privet /opt/privet",
    ]
    ignored = (ROOT / ".containerignore").read_text().split()
    assert ignored == ["*", "!requirements", "!dist/*.whl", "!dist/privet.txt"]


def test_the_documented_command_gives_the_container_nothing() -> None:
    text = text_of("docs/supply-chain.md").replace("\\\n", " ")
    (line,) = [line for line in text.splitlines() if line.startswith("podman run ")]
    words = shlex.split(line)
    wanted = {"--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--tmpfs=/tmp"}
    assert wanted <= set(words)
    mounts = [words[at + 1] for at, word in enumerate(words) if word == "-v"]
    assert [mount.rsplit(":", 1)[1].split(",") for mount in mounts] == [["Z"], ["ro", "Z"]]
    assert not any(word.startswith(("--privileged", "--cap-add", "--device", "--network=host", "-p")) for word in words)
    (build,) = [line for line in text.splitlines() if line.startswith("podman build ")]
    assert re.search(r"--build-arg BASE=\S+@sha256:", build)
