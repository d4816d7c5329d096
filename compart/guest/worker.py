"""The loop inside: enter capability mode, run one function, send what it gave, end.

Runs in the forked child and nowhere else. It is our code until the function is called; from then on the whole process
belongs to the attacker, and nothing that it says is believed by the host.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import io
import linecache
import mmap
import os
import stat
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compart import _fast, message
from compart.backend import Backend, Channel
from compart.backend.linux.filters import CONTROL, RESULT, TRACE
from compart.capability import Directory, Handed, rebuild
from compart.guest import inside
from compart.guest.explain import where
from compart.guest.inside import hand

MAP_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
"""One call maps all of it: 16,384 faults for 64 MB would cost more than the copying."""

INLINE = 65536
"""Buffers from this size on travel by shared memory instead of the pipe."""


@dataclass(slots=True)
class Job:
    """One call, as the child finds it in the memory it inherited. `plan` is the backend's."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str
    handed: list[Handed]
    registry: _fast.Registry
    types: tuple[type, ...]
    result_limit: int
    plan: Any
    channel: Channel
    script: Any
    looping: bool
    replaced: tuple[object, ...]
    files: list[io.IOBase]

    def prepare(self) -> None:
        """Make the inherited interpreter fit for a life inside: all walls are up but the last."""
        # Whole dictionaries at once: few lines, few page faults.
        of_sys.update(REPLACEMENTS)
        if "stdout" not in REPLACEMENTS:
            of_sys.update(_streams())
        of_linecache.update(NO_LINES)
        threading.excepthook = _print_in_thread
        # The C library counts processors by reading files.
        os.cpu_count = _cpu_count
        sys.meta_path.insert(0, LATE_IMPORT)
        if self.handed:
            self._rebuild()
        if self.looping:
            # The host's running loop is not ours: its selector's descriptors are gone.
            sys.modules["asyncio.events"]._set_running_loop(None)
        inside.inside = True

    def _rebuild(self) -> None:
        rebuilt: dict[int, object] = {}
        for item, number in zip(self.handed, self.plan.numbers, strict=True):
            made = rebuild(item, number)
            rebuilt[id(item.original)] = made
            hand(item.original, made)
        self.args, self.kwargs = _replace(self.args, rebuilt, {}), _replace(self.kwargs, rebuilt, {})
        self.files = [made for made in rebuilt.values() if isinstance(made, io.IOBase)]


def main(backend: Backend, job: Job) -> None:
    """Run the job and end the process. Called in the child right after the fork; does not return."""
    # The exit code of a worker that itself broke: nothing is left to tell it to.
    code = 70
    try:
        gc.disable()
        gc.freeze()
        try:
            backend.enter(job.plan, job.script, job.prepare)
        except Exception as error:
            code = _say_which_wall(job, error)
        else:
            gc.enable()
            _run(job)
            code = 0
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    finally:
        os._exit(code)


def _run(job: Job) -> None:
    try:
        value = job.function(*job.args, **job.kwargs)
        if job.kind != "call" or job.files:
            value = _finish(job, value)
    except BaseException as error:
        _flush()
        _send_error(error)
        return
    _flush()
    _send_value(job, message.END if "stream" in job.kind else message.VALUE, value)


def _say_which_wall(job: Job, error: Exception) -> int:
    wall, reason = getattr(error, "wall", "prepare"), getattr(error, "reason", repr(error))
    # By the pipe's number of before or after the move, whichever is there.
    for number in (RESULT, job.channel.result):
        with contextlib.suppress(OSError):
            _fast.write_frame(number, message.WALL, f"{wall}\n{reason}".encode(errors="replace")[:4000])
            break
    return 71


def _finish(job: Job, value: Any) -> Any:
    if job.kind == "coroutine":
        value = _await(value)
    elif job.kind != "call":
        _stream(job, value)
        value = None
    for file in job.files:
        # Outside, closing the file or letting it go would write what it holds; this process ends without either.
        if not file.closed and file.writable():
            file.flush()
    return value


def _await(awaitable: Any) -> Any:
    import asyncio

    async def main() -> Any:
        return await awaitable

    return asyncio.run(main())


def _stream(job: Job, values: Any) -> None:
    """Send each value as it comes. A full pipe holds the generator up: that is the back-pressure."""
    if job.kind == "async stream":

        async def drain() -> None:
            async for value in values:
                _send_value(job, message.YIELD, value)

        _await(drain())
    else:
        for value in values:
            _send_value(job, message.YIELD, value)


# ---- sending ----------------------------------------------------------------------------------------------------------


def _send_value(job: Job, kind: int, value: Any) -> None:
    try:
        frame = _value_frame(job, kind, value)
    except _fast.Unencodable as error:
        said = where(value, job.registry, job.types, str(error), _describe)
        frame = message.UNENCODABLE, (said.encode(errors="replace")[:60000],)
    except _fast.TooLarge as error:
        frame = message.TOO_LARGE, (str(error.size).encode(),)
    except Exception as error:
        # Out of memory, or an object whose own methods raise.
        _send_error(error)
        return
    _fast.write_frame(RESULT, frame[0], *frame[1])


