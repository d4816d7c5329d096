"""The numbers are the kernel's."""

import re
from pathlib import Path

import pytest

from compart.backend.linux import syscalls
from compart.backend.linux.syscalls import AUDIT_ARCH_AARCH64, AUDIT_ARCH_I386, AUDIT_ARCH_X86_64, X32_BIT

INCLUDE = Path("/usr/include")
BOTH = [AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64]

# What the kernel's tables (6.18) say at the places where a slip would shift everything after it.
X86_64 = {
    0: "read", 1: "write", 2: "open", 9: "mmap", 56: "clone", 59: "execve", 100: "times", 134: "uselib",
    157: "prctl", 185: "security", 202: "futex", 231: "exit_group", 257: "openat", 300: "fanotify_init",
    317: "seccomp", 334: "rseq", 335: "uretprobe", 336: "uprobe", 424: "pidfd_send_signal", 435: "clone3",
    437: "openat2", 444: "landlock_create_ruleset", 446: "landlock_restrict_self", 451: "cachestat",
    454: "futex_wake", 462: "mseal", 467: "open_tree_attr", 469: "file_setattr",
}  # fmt: skip
AARCH64 = {
    0: "io_setup", 17: "getcwd", 23: "dup", 25: "fcntl", 29: "ioctl", 38: "renameat", 39: "umount2", 42: "nfsservctl",
    43: "statfs", 56: "openat", 57: "close", 63: "read", 64: "write", 79: "newfstatat", 80: "fstat", 94: "exit_group",
    98: "futex", 129: "kill", 134: "rt_sigaction", 160: "uname", 163: "getrlimit", 167: "prctl", 172: "getpid",
    198: "socket", 203: "connect", 214: "brk", 220: "clone", 221: "execve", 222: "mmap", 226: "mprotect",
    242: "accept4", 243: "recvmmsg", 260: "wait4", 261: "prlimit64", 276: "renameat2", 277: "seccomp",
    278: "getrandom", 281: "execveat", 291: "statx", 293: "rseq", 294: "kexec_file_load", 424: "pidfd_send_signal",
    435: "clone3", 436: "close_range", 447: "memfd_secret", 469: "file_setattr",
}  # fmt: skip


@pytest.mark.parametrize(("arch", "expected"), [(AUDIT_ARCH_X86_64, X86_64), (AUDIT_ARCH_AARCH64, AARCH64)])
def test_known_numbers(arch, expected):
    assert {number: syscalls.name(arch, number) for number in expected} == expected
    assert {syscalls.number(arch, name): name for name in expected.values()} == expected


@pytest.mark.parametrize(
    ("arch", "numbers"),
    [
        (AUDIT_ARCH_X86_64, [*range(337), *range(424, 470)]),
        (AUDIT_ARCH_AARCH64, [*range(244), *range(260, 295), *range(424, 470)]),
    ],
)
def test_the_tables_are_whole_and_end_where_they_should(arch, numbers):
    table = syscalls.numbers(arch)
    assert sorted(table.values()) == numbers
    assert all(syscalls.name(arch, number) == name for name, number in table.items())


def test_calls_that_only_older_architectures_have():
    for name in ("open", "stat", "fork", "vfork", "pipe", "dup2", "poll", "select", "arch_prctl", "time"):
        assert syscalls.number(AUDIT_ARCH_X86_64, name) is not None
        assert syscalls.number(AUDIT_ARCH_AARCH64, name) is None


@pytest.mark.parametrize("arch", BOTH)
def test_a_call_that_does_not_exist_has_no_number(arch):
    assert syscalls.number(arch, "sys_open") is None


@pytest.mark.parametrize(
    ("arch", "number", "text"),
    [
        (AUDIT_ARCH_X86_64, 257, "openat"),
        (AUDIT_ARCH_X86_64, 471, "unknown 471"),
        (AUDIT_ARCH_X86_64, 400, "unknown 400"),
        (AUDIT_ARCH_AARCH64, 250, "unknown 250"),
        (AUDIT_ARCH_X86_64, X32_BIT | 2, "x32:open"),
        (AUDIT_ARCH_X86_64, X32_BIT | 520, "x32:execve"),
        (AUDIT_ARCH_X86_64, X32_BIT | 547, "x32:pwritev2"),
        (AUDIT_ARCH_X86_64, X32_BIT | 900, "x32:unknown 900"),
        (AUDIT_ARCH_X86_64, -1, "unknown 4294967295"),
        (AUDIT_ARCH_X86_64, 512, "unknown 512"),
        (AUDIT_ARCH_AARCH64, X32_BIT | 2, "unknown 1073741826"),
        (AUDIT_ARCH_I386, 5, "i386 call 5"),
        (0x40000028, 5, "call 5 of architecture 0x40000028"),
    ],
)
def test_every_number_has_something_to_be_called_by(arch, number, text):
    assert syscalls.name(arch, number) == text


def test_an_architecture_without_a_table_is_an_error():
    with pytest.raises(ValueError):
        syscalls.number(AUDIT_ARCH_I386, "open")


def defined(path, pattern):
    """name -> number of the #defines in a header that match."""
    return {name: int(number) for name, number in re.findall(pattern, path.read_text())}


def compare(ours, theirs):
    """The header may be older or newer than the table, but where both know a name they agree."""
    assert len(theirs) > 30
    shared = theirs.keys() & ours.keys()
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    unknown = {name: number for name, number in theirs.items() if name not in ours}
    assert all(number > max(ours.values()) for number in unknown.values()), unknown


def header(name):
    paths = [INCLUDE / name, INCLUDE / "x86_64-linux-gnu" / name]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def test_x86_64_agrees_with_the_header():
    theirs = defined(header("asm/unistd_64.h"), r"#define __NR_(\w+) (\d+)")
    compare(syscalls.numbers(AUDIT_ARCH_X86_64), theirs)


def test_x32_agrees_with_the_header():
    theirs = defined(header("asm/unistd_x32.h"), r"#define __NR_(\w+) \(__X32_SYSCALL_BIT \+ (\d+)\)")
    assert len(theirs) > 300
    for name, number in theirs.items():
        assert syscalls.name(AUDIT_ARCH_X86_64, X32_BIT | number) == f"x32:{name}"


def test_aarch64_agrees_with_the_generic_header():
    path = header("asm-generic/unistd.h")
    # The calls whose names differ between 32 and 64 bits are defined in two steps; 64 bits use the shorter names.
    theirs = defined(path, r"#define __NR_(\w+) (\d+)") | defined(path, r"#define __NR3264_(\w+) (\d+)")
    theirs["newfstatat"] = theirs.pop("fstatat")
    for other in ("stat", "lstat", "sync_file_range2", "syscalls", "arch_specific_syscall"):
        theirs.pop(other, None)
    # 403 to 423 are for machines of 32 bits.
    compare(syscalls.numbers(AUDIT_ARCH_AARCH64), {name: n for name, n in theirs.items() if not 402 < n < 424})
