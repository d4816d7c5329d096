"""Surface "descriptors": what the host had open, and more than was granted on what was handed over.

A file that the host opened for reading and writing and handed over for reading is the hard case: the kernel would let
everything through, so the refusal is compart's alone.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

from tests.escape import native
from tests.escape.framework import CONTAINED, World, attempt, raw, reaches

FD_RANGE = 1024

# -- what the host had open --------------------------------------------------------------------------------------------


def _open_widely(world: World) -> Iterator[None]:
    """The secret is open in the host, inheritable, at or above each of these numbers."""
    first = os.open(world.secret, os.O_RDONLY)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    wanted = (3, 63, 100, 255, 479, 480, 481, 511, 512, 513, 700, 1023, 1024, 4000)
    world.opened = [fcntl.fcntl(first, fcntl.F_DUPFD, number) for number in wanted if number < most - 100]
    yield
    for descriptor in (first, *world.opened):
        os.close(descriptor)


@attempt(
    surface="descriptors",
    refused_with=CONTAINED,
    arrange=_open_widely,
    proof=lambda world, found: found > len(world.opened),
)
def reads_from_every_number(outside: World) -> int:
    """How many descriptors lead to the secret."""
    found = 0
    for number in range(4096 + FD_RANGE):
        try:
            if os.pread(number, 64, 0) == outside.token:
                found += 1
        except OSError:
            continue
    return found


@attempt(
    surface="descriptors",
    refused_with=CONTAINED,
    arrange=_open_widely,
    proof=lambda world, numbers: set(world.opened) <= set(numbers),
)
def finds_what_the_host_had_open(outside: World) -> list[int]:
    found = []
    for number in range(4096 + FD_RANGE):
        if native.syscall(native.NUMBERS["fcntl"], number, fcntl.F_GETFD) >= 0:
            found.append(number)
    return found


def _listening(world: World) -> Iterator[None]:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        world.listener = listener.fileno()
        with socket.create_connection(listener.getsockname()):
            yield


@attempt(
    surface="descriptors",
    refused_with=(errno.EBADF, PermissionError),
    arrange=_listening,
    proof=lambda world, fd: fd >= 0,
)
def accepts_on_a_listener_of_the_host(outside: World) -> int:
    return native.call("accept", outside.listener, None, None)


@attempt(
    surface="descriptors", refused_with=(errno.EBADF, PermissionError), arrange=lambda world: _directory_open(world)
)
def opens_beneath_a_directory_of_the_host(outside: World) -> bytes:
    return os.read(native.call("openat", outside.descriptor, b"secret", os.O_RDONLY), 64)


def _directory_open(world: World) -> Iterator[None]:
    world.descriptor = os.open(world.directory, os.O_RDONLY | os.O_DIRECTORY)
    yield
    os.close(world.descriptor)


# -- more than reading, on a file handed over for reading --------------------------------------------------------------


def _changed(world: World) -> bool:
    return world.secret.read_bytes() != world.token


def _on_an_input(call: str, arguments: Callable[[Any], tuple[Any, ...]], *, name: str = "", **options: Any) -> None:
    """One call on a file handed over as open(path, "rb"), which the kernel itself would let through."""
    raw(
        call,
        lambda w, file: (file.fileno(), *arguments(w)),
        surface="descriptors",
        name=name or f"{call}_of_an_input_file",
        gives=lambda w: (open(w.secret, "rb", buffering=0),),  # noqa: SIM115
        **options,
    )


_on_an_input("fchmod", lambda w: (0o751,), effect=lambda w: stat.S_IMODE(w.secret.stat().st_mode) == 0o751)
_on_an_input("fchown", lambda w: (12345, -1), effect=lambda w: w.secret.stat().st_uid == 12345, privileged=True)
_on_an_input(
    "utimensat", lambda w: (None, struct.pack("qqqq", 1, 0, 1, 0), 0), effect=lambda w: w.secret.stat().st_mtime < 1000
)
_on_an_input("fsetxattr", lambda w: (b"user.mark", b"1", 1, 0), effect=lambda w: "user.mark" in os.listxattr(w.secret))
_on_an_input("fgetxattr", lambda w: (b"user.none", None, 0), outside=reaches(errno.ENODATA))
_on_an_input("flistxattr", lambda w: (None, 0))
_on_an_input("fremovexattr", lambda w: (b"user.none",), outside=reaches(errno.ENODATA))
_on_an_input("flock", lambda w: (fcntl.LOCK_EX,), effect=lambda w: _is_locked(w))
_on_an_input("flock", lambda w: (fcntl.LOCK_SH | fcntl.LOCK_NB,), name="shared_flock_of_an_input_file")
_on_an_input(
    "fcntl",
    lambda w: (fcntl.F_SETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)),
    name="locks_a_record_of_an_input_file",
)
_on_an_input(
    "fcntl",
    lambda w: (37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)),
    name="locks_the_description_of_an_input_file",
)
_on_an_input(
    "fcntl",
    lambda w: (fcntl.F_GETLK, ctypes.create_string_buffer(struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))),
    name="asks_who_locks_an_input_file",
)
_on_an_input("fcntl", lambda w: (fcntl.F_SETLEASE, fcntl.F_RDLCK), name="leases_an_input_file")
_on_an_input("fcntl", lambda w: (fcntl.F_SETFL, os.O_APPEND), name="sets_append_on_an_input_file")
_on_an_input("fcntl", lambda w: (fcntl.F_SETFL, os.O_NONBLOCK), name="sets_nonblock_on_an_input_file")
_on_an_input("fcntl", lambda w: (fcntl.F_SETOWN, os.getpid()), name="sets_the_owner_of_an_input_file")
_on_an_input(
    "fcntl",
    lambda w: (fcntl.F_NOTIFY, 0),
    name="asks_for_notice_of_an_input_file",
    outside=reaches(errno.ENOTDIR, errno.EINVAL),
)
_on_an_input("fcntl", lambda w: (1036, struct.pack("Q", 2)), name="sets_the_hint_of_an_input_file")
_on_an_input("ioctl", lambda w: (0x80086601, ctypes.create_string_buffer(8)), name="reads_the_flags_of_an_input_file")
_on_an_input(
    "ioctl",
    lambda w: (0x40086602, struct.pack("q", 0x80)),
    name="sets_the_flags_of_an_input_file",
    outside=reaches(errno.EOPNOTSUPP, errno.ENOTTY),
)
_on_an_input(
    "ioctl", lambda w: (0x5452, struct.pack("i", 1)), name="makes_an_input_file_signal", outside=reaches(errno.ENOTTY)
)
_on_an_input(
    "ioctl",
    lambda w: (0x2, ctypes.create_string_buffer(8)),
    name="maps_the_blocks_of_an_input_file",
    outside=reaches(errno.ENOTTY, errno.EINVAL),
)
_on_an_input("readahead", lambda w: (0, 4096))
_on_an_input("syncfs", lambda w: ())
_on_an_input("sync_file_range", lambda w: (0, 0, 0))
_on_an_input("fsync", lambda w: ())
_on_an_input("fchdir", lambda w: (), outside=reaches(errno.ENOTDIR))
_on_an_input("cachestat", lambda w: (struct.pack("QQ", 0, 4096), ctypes.create_string_buffer(40), 0))
_on_an_input(
    "name_to_handle_at",
    lambda w: (
        b"",
        ctypes.create_string_buffer(struct.pack("Ii", 120, 0), 128),
        ctypes.create_string_buffer(4),
        0x1000,
    ),
)
_on_an_input("vmsplice", lambda w: (None, 0, 0), outside=reaches(errno.EBADF))
_on_an_input("io_submit", lambda w: (0, None), name="submits_asynchronous_io", outside=reaches(errno.EINVAL))
_on_an_input("linkat", lambda w: (b"", -100, w.marker, 0x1000), effect=lambda w: w.marker.exists(), privileged=True)
_on_an_input("faccessat2", lambda w: (b"", os.R_OK, 0x1000))
_on_an_input(
    "fchmodat2", lambda w: (b"", 0o751, 0x1000), effect=lambda w: stat.S_IMODE(w.secret.stat().st_mode) == 0o751
)
_on_an_input(
    "fchownat", lambda w: (b"", 12345, -1, 0x1000), effect=lambda w: w.secret.stat().st_uid == 12345, privileged=True
)
_on_an_input("inotify_add_watch", lambda w: (b"x", 0x100), outside=reaches(errno.EINVAL))
# A copy may be had, but only where it keeps its rights: never among the compartment's own numbers.
_AMONG_ITS_OWN: dict[str, Any] = {"proof": lambda w, fd: 0 <= fd < 480, "refused_with": (PermissionError, CONTAINED)}
_on_an_input("dup", lambda w: (), name="dup_of_an_input_file", **_AMONG_ITS_OWN)
_on_an_input("dup2", lambda w: (50,), name="dup2_of_an_input_file", **_AMONG_ITS_OWN)
_on_an_input("dup3", lambda w: (50, 0), name="dup3_of_an_input_file", **_AMONG_ITS_OWN)
_on_an_input("fcntl", lambda w: (fcntl.F_DUPFD, 40), name="duplicates_an_input_file_by_fcntl", **_AMONG_ITS_OWN)
_on_an_input(
    "fcntl", lambda w: (fcntl.F_DUPFD_CLOEXEC, 40), name="duplicates_an_input_file_by_fcntl_cloexec", **_AMONG_ITS_OWN
)


def _is_locked(world: World) -> bool:
    # The description is the host's own as well, so ask by a new one.
    with open(world.secret, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@attempt(
    surface="descriptors",
    refused_with=PermissionError,
    call="openat",
    effect=_changed,
    gives=lambda w: (open(w.secret, "rb", buffering=0),),  # noqa: SIM115
)
def reopens_an_input_file_for_writing(outside: World, file: Any) -> None:
    with open(f"/proc/self/fd/{file.fileno()}", "r+b") as again:
        again.write(b"changed")


# -- a file that the host opened "r+b" and granted as "r" ---------------------------------------------------------------
# Outside each of these changes the file. Two ways lead to such a grant: an object that says "rb" over a description that
# can write, and rights written down for one that says "r+b".


def _says_rb(world: World) -> tuple[Any, ...]:
    return (os.fdopen(os.open(world.secret, os.O_RDWR), "rb", buffering=0),)


def _says_r_plus_b(world: World) -> tuple[Any, ...]:
    world.granted = open(world.secret, "r+b", buffering=0)  # noqa: SIM115
    return (world.granted,)


def _grants_reading(world: World) -> dict[str, Any]:
    from compart import grant, rights

    return {"grants": [grant.descriptor(world.granted, rights.mode_rights("r"))]}


def _writes(*, refused_with: Any = (PermissionError, errno.EBADF)) -> Callable[[Callable[..., Any]], None]:
    """Enter a way of changing a file, for both ways of granting it. EBADF is the kernel's word for a read-only one."""

    def enter(function: Callable[..., Any]) -> None:
        common: dict[str, Any] = {"surface": "descriptors", "refused_with": refused_with, "effect": _changed}
        attempt(name=function.__name__, gives=_says_rb, **common)(function)
        attempt(name=f"{function.__name__}_granted_by_rights", gives=_says_r_plus_b, policy=_grants_reading, **common)(
            function
        )

    return enter


