"""The inside half of every attempt again, on machines that give compart less to build walls from.

Each machine is played by filters around a whole run of test_attempts.py (see tests/replay.py), by another user, or both.
What a machine lacks may cost a grant that cannot be bounded there (`needs=`), which then is UnsupportedError; nothing
else may change, and no attempt may get through.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import replay

ROOT = Path(__file__).parents[2]

NOBODY = 65534

MACHINES: dict[str, tuple[tuple[str, ...], int | None]] = {
    "docker": (("docker",), None),
    "no-landlock": (("no-landlock",), None),
    "no-namespaces": (("no-namespaces",), None),
    "no-listener": (("no-listener",), None),
    "nothing-but-seccomp": (("no-landlock", "no-namespaces", "no-listener"), None),
    "a-user-without-privileges": ((), NOBODY),
    "a-user-in-docker": (("docker",), NOBODY),
}

MOST_SKIPPED = 16
"""Attempts that the machine itself leaves no way to arrange, such as a key ring under Docker's filter."""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that any user can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="escape-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(not replay.ARCH, reason="there is no table of system calls for this machine")
@pytest.mark.parametrize("machine", MACHINES)
def test_no_attempt_gets_through_under(machine: str, place: Path) -> None:
    profiles, user = MACHINES[machine]
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    python = _interpreter(user)
    if python is None:
        pytest.skip("every interpreter of this version lies where another user cannot reach it")
    scratch = place / "run"
    scratch.mkdir()
    if user is not None:
        os.chown(scratch, user, user)
    under = [python, "-m", "tests.replay", ",".join(profiles), "--"] if profiles else []
    done = _run(
        [*under, python, "-m", "pytest", "tests/escape/test_attempts.py", "-q", "-p", "no:cacheprovider", "-rs",
         f"--basetemp={scratch / 'tmp'}", "-k", "test_attempt and not fails_the_call"],
        user,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    counted = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped|deselected)", done.stdout)}
    assert counted["passed"] > 600
    assert counted.get("skipped", 0) <= MOST_SKIPPED, done.stdout[-5000:]


def _interpreter(user: int | None) -> str | None:
    """An interpreter of this version that the user can start."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, shutil.which(version, path=os.defpath)):
        if python is not None and (user is None or _starts(python, user)):
            return python
    return None


def _starts(python: str, user: int) -> bool:
    try:
        return _run([python, "-c", "import compart, pytest"], user).returncode == 0
    except OSError:
        return False


def _run(command: list[str], user: int | None) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "PYTHONPATH": sysconfig.get_path("platlib"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COMPART_ESCAPE": "inside",
    }
    become = {} if user is None else {"user": user, "group": user, "extra_groups": []}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, **become)  # type: ignore[call-overload, no-any-return]
