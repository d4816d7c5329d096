"""What a function raises comes back; how a compartment dies is told; nothing that a liar says is believed or looked up."""

import ast
import ctypes
import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

import compart
from compart import (
    CompartError,
    CompartmentDied,
    CompartmentTimeout,
    MemoryLimitError,
    ProtocolError,
    RemoteError,
    RemoteTraceback,
    sandboxed,
)

pytestmark = pytest.mark.usefixtures("leak_check")

HERE = Path(__file__).name


def raised(error):
    """What a call raises whose function raises `error`."""

    def raises():
        raise error

    with pytest.raises(BaseException) as caught:
        sandboxed(raises)()
    return caught.value


# --------------------------------------------------------------------------------------------------------- builtin exceptions


PLAIN = [
    ValueError("a value", 1),
    ValueError(),
    KeyError("missing"),
    KeyError(("tuple", 1)),
    IndexError("list index out of range"),
    TypeError("of another type"),
    ZeroDivisionError("division by zero"),
    AttributeError("no such attribute"),
    NotImplementedError("not here"),
    StopIteration(3),
    AssertionError({"a": [1, 2]}),
    RuntimeError("text with ünïcode \udc80"),
    LookupError(None),
    UserWarning("a warning raised"),
    EOFError(),
    OverflowError(2**100),
    ArithmeticError(b"bytes", 1.5),
    ConnectionError("without a number"),
    RecursionError("by hand"),
    BufferError("held"),
]


