"""The table of system calls: what a compartment may ask the kernel for, and why.

Pure: a layout in, rules out, on every system. Default deny; a call that is not in the table is refused, also a number
that no kernel has yet. Facts: the manual pages of section 2, capsicum(4) for what capability mode permits.

Descriptors are told apart by their number (see `bpf.Descriptor`). Numbers below BASE are the compartment's own: what
it makes itself, its standard streams and what it opens beneath a granted directory. RLIMIT_NOFILE is at most BASE and
cannot be changed from inside, so the kernel never hands out a higher number; copies of a granted descriptor are made by
the host alone, in the same range; the channel cannot be closed, so nothing else ever stands at its numbers. Nothing the
compartment does can move a descriptor out of its range.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from compart import rights as r
from compart.backend.linux import bpf, syscalls
from compart.backend.linux.bpf import Below, Condition, Descriptor, Equals, Masked, OneOf, Rule, Zero
from compart.rights import Rights

BASE = 480
"""The first number of the first range; also the most that RLIMIT_NOFILE may be."""

WIDTH = 32
"""How many descriptors a range holds."""

RESULT, CONTROL, TRACE, LIFELINE = BASE, BASE + 1, BASE + 2, BASE + 3
"""Range 0 is the channel: the pipe the answer goes out by, the socket for descriptors, the pipe for stacks and hints,
and the pipe whose other end the host holds while it lives."""

FIRST_GRANT = BASE + WIDTH
MOST_RANGES = 15

CLONE_THREAD_FLAGS = 0x3D0F00
"""What pthread_create(3) of glibc asks of clone(2): VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID
CHILD_CLEARTID. musl adds CLONE_DETACHED (0x400000), which the kernel ignores."""

REFUSED = errno.EPERM
TRAP_EMPTY_PATH = 1

O_ACCMODE, O_CREAT, O_TMPFILE, RWF_NOAPPEND = 3, 0o100, 0o20000000, 0x20
PROT_EXEC = 4
MAP_ANONYMOUS = 0x20
MAP_SHARED_BITS = 0x03
AT_EMPTY_PATH = 0x1000
TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_GETPIPE_SZ = 0, 1, 2, 3, 4, 1030, 1032
PR_ALLOWED = (
    3,  # PR_GET_DUMPABLE
    15,  # PR_SET_NAME
    16,  # PR_GET_NAME
    21,  # PR_GET_SECCOMP
    23,  # PR_CAPBSET_READ
    38,  # PR_SET_NO_NEW_PRIVS
    39,  # PR_GET_NO_NEW_PRIVS
    0x53564D41,  # PR_SET_VMA: malloc names its mappings
)

SOL_SOCKET = 1
PLAIN_SOCKET_OPTIONS = (2, 3, 4, 6, 7, 8, 9, 10, 13, 18, 19, 20, 21, 29, 30, 38, 39)
"""REUSEADDR TYPE ERROR BROADCAST SNDBUF RCVBUF KEEPALIVE OOBINLINE LINGER RCVLOWAT SNDLOWAT RCVTIMEO SNDTIMEO TIMESTAMP
ACCEPTCONN PROTOCOL DOMAIN (socket(7))"""

READING_AT = ("openat", "newfstatat", "faccessat", "faccessat2", "readlinkat")
CHANGING_AT = ("mkdirat", "unlinkat", "renameat", "renameat2", "symlinkat", "utimensat", "futimesat")
READING = ("open", "stat", "lstat", "access", "readlink", "chdir")
CHANGING = ("creat", "mkdir", "rmdir", "unlink", "rename", "symlink", "truncate", "utime", "utimes")

CHANNEL_RIGHTS = r.CAP_WRITE


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about a compartment that its filter depends on.

    ranges: the sets of rights of the granted descriptors, one per range from FIRST_GRANT on.
    by_name: "" when no path is granted, "r" or "rw" when code may open granted paths by name.
    beneath: the same for directories held as descriptors.
    listener: whether refused calls are told to the host.
    count_threads: whether the host must agree to each new thread.
    """

    ranges: tuple[Rights, ...] = ()
    by_name: str = ""
    beneath: str = ""
    listener: bool = True
    count_threads: bool = False

    def mask(self, needed: Rights) -> int:
        """The ranges whose rights include `needed`, as `bpf.Descriptor` takes them."""
        every = (CHANNEL_RIGHTS, *self.ranges)
        return sum(1 << k for k, held in enumerate(every) if needed <= held)


def refusal(layout: Layout) -> bpf.Action:
    """What a refused call meets: the listener, or plain EPERM where there can be none."""
    return bpf.NOTIFY if layout.listener else bpf.errno_(REFUSED)


