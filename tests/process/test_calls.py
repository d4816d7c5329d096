"""A sandboxed function is called like a plain one, whatever it is and wherever from; its host stays undisturbed."""

import contextvars
import fcntl
import functools
import inspect
import os
import pty
import random
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zlib
from concurrent.futures import Future, as_completed
from pathlib import Path

import pytest

import compart
from compart import CompartmentDied, CompartmentTimeout, Outcome, Policy, PolicyError, Sandboxed, sandboxed

pytestmark = pytest.mark.usefixtures("leak_check")


def add(a, b=10):
    """Adds."""
    return a + b


def forked(function):
    """Whether a function runs in a process of its own."""
    return function() != os.getpid()


# ----------------------------------------------------------------------------------------------------- what can be sandboxed


def test_a_function_of_a_module():
    assert sandboxed(add)(1) == 11


def test_a_lambda():
    assert sandboxed(lambda x: x + 1)(1) == 2


def test_a_closure_sees_what_it_closes_over_as_it_is_at_the_call():
    counted = [1]
    f = sandboxed(lambda: list(counted))
    assert f() == [1]
    counted.append(2)
    assert f() == [1, 2]


def test_a_function_of_a_function():
    def outer(n):
        def inner():
            return n * 2

        return inner

    assert sandboxed(outer(21))() == 42


def test_a_partial():
    assert sandboxed(functools.partial(add, 1, b=5))() == 6
    assert sandboxed(functools.partial(add, b=5))(2) == 7


def test_a_callable_object():
    class Adder:
        def __init__(self, n):
            self.n = n

        def __call__(self, x):
            return x + self.n

    assert sandboxed(Adder(3))(4) == 7


def test_a_function_in_c():
    assert sandboxed(zlib.decompress)(zlib.compress(b"data")) == b"data"
    assert sandboxed(len)([1, 2, 3]) == 3
    assert sandboxed(str.upper)("a") == "A"
    assert sandboxed("a-b".split)("-") == ["a", "b"]


def test_a_bound_method():
    class Counter:
        def __init__(self):
            self.n = 1

        def grow(self, by):
            self.n += by
            return self.n

    counter = Counter()
    assert sandboxed(counter.grow)(5) == 6
    assert counter.n == 1


class Methods:
    factor = 3

    def __init__(self, n):
        self.n = n

    @sandboxed
    def times(self, x, *, plus=0):
        return self.n * x + plus

    @staticmethod
    @sandboxed
    def static(x):
        return x + 1

    @classmethod
    @sandboxed(timeout=5)
    def by_class(cls, x):
        return cls.factor * x

    @property
    @sandboxed
    def doubled(self):
        return self.n * 2


class More(Methods):
    factor = 5


def test_the_decorator_works_in_a_class():
    made = Methods(2)
    assert made.times(4) == 8
    assert made.times(4, plus=1) == 9
    assert Methods.times(made, 4) == 8
    assert made.doubled == 4
    assert made.times.options(timeout=5)(3) == 6
    assert made.times.run(3).value == 6
    assert made.times.submit(3).result() == 6


def test_static_and_class_methods_above_the_decorator():
    assert Methods.static(1) == Methods(0).static(1) == 2
    assert Methods.by_class(2) == Methods(0).by_class(2) == 6
    assert More.by_class(2) == More(0).by_class(2) == 10


@pytest.mark.parametrize("kind", [classmethod, staticmethod])
def test_static_and_class_methods_beneath_the_decorator_are_told(kind, no_fork):
    with pytest.raises(PolicyError, match=f"@sandboxed on a {kind.__name__}; write @{kind.__name__} above @sandboxed"):

        class Wrong:
            @sandboxed
            @kind
            def method(x):
                return x


def test_two_methods_of_two_objects_do_not_mix():
    one, two = Methods(1), Methods(2)
    first, second = one.times, two.times
    assert (first(10), second(10)) == (10, 20)