@pytest.mark.parametrize(
    "error", PLAIN, ids=lambda error: f"{type(error).__name__}-{error.args!r:.20}".replace("\udc80", "")
)
def test_a_builtin_exception_comes_back_as_itself(error):
    came = raised(error)
    assert type(came) is type(error)
    assert came.args == error.args
    assert [type(a) for a in came.args] == [type(a) for a in error.args]
    assert not isinstance(came, CompartError)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOENT, "No such file or directory", "/some/file"), FileNotFoundError),
        (OSError(errno.EACCES, "Permission denied", b"/bytes"), PermissionError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/from", None, "/to"), OSError),
        (ConnectionResetError(errno.ECONNRESET, "reset"), ConnectionResetError),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), TimeoutError),
        (BlockingIOError(errno.EAGAIN, "again"), BlockingIOError),
    ],
)
def test_an_oserror_keeps_its_number_its_text_and_its_names(error, kind):
    came = raised(error)
    assert type(came) is kind
    assert (came.errno, came.strerror) == (error.errno, error.strerror)
    assert (came.filename, came.filename2) == (error.filename, error.filename2)
    assert str(came) == str(error)


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"ab\xff", 2, 3, "invalid start byte"),
        UnicodeEncodeError("ascii", "aé", 1, 2, "ordinal not in range(128)"),
        UnicodeTranslateError("é", 0, 1, "no mapping"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_unicode_error_keeps_what_it_was_about(error):
    came = raised(error)
    assert type(came) is type(error)
    assert (came.object, came.start, came.end, came.reason) == (error.object, error.start, error.end, error.reason)
    assert str(came) == str(error)


def test_a_syntax_error_keeps_its_place():
    def raises():
        compile("a b", "<given>", "exec")

    def place(call):
        with pytest.raises(SyntaxError) as caught:
            call()
        return caught.value.filename, caught.value.lineno, caught.value.offset, caught.value.text

    assert place(sandboxed(raises)) == place(raises)


def test_bad_source_is_a_syntax_error_though_python_looks_for_the_file_of_its_name():
    with pytest.raises(SyntaxError, match="never closed"):
        sandboxed(lambda text: ast.literal_eval(text))("[1, 2")


def test_an_import_error_keeps_its_name():
    came = raised(ImportError("no x", name="x", path="/x.py"))
    assert (came.name, came.path, str(came)) == ("x", "/x.py", "no x")


def test_an_attribute_error_keeps_its_name():
    def raises():
        return None.missing

    with pytest.raises(AttributeError) as caught:
        sandboxed(raises)()
    assert caught.value.name == "missing"


def test_recursion_without_end_is_a_recursion_error():
    def deeper(n):
        return deeper(n + 1) + 1

    with pytest.raises(RecursionError) as caught:
        sandboxed(deeper)(0)
    frames = str(caught.value.__cause__).count("<locals>.deeper\n")
    assert 10 < frames <= 64


def test_arguments_that_are_no_plain_values_become_text():
    class Thing:
        def __repr__(self):
            return "<a thing>"

    came = raised(ValueError("about", Thing()))
    assert type(came) is ValueError
    assert "<a thing>" in str(came)


def test_arguments_beyond_all_bounds_are_cut():
    came = raised(ValueError("x" * 10_000_000))
    assert type(came) is ValueError
    assert 1000 < len(str(came)) < 1_000_000


# ----------------------------------------------------------------------------------------------------------- other exceptions


class Custom(ValueError):
    """An exception of the user's own."""


class Quiet(Exception):
    def __str__(self):
        raise RuntimeError("no text for you")

    __repr__ = __str__


def test_an_exception_of_ones_own_is_told_by_name_and_text():
    came = raised(Custom("its text"))
    assert type(came) is RemoteError
    assert (came.type_name, came.text) == (f"{Custom.__module__}.Custom", "its text")
    assert str(came) == f"{Custom.__module__}.Custom: its text"
    assert not isinstance(came, ValueError)


def test_a_library_exception_is_told_by_name():
    came = raised(json.JSONDecodeError("no json", "{", 0))
    assert came.type_name == "json.decoder.JSONDecodeError"
    assert "line 1 column 1" in came.text


def test_an_exception_that_calls_itself_builtin_is_not_believed():
    fake = type("ValueError", (Exception,), {"__module__": "builtins"})
    came = raised(fake("told"))
    # The name alone decides what is made, and it is made from plain values.
    assert type(came) is ValueError
    for name in ("print", "eval", "KeyboardInterrupt", "SystemExit", "object", "GeneratorExit", "BaseException"):
        liar = type(name, (Exception,), {"__module__": "builtins"})
        assert type(raised(liar("told"))) is RemoteError


def test_an_exception_without_a_text_is_told_all_the_same():
    came = raised(Quiet())
    assert type(came) is RemoteError
    assert came.type_name.endswith("Quiet")


def test_a_builtin_exception_whose_argument_has_no_text_is_told_all_the_same():
    assert type(raised(ValueError(Quiet()))) is ValueError


@pytest.mark.parametrize(
    "error", [SystemExit(3), SystemExit("words"), KeyboardInterrupt(), GeneratorExit(), BaseException("base")]
)
def test_what_would_end_the_host_is_an_ordinary_error_there(error):
    came = raised(error)
    assert isinstance(came, RemoteError)
    assert came.type_name == type(error).__name__


def test_sys_exit_does_not_end_the_host():
    with pytest.raises(RemoteError, match="SystemExit: 0"):
        sandboxed(lambda: sys.exit(0))()


def test_an_exception_group_is_told_with_its_members():
    came = raised(ExceptionGroup("several", [ValueError("first"), KeyError("second")]))
    assert isinstance(came, RemoteError)
    assert came.type_name == "ExceptionGroup"
    assert "several (2 sub-exceptions)" in came.text
    shown = "".join(traceback.format_exception(came))
    assert "ValueError: first" in shown
    assert "KeyError: 'second'" in shown


def test_notes_are_kept():
    error = ValueError("noted")
    error.add_note("the first note")
    error.add_note("the second note")
    came = raised(error)
    assert came.__notes__[:2] == ["the first note", "the second note"]
    own = Custom("noted")
    own.add_note("of one's own")
    assert raised(own).__notes__ == ["of one's own"]


# --------------------------------------------------------------------------------------------------------------- remote frames


def inner_step(number):
    return 1 // number


def outer_step(number):
    return inner_step(number)


def test_the_cause_shows_the_frames_inside_with_their_source():
    with pytest.raises(ZeroDivisionError) as caught:
        sandboxed(outer_step)(0)
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteTraceback)
    first = outer_step.__code__.co_firstlineno
    second = inner_step.__code__.co_firstlineno
    assert str(cause).strip().splitlines() == [
        "Traceback inside the compartment (most recent call last):",
        f'  File "{__file__}", line {first + 1}, in outer_step',
        "    return inner_step(number)",
        f'  File "{__file__}", line {second + 1}, in inner_step',
        "    return 1 // number",
        "ZeroDivisionError: integer division or modulo by zero",
    ]
    shown = "".join(traceback.format_exception(caught.value))
    assert "return 1 // number" in shown


