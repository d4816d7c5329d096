"""Real files and hostile ones, each read in a compartment: what came back, what was stopped.

    python examples/demo.py

Honest files must read the same inside as outside. Hostile ones, where that is safe, are first let loose in
a throw-away process without walls, to show that they bite; then they run in a compartment, and the host
looks for what they should have left behind. Exit status 1 if anything got out, or any file read differently.
"""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy

# For a checkout that was built in place; an installed compart is found first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import inputs
import parsers
from attacks import ATTACKS, Attack
from report import WIDTHS, row
from scene import Scene

from compart import ViolationError

HONEST = {
    "photo.jpg": parsers.read_image,
    "drawing.png": parsers.read_image,
    "sticker.webp": parsers.read_image,
    "report.pdf": parsers.read_pdf,
    "page.html": parsers.read_html,
    "orders.xml": parsers.read_xml,
    "settings.yaml": parsers.read_yaml,
    "files.zip": parsers.read_zip,
    "files.tar": parsers.read_tar,
    "files.tar.gz": parsers.read_tar,
    "order.pickle": parsers.read_pickle,
    "weights.npy": parsers.read_npy,
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    # Shows that the checks can fail: the attacks that are safe to let loose, and no compartment.
    arguments.add_argument("--unconfined", action="store_true", help=argparse.SUPPRESS)
    unconfined = arguments.parse_args().unconfined
    # A compartment that could block the host would block this program: then SIGALRM ends it.
    signal.alarm(300)

    with tempfile.TemporaryDirectory(prefix="compart-demo-") as name:
        folder = Path(name)
        print_header()
        if unconfined:
            verdicts = [let_loose(attack, folder) for attack in ATTACKS if attack.outside]
        else:
            make_honest(folder / "honest")
            verdicts = [read_honest(folder / "honest" / name, parser) for name, parser in HONEST.items()]
            verdicts += [withstand(attack, folder) for attack in ATTACKS]
    print_summary(verdicts)
    return 0 if set(verdicts) <= {"same", "held"} else 1


# Honest files


def make_honest(folder: Path) -> None:
    # In another process: here, what a library imports to write a file would be there already to read it.
    subprocess.run([sys.executable, inputs.__file__, folder], check=True)


def read_honest(path: Path, parser: Callable[..., Any]) -> str:
    """Read the file inside and outside, and print a row. Returns the verdict."""
    # Inside first, for the same reason: reading outside would import what inside needs.
    with open(path, "rb") as file:
        value, error, took = run_inside(parser, file)
    with open(path, "rb") as file:
        expected = parser.__wrapped__(file)
    verdict = "same" if error is None and same(value, expected) else "WRONG"
    print_row(path.name, "be read", "read", happened(value, error), took, verdict)
    return verdict


def same(one: Any, other: Any) -> bool:
    """Equal, of the same type; arrays with the same elements."""
    if isinstance(one, numpy.ndarray) and isinstance(other, numpy.ndarray):
        return one.dtype == other.dtype and numpy.array_equal(one, other)
    return type(one) is type(other) and one == other


# Hostile files


def withstand(attack: Attack, folder: Path) -> str:
    """Let the attack loose where that is safe, then run it in a compartment, and print a row. Returns the verdict."""
    outside = let_run_outside(attack, folder / "outside" / attack.name) if attack.outside else "-"

    with Scene(folder / "inside" / attack.name) as scene:
        function, path, arguments = attack.prepare(scene)
        with open(path, "rb") as file:
            value, error, took = run_inside(function, file, *arguments)
        got_out = attack.check(scene, value)

    if got_out:
        verdict = "GOT OUT"
    elif not outside:
        verdict = "DUD"  # it does nothing without walls either: it proves nothing
    elif not ended_as_told(attack, error):
        verdict = "WRONG"
    else:
        verdict = "held"
    what = got_out or happened(value, error).replace(str(scene.folder), ".")
    print_row(attack.name, attack.tries, outside, what, took, verdict)
    return verdict


def let_loose(attack: Attack, folder: Path) -> str:
    """The same row without a compartment."""
    outside = let_run_outside(attack, folder / attack.name)
    verdict = "GOT OUT" if outside else "DUD"
    print_row(attack.name, attack.tries, outside, "(no compartment)", 0.0, verdict)
    return verdict


def ended_as_told(attack: Attack, error: BaseException | None) -> bool:
    if attack.ends is None:
        return error is None
    return isinstance(error, attack.ends) and getattr(error, "limit", None) == attack.limit


# Both ways to run a parser


def run_inside(function: Callable[..., Any], *arguments: Any) -> tuple[Any, BaseException | None, float]:
    """Call it in a compartment. Returns the value, the exception and the milliseconds it took."""
    started = time.perf_counter()
    value, error = None, None
    try:
        value = function(*arguments)
    except BaseException as raised:  # SystemExit too: it would be a way out
        error = raised
    return value, error, (time.perf_counter() - started) * 1000


def let_run_outside(attack: Attack, folder: Path) -> str:
    """What the attack does without walls, as seen by its check."""
    with Scene(folder) as scene:
        function, path, arguments = attack.prepare(scene)
        with open(path, "rb") as file:
            value = run_outside(function, file, *arguments)
        return attack.check(scene, value)


def run_outside(function: Callable[..., Any], file: BinaryIO, *arguments: Any) -> Any:
    """Call it in a throw-away process without walls; the answer comes back pickled, as process pools do it."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def call() -> None:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        try:
            answer = function.__wrapped__(file, *arguments)
        except Exception as error:
            answer = error
        sender.send(answer)

    process = fork.Process(target=call)
    process.start()
    sender.close()
    with receiver:
        try:
            return receiver.recv()
        except Exception:  # it died, or its answer does not unpickle: there is no value
            return None
        finally:
            process.join()


# The table


def print_header() -> None:
    print(row("INPUT", "IT TRIES TO", "WITHOUT WALLS", "IN A COMPARTMENT", "MS", "VERDICT"))
    print(row(*("-" * width for width in WIDTHS)))


def print_row(name: str, tries: str, outside: str, inside: str, took: float, verdict: str) -> None:
    print(row(name, tries, outside, inside, f"{took:.0f}" if took else "-", verdict), flush=True)


def happened(value: Any, error: BaseException | None) -> str:
    """What the caller got, in a few words."""
    if isinstance(error, ViolationError):
        return f"refused: {error.violations[0].what}"
    limit = getattr(error, "limit", None)
    if limit:
        return f"{type(error).__name__}: {limit}={error.value}"
    if error is not None:
        return f"{type(error).__name__}: {error}"
    if isinstance(value, numpy.ndarray):
        return f"array {value.shape} {value.dtype}, sum {value.sum():g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def print_summary(verdicts: list[str]) -> None:
    counts = {verdict: verdicts.count(verdict) for verdict in ("same", "held", "WRONG", "DUD", "GOT OUT")}
    print()
    print(
        f"{counts['same']} files read the same in a compartment, {counts['held']} attacks held, "
        f"{counts['GOT OUT']} got out, {counts['WRONG']} ended otherwise than told, {counts['DUD']} proved nothing."
    )


if __name__ == "__main__":
    sys.exit(main())