def test_every_form_of_the_decorator():
    @sandboxed
    def bare():
        return os.getpid()

    @sandboxed()
    def called():
        return os.getpid()

    @sandboxed(timeout=5, memory="512M")
    def with_fields():
        return os.getpid()

    @sandboxed(Policy(timeout=6))
    def with_policy():
        return os.getpid()

    @sandboxed(Policy(timeout=6), memory="128M")
    def with_both():
        return os.getpid()

    for function in (
        bare,
        called,
        with_fields,
        with_policy,
        with_both,
        sandboxed(os.getpid),
        sandboxed(os.getpid, timeout=1),
    ):
        assert isinstance(function, Sandboxed)
        assert forked(function)
    assert not forked(os.getpid)
    assert with_fields.policy == Policy(timeout=5, memory="512M")
    assert with_both.policy == Policy(timeout=6, memory="128M")


def test_sandboxing_twice_is_once():
    twice = sandboxed(sandboxed(add), timeout=3)
    assert twice(1) == 11
    assert twice.__wrapped__ is add


def test_it_looks_like_the_function_it_stands_for():
    f = sandboxed(add)
    assert (f.__name__, f.__qualname__, f.__doc__, f.__module__) == ("add", "add", "Adds.", __name__)
    assert inspect.signature(f) == inspect.signature(add)
    assert f.__wrapped__ is add
    assert not forked(sandboxed(os.getpid).__wrapped__)
    assert repr(f) == "<sandboxed add>"


def test_a_plain_function_may_call_one_at_every_level():
    double = sandboxed(lambda x: x * 2)

    def power(n):
        return 1 if n == 0 else double(power(n - 1))

    assert power(5) == 32


def test_arguments_of_every_kind():
    @sandboxed
    def told(a, /, b, *rest, c=3, **named):
        return a, b, rest, c, named

    assert told(1, 2) == (1, 2, (), 3, {})
    assert told(1, b=2, c=4, d=5) == (1, 2, (), 4, {"d": 5})
    assert told(1, 2, 3, 4) == (1, 2, (3, 4), 3, {})


def test_arguments_need_not_be_plain_values():
    class Anything:
        def __init__(self):
            self.inner = threading.Lock()

        def __reduce__(self):
            raise TypeError("cannot be pickled")

    assert sandboxed(lambda thing: type(thing.inner).__name__)(Anything()) == "lock"


# -------------------------------------------------------------------------------------------------------- other ways to call


def test_options_make_another_and_leave_the_first():
    f = sandboxed(add, timeout=5)
    other = f.options(timeout=7, memory="64M")
    assert (f.policy.timeout, other.policy.timeout, other.policy.memory) == (5, 7, 64 << 20)
    assert other(1) == 11
    assert f.options(Policy(timeout=9)).policy == Policy(timeout=9)
    assert f.options(Policy(timeout=9), cpu=2).policy == Policy(timeout=9, cpu=2)


def test_run_gives_everything():
    @sandboxed
    def speaks():
        print("out")
        print("err", file=sys.stderr)
        os.write(1, b"raw\n")
        return 5

    outcome = speaks.run()
    assert isinstance(outcome, Outcome)
    assert outcome.value == 5
    assert sorted(outcome.stdout.split()) == ["out", "raw"]
    assert outcome.stderr == "err\n"
    assert outcome.usage.wall > 0
    assert outcome.usage.max_rss > 1_000_000
    assert outcome.violations == ()
    assert outcome.enforcement == compart.enforcement() == speaks.enforcement()


def test_run_raises_as_a_call_does():
    with pytest.raises(ZeroDivisionError):
        sandboxed(lambda: 1 / 0).run()


def test_submit_gives_a_future():
    f = sandboxed(lambda x: (time.sleep(0.01), x * x)[1])
    futures = [f.submit(n) for n in range(10)]
    assert all(isinstance(future, Future) for future in futures)
    assert sorted(future.result(timeout=30) for future in as_completed(futures)) == [n * n for n in range(10)]
    assert isinstance(sandboxed(lambda: 1 / 0).submit().exception(timeout=30), ZeroDivisionError)
    assert isinstance(sandboxed(lambda: time.sleep(60), timeout=0.1).submit().exception(timeout=30), CompartmentTimeout)


