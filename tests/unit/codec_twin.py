"""The wire codec once more in plain Python: what the native one is held against.

It knows the wire and nothing of memory limits and colliding keys. Where the two differ on whether a message is a
value, or on which, one of them is wrong.
"""

import dataclasses
import datetime
import decimal
import enum
import re
import struct
import sys
import uuid
import zoneinfo
from collections.abc import Callable, Sequence
from typing import Any

from compart._fast import Buffer

DEPTH = 256
NAMES = 4096
SET_LEVELS = 3

Tag = enum.IntEnum(
    "Tag",
    "NONE TRUE FALSE UINT8 INT16 INT32 INT64 INT FLOAT COMPLEX STR NAME REF BYTES BYTES_OUT BYTEARRAY BYTEARRAY_OUT "
    "LIST TUPLE DICT SET FROZENSET DATE TIME DATETIME TIMEDELTA TIMEZONE ZONE DECIMAL UUID ENUM NAMEDTUPLE DATACLASS "
    "BUFFER CAPABILITY",
    start=0,
)
FIXED = {"UINT8": "=B", "INT16": "=h", "INT32": "=i", "INT64": "=q", "FLOAT": "=d"}
BUILTIN = {list: "LIST", tuple: "TUPLE", dict: "DICT", set: "SET", frozenset: "FROZENSET", bytes: "BYTES"}
SAFE = [uuid.SafeUUID.unknown, uuid.SafeUUID.safe, uuid.SafeUUID.unsafe]
NO_KEY = {"LIST", "DICT", "SET", "BYTEARRAY", "BYTEARRAY_OUT", "BUFFER", "CAPABILITY", "DATACLASS"}
DECIMAL = re.compile(r"-?([0-9]+(\.[0-9]+)?(E[+-][0-9]+)?|Infinity|s?NaN[0-9]*)")
ZONE = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,3}")


class Refused(Exception):
    """Not encodable, or not a value."""


def kind_of(cls: type) -> str:
    if issubclass(cls, enum.Enum):
        return "ENUM"
    return "DATACLASS" if dataclasses.is_dataclass(cls) else "NAMEDTUPLE"


