"""Bytes that no child may inherit.

Runs in the host. A forked child has a copy of its parent's memory; the pages of a Secret are the exception
(madvise(2) MADV_DONTFORK), and they stay out of core dumps too.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

from compart import _fast
from compart.errors import ClosedError, UnsupportedError


class Secret:
    """Bytes kept out of every child process: `Secret(bytearray(b"..."))`.

    A bytearray that is given is overwritten with zeroes, so that no copy is left behind; bytes cannot be, and the object
    that they came from remains in memory for as long as Python keeps it. `reveal()` returns a copy, which is ordinary
    memory again: keep it short. UnsupportedError on a system without MADV_DONTFORK.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._length = len(memoryview(data).cast("B"))
        self._owner = os.getpid()
        self._pages: Any = _pages(max(1, self._length))
        _fast.copy_into(self._pages, 0, data)
        if isinstance(data, bytearray):
            _fast.zero(data, len(data))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Secret:
        """The content of a file, read without a stop in ordinary memory longer than needed."""
        with open(path, "rb", buffering=0) as file:
            held = bytearray(os.fstat(file.fileno()).st_size)
            got = file.readinto(held)
            secret = cls(memoryview(held)[:got])
            _fast.zero(held, len(held))
            return secret

    def reveal(self) -> bytes:
        """A copy of the bytes. ClosedError in a child process, and after close()."""
        if self._pages is None:
            raise ClosedError("this secret was closed")
        if self._owner != os.getpid():
            raise ClosedError("this secret belongs to another process; its bytes are not in this one")
        return bytes(memoryview(self._pages)[: self._length])

    def close(self) -> None:
        """Overwrite and free the bytes. Closing twice is allowed."""
        if self._pages is not None and self._owner == os.getpid():
            _fast.zero(self._pages, self._length)
            self._pages.close()
        self._pages = None

    def __enter__(self) -> Secret:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<compart.Secret of {self._length} bytes>"

    def __reduce__(self) -> Any:
        raise TypeError("a Secret cannot be pickled")

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():
            return
        if getattr(self, "_pages", None) is not None:
            self.close()


def _pages(length: int) -> Any:
    if not hasattr(mmap, "MADV_DONTFORK"):
        raise UnsupportedError("secret", "this system cannot keep pages out of a forked child")
    from compart.backend.linux import _sys

    pages = _sys.Mapping(-1, length)
    pages.hide_from_dumps()
    return pages
