"""Who a machine belongs to, when its process forks."""

from __future__ import annotations

import os

import pytest

from pytest_vmbottle.errors import MachineError
from pytest_vmbottle.host.ownership import Owner


def test_who_made_it_owns_it_and_anybody_else_is_told_which_process_does() -> None:
    mine, other = Owner(), Owner(os.getppid())
    mine.check("the machine web")
    assert mine.is_us
    assert not other.is_us
    with pytest.raises(MachineError, match=str(os.getppid())):
        other.check("the machine web")
