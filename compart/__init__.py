"""Run a dangerous Python function in a compartment: a child process in capability mode.

    from compart import sandboxed

    @sandboxed
    def size(image) -> tuple[int, int]:
        from PIL import Image
        return Image.open(image).size

    with open("cat.jpg", "rb") as f:
        print(size(f))

The function holds only what it was handed; only a plain value comes back.
"""

from compart import grant, rights
from compart._fast import Buffer
from compart.backend import Enforcement, Wall, select
from compart.capability import Directory
from compart.errors import (
    ClosedError,
    CompartError,
    CompartmentDied,
    CompartmentTimeout,
    EncodeError,
    MemoryLimitError,
    NotCapableError,
    PolicyError,
    ProtocolError,
    RemoteError,
    RemoteTraceback,
    UnsupportedError,
    Usage,
    ViolationError,
)
from compart.guest.inside import descriptor, granted
from compart.host.compartment import Outcome
from compart.host.decorator import AsyncStream, Sandboxed, Stream, sandboxed
from compart.policy import Grant, Policy
from compart.secret import Secret
from compart.violation import Frame, Violation

__version__ = "0.1.0"


def enforcement(policy: Policy | None = None) -> Enforcement:
    """Which walls a compartment of this policy gets on this machine. UnsupportedError when it gets none."""
    return select().enforcement(policy or Policy())


__all__ = [
    "AsyncStream",
    "Buffer",
    "ClosedError",
    "CompartError",
    "CompartmentDied",
    "CompartmentTimeout",
    "Directory",
    "EncodeError",
    "Enforcement",
    "Frame",
    "Grant",
    "MemoryLimitError",
    "NotCapableError",
    "Outcome",
    "Policy",
    "PolicyError",
    "ProtocolError",
    "RemoteError",
    "RemoteTraceback",
    "Sandboxed",
    "Secret",
    "Stream",
    "UnsupportedError",
    "Usage",
    "Violation",
    "ViolationError",
    "Wall",
    "descriptor",
    "enforcement",
    "grant",
    "granted",
    "rights",
    "sandboxed",
]
