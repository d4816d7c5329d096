"""Records whose annotations are text, as `from __future__ import annotations` makes them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum, Flag, IntEnum
from typing import Any, NamedTuple


class Colour(Enum):
    RED = "red"
    CRIMSON = "red"  # noqa: PIE796  # an alias
    BLUE = (0, 0, 255)


class Style(Flag):
    BOLD = 1
    ITALIC = 2


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: int
    y: Any


@dataclass
class Font:
    name: str
    colour: Colour | None


@dataclass
class Page:
    number: int
    font: Any = None
    places: list[Point] = field(default_factory=list)
    others: dict[str, Font] = field(default_factory=dict)


@dataclass
class Tree:
    value: int
    children: list[Tree]


@dataclass(frozen=True)
class Frozen:
    a: int
    b: str


@dataclass(frozen=True, slots=True)
class Slotted:
    a: int
    b: str


RAN: list[int] = []


@dataclass
class Careful:
    a: int

    def __post_init__(self) -> None:
        RAN.append(os.getpid())


def postponed() -> list[Page]:
    return [Page(1)]


def postponed_method_owner() -> Any:
    class Owner:
        def method(self) -> Page:
            return Page(1)

    return Owner()


def local_and_its_maker() -> tuple[type, Any]:
    @dataclass
    class Local:
        a: int

    def make() -> Local:
        return Local(1)

    return Local, make
