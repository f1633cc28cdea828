"""Take from this process what a trainer has no use for: network, files of others, other processes.

Landlock (Linux 5.13 on) restricts files, and seccomp system calls. Neither needs rights, and neither can be undone.
Both hold for the calling thread and the threads that it starts later, so they come before any library that starts
some. What the kernel does not offer is not enforced, and `confine` says so.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from privet.common.errors import StateError

if TYPE_CHECKING:  # it imports NumPy, which starts threads
    from privet.client.site import SiteConfig

_NO_NEW_PRIVS, _DUMPABLE, _SECCOMP = 38, 4, 22
_FILTER = 2
_EPERM, _ENOSYS = 1, 38
_CLONE_THREAD = 0x10000
# linux/capability.h: version 3 of the interface, and CAP_DAC_READ_SEARCH.
_CAPABILITIES, _READ_ALL = 0x20080522, 1 << 2

# linux/landlock.h: rights on files, by the version of the interface (ABI) that knows them.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
_OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_TCP, _SCOPES = 0b11, 0b11  # since 4: bind and connect; since 6: abstract sockets and signals
_TCP_SINCE, _SCOPES_SINCE = 4, 6

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By machine: its column below, and its number in linux/audit.h."""
# System calls that are refused, with their numbers on both machines; None: the machine has no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # The network: all of it, as a pair of sockets reaches others too, and takes sockets from them. And io_uring, which
    # does all this without a call of its own.
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211),
    "recvmsg": (47, 212), "sendmmsg": (307, 269), "recvmmsg": (299, 243),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # Memory and files of other processes, the kernel's keys, tracing.
    "ptrace": (101, 117), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "perf_event_open": (298, 241), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "bpf": (321, 280),
    "pidfd_getfd": (438, 438), "kcmp": (312, 272), "userfaultfd": (323, 282), "process_madvise": (440, 440),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "process_mrelease": (448, 448),
    # Landlock forbids to open a file, and not to change whose it is and who may read it; the older, to truncate it.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "truncate": (76, 45), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # Nor to watch what others do with theirs, or to open one by its number.
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "open_by_handle_at": (304, 265),
    # What other processes share without a file: memory, semaphores and messages of System V, queues of POSIX.
    "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "shmdt": (67, 197), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "semtimedop": (220, 192), "msgget": (68, 186), "msgsnd": (69, 189),
    "msgrcv": (70, 188), "msgctl": (71, 187), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # The order in which others run.
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "ioprio_set": (251, 30),
    "sched_setattr": (314, 274),
    # Other processes: a child would outlive this one, which is ended by its number.
    "fork": (57, None), "vfork": (58, None), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    # Another view of the file system, or of the rights in it.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
}  # fmt: skip
# Calls that take their arguments from memory, where no filter sees them, and that libraries can do without: they are
# told that there are none. So they are of all calls that are newer than this list.
_HIDDEN = {"clone3": 435, "openat2": 437}
_NEWEST = 462  # mseal, Linux 6.10
_CLONE, _KILL, _TGKILL, _PRLIMIT, _AFFINITY = (56, 220), (62, 129), (234, 131), (302, 261), (203, 122)
_FCNTL, _IOCTL, _OPEN, _OPENAT = (72, 25), (16, 29), (2, None), (257, 56)
_OWNING = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal to whoever is named, when a file can be read
_CHANGING = (0x8901, 0x8902, 0x40086602, 0x40046602, 0x401C5820, 0x40806685, 0x5412)
"""FIOSETOWN, SIOCSPGRP, FS_IOC_SETFLAGS, FS_IOC32_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY, TIOCSTI."""
_EMPTYING, _EMPTIES = 0x203, 0x200  # O_ACCMODE | O_TRUNC: a file that is opened to be read, and emptied
_X32 = 0x40000000
_FIRST, _NEXT = 16, 8
"""Where `struct seccomp_data` has the lower half of the first argument, and how far it is to that of the next one."""

SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/proc", "/sys", "/run/nvidia-persistenced",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/passwd", "/etc/group",
    "/etc/nsswitch.conf", "/etc/mime.types", "/etc/ssl/openssl.cnf", "/etc/OpenCL", "/etc/nvidia",
)  # fmt: skip
"""What Python and its libraries read beside themselves."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/kfd", "/dev/dri")


@dataclass(frozen=True)
class Confined:
    """What is enforced.

    Attributes:
        network: No socket can be made.
        files: Only what was named can be read, and only one directory written.
        signals: No signal reaches another process, and none is started.
    """

    network: bool
    files: bool
    signals: bool

    @property
    def text(self) -> str:
        """In words."""
        kinds = {"network": self.network, "files": self.files, "signals": self.signals}
        on, off = ([name for name, found in kinds.items() if found is asked] for asked in (True, False))
        return f"confined: {', '.join(on) or 'nothing'}" + (f"; not confined: {', '.join(off)}" if off else "")


def confine(readable: Iterable[str], writable: Sequence[str]) -> Confined:
    """Confine this process, as far as the kernel can.

    Args:
        readable: Files and directories that it may read, beside Python and the system's libraries.
        writable: Directories that it may read and write.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    alone = _threads() == 1
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return Confined(network=False, files=False, signals=False)
    _drop_capabilities(libc)
    version = _landlock(libc, [*code_places(), *readable], writable)
    calls = _seccomp(libc)
    # Another thread would have kept all rights.
    return Confined(alone and calls, alone and version > 0, alone and calls)


def available() -> Confined:
    """Return what `confine` could enforce here, without doing so."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    calls = platform.machine() in _MACHINES and _has_seccomp()
    return Confined(calls, files=version > 0, signals=calls)


def hide_memory() -> None:
    """Keep other processes of this user from reading this process's memory, and the system from writing it to disk."""
    ctypes.CDLL(None).prctl(_DUMPABLE, 0, 0, 0, 0)


def code_places() -> list[str]:
    """Return where Python, its packages and the system's libraries lie."""
    import privet

    package = Path(privet.__path__[0])
    parts = [str((package / part).resolve()) for part in ("client", "common", "server", "simulations")]
    # Not the directory in which a command was started, which an isolated interpreter, as a trainer is one, leaves out.
    here = os.path.realpath(".")
    paths = [path for path in sys.path if path and os.path.realpath(path) != here]
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, *paths]
    return [*SYSTEM, str(package), *parts, *python]


def exposed(config: SiteConfig, readable: Sequence[str]) -> list[Path]:
    """Return the site's files that a confined trainer could read all the same, as they lie where it may read."""
    secret = [config.ledger, config.ledger_key, config.anchor, config.identity, config.mldsa]
    if config.coordinator is not None:
        secret.append(config.coordinator.key)
    if config.log is not None:
        secret += [config.log.key, config.log.state]
    places = [Path(path).resolve() for path in readable]
    return [path for path in secret if path is not None and any(path.resolve().is_relative_to(p) for p in places)]


def require_unexposed(config: SiteConfig, readable: Sequence[str]) -> None:
    """Raise `StateError` if a trainer that may read these files could read the site's own."""
    if found := exposed(config, [*code_places(), *readable]):
        raise StateError(
            f"{found[0]} lies where a trainer reads data, a base or programs, and it is the site's alone",
            f"move it to a directory of its own, `mv {found[0]} DIRECTORY`, and name the new place in the site file",
        )


def _threads() -> int:
    """Return the number of this process's threads; 0 if it is not known."""
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError:
        return 0