@_writes()
def writes_to_an_input_file(outside: World, file: Any) -> None:
    native.call("write", file.fileno(), b"changed", 7)


@_writes()
def writes_with_garbage_above_the_descriptor(outside: World, file: Any) -> None:
    native.call("write", (1 << 32) | file.fileno(), b"changed", 7)


@_writes()
def writes_at_a_place_with_garbage_above_the_descriptor(outside: World, file: Any) -> None:
    native.call("pwrite64", (0xFFFFFFFF << 32) | file.fileno(), b"changed", 7, 0)


@_writes()
def writes_at_a_place_in_an_input_file(outside: World, file: Any) -> None:
    native.call("pwrite64", file.fileno(), b"changed", 7, 0)


def _vector(text: bytes) -> tuple[Any, Any]:
    data = ctypes.create_string_buffer(text, len(text))
    return data, ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(data), len(text)), 16)


@_writes()
def writes_a_vector_to_an_input_file(outside: World, file: Any) -> None:
    _kept, vector = _vector(b"changed")
    native.call("writev", file.fileno(), vector, 1)


@_writes()
def writes_a_vector_at_a_place_in_an_input_file(outside: World, file: Any) -> None:
    _kept, vector = _vector(b"changed")
    native.call("pwritev", file.fileno(), vector, 1, 0, 0)


