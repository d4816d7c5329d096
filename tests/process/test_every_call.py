"""Every number that a system call can have is issued inside, by machine code, and answered as the filter says.

The oracle is `bpf.interpret`, run on the very program that the policy compiles to. What must hold for each number: it is
refused, and told to the host, exactly when the program says so. The arguments are harmless: all zero, all ones, or a
granted descriptor and zeroes.
"""

import contextlib
import ctypes
import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import compart
from compart import CompartmentDied, rights, sandboxed
from compart.backend.linux import bpf, filters, syscalls
from compart.backend.linux.filters import FIRST_GRANT, Layout
from tests.escape import native

LISTENING = compart.enforcement(compart.Policy())["listener"].up
X86_64, I386 = syscalls.AUDIT_ARCH_X86_64, syscalls.AUDIT_ARCH_I386
X32 = 0x40000000

ACTION = 0xFFFF0000
ALLOW, NOTIFY, TRAP, ERRNO = 0x7FFF0000, 0x7FC00000, 0x00030000, 0x00050000

NUMBERS = [*range(601), *range(X32, X32 + 548)]
ZEROES, ONES, GRANTED = (0,) * 6, (-1,) * 6, (FIRST_GRANT, 0, 0, 0, 0, 0)

NAMED = {number: name for name, number in native.NUMBERS.items()}

ENDS = {
    "exit": "ends the thread",
    "exit_group": "ends the process",
    "rt_sigreturn": "takes whatever lies on the stack for registers",
    "pause": "waits for a signal",
    "select": "waits for ever when nothing is asked",
    "pselect6": "waits for ever when nothing is asked",
    "ppoll": "waits for ever when nothing is asked",
    "uretprobe": "no filter sees it (Linux 6.14); the kernel sends SIGILL to whoever is not at its own trampoline",
    "uprobe": "no filter sees it (Linux 6.18); the kernel sends SIGILL to whoever is not at its own trampoline",
}
"""Calls that would end or stop the process that goes through the table. Each has a test of its own below."""

REFUSED_BY_THE_KERNEL = {"mlock", "mlock2", "mlockall"}
"""Allowed, and answered EPERM all the same, by RLIMIT_MEMLOCK=0 (mlock(2))."""

DONE_BY_THE_HOST = {"dup", "dup2", "dup3", "fcntl"}
"""Told to the host, which makes a copy of a granted descriptor in the range of the original."""

BATCH = 40
"""How many numbers one compartment goes through: what is recorded of one is bounded."""


def confined(function: Callable[..., Any], *given: Any, **fields: Any) -> Any:
    policy = {"start": "fork", "on_violation": "deny", "timeout": 20, **fields}
    return sandboxed(**policy)(function).run(*given)


def batches(numbers: list[int]) -> Iterator[list[int]]:
    left = [number for number in numbers if NAMED.get(number) not in ENDS]
    for at in range(0, len(left), BATCH):
        yield left[at : at + BATCH]


def verdict(layout: Layout, number: int, arguments: tuple[int, ...], arch: int = X86_64) -> int:
    return bpf.interpret(filters.program(layout, X86_64), nr=number, args=arguments, arch=arch)


def title(number: int) -> str:
    return f"{number - X32 if number >= X32 else number}{' of x32' if number >= X32 else ''} {NAMED.get(number, '')}"


def disagreement(layout: Layout, number: int, arguments: tuple[int, ...], answer: int, told: bool) -> str | None:
    """None when the answer is what the filter says, else what is wrong."""
    word = verdict(layout, number, arguments)
    action, data = word & ACTION, word & 0xFFFF
    name = NAMED.get(number, "")
    if action == ALLOW:
        if told:
            return "is allowed, and was told to the host as a violation"
        if answer == -errno.EPERM and name not in REFUSED_BY_THE_KERNEL:
            return "is allowed, and was refused"
        return None
    if action == NOTIFY:
        if arguments == GRANTED and name in DONE_BY_THE_HOST and answer >= FIRST_GRANT:
            return None
        if answer != -errno.EPERM:
            return f"is refused, and was answered {answer}"
        return None if told else "is refused, and nobody was told"
    if action == ERRNO:
        return None if answer == -data else f"is answered errno {data}, and was answered {answer}"
    if action == TRAP:
        # Repeated as fstat, of the descriptor and into the memory that it names.
        return (
            None if answer in (-errno.EBADF, -errno.EFAULT, -errno.EPERM) else f"is trapped, and was answered {answer}"
        )
    return f"has a verdict of {word:#x}, which compart does not use"


def check(layout: Layout, arguments: tuple[int, ...], *given: Any) -> None:
    wrong = []
    for numbers in batches(NUMBERS):

        def issue(*given: Any, numbers: list[int] = numbers) -> list[int]:
            return [native.syscall(number, *arguments) for number in numbers]

        outcome = confined(issue, *given)
        told = {violation.number for violation in outcome.violations} if LISTENING else None
        for number, answer in zip(numbers, outcome.value, strict=True):
            was_told = number in told if told is not None else answer == -errno.EPERM
            said = disagreement(layout, number, arguments, answer, was_told)
            if said is not None:
                wrong.append(f"{title(number)} {said}")
    assert wrong == []


@pytest.mark.parametrize("arguments", [ZEROES, ONES], ids=["zeroes", "ones"])
def test_every_number_is_answered_as_the_filter_says(arguments: tuple[int, ...]) -> None:
    check(Layout(listener=LISTENING), arguments)


