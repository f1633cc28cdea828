"""What a trainer's process may do: a small program confines itself as trainers do, and then tries the rest."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from privet.client.site import load_site
from privet.client.trainer import confinement
from privet.client.trainer.confinement import available, code_places, exposed
from privet.client.trainer.pipe import stripped
from tests.support.tiny import class_rows, site_toml

TRIES = """
import ctypes, fcntl, json, os, resource, signal, socket, subprocess, sys, threading
from privet.client.trainer.confinement import confine
home, data, key, parent, started = sys.argv[1:]
confined = confine([data], [home])
libc = ctypes.CDLL(None, use_errno=True)
def tried(what):
    try:
        return what() is not False
    except OSError:
        return False
def write(path):
    with open(path, "w") as file:
        file.write("x")
    return True
def memory():
    local, remote = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 2)(int(started, 16), 8)
    room = ctypes.create_string_buffer(8)
    local[0], local[1] = ctypes.addressof(room), 8
    return libc.process_vm_readv(int(parent), local, 1, remote, 1, 0) == 8
def within(what):
    found = []
    thread = threading.Thread(target=lambda: found.append(tried(what)))
    thread.start()
    thread.join()
    return found[0]
def child():
    return subprocess.run([sys.executable, "-I", "-c", ""], capture_output=True).returncode == 0
def forked():
    number = os.fork()
    if number == 0:
        os._exit(0)
    return os.waitpid(number, 0)[1] == 0