def _value_frame(job: Job, kind: int, value: Any) -> tuple[int, tuple[bytes, ...]]:
    buffers: list[Any] = []
    descriptors: list[int] = []

    def describe(item: object) -> tuple[str, object] | None:
        described = _describe(item)
        if described is not None:
            descriptors.append(described[2])
            return described[0], described[1]
        return None

    body = _fast.encode(value, job.registry, job.result_limit, inline=INLINE, buffers=buffers, describe=describe)
    if not buffers and not descriptors:
        return kind, (message.NOTHING_BESIDE, body)
    if descriptors:
        _fast.send_fds(CONTROL, b"D", descriptors)
    places: list[tuple[int, int]] = []
    if buffers:
        places, room = message.layout([memoryview(item).nbytes for item in buffers])
        _place(buffers, places, room)
    return kind, (message.prefix(places, len(descriptors)), body)


def _place(buffers: list[Any], places: list[tuple[int, int]], room: int) -> None:
    """Borrow shared memory from the host and copy the big buffers there."""
    _fast.send_fds(CONTROL, b"A" + room.to_bytes(8, "little"), [])
    answer, lent = _fast.recv_fds(CONTROL, 64, 1)
    if not lent:
        raise OSError(f"the host lent no memory: {answer!r}")
    try:
        mapped = mmap.mmap(lent[0], int.from_bytes(answer[1:9], "little"), MAP_FLAGS)
    except OSError as error:
        raise MemoryError(f"no address space left for {room} bytes of result") from error
    finally:
        os.close(lent[0])
    with mapped as shared:
        for item, (offset, _) in zip(buffers, places, strict=True):
            _fast.copy_into(shared, offset, item)


def _describe(item: object) -> tuple[str, object, int] | None:
    """A file or directory that leaves: its kind, what the host needs to rebuild it, its descriptor. None for all else."""
    if isinstance(item, Directory):
        return "directory", item.mode, item.fileno()
    if not isinstance(item, io.IOBase):
        return None
    try:
        number = item.fileno()
        if not stat.S_ISREG(os.fstat(number).st_mode):
            return None
        if item.writable():
            item.flush()
    except (OSError, ValueError):
        return None
    text = isinstance(item, io.TextIOWrapper)
    if item.readable() and not text:
        # What was read ahead is not lost: the caller goes on where this object is.
        os.lseek(number, item.tell(), os.SEEK_SET)
    elif item.readable() and text:
        os.lseek(number, item.tell() & (1 << 64) - 1, os.SEEK_SET)
    return (
        ("text", (item.encoding, item.errors), number) if isinstance(item, io.TextIOWrapper) else ("file", None, number)
    )


_ERROR_ATTRIBUTES = ("errno", "strerror", "filename", "filename2", "name", "path")


def _send_error(error: BaseException) -> None:
    body: bytes
    try:
        body = _error_body(error, plain_args(error))
    except BaseException:
        # Out of memory, or an exception whose own methods raise.
        body = _fast.encode(
            {"type": type(error).__name__, "args": None, "text": "", "notes": [], "frames": [], "context": "", "attributes": {}},
            message.EMPTY, 1 << 16,
        )  # fmt: skip
    _fast.write_frame(RESULT, message.RAISED, body)


def _error_body(error: BaseException, args: tuple[Any, ...] | None) -> bytes:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    # Not extract_tb(): it looks for the source files, and there are none here. The host reads the lines.
    steps = [(step.f_code, line) for step, line in traceback.walk_tb(error.__traceback__)]
    frames = [(code.co_filename, line or 0, code.co_qualname) for code, line in steps if code.co_filename != __file__]
    if len(frames) > message.MOST_FRAMES:
        half = message.MOST_FRAMES // 2
        frames = frames[:half] + frames[-half:]
    attributes = {}
    for attribute in _ERROR_ATTRIBUTES:
        value = getattr(error, attribute, None)
        if isinstance(value, (str, bytes, int)):
            attributes[attribute] = value[:4096] if isinstance(value, (str, bytes)) else value
    said = {
        "type": name,
        "builtin": next((base.__name__ for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base), ""),
        "args": args,
        "text": _words(error)[:16000],
        "notes": [_words(note)[:4000] for note in getattr(error, "__notes__", ())[:16]],
        "frames": frames,
        "context": _context(error),
        "attributes": attributes,
    }
    return _fast.encode(said, message.EMPTY, 1 << 20)


def plain_args(error: BaseException) -> tuple[Any, ...] | None:
    """The exception's arguments when they are plain values of a reasonable size, else None."""
    try:
        if len(_fast.encode(error.args, message.EMPTY, 1 << 18)) < 1 << 18:
            return error.args
    except (_fast.Unencodable, _fast.TooLarge):
        pass
    return None


def _words(value: object) -> str:
    """What a value says of itself; nothing when its own methods raise."""
    try:
        return str(value)
    except Exception:
        return ""


