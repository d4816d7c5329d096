"""Capability rights: what may be done through a descriptor. They are only ever narrowed.

Pure data, for every process. The 86 names and their encoding are FreeBSD's, from <sys/capsicum.h> and rights(4) of
16-CURRENT: a set of rights is two 64-bit words, `cap_rights_t`. Bit 57 + n marks word n, bits 62 and 63 of the first
word are a version (0), and the rest are rights. A right like CAP_SEEK consists of several bits, and some names mean the
same bits (CAP_RECV is CAP_READ).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

_MARKS: Final = (1 << 57, 1 << 58)
_PAYLOAD: Final = (1 << 57) - 1


@dataclass(frozen=True, slots=True, repr=False)
class Rights:
    """A set of capability rights.

    `a | b` has the rights of both, `a & b` what they share, `a - b` what b lacks; `a <= b` and `a in b` say that b
    includes a. Iterating gives names, see names(). True unless empty.

    The fields are the bits of the two words without their marks; FreeBSD's own encoding is `words`. Raises ValueError
    for bits that are not a right.
    """

    word0: int = 0
    word1: int = 0

    def __post_init__(self) -> None:
        if self.word0 & ~_ALL_BITS[0] or self.word1 & ~_ALL_BITS[1]:
            raise ValueError(f"{self.word0:#x}, {self.word1:#x} has bits that are not a right")

    @classmethod
    def from_words(cls, word0: int, word1: int) -> Rights:
        """The set that a `cap_rights_t` holds. Raises ValueError where cap_rights_is_valid(3) would say no."""
        for index, word in enumerate((word0, word1)):
            if not 0 <= word < 1 << 64 or word & ~_PAYLOAD != _MARKS[index]:
                raise ValueError(f"{word:#x} is not word {index} of a cap_rights_t of version 0")
        return cls(word0 & _PAYLOAD, word1 & _PAYLOAD)

    @property
    def words(self) -> tuple[int, int]:
        """The two words of a `cap_rights_t`."""
        return _MARKS[0] | self.word0, _MARKS[1] | self.word1

    def names(self) -> tuple[str, ...]:
        """The fewest plain rights that make up the set, in FreeBSD's order: ("CAP_READ", "CAP_SEEK").

        Left out are rights that another one includes (CAP_SEEK_TELL by CAP_SEEK) and the names for a combination of
        others (CAP_PREAD is CAP_READ and CAP_SEEK).
        """
        plain = list(self)
        return tuple(name for name in plain if not any(RIGHTS[name] < RIGHTS[other] for other in plain))

    def __iter__(self) -> Iterator[str]:
        """The name of every right in the set that is more than a combination of others, in FreeBSD's order."""
        return (name for name in _PLAIN if RIGHTS[name] <= self)

    def __contains__(self, right: Rights | str) -> bool:
        return (RIGHTS[right] if isinstance(right, str) else right) <= self

    def __bool__(self) -> bool:
        return bool(self.word0 | self.word1)

    def __or__(self, other: Rights) -> Rights:
        return Rights(self.word0 | other.word0, self.word1 | other.word1)

    def __and__(self, other: Rights) -> Rights:
        return Rights(self.word0 & other.word0, self.word1 & other.word1)

    def __sub__(self, other: Rights) -> Rights:
        return Rights(self.word0 & ~other.word0, self.word1 & ~other.word1)

    def __le__(self, other: Rights) -> bool:
        return not self - other

    def __lt__(self, other: Rights) -> bool:
        return self != other and self <= other

    def __ge__(self, other: Rights) -> bool:
        return other <= self

    def __gt__(self, other: Rights) -> bool:
        return other < self

    def __repr__(self) -> str:
        if not self or self == ALL:
            return "ALL" if self else "NONE"
        names = self.names()
        rest = self
        for name in names:
            rest -= RIGHTS[name]
        # A difference can leave a bit that means nothing alone, such as what CAP_SEEK has beyond CAP_SEEK_TELL.
        bits = (f"Rights({rest.word0:#x}, {rest.word1:#x})",) if rest else ()
        return " | ".join((*names, *bits))


