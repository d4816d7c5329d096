"""Values over the wire: what passes comes back as it was, and what does not is refused for the stated reason."""

import array
import copy
import ctypes
import dataclasses
import datetime
import decimal
import enum
import gc
import math
import pickle
import random
import struct
import tracemalloc
import uuid
import weakref
import zoneinfo
from decimal import Decimal
from typing import Any, NamedTuple

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compart._fast import Buffer, FastError, Malformed, Registry, TooLarge, Unencodable, copy_into, decode, encode
from tests.unit import codec_twin
from tests.unit.codec_twin import Refused, Tag, size

MiB = 1 << 20
UTC = datetime.UTC
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


class Color(enum.Enum):
    RED = 1
    GREEN = 2
    CRIMSON = 1  # noqa: PIE796


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 9


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: object = None


@dataclasses.dataclass
class Record:
    name: str
    rows: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    value: object


TYPES = (Color, Level, Access, Point, Record, Frozen)
REGISTRY = Registry(TYPES)


def there(value: object, **options: Any) -> bytes:
    return encode(value, REGISTRY, MiB, **options)


def back(body: bytes, **options: Any) -> Any:
    return decode(body, REGISTRY, memory=64 * MiB, **options)


def picture(value: Any) -> Any:
    """What must survive: type, order, sign of zero, bits of a NaN, fold, zone. Equal values may differ in it."""
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return kind, [picture(getattr(value, name)) for name in codec_twin.fields_of(kind)]
    if isinstance(value, (list, tuple)):
        return kind, [picture(item) for item in value]
    if isinstance(value, dict):
        return kind, [(picture(key), picture(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(repr(picture(item)) for item in value)
    if isinstance(value, complex):
        return kind, struct.pack("dd", value.real, value.imag)
    if isinstance(value, float):
        return kind, struct.pack("d", value)
    if isinstance(value, decimal.Decimal):
        return kind, value.as_tuple()
    if isinstance(value, (datetime.datetime, datetime.time)):
        return kind, repr(value), value.fold
    return kind, value, getattr(value, "is_safe", None)


def same(one: Any, other: Any) -> bool:
    return bool(picture(one) == picture(other))


VALUES: list[Any] = [
    None,
    True,
    False,
    *(
        sign * ((1 << bits) + step)
        for bits in (0, 7, 8, 15, 16, 31, 32, 63, 64, 71, 4000)
        for step in (-1, 0, 1)
        for sign in (1, -1)
    ),
    0.0,
    -0.0,
    math.inf,
    math.nan,
    struct.unpack("<d", b"\x01\x02\x03\x04\x05\x06\xf8\x7f")[0],
    5e-324,
    1 - 2j,
    complex(-0.0, math.inf),
    "",
    "a",
    "é",
    "€" * 300,
    "😀",
    "\ud800 alone",
    "\ud83d\ude00",
    "nul\0",
    b"",
    b"\0\xff" * 200,
    bytearray(b"mutable"),
    [],
    [[], [[]], ()],
    (),
    (1, (2, [3])),
    {},
    {"b": 1, "a": {"b": 2}},
    {None: 1, (1, "x"): 2, 2.5: 3, b"k": 4, frozenset({1}): 5, True: 6, 10**30: 7},
    {i: str(i) for i in range(1000)},
    {f"key {i}": i for i in range(5000)},
    {"first a string": 0, **{i: i for i in range(500)}},
    set(),
    {1, "a", None},
    set(range(3000)),
    frozenset({frozenset(), ()}),
    frozenset(map(str, range(300))),
    datetime.date.min,
    datetime.date.max,
    datetime.time(23, 59, 59, 999999, fold=1),
    datetime.time(1, tzinfo=UTC),
    datetime.datetime.min,
    datetime.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN, fold=1),
    datetime.datetime(2024, 2, 29, tzinfo=datetime.timezone(datetime.timedelta(hours=-3, microseconds=1), "ÄÖ")),
    datetime.timedelta.min,
    datetime.timedelta.max,
    datetime.timedelta(-1, 1, 1),
    UTC,
    BERLIN,
    *map(Decimal, ["0", "-0", "1.50", "1E+5", "1E-400", "-Infinity", "NaN", "-NaN12", "sNaN", "9" * 3000, "0E+9"]),
    uuid.UUID(int=5),
    uuid.uuid1(),
    Color.RED,
    Color.CRIMSON,
    Level.HIGH,
    Access.WRITE,
    Point(1),
    Point(1, [Point(2, "x")]),
    Record("name", [1, 2]),
    Frozen({Color.GREEN: Frozen(None)}),
    {Color.RED: 1, Level.LOW: 2, Point(1, 2): 3},
    {Access.READ},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:40])
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert same(back(there(value)), value)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:40])
def test_both_codecs_read_what_the_other_wrote(value: Any) -> None:
    assert same(codec_twin.Decoder(TYPES).decode(there(value)), value)
    assert same(back(codec_twin.Encoder(TYPES).encode(value)), value)


