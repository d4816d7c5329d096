"""Surface "processes": other processes, new processes, new programs, new identities.

The host's own process stands for every other one. What is tried on it is harmless when it succeeds: SIGUSR1 with a
handler, PTRACE_SEIZE, which stops nobody, a soft limit that is put back, a scheduling value that it has already.
"""

import ctypes
import errno
import os
import resource
import select
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from tests.escape import native
from tests.escape.framework import CONTAINED, Unavailable, World, attempt, raw, reaches

CLONE_VM, CLONE_FS, CLONE_FILES, CLONE_SIGHAND = 0x100, 0x200, 0x400, 0x800
CLONE_PIDFD, CLONE_PTRACE, CLONE_VFORK, CLONE_PARENT, CLONE_THREAD = 0x1000, 0x2000, 0x4000, 0x8000, 0x10000
CLONE_NEWNS, CLONE_UNTRACED, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x20000, 0x800000, 0x2000000, 0x4000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = (
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
    0x80,
)
GROUP, NICENESS = os.getpgrp(), os.getpriority(os.PRIO_PROCESS, 0)
THREAD = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD


# -- new processes -----------------------------------------------------------------------------------------------------


def _spawn(call: str, *arguments: int, name: str, **options: Any) -> None:
    """Enter a call that makes a child which exits at once; proof is its process id."""

    def proof(world: World, pid: int) -> bool:
        return pid > 0

    options.setdefault("refused_with", PermissionError)

    @attempt(surface="processes", name=name, call=call, proof=proof, **options)
    def spawns(outside: World) -> int:
        return native.checked(native.spawn(native.NUMBERS[call], *arguments))


@attempt(surface="processes", refused_with=PermissionError, call=("clone", "fork"), proof=lambda world, pid: pid > 0)
def forks(outside: World) -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return pid


_spawn("fork", name="raw_fork")
_spawn("vfork", name="raw_vfork")
_spawn("clone", signal.SIGCHLD, name="raw_clone")
_spawn("clone", 0, name="raw_clone_without_a_signal")
_spawn("clone", CLONE_VM | CLONE_VFORK | signal.SIGCHLD, name="raw_clone_as_posix_spawn_does")
_spawn("clone", CLONE_VM | CLONE_FILES | CLONE_FS | signal.SIGCHLD, name="raw_clone_that_shares_memory")
_spawn("clone", CLONE_UNTRACED | signal.SIGCHLD, name="raw_clone_untraced")
for _flag, _name in (
    (CLONE_NEWNS, "mount"),
    (CLONE_NEWUTS, "uts"),
    (CLONE_NEWIPC, "ipc"),
    (CLONE_NEWPID, "pid"),
    (CLONE_NEWNET, "network"),
    (CLONE_NEWCGROUP, "cgroup"),
):
    _spawn("clone", _flag | signal.SIGCHLD, name=f"raw_clone_into_a_{_name}_namespace", privileged=True)
_spawn("clone", CLONE_NEWUSER | signal.SIGCHLD, name="raw_clone_into_a_user_namespace")
# Threads are allowed, by exactly the flags that libc's threads have: nothing may ride along with them.
_spawn("clone", THREAD | CLONE_NEWNET, name="raw_thread_in_a_network_namespace", privileged=True)
_spawn("clone", THREAD | CLONE_NEWUTS, name="raw_thread_in_a_uts_namespace", privileged=True)
_spawn("clone", THREAD | CLONE_PARENT, name="raw_thread_with_the_parent_flag")
_spawn("clone", THREAD | CLONE_PTRACE, name="raw_thread_with_the_ptrace_flag")
_spawn("clone", THREAD | CLONE_UNTRACED, name="raw_thread_untraced")
_spawn("clone", (1 << 32) | signal.SIGCHLD, name="raw_clone_with_garbage_above_the_flags")


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call="clone",
    arrange=lambda world: _reap_afterwards(world),
    effect=lambda world: _a_child_came(world),
)
def makes_a_sibling(outside: World) -> None:
    # The child of CLONE_PARENT is the host's: it would not die with the compartment.
    native.checked(native.spawn(native.NUMBERS["clone"], CLONE_PARENT | signal.SIGCHLD))


