"""However a compartment ends, the host is afterwards what it was before: nothing open, mapped, running or left on a disk."""

import asyncio
import contextlib
import ctypes
import errno
import gc
import itertools
import mmap
import os
import resource
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compart import (
    CompartError,
    CompartmentDied,
    CompartmentTimeout,
    Directory,
    EncodeError,
    MemoryLimitError,
    ProtocolError,
    RemoteError,
    UnsupportedError,
    ViolationError,
    _fast,
    grant,
    message,
    rights,
    sandboxed,
)
from compart.backend.linux import _sys, walls
from compart.backend.linux.filters import CONTROL, RESULT
from compart.host import arena, compartment
from compart.policy import WALLS

ROUNDS = 15
BIG = 300_000


# ---- what the host holds ------------------------------------------------------------------------------------------------


@dataclass
class Holdings:
    """What a process holds of the system. `exact` must not change at all, `rough` only a little."""

    exact: dict[str, Any]
    rough: dict[str, int]


def holdings(directory: Path) -> Holdings:
    gc.collect()
    arena.trim()
    with open("/proc/self/maps") as maps:
        mappings = sum(1 for _ in maps)
    with open("/proc/self/status") as status:
        sizes = {line.split()[0]: int(line.split()[1]) for line in status if line.startswith("VmSize:")}
    return Holdings(
        exact={
            "descriptors": descriptors(),
            "children": children(),
            "threads": len(os.listdir("/proc/self/task")),
            "temporary files": sorted(os.listdir(directory)),
        },
        rough={"mappings": mappings, "address space": sizes["VmSize:"] // 1024},
    )


def descriptors() -> Counter[str]:
    """What kinds of descriptors are open, and how many of each: a namespace that was made anew is as good as the old."""
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{number}")
            # Numbered objects (pipe:[12], mnt:[34]) by kind; not the directory that is listed here.
            found[target.split(":[")[0]] += not target.endswith("/fd")
    return +found


def children() -> list[str]:
    """The children of every thread, also those that send no signal and that have ended."""
    found = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found += Path(f"/proc/self/task/{task}/children").read_text().split()
    return found


@contextlib.contextmanager
def nothing_is_left(directory: Path) -> Iterator[None]:
    """What the host holds after the block is what it held before."""
    shared = set(os.listdir("/dev/shm"))
    before = holdings(directory)
    yield
    after = holdings(directory)
    assert after.exact == before.exact
    # Something for each compartment would be hundreds; the allocator takes an arena for a new thread.
    assert after.rough["mappings"] - before.rough["mappings"] < 12
    assert after.rough["address space"] - before.rough["address space"] < 160
    # Other programs come and go in /dev/shm.
    deadline = time.monotonic() + 5
    while (left := set(os.listdir("/dev/shm")) - shared) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place for temporary files, seen from outside and inside."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


# ---- the ways to end -----------------------------------------------------------------------------------------------------

WAYS: dict[str, tuple[Callable[[], None], int]] = {}


def way(times: int = ROUNDS) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Enter a function into the table: it runs one compartment that ends in the way it is named after."""

    def enter(function: Callable[[], None]) -> Callable[[], None]:
        WAYS[function.__name__] = (function, times)
        return function

    return enter


def ends_in(kind: type[BaseException], inside: Callable[..., Any], *args: Any, **fields: Any) -> BaseException:
    with pytest.raises(kind) as caught:
        sandboxed(**{"timeout": 20, **fields})(inside)(*args)
    return caught.value


@way(times=4 * ROUNDS)
def a_value() -> None:
    assert sandboxed(lambda: [1, "two", {3.0: b"four"}])() == [1, "two", {3.0: b"four"}]


@way(times=2 * ROUNDS)
def a_big_value() -> None:
    assert len(sandboxed(lambda: bytes(BIG))()) == BIG


@way(times=2 * ROUNDS)
def a_buffer_that_is_kept_for_a_while() -> None:
    kept = [sandboxed(lambda n=n: memoryview(bytes([n]) * BIG))() for n in range(2)]
    assert [bytes(buffer[:1]) for buffer in map(memoryview, kept)] == [b"\0", b"\1"]


@way(times=2 * ROUNDS)
def a_value_after_much_output() -> None:
    assert len(sandboxed(lambda: print("x" * 200_000)).run().stdout) == 200_001


@way(times=2 * ROUNDS)
def a_builtin_exception() -> None:
    ends_in(ZeroDivisionError, lambda: 1 // 0)


class OfItsOwn(Exception):
    pass


def raises_its_own() -> None:
    raise OfItsOwn("own")


@way(times=2 * ROUNDS)
def an_exception_of_its_own() -> None:
    ends_in(RemoteError, raises_its_own)


def hides_a_refusal() -> str:
    try:
        open("/etc/hostname").close()
    except PermissionError:
        return "hidden"
    return "read"


@way(times=3 * ROUNDS)
def a_violation_that_raises() -> None:
    ends_in(ViolationError, hides_a_refusal)


@way()
def a_violation_that_is_only_recorded() -> None:
    ended = sandboxed(hides_a_refusal, on_violation="deny").run()
    assert (ended.value, len(ended.violations)) == ("hidden", 1)


@way(times=2 * ROUNDS)
def a_violation_that_kills() -> None:
    ends_in(ViolationError, hides_a_refusal, on_violation="kill")


@way()
def the_timeout() -> None:
    ends_in(CompartmentTimeout, time.sleep, 60, timeout=0.04)


def loops() -> None:
    while True:
        pass


@way()
def the_cpu_limit() -> None:
    assert ends_in(CompartmentDied, loops, cpu=0.03).limit == "cpu"


@way(times=2 * ROUNDS)
def the_memory_limit() -> None:
    ends_in(MemoryLimitError, lambda: bytearray(1 << 30), memory="32M")


@way(times=2 * ROUNDS)
def a_segmentation_fault() -> None:
    assert ends_in(CompartmentDied, ctypes.string_at, 8).signal == signal.SIGSEGV


@way(times=2 * ROUNDS)
def an_abort() -> None:
    assert ends_in(CompartmentDied, os.abort).signal == signal.SIGABRT


@way(times=2 * ROUNDS)
def an_exit() -> None:
    assert ends_in(CompartmentDied, os._exit, 3).exit_code == 3


@way(times=3 * ROUNDS)
def garbage_on_the_wire() -> None:
    ends_in(ProtocolError, lambda: os.write(RESULT, b"garbage" * 1000))


def says_a_value_that_cannot_be() -> None:
    _fast.write_frame(RESULT, message.VALUE, message.prefix([], 0), b"\xff" * 100)
    os._exit(0)


@way(times=3 * ROUNDS)
def a_value_that_cannot_be() -> None:
    ends_in(ProtocolError, says_a_value_that_cannot_be)


@way(times=2 * ROUNDS)
def half_an_answer() -> None:
    ends_in(CompartmentDied, lambda: (os.write(RESULT, frame(b"x" * 4000)[:-1000]), os._exit(0)))


def frame(body: bytes) -> bytes:
    reader, writer = os.pipe()
    _fast.write_frame(writer, message.VALUE, body)
    os.close(writer)
    with open(reader, "rb") as file:
        return file.read()


@way(times=2 * ROUNDS)
def a_value_that_cannot_leave() -> None:
    ends_in(EncodeError, lambda: [object()])


@way(times=2 * ROUNDS)
def a_value_that_is_too_large() -> None:
    assert ends_in(CompartmentDied, lambda: "x" * BIG, result_bytes=1000).limit == "result_bytes"


@way()
def a_buffer_that_is_too_large() -> None:
    assert ends_in(CompartmentDied, lambda: bytes(BIG), result_bytes=BIG - 1).limit == "result_bytes"


def sends_surplus_descriptors() -> int:
    _fast.send_fds(CONTROL, b"D", [0, 1, 2])
    return 1


@way(times=3 * ROUNDS)
def surplus_descriptors() -> None:
    ends_in(ProtocolError, sends_surplus_descriptors)


def sends_descriptors_that_nobody_asked_for() -> int:
    _fast.send_fds(CONTROL, b"?", [0, 1])
    time.sleep(60)
    return 1


@way()
def descriptors_that_nobody_asked_for() -> None:
    ends_in(ProtocolError, sends_descriptors_that_nobody_asked_for)


def borrows_and_ends() -> None:
    _fast.send_fds(CONTROL, b"A" + BIG.to_bytes(8, "little"), [])
    _, lent = _fast.recv_fds(CONTROL, 64, 1)
    shared = mmap.mmap(lent[0], BIG)
    shared[:] = b"x" * BIG
    os.kill(os.getpid(), signal.SIGKILL)


@way(times=2 * ROUNDS)
def memory_was_lent() -> None:
    ends_in(CompartmentDied, borrows_and_ends)


@way(times=3 * ROUNDS)
def a_file_in_and_out() -> None:
    with open(__file__, "rb") as file, sandboxed(lambda file: file)(file) as same:
        assert same.read(3) == b'"""'


@way()
def a_file_in_and_a_death() -> None:
    with open(__file__, "rb") as file:
        ends_in(CompartmentDied, lambda file: os._exit(0), file)


@way()
def a_file_that_is_no_file() -> None:
    with open(__file__, "rb") as file:
        ends_in(ProtocolError, sends_a_pipe_as_a_file, file)


def sends_a_pipe_as_a_file(file: Any) -> None:
    reader, _ = os.pipe()
    described = ("file", None, reader)
    body = _fast.encode(
        [file, file], message.EMPTY, 1 << 16, describe=lambda item: described[:2] if item is file else None
    )
    _fast.send_fds(CONTROL, b"D", [file.fileno(), reader])
    _fast.write_frame(RESULT, message.VALUE, message.prefix([], 2), body)
    os._exit(0)


@way()
def a_file_and_then_nonsense() -> None:
    with open(__file__, "rb") as file:
        ends_in(ProtocolError, sends_a_file_and_then_nonsense, file)


def sends_a_file_and_then_nonsense(file: Any) -> None:
    body = _fast.encode(
        [file, None], message.EMPTY, 1 << 16, describe=lambda item: ("file", None) if item is file else None
    )
    _fast.send_fds(CONTROL, b"D", [file.fileno()])
    _fast.write_frame(RESULT, message.VALUE, message.prefix([], 1), body[:-1] + b"\xff")
    os._exit(0)


@way()
def a_directory_in_and_out() -> None:
    with Directory(os.path.dirname(__file__)) as here:
        with sandboxed(lambda here: here)(here) as same:
            assert os.path.basename(__file__) in same.iterdir()


@way()
def a_granted_path_beside_a_directory() -> None:
    def reads(here: Any) -> str:
        with open(__file__) as by_name:
            return by_name.read(3)

    with Directory(os.path.dirname(__file__)) as here:
        assert sandboxed(grants=[grant.file(__file__)])(reads)(here) == '"""'


@way()
def a_granted_descriptor() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        policy = {"grants": [grant.descriptor(theirs, rights.CAP_SEND | rights.CAP_FSTAT)]}
        sandboxed(**policy)(lambda peer: peer.send(b"hello"))(theirs)
        assert ours.recv(5) == b"hello"


def numbers() -> Iterator[int]:
    yield from itertools.count()


def two_numbers() -> Iterator[int]:
    yield from (1, 2)


@way(times=2 * ROUNDS)
def a_stream_to_its_end() -> None:
    assert list(sandboxed(two_numbers)()) == [1, 2]


@way(times=2 * ROUNDS)
def a_stream_that_is_abandoned() -> None:
    assert list(itertools.islice(sandboxed(numbers)(), 3)) == [0, 1, 2]


@way()
def a_stream_of_big_values_that_is_abandoned() -> None:
    def blocks() -> Iterator[bytes]:
        while True:
            yield bytes(BIG)

    assert len(next(sandboxed(blocks)())) == BIG


@way()
def a_stream_that_raises() -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    stream = sandboxed(fails)()
    assert next(stream) == 1
    with pytest.raises(ZeroDivisionError):
        next(stream)


@way()
def a_stream_that_times_out() -> None:
    def stalls() -> Iterator[int]:
        yield 1
        time.sleep(60)

    stream = sandboxed(stalls, timeout=0.05)()
    with pytest.raises(CompartmentTimeout):
        list(stream)


@way()
def a_stream_of_another_thread_that_is_abandoned() -> None:
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(next(sandboxed(numbers)())))
    thread.start()
    thread.join()
    assert got == [0]


