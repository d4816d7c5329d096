"""What code inside a compartment may ask about itself. Works outside as well, where nothing was handed over."""

from __future__ import annotations

from typing import Any

_handed: dict[int, Any] = {}
inside = False
"""Whether this process is a compartment. Set by the worker."""


def sandboxed_here() -> bool:
    """Whether this code runs in a compartment."""
    return inside


def hand(original: object, made: object) -> None:
    """Remember what stands for `original` in this compartment. Called by the worker."""
    _handed[_key(original)] = made


def granted(original: Any) -> Any:
    """The object that stands for one that the policy granted: in a compartment the new one, outside the same.

    With `Policy(grants=[grant.descriptor(sock, rights)])`, `granted(sock)` inside is the socket on its descriptor there.
    """
    return _handed.get(_key(original), original)


def descriptor(original: Any) -> int:
    """The descriptor's number of an object, or of a number, that the policy granted."""
    found = granted(original)
    return found if isinstance(found, int) else int(found.fileno())


def _key(original: Any) -> int:
    target = getattr(original, "object", original)
    # Numbers by value, objects by identity; no identity is a small number.
    return target if isinstance(target, int) else id(target)
