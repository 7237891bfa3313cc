"""`vmbottle machine exec NAME COMMAND...`, if it is plain, with as little loaded as possible.

Scripts call it again and again, and to load `socket`, `json`, `pathlib` and `typing` takes as long as a command in a guest: so this module
does with what they are made of. What is not plain is left to the command line: options, and a machine that does not answer.
"""

from __future__ import annotations

import os
import sys
from _json import encode_basestring_ascii as quoted
from _socket import AF_UNIX, SCM_RIGHTS, SOL_SOCKET, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["execute", "exit_status", "is_terminal"]

_INTERRUPTED = 130
_ANSWERED = b'{"answer": '


def execute(words: Sequence[str]) -> int | None:
    """Run the command of a plain `machine exec`, and return its exit status; None for all other words, with which nothing was done."""
    name, argv = _plain(words)
    if not argv:
        return None
    folder = os.path.join(_catalog(), "machines", name)  # noqa: PTH118
    line = socket(AF_UNIX)
    try:
        if not _is_connected(line, folder):
            return None
        answer = _answer(line, argv)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    finally:
        line.close()
    status = answer.removeprefix(_ANSWERED).removesuffix(b"}\n")
    if answer.startswith(_ANSWERED) and status.removeprefix(b"-").isdigit():
        return exit_status(int(status))
    return _told(folder, answer)


def _plain(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the name and the command of a plain `machine exec`; of anything else, no command."""
    if list(words[:2]) != ["machine", "exec"] or not words[3:]:
        return "", ()
    name, argv = words[2], words[3:]
    # A machine's name is no path, and what begins with a dash is an option, up to a lone `--`.
    if name.startswith(("-", ".")) or "/" in name or (argv[0].startswith("-") and argv[0] != "--"):
        return "", ()
    return name, argv[1:] if argv[0] == "--" else argv


def _catalog() -> str:
    """Return the catalog that is meant; where it is elsewhere, there is no such machine here, and the command line looks for it."""
    caches = os.environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    return os.path.expanduser(os.environ.get("VMBOTTLE_CATALOG") or f"{caches}/pytest-vmbottle")  # noqa: PTH111


def _is_connected(line: socket, folder: str) -> bool:
    """Connect to the daemon of a machine's folder, if there is one (see `line.connect`)."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        line.connect(f"/proc/self/fd/{opened}/socket")
    except OSError:
        return False
    finally:
        os.close(opened)
    return True


def _answer(line: socket, argv: Sequence[str]) -> bytes:
    """Ask for a command, and return the daemon's line about its end; nothing if the daemon ended first (see `asking.request`)."""
    asked = ", ".join(map(quoted, argv))
    message = f'{{"verb": "exec", "argv": [{asked}], "user": null, "cwd": null, "env": {{}}, "timeout": null}}\n'.encode()
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A terminal is no input: two readers of one terminal would steal each other's keys.
        descriptors = (nothing if is_terminal(0) else 0, 1, 2)
        rights = b"".join(each.to_bytes(4, sys.byteorder) for each in descriptors)
        sent = line.sendmsg([message], [(SOL_SOCKET, SCM_RIGHTS, rights)])
        if sent < len(message):  # whoever has got it all may have answered and gone, and then even nothing is a broken pipe
            line.sendall(message[sent:])
        received = b""
        while not received.endswith(b"\n") and (data := line.recv(1 << 16)):
            received += data
    except (BrokenPipeError, ConnectionResetError):
        return b""
    else:
        return received
    finally:
        os.close(nothing)


def is_terminal(fd: int) -> bool:
    """Tell whether a descriptor is a terminal or closed; neither is passed on."""
    try:
        os.fstat(fd)
        return os.isatty(fd)
    except OSError:
        return True


def exit_status(status: int) -> int:
    """Return a status as shells do: 128 + N for a command ended by signal N."""
    return status if status >= 0 else 128 - status


def _told(folder: str, answer: bytes) -> int:
    """Write the error of a command that was begun, as the command line does, and return the exit status."""
    import json  # noqa: PLC0415 - all this is loaded only where something went wrong
    from pathlib import Path  # noqa: PLC0415

    from pytest_vmbottle.errors import VMBottleError  # noqa: PLC0415
    from pytest_vmbottle.shown import printable  # noqa: PLC0415
    from pytest_vmbottle.standalone.client import Kept  # noqa: PLC0415

    try:
        return exit_status(Kept(Path(folder)).answered(json.loads(answer) if answer else None))
    except (VMBottleError, OSError) as error:
        sys.stderr.write(f"Error: {printable(str(error))}\n")
        return 1
