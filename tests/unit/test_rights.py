"""Rights are FreeBSD's, bit for bit, and only narrow."""

import copy
import json
import pickle
from functools import reduce
from operator import or_
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compart import rights
from compart.rights import ALL, NONE, RIGHTS, Rights

# What rights(4) and <sys/capsicum.h> of 16-CURRENT say: the word, the bits in it, the word as FreeBSD stores it.
GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "rights.json").read_text())

MARK0, MARK1 = 1 << 57, 1 << 58


def union(several):
    return reduce(or_, several, NONE)


any_rights = st.builds(Rights, st.integers(0, ALL.word0), st.integers(0, ALL.word1)) | st.lists(
    st.sampled_from(sorted(RIGHTS))
).map(lambda names: union(RIGHTS[name] for name in names))


@pytest.mark.parametrize("name", GOLDEN)
def test_every_name_has_freebsds_word(name):
    expected = GOLDEN[name]
    right = getattr(rights, name)
    words = [MARK0, MARK1]
    words[expected["word"]] = int(expected["cap_rights_t"], 16)
    assert right.words == tuple(words)
    assert (right.word0, right.word1)[expected["word"]] == int(expected["bits"], 16)
    assert RIGHTS[name] is right


def test_there_are_freebsds_86_names_and_no_other():
    assert set(RIGHTS) == set(GOLDEN)
    assert len(RIGHTS) == 86


def test_all_is_the_union_of_the_names_and_nothing_more():
    assert union(RIGHTS.values()) == ALL
    assert ALL.words == (MARK0 | 0xFFFFFFFFFFF, MARK1 | 0xFFFFFF)
    assert NONE.words == (0x0200000000000000, 0x0400000000000000)


def test_there_are_68_plain_rights_one_for_each_bit():
    plain = list(ALL)
    assert len(plain) == 68 == ALL.word0.bit_count() + ALL.word1.bit_count()
    assert {name for name, entry in GOLDEN.items() if entry["single_bit"]} <= set(plain)
    assert union(RIGHTS[name] for name in plain) == ALL


@given(any_rights)
def test_words_and_back(some):
    assert Rights.from_words(*some.words) == some


@pytest.mark.parametrize(
    ("word0", "word1", "what"),
    [
        (0x1, MARK1, "no mark in the first word"),
        (MARK0, 0x1, "no mark in the second word"),
        (MARK1, MARK0, "the marks are exchanged"),
        (MARK0 | MARK1, MARK1, "two marks"),
        (MARK0 | 1 << 62, MARK1, "version 1"),
        (MARK0, MARK1 | 1 << 63, "a version in the second word"),
        (MARK0 | 1 << 44, MARK1, "a bit beyond the last right"),
        (MARK0, MARK1 | 1 << 24, "a bit beyond the last right"),
        (-MARK0, MARK1, "negative"),
        (MARK0 | 1 << 64, MARK1, "more than 64 bits"),
    ],
)
def test_words_that_freebsd_would_refuse_are_refused(word0, word1, what):
    with pytest.raises(ValueError):
        Rights.from_words(word0, word1)


@pytest.mark.parametrize("bits", [(1 << 44, 0), (0, 1 << 24), (-1, 0), (MARK0, 0)])
def test_bits_that_are_no_right_are_refused(bits):
    with pytest.raises(ValueError):
        Rights(*bits)


@given(any_rights, any_rights)
def test_the_operators_are_those_of_sets_of_bits(a, b):
    bits = a.word0 | a.word1 << 64, b.word0 | b.word1 << 64

    def of(value):
        return Rights(value & (1 << 64) - 1, value >> 64)

    assert a | b == of(bits[0] | bits[1])
    assert a & b == of(bits[0] & bits[1])
    assert a - b == of(bits[0] & ~bits[1])
    assert (a <= b) is (b >= a) is (a in b) is (bits[0] & ~bits[1] == 0)
    assert (a < b) is (b > a) is (a <= b and a != b)
    assert bool(a) is (bits[0] != 0)


@given(any_rights, any_rights)
def test_narrowing_never_widens(a, b):
    assert a & b <= a
    assert a - b <= a
    assert not (a - b) & b


@given(st.lists(st.sampled_from(sorted(RIGHTS))))
def test_names_make_up_the_set_and_none_is_superfluous(several):
    some = union(RIGHTS[name] for name in several)
    names = some.names()
    assert union(RIGHTS[name] for name in names) == some
    for left_out in names:
        assert union(RIGHTS[name] for name in names if name != left_out) != some
    assert set(names) <= set(some)
    assert all(name in some for name in some)


