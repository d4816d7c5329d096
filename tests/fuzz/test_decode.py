"""Whatever bytes arrive, decode gives a value or refuses, and the plain Python codec agrees on which.

The invariants, for every message:

1. decode returns a value or raises Malformed; never another exception, never a crash.
2. The twin in plain Python accepts it exactly when decode does, and sees the same value.
3. What was accepted can be sent on: encode takes it, and it arrives as the same value.
4. With little memory granted, little is taken, whatever the message claims.

COMPART_FUZZ_SECONDS=600 runs the mutations for that long instead of a few thousand of them.
"""

import dataclasses
import datetime
import enum
import itertools
import os
import random
import time
import tracemalloc
import uuid
import zoneinfo
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compart._fast import Buffer, Malformed, Registry, decode, encode
from tests.unit import codec_twin
from tests.unit.codec_twin import Refused, Tag

SECONDS = float(os.environ.get("COMPART_FUZZ_SECONDS", "0"))
MUTATIONS = 4000
MiB = 1 << 20


class Color(enum.Enum):
    RED = 1
    GREEN = 2


class Point(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass
class Record:
    name: object
    rows: object


TYPES = (Color, Point, Record)
REGISTRY = Registry(TYPES)
BESIDE = [b"12345678", b"x" * 40, b""]

SEEDS: list[Any] = [
    [None, True, False, 0, 255, -1, 256, 1 << 20, -(1 << 40), 1 << 70, 0.5, 1j, "", "a", "é€😀", b"", b"bytes"],
    {"name": "value", "list": [{"name": 1}, {"name": 2}], None: (), (1, ("x",)): bytearray(b"m"), 2.5: {1}, "é": "é"},
    [{1, "a", b"k"}, frozenset({frozenset({1}), (2,)}), {i: str(i) for i in range(70)}, set(range(70))],
    [
        datetime.date(2024, 2, 29),
        datetime.time(1, 2, 3, 4, fold=1),
        datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
        datetime.datetime(2024, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        datetime.time(1, tzinfo=datetime.timezone(datetime.timedelta(hours=1), "name")),
        datetime.timedelta(-1, 2, 3),
    ],
    [Decimal("1.50"), Decimal("-1E+7"), Decimal("NaN"), Decimal("Infinity"), uuid.UUID(int=1)],
    [Color.RED, Point(1, [2]), Record("n", {"r": Color.GREEN}), {Color.GREEN: Point("a", "b")}],
    [memoryview(b"view"), Buffer(bytes(48), "d", (2, 3)), Buffer(b"1234", "<h")],
    [b"12345678", memoryview(b"x" * 40), bytearray()],
    [object(), [object()]],
    [[[[[[[[]]]]]]]],
]


def seeds() -> list[bytes]:
    bodies = []
    for value in SEEDS:
        for inline in (0, MiB):
            bodies.append(encode(value, REGISTRY, MiB, inline=inline, buffers=[], describe=lambda found: ("file", [1])))
    return bodies


class Handle: ...


def attach(kind: str, meta: object) -> object:
    return Handle()


def describe(found: object) -> tuple[str, object] | None:
    return ("handle", None) if isinstance(found, Handle) else None


def check(body: bytes) -> bool:
    """Hold one message to the invariants; whether it was a value, alone or with what may come beside it."""
    return any([check_with(body, []), check_with(body, BESIDE)])


def check_with(body: bytes, beside: list[bytes]) -> bool:
    try:
        value = decode(body, REGISTRY, memory=64 * MiB, buffers=beside, attach=attach)
    except Malformed as refusal:
        value = refusal
    try:
        expected = codec_twin.Decoder(TYPES, beside, attach).decode(body)
    except Refused as refusal:
        expected = refusal
    assert isinstance(value, Malformed) == isinstance(expected, Refused), (body.hex(), value, expected)
    if isinstance(value, Malformed):
        return False
    assert wire(value) == wire(expected), body.hex()
    again = decode(encode(value, REGISTRY, 4 * MiB, describe=describe), REGISTRY, memory=64 * MiB, attach=attach)
    assert wire(again) == wire(value), body.hex()
    return True


def wire(value: Any) -> bytes:
    """The value as bytes, independent of which strings are one object and of the order in sets."""
    return Ordered(TYPES, describe).encode(value)


class Ordered(codec_twin.Encoder):
    def put_items(self, name: str, value: Any, depth: int) -> None:
        if name in ("SET", "FROZENSET"):
            value = sorted(value, key=lambda member: Ordered(self.types).encode(member))
        super().put_items(name, value, depth)


def mutate(pick: random.Random, bodies: list[bytes]) -> bytes:
    body = bytearray(pick.choice(bodies))
    for _ in range(pick.choice([1, 1, 1, 2, 3, 8])):
        at = pick.randrange(len(body) + 1)
        match pick.randrange(8):
            case 0:
                body[at : at + 1] = pick.randbytes(1)
            case 1:
                body[at : at + 1] = [pick.randrange(len(Tag))]
            case 2:
                body[at:at] = [pick.randrange(len(Tag)), pick.randrange(4)]
            case 3:
                del body[at : at + pick.randrange(1, 9)]
            case 4:
                body[at : at + 1] = [pick.choice([0, 1, 252, 253, 254, 255])]
            case 5:
                other = pick.choice(bodies)
                start = pick.randrange(len(other))
                body[at:at] = other[start : start + pick.randrange(40)]
            case 6:
                body[at : at + 1] = [(body[at % len(body)] + pick.choice([-1, 1])) % 256] if body else []
            case 7:
                body[at:at] = body[at : at + pick.randrange(20)]
    return bytes(body)


def test_mutated_messages() -> None:
    pick = random.Random(os.environ.get("COMPART_FUZZ_SEED", "compart"))
    bodies = seeds()
    stop = time.monotonic() + SECONDS
    accepted = 0
    for done in itertools.count():
        if done >= MUTATIONS and time.monotonic() >= stop:
            break
        body = mutate(pick, bodies)
        if check(body):
            accepted += 1
            if len(bodies) < 2000 and len(body) < 2000:
                bodies.append(body)  # go on from what passed
    assert 0.02 * done < accepted < 0.98 * done  # else one side of the invariants was hardly tried


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from([bytes([tag]) for tag in Tag]), st.binary(max_size=4)), max_size=30))
def test_messages_made_of_tags(parts: list[bytes]) -> None:
    check(b"".join(parts))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_messages_of_any_bytes(body: bytes) -> None:
    check(body)


@pytest.mark.parametrize("tag", list(Tag), ids=lambda tag: tag.name)
@pytest.mark.parametrize("claim", [b"\xfc", b"\xfd\xff\xff", b"\xfe\xff\xff\xff\x0f", b"\xff" + b"\xff" * 7 + b"\x0f"])
def test_a_claim_takes_no_memory(tag: Tag, claim: bytes) -> None:
    body = bytes([tag]) + claim + bytes([Tag.UINT8, 7]) * 2000
    tracemalloc.start()
    try:
        with pytest.raises(Malformed):
            decode(body, REGISTRY, memory=20_000)
        assert tracemalloc.get_traced_memory()[1] < 80_000
    finally:
        tracemalloc.stop()
