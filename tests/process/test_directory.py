"""A directory handed over, or granted by name, is all beneath it and nothing else: on the host and inside alike."""

import errno
import os
import stat
from pathlib import Path

import pytest

import compart
from compart import ClosedError, Directory, NotCapableError, PolicyError, ViolationError, grant, sandboxed

pytestmark = [
    pytest.mark.usefixtures("leak_check"),
    pytest.mark.skipif(
        not compart.enforcement()["namespaces"].up, reason="a directory inside needs a mount of its own"
    ),
]


@pytest.fixture
def tree(tmp_path):
    """A directory to hand over, with everything around it that it must not lead to."""
    (tmp_path / "secret.txt").write_text("the secret")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "file.txt").write_text("beside")
    made = tmp_path / "tree"
    (made / "sub" / "deeper").mkdir(parents=True)
    (made / "file.txt").write_text("content")
    (made / "sub" / "inner.txt").write_text("inner")
    (made / "sub" / "deeper" / "deep.txt").write_text("deep")
    (made / "to inside").symlink_to("sub/inner.txt")
    (made / "to sub").symlink_to("sub")
    (made / "sub" / "up and in").symlink_to("../file.txt")
    (made / "out").symlink_to("../secret.txt")
    (made / "far out").symlink_to(tmp_path / "secret.txt")
    (made / "dir out").symlink_to("../beside")
    (made / "sub" / "climb").symlink_to("../../secret.txt")
    (made / "loop").symlink_to("loop")
    return made


def here(function, directory):
    """On the host."""
    return function(directory)


def inside(function, directory):
    """In a compartment, which goes on after a refusal."""
    return sandboxed(function, on_violation="deny")(directory)


SIDES = pytest.mark.parametrize("side", [here, inside])


def why_not(function, *args):
    """The name of what a call raises, or what it returned."""
    try:
        return function(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno, type(error).__name__)
    except ValueError:
        return "ValueError"


# ---------------------------------------------------------------------------------------------------------- what it leads to


READS = {
    "file.txt": "content",
    "./file.txt": "content",
    "sub/inner.txt": "inner",
    "sub//deeper/deep.txt": "deep",
    "sub/../file.txt": "content",
    "sub/deeper/../../file.txt": "content",
    "to inside": "inner",
    "to sub/inner.txt": "inner",
    "sub/up and in": "content",
}

REFUSED = {
    "../secret.txt",
    "../tree/file.txt",
    "sub/../../secret.txt",
    "sub/" + "../" * 40 + "etc/passwd",
    "..",
    "/etc/passwd",
    "//etc/passwd",
    "out",
    "far out",
    "dir out/file.txt",
    "sub/climb",
    "to sub/../../secret.txt",
}


@SIDES
@pytest.mark.parametrize("name", READS)
def test_names_beneath_are_read(tree, side, name):
    with Directory(tree) as directory:
        assert side(lambda d: d.read_text(name), directory) == READS[name]


@SIDES
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_names_that_leave_are_refused(tree, side, name):
    assert os.path.exists(tree / name)
    with Directory(tree) as directory:
        assert side(lambda d: why_not(d.read_text, name), directory) in ("EPERM", "ENOENT", "EXDEV", "EISDIR")
        assert side(lambda d: why_not(d.stat, name), directory) in ("EPERM", "ENOENT", "EXDEV")


@SIDES
def test_the_programmer_is_told_that_a_name_leaves(tree, side):
    def leaves(directory):
        with pytest.raises(NotCapableError, match="leaves the directory"):
            directory.open("../secret.txt")
        return True

    with Directory(tree) as directory:
        assert side(leaves, directory) is True


