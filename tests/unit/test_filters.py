"""What the filter of a compartment answers, call by call: each allowed thing beside the neighbours that are refused."""

import errno
import os
from random import Random

import pytest

from compart import rights as r
from compart.backend.linux import filters, syscalls
from compart.backend.linux.bpf import ALLOW, NOTIFY, Action, errno_, interpret, trap, verify
from compart.backend.linux.filters import BASE, CONTROL, FIRST_GRANT, LIFELINE, RESULT, TRACE, WIDTH, Layout
from compart.backend.linux.syscalls import AUDIT_ARCH_AARCH64, AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, X32_BIT

X86, ARM = AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
AT_FDCWD = -100
ANY_HIGH_WORD = 0x7EAD << 32
REFUSED = NOTIFY
ENOSYS = errno_(errno.ENOSYS)

READ, WRITE, BOTH, APPEND = (r.mode_rights(mode) for mode in ("r", "w", "rw", "a"))
IN, OUT, IN_AND_OUT = r.directory_rights("r"), r.directory_rights("rw"), r.SOCKET

NOTHING = Layout()
FILES = Layout(ranges=(READ, WRITE, BOTH, APPEND, r.SOCKET, r.PIPE_READ, r.PIPE_WRITE, r.CAP_READ))
R, W, RW, A, SOCK, PIPE_R, PIPE_W, ONLY_READ = (FIRST_GRANT + WIDTH * k for k in range(8))
"""A granted descriptor of each range of FILES."""
OWN = 5

BENEATH = Layout(ranges=(IN,), beneath="r")
BENEATH_RW = Layout(ranges=(IN, OUT), beneath="rw")
DIR, DIR_RW = FIRST_GRANT, FIRST_GRANT + WIDTH
BY_NAME = Layout(by_name="r")
BY_NAME_DEAF = Layout(by_name="r", listener=False)
BY_NAME_RW_DEAF = Layout(by_name="rw", listener=False)
DEAF = Layout(ranges=FILES.ranges, listener=False)
COUNTED = Layout(count_threads=True)

LAYOUTS = {
    "nothing": NOTHING, "files": FILES, "beneath": BENEATH, "beneath, to change": BENEATH_RW, "by name": BY_NAME,
    "by name, deaf": BY_NAME_DEAF, "by name, to change, deaf": BY_NAME_RW_DEAF, "deaf": DEAF, "counted threads": COUNTED,
    "as many ranges as can be": Layout(ranges=tuple(r.Rights(1 << k) for k in range(filters.MOST_RANGES))),
}  # fmt: skip


def answer(layout, name, *args, arch=X86):
    """What a compartment of this layout is answered when it makes a call."""
    number = syscalls.number(arch, name)
    assert number is not None, name
    return interpreted(layout, number, *args, arch=arch)


def interpreted(layout, number, *args, arch=X86, program_arch=X86):
    program = filters.program(layout, arch if arch in (X86, ARM) else program_arch)
    return Action(interpret(program, nr=number, args=(*args, *(0,) * (6 - len(args))), arch=arch))


def passes(layout, name, *args):
    return answer(layout, name, *args) == ALLOW


# --------------------------------------------------------------------------------------------------------- rights by number


def allowed_on(name, position=0, others=()):
    """The descriptors on which a call of one descriptor passes."""
    found = set()
    for label, fd in {"own": OWN, "r": R, "w": W, "rw": RW, "a": A, "socket": SOCK, "pipe in": PIPE_R, "pipe out": PIPE_W,
                      "read": ONLY_READ}.items():  # fmt: skip
        args = [*others[:position], fd, *others[position:]]
        if passes(FILES, name, *args):
            found.add(label)
    return found


