"""Surface "directories": out of a directory that was handed over, and more than its mode.

A Directory is a directory descriptor and the compartment has its number, so most attempts go straight to the kernel.
Outside the same number is a plain directory descriptor. The second half grants the directory by name, where unmodified
code opens paths as it always did.
"""

import ctypes
import errno
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.escape import native
from tests.escape.framework import CONTAINED, World, attempt

AT_FDCWD = -100
O_PATH = 0o10000000

# A name that leaves a mount of its own leads nowhere: ".." stops at its root, and "/" is an empty directory.
NOWHERE = (errno.ENOENT, errno.EACCES, errno.EROFS, PermissionError)
# The parent of the root is the root, so that a change meant for the parent happens in the directory itself.
HERE = (*NOWHERE, CONTAINED)
READ_ONLY = (errno.EROFS, errno.EACCES, PermissionError)


class PlainDirectory:
    """Outside: a directory descriptor with nothing around it."""

    def __init__(self, path: Any) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        os.close(self._descriptor)


def _hands_over(mode: str) -> Callable[[World, bool], tuple[Any, ...]]:
    def gives(world: World, inside: bool) -> tuple[Any, ...]:
        if not inside:
            return (PlainDirectory(world.tree),)
        import compart

        return (compart.Directory(world.tree, mode),)

    return gives


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)


