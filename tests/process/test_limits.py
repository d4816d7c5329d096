"""Each limit ends what goes beyond it, and the error names the limit, its value and what was used."""

import contextlib
import ctypes
import errno
import gc
import itertools
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import compart
from compart import CompartmentDied, CompartmentTimeout, MemoryLimitError, ViolationError, sandboxed

ROOT = Path(__file__).parents[2]
MIB = 2**20


needs_listener = pytest.mark.skipif(
    "listener" not in compart.enforcement().up, reason="the host must be asked for each thread and signal"
)


def ends_at(limit: str, inside: Any, *args: Any, kind: type[Exception] = CompartmentDied, **fields: Any) -> Any:
    """The error of a call that reaches its limit; checks that it says what every such error says."""
    with pytest.raises(kind) as caught:
        sandboxed(**{"timeout": 20, **fields})(inside)(*args)
    error: Any = caught.value
    assert error.limit == limit
    assert f"{limit}=" in str(error)
    assert re.search(r"used \d+\.\d\d s CPU, \d+\.\d\d s wall, \d+ MiB peak", str(error))
    assert 5 * MIB < error.usage.max_rss < 4096 * MIB
    assert error.usage.wall > 0
    return error


def loops() -> None:
    while True:
        pass


# ---- timeout ---------------------------------------------------------------------------------------------------------------


def test_a_call_that_takes_too_long_is_a_timeout() -> None:
    error = ends_at("timeout", loops, kind=CompartmentTimeout, timeout=0.1)
    assert isinstance(error, TimeoutError)
    assert (error.value, error.signal) == (0.1, signal.SIGKILL)
    assert "timeout=0.1 s" in str(error)
    assert error.usage.wall >= 0.1


def ignores_every_signal() -> None:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    loops()


def stops_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def closes_everything() -> None:
    for number in range(1024):
        try:
            os.close(number)
        except OSError:
            continue
    time.sleep(60)


def never_stops_printing() -> None:
    while True:
        print("x" * 1000)


def never_stops_being_refused() -> None:
    while True:
        try:
            open("/etc/hostname").close()
        except PermissionError:
            continue


def never_ends_its_answer() -> None:
    answer = b"\0" * 65536
    while True:
        os.write(1, answer)
        time.sleep(0.001)


STUBBORN = [
    time.sleep,
    ignores_every_signal,
    pytest.param(stops_itself, marks=needs_listener),
    closes_everything,
    never_stops_printing,
    never_ends_its_answer,
]


@pytest.mark.parametrize("inside", STUBBORN, ids=lambda inside: inside.__name__)
def test_the_timeout_ends_a_call_that(inside: Any) -> None:
    args = [60] if inside is time.sleep else []
    ends_at("timeout", inside, *args, kind=CompartmentTimeout, timeout=0.2, on_violation="deny")


def test_the_timeout_ends_a_call_that_never_stops_being_refused() -> None:
    with pytest.raises((CompartmentTimeout, ViolationError)):
        sandboxed(never_stops_being_refused, timeout=0.2, on_violation="deny")()


def test_a_thread_that_is_left_running_does_not_hold_the_answer_up() -> None:
    def leaves_a_thread() -> int:
        threading.Thread(target=time.sleep, args=(60,)).start()
        return 5

    assert sandboxed(leaves_a_thread, timeout=20)() == 5


def test_a_call_that_is_quick_enough_is_no_timeout() -> None:
    assert sandboxed(lambda: time.sleep(0.05) or 5, timeout=20)() == 5


def test_the_timeout_ends_a_stream_that_stalls() -> None:
    def stalls() -> Iterator[int]:
        yield 1
        time.sleep(60)

    stream = sandboxed(stalls, timeout=0.2)()
    assert next(stream) == 1
    with pytest.raises(CompartmentTimeout, match="timeout="):
        next(stream)


def test_the_timeout_ends_a_stream_that_nobody_reads() -> None:
    """The host is busy elsewhere for longer than the timeout; the compartment must not go on all the while."""
    told, tell = os.pipe()

    def says_its_pid_and_loops(tell: Any) -> Iterator[int]:
        tell.write(b"%d\n" % os.getpid())
        yield 1
        loops()

    with open(told, "rb", 0) as told_file, open(tell, "wb", 0) as tell_file:
        with sandboxed(says_its_pid_and_loops, timeout=0.2)(tell_file) as stream:
            pid = int(told_file.readline())
            assert next(stream) == 1
            deadline = time.monotonic() + 30
            while _runs(pid) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- cpu ---------------------------------------------------------------------------------------------------------------------


def test_a_call_that_computes_too_long_names_the_cpu_limit() -> None:
    error = ends_at("cpu", loops, cpu=0.2)
    assert error.value == 0.2
    assert "cpu=0.2 s" in str(error)
    assert error.usage.cpu >= 0.2
    assert not isinstance(error, CompartmentTimeout)