@pytest.mark.parametrize(
    ("name", "on"),
    [
        ("read", {"own", "r", "rw", "socket", "pipe in", "read"}),
        ("readv", {"own", "r", "rw", "socket", "pipe in", "read"}),
        ("write", {"own", "w", "rw", "a", "socket", "pipe out"}),
        ("writev", {"own", "w", "rw", "a", "socket", "pipe out"}),
        ("pread64", {"own", "r", "rw"}),
        ("preadv", {"own", "r", "rw"}),
        ("preadv2", {"own", "r", "rw"}),
        ("pwrite64", {"own", "w", "rw"}),
        ("pwritev", {"own", "w", "rw"}),
        ("pwritev2", {"own", "w", "rw"}),
        ("fstatfs", {"own", "r", "w", "rw", "a"}),
        ("ftruncate", {"own", "w", "rw"}),
        ("fallocate", {"own", "w", "rw"}),
        ("fsync", {"own", "w", "rw", "a"}),
        ("fdatasync", {"own", "w", "rw", "a"}),
        ("recvfrom", {"own", "r", "rw", "socket", "pipe in", "read"}),
        ("sendto", {"own", "w", "rw", "a", "socket", "pipe out"}),
        ("shutdown", {"own", "socket"}),
        ("getsockname", {"own", "socket"}),
        ("getpeername", {"own", "socket"}),
        ("getsockopt", {"own", "socket"}),
        ("setsockopt", set()),
        ("accept4", set()),
        ("listen", set()),
        ("connect", set()),
        ("bind", set()),
        ("fchmod", set()),
        ("fchown", set()),
        ("flock", set()),
        ("fchdir", set()),
        ("fsetxattr", set()),
        ("sendmsg", set()),
        ("recvmsg", set()),
        ("dup", {"own"}),
        ("close", {"own", "r", "w", "rw", "a", "socket", "pipe in", "pipe out", "read"}),
    ],
)
def test_a_call_passes_on_the_descriptors_that_have_the_right(name, on):
    assert allowed_on(name) == on


def test_seeking_and_telling():
    assert {"own", "r", "w", "rw"} <= allowed_on("lseek", others=(7, os.SEEK_SET))
    assert "a" not in allowed_on("lseek", others=(7, os.SEEK_SET))
    assert "read" not in allowed_on("lseek", others=(0, os.SEEK_CUR))
    # Where a file for appending stands may be asked, and no more.
    assert "a" in allowed_on("lseek", others=(0, os.SEEK_CUR))
    assert "a" not in allowed_on("lseek", others=(1, os.SEEK_CUR))


def test_a_file_for_appending_is_not_written_elsewhere_by_a_flag():
    assert passes(FILES, "pwritev2", RW, 0, 0, 0, 0, 0)
    assert not passes(FILES, "pwritev2", RW, 0, 0, 0, 0, 0x20)  # RWF_NOAPPEND
    assert not passes(FILES, "pwritev2", OWN, 0, 0, 0, 0, 0x20)


def test_what_stands_above_32_bits_of_a_descriptor_changes_nothing():
    # The kernel reads a descriptor as an int.
    assert passes(FILES, "read", ANY_HIGH_WORD | R)
    assert not passes(FILES, "write", ANY_HIGH_WORD | R)
    assert not passes(FILES, "write", ANY_HIGH_WORD | RESULT + WIDTH)
    assert passes(FILES, "write", ANY_HIGH_WORD | OWN)


@pytest.mark.parametrize("number", [-1, AT_FDCWD, FIRST_GRANT + 8 * WIDTH, 4000, (1 << 31) - 1, 1 << 31, 0xFFFFFFFF])
def test_numbers_beyond_the_ranges_are_refused(number):
    for name in ("read", "write", "close", "fstat", "lseek", "ftruncate", "dup"):
        assert not passes(FILES, name, number)


def test_a_range_holds_its_numbers_and_no_neighbour():
    for offset in (0, 1, WIDTH - 1):
        assert passes(FILES, "pread64", R + offset)
        assert not passes(FILES, "pwrite64", R + offset)
        assert not passes(FILES, "pread64", W + offset)
        assert passes(FILES, "pwrite64", W + offset)
    assert passes(FILES, "read", BASE - 1)
    assert not passes(FILES, "read", BASE)


