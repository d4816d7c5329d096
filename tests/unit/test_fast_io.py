"""Frames, captured output, descriptors and shared memory: whole, bounded, and closed when refused."""

import array
import fcntl
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compart._fast import HEADER, FrameReader, Malformed, copy_into, read_into, recv_fds, send_fds, write_frame, zero

MiB = 1 << 20


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A read end that does not wait, and a write end that does."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            continue  # the test closed it


@pytest.fixture
def pair() -> Iterator[tuple[int, int]]:
    one, other = socket.socketpair()
    with one, other:
        yield one.fileno(), other.fileno()


@pytest.fixture
def alarm() -> Iterator[Callable[[Callable[[], None]], None]]:
    """`alarm(action)` has a signal handler run `action` again and again while something waits."""

    def arrange(action: Callable[[], None]) -> None:
        signal.signal(signal.SIGALRM, lambda number, frame: action())
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)

    before = signal.getsignal(signal.SIGALRM)
    yield arrange
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Interrupted(Exception): ...


def interrupt() -> None:
    raise Interrupted


def header(length: int, kind: int = 1, magic: bytes = b"cpt1") -> bytes:
    return struct.pack("=4sIQ", magic, kind, length)


def take_all(reader: FrameReader, fd: int) -> list[tuple[int, bytes]]:
    frames = []
    while reader.fill(fd):
        frame = reader.take()
        assert frame is not None
        frames.append(frame)
    return frames


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------------------------------------- frames


def test_a_frame_arrives_as_it_was_written(pipe: tuple[int, int]) -> None:
    reader = FrameReader(MiB)
    assert not reader.fill(pipe[0])
    write_frame(pipe[1], 7, b"two", memoryview(b" parts"), array.array("b", b"!"))
    write_frame(pipe[1], 0xFFFFFFFF)
    assert reader.fill(pipe[0])
    assert reader.take() == (7, b"two parts!")
    assert reader.take() == (0xFFFFFFFF, b"")
    assert reader.take() is None
    assert not reader.partial


def test_the_header_is_what_the_protocol_says(pipe: tuple[int, int]) -> None:
    write_frame(pipe[1], 2, b"abc")
    assert os.read(pipe[0], 100) == header(3, 2) + b"abc"
    assert len(header(0)) == HEADER


def test_frames_arrive_whole_however_the_bytes_come(pipe: tuple[int, int]) -> None:
    pick = random.Random(3)
    sent = [(i, pick.randbytes(pick.choice([0, 1, 20, 3000]))) for i in range(40)]
    stream = b"".join(header(len(body), kind) + body for kind, body in sent)
    reader = FrameReader(4000)
    seen = []
    while stream:
        cut = pick.choice([1, 5, 16, 500, 9000])
        os.write(pipe[1], stream[:cut])
        stream = stream[cut:]
        seen += take_all(reader, pipe[0])
    assert seen == sent


def test_a_frame_larger_than_the_pipe_gets_through(pipe: tuple[int, int]) -> None:
    body = random.Random(4).randbytes(5 * MiB)
    os.set_blocking(pipe[1], False)  # then write_frame waits with poll
    writer = threading.Thread(target=write_frame, args=(pipe[1], 3, body[:1000], b"", body[1000:]))
    writer.start()
    reader = FrameReader(8 * MiB)
    while not reader.fill(pipe[0]):
        pass
    writer.join()
    assert reader.take() == (3, body)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (header(1, magic=b"cpt2"), "no frame begins here"),
        (b"\0" * 16, "no frame begins here"),
        (header(1001), "a frame of 1001 bytes, and 1000 are the limit"),
        (header(2**64 - 1), "are the limit"),
        (header(2) + b"ab" + b"junk" * 4, "no frame begins here"),
    ],
)
def test_what_is_no_frame_is_refused(pipe: tuple[int, int], sent: bytes, message: str) -> None:
    os.write(pipe[1], sent)
    with pytest.raises(Malformed, match=message):
        take_all(FrameReader(1000), pipe[0])


def test_a_promised_length_takes_no_memory(pipe: tuple[int, int]) -> None:
    # No machine has a pebibyte to give: taking it by the header would be a MemoryError.
    reader = FrameReader(1 << 51)
    os.write(pipe[1], header(1 << 50) + b"x" * 100)
    assert not reader.fill(pipe[0])
    assert reader.partial


def test_the_end_of_the_file_says_whether_a_frame_was_cut(pipe: tuple[int, int]) -> None:
    reader = FrameReader(100)
    os.write(pipe[1], header(3) + b"abc" + header(3)[:10])
    assert reader.fill(pipe[0])
    os.close(pipe[1])
    assert reader.fill(pipe[0])  # the whole frame is still there
    assert reader.take() == (1, b"abc")
    assert reader.partial
    with pytest.raises(EOFError):
        reader.fill(pipe[0])
    assert reader.partial

    empty, writing = os.pipe()
    os.close(writing)
    clean = FrameReader(100)
    with pytest.raises(EOFError):
        clean.fill(empty)
    assert not clean.partial
    os.close(empty)


