"""A grant is data: it says what is handed over, checks that it exists, and opens nothing."""

import os
import re
import socket
from pathlib import Path

import pytest

from compart import PolicyError, grant, rights
from compart.policy import Grant

pytestmark = pytest.mark.usefixtures("no_fork")


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "file.txt"
    made.write_text("content")
    return made


def held():
    return sorted(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("mode", ["r", "w", "rw", "a"])
def test_a_file_by_name(path, mode):
    assert grant.file(path, mode) == Grant(kind="file", path=str(path), mode=mode)


@pytest.mark.parametrize("mode", ["r", "rw"])
def test_a_directory_by_name(tmp_path, mode):
    assert grant.directory(tmp_path, mode) == Grant(kind="directory", path=str(tmp_path), mode=mode)


def test_reading_is_the_default(path):
    assert grant.file(path) == grant.file(path, "r")
    assert grant.directory(path.parent) == grant.directory(path.parent, "r")


def test_a_path_may_be_text_bytes_or_an_object(path):
    assert grant.file(str(path)) == grant.file(os.fsencode(path)) == grant.file(path)


def test_a_relative_path_means_what_it_means_now(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    made = grant.file("file.txt")
    assert made.path == str(path)
    monkeypatch.chdir("/")
    assert made.path == str(path)
    assert grant.directory(path.parent / ".." / path.parent.name) == grant.directory(path.parent)


def test_nothing_is_opened(path):
    before = held()
    made = [grant.file(path, "rw"), grant.directory(path.parent, "rw"), grant.descriptor(0, rights.CAP_READ)]
    assert held() == before
    assert len(made) == 3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: grant.file(p / "nothing"), "grant.file: '{path}/nothing': Not a directory; name something that exists"),
        (lambda p: grant.file(p.parent / "nothing"), "nothing': No such file or directory; name something that exists"),
        (lambda p: grant.file(p.parent), "is no regular file; use grant.directory for a directory"),
        (lambda p: grant.file("/dev/null"), "'/dev/null' is no regular file"),
        (lambda p: grant.directory(p), "is no directory; use grant.file for a file"),
        (lambda p: grant.directory(p.parent / "nothing"), "No such file or directory; name something that exists"),
        (lambda p: grant.directory("/"), "'/' would grant everything; name the directories that are needed"),
        (lambda p: grant.directory("/.."), "would grant everything"),
        (lambda p: grant.file(p, "x"), "grant.file mode 'x' is unknown; choose 'r', 'w', 'rw' or 'a'"),
        (lambda p: grant.file(p, "rb"), "grant.file mode 'rb' is unknown"),
        (lambda p: grant.file(p, None), "grant.file mode None is unknown"),
        (lambda p: grant.directory(p.parent, "w"), "grant.directory mode 'w' is unknown; choose 'r' or 'rw'"),
        (lambda p: grant.file(3), "grant.file: 3 is no path"),
        (lambda p: grant.file(None), "grant.file: None is no path"),
        (lambda p: grant.file([p]), "is no path"),
        (lambda p: grant.file(""), "grant.file: ''"),
        (lambda p: grant.directory("a\0b"), "grant.directory: 'a\\x00b'"),
        (lambda p: grant.descriptor(0, "r"), "grant.descriptor needs rights such as CAP_READ | CAP_SEEK, not 'r'"),
        (lambda p: grant.descriptor(0, None), "grant.descriptor needs rights"),
        (lambda p: grant.descriptor(p, rights.CAP_READ), "is no descriptor and has no fileno()"),
        (lambda p: grant.descriptor(True, rights.CAP_READ), "grant.descriptor: True is no descriptor"),
        (lambda p: grant.descriptor(None, rights.CAP_READ), "grant.descriptor: None is no descriptor"),
        (lambda p: grant.descriptor("0", rights.CAP_READ), "grant.descriptor: '0' is no descriptor"),
        (lambda p: grant.descriptor(-1, rights.CAP_READ), "grant.descriptor: -1 is no descriptor"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_value_and_its_remedy(path, make, told):
    with pytest.raises(PolicyError, match=re.escape(told.replace("{path}", str(path)))):
        make(path)


def test_what_the_system_says_of_a_path_is_told(tmp_path):
    with pytest.raises(PolicyError, match="File name too long; name something that exists"):
        grant.file(tmp_path / ("x" * 300))


def test_descriptors_by_number_and_by_object(path):
    with open(path) as file, socket.socket() as made:
        for thing in (0, file, made):
            one = grant.descriptor(thing, rights.CAP_READ)
            assert (one.kind, one.object, one.rights) == ("descriptor", thing, rights.CAP_READ)


def test_a_grant_is_a_frozen_value(path):
    made = grant.file(path)
    with pytest.raises(AttributeError):
        made.mode = "rw"
    assert len({made, grant.file(path), grant.file(path, "rw"), grant.directory(path.parent)}) == 3


def test_it_is_shown_as_it_was_written(path):
    assert str(grant.file(path, "rw")) == f"grant.file({str(path)!r}, 'rw')"
    assert str(grant.directory(path.parent)) == f"grant.directory({str(path.parent)!r}, 'r')"
    assert str(grant.descriptor(0, rights.CAP_READ)) == "grant.descriptor(0, CAP_READ)"
    assert eval(str(grant.file(path))) == grant.file(path)


def test_names_that_are_no_text_stay_as_they_are(tmp_path):
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    with open(odd, "wb"):
        pass
    made = grant.file(odd)
    assert os.fsencode(made.path) == odd
    assert Path(made.path).exists()