def test_without_grants_there_are_no_granted_numbers():
    for name in ("read", "write", "fstat", "close"):
        assert passes(NOTHING, name, OWN)
        assert passes(FILES, name, RW)
        assert not passes(NOTHING, name, RW)


# -------------------------------------------------------------------------------------------------------------- the channel


CHANNEL = (RESULT, CONTROL, TRACE, LIFELINE)


def test_the_channel_is_written_and_nothing_else():
    for number in CHANNEL:
        assert passes(FILES, "write", number)
        assert not passes(FILES, "read", number)
        assert not passes(FILES, "ftruncate", number)
        assert not passes(FILES, "mmap", 0, 4096, 1, 1, number)


def test_the_channel_cannot_be_closed_or_replaced():
    for number in CHANNEL:
        assert not passes(FILES, "close", number)
        assert not passes(FILES, "dup2", OWN, number)
        assert not passes(FILES, "dup3", OWN, number, 0)
        assert not passes(FILES, "dup", number)
        assert not passes(FILES, "close_range", 3, number)
        assert not passes(FILES, "close_range", number, number)
        assert not passes(FILES, "fcntl", number, filters.F_SETFL, 0)
        assert not passes(FILES, "fcntl", number, filters.F_DUPFD, 0)
    assert not passes(FILES, "close_range", 0, 0xFFFFFFFF)
    assert passes(FILES, "close_range", 3, BASE - 1)


def test_descriptors_travel_by_the_channels_socket_alone():
    for name in ("sendmsg", "recvmsg"):
        assert passes(FILES, name, CONTROL)
        assert passes(FILES, name, ANY_HIGH_WORD | CONTROL)
        for number in (OWN, RESULT, TRACE, SOCK, CONTROL + WIDTH, -1):
            assert not passes(FILES, name, number)
    for name in ("sendmmsg", "recvmmsg"):
        assert not passes(FILES, name, CONTROL)


# ------------------------------------------------------------------------------------------------ numbers keep their meaning


def test_own_descriptors_are_copied_among_own_numbers():
    for name in ("dup2", "dup3"):
        assert passes(FILES, name, OWN, 7)
        assert passes(FILES, name, OWN, BASE - 1)
        for number in (BASE, R, RW, 4000, -1):
            assert not passes(FILES, name, OWN, number)
            assert not passes(FILES, name, number, OWN)
            assert not passes(FILES, name, number, number)


def test_granted_descriptors_do_not_move():
    assert passes(FILES, "dup", OWN)
    for number in (R, W, RW, SOCK, RESULT):
        assert not passes(FILES, "dup", number)
        assert not passes(FILES, "dup2", number, OWN)
        assert not passes(FILES, "fcntl", number, filters.F_DUPFD, 0)
        assert not passes(FILES, "fcntl", number, filters.F_DUPFD_CLOEXEC, 0)
    assert passes(FILES, "fcntl", OWN, filters.F_DUPFD, BASE)  # RLIMIT_NOFILE stops that one


def test_the_limit_on_descriptors_cannot_be_raised():
    assert passes(FILES, "prlimit64", 0, 7, 0, 0x1000)
    assert not passes(FILES, "prlimit64", 0, 7, 0x1000, 0)
    assert not passes(FILES, "prlimit64", 0, 7, 1 << 32, 0)
    assert not passes(FILES, "prlimit64", 1, 7, 0, 0x1000)
    assert not passes(FILES, "setrlimit", 7, 0x1000)
    assert passes(FILES, "getrlimit", 7, 0x1000)


def test_descriptors_of_others_are_not_taken():
    for name in ("pidfd_open", "pidfd_getfd", "kcmp", "process_vm_readv", "io_uring_setup", "open_by_handle_at"):
        assert not passes(FILES, name)


