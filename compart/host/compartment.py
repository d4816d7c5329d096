"""One compartment: fork it, supervise it, take its answer, reap it.

Runs in the host, on the thread that made the call: it already waits for the answer, so it also answers refused calls,
drains captured output and watches the clock. Everything that arrives is read as an attacker's.
"""

from __future__ import annotations

import contextlib
import encodings.aliases
import errno
import io
import os
import select
import signal
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from compart import _fast, backend, message
from compart.backend import Channel, Enforcement
from compart.backend.linux import _sys
from compart.backend.linux.notify import MOST_ANSWERED, MOST_TRACE, Supervisor
from compart.backend.linux.walls import Plan
from compart.capability import Directory, Handed
from compart.errors import (
    CompartmentDied,
    CompartmentTimeout,
    EncodeError,
    MemoryLimitError,
    ProtocolError,
    UnsupportedError,
    Usage,
    ViolationError,
    printable,
    signal_name,
)
from compart.guest import worker
from compart.guest.worker import Job
from compart.host import arena, remote
from compart.policy import Policy
from compart.violation import Violation

CLD_EXITED, CLD_KILLED, CLD_DUMPED = 1, 2, 3
MOST_LENT = 4
PATIENCE = 3
"""Milliseconds for which the host waits for an answer and nothing else. Most calls end within; being woken to take the
listener, which most never need, would cost more than all else about it. Refused calls wait that long at most."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything one call gave: its value, captured output, what it used, what was refused, which walls were up."""

    value: Any
    stdout: str
    stderr: str
    usage: Usage
    violations: tuple[Violation, ...]
    enforcement: Enforcement


