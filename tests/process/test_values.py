"""A plain value comes back exactly as it was; anything else is refused with its path, and nothing is made of it."""

import array
import collections
import dataclasses
import datetime as dt
import decimal
import fractions
import io
import math
import os
import pathlib
import re
import stat
import struct
import sys
import threading
import types
import typing
import uuid

import pytest

import compart
from compart import (
    Buffer,
    CompartmentDied,
    Directory,
    EncodeError,
    NotCapableError,
    ProtocolError,
    grant,
    rights,
    sandboxed,
)
from tests.process import annotated
from tests.process.annotated import Colour, Font, Page, Point, Style

try:
    import numpy
except ImportError:
    numpy = None

pytestmark = pytest.mark.usefixtures("leak_check")
needs_numpy = pytest.mark.skipif(numpy is None, reason="NumPy is not installed")


@sandboxed
def back(value):
    """Any value, through a compartment and back."""
    return value


def exactly(value):
    """A picture of a value that tells apart what == does not: 1, 1.0, True; -0.0, 0.0; nan; order; types at every depth."""
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        return kind, [exactly(item) for item in value]
    if isinstance(value, dict):
        return kind, [(exactly(key), exactly(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(map(repr, map(exactly, value)))
    if isinstance(value, float):
        return kind, struct.pack("d", value)
    if isinstance(value, complex):
        return kind, struct.pack("dd", value.real, value.imag)
    if isinstance(value, decimal.Decimal):
        return kind, value.as_tuple()
    if isinstance(value, dt.datetime):
        return kind, value.isoformat(), value.fold, repr(value.tzinfo)
    if isinstance(value, int):
        return kind, hex(value)
    return kind, repr(value)


VALUES = {
    "none": None,
    "booleans": [True, False],
    "small numbers": [0, 1, -1, 255, 256, 2**31, -(2**31), 2**63 - 1, -(2**63), 2**63, 2**64],
    "huge numbers": [10**100, -(10**100), 1 << 100_000],
    "floats": [0.0, -0.0, 1.5, math.inf, -math.inf, 5e-324, 1.7976931348623157e308],
    "nan": [math.nan, struct.unpack("d", b"\1\0\0\0\0\0\xf8\x7f")[0]],
    "complex": [1 + 2j, complex(-0.0, math.nan), complex(math.inf, -0.0)],
    "text": ["", "ascii", "ünïcödé", "日本語", "\U0001f600", "a\0b", "x" * 100_000],
    "surrogates": ["\ud800", "a\udc80b", "\udfff\ud800"],
    "bytes": [b"", b"\0\xff", bytes(range(256)), b"x" * 100_000],
    "bytearrays": [bytearray(), bytearray(b"abc")],
    "lists": [[], [[]], [[], [[]]], list(range(1000))],
    "tuples": [(), (1,), ((), ((),)), (1, [2, (3,)])],
    "dicts": [{}, {"b": 1, "a": 2}, {1: "i", "1": "s", b"1": "b", (1,): "t", None: "n", 1.5: "f"}],
    "dict keys": {frozenset({1, 2}): 1, (1, ("x", None)): 2, -0.0: 3, True: 4},
    "sets": [set(), {1, "1", b"1"}, frozenset(), frozenset({(1, 2), frozenset()})],
    "dates": [dt.date(1, 1, 1), dt.date(9999, 12, 31)],
    "times": [dt.time(), dt.time(23, 59, 59, 999_999), dt.time(1, tzinfo=dt.UTC), dt.time(1, fold=1)],
    "moments": [dt.datetime(1, 1, 1), dt.datetime(2024, 2, 29, 1, 2, 3, 4), dt.datetime(2020, 1, 1, fold=1)],
    "zones": [
        dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
        dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=-5, minutes=30))),
        dt.datetime(2020, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=2), "named")),
        dt.UTC,
    ],
    "spans": [dt.timedelta(), dt.timedelta.min, dt.timedelta.max, dt.timedelta(days=-1, microseconds=3)],
    "decimals": [decimal.Decimal(text) for text in ("0", "-0.00", "1E+1000", "NaN", "sNaN12", "-Infinity", "3." + "1" * 500)],
    "identifiers": [uuid.UUID(int=0), uuid.UUID(int=2**128 - 1), uuid.UUID("12345678123456781234567812345678")],
    "everything nested": {"a": [({"b": {1, 2}}, [None, (b"x", [{}])])], ("k", 1): [{"deep": ({},)}]},
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_a_value_comes_back_exactly_as_it_was(value):
    assert exactly(back(value)) == exactly(value)


