"""Answer what the filter refused: record it, decide the few calls that need more than the table.

Runs in the host, on the calling thread, against a hostile process. Everything read from its memory may change a moment
later, so it decides nothing: an answer of "continue" is given only where the meaning is in registers, or where the
kernel bounds the call anyway (paths inside a root that holds only grants).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from compart.backend.linux import _sys, decode, filters, syscalls
from compart.backend.linux.bpf import Masked
from compart.backend.linux.decode import Refused, signed
from compart.policy import Policy
from compart.rights import Rights
from compart.violation import Frame, Violation

CONTINUE = 1
ADDFD_SETFD = 1
STACK_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else 0
"""Sent to a thread whose call was refused: faulthandler writes its Python stack to the trace pipe."""

MOST_THREADS = 256
"""How many threads a compartment may have when its policy leaves that to `memory`: a thread without a stack costs none."""

MOST_RECORDED = 100
MOST_ANSWERED = 100_000
MOST_TRACE = 1 << 20
WAIT_KILLABLE_RECV = 1 << 5

SELF_DIRECTED = ("kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
SELF_ASKED = ("sched_getaffinity", "sched_setaffinity", "sched_getparam", "sched_getscheduler", "get_robust_list")

QUIET = (
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/possible",
    "/proc/stat",
    "/proc/self/stat",
    "/proc/sys/vm/overcommit_memory",
)
"""Refused like any other, but not told: the C library and malloc ask these and do right without an answer."""

BOUNDED_BY_ROOT = filters.READING + filters.READING_AT + filters.CHANGING + filters.CHANGING_AT + ("statx", "statfs")

NEW_LISTENER = 1 << 3


@lru_cache(maxsize=1)
def killable() -> bool:
    """Whether the kernel can wait for an answer undisturbed by signals (Linux 5.19, seccomp_unotify(2))."""
    return bool(_sys.seccomp_flags_known(NEW_LISTENER | WAIT_KILLABLE_RECV))


@dataclass(slots=True)
class _Draft:
    call: str
    number: int
    arguments: dict[str, object]
    thread: int
    stack: tuple[Frame, ...] = ()
    module: str = ""
    asked_stack: bool = False


@dataclass(slots=True)
class Supervisor:
    """The host's answer to one compartment's refused calls.

    `ranges` are the sets of rights by range, `granted` the host's own descriptor for each granted number; `paths` are the
    granted paths by name, `cwd` where relative names start inside, `home` where they start in the host.
    """

    listener: int
    pid: int
    policy: Policy
    arch: int
    ranges: tuple[Rights, ...] = ()
    granted: dict[int, int] = field(default_factory=dict)
    paths: tuple[tuple[str, str], ...] = ()
    cwd: str = "/"
    home: str = field(default_factory=lambda: _working_directory())
    answered: int = 0
    unrecorded: int = 0
    drafts: list[_Draft] = field(default_factory=list)
    kill_wanted: bool = False
    threads_refused: int = 0
    asked: int = 0

    def serve(self) -> None:
        """Answer one waiting call. Never blocks for longer than the kernel needs to hand it over."""
        notification = _sys.seccomp_notify_receive(self.listener)
        if notification is None:
            return
        ident, thread, number, arch, _, args = notification
        call = syscalls.name(arch, number)
        self.answered += 1
        if self.answered > MOST_ANSWERED:
            self.kill_wanted = True
        if arch == self.arch and self._continues(call, thread, args):
            _sys.seccomp_notify_send(self.listener, ident, 0, 0, CONTINUE)
            return
        if call == "clone" and self._refuses_thread(args):
            _sys.seccomp_notify_send(self.listener, ident, 0, errno.EAGAIN, 0)
            return
        if arch == self.arch and (source := self._copied(call, args)) is not None:
            self._install_copy(ident, source, cloexec=call == "dup" or args[1] & 0xFFFFFFFF == filters.F_DUPFD_CLOEXEC)
            return
        if arch == self.arch and call in ("open", "openat") and self._is_quiet(call, thread, args):
            _sys.seccomp_notify_send(self.listener, ident, 0, filters.REFUSED, 0)
            return
        recorded = self._record(call, number, thread, args)
        if self.policy.on_violation == "kill":
            self.kill_wanted = True
            return
        # Where the kernel waits killably the signal is delivered as the call returns, at the very line. Elsewhere it would
        # interrupt the wait and the call would come again, so the answer goes first and the stack is as near as can be had.
        ask = recorded and self._may_ask(thread)
        if ask and killable():
            self._ask_stack(thread)
        _sys.seccomp_notify_send(self.listener, ident, 0, filters.REFUSED, 0)
        if ask and not killable():
            self._ask_stack(thread)

    def _may_ask(self, thread: int) -> bool:
        # faulthandler writes a stack in many small pieces and without the GIL: of two threads at once none could be read.
        # The kernel blocks the signal while its handler runs, so a thread that neither awaits nor blocks it is done. Asked
        # twice, for between taking a signal and blocking it the kernel shows neither for a moment.
        if self.asked in (0, thread):
            # It may block the signal for a while, as subprocess does around vfork(2): its stack comes right after.
            return not self._has_signal(thread, b"SigPnd:")
        return not any(self._has_signal(self.asked, b"SigPnd:", b"SigBlk:") for _ in range(2))

    def _has_signal(self, thread: int, *sets: bytes) -> bool:
        """Whether STACK_SIGNAL is in one of a thread's sets of signals (proc_pid_status(5))."""
        status = b""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/task/{thread}/status", "rb") as file:
            status = file.read()
        found = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(sets)]
        return any(numbers >> (STACK_SIGNAL - 1) & 1 for numbers in found)

    def _ask_stack(self, thread: int) -> None:
        with contextlib.suppress(OSError):
            _sys.tgkill(self.pid, thread, STACK_SIGNAL)
            self.asked = thread
            self.drafts[-1].asked_stack = True

    # ---- the few calls that need more than the table ---------------------------------------------------------------

    def _continues(self, call: str, thread: int, args: tuple[int, ...]) -> bool:
        if call in SELF_DIRECTED or call in SELF_ASKED:
            return self._is_self(call, signed(args[0]))
        if call == "clone":
            return self._may_make_thread(args)
        if self.paths and call in BOUNDED_BY_ROOT:
            return plain_mode(call, args, any(mode != "r" for _, mode in self.paths)) and self._is_granted(
                call, thread, args
            )
        return False

    def _is_self(self, call: str, target: int) -> bool:
        if target == self.pid:
            return True
        return target > 0 and call not in ("kill", "tgkill") and os.path.exists(f"/proc/{self.pid}/task/{target}")

    def _makes_thread(self, args: tuple[int, ...]) -> bool:
        return args[0] & 0xFFFFFFFF & ~0x400000 == filters.CLONE_THREAD_FLAGS

    def _may_make_thread(self, args: tuple[int, ...]) -> bool:
        limit = MOST_THREADS if self.policy.threads is None else self.policy.threads
        if not self._makes_thread(args):
            return False
        with contextlib.suppress(OSError):
            # Clones are answered one at a time and each waits for its answer, so at most the one that was just
            # continued is not listed yet.
            return len(os.listdir(f"/proc/{self.pid}/task")) < limit
        return False

    def _refuses_thread(self, args: tuple[int, ...]) -> bool:
        if not self._makes_thread(args):
            return False
        self.threads_refused += 1
        return True

    def _is_granted(self, call: str, thread: int, args: tuple[int, ...]) -> bool:
        directory, index, _ = decode.PATH_CALLS[call]
        if directory is not None and signed(args[directory]) != decode.AT_FDCWD:
            return False
        text = decode.read_text(thread, args[index])
        if text is None:
            return False
        path = os.path.normpath(os.path.join(self.cwd, text))
        for granted, _ in self.paths:
            if path == granted or path.startswith(granted + "/") or granted.startswith(path.rstrip("/") + "/"):
                return True
        return False

    # ---- copies of granted descriptors: only the host makes them, so that they keep their range -----------------------------

    def _copied(self, call: str, args: tuple[int, ...]) -> int | None:
        command = args[1] & 0xFFFFFFFF
        copies = call == "dup" or (call == "fcntl" and command in (filters.F_DUPFD, filters.F_DUPFD_CLOEXEC))
        number = signed(args[0])
        return number if copies and number in self.granted else None

    def _install_copy(self, ident: int, source: int, *, cloexec: bool) -> None:
        try:
            number = self._free_number(source)
            if number is None:
                _sys.seccomp_notify_send(self.listener, ident, 0, errno.EMFILE, 0)
                return
            with self._room_for(number):
                flags = os.O_CLOEXEC if cloexec else 0
                _sys.seccomp_notify_addfd(self.listener, ident, self.granted[source], ADDFD_SETFD, number, flags)
            self.granted[number] = self.granted[source]
            _sys.seccomp_notify_send(self.listener, ident, number, 0, 0)
        except OSError:
            # No ADDFD (Linux before 5.9), or the caller went away.
            _sys.seccomp_notify_send(self.listener, ident, 0, filters.REFUSED, 0)

    def _free_number(self, source: int) -> int | None:
        first = source - (source - filters.BASE) % filters.WIDTH
        used = {int(name) for name in os.listdir(f"/proc/{self.pid}/fd")}
        return next((number for number in range(first, first + filters.WIDTH) if number not in used), None)

    @contextlib.contextmanager
    def _room_for(self, number: int) -> Iterator[None]:
        # ADDFD honours the compartment's RLIMIT_NOFILE. Lifted for a moment it lets another thread of it open a few more
        # of its own; the range numbers are never the lowest free ones, and the channel's are taken.
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (number + 1, hard))
        try:
            yield
        finally:
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (self.policy.open_files, hard))

    def _is_quiet(self, call: str, thread: int, args: tuple[int, ...]) -> bool:
        text = decode.read_text(thread, args[decode.PATH_CALLS[call][1]])
        # CPython looks for the line of a SyntaxError in a file of the source's name, which is "<string>" and the like.
        return text is not None and (text in QUIET or (text[:1] == "<" and text[-1:] == ">"))

    # ---- what it was, for people ---------------------------------------------------------------------------------------

    def _record(self, call: str, number: int, thread: int, args: tuple[int, ...]) -> bool:
        if len(self.drafts) >= MOST_RECORDED:
            self.unrecorded += 1
            return False
        arguments = decode.arguments(Refused(call, thread, args, self.ranges))
        self.drafts.append(_Draft(call, number, arguments, thread))
        return True

    # ---- stacks and hints from the trace pipe -----------------------------------------------------------------------------

    def violations(self, trace: bytearray) -> tuple[Violation, ...]:
        """What was refused so far, with the stacks that came by the trace pipe."""
        self._read_trace(trace)
        return tuple(
            Violation(
                call=draft.call,
                arguments=draft.arguments,
                errno=filters.REFUSED,
                thread=draft.thread,
                stack=draft.stack,
                suggestion=decode.suggest(draft.call, draft.arguments, draft.module, self.home),
                number=draft.number,
            )
            for draft in self.drafts
        )

    def _read_trace(self, trace: bytearray) -> None:
        waiting = iter([draft for draft in self.drafts if draft.asked_stack])
        module = ""
        frames: list[Frame] = []
        draft: _Draft | None = None
        for line in trace.decode(errors="replace").split("\n"):
            if line.startswith("import "):
                module = line[7:200]
            elif line.startswith(("Stack (", "Current thread", "Thread 0x")):
                draft, frames = next(waiting, None), []
                if draft is not None:
                    draft.stack = ()
            elif (match := STACK_LINE.match(line)) and draft is not None and len(frames) < 64:
                frames.append(Frame(match[1], int(match[2]), match[3]))
                draft.stack = tuple(frames)
                if module and match[1].startswith("<frozen importlib"):
                    draft.module = module


STACK_LINE = re.compile(r'  File "([^"]{1,4096})", line (\d{1,9}) in (\S{1,500})')


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def plain_mode(call: str, args: tuple[int, ...], writable: bool) -> bool:
    """Whether a call that may make a file asks for no set-user-ID bits; the table's conditions, on registers."""

    def holds(condition: Masked) -> bool:
        return args[condition.arg] & condition.mask == condition.value

    return any(all(holds(c) for c in every if isinstance(c, Masked)) for every in filters.plain_modes(call, writable))