@SIDES
def test_stat_leaks_nothing_outside(tree, side):
    def looks(directory):
        # What is there and what is not there must look the same.
        there = (
            why_not(directory.stat, "out"),
            why_not(directory.stat, "../secret.txt"),
            why_not(directory.stat, "/etc"),
        )
        not_there = why_not(directory.stat, "../nothing"), why_not(directory.stat, "/nothing")
        return there[1:], not_there

    (tree / "out nowhere").symlink_to("../nothing")
    with Directory(tree) as directory:
        there, not_there = side(looks, directory)
        assert there == not_there
        assert side(lambda d: why_not(d.stat, "out") == why_not(d.stat, "out nowhere"), directory)


def test_no_call_of_the_system_leaves_either(tree):
    def climbs(directory):
        fd = directory.fileno()
        return [
            why_not(_open_at, fd, name)
            for name in ("..", "../secret.txt", "/etc/passwd", "/", "out", "far out", "/proc/self/fd")
        ]

    with Directory(tree) as directory:
        got = inside(climbs, directory)
    # ".." of a mount's root is itself, and "/" is empty: what opens holds nothing.
    assert set(got[1:3] + got[4:]) <= {"EPERM", "ENOENT"}


def _open_at(fd, name):
    made = os.open(name, os.O_RDONLY, dir_fd=fd)
    try:
        return sorted(os.listdir(made))
    finally:
        os.close(made)


def test_dot_dot_of_the_directory_is_the_directory_itself(tree):
    with Directory(tree) as directory:
        up = inside(lambda d: why_not(_open_at, d.fileno(), ".."), directory)
    assert up in ("EPERM", sorted(os.listdir(tree)))


@SIDES
def test_a_loop_of_links_ends(tree, side):
    with Directory(tree) as directory:
        assert side(lambda d: why_not(d.read_text, "loop"), directory) == "ELOOP"


@SIDES
@pytest.mark.parametrize("name", ["", "a\0b", b"file.txt", None, 3])
def test_what_is_no_name_is_a_value_error(tree, side, name):
    def asks(directory):
        with pytest.raises((ValueError, TypeError)):
            directory.open(name)
        return True

    with Directory(tree) as directory:
        assert side(asks, directory) is True


# --------------------------------------------------------------------------------------------------------------- reading it


@SIDES
def test_it_is_listed(tree, side):
    def lists(directory):
        return sorted(directory.iterdir()), sorted(directory.iterdir("sub")), sorted(directory.iterdir("to sub"))

    with Directory(tree) as directory:
        assert side(lists, directory) == (
            sorted(os.listdir(tree)),
            ["climb", "deeper", "inner.txt", "up and in"],
            ["climb", "deeper", "inner.txt", "up and in"],
        )


@SIDES
def test_its_files_are_looked_at(tree, side):
    def looks(directory):
        status, link = directory.stat("file.txt"), directory.stat("to inside", follow_symlinks=False)
        return (
            status.st_size,
            stat.S_ISREG(status.st_mode),
            stat.S_ISDIR(directory.stat().st_mode),
            stat.S_ISLNK(link.st_mode),
            directory.exists("file.txt"),
            directory.exists("nothing"),
            directory.readlink("to inside"),
            directory.readlink("far out") == str(tree.parent / "secret.txt"),
        )

    with Directory(tree) as directory:
        assert side(looks, directory) == (7, True, True, True, True, False, "sub/inner.txt", True)


@SIDES
def test_its_files_open_as_files(tree, side):
    def reads(directory):
        with directory.open("file.txt") as text, directory.open("file.txt", "rb", buffering=0) as raw:
            return text.read(), raw.read(3), raw.seek(-1, 2), raw.read(), text.encoding.lower()

    with Directory(tree) as directory:
        assert side(reads, directory) == ("content", b"con", 6, b"t", "utf-8")


@SIDES
def test_a_missing_file_is_missing(tree, side):
    with Directory(tree) as directory:
        assert side(lambda d: why_not(d.open, "nothing"), directory) == "ENOENT"


