"""Load what Python opens behind one's back, before there is nothing left to open.

Runs where compartments are forked from, once. What is listed here was found by watching CPython under confinement: each
of these is opened at first use and then kept, and without it a refusal shows as a wrong result or a confusing error.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import locale
import mimetypes
import os
import pkgutil
import platform
import sys
import threading
import time

from compart.backend.linux import _sys

MODULES = (
    # formatting and sending errors
    "traceback", "linecache", "warnings", "tokenize", "token", "ast", "textwrap", "inspect", "contextlib",
    # parsing dates, numbers and text
    "_strptime", "calendar", "datetime", "decimal", "_decimal", "numbers", "fractions", "unicodedata", "stringprep",
    "encodings.idna", "encodings.punycode", "uuid", "json", "re", "struct", "string", "zoneinfo",
    # what the standard library imports late
    "copy", "copyreg", "pickle", "io", "tempfile", "random", "secrets", "bisect", "hashlib", "hmac", "base64", "binascii",
    "zlib", "gzip", "bz2", "lzma", "zipfile", "tarfile", "shutil", "fnmatch", "glob", "pathlib", "mmap", "array", "queue",
    "weakref", "types", "enum", "dataclasses", "collections.abc", "itertools", "functools", "operator", "heapq",
    "concurrent.futures.thread", "asyncio", "selectors", "select", "socket", "signal", "subprocess", "logging", "platform",
    "ctypes", "faulthandler", "resource", "fcntl", "html.entities", "xml.etree.ElementTree", "urllib.parse", "mimetypes",
    "email.message", "email.parser", "csv", "sqlite3", "importlib.resources", "ctypes.util",
    "tracemalloc", "statistics", "argparse", "gettext",
    "email.policy", "email.headerregistry", "html.parser", "xml.dom.minidom", "xml.sax.saxutils",
)  # fmt: skip

_lock = threading.RLock()
_done: set[object] = set()


def ready(preload: tuple[str, ...] = (), warm: object = None) -> None:
    """Load the defaults, then the policy's modules, then call its `warm`; each only once in a process.

    ImportError for a module of `preload` that does not exist.
    """
    with _lock:
        if "defaults" not in _done:
            _defaults()
            _done.add("defaults")
        for name in preload:
            if name not in _done:
                importlib.import_module(name)
                _done.add(name)
        if warm is not None and warm not in _done:
            warm()  # type: ignore[operator]
            _done.add(warm)


def _forked() -> None:
    global _lock
    _lock = threading.RLock()


_sys.at_fork(_forked)


def _defaults() -> None:
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _codecs()
    # glibc reads the zone file now, not when TZ can no longer be read.
    time.tzset()
    time.localtime()
    locale.getlocale()
    locale.localeconv()
    with contextlib.suppress(OSError, ValueError):
        os.get_terminal_size(sys.__stdout__.fileno() if sys.__stdout__ else 1)
    # platform runs `uname -p` by a search of PATH when asked for the processor, and keeps what it said: on Linux, nothing.
    vars(platform.uname()).setdefault("processor", "")
    mimetypes.init()
    # SQLite reads /dev/urandom for its first random number; what it makes of it goes along with the fork.
    with contextlib.suppress(ImportError):
        import sqlite3

        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.execute("select random()")
    _late_libraries()


def _codecs() -> None:
    """Every text codec: a lookup that fails once fails for the life of the process."""
    import encodings

    for module in pkgutil.iter_modules(encodings.__path__):
        if module.name in ("mbcs", "oem", "cp65001"):
            continue
        with contextlib.suppress(ImportError, LookupError):
            codecs.lookup(module.name)


def _late_libraries() -> None:
    """libgcc_s, which the C library opens by name when a thread first ends by cancellation or an exception passes."""
    import ctypes

    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")
