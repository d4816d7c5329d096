"""Every attempt of the table: it gets through outside, and is refused inside for the stated reason."""

from pathlib import Path

import pytest

from compart import ViolationError
from tests.escape.framework import (
    Attempt,
    Unavailable,
    judge_inside,
    judge_outside,
    privileged,
    run_inside,
    walls_here,
    world_for,
)
from tests.escape.table import ATTEMPTS

WALLS, PRIVILEGED = walls_here(), privileged()

UNAVAILABLE = {
    "processes-has_a_timer_signal_the_host",  # the kernel itself lets a timer signal threads of its own process alone
    "kernel-int80_getpid",  # the three: only where the kernel has no i386 entry
    "kernel-int80_kill",
    "kernel-int80_mmap2",
}
"""The attempts that the kernel itself may refuse outside; each has a probe that shows it."""


@pytest.mark.parametrize("one", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_attempt(one: Attempt, tmp_path: Path) -> None:
    if not one.privileged or PRIVILEGED:
        assert judge_outside(one, tmp_path / "outside") is None
    assert judge_inside(one, tmp_path / "inside", WALLS) is None


@pytest.mark.skipif(not WALLS["listener"], reason="without a listener nobody is told of a refusal")
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
        with pytest.raises(ViolationError) as caught:
            run_inside(one, world, on_violation=how)
        calls = [violation.call for violation in caught.value.violations]
        if how == "kill":
            assert len(calls) == 1
        else:
            assert set(calls) & set(one.call)


def test_the_list_of_attempts_is_long_and_few_are_unavailable() -> None:
    assert len(ATTEMPTS) > 600
    assert len({one.surface for one in ATTEMPTS.values()}) == 10
    assert {str(one) for one in ATTEMPTS.values() if isinstance(one.outside, Unavailable)} <= UNAVAILABLE