@SIDES
def test_a_directory_beneath_is_a_capability_of_its_own(tree, side):
    def goes_in(directory):
        with directory.directory("sub") as sub, sub.directory("deeper") as deeper:
            return (
                sub.read_text("inner.txt"),
                deeper.read_text("deep.txt"),
                why_not(sub.read_text, "../file.txt"),
                why_not(deeper.read_text, "../inner.txt"),
                why_not(sub.directory, "climb"),
            )

    with Directory(tree) as directory:
        inner, deep, *refused = side(goes_in, directory)
    assert (inner, deep) == ("inner", "deep")
    assert set(refused) <= {"EPERM", "ENOENT", "ENOTDIR"}


# -------------------------------------------------------------------------------------------------------------- changing it


CHANGES = {
    "write": lambda d: d.write_text("new.txt", "new"),
    "replace": lambda d: d.write_bytes("file.txt", b"replaced"),
    "append": lambda d: _closed(d.open("file.txt", "a")),
    "open to change": lambda d: _closed(d.open("file.txt", "r+")),
    "create exclusively": lambda d: _closed(d.open("only.txt", "x")),
    "mkdir": lambda d: d.mkdir("made"),
    "rmdir": lambda d: d.rmdir("empty"),
    "unlink": lambda d: d.unlink("file.txt"),
    "rename": lambda d: d.rename("file.txt", "sub/renamed.txt"),
    "symlink": lambda d: d.symlink("file.txt", "link"),
    "a writable directory beneath": lambda d: _closed(d.directory("sub", "rw")),
}


def _closed(opened):
    opened.close()


def picture(tree):
    """Everything beneath a directory: names, kinds and contents."""
    return {
        str(path.relative_to(tree)): os.readlink(path)
        if path.is_symlink()
        else sorted(os.listdir(path))
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(tree.rglob("*"))
    }


@SIDES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_handed_over_to_change_is_changed(tree, side, change):
    (tree / "empty").mkdir()
    before = picture(tree)
    with Directory(tree, "rw") as directory:
        side(change, directory)
    names = {id(function): name for name, function in CHANGES.items()}
    changes_nothing = names[id(change)] in ("append", "open to change", "a writable directory beneath")
    assert (picture(tree) == before) is changes_nothing


@SIDES
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_handed_over_for_reading_stays(tree, side, change):
    (tree / "empty").mkdir()
    before = picture(tree)

    def changes(directory):
        with pytest.raises(NotCapableError, match=r"handed over for reading; .* needs Directory\(path, 'rw'\)"):
            change(directory)
        return directory.read_text("file.txt")

    with Directory(tree) as directory:
        assert side(changes, directory) == "content"
    assert picture(tree) == before


def test_for_reading_the_system_refuses_too_whatever_the_object_says(tree):
    before = picture(tree)

    def lies(directory):
        directory.mode = "rw"
        fd = directory.fileno()
        return [
            why_not(directory.write_text, "file.txt", "changed"),
            why_not(directory.mkdir, "made"),
            why_not(directory.unlink, "file.txt"),
            why_not(directory.rename, "file.txt", "other"),
            why_not(lambda: os.open("file.txt", os.O_RDWR, dir_fd=fd)),
            why_not(lambda: os.open("file.txt", os.O_RDONLY | os.O_TRUNC, dir_fd=fd)),
            why_not(lambda: os.utime("file.txt", dir_fd=fd)),
            why_not(lambda: os.chmod("file.txt", 0o777, dir_fd=fd)),
            why_not(lambda: os.link("file.txt", "hard", src_dir_fd=fd, dst_dir_fd=fd)),
            why_not(lambda: os.fchmod(fd, 0o777)),
        ]

    with Directory(tree) as directory:
        refused = inside(lies, directory)
    assert set(refused) <= {"EPERM", "EROFS", "EACCES"}
    assert picture(tree) == before
    assert stat.S_IMODE(os.stat(tree / "file.txt").st_mode) != 0o777