def fields_of(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else cls._fields


def size(n: int) -> bytes:
    if n < 253:
        return bytes([n])
    if n < 1 << 16:
        return b"\xfd" + struct.pack("=H", n)
    return b"\xfe" + struct.pack("=I", n) if n < 1 << 32 else b"\xff" + struct.pack("=Q", n)


def shortest(value: int) -> str:
    """The tag of the shortest form of an int."""
    if 0 <= value < 256:
        return "UINT8"
    return next((f"INT{bits}" for bits in (16, 32, 64) if -1 << bits - 1 <= value < 1 << bits - 1), "INT")


class Encoder:
    """`Encoder(types).encode(value)`; strings are numbered by value, all of them, as far as the numbers reach."""

    def __init__(self, types: tuple[type, ...] = (), describe: Callable[[object], Any] | None = None) -> None:
        self.types = types
        self.describe = describe

    def encode(self, value: object) -> bytes:
        self.out = bytearray()
        self.names: dict[str, int] = {}
        self.put(value, 0)
        return bytes(self.out)

    def tag(self, name: str, payload: bytes = b"") -> None:
        self.out += bytes([Tag[name]]) + payload

    def sized(self, name: str, data: bytes) -> None:
        self.tag(name, size(len(data)) + data)

    def put(self, value: Any, depth: int) -> None:
        cls = type(value)
        if value is None or cls is bool:
            self.tag({None: "NONE", True: "TRUE", False: "FALSE"}[value])
        elif cls is int:
            self.put_int(value)
        elif cls is float:
            self.tag("FLOAT", struct.pack("=d", value))
        elif cls is complex:
            self.tag("COMPLEX", struct.pack("=dd", value.real, value.imag))
        elif cls is str:
            self.put_str(value)
        elif cls in (bytes, bytearray):
            self.sized(cls.__name__.upper(), bytes(value))
        elif cls in BUILTIN:
            self.put_items(BUILTIN[cls], value, depth)
        elif cls in self.types:
            self.put_registered(cls, value, depth)
        elif cls in (datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone):
            self.put_time(value, depth)
        elif cls is zoneinfo.ZoneInfo and value.key is not None:
            self.sized("ZONE", value.key.encode())
        elif cls is decimal.Decimal:
            self.sized("DECIMAL", str(value).replace("e", "E").encode())
        elif cls is uuid.UUID:
            self.tag("UUID", value.bytes + bytes([SAFE.index(value.is_safe)]))
        else:
            self.put_other(value, depth)

    def put_int(self, value: int) -> None:
        name = shortest(value)
        if name == "INT":
            self.sized(name, value.to_bytes(value.bit_length() // 8 + 1, sys.byteorder, signed=True))
        else:
            self.tag(name, struct.pack(FIXED[name], value))

    def put_str(self, value: str) -> None:
        if value in self.names:
            return self.tag("REF", size(self.names[value]))
        if len(self.names) == NAMES:
            return self.sized("STR", value.encode("utf-8", "surrogatepass"))
        self.names[value] = len(self.names)
        return self.sized("NAME", value.encode("utf-8", "surrogatepass"))

    def put_items(self, name: str, value: Any, depth: int) -> None:
        if depth >= DEPTH:
            raise Refused("too deep")
        self.tag(name, size(len(value)))
        for item in value:
            self.put(item, depth + 1)
            if name == "DICT":
                self.put(value[item], depth + 1)

    def put_registered(self, cls: type, value: Any, depth: int) -> None:
        self.tag(kind_of(cls), size(self.types.index(cls)))
        if isinstance(value, enum.Enum):
            self.put_str(value.name)
        else:
            self.put_items("TUPLE", [getattr(value, name) for name in fields_of(cls)], depth)

    def put_time(self, value: Any, depth: int) -> None:
        if isinstance(value, datetime.timedelta):
            self.tag("TIMEDELTA", struct.pack("=iii", value.days, value.seconds, value.microseconds))
        elif isinstance(value, datetime.timezone):
            offset, *name = value.__getinitargs__()  # type: ignore[attr-defined]
            self.tag("TIMEZONE", struct.pack("=iii", offset.days, offset.seconds, offset.microseconds))
            self.sized("STR", name[0].encode("utf-8", "surrogatepass")) if name else self.tag("NONE")
        else:
            self.tag(type(value).__name__.upper())
            if isinstance(value, datetime.date):
                self.out += struct.pack("=HBB", value.year, value.month, value.day)
            if type(value) is not datetime.date:
                clock = (value.hour, value.minute, value.second, value.fold, value.microsecond)
                self.out += struct.pack("=BBBBI", *clock)
                self.put(value.tzinfo, depth)

    def put_other(self, value: Any, depth: int) -> None:
        try:
            view = memoryview(value)
        except TypeError:
            described = self.describe(value) if self.describe else None
            if described is None:
                raise Refused(f"a {type(value)}") from None
            self.sized("CAPABILITY", described[0].encode())
            self.put(described[1], depth + 1)
            return
        form = view.format.encode()
        self.tag("BUFFER", bytes([type(value).__module__ == "numpy", view.ndim]) + size(len(form)) + form)
        self.out += b"".join(map(size, view.shape)) + size(view.nbytes) + view.tobytes()


class Decoder:
    """`Decoder(types).decode(body)`: the value, or Refused."""

    def __init__(
        self,
        types: tuple[type, ...] = (),
        buffers: Sequence[Any] = (),
        attach: Callable[[str, object], object] | None = None,
        depth: int = DEPTH,
    ) -> None:
        self.types = types
        self.buffers = list(buffers)
        self.attach = attach
        self.depth = depth

    def decode(self, body: bytes) -> Any:
        self.left = memoryview(body)
        self.names: list[str] = []
        try:
            value = self.take(0, 0)
        except Refused:
            raise
        except Exception as error:
            raise Refused(str(error)) from error
        self.demand(not self.left, "bytes after the value")
        self.demand(not self.buffers, "buffers left")
        return value

    def demand(self, holds: object, what: str) -> None:
        if not holds:
            raise Refused(what)

    def advance(self, n: int) -> bytes:
        self.demand(n <= len(self.left), "the message ends early")
        taken, self.left = self.left[:n], self.left[n:]
        return bytes(taken)

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.advance(struct.calcsize(form)))

    def size(self) -> int:
        first = self.advance(1)[0]
        if first < 253:
            return first
        (n,) = self.unpack({253: "=H", 254: "=I", 255: "=Q"}[first])
        self.demand(n >= {253: 253, 254: 1 << 16, 255: 1 << 32}[first], "a size in the wrong form")
        return int(n)

    def text(self) -> str:
        return self.advance(self.size()).decode("utf-8", "surrogatepass")

    def take(self, depth: int, key: int) -> Any:
        name = Tag(self.advance(1)[0]).name
        self.demand(not (key and name in NO_KEY), "not hashable")
        if name in ("NONE", "TRUE", "FALSE"):
            return {"NONE": None, "TRUE": True, "FALSE": False}[name]
        if name in FIXED:
            (number,) = self.unpack(FIXED[name])
            self.demand(name == "FLOAT" or shortest(number) == name, "an int in the wrong form")
            return number
        if name in ("LIST", "TUPLE", "DICT", "SET", "FROZENSET"):
            self.demand(depth < self.depth, "too deep")
            inner = key + 1 if name in ("SET", "FROZENSET") else key
            self.demand(inner == key or key <= SET_LEVELS, "too many frozensets in each other")
            n = self.size()
            self.demand(n * (1 + (name == "DICT")) <= len(self.left), "more items than bytes")
            if name == "DICT":
                pairs = []
                for _ in range(n):
                    field = self.take(depth + 1, 1)
                    pairs.append((field, self.take(depth + 1, 0)))
                value: Any = dict(pairs)
            else:
                items = [self.take(depth + 1, inner) for _ in range(n)]
                value = {"LIST": list, "TUPLE": tuple, "SET": set, "FROZENSET": frozenset}[name](items)
            self.demand(len(value) == n, "twice")
            return value
        return getattr(self, f"take_{name.lower()}")(depth, key)

    def take_int(self, depth: int, key: int) -> int:
        data = self.advance(self.size())
        value = int.from_bytes(data, sys.byteorder, signed=True)
        self.demand(len(data) >= 9 and value.bit_length() // 8 + 1 == len(data), "an int in the wrong form")
        return value

    def take_complex(self, depth: int, key: int) -> complex:
        return complex(*self.unpack("=dd"))

    def take_str(self, depth: int, key: int) -> str:
        return self.text()

    def take_name(self, depth: int, key: int) -> str:
        self.demand(len(self.names) < NAMES, "too many names")
        self.names.append(self.text())
        return self.names[-1]

    def take_ref(self, depth: int, key: int) -> str:
        n = self.size()
        self.demand(n < len(self.names), "a reference to no string")
        return self.names[n]

    def take_bytes(self, depth: int, key: int) -> bytes:
        return self.advance(self.size())

    def take_bytearray(self, depth: int, key: int) -> bytearray:
        return bytearray(self.advance(self.size()))

    def take_bytes_out(self, depth: int, key: int) -> bytes:
        n = self.size()
        data = bytes(self.buffers.pop(0))
        self.demand(len(data) == n, "another length")
        return data

    def take_bytearray_out(self, depth: int, key: int) -> bytearray:
        return bytearray(self.take_bytes_out(depth, key))

    def take_date(self, depth: int, key: int) -> datetime.date:
        return datetime.date(*self.unpack("=HBB"))

    def take_time(self, depth: int, key: int) -> datetime.time:
        hour, minute, second, fold, microsecond = self.unpack("=BBBBI")
        return datetime.time(hour, minute, second, microsecond, self.zone(), fold=fold)

    def take_datetime(self, depth: int, key: int) -> datetime.datetime:
        *day, hour, minute, second, fold, microsecond = self.unpack("=HBBBBBBI")
        return datetime.datetime(*day, hour, minute, second, microsecond, self.zone(), fold=fold)

    def zone(self) -> datetime.tzinfo | None:
        self.demand(self.left and self.left[0] in (Tag.NONE, Tag.TIMEZONE, Tag.ZONE), "no time zone")
        zone: datetime.tzinfo | None = self.take(0, 1)
        return zone

    def take_timedelta(self, depth: int, key: int) -> datetime.timedelta:
        days, seconds, microseconds = self.unpack("=iii")
        self.demand(0 <= seconds < 86400 and 0 <= microseconds < 1_000_000, "a timedelta in the wrong form")
        return datetime.timedelta(days, seconds, microseconds)

    def take_timezone(self, depth: int, key: int) -> datetime.timezone:
        offset = self.take_timedelta(depth, key)
        tag = self.advance(1)[0]
        self.demand(tag in (Tag.NONE, Tag.STR), "no name")
        return datetime.timezone(offset) if tag == Tag.NONE else datetime.timezone(offset, self.text())

    def take_zone(self, depth: int, key: int) -> zoneinfo.ZoneInfo:
        name = self.text()
        self.demand(len(name) <= 64 and ZONE.fullmatch(name), "no zone")
        return zoneinfo.ZoneInfo(name)

    def take_decimal(self, depth: int, key: int) -> decimal.Decimal:
        text = self.text()
        self.demand(len(text) <= 65536 and DECIMAL.fullmatch(text), "no Decimal")
        value = decimal.Decimal(text)
        self.demand(str(value) == text, "a Decimal in the wrong form")
        return value

    def take_uuid(self, depth: int, key: int) -> uuid.UUID:
        data = self.advance(17)
        return uuid.UUID(bytes=data[:16], is_safe=SAFE[data[16]])

    def registered(self, kind: str, key: int) -> Any:
        cls = self.types[self.size()]
        self.demand(kind_of(cls) == kind, "another kind")
        return cls

    def fields(self, cls: Any, depth: int, key: int) -> tuple[Any, ...]:
        self.demand(self.left and self.left[0] == Tag.TUPLE, "no fields")
        values: tuple[Any, ...] = self.take(depth, key)
        self.demand(len(values) == len(fields_of(cls)), "another number of fields")
        return values

    def take_enum(self, depth: int, key: int) -> Any:
        cls = self.registered("ENUM", key)
        name = self.take(depth, 1)
        if type(name) is int and issubclass(cls, enum.Flag):
            made = cls(name)
            if type(made) is not cls:
                raise ValueError("no combination")
            return made
        return cls.__members__[name]

    def take_namedtuple(self, depth: int, key: int) -> Any:
        cls = self.registered("NAMEDTUPLE", key)
        return tuple.__new__(cls, self.fields(cls, depth, key))

    def take_dataclass(self, depth: int, key: int) -> Any:
        cls = self.registered("DATACLASS", key)
        values = self.fields(cls, depth, key)
        made = object.__new__(cls)
        for name, value in zip(fields_of(cls), values, strict=True):
            object.__setattr__(made, name, value)
        return made

    def take_buffer(self, depth: int, key: int) -> Buffer:
        flags, ndim = self.unpack("=BB")
        self.demand(flags < 4 and ndim <= 32, "a buffer in the wrong form")
        form = self.advance(self.size()).decode("ascii")
        shape = tuple(self.size() for _ in range(ndim))
        n = self.size()
        value = Buffer(self.buffers.pop(0) if flags & 2 else self.advance(n), form, shape)
        self.demand(value.nbytes == n, "another length")
        return value

    def take_capability(self, depth: int, key: int) -> object:
        kind = self.text()
        attach, self.attach = self.attach, None
        self.demand(depth < self.depth and attach and 0 < len(kind) <= 64, "no capability expected")
        assert attach is not None
        meta = self.take(depth + 1, 0)
        self.attach = attach
        return attach(kind, meta)