@_writes()
def writes_a_vector_with_flags_to_an_input_file(outside: World, file: Any) -> None:
    _kept, vector = _vector(b"changed")
    native.call("pwritev2", file.fileno(), vector, 1, 0, 0, 0)


@_writes(refused_with=(PermissionError, errno.EINVAL))
def truncates_an_input_file(outside: World, file: Any) -> None:
    native.call("ftruncate", file.fileno(), 3)


@_writes()
def allocates_in_an_input_file(outside: World, file: Any) -> None:
    native.call("fallocate", file.fileno(), 0, 0, 8192)


@_writes()
def punches_a_hole_into_an_input_file(outside: World, file: Any) -> None:
    native.call("fallocate", file.fileno(), 0x3, 0, 8)


@_writes()
def sends_a_file_into_an_input_file(outside: World, file: Any) -> None:
    # From itself: what it holds already goes to another place in it.
    native.call("sendfile", file.fileno(), file.fileno(), struct.pack("q", 0), 5)
    native.call("sendfile", file.fileno(), file.fileno(), struct.pack("q", 3), 5)


@_writes()
def copies_a_range_into_an_input_file(outside: World, file: Any) -> None:
    native.call("copy_file_range", file.fileno(), struct.pack("q", 0), file.fileno(), struct.pack("q", 16), 8, 0)


@_writes()
def splices_into_an_input_file(outside: World, file: Any) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"changed")
    native.call("splice", read_end, None, file.fileno(), struct.pack("q", 0), 7, 0)


@_writes(refused_with=(PermissionError, errno.EACCES))
def maps_an_input_file_for_writing(outside: World, file: Any) -> None:
    address = native.call("mmap", 0, 4096, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, file.fileno(), 0)
    ctypes.memmove(address, b"changed", 7)


@_writes(refused_with=(PermissionError, errno.EACCES))
def maps_an_input_file_by_the_validating_flag(outside: World, file: Any) -> None:
    # MAP_SHARED_VALIDATE is 3, which a look at the bit of MAP_PRIVATE takes for private.
    address = native.call("mmap", 0, 4096, mmap.PROT_READ | mmap.PROT_WRITE, 0x03, file.fileno(), 0)
    ctypes.memmove(address, b"changed", 7)


@_writes(refused_with=(PermissionError, errno.EACCES))
def maps_an_input_file_for_reading_and_then_makes_it_writable(outside: World, file: Any) -> None:
    # What mprotect may add is decided by how the description was opened, not by who holds it.
    address = native.call("mmap", 0, 4096, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    native.call("mprotect", address, 4096, mmap.PROT_READ | mmap.PROT_WRITE)
    ctypes.memmove(address, b"changed", 7)


@_writes()
def writes_through_a_copy_of_an_input_file(outside: World, file: Any) -> None:
    native.call("write", native.call("dup", file.fileno()), b"changed", 7)


@_writes()
def writes_through_a_copy_with_garbage_above_the_descriptor(outside: World, file: Any) -> None:
    native.call("write", native.call("dup", (1 << 32) | file.fileno()), b"changed", 7)


@_writes(refused_with=(PermissionError, errno.EBADF, errno.EINVAL))
def writes_through_a_copy_at_every_number(outside: World, file: Any) -> None:
    last: OSError | None = None
    for number in range(3, 1024):
        try:
            native.call("dup2", file.fileno(), number)
            native.call("write", number, b"changed", 7)
        except OSError as error:
            last = error
    if last is not None and not _changed_here(file, outside):
        raise last


def _changed_here(file: Any, outside: World) -> bool:
    return os.pread(file.fileno(), 64, 0) != outside.token


@_writes()
def writes_through_a_copy_by_fcntl(outside: World, file: Any) -> None:
    native.call("write", native.call("fcntl", file.fileno(), fcntl.F_DUPFD, 3), b"changed", 7)


@_writes()
def writes_through_a_copy_it_sends_itself(outside: World, file: Any) -> None:
    import array
    import socket

    here, there = socket.socketpair()
    here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))])
    _, ancillary, _, _ = there.recvmsg(1, socket.CMSG_SPACE(4))
    os.write(struct.unpack("i", ancillary[0][2][:4])[0], b"changed")


