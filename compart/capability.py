"""Capabilities: open descriptors with rights, on their way in.

`acquire` runs in the host and turns what the programmer handed over (an open file, a socket, a Directory, a grant) into
descriptors that are exactly that and no more. `rebuild` runs in the child, before the walls, and makes the same objects
again on the numbers that the descriptors got there. `Directory` works on both sides.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Protocol, Self

from compart import rights as r
from compart.errors import ClosedError, NotCapableError, PolicyError, UnsupportedError
from compart.policy import DirectoryMode, Grant
from compart.rights import Rights

RAW = {"r": "rb", "w": "wb", "rw": "r+b", "a": "ab", "ra": "a+b"}
OPEN = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY,
    "rw": os.O_RDWR,
    "a": os.O_WRONLY | os.O_APPEND,
    "ra": os.O_RDWR | os.O_APPEND,
}
ACCMODE = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}


class System(Protocol):
    """What a Directory asks of the operating system. The backend that is selected puts itself in `system`."""

    def open_beneath(self, directory: int, name: bytes, flags: int, mode: int) -> int:
        """A descriptor of `name` beneath `directory`; OSError with EXDEV where the name would leave it."""
        ...

    def detached(self, descriptor: int, writable: bool) -> int:
        """The directory as a mount of its own; the caller owns the descriptor."""
        ...


class _Nothing:
    def open_beneath(self, directory: int, name: bytes, flags: int, mode: int) -> int:
        raise UnsupportedError("backend", "compart has no backend for this system")

    def detached(self, descriptor: int, writable: bool) -> int:
        raise UnsupportedError("backend", "compart has no backend for this system")


system: System = _Nothing()


MOST_REPOINTED = 256
"""Files whose number is below this are rebuilt as the inherited object; all of compart's own numbers are above."""

_READING = r.CAP_READ
_WRITING = r.CAP_WRITE | r.CAP_FTRUNCATE | r.CAP_FSYNC


