"""A compartment that lies on its channel: the host raises what fits, keeps nothing open, and goes on.

Each lie is told by code inside, which writes to the channel's descriptors itself and then ends the process, so that the
worker never gets to say anything true. `test_what_is_written_by_hand_is_taken` shows that the same way of speaking is
believed when it tells the truth: each of these lies could have come through.
"""

import contextlib
import gc
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import compart
from compart import (
    CompartError,
    CompartmentDied,
    CompartmentTimeout,
    EncodeError,
    ProtocolError,
    _fast,
    message,
    sandboxed,
)
from compart.backend.linux.filters import CONTROL, RESULT, TRACE
from compart.host import arena

EMPTY = _fast.Registry(())
SEALED = message.prefix([], 0)


def encoded(value: Any) -> bytes:
    return _fast.encode(value, EMPTY, 1 << 20)


def frame(kind: int, *parts: bytes) -> bytes:
    """A frame as the channel carries it."""
    with open(os.memfd_create("frame"), "r+b") as file:
        _fast.write_frame(file.fileno(), kind, *parts)
        file.seek(0)
        return file.read()


def value_frame(body: bytes) -> bytes:
    return frame(message.VALUE, SEALED, body)


HONEST = value_frame(encoded("the truth"))
ERROR = {"type": "ValueError", "args": ("x",), "text": "x", "notes": [], "frames": [], "context": "", "attributes": {}}


def say(*spoken: bytes) -> Callable[[], None]:
    """Write these bytes as the answer, and end."""

    def inside() -> None:
        for piece in spoken:
            view = memoryview(piece)
            while view:
                view = view[os.write(RESULT, view) :]
        os._exit(0)

    return inside


def tell_control(data: bytes, descriptors: Callable[[], list[int]] = list, then: bytes = b"") -> Callable[[], None]:
    """Send one message on the socket that descriptors travel by, then write this answer and end, or wait for the end."""

    def inside() -> None:
        _fast.send_fds(CONTROL, data, descriptors())
        while not then:
            signal.pause()
        say(then)()

    return inside


def borrow(size: int) -> tuple[int, int]:
    """Inside: have the host lend shared memory, as an honest worker does. Its descriptor and its size."""
    _fast.send_fds(CONTROL, b"A" + size.to_bytes(8, "little"), [])
    answer, lent = _fast.recv_fds(CONTROL, 64, 1)
    return lent[0], int.from_bytes(answer[1:9], "little")


def place(places: list[tuple[int, int]], body: bytes = b"\x0e\x01") -> Callable[[], None]:
    """Borrow a mebibyte, then say that buffers lie at these places. The body is T_BYTES_OUT of one byte by default."""

    answer = say(frame(message.VALUE, message.prefix(places, 0), body))

    def inside() -> None:
        borrow(1 << 20)
        answer()

    return inside


@pytest.fixture
def unharmed() -> Iterator[None]:
    """Afterwards the host holds nothing that it did not hold before, has no child, and can call again."""

    def open_now() -> set[str]:
        gc.collect()
        arena.trim()
        return set(os.listdir("/proc/self/fd"))

    assert sandboxed(start="fork")(lambda: bytearray(100_000))() == bytearray(100_000)
    before = open_now()
    yield
    assert open_now() == before
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | 0x40000000)  # __WALL
    assert sandboxed(start="fork")(lambda: "still here")() == "still here"


def call(inside: Callable[..., Any], **fields: Any) -> Any:
    return sandboxed(**{"start": "fork", "timeout": 20, "on_violation": "deny", **fields})(inside)()


LIED = ProtocolError
ENDED = CompartmentDied

