"""Tell people what was refused: the arguments of a call in words, and the grant that would allow it.

Runs in the host. What is read here is a hostile process's memory, which may change while it is read: it is for people,
lengths are bounded, and nothing that it names is opened or looked up. Registers that a call does not take hold what was
left in them, and are not shown.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass

from compart.backend.linux import _sys, filters
from compart.rights import Rights

AT_FDCWD = -100
MOST_TEXT = 4096

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

SECOND_PATHS = {
    "rename": (None, 1), "renameat": (2, 3), "renameat2": (2, 3), "link": (None, 1), "linkat": (2, 3),
}  # fmt: skip

SIGNATURES = {
    # The leading arguments of calls that say something to a person, from section 2 of the manual.
    "setuid": "uid", "setgid": "gid", "setreuid": "ruid euid", "setregid": "rgid egid", "setfsuid": "uid", "setfsgid": "gid",
    "setresuid": "ruid euid suid", "setresgid": "rgid egid sgid", "setgroups": "size",
    "setpgid": "pid pgid", "getpgid": "pid", "getsid": "pid",
    "getpriority": "which who", "setpriority": "which who priority", "ioprio_get": "which who", "ioprio_set": "which who",
    "sched_setaffinity": "pid length", "sched_getaffinity": "pid length", "sched_setscheduler": "pid policy",
    "sched_getscheduler": "pid", "sched_setparam": "pid", "sched_getparam": "pid", "sched_setattr": "pid",
    "sched_getattr": "pid", "sched_rr_get_interval": "pid", "get_robust_list": "pid",
    "prlimit64": "pid resource", "setrlimit": "resource", "prctl": "option", "personality": "persona",
    "ptrace": "request pid", "process_vm_readv": "pid", "process_vm_writev": "pid", "kcmp": "pid1 pid2 type",
    "pidfd_open": "pid flags", "pidfd_getfd": "pidfd fd", "pidfd_send_signal": "pidfd signal", "setns": "fd type",
    "process_madvise": "pidfd", "process_mrelease": "pidfd",
    "clock_gettime": "clock", "clock_settime": "clock", "clock_adjtime": "clock", "timer_create": "clock",
    "timerfd_create": "clock", "bpf": "command", "keyctl": "operation", "syslog": "type", "iopl": "level",
    "seccomp": "operation flags", "userfaultfd": "flags", "memfd_secret": "flags", "mlockall": "flags",
    "io_uring_setup": "entries", "io_uring_enter": "fd", "io_uring_register": "fd opcode",
    "inotify_init1": "flags", "fanotify_init": "flags", "epoll_ctl": "epfd operation fd", "epoll_wait": "epfd",
    "landlock_restrict_self": "fd flags", "splice": "fd", "tee": "fd fd2", "vmsplice": "fd", "sendfile": "fd fd2",
    "copy_file_range": "fd", "fsconfig": "fd command", "fsmount": "fd flags", "getdents64": "fd", "getdents": "fd",
    "fstatfs": "fd", "syncfs": "fd", "readahead": "fd", "fadvise64": "fd", "fallocate": "fd", "fgetxattr": "fd",
    "flistxattr": "fd", "fremovexattr": "fd", "preadv": "fd", "preadv2": "fd", "pwritev": "fd", "pwritev2": "fd",
    "recvfrom": "fd", "recvmmsg": "fd", "sendmmsg": "fd", "getsockname": "fd", "getpeername": "fd",
}  # fmt: skip

DESCRIPTOR_CALLS = (
    "read", "write", "pread64", "pwrite64", "readv", "writev", "lseek", "fstat", "ftruncate", "fchmod", "fchown",
    "flock", "fsync", "fdatasync", "dup", "dup2", "dup3", "fchdir", "sendmsg", "recvmsg", "listen", "accept",
    "accept4", "setsockopt", "getsockopt", "shutdown", "fsetxattr", "close", "close_range",
)  # fmt: skip

OPEN_FLAGS = (
    (os.O_CREAT, "O_CREAT"),
    (os.O_TRUNC, "O_TRUNC"),
    (os.O_APPEND, "O_APPEND"),
    (os.O_DIRECTORY, "O_DIRECTORY"),
)

CLONE_FLAGS = (
    (0x80, "CLONE_NEWTIME"), (0x100, "CLONE_VM"), (0x4000, "CLONE_VFORK"), (0x10000, "CLONE_THREAD"),
    (0x20000, "CLONE_NEWNS"), (0x2000000, "CLONE_NEWCGROUP"), (0x4000000, "CLONE_NEWUTS"), (0x8000000, "CLONE_NEWIPC"),
    (0x10000000, "CLONE_NEWUSER"), (0x20000000, "CLONE_NEWPID"), (0x40000000, "CLONE_NEWNET"),
)  # fmt: skip

FCNTL_COMMANDS = {
    # <asm-generic/fcntl.h> and <linux/fcntl.h>; the fcntl module has several names for one number.
    0: "F_DUPFD", 1: "F_GETFD", 2: "F_SETFD", 3: "F_GETFL", 4: "F_SETFL", 5: "F_GETLK", 6: "F_SETLK", 7: "F_SETLKW",
    8: "F_SETOWN", 9: "F_GETOWN", 10: "F_SETSIG", 11: "F_GETSIG", 15: "F_SETOWN_EX", 16: "F_GETOWN_EX",
    36: "F_OFD_GETLK", 37: "F_OFD_SETLK", 38: "F_OFD_SETLKW", 1024: "F_SETLEASE", 1025: "F_GETLEASE", 1026: "F_NOTIFY",
    1030: "F_DUPFD_CLOEXEC", 1031: "F_SETPIPE_SZ", 1032: "F_GETPIPE_SZ", 1033: "F_ADD_SEALS", 1034: "F_GET_SEALS",
}  # fmt: skip

IOCTL_COMMANDS = {
    # Of several names for one number the first: FIONREAD rather than TIOCINQ. Smaller values are no commands.
    value: name
    for name, value in sorted(vars(termios).items(), reverse=True)
    if name.startswith(("T", "FIO")) and isinstance(value, int) and value > 0x5000
}


@dataclass(frozen=True, slots=True)
class Refused:
    """A refused call as the kernel told it: its name, the thread that made it, and six registers.

    `ranges` are the sets of rights of the granted descriptors, by range.
    """

    call: str
    thread: int
    args: tuple[int, ...]
    ranges: tuple[Rights, ...] = ()

    def fd(self, position: int) -> str:
        """A descriptor for people: its number, and its rights when it was granted."""
        number = signed(self.args[position])
        index = (number - filters.FIRST_GRANT) // filters.WIDTH
        if number >= filters.FIRST_GRANT and index < len(self.ranges):
            return f"fd {number} ({self.ranges[index]!r})"
        return f"fd {number}"

    def path(self, position: int) -> str:
        """The text that an argument points at; the address itself when there is none."""
        address = self.args[position]
        text = read_text(self.thread, address)
        return hex(address) if text is None else text


def signed(value: int) -> int:
    """A register as the C int that the kernel takes of it."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def read_text(thread: int, address: int) -> str | None:
    """A NUL-terminated string of the other process, cut after MOST_TEXT bytes; None when it has no such memory."""
    taken = bytearray()
    while len(taken) < MOST_TEXT:
        # Up to the end of a page at a time: the next one may not be there.
        step = min(4096 - (address + len(taken)) % 4096, MOST_TEXT - len(taken))
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