@dataclass(slots=True)
class Handed:
    """One descriptor on its way in: owned by this object until `close`, with what the child needs to rebuild it."""

    descriptor: int
    rights: Rights
    kind: str
    original: object
    mode: str = "r"
    position: int | None = None
    repoint: bool = False

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Directory:
    """A directory capability: everything beneath it, nothing else. `Directory(path, "r")` or "rw".

    Pass one to a sandboxed function, and it works there as it does here. Names are relative; `..`, absolute names and
    symbolic links cannot leave the directory (openat2(2) RESOLVE_BENEATH here, a mount of its own inside).
    Raises NotCapableError where a name would leave, or a change is asked of a read-only one; OSError as the system says.
    """

    def __init__(self, path: str | os.PathLike[str], mode: DirectoryMode = "r") -> None:
        if mode not in ("r", "rw"):
            raise PolicyError(f"Directory mode {mode!r} is unknown; choose 'r' or 'rw'")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise PolicyError(
                f"Directory: {os.fspath(path)!r}: {error.strerror}; name a directory that exists"
            ) from None
        self._take(descriptor, mode, str(os.fspath(path)), inside=False)

    @classmethod
    def take(cls, descriptor: int, mode: DirectoryMode, path: str, *, inside: bool = False) -> Self:
        """A Directory on an open descriptor, which it now owns. `inside` says that the kernel already bounds names."""
        made = cls.__new__(cls)
        made._take(descriptor, mode, path, inside)
        return made

    def _take(self, descriptor: int, mode: DirectoryMode, path: str, inside: bool) -> None:
        self._descriptor = descriptor
        self._tree = -1
        self._inside = inside
        self.mode: DirectoryMode = mode
        self.path = path

    # ---- names ------------------------------------------------------------------------------------------------------

    def open(self, name: str, mode: str = "r", **options: Any) -> IO[Any]:
        """Open a file beneath, as the builtin open() does; writing needs an "rw" directory."""
        flags = _open_flags(mode)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._check_writable(name)
        return os.fdopen(self._open(name, flags | os.O_CLOEXEC | os.O_NOCTTY, 0o666), mode, **options)

    def directory(self, name: str, mode: DirectoryMode | None = None) -> Directory:
        """A directory beneath as a capability of its own; its mode can only be the same or less."""
        wanted = self.mode if mode is None else mode
        if wanted == "rw":
            self._check_writable(name)
        descriptor = self._open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0)
        return Directory.take(descriptor, wanted, os.path.join(self.path, name), inside=self._inside)

    def iterdir(self, name: str = ".") -> Iterator[str]:
        """The names in a directory, in no order."""
        descriptor = self._open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0)
        try:
            return iter(os.listdir(descriptor))
        finally:
            os.close(descriptor)

    def stat(self, name: str = ".", *, follow_symlinks: bool = True) -> os.stat_result:
        """stat(2) of a name beneath."""
        if not follow_symlinks:
            with self._parent(name) as (parent, last):
                return os.stat(last, dir_fd=parent, follow_symlinks=False)
        if self._inside:
            self._check(name)
            return os.stat(name, dir_fd=self.fileno())
        descriptor = self._open(name, os.O_PATH | os.O_CLOEXEC, 0)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def exists(self, name: str) -> bool:
        """Whether a name beneath is there."""
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def read_bytes(self, name: str) -> bytes:
        """A file's whole content."""
        with self.open(name, "rb") as file:
            data: bytes = file.read()
            return data

    def read_text(self, name: str, encoding: str = "utf-8") -> str:
        """A file's whole content as text."""
        return self.read_bytes(name).decode(encoding)

    def write_bytes(self, name: str, data: bytes) -> int:
        """Make or replace a file's content; returns how many bytes were written."""
        with self.open(name, "wb") as file:
            return file.write(data)

    def write_text(self, name: str, text: str, encoding: str = "utf-8") -> int:
        """Make or replace a file's content as text; returns how many bytes were written."""
        return self.write_bytes(name, text.encode(encoding))

    def readlink(self, name: str) -> str:
        """readlinkat(2): where a symbolic link beneath points; the target may lie anywhere."""
        with self._parent(name) as (parent, last):
            return os.readlink(last, dir_fd=parent)

    def mkdir(self, name: str, mode: int = 0o777) -> None:
        """mkdirat(2)"""
        self._check_writable(name)
        with self._parent(name) as (parent, last):
            os.mkdir(last, mode, dir_fd=parent)

    def rmdir(self, name: str) -> None:
        """unlinkat(2) with AT_REMOVEDIR"""
        self._check_writable(name)
        with self._parent(name) as (parent, last):
            os.rmdir(last, dir_fd=parent)

    def unlink(self, name: str) -> None:
        """unlinkat(2)"""
        self._check_writable(name)
        with self._parent(name) as (parent, last):
            os.unlink(last, dir_fd=parent)

    def rename(self, old: str, new: str) -> None:
        """renameat(2), both names beneath this directory"""
        self._check_writable(old)
        with self._parent(old) as (source, last), self._parent(new) as (target, first):
            os.rename(last, first, src_dir_fd=source, dst_dir_fd=target)

    def symlink(self, target: str, name: str) -> None:
        """symlinkat(2); the link can be followed only as far as this directory reaches"""
        self._check_writable(name)
        with self._parent(name) as (parent, last):
            os.symlink(target, last, dir_fd=parent)

    # ---- the descriptor -----------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """The descriptor's number, still owned by this object. ClosedError after close()."""
        if self._descriptor < 0:
            raise ClosedError(f"this directory capability ({self.path}) is closed")
        return self._descriptor

    def close(self) -> None:
        """Give the authority up. Closing twice is allowed."""
        for descriptor in (self._descriptor, self._tree):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._tree = -1

    @property
    def closed(self) -> bool:
        return self._descriptor < 0

    def bounded(self) -> int:
        """A descriptor of this directory as a mount of its own, for a compartment. The caller owns it. Host only."""
        if self._tree < 0:
            self._tree = system.detached(self.fileno(), self.mode == "rw")
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._tree)

    def __enter__(self) -> Self:
        self.fileno()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():
            return
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self._descriptor}"
        return f"<compart.Directory {self.path!r} {self.mode!r} {state}>"

    # ---- helpers ----------------------------------------------------------------------------------------------------------

    def _open(self, name: str, flags: int, mode: int) -> int:
        self._check(name)
        if self._inside:
            return os.open(name, flags, mode, dir_fd=self.fileno())
        return open_beneath(self.fileno(), name, flags, mode)

    def _parent(self, name: str) -> _Parent:
        self._check(name)
        return _Parent(self, name)

    def _check(self, name: str) -> None:
        if not isinstance(name, str) or not name or "\0" in name:
            raise ValueError(f"{name!r} is no name beneath a directory; give a relative path as a string")
        if name.startswith("/") or os.path.normpath(name).split("/")[0] == "..":
            raise NotCapableError(1, f"{name!r} leaves the directory {self.path!r}; give a name beneath it")

    def _check_writable(self, name: str) -> None:
        if self.mode != "rw":
            raise NotCapableError(1, f"{self.path!r} was handed over for reading; {name!r} needs Directory(path, 'rw')")


