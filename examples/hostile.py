"""Parsers that a hostile file has taken over.

A bug in a decoder lets the author of a file run code of their own in the process that decodes it. Each
function here does what such code would do next: it gets the open file that any parser gets, and goes
for something else. Where Python would turn a refusal into an exception, it carries on and tries the next way.

Called through `sandboxed` they run in a compartment. `function.__wrapped__` would do real harm.
"""

import contextlib
import ctypes
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from inputs import Command

from compart import Policy, sandboxed

tight = Policy(timeout=5, cpu=2, memory="128M", open_files=16, result_bytes="1M")


# Reach what was not handed over


@sandboxed(tight)
def read_by_path(file: BinaryIO, path: Path) -> str:
    """Open a file of the host by its name, plainly and through /proc."""
    for where in (path, Path(f"/proc/self/root/{path}")):
        with contextlib.suppress(OSError):
            return where.read_text()
    return ""


@sandboxed(tight)
def look_around(file: BinaryIO, path: Path) -> list[str]:
    """Only look: list the folder, and ask whether a file is there."""
    seen = []
    with contextlib.suppress(OSError):
        seen += os.listdir(path.parent)
    with contextlib.suppress(OSError):
        seen.append(f"{path.name} has {path.stat().st_size} bytes")
    return seen


@sandboxed(tight)
def read_descriptors(file: BinaryIO) -> list[bytes]:
    """Read from whatever the host had open when it forked."""
    found = []
    for descriptor in range(3, 1024):
        with contextlib.suppress(OSError):
            found.append(os.pread(descriptor, 100, 0))
    return found


@sandboxed(tight)
def read_environment(file: BinaryIO) -> list[str]:
    """Take the environment, where programs keep their tokens; Python's copy and the C library's."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    return [f"{name}={value}" for name, value in os.environ.items()] + [str(getenv(b"DEMO_SECRET"))]


@sandboxed(tight)
def overwrite_input(file: BinaryIO) -> None:
    """Write over the file that was only to be read: through its descriptor, and by opening it again."""
    attempts = (
        lambda: os.pwrite(file.fileno(), b"mine now", 0),
        lambda: os.ftruncate(file.fileno(), 0),
        lambda: Path(f"/proc/self/fd/{file.fileno()}").write_bytes(b"mine now"),
        lambda: Path(str(file.name)).write_bytes(b"mine now"),
    )
    for attempt in attempts:
        with contextlib.suppress(OSError):
            attempt()


@sandboxed(tight)
def plant_a_file(file: BinaryIO, path: Path) -> None:
    """Leave a file for the host to find."""
    with contextlib.suppress(OSError):
        path.write_text("run me")


@sandboxed(tight)
def connect(file: BinaryIO, port: int) -> None:
    """Talk to a service of the host."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as service:
        service.sendall(b"drop table users")


@sandboxed(tight)
def signal_host(file: BinaryIO, host: int) -> None:
    """Signal the program that called. USR1 and not KILL, so that it lives to tell."""
    with contextlib.suppress(OSError):
        os.kill(host, signal.SIGUSR1)
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(os.pidfd_open(host), signal.SIGUSR1)


# Live on


@sandboxed(tight)
def fork(file: BinaryIO, marker: Path) -> None:
    """Leave a process behind."""
    with contextlib.suppress(OSError):
        _forked_child_marks(marker)


@sandboxed(tight)
def fork_often(file: BinaryIO, marker: Path) -> None:
    """The same from many threads at once, in the hope that one slips through."""

    def try_often() -> None:
        for _ in range(5):
            with contextlib.suppress(OSError):
                _forked_child_marks(marker)

    threads = [threading.Thread(target=try_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _forked_child_marks(marker: Path) -> None:
    child = os.fork()
    if child == 0:
        marker.touch()
        os._exit(0)
    os.waitpid(child, 0)


# Use the machine up


@sandboxed(tight, timeout=0.5)
def match_badly(file: BinaryIO) -> bool:
    """An innocent parser with a regular expression that takes 2 ** n steps on the right line."""
    return re.fullmatch(r"(\w+\s?)+:", file.read().decode()) is not None


@sandboxed(tight, timeout=0.5)
def sleep(file: BinaryIO) -> None:
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(3600)


@sandboxed(tight, cpu=1)
def loop(file: BinaryIO) -> None:
    while True:
        with contextlib.suppress(BaseException):
            sum(range(1000))


@sandboxed(tight)
def eat(file: BinaryIO) -> None:
    eaten = []
    while True:
        eaten.append(b"x" * (1 << 20))


@sandboxed(tight)
def flood(file: BinaryIO) -> bytes:
    return bytes(8 << 20)


# Break


@sandboxed(tight)
def crash(file: BinaryIO) -> None:
    """What a bug in a C library does: read the address 0."""
    ctypes.string_at(0)


@sandboxed(tight)
def quit(file: BinaryIO) -> None:
    os._exit(0)


# Lie


class Complaint(Command, Exception):
    """An exception that runs a command in whoever unpickles it."""


class AlwaysRight(str):
    """A text that equals every password."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class Small(int):
    """A number that passes every check of its size."""

    def __gt__(self, other: object) -> bool:
        return False


@sandboxed(tight)
def send_object(file: BinaryIO, command: str) -> dict[str, Any]:
    return {"size": (640, 480), "pixels": [Command(command)]}


@sandboxed(tight)
def send_error(file: BinaryIO, command: str) -> None:
    raise Complaint(command)


@sandboxed(tight)
def send_text(file: BinaryIO) -> str:
    return AlwaysRight("a guess")


@sandboxed(tight)
def send_number(file: BinaryIO) -> int:
    return Small(10**9)


@sandboxed(tight)
def send_exit(file: BinaryIO) -> None:
    """In the host this would end the program, and as a success."""
    raise SystemExit(0)


@sandboxed(tight)
def send_garbage(file: BinaryIO) -> str:
    """Write rubbish to every descriptor there is: one of them must lead to the host."""
    for descriptor in range(3, 4096):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\xff\x00\x7f" * 1000)
    return "all is well"
