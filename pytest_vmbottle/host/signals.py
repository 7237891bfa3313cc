"""Signals that end the work in order, as Ctrl-C does: an exception unwinds it, and nothing is left behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self

__all__ = ["Interruption", "interrupted", "left", "undisturbed"]


def interrupted(number: signal.Signals) -> BaseException:
    """Return the exception of Ctrl-C, naming the signal."""
    return KeyboardInterrupt(number.name)


def left(number: signal.Signals) -> BaseException:
    """Return the exception that ends the process with a shell's status for the signal."""
    # `sys.exit`'s exception, which no `except Exception` on the way out swallows.
    return SystemExit(128 + number)


class Interruption:
    """Signals that raise an exception in the main thread, from `install` to `restore` or for a block."""

    def __init__(
        self,
        error: Callable[[signal.Signals], BaseException] = interrupted,
        *,
        numbers: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGHUP),
        owned: bool = False,
    ) -> None:
        """Take the signals; no handler is changed yet.

        Args:
            error: Function that makes the exception.
            numbers: The signals.
            owned: Whether the process is ours alone: then we override others' handlers, and signals that our parent ignores (nohup).
        """
        self._error, self._numbers, self._owned = error, numbers, owned
        self._before: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over the signals; may be called again.

        It takes all if the process is ours alone, else those that would end it at once.
        """
        # Python runs handlers in the main thread, and only that thread may set them.
        if threading.current_thread() is not threading.main_thread() or self._before:
            return
        for number in self._numbers:
            # Under nohup SIGHUP is ignored, and in somebody else's process it stays so; another library's handler stays too.
            if self._owned or signal.getsignal(number) is signal.SIG_DFL:
                self._before[number] = signal.signal(number, self._raise)

    def restore(self) -> None:
        """Give back the signals that still have our handler; may be called again."""
        while self._before:
            number, handler = self._before.popitem()
            # A handler that somebody has set since then is his, and stays.
            if signal.getsignal(number) == self._raise:
                signal.signal(number, handler)

    def __enter__(self) -> Self:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _raise(self, number: int, _: object) -> NoReturn:
        raise self._error(signal.Signals(number))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Delay signals until the end of a short block that must not be left half done."""
    # Only the main thread is ever interrupted. Blocking signals in it would not do: the kernel gives them to any other thread, and Python
    # then runs their handlers in this one all the same.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: dict[int, None] = {}
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, lambda number, _: came.setdefault(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)