def _reap_afterwards(world: World) -> Iterator[None]:
    world.sibling = 0
    yield
    if world.sibling:
        os.waitpid(world.sibling, 0)


def _a_child_came(world: World) -> bool:
    for _ in range(100):
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        if found is not None:
            world.sibling = found.si_pid
            return True
        time.sleep(0.01)  # it is there and about to end
    return False


@attempt(
    surface="processes",
    refused_with=errno.ENOSYS,
    proof=lambda world, pid: pid > 0,
)
def forks_by_clone3(outside: World) -> int:
    # Its flags sit behind a pointer, where no filter can see them: it must not exist.
    how = struct.pack("11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
    return native.checked(native.spawn(native.NUMBERS["clone3"], how, len(how)))


# What pthread_create of glibc asks for: VM FS FILES SIGHAND THREAD SYSVSEM SETTLS PARENT_SETTID CHILD_CLEARTID.
LIBC_THREAD = 0x3D0F00


@attempt(
    surface="processes",
    refused_with=errno.EAGAIN,
    needs={"listener"},
    policy={"threads": 4},
    proof=lambda world, count: count >= 4,
)
def makes_more_threads_than_it_may(outside: World) -> int:
    # The one that is running is the first of the four.
    kept = ctypes.create_string_buffer(16)
    first, second = ctypes.addressof(kept), ctypes.addressof(kept) + 8
    for _ in range(16):
        native.checked(native.park(native.NUMBERS["clone"], LIBC_THREAD, 0, first, second, 0))
    return 16


# -- new programs ------------------------------------------------------------------------------------------------------


@attempt(surface="processes", refused_with=PermissionError, call="execve", effect=lambda world: world.marker.exists())
def becomes_another_program(outside: World) -> None:
    os.execv("/bin/sh", ["sh", "-c", f"echo > {outside.marker}"])


@attempt(surface="processes", refused_with=PermissionError, call="execve", outside=reaches(errno.ENOENT))
def runs_a_program_that_is_not_there(outside: World) -> None:
    os.execv(outside.marker, ["x"])


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call="execveat",
    gives=lambda world: (open("/bin/sh", "rb"),),  # noqa: SIM115
    effect=lambda world: world.marker.exists(),
)
def becomes_a_program_it_was_handed(outside: World, program: Any) -> None:
    arguments = [b"sh", b"-c", f"echo > {outside.marker}".encode()]
    vector = (ctypes.c_char_p * 4)(*arguments, None)
    native.call("execveat", program.fileno(), b"", vector, None, 0x1000)


@attempt(surface="processes", refused_with=PermissionError, call="execveat", effect=lambda world: world.marker.exists())
def becomes_a_program_by_execveat(outside: World) -> None:
    vector = (ctypes.c_char_p * 4)(b"sh", b"-c", f"echo > {outside.marker}".encode(), None)
    native.call("execveat", -100, b"/bin/sh", vector, None, 0)


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call=("fork", "vfork", "clone"),
    effect=lambda world: world.marker.exists(),
)
def runs_a_command(outside: World) -> None:
    subprocess.run(["/bin/sh", "-c", f"echo > {outside.marker}"], check=True)


@attempt(
    surface="processes",
    refused_with=(PermissionError, CONTAINED),
    call=("fork", "vfork", "clone"),
    effect=lambda world: world.marker.exists(),
)
def runs_a_command_by_libc(outside: World) -> None:
    # system(3) hides the refusal in its status.
    os.system(f"echo > {outside.marker}")


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call=("clone", "vfork"),
    effect=lambda world: world.marker.exists(),
)
def runs_a_command_by_posix_spawn(outside: World) -> None:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"echo > {outside.marker}"], {})
    os.waitpid(pid, 0)


def _outlived(world: World) -> bool:
    """Is somebody still holding the other end of the pipe, after the attempt's own process is gone?"""
    world.ours.close()
    try:
        return os.read(world.watched.fileno(), 1) != b""
    except BlockingIOError:
        return True


def _pipe_to_hold(world: World) -> Iterator[None]:
    read_end, world.held = os.pipe()
    os.set_blocking(read_end, False)
    with open(read_end, "rb", buffering=0) as world.watched, open(world.held, "wb", buffering=0) as world.ours:
        yield


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call=("fork", "clone"),
    arrange=_pipe_to_hold,
    effect=_outlived,
)
def outlives_its_caller(outside: World) -> None:
    if os.fork() == 0:
        os.setsid()
        # Until the host closes its end.
        watch = select.poll()
        watch.register(outside.held, 0)
        watch.poll(10_000)
        os._exit(0)