@lru_cache(maxsize=256)
def program(layout: Layout, arch: int = syscalls.AUDIT_ARCH_X86_64) -> bytes:
    """The compiled filter of a layout: an array of struct sock_filter (seccomp(2))."""
    refuse = refusal(layout)
    return bpf.compile(list(rules(layout)), arch=arch, default=refuse, foreign=refuse, base=BASE, width=WIDTH)


def rules(layout: Layout) -> Iterator[Rule]:
    """The table. Each allowed call carries its reason."""
    yield from own_memory()
    yield from own_thread(layout)
    yield from own_identity(layout)
    yield from own_signals(layout)
    yield from time_and_chance()
    yield from own_objects()
    yield from descriptors(layout)
    yield from sockets(layout)
    yield from socket_questions(layout)
    if layout.by_name or layout.beneath:
        yield from paths(layout)


def allow(names: str, because: str, *conditions: Condition, otherwise: bpf.Action | None = None) -> Iterator[Rule]:
    for name in names.split():
        yield Rule(name, when=(tuple(conditions),), because=because, otherwise=otherwise)


def either(names: str, because: str, *alternatives: Iterable[Condition]) -> Iterator[Rule]:
    for name in names.split():
        yield Rule(name, when=tuple(tuple(a) for a in alternatives), because=because)


def own_memory() -> Iterator[Rule]:
    yield from allow("brk munmap mremap madvise mincore msync membarrier", "its own memory")
    # mlock is bounded by RLIMIT_MEMLOCK, which is 0; policies of NUMA placement speak of own pages only.
    yield from allow("mlock munlock mlock2 munlockall mbind get_mempolicy set_mempolicy", "its own memory")
    yield from allow("mprotect", "guard pages of stacks and arenas; never executable", Masked(2, PROT_EXEC, 0))


def own_thread(layout: Layout) -> Iterator[Rule]:
    yield from allow("exit exit_group futex futex_waitv futex_wake futex_wait futex_requeue", "the thread runtime")
    yield from allow("set_robust_list rseq set_tid_address sched_yield getcpu restart_syscall", "the thread runtime")
    yield from allow(
        "get_robust_list sched_getaffinity sched_getparam sched_getscheduler", "asks of itself", Equals(0, 0)
    )
    yield Rule(
        "clone3", then=bpf.errno_(errno.ENOSYS), because="its flags sit behind a pointer; libc falls back to clone"
    )
    if not (layout.count_threads and layout.listener):
        yield from allow(
            "clone",
            "threads of its own; OpenBLAS makes them again after a fork and waits for ever if it may not",
            Masked(0, 0xFFFFFFFF & ~0x400000, CLONE_THREAD_FLAGS),
        )
    yield from allow("prctl", "names of threads and mappings, and questions about itself", OneOf(0, PR_ALLOWED))
    # oneDNN asks for AMX by arch_prctl and goes without when it may not: no violation worth a word.
    yield Rule("arch_prctl", then=bpf.errno_(REFUSED), because="nothing here needs it; asked by probes only")
    yield from allow("wait4 waitid", "asyncio and subprocess look for children; there are none")


def own_identity(layout: Layout) -> Iterator[Rule]:
    yield from allow(
        "getpid gettid getppid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp",
        "its own identity",
    )
    yield from allow("umask uname sysinfo getrlimit getrusage times", "itself, and facts without an object")
    yield from allow("prlimit64", "asks for its own limits; they stay as the policy set them", Equals(0, 0), Zero(2))
    yield from allow("getcwd", "the root: there is nothing else")
    yield from allow("personality", "the question, not the change", Equals(0, 0xFFFFFFFF))


def own_signals(layout: Layout) -> Iterator[Rule]:
    yield from allow(
        "rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack rt_sigpending rt_sigtimedwait rt_sigsuspend pause",
        "its own signals",
    )


def time_and_chance() -> Iterator[Rule]:
    yield from allow("nanosleep gettimeofday time getrandom", "time and randomness")
    # A negative clock names another process's CPU time.
    yield from allow("clock_gettime clock_getres clock_nanosleep timer_create timerfd_create", "clocks", Below(0, 16))
    yield from allow("timer_settime timer_gettime timer_getoverrun timer_delete", "its own timers")
    yield from allow("alarm getitimer setitimer timerfd_settime timerfd_gettime", "its own timers")


def own_objects() -> Iterator[Rule]:
    yield from allow("pipe pipe2 eventfd eventfd2 epoll_create epoll_create1", "objects of its own without a name")
    yield from allow("signalfd signalfd4", "its own signals as a new descriptor", Equals(0, 0xFFFFFFFF))
    yield from allow("socketpair", "asyncio's self-pipe; AF_UNIX only", Equals(0, 1))
    yield from allow("poll ppoll select pselect6", "waits for what it holds")
    yield from allow("epoll_wait epoll_pwait epoll_pwait2 epoll_ctl", "waits for what it holds", Below(0, BASE))


