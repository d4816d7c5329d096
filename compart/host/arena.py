"""Shared memory for big buffers: lent to a compartment, read in place, scrubbed and used again.

Runs in the host. A piece is a sealed memfd (it can neither shrink nor grow, so reading it never ends in SIGBUS) with a
mapping that no forked child inherits. A free piece holds nothing but zeroes.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
from collections.abc import Callable

from compart import _fast
from compart.backend.linux import _sys

GRAIN = 1 << 20
MOST_FREE = 256 << 20
SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW (fcntl(2))
F_ADD_SEALS = 1033


_identities: set[tuple[int, int]] = set()


def is_piece(descriptor: int) -> bool:
    """Whether a descriptor is one of our pieces, sent back as if it were a file."""
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino) in _identities


class Piece:
    """One piece of shared memory. `size` bytes at `mapping`; `descriptor` is what a compartment maps."""

    __slots__ = ("descriptor", "identity", "mapping", "size")

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("compart", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, size)
            fcntl.fcntl(self.descriptor, F_ADD_SEALS, SEALS)
            self.mapping = _sys.Mapping(self.descriptor, size)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.size = size
        status = os.fstat(self.descriptor)
        self.identity = status.st_dev, status.st_ino
        _identities.add(self.identity)

    def destroy(self) -> None:
        _identities.discard(self.identity)
        os.close(self.descriptor)
        self.mapping.close()


class Lease(_sys.View):
    """A piece while somebody uses it, exported read-only. When the last view of it dies, it is scrubbed and goes back."""

    def __init__(self, mapping: _sys.Mapping, piece: Piece) -> None:
        self._piece: Piece | None = piece
        self._pid = os.getpid()

    @property
    def descriptor(self) -> int:
        """What a compartment maps."""
        assert self._piece is not None
        return self._piece.descriptor

    @property
    def size(self) -> int:
        assert self._piece is not None
        return self._piece.size

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():
            return
        piece, self._piece = self._piece, None
        if piece is not None and self._pid == os.getpid():
            _give_back(piece)


# Reentrant: a garbage collection may give a piece back while one is being taken.
_lock = threading.RLock()
_free: list[Piece] = []


def lease(size: int) -> Lease:
    """At least `size` bytes of zeroed shared memory."""
    with _lock:
        fitting = [piece for piece in _free if size <= piece.size <= 2 * size + GRAIN]
        if fitting:
            best = min(fitting, key=lambda piece: piece.size)
            _free.remove(best)
            return Lease(best.mapping, best)
    made = Piece((size + GRAIN - 1) // GRAIN * GRAIN)
    return Lease(made.mapping, made)


def _give_back(piece: Piece) -> None:
    try:
        # The compartment may have written anywhere in it.
        _fast.zero(piece.mapping, piece.size)
    except BaseException:
        piece.destroy()
        raise
    with _lock:
        if sum(p.size for p in _free) + piece.size <= MOST_FREE:
            _free.append(piece)
            return
    piece.destroy()


def trim() -> None:
    """Give all free pieces back to the system."""
    with _lock:
        pieces, _free[:] = list(_free), []
    for piece in pieces:
        piece.destroy()


def _forked() -> None:
    # The mappings did not come along (MADV_DONTFORK), and the lock may be held by a thread that did not either.
    global _lock
    _lock = threading.RLock()
    for piece in _free:
        os.close(piece.descriptor)
    _free.clear()


_sys.at_fork(_forked)
