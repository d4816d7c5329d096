"""Surface "files": names of the file system that nobody granted.

Each attempt touches a path by name, from Python or from machine code. Inside there are no names: every one of these
calls must be refused before the kernel looks the path up, so that not even its existence leaks.
"""

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path
from typing import Any

from tests.escape import native
from tests.escape.framework import CONTAINED, World, attempt, raw, reaches

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
O_TMPFILE = 0o20200000
O_PATH = 0o10000000


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


# -- reading -----------------------------------------------------------------------------------------------------------


@attempt(surface="files", refused_with=PermissionError, call="openat")
def opens_a_file_nobody_granted(outside: World) -> bytes:
    with open(outside.secret, "rb") as file:
        return file.read()


@attempt(surface="files", refused_with=PermissionError, call="open")
def opens_by_the_old_call(outside: World) -> bytes:
    return _read(native.call("open", outside.secret, os.O_RDONLY))


@attempt(surface="files", refused_with=PermissionError, call="openat")
def opens_by_openat_with_an_absolute_path(outside: World) -> bytes:
    # With an absolute path the kernel does not look at the descriptor at all.
    return _read(native.call("openat", 12345, outside.secret, os.O_RDONLY))


@attempt(surface="files", refused_with=PermissionError, call="openat")
def opens_with_garbage_above_the_descriptor(outside: World) -> bytes:
    # The kernel reads 32 bits of the first argument; a filter that compares 64 sees another number.
    return _read(native.call("openat", (0x7EAD << 32) | (AT_FDCWD & 0xFFFFFFFF), outside.secret, os.O_RDONLY))


@attempt(surface="files", refused_with=(PermissionError, errno.ENOSYS), call="openat2")
def opens_by_openat2(outside: World) -> bytes:
    how = struct.pack("QQQ", os.O_RDONLY, 0, 0)
    return _read(native.call("openat2", AT_FDCWD, outside.secret, how, len(how)))


@attempt(surface="files", refused_with=PermissionError, call="openat")
def opens_relative_to_where_the_host_stands(outside: World) -> bytes:
    with open(os.path.relpath(outside.secret), "rb") as file:
        return file.read()


def _stand_in_the_directory(world: World) -> Any:
    here = os.getcwd()
    os.chdir(world.directory)
    yield
    os.chdir(here)


@attempt(surface="files", refused_with=PermissionError, call="openat", arrange=_stand_in_the_directory)
def opens_a_neighbour_of_the_working_directory(outside: World) -> bytes:
    return _read(native.call("openat", AT_FDCWD, b"secret", os.O_RDONLY))


@attempt(surface="files", refused_with=PermissionError, call="openat", proof=lambda world, size: size == 32)
def opens_a_path_without_the_right_to_read(outside: World) -> int:
    descriptor = native.call("openat", AT_FDCWD, outside.secret, O_PATH)
    return os.fstat(descriptor).st_size


@attempt(surface="files", refused_with=PermissionError, call="openat", proof=lambda world, names: "secret" in names)
def lists_a_directory(outside: World) -> list[str]:
    return [path.name for path in outside.directory.iterdir()]


@attempt(surface="files", refused_with=PermissionError, call="openat")
def imports_a_module_from_a_path(outside: World) -> bytes:
    import importlib.util

    source = outside.directory / "extra.py"
    spec = importlib.util.spec_from_file_location("extra", source)
    assert spec is not None
    assert spec.loader is not None
    return spec.loader.get_data(str(outside.secret))  # type: ignore[attr-defined]


# -- asking about ------------------------------------------------------------------------------------------------------


def _size_is_told(world: World, answer: int) -> bool:
    return answer == len(world.token)


@attempt(surface="files", refused_with=PermissionError, call="newfstatat", proof=_size_is_told)
def stats_a_path(outside: World) -> int:
    return os.stat(outside.secret).st_size


@attempt(surface="files", refused_with=PermissionError, call="newfstatat", proof=lambda world, there: there)
def asks_whether_a_path_exists(outside: World) -> bool:
    os.lstat(outside.secret)
    return True


