"""What compart promises without a grant holds on machines that have less: in Docker, without Landlock, without namespaces,
under another supervisor, as an ordinary user. What such a machine cannot do is an error that names it.

The tests of this file speak of the machine they run on. `test_all_of_it_holds` runs them again, and other files' core
tests with them, in processes for which tests/replay.py makes the machine poorer.
"""

import asyncio
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import compart
from compart import Directory, NotCapableError, UnsupportedError, ViolationError, grant, sandboxed
from compart.policy import WALLS

ROOT = Path(__file__).parents[2]
HERE = os.environ.get("COMPART_UNDER", "")
"""The profiles of tests/replay.py that this process is under, as the outer process says."""

LACKING = {"docker": "namespaces", "no-namespaces": "namespaces", "no-landlock": "landlock", "no-listener": "listener"}
UP = compart.enforcement().up


def denied(inside: Any, *args: Any) -> Any:
    return sandboxed(on_violation="deny", timeout=20)(inside)(*args)


# ---- which walls there are -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HERE, reason="speaks of the profiles")
def test_the_walls_that_are_missing_are_told() -> None:
    wanted = {LACKING[profile] for profile in HERE.split(",")}
    told = compart.enforcement()
    assert wanted <= told.missing
    assert all(told[name].detail for name in WALLS)
    assert "MISSING" in str(told)


def test_the_walls_that_nothing_can_do_without_are_up() -> None:
    assert {"rlimits", "no_new_privs", "capabilities", "descriptors", "shared_memory", "seccomp"} <= UP
    assert {wall.name for wall in compart.enforcement().walls} == set(WALLS)


# ---- what holds everywhere -------------------------------------------------------------------------------------------------


PATHS = {
    "opens": lambda path: open(path, "rb").close(),
    "opens_for_writing": lambda path: open(path, "r+b").close(),
    "makes": lambda path: open(path + ".new", "w").close(),
    "asks_about": os.stat,
    "asks_about_the_link": os.lstat,
    "asks_for_access_to": lambda path: None if os.access(path, os.R_OK) else refuse(),
    "lists_the_directory_of": lambda path: os.listdir(os.path.dirname(path)),
    "changes_to_the_directory_of": lambda path: os.chdir(os.path.dirname(path)),
    "removes": os.unlink,
    "renames": lambda path: os.rename(path, path + ".new"),
    "links_to": lambda path: os.link(path, path + ".new"),
    "makes_a_symbolic_link_beside": lambda path: os.symlink(path, path + ".new"),
    "makes_a_directory_beside": lambda path: os.mkdir(path + ".new"),
    "makes_executable": lambda path: os.chmod(path, 0o777),
    "cuts": lambda path: os.truncate(path, 0),
    "asks_for_extended_attributes_of": os.listxattr,
    "asks_for_the_file_system_of": os.statvfs,
}