# -- tracing, reading, writing --------------------------------------------------------------------------------


@attempt(surface="processes", refused_with=PermissionError, call="ptrace", proof=lambda world, answer: answer == 0)
def traces_the_host(outside: World) -> int:
    # PTRACE_SEIZE, which does not stop it; the bond ends with the tracer.
    return native.call("ptrace", 0x4206, outside.host, 0, 0)


raw("ptrace", lambda w: (0, 0, 0, 0), surface="processes", name="asks_to_be_traced")


def _token_in_memory(world: World) -> None:
    world.memory = ctypes.create_string_buffer(bytes(len(world.token) * 2), 64)
    world.address = ctypes.addressof(world.memory)


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call="process_vm_readv",
    arrange=_token_in_memory,
    proof=lambda world, length: length == 16,
)
def reads_the_host_s_memory(outside: World) -> int:
    here = ctypes.create_string_buffer(16)
    local = struct.pack("QQ", ctypes.addressof(here), 16)
    remote = struct.pack("QQ", outside.address, 16)
    return native.call("process_vm_readv", outside.host, local, 1, remote, 1, 0)


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call="process_vm_writev",
    arrange=_token_in_memory,
    effect=lambda world: world.memory.raw.startswith(b"written"),
)
def writes_the_host_s_memory(outside: World) -> int:
    here = ctypes.create_string_buffer(b"written")
    local = struct.pack("QQ", ctypes.addressof(here), 7)
    remote = struct.pack("QQ", outside.address, 7)
    return native.call("process_vm_writev", outside.host, local, 1, remote, 1, 0)


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call="openat",
    arrange=_token_in_memory,
    effect=lambda world: world.memory.raw.startswith(b"written"),
)
def writes_the_host_s_memory_by_proc(outside: World) -> None:
    with open(f"/proc/{outside.host}/mem", "r+b", buffering=0) as memory:
        memory.seek(outside.address)
        memory.write(b"written")


raw("process_madvise", lambda w: (-1, None, 0, 4, 0), surface="processes", outside=reaches(errno.EBADF))
raw("process_mrelease", lambda w: (-1, 0), surface="processes", outside=reaches(errno.EBADF))
raw("migrate_pages", lambda w: (w.host, 64, struct.pack("Q", 1), struct.pack("Q", 1)), surface="processes")
raw("move_pages", lambda w: (w.host, 0, None, None, None, 0), surface="processes")
raw("kcmp", lambda w: (w.host, w.host, 0, 0, 0), surface="processes")
raw(
    "get_robust_list",
    lambda w: (w.host, ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)),
    surface="processes",
)

# -- process descriptors -----------------------------------------------------------------------------------------------

raw("pidfd_open", lambda w: (w.host, 0), surface="processes")
raw("pidfd_open", lambda w: (os.getpid(), 0), surface="processes", name="raw_pidfd_open_of_itself")
raw("pidfd_getfd", lambda w: (-1, 0, 0), surface="processes", outside=reaches(errno.EBADF))
raw("pidfd_send_signal", lambda w: (-1, 0, None, 0), surface="processes", outside=reaches(errno.EBADF))


@attempt(
    surface="processes", refused_with=PermissionError, call="pidfd_open", arrange=lambda world: _open_the_secret(world)
)
def steals_a_descriptor_of_the_host(outside: World) -> bytes:
    host = native.call("pidfd_open", outside.host, 0)
    return os.pread(native.call("pidfd_getfd", host, outside.descriptor, 0), 4096, 0)


def _open_the_secret(world: World) -> Iterator[None]:
    world.descriptor = os.open(world.secret, os.O_RDONLY)
    yield
    os.close(world.descriptor)


# -- signals -----------------------------------------------------------------------------------------------------------


def _listen_for_signals(world: World) -> Iterator[None]:
    world.signals = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: world.signals.append(number))
    yield
    signal.signal(signal.SIGUSR1, before)


def _signalled(world: World) -> bool:
    return signal.SIGUSR1 in world.signals


