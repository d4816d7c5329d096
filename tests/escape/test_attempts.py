"""Every attempt of the table: it gets through outside, and is refused inside for the stated reason."""

import errno
import os
from pathlib import Path

import pytest

import compart
from compart import CompartError, UnsupportedError, ViolationError
from tests.escape import (  # noqa: F401
    descriptors,
    directories,
    environment,
    files,
    ipc,
    kernel,
    memory,
    network,
    processes,
    procfs,
)
from tests.escape.framework import (
    ATTEMPTS,
    NOBODY_TOLD,
    Attempt,
    Unavailable,
    gets_through,
    is_refused,
    run_inside,
    run_outside,
    world_for,
)

WALLS = {wall.name: wall.up for wall in compart.enforcement(compart.Policy()).walls}
LISTENING = WALLS["listener"]

INSIDE_ONLY = os.environ.get("COMPART_ESCAPE") == "inside"
"""Where the machine itself stands in the way of the outside half: see test_under.py."""

UNAVAILABLE = {str(one) for one in ATTEMPTS.values() if isinstance(one.outside, Unavailable)}


@pytest.mark.parametrize("one", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_attempt(one: Attempt, tmp_path: Path) -> None:
    if not INSIDE_ONLY and (not one.privileged or os.geteuid() == 0):
        with world_for(one, tmp_path / "outside") as world:
            if isinstance(one.outside, Unavailable):
                assert one.outside.probe(), one.outside.reason
            else:
                assert gets_through(one, world, run_outside(one, world)) is None

    with world_for(one, tmp_path / "inside") as world:
        if not all(WALLS[wall] for wall in one.needs):
            with pytest.raises(UnsupportedError):
                run_inside(one, world)
            return
        said = is_refused(one, world, run_inside(one, world), listening=LISTENING)
    if said is not None and said.startswith(NOBODY_TOLD) and INSIDE_ONLY:
        # The machine's own filter may refuse the call before compart's is asked: then nobody can be told.
        with world_for(one, tmp_path / "machine") as world:
            assert run_outside(one, world).answer.errno == errno.EPERM, said
        return
    assert said is None


@pytest.mark.skipif(not LISTENING, reason="without a listener nobody is told of a refusal")
@pytest.mark.parametrize(
    ("one", "how"),
    # Every attempt once; the two ways in turn.
    [(one, ("raise", "kill")[n % 2]) for n, one in enumerate(one for one in ATTEMPTS.values() if one.call)],
    ids=str,
)
def test_attempt_fails_the_call(one: Attempt, how: str, tmp_path: Path) -> None:
    """The function swallows the refusal; the call fails all the same, or ends at the first."""
    if not all(WALLS[wall] for wall in one.needs):
        pytest.skip(f"needs {', '.join(one.needs)}")
    with world_for(one, tmp_path / "inside") as world:
        with pytest.raises(CompartError) as caught:
            run_inside(one, world, on_violation=how)
        assert isinstance(caught.value, ViolationError)
        calls = [violation.call for violation in caught.value.violations]
        assert calls
        if how == "kill":
            assert len(calls) == 1
        else:
            assert set(calls) & set(one.call)


def test_the_list_of_attempts_is_long_and_few_are_unavailable() -> None:
    assert len(ATTEMPTS) >= 130
    assert len({one.surface for one in ATTEMPTS.values()}) >= 9
    assert UNAVAILABLE <= {"processes-has_a_timer_signal_the_host", "kernel-int80_getpid", "kernel-int80_kill", "kernel-int80_mmap2"}
