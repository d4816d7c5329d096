"""An open file handed over is that file with those rights: its uses work, their neighbours are refused."""

import array
import errno
import fcntl
import io
import mmap
import os
import socket
import struct
import tempfile
import termios

import pytest

import compart
from compart import ClosedError, NotCapableError, Policy, PolicyError, grant, rights, sandboxed

pytestmark = pytest.mark.usefixtures("leak_check")

CONTENT = b"line one\nline two\nline three\n"


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "file.txt"
    made.write_bytes(CONTENT)
    return made


# -------------------------------------------------------- what may be done through a descriptor: a table of both halves


def through_own_pipe(use):
    """What `use` does with the writing end of a pipe of the compartment's own."""

    def operation(fd):
        reader, writer = os.pipe()
        try:
            use(fd, writer)
            return os.read(reader, 1)
        finally:
            os.close(reader)
            os.close(writer)

    return operation


def mapped(flags, protection):
    def operation(fd):
        with mmap.mmap(fd, 1, flags=flags, prot=protection) as memory:
            if protection & mmap.PROT_WRITE:
                memory[0] = memory[0]
            return memory[0]

    return operation


def copied_to_own(fd):
    reader, writer = os.pipe()
    try:
        os.dup2(fd, writer)
    finally:
        os.close(reader)
        os.close(writer)


def unchanged_flags(fd):
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL))


def opened_by_number(fd):
    os.close(os.open(f"/dev/fd/{fd}", os.O_RDONLY))


READ = {
    "read": lambda fd: os.read(fd, 1),
    "readv": lambda fd: os.readv(fd, [bytearray(1)]),
    "hint": lambda fd: os.posix_fadvise(fd, 0, 1, os.POSIX_FADV_SEQUENTIAL),
}
READ_ANYWHERE = {
    "pread": lambda fd: os.pread(fd, 1, 0),
    "preadv": lambda fd: os.preadv(fd, [bytearray(1)], 0),
    "send it on": through_own_pipe(lambda fd, writer: os.sendfile(writer, fd, 0, 1)),
    "splice it on": through_own_pipe(lambda fd, writer: os.splice(fd, writer, 1)),
    "map": mapped(mmap.MAP_SHARED, mmap.PROT_READ),
    "map a copy": mapped(mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE),
}
SEEK = {
    "seek": lambda fd: os.lseek(fd, 0, os.SEEK_SET),
    "tell": lambda fd: os.lseek(fd, 0, os.SEEK_CUR),
}
ASK = {
    "stat": lambda fd: os.fstat(fd).st_size,
    "stat of its file system": lambda fd: os.fstatvfs(fd).f_bsize,
    "is it a terminal": lambda fd: os.isatty(fd),
    "flags": lambda fd: fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE,
    "close-on-exec": lambda fd: fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC),
    "copy": lambda fd: os.close(os.dup(fd)),
    "wait": lambda fd: __import__("select").select([fd], [], [], 0)[0] == [fd],
}
WRITE = {
    "write": lambda fd: os.write(fd, b"x"),
    "writev": lambda fd: os.writev(fd, [b"x"]),
    "sync": lambda fd: os.fsync(fd),
}
WRITE_ANYWHERE = {
    "pwrite": lambda fd: os.pwrite(fd, b"x", 0),
    "pwritev": lambda fd: os.pwritev(fd, [b"x"], 0),
    "allocate": lambda fd: os.posix_fallocate(fd, 0, 1),
    "truncate": lambda fd: os.ftruncate(fd, len(CONTENT)),
}
MAP_TO_CHANGE = {"map to change": mapped(mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)}
NEVER = {
    "map to run": mapped(mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC),
    "change its mode": lambda fd: os.fchmod(fd, 0o644),
    "change its owner": lambda fd: os.fchown(fd, -1, -1),
    "change its times": lambda fd: os.utime(fd),
    "lock": lambda fd: fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB),
    "lock a range": lambda fd: fcntl.lockf(fd, fcntl.LOCK_UN),
    "ask for locks": lambda fd: fcntl.fcntl(fd, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 0, 0, 0)),
    "ask for a lease": lambda fd: fcntl.fcntl(fd, fcntl.F_GETLEASE),
    "set its flags": unchanged_flags,
    "set its owner": lambda fd: fcntl.fcntl(fd, fcntl.F_SETOWN, 0),
    "ask how much there is": lambda fd: fcntl.ioctl(fd, termios.FIONREAD, array.array("i", [0])),
    "stop it from blocking": lambda fd: os.set_blocking(fd, True),
    "by ioctl": lambda fd: fcntl.ioctl(fd, termios.FIONBIO, struct.pack("i", 0)),
    "file attributes": lambda fd: os.listxattr(fd),
    "copy onto a number of its own": copied_to_own,
    "open it again by its number": opened_by_number,
}