print(json.dumps({
    "data": tried(lambda: open(data).read()),
    "home": tried(lambda: write(home + "/a")),
    "device": tried(lambda: write("/dev/null")),
    "library": tried(lambda: open(os.__file__).read()),
    "key": tried(lambda: open(key).read()),
    "key in a thread": within(lambda: open(key).read()),
    "program": tried(child),
    "fork": tried(forked),
    "mode of a key": tried(lambda: os.chmod(key, 0o666)),
    "mode of an open file": tried(lambda: os.fchmod(os.open(data, os.O_RDONLY), 0o666)),
    "owner of a key": tried(lambda: os.chown(key, os.getuid(), os.getgid())),
    "times of a key": tried(lambda: os.utime(key, (1, 1))),
    "attribute of a key": tried(lambda: os.setxattr(key, "user.x", b"x")),
    "emptied data": tried(lambda: os.close(os.open(data, os.O_RDONLY | os.O_TRUNC))),
    "flags of a file": tried(lambda: fcntl.ioctl(os.open(data, os.O_RDONLY), 0x40086602, bytes(8))),
    "owner of a signal": tried(lambda: fcntl.fcntl(0, fcntl.F_SETOWN, int(parent))),
    "kind of a signal": tried(lambda: fcntl.fcntl(0, 10, 9)),
    "newer calls": libc.syscall(469, -100, key.encode(), ctypes.create_string_buffer(64), 24, 0) == 0
        or ctypes.get_errno() != 38,
    "openat2": libc.syscall(437, -100, key.encode(), ctypes.create_string_buffer(24), 24) >= 0
        or ctypes.get_errno() != 38,
    "watch": libc.inotify_init() >= 0,
    "processors of another": tried(lambda: os.sched_setaffinity(int(parent), os.sched_getaffinity(0))),
    "own processors": tried(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))),
    "new file": tried(lambda: write(home + "/new")),
    "emptied own file": tried(lambda: write(home + "/new")),
    "length of a key": tried(lambda: os.truncate(key, 0)),
    "limit of another": tried(lambda: resource.prlimit(int(parent), resource.RLIMIT_CORE)),
    "own limit": tried(lambda: resource.getrlimit(resource.RLIMIT_CORE)),
    "order of others": tried(lambda: os.setpriority(os.PRIO_USER, 0, 19)),
    "shared memory": libc.shmget(0x1234567, 4096, 0o1600) >= 0,
    "semaphore": libc.semget(0x1234567, 1, 0o1600) >= 0,
    "queue": libc.msgget(0x1234567, 0o1600) >= 0,
    "another view": libc.unshare(0x10000000) == 0,
    "key's directory": tried(lambda: os.listdir(os.path.dirname(key))),
    "write beside": tried(lambda: write(os.path.dirname(home) + "/b")),
    "write data": tried(lambda: write(data)),
    "TCP": tried(lambda: socket.socket(socket.AF_INET)),
    "UDP": tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
    "pair of sockets": tried(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)),
    "connect": libc.connect(0, ctypes.create_string_buffer(16), 16) == 0 or ctypes.get_errno() != 1,
    "receive": libc.recvmsg(0, ctypes.create_string_buffer(64), 0) >= 0 or ctypes.get_errno() != 1,
    "local socket": tried(lambda: socket.socket(socket.AF_UNIX)),
    "socket in a thread": within(lambda: socket.socket(socket.AF_INET6)),
    "io_uring": libc.syscall(425, 1, ctypes.create_string_buffer(120)) >= 0,
    "ptrace": libc.ptrace(16, int(parent), 0, 0) == 0,
    "memory": memory(),
    "memory as a file": tried(lambda: open(f"/proc/{parent}/mem", "rb").close()),
    "environment of others": tried(lambda: open(f"/proc/{parent}/environ", "rb").read()),
    "signal": tried(lambda: os.kill(int(parent), 0)),
    "signal to all": tried(lambda: os.kill(0, 0)),
    "signal to a thread": libc.syscall(200, int(parent), 0) == 0,
    "signal to itself": tried(lambda: os.kill(os.getpid(), 0)),
    "thread": within(lambda: True),
    "said": [confined.network, confined.files, confined.signals],
}))
"""
ALWAYS = {"data", "home", "device", "library", "own limit", "own processors", "new file", "emptied own file",
          "signal to itself", "thread"}  # fmt: skip
OF_CALLS = {
    "TCP", "UDP", "local socket", "socket in a thread", "io_uring", "ptrace", "memory", "program", "fork",
    "mode of a key", "mode of an open file", "owner of a key", "times of a key", "attribute of a key",
    "length of a key", "limit of another", "order of others", "shared memory", "semaphore", "queue", "another view",
    "signal", "signal to all", "signal to a thread", "pair of sockets", "connect", "receive", "emptied data",
    "flags of a file", "owner of a signal", "kind of a signal", "newer calls", "openat2", "watch",
    "processors of another",
}  # fmt: skip
OF_FILES = {
    "key", "key in a thread", "key's directory", "write beside", "write data", "memory as a file",
    "environment of others",
}  # fmt: skip


def tries(folder: Path) -> dict[str, bool | list[bool]]:
    for name in ("home", "data", "keys"):
        (folder / name).mkdir()
    data, key = folder / "data/notes.csv", folder / "keys/identity.pem"
    data.write_text("note\nfever\n")
    key.write_text("secret")
    arguments = [str(folder / "home"), str(data), str(key), str(os.getpid()), hex(id(data))]
    done = subprocess.run(
        [sys.executable, "-I", "-c", TRIES, *arguments],
        env=stripped(os.environ, folder / "home"),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, bool | list[bool]] = json.loads(done.stdout)
    return found


def test_a_confined_process_reaches_its_data_and_nothing_of_the_site(tmp_path: Path) -> None:
    can, found = available(), tries(tmp_path)
    assert found.pop("said") == [can.network, can.files, can.signals]
    if not (can.network and can.files):
        pytest.skip(f"this kernel does not offer all of it: {can.text}")
    done = {name for name, well in found.items() if well}
    assert found.keys() == ALWAYS | OF_CALLS | OF_FILES
    assert done == ALWAYS


def test_what_is_not_enforced_is_said() -> None:
    from privet.client.trainer.confinement import Confined

    assert Confined(True, True, True).text == "confined: network, files, signals"
    assert Confined(True, False, False).text == "confined: network; not confined: files, signals"
    assert Confined(False, False, False).text == "confined: nothing; not confined: network, files, signals"


def test_a_trainers_environment_holds_no_secret(tmp_path: Path) -> None:
    given = {
        "AWS_SECRET_ACCESS_KEY": "x",
        "HTTPS_PROXY": "x",
        "SSH_AUTH_SOCK": "x",
        "PYTHONPATH": "x",
        "LD_PRELOAD": "x",
        "NVIDIA_API_KEY": "x",
        "TORCH_HUB_TOKEN": "x",
    }
    kept = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "2", "LANG": "C.UTF-8", "LD_LIBRARY_PATH": "/opt/cuda"}
    found = stripped({**given, **kept, "HOME": "/root", "PATH": "/secret"}, tmp_path)
    assert {name: found[name] for name in kept} == kept
    assert not set(given) & set(found)
    assert found["HOME"] == str(tmp_path)
    assert found["PATH"] == os.defpath


def test_keys_that_lie_where_a_trainer_reads_are_named(tmp_path: Path) -> None:
    site = load_site(site_toml(tmp_path / "site", "north", class_rows(4), seed=None))
    assert exposed(site, code_places()) == []
    assert site.ledger in exposed(site, [str(tmp_path)])
    assert site.identity in exposed(site, [str(tmp_path / "site")])


def test_the_numbers_of_system_calls_are_those_of_libseccomp() -> None:
    """Another source than this list, for both machines; it does not know the newest calls."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp is not installed")
    conditional = {
        "clone": confinement._CLONE, "kill": confinement._KILL, "tgkill": confinement._TGKILL,
        "prlimit64": confinement._PRLIMIT, "sched_setaffinity": confinement._AFFINITY, "fcntl": confinement._FCNTL,
        "ioctl": confinement._IOCTL, "open": confinement._OPEN, "openat": confinement._OPENAT,
    }  # fmt: skip
    hidden = {name: (number, number) for name, number in confinement._HIDDEN.items()}
    known = 0
    for column, machine in confinement._MACHINES.values():
        for name, numbers in {**confinement._REFUSED, **conditional, **hidden}.items():
            number = library.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(machine), name.encode())
            if number == -1:  # a call that this libseccomp does not know
                continue
            known += 1
            assert numbers[column] == (number if number >= 0 else None), (name, machine)
    assert known > 140
