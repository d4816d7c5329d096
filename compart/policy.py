"""Policies and grants: what the programmer writes.

Runs in the host. Data only: nothing here opens, forks or asks the system. A policy is frozen, hashable and
checked when it is made, so that a mistake is told where it was written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from compart.errors import PolicyError
from compart.rights import Rights

FileMode: TypeAlias = Literal["r", "w", "rw", "a"]
DirectoryMode: TypeAlias = Literal["r", "rw"]

WALLS = (
    "shared_memory",
    "namespaces",
    "no_new_privs",
    "landlock",
    "descriptors",
    "rlimits",
    "capabilities",
    "seccomp",
    "listener",
)
"""The names of the walls, as `Enforcement` uses them, in the order they go up."""

WAIVABLE = ("landlock", "seccomp", "listener")
"""The walls that `Policy(waive={...})` may do without. The others are never missing where compart runs, or are asked for by
grants that mean nothing without them."""

UNITS = {"": 1, "B": 1, "K": 2**10, "KB": 2**10, "M": 2**20, "MB": 2**20, "G": 2**30, "GB": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class Grant:
    """One piece of authority that a policy hands over. Made by the functions of `compart.grant`."""

    kind: Literal["file", "directory", "descriptor"]
    path: str = ""
    mode: str = ""
    rights: Rights | None = None
    object: Any = field(default=None, compare=True, hash=False)

    def __str__(self) -> str:
        if self.kind == "descriptor":
            return f"grant.descriptor({self.object!r}, {self.rights!r})"
        return f"grant.{self.kind}({self.path!r}, {self.mode!r})"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Everything that decides what a compartment may do. Frozen; change one with `policy.replace(...)`.

    grants: what `compart.grant` makes; nothing is granted by default.
    timeout: wall-clock seconds for a call, None for no limit.
    cpu: CPU seconds, None for no limit.
    memory: bytes of address space above what the process already had at its start; "256M" is accepted.
    open_files: how many descriptors of its own a compartment may have.
    processes: 0; a compartment starts no processes.
    threads: how many threads may run at once; None leaves that to `memory`, up to 256.
    result_bytes: the largest value that may come back, in bytes; bounds every message.
    stdout, stderr: "capture" (kept, at most `output_bytes`), "inherit" or "null".
    env: the environment inside; empty by default.
    preload: modules imported before the walls go up. warm: a callable run once, before the walls go up.
    isolation: "call", a fresh compartment for every call.
    start: "fork" or "auto".
    on_violation: "raise" (the call fails, even if the function hid the refusal), "deny" (recorded, goes on)
        or "kill" (at the first).
    waive: names of walls that may be missing.
    """

    grants: tuple[Grant, ...] = ()
    timeout: float | None = 60.0
    cpu: float | None = None
    memory: int | str | None = "1G"
    open_files: int = 64
    processes: int = 0
    threads: int | None = None
    result_bytes: int | str = "256M"
    stdout: Literal["capture", "inherit", "null"] = "capture"
    stderr: Literal["capture", "inherit", "null"] = "capture"
    output_bytes: int | str = "1M"
    env: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    preload: tuple[str, ...] = ()
    warm: Callable[[], object] | None = None
    isolation: Literal["call"] = "call"
    start: Literal["auto", "fork"] = "auto"
    on_violation: Literal["raise", "deny", "kill"] = "raise"
    waive: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "grants", _grants(self.grants))
        put(self, "timeout", _seconds("timeout", self.timeout))
        put(self, "cpu", _seconds("cpu", self.cpu))
        put(self, "memory", None if self.memory is None else _size("memory", self.memory, least=2**20))
        put(self, "result_bytes", _size("result_bytes", self.result_bytes, least=1))
        put(self, "output_bytes", _size("output_bytes", self.output_bytes, least=0))
        put(self, "open_files", _count("open_files", self.open_files, least=8, most=480))
        put(self, "processes", _count("processes", self.processes, least=0))
        put(self, "threads", None if self.threads is None else _count("threads", self.threads, least=1))
        _one_of("stdout", self.stdout, ("capture", "inherit", "null"))
        _one_of("stderr", self.stderr, ("capture", "inherit", "null"))
        _one_of("isolation", self.isolation, ("call",))
        _one_of("start", self.start, ("auto", "fork"))
        _one_of("on_violation", self.on_violation, ("raise", "deny", "kill"))
        put(self, "env", _env(self.env))
        put(self, "preload", _names(self.preload))
        if self.warm is not None and not callable(self.warm):
            raise PolicyError(f"warm={self.warm!r} cannot be called; give a function, such as warm=Image.init")
        put(self, "waive", _waived(self.waive))
        put(self, "_hash", hash(tuple(getattr(self, f.name) for f in fields(self) if f.hash is not False)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def replace(self, **changes: Any) -> Policy:
        """A copy with some fields changed; PolicyError names a field that does not exist."""
        check_fields(changes)
        return replace(self, **changes)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number of bytes."""
        return self.memory if self.memory is None else int(self.memory)

    @property
    def result_limit(self) -> int:
        """`result_bytes` as a number of bytes."""
        return int(self.result_bytes)

    @property
    def output_limit(self) -> int:
        """`output_bytes` as a number of bytes."""
        return int(self.output_bytes)


def check_fields(names: Mapping[str, object]) -> None:
    """PolicyError for a name that is no field of Policy, with the nearest one that is."""
    known = [f.name for f in fields(Policy)]
    for name in names:
        if name not in known:
            import difflib

            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
            raise PolicyError(f"a policy has no {name!r}; {hint}")


def parse_size(text: int | str) -> int:
    """Bytes for 1024, "64K", "256M" or "1.5G" (powers of 1024); ValueError otherwise."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text.upper())
        if match:
            return int(float(match[1]) * UNITS[match[2].replace("I", "") or ""])
    raise ValueError(f"{text!r} is no size")


def _size(name: str, value: int | str, *, least: int) -> int:
    try:
        size = parse_size(value)
    except ValueError:
        raise PolicyError(f"{name}={value!r} is no size; give bytes or text such as '256M'") from None
    if size < least:
        raise PolicyError(f"{name}={value!r} is less than {least}; give at least {least} bytes")
    return size


def _seconds(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value == value:
        raise PolicyError(f"{name}={value!r} is no number of seconds; give a positive number, or None for no limit")
    if value <= 0 or value == float("inf"):
        raise PolicyError(f"{name}={value!r} must be positive and finite; give seconds, or None for no limit")
    return float(value)


def _count(name: str, value: int, *, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PolicyError(f"{name}={value!r} is no count; give an integer")
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise PolicyError(f"{name}={value!r} is out of range; give {bounds}")
    return value


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PolicyError(f"{name}={value!r} is unknown; choose {', '.join(map(repr, choices))}")


def _grants(value: object) -> tuple[Grant, ...]:
    if isinstance(value, Grant):
        value = (value,)
    if not isinstance(value, (tuple, list)):
        raise PolicyError(f"grants={value!r} is no list of grants; write grants=[grant.file(path, 'r')]")
    for item in value:
        if not isinstance(item, Grant):
            raise PolicyError(f"grants holds {item!r}, which is no grant; make grants with compart.grant")
        if item.kind == "file" and item.mode == "a":
            raise PolicyError(
                f"{item}: a name cannot be bounded to appending; pass grant.file(path, 'a') or open(path, 'ab') as an argument"
            )
    return tuple(value)


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        raise PolicyError(f"preload={value!r} is one string; give a list: preload=[{value!r}]")
    if not isinstance(value, (tuple, list, set, frozenset)):
        raise PolicyError(f"preload={value!r} is no list of module names")
    for name in value:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise PolicyError(f"preload holds {name!r}, which is no module name; write it as in 'import {name}'")
    return tuple(value)


def _env(value: object) -> Mapping[str, str]:
    if not isinstance(value, Mapping):
        raise PolicyError(f"env={value!r} is no mapping; give a dictionary of strings")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str) or not key or "=" in key or "\0" in key + text:
            raise PolicyError(
                f"env holds {key!r}: {text!r}; names and values are strings without NUL, names without '='"
            )
    return MappingProxyType(dict(value))


def _waived(value: object) -> frozenset[str]:
    if isinstance(value, str):
        value = {value}
    if not isinstance(value, (set, frozenset, tuple, list)):
        raise PolicyError(f"waive={value!r} is no set of wall names")
    for name in value:
        if name not in WALLS:
            raise PolicyError(f"waive holds {name!r}, which is no wall; the walls are {', '.join(WALLS)}")
        if name not in WAIVABLE:
            raise PolicyError(f"the wall {name!r} cannot be waived; only {', '.join(WAIVABLE)} can")
    return frozenset(value)


def path_text(path: object, what: str) -> str:
    """The absolute path of a grant, as text; PolicyError when it is no path."""
    try:
        text = os.fsdecode(path)  # type: ignore[arg-type]
    except TypeError:
        raise PolicyError(f"{what}: {path!r} is no path") from None
    if not text or "\0" in text:
        raise PolicyError(f"{what}: {path!r} is no path")
    return os.path.abspath(text)
