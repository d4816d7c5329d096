"""Values that attack whoever receives them: by their size, their depth, their hashes, or by changing afterwards.

Outside, a naive receiver is hurt by each: pickle runs what came, nested JSON exhausts the stack, colliding keys take for
ever. Each test shows that first where it can be shown cheaply, and then that the same value comes out of a compartment
harmless or not at all.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compart import (
    Buffer,
    CompartError,
    CompartmentDied,
    Directory,
    EncodeError,
    Policy,
    ProtocolError,
    RemoteError,
    Secret,
    ViolationError,
    _fast,
    enforcement,
    message,
    sandboxed,
)
from compart.backend.linux.filters import CONTROL, RESULT
from compart.host import arena
from tests.escape import native

EMPTY = _fast.Registry(())
BIG = 1 << 20


def confine(function: Callable[..., Any], **fields: Any) -> Any:
    return sandboxed(**{"start": "fork", "timeout": 20, "on_violation": "deny", **fields})(function)


def speak(kind: int, *parts: bytes) -> None:
    """Inside: write a frame by hand, and end."""
    _fast.write_frame(RESULT, kind, *parts)
    os._exit(0)


def send(body: bytes) -> Callable[[], None]:
    return lambda: speak(message.VALUE, message.prefix([], 0), body)


def encoded(value: Any) -> bytes:
    return _fast.encode(value, EMPTY, 1 << 26)


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """A receiver that is made to work for ever is ended, and the test with it."""

    def ring(number: int, frame: Any) -> None:
        raise AssertionError("the host was kept busy")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 30)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# -- code --------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_an_object_with_reduce_is_not_sent(tmp_path: Path) -> None:
    naive = tmp_path / "naive"
    pickle.loads(pickle.dumps(Bomb(naive)))
    assert naive.exists()

    bomb = Bomb(tmp_path / "bomb")
    with pytest.raises(EncodeError):
        confine(lambda: bomb)()
    assert not bomb.path.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_written_by_hand_is_not_loaded(protocol: int, tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "bomb")
    spoken = pickle.dumps(bomb, protocol)
    with pytest.raises(ProtocolError):
        confine(send(spoken))()
    with pytest.raises(ProtocolError):
        confine(lambda: speak(message.RAISED, spoken))()
    assert not bomb.path.exists()


class Loud(str):
    """A string whose methods run code."""

    def __hash__(self) -> int:
        os.write(2, b"hashed")
        return 1


@pytest.mark.parametrize(
    "value",
    [Loud("x"), {Loud("x"): 1}, [Loud("x")], type, len, os, sys.stdout.write, lambda: 1, iter([1]), Exception("x")],
    ids=repr,
)
def test_what_is_no_plain_value_is_not_sent(value: Any) -> None:
    with pytest.raises(EncodeError):
        confine(lambda: value)()


# -- depth and size ----------------------------------------------------------------------------------------------------


def test_depth_does_not_exhaust_the_stack() -> None:
    with pytest.raises(RecursionError):
        json.loads("[" * 100_000 + "]" * 100_000)

    one = encoded([0])[:-2]
    for depth in (257, 1000, 100_000, 5_000_000):
        with pytest.raises(ProtocolError):
            confine(send(one * depth + encoded(0)))()


def test_honest_depth_is_refused_inside() -> None:
    def nested() -> list[Any]:
        value: list[Any] = []
        for _ in range(100_000):
            value = [value]
        return value

    with pytest.raises(EncodeError):
        confine(nested)()


def test_a_value_that_holds_itself_is_refused_inside() -> None:
    def circle() -> list[Any]:
        value: list[Any] = []
        value.append(value)
        return value

    with pytest.raises(EncodeError):
        confine(circle)()


@pytest.mark.parametrize("tag", [7, 10, 11, 13, 15, 17, 18, 19, 20, 21, 28, 33])
@pytest.mark.parametrize("count", [2**16, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1])
def test_a_count_allocates_nothing_by_itself(tag: int, count: int) -> None:
    before = resident()
    with pytest.raises(ProtocolError):
        confine(send(bytes([tag, 255]) + struct.pack("<Q", count)))()
    assert resident() - before < 64 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_small_bytes_do_not_become_a_great_deal_of_memory() -> None:
    # An empty list is two bytes on the wire and 56 in memory; ten million of them would fit the frame.
    count = 10_000_000
    body = b"\x11\xfe" + struct.pack("<I", count) + b"\x11\x00" * count
    with pytest.raises(CompartError):
        confine(send(body), result_bytes="1M")()
    with pytest.raises(ProtocolError):
        confine(send(body), result_bytes="21M")()


def test_references_do_not_multiply() -> None:
    # One long name, referred to a million times: the text must be there once.
    name = b"\x0b\xfd" + struct.pack("<H", 60_000) + b"x" * 60_000
    count = 200_000
    body = b"\x11\xfe" + struct.pack("<I", count) + name + b"\x0c\x00" * (count - 1)
    before = resident()
    with contextlib.suppress(ProtocolError):
        got = confine(send(body))()
        assert len(got) == count
        assert resident() - before < 256 << 20


# -- hashes ------------------------------------------------------------------------------------------------------------

PRIME = sys.hash_info.modulus


def _colliding(count: int) -> list[int]:
    """Integers with one hash."""
    return [n * PRIME for n in range(1, count + 1)]


def test_colliding_integers_do_not_keep_the_host_busy() -> None:
    few = _colliding(2000)
    started = time.process_time()
    assert len(set(few)) == 2000
    alone = time.process_time() - started
    started = time.process_time()
    assert len(set(range(2000))) == 2000
    assert alone > 10 * (time.process_time() - started), "these keys do not collide, so they prove nothing"

    keys = b"".join(encoded(key) for key in _colliding(100_000))
    for tag in (0x14, 0x15):
        with pytest.raises(ProtocolError):
            confine(send(bytes([tag, 254]) + struct.pack("<I", 100_000) + keys))()
    pairs = b"".join(encoded(key) + b"\0" for key in _colliding(100_000))
    with pytest.raises(ProtocolError):
        confine(send(b"\x13\xfe" + struct.pack("<I", 100_000) + pairs))()


def test_colliding_floats_and_tuples_do_not_keep_the_host_busy() -> None:
    floats = b"".join(b"\x12\x01" + encoded(n * PRIME) for n in range(1, 50_000))
    with pytest.raises(ProtocolError):
        confine(send(b"\x14\xfe" + struct.pack("<I", 49_999) + floats))()


def test_colliding_strings_do_not_keep_the_host_busy() -> None:
    # A forked compartment knows the seed of the host's hashes, and can look for strings that share their low bits.
    def flood() -> None:
        chosen = []
        n = 0
        while len(chosen) < 3000:
            n += 1
            text = str(n)
            if not hash(text) & 0x7F:
                chosen.append(text)
        body = b"".join(encoded(text) for text in chosen)
        speak(message.VALUE, message.prefix([], 0), b"\x14\xfd" + struct.pack("<H", len(chosen)) + body)

    with contextlib.suppress(ProtocolError):
        assert len(confine(flood)()) == 3000


# -- numbers and text --------------------------------------------------------------------------------------------------


def test_a_great_integer_is_only_a_number() -> None:
    value = 1 << 8_000_000
    assert confine(lambda: value)() == value


@pytest.mark.parametrize("digits", [100_000, 10_000_000])
def test_a_decimal_of_many_digits_does_not_keep_the_host_busy(digits: int) -> None:
    text = b"9" * digits
    with contextlib.suppress(ProtocolError):
        confine(send(b"\x1c\xfe" + struct.pack("<I", digits) + text))()


@pytest.mark.parametrize("text", [b"1e999999999999999999", b"sNaN", b"Infinity", b"-0", b"1_000", b" 1", b"\xd9\xa1"])
def test_a_decimal_is_parsed_strictly_or_refused(text: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        hash(str(confine(send(b"\x1c" + bytes([len(text)]) + text))()))


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "..", "", "\0", "UTC\0x", "a" * 100_000])
def test_a_time_zone_is_no_path(name: str) -> None:
    raw = name.encode()
    with pytest.raises(ProtocolError):
        confine(send(b"\x1b\xfe" + struct.pack("<I", len(raw)) + raw))()


# -- memory that is shared ---------------------------------------------------------------------------------------------


def keep_writing(shared: mmap.mmap) -> None:
    """Inside: change the whole of it again and again, on a thread."""

    def write() -> None:
        n = 0
        while True:
            n += 1
            shared[:] = bytes([n & 0xFF]) * len(shared)

    threading.Thread(target=write, daemon=True).start()


def keeping_the_loan() -> Iterator[mmap.mmap]:
    """Inside: from now on the worker's shared memory stays mapped, and each piece is handed to the caller."""
    from compart.guest import worker

    kept: list[mmap.mmap] = []

    class Kept(mmap.mmap):
        def __exit__(self, *error: object) -> None:
            kept.append(self)

    worker.mmap = type(sys)("mmap")  # type: ignore[attr-defined]
    worker.mmap.mmap = Kept  # type: ignore[attr-defined]
    return iter(lambda: kept[-1] if kept else None, object())  # type: ignore[arg-type]


