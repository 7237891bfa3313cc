"""Units of a guest's systemd, those of the system and those of a user."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from pytest_vmbottle.result import Result, printable

__all__ = ["NO_USER", "GuestUnit", "UnitState", "journal", "show"]

NO_USER = 125
"""Status of a command for a user that there is not."""
# systemctl shows no number for `Job` if nothing is queued for the unit.
_PROPERTIES = "LoadState,ActiveState,SubState,Job,Result,InactiveEnterTimestampMonotonic"
# A login would set it. The socket of the user's manager is in this folder, which is there as long as the manager runs.
_OF_USER = 'export XDG_RUNTIME_DIR="/run/user/$(id -u)"; exec "$@"'


def _command(program: str, *words: str, of_user: bool) -> list[str]:
    return ["sh", "-c", _OF_USER, "sh", program, "--user", *words] if of_user else [program, *words]


def show(unit: str, *, of_user: bool) -> list[str]:
    """Return the command that shows what a `UnitState` is made of.

    With `of_user` the unit is one of the user who runs the command.
    """
    return _command("systemctl", "show", "-p", _PROPERTIES, "--", unit, of_user=of_user)


def journal(unit: str, *, of_user: bool) -> list[str]:
    """Return the command that prints the last lines of a unit's journal."""
    return _command("journalctl", "--no-pager", "-n", "20", "-u", unit, of_user=of_user)


@attrs.frozen
class UnitState:
    """State of a unit, by its properties; without any if there is no systemd to be asked.

    Attributes:
        properties: The properties by name.
        complaint: The error message of systemctl.
    """

    properties: Mapping[str, str]
    complaint: str = ""

    @classmethod
    def of(cls, shown: Result) -> UnitState:
        """Return the state that the command of `show` has printed."""
        return cls(_parsed(shown.stdout), printable(shown.stderr.strip()))

    @property
    def is_loaded(self) -> bool:
        """Tell whether there is such a unit."""
        return self.properties.get("LoadState", "not-found") != "not-found"

    @property
    def is_missing(self) -> bool:
        """Tell whether systemd has no such unit."""
        return self.properties.get("LoadState") == "not-found"

    @property
    def is_active(self) -> bool:
        """Tell whether it is active."""
        return self._active == "active"

    @property
    def has_finished(self) -> bool:
        """Tell whether it has run since the boot, has succeeded, and is over."""
        if self._active == "active":
            return self.properties.get("SubState") == "exited"  # with RemainAfterExit=
        ran = self.properties.get("InactiveEnterTimestampMonotonic", "0") not in ("", "0")
        return self._is_idle and ran and self.properties.get("Result", "success") == "success"

    @property
    def is_hopeless(self) -> bool:
        """Tell whether it will not become active by itself: it failed, is missing, or is inactive without a job."""
        return self._active == "failed" or self._is_idle or self.is_missing

    @property
    def _active(self) -> str:
        return self.properties.get("ActiveState", "")

    @property
    def _is_idle(self) -> bool:
        return self._active == "inactive" and not self.properties.get("Job")

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.properties.items()) or self.complaint


class GuestUnit:
    """A systemd unit in a guest. Each question and each verb runs systemctl there.

    Attributes:
        name: Its name.
        user: The user whose unit it is; None for one of the system.
    """

    def __init__(self, name: str, exec: Callable[..., Result], *, user: str | None = None) -> None:  # noqa: A002 - Machine's word
        """Take the unit's name, the machine's `exec`, and the user whose unit it is."""
        self.name, self.user, self._exec = name, user, exec

    @property
    def state(self) -> str:
        """Its state: systemd's `ActiveState`, such as `"active"`, `"inactive"` or `"failed"`, or `"not-found"` if there is no such unit.

        Raises:
            CommandFailed: The guest has no systemd, or none of that user runs.
        """
        shown = self._show("-p", "LoadState,ActiveState")
        return "not-found" if shown["LoadState"] == "not-found" else shown["ActiveState"]

    @property
    def properties(self) -> dict[str, str]:
        """All its properties by name, as `systemctl show` prints them.

        Raises:
            CommandFailed: The guest has no systemd, or none of that user runs.
        """
        return self._show()

    def property(self, name: str) -> str:
        """Return one of its properties, as `systemctl show` prints it.

        Raises:
            LookupError: Units of its kind have no such property.
            CommandFailed: The guest has no systemd, or none of that user runs.
        """
        try:
            return self._show("-p", name)[name]
        except KeyError:
            raise LookupError(f"{self.name} has no property {name!r}; `systemctl show` lists those it has") from None

    def start(self, *, timeout: float = 60) -> None:
        """Start it, and return when it has started.

        Raises:
            CommandFailed: It could not be started.
            CommandTimeout: It had not started after so many seconds.
        """
        self._systemctl("start", timeout=timeout)

    def stop(self, *, timeout: float = 60) -> None:
        """Stop it, and return when it has ended.

        Raises:
            CommandFailed: It could not be stopped.
            CommandTimeout: It had not ended after so many seconds.
        """
        self._systemctl("stop", timeout=timeout)

    def restart(self, *, timeout: float = 60) -> None:
        """Stop and start it, and return when it has started.

        Raises:
            CommandFailed: It could not be started.
            CommandTimeout: It had not started after so many seconds.
        """
        self._systemctl("restart", timeout=timeout)

    def _show(self, *options: str) -> dict[str, str]:
        return _parsed(self._systemctl("show", *options).stdout)

    def _systemctl(self, *words: str, timeout: float = 60) -> Result:
        command = _command("systemctl", *words, "--", self.name, of_user=self.user is not None)
        # As root also where commands run as another user: nobody else may start a unit of the system.
        return self._exec(command, user=self.user or "root", timeout=timeout)

    def __repr__(self) -> str:
        return f"<GuestUnit {self.name}{f' of {self.user}' if self.user else ''}>"


def _parsed(shown: str) -> dict[str, str]:
    """Return properties by name; the lines of one that is printed several times, such as `ExecStart` of a oneshot, are joined."""
    properties: dict[str, str] = {}
    for name, equals, value in (line.partition("=") for line in shown.splitlines()):
        if equals:
            properties[name] = f"{properties[name]}\n{printable(value)}" if name in properties else printable(value)
    return properties