LIES: dict[str, tuple[Callable[[], None], type[BaseException] | tuple[type[BaseException], ...]]] = {
    # -- not a frame
    "garbage": (say(b"\xff" * 100), LIED),
    "zeroes": (say(bytes(100)), LIED),
    "text": (say(b"HTTP/1.1 200 OK\r\n\r\n"), LIED),
    "a_wrong_magic": (say(b"\0" + HONEST[1:]), LIED),
    "a_pickle": (say(b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."), LIED),
    "one_byte": (say(HONEST[:1]), (LIED, ENDED)),
    "half_a_header": (say(HONEST[:8]), (LIED, ENDED)),
    "a_header_alone": (say(HONEST[:16]), (LIED, ENDED)),
    "half_a_frame": (say(HONEST[:-1]), (LIED, ENDED)),
    "nothing": (say(), ENDED),
    "nothing_and_a_code": (lambda: os._exit(42), ENDED),
    # -- lengths
    "a_length_of_all_ones": (say(HONEST[:8] + b"\xff" * 8), LIED),
    "a_length_that_is_negative": (say(HONEST[:8] + struct.pack("<q", -1)), LIED),
    "a_length_of_a_tebibyte": (say(HONEST[:8] + struct.pack("<Q", 1 << 40)), LIED),
    "a_length_above_the_limit": (say(HONEST[:8] + struct.pack("<Q", (256 << 20) + (1 << 17))), LIED),
    "a_length_that_is_short": (say(HONEST[:8] + struct.pack("<Q", 3) + HONEST[16:]), LIED),
    # -- kinds
    "kind_zero": (say(frame(0, b"")), LIED),
    "a_kind_there_is_not": (say(frame(99, b"")), LIED),
    "the_greatest_kind": (say(frame(2**32 - 1, b"")), LIED),
    "a_value_without_a_prefix": (say(frame(message.VALUE)), LIED),
    "a_value_without_a_body": (say(frame(message.VALUE, SEALED)), LIED),
    "a_wall_that_fell_after_all_stood": (say(frame(message.WALL, b"seccomp\ncould not")), LIED),
    # -- values
    "an_unknown_tag": (say(value_frame(b"\xfe")), LIED),
    "trailing_bytes": (say(value_frame(encoded(1) + b"\0")), LIED),
    "two_values_in_one": (say(value_frame(encoded(1) * 2)), LIED),
    "a_list_longer_than_its_bytes": (say(value_frame(b"\x11\xff" + struct.pack("<Q", 1 << 60))), LIED),
    "a_list_of_a_million_that_is_empty": (say(value_frame(b"\x11\xfe" + struct.pack("<I", 1 << 20))), LIED),
    "a_string_longer_than_its_bytes": (say(value_frame(b"\x0a\xff" + struct.pack("<Q", (1 << 63) - 1) + b"x")), LIED),
    "a_string_that_is_no_text": (say(value_frame(b"\x0a\x02\xff\xfe")), LIED),
    "a_reference_to_no_string": (say(value_frame(b"\x0c\x07")), LIED),
    "an_integer_longer_than_its_bytes": (say(value_frame(b"\x07\xff" + struct.pack("<Q", 1 << 62))), LIED),
    "a_list_as_a_key": (say(value_frame(b"\x13\x01" + encoded([]) + encoded(1))), LIED),
    "an_odd_dictionary": (say(value_frame(b"\x13\x02" + encoded(1) + encoded(1) + encoded(2))), LIED),
    "a_type_nobody_named": (say(value_frame(b"\x20\x00")), LIED),
    "an_enum_nobody_named": (say(value_frame(b"\x1e\x00\x00")), LIED),
    "a_date_that_is_none": (say(value_frame(b"\x16" + b"\xff" * 8)), LIED),
    "nesting_without_end": (say(value_frame(b"\x11\x01" * 1_000_000 + encoded(0))), LIED),
    "nesting_in_dictionaries": (say(value_frame((b"\x13\x01" + encoded(0)) * 1_000_000 + encoded(0))), LIED),
    # -- buffers
    "a_buffer_without_memory": (say(frame(message.VALUE, message.prefix([(0, 1)], 0), b"\x0e\x01")), LIED),
    "four_billion_buffers": (say(frame(message.VALUE, struct.pack("<II", 2**32 - 1, 0))), LIED),
    "a_buffer_beyond_its_memory": (place([(0, (1 << 20) + 1)]), LIED),
    "a_buffer_that_begins_beyond": (place([(1 << 20, 64)]), LIED),
    "a_buffer_that_wraps_around": (place([(2**64 - 64, 128)]), LIED),
    "a_buffer_of_all_ones": (place([(0, 2**64 - 1)]), LIED),
    "buffers_that_overlap": (place([(0, 128), (64, 128)], b"\x11\x02\x0e\x80\x0e\x80"), LIED),
    "buffers_in_the_wrong_order": (place([(128, 1), (0, 1)], b"\x11\x02\x0e\x01\x0e\x01"), LIED),
    "a_buffer_off_its_grid": (place([(1, 1)]), LIED),
    "a_buffer_nobody_names": (place([(0, 1)], encoded(1)), LIED),
    "a_buffer_named_twice": (place([(0, 1)], b"\x11\x02\x0e\x01\x0e\x01"), LIED),
    "a_buffer_of_another_length": (place([(0, 1)], b"\x0e\x09"), LIED),
    # -- descriptors
    "descriptors_that_never_came": (say(frame(message.VALUE, message.prefix([], 3), encoded(1))), LIED),
    "four_billion_descriptors": (say(frame(message.VALUE, struct.pack("<II", 0, 2**32 - 1), encoded(1))), LIED),
    "a_descriptor_nobody_announced": (tell_control(b"D", lambda: [os.pipe()[0]], HONEST), LIED),
    "a_descriptor_nobody_names": (
        tell_control(b"D", lambda: [os.pipe()[0]], frame(message.VALUE, message.prefix([], 1), encoded(1))),
        LIED,
    ),
    "a_hundred_descriptors": (tell_control(b"D", lambda: list(os.pipe()) * 50), LIED),
    "descriptors_without_any": (tell_control(b"D"), LIED),
    "a_listener_of_its_own": (tell_control(b"L", lambda: [os.pipe()[0]]), LIED),
    "a_listener_that_is_none": (tell_control(b"L"), LIED),
    "words_nobody_asked_for": (tell_control(b"Z"), LIED),
    "words_and_descriptors": (tell_control(b"Z", lambda: [*os.pipe(), 0, 1, 2, CONTROL, RESULT]), LIED),
    "more_words_than_there_is_room_for": (tell_control(b"D" * 4096), LIED),
    "a_loan_with_a_descriptor": (tell_control(b"A" + bytes(8), lambda: [0]), LIED),
    "a_loan_of_no_size": (tell_control(b"A"), LIED),
    "a_loan_of_nothing": (tell_control(b"A" + bytes(8)), (LIED, ENDED)),
    "a_loan_of_everything": (tell_control(b"A" + b"\xff" * 8), (LIED, ENDED)),
    # -- exceptions
    "an_exception_that_is_none": (say(frame(message.RAISED, encoded(1))), LIED),
    "an_exception_without_parts": (say(frame(message.RAISED, encoded({}))), LIED),
    "an_exception_of_other_parts": (say(frame(message.RAISED, encoded({**ERROR, "type": 7}))), LIED),
    "an_exception_with_a_false_stack": (say(frame(message.RAISED, encoded({**ERROR, "frames": [1]}))), LIED),
    "an_exception_that_is_garbage": (say(frame(message.RAISED, b"\xff\xff")), LIED),
    "an_exception_that_nests": (say(frame(message.RAISED, b"\x11\x01" * 100_000)), LIED),
}


def test_what_is_written_by_hand_is_taken(unharmed: None) -> None:
    assert call(say(HONEST)) == "the truth"
    assert call(say(HONEST[:5], HONEST[5:20], HONEST[20:])) == "the truth"


def test_a_buffer_placed_by_hand_is_taken(unharmed: None) -> None:
    assert call(place([(0, 3)], b"\x0e\x03")) == bytes(3)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", LIES)
def test_the_host_is_told(name: str) -> None:
    lie, expected = LIES[name]
    with pytest.raises(expected) as caught:
        call(lie)
    assert isinstance(caught.value, CompartError)
    assert not isinstance(caught.value, CompartmentTimeout), "nobody looked at it"


# -- exceptions that would do more in the host than tell what happened -------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "KeyboardInterrupt",
        "SystemExit",
        "GeneratorExit",
        "BaseException",
        "ExceptionGroup",
        "BaseExceptionGroup",
        "object",
        "eval",
        "open",
        "__import__",
        "print",
        "os.error",
        "compart.ViolationError",
        "",
        "builtins.ValueError",
        "a" * 100_000,
    ],
)
def test_only_builtin_exceptions_are_made(name: str, unharmed: None) -> None:
    with pytest.raises(compart.RemoteError):
        call(say(frame(message.RAISED, encoded({**ERROR, "type": name, "args": ("true", [])}))))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("OSError", (1, "lie")),  # becomes PermissionError, which is not what was said
        ("UnicodeDecodeError", ("x",)),
        ("UnicodeDecodeError", ("utf-8", b"", 2**70, 1, "x")),
        ("OSError", (2**80, "x", "y", 2**80, "z")),
        ("SyntaxError", ("x", (1, 2, 3))),
        ("StopIteration", ([[[]]],)),
        ("ImportError", tuple(range(1000))),
        ("SystemError", ("x",)),
        ("MemoryError", ("x",)),
        ("RecursionError", ("x",)),
        ("AssertionError", ("x",)),
    ],
)
def test_arguments_of_exceptions_do_no_harm(name: str, args: tuple[Any, ...], unharmed: None) -> None:
    with pytest.raises(Exception) as caught:
        call(say(frame(message.RAISED, encoded({**ERROR, "type": name, "args": args}))))
    assert isinstance(caught.value, (CompartError, Exception))
    assert not isinstance(caught.value, (KeyboardInterrupt, SystemExit))


