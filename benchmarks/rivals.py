"""The ways to run a function in another process that compart is measured against, and a host that runs them in turn.

    python -m benchmarks.rivals --heap 100 --rounds 50 fresh

prints the nanoseconds of every call as JSON. One host process runs one group with one size of heap, so that neither the
threads of an executor nor a large heap weighs on calls that have nothing to do with them. Within a host the rivals take
turns, so that what else the machine does falls on all alike.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from compart import sandboxed

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
FORK = multiprocessing.get_context("fork")

Rival = Callable[[], object]


def answer() -> int:
    """The least a function can do."""
    return 7


# ---- fresh: a process of its own for every call ----------------------------------------------------------------------


def compart() -> Rival:
    return sandboxed(answer)


def bare_fork() -> Rival:
    """What compart adds its walls to: os.fork by hand, with no wall at all and an answer that is only bytes."""

    def call() -> int:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writer, b"%d" % answer())
            finally:
                os._exit(0)
        os.close(writer)
        value = int(os.read(reader, 64))
        os.close(reader)
        os.waitpid(pid, 0)
        return value

    return call


def multiprocessing_process() -> Rival:
    def call() -> object:
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_send_answer, args=(theirs,))
        process.start()
        theirs.close()
        value = ours.recv()
        process.join()
        process.close()
        ours.close()
        return value

    return call


def _send_answer(theirs: Any) -> None:
    theirs.send(answer())


def fresh_executor() -> Rival:
    """A new executor with a process for one task. For that it does not fork its caller but a server, which is kept."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["compart"])

    def call() -> object:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as executor:
            return executor.submit(answer).result()

    return call


def subprocess_python() -> Rival:
    return lambda: _run_python()


def bubblewrap() -> Rival | None:
    """An interpreter in a sandbox of namespaces; None where bubblewrap is not installed."""
    program = shutil.which("bwrap")
    if program is None:
        return None
    return lambda: _run_python(program, "--unshare-all", "--ro-bind", "/", "/", "--die-with-parent")


def _run_python(*before: str) -> int:
    done = subprocess.run([*before, sys.executable, "-c", "print(7)"], stdout=subprocess.PIPE, check=True)
    return int(done.stdout)


# ---- pooled: a process that has been waiting -------------------------------------------------------------------------


def warm_executor() -> Rival:
    executor = _executor()
    return lambda: executor.submit(answer).result()


def warm_pool() -> Rival:
    pool = _pool()
    return lambda: pool.apply(answer)


AT_END: list[Callable[[], object]] = []
"""What ends the processes that were started to wait."""


def _executor() -> concurrent.futures.ProcessPoolExecutor:
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=FORK)
    AT_END.append(executor.shutdown)
    return executor


def _pool() -> Any:
    pool = FORK.Pool(1)
    AT_END.append(pool.terminate)
    return pool


# ---- results: something large comes back -----------------------------------------------------------------------------

HELD: dict[tuple[str, int], Any] = {}
"""What is returned. It is made before any process starts, so that only its way back is measured."""


def held(kind: str, size: int) -> Any:
    return HELD[kind, size]


