"""Surface "ipc": System V and POSIX names, key rings: namespaces beside the file system."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory
from typing import Any

from tests.escape import native
from tests.escape.framework import World, attempt, raw, reaches

IPC_CREAT, IPC_RMID, IPC_STAT = 0o1000, 0, 2
_BUFFER = ctypes.create_string_buffer(256)


def _segment(world: World) -> Iterator[None]:
    world.segment = native.call("shmget", 0, 4096, IPC_CREAT | 0o600)
    world.address = native.call("shmat", world.segment, 0, 0)
    ctypes.memmove(world.address, world.token, len(world.token))
    yield
    native.call("shmdt", world.address)
    native.call("shmctl", world.segment, IPC_RMID, None)


def _semaphore(world: World) -> Iterator[None]:
    world.semaphore = native.call("semget", 0, 1, IPC_CREAT | 0o600)
    yield
    native.call("semctl", world.semaphore, 0, IPC_RMID, 0)


def _raised(world: World) -> bool:
    return native.call("semctl", world.semaphore, 0, 12, 0) == 1  # GETVAL


def _queue(world: World) -> Iterator[None]:
    world.queue = native.call("msgget", 0, IPC_CREAT | 0o600)
    native.call("msgsnd", world.queue, struct.pack("q", 1) + world.token, len(world.token), 0)
    yield
    native.call("msgctl", world.queue, IPC_RMID, None)


raw(
    "shmget",
    lambda w: (int(w.token[:7], 16), 4096, 0),
    surface="ipc",
    name="looks_for_a_segment",
    outside=reaches(errno.ENOENT),
)


@attempt(surface="ipc", refused_with=PermissionError, call="shmget", proof=lambda world, answer: answer == 0)
def makes_a_segment(outside: World) -> int:
    return native.call("shmctl", native.call("shmget", 0, 4096, IPC_CREAT | 0o600), IPC_RMID, None)


@attempt(surface="ipc", refused_with=PermissionError, call="shmat", arrange=_segment)
def reads_a_segment_of_the_host(outside: World) -> bytes:
    return ctypes.string_at(native.call("shmat", outside.segment, 0, 0), len(outside.token))


raw("shmctl", lambda w: (w.segment, IPC_STAT, _BUFFER), surface="ipc", arrange=_segment, name="asks_about_a_segment")


@attempt(surface="ipc", refused_with=PermissionError, call="semget", proof=lambda world, answer: answer == 0)
def makes_a_semaphore(outside: World) -> int:
    return native.call("semctl", native.call("semget", 0, 1, IPC_CREAT | 0o600), 0, IPC_RMID, 0)


raw("semop", lambda w: (w.semaphore, struct.pack("Hhh", 0, 1, 0), 1), surface="ipc", arrange=_semaphore, effect=_raised)
raw(
    "semtimedop",
    lambda w: (w.semaphore, struct.pack("Hhh", 0, 1, 0), 1, None),
    surface="ipc",
    arrange=_semaphore,
    effect=_raised,
)
raw("semctl", lambda w: (w.semaphore, 0, 16, 1), surface="ipc", arrange=_semaphore, effect=_raised)


@attempt(surface="ipc", refused_with=PermissionError, call="msgget", proof=lambda world, answer: answer == 0)
def makes_a_queue(outside: World) -> int:
    return native.call("msgctl", native.call("msgget", 0, IPC_CREAT | 0o600), IPC_RMID, None)


@attempt(surface="ipc", refused_with=PermissionError, call="msgrcv", arrange=_queue)
def receives_a_message_of_the_host(outside: World) -> bytes:
    message = ctypes.create_string_buffer(100)
    length = native.call("msgrcv", outside.queue, message, 92, 0, 0o4000)
    return message.raw[8 : 8 + length]


raw("msgsnd", lambda w: (w.queue, struct.pack("q", 1) + b"x", 1, 0o4000), surface="ipc", arrange=_queue)
raw("msgctl", lambda w: (w.queue, IPC_STAT, _BUFFER), surface="ipc", arrange=_queue)


@attempt(surface="ipc", refused_with=PermissionError, call="mq_open", proof=lambda world, answer: answer == 0)
def makes_a_named_queue(outside: World) -> int:
    native.call("mq_open", outside.token, os.O_CREAT | os.O_RDWR, 0o600, None)
    return native.call("mq_unlink", outside.token)


raw("mq_open", lambda w: (w.token, os.O_RDWR, 0, None), surface="ipc", outside=reaches(errno.ENOENT))
raw("mq_unlink", lambda w: (w.token,), surface="ipc", outside=reaches(errno.ENOENT))
raw("mq_timedsend", lambda w: (0, b"x", 1, 0, None), surface="ipc", outside=reaches(errno.EBADF))
raw("mq_timedreceive", lambda w: (0, _BUFFER, 256, None, None), surface="ipc", outside=reaches(errno.EBADF))
raw("mq_notify", lambda w: (0, None), surface="ipc", outside=reaches(errno.EBADF))
raw("mq_getsetattr", lambda w: (0, None, _BUFFER), surface="ipc", outside=reaches(errno.EBADF))


def _key(world: World) -> Iterator[None]:
    """A key of the host's user, that its children possess through the session or the user's ring."""
    native.syscall(native.NUMBERS["keyctl"], 1, None)  # KEYCTL_JOIN_SESSION_KEYRING: a new one
    world.key = native.call("add_key", b"user", world.token[:8], world.token, len(world.token), -3)
    yield
    native.call("keyctl", 9, world.key, -3)  # KEYCTL_UNLINK


@attempt(surface="ipc", refused_with=PermissionError, call="keyctl", arrange=_key)
def reads_a_key_of_the_host(outside: World) -> bytes:
    value = ctypes.create_string_buffer(100)
    length = native.call("keyctl", 11, outside.key, value, 100)
    return value.raw[:length]


@attempt(surface="ipc", refused_with=PermissionError, call="request_key", arrange=_key)
def finds_a_key_of_the_host(outside: World) -> bytes:
    value = ctypes.create_string_buffer(100)
    key = native.call("request_key", b"user", outside.token[:8], None, 0)
    length = native.call("keyctl", 11, key, value, 100)
    return value.raw[:length]


raw("add_key", lambda w: (b"user", w.token[:8], b"x", 1, -1), surface="ipc")  # the thread's own ring
raw("keyctl", lambda w: (0, -3, 0), surface="ipc", name="asks_for_its_session_ring")
raw("keyctl", lambda w: (1, None), surface="ipc", name="joins_a_new_session_ring")


def _named_block(world: World) -> Iterator[None]:
    block = shared_memory.SharedMemory(create=True, size=4096)
    assert block.buf is not None
    block.buf[: len(world.token)] = world.token
    world.block = block.name
    yield
    block.close()
    block.unlink()
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@attempt(surface="ipc", refused_with=PermissionError, call="openat", arrange=_named_block)
def opens_shared_memory_by_name(outside: World) -> bytes:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.shm_open(b"/" + outside.block.encode(), os.O_RDONLY, 0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "shm_open")
    return os.read(descriptor, len(outside.token))


@attempt(surface="ipc", refused_with=PermissionError, call="openat", proof=lambda world, found: found)
def makes_a_named_semaphore(outside: World) -> bool:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.sem_open.restype = ctypes.c_void_p
    name = b"/" + outside.token
    if not libc.sem_open(name, os.O_CREAT, 0o600, 1):
        raise OSError(ctypes.get_errno(), "sem_open")
    return libc.sem_unlink(name) == 0
