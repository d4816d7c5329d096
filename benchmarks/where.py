"""Where the time of one fresh call goes: timers around compart's own functions, put there from outside.

What runs in the compartment is timed there; the function that is called returns what was noted so far. Timers cost time
themselves, about a microsecond each and a page fault or two, so the sum is more than a call without them.
"""

import resource
import statistics
import time
from collections import defaultdict
from typing import Any

from benchmarks import rivals
from compart import Policy, backend, sandboxed
from compart.backend.linux import _sys, walls
from compart.guest import worker
from compart.host import compartment

STEP = 56
"""Bytes of one step of a script (compart/backend/linux/script.py)."""

Notes = list[tuple[str, int, int, int]]
"""What was done, when it began and ended (nanoseconds of CLOCK_MONOTONIC, one clock for all processes), page faults since the
process began."""

inside: Notes = []
outside: Notes = []


def note(notes: Notes, what: str, start: int) -> None:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    notes.append((what, start, time.perf_counter_ns(), faults))


def timed(notes: Notes, what: str, function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter_ns()
        try:
            return function(*args, **kwargs)
        finally:
            note(notes, what, start)

    return call


class Instead:
    """Stands in for a module with some of its functions replaced."""

    def __init__(self, module: Any, **functions: Any) -> None:
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def put_timers() -> None:
    """Replace compart's functions by timed ones, for the life of this process."""
    scripts: list[tuple[tuple[str, str], ...]] = []
    enter, main = walls.Linux.enter, worker.main

    def run(script: bytes, data: bytes) -> tuple[int, int] | None:
        for n, (wall, name) in enumerate(scripts.pop(0)):
            start = time.perf_counter_ns()
            failed = _sys.run(script[n * STEP : (n + 1) * STEP], data)
            note(inside, f"{wall}: {name}", start)
            if failed is not None:
                return n, failed[1]
        return None

    def timed_enter(self: Any, plan: Any, script: Any, prepare: Any) -> None:
        scripts[:] = [script.first_names, script.last_names]
        enter(self, plan, script, timed(inside, "streams, hooks, handed files", prepare))

    def timed_main(*args: Any) -> None:
        inside.clear()
        note(inside, "first line of the worker", time.perf_counter_ns())
        main(*args)

    walls._sys = Instead(_sys, run=run)  # type: ignore[assignment]
    walls.Linux.enter = timed_enter  # type: ignore[method-assign]
    worker.main = timed_main  # type: ignore[assignment]
    timers = {name: timed(outside, name, getattr(_sys, name)) for name in HOST_CALLS if hasattr(_sys, name)}
    compartment._sys = Instead(_sys, **timers)  # type: ignore[assignment]
    for name in HOST_STEPS:
        setattr(compartment.Compartment, name, timed(outside, name, getattr(compartment.Compartment, name)))


HOST_CALLS = ("fork", "settle", "waitid")
HOST_STEPS = ("wait_frame", "end", "close")


def told() -> Notes:
    """The sandboxed function: everything that was noted on the way to it."""
    note(inside, "the function", time.perf_counter_ns())
    return list(inside)


def report(rounds: int) -> None:
    """Print the phases of a fresh call, medians of `rounds` calls."""
    plain, bare = rivals.compart(), rivals.bare_fork()
    assert bare is not None
    assert plain is not None
    samples = rivals.take_turns({"compart": plain, "os.fork": bare}, rounds)
    for name, values in samples.items():
        print(f"{name:10} {statistics.median(values) / 1e3:7.0f} µs without timers, {faults_of(samples, name)}")
    plan: Any = backend.select().plan(Policy(), [])
    print(f"the filter has {len(plan.program) // 8} instructions\n")
    put_timers()
    call = sandboxed(told)
    when: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    whole = []
    for number in range(rounds + 2):
        outside.clear()
        start = time.perf_counter_ns()
        notes = call()
        end = time.perf_counter_ns()
        if number >= 2:
            whole.append(end - start)
            keep(when, notes, start)
            keep(when, outside, start)
    print(
        f"{statistics.median(whole) / 1e3:.0f} µs with timers; began and took in µs, page faults of its process so far"
    )
    print("(the host's since it began, the compartment's since the fork)\n")
    for what, times in sorted(when.items(), key=lambda item: statistics.median(t[0] for t in item[1])):
        began, took, faults = (statistics.median(column) for column in zip(*times, strict=True))
        where = "host" if what.split(" #")[0] in HOST_CALLS + HOST_STEPS else "compartment"
        print(f"{began / 1e3:7.0f} {took / 1e3:7.1f}  {faults:6.0f}  {where:12} {what}")


def keep(when: dict[str, list[tuple[int, int, int]]], notes: Notes, start: int) -> None:
    seen: dict[str, int] = defaultdict(int)
    for what, began, ended, faults in notes:
        if what:
            seen[what] += 1
            key = what if seen[what] == 1 else f"{what} #{seen[what]}"
            when[key].append((began - start, ended - began, faults))


def faults_of(samples: dict[str, list[int]], name: str) -> str:
    """Page faults of one call, in the child and in the host."""
    rival = rivals.compart() if name == "compart" else rivals.bare_fork()
    assert rival is not None
    counts = []
    for _ in range(12):
        before = [resource.getrusage(who).ru_minflt for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
        rival()
        after = [resource.getrusage(who).ru_minflt for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)]
        counts.append([b - a for a, b in zip(before, after, strict=True)])
    child, host = (statistics.median(column) for column in zip(*counts, strict=True))
    return f"{child:.0f} page faults in the child, {host:.0f} in the host"
