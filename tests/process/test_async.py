"""Awaiting a compartment: the event loop stays free, a cancellation kills and reaps before it propagates."""

import asyncio
import contextlib
import contextvars
import functools
import inspect
import os
import threading
import time

import pytest

import compart
from compart import CompartmentDied, CompartmentTimeout, ViolationError, sandboxed

pytestmark = pytest.mark.usefixtures("leak_check")


def children():
    found = []
    for task in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/self/task/{task}/children") as listed,
        ):
            found += map(int, listed.read().split())
    return found


@sandboxed
def square(n):
    return n * n


@sandboxed(timeout=20)
def sleeps(seconds=15):
    time.sleep(seconds)
    return "slept"


@sandboxed
async def fetch(n):
    await asyncio.sleep(0.001)
    return n + 1


def test_a_plain_function_is_awaited():
    assert asyncio.run(square.aio(7)) == 49


def test_a_coroutine_function_is_awaited():
    assert asyncio.run(fetch(1)) == 2
    assert asyncio.run(fetch.aio(1)) == 2


def test_a_coroutine_function_looks_like_one():
    made = fetch(1)
    made.close()
    assert inspect.iscoroutine(made)


def test_a_coroutine_function_also_runs_without_a_loop():
    assert fetch.run(1).value == 2
    assert fetch.submit(1).result(timeout=30) == 2


def test_tasks_run_side_by_side_inside():
    @sandboxed
    async def gathers():
        return await asyncio.gather(*(asyncio.sleep(0.01, n) for n in range(5)))

    assert asyncio.run(gathers()) == [0, 1, 2, 3, 4]


def test_async_methods_and_partials():
    class Reader:
        @sandboxed
        async def read(self, n):
            return n * 2

    assert asyncio.run(Reader().read(2)) == 4

    async def add(a, b):
        return a + b

    assert asyncio.run(sandboxed(functools.partial(add, 1))(2)) == 3


def test_twenty_at_once():
    async def main():
        return await asyncio.gather(*(square.aio(n) for n in range(20)))

    assert asyncio.run(main()) == [n * n for n in range(20)]


def test_twenty_at_once_wait_side_by_side():
    ready, here = os.pipe()
    wait, go = os.pipe()
    with os.fdopen(here, "wb", buffering=0) as here_file, os.fdopen(wait, "rb", buffering=0) as wait_file:

        @sandboxed(timeout=30)
        def meets(here, wait):
            here.write(b"x")
            return wait.read(1)

        async def main():
            tasks = [asyncio.create_task(meets.aio(here_file, wait_file)) for _ in range(20)]
            os.set_blocking(ready, False)
            arrived = 0
            while arrived < 20:
                await asyncio.sleep(0.005)
                assert not any(task.done() for task in tasks)
                with contextlib.suppress(BlockingIOError):
                    arrived += len(os.read(ready, 20))
            # All of them are inside, and none could go on so far.
            os.write(go, b"!" * 20)
            return await asyncio.gather(*tasks)

        try:
            assert asyncio.run(main()) == [b"!"] * 20
        finally:
            os.close(ready)
            os.close(go)


def test_one_that_fails_leaves_the_others_alone():
    @sandboxed
    def some(n):
        if n == 3:
            os._exit(1)
        if n == 5:
            raise LookupError(n)
        return n

    async def main():
        return await asyncio.gather(*(some.aio(n) for n in range(8)), return_exceptions=True)

    results = asyncio.run(main())
    assert isinstance(results[3], CompartmentDied)
    assert isinstance(results[5], LookupError)
    assert [r for r in results if isinstance(r, int)] == [0, 1, 2, 4, 6, 7]


def test_the_event_loop_stays_free():
    async def main():
        ticks = 0
        call = asyncio.create_task(sleeps.aio(0.2))
        while not call.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await call, ticks

    value, ticks = asyncio.run(main())
    assert value == "slept"
    assert ticks >= 3


def test_it_needs_no_thread():
    async def main():
        before = threading.active_count()
        call = asyncio.create_task(sleeps.aio(0.05))
        await asyncio.sleep(0.01)
        during = threading.active_count()
        await call
        return before, during

    before, during = asyncio.run(main())
    assert before == during


def test_exceptions_come_back_as_from_a_call():
    async def main():
        with pytest.raises(ZeroDivisionError):
            await sandboxed(lambda: 1 / 0).aio()
        with pytest.raises(ViolationError):
            await sandboxed(lambda: os.path.exists("/etc")).aio()
        with pytest.raises(CompartmentDied) as caught:
            await sandboxed(lambda: os._exit(4)).aio()
        return caught.value.exit_code

    assert asyncio.run(main()) == 4