@_writes(refused_with=(PermissionError, errno.ENOSYS))
def writes_through_a_ring(outside: World, file: Any) -> None:
    # io_uring acts on descriptors without a system call of its own for each.
    ring = native.syscall(native.NUMBERS["io_uring_setup"], 4, ctypes.create_string_buffer(120))
    native.checked(ring)
    native.call("pwrite64", file.fileno(), b"changed", 7, 0)


# -- one right at a time --------------------------------------------------------------------------------------------------
# The description can do all of it, so that compart's table of rights alone refuses what was not granted.


def _without_a_right(
    name: str, call: str, arguments: Callable[[Any, Any], tuple[Any, ...]], held: str, **options: Any
) -> None:
    """One call on a file that is open for everything, granted with these rights (names, separated by spaces)."""

    def policy(world: World) -> dict[str, Any]:
        from compart import grant, rights

        wanted = rights.NONE
        for right in held.split():
            wanted |= getattr(rights, right)
        return {"grants": [grant.descriptor(world.granted, wanted)]}

    def gives(world: World) -> tuple[Any, ...]:
        world.granted = open(world.secret, "r+b", buffering=0)  # noqa: SIM115
        return (world.granted,)

    options.setdefault("gives", gives)
    raw(call, lambda w, file: arguments(w, file.fileno()), surface="descriptors", name=name, policy=policy, **options)


_OUT = ctypes.create_string_buffer(256)
_WRITING = "CAP_WRITE CAP_SEEK"
_without_a_right(
    "truncates_without_the_right",
    "ftruncate",
    lambda w, fd: (fd, 0),
    _WRITING,
    effect=lambda w: w.secret.read_bytes() == b"",
)
_without_a_right("punches_without_the_right", "fallocate", lambda w, fd: (fd, 3, 0, 8), _WRITING, effect=_changed)
_without_a_right("synchronises_without_the_right", "fsync", lambda w, fd: (fd,), _WRITING)
_without_a_right("synchronises_the_data_without_the_right", "fdatasync", lambda w, fd: (fd,), _WRITING)
_without_a_right("asks_for_the_status_without_the_right", "fstat", lambda w, fd: (fd, _OUT), "CAP_READ CAP_SEEK")
_without_a_right("asks_for_the_file_system_without_the_right", "fstatfs", lambda w, fd: (fd, _OUT), "CAP_READ CAP_SEEK")
_without_a_right("moves_without_the_right", "lseek", lambda w, fd: (fd, 3, os.SEEK_SET), "CAP_READ")
_without_a_right(
    "asks_for_the_end_without_the_right", "lseek", lambda w, fd: (fd, 0, os.SEEK_END), "CAP_READ CAP_SEEK_TELL"
)
_without_a_right("reads_at_a_place_without_the_right", "pread64", lambda w, fd: (fd, _OUT, 8, 0), "CAP_READ")
_without_a_right("reads_a_vector_at_a_place_without_the_right", "preadv", lambda w, fd: (fd, None, 0, 0, 0), "CAP_READ")
_without_a_right(
    "reads_a_vector_with_flags_without_the_right", "preadv2", lambda w, fd: (fd, None, 0, 0, 0, 0), "CAP_READ"
)
_without_a_right(
    "writes_at_a_place_without_the_right",
    "pwrite64",
    lambda w, fd: (fd, b"changed", 7, 0),
    "CAP_READ CAP_WRITE",
    effect=_changed,
)
_without_a_right("maps_without_the_right", "mmap", lambda w, fd: (0, 4096, 1, 2, fd, 0), "CAP_READ CAP_SEEK")
_without_a_right("maps_nothing_without_the_right", "mmap", lambda w, fd: (0, 4096, 0, 2, fd, 0), "CAP_READ CAP_SEEK")


def _a_socket(world: World) -> tuple[Any, ...]:
    import socket

    world.granted, world.peer = socket.socketpair()
    world.peer.sendall(world.token)
    world.peer.setblocking(False)
    return world.granted, world.peer


def _a_socket_and_a_file(world: World) -> tuple[Any, ...]:
    return *_a_socket(world), open(world.secret, "rb", buffering=0)


def _socket_held(right: str) -> Callable[[World], dict[str, Any]]:
    def policy(world: World) -> dict[str, Any]:
        from compart import grant, rights

        return {"grants": [grant.descriptor(world.granted, getattr(rights, right) | rights.CAP_FSTAT)]}

    return policy


def _told(world: World) -> bool:
    try:
        return bool(world.peer.recv(100))
    except BlockingIOError:
        return False


def _on_a_socket(name: str, call: str, arguments: Callable[[Any], tuple[Any, ...]], held: str, **options: Any) -> None:
    """One call on a connected socket granted with one right."""
    raw(
        call,
        lambda w, s, peer: arguments(s.fileno()),
        surface="descriptors",
        name=name,
        gives=_a_socket,
        policy=_socket_held(held),
        **options,
    )


