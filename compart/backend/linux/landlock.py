"""Landlock: the wall around paths, TCP ports, abstract sockets and signals (landlock(7)).

Runs in the host, which makes rulesets; the child only restricts itself with one. Ask the kernel for its ABI; no
version number is read anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache

from compart.backend.linux import _sys

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << n for n in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

ACCESS = {
    ("directory", "r"): READ_FILE | READ_DIR,
    ("directory", "rw"): READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG
    | MAKE_SYM | REFER,
    ("file", "r"): READ_FILE,
    ("file", "w"): WRITE_FILE | TRUNCATE,
    ("file", "rw"): READ_FILE | WRITE_FILE | TRUNCATE,
}  # fmt: skip
"""What a grant of this kind and mode allows beneath its path."""


@lru_cache(maxsize=1)
def abi() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    return _sys.landlock_abi()


def handled() -> tuple[int, int, int, int]:
    """What the kernel's ABI can restrict: (file access, network access, scopes, size of the structure)."""
    version = abi()
    files = (1 << 13) - 1
    files |= (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0) | (IOCTL_DEV if version >= 5 else 0)
    network = 3 if version >= 4 else 0
    scopes = 3 if version >= 6 else 0
    return files, network, scopes, 24 if version >= 6 else 16 if version >= 4 else 8


def ruleset(rules: Iterable[tuple[int, int]]) -> int:
    """A ruleset that denies all it can but what `rules` allow: (descriptor of a file or directory, access).

    The caller owns the descriptor that is returned.
    """
    files, network, scopes, size = handled()
    made = _sys.landlock_create_ruleset(files, network, scopes, size)
    try:
        for descriptor, access in rules:
            _sys.landlock_add_path(made, descriptor, access & files)
    except BaseException:
        os.close(made)
        raise
    return made
