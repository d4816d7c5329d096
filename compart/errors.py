"""What can go wrong, sorted by whose fault it is.

Runs everywhere; data only. The root is CompartError. A function's own builtin exception is not here: it comes
back as itself.
"""

from __future__ import annotations

import signal as _signal
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compart.violation import Violation


class CompartError(Exception):
    """The root of compart's errors."""


class PolicyError(CompartError, ValueError):
    """The programmer asked for something that makes no sense; raised before anything is forked."""


class EncodeError(CompartError, TypeError):
    """A value cannot leave, or enter, a compartment; the message names the path inside the value."""


class ClosedError(CompartError, ValueError):
    """A capability, stream or descriptor was already closed; raised before anything is forked."""


class UnsupportedError(CompartError):
    """This machine cannot put up a wall that the policy needs.

    `mechanism` is the wall's name as `Policy(waive={...})` takes it, `reason` what the machine answered,
    `advice` what to do.
    """

    def __init__(self, mechanism: str, reason: str, advice: str = "") -> None:
        self.mechanism = mechanism
        self.reason = reason
        self.advice = advice
        text = f"{mechanism}: {reason}"
        super().__init__(f"{text}; {advice}" if advice else text)


class NotCapableError(CompartError, PermissionError):
    """A right or limit would widen, or the capability lacks the right."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compartment used: wall, user and system time in seconds, peak resident memory in bytes."""

    wall: float = 0.0
    user: float = 0.0
    system: float = 0.0
    max_rss: int = 0

    @property
    def cpu(self) -> float:
        """User and system time together, in seconds."""
        return self.user + self.system

    def __str__(self) -> str:
        return f"used {self.cpu:.2f} s CPU, {self.wall:.2f} s wall, {self.max_rss / 2**20:.0f} MiB peak"


class ViolationError(CompartError):
    """The function did something that capability mode refuses. `violations` holds each refused action."""

    def __init__(self, violations: Sequence[Violation], *, more: int = 0, died: str = "") -> None:
        self.violations = tuple(violations)
        first = str(self.violations[0])
        others = len(self.violations) - 1 + more
        text = first if not others else f"{first} (and {others} more refused; see .violations)"
        super().__init__(f"{text} [{died}]" if died else text)


class RemoteError(CompartError):
    """The function raised an exception that is not a builtin one.

    `type_name` is its qualified name as the compartment told it, `text` its message; both are a stranger's words.
    """

    def __init__(self, type_name: str, text: str) -> None:
        self.type_name = type_name
        self.text = text
        super().__init__(printable(f"{type_name}: {text}" if text else type_name, keep="\n\t"))


class RemoteTraceback(Exception):
    """The compartment's side of a traceback, as text; the `__cause__` of what a call raised."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return "\n" + self.text


class CompartmentDied(CompartError):
    """The compartment ended without an answer.

    `signal` and `exit_code` say how (one of them is None), `limit` names the limit that ended it or is None,
    `value` is that limit's value, `usage` what was used, `stderr` the last words it wrote.
    """

    def __init__(
        self,
        message: str,
        *,
        signal: int | None = None,
        exit_code: int | None = None,
        limit: str | None = None,
        value: object = None,
        usage: Usage | None = None,
        stderr: str = "",
    ) -> None:
        self.signal = signal
        self.exit_code = exit_code
        self.limit = limit
        self.value = value
        self.usage = usage if usage is not None else Usage()
        self.stderr = stderr
        super().__init__(message)


class MemoryLimitError(CompartmentDied, MemoryError):
    """The compartment reached its memory limit; `limit` is "memory"."""


class CompartmentTimeout(CompartmentDied, TimeoutError):
    """The compartment was killed when its wall-clock time was over; `limit` is "timeout"."""


class ProtocolError(CompartError):
    """The compartment lied: what it sent does not follow the protocol."""


def signal_name(number: int) -> str:
    """SIGSEGV for 11; "signal 63" for one without a name."""
    try:
        return _signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def printable(text: str, keep: str = "") -> str:
    """The text with every newline, escape sequence and invisible character as its escape, for a log or a terminal.

    Letters in `keep` stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
