"""Things worth attacking, and the eyes on them.

Each attack gets a scene of its own. The checks look at the host's side only, never at what a
compartment says about itself: is the marker there, did the listener hear anything, is the file the same?
A check returns what it saw in a few words, or nothing.
"""

import contextlib
import os
import secrets
import select
import shlex
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any

NOTE = b"name: a harmless note\n"


class Scene(contextlib.ExitStack):
    """Use it in a with statement; it clears up."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True)
        self.folder = folder
        self.input = folder / "input"
        self.input.write_bytes(NOTE)
        self.host = os.getpid()
        # The one folder that an attack may be granted.
        self.granted = folder / "granted"
        self.granted.mkdir()

        self.marker = folder / "marker"
        self.command = f"touch {shlex.quote(str(self.marker))}"

        self.password = secrets.token_hex(8)
        self.secret = folder / "secret"
        self.secret.write_text(self.password)
        # A descriptor the host has open for itself and never passes on.
        self.enter_context(self.secret.open("rb"))
        os.environ["DEMO_SECRET"] = self.password
        self.callback(os.environ.pop, "DEMO_SECRET")

        self.listener = self.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = self.listener.getsockname()[1]

        self.signals: list[int] = []
        self.callback(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, self._note_signal))

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def marker_appeared(self, value: Any) -> str:
        return "marker made" if self.marker.exists() else ""

    def secret_came_back(self, value: Any) -> str:
        return "secret read" if self.password in repr(value) else ""

    def name_came_back(self, value: Any) -> str:
        return "folder seen" if self.secret.name in repr(value) else ""

    def listener_heard(self, value: Any) -> str:
        heard, _, _ = select.select([self.listener], [], [], 0)
        return "connected" if heard else ""

    def host_was_signalled(self, value: Any) -> str:
        return "host signalled" if self.signals else ""

    def input_changed(self, value: Any) -> str:
        return "" if self.input.read_bytes() == NOTE else "file changed"

    def value_is_not_plain(self, value: Any) -> str:
        return "" if type(value) in (type(None), int, str) else "false type"

    def value_came_back(self, value: Any) -> str:
        return "" if value is None else "value accepted"