def test_same_would_see_a_difference() -> None:
    for one, other in [(True, 1), (0.0, -0.0), ([1], (1,)), ({1: 2, 3: 4}, {3: 4, 1: 2}), ({1}, {1.0})]:
        assert not same(one, other)


LEAVES = [
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(exclude_categories=())),
    st.binary(),
    st.dates(),
    st.times(),
    st.datetimes(timezones=st.sampled_from([None, UTC, BERLIN])),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.sampled_from(Color),
]
# Deferred, or hypothesis would write all of it into the representation of every strategy made from it.
LEAF: st.SearchStrategy[Any] = st.deferred(lambda: st.one_of(LEAVES))
KEY: st.SearchStrategy[Any] = st.deferred(
    lambda: st.one_of(LEAF, st.lists(LEAF, max_size=3).map(tuple), st.frozensets(LEAF, max_size=3))
)
ANYTHING = st.recursive(
    st.one_of(KEY, st.binary().map(bytearray)),
    lambda values: st.one_of(
        st.lists(values),
        st.lists(values).map(tuple),
        st.dictionaries(KEY, values),
        st.sets(KEY, max_size=4),
        st.builds(Point, values, values),
        st.builds(Record, values, values),
    ),
    max_leaves=30,
)


@settings(max_examples=150, deadline=None)
@given(ANYTHING)
def test_anything_of_the_closed_set_passes(value: Any) -> None:
    assert same(back(there(value)), value)
    assert same(codec_twin.Decoder(TYPES).decode(there(value)), value)
    assert same(back(codec_twin.Encoder(TYPES).encode(value)), value)


# ------------------------------------------------------------------------------------------------- refused to leave


class Int(int): ...


class Text(str): ...


class Bytes(bytes): ...


class Rows(list[int]): ...


class Wild(enum.Enum):
    X = 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (object(), "type object cannot be sent"),
        (len, "builtin_function_or_method"),
        (Int(1), "Int is not int itself"),
        (Text("x"), "Text is not str itself"),
        (Bytes(b"x"), "Bytes is not bytes itself"),
        (Rows(), "Rows is not list itself"),
        (Wild.X, "Wild can be sent only if the function's annotation names it"),
        (numpy.float64(1), r"numpy scalar \(float64\); use .item\(\)"),
        (numpy.int32(1), r"numpy scalar \(int32\); use .item\(\)"),
        (numpy.ma.masked_array([1]), "more than its array"),
        (numpy.array([None]), "format 'O'"),
        (numpy.zeros(2, "i4,f8"), "not plain numbers"),
        (numpy.array(["text"]), "not plain numbers"),
        (numpy.array(["2024-01-01"], "M8[D]"), "does not export its memory"),
        ((ctypes.c_void_p * 2)(), "not plain numbers"),
        (Frozen(object()), "type object cannot be sent"),
        ({Frozen(1): 1}, "hashes with code of its own"),
        ({memoryview(b"x"): 1}, "buffer cannot be a dictionary key"),
        (datetime.time(tzinfo=type("Zone", (datetime.tzinfo,), {})()), "Zone"),
        (Decimal("9" * 70000), "Decimal of more than"),
        (object.__new__(Record), "is not set"),
    ],
)
def test_what_is_outside_the_set_is_not_sent(value: object, reason: str) -> None:
    with pytest.raises(Unencodable, match=reason) as caught:
        there([value])
    assert caught.value.reason == str(caught.value)
    assert isinstance(caught.value, TypeError)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_depth_is_bounded_on_both_sides() -> None:
    assert same(back(there(nested(256))), nested(256))
    with pytest.raises(Unencodable, match="nested deeper than 256 levels"):
        there(nested(257))
    deep_key: Any = ()
    for _ in range(300):
        deep_key = (deep_key,)
    with pytest.raises(Unencodable, match="nested deeper"):
        there({deep_key: 1})
    for tag in (Tag.LIST, Tag.TUPLE):
        with pytest.raises(Malformed, match="nested deeper than 256 levels"):
            back(bytes([tag, 1]) * 257 + bytes([Tag.NONE]))
    with pytest.raises(Malformed, match="nested deeper than 2 levels"):
        back(there([[[]]]), depth=2)
    assert back(there([[]]), depth=2) == [[]]


def test_a_cycle_is_not_sent() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(Unencodable, match="nested deeper"):
        there(cycle)