def _has_seccomp() -> bool:
    try:
        return "Seccomp:" in Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up the capabilities that a process of root has, but that to read its data: some pass by Landlock."""
    head = struct.pack("=Ii", _CAPABILITIES, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(head, held) == 0:
        _, permitted, *_ = struct.unpack("=6I", held.raw)
        kept = permitted & _READ_ALL
        libc.capset(head, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


# --- Landlock ------------------------------------------------------------------------------------------------


def _landlock(libc: ctypes.CDLL, readable: Sequence[str], writable: Sequence[str]) -> int:
    """Restrict files. Return the version of the kernel's interface; 0 where nothing is enforced."""
    version = int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1))
    if version < 1:
        return 0
    handled = _FILES[min(version, max(_FILES))]
    attributes = struct.pack("=Q", handled)
    if version >= _TCP_SINCE:
        attributes += struct.pack("=Q", _TCP)
    if version >= _SCOPES_SINCE:
        attributes += struct.pack("=Q", _SCOPES)
    ruleset = libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return 0
    try:
        devices = [*_DEVICES, *(str(path) for path in Path("/dev").glob("nvidia*"))]
        rules = [(readable, _READ), (writable, handled), (devices, handled)]
        for paths, rights in rules:
            for path in dict.fromkeys(paths):
                _allow(libc, ruleset, path, rights & handled)
        return version if libc.syscall(_RESTRICT, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Allow something on a path and what is beneath it. A path that is not there stays forbidden."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not Path(path).is_dir():
            rights &= _OF_FILES
        libc.syscall(_ADD, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


# --- seccomp -------------------------------------------------------------------------------------------------


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _seccomp(libc: ctypes.CDLL) -> bool:
    """Refuse some system calls. Return whether that is enforced."""
    known = _MACHINES.get(platform.machine())
    if known is None:
        return False
    code = _program(*known, os.getpid())
    program = _Program(len(code) // 8, code)
    return int(libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)) == 0


def _program(column: int, architecture: int, process: int) -> bytes:
    """Return the filter: `struct sock_filter` (code, jump if true, jump if false, value), 8 bytes each.

    Args:
        column: Of the numbers of system calls.
        architecture: The machine's number.
        process: This process's number.
    """
    load, equal, least, beyond, any_of, mask, give = 0x20, 0x15, 0x35, 0x25, 0x45, 0x54, 0x06
    refuse, unknown, allow = 0x00050000 | _EPERM, 0x00050000 | _ENOSYS, 0x7FFF0000
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    # Calls of another convention on the same architecture have other numbers.
    steps += [(least, 0, 1, _X32), (give, 0, 0, refuse), (beyond, 0, 1, _NEWEST), (give, 0, 0, unknown)]
    for call in (numbers[column] for numbers in _REFUSED.values()):
        if call is not None:
            steps += [(equal, 0, 1, call), (give, 0, 0, refuse)]
    for call in _HIDDEN.values():
        steps += [(equal, 0, 1, call), (give, 0, 0, unknown)]

    def judge(
        calls: Sequence[int | None], argument: int, tests: Sequence[tuple[int, int]], *, admit: bool, bits: int = 0
    ) -> None:
        """Admit a call if one test of an argument holds, or refuse it then."""
        if calls[column] is None:
            return
        inner = [(load, 0, 0, _FIRST + _NEXT * argument), *([(mask, 0, 0, bits)] if bits else [])]
        for kind, value in tests:
            inner += [(kind, 0, 1, value), (give, 0, 0, allow if admit else refuse)]
        inner.append((give, 0, 0, refuse if admit else allow))
        steps.extend([(equal, 0, len(inner), calls[column] or 0), *inner])

    judge(_CLONE, 0, [(any_of, _CLONE_THREAD)], admit=True)  # threads
    for calls in (_KILL, _TGKILL):
        judge(calls, 0, [(equal, process)], admit=True)
    for calls in (_PRLIMIT, _AFFINITY):
        judge(calls, 0, [(equal, 0)], admit=True)  # its own
    judge(_FCNTL, 1, [(equal, each) for each in _OWNING], admit=False)
    judge(_IOCTL, 1, [(equal, each) for each in _CHANGING], admit=False)
    judge(_OPEN, 1, [(equal, _EMPTIES)], admit=False, bits=_EMPTYING)
    judge(_OPENAT, 2, [(equal, _EMPTIES)], admit=False, bits=_EMPTYING)
    steps.append((give, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