def test_the_picture_tells_apart_what_equality_does_not():
    for one, other in [
        (1, True),
        (0.0, -0.0),
        ([1], (1,)),
        ({1}, frozenset({1})),
        (b"", bytearray()),
        ({1: 2, 3: 4}, {3: 4, 1: 2}),
    ]:
        assert exactly(one) != exactly(other)


def test_each_value_is_new():
    value = [[1], {"a": [2]}]
    came = back(value)
    assert came is not value
    assert came[0] is not value[0]


def test_a_value_used_twice_comes_back_equal_in_both_places():
    shared = [1, 2]
    assert back([shared, shared, {"again": shared}]) == [[1, 2], [1, 2], {"again": [1, 2]}]


def test_what_the_compartment_changes_stays_there():
    handed = [1]
    assert sandboxed(lambda items: items.append(2) or items)(handed) == [1, 2]
    assert handed == [1]


def test_nesting_is_bounded_and_told():
    def nested(depth):
        made = []
        for _ in range(depth):
            made = [made]
        return made

    f = sandboxed(nested)
    assert f(200) == nested(200)
    with pytest.raises(EncodeError, match="nested deeper than 256"):
        f(1000)


def test_a_value_that_doubles_at_every_level_ends_at_the_limit():
    def bomb():
        made = ["boom"]
        for _ in range(200):
            made = [made, made]
        return made

    with pytest.raises(CompartmentDied) as caught:
        sandboxed(bomb, result_bytes="1M")()
    assert caught.value.limit == "result_bytes"


# ------------------------------------------------------------------------------------------------------- what cannot leave


class Typeface:
    pass


class MyInt(int):
    pass


class MyList(list):
    pass


REFUSED = {
    "an object": Typeface(),
    "a class": Typeface,
    "a function": len,
    "a lambda": lambda: 1,
    "a module": math,
    "an exception": ValueError("x"),
    "a generator": (n for n in [1]),
    "a range": range(3),
    "a slice": slice(1),
    "an ellipsis": ...,
    "a path": pathlib.PurePosixPath("/x"),
    "a fraction": fractions.Fraction(1, 2),
    "a pattern": re.compile("a"),
    "a lock": threading.Lock(),
    "a deque": collections.deque([1]),
    "an ordered dict": collections.OrderedDict(a=1),
    "a default dict": collections.defaultdict(int),
    "a counter": collections.Counter("aab"),
    "a view of keys": {}.keys(),
    "a namespace": types.SimpleNamespace(a=1),
    "a kind of int": MyInt(3),
    "a kind of list": MyList([1]),
    "a file in memory": io.BytesIO(b"x"),
    "a compartment's function": back,
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_refused_by_its_type_and_its_place(value):
    with pytest.raises(EncodeError) as caught:
        sandboxed(lambda: {"plain": 1, "odd": [0, value]})()
    assert str(caught.value).startswith(f'result["odd"][1]: {type(value)!r} cannot leave a compartment')
    assert isinstance(caught.value, TypeError)


def carried(make):
    with pytest.raises(EncodeError) as caught:
        sandboxed(make)()
    return str(caught.value)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: Typeface(), "result"),
        (lambda: [1, 2, Typeface()], "result[2]"),
        (lambda: (0, (1, Typeface())), "result[1][1]"),
        (lambda: {"pages": [0, 1, 2, {"font": Typeface()}]}, 'result["pages"][3]["font"]'),
        (lambda: {1: Typeface()}, "result[1]"),
        (lambda: {(1, "a"): Typeface()}, "result[(1, 'a')]"),
        (lambda: {b"k": Typeface()}, "result[b'k']"),
        (lambda: {'quo"te': Typeface()}, 'result["quo\\"te"]'),
        (lambda: {"new\nline": Typeface()}, 'result["new\\nline"]'),
    ],
)  # fmt: skip
def test_the_message_names_the_path(make, path):
    assert carried(make).startswith(f"{path}: {Typeface!r} cannot leave a compartment")