def test_the_limit_is_exact_and_counts_what_travels_beside() -> None:
    value = ["x" * 100, {"k": 1}, b"y" * 900]
    length = len(there(value))
    assert len(encode(value, REGISTRY, length)) == length
    with pytest.raises(TooLarge) as caught:
        encode(value, REGISTRY, length - 1)
    assert caught.value.limit == length - 1 < caught.value.size
    beside: list[Any] = []
    inside = len(there(value, inline=500, buffers=beside))
    assert len(beside) == 1
    encode(value, REGISTRY, inside + 900, inline=500, buffers=[])
    with pytest.raises(TooLarge):
        encode(value, REGISTRY, inside + 899, inline=500, buffers=beside)
    assert len(beside) == 1  # a refused value leaves nothing behind


def test_a_value_that_doubles_at_every_level_stops_at_the_limit() -> None:
    value: list[Any] = []
    for _ in range(100):
        value = [value, value]
    with pytest.raises(TooLarge):
        there(value)


def test_a_list_that_changes_under_the_encoder_is_not_sent() -> None:
    for shrink in (list.clear, lambda rows: rows.append(1)):
        rows: list[Any] = [object(), *range(50)]

        def describe(found: object, rows: list[Any] = rows, shrink: Any = shrink) -> tuple[str, None]:
            shrink(rows)
            return "thing", None

        with pytest.raises(Unencodable, match="changed"):
            there(rows, describe=describe)


def test_a_dict_that_changes_under_the_encoder_is_not_sent() -> None:
    table: dict[Any, Any] = {i: object() for i in range(50)}

    def describe(found: object) -> tuple[str, None]:
        table.pop(next(reversed(table)))
        return "thing", None

    with pytest.raises(Unencodable, match="changed"):
        there(table, describe=describe)


# ------------------------------------------------------------------------------------------------- refused to enter


def tagged(tag: Tag, *parts: bytes) -> bytes:
    return bytes([tag]) + b"".join(parts)