def test_the_cause_tells_what_led_to_it():
    def chained():
        try:
            {}["first"]
        except KeyError as error:
            raise ValueError("second") from error

    def while_handling():
        try:
            {}["first"]
        except KeyError:
            raise ValueError("second")  # noqa: B904

    with pytest.raises(ValueError, match="second") as caught:
        sandboxed(chained)()
    assert "caused by KeyError: 'first'" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="second") as caught:
        sandboxed(while_handling)()
    assert "while handling KeyError: 'first'" in str(caught.value.__cause__)


def blamed(filename, line=1):
    """The remote traceback of a function whose code says that it lies in `filename`."""
    code = compile("\n" * (line - 1) + "def lie():\n    raise ValueError('lie')", str(filename), "exec")
    made = {}
    exec(code, made)

    def lies():
        made["lie"]()

    with pytest.raises(ValueError, match="lie") as caught:
        sandboxed(lies)()
    return str(caught.value.__cause__)


def test_the_host_reads_no_file_because_a_compartment_names_it(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("# first\n# the secret line\n")
    shown = blamed(secret)
    assert f'File "{secret}", line 2' in shown
    assert "the secret line" not in shown
    assert "root:" not in blamed("/etc/passwd")


def test_the_host_does_not_wait_for_a_fifo_or_read_a_device_without_end(tmp_path):
    fifo = tmp_path / "fifo.py"
    os.mkfifo(fifo)
    assert str(fifo) in blamed(fifo)
    assert "/dev/zero" in blamed("/dev/zero")
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_module_that_says_it_is_another_file_shows_no_line_of_that(tmp_path, monkeypatch):
    module = type(sys)("compart_tests_liar")
    monkeypatch.setitem(sys.modules, "compart_tests_liar", module)
    module.__file__ = None
    assert "lie" in blamed(tmp_path / "none.py")


def test_names_in_the_frames_bring_no_escape_sequences():
    shown = blamed('/esc\x1b[31mape\n  File "forged"')
    assert "\x1b" not in shown
    assert '\n  File "forged"' not in shown


def test_the_text_of_another_exception_brings_no_escape_sequences_into_a_traceback():
    came = raised(Custom("red \x1b[31m text"))
    assert came.text == "red \x1b[31m text"
    assert "\x1b" not in str(came.__cause__)


# ------------------------------------------------------------------------------------------------------------- how it ended


def died(function, *args, **policy):
    with pytest.raises(CompartmentDied) as caught:
        sandboxed(function, **policy)(*args)
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGTERM, signal.SIGILL])
def test_a_death_by_signal_names_the_signal(number):
    error = died(lambda: os.kill(os.getpid(), number))
    assert (error.signal, error.exit_code, error.limit) == (number, None, None)
    assert f"was ended by {number.name}" in str(error)


def test_a_crash_carries_faulthandlers_words():
    def crashes():
        ctypes.string_at(0)

    error = died(crashes)
    assert error.signal == signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in error.stderr
    assert "in crashes" in error.stderr
    assert "Segmentation fault" in str(error)


def test_an_abort_carries_faulthandlers_words():
    error = died(os.abort)
    assert error.signal == signal.SIGABRT
    assert "Fatal Python error: Aborted" in str(error)


def test_an_exit_code_is_told():
    error = died(lambda: os._exit(7))
    assert (error.signal, error.exit_code) == (None, 7)
    assert "exit code 7" in str(error)


def test_an_exit_with_nothing_said_is_no_value():
    error = died(lambda: os._exit(0))
    assert (error.exit_code, error.limit) == (0, None)


def test_the_last_words_are_kept():
    def speaks():
        print("out", flush=True)
        print("the last words", file=sys.stderr, flush=True)
        os._exit(1)

    assert died(speaks).stderr == "the last words\n"


