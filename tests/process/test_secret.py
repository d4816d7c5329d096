"""A Secret's bytes are in the host and in no child."""

import copy
import ctypes
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from compart import ClosedError, CompartmentDied, EncodeError, Secret, sandboxed

ROOT = Path(__file__).parents[2]
WORDS = b"the quick brown token"


def address_of(secret: Secret) -> int:
    """Where the bytes lie: what an attacker finds in the copied memory of the object."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memoryview(secret._pages)))


@pytest.fixture
def secret() -> Iterator[Secret]:
    with Secret(WORDS) as made:
        yield made


def test_the_host_reads_it(secret: Secret) -> None:
    assert (secret.reveal(), len(secret)) == (WORDS, len(WORDS))
    assert ctypes.string_at(address_of(secret), len(WORDS)) == WORDS


# ---- in a child -------------------------------------------------------------------------------------------------------------


def test_a_compartment_dies_of_reading_where_it_was(secret: Secret) -> None:
    with pytest.raises(CompartmentDied) as caught:
        sandboxed(ctypes.string_at)(address_of(secret), len(WORDS))
    assert caught.value.signal == signal.SIGSEGV
    assert secret.reveal() == WORDS


def test_other_bytes_of_the_host_can_be_read_in_a_compartment() -> None:
    """What a Secret is for."""
    ordinary = ctypes.create_string_buffer(WORDS)
    assert sandboxed(ctypes.string_at)(ctypes.addressof(ordinary), len(WORDS)) == WORDS


def test_a_compartment_cannot_ask_for_it(secret: Secret) -> None:
    with pytest.raises(Exception, match="another process"):
        sandboxed(lambda: secret.reveal())()
    assert secret.reveal() == WORDS


def test_a_compartment_that_wipes_and_forgets_it_leaves_it_to_the_host(secret: Secret) -> None:
    def forgets() -> int:
        secret.close()
        secret.close()
        return len(secret)

    sandboxed(forgets)()
    assert secret.reveal() == WORDS


def test_a_compartment_that_says_it_is_the_host_dies(secret: Secret) -> None:
    """The check of the owner is only a kindness: without it there is still nothing to read."""

    def pretends() -> bytes:
        secret._owner = os.getpid()
        return secret.reveal()

    with pytest.raises(CompartmentDied) as caught:
        sandboxed(pretends)()
    assert caught.value.signal == signal.SIGSEGV


def readable() -> list[tuple[int, int]]:
    """The host's own memory that a fork copies, as (start, end)."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [re.match(r"([0-9a-f]+)-([0-9a-f]+) r..p \S+ \S+ \S+ *(\S*)$", line) for line in lines]
    return [(int(m[1], 16), int(m[2], 16)) for m in found if m and not m[3].startswith("[v")]


def occurrences(half: bytes, memory: list[tuple[int, int]]) -> int:
    """How often `half` stands twice in a row there. Makes no such bytes itself, and steps over what is not there."""
    libc = ctypes.CDLL(None)
    reader, writer = os.pipe()
    twice = re.compile(b"(" + re.escape(half) + rb")\1")
    count = 0
    for start, end in memory:
        before = b""
        for at in range(start, end, 32768):
            size = libc.write(writer, ctypes.c_void_p(at), min(32768, end - at))
            piece = os.read(reader, size) if size > 0 else b""
            window = before + piece
            count += len(twice.findall(window))
            before = window[-2 * len(half) + 1 :]
    os.close(reader)
    os.close(writer)
    return count


def test_a_search_of_all_memory_of_a_compartment_finds_everything_but_secrets() -> None:
    half = os.urandom(16)
    ordinary = bytearray(32)
    ordinary[:16] = ordinary[16:] = half
    memory = readable()
    assert sandboxed(occurrences, timeout=40)(half, memory) >= 1

    with Secret(ordinary):
        assert ordinary == bytes(32)
        memory = readable()
        assert sandboxed(occurrences, timeout=40)(half, memory) == 0
        # The host has it; this search comes last, as it copies what it finds.
        assert occurrences(half, memory) >= 1


def test_a_forked_host_has_none_either() -> None:
    script = """
        import os, ctypes
        from compart import Secret
        secret = Secret(b"abc")
        where = ctypes.addressof(ctypes.c_char.from_buffer(memoryview(secret._pages)))
        pid = os.fork()
        if pid == 0:
            ctypes.string_at(where, 3)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert secret.reveal() == b"abc"
        print(os.waitstatus_to_exitcode(status))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, str(-signal.SIGSEGV)), done.stderr


def test_it_stays_out_of_core_dumps(secret: Secret) -> None:
    """VmFlags of proc(5): dd is MADV_DONTDUMP, dc is MADV_DONTFORK."""
    where = address_of(secret)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= where < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            assert {"dd", "dc"} <= set(line.split())
            return
    pytest.fail("no mapping holds the secret")


# ---- in the host ------------------------------------------------------------------------------------------------------------


def test_a_bytearray_is_wiped() -> None:
    given = bytearray(WORDS)
    with Secret(given) as made:
        assert given == bytes(len(WORDS))
        assert made.reveal() == WORDS


def test_a_view_of_a_bytearray_is_taken() -> None:
    with Secret(memoryview(bytearray(b"__token__"))[2:7]) as made:
        assert made.reveal() == b"token"


@pytest.mark.parametrize("content", [b"", b"x", b"\0\xff" * 50_000], ids=["nothing", "a_byte", "many_pages"])
def test_any_length_can_be_kept(content: bytes) -> None:
    with Secret(content) as made:
        assert (made.reveal(), len(made)) == (content, len(content))
        with pytest.raises(CompartmentDied):
            sandboxed(ctypes.string_at)(address_of(made), max(1, len(content)))


def test_a_file_can_be_read_into_one(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(WORDS)
    with Secret.read(path) as made, Secret.read(str(path)) as again:
        assert made.reveal() == again.reveal() == WORDS


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Secret.read(tmp_path / "nothing")


def test_what_is_no_bytes_is_an_error() -> None:
    with pytest.raises(TypeError):
        Secret("text")  # type: ignore[arg-type]


def test_closing_wipes_it() -> None:
    made = Secret(WORDS)
    made.close()
    made.close()
    with pytest.raises(ClosedError, match="closed"):
        made.reveal()


def test_a_with_block_closes_it() -> None:
    with Secret(WORDS) as made:
        assert made.reveal() == WORDS
    with pytest.raises(ClosedError):
        made.reveal()


def test_its_text_does_not_tell_it(secret: Secret) -> None:
    for text in (repr(secret), str(secret), f"{secret}", f"{[secret]}"):
        assert "quick" not in text
        assert str(len(WORDS)) in text


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_cannot_be_pickled(secret: Secret, protocol: int) -> None:
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(secret, protocol)


def test_it_cannot_be_copied(secret: Secret) -> None:
    for make in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            make(secret)


def test_it_cannot_leave_a_compartment(secret: Secret) -> None:
    with pytest.raises(EncodeError):
        sandboxed(lambda: secret)()


def test_it_lends_out_no_buffer(secret: Secret) -> None:
    with pytest.raises(TypeError):
        memoryview(secret)  # type: ignore[arg-type]