def refuse() -> None:
    raise PermissionError(errno.EPERM, "no access")


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file that everybody may do everything with."""
    monkeypatch.chdir(ROOT)
    directory = tempfile.mkdtemp()
    os.chmod(directory, 0o777)
    file = Path(directory, "file")
    file.write_bytes(b"content")
    file.chmod(0o666)
    yield str(file)
    shutil.rmtree(directory)


@pytest.mark.parametrize("how", PATHS.values(), ids=PATHS)
def test_no_path_is_reached_by_one_that(how: Any, path: str) -> None:
    with pytest.raises(PermissionError) as caught:
        denied(how, path)
    assert caught.value.errno == errno.EPERM
    with pytest.raises(PermissionError) as missing:
        denied(how, path + ".not/there")
    # Not even whether it exists can be told.
    assert (missing.value.errno, missing.value.strerror) == (caught.value.errno, caught.value.strerror)
    assert Path(path).read_bytes() == b"content"
    assert sorted(os.listdir(os.path.dirname(path))) == ["file"]
    # Outside it gets through: nothing but compart stood in the way.
    how(path)


CALLS = {
    "makes_a_socket": lambda: socket.socket().close(),
    "makes_a_unix_socket": lambda: socket.socket(socket.AF_UNIX).close(),
    "forks": lambda: os._exit(0) if os.fork() == 0 else None,
    "starts_a_program": lambda: subprocess.run(["/bin/true"], check=True),
    "becomes_a_program": lambda: os.execv("/bin/true", ["true"]),
    "signals_the_host": lambda: os.kill(os.getppid(), 0),
    "signals_everybody": lambda: os.kill(-1, 0),
    "takes_priority": lambda: os.nice(1),
    "makes_memory_with_a_name": lambda: os.close(os.memfd_create("x")),
}


@pytest.mark.parametrize("how", CALLS.values(), ids=CALLS)
def test_nothing_is_reached_by_one_that(how: Any) -> None:
    with pytest.raises(PermissionError):
        denied(how)


def test_a_refusal_fails_the_call_where_it_can_be_told() -> None:
    def hides() -> str:
        try:
            os.stat("/etc")
        except PermissionError:
            return "refused"
        return "told"

    if "listener" in UP:
        with pytest.raises(ViolationError, match="/etc"):
            sandboxed(hides)()
        with pytest.raises(ViolationError, match="/etc"):
            sandboxed(hides, on_violation="kill")()
    else:
        assert sandboxed(hides)() == "refused"
    assert sandboxed(hides, on_violation="deny")() == "refused"


def test_it_is_nobody_with_nothing() -> None:
    def looks() -> tuple[bytes, int, dict[str, str]]:
        return os.read(0, 1), len(open_descriptors()), dict(os.environ)

    def open_descriptors() -> list[int]:
        found = []
        for number in range(1024):
            try:
                os.fstat(number)
                found.append(number)
            except OSError:
                continue
        return found

    read, opened, environment = denied(looks)
    assert (read, opened <= 6, environment) == (b"", True, {})


# ---- what works everywhere ---------------------------------------------------------------------------------------------------


def test_plain_and_big_values_come_back() -> None:
    value = [None, 1, "two", b"three", {"four": (5.0, {6})}, bytes(300_000)]
    assert sandboxed(lambda: value)() == value
    assert bytes(sandboxed(lambda: memoryview(b"x" * 300_000))()) == b"x" * 300_000


def test_streams_and_awaited_calls_work() -> None:
    assert list(sandboxed(lambda: (yield from range(5)))()) == [0, 1, 2, 3, 4]
    assert asyncio.run(sandboxed(lambda: 5).aio()) == 5


def test_an_open_file_is_exactly_that_file(path: str) -> None:
    def reads(file: Any) -> tuple[bytes, str]:
        content = file.read()
        try:
            os.write(file.fileno(), b"x")
        except OSError as error:
            return content, type(error).__name__
        return content, "wrote"

    with open(path, "rb") as file:
        assert sandboxed(reads, on_violation="deny")(file)[0] == b"content"
        assert sandboxed(reads, on_violation="deny")(file)[1] in ("PermissionError", "OSError")
    assert Path(path).read_bytes() == b"content"
    with open(path, "r+b") as file:
        sandboxed(lambda file: file.write(b"changed"))(file)
    assert Path(path).read_bytes() == b"changed"


def test_a_compartment_that_dies_tells_how() -> None:
    with pytest.raises(compart.CompartmentDied) as caught:
        sandboxed(lambda: os._exit(3))()
    assert caught.value.exit_code == 3
    with pytest.raises(compart.CompartmentTimeout):
        sandboxed(lambda: signal.pause(), timeout=0.1)()


# ---- what needs a wall that may be missing ----------------------------------------------------------------------------------


def grants_of(path: str) -> dict[str, Any]:
    return {
        "file": grant.file(path),
        "directory": grant.directory(os.path.dirname(path)),
    }


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_path_grant_works_or_names_the_namespaces(kind: str, path: str) -> None:
    def reads() -> bytes:
        with open(path, "rb") as file:
            return file.read()

    call = sandboxed(reads, grants=[grants_of(path)[kind]])
    if "namespaces" in UP:
        assert call() == b"content"
        with pytest.raises(OSError) as caught:
            sandboxed(grants=[grants_of(path)[kind]], on_violation="deny")(lambda: open(path, "r+b").close())()
        assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.EROFS)
        return
    with pytest.raises(UnsupportedError) as caught:
        call()
    assert caught.value.mechanism == "namespaces"
    assert caught.value.reason
    assert caught.value.advice


def test_a_directory_works_or_names_the_namespaces(path: str) -> None:
    def reads(directory: Directory) -> tuple[bytes, list[str]]:
        with directory.open("file", "rb") as file:
            return file.read(), sorted(directory.iterdir())

    with Directory(os.path.dirname(path)) as directory:
        if "namespaces" in UP:
            assert sandboxed(reads)(directory) == (b"content", ["file"])
            return
        with pytest.raises(UnsupportedError) as caught:
            sandboxed(reads)(directory)
        assert caught.value.mechanism == "namespaces"
        # In the host it works all the same.
        assert sorted(directory.iterdir()) == ["file"]
        with pytest.raises(NotCapableError):
            directory.open("file", "w")


def test_counting_threads_works_or_names_the_listener() -> None:
    call = sandboxed(lambda: 5, threads=2)
    if "listener" in UP:
        assert call() == 5
        return
    with pytest.raises(UnsupportedError) as caught:
        call()
    assert caught.value.mechanism == "listener"
    assert sandboxed(lambda: 5, threads=2, waive={"listener"})() == 5


# ---- all of it again, elsewhere ------------------------------------------------------------------------------------------------

PROFILES = {
    "docker": ("docker", None),
    "no-landlock": ("no-landlock", None),
    "no-namespaces": ("no-namespaces", None),
    "no-listener": ("no-listener", None),
    "docker_as_a_user": ("docker", 65534),
    "with_nothing_as_a_user": ("docker,no-landlock,no-listener", 65534),
}

CORE = [
    "test_under.py",
    "test_secret.py",
    "test_limits.py::test_a_call_that_takes_too_long_is_a_timeout",
    "test_limits.py::test_the_timeout_ends_a_call_that",
    "test_limits.py::test_a_call_that_computes_too_long_names_the_cpu_limit",
    "test_limits.py::test_one_block_that_is_too_large_meets_the_memory_limit",
    "test_limits.py::test_more_open_files_than_allowed_is_an_error_that_names_the_limit",
    "test_limits.py::test_a_result_that_is_too_large_names_the_limit",
    "test_limits.py::test_output_is_captured",
    "test_limits.py::test_output_may_be_inherited",
]

# As another user, with the interpreter in a place that only root may enter: a mount namespace of its own, in which the
# first closed directory on the way holds the interpreter and nothing else.
LAUNCH = """
import ctypes, os, sys
from pathlib import Path
home = Path(sys.base_prefix).resolve()
closed = next((part for part in [*reversed(home.parents), home] if not part.stat().st_mode & 1), None)
if closed is not None:
    libc = ctypes.CDLL(None, use_errno=True)
    def checked(result):
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    checked(libc.unshare(0x20000))  # CLONE_NEWNS
    checked(libc.mount(None, b"/", None, 0x44000, None))  # MS_REC | MS_PRIVATE
    held = os.open(home, os.O_PATH)
    checked(libc.mount(b"tmpfs", bytes(closed), b"tmpfs", 0, b"mode=755"))
    home.mkdir(parents=True, exist_ok=True)
    checked(libc.mount(b"/proc/self/fd/%d" % held, bytes(home), None, 0x5000, None))  # MS_REC | MS_BIND
