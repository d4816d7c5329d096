"""What a call costs: a fresh compartment against other ways to run a function in another process.

    python -m pytest benchmarks/test_fresh.py -o addopts= --benchmark-only

Each is called from a small host and from hosts with a large heap, as a fork copies the page tables of all of it; large
results come back as bytes and as an array, and every page of them is read. For ratios take `python -m benchmarks.ratios`,
where the rivals take turns; here they come one after the other.
"""

import shutil
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import rivals

Start = Callable[..., Callable[[], None]]


@pytest.mark.parametrize("heap", rivals.HEAPS)
@pytest.mark.parametrize("rival", rivals.FRESH)
def test_fresh(benchmark: BenchmarkFixture, host: Start, rival: str, heap: str) -> None:
    if rival == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    benchmark.group = f"a fresh process, {heap} heap"
    benchmark.pedantic(host("fresh", rival, rivals.HEAPS[heap]), warmup_rounds=2, rounds=20)


@pytest.mark.parametrize("rival", rivals.POOLED)
def test_pooled(benchmark: BenchmarkFixture, host: Start, rival: str) -> None:
    benchmark.group = "a process that waits, and compart's fresh one"
    benchmark.pedantic(host("pooled", rival), warmup_rounds=2, rounds=20)


@pytest.mark.parametrize("size", rivals.SIZES)
@pytest.mark.parametrize("kind", rivals.KINDS)
@pytest.mark.parametrize("rival", rivals.RESULTS)
def test_result(benchmark: BenchmarkFixture, host: Start, rival: str, kind: str, size: str) -> None:
    benchmark.group = f"a result of {size}, {kind}"
    benchmark.extra_info["bytes"] = rivals.SIZES[size]
    benchmark.pedantic(host(f"result:{kind}:{size}", rival), warmup_rounds=2, rounds=10)