def read_bytes(thread: int, address: int, length: int) -> bytes:
    """Up to 256 bytes of the other process; none when it has no such memory."""
    try:
        return _sys.process_vm_readv(thread, address, min(length, 256)) if length > 0 else b""
    except OSError:
        return b""


def arguments(refused: Refused) -> dict[str, object]:
    """The arguments of a call by name, as far as they say something to a person."""
    decode = DECODERS.get(refused.call)
    if decode is not None:
        return decode(refused)
    if refused.call in PATH_CALLS:
        return _paths(refused)
    names = SIGNATURES.get(refused.call, "").split()
    return {name: _plain(refused, name, position) for position, name in enumerate(names)}


def _plain(refused: Refused, name: str, position: int) -> object:
    if name in ("fd", "fd2", "pidfd", "epfd"):
        return refused.fd(position)
    if name == "flags":
        return hex(refused.args[position] & 0xFFFFFFFF)
    return signed(refused.args[position])


def _paths(refused: Refused) -> dict[str, object]:
    directory, index, flags = PATH_CALLS[refused.call]
    found: dict[str, object] = {}
    if directory is not None and signed(refused.args[directory]) != AT_FDCWD:
        found["directory"] = refused.fd(directory)
    found["path"] = refused.path(index)
    if flags is not None:
        found["flags"] = _open_flags(refused.args[flags])
    if refused.call in SECOND_PATHS:
        directory, index = SECOND_PATHS[refused.call]
        if directory is not None and signed(refused.args[directory]) != AT_FDCWD:
            found["to_directory"] = refused.fd(directory)
        found["to"] = refused.path(index)
    return found