EVERYTHING = {
    **READ, **READ_ANYWHERE, **SEEK, **ASK, **WRITE, **WRITE_ANYWHERE, **MAP_TO_CHANGE, **NEVER,
}  # fmt: skip

READING = {**READ, **READ_ANYWHERE, **SEEK, **ASK}
WRITING = {**WRITE, **WRITE_ANYWHERE, **SEEK, **ASK}
CHANGING = {**READING, **WRITING, **MAP_TO_CHANGE}

MODES = {"r": READING, "w": WRITING, "rw": CHANGING}


def tried(operation, *args):
    """The name of the error number that an operation ends with, or that it got through."""
    try:
        operation(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "got through"


def attempted(fd):
    """Every operation of the table on a descriptor: the names of those that got through, and of the others why not."""
    worked, refused = set(), {}
    for name, operation in EVERYTHING.items():
        said = tried(operation, fd)
        if said == "got through":
            worked.add(name)
        else:
            refused[name] = said
    return worked, refused


def test_outside_every_operation_of_the_table_gets_through(path):
    with open(path, "r+b", buffering=0) as file:
        assert attempted(file.fileno()) == (set(EVERYTHING), {})


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_is_open_for_everything_is_narrowed_to_exactly_its_rights(path, mode):
    with open(path, "r+b", buffering=0) as file:
        outcome = sandboxed(
            lambda: attempted(compart.descriptor(file)),
            grants=[grant.descriptor(file, rights.mode_rights(mode))],
            on_violation="deny",
        ).run()
        assert file.read() == CONTENT or mode != "r"
    worked, refused = outcome.value
    assert worked == set(MODES[mode])
    assert refused == dict.fromkeys(EVERYTHING.keys() - worked, "EPERM")
    assert len(outcome.violations) >= len(refused)


@pytest.mark.parametrize(("opened", "mode"), [("rb", "r"), ("wb", "w"), ("r+b", "rw")])
def test_a_file_handed_over_has_the_rights_of_its_mode(path, opened, mode):
    with open(path, opened, buffering=0) as file:
        file.truncate(len(CONTENT)) if mode != "r" else None
        worked, refused = sandboxed(lambda f: attempted(f.fileno()), on_violation="deny")(file)
    assert worked == set(MODES[mode])
    assert set(refused.values()) == {"EPERM"}


@pytest.mark.parametrize("by", ["its mode", "its rights"])
def test_an_appending_file_takes_more_and_keeps_what_it_holds(path, by):
    with open(path, "ab", buffering=0) as file:
        grants = [grant.descriptor(file, rights.mode_rights("a"))] if by == "its rights" else []
        worked, refused = sandboxed(lambda f: attempted(f.fileno()), grants=grants, on_violation="deny")(file)
    assert {"write", "writev", "sync", "stat", "copy"} <= worked
    assert {"truncate", "pwrite", "set its flags", "read", "map to change"} <= set(refused)
    assert path.read_bytes().startswith(CONTENT)
    assert path.read_bytes() > CONTENT


def test_reading_without_seeking_is_reading_only_on(path):
    with open(path, "rb", buffering=0) as file:
        only = [grant.descriptor(file, rights.CAP_READ)]
        worked, _ = sandboxed(lambda f: attempted(f.fileno()), grants=only, on_violation="deny")(file)
    # The kernel has no right that a copy, or a question to the terminal driver, would need.
    assert worked == {"read", "readv", "hint", "flags", "close-on-exec", "copy", "wait", "is it a terminal"}


# ----------------------------------------------------------------------------------------------- files as Python knows them


def test_a_binary_file_arrives_as_the_same_kind_of_object(path):
    @sandboxed
    def kinds(raw, buffered, text):
        return [type(f).__name__ for f in (raw, buffered, text)], [
            os.path.basename(f.name) for f in (raw, buffered, text)
        ]

    with open(path, "rb", buffering=0) as raw, open(path, "rb") as buffered, open(path) as text:
        assert kinds(raw, buffered, text) == (["FileIO", "BufferedReader", "TextIOWrapper"], ["file.txt"] * 3)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("wb", "BufferedWriter"), ("r+b", "BufferedRandom"), ("w", "TextIOWrapper"), ("r+", "TextIOWrapper")],
)
def test_a_file_to_write_arrives_as_the_same_kind_of_object(path, mode, kind):
    with open(path, mode) as file:
        assert sandboxed(lambda f: (type(f).__name__, f.writable()))(file) == (kind, True)


