"""Every attempt of the table: it gets through outside, and is refused inside for the stated reason."""

import os
from pathlib import Path

import pytest

from tests.escape import descriptors, directories, environment, files, ipc, kernel, memory, network, processes, procfs  # noqa: F401
from tests.escape.framework import ATTEMPTS, Attempt, Unavailable, gets_through, run_outside, world_for


@pytest.mark.parametrize("one", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_outside(one: Attempt, tmp_path: Path) -> None:
    with world_for(one, tmp_path / "outside") as world:
        if isinstance(one.outside, Unavailable):
            assert one.outside.probe(), one.outside.reason
            return
        run = run_outside(one, world)
        assert gets_through(one, world, run) is None
