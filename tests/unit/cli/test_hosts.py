"""`vmbottle hosts`, before any host is asked."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from pytest_vmbottle.cli import main


@pytest.mark.parametrize("address", ["lab", "ssh://-oProxyCommand=x", "ssh://lab?shell=x"])
def test_an_address_that_is_none_is_a_wrong_call(address: str) -> None:
    ended = CliRunner().invoke(main, ["hosts", address])

    assert ended.exit_code == 2
    assert "takes ssh://[USER@]HOST" in ended.stderr


def test_hosts_may_be_in_the_environment() -> None:
    ended = CliRunner(env={"VMBOTTLE_HOSTS": "ssh://lab,nonsense"}).invoke(main, ["hosts"])

    assert ended.exit_code == 2
    assert "'nonsense'" in ended.stderr
