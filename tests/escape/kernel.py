"""Surface "kernel": interfaces for the machine's owner, and the other doors into the kernel.

What would hurt the machine gets arguments that the kernel refuses as invalid: outside its errno shows that the call
reached it, and inside EPERM shows that it did not. A call that this kernel was built without answers ENOSYS.
"""

import ctypes
import errno
import os
import signal
import struct
from typing import Any

from tests.escape import native
from tests.escape.framework import Unavailable, World, attempt, dies_by, raw, reaches

_BUFFER = ctypes.create_string_buffer(4096)
NOT_BUILT = errno.ENOSYS


def _owner(call: str, *arguments: Any, errnos: tuple[int, ...] = (), name: str = "", privileged: bool = True) -> None:
    raw(
        call,
        lambda w: arguments,
        surface="kernel",
        name=name,
        privileged=privileged,
        outside=reaches(NOT_BUILT, *errnos),
    )


def _anyone(call: str, *arguments: Any, errnos: tuple[int, ...] = (), name: str = "") -> None:
    _owner(call, *arguments, errnos=errnos, name=name, privileged=False)


# -- calls that act behind the filter ----------------------------------------------------------------------------------

_anyone("io_uring_setup", 1, ctypes.create_string_buffer(120))
_anyone("io_uring_enter", -1, 0, 0, 0, None, 0, errnos=(errno.EBADF, errno.EINVAL))
_anyone("io_uring_register", -1, 0, None, 0, errnos=(errno.EBADF, errno.EINVAL))
_anyone("io_setup", 1, ctypes.create_string_buffer(8))
_anyone("io_submit", 0, 1, None, errnos=(errno.EINVAL, errno.EFAULT))
_anyone("io_getevents", 0, 0, 0, None, None, errnos=(errno.EINVAL,))
_anyone("io_pgetevents", 0, 0, 0, None, None, None, errnos=(errno.EINVAL,))
_anyone("io_destroy", 0, errnos=(errno.EINVAL,))
_owner("bpf", 0, struct.pack("IIIII", 2, 4, 4, 1, 0).ljust(72, b"\0"), 72, name="makes_a_bpf_map")
_owner("bpf", 9999, _BUFFER, 72, errnos=(errno.EINVAL,))
_owner("perf_event_open", ctypes.create_string_buffer(128), 0, -1, -1, 0, errnos=(errno.EINVAL, errno.ENOENT))
_owner("kexec_load", 0, 99, None, 0, errnos=(errno.EINVAL,))
_owner("kexec_file_load", -1, -1, 0, None, 0xFFFF, errnos=(errno.EINVAL, errno.EBADF))
_owner("init_module", None, 0, None, errnos=(errno.EFAULT, errno.ENOEXEC))
_owner("finit_module", -1, b"", 0, errnos=(errno.EBADF, errno.EINVAL))
_owner("delete_module", b"no_such_module", 0, errnos=(errno.ENOENT,))

# -- the machine -------------------------------------------------------------------------------------------------------

_owner("reboot", 0x0BAD, 0x0BAD, 0, 0, errnos=(errno.EINVAL,))
_owner("sethostname", b"", -1, errnos=(errno.EINVAL,))
_owner("setdomainname", b"", -1, errnos=(errno.EINVAL,))
_owner("settimeofday", struct.pack("qq", 0, 9_999_999_999), None, errnos=(errno.EINVAL,))
_owner("clock_settime", 0, struct.pack("qq", 0, 9_999_999_999), errnos=(errno.EINVAL,))
_anyone("adjtimex", ctypes.create_string_buffer(208))
_anyone("clock_adjtime", 0, ctypes.create_string_buffer(208))
_owner("syslog", 10, None, 0)
_owner("syslog", 3, _BUFFER, 16, name="reads_the_kernel_log")
_owner("iopl", 7, errnos=(errno.EINVAL,))
_owner("ioperm", 0xFFFFFFFF, 1, 1, errnos=(errno.EINVAL,))
_anyone("modify_ldt", 0, _BUFFER, 16)
_anyone("lookup_dcookie", 0, _BUFFER, 16, errnos=(errno.EINVAL,))
_anyone("set_thread_area", _BUFFER, errnos=(errno.EINVAL,))
_anyone("get_thread_area", _BUFFER, errnos=(errno.EINVAL,))
_anyone("nfsservctl")
_anyone("sync")
_anyone("lsm_get_self_attr", 100, None, struct.pack("I", 0), 0, errnos=(errno.EOPNOTSUPP, errno.EINVAL))
_anyone("lsm_set_self_attr", 100, _BUFFER, 0, 0, errnos=(errno.EINVAL, errno.EOPNOTSUPP))
_anyone("lsm_list_modules", _BUFFER, struct.pack("I", 4096), 0)
_anyone("mseal", 0, 0, 0)
_anyone("set_mempolicy_home_node", 0, 0, 0, 0, errnos=(errno.EINVAL,))
_anyone("readahead", 0, 0, 0, errnos=(errno.EINVAL,), name="reads_ahead_of_what_is_no_file")

raw(
    "arch_prctl",
    lambda w: (0x1011, 0),  # ARCH_GET_CPUID
    surface="kernel",
    # Probed by libraries that go without: refused, and not told.
    refused_with=(PermissionError, errno.ENOSYS),
    outside=reaches(errno.ENODEV),
)
for _call in (
    "_sysctl",
    "create_module",
    "get_kernel_syms",
    "query_module",
    "getpmsg",
    "putpmsg",
    "afs_syscall",
    "tuxcall",
    "security",
    "epoll_ctl_old",
    "epoll_wait_old",
    "vserver",
):
    _anyone(_call)

# -- mounts by their newer calls ---------------------------------------------------------------------------------------