def _stat_size(buffer: Any) -> int:
    return int(struct.unpack_from("q", buffer, 48)[0])


def _stat_by(call: str) -> None:
    @attempt(surface="files", name=f"asks_by_{call}", refused_with=PermissionError, call=call, proof=_size_is_told)
    def asks(outside: World) -> int:
        buffer = ctypes.create_string_buffer(256)
        native.call(call, outside.secret, buffer)
        return _stat_size(buffer)


for _call in ("stat", "lstat"):
    _stat_by(_call)


def _newfstatat_with(flags: int, name: str) -> None:
    @attempt(surface="files", name=name, refused_with=PermissionError, call="newfstatat", proof=_size_is_told)
    def asks(outside: World) -> int:
        buffer = ctypes.create_string_buffer(256)
        native.call("newfstatat", AT_FDCWD, outside.secret, buffer, flags)
        return _stat_size(buffer)

    @attempt(surface="files", name=f"{name}_by_statx", refused_with=PermissionError, call="statx", proof=_size_is_told)
    def asks_statx(outside: World) -> int:
        buffer = ctypes.create_string_buffer(256)
        native.call("statx", AT_FDCWD, outside.secret, flags, 0x7FF, buffer)
        return int(struct.unpack_from("Q", buffer, 40)[0])


_newfstatat_with(0, "stats_by_name")
_newfstatat_with(AT_SYMLINK_NOFOLLOW, "stats_by_name_without_following")


def _empty_path_flag_with_a_path(call: str) -> None:
    # fstat is newfstatat with AT_EMPTY_PATH and "": a filter that lets the flag through without looking at the string
    # lets every path through, given any descriptor (here standard input).
    @attempt(
        surface="files",
        name=f"hides_a_path_behind_the_empty_path_flag_of_{call}",
        # Either call may be answered as fstat of the descriptor: what counts is that nothing of the path comes out.
        refused_with=(PermissionError, errno.ENOSYS, CONTAINED),
        proof=_size_is_told,
    )
    def asks(outside: World) -> int:
        buffer = ctypes.create_string_buffer(256)
        if call == "statx":
            native.call("statx", 0, outside.secret, AT_EMPTY_PATH, 0x7FF, buffer)
            return int(struct.unpack_from("Q", buffer, 40)[0])
        native.call("newfstatat", 0, outside.secret, buffer, AT_EMPTY_PATH)
        return _stat_size(buffer)


_empty_path_flag_with_a_path("newfstatat")
_empty_path_flag_with_a_path("statx")

raw("access", lambda w: (w.secret, os.F_OK), surface="files")
raw("faccessat", lambda w: (AT_FDCWD, w.secret, os.R_OK), surface="files")
raw("faccessat2", lambda w: (AT_FDCWD, w.secret, os.R_OK, 0), surface="files")
raw(
    "faccessat2",
    lambda w: (0, w.secret, os.R_OK, AT_EMPTY_PATH),
    surface="files",
    name="raw_faccessat2_empty_path_flag",
)


def _reads_a_link(call: str) -> None:
    def target_is_told(world: World, answer: bytes) -> bool:
        return answer == os.fsencode(world.secret)

    @attempt(
        surface="files", name=f"reads_a_link_by_{call}", refused_with=PermissionError, call=call, proof=target_is_told
    )
    def reads(outside: World) -> bytes:
        buffer = ctypes.create_string_buffer(4096)
        where = (outside.tree / "link",) if call == "readlink" else (AT_FDCWD, outside.tree / "link")
        length = native.call(call, *where, buffer, 4096)
        return buffer.raw[:length]


_reads_a_link("readlink")
_reads_a_link("readlinkat")

_STATFS = ctypes.create_string_buffer(256)
raw("statfs", lambda w: (w.directory, _STATFS), surface="files")
raw("ustat", lambda w: (0, _STATFS), surface="files", outside=reaches(errno.EINVAL, errno.ENOSYS))
raw("sysfs", lambda w: (3,), surface="files", outside=reaches(errno.ENOSYS))
raw("uselib", lambda w: (w.secret,), surface="files", outside=reaches(errno.ENOSYS, errno.ENOEXEC))


