"""All attempts, gathered from the files of this folder; importing it fills the table."""

from tests.escape import (
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
from tests.escape.framework import ATTEMPTS

SURFACES = (descriptors, directories, environment, files, ipc, kernel, memory, network, processes, procfs)

__all__ = ["ATTEMPTS", "SURFACES"]