@pytest.mark.parametrize("command", [filters.F_GETFD, filters.F_SETFD, filters.F_GETFL, filters.F_GETPIPE_SZ])
def test_harmless_questions_to_any_descriptor(command):
    assert passes(FILES, "fcntl", OWN, command)
    assert passes(FILES, "fcntl", R, command)


@pytest.mark.parametrize("command", [4, 5, 6, 7, 8, 10, 15, 36, 37, 1024, 1025, 1026, 1031, 1033, 1034, 1036, 99999])
def test_other_commands_to_a_granted_descriptor_are_refused(command):
    # F_SETFL, locks, owners and signals, leases, notifications, sizes, seals, hints.
    assert not passes(FILES, "fcntl", R, command)
    assert passes(FILES, "fcntl", OWN, command) is (command == filters.F_SETFL)


def test_commands_of_drivers():
    for command in (filters.TCGETS, filters.TIOCGWINSZ, filters.FIOCLEX, filters.FIONCLEX):
        assert passes(FILES, "ioctl", R, command)
    for command in (filters.FIONREAD, filters.FIONBIO):
        assert passes(FILES, "ioctl", OWN, command)
        assert not passes(FILES, "ioctl", R, command)
    for command in (0x5402, 0x5412, 0x541C, 0x40086602, 0xC0185879, 0x5452, 0x4B4B, 0x8915):
        # TCSETS, TIOCSTI, TIOCLINUX, FS_IOC_SETFLAGS, FITRIM, FIOASYNC, KDSKBSENT, SIOCGIFADDR
        assert not passes(FILES, "ioctl", OWN, command)
        assert not passes(FILES, "ioctl", R, command)


# -------------------------------------------------------------------------------------------------------------------- memory


SHARED, PRIVATE, ANONYMOUS = 1, 2, 0x22
P_READ, P_WRITE, P_EXEC = 1, 2, 4


def test_memory_is_never_executable():
    assert passes(FILES, "mmap", 0, 4096, P_READ | P_WRITE, ANONYMOUS, -1)
    assert not passes(FILES, "mmap", 0, 4096, P_READ | P_EXEC, ANONYMOUS, -1)
    assert not passes(FILES, "mmap", 0, 4096, P_EXEC, PRIVATE, R)
    assert passes(FILES, "mprotect", 4096, 4096, P_READ | P_WRITE)
    assert not passes(FILES, "mprotect", 4096, 4096, P_READ | P_EXEC)
    assert not passes(FILES, "mprotect", 4096, 4096, ANY_HIGH_WORD | P_EXEC)
    assert not passes(FILES, "pkey_mprotect", 4096, 4096, P_READ | P_EXEC)


@pytest.mark.parametrize(
    ("fd", "shared_read", "shared_write", "private_write"),
    [
        (OWN, True, True, True),
        (R, True, False, True),
        (RW, True, True, True),
        (W, False, False, False),
        (A, False, False, False),
    ],
)
def test_files_are_mapped_by_their_rights(fd, shared_read, shared_write, private_write):
    assert passes(FILES, "mmap", 0, 4096, P_READ, SHARED, fd) is shared_read
    assert passes(FILES, "mmap", 0, 4096, P_READ | P_WRITE, SHARED, fd) is shared_write
    assert passes(FILES, "mmap", 0, 4096, P_READ | P_WRITE, PRIVATE, fd) is private_write
    assert passes(FILES, "mmap", 0, 4096, P_READ | P_WRITE, 3, fd) is shared_write  # MAP_SHARED_VALIDATE
    assert not passes(FILES, "mmap", 0, 4096, P_READ | P_EXEC, PRIVATE, fd)


# -------------------------------------------------------------------------------------------------------------------- threads


THREAD = filters.CLONE_THREAD_FLAGS
NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000, 0x00000080)