class _Parent:
    """The directory that holds a name, open while the block runs; and the name's last part."""

    def __init__(self, directory: Directory, name: str) -> None:
        head, self.last = os.path.split(name.rstrip("/"))
        if self.last in ("", ".", ".."):
            raise ValueError(f"{name!r} does not end in a name")
        self.descriptor = directory._open(head or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, 0)

    def __enter__(self) -> tuple[int, str]:
        return self.descriptor, self.last

    def __exit__(self, *exc: object) -> None:
        os.close(self.descriptor)


def open_beneath(directory: int, name: str, flags: int, mode: int) -> int:
    """openat2(2) with RESOLVE_BENEATH: the host's own way into a Directory. NotCapableError where a name leaves."""
    try:
        return system.open_beneath(directory, os.fsencode(name), flags, mode if flags & os.O_CREAT else 0)
    except OSError as error:
        if error.errno == 18:  # EXDEV: it would have left (openat2(2))
            raise NotCapableError(1, f"{name!r} leaves the directory by '..' or a symbolic link") from None
        raise OSError(error.errno, error.strerror, name) from None


def _open_flags(mode: str) -> int:
    kind = mode.replace("b", "").replace("t", "")
    flags = {
        "r": os.O_RDONLY,
        "r+": os.O_RDWR,
        "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
        "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
        "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
        "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
        "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
        "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    }.get(kind)
    if flags is None:
        raise ValueError(f"invalid mode: {mode!r}")
    return flags


# ---- acquire: in the host -------------------------------------------------------------------------------------------------


def is_capability(value: object) -> bool:
    """Whether a value handed to a compartment stands for a descriptor."""
    return isinstance(value, (io.IOBase, socket.socket, Directory, Grant)) or hasattr(value, "_compart_descriptor")


def acquire(value: Any, rights: Rights | None = None) -> Handed | None:
    """What `value` stands for, as a descriptor that is exactly that. None for a file in memory.

    The caller owns the result. `rights` narrows it; NotCapableError when they would widen it. ClosedError, PolicyError
    or UnsupportedError before anything is forked.
    """
    if isinstance(value, Grant):
        return _acquire_grant(value)
    if isinstance(value, Directory):
        return Handed(value.bounded(), r.directory_rights(value.mode), "directory", value, mode=value.mode)
    if isinstance(value, socket.socket):
        if value.fileno() < 0:
            raise ClosedError(f"{value!r} is closed; hand over an open one")
        return _dup(value.fileno(), _narrow_socket(rights, value), "socket", value)
    if isinstance(value, io.IOBase):
        return _acquire_file(value, rights)
    return None


def _acquire_grant(grant: Grant) -> Handed | None:
    if grant.kind == "descriptor":
        if isinstance(grant.object, int):
            return _acquire_number(grant.object, grant.rights, grant)
        handed = acquire(grant.object, grant.rights)
        if handed is None:
            raise PolicyError(f"{grant.object!r} has no descriptor to grant")
        return handed
    if grant.kind == "directory":
        directory = Directory(grant.path, "rw" if grant.mode == "rw" else "r")
        try:
            rights = r.directory_rights(directory.mode)
            return Handed(directory.bounded(), rights, "directory", grant, mode=directory.mode)
        finally:
            directory.close()
    flags = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR, "a": os.O_WRONLY | os.O_APPEND}[grant.mode]
    try:
        descriptor = os.open(grant.path, flags | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise PolicyError(f"{grant}: {error.strerror}") from None
    return Handed(descriptor, r.mode_rights(grant.mode), "file", grant, mode=grant.mode)


def _acquire_file(file: Any, rights: Rights | None) -> Handed | None:
    if file.closed:
        raise ClosedError(f"{file!r} is closed; hand over an open file")
    try:
        number = file.fileno()
    except OSError:
        return None  # io.BytesIO and io.StringIO: memory, which comes by copy
    if not isinstance(file, (io.FileIO, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper)):
        raise PolicyError(f"{file!r} is no plain file; hand over the file that it reads from")
    if file.writable():
        file.flush()
    mode = _access(number)
    held = _held(number, mode)
    # An object that only reads is handed over for reading, whatever its descriptor could do.
    held = held if file.writable() else held - _WRITING
    held = held if file.readable() else held - _READING
    rights = _narrow(held, rights, file)
    wanted = _mode_of(rights, mode)
    # Buffers and decoders go along by copy; the new description stands where the old one does.
    repoint = wanted == mode and 3 <= number < MOST_REPOINTED and _raw_of(file) is not None
    position = None
    if not repoint and stat.S_ISREG(os.fstat(number).st_mode) and file.seekable():
        position = _position(file)
        if wanted != "r" and position != os.lseek(number, 0, os.SEEK_CUR):
            os.lseek(number, position, os.SEEK_SET)
    handed = _acquire_number(number, rights, file, position=position if wanted == "r" else None)
    handed.repoint = repoint
    return handed


def _position(file: Any) -> int:
    """Where the next read of the host would be, in bytes."""
    if not isinstance(file, io.TextIOWrapper):
        return int(file.tell())
    position = int(file.tell())
    if position >> 64:
        raise PolicyError(f"{file!r} stands inside a character; read up to a line's end, or hand over the binary file")
    return position


def _acquire_number(number: int, rights: Rights | None, original: object, position: int | None = None) -> Handed:
    try:
        status = os.fstat(number)
    except OSError:
        raise ClosedError(f"descriptor {number} is not open") from None
    if stat.S_ISSOCK(status.st_mode):
        return _dup(number, _narrow_socket(rights, original), "socket", original)
    if stat.S_ISDIR(status.st_mode):
        raise PolicyError(f"descriptor {number} is a directory; hand over a compart.Directory")
    mode = _access(number)
    held = _narrow(_held(number, mode), rights, original)
    wanted = _mode_of(held, mode)
    if not stat.S_ISREG(status.st_mode):
        return _dup(number, held, "file", original, mode=mode)
    if mode == wanted and mode != "r":
        return _dup(number, held, "file", original, mode=mode)  # shared on purpose: writers see one position
    # A description of its own, with the narrower mode: the kernel's second wall. The host's position and flags are out of reach.
    flags = OPEN[wanted]
    try:
        again = os.open(f"/proc/self/fd/{number}", flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        if mode == wanted:
            return _dup(number, held, "file", original, mode=mode, position=position)
        raise UnsupportedError(
            "descriptors",
            f"descriptor {number} is open for more than is granted and cannot be opened again ({error.strerror})",
            "open it with the mode that is to be granted",
        ) from None
    where = os.lseek(number, 0, os.SEEK_CUR) if position is None else position
    os.lseek(again, where, os.SEEK_SET)
    os.set_blocking(again, True)
    return Handed(again, held, "file", original, mode=wanted, position=position)


def _dup(
    number: int, rights: Rights, kind: str, original: object, *, mode: str = "rw", position: int | None = None
) -> Handed:
    return Handed(fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3), rights, kind, original, mode=mode, position=position)


def _access(number: int) -> str:
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise PolicyError(f"descriptor {number} was opened with O_PATH and can do nothing; open it for reading")
    mode = ACCMODE[flags & os.O_ACCMODE]
    appends = flags & os.O_APPEND and mode != "r"
    return mode.replace("w", "a") if appends else mode


def _held(number: int, mode: str) -> Rights:
    kind = os.fstat(number).st_mode
    if stat.S_ISREG(kind):
        return r.mode_rights(mode)
    # Pipes, terminals and devices: no mapping. On what has no position lseek(2) says ESPIPE, and files ask it first.
    base = r.CAP_EVENT | r.CAP_FSTAT | r.CAP_FCNTL
    if stat.S_ISFIFO(kind) or os.isatty(number):
        base |= r.CAP_SEEK
    return base | (r.CAP_READ if "r" in mode else r.NONE) | (r.CAP_WRITE if mode != "r" else r.NONE)


def _narrow_socket(wanted: Rights | None, what: object) -> Rights:
    # What may accept, listen or set options has to be said.
    return r.SOCKET if wanted is None else _narrow(r.SOCKET | r.CAP_SOCK_SERVER | r.CAP_SOCK_CLIENT, wanted, what)


def _narrow(held: Rights, wanted: Rights | None, what: object) -> Rights:
    if wanted is None:
        return held
    if not wanted <= held:
        raise NotCapableError(1, f"{what!r} holds {held!r}; granting {wanted!r} would widen it")
    return wanted


def _mode_of(rights: Rights, mode: str) -> str:
    """The least open mode that `rights` need, at most `mode`."""
    writes = bool(rights & r.CAP_WRITE) or bool(rights & r.CAP_FTRUNCATE)
    reads = bool(rights & r.CAP_READ)
    if mode in ("rw", "ra"):
        return mode if writes and reads else mode[1] if writes else "r"
    return mode


# ---- rebuild: in the child, before the walls ---------------------------------------------------------------------------------


def rebuild(handed: Handed, number: int) -> object:
    """The object that `handed` stands for, again, on descriptor `number`."""
    original: Any = handed.original
    if isinstance(original, Grant) and original.kind == "descriptor":
        if isinstance(original.object, int):
            return number
        original = original.object
    if handed.kind == "directory":
        path = original.path
        return Directory.take(number, "rw" if handed.mode == "rw" else "r", path, inside=True)
    if handed.kind == "socket":
        if not isinstance(original, socket.socket):
            return number
        made = socket.socket(original.family, original.type, original.proto, fileno=number)
        if original.gettimeout() is not None:
            made.settimeout(original.gettimeout())
        return made
    if isinstance(original, Grant):
        return open(number, RAW[handed.mode])
    return _rebuild_file(original, handed, number)


def _rebuild_file(original: Any, handed: Handed, number: int) -> object:
    if handed.repoint:
        return _repoint(original, handed, number)
    text = original if isinstance(original, io.TextIOWrapper) else None
    raw = io.FileIO(number, RAW[handed.mode], closefd=True)
    name = getattr(original, "name", None)
    if isinstance(name, (str, bytes)):
        raw.name = name  # libraries look at the suffix
    if isinstance(original, io.FileIO):
        return raw
    made: Any
    if handed.mode == "r":
        made = io.BufferedReader(raw)
    elif handed.mode in ("w", "a"):
        made = io.BufferedWriter(raw)
    else:
        made = io.BufferedRandom(raw) if raw.seekable() else io.BufferedReader(raw)
    if text is None:
        return made
    return io.TextIOWrapper(made, text.encoding, text.errors, None, text.line_buffering, text.write_through)


def _repoint(original: Any, handed: Handed, number: int) -> object:
    """The inherited object itself on its new number: its class, buffer, newline translation and decoder stay as they were."""
    raw = _raw_of(original)
    assert raw is not None
    name = getattr(raw, "name", None)
    # __init__ closes the old number, which is not open here any more.
    os.dup2(0, raw.fileno())
    raw.__init__(number, RAW[handed.mode], closefd=True)  # type: ignore[misc]
    if isinstance(name, (str, bytes)):
        raw.name = name
    return original


def _raw_of(file: Any) -> io.FileIO | None:
    buffered = file.buffer if type(file) is io.TextIOWrapper else file
    raw = buffered if type(buffered) is io.FileIO else getattr(buffered, "raw", None)
    return raw if type(raw) is io.FileIO and raw.closefd else None