def test_the_cpu_limit_counts_all_threads_together() -> None:
    def computes_in_threads() -> None:
        import hashlib

        block = bytes(MIB)

        def digest() -> None:
            while True:
                hashlib.sha256(block)  # lets the other threads run meanwhile

        for _ in range(3):
            threading.Thread(target=digest).start()
        digest()

    error = ends_at("cpu", computes_in_threads, cpu=0.3)
    assert error.usage.cpu >= 0.3


def test_waiting_takes_no_cpu() -> None:
    assert sandboxed(lambda: time.sleep(0.3) or 5, cpu=0.2)() == 5


def test_native_code_that_ignores_signals_meets_the_cpu_limit() -> None:
    def computes() -> int:
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        return 3**10**9

    ends_at("cpu", computes, cpu=0.2)


def test_a_stream_meets_the_cpu_limit() -> None:
    def counts() -> Iterator[int]:
        yield from itertools.count()

    stream = sandboxed(counts, cpu=0.2, timeout=20)()
    with pytest.raises(CompartmentDied, match="cpu=") as caught:
        for _ in stream:
            pass
    assert caught.value.limit == "cpu"


# ---- memory ----------------------------------------------------------------------------------------------------------------


def ends_at_memory(inside: Any, *args: Any, **fields: Any) -> MemoryLimitError:
    error = ends_at("memory", inside, *args, kind=MemoryLimitError, **fields)
    assert isinstance(error, MemoryError)
    assert (error.value, "memory=64 MiB" in str(error)) == (64 * MIB, True)
    return error


def keeps_adding() -> int:
    kept = []
    while True:
        kept.append(bytearray(MIB))


def maps_memory() -> int:
    kept = []
    while True:
        kept.append(mmap.mmap(-1, MIB))


def recurses_in_memory() -> str:
    text = "x"
    while True:
        text += text


def makes_an_array() -> int:
    return numpy.zeros(100 * MIB, dtype="u1").nbytes


def starts_threads() -> None:
    while True:
        threading.Thread(target=time.sleep, args=(60,)).start()


@pytest.mark.parametrize(
    "inside", [keeps_adding, recurses_in_memory, makes_an_array], ids=lambda inside: inside.__name__
)
def test_the_memory_limit_ends_a_call_that(inside: Any) -> None:
    ends_at_memory(inside, memory="64M")


def test_one_block_that_is_too_large_meets_the_memory_limit() -> None:
    # More than the limit: a piece of the heap that the host had freed is within its start.
    ends_at_memory(lambda: bytearray(256 * MIB), memory="64M")


def test_mapped_memory_meets_the_memory_limit() -> None:
    """mmap() says ENOMEM, which the function sees as OSError; the error must name the limit all the same."""
    with pytest.raises((OSError, MemoryLimitError)) as caught:
        sandboxed(maps_memory, memory="64M", timeout=20)()
    error = caught.value
    assert isinstance(error, MemoryLimitError) or error.errno == errno.ENOMEM
    said = "\n".join([str(error), *getattr(error, "__notes__", ())])
    assert "memory=64 MiB" in said


def test_the_stacks_of_threads_meet_the_memory_limit() -> None:
    with pytest.raises((RuntimeError, MemoryLimitError)) as caught:
        sandboxed(starts_threads, memory="64M", timeout=20)()
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "memory=64 MiB" in said


def test_a_function_that_catches_its_memory_error_goes_on() -> None:
    def copes() -> str:
        try:
            bytearray(1 << 40)
        except MemoryError:
            return "coped"
        return "got it"

    assert sandboxed(copes)() == "coped"


def test_the_memory_limit_counts_from_what_the_host_has_at_the_call() -> None:
    call = sandboxed(lambda: len(bytearray(40 * MIB)), memory="64M")
    assert call() == 40 * MIB
    held = bytearray(200 * MIB)
    assert call() == 40 * MIB
    assert len(held) == 200 * MIB


def test_what_fits_is_allowed() -> None:
    assert sandboxed(lambda: len(bytearray(48 * MIB)), memory="64M")() == 48 * MIB


def test_there_may_be_no_memory_limit() -> None:
    assert sandboxed(lambda: resource.getrlimit(resource.RLIMIT_AS), memory=None)() == (-1, -1)


def test_the_host_does_not_copy_what_reaches_the_limit() -> None:
    """The limit is the compartment's: after it the host is as large as before."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends_at_memory(keeps_adding, memory="64M")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


# NumPy is not in this interpreter until the compartment, or the policy, asks for it.
FRESH = """
import os, sys
from compart import ViolationError, grant, sandboxed
def total():
    import numpy
    return float(numpy.arange(1000.0).sum()), float((numpy.ones((50, 50)) @ numpy.ones((50, 50))).sum())