def test_submit_tells_mistakes_at_once(no_fork):
    with pytest.raises(TypeError, match="missing a required argument"):
        sandboxed(add).submit()


VARIABLE = contextvars.ContextVar("VARIABLE", default="default")


@pytest.fixture
def variable():
    token = VARIABLE.set("set")
    yield VARIABLE
    VARIABLE.reset(token)


def test_context_variables_come_along(variable):
    assert sandboxed(variable.get)() == "set"


def test_context_variables_come_along_to_another_thread(variable):
    assert sandboxed(variable.get).submit().result() == "set"


# ----------------------------------------------------------------------------------------------------------- inside it


def test_each_call_is_a_new_process():
    f = sandboxed(os.getpid)
    assert len({f(), f(), f(), os.getpid()}) == 4


def test_nothing_that_is_changed_inside_stays():
    state = {"n": 0}

    @sandboxed
    def changes():
        state["n"] += 1
        sys.path.append("/nowhere")
        os.environ["LEFT"] = "behind"
        random.seed(1)
        return state["n"]

    assert [changes(), changes()] == [1, 1]
    assert state == {"n": 0}
    assert "/nowhere" not in sys.path
    assert "LEFT" not in os.environ


def test_the_environment_is_empty_but_for_what_the_policy_gives(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_HOST", "x")

    def environment():
        import ctypes

        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_char_p
        return dict(os.environ), getenv(b"SECRET_OF_THE_HOST"), getenv(b"GIVEN")

    assert environment()[1] == b"x"
    assert sandboxed(environment)() == ({}, None, None)
    assert sandboxed(environment, env={"GIVEN": "ü=1"})() == ({"GIVEN": "ü=1"}, None, "ü=1".encode())
    assert os.environ["SECRET_OF_THE_HOST"] == "x"


def test_standard_input_is_at_its_end():
    assert sandboxed(lambda: (sys.stdin.read(), os.read(0, 10)))() == ("", b"")


def test_random_numbers_are_not_those_of_the_last_call():
    random.seed(5)
    f = sandboxed(lambda: (random.random(), os.urandom(8)))
    assert f()[0] != f()[0]


def test_handlers_of_the_host_do_not_run_inside():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        # Without a listener nobody can see that the signal is for itself, and it is refused.
        ends = CompartmentDied if compart.enforcement()["listener"].up else PermissionError
        with pytest.raises(ends):
            sandboxed(lambda: os.kill(os.getpid(), signal.SIGUSR1))()
        assert heard == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_signals_that_the_host_blocks_are_not_blocked_inside():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        assert sandboxed(lambda: [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])])() == []
        assert signal.SIGUSR2 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_threads_run_inside():
    @sandboxed
    def threaded():
        results = []
        threads = [threading.Thread(target=lambda n=n: results.append(n * n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(results), threading.current_thread() is threading.main_thread(), threading.active_count()

    assert threaded() == ([n * n for n in range(8)], True, 1)


def test_blas_works_inside_after_it_worked_outside():
    numpy = pytest.importorskip("numpy")
    square = numpy.ones((300, 300))
    assert (square @ square)[0, 0] == 300
    assert sandboxed(lambda: (square @ square).sum().item(), timeout=30)() == 300**3


def test_a_sandboxed_call_inside_a_compartment_is_told_with_its_remedy():
    inner = sandboxed(lambda: 1)

    @sandboxed
    def nested():
        return inner()

    with pytest.raises(
        compart.CompartError, match=r"a compartment makes no compartments; call .*__wrapped__"
    ) as caught:
        nested()
    assert not isinstance(caught.value, compart.ViolationError)
    assert sandboxed(lambda: inner.__wrapped__())() == 1


# ------------------------------------------------------------------------------------------ the host stays as it was: children


@pytest.fixture
def sleeping():
    """A compartment that runs while the test does."""

    @sandboxed
    def ticks():
        while True:
            yield os.getpid()

    with ticks() as stream:
        assert next(stream) != os.getpid()
        yield stream


def test_no_child_signal_reaches_the_application():
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    try:
        assert sandboxed(add)(1) == 11
        with pytest.raises(CompartmentDied):
            sandboxed(lambda: os._exit(3))()
        assert heard == []
        subprocess.run([sys.executable, "-c", ""], check=True)
        assert heard == [signal.SIGCHLD]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_it_works_while_the_application_ignores_its_children():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert sandboxed(add)(1) == 11
        with pytest.raises(CompartmentDied) as caught:
            sandboxed(lambda: os._exit(3))()
        assert caught.value.exit_code == 3
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_the_application_never_waits_for_a_compartment(sleeping):
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    with pytest.raises(ChildProcessError):
        os.waitpid(0, os.WNOHANG)
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
    assert next(sleeping) > 0


def test_an_application_that_waits_for_all_its_children_finds_its_own(sleeping):
    child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", ""])
    assert os.waitpid(-1, 0) == (child, 0)
    with pytest.raises(ChildProcessError):
        os.wait()
    assert next(sleeping) > 0


def test_an_application_that_reaps_in_its_handler_takes_no_answer_away():
    def reap(number, frame):
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    return
            except ChildProcessError:
                return

    before = signal.signal(signal.SIGCHLD, reap)
    try:
        for n in range(5):
            assert sandboxed(add)(n) == n + 10
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_processes_of_the_application_still_work(sleeping):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print('said'); sys.exit(3)"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "said\n")
    with os.popen("echo piped") as said:
        assert said.read() == "piped\n"
    assert sandboxed(add)(1) == 11


def test_a_process_of_the_application_keeps_nothing_of_a_compartment_open():
    def inherited():
        program = "import os; print(os.listdir('/proc/self/fd'))"
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, close_fds=False).stdout

    @sandboxed
    def ticks():
        while True:
            yield os.getpid()

    before = inherited()
    with ticks() as stream:
        assert next(stream) != os.getpid()
        assert inherited() == before


# ------------------------------------------------------------------------------------------ the host stays as it was: threads


def in_a_thread(function, *args):
    """What a function returns or raises when another thread calls it."""
    result = []

    def runs():
        try:
            result.append((function(*args), None))
        except BaseException as error:
            result.append((None, error))

    thread = threading.Thread(target=runs)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None:
        raise error
    return value


def test_it_works_from_any_thread():
    assert in_a_thread(sandboxed(add), 1) == 11
    with pytest.raises(ZeroDivisionError):
        in_a_thread(sandboxed(lambda: 1 / 0))
    with pytest.raises(CompartmentTimeout):
        in_a_thread(sandboxed(lambda: time.sleep(60), timeout=0.1))
    assert in_a_thread(sandboxed(lambda: threading.current_thread() is threading.main_thread())) is True


def test_a_stream_outlives_the_thread_that_started_it():
    @sandboxed
    def counts():
        yield from range(100)

    stream = in_a_thread(lambda: iter(counts()))
    assert list(stream) == list(range(100))


def test_it_works_from_many_threads_at_once():
    f = sandboxed(lambda n: n * n)
    results = [[] for _ in range(6)]

    def calls(mine, n):
        for k in range(5):
            mine.append(f(n * 10 + k))

    threads = [threading.Thread(target=calls, args=(results[n], n)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[(n * 10 + k) ** 2 for k in range(5)] for n in range(6)]


def test_it_works_while_other_threads_are_busy_and_warns_of_nothing():
    stop = threading.Event()

    def busy():
        while not stop.is_set():
            # Every lock that a fork may find held: of malloc, of imports, of output.
            sorted(str(n) * 10 for n in range(1000))
            zlib.compress(bytes(100_000))

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [sandboxed(add)(n) for n in range(20)] == [n + 10 for n in range(20)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# ------------------------------------------------------------------------------------ the host stays as it was: descriptors


def test_a_file_with_a_number_among_those_used_inside(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"content")
    read = sandboxed(lambda *files: [f.read() for f in files])
    with open(path, "rb") as low:
        for number in (480, 481, 482, 483, 512, 513, 600):
            made = fcntl.fcntl(low.fileno(), fcntl.F_DUPFD_CLOEXEC, number)
            with os.fdopen(made, "rb") as high:
                assert made >= number
                assert read(high) == [b"content"]
                low.seek(0)
                assert read(low, high) == [b"content", b"content"]
                low.seek(0)


WITH_COMPART = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(compart.__file__).parents[1]), *sys.path])}


