"""The exception tree: every error this package raises on purpose.

    VMBottleError
    ├── SpecError (ValueError)          an invalid mark, layer or option
    ├── BackendUnavailable              this host cannot do what was asked
    ├── MachineError                    a machine could not be provided, or was lost
    │   ├── LaunchError                 the hypervisor did not start
    │   ├── SmolvmError                 the program smolvm did not do what it was asked
    │   ├── Unsupported                 its backend cannot do what was asked of it
    │   ├── MachineTimeout (TimeoutError)
    │   └── MachineDied
    │       └── GuestPanic              its kernel panicked, met a bug of its own, or a task hangs in it
    ├── CommandFailed                   a command in the guest ended with another status than 0
    ├── CommandSucceeded                a command in the guest that had to fail ended with status 0
    ├── CommandTimeout (TimeoutError)   a command in the guest was killed at its deadline
    ├── TransferError                   a copy between host and guest was not completed
    └── CatalogError                    the shared directory cannot be used
        ├── ImageMissing                there is no image of a name
        └── PackCorrupt                 a pack's files differ from its manifest

Errors carry their data as attributes and survive pickling, because pytest-xdist sends them between processes. A guest may have had a part
in any of their messages, so each is made safe to show as it is made.
What Python has a word for keeps it: `FileNotFoundError` from a guest path, `ValueError` for a NUL byte.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from pytest_vmbottle.shown import printable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import PurePath


__all__ = [
    "BackendUnavailable",
    "CatalogError",
    "GuestPanic",
    "ImageMissing",
    "LaunchError",
    "MachineDied",
    "MachineError",
    "MachineTimeout",
    "PackCorrupt",
    "SmolvmError",
    "SpecError",
    "TransferError",
    "Unsupported",
    "VMBottleError",
]


def _revive(kind: type[VMBottleError], args: tuple[Any, ...], state: dict[str, Any]) -> VMBottleError:
    # Without `__init__`, whose parameters differ from class to class: the attributes are in the state already.
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class VMBottleError(Exception):
    """Base class of all errors of this package.

    Attributes:
        infra: Whether it kept a test from getting its machine, so that nothing was judged: the outcome INFRA.
        origin: The key of the pack that could not be made, if that was the cause: errors of the same origin have the same cause.
        lasting: Whether a retry is pointless, because a fresh machine would meet the error again, as with a layer that fails.
    """

    infra: bool = False
    origin: str = ""
    lasting: bool = True

    def __init__(self, *args: object) -> None:
        # Made safe once and here, because any text may be a guest's.
        super().__init__(*(printable(arg) if isinstance(arg, str) else arg for arg in args))

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException pickles by calling the class with `args`, which fails for keyword-only parameters.
        return _revive, (type(self), self.args, self.__dict__)


class SpecError(VMBottleError, ValueError):
    """The description of a machine is invalid.

    The message names the keyword and what it takes.
    """


class BackendUnavailable(VMBottleError):
    """This host cannot provide what was asked for.

    Attributes:
        reason: The missing thing, in one sentence.
        remedy: The remedy, if possible the exact command.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}. {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class MachineError(VMBottleError):
    """A machine could not be started, or was lost.

    Attributes:
        machine: The machine's name.
        console_tail: The last lines of its serial console, control characters neutralised.
        argv: The hypervisor's command line, if there was one.
        exitcode: The hypervisor's exit status, negative for a signal; None while it runs, or if there was none.
    """

    # Most losses of a machine are accidents of its host: memory, time, a process that was killed.
    lasting = False

    def __init__(
        self, message: str, *, machine: str = "", console_tail: str = "", argv: Sequence[str] = (), exitcode: int | None = None
    ) -> None:
        super().__init__(message)
        self.machine = machine
        self.console_tail = console_tail
        self.argv = tuple(argv)
        self.exitcode = exitcode

    def __str__(self) -> str:
        parts = [super().__str__()]
        if self.console_tail.strip():
            parts.append(f" --- the console's last lines ---\n{printable(self.console_tail).rstrip()}")
        return "\n".join(parts)


class LaunchError(MachineError):
    """The hypervisor's process ended, or never answered, before a guest could run.

    Attributes:
        output: The process's output.
    """

    def __init__(  # noqa: PLR0913 - an error carries its evidence
        self,
        message: str,
        *,
        argv: Sequence[str] = (),
        exitcode: int | None = None,
        output: str = "",
        machine: str = "",
        console_tail: str = "",
    ) -> None:
        told = f"{message}\n --- what it printed ---\n{output.rstrip()}" if output.strip() else message
        super().__init__(told, machine=machine, console_tail=console_tail, argv=argv, exitcode=exitcode)
        self.output = output

    def __str__(self) -> str:
        if not self.argv:
            return super().__str__()
        return f"{super().__str__()}\n --- the hypervisor's command line ---\n{printable(shlex.join(self.argv))}"


class SmolvmError(MachineError):
    """The program smolvm failed.

    It is smolvm's own failure, never the status of a command in a guest.

    Attributes:
        returncode: The program's exit status, negative for a signal; None if it took too long and was killed.
        stderr: Its standard error, without its notes.
        code: The program's code of the failure, such as `"NOT_FOUND"`; empty if it gave none.
    """

    def __init__(self, message: str, *, argv: Sequence[str], returncode: int | None, stderr: str, code: str = "") -> None:
        super().__init__(message, exitcode=returncode)
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr = stderr
        self.code = code

    def __str__(self) -> str:
        status = "killed at its time-out" if self.returncode is None else f"status {self.returncode}"
        # Without the console's last lines: the program's own error is what explains this.
        return f"{VMBottleError.__str__(self)}\n --- the command ({status}) ---\n{printable(shlex.join(self.argv))}"


class Unsupported(MachineError):
    """The backend of a machine does not offer what was asked of it; the machine goes on."""

    # Not of a fresh machine either.
    lasting = True


class MachineTimeout(MachineError, TimeoutError):
    """A machine did not reach the awaited state before its deadline."""


class MachineDied(MachineError):
    """A running machine is gone: its kernel panicked, it powered off, or its hypervisor ended."""


class GuestPanic(MachineDied):
    """A guest's kernel reported a panic, a bug of its own (an oops) or a hung task on the console.

    The mark `vm(..., panic="expected")` says that a test expects this.
    """

    lasting = True


class TransferError(VMBottleError, OSError):
    """A copy between host and guest was not completed.

    Nothing exists under the final name.

    Attributes:
        src: The source of the copy.
        dst: The destination of the copy.
        errno: The error number of the system call that failed, in the guest or on the host, such as `errno.ENOSPC`; None if there was none.
    """

    def __init__(self, message: str, *, src: PurePath | str, dst: PurePath | str, number: int | None = None) -> None:
        super().__init__(f"cannot copy {src} to {dst}: {message}")
        # OSError sets it only if it gets two arguments, and then writes the message by itself.
        self.errno = number
        self.src = str(src)
        self.dst = str(dst)


class CatalogError(VMBottleError):
    """The catalog's folder cannot be used, or something in it was not found."""


class ImageMissing(CatalogError):
    """There is no image of this name, and none can be made.

    Attributes:
        name: The image's name.
    """

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class PackCorrupt(CatalogError):
    """A pack's files differ from its manifest.

    The pack is moved aside and built again.
    """
