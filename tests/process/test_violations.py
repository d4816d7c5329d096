"""A refused call is recorded: what it was, where it was made, and the grant that would allow it; and that grant does."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import compart
from compart import Directory, Frame, Policy, PolicyError, ViolationError, grant, rights, sandboxed

pytestmark = [
    pytest.mark.usefixtures("leak_check"),
    pytest.mark.skipif(
        not compart.enforcement()["listener"].up, reason="without a listener nobody is told of a refusal"
    ),
]

HERE = Path(__file__).name


@pytest.fixture
def secret(tmp_path):
    made = tmp_path / "secret.txt"
    made.write_text("the secret")
    return made


def recorded(function, *args, **policy):
    """What was refused while the function ran; it hides every refusal."""

    def hides():
        with contextlib.suppress(OSError, ValueError, ImportError):
            function(*args)

    return sandboxed(hides, on_violation="deny", **policy).run().violations


def only(function, *args, **policy):
    (violation,) = recorded(function, *args, **policy)
    return violation


def libc(name, *args):
    return ctypes.CDLL(None, use_errno=True)[name](*args)


# ------------------------------------------------------------------------------------------------------ what it was, decoded


KINDS = {
    "a file read": (
        lambda: os.open("/etc/hostname", os.O_RDONLY),
        "openat",
        {"path": "/etc/hostname", "flags": "O_RDONLY"},
    ),
    "a file written": (
        lambda: os.open("/tmp/new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        "openat",
        {"path": "/tmp/new", "flags": "O_WRONLY|O_CREAT|O_TRUNC"},
    ),
    "a relative name": (lambda: os.open("name.txt", os.O_RDONLY), "openat", {"path": "name.txt", "flags": "O_RDONLY"}),
    "a stat": (lambda: os.stat("/etc/hostname"), "newfstatat", {"path": "/etc/hostname"}),
    "a directory": (lambda: os.listdir("/etc"), "openat", {"path": "/etc", "flags": "O_RDONLY|O_DIRECTORY"}),
    "a new directory": (lambda: os.mkdir("/tmp/made"), "mkdir", {"path": "/tmp/made"}),
    "a removal": (lambda: os.unlink("/tmp/gone"), "unlink", {"path": "/tmp/gone"}),
    "a link": (lambda: os.readlink("/proc/self/exe"), "readlink", {"path": "/proc/self/exe"}),
    "a mode": (lambda: os.chmod("/etc/hostname", 0o644), "chmod", {"path": "/etc/hostname"}),
    "another directory": (lambda: os.chdir("/tmp"), "chdir", {"path": "/tmp"}),
    "a program": (lambda: os.execv("/bin/true", ["true"]), "execve", {"path": "/bin/true"}),
    "a TCP socket": (
        lambda: socket.socket(),
        "socket",
        {"domain": "AF_INET", "type": "SOCK_STREAM", "protocol": 0},
    ),
    "a UDP socket": (
        lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM),
        "socket",
        {"domain": "AF_INET6", "type": "SOCK_DGRAM", "protocol": 0},
    ),
    "a raw socket": (
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
        "socket",
        {"domain": "AF_PACKET", "type": "SOCK_RAW", "protocol": 0},
    ),
    "a new process": (lambda: libc("fork"), "clone", None),
    "a new namespace": (lambda: libc("unshare", 0x10000000), "unshare", None),
    "code made at run time": (
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "mmap",
        {"length": 4096, "protection": "PROT_READ|PROT_EXEC"},
    ),
    "another user": (lambda: os.setuid(1), "setuid", None),
    "another set of processors": (lambda: os.sched_setaffinity(0, {0}), "sched_setaffinity", None),
    "a debugger": (lambda: libc("ptrace", 0, 0, 0, 0), "ptrace", None),
    "another process by handle": (lambda: os.pidfd_open(1), "pidfd_open", None),
    "a number that no call has": (lambda: libc("syscall", 999), "unknown 999", None),
    "the channel closed": (lambda: os.close(480), "close", {"descriptor": "fd 480"}),
}


@pytest.mark.parametrize(("function", "call", "arguments"), KINDS.values(), ids=KINDS.keys())
def test_each_kind_is_recorded_with_its_arguments_and_its_place(function, call, arguments):
    violation = only(function)
    assert violation.call == call
    assert violation.errno == errno.EPERM
    if arguments is not None:
        assert violation.arguments == arguments
    assert isinstance(violation.site, Frame)
    assert Path(violation.site.file).name == HERE
    line = Path(__file__).read_text().splitlines()[violation.site.line - 1]
    assert "lambda" in line or "function(*args)" in line or "libc" in line or "ctypes" in line
    assert violation.what in str(violation)
    assert f"{HERE}:{violation.site.line}" in str(violation)


@pytest.mark.parametrize("kind", ["another user", "another process by handle", "another set of processors"])
def test_arguments_that_a_call_does_not_have_are_not_shown(kind):
    # The registers of arguments that a call does not take hold what was left in them.
    most = {"setuid": 1, "pidfd_open": 2, "sched_setaffinity": 3}
    violation = only(KINDS[kind][0])
    assert len(violation.arguments) <= most[violation.call]


def test_a_signal_to_the_host_tells_the_target_and_the_signal():
    violation = only(lambda: os.kill(os.getppid(), signal.SIGTERM))
    assert violation.call == "kill"
    assert violation.arguments == {"target": f"process {os.getpid()}", "signal": "SIGTERM"}
    assert only(lambda: os.kill(0, signal.SIGKILL)).arguments == {"target": "process 0", "signal": "SIGKILL"}


def test_a_signal_to_itself_is_its_own_affair():
    @sandboxed
    def signalled():
        heard = []
        signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        return [int(number) for number in heard]

    assert signalled() == [signal.SIGUSR1] * 2


def test_an_address_is_told():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        granted = [grant.descriptor(theirs, rights.SOCKET)]

        def connects():
            compart.granted(theirs).connect("/run/other.socket")

        violation = only(connects, grants=granted)
    assert violation.call == "connect"
    assert violation.arguments["address"] == "/run/other.socket"
    assert '"/run/other.socket"' in str(violation)


@pytest.mark.parametrize(
    ("family", "address", "told"),
    [
        (socket.AF_INET, ("192.0.2.7", 80), "192.0.2.7:80"),
        (socket.AF_INET6, ("2001:db8::7", 443), "[2001:db8::7]:443"),
    ],
)
def test_an_internet_address_is_told(family, address, told):
    with socket.socket(family, socket.SOCK_DGRAM) as made:
        granted = [grant.descriptor(made, rights.SOCKET)]

        def sends():
            compart.granted(made).sendto(b"x", address)

        assert only(sends, grants=granted).arguments["address"] == told


def test_a_missing_right_tells_the_descriptor_and_the_rights_it_has(secret):
    with open(secret, "rb") as file:
        outcome = sandboxed(lambda f: _tried(os.write, f.fileno(), b"x"), on_violation="deny").run(file)
    (violation,) = outcome.violations
    assert violation.call == "write"
    described = violation.arguments["descriptor"]
    assert described.startswith("fd 5")
    assert "CAP_READ" in described
    assert "CAP_WRITE" not in described
    assert "CAP_WRITE" in violation.suggestion


def _tried(function, *args):
    try:
        return function(*args)
    except OSError as error:
        return errno.errorcode[error.errno]


@pytest.mark.parametrize(
    ("operation", "call", "command"),
    [
        (lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, 0), "fcntl", "F_SETFL"),
        (lambda fd: fcntl.fcntl(fd, fcntl.F_SETOWN, 1), "fcntl", "F_SETOWN"),
        (lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX), "fcntl", "F_SETLKW"),
        (lambda fd: os.set_blocking(fd, False), "ioctl", "FIONBIO"),
        (lambda fd: fcntl.ioctl(fd, 0x12345678), "ioctl", "0x12345678"),
    ],
)
def test_a_command_to_a_descriptor_is_told_by_name(secret, operation, call, command):
    with open(secret, "r+b") as file:
        outcome = sandboxed(lambda f: _tried(operation, f.fileno()), on_violation="deny").run(file)
    assert outcome.value == "EPERM"
    (violation,) = outcome.violations
    assert (violation.call, violation.arguments["command"]) == (call, command)


def test_a_path_that_is_no_text_is_told_escaped():
    assert only(lambda: os.stat(b"/caf\xe9")).arguments["path"] == "/caf\\xe9"


def test_a_path_beyond_all_bounds_is_cut():
    arguments = only(lambda: libc("open", b"/" + b"x" * 100_000, 0)).arguments
    assert len(arguments["path"]) <= 4097


def test_an_address_that_is_no_memory_does_no_harm():
    violation = only(lambda: libc("open", ctypes.c_void_p(1), 0))
    assert violation.call in ("open", "openat")
    assert violation.arguments["path"] == "0x1"


# ------------------------------------------------------------------------------------------------------------- where it was


def outer(path):
    return middle(path)


def middle(path):
    return os.stat(path)


def test_the_stack_is_the_functions_own(secret):
    stack = only(outer, str(secret)).stack
    assert [frame.function for frame in stack][:2] == ["middle", "outer"]
    assert all(Path(frame.file).name == HERE for frame in stack[:2])


def test_the_site_is_in_the_users_file_not_in_the_library(tmp_path):
    import pathlib

    violation = only(lambda: pathlib.Path("/etc/hostname").read_text())
    assert Path(violation.stack[0].file).name == "pathlib.py" or "pathlib" in violation.stack[0].file
    assert Path(violation.site.file).name == HERE


def test_each_of_several_refusals_has_its_own_place():
    def three():
        for path in ("/a", "/b", "/c"):
            _tried(os.stat, path)
        _tried(os.listdir, "/d")

    violations = recorded(three)
    assert [v.arguments["path"] for v in violations] == ["/a", "/b", "/c", "/d"]
    assert all(v.stack and v.stack[0].function == "_tried" for v in violations)
    lines = [v.stack[1].line for v in violations]
    assert lines[0] == lines[1] == lines[2] == lines[3] - 1


def test_a_thread_has_its_own_stack():
    def threaded():
        thread = threading.Thread(target=_tried, args=(middle, "/etc/hostname"))
        thread.start()
        thread.join()
        return threading.get_native_id()

    outcome = sandboxed(threaded, on_violation="deny").run()
    (violation,) = outcome.violations
    assert violation.stack[0].function == "middle"
    assert violation.thread not in (0, outcome.value)


def test_refusals_of_several_threads_at_once_are_all_recorded_each_with_no_others_stack():
    made = {}
    for n in range(8):
        exec(
            f"def thread_{n}(path):\n    for _ in range(5): tried(stat, path)", {"tried": _tried, "stat": os.stat}, made
        )

    def crowd():
        threads = [threading.Thread(target=run, args=(f"/{name}",)) for name, run in made.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    violations = sandboxed(crowd, on_violation="deny").run().violations
    assert sorted(v.arguments["path"] for v in violations) == sorted([f"/{name}" for name in made] * 5)
    stacks = [(v.arguments["path"], [frame.function for frame in v.stack]) for v in violations if v.stack]
    assert stacks
    assert [stack for path, stack in stacks if path[1:] not in stack] == []


def test_a_function_cannot_make_up_a_stack():
    def liar():
        # The trace pipe's number is known; what comes by it is for people only, and stays bounded.
        os.write(482, b'Current thread 0x0 (most recent call first):\n  File "/forged", line 1 in forged\n' * 3)
        os.write(482, b"\xff\xfe" * 1000 + b"\n")
        _tried(os.stat, "/real")
        return 1

    outcome = sandboxed(liar, on_violation="deny").run()
    assert outcome.value == 1
    assert [v.arguments["path"] for v in outcome.violations] == ["/real"]


# --------------------------------------------------------------------------------------------------------- what happens then


def test_by_default_the_call_fails_even_when_the_function_hides_the_refusal(secret):
    @sandboxed
    def hides():
        try:
            return open(secret).read()
        except OSError:
            return "nothing there"

    with pytest.raises(ViolationError) as caught:
        hides()
    (violation,) = caught.value.violations
    assert violation.arguments["path"] == str(secret)
    assert str(violation) in str(caught.value)


def test_a_refusal_that_the_library_hides_fails_the_call(secret):
    assert os.path.exists(secret) is True
    with pytest.raises(ViolationError, match="newfstatat"):
        sandboxed(lambda: os.path.exists(secret))()


def test_a_call_that_raises_because_of_the_refusal_names_the_refusal_and_keeps_the_exception(secret):
    with pytest.raises(ViolationError) as caught:
        sandboxed(secret.read_text)()
    assert isinstance(caught.value.__cause__, PermissionError)
    assert caught.value.__cause__.filename == str(secret)


def test_denied_is_recorded_and_goes_on(secret):
    outcome = sandboxed(lambda: _tried(open, str(secret)), on_violation="deny").run()
    assert outcome.value == "EPERM"
    assert [v.call for v in outcome.violations] == ["openat"]


def test_denied_gives_the_functions_own_exception(secret):
    with pytest.raises(PermissionError) as caught:
        sandboxed(secret.read_text, on_violation="deny")()
    assert not isinstance(caught.value, compart.CompartError)
    assert (caught.value.errno, caught.value.filename) == (errno.EPERM, str(secret))


def test_kill_ends_it_at_the_first(secret):
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as ours, os.fdopen(writer, "wb", buffering=0) as theirs:

        @sandboxed(on_violation="kill")
        def goes_on(out):
            out.write(b"before ")
            _tried(os.stat, str(secret))
            out.write(b"after")
            _tried(os.stat, str(secret))

        with pytest.raises(ViolationError) as caught:
            goes_on(theirs)
        theirs.close()
        assert ours.read() == b"before "
    assert [v.arguments["path"] for v in caught.value.violations] == [str(secret)]


@pytest.mark.parametrize("how", ["raise", "deny", "kill"])
def test_a_call_without_a_refusal_is_the_same_in_each_way(how):
    outcome = sandboxed(lambda: 1, on_violation=how).run()
    assert (outcome.value, outcome.violations) == (1, ())


def test_a_death_after_a_refusal_is_told_too():
    def dies():
        _tried(os.stat, "/etc/hostname")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ViolationError, match="SIGKILL") as caught:
        sandboxed(dies)()
    assert isinstance(caught.value.__cause__, compart.CompartmentDied)


def test_more_refusals_than_are_told_in_a_line_are_counted():
    def four():
        for n in range(4):
            _tried(os.stat, f"/{n}")

    with pytest.raises(ViolationError, match=r'"/0".*\(and 3 more refused; see \.violations\)') as caught:
        sandboxed(four)()
    assert len(caught.value.violations) == 4


def test_a_flood_of_refusals_ends_and_stays_bounded():
    @sandboxed(on_violation="deny", timeout=60)
    def flood():
        stat = os.stat
        for _ in range(200_000):
            with contextlib.suppress(OSError):
                stat("/flood")

    with pytest.raises(compart.CompartError) as caught:
        flood.run()
    violations = getattr(caught.value, "violations", ())
    assert len(violations) <= 500
    assert not isinstance(caught.value, compart.CompartmentTimeout)


def test_a_thousand_refusals_are_counted_and_the_first_are_kept():
    def thousand():
        for n in range(1000):
            _tried(os.stat, f"/{n}")

    with pytest.raises(ViolationError, match="and 999 more refused") as caught:
        sandboxed(thousand)()
    kept = [v.arguments["path"] for v in caught.value.violations]
    assert 10 <= len(kept) <= 500
    assert kept == [f"/{n}" for n in range(len(kept))]


# ------------------------------------------------------------------------------------------- the grant that would allow it


def suggested(function):
    """The suggestion of the first refusal, evaluated as the programmer would paste it."""
    with pytest.raises(ViolationError) as caught:
        sandboxed(function)()
    suggestion = caught.value.violations[0].suggestion
    assert suggestion
    assert suggestion in str(caught.value)
    return suggestion


def pasted(suggestion):
    return eval(suggestion.split(", or ")[0], {"grant": grant, "Policy": Policy})


needs_namespaces = pytest.mark.skipif(
    not compart.enforcement()["namespaces"].up, reason="grants by name need a mount namespace"
)


@needs_namespaces
def test_the_suggested_grant_opens_the_file_and_not_its_neighbour(secret):
    def reads():
        return open(secret).read()

    made = pasted(suggested(reads))
    assert made == grant.file(secret, "r")
    assert sandboxed(reads, grants=[made])() == "the secret"
    neighbour = secret.with_name("neighbour")
    neighbour.write_text("another")
    with pytest.raises((ViolationError, FileNotFoundError)):
        sandboxed(neighbour.read_text, grants=[made])()


@needs_namespaces
def test_the_suggested_grant_lists_the_directory(secret):
    def lists():
        return os.listdir(secret.parent)

    made = pasted(suggested(lists))
    assert made == grant.directory(secret.parent, "r")
    assert sandboxed(lists, grants=[made])() == ["secret.txt"]


@needs_namespaces
def test_the_suggested_grant_changes_the_file(secret):
    def changes():
        with open(secret, "r+") as file:
            file.write("THE")

    made = pasted(suggested(changes))
    assert made == grant.file(secret, "rw")
    sandboxed(changes, grants=[made])()
    assert secret.read_text() == "THE secret"


@needs_namespaces
def test_the_suggested_grant_makes_the_file(tmp_path):
    made_there = tmp_path / "made.txt"

    def makes():
        with open(made_there, "x") as file:
            file.write("made")

    made = pasted(suggested(makes))
    assert made == grant.directory(tmp_path, "rw")
    sandboxed(makes, grants=[made])()
    assert made_there.read_text() == "made"


@needs_namespaces
def test_the_suggested_grant_lets_it_look(secret):
    def looks():
        return os.path.getsize(secret)

    assert sandboxed(looks, grants=[pasted(suggested(looks))])() == 10


@needs_namespaces
@pytest.mark.parametrize(
    "change",
    [
        lambda tmp: os.mkdir(tmp / "new"),
        lambda tmp: os.unlink(tmp / "old"),
        lambda tmp: os.rename(tmp / "old", tmp / "new"),
        lambda tmp: os.symlink("old", tmp / "link"),
        lambda tmp: os.truncate(tmp / "old", 1),
    ],
    ids=["mkdir", "unlink", "rename", "symlink", "truncate"],
)
def test_the_suggested_grant_changes_the_directory(tmp_path, change):
    (tmp_path / "old").write_text("old")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    sandboxed(lambda: change(tmp_path), grants=[pasted(suggested(lambda: change(tmp_path)))])()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} != before


@needs_namespaces
def test_a_relative_name_is_suggested_as_what_it_meant_outside(secret, monkeypatch):
    monkeypatch.chdir(secret.parent)

    def reads():
        with open("secret.txt") as file:
            return file.read()

    assert reads() == "the secret"
    assert sandboxed(reads, grants=[pasted(suggested(reads))])() == "the secret"


def test_a_late_import_is_suggested_as_a_preload():
    # In a process of its own: once preloaded, a module is loaded for good.
    program = """