# 44 bits in the first word, 24 in the second: CAP_ALL0 and CAP_ALL1.
_ALL_BITS: Final = (0xFFF_FFFF_FFFF, 0xFF_FFFF)

NONE: Final = Rights()
ALL: Final = Rights(*_ALL_BITS)

# Files. CAP_SEEK adds to reading and writing that they may be at any offset.
CAP_READ: Final = Rights(0x1)
CAP_WRITE: Final = Rights(0x2)
CAP_SEEK_TELL: Final = Rights(0x4)
CAP_SEEK: Final = CAP_SEEK_TELL | Rights(0x8)
CAP_PREAD: Final = CAP_SEEK | CAP_READ
CAP_PWRITE: Final = CAP_SEEK | CAP_WRITE
CAP_MMAP: Final = Rights(0x10)
CAP_MMAP_R: Final = CAP_MMAP | CAP_SEEK | CAP_READ
CAP_MMAP_W: Final = CAP_MMAP | CAP_SEEK | CAP_WRITE
CAP_MMAP_X: Final = CAP_MMAP | CAP_SEEK | Rights(0x20)
CAP_MMAP_RW: Final = CAP_MMAP_R | CAP_MMAP_W
CAP_MMAP_RX: Final = CAP_MMAP_R | CAP_MMAP_X
CAP_MMAP_WX: Final = CAP_MMAP_W | CAP_MMAP_X
CAP_MMAP_RWX: Final = CAP_MMAP_R | CAP_MMAP_W | CAP_MMAP_X
CAP_CREATE: Final = Rights(0x40)
CAP_FEXECVE: Final = Rights(0x80)
CAP_FSYNC: Final = Rights(0x100)
CAP_FTRUNCATE: Final = Rights(0x200)

# Directories: every ...AT right includes CAP_LOOKUP.
CAP_LOOKUP: Final = Rights(0x400)
CAP_FCHDIR: Final = Rights(0x800)
CAP_FCHFLAGS: Final = Rights(0x1000)
CAP_CHFLAGSAT: Final = CAP_FCHFLAGS | CAP_LOOKUP
CAP_FCHMOD: Final = Rights(0x2000)
CAP_FCHMODAT: Final = CAP_FCHMOD | CAP_LOOKUP
CAP_FCHOWN: Final = Rights(0x4000)
CAP_FCHOWNAT: Final = CAP_FCHOWN | CAP_LOOKUP
CAP_FCNTL: Final = Rights(0x8000)
CAP_FLOCK: Final = Rights(0x1_0000)
CAP_FPATHCONF: Final = Rights(0x2_0000)
CAP_FSCK: Final = Rights(0x4_0000)
CAP_FSTAT: Final = Rights(0x8_0000)
CAP_FSTATAT: Final = CAP_FSTAT | CAP_LOOKUP
CAP_FSTATFS: Final = Rights(0x10_0000)
CAP_FUTIMES: Final = Rights(0x20_0000)
CAP_FUTIMESAT: Final = CAP_FUTIMES | CAP_LOOKUP
CAP_LINKAT_TARGET: Final = CAP_LOOKUP | Rights(0x40_0000)
CAP_MKDIRAT: Final = CAP_LOOKUP | Rights(0x80_0000)
CAP_MKFIFOAT: Final = CAP_LOOKUP | Rights(0x100_0000)
CAP_MKNODAT: Final = CAP_LOOKUP | Rights(0x200_0000)
CAP_RENAMEAT_SOURCE: Final = CAP_LOOKUP | Rights(0x400_0000)
CAP_SYMLINKAT: Final = CAP_LOOKUP | Rights(0x800_0000)
CAP_UNLINKAT: Final = CAP_LOOKUP | Rights(0x1000_0000)