# -- more than one answer, late answers, no answer ---------------------------------------------------------------------


def test_the_first_of_two_answers_counts(unharmed: None) -> None:
    assert call(say(value_frame(encoded("first")) + value_frame(encoded("second")))) == "first"


def test_garbage_after_the_answer_changes_nothing(unharmed: None) -> None:
    with contextlib.suppress(ProtocolError):  # whether it is seen depends on when it arrives
        assert call(say(HONEST + b"\xff" * 1000)) == "the truth"


def test_an_answer_that_ends_late_is_taken(unharmed: None) -> None:
    def inside() -> None:
        os.write(RESULT, HONEST[:20])
        time.sleep(0.05)
        say(HONEST[20:])()

    assert call(inside) == "the truth"


def test_an_answer_that_never_ends_runs_into_the_time_limit(unharmed: None) -> None:
    def inside() -> None:
        os.write(RESULT, HONEST[:-1])
        signal.pause()

    with pytest.raises(CompartmentTimeout):
        call(inside, timeout=0.3)


def test_an_answer_in_drops_runs_into_the_time_limit(unharmed: None) -> None:
    def inside() -> None:
        os.write(RESULT, HONEST[:8] + struct.pack("<Q", 1 << 20))
        while True:
            os.write(RESULT, b"x")
            time.sleep(0.001)

    with pytest.raises(CompartmentTimeout):
        call(inside, timeout=0.3)