def test_one_fill_reads_a_bounded_amount(tmp_path: Path) -> None:
    # A file is always readable, like a pipe whose writer never pauses.
    path = tmp_path / "frame"
    path.write_bytes(header(20 * MiB) + bytes(20 * MiB))
    reader = FrameReader(32 * MiB)
    with path.open("rb", buffering=0) as file:
        calls = 1
        while not reader.fill(file.fileno()):
            calls += 1
    assert 5 <= calls <= 7
    assert reader.take() == (1, bytes(20 * MiB))


def test_a_signal_handler_runs_while_a_frame_waits(pipe: tuple[int, int], alarm: Callable[..., None]) -> None:
    body = bytes(MiB // 2)
    received = bytearray()

    def drain() -> None:
        while read_into(pipe[0], received, 8 * MiB) > 0:
            continue

    alarm(drain)  # the only reader is the handler
    write_frame(pipe[1], 1, body)
    drain()
    assert bytes(received) == header(len(body)) + body


def test_what_a_signal_handler_raises_ends_the_wait(pipe: tuple[int, int], alarm: Callable[..., None]) -> None:
    alarm(interrupt)
    with pytest.raises(Interrupted):
        write_frame(pipe[1], 1, bytes(MiB))


def test_a_reader_is_not_shared(pipe: tuple[int, int], alarm: Callable[..., None]) -> None:
    reader = FrameReader(100)
    os.set_blocking(pipe[0], True)
    alarm(lambda: reader.take() and None)
    with pytest.raises(RuntimeError, match="reading already"):
        reader.fill(pipe[0])


def test_a_closed_reader_is_a_broken_pipe(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    with pytest.raises(BrokenPipeError):
        write_frame(pipe[1], 1, b"x")


SIGPIPE = """
import os, signal, sys
from compart._fast import write_frame
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
reading, writing = os.pipe()
os.close(reading)
if sys.argv[1] == "frame":
    for _ in range(2):
        try:
            write_frame(writing, 1, b"x")
        except BrokenPipeError:
            pass
    assert not signal.sigpending() and signal.SIGPIPE not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    print("alive")
else:
    os.write(writing, b"x")
"""


@pytest.mark.parametrize(("how", "code"), [("plain", -signal.SIGPIPE), ("frame", 0)])
def test_a_closed_pipe_does_not_kill_a_host_with_the_default_sigpipe(how: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", SIGPIPE, how], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, b"")
    assert (done.stdout == b"alive\n") == (how == "frame")


def test_what_is_no_bytes_is_not_written(pipe: tuple[int, int]) -> None:
    with pytest.raises(TypeError):
        write_frame(pipe[1], 1, b"fine", "text")  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        write_frame(pipe[1], 1 << 32)
    with pytest.raises(ValueError, match="64 parts"):
        write_frame(pipe[1], 1, *[b"x"] * 65)
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)


# ------------------------------------------------------------------------------------------------- captured output


def test_output_is_kept_up_to_the_cap_and_read_beyond(pipe: tuple[int, int]) -> None:
    kept = bytearray(b">")
    assert read_into(pipe[0], kept, 10) == 0
    os.write(pipe[1], b"0123456789abcdef")
    assert read_into(pipe[0], kept, 10) == 16
    os.write(pipe[1], b"more")
    assert read_into(pipe[0], kept, 10) == 4
    assert kept == b">012345678"
    os.write(pipe[1], b"last")
    os.close(pipe[1])
    assert read_into(pipe[0], kept, 12) == 4
    assert kept == b">012345678la"
    assert read_into(pipe[0], kept, 12) == -1


def test_one_drain_reads_a_bounded_amount(tmp_path: Path) -> None:
    path = tmp_path / "output"
    path.write_bytes(b"x" * (3 * MiB))
    kept = bytearray()
    with path.open("rb", buffering=0) as file:
        assert read_into(file.fileno(), kept, 100) == MiB
    assert kept == b"x" * 100


def test_output_goes_into_a_bytearray_only(pipe: tuple[int, int]) -> None:
    with pytest.raises(TypeError):
        read_into(pipe[0], b"bytes", 10)  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Bad file descriptor"):
        read_into(-1, bytearray(), 10)


# ------------------------------------------------------------------------------------------------- descriptors


def test_descriptors_arrive_close_on_exec_and_name_the_same_file(pair: tuple[int, int], tmp_path: Path) -> None:
    files = [(tmp_path / name).open("w+b") for name in "abc"]
    send_fds(pair[0], b"three", [file.fileno() for file in files])
    data, received = recv_fds(pair[1], 100, 3)
    assert data == b"three"
    for file, fd in zip(files, received, strict=True):
        assert os.path.sameopenfile(file.fileno(), fd)
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(fd)
        file.close()


@pytest.mark.parametrize("count", [0, 1, 2, 253])
def test_as_many_descriptors_as_the_system_passes(pair: tuple[int, int], count: int) -> None:
    send_fds(pair[0], b"x", [0] * count)
    data, received = recv_fds(pair[1], 1, count)
    assert (data, len(received)) == (b"x", count)
    for fd in received:
        os.close(fd)


@pytest.mark.parametrize(("sent", "wanted"), [(1, 0), (2, 1), (3, 1), (4, 3), (9, 2)])
def test_surplus_descriptors_are_refused_and_closed(pair: tuple[int, int], sent: int, wanted: int) -> None:
    before = open_descriptors()
    send_fds(pair[0], b"x", [0] * sent)
    with pytest.raises(Malformed, match=f"more than 10 bytes and {wanted} descriptors"):
        recv_fds(pair[1], 10, wanted)
    assert open_descriptors() == before


def test_a_datagram_that_is_cut_off_is_refused_and_closed() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        before = open_descriptors()
        send_fds(one.fileno(), b"0123456789", [0, 1])
        with pytest.raises(Malformed):
            recv_fds(other.fileno(), 9, 2)
        assert open_descriptors() == before


def test_other_ancillary_data_is_refused(pair: tuple[int, int]) -> None:
    with socket.socket(fileno=os.dup(pair[1])) as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        before = open_descriptors()
        send_fds(pair[0], b"x", [0])
        with pytest.raises(Malformed):
            recv_fds(pair[1], 10, 20)
        assert open_descriptors() == before


def test_receiving_waits_or_says_that_nothing_is_there(pair: tuple[int, int], alarm: Callable[..., None]) -> None:
    with pytest.raises(BlockingIOError):
        recv_fds(pair[1], 10, 1, wait=False)
    alarm(interrupt)
    with pytest.raises(Interrupted):
        recv_fds(pair[1], 10, 1)
    os.set_blocking(pair[1], False)
    with pytest.raises(Interrupted):
        recv_fds(pair[1], 10, 1)


def test_a_waiting_receiver_gets_what_is_sent_later(pair: tuple[int, int], alarm: Callable[..., None]) -> None:
    alarm(lambda: send_fds(pair[0], b"late", []))
    assert recv_fds(pair[1], 10, 1) == (b"late", [])


def test_a_closed_peer_is_an_empty_message() -> None:
    one, other = socket.socketpair()
    one.close()
    with other:
        assert recv_fds(other.fileno(), 10, 1) == (b"", [])
        with pytest.raises(BrokenPipeError):
            send_fds(other.fileno(), b"x", [])


@pytest.mark.parametrize(
    ("data", "fds", "error"),
    [(b"", [], ValueError), (bytes(4097), [], ValueError), (b"x", [0] * 254, ValueError), (b"x", [-1], OSError)],
)
def test_what_cannot_be_passed_is_refused(pair: tuple[int, int], data: bytes, fds: list[int], error: type) -> None:
    with pytest.raises(error):
        send_fds(pair[0], data, fds)
    with pytest.raises(BlockingIOError):
        recv_fds(pair[1], 10, 1, wait=False)


@pytest.mark.parametrize(("max_data", "max_fds"), [(0, 1), (4097, 1), (10, -1), (10, 254)])
def test_receiving_has_bounds(pair: tuple[int, int], max_data: int, max_fds: int) -> None:
    with pytest.raises(ValueError, match="not within"):
        recv_fds(pair[1], max_data, max_fds)


# ------------------------------------------------------------------------------------------------- shared memory


def test_bytes_are_copied_within_bounds() -> None:
    memory = bytearray(10)
    copy_into(memory, 3, b"abc")
    copy_into(memory, 8, array.array("H", [0x2121]))
    copy_into(memory, 10, b"")
    assert memory == b"\0\0\0abc\0\0!!"
    for offset, source in [(8, b"abc"), (11, b""), (-1, b"a"), (sys.maxsize, b"a"), (0, bytes(11))]:
        with pytest.raises(ValueError, match="do not fit"):
            copy_into(memory, offset, source)
    with pytest.raises(BufferError):
        copy_into(b"constant", 0, b"a")
    assert memory == b"\0\0\0abc\0\0!!"


def test_memory_is_zeroed_within_bounds() -> None:
    memory = bytearray(b"x" * 8)
    zero(memoryview(memory)[2:], 3)
    assert memory == b"xx\0\0\0xxx"
    for length in (9, -1):
        with pytest.raises(ValueError, match="to zero"):
            zero(memory, length)
    with pytest.raises(BufferError):
        zero(b"constant", 1)
