"""Run one escape attempt outside and inside, and judge both.

Runs in the host test process. Outside an attempt runs in a plain forked child, with no compart anywhere near it; inside
it runs in a compartment forked from the same process. Both children see the same world, laid out anew for each run.
"""

import contextlib
import errno
import os
import pickle
import secrets
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.escape import native

SECONDS_OUTSIDE = 20
"""How long an attempt may take outside. None comes near: it is there so that a bad one ends."""


class World(SimpleNamespace):
    """What lies outside the compartment, as an attempt may know it.

    directory: Path, empty but for what follows; secret: Path of a file with token in it; token: bytes that nobody can
    guess; marker: Path where nothing is; tree: Path of a directory to grant, with a file "inside" (content b"inside"),
    "sub/inner", "script", which makes the marker, and symbolic links "link" (absolute) and "sub/climb" (relative) to the
    secret; host: the pid of the process that tests. An attempt's arrange= adds what it needs.
    """

    directory: Path
    secret: Path
    token: bytes
    marker: Path
    tree: Path
    host: int


@dataclass(frozen=True)
class Unavailable:
    """This kernel itself lacks what the attempt needs: why, and a probe that is true where that is so."""

    reason: str
    probe: Callable[[], bool]


@dataclass(frozen=True)
class Reaches:
    """Outside, the kernel refuses the harmless arguments, and by these errnos shows that the call got to it."""

    errnos: frozenset[int]


def reaches(*errnos: int) -> Reaches:
    if errno.EPERM in errnos:
        raise ValueError("EPERM is what the compartment answers, so it proves nothing outside")
    return Reaches(frozenset(errnos))


@dataclass(frozen=True)
class Died:
    """Inside, the attempt ends the compartment by one of these signals."""

    signals: frozenset[int]


def dies_by(*signals: int) -> Died:
    return Died(frozenset(signals))


class Contained:
    """Inside, the attempt itself meets no error, but nothing of it reaches the outside."""


CONTAINED = Contained()

Refusal = type[BaseException] | int | Died | Contained


@dataclass(frozen=True)
class Attempt:
    name: str
    surface: str
    function: Callable[..., Any]
    refused_with: tuple[Refusal, ...]
    call: tuple[str, ...] = ()
    """Names of system calls, one of which the recorded violation must carry; empty if no violation is made."""
    arrange: Callable[[World], Any] | None = None
    """Lay out more of the world, in the host: a generator that yields once, or a function."""
    gives: Callable[[World], tuple[Any, ...]] | None = None
    """What the host hands over, the same outside and inside; the attempt gets it after the world."""
    gives_by_side: Callable[[World, bool], tuple[Any, ...]] | None = None
    """The same, where outside and inside differ: it is told whether this is for the inside."""
    effect: Callable[[World], bool] | None = None
    """Did it happen? Asked in the host after each run."""
    proof: Callable[[World, Any], bool] | None = None
    """Does what the attempt returned show that it got through?"""
    policy: dict[str, Any] | Callable[[World], dict[str, Any]] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    """Walls without which the policy cannot be kept, so that compart must refuse to run it at all."""
    outside: Unavailable | Reaches | None = None
    privileged: bool = False
    """Outside it gets through for root alone."""

    def __str__(self) -> str:
        return f"{self.surface}-{self.name}"


ATTEMPTS: dict[str, Attempt] = {}


def attempt(
    *,
    surface: str,
    refused_with: Refusal | tuple[Refusal, ...],
    call: str | tuple[str, ...] = (),
    needs: set[str] | frozenset[str] = frozenset(),
    name: str | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table. It takes the world and whatever gives= hands over; see Attempt for the rest."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        one = Attempt(
            name=name or function.__name__,
            surface=surface,
            function=function,
            refused_with=refused_with if isinstance(refused_with, tuple) else (refused_with,),
            call=call if isinstance(call, tuple) else (call,) if call else (),
            needs=frozenset(needs),
            **options,
        )
        if str(one) in ATTEMPTS:
            raise ValueError(f"two attempts are called {one}")
        ATTEMPTS[str(one)] = one
        return function

    return enter


def raw(
    call: str,
    arguments: Callable[..., tuple[Any, ...]],
    *,
    surface: str,
    name: str = "",
    refused_with: Refusal | tuple[Refusal, ...] = PermissionError,
    **options: Any,
) -> None:
    """Enter one system call made by machine code. arguments: from the world and what gives= hands over."""

    def issue(world: World, *given: Any) -> int:
        return native.call(call, *arguments(world, *given))

    if "effect" not in options:
        options.setdefault("proof", lambda world, answer: answer >= 0)
    # One that may be answered without a word makes no violation for certain.
    recorded = call if refused_with is PermissionError else ()
    attempt(surface=surface, name=name or f"raw_{call}", refused_with=refused_with, call=recorded, **options)(issue)


# -- the world ---------------------------------------------------------------------------------------------------------


class NoWayError(Exception):
    """This machine does not let the host itself lay out what an attempt is about."""


