"""Measure compart against what it is compared with, and print one table of ratios.

    python -m benchmarks.ratios [--quick] [--json FILE]
    python -m benchmarks.ratios --where

compart and a rival take turns in one host process (A B, B A, ...; see rivals.py), so a ratio of two calls of the same round
is worth something on a busy machine too, where the times themselves are not. Shown are medians with quartiles, of the times and of
the ratios. `--where` tells instead what one fresh call spends its time on.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from benchmarks import rivals, where


@dataclass(frozen=True)
class Row:
    """One line of the table: `ours` and `peer` in microseconds, `ratio` ours to peer or peer to ours; each three quartiles."""

    what: str
    against: str
    ours: tuple[float, float, float]
    peer: tuple[float, float, float]
    ratio: tuple[float, float, float]
    faster: bool
    target: float | None

    @property
    def held(self) -> str:
        if self.target is None:
            return ""
        return "yes" if (self.ratio[1] >= self.target if self.faster else self.ratio[1] <= self.target) else "no"


def measure(quick: bool) -> Iterator[Row]:
    """Every row, as soon as it is measured."""
    few = 5 if quick else 1
    for heap, size in rivals.HEAPS.items():
        for rival in peers("fresh"):
            target = 1.3 if rival == "os.fork" and not size else None
            rounds = {0: 150, 100: 50}.get(size, 15) // few
            yield row(f"a fresh process, {heap} heap", rival, run("fresh", rival, rounds, size), target=target)
    for rival in peers("pooled"):
        yield row("compart fresh, the other waiting", rival, run("pooled", rival, 50 // few))
    for kind in rivals.KINDS:
        for size in rivals.SIZES:
            group = f"result:{kind}:{size}"
            for rival in peers(group):
                wanted = (kind, size, rival) == ("array", "64 MB", "ProcessPoolExecutor")
                samples = run(group, rival, 25 // few)
                yield row(f"a result of {size}, {kind}", rival, samples, faster=True, target=8.0 if wanted else None)
    for structure in rivals.STRUCTURES:
        for rival in peers(f"codec:{structure}"):
            samples = run(f"codec:{structure}", rival, 300 // few)
            yield row(f"encode and decode {structure}", rival, samples, target=1.0)


def peers(group: str) -> list[str]:
    """The rivals of a group that are to be had here."""
    absent = set() if shutil.which("bwrap") else {"bubblewrap"}
    return [name for name in rivals.names(group) if name != "compart" and name not in absent]


def run(group: str, rival: str, rounds: int, heap: int = 0) -> dict[str, list[int]]:
    """The samples of compart and one rival, from a host process of their own."""
    options = ["--heap", str(heap), "--rounds", str(max(rounds, 3)), "--only", "compart", "--only", rival]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rivals", group, *options], stdout=subprocess.PIPE, check=True
    )
    samples: dict[str, list[int]] = json.loads(done.stdout)
    return samples


def row(
    what: str, rival: str, samples: dict[str, list[int]], *, faster: bool = False, target: float | None = None
) -> Row:
    """Compare compart with one rival, round by round. With `faster` the ratio says how many times faster compart is."""
    ours, peer = samples["compart"], samples[rival]
    pairs = zip(peer, ours, strict=True) if faster else zip(ours, peer, strict=True)
    ratios = quartiles([above / below for above, below in pairs])
    micros = [[value / 1e3 for value in values] for values in (ours, peer)]
    return Row(what, rival, quartiles(micros[0]), quartiles(micros[1]), ratios, faster, target)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    first, median, third = statistics.quantiles(values, n=4)
    return first, median, third


# ---- words -----------------------------------------------------------------------------------------------------------

HEAD = """\
| what | against | compart | the other | ratio | target | held |
| --- | --- | --- | --- | --- | --- | --- |"""


def line(row: Row) -> str:
    sign = "≥" if row.faster else "≤"
    first, median, third = row.ratio
    ratio = f"{median:.2f} ({first:.2f} to {third:.2f})" + (" times faster" if row.faster else "")
    target = "" if row.target is None else f"{sign} {row.target:g}"
    return f"| {row.what} | {row.against} | {span(row.ours)} | {span(row.peer)} | {ratio} | {target} | {row.held} |"


def span(micros: tuple[float, float, float]) -> str:
    if micros[1] >= 10_000:
        return f"{micros[1] / 1e3:.0f} ms ({micros[0] / 1e3:.0f} to {micros[2] / 1e3:.0f})"
    return f"{micros[1]:.0f} µs ({micros[0]:.0f} to {micros[2]:.0f})"


def machine() -> str:
    """What the numbers were measured on; no names."""
    virtual = ""
    with open("/proc/cpuinfo") as cpus:
        virtual = ", virtual" if " hypervisor" in cpus.read() else ""
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as pages:
        huge = pages.read().split("[")[1].split("]")[0]
    return (
        f"{os.cpu_count()} cores{virtual}, Linux {platform.release().split('-')[0]} {platform.machine()}, huge pages: {huge}, "
        f"Python {platform.python_version()}, load at the start {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: half a minute instead of several")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--where", action="store_true", help="tell where the time of one fresh call goes, instead")
    chosen = parser.parse_args()
    print(f"{machine()}\n")
    if chosen.where:
        where.report(20 if chosen.quick else 100)
        return
    print(HEAD, flush=True)
    rows = []
    for each in measure(chosen.quick):
        rows.append(each)
        print(line(each), flush=True)
    if chosen.json:
        with open(chosen.json, "w") as file:
            json.dump({"machine": machine(), "rows": [asdict(each) for each in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