def _hold(kind: str, size: int) -> None:
    # Not at the top: NumPy's library and threads would weigh on every fork, and the small host would be small no more.
    import numpy

    HELD[kind, size] = b"\x5a" * size if kind == "bytes" else numpy.full(size // 8, 1.5)


def read_pages(value: Any) -> int:
    """Read something of every page of a result."""
    return len(bytes(memoryview(value).cast("B")[::PAGE]))


def result_by_compart(kind: str, size: int) -> Rival:
    import numpy

    def array(kind: str, size: int) -> numpy.ndarray:
        return HELD[kind, size]

    call = sandboxed(held if kind == "bytes" else array)
    return lambda: read_pages(call(kind, size))


def result_by_executor(kind: str, size: int) -> Rival:
    executor = _executor()
    return lambda: read_pages(executor.submit(held, kind, size).result())


def result_by_pool(kind: str, size: int) -> Rival:
    pool = _pool()
    return lambda: read_pages(pool.apply(held, (kind, size)))


# ---- codec -----------------------------------------------------------------------------------------------------------


def codec(name: str, structure: str) -> Rival:
    from benchmarks.test_codec import CODECS, STRUCTURES

    dumps, loads = CODECS[name]
    value = STRUCTURES[structure]()
    return lambda: loads(dumps(value))


# ---- groups ----------------------------------------------------------------------------------------------------------

FRESH: dict[str, Callable[[], Rival | None]] = {
    "compart": compart,
    "os.fork": bare_fork,
    "multiprocessing.Process": multiprocessing_process,
    "ProcessPoolExecutor, max_tasks_per_child=1": fresh_executor,
    "subprocess": subprocess_python,
    "bubblewrap": bubblewrap,
}
POOLED: dict[str, Callable[[], Rival | None]] = {
    "compart": compart,
    "ProcessPoolExecutor": warm_executor,
    "multiprocessing.Pool": warm_pool,
}
RESULTS = {
    "compart": result_by_compart,
    "ProcessPoolExecutor": result_by_executor,
    "multiprocessing.Pool": result_by_pool,
}
SIZES = {"1 KB": KIB, "1 MB": MIB, "64 MB": 64 * MIB}
KINDS = ("bytes", "array")
STRUCTURES = ("records", "document", "columns")
HEAPS = {"small": 0, "100 MB": 100, "1 GB": 1024}


def names(group: str) -> list[str]:
    """The rivals of a group. A group is "fresh", "pooled", "codec:STRUCTURE" or "result:KIND:SIZE"."""
    if group in ("fresh", "pooled"):
        return list(FRESH if group == "fresh" else POOLED)
    return ["compart", "pickle5"] if group.startswith("codec:") else list(RESULTS)


def make(group: str, only: list[str] | None = None) -> dict[str, Rival]:
    """The rivals of a group, ready to be called; those that are not to be had here are left out."""
    what, _, rest = group.partition(":")
    made: dict[str, Rival | None] = {}
    for name in names(group):
        if only is not None and name not in only:
            continue
        if what == "codec":
            made[name] = codec(name, rest)
        elif what == "result":
            kind, size = rest.split(":")
            _hold(kind, SIZES[size])
            made[name] = RESULTS[name](kind, SIZES[size])
        else:
            made[name] = (FRESH if what == "fresh" else POOLED)[name]()
    return {name: rival for name, rival in made.items() if rival is not None}


def touched(mebibytes: int) -> bytearray:
    """So much heap, every page of it written."""
    heap = bytearray(mebibytes * MIB)
    heap[::PAGE] = b"\1" * (len(heap) // PAGE)
    return heap


def take_turns(rivals: dict[str, Rival], rounds: int) -> dict[str, list[int]]:
    """Nanoseconds of each call: A B, B A, A B, ... The first two rounds warm up and are not counted."""
    samples: dict[str, list[int]] = {name: [] for name in rivals}
    turns = list(rivals.items())
    for number in range(rounds + 2):
        for name, rival in turns if number % 2 else reversed(turns):
            start = time.perf_counter_ns()
            rival()
            spent = time.perf_counter_ns() - start
            if number >= 2:
                samples[name].append(spent)
    return samples


def serve(rivals: dict[str, Rival]) -> None:
    """Make the call that each line of stdin names, and write a line when it is done."""
    for line in sys.stdin:
        rivals[line.strip()]()
        print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", help='"fresh", "pooled", "codec:records", "result:array:64 MB", ...')
    parser.add_argument("--heap", type=int, default=0, metavar="MB", help="touch so much memory first")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--serve", action="store_true", help="make one call for each line of stdin that names a rival")
    parser.add_argument("--only", action="append", metavar="RIVAL", help="leave the other rivals out")
    chosen = parser.parse_args()
    heap = touched(chosen.heap)
    rivals = make(chosen.group, chosen.only)
    if chosen.serve:
        serve(rivals)
    else:
        json.dump(take_turns(rivals, chosen.rounds), sys.stdout)
    del heap
    for end in AT_END:
        end()


if __name__ == "__main__":
    main()