@contextlib.contextmanager
def world_for(one: Attempt, directory: Path) -> Iterator[World]:
    """Lay out the world for one run of the attempt, in an empty directory."""
    directory.mkdir()
    world = World(
        directory=directory,
        secret=directory / "secret",
        token=secrets.token_hex(16).encode(),
        marker=directory / "marker",
        tree=directory / "tree",
        host=os.getpid(),
    )
    world.secret.write_bytes(world.token)
    (world.tree / "sub").mkdir(parents=True)
    (world.tree / "inside").write_bytes(b"inside")
    (world.tree / "sub" / "inner").write_bytes(b"inner")
    script = world.tree / "script"
    script.write_text(f"#!/bin/sh\necho > {world.marker}\n")
    script.chmod(0o755)
    (world.tree / "link").symlink_to(world.secret)
    (world.tree / "sub" / "climb").symlink_to("../../secret")
    try:
        arranged = one.arrange(world) if one.arrange else None
        if isinstance(arranged, Iterator):
            next(arranged)
    except PermissionError as error:
        raise NoWayError(f"{one} cannot be arranged here: {error}") from error
    try:
        yield world
    finally:
        if isinstance(arranged, Iterator):
            next(arranged, None)


@contextlib.contextmanager
def handed_over(one: Attempt, world: World, *, inside: bool) -> Iterator[tuple[Any, ...]]:
    """What the host hands over, closed again afterwards."""
    given = one.gives(world) if one.gives else one.gives_by_side(world, inside) if one.gives_by_side else ()
    try:
        yield given
    finally:
        for thing in given:
            if hasattr(thing, "close"):
                thing.close()


# -- what came of a run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """returned (a value) | raised (a type's name and an errno) | died (by a signal) | became another program."""

    kind: str
    value: Any = None
    type_name: str = ""
    errno: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.kind == "returned":
            return f"returned {self.value!r}"
        if self.kind == "raised":
            return (
                f"raised {self.type_name} with errno {errno.errorcode.get(self.errno or 0, self.errno)}: {self.value}"
            )
        return f"died by signal {self.signal}" if self.kind == "died" else self.kind


def answer_of(function: Callable[..., Any], *arguments: Any) -> Answer:
    """Run the attempt here and put into words what came of it."""
    return Answer(*tell(function, *arguments))