def test_to_change_is_not_to_change_modes_owners_or_to_make_links_and_devices(tree):
    def tries(directory):
        fd = directory.fileno()
        return [
            why_not(lambda: os.chmod("file.txt", 0o4777, dir_fd=fd)),
            why_not(lambda: os.chown("file.txt", 1, 1, dir_fd=fd)),
            why_not(lambda: os.link("file.txt", "hard", src_dir_fd=fd, dst_dir_fd=fd)),
            why_not(lambda: os.mkfifo("fifo", dir_fd=fd)),
            why_not(lambda: os.mknod("device", stat.S_IFCHR | 0o600, os.makedev(1, 3), dir_fd=fd)),
        ]

    before = picture(tree)
    with Directory(tree, "rw") as directory:
        assert set(inside(tries, directory)) == {"EPERM"}
    assert picture(tree) == before


@SIDES
@pytest.mark.parametrize(
    "name", ["../new.txt", "/tmp/compart-new.txt", "out", "far out", "dir out/new.txt", "sub/climb"]
)
def test_changes_stay_beneath(tree, side, name):
    def around():
        return (
            picture(tree.parent / "beside"),
            (tree.parent / "secret.txt").read_text(),
            sorted(os.listdir(tree.parent)),
        )

    before = around()
    with Directory(tree, "rw") as directory:
        said = side(lambda d: why_not(d.write_text, name, "changed"), directory)
        # Inside, the directory is its own parent: a link that climbs may end at a new file in it.
        landed = side is inside and said == 7 and (tree / "secret.txt").read_text() == "changed"
        assert landed or said in ("EPERM", "ENOENT", "EXDEV", "EROFS", "EACCES")
        said = side(lambda d: why_not(d.rename, "file.txt", f"{name}/x"), directory)
        assert said in ("EPERM", "ENOENT", "EXDEV", "ENOTDIR", "EROFS", "EACCES")
    assert around() == before
    assert not os.path.exists("/tmp/compart-new.txt")


@SIDES
def test_a_link_that_is_made_inside_leads_no_further(tree, side):
    def climbs(directory):
        directory.symlink("../secret.txt", "made")
        directory.symlink("/etc/passwd", "made far")
        return why_not(directory.read_text, "made"), why_not(directory.read_text, "made far")

    with Directory(tree, "rw") as directory:
        assert set(side(climbs, directory)) <= {"EPERM", "ENOENT", "EXDEV"}


def test_a_writable_directory_gives_a_readable_one_and_not_the_other_way_round(tree):
    def narrows(directory):
        with directory.directory("sub", "r") as sub:
            text = sub.read_text("inner.txt")
            return text, why_not(sub.write_text, "inner.txt", "x"), why_not(sub.directory, "deeper", "rw")

    with Directory(tree, "rw") as directory:
        assert here(narrows, directory) == ("inner", "EPERM", "EPERM")
        assert inside(narrows, directory) == ("inner", "EPERM", "EPERM")


def test_what_is_written_inside_is_there_outside_at_once(tree):
    @sandboxed
    def unpacks(directory):
        directory.mkdir("made")
        with directory.open("made/file.bin", "wb") as file:
            file.write(bytes(range(256)) * 1000)
        directory.write_text("made/ünï.txt", "ü")

    with Directory(tree, "rw") as directory:
        unpacks(directory)
    assert (tree / "made" / "file.bin").read_bytes() == bytes(range(256)) * 1000
    assert (tree / "made" / "ünï.txt").read_text() == "ü"


def test_two_directories_keep_their_own_rights(tree):
    @sandboxed(on_violation="deny")
    def copies(reading, writing):
        writing.write_text("copy.txt", reading.read_text("file.txt"))
        return why_not(reading.write_text, "file.txt", "x"), why_not(lambda: _as_writable(reading))

    def _as_writable(directory):
        os.close(os.open("file.txt", os.O_RDWR, dir_fd=directory.fileno()))

    other = tree.parent / "beside"
    with Directory(tree) as reading, Directory(other, "rw") as writing:
        refused = copies(reading, writing)
    assert (other / "copy.txt").read_text() == "content"
    assert set(refused) <= {"EPERM", "EROFS", "EACCES"}