_RECEIVES: dict[str, Any] = {"held": "CAP_RECV", "effect": _told}
_VECTOR = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(_OUT), 8), 16)
_on_a_socket("writes_to_a_socket_for_receiving", "write", lambda fd: (fd, b"told", 4), **_RECEIVES)
_on_a_socket("writes_a_vector_to_a_socket_for_receiving", "writev", lambda fd: (fd, _VECTOR, 1), **_RECEIVES)
_on_a_socket("sends_by_a_socket_for_receiving", "sendto", lambda fd: (fd, b"told", 4, 0, 0, 0), **_RECEIVES)
_on_a_socket("closes_half_of_a_socket_for_receiving", "shutdown", lambda fd: (fd, 1), "CAP_RECV")
_on_a_socket("asks_a_socket_for_receiving", "getsockopt", lambda fd: (fd, 1, 3, _OUT, struct.pack("I", 4)), "CAP_RECV")
_on_a_socket(
    "asks_a_socket_for_receiving_for_its_name", "getsockname", lambda fd: (fd, _OUT, struct.pack("I", 100)), "CAP_RECV"
)
_on_a_socket(
    "asks_a_socket_for_receiving_for_its_peer", "getpeername", lambda fd: (fd, _OUT, struct.pack("I", 100)), "CAP_RECV"
)
_on_a_socket("reads_from_a_socket_for_sending", "read", lambda fd: (fd, _OUT, 8), "CAP_SEND")
_on_a_socket("reads_a_vector_from_a_socket_for_sending", "readv", lambda fd: (fd, _VECTOR, 1), "CAP_SEND")
_on_a_socket("receives_by_a_socket_for_sending", "recvfrom", lambda fd: (fd, _OUT, 8, 0, 0, 0), "CAP_SEND")


@attempt(
    surface="descriptors",
    refused_with=PermissionError,
    call="splice",
    gives=_a_socket,
    policy=_socket_held("CAP_RECV"),
    effect=_told,
)
def splices_into_a_socket_for_receiving(outside: World, connection: Any, peer: Any) -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"told")
    native.call("splice", read_end, None, connection.fileno(), None, 4, 0)


@attempt(
    surface="descriptors",
    refused_with=PermissionError,
    call="sendfile",
    gives=_a_socket_and_a_file,
    policy=_socket_held("CAP_RECV"),
    effect=_told,
)
def sends_a_file_into_a_socket_for_receiving(outside: World, connection: Any, peer: Any, file: Any) -> None:
    native.call("sendfile", connection.fileno(), file.fileno(), None, 4)


# -- two files with different rights ------------------------------------------------------------------------------------


def _gives_two(world: World) -> tuple[Any, ...]:
    (world.directory / "other").write_bytes(b"other")
    return open(world.secret, "r+b", buffering=0), open(world.directory / "other", "r+b", buffering=0)


def _one_for_reading(world: World) -> dict[str, Any]:
    from compart import grant, rights

    return {"grants": [grant.descriptor(world.reading, rights.mode_rights("r"))]}


def _two_files(world: World) -> tuple[Any, ...]:
    reading, writing = _gives_two(world)
    world.reading = reading
    return reading, writing


@attempt(
    surface="descriptors",
    gives=_two_files,
    policy=_one_for_reading,
    effect=_changed,
    refused_with=(PermissionError, errno.EBADF, errno.EMFILE, errno.EINVAL),
)
def copies_until_it_reaches_the_numbers_of_another(outside: World, reading: Any, writing: Any) -> None:
    # The numbers of a granted descriptor say what it may do. Copies must not run over into the next range.
    os.pwrite(writing.fileno(), b"x", 0)
    last: OSError | None = None
    for _ in range(200):
        try:
            copy = native.call("fcntl", reading.fileno(), fcntl.F_DUPFD, 0)
            native.call("pwrite64", copy, b"changed", 7, 0)
        except OSError as error:
            last = error
    for number in range(1200):
        native.syscall(native.NUMBERS["pwrite64"], number, b"changed", 7, 0) if number != writing.fileno() else None
    if last is not None and not _changed_here(reading, outside):
        raise last


@attempt(
    surface="descriptors",
    gives=_two_files,
    policy=_one_for_reading,
    effect=_changed,
    refused_with=(PermissionError, errno.EBADF, errno.EINVAL),
)
def puts_a_copy_in_the_place_of_another(outside: World, reading: Any, writing: Any) -> None:
    place = writing.fileno()
    os.close(place)
    native.call("dup2", reading.fileno(), place)
    native.call("pwrite64", place, b"changed", 7, 0)


@attempt(
    surface="descriptors",
    gives=_two_files,
    policy=_one_for_reading,
    effect=_changed,
    refused_with=(PermissionError, errno.EBADF, errno.EINVAL),
)
def puts_a_copy_in_the_place_of_a_closed_one(outside: World, reading: Any, writing: Any) -> None:
    place = writing.fileno()
    os.close(place)
    native.call("fcntl", reading.fileno(), fcntl.F_DUPFD, place)
    native.call("pwrite64", place, b"changed", 7, 0)


# -- pipes, terminals and sockets that were handed over ------------------------------------------------------------------
# Their descriptions are the host's own: what is changed on them is changed for the host.


def _a_pipe(world: World) -> tuple[Any, ...]:
    read_end, write_end = os.pipe()
    world.pipe = os.fdopen(read_end, "rb", buffering=0)
    return world.pipe, os.fdopen(write_end, "wb", buffering=0)


def _pipe_flags(world: World) -> int:
    return fcntl.fcntl(world.pipe, fcntl.F_GETFL)


