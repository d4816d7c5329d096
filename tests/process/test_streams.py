"""A sandboxed generator streams: values as they come, no further ahead than is read, and an end that leaves nothing."""

import asyncio
import contextlib
import gc
import itertools
import os
import select
import threading
import time

import pytest

import compart
from compart import (
    AsyncStream,
    Buffer,
    ClosedError,
    CompartmentDied,
    CompartmentTimeout,
    EncodeError,
    PolicyError,
    ProtocolError,
    RemoteTraceback,
    Stream,
    ViolationError,
    sandboxed,
)

pytestmark = pytest.mark.usefixtures("leak_check")


@sandboxed
def count(n):
    yield from range(n)


@sandboxed
async def count_async(n):
    for k in range(n):
        await asyncio.sleep(0)
        yield k


@sandboxed
def forever(written=None):
    for n in itertools.count():
        if written is not None:
            os.write(written.fileno(), b".")
        yield n, b"x" * 10_000


def gone(pid):
    """Waits until a process is gone."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return select.select([watch], [], [], 20)[0] == [watch]
    finally:
        os.close(watch)


# ---------------------------------------------------------------------------------------------------------------- values


def test_values_come_in_order():
    assert list(count(5)) == [0, 1, 2, 3, 4]
    assert list(count(0)) == []
    assert list(count(3000)) == list(range(3000))


def test_a_call_gives_a_stream_and_two_calls_give_two():
    with count(3) as one, count(3) as two:
        assert isinstance(one, Stream)
        assert iter(one) is one
        assert [next(one), next(two), next(one)] == [0, 0, 1]


def test_a_stream_that_ended_stays_at_its_end():
    stream = count(1)
    assert list(stream) == [0]
    assert list(stream) == []
    with pytest.raises(StopIteration):
        next(stream)


def test_values_come_before_the_generator_is_done():
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as go, os.fdopen(writer, "wb") as ours:

        @sandboxed
        def waits(go):
            yield "first"
            go.read(1)
            yield "second"

        with waits(go) as stream:
            assert next(stream) == "first"
            ours.write(b"x")
            ours.flush()
            assert next(stream) == "second"


def test_values_of_every_kind():
    @sandboxed
    def kinds():
        yield None
        yield {"a": [1, (2.5, b"x")]}
        yield "x" * 200_000
        yield memoryview(b"y" * 200_000)
        yield memoryview(b"z" * 10)

    none, mapping, text, big, small = kinds()
    assert (none, mapping, text) == (None, {"a": [1, (2.5, b"x")]}, "x" * 200_000)
    assert type(big) is type(small) is Buffer
    assert (bytes(big), bytes(small)) == (b"y" * 200_000, b"z" * 10)


def test_a_buffer_does_not_change_when_the_next_one_comes():
    @sandboxed
    def buffers():
        block = bytearray(200_000)
        for n in range(6):
            block[:] = bytes([n]) * len(block)
            yield memoryview(block)

    kept = list(buffers())
    assert [bytes(buffer) == bytes([n]) * 200_000 for n, buffer in enumerate(kept)] == [True] * 6


def test_files_come_as_values(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"content")
    with open(path, "rb") as file:
        stream = sandboxed(lambda f: (yield f) or (yield f))(file)
        with stream:
            with next(stream) as first:
                assert first.read() == b"content"
            with next(stream) as second:
                assert os.fstat(second.fileno()).st_ino == path.stat().st_ino


def test_generator_methods_and_lambdas():
    class Source:
        def __init__(self, n):
            self.n = n

        @sandboxed
        def numbers(self):
            yield from range(self.n)

    assert list(Source(3).numbers()) == [0, 1, 2]
    assert list(sandboxed(lambda: (yield 1))()) == [1]


def test_zipped_and_chained_with_other_iterators():
    assert list(zip(count(3), "abc", strict=True)) == [(0, "a"), (1, "b"), (2, "c")]
    assert list(itertools.islice(forever(), 3)) == [(n, b"x" * 10_000) for n in range(3)]


# ---------------------------------------------------------------------------------------------------------- back-pressure


def test_the_generator_does_not_run_ahead_without_bound():
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as ours, os.fdopen(writer, "wb", buffering=0) as theirs:
        os.set_blocking(ours.fileno(), False)
        with forever(theirs) as stream:
            theirs.close()
            assert next(stream)[0] == 0
            made, quiet = 0, 0
            while quiet < 5:  # it makes no more when nobody reads
                if select.select([ours], [], [], 0.05)[0]:
                    made, quiet = made + len(ours.read(65536)), 0
                else:
                    quiet += 1
            # A pipe holds 64 KiB, the host's reader takes what is there; at 10 kB a value that is a few dozen.
            assert 1 <= made <= 200
            assert [next(stream)[0] for _ in range(made + 20)] == list(range(1, made + 21))


# ----------------------------------------------------------------------------------------------------------------- the end


def test_closing_kills():
    @sandboxed
    def ticks():
        while True:
            yield os.getpid()

    stream = ticks()
    assert next(stream) != os.getpid()
    (child,) = open_children()
    stream.close()
    assert gone(child)
    assert open_children() == []
    stream.close()
    assert list(stream) == []
    with pytest.raises(ClosedError, match="this stream is closed"):
        stream.__enter__()


def open_children():
    found = []
    for task in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(FileNotFoundError, ProcessLookupError),
            open(f"/proc/self/task/{task}/children") as children,
        ):
            found += map(int, children.read().split())
    return [pid for pid in found if not is_tracker(pid)]


def is_tracker(pid):
    """Whether a child is the one that multiprocessing keeps for itself, in a run where another test used it."""
    try:
        with open(f"/proc/{pid}/cmdline") as cmdline:
            return "resource_tracker" in cmdline.read()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_letting_it_go_kills():
    stream = forever()
    next(stream)
    assert len(open_children()) == 1
    del stream
    gc.collect()
    assert open_children() == []


def test_leaving_a_loop_early_kills():
    for n, _ in forever():
        if n == 2:
            break
    gc.collect()
    assert open_children() == []


def test_an_exception_in_the_loop_kills():
    def fails():
        with forever() as stream:
            for n, _ in stream:
                raise KeyError(n)

    with pytest.raises(KeyError):
        fails()
    assert open_children() == []


def test_an_exception_midway_comes_after_the_values_before_it():
    @sandboxed
    def fails():
        yield 1
        yield 2
        raise LookupError("midway")

    stream = fails()
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(LookupError, match="midway") as caught:
        next(stream)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert open_children() == []
    assert list(stream) == []


def test_a_death_midway_comes_after_the_values_before_it():
    @sandboxed
    def dies():
        yield 1
        os._exit(9)

    stream = dies()
    assert next(stream) == 1
    with pytest.raises(CompartmentDied) as caught:
        next(stream)
    assert caught.value.exit_code == 9
    assert open_children() == []


def test_the_timeout_is_for_the_whole_stream():
    @sandboxed(timeout=0.2)
    def slow():
        yield 1
        time.sleep(60)
        yield 2

    stream = slow()
    assert next(stream) == 1
    with pytest.raises(CompartmentTimeout):
        next(stream)
    assert open_children() == []


def test_the_timeout_ends_a_stream_that_is_read_on_and_on():
    stream = forever.options(timeout=0.1)()
    assert next(stream)[0] == 0
    (child,) = open_children()
    with pytest.raises(CompartmentTimeout):
        list(stream)
    assert gone(child)


def test_a_value_that_cannot_leave_ends_it():
    @sandboxed
    def odd():
        yield 1
        yield [2, object()]
        yield 3

    stream = odd()
    assert next(stream) == 1
    with pytest.raises(EncodeError, match=r"result\[1\]: <class 'object'> cannot leave"):
        next(stream)
    assert list(stream) == []


def test_a_value_above_the_limit_ends_it():
    stream = sandboxed(lambda: (yield b"x" * 1_000_000), result_bytes="64K")()
    with pytest.raises(CompartmentDied) as caught:
        next(stream)
    assert caught.value.limit == "result_bytes"


def test_the_limit_is_for_each_value():
    @sandboxed(result_bytes="64K")
    def many():
        for _ in range(20):
            yield b"x" * 60_000

    assert sum(map(len, many())) == 20 * 60_000


def test_a_refused_call_ends_it_by_default(tmp_path):
    def looks():
        yield 1
        os.path.exists(tmp_path)
        yield 2
        yield 3

    # The generator may have run ahead to the refused call before its first value is taken.
    with pytest.raises(ViolationError):
        list(sandboxed(looks)())
    assert open_children() == []
    assert list(sandboxed(looks, on_violation="deny")()) == [1, 2, 3]


def test_a_stream_has_no_single_outcome(no_fork):
    for way in (count.run, count.submit, count.aio):
        with pytest.raises(PolicyError, match="count is a generator; iterate over the call"):
            way(3)


def test_mistakes_are_told_at_the_call(no_fork):
    with pytest.raises(TypeError, match=r"count\(\) missing a required argument: 'n'"):
        count()


def test_a_liar_that_answers_a_stream_with_a_value_is_told():
    def lies():
        from compart import _fast, message

        _fast.write_frame(480, message.VALUE, message.prefix([], 0), _fast.encode(1, message.EMPTY, 100))
        yield 2

    with pytest.raises((PolicyError, ProtocolError)):
        list(sandboxed(lies)())
    assert open_children() == []


def test_output_of_a_stream_does_not_hold_it_up():
    @sandboxed
    def chatters():
        for n in range(5):
            print("x" * 100_000)
            yield n

    assert list(chatters()) == [0, 1, 2, 3, 4]


def test_a_stream_may_be_read_by_another_thread_than_made_it():
    with count(100) as stream:
        assert next(stream) == 0
        rest = []
        thread = threading.Thread(target=lambda: rest.extend(stream))
        thread.start()
        thread.join()
    assert rest == list(range(1, 100))


def test_many_streams_at_once():
    streams = [count(50) for _ in range(10)]
    assert [sum(values) for values in zip(*streams, strict=True)] == [n * 10 for n in range(50)]


# --------------------------------------------------------------------------------------------------------- async generators


def test_an_async_generator_streams():
    async def main():
        stream = count_async(5)
        assert isinstance(stream, AsyncStream)
        return [n async for n in stream]

    assert asyncio.run(main()) == [0, 1, 2, 3, 4]


def test_async_streams_run_side_by_side():
    async def collect(n):
        return [k async for k in count_async(n)]

    async def main():
        return await asyncio.gather(*(collect(n) for n in range(8)))

    assert asyncio.run(main()) == [list(range(n)) for n in range(8)]


def test_an_async_exception_comes_after_the_values_before_it():
    @sandboxed
    async def fails():
        yield 1
        raise LookupError("midway")

    async def main():
        stream = fails()
        assert await anext(stream) == 1
        with pytest.raises(LookupError, match="midway"):
            await anext(stream)
        return [value async for value in stream]

    assert asyncio.run(main()) == []
    assert open_children() == []


@sandboxed
async def forever_async():
    while True:
        yield os.getpid()
        await asyncio.sleep(0)


def test_closing_an_async_stream_kills():
    async def main():
        stream = forever_async()
        assert await anext(stream) != os.getpid()
        assert len(open_children()) == 1
        await stream.aclose()
        assert open_children() == []
        assert [value async for value in stream] == []

    asyncio.run(main())


def test_an_async_stream_closes_by_aclosing():
    async def main():
        async with contextlib.aclosing(forever_async()) as stream:
            async for _ in stream:
                break
        return open_children()

    assert asyncio.run(main()) == []


def test_cancelling_the_reader_kills_before_it_propagates():
    @sandboxed
    async def silent():
        yield os.getpid()
        await asyncio.sleep(60)
        yield 2

    async def reads(stream, first):
        async for value in stream:
            first.set_result(value)

    async def main():
        first = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(reads(silent(), first))
        await first
        assert len(open_children()) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return open_children()

    assert asyncio.run(main()) == []


def test_an_async_timeout_of_the_policy_ends_it():
    @sandboxed(timeout=0.2)
    async def slow():
        yield 1
        await asyncio.sleep(60)

    async def main():
        stream = slow()
        assert await anext(stream) == 1
        with pytest.raises(CompartmentTimeout):
            await anext(stream)

    asyncio.run(main())
    assert open_children() == []


def test_a_stream_in_a_compartment_that_waits_leaves_the_event_loop_free():
    @sandboxed
    async def slow():
        await asyncio.sleep(0.2)
        yield 1

    async def main():
        ticks = 0

        async def ticker():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        task = asyncio.create_task(ticker())
        values = [value async for value in slow()]
        task.cancel()
        return values, ticks

    values, ticks = asyncio.run(main())
    assert values == [1]
    assert ticks >= 3


def test_the_names_are_public():
    assert compart.Stream is Stream
    assert compart.AsyncStream is AsyncStream
