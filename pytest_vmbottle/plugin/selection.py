"""Runs of pytest that do something with the selected tests, and run none of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import TypeVar

import pytest

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.plugin.session import SESSION

__all__ = ["run_instead"]

# This process has imported the plugin before pytest does, which is no mistake of a project that takes warnings for errors.
_IMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"

# No assertion fails. To rewrite them takes most of the time where no earlier run has done it, as on a fresh runner.
_QUICK = ("--assert=plain",)

T = TypeVar("T")


class _Instead:
    """Plugin that does something with the selected tests, and runs none of them."""

    def __init__(self, do: Callable[[pytest.Session], None], *, machines: bool) -> None:
        self._do, self._machines = do, machines

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        """Keep pytest-xdist from starting workers, which `addopts` may ask for, here or on hosts of the environment or the ini file."""
        # A list of hosts that has none; an empty text would leave it to the environment.
        for name, value in (("numprocesses", None), ("tx", []), ("dist", "no"), ("vm_hosts", ",")):
            if hasattr(config.option, name):
                setattr(config.option, name, value)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Leave the host alone, unless there will be machines."""
        if not self._machines:
            session.config.stash[SESSION].only_asked = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Do it, unless some tests could not be collected."""
        if session.testsfailed:
            raise session.Failed(f"{session.testsfailed} error{'s' if session.testsfailed > 1 else ''} during collection")
        self._do(session)
        return True


def run_instead(args: Sequence[str], do: Callable[[pytest.Session], list[T]], *, machines: bool) -> tuple[int, list[T]]:
    """Collect tests as pytest does, with its options and the project's, and do something with them; return pytest's status and the results.

    What pytest writes goes to standard error, since standard output is for the results.

    Args:
        args: Arguments for pytest: paths, node ids, options.
        do: Function that gets the session with the tests that are left in its `items`.
        machines: Whether it makes machines; else the tests are only looked at, which is quicker.

    Raises:
        VMBottleError: It did.
    """
    results: list[T] = []
    failed: list[VMBottleError] = []

    def guarded(session: pytest.Session) -> None:
        # Raised below: within pytest it would be told as an error of pytest.
        try:
            results.extend(do(session))
        except VMBottleError as error:
            failed.append(error)

    with redirect_stdout(sys.stderr):
        status = int(
            pytest.main(["-qq", "-W", _IMPORTED, *([] if machines else _QUICK), *args], plugins=[_Instead(guarded, machines=machines)])
        )
    if failed:
        raise failed[0]
    return status, results