def test_the_same_directory_object_serves_many_calls(tree):
    read = sandboxed(lambda d, n: (d.read_text("file.txt"), n))
    with Directory(tree) as directory:
        assert [read(directory, n) for n in range(5)] == [("content", n) for n in range(5)]
        (tree / "file.txt").write_text("changed")
        assert read(directory, 0) == ("changed", 0)


def test_a_directory_that_was_moved_is_still_that_directory(tree):
    with Directory(tree) as directory:
        tree.rename(tree.parent / "moved")
        assert here(lambda d: d.read_text("file.txt"), directory) == "content"
        assert inside(lambda d: d.read_text("file.txt"), directory) == "content"


# ------------------------------------------------------------------------------------------------------ mistakes, and its end


def test_a_directory_that_is_not_there_is_told_at_once(tree, no_fork):
    with pytest.raises(PolicyError, match=r"nothing.*No such file or directory; name a directory that exists"):
        Directory(tree / "nothing")
    with pytest.raises(PolicyError, match="Not a directory"):
        Directory(tree / "file.txt")
    with pytest.raises(PolicyError, match="mode 'w' is unknown; choose 'r' or 'rw'"):
        Directory(tree, "w")


def test_a_closed_directory_is_told(tree, no_fork):
    with Directory(tree) as directory:
        pass
    assert directory.closed
    directory.close()
    for use in (directory.fileno, directory.iterdir, lambda: directory.open("file.txt"), directory.__enter__):
        with pytest.raises(ClosedError, match="is closed"):
            use()
    with pytest.raises(ClosedError, match="is closed"):
        sandboxed(lambda d: None)(directory)
    assert "closed" in repr(directory)


def test_closing_it_inside_closes_it_only_there(tree):
    with Directory(tree) as directory:
        inside(lambda d: d.close(), directory)
        assert directory.read_text("file.txt") == "content"


def test_an_unknown_mode_of_open_is_a_value_error(tree):
    with Directory(tree) as directory:
        with pytest.raises(ValueError, match="invalid mode: 'q'"):
            directory.open("file.txt", "q")


# -------------------------------------------------------------------------------------------------------- granted by name


def by_name(function, *grants, **policy):
    """Unmodified code that opens paths, in a compartment with these grants; it goes on after a refusal."""
    return sandboxed(function, grants=grants, on_violation="deny", **policy)()


def test_a_granted_directory_is_found_at_its_path(tree):
    def reads():
        return (
            (tree / "file.txt").read_text(),
            sorted(os.listdir(tree)),
            os.path.getsize(tree / "sub" / "inner.txt"),
            [name for _, _, files in os.walk(tree / "sub") for name in sorted(files)],
            os.path.exists(tree / "nothing"),
        )

    outside = reads()
    assert sandboxed(reads, grants=[grant.directory(tree)])() == outside


@pytest.mark.parametrize(
    "name", ["file.txt", "sub/inner.txt", "to inside", "to sub/inner.txt", "sub/up and in", "sub/../file.txt"]
)
def test_names_beneath_a_granted_directory_are_read(tree, name):
    assert by_name((tree / name).read_text, grant.directory(tree)) == (tree / name).read_text()


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "../beside/file.txt",
        "out",
        "far out",
        "dir out/file.txt",
        "sub/climb",
        "/etc/passwd",
        "/proc/self/maps",
    ],
)
def test_names_outside_a_granted_directory_are_refused(tree, path):
    def looks():
        return why_not((tree / path).read_bytes), why_not(os.stat, tree / path)

    assert os.path.exists(tree / path)
    assert set(by_name(looks, grant.directory(tree))) <= {"EPERM", "ENOENT"}


def test_what_lies_outside_a_granted_directory_is_told(tree):
    with pytest.raises(ViolationError, match=r"secret\.txt"):
        sandboxed(lambda: os.path.exists(tree.parent / "secret.txt"), grants=[grant.directory(tree)])()