def _signals(call: str, arguments: Any, *, name: str = "") -> None:
    raw(call, arguments, surface="processes", name=name, arrange=_listen_for_signals, effect=_signalled)


_INFO = struct.pack("iiiiii", signal.SIGUSR1, 0, -1, 0, 0, 0).ljust(128, b"\0")  # siginfo with si_code SI_QUEUE
_signals("kill", lambda w: (w.host, signal.SIGUSR1))
_signals("kill", lambda w: ((1 << 32) | w.host, signal.SIGUSR1), name="raw_kill_with_garbage_above_the_pid")
_signals("tkill", lambda w: (w.host, signal.SIGUSR1))
_signals("tgkill", lambda w: (w.host, w.host, signal.SIGUSR1))
_signals("rt_sigqueueinfo", lambda w: (w.host, signal.SIGUSR1, _INFO))
_signals("rt_tgsigqueueinfo", lambda w: (w.host, w.host, signal.SIGUSR1, _INFO))
# Signal 0 asks whether somebody is there.
raw("kill", lambda w: (w.host, 0), surface="processes", name="asks_whether_the_host_lives")
raw("kill", lambda w: (1, 0), surface="processes", name="asks_whether_init_lives", privileged=True)
raw("kill", lambda w: (0, 0), surface="processes", name="signals_its_process_group")
raw("kill", lambda w: (-GROUP, 0), surface="processes", name="signals_a_process_group_by_number")
raw("kill", lambda w: (-1, 0), surface="processes", name="signals_everybody")


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call=("fcntl", "ioctl"),
    arrange=_listen_for_signals,
    effect=_signalled,
)
def has_the_kernel_signal_the_host(outside: World) -> None:
    import fcntl

    read_end, write_end = os.pipe()
    fcntl.fcntl(read_end, fcntl.F_SETOWN, outside.host)
    fcntl.fcntl(read_end, 10, signal.SIGUSR1)  # F_SETSIG
    fcntl.fcntl(read_end, fcntl.F_SETFL, fcntl.fcntl(read_end, fcntl.F_GETFL) | os.O_ASYNC)
    os.write(write_end, b"x")


@attempt(
    surface="processes", refused_with=PermissionError, call="fcntl", arrange=_listen_for_signals, effect=_signalled
)
def has_the_kernel_signal_a_thread_of_the_host(outside: World) -> None:
    read_end, write_end = os.pipe()
    native.call("fcntl", read_end, 15, struct.pack("ii", 0, outside.host))  # F_SETOWN_EX with F_OWNER_TID
    native.call("fcntl", read_end, 10, signal.SIGUSR1)
    native.call("fcntl", read_end, 4, os.O_ASYNC)
    os.write(write_end, b"x")


@attempt(
    surface="processes", refused_with=PermissionError, call="ioctl", arrange=_listen_for_signals, effect=_signalled
)
def has_a_socket_signal_the_host(outside: World) -> None:
    import socket

    here, there = socket.socketpair()
    native.call("ioctl", here.fileno(), 0x8901, struct.pack("i", outside.host))  # FIOSETOWN
    native.call("fcntl", here.fileno(), 10, signal.SIGUSR1)
    native.call("ioctl", here.fileno(), 0x5452, struct.pack("i", 1))  # FIOASYNC
    there.send(b"x")


def _timer_on(clock: int, name: str, **options: Any) -> None:
    event = struct.pack("Qii", 0, signal.SIGUSR1, 1).ljust(64, b"\0")  # SIGEV_NONE
    raw(
        "timer_create",
        lambda w: (_clock_of(w, clock), event, ctypes.create_string_buffer(8)),
        surface="processes",
        name=name,
        **options,
    )


def _clock_of(world: World, kind: int) -> int:
    """The CPU clock of the host's process, as clock_getcpuclockid(3) makes the number."""
    return ((~world.host) << 3) | kind