@way()
def an_awaited_value() -> None:
    assert asyncio.run(sandboxed(lambda: 5).aio()) == 5


@way()
def a_cancelled_call() -> None:
    async def cancel() -> None:
        task = asyncio.create_task(sandboxed(loops, timeout=20).aio())
        await asyncio.sleep(0)
        while not children():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not children()

    asyncio.run(cancel())


@way()
def an_async_stream_that_is_abandoned() -> None:
    async def counts() -> Any:
        for number in itertools.count():
            yield number

    async def first() -> int:
        async for number in sandboxed(counts, timeout=20)():
            return number
        return -1

    assert asyncio.run(first()) == 0


@way()
def a_wall_that_will_not_stand() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sys, "run", lambda *script: (0, errno.ENOSYS))
        error = ends_in(UnsupportedError, lambda: 1)
    assert (error.mechanism in WALLS, os.strerror(errno.ENOSYS) in error.reason) == (True, True)


@way()
def a_last_wall_that_will_not_stand() -> None:
    # The child carries out two lists of steps; the second one ends with the filter.
    answers = [_sys.run, lambda *script: (1, errno.EINVAL)]

    with open(__file__, "rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sys, "run", lambda *script: answers.pop(0)(*script))
        error = ends_in(UnsupportedError, lambda file: 1, file)
    assert (error.mechanism, os.strerror(errno.EINVAL) in error.reason) == ("seccomp", True)


@way()
def a_fork_that_fails() -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EAGAIN, "injected")

    with open(__file__, "rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sys, "fork", fails)
        ends_in(BlockingIOError, lambda file: 1, file)


@way()
def a_plan_that_fails() -> None:
    def fails(policy: Any) -> None:
        raise OSError(errno.ENOMEM, "injected")

    with open(__file__, "rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(walls, "_require_seccomp", fails)
        ends_in(OSError, lambda file: 1, file)


@way()
def an_interrupt() -> None:
    """Ctrl-C while the host waits."""
    real = compartment.Compartment.pump

    def interrupted(self: Any, timeout: float | None) -> None:
        real(self, 0.01)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compartment.Compartment, "pump", interrupted)
        ends_in(KeyboardInterrupt, loops)


@way()
def it_stopped_itself() -> None:
    ends_in(CompartmentTimeout, lambda: os.kill(os.getpid(), signal.SIGSTOP), timeout=0.05)


# ---- the tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_nothing_is_left_when_a_compartment_ends_by(name: str, scratch: Path) -> None:
    end, _ = WAYS[name]
    end()
    with nothing_is_left(scratch):
        for _ in range(3):
            end()


def test_nothing_is_left_of_a_thousand_compartments(scratch: Path) -> None:
    for end, _ in WAYS.values():
        end()
        end()
    with nothing_is_left(scratch):
        ended = 0
        # Mixed, so that what one leaves behind would meet what another one does.
        for turn in range(max(times for _, times in WAYS.values())):
            for end, times in WAYS.values():
                if turn < times:
                    end()
                    ended += 1
    assert ended >= 1000


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """Lets the host have so many descriptors more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more: int) -> None:
        held = descriptors().total()
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + more, hard))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_host_that_runs_out_of_descriptors_gets_an_error_and_keeps_none(
    scratch: Path, few_descriptors: Callable[[int], None]
) -> None:
    def inside(file: Any, directory: Any) -> tuple[str, str, bytes]:
        with directory.open(os.path.basename(__file__)) as same:
            return file.read(3), same.read(3), bytes(BIG)

    def call() -> bool:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            with open(__file__) as file, Directory(os.path.dirname(__file__)) as directory:
                return sandboxed(inside, timeout=20)(file, directory) == ('"""', '"""', bytes(BIG))
        except (OSError, CompartError):
            return False
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    sandboxed(lambda: 1)()
    assert call()
    # Holes among the numbers would let more descriptors in than are counted.
    highest = max(map(int, os.listdir("/proc/self/fd")))
    packed = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest - descriptors().total() + 1)]
    worked = []
    try:
        with nothing_is_left(scratch):
            for more in range(40):
                few_descriptors(more)
                worked.append(call())
    finally:
        for number in packed:
            os.close(number)
    assert worked[0] is False
    assert worked[-1] is True