@dataclass(slots=True)
class Call:
    """What is to be run: the function, its arguments, and what it may send back."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str
    policy: Policy
    types: tuple[type, ...]
    registry: Any
    name: str


class Compartment:
    """One confined process and the host's handle on it. It lives from the constructor to `close`, and owns `handed`.

    `pump(timeout)` serves whatever is ready; `answer` is the frame that the compartment sent, once there is one.
    """

    def __init__(self, call: Call, handed: list[Handed], *, waits: bool = True) -> None:
        self.call = call
        self.policy = call.policy
        self.started = time.monotonic()
        self.deadline = None if self.policy.timeout is None else self.started + self.policy.timeout
        self.frames = _fast.FrameReader(self.policy.result_limit + message.OVERHEAD)
        self.output: dict[int, bytearray] = {}
        self.relays: dict[int, int] = {}
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.supervisor: Supervisor | None = None
        self.traced = bytearray()
        self.leases: list[arena.Lease] = []
        self.loan_wanted: int | None = None
        self.used: list[arena.Lease] = []
        self.descriptors: list[int] = []
        self.limit: str | None = None
        self.died: tuple[int, int, float, float, int] | None = None
        self.ended_at = 0.0
        self.closed = False
        self.finished = False
        self.owner = os.getpid()
        self.result_open = True
        self.walls_stand = False
        self.ours: list[int] = []
        self.theirs: list[int] = []
        self.forked: list[tuple[int, int]] = []
        self.pidfd = self.result = self.control = self.trace = self.listener = -1
        self.answered = False
        self.poll: select.poll | None = None
        self._polled: set[int] = set()
        self.backend = backend.select()
        self.handed = handed
        self.plan: Plan = self.backend.plan(self.policy, handed)
        _live[id(self)] = weakref.ref(self)
        try:
            self._start(handed, waits)
        except BaseException:
            self.close()
            raise

    # ---- birth ----------------------------------------------------------------------------------------------------------

    def _start(self, handed: list[Handed], waits: bool) -> None:
        ours, theirs = self.ours, self.theirs
        try:
            _sys.pipes(4, ours, theirs)
            self.result, self.trace, out, err = ours
            self._output(self.policy.stdout, self.stdout, 1, out)
            self._output(self.policy.stderr, self.stderr, 2, err)
            _sys.socketpair(ours, theirs)
            self.control = ours[4]
            if "stream" in self.call.kind:
                # The thread that starts a stream may end before it does, or become another program with it.
                _sys.pipes(1, theirs, ours)
            channel = Channel(*theirs)
            script = self.plan.write(channel)
            job = Job(
                self.call.function, self.call.args, self.call.kwargs, self.call.kind, handed, self.call.registry,
                self.call.types, self.policy.result_limit, self.plan, channel, script, _looping(), _replaced(),
                [],
            )  # fmt: skip
            self._fork(job, waits)
        finally:
            _sys.close_all(theirs)

    def _fork(self, job: Job, waits: bool) -> None:
        # Where libc's own fork is not to be had, another thread may hold a lock of malloc for ever in the child.
        probe_heap = not _sys.fork_runs_handlers() and threading.active_count() > 1
        patience = 0
        if waits:
            patience = PATIENCE if self.policy.timeout is None else min(PATIENCE, int(self.policy.timeout * 1000))
        pid, pidfd = _sys.fork(probe_heap=probe_heap, into=self.forked)
        if pid == 0:
            worker.main(self.backend, job)
        self.pid, self.pidfd = pid, pidfd
        self.answered = _sys.settle(self.theirs, self.result, pidfd, patience)

    def _output(self, how: str, into: bytearray, number: int, ours: int) -> None:
        # "inherit" is relayed and "null" is drained: the compartment never holds the host's terminal, log file or device.
        self.output[ours] = into if how == "capture" else bytearray()
        if how == "inherit":
            self.relays[ours] = number

    # ---- life -----------------------------------------------------------------------------------------------------------

    def take(self) -> tuple[int, bytes] | None:
        """A frame that has arrived, or None."""
        try:
            return self.frames.take()
        except _fast.Malformed as error:
            self.kill()
            raise ProtocolError(f"the compartment broke the protocol: {error}") from None

    def wait_frame(self) -> tuple[int, bytes] | None:
        """The next frame, or None when the compartment ended without one. Enforces time, CPU and violations."""
        if self.answered:
            self.answered = False
            self._fill()
        while True:
            frame = self.take()
            if frame is not None:
                return frame
            if self.finished:
                return None
            self.pump(self.patience())

    def patience(self) -> float | None:
        """Seconds until the clock must be looked at again; None for never."""
        now = time.monotonic()
        left = None if self.deadline is None else max(0.0, self.deadline - now)
        if self.policy.cpu is not None:
            spare = max(0.002, (self.policy.cpu - self._cpu_used()) / (os.cpu_count() or 1))
            left = spare if left is None else min(left, spare)
        return left

    def pump(self, timeout: float | None) -> None:
        """Serve what is ready, waiting at most `timeout` seconds for something to be."""
        ready = self._watch_all().poll(None if timeout is None else timeout * 1000 + 1)
        for descriptor, _ in ready:
            if self.finished and descriptor != self.result:
                continue
            if descriptor == self.result:
                self._fill()
            elif descriptor == self.listener:
                self._serve()
            elif descriptor == self.control:
                self._control()
            elif descriptor == self.trace:
                self._trace()
            elif descriptor in self.output:
                self._drain(descriptor)
            elif descriptor == self.pidfd:
                self._ended()
        self._check_limits()

    def _watch_all(self) -> select.poll:
        if self.poll is None:
            self.poll = select.poll()
            for descriptor in (self.result, self.control, self.trace, *self.output, self.pidfd, self.listener):
                self._watch(descriptor)
        return self.poll

    def _watch(self, descriptor: int) -> None:
        if self.poll is not None and descriptor >= 0:
            self.poll.register(descriptor, select.POLLIN)
            self._polled.add(descriptor)

    def _unwatch(self, descriptor: int) -> None:
        if self.poll is not None and descriptor in self._polled:
            self.poll.unregister(descriptor)
            self._polled.discard(descriptor)

    def _fill(self) -> None:
        try:
            self.frames.fill(self.result)
        except EOFError:
            self.result_open = False
            self._unwatch(self.result)
            # Without its pipe it can say nothing more.
            self.kill()
        except _fast.Malformed as error:
            self.kill()
            raise ProtocolError(f"the compartment broke the protocol: {error}") from None

    def _serve(self) -> None:
        if self.supervisor is None:
            self.supervisor = self._supervise()
        try:
            self.supervisor.serve()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINPROGRESS, errno.EBADF, errno.EINVAL):
                raise
            self._unwatch(self.listener)
        if self.supervisor.kill_wanted:
            self.limit = None if self.policy.on_violation == "kill" else "violations"
            self.kill()

    def _supervise(self) -> Supervisor:
        numbers = self.plan.numbers
        return Supervisor(
            listener=self.listener,
            pid=self.pid,
            policy=self.policy,
            arch=self.plan.arch,
            ranges=self.plan.layout.ranges,
            granted={number: item.descriptor for item, number in zip(self.handed, numbers, strict=True)},
            paths=self.plan.paths,
            cwd=self.plan.cwd,
        )

    def _control(self) -> bool:
        """Take one message from the socket for descriptors. False when there is none."""
        try:
            said, descriptors = _fast.recv_fds(self.control, 64, message.MOST_DESCRIPTORS, wait=False)
        except BlockingIOError:
            return False
        except _fast.Malformed as error:
            self.kill()
            raise ProtocolError(f"the compartment sent descriptors that break the protocol: {error}") from None
        except OSError:
            said, descriptors = b"", []
        if not said:
            self._unwatch(self.control)
            return False
        if said == b"L" and not self.walls_stand and len(descriptors) == int(self.plan.layout.listener):
            self.walls_stand = True
            if descriptors:
                self.listener = descriptors[0]
                self.ours.append(self.listener)
                self._watch(self.listener)
        elif said == b"D" and descriptors and len(self.descriptors) + len(descriptors) <= message.MOST_DESCRIPTORS:
            self.descriptors += descriptors
        elif said[:1] == b"A" and len(said) == 9 and not descriptors and any(said[1:]):
            self._lend(int.from_bytes(said[1:9], "little"))
        else:
            for descriptor in descriptors:
                os.close(descriptor)
            self.kill()
            raise ProtocolError(
                f"the compartment sent {said[:1]!r} with {len(descriptors)} descriptors, which nobody asked for"
            )
        return True

    def _lend(self, size: int) -> None:
        # A value larger than the policy allows is refused here, not when it has been written.
        if size > self.policy.result_limit + message.MOST_BUFFERS * message.ALIGN:
            self.limit = "result_bytes"
            self.kill()
            return
        if len(self.leases) >= MOST_LENT:
            # A stream that is ahead of its reader waits; it can ask for one thing at a time.
            if self.loan_wanted is not None:
                self.kill()
                raise ProtocolError("the compartment asked for more shared memory while it waited for some")
            self.loan_wanted = size
            return
        # What this compartment gave back is for itself alone as long as it lives: it may have kept a mapping.
        fitting = [used for used in self.used if used.size >= size]
        lent = fitting[0] if fitting else arena.lease(size)
        if fitting:
            self.used.remove(lent)
        self.leases.append(lent)
        with contextlib.suppress(OSError):
            _fast.send_fds(self.control, b"A" + lent.size.to_bytes(8, "little"), [lent.descriptor])

    def _trace(self) -> None:
        if _fast.read_into(self.trace, self.traced, MOST_TRACE) < 0:
            self._unwatch(self.trace)

    def _drain(self, descriptor: int) -> None:
        into = self.output[descriptor]
        ended = _fast.read_into(descriptor, into, self.policy.output_limit) < 0
        if descriptor in self.relays and into:
            with contextlib.suppress(OSError):
                os.write(self.relays[descriptor], into)
            into.clear()
        if ended:
            self._unwatch(descriptor)

    def _check_limits(self) -> None:
        if self.finished:
            return
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.limit = "timeout"
            self.kill()
        elif self.policy.cpu is not None and self._cpu_used() >= self.policy.cpu:
            self.limit = "cpu"
            self.kill()

    def _cpu_used(self) -> float:
        # The kernel's clock of another process's CPU time: clock_getcpuclockid(3).
        try:
            return time.clock_gettime((~self.pid << 3) | 2)
        except OSError:
            return 0.0

    def watched(self) -> set[int]:
        """The descriptors that `pump` serves, for an event loop to watch."""
        if self.finished:
            return set()
        self._watch_all()
        return set(self._polled)

    # ---- death ------------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Send it SIGKILL. It takes a while to die, in which the host may go on with what does not depend on it."""
        if not self.finished:
            try:
                _sys.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        """End the compartment and reap it. What it already sent stays readable."""
        if not self.finished:
            self.stop()
            self._ended()

    def _ended(self) -> None:
        if self.finished:
            return
        self._reap()
        for descriptor in self.output:
            for _ in range(64):
                before = len(self.output[descriptor])
                self._drain(descriptor)
                if len(self.output[descriptor]) == before:
                    break
        self._trace()
        if self.result_open:
            self._fill()

    def _reap(self) -> None:
        self.died = _sys.waitid(self.pidfd)
        self.finished = True
        self.ended_at = time.monotonic()

    @property
    def stillborn(self) -> bool:
        """Whether it was ended because another thread of the host held a lock of malloc at the moment of the fork."""
        if self.died is None or self.died[:2] != (CLD_KILLED, signal.SIGALRM) or _sys.fork_runs_handlers():
            return False
        while self._control():
            pass
        # Later than that its own code may have run, and ended itself.
        return not self.walls_stand

    @property
    def usage(self) -> Usage:
        """What the compartment used, complete once it has ended."""
        wall = (self.ended_at or time.monotonic()) - self.started
        if self.died is None:
            return Usage(wall=wall)
        return Usage(wall=wall, user=self.died[2], system=self.died[3], max_rss=self.died[4])

    @property
    def violations(self) -> tuple[Violation, ...]:
        return self.supervisor.violations(self.traced) if self.supervisor is not None else ()

    def close(self) -> None:
        """Kill it if it lives, and give back everything the host held for it. Closing twice is allowed."""
        if self.closed:
            return
        self.closed = True
        _live.pop(id(self), None)
        _sys.close_all(self.theirs)
        if self.forked:
            # An interrupt may have come before the constructor could keep these.
            self.pid, self.pidfd = self.forked[0]
        lives = self.pidfd >= 0 and not self.finished and self.owner == os.getpid()
        try:
            if lives:
                self.stop()
            _sys.close_all(self.ours)
            _sys.close_all(self.descriptors)
            for item in self.handed:
                item.close()
            if lives:
                self._reap()
        finally:
            if self.pidfd >= 0:
                os.close(self.pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # ---- what the end means -------------------------------------------------------------------------------------------------

    def value(self, frame: bytes, *, copy: bool) -> Any:
        """The value of a frame. With `copy` nothing of it stays in shared memory: the compartment lives on."""
        # Descriptors travel by the socket and may still lie there.
        while self._control():
            pass
        # Loans are used in the order in which they were made, one for each value that has big buffers.
        room = self.leases[0].size if self.leases else 0
        parts = message.take_apart(frame, room)
        if parts.descriptors > len(self.descriptors) or (not copy and parts.descriptors < len(self.descriptors)):
            raise ProtocolError(
                f"the compartment announced {parts.descriptors} descriptors and sent {len(self.descriptors)}"
            )
        # In a stream those of later values may have come already; the last value leaves none over.
        ours, self.descriptors = self.descriptors[: parts.descriptors], self.descriptors[parts.descriptors :]
        if parts.places and not copy:
            # Dead, it cannot change what is read now.
            self.kill()
        memory: Any = self.leases.pop(0) if parts.places else None
        if memory is not None and copy:
            lent, memory = memory, bytes(memoryview(memory)[: sum(parts.places[-1])])
            # Only now that it was copied may the compartment have the piece again.
            self.used.append(lent)
        if self.loan_wanted is not None:
            wanted, self.loan_wanted = self.loan_wanted, None
            self._lend(wanted)
        made: list[Any] = []
        try:
            read = message.read_value(
                parts,
                self.call.registry,
                self.policy.result_limit,
                memory,
                lambda kind, meta: _attach(kind, meta, ours, made),
            )
            if ours:
                raise ProtocolError("the compartment sent a descriptor that its value does not name")
        except BaseException:
            for item in made:
                item.close()
            for descriptor in ours:
                os.close(descriptor)
            raise
        return read

    def missed_a_wall(self, frame: tuple[int, bytes] | None) -> bool:
        """Whether it ended before its walls stood: the function has not run."""
        if frame is None or frame[0] != message.WALL:
            return False
        while self._control():
            pass
        return not self.walls_stand

    def end(self, frame: tuple[int, bytes] | None) -> Any:
        """The value of the last frame, or the error that the end of the compartment means."""
        try:
            value, error = self._outcome(frame), None
        except Exception as raised:
            value, error = None, raised
        if self.supervisor is not None:
            # The stacks of what was refused may still lie in the pipe.
            self.kill()
        violations = self.violations
        if violations and self.policy.on_violation != "deny":
            assert self.supervisor is not None
            died = str(error) if isinstance(error, CompartmentDied) and self.policy.on_violation != "kill" else ""
            raise ViolationError(violations, more=self.supervisor.unrecorded, died=died) from error
        if error is not None:
            raise error
        return value

    def _outcome(self, frame: tuple[int, bytes] | None) -> Any:
        if frame is None or self.limit is not None:
            self.kill()
            raise self._death()
        kind, body = frame
        if kind not in (message.VALUE, message.YIELD):
            self.kill()
        match kind:
            case message.VALUE | message.YIELD:
                return self.value(body, copy=False)
            case message.END:
                return None
            case message.RAISED:
                raise self._raised(body)
            case message.UNENCODABLE:
                raise EncodeError(printable(body[:8000].decode(errors="replace")))
            case message.TOO_LARGE:
                raise self._too_large()
            case message.WALL:
                if not self.missed_a_wall(frame):
                    raise ProtocolError("the compartment says that a wall could not be put up, when all of them stand")
                name, _, reason = body[:4000].decode(errors="replace").partition("\n")
                raise UnsupportedError(name, f"could not be put up: {reason}")
            case _:
                raise ProtocolError(f"the compartment sent a frame of kind {kind}, which there is not")

    def _raised(self, body: bytes) -> BaseException:
        said = message.read_error(body, self.policy.result_limit)
        if said.builtin == "MemoryError" and self.policy.memory_bytes is not None:
            error: BaseException = MemoryLimitError(
                self._limit_text("memory", f"{self.policy.memory_bytes / 2**20:.0f} MiB above its start"),
                limit="memory", value=self.policy.memory_bytes, usage=self.usage, stderr=self._text(self.stderr),
            )  # fmt: skip
            error.__cause__ = remote.traceback_of(said, self.call)
            return error
        error = remote.rebuild(said, self.call)
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            error.add_note(self._limit_text("open_files", str(self.policy.open_files)))
        if isinstance(error, RuntimeError) and self.supervisor is not None and self.supervisor.threads_refused:
            error.add_note(self._limit_text("threads", str(self.policy.threads)))
        elif self.policy.memory_bytes is not None and (
            (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or (isinstance(error, RuntimeError) and "start new thread" in said.text)
        ):
            error.add_note(self._limit_text("memory", f"{self.policy.memory_bytes / 2**20:.0f} MiB above its start"))
        return error

    def _too_large(self) -> CompartmentDied:
        limit = self.policy.result_limit
        return CompartmentDied(
            self._limit_text("result_bytes", f"{limit} bytes"), limit="result_bytes", value=limit, usage=self.usage,
            stderr=self._text(self.stderr),
        )  # fmt: skip

    def _death(self) -> CompartmentDied:
        assert self.died is not None
        code, status = self.died[0], self.died[1]
        words = self._text(self.stderr)
        usage = self.usage
        if self.limit == "timeout":
            text = self._limit_text("timeout", f"{self.policy.timeout} s")
            return CompartmentTimeout(
                text, signal=9, limit="timeout", value=self.policy.timeout, usage=usage, stderr=words
            )
        if self.limit == "result_bytes":
            return self._too_large()
        if self.limit == "violations":
            text = f"{self.call.name} was ended after {MOST_ANSWERED} refused calls ({usage})"
            return CompartmentDied(text, signal=9, limit="violations", value=MOST_ANSWERED, usage=usage, stderr=words)
        killed = status if code in (CLD_KILLED, CLD_DUMPED) else None
        if killed == signal.SIGXCPU and self.policy.cpu is None:
            text = self._limit_text("timeout", f"{self.policy.timeout} s")
            return CompartmentTimeout(
                text, signal=killed, limit="timeout", value=self.policy.timeout, usage=usage, stderr=words
            )
        if self.limit == "cpu" or killed == signal.SIGXCPU:
            text = self._limit_text("cpu", f"{self.policy.cpu} s")
            return CompartmentDied(text, signal=killed, limit="cpu", value=self.policy.cpu, usage=usage, stderr=words)
        if killed is not None:
            said = _last_words(words)
            text = f"{self.call.name} was ended by {signal_name(killed)}{said} ({usage})"
            if killed == signal.SIGKILL and self.result_open:
                text += "; nobody in this process sent it, perhaps the system ran out of memory"
            return CompartmentDied(text, signal=killed, usage=usage, stderr=words)
        text = f"{self.call.name} ended its process with exit code {status} and no answer ({usage})"
        return CompartmentDied(text, exit_code=status, usage=usage, stderr=words)

    def _limit_text(self, limit: str, value: str) -> str:
        return f"{self.call.name} reached its limit {limit}={value} ({self.usage}); raise it with Policy({limit}=...)"

    def _text(self, raw: bytearray) -> str:
        return raw.decode(errors="replace")

    def output_text(self) -> tuple[str, str]:
        """What was captured of stdout and stderr."""
        return self._text(self.stdout), self._text(self.stderr)


_live: dict[int, weakref.ref[Compartment]] = {}


def _forked() -> None:
    """In a forked child of the host: its parent's compartments are not its own to end, nor to keep alive."""
    for compartment in [known for reference in _live.values() if (known := reference()) is not None]:
        compartment.finished = True
        compartment.close()


_sys.at_fork(_forked)


def _looping() -> bool:
    """Whether an event loop runs on this thread."""
    events = sys.modules.get("asyncio.events")
    return events is not None and events._get_running_loop() is not None


def _replaced() -> tuple[object, ...]:
    """What a compartment replaces by its own, and must not free: a stream would write what it holds; all would cost time."""
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)
    return *streams, sys.excepthook, sys.argv, sys.orig_argv, os.environ._data  # type: ignore[attr-defined]


def _attach(kind: str, meta: object, descriptors: list[int], made: list[Any]) -> object:
    """A file or directory that came out: it is what the kernel says, whatever the compartment said."""
    if not descriptors:
        raise ProtocolError("the compartment named a descriptor that it did not send")
    made.append(arrived(descriptors.pop(0), kind, meta))
    return made[-1]


def arrived(descriptor: int, kind: str, meta: object) -> object:
    """A descriptor from a compartment as an object, by what it really is. Closes it and raises ProtocolError otherwise."""
    import fcntl

    try:
        mode = os.fstat(descriptor).st_mode
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if kind == "directory" and stat.S_ISDIR(mode):
            return Directory.take(descriptor, "r", "(from a compartment)")
        regular = stat.S_ISREG(mode) and not access & os.O_PATH and not arena.is_piece(descriptor)
        if kind in ("file", "text") and regular:
            appends = bool(access & os.O_APPEND)
            name = {
                os.O_RDONLY: "rb",
                os.O_WRONLY: "ab" if appends else "wb",
                os.O_RDWR: "a+b" if appends else "r+b",
            }[access & os.O_ACCMODE]
            binary = open_buffered(io.FileIO(descriptor, name))
            return binary if kind == "file" else io.TextIOWrapper(binary, *_text_options(meta))
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    os.close(descriptor)
    raise ProtocolError(f"the compartment sent a descriptor that is no {kind}")


def _text_options(meta: object) -> tuple[str, str]:
    """The encoding and error handler that a compartment named, when they are ones that Python has; else UTF-8, strict."""
    match meta:
        case (str(encoding), str(errors)) if errors in ERROR_HANDLERS:
            if encoding.lower().replace("-", "_") in ENCODINGS:
                return encoding, errors
    return "utf-8", "strict"


ERROR_HANDLERS = (
    "strict",
    "ignore",
    "replace",
    "surrogateescape",
    "surrogatepass",
    "backslashreplace",
    "xmlcharrefreplace",
)
ENCODINGS = frozenset(encodings.aliases.aliases) | frozenset(encodings.aliases.aliases.values())


def open_buffered(raw: io.FileIO) -> Any:
    if raw.readable() and raw.writable():
        return io.BufferedRandom(raw)
    return io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)


def _last_words(stderr: str) -> str:
    for line in stderr.splitlines():
        if line.startswith("Fatal Python error"):
            return f" ({printable(line[:500])})"
    return ""
