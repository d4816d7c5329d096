"""What Python opens late works in a compartment, or fails the call with a remedy; it never gives a wrong result in silence.

Each case runs in forks of a fresh interpreter that has loaded nothing but compart: once plainly, once in a compartment.
"""

import contextlib
import encodings
import errno
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compart import ViolationError, sandboxed

ROOT = Path(__file__).parents[2]

RUNNER = """
import os, pickle, sys
from compart import ViolationError, sandboxed

with open(sys.argv[1], "rb") as file:
    cases, options, before = pickle.load(file)
sandboxed(lambda: 0)()  # what compart itself loads is there from now on
exec(before)

def in_a_fork(work):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said = pickle.dumps(work())
        except BaseException as error:
            said = pickle.dumps(f"error: {type(error).__name__}: {error}")
        os.write(writer, said)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = pickle.loads(file.read())
    os.waitpid(pid, 0)
    return said

def confined(function):
    try:
        return ("right", sandboxed(function, timeout=30, **options)())
    except ViolationError as error:
        return ("refused", [(str(violation), violation.suggestion) for violation in error.violations])
    except BaseException as error:
        return ("error", f"{type(error).__name__}: {error}")

answers = {}
for name, source in cases.items():
    space = {}
    exec(compile(source, "case", "exec"), space)
    plain, (kind, value) = in_a_fork(space[name]), in_a_fork(lambda: confined(space[name]))
    answers[name] = ("wrong", (value, plain)) if kind == "right" and value != plain else (kind, value)
with open(sys.argv[1], "wb") as file:
    pickle.dump(answers, file)
"""


def run_fresh(
    cases: dict[str, Callable[..., Any]],
    directory: Path,
    *,
    environment: dict[str, str] | None = None,
    before: str = "",
    **options: Any,
) -> dict[str, tuple[str, Any]]:
    """How each case ends in a compartment: ("right" | "wrong" | "refused" | "error", what it gave)."""
    packed = {name: textwrap.dedent(inspect.getsource(function)) for name, function in cases.items()}
    (directory / "cases").write_bytes(pickle.dumps((packed, options, textwrap.dedent(before))))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(directory / "cases")],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    answers: dict[str, tuple[str, Any]] = pickle.loads((directory / "cases").read_bytes())
    return answers


def cases_of(table: type) -> dict[str, Callable[..., Any]]:
    return {name: function for name, function in vars(table).items() if inspect.isfunction(function)}