def _context(error: BaseException) -> str:
    """What led to the exception, as one line for each step back; below each group its members, depth first."""
    lines = _members(error, "")
    seen = {id(error)}
    step: BaseException | None = error
    while step is not None and len(seen) <= 8:
        cause = step.__cause__ or (None if step.__suppress_context__ else step.__context__)
        if cause is None or id(cause) in seen:
            break
        how = "caused by" if step.__cause__ is not None else "while handling"
        lines.append(f"{how} {type(cause).__name__}: {_words(cause)[:500]}")
        lines += _members(cause, "")
        seen.add(id(cause))
        step = cause
    return "\n".join(lines)[:16000]


def _members(group: BaseException, number: str) -> list[str]:
    lines: list[str] = []
    if isinstance(group, BaseExceptionGroup) and number.count(".") < 4:
        for n, member in enumerate(group.exceptions[:16], 1):
            if len(lines) >= 64:
                break
            lines.append(f"  member {number}{n}: {type(member).__name__}: {_words(member)[:500]}")
            lines += _members(member, f"{number}{n}.")
    return lines[:64]


# ---- making the inherited interpreter fit for a life inside -----------------------------------------------------------------


class _LateImport:
    """Before the finder that would look for files: tells the host which module was asked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        with contextlib.suppress(Exception):
            os.write(TRACE, f"import {name}\n".encode(errors="replace")[:300])


def _make_streams() -> tuple[io.TextIOWrapper, io.TextIOWrapper, io.TextIOWrapper]:
    def on(number: int, mode: str) -> io.TextIOWrapper:
        raw = io.FileIO(number, mode, closefd=False)
        buffered: Any = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        errors = "surrogateescape" if mode == "r" else "backslashreplace"
        return io.TextIOWrapper(buffered, "utf-8", errors, line_buffering=number == 2)

    return on(0, "r"), on(1, "w"), on(2, "w")


CPU_COUNT = os.cpu_count()
REPLACED = (linecache.checkcache, linecache.updatecache, sys.unraisablehook, threading.excepthook, os.cpu_count)
"""Kept when they are replaced: to free one costs a page fault for every object that hangs on it."""
LATE_IMPORT = _LateImport()


def _flush() -> None:
    # Not suppress(): a class that is used for the first time after the fork, and a dozen page faults.
    try:  # noqa: SIM105
        sys.stdout.flush()
    except Exception:
        pass
    try:  # noqa: SIM105
        sys.stderr.flush()
    except Exception:
        pass


def _nothing_to_check(filename: str | None = None) -> None:
    pass


def _no_lines(filename: str, module_globals: dict[str, Any] | None = None) -> list[str]:
    return []


def _print_unraisable(unraisable: Any) -> None:
    print(f"Exception ignored in: {unraisable.object!r}", file=sys.stderr)
    traceback.print_exception(unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback)


def _print_in_thread(args: Any) -> None:
    if args.exc_type is not SystemExit:
        print(f"Exception in thread {args.thread.name if args.thread else '?'}:", file=sys.stderr)
        traceback.print_exception(args.exc_type, args.exc_value, args.exc_traceback)


def _cpu_count() -> int | None:
    return CPU_COUNT


def _streams() -> dict[str, object]:
    stdin, stdout, stderr = _make_streams()
    inner = {"__stdin__": stdin, "__stdout__": stdout, "__stderr__": stderr}
    return {"stdin": stdin, "stdout": stdout, "stderr": stderr, **inner}


def _streams_made_early() -> dict[str, object]:
    # Made once where children are forked from, and never used there: an object is only a number and an empty buffer. A
    # host without standard streams cannot make them.
    with contextlib.suppress(OSError):
        return _streams()
    return {}


of_sys: dict[str, object] = vars(sys)
of_linecache: dict[str, object] = vars(linecache)
REPLACEMENTS = {
    # The host's streams hold text that it has not written yet; it must not come out a second time.
    **_streams_made_early(),
    # Arguments of the host's command line are often secrets.
    "argv": [""],
    "orig_argv": [""],
    # The printers written in C open source files themselves.
    "excepthook": traceback.print_exception,
    "unraisablehook": _print_unraisable,
}
NO_LINES = {"checkcache": _nothing_to_check, "updatecache": _no_lines}
"""Formatting a traceback or a warning reads source lines: the text comes without them, the host adds its own."""


def _replace(value: Any, rebuilt: dict[int, object], seen: dict[int, Any]) -> Any:
    """The same value with what was handed over in its place; containers that hold none stay themselves."""
    if id(value) in rebuilt:
        return rebuilt[id(value)]
    if id(value) in seen:
        return seen[id(value)]
    kind = type(value)
    seen[id(value)] = value
    if kind in (list, tuple, set, frozenset):
        made = [_replace(item, rebuilt, seen) for item in value]
        if any(new is not old for new, old in zip(made, value, strict=True)):
            seen[id(value)] = kind(made)
    elif kind is dict:
        items = {key: _replace(item, rebuilt, seen) for key, item in value.items()}
        if any(items[key] is not value[key] for key in value):
            seen[id(value)] = items
    return seen[id(value)]
