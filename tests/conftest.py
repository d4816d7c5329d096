"""What the tests share."""

import contextlib
import gc
import os
import threading
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

import compart
from compart.backend.linux import _sys
from compart.host import arena

KEPT = ("user:", "mnt:", "net:", "ipc:", "uts:", "anon_inode:[landlock-ruleset]", "/dev/null")
"""Descriptors that compart keeps for the next call, a bounded number of each."""


def left_behind():
    """What this process holds at the moment: descriptors by what they are, children, threads."""
    arena.trim()
    held = Counter()
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # the one that listed the directory
        if not target.startswith(KEPT):
            held[target.split(":")[0] if target.startswith(("pipe:", "socket:")) else target] += 1
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            held.update(f"child {pid}" for pid in (task / "children").read_text().split())
    held.update(f"thread {thread.name}" for thread in threading.enumerate() if not thread.name.startswith("compart"))
    return held


@lru_cache(maxsize=1)
def first_call():
    """What compart makes once in a process is there."""
    compart.sandboxed(lambda: None)()


@pytest.fixture
def leak_check():
    """The test leaves no descriptor, child or thread behind in this process."""
    first_call()
    before = left_behind()
    yield
    if left_behind() - before:
        gc.collect()  # it is slow, and what it finds is rarely there
    assert left_behind() - before == Counter()


@pytest.fixture
def no_fork(monkeypatch):
    """A list that stays empty as long as nothing is forked."""
    forks = []
    really = _sys.fork

    def fork(*args, **kwargs):
        forks.append(args)
        return really(*args, **kwargs)

    monkeypatch.setattr(_sys, "fork", fork)
    yield forks
    assert forks == []