class Works:
    """Right in a compartment with nothing granted and nothing loaded by the policy."""

    def internationalised_names():
        return "bücher.example".encode("idna"), b"xn--bcher-kva.example".decode("idna"), "bücher".encode("punycode")

    def named_characters():
        import unicodedata

        return (
            eval(r"'\N{SNOWMAN} \N{GREEK SMALL LETTER ALPHA}'"),
            unicodedata.name("é"),
            unicodedata.normalize("NFD", "é"),
        )

    def parsed_dates():
        import datetime
        import time

        return (
            time.strptime("29 Feb 2024 12:30", "%d %b %Y %H:%M")[:6],
            datetime.datetime.strptime("2024-02-29T12+0900", "%Y-%m-%dT%H%z").isoformat(),
            datetime.datetime.fromisoformat("2024-02-29T12:00:00+09:00").timestamp(),
        )

    def local_time():
        import datetime
        import time

        moment = 1_709_175_600
        return (
            tuple(time.localtime(moment)),
            time.localtime(moment).tm_zone,
            datetime.datetime.fromtimestamp(moment).astimezone().isoformat(),
            time.ctime(moment),
        )

    def formatted_and_made_times():
        """strftime(3) and mktime(3) look at TZ again."""
        import time

        moment = time.localtime(1_709_175_600)
        return time.strftime("%Y-%m-%d %H:%M %Z %z", moment), time.mktime(moment), time.tzname

    def the_locale():
        import locale

        return locale.localeconv()["decimal_point"], f"{1234.5:n}", locale.setlocale(locale.LC_NUMERIC)

    def the_locale_of_c():
        import locale

        return locale.setlocale(locale.LC_ALL, "C"), locale.str(1.5)

    def encodings_of_the_system():
        import locale
        import sys

        return sys.getfilesystemencoding(), locale.getpreferredencoding(False), sys.stdout.encoding

    def formatted_tracebacks():
        import traceback

        try:
            {}["x"]
        except KeyError:
            lines = traceback.format_exc().splitlines()
        return [line for line in lines if line.startswith(("Traceback", '  File "case"', "KeyError"))]

    def logged_exceptions():
        import io
        import logging

        written = io.StringIO()
        logging.basicConfig(stream=written, format="%(levelname)s %(message)s")
        try:
            [].pop()
        except IndexError:
            logging.exception("failed")
        return [line for line in written.getvalue().splitlines() if not line.startswith(" ")]

    def warnings_given():
        import warnings

        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.warn("again", DeprecationWarning, stacklevel=1)
        return [str(warning.message) for warning in caught]

    def unclosed_files_with_warnings_on():
        import os
        import warnings

        warnings.simplefilter("always")
        file = os.fdopen(os.dup(1), "wb", 0)
        del file
        return "warned"

    def unraisable_exceptions():
        class Fails:
            def __del__(self):
                raise ValueError("in __del__")

        Fails()
        return "went on"

    def threads_that_raise():
        import threading

        thread = threading.Thread(target=lambda: 1 // 0)
        thread.start()
        thread.join()
        return "went on"

    def the_platform():
        import platform

        return (
            platform.platform(),
            platform.processor(),
            platform.python_version(),
            platform.system(),
            platform.libc_ver(),
        )

    def identifiers():
        import uuid

        return len(str(uuid.uuid4())), str(uuid.uuid5(uuid.NAMESPACE_DNS, "example.org")), uuid.UUID(int=7).hex

    def temporary_files_in_memory():
        import tempfile

        with tempfile.SpooledTemporaryFile(max_size=1000) as file:
            file.write(b"spooled")
            file.seek(0)
            return file.read()

    def decimal_numbers():
        import decimal
        import fractions

        return decimal.Decimal(1) / 7, str(fractions.Fraction("0.125")), decimal.getcontext().prec

    def random_numbers():
        import random
        import secrets

        return random.Random(5).random(), len(secrets.token_hex(8)), 0 <= random.SystemRandom().random() < 1

    def numbers_of_processors():
        import os

        return os.cpu_count(), len(os.sched_getaffinity(0))

    def event_loops():
        import asyncio

        async def main():
            await asyncio.sleep(0.001)
            return await asyncio.gather(asyncio.to_thread(sum, [1, 2]), asyncio.sleep(0, 5))

        return asyncio.run(main())

    def copies_of_descriptors():
        import os

        with os.fdopen(os.dup(1), "w") as file:
            return file.write("text")

    def output_in_any_script():
        print("日本語 Ünïcödé")
        return "printed"

    def input_that_is_at_its_end():
        import sys

        return sys.stdin.read()

    def widths_of_terminals():
        import shutil

        return tuple(shutil.get_terminal_size((70, 20)))

    def hashes_of_all_kinds():
        import hashlib
        import hmac

        digests = [hashlib.new(name, b"x").hexdigest() for name in ("md5", "sha1", "sha512", "blake2s", "sha3_512")]
        return digests, hmac.new(b"k", b"x", "sha256").hexdigest(), hashlib.pbkdf2_hmac("sha256", b"p", b"s", 10).hex()

    def data_classes_and_abstract_types():
        import dataclasses
        import enum
        import typing

        made = dataclasses.make_dataclass("Made", [("x", int)])(1)
        colour = enum.Enum("Colour", "RED GREEN")
        return dataclasses.asdict(made), colour.RED.value, str(typing.get_type_hints(made.__class__))

    def urls_and_paths():
        import pathlib
        import urllib.parse

        path = pathlib.PurePosixPath("/a/b.tar.gz")
        return urllib.parse.urlsplit("https://é.example/p?q=1#f").netloc, path.suffixes, urllib.parse.quote("ü /")

    def names_of_errors():
        import errno
        import os
        import signal

        return os.strerror(errno.ENOENT), signal.strsignal(11), errno.errorcode[13]


class Refused:
    """Needs something of the system, which a wrong guess would hide: the call fails, and says what would help."""

    def time_zones():
        import zoneinfo

        return str(zoneinfo.ZoneInfo("Asia/Tokyo").utcoffset(None))

    def versions_of_packages():
        import importlib.metadata

        return importlib.metadata.version("pytest")

    def modules_that_nobody_loaded():
        import mailbox

        return mailbox.Message().is_multipart()

    def temporary_files():
        import tempfile

        with tempfile.TemporaryFile() as file:
            return file.write(b"x")

    def the_password_database():
        import pwd

        return pwd.getpwuid(0).pw_name

    def the_home_of_somebody():
        import os

        return os.path.expanduser("~root/x")

    def names_of_hosts():
        import socket

        return len(socket.getaddrinfo("localhost", 80)) > 0

    def certificates():
        """Without the check the context would trust nobody, and say nothing."""
        import ssl

        return ssl.create_default_context().cert_store_stats()["x509_ca"]

    def libraries_by_name():
        import ctypes.util

        return ctypes.util.find_library("m")

    def descriptors_by_path():
        with open("/dev/fd/1", "w") as file:
            return file.write("x")

    def modules_by_file():
        import importlib.resources

        return importlib.resources.files("encodings").joinpath("__init__.py").is_file()


class Either:
    """Right, or refused; which one depends on the version of Python or of the C library."""

    def wrapped_and_parsed_arguments():
        import argparse
        import textwrap

        parser = argparse.ArgumentParser(prog="p", description="d")
        parser.add_argument("--n", type=int, default=3, help="a number")
        return parser.format_help(), vars(parser.parse_args(["--n", "5"])), textwrap.fill("a b c " * 20, 30)

    def kinds_of_files():
        import mimetypes

        return mimetypes.guess_type("x.html"), mimetypes.guess_type("x.epub"), mimetypes.guess_extension("image/png")

    def sources_of_functions():
        import inspect
        import textwrap

        return len(inspect.getsource(textwrap.dedent)) > 100

    def a_locale_with_utf8():
        import locale

        return locale.setlocale(locale.LC_ALL, "C.UTF-8")

    def catalogs_of_messages():
        import gettext

        return gettext.gettext("hello")

    def identifiers_by_time():
        import uuid

        return uuid.uuid1().version

    def locks_of_processes():
        import multiprocessing

        return multiprocessing.get_context("fork").Lock().acquire(timeout=1)

    def shared_blocks():
        import multiprocessing.shared_memory

        block = multiprocessing.shared_memory.SharedMemory(create=True, size=10)
        block.close()
        block.unlink()
        return "made"

    def processes_of_asyncio():
        import asyncio

        async def main():
            process = await asyncio.create_subprocess_exec("/bin/true")
            return await process.wait()

        return asyncio.run(main())

    def databases():
        import sqlite3

        base = sqlite3.connect(":memory:")
        base.execute("create table t (x)")
        base.executemany("insert into t values (?)", [(n,) for n in range(100)])
        return base.execute("select sum(x) from t").fetchone()

    def sorted_databases():
        """A large sort spills to a file of SQLite's own."""
        import sqlite3

        base = sqlite3.connect(":memory:")
        base.execute("pragma cache_size = 10")
        base.execute("pragma temp_store = 1")
        base.execute("create table t (x text)")
        base.executemany("insert into t values (?)", [(f"{n * 7919 % 20011:0200d}",) for n in range(20000)])
        return base.execute("select x from t order by x limit 1").fetchone()

    def names_of_this_machine():
        import socket

        return isinstance(socket.gethostname(), str)

    def zones_of_the_standard_library():
        import zoneinfo

        return len(zoneinfo.available_timezones()) > 100

    def help_texts():
        import pydoc

        return pydoc.render_doc(len, renderer=pydoc.plaintext)[:20]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    every = {**cases_of(Works), **cases_of(Refused), **cases_of(Either)}
    return run_fresh(every, tmp_path_factory.mktemp("late"))


@pytest.mark.parametrize("name", cases_of(Works))
def test_it_works_for(name: str, answers: dict[str, tuple[str, Any]]) -> None:
    kind, value = answers[name]
    assert kind == "right", (kind, value)


@pytest.mark.parametrize("name", cases_of(Refused))
def test_the_call_fails_with_a_remedy_for(name: str, answers: dict[str, tuple[str, Any]]) -> None:
    kind, refused = answers[name]
    assert kind == "refused", (kind, refused)
    assert any(suggestion for _, suggestion in refused), refused


@pytest.mark.parametrize("name", cases_of(Either))
def test_it_is_never_wrong_in_silence_for(name: str, answers: dict[str, tuple[str, Any]]) -> None:
    kind, value = answers[name]
    assert kind in ("right", "refused"), (kind, value)


# ---- codecs --------------------------------------------------------------------------------------------------------------------

CODECS = sorted(
    module.name
    for module in pkgutil.iter_modules(encodings.__path__)
    if module.name not in ("aliases", "mbcs", "oem", "undefined")
)


def transcodes(names: list[str]) -> dict[str, tuple[Any, ...]]:
    """What each codec makes of ASCII and of all bytes, through names as people write them."""
    import codecs

    made: dict[str, tuple[Any, ...]] = {}
    for name in names:
        told = codecs.lookup(name)
        if not told._is_text_encoding:
            made[name] = (told.name, codecs.encode(b"bytes", name) if name != "rot_13" else codecs.encode("text", name))
            continue
        of_names = name in ("idna", "punycode")
        how = "strict" if of_names else "replace"
        text = bytes(range(97, 123) if of_names else range(256)).decode(name.replace("_", "-"), how)
        made[name] = (told.name, "abc".encode(name), text, "üx日".encode(name, how))
    return made


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_every_codec_works() -> None:
    assert len(CODECS) > 100
    outcome = sandboxed(transcodes).run(CODECS)
    assert outcome.value == transcodes(CODECS)
    assert outcome.violations == ()


# ---- the host's time zone --------------------------------------------------------------------------------------------------------


def zone():
    import datetime
    import time

    moment = 1_709_175_600
    return (
        datetime.datetime.fromtimestamp(moment).astimezone().isoformat(),
        time.localtime(moment).tm_zone,
        time.strftime("%H %Z", time.localtime(moment)),
        time.mktime((2024, 7, 1, 0, 0, 0, 0, 0, -1)),
    )


TOKYO = """
import os, time
os.environ["TZ"] = "{0}"
time.tzset()
"""


@pytest.mark.parametrize("name", ["Asia/Tokyo", "America/New_York", "XYZ-3:30"])
def test_the_zone_of_the_hosts_environment_holds_inside(name: str, tmp_path: Path) -> None:
    assert run_fresh({"zone": zone}, tmp_path, environment={"TZ": name})["zone"][0] == "right"


@pytest.mark.parametrize("name", ["Asia/Tokyo", "America/New_York", "XYZ-3:30"])
def test_a_zone_that_the_host_sets_later_holds_inside(name: str, tmp_path: Path) -> None:
    assert run_fresh({"zone": zone}, tmp_path, before=TOKYO.format(name))["zone"][0] == "right"


def test_a_zone_that_code_inside_sets_is_not_wrong_in_silence(tmp_path: Path) -> None:
    def moves():
        import os
        import time

        os.environ["TZ"] = "Asia/Tokyo"
        time.tzset()
        return time.strftime("%H %Z", time.localtime(1_709_175_600))

    kind, said = run_fresh({"moves": moves}, tmp_path)["moves"]
    assert kind in ("right", "refused"), said


def test_a_zone_that_was_warmed_works() -> None:
    def offset() -> str:
        import zoneinfo

        return str(zoneinfo.ZoneInfo("Asia/Tokyo").utcoffset(None) or zoneinfo.ZoneInfo("Asia/Tokyo"))

    def warm() -> None:
        import zoneinfo

        zoneinfo.ZoneInfo("Asia/Tokyo")

    assert sandboxed(offset, warm=warm)() == "Asia/Tokyo"


def test_a_context_for_tls_that_was_made_before_has_its_certificates() -> None:
    import ssl

    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        pytest.skip("this machine trusts nobody")
    assert sandboxed(lambda: context.cert_store_stats())() == context.cert_store_stats()


# ---- which error a library sees -----------------------------------------------------------------------------------------------


def test_a_module_that_was_not_loaded_is_not_found_and_the_violation_says_to_load_it() -> None:
    """A refused stat() makes the import system say "no module"; only the violation tells the truth."""

    def imports() -> None:
        import mailbox

        mailbox.Message()

    sys.modules.pop("mailbox", None)
    with pytest.raises(ModuleNotFoundError, match="mailbox"):
        sandboxed(imports, on_violation="deny")()
    with pytest.raises(ViolationError) as caught:
        sandboxed(imports)()
    assert any(violation.suggestion == "Policy(preload=['mailbox'])" for violation in caught.value.violations)
    sandboxed(imports, preload=["mailbox"])()


def test_a_codec_that_failed_once_outside_is_no_matter_inside() -> None:
    """A lookup that fails is remembered for the life of a process: it must not be refused before it is loaded."""

    def decodes() -> str:
        return b"\x93\xfa\x96\x7b".decode("shift_jis")

    for _ in range(2):
        assert sandboxed(decodes)() == "日本"


def test_one_errno_stands_for_every_refusal() -> None:
    def collects() -> set[int]:
        import os
        import socket

        found = set()
        for attempt in (
            lambda: os.open("/etc/passwd", os.O_RDONLY),
            lambda: os.stat("/nowhere"),
            lambda: socket.socket(),
            lambda: os.fork(),
            lambda: os.kill(1, 0),
            lambda: os.memfd_create("x"),
            lambda: os.nice(1),
        ):
            with contextlib.suppress(OSError):
                try:
                    attempt()
                except OSError as error:
                    found.add(error.errno)
                    raise
        return found

    assert sandboxed(collects, on_violation="deny")() == {errno.EPERM}


# ---- address space ------------------------------------------------------------------------------------------------------------


def test_the_limit_stands_on_what_libraries_have_reserved_already(tmp_path: Path) -> None:
    """NumPy reserves far more address space than it uses; the limit begins above it."""

    def computes():
        import numpy

        return float((numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum()), bytearray(8 << 20)[:1]

    answer = run_fresh({"computes": computes}, tmp_path, preload=("numpy",), memory="48M", threads=None)["computes"]
    assert answer[0] == "right", answer


# ---- the first call of a process ------------------------------------------------------------------------------------------------

FIRST = {
    "a_directory": """
        from compart import Directory
        with Directory("tests") as directory:
            assert "process" in sandboxed(lambda d: sorted(d.iterdir()))(directory)
    """,
    "a_directory_in_the_host": """
        from compart import Directory
        with Directory(".") as directory, directory.open("pyproject.toml") as file:
            assert file.read(1)
    """,
    "a_file": """
        with open("pyproject.toml", "rb") as file:
            assert sandboxed(lambda f: f.read(1))(file)
    """,
    "a_granted_descriptor": """
        import os, socket
        from compart import grant, rights
        ours, theirs = socket.socketpair()
        with ours, theirs:
            call = sandboxed(lambda peer: peer.send(b"x"), grants=[grant.descriptor(theirs, rights.CAP_SEND)])
            assert call(theirs) == 1
    """,
    "a_stream": """
        assert list(sandboxed(lambda: (yield 1))()) == [1]
    """,
    "an_awaited_call": """
        import asyncio
        assert asyncio.run(sandboxed(lambda: 5).aio()) == 5
    """,
    "a_call_of_a_thread": """
        import threading
        found = []
        thread = threading.Thread(target=lambda: found.append(sandboxed(lambda: 5)()))
        thread.start()
        thread.join()
        assert found == [5]
    """,
    "calls_of_many_threads_at_once": """
        import concurrent.futures
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(sandboxed(lambda n: n + 1), range(16))) == list(range(1, 17))
    """,
    "a_question_about_the_walls": """
        import compart
        assert compart.enforcement().up
    """,
}


@pytest.mark.parametrize("script", FIRST.values(), ids=FIRST)
def test_the_first_thing_a_process_does_may_be(script: str) -> None:
    command = [sys.executable, "-W", "error", "-c", "from compart import sandboxed\n" + textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