_ON_A_PIPE: dict[str, Any] = {"surface": "descriptors", "gives": _a_pipe}
raw(
    "fcntl",
    lambda w, r, e: (r.fileno(), fcntl.F_SETFL, os.O_NONBLOCK),
    name="stops_a_granted_pipe_from_blocking",
    **_ON_A_PIPE,
    effect=lambda w: bool(_pipe_flags(w) & os.O_NONBLOCK),
)
raw(
    "ioctl",
    lambda w, r, e: (r.fileno(), 0x5421, struct.pack("i", 1)),
    name="stops_a_granted_pipe_from_blocking_by_ioctl",
    **_ON_A_PIPE,
    effect=lambda w: bool(_pipe_flags(w) & os.O_NONBLOCK),
)
raw(
    "fcntl",
    lambda w, r, e: (r.fileno(), 1031, 1 << 20),
    name="grows_a_granted_pipe",
    **_ON_A_PIPE,
    effect=lambda w: fcntl.fcntl(w.pipe, 1032) == 1 << 20,
)
raw(
    "fcntl",
    lambda w, r, e: (r.fileno(), fcntl.F_SETOWN, w.host),
    name="owns_a_granted_pipe",
    **_ON_A_PIPE,
    effect=lambda w: fcntl.fcntl(w.pipe, fcntl.F_GETOWN) != 0,
)
raw(
    "fcntl",
    lambda w, r, e: (r.fileno(), 10, 10),
    name="chooses_the_signal_of_a_granted_pipe",
    **_ON_A_PIPE,
    effect=lambda w: fcntl.fcntl(w.pipe, 11) == 10,
)
raw(
    "tee",
    lambda w, r, e: (r.fileno(), e.fileno(), 1, 2),
    name="tees_a_granted_pipe",
    **_ON_A_PIPE,
    outside=reaches(errno.EINVAL, errno.EAGAIN),
)
raw(
    "vmsplice",
    lambda w, r, e: (e.fileno(), struct.pack("QQ", 0, 0), 1, 0),
    name="splices_memory_into_a_granted_pipe",
    **_ON_A_PIPE,
)
raw(
    "fstatfs",
    lambda w, r, e: (r.fileno(), ctypes.create_string_buffer(256)),
    name="asks_for_the_file_system_of_a_granted_pipe",
    **_ON_A_PIPE,
)


def _a_terminal(world: World) -> Iterator[None]:
    master, world.slave = os.openpty()
    yield
    os.close(master)


def _gives_the_terminal(world: World) -> tuple[Any, ...]:
    world.terminal = os.fdopen(world.slave, "r+b", buffering=0)
    return (world.terminal,)


_ON_A_TERMINAL: dict[str, Any] = {
    "surface": "descriptors",
    "refused_with": PermissionError,
    "call": "ioctl",
    "arrange": _a_terminal,
    "gives": _gives_the_terminal,
}


def _typed(world: World) -> bool:
    # The line that was typed waits to be read, by whoever reads the terminal next.
    count = ctypes.c_int()
    native.call("ioctl", world.terminal.fileno(), 0x541B, count)  # FIONREAD
    return count.value > 0


@attempt(**_ON_A_TERMINAL, effect=_typed, privileged=True)
def types_into_a_terminal_it_was_handed(outside: World, terminal: Any) -> None:
    for letter in b"id\n":
        native.call("ioctl", terminal.fileno(), 0x5412, bytes([letter]))  # TIOCSTI


def _echoes_no_more(world: World) -> bool:
    import termios

    return not termios.tcgetattr(world.terminal)[3] & termios.ECHO


@attempt(**_ON_A_TERMINAL, effect=_echoes_no_more)
def changes_a_terminal_it_was_handed(outside: World, terminal: Any) -> None:
    settings = ctypes.create_string_buffer(64)
    native.call("ioctl", terminal.fileno(), 0x5401, settings)  # TCGETS
    native.call(
        "ioctl",
        terminal.fileno(),
        0x5402,
        struct.pack("IIII", *struct.unpack_from("III", settings), 0) + settings.raw[16:],
    )


def _a_peer_sends_the_secret(world: World) -> tuple[Any, ...]:
    import array
    import socket

    here, world.peer = socket.socketpair()
    with open(world.secret, "rb") as file:
        world.peer.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))])
    return here, world.peer


@attempt(surface="descriptors", refused_with=PermissionError, call="recvmsg", gives=_a_peer_sends_the_secret)
def receives_a_descriptor_by_a_granted_socket(outside: World, connection: Any, peer: Any) -> bytes:
    import socket

    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4))
    return os.pread(struct.unpack("i", ancillary[0][2][:4])[0], 4096, 0)


@attempt(surface="descriptors", refused_with=PermissionError, call="recvmmsg", gives=_a_peer_sends_the_secret)
def receives_many_messages_by_a_granted_socket(outside: World, connection: Any, peer: Any) -> bytes:
    data, control = ctypes.create_string_buffer(1), ctypes.create_string_buffer(64)
    pieces = ctypes.create_string_buffer(struct.pack("QQ", ctypes.addressof(data), 1), 16)
    header = struct.pack("QIIQQQQiI", 0, 0, 0, ctypes.addressof(pieces), 1, ctypes.addressof(control), 64, 0, 0)
    native.call("recvmmsg", connection.fileno(), ctypes.create_string_buffer(header, 64), 1, 0, None)
    return os.pread(struct.unpack_from("i", control, 16)[0], 4096, 0)


