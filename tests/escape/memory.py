"""Surface "memory": executable memory, memory of the host, and more memory than the limits allow."""

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from typing import Any

from tests.escape import native
from tests.escape.framework import CONTAINED, World, attempt, dies_by, raw, reaches

READ, WRITE, EXEC = mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_EXEC
PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

# mov eax, 42; ret
CODE = bytes.fromhex("b82a000000c3")


def _run(address: int) -> int:
    """Jump there."""
    return ctypes.CFUNCTYPE(ctypes.c_int)(address)()


def _ran(world: World, answer: int) -> bool:
    return answer == 42


# -- code of its own ---------------------------------------------------------------------------------------------------


def _maps_code(name: str, flags: int, protection: int = READ | WRITE | EXEC) -> None:
    @attempt(surface="memory", name=name, refused_with=PermissionError, call="mmap", proof=_ran)
    def maps(outside: World) -> int:
        address = native.call("mmap", 0, 4096, protection, flags, -1, 0)
        ctypes.memmove(address, CODE, len(CODE))
        return _run(address)


_maps_code("maps_code", PRIVATE_ANONYMOUS)
_maps_code("maps_shared_code", mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
_maps_code("maps_code_that_may_not_be_read", PRIVATE_ANONYMOUS, WRITE | EXEC)
_maps_code("maps_code_with_garbage_above_the_protection", PRIVATE_ANONYMOUS, (1 << 32) | READ | WRITE | EXEC)


def _makes_executable(name: str, call: str, *more: int) -> None:
    @attempt(surface="memory", name=name, refused_with=PermissionError, call=call, proof=_ran)
    def makes(outside: World) -> int:
        address = native.call("mmap", 0, 4096, READ | WRITE, PRIVATE_ANONYMOUS, -1, 0)
        ctypes.memmove(address, CODE, len(CODE))
        native.call(call, address, 4096, READ | EXEC, *more)
        return _run(address)


_makes_executable("makes_memory_executable", "mprotect")
_makes_executable("makes_memory_executable_by_a_key", "pkey_mprotect", -1)


@attempt(surface="memory", refused_with=PermissionError, call="mprotect", proof=_ran)
def makes_its_code_writable(outside: World) -> int:
    page = native.code_address()
    native.call("mprotect", page, 4096, READ | WRITE | EXEC)
    ctypes.memmove(page + 2048, CODE, len(CODE))
    return _run(page + 2048)


def _file_of_code(world: World) -> tuple[Any, ...]:
    program = world.directory / "code"
    program.write_bytes(CODE)
    return (open(program, "rb"),)


@attempt(surface="memory", refused_with=PermissionError, call="mmap", gives=_file_of_code, proof=_ran)
def maps_an_input_file_as_code(outside: World, file: Any) -> int:
    return _run(native.call("mmap", 0, 4096, READ | EXEC, mmap.MAP_PRIVATE, file.fileno(), 0))


@attempt(surface="memory", refused_with=PermissionError, call="mprotect", gives=_file_of_code, proof=_ran)
def makes_a_mapped_input_file_executable(outside: World, file: Any) -> int:
    address = native.call("mmap", 0, 4096, READ, mmap.MAP_PRIVATE, file.fileno(), 0)
    native.call("mprotect", address, 4096, READ | EXEC)
    return _run(address)


@attempt(surface="memory", refused_with=PermissionError, call="memfd_create", proof=_ran)
def maps_code_from_a_nameless_file(outside: World) -> int:
    descriptor = native.call("memfd_create", b"code", 0)
    os.write(descriptor, CODE)
    return _run(native.call("mmap", 0, 4096, READ | EXEC, mmap.MAP_SHARED, descriptor, 0))


raw("memfd_create", lambda w: (b"x", 0), surface="memory")
raw("memfd_secret", lambda w: (0,), surface="memory", outside=reaches(errno.ENOSYS))
raw("userfaultfd", lambda w: (0,), surface="memory", privileged=True)
raw("userfaultfd", lambda w: (1,), surface="memory", name="raw_userfaultfd_of_user_mode", outside=reaches(errno.EINVAL))
raw("remap_file_pages", lambda w: (0, 0, 0, 0, 0), surface="memory", outside=reaches(errno.EINVAL))
raw(
    "map_shadow_stack",
    lambda w: (0, 4096, 0),
    surface="memory",
    outside=reaches(errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL),
)
raw("pkey_alloc", lambda w: (0, 0), surface="memory", outside=reaches(errno.ENOSPC, errno.EINVAL))
raw("mlockall", lambda w: (4,), surface="memory", outside=reaches(errno.EINVAL))


@attempt(
    surface="memory",
    refused_with=(PermissionError, errno.ENOMEM, errno.EAGAIN),
    proof=lambda world, answer: answer == 0,
)
def locks_memory(outside: World) -> int:
    size = 1 << 20
    return native.call("mlock", native.call("mmap", 0, size, READ | WRITE, PRIVATE_ANONYMOUS, -1, 0), size)


@attempt(
    surface="memory",
    refused_with=(PermissionError, errno.EAGAIN, errno.ENOMEM),
    proof=lambda world, address: address > 0,
)
def maps_locked_memory(outside: World) -> int:
    return native.call("mmap", 0, 1 << 20, READ | WRITE, PRIVATE_ANONYMOUS | 0x2000, -1, 0)


@attempt(
    surface="memory", refused_with=errno.ENOMEM, policy={"memory": "64M"}, proof=lambda world, address: address > 0
)
def maps_more_than_its_limit(outside: World) -> int:
    return native.call("mmap", 0, 256 << 20, READ | WRITE, PRIVATE_ANONYMOUS, -1, 0)


@attempt(
    surface="memory", refused_with=errno.ENOMEM, policy={"memory": "64M"}, proof=lambda world, address: address > 0
)
def maps_more_than_its_limit_without_reserving(outside: World) -> int:
    return native.call("mmap", 0, 256 << 20, 0, PRIVATE_ANONYMOUS | 0x4000, -1, 0)


@attempt(
    surface="memory", refused_with=errno.ENOMEM, policy={"memory": "64M"}, proof=lambda world, address: address > 0
)
def grows_a_mapping_beyond_its_limit(outside: World) -> int:
    address = native.call("mmap", 0, 4096, READ | WRITE, PRIVATE_ANONYMOUS, -1, 0)
    return native.call("mremap", address, 4096, 256 << 20, 1)


@attempt(
    surface="memory", refused_with=MemoryError, policy={"memory": "64M"}, proof=lambda world, size: size == 256 << 20
)
def allocates_more_than_its_limit(outside: World) -> int:
    return len(bytearray(256 << 20))


# -- memory that the host shares ---------------------------------------------------------------------------------------
# A fork inherits shared mappings. Nothing was handed over by that: they must not be there, or not be the host's.


def _shared_anonymous(world: World) -> Iterator[None]:
    with mmap.mmap(-1, mmap.PAGESIZE) as mapping:
        yield from _as_target(world, mapping)


def _shared_file(world: World) -> Iterator[None]:
    path = world.directory / "mapped"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        yield from _as_target(world, mapping)


def _as_target(world: World, mapping: Any) -> Iterator[None]:
    mapping[: len(world.token)] = world.token
    pointer = ctypes.c_char.from_buffer(mapping)
    world.mapping, world.address = mapping, ctypes.addressof(pointer)
    yield
    del pointer


def _shared_block(world: World) -> Iterator[None]:
    block = shared_memory.SharedMemory(create=True, size=mmap.PAGESIZE)
    assert block.buf is not None
    pointer = ctypes.c_char.from_buffer(block.buf)
    block.buf[: len(world.token)] = world.token
    world.mapping, world.address = block.buf, ctypes.addressof(pointer)
    yield
    del pointer, world.mapping
    block.close()
    block.unlink()
    # Its tracker is a process that pytest would keep for nothing.
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


def _was_written(world: World) -> bool:
    return bytes(world.mapping[:7]) == b"changed"


for _arrange, _name in (
    (_shared_anonymous, "an_anonymous_mapping"),
    (_shared_file, "a_mapped_file"),
    (_shared_block, "a_shared_block"),
):

    @attempt(
        surface="memory",
        name=f"writes_{_name}_of_the_host",
        refused_with=(dies_by(signal.SIGSEGV, signal.SIGBUS), CONTAINED),
        arrange=_arrange,
        effect=_was_written,
    )
    def writes(outside: World) -> None:
        ctypes.memmove(outside.address, b"changed", 7)

    @attempt(
        surface="memory",
        name=f"makes_{_name}_of_the_host_writable",
        arrange=_arrange,
        effect=_was_written,
        refused_with=(dies_by(signal.SIGSEGV, signal.SIGBUS), errno.ENOMEM, errno.EACCES, CONTAINED),
    )
    def makes_writable(outside: World) -> None:
        native.call("mprotect", outside.address & ~4095, 4096, READ | WRITE)
        ctypes.memmove(outside.address, b"changed", 7)

    @attempt(
        surface="memory",
        name=f"moves_{_name}_of_the_host",
        arrange=_arrange,
        effect=_was_written,
        refused_with=(dies_by(signal.SIGSEGV, signal.SIGBUS), errno.EFAULT, errno.EINVAL, CONTAINED),
    )
    def moves(outside: World) -> None:
        # With an old size of 0 mremap makes a second mapping of the same shared pages.
        address = native.call("mremap", outside.address & ~4095, 0, 4096, 1)
        ctypes.memmove(address, b"changed", 7)