def test_the_message_names_a_field_of_a_dataclass_as_the_documentation_shows():
    def document() -> dict[str, list[Page]]:
        return {"pages": [Page(1), Page(2), Page(3), Page(4, font=Typeface())]}

    assert carried(document).startswith(f'result["pages"][3].font: {Typeface!r} cannot leave a compartment')


def test_the_message_names_a_field_of_a_named_tuple():
    def point() -> Point:
        return Point(1, Typeface())

    assert carried(point).startswith("result.y: ")


def test_the_message_names_a_key_and_a_member_of_a_set():
    assert carried(lambda: {frozenset({Typeface}): 1}).startswith("result key ")
    assert carried(lambda: {1, MyInt(3)}).startswith("result{3}: ")


def test_a_very_long_path_is_shortened():
    def deep():
        made = Typeface()
        for n in range(100):
            made = {f"key number {n}": made}
        return made

    said = carried(deep)
    assert len(said) < 1000
    assert " … " in said


def test_a_cycle_is_refused_by_its_place():
    def cyclic():
        looped = {"name": "loop", "children": []}
        looped["children"].append(looped)
        return [looped]

    assert carried(cyclic) == (
        'result[0]["children"][0]: refers back to a value that holds it; a cycle cannot leave a compartment'
    )


def test_two_places_for_one_value_are_no_cycle():
    shared = {"a": [1]}
    assert back([shared, shared]) == [shared, shared]


def test_a_repr_that_raises_does_not_hide_the_place():
    class Mute:
        def __repr__(self):
            raise RuntimeError("no")

        __hash__ = object.__hash__

    assert "Mute" in carried(lambda: [Mute()])
    assert "Mute" in carried(lambda: {Mute(): 1})


def test_nothing_of_a_refused_value_comes_back():
    made = []

    class Spy:
        def __init__(self):
            made.append(self)

        def __reduce__(self):
            return os.system, ("touch /tmp/compart-was-here",)

        def __setstate__(self, state):
            made.append(state)

    with pytest.raises(EncodeError):
        sandboxed(lambda: Spy())()
    assert made == []


# ------------------------------------------------------------------------ records, when the function's annotation names them


def test_a_dataclass_leaves_when_the_annotation_names_it_and_only_then():
    def named() -> Page:
        return Page(1)

    def unnamed():
        return Page(1)

    came = sandboxed(named)()
    assert came == Page(1)
    assert type(came) is Page
    assert carried(unnamed).endswith("name Page in the function's return annotation")


def test_a_named_tuple_leaves_when_the_annotation_names_it_and_only_then():
    def named() -> Point:
        return Point(1, 2)

    came = sandboxed(named)()
    assert (type(came), came) == (Point, (1, 2))
    assert "name Point in" in carried(lambda: Point(1, 2))


@pytest.mark.parametrize(
    "member", [Colour.RED, Colour.CRIMSON, Style.BOLD, Style.BOLD | Style.ITALIC, Style(0), annotated.Level.HIGH]
)
def test_an_enum_leaves_when_the_annotation_names_it_and_only_then(member):
    def named() -> Colour | Style | annotated.Level:
        return member

    assert sandboxed(named)() is member
    assert f"name {type(member).__name__} in" in carried(lambda: [member])


def returns(value, annotation):
    def function():
        return value

    function.__annotations__["return"] = annotation
    return sandboxed(function)()


PAGE = Page(3, Font("Times", Colour.BLUE), [Point(1, 2)], {"k": Font("Mono", None)})


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (PAGE, Page),
        ([PAGE], list[Page]),
        (None, typing.Optional[Page]),  # noqa: UP045
        (PAGE, typing.Optional[Page]),  # noqa: UP045
        (PAGE, Page | None),
        (PAGE, typing.Union[int, Page]),  # noqa: UP007
        ({"p": (PAGE, Point(1, 2))}, dict[str, tuple[Page, Point]]),
        ((PAGE, PAGE), tuple[Page, ...]),
        ([{Colour.RED: [Point(1, 2)]}], list[dict[Colour, list[Point]]]),
        (PAGE, typing.Annotated[Page, "with a note"]),
        (frozenset({Colour.RED}), frozenset[Colour]),
        ([PAGE], "list[Page]"),
        ([PAGE], list["Page"]),
        ([PAGE], typing.List["Page"]),  # noqa: UP006
        (PAGE, "typing.Optional[annotated.Page]"),
    ],
    ids=lambda part: str(part) if "Page(" not in str(part) else "value",
)
def test_the_annotation_may_name_it_anywhere(value, annotation):
    assert returns(value, annotation) == value


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the type statement came with Python 3.12")
def test_the_annotation_may_be_an_alias():
    names = {"Page": Page}
    exec("type Alias = Page\ntype Listed[T] = list[T | None]", names)
    assert returns(PAGE, names["Alias"]) == PAGE
    assert returns([PAGE, None], names["Listed"][Page]) == [PAGE, None]


