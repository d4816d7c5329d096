"""The walls of Linux, in the order in which they go up.

`Linux.plan` runs in the host before the fork and decides everything; `Linux.enter` runs in the child and only carries it
out. Any step that fails there ends the child, and the host raises UnsupportedError with the wall's name: nothing is
downgraded on the way.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import platform
import resource
import stat
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from compart.backend import Channel, Enforcement, Wall
from compart.backend.linux import _sys, filters, landlock, mounts, notify, syscalls
from compart.backend.linux.filters import (
    BASE,
    CONTROL,
    FIRST_GRANT,
    LIFELINE,
    MOST_RANGES,
    RESULT,
    TRACE,
    WIDTH,
    Layout,
)
from compart.backend.linux.script import Script
from compart.capability import Handed
from compart.errors import PolicyError, UnsupportedError
from compart.policy import Grant, Policy
from compart.rights import Rights

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SIGKILL = 9
F_SETOWN, F_SETSIG, F_SETFL, O_ASYNC = 8, 10, 4, 0o20000
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
LINUX_CAPABILITY_VERSION_3 = 0x20080522
MOST_SIGNALS = 256
MOST_PLANS = 64
LAST = 0x7FFFFFFF
RESOLVE = 0x08 | 0x02  # RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS (openat2(2))
ARCHES = {"x86_64": syscalls.AUDIT_ARCH_X86_64, "aarch64": syscalls.AUDIT_ARCH_AARCH64}


environ: Any = os.environ
environb: Any = os.environb


class WallError(Exception):
    """In the child: a wall could not be put up."""

    def __init__(self, wall: str, reason: str) -> None:
        self.wall, self.reason = wall, reason
        super().__init__(f"{wall}: {reason}")


@dataclass(frozen=True, slots=True)
class Written:
    """Scripts as the child carries them out, the last wall apart, and each call's wall and name, should it fail."""

    first: tuple[bytes, bytes]
    first_names: tuple[tuple[str, str], ...]
    last: tuple[bytes, bytes]
    last_names: tuple[tuple[str, str], ...]
    hosts_faulthandler: bool