def tell(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """The fields of an Answer, as plain values that any channel can carry."""
    try:
        return ("returned", function(*arguments), "", None, None)
    except Exception as error:
        return ("raised", str(error), type(error).__name__, getattr(error, "errno", None), None)


@dataclass(frozen=True)
class Run:
    """What came of one run, and whether the host saw the effect; inside also what compart recorded."""

    answer: Answer
    happened: bool
    violations: tuple[str, ...] = ()
    enforcement: Any = None


def happened(one: Attempt, world: World) -> bool:
    return one.effect is not None and one.effect(world)


# -- outside -----------------------------------------------------------------------------------------------------------


def run_outside(one: Attempt, world: World) -> Run:
    """Run the attempt in a plain forked child, with nothing around it."""
    with handed_over(one, world, inside=False) as given:
        answer = in_a_child(one.function, world, *given)
        return Run(answer, happened(one, world))


def in_a_child(function: Callable[..., Any], *arguments: Any) -> Answer:
    """What came of the function in a forked child of its own; a child that takes too long is killed."""
    read_end, write_end = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_the_child(write_end, function, arguments)
    os.close(write_end)
    try:
        _await_the_end(pid)
        _, status = os.waitpid(pid, 0)
        # Not to end-of-file: a process that the attempt left behind may hold the other end.
        os.set_blocking(read_end, False)
        with contextlib.suppress(BlockingIOError):
            spoken = os.read(read_end, 65536)
    finally:
        os.close(read_end)
    if os.WIFSIGNALED(status):
        return Answer("died", signal=os.WTERMSIG(status))
    if not spoken:
        return Answer("became another program")
    # Our own child, which nothing confines: unpickling what it says is as good as calling it here.
    return Answer(*pickle.loads(spoken))


def _be_the_child(write_end: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        spoken = pickle.dumps(tell(function, *arguments))
        os.write(write_end, spoken)
    finally:
        os._exit(0)


def _await_the_end(pid: int) -> None:
    child = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([child], [], [], SECONDS_OUTSIDE)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError("the attempt did not end")
    finally:
        os.close(child)


def gets_through(one: Attempt, world: World, run: Run) -> str | None:
    """None if the attempt got through outside, else what went wrong."""
    answer = run.answer
    if isinstance(one.outside, Reaches):
        reached = answer.kind == "returned" or answer.errno in one.outside.errnos
        return None if reached else f"it did not reach the kernel: it {answer}"
    if answer.kind == "raised" or (answer.kind != "returned" and not one.effect):
        return f"it {answer}"
    if one.effect is not None:
        return None if run.happened else f"it {answer}, but the host sees no effect"
    proven = one.proof(world, answer.value) if one.proof else answer.value == world.token
    return None if proven else f"it {answer}, which proves nothing"


# -- inside ------------------------------------------------------------------------------------------------------------


def run_inside(one: Attempt, world: World, **fields: Any) -> Run:
    """Run the attempt in a compartment whose policy goes on after a violation."""
    import compart

    def confined(*given: Any) -> tuple[Any, ...]:
        return tell(one.function, world, *given)

    with handed_over(one, world, inside=True) as given:
        policy = {"start": "fork", "on_violation": "deny", "timeout": 20, **policy_fields(one, world), **fields}
        try:
            outcome = compart.sandboxed(**policy)(confined).run(*given)
        except compart.CompartmentDied as death:
            violations = tuple(v.call for v in getattr(death, "violations", ()))
            return Run(Answer("died", str(death), signal=death.signal), happened(one, world), violations)
        violations = tuple(v.call for v in outcome.violations)
        return Run(Answer(*outcome.value), happened(one, world), violations, outcome.enforcement)


def judge_outside(one: Attempt, directory: Path) -> str | None:
    """Run the attempt outside, in the directory that is made for it. None if it got through, else what went wrong."""
    if isinstance(one.outside, Unavailable):
        return None if one.outside.probe() else f"this machine can do it after all: {one.outside.reason}"
    with world_for(one, directory) as world:
        run = run_outside(one, world)
        if run.answer.errno == errno.ENOSYS and not run.happened and any(older_than(call) for call in one.call):
            return None  # the kernel says so itself
        return gets_through(one, world, run)


def older_than(call: str) -> bool:
    """Whether this kernel is older than the call. Asked only of one that it has just refused so."""
    return native.syscall(native.NUMBERS[call], -1, -1, -1, -1, -1, -1) == -errno.ENOSYS


def privileged() -> bool:
    """Whether this process is root with all that goes with it (capabilities(7)), which root in a container may lack."""
    status = Path("/proc/self/status").read_text()
    held = int(status.split("CapEff:")[1].split()[0], 16)
    wanted = (
        0,
        2,
        16,
        18,
        19,
        21,
        22,
        25,
        27,
    )  # CHOWN DAC_READ_SEARCH SYS_MODULE _CHROOT _PTRACE _ADMIN _BOOT _TIME MKNOD
    return all(held >> bit & 1 for bit in wanted)


def judge_inside(one: Attempt, directory: Path, walls: dict[str, bool], *, strict: bool = True) -> str | None:
    """Run the attempt inside, in the directory that is made for it. None if it was refused, else what went wrong.

    Where a wall that its grant needs is missing, compart must refuse to run it. Unless strict, a filter around this very
    process may refuse the call before compart's is asked, in its own way, and then nobody is told. NoWayError when the
    attempt cannot be arranged here.
    """
    import compart

    with world_for(one, directory) as world:
        if not all(walls[wall] for wall in one.needs):
            try:
                run = run_inside(one, world)
            except compart.UnsupportedError:
                return None
            return f"compart ran it without {' and '.join(one.needs)}: it {run.answer}"
        run = run_inside(one, world)
        said = is_refused(one, world, run, listening=walls["listener"])
    if said is None or strict or run.happened or run.answer.kind != "raised":
        return said
    with world_for(one, directory.with_suffix(".machine")) as world:
        return None if run_outside(one, world).answer.errno == run.answer.errno else said


def walls_here() -> dict[str, bool]:
    """Which walls a compartment gets on this machine."""
    import compart

    return {wall.name: wall.up for wall in compart.enforcement(compart.Policy()).walls}


def policy_fields(one: Attempt, world: World) -> dict[str, Any]:
    return one.policy(world) if callable(one.policy) else dict(one.policy)


def is_refused(one: Attempt, world: World, run: Run, *, listening: bool) -> str | None:
    """None if the attempt was refused inside for the stated reason, else what went wrong."""
    if run.happened:
        return f"the host sees its effect; it {run.answer}"
    if run.answer.kind == "returned" and one.proof is not None and one.proof(world, run.answer.value):
        return f"it got through: it {run.answer}"
    if not any(_matches(refusal, run.answer) for refusal in one.refused_with):
        return f"it {run.answer}"
    if _got_the_token(world, run.answer):
        return f"the secret came out: it {run.answer}"
    if listening and one.call and not set(one.call) & set(run.violations):
        return f"no violation names {' or '.join(one.call)}; recorded: {run.violations}; it {run.answer}"
    return None


def _matches(refusal: Refusal, answer: Answer) -> bool:
    if isinstance(refusal, Contained):
        return answer.kind == "returned"
    if isinstance(refusal, Died):
        return answer.kind == "died" and answer.signal in refusal.signals
    if isinstance(refusal, int):
        return answer.kind == "raised" and answer.errno == refusal
    if issubclass(refusal, PermissionError):
        # Exactly what compart answers: EACCES would be somebody else's refusal.
        return answer.kind == "raised" and answer.errno == errno.EPERM
    return answer.kind == "raised" and answer.type_name == refusal.__name__


def _got_the_token(world: World, answer: Answer) -> bool:
    return isinstance(answer.value, (bytes, str, list, tuple)) and world.token.decode() in repr(answer.value)
