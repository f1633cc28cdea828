"""A real Slurm on this machine, for tests: munged, slurmctld and slurmd of Debian's packages, with files of their own.

All ports are on the loopback address. Nothing outside the given directory is written, and nothing that runs already is
touched.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from privet.simulations.deploy import free_ports
from tests.support.fleet_world import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
REQUIRED = "PRIVET_REQUIRE_SLURM"
_STARTED = 60.0
"""Seconds that a daemon may take to start."""
_CONF = """ClusterName=privet
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=1
ReturnToService=2
MinJobAge=300
KillWait=2
SlurmctldDebug=error
SlurmdDebug=error
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm of one node. `SLURM_CONF` in the environment leads its commands to it."""

    folder: Path

    def run(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def hold(self) -> None:
        """Let no job start."""
        self.run("scontrol", "update", "PartitionName=main", "State=DOWN")

    def release(self) -> None:
        """Let jobs start."""
        self.run("scontrol", "update", "PartitionName=main", "State=UP")

    def jobs(self, *states: str) -> list[str]:
        """Return the names of the jobs in these states; of all that have not ended if none."""
        chosen = [f"--states={','.join(states)}"] if states else []
        return self.run("squeue", "--noheader", "--format=%j", *chosen).split()


def check_installed() -> None:
    """Skip the test where Slurm is not installed or this user may not run it, unless the environment requires it."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None and not Path("/usr/sbin", name).exists()]
    if not missing and os.geteuid() == 0:
        return
    assert not os.environ.get(REQUIRED), f"{REQUIRED} is set, but {missing or 'root'} is missing"
    pytest.skip(f"Slurm needs root and Debian's slurmctld, slurmd, slurm-client and munge; missing: {missing}")


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Run Slurm until the block ends."""
    check_installed()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(host=host, ports=free_ports(2), folder=folder, cpus=os.cpu_count()))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munged = ["munged", "--foreground", "--force", "--num-threads=1"]
    munged += [f"--{option}={folder}/munge.{end}" for option, end in names.items()]
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        stack.enter_context(_daemon(folder, munged))
        until((folder / "munge.socket").exists, _STARTED)
        stack.enter_context(_daemon(folder, ["slurmctld", "-D", "-f", str(conf)]))
        stack.enter_context(_daemon(folder, ["slurmd", "-D", "-f", str(conf), "-N", host]))
        cluster = Slurm(folder)
        until(lambda: _idle(cluster), _STARTED)
        try:
            yield cluster
        finally:
            for name in cluster.jobs():
                cluster.run("scancel", "--full", "--signal=KILL", f"--name={name}")


def _idle(cluster: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip() in ("idle", "allocated", "mixed")


@contextmanager
def _daemon(folder: Path, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{command[0]}.out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