def descriptors(layout: Layout) -> Iterator[Rule]:
    def fd(needed: Rights, arg: int = 0) -> Descriptor:
        return Descriptor(arg, layout.mask(needed))

    yield from allow("read readv", "CAP_READ", fd(r.CAP_READ))
    yield from allow("write writev", "CAP_WRITE", fd(r.CAP_WRITE))
    yield from allow("pread64 preadv preadv2", "CAP_PREAD", fd(r.CAP_PREAD))
    yield from allow("pwrite64 pwritev", "CAP_PWRITE", fd(r.CAP_PWRITE))
    # RWF_NOAPPEND would write into the middle of a file held for appending.
    yield from allow("pwritev2", "CAP_PWRITE", fd(r.CAP_PWRITE), Masked(5, RWF_NOAPPEND, 0))
    tells = (fd(r.CAP_SEEK_TELL), Zero(1), Equals(2, 1))
    apart = layout.mask(r.CAP_SEEK_TELL) != layout.mask(r.CAP_SEEK)
    yield from either("lseek", "CAP_SEEK, or CAP_SEEK_TELL to ask", (fd(r.CAP_SEEK),), *((tells,) if apart else ()))
    yield from allow("fstat", "CAP_FSTAT", fd(r.CAP_FSTAT))
    yield from allow("fstatfs", "CAP_FSTATFS", fd(r.CAP_FSTATFS))
    yield from allow("getdents64 getdents", "CAP_READ", fd(r.CAP_READ))
    yield from allow("fsync fdatasync", "CAP_FSYNC", fd(r.CAP_FSYNC))
    yield from allow("ftruncate", "CAP_FTRUNCATE", fd(r.CAP_FTRUNCATE))
    # Other modes than keeping the size punch holes into what is there.
    yield from allow("fallocate", "CAP_WRITE and CAP_FTRUNCATE", fd(r.CAP_WRITE | r.CAP_FTRUNCATE))
    yield from allow("fadvise64", "a hint", fd(r.CAP_READ))
    yield from allow("sendfile", "CAP_WRITE out, CAP_PREAD in", fd(r.CAP_WRITE, 0), fd(r.CAP_PREAD, 1))
    yield from allow("copy_file_range splice", "CAP_PREAD in, CAP_PWRITE out", fd(r.CAP_PREAD, 0), fd(r.CAP_PWRITE, 2))

    # Mapping a file: never executable; private or shared by the rights, which the open mode backs.
    own = Masked(3, MAP_ANONYMOUS, MAP_ANONYMOUS)
    no_exec = Masked(2, PROT_EXEC, 0)
    alternatives: list[tuple[Condition, ...]] = [(no_exec, own), (no_exec, fd(r.CAP_MMAP_RW, 4))]
    if layout.mask(r.CAP_MMAP_R) != layout.mask(r.CAP_MMAP_RW):
        # With PROT_WRITE a private mapping of a readable file is still only the compartment's own copy.
        alternatives.append((no_exec, Masked(3, MAP_SHARED_BITS, 2), fd(r.CAP_MMAP_R, 4)))
        alternatives.append((Masked(2, PROT_EXEC | 2, 0), fd(r.CAP_MMAP_R, 4)))
    yield from either("mmap", "memory, and files held with CAP_MMAP_R or CAP_MMAP_RW", *alternatives)

    # Closing gives authority up. The channel stays: without its lifeline the compartment would outlive the host, and
    # another socket at CONTROL's number could carry descriptors.
    granted = (1 << len(layout.ranges) + 1) - 2
    yield from allow("close", "gives up what it holds", Descriptor(0, granted))
    yield from allow("close_range", "its own", Below(1, BASE))
    # A copy of a granted descriptor would land among the own numbers, with more rights: the host makes it (notify.py).
    yield from allow("dup", "its own", Below(0, BASE))
    yield from allow("dup2 dup3", "its own", Below(0, BASE), Below(1, BASE))
    yield from either(
        "fcntl",
        "flags of its own descriptors, and questions",
        (OneOf(1, (F_GETFD, F_SETFD, F_GETFL, F_GETPIPE_SZ)),),
        (Below(0, BASE), OneOf(1, (F_DUPFD, F_DUPFD_CLOEXEC, F_SETFL))),
    )
    yield from either(
        "ioctl",
        "open() asks whether it is a terminal; the rest changes its own descriptors",
        (OneOf(1, (TCGETS, TIOCGWINSZ, FIOCLEX, FIONCLEX)),),
        (Below(0, BASE), OneOf(1, (FIONREAD, FIONBIO))),
    )
    if not (layout.by_name or layout.beneath):
        # Only libc's fstat() comes this way, and whether its path is empty cannot be seen: see _sys.install_trap.
        yield Rule(
            "newfstatat",
            when=((Masked(3, AT_EMPTY_PATH, AT_EMPTY_PATH),),),
            then=bpf.trap(TRAP_EMPTY_PATH),
            because="fstat() of some libcs; repeated as fstat",
        )
    yield Rule(
        "statx",
        when=((Masked(2, AT_EMPTY_PATH, AT_EMPTY_PATH),),),
        then=bpf.errno_(errno.ENOSYS),
        because="callers fall back to fstat, which takes no path",
    )