def test_a_read_only_file_says_that_it_cannot_be_written(path):
    with open(path, "rb") as file:
        assert sandboxed(lambda f: (f.readable(), f.writable(), f.seekable()))(file) == (True, False, True)
        with pytest.raises(io.UnsupportedOperation, match="write"):
            file.write(b"x")
        with pytest.raises(compart.RemoteError, match=r"io\.UnsupportedOperation: write"):
            sandboxed(lambda f: f.write(b"x"))(file)


@pytest.mark.parametrize("buffering", [0, -1])
def test_reading_begins_where_the_host_stands_and_does_not_move_it(path, buffering):
    with open(path, "rb", buffering=buffering) as file:
        assert file.readline() == b"line one\n" if buffering else file.read(9)
        assert sandboxed(lambda f: (f.tell(), f.read()))(file) == (9, CONTENT[9:])
        assert file.tell() == 9
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == (len(CONTENT) if buffering else 9)
        assert file.read() == CONTENT[9:]


def test_two_calls_read_from_the_same_place(path):
    first = sandboxed(lambda f: f.readline())
    with open(path, "rb") as file:
        assert [first(file), first(file)] == [b"line one\n"] * 2


def test_text_keeps_its_encoding_and_its_place(tmp_path):
    path = tmp_path / "koi8.txt"
    path.write_bytes("первая\nвторая\n".encode("koi8-r"))
    with open(path, encoding="koi8-r", errors="replace") as file:
        assert file.readline() == "первая\n"
        told = sandboxed(lambda f: (f.read(), f.encoding, f.errors))(file)
        assert told == ("вторая\n", "koi8-r", "replace")
        assert file.readline() == "вторая\n"


def test_text_keeps_the_newlines_it_was_opened_with(tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"a\r\nb\r\n")
    with open(path, newline="") as file:
        assert file.read() == "a\r\nb\r\n"
        file.seek(0)
        assert sandboxed(lambda f: f.read())(file) == "a\r\nb\r\n"


def test_what_the_host_buffered_is_written_before_what_the_compartment_writes(path):
    with open(path, "wb") as file:
        file.write(b"first ")
        sandboxed(lambda f: f.write(b"second "))(file)
        file.write(b"third")
    assert path.read_bytes() == b"first second third"


def test_writers_see_one_position(path):
    with open(path, "r+b") as file:
        assert file.readline() == b"line one\n"
        sandboxed(lambda f: f.write(b"LINE"))(file)
        file.seek(0)
        assert file.read() == b"line one\nLINE two\nline three\n"


def test_what_is_written_as_text_arrives_without_a_close_or_a_flush(path):
    with open(path, "w", encoding="utf-16") as file:
        sandboxed(lambda f: f.write("я"))(file)
    assert path.read_text("utf-16") == "я"


def test_appending_goes_to_the_end_wherever_one_seeks(path):
    with open(path, "ab") as file:
        sandboxed(lambda f: f.write(b"line four\n"))(file)
    assert path.read_bytes() == CONTENT + b"line four\n"


def test_an_appending_file_cannot_be_emptied(path):
    with open(path, "ab") as file:
        with pytest.raises((compart.ViolationError, OSError)):
            sandboxed(lambda f: os.ftruncate(f.fileno(), 0))(file)
    assert path.read_bytes() == CONTENT


