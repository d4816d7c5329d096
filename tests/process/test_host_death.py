"""A compartment does not outlive its host, however the host ends; and a forked host does not disturb its parent's."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Python 3.12 warns of os.fork() beside threads.
PYTHON = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning"]

PREAMBLE = """
import asyncio, itertools, os, signal, subprocess, sys, threading, time
from compart import sandboxed

say = open(1, "wb", 0, closefd=False)

def loops(say):
    say.write(b"%d\\n" % os.getpid())
    while True:
        pass

def sleeps(say):
    say.write(b"%d\\n" % os.getpid())
    time.sleep(600)

def counts(say):
    say.write(b"%d\\n" % os.getpid())
    for number in itertools.count():
        yield number

def counts_once(say):
    say.write(b"%d\\n" % os.getpid())
    yield 0
    while True:
        pass

async def counts_async(say):
    say.write(b"%d\\n" % os.getpid())
    for number in itertools.count():
        yield number

def on_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()

options = {"timeout": 600, "cpu": None}
"""


class Host:
    """A Python process that runs compartments: what it says, line by line, and its end."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen(
            [*PYTHON, "-c", PREAMBLE + textwrap.dedent(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            bufsize=0,
        )

    def hear(self) -> str:
        """The next line it, or a compartment of it, says."""
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(self.process.stdout.fileno(), 1)
            if not piece:
                raise EOFError(f"the host ended with {self.process.wait(10)} after {line!r}")
            line += piece
        return line.decode().strip()

    def hear_pid(self) -> int:
        return int(self.hear())

    def go_on(self) -> None:
        """Let it pass its next input()."""
        self.process.stdin.write(b"\n")

    def end(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(10)


@contextlib.contextmanager
def host(script: str) -> Iterator[Host]:
    started = Host(script)
    seen: list[int] = []
    real = started.hear_pid

    def remembered() -> int:
        seen.append(real())
        return seen[-1]

    started.hear_pid = remembered  # type: ignore[method-assign]
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait(10)
        started.process.stdin.close()
        started.process.stdout.close()
        for pid in seen:
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    """Whether the process is there and has not ended; one that nobody reaped yet has."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def ends_soon(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not lives(pid)


# Each of these says the pid of a compartment that will not end by itself, then perhaps "ready".
CALLS = {
    "a_call_that_loops": "sandboxed(loops, **options)(say)",
    "a_call_that_sleeps": "sandboxed(sleeps, **options)(say)",
    "a_call_that_stopped_itself": """
        def stops(say):
            say.write(b"%d\\n" % os.getpid())
            os.kill(os.getpid(), signal.SIGSTOP)
        sandboxed(stops, **options)(say)
    """,
    "a_call_that_ignores_signals": """
        def ignores(say):
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
            loops(say)
        sandboxed(ignores, **options)(say)
    """,
    "a_call_that_closed_everything": """
        def closes(say):
            say.write(b"%d\\n" % os.getpid())
            for number in range(1024):
                try:
                    os.close(number)
                except OSError:
                    pass
            time.sleep(600)
        sandboxed(closes, **options)(say)
    """,
    "a_call_of_another_thread": "on_a_thread(lambda: sandboxed(loops, **options)(say))",
    "a_submitted_call": "sandboxed(loops, **options).submit(say).result()",
    "an_awaited_call": "asyncio.run(sandboxed(loops, **options).aio(say))",
    "an_awaited_call_of_another_thread": "on_a_thread(lambda: asyncio.run(sandboxed(loops, **options).aio(say)))",
}

STREAMS = {
    "a_stream": """
        stream = sandboxed(counts, **options)(say)
    """,
    "a_stream_that_loops": """
        stream = sandboxed(counts_once, **options)(say)
    """,
    "a_stream_of_a_thread_that_ended": """
        def start():
            global stream
            stream = sandboxed(counts, **options)(say)
        on_a_thread(start)
    """,
    "a_looping_stream_of_a_thread_that_ended": """
        def start():
            global stream
            stream = sandboxed(counts_once, **options)(say)
        on_a_thread(start)
    """,
    "an_async_stream": """
        class stream:
            loop, values = asyncio.new_event_loop(), None
            def __next__(self):
                self.values = self.values or sandboxed(counts_async, **options)(say)
                return self.loop.run_until_complete(anext(self.values))
        stream = stream()
    """,
}


@pytest.mark.parametrize("script", CALLS.values(), ids=CALLS)
def test_it_ends_with_a_killed_host_that_waits_for(script: str) -> None:
    with host(script) as running:
        pid = running.hear_pid()
        assert lives(pid)
        running.end()
        assert ends_soon(pid)


def test_it_ends_with_a_terminated_host() -> None:
    with host(CALLS["a_call_that_loops"]) as running:
        pid = running.hear_pid()
        assert lives(pid)
        running.end(signal.SIGTERM)
        assert ends_soon(pid)


NEXT = """
assert next(stream) == 0
say.write(b"ready\\n")
input()
"""


@pytest.mark.parametrize("script", STREAMS.values(), ids=STREAMS)
def test_it_ends_with_a_killed_host_that_reads(script: str) -> None:
    with host(textwrap.dedent(script) + NEXT) as running:
        pid = running.hear_pid()
        assert running.hear() == "ready"
        assert lives(pid)
        running.end()
        assert ends_soon(pid)


EXITS = {
    "ends": "",
    "exits": "sys.exit(0)",
    "raises": "sys.stderr = None; raise ValueError",
    "exits_at_once": "os._exit(0)",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "ends_while_a_thread_goes_on": "threading.Thread(target=time.sleep, args=(0.2,)).start()",
    "becomes_another_program": "os.execv('/bin/sleep', ['sleep', '600'])",
    "becomes_another_program_on_a_thread": "on_a_thread(lambda: os.execv('/bin/sleep', ['sleep', '600']))",
}


@pytest.mark.parametrize("way", EXITS.values(), ids=EXITS)
@pytest.mark.parametrize(
    "script",
    [STREAMS["a_stream_that_loops"], STREAMS["a_looping_stream_of_a_thread_that_ended"]],
    ids=["main", "thread"],
)
def test_a_stream_ends_with_a_host_that(way: str, script: str) -> None:
    with host(textwrap.dedent(script) + NEXT + way) as running:
        pid = running.hear_pid()
        assert running.hear() == "ready"
        assert lives(pid)
        running.go_on()
        assert ends_soon(pid)


@pytest.mark.parametrize("name", ["a_stream", "a_stream_of_a_thread_that_ended", "an_async_stream"])
def test_it_ends_with_a_killed_host_whose_own_children_live_on(name: str) -> None:
    forks = """
child = os.fork()
if child == 0:
    time.sleep(600)
say.write(b"%d\\n" % child)
input()
"""
    with host(textwrap.dedent(STREAMS[name]) + "assert next(stream) == 0" + forks) as running:
        pid, child = running.hear_pid(), running.hear_pid()
        assert (lives(pid), lives(child)) == (True, True)
        running.end()
        assert ends_soon(pid)
        assert lives(child)


# ---- a host that forks -------------------------------------------------------------------------------------------------

IN_A_FORKED_HOST = """
def parent_and_child(child):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
"""


def runs(script: str) -> None:
    """Run a host to its end; it must succeed and say nothing on stderr."""
    command = [*PYTHON, "-c", PREAMBLE + IN_A_FORKED_HOST + textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_host_can_call_before_and_after_its_parent_did() -> None:
    runs("""
        double = sandboxed(lambda x: 2 * x)
        def use():
            assert double(21) == 42
            assert double(b"x" * 200_000) == b"x" * 400_000
            assert list(sandboxed(lambda: (yield 1))()) == [1]
            assert asyncio.run(double.aio(4)) == 8
            assert double.submit(4).result() == 8
            with open(__import__("compart").__file__) as file:
                assert sandboxed(lambda file: file.read(3))(file) == '\"\"\"'
        parent_and_child(use)
        use()
        parent_and_child(lambda: (use(), parent_and_child(use)))
        use()
    """)


def test_a_forked_host_that_lets_a_stream_go_leaves_it_to_its_parent() -> None:
    runs("""
        stream = sandboxed(lambda: (yield from itertools.count()))()
        assert next(stream) == 0
        def forget():
            global stream
            del stream
        parent_and_child(forget)
        assert list(itertools.islice(stream, 1000)) == list(range(1, 1001))
    """)


def test_a_forked_host_that_exits_leaves_a_stream_to_its_parent() -> None:
    runs("""
        stream = sandboxed(lambda: (yield from itertools.count()))()
        assert next(stream) == 0
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert list(itertools.islice(stream, 1000)) == list(range(1, 1001))
    """)


def test_a_forked_host_that_exits_leaves_a_running_call_to_its_parent() -> None:
    runs("""
        answer = []
        def slow(): time.sleep(0.5); return 5
        thread = threading.Thread(target=lambda: answer.append(sandboxed(slow)()))
        thread.start()
        pid = os.fork()
        if pid == 0:
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        thread.join()
        assert answer == [5]
    """)


def test_a_host_that_forks_while_another_thread_warms_up_can_call_in_both() -> None:
    runs("""
        warming, done = threading.Event(), threading.Event()
        def slow_to_warm():
            warming.set()
            assert done.wait(20)
        thread = threading.Thread(target=sandboxed(lambda: 1, warm=slow_to_warm))
        thread.start()
        assert warming.wait(20)
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            os._exit(0 if sandboxed(lambda: 5)() == 5 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        done.set()
        thread.join()
        assert sandboxed(lambda: 5)() == 5
    """)


def test_threads_that_fork_at_the_same_moment_do_not_take_each_other_for_another_host() -> None:
    """Handlers before a fork are Python: another thread may fork while they run."""
    runs("""
        os.register_at_fork(before=lambda: time.sleep(0.002))
        wrong = []
        def reads():
            for _ in range(10):
                with open(__import__("compart").__file__) as file:
                    try:
                        assert sandboxed(lambda file: file.read(3))(file) == '\"\"\"'
                    except Exception as error:
                        wrong.append(error)
        threads = [threading.Thread(target=reads) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong
    """)


def test_a_result_of_the_parent_stays_what_it_is_in_a_forked_host() -> None:
    """The memory that a big result lies in is not in the child; asking for it there is an error or the bytes, no crash."""
    runs("""
        kept = sandboxed(lambda: memoryview(b"abc" * 100_000))()
        def look():
            copy = sandboxed(lambda: memoryview(b"xyz" * 100_000))()
            assert bytes(copy) == b"xyz" * 100_000
        parent_and_child(look)
        assert bytes(kept) == b"abc" * 100_000
        assert bytes(sandboxed(lambda: memoryview(b"xyz" * 100_000))()) == b"xyz" * 100_000
        assert bytes(kept) == b"abc" * 100_000
    """)


def test_multiprocessing_pools_of_the_host_can_call() -> None:
    runs("""
        import multiprocessing
        double = sandboxed(lambda x: 2 * x)
        def task(x):
            return double(x)
        assert double(1) == 2
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(task, range(20)) == list(range(0, 40, 2))
    """)
