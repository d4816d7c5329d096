"""Answer what the filter refused: decode it for people, decide the few calls that need more than the table.

Runs in the host, on the calling thread, against a hostile process. Everything read from its memory may change a moment
later, so it decides nothing: an answer of "continue" is given only where the meaning is in registers, or where the
kernel bounds the call anyway (paths inside a root that holds only grants).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import signal
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from compart.backend.linux import _sys, filters, syscalls
from compart.backend.linux.bpf import Masked
from compart.policy import Policy
from compart.rights import Rights
from compart.violation import Frame, Violation

CONTINUE = 1
ADDFD_SETFD = 1
STACK_SIGNAL = signal.SIGRTMAX - 3 if hasattr(signal, "SIGRTMAX") else 0
"""Sent to a thread whose call was refused: faulthandler writes its Python stack to the trace pipe."""

MOST_RECORDED = 100
MOST_ANSWERED = 100_000
MOST_TRACE = 1 << 20
WAIT_KILLABLE_RECV = 1 << 5

O_ACCMODE = 3
O_NAMES = (
    (1, "O_WRONLY"),
    (2, "O_RDWR"),
    (0o100, "O_CREAT"),
    (0o1000, "O_TRUNC"),
    (0o2000, "O_APPEND"),
    (0o200000, "O_DIRECTORY"),
)
AT_FDCWD = -100
SELF_DIRECTED = ("kill", "tgkill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo")
SELF_ASKED = ("sched_getaffinity", "sched_setaffinity", "sched_getparam", "sched_getscheduler", "get_robust_list")

PATH_CALLS = {
    # name: (index of the directory descriptor or None, index of the path, index of open flags or None)
    "open": (None, 0, 1), "openat": (0, 1, 2), "openat2": (0, 1, None), "creat": (None, 0, None),
    "stat": (None, 0, None), "lstat": (None, 0, None), "newfstatat": (0, 1, None), "statx": (0, 1, None),
    "access": (None, 0, None), "faccessat": (0, 1, None), "faccessat2": (0, 1, None),
    "readlink": (None, 0, None), "readlinkat": (0, 1, None), "truncate": (None, 0, None), "statfs": (None, 0, None),
    "mkdir": (None, 0, None), "mkdirat": (0, 1, None), "rmdir": (None, 0, None), "unlink": (None, 0, None),
    "unlinkat": (0, 1, None), "rename": (None, 0, None), "renameat": (0, 1, None), "renameat2": (0, 1, None),
    "link": (None, 0, None), "linkat": (0, 1, None), "symlink": (None, 1, None), "symlinkat": (1, 2, None),
    "chmod": (None, 0, None), "fchmodat": (0, 1, None), "fchmodat2": (0, 1, None), "chown": (None, 0, None),
    "lchown": (None, 0, None), "fchownat": (0, 1, None), "utime": (None, 0, None), "utimes": (None, 0, None),
    "futimesat": (0, 1, None), "utimensat": (0, 1, None), "chdir": (None, 0, None), "chroot": (None, 0, None),
    "mknod": (None, 0, None), "mknodat": (0, 1, None), "execve": (None, 0, None), "execveat": (0, 1, None),
    "getxattr": (None, 0, None), "lgetxattr": (None, 0, None), "setxattr": (None, 0, None), "listxattr": (None, 0, None),
    "inotify_add_watch": (0, 1, None), "name_to_handle_at": (0, 1, None), "mount": (None, 1, None),
    "umount2": (None, 0, None), "pivot_root": (None, 0, None), "open_tree": (0, 1, None), "fsopen": (None, 0, None),
    "mq_open": (None, 0, None), "mq_unlink": (None, 0, None), "memfd_create": (None, 0, None), "swapon": (None, 0, None),
    "acct": (None, 0, None), "uselib": (None, 0, None),
}  # fmt: skip

QUIET = (
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/possible",
    "/proc/stat",
    "/proc/sys/vm/overcommit_memory",
)
"""Refused like any other, but not told: the C library and malloc ask these and do right without an answer."""

BOUNDED_BY_ROOT = filters.READING + filters.READING_AT + filters.CHANGING + filters.CHANGING_AT + ("statx", "statfs")


NEW_LISTENER = 1 << 3


@lru_cache(maxsize=1)
def killable() -> bool:
    """Whether the kernel can wait for an answer undisturbed by signals (Linux 5.19, seccomp_unotify(2))."""
    return bool(_sys.seccomp_flags_known(NEW_LISTENER | WAIT_KILLABLE_RECV))


@dataclass(slots=True)
class _Draft:
    call: str
    number: int
    arguments: dict[str, object]
    thread: int
    stack: tuple[Frame, ...] = ()
    module: str = ""
    asked_stack: bool = False


@dataclass(slots=True)
class Supervisor:
    """The host's answer to one compartment's refused calls.

    `ranges` are the sets of rights by range, `granted` the host's own descriptor for each granted number; `paths` are the
    granted paths by name, `cwd` where relative names start inside.
    """

    listener: int
    pid: int
    policy: Policy
    arch: int
    ranges: tuple[Rights, ...] = ()
    granted: dict[int, int] = field(default_factory=dict)
    paths: tuple[tuple[str, str], ...] = ()
    cwd: str = "/"
    answered: int = 0
    unrecorded: int = 0
    drafts: list[_Draft] = field(default_factory=list)
    kill_wanted: bool = False
    threads_refused: int = 0

    def serve(self) -> None:
        """Answer one waiting call. Never blocks for longer than the kernel needs to hand it over."""
        notification = _sys.seccomp_notify_receive(self.listener)
        if notification is None:
            return
        ident, thread, number, arch, _, args = notification
        call = syscalls.name(arch, number)
        self.answered += 1
        if self.answered > MOST_ANSWERED:
            self.kill_wanted = True
        if arch == self.arch and self._continues(call, thread, args):
            _sys.seccomp_notify_send(self.listener, ident, 0, 0, CONTINUE)
            return
        if call == "clone" and self._refuses_thread(args):
            _sys.seccomp_notify_send(self.listener, ident, 0, errno.EAGAIN, 0)
            return
        if arch == self.arch and (source := self._copied(call, args)) is not None:
            self._install_copy(ident, source, cloexec=call == "dup" or args[1] & 0xFFFFFFFF == filters.F_DUPFD_CLOEXEC)
            return
        if arch == self.arch and call in ("open", "openat") and self._is_quiet(call, thread, args):
            _sys.seccomp_notify_send(self.listener, ident, 0, filters.REFUSED, 0)
            return
        recorded = self._record(call, number, thread, args)
        if self.policy.on_violation == "kill":
            self.kill_wanted = True
            return
        # Where the kernel waits killably the signal is delivered as the call returns, at the very line. Elsewhere it would
        # interrupt the wait and the call would come again, so the answer goes first and the stack is as near as can be had.
        if recorded and killable():
            self._ask_stack(thread)
        _sys.seccomp_notify_send(self.listener, ident, 0, filters.REFUSED, 0)
        if recorded and not killable():
            self._ask_stack(thread)

    def _ask_stack(self, thread: int) -> None:
        with contextlib.suppress(OSError):
            _sys.tgkill(self.pid, thread, STACK_SIGNAL)

    # ---- the few calls that need more than the table ---------------------------------------------------------------

    def _continues(self, call: str, thread: int, args: tuple[int, ...]) -> bool:
        if call in SELF_DIRECTED or call in SELF_ASKED:
            return self._is_self(call, _int(args[0]))
        if call == "clone" and self.policy.threads is not None:
            return self._may_make_thread(args)
        if self.paths and call in BOUNDED_BY_ROOT:
            return plain_mode(call, args) and self._is_granted(call, thread, args)
        return False

    def _is_self(self, call: str, target: int) -> bool:
        if target == self.pid:
            return True
        return target > 0 and call not in ("kill", "tgkill") and os.path.exists(f"/proc/{self.pid}/task/{target}")

    def _makes_thread(self, args: tuple[int, ...]) -> bool:
        return args[0] & 0xFFFFFFFF & ~0x400000 == filters.CLONE_THREAD_FLAGS

    def _may_make_thread(self, args: tuple[int, ...]) -> bool:
        limit = self.policy.threads
        if limit is None or not self._makes_thread(args):
            return False
        with contextlib.suppress(OSError):
            # Clones are answered one at a time and each waits for its answer, so at most the one that was just
            # continued is not listed yet.
            return len(os.listdir(f"/proc/{self.pid}/task")) < limit
        return False

    def _refuses_thread(self, args: tuple[int, ...]) -> bool:
        if self.policy.threads is None or not self._makes_thread(args):
            return False
        self.threads_refused += 1
        return True

    def _is_granted(self, call: str, thread: int, args: tuple[int, ...]) -> bool:
        directory, index, _ = PATH_CALLS[call]
        if directory is not None and _int(args[directory]) != AT_FDCWD:
            return False
        text = self._text(thread, args[index])
        if text is None:
            return False
        path = os.path.normpath(os.path.join(self.cwd, text))
        for granted, _ in self.paths:
            if path == granted or path.startswith(granted + "/") or granted.startswith(path.rstrip("/") + "/"):
                return True
        return False

    # ---- copies of granted descriptors: only the host makes them, so that they keep their range -----------------------------

    def _copied(self, call: str, args: tuple[int, ...]) -> int | None:
        command = args[1] & 0xFFFFFFFF
        copies = call == "dup" or (call == "fcntl" and command in (filters.F_DUPFD, filters.F_DUPFD_CLOEXEC))
        number = _int(args[0])
        return number if copies and number in self.granted else None

    def _install_copy(self, ident: int, source: int, *, cloexec: bool) -> None:
        try:
            number = self._free_number(source)
            if number is None:
                _sys.seccomp_notify_send(self.listener, ident, 0, errno.EMFILE, 0)
                return
            with self._room_for(number):
                flags = os.O_CLOEXEC if cloexec else 0
                _sys.seccomp_notify_addfd(self.listener, ident, self.granted[source], ADDFD_SETFD, number, flags)
            self.granted[number] = self.granted[source]
            _sys.seccomp_notify_send(self.listener, ident, number, 0, 0)
        except OSError:
            # No ADDFD (Linux before 5.9), or the caller went away.
            _sys.seccomp_notify_send(self.listener, ident, 0, filters.REFUSED, 0)

    def _free_number(self, source: int) -> int | None:
        first = source - (source - filters.BASE) % filters.WIDTH
        used = {int(name) for name in os.listdir(f"/proc/{self.pid}/fd")}
        return next((number for number in range(first, first + filters.WIDTH) if number not in used), None)

    @contextlib.contextmanager
    def _room_for(self, number: int) -> Iterator[None]:
        # ADDFD honours the compartment's RLIMIT_NOFILE. Lifted for a moment it lets another thread of it open a few more
        # of its own; the range numbers are never the lowest free ones, and the channel's are taken.
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (number + 1, hard))
        try:
            yield
        finally:
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (self.policy.open_files, hard))

    def _is_quiet(self, call: str, thread: int, args: tuple[int, ...]) -> bool:
        return self._text(thread, args[PATH_CALLS[call][1]]) in QUIET

    # ---- what it was, for people ---------------------------------------------------------------------------------------

    def _record(self, call: str, number: int, thread: int, args: tuple[int, ...]) -> bool:
        if len(self.drafts) >= MOST_RECORDED:
            self.unrecorded += 1
            return False
        arguments = self._arguments(call, thread, args)
        ask = self.policy.on_violation != "kill"
        self.drafts.append(_Draft(call, number, arguments, thread, asked_stack=ask))
        return True

    def _arguments(self, call: str, thread: int, args: tuple[int, ...]) -> dict[str, object]:
        decode = DECODERS.get(call)
        if decode is not None:
            return decode(self, thread, args)
        if call in PATH_CALLS:
            return self._path_arguments(call, thread, args)
        return {f"arg{n}": hex(value) for n, value in enumerate(args) if value} or {}

    def _path_arguments(self, call: str, thread: int, args: tuple[int, ...]) -> dict[str, object]:
        directory, index, flags = PATH_CALLS[call]
        found: dict[str, object] = {}
        if directory is not None and _int(args[directory]) != AT_FDCWD:
            found["directory"] = self._fd(args[directory])
        text = self._text(thread, args[index])
        found["path"] = text if text is not None else hex(args[index])
        if flags is not None:
            found["flags"] = _open_flags(args[flags])
        return found

    def _text(self, thread: int, address: int, most: int = 4096) -> str | None:
        """A NUL-terminated string of the other process; None when it has no such memory."""
        taken = bytearray()
        while len(taken) < most:
            # Up to the end of a page at a time: the next one may not be there.
            step = min(4096 - (address + len(taken)) % 4096, most - len(taken))
            try:
                piece = _sys.process_vm_readv(thread, address + len(taken), step)
            except OSError:
                return None
            taken += piece
            if b"\0" in piece:
                return bytes(taken[: taken.index(0)]).decode(errors="backslashreplace")
            if len(piece) < step:
                return None
        return bytes(taken).decode(errors="backslashreplace") + "…"

    def _bytes(self, thread: int, address: int, length: int) -> bytes:
        try:
            return _sys.process_vm_readv(thread, address, min(length, 256)) if length else b""
        except OSError:
            return b""

    def _fd(self, value: int) -> str:
        """A descriptor for people: its number, and its rights when it was granted."""
        number = _int(value)
        index = (number - filters.FIRST_GRANT) // filters.WIDTH
        if number >= filters.FIRST_GRANT and index < len(self.ranges):
            return f"fd {number} ({self.ranges[index]!r})"
        return f"fd {number}"

    # ---- stacks and hints from the trace pipe -----------------------------------------------------------------------------

    def violations(self, trace: bytearray) -> tuple[Violation, ...]:
        """What was refused so far, with the stacks that came by the trace pipe."""
        self._read_trace(trace)
        return tuple(
            Violation(
                call=draft.call,
                arguments=draft.arguments,
                errno=filters.REFUSED,
                thread=draft.thread,
                stack=draft.stack,
                suggestion=suggest(draft.call, draft.arguments, draft.module),
                number=draft.number,
            )
            for draft in self.drafts
        )

    def _read_trace(self, trace: bytearray) -> None:
        waiting = iter([draft for draft in self.drafts if draft.asked_stack])
        module = ""
        frames: list[Frame] = []
        draft: _Draft | None = None
        for line in trace.decode(errors="replace").splitlines():
            if line.startswith("import "):
                module = line[7:200]
            elif line.startswith(("Stack (", "Current thread", "Thread 0x")):
                draft, frames = next(waiting, None), []
                if draft is not None:
                    draft.stack = ()
            elif (match := STACK_LINE.match(line)) and draft is not None and len(frames) < 64:
                frames.append(Frame(match[1], int(match[2]), match[3]))
                draft.stack = tuple(frames)
                if module and match[1].startswith("<frozen importlib"):
                    draft.module = module


STACK_LINE = re.compile(r'  File "([^"]{1,4096})", line (\d{1,9}) in (\S{1,500})')


def suggest(call: str, arguments: dict[str, object], module: str = "") -> str:
    """The line that would allow a call; "" when compart has none."""
    if module and call in ("open", "openat", "stat", "newfstatat", "lstat", "readlink"):
        return f"Policy(preload=[{module!r}])"
    if call in ("open", "openat", "creat", "truncate"):
        path, flags = arguments.get("path"), str(arguments.get("flags", ""))
        if not isinstance(path, str) or not path.startswith("/"):
            return ""
        if "O_DIRECTORY" in flags:
            return f"grant.directory({path!r}, 'r')"
        mode = "rw" if (call != "open" and call != "openat") or "O_WRONLY" in flags or "O_RDWR" in flags else "r"
        if "O_CREAT" in flags:
            return f"grant.directory({os.path.dirname(path)!r}, 'rw')"
        return f"grant.file({path!r}, {mode!r}), or open it outside and pass it as an argument"
    if call in ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat"):
        path = arguments.get("path")
        if not isinstance(path, str) or path[:1] != "/" or path == "/":
            return ""
        parent = os.path.dirname(path)
        return f"grant.directory({path if parent == '/' else parent!r}, 'r')"
    if call in ("socket", "connect", "bind"):
        return "connect outside and pass the socket as an argument"
    if call == "memfd_create":
        return "use bytes or a bytearray"
    descriptor = str(arguments.get("descriptor", ""))
    if "(" in descriptor and call in NEEDS:
        return f"hand it over with {NEEDS[call]}: open it outside in a mode that has it"
    return ""


NEEDS = {
    "write": "CAP_WRITE", "writev": "CAP_WRITE", "pwrite64": "CAP_PWRITE", "read": "CAP_READ", "readv": "CAP_READ",
    "pread64": "CAP_PREAD", "lseek": "CAP_SEEK", "ftruncate": "CAP_FTRUNCATE", "fsync": "CAP_FSYNC", "mmap": "CAP_MMAP_RW",
    "sendto": "CAP_SEND", "recvfrom": "CAP_RECV", "shutdown": "CAP_SHUTDOWN", "fallocate": "CAP_WRITE",
}  # fmt: skip


def _int(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def plain_mode(call: str, args: tuple[int, ...]) -> bool:
    """Whether a call that may make a file asks for no set-user-ID bits; the table's conditions, on registers."""

    def holds(condition: Masked) -> bool:
        return args[condition.arg] & condition.mask == condition.value

    return any(all(holds(c) for c in every if isinstance(c, Masked)) for every in filters.plain_modes(call))


