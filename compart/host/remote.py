"""Turn what a compartment said of an exception into an exception of the host.

Runs in the host. Only builtin exceptions are made, from plain values; source lines are read by the host, and only from
files of modules that the host itself has loaded.
"""

from __future__ import annotations

import linecache
import sys
from typing import TYPE_CHECKING, Any

from compart.errors import ClosedError, NotCapableError, PolicyError, RemoteError, RemoteTraceback
from compart.message import Raised, builtin_exception

if TYPE_CHECKING:
    from compart.host.compartment import Call


def rebuild(said: Raised, call: Call) -> BaseException:
    """The exception to raise: a builtin one as itself, any other as RemoteError; the remote frames are its cause."""
    error = _builtin(said) or _ours(said) or RemoteError(said.type_name, said.text)
    for note in said.notes:
        error.add_note(note)
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
            error: BaseException = kind(*args, attributes["filename"])
        else:
            error = kind(*args)
        if isinstance(error, ImportError):
            error.name = _text(attributes.get("name"))
            error.path = _text(attributes.get("path"))
    except Exception:
        return None
    # OSError(errno) picks a subclass; the name that was told must agree with it.
    return error if type(error) is kind else None


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
    """The frames inside as text, as a traceback shows them."""
    readable = _readable(call)
    lines = ["Traceback inside the compartment (most recent call last):"]
    for frame in said.frames:
        lines.append(f'  File "{frame.file}", line {frame.line}, in {frame.function}')
        if frame.file in readable:
            source = linecache.getline(frame.file, frame.line).strip()
            if source:
                lines.append(f"    {source[:500]}")
    lines.append(f"{said.type_name}: {said.text}" if said.text else said.type_name)
    lines += said.context.splitlines()
    return RemoteTraceback("\n".join(lines))


def _readable(call: Call) -> set[str]:
    """Source files whose lines may be shown: those of loaded modules, and of the function itself."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    code = getattr(getattr(call.function, "__func__", call.function), "__code__", None)
    if code is not None:
        files.add(code.co_filename)
    return {file for file in files if isinstance(file, str) and file.endswith((".py", ">"))}