def test_what_a_field_names_leaves_with_it():
    came = returns(PAGE, Page)
    assert type(came.font) is Font
    assert came.font.colour is Colour.BLUE
    assert type(came.places[0]) is Point
    assert type(came.others["k"]) is Font


def test_a_type_that_names_itself_leaves():
    tree = annotated.Tree(1, [annotated.Tree(2, []), annotated.Tree(3, [annotated.Tree(4, [])])])
    assert returns(tree, annotated.Tree) == tree


def test_annotations_that_are_text_are_understood():
    assert sandboxed(annotated.postponed)() == [PAGE_ONE]
    assert sandboxed(annotated.postponed_method_owner().method)() == PAGE_ONE


PAGE_ONE = Page(1)


def test_a_local_class_leaves():
    @dataclasses.dataclass
    class Local:
        a: int

    def make() -> Local:
        return Local(1)

    assert sandboxed(make)() == Local(1)


def test_a_local_class_leaves_by_a_postponed_annotation():
    local, make = annotated.local_and_its_maker()
    assert sandboxed(make)() == local(1)


def test_frozen_and_slotted_dataclasses_leave():
    for kind in (annotated.Frozen, annotated.Slotted):
        came = returns([kind(1, "b")], list[kind])
        assert came == [kind(1, "b")]


def test_no_code_of_a_record_runs_in_the_host():
    annotated.RAN.clear()
    came = returns(annotated.Careful(1), annotated.Careful)
    assert (type(came), came.a) == (annotated.Careful, 1)
    assert [pid for pid in annotated.RAN if pid == os.getpid()] == [os.getpid()]  # made once, above


def test_a_subclass_of_a_named_type_is_another_type():
    class More(Page):
        pass

    def make() -> Page:
        return More(1)

    assert "More" in carried(make)


def test_an_annotation_that_cannot_be_read_names_nothing():
    assert returns([1], "no.such.name") == [1]


# ------------------------------------------------------------------------------------------------------------------- buffers


EXPORTERS = {
    "bytes in a view": (lambda: memoryview(b"abc"), "B", (3,)),
    "numbers": (lambda: array.array("d", [1.5, -0.0]), "d", (2,)),
    "short numbers": (lambda: array.array("h", [1, -1]), "h", (2,)),
    "two dimensions": (lambda: memoryview(bytes(range(6))).cast("B", (2, 3)), "B", (2, 3)),
    "every other": (lambda: memoryview(b"abcdef")[::2], "B", (3,)),
    "nothing": (lambda: memoryview(b""), "B", (0,)),
}


@pytest.mark.parametrize(("make", "form", "shape"), EXPORTERS.values(), ids=EXPORTERS.keys())
def test_a_buffer_comes_back_as_a_read_only_buffer(make, form, shape):
    came = sandboxed(make)()
    assert type(came) is Buffer
    assert (came.format, came.shape, came.readonly) == (form, shape, True)
    assert came.tolist() == memoryview(make()).tolist()
    with memoryview(came) as view:
        assert view.readonly
        assert view.tobytes() == memoryview(make()).tobytes()
        with pytest.raises(TypeError, match="read-only"):
            view[:] = view.tobytes()


def test_a_buffer_of_another_buffer_comes_back():
    came = back(back(array.array("i", [1, 2, 3])))
    assert came.tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 1_000_003])
def test_big_buffers_and_bytes_come_back_whole(size):
    data = os.urandom(size)
    came = sandboxed(lambda: [data, bytearray(data), memoryview(data)])()
    assert [type(item) for item in came] == [bytes, bytearray, Buffer]
    assert [bytes(item) for item in came] == [data] * 3


