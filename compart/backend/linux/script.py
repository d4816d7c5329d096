"""A list of system calls, prepared in the host and carried out in the child without touching a Python object.

Pure: names and arguments in, bytes out. Between the fork and the walls every Python object that the child touches costs it
a page fault, so what can be decided before is decided before; see `_sys.run` for the carrying out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from compart.backend.linux import syscalls

CALL = struct.Struct("=7q")

STEPS = {
    "default_signals": -1,
    "exit_unless_child_of": -2,
    "drop_shared_mappings": -3,
    "limit_memory": -4,
    "clear_environ": -5,
    "install_trap": -6,
    "seccomp_tell": -7,
    "die_with_writer": -8,
    "few_arenas": -9,
}
"""Steps that are more than one system call, as `_sys.run` numbers them."""


@dataclass(slots=True)
class Script:
    """System calls in order, each with the wall it belongs to. Bytes as an argument travel as a pointer to them."""

    arch: int
    calls: list[tuple[str, str, tuple[int | bytes, ...]]] = field(default_factory=list)
    packed: bytearray = field(default_factory=bytearray)
    data: bytearray = field(default_factory=bytearray)

    def add(self, wall: str, name: str, *args: int | bytes, must: bool = True) -> None:
        """Append one call. With `must` its failure ends the script and is a failure of `wall`."""
        number = STEPS.get(name) or syscalls.number(self.arch, name)
        if number is None:
            raise ValueError(f"this architecture has no call {name}")
        flags = int(must)
        values = []
        for position, argument in enumerate(args):
            if isinstance(argument, bytes):
                flags |= 1 << (32 + position)
                values.append(len(self.data))
                self.data += argument + bytes(-len(argument) % 8)
            else:
                values.append(argument)
        self.packed += CALL.pack(number, flags, *values, *(0,) * (5 - len(values)))
        self.calls.append((wall, name, args))

    def pack(self) -> tuple[bytes, bytes]:
        """What `_sys.run` takes."""
        return bytes(self.packed), bytes(self.data)

    def names(self) -> tuple[tuple[str, str], ...]:
        """Each call's wall and name."""
        return tuple((wall, name) for wall, name, _ in self.calls)
