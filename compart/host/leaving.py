"""Which types of a function's return annotation may leave a compartment as themselves.

Runs in the host. Naming a dataclass, NamedTuple or Enum in the return annotation is the programmer's word that it may
come back; naming numpy.ndarray turns buffers into arrays. NumPy is never imported here.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import sys
import typing
from collections.abc import Callable
from typing import Any


def leaving_types(function: Callable[..., Any]) -> tuple[tuple[type, ...], Callable[[Any], object] | None]:
    """The types, in a fixed order, and what makes an array of a buffer (None unless the annotation names ndarray)."""
    inner = inspect.unwrap(function)
    inner = getattr(inner, "__func__", inner)
    found = _Found(_names_of(inner))
    found.add(getattr(inner, "__annotations__", {}).get("return"))
    return tuple(found.types), sys.modules["numpy"].asarray if found.arrays else None


def _names_of(function: Any) -> dict[str, Any]:
    """What names mean where the annotation was written."""
    names = dict(getattr(function, "__globals__", {}))
    closure = getattr(function, "__closure__", None) or ()
    for name, cell in zip(getattr(getattr(function, "__code__", None), "co_freevars", ()), closure, strict=False):
        try:
            names[name] = cell.cell_contents
        except ValueError:
            continue
    return names


class _Found:
    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.types: dict[type, None] = {}
        self.arrays = False
        self.seen: set[int] = set()

    def add(self, annotation: object) -> None:
        if isinstance(annotation, typing.ForwardRef):
            annotation = annotation.__forward_arg__
        if isinstance(annotation, str):
            annotation = self._evaluate(annotation)
        if id(annotation) in self.seen:
            return
        self.seen.add(id(annotation))
        origin = typing.get_origin(annotation)
        if hasattr(annotation, "__value__"):
            # `type Name = ...` (PEP 695), plain or with parameters.
            self.add(annotation.__value__)
        if origin is not None:
            self.add(origin)
            for argument in typing.get_args(annotation):
                self.add(argument)
        elif isinstance(annotation, type):
            self._add_type(annotation)

    def _evaluate(self, text: str) -> object:
        try:
            # The programmer's own source text, as typing.get_type_hints evaluates it.
            return eval(text, self.names)
        except Exception:
            return None

    def _add_type(self, kind: type) -> None:
        if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            self.arrays = True
        elif issubclass(kind, enum.Enum):
            self.types[kind] = None
        elif dataclasses.is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
            self.types[kind] = None
            for hint in _fields(kind):
                self.add(hint)


def _fields(kind: type) -> list[object]:
    try:
        return list(typing.get_type_hints(kind).values())
    except Exception:
        return [hint for hint in getattr(kind, "__annotations__", {}).values() if not isinstance(hint, str)]
