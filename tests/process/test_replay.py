"""The filters that other tests run inside refuse what they should: each call is made outside first, then inside."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compart.backend.linux import syscalls
from compart.backend.linux.bpf import ALLOW, Action, disassemble, errno_, interpret, verify
from compart.backend.linux.syscalls import AUDIT_ARCH_X86_64, X32_BIT
from tests import replay

ROOT = Path(__file__).parents[2]

here = pytest.mark.skipif(sys.platform != "linux" or not replay.ARCH, reason="runs Linux's filters")

# Makes one call with numbers and the word "filter" (a filter that allows everything) as its arguments.
PROBE = """
import ctypes, os, sys
from tests import replay
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)  # no_new_privs, without which only root may use filters
call = libc.syscall
call.restype = ctypes.c_long
allow = replay.SockFprog(1, b"\\x06\\0\\0\\0\\0\\0\\xff\\x7f")
arguments = [ctypes.byref(allow) if word == "filter" else ctypes.c_long(int(word, 0)) for word in sys.argv[1:]]
result = call(*arguments)
print(os.strerror(ctypes.get_errno()) if result == -1 else "done")
"""


def run(*command, profile=None, options=()):
    """What a command prints, alone or under a profile."""
    if profile:
        command = (sys.executable, "-m", "tests.replay", profile, *options, "--", *command)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def call(name, *arguments, profile=None):
    """Make a system call in a process of its own: "done", or the errno."""
    number = syscalls.number(replay.ARCH, name)
    words = [str(word) for word in (number, *arguments)]
    said = run(sys.executable, "-c", PROBE, *words, profile=profile)
    return next((code for code in errno.errorcode if os.strerror(code) == said), said)


NEW_USER = 0x10000000
VERSION = ("landlock_create_ruleset", 0, 0, 1)  # LANDLOCK_CREATE_RULESET_VERSION


@here
@pytest.mark.parametrize(
    ("profile", "attempt", "outside", "inside"),
    [
        ("docker", ("unshare", 0), "done", errno.EPERM),
        ("docker", ("setns", -1, 0), errno.EBADF, errno.EPERM),
        ("docker", ("clone3", 0, 0), errno.EINVAL, errno.ENOSYS),
        ("docker", ("clone", NEW_USER | 0x200), errno.EINVAL, errno.EPERM),
        ("docker", ("pidfd_getfd", -1, 0, 0), errno.EBADF, errno.EPERM),
        ("docker", ("personality", 0x0040000), "done", errno.EPERM),
        ("docker", ("set_mempolicy", 0, 0, 0), "done", errno.EPERM),
        ("docker", ("process_madvise", -1, 0, 0, 0, 0), errno.EBADF, errno.EPERM),
        ("no-landlock", VERSION, "done", errno.ENOSYS),
        ("no-landlock", ("landlock_restrict_self", -1, 0), errno.EBADF, errno.ENOSYS),
        ("no-namespaces", ("unshare", 0), "done", errno.EPERM),
        ("no-namespaces", ("clone", NEW_USER | 0x200), errno.EINVAL, errno.EPERM),
        ("no-namespaces", ("clone3", 0, 0), errno.EINVAL, errno.ENOSYS),
        ("no-namespaces", ("setns", -1, 0), errno.EBADF, errno.EPERM),
        ("no-namespaces", ("mount_setattr", -1, 0, 0, 0, 0), errno.EINVAL, errno.EPERM),
        ("no-namespaces", ("open_tree", -1, 0, 0), errno.EFAULT, errno.EPERM),
        ("no-listener", ("seccomp", 1, 8, "filter"), "done", errno.EBUSY),
    ],
)
def test_what_passes_outside_is_refused_inside(profile, attempt, outside, inside):
    assert call(*attempt) == outside
    assert call(*attempt, profile=profile) == inside


@here
@pytest.mark.parametrize(
    ("profile", "attempt"),
    [
        # What compart needs and Docker lets pass.
        ("docker", ("seccomp", 1, 8, "filter")),
        ("docker", VERSION),
        ("docker", ("personality", 0xFFFFFFFF)),
        ("docker", ("personality", 8)),
        ("docker", ("getppid",)),
        ("docker", ("ptrace", 0, 0, 0, 0)),  # PTRACE_TRACEME
        ("no-landlock", ("unshare", 0)),
        ("no-landlock", ("seccomp", 1, 8, "filter")),
        ("no-namespaces", VERSION),
        ("no-namespaces", ("seccomp", 1, 8, "filter")),
        ("no-listener", ("seccomp", 1, 0, "filter")),
        ("no-listener", ("unshare", 0)),
    ],
)
def test_the_neighbours_of_what_is_refused_pass(profile, attempt):
    assert call(*attempt, profile=profile) == "done"


@here
def test_docker_refuses_the_odd_families_of_sockets():
    script = """