def _open_flags(value: int) -> str:
    access = {os.O_RDONLY: "O_RDONLY", os.O_WRONLY: "O_WRONLY"}.get(value & os.O_ACCMODE, "O_RDWR")
    return "|".join([access, *(name for bit, name in OPEN_FLAGS if value & bit == bit)])


def _flag_names(known: tuple[tuple[int, str], ...], value: int) -> str:
    return "|".join(name for bit, name in known if value & bit)


def _constant(prefix: str, value: int) -> str:
    for name, constant in vars(socket).items():
        if name.startswith(prefix) and isinstance(constant, int) and constant == value:
            return name
    return f"{prefix}{value}"


def _socket(refused: Refused) -> dict[str, object]:
    domain, kind, protocol = refused.args[:3]
    return {
        "domain": _constant("AF_", signed(domain)),
        "type": _constant("SOCK_", kind & 0xF),
        "protocol": signed(protocol),
    }


def _address(position: int) -> Callable[[Refused], dict[str, object]]:
    def decode(refused: Refused) -> dict[str, object]:
        address, length = refused.args[position], signed(refused.args[position + 1])
        raw = read_bytes(refused.thread, address, length) if address else b""
        return {"descriptor": refused.fd(0), "address": _sockaddr(raw)}

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


def _kill(refused: Refused) -> dict[str, object]:
    target, number = (signed(value) for value in refused.args[:2])
    return {"target": f"process {target}", "signal": _signal_name(number)}


def _tgkill(refused: Refused) -> dict[str, object]:
    target, thread, number = (signed(value) for value in refused.args[:3])
    return {"target": f"process {target}", "thread": thread, "signal": _signal_name(number)}


def _descriptor(refused: Refused) -> dict[str, object]:
    return {"descriptor": refused.fd(0)}


def _command(names: dict[int, str]) -> Callable[[Refused], dict[str, object]]:
    def decode(refused: Refused) -> dict[str, object]:
        command = refused.args[1] & 0xFFFFFFFF
        return {"descriptor": refused.fd(0), "command": names.get(command, hex(command))}

    return decode


def _clone(refused: Refused) -> dict[str, object]:
    flags = refused.args[0]
    what = "(a new thread)" if flags & 0x10000 else "(a new process)"
    return {"what": what, "flags": _flag_names(CLONE_FLAGS, flags)}


def _unshare(refused: Refused) -> dict[str, object]:
    return {"flags": _flag_names(CLONE_FLAGS, refused.args[0]) or hex(refused.args[0] & 0xFFFFFFFF)}


def _protection(refused: Refused) -> dict[str, object]:
    shown = _flag_names(((1, "PROT_READ"), (2, "PROT_WRITE"), (4, "PROT_EXEC")), refused.args[2])
    found: dict[str, object] = {}
    if refused.call == "mmap" and not refused.args[3] & filters.MAP_ANONYMOUS:
        found["descriptor"] = refused.fd(4)
    return {**found, "length": refused.args[1], "protection": shown or "PROT_NONE"}


DECODERS: dict[str, Callable[[Refused], dict[str, object]]] = {
    "socket": _socket,
    "socketpair": _socket,
    "connect": _address(1),
    "bind": _address(1),
    "sendto": _address(4),
    "kill": _kill,
    "tkill": _kill,
    "rt_sigqueueinfo": _kill,
    "tgkill": _tgkill,
    "rt_tgsigqueueinfo": _tgkill,
    "fcntl": _command(FCNTL_COMMANDS),
    "ioctl": _command(IOCTL_COMMANDS),
    "mmap": _protection,
    "mprotect": _protection,
    "clone": _clone,
    "unshare": _unshare,
    **dict.fromkeys(DESCRIPTOR_CALLS, _descriptor),
}


# ---- what would allow it ----------------------------------------------------------------------------------------------