def test_an_exception_of_a_coroutine_comes_back():
    @sandboxed
    async def fails():
        await asyncio.sleep(0)
        raise LookupError("inside")

    with pytest.raises(LookupError, match="inside"):
        asyncio.run(fails())


# -------------------------------------------------------------------------------------------------- cancelling and timeouts


async def started(task):
    """Waits until a call has a compartment."""
    while not children():
        assert not task.done()
        await asyncio.sleep(0.001)


def test_a_cancellation_kills_and_reaps_before_it_propagates():
    async def main():
        task = asyncio.create_task(sleeps.aio())
        await started(task)
        (child,) = children()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == []
        assert not os.path.exists(f"/proc/{child}")

    asyncio.run(main())


def test_cancelling_one_leaves_the_others_alone():
    async def main():
        tasks = [asyncio.create_task(sleeps.aio(0.1)) for _ in range(4)]
        await started(tasks[0])
        tasks[1].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(main())
    assert isinstance(results.pop(1), asyncio.CancelledError)
    assert results == ["slept"] * 3


def test_a_cancellation_before_it_started_forks_nothing(no_fork):
    async def main():
        task = asyncio.create_task(sleeps.aio())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_timeout_of_asyncio_kills():
    async def main():
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.1):
                await sleeps.aio()
        assert not isinstance(caught.value, compart.CompartError)
        assert children() == []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sleeps.aio(), 0.1)
        assert children() == []

    asyncio.run(main())


def test_a_timeout_of_the_policy_kills():
    async def main():
        with pytest.raises(CompartmentTimeout):
            await sleeps.options(timeout=0.1).aio()
        assert children() == []
        with pytest.raises(CompartmentTimeout):
            await sandboxed(asyncio.sleep, timeout=0.1)(60)
        assert children() == []

    asyncio.run(main())


def test_the_cpu_limit_is_kept():
    def spins():
        while True:
            pass

    with pytest.raises(CompartmentDied) as caught:
        asyncio.run(sandboxed(spins, cpu=0.1).aio())
    assert caught.value.limit == "cpu"


def test_a_task_group_that_fails_kills_the_rest():
    async def grouped():
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(sleeps.aio())
            group.create_task(sandboxed(lambda: 1 / 0).aio())

    async def main():
        with pytest.raises(ExceptionGroup) as caught:
            await grouped()
        assert children() == []
        return caught.value

    assert [type(error) for error in asyncio.run(main()).exceptions] == [ZeroDivisionError]


def test_an_interrupt_of_the_loop_kills():
    async def main():
        task = asyncio.create_task(sleeps.aio())
        await started(task)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert children() == []


def test_a_coroutine_that_is_never_awaited_forks_nothing(no_fork):
    made = square.aio(3)
    made.close()


# ----------------------------------------------------------------------------------------------------------- around the loop


def test_big_values_and_much_output_come_through_the_loop():
    @sandboxed
    def big():
        print("x" * 500_000)
        return memoryview(b"y" * 3_000_000), "z" * 300_000

    buffer, text = asyncio.run(big.aio())
    assert (bytes(buffer), text) == (b"y" * 3_000_000, "z" * 300_000)


def test_files_are_handed_over(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"content")
    with open(path, "rb") as file:
        assert asyncio.run(sandboxed(lambda f: f.read()).aio(file)) == b"content"


def test_the_loop_of_the_host_is_not_seen_inside():
    def looks():
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(asyncio.sleep(0, "own loop"))
        return "the host's loop"

    async def main():
        return await sandboxed(looks).aio(), sandboxed(looks)()

    assert asyncio.run(main()) == ("own loop", "own loop")


VARIABLE = contextvars.ContextVar("VARIABLE", default="default")


def test_context_variables_come_along():
    async def main():
        VARIABLE.set("set")
        return await sandboxed(VARIABLE.get).aio()

    assert asyncio.run(main()) == "set"


def test_a_blocking_call_works_within_a_running_loop():
    async def main():
        return square(3)

    assert asyncio.run(main()) == 9


def test_mistakes_are_told_when_it_is_awaited_and_before_a_fork(no_fork):
    with pytest.raises(TypeError, match=r"square\(\) missing a required argument: 'n'"):
        asyncio.run(square.aio())


def test_loops_of_two_threads_do_not_mix():
    results = {}

    def loop(n):
        async def main():
            return await asyncio.gather(*(square.aio(n * 10 + k) for k in range(5)))

        results[n] = asyncio.run(main())

    threads = [threading.Thread(target=loop, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [(n * 10 + k) ** 2 for k in range(5)] for n in range(3)}
