"""The inside half of every attempt again, on machines that give compart less to build walls from.

Each machine is played by filters around a run of `python -m tests.escape` (see tests/replay.py), by another user, or both. What
a machine lacks may cost a grant that cannot be bounded there (`needs=`), which then is UnsupportedError; nothing else may
change, and no attempt may get through.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import replay

ROOT = Path(__file__).parents[2]

NOBODY = 65534

MACHINES: dict[str, tuple[tuple[str, ...], int | None, set[str]]] = {
    # name: (profiles, user, the walls that are missing)
    "docker": (("docker",), None, {"namespaces"}),
    "no-landlock": (("no-landlock",), None, {"landlock"}),
    "no-namespaces": (("no-namespaces",), None, {"namespaces"}),
    "nothing-but-seccomp": (
        ("no-landlock", "no-namespaces", "no-listener"),
        None,
        {"landlock", "namespaces", "listener"},
    ),
    "a-user-without-privileges": ((), NOBODY, set()),
}

MOST_SKIPPED = 16
"""Attempts that the machine itself leaves no way to arrange, such as a key ring under Docker's filter."""

Runs = dict[str, "Future[subprocess.CompletedProcess[str]] | str"]


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """The run on each machine, two at a time; or why there is none."""
    # A place that any user can reach, which pytest's own are not.
    place = Path(tempfile.mkdtemp(prefix="escape-"))
    place.chmod(0o711)
    with ThreadPoolExecutor(2) as pool:
        yield {machine: _begin(pool, machine, place) for machine in MACHINES}
    shutil.rmtree(place)


@pytest.mark.skipif(not replay.ARCH, reason="there is no table of system calls for this machine")
@pytest.mark.parametrize("machine", MACHINES)
def test_no_attempt_gets_through_under(machine: str, runs: Runs) -> None:
    run = runs[machine]
    if isinstance(run, str):
        pytest.skip(run)
    done = run.result()
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    refused, through, skipped, missing = re.findall(
        r"(\d+) refused, (\d+) not, (\d+) skipped; without (.*)", done.stdout
    )[0]
    assert int(refused) > 600
    assert int(through) == 0
    assert int(skipped) <= MOST_SKIPPED, done.stdout[-5000:]
    assert set(re.findall(r"\w+", missing)) >= MACHINES[machine][2], "the machine was not played"


def _begin(pool: ThreadPoolExecutor, machine: str, place: Path) -> "Future[subprocess.CompletedProcess[str]] | str":
    profiles, user, _ = MACHINES[machine]
    if user is not None and os.geteuid() != 0:
        return "only root can become another user"
    python = _interpreter(user)
    if python is None:
        return "every interpreter of this version lies where another user cannot reach it"
    scratch = place / machine
    scratch.mkdir()
    if user is not None:
        os.chown(scratch, user, user)
    under = [python, "-m", "tests.replay", ",".join(profiles), "--"] if profiles else []
    return pool.submit(_run, [*under, python, "-m", "tests.escape"], user, scratch)


def _interpreter(user: int | None) -> str | None:
    """An interpreter of this version that the user can start."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(version, path=os.defpath)):
        if python is not None and (user is None or _starts(python, user)):
            return python
    return None


def _starts(python: str, user: int) -> bool:
    try:
        return _run([python, "-c", "import compart"], user, Path("/tmp")).returncode == 0
    except OSError:
        return False


def _run(command: list[str], user: int | None, scratch: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": sysconfig.get_path("platlib"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(scratch),
    }
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
