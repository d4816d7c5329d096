"""Say where in a value the thing is that cannot leave.

Runs in the child, after the encoder refused: it walks the value again, slowly, to name the path.
"""

from __future__ import annotations

import dataclasses
import enum
import io
from collections.abc import Callable
from typing import Any

from compart import _fast

MOST_STEPS = 1_000_000


Describe = Callable[[object], tuple[str, object, int] | None]


def where(value: Any, registry: _fast.Registry, types: tuple[type, ...], reason: str, describe: Describe) -> str:
    """One line: `result["pages"][3].font: <class 'Font'> cannot leave a compartment; ...`."""
    return _Search(registry, types, describe).find(value, "result", ()) or f"result: {reason}"


class _Search:
    def __init__(self, registry: _fast.Registry, types: tuple[type, ...], describe: Describe) -> None:
        self.describe = describe
        self.registry = registry
        self.types = types
        self.steps = 0

    def find(self, value: Any, path: str, above: tuple[int, ...]) -> str | None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            return None
        if id(value) in above:
            return f"{path}: refers back to a value that holds it; a cycle cannot leave a compartment"
        if len(above) > 255:
            return f"{_shorten(path)}: nested deeper than 256 levels"
        children = self._children(value, path)
        if children is None:
            return self._leaf(value, path)
        inner = (*above, id(value))
        for child, name in children:
            found = self.find(child, name, inner)
            if found is not None:
                return found
        return None

    def _children(self, value: Any, path: str) -> list[tuple[Any, str]] | None:
        kind = type(value)
        if kind in (list, tuple):
            return [(item, f"{path}[{n}]") for n, item in enumerate(value)]
        if kind in (set, frozenset):
            return [(item, f"{path}{{{_key(item)}}}") for item in value]
        if kind is dict:
            pairs = [(key, f"{path} key {_key(key)}") for key in value]
            return pairs + [(item, f"{path}[{_key(key)}]") for key, item in value.items()]
        if self._passes(value):
            return None
        if dataclasses.is_dataclass(value) and self._registered(value):
            return [(getattr(value, f.name, None), f"{path}.{f.name}") for f in dataclasses.fields(value)]
        if isinstance(value, tuple) and hasattr(kind, "_fields") and self._registered(value):
            return [(item, f"{path}.{name}") for item, name in zip(value, kind._fields, strict=False)]
        return None

    def _registered(self, value: Any) -> bool:
        return type(value) in self.types

    def _passes(self, value: Any) -> bool:
        try:
            _fast.encode(value, self.registry, 1 << 62, buffers=[], describe=self._named)
        except (_fast.Unencodable, _fast.TooLarge):
            return False
        return True

    def _named(self, item: object) -> tuple[str, object] | None:
        described = self.describe(item)
        return None if described is None else described[:2]

    def _leaf(self, value: Any, path: str) -> str | None:
        if self._passes(value):
            return None
        kind = type(value)
        try:
            _fast.encode(value, self.registry, 1 << 62, buffers=[], describe=self._named)
            reason = ""
        except _fast.Unencodable as error:
            reason = str(error)
        except _fast.TooLarge:
            return None
        if dataclasses.is_dataclass(kind) or issubclass(kind, enum.Enum) or hasattr(kind, "_fields"):
            named = kind in self.types
            advice = reason if named else f"name {kind.__qualname__} in the function's return annotation"
        elif isinstance(value, io.IOBase):
            advice = "only open regular files that were handed over, and directories, can"
        else:
            advice = reason or "return plain values"
        return f"{_shorten(path)}: {kind!r} cannot leave a compartment; {advice}"


def _key(key: object) -> str:
    try:
        text = str.__repr__(key) if type(key) is str else repr(key)
    except Exception:
        text = f"<{type(key).__qualname__}>"
    if type(key) is str:
        # As JSON and most people write a string.
        text = '"' + text[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'
    return text if len(text) <= 42 else text[:40] + "…"


def _shorten(path: str) -> str:
    return path if len(path) < 400 else f"{path[:190]} … {path[-190:]}"