def from_directory(
    mode: str = "r", *, refused_with: Any = NOWHERE, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    return attempt(
        surface="directories",
        refused_with=refused_with,
        needs={"namespaces"},
        gives_by_side=_hands_over(mode),
        **options,
    )


# -- names that leave --------------------------------------------------------------------------------------------------

_LEAVING: dict[str, Callable[[World], Any]] = {
    "the_parent": lambda w: b"../secret",
    "the_parent_of_a_child": lambda w: b"sub/../../secret",
    "many_parents": lambda w: b"../" * 40 + os.fsencode(w.secret)[1:],
    "an_absolute_path": lambda w: w.secret,
    "an_absolute_link": lambda w: b"link",
    "a_climbing_link": lambda w: b"sub/climb",
    "a_link_to_the_root": lambda w: b"root" + os.fsencode(w.secret),
    "a_link_to_the_parent": lambda w: b"up/secret",
    "the_root_of_a_process": lambda w: b"root/proc/self/root" + os.fsencode(w.secret),
}


def _more_links(world: World) -> None:
    (world.tree / "root").symlink_to("/")
    (world.tree / "up").symlink_to("..")


for _title, _name in _LEAVING.items():

    @from_directory(name=f"opens_by_{_title}", arrange=_more_links)
    def opens(outside: World, directory: Any, name: Any = _name) -> bytes:
        return _read(native.call("openat", directory.fileno(), name(outside), os.O_RDONLY))

    @from_directory(
        "rw",
        name=f"opens_for_writing_by_{_title}",
        arrange=_more_links,
        effect=lambda w: w.secret.read_bytes() != w.token,
    )
    def opens_for_writing(outside: World, directory: Any, name: Any = _name) -> None:
        os.write(native.call("openat", directory.fileno(), name(outside), os.O_WRONLY), b"changed")

    @from_directory(name=f"asks_about_{_title}", arrange=_more_links, proof=lambda w, size: size == len(w.token))
    def asks(outside: World, directory: Any, name: Any = _name) -> int:
        buffer = ctypes.create_string_buffer(256)
        native.call("newfstatat", directory.fileno(), name(outside), buffer, 0)
        return int(struct.unpack_from("q", buffer, 48)[0])


@from_directory(proof=lambda world, names: "secret" in names, refused_with=HERE)
def lists_the_parent(outside: World, directory: Any) -> list[str]:
    parent = native.call("openat", directory.fileno(), b"..", os.O_RDONLY | os.O_DIRECTORY)
    return os.listdir(parent)


@from_directory(refused_with=HERE, proof=lambda world, inode: inode == os.stat(world.directory).st_ino)
def tells_the_parent_by_its_inode(outside: World, directory: Any) -> int:
    return os.fstat(native.call("openat", directory.fileno(), b"..", O_PATH)).st_ino


@from_directory()
def climbs_one_step_at_a_time(outside: World, directory: Any) -> bytes:
    step = directory.fileno()
    for _ in range(3):
        parent = native.call("openat", step, b"..", os.O_RDONLY | os.O_DIRECTORY)
        found = native.syscall(native.NUMBERS["openat"], parent, b"secret", os.O_RDONLY)
        if found >= 0:
            return _read(found)
        step = parent
    raise FileNotFoundError(errno.ENOENT, "nowhere")


@from_directory(refused_with=(*NOWHERE, errno.ENOSYS))
def opens_by_openat2_without_bounds(outside: World, directory: Any) -> bytes:
    how = struct.pack("QQQ", os.O_RDONLY, 0, 0)
    return _read(native.call("openat2", directory.fileno(), b"../secret", how, len(how)))


@from_directory(refused_with=PermissionError, call="fchdir")
def moves_into_the_directory_and_out(outside: World, directory: Any) -> bytes:
    os.fchdir(directory.fileno())
    return _read(os.open("../secret", os.O_RDONLY))


@from_directory(refused_with=PermissionError, call=("fchdir", "chroot"), privileged=True)
def makes_the_directory_its_root(outside: World, directory: Any) -> bytes:
    # A working directory above the root climbs on.
    os.fchdir(directory.fileno())
    os.chroot("sub")
    os.chdir("..")
    return _read(os.open("secret", os.O_RDONLY))


@from_directory(refused_with=PermissionError, call="name_to_handle_at", proof=lambda world, length: length > 0)
def makes_a_handle_in_the_directory(outside: World, directory: Any) -> int:
    handle = ctypes.create_string_buffer(struct.pack("Ii", 120, 0), 128)
    native.call("name_to_handle_at", directory.fileno(), b"inside", handle, ctypes.create_string_buffer(4), 0)
    return int(struct.unpack_from("I", handle)[0])


def _handle(world: World) -> None:
    world.handle = ctypes.create_string_buffer(struct.pack("Ii", 120, 0), 128)
    native.call("name_to_handle_at", AT_FDCWD, world.secret, world.handle, ctypes.create_string_buffer(4), 0)


@from_directory(refused_with=PermissionError, call="open_by_handle_at", arrange=_handle, privileged=True)
def opens_a_handle_by_the_directory_s_mount(outside: World, directory: Any) -> bytes:
    return _read(native.call("open_by_handle_at", directory.fileno(), outside.handle, os.O_RDONLY))


@from_directory(refused_with=PermissionError, call="open_tree", privileged=True, proof=lambda world, fd: fd >= 0)
def copies_the_directory_s_mount(outside: World, directory: Any) -> int:
    return native.call("open_tree", directory.fileno(), b"", 0x1001)


@from_directory(refused_with=PermissionError, call="inotify_init1", proof=lambda world, watch: watch > 0)
def watches_the_directory(outside: World, directory: Any) -> int:
    watcher = native.call("inotify_init1", 0)
    return native.call("inotify_add_watch", watcher, f"/proc/self/fd/{directory.fileno()}", 0x100)


def _mover(world: World) -> Iterator[None]:
    """A process of the host that moves "sub" out of the tree as soon as the compartment says it holds it."""
    pid = os.fork()
    if pid == 0:
        try:
            for _ in range(1000):
                if (world.tree / "ready").exists():
                    (world.tree / "sub").rename(world.directory / "moved")
                    break
                time.sleep(0.005)
        finally:
            os._exit(0)
    yield
    (world.tree / "ready").touch()
    os.waitpid(pid, 0)


@from_directory("rw", arrange=_mover)
def climbs_from_a_directory_that_was_moved_out(outside: World, directory: Any) -> bytes:
    # The descriptor of "sub" stays; its parent is now a directory that nobody granted.
    held = native.call("openat", directory.fileno(), b"sub", os.O_RDONLY | os.O_DIRECTORY)
    native.call("openat", directory.fileno(), b"ready", os.O_CREAT | os.O_WRONLY, 0o600)
    buffer = ctypes.create_string_buffer(256)
    for _ in range(1000):
        if native.syscall(native.NUMBERS["newfstatat"], directory.fileno(), b"sub", buffer, 0) == -errno.ENOENT:
            break
        time.sleep(0.005)
    return _read(native.call("openat", held, b"../secret", os.O_RDONLY))


# -- changes that leave ------------------------------------------------------------------------------------------------


def _marked(world: World) -> bool:
    return os.path.lexists(world.marker)


def _secret_gone(world: World) -> bool:
    return not world.secret.exists()


@from_directory("rw", effect=_marked, refused_with=HERE)
def creates_beside_the_directory(outside: World, directory: Any) -> None:
    native.call("openat", directory.fileno(), b"../marker", os.O_CREAT | os.O_WRONLY, 0o600)


@from_directory("rw", effect=_marked, refused_with=HERE, arrange=_more_links)
def creates_through_a_link_to_the_parent(outside: World, directory: Any) -> None:
    native.call("openat", directory.fileno(), b"up/marker", os.O_CREAT | os.O_WRONLY, 0o600)


@from_directory("rw", effect=_marked, refused_with=HERE)
def creates_through_a_link_of_its_own(outside: World, directory: Any) -> None:
    native.call("symlinkat", b"..", directory.fileno(), b"mine")
    native.call("openat", directory.fileno(), b"mine/marker", os.O_CREAT | os.O_WRONLY, 0o600)


@from_directory("rw", effect=_marked, refused_with=(*HERE, errno.EEXIST))
def makes_a_directory_beside(outside: World, directory: Any) -> None:
    native.call("mkdirat", directory.fileno(), b"../marker", 0o700)


@from_directory("rw", effect=_marked, refused_with=(*HERE, errno.EXDEV))
def renames_out_of_the_directory(outside: World, directory: Any) -> None:
    native.call("renameat", directory.fileno(), b"inside", directory.fileno(), b"../marker")


@from_directory("rw", effect=_marked, refused_with=(*NOWHERE, errno.EXDEV))
def renames_to_an_absolute_path(outside: World, directory: Any) -> None:
    native.call("renameat", directory.fileno(), b"inside", AT_FDCWD, outside.marker)


@from_directory("rw", effect=_secret_gone, refused_with=(*NOWHERE, errno.EXDEV))
def renames_into_the_directory(outside: World, directory: Any) -> None:
    native.call("renameat2", directory.fileno(), b"../secret", directory.fileno(), b"mine", 0)


@from_directory("rw", refused_with=(*NOWHERE, errno.EXDEV))
def links_into_the_directory(outside: World, directory: Any) -> bytes:
    native.call("linkat", directory.fileno(), b"../secret", directory.fileno(), b"mine", 0)
    return _read(native.call("openat", directory.fileno(), b"mine", os.O_RDONLY))


@from_directory("rw", effect=_marked, refused_with=PermissionError, call="linkat")
def links_out_of_the_directory(outside: World, directory: Any) -> None:
    native.call("linkat", directory.fileno(), b"inside", directory.fileno(), b"../marker", 0)


@from_directory("rw", effect=_secret_gone)
def unlinks_beside_the_directory(outside: World, directory: Any) -> None:
    native.call("unlinkat", directory.fileno(), b"../secret", 0)


@from_directory("rw", effect=lambda w: w.secret.stat().st_mtime < 1000)
def touches_beside_the_directory(outside: World, directory: Any) -> None:
    native.call("utimensat", directory.fileno(), b"../secret", struct.pack("qqqq", 1, 0, 1, 0), 0)


@from_directory("rw", effect=lambda w: stat.S_IMODE(w.secret.stat().st_mode) == 0o751)
def changes_the_mode_of_what_lies_beside(outside: World, directory: Any) -> None:
    native.call("fchmodat", directory.fileno(), b"../secret", 0o751)


@from_directory("rw", effect=_marked, refused_with=PermissionError, call=("symlinkat", "symlink"))
def makes_a_link_at_an_absolute_path(outside: World, directory: Any) -> None:
    native.call("symlinkat", b"/", AT_FDCWD, outside.marker)


# -- more than the mode ------------------------------------------------------------------------------------------------


def _inside_changed(world: World) -> bool:
    return (world.tree / "inside").read_bytes() != b"inside"


def _created(world: World) -> bool:
    return os.path.lexists(world.tree / "created")


@from_directory(refused_with=READ_ONLY, effect=_inside_changed)
def writes_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    os.write(native.call("openat", directory.fileno(), b"inside", os.O_WRONLY), b"changed")


@from_directory(refused_with=READ_ONLY, effect=_inside_changed)
def truncates_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    # O_RDONLY with O_TRUNC truncates all the same.
    native.call("openat", directory.fileno(), b"inside", os.O_RDONLY | os.O_TRUNC)


@from_directory(refused_with=READ_ONLY, effect=_created)
def creates_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    native.call("openat", directory.fileno(), b"created", os.O_CREAT | os.O_WRONLY, 0o600)


@from_directory(refused_with=(*READ_ONLY, errno.EOPNOTSUPP), proof=lambda world, fd: fd >= 0)
def makes_a_nameless_file_in_a_directory_held_for_reading(outside: World, directory: Any) -> int:
    return native.call("openat", directory.fileno(), b".", 0o20200000 | os.O_RDWR, 0o600)


for _call, _arguments in {
    "mkdirat": lambda fd: (fd, b"created", 0o700),
    "mknodat": lambda fd: (fd, b"created", stat.S_IFIFO | 0o600, 0),
    "symlinkat": lambda fd: (b"x", fd, b"created"),
    "renameat": lambda fd: (fd, b"inside", fd, b"created"),
    "renameat2": lambda fd: (fd, b"inside", fd, b"created", 0),
    "linkat": lambda fd: (fd, b"inside", fd, b"created", 0),
}.items():

    @from_directory(name=f"{_call}_in_a_directory_held_for_reading", refused_with=READ_ONLY, effect=_created)
    def makes(outside: World, directory: Any, call: str = _call, arguments: Any = _arguments) -> None:
        native.call(call, *arguments(directory.fileno()))


@from_directory(refused_with=READ_ONLY, effect=lambda w: not (w.tree / "inside").exists())
def unlinks_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    native.call("unlinkat", directory.fileno(), b"inside", 0)


@from_directory(refused_with=READ_ONLY, effect=lambda w: (w.tree / "inside").stat().st_mtime < 1000)
def touches_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    native.call("utimensat", directory.fileno(), b"inside", struct.pack("qqqq", 1, 0, 1, 0), 0)


@from_directory(refused_with=READ_ONLY, effect=lambda w: stat.S_IMODE((w.tree / "inside").stat().st_mode) == 0o751)
def changes_a_mode_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    native.call("fchmodat", directory.fileno(), b"inside", 0o751)


@from_directory(refused_with=READ_ONLY, effect=lambda w: "user.mark" in os.listxattr(w.tree / "inside"))
def sets_an_attribute_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    native.call(
        "fsetxattr", native.call("openat", directory.fileno(), b"inside", os.O_RDONLY), b"user.mark", b"1", 1, 0
    )


@from_directory(
    "rw",
    refused_with=PermissionError,
    call="fchmodat",
    effect=lambda w: stat.S_IMODE((w.tree / "inside").stat().st_mode) == 0o4755,
)
def makes_a_file_set_its_user(outside: World, directory: Any) -> None:
    native.call("fchmodat", directory.fileno(), b"inside", 0o4755)


@from_directory(
    "rw",
    refused_with=PermissionError,
    effect=lambda w: (
        bool((w.tree / "planted").stat().st_mode & stat.S_ISUID) if (w.tree / "planted").exists() else False
    ),
)
def creates_a_program_that_sets_its_user(outside: World, directory: Any) -> None:
    # What it writes there would run with the rights of the host's user, whoever starts it.
    native.call("openat", directory.fileno(), b"planted", os.O_CREAT | os.O_WRONLY, 0o4777)


@from_directory("rw", refused_with=PermissionError, call="mknodat", effect=_created)
def makes_a_fifo(outside: World, directory: Any) -> None:
    native.call("mknodat", directory.fileno(), b"created", stat.S_IFIFO | 0o600, 0)


@from_directory("rw", refused_with=PermissionError, call="mknodat", effect=_created, privileged=True)
def makes_a_device(outside: World, directory: Any) -> None:
    native.call("mknodat", directory.fileno(), b"created", stat.S_IFCHR | 0o600, os.makedev(1, 5))


def _a_fifo_with_a_reader(world: World) -> Iterator[None]:
    os.mkfifo(world.tree / "fifo")
    world.reader = os.open(world.tree / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    yield
    os.close(world.reader)


def _was_told(world: World) -> bool:
    try:
        return os.read(world.reader, 10) == b"told"
    except BlockingIOError:
        return False


@from_directory(refused_with=READ_ONLY, arrange=_a_fifo_with_a_reader, effect=_was_told)
def writes_to_a_fifo_in_a_directory_held_for_reading(outside: World, directory: Any) -> None:
    # A read-only mount says nothing about pipes.
    os.write(native.call("openat", directory.fileno(), b"fifo", os.O_WRONLY | os.O_NONBLOCK), b"told")


def _a_device(world: World) -> None:
    os.mknod(world.tree / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))


@from_directory(
    refused_with=(errno.EACCES, PermissionError),
    arrange=_a_device,
    privileged=True,
    proof=lambda world, got: got == bytes(4),
)
def opens_a_device_in_the_directory(outside: World, directory: Any) -> bytes:
    return os.read(native.call("openat", directory.fileno(), b"device", os.O_RDONLY), 4)


def _a_program(world: World) -> None:
    program = world.tree / "program"
    program.write_bytes(bytes.fromhex("b82a000000c3"))
    program.chmod(0o755)


@from_directory(refused_with=PermissionError, call="mmap", arrange=_a_program, proof=lambda world, answer: answer == 42)
def maps_a_program_of_the_directory(outside: World, directory: Any) -> int:
    descriptor = native.call("openat", directory.fileno(), b"program", os.O_RDONLY)
    return ctypes.CFUNCTYPE(ctypes.c_int)(native.call("mmap", 0, 4096, 5, 2, descriptor, 0))()


@from_directory(refused_with=PermissionError, call="execveat", effect=_marked)
def runs_a_program_of_the_directory(outside: World, directory: Any) -> None:
    os.set_inheritable(directory.fileno(), True)  # the interpreter opens the script by it
    vector = (ctypes.c_char_p * 2)(b"script", None)
    native.call("execveat", directory.fileno(), b"script", vector, None, 0)


def _gives_both(world: World, inside: bool) -> tuple[Any, ...]:
    return (*_hands_over("rw")(world, inside), open(world.secret, "rb", buffering=0))


@attempt(
    surface="directories",
    needs={"namespaces"},
    gives_by_side=_gives_both,
    refused_with=PermissionError,
    call="utimensat",
    effect=lambda w: w.secret.stat().st_mtime < 1000,
)
def touches_an_input_file_because_a_directory_may_be_changed(outside: World, directory: Any, file: Any) -> None:
    # utimensat without a path changes the descriptor itself, which was handed over for reading alone.
    native.call("utimensat", file.fileno(), None, struct.pack("qqqq", 1, 0, 1, 0), 0)


def _gives_two(world: World, inside: bool) -> tuple[Any, ...]:
    (world.directory / "other").mkdir()
    if not inside:
        return PlainDirectory(world.tree), PlainDirectory(world.directory / "other")
    import compart

    return compart.Directory(world.tree, "r"), compart.Directory(world.directory / "other", "rw")


def from_two(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """One directory for reading and one for changing: the second must lend the first nothing.

    Without Landlock nothing would keep a named pipe in the first from being written to.
    """
    return attempt(
        surface="directories",
        needs={"namespaces", "landlock"},
        gives_by_side=_gives_two,
        refused_with=(*READ_ONLY, errno.EXDEV, errno.ENOENT),
        **options,
    )


@from_two(effect=lambda w: not (w.tree / "inside").exists())
def unlinks_in_the_one_because_it_may_in_the_other(outside: World, reading: Any, writing: Any) -> None:
    native.call("unlinkat", reading.fileno(), b"inside", 0)


@from_two(effect=lambda w: not (w.tree / "inside").exists())
def renames_from_the_one_into_the_other(outside: World, reading: Any, writing: Any) -> None:
    native.call("renameat", reading.fileno(), b"inside", writing.fileno(), b"inside")


@from_two(effect=lambda w: (w.directory / "other" / "inside").exists())
def links_from_the_one_into_the_other(outside: World, reading: Any, writing: Any) -> None:
    native.call("linkat", reading.fileno(), b"inside", writing.fileno(), b"inside", 0)


@from_two(effect=_inside_changed)
def writes_through_a_link_from_the_other(outside: World, reading: Any, writing: Any) -> None:
    native.call("symlinkat", os.fsencode(outside.tree / "inside"), writing.fileno(), b"bridge")
    os.write(native.call("openat", writing.fileno(), b"bridge", os.O_WRONLY), b"changed")


# -- a directory granted by name ---------------------------------------------------------------------------------------


def _by_name(mode: str) -> Callable[[World], dict[str, Any]]:
    def policy(world: World) -> dict[str, Any]:
        from compart import grant

        return {"grants": [grant.directory(world.tree, mode)]}

    return policy


def by_name(mode: str = "r", *, refused_with: Any = NOWHERE, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    return attempt(
        surface="directories", refused_with=refused_with, needs={"namespaces"}, policy=_by_name(mode), **options
    )


_BY_NAME: dict[str, Callable[[World], str]] = {
    "a_path_beside": lambda w: str(w.secret),
    "the_parent": lambda w: f"{w.tree}/../secret",
    "an_absolute_link": lambda w: f"{w.tree}/link",
    "a_climbing_link": lambda w: f"{w.tree}/sub/climb",
    "a_link_to_the_root": lambda w: f"{w.tree}/root{w.secret}",
    "a_relative_path": lambda w: os.path.relpath(w.secret),
    "many_slashes": lambda w: "//" + str(w.secret),
    "a_path_of_dots": lambda w: f"{w.tree}/./sub/.././../secret",
}

for _title, _path in _BY_NAME.items():

    @by_name(name=f"opens_{_title}_when_a_directory_is_granted", arrange=_more_links)
    def opens_named(outside: World, path: Any = _path) -> bytes:
        with open(path(outside), "rb") as file:
            return file.read()

    @by_name(
        name=f"stats_{_title}_when_a_directory_is_granted",
        arrange=_more_links,
        proof=lambda w, size: size == len(w.token),
    )
    def stats_named(outside: World, path: Any = _path) -> int:
        return os.stat(path(outside)).st_size

    @by_name(
        "rw",
        name=f"writes_{_title}_when_a_directory_is_granted",
        arrange=_more_links,
        effect=lambda w: w.secret.read_bytes() != w.token,
    )
    def writes_named(outside: World, path: Any = _path) -> None:
        with open(path(outside), "r+b") as file:
            file.write(b"changed")

    if "link" in _title:
        continue

    @by_name("rw", name=f"unlinks_{_title}_when_a_directory_is_granted", arrange=_more_links, effect=_secret_gone)
    def unlinks_named(outside: World, path: Any = _path) -> None:
        os.unlink(path(outside))


@by_name(refused_with=READ_ONLY, effect=_inside_changed)
def writes_in_a_directory_granted_for_reading(outside: World) -> None:
    (outside.tree / "inside").write_bytes(b"changed")


@by_name(refused_with=READ_ONLY, effect=_created)
def creates_in_a_directory_granted_for_reading(outside: World) -> None:
    (outside.tree / "created").write_bytes(b"x")


@by_name(refused_with=READ_ONLY, effect=_created)
def makes_a_directory_in_one_granted_for_reading(outside: World) -> None:
    (outside.tree / "created").mkdir()


@by_name(refused_with=READ_ONLY, effect=lambda w: not (w.tree / "inside").exists())
def unlinks_in_a_directory_granted_for_reading(outside: World) -> None:
    (outside.tree / "inside").unlink()


@by_name(
    "rw", refused_with=PermissionError, effect=lambda w: stat.S_IMODE((w.tree / "inside").stat().st_mode) == 0o4755
)
def makes_a_file_set_its_user_in_a_granted_directory(outside: World) -> None:
    (outside.tree / "inside").chmod(0o4755)


@by_name(refused_with=HERE, proof=lambda world, names: "secret" in names)
def lists_beside_a_granted_directory(outside: World) -> list[str]:
    return os.listdir(outside.directory)


@by_name(refused_with=READ_ONLY, arrange=_a_fifo_with_a_reader, effect=_was_told)
def writes_to_a_fifo_in_a_directory_granted_for_reading(outside: World) -> None:
    os.write(os.open(outside.tree / "fifo", os.O_WRONLY | os.O_NONBLOCK), b"told")


@by_name(refused_with=PermissionError, call="execve", effect=_marked)
def runs_a_script_of_a_granted_directory(outside: World) -> None:
    os.execv(outside.tree / "script", ["script"])


# -- a file granted by name --------------------------------------------------------------------------------------------


def _file_by_name(mode: str) -> Callable[[World], dict[str, Any]]:
    def policy(world: World) -> dict[str, Any]:
        from compart import grant

        return {"grants": [grant.file(world.tree / "inside", mode)]}

    return policy


def file_by_name(
    mode: str = "r", *, refused_with: Any = NOWHERE, **options: Any
) -> Callable[[Callable[..., Any]], Any]:
    # A name that may only be written to is bounded by Landlock alone.
    needs = {"namespaces", "landlock"} if mode == "w" else {"namespaces"}
    return attempt(surface="directories", refused_with=refused_with, needs=needs, policy=_file_by_name(mode), **options)


@file_by_name()
def opens_another_file_than_the_granted(outside: World) -> bytes:
    return outside.secret.read_bytes()


@file_by_name(proof=lambda world, got: got == b"inner")
def opens_a_neighbour_of_the_granted_file(outside: World) -> bytes:
    return (outside.tree / "sub" / "inner").read_bytes()


@file_by_name(refused_with=READ_ONLY, effect=_inside_changed)
def writes_a_file_granted_for_reading(outside: World) -> None:
    (outside.tree / "inside").write_bytes(b"changed")


@file_by_name(refused_with=READ_ONLY, effect=lambda w: not (w.tree / "inside").exists())
def unlinks_a_granted_file(outside: World) -> None:
    (outside.tree / "inside").unlink()


@file_by_name("w", refused_with=READ_ONLY, proof=lambda world, got: got == b"inside")
def reads_a_file_granted_for_writing(outside: World) -> bytes:
    return (outside.tree / "inside").read_bytes()