everything = [grant.directory(path or os.getcwd()) for path in sys.path if os.path.isdir(path or os.getcwd())]
assert "numpy" not in sys.modules
"""


def fresh(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH + textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_preloaded_numpy_works_in_256_megabytes() -> None:
    fresh("""
        assert sandboxed(total, memory="256M", preload=["numpy"])() == (499500.0, 125000.0)
    """)


def test_modules_in_python_from_granted_directories_work_in_256_megabytes() -> None:
    fresh("""
        def topics():
            import pydoc_data.topics
            import mailbox
            return len(pydoc_data.topics.topics) > 50 and mailbox.Message().is_multipart()
        assert sandboxed(topics, memory="256M", grants=everything)() is False
        assert "mailbox" not in sys.modules
    """)


def test_native_modules_from_granted_directories_are_refused_with_the_remedy() -> None:
    """Nothing inside may map code, so a module of machine code is loaded before; the violation says how."""
    fresh("""
        try:
            print(sandboxed(total, memory="256M", grants=everything)())
        except ViolationError as error:
            refused = [v for v in error.violations if v.call == "mmap"]
            assert "PROT_EXEC" in str(refused[0]), refused
            assert "preload=" in refused[0].suggestion, refused
        else:
            raise AssertionError("machine code was mapped")
    """)


# ---- open_files ----------------------------------------------------------------------------------------------------------------


def opens_pipes() -> int:
    kept = []
    while True:
        kept.append(os.pipe())


def test_more_open_files_than_allowed_is_an_error_that_names_the_limit() -> None:
    with pytest.raises(OSError) as caught:
        sandboxed(opens_pipes, open_files=16)()
    assert caught.value.errno == errno.EMFILE
    (note,) = caught.value.__notes__
    assert "open_files=16" in note
    assert re.search(r"used .* CPU", note)


def test_so_many_files_may_be_open_and_no_more() -> None:
    def counts() -> int:
        opened = 0
        try:
            while True:
                os.dup(1)
                opened += 1
        except OSError as error:
            return opened if error.errno == errno.EMFILE else -1

    # Descriptors 0, 1 and 2 are among the compartment's own.
    assert sandboxed(counts, open_files=20)() == 17


@pytest.mark.parametrize(("mode", "buffering"), [("r", -1), ("rb", -1), ("r+", -1), ("r+b", -1), ("rb", 0), ("r+b", 0)])
def test_a_file_with_a_high_number_in_the_host_can_be_handed_over(mode: str, buffering: int, tmp_path: Path) -> None:
    """The limit is on what the compartment opens itself; a busy host's files have numbers beyond it."""
    path = tmp_path / "file"
    path.write_text("content")
    with contextlib.ExitStack() as many:
        for _ in range(80):
            many.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        file = many.enter_context(open(path, mode, buffering))
        assert file.fileno() >= 64
        for fields in ({}, {"open_files": 8}):
            file.seek(0)
            assert sandboxed(lambda file: len(file.read()), **fields)(file) == 7


def test_an_error_of_another_kind_has_no_note_of_the_limit() -> None:
    def fails() -> None:
        raise OSError(errno.EIO, "x")

    with pytest.raises(OSError) as caught:
        sandboxed(fails, open_files=16)()
    assert not hasattr(caught.value, "__notes__")


# ---- threads -------------------------------------------------------------------------------------------------------------------


def keeps_threads(wanted: int) -> int:
    gate = threading.Event()
    threads = [threading.Thread(target=gate.wait) for _ in range(wanted)]
    try:
        for thread in threads:
            thread.start()
        return threading.active_count()
    finally:
        gate.set()


@needs_listener
def test_more_threads_than_allowed_is_an_error_that_names_the_limit() -> None:
    with pytest.raises(RuntimeError, match="can't start new thread") as caught:
        sandboxed(keeps_threads, threads=4)(4)
    (note,) = caught.value.__notes__
    assert "threads=4" in note


@needs_listener
def test_so_many_threads_may_run() -> None:
    assert sandboxed(keeps_threads, threads=4)(3) == 4


@needs_listener
def test_threads_that_ended_do_not_count() -> None:
    def one_after_another() -> int:
        ended = 0
        for _ in range(20):
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()
            ended += 1
        return ended

    assert sandboxed(one_after_another, threads=3)() == 20


@needs_listener
def test_one_thread_is_the_function_alone() -> None:
    assert sandboxed(keeps_threads, threads=1)(0) == 1
    with pytest.raises(RuntimeError):
        sandboxed(keeps_threads, threads=1)(1)


def test_threads_may_be_left_to_the_memory_limit() -> None:
    assert sandboxed(keeps_threads)(20) == 21