def test_threads_are_made_and_nothing_else_is():
    assert passes(NOTHING, "clone", THREAD)
    assert passes(NOTHING, "clone", THREAD | 0x400000)
    for flags in (
        0,
        17,
        0x4111,
        0x1200011,
        THREAD & ~0x10000,
        THREAD | 17,
        THREAD | 0x2000,
        THREAD | 0x1000,
        THREAD | 0x8000,
    ):
        # fork, vfork, what glibc's fork asks, without CLONE_THREAD, with a signal, ptrace, a pidfd, the parent's parent
        assert not passes(NOTHING, "clone", flags)
    for namespace in NAMESPACES:
        assert not passes(NOTHING, "clone", THREAD | namespace)
        assert not passes(NOTHING, "clone", 17 | namespace)
        assert not passes(NOTHING, "unshare", namespace)


def test_the_newer_call_for_threads_is_not_there():
    for layout in LAYOUTS.values():
        assert answer(layout, "clone3") == ENOSYS


def test_counted_threads_ask_the_host_each_time():
    assert answer(COUNTED, "clone", THREAD) == REFUSED
    assert passes(NOTHING, "clone", THREAD)
    # Where nobody listens there is nobody to ask.
    assert passes(Layout(count_threads=True, listener=False), "clone", THREAD)


def test_processes_are_not_made_or_become_others():
    for name in ("fork", "vfork", "execve", "execveat"):
        assert not passes(FILES, name)


def test_signals_go_through_the_host():
    for name in ("kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal"):
        assert answer(FILES, name, 1, 1, 9) == REFUSED


def test_questions_about_others_are_refused():
    for name in ("get_robust_list", "sched_getaffinity", "sched_getparam", "sched_getscheduler"):
        assert passes(NOTHING, name, 0)
        assert not passes(NOTHING, name, 1)
    for clock in (0, 1, 2, 3, 7, 11):
        assert passes(NOTHING, "clock_gettime", clock)
    for clock in (-6, -2, (~1 << 3) | 2, 16):  # another process's processor time
        assert not passes(NOTHING, "clock_gettime", clock)
        assert not passes(NOTHING, "clock_nanosleep", clock)


def test_itself_is_named_but_not_changed():
    for option in (15, 16, 21, 38, 39):
        assert passes(NOTHING, "prctl", option)
    for option in (1, 2, 4, 8, 22, 24, 28, 35, 36, 40, 47, 49, 62):
        # PDEATHSIG, dumpable, keepcaps, seccomp, capabilities, MM, subreaper, THP, ambient, speculation
        assert not passes(NOTHING, "prctl", option)
    assert passes(NOTHING, "personality", 0xFFFFFFFF)
    assert not passes(NOTHING, "personality", 0x0400000)  # READ_IMPLIES_EXEC


# -------------------------------------------------------------------------------------------------------------------- sockets


def test_no_socket_is_made_but_a_pair_of_its_own():
    assert not passes(FILES, "socket", 1, 1)
    assert passes(FILES, "socketpair", 1, 1)
    for family in (2, 10, 16, 17, 38, 40):
        assert not passes(FILES, "socketpair", family, 1)
        assert not passes(FILES, "socket", family, 1)


def test_data_goes_only_where_the_socket_is_connected():
    assert passes(FILES, "sendto", SOCK, 0, 1, 0, 0, 0)
    assert not passes(FILES, "sendto", SOCK, 0, 1, 0, 0x1000, 16)
    assert not passes(FILES, "sendto", SOCK, 0, 1, 0, 1 << 32, 16)
    assert not passes(FILES, "sendto", OWN, 0, 1, 0, 0x1000, 16)


def test_a_socket_granted_more_may_do_that():
    server = Layout(ranges=(r.SOCKET | r.CAP_ACCEPT | r.CAP_LISTEN | r.CAP_SETSOCKOPT,))
    for name in ("accept", "accept4", "listen", "setsockopt"):
        assert passes(server, name, FIRST_GRANT)
        assert not passes(FILES, name, SOCK)
    for name in ("bind", "connect"):
        assert not passes(server, name, FIRST_GRANT)