@attempt(surface="files", refused_with=(PermissionError, CONTAINED), proof=lambda world, path: path == os.getcwd())
def asks_where_the_host_stands(outside: World) -> str:
    buffer = ctypes.create_string_buffer(4096)
    native.call("getcwd", buffer, 4096)
    return os.fsdecode(buffer.value)


def _xattr(world: World) -> None:
    os.setxattr(world.secret, "user.token", world.token)


def _reads_an_attribute(call: str) -> None:
    @attempt(
        surface="files", name=f"reads_an_attribute_by_{call}", refused_with=PermissionError, call=call, arrange=_xattr
    )
    def reads(outside: World) -> bytes:
        buffer = ctypes.create_string_buffer(4096)
        if call.endswith("at"):
            how = struct.pack("QII", ctypes.addressof(buffer), 4096, 0)
            length = native.call(call, AT_FDCWD, outside.secret, 0, b"user.token", how, len(how))
        else:
            length = native.call(call, outside.secret, b"user.token", buffer, 4096)
        return buffer.raw[:length]


for _call in ("getxattr", "lgetxattr", "getxattrat"):
    _reads_an_attribute(_call)

raw("listxattr", lambda w: (w.secret, None, 0), surface="files")
raw("llistxattr", lambda w: (w.secret, None, 0), surface="files")
raw("listxattrat", lambda w: (AT_FDCWD, w.secret, 0, None, 0), surface="files")
raw("file_getattr", lambda w: (AT_FDCWD, w.secret, ctypes.create_string_buffer(24), 24, 0), surface="files")


# -- changing ----------------------------------------------------------------------------------------------------------


def _marked(world: World) -> bool:
    return os.path.lexists(world.marker)


def _gone(world: World) -> bool:
    return not world.secret.exists()


def _emptied(world: World) -> bool:
    return world.secret.stat().st_size == 0


def _mode_changed(world: World) -> bool:
    return stat.S_IMODE(world.secret.stat().st_mode) == 0o751


def _owner_changed(world: World) -> bool:
    return world.secret.stat().st_uid == 12345


def _time_changed(world: World) -> bool:
    return world.secret.stat().st_mtime < 1000


def _attribute_set(world: World) -> bool:
    return "user.mark" in os.listxattr(world.secret)


def _attribute_gone(world: World) -> bool:
    return "user.token" not in os.listxattr(world.secret)


@attempt(surface="files", refused_with=PermissionError, call="openat", effect=_marked)
def creates_a_file(outside: World) -> None:
    outside.marker.write_text("here")


@attempt(surface="files", refused_with=PermissionError, call="openat", effect=_emptied)
def empties_a_file_by_opening_it(outside: World) -> None:
    with open(outside.secret, "wb"):
        pass


@attempt(
    surface="files",
    refused_with=PermissionError,
    call="openat",
    effect=lambda w: w.secret.read_bytes().endswith(b"more"),
)
def appends_to_a_file(outside: World) -> None:
    with open(outside.secret, "ab") as file:
        file.write(b"more")


@attempt(surface="files", refused_with=PermissionError, call="openat", effect=_marked)
def creates_a_nameless_file_and_links_it(outside: World) -> None:
    descriptor = native.call("openat", AT_FDCWD, outside.directory, O_TMPFILE | os.O_RDWR, 0o600)
    native.call("linkat", AT_FDCWD, f"/proc/self/fd/{descriptor}", AT_FDCWD, outside.marker, 0x400)


raw("creat", lambda w: (w.marker, 0o600), surface="files", effect=_marked)
raw("truncate", lambda w: (w.secret, 0), surface="files", effect=_emptied)
raw("chmod", lambda w: (w.secret, 0o751), surface="files", effect=_mode_changed)
raw("fchmodat", lambda w: (AT_FDCWD, w.secret, 0o751), surface="files", effect=_mode_changed)
raw("fchmodat2", lambda w: (AT_FDCWD, w.secret, 0o751, 0), surface="files", effect=_mode_changed)
for _call in ("chown", "lchown"):
    raw(_call, lambda w: (w.secret, 12345, -1), surface="files", effect=_owner_changed, privileged=True)