_owner("fsopen", b"tmpfs", 0)
_owner("fsmount", -1, 0, 0, errnos=(errno.EBADF,))
_owner("fsconfig", -1, 0, None, None, 0, errnos=(errno.EINVAL, errno.EBADF))
_owner("fspick", -100, b"/", 0)
_owner("open_tree", -100, b"/", 1)
_anyone("open_tree", -100, b"/", 0, name="raw_open_tree_of_a_path")
_owner("open_tree_attr", -100, b"/", 1, None, 0)
_owner("move_mount", -1, b"", -1, b"", 0, errnos=(errno.EBADF, errno.ENOENT))
_owner("mount_setattr", -1, b"", 0x1000, _BUFFER, 32, errnos=(errno.EBADF, errno.EINVAL))
_STATMOUNT = struct.pack("IIQQ", 24, 0, 0, 0)
_owner("statmount", _STATMOUNT, _BUFFER, 512, 0, errnos=(errno.ENOENT, errno.EINVAL))
_anyone("listmount", struct.pack("IIQQ", 24, 0, 2**64 - 1, 0), _BUFFER, 4, 0)

# -- the walls themselves ----------------------------------------------------------------------------------------------

_ALLOW_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000), 8)
_PROGRAM = struct.pack("HxxxxxxQ", 1, ctypes.addressof(_ALLOW_ALL))


def _takes_a_filter(name: str, flags: int) -> None:
    @attempt(
        surface="kernel",
        name=name,
        refused_with=PermissionError,
        call=("seccomp", "prctl"),
        proof=lambda world, answer: answer >= 0,
    )
    def takes(outside: World) -> int:
        native.call("prctl", 38, 1, 0, 0, 0)
        return native.call("seccomp", 1, flags, _PROGRAM)


_takes_a_filter("takes_another_filter", 0)
# A second listener would answer in place of the host's.
_takes_a_filter("takes_a_filter_with_a_listener", 8)
_takes_a_filter("takes_a_filter_for_all_threads", 1)
_anyone("seccomp", 2, 0, struct.pack("I", 0x7FFF0000), name="asks_about_an_action")
_anyone("seccomp", 3, 0, _BUFFER, name="asks_for_the_sizes_of_notifications")
_anyone("landlock_create_ruleset", None, 0, 1, errnos=(errno.EOPNOTSUPP,), name="asks_for_the_version_of_landlock")
_anyone("landlock_create_ruleset", struct.pack("QQQ", 1, 0, 0), 24, 0, errnos=(errno.EOPNOTSUPP,))
_anyone("landlock_add_rule", -1, 1, _BUFFER, 0, errnos=(errno.EBADF, errno.EOPNOTSUPP))
_owner("landlock_restrict_self", -1, 0, errnos=(errno.EBADF, errno.EOPNOTSUPP))

# -- the other doors ---------------------------------------------------------------------------------------------------

X32 = 0x40000000
_NO_X32 = reaches(errno.ENOSYS)


def _by_number(name: str, number: int, *arguments: Any, call: tuple[str, ...] = (), outside: Any = _NO_X32) -> None:
    @attempt(surface="kernel", name=name, refused_with=PermissionError, outside=outside, call=call)
    def issues(outside: World) -> int:
        return native.checked(native.syscall(number, *arguments))


_by_number("getpid_by_its_x32_number", X32 + 39)
_by_number("open_by_its_x32_number", X32 + 2, b"/etc/passwd", 0)
_by_number("readv_by_its_x32_number", X32 + 515, 0, 0, 0)
_by_number("execve_by_its_x32_number", X32 + 520, b"/nowhere", 0, 0)
_by_number("execve_by_its_bare_x32_number", 520, b"/nowhere", 0, 0)
_by_number("a_number_between_the_tables", 400)
_by_number("a_number_beyond_the_table", 600)
_by_number("a_number_far_beyond_the_table", 0x3FFFFFFF)
_by_number("a_negative_number", -2)
_by_number(
    "a_number_with_garbage_above",
    (1 << 32) | 2,
    b"/etc/passwd",
    0,
    outside=reaches(errno.ENOSYS, errno.ENOENT),
    call=(),
)


def _no_i386() -> bool:
    pid = os.fork()
    if pid == 0:
        native.int80(20)
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0


def _without_i386() -> bool:
    global _i386_is_missing
    if _i386_is_missing is None:
        _i386_is_missing = _no_i386()
    return _i386_is_missing


_i386_is_missing: bool | None = None


def _int80(name: str, number: int, *arguments: int, proof: Any, **options: Any) -> None:
    missing = Unavailable("this kernel has no i386 entry", _without_i386) if _without_i386() else None
    options.setdefault("outside", missing)

    @attempt(
        surface="kernel",
        name=f"int80_{name}",
        refused_with=(PermissionError, dies_by(signal.SIGSEGV)) if missing else PermissionError,
        proof=proof,
        **options,
    )
    def issues(outside: World) -> int:
        return native.checked(native.int80(number, *arguments))


_int80("getpid", 20, proof=lambda world, pid: pid > 0)
_int80("socketcall", 102, 1, 0, proof=None, outside=None if _without_i386() else reaches(errno.EFAULT))
_int80("open", 5, 0, 0, proof=None, outside=None if _without_i386() else reaches(errno.EFAULT))
_int80("kill", 37, 0, 0, proof=lambda world, answer: answer == 0)
_int80("mmap2", 192, 0, 4096, 7, 0x22, -1, proof=lambda world, address: address != 0)
# 11 is execve here and munmap in the 64-bit table: the number alone says nothing.
_int80("execve", 11, 0, 0, 0, proof=None, outside=None if _without_i386() else reaches(errno.EFAULT))
