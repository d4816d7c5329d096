"""The walls: the only code that knows an operating system.

`select()` gives the backend of this machine. Turning a policy into a system's calls is pure and works anywhere; only
`enter` needs the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from compart import capability
from compart.capability import Handed, System
from compart.errors import UnsupportedError
from compart.policy import Policy


@dataclass(frozen=True, slots=True)
class Wall:
    """One wall of a compartment: whether it is up, and what it is made of or why it is missing."""

    name: str
    up: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name:<15} {'up' if self.up else 'MISSING':<8} {self.detail}"


@dataclass(frozen=True, slots=True)
class Enforcement:
    """Which walls a compartment really has. `walls` is in the order in which they go up."""

    walls: tuple[Wall, ...]

    def __getitem__(self, name: str) -> Wall:
        for wall in self.walls:
            if wall.name == name:
                return wall
        raise KeyError(name)

    @property
    def up(self) -> frozenset[str]:
        """The names of the walls that are up."""
        return frozenset(wall.name for wall in self.walls if wall.up)

    @property
    def missing(self) -> frozenset[str]:
        """The names of the walls that are not."""
        return frozenset(wall.name for wall in self.walls if not wall.up)

    def __str__(self) -> str:
        return "\n".join(str(wall) for wall in self.walls)


class Channel(NamedTuple):
    """The child's ends: numbers as the host has them, to be moved to where the filter expects them."""

    result: int
    trace: int
    stdout: int
    stderr: int
    control: int
    lifeline: int = -1


class Spawned(Protocol):
    """What the host keeps of a child."""

    pid: int
    pidfd: int


class Backend(System, Protocol):
    """What compart asks of an operating system."""

    def plan(self, policy: Policy, handed: Sequence[Handed]) -> Any:
        """Host: everything that can be decided before the fork. UnsupportedError for a wall that cannot be put up."""
        ...

    def enforcement(self, policy: Policy) -> Enforcement:
        """Host: which walls a compartment of this policy gets here."""
        ...

    def forget(self) -> None:
        """Host: drop everything that is kept between calls, as it may be gone or another user's."""
        ...

    def enter(self, plan: Any, script: Any, prepare: Callable[[], None]) -> None:
        """Child: put up every wall of the plan, by what `plan.write` gave. There is no way back.

        `prepare` is called when the handed descriptors have their numbers and all walls are up but the last.
        """
        ...


class _Selected:
    """What a Directory asks of the system goes to the backend, found at the first question."""

    def open_beneath(self, directory: int, name: bytes, flags: int, mode: int) -> int:
        return select().open_beneath(directory, name, flags, mode)

    def detached(self, descriptor: int, writable: bool) -> int:
        return select().detached(descriptor, writable)


capability.system = _Selected()


@lru_cache(maxsize=1)
def select() -> Backend:
    """The backend of this machine. UnsupportedError where compart has none."""
    if sys.platform == "linux":
        from compart.backend.linux.walls import Linux

        return Linux()
    raise UnsupportedError("backend", f"compart has no walls for {sys.platform}", "run it on Linux")
