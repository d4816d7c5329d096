"""What a value costs to encode and decode, against pickle 5, marshal, msgspec and msgpack.

    python -m pytest benchmarks/test_codec.py -o addopts= --benchmark-only

The three structures are what parsers hand back: records, a document tree, columns of numbers. The last lines are the
ratios of the medians (1.00x is compart itself; above 1, the other one takes longer). The others do less: pickle and
marshal trust their input, msgspec and msgpack keep fewer types.
"""

import marshal
import pickle
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from compart._fast import Registry, decode, encode

msgpack = pytest.importorskip("msgpack")
msgspec = pytest.importorskip("msgspec")

REGISTRY = Registry()
MiB = 1 << 20

CODECS: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "compart": (
        lambda value: encode(value, REGISTRY, 256 * MiB),
        lambda body: decode(body, REGISTRY, memory=1024 * MiB),
    ),
    "pickle5": (partial(pickle.dumps, protocol=5), pickle.loads),
    "marshal": (marshal.dumps, marshal.loads),
    "msgspec": (msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder().decode),
    "msgpack": (msgpack.packb, partial(msgpack.unpackb, strict_map_key=False)),
}


def records() -> list[dict[str, object]]:
    """A thousand rows, as csv.DictReader or a database cursor would give them."""
    pick = random.Random(1)
    return [
        {
            "id": 100_000 + i,
            "name": f"customer number {i}",
            "email": f"user{i}@example.org",
            "country": pick.choice(["DE", "FR", "Côte d’Ivoire", "JP"]),
            "balance": pick.uniform(-1e4, 1e6),
            "active": pick.random() < 0.8,
            "visits": pick.randrange(400),
            "referrer": None if pick.random() < 0.5 else f"campaign/{pick.randrange(50)}",
        }
        for i in range(1000)
    ]


def document() -> dict[str, object]:
    """A tree like the objects of a PDF: dictionaries and arrays in each other, names, strings, streams, numbers."""
    pick = random.Random(2)

    def page(number: int) -> dict[str, object]:
        return {
            "/Type": "/Page",
            "/MediaBox": [0, 0, 595.276, 841.89],
            "/Rotate": 0,
            "/Resources": {
                "/Font": {f"/F{i}": {"/Type": "/Font", "/BaseFont": "/Helvetica", "/Size": 9.5 + i} for i in range(4)},
                "/ProcSet": ["/PDF", "/Text", "/ImageC"],
                "/XObject": {f"/Im{number}": {"/Width": 640, "/Height": 480, "/Data": pick.randbytes(300)}},
            },
            "/Contents": [pick.randbytes(pick.randrange(20, 400)) for _ in range(3)],
            "/Annots": [
                {
                    "/Subtype": "/Link",
                    "/Rect": [pick.uniform(0, 800) for _ in range(4)],
                    "/Border": [0, 0, 1],
                    "/A": None,
                }
                for _ in range(6)
            ],
            "text": [f"Paragraph {i} of page {number}: “die Würde des Menschen”" for i in range(8)],
        }

    return {
        "version": "1.7",
        "encrypted": False,
        "info": {"/Title": "Grundgesetz", "/Author": "Parlamentarischer Rat", "/Pages": 120},
        "pages": [page(number) for number in range(120)],
        "outline": [
            {"title": f"Artikel {i}", "page": i, "children": [{"title": "Absatz 1", "page": i}]} for i in range(146)
        ],
    }


def columns() -> dict[str, list[int] | list[float]]:
    """Six columns of five thousand numbers."""
    pick = random.Random(3)
    return {
        "time": [1_700_000_000 + 60 * i for i in range(5000)],
        "nanoseconds": [1_700_000_000_000_000_000 + pick.randrange(10**12) for _ in range(5000)],
        "count": [pick.randrange(1000) for _ in range(5000)],
        "price": [pick.uniform(10, 500) for _ in range(5000)],
        "change": [pick.gauss(0, 1) for _ in range(5000)],
        "volume": [float(pick.randrange(10**6)) for _ in range(5000)],
    }


STRUCTURES: dict[str, Callable[[], Any]] = {"records": records, "document": document, "columns": columns}
MEDIANS: dict[tuple[str, str, str], float] = {}


@pytest.fixture(scope="module", autouse=True)
def ratios(pytestconfig: pytest.Config) -> Iterator[None]:
    """After the last measurement, print every codec as a multiple of compart."""
    yield
    if MEDIANS:
        with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n\nmedian in ms (and as a multiple of compart's)")
            for structure in STRUCTURES:
                for steps in (["encode"], ["decode"], ["encode", "decode"]):
                    print(f"{structure:9} {'+'.join(steps):14}", *(cell(structure, codec, steps) for codec in CODECS))


def cell(structure: str, codec: str, steps: list[str]) -> str:
    time = sum(MEDIANS[structure, codec, step] for step in steps)
    ours = sum(MEDIANS[structure, "compart", step] for step in steps)
    return f" {codec} {1e3 * time:.3f} ({time / ours:.2f}x)"


@pytest.mark.parametrize("step", ["encode", "decode"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_codec(benchmark: BenchmarkFixture, structure: str, codec: str, step: str) -> None:
    dumps, loads = CODECS[codec]
    value = STRUCTURES[structure]()
    body = dumps(value)
    assert loads(body) == value
    benchmark.group = f"{structure} {step}"
    benchmark.extra_info["bytes"] = len(body)
    if step == "encode":
        benchmark(dumps, value)
    else:
        benchmark(loads, body)
    if benchmark.stats is not None:
        MEDIANS[structure, codec, step] = benchmark.stats.stats.median