LOOKING = ("stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat")
DIRECTORY_CHANGES = (
    "creat", "mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "rename", "renameat", "renameat2", "symlink", "symlinkat",
)  # fmt: skip
TIMES = ("utime", "utimes", "utimensat", "futimesat")
OUTSIDE = "or open it outside and pass it as an argument"
PRELOAD_SOME = "load the library before, with Policy(preload=[...])"

NEEDS = {
    "write": "CAP_WRITE", "writev": "CAP_WRITE", "pwrite64": "CAP_PWRITE", "read": "CAP_READ", "readv": "CAP_READ",
    "pread64": "CAP_PREAD", "lseek": "CAP_SEEK", "ftruncate": "CAP_FTRUNCATE", "fsync": "CAP_FSYNC", "mmap": "CAP_MMAP_RW",
    "sendto": "CAP_SEND", "recvfrom": "CAP_RECV", "shutdown": "CAP_SHUTDOWN", "fallocate": "CAP_WRITE",
}  # fmt: skip


def suggest(call: str, arguments: dict[str, object], module: str = "", home: str = "") -> str:
    """The line that would allow a call; "" when compart has none.

    `module` is what was being imported, `home` the directory that relative names meant outside. The narrowest grant is
    named; whether the path is there is not looked up, for the name is a stranger's.
    """
    maps_code = "PROT_EXEC" in str(arguments.get("protection", ""))
    if module and (call in ("open", "openat", *LOOKING) or maps_code):
        return f"Policy(preload=[{module!r}])"
    if maps_code:
        return PRELOAD_SOME if "descriptor" in arguments else ""
    if call in ("socket", "connect", "bind"):
        return "connect outside and pass the socket as an argument"
    if call == "memfd_create":
        return "use bytes or a bytearray"
    if call in PATH_CALLS:
        return _suggest_path(call, arguments, home)
    descriptor = str(arguments.get("descriptor", ""))
    if "(" in descriptor and call in NEEDS:
        return f"hand it over with {NEEDS[call]}: open it outside in a mode that has it"
    return ""


def _suggest_path(call: str, arguments: dict[str, object], home: str) -> str:
    path = _meant(arguments, "path", home)
    if not path:
        return ""
    if call in ("open", "openat"):
        return _suggest_open(path, str(arguments.get("flags", "")))
    if call in LOOKING:
        return f"grant.file({path!r}, 'r'), or grant.directory({path!r}, 'r') for a directory"
    if call in DIRECTORY_CHANGES:
        parents = [os.path.dirname(path.rstrip("/"))]
        if call.startswith("rename"):
            to = _meant(arguments, "to", home)
            parents.append(os.path.dirname(to.rstrip("/")))
        if not all(parent.strip("/") for parent in parents):
            return ""
        return ", ".join(f"grant.directory({parent!r}, 'rw')" for parent in dict.fromkeys(parents))
    if call == "chdir":
        return f"grant.directory({path!r}, 'r')"
    if call == "truncate" or call in TIMES:
        return f"grant.file({path!r}, 'rw')"
    return ""


def _suggest_open(path: str, flags: str) -> str:
    writes = "O_WRONLY" in flags or "O_RDWR" in flags
    if "O_DIRECTORY" in flags:
        # With writing it is O_TMPFILE: a file without a name in that directory.
        return f"grant.directory({path!r}, {'rw' if writes else 'r'!r})"
    if "O_CREAT" in flags:
        parent = os.path.dirname(path)
        return f"grant.directory({parent!r}, 'rw'), {OUTSIDE}" if parent.strip("/") else ""
    return f"grant.file({path!r}, {'rw' if writes else 'r'!r}), {OUTSIDE}"


def _meant(arguments: dict[str, object], key: str, home: str) -> str:
    """The absolute path that a name meant outside; "" when it meant none, or none that should be granted."""
    held = "directory" if key == "path" else "to_directory"
    text = str(arguments.get(key, ""))
    if not text or ADDRESS.fullmatch(text) or len(text.encode(errors="replace")) > MOST_TEXT:
        return ""
    if not text.startswith("/"):
        if held in arguments or not home:
            return ""
        text = os.path.join(home, text)
    # Outside, /proc/self is the host itself.
    return "" if not text.strip("/") or OWN_PROC.match(text) else text


ADDRESS = re.compile(r"0x[0-9a-f]+")
OWN_PROC = re.compile(r"/+proc/+(self|thread-self|\d+)(/|$)")