def run(program, *arguments, **options):
    """A Python program of its own."""
    options = {"capture_output": True, "text": True, "timeout": 60, "env": WITH_COMPART} | options
    return subprocess.run([sys.executable, "-W", "error", *arguments], input=textwrap.dedent(program), **options)


def test_a_host_whose_limit_on_open_files_is_low():
    program = """
        import resource
        from compart import sandboxed
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        assert sandboxed(lambda f: f.read(6))(open("/etc/passwd", "rb")) == open("/etc/passwd", "rb").read(6)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (64, hard)
        print("done")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n", done.stderr


def test_a_host_whose_hard_limit_on_open_files_is_too_low_is_told():
    program = """
        import resource
        from compart import UnsupportedError, sandboxed
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        try:
            sandboxed(lambda: 1)()
        except UnsupportedError as error:
            print(error)
    """
    assert "hard limit on open files is 256" in run(program, "-").stdout
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 256


def test_a_host_without_standard_streams(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from compart import sandboxed\n"
        f"out = open({str(tmp_path / 'out')!r}, 'w')\n"
        "outcome = sandboxed(lambda x: print('inside') or x + 1).run(1)\n"
        "out.write(repr((outcome.value, outcome.stdout)))\n"
        "out.close()\n"
    )
    subprocess.run(
        ["sh", "-c", f'exec "{sys.executable}" "{script}" <&- >&- 2>&-'], timeout=60, check=True, env=WITH_COMPART
    )
    assert (tmp_path / "out").read_text() == "(2, 'inside\\n')"


# ---------------------------------------------------------------------------------------------------- however it was started


SCRIPT = """
import atexit, sys
from compart import sandboxed