def test_what_was_used_is_told():
    def uses():
        end = time.process_time() + 0.05
        held = bytearray(30_000_000)
        while time.process_time() < end:
            pass
        os._exit(len(held) % 251)

    usage = died(uses).usage
    assert usage.cpu >= 0.05
    assert usage.wall >= 0.05
    assert usage.max_rss >= 30_000_000
    assert "CPU" in str(usage)


def test_a_timeout_is_a_timeout_error_and_a_death():
    error = died(lambda: time.sleep(60), timeout=0.1)
    assert isinstance(error, CompartmentTimeout)
    assert isinstance(error, TimeoutError)
    assert (error.limit, error.value) == ("timeout", 0.1)
    assert "raise it with Policy(timeout=...)" in str(error)


def test_a_timeout_kills_what_cannot_be_interrupted():
    def stubborn():
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            pass

    assert isinstance(died(stubborn, timeout=0.2), CompartmentTimeout)


def test_a_compartment_that_stops_itself_ends_by_its_timeout():
    assert isinstance(died(lambda: signal.raise_signal(signal.SIGSTOP), timeout=0.2), CompartmentTimeout)


def test_a_thread_that_runs_on_does_not_hold_the_value_up():
    def leaves_a_thread():
        threading.Thread(target=time.sleep, args=(60,), daemon=False).start()
        return "done"

    assert sandboxed(leaves_a_thread, timeout=20)() == "done"


def test_the_cpu_limit_is_told():
    def spins():
        while True:
            pass

    error = died(spins, cpu=0.1)
    assert (error.limit, error.value) == ("cpu", 0.1)
    assert not isinstance(error, TimeoutError)
    assert error.usage.cpu >= 0.1


def test_sleeping_uses_no_cpu():
    assert sandboxed(lambda: time.sleep(0.35), cpu=0.3)() is None


def test_the_memory_limit_is_told():
    error = died(lambda: len(bytearray(200_000_000)), memory="64M")
    assert isinstance(error, MemoryLimitError)
    assert isinstance(error, MemoryError)
    assert (error.limit, error.value) == ("memory", 64 << 20)
    assert "memory=64 MiB" in str(error)


def test_memory_within_the_limit_is_there():
    assert sandboxed(lambda: len(bytearray(40_000_000)), memory="64M")() == 40_000_000


def test_memory_taken_bit_by_bit_ends_too():
    def grows():
        held = []
        while True:
            held.append(bytearray(1_000_000))

    assert died(grows, memory="64M").limit == "memory"


def test_a_memory_error_that_the_function_handles_is_its_own_affair():
    def handles():
        try:
            return len(bytearray(500_000_000))
        except MemoryError:
            return "handled"

    assert sandboxed(handles, memory="64M")() == "handled"


def test_a_memory_error_without_a_limit_is_a_plain_one():
    came = raised_under(MemoryError("by hand"), memory=None)
    assert type(came) is MemoryError


def raised_under(error, **policy):
    def raises():
        raise error

    with pytest.raises(BaseException) as caught:
        sandboxed(raises, **policy)()
    return caught.value


def test_too_many_descriptors_name_the_limit():
    def opens():
        held = []
        while True:
            held.append(os.pipe())

    with pytest.raises(OSError, match="Too many open files") as caught:
        sandboxed(opens, open_files=16)()
    assert caught.value.errno == errno.EMFILE
    assert any("open_files=16" in note for note in caught.value.__notes__)


