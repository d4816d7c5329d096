"""Namespaces with an empty root, and directories that are whole worlds.

Runs in the host; the work that needs a namespace of its own is done by a short-lived builder process, which hands back
descriptors. A compartment later joins by setns(2), which costs a few microseconds, where making namespaces costs
hundreds.

A granted directory becomes a detached mount (open_tree(2) with OPEN_TREE_CLONE): beneath it `..` ends at its own root,
and absolute paths and links resolve in the compartment's root, which holds nothing that was not granted by name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache

from compart import _fast
from compart.backend.linux import _sys
from compart.errors import PolicyError, UnsupportedError
from compart.policy import Grant

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x40000000,
)
MS_REC_PRIVATE = 0x4000 | 0x40000
MNT_DETACH = 2
PR_SET_DUMPABLE = 4
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
AT_EMPTY_PATH, AT_RECURSIVE = 0x1000, 0x8000
MOVE_MOUNT_F_EMPTY_PATH = 4
RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6

KINDS = (
    ("user", CLONE_NEWUSER),
    ("mnt", CLONE_NEWNS),
    ("net", CLONE_NEWNET),
    ("ipc", CLONE_NEWIPC),
    ("uts", CLONE_NEWUTS),
)


class Namespaces:
    """Namespaces made once: (kind flag, descriptor) in the order to join them.

    The descriptors in `owned` are closed when nobody holds this object any more: a number must not come to mean other
    namespaces while a plan still names it. `base` is what the other ones belong to.
    """

    __slots__ = ("_owned", "_pid", "base", "joins")

    def __init__(
        self, joins: tuple[tuple[int, int], ...], owned: tuple[int, ...], base: Namespaces | None = None
    ) -> None:
        self.joins = joins
        self.base = base
        self._owned = owned
        self._pid = os.getpid()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():
            return
        # In a compartment the numbers are other things by now.
        if self._pid == os.getpid() and not _sys.in_own_fork():
            for descriptor in self._owned:
                with contextlib.suppress(OSError):
                    os.close(descriptor)


_lock = threading.Lock()


def _forked() -> None:
    global _lock
    _lock = threading.Lock()


_sys.at_fork(_forked)
Key = tuple[tuple[Grant, ...], tuple[tuple[int, int], ...], int]
_made: dict[Key, Namespaces] = {}
_refused: dict[str, str] = {}
MOST_KEPT = 64


def namespaces(grants: tuple[Grant, ...] = ()) -> Namespaces:
    """The namespaces for these path grants, made at first use and kept.

    UnsupportedError when the machine refuses to make them.
    """
    key = grants, identities(grants), os.geteuid()
    with _lock:
        if key in _made:
            return _made[key]
        if "" in _refused:
            raise _unsupported(_refused[""])
        try:
            nothing = (), (), os.geteuid()
            base = _made.get(nothing) or _keep(nothing, _build(lambda: _make_world((), _kinds())))
            if not grants:
                return base
            # Only the root differs: everything else is shared with the namespaces that hold nothing.
            (world,) = _build(lambda: _make_world(grants, ["mnt"]), base)
        except BuilderError as error:
            if error.step in ("unshare", "fork"):
                _refused[""] = error.text
            raise _unsupported(error.text) from None
        joins = tuple((kind, world if kind == CLONE_NEWNS else descriptor) for kind, descriptor in base.joins)
        while len(_made) > MOST_KEPT:
            del _made[next(key for key in _made if key[0])]
        _made[key] = Namespaces(joins, (world,), base)
        return _made[key]


def identities(grants: tuple[Grant, ...]) -> tuple[tuple[int, int], ...]:
    """What the granted paths name at this moment: a file that was replaced is another one. PolicyError when one is gone."""
    found = []
    for grant in grants:
        try:
            status = os.stat(grant.path)
        except OSError as error:
            raise PolicyError(f"{grant}: {error.strerror}; name something that exists") from None
        found.append((status.st_dev, status.st_ino))
    return tuple(found)


def _kinds() -> list[str]:
    return [name for name, _ in KINDS if name != "user" or not _privileged()]


def _keep(key: Key, descriptors: list[int]) -> Namespaces:
    flags = [dict(KINDS)[name] for name in _kinds()]
    _made[key] = Namespaces(tuple(zip(flags, descriptors, strict=True)), tuple(descriptors))
    return _made[key]


def detached(descriptor: int, writable: bool) -> int:
    """A directory as a mount of its own: read-only unless `writable`; never executable, no devices, no set-user-ID.

    The caller owns the descriptor that is returned (an O_PATH one; the mount lives as long as it is open).
    UnsupportedError when the machine refuses.
    """
    try:
        return _detach(descriptor, b"", writable)
    except PermissionError:
        pass
    except OSError as error:
        raise _unsupported(f"open_tree: {error.strerror}") from None
    path = os.readlink(f"/proc/self/fd/{descriptor}")
    before = os.fstat(descriptor)
    try:
        (made,) = _build(lambda: [_detach_by_path(path, before, writable)])
    except BuilderError as error:
        raise _unsupported(error.text) from None
    return made


def close_all() -> None:
    """Forget every namespace that is kept; each is closed when no plan names it any more."""
    with _lock:
        _made.clear()
        _refused.clear()
        _privileged_as.cache_clear()


def _unsupported(reason: str) -> UnsupportedError:
    return UnsupportedError(
        "namespaces",
        f"a directory or path grant needs a mount of its own, and this machine refuses ({reason})",
        "allow user namespaces or run with CAP_SYS_ADMIN, or hand over open files instead",
    )


def _privileged() -> bool:
    """Whether this process may make mounts without a user namespace (CAP_SYS_ADMIN and CAP_SYS_CHROOT)."""
    return _privileged_as(os.geteuid())


@lru_cache(maxsize=4)
def _privileged_as(user: int) -> bool:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("CapEff:"):
                effective = int(line.split()[1], 16)
                return bool(effective >> 21 & 1 and effective >> 18 & 1)
    return False


# ---- the builder: a child that steps into fresh namespaces, does one thing, and hands back descriptors ----------------


class BuilderError(Exception):
    """The builder could not do `step`; `text` says why."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.step = text.split(":")[0].split("(")[0]
        super().__init__(text)


def _build(work: Callable[[], Sequence[int]], base: Namespaces | None = None) -> list[int]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        privileged = _privileged()
        pid, pidfd = _sys.fork(probe_heap=True)
        if pid == 0:
            _builder(theirs, work, privileged, base)
        theirs.close()
        try:
            said, descriptors = _fast.recv_fds(ours.fileno(), 4096, 16)
        finally:
            _sys.pidfd_send_signal(pidfd, 9)
            _sys.waitid(pidfd)
            os.close(pidfd)
    if said != b"ok":
        for descriptor in descriptors:
            os.close(descriptor)
        raise BuilderError(said.decode(errors="replace") or "fork: the builder died")
    return descriptors


def _builder(
    answer: socket.socket, work: Callable[[], Sequence[int]], privileged: bool, base: Namespaces | None
) -> None:
    step = "start"
    try:
        _sys.default_signals()
        # A host that gave up root is not dumpable, and its /proc entries belong to root.
        _sys.prctl(PR_SET_DUMPABLE, 1)
        step = "unshare"
        uid, gid = os.geteuid(), os.getegid()
        user = None if base is None else dict(base.joins).get(CLONE_NEWUSER)
        if user is not None:
            _sys.setns(user, CLONE_NEWUSER)
        flags = CLONE_NEWNS if base is not None else CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
        _sys.unshare(flags if privileged or user is not None else flags | CLONE_NEWUSER)
        if not privileged and user is None:
            step = "uid_map"
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{uid} {uid} 1")
            _write("/proc/self/gid_map", f"{gid} {gid} 1")
        step = "mount"
        _sys.mount(b"/", MS_REC_PRIVATE)
        _fast.send_fds(answer.fileno(), b"ok", list(work()))
    except BaseException as error:
        what = f"{error.strerror or error} ({error.errno})" if isinstance(error, OSError) else repr(error)
        _fast.send_fds(answer.fileno(), f"{step}: {what}".encode()[:4000], [])
    finally:
        os._exit(0)


def _make_world(grants: Sequence[Grant], kinds: Sequence[str]) -> list[int]:
    """Build an empty root with the granted paths in it, step in, and return descriptors of the namespaces `kinds`."""
    trees = [_grant_tree(grant) for grant in grants]
    made = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in kinds]
    context = _sys.fsopen(b"tmpfs")
    for key, value in ((b"size", b"64k"), (b"nr_inodes", b"2048"), (b"mode", b"0755")):
        _sys.fsconfig(context, FSCONFIG_SET_STRING, key, value)
    _sys.fsconfig(context, FSCONFIG_CMD_CREATE)
    root = _sys.fsmount(context, NOSUID | NODEV | NOEXEC)
    _sys.move_mount(root, b"", -100, b"/", MOVE_MOUNT_F_EMPTY_PATH)
    # Shorter paths first, so that a grant beneath another one is mounted onto it.
    for tree, grant in sorted(zip(trees, grants, strict=True), key=lambda pair: len(pair[1].path)):
        _place(root, tree, grant, _place_of(grant, grants))
    _sys.mount_setattr(root, b"", AT_EMPTY_PATH, RDONLY, 0)
    os.fchdir(root)
    _sys.pivot_root(b".", b".")
    _sys.umount2(b".", MNT_DETACH)
    return made