def test_bytes_do_not_change_after_they_were_returned() -> None:
    def changing() -> bytes:
        loan = keeping_the_loan()

        def write() -> None:
            while (shared := next(loan)) is None:
                time.sleep(0)
            keep_writing(shared)

        threading.Thread(target=write, daemon=True).start()
        return bytes(BIG)

    value = confine(changing)()
    first = bytes(value)
    assert len(first) == BIG
    time.sleep(0.05)  # what would write still had the time to
    assert bytes(value) == first


def test_a_buffer_does_not_change_after_it_was_returned() -> None:
    def changing() -> memoryview:
        loan = keeping_the_loan()

        def write() -> None:
            while (shared := next(loan)) is None:
                time.sleep(0)
            keep_writing(shared)

        threading.Thread(target=write, daemon=True).start()
        return memoryview(bytes(BIG))

    value = confine(changing)()
    assert isinstance(value, Buffer)
    first = bytes(value)
    time.sleep(0.05)
    assert bytes(value) == first
    with pytest.raises(TypeError):
        memoryview(value)[0] = 1


def test_a_streamed_buffer_does_not_change_while_the_stream_lives() -> None:
    def stream() -> Iterator[bytes]:
        loan = keeping_the_loan()
        yield bytes(BIG)
        keep_writing(next(loan))
        yield bytes(8)
        time.sleep(5)

    values = confine(stream)()
    first = next(values)
    kept = bytes(first)
    assert next(values) == bytes(8)
    time.sleep(0.05)
    assert bytes(first) == kept
    values.close()


