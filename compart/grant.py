"""Make grants: the authority that a policy hands over.

Runs in the host. A grant is data; what it names is opened when a compartment is first made with it. Whether it
exists is checked here, so that a mistake is told where it was written.
"""

from __future__ import annotations

import os
import stat

from compart.errors import PolicyError
from compart.policy import DirectoryMode, FileMode, Grant, path_text
from compart.rights import Rights


def file(path: str | os.PathLike[str], mode: FileMode = "r") -> Grant:
    """One file by name: "r" read, "w" write, "rw" both, "a" append. Code inside opens it by the same path.

    PolicyError when it does not exist or is no regular file.
    """
    if mode not in ("r", "w", "rw", "a"):
        raise PolicyError(f"grant.file mode {mode!r} is unknown; choose 'r', 'w', 'rw' or 'a'")
    text = path_text(path, "grant.file")
    if not stat.S_ISREG(_mode(text, "grant.file")):
        raise PolicyError(f"grant.file: {text!r} is no regular file; use grant.directory for a directory")
    return Grant(kind="file", path=text, mode=mode)


def directory(path: str | os.PathLike[str], mode: DirectoryMode = "r") -> Grant:
    """A directory and all beneath it: "r" read, "rw" read and change. Code inside finds it at the same path.

    PolicyError when it does not exist or is no directory.
    """
    if mode not in ("r", "rw"):
        raise PolicyError(f"grant.directory mode {mode!r} is unknown; choose 'r' or 'rw'")
    text = path_text(path, "grant.directory")
    if not stat.S_ISDIR(_mode(text, "grant.directory")):
        raise PolicyError(f"grant.directory: {text!r} is no directory; use grant.file for a file")
    if text == "/":
        raise PolicyError("grant.directory: '/' would grant everything; name the directories that are needed")
    return Grant(kind="directory", path=text, mode=mode)


def descriptor(obj: object, rights: Rights) -> Grant:
    """An open descriptor (a number, or an object with fileno()) with exactly `rights`.

    Inside it has the number that `compart.descriptor(obj)` tells, or arrives as the argument it is passed as.
    """
    if not isinstance(rights, Rights):
        raise PolicyError(f"grant.descriptor needs rights such as CAP_READ | CAP_SEEK, not {rights!r}")
    fileno = obj if isinstance(obj, int) else getattr(obj, "fileno", None)
    if fileno is None or isinstance(obj, bool) or (isinstance(obj, int) and obj < 0):
        raise PolicyError(f"grant.descriptor: {obj!r} is no descriptor and has no fileno()")
    return Grant(kind="descriptor", rights=rights, object=obj)


def _mode(path: str, what: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        raise PolicyError(f"{what}: {path!r}: {error.strerror}; name something that exists") from None