NONE = bytes([Tag.NONE])
ONE = there(1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "ends early"),
        (b"\xff", "unknown tag 255"),
        (bytes([len(Tag)]), "unknown tag"),
        (NONE + NONE, "1 bytes after the value"),
        (tagged(Tag.STR, size(5), b"four"), "ends early"),
        (tagged(Tag.STR, size(2), b"\xc3\x28"), "not a value.*utf-8"),
        (tagged(Tag.STR, b"\xfd\x05\x00", b"hello"), "size in the wrong form"),
        (tagged(Tag.STR, b"\xff" + b"\xff" * 8), "size in the wrong form"),
        (tagged(Tag.LIST, size(1 << 40)), "ends early"),
        (tagged(Tag.TUPLE, size(2), NONE), "ends early"),
        (tagged(Tag.DICT, size(2), NONE * 3), "ends early"),
        (tagged(Tag.INT16, struct.pack("=h", 255)), "int in the wrong form"),
        (tagged(Tag.INT32, struct.pack("=i", -1)), "int in the wrong form"),
        (tagged(Tag.INT64, struct.pack("=q", 1 << 30)), "int in the wrong form"),
        (tagged(Tag.INT, size(1), b"\x01"), "int in the wrong form"),
        (tagged(Tag.INT, size(12), b"\x01" * 9 + b"\0" * 3), "int in the wrong form"),
        (tagged(Tag.REF, size(0)), "reference to no string"),
        (
            tagged(Tag.LIST, size(2), tagged(Tag.NAME, size(1), b"a"), tagged(Tag.REF, size(1))),
            "reference to no string",
        ),
        (tagged(Tag.DICT, size(1), there([]), NONE), "cannot be hashed"),
        (tagged(Tag.DICT, size(1), there({}), NONE), "cannot be hashed"),
        (tagged(Tag.DICT, size(1), there(([],)), NONE), "cannot be hashed"),
        (tagged(Tag.SET, size(1), there(bytearray())), "cannot be hashed"),
        (tagged(Tag.SET, size(1), there(memoryview(b""))), "cannot be hashed"),
        (tagged(Tag.SET, size(1), there(Frozen(1))), "as a key or set member|cannot be hashed"),
        (tagged(Tag.FROZENSET, size(1), there({1})), "cannot be hashed"),
        (tagged(Tag.SET, size(1), there(Decimal("sNaN"))), "not a value.*sNaN|signaling"),
        (tagged(Tag.DICT, size(2), there("a"), NONE, there("a"), NONE), "key comes twice"),
        (tagged(Tag.DICT, size(2), there(1), NONE, there(True), NONE), "key comes twice"),
        (tagged(Tag.DICT, size(100), *(there(i % 99) + NONE for i in range(100))), "key comes twice"),
        (tagged(Tag.SET, size(2), ONE, ONE), "member of a set comes twice"),
        (tagged(Tag.SET, size(100), *(there(i % 99) for i in range(100))), "member of a set comes twice"),
        (tagged(Tag.DATE, struct.pack("=HBB", 2023, 2, 29)), "not a value"),
        (tagged(Tag.TIME, struct.pack("=BBBBI", 24, 0, 0, 0, 0), NONE), "not a value"),
        (tagged(Tag.TIME, struct.pack("=BBBBI", 0, 0, 0, 2, 0), NONE), "not a value"),
        (tagged(Tag.TIME, struct.pack("=BBBBI", 0, 0, 0, 0, 1 << 31), NONE), "microsecond"),
        (tagged(Tag.TIME, bytes(8), ONE), "time zone that is none"),
        (tagged(Tag.TIMEDELTA, struct.pack("=iii", 0, 86400, 0)), "timedelta in the wrong form"),
        (tagged(Tag.TIMEDELTA, struct.pack("=iii", 2**31 - 1, 0, 0)), "not a value"),
        (tagged(Tag.TIMEZONE, struct.pack("=iii", 1, 0, 0), NONE), "not a value"),
        (tagged(Tag.TIMEZONE, struct.pack("=iii", 0, 1, 0), ONE), "no string"),
        (tagged(Tag.ZONE, size(13), b"../etc/passwd"), "not the key of a time zone"),
        (tagged(Tag.ZONE, size(11), b"/etc/passwd"), "not the key of a time zone"),
        (tagged(Tag.ZONE, size(13), b"Nowhere/City1"), "not a value"),
        (tagged(Tag.DECIMAL, size(4), b"1_00"), "not a Decimal"),
        (tagged(Tag.DECIMAL, size(3), b"1e5"), "not a Decimal"),
        (tagged(Tag.DECIMAL, size(4), b"1E+0"), "Decimal in the wrong form"),
        (tagged(Tag.DECIMAL, size(24), b"1E+99999999999999999999 "[:23] + b"9"), "not a value|wrong form"),
        (tagged(Tag.DECIMAL, size(70000), b"9" * 70000), "not a Decimal"),
        (tagged(Tag.UUID, bytes(16), b"\x03"), "UUID in the wrong form"),
        (tagged(Tag.ENUM, size(99), there("RED")), "not registered"),
        (tagged(Tag.ENUM, size(0), there("BLUE")), "no member of"),
        (tagged(Tag.ENUM, size(0), ONE), "no member of"),
        (tagged(Tag.ENUM, size(3), there("RED")), "sent as something else"),
        (tagged(Tag.NAMEDTUPLE, size(3), there((1,))), "with 1 fields"),
        (tagged(Tag.NAMEDTUPLE, size(3), there([1, 2])), "without fields"),
        (tagged(Tag.DATACLASS, size(4), there((1, 2, 3))), "with 3 fields"),
        (tagged(Tag.BYTES_OUT, size(3)), "more out-of-band contents"),
        (tagged(Tag.CAPABILITY, size(4), b"file", NONE), "capability where none is expected"),
        (tagged(Tag.BUFFER, b"\x04\x00", size(1), b"B", size(0)), "buffer in the wrong form"),
        (tagged(Tag.BUFFER, b"\x00\x21", size(1), b"B", b"\x01" * 33, size(1), b"x"), "buffer in the wrong form"),
        (tagged(Tag.BUFFER, b"\x00\x01", size(1), b"O", size(1), size(8), bytes(8)), "not the format"),
        (tagged(Tag.BUFFER, b"\x00\x01", size(1), b"d", size(2), size(8), bytes(8)), "8 bytes are not shape"),
        (tagged(Tag.BUFFER, b"\x00\x02", size(1), b"d", size(1 << 61), size(8), size(0)), "too large"),
        (tagged(Tag.BUFFER, b"\x00\x03", size(1), b"d", size(0), size(1 << 60), size(1 << 60), size(0)), "too large"),
        (tagged(Tag.BUFFER, b"\x02\x01", size(1), b"B", size(4), size(4)), "more out-of-band contents"),
    ],
)
def test_a_malformed_message_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(Malformed, match=message):
        back(body)
    with pytest.raises(Refused):
        codec_twin.Decoder(TYPES).decode(body)


def test_every_prefix_of_a_message_is_refused() -> None:
    body = there(VALUES[40:])
    for end in range(0, len(body), 97):
        with pytest.raises(Malformed, match="ends early"):
            back(body[:end])


def test_names_are_numbered_up_to_a_bound() -> None:
    table = {f"name {i}": i for i in range(5000)}
    assert back(there([table, table])) == [table, table]
    names = b"".join(tagged(Tag.NAME, size(4), b"%04d" % i) for i in range(4097))
    with pytest.raises(Malformed, match="more than 4096 numbered strings"):
        back(tagged(Tag.LIST, size(4097), names))


def test_a_string_used_often_travels_once() -> None:
    rows = [{"a rather long field name": i} for i in range(100)]
    assert len(there(rows)) < 100 * 10
    keys = [next(iter(row)) for row in back(there(rows))]
    assert all(key is keys[0] for key in keys)


# ------------------------------------------------------------------------------------------------- memory and time


