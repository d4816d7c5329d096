"""What travels on a compartment's channel: the kinds of frames, and how a value lies in one.

The same on both sides. What comes from a compartment is read by `read_value` and `read_error`, which raise
ProtocolError for anything that does not follow the protocol; they run no code of the value's.
"""

from __future__ import annotations

import builtins
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compart import _fast
from compart.errors import ProtocolError
from compart.violation import Frame

VALUE, RAISED, YIELD, END, WALL, UNENCODABLE, TOO_LARGE = range(1, 8)

ALIGN = 64
MOST_BUFFERS = 4096
MOST_DESCRIPTORS = 64
MOST_FRAMES = 64
OVERHEAD = 1 << 16
"""Room in a frame beside the value itself."""

PREFIX = struct.Struct("<II")
PART = struct.Struct("<QQ")
NOTHING_BESIDE = PREFIX.pack(0, 0)
"""What stands before a value without big buffers and descriptors."""


def memory_for(limit: int) -> int:
    """How much host memory the objects of a message of `limit` bytes may take: they are larger than their bytes."""
    return max(64 << 20, limit * 8)


def layout(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """Where big buffers lie in the shared memory: (offset, length) of each, and how much there must be."""
    places, at = [], 0
    for size in sizes:
        places.append((at, size))
        at += (size + ALIGN - 1) // ALIGN * ALIGN
    return places, at


def prefix(places: Sequence[tuple[int, int]], descriptors: int) -> bytes:
    """What stands before the encoded value in a frame."""
    return PREFIX.pack(len(places), descriptors) + b"".join(PART.pack(*place) for place in places)


@dataclass(slots=True)
class Parts:
    """A value's frame taken apart: where its big buffers lie, how many descriptors came, the encoded rest."""

    places: list[tuple[int, int]]
    descriptors: int
    body: memoryview


def take_apart(frame: bytes, room: int) -> Parts:
    """Split a frame. `room` is how much shared memory the compartment was lent; ProtocolError if it lies."""
    if len(frame) < PREFIX.size:
        raise ProtocolError("the compartment sent a value without its prefix")
    buffers, descriptors = PREFIX.unpack_from(frame)
    if buffers > MOST_BUFFERS or descriptors > MOST_DESCRIPTORS or len(frame) < PREFIX.size + buffers * PART.size:
        raise ProtocolError(f"the compartment announced {buffers} buffers and {descriptors} descriptors")
    places = [PART.unpack_from(frame, PREFIX.size + n * PART.size) for n in range(buffers)]
    end = 0
    for offset, length in places:
        if offset < end or offset % ALIGN or length > room or offset > room - length:
            raise ProtocolError(f"the compartment placed a buffer at {offset}, length {length}, in {room} bytes")
        end = offset + length
    return Parts(places, descriptors, memoryview(frame)[PREFIX.size + buffers * PART.size :])


def read_value(
    parts: Parts,
    registry: Any,
    limit: int,
    memory: Any,
    attach: Callable[[str, object], object],
) -> Any:
    """The value of a frame. `memory` is the shared memory in which its big buffers lie, or None."""
    if sum(length for _, length in parts.places) + len(parts.body) > limit + OVERHEAD:
        raise ProtocolError(f"the compartment sent more than result_bytes={limit}")
    view = memoryview(memory) if parts.places else None
    buffers = [view[offset : offset + length] for offset, length in parts.places] if view is not None else []
    try:
        return _fast.decode(parts.body, registry, memory=memory_for(limit), buffers=buffers, attach=attach)
    except _fast.Malformed as error:
        raise ProtocolError(f"the compartment sent a value that cannot be: {error}") from None


@dataclass(slots=True)
class Raised:
    """An exception as a compartment told it; all of it a stranger's words.

    `builtin` names the nearest builtin exception that it derives from: itself, for a builtin one.
    """

    type_name: str
    builtin: str
    args: tuple[Any, ...] | None
    text: str
    notes: list[str]
    frames: list[Frame]
    context: str
    attributes: dict[str, Any]


def read_error(frame: bytes, limit: int) -> Raised:
    """The exception of a RAISED frame."""
    try:
        value = _fast.decode(frame, EMPTY, memory=memory_for(min(limit, 1 << 20)))
    except _fast.Malformed as error:
        raise ProtocolError(f"the compartment sent an exception that cannot be: {error}") from None
    match value:
        case {
            "type": str(type_name), "args": tuple() | None as args, "text": str(text), "notes": list(notes),
            "frames": list(frames), "context": str(context), "attributes": dict(attributes),
        }:  # fmt: skip
            pass
        case _:
            raise ProtocolError("the compartment sent an exception of another shape")
    read = []
    for frame_ in frames[: MOST_FRAMES * 2]:
        match frame_:
            case (str(file), int(line), str(function)) if 0 <= line < 1 << 31:
                read.append(Frame(file[:4096], line, function[:500]))
            case _:
                raise ProtocolError("the compartment sent a stack of another shape")
    kept = [note for note in notes[:16] if isinstance(note, str)]
    builtin = value.get("builtin", type_name)
    if not isinstance(builtin, str):
        raise ProtocolError("the compartment sent an exception of another shape")
    return Raised(type_name[:500], builtin[:500], args, text[: 1 << 16], kept, read, context[: 1 << 16], attributes)


def builtin_exception(name: str) -> type[Exception] | None:
    """The builtin exception of this name, if raising it in the host is harmless."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, BaseExceptionGroup):
        return kind
    return None


EMPTY = _fast.Registry(())
