"""Many calls of every kind, in no order, from several threads at once: all answers right, and the host no larger afterwards.

A few hundred calls by default; COMPART_SOAK=100000 makes it so many.
"""

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import compart
from compart import (
    Buffer,
    CompartmentDied,
    CompartmentTimeout,
    Directory,
    EncodeError,
    MemoryLimitError,
    ProtocolError,
    RemoteError,
    UnsupportedError,
    ViolationError,
    sandboxed,
)
from compart.backend.linux.filters import RESULT
from compart.host import arena

CALLS = int(os.environ.get("COMPART_SOAK", "400"))
THREADS = 4
SEED = int(os.environ.get("COMPART_SOAK_SEED", "20240229"))


# ---- the kinds of calls --------------------------------------------------------------------------------------------------------


def sums(numbers: list[int]) -> int:
    return sum(numbers)


def repeats(pattern: bytes, times: int) -> memoryview:
    return memoryview(pattern * times)


def counts(most: int) -> Iterator[int]:
    yield from range(most)


def blocks(pattern: bytes, most: int) -> Iterator[bytes]:
    for n in range(most):
        yield pattern[n % len(pattern) : n % len(pattern) + 1] * 100_000


def reads(file: Any) -> bytes:
    return file.read()


class OfItsOwn(Exception):
    pass


def raises(how: str) -> None:
    raise {"builtin": KeyError, "own": OfItsOwn}[how](how)


def looks_outside() -> str:
    try:
        return str(os.stat("/etc/hostname").st_size)
    except PermissionError:
        return "refused"


def loops() -> None:
    while True:
        pass


def value(chance: random.Random) -> None:
    numbers = [chance.getrandbits(70) for _ in range(chance.randrange(200))]
    assert sandboxed(sums)(numbers) == sum(numbers)


def big_value(chance: random.Random) -> None:
    pattern, times = chance.randbytes(1000), chance.randrange(1, 600)
    result = sandboxed(repeats)(pattern, times)
    assert isinstance(result, Buffer)
    assert bytes(result) == pattern * times


def stream(chance: random.Random) -> None:
    most, wanted = chance.randrange(300), chance.randrange(300)
    got = []
    with sandboxed(counts)(most) as values:
        for number in values:
            if len(got) == wanted:
                break
            got.append(number)
    assert got == list(range(min(most, wanted)))


def stream_of_blocks(chance: random.Random) -> None:
    pattern, most = chance.randbytes(3), chance.randrange(1, 6)
    expected = [pattern[n % 3 : n % 3 + 1] * 100_000 for n in range(most)]
    assert list(sandboxed(blocks, timeout=50)(pattern, most)) == expected


def file(chance: random.Random) -> None:
    with open(__file__, "rb") as opened:
        opened.seek(chance.randrange(1000))
        expected = Path(__file__).read_bytes()[opened.tell() :]
        assert sandboxed(reads)(opened) == expected


def directory(chance: random.Random) -> None:
    with Directory(os.path.dirname(__file__)) as given:
        if "namespaces" in compart.enforcement().up:
            assert os.path.basename(__file__) in sandboxed(lambda inside: list(inside.iterdir()))(given)
        else:
            with pytest.raises(UnsupportedError, match="namespaces"):
                sandboxed(lambda inside: list(inside.iterdir()))(given)


def output(chance: random.Random) -> None:
    lines, width = chance.randrange(100), chance.randrange(1000)
    outcome = sandboxed(lambda: [print("x" * width) for _ in range(lines)] and lines).run()
    assert outcome.stdout == ("x" * width + "\n") * lines


def exception(chance: random.Random) -> None:
    how, kind = chance.choice([("builtin", KeyError), ("own", RemoteError)])
    with pytest.raises(kind, match=how):
        sandboxed(raises)(how)


def violation(chance: random.Random) -> None:
    how = chance.choice(["raise", "kill", "deny"])
    call = sandboxed(looks_outside, on_violation=how)
    if how == "deny":
        assert call() == "refused"
    else:
        with pytest.raises(ViolationError, match="hostname"):
            call()


def death(chance: random.Random) -> None:
    kind, inside, args, fields = chance.choice([
        (CompartmentDied, ctypes.string_at, (8,), {}),
        (CompartmentDied, os.abort, (), {}),
        (CompartmentDied, os._exit, (chance.randrange(256),), {}),
        (CompartmentTimeout, time.sleep, (60,), {"timeout": 0.03}),
        (CompartmentDied, loops, (), {"cpu": 0.02}),
        (MemoryLimitError, lambda: bytearray(1 << 30), (), {"memory": "64M"}),
        (CompartmentDied, lambda: "x" * 10_000, (), {"result_bytes": 5000}),
        (EncodeError, lambda: [object()], (), {}),
        (ProtocolError, lambda: os.write(RESULT, b"garbage" * 100), (), {}),
    ])  # fmt: skip
    with pytest.raises(kind):
        sandboxed(inside, **{"timeout": 50, **fields})(*args)


def awaited(chance: random.Random) -> None:
    async def together(numbers: list[int]) -> list[int]:
        return await asyncio.gather(*(sandboxed(sums).aio([n, 1]) for n in numbers))

    numbers = [chance.randrange(1000) for _ in range(3)]
    assert asyncio.run(together(numbers)) == [n + 1 for n in numbers]


def cancelled(chance: random.Random) -> None:
    async def cancel() -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(sandboxed(loops).aio(), 0.02)

    asyncio.run(cancel())


KINDS: list[tuple[Callable[[random.Random], None], int]] = [
    (value, 30), (big_value, 15), (stream, 10), (stream_of_blocks, 4), (file, 10), (directory, 5), (output, 5),
    (exception, 8), (violation, 8),
    (death, 10), (awaited, 4), (cancelled, 1),
]  # fmt: skip


# ---- the test -------------------------------------------------------------------------------------------------------------------


def held() -> Counter[str]:
    """Descriptors by what they are, children, threads and temporary files of this process."""
    gc.collect()
    arena.trim()
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{number}")
            found["descriptor " + target.split(":")[0]] += 0 if target.endswith("/fd") else 1
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found["children"] += len(Path(f"/proc/self/task/{task}/children").read_text().split())
    found["threads"] = threading.active_count()
    return +found


def resident() -> int:
    """MiB of memory that this process has touched and that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) // 1024


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)


def run(calls: int, seed: int) -> Counter[str]:
    """So many calls, chosen by chance; what each kind did. Raises the first error."""
    chance = random.Random(seed)
    kinds, weights = zip(*KINDS, strict=True)
    done: Counter[str] = Counter()
    for _ in range(calls):
        (kind,) = chance.choices(kinds, weights)
        kind(chance)
        done[kind.__name__] += 1
    return done


def run_on_threads(calls: int, seed: int) -> Counter[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(run, [calls // THREADS] * THREADS, range(seed, seed + THREADS))
        return sum(parts, Counter())


@pytest.mark.parametrize("run", [run, run_on_threads])
def test_any_mixture_of_calls_gives_right_answers_and_leaves_nothing(run: Callable[[int, int], Counter[str]]) -> None:
    for kind, _ in KINDS:
        kind(random.Random(1))
    run(min(CALLS // 2, 80), SEED - 1000)
    before, size, maps = held(), resident(), mappings()

    done = run(CALLS // 2, SEED)

    assert sum(done.values()) >= CALLS // 2 - THREADS
    assert held() == before
    # What the host gains may not grow with the number of calls: the allocator's own arenas and no more.
    assert resident() - size < 48
    assert mappings() - maps < 40
