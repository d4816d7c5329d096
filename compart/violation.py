"""One refused action: what, where, and the grant that would allow it.

Runs in the host; data only. Everything in a violation was read from a hostile process: it is for people to read, and
decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from compart.errors import printable


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a Python stack: file, line number, function."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return printable(f"{self.file}:{self.line} in {self.function}")


@dataclass(frozen=True, slots=True)
class Violation:
    """What capability mode refused.

    call: the system call's name. arguments: decoded, by name. errno: what the compartment was answered.
    thread: the thread id that made the call. stack: the Python stack at that moment, innermost first, where it could
    be had. suggestion: the line that would allow it, or "" when nothing should.
    """

    call: str
    arguments: dict[str, object] = field(hash=False)
    errno: int
    thread: int = 0
    stack: tuple[Frame, ...] = ()
    suggestion: str = ""
    number: int = -1

    @property
    def site(self) -> Frame | None:
        """The innermost frame that is not the standard library's import machinery or site-packages, or the innermost."""
        for frame in self.stack:
            if not (frame.file.startswith("<frozen") or "site-packages" in frame.file or "/lib/python3" in frame.file):
                return frame
        return self.stack[0] if self.stack else None

    @property
    def what(self) -> str:
        """The call with its arguments, in one line: `openat "/etc/passwd" O_RDONLY`."""
        shown = " ".join(_quoted(name, value) for name, value in self.arguments.items())
        return printable(f"{self.call} {shown}".rstrip())

    def __str__(self) -> str:
        text = f"{self.what} was refused"
        site = self.site
        if site is not None:
            text += f" at {site}"
        if self.suggestion:
            text += f"; to allow it: {self.suggestion}"
        return printable(text)


STRANGERS = ("path", "to", "address")
"""Arguments whose text the compartment chose freely: quoted, so that it cannot pass for the rest of the sentence."""


def _quoted(name: str, value: object) -> str:
    text = str(value)
    if name in STRANGERS:
        return '"' + text.replace('"', '\\"') + '"'
    return text