def test_nothing_else_of_the_file_system_is_there(tree):
    def world():
        steps = Path(tree).parents
        return [why_not(os.listdir, step) for step in steps], [
            why_not(os.stat, path) for path in ("/etc", "/proc", "/dev")
        ]

    on_the_way, elsewhere = by_name(world, grant.directory(tree))
    names = [path.name for path in (tree, *Path(tree).parents)]
    for listed, name in zip(on_the_way, names, strict=False):
        assert listed in ("EACCES", "EPERM", [name])
    assert set(elsewhere) <= {"EPERM", "ENOENT"}


def test_a_directory_granted_for_reading_is_not_changed(tree):
    before = picture(tree)

    def changes():
        return [
            why_not((tree / "file.txt").write_text, "x"),
            why_not((tree / "new.txt").touch),
            why_not((tree / "new").mkdir),
            why_not((tree / "file.txt").unlink),
            why_not((tree / "file.txt").rename, tree / "other"),
            why_not(os.truncate, tree / "file.txt", 0),
            why_not(os.utime, tree / "file.txt"),
            why_not(os.chmod, tree / "file.txt", 0o777),
        ]

    assert set(by_name(changes, grant.directory(tree))) <= {"EPERM", "EROFS", "EACCES"}
    assert picture(tree) == before


def test_a_directory_granted_to_change_is_changed(tree):
    def changes():
        (tree / "new.txt").write_text("new")
        (tree / "made").mkdir()
        (tree / "file.txt").rename(tree / "made" / "moved.txt")
        (tree / "to inside").unlink()
        with open(tree / "sub" / "inner.txt", "a") as file:
            file.write(" and more")

    sandboxed(changes, grants=[grant.directory(tree, "rw")])()
    assert (tree / "new.txt").read_text() == "new"
    assert (tree / "made" / "moved.txt").read_text() == "content"
    assert not (tree / "to inside").is_symlink()
    assert (tree / "sub" / "inner.txt").read_text() == "inner and more"


def test_a_granted_path_that_leads_through_a_link_works_by_the_name_it_was_granted(tree):
    link = tree.parent / "link to tree"
    link.symlink_to("tree")
    assert by_name((link / "file.txt").read_text, grant.directory(link)) == "content"


def test_a_relative_grant_works_by_its_relative_and_its_absolute_name(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)

    def reads():
        return Path("tree/file.txt").read_text(), (tree / "file.txt").read_text(), os.getcwd()

    assert sandboxed(reads, grants=[grant.directory("tree")])() == ("content", "content", str(tree.parent))


