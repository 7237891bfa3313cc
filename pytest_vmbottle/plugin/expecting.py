"""Machines of the next test, which are made while a test runs on its own."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from pytest_vmbottle.errors import VMBottleError
from pytest_vmbottle.plugin.collection import specs_of

if TYPE_CHECKING:
    from pytest_vmbottle.plugin.session import Session

__all__ = ["Expecting"]


class Expecting:
    """Hook that has the machines of the next test made, when those of a test are there and it begins to use them."""

    def __init__(self, session: Session) -> None:
        """Take the run."""
        self._session = session
        self._following: pytest.Item | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, nextitem: pytest.Item | None) -> None:
        """Note which test comes next."""
        self._following = nextitem

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        """Have the machines of the next test made."""
        # Whatever is wrong with that test is told when it runs.
        with suppress(VMBottleError, OSError, pytest.UsageError):
            self._expect()

    def _expect(self) -> None:
        following, backend_for = self._following, self._session.options.backend_for
        # Others are shared, or made by the test itself.
        has_own = following is not None and "vms" in getattr(following, "fixturenames", ())
        wanted = specs_of(following) if following is not None and has_own else []
        for name, provisioner in self._session.provisioners.items():
            provisioner.expect([spec for spec in wanted if backend_for(spec.backend) == name])
