"""`@sandboxed`: a function that runs in a compartment each time it is called.

Runs in the host. Mistakes are told here, before anything is forked.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import select
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, cast, overload

from compart import _fast, backend, capability, message
from compart.backend.linux import _sys
from compart.capability import Handed
from compart.errors import ClosedError, PolicyError
from compart.guest import warm
from compart.guest.inside import sandboxed_here
from compart.host import leaving
from compart.host.compartment import Call, Compartment, Outcome
from compart.policy import Policy, check_fields

P = ParamSpec("P")
R = TypeVar("R")

MOST_SCANNED = 100_000
MOST_FORKS = 5
MOST_SUBMITTED = 32


class Sandboxed(Generic[P, R]):
    """A function that runs in a compartment. Made by `sandboxed`; calling it forks, confines, runs and reaps.

    `__wrapped__` is the plain function. `policy` is what it runs under.
    """

    def __init__(self, function: Callable[P, R], policy: Policy) -> None:
        _check_function(function)
        functools.update_wrapper(self, function)
        self.__wrapped__ = function
        self.policy = policy
        self._kind = _kind_of(function)
        self._types: tuple[tuple[type, ...], _fast.Registry] | None = None
        self._warm = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run in a fresh compartment and return the value; a generator function gives an iterator."""
        if "stream" in self._kind:
            stream = Stream(self, self._call(args, kwargs))
            return cast(R, AsyncStream(stream) if self._kind == "async stream" else stream)
        if self._kind == "coroutine":
            return cast(R, self._aio(args, kwargs))
        return cast(R, _run(self._call(args, kwargs))[0])

    def run(self, *args: P.args, **kwargs: P.kwargs) -> Outcome:
        """Run as a call does, and return everything it gave: value, output, usage, violations, enforcement."""
        if "stream" in self._kind:
            raise PolicyError(f"{self._name} is a generator; iterate over the call, which has no single outcome")
        value, ended = _run(self._call(args, kwargs), whole=True)
        return _outcome(value, ended)

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[R]:
        """Run on a thread of compart's, and return a Future."""
        if "stream" in self._kind:
            raise PolicyError(f"{self._name} is a generator; iterate over the call")
        call = self._call(args, kwargs)
        context = contextvars.copy_context()
        return cast("concurrent.futures.Future[R]", _executor().submit(lambda: context.run(_run, call)[0]))

    def aio(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run without blocking the event loop: `await f.aio(...)`. Cancelling it kills the compartment and reaps it."""
        if "stream" in self._kind:
            raise PolicyError(f"{self._name} is a generator; iterate over the call")
        return cast("Coroutine[Any, Any, R]", self._aio(args, kwargs))

    async def _aio(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call(args, kwargs)
        for attempt in range(MOST_FORKS):
            with _started(call, waits=False) as compartment:
                frame = await _frame_async(compartment)
                compartment.kill()
                if _again(compartment, frame, attempt):
                    continue
                return compartment.end(frame)
        raise _stillborn(call)

    def options(self, policy: Policy | None = None, **changes: Any) -> Sandboxed[P, R]:
        """The same function under another policy, or under this one with some fields changed."""
        base = self.policy if policy is None else policy
        return Sandboxed(self.__wrapped__, _policy(base, changes))

    def enforcement(self) -> backend.Enforcement:
        """Which walls its compartments get on this machine."""
        return backend.select().enforcement(self.policy)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        if instance is None:
            return self
        bound = Sandboxed.__new__(Sandboxed)
        bound.__dict__.update(self.__dict__)
        bound.__wrapped__ = self.__wrapped__.__get__(instance, owner)
        return bound

    def __repr__(self) -> str:
        return f"<sandboxed {self._name}>"

    @property
    def _name(self) -> str:
        return getattr(self.__wrapped__, "__qualname__", None) or repr(self.__wrapped__)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if sandboxed_here():
            raise PolicyError(
                f"{self._name}: a compartment makes no compartments; call {self._name}.__wrapped__ inside one"
            )
        _check_arguments(self.__wrapped__, self._name, args, kwargs)
        if self._types is None:
            types, ndarray = leaving.leaving_types(self.__wrapped__)
            self._types = types, _fast.Registry(types, ndarray=ndarray)
        types, registry = self._types
        if not self._warm:
            warm.ready(self.policy.preload, self.policy.warm)
            self._warm = True
        return Call(self.__wrapped__, args, kwargs, self._kind, self.policy, types, registry, self._name)


@overload
def sandboxed(function: Callable[P, R], /, **changes: Any) -> Sandboxed[P, R]: ...
@overload
def sandboxed(function: Policy | None = None, /, **changes: Any) -> Callable[[Callable[P, R]], Sandboxed[P, R]]: ...
def sandboxed(function: Any = None, /, **changes: Any) -> Any:
    """Make a function run in a compartment: `@sandboxed`, `@sandboxed(timeout=2)`, `@sandboxed(policy)`, `sandboxed(f)`.

    The keywords are the fields of `Policy`. PolicyError for a field that does not exist, a value that makes no sense, or
    something that cannot be called.
    """
    if function is None or isinstance(function, Policy):
        policy = _policy(function or Policy(), changes)
        return lambda wrapped: Sandboxed(_plain(wrapped), policy)
    return Sandboxed(_plain(function), _policy(Policy(), changes))


def _plain(function: Any) -> Any:
    # classmethod and staticmethod objects are not functions yet; the decorator belongs beneath them.
    if isinstance(function, (classmethod, staticmethod)):
        name = type(function).__name__
        raise PolicyError(f"@sandboxed on a {name}; write @{name} above @sandboxed")
    return function.__wrapped__ if isinstance(function, Sandboxed) else function


def _policy(base: Policy, changes: dict[str, Any]) -> Policy:
    if not isinstance(base, Policy):
        raise PolicyError(f"{base!r} is no Policy; write the fields as keywords, as in timeout=2")
    check_fields(changes)
    return base.replace(**changes) if changes else base


def _check_function(function: Any) -> None:
    if isinstance(function, type):
        raise PolicyError(
            f"@sandboxed on the class {function.__qualname__}; decorate its methods, or a function that uses it"
        )
    if not callable(function):
        raise PolicyError(f"{function!r} cannot be called; sandboxed() takes a function")


def _kind_of(function: Any) -> str:
    inner = inspect.unwrap(function) if hasattr(function, "__wrapped__") else function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inspect.isasyncgenfunction(inner):
        return "async stream"
    if inspect.isgeneratorfunction(inner):
        return "stream"
    return "coroutine" if inspect.iscoroutinefunction(inner) else "call"


def _check_arguments(function: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """TypeError for arguments that do not fit, as an ordinary call gives it, before anything is forked."""
    code = getattr(function, "__code__", None)
    if code is not None and not kwargs and not code.co_flags & 0x0C and not code.co_kwonlyargcount:
        missing = code.co_argcount - len(args)
        if 0 <= missing <= len(function.__defaults__ or ()):
            return
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


# ---- one call ---------------------------------------------------------------------------------------------------------------


def _run(call: Call, *, whole: bool = False) -> tuple[Any, Compartment]:
    """The value, and the compartment that gave it; with `whole` also what it printed and used."""
    for attempt in range(MOST_FORKS):
        with _started(call) as compartment:
            frame = compartment.wait_frame()
            # The answer is here: end it, so that nothing it still does can touch what is read now.
            compartment.stop()
            if _again(compartment, frame, attempt):
                continue
            value = compartment.end(frame)
            if whole or compartment.relays:
                compartment.kill()
            return value, compartment
    raise _stillborn(call)


def _again(compartment: Compartment, frame: tuple[int, bytes] | None, attempt: int) -> bool:
    """Whether the same call deserves another fork: the function has not run yet, and what was wrong may have passed."""
    if compartment.stillborn:
        return True
    if attempt == 0 and compartment.missed_a_wall(frame):
        # What the host keeps for all calls may have gone: a daemon closes every descriptor, a service gives up root.
        compartment.backend.forget()
        return True
    return False


def _stillborn(call: Call) -> PolicyError:
    return PolicyError(
        f"{call.name}: another thread held a lock of malloc in each of {MOST_FORKS} forks; call it when fewer threads run"
    )


def _outcome(value: Any, ended: Compartment) -> Outcome:
    stdout, stderr = ended.output_text()
    return Outcome(value, stdout, stderr, ended.usage, ended.violations, ended.backend.enforcement(ended.policy))


def _started(call: Call, *, waits: bool = True) -> Compartment:
    handed = _hand_over(call)
    try:
        return Compartment(call, handed, waits=waits)
    except BaseException:
        for item in handed:
            item.close()
        raise


def _hand_over(call: Call) -> list[Handed]:
    """Acquire every capability among the arguments and in the policy's grants."""
    if not call.kwargs and not call.policy.grants and all(type(item) in PLAIN for item in call.args):
        return []
    handed: list[Handed] = []
    try:
        granted = {id(grant.object): grant for grant in call.policy.grants if grant.kind == "descriptor"}
        for value in _capabilities((call.args, call.kwargs)):
            grant = granted.pop(id(value), None)
            item = capability.acquire(value if grant is None else grant)
            if item is not None:
                item.original = value
                handed.append(item)
        for grant in granted.values():
            item = capability.acquire(grant)
            if item is not None:
                handed.append(item)
    except BaseException:
        for item in handed:
            item.close()
        raise
    return handed


PLAIN = frozenset({str, int, bytes, float, bool, type(None)})


def _capabilities(value: Any) -> Iterator[Any]:
    """Every object among the arguments that stands for a descriptor, each once, also inside plain containers."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        kind = type(item)
        if kind in PLAIN:
            continue
        if id(item) in seen:
            continue
        seen.add(id(item))
        if len(seen) > MOST_SCANNED:
            return
        if kind in (list, tuple, set, frozenset):
            waiting.extend(item)
        elif kind is dict:
            waiting.extend(item.values())
        elif capability.is_capability(item):
            yield item


async def _frame_async(compartment: Compartment) -> tuple[int, bytes] | None:
    """Wait for a frame by the event loop's own readers: one epoll descriptor stands for all of the compartment's."""
    loop = asyncio.get_running_loop()
    with contextlib.closing(_Watch(compartment)) as watch:
        while True:
            frame = compartment.take()
            if frame is not None:
                return frame
            if compartment.finished:
                return None
            await watch.ready(loop, compartment.patience())
            compartment.pump(0)


class _Watch:
    """An epoll descriptor that is readable when anything of a compartment is."""

    def __init__(self, compartment: Compartment) -> None:
        self.compartment = compartment
        self.epoll = select.epoll()
        self.watched: set[int] = set()

    async def ready(self, loop: asyncio.AbstractEventLoop, timeout: float | None) -> None:
        wanted = self.compartment.watched()
        for descriptor in wanted - self.watched:
            self.epoll.register(descriptor, select.EPOLLIN)
        for descriptor in self.watched - wanted:
            self.epoll.unregister(descriptor)
        self.watched = wanted
        # Not asyncio.wait_for(): in Python 3.11 a cancellation that comes together with the event is lost in it.
        arrived = loop.create_future()

        def wake() -> None:
            if not arrived.done():
                arrived.set_result(None)

        loop.add_reader(self.epoll.fileno(), wake)
        timer = None if timeout is None else loop.call_later(timeout, wake)
        try:
            await arrived
        finally:
            loop.remove_reader(self.epoll.fileno())
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        self.epoll.close()


# ---- streams -------------------------------------------------------------------------------------------------------------------


class Stream(Iterator[Any]):
    """The values of a sandboxed generator, as they come. The generator runs ahead only as far as a pipe holds.

    Close it, or let it go, and the compartment ends.
    """

    def __init__(self, function: Sandboxed[Any, Any], call: Call) -> None:
        self._name = function._name
        self._compartment: Compartment | None = _started(call, waits=False)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        compartment = self._compartment
        if compartment is None:
            raise StopIteration
        try:
            frame = compartment.wait_frame()
            return self._taken(compartment, frame)
        except BaseException:
            self.close()
            raise

    def _taken(self, compartment: Compartment, frame: tuple[int, bytes] | None) -> Any:
        if frame is not None and frame[0] == message.YIELD:
            if compartment.policy.on_violation == "raise" and compartment.violations:
                compartment.kill()
                return compartment.end(frame)
            return compartment.value(frame[1], copy=True)
        compartment.kill()
        compartment.end(frame)
        if frame is not None and frame[0] != message.END:
            raise PolicyError(f"{self._name} gave a value where a stream was expected")
        raise StopIteration

    def close(self) -> None:
        """End the compartment. Closing twice is allowed."""
        compartment, self._compartment = self._compartment, None
        if compartment is not None:
            compartment.close()

    def __enter__(self) -> Stream:
        if self._compartment is None:
            raise ClosedError("this stream is closed")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if finalizing():
            return
        if getattr(self, "_compartment", None) is not None:
            self.close()


class AsyncStream(AsyncIterator[Any]):
    """The values of a sandboxed async generator: `async for value in f(...)`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Any:
        compartment = self._stream._compartment
        if compartment is None:
            raise StopAsyncIteration
        try:
            frame = await _frame_async(compartment)
            return self._stream._taken(compartment, frame)
        except StopIteration:
            self._stream.close()
            raise StopAsyncIteration from None
        except BaseException:
            self._stream.close()
            raise

    async def aclose(self) -> None:
        """End the compartment."""
        self._stream.close()


# ---- threads for submit() --------------------------------------------------------------------------------------------------------

_pool: concurrent.futures.ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def _executor() -> concurrent.futures.ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = concurrent.futures.ThreadPoolExecutor(MOST_SUBMITTED, thread_name_prefix="compart")
        return _pool


def _forked() -> None:
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


_sys.at_fork(_forked)
