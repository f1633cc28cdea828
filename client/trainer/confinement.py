"""Take from this process what a trainer has no use for: network, files of others, other processes.

Landlock (Linux 5.13 on) restricts files, and seccomp system calls. Neither needs rights, and neither can be undone, by
this process or by one that it starts. Both hold for the calling thread and the threads that it starts later, so they
come before any library that starts some. What the kernel does not offer is not enforced, and `confine` says so.
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

if TYPE_CHECKING:  # it imports NumPy, which starts threads
    from privet.client.site import SiteConfig

_NO_NEW_PRIVS, _DUMPABLE, _SECCOMP = 38, 4, 22
_FILTER = 2
_EPERM = 1
# linux/capability.h: version 3 of the interface, and CAP_DAC_READ_SEARCH.
_CAPABILITIES, _READ_ALL = 0x20080522, 1 << 2

# linux/landlock.h: rights on files, by the version of the interface (ABI) that knows them.
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_READ = 1 << 0 | 1 << 2 | 1 << 3  # execute, read file, read directory
_OF_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14
_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
_TCP, _SCOPES = 0b11, 0b11  # since 4: bind and connect; since 6: abstract sockets and signals
_TCP_SINCE, _SCOPES_SINCE = 4, 6

# System calls that are refused, by architecture: its number in linux/audit.h, and the calls' numbers. Sockets, io_uring
# (which makes sockets, too), memory and files of other processes, kernel keys, tracing.
_CALLS = {
    "x86_64": (0xC000003E, (41, 101, 248, 249, 250, 298, 310, 311, 321, 425, 426, 427, 438)),
    "aarch64": (0xC00000B7, (198, 117, 217, 218, 219, 241, 270, 271, 280, 425, 426, 427, 438)),
}
_X32 = 0x40000000

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
        signals: No signal reaches a process outside.
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
    network = _seccomp(libc)
    # Another thread would have kept all rights.
    return Confined(alone and network, alone and version > 0, alone and version >= _SCOPES_SINCE)


def available() -> Confined:
    """Return what `confine` could enforce here, without doing so."""
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    network = platform.machine() in _CALLS and _has_seccomp()
    return Confined(network, files=version > 0, signals=version >= _SCOPES_SINCE)


def hide_memory() -> None:
    """Keep other processes of this user from reading this process's memory, and the system from writing it to disk."""
    ctypes.CDLL(None).prctl(_DUMPABLE, 0, 0, 0, 0)


def code_places() -> list[str]:
    """Return where Python, its packages and the system's libraries lie."""
    import privet

    package = Path(privet.__path__[0])
    parts = [str((package / part).resolve()) for part in ("client", "common", "server", "simulations")]
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, *(path for path in sys.path if path)]
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
    """Refuse some system calls, with the error EPERM. Return whether that is enforced."""
    known = _CALLS.get(platform.machine())
    if known is None:
        return False
    code = _program(*known)
    program = _Program(len(code) // 8, code)
    return int(libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0)) == 0


def _program(architecture: int, calls: Sequence[int]) -> bytes:
    """Return the filter: `struct sock_filter` (code, jump if true, jump if false, value), 8 bytes each."""
    load, jump_equal, jump_least, give = 0x20, 0x15, 0x35, 0x06
    refuse, allow = 0x00050000 | _EPERM, 0x7FFF0000
    steps = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    # Calls of another convention on the same architecture have other numbers.
    steps += [(jump_least, 0, 1, _X32), (give, 0, 0, refuse)]
    for call in calls:
        steps += [(jump_equal, 0, 1, call), (give, 0, 0, refuse)]
    steps.append((give, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
