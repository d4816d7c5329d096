"""Surface "procfs": /proc, /sys and /dev, by which a process looks at itself, at others and at the machine."""

import errno
import os
from typing import Any

from tests.escape.framework import World, attempt, reaches

_READABLE = (
    "/proc/self/environ",
    "/proc/self/maps",
    "/proc/self/status",
    "/proc/self/mountinfo",
    "/proc/self/cmdline",
    "/proc/self/stat",
    "/proc/self/auxv",
    "/proc/self/limits",
    "/proc/self/cgroup",
    "/proc/thread-self/stat",
    "/proc/{host}/environ",
    "/proc/{host}/maps",
    "/proc/{host}/cmdline",
    "/proc/{host}/task/{host}/stat",
    "/proc/{host}/root{secret}",
    "/proc/{host}/cwd/../../../../../../../..{secret}",
    "/proc/self/root{secret}",
    "/proc/self/cwd/../../../../../../../..{secret}",
    "/proc/1/status",
    "/proc/version",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/net/tcp",
    "/proc/net/unix",
    "/proc/mounts",
    "/proc/kallsyms",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/random/boot_id",
    "/proc/sys/vm/overcommit_memory",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/possible",
    "/proc/stat",
    "/dev/zero",
    "/dev/urandom",
    "/dev/random",
    "/etc/passwd",
    "/etc/hosts",
)


# The C library asks these by itself and does without: refused like the rest, and not worth a violation.
_ASKED_BY_LIBC = (
    "/proc/stat",
    "/proc/self/stat",
    "/proc/sys/vm/overcommit_memory",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/possible",
)


def _title(path: str) -> str:
    return "_".join(part for part in path.replace("{", "").replace("}", "").replace("..", "").split("/") if part)


def _reads(path: str) -> None:
    @attempt(
        surface="procfs",
        name=f"reads_{_title(path)}",
        refused_with=PermissionError,
        proof=lambda w, n: n > 0,
        call=() if path in _ASKED_BY_LIBC else "openat",
    )
    def reads(outside: World) -> int:
        descriptor = os.open(path.format(host=outside.host, secret=outside.secret), os.O_RDONLY)
        try:
            return len(os.read(descriptor, 64))
        finally:
            os.close(descriptor)


for _path in _READABLE:
    _reads(_path)


def _opens(path: str, flags: int, name: str, **options: Any) -> None:
    @attempt(
        surface="procfs", name=name, refused_with=PermissionError, call="openat", proof=lambda w, n: n >= 0, **options
    )
    def opens(outside: World) -> int:
        return os.open(path.format(host=outside.host), flags)


_opens("/proc/self/mem", os.O_RDWR, "opens_its_own_memory")
_opens("/proc/{host}/mem", os.O_RDWR, "opens_the_memory_of_the_host")
_opens("/proc/{host}/fd", os.O_RDONLY | os.O_DIRECTORY, "opens_the_descriptors_of_the_host")
_opens("/proc/{host}/ns/user", os.O_RDONLY, "opens_a_namespace_of_the_host")
_opens("/proc/{host}", os.O_RDONLY | os.O_DIRECTORY, "opens_the_process_of_the_host")
_opens("/proc/self/oom_score_adj", os.O_RDWR, "opens_its_oom_score")
_opens("/proc/self/coredump_filter", os.O_RDWR, "opens_its_core_filter")
_opens("/proc/self/clear_refs", os.O_WRONLY, "opens_its_references")
_opens("/proc/self/uid_map", os.O_RDWR, "opens_its_user_map")
_opens("/proc/self/exe", os.O_RDONLY, "opens_its_program")
_opens("/proc/self/ns/net", os.O_RDONLY, "opens_its_network_namespace")
_opens("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY, "opens_its_descriptors")
_opens("/proc/self/fd/0", os.O_RDONLY, "opens_its_standard_input_again")
_opens("/dev/null", os.O_RDWR, "opens_dev_null")
_opens("/dev/shm", os.O_RDONLY | os.O_DIRECTORY, "opens_dev_shm")
_opens("/dev/ptmx", os.O_RDWR | os.O_NOCTTY, "opens_a_terminal")
_opens("/proc/sys/kernel/hostname", os.O_WRONLY, "opens_the_host_name_for_writing", privileged=True)
_opens("/proc/sys/kernel/core_pattern", os.O_WRONLY, "opens_the_core_pattern_for_writing", privileged=True)
_opens(
    "/proc/sysrq-trigger", os.O_WRONLY, "opens_the_trigger", privileged=True, outside=reaches(errno.ENOENT, errno.EROFS)
)
_opens("/dev/kmsg", os.O_RDONLY, "opens_the_kernel_log", privileged=True)


@attempt(
    surface="procfs", refused_with=PermissionError, call="openat", proof=lambda world, pids: str(world.host) in pids
)
def lists_the_processes(outside: World) -> list[str]:
    return [name for name in os.listdir("/proc") if name.isdigit()]


@attempt(
    surface="procfs",
    refused_with=PermissionError,
    call=("readlink", "readlinkat"),
    proof=lambda world, path: path == os.getcwd(),
)
def reads_where_the_host_stands(outside: World) -> str:
    return os.readlink(f"/proc/{outside.host}/cwd")


@attempt(
    surface="procfs",
    refused_with=PermissionError,
    call=("readlink", "readlinkat"),
    proof=lambda world, path: bool(path),
)
def reads_the_name_of_its_standard_input(outside: World) -> str:
    return os.readlink("/proc/self/fd/0")


def _host_holds_the_secret(world: World) -> Any:
    world.descriptor = os.open(world.secret, os.O_RDONLY)
    yield
    os.close(world.descriptor)


@attempt(surface="procfs", refused_with=PermissionError, call="openat", arrange=_host_holds_the_secret)
def opens_a_descriptor_of_the_host_again(outside: World) -> bytes:
    with open(f"/proc/{outside.host}/fd/{outside.descriptor}", "rb") as file:
        return file.read()
