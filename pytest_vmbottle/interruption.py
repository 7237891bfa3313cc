"""Signals that are to end a run in order, as Ctrl-C does: its fixtures are torn down, and nothing is left of it."""

from __future__ import annotations

import signal
import threading
from typing import NoReturn

__all__ = ["Interruption"]

_NUMBERS = (signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Turns SIGTERM and SIGHUP into `KeyboardInterrupt` between `install` and `restore`."""

    def __init__(self) -> None:
        """Changes nothing yet."""
        self._installed: list[signal.Signals] = []

    def install(self) -> None:
        """Takes over the signals that would end this process at once; those that somebody handles, or ignores (nohup), stay so."""
        if threading.current_thread() is not threading.main_thread() or self._installed:
            return
        for number in _NUMBERS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _interrupt)
                self._installed.append(number)

    def restore(self) -> None:
        """Gives back what was taken over, unless somebody else has it by now; may be called again."""
        while self._installed:
            number = self._installed.pop()
            if signal.getsignal(number) is _interrupt:
                signal.signal(number, signal.SIG_DFL)


def _interrupt(number: int, _: object) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(number).name)