def test_a_file_for_reading_and_appending_cannot_be_emptied(path):
    with open(path, "a+b") as file:
        assert sandboxed(lambda f: (f.seek(0), f.read(4))[1])(file) == b"line"
        with pytest.raises((compart.ViolationError, OSError)):
            sandboxed(lambda f: os.ftruncate(f.fileno(), 0))(file)
    assert path.read_bytes() == CONTENT


def test_closing_it_inside_closes_it_only_there(path):
    with open(path, "rb") as file:
        sandboxed(lambda f: f.close())(file)
        assert file.read() == CONTENT


def test_a_file_without_a_name_any_more_can_still_be_handed_over():
    with tempfile.TemporaryFile() as file:
        file.write(CONTENT)
        file.seek(0)
        assert sandboxed(lambda f: f.read())(file) == CONTENT
        file.seek(0)
        only = [grant.descriptor(file, rights.mode_rights("r"))]
        worked, _ = sandboxed(lambda f: attempted(f.fileno()), grants=only, on_violation="deny")(file)
        assert worked == set(READING)


def test_a_memfd_can_be_handed_over():
    with os.fdopen(os.memfd_create("memory"), "r+b") as file:
        file.write(CONTENT)
        file.seek(5)
        assert sandboxed(lambda f: f.read(3))(file) == b"one"


def test_files_in_memory_come_by_copy():
    with io.BytesIO(b"bytes") as binary, io.StringIO("text") as text:
        assert sandboxed(lambda a, b: (a.read(), b.read(), a.write(b"more")))(binary, text) == (b"bytes", "text", 4)
        assert binary.read() == b"bytes"


def test_files_lie_anywhere_in_the_arguments(path):
    @sandboxed
    def read(listed, named, *, keyword):
        return [f.read(8) for f in (listed[0], listed[1][0], named["deep"][0]["file"], keyword)]

    with open(path, "rb") as file:
        assert read([file, (file,)], {"deep": [{"file": file}]}, keyword=file) == [
            CONTENT[:8], CONTENT[8:16], CONTENT[16:24], CONTENT[24:32],
        ]  # one file handed over in four places is one file  # fmt: skip


def test_containers_without_files_stay_the_same_objects(path):
    shared = [1, 2]

    @sandboxed
    def same(file, one, two):
        return one is two

    with open(path, "rb") as file:
        assert same(file, shared, shared) is True


def test_many_files_at_once(tmp_path):
    files = []
    for n in range(32):
        (tmp_path / str(n)).write_bytes(b"%d" % n)
        files.append(open(tmp_path / str(n), "rb"))  # noqa: SIM115
    try:
        assert sandboxed(lambda all: [f.read() for f in all])(files) == [b"%d" % n for n in range(32)]
    finally:
        for file in files:
            file.close()


def test_one_more_file_than_a_range_holds_is_told_before_the_fork(path, no_fork):
    files = [open(path, "rb") for _ in range(33)]  # noqa: SIM115
    try:
        with pytest.raises(PolicyError, match="more than 32 descriptors"):
            sandboxed(lambda all: None)(files)
    finally:
        for file in files:
            file.close()


# --------------------------------------------------------------------------------------------------- copies keep their rights


def test_a_copy_is_made_of_a_copy_and_stays_as_narrow(path):
    def copies(f):
        copy = os.dup(os.dup(f.fileno()))
        return os.read(copy, 4), attempted(copy)[0]

    with open(path, "r+b", buffering=0) as file:
        only = [grant.descriptor(file, rights.mode_rights("r"))]
        data, worked = sandboxed(copies, grants=only, on_violation="deny")(file)
    assert data == b"line"
    assert worked == set(READING)


@pytest.mark.parametrize(
    "copy",
    [
        os.dup,
        lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD, 0),
        lambda fd: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0),
    ],
    ids=["dup", "F_DUPFD", "F_DUPFD_CLOEXEC"],
)
def test_two_hundred_copies_one_after_another(path, copy):
    @sandboxed
    def copied(f):
        seen = set()
        for _ in range(200):
            number = copy(f.fileno())
            assert os.pread(number, 4, 0) == b"line"
            seen.add(number)
            os.close(number)
        return len(seen)

    with open(path, "rb") as file:
        assert copied(file) == 1


