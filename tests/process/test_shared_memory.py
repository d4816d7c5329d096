"""Memory that the host shares with others stays the host's; memory that is lent for a result shows nothing of another call."""

import contextlib
import ctypes
import gc
import hashlib
import itertools
import mmap
import multiprocessing.shared_memory
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from compart import Buffer, CompartmentDied, _fast, message, sandboxed
from compart.backend.linux.filters import CONTROL, RESULT
from compart.host import arena, compartment

ROOT = Path(__file__).parents[2]
SIZE = 65536
CONTENT = b"the host's own " * (SIZE // 15) + b" " * (SIZE % 15)
MIB = 2**20


@pytest.fixture(autouse=True)
def _nothing_lent_before() -> None:
    gc.collect()
    arena.trim()


# ---- what the host shares with others ------------------------------------------------------------------------------------


class Shared:
    """Shared memory of the host: how its own code writes to it, where it lies, and what everybody else sees of it."""

    def __init__(self, view: Any, seen: Callable[[], bytes]) -> None:
        self.view = memoryview(view).cast("B")
        self.seen = seen
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))
        self.view[:SIZE] = CONTENT


def a_mapped_file(path: Path) -> Iterator[Shared]:
    path.write_bytes(bytes(SIZE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapped:
        shared = Shared(mapped, path.read_bytes)
        yield shared
        release(shared)


def anonymous_memory(path: Path) -> Iterator[Shared]:
    with mmap.mmap(-1, SIZE) as mapped:
        shared = Shared(mapped, lambda: mapped[:])
        yield shared
        release(shared)


def multiprocessing_memory(path: Path) -> Iterator[Shared]:
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=SIZE)
    try:
        shared = Shared(block.buf, Path("/dev/shm", block.name.lstrip("/")).read_bytes)
        yield shared
        release(shared)
    finally:
        block.close()
        block.unlink()


def a_numpy_memmap(path: Path) -> Iterator[Shared]:
    path.write_bytes(bytes(SIZE))
    mapped = numpy.memmap(path, dtype="u1", mode="r+")
    shared = Shared(mapped, path.read_bytes)
    yield shared
    release(shared)


def release(shared: Shared) -> None:
    shared.view.release()
    shared.seen = bytes
    gc.collect()


KINDS = [a_mapped_file, anonymous_memory, multiprocessing_memory, a_numpy_memmap]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shared]:
    yield from request.param(tmp_path / "file")


def overwrites(view: Any) -> None:
    view[:] = b"x" * SIZE


def overwrites_behind_python(address: int) -> None:
    ctypes.memset(address, ord("x"), SIZE)


def opens_it_again_and_overwrites(address: int) -> None:
    """mprotect() what the compartment finds there, then write."""
    libc = ctypes.CDLL(None)
    libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memset(address, ord("x"), SIZE)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_plain_child_can_write_to_what_the_host_shares(shared: Shared) -> None:
    """The attack works without compart."""
    pid = os.fork()
    if pid == 0:
        overwrites_behind_python(shared.address)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert shared.seen() == b"x" * SIZE


def test_a_compartment_cannot_write_to_it_in_python(shared: Shared) -> None:
    with pytest.raises(CompartmentDied) as caught:
        sandboxed(lambda: overwrites(shared.view))()
    assert caught.value.signal == signal.SIGSEGV
    assert shared.seen() == CONTENT


@pytest.mark.parametrize("attack", [overwrites_behind_python, opens_it_again_and_overwrites])
def test_a_compartment_cannot_write_to_it_in_native_code(attack: Any, shared: Shared) -> None:
    # Whether it died or wrote to pages of its own: nobody else sees it.
    with contextlib.suppress(CompartmentDied):
        sandboxed(attack)(shared.address)
    assert shared.seen() == CONTENT


def test_a_compartment_cannot_read_it_either(shared: Shared) -> None:
    def reads(address: int) -> bytes:
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), mmap.PROT_READ | mmap.PROT_WRITE)
        return ctypes.string_at(address, SIZE)

    read = b""
    with contextlib.suppress(CompartmentDied):
        read = sandboxed(reads)(shared.address)
    assert b"host" not in read


def test_the_host_goes_on_using_it(shared: Shared) -> None:
    sandboxed(lambda: 1)()
    shared.view[:5] = b"after"
    assert shared.seen() == b"after" + CONTENT[5:]


def test_private_memory_of_the_host_is_there_as_a_copy() -> None:
    with mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        mapped[:] = CONTENT

        def changes() -> bytes:
            read = mapped[:15]
            mapped[:15] = b"x" * 15
            return read

        assert sandboxed(changes)() == CONTENT[:15]
        assert mapped[:] == CONTENT


def test_a_locked_reader_writer_of_the_host_is_not_disturbed() -> None:
    """A shared counter that other processes of the host use while a compartment tries to spoil it."""
    counter = multiprocessing.get_context("fork").Value("q", 0)

    def spoils() -> None:
        counter.get_obj().value = -1

    with pytest.raises(CompartmentDied):
        sandboxed(spoils)()
    with counter.get_lock():
        counter.value += 1
    assert counter.value == 1