# Sockets.
CAP_ACCEPT: Final = Rights(0x2000_0000)
CAP_BIND: Final = Rights(0x4000_0000)
CAP_CONNECT: Final = Rights(0x8000_0000)
CAP_GETPEERNAME: Final = Rights(0x1_0000_0000)
CAP_GETSOCKNAME: Final = Rights(0x2_0000_0000)
CAP_GETSOCKOPT: Final = Rights(0x4_0000_0000)
CAP_LISTEN: Final = Rights(0x8_0000_0000)
CAP_PEELOFF: Final = Rights(0x10_0000_0000)
CAP_SETSOCKOPT: Final = Rights(0x20_0000_0000)
CAP_SHUTDOWN: Final = Rights(0x40_0000_0000)
CAP_BINDAT: Final = CAP_LOOKUP | Rights(0x80_0000_0000)
CAP_CONNECTAT: Final = CAP_LOOKUP | Rights(0x100_0000_0000)
CAP_LINKAT_SOURCE: Final = CAP_LOOKUP | Rights(0x200_0000_0000)
CAP_RENAMEAT_TARGET: Final = CAP_LOOKUP | Rights(0x400_0000_0000)
CAP_FCHROOT: Final = Rights(0x800_0000_0000)
CAP_RECV: Final = CAP_READ
CAP_SEND: Final = CAP_WRITE
CAP_SOCK_CLIENT: Final = (
    CAP_CONNECT
    | CAP_GETPEERNAME
    | CAP_GETSOCKNAME
    | CAP_GETSOCKOPT
    | CAP_PEELOFF
    | CAP_RECV
    | CAP_SEND
    | CAP_SETSOCKOPT
    | CAP_SHUTDOWN
)
CAP_SOCK_SERVER: Final = (CAP_SOCK_CLIENT - CAP_CONNECT) | CAP_ACCEPT | CAP_BIND | CAP_LISTEN

# Mandatory access control and semaphores.
CAP_MAC_GET: Final = Rights(0, 0x1)
CAP_MAC_SET: Final = Rights(0, 0x2)
CAP_SEM_GETVALUE: Final = Rights(0, 0x4)
CAP_SEM_POST: Final = Rights(0, 0x8)
CAP_SEM_WAIT: Final = Rights(0, 0x10)

# Events, devices, processes.
CAP_EVENT: Final = Rights(0, 0x20)
CAP_KQUEUE_EVENT: Final = Rights(0, 0x40)
CAP_IOCTL: Final = Rights(0, 0x80)
CAP_TTYHOOK: Final = Rights(0, 0x100)
CAP_PDGETPID: Final = Rights(0, 0x200)
CAP_PDWAIT: Final = Rights(0, 0x400)
CAP_PDKILL: Final = Rights(0, 0x800)

# Extended attributes and access control lists.
CAP_EXTATTR_DELETE: Final = Rights(0, 0x1000)
CAP_EXTATTR_GET: Final = Rights(0, 0x2000)
CAP_EXTATTR_LIST: Final = Rights(0, 0x4000)
CAP_EXTATTR_SET: Final = Rights(0, 0x8000)
CAP_ACL_CHECK: Final = Rights(0, 0x1_0000)
CAP_ACL_DELETE: Final = Rights(0, 0x2_0000)
CAP_ACL_GET: Final = Rights(0, 0x4_0000)
CAP_ACL_SET: Final = Rights(0, 0x8_0000)

CAP_KQUEUE_CHANGE: Final = Rights(0, 0x10_0000)
CAP_KQUEUE: Final = CAP_KQUEUE_EVENT | CAP_KQUEUE_CHANGE
CAP_INOTIFY_ADD: Final = Rights(0, 0x20_0000)
CAP_INOTIFY_RM: Final = Rights(0, 0x40_0000)
CAP_PDDUPFD: Final = Rights(0, 0x80_0000)