def test_copies_run_out_and_come_back(path):
    @sandboxed
    def copied(f):
        held = []
        while (said := tried(lambda: held.append(os.dup(f.fileno())))) == "got through":
            pass
        assert said == "EMFILE"
        for number in held:
            os.close(number)
        os.close(os.dup(f.fileno()))
        return len(held)

    with open(path, "rb") as file:
        assert copied(file) == 31


def test_a_number_that_was_closed_and_copied_over_has_the_rights_of_its_range(path):
    @sandboxed(on_violation="deny")
    def reused(reading, writing):
        number = reading.fileno()
        os.close(number)
        copy = os.dup(writing.fileno())
        assert copy != number
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(number, 1)
        return os.write(copy, b"LINE")

    with open(path, "rb") as reading, open(path, "r+b") as writing:
        assert reused(reading, writing) == 4


def test_numpy_loads_from_a_file_handed_over(tmp_path):
    numpy = pytest.importorskip("numpy")
    numpy.save(tmp_path / "a.npy", numpy.arange(1000).reshape(10, 100))

    @sandboxed
    def load(f) -> numpy.ndarray:
        return numpy.load(f, allow_pickle=False)

    with open(tmp_path / "a.npy", "rb") as file:
        assert (load(file) == numpy.arange(1000).reshape(10, 100)).all()
        file.seek(128)
        raw = sandboxed(lambda f: numpy.fromfile(f, dtype="i8", count=3).tolist())
        assert raw(file) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------ narrower, never wider


@pytest.mark.parametrize(
    ("opened", "asked"),
    [
        ("rb", rights.mode_rights("rw")),
        ("rb", rights.CAP_WRITE),
        ("rb", rights.CAP_FCHMOD),
        ("wb", rights.CAP_READ),
        ("r+b", rights.ALL),
        ("r+b", rights.mode_rights("rw") | rights.CAP_FLOCK),
    ],
)
def test_a_grant_cannot_widen_a_file(path, no_fork, opened, asked):
    with open(path, opened) as file:
        with pytest.raises(NotCapableError, match="would widen") as caught:
            sandboxed(lambda f: None, grants=[grant.descriptor(file, asked)])(file)
        assert path.name in str(caught.value)
        assert isinstance(caught.value, PermissionError)


def test_a_granted_number_is_that_descriptor(path):
    fd = os.open(path, os.O_RDWR)
    try:
        found = sandboxed(
            lambda: (compart.descriptor(fd), os.read(compart.descriptor(fd), 4)),
            grants=[grant.descriptor(fd, rights.mode_rights("r"))],
        )()
    finally:
        os.close(fd)
    assert found[1] == b"line"
    assert found[0] >= 512


def test_a_granted_object_is_found_by_the_one_outside(path):
    with open(path, "rb") as file:
        policy = Policy(grants=[grant.descriptor(file, rights.mode_rights("r"))])

        @sandboxed(policy)
        def found():
            inside = compart.granted(file)
            return inside.read(4), inside.fileno() == compart.descriptor(file), inside.fileno() >= 512

        assert found() == (b"line", True, True)
        assert compart.granted(file) is file
        assert compart.descriptor(file) == file.fileno()


def test_a_file_that_was_not_granted_is_not_found_inside(path):
    with open(path, "rb") as other:
        number = other.fileno()
        assert compart.granted(other) is other

        @sandboxed
        def stranger():
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(compart.descriptor(other))
            return True

        assert stranger() is True
        assert os.fstat(number)


def test_descriptors_that_were_not_handed_over_are_closed(path):
    with open(path, "rb") as handed, open(path, "rb") as kept, socket.socket() as connection:
        numbers = [kept.fileno(), connection.fileno(), *range(3, 64)]
        assert os.fstat(kept.fileno())

        @sandboxed
        def alive(f):
            return {number: tried(os.fstat, number) for number in numbers}, f.fileno(), tried(os.fstat, f.fileno())

        numbers_inside, number, status = alive(handed)
        assert set(numbers_inside.values()) == {"EBADF"}
        assert number >= 512
        assert status == "got through"


