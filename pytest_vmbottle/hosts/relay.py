"""A worker's program on the controller's side: it becomes the ssh client whose streams are those of an interpreter on another host.

execnet runs it as if it were the interpreter, with the arguments of one. The first argument is ours: the client's command line and the
words of the command there, as JSON in hexadecimal digits, because execnet's specifications give a meaning to slashes and to stars.

It is run without site packages, to start quickly, so only the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence

__all__ = ["relay"]


def relay(client: Sequence[str], command: Sequence[str]) -> str:
    """Return the program, as a shell's words, that execnet runs as an interpreter which a command starts on another host.

    Args:
        client: The command line of ssh.
        command: The words of the command there, to which the interpreter's arguments are added.
    """
    order = json.dumps([list(client), list(command)]).encode().hex()
    return shlex.join([sys.executable, "-I", "-S", __file__, order])


def _become_client(arguments: list[str]) -> None:
    client, command = json.loads(bytes.fromhex(arguments[0]))
    # The controller decides what an interruption ends. The terminal would send it to ssh as well, and then no worker could end in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: TID251 - this program has nothing but the standard library
    os.setsid()
    # ssh gives all words to a shell there, whatever it is told.
    os.execvp(client[0], [*client, shlex.join([*command, *arguments[1:]])])  # noqa: S606 - argv list, no shell


if __name__ == "__main__":
    _become_client(sys.argv[1:])
