"""Read files of your own, each in a compartment.

    python examples/parse_untrusted.py [--timeout SECONDS] [--memory SIZE] FILE...

The first bytes choose the parser, and where they say nothing, the suffix does. Prints a short result for each file,
or one sentence on why there is none. Exit status 1 if a file could not be read.
"""

import argparse
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# For a checkout that was built in place; an installed compart is found first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import parsers
from report import one_line

from compart import PolicyError

# Offset, bytes, parser.
MAGIC = [
    (0, b"\xff\xd8\xff", parsers.read_image),
    (0, b"\x89PNG\r\n\x1a\n", parsers.read_image),
    (0, b"GIF8", parsers.read_image),
    (8, b"WEBP", parsers.read_image),
    (0, b"%PDF-", parsers.read_pdf),
    (0, b"PK\x03\x04", parsers.read_zip),
    (0, b"\x1f\x8b", parsers.read_tar),
    (0, b"BZh", parsers.read_tar),
    (0, b"\xfd7zXZ\x00", parsers.read_tar),
    (257, b"ustar", parsers.read_tar),
    (0, b"\x93NUMPY", parsers.read_npy),
    (0, b"\x80\x03", parsers.read_pickle),
    (0, b"\x80\x04", parsers.read_pickle),
    (0, b"\x80\x05", parsers.read_pickle),
    (0, b"<?xml", parsers.read_xml),
    (0, b"<!DOCTYPE html", parsers.read_html),
    (0, b"<!doctype html", parsers.read_html),
    (0, b"<html", parsers.read_html),
]

SUFFIXES = {
    ".htm": parsers.read_html,
    ".html": parsers.read_html,
    ".xml": parsers.read_xml,
    ".svg": parsers.read_xml,
    ".yaml": parsers.read_yaml,
    ".yml": parsers.read_yaml,
    ".pickle": parsers.read_pickle,
    ".pkl": parsers.read_pickle,
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for each file (default: 5)")
    options.add_argument("--memory", default="256M", metavar="SIZE", help="for each file (default: 256M)")
    options.add_argument("files", nargs="+", metavar="FILE")
    given = options.parse_args()
    try:
        parsers.careful.replace(timeout=given.timeout, memory=given.memory)
    except PolicyError as error:
        options.error(str(error))

    failed = False
    for name in given.files:
        try:
            lines = read(Path(name), timeout=given.timeout, memory=given.memory)
        except Exception as error:
            failed = True
            lines = [f"cannot be read: {sentence(error)}"]
        print(f"{one_line(name, 80)}: {lines[0]}")
        for line in lines[1:]:
            print(f"    {line}")
    return 1 if failed else 0


def read(path: Path, *, timeout: float, memory: str) -> list[str]:
    """Read one file in a compartment and describe what is in it, in a few lines."""
    parser = choose(path)
    with path.open("rb") as file:
        value = parser.options(timeout=timeout, memory=memory)(file)
    return [parser.__name__.removeprefix("read_"), *describe(value)]


def choose(path: Path) -> Callable[..., Any]:
    """The parser for this file. The host looks at 512 bytes and takes none of them for anything but bytes."""
    with path.open("rb") as file:
        start = file.read(512)
    for offset, magic, parser in MAGIC:
        if start[offset : offset + len(magic)] == magic:
            return parser
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    raise ValueError("no parser for this kind of file")


def describe(value: Any) -> list[str]:
    """A plain value in a few short lines."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    if not isinstance(value, dict):
        return [one_line(short.repr(value), 110)]
    items = list(value.items())
    lines = [one_line(f"{key}: {short.repr(item)}", 110) for key, item in items[:10]]
    return lines if len(items) <= 10 else [*lines, f"and {len(items) - 10} more"]


def sentence(error: Exception) -> str:
    """What went wrong. The words may be a stranger's."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return one_line(error.strerror, 300)
    return one_line(f"{type(error).__name__}: {error}", 300)


if __name__ == "__main__":
    sys.exit(main())