os.execv(sys.executable, [sys.executable, "-m", "tests.replay", *sys.argv[1:]])
"""


def under(profiles: str, user: int | None, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python under these profiles, as this user."""
    replay = [sys.executable, "-m", "tests.replay", profiles]
    if user is not None:
        replay = [sys.executable, "-c", LAUNCH, profiles, "--user", str(user)]
    environment = {"PATH": os.defpath, "COMPART_UNDER": profiles, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [*replay, "--", sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


def core_under(profiles: str, user: int | None) -> tuple[int, str]:
    """Run the core there: the exit code and what pytest said; or a negative code and why it cannot be done here."""
    if user is not None:
        if os.geteuid() != 0:
            return -1, "only root can become another user"
        probe = under(profiles, user, "-c", "import compart, pytest, numpy")
        if probe.returncode:
            return -1, f"user {user} cannot run this interpreter: {probe.stdout.strip().splitlines()[-1]}"
    core = [f"tests/process/{name}" for name in CORE + (["test_calls.py"] if "," in profiles else [])]
    # A directory that any user may write to.
    scratch = tempfile.mkdtemp()
    os.chmod(scratch, 0o777)
    try:
        options = ["-p", "no:cacheprovider", f"--basetemp={scratch}/pytest", "--tb=short"]
        done = under(profiles, user, "-m", "pytest", *options, *core)
        return done.returncode, done.stdout
    finally:
        shutil.rmtree(scratch)


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, Future[tuple[int, str]]]]:
    """The core under every profile, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(core_under, *profile) for name, profile in PROFILES.items()}


@pytest.mark.skipif(bool(HERE), reason="is inside already")
@pytest.mark.parametrize("name", PROFILES)
def test_all_of_it_holds(name: str, runs: dict[str, Future[tuple[int, str]]]) -> None:
    code, said = runs[name].result()
    if code < 0:
        pytest.skip(said)
    assert code == 0, said[-6000:]
    assert " passed" in said


@pytest.mark.skipif(bool(HERE), reason="is inside already")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_it_holds_as_a_user_who_was_root_before() -> None:
    """A service that starts as root, imports everything and then steps down."""
    script = """
        import os, sys
        import compart
        from compart import sandboxed
        from tests import replay
        assert sandboxed(lambda: os.getuid())() == 0
        replay.become(65534)
        def refused(path):
            try:
                os.stat(path)
            except PermissionError as error:
                return error.errno
        assert sandboxed(os.getuid)() == 65534
        assert sandboxed(refused, on_violation="deny")("/etc/passwd") == 1
        assert sandboxed(refused, on_violation="deny")("/nowhere") == 1
        try:
            sandboxed(refused)("/etc/passwd")
        except compart.ViolationError:
            print("held")
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "held\n", "")