@pytest.mark.parametrize(
    ("some", "text"),
    [
        (rights.CAP_READ, "CAP_READ"),
        (rights.CAP_READ | rights.CAP_SEEK, "CAP_READ | CAP_SEEK"),
        (rights.CAP_SEEK_TELL, "CAP_SEEK_TELL"),
        (rights.CAP_MKDIRAT | rights.CAP_EVENT, "CAP_MKDIRAT | CAP_EVENT"),
        (rights.CAP_LOOKUP | rights.CAP_RECV, "CAP_READ | CAP_LOOKUP"),
        (rights.CAP_SEEK - rights.CAP_SEEK_TELL, "Rights(0x8, 0x0)"),
        (rights.CAP_READ | (rights.CAP_SEEK - rights.CAP_SEEK_TELL), "CAP_READ | Rights(0x8, 0x0)"),
        (NONE, "NONE"),
        (ALL, "ALL"),
    ],
)
def test_a_set_is_shown_by_its_names(some, text):
    assert repr(some) == text


@given(any_rights)
def test_what_is_shown_can_be_evaluated(some):
    assert eval(repr(some), vars(rights)) == some


def test_a_set_of_rights_cannot_be_changed():
    some = Rights(1)
    with pytest.raises(AttributeError):
        some.word0 = 3
    with pytest.raises(TypeError):
        RIGHTS["CAP_READ"] = ALL


def test_equal_sets_are_one_key():
    assert {rights.CAP_READ | rights.CAP_SEEK: 1}[rights.CAP_PREAD] == 1
    assert Rights(1, 2) != Rights(2, 1)


@given(any_rights)
def test_rights_survive_being_copied(some):
    assert copy.deepcopy(some) == pickle.loads(pickle.dumps(some)) == some


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError):
        assert "CAP_REED" in ALL


def test_fcntl_bits_are_shifted_by_freebsds_command_numbers():
    # F_GETFL 3, F_SETFL 4, F_GETOWN 5, F_SETOWN 6 in <fcntl.h>; CAP_FCNTL_ALL is their union.
    assert dict(rights.FCNTL) == {"F_GETFL": 1 << 3, "F_SETFL": 1 << 4, "F_GETOWN": 1 << 5, "F_SETOWN": 1 << 6}
    assert sum(rights.FCNTL.values()) == rights.FCNTL_ALL


@pytest.mark.parametrize(
    ("mode", "has", "lacks"),
    [
        ("r", "READ PREAD SEEK MMAP_R FSTAT FSTATFS FCNTL EVENT", "WRITE MMAP_W MMAP_X FTRUNCATE FSYNC FCHMOD LOOKUP"),
        ("w", "WRITE PWRITE SEEK FSTAT FSTATFS FCNTL EVENT FTRUNCATE FSYNC", "READ MMAP_R MMAP FCHMOD LOOKUP"),
        ("rw", "READ WRITE PREAD PWRITE MMAP_RW FTRUNCATE FSYNC FSTAT", "MMAP_X FCHMOD FCHOWN FLOCK LOOKUP IOCTL"),
        ("a", "WRITE SEEK_TELL FSTAT FSYNC FCNTL EVENT", "READ SEEK PWRITE FTRUNCATE MMAP LOOKUP"),
    ],
)
def test_a_mode_has_these_rights_and_not_those(mode, has, lacks):
    held = rights.mode_rights(mode)
    for name in has.split():
        assert RIGHTS["CAP_" + name] in held, name
    for name in lacks.split():
        assert RIGHTS["CAP_" + name] not in held, name


def test_reading_is_exactly_this():
    assert set(rights.mode_rights("r").names()) == {
        "CAP_READ", "CAP_SEEK", "CAP_MMAP", "CAP_FSTAT", "CAP_FSTATFS", "CAP_FCNTL", "CAP_EVENT",
    }  # fmt: skip


def test_a_directory_adds_looking_up_and_with_rw_changing():
    reading, writing = rights.directory_rights("r"), rights.directory_rights("rw")
    assert reading == rights.mode_rights("r") | rights.CAP_LOOKUP
    assert reading < writing
    for right in (rights.CAP_CREATE, rights.CAP_MKDIRAT, rights.CAP_UNLINKAT, rights.CAP_RENAMEAT_TARGET):
        assert right in writing
        assert right not in reading
    for right in (rights.CAP_FCHMODAT, rights.CAP_FCHOWNAT, rights.CAP_LINKAT_SOURCE, rights.CAP_MKNODAT):
        assert right not in writing


def test_a_socket_can_talk_but_not_connect_or_be_configured():
    assert rights.CAP_RECV | rights.CAP_SEND | rights.CAP_SHUTDOWN <= rights.SOCKET
    assert not rights.SOCKET & (rights.CAP_CONNECT | rights.CAP_BIND | rights.CAP_ACCEPT | rights.CAP_SETSOCKOPT)
    assert rights.CAP_WRITE not in rights.PIPE_READ
    assert rights.CAP_READ not in rights.PIPE_WRITE


@pytest.mark.parametrize(
    ("function", "mode"),
    [
        (rights.mode_rights, "x"),
        (rights.mode_rights, "wr"),
        (rights.directory_rights, "w"),
        (rights.directory_rights, ""),
    ],
)
def test_another_mode_is_an_error(function, mode):
    with pytest.raises(ValueError):
        function(mode)