# ----------------------------------------------------------------------------------------------- pipes, sockets, terminals


def piped(data):
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return os.fdopen(reader, "rb")


def test_a_pipe_is_read_to_its_end():
    with piped(b"a\nb\n") as pipe:
        assert sandboxed(lambda f: f.read())(pipe) == b"a\nb\n"


def test_a_pipe_is_read_line_by_line():
    with piped(b"a\nb\n") as pipe:
        assert sandboxed(lambda f: list(f))(pipe) == [b"a\n", b"b\n"]


def test_a_pipe_to_write_carries_what_is_written():
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as ours, os.fdopen(writer, "wb") as theirs:
        sandboxed(lambda f: f.write(b"said"))(theirs)
        theirs.close()
        assert ours.read() == b"said"


@pytest.mark.parametrize(
    "operation",
    [
        lambda fd: os.write(fd, b"x"),
        lambda fd: fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 65536),
        lambda fd: os.set_blocking(fd, False),
        lambda fd: fcntl.ioctl(fd, termios.FIONREAD, array.array("i", [0])),
    ],
    ids=["write", "resize", "non-blocking", "FIONREAD"],
)
def test_a_pipe_to_read_can_do_nothing_else(operation):
    with piped(b"abc") as pipe:
        assert sandboxed(lambda f: os.read(f.fileno(), 1))(pipe) == b"a"
        with pytest.raises(compart.ViolationError):
            sandboxed(lambda f: operation(f.fileno()))(pipe)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_connected_socket_talks(pair):
    ours, theirs = pair
    ours.sendall(b"question")

    @sandboxed
    def talk(s):
        asked = s.recv(100)
        s.sendall(asked.upper())
        s.shutdown(socket.SHUT_WR)
        return asked, s.family.name, s.type.name, s.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)

    assert talk(theirs) == (b"question", "AF_UNIX", "SOCK_STREAM", 1)
    assert ours.recv(100) == b"QUESTION"
    assert ours.recv(100) == b""


def test_a_connected_socket_as_a_file(pair):
    ours, theirs = pair
    ours.sendall(b"a\nb\n")
    ours.shutdown(socket.SHUT_WR)

    @sandboxed
    def lines(s):
        with s.makefile("rw") as file:
            got = list(file)
            file.write("c\n")
            file.flush()
        return got

    assert lines(theirs) == ["a\n", "b\n"]
    assert ours.recv(10) == b"c\n"


def test_a_tcp_connection_talks():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as ours:
            theirs, _ = server.accept()
            with theirs:
                ours.sendall(b"ping")
                assert sandboxed(lambda s: (s.recv(4), s.send(b"pong"), s.getpeername()[0]))(theirs) == (
                    b"ping", 4, "127.0.0.1",
                )  # fmt: skip
                assert ours.recv(4) == b"pong"


SOCKET_REFUSED = {
    "setsockopt": lambda s: s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    "sendmsg": lambda s: s.sendmsg([b"x"]),
    "recvmsg": lambda s: s.recvmsg(1),
    "sendto": lambda s: s.sendto(b"x", "\0compart-nobody"),
    "connect": lambda s: s.connect("\0compart-nobody"),
    "bind": lambda s: s.bind("\0compart-test"),
    "listen": lambda s: s.listen(),
    "accept4": lambda s: s.accept(),
    "ioctl": lambda s: s.setblocking(False),
    "lseek": lambda s: os.lseek(s.fileno(), 0, os.SEEK_SET),
}
"""By the system call that is refused."""


@pytest.mark.parametrize("call", SOCKET_REFUSED)
def test_a_connected_socket_does_nothing_else(pair, call):
    ours, theirs = pair
    ours.send(b"x")

    @sandboxed(on_violation="deny")
    def attempt(s):
        assert s.recv(1) == b"x"
        return tried(SOCKET_REFUSED[call], s)

    outcome = attempt.run(theirs)
    if call == "lseek" and outcome.value == "ESPIPE":
        return  # nothing to move
    assert outcome.value == "EPERM"
    assert [v.call for v in outcome.violations] == [call]