def test_64_megabytes_come_back_whole():
    def make():
        block = bytes(range(256)) * 4096
        return memoryview(block * 64)

    came = sandboxed(make)()
    assert came.nbytes == 64 << 20
    with memoryview(came) as view:
        assert view[: 1 << 20].tobytes() == view[-(1 << 20) :].tobytes() == bytes(range(256)) * 4096


def test_a_big_buffer_stays_as_it_is_when_others_come_and_go():
    first = sandboxed(lambda: memoryview(b"\1" * 2_000_000))()
    second = sandboxed(lambda: memoryview(b"\2" * 2_000_000))()
    del second
    third = sandboxed(lambda: memoryview(b"\3" * 2_000_000))()
    assert bytes(first) == b"\1" * 2_000_000
    assert bytes(third) == b"\3" * 2_000_000


def test_shared_memory_is_scrubbed_before_another_compartment_sees_it():
    secret = sandboxed(lambda: memoryview(b"SECRET!!" * 200_000))()
    del secret

    def looks():
        # Lend a piece as the worker does, and look into it before writing.
        from compart import _fast

        _fast.send_fds(481, b"A" + (1_600_000).to_bytes(8, "little"), [])
        answer, lent = _fast.recv_fds(481, 64, 1)
        import mmap

        with mmap.mmap(lent[0], int.from_bytes(answer[1:9], "little")) as memory:
            return memory.find(b"SECRET"), len(memory)

    place, size = sandboxed(looks)()
    assert size >= 1_600_000
    assert place == -1


def test_many_buffers_in_one_value():
    def make():
        return {n: memoryview(bytes([n]) * 70_000) for n in range(40)}

    came = sandboxed(make)()
    assert all(bytes(buffer) == bytes([n]) * 70_000 for n, buffer in came.items())


# ------------------------------------------------------------------------------------------------------------------ the limit


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"x" * 200_000,
        lambda: "x" * 200_000,
        lambda: list(range(100_000)),
        lambda: memoryview(b"x" * 200_000),
        lambda: [memoryview(b"x" * 60_000)] * 4,
        lambda: 1 << 2_000_000,
    ],
    ids=["bytes", "text", "numbers", "a buffer", "small buffers", "a huge number"],
)
def test_a_value_above_result_bytes_is_told_with_its_limit(make):
    with pytest.raises(CompartmentDied, match=r"result_bytes=100000 bytes .*Policy\(result_bytes=\.\.\.\)") as caught:
        sandboxed(make, result_bytes=100_000)()
    assert (caught.value.limit, caught.value.value) == ("result_bytes", 100_000)
    assert sandboxed(make, result_bytes=2_000_000)() is not None


def test_values_within_result_bytes_pass():
    assert sandboxed(lambda: b"x" * 90_000, result_bytes=100_000)() == b"x" * 90_000
    assert sandboxed(lambda: memoryview(b"x" * 90_000), result_bytes=100_000)().nbytes == 90_000


def test_a_compartment_that_promises_more_than_the_limit_is_stopped():
    def promises():
        os.write(480, b"\0" * 1000)
        while True:
            os.write(480, b"\0" * 65536)

    with pytest.raises((ProtocolError, CompartmentDied)):
        sandboxed(promises, result_bytes="64K", timeout=20)()


def test_a_compartment_that_fills_more_of_what_it_was_lent_than_the_limit_is_stopped():
    def lies():
        from compart import _fast, message

        buffers = []
        body = _fast.encode(memoryview(bytes(300_000)), message.EMPTY, 1 << 30, inline=1000, buffers=buffers)
        places, room = message.layout([300_000])
        _fast.send_fds(481, b"A" + (100_000).to_bytes(8, "little"), [])
        answer, _ = _fast.recv_fds(481, 64, 1)
        assert int.from_bytes(answer[1:9], "little") >= room  # lent in large pieces
        _fast.write_frame(480, message.VALUE, message.prefix(places, 0), body)
        os._exit(0)

    with pytest.raises(ProtocolError, match="more than result_bytes=100000"):
        sandboxed(lies, result_bytes=100_000)()


def test_a_compartment_that_asks_for_too_much_memory_is_stopped():
    def asks():
        from compart import _fast

        _fast.send_fds(481, b"A" + (1 << 40).to_bytes(8, "little"), [])
        _fast.recv_fds(481, 64, 1)

    with pytest.raises(CompartmentDied) as caught:
        sandboxed(asks)()
    assert caught.value.limit == "result_bytes"