def test_too_many_threads_name_the_limit():
    def starts():
        stop = threading.Event()
        threads = [threading.Thread(target=stop.wait, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()

    assert sandboxed(starts)() is None
    with pytest.raises(RuntimeError, match="can't start new thread") as caught:
        sandboxed(starts, threads=4)()
    assert any("threads=4" in note for note in caught.value.__notes__)


# ------------------------------------------------------------------------------------------------- a compartment that lies


def test_garbage_on_the_channel_is_a_lie():
    def lies():
        os.write(480, b"garbage that is no frame at all")
        return 1

    with pytest.raises(ProtocolError):
        sandboxed(lies)()


def test_half_an_answer_is_a_death():
    def half():
        os.write(480, b"\0")
        os._exit(0)

    with pytest.raises((CompartmentDied, ProtocolError)):
        sandboxed(half)()


def test_an_exception_of_another_shape_is_a_lie():
    from compart import _fast, message

    def lies():
        _fast.write_frame(480, message.RAISED, _fast.encode({"type": 1}, message.EMPTY, 1000))
        os._exit(0)

    with pytest.raises(ProtocolError, match="exception of another shape"):
        sandboxed(lies)()


# ---------------------------------------------------------------------------------------------------------- Ctrl-C in the host


INTERRUPTED = """
import os, signal, sys, time
from compart import sandboxed

@sandboxed
def sleeps(ready):
    ready.write(str(os.getpid()))
    ready.flush()
    time.sleep(60)

reader, writer = os.pipe()
def children():
    return open(f"/proc/self/task/{os.getpid()}/children").read().split()

sandboxed(lambda: None)()
before = sorted(os.listdir("/proc/self/fd"))
try:
    with open(writer, "w", closefd=False) as ready:
        print("calling", flush=True)
        sleeps(ready)
except KeyboardInterrupt:
    assert children() == [], children()
    after = sorted(os.listdir("/proc/self/fd"))
    assert after == before, (before, after)
    print("interrupted", os.read(reader, 20).decode(), flush=True)
"""


@pytest.mark.parametrize("to", ["the host", "its whole group"])
def test_an_interrupt_of_the_host_kills_the_compartment_and_leaves_nothing(to):
    host = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with host:
        try:
            assert host.stdout.readline() == "calling\n"
            wait_for(lambda: _compartment_sleeps(host.pid))
            os.kill(host.pid, signal.SIGINT) if to == "the host" else os.killpg(host.pid, signal.SIGINT)
            said, inside = host.stdout.readline().split()
            assert said == "interrupted"
            assert not os.path.exists(f"/proc/{inside}") or "compart" not in Path(f"/proc/{inside}/cmdline").read_text()
            assert host.wait(timeout=20) == 0
        finally:
            host.kill()


def _compartment_sleeps(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return any("nanosleep" in Path(f"/proc/{child}/wchan").read_text() for child in children)
    except OSError:
        return False


def wait_for(condition, most=20.0):
    end = time.monotonic() + most
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.005)


KILLED = """
import os, sys, time
from compart import sandboxed

@sandboxed(stdout="inherit")
def sleeps():
    time.sleep(60)

print(os.getpid(), flush=True)
sleeps()
"""


def test_a_compartment_dies_with_its_host():
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as host:
        try:
            host.stdout.readline()
            wait_for(lambda: _compartment_sleeps(host.pid))
            (child,) = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
            watch = os.pidfd_open(int(child))
        finally:
            host.kill()
        try:
            import select

            assert select.select([watch], [], [], 20)[0] == [watch]
        finally:
            os.close(watch)


def test_a_handler_of_the_host_may_raise_and_leaves_nothing():
    class Alarm(Exception):
        pass

    def ring(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            sandboxed(lambda: time.sleep(60))()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_handler_of_the_host_may_run_while_it_waits():
    heard = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert sandboxed(lambda: time.sleep(0.1) or 5)() == 5
    finally:
        signal.signal(signal.SIGALRM, before)
    assert heard == [signal.SIGALRM]


def test_a_core_is_never_written():
    # A limit of 1 is below any core file, and keeps the kernel from piping one to a program as well (core(5)).
    soft, hard = sandboxed(lambda: resource.getrlimit(resource.RLIMIT_CORE))()
    assert (soft, hard) == (1, 1)
    assert died(os.abort).signal == signal.SIGABRT


def test_all_errors_have_one_root():
    kinds = [kind for kind in vars(compart).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert {k.__name__ for k in kinds if not issubclass(k, CompartError)} == {"RemoteTraceback"}
    assert issubclass(compart.PolicyError, ValueError)
    assert issubclass(compart.EncodeError, TypeError)
    assert issubclass(compart.NotCapableError, PermissionError)