RIGHTS: Final[Mapping[str, Rights]] = MappingProxyType(
    {name: value for name, value in globals().items() if name.startswith("CAP_")}
)
"""Every right by its name."""


def _plain() -> tuple[str, ...]:
    """The names that bring a bit which no name before them has: the others combine or repeat."""
    seen = NONE
    names = []
    for name, right in RIGHTS.items():
        if not right <= seen:
            names.append(name)
            seen |= right
    return tuple(names)


_PLAIN: Final = _plain()

FCNTL: Final[Mapping[str, int]] = MappingProxyType({"F_GETFL": 8, "F_SETFL": 16, "F_GETOWN": 32, "F_SETOWN": 64})
"""The bit of each fcntl(2) command in the mask of cap_fcntls_limit(2): 1 << FreeBSD's number of the command. Linux
numbers two of them differently, so go by name."""

FCNTL_ALL: Final = 0x78

SOCKET: Final = (
    CAP_RECV | CAP_SEND | CAP_SHUTDOWN | CAP_GETSOCKNAME | CAP_GETPEERNAME | CAP_GETSOCKOPT
    | CAP_EVENT | CAP_FSTAT | CAP_FCNTL
)  # fmt: skip
"""A connected socket: talk, close either half, ask. Not CAP_SETSOCKOPT, which can attach programs and join groups."""

PIPE_READ: Final = CAP_READ | CAP_EVENT | CAP_FSTAT | CAP_FCNTL
PIPE_WRITE: Final = CAP_WRITE | CAP_EVENT | CAP_FSTAT | CAP_FCNTL

_FILE: Final = CAP_FSTAT | CAP_FSTATFS | CAP_FCNTL | CAP_EVENT
_MODES: Final = {
    "r": _FILE | CAP_READ | CAP_SEEK | CAP_MMAP_R,
    "w": _FILE | CAP_WRITE | CAP_SEEK | CAP_FSYNC | CAP_FTRUNCATE,
    "rw": _FILE | CAP_READ | CAP_WRITE | CAP_SEEK | CAP_MMAP_RW | CAP_FSYNC | CAP_FTRUNCATE,
    # Writing without CAP_SEEK is appending: pwrite() needs both.
    "a": _FILE | CAP_WRITE | CAP_SEEK_TELL | CAP_FSYNC,
    # Reading anywhere, writing at the end: no truncation, and no mapping, as CAP_MMAP with READ and WRITE is CAP_MMAP_RW.
    "ra": _FILE | CAP_READ | CAP_WRITE | CAP_SEEK | CAP_FSYNC,
}
_CHANGES: Final = (
    CAP_CREATE | CAP_MKDIRAT | CAP_UNLINKAT | CAP_RENAMEAT_SOURCE | CAP_RENAMEAT_TARGET | CAP_SYMLINKAT | CAP_FUTIMESAT
)


def mode_rights(mode: str) -> Rights:
    """The rights on a regular file that is held for reading ("r"), writing ("w"), both ("rw"), appending ("a") or reading and
    appending ("ra").

    Raises ValueError for another mode.
    """
    if mode not in _MODES:
        raise ValueError(f'mode {mode!r} is none of "r", "w", "rw", "a", "ra"')
    return _MODES[mode]


def directory_rights(mode: str) -> Rights:
    """The rights on a directory held "r" or "rw".

    Files beneath it may be looked up and used as mode_rights() says; "rw" adds making, renaming and removing, but not
    hard links, modes or owners. A file opened beneath the directory has no more rights than the directory. Raises
    ValueError for another mode.
    """
    if mode not in ("r", "rw"):
        raise ValueError(f'mode {mode!r} is neither "r" nor "rw"')
    return _MODES[mode] | CAP_LOOKUP | (_CHANGES if mode == "rw" else NONE)
