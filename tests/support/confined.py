"""Run a command under the system call filter and the limits of a systemd unit, without systemd being in charge.

::

    python -m tests.support.confined UNIT COMMAND...

It takes `SystemCallFilter=`, `RestrictAddressFamilies=`, `RestrictNamespaces=`, `CapabilityBoundingSet=` (which must be
empty), `NoNewPrivileges=` and `LimitNOFILE=` from the unit. `systemd-analyze` says what the groups of calls hold, and
libseccomp loads them. Mounts, devices and users stay as they are.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

ALLOW, DENY = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO
NOT_EQUAL, MASKED_EQUAL = 1, 7  # SCMP_CMP_NE, SCMP_CMP_MASKED_EQ
NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW* flag of clone(2)
SPECIAL = {"clone", "clone3", "unshare", "setns"}
"""What `RestrictNamespaces=yes` filters: new namespaces, and `clone3`, whose flags no filter can see."""
ALWAYS = ["execve", "exit", "exit_group", "getrlimit", "rt_sigreturn", "sigreturn", "@default"]
"""What systemd allows with every list, by systemd.exec(5)."""


class Comparison(ctypes.Structure):
    """`struct scmp_arg_cmp` of libseccomp."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def settings(unit: Path) -> dict[str, list[str]]:
    """Return the values of a unit's settings in order; an empty value has cleared those before it."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in unit.read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith(("#", ";")):
            found[key.strip()] += [value.strip()]
    return found


@cache
def calls(name: str) -> frozenset[str]:
    """Return the system calls of a group such as `@system-service`, or a call itself."""
    if not name.startswith("@"):
        return frozenset({name})
    text = subprocess.check_output(["systemd-analyze", "--no-pager", "syscall-filter", name], text=True)
    inner = [line.strip() for line in text.splitlines()[1:]]
    return frozenset[str]().union(*(calls(each) for each in inner if each and not each.startswith("#")))


def allowed(filters: list[str]) -> frozenset[str]:
    """Return what several `SystemCallFilter=` lines allow together; the first has to be a list of what is allowed."""
    found = frozenset[str]()
    for line in filters:
        names = frozenset[str]().union(*(calls(each) for each in line.removeprefix("~").split()))
        found = found - names if line.startswith("~") else found | names
    return found.union(*(calls(each) for each in ALWAYS))


def confine(unit: Path) -> None:
    """Confine this process, and all that it starts, as a unit would be."""
    own = settings(unit)
    limit = int(own["LimitNOFILE"][-1])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    if own["NoNewPrivileges"] != ["yes"] or libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError("NoNewPrivileges= is not set")
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(lib.seccomp_init(DENY | errno.EPERM))
    refused = []
    for name in sorted(allowed(own["SystemCallFilter"]) - {"socket", *SPECIAL}):
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if number >= 0 and lib.seccomp_rule_add_array(context, ALLOW, number, 0, None):
            refused.append(name)
    families = [int(getattr(socket, name)) for name in own["RestrictAddressFamilies"][-1].split()]
    if own["RestrictNamespaces"] != ["yes"]:
        raise OSError("RestrictNamespaces= is not yes")
    lib.seccomp_rule_add_array(context, DENY | errno.ENOSYS, lib.seccomp_syscall_resolve_name(b"clone3"), 0, None)
    rules = [("socket", Comparison(0, 4, family, 0)) for family in families]  # SCMP_CMP_EQ
    rules.append(("clone", Comparison(0, MASKED_EQUAL, NEW_NAMESPACES, 0)))
    for name, comparison in rules:
        number = lib.seccomp_syscall_resolve_name(name.encode())
        if lib.seccomp_rule_add_array(context, ALLOW, number, 1, ctypes.byref(comparison)):
            refused.append(name)
    if refused or lib.seccomp_load(context):
        raise OSError(f"libseccomp did not take the filter: {refused}")


if __name__ == "__main__":
    confine(Path(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606
