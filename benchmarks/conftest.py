"""Hosts of their own for benchmarks, so that neither heaps nor threads of one weigh on another."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

Call = Callable[[], None]


class Host:
    """A process that makes one kind of call each time it is asked. `call()` returns when the call has."""

    def __init__(self, group: str, rival: str, heap: int) -> None:
        command = [sys.executable, "-m", "benchmarks.rivals", group, "--heap", str(heap), "--serve", "--only", rival]
        self.rival = rival
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def call(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{self.rival}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "\n", "the host ended"

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def host() -> Iterator[Callable[[str, str, int], Call]]:
    """`host(group, rival, heap)` starts a host, with `heap` MB touched, and gives what makes one call there.

    A question to the host and its answer, two wake-ups over pipes, are in every measurement alike.
    """
    started: list[Host] = []

    def start(group: str, rival: str, heap: int = 0) -> Call:
        started.append(Host(group, rival, heap))
        return started[-1].call

    yield start
    for each in started:
        each.close()