def _grant_tree(grant: Grant) -> int:
    tree = _sys.open_tree(-100, os.fsencode(grant.path), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE)
    _harden(tree, writable=grant.mode != "r")
    return tree


def _place_of(grant: Grant, grants: Sequence[Grant]) -> str:
    """Where a grant is mounted: beneath another grant the links on the way lead to the real place, and that is it."""
    for outer in grants:
        if outer is not grant and outer.kind == "directory" and grant.path.startswith(outer.path + "/"):
            inner = os.path.realpath(os.path.dirname(grant.path))
            if (inner + "/").startswith(os.path.realpath(outer.path) + "/"):
                within = os.path.relpath(inner, os.path.realpath(outer.path))
                return os.path.normpath(os.path.join(outer.path, within, os.path.basename(grant.path)))
            # A link leads out of the outer grant: what it leads to stands where it really is.
            return os.path.join(inner, os.path.basename(grant.path))
    return grant.path


def _place(root: int, tree: int, grant: Grant, path: str) -> None:
    parts = path.lstrip("/").split("/")
    at = os.dup(root)
    for n, part in enumerate(parts):
        last = n == len(parts) - 1
        try:
            if last and grant.kind == "file":
                os.close(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o444, dir_fd=at))
            else:
                os.mkdir(part, 0o755, dir_fd=at)
        except FileExistsError:
            pass
        except OSError as error:
            # Beneath a granted read-only directory the mount point is there already, or never will be.
            if error.errno != errno.EROFS:
                raise
        if not last:
            deeper = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = deeper
    _sys.move_mount(tree, b"", at, os.fsencode(parts[-1]), MOVE_MOUNT_F_EMPTY_PATH)
    os.close(at)


def _detach(descriptor: int, path: bytes, writable: bool) -> int:
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE
    tree = _sys.open_tree(descriptor, path, flags)
    try:
        _harden(tree, writable)
    except BaseException:
        os.close(tree)
        raise
    return tree


def _detach_by_path(path: str, before: os.stat_result, writable: bool) -> int:
    # A mount is cloned through the new namespace's own tree, so the directory is found again by its path ...
    here = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    found = os.fstat(here)
    if (found.st_dev, found.st_ino) != (before.st_dev, before.st_ino):
        raise OSError(errno.ESTALE, f"{path!r} is not the directory that was opened")
    return _detach(here, b"", writable)


def _harden(tree: int, writable: bool) -> None:
    attributes = NOSUID | NODEV | NOEXEC | (0 if writable else RDONLY)
    _sys.mount_setattr(tree, b"", AT_EMPTY_PATH | AT_RECURSIVE, attributes, 0)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
