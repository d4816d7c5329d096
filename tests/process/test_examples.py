"""The examples do what they say, and the demonstration's checks can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL")
pytest.importorskip("pypdf")
pytest.importorskip("lxml")
pytest.importorskip("yaml")
pytest.importorskip("numpy")

EXAMPLES = Path(__file__).parents[2] / "examples"

HONEST = [
    "photo.jpg",
    "drawing.png",
    "sticker.webp",
    "report.pdf",
    "page.html",
    "orders.xml",
    "settings.yaml",
    "files.zip",
    "files.tar",
    "files.tar.gz",
    "order.pickle",
    "weights.npy",
]

HOSTILE = [
    "evil.pickle",
    "evil.yaml",
    "evil.npy",
    "entity.xml",
    "slip.tar",
    "bomb.zip",
    "bomb.png",
    "redos.txt",
    "by-path",
    "look",
    "descriptors",
    "environment",
    "overwrite",
    "plant",
    "connect",
    "signal",
    "fork",
    "forks",
    "sleep",
    "loop",
    "eat",
    "flood",
    "crash",
    "exit",
    "object",
    "error",
    "false-text",
    "false-number",
    "false-exit",
    "garbage",
]

NOT_LET_LOOSE = {"bomb.zip", "bomb.png", "redos.txt", "sleep", "loop", "eat", "crash", "exit", "false-exit", "garbage"}


def run(*arguments):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)


def run_changed(change):
    """The demonstration after some lines of Python have changed it."""
    return run("-c", f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n{change}\nsys.exit(demo.main())")


def verdicts(done):
    """{name: verdict} of the printed table."""
    lines = done.stdout.splitlines()
    table = lines[2 : lines.index("")]
    return {line[:13].strip(): line.rsplit("  ", 1)[1] for line in table}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("files")
    assert run(EXAMPLES / "inputs.py", made).returncode == 0
    return made


# The demonstration


@pytest.fixture(scope="module")
def demonstration():
    return run(EXAMPLES / "demo.py")


def test_the_demonstration_holds(demonstration):
    assert demonstration.returncode == 0, demonstration.stdout + demonstration.stderr
    assert verdicts(demonstration) == dict.fromkeys(HONEST, "same") | dict.fromkeys(HOSTILE, "held")
    assert demonstration.stderr == ""


def test_its_table_fits_a_terminal_and_has_no_escapes(demonstration):
    assert max(map(len, demonstration.stdout.splitlines())) <= 120
    assert demonstration.stdout.replace("\n", "").isprintable()


def test_it_fails_without_walls():
    done = run(EXAMPLES / "demo.py", "--unconfined")
    assert done.returncode == 1
    assert verdicts(done) == {name: "GOT OUT" for name in HOSTILE if name not in NOT_LET_LOOSE}


def test_it_notices_an_attack_that_gets_out_of_its_compartment():
    leaky = [
        "by-path",
        "look",
        "descriptors",
        "environment",
        "overwrite",
        "plant",
        "connect",
        "signal",
        "fork",
        "forks",
    ]
    done = run_changed(
        f"""
import dataclasses, demo

class Leaky:
    def __init__(self, function):
        self.__wrapped__ = function.__wrapped__

    def __call__(self, *arguments):
        return self.__wrapped__(*arguments)

demo.HONEST.clear()
demo.ATTACKS[:] = [
    dataclasses.replace(attack, function=Leaky(attack.function)) for attack in demo.ATTACKS if attack.name in {leaky}
]
"""
    )
    assert verdicts(done) == dict.fromkeys(leaky, "GOT OUT"), done.stderr
    assert done.returncode == 1


def test_it_notices_a_file_that_reads_differently_and_an_attack_that_ends_otherwise():
    done = run_changed(
        """
import dataclasses, demo, parsers

class Different:
    __wrapped__ = staticmethod(lambda file: {"format": "JPEG", "size": (1, 1)})

    def __call__(self, file):
        return parsers.read_image(file)

demo.HONEST = {"photo.jpg": Different()}
demo.ATTACKS[:] = [dataclasses.replace(a, ends=KeyError) for a in demo.ATTACKS if a.name == "plant"]
"""
    )
    assert verdicts(done) == {"photo.jpg": "WRONG", "plant": "WRONG"}, done.stderr
    assert done.returncode == 1


def test_it_notices_an_attack_that_does_nothing():
    done = run_changed(
        """