# ---------------------------------------------------------------------------------------------------------------------- NumPy


ARRAYS = {
    "integers": lambda: numpy.arange(6).reshape(2, 3),
    "columns first": lambda: numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
    "no dimension": lambda: numpy.array(2.5),
    "nothing": lambda: numpy.zeros((0, 3), dtype="u2"),
    "truth": lambda: numpy.array([True, False, True]),
    "complex": lambda: numpy.array([1 + 2j, complex(numpy.nan, -0.0)]),
    "complex of half the size": lambda: numpy.array([1j], dtype="c8"),
    "halves": lambda: numpy.array([0.5, -0.0], dtype="f2"),
    "long doubles": lambda: numpy.array([1.5], dtype=numpy.longdouble),
    "bytes": lambda: numpy.arange(256, dtype="u1"),
    "other end first": lambda: numpy.arange(5, dtype=">i4"),
    "every other": lambda: numpy.arange(20)[::2],
    "backwards": lambda: numpy.arange(20)[::-1],
    "a part": lambda: numpy.arange(100).reshape(10, 10)[2:5, 3:9:2],
    "many dimensions": lambda: numpy.arange(64, dtype="i1").reshape((2,) * 6),
    "repeated": lambda: numpy.broadcast_to(numpy.arange(3), (4, 3)),
    "big": lambda: numpy.arange(50_000, dtype="f4").reshape(100, 500),
    "big and columns first": lambda: numpy.asfortranarray(numpy.arange(50_000.0).reshape(100, 500)),
}


@needs_numpy
@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS.keys())
def test_an_array_comes_back_as_an_array_when_the_annotation_says_so(make):
    def named() -> numpy.ndarray:
        return make()

    came, was = sandboxed(named)(), make()
    assert type(came) is numpy.ndarray
    assert (came.dtype, came.shape) == (was.dtype, was.shape)
    assert came.tobytes() == was.tobytes()
    assert not came.flags.writeable


@needs_numpy
@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS.keys())
def test_an_array_comes_back_as_a_buffer_otherwise(make):
    came, was = sandboxed(make)(), make()
    assert type(came) is Buffer
    seen = numpy.asarray(came)
    assert (seen.dtype, seen.shape) == (was.dtype, was.shape)
    assert seen.tobytes() == was.tobytes()
    assert not seen.size or numpy.shares_memory(seen, numpy.asarray(came))


@needs_numpy
def test_an_array_in_a_record_and_in_a_generic_annotation():
    def listed() -> list[numpy.typing.NDArray[numpy.float64]]:
        return [numpy.arange(3.0)]

    (came,) = sandboxed(listed)()
    assert type(came) is numpy.ndarray
    assert came.tolist() == [0, 1, 2]


@needs_numpy
def test_an_array_outlives_its_call_unchanged():
    def big() -> numpy.ndarray:
        return numpy.full(100_000, 7)

    kept = sandboxed(big)()
    for _ in range(3):
        sandboxed(big)()
    assert (kept == 7).all()


@needs_numpy
@pytest.mark.parametrize(
    "make",
    [
        lambda: numpy.array([object()]),
        lambda: numpy.array([None, "a"], dtype=object),
        lambda: numpy.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
        lambda: numpy.array(["a", "bc"]),
        lambda: numpy.array([b"a"]),
        lambda: numpy.array(["2020-01-01"], dtype="M8[D]"),
        lambda: numpy.zeros(2, dtype="V4"),
    ],
    ids=["objects", "mixed", "records", "text", "bytes", "dates", "void"],
)
def test_arrays_of_anything_but_numbers_are_refused(make):
    def named() -> list[numpy.ndarray]:
        return [make()]

    assert carried(named).startswith("result[0]: <class 'numpy.ndarray'> cannot leave a compartment; ")


@needs_numpy
def test_a_single_number_of_numpy_is_refused_with_its_remedy():
    assert carried(lambda: [numpy.float64(1.5)]).endswith("use .item()")


# ------------------------------------------------------------------------------------------------------ files and directories


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "file.txt"
    made.write_text("content")
    return made