@attempt(
    surface="descriptors",
    refused_with=PermissionError,
    call="getsockopt",
    gives=_a_peer_sends_the_secret,
    proof=lambda world, number: number >= 0,
)
def asks_a_granted_socket_for_its_peer_s_process(outside: World, connection: Any, peer: Any) -> int:
    number = ctypes.c_int(-1)
    native.call("getsockopt", connection.fileno(), 1, 77, number, struct.pack("I", 4))  # SO_PEERPIDFD
    return number.value


@attempt(surface="descriptors", refused_with=PermissionError, proof=lambda world, pid: pid > 0)
def finds_out_the_host_by_its_own_pair(outside: World) -> int:
    import socket

    here, _there = socket.socketpair()
    pidfd = ctypes.c_int(-1)
    native.call("getsockopt", here.fileno(), 1, 77, pidfd, struct.pack("I", 4))
    # A descriptor of a process is a handle on it; its own may do no more than its own number.
    native.call("pidfd_send_signal", pidfd.value, 0, None, 0)
    return 1


# -- a file granted for appending --------------------------------------------------------------------------------------


def _appends(*, refused_with: Any = PermissionError) -> Callable[[Callable[..., Any]], None]:
    """Enter a way of changing what a file granted for appending already holds, for each way of granting it."""

    def by_name(world: World, inside: bool) -> tuple[Any, ...]:
        from compart import grant

        return (grant.file(world.secret, "a"),) if inside else handed_over(world)

    def handed_over(world: World) -> tuple[Any, ...]:
        world.granted = open(world.secret, "ab", buffering=0)  # noqa: SIM115
        return (world.granted,)

    def by_rights(world: World) -> dict[str, Any]:
        from compart import grant, rights

        return {"grants": [grant.descriptor(world.granted, rights.mode_rights("a"))]}

    def enter(function: Callable[..., Any]) -> None:
        common: dict[str, Any] = {"surface": "descriptors", "refused_with": refused_with}
        common["effect"] = lambda world: not world.secret.read_bytes().startswith(world.token)
        attempt(name=function.__name__, gives=handed_over, **common)(function)
        attempt(name=f"{function.__name__}_granted_by_name", gives_by_side=by_name, **common)(function)
        attempt(name=f"{function.__name__}_granted_by_rights", gives=handed_over, policy=by_rights, **common)(function)

    return enter


@_appends()
def clears_append_and_overwrites(outside: World, file: Any) -> None:
    native.call("fcntl", file.fileno(), fcntl.F_SETFL, 0)
    native.call("pwrite64", file.fileno(), b"changed", 7, 0)


@_appends(refused_with=(PermissionError, errno.EOPNOTSUPP))
def overwrites_by_the_flag_that_ignores_append(outside: World, file: Any) -> None:
    _kept, vector = _vector(b"changed")
    native.call("pwritev2", file.fileno(), vector, 1, 0, 0, 0x20)  # RWF_NOAPPEND


@_appends()
def punches_a_hole_into_what_it_may_append_to(outside: World, file: Any) -> None:
    native.call("fallocate", file.fileno(), 0x3, 0, 8)


@_appends()
def zeroes_what_it_may_append_to(outside: World, file: Any) -> None:
    native.call("fallocate", file.fileno(), 0x10, 0, 8)


@_appends(refused_with=(PermissionError, errno.EINVAL))
def truncates_what_it_may_append_to(outside: World, file: Any) -> None:
    native.call("ftruncate", file.fileno(), 0)


# -- standard output that is the host's own -----------------------------------------------------------------------------
# With stdout="inherit" descriptor 1 is the host's description: to write to, and nothing more.


def _standard_output(flags: int) -> Callable[[World], Iterator[None]]:
    def arrange(world: World) -> Iterator[None]:
        kept = os.dup(1)
        log = world.directory / "log"
        log.write_bytes(b"what the host wrote before")
        world.log = log
        opened = os.open(log, flags)
        os.dup2(opened, 1)
        yield
        os.dup2(kept, 1)
        os.close(kept)
        os.close(opened)

    return arrange


_INHERITS: dict[str, Any] = {
    "surface": "descriptors",
    "policy": {"stdout": "inherit"},
    # What it holds may be a pipe that the host empties into its own output: then nothing is there to be changed.
    "refused_with": (PermissionError, errno.ESPIPE, errno.EINVAL, errno.EBADF, CONTAINED),
}


def _log_lost(world: World) -> bool:
    return not world.log.read_bytes().startswith(b"what the host wrote before")


@attempt(**_INHERITS, arrange=_standard_output(os.O_WRONLY | os.O_APPEND), effect=_log_lost)
def truncates_the_standard_output_of_the_host(outside: World) -> None:
    native.call("ftruncate", 1, 0)


@attempt(**_INHERITS, arrange=_standard_output(os.O_WRONLY), effect=_log_lost)
def overwrites_the_standard_output_of_the_host(outside: World) -> None:
    native.call("pwrite64", 1, b"changed", 7, 0)


@attempt(**_INHERITS, arrange=_standard_output(os.O_WRONLY | os.O_APPEND), effect=_log_lost)
def punches_a_hole_into_the_standard_output_of_the_host(outside: World) -> None:
    native.call("fallocate", 1, 0x3, 0, 8)


@attempt(
    **_INHERITS, arrange=_standard_output(os.O_RDWR), proof=lambda world, text: text == b"what the host wrote before"
)
def reads_the_standard_output_of_the_host(outside: World) -> bytes:
    return os.pread(1, 100, 0)