@attempt(
    surface="processes",
    refused_with=errno.EINVAL,
    outside=Unavailable(
        "a timer signals threads of its own process alone",
        lambda: (
            native.syscall(
                native.NUMBERS["timer_create"],
                1,
                struct.pack("Qiii", 0, signal.SIGUSR1, 4, os.getppid()).ljust(64, b"\0"),
                ctypes.create_string_buffer(8),
            )
            == -errno.EINVAL
        ),
    ),
)
def has_a_timer_signal_the_host(outside: World) -> int:
    event = struct.pack("Qiii", 0, signal.SIGUSR1, 4, outside.host).ljust(64, b"\0")  # SIGEV_THREAD_ID
    return native.call("timer_create", 1, event, ctypes.create_string_buffer(8))


_timer_on(2, "times_the_host_s_processor")
raw(
    "clock_gettime",
    lambda w: (_clock_of(w, 2), ctypes.create_string_buffer(16)),
    surface="processes",
    name="reads_the_host_s_processor_clock",
)
raw(
    "clock_getres",
    lambda w: (_clock_of(w, 2), ctypes.create_string_buffer(16)),
    surface="processes",
    name="asks_for_the_host_s_processor_clock",
)
raw(
    "clock_nanosleep",
    lambda w: (_clock_of(w, 2), 1, struct.pack("qq", 0, 1), None),
    surface="processes",
    name="sleeps_on_the_host_s_processor_clock",
)

# -- groups, sessions, scheduling, limits of others --------------------------------------------------------------------

raw("setpgid", lambda w: (0, 0), surface="processes")
raw("setpgid", lambda w: (0, GROUP), surface="processes", name="raw_setpgid_to_the_host_s")
raw("setsid", lambda w: (), surface="processes")
raw("getpgid", lambda w: (w.host,), surface="processes")
raw("getsid", lambda w: (w.host,), surface="processes")
raw("sched_setaffinity", lambda w: (w.host, 8, struct.pack("Q", (1 << os.cpu_count()) - 1)), surface="processes")
raw("sched_getaffinity", lambda w: (w.host, 128, ctypes.create_string_buffer(128)), surface="processes")
raw("sched_setscheduler", lambda w: (w.host, 0, struct.pack("i", 0)), surface="processes")
raw("sched_getscheduler", lambda w: (w.host,), surface="processes")
raw("sched_setparam", lambda w: (w.host, struct.pack("i", 0)), surface="processes")
raw("sched_getparam", lambda w: (w.host, ctypes.create_string_buffer(4)), surface="processes")
raw("sched_setattr", lambda w: (w.host, struct.pack("IIQiIQQQ", 48, 0, 0, 0, 0, 0, 0, 0), 0), surface="processes")
raw("sched_getattr", lambda w: (w.host, ctypes.create_string_buffer(64), 64, 0), surface="processes")
raw("sched_rr_get_interval", lambda w: (w.host, ctypes.create_string_buffer(16)), surface="processes")
raw("setpriority", lambda w: (0, w.host, NICENESS), surface="processes")
raw("getpriority", lambda w: (0, w.host), surface="processes")
raw("setpriority", lambda w: (2, 0, NICENESS), surface="processes", name="raw_setpriority_of_the_user")
raw("ioprio_set", lambda w: (1, w.host, 0), surface="processes")
raw("ioprio_get", lambda w: (1, w.host), surface="processes")
raw(
    "prlimit64",
    lambda w: (w.host, resource.RLIMIT_CORE, None, ctypes.create_string_buffer(16)),
    surface="processes",
    name="reads_the_host_s_limits",
)


def _core_limit(world: World) -> Iterator[None]:
    world.limits = resource.getrlimit(resource.RLIMIT_STACK)
    yield
    resource.setrlimit(resource.RLIMIT_STACK, world.limits)


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call="prlimit64",
    arrange=_core_limit,
    effect=lambda world: resource.getrlimit(resource.RLIMIT_STACK)[0] == 7 << 20,
)
def sets_a_limit_of_the_host(outside: World) -> None:
    native.call("prlimit64", outside.host, resource.RLIMIT_STACK, struct.pack("qq", 7 << 20, outside.limits[1]), None)


# -- itself ------------------------------------------------------------------------------------------------------------


def _prctl(name: str, *arguments: int, **options: Any) -> None:
    raw("prctl", lambda w: arguments, surface="processes", name=name, **options)