def test_data_between_descriptors_needs_both_rights():
    own = OWN + 1
    assert passes(FILES, "sendfile", OWN, R)
    assert not passes(FILES, "sendfile", R, OWN)
    assert not passes(FILES, "sendfile", OWN, W)
    for name in ("copy_file_range", "splice"):
        assert passes(FILES, name, OWN, 0, own, 0)
        assert passes(FILES, name, R, 0, RW, 0)
        assert not passes(FILES, name, R, 0, R + 1, 0)
        assert not passes(FILES, name, W, 0, OWN, 0)
        assert not passes(FILES, name, OWN, 0, A, 0)
    for name in ("tee", "vmsplice"):
        assert not passes(FILES, name, OWN, own)


# ---------------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("layout", [NOTHING, FILES, DEAF, COUNTED], ids=["nothing", "files", "deaf", "counted"])
def test_without_a_directory_no_path_is_looked_at(layout):
    for name in (*filters.READING, *filters.CHANGING):
        assert answer(layout, name) == filters.refusal(layout), name
    for name in (*filters.READING_AT, *filters.CHANGING_AT, "openat2"):
        for number in (AT_FDCWD, OWN, R, RW):
            assert answer(layout, name, number, 0x1000) == filters.refusal(layout), name


def test_without_a_directory_a_status_by_an_empty_path_is_that_of_the_descriptor():
    empty = filters.AT_EMPTY_PATH
    assert answer(FILES, "newfstatat", OWN, 0x1000, 0x2000, empty) == trap(filters.TRAP_EMPTY_PATH)
    assert answer(FILES, "newfstatat", OWN, 0x1000, 0x2000, 0) == REFUSED
    assert answer(FILES, "statx", OWN, 0x1000, empty) == ENOSYS
    assert answer(FILES, "statx", OWN, 0x1000, 0) == REFUSED


def test_beneath_a_directory_that_is_held():
    for name in filters.READING_AT:
        assert passes(BENEATH, name, DIR, 0x1000, 0)
        assert passes(BENEATH, name, OWN, 0x1000, 0)
        assert not passes(BENEATH, name, AT_FDCWD, 0x1000, 0)
        assert not passes(BENEATH, name, 0xFFFFFF9C, 0x1000, 0)
        assert not passes(BENEATH, name, RESULT, 0x1000, 0)
        assert not passes(BENEATH, name, DIR + WIDTH, 0x1000, 0)
    for name in filters.READING:
        assert not passes(BENEATH, name, 0x1000)


def test_beneath_a_directory_for_reading_nothing_is_made():
    for name in filters.CHANGING_AT:
        assert not passes(BENEATH, name, DIR, DIR, DIR)
    assert passes(BENEATH, "openat", DIR, 0x1000, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TMPFILE, os.O_WRONLY | os.O_APPEND):
        assert not passes(BENEATH, "openat", DIR, 0x1000, flags)


def test_beneath_a_directory_to_change():
    for name in ("mkdirat", "unlinkat", "symlinkat", "utimensat"):
        directory = (0x1000, DIR_RW) if name == "symlinkat" else (DIR_RW, 0x1000)
        assert passes(BENEATH_RW, name, *directory, 0)
    for name in ("renameat", "renameat2"):
        assert passes(BENEATH_RW, name, DIR_RW, 0x1000, DIR_RW, 0x2000)
        assert not passes(BENEATH_RW, name, AT_FDCWD, 0x1000, DIR_RW, 0x2000)
        assert not passes(BENEATH_RW, name, DIR_RW, 0x1000, AT_FDCWD, 0x2000)
    assert passes(BENEATH_RW, "openat", DIR_RW, 0x1000, os.O_RDWR | os.O_CREAT, 0o666)
    for name in (
        "linkat",
        "fchmodat",
        "fchmodat2",
        "fchownat",
        "mknodat",
        "openat2",
        "link",
        "chmod",
        "chown",
        "mknod",
    ):
        assert not passes(BENEATH_RW, name, DIR_RW, 0x1000, DIR_RW, 0x2000)