# ---- memory that is lent for a result ---------------------------------------------------------------------------------------


def borrow(size: int) -> mmap.mmap:
    """Inside: ask the host for shared memory as an honest worker does, and keep it mapped."""
    _fast.send_fds(CONTROL, b"A" + size.to_bytes(8, "little"), [])
    answer, (descriptor,) = _fast.recv_fds(CONTROL, 64, 1)
    return mmap.mmap(descriptor, int.from_bytes(answer[1:9], "little"))


def test_lent_memory_shows_nothing_of_an_earlier_call() -> None:
    secret = os.urandom(64)

    def gives(pattern: bytes) -> memoryview:
        return memoryview(pattern * 16384)

    def scans(pattern: bytes) -> tuple[int, int]:
        with borrow(MIB) as lent:
            return lent[:].count(pattern), len(lent) - lent[:].count(0)

    for _ in range(3):
        kept = sandboxed(gives)(secret)
        assert bytes(kept) == secret * 16384
        del kept
        gc.collect()
        assert sandboxed(scans)(secret) == (0, 0)


def test_lent_memory_shows_nothing_of_a_call_that_died_while_it_wrote() -> None:
    def leaves(pattern: bytes) -> None:
        lent = borrow(MIB)
        lent[:64] = lent[-64:] = pattern
        os.kill(os.getpid(), signal.SIGKILL)

    def looks() -> int:
        with borrow(MIB) as lent:
            return len(lent) - lent[:].count(0)

    with pytest.raises(CompartmentDied):
        sandboxed(leaves)(b"p" * 64)
    assert sandboxed(looks)() == 0


def test_memory_that_a_result_still_lies_in_is_lent_to_nobody() -> None:
    first = sandboxed(lambda: memoryview(b"1" * 300_000))()
    second = sandboxed(lambda: memoryview(b"2" * 300_000))()
    third = sandboxed(lambda: memoryview(b"3" * 300_000))()
    assert (bytes(first), bytes(second), bytes(third)) == (b"1" * 300_000, b"2" * 300_000, b"3" * 300_000)


def test_a_part_of_a_result_keeps_the_whole_memory() -> None:
    def gives() -> list[memoryview]:
        return [memoryview(bytes([n]) * 100_000) for n in range(3)]

    _, middle, _ = sandboxed(gives)()
    array = numpy.asarray(middle)[1000:2000]
    del middle, _
    gc.collect()
    for _ in range(3):
        sandboxed(gives)()
    assert set(array.tolist()) == {1}


def test_the_host_cannot_be_made_to_write_to_a_result() -> None:
    result = sandboxed(lambda: memoryview(bytearray(300_000)))()
    assert isinstance(result, Buffer)
    assert memoryview(result).readonly
    array = numpy.asarray(result)
    with pytest.raises(ValueError):
        array[0] = 1
    with pytest.raises((ValueError, TypeError)):
        array.setflags(write=True)


def writes_for_ever(lent: mmap.mmap) -> None:
    for n in itertools.count():
        lent[:SIZE] = bytes([n % 256]) * SIZE


def answers_and_goes_on_writing() -> None:
    """Send an honest looking result by hand, while a thread changes the bytes that it lies in."""
    lent = borrow(MIB)
    threading.Thread(target=writes_for_ever, args=(lent,), daemon=True).start()
    buffers: list[Any] = []
    body = _fast.encode(memoryview(bytes(SIZE)), message.EMPTY, MIB, inline=1, buffers=buffers)
    _fast.write_frame(RESULT, message.VALUE, message.prefix([(0, SIZE)], 0), body)
    time.sleep(60)


def test_bytes_that_were_handed_out_never_change_afterwards() -> None:
    for _ in range(5):
        result = sandboxed(answers_and_goes_on_writing, timeout=20)()
        assert len(memoryview(result)) == SIZE
        first = hashlib.sha256(memoryview(result)).digest()
        for _ in range(20):
            time.sleep(0.001)
            assert hashlib.sha256(memoryview(result)).digest() == first