def _open_flags(value: int) -> str:
    names = [name for bit, name in O_NAMES if (value & O_ACCMODE) == bit or (bit > O_ACCMODE and value & bit == bit)]
    if not value & O_ACCMODE:
        names.insert(0, "O_RDONLY")
    return "|".join(names)


def _name_of(prefix: str, value: int) -> str:
    for name, constant in vars(socket).items():
        if name.startswith(prefix) and isinstance(constant, int) and constant == value:
            return name
    return f"{prefix}{value}"


def _socket(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    kind = _name_of("SOCK_", args[1] & 0xF)
    return {"domain": _name_of("AF_", _int(args[0])), "type": kind, "protocol": _int(args[2])}


def _address(position: int) -> Callable[[Supervisor, int, tuple[int, ...]], dict[str, object]]:
    def decode(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
        raw = s._bytes(thread, args[position], _int(args[position + 1]) if args[position] else 0)
        return {"descriptor": s._fd(args[0]), "address": _sockaddr(raw)}

    return decode


def _sockaddr(raw: bytes) -> str:
    if len(raw) < 2:
        return "no address"
    family = struct.unpack_from("=H", raw)[0]
    if family == socket.AF_INET and len(raw) >= 8:
        return f"{socket.inet_ntop(socket.AF_INET, raw[4:8])}:{struct.unpack_from('>H', raw, 2)[0]}"
    if family == socket.AF_INET6 and len(raw) >= 24:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw[8:24])}]:{struct.unpack_from('>H', raw, 2)[0]}"
    if family == socket.AF_UNIX:
        name = raw[2:]
        shown = name.split(b"\0")[0] if name[:1] != b"\0" else b"@" + name[1:].rstrip(b"\0")
        return shown.decode(errors="backslashreplace")
    return f"address of family {family}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _kill(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    return {"target": f"process {_int(args[0])}", "signal": _signal_name(_int(args[1]))}