raw(
    "prctl",
    lambda w: (0x59616D61, w.host, 0, 0, 0),
    surface="processes",
    name="lets_the_host_trace_it",
    outside=reaches(errno.EINVAL),
)
raw(
    "prctl",
    lambda w: (35, 15, ctypes.create_string_buffer(4), 0, 0),
    surface="processes",
    name="asks_to_change_its_memory_map",
)  # PR_SET_MM, PR_SET_MM_MAP_SIZE
_prctl("takes_a_filter_by_prctl", 22, 2, 0, 0, 0, outside=reaches(errno.EFAULT))  # PR_SET_SECCOMP
_prctl("clears_its_death_signal", 1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG
_prctl("adopts_orphans", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
_prctl("becomes_dumpable", 4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
_prctl("keeps_its_capabilities", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
_prctl("drops_a_bound_of_its_capabilities", 24, 63, 0, 0, 0, outside=reaches(errno.EINVAL))  # PR_CAPBSET_DROP
_prctl("sets_its_secure_bits", 28, 0, 0, 0, 0, privileged=True)  # PR_SET_SECUREBITS
_prctl("stops_performance_counters", 31, 0, 0, 0, 0)  # PR_TASK_PERF_EVENTS_DISABLE
_prctl(
    "schedules_with_a_cookie", 62, 0, 0, 0, 0, outside=reaches(errno.ENODEV, errno.EINVAL, errno.EFAULT)
)  # PR_SCHED_CORE
_prctl("dispatches_its_system_calls", 59, 1, 1, -1, 0, outside=reaches(errno.EINVAL))  # PR_SET_SYSCALL_USER_DISPATCH
_prctl("hides_its_option_in_the_high_word", (1 << 32) | 1, 0, 0, 0, 0)  # the kernel reads 32 bits: PR_SET_PDEATHSIG
_prctl("takes_an_unknown_option", 0x7FFF0001, 0, 0, 0, 0, outside=reaches(errno.EINVAL))

_HEADER = struct.pack("Ii", 0x20080522, 0)


_NO_CAPABILITIES = ctypes.create_string_buffer(24)
raw("capget", lambda w: (_HEADER, ctypes.create_string_buffer(24)), surface="processes")
raw("capset", lambda w: (_HEADER, _NO_CAPABILITIES), surface="processes")


def _becomes(call: str, *arguments: int) -> None:
    raw(call, lambda w: arguments, surface="processes", proof=lambda world, answer: answer == 0, privileged=True)


_becomes("setuid", 65534)
_becomes("setgid", 65534)
_becomes("setreuid", 65534, 65534)
_becomes("setregid", 65534, 65534)
_becomes("setresuid", 65534, 65534, 65534)
_becomes("setresgid", 65534, 65534, 65534)
_becomes("setfsuid", 0)
_becomes("setfsgid", 0)
_becomes("setgroups", 0, 0)
raw("setuid", lambda w: (os.getuid(),), surface="processes", name="raw_setuid_to_what_it_is")


for _flag, _name in (
    (CLONE_NEWNS, "mount"),
    (CLONE_NEWUTS, "uts"),
    (CLONE_NEWIPC, "ipc"),
    (CLONE_NEWPID, "pid"),
    (CLONE_NEWNET, "network"),
    (CLONE_NEWCGROUP, "cgroup"),
    (CLONE_NEWTIME, "time"),
):
    raw(
        "unshare",
        lambda w, flag=_flag: (flag,),
        surface="processes",
        name=f"unshares_its_{_name}_namespace",
        privileged=True,
    )
raw("unshare", lambda w: (CLONE_NEWUSER,), surface="processes", name="unshares_its_user_namespace")
raw("unshare", lambda w: (CLONE_FILES,), surface="processes", name="unshares_its_descriptors")


@attempt(
    surface="processes",
    refused_with=PermissionError,
    call=("openat", "setns"),
    privileged=True,
    proof=lambda world, answer: answer == 0,
)
def joins_a_namespace_of_the_host(outside: World) -> int:
    return native.call("setns", os.open(f"/proc/{outside.host}/ns/net", os.O_RDONLY), CLONE_NEWNET)


raw("setns", lambda w: (0, 0), surface="processes", outside=reaches(errno.EINVAL, errno.EBADF))
raw("personality", lambda w: (0x0400000,), surface="processes", name="makes_reading_imply_executing")
raw("personality", lambda w: (0x0040000,), surface="processes", name="switches_off_address_randomisation")