# ---- result_bytes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        lambda: b"x" * 200_000,
        lambda: "x" * 200_000,
        lambda: [0] * 200_000,
        lambda: memoryview(bytes(200_000)),
        lambda: 1 << 1_600_000,
    ],
    ids=["bytes", "text", "list", "buffer", "integer"],
)
def test_a_result_that_is_too_large_names_the_limit(value: Any) -> None:
    error = ends_at("result_bytes", value, result_bytes="100K")
    assert error.value == 100 * 1024
    assert f"result_bytes={100 * 1024} bytes" in str(error)


def test_a_result_that_just_fits_comes_back() -> None:
    assert sandboxed(lambda: b"x" * 100_000, result_bytes=100_100)() == b"x" * 100_000


def test_a_value_of_a_stream_that_is_too_large_names_the_limit() -> None:
    def values() -> Iterator[bytes]:
        yield b"x"
        yield b"x" * 200_000

    stream = sandboxed(values, result_bytes="100K", timeout=20)()
    assert next(stream) == b"x"
    with pytest.raises(CompartmentDied, match="result_bytes=") as caught:
        next(stream)
    assert caught.value.limit == "result_bytes"


def test_the_values_of_a_stream_may_be_larger_together() -> None:
    def values() -> Iterator[bytes]:
        for _ in range(8):
            yield b"x" * 90_000

    assert sum(map(len, sandboxed(values, result_bytes="100K")())) == 720_000


# ---- stdout and stderr -----------------------------------------------------------------------------------------------------------


def prints() -> int:
    print("to stdout")
    print("to stderr", file=sys.stderr)
    os.write(1, b"raw stdout\n")
    os.write(2, b"raw stderr\n")
    return 5


def test_output_is_captured() -> None:
    outcome = sandboxed(prints).run()
    assert outcome.value == 5
    assert sorted(outcome.stdout.splitlines()) == ["raw stdout", "to stdout"]
    assert sorted(outcome.stderr.splitlines()) == ["raw stderr", "to stderr"]


def test_output_may_be_inherited(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = sandboxed(prints, stdout="inherit", stderr="inherit").run()
    assert (outcome.stdout, outcome.stderr) == ("", "")
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["raw stdout", "to stdout"]
    assert sorted(err.splitlines()) == ["raw stderr", "to stderr"]


def test_output_may_be_thrown_away(capfd: pytest.CaptureFixture[str]) -> None:
    outcome = sandboxed(prints, stdout="null", stderr="null").run()
    assert (outcome.value, outcome.stdout, outcome.stderr) == (5, "", "")
    assert capfd.readouterr() == ("", "")


def test_inherited_output_is_not_the_hosts_own_descriptor(capfd: pytest.CaptureFixture[str]) -> None:
    """What the compartment holds is a pipe: it can neither truncate nor read a log file that the host writes to."""

    def kind() -> int:
        return os.fstat(1).st_mode & 0o170000

    assert sandboxed(kind, stdout="inherit")() == 0o010000
    assert os.fstat(1).st_mode & 0o170000 != 0o010000


def floods(size: int) -> int:
    block = b"x" * 65536
    for _ in range(size // len(block)):
        os.write(1, block)
        os.write(2, block)
    return size


def test_a_flood_of_output_is_cut_and_blocks_nobody() -> None:
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = sandboxed(floods, timeout=50).run(50 * MIB)
    assert outcome.value == 50 * MIB
    assert (len(outcome.stdout), len(outcome.stderr)) == (MIB, MIB)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_the_cap_of_output_can_be_chosen() -> None:
    outcome = sandboxed(floods, output_bytes=1000).run(MIB)
    assert (len(outcome.stdout), len(outcome.stderr)) == (1000, 1000)


def test_the_last_words_are_in_the_error() -> None:
    def dies() -> None:
        print("about to die", file=sys.stderr)
        os.abort()

    with pytest.raises(CompartmentDied) as caught:
        sandboxed(dies)()
    assert "about to die" in caught.value.stderr


# ---- deaths that are no limit ---------------------------------------------------------------------------------------------------


def test_a_death_by_itself_names_no_limit() -> None:
    with pytest.raises(CompartmentDied) as caught:
        sandboxed(ctypes.string_at)(8)
    assert (caught.value.limit, caught.value.signal, caught.value.exit_code) == (None, signal.SIGSEGV, None)
    assert re.search(r"used .* MiB peak", str(caught.value))


def test_usage_tells_what_was_used() -> None:
    def uses() -> int:
        start = time.process_time()
        block = bytearray(b"x" * 80 * MIB)
        while time.process_time() - start < 0.1:
            pass
        return len(block)

    usage = sandboxed(uses).run().usage
    assert usage.cpu >= 0.1
    assert usage.wall >= 0.1
    assert usage.max_rss > 80 * MIB