def sockets(layout: Layout) -> Iterator[Rule]:
    def fd(needed: Rights, arg: int = 0) -> Descriptor:
        return Descriptor(arg, layout.mask(needed))

    yield from allow("sendmsg recvmsg", "the channel alone: descriptors travel by these", Equals(0, CONTROL))
    yield from allow("recvfrom", "CAP_RECV", fd(r.CAP_RECV))
    yield from allow("sendto", "CAP_SEND, to where it is connected", fd(r.CAP_SEND), Zero(4))
    for name, needed in (
        ("shutdown", r.CAP_SHUTDOWN),
        ("getsockname", r.CAP_GETSOCKNAME),
        ("getpeername", r.CAP_GETPEERNAME),
        ("setsockopt", r.CAP_SETSOCKOPT),
        ("accept", r.CAP_ACCEPT),
        ("accept4", r.CAP_ACCEPT),
        ("listen", r.CAP_LISTEN),
    ):
        # The compartment's own sockets are pairs, which need only the questions.
        own = name in ("shutdown", "getsockname", "getpeername")
        mask = layout.mask(needed)
        if own or mask:
            yield Rule(name, when=((Descriptor(0, mask),),), because=f"CAP_{name.upper()}")


def socket_questions(layout: Layout) -> Iterator[Rule]:
    """getsockopt(2): SO_PEERCRED, SO_PEERPIDFD and their like would name or hand over other processes."""
    own = (Below(0, BASE),)  # pairs of its own, with itself at the other end
    mask = layout.mask(r.CAP_GETSOCKOPT)
    granted: tuple[tuple[Condition, ...], ...] = (
        (Descriptor(0, mask), Equals(1, SOL_SOCKET), OneOf(2, PLAIN_SOCKET_OPTIONS)),
        (Descriptor(0, mask), OneOf(1, (0, 6, 17, 41))),  # IP, TCP, UDP, IPv6
    )
    yield from either("getsockopt", "CAP_GETSOCKOPT, but not who is there", own, *(granted if mask else ()))


def paths(layout: Layout) -> Iterator[Rule]:
    """Calls with a path, when a directory was granted.

    Every directory a compartment can hold is the root of a mount of its own or lies beneath one, and its root directory
    is empty but for what was granted by name. So the kernel bounds any path (`..`, links, absolute); here only the
    calls are chosen. With paths granted by name, those that start at the root or the working directory go to the host,
    which records what lies outside; it may answer "continue", because what the call then reaches is bounded all the same.
    """
    writable = "rw" in (layout.by_name, layout.beneath)
    unasked = bool(layout.by_name) and not layout.listener
    for name in READING_AT + (CHANGING_AT if writable else ()):
        # Own numbers are files and directories beneath a granted one; of the granted ones only directories will do.
        needed = r.CAP_FUTIMESAT if name in ("utimensat", "futimesat") else r.CAP_LOOKUP
        arguments = {"symlinkat": (1,), "renameat": (0, 2), "renameat2": (0, 2)}.get(name, (0,))
        held = () if unasked else tuple(Descriptor(n, layout.mask(needed)) for n in arguments)
        modes = plain_modes(name, writable)
        yield from either(name, "beneath a directory that it holds", *((*held, *plain) for plain in modes))
    if unasked:
        for name in READING + (CHANGING if writable else ()):
            yield from either(name, "bounded by the root directory", *plain_modes(name, writable))


def plain_modes(name: str, writable: bool) -> tuple[tuple[Condition, ...], ...]:
    """What a read-only mount does not stop, and what keeps a compartment from making set-user-ID files: they would be the
    host's user's."""
    if name in ("open", "openat"):
        flags = 2 if name == "openat" else 1
        if not writable:
            # A named pipe can be opened for writing on a read-only mount.
            return ((Masked(flags, O_ACCMODE | O_CREAT | O_TMPFILE, 0),),)
        return (Masked(flags, O_CREAT | O_TMPFILE, 0),), (Masked(flags + 1, 0o7000, 0),)
    position = {"creat": 1, "mkdir": 1, "mkdirat": 2}.get(name)
    return ((),) if position is None else ((Masked(position, 0o7000, 0),),)