def test_the_working_directory_itself_can_be_granted(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert sandboxed(lambda: Path("sub/inner.txt").read_text(), grants=[grant.directory(".")])() == "inner"


def test_names_are_relative_to_where_the_host_is_at_each_call(tree, monkeypatch):
    read = sandboxed(
        lambda: Path("inner.txt" if os.getcwd().endswith("sub") else "file.txt").read_text(),
        grants=[grant.directory(tree)],
    )
    monkeypatch.chdir(tree)
    assert read() == "content"
    monkeypatch.chdir(tree / "sub")
    assert read() == "inner"


def test_dot_dot_from_the_working_directory_stays_within_the_grants(tree, monkeypatch):
    monkeypatch.chdir(tree / "sub")
    assert by_name(Path("../file.txt").read_text, grant.directory(tree)) == "content"
    assert by_name(lambda: why_not(Path("../../secret.txt").read_text), grant.directory(tree)) in ("EPERM", "ENOENT")


def test_of_two_grants_that_overlap_the_inner_one_decides_beneath_it(tree):
    def changes():
        return why_not((tree / "sub" / "new.txt").write_text, "new"), why_not((tree / "new.txt").write_text, "new")

    outer, inner = grant.directory(tree, "r"), grant.directory(tree / "sub", "rw")
    for grants in ((outer, inner), (inner, outer)):
        (tree / "sub" / "new.txt").unlink(missing_ok=True)
        wrote, refused = by_name(changes, *grants)
        assert wrote == 3
        assert refused in ("EPERM", "EROFS", "EACCES")
        assert (tree / "sub" / "new.txt").read_text() == "new"


def test_an_inner_grant_for_reading_within_one_to_change(tree):
    def changes():
        return why_not((tree / "new.txt").write_text, "new"), why_not((tree / "sub" / "inner.txt").write_text, "x")

    wrote, refused = by_name(changes, grant.directory(tree, "rw"), grant.directory(tree / "sub", "r"))
    assert wrote == 3
    assert refused in ("EPERM", "EROFS", "EACCES")
    assert (tree / "sub" / "inner.txt").read_text() == "inner"


def test_the_same_grant_twice_is_one(tree):
    assert by_name((tree / "file.txt").read_text, grant.directory(tree), grant.directory(tree)) == "content"


def test_two_directories_granted_by_name(tree):
    other = tree.parent / "beside"

    def copies():
        (other / "copy.txt").write_text((tree / "file.txt").read_text())
        return why_not((tree / "file.txt").write_text, "x")

    assert by_name(copies, grant.directory(tree), grant.directory(other, "rw")) in ("EPERM", "EROFS", "EACCES")
    assert (other / "copy.txt").read_text() == "content"


def test_a_grant_by_name_and_a_directory_handed_over(tree):
    other = tree.parent / "beside"
    with Directory(other, "rw") as directory:
        both = sandboxed(
            lambda d: (
                d.write_text("new.txt", (tree / "file.txt").read_text()),
                why_not((other / "file.txt").read_text),
            ),
            grants=[grant.directory(tree)],
            on_violation="deny",
        )
        wrote, by_its_name = both(directory)
    assert wrote == 7
    assert by_its_name in ("EPERM", "ENOENT")


# -------------------------------------------------------------------------------------------------- single files, by name


def attempts(path):
    """What can be done with a file by its name."""

    def appends():
        with open(path, "ab") as file:
            file.write(b"+")

    def changes():
        fd = os.open(path, os.O_RDWR)
        os.close(fd)

    def writes():
        fd = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(fd, b"C", 0)
        finally:
            os.close(fd)

    return {
        "read": why_not(path.read_bytes) not in ("EPERM", "EACCES", "EROFS"),
        "append": why_not(appends) is None,
        "write": why_not(writes) is None,
        "read and write": why_not(changes) is None,
        "empty": why_not(os.truncate, path, 0) is None,
        "remove": why_not(path.unlink) is None,
    }


ALLOWED = {
    "r": {"read"},
    "w": {"append", "write", "empty"},
    "rw": {"read", "append", "write", "read and write", "empty"},
}


@pytest.mark.parametrize("mode", ALLOWED)
def test_a_file_granted_by_name_does_what_its_mode_says(tree, mode):
    path = tree / "file.txt"
    done = by_name(lambda: attempts(path), grant.file(path, mode))
    assert {what for what, worked in done.items() if worked} == ALLOWED[mode]
    assert path.exists()


def test_outside_all_of_it_can_be_done(tree):
    assert all(attempts(tree / "file.txt").values())


def test_a_file_granted_for_appending_comes_as_an_argument_and_keeps_what_it_holds(tree):
    path = tree / "file.txt"
    appending = grant.file(path, "a")

    @sandboxed(on_violation="deny")
    def appends(file):
        file.write(b" and more")
        file.flush()
        return [
            why_not(os.ftruncate, file.fileno(), 0),
            why_not(os.pwrite, file.fileno(), b"X", 0),
            why_not(os.lseek, file.fileno(), 0, os.SEEK_SET),
            why_not(os.read, file.fileno(), 1),
        ]

    assert set(appends(appending)) <= {"EPERM", "EBADF"}
    assert path.read_text() == "content and more"


def test_a_name_cannot_be_granted_for_appending_and_the_remedy_is_told(tree, no_fork):
    with pytest.raises(PolicyError, match=r"pass grant\.file\(path, 'a'\) or open\(path, 'ab'\) as an argument"):
        sandboxed(lambda: None, grants=[grant.file(tree / "file.txt", "a")])()


@pytest.mark.parametrize("mode", ALLOWED)
def test_a_grant_of_a_file_may_be_handed_over_as_an_argument(tree, mode):
    path = tree / "file.txt"

    @sandboxed(on_violation="deny")
    def tries(file):
        fd = file.fileno()
        return why_not(os.pread, fd, 4, 0), why_not(os.pwrite, fd, b"C", 0), why_not(path.read_text)

    read, wrote, by_its_name = tries(grant.file(path, mode))
    assert read == (b"cont" if "r" in mode else "EPERM")
    assert wrote == (1 if "w" in mode else "EPERM")
    assert by_its_name == "EPERM"


def test_a_grant_of_a_directory_may_be_handed_over_as_an_argument(tree):
    @sandboxed(on_violation="deny")
    def tries(directory):
        return directory.read_text("sub/inner.txt"), why_not(directory.write_text, "new.txt", "x")

    assert tries(grant.directory(tree)) == ("inner", "EPERM")


def test_a_file_granted_by_name_does_not_bring_its_neighbours(tree):
    def looks():
        return (
            why_not(os.listdir, tree),
            why_not((tree / "sub" / "inner.txt").read_text),
            why_not((tree.parent / "secret.txt").read_text),
            (tree / "file.txt").read_text(),
        )

    listed, *refused, content = by_name(looks, grant.file(tree / "file.txt"))
    assert listed in (["file.txt"], "EACCES", "EPERM")
    assert set(refused) <= {"EPERM", "ENOENT"}
    assert content == "content"


def test_a_file_granted_to_change_within_a_directory_granted_for_reading(tree):
    def changes():
        (tree / "file.txt").write_text("changed")
        return why_not((tree / "sub" / "inner.txt").write_text, "x"), (tree / "sub" / "inner.txt").read_text()

    refused, text = by_name(changes, grant.directory(tree), grant.file(tree / "file.txt", "rw"))
    assert refused in ("EPERM", "EROFS", "EACCES")
    assert text == "inner"
    assert (tree / "file.txt").read_text() == "changed"


def test_a_file_that_was_replaced_is_found_as_it_is_now(tree):
    path = tree / "file.txt"
    read = sandboxed(path.read_text, grants=[grant.file(path)])
    assert read() == "content"
    new = tree / "new.txt"
    new.write_text("replaced")
    new.rename(path)
    assert read() == "replaced"


def test_a_grant_whose_path_has_gone_is_told_by_the_next_call(tree):
    path = tree / "file.txt"
    read = sandboxed(path.read_text, grants=[grant.file(path)])
    path.unlink()
    with pytest.raises(PolicyError, match=r"file\.txt"):
        read()


def test_grants_do_not_reach_the_next_call(tree):
    path = tree / "file.txt"
    assert sandboxed(path.read_text, grants=[grant.file(path)])() == "content"
    with pytest.raises(ViolationError):
        sandboxed(path.read_text)()
    assert sandboxed(path.read_text, grants=[grant.file(path)])() == "content"


def test_many_different_grants_stay_bounded_and_take_nothing_from_other_calls(tmp_path):
    plain = sandboxed(lambda: os.getpid())
    assert plain() != os.getpid()
    held = len(os.listdir("/proc/self/fd"))
    for n in range(70):
        path = tmp_path / f"{n}.txt"
        path.write_text(str(n))
        assert sandboxed(path.read_text, grants=[grant.file(path)])() == str(n)
    assert len(os.listdir("/proc/self/fd")) - held <= 8 * 64
    assert plain() != os.getpid()
    first = tmp_path / "0.txt"
    assert sandboxed(first.read_text, grants=[grant.file(first)])() == "0"