class Ruleset:
    """A Landlock ruleset, closed when nobody holds this object any more; number -1 where there is no Landlock."""

    __slots__ = ("_pid", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self._pid = os.getpid()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():
            return
        if self.number >= 0 and self._pid == os.getpid() and not _sys.in_own_fork():
            with contextlib.suppress(OSError):
                os.close(self.number)


@dataclass(slots=True)
class Plan:
    """What the child does, and what the host needs to supervise it. Made for one compartment."""

    policy: Policy
    layout: Layout
    arch: int
    program: bytes
    flags: int
    spaces: mounts.Namespaces
    landlocked: Ruleset
    moves: list[tuple[int, int]]
    numbers: list[int]
    cwd: str
    host: int
    null: int
    written: tuple[object, Written] | None = None

    @property
    def joins(self) -> tuple[tuple[int, int], ...]:
        return self.spaces.joins

    @property
    def paths(self) -> tuple[tuple[str, str], ...]:
        return tuple((grant.path, grant.mode) for grant in self.policy.grants if grant.path)

    def write(self, channel: Channel) -> Written:
        """The child's script, once the channel's descriptors are known.

        A plan may serve several threads at once, so nothing of one call is kept in it but the last script and its key.
        """
        hosts = faulthandler.is_enabled()
        key = (channel, *self.moves, self.cwd, self.null, _zone(), _sys.limits(), hosts)
        kept = self.written
        # The same numbers come again in most calls, and so does the script.
        if kept is not None and kept[0] == key:
            return kept[1]
        first, last = write_script(self, channel), write_last(self)
        made = Written(first.pack(), first.names(), last.pack(), last.names(), hosts)
        self.written = (key, made)
        return made


class Linux:
    """The backend for Linux: seccomp, Landlock, namespaces, rlimits."""

    # ---- host --------------------------------------------------------------------------------------------------------

    def open_beneath(self, directory: int, name: bytes, flags: int, mode: int) -> int:
        return int(_sys.openat2(directory, name, flags, mode, RESOLVE))

    def detached(self, descriptor: int, writable: bool) -> int:
        return mounts.detached(descriptor, writable)

    def __init__(self) -> None:
        self._plans: dict[tuple[Policy, int], Plan] = {}

    def forget(self) -> None:
        """Drop what is kept between calls: plans, namespaces, rulesets."""
        self._plans.clear()
        mounts.close_all()
        _rulesets.clear()

    def plan(self, policy: Policy, handed: Sequence[Handed]) -> Plan:
        """Decide everything before the fork. UnsupportedError for a wall that cannot be put up."""
        # What a policy alone decides is kept, but for what can change under it: paths, and what was handed over.
        if handed or any(grant.path for grant in policy.grants):
            return self._plan(policy, handed)
        key = policy, os.geteuid()
        kept = self._plans.get(key)
        if kept is None or kept.host != os.getpid() or kept.null != _null():
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            kept = self._plans[key] = self._plan(policy, handed)
        return kept

    def _plan(self, policy: Policy, handed: Sequence[Handed]) -> Plan:
        arch = ARCHES.get(platform.machine())
        if arch is None:
            raise UnsupportedError("seccomp", f"compart has no table of system calls for {platform.machine()}")
        if policy.processes:
            raise UnsupportedError(
                "processes",
                f"processes={policy.processes}: compart cannot bound processes inside yet",
                "use processes=0",
            )
        _require_seccomp(policy)
        listener = _has_listener()
        if policy.threads is not None and not listener and "listener" not in policy.waive:
            raise UnsupportedError(
                "listener",
                f"threads={policy.threads} needs a seccomp listener, and {_listener_reason()}",
                "leave threads=None, or waive listener",
            )
        by_name = tuple(grant for grant in policy.grants if grant.kind in ("file", "directory"))
        directories = [item for item in handed if item.kind == "directory"]
        ranges, numbers = _ranges(handed)
        layout = Layout(
            ranges=ranges,
            by_name=_widest(grant.mode for grant in by_name),
            beneath=_widest(item.mode for item in directories),
            listener=listener,
            count_threads=listener,
        )
        return Plan(
            policy=policy,
            layout=layout,
            arch=arch,
            program=filters.program(layout, arch) if _has_seccomp() else b"",
            flags=_flags() if listener else 0,
            spaces=_spaces(by_name),
            landlocked=_ruleset(policy, by_name, directories),
            moves=[(item.descriptor, number) for item, number in zip(handed, numbers, strict=True)],
            numbers=numbers,
            cwd=_working_directory() if by_name else "/",
            host=os.getpid(),
            null=_null(),
        )

    def enforcement(self, policy: Policy) -> Enforcement:
        """Which walls a compartment of this policy gets here, and why the others are missing."""
        _require_seccomp(policy)
        by_name = tuple(grant for grant in policy.grants if grant.kind in ("file", "directory"))
        abi = landlock.abi()
        listener = _has_listener()
        try:
            names = [name for name, kind in mounts.KINDS if kind in dict(_spaces(by_name).joins)]
            spaces = Wall("namespaces", bool(names), "empty root; joined: " + ", ".join(names))
            if not names:
                spaces = Wall("namespaces", False, _namespaces_reason())
        except UnsupportedError as error:
            spaces = Wall("namespaces", False, error.reason)
        return Enforcement((
            Wall("shared_memory", True, "inherited shared mappings that could be written are replaced"),
            spaces,
            Wall("no_new_privs", True, "no set-user-ID, no file capabilities"),
            Wall("landlock", bool(abi), f"ABI {abi}" if abi else "the kernel has no Landlock"),
            Wall("descriptors", True, "only what was handed over is open; rights by number range"),
            Wall("rlimits", True, _limits_text(policy)),
            Wall("capabilities", True, "none held, none to be had"),
            Wall("seccomp", _has_seccomp(), "default deny; x32 and i386 refused"),
            Wall("listener", listener, "refused calls are recorded" if listener else _listener_reason()),
        ))  # fmt: skip

    # ---- child -------------------------------------------------------------------------------------------------------

    def enter(self, plan: Plan, script: Written, prepare: Callable[[], None]) -> None:
        """Put up every wall of the plan. There is no way back."""
        # Few lines, few names: each Python object that is touched for the first time after a fork costs a page fault.
        failed = _sys.run(*script.first)
        if failed is not None:
            raise _failure(script.first_names, failed)
        # The objects stay, as modules hold them.
        environ._data = environb._data = {}
        if plan.policy.env:
            environ.update(plan.policy.env)
        if script.hosts_faulthandler:
            # Its handlers were just taken away.
            faulthandler.disable()
        faulthandler.enable(2, True)
        if plan.layout.listener:
            faulthandler.unregister(notify.STACK_SIGNAL)
            faulthandler.register(notify.STACK_SIGNAL, TRACE, False)
        prepare()
        failed = _sys.run(*script.last)
        if failed is not None:
            raise _failure(script.last_names, failed)


def _failure(names: tuple[tuple[str, str], ...], failed: tuple[int, int]) -> WallError:
    index, number = failed
    wall, name = names[index]
    return WallError(wall, f"{name}: {os.strerror(number)} (errno {number})")


# ---- the script of a compartment: everything that can be decided before the fork -----------------------------------------


def write_script(plan: Plan, channel: Channel) -> Script:
    """The child's steps up to the last wall. Runs in the host; pure but for its limits."""
    script = Script(plan.arch)
    script.add("no_new_privs", "default_signals")
    if channel.lifeline >= 0:
        script.add("no_new_privs", "die_with_writer", channel.lifeline)
    else:
        script.add("no_new_privs", "prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    script.add("no_new_privs", "exit_unless_child_of", plan.host)
    script.add("shared_memory", "drop_shared_mappings")
    if plan.policy.memory_bytes is not None:
        script.add("rlimits", "few_arenas")
        script.add("rlimits", "limit_memory", plan.policy.memory_bytes)
    for kind, descriptor in plan.joins:
        script.add("namespaces", "setns", descriptor, kind)
    # Names that are relative outside mean the same inside when the working directory was granted; else the root.
    script.add("namespaces", "chdir", b"/\0")
    if plan.cwd != "/" and plan.joins:
        script.add("namespaces", "chdir", os.fsencode(plan.cwd) + b"\0", must=False)
    script.add("no_new_privs", "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if plan.landlocked.number >= 0:
        # Landlock before seccomp: the filter refuses landlock_restrict_self.
        script.add("landlock", "landlock_restrict_self", plan.landlocked.number, 0)
    _keep_only(script, plan, channel)
    _limit(script, plan.policy)
    script.add("capabilities", "prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, must=False)
    script.add("capabilities", "capset", struct.pack("=II", LINUX_CAPABILITY_VERSION_3, 0), bytes(24))
    # The host reads the arguments of refused calls.
    script.add("capabilities", "prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
    script.add("no_new_privs", "clear_environ", _zone().encode() + b"\0")
    return script


def _zone() -> str:
    """What the C library of this process has loaded as its time zone, brought up to date with TZ first."""
    global _loaded_zone
    wanted = os.environ.get("TZ", "/etc/localtime")
    if wanted != _loaded_zone:
        time.tzset()
        _loaded_zone = wanted
    return wanted if "\0" not in wanted else "/etc/localtime"


_loaded_zone = ""


def write_last(plan: Plan) -> Script:
    """The child's last steps, after which only what the filter allows is possible."""
    script = Script(plan.arch)
    # Last, as until now numbers above it are still moved about. The hard limit stays: the host lifts the soft one for a
    # moment when it installs a copy of a granted descriptor. No call that changes a limit passes the filter.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = struct.pack("=qq", plan.policy.open_files, hard)
    script.add("rlimits", "prlimit64", 0, resource.RLIMIT_NOFILE, limits, 0)
    script.add("seccomp", "install_trap")
    # Told even without a listener: from now on nothing that it says of its walls is believed.
    script.add("seccomp", "seccomp_tell", plan.program, len(plan.program) // 8, plan.flags, CONTROL)
    return script


def _keep_only(script: Script, plan: Plan, channel: Channel) -> None:
    """Move every descriptor to its number, and close all others."""
    moves = [
        (plan.null, 0),
        (channel.stdout, 1),
        (channel.stderr, 2),
        (channel.result, RESULT),
        (channel.control, CONTROL),
        (channel.trace, TRACE),
        *([(channel.lifeline, LIFELINE)] if channel.lifeline >= 0 else []),
        *plan.moves,
    ]

    def close(first: int, last: int) -> None:
        if first <= last:
            script.add("descriptors", "close_range", first, last, 0)

    # What is not needed goes first; that frees low numbers for what stands where something will arrive.
    sources = sorted({source for source, _ in moves})
    first = 0
    for source in sources:
        close(first, source - 1)
        first = source + 1
    close(first, LAST)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(number for _, number in moves)
    if hard != resource.RLIM_INFINITY and hard <= top:
        raise UnsupportedError(
            "descriptors",
            f"the hard limit on open files is {hard} and {top + 1} are needed",
            "raise it with `ulimit -Hn`",
        )
    if soft != resource.RLIM_INFINITY and soft <= top:
        script.add("descriptors", "prlimit64", 0, resource.RLIMIT_NOFILE, struct.pack("=qq", hard, hard), 0)
    staged = {source: source for source in sources}
    free = iter(number for number in range(3, BASE) if number not in staged)
    for source in sources:
        if source < 3 or source >= BASE:
            staged[source] = next(free)
            script.add("descriptors", "dup3", source, staged[source], os.O_CLOEXEC)
    for source, number in moves:
        script.add("descriptors", "dup3", staged[source], number, 0)
    close(3, BASE - 1)
    first = BASE
    for number in sorted(number for _, number in moves if number >= BASE):
        close(first, number - 1)
        first = number + 1
    close(first, LAST)


def cpu_seconds(policy: Policy) -> int | None:
    """The kernel's own limit on CPU time, in whole seconds: it stands behind the host, which ends a call to the millisecond.

    It also ends a stream that nobody reads: then no thread of the host watches the clock.
    """
    if policy.cpu is not None:
        return math.ceil(policy.cpu) + 1
    if policy.timeout is not None:
        return math.ceil(policy.timeout * (os.cpu_count() or 1)) + 1
    return None


def _limit(script: Script, policy: Policy) -> None:
    def put(which: int, soft: int, hard: int | None = None) -> None:
        _, most = resource.getrlimit(which)
        hard = soft if hard is None else hard
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        script.add("rlimits", "prlimit64", 0, which, struct.pack("=qq", soft, hard), 0)

    seconds = cpu_seconds(policy)
    if seconds is not None:
        put(resource.RLIMIT_CPU, seconds, seconds + 1)
    # Not 0: a core_pattern that is a pipe does not look at the limit unless it is exactly 1 (core(5)), and a file of 1 byte
    # is not written either.
    put(resource.RLIMIT_CORE, 1)
    put(resource.RLIMIT_MEMLOCK, 0)
    put(resource.RLIMIT_SIGPENDING, MOST_SIGNALS)
    put(resource.RLIMIT_MSGQUEUE, 0)


# ---- what this machine can do, tried once -----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _has_seccomp() -> bool:
    return _sys.seccomp_flags_known(0)


def _require_seccomp(policy: Policy) -> None:
    if not _has_seccomp() and "seccomp" not in policy.waive:
        raise UnsupportedError(
            "seccomp",
            "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER)",
            "there is no compartment without them",
        )


@lru_cache(maxsize=1)
def _flags() -> int:
    """The flags of seccomp(2) for a filter with a listener."""
    return notify.NEW_LISTENER | (notify.WAIT_KILLABLE_RECV if notify.killable() else 0)


@lru_cache(maxsize=1)
def _listener_reason() -> str:
    """Why no listener can be had here; "" when one can. One listener per chain of filters (seccomp_unotify(2))."""
    if not _sys.seccomp_flags_known(notify.NEW_LISTENER):
        return "the kernel has no seccomp listeners (Linux 5.0)"
    return _try_listener()


def _try_listener() -> str:
    allow_all = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    said_r, said_w = os.pipe()
    try:
        pid, pidfd = _sys.fork(probe_heap=True)
        if pid == 0:
            try:
                _sys.prctl(PR_SET_NO_NEW_PRIVS, 1)
                _sys.seccomp(allow_all, _flags())
                os.write(said_w, b"ok")
            except OSError as error:
                os.write(said_w, (error.strerror or "refused").encode())
            finally:
                os._exit(0)
        _sys.waitid(pidfd)
        os.close(pidfd)
        os.close(said_w)
        said_w = -1
        said = os.read(said_r, 200).decode()
    finally:
        os.close(said_r)
        if said_w >= 0:
            os.close(said_w)
    return (
        ""
        if said == "ok"
        else f"seccomp refuses a listener ({said}); a filter around this process may have one already"
    )


_nothing = (-1, 0)


def _null() -> int:
    """A pipe that nobody writes to, for descriptor 0 inside: it is at its end, and no device of the host's."""
    global _nothing
    number, inode = _nothing
    try:
        # A host that became a daemon may have closed it, and the number may be anything by now.
        if os.fstat(number).st_ino != inode or not stat.S_ISFIFO(os.fstat(number).st_mode):
            raise OSError
    except OSError:
        number, writer = os.pipe()
        os.close(writer)
        _nothing = number, os.fstat(number).st_ino
    return number


def _has_listener() -> bool:
    return _listener_reason() == ""


_no_namespaces: list[str] = []


def _spaces(by_name: tuple[Grant, ...]) -> mounts.Namespaces:
    try:
        return mounts.namespaces(by_name)
    except UnsupportedError as error:
        # Nothing granted by name: the other walls hold the same promises alone.
        if by_name:
            raise
        _no_namespaces[:] = [error.reason]
        return mounts.Namespaces((), ())


def _namespaces_reason() -> str:
    return _no_namespaces[0] if _no_namespaces else "refused"


def _ranges(handed: Sequence[Handed]) -> tuple[tuple[Rights, ...], list[int]]:
    """One range of numbers for each set of rights: the sets, and each descriptor's number."""
    sets: list[Rights] = sorted({item.rights for item in handed}, key=lambda held: held.words)
    if len(sets) > MOST_RANGES:
        raise PolicyError(f"{len(sets)} different sets of rights in one call; at most {MOST_RANGES} are possible")
    used = dict.fromkeys(sets, 0)
    numbers = []
    for item in handed:
        if used[item.rights] == WIDTH:
            raise PolicyError(f"more than {WIDTH} descriptors with the same rights in one call; hand over a Directory")
        numbers.append(FIRST_GRANT + WIDTH * sets.index(item.rights) + used[item.rights])
        used[item.rights] += 1
    return tuple(sets), numbers


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


def _widest(modes: object) -> str:
    found = set(modes)  # type: ignore[call-overload]
    return "" if not found else "r" if found == {"r"} else "rw"


_rulesets: dict[tuple[object, ...], Ruleset] = {}
MOST_RULESETS = 64


def _ruleset(policy: Policy, by_name: tuple[Grant, ...], directories: list[Handed]) -> Ruleset:
    """A Landlock ruleset for these grants. UnsupportedError for one that cannot be bounded without Landlock."""
    if not landlock.abi():
        modes = {grant.mode for grant in by_name} | {item.mode for item in directories}
        if len(modes) > 1 and "landlock" not in policy.waive:
            raise UnsupportedError(
                "landlock",
                "paths granted for reading beside others for writing need it, as a read-only mount does not stop named pipes",
                "grant all of them 'r', or waive landlock",
            )
        if any(grant.mode == "w" for grant in by_name) and "landlock" not in policy.waive:
            raise UnsupportedError(
                "landlock", "a file granted by name for writing alone needs Landlock", "grant 'rw', or waive landlock"
            )
        return Ruleset(-1)
    key = by_name, mounts.identities(by_name)
    if not directories and (kept := _rulesets.get(key)) is not None:
        return kept
    rules = _named(by_name)
    try:
        made = Ruleset(
            landlock.ruleset(rules + [(d.descriptor, landlock.ACCESS["directory", d.mode]) for d in directories])
        )
    finally:
        for descriptor, _ in rules:
            os.close(descriptor)
    if not directories:
        if len(_rulesets) >= MOST_RULESETS:
            _rulesets.clear()
        _rulesets[key] = made
    return made


def _named(by_name: tuple[Grant, ...]) -> list[tuple[int, int]]:
    rules: list[tuple[int, int]] = []
    for grant in by_name:
        try:
            descriptor = os.open(grant.path, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            for opened, _ in rules:
                os.close(opened)
            raise PolicyError(f"{grant}: {error.strerror}; name something that exists") from None
        rules.append((descriptor, landlock.ACCESS[grant.kind, grant.mode]))
    return rules


def _limits_text(policy: Policy) -> str:
    memory = "unlimited" if policy.memory_bytes is None else f"{policy.memory_bytes / 2**20:.0f} MiB above the start"
    cpu = "unlimited" if policy.cpu is None else f"{policy.cpu} s"
    return f"memory {memory}, CPU {cpu}, {policy.open_files} descriptors, no core, no locked memory"