raw("fchownat", lambda w: (AT_FDCWD, w.secret, 12345, -1, 0), surface="files", effect=_owner_changed, privileged=True)
raw("utime", lambda w: (w.secret, struct.pack("qq", 1, 1)), surface="files", effect=_time_changed)
raw("utimes", lambda w: (w.secret, struct.pack("qqqq", 1, 0, 1, 0)), surface="files", effect=_time_changed)
raw("futimesat", lambda w: (AT_FDCWD, w.secret, struct.pack("qqqq", 1, 0, 1, 0)), surface="files", effect=_time_changed)
raw(
    "utimensat",
    lambda w: (AT_FDCWD, w.secret, struct.pack("qqqq", 1, 0, 1, 0), 0),
    surface="files",
    effect=_time_changed,
)
for _call in ("setxattr", "lsetxattr"):
    raw(_call, lambda w: (w.secret, b"user.mark", b"1", 1, 0), surface="files", effect=_attribute_set)
for _call in ("removexattr", "lremovexattr"):
    raw(_call, lambda w: (w.secret, b"user.token"), surface="files", arrange=_xattr, effect=_attribute_gone)
raw(
    "removexattrat",
    lambda w: (AT_FDCWD, w.secret, 0, b"user.token"),
    surface="files",
    arrange=_xattr,
    effect=_attribute_gone,
)


@attempt(surface="files", refused_with=PermissionError, call="setxattrat", effect=_attribute_set)
def sets_an_attribute_by_setxattrat(outside: World) -> None:
    value = ctypes.create_string_buffer(b"1")
    how = struct.pack("QII", ctypes.addressof(value), 1, 0)
    native.call("setxattrat", AT_FDCWD, outside.secret, 0, b"user.mark", how, len(how))


@attempt(
    surface="files", refused_with=PermissionError, call="file_setattr", outside=reaches(errno.EOPNOTSUPP, errno.ENOTTY)
)
def sets_the_attributes_of_the_inode(outside: World) -> None:
    attributes = ctypes.create_string_buffer(24)
    native.call("file_setattr", AT_FDCWD, outside.secret, attributes, 24, 0)


raw("rename", lambda w: (w.secret, w.marker), surface="files", effect=_marked)
raw("renameat", lambda w: (AT_FDCWD, w.secret, AT_FDCWD, w.marker), surface="files", effect=_marked)
raw("renameat2", lambda w: (AT_FDCWD, w.secret, AT_FDCWD, w.marker, 0), surface="files", effect=_marked)
raw("link", lambda w: (w.secret, w.marker), surface="files", effect=_marked)
raw("linkat", lambda w: (AT_FDCWD, w.secret, AT_FDCWD, w.marker, 0), surface="files", effect=_marked)
raw("symlink", lambda w: (b"/", w.marker), surface="files", effect=_marked)
raw("symlinkat", lambda w: (b"/", AT_FDCWD, w.marker), surface="files", effect=_marked)
raw("unlink", lambda w: (w.secret,), surface="files", effect=_gone)
raw("unlinkat", lambda w: (AT_FDCWD, w.secret, 0), surface="files", effect=_gone)
raw("mkdir", lambda w: (w.marker, 0o700), surface="files", effect=_marked)
raw("mkdirat", lambda w: (AT_FDCWD, w.marker, 0o700), surface="files", effect=_marked)
raw("mknod", lambda w: (w.marker, stat.S_IFIFO | 0o600, 0), surface="files", effect=_marked)
raw("mknodat", lambda w: (AT_FDCWD, w.marker, stat.S_IFIFO | 0o600, 0), surface="files", effect=_marked)
raw(
    "mknod",
    lambda w: (w.marker, stat.S_IFCHR | 0o666, os.makedev(1, 5)),
    surface="files",
    name="raw_mknod_of_a_device",
    effect=_marked,
    privileged=True,
)
raw("rmdir", lambda w: (w.spare,), surface="files", arrange=lambda w: _spare(w), effect=lambda w: not w.spare.exists())


