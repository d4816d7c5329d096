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
    found: dict[type, None] = {}
    arrays: list[type] = []
    _collect(_annotation(function), found, arrays, set())
    ndarray = None
    if arrays:
        ndarray = sys.modules["numpy"].asarray
    return tuple(found), ndarray


def _annotation(function: Any) -> object:
    inner = inspect.unwrap(function)
    inner = getattr(inner, "__func__", inner)
    raw = getattr(inner, "__annotations__", {}).get("return")
    if not isinstance(raw, str):
        return raw
    names = dict(getattr(inner, "__globals__", {}))
    closure = getattr(inner, "__closure__", None) or ()
    for name, cell in zip(getattr(getattr(inner, "__code__", None), "co_freevars", ()), closure, strict=False):
        try:
            names[name] = cell.cell_contents
        except ValueError:
            continue
    try:
        # The annotation is the programmer's own source text, as typing.get_type_hints evaluates it.
        return eval(raw, names)
    except Exception:
        return None


def _collect(annotation: object, found: dict[type, None], arrays: list[type], seen: set[int]) -> None:
    if id(annotation) in seen:
        return
    seen.add(id(annotation))
    origin = typing.get_origin(annotation)
    if origin is not None:
        _collect(origin, found, arrays, seen)
        for argument in typing.get_args(annotation):
            _collect(argument, found, arrays, seen)
        return
    if not isinstance(annotation, type):
        return
    if annotation.__module__ == "numpy" and annotation.__name__ == "ndarray":
        arrays.append(annotation)
    elif issubclass(annotation, enum.Enum):
        found[annotation] = None
    elif dataclasses.is_dataclass(annotation) or (issubclass(annotation, tuple) and hasattr(annotation, "_fields")):
        found[annotation] = None
        for hint in _fields(annotation):
            _collect(hint, found, arrays, seen)


def _fields(kind: type) -> list[object]:
    try:
        return list(typing.get_type_hints(kind).values())
    except Exception:
        return [hint for hint in getattr(kind, "__annotations__", {}).values() if not isinstance(hint, str)]