@pytest.mark.parametrize(
    "value",
    [
        [[] for _ in range(3000)],
        [{} for _ in range(3000)],
        [(i,) for i in range(3000)],
        [{"k": i, "l": None} for i in range(3000)],
        [{i} for i in range(1000)],
        [set(range(i)) for i in range(100)],
        [dict.fromkeys(range(i)) for i in range(100)],
        {str(i): i for i in range(6000)},
        set(range(6000)),
        [1 << 40] * 3000,
        [float(i) for i in range(3000)],
        [f"{i}" for i in range(3000)],
        ["a" * 999 + chr(0x10000 + i) for i in range(50)],
        ["é" * 1000 + str(i) for i in range(50)],
        [b"%d" % i for i in range(3000)],
        [bytearray(b"%d" % i) for i in range(3000)],
        [10**500 + i for i in range(300)],
        [datetime.datetime(2024, 1, 1, second=i % 60) for i in range(3000)],
        [Decimal(i) / 7 for i in range(300)],
        [uuid.UUID(int=i) for i in range(300)],
        [Record("n", []) for i in range(1000)],
        [Point(i, i) for i in range(1000)],
        [memoryview(b"1234") for i in range(300)],
    ],
    ids=lambda value: repr(value)[:30],
)
def test_the_memory_of_a_value_is_counted_before_it_is_taken(value: Any) -> None:
    body = there(value)
    back(body)
    gc.collect()
    tracemalloc.start()
    try:
        kept = back(body)
        taken = tracemalloc.get_traced_memory()[0]
        del kept
    finally:
        tracemalloc.stop()
    # What the count allows is no less than what the objects take ...
    with pytest.raises(Malformed, match=f"more than {taken * 9 // 10} bytes of memory"):
        decode(body, REGISTRY, memory=taken * 9 // 10)
    # ... and not so much more that an honest value would be refused.
    decode(body, REGISTRY, memory=taken * 3 + 4096)


def test_the_memory_is_not_taken_when_it_is_refused() -> None:
    body = tagged(Tag.LIST, size(1 << 22), NONE * (1 << 22))
    tracemalloc.start()
    try:
        with pytest.raises(Malformed, match="more than 1048576 bytes of memory"):
            decode(body, REGISTRY, memory=MiB)
        assert tracemalloc.get_traced_memory()[1] < MiB
    finally:
        tracemalloc.stop()


MODULUS = (1 << 61) - 1  # of the hashes of numbers, sys.hash_info


@pytest.mark.parametrize("kind", [dict.fromkeys, set, frozenset])
def test_keys_of_one_hash_are_refused(kind: Any) -> None:
    assert back(there(kind(i * MODULUS for i in range(32)))) == kind(i * MODULUS for i in range(32))
    with pytest.raises(Malformed, match="chosen to collide"):
        back(there(kind(i * MODULUS for i in range(100))))
    with pytest.raises(Malformed, match="chosen to collide"):
        back(there(kind((i * MODULUS,) for i in range(100))))


def test_frozensets_as_keys_are_held_tighter() -> None:
    # To compare two frozensets of many equal hashes takes the square of their length, at every level of nesting.
    for count, accepted in [(4, True), (5, False)]:
        body = there({frozenset(i * MODULUS for i in range(count)): 1})
        if accepted:
            assert back(body) == {frozenset(i * MODULUS for i in range(count)): 1}
        else:
            with pytest.raises(Malformed, match="chosen to collide"):
                back(body)
    value: Any = frozenset({1})
    for _ in range(3):
        value = frozenset({value, 2})
    assert same(back(there(value)), value)
    with pytest.raises(Unencodable, match="more than 3 frozensets in each other"):
        there({value})
    with pytest.raises(Malformed, match="more than 3 frozensets in each other"):
        back(tagged(Tag.SET, size(1), there(value)))
    with pytest.raises(Refused):
        codec_twin.Decoder(TYPES).decode(tagged(Tag.SET, size(1), there(value)))


def steered(slots: int, run: int, steered: int) -> list[int]:
    """Keys of different hashes that take a dict of `slots` slots a long walk each.

    `run` small ones lie on consecutive places of the sequence i -> 5i + 1 that every probing ends in; the others find
    their first thirteen places taken and then walk along that run (Objects/dictobject.c).
    """
    mask = slots - 1
    places = [0]
    while len(places) < run:
        places.append((5 * places[-1] + 1) & mask)
    taken = numpy.zeros(slots, bool)
    taken[places] = True
    keys = numpy.random.default_rng(1).integers(slots, MODULUS, 1_000_000, dtype=numpy.uint64)
    at, perturb = keys & numpy.uint64(mask), keys.copy()
    for _ in range(14):
        kept = taken[at]
        keys, at, perturb = keys[kept], at[kept], perturb[kept] >> numpy.uint64(5)
        at = (at * numpy.uint64(5) + perturb + numpy.uint64(1)) & numpy.uint64(mask)
    assert len(keys) >= steered
    return places + keys[:steered].tolist()


def test_keys_of_different_hashes_that_walk_far_are_refused() -> None:
    keys = steered(1 << 14, 10000, 900)
    assert len(set(map(hash, keys))) == len(keys) == 10900
    with pytest.raises(Malformed, match="chosen to collide"):
        back(there(dict.fromkeys(keys)))


@pytest.mark.parametrize("kind", [dict.fromkeys, set, frozenset])
@pytest.mark.parametrize(
    "key",
    [
        lambda i: i,
        lambda i: -i,
        lambda i: i << 12,
        lambda i: i << 32,
        lambda i: i << 45,
        lambda i: i * 1000003,
        lambda i: i / 2,
        lambda i: i * 2.0**40,
        lambda i: i / 1024,
        lambda i: 1 / (i + 1),
        lambda i: str(i),
        lambda i: (i, i + 1),
        lambda i: (i % 100, i // 100),
        lambda i: bytes([i % 256, i // 256]),
        lambda i: datetime.date.fromordinal(700000 + i),
        lambda i: Decimal(i) / 4,
        lambda i: uuid.UUID(int=i << 64),
        lambda i: frozenset({i}),
        lambda i: complex(i, i),
    ],
)
def test_honest_keys_are_not_taken_for_a_flood(kind: Any, key: Any) -> None:
    value = kind([key(i) for i in range(9000)])
    assert encode(back(there(value)), REGISTRY, MiB) is not None
    assert back(there(value)) == value


# ------------------------------------------------------------------------------------------------- no code of the class


class Trap(Exception): ...


def spring(*_: object, **__: object) -> Any:
    raise Trap


def test_no_code_of_a_registered_class_runs() -> None:
    class Loud(enum.Enum):
        A = 1

        @classmethod
        def _missing_(cls, value: object) -> Any:
            raise Trap

    @dataclasses.dataclass
    class Armed:
        x: int

    class Tuple(NamedTuple):
        x: int

    registry = Registry((Loud, Armed, Tuple))
    body = encode([Armed(1), Tuple(2), Loud.A], registry, MiB)
    for cls in (Armed, Tuple):
        for name in (
            "__init__",
            "__new__",
            "__setattr__",
            "__post_init__",
            "__setstate__",
            "__reduce__",
            "__getattribute__",
        ):
            setattr(cls, name, spring)
    armed, pair, loud = decode(body, registry, memory=MiB)
    assert (object.__getattribute__(armed, "x"), tuple.__getitem__(pair, 0), loud) == (1, 2, Loud.A)
    with pytest.raises(Trap):
        armed.y = 1
    with pytest.raises(Malformed, match="no member"):
        decode(encode(Loud.A, registry, MiB).replace(b"A", b"B"), registry, memory=MiB)


def test_a_half_sent_record_is_never_made() -> None:
    @dataclasses.dataclass
    class Closing:
        x: int
        y: int

        def __del__(self) -> None:
            made.append(self)

    made: list[Any] = []
    registry = Registry((Closing,))
    body = encode(Closing(1, 2), registry, MiB)
    made.clear()
    with pytest.raises(Malformed):
        decode(body[:-1], registry, memory=MiB)
    assert made == []


def test_a_registry_takes_only_what_can_be_rebuilt_without_its_code() -> None:
    @dataclasses.dataclass
    class Table(dict[str, int]):
        x: int

    @dataclasses.dataclass
    class Watched:
        x: int

    Watched.x = property(lambda self: 1, spring)  # type: ignore[assignment]
    for cls, message in [
        (int, "neither"),
        (Table, "derives from dict"),
        (Watched, "set by code"),
        ("text", "not a type"),
    ]:
        with pytest.raises(TypeError, match=message):
            Registry((cls,))  # type: ignore[arg-type]


def test_a_namedtuple_with_a_hash_of_its_own_is_no_key() -> None:
    class Sly(NamedTuple):
        x: int

    Sly.__hash__ = spring  # type: ignore[method-assign, assignment]
    registry = Registry((Sly,))
    item = encode(Sly(1), registry, MiB)
    assert decode(item, registry, memory=MiB) == (1,)
    with pytest.raises(Malformed, match="as a key or set member"):
        decode(tagged(Tag.SET, size(1), item), registry, memory=MiB)
    with pytest.raises(Malformed, match="as a key or set member"):
        decode(tagged(Tag.SET, size(1), tagged(Tag.TUPLE, size(1), item)), registry, memory=MiB)


# ------------------------------------------------------------------------------------------------- capabilities


class Handle:
    def __init__(self, number: int) -> None:
        self.number = number


def describe(found: object) -> tuple[str, object] | None:
    return ("handle", {"number": found.number}) if isinstance(found, Handle) else None


def test_a_capability_travels_by_kind() -> None:
    body = there([Handle(3), "x"], describe=describe)
    seen = back(body, attach=lambda kind, meta: (kind, meta))
    assert seen == [("handle", {"number": 3}), "x"]
    assert codec_twin.Decoder(TYPES, attach=lambda kind, meta: (kind, meta)).decode(body) == seen
    with pytest.raises(Malformed, match="none is expected"):
        back(body)
    with pytest.raises(Unencodable, match="Handle cannot be sent"):
        there([Handle(3)])
    with pytest.raises(Unencodable, match="object"):
        there(object(), describe=describe)


def test_a_capability_is_no_key_and_holds_none() -> None:
    with pytest.raises(Unencodable, match="Handle"):
        there({Handle(1): 1}, describe=describe)
    with pytest.raises(Unencodable, match="Handle"):
        there(Handle(1), describe=lambda found: ("handle", Handle(2)))
    inner = tagged(Tag.CAPABILITY, size(1), b"a", NONE)
    with pytest.raises(Malformed, match="none is expected"):
        back(tagged(Tag.CAPABILITY, size(1), b"a", inner), attach=lambda kind, meta: None)
    with pytest.raises(Malformed, match="cannot be hashed"):
        back(tagged(Tag.SET, size(1), inner), attach=lambda kind, meta: None)


def test_what_attach_raises_is_a_refusal() -> None:
    with pytest.raises(Malformed) as caught:
        back(there(Handle(1), describe=describe), attach=spring)
    assert isinstance(caught.value.__cause__, Trap)


# ------------------------------------------------------------------------------------------------- buffers


def test_large_contents_travel_beside_the_body() -> None:
    beside: list[Any] = []
    value = [b"a" * 100_000, bytearray(b"b" * 70_000), numpy.arange(20_000), b"small", "text" * 50_000]
    body = there(value, buffers=beside)
    assert [memoryview(buffer).nbytes for buffer in beside] == [100_000, 70_000, 160_000]
    assert beside[0] is value[0]
    seen = back(body, buffers=beside)
    assert seen[:2] == value[:2]
    assert type(seen[1]) is bytearray
    assert numpy.asarray(seen[2]).tolist() == value[2].tolist()
    assert same(codec_twin.Decoder(TYPES, beside).decode(body)[:2], value[:2])


@pytest.mark.parametrize("wrong", [[], [b"x" * 99], [b"x" * 101], [b"x" * 100] * 2, ["text"]])
def test_out_of_band_buffers_must_fit(wrong: list[Any]) -> None:
    body = there(b"x" * 100, inline=100, buffers=[])
    assert back(body, buffers=[b"y" * 100]) == b"y" * 100
    with pytest.raises(Malformed):
        back(body, buffers=wrong)


def test_out_of_band_bytes_are_copied_and_buffers_are_not() -> None:
    memory = bytearray(b"0" * 8)
    text = back(there(b"1" * 8, inline=8, buffers=[]), buffers=[memory])
    view = back(there(memoryview(b"1" * 8), inline=8, buffers=[]), buffers=[memory])
    memory[0:1] = b"9"
    assert text == b"00000000"
    assert view == b"90000000"
    with pytest.raises(BufferError):
        memory.clear()  # the view holds it


def test_a_buffer_beside_the_body_cannot_be_resized_before_it_is_sent() -> None:
    beside: list[Any] = []
    data = bytearray(100)
    there(data, inline=10, buffers=beside)
    with pytest.raises(BufferError):
        data.append(1)
    beside.clear()
    data.append(1)


@pytest.mark.parametrize(
    "exporter",
    [
        numpy.arange(12, dtype="f8").reshape(3, 4),
        numpy.arange(12, dtype="i2").reshape(3, 4).T,
        numpy.arange(24, dtype="u4").reshape(2, 3, 4)[:, ::2, ::-1],
        numpy.zeros((3, 0, 2)),
        numpy.array(2.5),
        numpy.array([True, False]),
        numpy.array([1, 2], "f2"),
        numpy.array([1 + 2j], "c16"),
        numpy.array([1, 2], ">i4"),
        array.array("d", [1.5, 2.5]),
        memoryview(b"bytes"),
        memoryview(b"bytes")[::2],
        (ctypes.c_int * 3)(1, 2, 3),
    ],
    ids=lambda exporter: type(exporter).__name__,
)
@pytest.mark.parametrize("inline", [0, 1 << 20])
def test_an_exporter_arrives_as_a_buffer(exporter: Any, inline: int) -> None:
    beside: list[Any] = []
    seen = back(there(exporter, inline=inline, buffers=beside), buffers=beside)
    assert type(seen) is Buffer
    assert bool(beside) == (inline == 0)
    assert seen.tobytes() == memoryview(exporter).tobytes()
    assert seen.shape == memoryview(exporter).shape
    assert seen.tolist() == numpy.asarray(exporter).tolist()
    numpy.testing.assert_array_equal(numpy.asarray(seen), numpy.asarray(exporter))
    assert numpy.asarray(seen).dtype == numpy.asarray(exporter).dtype


def test_arrays_of_numpy_come_back_as_the_registry_says() -> None:
    registry = Registry(ndarray=numpy.asarray)
    seen = decode(encode([numpy.arange(3), memoryview(b"abc")], registry, MiB), registry, memory=MiB)
    assert type(seen[0]) is numpy.ndarray
    assert seen[0].tolist() == [0, 1, 2]
    assert type(seen[1]) is Buffer


def test_a_numpy_view_shares_the_memory_and_keeps_it() -> None:
    class Owner(bytearray): ...

    owner = Owner(struct.pack("3d", 1, 2, 3))
    gone = weakref.ref(owner)
    view = numpy.asarray(Buffer(owner, "d"))
    owner[0:8] = struct.pack("d", 9)
    assert view.tolist() == [9, 2, 3]
    assert not view.flags.writeable
    del owner
    gc.collect()
    assert gone() is not None
    del view
    gc.collect()
    assert gone() is None


def test_a_buffer_shows_what_it_is() -> None:
    data = bytes(range(24))
    buffer = Buffer(data, "<h", (3, 4))
    assert (buffer.format, buffer.itemsize, buffer.ndim, buffer.nbytes) == ("h", 2, 2, 24)
    assert (buffer.shape, buffer.strides, buffer.readonly, len(buffer)) == ((3, 4), (8, 2), True, 3)
    assert buffer.obj is data
    assert repr(buffer) == "<compart.Buffer int16-like format='h' shape=(3, 4) 24 bytes>"
    assert memoryview(buffer)[1, 2] == buffer[1, 2]
    assert Buffer(b"abc")[1:] == b"bc"
    assert Buffer(b"abc").tolist() == [97, 98, 99]
    assert Buffer(b"", "d", (2, 0)).tolist() == [[], []]
    with pytest.raises(TypeError):
        len(Buffer(b"a", "B", ()))
    with pytest.raises(TypeError):
        hash(buffer)
    with pytest.raises(BufferError, match="read-only"):
        copy_into(buffer, 0, b"x")


def test_buffers_compare_by_format_shape_and_content() -> None:
    buffer = Buffer(struct.pack("2d", 1, 2), "d")
    assert buffer == array.array("d", [1, 2])
    assert buffer == Buffer(struct.pack("2d", 1, 2), "=d")
    assert buffer != array.array("d", [1, 3])
    assert buffer != Buffer(struct.pack("2d", 1, 2), "q")
    assert buffer != Buffer(struct.pack("2d", 1, 2), "d", (1, 2))
    assert buffer != "text"
    assert Buffer(b"abc") == b"abc"


def test_a_copy_of_a_buffer_has_its_own_memory() -> None:
    memory = bytearray(8)
    buffer = Buffer(memory, "d")
    for made in (copy.copy(buffer), copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert made == buffer
        assert made.obj is not memory


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        ("d", None, "bytes are not shape"),
        ("O", None, "not the format"),
        ("P", None, "not the format"),
        ("T{d}", None, "not the format"),
        ("", None, "not the format"),
        ("B", (3, 3), "are not shape"),
        ("B", (-1, -10), "below zero"),
        ("B", (1,) * 33, "more than 32 dimensions"),
        ("B", (0, 1 << 40, 1 << 40), "too large"),
    ],
)
def test_a_buffer_that_does_not_fit_its_memory_is_not_made(form: str, shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buffer(b"0123456789", form, shape)


def test_a_body_may_be_a_view() -> None:
    assert back(memoryview(there([1, 2]))) == [1, 2]  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        back(5)  # type: ignore[arg-type]


def test_values_do_not_leak() -> None:
    values = [value for value in VALUES if not isinstance(value, int)]
    bad = there(values)[:-1]

    def once() -> None:
        back(there(values))
        with pytest.raises(FastError):
            back(bad)
        with pytest.raises(FastError):
            there([*values, object()])

    for _ in range(3):
        once()
    gc.collect()
    tracemalloc.start()
    try:
        once()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            once()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


def test_mutated_messages_never_do_more_than_be_refused() -> None:
    pick = random.Random(7)
    bodies = [there(value) for value in VALUES if len(there(value)) < 500]
    outcomes = set()
    for _ in range(3000):
        body = bytearray(pick.choice(bodies))
        for _ in range(pick.randrange(1, 4)):
            body[pick.randrange(len(body))] = pick.randrange(256)
        try:
            back(bytes(body))
            outcomes.add("value")
        except Malformed:
            outcomes.add("refused")
    assert outcomes == {"value", "refused"}