atexit.register(print, "at exit")
print("said before", end=" ")

class Local:
    n = 1

@sandboxed
def f(x):
    return [x + Local.n, __name__]

print(f(1), sandboxed(lambda: 5)())
"""

SAID = "said before [2, '__main__'] 5\nat exit\n"


def test_in_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run("", str(script))
    assert (done.stdout, done.stderr, done.returncode) == (SAID, "", 0)


def test_in_a_script_with_output_to_a_file(tmp_path):
    # What the host has buffered is written once, by the host.
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    with open(out, "w") as file:
        run("", str(script), capture_output=False, stdout=file)
    assert out.read_text() == SAID


def test_from_standard_input():
    done = run(SCRIPT, "-")
    assert (done.stdout, done.stderr, done.returncode) == (SAID, "", 0)


def test_from_the_command_line():
    done = run("", "-c", SCRIPT)
    assert (done.stdout, done.stderr, done.returncode) == (SAID, "", 0)


def test_from_a_module(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(SCRIPT)
    done = run("", "-m", "package", cwd=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (SAID, "", 0)


def test_in_an_interactive_session():
    leader, follower = pty.openpty()
    session = subprocess.Popen(
        [sys.executable, "-W", "error", "-q", "-i"],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env={**WITH_COMPART, "TERM": "dumb", "PYTHON_BASIC_REPL": "1"},
    )  # fmt: skip
    os.close(follower)
    try:
        for line in (
            "from compart import sandboxed",
            "y = 20",
            "f = sandboxed(lambda x: x * 2 + y)",
            "'<' + str(f(11)) + '>'",
        ):
            os.write(leader, line.encode() + b"\n")
        assert b"'<42>'" in read_until(leader, b"'<42>'")
        os.write(leader, b"sandboxed(lambda: 1 / 0)()\n")
        assert b"ZeroDivisionError" in read_until(leader, b"ZeroDivisionError: division by zero\r\n>>> ")
        os.write(leader, b"'after ' + 'wards'\n")
        assert b"'after wards'" in read_until(leader, b"'after wards'")
        os.write(leader, b"exit()\n")
        assert session.wait(timeout=20) == 0
    finally:
        session.kill()
        session.wait()
        os.close(leader)


def read_until(descriptor, wanted, most=30.0):
    """What a terminal shows until `wanted` is there."""
    seen, end = b"", time.monotonic() + most
    while wanted not in seen:
        left = end - time.monotonic()
        assert left > 0, seen
        if select.select([descriptor], [], [], left)[0]:
            seen += os.read(descriptor, 4096)
    return seen


def test_in_a_forked_process_of_the_application():
    reader, writer = os.pipe()
    sandboxed(add)(1)
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, repr(sandboxed(add)(5)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.read() == "15"
    assert os.waitpid(child, 0) == (child, 0)


# ---------------------------------------------------------------------------------------------------- mistakes, before a fork


@pytest.mark.parametrize(
    ("arguments", "named", "told"),
    [
        ((), {}, r"add\(\) missing a required argument: 'a'"),
        ((1, 2, 3), {}, r"add\(\) too many positional arguments"),
        ((1,), {"c": 2}, r"add\(\) got an unexpected keyword argument 'c'"),
        ((1,), {"a": 2}, r"add\(\) multiple values for argument 'a'"),
    ],
)
def test_arguments_that_do_not_fit_are_told(arguments, named, told, no_fork):
    with pytest.raises(TypeError):
        add(*arguments, **named)
    with pytest.raises(TypeError, match=told) as caught:
        sandboxed(add)(*arguments, **named)
    assert not isinstance(caught.value, compart.CompartError)


@pytest.mark.parametrize("thing", [3, "name", [add], object()])
def test_what_cannot_be_called_is_told(thing, no_fork):
    with pytest.raises(PolicyError, match=r"cannot be called; sandboxed\(\) takes a function"):
        sandboxed(thing)


def test_a_class_is_told(no_fork):
    with pytest.raises(PolicyError, match=r"@sandboxed on the class .*Parser; decorate its methods"):

        @sandboxed
        class Parser:
            pass


@pytest.mark.parametrize(
    ("field", "hint"),
    [("timout", "timeout"), ("memmory", "memory"), ("grant", "grants"), ("on_violations", "on_violation")],
)
def test_a_field_that_does_not_exist_is_told_with_the_one_that_does(field, hint, no_fork):
    for form in (
        lambda: sandboxed(**{field: 1}),
        lambda: sandboxed(add, **{field: 1}),
        lambda: sandboxed(Policy(), **{field: 1}),
        lambda: sandboxed(add).options(**{field: 1}),
        lambda: Policy().replace(**{field: 1}),
    ):
        with pytest.raises(PolicyError, match=rf"a policy has no '{field}'; did you mean '{hint}'\?"):
            form()


def test_a_policy_in_the_wrong_place_is_told(no_fork):
    with pytest.raises(PolicyError):
        sandboxed({"timeout": 1})
    with pytest.raises(PolicyError):
        sandboxed(add).options({"timeout": 1})


def test_a_module_to_preload_that_does_not_exist_is_told(no_fork):
    with pytest.raises((PolicyError, ImportError), match="no_such_module"):
        sandboxed(add, preload=["no_such_module"])(1)


def test_a_warm_function_that_fails_is_told(no_fork):
    with pytest.raises(ZeroDivisionError):
        sandboxed(add, warm=lambda: 1 / 0)(1)


def test_what_is_warmed_is_warm_once():
    warmed = []
    f = sandboxed(lambda: list(warmed), warm=lambda: warmed.append(os.getpid()))
    assert f() == f() == [os.getpid()]


def test_processes_inside_are_not_supported_and_that_is_told(no_fork):
    with pytest.raises(compart.UnsupportedError, match=r"processes=2: .*use processes=0"):
        sandboxed(add, processes=2)(1)


def test_these_tests_would_see_a_fork():
    from compart.backend.linux import _sys

    forks = []
    really = _sys.fork
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sys, "fork", lambda *args, **kwargs: forks.append(1) or really(*args, **kwargs))
        assert sandboxed(add)(1) == 11
    assert forks == [1]
