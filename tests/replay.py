"""Run a command under the filters that containers and odd machines put around a process, to see compart cope.

    python -m tests.replay PROFILE[,PROFILE...] [--user UID] -- command...

Profiles: `docker` (the default profile of Docker), `no-landlock`, `no-namespaces`, `no-listener`. `--user` first
becomes that user and group, with no other groups and no capabilities.

`docker_default_profile.json` says what the default seccomp profile of Docker allows on x86-64, written down for these
tests in a form of their own: the profile itself is published by the Moby project (github.com/moby/profiles, file
seccomp/default.json, as of June 2026) and covers more machines. `allowed` are the calls that always pass; a rule of
`conditional` allows its calls, or answers an errno, from a kernel on, on a machine, without a capability, and for some
values of an argument; `with_capability` are calls that pass in a container which has it. Everything else is `refused`.
The profile's tables for x32 and i386 are left out: those calls pass here.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from compart.backend.linux import bpf, syscalls
from compart.backend.linux.bpf import ALLOW, Action, Condition, Equals, Masked, Rule, errno_

PROFILE = json.loads(Path(__file__).with_name("docker_default_profile.json").read_text())

MACHINES = {"x86_64": syscalls.AUDIT_ARCH_X86_64, "aarch64": syscalls.AUDIT_ARCH_AARCH64}
ARCH = MACHINES.get(platform.machine(), 0)

# <linux/sched.h>: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
CLONE_NEW = 0x7E020000

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
PR_SET_NO_NEW_PRIVS = 38


def docker(
    *, arch: int = ARCH, kernel: tuple[int, ...] = (6, 18), capabilities: Collection[str] = (), cached: bool = False
) -> bytes:
    """Docker's default filter, for a container that has `capabilities` (such as "CAP_SYS_ADMIN")."""
    refused = errno_(getattr(errno, PROFILE["refused"]))
    always = set(PROFILE["allowed"])
    for capability in capabilities:
        always.update(PROFILE["with_capability"].get(capability, ()))
    rules = [Rule(name) for name in sorted(always)]
    conditional: dict[str, list[dict]] = defaultdict(list)
    for entry in PROFILE["conditional"]:
        since = tuple(int(part) for part in entry.get("kernel", "0").split("."))
        machine = MACHINES[entry["machine"]] if "machine" in entry else arch
        if kernel >= since and arch == machine and entry.get("without") not in capabilities:
            for name in entry["calls"]:
                conditional[name].append(entry)
    for name, entries in conditional.items():
        if name not in always:
            (entry,) = entries
            rules.append(conditional_rule(name, entry, refused))
    return bpf.compile(rules, arch=arch, default=refused, foreign=ALLOW, cached=cached)


def conditional_rule(name: str, entry: dict, refused: Action) -> Rule:
    then = errno_(getattr(errno, entry["errno"])) if "errno" in entry else ALLOW

    def any_of(values: list[int]) -> tuple[tuple[Condition, ...], ...]:
        return tuple((Equals(entry["argument"], value, full=True),) for value in values)

    if "not" in entry:
        return Rule(name, when=any_of(entry["not"]), then=refused, otherwise=then)
    if "one_of" in entry:
        return Rule(name, when=any_of(entry["one_of"]), then=then)
    if "mask" in entry:
        return Rule(name, when=((Masked(entry["argument"], entry["mask"], entry["is"], full=True),),), then=then)
    return Rule(name, then=then)


def without_landlock(*, arch: int = ARCH) -> bytes:
    """A kernel without Landlock."""
    answer = errno_(errno.ENOSYS)
    calls = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
    return around([Rule(name, then=answer) for name in calls], arch)


def without_namespaces(*, arch: int = ARCH) -> bytes:
    """A machine on which nobody may make or enter a namespace, or mount."""
    refused = errno_(errno.EPERM)
    calls = (
        "unshare setns mount umount2 pivot_root open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick "
        "mount_setattr"
    )
    rules = [Rule(name, then=refused) for name in calls.split()]
    rules.append(Rule("clone", when=((Masked(0, CLONE_NEW, 0),),), otherwise=refused))
    rules.append(Rule("clone3", then=errno_(errno.ENOSYS), because="its flags cannot be seen"))
    return around(rules, arch)


def without_listener(*, arch: int = ARCH) -> bytes:
    """A process that is already under a supervisor: the kernel allows one listener in a chain of filters."""
    flag = SECCOMP_FILTER_FLAG_NEW_LISTENER
    wants_one = (Equals(0, SECCOMP_SET_MODE_FILTER), Masked(1, flag, flag))
    return around([Rule("seccomp", when=(wants_one,), then=errno_(errno.EBUSY), otherwise=ALLOW)], arch)


def around(rules: list[Rule], arch: int) -> bytes:
    return bpf.compile(rules, arch=arch, default=ALLOW, foreign=ALLOW, cached=True)


PROFILES = {
    "docker": docker,
    "no-landlock": without_landlock,
    "no-namespaces": without_namespaces,
    "no-listener": without_listener,
}


class SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(program: bytes) -> None:
    """Put the calling thread under `program`, for good: no_new_privs, then seccomp(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")
    call = syscalls.number(ARCH, "seccomp")
    if libc.syscall(call, SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(SockFprog(len(program) // 8, program))):
        raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_SET_MODE_FILTER)")


def become(user: int) -> None:
    """Take the user and group `user`, no other groups, and no capabilities (capset(2))."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    if libc.capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.replay", allow_abbrev=False)
    parser.add_argument("profiles", help=f"one or more of {', '.join(PROFILES)}, separated by commas")
    parser.add_argument("--user", type=int)
    parser.add_argument("command", nargs="+", metavar="-- command")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.profiles.split(",")) - PROFILES.keys()
    if unknown:
        parser.error(f"no profile {', '.join(sorted(unknown))}")
    if chosen.user is not None:
        become(chosen.user)
    for profile in chosen.profiles.split(","):
        install(PROFILES[profile]())
    os.execvp(chosen.command[0], chosen.command)


if __name__ == "__main__":
    main(sys.argv[1:])