def _spare(world: World) -> None:
    world.spare = world.directory / "spare"
    world.spare.mkdir()


# -- where names begin -------------------------------------------------------------------------------------------------


@attempt(surface="files", refused_with=PermissionError, call="chdir", proof=lambda world, path: path == str(world.tree))
def moves_to_another_directory(outside: World) -> str:
    os.chdir(outside.tree)
    return os.getcwd()


@attempt(surface="files", refused_with=PermissionError, call="chroot", privileged=True)
def makes_a_root_of_its_own(outside: World) -> bytes:
    os.chroot(outside.directory)
    return Path("/secret").read_bytes()


raw("chroot", lambda w: (b"/",), surface="files", privileged=True)
raw("fchdir", lambda w: (12345,), surface="files", outside=reaches(errno.EBADF))
raw(
    "pivot_root",
    lambda w: (w.directory, w.directory),
    surface="files",
    outside=reaches(errno.EINVAL, errno.EBUSY),
    privileged=True,
)
raw(
    "mount",
    lambda w: (b"x", w.directory, b"no-such-file-system", 0, None),
    surface="files",
    outside=reaches(errno.ENODEV),
    privileged=True,
)
raw("umount2", lambda w: (w.directory, 0), surface="files", outside=reaches(errno.EINVAL), privileged=True)
raw(
    "quotactl",
    lambda w: (0x80000700, None, 0, _STATFS),
    surface="files",
    outside=reaches(errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.ENOTBLK, errno.EFAULT, errno.ESRCH),
)
raw(
    "quotactl_fd",
    lambda w: (0, 0x80000700, 0, _STATFS),
    surface="files",
    outside=reaches(errno.EINVAL, errno.ENOSYS, errno.EBADF, errno.ESRCH),
)
raw("swapon", lambda w: (w.secret, 0), surface="files", outside=reaches(errno.EINVAL), privileged=True)
raw("swapoff", lambda w: (w.marker,), surface="files", outside=reaches(errno.ENOENT, errno.EINVAL), privileged=True)
raw("acct", lambda w: (w.marker,), surface="files", outside=reaches(errno.ENOENT), privileged=True)


@attempt(
    surface="files", refused_with=PermissionError, call="name_to_handle_at", proof=lambda world, length: length > 0
)
def makes_a_handle_of_a_file(outside: World) -> int:
    handle = ctypes.create_string_buffer(struct.pack("Ii", 120, 0), 128)
    native.call("name_to_handle_at", AT_FDCWD, outside.secret, handle, ctypes.create_string_buffer(4), 0)
    return int(struct.unpack_from("I", handle)[0])


def _handle(world: World) -> Any:
    world.handle = ctypes.create_string_buffer(struct.pack("Ii", 120, 0), 128)
    native.call("name_to_handle_at", AT_FDCWD, world.secret, world.handle, ctypes.create_string_buffer(4), 0)
    yield from _stand_in_the_directory(world)


@attempt(surface="files", refused_with=PermissionError, call="open_by_handle_at", arrange=_handle, privileged=True)
def opens_a_file_by_its_handle(outside: World) -> bytes:
    return _read(native.call("open_by_handle_at", AT_FDCWD, outside.handle, os.O_RDONLY))


# -- watching ----------------------------------------------------------------------------------------------------------


@attempt(
    surface="files", refused_with=PermissionError, call=("inotify_add_watch", "inotify_init1"), proof=lambda w, n: n > 0
)
def watches_a_directory(outside: World) -> int:
    descriptor = native.call("inotify_init1", 0)
    return native.call("inotify_add_watch", descriptor, outside.directory, 0x100)


raw("inotify_add_watch", lambda w: (0, w.directory, 0x100), surface="files", outside=reaches(errno.EINVAL))
raw("inotify_init", lambda w: (), surface="files")
raw("fanotify_init", lambda w: (0, 0), surface="files", privileged=True)
raw(
    "fanotify_mark",
    lambda w: (0, 1, 0x20, AT_FDCWD, w.directory),
    surface="files",
    outside=reaches(errno.EINVAL, errno.EBADF),
)