import dataclasses, demo
demo.HONEST.clear()
demo.ATTACKS[:] = [dataclasses.replace(a, check=lambda scene, value: "") for a in demo.ATTACKS if a.name == "plant"]
"""
    )
    assert verdicts(done) == {"plant": "DUD"}, done.stderr
    assert done.returncode == 1


def test_a_granted_folder_is_what_an_honest_archive_is_unpacked_to(folder, tmp_path):
    done = run_changed(
        f"""
import pathlib, demo, parsers
from compart import grant

folder = pathlib.Path({str(tmp_path)!r})
with open({str(folder / "files.tar.gz")!r}, "rb") as file:
    print(parsers.unpack_tar.options(grants=[grant.directory(folder, "rw")])(file, folder))
demo.HONEST.clear()
demo.ATTACKS.clear()
"""
    )
    assert done.stdout.splitlines()[0] == "['notes/read me.txt', 'data/números.bin']", done.stderr
    assert (tmp_path / "notes/read me.txt").read_bytes() == b"a stranger sent this\n" * 40
    assert (tmp_path / "data/números.bin").read_bytes() == bytes(range(256)) * 64


# Files of one's own


def parse(*arguments):
    return run(EXAMPLES / "parse_untrusted.py", *arguments)


def test_parse_untrusted_reads_every_kind(folder):
    done = parse(*[folder / name for name in HONEST])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot be read" not in done.stdout
    for expected in (
        "photo.jpg: image",
        "format: 'WEBP'",
        "pages: ['This is page one.', 'This is page two.', 'This is page three.']",
        "links: [('the manual', 'https://example.org/manual')]",
        "кофе 1",
        "since: datetime.date(2020, 2, 29)",
        "data/números.bin: (16384,",
        "price: Decimal('19.99')",
        "shape=(64, 48)",
    ):
        assert expected in done.stdout


def test_parse_untrusted_goes_by_content_before_the_name(folder, tmp_path):
    misnamed = tmp_path / "notes.yaml"
    misnamed.write_bytes((folder / "drawing.png").read_bytes())
    assert "notes.yaml: image" in parse(misnamed).stdout


def test_parse_untrusted_tells_what_it_cannot_read_and_reads_the_rest(folder, tmp_path):
    unknown = tmp_path / "noise.bin"
    unknown.write_bytes(b"\0\1\2\3")
    done = parse(folder / "truncated.png", tmp_path / "missing.pdf", unknown, folder / "drawing.png")
    assert done.returncode == 1
    truncated, missing, kind, *drawing = done.stdout.splitlines()
    assert truncated.endswith("truncated.png: cannot be read: OSError: image file is truncated")
    assert missing.endswith("missing.pdf: cannot be read: No such file or directory")
    assert kind.endswith("noise.bin: cannot be read: ValueError: no parser for this kind of file")
    assert drawing[1].strip() == "format: 'PNG'"
    assert done.stderr == ""


def test_parse_untrusted_keeps_to_the_memory_it_is_given(tmp_path):
    sys_path = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})"
    run("-c", f"{sys_path}; import inputs, pathlib; inputs.png_bomb(pathlib.Path({str(tmp_path / 'bomb.png')!r}))")
    done = parse("--memory", "64M", tmp_path / "bomb.png")
    assert done.returncode == 1
    assert "cannot be read: MemoryLimitError" in done.stdout


def test_parse_untrusted_refuses_a_limit_that_makes_no_sense(folder):
    done = parse("--memory", "lots", folder / "photo.jpg")
    assert done.returncode == 2
    assert "memory='lots' is no size" in done.stderr


def test_parse_untrusted_lets_no_escape_sequence_through(tmp_path):
    hostile = tmp_path / "title.yaml"
    hostile.write_text('"\\e]0;mine\\a": "\\e[31m"\n"two\\nlines": "\\u202e"\n')
    done = parse(hostile)
    assert done.returncode == 0, done.stdout
    assert done.stdout.replace("\n", "").isprintable()
    assert len(done.stdout.splitlines()) == 3