def test_what_is_made_never_gets_bits_that_change_the_user():
    for mode in (0o4755, 0o2755, 0o6777, 0o1777):
        assert not passes(BENEATH_RW, "openat", DIR_RW, 0x1000, os.O_WRONLY | os.O_CREAT, mode)
        assert not passes(BENEATH_RW, "openat", DIR_RW, 0x1000, os.O_RDWR | os.O_TMPFILE, mode)
        assert not passes(BENEATH_RW, "mkdirat", DIR_RW, 0x1000, mode)
        assert not passes(BY_NAME_RW_DEAF, "creat", 0x1000, mode)
        assert not passes(BY_NAME_RW_DEAF, "mkdir", 0x1000, mode)
    assert passes(BENEATH_RW, "mkdirat", DIR_RW, 0x1000, 0o777)


def test_granted_names_ask_the_host_where_it_listens():
    for name in filters.READING:
        assert answer(BY_NAME, name, 0x1000) == REFUSED
        assert passes(BY_NAME_DEAF, name, 0x1000, 0)
    for name in filters.READING_AT:
        assert answer(BY_NAME, name, AT_FDCWD, 0x1000, 0) == REFUSED
        assert passes(BY_NAME, name, OWN, 0x1000, 0)
        assert passes(BY_NAME_DEAF, name, AT_FDCWD, 0x1000, 0)
    for name in filters.CHANGING:
        assert answer(BY_NAME, name, 0x1000) == REFUSED
        assert answer(BY_NAME_DEAF, name, 0x1000) == errno_(errno.EPERM)
        assert passes(BY_NAME_RW_DEAF, name, 0x1000)


# ------------------------------------------------------------------------------------------------------------ for every layout