def test_a_loan_of_one_compartment_is_not_lent_to_another_while_it_lives() -> None:
    # The first one streams, keeps its mapping, and writes to it for as long as it lives. The second one is honest.
    def hostile() -> Iterator[bytes]:
        loan = keeping_the_loan()
        yield bytes(BIG)
        keep_writing(next(loan))
        yield bytes(8)
        time.sleep(20)

    values = confine(hostile)()
    next(values)
    assert next(values) == bytes(8)
    gc.collect()
    honest = confine(lambda: memoryview(b"honest" * (BIG // 6)))
    got = [honest() for _ in range(3)]
    copies = [bytes(buffer) for buffer in got]
    time.sleep(0.05)
    assert copies == [b"honest" * (BIG // 6)] * 3
    assert [bytes(buffer) for buffer in got] == copies
    values.close()


def test_a_loan_holds_nothing_of_another_call() -> None:
    secret = os.urandom(32)
    confine(lambda: bytes(100_000) + secret + bytes(BIG))()
    gc.collect()

    def look() -> bool:
        _fast.send_fds(CONTROL, b"A" + (BIG + 200_000).to_bytes(8, "little"), [])
        answer, lent = _fast.recv_fds(CONTROL, 64, 1)
        with mmap.mmap(lent[0], int.from_bytes(answer[1:9], "little")) as shared:
            return any(shared[:])

    assert confine(look)() is False


def test_a_loan_cannot_shrink_or_grow() -> None:
    def shrink() -> list[int | None]:
        _fast.send_fds(CONTROL, b"A" + BIG.to_bytes(8, "little"), [])
        _, lent = _fast.recv_fds(CONTROL, 64, 1)
        said: list[int | None] = []
        for size in (0, 1 << 30):
            try:
                os.ftruncate(lent[0], size)
                said.append(None)
            except OSError as error:
                said.append(error.errno)
        return said

    assert None not in confine(shrink)()


def test_a_loan_is_not_taken_for_a_file() -> None:
    # As a file it would outlive the call that it was lent for, and see what other calls leave in it.
    def returns_its_loan() -> None:
        _fast.send_fds(CONTROL, b"A" + BIG.to_bytes(8, "little"), [])
        _, lent = _fast.recv_fds(CONTROL, 64, 1)
        _fast.send_fds(CONTROL, b"D", lent)
        # T_CAPABILITY "file" None, as the encoder writes it.
        body = _fast.encode(open(lent[0], "rb"), EMPTY, 1 << 16, describe=lambda item: ("file", None))  # noqa: SIM115
        speak(message.VALUE, message.prefix([], 1), body)

    with pytest.raises(ProtocolError):
        confine(returns_its_loan)()
    arena.trim()


# -- files that come back ----------------------------------------------------------------------------------------------


def _send_as(kind: str, descriptor: Callable[[Any], int]) -> Callable[[Any], None]:
    def inside(granted: Any) -> None:
        number = descriptor(granted)
        _fast.send_fds(CONTROL, b"D", [number])
        body = _fast.encode(granted, EMPTY, 1 << 16, describe=lambda item: (kind, None))
        speak(message.VALUE, message.prefix([], 1), body)

    return inside


@pytest.mark.parametrize(
    ("kind", "descriptor"),
    [
        ("file", lambda granted: os.pipe()[0]),  # reading it would wait for ever
        ("file", lambda granted: os.pipe()[1]),
        ("text", lambda granted: os.pipe()[0]),
        ("file", lambda granted: os.eventfd(0)),
        ("file", lambda granted: socket.socketpair()[0].detach()),
        ("file", lambda granted: 0),
        ("file", lambda granted: CONTROL),
        ("directory", lambda granted: granted.fileno()),
        ("socket", lambda granted: socket.socketpair()[0].detach()),
        ("listener", lambda granted: granted.fileno()),
        ("x", lambda granted: granted.fileno()),
    ],
)
def test_only_real_files_come_back(kind: str, descriptor: Callable[[Any], int], tmp_path: Path) -> None:
    path = tmp_path / "granted"
    path.write_bytes(b"granted")
    with open(path, "rb") as granted, pytest.raises(ProtocolError):
        confine(_send_as(kind, descriptor))(granted)


def test_a_file_that_comes_back_has_no_more_rights_than_it_had(tmp_path: Path) -> None:
    path = tmp_path / "granted"
    path.write_bytes(b"granted")
    with open(path, "r+b") as granted:
        reading = os.fdopen(os.open(path, os.O_RDONLY), "rb")
        back = confine(lambda file: file)(reading)
        assert back.read() == b"granted"
        with pytest.raises(OSError):
            os.write(back.fileno(), b"x")
        back.close()
        reading.close()
        assert granted.read() == b"granted"


# -- what goes on after the answer -------------------------------------------------------------------------------------


def test_nothing_runs_after_the_answer(tmp_path: Path) -> None:
    def leaves_a_thread() -> int:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return os.getpid()

    pid = confine(leaves_a_thread)()
    assert not Path(f"/proc/{pid}").exists()


def test_an_answer_from_a_thread_ends_the_rest() -> None:
    def answers_from_a_thread() -> None:
        threading.Thread(target=send(encoded("from a thread")), daemon=True).start()
        time.sleep(60)

    assert confine(answers_from_a_thread)() == "from a thread"


def test_a_stream_of_lies_ends_as_one() -> None:
    def stream() -> Iterator[int]:
        yield 1
        os.write(RESULT, b"\xff" * 100)
        time.sleep(60)
        yield 2

    values = confine(stream)()
    assert next(values) == 1
    with pytest.raises(ProtocolError):
        next(values)
    with pytest.raises(StopIteration):
        next(values)


def test_a_stream_without_end_is_held_up() -> None:
    def stream() -> Iterator[bytes]:
        while True:
            yield b"x" * 10_000

    before = resident()
    values = confine(stream)()
    for _ in range(10):
        next(values)
    time.sleep(0.05)  # it would run ahead
    next(values)
    values.close()
    assert resident() - before < 64 << 20


# -- hiding ------------------------------------------------------------------------------------------------------------


def test_hiding_a_refusal_does_not_hide_the_violation() -> None:
    def hides() -> str:
        with contextlib.suppress(Exception):
            open("/etc/passwd")  # noqa: SIM115
        return "nothing to see"

    with pytest.raises(ViolationError) as caught:
        sandboxed(start="fork")(hides)()
    assert [violation.call for violation in caught.value.violations] == ["openat"]


def test_what_is_told_of_a_refusal_steers_no_terminal() -> None:
    """Paths and names are the attacker's words, and people read them on a terminal."""
    evil = "\x1b]0;title\x07\x1b[2J\r\n\x9b31m\u202e"

    def words() -> None:
        code = compile("import os\ndef f():\n  try: os.open('/x', 0)\n  except OSError: pass\nf()", f"/{evil}", "exec")
        exec(code, {})
        for path in (f"/{evil}", evil):
            with contextlib.suppress(OSError):
                open(path)  # noqa: SIM115
        with contextlib.suppress(ImportError):
            __import__(evil)
        client = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
        with contextlib.suppress(OSError):
            client.connect(f"/{evil}")

    with pytest.raises(ViolationError) as caught:
        sandboxed(start="fork")(words)()
    assert len(caught.value.violations) >= 4
    for said in (str(caught.value), *map(str, caught.value.violations)):
        assert all(letter.isprintable() or letter == "\n" for letter in said), ascii(said)
    assert all("\n" not in str(violation) for violation in caught.value.violations)


def printable(said: str) -> bool:
    return all(letter.isprintable() or letter in "\n\t" for letter in said)


def test_what_is_told_of_an_exception_steers_no_terminal() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"
    said = {
        "type": f"module{evil}.Error",
        "args": None,
        "text": evil,
        "notes": [evil],
        "frames": [(f"/{evil}", 1, evil)],
        "context": evil,
        "attributes": {},
    }
    with pytest.raises(RemoteError) as caught:
        confine(lambda: speak(message.RAISED, encoded(said)))()
    shown = "".join(traceback.format_exception_only(caught.value)) + str(caught.value.__cause__)
    assert printable(shown), ascii(shown)


def test_what_is_told_of_a_death_steers_no_terminal() -> None:
    def dies() -> None:
        os.write(2, b"Fatal Python error: \x1b[2J\x07\xc2\x9b31m\n")
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(CompartmentDied) as caught:
        confine(dies)()
    assert "Fatal Python error" in str(caught.value)
    assert printable(str(caught.value)), ascii(str(caught.value))


def test_a_secret_is_not_in_a_compartment() -> None:
    plain = ctypes.create_string_buffer(b"plain as day")
    address = ctypes.addressof(plain)
    assert confine(lambda: ctypes.string_at(address, 12))() == b"plain as day"

    secret = Secret(bytearray(b"kept to itself"))
    start, _ = where(secret._pages)
    assert ctypes.string_at(start, 14) == b"kept to itself"
    with pytest.raises(CompartmentDied) as caught:
        confine(lambda: ctypes.string_at(start, 14))()
    assert caught.value.signal == signal.SIGSEGV
    with pytest.raises(CompartError):
        confine(secret.reveal)()
    secret.close()


def where(exporter: Any) -> tuple[int, int]:
    """The address and length of what an object exports by the buffer protocol."""
    view = (ctypes.c_char * len(memoryview(exporter))).from_buffer(exporter)
    return ctypes.addressof(view), len(view)


@pytest.mark.skipif(not enforcement(Policy())["listener"].up, reason="without a listener nobody counts threads")
def test_threads_are_bounded_without_a_word() -> None:
    def parks() -> int:
        kept = ctypes.create_string_buffer(16)
        for made in range(2000):
            answer = native.park(
                native.NUMBERS["clone"], 0x3D0F00, 0, ctypes.addressof(kept), ctypes.addressof(kept) + 8, 0
            )
            if answer < 0:
                return made
        return 2000

    assert 100 < confine(parks)() < 1000


def test_dying_does_not_hide_the_violation() -> None:
    def dies() -> None:
        with contextlib.suppress(Exception):
            open("/etc/passwd")  # noqa: SIM115
        ctypes.string_at(0)

    with pytest.raises(ViolationError):
        sandboxed(start="fork")(dies)()


def test_a_forged_answer_does_not_hide_the_violation() -> None:
    def forges() -> None:
        with contextlib.suppress(Exception):
            open("/etc/passwd")  # noqa: SIM115
        send(encoded("nothing to see"))()

    with pytest.raises(ViolationError):
        sandboxed(start="fork")(forges)()


def test_the_first_violation_kills_when_it_shall(tmp_path: Path) -> None:
    def goes_on() -> str:
        with contextlib.suppress(Exception):
            open("/etc/passwd")  # noqa: SIM115
        return "still here"

    with pytest.raises(ViolationError) as caught:
        sandboxed(start="fork", on_violation="kill")(goes_on)()
    assert len(caught.value.violations) == 1


def test_a_directory_does_not_come_back_with_more(tmp_path: Path) -> None:
    (tmp_path / "inside").write_bytes(b"inside")
    with Directory(tmp_path, "r") as directory:
        back = confine(lambda handed: handed)(directory)
    with back:
        assert back.mode == "r"
        with pytest.raises(PermissionError):
            back.open("new", "w")


def test_dying_by_any_signal_is_told() -> None:
    # kill and tgkill of itself are its own affair.
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGALRM):
        with pytest.raises(CompartmentDied) as caught:
            confine(lambda number=number: os.kill(os.getpid(), number))()
        assert caught.value.signal == number
