"""Turn what a compartment said of an exception into an exception of the host.

Runs in the host. Only builtin exceptions are made, from plain values; source lines are read by the host, and only from
files of modules that the host itself has loaded.
"""

from __future__ import annotations

import linecache
import sys
from typing import TYPE_CHECKING, Any

from compart.errors import ClosedError, NotCapableError, PolicyError, RemoteError, RemoteTraceback, printable
from compart.message import Raised, builtin_exception

if TYPE_CHECKING:
    from compart.host.compartment import Call


def rebuild(said: Raised, call: Call) -> BaseException:
    """The exception to raise: a builtin one as itself, any other as RemoteError; the remote frames are its cause."""
    error = _builtin(said) or _ours(said) or RemoteError(said.type_name, said.text)
    for note in said.notes:
        error.add_note(printable(note, keep="\n\t"))
    error.__cause__ = traceback_of(said, call)
    return error


def _builtin(said: Raised) -> BaseException | None:
    kind = builtin_exception(said.type_name)
    if kind is None:
        return None
    args = said.args if said.args is not None else (said.text,)
    attributes = said.attributes
    try:
        if issubclass(kind, OSError) and len(args) == 2 and "filename" in attributes:
            # The third is Windows's error number, which is nothing here.
            names = (attributes["filename"], None, attributes.get("filename2"))
            error: BaseException = kind(*args, *names) if "filename2" in attributes else kind(*args, names[0])
        else:
            error = kind(*args)
        if isinstance(error, (ImportError, AttributeError, NameError)):
            # Not name_from: the traceback module would import the module `name` to suggest another.
            error.name = _text(attributes.get("name"))
        if isinstance(error, ImportError):
            error.path = _text(attributes.get("path"))
    except Exception:
        return None
    # OSError(errno) picks a subclass; the name that was told must agree with it.
    return error if type(error) is kind and _may_be_printed(error) else None


MOST_COLUMN = 1 << 18


def _may_be_printed(error: BaseException) -> bool:
    """Whether the places that an exception names are there; CPython trusts them when it prints one.

    str(UnicodeDecodeError) reads the byte at `start` wherever that is, outside of the object too (python/cpython#123378;
    3.11.7, 3.12.1 and 3.13.0 crash), and a traceback of a SyntaxError draws a caret for each column up to `end_offset`.
    """
    if isinstance(error, (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)):
        return 0 <= error.start <= error.end <= len(error.object)
    if isinstance(error, SyntaxError):
        columns = (error.lineno, error.offset, error.end_lineno, error.end_offset)
        return isinstance(error.text, str | None) and all(
            column is None or (isinstance(column, int) and -1 <= column <= MOST_COLUMN) for column in columns
        )
    return True


def _ours(said: Raised) -> BaseException | None:
    kind = OURS.get(said.type_name)
    if kind is None:
        return None
    match said.args:
        case (int(number), str(text)) if issubclass(kind, OSError):
            return kind(number, text)
        case _:
            return kind(1, said.text) if issubclass(kind, OSError) else kind(said.text)


OURS = {f"compart.errors.{kind.__name__}": kind for kind in (NotCapableError, ClosedError, PolicyError)}
"""compart's own errors that code inside may raise by using a Directory or a capability."""


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def traceback_of(said: Raised, call: Call) -> RemoteTraceback:
    """The frames inside as text, as a traceback shows them. No name or text in it forges a line or moves a terminal."""
    readable = _readable(call)
    lines = ["Traceback inside the compartment (most recent call last):"]
    for frame in said.frames:
        lines.append(printable(f'  File "{frame.file}", line {frame.line}, in {frame.function}'))
        if frame.file in readable:
            source = linecache.getline(frame.file, frame.line).strip()
            if source:
                lines.append(f"    {source[:500]}")
    name = printable(said.type_name)
    told = f"{name}: {said.text}" if said.text else name
    lines += [printable(line) for line in (*told.split("\n"), *said.context.split("\n"))]
    return RemoteTraceback("\n".join(lines))


def _readable(call: Call) -> set[str]:
    """Source files whose lines may be shown: those of loaded modules, and of the function itself."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    code = getattr(getattr(call.function, "__func__", call.function), "__code__", None)
    if code is not None:
        files.add(code.co_filename)
    return {file for file in files if isinstance(file, str) and file.endswith((".py", ">"))}