import sys
from compart import Policy, ViolationError, sandboxed
assert "wave" not in sys.modules

def late():
    import wave
    return wave.WAVE_FORMAT_PCM

try:
    sandboxed(late)()
except ViolationError as error:
    first, text = error.violations[0], str(error)
assert first.suggestion == "Policy(preload=['wave'])", first
assert first.suggestion in text
assert first.site.function == "late", first.site
policy = eval(first.suggestion)
assert sandboxed(policy)(late)() == 1
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_module_that_was_preloaded_needs_nothing():
    assert sandboxed(lambda: __import__("json").loads("[1]"))() == [1]


def test_what_nothing_would_allow_has_no_suggestion():
    forks = only(lambda: libc("fork"))
    assert "(a new process)" in str(forks)
    assert forks.suggestion == ""
    assert only(lambda: os.kill(os.getppid(), 9)).suggestion == ""


def test_a_socket_is_suggested_to_be_connected_outside():
    assert "pass the socket" in only(lambda: socket.socket()).suggestion


def test_the_sentence_holds_the_call_the_place_and_the_grant(secret):
    def reads():
        return open(secret).read()

    violation = only(reads)
    line = reads.__code__.co_firstlineno + 1
    assert str(violation).startswith(
        f'openat "{secret}" O_RDONLY was refused at {__file__}:{line} in reads; to allow it: '
    )
    assert f"grant.file({str(secret)!r}, 'r')" in str(violation)


def test_the_sentence_is_one_line_whatever_the_name():
    violation = only(lambda: os.stat("/two\nlines\x1b[31m"))
    assert "\n" not in str(violation)
    assert "\x1b" not in str(violation)


def test_a_hostile_name_does_not_break_out_of_the_suggestion():
    name = "/tmp/'); import os  # "
    violation = only(lambda: os.open(name, os.O_RDONLY))
    with pytest.raises(PolicyError, match="No such file"):
        pasted(violation.suggestion)


def test_a_directory_handed_over_needs_no_grant(secret):
    def reads(directory):
        return directory.read_text("secret.txt")

    with Directory(secret.parent) as directory:
        if not compart.enforcement()["namespaces"].up:
            pytest.skip("a directory needs a mount of its own")
        assert sandboxed(reads)(directory) == "the secret"