@pytest.mark.parametrize(("mode", "came_mode"), [("rb", "rb"), ("r+b", "rb+"), ("ab", "ab")])
def test_a_file_comes_back_as_what_it_is(path, mode, came_mode):
    with open(path, mode) as file:
        came = back(file)
        with came:
            assert came.mode in (came_mode, came_mode.replace("a", "w"))
            assert os.fstat(came.fileno()).st_ino == path.stat().st_ino
            assert came.readable() is ("b" in mode and mode != "ab")
            assert came.writable() is (mode != "rb")


def test_a_file_comes_back_at_the_place_where_it_was_left(path):
    with open(path, "rb") as file:
        with sandboxed(lambda f: (f.seek(3), f)[1])(file) as came:
            assert came.read() == b"tent"
        assert file.read() == b"content"


def test_a_text_file_comes_back_with_its_encoding(tmp_path):
    path = tmp_path / "koi8.txt"
    path.write_bytes("привет".encode("koi8-r"))
    with open(path, encoding="koi8-r") as file:
        with back(file) as came:
            assert isinstance(came, io.TextIOWrapper)
            assert came.read() == "привет"


def test_a_file_that_was_granted_for_reading_comes_back_for_reading(path):
    with open(path, "r+b") as file:
        f = sandboxed(lambda f: f, grants=[grant.descriptor(file, rights.mode_rights("r"))])
        with f(file) as came:
            assert came.mode == "rb"
            with pytest.raises(io.UnsupportedOperation):
                came.write(b"x")


def test_files_come_back_anywhere_in_a_value(path):
    with open(path, "rb") as one, open(path, "rb") as two:
        came = sandboxed(lambda a, b: {"files": [a, (b,)], "n": 1})(one, two)
        first, second = came["files"][0], came["files"][1][0]
        with first, second:
            assert (first.read(), second.read()) == (b"content", b"content")


def test_a_file_that_was_not_handed_over_cannot_come_back(path):
    with open(path, "rb") as captured:
        assert captured.fileno()
        with pytest.raises(EncodeError, match=r"result: <class '_io.BufferedReader'> cannot leave"):
            sandboxed(lambda: captured)()


@pytest.mark.parametrize("what", ["a pipe", "a socket", "its own standard output"])
def test_what_is_no_file_or_directory_is_refused_inside(what):
    def make():
        import socket
        import sys

        if what == "a pipe":
            return os.fdopen(os.pipe()[0], "rb")
        return socket.socketpair()[0] if what == "a socket" else sys.stdout

    with pytest.raises(EncodeError, match="cannot leave a compartment"):
        sandboxed(make)()


def test_a_closed_file_is_refused(path):
    with open(path, "rb") as file:
        with pytest.raises(EncodeError, match="cannot leave a compartment"):
            sandboxed(lambda f: f.close() or f)(file)


def test_a_value_that_breaks_the_protocol_after_a_file_leaves_nothing_open(path):
    def lies(f):
        from compart import _fast

        _fast.send_fds(481, b"D", [f.fileno()] * 3)
        return 1

    with open(path, "rb") as file:
        with pytest.raises(
            ProtocolError, match=r"announced 0 descriptors and sent 3|a descriptor that its value does not name"
        ):
            sandboxed(lies)(file)


needs_namespaces = pytest.mark.skipif(
    not compart.enforcement()["namespaces"].up, reason="a directory needs a mount of its own"
)


@needs_namespaces
@pytest.mark.parametrize("mode", ["r", "rw"])
def test_a_directory_comes_back_for_reading(path, mode):
    with Directory(path.parent, mode) as directory:
        with back([directory])[0] as came:
            assert type(came) is Directory
            assert came.mode == "r"
            assert came.read_text("file.txt") == "content"
            with pytest.raises(NotCapableError):
                came.write_text("file.txt", "changed")
            with pytest.raises((NotCapableError, FileNotFoundError)):
                came.read_text("../file.txt")
            assert stat.S_ISDIR(os.fstat(came.fileno()).st_mode)


@needs_namespaces
def test_a_directory_of_a_directory_comes_back(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("deep")
    with Directory(tmp_path) as directory:
        with sandboxed(lambda d: d.directory("inner"))(directory) as came:
            assert came.read_text("file") == "deep"
            with pytest.raises(NotCapableError):
                came.directory("..")