import socket
for family in socket.AF_UNIX, socket.AF_INET, 38, 39, 40:
    try:
        socket.socket(family, socket.SOCK_DGRAM).close()
        print(0)
    except OSError as error:
        print(error.errno)
"""
    inside = run(sys.executable, "-c", script, profile="docker").split()
    outside = run(sys.executable, "-c", script).split()
    assert inside[:2] == ["0", "0"]
    assert [inside[2], inside[4]] == [str(errno.EPERM)] * 2
    assert str(errno.EPERM) not in outside
    assert inside[3] == outside[3]


@here
def test_profiles_can_be_put_one_in_another():
    assert call(*VERSION, profile="docker,no-landlock") == errno.ENOSYS
    assert call("unshare", 0, profile="no-landlock,docker") == errno.EPERM


@here
def test_threads_and_processes_can_still_be_made():
    script = """
import subprocess, threading
done = []
thread = threading.Thread(target=lambda: done.append(subprocess.call(["true"])))
thread.start()
thread.join()
assert done == [0]
"""
    for profile in replay.PROFILES:
        run(sys.executable, "-c", script, profile=profile)


@here
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_has_no_groups_and_no_capabilities():
    status = run("cat", "/proc/self/status", profile="no-landlock", options=("--user", "12345"))
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    assert fields["Uid"].split() == fields["Gid"].split() == ["12345"] * 4
    assert fields["Groups"].split() == []
    assert {fields[name].strip("\t0") for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {""}
    assert fields["NoNewPrivs"].split() == ["1"]
    # Neither does root get them back.
    status = run("cat", "/proc/self/status", profile="no-landlock", options=("--user", "0"))
    assert "CapEff:\t0000000000000000" in status


def test_a_profile_that_does_not_exist_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "tests.replay", "docker,podman", "--", "true"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "no profile podman" in done.stderr


# What the program says, on any system.


def docker_says(name, *args, **options):
    program = replay.docker(arch=AUDIT_ARCH_X86_64, **options)
    number = syscalls.number(AUDIT_ARCH_X86_64, name)
    return Action(interpret(program, nr=number, args=(*args, *[0] * (6 - len(args))), arch=AUDIT_ARCH_X86_64))


REFUSED = errno_(errno.EPERM)


@pytest.mark.parametrize(
    ("call", "options", "answer"),
    [
        (("read",), {}, ALLOW),
        (("bpf",), {}, REFUSED),
        (("bpf",), {"capabilities": {"CAP_BPF"}}, ALLOW),
        (("ptrace",), {}, ALLOW),
        (("ptrace",), {"kernel": (4, 7)}, REFUSED),
        (("ptrace",), {"kernel": (4, 7), "capabilities": {"CAP_SYS_PTRACE"}}, ALLOW),
        (("clone", 0x11), {}, ALLOW),
        (("clone", 0x3D0F00), {}, ALLOW),
        (("clone", 0x10000011), {}, REFUSED),
        (("clone", 0x10000011), {"capabilities": {"CAP_SYS_ADMIN"}}, ALLOW),
        (("clone3",), {}, errno_(errno.ENOSYS)),
        (("clone3",), {"capabilities": {"CAP_SYS_ADMIN"}}, ALLOW),
        (("socket", 1), {}, ALLOW),
        (("socket", 38), {}, REFUSED),
        (("socket", 39), {}, ALLOW),
        (("socket", 40), {}, REFUSED),
        (("socket", 40 | 1 << 32), {}, ALLOW),
        (("personality", 131080), {}, ALLOW),
        (("personality", 131081), {}, REFUSED),
        (("chroot",), {}, REFUSED),
        (("io_uring_setup",), {}, REFUSED),
        (("userfaultfd",), {}, REFUSED),
        (("landlock_restrict_self",), {}, ALLOW),
        (("seccomp",), {}, ALLOW),
    ],
)
def test_what_docker_answers(call, options, answer):
    assert docker_says(*call, **options) == answer
    assert docker_says(*call, cached=True, **options) == answer


@pytest.mark.parametrize("arch", replay.MACHINES.values())
@pytest.mark.parametrize("profile", replay.PROFILES.values())
def test_every_profile_is_a_program_that_the_kernel_takes(profile, arch):
    program = profile(arch=arch)
    verify(program)
    assert any("nr: " in line for line in disassemble(program))
    assert Action(interpret(program, nr=syscalls.number(arch, "read"), arch=arch)) == ALLOW
    assert Action(interpret(program, nr=X32_BIT | 1, arch=AUDIT_ARCH_X86_64)) == ALLOW


def test_every_name_in_the_profile_is_a_call():
    names = set(replay.PROFILE["allowed"])
    for several in replay.PROFILE["with_capability"].values():
        names.update(several)
    for entry in replay.PROFILE["conditional"]:
        names.update(entry["calls"])
    assert names <= set(syscalls.numbers(AUDIT_ARCH_X86_64))
    assert len(replay.PROFILE["allowed"]) == len(set(replay.PROFILE["allowed"])) >= 300
