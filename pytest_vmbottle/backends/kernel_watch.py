"""Kernel messages on a guest's console: trouble, a failed boot, or the end."""

from __future__ import annotations

import re
import threading
from itertools import islice
from pathlib import Path
from typing import Self

from pytest_vmbottle.backends.console import Cursor
from pytest_vmbottle.shown import printable

__all__ = ["KernelWatch", "troubles"]

_TROUBLES, _WORDS = 16, 1000
"""Most troubles reported at a time, and most characters of each."""
_LAST_WORDS = 300
"""Most characters of a guest's last message before it gave up."""
# The last words of a kernel, from kernel/reboot.c, whose messages all begin with `reboot: `.
_POWERED_OFF = (b"reboot: Power down", b"reboot: System halted", b"reboot: Restarting system")
# Each takes the rest of its line, so that one which begins like this again and again is read once.
_FATAL = re.compile(rb"You are in emergency mode[^\r\n]*|ALERT![^\r\n]*|^\(initramfs\)", re.MULTILINE)
_ALERT, _GIVES_UP = b"ALERT!", b"Dropping to a shell!"
# What the kernel prints begins with its clock, a user's own words on the console do not. Lockups and stalls are left out: a busy host, or
# a machine that was paused, is enough for the kernel to see one. Each match takes the rest of its line: what begins like one again and
# again would else be read as often as that.
_TROUBLE = re.compile(
    # The second bracket is the caller, a thread or a processor, of kernels with CONFIG_PRINTK_CALLER.
    rb"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ((?:Kernel panic - not syncing|BUG: |Oops: |general protection fault|kernel BUG at "
    rb"|Internal error: |Unable to handle kernel |double fault: |(?P<oops>Oops\b)|(?P<hung>INFO: task ))[^\r\n]*)"
)
_HUNG = "INFO: task "
_PANIC = re.compile(rb"\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? (Kernel panic - not syncing[^\r\n]*)")
# The kernel counts its oopses. Without a colon the word alone proves nothing; with this number behind it, it is the kernel's.
_OOPS = re.compile(rb" \[#\d")


class KernelWatch:
    """Watch for console lines that report trouble or the end; safe to use from several threads.

    Attributes:
        trouble: The line that reports a kernel panic, a kernel bug or a hung task.
        is_over: Whether that was the kernel's end.
        stuck: The reason that it cannot finish booting.
        powered_off: Whether its kernel has powered off or restarted in order.
    """

    def __init__(self, path: Path, *, hung_tasks: bool = True) -> None:
        """Begin at the current end: what is there is from an earlier instance of the same machine.

        Args:
            path: The file of the console's output.
            hung_tasks: Whether a hung task is trouble. Where the guest's time runs ahead while its disk is at work, it is not.
        """
        self._hung_tasks = hung_tasks
        self._cursor = Cursor(path)
        self._cursor.read()
        self._rest = b""
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.trouble: str | None = None
        self.is_over = False
        self.stuck: str | None = None
        self.powered_off = False

    def look(self) -> Self:
        """Read and judge the new output."""
        with self._lock:
            # Taken under the lock, because a second reader would take some of the lines.
            new = self._cursor.read()
            if new:
                text = self._rest + new
                self._judge(text)
                # The last line may not be complete: it is looked at again.
                # Bounded too, because a guest may never end a line.
                self._rest = text[text.rfind(b"\n") + 1 :][-4096:]
        return self

    def _judge(self, text: bytes) -> None:
        self.powered_off = self.powered_off or any(words in text for words in _POWERED_OFF)
        for line in troubles(text):
            if line.startswith(_HUNG) and not self._hung_tasks:
                continue
            # A line that arrived in two parts is judged twice: the second time it is whole.
            if self.trouble is None or line.startswith(self.trouble):  # the rest of the line may have come only now
                self.trouble = line
            self.is_over = self.is_over or line.startswith("Kernel panic")
        for stuck in _FATAL.finditer(text):
            said, gives_up, _ = stuck[0].partition(_GIVES_UP)
            # An alert is the end only if a shell follows.
            if gives_up or not said.startswith(_ALERT):
                why = printable((said[:_LAST_WORDS] + gives_up).decode("ascii", "replace")).strip()
                self.stuck = "its initial RAM disk failed and waits at a prompt" if why == "(initramfs)" else why
                return

    def forget(self) -> None:
        """Forget what was reported so far."""
        # What has been printed up to now is read first, or the next look would find it and take it for new.
        self.look()
        with self._lock:
            self._rest = b""
            self._clear()


def troubles(text: bytes) -> list[str]:
    """Return the lines in which a kernel reports trouble; of many the first."""
    found = islice(filter(_is_trouble, _TROUBLE.finditer(text)), _TROUBLES)
    # A panic counts even behind many other lines, since it is the end.
    lines = dict.fromkeys(match[1] for match in (*found, *islice(_PANIC.finditer(text), 1)))
    return [printable(line[:_WORDS].decode("utf-8", "replace")) for line in lines]


def _is_trouble(match: re.Match[bytes]) -> bool:
    """Tell whether a line that begins like a trouble continues like one."""
    if match["oops"]:
        return _OOPS.search(match[1]) is not None
    return not match["hung"] or b" blocked for more than " in match[1]