NEVER = (
    "execve execveat fork vfork ptrace mount umount2 pivot_root chroot unshare setns socket connect bind sendmmsg "
    "recvmmsg process_vm_readv process_vm_writev process_madvise pidfd_open pidfd_getfd pidfd_send_signal bpf "
    "seccomp io_uring_setup io_uring_enter io_uring_register userfaultfd memfd_create memfd_secret "
    "open_by_handle_at name_to_handle_at perf_event_open keyctl add_key request_key shmget shmat shmctl semget "
    "msgget init_module finit_module delete_module kexec_load kexec_file_load reboot setrlimit setuid setgid "
    "setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset setsid setpgid chmod fchmod fchmodat "
    "fchmodat2 chown fchown lchown fchownat link linkat mknod mknodat landlock_create_ruleset landlock_add_rule "
    "landlock_restrict_self vmsplice tee fchdir flock sched_setaffinity sched_setscheduler sched_setparam "
    "sched_setattr setpriority ioprio_set syslog acct swapon swapoff quotactl quotactl_fd sethostname setdomainname "
    "clock_settime settimeofday adjtimex clock_adjtime kcmp move_pages migrate_pages fanotify_init fanotify_mark "
    "inotify_init1 inotify_add_watch mq_open mq_unlink statmount listmount uselib io_setup io_submit modify_ldt "
    "iopl ioperm vhangup lookup_dcookie open_tree move_mount fsopen fsmount fsconfig fspick mount_setattr setxattr "
    "lsetxattr fsetxattr removexattr getxattr listxattr fgetxattr openat2 sync syncfs remap_file_pages "
    "set_mempolicy_home_node process_mrelease nfsservctl ustat sysfs statfs pkey_mprotect "
)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_is_never_allowed_is_refused_whatever_its_arguments(layout):
    random = Random(1)
    interesting = (
        0,
        1,
        2,
        OWN,
        RESULT,
        CONTROL,
        FIRST_GRANT,
        FIRST_GRANT + WIDTH,
        0x1000,
        0xFFFFFFFF,
        (1 << 64) - 100,
        1 << 32,
    )
    for name in NEVER.split():
        for _ in range(12):
            args = [random.choice(interesting) for _ in range(6)]
            assert answer(layout, name, *args) == filters.refusal(layout), (name, args)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_number_without_a_rule_is_refused(layout):
    ruled = {syscalls.number(X86, rule.name) for rule in filters.rules(layout)}
    for number in [*range(600), 1000, 0x3FFFFFFF]:
        if number not in ruled:
            assert interpreted(layout, number, OWN, OWN, OWN) == filters.refusal(layout), number


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_calls_of_another_architecture_are_refused(layout):
    for name in ("read", "write", "exit_group", "getpid", "mmap"):
        number = syscalls.number(X86, name)
        assert interpreted(layout, number, OWN) in (ALLOW, filters.refusal(layout))
        assert interpreted(layout, number | X32_BIT, OWN) == filters.refusal(layout)
        assert interpreted(layout, number | 0x80000000, OWN) == filters.refusal(layout)
        assert interpreted(layout, number, OWN, arch=AUDIT_ARCH_I386) == filters.refusal(layout)
    assert interpreted(layout, 3, OWN, arch=AUDIT_ARCH_I386, program_arch=ARM) == filters.refusal(layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_rule_has_its_reason_and_the_kernel_takes_the_program(layout):
    rules = list(filters.rules(layout))
    assert [rule.name for rule in rules if len(rule.because) < 3] == []
    assert len({rule.name for rule in rules}) == len(rules)
    numbers = {**syscalls.numbers(X86), **syscalls.numbers(ARM)}
    assert {rule.name for rule in rules} <= numbers.keys()
    for arch in (X86, ARM):
        program = filters.program(layout, arch)
        verify(program)
        assert len(program) // 8 <= 512
    assert filters.program(layout) is filters.program(layout)


def test_refused_calls_are_told_to_the_host_where_it_listens_and_plainly_refused_elsewhere():
    assert filters.refusal(NOTHING) == NOTIFY
    assert filters.refusal(DEAF) == errno_(errno.EPERM)
    assert answer(FILES, "execve") == NOTIFY
    assert answer(DEAF, "execve") == errno_(errno.EPERM)


def test_a_thread_ends_and_a_process_ends():
    for layout in LAYOUTS.values():
        for name in ("exit", "exit_group", "rt_sigreturn", "futex", "brk", "munmap", "getrandom", "clock_nanosleep"):
            assert passes(layout, name), name


@pytest.mark.parametrize("arch", [X86, ARM], ids=["x86_64", "aarch64"])
def test_both_architectures_answer_alike(arch):
    for name, args, passing in (
        ("read", (R,), True), ("write", (R,), False), ("write", (RW,), True), ("pwrite64", (A,), False),
        ("close", (RESULT,), False),
        ("dup3", (OWN, 7), True), ("dup3", (OWN, BASE), False), ("sendmsg", (CONTROL,), True), ("sendmsg", (SOCK,), False),
        ("openat", (AT_FDCWD, 0x1000), False), ("clone", (THREAD,), True), ("clone", (17,), False), ("execve", (), False),
        ("mprotect", (0, 0, P_EXEC), False), ("prlimit64", (0, 7, 0x1000), False), ("sendto", (SOCK, 0, 0, 0, 1), False),
    ):  # fmt: skip
        assert (answer(FILES, name, *args, arch=arch) == ALLOW) is passing, name


# ------------------------------------------------------------------------------------------------------------------- layouts


def test_a_layout_knows_which_ranges_hold_a_right():
    assert NOTHING.mask(r.CAP_WRITE) == 1  # the channel
    assert NOTHING.mask(r.CAP_READ) == 0
    assert FILES.mask(r.CAP_PREAD) == 0b0000_1010
    assert FILES.mask(r.NONE) == (1 << 9) - 1


def test_a_layout_is_a_key():
    assert hash(Layout(ranges=(READ,))) == hash(Layout(ranges=(r.mode_rights("r"),)))
    assert Layout(ranges=(READ,)) != Layout(ranges=(WRITE,))