def _tgkill(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    return {"target": f"process {_int(args[0])}", "thread": _int(args[1]), "signal": _signal_name(_int(args[2]))}


def _descriptor(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    return {"descriptor": s._fd(args[0])}


def _command(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    command = args[1] & 0xFFFFFFFF
    return {"descriptor": s._fd(args[0]), "command": COMMANDS.get(command, hex(command))}


COMMANDS = {
    value: name
    for module, prefix in ((fcntl, "F_"), (termios, "T"), (termios, "FIO"))
    for name, value in vars(module).items()
    if name.startswith(prefix) and isinstance(value, int) and (module is fcntl or value > 0x5000)
}


def _clone(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    known = ((0x100, "CLONE_VM"), (0x4000, "CLONE_VFORK"), (0x10000, "CLONE_THREAD"), (0x20000, "CLONE_NEWNS"),
             (0x10000000, "CLONE_NEWUSER"), (0x20000000, "CLONE_NEWPID"), (0x40000000, "CLONE_NEWNET"))  # fmt: skip
    names = [name for bit, name in known if args[0] & bit]
    return {"what": "(a new thread)" if args[0] & 0x10000 else "(a new process)", "flags": "|".join(names)}


def _nothing(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    return {}


def _protection(s: Supervisor, thread: int, args: tuple[int, ...]) -> dict[str, object]:
    names = [name for bit, name in ((1, "PROT_READ"), (2, "PROT_WRITE"), (4, "PROT_EXEC")) if args[2] & bit]
    return {"length": args[1], "protection": "|".join(names) or "PROT_NONE"}


DECODERS: dict[str, Callable[[Supervisor, int, tuple[int, ...]], dict[str, object]]] = {
    "socket": _socket,
    "socketpair": _socket,
    "connect": _address(1),
    "bind": _address(1),
    "sendto": _address(4),
    "kill": _kill,
    "tkill": _kill,
    "rt_sigqueueinfo": _kill,
    "tgkill": _tgkill,
    "fcntl": _command,
    "ioctl": _command,
    "mmap": _protection,
    "mprotect": _protection,
    "clone": _clone,
    "fork": _nothing,
    "vfork": _nothing,
    **dict.fromkeys(
        ("read", "write", "pread64", "pwrite64", "readv", "writev", "lseek", "fstat", "ftruncate", "fchmod", "fchown",
         "flock", "fsync", "fdatasync", "dup", "dup2", "dup3", "fchdir", "sendmsg", "recvmsg", "listen", "accept",
         "accept4", "setsockopt", "getsockopt", "shutdown", "fsetxattr", "fgetxattr", "close", "close_range"),
        _descriptor,
    ),
}  # fmt: skip