@pytest.mark.parametrize("mode", ["r", "w", "rw"])
def test_every_number_on_a_granted_file_is_answered_as_the_filter_says(mode: Any, tmp_path: Path) -> None:
    path = tmp_path / "granted"
    path.write_bytes(b"granted")
    with open(path, {"r": "rb", "w": "wb", "rw": "r+b"}[mode], buffering=0) as file:
        check(Layout(ranges=(rights.mode_rights(mode),), listener=LISTENING), GRANTED, file)


@pytest.mark.parametrize("seed", range(4))
def test_garbage_in_refused_calls_does_the_host_no_harm(seed: int) -> None:
    """The host decodes the arguments of what it is told, for people to read; they are whatever the compartment likes."""
    layout = Layout(listener=LISTENING)
    source = random.Random(seed)
    memory = ctypes.create_string_buffer(os.urandom(8192), 8192)
    interesting = (
        0,
        1,
        -1,
        2**31 - 1,
        -(2**31),
        2**63 - 1,
        -(2**63),
        0xFFFF_8000_0000_0000,
        2**32,
        native.code_address(),
    )
    interesting += tuple(ctypes.addressof(memory) + n for n in (0, 1, 4000, 8190))
    calls = []
    for number in range(470):
        arguments = tuple(source.choice(interesting) for _ in range(6))
        if verdict(layout, number, arguments) & ACTION in (NOTIFY, ERRNO) and NAMED.get(number) not in ENDS:
            calls.append((number, arguments))
    for at in range(0, len(calls), BATCH):

        def issue(at: int = at) -> list[int]:
            return [native.syscall(number, *arguments) for number, arguments in calls[at : at + BATCH]]

        outcome = confined(issue)
        assert [str(violation) for violation in outcome.violations] or not LISTENING
        assert all(answer < 0 for answer in outcome.value)


def test_the_oracle_refuses_and_allows() -> None:
    """The tests above compare two things; here is what at least must be in both."""
    layout = Layout(listener=LISTENING)
    refused = ERRNO | errno.EPERM if not LISTENING else NOTIFY
    for name in (
        "open",
        "openat",
        "socket",
        "fork",
        "execve",
        "ptrace",
        "kill",
        "mount",
        "bpf",
        "io_uring_setup",
        "memfd_create",
    ):
        assert verdict(layout, native.NUMBERS[name], ZEROES) == refused, name
    for name in ("read", "mmap", "getpid", "exit_group", "futex"):
        assert verdict(layout, native.NUMBERS[name], ZEROES) == ALLOW, name
    for number in (470, 599, 600, X32, X32 + 39, X32 + 547, 512, 547):
        assert verdict(layout, number, ZEROES) == refused, number
    assert all(verdict(layout, number, ZEROES, I386) == refused for number in range(600))


def test_the_names_of_the_numbers_are_those_of_the_kernel() -> None:
    assert {name: syscalls.number(X86_64, name) for name in native.NUMBERS} == native.NUMBERS


def _i386_is_there() -> bool:
    pid = os.fork()
    if pid == 0:
        native.int80(20)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def test_every_number_of_the_i386_entry_is_refused() -> None:
    if not _i386_is_there():
        pytest.skip("this kernel has no i386 entry")
    for at in range(0, 480, BATCH):

        def issue(at: int = at) -> list[int]:
            return [native.int80(number) for number in range(at, at + BATCH)]

        outcome = confined(issue)
        assert outcome.value == [-errno.EPERM] * BATCH
        if LISTENING:
            assert len(outcome.violations) == BATCH


# -- the calls that end or stop whoever makes them ------------------------------------------------------------------------


def test_every_call_left_out_is_tested_below() -> None:
    here = Path(__file__).read_text()
    tested = here[here.index("def test_every_call_left_out") :]
    assert all(f'"{name}"' in tested for name in ENDS)


def test_ending_the_process_ends_it() -> None:
    with pytest.raises(CompartmentDied) as caught:
        confined(lambda: native.syscall(native.NUMBERS["exit_group"], 7))
    assert caught.value.exit_code == 7


def test_ending_the_only_thread_ends_the_process() -> None:
    with pytest.raises(CompartmentDied) as caught:
        confined(lambda: native.syscall(native.NUMBERS["exit"], 7))
    assert caught.value.exit_code == 7


def test_returning_from_no_signal_ends_it() -> None:
    with pytest.raises(CompartmentDied) as caught:
        confined(lambda: native.syscall(native.NUMBERS["rt_sigreturn"]))
    assert caught.value.signal in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL)


@pytest.mark.parametrize("name", ["pause", "select", "pselect6", "ppoll"])
def test_waiting_for_ever_is_allowed_until_a_signal(name: str) -> None:
    def waits() -> int:
        signal.signal(signal.SIGALRM, lambda number, frame: None)
        # Again and again: the first may come before the call waits.
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        return native.syscall(native.NUMBERS[name])

    outcome = confined(waits)
    assert outcome.value == -errno.EINTR
    assert outcome.violations == ()


@pytest.mark.parametrize("name", ["uretprobe", "uprobe"])
def test_what_no_filter_sees_does_nothing(name: str) -> None:
    def issue() -> int:
        return native.syscall(native.NUMBERS[name])

    with contextlib.suppress(CompartmentDied):
        answer = confined(issue).value
        assert answer < 0