@attempt(
    **_INHERITS,
    arrange=_standard_output(os.O_WRONLY),
    effect=lambda world: bool(fcntl.fcntl(1, fcntl.F_GETFL) & os.O_NONBLOCK),
)
def stops_the_standard_output_of_the_host_from_blocking(outside: World) -> None:
    native.call("fcntl", 1, fcntl.F_SETFL, os.O_WRONLY | os.O_NONBLOCK)


@attempt(
    **_INHERITS,
    arrange=_standard_output(os.O_WRONLY | os.O_APPEND),
    effect=lambda world: not fcntl.fcntl(1, fcntl.F_GETFL) & os.O_APPEND,
)
def stops_the_standard_output_of_the_host_from_appending(outside: World) -> None:
    native.call("fcntl", 1, fcntl.F_SETFL, os.O_WRONLY)


@attempt(
    **_INHERITS,
    arrange=_standard_output(os.O_WRONLY),
    effect=lambda world: bool(fcntl.fcntl(1, fcntl.F_GETFL) & os.O_NONBLOCK),
)
def stops_the_standard_output_of_the_host_from_blocking_by_ioctl(outside: World) -> None:
    native.call("ioctl", 1, 0x5421, struct.pack("i", 1))


@attempt(**_INHERITS, arrange=_standard_output(os.O_WRONLY), effect=lambda world: os.lseek(1, 0, os.SEEK_CUR) == 5)
def moves_the_standard_output_of_the_host(outside: World) -> None:
    native.call("lseek", 1, 5, os.SEEK_SET)


# -- more descriptors, more of anything --------------------------------------------------------------------------------


def _soft_below_hard(which: int) -> Callable[[World], Iterator[None]]:
    """The host's soft limit lies below its hard one, so that raising it needs no privilege."""

    def arrange(world: World) -> Iterator[None]:
        before = resource.getrlimit(which)
        hard = before[1] if before[1] != resource.RLIM_INFINITY else 1 << 40
        soft = before[0] if before[0] not in (resource.RLIM_INFINITY, before[1]) else max(hard - 4096, hard // 2)
        resource.setrlimit(which, (soft, before[1]))
        yield
        resource.setrlimit(which, before)

    return arrange


def _raises(which: int, name: str) -> None:
    def raised(world: World, limits: tuple[int, int]) -> bool:
        return limits[1] > limits[0]

    @attempt(
        surface="descriptors",
        name=f"raises_its_limit_of_{name}",
        refused_with=(PermissionError, errno.EINVAL),
        arrange=_soft_below_hard(which),
        proof=raised,
    )
    def raises(outside: World) -> tuple[int, int]:
        before = ctypes.create_string_buffer(16)
        native.call("prlimit64", 0, which, None, before)
        soft, hard = struct.unpack("QQ", before.raw)
        native.call("prlimit64", 0, which, struct.pack("QQ", soft + 1, max(hard, soft + 1)), None)
        native.call("prlimit64", 0, which, None, before)
        return soft, int(struct.unpack("QQ", before.raw)[0])


for _which, _name in (
    (resource.RLIMIT_NOFILE, "open_files"),
    (resource.RLIMIT_AS, "address_space"),
    (resource.RLIMIT_MEMLOCK, "locked_memory"),
    (resource.RLIMIT_CORE, "core_files"),
    (resource.RLIMIT_NPROC, "processes"),
):
    _raises(_which, _name)


@attempt(surface="descriptors", refused_with=errno.EMFILE, proof=lambda world, count: count > 1000)
def opens_a_thousand_descriptors(outside: World) -> int:
    return sum(len(os.pipe()) for _ in range(501))


@attempt(
    surface="descriptors", refused_with=(PermissionError, errno.EBADF, errno.EINVAL), proof=lambda world, fd: fd == 600
)
def takes_a_number_among_the_granted(outside: World) -> int:
    # What it makes itself must never get a number that says it was granted.
    read_end, _ = os.pipe()
    return native.call("dup2", read_end, 600)


@attempt(
    surface="descriptors", refused_with=(PermissionError, errno.EBADF, errno.EINVAL), proof=lambda world, fd: fd >= 600
)
def takes_a_number_among_the_granted_by_fcntl(outside: World) -> int:
    read_end, _ = os.pipe()
    return native.call("fcntl", read_end, fcntl.F_DUPFD, 600)


@attempt(
    surface="descriptors",
    refused_with=(PermissionError, errno.EINVAL),
    arrange=_soft_below_hard(resource.RLIMIT_NOFILE),
    proof=lambda world, answer: answer == 0,
)
def raises_its_limit_of_open_files_by_the_old_call(outside: World) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return native.call("setrlimit", resource.RLIMIT_NOFILE, struct.pack("QQ", soft + 1, max(hard, soft + 1)))


# The channel's numbers, and all above.
raw("close_range", lambda w: (480, 0xFFFFFFFF, 0), surface="descriptors", name="closes_everything_that_was_granted")
raw("close_range", lambda w: (480, 0xFFFFFFFF, 4), surface="descriptors", name="marks_everything_that_was_granted")
for _number in (480, 481, 482, 483, 511):
    raw(
        "dup2",
        lambda w, number=_number: (0, number),
        surface="descriptors",
        name=f"takes_number_{_number}_of_the_channel",
        refused_with=(PermissionError, errno.EBADF),
    )
    raw(
        "dup3",
        lambda w, number=_number: (0, (1 << 32) | number, 0),
        surface="descriptors",
        name=f"takes_number_{_number}_of_the_channel_with_garbage_above",
        refused_with=(PermissionError, errno.EBADF),
    )