def test_a_socket_granted_narrower_only_listens_to_the_other(pair):
    ours, theirs = pair
    ours.send(b"x")
    only = [grant.descriptor(theirs, rights.CAP_RECV)]
    f = sandboxed(lambda s: (s.recv(1), s.send(b"y")), grants=only)
    with pytest.raises(compart.ViolationError, match=r"sendto fd \d+ \(CAP_READ\)"):
        f(theirs)


def test_a_socket_granted_more_by_name_may_do_that(pair):
    granted = [grant.descriptor(pair[1], rights.SOCKET | rights.CAP_SETSOCKOPT)]

    @sandboxed(grants=granted)
    def keep_alive(s):
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    assert keep_alive(pair[1]) == 1


def test_a_listening_socket_is_granted_to_accept():
    with socket.create_server(("127.0.0.1", 0)) as server:
        granted = [grant.descriptor(server, rights.CAP_ACCEPT | rights.CAP_GETSOCKNAME)]

        @sandboxed(grants=granted)
        def serve(listening):
            connection, _ = listening.accept()
            with connection:
                connection.sendall(connection.recv(10).upper())

        with socket.create_connection(server.getsockname()) as ours:
            ours.sendall(b"asked")
            serve(server)
            assert ours.recv(10) == b"ASKED"


def test_a_socket_cannot_be_widened_beyond_what_sockets_do(pair, no_fork):
    with pytest.raises(NotCapableError, match="would widen"):
        sandboxed(lambda s: None, grants=[grant.descriptor(pair[1], rights.SOCKET | rights.CAP_FCHMOD)])(pair[1])


def test_a_terminal_knows_that_it_is_one_and_cannot_be_pushed_at():
    leader, follower = os.openpty()
    with os.fdopen(leader, "rb"), os.fdopen(follower, "r", closefd=True) as terminal:
        assert terminal.isatty()
        assert sandboxed(lambda f: f.isatty())(terminal) is True
        push = sandboxed(lambda f: fcntl.ioctl(f.fileno(), termios.TIOCSTI, b"x"))
        with pytest.raises(compart.ViolationError, match="TIOCSTI"):
            push(terminal)
        with pytest.raises(compart.ViolationError, match="TCSETS"):
            sandboxed(lambda f: termios.tcsetattr(f, termios.TCSANOW, [0, 0, 0, 0, 0, 0, [b"\0"] * 32]))(terminal)


# ---------------------------------------------------------------------------------- mistakes are told before anything is forked


def test_a_closed_file_is_told_by_name(path, no_fork):
    with open(path, "rb") as file:
        pass
    with pytest.raises(ClosedError, match=r"file\.txt.* is closed; hand over an open file"):
        sandboxed(lambda f: None)(file)


def test_a_closed_socket_is_told(no_fork):
    with socket.socket() as made:
        pass
    with pytest.raises(ClosedError, match="is closed; hand over an open one"):
        sandboxed(lambda s: None)(made)


def test_a_closed_number_is_told(path, no_fork):
    fd = os.open(path, os.O_RDONLY)
    granted = grant.descriptor(fd, rights.CAP_READ)
    os.close(fd)
    with pytest.raises(ClosedError, match=f"descriptor {fd} is not open"):
        sandboxed(lambda: None, grants=[granted])()


def test_a_descriptor_that_can_do_nothing_is_told(path, no_fork):
    fd = os.open(path, os.O_PATH)
    try:
        with pytest.raises(PolicyError, match=f"descriptor {fd} was opened with O_PATH .*open it for reading"):
            sandboxed(lambda: None, grants=[grant.descriptor(fd, rights.CAP_READ)])()
    finally:
        os.close(fd)


def test_a_directory_as_a_number_is_told(tmp_path, no_fork):
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(PolicyError, match=f"descriptor {fd} is a directory; hand over a compart.Directory"):
            sandboxed(lambda: None, grants=[grant.descriptor(fd, rights.CAP_READ)])()
    finally:
        os.close(fd)


def test_a_file_that_reads_through_another_is_told(path, no_fork):
    import gzip

    path.write_bytes(gzip.compress(b"inner"))
    with gzip.open(path) as packed:
        with pytest.raises(PolicyError, match="no plain file; hand over the file that it reads from"):
            sandboxed(lambda f: f.read())(packed)
    with open(path, "rb") as plain:
        assert plain.read()