def keeps_what_it_was_lent() -> Iterator[Any]:
    """A stream of hand-made values: the same lent memory for each, and it stays mapped in between."""
    buffers: list[Any] = []
    body = _fast.encode(memoryview(bytes(SIZE)), message.EMPTY, MIB, inline=1, buffers=buffers)
    lent = borrow(MIB)
    lent[:SIZE] = b"a" * SIZE
    _fast.write_frame(RESULT, message.YIELD, message.prefix([(0, SIZE)], 0), body)
    os.read(0, 1)
    while True:
        # What does it see there, while the host uses the memory for others?
        yield lent[: 8 * SIZE].strip(b"\0a")[:64]
        lent[:SIZE] = b"evil" * (SIZE // 4)


def test_a_stream_that_keeps_its_memory_reaches_no_other_call() -> None:
    secret = b"s" * 300_000
    with sandboxed(keeps_what_it_was_lent, timeout=20)() as stream:
        first = next(stream)
        # It may have written again before the host took its copy; from then on nothing changes.
        kept = bytes(first)
        for _ in range(20):
            other = sandboxed(lambda: memoryview(secret))()
            assert next(stream) in (b"", b"evil" * 16)
            time.sleep(0.002)
            assert bytes(other) == secret
            assert bytes(first) == kept
            del other


def test_values_of_a_stream_never_change_afterwards() -> None:
    def blocks() -> Iterator[memoryview]:
        for n in range(8):
            yield memoryview(bytes([n]) * 200_000)

    for _ in range(3):
        kept = list(sandboxed(blocks, timeout=20)())
        assert [bytes(block) for block in kept] == [bytes([n]) * 200_000 for n in range(8)]


def test_a_stream_that_is_ahead_does_not_overwrite_what_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """More values than are lent memory at once: the generator waits until one is free, and it is free only when it was read."""
    lend = compartment.Compartment._lend

    def lends_and_is_slow(self: Any, size: int) -> None:
        lend(self, size)
        time.sleep(0.02)

    def blocks() -> Iterator[bytes]:
        for n in range(10):
            yield bytes([n]) * 200_000

    monkeypatch.setattr(compartment.Compartment, "_lend", lends_and_is_slow)
    with sandboxed(blocks, timeout=50)() as stream:
        for n, block in enumerate(stream):
            assert block == bytes([n]) * 200_000
            time.sleep(0.02)  # let it run ahead


COLLECTS = """
import faulthandler, gc
from compart import sandboxed
from compart.host import arena

class Collecting(int):  # has the collector run where sizes are compared
    def __le__(self, other):
        gc.collect()
        return int(self) <= other

faulthandler.dump_traceback_later(10, exit=True)
kept = [sandboxed(lambda: memoryview(b"x" * 200_000))()]
kept.append(kept)
free = sandboxed(lambda: memoryview(b"y" * 200_000))()
gc.disable()
del kept, free
arena.lease(Collecting(200_000))
assert bytes(sandboxed(lambda: memoryview(b"z" * 200_000))()) == b"z" * 200_000
"""


def test_memory_that_a_collection_gives_back_while_some_is_taken_stops_nobody() -> None:
    """A result in a reference cycle dies whenever the collector runs, also in the middle of a loan."""
    done = subprocess.run([sys.executable, "-c", COLLECTS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_results_of_several_threads_do_not_mix() -> None:
    def gives(n: int) -> memoryview:
        return memoryview(bytes([n]) * 300_000)

    call = sandboxed(gives)
    wrong: list[int] = []

    def calls(n: int) -> None:
        for _ in range(10):
            if bytes(call(n)) != bytes([n]) * 300_000:
                wrong.append(n)

    threads = [threading.Thread(target=calls, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- what lent memory cannot be made to do ------------------------------------------------------------------------------------


def test_lent_memory_cannot_shrink_under_the_host() -> None:
    """Reading a mapping beyond the end of its file is SIGBUS."""

    def shrinks() -> list[str]:
        _fast.send_fds(CONTROL, b"A" + MIB.to_bytes(8, "little"), [])
        _, (descriptor,) = _fast.recv_fds(CONTROL, 64, 1)
        said = []
        for attempt in (lambda: os.ftruncate(descriptor, 0), lambda: os.posix_fallocate(descriptor, 0, 2 * MIB)):
            try:
                attempt()
                said.append("done")
            except OSError as error:
                said.append(type(error).__name__)
        lent = mmap.mmap(descriptor, MIB)
        lent[-1] = 1
        return [*said, str(len(lent))]

    assert sandboxed(shrinks, on_violation="deny")() == ["PermissionError", "PermissionError", str(MIB)]


def test_pages_that_are_given_away_read_as_zeroes() -> None:
    """A hole punched into lent memory (MADV_REMOVE) neither kills the host nor shows it another's bytes."""

    def punches() -> None:
        lent = borrow(MIB)
        lent[:SIZE] = b"x" * SIZE
        address = ctypes.addressof(ctypes.c_char.from_buffer(lent))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), 9)
        buffers: list[Any] = []
        body = _fast.encode(memoryview(bytes(SIZE)), message.EMPTY, MIB, inline=1, buffers=buffers)
        _fast.write_frame(RESULT, message.VALUE, message.prefix([(0, SIZE)], 0), body)
        os._exit(0)

    result = sandboxed(punches, on_violation="deny")()
    assert bytes(result) in (bytes(SIZE), b"x" * SIZE)


def test_a_compartment_does_not_find_the_hosts_mapping_of_results() -> None:
    """What the host handed out earlier is not in the memory of the next child."""
    result = sandboxed(lambda: memoryview(b"kept" * 100_000))()
    address = numpy.asarray(result).ctypes.data
    assert ctypes.string_at(address, 4) == b"kept"
    with pytest.raises(CompartmentDied) as caught:
        sandboxed(ctypes.string_at)(address, 4)
    assert caught.value.signal == signal.SIGSEGV
    assert bytes(result) == b"kept" * 100_000
