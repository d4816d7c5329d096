"""Surface "environment": what the host's process says about itself and its user."""

import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

from tests.escape.framework import CONTAINED, World, attempt


def _token_in_the_environment(world: World) -> Iterator[None]:
    os.environ["ESCAPE_TOKEN"] = world.token.decode()
    yield
    del os.environ["ESCAPE_TOKEN"]


_REVEALS: dict[str, Any] = {"surface": "environment", "refused_with": CONTAINED, "arrange": _token_in_the_environment}


@attempt(**_REVEALS)
def reads_its_environment(outside: World) -> bytes:
    return os.environ.get("ESCAPE_TOKEN", "").encode()


@attempt(**_REVEALS)
def reads_its_environment_as_bytes(outside: World) -> bytes:
    return os.environb.get(b"ESCAPE_TOKEN", b"")


@attempt(**_REVEALS, proof=lambda world, count: count > 0)
def counts_its_environment(outside: World) -> int:
    return len(os.environ)


@attempt(**_REVEALS)
def asks_libc_for_its_environment(outside: World) -> bytes:
    libc: Any = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    return libc.getenv(b"ESCAPE_TOKEN") or b""


@attempt(**_REVEALS, proof=lambda world, found: found is True)
def walks_the_environment_of_libc(outside: World) -> bool:
    entries = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
    at = 0
    while entries and entries[at] is not None:
        if entries[at] == b"ESCAPE_TOKEN=" + outside.token:
            return True
        at += 1
    return False


def _token_in_the_arguments(world: World) -> Iterator[None]:
    sys.argv.append(world.token.decode())
    yield
    sys.argv.remove(world.token.decode())


@attempt(surface="environment", refused_with=CONTAINED, arrange=_token_in_the_arguments)
def reads_the_arguments_of_the_host(outside: World) -> bytes:
    return sys.argv[-1].encode() if sys.argv else b""