@pytest.mark.parametrize("number", [RESULT, CONTROL, TRACE])
def test_its_channel_cannot_be_closed(number: int, unharmed: None) -> None:
    """At a number that is free something else could stand, with the rights of what stood there."""

    def inside() -> str:
        try:
            os.close(number)
        except PermissionError:
            return "refused"
        return "closed"

    assert call(inside) == "refused"


def test_its_streams_can_be_closed(unharmed: None) -> None:
    def inside() -> int:
        for number in range(3):
            os.close(number)
        return 7

    assert call(inside) == 7


def test_closing_every_number_ends_it_in_time(unharmed: None) -> None:
    def inside() -> None:
        for number in range(1024):
            with contextlib.suppress(OSError):
                os.close(number)
        while True:
            signal.pause()

    with pytest.raises(CompartmentDied):
        call(inside, timeout=0.5)


# -- floods ------------------------------------------------------------------------------------------------------------


def test_a_flood_of_loans_is_ended(unharmed: None) -> None:
    def inside() -> None:
        while True:
            _fast.send_fds(CONTROL, b"A" + (1 << 20).to_bytes(8, "little"), [])

    with pytest.raises(ProtocolError):
        call(inside)


def test_asking_for_one_loan_after_the_other_comes_to_an_end(unharmed: None) -> None:
    def inside() -> None:
        for _ in range(1000):
            borrow(64 << 20)

    with pytest.raises(CompartError):
        call(inside, memory=None, timeout=0.5)


def test_a_flood_of_descriptors_is_ended(unharmed: None) -> None:
    def inside() -> None:
        while True:
            with contextlib.suppress(OSError):  # too many in flight
                _fast.send_fds(CONTROL, b"D", [0, 1, 2])

    with pytest.raises(ProtocolError):
        call(inside)


def test_a_flood_of_refused_calls_is_ended(unharmed: None) -> None:
    def inside() -> None:
        while True:
            try:
                os.open("/", os.O_RDONLY)
            except PermissionError:
                continue

    with pytest.raises(CompartmentDied):
        call(inside, timeout=2)


def test_a_flood_of_output_is_capped(unharmed: None) -> None:
    def inside() -> int:
        for _ in range(500):
            os.write(1, b"o" * 65536)
            os.write(2, b"e" * 65536)
        return 7

    outcome = sandboxed(start="fork", output_bytes=10_000)(inside).run()
    assert outcome.value == 7
    assert len(outcome.stdout) <= 10_000
    assert len(outcome.stderr) <= 10_000


def test_a_flood_of_stacks_changes_nothing(unharmed: None) -> None:
    def inside() -> int:
        for _ in range(2000):
            os.write(TRACE, b'Stack (most recent call first):\n  File "/a", line 1 in x\nimport x\n' * 40)
        return 7

    assert call(inside) == 7


def test_a_flood_of_answers_is_bounded(unharmed: None) -> None:
    def inside() -> None:
        while True:
            os.write(RESULT, b"\0" * 65536)

    with pytest.raises(ProtocolError):
        call(inside)


def test_a_value_over_its_limit_is_refused(unharmed: None) -> None:
    with pytest.raises(CompartmentDied) as caught:
        call(lambda: b"x" * 1_000_000, result_bytes=1000)
    assert caught.value.limit == "result_bytes"


def test_a_value_written_by_hand_over_its_limit_is_refused(unharmed: None) -> None:
    with pytest.raises(ProtocolError):
        call(say(value_frame(encoded(b"x" * 200_000))), result_bytes=1000)


def test_what_cannot_be_sent_is_told(unharmed: None) -> None:
    with pytest.raises(EncodeError):
        call(lambda: object())
